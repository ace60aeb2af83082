"""Codecs of a single rate, and the comparison of short runs."""

import json
from pathlib import Path

import numpy as np
import pytest

from bench import ablations
from bench.ablations import Point, at_equal
from trainer.crops import Crops, list_pictures
from trainer.harvest import Curve
from trainer.train import ranked

RATES = (0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8)
REFERENCE = Curve(
    1, bpp=RATES, mse=tuple(1e-3 / rate for rate in RATES), distance=tuple(0.1 / rate**0.5 for rate in RATES)
)


def test_crops_of_one_quality_are_those_of_many_but_for_it(photograph_set: Path):
    pictures = list_pictures(photograph_set / "images", None)
    many, one = Crops(pictures, crop=64, seed=3), Crops(pictures, crop=64, seed=3, quality=6)
    assert {one[number].quality_steps for number in range(20)} == {6 * 256}
    assert len({many[number].quality_steps for number in range(20)}) > 5
    for number in range(20):
        np.testing.assert_array_equal(one[number].pixels, many[number].pixels)


def test_of_a_single_rate_the_last_checkpoint_is_the_best():
    worse_later = Curve(2, tuple(2 * rate for rate in RATES), REFERENCE.mse, REFERENCE.distance)
    assert ranked([REFERENCE, worse_later])[0].step == 1
    assert ranked([REFERENCE, worse_later], quality=3)[0].step == 2


@pytest.mark.parametrize("rate", [0.3, 0.4, 2.0])
def test_a_point_is_compared_at_what_it_reaches(rate: float):
    point = Point(bpp=1.1 * rate, mse=1e-3 / rate, distance=0.1 / rate**0.5)
    assert at_equal(point, REFERENCE, "mse") == pytest.approx(0.1)
    assert at_equal(point, REFERENCE, "distance") == pytest.approx(0.1)


def test_a_point_that_the_reference_does_not_reach_is_not_compared():
    assert at_equal(Point(bpp=0.1, mse=0.1, distance=0.2), REFERENCE, "mse") is None
    assert at_equal(Point(bpp=0.1, mse=0.1, distance=0.2), REFERENCE, "distance") is not None


def test_runs_are_made_once_and_compared_with_the_reference(
    photograph_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    command = ["ablations", "--images", str(photograph_set / "images"), "--annotations"]
    command += [str(photograph_set / "annotations.json"), "--out", str(tmp_path), "--steps", "1", "--json"]
    monkeypatch.setattr("sys.argv", [*command, "--only", "reference", "quality-3-alone", "mbt2018-mean-0.013"])
    assert ablations.main() == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
    assert (rows["reference"]["distance"], rows["reference"]["mse"]) == (0, 0)
    assert abs(rows["quality-3-alone"]["mse"]) < 0.2  # after one step it is the reference still
    assert rows["mbt2018-mean-0.013"]["steps"] >= 1

    monkeypatch.setattr(ablations, "train_codec", lambda _settings: pytest.fail("a run was made again"))
    monkeypatch.setattr("sys.argv", [*command, "--only", "reference"])
    assert ablations.main() == 0
    assert {row["name"] for row in json.loads(capsys.readouterr().out)["rows"]} == set(rows)
