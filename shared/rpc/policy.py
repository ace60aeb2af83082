"""Who may do what: a TOML file that grants identities permissions; what it does not grant is refused.

    [[grant]]
    identity = "spiffe://example.org/edge/*"   # a name, or a beginning and *
    send = ["gate-*", "door"]                  # cameras whose frames it may send
    subscribe = ["*"]                          # cameras whose detections it may see; also Detect
    administer = false                         # the admin port

    [tokens]
    console = "9f86d081..."                    # SHA-256 of a bearer token, hex; its identity is token:console

An identity is the URI of a certificate (spiffe://...), dns:NAME for its DNS names, token:NAME for a bearer token,
`local` for a caller in plaintext on loopback or a Unix socket, `anonymous` for anybody else without one. A certificate
with several names has the grants of all of them.

Without a policy file: on loopback in plaintext everything is allowed; over TLS a caller whose certificate the authority
signed may send and subscribe, and nobody may administer.
"""

import hashlib
import tomllib
from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, StringConstraints, ValidationError

from shared.errors import InvalidSettings

Permission = Literal["send", "subscribe", "administer"]
LOCAL = "local"
ANONYMOUS = "anonymous"
MAX_POLICY_BYTES = 4 << 20

_Pattern = Annotated[str, StringConstraints(min_length=1, max_length=512, pattern=r"^[^*\s]*\*?$")]
_Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
_Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9._:-]{1,64}$")]


class _Grant(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    identity: _Pattern
    send: list[_Pattern] = []
    subscribe: list[_Pattern] = []
    administer: bool = False


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    grant: list[_Grant] = []
    tokens: dict[_Name, _Sha256] = {}


class _Patterns:
    """Names and beginnings of names, looked up without walking the names."""

    def __init__(self, patterns: list[str]) -> None:
        self._exact = frozenset(each for each in patterns if not each.endswith("*"))
        self._beginnings = tuple(each[:-1] for each in patterns if each.endswith("*"))

    def match(self, name: str) -> bool:
        return name in self._exact or name.startswith(self._beginnings)

    def __bool__(self) -> bool:
        return bool(self._exact or self._beginnings)


@dataclass(frozen=True, slots=True)
class Rights:
    """What one caller may do."""

    send: _Patterns
    subscribe: _Patterns
    administer: bool

    def allow(self, permission: Permission, camera: str | None = None) -> bool:
        """Without `camera`: for any camera at all."""
        if permission == "administer":
            return self.administer
        cameras = self.send if permission == "send" else self.subscribe
        return bool(cameras) if camera is None else cameras.match(camera)

    @property
    def any(self) -> bool:
        """There is something it may do."""
        return bool(self.send or self.subscribe or self.administer)


EVERYTHING = Rights(_Patterns(["*"]), _Patterns(["*"]), True)
SEND_AND_SUBSCRIBE = Rights(_Patterns(["*"]), _Patterns(["*"]), False)


@dataclass(frozen=True)
class Policy:
    """A policy file that was understood. Made by `parse`."""

    grants: tuple[_Grant, ...] = ()
    token_names: dict[str, str] = field(default_factory=dict)  # SHA-256 hex -> name

    @classmethod
    def parse(cls, data: bytes) -> "Policy":
        """Raises InvalidSettings that says which field is at fault."""
        if len(data) > MAX_POLICY_BYTES:
            raise InvalidSettings(f"the policy must be at most {MAX_POLICY_BYTES} bytes, got {len(data)}")
        try:
            file = _File.model_validate(tomllib.loads(data.decode()))
        except (UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
            raise InvalidSettings(f"the policy must be a TOML file, got: {error}") from None
        except ValidationError as error:
            faults = [f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors()]
            raise InvalidSettings(f"the policy cannot be used: {'; '.join(faults[:10])}") from None
        names = {digest: name for name, digest in file.tokens.items()}
        if len(names) != len(file.tokens):
            raise InvalidSettings("the policy cannot be used: two tokens have the same SHA-256")
        return cls(tuple(file.grant), names)

    def rights(self, identities: tuple[str, ...]) -> Rights:
        """What a caller with these names may do: the union of its grants."""
        send: list[str] = []
        subscribe: list[str] = []
        administer = False
        for grant in self.grants:
            pattern = _Patterns([grant.identity])
            if any(pattern.match(identity) for identity in identities):
                send += grant.send
                subscribe += grant.subscribe
                administer |= grant.administer
        return Rights(_Patterns(send), _Patterns(subscribe), administer)

    def token_identity(self, token: str) -> str | None:
        """token:NAME, or None for a token that nobody has."""
        name = self.token_names.get(token_hash(token))
        return None if name is None else f"token:{name}"


def token_hash(token: str) -> str:
    """SHA-256 hex of a bearer token, as the policy keeps it. Tokens are random 256 bits: no salt, no slow hash."""
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).hexdigest()
