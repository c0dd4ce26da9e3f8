"""Weight initialisation shared by all layers."""

import math

from torch import nn

LINEAR_STD = 0.02


def init_vit_(module: nn.Module) -> None:
    """Initialise the Linear, Conv2d and norm layers inside ``module``.

    The scheme of ViT-style backbones: Linear weights truncated normal with
    standard deviation 0.02, convolutions normal by fan-out, norms at one, all
    biases at zero. Layers call it in their constructors, so a network is ready
    when it is built, with or without mmengine's ``init_weights``.
    """
    for m in module.modules():
        if isinstance(m, nn.Linear):
            nn.init.trunc_normal_(m.weight, std=LINEAR_STD)
        elif isinstance(m, nn.Conv2d):
            fan_out = math.prod(m.kernel_size) * m.out_channels // m.groups
            nn.init.normal_(m.weight, std=math.sqrt(2 / fan_out))
        elif isinstance(m, nn.LayerNorm):
            nn.init.ones_(m.weight)
        else:
            continue
        if m.bias is not None:
            nn.init.zeros_(m.bias)
