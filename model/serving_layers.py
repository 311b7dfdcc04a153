"""Parts of the serving form: equal to parts of the networks, and cheaper to run.

Weights are combined once, here, instead of in every run. Shape letters as in `nets.layers`.
"""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from model.contract.spec import PADDING_CODE, UNKNOWN_CODE
from model.nets.layers import BatchedLinear, FieldEmbedding, Heads, NetInput

# A request's field is looked up as the first layer's outputs, not as its embedding, where the field
# has at most so many codes: one row added, not multiplied. Candidates' fields are not: a projected
# row of 192 numbers is 12 times as wide, and reading it takes as long as the product that it saves.
MAX_FOLDED_CODES = 4096


class Lookup(nn.Module):
    """Rows of fields in one table, each field at its own place; ids outside become unknown.

    An id is cut to -1 ... size. A field has a row for either end, which holds what its unknown code
    holds: three operations, where comparing and choosing takes five.
    """

    def __init__(self, tables: Sequence[Tensor]) -> None:
        """Joins the fields' rows, [codes, width] each."""
        super().__init__()
        sizes = torch.tensor([len(table) for table in tables], dtype=torch.int64)
        ends = [table[UNKNOWN_CODE : UNKNOWN_CODE + 1] for table in tables]
        parts = [torch.cat([e, table, e]) for e, table in zip(ends, tables, strict=True)]
        self.table = nn.Parameter(torch.cat(parts))
        self.register_buffer("low", torch.tensor([-1], dtype=torch.int64))
        self.register_buffer("high", sizes)
        self.register_buffer("firsts", torch.cumsum(sizes + 2, 0) - sizes - 1)

    def tables(self) -> list[Tensor]:
        """Each field's rows, as they were given."""
        sizes, firsts = self.get_buffer("high").tolist(), self.get_buffer("firsts").tolist()
        return [self.table.detach()[a : a + n] for a, n in zip(firsts, sizes, strict=True)]

    def forward(self, ids: Tensor) -> Tensor:
        """[n, F] ids to [n, F, width]."""
        clipped = torch.minimum(torch.maximum(ids, self.get_buffer("low")), self.get_buffer("high"))
        return functional.embedding(clipped + self.get_buffer("firsts"), self.table)


def field_tables(embedding: FieldEmbedding, side: str) -> list[Tensor]:
    """Embedding rows of each field of a side."""
    sizes, starts = embedding.get_buffer(f"{side}_sizes"), embedding.get_buffer(f"{side}_starts")
    table = embedding.table.weight.detach()
    return [table[a : a + n] for a, n in zip(starts.tolist(), sizes.tolist(), strict=True)]


class RequestSide(nn.Module):
    """A linear layer of the request: [R, outputs], from fields, histories and numbers.

    The fields' embeddings are multiplied with the layer before export. What is left to do for them
    is a sum of rows, one of which holds the bias.
    """

    def __init__(self, embedding: FieldEmbedding, layer: nn.Linear) -> None:
        super().__init__()
        tables, width = field_tables(embedding, "request"), embedding.width
        weight, bias = layer.weight.detach().T, layer.bias.detach()
        folded = [f for f, table in enumerate(tables) if len(table) <= MAX_FOLDED_CODES]
        kept = [f for f in range(len(tables)) if f not in folded]
        parts = [weight[f * width : (f + 1) * width] for f in range(len(tables))]
        projected = [tables[f] @ parts[f] for f in folded]
        self.bias = nn.Parameter(bias) if not folded else None
        self.folded = Lookup([projected[0] + bias, *projected[1:]]) if folded else None
        self.kept = Lookup([tables[f] for f in kept]) if kept else None
        self.register_buffer("folded_fields", torch.tensor(folded, dtype=torch.int64))
        self.register_buffer("kept_fields", torch.tensor(kept, dtype=torch.int64))
        rest = weight[len(tables) * width :]
        self.weight = nn.Parameter(torch.cat([*(parts[f] for f in kept), rest]))
        self.lengths = embedding.lengths
        history = field_tables(embedding, "history")
        firsts = [sum(self.lengths[:i]) for i in range(len(self.lengths))]
        self.histories = nn.ModuleList([Lookup([history[i]]) for i in firsts])

    def forward(self, inputs: NetInput) -> Tensor:
        """[R, outputs]."""
        ids, others = inputs.request_ids, [inputs.request_dense]
        total: Tensor | None = self.bias
        if self.folded is not None:
            total = self.folded(self._chosen(ids, "folded_fields")).sum(dim=1)
        others = [*self._pooled(inputs.request_history), *others]
        if self.kept is not None:
            others = [self.kept(self._chosen(ids, "kept_fields")).flatten(1), *others]
        joined = joined_columns(others)
        assert total is not None
        return total if not joined.shape[1] else torch.addmm(total, joined, self.weight)

    def _chosen(self, ids: Tensor, which: str) -> Tensor:
        fields = self.get_buffer(which)
        return ids if len(fields) == ids.shape[1] else ids.index_select(1, fields)

    def _pooled(self, ids: Tensor) -> list[Tensor]:
        """The mean of each history's present ids, [R, D] each."""
        pooled, start = [], 0
        for length, look_up in zip(self.lengths, self.histories, strict=True):
            part = ids[:, start : start + length]
            present = (part != PADDING_CODE).to(torch.float32)
            values = look_up(part) * present.unsqueeze(-1)  # [R, L, D]
            pooled.append(values.sum(dim=1) / present.sum(dim=1, keepdim=True).clamp(min=1.0))
            start += length
        return pooled


def joined_columns(parts: Sequence[Tensor]) -> Tensor:
    """The parts side by side; those of no width are left out."""
    wide = [part for part in parts if part.shape[1]]
    return torch.cat(wide, dim=1) if len(wide) > 1 else (wide or parts)[0]


class FlatHeads(nn.Module):
    """`Heads` as two products over all steps at once, [B, T * K] to [B, T]."""

    def __init__(self, heads: Heads, *, is_shared: bool = False) -> None:
        """Joins the steps' weights; `is_shared` where all steps read one representation [B, K]."""
        super().__init__()
        hidden, output = (list(layer.weight.detach()) for layer in (heads.hidden, heads.output))
        joined = torch.cat(hidden, dim=1) if is_shared else block_diagonal(hidden)
        self.hidden = linear(joined, bias_of(heads.hidden))
        self.output = linear(block_diagonal(output), bias_of(heads.output))

    def forward(self, representations: Tensor) -> Tensor:
        """See `Heads`; [B, T, K], or [B, K] if shared."""
        logits: Tensor = self.output(torch.relu(self.hidden(representations.flatten(1))))
        return logits

    def map_logits(self, slopes: Tensor, offsets: Tensor) -> None:
        """Makes the logits slopes * logits + offsets, [T] each."""
        with torch.no_grad():
            self.output.weight.mul_(slopes[:, None])
            self.output.bias.mul_(slopes).add_(offsets)


def linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    """The layer x W + b from weight [inputs, outputs] and bias [outputs]."""
    layer = nn.Linear(*weight.shape)
    with torch.no_grad():
        layer.weight.copy_(weight.T)
        layer.bias.copy_(bias)
    return layer


def block_diagonal(parts: Sequence[Tensor]) -> Tensor:
    """The parts along the diagonal of a matrix of zeros."""
    whole: Tensor = torch.block_diag(*parts)  # type: ignore[no-untyped-call]  # torch's own
    return whole


def bias_of(layer: BatchedLinear) -> Tensor:
    """The biases of all copies, one after another."""
    return cast(Tensor, layer.bias).detach().flatten()
