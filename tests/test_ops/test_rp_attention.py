"""The properties of docs/method.md, with each implementation."""

import pytest
import torch
from operands import IMPLS, make_inputs, place, run

from mmrpa.ops import gather, interact, rp_attention


@pytest.mark.parametrize('impl', IMPLS)
def test_permuting_tokens_permutes_the_output(impl):
    tensors = place(make_inputs(batch=1, n=19, d=16), impl)
    order = torch.randperm(19)
    out = rp_attention(**tensors, impl=impl)
    for name in 'qkv':
        tensors[name] = tensors[name][:, :, order]
    permuted = rp_attention(**tensors, impl=impl)
    torch.testing.assert_close(permuted, out[:, :, order])


@pytest.mark.parametrize('impl', IMPLS)
def test_duplicating_keys_and_values_changes_nothing(impl):
    tensors = place(make_inputs(batch=1, n=11, d=16), impl)
    out = rp_attention(**tensors, impl=impl)
    for name in 'qkv':
        tensors[name] = torch.cat((tensors[name], ) * 2, dim=2)
    twice = rp_attention(**tensors, impl=impl)
    torch.testing.assert_close(twice, torch.cat((out, out), dim=2))


def test_duplicating_tokens_keeps_the_representatives():
    _, k, v, anchors, _ = make_inputs(n=11).values()
    once = gather(k, v, anchors)
    twice = gather(
        torch.cat((k, k), dim=2), torch.cat((v, v), dim=2), anchors)
    for a, b in zip(once, twice, strict=True):
        torch.testing.assert_close(a, b)
    doubled = gather(
        torch.cat((k, k), dim=2), torch.cat((v, v), dim=2), anchors,
        reduction='sum')
    summed = gather(k, v, anchors, reduction='sum')
    for a, b in zip(summed, doubled, strict=True):
        torch.testing.assert_close(2 * a, b)


def test_one_hot_routing_gathers_every_token_unchanged():
    n = 6
    k = torch.eye(n).double().expand(1, 2, n, n)
    v = torch.randn(1, 2, n, n).double()
    anchors = 1000 * torch.eye(n).double().expand(2, n, n)
    k_rep, z = gather(k, v, anchors)
    torch.testing.assert_close(k_rep, k)
    torch.testing.assert_close(z, v)


def test_identical_representatives_interact_as_a_linear_map():
    z = torch.randn(2, 3, 1, 4).double().expand(2, 3, 5, 4)
    weight = torch.randn(3, 3, 4, 4).double()
    torch.testing.assert_close(
        interact(z, weight), torch.einsum('bhmd,hde->bhme', z, weight[2]))


@pytest.mark.parametrize('impl', IMPLS)
@pytest.mark.parametrize('interact_residual', [False, True])
def test_dead_representative_gives_zeros_and_finite_gradients(
        impl, interact_residual):
    tensors = make_inputs(batch=1, n=9, m=2, d=16, dtype=torch.float32)
    tensors['k'].abs_()
    # exp(-400 * sum(k)) is 0 in float32, so nothing reaches the second one.
    tensors['anchors'] = torch.stack(
        (torch.ones(2, 16), torch.full((2, 16), -400.)), 1)
    k_rep, z = gather(tensors['k'], tensors['v'], tensors['anchors'])
    assert k_rep[:, :, 1].abs().max() == 0 and z[:, :, 1].abs().max() == 0
    tensors = {name: t.float() for name, t in place(tensors, impl).items()}
    results, expected = (
        run(rp_attention, tensors, torch.ones_like(tensors['q']), impl=i,
            interact_residual=interact_residual) for i in (impl, 'naive'))
    for name, t in results.items():
        assert t.isfinite().all(), name
        torch.testing.assert_close(t, expected[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16])
def test_a_million_tokens_on_one_representative_do_not_overflow(dtype):
    n, d = 10**6, 4
    k = torch.ones(1, 1, n, d, dtype=dtype)
    v = torch.full((1, 1, n, d), 3., dtype=dtype)
    anchors = torch.tensor([[[9.] * d, [-9.] * d]], dtype=dtype)
    weight = torch.eye(d, dtype=dtype).expand(3, 1, d, d)
    k_rep, z = gather(k.float(), v.float(), anchors.float())
    torch.testing.assert_close(k_rep[0, 0, 0], torch.ones(d))
    torch.testing.assert_close(z[0, 0, 0], torch.full((d, ), 3.))
    out = rp_attention(k, k, v, anchors, weight)
    assert out.isfinite().all()
