"""Cases that strain half precision, and how far from float64 is too far.

The relative error of a tensor is the norm of its difference from float64's,
over the norm of float64's own, where float64 gets the same, already rounded,
inputs and parameters. No tensor is measured by another one's size. A test
names those that leave nothing to be relative to (its *listed* tensors), with
one of five reasons, and allows them what the reason explains, which is
computed for each run:

- ``CANCELS``: the true value is a difference far below rounding of what it is
  the difference of (the anchors' gradient on a constant image, where any
  routing gives the same). Allowed: ``SUMS`` times what float64's own result
  moves when each of its steps is rounded once to float32 (``OneRounding``).
- ``VANISHES``: it lies below the smallest numbers of float16, 6e-8. Allowed:
  how far float64's result is from itself rounded to float16; so only zeros
  that float16 rounds to may be zeros.
- ``PROJECTED``: a layer rounds Q, K and V to half, which is theirs to lose and
  moves what follows by more than the bound. Allowed: how far float64's own
  result moves when it is given the layer's rounded Q, K and V.
- ``EMPTY``: it is made of what vanishes. Zeros may come out, nothing larger.
- ``TIES``: at inputs of 1e4 two logits may be nearer to each other than one
  rounding moves them. Allowed: eight times what float64's own result moves
  when what it starts from is off by one rounding (``largest_change``); a
  product of d = 32 rounds more than once.

What is listed may also lose what the dtype that it is returned in cannot
hold. The gradient that comes in is scaled by a power of two, as a GradScaler
would, so that what float64 gives fits into float16.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# Half the distance of float32's numbers at 1: what one rounding may change.
ROUNDING = 2.**-24
BOUNDS = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-3}
CASES = ('one', 'dead', 'large', 'small', 'tiny', 'constant')
CANCELS, TIES, PROJECTED = 'cancels', 'ties', 'moved by the projection'
VANISHES, EMPTY = 'vanishes', 'made of what vanishes'
# A float32 sum over tokens rounds at many of its terms, and equal tokens round
# alike: up to 50 times what one rounding of the sum changes was measured.
SUMS = 64
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
    if case in ('small', 'tiny'):
        return (1e-4 if case == 'small' else 1e-8) * x
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


class OneRounding(TorchDispatchMode):
    """Round each step of a float64 run, forward and backward, to float32 once.

    Steps are products, softmaxes, sums and quotients; what is inside of one is
    exact. A softmax's gradient is three: p * (grad - sum(p * grad)).
    """

    STEPS = frozenset(('mm', 'bmm', 'addmm', 'baddbmm', '_softmax', 'sum',
                       'mul', 'div'))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name == '_softmax_backward_data':
            grad, p, axis = args[:3]
            mean = self.rounded((grad * p).sum(axis, keepdim=True))
            return self.rounded(p * self.rounded(grad - mean))
        out = func(*args, **(kwargs or {}))
        return self.rounded(out) if name in self.STEPS else out

    @staticmethod
    def rounded(x):
        return x.float().to(x.dtype)


def rounding_noise(run, exact):
    """How far the results of a float64 run move, as norms, by OneRounding."""
    with OneRounding():
        rounded = run()
    return {name: (rounded[name] - e).norm().item()
            for name, e in exact.items()}


def loss(exact, dtype):
    """The norm of what ``dtype`` cannot hold of a float64 tensor."""
    return (exact.to(dtype).double() - exact).norm().item()


def allowance(name, exact, actual, dtype, listed, noise):
    """What a tensor may be off by beyond its bound: 0 if it is not listed.

    Args:
        name (str): The tensor.
        exact (Tensor): float64's.
        actual (Tensor): The one to judge.
        dtype (torch.dtype): The half dtype of the case.
        listed (dict[str, str]): Reasons by name.
        noise (dict[str, float]): What float64 moves by if it is for
            ``CANCELS``, ``TIES`` or ``PROJECTED``.
    """
    reason = listed.get(name)
    if reason is None:
        return 0.
    if reason == EMPTY:
        return exact.norm().item()
    if reason == VANISHES:
        return loss(exact, dtype)
    times = {CANCELS: SUMS, TIES: 8, PROJECTED: 1}[reason]
    return loss(exact, actual.dtype) + times * noise[name]


def check(actual, exact, dtype, listed=None, noise=None):
    """Two dicts of tensors; ``listed`` and ``noise``: see ``allowance``."""
    assert actual.keys() == exact.keys()
    listed = listed or {}
    assert listed.keys() <= exact.keys(), listed
    wrong = []
    for name, e in exact.items():
        a = actual[name].double()
        if not a.isfinite().all():
            wrong.append(f'{name}: {(~a.isfinite()).sum()} not finite')
            continue
        norm = e.norm().item()
        allowed = BOUNDS[dtype] * norm + allowance(
            name, e, actual[name], dtype, listed, noise)
        error = (a - e).norm().item()
        if not error <= allowed:
            wrong.append(f'{name}: off by {error:.2g}, of {norm:.2g}; at most '
                         f'{allowed:.2g}')
    assert not wrong, '\n'.join(wrong)


def fits(exact, dtype, most=1.):
    """The power of two, up to ``most``, that brings the largest gradient to
    2**12, in float16; else 1."""
    if dtype != torch.float16:
        return 1.
    top = max(t.abs().max().item() for name, t in exact.items()
              if name != 'out')
    return min(most, 2.**(12 - round(torch.tensor(top).log2().item())))
