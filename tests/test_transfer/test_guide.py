"""docs/attention_transfer.md, command by command, at a small size."""

import torch
from guides import run_guide
from source_models import SOURCES
from torchvision.utils import save_image

from mmrpa.weights import read_checkpoint


def test_guide(tmp_path):
    torch.save(SOURCES['timm_swin']().state_dict, tmp_path / 'swin_tiny.pth')
    (tmp_path / 'photos').mkdir()
    for i in range(64):
        save_image(torch.rand(3, 64, 64), tmp_path / f'photos/{i}.png')
    outputs = run_guide(
        'docs/attention_transfer.md', tmp_path,
        # Two processes: tests/test_tools/test_align_attention.py.
        skip=['transfer_table.py', 'dist_align_attention.sh'],
        replace={
            '--calibrate photos':
            '--calibrate photos --calibration-size 64 64 --options '
            'arch.embed_dims=8,16,32,64 arch.depths=2,2,2,1 '
            'arch.num_heads=1,2,4,4 arch.mlp_ratios=4 window_size=4',
            'make_sample_data.py data/sample':
            'make_sample_data.py data/sample --num-cls-train 20 '
            '--num-cls-val 10 --num-train 1 --num-val 1 --image-size 64',
            'attention=sr':
            'attention=sr train_cfg.max_epochs=1 train_cfg.val_interval=1 '
            'default_hooks.checkpoint.interval=1 '
            'train_dataloader.batch_size=10 param_scheduler.0.end=2',
            'epoch_5.pth': 'epoch_1.pth',
            '--feature-epochs 1':
            '--feature-epochs 1 --size 64 64 --batch-size 10',
        })
    convert, _, _, align, test = outputs.values()
    assert convert.count('anchors from') == 7
    assert 'attention layers    stage output' in align
    assert 'accuracy/top1' in test
    aligned = read_checkpoint(tmp_path / 'work_dirs/aligned.pth').state_dict
    teacher = read_checkpoint(tmp_path / 'work_dirs/teacher/epoch_1.pth'
                              ).state_dict
    assert torch.equal(aligned['head.fc.weight'], teacher['head.fc.weight'])
