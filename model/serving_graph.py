"""The serving form of a trained network: the same probabilities from fewer and larger steps.

Networks keep the form they are trained in. Here their parts are replaced, by type, with equal ones
that cost less to run: weights are combined once, before export, instead of in every run. What is
not known here stays as it is. Sums are taken in another order, so equal means within parity.

Shape letters as in `nets.layers`.
"""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from model.calibrate import LOGIT_BOUND, Calibrator, CalibratorLayer
from model.contract.spec import PADDING_CODE, UNKNOWN_CODE
from model.nets.layers import FieldEmbedding, Heads, InputLayer, Net, NetInput, NetOutput
from model.nets.shared_bottom import SharedBottom

# Fields whose codes have at most so many combinations share one row of a projected table. A row of
# a wide table costs a copy and an addition, 9 us per 100 candidates where 16 columns of a product
# cost 6 (192 outputs, Zen 4): a single field or a pair does not earn that, three fields do.
MAX_JOINT_CODES = 4096
MIN_JOINT_FIELDS = 3
# The request's side is one row: there, looking up is always less work than multiplying.
MAX_FOLDED_CODES = 4096


class Lookup(nn.Module):
    """Ids to rows of a table in which each group of fields has its own part; [n, F] to [n, groups].

    An id is first cut to -1 ... size. The first and last place of a field belong to ids below and
    above it, and hold what the unknown code holds: ids outside cost no comparison.
    """

    def __init__(self, sizes: Sequence[int], groups: Sequence[Sequence[int]]) -> None:
        super().__init__()
        places = [size + 2 for size in sizes]
        counts = [math.prod(places[field] for field in group) for group in groups]
        self.num_rows = sum(counts)
        strides = torch.zeros(len(sizes), len(groups), dtype=torch.int64)
        firsts = torch.zeros(len(groups), dtype=torch.int64)
        for g, group in enumerate(groups):
            firsts[g] = sum(counts[:g])
            stride = 1
            for field in reversed(group):
                strides[field, g] = stride
                firsts[g] += stride  # place 0 is id -1
                stride *= places[field]
        # Fields alone need no product of integers, which ONNX Runtime has no fast one for.
        single = [group[0] for group in groups if len(group) == 1]
        self.is_single = len(single) == len(groups)
        self.is_all = single == list(range(len(sizes)))
        self.register_buffer("low", torch.tensor([-1], dtype=torch.int64))
        self.register_buffer("high", torch.tensor(sizes, dtype=torch.int64))
        self.register_buffer("strides", strides)
        self.register_buffer("fields", torch.tensor(single, dtype=torch.int64))
        self.register_buffer("firsts", firsts)

    def clipped(self, ids: Tensor) -> Tensor:
        """[n, F], each id in -1 ... size."""
        low, high = self.get_buffer("low"), self.get_buffer("high")
        return torch.minimum(torch.maximum(ids, low), high)

    def forward(self, clipped: Tensor) -> Tensor:
        """Rows, from what `clipped` made."""
        if not self.is_single:
            clipped = clipped @ self.get_buffer("strides")
        elif not self.is_all:
            clipped = clipped.index_select(1, self.get_buffer("fields"))
        return clipped + self.get_buffer("firsts")


def with_unknown_ends(rows: Tensor) -> Tensor:
    """A field's rows [V, width] with the unknown code's before and after them."""
    unknown = rows[UNKNOWN_CODE : UNKNOWN_CODE + 1]
    return torch.cat([unknown, rows, unknown])


def joint_rows(tables: Sequence[Tensor]) -> Tensor:
    """Sums of one row of each table, for every combination; the last table runs fastest."""
    made = tables[0]
    for table in tables[1:]:
        made = (made.unsqueeze(1) + table.unsqueeze(0)).flatten(0, 1)
    return made


def joint_groups(sizes: Sequence[int]) -> list[list[int]]:
    """Groups of fields worth a row of their own: smallest fields first, as many as fit."""
    groups: list[list[int]] = []
    group: list[int] = []
    codes = 1
    for field in sorted(range(len(sizes)), key=lambda f: sizes[f]):
        if codes * (sizes[field] + 2) > MAX_JOINT_CODES:
            groups.append(group)
            group, codes = [], 1
        group, codes = [*group, field], codes * (sizes[field] + 2)
    return [sorted(g) for g in (*groups, group) if len(g) >= MIN_JOINT_FIELDS]


class SideSum(nn.Module):
    """One side's fields and numbers through a linear layer: x W + b, without forming all of x.

    Fields in `groups` are looked up in projected tables; the rest are embedded and multiplied
    together with the numbers. The bias lies in the first table's rows, or in the product.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        tables: Sequence[Tensor],
        *,
        weight: Tensor,
        bias: Tensor | None,
        groups: Sequence[Sequence[int]],
    ) -> None:
        """Combines the weights.

        Args:
            sizes: codes of each field.
            tables: embedding rows of each field.
            weight: [inputs, outputs]: the fields' parts in order, then everything else.
            bias: [outputs]; None for none.
            groups: fields that share a row of a projected table.
        """
        super().__init__()
        ends = [with_unknown_ends(table) for table in tables]
        width = tables[0].shape[1] if tables else 0
        parts = [weight[f * width : (f + 1) * width] for f in range(len(sizes))]
        folded = [field for group in groups for field in group]
        kept = [field for field in range(len(sizes)) if field not in folded]
        self.num_groups = len(groups)
        self.folded_rows = Lookup(sizes, groups) if groups else None
        self.kept_rows = Lookup(sizes, [[field] for field in kept]) if kept else None
        if groups:
            projected = [joint_rows([ends[f] @ parts[f] for f in group]) for group in groups]
            if bias is not None:
                projected[0] = projected[0] + bias
                bias = None
            self.folded = nn.Parameter(torch.cat(projected))
        if kept:
            self.kept = nn.Parameter(torch.cat([ends[f] for f in kept]))
        rest = weight[len(sizes) * width :]
        self.weight = nn.Parameter(torch.cat([*(parts[f] for f in kept), rest]))
        self.bias = nn.Parameter(bias) if bias is not None else None

    def forward(self, ids: Tensor, others: Sequence[Tensor], base: Tensor | None = None) -> Tensor:
        """[n, outputs]: the layer's sum, on top of `base` where one is given.

        Args:
            ids: [n, F].
            others: what else the layer reads, [n, width] each.
            base: [n, outputs].
        """
        sums = [] if base is None else [base]
        clipped = None
        if self.folded_rows is not None:
            clipped = self.folded_rows.clipped(ids)
            rows = self.folded_rows(clipped)
            if self.num_groups == 1:
                sums.append(functional.embedding(rows.squeeze(1), self.folded))
            else:
                sums.append(functional.embedding(rows, self.folded).sum(dim=1))
        inputs = [part for part in others if part.shape[1]]
        if self.kept_rows is not None:
            clipped = self.kept_rows.clipped(ids) if clipped is None else clipped
            kept = functional.embedding(self.kept_rows(clipped), self.kept)
            inputs = [kept.flatten(1), *inputs]
        total = sum(sums[1:], sums[0]) if sums else self.bias
        if not inputs:
            return cast(Tensor, total)
        joined = torch.cat(inputs, dim=1) if len(inputs) > 1 else inputs[0]
        if total is None:
            return joined @ self.weight
        result = torch.addmm(total, joined, self.weight)
        return result if self.bias is None or total is self.bias else result + self.bias


def field_tables(embedding: FieldEmbedding, side: str) -> tuple[list[int], list[Tensor]]:
    """Codes and embedding rows of each field of a side."""
    sizes = cast(list[int], embedding.get_buffer(f"{side}_sizes").tolist())
    starts = cast(list[int], embedding.get_buffer(f"{side}_starts").tolist())
    table = embedding.table.weight.detach()
    return sizes, [table[a : a + n] for a, n in zip(starts, sizes, strict=True)]


class RequestSide(nn.Module):
    """What a linear layer makes of the request: [R, outputs]; histories are pooled as in training.

    The layer's inputs stand as in `InputLayer`: fields, histories, numbers.
    """

    def __init__(self, embedding: FieldEmbedding, layer: nn.Linear) -> None:
        super().__init__()
        sizes, tables = field_tables(embedding, "request")
        self.sum = SideSum(
            sizes,
            tables,
            weight=layer.weight.detach().T,
            bias=layer.bias.detach(),
            groups=[[f] for f, size in enumerate(sizes) if size <= MAX_FOLDED_CODES],
        )
        self.lengths = embedding.lengths
        if self.lengths:
            history_sizes, history_tables = field_tables(embedding, "history")
            # Positions of one history share a table: it is stored once per history.
            firsts = [sum(self.lengths[:i]) for i in range(len(self.lengths))]
            self.rows = Lookup(
                [history_sizes[i] for i in firsts], [[i] for i in range(len(firsts))]
            )
            self.table = nn.Parameter(
                torch.cat([with_unknown_ends(history_tables[i]) for i in firsts])
            )

    def forward(self, inputs: NetInput) -> Tensor:
        """[R, outputs]."""
        others = [*self._pooled(inputs.request_history), inputs.request_dense]
        result: Tensor = self.sum(inputs.request_ids, others)
        return result

    def _pooled(self, ids: Tensor) -> list[Tensor]:
        """The mean of each history's present ids, [R, D] each."""
        pooled, start = [], 0
        for i, length in enumerate(self.lengths):
            part = ids[:, start : start + length]
            high, first = self.rows.get_buffer("high")[i], self.rows.get_buffer("firsts")[i]
            rows = part.clamp(min=-1).minimum(high) + first
            values = functional.embedding(rows, self.table)  # [R, L, D]
            present = (part != PADDING_CODE).to(values.dtype)
            total = (values * present.unsqueeze(-1)).sum(dim=1)
            pooled.append(total / present.sum(dim=1, keepdim=True).clamp(min=1.0))
            start += length
        return pooled


class ServingInput(nn.Module):
    """`InputLayer`: the request once, gathered as the start of the candidates' sum."""

    def __init__(self, layer: InputLayer) -> None:
        super().__init__()
        sizes, tables = field_tables(layer.embedding, "candidate")
        self.request = (
            RequestSide(layer.embedding, layer.request) if layer.request is not None else None
        )
        bias = layer.candidate.bias
        self.candidate = SideSum(
            sizes,
            tables,
            weight=layer.candidate.weight.detach().T,
            bias=None if bias is None else bias.detach(),
            groups=joint_groups(sizes),
        )

    def forward(self, inputs: NetInput) -> Tensor:
        """See `InputLayer`."""
        base = None
        if self.request is not None:
            base = self.request(inputs).index_select(0, inputs.request_of)
        result: Tensor = self.candidate(inputs.candidate_ids, [inputs.candidate_dense], base)
        return result


class FlatHeads(nn.Module):
    """`Heads` as two products over all steps at once, [B, T * K] to [B, T]."""

    def __init__(self, heads: Heads, *, is_shared: bool = False) -> None:
        """Joins the steps' weights; `is_shared` where all steps read one representation [B, K]."""
        super().__init__()
        join = torch.cat if is_shared else torch.block_diag
        hidden = list(heads.hidden.weight.detach())
        self.hidden = linear(
            torch.cat(hidden, dim=1) if is_shared else join(*hidden), bias_of(heads.hidden)
        )
        self.output = linear(
            torch.block_diag(*heads.output.weight.detach()), bias_of(heads.output)
        )

    def forward(self, representations: Tensor) -> Tensor:
        """See `Heads`; [B, T, K], or [B, K] if shared."""
        logits: Tensor = self.output(torch.relu(self.hidden(representations.flatten(1))))
        return logits

    def map_logits(self, slopes: Tensor, offsets: Tensor) -> None:
        """Makes the logits slopes * logits + offsets, [T] each."""
        with torch.no_grad():
            self.output.weight.mul_(slopes[:, None])
            self.output.bias.mul_(slopes).add_(offsets)


class ServingSharedBottom(nn.Module):
    """`SharedBottom`: the heads read the bottom itself instead of T copies of it."""

    def __init__(self, net: SharedBottom) -> None:
        super().__init__()
        self.options = net.options
        self.input, self.bottom = ServingInput(net.input), net.bottom
        self.heads = FlatHeads(net.heads, is_shared=True)

    def forward(self, inputs: NetInput) -> NetOutput:
        """See `Net`."""
        shared = self.bottom(torch.relu(self.input(inputs)))
        return Net.output(
            cast(Net, self), self.heads(shared), representations=shared, shared=shared
        )


def linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    """The layer x W + b from weight [inputs, outputs] and bias [outputs]."""
    layer = nn.Linear(*weight.shape)
    with torch.no_grad():
        layer.weight.copy_(weight.T)
        layer.bias.copy_(bias)
    return layer


def bias_of(layer: Any) -> Tensor:  # Any: a BatchedLinear
    """The biases of all copies, one after another."""
    return cast(Tensor, layer.bias.detach().flatten())


def serving_forms() -> Mapping[type[nn.Module], Callable[[Any], nn.Module]]:
    """What each kind of module is replaced with; Any: a module of that kind."""
    from model.serving_tafe import serving_tafe

    return {
        InputLayer: ServingInput,
        Heads: FlatHeads,
        SharedBottom: ServingSharedBottom,
        **serving_tafe(),
    }


def serving_net(net: Net) -> nn.Module:
    """The serving form of a network; the network itself is left as it is."""
    with torch.no_grad():
        return _replaced(copy.deepcopy(net).eval())


def _replaced(module: nn.Module) -> nn.Module:
    make = serving_forms().get(type(module))
    if make is not None:
        return make(module)
    for name, child in list(module.named_children()):
        setattr(module, name, _replaced(child))
    return module


class ServingGraph(nn.Module):
    """`export.ScoringGraph` in its serving form: same inputs, same outputs, within parity.

    Lines (identity, temperature, Platt) and the sign that the exponential wants are part of the
    heads' last layer; all steps go through one clip, exponential and reciprocal.
    """

    def __init__(self, net: Net, calibrators: Sequence[Calibrator]) -> None:
        super().__init__()
        self.net = serving_net(net)
        self.layers = nn.ModuleList([CalibratorLayer(c) for c in calibrators])
        self.has_knots = any(bool(c.x) for c in calibrators)
        slopes = torch.tensor([-c.slope for c in calibrators], dtype=torch.float32)
        offsets = torch.tensor([-c.offset for c in calibrators], dtype=torch.float32)
        heads = getattr(self.net, "heads", None)
        self.is_mapped = (
            not self.has_knots
            and net.options.outputs == "conditional"
            and isinstance(heads, FlatHeads)
        )
        if self.is_mapped:
            cast(FlatHeads, heads).map_logits(slopes, offsets)
        self.register_buffer("slopes", slopes)
        self.register_buffer("offsets", offsets)

    def forward(
        self,
        request_ids: Tensor,
        request_dense: Tensor,
        request_history: Tensor,
        candidate_ids: Tensor,
        candidate_dense: Tensor,
        request_of: Tensor,
    ) -> tuple[Tensor, ...]:
        """See `export.ScoringGraph`."""
        inputs = NetInput(
            request_ids=request_ids,
            request_dense=request_dense,
            request_history=request_history,
            candidate_ids=candidate_ids,
            candidate_dense=candidate_dense,
            request_of=request_of,
        )
        negated = self._negated(self.net(inputs).logits)
        # Not sigmoid: see `export.ScoringGraph`.
        probabilities = 1.0 / (1.0 + torch.exp(negated.clamp(-LOGIT_BOUND, LOGIT_BOUND)))
        conditional = [probabilities[:, t] for t in range(len(self.layers))]
        cumulative = [conditional[0]]
        for probability in conditional[1:]:
            cumulative.append(cumulative[-1] * probability)
        return (*cumulative, conditional[-1])

    def _negated(self, logits: Tensor) -> Tensor:
        """Calibrated logits with their sign turned, [B, T]."""
        if self.is_mapped:
            return logits
        if self.has_knots:
            columns = [layer(logits[:, t]) for t, layer in enumerate(self.layers)]
            return -torch.stack(columns, dim=1)
        return logits * self.get_buffer("slopes") + self.get_buffer("offsets")
