"""Training steps of small backbones, alone or in one of several processes.

What ``tests/test_distributed`` compares: it imports torch and mmrpa only, so
that new processes start fast.
"""

from unittest import mock

import torch
from cpu_sync_bn import sync_bn_on_cpu
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from zoo import build

from mmrpa.ops import absorbed

BATCH, STEPS, LR = 4, 2, 0.01
Case = tuple[str, dict, torch.dtype]


def make(case: Case, device: str = 'cpu') -> nn.Module:
    """The backbone of a case, with the same weights in every process."""
    family, options, dtype = case
    torch.manual_seed(0)
    model = build(family, **options).to(dtype)
    for parameter in model.parameters():
        # New anchors and projections are small; far from 0 all has a say.
        parameter.data.add_(torch.randn_like(parameter), alpha=0.05)
    return model.to(device)


def share(step: int, rank: int, size: int) -> Tensor:
    """What a process gets of a step's images: (BATCH / size, 3, 32, 64)."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(BATCH, 3, 32, 64, generator=generator)
    # Image 0 is the darkest and image 3 the brightest.
    x += torch.arange(BATCH).view(-1, 1, 1, 1)
    return x.chunk(size)[rank]


def loss_of(maps: tuple[Tensor, ...]) -> Tensor:
    """A mean over the images in which every cell has a weight of its own."""
    weights = [torch.linspace(-1, 1, m[0].numel()).to(m) for m in maps]
    return 10 * sum((m.flatten(1) * w).square().mean()
                    for m, w in zip(maps, weights, strict=True))


# Small maps take the operator of the layer, too, as large ones do.
@mock.patch.object(absorbed, 'MIN_TOKENS', 16)
def take_steps(model: nn.Module, rank: int = 0, size: int = 1,
               steps: int = STEPS) -> dict[str, Tensor]:
    """Train on this process's share of each batch.

    Returns:
        dict[str, Tensor]: ``grad.*`` of the first step, and the values of all
        parameters and buffers after the last one.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, LR, momentum=0.9)
    result = {}
    for step in range(steps):
        x = share(step, rank, size).to(trained[0])
        optimizer.zero_grad()
        loss_of(model(x)).backward()
        if step == 0:
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    result['grad.' + plain(name)] = whole(parameter.grad)
        optimizer.step()
    for name, value in model.state_dict().items():
        result[plain(name)] = whole(value)
    return result


def plain(name: str) -> str:
    """A parameter's name without what DDP puts before it."""
    return name.removeprefix('module.')


def whole(tensor: Tensor) -> Tensor:
    """A copy of a tensor on the CPU, put together if it is sharded."""
    if hasattr(tensor, 'full_tensor'):
        tensor = tensor.full_tensor()
    return tensor.detach().cpu().clone()


def ddp_steps(rank: int, cases: list[Case], size: int,
              device: str = 'cpu') -> list[dict[str, Tensor]]:
    """The steps of each case with DistributedDataParallel."""
    return [
        take_steps(
            DistributedDataParallel(
                make(case, device), find_unused_parameters=False), rank, size)
        for case in cases
    ]


def fsdp_steps(rank: int, cases: list[Case],
               size: int) -> list[dict[str, Tensor]]:
    """The steps of each case with every block sharded, then the rest."""
    mesh = init_device_mesh('cpu', (size, ))
    results = []
    for case in cases:
        model = make(case)
        for stage in model.stages:
            for block in stage.blocks:
                fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        results.append(take_steps(model, rank, size))
    return results


class Segmentor(nn.Module):
    """A small UperNet with an auxiliary head, both of mmseg.

    Args:
        norm (str): Norm of the heads and of the backbone's maps.
    """

    def __init__(self, norm: str) -> None:
        super().__init__()
        # Of mmseg only where it is asked for: the import takes seconds.
        from mmseg.models import FCNHead, UPerHead
        common = dict(norm_cfg=dict(type=norm), num_classes=3, dropout_ratio=0,
                      align_corners=False)
        self.backbone = build('swin', norm_cfg=dict(type=norm))
        self.decode_head = UPerHead(
            in_channels=[8, 16, 24, 32], in_index=[0, 1, 2, 3], channels=8,
            pool_scales=(1, 2), **common)
        self.auxiliary_head = FCNHead(
            in_channels=24, in_index=2, channels=8, num_convs=1, **common)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Images to the logits of both heads, (B, classes, H, W) each."""
        maps = self.backbone(x)
        return tuple(head(maps) for head in (self.decode_head,
                                             self.auxiliary_head))


def make_segmentor(norm: str, dtype: torch.dtype) -> nn.Module:
    """The same weights in every process, and with every norm."""
    torch.manual_seed(0)
    model = Segmentor(norm).to(dtype)
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.05)
    return model


def sync_bn_steps(rank: int, cases: list[Case], segmentors: list[tuple],
                  size: int) -> dict[str, list]:
    """Steps with SyncBN on the CPU: of backbones, and of whole segmentors."""
    with sync_bn_on_cpu():
        return dict(
            backbones=ddp_steps(rank, cases, size),
            segmentors=[take_steps(
                DistributedDataParallel(make_segmentor(*args)), rank, size)
                for args in segmentors])


def all_steps(rank: int, ddp_cases: list[Case], fsdp_cases: list[Case],
              size: int) -> dict[str, list]:
    """Both in one start of the processes."""
    return dict(
        ddp=ddp_steps(rank, ddp_cases, size),
        fsdp=fsdp_steps(rank, fsdp_cases, size))
