"""Where pictures come from: files, folders and a real RTSP server; their order, pace, size and colours."""

import itertools
import time
from pathlib import Path
from threading import Event

import av
import numpy as np
import pytest
from av.video.reformatter import VideoReformatter
from PIL import Image

from edge.sources import Kind, NotThere, Reading, Source, find_source, read, to_rgb
from shared.errors import InvalidImage, InvalidInput, InvalidSettings, Unavailable
from tests.edge import rtsp
from tests.edge.videos import moving_square, write_video

SOFTWARE = Reading(hardware="none")


def rgb_of(source: Source, how: Reading = SOFTWARE, largest: tuple[int, int] | None = None) -> list[np.ndarray]:
    scaler = VideoReformatter()
    return [to_rgb(grab.frame, scaler, largest) for grab in read(source, how, Event())]


def test_an_address_is_a_stream_a_device_a_file_or_a_folder(tmp_path: Path) -> None:
    picture = tmp_path / "a.png"
    Image.new("RGB", (4, 4)).save(picture)
    assert find_source("rtsp://user:secret@cam:554/s").kind is Kind.STREAM
    assert find_source("rtsp://user:secret@cam:554/s").shown == "rtsp://cam:554/s"
    assert find_source("/dev/video7").kind is Kind.DEVICE
    assert find_source(str(picture)).kind is Kind.FILE
    assert find_source(str(tmp_path)).kind is Kind.FOLDER
    (tmp_path / "empty").mkdir()
    for address, said in [(str(tmp_path / "empty"), "no file ending in"), ("no-such-file.mp4", "expected a URL")]:
        with pytest.raises(InvalidInput, match=said):
            find_source(address)


def test_a_video_file_comes_whole_in_order_and_with_its_own_clock(tmp_path: Path) -> None:
    pictures = moving_square(30)
    source = find_source(str(write_video(tmp_path / "square.mp4", pictures, fps=20)))
    grabs = list(read(source, SOFTWARE, Event()))
    assert [grab.time_s for grab in grabs] == pytest.approx([i / 20 for i in range(30)])
    scaler = VideoReformatter()
    for grab, picture in zip(grabs, pictures, strict=True):
        difference = np.abs(to_rgb(grab.frame, scaler, None).astype(int) - picture)
        assert difference.mean() < 2


def test_realtime_takes_a_file_at_its_own_pace_and_stops_at_once_when_told(tmp_path: Path) -> None:
    source = find_source(str(write_video(tmp_path / "slow.mp4", moving_square(8), fps=20)))
    start = time.monotonic()
    arrivals = [time.monotonic() - start for _ in read(source, Reading(realtime=True, hardware="none"), Event())]
    assert all(arrival >= i / 20 - 0.005 for i, arrival in enumerate(arrivals))
    slow = find_source(str(write_video(tmp_path / "hour.mp4", moving_square(2), fps=1)))
    stop = Event()
    reading = read(slow, Reading(realtime=True, hardware="none"), stop)
    next(reading)
    stop.set()
    assert list(reading) == []


def test_pictures_are_scaled_to_fit_and_never_enlarged(tmp_path: Path) -> None:
    source = find_source(str(write_video(tmp_path / "square.mp4", moving_square(1))))
    shapes = {size: rgb_of(source, largest=size)[0].shape for size in [(48, 48), (1000, 32), (500, 400), (1, 1)]}
    assert shapes == {(48, 48): (32, 48, 3), (1000, 32): (32, 48, 3), (500, 400): (64, 96, 3), (1, 1): (1, 1, 3)}


@pytest.mark.parametrize(("matrix", "rows"), [("bt709", 96), ("smpte170m", 96), ("bt709", 720)])
def test_colours_come_back_whatever_matrix_the_stream_tells(matrix: str, rows: int, tmp_path: Path) -> None:
    red = np.zeros((rows, 128, 3), np.uint8)
    red[:] = (200, 40, 60)
    path = tmp_path / "red.mp4"
    number = {"bt709": 1, "smpte170m": 6}[matrix]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=5, options={"crf": "4", "colorspace": str(number)})
        stream.width, stream.height, stream.pix_fmt = 128, rows, "yuv420p"
        told = av.VideoFrame.from_ndarray(red, format="rgb24")
        frame = told.reformat(format="yuv420p", dst_colorspace="ITU709" if matrix == "bt709" else "ITU601")
        frame.colorspace = number
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    [rgb] = rgb_of(find_source(str(path)))
    assert rgb[rows // 2, 64].tolist() == pytest.approx([200, 40, 60], abs=4)


def test_a_folder_comes_by_name_upright_and_names_what_it_cannot_read(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    Image.new("RGB", (20, 10), (250, 0, 0)).save(tmp_path / "b.jpg", exif=exif)
    Image.new("RGB", (8, 8), (0, 0, 250)).save(tmp_path / "a.png")
    source = find_source(str(tmp_path))
    assert [rgb.shape for rgb in rgb_of(source)] == [(8, 8, 3), (20, 10, 3)]
    (tmp_path / "c.webp").write_bytes(b"no picture")
    with pytest.raises(InvalidImage, match=r"c\.webp: expected a JPEG, PNG or WebP"):
        rgb_of(source)


def test_what_cannot_be_read_says_what_it_is(tmp_path: Path) -> None:
    text = tmp_path / "notes.mp4"
    text.write_text("not a video")
    with pytest.raises(InvalidInput, match=r"notes\.mp4 cannot be read as video: Invalid data"):
        rgb_of(find_source(str(text)))
    with pytest.raises(NotThere, match="/dev/video99 cannot be opened"):
        rgb_of(find_source("/dev/video99"))
    with pytest.raises(Unavailable, match="is lost: Connection refused") as lost:
        rgb_of(find_source("rtsp://admin:secret@127.0.0.1:1/camera"))
    assert "secret" not in str(lost.value)
    with pytest.raises(InvalidSettings, match="expected hardware out of auto, none"):
        rgb_of(find_source(str(text)), Reading(hardware="steam"))


def test_an_rtsp_server_is_read_over_tcp_and_its_end_is_a_loss() -> None:
    rtsp.require()
    server = rtsp.small_server()
    try:
        reading = read(find_source(server.address), Reading(hardware="none", silence_s=5), Event())
        scaler = VideoReformatter()
        pictures = [to_rgb(grab.frame, scaler, None) for grab in itertools.islice(reading, 10)]
        assert {picture.shape for picture in pictures} == {(96, 160, 3)}
        assert np.abs(pictures[0].astype(int) - pictures[-1]).max() > 100, "the ball moves"
        server.kill()
        with pytest.raises(Unavailable, match=r"rtsp://127\.0\.0\.1"):
            list(reading)
    finally:
        server.kill()
    server.start()
    try:
        with pytest.raises(NotThere, match="404"):
            next(read(find_source(server.address.replace("camera", "cellar")), SOFTWARE, Event()))
    finally:
        server.kill()


def test_a_camera_that_falls_silent_is_lost_after_the_time_that_was_set() -> None:
    rtsp.require()
    server = rtsp.small_server()
    try:
        reading = read(find_source(server.address), Reading(hardware="none", silence_s=1.5), Event())
        next(reading)
        server.freeze()
        start = time.monotonic()
        with pytest.raises(Unavailable, match="is lost: nothing came in time"):
            list(reading)
        assert 1.4 < time.monotonic() - start < 20
    finally:
        server.kill()
