"""Cases that strain half precision, and how far from float64 is too far.

The relative error of a tensor is the norm of its difference from float64's,
over the norm of float64's, where float64 gets the same, already rounded,
inputs and parameters. Two kinds of numbers leave nothing to be relative to:

- A gradient that cancels (the anchors' on a constant image, where any routing
  gives the same), so that rounding is all that is left of it. Its error is
  taken relative to a thousandth of the largest gradient's norm if that is
  more; to a tenth for the Triton kernels, which multiply in half precision
  themselves, as flash attention does.
- Numbers near the smallest of float16, 6e-8: each may be off by one of those.

At inputs of 1e4 two logits may be nearer to each other than one rounding moves
them. What follows from such a tie is held to how far float64's own result
moves when what it starts from is off by one rounding (``changes``).

The gradient that comes in is scaled by a power of two, as a GradScaler would,
so that what float64 gives fits into float16.
"""

import torch

# Half the distance of float32's numbers at 1: what one rounding may change.
ROUNDING = 2.**-24
BOUNDS = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-3}
CASES = ('one', 'dead', 'large', 'tiny', 'constant')
# Distance of the keys' mean from 0, and the factor on it in the anchors.
PUSH, PULL = 4., 40.


def push_keys(keys_bias, anchors, case):
    """Let the keys' bias decide the routing: in place.

    Args:
        keys_bias (Tensor): (h, d), what is added to all keys of a head.
        anchors (Tensor): (h, M, d) or (1, M, d).
        case (str): ``'one'``: representative 0 gets all tokens. ``'dead'``:
            the second half of them gets none.
    """
    if case not in ('one', 'dead'):
        return
    axis = torch.nn.functional.normalize(torch.randn(keys_bias.shape), dim=-1)
    if len(anchors) == 1:
        axis = axis[:1].expand_as(keys_bias)
    keys_bias += PUSH * axis
    pull = PULL * axis[:len(anchors)]
    if case == 'one':
        anchors[:, 0] += pull
    else:
        anchors[:, anchors.shape[1] // 2:] -= pull[:, None]


def strain(x, case):
    """Standard normal numbers, as the case wants them; tokens at axis 1."""
    if case == 'large':
        return 1e4 * (2 * torch.rand(x.shape) - 1)
    if case == 'tiny':
        return 1e-8 * x
    if case == 'constant':
        return x[:, :1].expand_as(x).clone()
    return x


def nudge(x, by):
    """Move each number at random by up to ``by`` of itself."""
    return x * (1 + by * (2 * torch.rand_like(x) - 1))


def largest_change(nudged_run, exact, tries=4):
    """How far results move, as norms, at the most in a few tries.

    Args:
        nudged_run (callable): Returns a dict like ``exact``, each time from
            inputs that are nudged anew.
        exact (dict[str, Tensor]): The results without.
    """
    runs = [nudged_run() for _ in range(tries)]
    return {name: max((r[name] - e).norm().item() for r in runs)
            for name, e in exact.items()}


def check(actual, exact, dtype, floor=1e-3, changes=None):
    """Two dicts of tensors, ``'out'`` first, then gradients.

    ``changes`` are those of ``largest_change``. Eight times as much may be
    added to the bound: a product of d = 32 rounds more than once.
    """
    bound = BOUNDS[dtype]
    changes = changes or {}
    largest = max((t.norm().item() for name, t in exact.items()
                   if name != 'out'), default=0)
    wrong = []
    for name, e in exact.items():
        a = actual[name].double()
        if not a.isfinite().all():
            wrong.append(f'{name}: {(~a.isfinite()).sum()} not finite')
            continue
        norm = e.norm().item()
        if name != 'out':
            norm = max(norm, floor * largest)
        allowed = bound * norm + 8 * changes.get(name, 0)
        if dtype == torch.float16:
            allowed += 2**-24 * e.numel()**0.5
        error = (a - e).norm().item()
        if not error <= allowed:
            wrong.append(f'{name}: off by {error:.2g}, {error / norm:.2g} of '
                         f'{norm:.2g}; at most {allowed:.2g}')
    assert not wrong, '\n'.join(wrong)


def fits(exact, dtype):
    """The power of two that brings the largest gradient below 2**12."""
    if dtype != torch.float16:
        return 1.
    top = max(t.abs().max().item() for name, t in exact.items()
              if name != 'out')
    return 2.**-max(0, round(torch.tensor(top).log2().item()) - 12)
