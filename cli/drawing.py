"""Boxes, masks and labels on a picture, drawn by the `supervision` package."""

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

# One colour a class, far apart for neighbours, bright enough for dark text.
PALETTE = ("#ff7a3d", "#3ddc97", "#5ab0ff", "#ffd23f", "#ff6fae", "#b49cff", "#4fd8eb", "#c6e94e", "#ff9f7f", "#8fe3ff")


def draw(
    rgb: NDArray[np.uint8],
    boxes: Sequence[Sequence[float]],
    category_ids: Sequence[int],
    labels: Sequence[str],
    masks: NDArray[np.bool_] | None = None,
) -> NDArray[np.uint8]:
    """A copy of `rgb` (uint8 [height, width, 3]) with N objects on it.

    `boxes`: N corners x_min, y_min, x_max, y_max in pixels. `masks`: bool [N, height, width] or None.
    """
    if not boxes:
        return rgb.copy()
    sv = import_supervision()
    detections = sv.Detections(
        xyxy=np.asarray(boxes, np.float32), class_id=np.asarray(category_ids, np.int64), mask=masks
    )
    size = (rgb.shape[1], rgb.shape[0])
    palette = sv.ColorPalette.from_hex(list(PALETTE))
    thickness = sv.calculate_optimal_line_thickness(resolution_wh=size)
    text_scale = max(0.4, sv.calculate_optimal_text_scale(resolution_wh=size))
    scene = np.ascontiguousarray(rgb[:, :, ::-1])  # supervision's order is BGR
    if masks is not None:
        scene = sv.MaskAnnotator(palette, opacity=0.45).annotate(scene, detections)
    scene = sv.BoxAnnotator(palette, thickness=thickness).annotate(scene, detections)
    scene = sv.LabelAnnotator(
        palette,
        text_color=sv.Color.from_hex("#16110d"),
        text_scale=text_scale,
        text_thickness=max(1, thickness // 2),
        text_padding=max(3, round(8 * text_scale)),
        smart_position=True,
    ).annotate(scene, detections, labels=list(labels))
    return np.ascontiguousarray(scene[:, :, ::-1])


def import_supervision() -> Any:
    """The package, without its advice to install OpenCV, which is not needed for this little."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="OpenCV", category=UserWarning)
        import supervision
    return supervision
