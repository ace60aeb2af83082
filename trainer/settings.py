"""Settings of a codec run: one frozen object, written as TOML beside what the run produces, read back to repeat it."""

import json
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from shared.codec.transforms import Architecture
from shared.errors import InvalidSettings
from trainer.crops import CodedSizes
from trainer.schedule import Schedule

TASK_LOSSES = ("features", "ground-truth", "self-labels", "none")


@dataclass(frozen=True, slots=True)
class TrainSettings:
    """What `train_codec` does. Exactly one of `steps` and `hours` bounds the run.

    Where from and where to:
    `out`: folder of the run. `images`: folder of pictures. `annotations`: COCO-format file for them (without it the
    folder is unlabelled). `start_from`: bundle (name or folder) or checkpoint whose weights to start from. `resume`:
    checkpoint of this run to go on from. `name`: the bundle's name. `tuning_images`: pictures on which checkpoints
    are ranked; without it those of the committed tuning split that are among `images`, or else the first few.

    The frozen network:
    `network`: `imagenet` (MobileNetV2's features), or what `cloud.tasks` can load. `network_weights`: weights file for
    `imagenet`. `task_loss`: one of TASK_LOSSES. `short_side_px`: short side of the pictures the codec is for; with the
    network's own fixed resize it gives the scale at which the network sees a crop, drawn within `scale_jitter` of it.

    Steps:
    `crop`: pixels, a multiple of 64. `batch`: crops a step, over all processes. `zoom`: range of the factor a picture
    is resized by before cropping. `rate`: Adam's, at its highest. `clip`: bound on the gradient norm. `ema`: decay of
    the weights' average that is exported, 0 for none. `balance_every`: steps between measurements of gradient norms,
    0 for none. `workers`: processes that prepare crops, 0 for none. `cache_bytes`: bound on decoded pictures kept.
    `threads`: CPU threads, 0 for torch's choice. `bf16`: compute in bfloat16, None where the device has it in hardware.
    `architecture`: None takes that of `start_from`, or the default; a bundle's `m` may be raised. `scales`: sides at
    which the bundle codes pictures, in 1/16 of the frame's, at quality 1 to 8; None takes those of the bundle started
    from, or full size. `train scales` finds them. `as_coded`: crops are as large as pictures are coded by `scales`
    at their quality, instead of by `zoom`; frames are `frame_scale` times as large as the pictures, side by side, and
    `short_side_px` is theirs; rate is then counted by pixel of the frame. `start_levels`: the qualities of the bundle
    started from as which quality 1 to 8 begin, which may lie between two; None begins each as itself. `quality`: of
    all crops, 1 to 8, for a codec of a single rate: its other qualities are not trained, and its last checkpoint is
    exported, for one point has no curve to rank by.
    """

    out: Path
    images: Path
    annotations: Path | None = None
    start_from: str | None = None
    resume: Path | None = None
    name: str = "codec"
    tuning_images: Path | None = None

    network: str = "imagenet"
    network_weights: Path | None = None
    task_loss: str = "features"
    short_side_px: int = 480
    scale_jitter: float = 0.25

    steps: int | None = None
    hours: float | None = None
    crop: int = 256
    batch: int = 8
    zoom: tuple[float, float] = (1.0, 1.0)
    rate: float = 3e-4
    clip: float = 1.0
    ema: float = 0.0
    balance_every: int = 50
    seed: int = 0
    workers: int = 0
    cache_bytes: int = 4 << 30
    threads: int = 0

    accelerator: str = "auto"
    devices: int = 1
    nodes: int = 1
    bf16: bool | None = None
    checkpoint_minutes: float = 3.0
    harvest_minutes: float = 15.0
    harvest_pictures: int = 24
    harvest_keep: int = 3

    scales: tuple[int, ...] | None = None
    as_coded: bool = False
    frame_scale: float = 1.0
    start_levels: tuple[float, ...] | None = None
    quality: int | None = None
    architecture: Architecture | None = None
    schedule: Schedule = field(default_factory=Schedule)

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.hours is None):
            raise InvalidSettings("train codec: set exactly one of 'steps' and 'hours'")
        if self.crop < 64 or self.crop % 64:
            raise InvalidSettings(f"train codec: 'crop' must be a positive multiple of 64, got {self.crop}")
        if self.task_loss not in TASK_LOSSES:
            raise InvalidSettings(f"train codec: 'task_loss' must be one of {TASK_LOSSES}, got {self.task_loss!r}")
        if self.task_loss == "ground-truth" and self.annotations is None:
            raise InvalidSettings("train codec: task_loss 'ground-truth' needs 'annotations'")
        if self.batch < 1 or self.batch % (self.devices * self.nodes):
            raise InvalidSettings(
                f"train codec: 'batch' must be a positive multiple of the {self.devices * self.nodes} processes, "
                f"got {self.batch}"
            )
        for name in ("rate", "clip", "short_side_px", "frame_scale"):
            if getattr(self, name) <= 0:
                raise InvalidSettings(f"train codec: '{name}' must be positive, got {getattr(self, name)}")
        for name in ("steps", "hours"):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise InvalidSettings(f"train codec: '{name}' must be positive, got {getattr(self, name)}")
        if not 0 <= self.ema < 1:
            raise InvalidSettings(f"train codec: 'ema' must be in [0, 1), got {self.ema}")
        if self.scales is not None and (len(self.scales) != 8 or not all(1 <= s <= 16 for s in self.scales)):
            raise InvalidSettings(f"train codec: 'scales' must be 8 numbers in [1, 16], got {self.scales}")
        if self.as_coded and self.scales is None:
            raise InvalidSettings("train codec: 'as_coded' needs 'scales', the sizes at which pictures are coded")
        if self.start_levels is not None and (
            len(self.start_levels) != 8 or not all(1 <= q <= 8 for q in self.start_levels)
        ):
            raise InvalidSettings(f"train codec: 'start_levels' must be 8 numbers in [1, 8], got {self.start_levels}")
        if self.start_levels is not None and self.start_from is None:
            raise InvalidSettings("train codec: 'start_levels' needs 'start_from', a codec that has levels")
        if self.quality is not None and not 1 <= self.quality <= 8:
            raise InvalidSettings(f"train codec: 'quality' must be in [1, 8], got {self.quality}")
        if not 0 < self.zoom[0] <= self.zoom[1]:
            raise InvalidSettings(f"train codec: 'zoom' must be an ascending pair of factors, got {self.zoom}")

    def coded_sizes(self) -> CodedSizes | None:
        """How large crops are by their quality, None where `zoom` says it."""
        if not self.as_coded or self.scales is None:
            return None
        return CodedSizes(self.scales, self.frame_scale, self.short_side_px)


def to_toml(settings: TrainSettings) -> str:
    """The settings as TOML; what is None is left out."""
    tables: list[tuple[str, Mapping[str, Any]]] = []
    lines = []
    for key, value in asdict(settings).items():
        if isinstance(value, dict):
            tables.append((key, value))
        elif value is not None:
            lines.append(f"{key} = {_toml(value)}")
    for name, table in tables:
        lines += ["", f"[{name}]", *(f"{k} = {_toml(v)}" for k, v in table.items() if v is not None)]
    return "\n".join(lines) + "\n"


def from_toml(path: Path) -> TrainSettings:
    """Read settings written by `to_toml`. Raises InvalidSettings naming the file and the field."""
    try:
        table = tomllib.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise InvalidSettings(f"{path}: expected settings in TOML, got {error}") from error
    parts = {"architecture": Architecture, "schedule": Schedule}
    values: dict[str, Any] = {}
    for key, value in table.items():
        known = {f.name: str(f.type) for f in fields(TrainSettings)}
        if key not in known:
            raise InvalidSettings(f"{path}: no setting is called '{key}'")
        if key in parts:
            try:
                values[key] = parts[key](**value)
            except TypeError as error:
                raise InvalidSettings(f"{path}: [{key}]: {error}") from error
        elif "Path" in known[key]:
            values[key] = Path(value)
        else:
            values[key] = tuple(value) if isinstance(value, list) else value
    try:
        return TrainSettings(**values)
    except TypeError as error:
        raise InvalidSettings(f"{path}: {error}") from error


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Path | str):
        return json.dumps(str(value))  # a JSON string is a TOML basic string
    if isinstance(value, tuple):
        return "[" + ", ".join(_toml(v) for v in value) + "]"
    return repr(value)
