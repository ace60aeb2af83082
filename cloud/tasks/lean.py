"""torchvision without torch's compiler, which no task network uses.

`torchvision.ops.roi_align` imports all of `torch._dynamo` for one question, asked only where a GPU is to be
deterministic: 3 to 4 s of a cloud's start and 150 MiB of its memory (torchvision 0.29). While torchvision is imported,
a module with nothing but that question's answer stands in its place; the real one is asked for it. To import this is
to import torchvision so.
"""

import importlib
import sys
from types import ModuleType

_COMPILER = "torch._dynamo.utils"


def _import_torchvision() -> None:
    if _COMPILER in sys.modules or "torchvision" in sys.modules:
        return
    stand_in = ModuleType(_COMPILER)
    stand_in.is_compile_supported = _is_compile_supported  # type: ignore[attr-defined]
    sys.modules[_COMPILER] = stand_in
    try:
        importlib.import_module("torchvision")
    finally:
        del sys.modules[_COMPILER]


def _is_compile_supported(device: str) -> bool:
    return bool(importlib.import_module(_COMPILER).is_compile_supported(device))


_import_torchvision()
