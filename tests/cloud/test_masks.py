"""Masks in COCO's run-length encoding: the same bytes as pycocotools."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from cloud.masks import encode_mask

coco = pytest.importorskip("pycocotools.mask")


@given(arrays(np.bool_, array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=40)))
def test_any_mask_is_encoded_as_pycocotools_does(mask: np.ndarray) -> None:
    assert encode_mask(mask) == coco.encode(np.asfortranarray(mask, dtype=np.uint8))["counts"]


@given(st.integers(1, 500), st.integers(1, 500), st.data())
def test_large_boxes_are_encoded_as_pycocotools_does(height: int, width: int, data: st.DataObject) -> None:
    mask = np.zeros((height, width), bool)
    top, left = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
    mask[top : data.draw(st.integers(top, height)), left : data.draw(st.integers(left, width))] = True
    assert encode_mask(mask) == coco.encode(np.asfortranarray(mask, dtype=np.uint8))["counts"]
