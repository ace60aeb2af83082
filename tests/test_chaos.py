"""The short form of `bench.chaos`: one kill of every kind of part, real processes, nothing lost and nothing doubled."""

import asyncio
from pathlib import Path
from typing import Any

import grpc
from rich.progress import Progress
from sightline.v1 import common_pb2, edge_pb2, edge_pb2_grpc

from bench.chaos import KINDS, WRONGS, Ledger, run, table
from bench.chaos_house import Books, Part
from bench.chaos_parts import camera


async def test_kill_9_of_any_part_loses_no_spooled_frame_and_doubles_none(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    shape = {"edges": 1, "cameras": 2, "consumers": 1, "pause_s": 0.1}
    wrong = await run(ledger, tmp_path, kills=5, minutes=5, shape=shape, progress=Progress(disable=True))
    assert wrong is None
    assert {line["kind"] for line in ledger.lines} == set(KINDS)
    assert sum(line["frames"] for line in ledger.lines) >= 12, "too few frames for the test to mean anything"
    assert not any(line[column] for line in ledger.lines for column in WRONGS)
    assert Ledger(tmp_path / "ledger.jsonl").lines == ledger.lines


class Doorman(edge_pb2_grpc.EdgeServiceServicer):
    """Gives every frame the name of its token."""

    async def Compress(self, request: edge_pb2.CompressRequest, context: object) -> edge_pb2.CompressResponse:
        seq = int(request.idempotency_token.rsplit("-", 1)[1])
        frame = common_pb2.FrameName(camera_id=request.camera_id, epoch=1, seq=seq)
        return edge_pb2.CompressResponse(receipt=edge_pb2.Receipt(frame=frame))


async def test_a_camera_that_comes_back_asks_for_what_it_may_have_sent_before_it_rests(tmp_path: Path) -> None:
    server = grpc.aio.server()
    edge_pb2_grpc.add_EdgeServiceServicer_to_server(Doorman(), server)
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    for again, expected in ((False, ["rests"]), (True, ["receipt", "rests"])):
        said: list[dict[str, Any]] = []
        rests = asyncio.Event()

        def on_line(facts: dict[str, Any], said: list[dict[str, Any]] = said, rests: asyncio.Event = rests) -> None:
            said.append(facts)
            if "rests" in facts:
                rests.set()

        arguments = (address, "door", 7, again, "rest 1", 0.0)
        part = Part("camera", "door", tmp_path, camera, lambda arguments=arguments: arguments, on_line)
        living = asyncio.create_task(part.live())
        async with asyncio.timeout(60):
            await rests.wait()
        part.kill()
        living.cancel()
        await asyncio.gather(living, return_exceptions=True)
        assert [next(iter(facts)) for facts in said] == expected
    assert said[0]["receipt"] == ["door", 1, 7]
    await server.stop(0)


async def test_the_books_find_each_kind_of_fault() -> None:
    a, b, c = (("door", 1, seq) for seq in (1, 2, 3))
    books = Books(receipts={a: 1, b: 2}, records={a: 1, c: 2}, doubled=[a], not_detections=[c], shown={"one": {a}})
    books.out_of_order.append(a)
    found = books.check()
    assert (found.lost, found.strangers, found.missed) == ({b}, {c}, {c})
    assert (found.doubled, found.not_detections, found.out_of_order) == ({a}, {c}, {a})
    assert not found.nothing
    assert Books(receipts={a: 1}, records={a: 1}, shown={"one": {a}}).check().nothing


def test_a_run_is_gone_on_with_after_the_kills_that_were_written(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(path)
    zeros = dict.fromkeys(WRONGS, 0)
    ledger.append([{"round": 7, "kind": kind, "how": "random", "frames": 2, **zeros} for kind in ("edge", "cloud")])
    with path.open("a") as out:
        out.write('{"round": 8, "ki')  # the process ended in the middle of a line
    again = Ledger(path)
    assert (len(again.lines), again.next_round) == (2, 8)
    again.append([{"round": 8, "kind": "edge", "how": "random", "frames": 1, **zeros}])
    assert Ledger(path).lines == again.lines
    assert table(again, "kind").row_count == 3
