"""How the representatives are used while a model is trained."""

import logging
import re
from typing import Any, Dict, List, NamedTuple, Optional

import torch
from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.model import is_model_wrapper
from torch import Tensor, nn

from ..layers import RPAttention
from ..registry import HOOKS

# Fractions of its multiples fill [0, 1] evenly, for every number of them.
_GOLDEN = 0.6180339887498949
_IN_BACKBONE = re.compile(r'(.*?)stages\.(\d+)\.blocks\.\d+\.attn')


class RoutingStats(NamedTuple):
    """What is recorded of a stage, a mean over its heads and blocks.

    Attributes:
        occupied (float): Representatives in use: exp of the entropy of their
            shares of an image's tokens, from 1 to M.
        entropy (float): Of a token's routing, over log M: 0 if each token has
            one representative, 1 if it is spread over all.
        dead (float): Representatives with next to no tokens.
        max_mass (float): Share of the tokens that the largest holds, from 1/M
            to 1.
    """

    occupied: float
    entropy: float
    dead: float
    max_mass: float


def routing_stats(routing: Tensor, dead_below: float = 0.01) -> Tensor:
    """The numbers of :class:`RoutingStats` for one layer.

    Args:
        routing (Tensor): P of some tokens of some images, (B, h, M, N).
        dead_below (float): A representative is dead if its share of all
            tokens is below this part of the even share 1/M.

    Returns:
        Tensor: (4), in the routing's dtype and on its device.
    """
    # Routing over tokens does not sum to 1 over the representatives.
    p = routing / routing.sum(2, keepdim=True).clamp(min=1e-30)
    num = p.shape[2]
    shares = p.mean(-1)  # (B, h, M)
    occupied = torch.special.entr(shares).sum(-1).exp().mean()
    # log M is 0 for one representative, and so is the entropy.
    most = torch.tensor(float(max(num, 2))).log()
    entropy = torch.special.entr(p).sum(2).mean() / most
    overall = shares.mean(0)  # (h, M)
    dead = (overall < dead_below / num).to(p.dtype).sum(-1).mean()
    max_mass = overall.amax(-1).mean()
    return torch.stack([occupied, entropy, dead, max_mass])


@HOOKS.register_module()
class RoutingStatsHook(Hook):
    """Log how many representatives each stage uses while it trains.

    Every ``interval`` iterations, a few tokens of a few images are routed once
    more beside the forward pass. The result goes to the console as a table and
    to all visualisation backends as ``routing/stage1/occupied`` and so on,
    with the names of :class:`RoutingStats`. Training is not changed: no random
    number is drawn and no gradient computed. In distributed training the first
    process records its own images.

    Args:
        interval (int): Iterations between two records.
        num_images (int): Images of the batch that are looked at, at most.
        num_tokens (int): Tokens of each, spread evenly over the map.
        dead_below (float): A representative is dead if it holds less than this
            part of the even share 1/M of the tokens.

    Examples:
        In a config: ``custom_hooks = [dict(type='mmrpa.RoutingStatsHook',
        interval=500)]``.

    Raises:
        ValueError: An argument is out of range; when training starts: the
            model has no RPAttention layer.
    """

    def __init__(self,
                 interval: int = 500,
                 num_images: int = 4,
                 num_tokens: int = 256,
                 dead_below: float = 0.01) -> None:
        for name, value in (('interval', interval), ('num_images', num_images),
                            ('num_tokens', num_tokens)):
            if (isinstance(value, bool) or not isinstance(value, int)
                    or value < 1):
                raise ValueError(f'{name} of RoutingStatsHook must be an '
                                 f'integer of at least 1, got {value!r}')
        if (isinstance(dead_below, bool)
                or not isinstance(dead_below, (int, float))
                or not 0 < dead_below < 1):
            raise ValueError('dead_below of RoutingStatsHook must be between '
                             f'0 and 1, got {dead_below!r}')
        self.interval = interval
        self.num_images = num_images
        self.num_tokens = num_tokens
        self.dead_below = dead_below
        self._handles: List[Any] = []
        self._recorded: Dict[str, Tensor] = {}
        self._warned = False

    def before_train(self, runner) -> None:
        """Check that there is something to look at."""
        if not self._find_layers(runner.model):
            raise ValueError(
                'RoutingStatsHook found no RPAttention layer in the model; '
                "take it out of custom_hooks, or use a backbone with 'rp' "
                'attention')

    def before_train_iter(self, runner, batch_idx: int,
                          data_batch: Optional[dict] = None) -> None:
        """Listen to the layers for one iteration in ``interval``."""
        self._stop()  # what an iteration that failed has left
        if (self.every_n_train_iters(runner, self.interval)
                and is_main_process()):
            for name, layer in self._find_layers(runner.model).items():
                self._handles.append(
                    layer.register_forward_pre_hook(
                        self._listener(name), with_kwargs=True))

    def after_train_iter(self, runner, batch_idx: int,
                         data_batch: Optional[dict] = None,
                         outputs: Optional[dict] = None) -> None:
        """Report what was heard."""
        if not self._handles:
            return
        recorded = self._recorded
        self._stop()
        if recorded:
            self._report(runner, recorded)
        elif not self._warned:
            self._warned = True
            print_log(
                f'RoutingStatsHook: no RPAttention layer was called in '
                f'iteration {runner.iter + 1}, so there is nothing to record '
                '(a compiled model leaves out its hooks)', logger='current',
                level=logging.WARNING)

    def after_train(self, runner) -> None:
        """Leave no hook on the model."""
        self._stop()

    def _find_layers(self, model: nn.Module) -> Dict[str, RPAttention]:
        while is_model_wrapper(model):
            model = model.module
        return {name: module for name, module in model.named_modules()
                if isinstance(module, RPAttention)}

    def _listener(self, name: str):

        def listen(layer: RPAttention, args: tuple, kwargs: dict) -> None:
            # A layer is called again where its activations are recomputed.
            if name not in self._recorded:
                self._recorded[name] = self._look(layer, *args, **kwargs)

        return listen

    @torch.no_grad()
    def _look(self, layer: RPAttention, x: Tensor, hw_shape=None) -> Tensor:
        """Statistics of some of the tokens that a layer is called with."""
        if x.dim() == 4:
            x = x.flatten(2).transpose(1, 2)
        area = x.shape[1] if hw_shape is None else hw_shape[0] * hw_shape[1]
        x = x[:self.num_images, x.shape[1] - area:]  # no CLS token
        if area > self.num_tokens:
            places = torch.arange(1, self.num_tokens + 1, dtype=torch.float64)
            places = (places * _GOLDEN % 1 * area).long()
            x = x[:, places.to(x.device)]
        routing = layer.routing_map(x, (1, x.shape[1])).squeeze(-2)
        return routing_stats(routing, self.dead_below)

    def _report(self, runner, recorded: Dict[str, Tensor]) -> None:
        layers = self._find_layers(runner.model)
        # One transfer for all layers.
        values = torch.stack(list(recorded.values())).tolist()
        stages: Dict[str, List[int]] = {}
        for i, name in enumerate(recorded):
            stages.setdefault(_stage_of(name, recorded), []).append(i)
        scalars, lines = {}, [_HEADER]
        for stage, rows in stages.items():
            stats = RoutingStats(
                *(sum(column) / len(rows)
                  for column in zip(*(values[i] for i in rows), strict=True)))
            names = list(recorded)
            num = layers[names[rows[0]]].num_representatives
            lines.append(_ROW.format(stage, f'{stats.occupied:.1f} of {num}',
                                     *stats[1:]))
            for field, value in stats._asdict().items():
                scalars[f'routing/{stage}/{field}'] = value
        runner.logger.info('\n'.join(lines))
        runner.visualizer.add_scalars(scalars, step=runner.iter + 1)

    def _stop(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._recorded = {}


_HEADER = f'{"routing":<12}{"in use":>14}{"entropy":>10}{"dead":>8}' \
          f'{"max mass":>11}'
_ROW = '{:<12}{:>14}{:>10.3f}{:>8.1f}{:>11.3f}'


def _stage_of(name: str, names: Any) -> str:
    """'stage3' of 'backbone.stages.2.blocks.1.attn'.

    With the backbone's own name in front where a model has several, and the
    layer's name for a layer outside of any backbone.
    """
    found = _IN_BACKBONE.fullmatch(name)
    if not found:
        return name
    several = len({m[1] for m in map(_IN_BACKBONE.fullmatch, names) if m}) > 1
    prefix = found[1] if several else ''
    return f'{prefix}stage{int(found[2]) + 1}'
