"""Read a config, and write one so that nothing half-written is left."""

import os
import tempfile
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mmengine.config import Config

from ..launch import HOSTS, load_config
from ..preflight import ConfigError
from .report import SwapError

_WITHOUT_MEANING = (type(None), bool, int, float, complex, str, bytes)


def write_config(cfg: Config, path: str | os.PathLike) -> None:
    """Write a config to a Python file, and read it back before it is there.

    Args:
        cfg (Config): What to write.
        path (str | PathLike): The file, in an existing folder. Another file
            of that name is replaced, at once.

    Raises:
        SwapError: There is no such folder, or the config holds what a file
            cannot (a function, a module); the message says where.
    """
    path = Path(path)
    check_folder(path)
    values = cfg.to_dict()
    _check_values(values, '')
    with tempfile.TemporaryDirectory(
            dir=path.parent, prefix=f'.{path.name}-') as folder:
        draft = Path(folder, path.stem + '.py')
        draft.write_text(cfg.pretty_text, encoding='utf-8')
        # custom_imports ran when the config was read the first time.
        again = Config.fromfile(draft, import_custom_modules=False).to_dict()
        if again != values:
            lost = sorted(k for k in {*values, *again}
                          if values.get(k) != again.get(k))
            raise SwapError(f'{path}: the written config would differ in '
                            f'{", ".join(lost)}')
        os.replace(draft, path)


def read_config(path: str, options: Mapping[str, Any] | None = None) -> Config:
    """Read a config file as the hosts do.

    Args:
        path (str): The file; or ``HOST::NAME``, a config that an installed
            host ships, such as ``mmdet::detr/detr_r50_8xb2-150e_coco.py``.
        options (Mapping, optional): Values by dotted key, merged into it.

    Raises:
        MissingPathError: If there is no such file.
        SwapError: It is no config, or the host is not installed; the message
            says why, in one line.
    """
    path = config_path(path)
    try:
        return load_config(path, options)
    except SyntaxError as error:
        raise SwapError(f'{path} does not parse: line {error.lineno}: '
                        f'{error.msg}') from error
    except (ArithmeticError, AssertionError, AttributeError, ImportError,
            LookupError, NameError, OSError, RuntimeError, TypeError,
            ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        # A config is a program, so it can fail in any way.
        text = ' '.join(str(error).split())
        raise SwapError(f'{path} does not parse: {type(error).__name__}: '
                        f'{text[:400]}') from error


def config_path(name: str) -> str:
    """The file that a path or ``HOST::NAME`` stands for.

    mmengine's own ``::`` looks for a distribution, which the forks of the
    hosts call by another name.

    Raises:
        SwapError: The host is not installed, or without its configs.
    """
    host, separator, rest = name.partition('::')
    if not separator:
        return name
    if host not in HOSTS:
        raise SwapError(f'{name}: {host!r} is no host; use one of '
                        f'{", ".join(HOSTS)}')
    spec = find_spec(host)
    folders = (spec and spec.submodule_search_locations) or ()
    for folder in folders:
        root = Path(folder, '.mim', 'configs')
        if root.is_dir():
            return str(root / rest)
    raise SwapError(f'{name}: {host} is not installed, or without its configs '
                    '(.mim/configs)')


def check_file(path: Path, config: str, overwrite: bool) -> None:
    """Raise SwapError unless ``path`` may be written.

    Args:
        path (Path): The file to write.
        config (str): The file that is read, which is never written.
        overwrite (bool): Whether another file may be replaced.
    """
    check_folder(path)
    if path.exists() and os.path.exists(config) and path.samefile(config):
        raise SwapError(f'{path} is the config that is read; name another '
                        'file with -o')
    if path.exists() and not overwrite:
        raise SwapError(f'{path} is there already; name another file with '
                        '-o, or pass --overwrite')


def check_folder(path: Path) -> None:
    """Raise SwapError unless a config can be written to ``path``."""
    if path.suffix != '.py':
        raise SwapError(f'{path}: the name of a config must end in .py')
    if not path.parent.is_dir():
        raise SwapError(f'{path}: there is no folder {str(path.parent)!r}; '
                        'make it first')
    if path.is_dir():
        raise SwapError(f'{path} is a folder')


def _check_values(node: object, key: str) -> None:
    if isinstance(node, dict):
        for name, child in node.items():
            _check_values(child, f'{key}.{name}' if key else str(name))
    elif isinstance(node, (list, tuple)):
        for i, child in enumerate(node):
            _check_values(child, f'{key}.{i}')
    elif not isinstance(node, _WITHOUT_MEANING):
        raise SwapError(f'{key} is a {type(node).__name__}, which a config '
                        'file cannot hold')
