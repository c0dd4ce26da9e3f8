"""Loading weights: the right ones exactly, the wrong ones never."""

import pytest
import torch
from mmengine.runner.checkpoint import load_checkpoint
from zoo import build

from mmrpa.backbones import checkpoint
from mmrpa.weights import convert, write_checkpoint


def save(path, model, prefix='', wrap=True):
    state = {prefix + k: v for k, v in model.state_dict().items()}
    state['head.fc.weight'] = torch.zeros(3, 3)
    torch.save(dict(state_dict=state) if wrap else state, path)
    return str(path)


def pretrained(path, **options):
    return dict(type='Pretrained', checkpoint=path, **options)


@pytest.mark.parametrize('prefix', ['', 'backbone.', 'module.backbone.',
                                    'student.detector.backbone.'])
@pytest.mark.parametrize('named', [True, False], ids=['named', 'found'])
@pytest.mark.parametrize('wrap', [True, False], ids=['wrapped', 'bare'])
def test_pretrained_loads_exactly(tmp_path, prefix, named, wrap):
    source = build('swin', out_indices=(3, ))  # a classifier: norm3 only
    path = save(tmp_path / 'a.pth', source, prefix, wrap)
    options = dict(prefix=prefix) if named else {}
    model = build('swin', init_cfg=pretrained(path, **options))
    before = model.norm0.norm.weight.clone()
    model.init_weights()
    for name, value in source.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    assert torch.equal(model.norm0.norm.weight, before)
    with torch.no_grad():
        model.stem.norm.weight.zero_()
    model.init_weights()  # the second call must not undo training
    assert model.stem.norm.weight.abs().sum() == 0


def test_pretrained_says_how_much_was_loaded(tmp_path, monkeypatch):
    source = build('swin', out_indices=(3, ))
    path = save(tmp_path / 'a.pth', source)
    lines = []
    monkeypatch.setattr(checkpoint, 'print_log',
                        lambda text, logger: lines.append(text))
    build('swin', out_indices=(3, ), init_cfg=pretrained(path)).init_weights()
    n = len(source.state_dict())
    assert lines == [
        f'RPSwin: loaded {n} tensors, 100.0% of the parameters, from {path}; '
        '0 position tables were resized'
    ]


def test_stages_that_are_not_built_may_be_in_the_checkpoint(tmp_path):
    path = save(tmp_path / 'a.pth', build('swin'))
    build('swin', out_indices=(0, 1), init_cfg=pretrained(path)).init_weights()


WRONG = {
    'other-width': (dict(
        arch=dict(
            embed_dims=(16, 16, 24, 32), depths=(1, 2, 1, 1),
            num_heads=(2, 2, 4, 4), mlp_ratios=2)), r'of another shape: stem'),
    'deeper': (dict(
        arch=dict(
            embed_dims=(8, 16, 24, 32), depths=(1, 2, 3, 1),
            num_heads=(2, 2, 4, 4), mlp_ratios=2)),
               r'unexpected: stages\.2\.blocks\.1'),
    'shallower': (dict(
        arch=dict(
            embed_dims=(8, 16, 24, 32), depths=(1, 1, 1, 1),
            num_heads=(2, 2, 4, 4), mlp_ratios=2)),
                  r'missing: stages\.1\.blocks\.1'),
    'other-m': (dict(num_representatives=7), r'4 of another shape|5 of anoth'),
    'other-attention': (dict(attention='window'),
                        r'missing: stages\.0\.blocks\.0\.attn\.anchors'),
}


@pytest.mark.parametrize('options,match', WRONG.values(), ids=WRONG)
@pytest.mark.parametrize('how', ['pretrained', 'load_from'])
def test_checkpoint_of_another_arch_is_an_error(tmp_path, options, match, how):
    path = save(tmp_path / 'a.pth', build('swin', **options), 'backbone.')
    model = build('swin', init_cfg=pretrained(path))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match=match) as info:
        if how == 'pretrained':
            model.init_weights()
        else:  # what Runner does with load_from, --resume and the test script
            load_checkpoint(
                torch.nn.ModuleDict(dict(backbone=model)), path)
    assert 'does not fit this RPSwin' in str(info.value)
    assert 'Build the backbone with the arch' in str(info.value)
    assert 'prefix' not in str(info.value)  # it is not to blame
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_checkpoint_of_something_else_is_an_error(tmp_path):
    path = str(tmp_path / 'a.pth')
    torch.save(dict(state_dict={'layer1.weight': torch.zeros(3)}), path)
    with pytest.raises(ValueError, match=r'missing.*(?s:.)*prefix='):
        build('swin', init_cfg=pretrained(path)).init_weights()


def test_two_backbones_in_a_checkpoint_are_an_error(tmp_path):
    path = tmp_path / 'a.pth'
    torch.save({prefix + k: v for k, v in build('swin').state_dict().items()
                for prefix in ('student.', 'teacher.')}, path)
    with pytest.raises(ValueError, match=r"'student\.', 'teacher\.'; say"):
        build('swin', init_cfg=pretrained(str(path))).init_weights()
    build('swin', init_cfg=pretrained(
        str(path), prefix='teacher')).init_weights()


def test_missing_file_and_bad_init_cfg_are_named(tmp_path):
    path = str(tmp_path / 'no.pth')
    with pytest.raises(FileNotFoundError, match=r'no\.pth'):
        build('swin', init_cfg=pretrained(path)).init_weights()
    with pytest.raises(ValueError, match='Kaiming'):
        build('swin', init_cfg=dict(type='Kaiming')).init_weights()
    with pytest.raises(ValueError, match='takes checkpoint and prefix'):
        build('swin', init_cfg=pretrained(path, strict=True)).init_weights()


@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
def test_a_converted_file_says_what_is_new_in_it(tmp_path, monkeypatch,
                                                 suffix):
    """From the local twin to RPAttention, as convert_checkpoint.py does."""
    twin = build('swin', attention='window', out_indices=(3, ))
    model = build('swin')
    state, report = convert(twin.state_dict(), model)
    path = str(tmp_path / f'a{suffix}')
    write_checkpoint(path, state, dict(new=report.new))
    lines = []
    monkeypatch.setattr(checkpoint, 'print_log',
                        lambda text, logger: lines.append(text))
    model = build('swin', init_cfg=pretrained(path))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.init_weights()
    blocks = sum(model.arch['depths'])
    for name, value in model.state_dict().items():
        assert torch.equal(value, state.get(name, before[name])), name
        assert ('.dwc.' not in name) or value.abs().max() == 0
    # Anchors and Interact of each block, and three norms of two tensors.
    line, = lines
    assert f'loaded {len(state)} tensors' in line
    assert f'; {2 * blocks + 6} tensors are not in it and stay new' in line
    assert 'expected' not in line
    # They are explicit: another attention lacks what the file does not name.
    with pytest.raises(ValueError, match='missing.*bias_table'):
        build('swin', attention=['rp', 'rp', 'rp', 'window'],
              init_cfg=pretrained(path)).init_weights()
    model = build('swin', norm_cfg=None, out_indices=(0, 1, 2),
                  init_cfg=pretrained(path))
    model.init_weights()
    last = [k for k in state if k.startswith(('stages.3.', 'norm3.'))]
    assert f'; {len(last)} tensors in it were not expected' in lines[-1]


def test_public_weights_are_named(tmp_path):
    path = tmp_path / 'a.pth'
    torch.save({name: torch.zeros(1) for name in (
        'layers.0.blocks.0.attn.relative_position_bias_table',
        'patch_embed.proj.weight')}, path)
    with pytest.raises(ValueError, match=r'weights of swin by the names of '
                       r'timm: tools/convert_checkpoint\.py'):
        build('swin', init_cfg=pretrained(str(path))).init_weights()


class Payload:
    """A pickle that makes a file when it is loaded."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, 'w')


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    """mmengine's own loading would run it."""
    target = tmp_path / 'pwned'
    path = tmp_path / 'a.pth'
    torch.save(dict(state_dict=build('swin').state_dict(),
                    x=Payload(target)), path)
    with pytest.raises(ValueError, match='refused'):
        build('swin', init_cfg=pretrained(str(path))).init_weights()
    assert not target.exists()
