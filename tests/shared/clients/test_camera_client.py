"""The camera's client against a real edge: what it takes, what it tries again, and that no try makes a second frame."""

import asyncio
import socket
import sqlite3
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest

from shared.clients import CameraClient, CompressOptions, Connection, Delivery, Receipt, ReceiptState, Retry
from shared.codec.bitstream import from_bytes
from shared.codec.codec import Codec
from shared.errors import InvalidImage, InvalidInput, InvalidSettings, SightlineError, Unavailable
from shared.rpc import certificates
from tests.edge.conftest import RunningEdge
from tests.shared.authority import EDGE, Authority
from tests.shared.clients.conftest import Clients

LOOK = CompressOptions(quality=3, delivery=Delivery.NONE, return_bitstream=True)


def spooled(folder: Path) -> list[tuple[str, int]]:
    db = sqlite3.connect(folder / "edge" / "spool.sqlite")
    rows = db.execute("SELECT camera_id, seq FROM frame ORDER BY id").fetchall()
    db.close()
    return rows


async def test_files_paths_and_pixels_become_receipts_of_the_right_size(
    running_edge: RunningEdge, clients: Clients, small_jpeg: bytes, small_rgb: np.ndarray, tmp_path: Path, codec: Codec
) -> None:
    path = tmp_path / "cat.jpg"
    path.write_bytes(small_jpeg)
    async with running_edge() as (edge, _):
        camera = clients.camera(f"127.0.0.1:{edge.server.port}", "door", options=LOOK)
        for picture in (small_jpeg, path, small_rgb, small_rgb[..., 1], small_rgb[:, ::-1]):
            receipt = await camera.compress(picture)
            assert receipt.state is ReceiptState.ENCODED
            assert receipt.frame is None
            assert (receipt.width, receipt.height, receipt.quality) == (96, 72, 3.0)
            assert receipt.coded_bytes == len(receipt.bitstream)
            assert receipt.bits_per_pixel == pytest.approx(8 * receipt.coded_bytes / (96 * 72))
            assert receipt.timings.total_ms > receipt.timings.analyse_ms > 0
            assert codec.decode(from_bytes(receipt.bitstream, [codec.model_id])).rgb.shape == (72, 96, 3)
    await clients.close()


async def test_a_picture_is_spooled_unless_said_otherwise_and_has_a_name(
    running_edge: RunningEdge, clients: Clients, small_jpeg: bytes, tmp_path: Path
) -> None:
    async with running_edge() as (edge, _):
        camera = clients.camera(f"127.0.0.1:{edge.server.port}", "door")
        first = await camera.compress(small_jpeg, capture_time=datetime(2026, 1, 2, tzinfo=UTC))
        second = await camera.compress(small_jpeg, CompressOptions(target_bytes=900, max_age_s=60))
        again = await camera.compress(small_jpeg, token="mine")
        assert (await camera.compress(small_jpeg, token="mine")).frame == again.frame
    assert first.state is ReceiptState.SPOOLED
    assert str(first.frame) == f"door/{first.frame.epoch:016x}/1"
    assert second.coded_bytes <= 900
    assert spooled(tmp_path) == [("door", 1), ("door", 2), ("door", 3)]
    await clients.close()


async def test_what_the_edge_refuses_is_raised_as_its_error_and_not_tried_again(
    running_edge: RunningEdge, clients: Clients, small_rgb: np.ndarray
) -> None:
    async with running_edge() as (edge, _):
        camera = clients.camera(f"127.0.0.1:{edge.server.port}", retry=Retry(first_s=60, give_up_s=None))
        async with asyncio.timeout(30):
            with pytest.raises(InvalidImage, match="0 bytes"):
                await camera.compress(b"")
            with pytest.raises(InvalidImage, match=r"expected uint8 .* got float64 \[72, 96, 3\]"):
                await camera.compress(small_rgb / 255.0)
            with pytest.raises(InvalidInput, match="time zone"):
                await camera.compress(small_rgb, capture_time=datetime(2026, 1, 2))
            impatient = clients.camera(f"127.0.0.1:{edge.server.port}", retry=Retry(give_up_s=0.0))
            with pytest.raises(Unavailable, match="needs a cloud"):
                await impatient.compress(small_rgb, CompressOptions(delivery=Delivery.PERSISTED))
    await clients.close()


async def test_an_edge_that_is_down_is_tried_until_it_is_there_or_given_up(
    running_edge: RunningEdge, clients: Clients, small_jpeg: bytes, tmp_path: Path
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(Unavailable):
        await clients.camera(address, retry=Retry(give_up_s=0.3)).compress(small_jpeg)
    under_way = asyncio.create_task(clients.camera(address, "door", retry=Retry(give_up_s=120)).compress(small_jpeg))
    async with running_edge(listen=address):
        assert (await under_way).state is ReceiptState.SPOOLED
    assert spooled(tmp_path) == [("door", 1)]
    await clients.close()


@asynccontextmanager
async def wire_that_loses_the_first_answer(port: int) -> AsyncIterator[tuple[int, list[int]]]:
    """A TCP proxy before an edge: cuts the connection in place of its first large answer. Yields its port and the sizes
    of what it lost."""
    lost: list[int] = []

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, answers: bool) -> None:
        while data := await reader.read(65536):
            if answers and len(data) > 400 and not lost:
                lost.append(len(data))
                break
            writer.write(data)
        writer.close()

    async def connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        from_edge, to_edge = await asyncio.open_connection("127.0.0.1", port)
        up = asyncio.create_task(pump(reader, to_edge, answers=False))
        await pump(from_edge, writer, answers=True)
        to_edge.close()
        await asyncio.gather(up, return_exceptions=True)

    server = await asyncio.start_server(connect, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1], lost


async def test_a_lost_answer_is_asked_for_again_and_makes_no_second_frame(
    running_edge: RunningEdge, clients: Clients, small_jpeg: bytes, tmp_path: Path
) -> None:
    async with running_edge() as (edge, _), wire_that_loses_the_first_answer(edge.server.port) as (port, lost):
        camera = clients.camera(f"127.0.0.1:{port}", "door")
        receipt = await camera.compress(small_jpeg, CompressOptions(quality=5, return_bitstream=True))
        await clients.close()
    assert len(lost) == 1
    assert receipt.duplicate
    assert receipt.frame.seq == 1
    assert spooled(tmp_path) == [("door", 1)]


async def test_many_pictures_answer_in_order_and_one_that_fails_stops_none(
    running_edge: RunningEdge, clients: Clients, small_rgb: np.ndarray
) -> None:
    read: list[int] = []

    def pictures() -> Iterator[np.ndarray | bytes]:
        for i in range(10):
            read.append(i)
            yield b"no picture" if i == 4 else small_rgb[: 40 + i]

    got: list[Receipt | SightlineError] = []
    async with running_edge() as (edge, _):
        camera = clients.camera(f"127.0.0.1:{edge.server.port}", options=LOOK)
        async for one in camera.compress_many(pictures(), window=3):
            got.append(one)
            assert len(read) <= len(got) + 3
        await clients.close()
    assert isinstance(got.pop(4), InvalidImage)
    assert [one.height for one in got if isinstance(one, Receipt)] == [40 + i for i in range(10) if i != 4]


def test_a_connection_that_others_could_read_must_be_asked_for() -> None:
    with pytest.raises(InvalidSettings, match=r"setting address: plaintext to 10\.0\.0\.1:7411"):
        CameraClient("10.0.0.1:7411")
    with pytest.raises(InvalidSettings, match="host:port"):
        CameraClient("nowhere")
    CameraClient(Connection("10.0.0.1:7411", insecure=True)).close()


async def test_a_certificate_that_is_renewed_serves_the_next_call(
    running_edge: RunningEdge, clients: Clients, small_jpeg: bytes, tmp_path: Path
) -> None:
    ours, theirs = Authority(tmp_path / "ours"), Authority(tmp_path / "theirs", "of others")
    own, key = tmp_path / "own.pem", tmp_path / "own.key"
    certificates.write(theirs.client(EDGE), own, key)
    async with running_edge(**ours.server_settings()) as (edge, _):
        connection = Connection(f"127.0.0.1:{edge.server.port}", ours.ca, own, key)
        camera = clients.camera(connection, retry=Retry(give_up_s=0.0))
        with pytest.raises(Unavailable):
            await camera.compress(small_jpeg)
        certificates.write(ours.client(EDGE), own, key)
        assert (await camera.compress(small_jpeg)).state is ReceiptState.SPOOLED
        await clients.close()
