"""The serving form in two parts: what the first layer makes of an item, and all that comes after.

The first layer is a sum over its inputs. The part of that sum which an item's own columns make is
the same in every request, so a service makes it once per item and keeps it.

Shape letters as in `nets.layers`; H is the width of the first layer.
"""

import copy
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from model.contract.blocks import ItemColumns
from model.nets.layers import NetInput
from model.serving_graph import ServingGraph, ServingInput
from model.serving_layers import Lookup, joined_columns


class ItemSide(nn.Module):
    """The item's share of a first layer, [B, H], without the bias."""

    def __init__(self, layer: ServingInput, columns: ItemColumns) -> None:
        super().__init__()
        self.inputs = ChosenColumns(layer, ids=columns.ids, dense=columns.dense)
        self.weight = nn.Parameter(layer.weight.detach()[self.inputs.rows].clone())

    def forward(self, candidate_ids: Tensor, candidate_dense: Tensor) -> Tensor:
        """See `contract.blocks`."""
        chosen: Tensor = self.inputs(candidate_ids, candidate_dense)
        return chosen @ self.weight


class InputByItem(nn.Module):
    """`ServingInput` that is given the item's share and reads the other columns only."""

    def __init__(self, layer: ServingInput, columns: ItemColumns) -> None:
        super().__init__()
        num_ids = 0 if layer.fields is None else len(layer.fields.get_buffer("high"))
        num_dense = len(layer.weight) - num_ids * _embedding_width(layer)
        self.request, self.bias = layer.request, layer.bias
        self.inputs = ChosenColumns(
            layer,
            ids=[j for j in range(num_ids) if j not in columns.ids],
            dense=[j for j in range(num_dense) if j not in columns.dense],
        )
        self.weight = nn.Parameter(layer.weight.detach()[self.inputs.rows].clone())

    def forward(self, inputs: NetInput) -> Tensor:
        """See `InputLayer`."""
        base = inputs.item_sum
        assert base is not None
        if self.request is not None:
            # Not `index_select`, which would reshape the row numbers first.
            base = functional.embedding(inputs.request_of, self.request(inputs)) + base
        elif self.bias is not None:
            base = base + self.bias
        if not len(self.weight):
            return base
        return torch.addmm(
            base, self.inputs(inputs.candidate_ids, inputs.candidate_dense), self.weight
        )


class ChosenColumns(nn.Module):
    """Some of the columns that a first layer reads, ids looked up.

    Attributes:
        rows: those of the layer's weight that belong to them, int64.
    """

    def __init__(self, layer: ServingInput, *, ids: Sequence[int], dense: Sequence[int]) -> None:
        super().__init__()
        width = _embedding_width(layer)
        tables = [] if layer.fields is None else layer.fields.tables()
        self.fields = Lookup([tables[j] for j in ids]) if ids else None
        self.id_runs, self.dense_runs = _runs(ids), _runs(dense)
        self.rows = torch.tensor(
            [j * width + k for j in ids for k in range(width)]
            + [len(tables) * width + j for j in dense],
            dtype=torch.int64,
        )

    def forward(self, candidate_ids: Tensor, candidate_dense: Tensor) -> Tensor:
        """[B, columns]."""
        parts = [candidate_dense[:, a:b] for a, b in self.dense_runs]
        if self.fields is not None:
            ids = joined_columns([candidate_ids[:, a:b] for a, b in self.id_runs])
            parts = [self.fields(ids).flatten(1), *parts]
        return joined_columns(parts)


class GraphByItem(nn.Module):
    """`ServingGraph` with one input more, item_sum [B, H]."""

    def __init__(self, graph: ServingGraph) -> None:
        super().__init__()
        self.whole = graph  # not `graph`: an exported module has one of its own

    def forward(
        self,
        request_ids: Tensor,
        request_dense: Tensor,
        request_history: Tensor,
        candidate_ids: Tensor,
        candidate_dense: Tensor,
        request_of: Tensor,
        item_sum: Tensor,
    ) -> tuple[Tensor, ...]:
        """See `export.ScoringGraph`."""
        return self.whole.score(
            NetInput(
                request_ids=request_ids,
                request_dense=request_dense,
                request_history=request_history,
                candidate_ids=candidate_ids,
                candidate_dense=candidate_dense,
                request_of=request_of,
                item_sum=item_sum,
            )
        )


def item_parts(graph: ServingGraph, columns: ItemColumns) -> tuple[ItemSide, GraphByItem] | None:
    """Both parts; the graph is left as it is.

    None where items have no columns, and where the network has no one first layer that is a sum
    over the candidates' columns.
    """
    found = [name for name, part in graph.named_modules() if isinstance(part, ServingInput)]
    if len(found) != 1 or not columns.features:
        return None
    rest = copy.deepcopy(graph)
    layer = rest.get_submodule(found[0])
    assert isinstance(layer, ServingInput)
    parent, _, name = found[0].rpartition(".")
    setattr(rest.get_submodule(parent), name, InputByItem(layer, columns))
    return ItemSide(layer, columns).eval(), GraphByItem(rest).eval()


def _embedding_width(layer: ServingInput) -> int:
    return 0 if layer.fields is None else layer.fields.table.shape[1]


def _runs(places: Sequence[int]) -> list[tuple[int, int]]:
    """Stretches of neighbours, as start and end: a slice costs a third of a choice of columns."""
    if not places:
        return []
    breaks = [i + 1 for i, (a, b) in enumerate(pairwise(places)) if b != a + 1]
    edges = [0, *breaks, len(places)]
    return [(places[a], places[b - 1] + 1) for a, b in pairwise(edges)]
