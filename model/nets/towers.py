"""Towers side by side, one per step: apart (single task), or mixed by cross-stitch units.

Nothing but, at most, the id tables is shared, so that `NetOutput.shared` is None.
"""

from itertools import pairwise

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from model.nets.layers import (
    BatchedLinear,
    BatchedMlp,
    Heads,
    InputLayer,
    Net,
    NetInput,
    NetOutput,
    NetSpec,
    Options,
    side_by_side,
)

STITCH_OWN = 0.9  # share that a tower keeps of itself at the start


class SingleTaskOptions(Options):
    """Sizes; `widths` are those of each tower.

    Attributes:
        shares_embedding: whether the towers read the same id tables. False gives each step tables
            of its own: T networks that share nothing, and T times the memory.
    """

    widths: tuple[PositiveInt, ...] = Field(default=(112, 64, 48), min_length=1)
    head: int = Field(default=32, ge=1)
    shares_embedding: bool = False


class SingleTask(Net):
    """One tower per step: what each step reaches without the others."""

    options_type = SingleTaskOptions

    def __init__(self, spec: NetSpec, options: SingleTaskOptions) -> None:
        super().__init__()
        self.options = options
        self.num_steps, self.representation_width = spec.num_steps, options.widths[-1]
        copies = 1 if options.shares_embedding else spec.num_steps
        outputs = spec.num_steps * options.widths[0] // copies
        self.inputs = nn.ModuleList(
            [InputLayer(spec, embedding=options.embedding, outputs=outputs) for _ in range(copies)]
        )
        self.dropout = nn.Dropout(options.dropout)
        self.towers = BatchedMlp(spec.num_steps, options.widths, dropout=options.dropout)
        self.heads = Heads(
            spec.num_steps, options.widths[-1], options.head, dropout=options.dropout
        )

    def forward(self, inputs: NetInput) -> NetOutput:
        """See `Net`."""
        first = torch.cat([layer(inputs) for layer in self.inputs], dim=1)
        hidden = self.dropout(torch.relu(side_by_side(first, self.num_steps)))
        representations = self.towers(hidden).transpose(0, 1)
        return self.output(
            self.heads(representations), representations=representations, shared=None
        )


class CrossStitchOptions(Options):
    """Sizes; `widths` are those of each tower."""

    widths: tuple[PositiveInt, ...] = Field(default=(112, 64, 48), min_length=1)
    head: int = Field(default=32, ge=1)


class CrossStitch(Net):
    """One tower per step on shared id tables, mixed after every layer. Source: papers.md 5."""

    options_type = CrossStitchOptions

    def __init__(self, spec: NetSpec, options: CrossStitchOptions) -> None:
        super().__init__()
        self.options = options
        self.num_steps, self.representation_width = spec.num_steps, options.widths[-1]
        self.input = InputLayer(
            spec, embedding=options.embedding, outputs=spec.num_steps * options.widths[0]
        )
        widths = options.widths
        self.layers = nn.ModuleList(
            [BatchedLinear(spec.num_steps, *pair) for pair in pairwise(widths)]
        )
        self.stitches = nn.ModuleList([Stitch(spec.num_steps) for _ in widths])
        self.dropout = nn.Dropout(options.dropout)
        self.heads = Heads(spec.num_steps, widths[-1], options.head, dropout=options.dropout)

    def forward(self, inputs: NetInput) -> NetOutput:
        """See `Net`."""
        first, *stitches = self.stitches
        hidden = side_by_side(self.input(inputs), self.num_steps)
        hidden = first(self.dropout(torch.relu(hidden)))
        for layer, stitch in zip(self.layers, stitches, strict=True):
            hidden = stitch(self.dropout(torch.relu(layer(hidden))))
        representations = hidden.transpose(0, 1)
        return self.output(
            self.heads(representations), representations=representations, shared=None
        )


class Stitch(nn.Module):
    """x'_s = sum_t A_st x_t with a learned A: near the identity at first, rows adding up to 1.

    Source: papers.md 5, given there for two towers; A for more of them is [derived].
    """

    def __init__(self, num_steps: int) -> None:
        super().__init__()
        mixing = torch.full((num_steps, num_steps), (1.0 - STITCH_OWN) / max(num_steps - 1, 1))
        self.mixing = nn.Parameter(mixing.fill_diagonal_(STITCH_OWN))

    def forward(self, hidden_TBK: Tensor) -> Tensor:
        """[T, B, K] to [T, B, K]."""
        return (self.mixing @ hidden_TBK.flatten(1)).reshape(hidden_TBK.shape)
