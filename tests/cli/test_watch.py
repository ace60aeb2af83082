"""`sightline watch` against a real cloud and its log: what it shows, hands on, writes, and where it goes on."""

import asyncio
import csv
import io
import json
import os
import sys
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pyarrow.parquet
import pytest
import typer
from pycocotools.coco import COCO
from rich.console import Console

from cli.watch.actions import Exec, Webhook
from cli.watch.command import Run, read_start
from cli.watch.export import Export, check_path
from cli.watch.show import LiveTable, Silent
from shared.clients import Cursor, CursorFile, DetectionClient, DetectionEvent, EventFilter, Progress, Start
from shared.codec.types import Bitstream
from shared.errors import InvalidInput, SightlineError, Unavailable
from tests.cli.conftest import Sightline
from tests.cloud.conftest import StartCloud, red, spot, start_cloud
from tests.cloud.harness import RunningCloud

__all__ = ["red", "spot", "start_cloud"]


async def filled(start_cloud: StartCloud, spot: Bitstream, red: Bitstream) -> RunningCloud:
    """A log of three events: found, found, rejected."""
    cloud = await start_cloud()
    async with cloud.edge() as edge:
        await edge.deliver("door", 1, spot)
        await edge.deliver("yard", 1, spot)
        await edge.deliver("yard", 2, red)
    return cloud


def address(cloud: RunningCloud) -> str:
    return f"127.0.0.1:{cloud.server.port}"


async def all_events(cloud: RunningCloud) -> list[DetectionEvent]:
    def read() -> list[DetectionEvent]:
        found = []
        with DetectionClient(address(cloud)) as client:
            for update in client.updates(Start.BEGINNING):
                if isinstance(update, Progress):
                    return found
                found.append(update)
        return found

    return await asyncio.to_thread(read)


async def command(*arguments: object) -> tuple[int, str, str]:
    """The command in a process of its own, which is where its signals work."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "cli.main", "watch", *map(str, arguments)),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    out, err = await process.communicate()
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


async def test_json_lines_go_on_from_the_cursor_file(
    start_cloud: StartCloud, spot: Bitstream, red: Bitstream, tmp_path: Path
) -> None:
    cloud = await filled(start_cloud, spot, red)
    place = tmp_path / "place"
    flags = ("--cloud", address(cloud), "--from", "beginning", "--once", "--cursor", place)
    code, out, err = await command(*flags)
    assert (code, err) == (0, "")
    first, second, third = map(json.loads, out.splitlines())
    assert (first["camera"], second["camera"], third["outcome"]) == ("door", "yard", "rejected")
    [kite] = first["results"][0]["detections"]
    assert (kite["label"], kite["category_id"], kite["score"]) == ("kite", 38, 0.75)
    assert kite["mask"]["size"] == [64, 64]
    assert place.read_text() == f"{cloud.log.log_id}:3\n"
    async with cloud.edge("other") as edge:
        await edge.deliver("yard", 3, spot)
        await edge.deliver("door", 2, spot)
    code, out, err = await command(*flags, "--camera", "door", "--class", "38", "--min-score", "0.7")
    assert (code, err) == (0, "")
    assert [json.loads(line)["frame"].split("/")[::2] for line in out.splitlines()] == [["door", "2"]]
    assert place.read_text() == f"{cloud.log.log_id}:5\n"


async def follow(cloud: RunningCloud, *actions: object, **changes: object) -> Run:
    """A run over the whole log, in a thread."""

    def run() -> Run:
        with DetectionClient(address(cloud)) as client:
            options = {"once": True, "limit": None, "keep_going": False} | changes
            file = options.pop("file", None)
            one = Run(client, Start.BEGINNING, EventFilter(), file, list(actions), **options)  # type: ignore[arg-type]
            one.follow(Silent(), None)
            return one

    return await asyncio.to_thread(run)


async def test_a_program_gets_each_event_and_one_that_fails_keeps_the_cursor_before_it(
    start_cloud: StartCloud, spot: Bitstream, red: Bitstream, tmp_path: Path
) -> None:
    cloud = await filled(start_cloud, spot, red)
    file = CursorFile(tmp_path / "place")
    note = f"cat >> {tmp_path}/told; echo $SIGHTLINE_CAMERA $SIGHTLINE_LABELS >> {tmp_path}/facts"
    fussy = Exec(f"sh -c '{note}; test $SIGHTLINE_OUTCOME != rejected'", 0.5)
    with pytest.raises(SightlineError, match=r"ended with 1 on frame yard/fedcba9876543210/2"):
        await follow(cloud, fussy, file=file)
    assert (tmp_path / "facts").read_text().splitlines() == ["door kite", "yard kite", "yard"]
    assert file.load() == Cursor(cloud.log.log_id, 2)
    run = await follow(cloud, fussy, file=file, keep_going=True)
    assert (run.count, run.failed) == (1, 1)
    assert file.load() == Cursor(cloud.log.log_id, 3)
    with pytest.raises(SightlineError, match="cannot run 'no-such-program'"):
        await follow(cloud, Exec("no-such-program --now", 0.5))
    assert (await follow(cloud, limit=2)).count == 2


class Receiver:
    """An HTTP server that answers with `codes` in turn, then 200."""

    def __init__(self, codes: list[int]) -> None:
        self.bodies: list[dict[str, object]] = []
        self.keys: list[str | None] = []
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                receiver.bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                receiver.keys.append(self.headers["Idempotency-Key"])
                self.send_response(codes.pop(0) if codes else 200)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/hook"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def receivers() -> Iterator[list[Receiver]]:
    made: list[Receiver] = []
    yield made
    for one in made:
        one.server.shutdown()
        one.server.server_close()


async def test_a_webhook_gets_each_event_once_it_answers_well(
    start_cloud: StartCloud, spot: Bitstream, red: Bitstream, receivers: list[Receiver]
) -> None:
    cloud = await filled(start_cloud, spot, red)
    busy, refusing = Receiver([503, 429]), Receiver([400])
    receivers += [busy, refusing]
    assert (await follow(cloud, Webhook(busy.url))).count == 3
    assert [body["camera"] for body in busy.bodies] == ["door", "door", "door", "yard", "yard"]
    assert busy.keys[:3] == [f"{cloud.log.log_id}:1"] * 3
    with pytest.raises(InvalidInput, match="answered 400"):
        await follow(cloud, Webhook(refusing.url))
    assert len(refusing.bodies) == 1
    with pytest.raises(Unavailable, match="cannot be reached"):
        await follow(cloud, Webhook("http://127.0.0.1:1/", give_up_s=0.2))


async def test_the_three_file_formats_hold_the_same_detections(
    start_cloud: StartCloud, spot: Bitstream, red: Bitstream, tmp_path: Path
) -> None:
    cloud = await filled(start_cloud, spot, red)
    events = await all_events(cloud)
    for name in ("found.json", "found.csv", "found.parquet"):
        with Export(tmp_path / name) as export:
            for event in events:
                export.add(event)
    coco = COCO(tmp_path / "found.json")
    assert coco.getImgIds() == [1, 2]
    [annotation] = coco.imgToAnns[2]
    mask = coco.annToMask(annotation)
    x, y, width, height = annotation["bbox"]
    assert mask.sum() == annotation["area"]
    assert mask[int(y) : round(y + height), int(x) : round(x + width)].sum() == mask.sum()
    assert coco.cats == {38: {"id": 38, "name": "kite"}}
    with (tmp_path / "found.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["camera"], row["label"], row["outcome"]) for row in rows] == [
        ("door", "kite", "detections"),
        ("yard", "kite", "detections"),
        ("yard", "", "rejected"),
    ]
    table = pyarrow.parquet.read_table(tmp_path / "found.parquet").to_pylist()
    assert [row["label"] for row in table] == ["kite", "kite", None]
    assert table[1]["captured"] == datetime(2023, 11, 14, 22, 13, 20, tzinfo=UTC)
    assert [float(row["x_max"]) for row in rows[:2]] == pytest.approx([row["x_max"] for row in table[:2]])
    assert x + width == pytest.approx(table[1]["x_max"], abs=0.01)


@pytest.mark.parametrize("name", ["a.json", "a.csv", "a.parquet"])
def test_an_export_that_breaks_off_leaves_nothing_and_an_empty_one_is_whole(name: str, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), Export(tmp_path / name):
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with Export(tmp_path / name):
        pass
    assert [path.name for path in tmp_path.iterdir()] == [name]
    if name == "a.json":
        assert json.loads((tmp_path / name).read_text()) == {"images": [], "annotations": [], "categories": []}


async def test_a_cursor_passes_an_exported_event_only_with_a_whole_file(
    start_cloud: StartCloud, spot: Bitstream, red: Bitstream, tmp_path: Path
) -> None:
    cloud = await filled(start_cloud, spot, red)
    place, csv_file = tmp_path / "place", tmp_path / "found.csv"
    flags = ("--cloud", address(cloud), "--from", "beginning", "--once", "--cursor", place, "--export", csv_file)
    code, _, err = await command(*flags, "--exec", "false")
    assert code == 1
    assert "ended with 1" in err
    assert not place.exists()
    assert not csv_file.exists()
    code, out, err = await command(*flags)
    assert (code, out, err) == (0, "", "")
    assert len(csv_file.read_text().splitlines()) == 4
    assert place.read_text() == f"{cloud.log.log_id}:3\n"


async def test_the_table_shows_what_was_found_and_how_frames_ended(
    start_cloud: StartCloud, spot: Bitstream, red: Bitstream
) -> None:
    cloud = await filled(start_cloud, spot, red)
    events = await all_events(cloud)

    def shown(min_score: float) -> str:
        table = LiveTable(min_score)
        for event in events:
            table.add(event)
        console = Console(width=160, record=True, file=io.StringIO())
        console.print(table.table())
        return console.export_text()

    assert "3 events: yard 2, door 1" in shown(0.5)
    assert shown(0.5).count("kite") == 2
    assert "rejected: " in shown(0.5)
    assert "kite" not in shown(0.8)


def test_where_to_start_is_read_as_people_write_it() -> None:
    assert read_start("beginning") is Start.BEGINNING
    assert read_start("end") is Start.END
    assert read_start("2026-01-31T14:00:00+02:00") == datetime(2026, 1, 31, 12, tzinfo=UTC)
    assert isinstance(local := read_start("2026-01-31"), datetime)
    assert local.tzinfo is not None
    assert isinstance(age := read_start("90m"), datetime)
    assert datetime.now(UTC) - age == pytest.approx(timedelta(minutes=90), abs=timedelta(seconds=5))
    assert read_start("abc:12") == Cursor("abc", 12)
    with pytest.raises(typer.BadParameter, match="got 'soon'"):
        read_start("soon")


def test_what_cannot_work_is_refused_before_anything_is_done(tmp_path: Path, sightline: Sightline) -> None:
    (tmp_path / "there.csv").touch()
    for path, said in [("there.csv", "exists"), ("a.xlsx", "expected a file ending"), ("no/a.csv", "does not exist")]:
        with pytest.raises(typer.BadParameter, match=said):
            check_path(tmp_path / path)
    assert sightline("watch", "--webhook", "ftp://x").code == 2
    assert sightline("watch", "--exec", "a 'b").code == 2
    assert sightline("watch", "--cloud", "10.0.0.1:1").code == 2
