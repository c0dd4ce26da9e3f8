"""tools/convert_checkpoint.py, from its command line to a loaded backbone."""

import json
import os

import pytest
import safetensors
import timm
import torch
from helpers import load_tool
from source_models import SOURCES, images
from torchvision.utils import save_image

from mmrpa.backbones import RPSwin
from mmrpa.transfer.images import load_images
from mmrpa.weights import convert, read_checkpoint

SMALL = ['arch.embed_dims=8,16,32,64', 'arch.depths=2,2,2,1',
         'arch.num_heads=1,2,4,4', 'arch.mlp_ratios=4', 'window_size=4']


@pytest.fixture(scope='module')
def tool():
    return load_tool('convert_checkpoint')


@pytest.fixture(scope='module')
def swin():
    return SOURCES['timm_swin']()


def test_a_whole_swin_t(tool, tmp_path, capsys):
    """At full size, as a user does it."""
    model = timm.create_model('swin_tiny_patch4_window7_224').eval()
    src, out = tmp_path / 'swin_t.pth', tmp_path / 'rp.safetensors'
    torch.save(dict(model={'module.x': torch.zeros(1)},
                    state_dict_ema={f'module.{k}': v
                                    for k, v in model.state_dict().items()}),
               src)
    code = tool.main([str(src), str(out), '--arch', 'rp_swin_tiny',
                      '--options', 'attention=rp,rp,window,window',
                      'num_representatives=9'])
    printed = capsys.readouterr().out
    assert code == 0
    assert "names in the file start with 'module.'" in printed
    assert "were under 'state_dict_ema'" in printed
    assert 'RPSwin from Swin, names of timm: 167 tensors' in printed
    assert 'left out, a classifier: module.head.fc.weight' in printed
    with safetensors.safe_open(out, 'pt') as file:
        meta = json.loads(file.metadata()['mmrpa'])
    assert meta['source'] == 'swin_t.pth'
    assert meta['arch'] == 'rp_swin_tiny' and meta['backbone'] == 'RPSwin'
    assert meta['attention'] == ['rp', 'rp', 'window', 'window']
    new = {k for k, start in meta['new'].items() if start == 'init'}
    assert new == {f'stages.{i}.blocks.{j}.attn.{part}' for i in (0, 1)
                   for j in (0, 1) for part in ('anchors', 'interact_weight')
                   } | {f'norm{i}.norm.{part}' for i in (0, 1, 2)
                        for part in ('weight', 'bias')}
    backbone = RPSwin(
        'tiny', attention=['rp', 'rp', 'window', 'window'],
        num_representatives=9, out_indices=(3, ),
        init_cfg=dict(type='Pretrained', checkpoint=str(out))).eval()
    backbone.init_weights()
    # The last two stages are the source's, to float32's rounding.
    with torch.no_grad():
        tokens = torch.randn(1, 28 * 28, 192)
        ours, shape = backbone.stages[2](tokens, (28, 28))
        ours, shape = backbone.stages[3](ours, shape)
        theirs = model.layers[2](tokens.view(1, 28, 28, 192))
        theirs = model.layers[3](theirs).flatten(1, 2)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('dwc', ['zero', 'average', 'init'])
def test_a_config_names_the_backbone(tool, swin, tmp_path, capsys, dwc):
    src, out = tmp_path / 'a.pth', tmp_path / 'b.pth'
    torch.save(swin.state_dict, src)
    config = tmp_path / 'config.py'
    config.write_text(
        "model = dict(detector=dict(backbone=dict(type='mmrpa.RPSwin', "
        f'arch={swin.options["arch"]!r}, window_size=4, attention="rp", '
        "init_cfg=dict(type='Pretrained', checkpoint='no.pth'))))\n")
    assert tool.main([str(src), str(out), '--config', str(config), '--dwc',
                      dwc]) == 0
    capsys.readouterr()
    checkpoint = read_checkpoint(out)
    name = 'stages.0.blocks.0.attn.dwc.weight'
    start = checkpoint.meta['new'][name]
    assert start == dict(zero='zeros', average='the local average',
                         init='init')[dwc]
    assert (name in checkpoint.state_dict) == (dwc != 'init')
    assert checkpoint.meta['arch'] == str(config)
    twin = tmp_path / 'twin.pth'
    assert tool.main([str(src), str(twin), '--config', str(config),
                      '--options', 'attention=window']) == 0
    backbone = swin.twin(init_cfg=dict(type='Pretrained',
                                       checkpoint=str(twin)))
    backbone.init_weights()
    with torch.no_grad():
        for ours, theirs in zip(backbone(images()), swin.maps, strict=True):
            torch.testing.assert_close(ours, theirs)


def arguments(tmp_path, *more):
    return [str(tmp_path / 'a.pth'), str(tmp_path / 'out.pth'), *more]


BAD = {
    'arch': (['--arch', 'rp_swin_tini'], "did you mean 'rp_swin_tiny'"),
    'no-file': (['--arch', 'rp_swin_tiny'], 'does not exist'),
    'option': (['--arch', 'rp_swin_tiny', '--options', 'windowsize=3'],
               "no argument 'windowsize'"),
    'config': (['--config', 'no.py'], r'no.py'),
}


@pytest.mark.parametrize('more,match', BAD.values(), ids=BAD)
def test_bad_arguments(tool, tmp_path, capsys, more, match):
    assert tool.main(arguments(tmp_path, *more)) == 2
    check_error(capsys, match)
    assert os.listdir(tmp_path) == []


def check_error(capsys, match):
    out, err = capsys.readouterr()
    assert out == '' and len(err.splitlines()) == 1
    assert err.startswith('convert_checkpoint: ') and match in err, err


class Payload:

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, 'w')


def test_files_that_are_not_for_the_backbone(tool, swin, tmp_path, capsys):
    src = tmp_path / 'a.pth'
    torch.save(swin.state_dict, src)
    big = arguments(tmp_path, '--arch', 'rp_pvt_tiny')
    assert tool.main(big) == 2
    check_error(capsys, 'looks like Swin with embed_dims (8, 16, 32, 64) and '
                'depths (2, 2, 2, 1)')
    torch.save(dict(model=swin.state_dict, x=Payload(tmp_path / 'pwned')),
               src)
    assert tool.main(big) == 2
    check_error(capsys, 'refused')
    src.write_bytes(src.read_bytes()[:1000])
    assert tool.main(big) == 2
    check_error(capsys, 'damaged')
    src.write_text('<html>')
    assert tool.main(big) == 2
    check_error(capsys, 'web page')
    assert os.listdir(tmp_path) == ['a.pth']


def test_the_arch_that_fits_is_named(tool, tmp_path, capsys):
    model = timm.create_model('deit_tiny_patch16_224')
    torch.save(model.state_dict(), tmp_path / 'a.pth')
    assert tool.main(arguments(tmp_path, '--arch', 'rp_deit_small')) == 2
    check_error(capsys, 'looks like DeiT with embed_dims 192 and depth 12 '
                '(names of the official repository and timm); --arch '
                'rp_deit_tiny fits it')
    out = tmp_path / 'out.pth'
    assert not out.exists()
    assert tool.main(arguments(tmp_path, '--arch', 'rp_deit_tiny')) == 0
    assert tool.main([str(out), str(out), '--arch', 'rp_deit_tiny']) == 2
    capsys.readouterr()


def test_configs_that_name_no_backbone_of_ours(tool, swin, tmp_path, capsys):
    torch.save(swin.state_dict, tmp_path / 'a.pth')
    config = tmp_path / 'config.py'
    for text, match in (("model = dict(backbone=dict(type='ResNet'))",
                         "got 'ResNet'"), ('x = 1', 'got None'),
                        ('model = dict(', 'does not parse')):
        config.write_text(text)
        assert tool.main(arguments(tmp_path, '--config', str(config))) == 2
        check_error(capsys, match)
    assert SMALL  # the options of a whole arch by the command line
    code = tool.main(arguments(tmp_path, '--arch', 'rp_swin_tiny',
                               '--options', *SMALL))
    assert code == 0, capsys.readouterr().err


@pytest.mark.parametrize('name, dwc', [
    ('timm_swin', 'average'), ('timm_swin', None), ('mmdet_pvt', 'zero'),
    ('official_cswin', None), ('timm_deit_plain', None)])
def test_calibration_brings_it_closer_to_its_source(tool, tmp_path, capsys,
                                                    name, dwc):
    source, folder = SOURCES[name](), tmp_path / 'images'
    src, config = tmp_path / 'src.pth', tmp_path / 'config.py'
    torch.save(source.state_dict, src)
    options = {**source.options, 'attention': 'rp', 'num_representatives': 16}
    config.write_text(f"""
model = dict(
    backbone=dict(type='mmrpa.{source.cls.__name__}', **{options!r}),
    data_preprocessor=dict(mean=[9.] * 3, std=[50.] * 3, bgr_to_rgb=True))
""")
    folder.mkdir()
    for i in range(8):
        pixels = torch.nn.functional.interpolate(torch.rand(1, 3, 8, 8), (
            128, 128))[0]
        save_image(pixels, folder / f'{i}.png')
    command = [str(src), '', '--config', str(config),
               *([] if dwc is None else ['--dwc', dwc])]
    outs = [tmp_path / 'plain.pth', tmp_path / 'calibrated.pth']
    for out, more in zip(outs, ([], ['--calibrate', str(folder),
                                     '--calibration-size', '128', '128']),
                         strict=True):
        command[1] = str(out)
        assert tool.main([*command, *more]) == 0
    printed = capsys.readouterr().out
    assert '16 anchors from' in printed and 'start: from images' in printed
    assert ('K and V fitted' in printed) == (name == 'mmdet_pvt')
    batch = (load_images(folder, (128, 128), mean=[9.] * 3, std=[50.] * 3)
             ).double()
    teacher = source.twin()
    twin = convert(source.state_dict, teacher)[0]
    teacher.load_state_dict({**teacher.state_dict(), **twin})
    errors = []
    for out in outs:
        student = source.cls(**options)
        state = read_checkpoint(out).state_dict
        student.load_state_dict({**student.state_dict(), **state})
        with torch.no_grad():
            pairs = zip(student.double().eval()(batch), teacher(batch),
                        strict=True)
            errors.append([((a - b)**2).mean() / (b**2).mean()
                           for a, b in pairs])
    assert errors[1][0] < errors[0][0] and sum(errors[1]) < 0.9 * sum(
        errors[0]), errors


def test_bad_folder_of_images(tool, swin, tmp_path, capsys):
    torch.save(swin.state_dict, tmp_path / 'a.pth')
    options = ['--arch', 'rp_swin_tiny', '--options', *SMALL]
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'bad').mkdir()
    (tmp_path / 'bad/x.png').write_bytes(b'no image')
    for folder, match in (('no/such', 'is not a folder'),
                          ('empty', 'no images in'), ('bad', 'x.png')):
        assert tool.main(arguments(tmp_path, *options, '--calibrate',
                                   str(tmp_path / folder))) == 2
        check_error(capsys, match)
    assert not (tmp_path / 'out.pth').exists()
