"""The short form of `bench.chaos`: one kill of every kind of part, real processes, nothing lost and nothing doubled."""

from pathlib import Path

from rich.progress import Progress

from bench.chaos import KINDS, WRONGS, Ledger, run, table
from bench.chaos_house import Books


async def test_kill_9_of_any_part_loses_no_spooled_frame_and_doubles_none(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    shape = {"edges": 1, "cameras": 2, "consumers": 1, "pause_s": 0.1}
    wrong = await run(ledger, tmp_path, kills=5, minutes=5, shape=shape, progress=Progress(disable=True))
    assert wrong is None
    assert {line["kind"] for line in ledger.lines} == set(KINDS)
    assert sum(line["frames"] for line in ledger.lines) >= 12, "too few frames for the test to mean anything"
    assert not any(line[column] for line in ledger.lines for column in WRONGS)
    assert Ledger(tmp_path / "ledger.jsonl").lines == ledger.lines


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
