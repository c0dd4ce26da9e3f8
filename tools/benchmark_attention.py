"""Time RPAttention against other attention layers, and weigh their memory.

The layers all map tokens (B, N, C) of an H x W map: rp (one for each of
--impls), projections (RP's own qkv and proj alone: the lower bound), dense
(torch's SDPA), sr (PVT's spatial reduction, 8, 4, 2 or 1 for up to 96, 192,
384 or more channels), window (Swin's, 7 x 7, shifted) and agent (pooled
agents, on the smallest square grid of at least M).

The operators work on q, k, v, without projections: rp, naive, sdpa (flash, for
half precision on a GPU) and floor, the time in which their tensors could be
moved once at the copy bandwidth that is measured beside them in each round.

In each round every peer is timed once. Ratios are taken round by round; their
median and quartiles are reported, with every sample.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence

import torch
from benchmarks import attention, measure, reports
from benchmarks.attention import Case

from mmrpa.ops import IMPLS

CASES = ('56x56x96x16', '200x334x96x16', '100x167x192x32', '50x84x384x64',
         '25x42x768x64')
SWEEP = tuple(f'{side}x96x16' for side in (
    '16x16', '23x23', '32x32', '45x45', '64x64', '90x90', '128x128',
    '181x181', '200x334'))
PARTS = dict(
    layer=('projections', ('rp', *attention.LAYERS)),
    operator=('floor', ('rp', 'floor', 'naive', 'sdpa')))
PEERS = tuple(dict.fromkeys(p for _, peers in PARTS.values() for p in peers))
# Tensors of B * N * C: forward reads q, k, v and writes the output; backward
# reads q, k, v and the output's gradient and writes three gradients.
FLOOR_TENSORS = dict(forward=4, train=11)
MILLION = 1_000_000
MILLION_LIMIT = 8 * 2**30
MILLION_CODE = """import json, sys
sys.path[:0] = {paths!r}
from benchmarks.attention import million
import torch
torch.set_num_threads({threads})
print(json.dumps(million({tokens}, {impl!r}, {device!r})))"""


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """Read and check the command line.

    Raises:
        ValueError: A value that cannot be used.
    """
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--cases', nargs='+', metavar='HxWxCxM',
                        help=f'C a multiple of {attention.HEAD_DIMS}, the '
                        f'width of a head; default: {" ".join(CASES)}')
    parser.add_argument('--sweep', action='store_true',
                        help='instead: N from 256 to 66 800, C=96, M=16')
    parser.add_argument('--million', action='store_true',
                        help='one more case, of a million tokens (C=32, M=16, '
                        'float32), in a process of its own')
    parser.add_argument('--parts', nargs='+',
                        help=f'out of {", ".join(PARTS)}; default: layer on '
                        'the CPU, both on a GPU')
    parser.add_argument('--peers', nargs='+', default=PEERS,
                        help=f'out of {", ".join(PEERS)}; default: all')
    parser.add_argument('--impls', nargs='+', default=['auto'],
                        help='of rp, the first is the one that the docs '
                        f'compare: out of {", ".join(IMPLS)}; default: auto')
    measure.add_arguments(parser)
    args = parser.parse_args(argv)
    measure.check_arguments(args)
    if args.sweep and args.cases:
        raise ValueError('--sweep has cases of its own; leave out --cases')
    texts = args.cases or (SWEEP if args.sweep else CASES)
    args.cases = [
        Case(*measure.parse_sizes('--cases', t, 'HxWxCxM')) for t in texts
    ]
    for case in args.cases:
        if case.channels % attention.HEAD_DIMS:
            raise ValueError(f'--cases {case}: C must be a multiple of '
                             f'{attention.HEAD_DIMS}')
    if args.parts is None:
        args.parts = (list(PARTS) if args.device.startswith('cuda') else
                      ['layer'])
    measure.check_known('--parts', args.parts, tuple(PARTS))
    measure.check_known('--peers', args.peers, PEERS)
    measure.check_known('--impls', args.impls, IMPLS)
    check_impls(args)
    return args


def check_impls(args: argparse.Namespace) -> None:
    """Raise ValueError if an impl does not take a case, before all else."""
    for case in dict.fromkeys(
            c._replace(height=8, width=8) for c in args.cases):
        layers = attention.layer_peers(case, ['rp'], args.impls)
        for name, layer in layers.items():
            try:
                with torch.no_grad():
                    run_layer(layer, case)(make_tokens(case, args, layer))
            except (TypeError, ValueError) as error:
                raise ValueError(f'--impls: {name} does not take {case} in '
                                 f'{args.dtype} on {args.device}: {error}'
                                 ) from error


def make_tokens(case: Case, args: argparse.Namespace,
                *layers: torch.nn.Module) -> torch.Tensor:
    """Random tokens (B, N, C); the layers are moved to where these are."""
    x = torch.randn(args.batch, case.tokens, case.channels,
                    dtype=getattr(torch, args.dtype), device=args.device)
    for layer in layers:
        layer.to(x)
    return x.requires_grad_()


def run_layer(layer: torch.nn.Module, case: Case) -> Callable:
    """The layer as a function of tokens alone."""
    return lambda x: layer(x, hw_shape=(case.height, case.width))


def benchmark(case: Case, part: str, mode: str, args: argparse.Namespace,
              timer: measure.Timer) -> Dict[str, Any]:
    """Measure one case in one mode; returns a record for the JSON."""
    reference, known = PARTS[part]
    peers = {reference, *(p for p in args.peers if p in known)}
    dtype = getattr(torch, args.dtype)
    # Bytes of one tensor (B, N, C).
    unit = args.batch * case.tokens * case.channels * dtype.itemsize
    bounds = {}
    if part == 'layer':
        layers = attention.layer_peers(case, peers, args.impls)
        x = make_tokens(case, args, *layers.values())
        calls = {name: (run_layer(layer, case), (x, ), layer.parameters())
                 for name, layer in layers.items()}
    else:
        calls = attention.operator_peers(
            case, peers, args.impls, args.batch,
            torch.empty(0, dtype=dtype, device=args.device))
        size = FLOOR_TENSORS[mode] * unit
        bounds['floor'] = size / attention.COPY_BYTES
    record = measure.compare(calls, mode, reference, args, timer,
                             f'{part} {case}', bounds)
    record.update(
        part=part,
        case=dict(case._asdict(), tokens=case.tokens, heads=case.heads,
                  sr_ratio=case.sr_ratio, agents=case.agent_side**2),
        # x, q, k, v and the attention's output; the operator has no x.
        io_bytes=(5 if part == 'layer' else 4) * unit)
    if part == 'operator':
        record['floor'] = dict(
            tensors=FLOOR_TENSORS[mode], bytes=size,
            copy_gb_per_s=[size / ms / 1e6
                           for ms in record['samples_ms']['floor']])
    return record


def run_million(impl: str, device: str) -> Dict[str, Any]:
    """Run ``MILLION`` tokens in a child process; returns its record.

    Raises:
        ValueError: The child failed; the message is its last line.
    """
    print(f'  {MILLION} tokens, {impl}', file=sys.stderr, flush=True)
    folder = Path(__file__).resolve().parent
    code = MILLION_CODE.format(
        paths=[str(folder), str(folder.parent)], tokens=MILLION, impl=impl,
        device=device, threads=torch.get_num_threads())
    done = subprocess.run([sys.executable, '-c', code], capture_output=True,
                          text=True)
    if done.returncode:
        reason = (done.stderr.splitlines() or ['no message'])[-1]
        raise ValueError(f'--million ended with code {done.returncode}: '
                         f'{reason}')
    return dict(part='million', impl=impl, limit_bytes=MILLION_LIMIT,
                **json.loads(done.stdout))


def body(argv: Sequence[str]) -> None:
    """Measure all cases and write the report."""
    args = parse_args(argv)
    timer = measure.Timer(args.device, args.flush_l2)
    records: List[Dict[str, Any]] = []
    if args.million:
        records += [run_million(impl, args.device) for impl in args.impls]
    records += [
        benchmark(case, part, mode, args, timer) for part in args.parts
        for mode in measure.MODES[args.mode] for case in args.cases
    ]
    reports.write_report(
        reports.make_report('benchmark_attention', args, argv, records,
                            impls=args.impls, sweep=args.sweep,
                            head_dims=attention.HEAD_DIMS), args.out)


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the tool; returns the exit code."""
    return reports.run_tool('benchmark_attention', body, argv)


if __name__ == '__main__':
    sys.exit(main())
