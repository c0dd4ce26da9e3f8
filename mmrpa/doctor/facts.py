"""What there is to know about an environment, without importing from it."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from .probes import probe_all, without_paths

# By import name the distributions that have it; the fork is the last.
NAMES = dict(mmengine=('mmengine', 'mmengine-lite', 'onedl-mmengine'),
             mmcv=('mmcv', 'mmcv-full', 'mmcv-lite', 'onedl-mmcv'),
             mmdet=('mmdet', 'onedl-mmdetection'),
             mmseg=('mmsegmentation', 'onedl-mmsegmentation'),
             mmpretrain=('mmpretrain', 'onedl-mmpretrain'))
WATCHED = (*NAMES, 'cv2')
OPENCV = ('opencv-python', 'opencv-python-headless', 'opencv-contrib-python',
          'opencv-contrib-python-headless')


def gather_facts() -> dict[str, Any]:
    """Look at the interpreter, the distributions, the GPU and the imports.

    Returns:
        dict: ``python`` (list[int]), ``checkout`` (mmrpa's own folder is
        around this), ``platform``, ``distributions`` (version by normalised
        name), ``owners`` (names of the distributions by import name),
        ``requires_torch`` (what torchvision was built for), ``has_ops`` (a
        compiled part lies in mmcv), ``sources`` (what mmengine's own code
        says), ``has_pip``, ``interpreter`` (see :func:`_interpreter`),
        ``requirements`` (versions that ``pip check`` refuses), ``gpus``
        (names) and ``probes`` (see :func:`probe_all`).
    """
    installed, owners, requires = _distributions()
    return {
        'python': list(sys.version_info[:3]),
        'checkout': Path(__file__).parents[2].joinpath(
            'tools/setup_env.py').is_file(),
        'platform': platform.platform(),
        'distributions': installed,
        'owners': owners,
        'requires_torch': requires,
        'has_ops': _has_ops(),
        'sources': _mmengine_sources(),
        'has_pip': importlib.util.find_spec('pip') is not None,
        'interpreter': _interpreter(),
        'requirements': _pip_check(),
        'gpus': _gpus(),
        'probes': probe_all(),
    }


def normalise(name: str) -> str:
    """A distribution's name as package indexes compare it."""
    return re.sub(r'[-_.]+', '-', name).lower()


def _distributions() -> tuple[dict, dict, str | None]:
    installed: dict[str, str] = {}
    owners: dict[str, list[str]] = {name: [] for name in WATCHED}
    requires = None
    for dist in metadata.distributions():
        # A folder that an interrupted pip has left may have neither.
        name = normalise(dist.metadata['Name'] or '')
        if not name or name in installed:
            continue
        installed[name] = dist.metadata['Version'] or '?'
        for owned in _packages(dist):
            owners[owned].append(name)
        if name == 'torchvision':
            requires = _pinned_torch(dist.requires or [])
    return installed, owners, requires


def _packages(dist: metadata.Distribution) -> list[str]:
    """Which of the watched packages a distribution has installed."""
    record = dist.read_text('RECORD')
    tops = {line.split('/', 1)[0] for line in (record or '').splitlines()
            if '/' in line}
    owned = [name for name in WATCHED if name in tops]
    if owned or (record is not None and not _is_editable(dist)):
        return owned
    # Installed in place (``pip install -e``, ``setup.py develop``), the files
    # are not recorded. OpenCV never is; conda has its metadata only.
    tops = set((dist.read_text('top_level.txt') or '').split())
    name = normalise(dist.metadata['Name'])
    known = {package for package, names in NAMES.items() if name in names}
    return [name for name in NAMES if name in tops | known]


def _is_editable(dist: metadata.Distribution) -> bool:
    try:
        url = json.loads(dist.read_text('direct_url.json') or '{}')
    except ValueError:
        return False
    return bool(url.get('dir_info', {}).get('editable'))


def _pinned_torch(requires: list[str]) -> str | None:
    """The torch that a torchvision was built for."""
    for text in requires:
        found = re.match(r'torch\s*\(?\s*==\s*([\d.]+)', text)
        if found:
            return found.group(1)
    return None


def _package_folder(name: str) -> Path | None:
    """Where a package lies, without running any of it."""
    for entry in sys.path:
        folder = Path(entry or '.', name)
        if (folder / '__init__.py').is_file():
            return folder
    # Editable installs may have a finder of their own.
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return None
    return Path(spec.origin).parent if spec and spec.origin else None


def _has_ops() -> bool | None:
    """Whether mmcv has a compiled part; None without mmcv."""
    folder = _package_folder('mmcv')
    if folder is None:
        return None
    return any(path.suffix in ('.so', '.pyd') for path in folder.glob('_ext*'))


def _mmengine_sources() -> dict[str, Any]:
    """Two things that mmengine does only by its text."""
    folder = _package_folder('mmengine')
    if folder is None:
        return {}
    checkpoint = _read(folder / 'runner' / 'checkpoint.py')
    mapped = re.search(r"'mmseg'\s*:\s*'([\w-]+)'",
                       _read(folder / 'config' / 'utils.py'))
    return {
        'says_weights_only': 'weights_only' in checkpoint,
        'loads': 'torch.load(' in checkpoint,
        'mmseg_package': mapped.group(1) if mapped else None,
    }


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding='utf-8', errors='replace')
    except OSError:
        return ''


def _interpreter() -> str | None:
    """What was typed for this Python, if a plain ``pip`` is not this one's.

    Without activation, the pip on PATH is that of another environment, and
    would mend that one. Only what was typed: no folder that was not.
    """
    pip = shutil.which('pip')
    if pip and os.path.dirname(pip) == os.path.dirname(sys.executable):
        return None
    return shlex.quote(getattr(sys, 'orig_argv', [sys.executable])[0])


def _pip_check() -> list[str]:
    """The lines of ``pip check``; [] where there is no pip."""
    done = _run([sys.executable, '-m', 'pip', '--disable-pip-version-check',
                 'check'])
    if done is None:
        return []
    return [without_paths(line) for line in done.stdout.splitlines()
            if ' but you have ' in line]


def _gpus() -> list[str]:
    """What NVIDIA's driver lists."""
    if shutil.which('nvidia-smi') is None:
        return []
    done = _run(['nvidia-smi', '--query-gpu=name', '--format=csv,noheader'])
    if done is None or done.returncode:
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.strip()]


def _run(command: list[str]) -> subprocess.CompletedProcess | None:
    try:
        return subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, text=True, errors='replace',
            timeout=120)
    except (OSError, subprocess.TimeoutExpired):
        return None
