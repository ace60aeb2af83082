"""The client that must be answered whatever others do: a process of its own, so that it shares no event loop with them.

It sends a picture, waits until the cloud has the result on its disk, and sends the next one.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
from sightline.v1 import edge_pb2, edge_pb2_grpc

from shared.rpc import certificates
from shared.rpc.certificates import Names, Pair

PAUSE_S = 0.2
DEADLINE_S = 60.0


class GoodClient:
    """`asking` runs it; afterwards `milliseconds` has each answer's time and `failures` each answer that was none."""

    def __init__(self, port: int, ca: Pair, identity: str, jpeg: bytes) -> None:
        own = certificates.issue(ca, Names("good", uri=[identity]), 1)
        self._given = {
            "port": port,
            "jpeg": jpeg.hex(),
            "ca": ca.certificate.decode(),
            "key": own.key.decode(),
            "certificate": own.certificate.decode(),
        }
        self.milliseconds: list[float] = []
        self.failures: list[str] = []

    @contextmanager
    def asking(self) -> Iterator[None]:
        with tempfile.TemporaryDirectory(prefix="good-") as name:
            given, out, stop = (Path(name) / each for each in ("given", "out", "stop"))
            given.write_text(json.dumps(self._given))
            process = subprocess.Popen(  # noqa: S603 - our own interpreter and module
                [sys.executable, "-m", "bench.hostile_good", str(given), str(out), str(stop)]
            )
            try:
                yield
            finally:
                stop.touch()
                process.wait(DEADLINE_S + 30)
                found = json.loads(out.read_text())
                self.milliseconds, self.failures = found["milliseconds"], found["failures"]


def ask() -> None:
    """Asks until the file `stop` is there. Arguments: what is given, where the answers go, `stop`."""
    given, out, stop = (Path(each) for each in sys.argv[1:])
    told = json.loads(given.read_text())
    credentials = grpc.ssl_channel_credentials(told["ca"].encode(), told["key"].encode(), told["certificate"].encode())
    options = edge_pb2.CompressOptions(delivery=edge_pb2.DELIVERY_PERSISTED)
    request = edge_pb2.CompressRequest(camera_id="good", encoded=bytes.fromhex(told["jpeg"]), options=options)
    milliseconds, failures = [], []
    with grpc.secure_channel(f"localhost:{told['port']}", credentials) as channel:
        stub = edge_pb2_grpc.EdgeServiceStub(channel)
        while not stop.exists():
            start = time.perf_counter()
            try:
                receipt = stub.Compress(request, timeout=DEADLINE_S).receipt
                if receipt.state != edge_pb2.RECEIPT_STATE_PERSISTED:
                    failures.append(f"a receipt in state {receipt.state}")
            except grpc.RpcError as error:
                failures.append(f"{error.code()}: {error.details()}")
            milliseconds.append((time.perf_counter() - start) * 1e3)
            time.sleep(PAUSE_S)
    out.write_text(json.dumps({"milliseconds": milliseconds, "failures": failures}))


if __name__ == "__main__":
    ask()
