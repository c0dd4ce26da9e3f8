"""What belonged to the old backbone and stands elsewhere in the config."""

from collections.abc import Iterator
from typing import Any

from .fields import NAMES, take, walk
from .report import Report, short, type_name

_UNUSED_IMPORTS = ('mmpretrain', 'mmcls', 'mmdet', 'mmseg')


def drop_leftovers(cfg: dict[str, Any], old: dict[str, Any],
                   report: Report) -> None:
    """Remove checkpoints, imports and hooks of the old backbone.

    Args:
        cfg (dict): The whole config, with the new backbone already in it;
            changed in place.
        old (dict): The old backbone's config.
        report (Report): Takes the lines.
    """
    _drop_checkpoints(cfg, report)
    _drop_variables(cfg, old, report)
    _drop_imports(cfg, old, report)
    _drop_hooks(cfg, report)
    for key, node in _backbones(cfg):
        report.leave(key, f'{type_name(node)}: another network of this config '
                     'than the one whose backbone is swapped')


def describe_old(old: dict[str, Any]) -> str:
    """The old backbone's settings that are gone, by name."""
    gone = [name for name in old if name not in ('type', 'init_cfg')]
    text = ', '.join(f'{name}={short(old[name], 30)}' for name in gone[:12])
    if len(gone) > 12:
        text += f' and {len(gone) - 12} more'
    init = old.get('init_cfg') or {}
    if isinstance(init, dict) and init.get('checkpoint'):
        text += f'; its weights, {init["checkpoint"]}'
    return text or 'no settings'


def _drop_checkpoints(cfg: dict[str, Any], report: Report) -> None:
    if cfg.get('load_from'):
        report.change('load_from', f'None for {short(cfg["load_from"])}',
                      'the checkpoint holds the whole old model; use '
                      'model.backbone.init_cfg for weights of the new '
                      'backbone')
        cfg['load_from'] = None
    if cfg.get('resume') is True:
        cfg['resume'] = False
        report.change('resume', 'False', 'a run of the old model cannot go on')
    for key, node in walk(cfg.get('model'), 'model'):
        if _is_other_network(key):
            continue
        if node.get('pretrained'):
            report.change(f'{key}.pretrained', 'removed',
                          f'{short(node["pretrained"])} is for the old '
                          'backbone')
            del node['pretrained']
        elif 'pretrained' in node and 'backbone' in node:
            del node['pretrained']
        init = node.get('init_cfg')
        if key.endswith('.backbone') or type_name(init) != 'Pretrained':
            continue
        del node['init_cfg']
        report.change(f'{key}.init_cfg', 'removed',
                      f'{short(init.get("checkpoint"))} was trained with the '
                      'old backbone')


def _drop_variables(cfg: dict[str, Any], old: dict[str, Any],
                    report: Report) -> None:
    """Helper variables of the file that held the old backbone's address."""
    init = old.get('init_cfg') or {}
    addresses = [init.get('checkpoint') if isinstance(init, dict) else None,
                 old.get('pretrained')]
    for name in [n for n, value in cfg.items()
                 if isinstance(value, str) and value and value in addresses]:
        del cfg[name]
        report.change(name, 'removed',
                      "this variable held the old backbone's weights")


def _drop_imports(cfg: dict[str, Any], old: dict[str, Any],
                  report: Report) -> None:
    """Imports that only the old backbone's type needed."""
    imports = cfg.get('custom_imports')
    if not isinstance(imports, dict) or not imports.get('imports'):
        return
    names = take(imports, 'imports', NAMES, 'custom_imports')
    names = [names] if isinstance(names, str) else list(names)
    kinds = [str(node.get('type')) for _, node in walk(cfg)]
    scope = str(old.get('type')).rpartition('.')[0].split('.')[0]
    kept = []
    for name in names:
        package = name.split('.')[0]
        used = any(kind.startswith(f'{package}.') for kind in kinds)
        if package in _UNUSED_IMPORTS and package == scope and not used:
            report.change('custom_imports', f'{name} removed',
                          'only the old backbone needed it')
        else:
            kept.append(name)
            report.leave('custom_imports', f'{name}, kept: it may register '
                         'more than the old backbone')
    if kept:
        imports['imports'] = kept
    else:
        del cfg['custom_imports']


def _drop_hooks(cfg: dict[str, Any], report: Report) -> None:
    """Hooks that name layers of the old backbone."""
    hooks = cfg.get('custom_hooks')
    if not isinstance(hooks, (list, tuple)):
        return
    kept = []
    for i, hook in enumerate(hooks):
        named = [text for text in _strings(hook) if 'backbone.' in text]
        if named:
            report.change(f'custom_hooks.{i}', f'{type_name(hook)} removed',
                          f'it names {short(named[0])} of the old backbone')
        else:
            kept.append(hook)
    if len(kept) < len(hooks):
        cfg['custom_hooks'] = kept


def _is_other_network(key: str) -> bool:
    parts = key.split('.')
    return any(part == 'reid' or 'teacher' in part for part in parts)


def _backbones(cfg: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Backbones that are not mmrpa's."""
    for key, node in walk(cfg):
        for name, child in node.items():
            if 'backbone' in str(name) and isinstance(child, dict) and (
                    child.get('type')
                    and not str(child['type']).startswith('mmrpa.')):
                yield f'{key}.{name}'.lstrip('.'), child
        for name in ('teacher_config', 'teacher_ckpt'):
            if node.get(name) and key:
                yield f'{key}.{name}', dict(type=short(node[name]))


def _strings(node: Any) -> Iterator[str]:
    if isinstance(node, str):
        yield node
    elif isinstance(node, dict):
        for name, child in node.items():
            yield from _strings(str(name))
            yield from _strings(child)
    elif isinstance(node, (list, tuple)):
        for child in node:
            yield from _strings(child)
