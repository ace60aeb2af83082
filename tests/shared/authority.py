"""What tests of TLS share: a folder with an authority and the certificates it signed, made in milliseconds."""

from pathlib import Path

import grpc

from shared.rpc import certificates
from shared.rpc.certificates import Names, Pair

EDGE = "spiffe://example.org/edge/north"
ADMIN = "spiffe://example.org/admin"
CONSUMER = "spiffe://example.org/consumer"
NOBODY = "spiffe://example.org/nobody"
POLICY = f"""
[[grant]]
identity = "{EDGE}"
send = ["gate-*"]
[[grant]]
identity = "{CONSUMER}"
subscribe = ["gate-*"]
[[grant]]
identity = "{ADMIN}"
administer = true
"""


class Authority:
    """Certificates by file name, in `folder`."""

    def __init__(self, folder: Path, name: str = "ca") -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.pair = certificates.authority(f"test authority {name}", 1)
        self.ca = folder / "ca.pem"
        self.ca.write_bytes(self.pair.certificate)
        self.issue("server", Names("server", dns=["localhost"], ip=["127.0.0.1"]))

    def issue(self, file: str, names: Names, days: float = 1) -> tuple[Path, Path]:
        """Certificate and key; written over where they are, as a renewal does it."""
        certificate, key = self.folder / f"{file}.pem", self.folder / f"{file}.key"
        certificates.write(certificates.issue(self.pair, names, days), certificate, key)
        return certificate, key

    def client(self, uri: str, days: float = 1) -> Pair:
        return certificates.issue(self.pair, Names("client", uri=[uri]), days)

    def server_settings(self) -> dict[str, Path]:
        return {
            "tls_certificate": self.folder / "server.pem",
            "tls_key": self.folder / "server.key",
            "tls_client_ca": self.ca,
        }

    def credentials(self, own: Pair | None) -> grpc.ChannelCredentials:
        """To call a server of this authority."""
        return grpc.ssl_channel_credentials(
            self.pair.certificate, own.key if own else None, own.certificate if own else None
        )
