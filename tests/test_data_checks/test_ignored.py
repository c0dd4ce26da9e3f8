"""Labels are judged as mmseg's losses and metric take them."""

import contextlib

import numpy as np
import pytest
import torch
from mmengine.structures import PixelData
from mmseg.datasets import ADE20KDataset, BaseSegDataset, CityscapesDataset
from mmseg.datasets.transforms import LoadAnnotations
from mmseg.evaluation import IoUMetric
from mmseg.models.data_preprocessor import SegDataPreProcessor
from mmseg.models.losses import CrossEntropyLoss, OhemCrossEntropy, TverskyLoss
from mmseg.registry import TRANSFORMS
from mmseg.structures import SegDataSample
from PIL import Image

from mmrpa.data_checks import check_data
from mmrpa.data_checks.ignored import Consumer, find_consumers

# Type, its classes here, reduce_zero_label.
DATASETS = [
    (BaseSegDataset, ('a', 'b', 'c'), False),
    (BaseSegDataset, ('a', 'b', 'c'), True),
    (ADE20KDataset, ('sky', 'wall'), True),
    (CityscapesDataset, ('car', 'road', 'sky'), False),
]
VALUES = [0, 1, 2, 3, 13, 19, 20, 21, 151, 254, 255]
IGNORED = [255, 20, 0, 2, None]
CASES = [(*dataset, ignored) for dataset in DATASETS for ignored in IGNORED]


def config(split: str, cls, classes, reduced, ignored, folder) -> dict:
    return dict(
        default_scope='mmseg',
        model=dict(decode_head=dict(num_classes=len(classes),
                                    ignore_index=ignored)),
        val_evaluator=dict(type='IoUMetric', ignore_index=ignored),
        **{
            f'{split}_dataloader': dict(
                dataset=dict(
                    type=cls.__name__, img_suffix='.jpg',
                    seg_map_suffix='.png', reduce_zero_label=reduced,
                    metainfo=dict(classes=classes),
                    data_prefix=dict(img_path=str(folder),
                                     seg_map_path=str(folder)),
                    pipeline=[dict(type='LoadImageFromFile'),
                              dict(type='LoadAnnotations')]))
        })


def write(folder, value: int) -> None:
    """A map of one value, and its image."""
    Image.new('RGB', (4, 4)).save(folder / 'x.jpg')
    Image.fromarray(np.full((4, 4), value, np.uint8)).save(folder / 'x.png')


def load(cls, classes, reduced, folder) -> torch.Tensor:
    """The map as mmseg loads it, (1, 4, 4)."""
    arguments = dict(seg_map_path=str(folder / 'x.png'), seg_fields=[],
                     reduce_zero_label=reduced,
                     label_map=cls.get_label_map(classes))
    LoadAnnotations().transform(arguments)
    return torch.from_numpy(arguments['gt_seg_map'].astype(np.int64))[None]


@pytest.mark.parametrize('cls, classes, reduced, ignored', CASES)
def test_as_the_loss_takes_it(cls, classes, reduced, ignored, tmp_path):
    """What stops a loss is found, all else is not."""
    # The softmax's loss takes no None.
    loss = CrossEntropyLoss(use_sigmoid=ignored is None)
    seen = set()
    for value in VALUES:
        write(tmp_path, value)
        stops = True
        with contextlib.suppress(IndexError):
            loss(torch.zeros(1, len(classes), 4, 4),
                 load(cls, classes, reduced, tmp_path), ignore_index=ignored)
            stops = False
        found = check_data(config('train', cls, classes, reduced, ignored,
                                  tmp_path), ('train', )).findings.problems
        assert bool(found) == stops, value
        if stops and found[0].code == 'label-range':
            assert f'model.decode_head (ignore_index={ignored})' in (
                found[0].examples[0])
        seen.add(stops)
    assert seen == {True, False}


@pytest.mark.parametrize('cls, classes, reduced, ignored', [
    case for case in CASES if case[3] is not None])
def test_as_the_metric_takes_it(cls, classes, reduced, ignored, tmp_path):
    """A pixel that is not ignored has to count for a class."""
    seen = set()
    for value in VALUES:
        write(tmp_path, value)
        label = load(cls, classes, reduced, tmp_path)
        *_, area = IoUMetric.intersect_and_union(
            torch.zeros_like(label), label, len(classes), ignored)
        lost = area.sum() != (label != ignored).sum()
        found = check_data(config('val', cls, classes, reduced, ignored,
                                  tmp_path), ('val', )).findings.problems
        assert bool(found) == lost, value
        seen.add(bool(lost))
    assert seen == {True, False}


def pad_in_batch(labels: np.ndarray, **settings) -> torch.Tensor:
    """What SegDataPreProcessor makes of a map."""
    sample = SegDataSample(gt_sem_seg=PixelData(
        data=torch.from_numpy(labels)[None]))
    preprocessor = SegDataPreProcessor(size=(24, 24), **settings)
    batch = dict(inputs=[torch.zeros(3, 16, 16)], data_samples=[sample])
    return preprocessor(batch, True)['data_samples'][0].gt_sem_seg.data


def pad_by(kind: str):
    """A function that lets a transform pad a map."""

    def pad(labels: np.ndarray, **settings) -> torch.Tensor:
        data = dict(img=np.zeros((16, 16, 3), np.uint8), gt_seg_map=labels,
                    seg_fields=['gt_seg_map'], img_shape=(16, 16))
        if kind == 'RandomMosaic':
            data['mix_results'] = [data.copy() for _ in range(3)]
            settings.update(prob=1., img_scale=(24, 24),
                            center_ratio_range=(0.5, 0.6))
        else:
            settings.update(dict(prob=1., degree=(45, 45)) if
                            kind == 'RandomRotate' else dict(size=(24, 24)))
        transform = TRANSFORMS.build(dict(type=kind, **settings))
        return torch.from_numpy(transform.transform(data)['gt_seg_map'])[None]

    return pad


PADDINGS = {
    'data_preprocessor': (pad_in_batch, 'seg_pad_val'),
    'RandomRotate': (pad_by('RandomRotate'), 'seg_pad_val'),
    'RandomMosaic': (pad_by('RandomMosaic'), 'seg_pad_val'),
    'Pad': (pad_by('Pad'), 'pad_val'),
}


@pytest.mark.parametrize('ignored', [255, 0, 7])
@pytest.mark.parametrize('label', [None, 7, 2])
@pytest.mark.parametrize('name', PADDINGS)
def test_padding_as_the_loss_takes_it(name, label, ignored, tmp_path):
    """The label of padding is noted where it stops the loss; None: no label
    is named, and the host takes its own."""
    pad, argument = PADDINGS[name]
    settings = {} if label is None else {
        argument: dict(img=0, seg=label) if name == 'Pad' else label}
    labels = pad(np.ones((16, 16), np.uint8), **settings).long()
    assert (labels != 1).any()
    stops = True
    with contextlib.suppress(IndexError):
        CrossEntropyLoss()(torch.zeros(1, 3, *labels.shape[1:]), labels,
                           ignore_index=ignored)
        stops = False
    write(tmp_path, 1)
    cfg = config('train', BaseSegDataset, ('a', 'b', 'c'), False, ignored,
                 tmp_path)
    if name == 'data_preprocessor':
        cfg['model'][name] = dict(type='SegDataPreProcessor', **settings)
    else:
        cfg['train_dataloader']['dataset']['pipeline'].append(
            dict(type=name, **settings))
    report = check_data(cfg, ('train', ))
    assert report.findings.problems == []
    notes = [text for code, _, text in report.findings.notes
             if code == 'padding']
    assert len(notes) == stops
    if stops:
        assert f'model.decode_head (ignore_index={ignored})' in notes[0]
        assert name in notes[0]


def head(**settings) -> dict:
    return dict(type='FCNHead', num_classes=3, **settings)


@pytest.mark.parametrize('model, consumers', [
    (dict(decode_head=head()), [('decode_head', 'ignore_index', 255)]),
    (dict(decode_head=[head(), head(ignore_index=7)],
          auxiliary_head=head(ignore_index=None)),
     [('decode_head.0', 'ignore_index', 255),
      ('decode_head.1', 'ignore_index', 7),
      ('auxiliary_head', 'ignore_index', None)]),
    # Its labels are the edges between those of the map.
    (dict(auxiliary_head=[head(), dict(type='STDCHead', num_classes=2)]),
     [('auxiliary_head.0', 'ignore_index', 255)]),
    (dict(decode_head=dict(type='IterativeDecodeHead', ignore_index=3,
                           kernel_generate_head=head(ignore_index=7))),
     [('decode_head.kernel_generate_head', 'ignore_index', 7)]),
    (dict(decode_head=head(
        ignore_index=7, loss_decode=[dict(type='CrossEntropyLoss'),
                                     dict(type='mmseg.OhemCrossEntropy'),
                                     dict(type=TverskyLoss, ignore_index=5)])),
     [('decode_head', 'ignore_index', 7),
      ('decode_head.loss_decode.1', 'ignore_label', 255),
      ('decode_head.loss_decode.2', 'ignore_index', 5)]),
    (dict(decode_head=head(loss_decode=dict(type='TverskyLoss'))),
     [('decode_head.loss_decode', 'ignore_index', 255)]),
    (dict(roi_head=dict(mask_head=head())), []),
    (None, []),
])
def test_what_takes_the_labels_of_a_training(model, consumers):
    assert find_consumers(dict(model=model), 'train') == tuple(
        Consumer(f'model.{key}', *rest) for key, *rest in consumers)


@pytest.mark.parametrize('evaluator, consumers', [
    (dict(type='IoUMetric'), [('val_evaluator', 255)]),
    ([dict(type='CityscapesMetric'), dict(type='IoUMetric', ignore_index=0)],
     [('val_evaluator.1', 0)]),
    (dict(type='IoUMetric', format_only=True), []),
    (None, []),
])
def test_what_takes_the_labels_of_a_validation(evaluator, consumers):
    cfg = dict(model=dict(decode_head=head()), val_evaluator=evaluator)
    assert find_consumers(cfg, 'val') == tuple(
        Consumer(key, 'ignore_index', value) for key, value in consumers)


def test_losses_that_go_by_their_own_settings():
    """Whatever the head ignores, they take it or stop."""
    scores = torch.zeros(1, 3, 2, 2)
    scores[:, 2] = 1
    label = torch.tensor([[[7, 0], [0, 0]]])
    with pytest.raises(IndexError):
        OhemCrossEntropy()(scores, label)
    OhemCrossEntropy(ignore_label=7)(scores, label)
    loss = TverskyLoss()
    # A label that it does not ignore is the last class to it.
    assert loss(scores, label, ignore_index=7) == loss(
        scores, torch.tensor([[[2, 0], [0, 0]]]))
    assert loss(scores, label) != TverskyLoss(ignore_index=7)(scores, label)


def test_a_map_is_judged_by_all_that_use_it(tmp_path):
    """As trained on, and as validated on, though it is read once."""
    write(tmp_path, 7)
    arguments = (BaseSegDataset, ('a', 'b'), False, 7, tmp_path)
    cfg = config('train', *arguments)
    assert check_data(cfg).findings.problems == []
    cfg['val_dataloader'] = cfg['train_dataloader']
    assert check_data(cfg).findings.problems == []
    cfg['val_evaluator']['ignore_index'] = 255
    group, = check_data(cfg).findings.problems
    assert (group.code, group.count) == ('label-range', 1)
    assert group.examples[0].endswith(
        'not ignored by val_evaluator (ignore_index=255)')


@pytest.mark.parametrize('value, ignored, dataset_ignores, is_found', [
    (255, 255, 255, False),
    (7, 7, 255, False),  # the heads may stand for a metric that is not known
    (7, 255, 7, False),
    (7, 255, 255, True),
])
def test_without_a_metric_that_is_known(value, ignored, dataset_ignores,
                                        is_found, tmp_path):
    write(tmp_path, value)
    cfg = config('val', BaseSegDataset, ('a', 'b', 'c'), False, ignored,
                 tmp_path)
    cfg['val_evaluator'] = dict(type='mine.Metric')
    cfg['val_dataloader']['dataset']['ignore_index'] = dataset_ignores
    assert bool(check_data(cfg).findings.problems) == is_found
