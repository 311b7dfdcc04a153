"""One split of a log before it is encoded."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from model.contract.columns import Columns
from model.logs import Labels


@dataclass(frozen=True, kw_only=True)
class RawSplit:
    """Raw columns of one split, request columns once per request."""

    request_columns: Columns
    candidate_columns: Columns
    request_time: npt.NDArray[np.float64]
    request_of: npt.NDArray[np.int64]
    labels: Labels
    user: npt.NDArray[np.int64]
    truth: npt.NDArray[np.float32] | None
