"""TLS for the HTTP page with /metrics, /healthz and /readyz: the gRPC port's certificate, and its callers' authority.

The handshake is done by the thread that serves the connection, within its time, so that a caller who does not get on
holds up nobody. Renewed files serve the next connection.
"""

import socket
import ssl
from pathlib import Path
from wsgiref.simple_server import WSGIServer

from shared.errors import InvalidSettings
from shared.rpc.reload import Reloaded, ReloadMetrics

REQUEST_S = 10.0


def speak_tls(http: WSGIServer, certificate: Path, key: Path, client_ca: Path | None, metrics: ReloadMetrics) -> None:
    """Makes an HTTP server speak TLS. Raises InvalidSettings where the files cannot be used."""

    def make(files: list[bytes]) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            context.load_cert_chain(certificate, key)
            if client_ca is not None:
                context.load_verify_locations(cadata=files[2].decode("ascii"))
                context.verify_mode = ssl.CERT_REQUIRED
        except (ssl.SSLError, OSError, UnicodeDecodeError) as error:
            raise InvalidSettings(f"the metrics page's certificate cannot be used: {error}") from None
        return context

    paths = [certificate, key] if client_ca is None else [certificate, key, client_ca]
    context = Reloaded("metrics certificate", paths, make, metrics)
    plain = http.get_request

    def accept() -> tuple[socket.socket, object]:
        connection, peer = plain()
        return context.get().wrap_socket(connection, server_side=True, do_handshake_on_connect=False), peer

    http.get_request = accept  # type: ignore[method-assign]


def bound_requests(http: WSGIServer) -> None:
    """Closes connections on which nothing came for `REQUEST_S`, in TLS or not."""
    handler = http.RequestHandlerClass

    class Bounded(handler):  # type: ignore[misc,valid-type]
        timeout = REQUEST_S

        def handle(self) -> None:
            try:
                super().handle()
            except (TimeoutError, ssl.SSLError, ConnectionError):
                self.close_connection = True

    http.RequestHandlerClass = Bounded
