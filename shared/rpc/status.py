"""Errors on the wire: the one place where the tree of `shared.errors` meets gRPC's status codes.

Several errors share a code (TooLarge and Overloaded are both RESOURCE_EXHAUSTED, but only one is worth a retry), so
the class's name travels beside it: in the trailing metadata `sightline-error` of a call, in `kind` of an `Error`.
"""

from collections.abc import Iterable
from typing import NoReturn, cast

import grpc
from sightline.v1 import common_pb2

from shared import errors
from shared.errors import SightlineError

KIND_KEY = "sightline-error"

_CODES = {code.value[0]: code for code in grpc.StatusCode}
_KINDS: dict[str, type[SightlineError]] = {
    name: cls for name, cls in vars(errors).items() if isinstance(cls, type) and issubclass(cls, SightlineError)
}
# What a status means when its sender did not say which error it was (a proxy, another implementation).
_BY_CODE: dict[grpc.StatusCode, type[SightlineError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: errors.InvalidInput,
    grpc.StatusCode.RESOURCE_EXHAUSTED: errors.Overloaded,
    grpc.StatusCode.FAILED_PRECONDITION: errors.UnknownModel,
    grpc.StatusCode.OUT_OF_RANGE: errors.CursorExpired,
    grpc.StatusCode.ALREADY_EXISTS: errors.TokenConflict,
    grpc.StatusCode.UNAUTHENTICATED: errors.Unauthenticated,
    grpc.StatusCode.PERMISSION_DENIED: errors.PermissionDenied,
    grpc.StatusCode.UNAVAILABLE: errors.Unavailable,
    # By the peer, as a server does that is stopped at once; a caller's own cancelling is no RpcError.
    grpc.StatusCode.CANCELLED: errors.Unavailable,
    grpc.StatusCode.DEADLINE_EXCEEDED: errors.Unavailable,
}


def code_of(error: SightlineError) -> grpc.StatusCode:
    """The gRPC status code of an error."""
    return grpc.StatusCode[error.status]


async def abort(context: "grpc.aio.ServicerContext[object, object]", error: SightlineError) -> NoReturn:
    """Ends a call with an error's status, sentence and kind."""
    await context.abort(code_of(error), str(error), ((KIND_KEY, type(error).__name__),))
    raise AssertionError("abort always raises")


def to_message(error: SightlineError) -> common_pb2.Error:
    """An error inside a call that goes on."""
    return common_pb2.Error(code=code_of(error).value[0], message=str(error), kind=type(error).__name__)


def from_message(message: common_pb2.Error) -> SightlineError:
    """The error that `to_message` was given."""
    return _make(_CODES.get(message.code, grpc.StatusCode.UNKNOWN), message.message, message.kind)


def from_rpc_error(error: grpc.RpcError) -> SightlineError:
    """The error that ended a call, as its server raised it; of grpc.aio or of a blocking call."""
    # gRPC's own errors are calls too, which its types do not say.
    call = cast(grpc.Call, error)
    return _make(call.code(), call.details() or call.code().name, _kind(call.trailing_metadata()))


def _kind(metadata: Iterable[tuple[str, str | bytes]] | None) -> str:
    for key, value in metadata or ():
        if key == KIND_KEY:
            return value if isinstance(value, str) else value.decode(errors="replace")
    return ""


def _make(code: grpc.StatusCode, message: str, kind: str) -> SightlineError:
    cls = _KINDS.get(kind)
    if cls is None or cls.status != code.name:
        cls = _BY_CODE.get(code, SightlineError)
    return cls(message)
