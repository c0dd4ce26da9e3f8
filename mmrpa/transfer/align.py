"""Attention transfer: teach RPAttention what its source's attention did."""

from typing import Dict, List, Optional, Sequence

import torch
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from torch import Tensor, nn

from .twin import attention_pairs, record_calls

PHASES = ('layers', 'features')
# Least mean square to divide by: a layer that does nothing must not turn
# rounding into a loss.
EPS = 1e-6


class AttentionTransfer(BaseModel):
    """A teacher and a student that differ in attention alone.

    In the phase ``'layers'`` each RPAttention of the student is given what
    the teacher's layer is given, and has to return what that returns: all
    layers learn side by side, and none waits for another. In the phase
    ``'features'`` the student runs on its own and its stages have to return
    what the teacher's return. Losses are squared errors over the mean square
    of the target, so 1 is what zeros would give.

    Only the attention layers that differ learn; neither network drops
    anything or updates statistics.

    Args:
        teacher (RPBackbone): The source.
        student (RPBackbone): Its twin, normally after ``carry_twin`` and
            ``calibrate``.
        data_preprocessor (nn.Module, optional): mmengine's
            ``ImgDataPreprocessor``, or what else makes images of a batch.

    Raises:
        ValueError: The two are no twins, or nothing is left to learn.
    """

    def __init__(self,
                 teacher: nn.Module,
                 student: nn.Module,
                 data_preprocessor: Optional[nn.Module] = None) -> None:
        super().__init__(data_preprocessor=data_preprocessor)
        self.teacher = teacher
        self.student = student
        self.pairs = [name for name, *_ in attention_pairs(teacher, student)]
        self.phase = PHASES[0]
        self.requires_grad_(False)
        layers = dict(student.named_modules())
        for name in self.pairs:
            layers[name].requires_grad_(True)
        student.train()  # sets back what frozen_stages holds
        if not any(p.requires_grad for p in student.parameters()):
            raise ValueError(
                'nothing is left to learn: frozen_stages='
                f'{student.frozen_stages} holds all layers that differ')
        self.train()

    def train(self, mode: bool = True) -> 'AttentionTransfer':
        """Set the mode; the networks themselves stay in eval mode."""
        super().train(mode)
        self.teacher.eval()
        self.student.eval()
        return self

    def forward(self,
                inputs: Tensor,
                data_samples: Optional[Sequence] = None,
                mode: str = 'loss') -> Dict[str, Tensor]:
        """The losses of one batch.

        Args:
            inputs (Tensor): Preprocessed images (B, C, H, W).
            data_samples (optional): Not used: images have no labels.
            mode (str): ``'loss'`` alone.

        Returns:
            dict[str, Tensor]: ``loss_stage<i>`` for each stage.

        Raises:
            ValueError: Another mode.
        """
        if mode != 'loss':
            raise ValueError(f"mode must be 'loss', got {mode!r}")
        return self.layer_losses(
            inputs) if self.phase == 'layers' else self.feature_losses(inputs)

    def layer_losses(self, images: Tensor) -> Dict[str, Tensor]:
        """Relative squared errors of the attention branches, by stage."""
        with record_calls(self.teacher, self.pairs) as calls:
            with torch.no_grad():
                stage_outputs(self.teacher, images)
        layers = dict(self.student.named_modules())
        by_stage: Dict[str, List[Tensor]] = {}
        for name in self.pairs:
            args, target = calls.pop(name)
            by_stage.setdefault(f'loss_stage{name.split(".")[1]}', []).append(
                relative_error(layers[name](*args), target))
        # The mean over layers, each stage's share of it by itself.
        return {
            key: torch.stack(errors).sum() / len(self.pairs)
            for key, errors in by_stage.items()
        }

    def feature_losses(self, images: Tensor) -> Dict[str, Tensor]:
        """Relative squared errors of the stages' outputs."""
        with torch.no_grad():
            targets = stage_outputs(self.teacher, images)
        outputs = stage_outputs(self.student, images)
        first = min(int(name.split('.')[1]) for name in self.pairs)
        return {
            f'loss_stage{i}': relative_error(out, target) /
            (len(outputs) - first)
            for i, (out, target) in enumerate(
                zip(outputs, targets, strict=True))
            if i >= first  # the same before
        }


class PhaseHook(Hook):
    """Tell model and images which epoch it is.

    Args:
        layer_epochs (int): Epochs of the phase ``'layers'``, which is the
            first; ``'features'`` follows.
    """

    def __init__(self, layer_epochs: int) -> None:
        self.layer_epochs = layer_epochs

    def before_train_epoch(self, runner) -> None:
        """Set the phase, and the views that the images are to give."""
        model = runner.model
        model = getattr(model, 'module', model)
        model.phase = PHASES[runner.epoch >= self.layer_epochs]
        runner.train_dataloader.dataset.epoch = runner.epoch
        runner.logger.info(f'phase {model.phase!r}, epoch {runner.epoch + 1} '
                           f'of {runner.max_epochs}')


def stage_outputs(backbone: nn.Module, images: Tensor) -> List[Tensor]:
    """The tokens (B, N, C) behind each stage, before the output norms."""
    x, hw_shape = backbone.stem(images)
    outputs = []
    for stage in backbone.stages:
        x, hw_shape = stage(x, hw_shape)
        outputs.append(x)
    return outputs


def relative_error(output: Tensor, target: Tensor) -> Tensor:
    """Squared error over the mean square of the target, in float32.

    Image by image, so that it does not matter how images are shared out among
    processes.

    Args:
        output (Tensor): (B, N, C).
        target (Tensor): (B, N, C).

    Returns:
        Tensor: The mean over the images, a scalar.
    """
    target = target.float()
    error = (output.float() - target).square().mean((1, 2))
    return (error / target.square().mean((1, 2)).clamp(min=EPS)).mean()


def transfer_errors(transfer: AttentionTransfer,
                    images: Tensor) -> Dict[str, Dict[str, float]]:
    """How far a student is from its teacher.

    Args:
        transfer (AttentionTransfer): The two.
        images (Tensor): Preprocessed images (B, C, H, W).

    Returns:
        dict[str, dict[str, float]]: Relative squared errors by stage,
        ``'layers'``: mean over the attention layers of the stage, each given
        the teacher's input; ``'features'``: of the stage's output.
    """
    with torch.no_grad():
        layers = transfer.layer_losses(images)
        features = transfer.feature_losses(images)
    stages = [name.split('.')[1] for name in transfer.pairs]
    return dict(
        layers={
            key[5:]: value.item() * len(stages) / stages.count(key[10:])
            for key, value in layers.items()
        },
        features={
            key[5:]: value.item() * len(features)
            for key, value in features.items()
        })
