"""The number type that transforms compute in where nobody asked for one.

By what the processor says of itself, not by a measurement at start: on a busy machine that took bfloat16 in one process
and float32 in the next, and the same file was decoded to pixels that differ by more than 1.
"""

import torch


def fast_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where `device` has instructions for it, else float32.

    oneDNN offers bfloat16 on any AVX-512 processor; those without instructions for it (Skylake to Ice Lake) emulate it,
    at half the speed of float32.
    """
    if device.type == "cuda":
        return torch.bfloat16
    emulated = torch.cpu._is_avx512_supported() and not torch.cpu._is_avx512_bf16_supported()
    offered = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.bfloat16 if offered and not emulated else torch.float32
