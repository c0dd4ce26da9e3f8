"""tools/visualize_routing.py: what it draws, where, and what it refuses."""

import re

import cv2
import numpy as np
import pytest
import torch
from helpers import load_tool
from mmengine.config import Config
from PIL import Image

from mmrpa.visualization import representative_colors
from mmrpa.visualization.figures import Panel, picture_of, segments_picture
from mmrpa.visualization.models import Place, RoutingModel

HOSTS = ('mmdet', 'mmseg', 'mmpretrain')
WIDTH, HEIGHT = 150, 97
# Where the image has its one bright pixel block: x, y of its centre.
BRIGHT = (90.5, 40.5)


@pytest.fixture(scope='module')
def image(photo):
    """The photograph of conftest.py."""
    return photo


@pytest.fixture(scope='module')
def trained(routing_models):
    """The models of conftest.py."""
    return routing_models


@pytest.fixture(scope='module')
def tool():
    return load_tool('visualize_routing')


def semi_supervised(config, folder, **settings):
    """The config of a teacher and a student from that of a detector."""
    cfg = Config.fromfile(config)
    cfg.model = dict(
        type='SemiBaseDetector', detector=cfg.model, semi_train_cfg={},
        data_preprocessor=dict(
            type='MultiBranchDataPreprocessor',
            data_preprocessor=cfg.model.data_preprocessor), **settings)
    cfg.dump(folder / 'semi.py')
    return folder / 'semi.py'


@pytest.mark.parametrize('part, settings', [
    ('teacher', {}), ('teacher', dict(predict_on='teacher')),
    ('student', dict(predict_on='student'))])
def test_of_teacher_and_student_the_one_that_predicts(
        part, settings, trained, image, tmp_path):
    model = RoutingModel(semi_supervised(trained['mmdet'][0], tmp_path,
                                         semi_test_cfg=settings))
    ran = []
    for name in ('teacher', 'student'):
        getattr(model.model, name).backbone.register_forward_hook(
            lambda *_, name=name: ran.append(name))
    model.model.test_step(model.look(image).data)
    assert ran == [part] * 2  # what look has shown, and the host's own test


def test_first_of_several_backbones_is_named(trained, tmp_path):
    with pytest.warns(UserWarning, match="has 2 RP backbones, what is shown "
                      "is 'student.backbone' and not 'teacher.backbone'"):
        RoutingModel(semi_supervised(trained['mmdet'][0], tmp_path))


@pytest.mark.parametrize('flip', [False, True])
@pytest.mark.parametrize('host', HOSTS)
def test_pictures_lie_where_the_network_looked(host, flip, trained, image,
                                               tmp_path):
    config = trained[host][0]
    if flip:
        cfg = Config.fromfile(config)
        cfg.test_dataloader.dataset.pipeline.insert(
            -1, dict(type='RandomFlip', prob=1.))
        config = tmp_path / 'flip.py'
        cfg.dump(config)
    model = RoutingModel(config, trained[host][1])
    view = model.look(image)
    assert view.image.shape == (HEIGHT, WIDTH, 3)
    assert view.image[40, 90].min() == 255
    # Where did the host's own preparation put the block?
    inputs = model.model.data_preprocessor(view.data, False)['inputs'][0]
    bright = inputs.mean(0) - inputs.mean()
    bright = bright.where(bright > bright.max() / 2, 0)
    found = [((bright.sum(axis) * (torch.arange(n) + 0.5)).sum() /
              bright.sum()).item()
             for axis, n in ((0, bright.shape[1]), (1, bright.shape[0]))]
    expected = [view.geometry.to_network(BRIGHT[axis] + 0.5, axis)
                for axis in (0, 1)]
    assert found == pytest.approx(expected, abs=0.6)
    # And the token there is the one that the tool takes for that pixel.
    place = Place(0, 0)
    rows, columns = view.inputs[place].hw_shape
    assert (rows, columns) == tuple(-(-n // 4) for n in bright.shape)
    token = int(found[1] // 4) * columns + int(found[0] // 4)
    assert abs(view.token(place, BRIGHT) - token) in (0, 1, columns)
    # A map that has this token only is seen at this pixel of the picture.
    one = torch.zeros(1, rows * columns)
    one[0, view.token(place, BRIGHT)] = 1
    size = (2 * HEIGHT, 2 * WIDTH)
    picture = view.to_picture(one.view(1, rows, columns), place, size,
                              'nearest')[0]
    assert picture[81, 181] == 1
    spots = picture.nonzero().float()
    assert np.ptp(spots.numpy(), axis=0).max() < 2 * 4 * 2.4


@pytest.mark.parametrize('host', HOSTS)
def test_figures_of_every_host(host, trained, image, tool, tmp_path, capsys):
    config, checkpoint, twin = map(str, trained[host])
    out = tmp_path / 'new' / 'out'
    common = [config, checkpoint, str(image), '--out', str(out)]
    assert tool.main([*common, '--stage', '3']) == 0
    names = ['photo_segments.png']
    if host == 'mmdet':
        points = ['--points', '75,48', '90.5,40']
        assert tool.main([*common, *points, '--twin', twin, '--stage', '2'
                          ]) == 0
        assert tool.main([*common, '--head', 'all', '--stage', '4',
                          '--format', 'pdf']) == 0
        names += ['photo_heat.png', 'photo_blocks.png', 'photo_heads.pdf']
        assert (out / names[-1]).read_bytes().startswith(b'%PDF')
    assert sorted(path.name for path in out.iterdir()) == sorted(names)
    assert capsys.readouterr().out.split() == [str(out / n) for n in names]
    for name in names[:3]:
        with Image.open(out / name) as figure:
            width, height = figure.size
            pixels = np.asarray(figure.convert('RGB'))
            assert figure.info['dpi'] == pytest.approx((300, 300), abs=1)
        assert width > 800
        # Tight, but nothing is cut off: a thin white margin goes around.
        for edge in (pixels[:4], pixels[-4:], pixels[:, :4], pixels[:, -4:]):
            assert edge.min() == 255
        assert pixels[12:-12, 12:-12].min() < 100


def test_a_representative_has_one_colour_in_all_images(trained, image,
                                                       tmp_path):
    """Inside of segments, a mean of fixed colours, weighted by the shares."""
    model = RoutingModel(*trained['mmdet'][:2])
    other = tmp_path / 'other.png'
    assert cv2.imwrite(str(other), cv2.imread(str(image))[::-1, :, ::-1] * 3)
    colors = representative_colors(4)
    place = Place(0, 0)
    order = set()
    for path in (image, other):
        view = model.look(path)
        shown = segments_picture(view, Panel(place, 0), 300)
        plain = picture_of(view, 300)
        shares = view.to_picture(view.routing(place)[0], place,
                                 plain.shape[:2]).double().numpy()
        order.add(tuple(shares.mean((1, 2)).argsort()))
        paint = sum(shares[m][..., None] * colors[m] for m in range(4))
        shade = plain @ np.array([0.299, 0.587, 0.114])
        expected = (0.78 * paint * (0.5 + 0.5 * shade[..., None]) +
                    0.22 * plain)
        labels = shares.argmax(0)
        inside = np.ones(labels.shape, bool)
        for axis in (0, 1):
            for shift in (-1, 1):
                inside &= labels == np.roll(labels, shift, axis)
        inside[[0, -1]] = inside[:, [0, -1]] = False
        assert inside.mean() > 0.3
        assert shown[inside] == pytest.approx(expected[inside], abs=1e-5)
    assert len(order) == 2  # the images do differ in who holds most


def test_several_images_share_a_figure(trained, image, tool, tmp_path):
    config, checkpoint, _ = map(str, trained['mmdet'])
    assert tool.main([config, checkpoint, str(image), str(image), '--out',
                      str(tmp_path), '--stage', '1', '--head', '1']) == 0
    assert tool.main([config, checkpoint, str(image), str(image), '--out',
                      str(tmp_path), '--points', '3,3', '--stage', '4',
                      '--style', 'heat']) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        'photo_1_heat.png', 'photo_2_heat.png', 'segments.png']


def test_responses_are_those_of_the_layer(trained, image):
    config, checkpoint, twin = trained['mmseg']
    for path, attention in ((checkpoint, None), (twin, 'own')):
        model = RoutingModel(config, path, attention=attention)
        assert model.rp_stages == ([] if attention else [0, 1, 2, 3])
        view = model.look(image)
        place = model.place(1)
        maps = view.response(place, [(3, 3), (90, 40)])
        assert maps.shape == (1, 2, 6, 8)  # ceil(ceil(41 / 4) / 2) rows
        torch.testing.assert_close(maps.sum((-2, -1)), torch.ones(1, 2))
    first, last = model.place(2, 0), model.place(2)
    assert first == last == Place(2, 0)
    p = RoutingModel(config, checkpoint).look(image).routing(Place(3, 0))
    assert p.shape == (2, 4, 2, 2)
    torch.testing.assert_close(p.sum(1), torch.ones(2, 2, 2))


def _bad_inputs(trained, image, tmp_path):
    config, checkpoint, sr = map(str, trained['mmdet'])
    mixed = str(tmp_path / 'mixed.pth')
    tensors = torch.load(sr)['state_dict']
    tensors = {k: v for k, v in tensors.items() if '.stages.0.' not in k}
    rp = torch.load(checkpoint)['state_dict']
    tensors.update({k: v for k, v in rp.items() if '.stages.0.' in k})
    torch.save(tensors, mixed)
    other = str(trained['mmseg'][1])
    (tmp_path / 'broken.py').write_text('model = dict(\n')
    (tmp_path / 'raises.py').write_text('x = undefined_name\n')
    (tmp_path / 'resnet.py').write_text(
        "default_scope = 'mmdet'\nmodel = dict(type='RetinaNet', "
        "backbone=dict(type='ResNet', depth=18), neck=dict(type='FPN', "
        'in_channels=[64], out_channels=8, num_outs=1), bbox_head=dict('
        "type='RetinaHead', num_classes=2, in_channels=8))\n")
    (tmp_path / 'unknown.py').write_text(
        "default_scope = 'mmdet'\nmodel = dict(type='NoSuchModel')\n")
    (tmp_path / 'scopeless.py').write_text("model = dict(type='X')\n")
    content = open(checkpoint, 'rb').read()
    (tmp_path / 'cut.pth').write_bytes(content[:len(content) // 2])
    torch.save(dict(state_dict=_Runs()), tmp_path / 'code.pth')
    (tmp_path / 'text.png').write_text('no image')
    whole = open(image, 'rb').read()
    (tmp_path / 'cut.png').write_bytes(whole[:len(whole) // 2])
    path = str(image)

    def at(name):
        return str(tmp_path / name)

    return {
        'config': ([at('no.py'), checkpoint, path], 'does not exist'),
        'syntax': ([at('broken.py'), checkpoint, path], 'does not parse'),
        'name': ([at('raises.py'), checkpoint, path],
                 'does not parse: NameError'),
        'suffix': ([at('text.png'), checkpoint, path], 'does not parse'),
        'no RP': ([at('resnet.py'), checkpoint, path], "got 'ResNet'"),
        'model': ([at('unknown.py'), checkpoint, path],
                  'cannot be built.*NoSuchModel'),
        'scope': ([at('scopeless.py'), checkpoint, path],
                  'default_scope=None'),
        'weights': ([config, at('no.pth'), path], 'does not exist'),
        'cut': ([config, at('cut.pth'), path], 'cut.pth is damaged'),
        'code': ([config, at('code.pth'), path], 'code.pth holds more'),
        'family': ([config, other, path], 'does not fit the model'),
        'twin': ([config, checkpoint, path, '--points', '1,1', '--twin',
                  checkpoint], 'does not fit'),
        'image': ([config, checkpoint, at('no.png')], 'no.png.*not exist'),
        'no image': ([config, checkpoint, at('text.png')], 'not an image'),
        'cut image': ([config, checkpoint, at('cut.png')], 'damaged image'),
        'second': ([config, checkpoint, path, at('text.png')],
                   'not an image'),
        'point': ([config, checkpoint, path, '--points', '2,2', '150,3'],
                  'point 150,3 is outside.*150x97'),
        'stage': ([config, checkpoint, path, '--stage', '5'],
                  'no stage 5.*1 to 4'),
        'block': ([config, checkpoint, path, '--stage', '1', '--block', '2'],
                  'no block 2 in stage 1'),
        'head': ([config, checkpoint, path, '--stage', '3', '--head', '3'],
                 'heads 1 to 2'),
        'no rp': ([config, sr, path, '--cfg-options',
                   'model.backbone.attention=sr'], 'no stage.*RPAttention'),
        'mixed': ([config, mixed, path, '--stage', '2', '--cfg-options',
                   "model.backbone.attention=['rp','sr','sr','sr']"],
                  'stage 2 has no.* are 1'),
    }


class _Runs:
    """A pickle that would run code."""

    def __reduce__(self):
        return (open, ('pwned', 'w'))


def test_bad_input_is_one_line_and_writes_nothing(trained, image, tool,
                                                  tmp_path, capsys,
                                                  monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = tmp_path / 'out'
    for name, (args, message) in _bad_inputs(trained, image,
                                             tmp_path).items():
        assert tool.main([*args, '--out', str(out)]) == 1, name
        error = capsys.readouterr().err.strip().splitlines()
        lines = [line for line in error if 'visualize_routing' in line]
        assert len(lines) == 1, (name, error)
        assert re.search(message, lines[0]), (name, lines)
        assert not out.exists(), name
    assert not (tmp_path / 'pwned').exists()


@pytest.mark.parametrize('args, message', [
    (['--points', '3'], "'3' is no point"),
    (['--points', 'a,b'], "'a,b' is no point"),
    (['--stage', '0'], "'0' must be a number from 1 or all"),
    (['--head', 'best'], 'must be a number from 1 or auto or all or mean'),
    (['--head', 'mean'], 'give --points'),
    (['--twin', 'x.pth'], 'give --points'),
    (['--points', '1,1', '--head', 'all'], 'needs one --stage'),
])
def test_bad_arguments(args, message, tool, capsys):
    with pytest.raises(SystemExit) as error:
        tool.main(['config.py', 'weights.pth', 'image.jpg', *args])
    assert error.value.code == 2
    assert message in capsys.readouterr().err


def test_a_crop_shows_only_what_is_seen(trained, image, tool, tmp_path,
                                        capsys):
    config, checkpoint, _ = map(str, trained['mmpretrain'])
    assert tool.main([config, checkpoint, str(image), '--out',
                      str(tmp_path / 'out'), '--points', '5,50']) == 1
    assert 'crops away' in capsys.readouterr().err
    assert not (tmp_path / 'out').exists()
