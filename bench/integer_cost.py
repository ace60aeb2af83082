"""What making h_s integer costs in rate: `python -m bench.integer_cost --images DIR`.

Three ideal code lengths of the same pictures' latents, from one bundle: under the float h_s it was made from (exact
Gaussians), under that float h_s rounded to the tables' scale indexes and to means in 1/16 steps, and under the integer
h_s (the tables that are really used). Latents below the bundle's skip threshold are left out of all three alike, by the
integer h_s's indexes, and the symbols are each path's own: rounding to another mean gives other symbols.
"""

import argparse
import json
import math
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from shared.codec.codec import Codec
from shared.codec.hyper import SCALE_COUNT
from shared.codec.transforms import interpolate_levels
from shared.codec.types import MEAN_STEPS, Frame
from trainer.export import trainable_from_bundle
from trainer.model import SCALE_MIN, TrainableCodec
from trainer.quantise import LOG_STEP

QUALITIES = (1, 2, 3, 4, 5, 6, 7, 8)


@torch.no_grad()
def measure(reference: str, images: list[Path]) -> list[dict[str, float]]:
    """Bits of all pictures at each quality: `float`, `rounded`, `integer` as in the module's head."""
    codec = Codec.load(reference)
    model = trainable_from_bundle(reference).eval()
    rows = [{"quality": float(q), "float": 0.0, "rounded": 0.0, "integer": 0.0} for q in QUALITIES]
    for path in track(images, "pictures", console=Console(stderr=True)):
        frame = Frame(np.asarray(Image.open(path).convert("RGB")))
        for row in rows:
            quality = int(row["quality"]) * 256
            y = codec.latents([frame], quality)
            for name, bits in _code_lengths(codec, model, frame, y, quality).items():
                row[name] += bits
    return rows


def _code_lengths(codec: Codec, model: TrainableCodec, frame: Frame, y: Tensor, quality: int) -> dict[str, float]:
    symbols = codec.quantise(y, [quality], [frame])[0]
    scaled = y * interpolate_levels(torch.from_numpy(codec.bundle.arrays["gain.log"]), torch.tensor([quality]))
    z_hat = torch.from_numpy(symbols.z_hat)[None].float()
    means, log_scales = model.coding(scaled, z_hat, torch.tensor([quality]))
    coded = symbols.scale_indexes >= codec.bundle.skip_below
    indexes = ((log_scales - math.log(SCALE_MIN)) / LOG_STEP).round().clamp(0, SCALE_COUNT - 1)
    rounded_symbols = (scaled - (means * MEAN_STEPS).round() / MEAN_STEPS).round()
    residual = (scaled - means).round() + 0.0
    return {
        "float": _gaussian_bits(residual[0].numpy()[coded], log_scales[0].numpy()[coded]),
        "rounded": codec.tables_y.ideal_bits(
            rounded_symbols[0].numpy()[coded].astype(np.int32), indexes[0].numpy()[coded].astype(np.uint8)
        ),
        "integer": codec.tables_y.ideal_bits(symbols.symbols[coded], symbols.scale_indexes[coded]),
    }


def _gaussian_bits(residual: np.ndarray, log_scales: np.ndarray) -> float:
    """-log2 of the Gaussian's mass on [r - 1/2, r + 1/2], scales bounded below as in training."""
    scale = torch.from_numpy(log_scales).double().exp().clamp(min=SCALE_MIN)
    r = torch.from_numpy(residual).double().abs()
    upper = 0.5 * torch.erfc((r - 0.5) / scale / math.sqrt(2))
    lower = 0.5 * torch.erfc((r + 0.5) / scale / math.sqrt(2))
    return float(-(upper - lower).clamp(min=1e-9).log2().sum())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--images", type=Path, required=True, help="folder of pictures")
    parser.add_argument("--model", default="detection", help="bundle name or folder")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    images = sorted(p for p in arguments.images.iterdir() if p.suffix.lower() in {".jpg", ".jpeg", ".png"})
    rows = measure(arguments.model, images)
    for row in rows:
        row["cost_percent"] = 100 * (row["integer"] / row["float"] - 1)
    total = 100 * (sum(r["integer"] for r in rows) / sum(r["float"] for r in rows) - 1)
    if arguments.json:
        json.dump({"pictures": len(images), "rows": rows, "cost_percent": total}, sys.stdout, indent=2)
        return 0
    table = Table(title=f"ideal code length of {len(images)} pictures' latents, kbit")
    for name in ("quality", "float", "rounded", "integer", "integer against float"):
        table.add_column(name, justify="right")
    for row in rows:
        kbits = (f"{row[name] / 1000:.0f}" for name in ("float", "rounded", "integer"))
        table.add_row(f"{row['quality']:.0f}", *kbits, f"{row['cost_percent']:+.2f} %")
    Console().print(table, f"all qualities: {total:+.2f} %")
    return 0


if __name__ == "__main__":
    sys.exit(main())
