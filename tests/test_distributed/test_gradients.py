"""Two processes learn what one learns from twice the batch."""

import pytest
import torch
from parallel_steps import (
    all_steps,
    ddp_steps,
    make,
    make_segmentor,
    sync_bn_steps,
    take_steps,
)
from processes import run_in_processes
from zoo import SMALL

SIZE = 2
# All that a user may ask for at once. DDP is told that no parameter is unused
# in every case, and says so in the second step if one is.
TOGETHER = dict(frozen_stages=1, out_indices=(1, 2), with_cp=True)
OPTIONS = {
    **{f'{f}-rp': (f, {}) for f in SMALL},
    **{f'{f}-own': (f, dict(attention=SMALL[f][0].own_attention))
       for f in SMALL},
    **{f'{f}-together': (f, TOGETHER) for f in SMALL},
    'swin-naive': ('swin', dict(TOGETHER, rp_cfg=dict(impl='naive'))),
    'swin-no-norm': ('swin', dict(TOGETHER, norm_cfg=None)),
    'pvt-last-map': ('pvt', dict(frozen_stages=0, out_indices=(3, ))),
    'deit-cls-token': ('deit', dict(
        out_type='cls_token', out_indices=(-1, ), frozen_stages=2)),
}  # yapf: disable
# As users train, and so exactly that no error can pass for rounding.
DDP = {
    **{name: (*case, torch.float32) for name, case in OPTIONS.items()},
    **{f'{name}-float64': (*case, torch.float64)
       for name, case in OPTIONS.items() if name.endswith(('-rp', '-together'))
       },
}  # yapf: disable
FSDP = {
    **{f: (f, dict(with_cp=f in ('swin', 'cswin')), torch.float64)
       for f in SMALL},
    'together': ('swin', TOGETHER, torch.float64),
    'float32': ('swin', TOGETHER, torch.float32),
}


@pytest.fixture(scope='module')
def together() -> list[dict]:
    """What each process has after the steps of every case."""
    results = run_in_processes(
        all_steps, list(DDP.values()), list(FSDP.values()), SIZE)
    return [
        dict(
            ddp=dict(zip(DDP, result['ddp'], strict=True)),
            fsdp=dict(zip(FSDP, result['fsdp'], strict=True)))
        for result in results
    ]


def check_equal(alone: dict, together: dict, dtype: torch.dtype) -> None:
    assert together.keys() == alone.keys()
    for name, value in alone.items():
        error = (together[name] - value).abs().max()
        assert error < 1e-5, name
        if dtype == torch.float64:
            # Tables of positions are resized in float32; of a bias before BN
            # the gradient is 0, and rounding what is left.
            assert error < 1e-6 * value.abs().max() + 1e-14, name


def check_one_case(together: list[dict], kind: str, name: str,
                   case: tuple) -> None:
    alone = take_steps(make(case))
    for result in together:  # in either process
        check_equal(alone, result[kind][name], case[-1])
    # It could fail: the gradients are no smaller than what is allowed, and
    # those of one process's images alone are others.
    half = take_steps(make(case), 0, SIZE, steps=1)
    grads = [key for key in alone if key.startswith('grad.')]
    assert max(alone[key].abs().max() for key in grads) > 0.5
    zero = [key for key in grads if not alone[key].any()]
    # The convolution of the last block does not reach the CLS token.
    assert bool(zero) == (name == 'deit-cls-token')
    for key in set(grads).difference(zero):
        assert (half[key] - alone[key]).norm() > 1e-2 * alone[key].norm(), key


@pytest.mark.parametrize('name', DDP)
def test_ddp_equals_one_process_with_twice_the_batch(name, together):
    check_one_case(together, 'ddp', name, DDP[name])


@pytest.mark.parametrize('name', FSDP)
def test_fsdp2_equals_one_process_with_twice_the_batch(name, together):
    check_one_case(together, 'fsdp', name, FSDP[name])


SYNC_BN, BN = (dict(norm_cfg=dict(type=norm)) for norm in ('SyncBN', 'BN'))
DTYPES = (torch.float64, torch.float32)


@pytest.fixture(scope='module')
def synchronised() -> list[dict]:
    """What each process has after steps with SyncBN, and with BN."""
    cases = [(f, norm, dtype) for f in SMALL for norm in (SYNC_BN, BN)
             for dtype in DTYPES]
    segmentors = [(norm, dtype) for norm in ('SyncBN', 'BN')
                  for dtype in DTYPES]
    results = run_in_processes(sync_bn_steps, cases, segmentors, SIZE)
    return [dict(
        zip([str((f, norm['norm_cfg']['type'], dtype))
             for f, norm, dtype in cases], result['backbones'], strict=True),
        **dict(zip([str(('upernet', *s)) for s in segmentors],
                   result['segmentors'], strict=True))) for result in results]


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize('name', [*SMALL, 'upernet'])
def test_sync_bn_equals_one_process_with_twice_the_batch(name, dtype,
                                                         synchronised):
    """BN of one process sees the whole batch, as SyncBN does in two.

    With torch's own communication, and kernels of ``cpu_sync_bn.py``.
    """
    alone = take_steps(make_segmentor('BN', dtype) if name == 'upernet' else
                       make((name, BN, dtype)))
    for result in synchronised:
        check_equal(alone, result[str((name, 'SyncBN', dtype))], dtype)
        # It could fail: without synchronising it does.
        apart = result[str((name, 'BN', dtype))]
        assert max((apart[k] - v).abs().max()
                   for k, v in alone.items()) > 1e-2


@pytest.mark.skipif(not torch.cuda.is_available(),
                    reason="torch's kernels of SyncBN are for GPUs only")
def test_sync_bn_on_gpus():
    cases = [(f, dict(norm_cfg=dict(type=norm)), torch.float32)
             for f in SMALL for norm in ('SyncBN', 'BN')]
    # Both processes may share a GPU: they communicate over gloo.
    results = run_in_processes(ddp_steps, cases, SIZE, 'cuda')
    for i, case in enumerate(cases):
        alone = take_steps(make(case, 'cuda'))
        synchronised = case[1]['norm_cfg']['type'] == 'SyncBN'
        for result in results:
            errors = [(result[i][k] - v).abs().max() for k, v in alone.items()]
            assert (max(errors) < 1e-4) == synchronised, case
