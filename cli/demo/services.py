"""Edge and cloud as child processes of the demo: on free loopback ports, watched, stopped on every way out."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from shared.errors import Unavailable

READY_S = 180.0  # a first start compiles the entropy coder's kernels
STOP_S = 10.0
LOG_LINES = 15
OWN_SETTINGS = ("SIGHTLINE_EDGE_", "SIGHTLINE_CLOUD_")


class Service:
    """One running child. `ready` holds what it announced: its ports."""

    def __init__(self, name: str, process: "subprocess.Popen[bytes]", folder: Path) -> None:
        self.name = name
        self.ready: dict[str, Any] = {}
        self._process = process
        self._log = folder / f"{name}.log"
        self._ready_file = folder / f"{name}.ready"

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.ready['port']}"

    @property
    def pid(self) -> int:
        return self._process.pid

    async def wait_ready(self) -> None:
        """Returns once it serves. Raises Unavailable with the end of its log if it ends before, or is too slow."""
        deadline = time.monotonic() + READY_S
        while not self._ready_file.exists():
            self.check()
            if time.monotonic() > deadline:
                raise Unavailable(f"the {self.name} service was not ready after {READY_S:.0f} s{self.log_end()}")
            await asyncio.sleep(0.05)
        self.ready = json.loads(self._ready_file.read_text())

    def check(self) -> None:
        """Raises Unavailable with the end of its log if the service has ended."""
        code = self._process.poll()
        if code is not None:
            how = f"with exit code {code}" if code >= 0 else f"by {signal.Signals(-code).name}"
            raise Unavailable(f"the {self.name} service ended {how}{self.log_end()}")

    def log_end(self) -> str:
        lines = self._log.read_text(errors="replace").splitlines()[-LOG_LINES:]
        return f"; the end of its log:\n{os.linesep.join(lines)}" if lines else "; its log is empty"

    def stop(self) -> None:
        """SIGTERM, and SIGKILL if that is not enough."""
        if self._process.poll() is None:
            self._process.terminate()
        try:
            self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


@contextmanager
def service(name: str, flags: Sequence[str], folder: Path) -> Iterator[Service]:
    """Runs ``sightline`` `name` with `flags` on free ports; its log and ready file go to `folder`. Settings that the
    caller's environment holds for services of its own do not reach it."""
    ready = folder / f"{name}.ready"
    arguments = [name, "--listen", "127.0.0.1:0", "--metrics-listen", "", "--ready-file", str(ready), *flags]
    with running(name, arguments, folder) as child:
        yield child


@contextmanager
def running(name: str, arguments: Sequence[str], folder: Path) -> Iterator[Service]:
    """Runs ``sightline`` with `arguments`; its log goes to `folder`."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(OWN_SETTINGS)}
    environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # two services share this machine's cores
    command = [sys.executable, "-P", "-m", "cli.demo.child", str(os.getpid()), *arguments]
    with (folder / f"{name}.log").open("wb") as log:
        process = subprocess.Popen(  # noqa: S603 - our own interpreter and our own module
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
    child = Service(name, process, folder)
    try:
        yield child
    finally:
        child.stop()
