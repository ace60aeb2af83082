"""The flags with which a command reaches a service: the same names and rules wherever a client is made."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from shared.clients import Connection

EDGE = "127.0.0.1:7411"
CLOUD = "127.0.0.1:7421"

Ca = Annotated[
    Path | None, typer.Option("--ca", metavar="PATH", help="PEM file: authority of the service's certificate (TLS).")
]
Certificate = Annotated[
    Path | None, typer.Option("--certificate", metavar="PATH", help="PEM file: own certificate (mTLS).")
]
Key = Annotated[Path | None, typer.Option("--key", metavar="PATH", help="PEM file: its private key.")]
Token = Annotated[
    Path | None, typer.Option("--token", metavar="PATH", help="File with a bearer token, in place of a certificate.")
]
Insecure = Annotated[
    bool, typer.Option("--insecure", help="Allow plaintext beyond this machine; anyone on the network can read it.")
]


def connection(
    address: str, ca: Path | None, certificate: Path | None, key: Path | None, token: Path | None, insecure: bool
) -> "Connection":
    from shared.clients import Connection

    return Connection(address, ca, certificate, key, token, insecure, max_message_bytes=64 << 20)
