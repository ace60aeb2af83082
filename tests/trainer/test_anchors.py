"""The anchors code as deployed encoders do, count what a transmission would carry, and are coded once."""

from dataclasses import replace

import numpy as np
import pytest
from skimage import data

from shared.errors import InvalidInput, InvalidSettings, Unavailable
from trainer.evaluation import anchors, bits
from trainer.evaluation.anchors import Anchor, Point, anchor_by_name
from trainer.evaluation.coded_store import CodedStore, Job, encode_jobs, pixels_sha256
from trainer.evaluation.pictures import read_rgb

VIDEO = ("hevc:medium", "av1:6", "vvc:faster")


@pytest.fixture(scope="module")
def face() -> np.ndarray:
    """uint8 [151, 135, 3], odd on both sides."""
    return np.ascontiguousarray(data.astronaut()[0:151, 150:285])


def psnr_db(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.mean((a.astype(np.float64) - b) ** 2)))


@pytest.mark.parametrize(
    ("name", "quantiser"), [("hevc:medium", 10), ("vvc:faster", 10), ("vvc:medium", 10), ("av1:6", 5)]
)
def test_a_fine_quantiser_gives_more_than_40_db(face: np.ndarray, name: str, quantiser: int) -> None:
    # A wrong matrix or range on either way costs more than 10 dB. AV1's CRF is not a QP: 10 is coarser than QP 10.
    anchor, point = anchor_by_name(name), Point(quantiser)
    decoded = anchor.decode(anchor.encode(face, point).data, point, *face.shape[:2])
    assert psnr_db(decoded, face) > 40


@pytest.mark.parametrize("name", VIDEO)
@pytest.mark.parametrize("colour", [(0, 0, 0), (255, 255, 255), (200, 30, 30), (20, 40, 220)])
def test_a_flat_colour_comes_back_as_it_was(name: str, colour: tuple[int, int, int]) -> None:
    anchor, point = anchor_by_name(name), Point(10)
    picture = np.full((64, 64, 3), colour, np.uint8)
    decoded = anchor.decode(anchor.encode(picture, point).data, point, 64, 64)
    assert np.abs(decoded.astype(int) - picture).max() <= 3


@pytest.mark.parametrize("name", ["jpeg", *VIDEO])
def test_every_setting_gives_back_the_original_size(face: np.ndarray, name: str) -> None:
    anchor = anchor_by_name(name)
    for point in (Point(anchor.quantisers[3], 75), Point(anchor.quantisers[-1], 25)):
        decoded = anchor.decode(anchor.encode(face, point).data, point, *face.shape[:2])
        assert decoded.shape == face.shape


@pytest.mark.parametrize("name", ["jpeg", *VIDEO])
def test_the_grid_runs_from_fine_to_coarse(face: np.ndarray, name: str) -> None:
    anchor = anchor_by_name(name)
    first, last = (Point(q) for q in (anchor.quantisers[1], anchor.quantisers[5]))
    fine, coarse = anchor.encode(face, first), anchor.encode(face, last)
    assert fine.picture_bits > 3 * coarse.picture_bits
    shape = face.shape[:2]
    assert psnr_db(anchor.decode(fine.data, first, *shape), face) > psnr_db(
        anchor.decode(coarse.data, last, *shape), face
    )


@pytest.mark.parametrize("name", VIDEO)
def test_bits_leave_out_parameter_sets_and_are_less_than_the_file(face: np.ndarray, name: str) -> None:
    anchor = anchor_by_name(name)
    coded = anchor.encode(face, Point(anchor.quantisers[4]))
    left_out = len(coded.data) - coded.picture_bits / 8
    assert 5 <= left_out <= 200  # bytes: HEVC and VVC spend 80 to 130 on parameter sets, AV1 13


def test_bits_of_annex_b_streams_by_hand() -> None:
    start = b"\x00\x00\x00\x01"
    vvc = start + bytes([0, 15 << 3, 9, 9]) + start + bytes([0, 17 << 3, 7]) + start + bytes([0, 8 << 3, 5, 5, 5])
    assert bits.vvc_picture_bits(vvc) == 8 * 5
    assert bits.vvc_picture_bits(vvc + start + bytes([0, 23 << 3, 1, 2, 3])) == 8 * 5  # SEI
    hevc = start + bytes([33 << 1, 1, 9]) + b"\x00\x00\x01" + bytes([20 << 1, 1, 5, 5]) + start + bytes([39 << 1, 1, 3])
    assert bits.hevc_picture_bits(hevc) == 8 * 4
    with pytest.raises(InvalidInput, match="start code"):
        bits.vvc_picture_bits(b"vvenc [info]: \n" + vvc)


def test_bits_of_obus_by_hand() -> None:
    delimiter, sequence, frame = bytes([0x12, 0]), bytes([0x0A, 2, 1, 1]), bytes([0x32, 3, 7, 7, 7])
    assert bits.av1_picture_bits(delimiter + sequence + frame) == 8 * len(frame)
    with pytest.raises(InvalidInput, match="ends inside"):
        bits.av1_picture_bits(delimiter + frame[:-1])


def test_bits_of_a_jpeg_are_its_huffman_tables_and_scan(face: np.ndarray) -> None:
    stream = anchor_by_name("jpeg").encode(face, Point(55)).data
    left_out = 2 + 18 + 2 * 69 + 19 + 2  # SOI, JFIF APP0, two DQT, SOF0, EOI
    assert bits.jpeg_picture_bits(stream) == 8 * (len(stream) - left_out)
    with_comment = stream[:2] + b"\xff\xfe\x00\x04hi" + stream[2:]
    assert bits.jpeg_picture_bits(with_comment) == bits.jpeg_picture_bits(stream)


def test_a_picture_is_encoded_once(face: np.ndarray, tmp_path) -> None:
    def never(rgb: np.ndarray, quantiser: int) -> bytes:
        raise AssertionError("encoded again")

    anchor, point, store = anchor_by_name("hevc:medium"), Point(36), CodedStore(tmp_path)
    name = pixels_sha256(face)
    assert store.get(anchor, name, point) is None
    first = store.encode(anchor, face, name, point)
    again = store.encode(replace(anchor, compress=never), face, name, point)
    assert (again.data, again.picture_bits) == (first.data, first.picture_bits)


def test_a_damaged_entry_is_encoded_again(face: np.ndarray, tmp_path) -> None:
    anchor, point, store = anchor_by_name("jpeg"), Point(35), CodedStore(tmp_path)
    name = pixels_sha256(face)
    first = store.encode(anchor, face, name, point)
    path = store.path(anchor, name, point)
    path.write_bytes(path.read_bytes()[:-9])
    assert store.get(anchor, name, point) is None
    assert store.encode(anchor, face, name, point).data == first.data


def test_other_settings_are_other_entries(face: np.ndarray, tmp_path) -> None:
    store, name = CodedStore(tmp_path), pixels_sha256(face)
    paths = {store.path(anchor_by_name(preset), name, Point(37)) for preset in ("vvc:fast", "vvc:medium", "hevc")}
    paths |= {store.path(anchor_by_name("vvc:fast"), name, point) for point in (Point(32), Point(37, 50))}
    paths |= {store.path(anchor_by_name("vvc:fast"), pixels_sha256(face[:-1]), Point(37))}
    assert len(paths) == 6


def test_several_workers_make_what_one_makes(tmp_path) -> None:
    from PIL import Image

    pictures = [tmp_path / f"{index}.png" for index in range(3)]
    for index, path in enumerate(pictures):
        Image.fromarray(data.coffee()[index * 40 : index * 40 + 64, :80]).save(path)
    anchor = anchor_by_name("hevc:medium")
    jobs = [Job(anchor, path, Point(q)) for path in pictures for q in (31, 46)]
    made = {
        (job.picture, job.point): coded.data
        for job, coded in encode_jobs(CodedStore(tmp_path / "two"), jobs, workers=2)
    }
    assert made == {(job.picture, job.point): anchor.encode(read_rgb(job.picture), job.point).data for job in jobs}


def test_a_missing_encoder_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(anchors, "ffmpeg_program", lambda: ("/opt/ffmpeg", "ffmpeg version 4", frozenset({"libx265"})))
    assert isinstance(anchor_by_name("hevc"), Anchor)
    with pytest.raises(Unavailable, match=r"libvvenc.*ffmpeg version 4"):
        anchor_by_name("vvc")
    with pytest.raises(Unavailable, match="libaom-av1"):
        anchor_by_name("av1")


@pytest.mark.parametrize("name", ["", "webp", "vvc:best", "jpeg:90", "av1:slow", "av1:12"])
def test_an_unknown_anchor_is_refused(name: str) -> None:
    with pytest.raises(InvalidSettings, match="anchor must be"):
        anchor_by_name(name)


def test_an_encoder_that_fails_says_why(face: np.ndarray) -> None:
    with pytest.raises(Unavailable, match="exited with"):
        anchor_by_name("vvc:faster").encode(face, Point(99))
