"""Let Triton's interpreter round to bfloat16 as GPUs do.

Its own conversion cuts the last bits off. All numbers get smaller by 0.2 % in
the mean, which adds up where rounding would cancel.
"""

import numpy as np
import torch


def install():
    """Replace the interpreter's conversion, for this process."""
    import triton.language as tl
    from triton.runtime import interpreter
    convert = interpreter._convert_float

    def rounding(x, source, target, mode):
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(x, source, target, mode)
        rounded = torch.from_numpy(np.ascontiguousarray(x)).bfloat16()
        bits = rounded.view(torch.int16).numpy().view(np.uint16)
        return bits.reshape(x.shape)

    interpreter._convert_float = rounding
