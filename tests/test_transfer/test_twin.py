"""What the twins share, and what has to be fitted."""

import numpy as np
import pytest
import torch
from zoo import attentions, build

from mmrpa.layers import SpatialReductionAttention
from mmrpa.transfer import (
    attention_pairs,
    calibrate,
    carry_twin,
    fit_reduced_kv,
    start_student,
)
from mmrpa.transfer.reduction import RIDGE

FAMILIES = ['deit', 'pvt', 'swin', 'cswin']


def randomised(module):
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return module.eval()


def twins(family, **student):
    return (randomised(build(family, attention=attentions(family)[-1])),
            build(family, **student).eval())


@pytest.mark.parametrize('family', FAMILIES)
def test_projections_and_all_outside_of_attention(family):
    teacher, student = twins(family)
    carried = carry_twin(teacher, student)
    own, given = student.state_dict(), teacher.state_dict()
    for key in own:
        if '.attn.' not in key:
            assert torch.equal(own[key], given[key]), key
            assert key in carried.shared
    x = torch.randn(2, 12, 16)
    for name, source, target in attention_pairs(teacher, student):
        x = torch.randn(2, 12, source.embed_dims)
        if isinstance(source, SpatialReductionAttention):
            expected = torch.cat((source.q(x), source.kv(x)), -1)
        else:
            expected = source.qkv(x)
        torch.testing.assert_close(target.qkv(x), expected)
        torch.testing.assert_close(target.proj(x), source.proj(x))
        assert f'{name}.anchors' in carried.new
    gone = dict(deit=(), pvt=('sr', 'norm'), swin=('relative_position', ),
                cswin=())[family]
    assert {key.split('.attn.')[1].split('.')[0].split('_bias')[0]
            for key in carried.left_out} == set(gone)
    assert set(carried.shared) | set(carried.new) == set(own)


@pytest.mark.parametrize('kernel', [0, 1, 3, 5])
def test_lepe_becomes_the_convolution(kernel):
    teacher, student = twins('cswin', rp_cfg=dict(dwc_kernel_size=kernel))
    carried = carry_twin(teacher, student)
    for name, source, target in attention_pairs(teacher, student):
        if kernel < 3:
            assert any('lepe' in key and key.startswith(name)
                       for key in carried.left_out)
            continue
        v = torch.randn(1, source.embed_dims, 5, 6)
        parts = v.chunk(len(source.lepe), dim=1)
        outs = []
        for i, (conv, part) in enumerate(zip(source.lepe, parts,
                                             strict=True)):
            weight, width = conv.weight.clone(), source.split_size
            for tap in (-1, 1) if width else ():
                inside = sum(0 <= cell + tap < width
                             for cell in range(width)) / width
                weight[..., :, 1 + tap] *= inside if i == 0 else 1
                weight[..., 1 + tap, :] *= inside if i == 1 else 1
            outs.append(torch.nn.functional.conv2d(
                part, weight, conv.bias, padding=1, groups=len(weight)))
        torch.testing.assert_close(target.dwc(v), torch.cat(outs, dim=1))


def test_a_dense_twin_with_its_attention_kept_is_the_teacher():
    teacher = randomised(build('swin', attention='window'))
    student = build('swin', attention=['rp', 'window', 'window',
                                       'window']).eval()
    carry_twin(teacher, student)
    assert len(attention_pairs(teacher, student)) == 1
    student.stages[0] = teacher.stages[0]
    images = torch.randn(1, 3, 32, 48)
    with torch.no_grad():
        for a, b in zip(student(images), teacher(images), strict=True):
            assert torch.equal(a, b)


def test_no_twins():
    with pytest.raises(ValueError, match='one backbone but for attention'):
        carry_twin(build('deit'), build('pvt'))
    with pytest.raises(ValueError, match='same attention in all layers'):
        carry_twin(build('pvt'), build('pvt'))


def test_reduced_kv_is_the_ridge_regression():
    teacher, student = twins('pvt')
    carry_twin(teacher, student)
    images = torch.randn(3, 3, 64, 96)
    seen = {}
    layer = teacher.stages[1].blocks[1].attn  # sr_ratio 4 on 8 x 12
    layer.register_forward_pre_hook(
        lambda module, args: seen.update(x=args[0]))
    layer.norm.register_forward_hook(
        lambda module, args, out: seen.update(cells=out))
    rest = fit_reduced_kv(teacher, student, images)
    assert set(rest) == {
        name for name, source, _ in attention_pairs(teacher, student)
        if source.sr_ratio > 1
    }
    # Independently: least squares in NumPy, the penalty as rows of data.
    means = seen['x'].detach().unflatten(1, (2, 4, 3, 4)).mean((2, 4))
    means = means.flatten(0, 2).double().numpy()
    wanted = layer.kv(seen['cells']).detach().flatten(0, 1).double().numpy()
    center = means.mean(0)
    n, channels = means.shape
    penalty = RIDGE * means.var(0).mean() * n
    rows = np.concatenate(
        (means - center, np.sqrt(penalty) * np.eye(channels)))
    targets = np.concatenate(
        (wanted - wanted.mean(0), np.zeros((channels, wanted.shape[1]))))
    weight = np.linalg.lstsq(rows, targets, rcond=None)[0]
    target = student.stages[1].blocks[1].attn.qkv
    np.testing.assert_allclose(
        target.weight[channels:].detach().T, weight, rtol=1e-3, atol=1e-5)
    fitted = (means - center) @ weight + wanted.mean(0)
    np.testing.assert_allclose(
        (torch.from_numpy(means).float() @ target.weight[channels:].T +
         target.bias[channels:]).detach(), fitted, rtol=1e-3, atol=1e-4)
    unexplained = ((wanted - fitted)**2).sum() / (
        (wanted - wanted.mean(0))**2).sum()
    assert rest['stages.1.blocks.1.attn'] == pytest.approx(unexplained,
                                                           rel=1e-3)
    # The queries are the teacher's own.
    torch.testing.assert_close(target.weight[:channels], layer.q.weight)


@pytest.mark.parametrize('family', FAMILIES)
def test_start_student(family):
    teacher, student = twins(family)
    by_hand = build(family).eval()
    images = torch.randn(4, 3, 64, 64)
    lines = []
    start_student(teacher, student, images, log=lines.append)
    carry_twin(teacher, by_hand)
    fit_reduced_kv(teacher, by_hand, images)
    # Windows of 3 on maps of 16, 8, 4, and 2 cells a side.
    starts = dict(
        cswin=dict.fromkeys(range(4), 'keep'),
        swin={0: 'average', 1: 'average', 2: 'average', 3: 'zero'})
    calibrate(by_hand, images, dwc={
        name: starts.get(family, {}).get(int(name.split('.')[1]), 'zero')
        for name, *_ in attention_pairs(teacher, by_hand)})
    for key, value in by_hand.state_dict().items():
        assert torch.equal(value, student.state_dict()[key]), key
    assert sum('anchors from' in line for line in lines) == len(
        attention_pairs(teacher, student))
    assert any('K and V fitted' in line for line in lines) == (
        family == 'pvt')
