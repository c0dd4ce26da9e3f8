"""Sample data to break, and the configs that read it."""

import json
import shutil
from collections.abc import Callable
from copy import deepcopy
from functools import cache
from pathlib import Path

import pytest
from helpers import load_tool
from mmengine.config import Config

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = dict(
    mmdet='mmdet/quickstart/mask-rcnn_rp-pvt-nano_fpn_1xb4_sample.py',
    mmseg='mmseg/quickstart/rp-pvt-nano_upernet_1xb8-300_sample-128x128.py',
    mmpretrain='mmpretrain/quickstart/rp-pvt-nano_1xb32_sample.py')
FOLDERS = dict(mmdet='coco', mmseg='ade', mmpretrain='imagenet')
SIZE = 48  # pixels


@cache
def read_config(host: str) -> Config:
    return Config.fromfile(ROOT / 'configs' / CONFIGS[host])


class DataSet:
    """A copy of the sample data of a host, and its config.

    Attributes:
        root (Path): Its folder.
        cfg (Config): The quickstart's config, on this folder.
        coco (dict): The annotations to train on; written by :meth:`save`.
    """

    def __init__(self, host: str, source: Path, target: Path) -> None:
        self.host = host
        self.root = target / FOLDERS[host]
        shutil.copytree(source / FOLDERS[host], self.root)
        self.cfg = deepcopy(read_config(host))
        for split in ('train', 'val', 'test'):
            self.cfg[f'{split}_dataloader'].dataset.data_root = str(self.root)
        self.train = self.cfg.train_dataloader.dataset
        if host == 'mmdet':
            path = self.root / 'annotations/instances_{}2017.json'
            for split in ('val', 'test'):
                self.cfg[f'{split}_evaluator'].ann_file = str(path).format(
                    'val')
            self.json = Path(str(path).format('train'))
            self.coco = json.loads(self.json.read_text())

    def save(self) -> None:
        """Write ``coco``, NaN as Python's json does."""
        if self.host == 'mmdet' and self.coco is not None:
            self.json.write_text(json.dumps(self.coco))

    def train_only(self) -> None:
        """Validate and test on the training's images."""
        for split in ('val', 'test'):
            self.cfg[f'{split}_dataloader'] = self.cfg.train_dataloader

    def files(self, pattern: str) -> list[Path]:
        """Files that a pattern finds, sorted."""
        found = sorted(self.root.glob(pattern))
        assert found, pattern
        return found


@pytest.fixture(scope='session')
def sample(tmp_path_factory) -> Path:
    """A small set of the tool that `make quickstart` uses."""
    tool = load_tool('make_sample_data')
    out = tmp_path_factory.mktemp('data') / 'sample'
    tool.make_sample_data(
        out,
        tool.Settings(image_size=SIZE, num_train=12, num_val=12,
                      num_cls_train=10, num_cls_val=5))
    return out


@pytest.fixture
def make(sample, tmp_path) -> Callable[[str], DataSet]:
    """A function: host -> a copy that may be broken."""
    return lambda host: DataSet(host, sample, tmp_path)
