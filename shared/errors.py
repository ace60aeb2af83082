"""Every error Sightline raises on purpose, and the one gRPC status each maps to.

    SightlineError                     INTERNAL
    |- InvalidInput                    INVALID_ARGUMENT     what the caller sent cannot be used
    |  |- InvalidImage                                      not an image, truncated, zero-size, wrong raw length
    |  |- InvalidQuality                                    outside [1, 8]
    |  |- InvalidBitstream                                  corrupt, truncated or inconsistent
    |  |  `- SymbolsMismatch                                decoded to other symbols than were encoded
    |  `- InvalidSettings                                   a field of the configuration
    |- TooLarge                        RESOURCE_EXHAUSTED   over a limit on pixels or bytes, refused before work
    |- Overloaded                      RESOURCE_EXHAUSTED   right input, no room now; try again later
    |- UnknownModel                    FAILED_PRECONDITION  a model id this process does not have
    |- InvalidBundle                   FAILED_PRECONDITION  a weights bundle that cannot be trusted or used
    |- CursorMismatch                  FAILED_PRECONDITION  a cursor of another detection log
    |- Paused                          FAILED_PRECONDITION  a camera that an operator has paused
    |- CursorExpired                   OUT_OF_RANGE         a cursor older than what the log still keeps
    |- TokenConflict                   ALREADY_EXISTS       an idempotency token used for other content
    |- NotFound                        NOT_FOUND            a thing asked for by name that is not here
    |- Unauthenticated                 UNAUTHENTICATED
    |- PermissionDenied                PERMISSION_DENIED
    |- Unavailable                     UNAVAILABLE          a peer, a disk or a model that is not there yet
    `- NumericalError                  INTERNAL             NaN or infinity where a number must be

A message says what was expected and what came. The status is carried as the name of a ``grpc.StatusCode``
member, so that nothing here imports gRPC; ``shared.rpc.status`` turns it into one.
"""


class SightlineError(Exception):
    """Root of the tree; `status` names a member of ``grpc.StatusCode``."""

    status = "INTERNAL"


class InvalidInput(SightlineError):
    status = "INVALID_ARGUMENT"


class InvalidImage(InvalidInput):
    pass


class InvalidQuality(InvalidInput):
    pass


class InvalidBitstream(InvalidInput):
    pass


class SymbolsMismatch(InvalidBitstream):
    pass


class InvalidSettings(InvalidInput):
    pass


class TooLarge(SightlineError):
    status = "RESOURCE_EXHAUSTED"


class Overloaded(SightlineError):
    status = "RESOURCE_EXHAUSTED"


class UnknownModel(SightlineError):
    status = "FAILED_PRECONDITION"


class InvalidBundle(SightlineError):
    status = "FAILED_PRECONDITION"


class CursorMismatch(SightlineError):
    status = "FAILED_PRECONDITION"


class Paused(SightlineError):
    status = "FAILED_PRECONDITION"


class CursorExpired(SightlineError):
    status = "OUT_OF_RANGE"


class TokenConflict(SightlineError):
    status = "ALREADY_EXISTS"


class NotFound(SightlineError):
    status = "NOT_FOUND"


class Unauthenticated(SightlineError):
    status = "UNAUTHENTICATED"


class PermissionDenied(SightlineError):
    status = "PERMISSION_DENIED"


class Unavailable(SightlineError):
    status = "UNAVAILABLE"


class NumericalError(SightlineError):
    pass
