"""Measurements in an interpreter of their own: for what is chosen or paid once a process."""

import os
import subprocess
import sys
from collections.abc import Mapping

AVX2_ONLY = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}  # as without AVX-512 and AMX


def output_of(code: str, environment: Mapping[str, str] | None = None) -> str:
    """What Python code prints, run with these variables besides ours; its stderr is ours. Raises CalledProcessError."""
    done = subprocess.run(  # noqa: S603 - our own interpreter
        [sys.executable, "-c", code],
        env=os.environ | (environment or {}),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return done.stdout
