"""Who may read the wire: TLS from files, and plaintext only where nobody else can listen.

Plaintext is taken on loopback addresses and Unix sockets. Anywhere else it must be asked for by the `insecure`
setting, so that no service is open to a network by omission.
"""

import ipaddress
from pathlib import Path

import grpc

from shared.errors import InvalidSettings


def is_local(address: str) -> bool:
    """Whether only this machine can reach `address` (host:port, [v6]:port, or unix:path)."""
    if address.startswith("unix:"):
        return True
    host = address.rpartition(":")[0].strip("[]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def split_address(address: str, setting: str) -> tuple[str, int]:
    """host:port as its parts. Raises InvalidSettings that names `setting`."""
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isdecimal() or int(port) > 65535:
        raise InvalidSettings(f"setting {setting} must be host:port with a port up to 65535, got {address!r}")
    return host.strip("[]"), int(port)


def server_credentials(
    address: str, certificate: Path | None, key: Path | None, client_ca: Path | None, *, insecure: bool
) -> grpc.ServerCredentials | None:
    """Credentials to listen with, None for plaintext. Raises InvalidSettings."""
    if certificate is None and key is None:
        if client_ca is not None:
            raise InvalidSettings("setting tls_client_ca needs tls_certificate and tls_key beside it")
        if not insecure and not is_local(address):
            raise InvalidSettings(
                f"setting listen: plaintext on {address} would be open to the network; "
                "give tls_certificate and tls_key, or set insecure to allow it"
            )
        return None
    if certificate is None or key is None:
        raise InvalidSettings("settings tls_certificate and tls_key must be given together")
    return grpc.ssl_server_credentials(
        [(_read(key, "tls_key"), _read(certificate, "tls_certificate"))],
        root_certificates=_read(client_ca, "tls_client_ca") if client_ca else None,
        require_client_auth=client_ca is not None,
    )


def channel_credentials(
    address: str, ca: Path | None, certificate: Path | None, key: Path | None, *, insecure: bool, setting: str
) -> grpc.ChannelCredentials | None:
    """Credentials to call `address` with, None for plaintext. Raises InvalidSettings that names `setting`.

    `ca`: the authority of the server's certificate. `certificate` and `key`: this client's own, for mTLS.
    """
    if (certificate is None) != (key is None):
        raise InvalidSettings(f"for {setting}, a client certificate and its key must be given together")
    if ca is None:
        if certificate is not None:
            raise InvalidSettings(f"for {setting}, a client certificate needs the server's authority beside it")
        if not insecure and not is_local(address):
            raise InvalidSettings(
                f"setting {setting}: plaintext to {address} could be read on the network; "
                "give the server's authority (TLS), or set insecure to allow it"
            )
        return None
    return grpc.ssl_channel_credentials(
        root_certificates=_read(ca, "ca"),
        private_key=_read(key, "key") if key else None,
        certificate_chain=_read(certificate, "certificate") if certificate else None,
    )


def open_channel(
    address: str, credentials: grpc.ChannelCredentials | None, *, max_message_bytes: int
) -> grpc.aio.Channel:
    """A channel that notices a dead peer within 30 s, also under a stream on which nothing moves."""
    options = [
        ("grpc.max_send_message_length", max_message_bytes),
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.keepalive_time_ms", 20_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.http2.max_pings_without_data", 0),
        # Two channels to one address must be two connections, or the second cannot move to another replica.
        ("grpc.use_local_subchannel_pool", 1),
    ]
    if credentials is None:
        return grpc.aio.insecure_channel(address, options=options)
    return grpc.aio.secure_channel(address, credentials, options=options)


def _read(path: Path, setting: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidSettings(f"setting {setting} must name a readable PEM file, got: {error}") from None
