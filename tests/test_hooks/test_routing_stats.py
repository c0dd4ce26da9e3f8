"""RoutingStatsHook: right numbers, in all logs, and no other effect."""

import json
import math
import re

import pytest
import torch
from mmengine.logging import MMLogger
from mmengine.model import BaseModel
from mmengine.registry import HOOKS as MMENGINE_HOOKS
from mmengine.runner import Runner
from torch.utils.data import Dataset

from mmrpa.backbones import RPPVT
from mmrpa.hooks import RoutingStatsHook
from mmrpa.hooks.routing_stats import _stage_of, routing_stats
from mmrpa.layers import RPAttention
from mmrpa.registry import MODELS

FIELDS = ('occupied', 'entropy', 'dead', 'max_mass')
ARCH = dict(embed_dims=(8, 16), depths=(1, 2), num_heads=(1, 2),
            mlp_ratios=2)


class _Noise(Dataset):
    METAINFO = dict()

    def __len__(self):
        return 6

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        return dict(inputs=torch.randn(3, 32, 48, generator=generator))


@MODELS.register_module()
class _Toy(BaseModel):
    """A backbone with a dropout, so that stolen random numbers would show."""

    def __init__(self, amp=False, **options):
        super().__init__()
        self.amp = amp
        self.backbone = RPPVT(ARCH, num_representatives=(4, 8), img_size=48,
                              out_indices=(0, 1), drop_rate=0.1, **options)

    def forward(self, inputs, mode='loss'):
        with torch.autocast('cpu', torch.bfloat16, enabled=self.amp):
            maps = self.backbone(torch.stack(inputs))
        return dict(loss=sum(m.square().mean() for m in maps))


def _train(work_dir, hooks, backends=(), iters=4, **options):
    """Train a toy; returns its losses and its runner."""
    torch.manual_seed(0)
    losses = []
    runner = Runner(
        model=dict(type='mmrpa._Toy', **options),
        work_dir=str(work_dir),
        train_dataloader=dict(
            dataset=_Noise(), batch_size=2, num_workers=0,
            sampler=dict(type='DefaultSampler', shuffle=False)),
        train_cfg=dict(type='IterBasedTrainLoop', max_iters=iters),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.1)),
        custom_hooks=hooks,
        visualizer=dict(type='Visualizer', vis_backends=list(backends),
                        name=str(work_dir)),
        log_processor=dict(by_epoch=False),
        default_scope='mmengine',
        randomness=dict(seed=0),
        experiment_name=re.sub(r'\W', '_', str(work_dir)))
    step = runner.model.train_step

    def train_step(*args, **kwargs):
        out = step(*args, **kwargs)
        losses.append(out['loss'].item())
        return out

    runner.model.train_step = train_step
    runner.train()
    return losses, runner


@pytest.fixture
def log(monkeypatch):
    """What runners write to the console."""
    lines = []
    info = MMLogger.info
    monkeypatch.setattr(
        MMLogger, 'info', lambda self, text, *args, **kwargs:
        (lines.append(str(text)), info(self, text, *args, **kwargs))[1])
    return lines


def _naive(p, dead_below):
    """The four numbers of P (B, h, M, N), by loops."""
    batch, heads, num, tokens = p.shape
    occupied, entropy, dead, largest = [], [], [], []
    for h in range(heads):
        for b in range(batch):
            share = [p[b, h, m].sum().item() / tokens for m in range(num)]
            occupied.append(math.exp(-sum(
                s * math.log(s) for s in share if s > 0)))
            for n in range(tokens):
                entropy.append(-sum(
                    v * math.log(v) for v in p[b, h, :, n].tolist() if v > 0
                ) / math.log(num))
        total = [p[:, h, m].sum().item() / (batch * tokens)
                 for m in range(num)]
        dead.append(sum(s < dead_below / num for s in total))
        largest.append(max(total))
    return [sum(v) / len(v) for v in (occupied, entropy, dead, largest)]


def test_stats_are_those_of_loops():
    p = (3 * torch.randn(2, 3, 5, 7, dtype=torch.float64)).softmax(2)
    p[:, :, 4] *= 1e-4
    p = p / p.sum(2, keepdim=True)
    expected = _naive(p, 0.02)
    assert expected[2] > 0
    torch.testing.assert_close(
        routing_stats(p, 0.02), torch.tensor(expected, dtype=torch.float64))
    # Any scale of the representatives' sum, as routing over tokens has it.
    torch.testing.assert_close(
        routing_stats(p * torch.rand(2, 3, 1, 7), 0.02),
        routing_stats(p, 0.02))


def test_stats_of_known_routings():
    even = torch.full((1, 2, 8, 5), 1 / 8)
    assert routing_stats(even).tolist() == pytest.approx([8, 1, 0, 1 / 8])
    one = torch.zeros(1, 2, 8, 5)
    one[:, :, 3] = 1
    assert routing_stats(one).tolist() == pytest.approx([1, 0, 7, 1])
    assert routing_stats(torch.ones(1, 1, 1, 5)).tolist() == [1, 0, 0, 1]


def test_every_token_is_looked_at_where_they_are_few():
    layer = RPAttention(8, 2, 4)
    x = torch.randn(3, 1 + 15, 8)
    hook = RoutingStatsHook(num_images=2, num_tokens=15)
    p = layer.routing_map(x[:2], (3, 5)).flatten(3)  # without the CLS token
    torch.testing.assert_close(hook._look(layer, x, (3, 5)),
                               routing_stats(p.detach()))
    as_map = x[:, 1:].transpose(1, 2).unflatten(-1, (3, 5))
    torch.testing.assert_close(hook._look(layer, as_map),
                               routing_stats(p.detach()))


def test_a_sample_of_tokens_is_close_to_all():
    layer = RPAttention(8, 2, 4)
    rows = torch.linspace(-2, 2, 64)[:, None, None]
    cols = torch.linspace(-2, 2, 64)[None, :, None]
    x = (rows * torch.randn(8) + cols * torch.randn(8)).flatten(0, 1)[None]
    all_of_them = RoutingStatsHook(num_tokens=4096)._look(layer, x, (64, 64))
    some = RoutingStatsHook(num_tokens=256)._look(layer, x, (64, 64))
    torch.testing.assert_close(some, all_of_them, rtol=0.02, atol=0.005)


@pytest.mark.parametrize('options', [
    dict(),
    dict(with_cp=True),
    dict(amp=True),
    dict(attention=['sr', 'rp']),
], ids=str)
def test_training_is_not_changed(options, tmp_path, log):
    plain, _ = _train(tmp_path / 'plain', [], **options)
    hook = [dict(type='mmrpa.RoutingStatsHook', interval=2)]
    hooked, runner = _train(tmp_path / 'hooked', hook, **options)
    assert hooked == plain  # to the last bit
    assert len(hooked) == 4
    reports = [text for text in log if text.startswith('routing')]
    assert len(reports) == 2
    rows = reports[0].splitlines()[1:]
    first = 2 if 'attention' in options else 1
    assert [row.split()[0] for row in rows] == [
        f'stage{i}' for i in range(first, 3)]
    for module in runner.model.modules():
        assert not module._forward_pre_hooks


def test_what_is_logged_is_what_the_layers_compute(tmp_path, log):
    _, runner = _train(
        tmp_path / 'run', [dict(type='mmrpa.RoutingStatsHook', interval=3)],
        backends=[dict(type='LocalVisBackend'),
                  dict(type='TensorboardVisBackend')], iters=3)
    # The third batch, before the update that it led to: train two steps only.
    _, before = _train(tmp_path / 'before', [], iters=2)
    from mmrpa.visualization import record_inputs
    data = [_Noise()[i]['inputs'] for i in (4, 5)]
    torch.manual_seed(0)
    before.model.train()
    with record_inputs(before.model) as inputs, torch.no_grad():
        before.model(data)
    # Dropout differs, so only the first layer, which has none before it.
    name = 'backbone.stages.0.blocks.0.attn'
    p = before.model.get_submodule(name).routing_map(*inputs[name])
    expected = dict(zip(FIELDS, routing_stats(p.detach().flatten(3)).tolist(),
                        strict=True))
    path, = (tmp_path / 'run').glob('*/vis_data/scalars.json')
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    found, = (line for line in lines if 'routing/stage1/occupied' in line)
    assert found['step'] == 3
    assert set(found) == {'step'} | {
        f'routing/stage{i}/{field}' for i in (1, 2) for field in FIELDS}
    for field, value in expected.items():
        assert found[f'routing/stage1/{field}'] == pytest.approx(
            value, rel=1e-4), field
    row = next(text for text in log if text.startswith('routing'))
    assert re.search(
        rf'stage1 +{expected["occupied"]:.1f} of 4 +'
        rf'{expected["entropy"]:.3f} +{expected["dead"]:.1f} +'
        rf'{expected["max_mass"]:.3f}\n', row)
    from tensorboard.backend.event_processing.event_accumulator import (
        EventAccumulator,
    )
    board = EventAccumulator(str(path.parent))
    board.Reload()
    for field, value in expected.items():
        event, = board.Scalars(f'routing/stage1/{field}')
        assert event.step == 3
        assert event.value == pytest.approx(value, rel=1e-4)


def test_every_host_finds_it_by_name():
    for host in ('mmdet', 'mmseg', 'mmpretrain'):
        registry = __import__(f'{host}.registry', fromlist=['HOOKS']).HOOKS
        hook = registry.build(dict(type='mmrpa.RoutingStatsHook', interval=7))
        assert type(hook) is RoutingStatsHook and hook.interval == 7
    assert MMENGINE_HOOKS.get('mmrpa.RoutingStatsHook') is RoutingStatsHook


def test_stages_of_several_backbones_are_kept_apart():
    one = ['backbone.stages.0.blocks.0.attn', 'neck.attn']
    assert [_stage_of(name, one) for name in one] == ['stage1', 'neck.attn']
    two = [f'{who}.backbone.stages.2.blocks.5.attn' for who in
           ('teacher', 'student')]
    assert [_stage_of(name, two) for name in two] == [
        'teacher.backbone.stage3', 'student.backbone.stage3']


@pytest.mark.parametrize('options, message', [
    (dict(interval=0), 'interval .* at least 1, got 0'),
    (dict(num_images=1.5), 'num_images .* got 1.5'),
    (dict(num_tokens=-3), 'num_tokens'),
    (dict(dead_below=1.), 'dead_below .* between 0 and 1'),
])
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        RoutingStatsHook(**options)


def test_a_model_without_representatives_is_an_error(tmp_path):
    with pytest.raises(ValueError, match='no RPAttention layer in the model'):
        _train(tmp_path, [dict(type='mmrpa.RoutingStatsHook')],
               attention='sr')
