"""ONNX detectors with YOLOX's layout (arXiv 2107.08430), by path.

Input [1, 3, side, side], BGR 0..255, the picture at the top left, the rest 114. Output [1, cells, 5 + classes]:
x, y, w, h, objectness and class scores a cell, strides 8, 16, 32; boxes not decoded, scores already sigmoid.
Class k is the k-th of COCO's 80 categories. ONNX Runtime is optional: `pip install sightline[onnx]`.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional
from torchvision.ops import batched_nms

from cloud.tasks.labels import COCO_LABELS, label_of
from cloud.tasks.torchvision_models import as_floats
from cloud.tasks.types import Detections, TaskKind
from shared.errors import InvalidBundle, Unavailable

STRIDES = (8, 16, 32)
FILL = 114.0
SCORE_THRESHOLD = 0.01
NMS_IOU = 0.65
MAX_DETECTIONS = 100


class OnnxDetector:
    """A YOLOX detector; implements `TaskModel`. Runs on the CPU with `threads` threads (None: the runtime's choice)."""

    def __init__(self, path: Path, *, threads: int | None = None) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise Unavailable("an ONNX detector needs ONNX Runtime: pip install 'sightline[onnx]'") from error
        try:
            content = path.read_bytes()
        except OSError as error:
            raise InvalidBundle(f"{path}: expected a readable ONNX file, got {error}") from error
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        if threads is not None:
            options.intra_op_num_threads = threads
        try:
            self._session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # the runtime raises several kinds, none of them public
            raise InvalidBundle(f"{path}: expected an ONNX model, got {error}") from error
        self.name = str(path)
        self.kind = TaskKind.DETECTION
        self.model_id = hashlib.sha256(content).hexdigest()
        self._categories = torch.tensor(sorted(COCO_LABELS))
        self._input = self._session.get_inputs()[0].name
        self._side = self._checked_side(path)
        self._grid, self._strides = _cells(self._side)

    def _checked_side(self, path: Path) -> int:
        shape = self._session.get_inputs()[0].shape
        output = self._session.get_outputs()[0].shape
        if len(shape) != 4 or shape[1] != 3 or shape[2] != shape[3] or not isinstance(shape[2], int):
            raise InvalidBundle(f"{path}: expected an input [1, 3, side, side], got {shape}")
        side = shape[2]
        expected = [1, sum((side // stride) ** 2 for stride in STRIDES), 5 + len(COCO_LABELS)]
        if list(output) != expected:
            raise InvalidBundle(f"{path}: expected YOLOX's output {expected}, got {output}")
        return side

    @torch.inference_mode()
    def predict(self, images: Sequence[Tensor], min_score: float = 0.0) -> list[Detections]:
        """See `TaskModel.predict`."""
        return [self._one(image).at_least(min_score) for image in as_floats(images, torch.device("cpu"))]

    def _one(self, image: Tensor) -> Detections:
        height, width = image.shape[-2:]
        scale = min(self._side / height, self._side / width)
        size = (max(1, int(height * scale)), max(1, int(width * scale)))
        resized = functional.interpolate(image[None] * 255, size=size, mode="bilinear").round()
        canvas = torch.full((1, 3, self._side, self._side), FILL)
        canvas[:, :, : size[0], : size[1]] = resized.flip(1)  # RGB to BGR
        output: NDArray[np.float32] = self._session.run(None, {self._input: canvas.numpy()})[0][0]
        return self._decoded(torch.from_numpy(output), scale, height, width)

    def _decoded(self, output: Tensor, scale: float, height: int, width: int) -> Detections:
        centre = (output[:, :2] + self._grid) * self._strides
        half = output[:, 2:4].exp() * self._strides / 2
        boxes = torch.cat([centre - half, centre + half], 1) / scale
        scores = output[:, 4:5] * output[:, 5:]
        cells, classes = torch.where(scores > SCORE_THRESHOLD)
        found = scores[cells, classes]
        limits = torch.tensor([width, height, width, height], dtype=torch.float32)
        boxes = torch.minimum(boxes[cells].clamp(min=0), limits)
        kept = batched_nms(boxes, found, classes, NMS_IOU)[:MAX_DETECTIONS]
        ids = self._categories[classes[kept]]
        return Detections(boxes[kept], found[kept], ids, tuple(label_of(i) for i in ids.tolist()))


def _cells(side: int) -> tuple[Tensor, Tensor]:
    """Column and row of each cell [cells, 2], and its stride [cells, 1]."""
    grids, strides = [], []
    for stride in STRIDES:
        count = side // stride
        rows, columns = torch.meshgrid(torch.arange(count), torch.arange(count), indexing="ij")
        grids.append(torch.stack([columns, rows], 2).view(-1, 2))
        strides.append(torch.full((count * count, 1), float(stride)))
    return torch.cat(grids).float(), torch.cat(strides)
