"""Ask the old backbone what maps it gives, by running it without weights."""

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from mmengine.config import ConfigDict
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import DefaultScope
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..safe_loading import safe_reader
from .report import SwapError, type_name

# What changes no shape, but needs a download or an operator without a
# version for tensors that hold no data.
_SHAPELESS = ('init_cfg', 'pretrained', 'dcn', 'stage_with_dcn')
_FACTORIES = (torch.empty, torch.zeros, torch.ones, torch.rand, torch.randn,
              torch.full)


# Many configs share a backbone, and the next to be swapped is often like the
# last.
_KNOWN: dict[str, 'Probe'] = {}


@dataclass(frozen=True)
class FeatureMap:
    """One output of a backbone.

    Attributes:
        channels (int): Its channels.
        stride (int, optional): Image pixels a cell; None for a vector.
        with_token (bool): Whether a CLS token comes with it.
    """

    channels: int
    stride: int | None
    with_token: bool = False


@dataclass(frozen=True)
class Probe:
    """A backbone's outputs, and the names of its parameters."""

    maps: tuple[FeatureMap, ...]
    parameters: tuple[str, ...]

    @property
    def channels(self) -> tuple[int, ...]:
        """Channels of the maps."""
        return tuple(m.channels for m in self.maps)

    @property
    def strides(self) -> tuple[int | None, ...]:
        """Strides of the maps."""
        return tuple(m.stride for m in self.maps)


class _WithoutData(TorchFunctionMode):
    """Make parameters on the meta device, and small constants as always.

    ``torch.device('meta')`` would do so for constants, too, of which hosts'
    backbones read the values (rates of stochastic depth).
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func in _FACTORIES and kwargs.get('device') is None:
            kwargs['device'] = 'meta'
        return func(*args, **kwargs)


def build(cfg: Mapping[str, Any], scope: str) -> nn.Module:
    """Build a model or a part of one from a config, in a host's scope."""
    models = import_module(f'{scope}.registry').MODELS
    # Some models load others when they are built.
    with safe_reader(), DefaultScope.overwrite_default_scope(scope):
        # Hosts read some entries as attributes.
        return models.build(ConfigDict(copy.deepcopy(dict(cfg))))


def probe_backbone(cfg: Mapping[str, Any], scope: str, key: str) -> Probe:
    """Learn channels and strides of a backbone's outputs.

    It is built without memory for its weights, and run on an image of shapes
    only.

    Args:
        cfg (Mapping): The backbone's config.
        scope (str): The host, such as ``'mmdet'``.
        key (str): Its dotted key, for messages.

    Raises:
        SwapError: It cannot be built, or run.
    """
    text = f'{scope} {dict(cfg)!r}'
    if text not in _KNOWN:
        with _explained(cfg, key):
            try:
                _KNOWN[text] = _probe(cfg, scope, 'meta')
            except (NotImplementedError, RuntimeError, TypeError, ValueError):
                # An operator that needs data: run it for real.
                _KNOWN[text] = _probe(cfg, scope, 'cpu')
    return _KNOWN[text]


def parameter_names(cfg: Mapping[str, Any], scope: str,
                    key: str) -> tuple[str, ...]:
    """The names of a backbone's parameters; arguments as above.

    Raises:
        SwapError: It cannot be built.
    """
    with _explained(cfg, key):
        return tuple(n for n, _ in _empty(cfg, scope, 'meta')
                     .named_parameters())


@contextmanager
def _explained(cfg: Mapping[str, Any], key: str) -> Iterator[None]:
    """Turn what a host's class raises into a SwapError."""
    try:
        yield
    except (ArithmeticError, AssertionError, AttributeError, ImportError,
            LookupError, NotImplementedError, OSError, RuntimeError, TypeError,
            ValueError) as error:
        raise SwapError(
            f'{key}: the old backbone {type_name(cfg)} cannot be run, so what '
            f'it gives to neck and heads is not known '
            f'({type(error).__name__}: {str(error).strip()[:300]})') from error


def _empty(cfg: Mapping[str, Any], scope: str, device: str) -> nn.Module:
    """A backbone without pretrained weights, or without any."""
    plain = {k: v for k, v in cfg.items() if k not in _SHAPELESS}
    norm = plain.get('norm_cfg')
    if isinstance(norm, dict) and norm.get('eps') == 0:
        # For frozen statistics; torch no longer runs it.
        plain['norm_cfg'] = {k: v for k, v in norm.items() if k != 'eps'}
    if device != 'meta':
        return build(plain, scope)
    with _WithoutData():
        return build(plain, scope).to('meta')


def _probe(cfg: Mapping[str, Any], scope: str, device: str) -> Probe:
    backbone = revert_sync_batchnorm(_empty(cfg, scope, device))
    backbone.eval()  # not in one line: train() of mmdet's ResNet returns None
    size = _image_size(cfg)
    channels = cfg.get('in_channels', 3)
    image = torch.zeros(
        1, channels if isinstance(channels, int) else 3, *size, device=device)
    with torch.no_grad():
        outputs = backbone(image)
    names = tuple(name for name, _ in backbone.named_parameters())
    return Probe(tuple(_read(outputs, size)), names)


def _image_size(cfg: Mapping[str, Any]) -> tuple[int, int]:
    """Height and width of an image that all strides up to 32 divide."""
    size = cfg.get('img_size', 256)
    if isinstance(size, int):
        size = (size, size)
    return tuple(int(side) for side in size)


def _read(outputs: Any, size: tuple[int, int]) -> Iterable[FeatureMap]:
    if isinstance(outputs, Tensor):
        outputs = (outputs, )
    if not isinstance(outputs, (tuple, list)):
        raise ValueError(f'its outputs are a {type(outputs).__name__}')
    for output in outputs:
        token = isinstance(output, (tuple, list))
        value = output[0] if token else output
        if not isinstance(value, Tensor):
            raise ValueError(f'one of its outputs is a {type(value).__name__}')
        stride = None
        if value.dim() == 4:
            ratios = {side / cell for side, cell in
                      zip(size, value.shape[2:], strict=True)}
            stride = round(max(ratios))
        channels = value.shape[1] if value.dim() != 3 else value.shape[2]
        yield FeatureMap(channels, stride, token)
