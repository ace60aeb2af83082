"""The demo's page: one file, readable without scripts, sound for readers of all kinds, and alive in a real browser."""

import json
import re
import shutil
import subprocess
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest

from cli.demo.page import kilobytes, render
from cli.demo.results import STAGES, Coded, Demo, Found, Picture
from cli.demo.table import as_rows, print_table
from shared.codec.types import Frame

VOID = {"meta", "link", "img", "input", "path", "circle", "br"}
QUALITIES = (2.0, 4.0, 6.5)


def picture(name: str, frame: Frame, found: list[Found], kept: list[int]) -> Picture:
    """`kept`: how many of `found` are still found at each quality."""
    coded = [
        Coded(
            quality=quality,
            sent_bytes=1000 * (n + 2),
            rgb=frame.rgb,
            found=found[: kept[n]],
            stages_ms={stage: 1.5 * (i + 1) for i, stage in enumerate(STAGES)},
            round_trip_ms=90.0 + n,
        )
        for n, quality in enumerate(QUALITIES)
    ]
    return Picture(Path(name), frame.rgb, 24_000, name.endswith(".jpg"), found, coded)


@pytest.fixture(scope="module")
def result(photographs: dict[str, Frame]) -> Demo:
    people = [Found((20, 30, 400, 500), 0.93, 1, "person"), Found((380, 300, 511, 420), 0.61, 1, "person")]
    cup = [Found((170, 15, 410, 310), 0.88, 47, "cup")]
    hostile = '"><img onerror=alert(1)>&amp;.jpg'
    return Demo(
        pictures=[
            picture("astronaut.png", photographs["astronaut"], people, [1, 2, 2]),
            picture(hostile, photographs["coffee"], cup, [1, 1, 1]),
            picture("nothing_here.png", Frame(photographs["chelsea"].rgb[:1, :1]), [], [0, 0, 0]),
        ],
        qualities=QUALITIES,
        shown_quality=4.0,
        codec="detection",
        model_id="0123456789ab" * 5,
        task="faster-rcnn-mobilenetv2",
        version="0.1.0",
    )


@pytest.fixture(scope="module")
def page(result: Demo) -> str:
    return render(result)


class Reader(HTMLParser):
    """Elements with their attributes; fails on tags that do not nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self._open: list[str] = []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def of(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]


def test_nothing_is_fetched_from_anywhere(page: str) -> None:
    reader = Reader(page)
    for _, attributes in reader.elements:
        for name in ("src", "href", "srcset", "poster", "data", "action"):
            assert attributes.get(name, "data:").startswith("data:"), attributes
    assert not re.search(r"@import|url\((?!['\"]?data:)", page)
    assert not reader.of("iframe")


def test_every_picture_is_described_and_every_reference_has_its_target(page: str) -> None:
    reader = Reader(page)
    assert len(reader.of("img")) == 3 * (1 + 2 * len(QUALITIES))
    assert all(len(image["alt"]) > 10 for image in reader.of("img"))
    ids = Counter(attributes["id"] for _, attributes in reader.elements if "id" in attributes)
    assert set(ids.values()) == {1}
    for _, attributes in reader.elements:
        for name in ("aria-labelledby", "data-box", "for"):
            if name in attributes:
                assert attributes[name] in ids


def test_a_file_name_is_only_ever_text(page: str) -> None:
    assert "alert(1)" in page
    assert "<img onerror" not in page
    assert not any("onerror" in attributes for _, attributes in Reader(page).elements)
    assert page.count("&amp;amp;") > 1


def test_it_opens_at_the_quality_shown(page: str) -> None:
    radios = [attributes for attributes in Reader(page).of("input") if attributes["type"] == "radio"]
    assert [("checked" in radio) for radio in radios] == [False, True, False]
    assert len({radio["name"] for radio in radios}) == 1


def test_what_was_lost_is_said(page: str) -> None:
    assert page.count("lost, was 61 %") == 1
    assert "2 of 3" in page
    assert "3 of 3" in page
    assert "Nothing found, neither here nor on the original." in page


@pytest.mark.parametrize(("count", "said"), [(999, "999 bytes"), (12_345, "12.3 kB"), (2_500_000, "2.50 MB")])
def test_bytes_are_said_for_people(count: int, said: str) -> None:
    assert kilobytes(count) == said


def test_the_table_tells_the_same(result: Demo, capsys: pytest.CaptureFixture[str]) -> None:
    rows = as_rows(result)
    assert len(rows) == 9
    assert rows[1] | {"stages_ms": None} == {
        "input": "astronaut.png",
        "width": 512,
        "height": 512,
        "quality": 4.0,
        "jpeg_bytes": 24_000,
        "jpeg_is_own": False,
        "sent_bytes": 3000,
        "ratio": 8.0,
        "bpp": pytest.approx(0.09155, abs=1e-5),
        "found_on_original": ["person", "person"],
        "found_after_codec": ["person", "person"],
        "still_found": 2,
        "stages_ms": None,
        "round_trip_ms": 91.0,
    }
    assert rows[0]["still_found"] == 1
    print_table(result)
    told = capsys.readouterr().out
    assert "2 person" in told
    assert "8.0x" in told


PROBE = """<script>
window.addEventListener("load", async () => {
  const seen = {errors: window.probed, ratios: [], images: 0, narrow: []};
  for (const radio of document.querySelectorAll("input[type=radio]")) {
    radio.click();
    const shown = [...document.querySelectorAll(".ratio b")].filter((b) => b.offsetParent !== null);
    seen.ratios.push(shown.map((b) => b.textContent));
  }
  for (const image of document.images) seen.images += image.naturalWidth > 0;
  document.documentElement.style.width = "360px";
  seen.wider_than_360px = Math.max(...[...document.querySelectorAll("body *")]
    .filter((e) => e.offsetParent !== null && !e.closest(".scroll, .boxes"))
    .map((e) => e.getBoundingClientRect().right));
  const hold = [...document.querySelectorAll(".hold")].find((button) => button.offsetParent !== null);
  hold.dispatchEvent(new KeyboardEvent("keydown", {key: " "}));
  seen.held = hold.closest(".view").classList.contains("held");
  hold.dispatchEvent(new KeyboardEvent("keyup", {key: " "}));
  seen.let_go = !hold.closest(".view").classList.contains("held");
  const object = [...document.querySelectorAll(".objects button")].find((button) => button.offsetParent !== null);
  object.focus();
  seen.marked = document.querySelectorAll(".box.on").length;
  const probe = document.createElement("pre");
  probe.id = "probe";
  probe.textContent = JSON.stringify(seen);
  document.body.append(probe);
});
</script>"""
CATCH = "<script>window.probed = []; window.onerror = (message) => { window.probed.push(message); };</script>"


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
def test_in_a_real_browser_the_choice_switches_and_nothing_breaks(page: str, tmp_path: Path) -> None:
    file = tmp_path / "index.html"
    file.write_text(page.replace("<head>", "<head>" + CATCH, 1).replace("</body>", PROBE + "</body>"))
    done = subprocess.run(
        [
            *("chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"),
            *("--window-size=500,900", "--virtual-time-budget=20000", "--dump-dom", file.as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    found = re.search(r'<pre id="probe">(.*?)</pre>', done.stdout)
    assert found, "the page's script did not come to its end"
    seen = json.loads(found[1])
    assert seen["errors"] == []
    assert seen["ratios"] == [["12.0×"] * 3, ["8.0×"] * 3, ["6.0×"] * 3]  # noqa: RUF001 - what the page shows
    assert seen["images"] == 3 * (1 + 2 * len(QUALITIES))
    assert seen["wider_than_360px"] <= 361
    assert (seen["held"], seen["let_go"], seen["marked"]) == (True, True, 1)
