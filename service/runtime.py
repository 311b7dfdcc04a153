"""The model in ONNX Runtime, on threads of its own.

Knows blocks and outputs, no features and no requests.
"""

import itertools
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from model.contract.blocks import Blocks, CandidateBlock, RequestBlock
from model.contract.bundle import (
    GOLDEN_ENCODED,
    MODEL,
    MODEL_BY_ITEM,
    Bundle,
    check_golden_blocks,
    parity_excess,
)
from model.contract.encode import Encoder
from model.contract.errors import BundleRejected
from service.item_sums import ItemSums
from service.onnx_session import ROW_MULTIPLE, first_line, open_session
from service.run_cost import MAX_SWEEP_ROWS, RunCost, fit_cost, sweep, sweep_sizes
from service.runners import RunnerThreads

_log = logging.getLogger(__name__)

Outputs = Mapping[str, npt.NDArray[np.float32]]

# ONNX Runtime multiplies one row by a matrix in another way than several, with other last bits.
_MIN_REQUESTS = 2
_ROWS_PER_REQUEST = 100  # in the runs that are measured


class Runtime:
    """One session and its threads. Immutable; `run` may be called from any thread."""

    def __init__(
        self, model: bytes, *, num_runners: int, intra_op_threads: int, name: str = MODEL
    ) -> None:
        """Builds the session; seconds for a large model.

        Args:
            model: An ONNX file's content.
            num_runners: Threads of `threads`: runs at the same time.
            intra_op_threads: Threads inside one run.
            name: The file's, for errors.

        Raises:
            BundleCorrupt: ONNX Runtime cannot load the model.
        """
        self._session = open_session(model, name=name, intra_op_threads=intra_op_threads)
        self._input_names = tuple(entry.name for entry in self._session.get_inputs())
        self._output_names = tuple(entry.name for entry in self._session.get_outputs())
        self._threads = RunnerThreads(num_runners, name="onnx")

    @property
    def threads(self) -> RunnerThreads:
        """Where `run` belongs; closed by `close`."""
        return self._threads

    @property
    def input_names(self) -> tuple[str, ...]:
        """The graph's inputs."""
        return self._input_names

    @property
    def output_names(self) -> tuple[str, ...]:
        """The graph's outputs, in its order."""
        return self._output_names

    def run(self, blocks: Blocks) -> Outputs:
        """Scores the candidates: float32 [N] by output name. Blocks the calling thread.

        Raises:
            Exception: ONNX Runtime's own errors, which share no base class.
        """
        feeds = blocks.feeds()
        arrays = self._session.run(
            self._output_names,
            {name: feeds[name] for name in self._input_names},
        )
        return dict(zip(self._output_names, arrays, strict=True))

    def run_together(self, requests: list[Blocks]) -> list[Outputs]:
        """Scores several requests in one run and hands each its own candidates.

        A candidate's scores are the same bits whatever is run with it.
        """
        if len(requests) == 1 and len(requests[0]) % ROW_MULTIPLE == 0:
            blocks = requests[0]
        else:
            blocks = combine(requests, row_multiple=ROW_MULTIPLE)
        if len(blocks.request) < _MIN_REQUESTS:
            blocks = _with_request_rows(blocks, _MIN_REQUESTS)
        return split(self.run(blocks), requests)

    def close(self) -> None:
        """Lets the threads go; a run under way ends by itself."""
        self._threads.close()


def load_runtime(
    bundle: Bundle,
    encoder: Encoder,
    *,
    num_runners: int,
    intra_op_threads: int,
    max_batch_rows: int | None,
    item_sums: ItemSums | None = None,
    pause: Callable[[float], None] | None = None,
) -> tuple[Runtime, RunCost]:
    """Builds the runtime of a bundle, tests it on the golden rows, and measures its runs.

    Args:
        bundle: Read and verified.
        encoder: By the bundle's fitted schema.
        num_runners: See `Runtime`.
        intra_op_threads: See `Runtime`.
        max_batch_rows: Most rows of one run; None takes the cheapest number.
        item_sums: By the bundle's `parts`, for a runtime whose candidates have their sums; None
            loads the whole model, which reads none.
        pause: See `sweep`.

    Returns:
        The runtime, warm, and what its runs cost.

    Raises:
        BundleCorrupt: ONNX Runtime cannot load the model.
        BundleRejected: Inputs, outputs or golden answers are not what the trainer wrote.
    """
    check_golden_blocks(bundle, encoder)
    model, name, golden = bundle.model, MODEL, bundle.golden.blocks
    if item_sums is not None:
        assert bundle.parts is not None  # `item_sums` were made from them.
        model, name = bundle.parts.model, MODEL_BY_ITEM
        summed = replace(golden.candidate, item_sum=item_sums.of(golden.candidate))
        golden = replace(golden, candidate=summed)
    runtime = Runtime(model, name=name, num_runners=num_runners, intra_op_threads=intra_op_threads)
    try:
        _check_names(bundle, runtime, golden, name)
        _check_golden_answers(bundle, runtime, golden, name)
        cost = _measure(golden, runtime, intra_op_threads, max_batch_rows, pause)
    except BaseException:
        runtime.close()
        raise
    return runtime, cost


def combine(requests: Sequence[Blocks], *, row_multiple: int = 1) -> Blocks:
    """Puts the requests' blocks one after another.

    Args:
        requests: At least one.
        row_multiple: The first candidate is repeated at the end until the number of rows is a
            multiple of this.
    """
    sizes = np.array([len(blocks.request) for blocks in requests], np.int64)
    offsets = np.cumsum(sizes) - sizes
    first = requests[0]
    filler = np.zeros(-sum(map(len, requests)) % row_multiple, np.int64)
    return Blocks(
        request=RequestBlock(
            ids=np.concatenate([blocks.request.ids for blocks in requests]),
            dense=np.concatenate([blocks.request.dense for blocks in requests]),
            history=np.concatenate([blocks.request.history for blocks in requests]),
        ),
        candidate=_joined([*(b.candidate for b in requests), first.candidate.take(filler)]),
        request_of=np.concatenate(
            [
                *(
                    blocks.request_of + offset
                    for blocks, offset in zip(requests, offsets, strict=True)
                ),
                first.request_of[filler],
            ]
        ),
    )


def _joined(parts: Sequence[CandidateBlock]) -> CandidateBlock:
    # All of them are of one state's making: either each has sums or none.
    sums = [part.item_sum for part in parts if part.item_sum is not None]
    return CandidateBlock(
        ids=np.concatenate([part.ids for part in parts]),
        dense=np.concatenate([part.dense for part in parts]),
        item_sum=np.concatenate(sums) if sums else None,
    )


def _with_request_rows(blocks: Blocks, num_rows: int) -> Blocks:
    """The same with the one request row repeated."""
    request = blocks.request
    return Blocks(
        request=RequestBlock(
            ids=request.ids.repeat(num_rows, axis=0),
            dense=request.dense.repeat(num_rows, axis=0),
            history=request.history.repeat(num_rows, axis=0),
        ),
        candidate=blocks.candidate,
        request_of=blocks.request_of,
    )


def split(outputs: Outputs, requests: Sequence[Blocks]) -> list[Outputs]:
    """Undoes `combine` for the outputs."""
    ends = np.cumsum([len(blocks) for blocks in requests]).tolist()
    starts = [0, *ends[:-1]]
    return [
        {name: array[start:end] for name, array in outputs.items()}
        for start, end in zip(starts, ends, strict=True)
    ]


def cut(blocks: Blocks, num_parts: int) -> list[Blocks]:
    """Parts of a request, of about equal size and in order; `num_parts` is at most its rows."""
    edges = [len(blocks) * part // num_parts for part in range(num_parts + 1)]
    return [
        Blocks(
            request=blocks.request,
            candidate=blocks.candidate.take(slice(start, end)),
            request_of=blocks.request_of[start:end],
        )
        for start, end in itertools.pairwise(edges)
    ]


def join(parts: list[Outputs]) -> Outputs:
    """Undoes `cut` for the outputs."""
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _measure(
    golden: Blocks,
    runtime: Runtime,
    intra_op_threads: int,
    max_batch_rows: int | None,
    pause: Callable[[float], None] | None,
) -> RunCost:
    def run(rows: int) -> None:
        runtime.run(blocks[rows])

    top = max(MAX_SWEEP_ROWS, max_batch_rows or 0)
    blocks = {rows: _repeat(golden, rows) for rows in sweep_sizes(top)}
    # The time of a run with threads of its own is not all in the thread that waits for it.
    clock = time.thread_time if intra_op_threads == 1 else time.perf_counter
    times = sweep(run, max_rows=top, clock=clock, pause=pause)
    cost = fit_cost(times, max_rows=max_batch_rows)
    _log.info(
        "a run takes %.0f us and %.2f us per row, at most %d rows are run together",
        1e6 * cost.fixed_s,
        1e6 * cost.row_s,
        cost.max_rows,
    )
    return cost


def _check_names(bundle: Bundle, runtime: Runtime, golden: Blocks, name: str) -> None:
    feeds = golden.feeds()
    expected_inputs = set(bundle.manifest.inputs) | ({"item_sum"} & feeds.keys())
    expected_outputs = bundle.manifest.outputs
    if not len(golden):
        raise BundleRejected(f"{bundle.path}: there are no golden rows", where=GOLDEN_ENCODED)
    for what, actual, expected in (
        ("inputs", set(runtime.input_names), expected_inputs),
        ("outputs", set(runtime.output_names), set(expected_outputs)),
        ("outputs", set(bundle.golden.expected), set(expected_outputs)),
        ("inputs", set(runtime.input_names) - set(feeds), set[str]()),
    ):
        if actual != expected:
            raise BundleRejected(
                f"{bundle.path}: the graph's {what} are {', '.join(sorted(actual))}, "
                f"expected {', '.join(sorted(expected))}",
                where=name,
            )


def _check_golden_answers(bundle: Bundle, runtime: Runtime, golden: Blocks, file: str) -> None:
    try:
        outputs = runtime.run(golden)
    except Exception as exc:  # the library's errors share no base class but this one
        raise BundleRejected(
            f"{bundle.path}: the model cannot run: {first_line(exc)}", where=file
        ) from exc
    for name, expected in bundle.golden.expected.items():
        actual: npt.NDArray[Any] = outputs[name]
        if actual.dtype != np.float32 or actual.shape != expected.shape:
            raise BundleRejected(
                f"{bundle.path}: output {name} is {actual.dtype} {list(actual.shape)}, "
                f"expected float32 {list(expected.shape)}",
                where=file,
            )
        absolute, relative, fits = parity_excess(expected, actual)
        if not fits:
            raise BundleRejected(
                f"{bundle.path}: golden rows score another {name} here "
                f"(largest difference {absolute:.2g}, relative {relative:.2g})",
                where=file,
            )
        _log.info("golden rows: %s differs by %.2g at most", name, absolute)


def _repeat(blocks: Blocks, num_rows: int) -> Blocks:
    rows = np.arange(num_rows) % len(blocks)
    num_requests = min(len(blocks.request), -(-num_rows // _ROWS_PER_REQUEST))
    return Blocks(
        request=RequestBlock(
            ids=blocks.request.ids[:num_requests],
            dense=blocks.request.dense[:num_requests],
            history=blocks.request.history[:num_requests],
        ),
        candidate=blocks.candidate.take(rows),
        request_of=np.arange(num_rows) // _ROWS_PER_REQUEST % num_requests,
    )
