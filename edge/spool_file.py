"""The spool's SQLite file: its tables, its bounds, and each operation on it as plain SQL.

Used by one thread only, the writer of `edge.spool`, where the rules are written down. Everything here runs inside a
transaction that the caller opens and commits; nothing here counts as done before that COMMIT has returned.

    frame       one row for each spooled frame that has no final acknowledgement; `outcome` 0: to be sent, else only
                its end (EXPIRED, DROPPED, REJECTED) is to be told
    payload     hyper and latents of frames that are to be sent, under the same id
    token       what an idempotency token was used for; outlives frame and payload
    quarantine  frames that the cloud rejected or that the disk damaged, bounded, for people
"""

import secrets
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from edge import spool_quarantine as quarantine
from edge.spool_rows import (
    COLUMNS,
    Draft,
    Entry,
    Final,
    FrameName,
    Outcome,
    Placed,
    from_row,
    row_crc,
    signed,
    unsigned,
)
from shared.codec.types import Bitstream
from shared.errors import InvalidSettings, Overloaded, TokenConflict
from shared.quarantine import Quarantined

APPLICATION_ID = 0x534C5350  # "SLSP"
FORMAT = 1
_STEP_PAGES = 256  # of 4 KiB, given back to the disk in one transaction
_TIGHT_STEPS = 16  # at once, where the disk is full
_SLACK_PAGES = 1024  # empty pages that are kept for the next frames, where it is not
WAL_ROOM_BYTES = 8 << 20  # what the WAL may need beside one transaction before it is checkpointed

_SCHEMA = """
CREATE TABLE frame (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    camera_id TEXT NOT NULL, epoch INTEGER NOT NULL, seq INTEGER NOT NULL,
    captured_us INTEGER NOT NULL, spooled_us INTEGER NOT NULL, expires_us INTEGER NOT NULL,
    token TEXT NOT NULL, model_id TEXT NOT NULL,
    quality INTEGER NOT NULL, width INTEGER NOT NULL, height INTEGER NOT NULL, symbols_crc INTEGER NOT NULL,
    row_crc INTEGER NOT NULL,
    outcome INTEGER NOT NULL DEFAULT 0, reason TEXT NOT NULL DEFAULT ''
) STRICT;
CREATE TABLE payload (id INTEGER PRIMARY KEY, hyper BLOB NOT NULL, latents BLOB NOT NULL) STRICT;
CREATE TABLE token (
    camera_id TEXT NOT NULL, token TEXT NOT NULL, content BLOB NOT NULL, created_us INTEGER NOT NULL,
    frame_id INTEGER NOT NULL, epoch INTEGER NOT NULL, seq INTEGER NOT NULL,
    outcome INTEGER NOT NULL DEFAULT 0, reason TEXT NOT NULL DEFAULT '',
    PRIMARY KEY (camera_id, token)
) STRICT, WITHOUT ROWID;
CREATE INDEX token_by_age ON token (created_us);
CREATE TABLE quarantine (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    camera_id TEXT NOT NULL, epoch INTEGER NOT NULL, seq INTEGER NOT NULL,
    captured_us INTEGER NOT NULL, quarantined_us INTEGER NOT NULL, reason TEXT NOT NULL, model_id TEXT NOT NULL,
    quality INTEGER NOT NULL, width INTEGER NOT NULL, height INTEGER NOT NULL, symbols_crc INTEGER NOT NULL,
    hyper BLOB NOT NULL, latents BLOB NOT NULL
) STRICT;
"""
# Beside the format: files made before it was kept get it when they are opened.
_BY_DEADLINE = "CREATE INDEX IF NOT EXISTS frame_by_deadline ON frame (expires_us) WHERE expires_us > 0 AND outcome = 0"


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of the file; `drop_oldest` makes room by giving up the oldest frames instead of refusing new ones."""

    max_bytes: int
    max_age_us: int
    drop_oldest: bool
    token_keep_us: int
    max_tokens: int
    quarantine_frames: int
    quarantine_bytes: int
    max_cameras: int


@dataclass(slots=True)
class Tally:
    """What happened since the edge started, for metrics; an attempt that was rolled back counts too."""

    put: int = 0
    dropped: int = 0
    expired: int = 0
    refused: int = 0
    damaged: int = 0


class SpoolFile:
    """One open file. Raises sqlite3.Error from every method, InvalidSettings from the constructor."""

    def __init__(self, path: Path, limits: Limits, tally: Tally) -> None:
        self._limits = limits
        self.tally = tally
        self._db = sqlite3.connect(path, timeout=1.0, isolation_level=None, check_same_thread=False)
        # A new epoch at each opening: names cannot meet those of an earlier life, whatever was lost of it.
        self.epoch = secrets.randbits(64)
        self._next_seq: dict[str, int] = {}
        try:
            self._prepare(path)
            self.recount()
        except BaseException:
            self._db.close()  # or its lock would keep out who comes to save what can be read
            raise

    def _prepare(self, path: Path) -> None:
        db = self._db
        db.text_factory = lambda text: text.decode(errors="replace")  # damaged text is for the row's CRC to find
        db.execute("PRAGMA locking_mode = EXCLUSIVE")
        (application_id,) = db.execute("PRAGMA application_id").fetchone()
        (tables,) = db.execute("SELECT count(*) FROM sqlite_schema").fetchone()
        if tables and application_id != APPLICATION_ID:
            raise InvalidSettings(f"setting data_dir: {path} is an SQLite file, but no spool")
        db.execute("PRAGMA auto_vacuum = INCREMENTAL")  # counts only before the first table
        (mode,) = db.execute("PRAGMA journal_mode = WAL").fetchone()
        if mode != "wal":
            raise InvalidSettings(
                f"setting data_dir: expected a file system that can do WAL, got mode {mode} at {path}"
            )
        db.execute("PRAGMA synchronous = FULL")
        db.execute(f"PRAGMA journal_size_limit = {WAL_ROOM_BYTES}")
        db.execute("PRAGMA cache_size = -8192")
        if not tables:
            with self.transaction():
                for statement in _SCHEMA.strip().split(";\n"):
                    db.execute(statement)
                db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
                db.execute(f"PRAGMA user_version = {FORMAT}")
        db.execute(_BY_DEADLINE)
        (version,) = db.execute("PRAGMA user_version").fetchone()
        if version != FORMAT:
            raise InvalidSettings(f"setting data_dir: expected spool format {FORMAT}, {path} has {version}")

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """COMMIT has returned, and with it fsync, when the block is left without an error."""
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            self.recount()
            raise

    def close(self) -> None:
        """Closes the file; SQLite folds the WAL into it."""
        self._db.close()

    @property
    def used_bytes(self) -> int:
        """Pages of the file that hold something."""
        (pages,) = self._db.execute("PRAGMA page_count").fetchone()
        (free,) = self._db.execute("PRAGMA freelist_count").fetchone()
        (size,) = self._db.execute("PRAGMA page_size").fetchone()
        return int((pages - free) * size)

    def recount(self) -> None:
        """Counts rows; in between, `frames` and the number of tokens are kept up to date by adding."""
        (self.frames,) = self._db.execute("SELECT count(*) FROM frame").fetchone()
        (self._tokens,) = self._db.execute("SELECT count(*) FROM token").fetchone()

    def oldest_us(self) -> int | None:
        """When the oldest frame was spooled, microseconds since 1970 UTC; None if there is none."""
        row = self._db.execute("SELECT spooled_us FROM frame ORDER BY id LIMIT 1").fetchone()
        return int(row[0]) if row else None

    # -- operations ----------------------------------------------------------------------------------------------

    def put(self, draft: Draft, now_us: int) -> Placed:
        """Gives a frame its name and keeps it. Raises TokenConflict, Overloaded."""
        if draft.token and (known := self._by_token(draft, now_us)):
            return known
        seq = self._next_seq.get(draft.camera_id, 1)
        if seq == 1 and len(self._next_seq) >= self._limits.max_cameras:
            raise Overloaded(
                f"expected at most {self._limits.max_cameras} cameras since the edge started, "
                f"{draft.camera_id!r} would be one more"
            )
        self._make_room(draft)
        # Never given twice, not even if this transaction fails: a COMMIT that failed may still be on the disk.
        self._next_seq[draft.camera_id] = seq + 1
        name = FrameName(draft.camera_id, self.epoch, seq)
        bits = draft.bitstream
        entry = Entry(0, name, draft.captured_us, now_us, draft.expires_us, draft.token, bits, Outcome.NONE, "")
        frame_id = self._insert(entry)
        self._db.execute("INSERT INTO payload VALUES (?,?,?)", (frame_id, bits.hyper, bits.latents))
        if draft.token:
            self._db.execute(
                "INSERT INTO token (camera_id, token, content, created_us, frame_id, epoch, seq) "
                "VALUES (?,?,?,?,?,?,?)",
                (draft.camera_id, draft.token, draft.content, now_us, frame_id, signed(name.epoch), seq),
            )
            self._tokens += 1
        self.frames += 1
        self.tally.put += 1
        return Placed(frame_id, name, False, Outcome.NONE, "")

    def take(
        self, after_id: int, *, frames: int, max_bytes: int, without_models: Sequence[str], now_us: int
    ) -> list[Entry]:
        """The next frames to send, in the order of spooling; at least one, if there is one, whatever its size.

        A frame that is past its time, or whose row is damaged, comes as what is to be told of it.
        """
        holes = ",".join("?" * len(without_models))
        rows = self._db.execute(
            f"SELECT {COLUMNS} FROM frame LEFT JOIN payload ON payload.id = frame.id "  # noqa: S608
            f"WHERE frame.id > ? AND (outcome != 0 OR model_id NOT IN ({holes})) ORDER BY frame.id LIMIT ?",
            (after_id, *without_models, frames),
        )
        entries: list[Entry] = []
        size = 0
        ends: list[tuple[Entry, Outcome, str]] = []
        for row in rows:
            entry, damage = from_row(row)
            if damage:
                ends.append((entry, Outcome.REJECTED, damage))
            elif entry.bitstream and 0 < entry.expires_us <= now_us:
                ends.append((entry, Outcome.EXPIRED, "older than it may be when its turn to be sent came"))
            else:
                size += len(entry.bitstream.hyper) + len(entry.bitstream.latents) if entry.bitstream else 0
                if entries and size > max_bytes:
                    break
                entries.append(entry)
        entries += [self._end(*end, now_us=now_us) for end in ends]
        return sorted(entries, key=lambda entry: entry.id)

    def holds_model(self, model_id: str) -> bool:
        """Whether a frame of this bundle is still to be sent."""
        query = "SELECT EXISTS (SELECT 1 FROM frame WHERE outcome = 0 AND model_id = ?)"
        return bool(self._db.execute(query, (model_id,)).fetchone()[0])

    def finish(self, final: Final, now_us: int) -> None:
        """Forgets a frame that has its final acknowledgement; a rejected one goes into quarantine."""
        row = self._db.execute(
            f"SELECT {COLUMNS} FROM frame LEFT JOIN payload ON payload.id = frame.id WHERE frame.id = ?",  # noqa: S608
            (final.id,),
        ).fetchone()
        if row is None:
            return  # acknowledged twice
        entry, _ = from_row(row)
        if final.outcome is Outcome.REJECTED:
            quarantine.put(self._db, entry, final.reason, now_us)
        if entry.token:
            self._db.execute(
                "UPDATE token SET outcome = ?, reason = ? WHERE camera_id = ? AND token = ? AND frame_id = ?",
                (final.outcome, final.reason, entry.name.camera_id, entry.token, final.id),
            )
        self._db.execute("DELETE FROM payload WHERE id = ?", (final.id,))
        self._db.execute("DELETE FROM frame WHERE id = ?", (final.id,))
        self.frames -= 1

    def sweep(self, now_us: int) -> None:
        """Enforces age: of frames (they become EXPIRED), of tokens, and the bound of the quarantine."""
        limits = self._limits
        rows = self._db.execute(
            f"SELECT {COLUMNS} FROM payload JOIN frame ON payload.id = frame.id ORDER BY payload.id LIMIT 256"  # noqa: S608
        ).fetchall()
        for row in rows:
            entry, _ = from_row(row)
            if entry.spooled_us + limits.max_age_us > now_us:
                break
            self._end(entry, Outcome.EXPIRED, "older than the spool keeps frames", now_us=now_us)
        # Whether or not there is a way to the cloud: what is too old to be sent must not keep newer frames out.
        rows = self._db.execute(
            f"SELECT {COLUMNS} FROM frame JOIN payload ON payload.id = frame.id "  # noqa: S608
            "WHERE expires_us > 0 AND outcome = 0 AND expires_us <= ? ORDER BY expires_us LIMIT 256",
            (now_us,),
        ).fetchall()
        for row in rows:
            entry, _ = from_row(row)
            self._end(entry, Outcome.EXPIRED, "older than it may be while it waited to be sent", now_us=now_us)
        old = self._db.execute("DELETE FROM token WHERE created_us < ?", (now_us - limits.token_keep_us,)).rowcount
        self._tokens -= old
        if self._tokens > limits.max_tokens:
            self._tokens -= self._db.execute(
                "DELETE FROM token WHERE (camera_id, token) IN "
                "(SELECT camera_id, token FROM token ORDER BY created_us LIMIT ?)",
                (self._tokens - limits.max_tokens,),
            ).rowcount
        quarantine.bound(self._db, limits.quarantine_frames, limits.quarantine_bytes)

    def shrink(self, *, tight: bool) -> None:
        """Gives empty pages back to the disk, some at a time. Outside a transaction.

        `tight`: the disk is full. Pages are then moved in steps that the WAL has room for, and each is folded in at
        once, since the file becomes shorter only by that.
        """
        for _ in range(_TIGHT_STEPS if tight else 1):
            if tight:
                self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
            (empty,) = self._db.execute("PRAGMA freelist_count").fetchone()
            if empty <= (0 if tight else _SLACK_PAGES):
                return
            # As a script: Python ends other statements that give no columns at their first step, which is one page.
            self._db.executescript(f"PRAGMA incremental_vacuum({_STEP_PAGES})")

    def quarantined(self, after_id: int, limit: int) -> list[Quarantined]:
        """Rejected frames that are kept, oldest first."""
        return quarantine.page(self._db, after_id, limit)

    def find_quarantined(self, name: FrameName) -> Quarantined | None:
        """A rejected frame by its name, None if it is not kept."""
        return quarantine.find(self._db, name)

    def replay(self, kept: Quarantined, now_us: int) -> None:
        """Takes a rejected frame back to be sent, under its new name; once, however often it is asked for."""
        name = FrameName(kept.camera_id, kept.epoch, kept.seq)
        if quarantine.find(self._db, name) is None:
            return
        quarantine.remove(self._db, kept.id)
        again = replace(name, epoch=kept.replay_epoch)
        self.restore(Entry(0, again, kept.captured_us, now_us, 0, "", kept.bitstream, Outcome.NONE, ""))
        self.frames += 1

    def restore(self, entry: Entry) -> None:
        """Takes over a frame that has its name: of another spool file (recovery), with its id, or out of quarantine."""
        frame_id = self._insert(entry)
        if entry.bitstream:
            self._db.execute(
                "INSERT INTO payload VALUES (?,?,?)", (frame_id, entry.bitstream.hyper, entry.bitstream.latents)
            )

    def restore_token(self, row: Sequence[object]) -> None:
        """Takes over a row of another spool file's token table (recovery)."""
        self._db.execute("INSERT OR IGNORE INTO token VALUES (?,?,?,?,?,?,?,?,?)", tuple(row))

    # -- inside --------------------------------------------------------------------------------------------------

    def _insert(self, entry: Entry) -> int:
        bits = entry.bitstream or Bitstream("", 0, 0, 0, b"", b"", 0)
        cursor = self._db.execute(
            "INSERT INTO frame VALUES (?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?)",
            (
                *(entry.id or None, entry.name.camera_id, signed(entry.name.epoch), entry.name.seq),
                *(entry.captured_us, entry.spooled_us, entry.expires_us, entry.token, bits.model_id),
                *(bits.quality, bits.width, bits.height, bits.symbols_crc, row_crc(entry)),
                *(entry.outcome, entry.reason),
            ),
        )
        return int(cursor.lastrowid or 0)

    def _by_token(self, draft: Draft, now_us: int) -> Placed | None:
        row = self._db.execute(
            "SELECT content, created_us, frame_id, epoch, seq, outcome, reason FROM token "
            "WHERE camera_id = ? AND token = ?",
            (draft.camera_id, draft.token),
        ).fetchone()
        if row is None:
            return None
        content, created_us, frame_id, epoch, seq, outcome, reason = row
        if created_us < now_us - self._limits.token_keep_us:
            self._db.execute("DELETE FROM token WHERE camera_id = ? AND token = ?", (draft.camera_id, draft.token))
            self._tokens -= 1
            return None
        if content != draft.content:
            raise TokenConflict(
                f"idempotency token {draft.token!r} of camera {draft.camera_id!r} was used for another picture; "
                "expected the same picture or a new token"
            )
        return Placed(frame_id, FrameName(draft.camera_id, unsigned(epoch), seq), True, Outcome(outcome), reason)

    def _make_room(self, draft: Draft) -> None:
        """Raises Overloaded where there is no room and none may be made."""
        limit = self._limits.max_bytes - WAL_ROOM_BYTES
        # Once in the file, once in the WAL until it is folded in.
        short = self.used_bytes + 2 * draft.cost_bytes - limit
        if short <= 0:
            return
        if self._limits.drop_oldest:
            rows = self._db.execute(
                f"SELECT {COLUMNS} FROM payload JOIN frame ON payload.id = frame.id ORDER BY payload.id"  # noqa: S608
            )
            oldest = []
            for row in rows:
                entry, _ = from_row(row)
                oldest.append(entry)
                short -= len(entry.bitstream.hyper) + len(entry.bitstream.latents) if entry.bitstream else 0
                if short <= 0:
                    break
            if short <= 0:
                for entry in oldest:
                    self._end(entry, Outcome.DROPPED, "given up to make room in the spool", now_us=0)
                return
        self.tally.refused += 1
        raise Overloaded(
            f"expected room for {draft.cost_bytes} bytes in the spool, it holds {self.used_bytes} of "
            f"{self._limits.max_bytes} bytes; try again once the cloud has taken some"
        )

    def _end(self, entry: Entry, outcome: Outcome, reason: str, *, now_us: int) -> Entry:
        """Turns a frame that was to be sent into one whose end is to be told."""
        if outcome is Outcome.REJECTED:
            quarantine.put(self._db, entry, reason, now_us)
            self.tally.damaged += 1
        elif outcome is Outcome.EXPIRED:
            self.tally.expired += 1
        else:
            self.tally.dropped += 1
        self._db.execute("UPDATE frame SET outcome = ?, reason = ? WHERE id = ?", (outcome, reason, entry.id))
        self._db.execute("DELETE FROM payload WHERE id = ?", (entry.id,))
        return replace(entry, bitstream=None, outcome=outcome, reason=reason)
