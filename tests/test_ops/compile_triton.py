"""Compile the Triton kernels for a GPU that is not there; print the results.

A process of its own, without TRITON_INTERPRET: test_triton_compile.py. No
driver is needed to compile, and what comes out says whether a GPU could hold
it.
"""

import json
import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mmrpa.ops import triton_interact, triton_kernels, triton_launch

# What each kernel gets in the dtype of the tokens.
TOKENS = dict(
    gather_kernel=('k_ptr', 'v_ptr'),
    distribute_kernel=('q_ptr', 'keys_ptr', 'values_ptr', 'v_ptr', 'out_ptr'),
    distribute_backward_kernel=('q_ptr', 'keys_ptr', 'values_ptr', 'grad_ptr',
                                'grad_q_ptr'),
    gather_backward_kernel=('k_ptr', 'v_ptr', 'grad_ptr', 'grad_k_ptr',
                            'grad_v_ptr', 'g_k_ptr', 'g_z_ptr'),
    finish_kernel=(),
    centre_kernel=('keys_ptr', 'values_ptr'),
    interact_backward_kernel=('grad_k_ptr', 'grad_z_ptr'))
NAMES = dict(float32='fp32', bfloat16='bf16', float16='fp16')


def compile_kernel(name, dtype, dims, m, capability):
    """Compile as ``triton_launch`` would launch it; bytes of shared memory."""
    on_tokens = hasattr(triton_kernels, name)
    kernel = getattr(triton_kernels if on_tokens else triton_interact, name)
    itemsize = getattr(torch, dtype).itemsize
    block_n, block_m, block_d, stages = triton_launch.block_sizes(
        dims, m, itemsize)
    inside = (dims <= triton_launch.MAX_INTERACT_DIMS
              and m <= triton_launch.MAX_INTERACT_REPRESENTATIVES)
    if name == 'interact_backward_kernel' and not inside:
        return None
    options = dict(num_warps=8, num_stages=stages)
    blocks = triton.cdiv(m, block_m)
    if not on_tokens:
        options = {}
        if inside and name != 'centre_kernel':
            block_m = max(16, triton.next_power_of_2(m))
    constants = dict(
        BLOCK_N=block_n, BLOCK_M=block_m, BLOCK_D=block_d, BLOCKS=blocks,
        PRECISION='tf32x3' if dtype == 'float32' else 'tf32', KERNEL=3,
        BIAS=True, BLOCK_TAPS=16, MEAN=True, INTERACT=inside, RESIDUAL=True)
    signature = {}
    for parameter in (p.name for p in kernel.params):
        if parameter in constants:
            signature[parameter] = 'constexpr'
        elif parameter in TOKENS[name]:
            signature[parameter] = '*' + NAMES[dtype]
        elif parameter.endswith(('_ptr', '_part', 'dwc_weight', 'dwc_bias')):
            signature[parameter] = '*fp32'
        else:
            signature[parameter] = ('fp32' if parameter.endswith('scale') else
                                    'i32')
    constants = {k: v for k, v in constants.items() if k in signature}
    # By position: the third one is ``constants`` before Triton 3.3.
    compiled = triton.compile(
        ASTSource(kernel, signature, constants),
        target=GPUTarget('cuda', capability, 32),
        options=options)
    return compiled.metadata.shared


if __name__ == '__main__':
    dtype, dims, m, capability = sys.argv[1:]
    print(json.dumps({
        name: compile_kernel(name, dtype, int(dims), int(m), int(capability))
        for name in TOKENS
    }))
