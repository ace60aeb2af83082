"""What is particular to the JetStream backend: several clouds, a broker that dies, and what is checked at start."""

import asyncio
import dataclasses
import itertools
import random
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path

import nats
import pytest
from nats.js.api import StreamConfig

from bench.broker import Broker, free_port, server_binary
from cloud.detections.broker import BrokerOptions, require_version
from cloud.detections.index import Place, name_of, subject_of
from cloud.detections.jetstream import JetStreamLog
from cloud.detections.log import Appended, FrameName, Retention
from shared.errors import CursorExpired, InvalidSettings, Unavailable
from shared.rpc.certificates import Names
from tests.cloud.detections.conftest import KEEP_ALL, options
from tests.shared.authority import Authority

Open = Callable[..., Awaitable[JetStreamLog]]


def name(seq: int, camera: str = "gate") -> FrameName:
    return FrameName(camera, 7, seq)


@pytest.fixture
async def open_log() -> AsyncIterator[Open]:
    """Opens a log at a broker; every call is another cloud."""
    opened: list[JetStreamLog] = []

    async def open_log(options: BrokerOptions, retention: Retention = KEEP_ALL) -> JetStreamLog:
        opened.append(await JetStreamLog.open(options, retention))
        return opened[-1]

    yield open_log
    for log in opened:
        await log.close()


@pytest.fixture
def unique() -> str:
    """The name of a log that nobody else has."""
    return f"log-{secrets.token_hex(4)}"


async def read_until(log: JetStreamLog, count: int) -> list[tuple[int, FrameName, bytes]]:
    """Follows the log from its beginning until so many records were seen."""
    seen: list[tuple[int, FrameName, bytes]] = []
    position = 0
    async with asyncio.timeout(60):
        while len(seen) < count:
            await log.wait_beyond(position)
            records = await log.read(position, 50)
            seen += [(record.sequence, record.name, record.event) for record in records]
            position = seen[-1][0]
    return seen


async def test_closing_while_the_follower_is_being_answered_ends(broker: Broker, unique: str) -> None:
    """An answer that has come and was not read yet used to take the cancellation with it, in one of three attempts."""
    for attempt in range(24):
        log = await JetStreamLog.open(options(broker, unique), KEEP_ALL)
        for _ in range(attempt // 3):
            await asyncio.sleep(0)
        time.sleep(0.003 * (attempt % 3))  # noqa: ASYNC251  # the answer comes while this event loop does not look
        async with asyncio.timeout(10):
            await log.close()


async def test_a_block_that_takes_long_holds_up_its_cameras_later_records_and_no_others(
    open_log: Open, broker: Broker, unique: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = await open_log(options(broker, unique))
    store, others = log._blocks.store, asyncio.Event()

    async def slow_at_first(events: Sequence[bytes]) -> list[Place]:
        if events[0].startswith(b"slow"):
            await others.wait()
        return await store(events)

    monkeypatch.setattr(log._blocks, "store", slow_at_first)
    full = bytes(log._blocks.size)  # a block each
    events = [(name(1), b"slow" + full), (name(2), full), (name(3), full), (name(1, "door"), full)]
    appends = [asyncio.create_task(log.append(*each)) for each in events]
    async with asyncio.timeout(60):
        other = await appends[3]
        early = [each.done() for each in appends[:3]]
        others.set()
        assert (other.sequence, early) == (1, [False] * 3)
        assert [each.sequence for each in await asyncio.gather(*appends[:3])] == [2, 3, 4]


async def append_surely(log: JetStreamLog, name: FrameName, event: bytes, refused: list[Unavailable]) -> Appended:
    """As an edge would have it: again, until there is an answer."""
    async with asyncio.timeout(60):
        while True:
            try:
                return await log.append(name, event)
            except Unavailable as error:
                refused.append(error)
                await asyncio.sleep(0.05)  # an edge waits too


async def test_of_two_clouds_that_write_the_same_frames_one_wins_each_and_both_read_the_same(
    open_log: Open, broker: Broker, unique: str
) -> None:
    first, second = [await open_log(options(broker, unique)) for _ in range(2)]
    assert first.log_id == second.log_id
    readers = [asyncio.create_task(read_until(log, 100)) for log in (first, second)]
    results = await asyncio.gather(
        *(log.append(name(seq), label) for seq in range(100) for log, label in ((first, b"first"), (second, b"second")))
    )
    by_first, by_second = results[::2], results[1::2]
    assert all(a.new != b.new and a.sequence == b.sequence for a, b in zip(by_first, by_second, strict=True))
    read_by_first, read_by_second = [await reader for reader in readers]
    assert read_by_first == read_by_second
    assert [sequence for sequence, _, _ in read_by_first] == list(range(1, 101))
    winners = {frame: event for _, frame, event in read_by_first}
    assert winners == {name(seq): b"first" if a.new else b"second" for seq, a in enumerate(by_first)}


async def test_what_one_cloud_appended_another_finds_and_reads_at_once(
    open_log: Open, broker: Broker, unique: str
) -> None:
    first, second = [await open_log(options(broker, unique)) for _ in range(2)]
    for seq in range(20):
        appended = await first.append(name(seq), b"%d" % seq)
        assert await second.find(name(seq)) == appended.sequence
        assert [record.event for record in await second.read(appended.sequence - 1, 1)] == [b"%d" % seq]
    assert (await second.span()).newest == 20


async def test_a_cloud_that_comes_later_reads_what_it_never_held_in_memory(
    open_log: Open, broker: Broker, unique: str
) -> None:
    first = await open_log(options(broker, unique))
    await asyncio.gather(*(first.append(name(seq), b"%d" % seq) for seq in range(300)))
    later = await open_log(options(broker, unique))
    assert later._tail.oldest is None
    both = [await read_until(later, 300), await read_until(later, 300)]
    assert both[0] == both[1]
    assert [sequence for sequence, _, _ in both[0]] == list(range(1, 301))
    assert {event for _, _, event in both[0]} == {b"%d" % seq for seq in range(300)}


async def test_an_event_larger_than_a_message_of_the_broker_is_kept_whole(
    open_log: Open, broker: Broker, unique: str
) -> None:
    event = secrets.token_bytes(3 << 20)
    log = await open_log(options(broker, unique))
    await asyncio.gather(log.append(name(0), b"small"), log.append(name(1), event), log.append(name(2), b""))
    later = await open_log(options(broker, unique))
    events = {frame.seq: content for _, frame, content in await read_until(later, 3)}
    assert events == {0: b"small", 1: event, 2: b""}


async def test_a_broker_that_dies_and_returns_is_waited_for_and_has_lost_nothing(
    open_log: Open, tmp_path: Path
) -> None:
    with Broker(tmp_path) as broker:
        first, second = [await open_log(options(broker, "log")) for _ in range(2)]
        refused: list[Unavailable] = []

        async def camera(label: str) -> list[int]:
            events = [(name(seq, label), f"{label}{seq}".encode()) for seq in range(30)]
            return [(await append_surely(first, *event, refused)).sequence for event in events]

        reading = asyncio.create_task(read_until(second, 90))
        cameras = [asyncio.create_task(camera(label)) for label in "abc"]
        for already in (15, 45):
            await first.wait_beyond(already)
            await asyncio.to_thread(broker.nodes[0].kill)
            await asyncio.to_thread(broker.nodes[0].start)
        appended = [sequence for camera in cameras for sequence in await camera]
        records = await reading
    assert refused, "no append met the broker's absence"
    assert sorted(appended) == [sequence for sequence, _, _ in records] == list(range(1, 91))
    assert {event.decode() for _, _, event in records} == {f"{label}{seq}" for label in "abc" for seq in range(30)}


@pytest.mark.slow(reason="each death costs an election, some seconds")
async def test_a_cluster_whose_servers_die_in_turn_keeps_one_record_a_frame(open_log: Open, tmp_path: Path) -> None:
    rng = random.Random(3)
    stop = asyncio.Event()
    appended: dict[FrameName, set[int]] = {}
    refused: list[Unavailable] = []
    with Broker(tmp_path, nodes=3) as broker:
        first, second = [await open_log(options(broker, "log", replicas=3)) for _ in range(2)]

        async def camera(label: str) -> None:
            """Every frame is sent to both clouds at once, as after a reconnect that was noticed late."""
            for seq in itertools.count():
                if stop.is_set():
                    return
                both = [
                    append_surely(log, name(seq, label), f"{label}{seq}".encode(), refused) for log in (first, second)
                ]
                appended[name(seq, label)] = {one.sequence for one in await asyncio.gather(*both)}

        cameras = [asyncio.create_task(camera(label)) for label in "abcd"]
        for _ in range(8):
            victim = rng.choice(broker.nodes)
            await asyncio.sleep(rng.uniform(0.2, 3))  # the random moment is the point of this test
            await asyncio.to_thread(victim.kill)
            await asyncio.sleep(rng.uniform(0, 3))
            await asyncio.to_thread(victim.start)
        stop.set()
        await asyncio.gather(*cameras)
        records = {log: await read_until(log, (await log.span()).newest) for log in (first, second)}
    assert refused, "no append met a server's death"
    assert records[first] == records[second]
    assert [sequence for sequence, _, _ in records[first]] == list(range(1, len(records[first]) + 1))
    assert {frame: {sequence} for sequence, frame, _ in records[first]} == appended
    assert all(event == f"{frame.camera}{frame.seq}".encode() for _, frame, event in records[first])


async def test_names_outlive_events_that_went_by_age(open_log: Open, broker: Broker, unique: str) -> None:
    log = await open_log(options(broker, unique), Retention(max_age_s=0.3, max_bytes=1 << 20, key_age_s=3600))
    first = await log.append(name(0), b"old")
    others = itertools.count()
    async with asyncio.timeout(30):
        while (await log.span()).oldest <= first.sequence:
            await log.append(name(next(others), "other"), b"")  # until the broker's clock has passed the bound
    with pytest.raises(CursorExpired, match="the log keeps records from sequence"):
        await log.read(0, 10)
    assert await log.append(name(0), b"resend") == Appended(first.sequence, new=False)
    assert (await log.append(name(1), b"new")).new


async def test_a_log_that_was_replaced_is_not_written_to(open_log: Open, broker: Broker, unique: str) -> None:
    old = await open_log(options(broker, unique))
    await old.append(name(0), b"")
    client = await nats.connect(broker.servers)
    for kind in ("index", "blocks"):
        await client.jetstream().delete_stream(f"{unique}-{kind}")
    await client.close()
    new = await open_log(options(broker, unique))
    assert new.log_id != old.log_id
    with pytest.raises(Unavailable):
        await old.append(name(1), b"")
    assert (await new.span()).newest == 0


async def test_half_a_log_is_refused(open_log: Open, broker: Broker, unique: str) -> None:
    await open_log(options(broker, unique))
    client = await nats.connect(broker.servers)
    await client.jetstream().delete_stream(f"{unique}-index")
    await client.close()
    with pytest.raises(Unavailable, match="one of them was deleted"):
        await JetStreamLog.open(options(broker, unique), KEEP_ALL)


async def test_a_stream_that_is_not_a_log_is_left_alone(broker: Broker, unique: str) -> None:
    client = await nats.connect(broker.servers)
    await client.jetstream().add_stream(StreamConfig(name=f"{unique}-index", subjects=[f"{unique}.somebody"]))
    await client.close()
    with pytest.raises(InvalidSettings, match="choose another name"):
        await JetStreamLog.open(options(broker, unique), KEEP_ALL)


async def test_bounds_follow_the_settings_of_whoever_started_last(open_log: Open, broker: Broker, unique: str) -> None:
    await open_log(options(broker, unique))
    log = await open_log(options(broker, unique), Retention(max_age_s=60, max_bytes=1 << 20, key_age_s=120))
    index, blocks = [await log._js.stream_info(f"{unique}-{kind}") for kind in ("index", "blocks")]
    assert (index.config.max_age, blocks.config.max_age, blocks.config.max_bytes) == (120, 60, 1 << 20)


async def test_copies_that_the_cluster_cannot_hold_are_refused(broker: Broker, unique: str) -> None:
    with pytest.raises(InvalidSettings, match="log_replicas is 3"):
        await JetStreamLog.open(options(broker, unique, replicas=3), KEEP_ALL)


async def test_a_broker_that_does_not_sync_every_write_is_refused(tmp_path: Path) -> None:
    with Broker(tmp_path, sync_interval="2m") as broker:
        lax = BrokerOptions((broker.servers,), replicas=1, monitoring=(broker.monitoring,))
        with pytest.raises(InvalidSettings, match="sync_interval: always"):
            await JetStreamLog.open(lax, KEEP_ALL)


async def test_a_broker_that_says_it_syncs_is_taken_and_one_that_is_down_does_not_matter(
    open_log: Open, broker: Broker, unique: str
) -> None:
    down = f"http://127.0.0.1:{free_port()}"
    reachable = BrokerOptions((broker.servers,), name=unique, replicas=1, monitoring=(broker.monitoring, down))
    assert (await (await open_log(reachable)).append(name(0), b"")).new
    with pytest.raises(Unavailable, match="none of the NATS monitoring pages answers"):
        await JetStreamLog.open(BrokerOptions((broker.servers,), replicas=1, monitoring=(down,)), KEEP_ALL)


async def test_no_broker_is_unavailable_and_the_password_is_not_told() -> None:
    nowhere = BrokerOptions((f"nats://user:secret@127.0.0.1:{free_port()}",), start_s=0.5)
    with pytest.raises(Unavailable, match=r"no NATS server at nats://127\.0\.0\.1") as refused:
        await JetStreamLog.open(nowhere, KEEP_ALL)
    assert "secret" not in str(refused.value)


async def test_a_cloud_and_its_broker_know_each_other_by_certificate_and_password(
    open_log: Open, tmp_path: Path
) -> None:
    authority = Authority(tmp_path / "pki")
    certificate, key = authority.issue("cloud", Names("cloud", dns=["cloud"]))
    broker = Broker(tmp_path / "nats")
    with (broker.nodes[0].folder / "server.conf").open("a") as config:
        config.write(
            f"tls {{ cert_file: {authority.folder}/server.pem, key_file: {authority.folder}/server.key, "
            f"ca_file: {authority.ca}, verify: true }}\n"
            "authorization { user: cloud, password: secret }\n"
        )
    with broker:
        address = f"tls://cloud:secret@127.0.0.1:{broker.nodes[0].port}"
        known = BrokerOptions((address,), replicas=1, ca=authority.ca, certificate=certificate, key=key, start_s=3)
        assert (await (await open_log(known)).append(name(0), b"")).new
        guessed = dataclasses.replace(known, servers=(address.replace("secret", "guess"),), start_s=0.5)
        with pytest.raises(Unavailable, match="no NATS server"):
            await JetStreamLog.open(guessed, KEEP_ALL)


async def test_a_server_without_tls_is_refused_where_tls_is_wanted(broker: Broker, tmp_path: Path) -> None:
    address = broker.servers.replace("nats:", "tls:")
    with pytest.raises(Unavailable, match="expected TLS"):
        await JetStreamLog.open(BrokerOptions((address,), replicas=1, ca=Authority(tmp_path).ca), KEEP_ALL)


def test_servers_older_than_2_10_are_refused() -> None:
    require_version((2, 10), "a server")
    with pytest.raises(InvalidSettings, match=r"expected version 2\.10 or newer.*got 2\.9"):
        require_version((2, 9), "a server")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"servers": ("nats://192.0.2.1:4222",)}, "nats_insecure"),
        ({"servers": ("http://127.0.0.1:4222",)}, "nats_servers"),
        ({"servers": ("nats://127.0.0.1:4222",), "certificate": Path("c.pem")}, "together"),
        ({"servers": ("tls://192.0.2.1:4222",), "ca": Path("/nowhere/ca.pem")}, "nats_ca"),
    ],
)
async def test_settings_that_would_not_do_are_refused_by_name(changes: dict[str, object], sentence: str) -> None:
    with pytest.raises(InvalidSettings, match=sentence):
        await JetStreamLog.open(BrokerOptions(**changes), KEEP_ALL)  # type: ignore[arg-type]


@pytest.mark.parametrize("camera", ["gate", "a.b:c_d-1", "tür ✓", "*", ">", "%2E", "~"])
def test_a_frame_is_found_again_in_its_subject_whatever_its_camera_is_called(camera: str) -> None:
    frame = FrameName(camera, (1 << 64) - 1, 12)
    subject = subject_of("log.id.frame", frame)
    assert subject.isascii()
    assert subject.count(".") == 5
    assert not set(subject) & set("*> ")
    assert name_of(subject) == frame


def test_an_index_entry_of_another_version_is_refused() -> None:
    entry = Place(crc=7, offset=1, length=2, blocks=(3, 1 << 60))
    assert Place.from_bytes(entry.to_bytes()) == entry
    for wrong in (b"", b"\x02" + entry.to_bytes()[1:], entry.to_bytes()[:-1]):
        with pytest.raises(Unavailable, match="version 1"):
            Place.from_bytes(wrong)


def test_only_the_pinned_server_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.broker.SHA256", {"x86_64": "0" * 64, "aarch64": "0" * 64})
    server_binary.cache_clear()
    with pytest.raises(RuntimeError, match="SHA-256"):
        server_binary()
    monkeypatch.undo()
    assert server_binary().name == "nats-server"
