"""An uplink that falls from 8 to 1 Mbit/s and comes back: Sightline's rate controller beside senders without one.

    sightline bench uplink [--short] [--json]

The link is a shaping proxy. Sightline's side is a real edge (Compress, spool, rate controller, uplink) with its budget
set to the link's best rate, and the cloud's end of Upload; frames ask for SPOOLED and leave quality open. Six
pictures of 1280x960 a second need more encoding than two cores do, and what is measured is the link: so the pictures
were coded before, at every half of a quality, and the edge's engine takes the one nearest to what the controller asks.

Peers on a link of their own: JPEG at a fixed quality, and x264 as a camera sets it (zerolatency, constant bit rate with
a buffer of one second, a key picture every two seconds), both with a rate that the fast link carries. They send in
order and drop nothing, as a recorder that must not lose pictures does.

Reported: bits carried of the link's, in each phase after it has settled; the longest and last backlog in seconds of
the rate; and the 95th percentile of a picture's time from capture to being whole at the cloud, and to its detections.
For the latter, what decoding and the task model take on this machine by themselves was measured before, for each
picture and quality, and is added: as at a cloud that has a machine of its own and is not behind. (What a busy cloud
adds: `sightline bench pipeline`.)
"""

import asyncio
import io
import os
import struct
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import grpc
import numpy as np
import torch
from PIL import Image
from sightline.v1 import common_pb2, edge_pb2, edge_pb2_grpc, ingest_pb2, ingest_pb2_grpc

from bench.pictures import Rgb, frame, jpeg, picture, size_name
from bench.report import Plot, Report, Say, run
from bench.services import folder_on_disk
from bench.shaper import Shaper
from bench.timing import in_turns
from cloud.tasks.loading import load_task
from edge.server import Edge
from edge.settings import EdgeSettings
from shared.codec.codec import Codec
from shared.codec.types import QUALITY_STEP, Bitstream, Frame, Symbols

FAST, SLOW = 8e6, 1e6
FPS, PICTURES, SIZE = 6.0, 2, (960, 1280)  # at quality 8 a little more than the fast link carries
QUALITY_STEP_LADDER = 0.5
SETTLED_S = 6.0  # of a phase
TARGET_USED = 90.0
SHARE_OF_LINK = 0.9  # what the peers ask of the fast link
TASK = "faster-rcnn-mobilenetv2"
DECODED = 20  # pictures, to time a decoder


@dataclass(slots=True)
class Seen:
    """Of one sender, times in s from the start of the run.

    `captured`: of each picture. `delays`: s to the cloud, by time of capture. `seeing`: s to decode it and to find
    what is on it, likewise. `passed`: (time, bytes so far). `waiting`: (time, bytes that wait). `quality`: (time,
    quality).
    """

    captured: list[float] = field(default_factory=list)
    delays: dict[float, float] = field(default_factory=dict)
    seeing: dict[float, float] = field(default_factory=dict)
    passed: list[tuple[float, int]] = field(default_factory=list)
    waiting: list[tuple[float, float]] = field(default_factory=list)
    quality: list[tuple[float, float]] = field(default_factory=list)

    def delays_between(self, start: float, end: float, run_end: float) -> list[float]:
        """Of the pictures taken then; one that is not there yet counts with its age at the end of the run."""
        return [self.delays.get(at, run_end - at) for at in self.captured if start <= at < end]

    def detected_between(self, start: float, end: float, run_end: float) -> list[float]:
        """Likewise to the detections."""
        delays = self.delays_between(start, end, run_end)
        seeing = [self.seeing.get(at, 0.0) for at in self.captured if start <= at < end]
        return [delay + own for delay, own in zip(delays, seeing, strict=True)]


@dataclass(frozen=True, slots=True)
class Phases:
    """`each_s`: how long the link stays at a rate."""

    each_s: float

    def rate(self, now: float) -> float:
        return SLOW if self.each_s <= now < 2 * self.each_s else FAST

    @property
    def end_s(self) -> float:
        return 3 * self.each_s


class Ladder:
    """Stands in the edge's engine for an encoder: pictures in turn, as they were coded before."""

    def __init__(self, codec: Codec, frames: Sequence[Frame], see: Callable[[Rgb], None], say: Say) -> None:
        self._levels = np.arange(1, 8 + QUALITY_STEP_LADDER / 2, QUALITY_STEP_LADDER)
        self._coded = []
        self._seeing = []
        for level in self._levels:
            say(f"coding at quality {level:g}")
            coded = codec.encode_batch(frames, float(level))
            self._coded.append(coded)
            self._seeing.append(_seconds(lambda coded=coded: see(codec.decode(coded[0]).rgb)))
        self._turn = 0

    def seeing_s(self, quality: float) -> float:
        """Seconds to decode a picture of that quality and to find what is on it."""
        return self._seeing[self._nearest(quality)]

    def analyse(self, frames: Sequence[Frame], quality: float = 4.0) -> list[Any]:
        """Whole bitstreams, which the engine passes on where it would pack symbols."""
        level = self._nearest(quality)
        self._turn += len(frames)
        return [self._coded[level][(self._turn + i) % len(self._coded[level])] for i in range(len(frames))]

    def _nearest(self, quality: float) -> int:
        return int(np.abs(self._levels - quality).argmin())

    def pack(self, symbols: Symbols) -> Bitstream:
        raise NotImplementedError("every frame of the ladder is packed")

    def encode_to_size(self, frame: Frame, target_bytes: int) -> Bitstream:
        raise NotImplementedError("no frame of this run asks for a size")


class CloudsEnd(ingest_pb2_grpc.IngestServiceServicer):
    """Takes every frame, says RECEIVED and PERSISTED at once, and tells `came` its time of capture and quality."""

    def __init__(self, came: Callable[[int, float], None]) -> None:
        self._came = came

    async def Upload(self, request_iterator: Any, context: Any) -> AsyncIterator[ingest_pb2.UploadResponse]:
        models = [model.model_id for model in (await anext(request_iterator)).hello.models]
        yield ingest_pb2.UploadResponse(welcome=ingest_pb2.Welcome(protocol_version=1, cloud_id="b", model_ids=models))
        yield ingest_pb2.UploadResponse(credit=ingest_pb2.CreditGrant(frames=64, bytes=16 << 20))
        async for request in request_iterator:
            if request.WhichOneof("message") != "frame":
                continue
            frame = request.frame
            self._came(frame.capture_time_unix_us, frame.quality_steps / QUALITY_STEP)
            name = {"source_index": frame.source_index, "seq": frame.seq}
            received = ingest_pb2.FrameAck(**name, state=ingest_pb2.ACK_STATE_RECEIVED)
            end = ingest_pb2.FrameAck(
                **name, state=ingest_pb2.ACK_STATE_PERSISTED, outcome=common_pb2.OUTCOME_DETECTIONS
            )
            yield ingest_pb2.UploadResponse(acks=ingest_pb2.Acks(acks=[received, end]))
            size = len(frame.hyper) + len(frame.latents)
            yield ingest_pb2.UploadResponse(credit=ingest_pb2.CreditGrant(frames=1, bytes=size))


def measure(short: bool, say: Say) -> Report:
    phases = Phases(3.0 if short else 20.0)
    size = (96, 128) if short else SIZE
    settings: dict[str, Any] = {"Mbit/s": [FAST / 1e6, SLOW / 1e6, FAST / 1e6], "phase_s": phases.each_s}
    settings |= {"fps": FPS, "size": size_name(size)}
    report = Report("uplink", "a link that falls to an eighth and comes back", settings)
    codec = Codec.load("detection")
    task = load_task(TASK, threads=len(os.sched_getaffinity(0)))

    def see(rgb: Rgb) -> None:
        task.predict([torch.from_numpy(rgb).permute(2, 0, 1)], 0.1)

    ladder = Ladder(codec, [frame(size, i) for i in range(1 if short else PICTURES)], see, say)
    pictures = [picture(size, i) for i in range(PICTURES)]
    seen = {}
    with folder_on_disk() as folder:
        say("sightline")
        seen["sightline"] = asyncio.run(through_edge(ladder, codec.model_id, folder, phases))
    frame_bits = SHARE_OF_LINK * FAST / FPS
    quality = max((q for q in range(5, 96, 5) if _mean_bits(pictures, q) < frame_bits), default=5)
    files = [jpeg(rgb, quality) for rgb in pictures]
    say(f"JPEG, quality {quality}")
    seeing_s = _seconds(lambda: see(np.array(Image.open(io.BytesIO(files[0])))))
    seen["JPEG"] = asyncio.run(through_socket(lambda i: files[i % len(files)], seeing_s, phases))
    say("x264")
    given = (pictures, SHARE_OF_LINK * FAST)
    seeing_s = x264_decoding_s(*given) + _seconds(lambda: see(pictures[0]))
    seen["x264"] = asyncio.run(through_socket(X264(*given).code, seeing_s, phases))
    settings["jpeg_quality"], settings["x264_bps"] = quality, SHARE_OF_LINK * FAST
    for name, one in seen.items():
        _figures(report, name, one, phases, seen["JPEG"])
    backlogs = {name: _backlog(one, phases) for name, one in seen.items()}
    report.plots.append(Plot("Backlog: what waits, in s of the link's rate", "s", "s", backlogs))
    chosen = {"sightline": seen["sightline"].quality}
    report.plots.append(Plot("Quality that the controller chose", "s", "quality", chosen))
    report.notes.append("A picture that was not at the cloud by the end of the run counts with its age then.")
    return report


async def through_edge(ladder: Ladder, model_id: str, folder: Path, phases: Phases) -> Seen:
    """A real edge over the shaped link."""
    seen = Seen()
    start_us = 0
    pending: dict[int, int] = {}  # bytes by time of capture; 0 for one that came, also before its receipt
    cloud = grpc.aio.server()

    def came(captured_us: int, quality: float) -> None:
        captured = (captured_us - start_us) / 1e6
        seen.delays[captured] = (time.time_ns() // 1000 - captured_us) / 1e6
        seen.seeing[captured] = ladder.seeing_s(quality)
        pending[captured_us] = 0

    ingest_pb2_grpc.add_IngestServiceServicer_to_server(CloudsEnd(came), cloud)
    port = cloud.add_insecure_port("127.0.0.1:0")
    await cloud.start()
    async with Shaper(port, FAST) as link:
        settings = EdgeSettings.load(
            listen="127.0.0.1:0", metrics_listen="", data_dir=folder, cloud=f"127.0.0.1:{link.port}",
            uplink_budget_bps=FAST, threads=1,
        )  # fmt: skip
        edge = await Edge.start(settings)
        edge.engine._encoders = {model_id: ladder}  # what was coded before, in the encoder's place
        small = jpeg(picture((64, 64)))
        async with grpc.aio.insecure_channel(f"127.0.0.1:{edge.server.port}") as channel:
            stub = edge_pb2_grpc.EdgeServiceStub(channel)
            options = edge_pb2.CompressOptions(delivery=edge_pb2.DELIVERY_SPOOLED)
            start_us = time.time_ns() // 1000

            async def one(now: float) -> None:
                request = edge_pb2.CompressRequest(camera_id="link", encoded=small, options=options)
                captured_us = time.time_ns() // 1000
                request.capture_time.FromMicroseconds(captured_us)
                seen.captured.append((captured_us - start_us) / 1e6)
                receipt = (await stub.Compress(request)).receipt
                seen.quality.append((now, receipt.quality))
                pending.setdefault(captured_us, receipt.coded_bytes)

            await _paced(one, link, lambda: float(sum(pending.values())), seen, phases)
        await edge.close()
    await cloud.stop(0)
    return seen


class X264:
    """One picture after the other, as a live camera codes them."""

    def __init__(self, pictures: Sequence[Rgb], bps: float) -> None:
        height, width = pictures[0].shape[:2]
        self._pictures = pictures
        self._coder: Any = av.CodecContext.create("libx264", "w")
        self._coder.width, self._coder.height, self._coder.pix_fmt = width, height, "yuv420p"
        self._coder.time_base, self._coder.framerate = Fraction(1, int(FPS)), Fraction(int(FPS))
        self._coder.bit_rate, self._coder.gop_size, self._coder.max_b_frames = int(bps), int(2 * FPS), 0
        rates = f"vbv-maxrate={bps / 1e3:.0f}:vbv-bufsize={bps / 1e3:.0f}:nal-hrd=cbr"
        self._coder.options = {"preset": "veryfast", "tune": "zerolatency", "x264-params": rates}

    def code(self, index: int) -> bytes:
        """The scene moves a little each picture and changes every five seconds."""
        rgb = self._pictures[index // int(5 * FPS) % len(self._pictures)]
        given = av.VideoFrame.from_ndarray(np.ascontiguousarray(np.roll(rgb, 2 * index, axis=1)), "rgb24")
        given.pts = index
        return b"".join(bytes(packet) for packet in self._coder.encode(given))


def x264_decoding_s(pictures: Sequence[Rgb], bps: float) -> float:
    """Seconds to decode a picture of such a coder."""
    coder, decoder = X264(pictures, bps), av.CodecContext.create("h264", "r")
    packets = iter([av.Packet(coder.code(i)) for i in range(DECODED)])

    def decode() -> None:
        for decoded in decoder.decode(next(packets)):
            decoded.to_ndarray(format="rgb24")

    return _seconds(decode, DECODED - 1)


async def through_socket(code: Callable[[int], bytes], seeing_s: float, phases: Phases) -> Seen:
    """A sender without a controller: pictures in order, over one connection. `seeing_s`: see `Seen`."""
    seen = Seen()
    origin = time.monotonic()
    ended = asyncio.Event()

    async def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                captured, size = struct.unpack("<dI", await reader.readexactly(12))
                await reader.readexactly(size)
                seen.delays[captured] = time.monotonic() - origin - captured
                seen.seeing[captured] = seeing_s
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()
            ended.set()

    server = await asyncio.start_server(take, "127.0.0.1", 0)
    async with server, Shaper(server.sockets[0].getsockname()[1], FAST) as link:
        _, writer = await asyncio.open_connection("127.0.0.1", link.port)
        offered = 0
        coding = asyncio.Lock()
        origin = time.monotonic()

        async def one(_: float) -> None:
            nonlocal offered
            captured = time.monotonic() - origin
            seen.captured.append(captured)
            index = len(seen.captured) - 1
            async with coding:  # a coder takes pictures in order
                data = await asyncio.to_thread(code, index)
            offered += 12 + len(data)
            writer.write(struct.pack("<dI", captured, len(data)) + data)  # what the link does not take waits in memory

        await _paced(one, link, lambda: float(offered - link.passed_bytes), seen, phases)
        writer.transport.abort()
        await ended.wait()
    return seen


async def _paced(
    one: Callable[[float], Any], link: Shaper, waiting_bytes: Callable[[], float], seen: Seen, phases: Phases
) -> None:
    """Calls `one` FPS times a second while the link changes; looks at it as often."""
    start, i = time.monotonic(), 0
    running: set[asyncio.Task[None]] = set()
    while (now := time.monotonic() - start) < phases.end_s:
        link.rate_bps = phases.rate(now)
        seen.passed.append((now, link.passed_bytes))
        seen.waiting.append((now, waiting_bytes()))
        task = asyncio.ensure_future(one(now))
        running.add(task)
        task.add_done_callback(running.discard)
        i += 1
        await asyncio.sleep(max(0.0, start + i / FPS - time.monotonic()))
    await asyncio.gather(*running)


def _figures(report: Report, name: str, seen: Seen, phases: Phases, peer: Seen) -> None:
    ours = name == "sightline"
    words = ("at 8 Mbit/s", "at 1 Mbit/s", "at 8 Mbit/s again")
    for i, phase in enumerate(words):
        start, end = i * phases.each_s + min(SETTLED_S, phases.each_s / 2), (i + 1) * phases.each_s
        passed = [bytes_ for at, bytes_ in seen.passed if start <= at < end]
        rate = phases.rate(start)
        used = 100 * 8 * (passed[-1] - passed[0]) / (end - start) / rate
        report.add(f"{name}: link used {phase}", used, "%", at_least=TARGET_USED if ours else None)
    backlog = _backlog(seen, phases)
    report.add(f"{name}: longest backlog", max(s for _, s in backlog), "s")
    slow = [s for at, s in backlog if 2 * phases.each_s - 5 <= at < 2 * phases.each_s]
    report.add(f"{name}: backlog at the end of 1 Mbit/s", float(np.median(slow)), "s")
    for phase, start, end in (
        ("", 0.0, phases.end_s),
        (" at 1 Mbit/s, settled", phases.each_s + min(SETTLED_S, phases.each_s / 2), 2 * phases.each_s),
    ):
        for where, delays in (("cloud", Seen.delays_between), ("detection", Seen.detected_between)):
            p95, other = (float(np.percentile(delays(each, start, end, phases.end_s), 95)) for each in (seen, peer))
            report.add(f"{name}: capture to {where}, p95{phase}", p95, "s", peer=("JPEG", other) if ours else None)
    there = sum(at + delay <= phases.end_s for at, delay in seen.delays.items())
    report.add(f"{name}: pictures at the cloud by the end", 100 * there / len(seen.captured), "%")
    if ours:
        settled = [q for at, q in seen.quality if 1.5 * phases.each_s <= at < 2 * phases.each_s]
        report.add("sightline: quality's deviation at 1 Mbit/s, settled", float(np.std(settled)), "")


def _backlog(seen: Seen, phases: Phases) -> list[tuple[float, float]]:
    return [(at, 8 * waiting / phases.rate(at)) for at, waiting in seen.waiting]


def _seconds(work: Callable[[], object], rounds: int = 3) -> float:
    """The median of so many, after one that does not count."""
    return in_turns({"it": work}, rounds)["it"].median / 1e3


def _mean_bits(pictures: Sequence[Rgb], quality: int) -> float:
    return sum(8 * len(jpeg(rgb, quality)) for rgb in pictures) / len(pictures)


def main() -> int:
    return run(__doc__, "uplink", measure)


if __name__ == "__main__":
    raise SystemExit(main())
