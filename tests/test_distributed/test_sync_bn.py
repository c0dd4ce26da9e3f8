"""What can be said of SyncBN without a GPU: it is BN in all but training."""

import pytest
import torch
from mmengine.model import convert_sync_batchnorm, revert_sync_batchnorm
from parallel_steps import share
from zoo import SMALL, build

BN, SYNC = (dict(norm_cfg=dict(type=t)) for t in ('BN', 'SyncBN'))


def trained_bn(family: str) -> torch.nn.Module:
    """A backbone with BN whose statistics are those of some images."""
    model = build(family, **BN)
    for _ in range(3):
        model(share(0, 0, 1))
    return model.eval()


def norms(model: torch.nn.Module) -> set[type]:
    return {type(getattr(model, f'norm{i}').norm) for i in model.out_indices}


@pytest.mark.parametrize('family', SMALL)
@pytest.mark.parametrize('made', ['built', 'by-torch', 'by-mmengine'])
def test_sync_bn_is_bn_with_the_same_weights(family, made):
    bn = trained_bn(family)
    expected = [m.detach() for m in bn(share(1, 0, 1))]
    if made == 'built':
        sync = build(family, **SYNC).eval()
        sync.load_state_dict(bn.state_dict(), strict=True)
    elif made == 'by-torch':
        sync = torch.nn.SyncBatchNorm.convert_sync_batchnorm(bn)
    else:
        sync = convert_sync_batchnorm(bn, 'torch')
    assert norms(sync) == {torch.nn.SyncBatchNorm}
    assert sync.train() is sync and not sync.eval().norm0.training
    for a, b in zip(sync(share(1, 0, 1)), expected, strict=True):
        assert torch.equal(a, b)
    # Statistics count: fresh ones give other maps.
    fresh = build(family, **SYNC).eval()
    weights = {k: v for k, v in sync.state_dict().items()
               if 'running_' not in k and 'num_batches' not in k}
    fresh.load_state_dict(weights, strict=False)
    assert not torch.allclose(fresh(share(1, 0, 1))[0], expected[0], atol=0.1)
    # One process trains it as mmengine's Runner makes it: without GPUs too.
    single = revert_sync_batchnorm(sync).train()
    for m in single(share(1, 0, 1)):
        mean = m.mean(dim=(0, 2, 3))
        assert mean.abs().max() < 1e-5


@pytest.mark.parametrize('family', SMALL)
def test_frozen_stages_keep_synchronised_statistics(family):
    model = build(family, **SYNC, frozen_stages=2).train()
    frozen = [getattr(model, f'norm{i}').norm for i in range(2)]
    assert not any(norm.training for norm in frozen)  # uses what it has
    assert model.norm2.norm.training
