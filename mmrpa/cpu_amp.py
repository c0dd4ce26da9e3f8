"""What ``--amp`` of tools/train.py means where there is no GPU.

mmengine's AmpOptimWrapper asserts that there is one, and its CPU autocast
that the dtype is bfloat16. ``mmrpa.CPUAmpOptimWrapper`` does both dtypes.
"""

from collections.abc import Mapping, Sequence

from mmrpa.elastic import means
from mmrpa.preflight import ConfigError, type_name

# Names without scope and of the mmengine scope.
_OURS = 'mmrpa.CPUAmpOptimWrapper'
_WRAPPERS = ('OptimWrapper', 'AmpOptimWrapper', 'CPUAmpOptimWrapper')
_DTYPES = ('bfloat16', 'float16')


def amp_on_cpu(cfg: Mapping, asked: bool, argv: Sequence[str]) -> list[str]:
    """Arguments for the host's train.py that give AMP on the CPU.

    Args:
        cfg (Mapping): The config.
        asked (bool): Whether ``--amp`` is among the arguments.
        argv (Sequence[str]): The arguments.

    Returns:
        list[str]: ``argv`` itself if there is a GPU or nobody asks for AMP.

    Raises:
        ConfigError: AMP with a wrapper or a dtype that can not have it.
    """
    from mmengine.device import get_device
    wrapper = cfg.get('optim_wrapper') or {}
    kind = type_name(dict(dict(type='OptimWrapper'), **wrapper))
    if get_device() != 'cpu' or not (asked or kind == 'AmpOptimWrapper'):
        return list(argv)
    if kind not in _WRAPPERS:
        raise ConfigError(f'--amp needs optim_wrapper.type OptimWrapper, got '
                          f'{kind!r}')
    dtype = wrapper.get('dtype') or 'bfloat16'
    if str(dtype).removeprefix('torch.') not in _DTYPES:
        raise ConfigError(f'optim_wrapper.dtype must be one of {_DTYPES} for '
                          f'AMP on the CPU, got {dtype!r}')
    kept = [arg for arg in argv if not means(arg, '--amp')]
    return [*kept, '--cfg-options', f'optim_wrapper.type={_OURS}']
