"""The part of a host's model that is exported, as one module."""

import copy
from typing import Any, Dict, Mapping, Optional, Tuple

import torch
from torch import Tensor, nn

from ..layers import RPAttention
from ..preflight import ConfigError
from ..visualization.models import RoutingModel
from ..visualization.predictions import dataset_meta
from ..weights import CheckpointError, read_checkpoint
from .pooling import replace_pooling

PARTS = ('backbone', 'neck', 'whole')
OUTPUTS = ('logits', 'labels')
# What a host's models are useful as, if nothing else is asked for.
_DEFAULT_PARTS = dict(mmdet='neck', mmseg='whole', mmpretrain='whole')


class ExportModel(nn.Module):
    """A part of a trained model: one image tensor in, tensors out.

    Args:
        config (str): Config file of mmdet, mmseg or mmpretrain.
        checkpoint (str, optional): Its weights, or, for the backbone alone, a
            checkpoint of a backbone. None leaves random weights.
        part (str, optional): ``'backbone'``, ``'neck'`` (what
            ``extract_feat`` returns) or ``'whole'``. By default ``'whole'``,
            for mmdet ``'neck'``.
        output (str): Of a whole model: ``'logits'``, or ``'labels'``, the
            index of the best class.
        normalize (bool): Take pixels from 0 to 255 and normalise them inside.
            Otherwise the image is normalised already.
        cfg_options (Mapping, optional): Config values by dotted key.

    Raises:
        CheckpointError: The checkpoint is damaged, unsafe, or does not fit.
        ConfigError: The config does not parse or build, has no RP backbone, no
            such part, or a model that holds another one.
        FileNotFoundError: There is no such config or checkpoint.
        ValueError: An unknown part or output, or one that a host lacks.
    """

    def __init__(self, config: str, checkpoint: Optional[str] = None, *,
                 part: Optional[str] = None, output: str = 'logits',
                 normalize: bool = False,
                 cfg_options: Optional[Mapping[str, Any]] = None) -> None:
        super().__init__()
        state = None if checkpoint is None else read_checkpoint(
            checkpoint).state_dict
        alone = state is not None and not any(
            key.removeprefix('module.').startswith('backbone.')
            for key in state)
        source = RoutingModel(config, None if alone else checkpoint,
                              cfg_options=cfg_options)
        self.scope = source.scope
        self.part = part or _DEFAULT_PARTS[self.scope]
        self.output = output
        self._check_choices(config, source.model)
        if alone:
            self._load_backbone(source, state, str(checkpoint))
        self.model, self.backbone = source.model, source.backbone
        self.classes = tuple(dataset_meta(source)['classes'])
        self._read_preprocessing(source, normalize)
        self.eval().requires_grad_(False)

    def forward(self, image: Tensor) -> Tuple[Tensor, ...]:
        """Compute the outputs.

        Args:
            image (Tensor): (B, C, H, W) float32.

        Returns:
            tuple[Tensor]: The maps of the backbone or neck; of a whole model
            one tensor, logits (B, K) or (B, K, H, W), or labels (B) or (B, H,
            W), int64.
        """
        if self.normalize:
            image = (image - self.mean) / self.std
        if self.part == 'backbone':
            return tuple(self.backbone(image))
        if self.part == 'neck':
            return _as_tuple(self.model.extract_feat(image))
        logits = self.compute_logits(image)
        return (logits if self.output == 'logits' else
                self.choose_labels(logits), )

    def compute_logits(self, image: Tensor) -> Tensor:
        """Logits of a whole model for a normalised image."""
        if self.scope == 'mmpretrain':
            return self.model.head(self.model.extract_feat(image))
        size = image.shape[2:]
        meta = dict(img_shape=size, pad_shape=size, ori_shape=size)
        return self.model.encode_decode(image, [meta])

    def choose_labels(self, logits: Tensor) -> Tensor:
        """Logits to the index of the best class, int64."""
        if self.threshold is None:
            return logits.argmax(dim=1)
        return (logits[:, 0].sigmoid() > self.threshold).long()

    def for_export(self) -> 'ExportModel':
        """A copy that computes the same by what all runtimes know."""
        twin = copy.deepcopy(self)
        for module in twin.modules():
            if isinstance(module, RPAttention):
                module.impl = 'naive'  # others are operators of our own
        replace_pooling(twin)
        return twin

    @property
    def input_channels(self) -> int:
        """Channels of the image."""
        return self.backbone.in_channels

    @property
    def threshold(self) -> Optional[float]:
        """From which probability on a pixel is of class 1, else None.

        One channel stands for two classes, as in mmseg's postprocessing.
        """
        if self.scope != 'mmseg' or self.model.out_channels > 1:
            return None
        return self.model.decode_head.threshold

    @property
    def windows(self) -> Dict[str, Any]:
        """``crop_size`` and ``stride`` if the host predicts in windows."""
        test_cfg = getattr(self.model, 'test_cfg', None) or {}
        if self.part != 'whole' or test_cfg.get('mode') != 'slide':
            return {}
        return dict(crop_size=list(test_cfg['crop_size']),
                    stride=list(test_cfg['stride']))

    @property
    def smallest_side(self) -> int:
        """The least height and width, in pixels."""
        return self.backbone.patch_size

    def output_names(self, count: int) -> Tuple[str, ...]:
        """Names of the outputs, of which there are ``count``."""
        if self.part == 'whole':
            return (self.output, )
        return tuple(f'map{i}' for i in range(count))

    def describe(self) -> Dict[str, Any]:
        """What a user of the file has to know; JSON can hold it."""
        return dict(
            host=self.scope,
            part=self.part,
            output=self.output if self.part == 'whole' else 'maps',
            input='pixels' if self.normalize else 'normalized',
            input_layout=f'B x {self.input_channels} x H x W, float32',
            smallest_side=self.smallest_side,
            mean=self.mean.flatten().tolist(),
            std=self.std.flatten().tolist(),
            channel_order=self.channel_order,
            pad_size_divisor=self.pad_size_divisor,
            pad_size=self.pad_size,
            windows=self.windows,
            classes=list(self.classes))

    # How it is put together.

    def _check_choices(self, config: str, model: nn.Module) -> None:
        for name, value, allowed in (('part', self.part, PARTS),
                                     ('output', self.output, OUTPUTS)):
            if value not in allowed:
                raise ValueError(f'{name} must be one of {allowed}, got '
                                 f'{value!r}')
        if self.output != 'logits' and self.part != 'whole':
            raise ValueError(f"output={self.output!r} needs part='whole', "
                             f'got {self.part!r}')
        if not hasattr(model, 'backbone'):
            raise ConfigError(
                f'{config}: {type(model).__name__} holds a model with the '
                'backbone, or several, and is not exported; use the config of '
                'that model, and its weights alone')
        if self.part == 'whole' and self.scope == 'mmdet':
            raise ValueError(
                'a whole detector, with its proposals and NMS, is not '
                "exported; use part='neck' (backbone and neck)")
        needed = dict(
            neck='neck',
            whole='head' if self.scope == 'mmpretrain' else 'decode_head')
        attribute = needed.get(self.part)
        if attribute and getattr(model, attribute, None) is None:
            raise ConfigError(f'{config}: part={self.part!r} needs '
                              f'model.{attribute}, which is not there')
        if self.output == 'labels' and self.scope == 'mmpretrain':
            _check_one_class(model.head)

    def _load_backbone(self, source: RoutingModel, state: Mapping[str, Tensor],
                       checkpoint: str) -> None:
        if self.part != 'backbone':
            raise CheckpointError(
                f'{checkpoint} holds no tensor of a whole model '
                "(backbone.*); part='backbone' takes a backbone alone")
        try:
            source.backbone.load_state_dict(
                {key.removeprefix('module.'): value
                 for key, value in state.items()})
        except (RuntimeError, ValueError) as error:
            text = ' '.join(str(error).split())[:300]
            raise CheckpointError(f'{checkpoint} does not fit the backbone of '
                                  f'{source.config}: {text}') from None

    def _read_preprocessing(self, source: RoutingModel,
                            normalize: bool) -> None:
        """Note how the host prepares images, from its own module."""
        module = self.model.data_preprocessor
        cfg = source.cfg.model.get('data_preprocessor') or source.cfg.get(
            'data_preprocessor') or {}
        # mmcv reads images as BGR, and all of these swap R and B.
        swaps = any(cfg.get(key) for key in (
            'bgr_to_rgb', 'rgb_to_bgr', 'to_rgb'))
        values = {name: getattr(module, name, None)
                  for name in ('mean', 'std')}
        for step in source.normalizing_steps:
            if values['mean'] is not None:
                raise ConfigError(
                    f'{source.config}: its test pipeline has a Normalize '
                    'transform, beside another or the data_preprocessor that '
                    'normalises, too. Keep one of them: a file can say one')
            # Its numbers are for its own order, which may be swapped again.
            values = {name: torch.from_numpy(getattr(step, name)).flip(
                0 if swaps else ()) for name in values}
            swaps = swaps != step.to_rgb
        self.channel_order = ('RGB' if swaps else 'BGR'
                              ) if self.input_channels == 3 else 'any'
        # mmseg pads in tests only where test_cfg says so.
        test_cfg = cfg.get('test_cfg') or {}
        padding = (test_cfg.get('size_divisor') if self.scope == 'mmseg' else
                   cfg.get('pad_size_divisor'))
        self.pad_size_divisor = int(padding or 1)
        size = test_cfg.get('size') if self.scope == 'mmseg' else None
        self.pad_size = list(size or ())
        self.normalize = normalize
        for name, neutral in (('mean', 0.), ('std', 1.)):
            value = values[name]
            value = torch.tensor([neutral]) if value is None else value
            # Not persistent: the weights stay those of the host's model.
            self.register_buffer(
                name, value.detach().float().reshape(1, -1, 1, 1).clone(),
                persistent=False)


def _check_one_class(head: nn.Module) -> None:
    from mmpretrain.models.heads import ClsHead

    # Of several labels, or of numbers, the largest is not the prediction.
    if (getattr(type(head), '_get_predictions', None)
            is not ClsHead._get_predictions):
        raise ValueError(
            f"output='labels' is the index of the best class, which is not "
            f"what {type(head).__name__} predicts; use output='logits'")


def _as_tuple(value: Any) -> Tuple[Tensor, ...]:
    return (value, ) if isinstance(value, Tensor) else tuple(value)
