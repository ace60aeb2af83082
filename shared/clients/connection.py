"""How a client reaches a service: its address, how it knows the server, and how the server knows it.

Plaintext only on loopback unless `insecure` says otherwise, as everywhere (`shared.rpc.tls`).
"""

from dataclasses import dataclass
from pathlib import Path

import grpc

from shared.rpc import tls


@dataclass(frozen=True, slots=True)
class Connection:
    """Where to call, and with what.

    `address`: host:port. `ca`: PEM file of the authority of the server's certificate; given, the connection is TLS.
    `certificate` and `key`: PEM files of this client's own certificate (mTLS). `token`: file with a bearer token in its
    place, read anew for each call (TLS only). `insecure`: allow plaintext to an
    address that is not loopback. `max_message_bytes`: as the server's setting.
    """

    address: str
    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None
    token: Path | None = None
    insecure: bool = False
    max_message_bytes: int = 32 << 20

    def open(self) -> grpc.aio.Channel:
        """For asyncio; inside a running loop. Raises InvalidSettings."""
        credentials = self._credentials()
        if credentials is None:
            return grpc.aio.insecure_channel(self.address, options=self._options())
        return grpc.aio.secure_channel(self.address, credentials, options=self._options())

    def open_blocking(self) -> grpc.Channel:
        """For threads. Raises InvalidSettings."""
        credentials = self._credentials()
        if credentials is None:
            return grpc.insecure_channel(self.address, options=self._options())
        return grpc.secure_channel(self.address, credentials, options=self._options())

    def _credentials(self) -> grpc.ChannelCredentials | None:
        tls.split_address(self.address, "address")
        return tls.channel_credentials(
            self.address,
            self.ca,
            self.certificate,
            self.key,
            insecure=self.insecure,
            setting="address",
            token=self.token,
        )

    def _options(self) -> list[tuple[str, int]]:
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
