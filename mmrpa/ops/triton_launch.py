"""Forward and backward by the Triton kernels; same contract as ``fused``."""

from typing import NamedTuple, Optional, Tuple

import torch
import triton
from torch import Tensor

from . import fused, triton_interact
from . import triton_kernels as kernels
from .fused import Options, Representatives
from .naive import MASS_EPS, interact

# Interact runs inside a kernel up to these sizes: one program then holds all
# its matrices. Beyond them, and for what it does not know (the full reading,
# an output projection), it runs in torch.
MAX_INTERACT_DIMS = 64
MAX_INTERACT_REPRESENTATIVES = 64
# Programs per multiprocessor that the kernels which sum over tokens aim at.
WAVES = 4
# Splits to aim at without a GPU, so that the interpreter adds some up.
INTERPRETED_PROGRAMS = 4


def interpreting() -> bool:
    """Whether Triton was imported with TRITON_INTERPRET=1."""
    return not isinstance(kernels.gather_kernel,
                          triton.runtime.jit.JITFunction)


class Tiles(NamedTuple):
    """How the kernels cut one problem."""

    block_n: int
    block_m: int
    block_d: int
    blocks: int
    splits: int
    split_tokens: int
    stages: int
    precision: str

    @property
    def constants(self) -> dict:
        """The constants that the kernels on tokens share."""
        return dict(
            BLOCK_N=self.block_n,
            BLOCK_M=self.block_m,
            BLOCK_D=self.block_d,
            BLOCKS=self.blocks,
            PRECISION=self.precision,
            num_warps=8,
            num_stages=self.stages)


def _block(size: int) -> int:
    """The power of two, at least 16 as tl.dot wants, that holds ``size``."""
    return max(16, triton.next_power_of_2(size))


def block_sizes(head_dims: int, num_representatives: int,
                itemsize: int) -> Tuple[int, int, int, int]:
    """Tokens, representatives and channels of a block, and pipeline stages.

    Chosen so that, compiled for sm_80, the kernels spill few registers and
    stay below the 99 KiB of shared memory that an sm_86 has; found by
    compiling, not by running: ``tests/test_ops/test_triton_compile.py``.
    """
    block_d = _block(head_dims)
    row = block_d * itemsize
    block_n = 64 if row <= 64 else 32 if row <= 128 else 16
    limit_m = 16 if row > 256 else 32 if row > 128 or itemsize > 2 else 64
    return (block_n, min(limit_m, _block(num_representatives)), block_d,
            2 if row <= 128 else 1)


def tiles(q: Tensor, num_representatives: int) -> Tiles:
    """Block sizes and splits for (B, N, h, d) and M."""
    batch, num_tokens, heads, dims = q.shape
    block_n, block_m, block_d, stages = block_sizes(
        dims, num_representatives, q.element_size())
    blocks = triton.cdiv(num_representatives, block_m)
    if q.device.type == 'cuda':
        properties = torch.cuda.get_device_properties(q.device)
        programs = WAVES * properties.multi_processor_count
    else:
        programs = INTERPRETED_PROGRAMS
    splits = max(1, programs // max(1, batch * heads * blocks))
    steps = triton.cdiv(num_tokens, block_n)
    split_tokens = triton.cdiv(steps, min(splits, steps)) * block_n
    return Tiles(block_n, block_m, block_d, blocks,
                 triton.cdiv(num_tokens, split_tokens), split_tokens, stages,
                 _precision(q.dtype))


def _precision(dtype: torch.dtype) -> str:
    """What the kernels' ``_dot`` does; float32 follows torch's setting."""
    if interpreting():
        return 'upcast'
    exact = torch.get_float32_matmul_precision() == 'highest'
    return 'tf32x3' if dtype == torch.float32 and exact else 'tf32'


def _interacts(weight: Tensor, proj: Optional[Tensor], m: int) -> bool:
    """Whether the kernels do Interact too."""
    return (weight.dim() == 4 and proj is None
            and weight.shape[-1] <= MAX_INTERACT_DIMS
            and m <= MAX_INTERACT_REPRESENTATIVES)


def _strides(*tensors: Tensor) -> Tuple[int, ...]:
    """Strides over B, N and h of (B, N, h, d) tensors."""
    return tuple(s for t in tensors for s in t.stride()[:3])


def _unit_stride(*tensors: Tensor) -> Tuple[Tensor, ...]:
    """Copies of those that the kernels can not read: d must be adjacent."""
    return tuple(t if t.stride(-1) == 1 else t.contiguous() for t in tensors)


def _anchor_stride(anchors: Tensor) -> int:
    """From one head's anchors to the next; 0 where all share them."""
    return anchors.stride(0) if anchors.shape[0] > 1 else 0


def _convolution(weight: Optional[Tensor], bias: Optional[Tensor],
                 dummy: Tensor) -> Tuple[int, Tensor, Tensor]:
    """Kernel size, and tensors to hand to a kernel in any case."""
    if weight is None:
        return 0, dummy, dummy
    return (weight.shape[-1], weight.contiguous(),
            dummy if bias is None else bias.contiguous())


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    anchors: Tensor,
    weight: Tensor,
    proj: Optional[Tensor],
    dwc_weight: Optional[Tensor],
    dwc_bias: Optional[Tensor],
    hw_shape: Tuple[int, int],
    options: Options,
) -> Tuple[Tensor, Representatives]:
    """See :func:`mmrpa.ops.fused.forward`."""
    if not q.numel():  # no grid, nothing to launch
        return fused.forward(q, k, v, anchors, weight, proj, dwc_weight,
                             dwc_bias, hw_shape, options)
    q, k, v = _unit_stride(q, k, v)
    anchors, weight = anchors.contiguous(), weight.contiguous()
    out = q.new_empty(q.shape)
    batch, num_tokens, heads, dims = q.shape
    m = anchors.shape[1]
    tile = tiles(q, m)
    reps, v_rep = _gather(k, v, anchors, weight, proj, options, tile)
    size, dwc_weight_, dwc_bias_ = _convolution(dwc_weight, dwc_bias, v)
    grid = (triton.cdiv(num_tokens, tile.block_n), batch * heads)
    kernels.distribute_kernel[grid](
        q, *_centre(reps.k, v_rep, tile, q.dtype), v, dwc_weight_, dwc_bias_,
        out, *_strides(q, v, out), options.scale, num_tokens, m, dims, heads,
        *hw_shape, KERNEL=size, BIAS=dwc_bias is not None, **tile.constants)
    return out, reps


def _gather(k: Tensor, v: Tensor, anchors: Tensor, weight: Tensor,
            proj: Optional[Tensor], options: Options,
            tile: Tiles) -> Tuple[Representatives, Tensor]:
    """Gather and Interact: the representatives, and V_rep."""
    batch, num_tokens, heads, dims = k.shape
    m = anchors.shape[1]
    inside = _interacts(weight, proj, m)
    block_m = _block(m) if inside else tile.block_m

    def empty(*shape: int) -> Tensor:
        return anchors.new_empty(batch, heads, *shape)

    parts = (empty(tile.splits, m, dims), empty(tile.splits, m, dims),
             empty(tile.splits, m))
    kernels.gather_kernel[tile.splits, batch * heads, tile.blocks](
        k, v, anchors, *parts, *_strides(k, v), _anchor_stride(anchors),
        num_tokens, m, dims, heads, tile.split_tokens, **tile.constants)
    reps = Representatives(empty(m, dims), empty(m, dims), empty(m))
    v_rep = empty(m, dims) if inside else reps.z
    triton_interact.finish_kernel[batch * heads, triton.cdiv(m, block_m)](
        *parts, weight, *reps, v_rep, tile.splits, m, dims, heads, dims**-0.5,
        MEAN=options.reduction == 'mean', INTERACT=inside,
        RESIDUAL=options.residual, BLOCK_M=block_m, BLOCK_D=tile.block_d)
    if not inside:
        v_rep = interact(reps.z, weight, proj, options.residual).contiguous()
    return reps, v_rep


def _centre(k_rep: Tensor, v_rep: Tensor, tile: Tiles,
            dtype: torch.dtype) -> Tuple[Tensor, Tensor, Tensor, Tensor]:
    """What Distribute reads of contiguous (B, h, M, d).

    Returns:
        tuple: Keys and values (B, h, M, d) in ``dtype``, their units
        (B, h, 2), and V_rep's mean (B, h, d).
    """
    batch, heads, m, dims = k_rep.shape
    out = (torch.empty_like(k_rep, dtype=dtype),
           torch.empty_like(v_rep, dtype=dtype),
           k_rep.new_empty(batch, heads, 2),
           k_rep.new_empty(batch, heads, dims))
    triton_interact.centre_kernel[(batch * heads, )](
        k_rep, v_rep, *out, m, dims, BLOCK_M=tile.block_m,
        BLOCK_D=tile.block_d, BLOCKS=tile.blocks)
    return out


def backward(
    q: Tensor, k: Tensor, v: Tensor, anchors: Tensor, weight: Tensor,
    proj: Optional[Tensor], dwc_weight: Optional[Tensor],
    dwc_bias: Optional[Tensor], hw_shape: Tuple[int, int], options: Options,
    reps: Representatives, grad_out: Tensor, grad_q: Tensor, grad_k: Tensor,
    grad_v: Tensor
) -> Tuple[Tensor, Tensor, Optional[Tensor], Optional[Tensor],
           Optional[Tensor]]:
    """See :func:`mmrpa.ops.fused.backward`."""
    if not q.numel():
        return fused.backward(q, k, v, anchors, weight, proj, dwc_weight,
                              dwc_bias, hw_shape, options, reps, grad_out,
                              grad_q, grad_k, grad_v)
    q, k, v, grad_out = _unit_stride(q, k, v, grad_out)
    anchors, weight = anchors.contiguous(), weight.contiguous()
    batch, num_tokens, heads, dims = q.shape
    m = anchors.shape[1]
    tile = tiles(q, m)

    def empty(*shape: int) -> Tensor:
        return anchors.new_empty(batch, heads, *shape)

    done = fused.interact(reps.z, weight, proj, options.residual)
    *attended, _ = _centre(reps.k, done.v_rep.contiguous(), tile, q.dtype)
    parts = empty(tile.splits, m, dims), empty(tile.splits, m, dims)
    grid = (tile.splits, batch * heads, tile.blocks)
    kernels.distribute_backward_kernel[grid](
        q, *attended, grad_out, grad_q, *parts,
        *_strides(q, grad_out, grad_q), options.scale, num_tokens, m, dims,
        heads, tile.split_tokens, **tile.constants)
    routed, grad_weight, grad_proj = _interact_backward(
        parts, weight, proj, options, reps, done, tile, k.dtype)

    size, dwc_weight_, _ = _convolution(dwc_weight, dwc_bias, v)
    anchors_part = empty(tile.splits, m, dims)
    dwc_part = empty(tile.splits, size * size + 1, dims)
    kernels.gather_backward_kernel[grid](
        k, v, anchors, *routed, grad_out, dwc_weight_, grad_k, grad_v,
        anchors_part, dwc_part, *_strides(k, v), _anchor_stride(anchors),
        *_strides(grad_out, grad_k, grad_v), num_tokens, m, dims, heads,
        *hw_shape, tile.split_tokens, KERNEL=size,
        BLOCK_TAPS=triton.next_power_of_2(size * size + 1), **tile.constants)
    grad_dwc = grad_bias = None
    if dwc_weight is not None:
        # (h, taps, d) and, from the last row, (h, d). Sums of their own: an
        # operator's outputs must not overlap.
        taps = dwc_part[..., :-1, :].sum((0, 2))
        grad_dwc = taps.transpose(1, 2).reshape(dwc_weight.shape)
        if dwc_bias is not None:
            grad_bias = dwc_part[..., -1, :].sum((0, 2)).flatten()
    return (anchors_part.sum((0, 2)), grad_weight, grad_proj, grad_dwc,
            grad_bias)


def _interact_backward(
    parts: Tuple[Tensor, Tensor], weight: Tensor, proj: Optional[Tensor],
    options: Options, reps: Representatives, done: fused.Interacted,
    tile: Tiles, dtype: torch.dtype
) -> Tuple[Tuple[Tensor, ...], Tensor, Optional[Tensor]]:
    """From the parts of dK_rep and dV_rep to what Gather's backward wants.

    Returns:
        tuple: G_k and G_z (B, h, M, d) in ``dtype``, the offset (B, h, M) and
        the unit (B, h, M) that they were divided by; gradients of weight and
        proj.
    """
    batch, heads, m, dims = reps.k.shape
    mean = options.reduction == 'mean'
    if _interacts(weight, proj, m):
        routed = (torch.empty_like(reps.k, dtype=dtype),
                  torch.empty_like(reps.z, dtype=dtype),
                  torch.empty_like(reps.mass), torch.empty_like(reps.mass))
        grad_weight = weight.new_empty(batch, heads, 3, dims, dims)
        triton_interact.interact_backward_kernel[(batch * heads, )](
            *parts, weight, *reps, *routed, grad_weight, tile.splits, m, dims,
            heads, options.scale, dims**-0.5, MEAN=mean,
            RESIDUAL=options.residual, BLOCK_M=_block(m),
            BLOCK_D=tile.block_d)
        return routed, grad_weight.sum(0).transpose(0, 1), None
    grad_k, grad_v_rep = (part.sum(2) for part in parts)
    grad_k = grad_k * options.scale
    grad_z, grad_weight, grad_proj = fused.interact_backward(
        reps.z, weight, proj, options.residual, done, grad_v_rep)
    if mean:
        divisor = reps.mass.clamp(min=MASS_EPS).unsqueeze(-1)
        grad_k, grad_z = (g / divisor for g in (grad_k, grad_z))
    unit = torch.maximum(*(g.abs().amax(-1) for g in (grad_k, grad_z)))
    unit = torch.where(unit > 0, unit, torch.ones_like(unit))
    grad_k, grad_z = ((g / unit.unsqueeze(-1)).to(dtype).contiguous()
                      for g in (grad_k, grad_z))
    offset = torch.zeros_like(reps.mass)
    if mean:
        # Of what is rounded, as in the kernel.
        offset = fused.mass_backward(reps, grad_k, grad_z)
    return (grad_k, grad_z, offset, unit), grad_weight, grad_proj
