"""Who looks at the console: the same identities and the same policy as over gRPC (shared.rpc.access).

    plaintext from this machine            -> local
    HTTPS, client certificate              -> its names: spiffe://..., dns:...
    authorization: Bearer TOKEN, or login  -> token:NAME

A caller sees the cameras whose detections it may subscribe to, by the policy in force at that moment. A browser cannot
be told to send a header, so the login page has the token kept in a cookie that scripts cannot read, that goes to no
other site and that ends with the browser. With a policy a browser may come without a certificate, to log in; without a
policy one is demanded wherever the service has an authority for them.
"""

import json
import ssl
from collections.abc import Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from uvicorn.protocols.http.h11_impl import H11Protocol

from cloud.settings import CloudSettings
from shared.errors import InvalidInput, InvalidSettings, Unauthenticated
from shared.rpc import tls
from shared.rpc.access import Access, Caller
from shared.rpc.reload import Reloaded

COOKIE = "sightline_token"
_MAX_TOKEN = 1024  # characters
_PEER_NAMES = "sightline.peer_names"
MaySee = Callable[[str], bool]


class Callers:
    """Tells by a request who its caller is. Each method raises Unauthenticated for one that nobody knows."""

    def __init__(self, access: Access) -> None:
        self._access = access

    def of(self, request: Request) -> Caller:
        """A caller that may see something. Raises PermissionDenied for one that may not."""
        local = request.url.scheme == "http" and request.client is not None and _is_loopback(request.client.host)
        names: tuple[str, ...] = request.scope.get(_PEER_NAMES, ())
        caller = self._access.identified(names, _token(request), in_plaintext_here=local)
        caller.require_name()
        caller.require("subscribe")
        return caller

    def may_see(self, request: Request) -> MaySee:
        """Whether its caller may see a camera; raises PermissionDenied once it may see none any more."""
        caller = self.of(request)

        def may_see(camera: str) -> bool:
            caller.require("subscribe")
            return caller.may("subscribe", camera)

        return may_see

    def has_token(self, request: Request) -> bool:
        return COOKIE in request.cookies

    def log_in(self, request: Request, response: Response, body: bytes) -> None:
        """Has the browser keep the token of {"token": ...}. Raises InvalidInput, Unauthenticated, PermissionDenied."""
        try:
            token = json.loads(body[: 2 * _MAX_TOKEN])["token"]
        except (ValueError, KeyError, TypeError):
            raise InvalidInput('expected {"token": "..."}') from None
        if not isinstance(token, str) or not 0 < len(token) <= _MAX_TOKEN or not token.isascii():
            raise InvalidInput(f"expected a token of 1 to {_MAX_TOKEN} ASCII characters")
        self._access.identified((), token, in_plaintext_here=False).require("subscribe")
        secure = request.url.scheme == "https"
        response.set_cookie(COOKIE, token, httponly=True, secure=secure, samesite="strict", path="/")

    def log_out(self, response: Response) -> None:
        response.delete_cookie(COOKIE, path="/")


class Connection(H11Protocol):
    """uvicorn's HTTP/1.1, which tells its requests the names of the client's certificate."""

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        encrypted: ssl.SSLObject | None = transport.get_extra_info("ssl_object")
        certificate = None if encrypted is None else encrypted.getpeercert()
        names = _names(certificate) if certificate else ()
        app = self.app

        async def named(scope: Any, receive: Any, send: Any) -> None:
            await app({**scope, _PEER_NAMES: names}, receive, send)

        self.app = named


def tls_context(settings: CloudSettings) -> ssl.SSLContext | None:
    """What the console listens with, None for plaintext; a certificate that is renewed serves the next connection.

    Raises InvalidSettings.
    """
    address = settings.console_listen
    if settings.tls_certificate is None or settings.tls_key is None:
        if not settings.insecure and not tls.is_local(address):
            raise InvalidSettings(
                f"setting console_listen: plaintext on {address} would be open to the network; "
                "give tls_certificate and tls_key, or set insecure to allow it"
            )
        return None
    told_apart = settings.tls_client_ca is not None or settings.policy is not None
    if not told_apart and not settings.insecure and not tls.is_local(address):
        raise InvalidSettings(
            f"setting console_listen: anybody who reaches {address} could look; give tls_client_ca (client "
            "certificates) or policy (bearer tokens), or set insecure to allow it"
        )
    paths = [settings.tls_certificate, settings.tls_key]
    served = Reloaded("console certificate", paths, lambda _: _context(settings))
    context = served.get()

    def newer(connection: Any, server_name: str | None, _: Any) -> None:
        connection.context = served.get()

    context.sni_callback = newer
    return context


def _context(settings: CloudSettings) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(str(settings.tls_certificate), str(settings.tls_key))
        if settings.tls_client_ca is not None:
            context.load_verify_locations(str(settings.tls_client_ca))
            context.verify_mode = ssl.CERT_REQUIRED if settings.policy is None else ssl.CERT_OPTIONAL
    except OSError as error:  # ssl.SSLError too
        raise InvalidSettings(f"setting console_listen: the service's certificate cannot be used: {error}") from None
    return context


def _token(request: Request) -> str | None:
    header = request.headers.get("authorization")
    if header is None:
        return request.cookies.get(COOKIE) or None
    scheme, _, token = header.partition(" ")
    if scheme.lower() != "bearer" or not token.strip():
        raise Unauthenticated("expected authorization: Bearer TOKEN, got another scheme")
    return token.strip()


def _names(certificate: Any) -> tuple[str, ...]:
    """As shared.rpc.access names them: URIs as they are, then dns:NAME."""
    alternatives = certificate.get("subjectAltName", ())
    uris = [value for kind, value in alternatives if kind == "URI"]
    return (*uris, *(f"dns:{value}" for kind, value in alternatives if kind == "DNS"))


def _is_loopback(host: str) -> bool:
    return host == "::1" or host.startswith("127.")
