"""Mixed precision on the CPU: the wrapper, its scale, mmcv's operators."""

import copy

import pytest
import torch
from mmengine.optim import build_optim_wrapper
from torch import nn
from torch.optim import SGD

from mmrpa.optim import CPUAmpOptimWrapper

DTYPES = [torch.bfloat16, torch.float16]


def wrapper(model, lr=0.5, **options):
    return CPUAmpOptimWrapper(
        **dict(dict(optimizer=SGD(model.parameters(), lr=lr)), **options))


def step(optim, model, x):
    with optim.optim_context(model):
        loss = model(x).float().square().mean()
    optim.update_params(loss)
    return loss


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('loss_scale', ['dynamic', 8.])
def test_step_is_that_of_rounded_numbers(dtype, loss_scale):
    """y = W x in half precision, gradient and step written out in float64."""
    model, x = nn.Linear(8, 4, bias=False), torch.randn(16, 8)
    before = model.weight.detach().clone()
    optim = wrapper(model, dtype=dtype, loss_scale=loss_scale,
                    clip_grad=dict(max_norm=0.1))
    loss = step(optim, model, x)
    w, z = before.to(dtype).double(), x.to(dtype).double()
    y = (z @ w.T).to(dtype).double()
    grad = 2 * y.T @ z / y.numel()
    grad *= 0.1 / grad.norm()
    eps = torch.finfo(dtype).eps
    assert loss.item() == pytest.approx(y.square().mean().item(), rel=eps)
    moved = (before - model.weight.detach()).double()
    assert (moved - 0.5 * grad).norm() <= 2 * eps * moved.norm()
    # Not float32: the rounding has to be there.
    assert (loss.item() - (x.double() @ before.double().T).square().mean()
            ).abs() > 1e-6


def test_overflow_skips_the_step_and_halves_the_scale():
    model = nn.Linear(4, 4)
    optim = wrapper(model, dtype='float16', loss_scale=dict(init_scale=2.**16))
    before = copy.deepcopy(model.state_dict())
    step(optim, model, torch.full((2, 4), 6e4))
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert optim.loss_scaler.get_scale() == 2.**15
    step(optim, model, torch.ones(2, 4))
    assert not torch.equal(model.weight, before['weight'])


def test_scale_is_saved_and_loaded():
    model = nn.Linear(4, 4)
    saved = wrapper(model, dtype='float16', loss_scale=4.).state_dict()
    other = wrapper(model, dtype='float16')
    other.load_state_dict(saved)
    assert other.loss_scaler.get_scale() == 4
    # Runs in float32 or bfloat16 go on from it, and it from them.
    plain = wrapper(model, dtype='bfloat16')
    plain.load_state_dict(saved)
    assert not plain.loss_scaler.is_enabled()
    other.load_state_dict(plain.state_dict())
    assert other.loss_scaler.get_scale() == 4


def test_from_a_config_by_name():
    optim = build_optim_wrapper(
        nn.Linear(2, 2),
        dict(type='mmrpa.CPUAmpOptimWrapper', dtype='float16',
             optimizer=dict(type='SGD', lr=1.)))
    assert optim.cast_dtype == torch.float16


@pytest.mark.parametrize(('options', 'error', 'message'), [
    (dict(dtype='float64'), ValueError, "dtype must be one of .*'float64'"),
    (dict(dtype=16), TypeError, 'dtype must be a string'),
    (dict(loss_scale='static'), TypeError, "loss_scale must .*'static'"),
    (dict(loss_scale=True), TypeError, 'loss_scale must .*True'),
    (dict(loss_scale=dict(foo=1)), TypeError, 'loss_scale=.*foo'),
    (dict(optimizer=None), TypeError, 'optimizer must be one of torch.optim'),
    (dict(loss_scale=-1), ValueError, 'loss_scale must be above 0, got -1'),
    (dict(loss_scale=float('nan')), ValueError, 'above 0, got nan'),
])
def test_refusals(options, error, message):
    with pytest.raises(error, match=message):
        wrapper(nn.Linear(2, 2), **options)


@pytest.mark.parametrize('dtype', DTYPES)
def test_mmcv_operators_take_half_on_the_cpu(dtype):
    ops = pytest.importorskip('mmcv.ops')
    wrapper(nn.Linear(2, 2))
    boxes = torch.tensor([[0., 0, 8, 8], [0, 0, 8, 7], [4, 4, 12, 12]])
    scores = torch.tensor([0.5, 0.75, 0.25])
    dets, kept = ops.nms(boxes.to(dtype), scores.to(dtype), 0.5)
    assert kept.tolist() == [1, 2]
    assert dets.dtype == dtype
    maps = torch.randn(1, 4, 16, 16).to(dtype)
    rois = torch.tensor([[0., 1, 1, 9, 13]])
    grad = torch.randn(1, 4, 3, 3).to(dtype)
    results = []
    for cast in (dtype, torch.float32):
        leaf = maps.to(cast).detach().requires_grad_()
        out = ops.RoIAlign(3)(leaf, rois.to(cast))
        out.backward(grad.to(cast))
        assert out.dtype == leaf.grad.dtype == cast
        results.append((out.detach(), leaf.grad))
    for half, exact in zip(*results, strict=True):
        assert torch.equal(half, exact.to(dtype))
