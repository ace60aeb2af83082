"""An evaluation from pictures to report, with the bundled codec and network, on three photographs."""

import csv
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import skimage.data
from PIL import Image

from cloud.tasks.loading import load_task
from shared.codec.codec import Codec
from shared.codec.types import Bitstream, Frame
from shared.errors import InvalidInput, InvalidSettings, Unavailable
from trainer.evaluation import anchors, report
from trainer.evaluation import evaluate as evaluate_module
from trainer.evaluation.accuracy import Metric
from trainer.evaluation.anchors import Anchor, anchor_by_name
from trainer.evaluation.coded_store import CodedStore
from trainer.evaluation.evaluate import EvaluateSettings, Evaluation, evaluate
from trainer.evaluation.examples import JPEG_QUALITIES, VVC_QPS, examples_of
from trainer.evaluation.series import AnchorSeries

NETWORK = "faster-rcnn-mobilenetv2"
# COCO category, box x, y, width, height in the photograph's own pixels, drawn by hand
OBJECTS = {
    "astronaut": [(1, (11, 20, 358, 487))],
    "coffee": [(47, (162, 16, 259, 278)), (67, (0, 0, 600, 400))],
    "chelsea": [(17, (0, 0, 451, 300))],
}
NAMES = {1: "person", 17: "cat", 47: "cup", 67: "dining table"}


@pytest.fixture(scope="module", autouse=True)
def _small_grids() -> Iterator[None]:
    """The anchors with a few points of their grids, which are tested whole in test_anchors."""
    jpeg = replace(anchor_by_name("jpeg"), quantisers=(90, 35, 10), scales=(100, 50))
    vvc = replace(anchor_by_name("vvc:faster"), quantisers=(32, 37, 42, 47), scales=(100,))
    small = {"jpeg": jpeg, "vvc:faster": vvc}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate_module, "anchor_by_name", lambda name: small.get(name) or anchor_by_name(name))
        yield


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> EvaluateSettings:
    """The three photographs at half size, annotated."""
    folder = tmp_path_factory.mktemp("evaluation")
    images, annotations = [], []
    for image_id, (name, objects) in enumerate(OBJECTS.items(), 1):
        picture = Image.fromarray(getattr(skimage.data, name)())
        picture = picture.resize((picture.width // 2, picture.height // 2))
        picture.save(folder / f"{name}.jpg", quality=95)
        images.append({"id": image_id, "file_name": f"{name}.jpg", "width": picture.width, "height": picture.height})
        for category, box in objects:
            half = [v / 2 for v in box]
            annotations.append(
                {"id": len(annotations) + 1, "image_id": image_id, "category_id": category, "bbox": half}
                | {"area": half[2] * half[3], "iscrowd": 0, "segmentation": []}
            )
    categories = [{"id": i, "name": name} for i, name in NAMES.items()]
    document = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "instances.json").write_text(json.dumps(document))
    return EvaluateSettings(
        out_dir=folder / "out",
        cache_dir=folder / "cache",
        codecs=("detection",),
        tasks=(NETWORK,),
        images_dir=folder,
        annotations=folder / "instances.json",
        anchors=("jpeg", "vvc:faster"),
        qualities=(1.0, 3.0, 5.0, 8.0),
        draws=40,
        examples=(folder / "astronaut.jpg",),
        example_quality=4.0,
    )


@pytest.fixture(scope="module")
def evaluation(settings: EvaluateSettings) -> Evaluation:
    found = evaluate(settings)
    report.write(found)
    return found


def whole_grids() -> list[Anchor]:
    return [anchor_by_name("jpeg"), anchor_by_name("vvc:faster")]


def test_every_series_is_measured_at_every_setting(evaluation: Evaluation) -> None:
    [result] = evaluation.results
    settings = {name: [p.setting for p in result.points if p.series == name] for name in evaluation.anchors}
    assert settings["vvc-faster"] == ["47@100", "42@100", "37@100", "32@100"]
    assert len(settings["jpeg"]) == 6
    assert [p.setting for p in result.points if p.series == "sightline-detection"] == ["q1", "q3", "q5", "q8"]
    assert [p.series for p in result.controls] == ["sightline-detection-unquantised"]


def test_the_original_agrees_with_itself_and_costs_its_files(evaluation: Evaluation) -> None:
    [result] = evaluation.results
    assert result.original.measured[Metric("box", agreement=True)].scores.ap[0] == pytest.approx(1)
    files = sum(p.path.stat().st_size for p in evaluation.pictures.pictures)
    assert result.original.measured[Metric("box")].bpp == pytest.approx(8 * files / evaluation.pictures.pixels)


def test_rates_rise_with_quality_and_files_are_larger_than_what_counts(evaluation: Evaluation) -> None:
    [result] = evaluation.results
    for name in (*evaluation.anchors, *evaluation.series):
        full_size = [p for p in result.points if "@" not in p.setting or p.setting.endswith("@100")]
        own = [p for p in full_size if p.series == name]
        rates = [p.measured[Metric("box")].bpp for p in own]
        assert rates == sorted(rates)
        larger = [p.file_bpp > p.measured[Metric("box")].bpp for p in own]
        assert all(larger) is (name in evaluation.anchors)


def test_draws_are_centred_on_what_was_measured(evaluation: Evaluation) -> None:
    [result] = evaluation.results
    for point in (result.original, *result.points):
        measured = point.measured[Metric("box")]
        assert measured.draws.ap.shape == measured.bpp_draws.shape == (40,)
        assert measured.bpp_draws.min() <= measured.bpp <= measured.bpp_draws.max()


def test_a_second_run_detects_nothing_again_and_finds_the_same(
    settings: EvaluateSettings, evaluation: Evaluation, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = load_task(NETWORK)

    def nothing(images: list, min_score: float = 0.0) -> list:
        assert not images, "detected again"
        return []

    monkeypatch.setattr(task, "predict", nothing)
    monkeypatch.setattr("trainer.evaluation.evaluate.load_task", lambda name, **options: task)
    again = evaluate(replace(settings, examples=()))
    for a, b in zip(again.results[0].points, evaluation.results[0].points, strict=True):
        assert (a.series, a.setting) == (b.series, b.setting)
        assert a.measured[Metric("box")].scores.ap == b.measured[Metric("box")].scores.ap
        np.testing.assert_array_equal(a.measured[Metric("box")].draws.ap, b.measured[Metric("box")].draws.ap)


def test_only_points_stored_for_every_picture_are_used_when_nothing_may_be_encoded(
    settings: EvaluateSettings, evaluation: Evaluation
) -> None:
    series = [AnchorSeries(a, CodedStore(settings.cache_dir / "anchors"), tuple(a.points)) for a in whole_grids()]
    stored = [one.stored(evaluation.pictures.pictures).settings for one in series]
    assert stored == [
        ["10@50", "10@100", "35@50", "35@100", "90@50", "90@100"],
        ["47@100", "42@100", "37@100", "32@100"],
    ]


def test_the_json_has_everything_and_no_number_that_is_not_one(evaluation: Evaluation) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    document = json.loads((evaluation.settings.out_dir / "results.json").read_text(), parse_constant=refuse)
    [result] = document["results"]
    assert len(result["points"]) == 2 * (1 + 1 + 4 + 6 + 4)  # two metrics
    assert {row["anchor"] for row in result["bd_rates"]} == {"jpeg", "vvc-faster"}
    for row in result["bd_rates"]:
        assert (row["bd_rate_percent"] is None) == bool(row["why"])
        assert 0 <= row["overlap"] <= 1
    assert document["codecs"]["detection"] == evaluation.model_ids["detection"]
    assert "ffmpeg" in document["environment"]


def test_the_csv_has_a_row_for_every_point_and_metric(evaluation: Evaluation) -> None:
    with (evaluation.settings.out_dir / "results.csv").open() as lines:
        rows = list(csv.DictReader(lines))
    assert len(rows) == 2 * (1 + 1 + 4 + 6 + 4)
    assert all(0 <= float(row["AP"]) <= 1 for row in rows)


def test_the_report_prints_no_result_where_there_is_none(evaluation: Evaluation) -> None:
    text = (evaluation.settings.out_dir / "report.md").read_text()
    unsupported = [c for c in evaluation.results[0].comparisons if c.result.percent is None]
    assert unsupported, "four VVC points on three photographs were expected to support no BD-rate"
    assert text.count("| no result |") == len(unsupported)
    assert "nan" not in text.replace(" | nan |", "")  # a category that does not occur has no AP of its own


def test_the_report_says_when_no_network_took_no_part(evaluation: Evaluation) -> None:
    text = (evaluation.settings.out_dir / "report.md").read_text()
    assert "no network in the role of 'witness'" in text
    [result] = evaluation.results
    both = replace(evaluation, results=(result, replace(result, role="witness")))
    assert "two-network rule" not in report.as_markdown(both, [])


def test_plots_are_drawn_for_every_metric(evaluation: Evaluation) -> None:
    for stem in (f"curves-{NETWORK}-box-map", f"curves-{NETWORK}-box-agreement", f"paper-{NETWORK}-box-map"):
        with Image.open(evaluation.settings.out_dir / f"{stem}.png") as plot:
            assert plot.width > 500
        assert "vvc-faster" in (evaluation.settings.out_dir / f"{stem}.svg").read_text() or stem.startswith("paper")


def test_the_highest_quality_is_compared_with_the_original_files(evaluation: Evaluation) -> None:
    [result] = evaluation.results
    check = next(c for c in result.checks if not c.metric.agreement)
    assert check.setting == "q8"
    top = next(p for p in result.points if p.setting == "q8").measured[Metric("box")]
    original = result.original.measured[Metric("box")]
    assert check.fewer_bits == pytest.approx(original.bpp / top.bpp)
    assert check.relative == pytest.approx(top.scores.ap[0] / original.scores.ap[0] - 1)
    assert math.isfinite(check.relative)


def test_examples_cost_no_more_than_sightlines(evaluation: Evaluation, codec) -> None:
    assert "![examples-detection.jpg]" in (evaluation.settings.out_dir / "report.md").read_text()
    with Image.open(evaluation.settings.out_dir / "examples-detection.jpg") as panel:
        assert panel.width > 800
    picture = evaluation.pictures.pictures[0].path
    rivals = [(anchor_by_name("jpeg"), JPEG_QUALITIES), (anchor_by_name("vvc:faster"), VVC_QPS)]
    row = examples_of(picture, codec, 4.0, rivals)
    assert [e.label.split()[0] for e in row] == ["original", "jpeg", "vvc-faster", "Sightline"]
    assert all(0.5 * row[-1].bits < e.bits <= row[-1].bits for e in row[1:3])


def test_effort_is_one_more_series_whose_pictures_are_coded_once(
    settings: EvaluateSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    two_steps = replace(settings, effort=(2,), anchors=("jpeg",), qualities=(6.0,), reduced=("6@50",), examples=())
    found = evaluate(two_steps)
    assert found.series == ("sightline-detection", "sightline-detection-effort2")
    for name in found.series:
        small, whole = (p for p in found.results[0].points if p.series == name)
        assert (small.setting, whole.setting) == ("q6@50", "q6")
        bits = [p.measured[Metric("box")].bpp for p in (small, whole)]
        assert 0.2 * bits[1] < bits[0] < 0.6 * bits[1]
    plain, effort = (
        next(p for p in found.results[0].points if p.series == name and p.setting == "q6") for name in found.series
    )
    assert effort.measured[Metric("box")].bpp != plain.measured[Metric("box")].bpp
    assert effort.encode_s > plain.encode_s
    assert {c.series for c in found.results[0].comparisons} == set(found.series)

    def never(codec: Codec, steps: int) -> Callable[[Frame, float], Bitstream]:
        def encode(frame: Frame, quality: float) -> Bitstream:
            raise AssertionError("coded again")

        return encode

    monkeypatch.setattr(evaluate_module, "labourer", never)
    again = next(
        p for p in evaluate(two_steps).results[0].points if (p.series, p.setting) == (effort.series, effort.setting)
    )
    assert again.measured[Metric("box")].bpp == effort.measured[Metric("box")].bpp
    with pytest.raises(AssertionError, match="coded again"):
        evaluate(replace(two_steps, effort=(3,)))


def test_settings_that_cannot_work_are_refused(settings: EvaluateSettings) -> None:
    with pytest.raises(InvalidSettings, match="either images_dir and annotations, or cityscapes"):
        replace(settings, annotations=None)
    with pytest.raises(InvalidSettings, match="at least one network"):
        replace(settings, tasks=())
    with pytest.raises(InvalidSettings, match="effort: at least 1 step"):
        replace(settings, effort=(0,))
    with pytest.raises(InvalidSettings, match="reduced: expected QUALITY@PERCENT"):
        replace(settings, reduced=("6@50", "6@100"))
    with pytest.raises(InvalidSettings, match="qualities: at least one"):
        replace(settings, qualities=())
    with pytest.raises(InvalidSettings, match="workers"):
        replace(settings, workers=0)
    with pytest.raises(InvalidSettings, match="not both"):
        replace(settings, image_ids=(1,), image_list=Path("ids.json"))


def test_errors_come_before_the_first_picture(settings: EvaluateSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidInput, match=r"gone\.json"):
        evaluate(replace(settings, annotations=settings.out_dir / "gone.json"))
    with pytest.raises(InvalidSettings, match=r"image_list: .*lost\.json"):
        evaluate(replace(settings, image_list=settings.out_dir / "lost.json"))
    with pytest.raises(InvalidSettings, match="anchor must be"):
        evaluate(replace(settings, anchors=("vp9",)))
    monkeypatch.setattr(anchors, "ffmpeg_program", lambda: ("ffmpeg", "ffmpeg version 4", frozenset({"libx264"})))
    with pytest.raises(Unavailable, match="libvvenc"):
        evaluate(replace(settings, anchors=("vvc:fast",)))
