"""From facts to findings: packages."""

from __future__ import annotations

import re
from typing import Any, Callable, Dict, Iterator, Tuple

from .. import OLDEST_TORCH
from .commands import (
    BUILD,
    FORKS,
    INSTALL,
    build_in_words,
    build_mmcv,
    headless_opencv,
)
from .facts import NAMES, OPENCV, WATCHED
from .findings import NOTE, PROBLEM, PYTHONS, SETUPTOOLS, Finding, pin
from .rules_gpu import GPU_RULES
from .rules_requirements import find_refusals

Facts = Dict[str, Any]
HOSTS = ('mmdet', 'mmseg', 'mmpretrain')
_OLD_NUMPY = ('compiled using NumPy 1.x', '_ARRAY_API not found',
              'Numpy is not available', 'numpy.core.multiarray failed',
              'numpy.dtype size changed', 'module compiled against ')


# What imports under another name than it is installed by.
_DISTRIBUTIONS = dict(PIL='pillow', yaml='pyyaml', skimage='scikit-image',
                      sklearn='scikit-learn', attr='attrs',
                      pkg_resources="'setuptools<82'")
# The first release whose torch.load(weights_only=True) keeps code out, as far
# as is known: CVE-2026-24747 (GHSA-63cw-57p8-fm3p) of 2026-01.
SAFE_TORCH = (2, 10)


def find_problems(facts: Facts) -> list[Finding]:
    """Apply all rules, the causes before what follows from them."""
    found = [finding for rule in RULES for finding in rule(facts)]
    found += _other_imports(facts, found)
    # Not the cause of anything above, but the torch that it brings needs other
    # ops: behind a finding that compiles mmcv, that would be done twice.
    compiling = (i for i, finding in enumerate(found)
                 if finding.level != NOTE and BUILD in finding.command)
    at = next(compiling, len(found))
    found[at:at] = _unsafe_torch(facts)
    found = [*_pip(facts, found), *found]
    return [_for_interpreter(facts['interpreter'], finding)
            for finding in found]


def _pip(facts: Facts, found: list[Finding]) -> Iterator[Finding]:
    """Where commands need it: uv's environments, for one, come without."""
    if not facts['has_pip'] and any(
            'pip ' in finding.command for finding in found
            if finding.level != NOTE):
        yield Finding('pip-missing', 'this environment has no pip, which the '
                      'commands below need', 'python -m ensurepip')


def _for_interpreter(python: str | None, finding: Finding) -> Finding:
    """The same with commands for a Python whose programs are not on PATH."""
    if python is None:
        return finding
    command = re.sub(r'(?<![\w./-])pip (?=install|uninstall)',
                     'python -m pip ', finding.command)
    # A function, because a path may have backslashes in it.
    return finding._replace(command=re.sub(
        r'(?<![\w./-])python (?=-[cm] )', lambda _: f'{python} ', command))


def _is_there(facts: Facts, package: str) -> bool:
    """Whether a package can be found, be it broken, under any name."""
    return facts['probes'][package].get('missing') != package


def _uses_hosts(facts: Facts) -> bool:
    """What torch alone does without matters then; so is mmrpa.layers used."""
    return any(_is_there(facts, name) for name in ('mmengine', *HOSTS))


def _needs_ops(facts: Facts) -> bool:
    """mmpretrain imports none of mmcv's ops, and trains with mmcv-lite."""
    return any(_is_there(facts, name) for name in ('mmdet', 'mmseg'))


def _python(facts: Facts) -> Iterator[Finding]:
    version = tuple(facts['python'][:2])
    if not PYTHONS[0] <= version <= PYTHONS[1]:
        low, high = ('.'.join(map(str, v)) for v in PYTHONS)
        yield Finding(
            'python', f'Python {version[0]}.{version[1]} is not supported, '
            f'{low} to {high} is: the hosts have no releases for others',
            'make setup PYTHON=python3.11' if facts['checkout'] else
            'python3.11 -m venv mmrpa-venv')


def _torch(facts: Facts) -> Iterator[Finding]:
    result = facts['probes']['torch']
    if 'error' not in result:
        return
    install = f"pip install {pin('torch')} {pin('torchvision')}"
    if result['missing'] == 'torch':
        yield Finding('torch-missing', 'torch is not installed', install)
    else:
        lacking = _install_missing(facts, result)
        yield Finding('torch-broken', 'torch cannot be imported: ' +
                      result['error'] +
                      ('' if lacking else build_in_words(facts)),
                      lacking or INSTALL)


def _old_torch(facts: Facts) -> Iterator[Finding]:
    torch = facts['probes']['torch'].get('found')
    if torch and (0, 0) < _release(torch['version']) < OLDEST_TORCH:
        yield Finding(
            'torch-too-old', f"torch is {torch['version']}, mmrpa needs "
            f"{'.'.join(map(str, OLDEST_TORCH))} or later and refuses to be "
            'imported' + build_in_words(facts), INSTALL + _rebuild(facts))


def _rebuild(facts: Facts) -> str:
    """Another torch needs other ops."""
    return f' && {build_mmcv(facts)}' if facts['has_ops'] else ''


def _torchvision(facts: Facts) -> Iterator[Finding]:
    torch, result = (facts['probes'][name] for name in ('torch',
                                                        'torchvision'))
    if 'found' not in torch or not (_uses_hosts(facts) or _is_there(
            facts, 'torchvision')):
        return
    has = torch['found']['version']
    fitting = matching_torchvision(has)
    command = f"pip install --no-deps --force-reinstall '{fitting}'"
    if result.get('missing') == 'torchvision':
        yield Finding('torchvision-missing', 'torchvision is not installed, '
                      'which mmdet and mmpretrain need' +
                      build_in_words(facts), command)
        return
    wanted = facts['requires_torch']
    # Patch releases go together, and builds from source have odd versions.
    release = _release(has)
    if wanted and release not in (_release(wanted), (0, 0)):
        said = f' ({result["error"]})' if 'error' in result else ''
        yield Finding(
            'torchvision-mismatch',
            f"torchvision {facts['distributions'].get('torchvision')} was "
            f'built for torch {wanted}, but torch is {has}{said}' +
            build_in_words(facts), command)
    elif 'error' in result and not _is_numpy(result):
        lacking = _install_missing(facts, result)
        yield Finding('torchvision-broken', 'torchvision does not work: ' +
                      result['error'] +
                      ('' if lacking else build_in_words(facts)),
                      lacking or command)


def _install_missing(facts: Facts, result: dict[str, Any], package: str = ''
                     ) -> str | None:
    """The command for an import that fails for want of another package."""
    # Of a submodule that is missing the package is there, but not whole.
    name = result.get('missing')
    if not name or '.' in name or name in (package, 'torch', 'torchvision'):
        return None
    if name in FORKS:
        return (build_mmcv(facts) if name == 'mmcv' else
                f'pip install {pin(FORKS[name])}')
    if name in WATCHED:
        return None
    return f'pip install {_DISTRIBUTIONS.get(name, name)}'


def matching_torchvision(torch: str) -> str:
    """The requirement for the torchvision of a torch, ``2.N`` to ``0.N+15``.

    So it was from torch 2.0 to 2.14; 0.29 goes with all later ones, too.
    """
    major, minor = _release(torch)
    if major != 2:
        return pin('torchvision')
    if minor > 14:
        return 'torchvision>=0.29'
    return f'torchvision==0.{minor + 15}.*'


def _release(version: str) -> Tuple[int, int]:
    """Major and minor number; (0, 0) of a version without, such as a commit.
    """
    found = re.match(r'(\d+)\.(\d+)', version)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def _several_owners(facts: Facts) -> Iterator[Finding]:
    for package, fork in FORKS.items():
        names = facts['owners'][package]
        if len(names) < 2:
            continue
        text = (f'{" and ".join(sorted(names))} are installed over each '
                f'other: all own the folder {package}, which is now a mixture')
        if package == 'mmcv':
            yield Finding('overwritten-mmcv', text, build_mmcv(facts))
        else:
            yield Finding(
                f'overwritten-{package}', text,
                f'pip uninstall -y {" ".join(sorted(names))} && pip install '
                f'--no-deps {pin(fork)}')


def _hosts(facts: Facts) -> Iterator[Finding]:
    if not any(_is_there(facts, name) for name in HOSTS):
        pins = ' '.join(pin(FORKS[name]) for name in ('mmengine', *HOSTS))
        yield Finding('hosts-missing', 'neither mmdet, mmseg nor mmpretrain '
                      'is installed: the attention (mmrpa.layers) needs none, '
                      'configs and tools do', f'pip install {pins}', NOTE)


def _mmengine(facts: Facts) -> Iterator[Finding]:
    if not _is_there(facts, 'mmengine') and any(
            _is_there(facts, name) for name in ('mmcv', *HOSTS)):
        yield Finding('mmengine-missing', 'mmengine is not installed, which '
                      'mmcv and all hosts import',
                      f"pip install {pin('onedl-mmengine')}")


def _mmcv(facts: Facts) -> Iterator[Finding]:
    owners, ops = facts['owners']['mmcv'], facts['probes']['mmcv.ops']
    if not _is_there(facts, 'mmcv'):
        if _uses_hosts(facts):
            yield Finding('mmcv-missing', 'mmcv is not installed; the hosts '
                          'need it', build_mmcv(facts))
        return
    if len(owners) > 1 or 'found' in ops or 'error' in facts['probes'][
            'torch']:
        return
    if facts['has_ops'] is False:
        why = ('mmcv-lite never has any' if owners == ['mmcv-lite'] else
               'it was installed from source without compiling them')
        yield Finding('mmcv-no-ops', 'mmcv has no compiled ops, without which '
                      f'mmdet and mmseg do not import ({why})',
                      build_mmcv(facts),
                      PROBLEM if _needs_ops(facts) else NOTE)
    # Where all symbols are there, the numbers behind names have moved: tensors
    # of the CPU, which all ops are compiled for, count as those of a GPU.
    elif re.search('undefined symbol|DLL load failed|Symbol not found|'
                   'implementation for device', ops['error']):
        yield Finding('mmcv-other-torch', "mmcv's ops were compiled for "
                      f'another torch than this one: {ops["error"]}',
                      build_mmcv(facts))
    elif not (_is_numpy(ops) or any('error' in facts['probes'][name]
                                    for name in ('numpy', 'cv2', 'mmengine'))):
        yield Finding('mmcv-broken', f"mmcv's ops do not work: {ops['error']}",
                      _install_missing(facts, ops) or build_mmcv(facts))


def _opencv(facts: Facts) -> Iterator[Finding]:
    # conda's package has the metadata of all builds, and one folder.
    owners = sorted(facts['owners']['cv2'])
    headless = headless_opencv(facts)
    if len(owners) > 1:
        yield Finding(
            'opencv-twice', f'{" and ".join(owners)} are installed over each '
            'other: they share the folder cv2, and removing one breaks the '
            'other', f'pip uninstall -y {" ".join(owners)} && pip install '
            f'--no-deps {headless}')
        return
    result = facts['probes']['cv2']
    if 'error' not in result or _is_numpy(result):
        return
    names = owners or [name for name in OPENCV
                       if name in facts['distributions']]
    if names:
        yield Finding('opencv-broken', f'OpenCV cannot be imported: '
                      f'{result["error"]}', 'pip uninstall -y '
                      f'{" ".join(names)} && pip install --no-deps {headless}')
    elif _uses_hosts(facts) or _is_there(facts, 'mmcv'):
        yield Finding('opencv-missing', 'no OpenCV is installed, which mmcv '
                      'needs', f'pip install --no-deps {headless}')


def _is_numpy(result: dict[str, Any]) -> bool:
    text = f"{result.get('error', '')} {result.get('stderr', '')}"
    return any(sign in text for sign in _OLD_NUMPY)


def _numpy(facts: Facts) -> Iterator[Finding]:
    result = facts['probes']['numpy']
    if not (_is_there(facts, 'numpy') or _uses_hosts(facts)):
        return
    if 'error' in result:
        # The same again, if there is one: others were compiled for it.
        has = re.match(r'\d[\w.]*', facts['distributions'].get('numpy', ''))
        wanted = f'numpy=={has.group()}' if has else pin('numpy')
        yield Finding('numpy-broken', f'numpy cannot be imported: '
                      f'{result["error"]}',
                      f'pip install --force-reinstall {wanted}')
        return
    version = result['found']['version']
    broken = [name for name, probe in facts['probes'].items()
              if _is_numpy(probe)]
    if not broken:
        return
    if version.startswith('1.'):
        yield Finding('numpy-too-old', f'numpy is {version}, but '
                      f'{", ".join(broken)} were compiled against a later one',
                      f"pip install {pin('numpy')}")
    else:
        yield Finding('numpy-too-new', f'numpy is {version}, but '
                      f'{", ".join(broken)} were compiled against numpy 1.x '
                      'and do not work with it', _for_numpy_2(facts, broken))


def _for_numpy_2(facts: Facts, broken: list[str]) -> str:
    """Newer builds where the tested set has them, else an older numpy.

    An older numpy for one old module would break the new ones around it.
    """
    torch = any(name.startswith('torch') for name in broken)
    pins = [pin(name) for probe, name in (
        ('cv2', 'opencv-python-headless'), ('pycocotools', 'pycocotools'))
        if probe in broken]
    if pins and not torch:
        names = [name for name in OPENCV if name in facts['distributions']
                 and 'cv2' in broken]
        remove = f'pip uninstall -y {" ".join(names)} && ' if names else ''
        return remove + 'pip install --no-deps ' + ' '.join(pins)
    opencv = [f"'{name}<4.12'" for name in OPENCV
              if _release(facts['distributions'].get(name, '')) >= (4, 12)]
    # OpenCV asks for numpy 2 from 4.12 on.
    return ' '.join(["pip install 'numpy<2'", *opencv])


def _setuptools(facts: Facts) -> Iterator[Finding]:
    version = facts['distributions'].get('setuptools')
    low, high = SETUPTOOLS
    command = f"pip install 'setuptools>={low},<{high}'"
    original = any(name in facts['distributions']
                   for name in NAMES['mmengine'][:-1])
    if version is None:
        # The original mmengine asks pkg_resources for versions.
        if original:
            yield Finding('setuptools-missing', 'setuptools is not installed, '
                          'and the original mmengine needs its pkg_resources',
                          command)
        return
    major = int(re.match(r'\d*', version).group() or 0)
    # Nothing wrong as long as nothing is built and nothing imports it.
    build = _uses_hosts(facts) and 'error' in facts['probes']['mmcv.ops'] and (
        _needs_ops(facts) or not _is_there(facts, 'mmcv'))
    if major >= high:
        yield Finding('setuptools-too-new', f'setuptools {version} has no '
                      'pkg_resources any more, which the original mmengine '
                      'and the build of mmcv import', command,
                      PROBLEM if build or original else NOTE)
    elif major < low:
        yield Finding('setuptools-too-old', f'setuptools {version} cannot '
                      f'build mmcv, which needs {low} or later', command,
                      PROBLEM if build else NOTE)


def _weights_only(facts: Facts) -> Iterator[Finding]:
    torch, sources = facts['probes']['torch'], facts['sources']
    if 'found' not in torch or not sources.get('loads'):
        return
    if (_release(torch['found']['version']) >= (2, 6)
            and not sources['says_weights_only']):
        owners = ' '.join(facts['owners']['mmengine']) or 'mmengine'
        yield Finding(
            'weights-only', f"torch {torch['found']['version']} loads weights "
            "only, and this mmengine does not know that: the hosts' own "
            'scripts resume and load nothing ("Weights only load failed"). '
            'tools/train.py and tools/test.py do, by a reader of their own',
            f'pip uninstall -y {owners} && pip install --no-deps '
            f"{pin('onedl-mmengine')}", NOTE)


def _mmseg_base(facts: Facts) -> Iterator[Finding]:
    mapped = facts['sources'].get('mmseg_package')
    owners = facts['owners']['mmseg']
    if mapped and owners and mapped not in owners:
        yield Finding(
            'mmseg-base', f"_base_ = 'mmseg::...' does not work: mmengine "
            f'looks for the distribution {mapped}, and mmseg comes with '
            f'{owners[0]}; give the path of the file, in the folder that the '
            'command prints', 'python -c "import mmseg; '
            'print(mmseg.__path__[0] + \'/.mim/configs\')"', NOTE)


def _coco(facts: Facts) -> Iterator[Finding]:
    result = facts['probes']['pycocotools']
    if (_is_there(facts, 'mmdet') and 'error' in result
            and not _is_numpy(result)):
        yield Finding('pycocotools', 'mmdet reads and evaluates COCO by '
                      f'pycocotools, which does not import: {result["error"]}',
                      _install_missing(facts, result, 'pycocotools') or
                      f"pip install --force-reinstall --no-deps "
                      f"{pin('pycocotools')}")


def _other_imports(facts: Facts, found: list[Finding]) -> Iterator[Finding]:
    """Hosts that do not import for a reason that no rule has named."""
    if any(finding.level != NOTE for finding in found):
        return  # likely a consequence: mend that first, and ask again
    for package in FORKS:
        result, owners = facts['probes'][package], facts['owners'][package]
        if 'error' not in result or not (owners or _is_there(facts, package)):
            continue
        yield Finding(
            f'broken-{package}', f'{package} cannot be imported: '
            f'{result["error"]}' + ('' if owners else '. No installed package '
                                    'owns it; the command shows where it is'),
            _reinstall(facts, package, result))
        if package == 'mmengine':
            return  # all import it


def _reinstall(facts: Facts, package: str, result: dict[str, Any]) -> str:
    lacking = _install_missing(facts, result, package)
    owners, fork = facts['owners'][package], FORKS[package]
    if lacking:
        return lacking
    if not owners:  # on PYTHONPATH, or in the working folder
        return (f"python -c \"import importlib.util as u; print(u.find_spec("
                f"'{package}').origin)\"")
    if package == 'mmcv':  # its ops have to be compiled
        return build_mmcv(facts)
    # The original may be too old for what is around it; the fork must not
    # come over it.
    if owners == [fork]:
        return f'pip install --force-reinstall --no-deps {pin(fork)}'
    return (f'pip uninstall -y {" ".join(owners)} && pip install --no-deps '
            f'{pin(fork)}')


def _unsafe_torch(facts: Facts) -> Iterator[Finding]:
    torch = facts['probes']['torch'].get('found')
    # With an older one mmrpa reads nothing.
    if not torch or not (OLDEST_TORCH <= _release(torch['version'])
                         < SAFE_TORCH):
        return
    yield Finding(
        'torch-unsafe-load', f"torch {torch['version']}: a checkpoint made "
        'for it can run code although weights_only is set (CVE-2026-24747). '
        f'Until torch is {".".join(map(str, SAFE_TORCH))} or later, load only '
        '.safetensors, or .pth files that you trust' + build_in_words(facts),
        INSTALL + _rebuild(facts))


def _safetensors(facts: Facts) -> Iterator[Finding]:
    if 'safetensors' not in facts['distributions']:
        yield Finding('safetensors-missing', 'weights in .safetensors files '
                      'cannot be read without safetensors',
                      'pip install safetensors', NOTE)


RULES: Tuple[Callable[[Facts], Iterator[Finding]], ...] = (
    # numpy that crashes takes torch along, and so OpenCV does with mmcv.
    _python, _numpy, _torch, _old_torch, find_refusals, _torchvision,
    *GPU_RULES, _several_owners, _opencv, _mmengine, _mmcv, _setuptools,
    _weights_only, _coco, _hosts, _mmseg_base, _safetensors)
