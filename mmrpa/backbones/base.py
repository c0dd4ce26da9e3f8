"""What all RPAttention backbones share."""

import difflib
import functools
import inspect
from abc import abstractmethod
from typing import (
    Any,
    Callable,
    Dict,
    List,
    Mapping,
    Optional,
    Sequence,
    Tuple,
    Union,
)

import torch
from mmengine.model import BaseModule
from torch import Tensor, nn

from ..arguments import (
    check_bool,
    check_dtype,
    check_int,
    check_number,
    check_tensor,
)
from ..layers import DenseAttention, RPAttention, TransformerBlock
from .checkpoint import check_state_dict, load_pretrained
from .stage import OutputNorm, Stage, to_map

Arch = Union[str, Mapping[str, Any]]
PerStage = Union[Any, Sequence[Any]]


def per_stage(name: str, value: PerStage, num_stages: int) -> Tuple[Any, ...]:
    """One value a stage from one for all or a sequence of them.

    Raises:
        ValueError: A sequence of the wrong length.
    """
    if isinstance(value, str) or not isinstance(value, Sequence):
        return (value, ) * num_stages
    if len(value) != num_stages:
        raise ValueError(f'{name} needs one value or {num_stages}, one for '
                         f'each stage, got {value!r}')
    return tuple(value)


def _reject_unknown_arguments(init: Callable) -> Callable:
    """Say what is allowed where Python would only say what is not."""
    parameters = inspect.signature(init).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return init  # it hands them on, and the next init looks at them
    allowed = [name for name in parameters if name != 'self']

    @functools.wraps(init)
    def checked(self, *args, **kwargs):
        for name in kwargs:
            if name not in allowed:
                close = difflib.get_close_matches(name, allowed, n=1)
                hint = f'; did you mean {close[0]!r}?' if close else '.'
                raise TypeError(
                    f'{type(self).__name__} has no argument {name!r}{hint} '
                    f'Allowed: {", ".join(allowed)}')
        init(self, *args, **kwargs)

    return checked


class RPBackbone(BaseModule):
    """Base of the RPAttention backbones.

    A family sets the class attributes below, builds its own layers in
    ``_build_stem``, ``_build_downsample``, ``_build_pos_embed`` and
    ``_build_own_attention``, and inherits all behaviour: a tuple of contiguous
    maps (B, C, ceil(H / s), ceil(W / s)) for images of any H x W from one
    patch up, freezing, activation checkpointing, checkpoint loading that fails
    loudly. Stages behind the last one of ``out_indices`` are not built, so
    that no parameter is left without a gradient.

    Args:
        arch (str | dict): A name out of ``arch_zoo``, or a dict with its keys:
            ``embed_dims``, ``depths``, ``num_heads`` and ``mlp_ratios``, each
            one a stage; ``mlp_ratios`` may be one number.
        in_channels (int): Channels of the images.
        attention (str | sequence[str]): The attention of all or of each stage:
            ``'rp'``, ``'dense'``, or the family's own.
        num_representatives (int | sequence[int]): M of all or of each stage.
        rp_cfg (dict, optional): Further arguments of
            :class:`mmrpa.layers.RPAttention`.
        qkv_bias (bool): Bias in the q, k, v projections.
        drop_rate (float): Dropout rate of projections and FFNs.
        drop_path_rate (float): Stochastic depth rate of the last block; it
            grows linearly from 0 over all blocks.
        out_indices (sequence[int]): The stages to return, in rising order;
            negative ones count from the end.
        frozen_stages (int): -1: nothing is frozen; 0: the stem; i: the stem
            and the first i stages with their output norms.
        norm_cfg (dict, optional): Norm of the outputs, ``type`` being
            ``'LN'``, ``'BN'`` or ``'SyncBN'``. None leaves it out.
            ``docs/method.md`` compares LN and BN from scratch.
        with_cp (bool): Activation checkpointing of the blocks (non-reentrant).
        init_cfg (dict, optional): ``dict(type='Pretrained', checkpoint=...,
            prefix=...)``; a checkpoint that does not fit is an error.

    Raises:
        TypeError: An unknown argument.
        ValueError: A value that does not fit; the message says what does.
    """

    arch_zoo: Dict[str, Dict[str, Any]]
    arch_keys = ('embed_dims', 'depths', 'num_heads', 'mlp_ratios')
    own_attention: Optional[str] = None
    patch_size = 4
    norm_eps = 1e-5

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if '__init__' in cls.__dict__:
            cls.__init__ = _reject_unknown_arguments(cls.__init__)

    def __init__(self, arch: Arch, in_channels: int, attention: PerStage,
                 num_representatives: PerStage, rp_cfg: Optional[Mapping],
                 qkv_bias: bool, drop_rate: float, drop_path_rate: float,
                 out_indices: Sequence[int], frozen_stages: int,
                 norm_cfg: Optional[Mapping], with_cp: bool,
                 init_cfg: Optional[Mapping]) -> None:
        for name, value in (('rp_cfg', rp_cfg), ('norm_cfg', norm_cfg),
                            ('init_cfg', init_cfg)):
            if value is not None and not isinstance(value, Mapping):
                raise TypeError(f'{name} must be a dict or None, got '
                                f'{value!r}')
        super().__init__(init_cfg=None if init_cfg is None else dict(init_cfg))
        check_int('in_channels', in_channels, 1)
        check_bool('qkv_bias', qkv_bias)
        check_bool('with_cp', with_cp)
        check_number('drop_rate', drop_rate, 0, 1)
        check_number('drop_path_rate', drop_path_rate)
        if not 0 <= drop_path_rate < 1:
            raise ValueError('drop_path_rate must be in [0, 1), got '
                             f'{drop_path_rate!r}')
        check_int('frozen_stages', frozen_stages)
        self.arch = self._parse_arch(arch)
        self.num_stages = len(self.arch['depths'])
        self.in_channels = in_channels
        self.attention = per_stage('attention', attention, self.num_stages)
        self._check_attention()
        self._check_rp_cfg(rp_cfg or {})
        self.rp_cfgs = [
            dict(rp_cfg or {}, num_representatives=m) for m in per_stage(
                'num_representatives', num_representatives, self.num_stages)
        ]
        for cfg in self.rp_cfgs:
            check_int('num_representatives', cfg['num_representatives'], 1)
        self.qkv_bias = qkv_bias
        self.drop_rate = drop_rate
        self.out_indices = self._parse_out_indices(out_indices)
        if not -1 <= frozen_stages <= self.num_stages:
            raise ValueError(f'frozen_stages must be in [-1, '
                             f'{self.num_stages}], got {frozen_stages}')
        self.frozen_stages = frozen_stages
        self.drop_path_rate = drop_path_rate
        self.norm_cfg = norm_cfg
        self.with_cp = with_cp

    def _build(self) -> None:
        """Build all layers; the last thing that a family's init does."""
        self.stem = self._build_stem()
        self.stages = self._build_stages()
        for i in self.out_indices if self.norm_cfg is not None else ():
            self.add_module(
                f'norm{i}',
                OutputNorm(self.norm_cfg, self.arch['embed_dims'][i],
                           self.norm_eps))
        self._freeze()

    # What a family defines.

    @abstractmethod
    def _build_stem(self) -> nn.Module:
        """A module from images (B, C_in, H, W) to tokens and their grid."""

    def _build_downsample(self, stage: int) -> Optional[nn.Module]:
        """The module that takes a map to the grid of ``stage`` > 0."""
        return None

    def _build_pos_embed(self, stage: int) -> Optional[nn.Module]:
        """The position embedding at the start of ``stage``."""
        return None

    def _build_own_attention(self, stage: int, block: int, **common: Any
                             ) -> nn.Module:
        """The family's own attention; ``common`` are the arguments that all
        attention layers take."""
        raise NotImplementedError

    # What a user reads.

    @property
    def out_channels(self) -> Tuple[int, ...]:
        """Channels of the output maps."""
        return tuple(self.arch['embed_dims'][i] for i in self.out_indices)

    @property
    def strides(self) -> Tuple[int, ...]:
        """Image pixels a cell of the output maps, on each axis."""
        return tuple(self._stride(i) for i in self.out_indices)

    def _stride(self, stage: int) -> int:
        return self.patch_size * 2**stage

    def forward(self, x: Tensor) -> Tuple[Tensor, ...]:
        """Compute the maps of ``out_indices``.

        Args:
            x (Tensor): Images (B, in_channels, H, W), H and W of at least
                ``patch_size``.

        Returns:
            tuple[Tensor]: Contiguous (B, C, ceil(H / s), ceil(W / s)) with C
            from ``out_channels`` and s from ``strides``.

        Raises:
            ValueError: The wrong number of channels or dimensions, or an
                image smaller than one patch.
        """
        self._check_images(x)
        x, hw_shape = self.stem(x)
        outs = []
        for i, stage in enumerate(self.stages):
            x, hw_shape = stage(x, hw_shape)
            if i in self.out_indices:
                outs.append(self._format_output(i, x, hw_shape))
        return tuple(outs)

    def _format_output(self, stage: int, x: Tensor,
                       hw_shape: Tuple[int, int]) -> Tensor:
        """Tokens (B, N, C) after ``stage`` to what forward returns."""
        norm = getattr(self, f'norm{stage}', None)
        return to_map(x, hw_shape) if norm is None else norm(x, hw_shape)

    def train(self, mode: bool = True) -> 'RPBackbone':
        """Set the mode, keep frozen stages in eval mode, and return self."""
        super().train(mode)
        self._freeze()
        return self

    def init_weights(self) -> None:
        """Load the checkpoint that ``init_cfg`` names, if it names one.

        Weights are initialised when the backbone is built, so there is nothing
        else to do.

        Raises:
            ValueError: init_cfg is of another type, or the checkpoint does not
                fit this backbone.
        """
        if self.init_cfg and not self.is_init:
            load_pretrained(self, self.init_cfg)
            self.is_init = True

    def get_layer_depth(self,
                        param_name: str,
                        prefix: str = '') -> Tuple[int, int]:
        """The depth of a parameter, for layer-wise learning rate decay.

        Args:
            param_name (str): Its name in the model.
            prefix (str): What stands before the backbone's own names in it.

        Returns:
            tuple[int, int]: Its depth, and the number of depths: 0 for the
            stem, 1 to L for the blocks, L + 1 for output norms and all that
            is outside of the backbone.
        """
        depths = self.arch['depths']
        last = sum(depths) + 1
        if not param_name.startswith(prefix):
            return last, last + 1
        name = param_name[len(prefix):].split('.')
        if name[0] == 'stem':
            return 0, last + 1
        if name[0] != 'stages':
            return last, last + 1
        # Downsampling and positions are as deep as the block they feed.
        block = int(name[3]) if name[2] == 'blocks' else 0
        return sum(depths[:int(name[1])]) + block + 1, last + 1

    # How it is put together.

    def _build_stages(self) -> nn.ModuleList:
        depths = self.arch['depths']
        rates = torch.linspace(
            0, self.drop_path_rate, sum(depths), device='cpu').tolist()
        stages = nn.ModuleList()
        for i in range(self.out_indices[-1] + 1):
            blocks = [
                self._build_block(i, j, rates[sum(depths[:i]) + j])
                for j in range(depths[i])
            ]
            stages.append(
                Stage(
                    blocks,
                    downsample=self._build_downsample(i) if i else None,
                    pos_embed=self._build_pos_embed(i),
                    with_cp=self.with_cp))
        return stages

    def _build_block(self, stage: int, block: int,
                     drop_path_rate: float) -> TransformerBlock:
        dims = self.arch['embed_dims'][stage]
        common = dict(
            embed_dims=dims,
            num_heads=self.arch['num_heads'][stage],
            qkv_bias=self.qkv_bias,
            proj_drop=self.drop_rate)
        if self.attention[stage] == 'rp':
            attn = RPAttention(**common, **self.rp_cfgs[stage])
        elif self.attention[stage] == 'dense':
            attn = DenseAttention(**common)
        else:
            attn = self._build_own_attention(stage, block, **common)
        return TransformerBlock(
            attn,
            dims,
            self.arch['mlp_ratios'][stage],
            drop_rate=self.drop_rate,
            drop_path_rate=drop_path_rate,
            norm_eps=self.norm_eps)

    def _freeze(self) -> None:
        frozen: List[nn.Module] = []
        if self.frozen_stages >= 0:
            frozen.append(self.stem)
        for i in range(self.frozen_stages):
            frozen += self.stages[i:i + 1]
            if hasattr(self, f'norm{i}'):
                frozen.append(getattr(self, f'norm{i}'))
        for module in frozen:
            module.eval()
            module.requires_grad_(False)

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        check_state_dict(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    # What is checked.

    def _parse_arch(self, arch: Arch) -> Dict[str, Tuple]:
        if isinstance(arch, str):
            if arch not in self.arch_zoo:
                raise ValueError(
                    f'{type(self).__name__} has no arch {arch!r}; use one of '
                    f'{tuple(self.arch_zoo)}, or a dict with the keys '
                    f'{self.arch_keys}')
            arch = self.arch_zoo[arch]
        if not isinstance(arch, Mapping):
            raise TypeError(f'arch must be a name or a dict, got {arch!r}')
        if set(arch) != set(self.arch_keys):
            raise ValueError(f'{type(self).__name__} needs an arch dict with '
                             f'the keys {self.arch_keys}, got {tuple(arch)}')
        num_stages = self._num_stages(arch)
        parsed = {
            key: per_stage(f"arch['{key}']", arch[key], num_stages)
            for key in self.arch_keys
        }
        for key in self.arch_keys[:3]:
            for value in parsed[key]:
                check_int(f"arch['{key}']", value, 1)
        for dims, heads, ratio in zip(parsed['embed_dims'],
                                      parsed['num_heads'],
                                      parsed['mlp_ratios'], strict=True):
            check_number("arch['mlp_ratios']", ratio, 0)
            if dims % heads or int(dims * ratio) < 1:
                raise ValueError(
                    f"arch['embed_dims'] must be a multiple of num_heads, and "
                    f'times mlp_ratios at least 1, got {dims}, {heads} and '
                    f'{ratio}')
        return parsed

    def _num_stages(self, arch: Mapping[str, Any]) -> int:
        if (not isinstance(arch['depths'], Sequence) or not arch['depths']
                or isinstance(arch['depths'], str)):
            raise ValueError("arch['depths'] needs the number of blocks of "
                             f'each stage, got {arch["depths"]!r}')
        return len(arch['depths'])

    def _check_attention(self) -> None:
        allowed = ['rp', 'dense']
        if self.own_attention is not None:
            allowed.append(self.own_attention)
        for name in self.attention:
            if name not in allowed:
                raise ValueError(f'attention of {type(self).__name__} must be '
                                 f'out of {tuple(allowed)}, got {name!r}')

    def _check_rp_cfg(self, rp_cfg: Mapping[str, Any]) -> None:
        own = dict(
            embed_dims='arch',
            num_heads='arch',
            num_representatives='num_representatives',
            qkv_bias='qkv_bias',
            proj_drop='drop_rate')
        allowed = inspect.signature(RPAttention.__init__).parameters
        free = [n for n in list(allowed)[1:] if n not in own]  # 0 is self
        for name in rp_cfg:
            if name not in free and name not in own:
                raise TypeError(f'rp_cfg has {name!r}, which RPAttention does '
                                f'not take; allowed: {", ".join(free)}')
            if name in own:
                raise ValueError(
                    f'rp_cfg has {name}={rp_cfg[name]!r}; set it by the '
                    f'argument {own[name]} of {type(self).__name__} instead')

    def _parse_out_indices(self,
                           out_indices: Sequence[int]) -> Tuple[int, ...]:
        if isinstance(out_indices, int):
            out_indices = (out_indices, )
        if isinstance(out_indices, (str, Mapping)) or not isinstance(
                out_indices, Sequence):
            raise TypeError('out_indices must be a sequence of integers, got '
                            f'{out_indices!r}')
        for index in out_indices:
            check_int('out_indices', index)
        n = self.num_stages
        parsed = tuple(i + n if i < 0 else i for i in out_indices)
        if (not parsed or sorted(set(parsed)) != list(parsed)
                or parsed[0] < 0 or parsed[-1] >= n):
            raise ValueError(
                f'out_indices must be one or more different stages in rising '
                f'order, each in [{-n}, {n - 1}], got {tuple(out_indices)}')
        return parsed

    def _check_images(self, x: Tensor) -> None:
        name = type(self).__name__
        check_tensor('x', x, 4, f'images (B, {self.in_channels}, H, W) for '
                     f'{name}')
        if x.dim() != 4 or x.shape[1] != self.in_channels:
            raise ValueError(f'{name} takes images (B, {self.in_channels}, H, '
                             f'W), got {tuple(x.shape)}')
        height, width = x.shape[-2:]
        if min(height, width) < self.patch_size:
            raise ValueError(
                f'{name} needs images of at least {self.patch_size}x'
                f'{self.patch_size} pixels, one patch, got {height}x{width}; '
                'enlarge or pad them')
        check_dtype(x, next(self.parameters()))
