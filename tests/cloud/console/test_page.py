"""The console in a real browser: live news are seen, events are found and replayed, fifty cameras stay responsive, and
neither keyboard nor screen reader is left out. The `page` fixture fails a test in which the browser had to complain.
"""

import hashlib
from pathlib import Path

from playwright.async_api import Browser, Page, expect

from shared.codec.codec import Codec
from shared.codec.types import Bitstream
from tests.cloud.conftest import StartCloud
from tests.cloud.harness import RunningCloud, spot_frame

DRAWN = """(canvas) => {
  const copy = new OffscreenCanvas(canvas.width, canvas.height).getContext("2d", {willReadFrequently: true});
  copy.drawImage(canvas, 0, 0);
  const pixels = copy.getImageData(0, 0, canvas.width, canvas.height).data;
  let count = 0;
  for (let i = 3; i < pixels.length; i += 4) count += pixels[i] > 0;
  return count / (canvas.width * canvas.height);
}"""


async def shown(page: Page) -> None:
    """Waits for the first tile's picture, and so for what is drawn over it."""
    await expect(page.locator(".tile .view img").first).to_have_js_property("naturalWidth", 64)


async def test_a_frame_is_seen_live_with_its_box_and_mask(
    watched: RunningCloud, page: Page, spot: Bitstream, codec: Codec
) -> None:
    await page.goto(watched.console)
    await expect(page.get_by_role("status").filter(has_text="Live")).to_be_visible()
    await expect(page.get_by_text("No camera has sent a frame")).to_be_visible()
    async with watched.edge() as edge:
        await edge.deliver("gate", 1, spot)
        await shown(page)
        drawn = await page.locator(".tile canvas").evaluate(DRAWN)
        assert 0.12 < drawn < 0.4  # a quarter of a square picture that three quarters of the tile show
        await expect(page.locator(".tile .found")).to_have_text("kite")
        first = await page.locator(".tile .view img").get_attribute("src")

        await edge.deliver("gate", 2, codec.encode(spot_frame(0, 0, 12), 8))  # live, without a reload
        await expect(page.locator(".tile .view img")).not_to_have_attribute("src", first or "")
        assert await page.locator(".tile canvas").evaluate(DRAWN) < 0.1


async def test_events_are_found_opened_and_replayed_by_keyboard(
    watched: RunningCloud, page: Page, spot: Bitstream, red: Bitstream
) -> None:
    async with watched.edge() as edge:
        for seq in range(3):
            await edge.deliver("gate", seq, spot)
        await edge.deliver("door", 0, red)
    await page.goto(watched.console + "events")
    await expect(page.locator(".results li")).to_have_count(4)
    await expect(page.locator(".results")).to_contain_text("cannot look at red pictures")
    await page.get_by_label("Class").select_option("kite")
    await page.get_by_role("button", name="Search").press("Enter")
    await expect(page.locator(".results li")).to_have_count(3)
    assert "category=38" in page.url
    oldest = page.locator(".results button").nth(2)
    await oldest.focus()
    await oldest.press("Enter")
    await expect(page.get_by_role("heading", name="kite")).to_be_visible()
    await expect(page.locator(".watch .objects")).to_contain_text("kite")
    assert "event=1" in page.url
    replay = page.get_by_role("button", name="Replay")
    await expect(replay).to_be_enabled()
    await replay.press("Enter")
    await page.wait_for_url("**event=3*")  # it came to the end by itself
    await expect(page.get_by_role("button", name="Replay")).to_be_visible()
    await page.reload()  # the address says it all
    await expect(page.locator(".results li")).to_have_count(3)
    await expect(page.get_by_role("heading", name="kite")).to_be_visible()


async def test_a_camera_has_its_charts_which_arrow_keys_read(
    watched: RunningCloud, page: Page, spot: Bitstream
) -> None:
    async with watched.edge() as edge:
        await edge.deliver("gate", 1, spot)
        await page.goto(watched.console)
        await page.get_by_role("link", name="gate").press("Enter")
        await expect(page.get_by_role("heading", level=1, name="gate")).to_be_visible()
        charts = page.locator(".chart svg")
        await expect(charts).to_have_count(4)
        said = await charts.first.get_attribute("aria-label")
        assert said is not None
        assert said.startswith("Rate, last 5 minutes: mean ")
        await charts.first.focus()
        await charts.first.press("ArrowLeft")
        assert "2 s ago" in (await charts.first.get_attribute("aria-label") or "")
        await expect(page.locator(".facts")).to_contain_text("64 × 64")  # noqa: RUF001 - what the page shows
        await page.get_by_role("checkbox", name="Boxes").uncheck()
        await page.get_by_role("checkbox", name="Masks").uncheck()
        assert await page.locator(".view canvas").evaluate(DRAWN) == 0


LONG = "a-camera-with-a-very-long-name-" + 33 * "x"  # as long as names may be


async def test_every_control_has_a_name_and_narrow_screens_lose_nothing(
    watched: RunningCloud, page: Page, spot: Bitstream, red: Bitstream
) -> None:
    async with watched.edge(64 * "e") as edge:
        await edge.deliver(LONG, 0, red)
        await edge.deliver(LONG, 1, spot)
        hard = {  # what must have arrived before anything is measured
            "": ".tile .found:text('kite')",
            "events": f".results li:nth-child(2):has-text('{LONG}')",
            "events?event=2": ".watch h2:text('kite')",
            "events?event=1": ".watch dd:text('cannot look at red pictures')",
            "system": f"table td:text('{LONG}')",
            f"camera/{LONG}": ".facts dd:text-matches('^64 . 64$')",
            "camera/" + 64 * "y": ".blank h2:text('Nothing from this camera')",
        }
        await page.set_viewport_size({"width": 360, "height": 740})
        for path, arrived in hard.items():
            await page.goto(watched.console + path)
            await expect(page.get_by_role("status").filter(has_text="Live")).to_be_visible()
            await expect(page.locator(arrived)).to_be_visible()
            wide = await page.evaluate("document.documentElement.scrollWidth")
            assert wide <= 360, path
            nameless = await page.evaluate(
                """[...document.querySelectorAll("a, button, input, select")].filter((e) => e.offsetParent &&
                !(e.getAttribute("aria-label") || e.textContent.trim() || e.closest("label")?.textContent.trim()))
                .map((e) => e.outerHTML)"""
            )
            assert nameless == [], path
            assert await page.locator("h1").count() == 1


async def test_fifty_cameras_on_one_page_stay_responsive(start_cloud: StartCloud, page: Page, spot: Bitstream) -> None:
    cloud = await start_cloud(console_listen="127.0.0.1:0")
    cameras = [f"camera-{n:02}" for n in range(50)]
    async with cloud.edge() as edge:

        async def send(seq: int) -> None:
            for camera in cameras:
                await edge.send(camera, seq, spot)
            for camera in cameras:
                await edge.answer(camera, seq)

        await send(0)
        await page.goto(cloud.console)
        await expect(page.locator(".tile")).to_have_count(50)
        await page.evaluate(
            """() => { window.longest = 0; let last = performance.now();
            const beat = (now) => { window.longest = Math.max(window.longest, now - last); last = now;
            requestAnimationFrame(beat); }; requestAnimationFrame(beat); }"""
        )
        for seq in range(1, 6):
            await send(seq)
        find = page.get_by_label("Find a camera")
        await find.fill("camera-4")
        await expect(page.locator(".tile")).to_have_count(10)
        await find.fill("")
        await expect(page.locator(".tile .found").last).to_have_text("kite")
        longest_ms = await page.evaluate("window.longest")
        assert longest_ms < 2000, "the page stood still"


async def test_who_is_not_known_logs_in_and_out(
    start_cloud: StartCloud, browser: Browser, tmp_path: Path, spot: Bitstream
) -> None:
    token = hashlib.sha256(b"test").hexdigest()
    (tmp_path / "policy.toml").write_text(
        f"""
[[grant]]
identity = "local"
send = ["*"]
[[grant]]
identity = "token:ann"
subscribe = ["*"]
[tokens]
ann = "{hashlib.sha256(token.encode()).hexdigest()}"
"""
    )
    cloud = await start_cloud(console_listen="127.0.0.1:0", policy=tmp_path / "policy.toml")
    page = await browser.new_page()
    async with cloud.edge() as edge:
        await edge.deliver("gate", 1, spot)
        await page.goto(cloud.console)
        await expect(page.get_by_role("heading", name="Log in")).to_be_visible()
        field = page.get_by_label("Token")
        await expect(field).to_be_focused()
        await field.fill("a wrong one")
        await field.press("Enter")
        await expect(page.get_by_role("alert")).to_contain_text("expected a bearer token that the policy names")
        await field.fill(token)
        await field.press("Enter")
        await expect(page.locator(".tile h2")).to_have_text("gate")
        assert await page.evaluate("document.cookie") == ""  # no script sees the token
        await page.get_by_role("button", name="Log out").click()
        await expect(page.get_by_role("heading", name="Log in")).to_be_visible()


async def test_a_console_that_went_away_is_said_and_found_again(
    watched: RunningCloud, browser: Browser, spot: Bitstream
) -> None:
    first = watched.watched.console
    assert first is not None
    page = await browser.new_page()
    async with watched.edge() as edge:
        await edge.deliver("gate", 1, spot)
        await page.goto(watched.console)
        await shown(page)
        await first.close()
        await expect(page.get_by_role("status").filter(has_text="Connection lost, trying again")).to_be_visible()
        await expect(page.locator(".tile")).to_have_count(1)  # what was seen last stays, greyed
        watched.watched.console = None
        await watched.open_console(watched.console.removeprefix("http://").rstrip("/"))
        await expect(page.get_by_role("status").filter(has_text="Live")).to_be_visible()
        await edge.deliver("door", 1, spot)
        await expect(page.locator(".tile")).to_have_count(2)
