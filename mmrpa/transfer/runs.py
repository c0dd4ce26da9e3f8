"""The run behind ``tools/align_attention.py``: networks, Runner, weights."""

import json
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Dict, Iterator, List, Mapping, Optional, Tuple

import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.dist import get_world_size, master_only
from mmengine.hooks import Hook
from mmengine.model import ImgDataPreprocessor
from mmengine.optim import OptimWrapper
from mmengine.runner import Runner
from torch import Tensor, nn

from ..backbones import RPBackbone
from ..backbones.checkpoint import check_state_dict
from ..registry import MODELS
from ..whole_files import whole_file
from .align import AttentionTransfer, PhaseHook
from .images import UnlabelledImages

AMP_DTYPES = ('float16', 'bfloat16')
RECORD = 'align_attention.json'
LOG_EVERY = 10
WARM_UP = 0.05  # of all steps


@dataclass(frozen=True)
class Settings:
    """What decides the result of a run, so that a resumed run can be held
    to it.

    Attributes:
        layer_epochs (int): Passes over the images, layer by layer.
        feature_epochs (int): Passes after them, end to end.
        size (tuple[int, int]): Height and width of the views in pixels.
        num_images (int, optional): Images to take; None: all.
        batch_size (int): Images a step, in all processes together.
        lr (float): Highest learning rate.
        amp (str, optional): ``'float16'``, ``'bfloat16'`` or None.
        seed (int): Of all chance.

    Raises:
        ValueError: A value is out of range.
    """

    layer_epochs: int = 4
    feature_epochs: int = 2
    size: Tuple[int, int] = (224, 224)
    num_images: Optional[int] = None
    batch_size: int = 32
    lr: float = 1e-3
    amp: Optional[str] = None
    seed: int = 0

    def __post_init__(self) -> None:
        least = dict(layer_epochs=0, feature_epochs=0, batch_size=1, seed=0)
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise ValueError(f'{name} is {getattr(self, name)}; it must '
                                 f'be at least {bound}')
        if self.layer_epochs + self.feature_epochs < 1:
            raise ValueError('layer_epochs and feature_epochs are both 0; '
                             'one must be at least 1')
        if self.num_images is not None and self.num_images < 1:
            raise ValueError(f'num_images is {self.num_images}; it must be '
                             'at least 1')
        if not 0 < self.lr < 1:
            raise ValueError(f'lr is {self.lr}; it must be between 0 and 1')
        if self.amp not in (None, *AMP_DTYPES):
            raise ValueError(f'amp is {self.amp!r}; it must be one of '
                             f'{AMP_DTYPES} or None')


class CPUAmpOptimWrapper(OptimWrapper):
    """mmengine's AmpOptimWrapper refuses CPUs, though torch does bfloat16
    there and needs no scaling of the loss for it."""

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        """Gradient accumulation's context, and autocast."""
        with super().optim_context(model), torch.autocast(
                'cpu', torch.bfloat16):
            yield


def find_backbone(cfg: Mapping[str, Any]) -> Tuple[Dict[str, Any], str]:
    """The RP backbone in a config.

    Returns:
        tuple: Its config without ``init_cfg``, and what stands before its
        names in the model.

    Raises:
        ValueError: There is none.
    """
    model = cfg.get('model') or {}
    for node, prefix in ((model, 'backbone.'), (model.get('detector') or {},
                                                'detector.backbone.')):
        backbone = dict(node.get('backbone') or {})
        if str(backbone.get('type')).startswith('mmrpa.'):
            backbone.pop('init_cfg', None)
            return backbone, prefix
    kind = (model.get('backbone') or {}).get('type')
    raise ValueError('model.backbone.type must be one of mmrpa.RPDeiT, '
                     'mmrpa.RPPVT, mmrpa.RPSwin and mmrpa.RPCSWin, got '
                     f'{kind!r}')


def build_twins(backbone: Mapping[str, Any]
                ) -> Tuple[RPBackbone, RPBackbone]:
    """Build the backbone of a config, and its twin as the teacher.

    Args:
        backbone (Mapping): Config of an RP backbone with ``'rp'`` somewhere.

    Returns:
        tuple[RPBackbone, RPBackbone]: Teacher and student, both with new
        weights; the teacher has its family's own attention everywhere.
    """
    student = MODELS.build(dict(backbone))
    teacher = MODELS.build(
        dict(backbone, attention=type(student).own_attention))
    return teacher, student


def load_backbone(backbone: nn.Module, state_dict: Mapping[str, Tensor],
                  name: str) -> str:
    """Load a backbone's weights out of those of a model.

    Args:
        backbone (RPBackbone): To load into.
        state_dict (Mapping): The weights.
        name (str): What to call them in errors.

    Returns:
        str: What stands before the backbone's names.

    Raises:
        ValueError: They are of another backbone, or of none.
    """
    mark = 'stages.0.blocks.0.'
    found = [key for key in state_dict if mark in key]
    if not found:
        raise ValueError(
            f'{name} holds no weights of a backbone of mmrpa (no name has '
            f'{mark!r}); tools/convert_checkpoint.py makes them from public '
            'ones')
    prefix = found[0][:found[0].index(mark)]
    try:
        check_state_dict(backbone, state_dict, prefix)
    except ValueError as error:
        raise ValueError(
            f'{name} does not fit a backbone with attention='
            f'{backbone.attention}: {error}') from None
    backbone.load_state_dict(
        {
            key[len(prefix):]: value
            for key, value in state_dict.items() if key.startswith(prefix)
        },
        strict=False)
    return prefix


def merge_weights(student: nn.Module, prefix: str,
                  teacher: Mapping[str, Tensor],
                  teacher_prefix: str) -> Dict[str, Tensor]:
    """The student's weights, with the teacher's heads around them.

    Args:
        student (RPBackbone): The backbone.
        prefix (str): What stands before its names in the new weights.
        teacher (Mapping): The teacher's weights.
        teacher_prefix (str): What stands before its backbone's names.

    Returns:
        dict[str, Tensor]: For the student's model.
    """
    merged = {}
    if teacher_prefix.endswith(prefix):
        outer = teacher_prefix[:-len(prefix)]
        merged = {
            key[len(outer):]: value
            for key, value in teacher.items() if key.startswith(outer)
            and not key.startswith(teacher_prefix)
        }
    merged.update({
        prefix + key: value.cpu()
        for key, value in student.state_dict().items()
    })
    return merged


def build_runner(transfer: AttentionTransfer, folder: str, work_dir: str,
                 settings: Settings, num_workers: int, launcher: str,
                 resume: bool, record: Mapping[str, Any]) -> Runner:
    """mmengine's Runner of an attention transfer.

    Args:
        transfer (AttentionTransfer): Teacher and student.
        folder (str): Images.
        work_dir (str): For logs and checkpoints, one an epoch. The last two
            are kept, so that one is whole when the other is cut off.
        settings (Settings): What decides the result.
        num_workers (int): Processes that read images.
        launcher (str): ``'none'``, ``'pytorch'`` or ``'slurm'``; a process
            group that is there already is used.
        resume (bool): Go on from the last checkpoint.
        record (Mapping): For :class:`RecordHook`.

    Raises:
        ImageFolderError: There are no images.
        ValueError: The batch cannot be shared by the processes or is larger
            than the folder, or AMP needs a GPU.
    """
    world = get_world_size()
    images = UnlabelledImages(folder, settings.size, settings.num_images,
                              augment=True, seed=settings.seed)
    batch, rest = divmod(settings.batch_size, world)
    if rest or settings.batch_size > len(images):
        raise ValueError(
            f'batch_size={settings.batch_size} must be a multiple of the '
            f'{world} processes and at most the {len(images)} images')
    steps = -(-len(images) // settings.batch_size)
    epochs = settings.layer_epochs + settings.feature_epochs
    on_cpu = get_device() == 'cpu'
    cfg = dict(settings=asdict(settings))
    if on_cpu and world > 1:  # mmengine's default names a GPU
        cfg['model_wrapper_cfg'] = dict(
            type='MMDistributedDataParallel',
            device_ids=None,
            broadcast_buffers=False)
    return Runner(
        model=transfer,
        work_dir=work_dir,
        train_dataloader=dict(
            batch_size=batch,
            num_workers=num_workers,
            sampler=dict(type='DefaultSampler', shuffle=True),
            dataset=images),
        train_cfg=dict(by_epoch=True, max_epochs=epochs),
        optim_wrapper=_optim_wrapper(settings, on_cpu),
        param_scheduler=_schedule(steps * epochs, settings.lr),
        default_hooks=dict(
            logger=dict(
                type='LoggerHook', interval=min(LOG_EVERY, steps)),
            checkpoint=dict(
                type='mmrpa.SafeCheckpointHook',
                interval=1,
                max_keep_ckpts=2)),
        custom_hooks=[PhaseHook(settings.layer_epochs), RecordHook(record)],
        launcher=launcher,
        resume=resume,
        randomness=dict(seed=settings.seed),
        experiment_name='align_attention',
        cfg=Config(cfg))


def _schedule(steps: int, lr: float) -> List[Dict[str, Any]]:
    """A warm-up, then a cosine down to a hundredth."""
    # mmengine's LinearLR ends a step early, so one step of it would stay low.
    warm_up = max(2, int(WARM_UP * steps))
    schedule = [
        dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0,
             end=warm_up)
    ]
    if steps > warm_up:
        schedule.append(
            dict(type='CosineAnnealingLR', T_max=steps - warm_up,
                 eta_min=lr * 0.01, by_epoch=False, begin=warm_up, end=steps))
    return schedule


def _optim_wrapper(settings: Settings, on_cpu: bool) -> Dict[str, Any]:
    wrapper: Dict[str, Any] = dict(
        type=OptimWrapper,
        optimizer=dict(type='AdamW', lr=settings.lr, weight_decay=0.),
        clip_grad=dict(max_norm=1.))
    if settings.amp is None:
        return wrapper
    if not on_cpu:
        return dict(wrapper, type='AmpOptimWrapper', dtype=settings.amp)
    if settings.amp != 'bfloat16':
        raise ValueError(f'amp={settings.amp!r} needs a GPU, and there is '
                         'none here; use bfloat16')
    return dict(wrapper, type=CPUAmpOptimWrapper)


def build_preprocessor(normalisation: Mapping[str, Any]
                       ) -> ImgDataPreprocessor:
    """What turns views (RGB, uint8) into what a config's backbone takes.

    Args:
        normalisation (Mapping): What ``read_normalisation`` returns.
    """
    return ImgDataPreprocessor(
        mean=normalisation['mean'],
        std=normalisation['std'],
        # The views are RGB, so a network for BGR wants them turned.
        rgb_to_bgr=not normalisation['to_rgb'])


def read_record(work_dir: str) -> Dict[str, Any]:
    """What :class:`RecordHook` wrote, ``{}`` if there is nothing."""
    path = Path(work_dir, RECORD)
    return json.loads(path.read_text()) if path.is_file() else {}


class RecordHook(Hook):
    """Note what a run is, for the one that resumes it.

    That is after the checkpoint hook, which notes the checkpoints of an
    earlier run as such: a run that is killed between the two leaves no record
    of its own beside checkpoints that seem to be of it.

    Args:
        record (Mapping): What :func:`read_record` will return.
    """

    priority = 'LOWEST'

    def __init__(self, record: Mapping[str, Any]) -> None:
        self._text = json.dumps(dict(record), indent=2)

    @master_only
    def before_train(self, runner: Runner) -> None:
        """Write the record into the working directory."""
        with whole_file(Path(runner.work_dir, RECORD)) as temporary:
            temporary.write_text(self._text)


def differences(old: Mapping[str, Any],
                new: Mapping[str, Any]) -> Iterator[str]:
    """Yield ``name: old, now new`` for each value that differs."""
    new = json.loads(json.dumps(dict(new)))  # tuples to lists, as in old
    for name in sorted({*old, *new}):
        if old.get(name) != new.get(name):
            yield f'{name}: {old.get(name)!r}, now {new.get(name)!r}'
