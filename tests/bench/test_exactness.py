"""The count of frames that are read otherwise: that it finds one."""

import json
from pathlib import Path

import pytest

from bench import exactness
from bench.exactness import BATCH, decode_all, encode_all

WAY = "this processor"


@pytest.fixture
def encoded(tmp_path: Path) -> Path:
    encode_all(WAY, BATCH, str(tmp_path))
    return tmp_path


def differing(folder: Path, capsys: pytest.CaptureFixture[str]) -> int:
    decode_all(WAY, str(folder))
    return int(json.loads(capsys.readouterr().out)[WAY])


def test_files_are_read_as_they_were_written(encoded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    digests = json.loads((encoded / WAY / "digests.json").read_text())
    assert len(set(digests)) == len(digests) == BATCH
    assert differing(encoded, capsys) == 0


def test_other_symbols_and_a_difference_that_ends_in_an_error_are_counted(
    encoded: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    files = sorted((encoded / WAY).glob("*.slc"))
    files[0].write_bytes(files[1].read_bytes())
    assert differing(encoded, capsys) == 1
    load = exactness.Codec.load

    def with_another_prior(*arguments: object, **options: object) -> exactness.Codec:
        codec = load(*arguments, **options)
        codec.h_s.parameters.layers[2].bias[0] += 1 << 22
        return exactness.Codec(codec.bundle)

    monkeypatch.setattr(exactness.Codec, "load", with_another_prior)
    assert differing(encoded, capsys) == BATCH
