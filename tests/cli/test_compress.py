"""Pictures become coded files and come back at their size; what cannot be used is said, and stops nothing else."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shared.codec.types import Frame
from tests.cli.conftest import Sightline

ROW = {
    "input": str,
    "output": str,
    "width": int,
    "height": int,
    "bytes": int,
    "bpp": float,
    "quality": float,
    "encode_ms": float,
}


@pytest.mark.parametrize(("width", "height"), [(1, 1), (1, 300), (17, 33), (130, 70)])
def test_a_picture_comes_back_at_its_own_size(
    width: int, height: int, sightline: Sightline, tmp_path: Path, rng: np.random.Generator
) -> None:
    Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    assert sightline("compress", tmp_path / "a.png", "-o", tmp_path / "coded").code == 0
    ended = sightline("decompress", tmp_path / "coded" / "a.slc", "-o", tmp_path / "decoded")
    assert ended.code == 0
    with Image.open(tmp_path / "decoded" / "a.png") as back:
        assert (back.format, back.mode, back.size) == ("PNG", "RGB", (width, height))


def test_what_comes_back_resembles_what_went_in(sightline: Sightline, pictures: Path, tmp_path: Path) -> None:
    sightline("compress", pictures, "-o", tmp_path / "coded", "--quality", "8")
    sightline("decompress", tmp_path / "coded", "-o", tmp_path / "decoded")
    for name in ("astronaut.jpg", "chelsea.png", "coffee.webp"):
        before = np.asarray(Image.open(pictures / name).convert("RGB"), np.float64)
        after = np.asarray(Image.open((tmp_path / "decoded" / name).with_suffix(".png")), np.float64)
        assert 10 * np.log10(255**2 / np.mean((before - after) ** 2)) > 18, name


def test_json_is_one_line_a_file_and_tells_the_truth(sightline: Sightline, pictures: Path, tmp_path: Path) -> None:
    ended = sightline("compress", pictures, "-o", tmp_path / "coded", "--json")
    rows = [json.loads(line) for line in ended.out.splitlines()]
    assert [Path(row["input"]).name for row in rows] == ["astronaut.jpg", "chelsea.png", "coffee.webp"]
    for row in rows:
        assert {name: type(value) for name, value in row.items()} == ROW
        assert row["bytes"] == Path(row["output"]).stat().st_size
        assert row["bpp"] == pytest.approx(8 * row["bytes"] / (row["width"] * row["height"]), abs=1e-4)
        assert row["quality"] == 4.0
    assert (rows[1]["width"], rows[1]["height"]) == (100, 131)


def test_effort_finds_other_latents_that_any_decoder_reads(
    sightline: Sightline, pictures: Path, tmp_path: Path
) -> None:
    for folder, effort in (("plain", "0"), ("effort", "4"), ("again", "4")):
        ended = sightline("compress", pictures / "chelsea.png", "-o", tmp_path / folder, "-q", "6", "--effort", effort)
        assert ended.code == 0, ended.err
    plain, effort, again = ((tmp_path / name / "chelsea.slc").read_bytes() for name in ("plain", "effort", "again"))
    assert effort != plain
    assert effort == again
    assert sightline("decompress", tmp_path / "effort", "-o", tmp_path / "decoded").code == 0
    refused = sightline("compress", pictures, "-o", tmp_path / "x", "--effort", "4", "--target-bytes", "900")
    assert refused.code == 2
    assert "--effort and --target-bytes" in refused.err


def test_a_higher_quality_costs_more_bytes(sightline: Sightline, pictures: Path, tmp_path: Path) -> None:
    sizes = []
    for quality in (1, 4, 8):
        sightline("compress", pictures / "astronaut.jpg", "-o", tmp_path, "-q", quality)
        sizes.append((tmp_path / "astronaut.slc").stat().st_size)
    assert sizes == sorted(set(sizes))


def test_target_bytes_are_used_but_not_passed(sightline: Sightline, pictures: Path, tmp_path: Path) -> None:
    def size(*how: object) -> int:
        sightline("compress", pictures / "astronaut.jpg", "-o", tmp_path, *how)
        return (tmp_path / "astronaut.slc").stat().st_size

    target = (size("-q", 2) + size("-q", 6)) // 2
    assert 0.85 * target <= size("--target-bytes", target) <= target
    assert size("--target-bytes", 1) == size("-q", 1)


def test_a_bad_file_is_named_and_the_others_are_done(sightline: Sightline, pictures: Path, tmp_path: Path) -> None:
    jpeg = (pictures / "astronaut.jpg").read_bytes()
    (pictures / "b-empty.png").write_bytes(b"")
    (pictures / "b-text.jpg").write_bytes(b"these are words, not pixels")
    (pictures / "b-truncated.jpg").write_bytes(jpeg[: len(jpeg) // 2])
    (pictures / "b-bomb.png").write_bytes(
        bytes.fromhex("89504e470d0a1a0a0000000d49484452000186a0000186a00802000000") + b"\0" * 64
    )
    ended = sightline("compress", pictures, "-o", tmp_path / "coded")
    assert ended.code == 1
    for name, said in {
        "b-empty.png": "expected a JPEG, PNG or WebP file, got 0 bytes",
        "b-text.jpg": "expected a JPEG, PNG or WebP file, got",
        "b-truncated.jpg": "expected a whole JPEG file",
        "b-bomb.png": "expected sides of at most 8192 pixels, got 100000x100000",
    }.items():
        assert f"{pictures / name}: {said}" in ended.err
    assert "4 of 7 files failed" in ended.err
    assert "Traceback" not in ended.err
    assert sorted(path.name for path in (tmp_path / "coded").iterdir()) == [
        "astronaut.slc",
        "chelsea.slc",
        "coffee.slc",
    ]


def test_two_inputs_of_one_name_are_refused_before_any_work(
    sightline: Sightline, pictures: Path, tmp_path: Path
) -> None:
    (pictures / "chelsea.jpg").write_bytes((pictures / "astronaut.jpg").read_bytes())
    ended = sightline("compress", pictures, "-o", tmp_path / "coded")
    assert ended.code == 2
    said = " ".join(ended.err.replace("│", " ").split())
    assert "would both become" in said
    assert not (tmp_path / "coded").exists()


@pytest.mark.parametrize(
    "wrong",
    [
        ("--quality", "0.5"),
        ("--quality", "9"),
        ("--quality", "nan"),
        ("--quality", "much"),
        ("--target-bytes", "0"),
        ("--quality", "4", "--target-bytes", "1000"),
        ("--model", "no-such-model"),
        ("no-such-picture.png",),
    ],
)
def test_wrong_usage_ends_with_2_and_leaves_no_folder(
    wrong: tuple[str, ...], sightline: Sightline, pictures: Path, tmp_path: Path
) -> None:
    ended = sightline("compress", pictures, *wrong, "-o", tmp_path / "coded")
    assert ended.code == 2
    assert "Traceback" not in ended.err
    assert not (tmp_path / "coded").exists()


def test_an_output_that_is_a_file_is_wrong_usage(sightline: Sightline, pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    assert sightline("compress", pictures, "-o", tmp_path / "taken").code == 2


def test_the_model_can_be_named_by_its_id(sightline: Sightline, pictures: Path, tmp_path: Path, codec: object) -> None:
    model_id = codec.model_id  # type: ignore[attr-defined]
    for form in (model_id, model_id[:12]):
        assert sightline("compress", pictures, "-o", tmp_path / "coded", "--model", form).code == 0
    assert sightline("compress", pictures, "-o", tmp_path / "coded", "--model", "0" * 64).code == 2


def test_a_damaged_coded_file_is_named_and_the_others_are_done(
    sightline: Sightline, pictures: Path, tmp_path: Path
) -> None:
    coded = tmp_path / "coded"
    sightline("compress", pictures, "-o", coded)
    whole = (coded / "coffee.slc").read_bytes()
    (coded / "cut.slc").write_bytes(whole[:-9])
    (coded / "flipped.slc").write_bytes(whole[:40] + bytes([whole[40] ^ 1]) + whole[41:])
    (coded / "other.slc").write_bytes(b"\x89PNG, says this one, and goes on for a while")
    ended = sightline("decompress", coded, "-o", tmp_path / "decoded")
    assert ended.code == 1
    assert f"{coded / 'cut.slc'}: expected" in ended.err
    assert f"{coded / 'flipped.slc'}: expected CRC-32C" in ended.err
    assert f"{coded / 'other.slc'}: expected a .slc file" in ended.err
    assert sorted(path.name for path in (tmp_path / "decoded").iterdir()) == [
        "astronaut.png",
        "chelsea.png",
        "coffee.png",
    ]


def test_decompress_never_replaces_the_original_beside_the_coded_file(
    sightline: Sightline, pictures: Path, astronaut: Frame
) -> None:
    original = (pictures / "chelsea.png").read_bytes()
    sightline("compress", pictures, "-o", pictures)
    ended = sightline("decompress", pictures, "-o", pictures)
    assert ended.code == 2
    assert (pictures / "chelsea.png").read_bytes() == original


def test_decompress_replaces_what_it_made_before(sightline: Sightline, pictures: Path, tmp_path: Path) -> None:
    sightline("compress", pictures, "-o", tmp_path)
    for _ in range(2):
        assert sightline("decompress", tmp_path, "-o", tmp_path).code == 0
