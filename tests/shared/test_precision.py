"""The number type that is measured to be the faster one, on this processor and as if it had fewer instructions."""

import os
import subprocess
import sys

import pytest
import torch

from shared.codec.precision import fast_dtype

ASKED = "import torch; from shared.codec.precision import fast_dtype; print(fast_dtype(torch.device('cpu')))"


def test_a_processor_with_bfloat16_instructions_uses_them() -> None:
    if not torch.cpu._is_avx512_bf16_supported():
        pytest.skip("this processor has no AVX-512 bfloat16")
    assert fast_dtype(torch.device("cpu")) == torch.bfloat16


@pytest.mark.parametrize("most", ["AVX512_CORE", "AVX2"])
def test_bfloat16_that_is_emulated_or_missing_is_not_used(most: str) -> None:
    if not torch.cpu._is_avx512_supported():
        pytest.skip("this processor has no AVX-512 to leave out parts of")
    asked = [sys.executable, "-c", ASKED]
    limited = os.environ | {"ONEDNN_MAX_CPU_ISA": most}
    done = subprocess.run(asked, env=limited, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "torch.float32"
