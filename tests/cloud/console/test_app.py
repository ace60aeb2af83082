"""The console's HTTP side: pictures of what was seen, search, live news, and nobody shown more than Subscribe would."""

import asyncio
import hashlib
import io
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from shared.codec.codec import Codec
from shared.codec.types import Bitstream
from shared.errors import InvalidSettings
from tests.cloud.conftest import StartCloud
from tests.cloud.console.conftest import get
from tests.cloud.harness import EPOCH, RunningCloud

EPOCH_HEX = f"{EPOCH:016x}"


@asynccontextmanager
async def news(address: str, **headers: str) -> AsyncIterator[AsyncIterator[tuple[str, Any]]]:
    """The live stream's messages, by hand: (event, data)."""
    host, _, port = address.removeprefix("http://").rstrip("/").rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    extra = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    writer.write(f"GET /api/live HTTP/1.1\r\nHost: {host}:{port}\r\n{extra}\r\n".encode())

    async def messages() -> AsyncIterator[tuple[str, Any]]:
        event = ""
        while line := await reader.readline():
            text = line.decode().rstrip()
            if text.startswith("event: "):
                event = text.removeprefix("event: ")
            elif text.startswith("data: "):
                yield event, json.loads(text.removeprefix("data: "))

    try:
        async with asyncio.timeout(60):
            yield messages()
    finally:
        writer.close()


async def test_a_picture_is_what_the_networks_saw_decoded_again_from_what_was_kept(
    watched: RunningCloud, spot: Bitstream, codec: Codec
) -> None:
    async with watched.edge() as edge:
        await edge.deliver("gate", 7, spot)
    answer = await get(watched.console, f"/pictures/gate/{EPOCH_HEX}/7")
    assert (answer.status, answer.headers["content-type"]) == (200, "image/jpeg")
    seen = np.asarray(Image.open(io.BytesIO(answer.body))).astype(int)
    assert np.abs(seen - codec.decode(spot).rgb).mean() < 4  # JPEG's own loss
    missing = await get(watched.console, f"/pictures/gate/{EPOCH_HEX}/8")
    assert missing.status == 404
    assert "is not kept" in missing.json["error"]


async def test_news_tell_of_a_camera_what_its_event_says(watched: RunningCloud, spot: Bitstream) -> None:
    async with watched.edge() as edge, news(watched.console) as messages:
        kind, wall = await anext(messages)
        assert (kind, wall["cameras"]) == ("wall", [])
        await edge.deliver("gate", 1, spot)
        kind, told = await anext(messages)
        assert kind == "news"
        camera = told["cameras"][0]
        assert camera["id"] == "gate"
        assert camera["latest"]["objects"] == {"kite": 1}
        found = camera["shown"]["results"][0]["objects"][0]
        assert found["label"] == "kite"
        assert np.abs(np.subtract(found["box"], (16, 16, 48, 48))).max() <= 2
        assert found["mask"]
        at, fps, kbits, bpp, _, objects = camera["rows"][-1]
        assert at % wall["bucket_s"] == 0
        size = len(spot.hyper) + len(spot.latents)
        assert (fps, kbits) == (0.5, pytest.approx(8e-3 * size / 2, abs=0.01))
        assert bpp == pytest.approx(8 * size / 64**2, abs=1e-3)
        assert objects == 1


async def test_a_wall_that_is_opened_late_has_the_last_minutes(watched: RunningCloud, spot: Bitstream) -> None:
    async with watched.edge() as edge:
        for seq in range(3):
            await edge.deliver("gate", seq, spot)
        await edge.deliver("door", 0, spot)
    async with news(watched.console) as messages:
        _, wall = await anext(messages)
    assert [camera["id"] for camera in wall["cameras"]] == ["door", "gate"]
    assert wall["cameras"][1]["latest"]["frame"] == "2"
    assert sum(row[1] for row in wall["cameras"][1]["rows"]) * wall["bucket_s"] == 3


async def test_unwatched_no_picture_is_made(watched: RunningCloud, spot: Bitstream) -> None:
    console = watched.watched.console
    assert console is not None
    async with watched.edge() as edge:
        for seq in range(5):
            await edge.deliver("gate", seq, spot)
        assert console.pictures_made == 0
        assert (await get(watched.console, f"/pictures/gate/{EPOCH_HEX}/4")).status == 200
        assert console.pictures_made == 1
        await edge.deliver("gate", 5, spot)  # looked at now: made as it passes
        await edge.deliver("door", 5, spot)  # not this one
        assert console.pictures_made == 2


async def test_search_finds_by_camera_class_score_and_time_newest_first(
    watched: RunningCloud, spot: Bitstream, red: Bitstream
) -> None:
    async with watched.edge() as edge:
        for seq in range(4):
            await edge.deliver("gate", seq, spot)
        await edge.deliver("door", 0, spot)
        await edge.deliver("gate", 9, red)  # rejected: the network fails on it

    async def found(query: str) -> list[tuple[str, str]]:
        answer = await get(watched.console, f"/api/events?{query}")
        assert answer.status == 200, answer.body
        return [(event["camera"], event["frame"]) for event in answer.json["events"]]

    gate = [("gate", str(seq)) for seq in (3, 2, 1, 0)]
    assert await found("camera=gate&category=38") == gate
    assert await found("category=1") == []
    assert await found("camera=gate&score=0.9") == []
    assert await found("outcome=rejected") == [("gate", "9")]
    assert await found("camera=gate&limit=2") == [("gate", "9"), ("gate", "3")]
    assert await found("camera=gate&after=0&limit=2") == gate[:1:-1]
    records = await watched.log.read(0, 100)
    second_ms = records[1].logged_ns // 1_000_000
    assert ("gate", "0") in await found(f"until={second_ms}")
    assert await found(f"since={records[-1].logged_ns // 1_000_000 + 1}") == []
    page = (await get(watched.console, "/api/events?camera=gate&limit=2")).json
    older = await get(watched.console, f"/api/events?camera=gate&limit=2&before={page['next']}")
    assert [event["frame"] for event in older.json["events"]] == ["2", "1"]


async def test_what_cannot_be_asked_is_said(watched: RunningCloud) -> None:
    for path, status, said in (
        ("/api/events?limit=0", 400, "limit must be in [1, 200], got 0"),
        ("/api/events?score=2", 400, "score must be in [0, 1.0], got 2"),
        ("/api/events?category=cat", 400, "category must be a whole number, got 'cat'"),
        ("/api/events?outcome=lost", 400, "outcome must be one of"),
        ("/api/events/5", 404, "there is no event 5 here"),
        ("/pictures/gate/xyz/1", 400, "expected CAMERA/EPOCH/SEQ of an event"),
        ("/static/../app.py", 404, ""),
        ("/static/index.html", 404, "no file"),
    ):
        answer = await get(watched.console, path)
        assert answer.status == status, path
        assert said in (answer.body.decode() if not said else answer.json["error"])


async def test_the_page_may_load_nothing_from_elsewhere_and_answers_to_its_own_name_only(watched: RunningCloud) -> None:
    page = await get(watched.console, "/")
    assert page.status == 200
    assert "default-src 'none'" in page.headers["content-security-policy"]
    for link in ("/camera/gate", "/events", "/system"):
        assert (await get(watched.console, link)).body == page.body
    elsewhere = await get(watched.console, "/api/events", Host="evil.example:80")
    assert elsewhere.status == 421
    assert "not as 'evil.example:80'" in elsewhere.json["error"]


async def test_an_edge_is_known_while_it_is_connected(watched: RunningCloud, spot: Bitstream) -> None:
    async with watched.edge("roof") as edge:
        await edge.deliver("gate", 1, spot)
        facts = (await get(watched.console, "/api/system")).json
        assert [(e["id"], e["cameras"], e["frames"], e["unanswered"]) for e in facts["edges"]] == [
            ("roof", ["gate"], 1, 0)
        ]
        assert facts["tasks"][0]["name"] == "bright-spot"
        assert facts["kept"]["not_kept"] == 0
        await edge.call.done_writing()
        await edge.reading
        async with asyncio.timeout(30):
            await watched.ingest.until_idle()
    assert (await get(watched.console, "/api/system")).json["edges"] == []


async def test_a_caller_sees_the_cameras_that_the_policy_lets_it_subscribe_to(
    start_cloud: StartCloud, tmp_path: Path, spot: Bitstream
) -> None:
    token = "correct-horse"
    policy = tmp_path / "policy.toml"
    granted = f"""
[[grant]]
identity = "local"
send = ["*"]
[[grant]]
identity = "token:ann"
subscribe = ["gate*"]
[tokens]
ann = "{hashlib.sha256(token.encode()).hexdigest()}"
"""
    policy.write_text(granted)
    cloud = await start_cloud(console_listen="127.0.0.1:0", policy=policy)
    async with cloud.edge() as edge:
        await edge.deliver("gate-1", 1, spot)
        await edge.deliver("door", 1, spot)
        ann = {"Authorization": f"Bearer {token}"}

        # local may send and not look; a wrong token is nobody's; the page itself is anybody's, so that one can log in.
        assert (await get(cloud.console, "/api/events")).status == 403
        assert (await get(cloud.console, "/api/events", Authorization="Bearer wrong")).status == 401
        assert (await get(cloud.console, "/")).status == 200

        events = (await get(cloud.console, "/api/events", **ann)).json["events"]
        assert [event["camera"] for event in events] == ["gate-1"]
        sequence = next(r.sequence for r in await cloud.log.read(0, 9) if r.name.camera == "door")
        assert (await get(cloud.console, f"/api/events/{sequence}", **ann)).status == 404
        assert (await get(cloud.console, f"/pictures/gate-1/{EPOCH_HEX}/1", **ann)).status == 200
        assert (await get(cloud.console, f"/pictures/door/{EPOCH_HEX}/1", **ann)).status == 403

        login = await get(cloud.console, "/api/login", method="POST", body=json.dumps({"token": token}).encode())
        cookie = login.headers["set-cookie"]
        assert login.status == 200
        assert "HttpOnly" in cookie
        assert "samesite=strict" in cookie.lower()
        assert (await get(cloud.console, "/api/whoami", Cookie=cookie.partition(";")[0])).json == {
            "name": "token:ann",
            "by_token": True,
        }
        refused = await get(cloud.console, "/api/login", method="POST", body=b'{"token": "wrong"}')
        assert refused.status == 401

        async with news(cloud.console, **ann) as messages:
            _, wall = await anext(messages)
            assert [camera["id"] for camera in wall["cameras"]] == ["gate-1"]
            policy.write_text(granted.replace("gate*", "nothing-any-more"))
            # Taken back while it watches: no camera is shown from then on.
            async with asyncio.timeout(30):
                while (await get(cloud.console, "/api/events", **ann)).json["events"]:
                    pass  # the policy file is looked at every so often
            await edge.deliver("gate-1", 2, spot)
        assert (await get(cloud.console, f"/pictures/gate-1/{EPOCH_HEX}/1", **ann)).status == 403


async def test_plaintext_beyond_loopback_is_refused_by_name(start_cloud: StartCloud) -> None:
    with pytest.raises(InvalidSettings, match=r"console_listen: plaintext on .* would be open to the network"):
        await start_cloud(console_listen="0.0.0.0:0")
