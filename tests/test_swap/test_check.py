"""run_step finds what is wrong with a model, and nothing where nothing is."""

from importlib.util import find_spec
from pathlib import Path

import pytest
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.runner import CheckpointLoader, checkpoint

from mmrpa.swap import probe, swap
from mmrpa.swap.check import StepError, run_step

CONFIGS = dict(
    mmdet='retinanet/retinanet_r50_fpn_1x_coco.py',
    mmseg='ocrnet/ocrnet_r101-d8_4xb2-40k_cityscapes-512x1024.py',
    mmpretrain='simsiam/simsiam_resnet50_8xb32-coslr-100e_in1k.py')


def swapped(host: str) -> Config:
    root = Path(find_spec(host).submodule_search_locations[0])
    cfg = Config.fromfile(root / '.mim/configs' / CONFIGS[host])
    return swap(cfg, 'rp_pvt_tiny')[0]


@pytest.mark.parametrize('host', CONFIGS)
def test_swapped_models_run(host):
    step = run_step(swapped(host), 64)
    assert step.without_gradient == ()
    # RPPVT tiny's, and those of the heads
    assert step.params > 11e6
    if host == 'mmdet':
        # focal loss of RetinaNet's start, and no more than a few of boxes
        assert 0.5 < step.loss < 10
    if host == 'mmpretrain':
        assert -1 <= step.loss <= 1  # a cosine


def test_the_users_loaders_are_given_back(monkeypatch):
    """After a swap and a check a user's own program goes on."""
    monkeypatch.setattr(CheckpointLoader, '_schemes',
                        dict(CheckpointLoader._schemes))
    CheckpointLoader.register_scheme('', len, force=True)
    before = dict(CheckpointLoader._schemes), checkpoint.load_from_http
    monkeypatch.setattr(probe, '_KNOWN', {})  # it is built again
    run_step(swapped('mmdet'), 64)
    assert before == (CheckpointLoader._schemes, checkpoint.load_from_http)


def test_faults_are_found():
    cfg = swapped('mmdet')
    cfg.model.backbone.out_indices = (0, 1, 2, 3)
    cfg.model.neck.in_channels = [64, 128, 320, 512]
    cfg.model.neck.start_level = 1
    # the norm of the map that nobody reads
    assert run_step(cfg, 64).without_gradient == (
        'backbone.norm0.norm.weight', 'backbone.norm0.norm.bias')
    cfg.model.bbox_head.loss_cls.loss_weight = float('nan')
    with pytest.raises(StepError, match='the loss is nan'):
        run_step(cfg, 64)
    cfg = swapped('mmdet')
    cfg.model.backbone.frozen_stages = 4
    with pytest.raises(StepError, match='backbone got no gradient'):
        run_step(cfg, 64)
    cfg = swapped('mmdet')
    cfg.model.neck.in_channels = [128, 320, 511]
    with pytest.raises(RuntimeError, match='511'):
        run_step(cfg, 64)


def test_synchronised_norms_run_in_one_process():
    cfg = swapped('mmdet')
    cfg.model.neck.norm_cfg = dict(type='MMSyncBN')
    assert run_step(cfg, 64).loss > 0
    assert cfg.model.neck.norm_cfg.type == 'MMSyncBN'


def test_checkpoints_are_loaded_unless_told_otherwise(tmp_path):
    cfg = swapped('mmdet')
    cfg.model.backbone.init_cfg = dict(
        type='Pretrained', checkpoint=str(tmp_path / 'nowhere.pth'))
    with pytest.raises(FileNotFoundError):
        run_step(cfg, 64)
    assert run_step(cfg, 64, weights=False).loss > 0


@pytest.mark.parametrize('closed', [False, True])
def test_the_log_of_a_training_is_left_alone(tmp_path, closed):
    # a logger of its own, as a Runner makes it: the current one from here on
    logger = MMLogger.get_instance(f'a_training_{closed}',
                                   log_file=str(tmp_path / 'train.log'))
    logger.info('first')
    handlers = list(logger.handlers)
    file_handler = handlers[1]
    if closed:
        # as uvicorn does to every handler of the process
        file_handler.close()
    assert run_step(swapped('mmdet'), 64).loss > 0
    assert logger.handlers == handlers
    file_handler.close()
    logger.removeHandler(file_handler)
    line, = (tmp_path / 'train.log').read_text().splitlines()
    assert line.endswith('first')
