"""Shared bottom: one MLP for all steps, one head per step. The baseline."""

import torch
from pydantic import Field, PositiveInt
from torch import nn

from model.nets.layers import Heads, InputLayer, Net, NetInput, NetOutput, NetSpec, Options, mlp


class SharedBottomOptions(Options):
    """Sizes; `widths` are those of the bottom."""

    widths: tuple[PositiveInt, ...] = Field(default=(192, 128, 64), min_length=1)
    head: int = Field(default=32, ge=1)


class SharedBottom(Net):
    """The representation of every step is the same."""

    options_type = SharedBottomOptions

    def __init__(self, spec: NetSpec, options: SharedBottomOptions) -> None:
        super().__init__()
        self.options = options
        self.representation_width, self.shared_width = options.head, options.widths[-1]
        self.input = InputLayer(spec, embedding=options.embedding, outputs=options.widths[0])
        self.dropout = nn.Dropout(options.dropout)
        self.bottom = mlp(options.widths, dropout=options.dropout)
        self.heads = Heads(
            spec.num_steps, options.widths[-1], options.head, dropout=options.dropout
        )
        self.num_steps = spec.num_steps

    def forward(self, inputs: NetInput) -> NetOutput:
        """See `Net`."""
        shared = self.bottom(self.dropout(torch.relu(self.input(inputs))))
        hidden_BTK = self.heads.hidden_states(shared.unsqueeze(1).expand(-1, self.num_steps, -1))
        return self.output(self.heads.logits(hidden_BTK), representations=hidden_BTK, shared=shared)
