"""Everything that can go wrong in the service, as one tree; knows no HTTP.

ServiceError
    RequestRejected      InvalidRequest, TooManyCandidates, PayloadTooLarge
    Unavailable          NotReady, Overloaded, ShuttingDown
    DeadlineExceeded
    InferenceFailed
    StoreError           StoreTimeout, StoreUnavailable, StoreMisconfigured, RecordCorrupt

Raise the leaves. The root and the groups are there to be caught: raised themselves they are
a bug, and their code says so.
"""

from typing import ClassVar


class ServiceError(Exception):
    """Root of the tree.

    Attributes:
        code: Stable name of the error for machines: answers, metrics, logs.
        retryable: Whether the same call can succeed later without anyone changing anything.
    """

    code: ClassVar[str] = "internal_error"
    retryable: ClassVar[bool] = False


class RequestRejected(ServiceError):
    """The caller has to change the request."""


class InvalidRequest(RequestRejected):
    """A field of the request is missing, of the wrong type, or out of its range."""

    code = "invalid_request"

    def __init__(self, message: str, *, field: str) -> None:
        """Names the field.

        Args:
            message: What was got and what was expected.
            field: Path of the field in the request, such as `candidates[3].price`.
        """
        super().__init__(message)
        self.field = field


class TooManyCandidates(RequestRejected):
    """The request names more candidates than the service accepts."""

    code = "too_many_candidates"


class PayloadTooLarge(RequestRejected):
    """The request body is longer than the service accepts."""

    code = "payload_too_large"


class Unavailable(ServiceError):
    """The service cannot take the request now; another instance or a later call may."""

    retryable = True


class NotReady(Unavailable):
    """No bundle is being served yet."""

    code = "not_ready"


class Overloaded(Unavailable):
    """The queue is full; the request was refused before any work was done for it."""

    code = "overloaded"

    def __init__(self, message: str, *, retry_after_s: float) -> None:
        """Says when to come back.

        Args:
            message: What is full, and how full.
            retry_after_s: Estimated seconds until the present queue is worked off.
        """
        super().__init__(message)
        self.retry_after_s = retry_after_s


class ShuttingDown(Unavailable):
    """The service is draining and takes no new work."""

    code = "shutting_down"


class DeadlineExceeded(ServiceError):
    """The request's deadline passed before its answer was there."""

    code = "deadline_exceeded"
    retryable = True


class InferenceFailed(ServiceError):
    """The model run failed for this request alone; a retry would fail again."""

    code = "inference_failed"


class StoreError(ServiceError):
    """The online store gave no usable answer; the scorer turns it into `degraded`."""


class StoreTimeout(StoreError):
    """The store did not answer within its time."""

    code = "store_timeout"
    retryable = True


class StoreUnavailable(StoreError):
    """The store refuses connections, is still loading, or is not asked because it just failed."""

    code = "store_unavailable"
    retryable = True


class StoreMisconfigured(StoreError):
    """The store answers, but a person has to change a setting: password, rights, database."""

    code = "store_misconfigured"


class RecordCorrupt(StoreError):
    """The store holds bytes for this user that are not a user record."""

    code = "record_corrupt"


def error_codes(root: type[ServiceError] = ServiceError) -> tuple[str, ...]:
    """Codes of the leaves under a class, sorted; a closed set, good for labels and tables."""
    children = root.__subclasses__()
    if not children:
        return (root.code,)
    return tuple(sorted(code for child in children for code in error_codes(child)))
