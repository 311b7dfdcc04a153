"""Tells a refusal of files, which holds until they change, from a failure that may pass."""

from model.contract.errors import ContractError, LogError


class ItemBuildError(LogError):
    """The item table was not made, and the snapshot is not known to be at fault."""


def may_pass(error: Exception) -> bool:
    """Whether the same files may be loaded another time.

    What is wrong in a file stays wrong. But that a file could not be opened or read, that there was
    no room, or that a process was killed, need not be so the next time.
    """
    if not isinstance(error, ContractError) or isinstance(error, ItemBuildError):
        return True
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__
    return cause is not None
