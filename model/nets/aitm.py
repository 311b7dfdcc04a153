"""AITM: what a step's tower found is passed to the next step by attention over {passed, own}."""

import math
from typing import Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from model.nets.layers import (
    BatchedMlp,
    Heads,
    InputLayer,
    Net,
    NetInput,
    NetOutput,
    NetSpec,
    Options,
    mlp,
    side_by_side,
)


class AitmOptions(Options):
    """Sizes.

    Attributes:
        bottom: widths of layers that all towers share; () for the paper's towers, which share the
            embedding alone: then there is no `NetOutput.shared`.
        widths: those of each tower.
        outputs: "marginal" as in the paper, where each head's probability is the end-to-end one.
    """

    bottom: tuple[PositiveInt, ...] = (192,)
    widths: tuple[PositiveInt, ...] = Field(default=(64, 32), min_length=1)
    head: int = Field(default=32, ge=1)
    outputs: Literal["conditional", "marginal"] = "marginal"


class Aitm(Net):
    """One tower per step, then adaptive information transfer along the chain. Source: AITM."""

    options_type = AitmOptions

    def __init__(self, spec: NetSpec, options: AitmOptions) -> None:
        super().__init__()
        self.options = options
        self.num_steps, width = spec.num_steps, options.widths[-1]
        self.representation_width = width
        self.shared_width = options.bottom[-1] if options.bottom else 0
        self.input = InputLayer(
            spec,
            embedding=options.embedding,
            outputs=options.bottom[0] if options.bottom else spec.num_steps * options.widths[0],
        )
        self.dropout = nn.Dropout(options.dropout)
        self.bottom = mlp(options.bottom, dropout=options.dropout) if options.bottom else None
        self.towers = BatchedMlp(
            spec.num_steps, (*options.bottom[-1:], *options.widths), dropout=options.dropout
        )
        self.transfer = TransferChain(spec.num_steps, width)
        self.heads = Heads(spec.num_steps, width, options.head, dropout=options.dropout)

    def forward(self, inputs: NetInput) -> NetOutput:
        """See `Net`."""
        first = self.dropout(torch.relu(self.input(inputs)))
        if self.bottom is None:
            shared, hidden = None, side_by_side(first, self.num_steps)
        else:
            shared = self.bottom(first)
            hidden = shared.unsqueeze(0).expand(self.num_steps, -1, -1)
        representations = self.transfer(self.towers(hidden).transpose(0, 1))
        return self.output(
            self.heads(representations), representations=representations, shared=shared
        )


class Transfer(nn.Module):
    """AIT between two adjacent steps: z_t = sum_u w_u h_1(u) over u in {p, q}.

    w = softmax(<h_2(u), h_3(u)> / sqrt(k)), p = g(z_{t-1}) what the step before passes on, q the
    step's own. h_1, h_2, h_3 and g belong to this pair of steps. Source: papers.md 5, from AITM
    eq. 5-13; that each is one linear layer, and a ReLU follows g's, is [reconstructed].
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.passed = nn.Linear(width, width)
        self.projections = nn.Linear(width, 3 * width)  # h_1, h_2, h_3

    def forward(self, previous: Tensor, own: Tensor) -> Tensor:
        """z_{t-1} and q_t, [B, K] each, to z_t [B, K]."""
        return self.attend(torch.relu(self.passed(previous)), own)

    def attend(self, passed: Tensor, own: Tensor) -> Tensor:
        """From p and q, [B, K] each, z_t [B, K]; equal ones give h_1 of it."""
        tokens = torch.stack([passed, own], dim=1)  # [B, 2, K]
        values, keys, queries = self.projections(tokens).chunk(3, dim=-1)
        scores = (keys * queries).sum(dim=-1) / math.sqrt(own.shape[-1])
        weights = torch.softmax(scores, dim=-1)
        attended: Tensor = (weights.unsqueeze(-1) * values).sum(dim=1)
        return attended


class TransferChain(nn.Module):
    """AIT along all steps; the first step keeps its own."""

    def __init__(self, num_steps: int, width: int) -> None:
        super().__init__()
        self.pairs = nn.ModuleList([Transfer(width) for _ in range(num_steps - 1)])

    def forward(self, own_BTK: Tensor) -> Tensor:
        """[B, T, K] to [B, T, K]; what a step passes on holds all steps before it."""
        made = [own_BTK[:, 0]]
        for t, pair in enumerate(self.pairs, start=1):
            made.append(pair(made[-1], own_BTK[:, t]))
        return torch.stack(made, dim=1)
