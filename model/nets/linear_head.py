"""Linear head: any click model, and each later step a logistic regression on the raw numbers.

The restricted model of papers.md 1.7: no embedding and no hidden layer stands between the dense
columns and the later steps, so that what they can express is known exactly.
"""

from collections.abc import Sequence

import torch
from pydantic import Field, PositiveInt
from torch import nn

from model.contract.errors import SpecError
from model.nets.layers import InputLayer, Net, NetInput, NetOutput, NetSpec, Options, mlp


class LinearHeadOptions(Options):
    """Sizes; `widths` are those of the click model."""

    widths: tuple[PositiveInt, ...] = Field(default=(64, 32), min_length=1)


class LinearHead(Net):
    """The later steps share nothing with the click model and read neither ids nor histories.

    Its representations are the click model's last layer, the same for every step: the later steps'
    heads read none.
    """

    options_type = LinearHeadOptions
    has_step_representations = False

    def __init__(self, spec: NetSpec, options: LinearHeadOptions) -> None:
        """Builds the network; the later steps start at nothing but their base rates.

        Raises:
            SpecError: no feature gives a dense column.
        """
        super().__init__()
        num_dense = spec.request_dense + spec.candidate_dense
        if not num_dense:
            raise SpecError(
                "linear_head needs a numeric, elapsed or match feature", where="net.architecture"
            )
        self.options = options
        self.representation_width = self.shared_width = options.widths[-1]
        self.input = InputLayer(spec, embedding=options.embedding, outputs=options.widths[0])
        self.dropout = nn.Dropout(options.dropout)
        self.bottom = mlp(options.widths, dropout=options.dropout)
        self.click_head = nn.Linear(options.widths[-1], 1)
        self.later_heads = nn.Linear(num_dense, spec.num_steps - 1)
        self.num_steps = spec.num_steps
        with torch.no_grad():
            self.click_head.weight.mul_(0.1)
            self.later_heads.weight.zero_()

    def forward(self, inputs: NetInput) -> NetOutput:
        """See `Net`."""
        shared = self.bottom(self.dropout(torch.relu(self.input(inputs))))
        dense = inputs.candidate_dense
        if self.input.request is not None:
            request_dense = inputs.request_dense.index_select(0, inputs.request_of)
            dense = torch.cat([request_dense, dense], dim=1)
        logits = torch.cat([self.click_head(shared), self.later_heads(dense)], dim=1)
        representations = shared.unsqueeze(1).expand(-1, self.num_steps, -1)
        return self.output(logits, representations=representations, shared=shared)

    def set_base_rates(self, rates: Sequence[float]) -> None:
        """See `Net`."""
        logits = torch.logit(torch.tensor(rates, dtype=torch.float64)).float()
        with torch.no_grad():
            self.click_head.bias.copy_(logits[:1])
            self.later_heads.bias.copy_(logits[1:])
