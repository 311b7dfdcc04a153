"""Shared bottom: one MLP for all steps, one head per step. The baseline."""

from collections.abc import Sequence

import torch
from pydantic import Field, PositiveInt
from torch import nn

from model.nets.layers import FieldEmbedding, Heads, Net, NetInput, NetOutput, NetSpec, Options, mlp


class SharedBottomOptions(Options):
    """Sizes; `widths` are those of the bottom."""

    widths: tuple[PositiveInt, ...] = Field(default=(256, 128, 64), min_length=1)
    head: int = Field(default=32, ge=1)


class SharedBottom(Net):
    """The first layer is split by side, so that a request's part is computed once."""

    options_type = SharedBottomOptions

    def __init__(self, spec: NetSpec, options: SharedBottomOptions) -> None:
        super().__init__()
        self.options = options
        self.representation_width, self.shared_width = options.head, options.widths[-1]
        width = options.embedding
        self.embedding = FieldEmbedding(spec, width=width)
        num_request = (len(spec.request_tables) + len(spec.histories)) * width + spec.request_dense
        num_candidate = len(spec.candidate_tables) * width + spec.candidate_dense
        self.request_layer = nn.Linear(num_request, options.widths[0]) if num_request else None
        self.candidate_layer = nn.Linear(num_candidate, options.widths[0], bias=not num_request)
        self.dropout = nn.Dropout(options.dropout)
        self.bottom = mlp(options.widths, dropout=options.dropout)
        self.heads = Heads(
            spec.num_steps, options.widths[-1], options.head, dropout=options.dropout
        )
        self.num_steps = spec.num_steps

    def forward(self, inputs: NetInput) -> NetOutput:
        """See `Net`."""
        candidate = torch.cat(
            [self.embedding.candidate(inputs).flatten(1), inputs.candidate_dense], dim=1
        )
        hidden = self.candidate_layer(candidate)
        if self.request_layer is not None:
            request = torch.cat(
                [self.embedding.request(inputs).flatten(1), inputs.request_dense], dim=1
            )
            hidden = hidden + self.request_layer(request).index_select(0, inputs.request_of)
        hidden = self.dropout(torch.relu(hidden))
        shared = self.bottom(hidden)
        hidden_BTK = self.heads.hidden_states(shared.unsqueeze(1).expand(-1, self.num_steps, -1))
        return self.output(self.heads.logits(hidden_BTK), representations=hidden_BTK, shared=shared)

    def set_base_rates(self, rates: Sequence[float]) -> None:
        """See `Net`."""
        self.heads.set_base_rates(rates)
