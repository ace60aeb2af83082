"""Whatever is done to a detection log in whatever order, it holds what a plain Python model of it holds."""

import asyncio
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from cloud.detections.log import Appended, FrameName, Record, Retention
from cloud.detections.sqlite import SqliteLog
from shared.errors import CursorExpired

SECOND_NS = 1_000_000_000
RETENTION = Retention(max_age_s=100, max_bytes=600, key_age_s=300)
NAMES = st.builds(FrameName, st.sampled_from(["a", "b"]), st.sampled_from([0, 7, (1 << 64) - 1]), st.integers(0, 6))


class LogModel(RuleBasedStateMachine):
    """Each rule is one call; `restart` is a new life of the process. The clock moves as told, back too."""

    @initialize()
    def begin(self) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.runner = asyncio.Runner()
        self.clock_ns = 1_800_000_000 * SECOND_NS
        self.last_ns = 0  # the log's own time, which never runs back
        self.next = 1
        self.records: list[Record] = []
        self.keys: dict[FrameName, Record] = {}
        self.log: SqliteLog | None = None
        self.restart()
        self.log_id = self.open_log.log_id

    @property
    def open_log(self) -> SqliteLog:
        assert self.log is not None
        return self.log

    def teardown(self) -> None:
        if getattr(self, "log", None) is not None:
            self.runner.run(self.open_log.close())
            self.runner.close()
            self.folder.cleanup()

    @rule()
    def restart(self) -> None:
        async def again() -> SqliteLog:
            if self.log is not None:
                await self.log.close()
            return await SqliteLog.open(Path(self.folder.name) / "log.sqlite", RETENTION, lambda: self.clock_ns)

        self.log = self.runner.run(again())
        self.last_ns = self.last_ns or self.clock_ns  # a log's time begins when it is made

    @rule(seconds=st.integers(-120, 200))
    def wait(self, seconds: int) -> None:
        self.clock_ns += seconds * SECOND_NS

    @rule(name=NAMES, size=st.integers(1, 200))
    def append(self, name: FrameName, size: int) -> None:
        answer = self.runner.run(self.open_log.append(name, bytes(size)))
        self.last_ns = max(self.clock_ns, self.last_ns)
        known = self.keys.get(name)
        assert answer == Appended(known.sequence if known else self.next, new=known is None)
        if known is None:
            self.keys[name] = Record(self.next, self.last_ns, name, bytes(size))
            self.records.append(self.keys[name])
            self.next += 1
        self.prune()

    def prune(self) -> None:
        oldest = self.last_ns - int(RETENTION.max_age_s * SECOND_NS)
        while self.records and (
            self.records[0].logged_ns < oldest or sum(len(r.event) for r in self.records) > RETENTION.max_bytes
        ):
            self.records.pop(0)
        oldest_key = self.last_ns - int(RETENTION.key_age_s * SECOND_NS)
        kept = {record.sequence for record in self.records}
        self.keys = {
            name: record
            for name, record in self.keys.items()
            if record.sequence in kept or record.logged_ns >= oldest_key
        }

    @rule(name=NAMES)
    def find(self, name: FrameName) -> None:
        known = self.keys.get(name)
        assert self.runner.run(self.open_log.find(name)) == (known.sequence if known else None)

    @rule(after=st.integers(0, 40), limit=st.integers(1, 10))
    def read(self, after: int, limit: int) -> None:
        removed_through = self.next - 1 - len(self.records)
        if after < removed_through:
            with pytest.raises(CursorExpired, match=str(removed_through + 1)):
                self.runner.run(self.open_log.read(after, limit))
            return
        expected = [record for record in self.records if record.sequence > after][:limit]
        found = self.runner.run(self.open_log.read(after, limit))
        assert found == expected[: len(found)]
        assert len(found) >= min(1, len(expected))

    @rule(seconds=st.integers(-300, 300))
    def position_at(self, seconds: int) -> None:
        moment = self.clock_ns + seconds * SECOND_NS
        position = self.runner.run(self.open_log.position_at(moment))
        assert [r for r in self.records if r.sequence > position] == [r for r in self.records if r.logged_ns >= moment]

    @invariant()
    def span_agrees(self) -> None:
        if getattr(self, "log", None) is None:
            return
        span = self.runner.run(self.open_log.span())
        assert (span.oldest, span.newest) == (self.next - len(self.records), self.next - 1)
        assert self.open_log.log_id == getattr(self, "log_id", self.open_log.log_id)


LogModel.TestCase.settings = settings(
    max_examples=25, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
)
TestLogModel = LogModel.TestCase
