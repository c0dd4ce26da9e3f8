"""Time callables against each other and count what they keep."""

import argparse
import ctypes
import math
import re
import statistics
import sys
import time
from pathlib import Path
from typing import (
    Any,
    Callable,
    Dict,
    List,
    NamedTuple,
    Optional,
    Sequence,
    Tuple,
)

import torch
from torch import Tensor, nn

DTYPES = ('float32', 'bfloat16', 'float16')
MODES = dict(forward=('forward', ), train=('train', ),
             both=('forward', 'train'))
MIN_ROUNDS = 5
ALLOCATORS = ('keep', 'default')
# glibc's mallopt: never give back the top of the heap, never map a block.
MALLOC_OPTIONS = {-1: -1, -4: 0}  # M_TRIM_THRESHOLD, M_MMAP_MAX
# Twice the L2 of an H200, so that writing it leaves nothing else in there.
FLUSH_BYTES = 128 * 2**20
Call = Callable[[], Any]


class Step:
    """One call of a peer, as a benchmark repeats it.

    Args:
        function (callable): Takes ``inputs``, returns one or more tensors.
        inputs (sequence): Its arguments.
        mode (str): ``'forward'``, without a graph, or ``'train'``, forward
            and the gradients of all inputs and parameters.
        parameters (sequence[Tensor]): What else the gradients are taken of.
    """

    def __init__(self, function: Callable, inputs: Sequence[Any], mode: str,
                 parameters: Sequence[Tensor] = ()) -> None:
        self.function = function
        self.mode = mode
        self.inputs = inputs
        self.wanted = [
            t for t in (*inputs, *parameters)
            if isinstance(t, Tensor) and t.requires_grad
        ]
        self.out_grads: Optional[List[Tensor]] = None

    def __call__(self) -> None:
        if self.mode == 'forward':
            with torch.no_grad():
                self.function(*self.inputs)
            return
        outs = _as_tuple(self.function(*self.inputs))
        if self.out_grads is None:
            self.out_grads = [torch.randn_like(out) for out in outs]
        # Other libraries' backbones hold parameters that maps do not need.
        torch.autograd.grad(outs, self.wanted, self.out_grads,
                            allow_unused=True)


def _as_tuple(outs: Any) -> Tuple[Tensor, ...]:
    return (outs, ) if isinstance(outs, Tensor) else tuple(outs)


def kept_for_backward(function: Callable, *inputs: Any) -> int:
    """Bytes that a function keeps for its backward.

    Every storage that a node of the graph saves counts once and whole, however
    many views of it are saved; parameters do not count. What is kept past
    ``save_for_backward`` (attributes of a ctx, the closure of
    ``torch.utils.checkpoint``) is not seen.

    Args:
        function (callable): Returns a tensor or several, with a graph.
        *inputs: Its arguments.

    Returns:
        int: Bytes.

    Raises:
        ValueError: The result has no graph, so nothing could be kept.
    """
    saved: List[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)  # alive, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        outs = _as_tuple(function(*inputs))
    nodes = [out.grad_fn for out in outs if out.grad_fn is not None]
    if not nodes:
        raise ValueError('the result has no graph; call kept_for_backward '
                         'with gradients enabled and an input or parameter '
                         'that requires one')
    parameters = (list(function.parameters())
                  if isinstance(function, nn.Module) else [])
    seen = set()
    while nodes:
        node = nodes.pop()
        if node in seen:
            continue
        seen.add(node)
        nodes.extend(n for n, _ in node.next_functions if n is not None)
        # Only the nodes of leaves have a variable.
        leaf = getattr(node, 'variable', None)
        if isinstance(leaf, nn.Parameter):
            parameters.append(leaf)
    ignored = {_storage_id(p) for p in parameters}
    sizes = {_storage_id(t): t.untyped_storage().nbytes() for t in saved}
    return sum(size for key, size in sizes.items() if key not in ignored)


def peak_gpu_bytes(call: Call) -> int:
    """The most that torch's allocator holds during a call, above before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _storage_id(tensor: Tensor) -> int:
    # Not data_ptr(), which is 0 for all tensors on the meta device.
    return tensor.untyped_storage()._cdata


class Timer:
    """Seconds of calls on one device.

    Args:
        device (str): ``'cpu'`` or ``'cuda'``, perhaps with an index.
        flush_l2 (bool): Overwrite the GPU's L2 cache before each call; the
            time of that is not counted.
    """

    def __init__(self, device: str, flush_l2: bool = False) -> None:
        self.is_cuda = device.startswith('cuda')
        self.flush = torch.empty(
            FLUSH_BYTES, dtype=torch.int8, device=device) if flush_l2 else None

    def __call__(self, call: Call, count: int) -> float:
        """Seconds of ``count`` calls."""
        if not self.is_cuda:
            start = time.perf_counter()
            for _ in range(count):
                call()
            return time.perf_counter() - start
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)]
                  for _ in range(count)]
        torch.cuda.synchronize()
        for start, end in events:
            if self.flush is not None:
                self.flush.zero_()
            start.record()
            call()
            end.record()
        torch.cuda.synchronize()
        return sum(start.elapsed_time(end) for start, end in events) / 1e3


class Measurement(NamedTuple):
    """Milliseconds a call of each peer in each round, and who is missing."""

    samples_ms: Dict[str, List[float]]
    left_out: Dict[str, str]


def measure(steps: Dict[str, Call], reference: str, *, rounds: int,
            min_time: float, skip_over: float, timer: Timer,
            log: Callable[[str], None]) -> Measurement:
    """Time all peers, each once a round, in an order that alternates.

    Args:
        steps (dict[str, callable]): The peers.
        reference (str): The peer that is never left out.
        rounds (int): Samples of each peer.
        min_time (float): Seconds that the calls of a sample take, at least.
        skip_over (float): A peer of which one call takes more seconds than
            this is left out, as is one that needs more memory than the GPU
            has. The first call counts only where it takes four times as long:
            it may compile kernels.
        timer (Timer): Of the device that all run on.
        log (callable): Takes a line on what was found.

    Returns:
        Measurement: The samples by peer, and the reasons of those left out.
    """
    counts, left_out = {}, {}
    for name, step in steps.items():
        try:
            seconds = timer(step, 1)
            if name == reference or seconds <= 4 * skip_over:
                seconds = timer(step, 1)
        except torch.OutOfMemoryError as error:
            left_out[name] = f'out of memory: {str(error).splitlines()[0]}'
        else:
            counts[name] = max(1, math.ceil(min_time / max(seconds, 1e-9)))
            log(f'{name}: one call {seconds * 1e3:.4g} ms')
            if name != reference and seconds > skip_over:
                left_out[name] = (f'one call took {seconds:.3g} s, limit '
                                  f'{skip_over:g} s')
        if name in left_out:
            log(f'{name}: left out, {left_out[name]}')
    samples = {name: [] for name in steps if name not in left_out}
    for i in range(rounds):
        for name in round_order(list(samples), i):
            ms = timer(steps[name], counts[name]) / counts[name] * 1e3
            samples[name].append(float(f'{ms:.6g}'))
    return Measurement(samples, left_out)


def round_order(names: Sequence[str], index: int) -> List[str]:
    """The order of round ``index``: rotated by one, every second reversed."""
    shift = index // 2 % max(len(names), 1)
    order = [*names[shift:], *names[:shift]]
    return order[::-1] if index % 2 else order


def ratio(samples: Sequence[float],
          others: Sequence[float]) -> Dict[str, float]:
    """Median and quartiles of the ratios round by round.

    Returns:
        dict[str, float]: ``q1``, ``median`` and ``q3``.
    """
    ratios = [a / b for a, b in zip(samples, others, strict=True)]
    q1, median, q3 = statistics.quantiles(ratios, n=4, method='inclusive')
    return dict(q1=q1, median=median, q3=q3)


def summarise(samples_ms: Dict[str, List[float]],
              reference: str) -> Dict[str, Dict[str, Any]]:
    """Medians, and the ratios that matter.

    Returns:
        dict: ``median_ms`` by peer, and ``ratios``, by ``'a/b'``: every peer
        over the reference, every RP over every other peer, once.
    """
    ratios = {
        f'{a}/{b}': ratio(samples_ms[a], samples_ms[b])
        for i, a in enumerate(samples_ms) for j, b in enumerate(samples_ms)
        if a != b and (b == reference or is_rp(a) and (i < j or not is_rp(b)))
    }
    return dict(
        median_ms={k: statistics.median(v) for k, v in samples_ms.items()},
        ratios=ratios)


def compare(calls: Dict[str, Tuple[Callable, Sequence, Sequence]], mode: str,
            reference: str, args: argparse.Namespace, timer: Timer,
            title: str, bounds: Optional[Dict[str, float]] = None
            ) -> Dict[str, Any]:
    """Measure peers against each other, time and memory, with progress.

    Args:
        calls (dict): By peer, the function, inputs and parameters of a
            :class:`Step`.
        mode (str): ``'forward'`` or ``'train'``.
        reference (str): The peer that all are compared with.
        args (Namespace): See :func:`check_arguments`.
        timer (Timer): Of the device.
        title (str): What the lines of progress begin with.
        bounds (dict, optional): By peer, a factor for its times; these peers
            run forward in any mode, and keep nothing.

    Returns:
        dict: What a record of the JSON says on it.
    """
    bounds = bounds or {}
    steps = {
        name: Step(function, inputs, 'forward' if name in bounds else mode,
                   tuple(parameters))
        for name, (function, inputs, parameters) in calls.items()
    }

    def log(line: str) -> None:
        print(f'  {title} {mode}: {line}', file=sys.stderr, flush=True)

    samples, left_out = measure(
        steps, reference, rounds=args.rounds, min_time=args.min_time,
        skip_over=args.skip_over, timer=timer, log=log)
    for name, factor in bounds.items():
        samples[name] = [ms * factor for ms in samples[name]]
    record = dict(mode=mode, reference=reference, samples_ms=samples,
                  left_out=left_out, **summarise(samples, reference))
    if mode == 'train':
        measured = [name for name in samples if name not in bounds]
        record['kept_bytes'] = {
            name: kept_for_backward(calls[name][0], *calls[name][1])
            for name in measured
        }
        if timer.is_cuda:
            record['peak_gpu_bytes'] = {
                name: peak_gpu_bytes(steps[name]) for name in measured
            }
    for key, found in record['ratios'].items():
        log('{} {median:.3f} ({q1:.3f} to {q3:.3f})'.format(key, **found))
    return record


def is_rp(peer: str) -> bool:
    """Whether a peer is RPAttention: ``'rp'`` or ``'rp-<impl>'``."""
    return peer.split('-')[0] == 'rp'


def crossovers(sizes: Sequence[float], ratios: Sequence[float]) -> List[float]:
    """Where a curve of ratios crosses 1, straight lines in log-log.

    Args:
        sizes (sequence[float]): Rising, positive.
        ratios (sequence[float]): One a size, positive.

    Returns:
        list[float]: The sizes, rising; a measured 1 counts once.
    """
    found = []
    for i in range(len(sizes) - 1):
        (x0, y0), (x1, y1) = ((math.log(sizes[j]), math.log(ratios[j]))
                              for j in (i, i + 1))
        if y0 * y1 < 0 or (y1 == 0 and y0 != 0):
            found.append(math.exp(x0 + (x1 - x0) * y0 / (y0 - y1)))
    return found


# The command line that both tools share.


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of :func:`check_arguments`."""
    parser.add_argument('--device', default='cpu', help='default: cpu')
    parser.add_argument('--dtype',
                        help=f'one of {", ".join(DTYPES)}; default: float32 '
                        'on the CPU, bfloat16 on a GPU')
    parser.add_argument('--batch', type=int, help='default: 1 on the CPU, 8 '
                        'on a GPU')
    parser.add_argument('--mode', default='both',
                        help=f'one of {", ".join(MODES)}; default: both')
    parser.add_argument('--rounds', type=int, default=7,
                        help='samples of each peer, at least '
                        f'{MIN_ROUNDS} (default: %(default)s)')
    parser.add_argument('--min-time', type=float, default=0.3,
                        metavar='SECONDS', help='length of a sample, at least '
                        '(default: %(default)s)')
    parser.add_argument('--skip-over', type=float, default=10.,
                        metavar='SECONDS', help='leave out peers of which one '
                        'call takes longer, and say so (default: %(default)s)')
    parser.add_argument('--threads', type=int, metavar='N',
                        help="threads of torch on the CPU; default: torch's")
    parser.add_argument('--allocator',
                        help='what the C library does with freed memory on '
                        f'the CPU, one of {", ".join(ALLOCATORS)}: "keep" '
                        'keeps it, so that what one peer frees does not '
                        'decide how much the next one pays for fresh pages; '
                        'default: keep with glibc, which alone can')
    parser.add_argument('--flush-l2', action='store_true',
                        help="overwrite the GPU's L2 before each call")
    parser.add_argument('--out', type=Path, metavar='JSON',
                        help='file to write; default: standard output')


def check_arguments(args: argparse.Namespace) -> None:
    """Check the shared options and fill in what depends on the device.

    Raises:
        ValueError: A value that cannot be used; the message says what can.
    """
    try:
        kind = torch.device(args.device).type
    except RuntimeError:
        kind = args.device
    check_known('--device', [kind], ('cpu', 'cuda'))
    if kind == 'cuda' and not torch.cuda.is_available():
        raise ValueError(f'--device {args.device}: torch finds no GPU here; '
                         'use --device cpu')
    if args.flush_l2 and kind != 'cuda':
        raise ValueError('--flush-l2 is for --device cuda')
    if args.dtype is None:
        args.dtype = 'float32' if kind == 'cpu' else 'bfloat16'
    if args.batch is None:
        args.batch = 1 if kind == 'cpu' else 8
    check_known('--dtype', [args.dtype], DTYPES)
    check_known('--mode', [args.mode], MODES)
    for name, least in (('batch', 1), ('rounds', MIN_ROUNDS), ('threads', 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise ValueError(f'--{name} must be at least {least}, got {value}')
    for name in ('min_time', 'skip_over'):
        if not getattr(args, name) > 0:
            raise ValueError(f'--{name.replace("_", "-")} must be positive, '
                             f'got {getattr(args, name)}')
    if args.out is not None and not args.out.parent.is_dir():
        raise ValueError(f'--out {args.out}: there is no folder '
                         f'{args.out.parent}; make it first')
    check_known('--allocator', [args.allocator or 'keep'], ALLOCATORS)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    if args.allocator != 'default':
        kept = keep_freed_memory()
        if args.allocator == 'keep' and not kept:
            raise ValueError('--allocator keep needs glibc, which this '
                             'system lacks; use --allocator default')
        args.allocator = 'keep' if kept else 'default'


def keep_freed_memory() -> bool:
    """Make the C library keep what is freed, if it is glibc.

    glibc hands large blocks back to the system, from a size that depends on
    what was freed before, and the system clears a page at its next use. Other
    allocators, those that torch's tuning guide recommends among them, keep
    the memory.
    """
    mallopt = getattr(ctypes.CDLL(None), 'mallopt', None)
    return mallopt is not None and all(
        mallopt(option, value) == 1
        for option, value in MALLOC_OPTIONS.items())


def check_known(option: str, values: Sequence[str],
                known: Sequence[str]) -> None:
    """Raise ValueError unless all values of an option are known ones."""
    for value in values:
        if value not in known:
            raise ValueError(f'{option} must be out of {", ".join(known)}, '
                             f'got {value!r}')


def parse_sizes(option: str, text: str, names: str) -> Tuple[int, ...]:
    """Positive numbers from text such as 56x56x96x16.

    Raises:
        ValueError: It is something else.
    """
    count = len(names.split('x'))
    if not re.fullmatch(rf'[1-9]\d*(?:x[1-9]\d*){{{count - 1}}}', text):
        raise ValueError(f'{option} takes {names} in positive numbers, got '
                         f'{text!r}')
    return tuple(int(part) for part in text.split('x'))
