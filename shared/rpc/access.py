"""Who is calling, and whether it may: decided before a call's handler runs, and asked again for each frame and event.

    transport (certificate's names) or authorization: Bearer TOKEN -> identities -> rights of the policy in force
    method -> permission (the table below)                          -> Unauthenticated | PermissionDenied | handler

A handler asks `caller()`, which is this call's own in every task that the call starts:

    caller().require("send", camera_id)        raises PermissionDenied
    caller().may("subscribe", camera_id)

The answer follows the policy file: a grant that is taken back takes effect in streams that are open. A method that the
table does not name is refused to everybody while access is controlled; tests/shared/test_access.py holds it against the
wire contract.
"""

import asyncio
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, Counter

from shared.errors import Overloaded, PermissionDenied, SightlineError, Unauthenticated
from shared.rpc.limits import Budgets, CallLimits
from shared.rpc.policy import ANONYMOUS, EVERYTHING, LOCAL, SEND_AND_SUBSCRIBE, Permission, Policy, Rights
from shared.rpc.reload import Reloaded, ReloadMetrics

POLICY_CHECK_S = 0.2
_ANYBODY = "anybody"  # who came through the transport's own check
_ANY_GRANT = "any grant"
METHODS: dict[str, Permission | str] = {
    "/grpc.health.v1.Health/Check": _ANYBODY,
    "/grpc.health.v1.Health/List": _ANYBODY,
    "/grpc.health.v1.Health/Watch": _ANYBODY,
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": _ANY_GRANT,
    "/sightline.v1.EdgeService/Compress": "send",
    "/sightline.v1.EdgeService/CompressStream": "send",
    "/sightline.v1.IngestService/Upload": "send",
    "/sightline.v1.IngestService/ListModels": _ANY_GRANT,
    "/sightline.v1.DetectionService/Subscribe": "subscribe",
    "/sightline.v1.DetectionService/Detect": "subscribe",
    "/sightline.v1.DetectionService/Review": "subscribe",
    **{
        f"/sightline.v1.{method}": "administer"
        for method in (
            "BundleAdminService/ListBundles",
            "BundleAdminService/LoadBundle",
            "BundleAdminService/RetireBundle",
            "EdgeAdminService/ListCameras",
            "EdgeAdminService/PauseCamera",
            "EdgeAdminService/ResumeCamera",
            "EdgeAdminService/GetSpool",
            "EdgeAdminService/GetQualityBounds",
            "EdgeAdminService/SetQualityBounds",
            "CloudAdminService/ListUploads",
            "CloudAdminService/ListConsumers",
            "QuarantineService/ListQuarantine",
            "QuarantineService/FetchQuarantined",
            "QuarantineService/ReplayQuarantined",
        )
    },
}


class Access:
    """The policy in force and the counts of what it refused. `policy_file` None: the rule at the end of
    shared.rpc.policy's head."""

    def __init__(
        self,
        policy_file: Path | None,
        limits: CallLimits,
        registry: CollectorRegistry,
        reload_metrics: ReloadMetrics | None = None,
    ) -> None:
        self.budgets = Budgets(limits)
        self.refused = Counter(
            "sightline_rpc_refused",
            "Calls, frames and events refused by who their caller is or how much it asked for.",
            ["reason"],
            registry=registry,
        )
        for reason in ("unauthenticated", "permission"):
            self.refused.labels(reason)
        self._policy: Reloaded[Policy] | None = None
        if policy_file is not None:
            self._policy = Reloaded(
                "policy", [policy_file], lambda files: Policy.parse(files[0]), reload_metrics,
                check_every_s=POLICY_CHECK_S,
            )  # fmt: skip

    @property
    def policy(self) -> Policy | None:
        return None if self._policy is None else self._policy.get()

    @contextmanager
    def entered(self, method: str, context: Any) -> Iterator[None]:
        """A call of `method` ("/package.Service/Method"), whose caller may make it and is `caller()` from now on.

        Raises Unauthenticated, PermissionDenied, Overloaded.
        """
        try:
            entered = Caller(self, self._identify(context), _host(context.peer()))
            entered.require_method(method)
        except SightlineError as error:
            self.refused.labels("unauthenticated" if isinstance(error, Unauthenticated) else "permission").inc()
            raise
        _caller.set(entered)
        if METHODS.get(method) == _ANYBODY:  # probes go on when all else is too much
            yield
            return
        with ExitStack() as call:
            try:
                call.enter_context(self.budgets.call(entered.limited_as))
            except Overloaded:
                self.refused.labels("limit").inc()
                raise
            yield

    def identified(self, names: tuple[str, ...], token: str | None, *, in_plaintext_here: bool) -> "Caller":
        """Who calls over something else than gRPC: a bearer token goes before `names`, those of a verified certificate.

        `in_plaintext_here`: it came in plaintext from this machine. Raises Unauthenticated for an unknown token.
        """
        if token is not None:
            return Caller(self, (self._token_identity(token),))
        return Caller(self, names or (LOCAL if in_plaintext_here else ANONYMOUS,))

    def _token_identity(self, token: str) -> str:
        policy = self.policy
        identity = policy.token_identity(token) if policy is not None else None
        if identity is None:
            raise Unauthenticated("expected a bearer token that the policy names, got another one")
        return identity

    def _identify(self, context: Any) -> tuple[str, ...]:
        token = _bearer(context.invocation_metadata())
        if token is not None:
            return (self._token_identity(token),)
        properties: Mapping[str, Iterable[bytes]] = context.auth_context()
        names = [
            *(_text(each) for each in properties.get("peer_uri", ())),
            *(f"dns:{_text(each)}" for each in properties.get("peer_dns", ())),
        ]
        if names:
            return tuple(names)
        in_plaintext = b"ssl" not in properties.get("transport_security_type", ())
        return (LOCAL if in_plaintext and _is_local_peer(context.peer()) else ANONYMOUS,)


class Caller:
    """Who made a call: `identities`, the first of which names it in logs and limits."""

    def __init__(self, access: Access | None, identities: tuple[str, ...], host: str = "") -> None:
        self.identities = identities
        self._host = host
        self._access = access
        self._policy: Policy | None = None
        self._rights = EVERYTHING

    @property
    def name(self) -> str:
        return self.identities[0]

    @property
    def limited_as(self) -> str:
        """Whose budget its calls and frames are taken from."""
        return f"{ANONYMOUS} at {self._host}" if self.name == ANONYMOUS else self.name

    def turn_in_s(self) -> float:
        """Takes its turn for one more frame of this call, and how long it must wait where it has none (0: taken)."""
        wait_s = 0.0 if self._access is None else self._access.budgets.wait_s(self.limited_as)
        if wait_s > 0:
            self.count_refused("rate")
        return wait_s

    async def turn(self) -> None:
        """Returns when it is this caller's turn for one more frame."""
        while (wait_s := self.turn_in_s()) > 0:  # noqa: ASYNC110 - time is what it waits for
            await asyncio.sleep(wait_s)

    @property
    def rights(self) -> Rights:
        """By the policy in force now."""
        if self._access is None:
            return EVERYTHING
        policy = self._access.policy
        if policy is None:
            return EVERYTHING if self.name == LOCAL else SEND_AND_SUBSCRIBE
        if policy is not self._policy:
            self._policy, self._rights = policy, policy.rights(self.identities)
        return self._rights

    def may(self, permission: Permission, camera: str | None = None) -> bool:
        """Whether it may, for this camera; without `camera`, for any camera at all."""
        return self.rights.allow(permission, camera)

    def require(self, permission: Permission, camera: str | None = None) -> None:
        """Raises PermissionDenied unless it may."""
        if not self.may(permission, camera):
            self.count_refused("permission")
            raise PermissionDenied(
                f"{self.name} may not {permission}" + ("" if camera is None else f" for camera {camera!r}")
            )

    def require_name(self) -> None:
        """Raises Unauthenticated for a caller without a name, unless that may do something."""
        if self.name == ANONYMOUS and not self.rights.any:
            raise Unauthenticated("expected a client certificate or a bearer token, got neither")

    def require_method(self, method: str) -> None:
        """Raises Unauthenticated for a caller without a name, PermissionDenied for one without the permission."""
        needed = METHODS.get(method)
        if needed == _ANYBODY:
            return
        rights = self.rights
        self.require_name()
        if needed is None:  # not in the table
            allowed = rights is EVERYTHING
        else:
            allowed = rights.any if needed == _ANY_GRANT else rights.allow(needed)  # type: ignore[arg-type]
        if not allowed:
            raise PermissionDenied(f"{self.name} may not call {method}")

    def count_refused(self, reason: str) -> None:
        """Counts what is refused without an error of its own; `reason` is one of a few fixed words."""
        if self._access is not None:
            self._access.refused.labels(reason).inc()


_INSIDE = Caller(None, (LOCAL,))  # code that runs outside any call
_caller: ContextVar[Caller] = ContextVar("sightline_caller", default=_INSIDE)


def caller() -> Caller:
    """Who made the call that this task belongs to."""
    return _caller.get()


def _bearer(metadata: Iterable[tuple[str, str | bytes]] | None) -> str | None:
    for key, value in metadata or ():
        if key == "authorization":
            text = value if isinstance(value, str) else value.decode("utf-8", "replace")
            scheme, _, token = text.partition(" ")
            if scheme.lower() != "bearer" or not token:
                raise Unauthenticated("expected authorization: Bearer TOKEN, got another scheme")
            return token.strip()
    return None


def _text(value: bytes) -> str:
    return value.decode("utf-8", "replace")


def _host(peer: str) -> str:
    """The address of a peer without its port."""
    return peer.rpartition(":")[0] if peer.startswith(("ipv4:", "ipv6:")) else peer


def _is_local_peer(peer: str) -> bool:
    return peer.startswith(("unix:", "ipv4:127.", "ipv6:%5B::1%5D", "ipv6:[::1]"))
