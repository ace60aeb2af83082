"""`sightline doctor`: what would not work is said before it does not, with what to do."""

import shutil
import socket
from pathlib import Path

import pytest

from shared.codec import bundle
from shared.rpc.certificates import Names
from tests.cli.conftest import Sightline
from tests.cloud.conftest import StartCloud, start_cloud
from tests.shared.authority import EDGE, POLICY, Authority

__all__ = ["start_cloud"]
FREE = ("--listen", "127.0.0.1:0", "--metrics-listen", "")


@pytest.fixture
def edge(tmp_path: Path) -> tuple[str, ...]:
    """Settings with which nothing is wrong."""
    return ("doctor", "edge", *FREE, "--data-dir", str(tmp_path / "data"), "--spool-max-bytes", "16MiB")


def test_a_healthy_edge_has_no_fault(sightline: Sightline, edge: tuple[str, ...]) -> None:
    ended = sightline(*edge)
    assert (ended.code, ended.out.splitlines()[-1]) == (0, "nothing stands in the way")
    assert "hash as in its manifest" in ended.out


def test_each_fault_is_named_with_what_to_do(sightline: Sightline, edge: tuple[str, ...], tmp_path: Path) -> None:
    authority = Authority(tmp_path / "certs")
    expired, key = authority.issue("expired", Names("old", uri=[EDGE]), days=-1)
    policy = tmp_path / "policy.toml"
    policy.write_text("[[grant]]\nidentity = 1\n")
    damaged = tmp_path / "damaged"
    shutil.copytree(bundle.WEIGHTS / "detection", damaged)
    weights = bytearray((damaged / bundle.TENSORS).read_bytes())
    weights[-1] ^= 1
    (damaged / bundle.TENSORS).write_bytes(weights)
    ended = sightline(
        *(*edge, "--policy", policy, "--models", damaged, "--device", "cuda:7", "--cloud", "127.0.0.1:1"),
        *("--cloud-ca", authority.ca, "--cloud-certificate", expired, "--cloud-key", key),
    )
    faults = {line.split()[1] for line in ended.out.splitlines() if line.startswith("fault")}
    assert ended.code == 1
    assert faults == {"device:", "policy:", "cloud_certificate:", "codec", "cloud:"}
    assert ended.out.count("->") >= len(faults)
    assert "grant.0.identity" in ended.out


def test_a_port_that_is_taken_is_worth_a_note(sightline: Sightline, edge: tuple[str, ...]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        ended = sightline(*edge, "--listen", f"127.0.0.1:{taken.getsockname()[1]}")
    assert (ended.code, "cannot be taken" in ended.out) == (0, True)
    opened = sightline(*edge, "--listen", "0.0.0.0:0")
    assert (opened.code, "would be open to the network" in opened.out) == (1, True)


async def test_a_cloud_that_refuses_or_lacks_the_model_is_told_from_one_that_does_not(
    sightline: Sightline,
    edge: tuple[str, ...],
    tmp_path: Path,
    start_cloud: StartCloud,
) -> None:
    import asyncio

    authority = Authority(tmp_path / "certs")
    policy = tmp_path / "policy.toml"
    policy.write_text(POLICY)
    cloud = await start_cloud(**authority.server_settings(), policy=policy)

    async def ask(uri: str) -> tuple[int, str]:
        certificate, key = authority.issue("edge", Names("edge", uri=[uri]))
        ended = await asyncio.to_thread(
            sightline,
            *(*edge, "--cloud", f"localhost:{cloud.server.port}", "--cloud-ca", authority.ca),
            *("--cloud-certificate", certificate, "--cloud-key", key),
        )
        return ended.code, ended.out

    code, said = await ask(EDGE)
    assert (code, "the cloud decodes detection" in said) == (0, True)
    assert "days left" in said  # the test's certificates are good for a day
    code, said = await ask("spiffe://example.org/nobody")
    assert (code, "PERMISSION_DENIED" in said, "grant this edge's identity" in said) == (1, True, True)
    cloud.inference.codecs = {}
    code, said = await ask(EDGE)
    assert (code, "does not decode detection" in said) == (1, True)


def test_a_healthy_cloud_has_no_fault(sightline: Sightline, tmp_path: Path) -> None:
    ended = sightline("doctor", "cloud", *FREE, "--data-dir", tmp_path, "--log-max-bytes", "1MiB")
    assert (ended.code, "task faster-rcnn-mobilenetv2" in ended.out) == (0, True)
