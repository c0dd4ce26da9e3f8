"""The evaluation of models of the hosts, alone or in one of two processes."""

from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.registry import DefaultScope
from mmengine.runner import Runner
from torch import distributed as dist


def evaluate(rank: int, configs: list[dict],
             work_dir: str) -> list[dict[str, float]]:
    """The metrics of each config with random weights, the same everywhere.

    The configs must name no launcher: a group that is there is used.
    """
    torch.set_num_threads(1)
    results = []
    for i, content in enumerate(configs):
        DefaultScope._instance_dict.clear()
        cfg = Config(content)
        cfg.work_dir = str(Path(work_dir, str(i)))
        cfg.experiment_name = f'{Path(work_dir).name}_{i}'
        cfg.log_level = 'WARNING'
        if dist.is_initialized():
            cfg.launcher = 'pytorch'
            # What mmrpa.launch adds where there is no GPU.
            cfg.model_wrapper_cfg = dict(
                type='MMDistributedDataParallel', device_ids=None)
        torch.manual_seed(1)
        runner = Runner.from_cfg(cfg)
        results.append({k: float(v) for k, v in runner.test().items()})
    return results
