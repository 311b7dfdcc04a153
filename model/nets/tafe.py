"""TAFE-style network: set attention over field tokens in G patterns, chosen per row and step.

Reconstructed: papers.md 2.3 (no formula of the paper was recoverable). The selection by task-
indicator vectors and the squeeze-and-excitation gate realise what the paper's abstracts name; the
formulas are ours.
"""

import math
from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from model.nets.aitm import TransferChain
from model.nets.layers import (
    BatchedLayerNorm,
    BatchedLinear,
    FieldEmbedding,
    Heads,
    Net,
    NetInput,
    NetOutput,
    NetSpec,
    Options,
    side_widths,
)
from model.nets.selector import SelectorKind, make_selector


class TafeOptions(Options):
    """Sizes and ablation switches.

    Attributes:
        tokens: "grouped" projects each side's fields together into few tokens, the shipped default;
            "fields" makes one token per field, papers.md's full size.
        request_tokens, id_tokens, dense_tokens: numbers of grouped tokens.
        width: token width d_h; heads: H; inducing: m points per pattern; patterns: G.
        pattern_hidden, pattern: the pattern MLP's widths (the last is K).
        indicator: width d_u of the task-indicator vectors.
        selector: how a step chooses among the patterns, see `nets.selector`; "off" gives every step
            their mean.
        use_attention, use_excitation: off, they leave the tokens as they are (a gate of 1).
        samples_inducing: each row moves the inducing points by its tokens' mean.
        use_transfer: AITM's transfer between the steps' representations.
    """

    tokens: Literal["grouped", "fields"] = "grouped"
    request_tokens: int = Field(default=2, ge=1)
    id_tokens: int = Field(default=2, ge=1)
    dense_tokens: int = Field(default=2, ge=1)
    width: int = Field(default=24, ge=1)
    heads: int = Field(default=2, ge=1)
    inducing: int = Field(default=2, ge=1)
    patterns: int = Field(default=3, ge=1)
    pattern_hidden: int = Field(default=112, ge=1)
    pattern: int = Field(default=48, ge=1)
    head: int = Field(default=32, ge=1)
    indicator: int = Field(default=16, ge=1)
    selector: SelectorKind = "softmax"
    use_attention: bool = True
    use_excitation: bool = True
    samples_inducing: bool = False
    use_transfer: bool = False

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of {self.heads} heads")
        return self


class Tafe(Net):
    """Tokens, set attention in G patterns, squeeze-and-excitation, pattern MLPs, selector."""

    options_type = TafeOptions
    options: TafeOptions

    def __init__(self, spec: NetSpec, options: TafeOptions) -> None:
        super().__init__()
        self.options = options
        self.representation_width = self.shared_width = options.pattern
        selects = options.selector == "gate" or (options.selector != "off" and options.patterns > 1)
        self.has_step_representations = selects or options.use_transfer
        self.tokens = (
            GroupedTokens(spec, options)
            if options.tokens == "grouped"
            else FieldTokens(spec, options)
        )
        num_tokens, width, patterns = self.tokens.num_tokens, options.width, options.patterns
        self.attention = (
            GroupedSetAttention(
                patterns,
                width,
                heads=options.heads,
                num_inducing=options.inducing,
                samples_inducing=options.samples_inducing,
            )
            if options.use_attention
            else None
        )
        self.excitation = (
            Excitation(patterns, num_tokens)
            if options.use_attention and options.use_excitation
            else None
        )
        self.pattern_hidden = BatchedLinear(patterns, num_tokens * width, options.pattern_hidden)
        self.pattern_output = BatchedLinear(patterns, options.pattern_hidden, options.pattern)
        self.dropout = nn.Dropout(options.dropout)
        self.selector = make_selector(
            options.selector,
            num_steps=spec.num_steps,
            pattern=options.pattern,
            indicator=options.indicator,
        )
        self.transfer = (
            TransferChain(spec.num_steps, options.pattern) if options.use_transfer else None
        )
        self.heads = Heads(spec.num_steps, options.pattern, options.head, dropout=options.dropout)

    def forward(self, inputs: NetInput) -> NetOutput:
        """See `Net`. Reconstructed: papers.md 2.3 (0)-(6)."""
        patterns_GBK = self.patterns(self.tokens(inputs))
        representations_BTK = self.selector(patterns_GBK)
        if self.transfer is not None:
            representations_BTK = self.transfer(representations_BTK)
        return self.output(
            self.heads(representations_BTK),
            representations=representations_BTK,
            shared=patterns_GBK.mean(dim=0),
        )

    def patterns(self, tokens_BFD: Tensor) -> Tensor:
        """h_g = MLP_g(flatten(R_g)), R_g = X + a_g Z_g: [G, B, K]. Reconstructed: 2.3 (3), (4)."""
        num_patterns = self.options.patterns
        mixed_GBFD = tokens_BFD.unsqueeze(0).expand(num_patterns, -1, -1, -1)
        if self.attention is not None:
            attended_GBFD = self.attention(tokens_BFD)
            if self.excitation is not None:
                attended_GBFD = attended_GBFD * self.excitation(attended_GBFD)
            mixed_GBFD = mixed_GBFD + attended_GBFD
        flat = mixed_GBFD.flatten(2)
        hidden = self.dropout(torch.relu(self.pattern_hidden(flat)))
        return torch.relu(self.pattern_output(hidden))

    def selection(self, inputs: NetInput) -> Tensor:
        """What each step takes of each pattern, [B, T, G]; sums to 1 over G."""
        return self.selector.weights(self.patterns(self.tokens(inputs)))


class GroupedTokens(nn.Module):
    """Few tokens: request fields, candidate ids and candidate numbers, each projected together.

    The request's tokens are computed once per request and gathered.
    """

    def __init__(self, spec: NetSpec, options: TafeOptions) -> None:
        super().__init__()
        width = options.embedding
        self.embedding = FieldEmbedding(spec, width=width)
        self.width = options.width
        num_request, _ = side_widths(spec, embedding=width)
        self.request = (
            nn.Linear(num_request, options.request_tokens * options.width) if num_request else None
        )
        num_ids = len(spec.candidate_tables) * width
        self.ids = nn.Linear(num_ids, options.id_tokens * options.width) if num_ids else None
        self.dense = (
            nn.Linear(spec.candidate_dense, options.dense_tokens * options.width)
            if spec.candidate_dense
            else None
        )
        self.num_tokens = (
            (options.request_tokens if self.request is not None else 0)
            + (options.id_tokens if self.ids is not None else 0)
            + (options.dense_tokens if self.dense is not None else 0)
        )

    def forward(self, inputs: NetInput) -> Tensor:
        """Tokens [B, F, width]."""
        parts = []
        if self.request is not None:
            request = torch.cat(
                [self.embedding.request(inputs).flatten(1), inputs.request_dense], dim=1
            )
            parts.append(self.request(request).index_select(0, inputs.request_of))
        if self.ids is not None:
            parts.append(self.ids(self.embedding.candidate(inputs).flatten(1)))
        if self.dense is not None:
            parts.append(self.dense(inputs.candidate_dense))
        return torch.cat(parts, dim=1).reshape(-1, self.num_tokens, self.width)


class FieldTokens(nn.Module):
    """One token per id field and history, one for each side's numbers. Reconstructed: 2.3 (0)."""

    def __init__(self, spec: NetSpec, options: TafeOptions) -> None:
        super().__init__()
        width = options.embedding
        self.embedding = FieldEmbedding(spec, width=width)
        self.request_dense = nn.Linear(spec.request_dense, width) if spec.request_dense else None
        self.candidate_dense = (
            nn.Linear(spec.candidate_dense, width) if spec.candidate_dense else None
        )
        self.project = nn.Linear(width, options.width)
        self.num_tokens = (
            len(spec.request_tables)
            + len(spec.histories)
            + len(spec.candidate_tables)
            + (self.request_dense is not None)
            + (self.candidate_dense is not None)
        )

    def forward(self, inputs: NetInput) -> Tensor:
        """Tokens [B, F, width]."""
        request = [self.embedding.request(inputs)]
        if self.request_dense is not None:
            request.append(self.request_dense(inputs.request_dense).unsqueeze(1))
        candidate = [self.embedding.candidate(inputs)]
        if self.candidate_dense is not None:
            candidate.append(self.candidate_dense(inputs.candidate_dense).unsqueeze(1))
        request_tokens = self.project(torch.cat(request, dim=1))
        candidate_tokens = self.project(torch.cat(candidate, dim=1))
        gathered = request_tokens.index_select(0, inputs.request_of)
        return torch.cat([gathered, candidate_tokens], dim=1)


class GroupedSetAttention(nn.Module):
    """G induced set attention blocks side by side, every projection one product.

    MAB(Q, K) = LN(O + ReLU(O W_o + b_o)), O = LN(Q W_q + attention(Q W_q, K W_k, K W_v)), and
    ISAB(X) = MAB(X, MAB(I, X)). Source: papers.md 2.3 (1), from the set transformer's code, with
    the scale per head. Permuting the tokens permutes the result. With `samples_inducing` a row's
    points are I + W mean_f X, W at first zero. Reconstructed: papers.md 2.5.
    """

    def __init__(
        self,
        patterns: int,
        width: int,
        *,
        heads: int,
        num_inducing: int,
        samples_inducing: bool = False,
    ) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is not a multiple of {heads} heads")
        self.patterns, self.width, self.heads = patterns, width, heads
        self.inducing = nn.Parameter(torch.randn(patterns, num_inducing, width) / math.sqrt(width))
        self.shift = (
            nn.Linear(width, patterns * num_inducing * width, bias=False)
            if samples_inducing
            else None
        )
        if self.shift is not None:
            nn.init.zeros_(self.shift.weight)
        self.from_tokens = nn.Linear(width, 3 * patterns * width)
        self.inducing_query = BatchedLinear(patterns, width, width)
        self.from_inducing = BatchedLinear(patterns, width, 2 * width)
        self.norms = nn.ModuleList([BatchedLayerNorm(patterns, width) for _ in range(4)])
        self.outputs = nn.ModuleList([BatchedLinear(patterns, width, width) for _ in range(2)])

    def forward(self, tokens_BFD: Tensor) -> Tensor:
        """[B, F, D] to [G, B, F, D]."""
        batch, num_tokens, width = tokens_BFD.shape
        projected = self.from_tokens(tokens_BFD)
        projected = projected.reshape(batch, num_tokens, 3, self.patterns, width)
        key, value, query = projected.permute(2, 3, 0, 1, 4)  # each [G, B, F, D]
        summary = self._block(0, self._points(tokens_BFD), key, value)  # [G, B, m, D]
        keys_values = self.from_inducing(summary.flatten(1, 2))
        keys_values = keys_values.reshape(self.patterns, batch, -1, 2 * width)
        key, value = keys_values[..., :width], keys_values[..., width:]
        return self._block(1, query, key, value)

    def _points(self, tokens_BFD: Tensor) -> Tensor:
        """The inducing points' queries, [G, B, m, D]."""
        batch, (patterns, num_inducing, width) = tokens_BFD.shape[0], self.inducing.shape
        if self.shift is None:
            query: Tensor = self.inducing_query(self.inducing)  # [G, m, D]
            return query.unsqueeze(1).expand(-1, batch, -1, -1)
        shift = self.shift(tokens_BFD.mean(dim=1)).reshape(batch, patterns, num_inducing, width)
        points = self.inducing.unsqueeze(1) + shift.transpose(0, 1)
        moved: Tensor = self.inducing_query(points.flatten(1, 2))
        return moved.reshape(patterns, batch, num_inducing, width)

    def _block(self, index: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """One MAB after its projections: query [G, B, n, D], key and value [G, B, s, D]."""
        per_head = self.width // self.heads
        parts = []
        for head in range(self.heads):
            part = slice(head * per_head, (head + 1) * per_head)
            scores = query[..., part] @ key[..., part].transpose(-1, -2)
            weights = torch.softmax(scores / math.sqrt(per_head), dim=-1)
            parts.append(weights @ value[..., part])
        joined = (query + torch.cat(parts, dim=-1)).flatten(1, 2)
        normal = self.norms[2 * index](joined)
        result: Tensor = self.norms[2 * index + 1](normal + torch.relu(self.outputs[index](normal)))
        return result.reshape(query.shape)


class Excitation(nn.Module):
    """a_g = 2 sigmoid(W2 ReLU(W1 s_g)), s_g the channel means. Reconstructed: papers.md 2.3 (3).

    W2 starts at zero, so that every gate starts at exactly 1.
    """

    def __init__(self, patterns: int, num_tokens: int) -> None:
        super().__init__()
        reduced = math.ceil(num_tokens / 3)
        self.squeeze = BatchedLinear(patterns, num_tokens, reduced, bias=False)
        self.excite = BatchedLinear(patterns, reduced, num_tokens, bias=False)
        nn.init.zeros_(self.excite.weight)

    def forward(self, attended_GBFD: Tensor) -> Tensor:
        """Gates [G, B, F, 1] in (0, 2)."""
        squeezed = self.squeeze(attended_GBFD.mean(dim=-1))
        return 2.0 * torch.sigmoid(self.excite(torch.relu(squeezed))).unsqueeze(-1)
