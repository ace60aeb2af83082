"""How a client reaches a service: its address, how it knows the server, and how the server knows it.

Plaintext only on loopback unless `insecure` says otherwise, as everywhere (`shared.rpc.tls`). A channel has its
certificate for life, so the two lines below open a new one when the files changed, before the next call.
"""

from dataclasses import dataclass
from pathlib import Path
from threading import Lock

import grpc

from shared.rpc import tls


@dataclass(frozen=True, slots=True)
class Connection:
    """Where to call, and with what.

    `address`: host:port. `ca`: PEM file of the authority of the server's certificate; given, the connection is TLS.
    `certificate` and `key`: PEM files of this client's own certificate (mTLS). `token`: file with a bearer token in its
    place, read anew for each call (TLS only). `insecure`: allow plaintext to an address that is not loopback.
    `max_message_bytes`: as the server's setting.
    """

    address: str
    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None
    token: Path | None = None
    insecure: bool = False
    max_message_bytes: int = 32 << 20

    def credentials(self) -> tls.RenewedCredentials:
        """Raises InvalidSettings."""
        tls.split_address(self.address, "address")
        return tls.RenewedCredentials(
            self.address,
            self.ca,
            self.certificate,
            self.key,
            insecure=self.insecure,
            setting="address",
            token=self.token,
        )

    def options(self) -> list[tuple[str, int]]:
        """gRPC's, for a channel."""
        return [
            ("grpc.max_send_message_length", self.max_message_bytes),
            ("grpc.max_receive_message_length", self.max_message_bytes),
            # A dead peer is noticed within 30 s, also under a subscription on which nothing comes.
            ("grpc.keepalive_time_ms", 20_000),
            ("grpc.keepalive_timeout_ms", 10_000),
            ("grpc.http2.max_pings_without_data", 0),
            # gRPC's own pauses between connections grow to 120 s, which would hide a server that is back.
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.min_reconnect_backoff_ms", 100),
            ("grpc.max_reconnect_backoff_ms", 2_000),
            # After its server went, a client must not be tied to the connection of another client.
            ("grpc.use_local_subchannel_pool", 1),
        ]


class BlockingLine:
    """The channel of a client for threads. Raises InvalidSettings."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._credentials = connection.credentials()
        self._lock = Lock()
        self._used = self._credentials.get()
        self._channel = self._open()

    def channel(self) -> grpc.Channel:
        """The one to call on now. When its files have changed, calls under way on the one before break off, to be tried
        again on this."""
        wanted = self._credentials.get()
        with self._lock:
            if wanted is not self._used:
                self._channel.close()
                self._used = wanted
                self._channel = self._open()
            return self._channel

    def close(self) -> None:
        with self._lock:
            self._channel.close()

    def _open(self) -> grpc.Channel:
        address, options = self._connection.address, self._connection.options()
        if self._used is None:
            return grpc.insecure_channel(address, options=options)
        return grpc.secure_channel(address, self._used, options=options)


class AsyncLine:
    """The channel of a client for asyncio; made inside a running loop. Raises InvalidSettings."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._credentials = connection.credentials()
        self._used = self._credentials.get()
        self._channels = [self._open()]

    def channel(self) -> grpc.aio.Channel:
        """The one to call on now. Those before stay open to the end: closing one would cancel the tasks that call."""
        wanted = self._credentials.get()
        if wanted is not self._used:
            self._used = wanted
            self._channels.append(self._open())
        return self._channels[-1]

    async def close(self) -> None:
        for channel in self._channels:
            await channel.close()

    def _open(self) -> grpc.aio.Channel:
        address, options = self._connection.address, self._connection.options()
        if self._used is None:
            return grpc.aio.insecure_channel(address, options=options)
        return grpc.aio.secure_channel(address, self._used, options=options)
