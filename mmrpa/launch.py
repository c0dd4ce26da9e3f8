"""What tools/train.py and tools/test.py share.

Both read a config, find the host that it belongs to, check it, and run that
host's own script unchanged, so that every flag and every default is the
host's.
"""

import argparse
import errno
import logging
import os
import pickle
import re
import runpy
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

from mmrpa.cpu_amp import amp_on_cpu
from mmrpa.elastic import (
    end_with_launcher,
    means,
    restart_flags,
    settle_resume,
)
from mmrpa.interfaces import choose_gloo_interface
from mmrpa.preflight import (
    ConfigError,
    MissingPathError,
    check_config,
    type_name,
)
from mmrpa.processes import check_launcher, note_drawing, write_logs_once

HOSTS = ('mmdet', 'mmseg', 'mmpretrain')
# Not pip: it builds mmcv without its operators.
_INSTALL = '`make setup` installs it, with mmcv built for torch'
_OWN_FLAGS = ('--no-preflight', '--allow-subset')
# The prefixes for which mmengine's CheckpointLoader has a loader.
_REMOTE = re.compile(
    r'(https?|pavi|modelzoo|torchvision|open-mmlab|openmmlab|mmcls|'
    r'(\S+:)?(s3|petrel))://')
_SYNC_BN = ('SyncBN', 'MMSyncBN', 'SyncBatchNorm')
# What a write meets on a full disk, over a quota, over a limit of file sizes.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# How long a process leaves it to the first one of its machine to report.
_REPORT_SECONDS = 10


def run(name: str, doc: str, argv: Sequence[str]) -> None:
    """Run the host's script ``name`` for the config that ``argv`` names.

    Args:
        name (str): 'train' or 'test'.
        doc (str): Text for ``--help``.
        argv (Sequence[str]): Arguments without the program's name.

    Raises:
        SystemExit: Code 2 for wrong usage, 1 for a config that cannot run;
            the first process of each machine says why.
    """
    args = _parse(name, doc, argv)
    if args.launcher == 'pytorch':
        end_with_launcher()
    asks_help = any(arg in ('-h', '--help') for arg in argv)
    try:
        script, host_argv, cpu_timeout, after_full = _prepare(
            name, args, argv, asks_help)
    except ConfigError as error:
        _stop(f'{name}.py: error: {error}')
    if asks_help:
        print(doc.strip())
    if asks_help or _local_rank() == 0:
        print(f'mmrpa: {args.config} is run by {script}', flush=True)
    sys.argv = [str(script), *host_argv]
    from mmrpa.safe_loading import (
        CheckpointSaveError,
        explain_refusal,
        protect_process,
    )
    from mmrpa.testing import checked_tests
    from mmrpa.weights.files import CheckpointError
    protect_process()
    write_logs_once()
    checked = name == 'test' and not args.no_preflight
    try:
        with checked_tests() if checked else nullcontext():
            if cpu_timeout is not None:
                _run_on_cpu(script, cpu_timeout)
            else:
                runpy.run_path(str(script), run_name='__main__')
    except (CheckpointError, CheckpointSaveError, ConfigError) as error:
        _stop(f'{name}.py: error: {error}')
    except pickle.UnpicklingError as error:
        _stop(f'{name}.py: error: {explain_refusal(error)}')
    except OSError as error:
        if error.errno not in _FULL:
            raise
        what = f' ({error.filename})' if error.filename else ''
        _stop(f'{name}.py: error: {error.strerror}{what}. {after_full}')


def _after_full(name: str, cfg: Mapping) -> str:
    """What to do after the disk was full."""
    if name != 'train':
        return 'Make room, then start it again'
    hooks = [*(cfg.get('default_hooks') or {}).values(),
             *(cfg.get('custom_hooks') or ())]
    kinds = [hook.get('type') if isinstance(hook, Mapping) else type(hook)
             for hook in hooks]
    names = [str(getattr(kind, '__name__', kind)).split('.')[-1]
             for kind in kinds]
    state = ('Checkpoints that were written are as they were'
             if 'SafeCheckpointHook' in names else
             'The newest checkpoint may be half-written; --resume checks it')
    return f'{state}: make room, then start it again with --resume'


def _parse(name: str, doc: str, argv: Sequence[str]) -> argparse.Namespace:
    """Parse those arguments that must be known before the host runs.

    The paths must come first: what follows a flag that only the host knows
    cannot be told from its value.
    """
    positional = ['config'] if name == 'train' else ['config', 'checkpoint']
    usage = f'{name}.py {" ".join(p.upper() for p in positional)} [flags]'
    if not argv or argv[0] in ('-h', '--help'):
        print(f'usage: {usage}\n\n{doc.strip()}\n\nhosts found here:')
        for host in HOSTS:
            print(f'  {host:11s}', _tools_folder(host) or 'not installed')
        raise SystemExit(0 if argv else 2)
    asks_help = any(arg in ('-h', '--help') for arg in argv)
    if asks_help and len(argv) - 1 < len(positional):
        argv = [argv[0], *positional[1:]]
    for i, position in enumerate(positional):
        if i >= len(argv) or argv[i].startswith('-'):
            print(f'{name}.py: error: {position.upper()} is missing, or not '
                  f'argument {i + 1}\nusage: {usage}', file=sys.stderr)
            raise SystemExit(2)
    if find_spec('mmengine') is None:
        _stop(f'{name}.py: error: mmengine is not installed: {_INSTALL}')
    from mmrpa.cfg_options import DictAction
    parser = argparse.ArgumentParser(f'{name}.py', usage, add_help=False)
    for position in positional:
        parser.add_argument(position)
    parser.add_argument('--cfg-options', nargs='+', action=DictAction)
    parser.add_argument('--launcher', default='none')
    parser.add_argument('--amp', action='store_true')
    parser.add_argument('--work-dir')
    parser.add_argument('--resume', nargs='?', const='auto')
    parser.add_argument('--auto-scale-lr', action='store_true')
    parser.add_argument('--no-validate', action='store_true')
    if name == 'test':
        parser.add_argument('--show', action='store_true')
        parser.add_argument('--show-dir')
    # Our own flags are not the parser's: it would take the abbreviation
    # --no-p, which mmpretrain knows as --no-pin-memory, for ours.
    own = {flag[2:].replace('-', '_'): flag in argv for flag in _OWN_FLAGS}
    args, _ = parser.parse_known_args(
        [arg for arg in argv if arg not in _OWN_FLAGS])
    return argparse.Namespace(**vars(args), **own)


def _prepare(name: str, args: argparse.Namespace, argv: Sequence[str],
             asks_help: bool) -> tuple[Path, list[str], timedelta | None, str]:
    """Check everything.

    Returns:
        tuple: The host's script, the arguments for it, the time-out of the
        process group if this is a distributed run on CPUs, else None, and
        what to tell the user when the disk is full.
    """
    if not asks_help:
        check_launcher(name, args.launcher)
    cfg = load_config(args.config, args.cfg_options)
    scope = cfg.get('default_scope')
    script = find_script(scope, name)
    host_argv = [arg for arg in argv if arg not in _OWN_FLAGS]
    if asks_help:
        return script, host_argv, None, ''
    if name == 'test':
        check_checkpoint(args.checkpoint)
        if args.show or args.show_dir:
            note_drawing('--show-dir' if args.show_dir else '--show')
    if name == 'train':
        for path in _iter_pretrained(cfg.get('model')):
            check_checkpoint(path)
        if scope == 'mmseg' and cfg.get('resume') and args.resume is None:
            raise ConfigError(
                f'resume={cfg["resume"]!r} is in the config, but mmseg goes '
                'by its flag alone: it would start anew, over the '
                'checkpoints that are there. Add --resume, or --cfg-options '
                'resume=False to start anew')
        # By mmseg's --resume beside it one names the file to go on from.
        named = scope == 'mmseg' and 'load_from' in (args.cfg_options or {})
        start = args.resume
        if start is None or (start == 'auto' and named):
            start = cfg.get('load_from')
        if args.resume == 'auto' and cfg.get('load_from') and not named:
            host_argv, note = settle_resume(host_argv, args.config, cfg,
                                            args.work_dir)
            if note is not None:
                start = cfg.get('load_from')
                if _local_rank() == 0:
                    print(f'mmrpa: {note}', flush=True)
        # Else the data are loaded before it is looked for.
        if isinstance(start, str) and start != 'auto':
            check_checkpoint(start, may_be_folder=True)
        flags, note = restart_flags(args.config, cfg, args.work_dir)
        host_argv += flags
        if note is not None and _local_rank() == 0:
            print(f'mmrpa: {note}', flush=True)
    if args.auto_scale_lr:
        host_argv = _scale_lr(cfg, scope, host_argv)
    if name == 'train':
        host_argv = amp_on_cpu(cfg, args.amp, host_argv)
        host_argv += _data_check_options(cfg, args)
    cpu_timeout = None
    if args.launcher != 'none':
        options = _cpu_options(cfg, args.launcher)
        if options is not None:
            # mmengine's DictAction adds up the occurrences of the flag.
            host_argv += ['--cfg-options', *options]
            dist_cfg = (cfg.get('env_cfg') or {}).get('dist_cfg') or {}
            cpu_timeout = timedelta(seconds=dist_cfg.get('timeout', 1800))
    if not args.no_preflight:
        splits = ('train', 'val') if name == 'train' else ('test', )
        if args.no_validate:
            splits = splits[:1]
        try:
            notes = check_config(cfg, splits, args.allow_subset)
            if name == 'train' and _local_rank() == 0:
                # The others wait for this one as soon as they form a group.
                from mmrpa.hooks.data_check import check_early
                check_early(cfg, splits, args.allow_subset)
        except ConfigError as error:
            raise type(error)(f'{error}\n(--no-preflight leaves out these '
                              'checks)') from error
        for note in notes if _local_rank() == 0 else ():
            print(f'mmrpa: {note}', flush=True)
    return script, host_argv, cpu_timeout, _after_full(name, cfg)


def _data_check_options(cfg: Mapping, args: argparse.Namespace) -> list[str]:
    """Tell DataCheckHook, which checks again, what the user accepts."""
    from mmrpa.hooks.data_check import find_data_checks
    options = []
    for key, _ in find_data_checks(cfg):
        if args.allow_subset:
            options.append(f'{key}.allow_subset=True')
        if args.no_preflight:
            options.append(f'{key}.enabled=False')
    return ['--cfg-options', *options] if options else []


def load_config(path: str, options: Mapping | None = None) -> Mapping:
    """Load a config as the hosts do.

    Args:
        path (str): The config file.
        options (Mapping, optional): Values by dotted key, merged into it.

    Raises:
        MissingPathError: If there is no such file.
    """
    from mmengine.config import Config
    if not os.path.isfile(path):
        raise MissingPathError(f'config {path!r} does not exist (working '
                               f'directory {os.getcwd()})')
    cfg = Config.fromfile(path)
    if options:
        cfg.merge_from_dict(options)
    return cfg


def _tools_folder(host: str) -> Path | None:
    """Folder of the host's scripts, None if there is no such folder."""
    spec = find_spec(host)
    for location in (spec and spec.submodule_search_locations) or ():
        folder = Path(location, '.mim', 'tools')
        if folder.is_dir():
            return folder
    return None


def find_script(scope: str | None, name: str) -> Path:
    """Find ``.mim/tools/<name>.py`` of the host that a scope names.

    The host is found by import, not by distribution: the originals and the
    forks differ in the latter.

    Args:
        scope (str | None): The config's ``default_scope``.
        name (str): File name without ``.py``.

    Raises:
        ConfigError: If the scope names no host, the host is not installed, or
            it was installed without its scripts.
    """
    if scope not in HOSTS:
        raise ConfigError(f'default_scope={scope!r} names no host: it must '
                          f'be one of {", ".join(map(repr, HOSTS))}')
    if find_spec(scope) is None:
        raise ConfigError(f'the config has default_scope={scope!r}, but '
                          f'{scope} is not installed: {_INSTALL}')
    folder = _tools_folder(scope)
    if folder is None or not (folder / f'{name}.py').is_file():
        raise ConfigError(f'{scope} is installed without its scripts (no '
                          f'.mim/tools/{name}.py in it). Install its wheel: '
                          f'{_INSTALL}')
    return (folder / f'{name}.py').resolve()


def check_checkpoint(path: str, may_be_folder: bool = False) -> None:
    """Raise MissingPathError unless it is a file or a URL for mmengine.

    Args:
        path (str): As a command or config names it.
        may_be_folder (bool): Take a folder, too: DeepSpeed writes these.
    """
    if _REMOTE.match(path):
        return
    there = os.path.exists if may_be_folder else os.path.isfile
    if not there(os.path.expanduser(path)):
        raise MissingPathError(
            f'checkpoint {path!r} does not exist (working directory '
            f'{os.getcwd()}). Give a file, or a URL that begins with http:// '
            'or https:// or another prefix known to mmengine')


def _iter_pretrained(node: object) -> Iterator[str]:
    """Yield each file that some ``init_cfg`` of a model config names."""
    if isinstance(node, Mapping):
        if type_name(node) == 'Pretrained' and isinstance(
                node.get('checkpoint'), str):
            yield node['checkpoint']
        for child in node.values():
            yield from _iter_pretrained(child)
    elif isinstance(node, (list, tuple)):
        for child in node:
            yield from _iter_pretrained(child)


def _scale_lr(cfg: Mapping, scope: str, argv: list[str]) -> list[str]:
    """Give ``--auto-scale-lr`` a meaning for mmseg, which lacks the flag."""
    if (cfg.get('auto_scale_lr') or {}).get('base_batch_size') is None:
        raise ConfigError('--auto-scale-lr needs auto_scale_lr=dict('
                          'base_batch_size=...) in the config, the batch size '
                          'that its learning rate is meant for')
    if scope == 'mmseg':
        argv = [arg for arg in argv if not means(arg, '--auto-scale-lr')]
    elif scope != 'mmdet' or 'enable' in cfg['auto_scale_lr']:
        return argv  # mmdet's script ends with a traceback without the key
    return [*argv, '--cfg-options', 'auto_scale_lr.enable=True']


def _cpu_options(cfg: Mapping, launcher: str) -> list[str] | None:
    """Overrides that a distributed run needs where there is no GPU.

    mmengine gives DDP the device LOCAL_RANK, which a CPU run does not have.
    What else it would give is written out, because it gives nothing else to
    a wrapper that has a config.

    Returns:
        list[str] | None: ``key=value`` items, None if there is a GPU.

    Raises:
        ConfigError: If the launcher or a layer of the model works with GPUs
            only, or if nobody has launched the process.
    """
    from mmengine.device import get_device
    if launcher == 'pytorch' and 'RANK' not in os.environ:
        raise ConfigError('--launcher pytorch is for processes that torchrun '
                          'has started: use tools/dist_train.sh or '
                          'tools/dist_test.sh')
    if get_device() != 'cpu':
        return None
    if launcher != 'pytorch':
        raise ConfigError(f'--launcher {launcher} needs GPUs, and there is '
                          'none here. On CPUs use tools/dist_train.sh or '
                          'tools/dist_test.sh')
    keys = list(_iter_sync_bn(cfg.get('model'), 'model'))
    if cfg.get('sync_bn') is not None:
        raise ConfigError(f'sync_bn={cfg["sync_bn"]!r} needs GPUs, and there '
                          'is none here. Run with --cfg-options sync_bn=None')
    if keys:
        fix = ' '.join(f'{key}=BN' for key in keys)
        raise ConfigError(
            'SyncBN works on GPUs only, and there is none here. Run with one '
            'process (mmengine then uses BN), or with BN, whose statistics '
            f'are those of each process: --cfg-options {fix}')
    wrapper = cfg.get('model_wrapper_cfg')
    if wrapper is None:
        unused = bool(cfg.get('find_unused_parameters', False))
        return [
            'model_wrapper_cfg.type=MMDistributedDataParallel',
            'model_wrapper_cfg.device_ids=None',
            'model_wrapper_cfg.broadcast_buffers=False',
            f'model_wrapper_cfg.find_unused_parameters={unused}'
        ]
    return ['model_wrapper_cfg.device_ids=None']


def _iter_sync_bn(node: object, key: str) -> Iterator[str]:
    """Yield the dotted key of each ``type`` that is a synchronised BN."""
    if isinstance(node, Mapping):
        if type_name(node) in _SYNC_BN:
            yield f'{key}.type'
        for name, child in node.items():
            yield from _iter_sync_bn(child, f'{key}.{name}')
    elif isinstance(node, (list, tuple)):
        for i, child in enumerate(node):
            yield from _iter_sync_bn(child, f'{key}.{i}')


def _run_on_cpu(script: Path, timeout: timedelta) -> None:
    """Run the script in a process group over gloo.

    mmengine's launcher calls ``torch.cuda.set_device`` in any case, but it
    leaves a group alone that exists already.
    """
    from torch import distributed as dist
    interface = choose_gloo_interface()
    if int(os.environ['RANK']) == 0:
        print('mmrpa: no GPU here: the processes work on CPUs and communicate '
              "over 'gloo', whatever env_cfg.dist_cfg says", flush=True)
    if interface is not None and _local_rank() == 0:
        print(f'mmrpa: gloo uses the interface {interface!r}, which reaches '
              'MASTER_ADDR (GLOO_SOCKET_IFNAME names another one)', flush=True)
    dist.init_process_group('gloo', timeout=timeout)
    try:
        runpy.run_path(str(script), run_name='__main__')
        dist.barrier()  # nobody leaves while another one still talks to it
    finally:
        dist.destroy_process_group()
    # C++ threads of DDP can outlive Python's teardown, which then aborts a
    # process that has done all its work (seen once in torch 2.11, "terminate
    # called without an active exception").
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _local_rank() -> int:
    """Rank of this process on its machine, 0 if nobody has launched it."""
    for name in ('LOCAL_RANK', 'SLURM_LOCALID', 'OMPI_COMM_WORLD_LOCAL_RANK'):
        if name in os.environ:
            return int(os.environ[name])
    return 0


def _stop(message: str) -> NoReturn:
    """Exit with code 1; the first process of the machine says why.

    The launcher ends all processes as soon as one has ended, so the others
    wait. One that is still alive after that has met an error of its own.
    """
    if _local_rank() != 0:
        time.sleep(_REPORT_SECONDS)
    print(message, file=sys.stderr, flush=True)
    raise SystemExit(1)
