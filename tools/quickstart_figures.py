"""Draw what a detector and a segmentor of the quickstart have learned."""

import argparse
import sys
from pathlib import Path
from typing import Dict, List, Optional, Sequence

import matplotlib
import mmcv
import numpy as np
import torch
from mmengine.config import Config

from mmrpa.safe_loading import protect_process
from mmrpa.visualization import (
    effective_representatives,
    paint_routing,
    record_routing,
)
from mmrpa.weights import CheckpointError

matplotlib.use('Agg')  # no screen needed

from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.patches import Patch, Rectangle  # noqa: E402

# What is shown; the metrics count boxes of all scores.
SCORE_THR = 0.7


def _grid(rows: int, titles: Sequence[str]) -> tuple:
    """A tight grid of square axes with a title over each column."""
    figure, axes = plt.subplots(
        rows,
        len(titles),
        figsize=(1.65 * len(titles), 1.65 * rows + 0.25),
        squeeze=False,
        gridspec_kw=dict(wspace=0.04, hspace=0.04))
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
        axis.spines[:].set_visible(False)
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title, fontsize=7)
    return figure, axes


def _save(figure, path: Path) -> None:
    figure.savefig(path, dpi=150, bbox_inches='tight', pad_inches=0.03)
    plt.close(figure)


def _legend(figure, names: Sequence[str], colors: Sequence) -> None:
    """One line of colours below all images."""
    patches = [Patch(facecolor=color, edgecolor='0.6', linewidth=0.4,
                     label=name)
               for name, color in zip(names, colors, strict=True)]
    bottom = min(axis.get_position().y0 for axis in figure.axes)
    figure.legend(handles=patches, loc='upper center', ncol=len(names),
                  bbox_to_anchor=(0.5, bottom - 0.005), frameon=False,
                  fontsize=6, handlelength=1, handleheight=1,
                  columnspacing=0.9, handletextpad=0.4)


def _draw_instances(axis, image: np.ndarray, boxes, masks, labels,
                    colors: np.ndarray, scores=None) -> None:
    shown = image.astype(float) / 255
    for mask, label in zip(masks, labels, strict=True):
        shown[mask] = 0.5 * shown[mask] + 0.5 * colors[label]
    axis.imshow(shown)
    taken: List[tuple] = []
    for i, (box, label) in enumerate(zip(boxes, labels, strict=True)):
        x1, y1, x2, y2 = (float(v) for v in box)
        axis.add_patch(
            Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, linewidth=1,
                      edgecolor=colors[label]))
        if scores is not None:
            x, y = _free_corner(x1, y1, x2, y2, image.shape, taken)
            axis.text(x, y, f'{scores[i]:.2f}', fontsize=4.5, color='white',
                      ha='left', va='top',
                      bbox=dict(facecolor=colors[label], pad=0.5,
                                linewidth=0))


def _free_corner(x1: float, y1: float, x2: float, y2: float,
                 shape: Sequence[int], taken: List[tuple]) -> tuple:
    """Where in a box its score hides no other one; adds it to ``taken``."""
    width, height = 0.1 * shape[1], 0.055 * shape[0]  # of a score
    right, bottom = x2 - width, y2 - height
    corners = [(min(max(x, 1), shape[1] - 1 - width),
                min(max(y, 1), shape[0] - 1 - height))
               for y in (y1, bottom) for x in (x1, right)]
    free = (c for c in corners
            if all(abs(c[0] - x) > width or abs(c[1] - y) > height
                   for x, y in taken))
    taken.append(next(free, corners[0]))
    return taken[-1]


def draw_detections(config: str, checkpoint: str, path: Path,
                    num_images: int = 3) -> None:
    """Image, ground truth and prediction of held-out images.

    Args:
        config (str): The detector's config.
        checkpoint (str): Its weights.
        path (Path): The PNG to write.
        num_images (int): Rows of the figure.
    """
    from mmdet.apis import inference_detector, init_detector
    from mmdet.registry import DATASETS
    model = init_detector(config, checkpoint, device='cpu')
    cfg = Config.fromfile(config)
    dataset = DATASETS.build(cfg.test_dataloader.dataset)
    names = cfg.classes
    colors = plt.get_cmap('tab10').colors
    colors = np.array(colors)[:len(names)]
    figure, axes = _grid(num_images, ('image', 'ground truth',
                                      f'prediction, score > {SCORE_THR}'))
    for row, i in zip(axes, _busiest(dataset, num_images), strict=True):
        sample = dataset[i]['data_samples']
        image = mmcv.imread(sample.img_path, channel_order='rgb')
        row[0].imshow(image)
        truth = sample.gt_instances
        _draw_instances(row[1], image, truth.bboxes.tensor,
                        truth.masks.masks.astype(bool), truth.labels, colors)
        found = inference_detector(model, sample.img_path).pred_instances
        found = found[found.scores > SCORE_THR].numpy()
        _draw_instances(row[2], image, found.bboxes, found.masks,
                        found.labels, colors, found.scores)
        for axis in row:
            axis.set_xlim(-0.5, image.shape[1] - 0.5)
            axis.set_ylim(image.shape[0] - 0.5, -0.5)
    _legend(figure, names, colors)
    _save(figure, path)


def _busiest(dataset, num: int) -> List[int]:
    """The first images with the most objects: occlusion is what is hard."""
    counts = [len(dataset.get_data_info(i)['instances'])
              for i in range(len(dataset))]
    return sorted(range(len(dataset)), key=lambda i: -counts[i])[:num]


def draw_segmentation(config: str, checkpoint: str, path: Path,
                      num_images: int = 3) -> None:
    """Image, label map and prediction of held-out images.

    Args:
        config (str): The segmentor's config.
        checkpoint (str): Its weights.
        path (Path): The PNG to write.
        num_images (int): Rows of the figure.
    """
    from mmseg.apis import inference_model, init_model
    from mmseg.registry import DATASETS
    model = init_model(config, checkpoint, device='cpu')
    cfg = Config.fromfile(config)
    dataset = DATASETS.build(cfg.test_dataloader.dataset)
    palette = np.array(cfg.palette) / 255
    figure, axes = _grid(num_images, ('image', 'ground truth', 'prediction'))
    for row, i in zip(axes, range(num_images), strict=True):
        sample = dataset[i]['data_samples']
        image = mmcv.imread(sample.img_path, channel_order='rgb')
        row[0].imshow(image)
        truth = sample.gt_sem_seg.data[0].numpy()
        unlabelled = truth == 255
        shown = palette[np.where(unlabelled, 0, truth)]
        shown[unlabelled] = 1
        row[1].imshow(shown)
        result = inference_model(model, sample.img_path)
        row[2].imshow(palette[result.pred_sem_seg.data[0].numpy()])
    _legend(figure, [*cfg.classes, 'ignored'], [*palette, (1, 1, 1)])
    _save(figure, path)


def draw_routing(config: str, checkpoint: str, path: Path,
                 num_images: int = 3) -> None:
    """The representatives of each stage's last block as soft segments.

    A title also says how many representatives are in use: exp of the entropy
    of their mean shares, averaged over heads and images.

    Args:
        config (str): The detector's config.
        checkpoint (str): Its weights.
        path (Path): The PNG to write.
        num_images (int): Rows of the figure.
    """
    from mmdet.apis import inference_detector, init_detector
    from mmdet.registry import DATASETS
    model = init_detector(config, checkpoint, device='cpu')
    dataset = DATASETS.build(Config.fromfile(config).test_dataloader.dataset)
    images, recorded = [], []
    for index in _busiest(dataset, num_images):
        image = dataset.get_data_info(index)['img_path']
        with record_routing(model.backbone) as maps, torch.no_grad():
            inference_detector(model, image)
        images.append(mmcv.imread(image, channel_order='rgb'))
        recorded.append(_last_of_each_stage(maps))
    titles = ['image']
    for stage, maps in enumerate(zip(*recorded, strict=True), start=1):
        used = np.mean([effective_representatives(p) for p in maps])
        titles.append(f'stage {stage}: {used:.1f} of {maps[0].shape[2]} used')
    figure, axes = _grid(num_images, titles)
    for row, pixels, maps in zip(axes, images, recorded, strict=True):
        row[0].imshow(pixels)
        for axis, routing in zip(row[1:], maps, strict=True):
            # The head that uses most of its representatives shows most.
            head = max(range(routing.shape[1]), key=lambda h, p=routing:
                       effective_representatives(p[:, h:h + 1]))
            axis.imshow(paint_routing(routing[0, head], pixels.shape[:2]))
    _save(figure, path)


def _last_of_each_stage(maps: Dict[str, torch.Tensor]) -> List[torch.Tensor]:
    """'stages.2.blocks.1.attn' and the like, in order: the last one wins."""
    last = {}
    for name, routing in maps.items():
        last[int(name.split('.')[1])] = routing
    return [last[stage] for stage in sorted(last)]


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Draw all three figures; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ('detector', 'segmentor'):
        parser.add_argument(f'{name}_config')
        parser.add_argument(f'{name}_checkpoint')
    parser.add_argument('out', type=Path, help='folder for the PNG files')
    args = parser.parse_args(argv)
    protect_process()
    detector = (args.detector_config, args.detector_checkpoint)
    try:
        draw_detections(*detector, args.out / 'detections.png')
        draw_routing(*detector, args.out / 'routing.png')
        draw_segmentation(args.segmentor_config, args.segmentor_checkpoint,
                          args.out / 'segmentation.png')
    except (OSError, CheckpointError) as error:
        print(f'quickstart_figures: error: {error}', file=sys.stderr)
        return 1
    return 0


if __name__ == '__main__':
    sys.exit(main())
