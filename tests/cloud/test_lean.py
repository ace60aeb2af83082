"""The cloud's networks come without torch's compiler, which is there for whoever asks."""

import subprocess
import sys

CODE = """
import sys
import torch
import cloud.server
from cloud.tasks.loading import load_task

task = load_task("faster-rcnn-mobilenetv2")
task.predict([torch.zeros(3, 64, 64)])
assert "torchvision.ops.roi_align" in sys.modules
assert not any(name.startswith("torch._dynamo") for name in sys.modules)

from torchvision.ops.roi_align import is_compile_supported
from torch._dynamo.utils import is_compile_supported as real
assert is_compile_supported is not real
assert is_compile_supported("cpu") == real("cpu")
assert torch.compile(lambda a: a + 1, backend="eager")(torch.ones(2)).tolist() == [2, 2]
"""


def test_a_cloud_neither_imports_the_compiler_nor_stands_in_its_way() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
