"""What an export computes, and what it does when that is wrong."""

import json

import pytest
import torch
from export_models import SMALL, load, write_classifier, write_weights

from mmrpa.export import CHECK_SIZES, CheckError, ExportModel, export_model
from mmrpa.export.check import check_program


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


def test_backbone_weights_alone(config, tmp_path):
    whole = load(config)
    path = tmp_path / 'backbone.pth'
    torch.save(whole.backbone.state_dict(), path)
    alone = ExportModel(str(config), str(path), part='backbone')
    x = torch.randn(1, 3, 32, 40)
    assert all(a.equal(b) for a, b in zip(
        alone(x), whole.backbone(x), strict=True))
