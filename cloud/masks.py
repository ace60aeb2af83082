"""COCO's compressed run-length encoding of binary masks, as pycocotools writes it, without needing pycocotools.

Runs go down the columns and alternate between 0 and 1, beginning with 0. From the third run on, the difference to the
run two before is coded (neighbouring columns are alike). A number is written in groups of 5 bits, low first; bit 5
says that more follow, the sign is that of the last group's bit 4; 48 is added to make each group a character.
"""

import itertools

import numpy as np
from numpy.typing import NDArray


def encode_mask(mask: NDArray[np.bool_]) -> bytes:
    """`mask`: bool [height, width] -> `counts` of COCO's compressed RLE, ASCII."""
    column_major = np.asarray(mask, dtype=bool).ravel(order="F")
    if not column_major.size:
        return b""
    changes = np.flatnonzero(column_major[1:] != column_major[:-1]) + 1
    edges = [0, *changes.tolist(), column_major.size]
    runs = [after - before for before, after in itertools.pairwise(edges)]
    if column_major[0]:
        runs.insert(0, 0)
    out = bytearray()
    for i, run in enumerate(runs):
        value = run - runs[i - 2] if i > 2 else run
        more = True
        while more:
            group = value & 0x1F
            value >>= 5
            more = value != -1 if group & 0x10 else value != 0
            out.append((group | 0x20 if more else group) + 48)
    return bytes(out)
