"""Reading a picture the way every codec and detector of an evaluation gets it."""

from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from shared.errors import InvalidImage
from trainer.evaluation.anchors import Rgb


def read_rgb(path: Path) -> Rgb:
    """uint8 [height, width, 3]. Orientation tags are ignored, as COCO's annotations do. Raises InvalidImage."""
    try:
        with Image.open(path) as picture:
            return np.asarray(picture.convert("RGB"))
    except (OSError, UnidentifiedImageError) as error:
        raise InvalidImage(f"{path} is not a picture that can be read: {error}") from error
