"""From facts to findings: GPUs."""

from __future__ import annotations

import re
from typing import Any, Iterator

from .findings import Finding, pin

# Both again, then what they lack: reinstalling their dependencies, too, would
# bring the newest numpy, which others refuse.
_BOTH = f"{pin('torch')} {pin('torchvision')}"
INSTALL = (f'pip install --force-reinstall --no-deps {_BOTH} && '
           f'pip install {_BOTH}')
BUILD_MMCV_CUDA = (
    "pip install 'setuptools>=77,<82' wheel ninja && MMCV_WITH_OPS=1 "
    "CFLAGS='-g0 -O2' FORCE_CUDA=1 pip install --force-reinstall --no-deps "
    '--no-build-isolation --no-cache-dir --no-binary=onedl-mmcv '
    f"{pin('onedl-mmcv')}")


def _device(facts: dict[str, Any]) -> Iterator[Finding]:
    torch = facts['probes']['torch'].get('found')
    if torch is None or not facts['gpus']:
        return
    gpu = facts['gpus'][0]
    if torch['cuda'] is None:
        yield Finding('torch-cpu-only', f'this machine has a GPU ({gpu}), but '
                      f"torch {torch['version']} is a build for the CPU",
                      INSTALL)
    elif not torch['available']:
        yield Finding('cuda-unusable', f'this machine has a GPU ({gpu}), but '
                      f"torch {torch['version']} (CUDA {torch['cuda']}) "
                      "cannot use it: the driver is older than that CUDA, or "
                      'CUDA_VISIBLE_DEVICES hides it',
                      'nvidia-smi  # shows the CUDA that the driver is for')


def _architecture(facts: dict[str, Any]) -> Iterator[Finding]:
    torch = facts['probes']['torch'].get('found')
    for capability in (torch or {}).get('capabilities', ()):
        if not runs_on(torch['archs'], capability):
            name = 'sm_{}{}'.format(*capability)
            yield Finding('cuda-arch', f"torch {torch['version']} (CUDA "
                          f"{torch['cuda']}) has no kernels for this GPU, "
                          f'{name}, only for {" ".join(torch["archs"])}',
                          INSTALL)
            return


def runs_on(archs: list[str], capability: list[int]) -> bool:
    """Whether a build for some architectures has code for a GPU.

    Args:
        archs (list[str]): As ``torch.cuda.get_arch_list()``: sm_XY is machine
            code, which runs on GPUs of the same major and the same or a later
            minor number; compute_XY is compiled on the spot for its own and
            all later ones.
        capability (list[int]): Major and minor number.
    """
    major, minor = capability
    for arch in archs:
        found = re.fullmatch(r'(sm|compute)_(\d+)(\d)([af]?)', arch)
        if not found:
            continue
        kind, has_major, has_minor, only = found.groups()
        has = int(has_major), int(has_minor)
        if only == 'a':  # for this one only
            fits = has == (major, minor)
        elif kind == 'sm' or only:
            fits = has[0] == major and has[1] <= minor
        else:
            fits = has <= (major, minor)
        if fits:
            return True
    return False


def _mmcv_for_cpu(facts: dict[str, Any]) -> Iterator[Finding]:
    torch = facts['probes']['torch'].get('found')
    ops = facts['probes']['mmcv.ops'].get('found')
    if torch and ops and torch['available'] and not re.match(
            r'\d', str(ops['cuda'])):
        yield Finding('mmcv-cpu-ops', "torch uses this machine's GPU, but "
                      "mmcv's ops were compiled for the CPU only",
                      BUILD_MMCV_CUDA)


GPU_RULES = (_device, _architecture, _mmcv_for_cpu)
