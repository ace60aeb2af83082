"""The number type that transforms compute in, on this processor and as if it had fewer instructions."""

import os
import subprocess
import sys

import pytest
import torch

from shared.codec.precision import fast_dtype

CPU = torch.device("cpu")
ASKED = "import torch; from shared.codec.precision import fast_dtype; print(fast_dtype(torch.device('cpu')))"


def test_bfloat16_is_used_where_there_are_instructions_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cpu._is_avx512_bf16_supported():
        pytest.skip("this processor has no AVX-512 bfloat16")
    assert fast_dtype(CPU) == torch.bfloat16
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)  # as Ice Lake, which emulates it
    assert fast_dtype(CPU) == torch.float32
    assert fast_dtype(torch.device("cuda")) == torch.bfloat16


def test_a_processor_held_to_avx2_computes_in_float32() -> None:
    held = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2"}
    done = subprocess.run([sys.executable, "-c", ASKED], env=held, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "torch.float32"
