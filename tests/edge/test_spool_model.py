"""Whatever is done to a spool file in whatever order, it holds what a plain Python model of it holds."""

import hashlib
import random
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

from edge.spool_file import Limits, SpoolFile, Tally
from edge.spool_rows import Draft, Entry, Final, FrameName, Outcome
from shared.codec.types import Bitstream
from shared.errors import TokenConflict

SECOND_US = 1_000_000
LIMITS = Limits(
    max_bytes=1 << 30,
    max_age_us=100 * SECOND_US,
    drop_oldest=False,
    token_keep_us=300 * SECOND_US,
    max_tokens=10_000,
    quarantine_frames=1000,
    quarantine_bytes=1 << 30,
    max_cameras=1000,
)
CAMERAS = st.sampled_from(["a", "b", "c"])


@dataclass
class Known:
    """What the model knows of a token."""

    content: int
    id: int
    created_us: int
    outcome: Outcome


class SpoolModel(RuleBasedStateMachine):
    """Each rule is one transaction, committed or rolled back; `reopen` is a new life of the process."""

    ids = Bundle("ids")

    @initialize()
    def begin(self) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.now_us = 1_800_000_000 * SECOND_US
        self.frames: dict[int, Entry] = {}
        self.tokens: dict[tuple[str, str], Known] = {}
        self.names: set[FrameName] = set()
        self.quarantined = 0
        self.file: SpoolFile | None = None
        self.reopen()

    def teardown(self) -> None:
        if hasattr(self, "file") and self.file is not None:
            self.file.close()
            self.folder.cleanup()

    def draft(self, camera: str, number: int, token: str, expires_in_s: int) -> Draft:
        noise = random.Random(number).randbytes(number * 7 % 9000 + 1)
        return Draft(
            camera_id=camera,
            captured_us=self.now_us,
            expires_us=self.now_us + expires_in_s * SECOND_US if expires_in_s else 0,
            token=token,
            content=hashlib.sha256(noise).digest(),
            bitstream=Bitstream("ab" * 32, 256 + number % 1792, 1 + number % 8192, 9, noise[:9], noise[9:], number),
        )

    @rule()
    def reopen(self) -> None:
        if self.file is not None:
            self.file.close()
        self.file = SpoolFile(Path(self.folder.name) / "spool.sqlite", LIMITS, Tally())

    @rule(
        target=ids,
        camera=CAMERAS,
        number=st.integers(0, 2**32 - 1),
        token=st.sampled_from(["", "", "t1", "t2"]),
        content=st.integers(0, 3),
        expires_in_s=st.sampled_from([0, 0, 5, 50]),
    )
    def put(self, camera: str, number: int, token: str, content: int, expires_in_s: int) -> object:
        assert self.file is not None
        number = content if token else number
        draft = self.draft(camera, number, token, expires_in_s)
        known = self.tokens.get((camera, token)) if token else None
        if known and known.created_us < self.now_us - LIMITS.token_keep_us:
            known = None
        if known and known.content != number:
            with self.file.transaction(), pytest.raises(TokenConflict):
                self.file.put(draft, self.now_us)
            return multiple()
        with self.file.transaction():
            placed = self.file.put(draft, self.now_us)
        if known:
            assert (placed.duplicate, placed.id, placed.outcome) == (True, known.id, known.outcome)
            return multiple()
        assert not placed.duplicate
        assert placed.name not in self.names
        self.names.add(placed.name)
        if token:
            self.tokens[camera, token] = Known(number, placed.id, self.now_us, Outcome.NONE)
        self.frames[placed.id] = Entry(
            placed.id,
            placed.name,
            draft.captured_us,
            self.now_us,
            draft.expires_us,
            token,
            draft.bitstream,
            Outcome.NONE,
            "",
        )
        return placed.id

    @rule(camera=CAMERAS, number=st.integers(0, 1000))
    def put_and_lose_the_transaction(self, camera: str, number: int) -> None:
        assert self.file is not None
        lost = None
        try:
            with self.file.transaction():
                lost = self.file.put(self.draft(camera, number, "", 0), self.now_us)
                raise ZeroDivisionError
        except ZeroDivisionError:
            pass
        assert lost is not None
        self.names.add(lost.name)  # such a name is never given again

    @rule(frame_id=consumes(ids), outcome=st.sampled_from([Outcome.DETECTIONS, Outcome.REJECTED, Outcome.EXPIRED]))
    def finish(self, frame_id: int, outcome: Outcome) -> None:
        assert self.file is not None
        with self.file.transaction():
            self.file.finish(Final(frame_id, outcome, "why"), self.now_us)
            self.file.finish(Final(frame_id, Outcome.DETECTIONS, "twice"), self.now_us)
        entry = self.frames.pop(frame_id)
        if outcome is Outcome.REJECTED and entry.bitstream is not None:
            self.quarantined += 1
        for known in self.tokens.values():
            if known.id == frame_id:
                known.outcome = outcome

    @rule(seconds=st.integers(1, 60))
    def wait(self, seconds: int) -> None:
        assert self.file is not None
        self.now_us += seconds * SECOND_US
        with self.file.transaction():
            self.file.sweep(self.now_us)
        for frame_id, entry in self.frames.items():
            too_old = entry.spooled_us + LIMITS.max_age_us <= self.now_us or 0 < entry.expires_us <= self.now_us
            if entry.bitstream and too_old:
                self.end(frame_id)
        kept = self.now_us - LIMITS.token_keep_us
        self.tokens = {key: known for key, known in self.tokens.items() if known.created_us >= kept}

    @rule(after=st.integers(0, 40), count=st.integers(1, 20), size=st.integers(1, 40_000))
    def take(self, after: int, count: int, size: int) -> None:
        assert self.file is not None
        with self.file.transaction():
            taken = self.file.take(after, frames=count, max_bytes=size, without_models=[], now_us=self.now_us)
        for frame_id in sorted(self.frames):
            entry = self.frames[frame_id]
            if frame_id in {each.id for each in taken} and entry.bitstream and 0 < entry.expires_us <= self.now_us:
                self.end(frame_id)
        expected = [self.frames[frame_id] for frame_id in sorted(self.frames) if frame_id > after]
        assert [replace(each, reason="") for each in taken] == expected[: len(taken)]
        assert len(taken) >= min(1, len(expected))

    def end(self, frame_id: int) -> None:
        self.frames[frame_id] = replace(self.frames[frame_id], bitstream=None, outcome=Outcome.EXPIRED)

    @invariant()
    def counts_agree(self) -> None:
        if getattr(self, "file", None) is None:
            return
        assert self.file is not None
        assert self.file.frames == len(self.frames)
        oldest = min(self.frames.items(), default=None)
        assert self.file.oldest_us() == (oldest[1].spooled_us if oldest else None)
        (rows,) = self.file._db.execute("SELECT count(*) FROM payload").fetchone()
        assert rows == sum(entry.bitstream is not None for entry in self.frames.values())
        assert self.file._db.execute("SELECT count(*) FROM quarantine").fetchone() == (self.quarantined,)


SpoolModel.TestCase.settings = settings(
    max_examples=40, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
)
TestSpoolModel = SpoolModel.TestCase
