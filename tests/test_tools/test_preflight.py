"""mmrpa.preflight: each mistake made for real in small files."""

import json
import subprocess
import sys
from pathlib import Path

import mmdet
import pytest
import torch
from mmdet.registry import DATASETS
from mmengine.config import Config
from mmengine.optim import OptimWrapper

from mmrpa.coco_categories import read_categories
from mmrpa.cpu_amp import amp_on_cpu
from mmrpa.preflight import (
    ConfigError,
    MissingPathError,
    check_config,
    find_problems,
    type_name,
)

HOSTS = ['mmpretrain', 'mmdet', 'mmseg']
TRAIN = 'train_dataloader.dataset'


@pytest.fixture
def make(configs, data):
    """A function (host, changes by dotted key) -> Config."""

    def build(host: str, **changes: object) -> Config:
        cfg = Config(configs[host](data))
        cfg.merge_from_dict({
            key.replace('__', '.'): value
            for key, value in changes.items()
        })
        return cfg

    return build


def complaint(cfg: Config, error: type = ConfigError, **kwargs) -> list[str]:
    """The problems that ``check_config`` reports, one a line."""
    with pytest.raises(error) as caught:
        check_config(cfg, **kwargs)
    # ConfigError proper, unless a missing path was asked for.
    assert type(caught.value) is error
    head, *problems = str(caught.value).splitlines()
    assert f'{len(problems)} problem(s)' in head
    return problems


def coco(path: Path, *names: str, annotations: list | None = None) -> Path:
    """Write an annotation file with these categories."""
    path.write_text(
        json.dumps(
            dict(
                images=[],
                annotations=annotations or [],
                categories=[
                    dict(id=i, name=name) for i, name in enumerate(names)
                ])))
    return path


@pytest.mark.parametrize('host', HOSTS)
def test_good_configs_pass(host, make):
    assert check_config(make(host), ('train', 'val', 'test')) == []


def test_errors_are_the_builtin_ones():
    assert issubclass(MissingPathError, FileNotFoundError)
    assert issubclass(ConfigError, ValueError)
    assert not issubclass(ConfigError, FileNotFoundError)


@pytest.mark.parametrize('host, key, value', [
    ('mmdet', 'data_root', 'no/such'),
    ('mmdet', 'ann_file', 'no.json'),
    ('mmdet', 'data_prefix.img', 'no'),
    ('mmseg', 'data_prefix.img_path', 'no'),
    ('mmseg', 'data_prefix.seg_map_path', 'no'),
    ('mmseg', 'ann_file', 'no.txt'),
    ('mmpretrain', 'data_prefix', 'no'),
    ('mmpretrain', 'ann_file', '/no/such.txt'),
])
def test_missing_path(host, key, value, make):
    problem, = complaint(make(host, **{f'{TRAIN}.{key}': value}),
                         MissingPathError)
    assert f'{TRAIN}.{key}={value!r} does not exist' in problem
    assert f'--cfg-options {TRAIN}.{key}=PATH' in problem


@pytest.mark.parametrize('split', ['train', 'val', 'test'])
def test_only_the_splits_asked_for(split, make):
    cfg = make('mmdet', **{f'{split}_dataloader.dataset.ann_file': 'no.json'})
    others = {'train', 'val', 'test'} - {split}
    assert check_config(cfg, sorted(others)) == []
    problem, = complaint(cfg, MissingPathError, splits=(split, ))
    assert problem.startswith(f'- {split}_dataloader.dataset.ann_file=')


def test_unknown_split(make):
    with pytest.raises(ConfigError, match='vla'):
        check_config(make('mmdet'), ('vla', ))


@pytest.mark.parametrize('wrap, key', [
    (lambda d: dict(type='RepeatDataset', times=2, dataset=d), 'dataset'),
    (lambda d: dict(type='ClassBalancedDataset', oversample_thr=.1,
                    dataset=d), 'dataset'),
    (lambda d: dict(type='MultiImageMixDataset', pipeline=[],
                    dataset=dict(type='RepeatDataset', times=2, dataset=d)),
     'dataset.dataset'),
    (lambda d: dict(type='ConcatDataset', datasets=[{**d, 'data_root': '.',
                                                     'ann_file': ''}, d]),
     'datasets.1'),
], ids=['repeat', 'balanced', 'mix-of-repeat', 'concat'])
def test_wrappers_are_looked_into(wrap, key, make):
    cfg = make('mmdet')
    inner = cfg.train_dataloader.dataset.to_dict()
    inner.update(data_root='no/such')
    inner['data_prefix'] = {}
    cfg.train_dataloader.dataset = wrap(inner)
    problem, = complaint(cfg, MissingPathError)
    assert f"{TRAIN}.{key}.data_root='no/such'" in problem


def test_all_problems_at_once(make):
    cfg = make('mmdet', model__bbox_head__num_classes=80,
               train_dataloader__dataset__ann_file='no.json',
               val_evaluator__ann_file='no/val.json')
    problems = complaint(cfg, MissingPathError)
    assert len(problems) == 3
    for word in ('num_classes=80', 'no.json', 'no/val.json'):
        assert sum(word in problem for problem in problems) == 1


@pytest.mark.parametrize('as_list', [False, True])
def test_missing_evaluator_file(as_list, make):
    cfg = make('mmdet', val_evaluator__ann_file='no/val.json')
    key = 'val_evaluator.ann_file'
    if as_list:
        cfg.val_evaluator = [dict(type='Other'), cfg.val_evaluator]
        key = 'val_evaluator.1.ann_file'
    problem, = complaint(cfg, MissingPathError)
    assert f"{key}='no/val.json' does not exist" in problem


def test_evaluator_with_another_file_is_noted(make, data):
    other = str(data / 'det/train.json')
    note, = check_config(make('mmdet', val_evaluator__ann_file=other))
    assert f'val_evaluator.ann_file={other!r} is another file' in note


def test_other_backends_are_left_alone_and_named(make):
    cfg = make('mmdet', **{
        f'{TRAIN}.data_root': 'no/such',
        f'{TRAIN}.backend_args': dict(backend='petrel'),
        'val_dataloader.dataset.data_root': 's3://bucket/coco',
    })
    cfg.val_evaluator.ann_file = 's3://bucket/coco/val.json'
    notes = check_config(cfg)
    assert all(note.startswith('not checked: ') for note in notes)
    text = '\n'.join(notes)
    assert f"{TRAIN}.data_root='no/such' (backend 'petrel')" in text
    assert "val_dataloader.dataset.data_root='s3://bucket/coco'" in text
    assert "val_evaluator.ann_file='s3://bucket/coco/val.json'" in text
    # One note for each: its root stands for all that lies below.
    assert len(notes) == 3


def test_local_backend_is_checked(make):
    cfg = make('mmdet', **{
        f'{TRAIN}.data_root': 'no/such',
        f'{TRAIN}.backend_args': dict(backend='local'),
    })
    assert len(complaint(cfg, MissingPathError)) == 1


def test_class_that_the_file_lacks(make, tmp_path):
    path = coco(tmp_path / 'a.json', 'dot')
    problem, = complaint(make('mmdet', **{f'{TRAIN}.ann_file': str(path)}))
    assert "lacks 1 of the 2 classes of the config: 'bar'" in problem
    assert f'{TRAIN}.metainfo=dict(classes=...)' in problem


def test_category_that_the_config_lacks(make, tmp_path):
    path = coco(tmp_path / 'a.json', 'dot', 'bar', 'ring')
    cfg = make('mmdet', **{f'{TRAIN}.ann_file': str(path)})
    problem, = complaint(cfg)
    assert "has 1 categories that the config lacks: 'ring'" in problem
    assert '--allow-subset' in problem
    assert check_config(cfg, allow_subset=True) == []


def test_ten_names_at_most(make, tmp_path):
    names = [f'n{i}' for i in range(13)]
    path = coco(tmp_path / 'a.json', 'dot', 'bar', *names)
    problem, = complaint(make('mmdet', **{f'{TRAIN}.ann_file': str(path)}))
    assert "'n9' and 3 more" in problem
    assert "'n10'" not in problem


def test_classes_of_the_dataset_type(make):
    cfg = make('mmdet', model__bbox_head__num_classes=80)
    del cfg.train_dataloader.dataset['metainfo']
    problems = complaint(cfg, splits=('train', ))
    # Without metainfo mmdet takes COCO's 80 names.
    assert len(problems) == 2
    assert "lacks 80 of the 80 classes of the config: 'person'" in problems[0]
    assert "2 categories that the config lacks: 'dot', 'bar'" in problems[1]


def test_classes_in_another_order(make, data):
    cfg = make('mmdet', **{f'{TRAIN}.metainfo.classes': ('bar', 'dot')})
    problem, = complaint(cfg)
    assert "file 'dot', 'bar', config 'bar', 'dot'" in problem
    cfg.train_dataloader.dataset.pipeline = []
    dataset = DATASETS.build(cfg.train_dataloader.dataset)
    # This is what the message says: image 0 shows a dot, which is class 1
    # of the config, yet its label is 0.
    assert dataset.get_data_info(0)['instances'][0]['bbox_label'] == 0


def test_subclasses_that_read_otherwise_are_left_alone(make, tmp_path):
    path = coco(tmp_path / 'a.json', 'ring')
    cfg = make('mmdet', **{
        f'{TRAIN}.ann_file': str(path),
        f'{TRAIN}.type': 'LVISV1Dataset',
    })
    assert check_config(cfg, ('train', )) == []


@pytest.mark.parametrize('kind', ['NoSuchDataset', 'nohost.Dataset'])
def test_unknown_type_has_its_paths_checked(kind, make):
    cfg = make('mmdet', **{f'{TRAIN}.type': kind})
    assert check_config(cfg, ('train', )) == []
    cfg.train_dataloader.dataset.ann_file = 'no.json'
    assert len(complaint(cfg, MissingPathError, splits=('train', ))) == 1


@pytest.mark.parametrize('text, message', [
    ('{"categories": [', 'is not valid JSON'),
    ('{"images": []}', "has no list 'categories'"),
    ('[1]', "has no list 'categories'"),
    ('{"categories": [{"id": 1}]}', 'needs an id and a name'),
])
def test_broken_annotation_file(text, message, make, tmp_path):
    path = tmp_path / 'broken.json'
    path.write_text(text)
    problem, = complaint(make('mmdet', **{f'{TRAIN}.ann_file': str(path)}))
    assert message in problem
    assert 'broken.json' in problem


@pytest.mark.parametrize('place', ['first', 'last'])
def test_large_file_is_searched(place, tmp_path):
    categories = [dict(id=3, name='d\u00f6t, "x"]'), dict(id=1, name='bar')]
    # The word also stands where it does not belong, before and after.
    decoy = dict(note='"categories"', extra={'categories': [1, 2]})
    content = dict(info=decoy, images=[dict(id=i) for i in range(2000)])
    ends = dict(categories=categories)
    content = {**ends, **content} if place == 'first' else {
        **content, **ends, 'licenses': [decoy]}
    path = tmp_path / 'large.json'
    path.write_text(json.dumps(content, ensure_ascii=False),
                    encoding='utf-8')
    parsed, no_note = read_categories(str(path))
    searched, note = read_categories(str(path), large=100)
    assert parsed == searched == ('d\u00f6t, "x"]', 'bar')
    assert no_note == ''
    assert 'searched for its categories only' in note


def test_large_file_without_categories(tmp_path):
    path = tmp_path / 'large.json'
    path.write_text('{"images": [], "categories": 3}')
    with pytest.raises(ValueError, match="no list 'categories'"):
        read_categories(str(path), large=1)


def test_a_file_that_is_corrected_is_read_again(tmp_path):
    path = tmp_path / 'a.json'
    for name in ('crosss', 'cross', 'crown'):  # of another and the same size
        path.write_text(json.dumps(dict(categories=[dict(id=1, name=name)])))
        assert read_categories(str(path)) == ((name, ), '')


@pytest.mark.parametrize('removed', [1, 3, 30])
def test_large_file_that_is_cut_short(removed, tmp_path):
    """By a download that was interrupted; its categories are there."""
    path = tmp_path / 'large.json'
    text = json.dumps(dict(categories=[dict(id=1, name='a')],
                           annotations=[dict(id=i) for i in range(20)]))
    path.write_text(text + '\n \n')
    assert read_categories(str(path), large=1)[0] == ('a', )
    path.write_text(text[:-removed])
    with pytest.raises(ValueError, match='large.json.*as if it was cut'):
        read_categories(str(path), large=1)


HEADS = dict(
    rpn_head=dict(num_classes=1),
    roi_head=dict(
        bbox_head=[dict(num_classes=5), dict(num_classes=2)],
        mask_head=dict(num_classes=7),
        semantic_head=dict(num_classes=183)))


def test_num_classes_of_two_stage_heads(make):
    cfg = make('mmdet')
    cfg.model = HEADS
    problems = complaint(cfg)
    assert len(problems) == 2
    for problem, head, number in zip(
            problems, ('bbox_head.0', 'mask_head'), (5, 7), strict=True):
        key = f'model.roi_head.{head}.num_classes'
        assert problem.startswith(f'- {key}={number}, but {TRAIN} ')
        assert f'--cfg-options {key}=2' in problem


@pytest.mark.parametrize('auxiliary', [
    dict(num_classes=19), [dict(num_classes=2), dict(num_classes=19)]
], ids=['one', 'two'])
def test_num_classes_of_segmentation_heads(auxiliary, make):
    cfg = make('mmseg', model__decode_head__num_classes=150)
    cfg.model.auxiliary_head = auxiliary
    problems = complaint(cfg, splits=('train', ))
    last = '.1' if isinstance(auxiliary, list) else ''
    assert [p.split(',')[0] for p in problems] == [
        '- model.decode_head.num_classes=150',
        f'- model.auxiliary_head{last}.num_classes=19'
    ]


def test_boundaries_are_no_classes(make):
    """mmseg's STDC: a head of two classes, whatever the data set has."""
    cfg = make('mmseg')
    cfg.model.auxiliary_head = [dict(type='STDCHead', num_classes=2)]
    cfg.model.decode_head.num_classes = 3
    assert all('auxiliary' not in p for p in complaint(cfg))


# Configs that mmdet ships, whose heads have another number of classes than the
# data, and train all the same.
@pytest.mark.parametrize('name', [
    'panoptic_fpn/panoptic-fpn_r50_fpn_1x_coco',  # RoI heads know things only
    'qdtrack/qdtrack_faster-rcnn_r50_fpn_8xb2-4e_mot17halftrain_test-'
    'mot17halfval',  # one class of MOT's 13
    'deepsort/deepsort_faster-rcnn_r50_fpn_8xb2-4e_mot17train_test-mot17test',
    # Classes are words of a text.
    'glip/lvis/glip_atss_swin-t_a_fpn_dyhead_pretrain_zeroshot_mini-lvis',
    'mm_grounding_dino/coco/grounding_dino_swin-t_finetune_16xb4_1x_coco'])
def test_heads_that_count_otherwise(name):
    configs = Path(mmdet.__file__).parent / '.mim' / 'configs'
    cfg = Config.fromfile(configs / f'{name}.py')
    problems, _ = find_problems(cfg, ('train', 'val', 'test'), False)
    assert {problem.code for problem in problems} <= {'missing-path'}


def test_things_are_what_roi_heads_count(make):
    cfg = make('mmdet', **{
        f'{split}_dataloader.dataset.{key}': value
        for split in ('train', 'val', 'test') for key, value in (
            ('type', 'CocoPanopticDataset'),
            ('metainfo.thing_classes', ('cat', )),
            ('metainfo.stuff_classes', ('sky', )))})
    cfg.model = dict(roi_head=dict(bbox_head=dict(num_classes=2)))
    assert all('roi_head.bbox_head.num_classes=1' in problem
               for problem in complaint(cfg))
    cfg.model.roi_head.bbox_head.num_classes = 1
    assert check_config(cfg) == []


def test_types_that_are_classes(monkeypatch):
    """Configs in pure Python have no names."""
    monkeypatch.setattr('mmengine.device.get_device', lambda: 'cpu')
    assert type_name(dict(type=OptimWrapper)) == 'OptimWrapper'
    assert type_name(dict(type='mmengine.OptimWrapper')) == 'OptimWrapper'
    assert type_name(dict()) == type_name(None) == ''
    cfg = dict(optim_wrapper=dict(type=OptimWrapper))
    assert amp_on_cpu(cfg, True, ['--amp', 'x']) == [
        'x', '--cfg-options', 'optim_wrapper.type=mmrpa.CPUAmpOptimWrapper']
    with pytest.raises(ConfigError, match="got 'SGD'"):
        amp_on_cpu(dict(optim_wrapper=dict(type=torch.optim.SGD)), True, [])


def test_num_classes_of_a_classifier(make):
    problem, = complaint(make('mmpretrain', model__head__num_classes=3))
    assert problem.startswith('- model.head.num_classes=3, but ')


def test_num_classes_against_folders(make):
    cfg = make('mmpretrain', model__head__num_classes=3)
    for loader in (cfg.train_dataloader, cfg.val_dataloader):
        del loader.dataset['metainfo']
    problem, = complaint(cfg, splits=('train', ))
    assert "has 2 classes: 'bar', 'dot'" in problem


def test_folders_that_are_not_the_classes(make):
    cfg = make('mmpretrain', **{
        f'{TRAIN}.type': 'ImageNet',
        f'{TRAIN}.data_prefix': '',
        f'{TRAIN}.split': 'train',
    })
    del cfg.train_dataloader.dataset['metainfo']
    cfg.model.head.num_classes = 1000
    problem, = complaint(cfg, splits=('train', ))
    assert 'has 1000 classes' in problem
    assert "has 2 folders: 'bar', 'dot'" in problem
    assert "type='CustomDataset'" in problem


@pytest.mark.parametrize('download', [None, False])
def test_datasets_that_download_themselves(download, make):
    cfg = make('mmpretrain', model__head__num_classes=10)
    dataset = dict(type='CIFAR10', data_root='no/such', split='train')
    if download is not None:
        dataset['download'] = download
    cfg.train_dataloader.dataset = dataset
    if download is None:
        assert check_config(cfg, ('train', )) == []
    else:
        assert len(complaint(cfg, MissingPathError, splits=('train', ))) == 1


@pytest.mark.parametrize('host', HOSTS)
def test_classes_as_a_string(host, make):
    problem, = complaint(
        make(host, **{f'{TRAIN}.metainfo.classes': 'dot'}), splits=('train', ))
    assert f"{TRAIN}.metainfo.classes='dot' is a string" in problem
    assert "('dot', )" in problem


def test_classes_from_a_file(make, tmp_path):
    names = tmp_path / 'names.txt'
    names.write_text('dot\nbar\n')
    cfg = make('mmdet', **{f'{TRAIN}.metainfo.classes': str(names)})
    assert check_config(cfg) == []
    names.write_text('dot\nbar\nring\n')
    assert any("lacks 1 of the 3 classes of the config: 'ring'" in problem
               for problem in complaint(cfg))


def test_needs_no_torch():
    code = ('import sys, mmrpa.preflight; '
            'print(sorted({"torch", "mmengine"} & set(sys.modules)))')
    done = subprocess.run([sys.executable, '-c', code], text=True, check=True,
                          cwd=Path(__file__).parents[2], capture_output=True)
    assert done.stdout.strip() == '[]'
