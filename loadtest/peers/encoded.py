"""Requests as the peers take them: bodies of POST /score, encoded as the service encodes them.

The peers are spared parsing ids, the user record, the item table, and encoding: less work.
"""

import base64
import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from model.contract.blocks import Blocks
from model.contract.ids import canonical_id
from model.contract.record import UserRecord, unpack_record
from service.materialize import find_record
from service.settings import LimitSettings
from service.state import ServingState
from service.wire import parse_body

PEER_INPUTS = ("request_ids", "request_dense", "candidate_ids", "candidate_dense")


def encode_bodies(state: ServingState, bodies: list[bytes], records: Path) -> list[Blocks]:
    """Blocks of one request each, in the order of the bodies."""
    limits = LimitSettings()
    known: dict[str, UserRecord | None] = {}
    blocks = []
    for body in bodies:
        request = parse_body(body, limits=limits).request
        assert request.time is not None
        user = canonical_id(request.user_id)
        assert user is not None
        if user not in known:
            data = find_record(records, user)
            known[user] = None if data is None else unpack_record(data)
        encoded = state.features.encode(
            user_id=request.user_id,
            time=request.time,
            context=request.context,
            user_features=request.user_features,
            candidates=request.candidates,
            record=known[user],
        )
        blocks.append(encoded.blocks)
    return blocks


def arrays_of(blocks: Blocks) -> dict[str, npt.NDArray[Any]]:  # Any: int64 and float32
    """The four arrays by name, those of no width left out.

    Raises:
        ValueError: The schema has histories, which the peers' adapters do not take.
    """
    feeds = blocks.feeds()
    if "request_history" in feeds:
        raise ValueError("the peers' adapters take no history features")
    return {name: feeds[name] for name in PEER_INPUTS if name in feeds}


def as_object(blocks: Blocks) -> dict[str, Any]:  # Any: JSON
    """As JSON takes it: lists of numbers, the request's own without the leading 1."""
    arrays = arrays_of(blocks)
    return {
        name: (array[0] if name.startswith("request_") else array).tolist()
        for name, array in arrays.items()
    }


def as_base64(blocks: Blocks) -> str:
    """The arrays' little-endian bytes one after another."""
    return base64.b64encode(b"".join(a.tobytes() for a in arrays_of(blocks).values())).decode()


def triton_json(blocks: Blocks) -> tuple[bytes, tuple[tuple[str, str], ...]]:
    """Body and headers in the inference protocol's JSON."""
    inputs = [
        {**_tensor(name, array), "data": array.ravel().tolist()}
        for name, array in arrays_of(blocks).items()
    ]
    return msgspec.json.encode({"inputs": inputs}), ()


def triton_binary(blocks: Blocks) -> tuple[bytes, tuple[tuple[str, str], ...]]:
    """Body and headers in its binary tensor extension, answers in binary too."""
    arrays = arrays_of(blocks)
    inputs = [
        {**_tensor(name, array), "parameters": {"binary_data_size": array.nbytes}}
        for name, array in arrays.items()
    ]
    head = json.dumps({"inputs": inputs, "parameters": {"binary_data_output": True}}).encode()
    headers = (
        ("content-type", "application/octet-stream"),
        ("inference-header-content-length", str(len(head))),
    )
    return head + b"".join(array.tobytes() for array in arrays.values()), headers


def _tensor(name: str, array: npt.NDArray[Any]) -> dict[str, Any]:  # Any: JSON
    # A leading 1 for the batch dimension, which then counts requests.
    is_request = name.startswith("request_")
    shape = [1, array.shape[1]] if is_request else [1, *array.shape]
    datatype = "INT64" if array.dtype == np.int64 else "FP32"
    return {"name": name, "datatype": datatype, "shape": shape}
