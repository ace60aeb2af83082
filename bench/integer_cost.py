"""What a bundle's integer entropy model costs in rate: `python -m bench.integer_cost --images DIR`.

Against the floats that its integers say, for a bundle holds no others; against those it was made from, its manifest has
`integer_cost`, measured at export (`trainer.integer_cost`).
"""

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table

from shared.codec.codec import Codec
from shared.codec.types import Frame
from trainer.export import trainable_from_bundle
from trainer.integer_cost import code_lengths


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--images", type=Path, required=True, help="folder of pictures")
    parser.add_argument("--model", default="detection", help="bundle name or folder")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    images = sorted(p for p in arguments.images.iterdir() if p.suffix.lower() in {".jpg", ".jpeg", ".png"})
    rows = code_lengths(Codec.load(arguments.model), trainable_from_bundle(arguments.model).eval(), _frames(images))
    total = sum(row.integers for row in rows) / sum(row.floats for row in rows) - 1
    if arguments.json:
        described = [{**asdict(row), "cost": row.cost} for row in rows]
        json.dump({"pictures": len(images), "rows": described, "cost": total}, sys.stdout, indent=2)
        return 0
    table = Table(title=f"ideal code length of {len(images)} pictures' latents, kbit")
    for name in ("quality", "floats", "rounded", "integers", "integers against floats"):
        table.add_column(name, justify="right")
    for row in rows:
        kbits = (f"{bits / 1000:.0f}" for bits in (row.floats, row.rounded, row.integers))
        table.add_row(str(row.quality), *kbits, f"{row.cost:+.2%}")
    Console().print(table, f"all qualities: {total:+.2%}")
    return 0


def _frames(images: list[Path]) -> Iterator[Frame]:
    for path in track(images, "pictures", console=Console(stderr=True)):
        yield Frame(np.asarray(Image.open(path).convert("RGB")))


if __name__ == "__main__":
    sys.exit(main())
