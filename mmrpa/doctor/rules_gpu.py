"""From facts to findings: GPUs."""

from __future__ import annotations

import re
from typing import Any, Iterator

from .commands import INSTALL, build_mmcv
from .findings import TESTED, Finding


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
    device = facts['probes']['torch.cuda']
    # Builds for AMD's GPUs are available, too, and have no CUDA.
    if torch is None or not (torch['available'] and torch['cuda']):
        return
    if 'error' in device:
        yield Finding('cuda-unusable', f"torch {torch['version']} cannot use "
                      f"this machine's GPU: {device['error']}",
                      'nvidia-smi  # shows which processes use it')
        return
    for capability in device['found']['capabilities']:
        if not runs_on(torch['archs'], capability):
            name = 'sm_{}{}'.format(*capability)
            text = (f"torch {torch['version']} (CUDA {torch['cuda']}) has no "
                    f'kernels for this GPU, {name}, only for '
                    f'{" ".join(torch["archs"])}')
            yield _other_build(facts, capability, torch, text)
            return


def _other_build(facts: dict[str, Any], capability: list[int],
                 torch: dict[str, Any], text: str) -> Finding:
    known = [(int(major), int(minor)) for major, minor in re.findall(
        r'(?:sm|compute)_(\d+)(\d)', ' '.join(torch['archs']))]
    if known and tuple(capability) < min(known):
        # Newer ones, as the tested one, have left it behind as well.
        kind = 'an older CUDA than that'
    elif facts['distributions'].get('torch') == TESTED['torch']:
        kind = 'another CUDA than that'
    else:
        return Finding('cuda-arch', text, INSTALL)
    return Finding(
        'cuda-arch', f'{text}. It needs a build of torch and torchvision for '
        f'{kind}: "Get Started" on the pages of PyTorch has their commands, '
        'and the one below shows what the driver is for', 'nvidia-smi')


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
    if (torch and ops and torch['available'] and torch['cuda']
            and not re.match(r'\d', str(ops['cuda']))):
        yield Finding('mmcv-cpu-ops', "torch uses this machine's GPU, but "
                      "mmcv's ops were compiled for the CPU only",
                      build_mmcv(facts, cuda=True))


GPU_RULES = (_device, _architecture, _mmcv_for_cpu)
