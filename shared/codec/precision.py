"""The number type that transforms compute in where nobody asked for one: bfloat16 or float32, the faster as measured.

What a processor says of itself does not decide it. oneDNN offers bfloat16 on any AVX-512 processor; those without
instructions for it (Skylake to Ice Lake) emulate it, at half the speed of float32.
"""

import functools
import time

import torch
from torch.nn import functional as F

ROUNDS = 5
LAYER, CHANNELS = (30, 40), 96  # of g_a's and g_s's usual kind; 50 million multiplications


@functools.cache
def fast_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where `device` computes faster in it than in float32, else float32. Takes some ms, once a process.

    On a GPU it is bfloat16, unmeasured.
    """
    if device.type == "cuda":
        return torch.bfloat16
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return torch.float32
    best = dict.fromkeys((torch.float32, torch.bfloat16), float("inf"))
    with torch.no_grad():
        layers = {dtype: _layer(dtype) for dtype in best}
        for i in range(ROUNDS + 1):
            for dtype, (x, weight) in layers.items():  # in turn, so that other work on the machine meets both
                start = time.perf_counter()
                F.conv2d(x, weight, padding=1)
                if i:  # the first prepares the kernel
                    best[dtype] = min(best[dtype], time.perf_counter() - start)
    return min(best, key=best.__getitem__)


def _layer(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    x, weight = torch.ones(1, CHANNELS, *LAYER), torch.ones(CHANNELS, CHANNELS, 3, 3)
    return tuple(t.to(dtype).contiguous(memory_format=torch.channels_last) for t in (x, weight))  # type: ignore[return-value]
