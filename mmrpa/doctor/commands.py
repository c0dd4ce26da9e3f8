"""Commands that several findings print."""

from __future__ import annotations

from typing import Any

from .facts import NAMES
from .findings import pin

# The fork of each package, whose files are those of the original.
FORKS = {package: names[-1] for package, names in NAMES.items()}
# Both again, then what they lack: reinstalling their dependencies, too, would
# bring the newest numpy, which others refuse.
_BOTH = f"{pin('torch')} {pin('torchvision')}"
INSTALL = (f'pip install --force-reinstall --no-deps {_BOTH} && '
           f'pip install {_BOTH}')
# What compiles mmcv, for 10 to 30 minutes.
BUILD = ('pip install --no-deps --no-build-isolation --no-cache-dir '
         f"--no-binary=onedl-mmcv {pin('onedl-mmcv')}")


def build_in_words(facts: dict[str, Any]) -> str:
    """What a command cannot say: which index has builds like this torch.

    Only what pip knows tells them apart: the default build, too, says +cu130
    of itself.
    """
    local = facts['distributions'].get('torch', '').partition('+')[2]
    return local and (
        f'. This torch is the build {local}, which the default index does not '
        'have: add the --index-url that it was installed with')


def build_mmcv(facts: dict[str, Any], cuda: bool = False) -> str:
    """Compile the fork of mmcv in the place of any other.

    The original mmdet and mmsegmentation refuse its version: their forks take
    their places.

    Args:
        facts (dict): As :func:`gather_facts` returns them.
        cuda (bool): Compile ops for CUDA, GPU or not.
    """
    # Debug information would double the time and the memory it takes.
    command = ('pip uninstall -y mmcv mmcv-lite mmcv-full onedl-mmcv && pip '
               "install 'setuptools>=77,<82' wheel ninja && MMCV_WITH_OPS=1 "
               f"CFLAGS='-g0 -O2' {'FORCE_CUDA=1 ' if cuda else ''}{BUILD}")
    refusing = {name: FORKS[package] for package in ('mmdet', 'mmseg')
                for name in facts['owners'][package]
                if name in NAMES[package][:-1]}
    if refusing:
        command += (f' && pip uninstall -y {" ".join(refusing)} && pip install'
                    f' --no-deps {" ".join(map(pin, refusing.values()))}')
    return command


def headless_opencv(facts: dict[str, Any]) -> str:
    """The requirement for OpenCV; from 4.12 on it asks for numpy 2."""
    if facts['distributions'].get('numpy', '').startswith('1.'):
        return "'opencv-python-headless<4.12'"
    return pin('opencv-python-headless')
