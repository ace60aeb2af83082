"""What is inside a coded file or a bundle, for people and for programs."""

import json
from pathlib import Path

from shared.codec.codec import Codec
from tests.cli.conftest import Sightline


def test_a_coded_file_accounts_for_each_byte(
    sightline: Sightline, pictures: Path, tmp_path: Path, codec: Codec
) -> None:
    sightline("compress", pictures / "chelsea.png", "-o", tmp_path, "-q", "3.5")
    told = json.loads(sightline("info", tmp_path / "chelsea.slc", "--json").out)
    assert (told["width"], told["height"], told["quality"]) == (100, 131, 3.5)
    assert told["bytes"] == (tmp_path / "chelsea.slc").stat().st_size == sum(told["bytes_of"].values())
    assert (told["model"], told["model_id"]) == ("detection", codec.model_id)


def test_a_coded_file_of_an_unknown_model_is_still_readable(
    sightline: Sightline, pictures: Path, tmp_path: Path, codec: Codec
) -> None:
    from dataclasses import replace

    from shared.codec.bitstream import from_bytes, to_bytes

    sightline("compress", pictures / "chelsea.png", "-o", tmp_path)
    file = tmp_path / "chelsea.slc"
    file.write_bytes(to_bytes(replace(from_bytes(file.read_bytes(), [codec.model_id]), model_id="ab" * 32)))
    told = json.loads(sightline("info", file, "--json").out)
    assert (told["model"], told["model_id"]) == (None, "ab" * 4)
    assert "not known here" in sightline("info", file).out


def test_a_bundle_shows_identity_sizes_and_manifest(sightline: Sightline, codec: Codec) -> None:
    told = json.loads(sightline("info", "detection", "--json").out)
    assert told["model_id"] == codec.model_id
    assert told["bytes_of"]["g_a"] > 100_000
    assert codec.model_id in sightline("info", "detection").out


def test_a_damaged_bundle_is_work_that_failed(sightline: Sightline, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"no")
    ended = sightline("info", tmp_path)
    assert ended.code == 1
    assert "expected a codec bundle" in ended.err


def test_what_is_neither_is_wrong_usage_and_says_what_there_is(sightline: Sightline) -> None:
    ended = sightline("info", "nothing-like-it")
    assert ended.code == 2
    assert "detection" in ended.err
