"""The Triton kernels compile for GPUs that this machine does not have."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip('triton')
SHARED_SM86 = 99 * 1024  # the least of all GPUs since sm_80


@pytest.mark.parametrize('dtype,dims,m,capability', [
    pytest.param('bfloat16', 32, 16, 90, marks=pytest.mark.long),
    ('float16', 64, 64, 80),
    pytest.param('float16', 128, 200, 80, marks=pytest.mark.long),
    pytest.param('float32', 128, 256, 80, marks=pytest.mark.long),
])
def test_kernels_compile_and_fit(tmp_path, dtype, dims, m, capability):
    env = {k: v for k, v in os.environ.items() if k != 'TRITON_INTERPRET'}
    env.update(TRITON_CACHE_DIR=str(tmp_path),
               PYTHONPATH=str(Path(__file__).parents[2]))
    script = Path(__file__).with_name('compile_triton.py')
    done = subprocess.run(
        [sys.executable, str(script), dtype, str(dims), str(m),
         str(capability)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    shared = json.loads(done.stdout.splitlines()[-1])
    assert len(shared) == 7
    for name, size in shared.items():
        # Interact is in no kernel where it would not fit.
        if size is None:
            assert name == 'interact_backward_kernel' and dims > 64
        else:
            assert size <= SHARED_SM86, name


def test_tokens_of_a_block_shrink_with_the_width_of_a_row():
    from mmrpa.ops.triton_launch import block_sizes
    for dtype in (torch.bfloat16, torch.float32):
        sizes = [block_sizes(d, 64, dtype.itemsize) for d in (16, 40, 128)]
        assert [s[2] for s in sizes] == [16, 64, 128]
        assert sizes[0][0] > sizes[-1][0]
