"""The suite's structure: what a report must hold, that it survives its JSON, and what the page shows. Never a time."""

import asyncio
import json
from pathlib import Path

import pytest

from bench import encoders, suite
from bench.page import write_page
from bench.pictures import SMALL, VGA, picture
from bench.report import Plot, Report, cells
from bench.shaper import BURST_S, Shaper
from bench.timing import Sample, in_turns, sample


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of documents after a quick pass of one benchmark, in a process of its own."""
    folder = tmp_path_factory.mktemp("docs")
    assert not suite.measure_all(["entropy"], folder / "benchmarks", short=True)
    return folder


def test_a_benchmark_in_its_short_form_tells_peers_targets_machine_and_versions(kept: Path) -> None:
    report = Report.from_json((kept / "benchmarks" / "entropy.json").read_text())
    rows = {figure.what: figure for figure in report.figures}
    for name in ("encode, natural", "decode, uniform"):
        row = rows[name]
        assert row.peer == "compressai"
        assert row.peer_value is not None
        assert row.ratio == pytest.approx(row.peer_value / row.value)
        assert row.low <= row.value <= row.high  # type: ignore[operator]
        assert row.target == "<= 4 ns, >= 20 x"
        assert row.met == (row.value <= 4 and row.ratio >= 20)
    assert rows["above the entropy, natural"].value > 0  # fewer bits than the entropy would be an error of the bench
    assert report.settings["short"] is True
    assert report.machine["cores"] >= 1
    assert {"torch", "numba", "compressai", "constriction"} <= report.versions.keys()
    assert report.peak_bytes > 1 << 20
    assert Report.from_json(report.to_json()) == report


def test_the_page_shows_every_report_with_its_plots(kept: Path) -> None:
    entropy = Report.from_json((kept / "benchmarks" / "entropy.json").read_text())
    grown = Report("growth", "with a plot", {}, plots=[Plot("cost", "x", "y", {"a": [(1, 2), (3, 4)]}, log=True)])
    page = write_page([entropy, grown], kept).read_text()
    assert "| entropy | encode, natural |" in page
    assert "## growth: with a plot" in page
    assert (kept / "benchmarks" / "growth-0.png").stat().st_size > 1000
    for line in (line for line in page.splitlines() if line.startswith("|")):
        assert line.count("|") in (8, 9), line


def test_one_that_fails_is_told_and_the_others_are_kept(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert suite.measure_all(["nothing-like-it"], tmp_path, short=True) == ["nothing-like-it"]
    assert "No module named" in capfd.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_ratio_above_one_is_better_whichever_way_the_unit_goes() -> None:
    report = Report("r", "", {})
    report.add("time", 2.0, "ms", peer=("p", 8.0), ratio_at_least=5)
    report.add("rate", Sample(10, 9, 11), "frames/s", peer=("p", 5.0), more_is_better=True, at_least=10)
    report.add("share", 14.0, "%")
    time, rate, share = report.figures
    assert (time.ratio, time.met) == (4.0, False)
    assert (rate.ratio, rate.met, rate.low, rate.high) == (2.0, True, 9, 11)
    assert (share.ratio, share.met, cells(share)[-1]) == (None, None, "")


def test_quartiles_and_turns() -> None:
    assert sample([1, 2, 3, 4, 5]) == Sample(3, 2, 4)
    assert sample([1, 2, 3, 4, 5]).of(lambda x: 60 / x) == Sample(20, 15, 30)
    calls: list[str] = []
    in_turns({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 2)
    assert calls == ["a", "b"] * 3


def test_pictures_have_the_size_asked_for_and_are_no_enlargements() -> None:
    for size in (SMALL, VGA, (1080, 1920), (64, 64)):
        rgb = picture(size)
        assert rgb.shape == (*size, 3)
        assert rgb.std() > 10


def test_points_of_equal_accuracy_are_the_cheapest_that_reach_it(tmp_path: Path) -> None:
    rows = [
        ("vvc-medium", "47@50", 0.025, 0.12),
        ("vvc-medium", "42@50", 0.05, 0.2),
        ("vvc-medium", "32@100", 0.3, 0.3),
    ]
    rows += [("sightline-detection", "q1", 0.05, 0.11), ("sightline-detection", "q3", 0.2, 0.21)]
    rows += [("sightline-detection", "q8", 1.5, 0.4)]
    file = tmp_path / "results.csv"
    file.write_text("".join(f"net,witness,{s},{at},box mAP,{bpp},{bpp},{ap},0,0,0,0\n" for s, at, bpp, ap in rows))
    assert encoders.equal_accuracy(file) == {1: "47@50", 3: "32@100"}
    assert encoders.equal_accuracy(tmp_path / "none.csv") == {}


async def test_a_shaped_link_carries_every_byte_and_no_faster_than_its_rate() -> None:
    given, got = bytes(range(256)) * 100, bytearray()
    done = asyncio.Event()

    async def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while len(got) < len(given):
            got.extend(await reader.read(1 << 16))
        writer.close()
        done.set()

    server = await asyncio.start_server(take, "127.0.0.1", 0)
    loop = asyncio.get_running_loop()
    async with server, Shaper(server.sockets[0].getsockname()[1], 1e6) as link:
        start = loop.time()
        _, writer = await asyncio.open_connection("127.0.0.1", link.port)
        writer.write(given)
        await done.wait()
        writer.close()
        assert loop.time() - start >= 8 * (len(given) - 4096) / 1e6 - BURST_S
    assert bytes(got) == given
    assert link.passed_bytes == len(given)


def test_reports_that_are_published_belong_to_the_suite_and_are_whole() -> None:
    for file in (suite.DOCS / "benchmarks").glob("*.json"):
        report = Report.from_json(file.read_text())
        assert report.name in suite.NAMES
        assert report.figures
        assert report.settings["short"] is False, f"{file.name} is of a quick pass"
        assert json.loads(file.read_text())["machine"]["processor"]
