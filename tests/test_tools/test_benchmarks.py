"""The benchmark tools: what they measure with, what they write and refuse."""

import json
import math
import os
import statistics
import sys
from collections import Counter

import pytest
import torch
from helpers import TOOLS, load_tool
from torch import nn
from torch.nn import functional as F

from mmrpa.layers import RPAttention
from mmrpa.ops import functional

sys.path.append(str(TOOLS))

from benchmarks import attention, measure, reports  # noqa: E402
from benchmarks.attention import (  # noqa: E402
    Case,
    ChainedProjections,
    PooledAgentAttention,
)

DOCS = TOOLS.parent / 'docs'
CONFIGS = TOOLS.parent / 'configs'
SWIN = CONFIGS / 'mmdet/rp_swin/mask-rcnn_rp-swin-tiny_fpn_1x_coco.py'
PVT = CONFIGS / 'mmdet/rp_pvt/mask-rcnn_rp-pvt-tiny_fpn_1x_coco.py'
DEIT = CONFIGS / 'mmpretrain/rp_deit/rp-deit-tiny_8xb128_in1k.py'
QUICK = ('--rounds', '5', '--min-time', '1e-6')


@pytest.fixture
def small(monkeypatch):
    """Sizes at which the tools take seconds."""
    monkeypatch.setattr(attention, 'COPY_BYTES', 2**20)


def read(path):
    return json.loads(path.read_text())


# Memory.

X = torch.randn(3, 2, 4, requires_grad=True)  # 96 bytes
LINEAR, FROZEN = nn.Linear(4, 5), nn.Linear(4, 5).requires_grad_(False)


def product_of_views(x):
    a, b, _ = torch.cat((x, x, x)).chunk(3)
    return a * b


@pytest.mark.parametrize('function, expected', [
    (LINEAR, 96),  # x, not the weight
    (lambda x: LINEAR(x), 96),
    (FROZEN, 0),
    (lambda x: x + 1, 0),
    (torch.exp, 96),  # its result
    (lambda x: (x.exp().softmax(-1), x.sin()), 3 * 96),
    (product_of_views, 3 * 96),  # views of one storage, once and whole
    (lambda x: x[0] * x[1] * x.detach().sum(), 96 + 4),
], ids=range(8))
def test_bytes_kept_for_backward(function, expected):
    assert measure.kept_for_backward(function, X) == expected


def test_nothing_can_be_kept_without_a_graph():
    with pytest.raises(ValueError, match='no graph'):
        measure.kept_for_backward(torch.exp, X.detach())


# Time and statistics.


class FakeTimer:
    """Calls return their own seconds."""

    def __call__(self, call, count):
        return sum(call() for _ in range(count))


def test_each_round_times_each_peer_once_and_slow_ones_are_left_out():
    calls = []

    def peer(name, seconds):
        return lambda: calls.append(name) or seconds

    steps = {'a': peer('a', 0.1), 'b': peer('b', 0.3), 'c': peer('c', 9.)}
    found = measure.measure(steps, 'a', rounds=6, min_time=0.25, skip_over=1,
                            timer=FakeTimer(), log=lambda line: None)
    assert found.samples_ms == dict(a=[100] * 6, b=[300] * 6)
    assert found.left_out == dict(c='one call took 9 s, limit 1 s')
    assert Counter(calls) == dict(a=2 + 6 * 3, b=2 + 6, c=1)
    # The reference is measured however slow it is.
    found = measure.measure(steps, 'c', rounds=5, min_time=1, skip_over=0.01,
                            timer=FakeTimer(), log=lambda line: None)
    assert list(found.samples_ms) == ['c']


def test_the_order_of_rounds_gives_each_peer_each_place():
    names = ['a', 'b', 'c']
    orders = [measure.round_order(names, i) for i in range(6)]
    assert orders[:3] == [['a', 'b', 'c'], ['c', 'b', 'a'], ['b', 'c', 'a']]
    for name in names:
        assert Counter(order.index(name) for order in orders) == {
            0: 2, 1: 2, 2: 2}


def test_ratios_are_taken_round_by_round():
    # The machine slows down twentyfold; the ratio does not see it.
    samples = {'rp-auto': [1, 2, 4, 8, 30], 'x': [2, 4, 8, 16, 30],
               'rp-naive': [2, 2, 2, 2, 2]}
    found = measure.summarise(samples, 'x')
    assert found['median_ms'] == {'rp-auto': 4, 'x': 8, 'rp-naive': 2}
    assert found['ratios']['rp-auto/x'] == dict(q1=.5, median=.5, q3=.5)
    assert found['ratios']['rp-auto/rp-naive'] == dict(q1=1, median=2, q3=4)
    assert set(found['ratios']) == {'rp-auto/x', 'rp-auto/rp-naive',
                                    'rp-naive/x'}


@pytest.mark.parametrize('sizes, ratios, expected', [
    ([10, 1000], [10, 0.1], [100]),
    ([1, 100, 10000], [4, 0.25, 4], [10, 1000]),
    ([1, 2, 4], [2, 1, 0.5], [2]),
    ([1, 2, 4], [3, 2, 1.5], []),
    ([5], [1], []),
])
def test_crossovers_of_power_laws(sizes, ratios, expected):
    assert measure.crossovers(sizes, ratios) == pytest.approx(expected)


# Peers.


def test_pooled_agents_against_loops():
    heads, side, (h, w), c = 2, 2, (4, 6), 8
    layer = PooledAgentAttention(c, heads, side).double()
    x = torch.randn(1, h * w, c, dtype=torch.float64)
    q, k, v = layer.qkv(x)[0].split(c, dim=-1)
    blocks = q.view(side, h // side, side, w // side, c)
    agents = blocks.mean((1, 3)).flatten(0, 1)
    out = torch.empty(h * w, c, dtype=torch.float64)
    for head in range(heads):
        part = slice(head * c // heads, (head + 1) * c // heads)
        scale = (c // heads)**-0.5
        read = torch.stack([
            (k[:, part] @ agent * scale).softmax(0) @ v[:, part]
            for agent in agents[:, part]])
        for n in range(h * w):
            weights = (agents[:, part] @ q[n, part] * scale).softmax(0)
            out[n, part] = weights @ read
    kernel, grid = layer.dwc.weight, v.view(h, w, c)
    for i, j in ((i, j) for i in range(h) for j in range(w)):
        out[i * w + j] += layer.dwc.bias + sum(
            kernel[:, 0, a + 1, b + 1] * grid[i + a, j + b]
            for a in (-1, 0, 1) for b in (-1, 0, 1)
            if 0 <= i + a < h and 0 <= j + b < w)
    torch.testing.assert_close(layer(x, (h, w))[0], layer.proj(out))


def test_sizes_that_follow_from_a_case():
    ratios = {c: Case(8, 8, c, 16).sr_ratio
              for c in (64, 96, 128, 192, 320, 384, 512, 768)}
    assert list(ratios.values()) == [8, 8, 4, 4, 2, 2, 1, 1]
    assert [Case(8, 8, 32, m).agent_side for m in (1, 2, 16, 17, 64)] == [
        1, 2, 4, 5, 8]


def count(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize('config, own_norms', [(SWIN, 0), (PVT, 2048)])
def test_mmdet_has_as_many_parameters_as_the_twin(config, own_norms):
    """Its PVT has no output norms: two for each of 1024 channels."""
    tool = load_tool('benchmark_backbones')
    cfg = tool.read_backbone(str(config), {})
    built = tool.build_peers(cfg, (64, 64), ['own', 'mmdet'])
    assert count(built['own']) == count(built['mmdet']) + own_norms


@pytest.mark.parametrize('config, difference', [(SWIN, 2880), (DEIT, 0)])
def test_timm_has_as_many_parameters_as_the_twin(config, difference):
    """Its Swin gives maps without norms: two for each of 1440 channels."""
    pytest.importorskip('timm')
    tool = load_tool('benchmark_backbones')
    cfg = tool.read_backbone(str(config), {})
    built = tool.build_peers(cfg, (224, 224), ['own', 'timm'])
    assert count(built['own']) == count(built['timm']) + difference


@pytest.mark.parametrize('config', [SWIN, PVT])
def test_the_bound_is_the_backbone_without_attention(config):
    """Nothing of it is left but qkv and proj, which see one token each."""
    tool = load_tool('benchmark_backbones')
    cfg = tool.read_backbone(str(config), {})
    built = tool.build_peers(cfg, (64, 64), ['rp', 'projections'])
    rp, bound = built['rp'], built['projections']
    removed = sum(count(m) - count(m.qkv) - count(m.proj)
                  for m in rp.modules() if isinstance(m, RPAttention))
    assert removed > 0 and count(bound) == count(rp) - removed
    layer = next(m for m in bound.modules()
                 if isinstance(m, ChainedProjections))
    x = torch.randn(1, 6, layer.qkv.in_features)
    expected = layer.proj(F.linear(x, *(t.chunk(3)[2] for t in (
        layer.qkv.weight, layer.qkv.bias))))
    torch.testing.assert_close(layer(x, (2, 3)), expected)


def test_naive_is_the_same_model():
    tool = load_tool('benchmark_backbones')
    cfg = tool.read_backbone(str(SWIN), {})
    built = tool.build_peers(cfg, (64, 64), ['rp', 'naive'])
    assert {m.impl for m in built['naive'].modules()
            if isinstance(m, RPAttention)} == {'naive'}
    built['naive'].load_state_dict(built['rp'].state_dict())
    images = torch.randn(1, 3, 64, 64)
    for a, b in zip(built['rp'](images), built['naive'](images), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


# The tools as a whole.


def check_records(records, rounds):
    for record in records:
        samples = record['samples_ms']
        assert {len(values) for values in samples.values()} == {rounds}
        for name, values in samples.items():
            assert record['median_ms'][name] == pytest.approx(
                statistics.median(values))
        for key, found in record['ratios'].items():
            a, b = key.split('/')
            ratios = [i / j for i, j in zip(samples[a], samples[b],
                                            strict=True)]
            assert found['median'] == pytest.approx(statistics.median(ratios))
            assert found['q1'] <= found['median'] <= found['q3']


def test_attention_layers_and_operators(small, tmp_path, capsys, monkeypatch):
    tool = load_tool('benchmark_attention')
    monkeypatch.setattr(tool, 'MILLION', 1000)
    out = tmp_path / 'sweep-cpu.json'
    argv = ['--cases', '4x5x32x4', '7x8x32x5', '--batch', '2', '--parts',
            'layer', 'operator', '--impls', 'auto', 'naive', '--million',
            *QUICK, '--out', str(out)]
    assert tool.main(argv) == 0
    assert 'layer 7x8x32x5 train: window: one call' in capsys.readouterr().err
    report = read(out)
    assert report['command'].startswith(
        'python tools/benchmark_attention.py --cases 4x5x32x4 7x8x32x5 ')
    assert report['machine']['torch'] == torch.__version__
    # None in a checkout without git.
    assert report['commit'] == reports.code_version()
    millions, records = report['records'][:2], report['records'][2:]
    assert [m['impl'] for m in millions] == ['auto', 'naive']
    assert all(m['tokens'] == 1000 and m['limit_bytes'] == 8 * 2**30
               and 0 < m['peak_resident_bytes'] for m in millions)
    assert len(records) == 8
    check_records(records, 5)
    layer, operator = records[2], records[6]
    assert layer['part'] == 'layer' and layer['mode'] == 'train'
    assert list(layer['samples_ms']) == [
        'rp-auto', 'rp-naive', 'projections', 'dense', 'sr', 'window', 'agent']
    assert layer['io_bytes'] == 5 * 2 * 20 * 32 * 4
    assert layer['kept_bytes']['projections'] == 2 * 20 * 32 * 4
    assert set(operator['samples_ms']) == {'floor', 'rp-auto', 'rp-naive',
                                           'sdpa'}
    assert operator['floor']['tensors'] == 11
    for ms, speed in zip(operator['samples_ms']['floor'],
                         operator['floor']['copy_gb_per_s'], strict=True):
        assert ms == pytest.approx(11 * 2 * 20 * 32 * 4 / speed / 1e6)
    # The picture of the same file.
    plotter = load_tool('plot_benchmarks')
    assert plotter.main([str(out), '--out', str(tmp_path)]) == 0
    assert 0 < (tmp_path / 'sweep-cpu.png').stat().st_size < 300_000
    assert len(plotter.panels(report)) == 5
    # The page: the same and a file of a name that it does not know.
    page = tmp_path / 'performance.md'
    (tmp_path / 'benchmarks').mkdir()
    out.rename(tmp_path / 'benchmarks' / out.name)
    docs = load_tool('update_performance_docs')
    arguments = ['--docs', str(tmp_path)]
    assert docs.main([*arguments, '--check']) == 1
    assert docs.main(arguments) == 0
    assert docs.main([*arguments, '--check']) == 0
    text = page.read_text()
    assert report['command'] in text
    assert 'not measured on GPU yet' in text
    page.write_text(text.replace('floor', 'ceiling'))
    assert docs.main([*arguments, '--check']) == 1
    (tmp_path / 'benchmarks/other.json').write_text('{}')
    assert docs.main(arguments) == 2
    assert 'other.json' in capsys.readouterr().err


def test_a_slow_peer_is_left_out_and_the_json_says_so(small, tmp_path):
    tool = load_tool('benchmark_attention')
    out = tmp_path / 'a.json'
    argv = ['--cases', '4x4x32x4', '--mode', 'forward', '--skip-over', '1e-7',
            *QUICK, '--peers', 'dense', '--out', str(out)]
    assert tool.main(argv) == 0
    record, = read(out)['records']
    assert list(record['samples_ms']) == ['projections']
    assert 'limit 1e-07 s' in record['left_out']['dense']


def test_backbones(configs, tmp_path, write_config, capsys):
    tool = load_tool('benchmark_backbones')
    config = write_config(configs['mmdet'](tmp_path))
    out = tmp_path / 'b.json'
    argv = [str(config), '--sizes', '32x64', *QUICK, '--out', str(out)]
    assert tool.main([*argv, '--peers', 'rp', 'projections', 'dense',
                      'mmdet']) == 0
    report = read(out)
    check_records(report['records'], 5)
    forward, train = report['records']
    assert set(train['samples_ms']) == {'rp', 'projections', 'own', 'dense',
                                        'mmdet'}
    # The page has the bound, and a place for a second allocator.
    docs = load_tool('update_performance_docs')
    bound = docs.bound_table([train]).splitlines()
    assert bound[0] == '| image | over dense | over mmdet | over own |'
    ratios = [a / b for a, b in zip(train['samples_ms']['projections'],
                                    train['samples_ms']['mmdet'],
                                    strict=True)]
    assert f'{statistics.median(ratios):.2f} (' in bound[2].split('|')[3]
    page = docs.write_page({'backbone-rp-swin-tiny-cpu-glibc': report},
                           tmp_path)
    assert '## Backbone RPSwin-T, CPU, --allocator default\n' in page
    assert docs.bound_table([train]) in page
    assert all(size > 0 for size in train['kept_bytes'].values())
    assert train['case'] == dict(height=32, width=64)
    assert tool.main([*argv, '--peers', 'timm']) == 2
    error, = capsys.readouterr().err.splitlines()[-1:]
    assert 'timm' in error


def test_timm_that_is_not_installed(monkeypatch, capsys):
    tool = load_tool('benchmark_backbones')
    monkeypatch.setattr(tool, 'find_spec', lambda name: None)
    assert tool.main([str(SWIN), '--peers', 'timm']) == 2
    assert 'pip install timm' in capsys.readouterr().err


def test_ctrl_c_leaves_the_old_file(small, tmp_path, monkeypatch, capsys):
    tool = load_tool('benchmark_attention')
    out = tmp_path / 'a.json'
    out.write_text('old')

    def stop(*args):
        raise KeyboardInterrupt

    argv = ['--cases', '4x4x32x4', '--mode', 'forward', *QUICK, '--out',
            str(out)]
    for owner, name in ((measure, 'measure'), (os, 'replace')):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, stop if name == 'replace' else
                          lambda *a, **k: stop())
            assert tool.main(argv) == 130
        assert 'nothing was written' in capsys.readouterr().err
        assert [p.read_text() for p in tmp_path.iterdir()] == ['old']


BAD = [
    (['--peers', 'linear'], "'linear'"),
    (['--rounds', '4'], '--rounds must be at least 5, got 4'),
    (['--out', 'no/folder/a.json'], 'no/folder'),
    (['--device', 'cuda'], 'no GPU'),
    (['--device', 'toaster'], "'toaster'"),
    (['--dtype', 'int8'], "'int8'"),
    (['--mode', 'test'], "'test'"),
    (['--min-time', '0'], '--min-time must be positive, got 0'),
    (['--batch', '0'], '--batch must be at least 1, got 0'),
    (['--flush-l2'], '--flush-l2'),
]
BAD_ATTENTION = [
    (['--cases', '56x56x96'], "'56x56x96'"),
    (['--cases', '0x56x96x16'], "'0x56x96x16'"),
    (['--cases', '8x8x40x4'], '8x8x40x4'),
    (['--cases', '8x8x32x4', '--sweep'], '--sweep'),
    (['--impls', 'quick'], "'quick'"),
    (['--impls', 'triton'], 'triton'),
    (['--parts', 'all'], "'all'"),
]
BAD_BACKBONES = [
    (['--sizes', '224'], "'224'"),
    (['--cfg-options', 'model.backbone.type=ResNet'], 'ResNet'),
    (['--cfg-options', 'model.backbone.arch=giant'], "'giant'"),
]


@pytest.mark.parametrize('name, argv, said', [
    *(('attention', *bad) for bad in BAD + BAD_ATTENTION),
    *(('backbones', [str(SWIN), '--peers', 'rp', *argv], said)
      for argv, said in BAD + BAD_BACKBONES),
    ('backbones', ['no.py', '--peers', 'rp'], 'no.py'),
    ('backbones', [str(PVT), '--peers', 'timm'], 'timm'),
])
def test_bad_arguments_are_named_before_anything_is_measured(
        name, argv, said, monkeypatch, capsys):
    tool = load_tool(f'benchmark_{name}')
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    # Users have no interpreter; these tests run in a process that has.
    monkeypatch.setattr(functional, '_interpreting', lambda: False)
    monkeypatch.setattr(measure, 'Timer', None)
    assert tool.main(argv) == 2
    error, = capsys.readouterr().err.splitlines()
    assert error.startswith(f'benchmark_{name}: ') and said in error


# The page.


def test_where_rp_is_slower_and_where_the_curves_cross():
    docs = load_tool('update_performance_docs')

    def record(tokens, **medians):
        return dict(
            part='layer', mode='forward',
            case=dict(tokens=tokens, channels=96, representatives=16),
            ratios={f'rp-auto/{peer}': dict(q1=r - 0.1, median=r, q3=r + 0.1)
                    for peer, r in medians.items()})

    records = [record(10, projections=9, dense=10, sr=0.5),
               record(1000, projections=2, dense=0.1, sr=0.9)]
    report = dict(settings=dict(impls=['auto']), records=records)
    rows = docs.slower({'attention-cpu': report}).splitlines()[2:]
    assert rows == ['| attention-cpu | layer | forward | 10, 96, 16 | dense | '
                    '10.00 (9.90 to 10.10) |']
    assert docs.show_crossovers(records, 'rp-auto') == (
        'The ratio crosses 1: dense at N = 100.')
    assert math.isclose(docs.find_crossovers(records, 'rp-auto')['dense'][0],
                        100)


def test_the_page_is_that_of_the_committed_measurements():
    page = DOCS / 'performance.md'
    if not list(DOCS.glob('benchmarks/*.json')):
        assert not page.exists()
        return
    assert load_tool('update_performance_docs').main(['--check']) == 0
