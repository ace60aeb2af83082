"""The number type that transforms compute in, on this processor and as if it had fewer instructions."""

import os
import subprocess
import sys

import pytest
import torch

from shared.codec.precision import fast_dtype

CPU = torch.device("cpu")
ASKED = "import torch; from shared.codec.precision import fast_dtype; print(fast_dtype(torch.device('cpu')))"


@pytest.mark.parametrize(
    ("offered", "avx512", "instructions", "expected"),
    [
        (True, True, True, torch.bfloat16),
        (True, True, False, torch.float32),  # as Ice Lake, which emulates it
        (True, False, False, torch.bfloat16),  # of another architecture
        (False, False, False, torch.float32),
    ],
)
def test_bfloat16_is_used_where_there_are_instructions_for_it(
    monkeypatch: pytest.MonkeyPatch, offered: bool, avx512: bool, instructions: bool, expected: torch.dtype
) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: offered)
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: instructions)
    assert fast_dtype(CPU) == expected
    assert fast_dtype(torch.device("cuda")) == torch.bfloat16


def test_bfloat16_of_this_processor_is_used() -> None:
    if not torch.cpu._is_avx512_bf16_supported():
        pytest.skip("this processor has no AVX-512 bfloat16 to use")
    assert fast_dtype(CPU) == torch.bfloat16


def test_a_processor_held_to_avx2_computes_in_float32() -> None:
    held = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2"}
    done = subprocess.run([sys.executable, "-c", ASKED], env=held, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "torch.float32"
