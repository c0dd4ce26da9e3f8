"""Which labels heads and metrics ignore, and which padding brings in."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from ..preflight import type_name
from .loaders import step_name

_HEADS = ('decode_head', 'auxiliary_head')
# A head that makes labels of its own from those of the maps: boundaries.
_MAKES_LABELS = ('STDCHead', )
# Losses that go by an argument of their own and not by that of the head.
_OWN_SETTINGS = {'TverskyLoss': 'ignore_index',
                 'OhemCrossEntropy': 'ignore_label'}
_DEFAULT = 255  # of all heads, losses, metrics and paddings of mmseg
# Transforms that pad label maps, by an argument of this name.
_PADDING_STEPS = ('RandomRotate', 'RandomMosaic')


class Consumer(NamedTuple):
    """A head, a loss or a metric that is given the labels of the maps.

    Attributes:
        key (str): Its dotted key in the config.
        setting (str): The argument that says what it ignores.
        ignored (int | None): The label that it ignores, None for none.
    """

    key: str
    setting: str
    ignored: int | None

    def __str__(self) -> str:
        return f'{self.key} ({self.setting}={self.ignored})'


def find_consumers(cfg: Mapping, split: str) -> tuple[Consumer, ...]:
    """What is given the labels of a split.

    Args:
        cfg (Mapping): The config.
        split (str): 'train' for the heads and losses of an mmseg segmentor;
            'val' or 'test' for the metrics, as no loss is computed there.

    Returns:
        tuple[Consumer]: Empty if the config has none that is known.
    """
    return tuple(_of_heads(cfg.get('model'), 'model') if split == 'train' else
                 _of_metrics(cfg, split))


def find_metrics(cfg: Mapping, split: str) -> Iterator[tuple[str, Mapping]]:
    """Yield (dotted key, settings) of the evaluators of a split."""
    key = f'{split}_evaluator'
    yield from _items(cfg.get(key), key)


def find_paddings(cfg: Mapping, steps: Iterable[Mapping]
                  ) -> Iterator[tuple[str, int]]:
    """Yield where a training pads label maps, and with which label.

    Args:
        cfg (Mapping): The config.
        steps (Iterable[Mapping]): The transforms of its training.
    """
    model = cfg.get('model')
    place, holder = 'model.', model if isinstance(model, Mapping) else {}
    if holder.get('data_preprocessor') is None:
        place, holder = '', cfg  # the Runner gives it to the model
    settings = holder.get('data_preprocessor')
    if (isinstance(settings, Mapping)
            and type_name(settings) == 'SegDataPreProcessor'):
        yield (f'{place}data_preprocessor.seg_pad_val',
               settings.get('seg_pad_val', _DEFAULT))
    for step in steps:
        name = step_name(step)
        if name in _PADDING_STEPS:
            yield f'seg_pad_val of {name}', step.get('seg_pad_val', _DEFAULT)
        elif name == 'Pad':
            value = step.get('pad_val')
            # One number is for the image alone.
            yield "pad_val['seg'] of Pad", value.get(
                'seg', _DEFAULT) if isinstance(value, Mapping) else _DEFAULT


def _of_heads(node: Any, key: str) -> Iterator[Consumer]:
    if not isinstance(node, Mapping):
        return
    for name, child in node.items():
        if name in _HEADS:
            for head_key, head in _items(child, f'{key}.{name}'):
                yield from _of_head(head, head_key)
        else:
            yield from _of_heads(child, f'{key}.{name}')


def _of_head(head: Mapping, key: str) -> Iterator[Consumer]:
    if type_name(head) in _MAKES_LABELS:
        return
    if isinstance(head.get('kernel_generate_head'), Mapping):
        # K-Net's takes all that concerns labels from there.
        yield from _of_head(head['kernel_generate_head'],
                            f'{key}.kernel_generate_head')
        return
    losses = list(_items(head.get('loss_decode'), f'{key}.loss_decode'))
    own = [(loss_key, loss) for loss_key, loss in losses
           if type_name(loss) in _OWN_SETTINGS]
    if not own or len(own) < len(losses):
        yield from _consumer(head, key, 'ignore_index')
    for loss_key, loss in own:
        yield from _consumer(loss, loss_key, _OWN_SETTINGS[type_name(loss)])


def _of_metrics(cfg: Mapping, split: str) -> Iterator[Consumer]:
    for key, metric in find_metrics(cfg, split):
        # Others take labels from elsewhere, or are not known here.
        if type_name(metric) == 'IoUMetric' and not metric.get('format_only'):
            yield from _consumer(metric, key, 'ignore_index')


def _items(node: Any, key: str) -> Iterator[tuple[str, Mapping]]:
    """(dotted key, settings) of one dict, or of each of a list."""
    if isinstance(node, Mapping):
        yield key, node
    elif isinstance(node, (list, tuple)):
        for i, child in enumerate(node):
            if isinstance(child, Mapping):
                yield f'{key}.{i}', child


def _consumer(settings: Mapping, key: str,
              setting: str) -> Iterator[Consumer]:
    value = settings.get(setting, _DEFAULT)
    if value is None or type(value) is int:  # else no host takes it
        yield Consumer(key, setting, value)
