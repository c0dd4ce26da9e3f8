"""What fuzzed calls have in common: strategies, profiles, and the verdict.

A call has to give the right result, or a ValueError or TypeError (one of
their subclasses) whose message names an argument that it was given. Whatever
else comes out, of mmrpa or of torch, fails the test.

The default profile is small and always the same. `FUZZ_EXAMPLES=5000 python -m
pytest -m long tests/test_fuzz` looks longer, and elsewhere every time.
"""

import os
import re
import tempfile

import torch
from hypothesis import HealthCheck, configuration, given, settings
from hypothesis import strategies as st

# Hypothesis keeps tables of its own in a folder, else in the working tree.
configuration.set_hypothesis_home_dir(
    os.path.join(tempfile.gettempdir(), 'mmrpa-hypothesis'))
_COMMON = dict(deadline=None, database=None, print_blob=True,
               suppress_health_check=list(HealthCheck))
SHORT = settings(max_examples=12, derandomize=True, **_COMMON)
LONG = settings(max_examples=int(os.environ.get('FUZZ_EXAMPLES', '2000')),
                **_COMMON)

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
WRONG_DTYPES = [torch.int64, torch.bool, torch.uint8]
# Things that people, and configs, hand over by mistake.
ODD = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 5),
    st.floats(-2, 2), st.sampled_from([float('nan'), float('inf')]),
    st.text(max_size=3), st.lists(st.integers(-1, 3), max_size=3),
    st.tuples(st.integers(0, 3), st.integers(0, 3)),
    st.dictionaries(st.text(max_size=2), st.integers(), max_size=1),
    st.builds(object), st.just(torch.ones(2)), st.just(b'x'))


@st.composite
def mutated(draw, valid, odd=ODD, at_most=2):
    """Arguments of which up to ``at_most`` are odd.

    Returns:
        tuple[dict, set]: The arguments, and which of them are odd.
    """
    args = {name: draw(strategy) for name, strategy in valid.items()}
    names = draw(st.lists(st.sampled_from(sorted(args)), max_size=at_most,
                          unique=True))
    for name in names:
        args[name] = draw(odd)
    return args, set(names)


@st.composite
def tensors(draw, *shape, dtype=None, device=None):
    """A tensor of a shape, of odd strides now and then."""
    dtype = draw(st.sampled_from(DTYPES)) if dtype is None else dtype
    generator = torch.Generator().manual_seed(draw(st.integers(0, 9)))
    kind = draw(st.sampled_from(['plain', 'flipped', 'gaps', 'expanded']))
    full = list(shape)
    if kind == 'gaps' and full:
        full[-1] *= 2
    x = torch.randn(full, generator=generator).to(dtype)
    if kind == 'flipped' and len(full) > 1:
        x = x.transpose(0, -1).contiguous().transpose(0, -1)
    if kind == 'gaps' and full:
        x = x[..., ::2]
    if kind == 'expanded' and full and full[0]:
        x = x[:1].expand(shape)
    return x if device in (None, 'cpu') else x.to(device)


@st.composite
def odd_tensors(draw):
    """Tensors of any small shape and any dtype."""
    shape = draw(st.lists(st.integers(0, 5), max_size=5))
    dtype = draw(st.sampled_from(DTYPES + WRONG_DTYPES))
    device = draw(st.sampled_from(['cpu', 'cpu', 'meta']))
    return torch.zeros(shape, dtype=dtype, device=device)


def attempt(call, args, also=(), accept=()):
    """The call's result, None where it refused in the words it should have.

    Args:
        call (callable): Takes ``args`` by name.
        args (dict): Arguments.
        also (sequence[str]): What may be named instead of an argument.
        accept (tuple[type]): Documented errors on what is in a file or in
            weights, which say that instead.

    Returns:
        tuple: (whether it gave a result, the result).
    """
    try:
        return True, call(**args)
    except accept:
        return False, None
    except (ValueError, TypeError) as error:
        names = [*args, *also]
        assert any(re.search(rf'(?<!\w){re.escape(name)}(?!\w)', str(error))
                   for name in names), (
            f'{type(error).__name__} names none of {names}: {error}')
        return False, None


def run(profile, check, strategy, right=False, least=1):
    """Check examples; those that are right must not be refused.

    Args:
        profile (settings): ``SHORT`` or ``LONG``.
        check (callable): Takes an example; tells whether the call gave a
            result, which then was as it should be.
        strategy (SearchStrategy): Of the examples.
        right (bool): All examples have to give a result.
        least (int): How many of them there have to be.
    """
    taken = []
    profile(given(strategy)(lambda case: taken.append(bool(check(case)))))()
    assert len(taken) >= least
    assert all(taken) or not right, (
        f'{sum(taken)} of {len(taken)} examples gave a result')
