"""What the model's first layer makes of items: done once per item, and added in every run.

Knows blocks; neither the item table nor a request.
"""

import numpy as np
import numpy.typing as npt

from model.contract.blocks import CandidateBlock
from model.contract.bundle import ITEM_SIDE, ItemParts
from model.contract.errors import BundleRejected
from service.onnx_session import ROW_MULTIPLE, first_line, open_session

_MAX_ROWS = 4096  # of one run: what it holds meanwhile stays near the processor


class ItemSums:
    """The item's side of one bundle's network. Immutable; for any thread."""

    def __init__(self, parts: ItemParts) -> None:
        """Builds a session.

        Raises:
            BundleCorrupt: ONNX Runtime cannot load the model.
            BundleRejected: The model is not of the kind that `ItemParts` says.
        """
        self.features = frozenset(parts.features)
        # With more threads the bits of a sum would depend on the number of rows.
        self._session = open_session(parts.item_side, name=ITEM_SIDE, intra_op_threads=1)
        self._input_names = [entry.name for entry in self._session.get_inputs()]
        outputs = self._session.get_outputs()
        if (
            not set(self._input_names) <= {"candidate_ids", "candidate_dense"}
            or [entry.name for entry in outputs] != ["item_sum"]
            or len(outputs[0].shape) != 2
            or not isinstance(outputs[0].shape[1], int)
        ):
            raise BundleRejected(
                f"{ITEM_SIDE}: expected candidate_ids and candidate_dense as inputs and item_sum "
                "[N, H] as output",
                where=ITEM_SIDE,
            )
        self.width: int = outputs[0].shape[1]

    def of(self, block: CandidateBlock) -> npt.NDArray[np.float32]:
        """The candidates' sums, float32 [N, H]; the same bits for a row in any company.

        Raises:
            BundleRejected: The model cannot run on such blocks.
        """
        sums = np.empty((len(block), self.width), np.float32)
        for start in range(0, len(block), _MAX_ROWS):
            end = min(start + _MAX_ROWS, len(block))
            # One row would be multiplied in another way than several.
            num_rows = -(-(end - start) // ROW_MULTIPLE) * ROW_MULTIPLE
            rows = np.minimum(np.arange(start, start + num_rows), end - 1)
            sums[start:end] = self._run(block.take(rows))[: end - start]
        return sums

    def _run(self, block: CandidateBlock) -> npt.NDArray[np.float32]:
        arrays = {
            "candidate_ids": block.ids.astype(np.int64, copy=False),
            "candidate_dense": block.dense,
        }
        try:
            (made,) = self._session.run(None, {name: arrays[name] for name in self._input_names})
        except Exception as exc:  # the library's errors share no base class but this one
            raise BundleRejected(
                f"{ITEM_SIDE}: the model cannot run: {first_line(exc)}", where=ITEM_SIDE
            ) from exc
        result: npt.NDArray[np.float32] = made
        return result
