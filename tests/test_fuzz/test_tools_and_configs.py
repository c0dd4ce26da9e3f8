"""Fuzzed entry points around the backbones: swaps, hooks, weights, transfer,
optimiser settings, and the command lines of the tools."""

import contextlib
import io
import json
import string
import tempfile
from pathlib import Path

import fuzz
import pytest
import torch
from fuzz import ODD, attempt, mutated, odd_tensors, tensors
from helpers import TOOLS, load_tool
from hypothesis import strategies as st
from zoo import build

from mmrpa.hooks import RoutingStatsHook
from mmrpa.optim import CPUAmpOptimWrapper, LayerDecayOptimWrapperConstructor
from mmrpa.swap import SwapError, swap_backbone
from mmrpa.transfer import (
    calibrate,
    carry_twin,
    fit_reduced_kv,
    start_student,
)
from mmrpa.weights import (
    CheckpointError,
    ConversionError,
    build_arch,
    convert,
    read_checkpoint,
    write_checkpoint,
)

BACKBONES = {(family, attention): build(family, attention=attention)
             for family, attention in (('pvt', 'rp'), ('pvt', 'sr'),
                                       ('swin', 'rp'), ('swin', 'window'))}
MODULES = st.sampled_from([*BACKBONES.values(), torch.nn.Linear(2, 2)])
IMAGES = tensors(2, 3, 64, 64, dtype=torch.float32)
ODD_PARTS = st.one_of(ODD, MODULES, odd_tensors())


# What is read, in a folder that goes with this process.
TEMPORARY = tempfile.TemporaryDirectory()
FOLDER = TEMPORARY.name
SUFFIXES = ('.pth', '.pt', '.safetensors')
WRITTEN = [f'{FOLDER}/written{suffix}' for suffix in SUFFIXES]
STATE = {'a.weight': torch.arange(6.).view(2, 3), 'a.bias': torch.ones(2)}
META = dict(version='1', nested=dict(a=[1, None]))
for _path in WRITTEN:
    write_checkpoint(_path, STATE, META)
JSON = st.one_of(st.none(), st.booleans(), st.integers(-9, 9),
                 st.text(max_size=3), st.lists(st.integers(), max_size=2))


def fresh(family, attention):
    return st.builds(build, st.just(family), attention=st.just(attention))


CALLS = {
    'hook': (RoutingStatsHook, dict(
        interval=st.integers(1, 9), num_images=st.integers(1, 9),
        num_tokens=st.integers(1, 9), dead_below=st.floats(0.01, 0.9)), ODD),
    'calibrate': (calibrate, dict(
        backbone=fresh('pvt', 'rp'), images=IMAGES,
        dwc=st.sampled_from(['zero', 'average', 'keep']),
        entropy=st.floats(0.3, 0.9), seed=st.integers(0, 9)), ODD_PARTS),
    'carry': (carry_twin, dict(
        teacher=fresh('pvt', 'sr'), student=fresh('pvt', 'rp')), ODD_PARTS),
    'reduce': (fit_reduced_kv, dict(
        teacher=fresh('pvt', 'sr'), student=fresh('pvt', 'rp'),
        images=IMAGES), ODD_PARTS),
    'start': (start_student, dict(
        teacher=fresh('pvt', 'sr'), student=fresh('pvt', 'rp'),
        images=IMAGES, dwc=st.sampled_from([None, 'zero']),
        carry=st.booleans(), seed=st.integers(0, 9),
        log=st.just(lambda line: None)), ODD_PARTS),
    'layer decay': (LayerDecayOptimWrapperConstructor, dict(
        optim_wrapper_cfg=st.sampled_from([
            dict(optimizer=dict(type='SGD', lr=0.1)), dict(),
            dict(optimizer=3)]),
        paramwise_cfg=st.fixed_dictionaries(
            dict(layer_decay_rate=st.one_of(st.floats(0.1, 1), ODD)),
            optional=dict(custom_keys=ODD, norm_decay_mult=ODD, foo=ODD))),
        ODD),
    'amp': (CPUAmpOptimWrapper, dict(
        optimizer=st.just(torch.optim.SGD([torch.ones(1)], lr=1.)),
        loss_scale=st.one_of(st.just('dynamic'), st.floats(1, 9)),
        dtype=st.sampled_from([None, 'float16', torch.bfloat16])), ODD),
    'arch': (build_arch, dict(name=st.just('rp_deit_tiny')), st.one_of(
        ODD, st.sampled_from(['rp_swin', 'tiny']))),
    'convert': (convert, dict(
        state_dict=st.sampled_from([
            b.state_dict() for b in BACKBONES.values()] + [
                {}, {'a': torch.ones(2)}]),
        backbone=st.sampled_from(list(BACKBONES.values())),
        dwc=st.sampled_from(['zero', 'average', 'init']),
        prefix=st.sampled_from([None, '', 'backbone.']),
        min_carried=st.floats(0, 1)), ODD),
    'read': (read_checkpoint, dict(
        path=st.sampled_from(WRITTEN), key=st.none()), st.one_of(
            ODD, st.text(max_size=8))),
    'write': (write_checkpoint, dict(
        path=st.sampled_from([f'{FOLDER}/new{s}' for s in SUFFIXES]),
        state_dict=st.dictionaries(st.text(max_size=3), tensors(2, 3),
                                   min_size=1, max_size=2),
        meta=st.dictionaries(st.text(max_size=3), JSON, max_size=2)),
        st.one_of(ODD, st.sampled_from(['/no/such/folder/a.pth', 'a.txt']),
                  st.dictionaries(st.text(max_size=3), st.one_of(
                      ODD, odd_tensors()), max_size=2))),
}
# Those of which a case can be wrong as a whole, though no argument is odd.
NOT_ALWAYS = ('layer decay', 'convert')
NAMED = (FileNotFoundError, CheckpointError, ConversionError)


def check_call(name, case):
    call, _, _ = CALLS[name]
    args, odd = case
    if name == 'write' and isinstance(args['path'], str):
        Path(args['path']).unlink(missing_ok=True)
    also = ['optimizer', 'layer_decay_rate', 'checkpoint', 'output', 'tokens',
            'arch', 'custom_keys']
    done, result = attempt(call, args, also, NAMED)
    assert done or odd or name in NOT_ALWAYS, 'refused what is right'
    if done and name == 'read':
        assert_same(result.state_dict, STATE)
        assert result.meta == META
    elif done and name == 'write':
        read = read_checkpoint(args['path'])
        assert_same(read.state_dict, args['state_dict'])
        # As texts: a NaN, which Python's JSON has, equals none.
        assert json.dumps(read.meta) == json.dumps(args['meta'])
    return done


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key].dtype == value.dtype
        assert torch.equal(found[key], value)


KEYS = st.sampled_from([
    'model', 'backbone', 'neck', 'type', 'in_channels', 'out_channels',
    'bbox_head', 'decode_head', 'head', 'default_scope', 'detector',
    'train_dataloader', 'dataset', 'pipeline', 'optim_wrapper', 'optimizer',
    'data_preprocessor', 'mean', 'std', 'out_indices', 'strides', 'norm_cfg'])
VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 300), st.floats(-1, 1),
    st.sampled_from(['mmdet', 'mmseg', 'mmpretrain', 'ResNet', 'FPN',
                     'RetinaNet', 'ImageClassifier', 'EncoderDecoder',
                     'GlobalAveragePooling', 'LinearClsHead', 'x', '']))
TREES = st.recursive(VALUES, lambda node: st.one_of(
    st.lists(node, max_size=3), st.dictionaries(KEYS, node, max_size=5)),
    max_leaves=12)
RESNET = dict(type='ResNet', depth=18, num_stages=4,
              out_indices=(0, 1, 2, 3))
WIDTHS = [64, 128, 256, 512]
VIT = dict(type='VisionTransformer', img_size=(64, 64), embed_dims=8,
           num_layers=4, num_heads=2, out_indices=(0, 1, 2, 3))
DILATED = dict(RESNET, strides=(1, 2, 1, 1), dilations=(1, 1, 2, 4))


def segmentor(backbone, *heads, **parts):
    fcn = dict(type='FCNHead', in_channels=512, in_index=3, channels=8,
               num_classes=2)
    decode, *auxiliary = [dict(fcn, **head) for head in heads]
    return dict(type='EncoderDecoder', backbone=backbone, decode_head=decode,
                auxiliary_head=auxiliary, **parts)


# One for each way of a swap to read necks and heads.
BASE = [
    ('mmdet', dict(
        type='RetinaNet', backbone=RESNET,
        data_preprocessor=dict(mean=[1., 2, 3], std=[1., 1, 1],
                               bgr_to_rgb=True),
        neck=dict(type='FPN', in_channels=WIDTHS, out_channels=8, num_outs=5,
                  start_level=1),
        bbox_head=dict(type='RetinaHead', num_classes=2, in_channels=8,
                       anchor_generator=dict(type='AnchorGenerator',
                                             strides=[8, 16, 32, 64, 128])))),
    ('mmdet', dict(
        type='SingleStageDetector', backbone=dict(RESNET, out_indices=(2, 3)),
        neck=dict(type='SSDNeck', in_channels=(256, 512),
                  out_channels=(256, 512, 8), level_strides=(2, )),
        bbox_head=dict(type='SSDHead', in_channels=(256, 512, 8)))),
    ('mmdet', dict(
        type='MaskFormer', backbone=RESNET,
        panoptic_head=dict(type='MaskFormerHead', in_channels=WIDTHS))),
    ('mmdet', dict(
        type='BaseReID', backbone=dict(RESNET, out_indices=(3, )),
        roi_head=dict(type='x'), neck=dict(type='GlobalAveragePooling'),
        head=dict(type='LinearReIDHead', in_channels=512))),
    ('mmseg', segmentor(RESNET, {})),
    ('mmseg', segmentor(DILATED, dict(c1_in_channels=64), dict(
        in_channels=256, in_index=2))),
    ('mmseg', segmentor(DILATED, dict(in_channels=[256, 512],
                                      in_index=[2, 3]))),
    ('mmseg', segmentor(
        RESNET, dict(in_channels=2048, in_index=2), dict(
            in_channels=256, in_index=1),
        neck=dict(type='JPU', in_channels=(128, 256, 512), mid_channels=512,
                  start_level=0, end_level=-1, dilations=(1, 2, 4, 8)))),
    ('mmseg', segmentor(
        VIT, dict(in_channels=[8] * 4, in_index=[0, 1, 2, 3]),
        neck=dict(type='MultiLevelNeck', in_channels=[8] * 4, out_channels=8,
                  scales=[4, 2, 1, 0.5]))),
    ('mmseg', segmentor(
        VIT, dict(in_channels=[8] * 4, in_index=[0, 1, 2, 3]),
        neck=dict(type='Feature2Pyramid', embed_dim=8,
                  rescales=[4, 2, 1, 0.5]))),
    ('mmpretrain', dict(
        type='ImageClassifier', backbone=dict(RESNET, out_indices=(3, )),
        neck=dict(type='GlobalAveragePooling'),
        head=dict(type='LinearClsHead', num_classes=2, in_channels=512))),
    ('mmpretrain', dict(
        type='ImageClassifier', backbone=RESNET, neck=[
            dict(type='HRFuseScales', in_channels=WIDTHS),
            dict(type='GlobalAveragePooling', dim=1)],
        head=dict(type='DeiTClsHead', num_classes=2, in_channels=8))),
    ('mmpretrain', dict(
        type='SimSiam', backbone=dict(RESNET, out_indices=(3, )),
        neck=dict(type='NonLinearNeck', in_channels=512,
                  with_avg_pool=False),
        head=dict(type='LatentPredictHead', in_channels=8)))]
TRAINING = dict(
    optim_wrapper=dict(
        type='OptimWrapper', optimizer=dict(type='SGD', lr=0.1),
        constructor='LearningRateDecayOptimizerConstructor',
        clip_grad=dict(max_norm=1),
        paramwise_cfg=dict(decay_rate=0.9, custom_keys=dict(
            norm=dict(decay_mult=0.), backbone=dict(lr_mult=0.1)))),
    param_scheduler=[dict(type='PolyLR', eta_min=1e-4)],
    auto_scale_lr=dict(enable=False, base_batch_size=8),
    train_dataloader=dict(dataset=dict(dataset=dict(pipeline=[
        dict(type='Expand', mean=[1, 2, 3], to_rgb=False),
        dict(type='RandomCrop', crop_size=(64, 64))]))),
    custom_imports=dict(imports=['math'], allow_failed_imports=False),
    custom_hooks=[dict(type='FreezeHook', layers=['backbone.stem'])],
    load_from='x.pth', resume=True)


def test_what_is_fuzzed_can_be_swapped():
    for host, model in BASE:
        cfg = dict(TRAINING, default_scope=host, model=model)
        assert swap_backbone(cfg, 'rp_swin_tiny', report=None), model


ARCHS = {'rp_swin_tiny': 'mmrpa.RPSwin', 'rp-pvt-tiny': 'mmrpa.RPPVT',
         'rp_cswin_tiny': 'mmrpa.RPCSWin'}


@st.composite
def configs(draw, at_most):
    """A config that can be swapped; with some of it junk if ``at_most``."""
    host, model = draw(st.sampled_from(BASE))
    training = draw(st.fixed_dictionaries({}, optional={
        key: st.just(value) for key, value in TRAINING.items()}))
    cfg = dict(training, model=model)
    if at_most:
        cfg = draw(_damaged(cfg))
        if draw(st.booleans()):
            cfg[draw(KEYS)] = draw(TREES)
    cfg['default_scope'] = host
    return draw(mutated(
        dict(cfg=st.just(cfg), arch=st.sampled_from(list(ARCHS))), st.one_of(
            ODD, st.sampled_from(['rp_deit_tiny', 'rp_swn'])),
        min(at_most, 1)))


@st.composite
def _damaged(draw, node):
    """A copy of nested dicts, some values junk and some gone."""
    if not isinstance(node, (dict, list, tuple)):
        return node
    items = node.items() if isinstance(node, dict) else enumerate(node)
    copy = {}
    for key, value in items:
        what = draw(st.integers(0, 29))
        if what:
            copy[key] = draw(TREES if what == 1 else _damaged(value))
    return copy if isinstance(node, dict) else type(node)(copy.values())


def check_swap(case):
    """A swap gives a config with our backbone, or a SwapError in words."""
    args, _ = case
    try:
        new = swap_backbone(report=None, **args)
    except SwapError as error:
        assert str(error)
        return False
    model = new.model if 'backbone' in new.model else new.model.detector
    assert model.backbone.type == ARCHS.get(args['arch'], 'mmrpa.RPDeiT')
    return True


PARSERS = sorted(
    path.stem for path in TOOLS.glob('*.py')
    if 'def parse_args(argv' in path.read_text())
WORDS = st.one_of(
    st.text(string.printable, max_size=5),
    st.sampled_from(['-1', '0', 'nan', '1e9', '--', '/no/such', '']))


@st.composite
def command_lines(draw):
    tool = draw(st.sampled_from(PARSERS))
    flags = [word.strip('[],') for word in HELP[tool].split()
             if word.strip('[],').startswith('--')]
    words = st.one_of(WORDS, st.sampled_from(flags or ['--help']))
    return tool, draw(st.lists(words, max_size=5))


def _help(tool):
    with contextlib.redirect_stdout(io.StringIO()) as out, \
            contextlib.suppress(SystemExit):
        load_tool(tool).parse_args(['--help'])
    return out.getvalue()


HELP = {tool: _help(tool) for tool in PARSERS}
LOADED = {tool: load_tool(tool) for tool in PARSERS}


def check_command_line(case):
    """Arguments, or the usage and status 2 with one line of error."""
    tool, argv = case
    err = io.StringIO()
    try:
        with contextlib.redirect_stderr(err), \
                contextlib.redirect_stdout(io.StringIO()):
            LOADED[tool].parse_args(argv)
    except ValueError as error:
        assert str(error).startswith('--'), error  # main() prints it
        return False
    except SystemExit as stop:
        assert stop.code in (0, 2), stop.code
        if stop.code == 2:
            last = err.getvalue().strip().splitlines()
            assert any('error:' in line for line in last)
        return False
    return True


def test_some_tools_are_fuzzed():
    assert len(PARSERS) >= 10
    assert all('--' in text for text in HELP.values())


def call_checks(name):
    _, args, odd = CALLS[name]
    return (lambda case: check_call(name, case),
            lambda at_most: mutated(args, odd, at_most))


CHECKS = {**{name: call_checks(name) for name in CALLS},
          'swap': (check_swap, configs)}


@pytest.mark.parametrize('right', [True, False], ids=['right', 'odd'])
@pytest.mark.parametrize('name', CHECKS)
class TestEntryPoints:

    def test_short(self, name, right):
        self.run(fuzz.SHORT, name, right)

    @pytest.mark.long
    def test_long(self, name, right):
        self.run(fuzz.LONG, name, right)

    def run(self, profile, name, right):
        check, calls = CHECKS[name]
        fuzz.run(profile, check, calls(2 * (not right)),
                 right and name not in NOT_ALWAYS)


class TestCommandLines:

    def test_short(self):
        fuzz.run(fuzz.SHORT, check_command_line, command_lines())

    @pytest.mark.long
    def test_long(self):
        fuzz.run(fuzz.LONG, check_command_line, command_lines())
