"""The command line, called as its entry point is."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image

from cli.main import main
from shared.codec.types import Frame


@dataclass(frozen=True)
class Ended:
    code: int
    out: str
    err: str


Sightline = Callable[..., Ended]


@pytest.fixture
def sightline(capsys: pytest.CaptureFixture[str]) -> Sightline:
    """Runs the command line in this process, because importing torch again for each test costs seconds."""

    def run(*arguments: object) -> Ended:
        with pytest.raises(SystemExit) as end:
            main([str(argument) for argument in arguments])
        told = capsys.readouterr()
        code = end.value.code
        assert code is None or isinstance(code, int)
        return Ended(code or 0, told.out, told.err)

    return run


@pytest.fixture
def pictures(tmp_path: Path, photographs: dict[str, Frame]) -> Path:
    """A folder with a small JPEG, PNG and WebP."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    Image.fromarray(photographs["astronaut"].rgb[:160, 100:300]).save(folder / "astronaut.jpg", quality=90)
    Image.fromarray(photographs["chelsea"].rgb[40:171, 100:200]).save(folder / "chelsea.png")
    Image.fromarray(photographs["coffee"].rgb[:96, :128]).save(folder / "coffee.webp")
    return folder
