"""`sightline certs`: what it writes is what TLS and the policy take."""

import stat
from pathlib import Path

from shared.rpc.certificates import inspect, require_pair
from shared.rpc.policy import Policy
from tests.cli.conftest import Sightline


def test_an_authority_signs_and_renews_certificates_whose_keys_only_their_owner_reads(
    sightline: Sightline, tmp_path: Path
) -> None:
    folder = tmp_path / "certs"
    assert sightline("certs", "authority", folder).code == 0
    names = ("--uri", "spiffe://example.org/edge/1", "--dns", "edge.example.org", "--ip", "127.0.0.1")
    seen = set()
    for _ in range(2):
        assert sightline("certs", "issue", folder, "edge", *names, "--days", "30").code == 0
        found = inspect((folder / "edge.pem").read_bytes(), "edge.pem")
        require_pair(found, (folder / "edge.key").read_bytes(), "edge.key")
        assert found.names == ("spiffe://example.org/edge/1", "dns:edge.example.org", "ip:127.0.0.1")
        assert 29.9 < found.seconds_left() / 86_400 < 30.1
        seen.add(found.public_key)
    assert len(seen) == 2
    for key in folder.glob("*.key"):
        assert stat.S_IMODE(key.stat().st_mode) == 0o600


def test_an_authority_is_never_written_over(sightline: Sightline, tmp_path: Path) -> None:
    assert sightline("certs", "authority", tmp_path).code == 0
    before = (tmp_path / "ca.key").read_bytes()
    ended = sightline("certs", "authority", tmp_path)
    assert (ended.code, "is there already" in ended.err) == (1, True)
    assert sightline("certs", "issue", tmp_path, "ca", "--dns", "x").code == 1
    assert sightline("certs", "issue", tmp_path, "nameless").code == 1
    assert (tmp_path / "ca.key").read_bytes() == before


def test_a_tokens_line_names_its_holder_and_does_not_hold_it(sightline: Sightline, tmp_path: Path) -> None:
    ended = sightline("certs", "token", tmp_path / "t", "console")
    made = (tmp_path / "t").read_text().strip()
    assert made not in ended.out
    assert Policy.parse(f"[tokens]\n{ended.out}".encode()).token_identity(made) == "token:console"
    assert sightline("certs", "token", tmp_path / "u", "two words").code == 2
    assert not (tmp_path / "u").exists()
