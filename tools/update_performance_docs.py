"""Write docs/performance.md from what was measured, docs/benchmarks/*.json."""

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence

import torch
from benchmarks.measure import ratio
from benchmarks.reports import run_tool
from plot_benchmarks import find_crossovers

from mmrpa.ops import choose_impl, computes_layer

DOCS = Path(__file__).resolve().parents[1] / 'docs'
# <name>-cpu.json, <name>-gpu.json and <name>-cpu-glibc.json; a file of another
# name is an error.
SECTIONS = {
    'attention': 'Attention layers',
    'sweep': 'Time and memory against N',
    'backbone-rp-swin-tiny': 'Backbone RPSwin-T',
    'backbone-rp-pvt-tiny': 'Backbone RPPVT-T',
}
DEVICES = dict(cpu='CPU', gpu='GPU')
# Measured in addition, and not missed where it is not: with glibc as it is.
VARIANT = dict(suffix='cpu-glibc', label='CPU, --allocator default')
LABELS = {**DEVICES, VARIANT['suffix']: VARIANT['label']}
# Not attentions: the lower bounds that RPAttention is held against.
BOUNDS = ('projections', 'floor')
MODES = dict(forward='Forward', train='Forward and backward')
INTRO = """# Performance

Made by `python tools/update_performance_docs.py` from the files in
[benchmarks](benchmarks); change those, not this page. Each table has the
command that measured it above it.

All ratios are RPAttention over the peer: below 1, RPAttention is faster or
smaller. In every round each peer is timed once, in an order that alternates;
a ratio is the median over the rounds, with its quartiles in parentheses. The
files hold every sample.

Peers of the layers: `projections` (RPAttention's own qkv and proj alone, as
two Linear layers), `dense` (torch's scaled_dot_product_attention),
`sr` (PVT's spatial reduction: 8, 4, 2, 1 for up to 96, 192, 384 and more
channels), `window` (Swin's, 7 x 7, shifted) and `agent` (attention through
pooled agents, on the smallest square grid of at least M). Peers of the
backbones: `naive` (RPAttention as it is defined), `projections` (the same
backbone with nothing between qkv and proj: a bound for every attention),
`own` (the same class with its family's attention), `mmdet` and `timm` (those
libraries' models; timm has no PVT v1).

With glibc, freed memory stays with the process (`--allocator keep`), as it
does under the allocators that torch's tuning guide recommends. Otherwise what
one peer frees decides how many fresh pages, which are slow at their first use,
the next one is given; `--allocator default` measures that.

Files that name no commit are of 0490c3a, since when the arithmetic of the
operators has not changed; peers that came later are not in them."""
# Prose on the rule; the table below it is asked from mmrpa.ops.choose_impl.
AUTO_RULE = """By device, dtype and sizes, and by nothing else: `'triton'` on
CUDA where its kernels take the case (float32, bfloat16 or float16, 16 to 128
channels a head, at most 256 representatives, the routing's softmax over the
representatives), `'fused'` otherwise. What the implementations are:
[method.md](method.md#the-operator).

On the CPU in float32 and float64 `'fused'` computes the projections of
`RPAttention` as well (`mmrpa.ops.computes_layer`), with the products
associated otherwise, where an image has at least 1 024 tokens and that takes
fewer multiply-adds. Their number over that of the projections alone, the
convolution left out, for the layers above:"""
COUNT_CASES = ((3136, 96, 16), (66800, 96, 16), (16700, 192, 32),
               (4200, 384, 64), (1050, 768, 64))
HEAD_DIMS = 32
AUTO_CASES = (
    ('cpu', torch.float32, 32, 64), ('cpu', torch.bfloat16, 32, 64),
    ('cuda', torch.bfloat16, 32, 64), ('cuda', torch.float32, 128, 256),
    ('cuda', torch.float64, 32, 64), ('cuda', torch.bfloat16, 256, 64),
    ('cuda', torch.bfloat16, 32, 512))
Report = Dict[str, Any]
Record = Dict[str, Any]


def load(folder: Path) -> Dict[str, Report]:
    """All reports by name, ``'attention-cpu'`` and so on.

    Raises:
        ValueError: A file that the page has no place for.
    """
    known = [f'{name}-{suffix}' for name in SECTIONS
             for suffix in LABELS]
    paths = sorted(folder.glob('*.json'))
    for path in paths:
        if path.stem not in known:
            raise ValueError(f'{path}: the page knows {", ".join(known)}; '
                             'rename the file or extend SECTIONS')
    return {path.stem: json.loads(path.read_text()) for path in paths}


def rp_of(report: Report) -> str:
    """The peer that stands for RPAttention."""
    impls = report['settings'].get('impls')
    return f'rp-{impls[0]}' if impls else 'rp'


def show_ratio(value: Optional[Dict[str, float]]) -> str:
    """A cell: median and quartiles."""
    if value is None:
        return '-'
    return '{median:.2f} ({q1:.2f} to {q3:.2f})'.format(**value)


def show_case(case: Dict[str, int]) -> str:
    """What a row is about."""
    if 'tokens' not in case:
        return f'{case["height"]}x{case["width"]}'
    return f'{case["tokens"]}, {case["channels"]}, {case["representatives"]}'


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ['---'] * len(head), *rows]
    return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


def columns(records: Sequence[Record]) -> List[str]:
    """All peers, those that were left out included, in order."""
    return list(dict.fromkeys(
        peer for record in records
        for peer in (*record['samples_ms'], *record['left_out'])))


def time_table(records: Sequence[Record], rp: str) -> str:
    """RPAttention's milliseconds and its ratios to all others."""
    case = 'N, C, M' if 'part' in records[0] else 'image'
    peers = [peer for peer in columns(records) if peer != rp]
    rows = []
    for record in records:
        ms = record['median_ms'].get(rp)
        rows.append([
            show_case(record['case']), '-' if ms is None else f'{ms:.4g}',
            *(show_ratio(record['ratios'].get(f'{rp}/{p}')) for p in peers)
        ])
    return table([case, f'{rp}, ms', *(f'over {p}' for p in peers)], rows)


def memory_table(records: Sequence[Record], key: str) -> str:
    """Megabytes of all peers, and for layers their share of the tensors."""
    peers = [p for p in columns(records) if p in records[0][key]]

    def cell(record: Record, peer: str) -> str:
        size = record[key].get(peer)
        if size is None:
            return '-'
        share = (f' ({size / record["io_bytes"]:.2f})'
                 if 'io_bytes' in record and key == 'kept_bytes' else '')
        return f'{size / 1e6:.4g}{share}'

    return table(['N, C, M' if 'part' in records[0] else 'image', *peers],
                 [[show_case(r['case']), *(cell(r, p) for p in peers)]
                  for r in records])


def describe(report: Report) -> str:
    """The command and the machine."""
    machine, settings = report['machine'], report['settings']
    gpu = ('' if machine['device'] == machine['cpu'] else
           f'{machine["device"]}; ')
    # Reports from before the option are with the library's default.
    allocator = f', allocator: {settings.get("allocator", "default")}'
    flush = ', L2 flushed before each call' * settings['flush_l2']
    # None where the benchmark ran without git.
    commit = f' Commit {report["commit"]}.' if report.get('commit') else ''
    return (f'    {report["command"]}\n\n'
            f'On {gpu}{machine["cpu"]}, {machine["cores"]} cores, '
            f'threads: {machine["threads"]}; torch {machine["torch"]}, '
            f'{settings["dtype"]}, batch {settings["batch"]}, '
            f'{settings["rounds"]} rounds of samples of at least '
            f'{settings["min_time"]:g} s{flush}{allocator}.{commit}')


def show_report(name: str, report: Report, images: Path) -> List[str]:
    """The paragraphs of one file."""
    rp = rp_of(report)
    texts = [describe(report)]
    if (images / f'{name}.png').is_file():
        texts.append(f'![{name}](images/{name}.png)')
    groups: Dict[Any, List[Record]] = {}
    for record in report['records']:
        if record.get('part') == 'million':
            texts.append(show_million(record))
        else:
            groups.setdefault((record.get('part'), record['mode']),
                              []).append(record)
    for (part, mode), records in groups.items():
        what = ' of the operator on q, k, v' if part == 'operator' else ''
        texts += [f'{MODES[mode]}{what}:', time_table(records, rp)]
        texts += sorted({
            f'Left out at {show_case(r["case"])}: {peer}; {reason}.'
            for r in records for peer, reason in r['left_out'].items()})
        if part == 'operator':
            texts.append(show_floor(records))
        elif part is None and 'projections' in columns(records):
            texts += ['`projections` over the peers, below which no attention '
                      'on these projections can be:', bound_table(records)]
        elif report['settings'].get('sweep'):
            texts.append(show_crossovers(records, rp))
        if mode == 'train':
            texts += [
                'Kept for backward in MB' +
                (' (over the bytes of ' + ('x, ' * (part == 'layer')) +
                 'q, k, v and the output)' if part else '') + ':',
                memory_table(records, 'kept_bytes')
            ]
            if 'peak_gpu_bytes' in records[0]:
                texts += ["The allocator's peak in MB, above what was there "
                          'before:', memory_table(records, 'peak_gpu_bytes')]
    return texts


def show_million(record: Record) -> str:
    """A line on the case of a million tokens."""
    used, limit = record['peak_resident_bytes'], record['limit_bytes']
    gpu = (f', {record["peak_gpu_bytes"] / 2**30:.2f} GiB on the GPU'
           if 'peak_gpu_bytes' in record else '')
    return (f'{record["tokens"]} tokens, C=32, M=16, float32, '
            f'impl={record["impl"]!r}: forward and backward in '
            f'{record["seconds"]:.3g} s, peak resident memory of the whole '
            f'process {used / 2**30:.2f} GiB{gpu}; the limit is '
            f'{limit / 2**30:.0f} GiB'
            f'{", which it exceeds" * (used > limit)}.')


def show_floor(records: Sequence[Record]) -> str:
    """What the floor is made of."""
    speeds = [s for r in records for s in r['floor']['copy_gb_per_s']]
    tensors = records[0]['floor']['tensors']
    return (f'The floor: {tensors} tensors of B x N x C moved once at the '
            'measured copy bandwidth, median '
            f'{statistics.median(speeds):.4g} GB/s.')


def bound_table(records: Sequence[Record]) -> str:
    """The projections alone over each peer that is not RPAttention.

    Round by round from the samples, as all ratios.
    """
    peers = [p for p in columns(records) if p not in ('rp', 'naive', *BOUNDS)]

    def cell(record: Record, peer: str) -> str:
        samples = record['samples_ms']
        known = 'projections' in samples and peer in samples
        return show_ratio(ratio(samples['projections'], samples[peer])
                          if known else None)

    return table(['image', *(f'over {p}' for p in peers)],
                 [[show_case(r['case']), *(cell(r, p) for p in peers)]
                  for r in records])


def show_crossovers(records: Sequence[Record], rp: str) -> str:
    """Where the ratios cross 1."""
    found = [
        f'{peer} at N = {", ".join(f"{n:.0f}" for n in sizes)}'
        for peer, sizes in find_crossovers(records, rp).items() if sizes
    ]
    return f'The ratio crosses 1: {"; ".join(found) or "nowhere"}.'


def summary(reports: Dict[str, Report]) -> str:
    """Each backbone's time over those of others, all sizes in a cell."""
    peers = ('own', 'mmdet', 'timm')
    rows = []
    for name, report in reports.items():
        if not name.startswith('backbone'):
            continue
        section = next(s for s in SECTIONS if name.startswith(s))
        title = SECTIONS[section].removeprefix('Backbone ')
        label = LABELS[name.removeprefix(f'{section}-')]
        for mode, what in MODES.items():
            records = [r for r in report['records'] if r['mode'] == mode]
            cells = [', '.join(
                '{median:.2f}'.format(**r['ratios'][f'rp/{peer}'])
                if f'rp/{peer}' in r['ratios'] else '-' for r in records)
                for peer in peers]
            if records:
                rows.append([f'{title}, {label}', what.lower(),
                             ', '.join(show_case(r['case']) for r in records),
                             *cells])
    return table(['backbone', 'mode', 'images',
                  *(f'over {peer}' for peer in peers)], rows)


def slower(reports: Dict[str, Report]) -> str:
    """Every case and peer that RPAttention loses to."""
    rows = []
    for name, report in reports.items():
        rp = rp_of(report)
        for record in report['records']:
            for key, value in record.get('ratios', {}).items():
                first, peer = key.split('/')
                if first == rp and peer not in BOUNDS and value['median'] > 1:
                    rows.append([name, record.get('part', 'backbone'),
                                 MODES[record['mode']].lower(),
                                 show_case(record['case']), peer,
                                 show_ratio(value)])
    if not rows:
        return 'Nowhere in what is measured above.'
    return table(['measured in', 'what', 'mode', 'case', 'peer', 'RP / peer'],
                 rows)


def auto_table() -> str:
    """What ``mmrpa.ops.choose_impl`` says."""
    return table(
        ['device', 'dtype', 'channels a head', 'M', 'impl'],
        [[device, str(dtype).removeprefix('torch.'), str(dims), str(m),
          f'`{impl!r}`'] for device, dtype, dims, m in AUTO_CASES
         for impl in [choose_impl(device_type=device, dtype=dtype,
                                  head_dims=dims, num_representatives=m)]])


def count_table() -> str:
    """Multiply-adds of the layer over those of its projections."""
    rows = []
    for n, c, m in COUNT_CASES:
        heads = c // HEAD_DIMS
        projections = 4 * n * c * c
        by_parts = projections + 5 * n * m * c
        whole = 2 * n * c * c + 4 * n * heads * m * c + 4 * m * c * c
        chosen = computes_layer('fused', 'cpu', torch.float32, n, heads,
                                HEAD_DIMS, m)
        rows.append([f'{n}, {c}, {m}', f'{by_parts / projections:.2f}',
                     f'{whole / projections:.2f}',
                     'otherwise' if chosen else 'as defined'])
    return table(['N, C, M', 'as defined', 'associated otherwise', 'chosen'],
                 rows)


def write_page(reports: Dict[str, Report], images: Path) -> str:
    """The whole page."""
    texts = [INTRO]
    if any(name.startswith('backbone') for name in reports):
        texts += ['## In short', 'Time of the backbones over that of others; '
                  'all tables and machines are below.', summary(reports)]
    for name, title in SECTIONS.items():
        for device, label in DEVICES.items():
            texts.append(f'## {title}, {label}')
            report = reports.get(f'{name}-{device}')
            texts += (['not measured on ' + label + ' yet'] if report is None
                      else show_report(f'{name}-{device}', report, images))
        variant = f'{name}-{VARIANT["suffix"]}'
        if variant in reports:
            texts += [f'## {title}, {VARIANT["label"]}',
                      *show_report(variant, reports[variant], images)]
    texts += ['## Where RPAttention is slower',
              'Every case and peer of the tables above with a median ratio '
              'above 1; lower bounds are no peers.', slower(reports),
              "## How `impl='auto'` chooses", AUTO_RULE, count_table(),
              'And the rule of the implementations:', auto_table()]
    return '\n\n'.join(texts) + '\n'


def body(argv: Sequence[str]) -> Optional[int]:
    """Write or check the page; returns 1 for a stale one."""
    parser = argparse.ArgumentParser(
        description=__doc__ + ' Tables, pictures, the cases in which '
        "RPAttention is slower, and how impl='auto' chooses.")
    parser.add_argument('--docs', type=Path, default=DOCS,
                        help='folder of the page (default: docs)')
    parser.add_argument('--check', action='store_true',
                        help='write nothing; exit code 1 if the page is stale')
    args = parser.parse_args(argv)
    page = args.docs / 'performance.md'
    text = write_page(load(args.docs / 'benchmarks'), args.docs / 'images')
    if not args.check:
        page.write_text(text)
        print(f'wrote {page}')
        return 0
    if page.is_file() and page.read_text() == text:
        return 0
    print(f'{page} is stale; run tools/update_performance_docs.py',
          file=sys.stderr)
    return 1


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the tool; returns the exit code."""
    return run_tool('update_performance_docs', body, argv)


if __name__ == '__main__':
    sys.exit(main())
