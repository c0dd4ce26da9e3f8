"""A start for what RPAttention has and its source has not, from images.

A converted network has all of its source's weights, but anchors and Interact
that mean nothing yet. Here they are set so that each layer begins as an
approximation of the softmax attention over all tokens with the same Q, K, V.
"""

import math
from contextlib import contextmanager
from typing import Dict, Iterator, List, Mapping, NamedTuple, Optional, Union

import torch
from torch import Tensor, nn

from ..arguments import check_int, check_number, check_one_of, check_tensor
from ..layers import RPAttention
from ..ops import gather, route
from .kmeans import spherical_kmeans

DWC_STARTS = ('zero', 'average', 'keep')
# Share of a local average in the output where the convolution starts as one;
# the representatives give the rest, so that values keep their mean.
LOCAL_SHARE = 0.5
# How much of itself a representative is to keep in Interact. Where values are
# too much alike for that it stays below, at the bound of the sharpness, beyond
# which the softmax would have no gradient left.
SELF_WEIGHT = 0.9
MAX_SHARPNESS = 4.
# Mean entropy of the routing over its largest value.
ENTROPY = 0.3
# Tokens a head that k-means sees at most: 64 for each of 128 clusters.
MAX_TOKENS = 8192


class LayerReport(NamedTuple):
    """What calibration did to one layer.

    Attributes:
        name (str): The layer's name in the backbone.
        num_representatives (int): M.
        num_tokens (int): Tokens a head that k-means saw.
        entropy (float): Mean entropy of the routing, over its largest value.
        alive (float): Share of the representatives that hold at least a tenth
            of an equal share of the tokens, over all images.
        self_weight (float): Mean share of itself that a representative keeps
            in Interact.
    """

    name: str
    num_representatives: int
    num_tokens: int
    entropy: float
    alive: float
    self_weight: float

    def __str__(self) -> str:
        return (f'{self.name}: {self.num_representatives} anchors from '
                f'{self.num_tokens} keys a head, routing entropy '
                f'{self.entropy:.2f}, {self.alive:.0%} in use, self-weight '
                f'{self.self_weight:.2f}')


def calibrate(backbone: nn.Module,
              images: Tensor,
              *,
              dwc: Union[str, Mapping[str, str]] = 'zero',
              entropy: float = ENTROPY,
              seed: int = 0) -> List[LayerReport]:
    """Set anchors, Interact and convolution of all RPAttention layers.

    In one pass over the images, in the order of the layers, so that a layer
    sees what the calibrated layers before it give:

    - the key bias is shifted so that keys have zero mean. Softmax attention
      does not see this, but the routing has no bias and needs it;
    - anchors become the centres of spherical k-means over the keys, a head
      each, scaled to the ``entropy`` of the routing that is asked for;
    - Interact becomes as near to the identity as it can: queries and keys
      whiten the gathered values, values pass through;
    - the convolution starts at zero or as a local average.

    Args:
        backbone (nn.Module): An RPAttention backbone, changed in place. Any
            module that maps images and has RPAttention layers will do.
        images (Tensor): Preprocessed images (B, C, H, W) as the backbone
            takes them; 32 to 128 of them, all in one forward pass.
        dwc (str | Mapping): ``'zero'``; ``'average'``: the mean over the
            kernel gives half of the output, which suits sources with local
            windows; or ``'keep'``, for a convolution that the source had too.
            Or one of these by the name of each layer.
        entropy (float): Mean entropy of the routing over its largest value,
            between 0 (one-hot) and 1 (uniform), both excluded.
        seed (int): Of k-means and of the choice of tokens.

    Returns:
        list[LayerReport]: One for each layer.

    Raises:
        ValueError: An argument is out of range, no layer is an RPAttention,
            or the images have fewer tokens in a layer than it has
            representatives.
    """
    if not isinstance(backbone, nn.Module):
        raise TypeError(f'backbone must be a module, got {backbone!r}')
    check_tensor('images', images)
    if not isinstance(dwc, Mapping):
        check_one_of('dwc', dwc, DWC_STARTS)
    check_int('seed', seed)
    check_number('entropy', entropy)
    if not 0 < entropy < 1:
        raise ValueError(f'entropy must be between 0 and 1, got {entropy}')
    layers = {
        name: module
        for name, module in backbone.named_modules()
        if isinstance(module, RPAttention)
    }
    if not layers:
        raise ValueError(f'backbone {type(backbone).__name__} has no '
                         "RPAttention layer to calibrate; is its attention "
                         "'rp'?")
    starts = dict.fromkeys(layers, dwc) if isinstance(dwc, str) else dwc
    for name in layers:
        check_one_of(f'dwc of {name}', starts.get(name), DWC_STARTS)
    reports: List[LayerReport] = []
    generator = torch.Generator().manual_seed(seed)

    def hook(name):

        def fit(layer, args, kwargs):
            reports.append(
                _calibrate_layer(name, layer, _tokens(*args, **kwargs),
                                 starts[name], entropy, generator))

        return fit

    with _hooked(backbone, {n: hook(n) for n in layers}, layers):
        backbone(images)
    return reports


@contextmanager
def _hooked(backbone: nn.Module, hooks: Dict, layers: Dict) -> Iterator[None]:
    """Eval mode without gradients, the hooks before the layers."""
    modes = {module: module.training for module in backbone.modules()}
    handles = [
        layer.register_forward_pre_hook(hooks[name], with_kwargs=True)
        for name, layer in layers.items()
    ]
    backbone.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes.items():
            module.training = mode


def _tokens(x: Tensor, hw_shape: Optional[tuple] = None) -> Tensor:
    """What a layer was given as tokens (B, N, C)."""
    return x.flatten(2).transpose(1, 2) if x.dim() == 4 else x


def _calibrate_layer(name: str, layer: RPAttention, x: Tensor, dwc: str,
                     entropy: float,
                     generator: torch.Generator) -> LayerReport:
    _center_keys(layer, x)
    k, v = (t.unflatten(-1, (layer.num_heads, -1)).transpose(1, 2).float()
            for t in layer.qkv(x).chunk(3, dim=-1)[1:])  # (B, h, N, d)
    keys = k.transpose(0, 1).flatten(1, 2)  # (h, B * N, d)
    if len(layer.anchors) == 1:  # shared among the heads
        keys = keys.flatten(0, 1)[None]
    if keys.shape[1] < layer.num_representatives:
        raise ValueError(
            f'{name} has {layer.num_representatives} representatives, but '
            f'the images have only {keys.shape[1]} tokens there; calibrate '
            'on more or larger images')
    if keys.shape[1] > MAX_TOKENS:
        chosen = torch.randperm(keys.shape[1], generator=generator)
        keys = keys[:, chosen[:MAX_TOKENS].to(keys.device)]
    centers = spherical_kmeans(keys, layer.num_representatives, generator)
    scale = _scale_for_entropy(k, centers, layer.routing, entropy)
    layer.anchors.copy_(scale * centers)

    p = route(k, layer.anchors.float(), layer.routing)
    share = p.mean((0, 2))
    share = share / share.sum(-1, keepdim=True)  # (h, M)
    _, z = gather(k, v, layer.anchors.float(), layer.routing, layer.reduction)
    local_share = _start_dwc(layer, dwc)
    self_weight = _start_interact(layer, z, 1 - local_share)
    return LayerReport(
        name=name,
        num_representatives=layer.num_representatives,
        num_tokens=keys.shape[1],
        entropy=_mean_entropy(p, layer.routing),
        alive=(share * layer.num_representatives > 0.1).float().mean().item(),
        self_weight=self_weight)


def _center_keys(layer: RPAttention, x: Tensor) -> None:
    """Shift the key bias so that keys have zero mean over the images.

    q . (k + c) = q . k + q . c adds the same to all logits of a query, so
    that softmax attention stays what it is.
    """
    if layer.qkv.bias is not None:
        part = slice(layer.embed_dims, 2 * layer.embed_dims)
        mean = x.float().mean((0, 1)) @ layer.qkv.weight[part].float().T
        layer.qkv.bias[part] = -mean


def _mean_entropy(p: Tensor, routing: str) -> float:
    """Mean entropy of P (B, h, N, M) over log of its largest support."""
    axis = -1 if routing == 'representatives' else -2
    if p.shape[axis] == 1:
        return 1.
    values = torch.special.entr(p).sum(axis)
    return (values.mean() / math.log(p.shape[axis])).item()


def _scale_for_entropy(k: Tensor, centers: Tensor, routing: str,
                       entropy: float) -> float:
    """The scale of the anchors that gives the routing its entropy."""
    # A few images are enough to measure a mean.
    k = k[:max(1, MAX_TOKENS // k.shape[2])]
    size = k.norm(dim=-1).mean().clamp(min=1e-12).item()

    def too_soft(scale: float) -> bool:
        return _mean_entropy(route(k, scale * centers, routing),
                             routing) > entropy

    return _bisect(too_soft, 1e-2 / size, 1e3 / size)


def _bisect(too_small, low: float, high: float) -> float:
    """The value, on a logarithmic scale, where ``too_small`` turns False."""
    for _ in range(25):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if too_small(middle) else (low, middle)
    return math.sqrt(low * high)


def _start_interact(layer: RPAttention, z: Tensor, gain: float) -> float:
    """Make Interact as near to the identity, times ``gain``, as it can be.

    Args:
        layer (RPAttention): The layer.
        z (Tensor): Its gathered values (B, h, M, d).
        gain (float): Factor of the values that pass.

    Returns:
        float: The mean weight of a representative on itself.
    """
    d = z.shape[-1]
    # With Wq' = Wk' = the square root of c S^-1, S the second moments of Z,
    # the logits compare whitened values; c sharpens until each sees itself.
    flat = z.transpose(0, 1).flatten(1, 2)  # (h, B * M, d)
    moments = flat.transpose(1, 2) @ flat / flat.shape[1]
    values, vectors = torch.linalg.eigh(moments.double())
    # Directions in which nothing varies must not be blown up.
    values = values.clamp(min=1e-3 * values[:, -1:].clamp(min=1e-12).max())
    root = (vectors * values.rsqrt().unsqueeze(1)) @ vectors.transpose(1, 2)
    root = root.to(z)
    white = (z @ root)[:8]

    def self_weight(c: float) -> float:
        logits = white @ white.transpose(-2, -1) * (c / math.sqrt(d))
        return logits.softmax(-1).diagonal(dim1=-2, dim2=-1).mean().item()

    sharpness = _bisect(lambda c: self_weight(c) < SELF_WEIGHT, 1e-2,
                        MAX_SHARPNESS)
    eye = torch.eye(d).expand(layer.num_heads, d, d).to(z)
    value = (gain - 1 if layer.interact_residual else gain) * eye
    weights = (math.sqrt(sharpness) * root, math.sqrt(sharpness) * root, value)
    for own, weight in zip(layer.interact_weight, weights, strict=True):
        _set_square(own, weight)
    if layer.interact_proj is not None:
        _set_square(layer.interact_proj, eye)
    return self_weight(sharpness)


def _set_square(own: Tensor, weight: Tensor) -> None:
    """Copy (h, d, d) into itself, or into (C, C) as blocks."""
    own.copy_(weight if own.dim() == 3 else torch.block_diag(*weight))


def _start_dwc(layer: RPAttention, dwc: str) -> float:
    """Set the convolution; returns its share of the output."""
    if layer.dwc is None or dwc == 'keep':
        return 0.
    share = LOCAL_SHARE if dwc == 'average' else 0.
    area = layer.dwc.weight[0, 0].numel()
    nn.init.constant_(layer.dwc.weight, share / area)
    nn.init.zeros_(layer.dwc.bias)
    return share
