"""Where a bundle comes from, written into its manifest and told in its model card."""

import os
import platform
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shared.codec.bundle import SCALE_TENSOR, Bundle, load_bundle
from trainer.export import export_bundle
from trainer.harvest import Curve
from trainer.model import TrainableCodec
from trainer.settings import TrainSettings


def write_bundle(
    settings: TrainSettings,
    codec: TrainableCodec,
    calibration: Sequence[Tensor],
    folder: Path,
    *,
    ranges: Mapping[str, Sequence[float]],
    pictures: int,
    steps: int,
    elapsed_s: float,
    curve: Curve | None,
    device: str,
) -> None:
    """Export `codec` to `folder` with its provenance and a model card.

    `ranges`: of g_a's activations, by "g_a". `curve`: its measurement on tuning pictures.
    """
    info: dict[str, Any] = {
        "ranges": ranges,
        "task_network": settings.network,
        "task_loss": settings.task_loss,
        "provenance": {
            "data": {"images": settings.images.name, "annotated": settings.annotations is not None, "count": pictures},
            "started_from": None if settings.start_from is None else Path(settings.start_from).name,
            "steps": steps,
            "hours": round(elapsed_s / 3600, 3),
            "batch": settings.batch,
            "crop": settings.crop,
            "seed": settings.seed,
            "schedule": asdict(settings.schedule),
            "rate": settings.rate,
            "ema": settings.ema,
            "short_side_px": settings.short_side_px,
            **_crop_sizes(settings),
            "hardware": hardware(device, settings.devices * settings.nodes),
            "torch": torch.__version__,
            "commit": commit(),
        },
    }
    if curve is not None:
        info["tuning_curve"] = curve.as_dict()
    bundle = export_bundle(codec, calibration, folder, name=settings.name, info=info, scales=_scales(settings))
    (folder / "README.md").write_text(_card(bundle, settings, curve))


def _crop_sizes(settings: TrainSettings) -> dict[str, Any]:
    """How large the crops were; `trainer.effort` reads whether rate was counted by pixel of the frame."""
    if not settings.as_coded:
        return {"zoom": settings.zoom}
    return {
        "as_coded": True,
        "frame_scale": settings.frame_scale,
        "scales": settings.scales,
        "start_levels": settings.start_levels,
    }


def _scales(settings: TrainSettings) -> Sequence[int] | None:
    """Sizes at which the new bundle codes: as asked, else as the bundle did from which it started."""
    if settings.scales is not None or settings.start_from is None or Path(settings.start_from).is_file():
        return settings.scales
    scales = load_bundle(settings.start_from).arrays.get(SCALE_TENSOR)
    return None if scales is None else scales.tolist()


def hardware(device: str, processes: int) -> str:
    """What the run ran on, in words."""
    if device.startswith("cuda"):
        return f"{processes} x {torch.cuda.get_device_name()}"
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    return f"{processes} x {name}, {torch.get_num_threads()} of {os.cpu_count()} cores"


def commit() -> str | None:
    """The checkout's commit, with + when there are changes; None outside a checkout."""
    git, here = shutil.which("git"), Path(__file__).resolve().parent
    if git is None:
        return None
    head = subprocess.run([git, "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True)  # noqa: S603
    if head.returncode:
        return None
    changed = subprocess.run(  # noqa: S603
        [git, "status", "--porcelain", "--untracked-files=no", "."], cwd=here, capture_output=True, text=True
    )
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")


def _card(bundle: Bundle, settings: TrainSettings, curve: Curve | None) -> str:
    made = bundle.info["provenance"]
    data = made["data"]
    lines = [
        f"# {settings.name}",
        "",
        f"A Sightline codec, model id `{bundle.model_id}`.",
        "",
        f"Trained for {made['steps']} steps of {made['batch']} crops of {made['crop']} pixels, "
        f"{made['hours']} hours on {made['hardware']}, on {data['count']} pictures of `{data['images']}`, through the "
        f"frozen network `{settings.network}` (task loss: {settings.task_loss}). Commit {made['commit']}, seed "
        f"{made['seed']}, started from {made['started_from'] or 'nothing'}.",
        *integer_cost_lines(bundle),
    ]
    if curve is not None:
        lines += curve_table(curve)
    return "\n".join(lines) + "\n"


def integer_cost_lines(bundle: Bundle) -> list[str]:
    """Lines of a model card."""
    cost = bundle.info["integer_cost"]
    shown = ", ".join(f"{each:+.1%}" for each in cost)
    return ["", f"Bits for the integers of the entropy model, against the model as it was trained: {shown}."]


def curve_table(curve: Curve) -> list[str]:
    """Lines of a model card."""
    rows = zip(range(1, 9), curve.bpp, curve.mse, curve.distance, strict=True)
    return [
        *("", "On tuning pictures, by the model's own code lengths:", ""),
        "| quality | bits per pixel | MSE | task distance |",
        "|---|---|---|---|",
        *(f"| {q} | {b:.4f} | {m:.6f} | {d:.4f} |" for q, b, m, d in rows),
    ]
