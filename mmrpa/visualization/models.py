"""A trained model of any host, looked into one image at a time."""

import re
import warnings
from pathlib import Path
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Tuple

import numpy as np
import torch
import yaml
from mmengine.config import Config
from mmengine.dataset import Compose, pseudo_collate
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import DefaultScope, init_default_scope
from torch import Tensor, nn

from ..backbones.base import RPBackbone
from ..launch import HOSTS, load_config
from ..layers import RPAttention
from ..preflight import ConfigError, MissingPathError
from ..safe_loading import safe_reader
from ..weights import CheckpointError, read_checkpoint
from .geometry import Geometry, trace
from .images import check_image
from .recording import LayerInput, record_inputs
from .responses import query_response

# What running somebody's config file can raise, beside mmengine's own errors.
_CONFIG_ERRORS = (ArithmeticError, AssertionError, AttributeError, ImportError,
                  LookupError, NameError, OSError, RuntimeError, SyntaxError,
                  TypeError, ValueError, yaml.YAMLError)
# Transforms that change colours, not places.
_TONE = ('Normalize', )


class Place(NamedTuple):
    """One attention layer: its stage, from 0, and its block there."""

    stage: int
    block: int


class View:
    """What the attention layers of a model were given for one image.

    Args:
        model (RoutingModel): The model.
        image (ndarray): (H, W, 3) RGB, uint8.
        geometry (Geometry): Where its pixels are in the network input.
        inputs (dict[Place, LayerInput]): Of each attention layer.
        data (dict): What ``model.test_step`` takes.
    """

    def __init__(self, model: 'RoutingModel', image: np.ndarray,
                 geometry: Geometry, inputs: Dict[Place, LayerInput],
                 data: Dict[str, Any]) -> None:
        self.model = model
        self.image = image
        self.geometry = geometry
        self.inputs = inputs
        self.data = data

    def routing(self, place: Place) -> Tensor:
        """The routing P of a layer, (h, M, h', w'), on the CPU.

        Adds up to 1 over M whatever the axis of the layer's softmax.
        """
        with torch.no_grad():
            p = self.model.layer(place).routing_map(*self.inputs[place])[0]
        return (p / p.sum(1, keepdim=True).clamp(min=1e-30)).cpu()

    def response(self, place: Place, points: List[Tuple[float, float]]
                 ) -> Tensor:
        """What the tokens at some pixels read, (h, Q, h', w'), on the CPU.

        Args:
            place (Place): The layer.
            points (list): (x, y) in pixels of the image.

        Raises:
            ValueError: A point is outside of what the network is shown.
        """
        x, hw_shape = self.inputs[place]
        queries = torch.tensor([self.token(place, point) for point in points],
                               device=x.device)
        with torch.no_grad():
            return query_response(
                self.model.layer(place), x, hw_shape, queries)[0].cpu()

    def token(self, place: Place, point: Tuple[float, float]) -> int:
        """Index of the token that holds a pixel of the image.

        Raises:
            ValueError: The point is outside of what the network is shown.
        """
        return self.geometry.token_at(point, self.model.stride(place.stage),
                                      self.inputs[place].hw_shape[1])

    def to_picture(self, maps: Tensor, place: Place, size: Tuple[int, int],
                   mode: str = 'linear') -> Tensor:
        """Maps (K, h', w') of a layer over the image, (K, H, W)."""
        return self.geometry.sample(maps, self.model.stride(place.stage), size,
                                    mode)


class RoutingModel:
    """A model with an RP backbone, from a config and a checkpoint.

    Args:
        config (str): Config file of mmdet, mmseg or mmpretrain.
        checkpoint (str, optional): Weights of the whole model; None leaves
            them random.
        attention (str, optional): Replaces the backbone's ``attention``, for
            a twin: ``'own'`` is the family's own.
        device (str): Where to run it.
        cfg_options (Mapping, optional): Config values by dotted key.

    Raises:
        CheckpointError: The checkpoint is damaged, unsafe, or does not fit.
        ConfigError: The config does not parse or build, or has no RP backbone.
        FileNotFoundError: There is no such config or checkpoint.
    """

    def __init__(self, config: str, checkpoint: Optional[str] = None, *,
                 attention: Optional[str] = None, device: str = 'cpu',
                 cfg_options: Optional[Mapping[str, Any]] = None) -> None:
        self.config = str(config)
        self.cfg = read_config(self.config, cfg_options)
        self.device = torch.device(device)
        self.scope = self.cfg.get('default_scope')
        if self.scope not in HOSTS:
            raise ConfigError(
                f'{config}: default_scope={self.scope!r} names no host: it '
                f'must be one of {", ".join(map(repr, HOSTS))}')
        self.enter_scope()
        self.model = self._build(attention)
        self.backbone = self._find_backbone()
        self.layers = _find_layers(self.backbone)
        if checkpoint is not None:
            self._load(checkpoint)
        self.model.to(self.device).eval()
        self._load_image, self._transforms = self._build_pipeline()

    def layer(self, place: Place) -> nn.Module:
        """The attention layer at a place."""
        return self.layers[place]

    def stride(self, stage: int) -> int:
        """Network input pixels a token of a stage."""
        return self.backbone._stride(stage)

    @property
    def rp_stages(self) -> List[int]:
        """The stages with RPAttention, from 0."""
        return sorted({place.stage for place, layer in self.layers.items()
                       if isinstance(layer, RPAttention)})

    def place(self, stage: int, block: int = -1) -> Place:
        """The layer of a stage and block, both from 0; -1 is the last.

        Raises:
            ValueError: There is none.
        """
        blocks = [place.block for place in self.layers if place.stage == stage]
        if not blocks:
            stages = sorted({place.stage + 1 for place in self.layers})
            raise ValueError(f'no stage {stage + 1}: the backbone has stages '
                             f'{stages[0]} to {stages[-1]}')
        if not -1 <= block < len(blocks):
            raise ValueError(f'no block {block + 1} in stage {stage + 1}, '
                             f'which has blocks 1 to {len(blocks)}')
        return Place(stage, range(len(blocks))[block])

    @property
    def normalizing_steps(self) -> List:
        """mmcv's Normalize transforms in the test pipeline."""
        from mmcv.transforms import Normalize
        return [step for step in self._transforms
                if isinstance(step, Normalize)]

    def look(self, path: str) -> View:
        """Show the model an image.

        Args:
            path (str): An image file.

        Returns:
            View: What its attention layers were given.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: It is no image.
        """
        check_image(path)
        self.enter_scope()
        results = self._load_image(
            dict(img_path=str(path), img_id=0, sample_idx=0))
        if results is None or results.get('img') is None:
            raise ValueError(f'{path} cannot be decoded as an image')
        shown = _as_rgb(results['img'])
        height, width = shown.shape[:2]
        geometry = trace(self._trace_one, (width, height))
        data = pseudo_collate([_run(self._transforms, results)])
        inputs = self.model.data_preprocessor(data, False)['inputs']
        with record_inputs(self.backbone) as recorded, torch.no_grad():
            self.backbone(inputs)
        names = {name: place for name, place in _layer_names(self.backbone)}
        return View(self, shown, geometry,
                    {names[name]: value for name, value in recorded.items()},
                    data)

    def enter_scope(self) -> None:
        """Make the model's host the default scope of mmengine's registries."""
        current = DefaultScope.get_current_instance()
        if current is None or current.scope_name != self.scope:
            with warnings.catch_warnings():
                warnings.simplefilter('ignore')  # "will be overwritten"
                init_default_scope(self.scope)

    # How it is put together.

    def _build(self, attention: Optional[str]) -> nn.Module:
        from mmengine.registry import MODELS
        cfg = self.cfg.get('model')
        if cfg is None:
            raise ConfigError(f'{self.config} has no model')
        cfg = Config(dict(model=cfg)).model  # a copy: this one is changed
        if self.cfg.get('data_preprocessor') is not None:
            cfg.setdefault('data_preprocessor', self.cfg.data_preprocessor)
        backbone = cfg.get('backbone')
        if attention is not None and isinstance(backbone, Mapping):
            backbone['attention'] = self._twin_attention(backbone, attention)
        try:
            # Weights are given, so what init_cfg names is not loaded: that
            # happens in init_weights, which is not called. But some models
            # load their teacher when built.
            with safe_reader():
                return revert_sync_batchnorm(MODELS.build(cfg))
        except _CONFIG_ERRORS as error:
            raise ConfigError(f'{self.config}: its model cannot be built: '
                              f'{_first_line(error)}') from error

    def _twin_attention(self, backbone: Mapping, attention: str) -> str:
        from ..registry import MODELS
        name = str(backbone.get('type')).removeprefix('mmrpa.')
        cls = MODELS.get(name)
        if cls is None:
            raise ConfigError(_no_backbone(self.config, backbone.get('type')))
        return cls.own_attention if attention == 'own' else attention

    def _find_backbone(self) -> RPBackbone:
        """The one that a test uses, of a teacher and a student, too."""
        model = self.model
        semi = getattr(model, 'semi_test_cfg', None)
        if semi is not None:  # of mmdet; what is no teacher is the student
            teacher = semi.get('predict_on', 'teacher') == 'teacher'
            model = model.teacher if teacher else model.student
        found = {name: module for name, module in model.named_modules()
                 if isinstance(module, RPBackbone)}
        if not found:
            backbone = getattr(self.model, 'backbone', None)
            raise ConfigError(_no_backbone(
                self.config, type(backbone).__name__ if backbone else None))
        names = list(found)
        if len(names) > 1:
            warnings.warn(f'{self.config}: its model has {len(names)} RP '
                          f'backbones, what is shown is {names[0]!r} and not '
                          f'{", ".join(map(repr, names[1:]))}', stacklevel=3)
        return found[names[0]]

    def _load(self, checkpoint: str) -> None:
        state = read_checkpoint(checkpoint).state_dict
        prefix = 'module.'
        if state and all(key.startswith(prefix) for key in state):
            state = {key[len(prefix):]: value for key, value in state.items()}
        own = self.model.state_dict()
        missing = [key for key in own if key not in state]
        unexpected = [key for key in state if key not in own]
        try:
            if missing or unexpected:
                raise ValueError(
                    f'{len(missing)} tensors missing{_examples(missing)}, '
                    f'{len(unexpected)} unexpected{_examples(unexpected)}')
            self.model.load_state_dict(state)
        except (RuntimeError, ValueError) as error:
            text = re.sub(r'\s+', ' ', str(error))[:300]
            raise CheckpointError(f'{checkpoint} does not fit the model of '
                                  f'{self.config}: {text}') from None

    def _build_pipeline(self) -> Tuple[Compose, List]:
        steps = _test_pipeline(self.cfg, self.config)
        names = [str(getattr(step.get('type'), '__name__', step.get('type')))
                 .split('.')[-1] for step in steps]
        loaders = [step for step, name in zip(steps, names, strict=True)
                   if name.startswith('LoadImage')]
        if len(loaders) != 1:
            raise ConfigError(
                f'{self.config}: the test pipeline must load its image by one '
                f'transform such as LoadImageFromFile, got {names}')
        others = [step for step, name in zip(steps, names, strict=True)
                  if not name.startswith('Load')]
        try:
            loader = Compose(loaders)
            return loader, Compose(others).transforms
        except _CONFIG_ERRORS as error:
            raise ConfigError(f'{self.config}: its test pipeline cannot be '
                              f'built: {_first_line(error)}') from error

    def _trace_one(self, ramp: np.ndarray) -> np.ndarray:
        """A coordinate image through the pipeline, (H', W', 3)."""
        geometric = [step for step in self._transforms
                     if type(step).__name__ not in _TONE]
        shape = ramp.shape[:2]
        packed = _run(geometric, dict(
            img=ramp, img_shape=shape, ori_shape=shape, img_path='',
            height=shape[0], width=shape[1], img_id=0, sample_idx=0))
        inputs = packed['inputs']
        if not isinstance(inputs, Tensor) or inputs.dim() != 3:
            raise ConfigError(
                f'{self.config}: its test pipeline makes '
                f'{type(inputs).__name__} of an image, not one tensor (C, H, '
                'W); test-time augmentation cannot be drawn')
        return inputs.permute(1, 2, 0).numpy()


def read_config(path: str, options: Optional[Mapping[str, Any]] = None
                ) -> Config:
    """Load a config; whatever is wrong with it is a ConfigError.

    Raises:
        MissingPathError: There is no such file.
        ConfigError: It does not parse.
    """
    try:
        return load_config(path, options)
    except MissingPathError:
        raise
    except _CONFIG_ERRORS as error:
        raise ConfigError(f'config {path!r} does not parse: '
                          f'{type(error).__name__}: {_first_line(error)}'
                          ) from error


def _run(transforms: List, results: Dict[str, Any]) -> Dict[str, Any]:
    for transform in transforms:
        results = transform(results)
    return results


def test_dataset(cfg: Mapping) -> Optional[Mapping]:
    """The dataset of ``test_dataloader``, without wrappers around it."""
    dataset = (cfg.get('test_dataloader') or {}).get('dataset')
    while isinstance(dataset, Mapping) and not dataset.get('pipeline'):
        several = dataset.get('datasets') or [None]
        inner = dataset.get('dataset') or several[0]
        if inner is None:
            break
        dataset = inner
    return dataset


def _test_pipeline(cfg: Mapping, name: str) -> List[Mapping]:
    dataset = test_dataset(cfg) or {}
    steps = dataset.get('pipeline') or cfg.get('test_pipeline')
    if not steps:
        raise ConfigError(f'{name} has no test_dataloader.dataset.pipeline to '
                          'prepare images with')
    return list(steps)


def _layer_names(backbone: RPBackbone) -> List[Tuple[str, Place]]:
    return [(f'stages.{i}.blocks.{j}.attn', Place(i, j))
            for i, stage in enumerate(backbone.stages)
            for j in range(len(stage.blocks))]


def _find_layers(backbone: RPBackbone) -> Dict[Place, nn.Module]:
    return {place: backbone.get_submodule(name)
            for name, place in _layer_names(backbone)}


def _as_rgb(image: np.ndarray) -> np.ndarray:
    """What LoadImageFromFile gives, BGR or grey, as RGB uint8."""
    image = np.clip(image, 0, 255).astype(np.uint8)
    if image.ndim == 2 or image.shape[2] == 1:
        return np.repeat(image.reshape(*image.shape[:2], 1), 3, axis=2)
    return np.ascontiguousarray(image[..., 2::-1])


def _no_backbone(config: str, kind: Any) -> str:
    return (f'{Path(config).name}: model.backbone must be mmrpa.RPDeiT, '
            f'mmrpa.RPPVT, mmrpa.RPSwin or mmrpa.RPCSWin, got {kind!r}')


def _examples(keys: List[str]) -> str:
    return f' ({keys[0]}{", ..." if len(keys) > 1 else ""})' if keys else ''


def _first_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0].strip() if lines else type(error).__name__
