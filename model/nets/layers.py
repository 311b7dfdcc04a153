"""What every network is made of: its inputs, its outputs, field embedding, batched layers.

Shape letters: R requests, B candidates, T steps, P copies of a layer side by side, G patterns, F
tokens, D embedding width, K width of a representation.
"""

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.nn import functional

from model.contract.blocks import BlockLayout, Blocks
from model.contract.encode import Encoder
from model.contract.spec import PADDING_CODE, UNKNOWN_CODE

MIN_LOG_RATIO = 1e-6  # c_t of free heads stays this far below 1


@dataclass(frozen=True, kw_only=True)
class NetSpec:
    """The shapes a network is built for.

    Attributes:
        request_tables, candidate_tables: codes of each id column, by feature name.
        request_dense, candidate_dense: dense columns.
        histories: (feature whose table is shared, length) of each history.
        num_steps: T.
    """

    request_tables: dict[str, int]
    candidate_tables: dict[str, int]
    request_dense: int
    candidate_dense: int
    histories: tuple[tuple[str, int], ...]
    num_steps: int

    @classmethod
    def of(cls, encoder: Encoder) -> "NetSpec":
        """The shapes that an encoder's blocks have."""

        def tables(layout: BlockLayout) -> dict[str, int]:
            return {name: encoder.table_size(name) for name in layout.ids}

        request, candidate = encoder.request_layout, encoder.candidate_layout
        return cls(
            request_tables=tables(request),
            candidate_tables=tables(candidate),
            request_dense=len(request.dense_columns),
            candidate_dense=len(candidate.dense_columns),
            histories=tuple((h.of, h.max_length) for h in request.histories),
            num_steps=len(encoder.schema.steps),
        )


@dataclass(frozen=True, kw_only=True)
class NetInput:
    """Blocks as tensors; see `contract.blocks` for their shapes. Networks read no `item_sum`."""

    request_ids: Tensor
    request_dense: Tensor
    request_history: Tensor
    candidate_ids: Tensor
    candidate_dense: Tensor
    request_of: Tensor
    item_sum: Tensor | None = None

    @classmethod
    def of(cls, blocks: Blocks) -> "NetInput":
        """Tensors that share the blocks' memory."""
        item_sum = blocks.candidate.item_sum
        return cls(
            request_ids=torch.from_numpy(blocks.request.ids),
            request_dense=torch.from_numpy(blocks.request.dense),
            request_history=torch.from_numpy(blocks.request.history),
            candidate_ids=torch.from_numpy(blocks.candidate.ids),
            candidate_dense=torch.from_numpy(blocks.candidate.dense),
            request_of=torch.from_numpy(blocks.request_of),
            item_sum=None if item_sum is None else torch.from_numpy(item_sum),
        )


@dataclass(frozen=True, kw_only=True)
class NetOutput:
    """What a network makes of B candidates.

    Attributes:
        logits: [B, T] float32, of the conditional step probabilities, uncalibrated.
        representations: [B, T, K] float32, one per step: before its head, or the head's hidden
            layer where what is below is one for all steps.
        shared: [B, S] float32, what all steps share below the representations; None where nothing
            but the embedding is shared.
        marginal: [B, T] float32, logits of the cumulative probabilities where the heads are free;
            `logits` then follow from them. None where the heads are conditional.
    """

    logits: Tensor
    representations: Tensor
    shared: Tensor | None = None
    marginal: Tensor | None = None


class Options(BaseModel):
    """Base of an architecture's options; unknown ones are refused.

    Attributes:
        outputs: what the heads' logits are of: "conditional" step probabilities, ordered by
            construction, or "marginal" ones, free of each other (AITM; the `hinge` objective).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    embedding: int = Field(default=16, ge=1)
    dropout: float = Field(default=0.1, ge=0, lt=1)
    outputs: Literal["conditional", "marginal"] = "conditional"


class Net(nn.Module):
    """A network: `forward(NetInput) -> NetOutput`; each is one entry of `ARCHITECTURES`.

    Attributes:
        options: as given.
        heads: the last layers, one per step.
        representation_width: K of `NetOutput.representations`.
        shared_width: S of `NetOutput.shared`; 0 where it is None.
        has_step_representations: whether the representations of two steps differ.
    """

    options_type: ClassVar[type[Options]] = Options
    options: Options
    heads: "Heads"
    representation_width: int
    shared_width: int = 0
    has_step_representations: bool = True

    def forward(self, inputs: NetInput) -> NetOutput:
        """Scores candidates; rows do not influence each other."""
        raise NotImplementedError

    def set_base_rates(self, rates: Sequence[float]) -> None:
        """Starts each step's head at its base rate; free heads at the cumulative one.

        Args:
            rates: conditional, one per step, inside (0, 1).
        """
        if self.options.outputs == "marginal":
            rates = list(accumulate(rates, operator.mul))
        self.heads.set_base_rates(rates)

    def output(
        self, head_logits: Tensor, *, representations: Tensor, shared: Tensor | None
    ) -> NetOutput:
        """The heads' logits as what the options say they are."""
        is_marginal = self.options.outputs == "marginal"
        return NetOutput(
            logits=conditional_logits(head_logits) if is_marginal else head_logits,
            representations=representations,
            shared=shared,
            marginal=head_logits if is_marginal else None,
        )

    def embedding_parameters(self) -> list[nn.Parameter]:
        """Parameters of the id tables; all others are dense."""
        tables = [module for module in self.modules() if isinstance(module, nn.Embedding)]
        return [parameter for table in tables for parameter in table.parameters()]


class FieldEmbedding(nn.Module):
    """One table for all id fields, each at its offset; ids outside a field become unknown."""

    def __init__(self, spec: NetSpec, *, width: int) -> None:
        super().__init__()
        sizes = {**spec.request_tables, **spec.candidate_tables}
        starts = dict(zip(sizes, _running_sums(list(sizes.values())), strict=True))
        self.table = nn.Embedding(sum(sizes.values()), width)
        self.reset()
        self.width = width
        self.lengths = [length for _, length in spec.histories]
        for side, tables in (
            ("request", spec.request_tables),
            ("candidate", spec.candidate_tables),
        ):
            self._remember(side, [sizes[n] for n in tables], [starts[n] for n in tables])
        shared = [name for name, length in spec.histories for _ in range(length)]
        self._remember("history", [sizes[n] for n in shared], [starts[n] for n in shared])

    def reset(self) -> None:
        """Draws the table anew, from torch's own generator."""
        width = self.table.embedding_dim
        nn.init.normal_(self.table.weight, std=1.0 / math.sqrt(width) / 10.0)

    def request(self, inputs: NetInput) -> Tensor:
        """Request fields, then histories: [R, F, D]; a history is the mean of its present ids."""
        fields = self._look_up(inputs.request_ids, "request")
        if not self.lengths:
            return fields
        values = self._look_up(inputs.request_history, "history")
        present = (inputs.request_history != PADDING_CODE).to(values.dtype).unsqueeze(-1)
        pooled, start = [fields], 0
        for length in self.lengths:
            part = slice(start, start + length)
            total = (values[:, part] * present[:, part]).sum(dim=1)
            count = present[:, part].sum(dim=1).clamp(min=1.0)
            pooled.append((total / count).unsqueeze(1))
            start += length
        return torch.cat(pooled, dim=1)

    def candidate(self, inputs: NetInput) -> Tensor:
        """Candidate fields, [B, F, D]."""
        return self._look_up(inputs.candidate_ids, "candidate")

    def _remember(self, side: str, sizes: list[int], starts: list[int]) -> None:
        self.register_buffer(f"{side}_sizes", torch.tensor(sizes, dtype=torch.int64))
        self.register_buffer(f"{side}_starts", torch.tensor(starts, dtype=torch.int64))

    def _look_up(self, ids: Tensor, side: str) -> Tensor:
        sizes, starts = self.get_buffer(f"{side}_sizes"), self.get_buffer(f"{side}_starts")
        known = (ids >= 0) & (ids < sizes)
        rows = torch.where(known, ids, UNKNOWN_CODE) + starts
        embedded: Tensor = self.table(rows)
        return embedded


class InputLayer(nn.Module):
    """A first layer split by side: what depends on the request is computed once per request.

    Layers that read the same inputs (experts, gates, towers) lie side by side in `outputs`: they
    are one product.
    """

    def __init__(self, spec: NetSpec, *, embedding: int, outputs: int) -> None:
        super().__init__()
        self.embedding = FieldEmbedding(spec, width=embedding)
        num_request, num_candidate = side_widths(spec, embedding=embedding)
        self.request = nn.Linear(num_request, outputs) if num_request else None
        self.candidate = nn.Linear(num_candidate, outputs, bias=not num_request)

    def forward(self, inputs: NetInput) -> Tensor:
        """[B, outputs], before any activation."""
        candidate = torch.cat(
            [self.embedding.candidate(inputs).flatten(1), inputs.candidate_dense], dim=1
        )
        hidden: Tensor = self.candidate(candidate)
        if self.request is None:
            return hidden
        request = torch.cat(
            [self.embedding.request(inputs).flatten(1), inputs.request_dense], dim=1
        )
        of_request: Tensor = self.request(request)
        return hidden + of_request.index_select(0, inputs.request_of)


class BatchedLinear(nn.Module):
    """P linear layers in one product: [P, B, in] to [P, B, out]."""

    def __init__(self, copies: int, inputs: int, outputs: int, *, bias: bool = True) -> None:
        super().__init__()
        bound = 1.0 / math.sqrt(inputs)
        self.weight = nn.Parameter(torch.empty(copies, inputs, outputs).uniform_(-bound, bound))
        self.bias = (
            nn.Parameter(torch.empty(copies, 1, outputs).uniform_(-bound, bound)) if bias else None
        )

    def forward(self, inputs: Tensor) -> Tensor:
        """Applies layer p to inputs[p]."""
        if self.bias is None:
            return torch.bmm(inputs, self.weight)
        return torch.baddbmm(self.bias, inputs, self.weight)


class BatchedMlp(nn.Module):
    """P MLPs side by side, ReLU and dropout after each layer.

    [P, B, widths[0]] to [P, B, widths[-1]]; one width alone changes nothing.
    """

    def __init__(self, copies: int, widths: Sequence[int], *, dropout: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList([BatchedLinear(copies, *pair) for pair in pairwise(widths)])
        self.dropout = nn.Dropout(dropout)

    def forward(self, inputs: Tensor) -> Tensor:
        """Applies MLP p to inputs[p]."""
        for layer in self.layers:
            inputs = self.dropout(torch.relu(layer(inputs)))
        return inputs


class BatchedLayerNorm(nn.Module):
    """Layer normalisation with its own scale and shift per copy: [P, ..., width]."""

    def __init__(self, copies: int, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(copies, 1, width))
        self.shift = nn.Parameter(torch.zeros(copies, 1, width))

    def forward(self, inputs: Tensor) -> Tensor:
        """Normalises the last dimension."""
        normal: Tensor = functional.layer_norm(inputs, inputs.shape[-1:])
        return normal * self.scale + self.shift


class Heads(nn.Module):
    """One small MLP per step on its own representation: [B, T, K] to logits [B, T]."""

    def __init__(self, num_steps: int, width: int, hidden: int, *, dropout: float) -> None:
        super().__init__()
        self.hidden = BatchedLinear(num_steps, width, hidden)
        self.output = BatchedLinear(num_steps, hidden, 1)
        self.dropout = nn.Dropout(dropout)
        with torch.no_grad():
            self.output.weight.mul_(0.1)

    def forward(self, representations: Tensor) -> Tensor:
        """Logits of the steps: of which probabilities, `Options.outputs` says."""
        return self.logits(self.hidden_states(representations))

    def hidden_states(self, representations: Tensor) -> Tensor:
        """Each step's hidden layer, [B, T, hidden]."""
        return torch.relu(self.hidden(representations.transpose(0, 1))).transpose(0, 1)

    def logits(self, hidden_states: Tensor) -> Tensor:
        """Logits [B, T] from the hidden layers."""
        logits: Tensor = self.output(self.dropout(hidden_states.transpose(0, 1)))
        return logits.squeeze(-1).transpose(0, 1)

    def set_base_rates(self, rates: Sequence[float]) -> None:
        """Last biases at the logits of the rates. Source: papers.md 1.6."""
        logits = torch.logit(torch.tensor(rates, dtype=torch.float64)).float()
        assert self.output.bias is not None
        with torch.no_grad():
            self.output.bias.copy_(logits.reshape(-1, 1, 1))


def conditional_logits(marginal: Tensor) -> Tensor:
    """Logits of c_t = min(1, P_t / P_{t-1}) from free logits of P_t, [B, T] each.

    log c is bounded a hair below 0, so that the logit is finite; the product of the c_t is then P_t
    wherever the given order holds. [derived]
    """
    # Not logsigmoid: in the exported graph it is the logarithm of a sigmoid, which ONNX Runtime has
    # to 1e-7 absolute only, 1e-3 of a probability of 1e-4.
    log_marginal = -functional.softplus(-marginal)
    log_ratio = (log_marginal[:, 1:] - log_marginal[:, :-1]).clamp(max=-MIN_LOG_RATIO)
    later = log_ratio - torch.log(-torch.expm1(log_ratio))
    return torch.cat([marginal[:, :1], later], dim=1)


def side_widths(spec: NetSpec, *, embedding: int) -> tuple[int, int]:
    """Columns of the request side and of the candidate side once their ids are embedded."""
    request = (len(spec.request_tables) + len(spec.histories)) * embedding + spec.request_dense
    return request, len(spec.candidate_tables) * embedding + spec.candidate_dense


def side_by_side(flat: Tensor, copies: int) -> Tensor:
    """[B, P * width] to [P, B, width]."""
    return flat.reshape(flat.shape[0], copies, -1).transpose(0, 1)


def mlp(widths: Sequence[int], *, dropout: float) -> nn.Sequential:
    """Linear layers of the given widths, ReLU and dropout after each."""
    layers: list[Any] = []  # Any: nn.Module subclasses of several kinds
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU(), nn.Dropout(dropout)]
    return nn.Sequential(*layers)


def _running_sums(sizes: Sequence[int]) -> list[int]:
    starts, total = [], 0
    for size in sizes:
        starts.append(total)
        total += size
    return starts
