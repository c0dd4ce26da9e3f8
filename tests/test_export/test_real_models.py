"""Exports of the hosts' models, at the sizes of the quickstart and of ADE20K.

``python -m pytest -m long tests/test_export``
"""

import json
import re

import pytest
import torch
from export_models import (
    BACKBONES,
    load,
    needs_export,
    strengthen,
    write_classifier,
    write_weights,
)
from guides import ROOT, run_guide
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope

from mmrpa.export import CHECK_SIZES, ExportModel, export_model

pytestmark = [pytest.mark.long, needs_export]
SEGMENTOR = 'mmseg/quickstart/rp-pvt-nano_upernet_1xb8-300_sample-128x128.py'
DETECTOR = 'mmdet/quickstart/mask-rcnn_rp-pvt-nano_fpn_1xb4_sample.py'
CLASSIFIER = 'mmpretrain/quickstart/rp-pvt-nano_1xb32_sample.py'
TINY = 'mmseg/rp_swin/rp-swin-tiny_upernet_8xb2-160k_ade20k-512x512.py'


def _model(config, **options):
    torch.manual_seed(1)
    model = ExportModel(
        str(ROOT / 'configs' / config), cfg_options={
            'model.backbone.init_cfg': None}, **options)
    strengthen(model.state_dict())
    return model


def _session(path):
    import onnxruntime
    return onnxruntime.InferenceSession(str(path))


@pytest.mark.parametrize('name', BACKBONES)
def test_families_in_onnx(name, tmp_path):
    config = write_classifier(tmp_path, name)
    write_weights(config)
    checked = export_model(load(config, part='backbone'),
                           tmp_path / 'backbone.onnx')
    print(name, checked)
    assert [c.size for c in checked] == list(CHECK_SIZES)


def test_upernet_is_what_mmseg_predicts(tmp_path):
    """Of one image, against the host's own test step."""
    model = _model(SEGMENTOR)
    path = tmp_path / 'segmentor.onnx'
    print(export_model(model, path, sizes=[*CHECK_SIZES, (1, 4, 4)]))
    image = torch.randint(0, 256, (3, 100, 140), dtype=torch.uint8)
    from mmseg.structures import SegDataSample
    sample = SegDataSample(metainfo=dict(
        img_shape=(100, 140), ori_shape=(100, 140), pad_shape=(100, 140)))
    with torch.no_grad():
        want, = model.model.test_step(
            dict(inputs=[image], data_samples=[sample]))
    session = _session(path)
    meta = session.get_modelmeta().custom_metadata_map
    mean, std = (torch.tensor(json.loads(meta[f'mmrpa.{key}'])).view(3, 1, 1)
                 for key in ('mean', 'std'))
    assert meta['mmrpa.channel_order'] == 'RGB'
    normalised = (image.flip(0) - mean) / std
    got, = session.run(['logits'], dict(image=normalised[None].numpy()))
    torch.testing.assert_close(torch.from_numpy(got[0]),
                               want.seg_logits.data, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('file_format', ['onnx', 'torch-export'])
def test_labels_of_pixels(file_format, tmp_path):
    suffix = dict(onnx='.onnx').get(file_format, '.pt2')
    print(export_model(
        _model(SEGMENTOR, output='labels', normalize=True),
        tmp_path / f'labels{suffix}', file_format=file_format))


@pytest.mark.parametrize('file_format', ['onnx', 'torch-export'])
def test_fpn_of_mask_rcnn(file_format, tmp_path):
    model = _model(DETECTOR)
    assert model.part == 'neck'
    path = tmp_path / ('fpn.onnx' if file_format == 'onnx' else 'fpn.pt2')
    print(export_model(model, path, file_format=file_format))
    if file_format == 'onnx':
        session = _session(path)
        assert [o.name for o in session.get_outputs()] == [
            f'map{i}' for i in range(4)]
        levels = session.run(None, dict(image=torch.zeros(1, 3, 96,
                                                          160).numpy()))
        assert [level.shape[2:] for level in levels] == [
            (24, 40), (12, 20), (6, 10), (3, 5)]


def test_classifier(tmp_path):
    print(export_model(_model(CLASSIFIER), tmp_path / 'classifier.onnx'))


@pytest.mark.parametrize('opset', [19, 20, 23])
def test_opsets(opset, tmp_path):
    import onnx
    config = write_classifier(tmp_path, 'RPDeiT')
    write_weights(config)
    path = tmp_path / 'model.onnx'
    export_model(load(config), path, opset=opset)
    assert {o.version for o in onnx.load(path).opset_import
            if not o.domain} == {opset}


def test_tiny_upernet_at_ade20k_size(tmp_path):
    print(export_model(_model(TINY), tmp_path / 'tiny.onnx',
                       sizes=[*CHECK_SIZES, (1, 512, 512), (1, 512, 683)]))


def test_guide(tmp_path):
    """docs/export.md: its commands run, and its snippet."""
    cfg = Config.fromfile(ROOT / 'configs' / SEGMENTOR)
    init_default_scope('mmseg')
    cfg.model.backbone.init_cfg = None
    path = tmp_path / 'work_dirs/quickstart/segmentor/iter_300.pth'
    path.parent.mkdir(parents=True)
    torch.save(dict(state_dict=MODELS.build(cfg.model).state_dict()), path)
    outputs = run_guide('docs/export.md', tmp_path)
    for name, text in zip(('segmentor.onnx', 'backbone.pt2'),
                          outputs.values(), strict=True):
        assert re.search(rf'wrote {name} \(\d+\.\d MB, \d+ s\)', text)
        assert (tmp_path / name).is_file()
    snippet, = re.findall(r'```python\n(.*?)```',
                          (ROOT / 'docs/export.md').read_text(), re.S)
    names = {}
    exec(snippet.replace('segmentor.onnx', str(tmp_path / 'segmentor.onnx')),
         names)
    assert names['logits'].shape[2:] == (200, 320)
