"""Who may read the wire: TLS from files, and plaintext only where nobody else can listen.

Plaintext is taken on loopback addresses and Unix sockets. Anywhere else it must be asked for by the `insecure`
setting, so that no service is open to a network by omission; nor to whoever calls: TLS beyond loopback needs a way to
tell callers apart, an authority of client certificates or a policy with bearer tokens.

A server looks at its files at each handshake (grpc.dynamic_ssl_server_credentials), so that a certificate that was
renewed serves the next connection. A client has its files in a channel for the channel's life and opens a new one when
they change.
"""

import asyncio
import ipaddress
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc

from shared.errors import InvalidSettings
from shared.rpc.reload import Reloaded, ReloadMetrics, read_file

CLIENT_CHECK_S = 1.0


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
    address: str,
    certificate: Path | None,
    key: Path | None,
    client_ca: Path | None,
    *,
    insecure: bool,
    has_policy: bool = False,
    metrics: ReloadMetrics | None = None,
    setting: str = "listen",
) -> grpc.ServerCredentials | None:
    """Credentials to listen with, None for plaintext. Raises InvalidSettings that names `setting`.

    `has_policy`: callers without a certificate are told apart by their bearer tokens.
    """
    if certificate is None and key is None:
        if client_ca is not None:
            raise InvalidSettings("setting tls_client_ca needs tls_certificate and tls_key beside it")
        if not insecure and not is_local(address):
            raise InvalidSettings(
                f"setting {setting}: plaintext on {address} would be open to the network; "
                "give tls_certificate and tls_key, or set insecure to allow it"
            )
        return None
    if certificate is None or key is None:
        raise InvalidSettings("settings tls_certificate and tls_key must be given together")
    if client_ca is None and not has_policy and not insecure and not is_local(address):
        raise InvalidSettings(
            f"setting {setting}: anybody who reaches {address} could call; give tls_client_ca (client certificates) or "
            "policy (bearer tokens), or set insecure to allow it"
        )
    read_file(certificate, "setting tls_certificate")
    read_file(key, "setting tls_key")
    paths = [certificate, key] if client_ca is None else [certificate, key, client_ca]

    served = Reloaded("server certificate", paths, _server_configuration, metrics)
    if metrics is not None:  # asked for at each scrape, so that a renewal is seen also where nobody connects anew
        metrics.expires.labels("server").set_function(lambda: served.get()[1])
    given, _ = served.get()

    def newer() -> Any:
        """Called by gRPC at each handshake, on one of its threads; None: as before."""
        nonlocal given
        now, _ = served.get()
        if now is given:
            return None
        given = now
        return now

    return grpc.dynamic_ssl_server_credentials(given, newer, require_client_authentication=client_ca is not None)


def _server_configuration(files: list[bytes]) -> tuple[Any, float]:
    """grpc.ServerCertificateConfiguration of certificate, key and perhaps the clients' authority, and when the
    certificate ends, Unix seconds. Raises InvalidSettings; gRPC itself would only refuse every handshake."""
    from shared.rpc.certificates import inspect, require_pair  # a library of 0.1 s, for TLS only

    found = inspect(files[0], "setting tls_certificate")
    require_pair(found, files[1], "setting tls_key")
    authority = files[2] if len(files) > 2 else None
    if authority is not None:
        inspect(authority, "setting tls_client_ca")
    configuration = grpc.ssl_server_certificate_configuration([(files[1], files[0])], authority)
    return configuration, found.not_after.timestamp()


def channel_credentials(
    address: str,
    ca: Path | None,
    certificate: Path | None,
    key: Path | None,
    *,
    insecure: bool,
    setting: str,
    token: Path | None = None,
) -> grpc.ChannelCredentials | None:
    """Credentials to call `address` with, None for plaintext. Raises InvalidSettings that names `setting`.

    `ca`: the authority of the server's certificate. `certificate` and `key`: this client's own, for mTLS. `token`: file
    with a bearer token, read anew for each call and never sent in plaintext.
    """
    if (certificate is None) != (key is None):
        raise InvalidSettings(f"for {setting}, a client certificate and its key must be given together")
    if ca is None:
        if certificate is not None:
            raise InvalidSettings(f"for {setting}, a client certificate needs the server's authority beside it")
        if token is not None:
            raise InvalidSettings(f"for {setting}, a bearer token needs the server's authority (TLS) beside it")
        if not insecure and not is_local(address):
            raise InvalidSettings(
                f"setting {setting}: plaintext to {address} could be read on the network; "
                "give the server's authority (TLS), or set insecure to allow it"
            )
        return None
    from shared.rpc.certificates import inspect, require_pair  # a library of 0.1 s, for TLS only

    authority = read_file(ca, f"authority for {setting}")
    inspect(authority, f"authority for {setting}")
    chain = private = None
    if certificate is not None and key is not None:
        chain, private = read_file(certificate, f"certificate for {setting}"), read_file(key, f"key for {setting}")
        require_pair(inspect(chain, f"certificate for {setting}"), private, f"key for {setting}")
    credentials = grpc.ssl_channel_credentials(authority, private, chain)
    if token is None:
        return credentials
    _read_token(token, setting)
    return grpc.composite_channel_credentials(
        credentials, grpc.metadata_call_credentials(_BearerToken(token, setting), name="sightline-token")
    )


class RenewedCredentials:
    """`channel_credentials` as of the last change of their files that made sense. Raises as it does, at once."""

    def __init__(
        self,
        address: str,
        ca: Path | None,
        certificate: Path | None,
        key: Path | None,
        *,
        insecure: bool,
        setting: str,
        token: Path | None = None,
        metrics: ReloadMetrics | None = None,
    ) -> None:
        def make(files: list[bytes]) -> grpc.ChannelCredentials | None:
            made = channel_credentials(address, ca, certificate, key, insecure=insecure, setting=setting, token=token)
            if certificate is not None and metrics is not None:
                from shared.rpc.certificates import inspect

                own = inspect(files[paths.index(certificate)], f"certificate for {setting}")
                metrics.expires.labels("client").set(own.not_after.timestamp())
            return made

        paths = [path for path in (ca, certificate, key) if path is not None]
        channel_credentials(address, ca, certificate, key, insecure=insecure, setting=setting, token=token)
        self._files = Reloaded("client certificate", paths, make, metrics)

    def get(self) -> grpc.ChannelCredentials | None:
        return self._files.get()

    async def watch(self, on_change: Callable[[], None], every_s: float = CLIENT_CHECK_S) -> None:
        """Calls `on_change` after each change, until it is cancelled."""
        seen = self._files.changes
        while True:
            await asyncio.sleep(every_s)
            await asyncio.to_thread(self.get)
            if self._files.changes != seen:
                seen = self._files.changes
                on_change()


class _BearerToken(grpc.AuthMetadataPlugin):
    """Says `authorization: Bearer TOKEN` with each call, from a file that may be renewed."""

    def __init__(self, path: Path, setting: str) -> None:
        self._path = path
        self._setting = setting

    def __call__(self, context: grpc.AuthMetadataContext, callback: grpc.AuthMetadataPluginCallback) -> None:
        try:
            token = _read_token(self._path, self._setting)
        except InvalidSettings as error:
            callback((), error)
        else:
            callback((("authorization", f"Bearer {token}"),), None)


def _read_token(path: Path, setting: str) -> str:
    token = read_file(path, f"token for {setting}").strip()
    if not (token.isascii() and token.decode("ascii").isprintable() and 16 <= len(token) <= 4096):
        raise InvalidSettings(
            f"token for {setting} must hold 16 to 4096 printable ASCII characters, got {len(token)} bytes in {path}"
        )
    return token.decode("ascii")


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
