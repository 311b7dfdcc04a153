"""Errors of the contract: what is wrong with a schema, a value or a bundle, and where."""

from collections.abc import Sequence


class ContractError(ValueError):
    """Base of every error of the contract; `where` names the feature, file or field."""

    def __init__(self, message: str, *, where: str | None = None) -> None:
        super().__init__(message)
        self.where = where


class SpecError(ContractError):
    """A schema contradicts itself or names something that is not there."""


class EncodeError(ContractError):
    """A value cannot be encoded as its feature's kind.

    Attributes:
        feature: name of the feature (or of the raw column, for match features).
        reason: what was expected and what was found.
        row: position of the value in the column, None when the whole column is at fault.
    """

    def __init__(self, feature: str, reason: str, *, row: int | None = None) -> None:
        super().__init__(f"feature {feature!r}: {reason}", where=feature)
        self.feature = feature
        self.reason = reason
        self.row = row


class RecordError(ContractError):
    """The bytes of a user record are damaged or of an unknown version."""


class BundleError(ContractError):
    """A bundle cannot be used; `where` is its path or the file in it."""


class BundleNotFound(BundleError):
    """There is no bundle at the path."""


class BundleCorrupt(BundleError):
    """A file is missing, or its size or digest differs from the manifest."""


class BundleIncompatible(BundleError):
    """The bundle was written for another version of the contract."""


class BundleRejected(BundleError):
    """The golden rows, scored on this machine, differ from what the trainer wrote."""


class LogError(ContractError):
    """An impression log or a table beside it is unusable.

    Attributes:
        path: the file, when there is one.
        row_number: the first row at fault, counted from 0.
    """

    def __init__(
        self, message: str, *, path: object | None = None, row_number: int | None = None
    ) -> None:
        super().__init__(message, where=None if path is None else str(path))
        self.path = path
        self.row_number = row_number


class TrainError(ContractError):
    """Training cannot go on: a loss that is not finite, a checkpoint of another run."""


class ParityError(ContractError):
    """The exported graph does not score as the network does.

    Attributes:
        max_abs_diff: largest absolute difference of a probability.
        tolerance: what was allowed.
    """

    def __init__(self, message: str, *, max_abs_diff: float, tolerance: float) -> None:
        super().__init__(message, where="model.onnx")
        self.max_abs_diff = max_abs_diff
        self.tolerance = tolerance


class GateError(ContractError):
    """A run does not keep the bounds set for its export.

    Attributes:
        failures: every gate that failed, with its figure.
    """

    def __init__(self, failures: Sequence[str]) -> None:
        super().__init__("not exported: " + "; ".join(failures), where="gates")
        self.failures = tuple(failures)
