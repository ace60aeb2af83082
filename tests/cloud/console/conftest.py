"""A running cloud with its console, and Debian's Chromium to look at it."""

import asyncio
import json
import shutil
import urllib.error
import urllib.request
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import pytest
from playwright.async_api import Browser, Page, async_playwright

from tests.cloud.conftest import StartCloud
from tests.cloud.harness import RunningCloud

CHROMIUM = shutil.which("chromium")


@dataclass(frozen=True)
class Answer:
    status: int
    body: bytes
    headers: dict[str, str]

    @property
    def json(self) -> Any:
        return json.loads(self.body)


async def get(address: str, path: str, *, method: str = "GET", body: bytes | None = None, **headers: str) -> Answer:
    def ask() -> Answer:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        request = urllib.request.Request(address + path.lstrip("/"), body, named, method=method)
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return Answer(response.status, response.read(), dict(response.headers))
        except urllib.error.HTTPError as error:
            return Answer(error.code, error.read(), dict(error.headers))

    return await asyncio.to_thread(ask)


@pytest.fixture
async def watched(start_cloud: StartCloud) -> RunningCloud:
    """A cloud with an open console; `console` is its address."""
    return await start_cloud(console_listen="127.0.0.1:0")


@pytest.fixture
async def browser() -> AsyncIterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("needs chromium")
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        await browser.close()


@pytest.fixture
async def page(browser: Browser) -> AsyncIterator[Page]:
    """A page that must end without a word on its console."""
    page = await browser.new_page(viewport={"width": 1280, "height": 800})
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.set_default_timeout(30_000)
    yield page
    assert said == []
