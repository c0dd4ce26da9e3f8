"""How our tools and hooks read checkpoints: no code is run, no noise is read.

mmengine reads checkpoints for ``load_from``, ``--resume`` and ``init_cfg``
with ``torch.load``; where that refuses a file, mmengine 0.10.12 of the forks
reads it again without any protection, and 0.10.7 has no protection at all
before torch 2.6. Both run a text in ``meta['config']`` as Python when they
resume. Neither notices changed bytes. :func:`use_safe_reader` puts
:func:`read_training_checkpoint` in their place, and :func:`forbid_unsafe`
closes what other ways there are.
"""

import contextlib
import hashlib
import importlib
import logging
import os
import pickle
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.parse import urlparse

import torch

from .weights.files import (
    SAFETENSORS,
    CheckpointError,
    check_archive,
    explained,
    file_kind,
    read_checkpoint,
)

_FORBID = 'TORCH_FORCE_WEIGHTS_ONLY_LOAD'
_ALLOW = 'TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD'
_STATISTICS = ('min', 'max', 'mean', 'current')
_ANNEALINGS = ('_annealing_cos', '_annealing_linear')
# What mmengine's checkpoints hold beside tensors and plain containers: the
# history of the losses, best scores (numpy), metadata of datasets. Calling
# them makes values and does nothing else.
_DATA_TYPES = (('builtins', 'slice'), ('datetime', 'datetime'),
               ('datetime', 'date'), ('datetime', 'timedelta'),
               ('datetime', 'timezone'), ('pathlib', 'PosixPath'),
               ('mmengine.logging.history_buffer', 'HistoryBuffer'),
               ('mmengine.config.config', 'ConfigDict'),
               ('numpy', 'ndarray'), ('numpy', 'dtype'))
_DTYPES = ('bool', 'int8', 'int16', 'int32', 'int64', 'uint8', 'uint16',
           'uint32', 'uint64', 'float16', 'float32', 'float64', 'complex64',
           'complex128', 'object', 'str', 'bytes')


class CheckpointSaveError(OSError):
    """A checkpoint that could not be written; the former one is intact."""


def read_training_checkpoint(
        path: str | Path,
        map_location: str | torch.device | Callable | None = None) -> Any:
    """Read a whole checkpoint: weights, optimiser, message hub and all.

    Beside tensors and plain containers, mmengine's ``HistoryBuffer`` and
    ``ConfigDict``, numpy arrays and scalars, dates and paths are built, and
    the function in the state of ``OneCycleLR`` is found.

    Args:
        path (str | Path): A ``.pth`` file on this machine, or a
            ``.safetensors`` file, which has weights only.
        map_location (str | torch.device | callable, optional): As for
            ``torch.load``.

    Returns:
        Any: What was saved, a dictionary as a rule.

    Raises:
        FileNotFoundError: There is no such file.
        CheckpointError: (a ValueError) The file is damaged, or loading it
            would run code. The message names the file and what to do.
    """
    path = os.path.expanduser(path)
    if not os.path.isfile(path):
        raise FileNotFoundError(f'checkpoint {path!r} does not exist (working '
                                f'directory {os.getcwd()})')
    if file_kind(path, path) == SAFETENSORS:
        return read_checkpoint(path).state_dict
    check_archive(path)
    with explained(path), allow_data_types():
        return torch.load(path, map_location=map_location, weights_only=True)


def find_refusal(path: str | Path, name: str | Path) -> str | None:
    """Why a resume will refuse a checkpoint for what it holds.

    Only the pickle in it is read, no tensor.

    Args:
        path (str | Path): Where it is.
        name (str | Path): What to call it.

    Returns:
        str | None: One sentence; None if it will be read.
    """
    try:
        with explained(str(name)), allow_data_types():
            try:
                torch.load(path, 'cpu', mmap=True, weights_only=True)
            except (OSError, RuntimeError):
                return None  # not all file systems can map a file
    except CheckpointError as error:
        return str(error)
    return None


@contextlib.contextmanager
def safe_reader() -> Iterator[None]:
    """Let mmengine read files and http addresses by the above for a while.

    That is what ``init_cfg`` and ``mmengine.runner.load_checkpoint`` use
    within the ``with`` block; after it they read as they did before, by a
    loader of the user's own if there is one.
    """
    from mmengine.runner import CheckpointLoader, checkpoint
    loaders = {prefix: CheckpointLoader._schemes[prefix]
               for prefix in ('', 'http://', 'https://')}
    by_name = checkpoint.load_from_http
    _register_loaders()
    try:
        yield
    finally:
        for prefix, loader in loaders.items():
            CheckpointLoader.register_scheme(prefix, loader, force=True)
        checkpoint.load_from_http = by_name


def use_safe_reader() -> None:
    """Let mmengine read so to the end of this process.

    For tools and for hooks of a training, not for functions: a user's program
    goes on after those. A Runner that resumes without a file looks for it by
    :mod:`mmrpa.resume_search`. It may be called again.
    """
    from mmengine.runner import _flexible_runner, runner

    from .resume_search import newest_good_checkpoint
    _register_loaders()
    # The runners look by this name for what ``resume`` goes on from, in all
    # processes. Others, who may ask in one, keep mmengine's.
    for module in (runner, _flexible_runner):
        module.find_latest_checkpoint = newest_good_checkpoint


def _register_loaders() -> None:
    from mmengine.runner import CheckpointLoader, checkpoint
    CheckpointLoader.register_scheme('', load_from_local, force=True)
    CheckpointLoader.register_scheme(
        ('http://', 'https://'), load_from_http, force=True)
    # The loaders of torchvision:// and the like call it by this name.
    checkpoint.load_from_http = load_from_http


def forbid_unsafe() -> None:
    """Make ``torch.load`` of this process and its children refuse code.

    Whatever ``weights_only`` a host or a library asks for: this is torch's
    own switch, TORCH_FORCE_WEIGHTS_ONLY_LOAD. Its opposite, if the user has
    set that, is taken out of the environment, and a line says so.
    """
    # torch refuses to read with both.
    if (os.environ.pop(_ALLOW, '0').lower() in ('1', 'y', 'yes', 'true')
            and os.environ.get('LOCAL_RANK', '0') == '0'):
        print(f'mmrpa: {_ALLOW} is ignored: checkpoints are read without '
              'running code', file=sys.stderr, flush=True)
    os.environ[_FORBID] = '1'


def protect_process() -> None:
    """What each tool does first in whose process hosts read checkpoints.

    :func:`use_safe_reader`, which says in a sentence what is wrong, and
    :func:`forbid_unsafe` for hosts' classes that call ``torch.load``.
    """
    use_safe_reader()
    forbid_unsafe()


def explain_refusal(error: pickle.UnpicklingError) -> str:
    """A sentence on what ``torch.load`` refused to a host's class.

    Args:
        error (UnpicklingError): What it raised, after
            :func:`forbid_unsafe`; it does not name the file, but its frame
            does.
    """
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if frame.f_code is torch.load.__code__:
            file = frame.f_locals['f']
            try:
                with explained(str(getattr(file, 'name', file))):
                    raise error
            except CheckpointError as refusal:
                return str(refusal)
    return f'a file was refused: {str(error).splitlines()[0]}'


def warn(text: str) -> None:
    """Log a warning."""
    from mmengine.logging import print_log
    print_log(text, logger='current', level=logging.WARNING)


# mmengine logs a loader's name from the eleventh letter on.
def load_from_local(filename: str, map_location: Any = None) -> Any:
    """mmengine's loader of files: :func:`read_training_checkpoint`.

    Without the text of a config, see :func:`_without_program`.
    """
    return _without_program(read_training_checkpoint(filename, map_location))


def load_from_http(filename: str, map_location: Any = None,
                   model_dir: str | None = None,
                   progress: bool = True) -> Any:
    """mmengine's loader of web addresses.

    The file is kept where ``torch.hub`` keeps it, by its name alone; the
    first process fetches it, the others wait. If there is one of that name,
    it is used, and the log says so; a warning, if it does not fit a hash in
    the name (as in ``name-0123abcd.pth``).

    Args:
        filename (str): The address.
        map_location: As for ``torch.load``.
        model_dir (str, optional): The folder to keep it in.
        progress (bool): Show a progress bar.

    Raises:
        CheckpointError: It cannot be fetched.
    """
    from mmengine.dist import barrier, get_rank
    folder = Path(model_dir or Path(torch.hub.get_dir(), 'checkpoints'))
    path = folder / os.path.basename(urlparse(filename).path)
    if get_rank() == 0 and path.exists():
        _tell_cached(path, filename)
    for turn in (True, False):
        if turn == (get_rank() == 0) and not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            try:
                torch.hub.download_url_to_file(
                    filename, str(path), progress=progress)
            except URLError as error:  # its subclass for 404 and the like, too
                raise CheckpointError(
                    f'{filename} cannot be fetched: {error}. Correct the '
                    'address, or fetch the file elsewhere and give its path'
                ) from error
        if turn:
            barrier()
    return _without_program(read_training_checkpoint(path, map_location))


def _tell_cached(path: Path, url: str) -> None:
    """Say that a file is not fetched: another address may end in its name."""
    from mmengine.logging import print_log
    print_log(f'using the cached {path} for {url}', logger='current')
    hashed = re.search(r'-([0-9a-f]{8,64})\.', path.name)
    if hashed and path.is_file():
        sha = hashlib.sha256()
        with open(path, 'rb') as file:
            while block := file.read(1 << 20):
                sha.update(block)
        digest = sha.hexdigest()
        if not digest.startswith(hashed[1]):
            warn(f'{path} has the SHA-256 {digest[:8]}..., not that of its '
                  'name: if it is of another address, remove it, and it is '
                  'fetched anew')


def _without_program(checkpoint: Any) -> Any:
    """Leave out ``meta['config']``, which mmengine runs as Python.

    It does so when a training is resumed, to compare ``gpu_ids``. Its own
    checkpoints have no such entry (theirs is ``meta['cfg']``), those of
    mmcv 1.x have.
    """
    meta = checkpoint.get('meta') if isinstance(checkpoint, dict) else None
    if isinstance(meta, dict):
        meta.pop('config', None)
    return checkpoint


@contextlib.contextmanager
def allow_data_types() -> Iterator[None]:
    """Let torch's restricted unpickler build what trainings save."""
    allowed = [(_function, 'builtins.getattr'), *_numpy_parts(),
               (_OneCycle, 'mmengine.optim.scheduler.param_scheduler.'
                'OneCycleParamScheduler')]
    for module, name in _DATA_TYPES:
        with contextlib.suppress(ModuleNotFoundError):
            value = getattr(importlib.import_module(module), name)
            allowed.append((value, f'{module}.{name}'))
    with torch.serialization.safe_globals(allowed):
        yield


class _OneCycle:
    """Stands in for the one-cycle schedule, which is not to be built."""


def _function(owner: type, name: str) -> Callable:
    """A function of a class, which is pickled as a ``getattr``.

    That is a statistic of HistoryBuffer, or how a one-cycle schedule falls.
    The real ``getattr`` would hand out whatever hangs on an allowed class.
    """
    from mmengine.logging import HistoryBuffer
    from mmengine.optim.scheduler.param_scheduler import OneCycleParamScheduler
    if owner is _OneCycle and name in _ANNEALINGS:
        return getattr(OneCycleParamScheduler, name)
    known = {*_STATISTICS, *HistoryBuffer._statistics_methods}
    if owner is not HistoryBuffer or name not in known:
        raise pickle.UnpicklingError(
            f'GLOBAL builtins.getattr of {name!r} is not allowed')
    return getattr(owner, name)


def _numpy_parts() -> list[tuple[Any, str]]:
    """What numpy's pickles call, by the names of numpy 1 and of numpy 2."""
    import numpy
    core = importlib.import_module(
        'numpy._core.multiarray' if hasattr(numpy, '_core') else
        'numpy.core.multiarray')
    parts = [(getattr(core, name), f'numpy.{place}.multiarray.{name}')
             for name in ('_reconstruct', 'scalar')
             for place in ('core', '_core')]
    # numpy 2 gives each dtype a class of its own.
    classes = {type(numpy.dtype(name)) for name in _DTYPES}
    return parts + [(cls, f'{cls.__module__}.{cls.__qualname__}')
                    for cls in classes]
