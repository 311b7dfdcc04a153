"""The serving form of the TAFE-style network: its set attention without tiny matrix products.

Per row the attention multiplies matrices of two to six rows, thousands of times per request, and
what ONNX Runtime spends there is the call, not the arithmetic. Here every step is one product over
all rows, or goes element by element over long stretches of memory:

- tokens lie as [F * B, D], so that what belongs to a row but not to a token is added or multiplied
  to whole tokens at once, and a sum over tokens is a sum of F long arrays;
- the scores of the fixed inducing queries are one product: query and key projection become one
  matrix, and the key's bias, the same for all tokens, falls out of the softmax;
- a token chooses between two summaries: the softmax of two scores is the sigmoid of their
  difference, and the difference of the keys is a projection of the difference of the summaries;
- each pattern is a chain of its own: its products are of two dimensions, with bias and ReLU inside;
- x + y before a normalisation is written y - (-x), the sign being moved into weights: ONNX Runtime
  would join an addition and a normalisation into one operator, three times as slow as the two.

Shape letters as in `nets.layers`; m is 2 inducing points per pattern, H heads of D / H.
"""

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from model.nets.layers import BatchedLayerNorm, BatchedLinear, Net, NetInput, NetOutput
from model.nets.selector import PatternSelector
from model.nets.tafe import Excitation, GroupedSetAttention, GroupedTokens, Tafe
from model.serving_layers import (
    FlatHeads,
    Lookup,
    RequestSide,
    block_diagonal,
    field_tables,
    linear,
)

NUM_INDUCING = 2  # of which the choice is one sigmoid


def serving_tafe(net: Tafe) -> nn.Module:
    """The serving form where the options allow one; what is rarer stays in its training form."""
    attention = net.attention
    known = (
        isinstance(net.tokens, GroupedTokens)
        and attention is not None
        and attention.shift is None
        and attention.inducing.shape[1] == NUM_INDUCING
    )
    return ServingTafe(net) if known else net


class ServingTafe(nn.Module):
    """`Tafe` with grouped tokens and two fixed inducing points per pattern."""

    def __init__(self, net: Tafe) -> None:
        super().__init__()
        self.options = net.options
        self.tokens = TokenColumns(cast(GroupedTokens, net.tokens))
        attention = cast(GroupedSetAttention, net.attention)
        self.summaries = Summaries(attention, net.tokens.num_tokens)
        self.patterns = nn.ModuleList(
            [Pattern(net, attention, g) for g in range(net.options.patterns)]
        )
        is_soft = isinstance(net.selector, PatternSelector) and net.selector.kind == "softmax"
        self.selector = (
            FlatSelector(cast(PatternSelector, net.selector), net.options.patterns)
            if is_soft
            else StackedSelector(net.selector)
        )
        self.transfer = net.transfer
        self.heads = FlatHeads(net.heads)

    def forward(self, inputs: NetInput) -> NetOutput:
        """See `Net`."""
        tokens = self.tokens(inputs)  # [F * B, D]
        summaries = self.summaries(tokens)
        made = [
            pattern(tokens, summary)
            for pattern, summary in zip(self.patterns, summaries, strict=True)
        ]
        representations: Tensor = self.selector(made)
        if self.transfer is not None:
            representations = self.transfer(representations)
        return Net.output(
            cast(Net, self),
            self.heads(representations),
            representations=representations,
            shared=None,
        )


class TokenColumns(nn.Module):
    """`GroupedTokens` as [F * B, D], token after token: each is a product of its own."""

    def __init__(self, tokens: GroupedTokens) -> None:
        super().__init__()
        width = tokens.width
        embedding = tokens.embedding
        self.num_request_tokens = len(_split(tokens.request, width))
        self.request = None if tokens.request is None else RequestSide(embedding, tokens.request)
        self.ids = nn.ModuleList(_split(tokens.ids, width))
        self.dense = nn.ModuleList(_split(tokens.dense, width))
        tables = field_tables(embedding, "candidate")
        self.fields = Lookup(tables) if tables else None

    def forward(self, inputs: NetInput) -> Tensor:
        """[F * B, D]."""
        parts = []
        if self.request is not None:
            of_request = self.request(inputs).chunk(self.num_request_tokens, dim=1)
            parts += [part.index_select(0, inputs.request_of) for part in of_request]
        if self.fields is not None:
            embedded = self.fields(inputs.candidate_ids).flatten(1)
            parts += [layer(embedded) for layer in self.ids]
        parts += [layer(inputs.candidate_dense) for layer in self.dense]
        return torch.cat(parts)


class Summaries(nn.Module):
    """What the inducing points gather from the tokens: q + attention(q, tokens), for all patterns.

    Sum_f w_f (W x_f + b) + q = sum_f w_f W x_f + (b + q), as the weights add up to 1.
    """

    def __init__(self, attention: GroupedSetAttention, num_tokens: int) -> None:
        super().__init__()
        patterns, width, heads = attention.patterns, attention.width, attention.heads
        per_head = width // heads
        weight, bias = _projections(attention)
        key, value = weight[0], weight[1]  # [G, D, D]
        query = attention.inducing_query(attention.inducing).detach()  # [G, m, D]
        by_head = query.reshape(patterns, NUM_INDUCING, heads, per_head)
        keys = key.reshape(patterns, width, heads, per_head)
        scores = torch.einsum("gdhk,gmhk->dmgh", keys, by_head) / math.sqrt(per_head)
        self.scores = nn.Parameter(scores.reshape(width, -1))  # [D, m G H]
        self.values = nn.Parameter(value.transpose(0, 1).reshape(width, -1))  # [D, G D]
        constant = (bias[1].unsqueeze(1) + query).transpose(0, 1)  # [m, G, D]
        self.constants = nn.Parameter(constant.reshape(NUM_INDUCING, -1))
        # A score counts for all of its head's numbers: a product with ones lays it out.
        whole = block_diagonal([torch.ones(1, per_head)] * (NUM_INDUCING * patterns * heads))
        self.lay_outs = nn.ParameterList(whole.chunk(NUM_INDUCING, dim=1))
        self.num_tokens, self.num_patterns = num_tokens, patterns

    def forward(self, tokens: Tensor) -> list[Tensor]:
        """From [F * B, D] tokens, for each pattern [m * B, D], the first point's rows first."""
        scores = (tokens @ self.scores).reshape(self.num_tokens, -1, self.scores.shape[1])
        powers = torch.exp(scores - scores.amax(dim=0, keepdim=True))
        weights = (powers / sum_of_tokens(powers)).flatten(0, 1)
        values = tokens @ self.values
        points = []
        for lay_out, constant in zip(self.lay_outs, self.constants, strict=True):
            weighted = (weights @ lay_out * values).reshape(self.num_tokens, -1, values.shape[1])
            points.append((sum_of_tokens(weighted) + constant).squeeze(0))
        per_pattern = zip(*[point.chunk(self.num_patterns, dim=1) for point in points], strict=True)
        return [torch.cat(parts) for parts in per_pattern]


def sum_of_tokens(values: Tensor) -> Tensor:
    """[F, B, width] to [1, B, width]; additions take half the time of the operator for sums."""
    first, *others = values.chunk(values.shape[0])
    for other in others:
        first = first + other
    return first


class Pattern(nn.Module):
    """One pattern from its summaries on: the rest of both attention blocks, the gate, the MLP."""

    def __init__(self, net: Tafe, attention: GroupedSetAttention, index: int) -> None:
        super().__init__()
        width, self.num_tokens = attention.width, net.tokens.num_tokens
        per_head = width // attention.heads
        self.summary_end = BlockEnd(attention, index, block=0)
        self.token_end = BlockEnd(attention, index, block=1)
        weight, bias = (part[2, index] for part in _projections(attention))
        self.negated_query = linear(-weight, -bias)
        weight = attention.from_inducing.weight.detach()[index]
        bias = cast(Tensor, attention.from_inducing.bias).detach()[index, 0]
        key, value = weight[:, :width], weight[:, width:]
        self.negated_key = nn.Parameter(-key / math.sqrt(per_head))
        self.value = nn.Parameter(value.clone())
        self.second_value = linear(value, bias[width:])
        ones = torch.ones(per_head, per_head)
        self.sum_by_head = nn.Parameter(block_diagonal([ones] * attention.heads))
        self.gate = None if net.excitation is None else Gate(net.excitation, index)
        if self.gate is not None:
            self.token_end.double()
        self.hidden = _one_of(net.pattern_hidden, index)
        self.output = _one_of(net.pattern_output, index)

    def forward(self, tokens: Tensor, summary: Tensor) -> Tensor:
        """[F * B, D] tokens and [m * B, D] to the pattern [B, K]."""
        width = tokens.shape[1]
        both = self.summary_end(summary).reshape(NUM_INDUCING, -1, width)
        first, second = (part.squeeze(0) for part in both.chunk(NUM_INDUCING))
        difference = first - second
        negated_query = self.negated_query(tokens).reshape(self.num_tokens, -1, width)
        products = negated_query * (difference @ self.negated_key)  # [F, B, D]
        choice = torch.sigmoid(products.flatten(0, 1) @ self.sum_by_head)
        values = choice.reshape(self.num_tokens, -1, width) * (difference @ self.value)
        attended = self.token_end(
            (values + self.second_value(second) - negated_query).flatten(0, 1)
        ).reshape(self.num_tokens, -1, width)
        if self.gate is not None:
            attended = attended * self.gate(attended)
        mixed = attended + tokens.reshape(self.num_tokens, -1, width)
        flat = mixed.transpose(0, 1).flatten(1)
        return torch.relu(self.output(torch.relu(self.hidden(flat))))


class BlockEnd(nn.Module):
    """The end of an attention block: y = LN(x), then LN(y + ReLU(y W + b)), of one pattern."""

    def __init__(self, attention: GroupedSetAttention, index: int, *, block: int) -> None:
        super().__init__()
        first, second = (cast(BatchedLayerNorm, attention.norms[2 * block + i]) for i in (0, 1))
        self.scale = nn.Parameter(-first.scale.detach()[index, 0])
        self.shift = nn.Parameter(-first.shift.detach()[index, 0])
        layer = _one_of(cast(BatchedLinear, attention.outputs[block]), index)
        self.layer = linear(-layer.weight.detach().T, layer.bias.detach())
        self.last_scale = nn.Parameter(second.scale.detach()[index, 0].clone())
        self.last_shift = nn.Parameter(second.shift.detach()[index, 0].clone())

    def double(self) -> None:  # type: ignore[override]
        """Makes the result twice as large."""
        self.last_scale.mul_(2.0)
        self.last_shift.mul_(2.0)

    def forward(self, joined: Tensor) -> Tensor:
        """[n, D] to [n, D]."""
        width = joined.shape[1:]
        negated = functional.layer_norm(joined, width, self.scale, self.shift)
        total = torch.relu(self.layer(negated)) - negated
        return functional.layer_norm(total, width, self.last_scale, self.last_shift)


class Gate(nn.Module):
    """`Excitation` of one pattern, token by token: half the gate, for twice the tokens."""

    def __init__(self, excitation: Excitation, index: int) -> None:
        super().__init__()
        self.squeeze = nn.Parameter(excitation.squeeze.weight.detach()[index] / 2.0)
        self.excite = nn.Parameter(excitation.excite.weight.detach()[index].clone())

    def forward(self, attended: Tensor) -> Tensor:
        """[F, B, D], doubled, to [F, B, 1] in (0, 1)."""
        # Rows on the left: a product with one column, which one candidate alone would be on the
        # right, adds up in another order.
        squeezed = torch.relu(attended.mean(dim=-1).T @ self.squeeze)
        return torch.sigmoid(squeezed @ self.excite).T.unsqueeze(-1)


class FlatSelector(nn.Module):
    """`PatternSelector`, softmax: key and indicators are one matrix; G patterns to [B, T, K]."""

    def __init__(self, selector: PatternSelector, patterns: int) -> None:
        super().__init__()
        indicators = selector.indicators.detach()
        self.num_steps, self.num_patterns = len(indicators), patterns
        scores = selector.key.weight.detach().T @ indicators.T / math.sqrt(indicators.shape[1])
        width = len(scores)
        whole = torch.zeros(patterns, width, self.num_steps, patterns)
        for g in range(patterns):
            whole[g, :, :, g] = scores
        self.scores = nn.Parameter(whole.reshape(patterns * width, -1))  # [G K, T G]
        ones = [torch.ones(1, width)] * (self.num_steps * patterns)
        self.lay_out = nn.Parameter(block_diagonal(ones))  # [T G, T G K]

    def forward(self, patterns: Sequence[Tensor]) -> Tensor:
        """From [B, K] of each pattern, [B, T, K]."""
        joined = torch.cat(list(patterns), dim=1)
        scores = (joined @ self.scores).reshape(-1, self.num_steps, self.num_patterns)
        weights = torch.softmax(scores, dim=-1).flatten(1) @ self.lay_out
        parts = weights.reshape(-1, self.num_steps, joined.shape[1]) * joined.unsqueeze(1)
        first, *others = parts.chunk(self.num_patterns, dim=2)
        for other in others:
            first = first + other
        return first


class StackedSelector(nn.Module):
    """Any other selector, as it is."""

    def __init__(self, selector: nn.Module) -> None:
        super().__init__()
        self.selector = selector

    def forward(self, patterns: Sequence[Tensor]) -> Tensor:
        """From [B, K] of each pattern, [B, T, K]."""
        made: Tensor = self.selector(torch.stack(list(patterns)))
        return made


def _one_of(layer: BatchedLinear, index: int) -> nn.Linear:
    """One of a batched layer's copies, with a bias."""
    assert layer.bias is not None
    return linear(layer.weight.detach()[index], layer.bias.detach()[index, 0])


def _split(layer: nn.Linear | None, width: int) -> list[nn.Linear]:
    """One layer per token."""
    if layer is None:
        return []
    weight, bias = layer.weight.detach().T, layer.bias.detach()
    count = len(bias) // width
    pairs = zip(weight.chunk(count, dim=1), bias.chunk(count), strict=True)
    return [linear(part, part_bias) for part, part_bias in pairs]


def _projections(attention: GroupedSetAttention) -> tuple[Tensor, Tensor]:
    """Of key, value and query: weights [3, G, D, D] and biases [3, G, D]."""
    patterns, width = attention.patterns, attention.width
    layer = attention.from_tokens
    weight = layer.weight.detach().reshape(3, patterns, width, width).transpose(2, 3)
    return weight, layer.bias.detach().reshape(3, patterns, width)
