"""Every error a user can meet, as one tree.

    GenRetrievalError                    exit 1, HTTP 500, gRPC INTERNAL
    ├── InvalidInputError                exit 2, HTTP 400, gRPC INVALID_ARGUMENT
    │   ├── DataError                    a log, catalogue or embedding file is missing or malformed
    │   ├── RecipeError                  a recipe names an unknown or contradictory setting
    │   └── RequestError                 a retrieval or admin request cannot be answered as asked
    ├── UnauthenticatedError             exit 7, HTTP 401, gRPC UNAUTHENTICATED: no API key, or one that is not known
    ├── PermissionDeniedError            exit 7, HTTP 403, gRPC PERMISSION_DENIED: the key lacks the scope
    ├── NotFoundError                    exit 8, HTTP 404, gRPC NOT_FOUND: no such resource
    ├── ConflictError                    exit 8, HTTP 409, gRPC ABORTED: the state of the resource forbids it
    │   ├── AlreadyExistsError           exit 8, HTTP 409, gRPC ALREADY_EXISTS
    │   ├── EtagMismatchError            exit 8, HTTP 412, gRPC ABORTED: somebody else changed it first
    │   ├── IdempotencyKeyReusedError    exit 8, HTTP 422, gRPC ABORTED: the same key came with another request
    │   └── SlotsExhaustedError          exit 8, HTTP 409, gRPC RESOURCE_EXHAUSTED: every reserved slot is taken
    ├── StaleReplicaError                exit 5, HTTP 409, gRPC FAILED_PRECONDITION: has not seen `min_revision` yet
    ├── BundleError                      exit 3, HTTP 500, gRPC FAILED_PRECONDITION
    │   └── BundleIncompleteError        no manifest: writing it never finished
    ├── MissingExtraError                exit 4, HTTP 501, gRPC UNIMPLEMENTED: an optional package is not installed
    ├── UnavailableError                 exit 5, HTTP 503, gRPC UNAVAILABLE: not ready, draining, or unreachable
    │   └── OverloadedError              exit 5, HTTP 429, gRPC RESOURCE_EXHAUSTED: the queue is too long
    │       └── RateLimitedError         the caller asks for more than its share
    └── DeadlineError                    exit 6, HTTP 504, gRPC DEADLINE_EXCEEDED

A message says what was wrong, where, and what to do. The three codes of a kind stand on its class and nowhere
else; the command line, REST and gRPC read them from there.
"""

from __future__ import annotations

import errno
import os
import re
from functools import cache
from typing import ClassVar


@cache
def _reason(name: str) -> str:
    name = name.removesuffix("Error")
    return "".join("_" + c if c.isupper() and i else c for i, c in enumerate(name)).upper()


class GenRetrievalError(Exception):
    """Base of all errors raised on purpose by this project; raised itself only for faults of ours."""

    exit_code: ClassVar[int] = 1
    http_status: ClassVar[int] = 500
    grpc_code: ClassVar[str] = "INTERNAL"

    @property
    def reason(self) -> str:
        """Stable machine-readable name, e.g. ``INVALID_INPUT`` (REST `reason`, metric label)."""
        return _reason(type(self).__name__)


class InvalidInputError(GenRetrievalError, ValueError):
    """What the caller gave cannot be used; the same call will fail again."""

    exit_code, http_status, grpc_code = 2, 400, "INVALID_ARGUMENT"


class DataError(InvalidInputError):
    """A data file is missing, empty or malformed. Single bad rows go to quarantine and raise nothing."""


class RecipeError(InvalidInputError):
    """A recipe has an unknown key, a value out of range, or settings that contradict each other."""


class RequestError(InvalidInputError):
    """A request is malformed, for example a negative `top_k` or a filter on an undeclared attribute."""


class UnauthenticatedError(GenRetrievalError):
    """A call without an API key, or with one that is unknown, revoked or expired."""

    exit_code, http_status, grpc_code = 7, 401, "UNAUTHENTICATED"


class PermissionDeniedError(GenRetrievalError):
    """The API key is known and lacks the scope of the operation."""

    exit_code, http_status, grpc_code = 7, 403, "PERMISSION_DENIED"


class NotFoundError(GenRetrievalError):
    """There is no such resource, or it was deleted."""

    exit_code, http_status, grpc_code = 8, 404, "NOT_FOUND"


class ConflictError(GenRetrievalError):
    """The resource is in a state that forbids the change; nothing was changed."""

    exit_code, http_status, grpc_code = 8, 409, "ABORTED"


class AlreadyExistsError(ConflictError):
    """The id, or the normalised text of a keyword, is taken."""

    grpc_code = "ALREADY_EXISTS"


class EtagMismatchError(ConflictError):
    """The resource has changed since the caller read it: read it again, then decide."""

    http_status = 412


class IdempotencyKeyReusedError(ConflictError):
    """An idempotency key came again with another request."""

    http_status = 422


class SlotsExhaustedError(ConflictError):
    """No reserved slot is free: unbind a keyword, wait for the quarantine to end, or train with more slots."""

    grpc_code = "RESOURCE_EXHAUSTED"


class StaleReplicaError(GenRetrievalError):
    """This replica has not caught up with the revision that the caller asked for within the deadline."""

    exit_code, http_status, grpc_code = 5, 409, "FAILED_PRECONDITION"


class BundleError(GenRetrievalError):
    """A bundle cannot be served: a hash differs, a file is missing, or its schema version is newer than ours."""

    exit_code, http_status, grpc_code = 3, 500, "FAILED_PRECONDITION"


class BundleIncompleteError(BundleError):
    """The folder holds no manifest. It is written last, so the export that made the folder never finished."""


class MissingExtraError(GenRetrievalError, ImportError):
    """A command needs packages of an extra that is not installed; the message names the extra."""

    exit_code, http_status, grpc_code = 4, 501, "UNIMPLEMENTED"


class UnavailableError(GenRetrievalError):
    """The server is not ready, is draining, or could not be reached; another try may succeed.

    Attributes:
        retry_after: seconds to wait before that, as far as is known.
    """

    exit_code, http_status, grpc_code = 5, 503, "UNAVAILABLE"

    def __init__(self, message: str = "", retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class OverloadedError(UnavailableError):
    """Too much waits already: rejected at once rather than answered too late."""

    http_status, grpc_code = 429, "RESOURCE_EXHAUSTED"


class RateLimitedError(OverloadedError):
    """The caller has made more requests than its rate limit allows; others are answered."""


class DeadlineError(GenRetrievalError):
    """The deadline of the request passed before an answer was ready."""

    exit_code, http_status, grpc_code = 6, 504, "DEADLINE_EXCEEDED"


# NumPy and torch name no reason when the last bytes find no room.
_DISK_FULL = re.compile(
    "|".join(map(re.escape, (os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT))))
    + r"|^\d+ requested and \d+ written$|inline_container\.cc.* unexpected pos "
)


def disk_is_full(error: BaseException) -> bool:
    """Whether a disk or a quota is why something could not be written.

    safetensors, Polars and others have errors of their own around what the system said, so its words are looked for.
    """
    return _DISK_FULL.search(str(error)) is not None
