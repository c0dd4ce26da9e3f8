"""What a model says of an image, drawn by its host's own visualizer."""

import tempfile
from pathlib import Path
from typing import Any, Dict, Mapping, NamedTuple, Optional

import numpy as np
import torch
from mmengine.fileio import list_from_file
from mmengine.registry import DATASETS, VISUALIZERS
from PIL import Image

from ..preflight import ConfigError
from .colors import representative_colors
from .models import RoutingModel, View, test_dataset

_VISUALIZERS = dict(mmdet='DetLocalVisualizer', mmseg='SegLocalVisualizer')
TOP_SCORES = 5


class Prediction(NamedTuple):
    """One of the two.

    Attributes:
        picture (ndarray, optional): (H, W, 3) RGB, uint8, of the image's
            size: detections or segmentation over it.
        scores (dict, optional): The best classes' scores, in [0, 1].
    """

    picture: Optional[np.ndarray] = None
    scores: Optional[Dict[str, float]] = None


class Predictor:
    """The predictions of one model.

    Args:
        model (RoutingModel): The model.
        score_thr (float): Least score of the detections that are drawn.
    """

    def __init__(self, model: RoutingModel, score_thr: float = 0.3) -> None:
        self.model = model
        self.score_thr = score_thr
        self.meta = dataset_meta(model)
        self.visualizer = None
        if model.scope in _VISUALIZERS:
            cfg = dict(model.cfg.get('visualizer') or dict(
                type=_VISUALIZERS[model.scope]))
            # One of its own, with nothing behind it.
            cfg.update(vis_backends=None, name=f'mmrpa-{id(self)}')
            self.visualizer = VISUALIZERS.build(cfg)
            self.visualizer.dataset_meta = self.meta

    def __call__(self, view: View) -> Prediction:
        """Predict what a view shows.

        Raises:
            ConfigError: The config's pipeline leaves out what its test needs.
        """
        self.model.enter_scope()
        try:
            with torch.no_grad():
                result = self.model.model.test_step(view.data)[0].cpu()
        except (AssertionError, AttributeError, KeyError) as error:
            raise ConfigError(
                f'{self.model.config}: no prediction: its test pipeline must '
                f'pack all meta_keys that testing needs ({error})') from error
        if self.visualizer is None:
            return Prediction(scores=self._scores(result.pred_score))
        options = (dict(pred_score_thr=self.score_thr)
                   if self.model.scope == 'mmdet' else {})
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, 'prediction.png')
            self.visualizer.add_datasample(
                'prediction', view.image, data_sample=result, draw_gt=False,
                show=False, out_file=str(path), **options)
            with Image.open(path) as picture:
                return Prediction(np.asarray(picture.convert('RGB')))

    def _scores(self, scores: torch.Tensor) -> Dict[str, float]:
        names = self.meta.get('classes') or ()
        best = scores.topk(min(TOP_SCORES, len(scores)))
        return {
            names[i] if i < len(names) else f'class {i}': value
            for value, i in zip(best.values.tolist(), best.indices.tolist(),
                                strict=True)
        }


def dataset_meta(model: RoutingModel) -> Dict[str, Any]:
    """Classes and palette of the dataset that a config tests on."""
    model.enter_scope()
    dataset: Mapping[str, Any] = test_dataset(model.cfg) or {}
    cls = DATASETS.get(dataset['type']) if isinstance(
        dataset.get('type'), str) else dataset.get('type')
    meta = {**getattr(cls, 'METAINFO', {}), **(dataset.get('metainfo') or {})}
    classes: Any = meta.get('classes')
    if isinstance(classes, str):
        classes = list_from_file(classes)
    meta['classes'] = tuple(classes or ())
    palette = meta.get('palette')
    if not isinstance(palette, (list, tuple)) or not palette:
        colors = representative_colors(max(len(meta['classes']), 1) + 1)[1:]
        palette = (255 * colors).round().astype(int).tolist()
    # mmdet's visualizer draws tuples, but not lists.
    meta['palette'] = list(map(tuple, palette))
    return meta
