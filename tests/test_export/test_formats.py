"""What an export computes, and what it does when that is wrong."""

import errno
import json
import resource

import cv2
import numpy as np
import pytest
import torch
from export_models import (
    SMALL,
    load,
    needs_export,
    write_classifier,
    write_segmentor,
    write_weights,
)
from guides import ROOT
from helpers import mmdet_models
from mmengine.config import Config

import mmrpa.export.formats as formats
from mmrpa.export import (
    CHECK_SIZES,
    CheckError,
    ExportModel,
    export_model,
)
from mmrpa.export.check import check_program
from mmrpa.preflight import ConfigError
from mmrpa.visualization.models import RoutingModel

DETECTOR = ROOT / ('configs/mmdet/quickstart/'
                   'mask-rcnn_rp-pvt-nano_fpn_1xb4_sample.py')


@pytest.fixture
def config(tmp_path):
    """One block, so that an export takes seconds."""
    path = write_classifier(
        tmp_path, 'RPPVT', attention='rp', out_indices=(0, ), arch=dict(
            embed_dims=(32, ), depths=(1, ), num_heads=(2, ), mlp_ratios=2))
    write_weights(path)
    return path


def test_sizes_are_what_a_check_needs():
    assert len(set(CHECK_SIZES)) == 5
    sides = {side for size in CHECK_SIZES for side in size[1:]}
    assert len(sides) == 10  # all unequal
    assert {size[0] for size in CHECK_SIZES} == {1, 2, 3}
    whole = [all(side % 32 == 0 for side in size[1:]) for size in CHECK_SIZES]
    assert True in whole and False in whole


# An export takes 15 s; the tests below make one of each format in each suite.
@needs_export
@pytest.mark.long
@pytest.mark.parametrize('name', SMALL)
def test_families_by_torch_export(name, tmp_path):
    """Read back and run by torch alone."""
    config = write_classifier(tmp_path, name, **SMALL[name])
    write_weights(config)
    model = load(config, part='backbone')
    path = tmp_path / 'model.pt2'
    export_model(model, path, file_format='torch-export')
    extra = {'mmrpa.json': ''}
    program = torch.export.load(str(path), extra_files=extra).module()
    assert json.loads(extra['mmrpa.json'])['part'] == 'backbone'
    side = model.smallest_side
    for shape in ((1, 3, side, side), (4, 3, side, 50)):
        x = torch.randn(shape)
        got, want = program(x), model.backbone(x)
        assert len(got) == len(want) >= 1
        assert not torch.equal(got[0], torch.zeros_like(got[0]))
        for ours, theirs in zip(got, want, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@needs_export
def test_onnx_of_a_whole_classifier(config, tmp_path):
    """From pixels to logits, against the host's own preprocessing."""
    import onnx
    import onnxruntime
    model = load(config, normalize=True)
    path = tmp_path / 'model.onnx'
    checked = export_model(model, path, about=dict(config='classifier.py'))
    assert [c.size for c in checked] == list(CHECK_SIZES)
    assert all(c.error < 1e-5 for c in checked)
    session = onnxruntime.InferenceSession(str(path))
    image = torch.randint(0, 256, (2, 3, 40, 70)).float()
    # The hosts' loader gives BGR; the file says that it takes RGB.
    data = model.model.data_preprocessor(dict(inputs=image), False)
    with torch.no_grad():
        want = model.model(**data, mode='tensor')
    got, = session.run(['logits'], dict(image=image.flip(1).numpy()))
    torch.testing.assert_close(torch.from_numpy(got), want, rtol=1e-4,
                               atol=1e-5)
    (name, shape), = [(i.name, i.shape) for i in session.get_inputs()]
    assert (name, shape) == ('image', ['batch', 3, 'height', 'width'])
    meta = session.get_modelmeta().custom_metadata_map
    assert meta['mmrpa.config'] == 'classifier.py'
    assert meta['mmrpa.channel_order'] == 'RGB'
    assert meta['mmrpa.input'] == 'pixels'
    assert json.loads(meta['mmrpa.mean']) == [120, 110, 100]
    assert json.loads(meta['mmrpa.std']) == [60, 50, 40]
    assert json.loads(meta['mmrpa.classes']) == ['cat', 'dog']
    domains = {node.domain for node in onnx.load(path).graph.node}
    assert domains <= {'', 'ai.onnx'}  # nothing that only we have
    assert [p.name for p in tmp_path.glob('*model*')] == ['model.onnx']


class _Spoiled(ExportModel):
    """Exports something else than it computes."""

    def for_export(self):
        twin = super().for_export()
        twin.backbone.stages[0].blocks[0].attn.proj.weight.data *= 2
        return twin


@needs_export
def test_wrong_program_leaves_no_file(config, tmp_path):
    model = _Spoiled(str(config), str(tmp_path / 'weights.pth'))
    before = sorted(tmp_path.iterdir())
    with pytest.raises(CheckError, match=r'output 0 at batch x height x width '
                       r'1x96x64 differs by'):
        export_model(model, tmp_path / 'model.pt2',
                     file_format='torch-export')
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize('change, message', [
    (lambda y: y + 1e-3, 'differs by'),
    (lambda y: y * float('nan'), 'differs by nan'),
    (lambda y: y[:, :1], 'the model gives'),
    (lambda y: y.double(), 'float64'),
])
def test_check_sees(change, message, config):
    model = load(config)
    check_program(model, model)
    with pytest.raises(CheckError, match=message):
        check_program(lambda x: [change(model(x)[0])], model)
    with pytest.raises(CheckError, match='2 outputs, 1 expected'):
        check_program(lambda x: [*model(x), *model(x)], model)


def test_check_of_labels(config):
    model = load(config, output='labels')
    with torch.no_grad():
        logits = load(config)(torch.zeros(2, 3, 40, 40))[0]
        assert model(torch.zeros(2, 3, 40, 40))[0].equal(logits.argmax(1))
    check_program(model, model)
    with pytest.raises(CheckError, match='differs by'):
        check_program(lambda x: [1 - model(x)[0]], model)
    with pytest.raises(CheckError, match='differs by inf'):
        check_program(lambda x: [model(x)[0] + 2], model)


def test_binary_segmentor_has_the_threshold_of_its_host(tmp_path):
    """One channel for two classes: argmax would be 0 everywhere."""
    config = write_segmentor(tmp_path, out_channels=1)
    write_weights(config)
    model = load(config, output='labels')
    assert model.threshold == 0.4
    image = torch.randn(2, 3, 48, 40)
    with torch.no_grad():
        got, = model(image)
        want = model.model.postprocess_result(model.compute_logits(image))
    want = torch.stack([sample.pred_sem_seg.data[0] for sample in want])
    assert want.unique().tolist() == [0, 1]
    assert got.equal(want.long())
    check_program(model, model)


def test_labels_of_a_segmentor_with_several_heads(tmp_path):
    """One behind the other, as in OCRNet: the last one decides."""
    head = dict(in_channels=32, channels=8, in_index=0, num_classes=3)
    config = write_segmentor(
        tmp_path, type='CascadeEncoderDecoder', num_stages=2, decode_head=[
            dict(head, type='FCNHead', num_convs=1),
            dict(head, type='OCRHead', ocr_channels=8)])
    write_weights(config)
    model = load(config, output='labels')
    image = torch.randn(2, 3, 48, 40)
    with torch.no_grad():
        # No class is ahead of the others on all pixels.
        model.model.decode_head[-1].conv_seg.bias.sub_(
            model.compute_logits(image).mean((0, 2, 3)))
        got, = model(image)
        want = model.model.postprocess_result(model.compute_logits(image))
    want = torch.stack([sample.pred_sem_seg.data[0] for sample in want])
    assert len(want.unique()) == 3
    assert got.equal(want)
    check_program(model, model)


@pytest.mark.parametrize('flag', [None, 'bgr_to_rgb', 'rgb_to_bgr'])
def test_channel_order_is_what_the_host_makes_of_bgr(flag, tmp_path):
    """Either flag swaps the channels, whatever they are called."""
    config = write_segmentor(tmp_path, data_preprocessor=dict(
        type='SegDataPreProcessor', mean=[0., 0, 0], std=[1., 1, 1],
        **{flag: True} if flag else {}))
    model = ExportModel(str(config))
    from mmseg.structures import SegDataSample
    bgr = torch.arange(3.).view(3, 1, 1).expand(3, 8, 8)
    data = model.model.data_preprocessor(
        dict(inputs=[bgr], data_samples=[SegDataSample()]))
    order = ''.join('BGR'[int(i)] for i in data['inputs'][0, :, 0, 0])
    assert model.describe()['channel_order'] == order


@pytest.mark.parametrize('to_rgb', [False, True])
@pytest.mark.parametrize('swaps', [False, True])
def test_pipeline_that_normalises(swaps, to_rgb, tmp_path):
    """As configs of the 2.x releases of the hosts do."""
    config = write_segmentor(tmp_path, data_preprocessor=dict(
        type='SegDataPreProcessor', bgr_to_rgb=swaps))
    cfg = Config.fromfile(config)
    cfg.test_dataloader.dataset.pipeline.insert(1, dict(
        type='Normalize', mean=[120., 110, 100], std=[60., 50, 40],
        to_rgb=to_rgb))
    cfg.dump(config)
    model = ExportModel(str(config), normalize=True)
    order = model.describe()['channel_order']
    assert order == ('RGB' if swaps != to_rgb else 'BGR')
    assert model.describe()['mean'] == ([100, 110, 120] if swaps else
                                        [120, 110, 100])
    # What the host makes of a file is what the export makes of its pixels.
    bgr = np.random.default_rng(0).integers(0, 256, (40, 64, 3), np.uint8)
    cv2.imwrite(str(tmp_path / 'image.png'), bgr)
    view = RoutingModel(str(config)).look(str(tmp_path / 'image.png'))
    want = model.model.data_preprocessor(view.data, False)['inputs']
    pixels = torch.from_numpy(
        bgr if order == 'BGR' else bgr[..., ::-1].copy()).float()
    got = (pixels.permute(2, 0, 1)[None] - model.mean) / model.std
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


def test_images_are_normalised_once(tmp_path):
    config = write_segmentor(tmp_path)
    cfg = Config.fromfile(config)
    cfg.test_dataloader.dataset.pipeline.insert(1, dict(
        type='Normalize', mean=[120., 110, 100], std=[60., 50, 40]))
    cfg.dump(config)
    with pytest.raises(ConfigError, match='has a Normalize transform, beside'):
        ExportModel(str(config))


def test_detector_inside_of_another_model_is_refused(tmp_path):
    """Which of the two, and where is what normalises its images?"""
    mmdet_models()
    cfg = Config.fromfile(DETECTOR)
    cfg.model.backbone.init_cfg = None
    cfg.model = dict(
        type='SemiBaseDetector', detector=cfg.model, semi_train_cfg=dict(),
        data_preprocessor=dict(
            type='MultiBranchDataPreprocessor',
            data_preprocessor=cfg.model.data_preprocessor))
    cfg.dump(tmp_path / 'semi.py')
    with pytest.raises(ConfigError, match='SemiBaseDetector holds .* config '
                       'of that model'):
        ExportModel(str(tmp_path / 'semi.py'), part='backbone')


@pytest.mark.parametrize('head', [
    dict(type='MultiLabelLinearClsHead', num_classes=2, in_channels=32),
    dict(type='CSRAClsHead', num_classes=2, in_channels=32, num_heads=1,
         lam=0.1)])
def test_several_labels_have_no_best(head, config):
    def build(output):
        return ExportModel(str(config), output=output, cfg_options={
            'model.head': dict(_delete_=True, **head)})
    with pytest.raises(ValueError, match=f"what {head['type']} predicts; use"):
        build('labels')
    build('logits')


def test_one_class_of_one_is_the_first(config):
    model = ExportModel(str(config), output='labels', cfg_options={
        'model.head.num_classes': 1})
    assert model(torch.zeros(2, 3, 40, 40))[0].tolist() == [0, 0]
    check_program(model, model)


@pytest.mark.parametrize('divisor', [None, 32])
def test_padding_of_a_segmentor_is_that_of_its_tests(divisor, tmp_path):
    config = write_segmentor(tmp_path)
    options = {} if divisor is None else {
        'model.data_preprocessor.test_cfg': dict(size_divisor=divisor)}
    model = ExportModel(str(config), cfg_options=options)
    from mmseg.structures import SegDataSample
    image = torch.zeros(3, 40, 70)
    data = model.model.data_preprocessor(
        dict(inputs=[image], data_samples=[SegDataSample()]))
    multiple = model.describe()['pad_size_divisor']
    assert multiple == (divisor or 1)
    assert data['inputs'].shape[2:] == tuple(
        -(-side // multiple) * multiple for side in image.shape[1:])


def test_fixed_size_of_the_tests_of_a_segmentor(tmp_path):
    config = write_segmentor(tmp_path)
    assert ExportModel(str(config)).describe()['pad_size'] == []
    model = ExportModel(str(config), cfg_options={
        'model.data_preprocessor.test_cfg': dict(size=(48, 80))})
    assert model.describe()['pad_size'] == [48, 80]
    from mmseg.structures import SegDataSample
    data = model.model.data_preprocessor(dict(
        inputs=[torch.zeros(3, 40, 70)], data_samples=[SegDataSample()]))
    assert data['inputs'].shape[2:] == (48, 80)


def test_windows_of_a_segmentor_are_in_the_metadata(tmp_path):
    config = write_segmentor(tmp_path)
    slide = {'model.test_cfg': dict(mode='slide', crop_size=(64, 64),
                                    stride=(42, 42))}
    assert ExportModel(str(config)).describe()['windows'] == {}
    model = ExportModel(str(config), cfg_options=slide)
    assert model.describe()['windows'] == dict(crop_size=[64, 64],
                                               stride=[42, 42])
    assert ExportModel(str(config), cfg_options=slide, part='backbone'
                       ).windows == {}


@needs_export
@pytest.mark.parametrize('content', [b'', b'no model', None])
def test_file_that_does_not_load_is_no_traceback(content, config, tmp_path,
                                                 monkeypatch):
    """Cut, something else, and a graph with an operator of nobody."""
    import onnx
    if content is None:
        graph = onnx.helper.make_graph(
            [onnx.helper.make_node('Nobody', ['image'], ['y'])], 'g', [
                onnx.helper.make_tensor_value_info('image', 1, [1])], [
                onnx.helper.make_tensor_value_info('y', 1, [1])])
        content = onnx.helper.make_model(graph).SerializeToString()
    monkeypatch.setattr(formats, '_write_onnx',
                        lambda program, model, path, *_: path.write_bytes(
                            content))
    with pytest.raises(CheckError, match='onnxruntime .* cannot load the '):
        export_model(load(config), tmp_path / 'model.onnx')
    assert not list(tmp_path.glob('*model*'))


@needs_export
@pytest.mark.parametrize('file_format, suffix', [
    pytest.param('onnx', 'onnx', marks=pytest.mark.long),
    ('torch-export', 'pt2')])
def test_full_disk_leaves_no_file(file_format, suffix, config, tmp_path):
    """A real write that does not fit; torch's own writer would abort."""
    model = load(config)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(OSError) as caught:
            export_model(model, tmp_path / f'model.{suffix}',
                         file_format=file_format)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.errno == errno.EFBIG
    assert not list(tmp_path.glob('*model*'))


def test_backbone_weights_alone(config, tmp_path):
    whole = load(config)
    path = tmp_path / 'backbone.pth'
    torch.save(whole.backbone.state_dict(), path)
    alone = ExportModel(str(config), str(path), part='backbone')
    x = torch.randn(1, 3, 32, 40)
    assert all(a.equal(b) for a, b in zip(
        alone(x), whole.backbone(x), strict=True))
