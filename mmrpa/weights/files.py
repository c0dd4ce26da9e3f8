"""Reading and writing weights without running what is in the file.

A ``.pth`` file is a pickle, and unpickling can run any code. Here only
tensors and plain containers are built: ``torch.load(weights_only=True)``,
whose list of allowed names is extended by the stand-ins below and by nothing
else. There is no fallback.
"""

import contextlib
import io
import json
import os
import pickle
import re
import struct
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, Iterator, Mapping, Optional, Tuple, Union

import torch
from torch import Tensor

from ..whole_files import whole_file

# Where weights are kept inside of checkpoints, the best first. Averaged
# weights are what their authors evaluated.
# (mmengine's are in state_dict: its EMAHook swaps them before saving.)
WEIGHT_KEYS = ('state_dict_ema', 'model_ema', 'state_dict', 'model', 'module')
SAFETENSORS = '.safetensors'
SUFFIXES = ('.pth', '.pt', SAFETENSORS)
META_KEY = 'mmrpa'
# What a damaged stream makes torch's unpickler raise, besides its own errors.
_BROKEN = (RuntimeError, EOFError, ValueError, KeyError, IndexError, TypeError,
           AttributeError, AssertionError, OverflowError, struct.error)
_ZIP_START = b'PK\x03\x04'
# What a damaged archive makes Python's zipfile raise: a changed byte may turn
# a record into an encrypted or a compressed one, or an offset into nonsense.
_BROKEN_ZIP = (zipfile.BadZipFile, NotImplementedError, RuntimeError,
               EOFError, ValueError, OverflowError, struct.error)


class CheckpointError(ValueError):
    """A file that is not weights, or not weights that are safe to read."""


@dataclass
class Checkpoint:
    """The weights in a file.

    Args:
        state_dict (dict[str, Tensor]): The tensors by name.
        meta (dict): What :func:`write_checkpoint` was given; empty for files
            of others.
        key (str): Where in the file the weights were, e.g. ``'model_ema'``.
    """

    state_dict: Dict[str, Tensor]
    meta: Dict[str, Any] = field(default_factory=dict)
    key: str = ''


class _Inert:
    """Stands in for a class that checkpoints hold beside their weights.

    It takes whatever the real class would take and does nothing, so that
    training statistics (numpy arrays, mmengine's HistoryBuffer) and argparse
    settings can be skipped rather than trusted.
    """

    def __new__(cls, *args: Any) -> '_Inert':
        return super().__new__(cls)

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


# ``builtins.getattr`` is how protocol 2 stores functions of the two classes
# before it: by the stand-in they become nothing, and nothing is looked up.
_STAND_INS = ('mmengine.logging.history_buffer.HistoryBuffer',
              'mmengine.optim.scheduler.param_scheduler.'
              'OneCycleParamScheduler', 'builtins.getattr',
              'mmengine.config.config.ConfigDict', 'builtins.slice',
              *(f'datetime.{name}' for name in
                ('datetime', 'date', 'timedelta', 'timezone')),
              'numpy.ndarray', 'numpy.dtype',
              *(f'numpy.{core}.multiarray.{name}' for core in
                ('core', '_core') for name in ('_reconstruct', 'scalar')),
              'argparse.Namespace', 'pathlib.PosixPath',
              'pathlib._local.PosixPath', 'yacs.config.CfgNode')


def read_checkpoint(path: Union[str, Path],
                    key: Optional[str] = None) -> Checkpoint:
    """Read the weights of a ``.pth``, ``.pt`` or ``.safetensors`` file.

    Args:
        path (str | Path): A file, or an address that mmengine can fetch.
        key (str, optional): Where in the file the weights are. By default
            they are found; averaged (EMA) weights come first.

    Returns:
        Checkpoint: Tensors on the CPU.

    Raises:
        FileNotFoundError: There is no such file.
        CheckpointError: The file is damaged, no weights, or holds objects
            that are not safe to load.
    """
    _check_path(path)
    if key is not None and not isinstance(key, str):
        raise TypeError(f'key must be a string or None, got {key!r}')
    with _local(path) as local:
        kind = file_kind(local, str(path))
        content = (_read_safetensors(local, str(path)) if kind == SAFETENSORS
                   else _read_pickle(local, str(path)))
    if isinstance(content, Checkpoint):
        return content
    state_dict, found = _find_weights(content, str(path), key)
    meta = content.get('meta') if isinstance(content, Mapping) else None
    own = meta.get(META_KEY) if isinstance(meta, Mapping) else None
    return Checkpoint(state_dict, dict(own or {}), found)


def write_checkpoint(path: Union[str, Path], state_dict: Mapping[str, Tensor],
                     meta: Mapping[str, Any]) -> None:
    """Write weights to a file, wholly or not at all.

    Args:
        path (str | Path): Ends in ``.pth``, ``.pt`` or ``.safetensors``; its
            folder must exist.
        state_dict (Mapping): Tensors by name.
        meta (Mapping): What JSON can hold, NaN and infinities included;
            :func:`read_checkpoint` returns it.

    Raises:
        TypeError: An argument is of another type.
        ValueError: Another suffix, or no weights.
        FileNotFoundError: There is no such folder.
        ModuleNotFoundError: ``.safetensors`` without safetensors installed.
        OSError: It cannot be written, as on a full disk.
    """
    for name, value in (('state_dict', state_dict), ('meta', meta)):
        if not isinstance(value, Mapping):
            raise TypeError(f'{name} must be a mapping, got {value!r}')
    if not state_dict:
        raise ValueError('state_dict is empty: there are no weights to write')
    for name, value in state_dict.items():
        if not (isinstance(name, str) and isinstance(value, Tensor)):
            raise TypeError('state_dict must have tensors by their names, got '
                            f'{type(value).__name__} as {name!r}')
    try:
        json.dumps(dict(meta))
    except (TypeError, ValueError) as error:
        raise TypeError(f'meta must be what JSON can hold: {error}') from error
    path = check_output(path)
    # A slice of a larger tensor would take all of it along.
    tensors = {name: value.detach().cpu().contiguous().clone()
               for name, value in state_dict.items()}
    # Into memory: on a full disk torch's own writer says 'unexpected pos'.
    if path.suffix == SAFETENSORS:
        content = _safetensors().save(
            tensors, {'format': 'pt', META_KEY: json.dumps(dict(meta))})
    else:
        stream = io.BytesIO()
        torch.save(dict(state_dict=tensors, meta={META_KEY: dict(meta)}),
                   stream)
        content = stream.getbuffer()
    try:
        with whole_file(path) as temporary:
            temporary.write_bytes(content)
    except OSError as error:  # of a write it does not name the file
        raise OSError(error.errno, error.strerror, str(path)) from error


def _check_path(path: Union[str, Path]) -> None:
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f'path must be a string or a Path, got {path!r}')
    if '\0' in str(path):
        raise ValueError(f'path {str(path)!r} has a null character in it')


def check_output(path: Union[str, Path]) -> Path:
    """Check the name of a file to be written before any work is done.

    Raises:
        ValueError: It is a folder or has an unknown suffix.
        FileNotFoundError: Its folder does not exist.
        ModuleNotFoundError: ``.safetensors`` without safetensors installed.
    """
    _check_path(path)
    path = Path(path)
    if path.suffix not in SUFFIXES or path.is_dir():
        raise ValueError(f'the output {str(path)!r} must be a file that ends '
                         f'in {", ".join(SUFFIXES)}')
    if not path.parent.is_dir():
        raise FileNotFoundError(f'the folder of the output {str(path)!r} does '
                                'not exist; make it first')
    if path.suffix == SAFETENSORS:
        _safetensors()
    return path


def check_archive(path: Union[str, Path], name: str = '') -> None:
    """Check a file of ``torch.save`` against the checksums that it holds.

    ``torch.save`` writes a zip archive with a CRC-32 of each record, but
    ``torch.load`` does not compare them: tensors with changed bytes are
    loaded as they are. Files of torch before 1.6 have no checksums; of them
    nothing is checked.

    Args:
        path (str | Path): A file on this machine.
        name (str): What to call it in the error; the path by default.

    Raises:
        CheckpointError: The file is cut short, or bytes in it have changed.
    """
    name = name or str(path)
    with open(path, 'rb') as file:
        if file.read(4) != _ZIP_START:
            return
        try:
            with zipfile.ZipFile(file) as archive:
                record = archive.testzip()
        except _BROKEN_ZIP as error:
            record = None
            reason = f'cut short or overwritten ({error})'
        else:
            reason = f'the bytes of {record} do not fit their checksum'
            if record is None:
                return
    raise CheckpointError(f'{name} is damaged: {reason}; use another '
                          'checkpoint, or copy or download it again')


@contextlib.contextmanager
def _local(path: Union[str, Path]) -> Iterator[str]:
    """The file itself, or for an address a copy of it."""
    if '://' in str(path):
        from mmengine.fileio import get_file_backend
        try:
            backend = get_file_backend(str(path))
        except KeyError as error:
            raise CheckpointError(f'{path}: mmengine has no way to fetch '
                                  f'{error}:// addresses; download the file '
                                  'and give its path') from None
        with backend.get_local_path(str(path)) as local:
            yield str(local)
        return
    if not os.path.exists(path):
        raise FileNotFoundError(f'checkpoint {str(path)!r} does not exist '
                                f'(working directory {os.getcwd()})')
    if os.path.isdir(path):
        raise CheckpointError(f'{path} is a folder; give a file in it')
    yield str(path)


def file_kind(local: str, name: str) -> str:
    """Tell the two formats apart by what a file starts with.

    Args:
        local (str): A file on this machine.
        name (str): What to call it in the error.

    Returns:
        str: ``'.safetensors'`` or ``'.pth'``.

    Raises:
        CheckpointError: It is a web page, a pointer, an archive or empty.
    """
    with open(local, 'rb') as file:
        start = file.read(512)
    text = start.lstrip().lower()
    fixes = ((not start, 'is empty; download or copy it again'),
             (text.startswith(b'<'),
              'is a web page, not weights: an error or login page was saved '
              'in their place; download the file itself'),
             (text.startswith(b'version https://git-lfs'),
              'is a Git LFS pointer, not weights; fetch it with git lfs pull'),
             (start.startswith(b'\x1f\x8b') or start[257:262] == b'ustar',
              'is an archive; unpack it and give the file inside'))
    for wrong, text in fixes:
        if wrong:
            raise CheckpointError(f'{name} {text}')
    if name.endswith(SAFETENSORS) or start[8:9] == b'{':
        return SAFETENSORS
    return '.pth'


def _read_safetensors(local: str, name: str) -> Checkpoint:
    library = _safetensors()
    from safetensors import SafetensorError, safe_open
    try:
        with safe_open(local, framework='pt') as file:
            metadata = file.metadata() or {}
        state_dict = library.load_file(local)
    except (SafetensorError, ValueError) as error:
        raise CheckpointError(f'{name} is damaged or no safetensors file '
                              f'({error}); download or copy it again'
                              ) from None
    try:
        meta = json.loads(metadata.get(META_KEY, '{}'))
    except json.JSONDecodeError:
        raise CheckpointError(f'{name} has damaged metadata; convert it '
                              'again') from None
    return Checkpoint(state_dict, meta)


def _safetensors():
    try:
        import safetensors.torch
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            '.safetensors files need the safetensors package: pip install '
            'safetensors, or use a .pth file') from None
    return safetensors.torch


def _read_pickle(local: str, name: str) -> Any:
    check_archive(local, name)
    with explained(name), _stand_ins():
        return torch.load(local, map_location='cpu', weights_only=True)


@contextlib.contextmanager
def explained(name: str) -> Iterator[None]:
    """Turn what ``torch.load`` raises into one sentence on a file.

    Args:
        name (str): What to call the file.

    Raises:
        CheckpointError: For whatever a damaged or unsafe file causes.
    """
    try:
        yield
    except CheckpointError:
        raise
    except pickle.UnpicklingError as error:
        raise CheckpointError(_explain(str(error), name)) from None
    except _BROKEN as error:
        if 'TorchScript' in str(error):
            raise CheckpointError(
                f'{name} is a TorchScript program, not weights; save the '
                'state_dict() of the model in a file') from None
        # Only torch's own words say something; a KeyError's key does not.
        reason = re.match(r'.*?(?=\. |\n|$)', str(error))[0]
        reason = f' ({reason})' if isinstance(error, RuntimeError) else ''
        raise CheckpointError(
            f'{name} is damaged, cut off or no checkpoint{reason}; '
            'download or copy it again') from None


@contextlib.contextmanager
def _stand_ins() -> Iterator[None]:
    """Let the unpickler of torch see stand-ins."""
    names = [(_Inert, name) for name in _STAND_INS]
    # numpy 2 gives each dtype a class of its own.
    names += [(_Inert, f'numpy.dtypes.{kind}DType')
              for kind in ('Float16', 'Float32', 'Float64', 'Int8', 'UInt8',
                           'Int16', 'Int32', 'Int64', 'Bool')]
    with torch.serialization.safe_globals(names):
        yield


def _explain(error: str, name: str) -> str:
    """One line on why torch refused a pickle, and what to do."""
    found = re.search(r'GLOBAL ([\w.]+)|(?:function|class) <?([\w. \']+)',
                      error)
    if 'load key' in error or found is None:
        reason = re.search(r'[Ee]rror: (.{1,100})', error)
        return (f'{name} is damaged or no PyTorch file'
                f'{f" ({reason[1].strip()})" if reason else ""}; download or '
                'copy it again')
    what = next(text for text in found.groups() if text)
    return (f'{name} holds more than weights: loading it would run {what}, '
            'so it was refused; ask its author for the tensors alone '
            '(torch.save(model.state_dict(), ...) or .safetensors)')


def _find_weights(content: Any, name: str,
                  key: Optional[str]) -> Tuple[Dict[str, Tensor], str]:
    """The mapping of names to tensors inside of a checkpoint."""
    if not isinstance(content, Mapping):
        raise CheckpointError(f'{name} holds one {type(content).__name__}, '
                              'no weights by name')
    nested = {k: v for k, v in content.items()
              if isinstance(k, str) and isinstance(v, Mapping)}
    if key is not None:
        if key not in nested:
            raise CheckpointError(
                f'{name} has no weights under the key {key!r}; it has '
                f'{", ".join(nested) or "no keys, leave the key out"}')
        return _find_weights(nested[key], name, None)[0], key
    for candidate in WEIGHT_KEYS:
        if candidate in nested:
            tensors, deeper = _find_weights(nested[candidate], name, None)
            return tensors, '.'.join(filter(None, (candidate, deeper)))
    tensors = {k: v for k, v in content.items() if isinstance(v, Tensor)}
    if not tensors:
        raise CheckpointError(
            f'{name} holds no tensors by name; its keys are '
            f'{", ".join(map(str, list(content)[:8])) or "none"}')
    return tensors, ''
