"""The losses against loops; what learns and what does not."""

import pytest
import torch
from zoo import attentions, build

from mmrpa.transfer import attention_pairs, carry_twin
from mmrpa.transfer.align import (
    AttentionTransfer,
    relative_error,
    transfer_errors,
)
from mmrpa.transfer.images import (
    ImageFolderError,
    UnlabelledImages,
    list_images,
    load_images,
    read_normalisation,
)

FAMILIES = ['deit', 'pvt', 'swin', 'cswin']


def transfer_of(family, **student):
    teacher = build(family, attention=attentions(family)[-1])
    student = build(family, drop_path_rate=0.5, **student)
    carry_twin(teacher, student)
    return AttentionTransfer(teacher, student)


def error(output, target):
    """Image by image, in loops."""
    total = 0.
    for a, b in zip(output, target, strict=True):
        total += ((a - b)**2).sum() / (b**2).sum()
    return total / len(output)


@pytest.mark.parametrize('family', FAMILIES)
def test_layer_losses(family):
    transfer = transfer_of(family).train()
    images = torch.randn(2, 3, 64, 48)
    expected = {}
    pairs = dict((n, (a, b)) for n, a, b in attention_pairs(
        transfer.teacher, transfer.student))
    with torch.no_grad():
        x, hw = transfer.teacher.stem(images)
        for i, stage in enumerate(transfer.teacher.stages):
            if stage.downsample is not None:
                x, hw = stage.downsample(
                    x.transpose(1, 2).unflatten(-1, hw))
            if stage.pos_embed is not None:
                x = stage.pos_embed(x, hw)
            for j, block in enumerate(stage.blocks):
                own, new = pairs[f'stages.{i}.blocks.{j}.attn']
                given = block.norm1(x)
                key = f'loss_stage{i}'
                expected[key] = expected.get(key, 0) + error(
                    new(given, hw), own(given, hw)) / len(pairs)
                x = block(x, hw)
    actual = transfer(images)
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(actual[key].detach(), value)


@pytest.mark.parametrize('family', FAMILIES)
def test_feature_losses(family):
    transfer = transfer_of(family, norm_cfg=None).train()
    transfer.phase = 'features'
    images = torch.randn(2, 3, 64, 48)
    plain = build(family, attention=attentions(family)[-1], norm_cfg=None)
    plain.load_state_dict({k: v for k, v in
                           transfer.teacher.state_dict().items()
                           if k in plain.state_dict()})
    with torch.no_grad():
        maps = transfer.student(images), plain.eval()(images)
    if family == 'deit':  # maps leave the CLS token out
        transfer.student.with_cls_token = False
        targets = [t[:, 1:] for t in stage_tokens(transfer.teacher, images)]
        assert all(torch.equal(t.transpose(1, 2), m.flatten(2))
                   for t, m in zip(targets, maps[1], strict=True))
        return
    actual = transfer(images)
    for i, (out, target) in enumerate(zip(*maps, strict=True)):
        torch.testing.assert_close(actual[f'loss_stage{i}'].detach(),
                                   error(out, target) / len(maps[0]))


def stage_tokens(backbone, images):
    from mmrpa.transfer.align import stage_outputs
    with torch.no_grad():
        return stage_outputs(backbone, images)


@pytest.mark.parametrize('phase', ['layers', 'features'])
@pytest.mark.parametrize('family', FAMILIES)
def test_only_the_attention_that_differs_learns(family, phase):
    transfer = transfer_of(family).train()
    transfer.phase = phase
    assert transfer.training
    assert not transfer.teacher.training and not transfer.student.training
    sum(transfer(torch.randn(2, 3, 64, 64)).values()).backward()
    for name, parameter in transfer.named_parameters():
        learns = name.startswith('student.') and '.attn.' in name
        assert parameter.requires_grad == learns, name
        # DDP wants a gradient for each that learns.
        assert (parameter.grad is not None) == learns, name


def test_a_perfect_student_has_no_error_and_zeros_have_one():
    target = torch.randn(2, 6, 4)
    assert relative_error(target, target) == 0
    assert relative_error(torch.zeros(2, 6, 4), target) == pytest.approx(1)
    # An image counts the same, whatever its scale.
    scaled = target * torch.tensor([1., 100.]).view(2, 1, 1)
    off = scaled.clone()
    off[0] = 0
    assert relative_error(off, scaled) == pytest.approx(0.5)


def test_mixed_attention_and_reported_errors():
    transfer = transfer_of('swin', attention=['window', 'rp', 'window', 'rp'])
    images = torch.randn(2, 3, 64, 64)
    losses = transfer.layer_losses(images)
    assert set(losses) == {'loss_stage1', 'loss_stage3'}
    errors = transfer_errors(transfer, images)
    # Two of the three layers are in stage 1.
    assert errors['layers']['stage1'] == pytest.approx(
        losses['loss_stage1'].item() * 3 / 2)
    assert set(errors['features']) == {'stage1', 'stage2', 'stage3'}
    features = transfer.feature_losses(images)
    assert errors['features']['stage2'] == pytest.approx(
        features['loss_stage2'].item() * 3)


def test_frozen_stages_stay_frozen():
    transfer = transfer_of('pvt', frozen_stages=1)
    assert not any(p.requires_grad
                   for p in transfer.student.stages[0].parameters())
    assert transfer.student.stages[1].blocks[0].attn.anchors.requires_grad
    with pytest.raises(ValueError, match='frozen_stages=4 holds all'):
        transfer_of('pvt', frozen_stages=4)


# Images.


def test_images_of_a_folder(tmp_path):
    from PIL import Image
    (tmp_path / 'b/.hidden').mkdir(parents=True)
    for name in ('z.png', 'b/a.JPG', 'b/.hidden/no.png', 'b/.no.png'):
        Image.new('RGB', (40, 20), (255, 0, 10)).save(
            tmp_path / name, 'JPEG' if name.endswith('JPG') else 'PNG')
    (tmp_path / 'notes.txt').write_text('')
    Image.new('L', (20, 40), 7).save(tmp_path / 'grey.png')
    names = [str(p.relative_to(tmp_path)) for p in list_images(tmp_path)]
    assert names == ['b/a.JPG', 'grey.png', 'z.png']
    batch = load_images(tmp_path, (16, 24), None, mean=(5, 0, 0),
                        std=(10, 1, 2), to_rgb=True)
    assert batch.shape == (3, 3, 16, 24)
    torch.testing.assert_close(batch[2, :, 0, 0],
                               torch.tensor([25., 0., 5.]))
    torch.testing.assert_close(batch[1, :, 5, 5],
                               torch.tensor([0.2, 7., 3.5]))
    bgr = load_images(tmp_path, (16, 24), None, mean=(0, 0, 5),
                      std=(2, 1, 10), to_rgb=False)
    torch.testing.assert_close(bgr, batch.flip(1))
    chosen = [list_images(tmp_path, 2, seed) for seed in range(9)]
    assert all(len(c) == 2 for c in chosen)
    assert chosen[0] == list_images(tmp_path, 2, 0)
    assert len({tuple(c) for c in chosen}) > 1
    # The middle of an image that is wider than asked for.
    wide = Image.new('RGB', (60, 20))
    wide.paste((9, 9, 9), (20, 0, 40, 20))
    wide.save(tmp_path / 'b/a.JPG', 'PNG')
    view = UnlabelledImages(tmp_path, (20, 20))[0]['inputs']
    assert view.shape == (3, 20, 20) and (view == 9).all()


def test_views_depend_on_seed_epoch_and_image_alone(data_folder):
    images = UnlabelledImages(data_folder, (16, 16), augment=True, seed=1)
    torch.manual_seed(5)
    first = images[0]['inputs']
    after = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(after, torch.rand(3))  # no chance of others is used
    torch.manual_seed(6)
    assert torch.equal(images[0]['inputs'], first)
    images.epoch = 1
    assert not torch.equal(images[0]['inputs'], first)
    other = UnlabelledImages(data_folder, (16, 16), augment=True, seed=2)
    assert not torch.equal(other[0]['inputs'], first)


@pytest.fixture
def data_folder(tmp_path):
    from PIL import Image
    pixels = torch.randint(0, 255, (48, 48, 3), dtype=torch.uint8).numpy()
    Image.fromarray(pixels).save(tmp_path / 'a.png')
    return tmp_path


def test_bad_folders(tmp_path, data_folder):
    with pytest.raises(ImageFolderError, match="no/such' is not a folder"):
        list_images('no/such')
    with pytest.raises(ImageFolderError, match='2 images are asked for.*1'):
        list_images(data_folder, 2)
    bad = data_folder / 'bad.png'
    bad.write_bytes((data_folder / 'a.png').read_bytes()[:200])
    with pytest.raises(ImageFolderError, match=r'cannot read .*bad\.png'):
        load_images(data_folder, (8, 8))
    (data_folder / 'a.png').unlink()
    bad.rename(bad.with_suffix('.txt'))
    with pytest.raises(ImageFolderError, match='no images in.*ends in .bmp'):
        list_images(data_folder)


@pytest.mark.parametrize('cfg, to_rgb', [
    (dict(data_preprocessor=dict(mean=[1], std=[2], to_rgb=True)), True),
    (dict(model=dict(data_preprocessor=dict(
        mean=[1], std=[2], bgr_to_rgb=True))), True),
    (dict(model=dict(data_preprocessor=dict(mean=[1], std=[2]))), False),
    (dict(data_preprocessor=dict(mean=[3], std=[4]), model=dict(
        data_preprocessor=dict(mean=[1], std=[2], to_rgb=True))), True),
], ids=['mmpretrain', 'mmdet', 'bgr', 'both'])
def test_normalisation_of_a_config(cfg, to_rgb):
    assert read_normalisation(cfg) == dict(mean=[1], std=[2], to_rgb=to_rgb)


def test_a_config_without_normalisation():
    with pytest.raises(ValueError, match='no mean and std'):
        read_normalisation(dict(model=dict()))
