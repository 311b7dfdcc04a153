"""Mixtures of experts: a gate per step over shared experts (MMoE), or over shared and own (PLE)."""

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


class MmoeOptions(Options):
    """Sizes.

    Attributes:
        experts: number of experts.
        widths: those of each expert.
    """

    experts: int = Field(default=4, ge=1)
    widths: tuple[PositiveInt, ...] = Field(default=(56, 48), min_length=1)
    head: int = Field(default=32, ge=1)


class Mmoe(Net):
    """f_t = sum_i softmax(W_t x)_i e_i(x). Source: MMoE section 4.

    Experts' first layers and gates read the same inputs: they are one product.
    """

    options_type = MmoeOptions
    options: MmoeOptions

    def __init__(self, spec: NetSpec, options: MmoeOptions) -> None:
        super().__init__()
        self.options = options
        self.representation_width = self.shared_width = options.widths[-1]
        self.num_steps, self.num_hidden = spec.num_steps, options.experts * options.widths[0]
        self.input = InputLayer(
            spec,
            embedding=options.embedding,
            outputs=self.num_hidden + spec.num_steps * options.experts,
        )
        self.dropout = nn.Dropout(options.dropout)
        self.experts = BatchedMlp(options.experts, options.widths, dropout=options.dropout)
        self.heads = Heads(
            spec.num_steps, options.widths[-1], options.head, dropout=options.dropout
        )

    def forward(self, inputs: NetInput) -> NetOutput:
        """See `Net`."""
        first = self.input(inputs)
        hidden = side_by_side(first[:, : self.num_hidden], self.options.experts)
        experts_PBK = self.experts(self.dropout(torch.relu(hidden)))
        scores = first[:, self.num_hidden :].reshape(-1, self.num_steps, self.options.experts)
        representations = _mixed(scores, experts_PBK)
        return self.output(
            self.heads(representations),
            representations=representations,
            shared=experts_PBK.mean(dim=0),
        )


class PleOptions(Options):
    """Sizes.

    Attributes:
        shared_experts: experts of all steps, per level.
        own_experts: experts of each step, per level; with 0 a level is one of MMoE.
        levels: extraction networks upon each other; 1 is CGC.
        widths: those of each expert.
    """

    shared_experts: int = Field(default=2, ge=1)
    own_experts: int = Field(default=1, ge=0)
    levels: int = Field(default=2, ge=1)
    widths: tuple[PositiveInt, ...] = Field(default=(48, 32), min_length=1)
    head: int = Field(default=32, ge=1)


class Ple(Net):
    """Levels of experts, own and shared, each step's gate seeing only its own and the shared.

    Source: papers.md 5, from PLE. The first level's experts and gates
    read x; those of a later level read what the level below made for their step (the shared ones,
    what it made for all).
    """

    options_type = PleOptions
    options: PleOptions

    def __init__(self, spec: NetSpec, options: PleOptions) -> None:
        super().__init__()
        self.options = options
        width = options.widths[-1]
        self.representation_width = self.shared_width = width
        self.num_steps = spec.num_steps
        self.num_experts = spec.num_steps * options.own_experts + options.shared_experts
        self.num_hidden = self.num_experts * options.widths[0]
        self.num_seen = options.own_experts + options.shared_experts
        has_more = options.levels > 1
        num_gates = spec.num_steps * self.num_seen + (self.num_experts if has_more else 0)
        self.input = InputLayer(
            spec, embedding=options.embedding, outputs=self.num_hidden + num_gates
        )
        self.dropout = nn.Dropout(options.dropout)
        widths = [options.widths] + [(width, *options.widths)] * (options.levels - 1)
        self.experts = nn.ModuleList(
            [BatchedMlp(self.num_experts, each, dropout=options.dropout) for each in widths]
        )
        self.step_gates = nn.ModuleList(
            [BatchedLinear(spec.num_steps, width, self.num_seen) for _ in widths[1:]]
        )
        self.shared_gates = nn.ModuleList(
            [nn.Linear(width, self.num_experts) for _ in widths[1:-1]]
        )
        self.heads = Heads(spec.num_steps, width, options.head, dropout=options.dropout)

    def forward(self, inputs: NetInput) -> NetOutput:
        """See `Net`."""
        first = self.input(inputs)
        hidden = side_by_side(first[:, : self.num_hidden], self.num_experts)
        experts_PBK = self.experts[0](self.dropout(torch.relu(hidden)))
        gates = first[:, self.num_hidden :]
        num_step_gates = self.num_steps * self.num_seen
        steps_BTK = self._steps(
            gates[:, :num_step_gates].reshape(-1, self.num_steps, self.num_seen), experts_PBK
        )
        scores = gates[:, num_step_gates:]
        for level in range(1, self.options.levels):
            shared_BK = _mixed(scores.unsqueeze(1), experts_PBK).squeeze(1)
            steps_TBK = steps_BTK.transpose(0, 1)
            experts_PBK = self.experts[level](self._inputs_of_experts(steps_TBK, shared_BK))
            step_scores = self.step_gates[level - 1](steps_TBK).transpose(0, 1)
            steps_BTK = self._steps(step_scores, experts_PBK)
            if level < self.options.levels - 1:
                scores = self.shared_gates[level - 1](shared_BK)
        return self.output(
            self.heads(steps_BTK),
            representations=steps_BTK,
            shared=experts_PBK[-self.options.shared_experts :].mean(dim=0),
        )

    def _inputs_of_experts(self, steps_TBK: Tensor, shared_BK: Tensor) -> Tensor:
        """What each expert of a later level reads, [P, B, K]: each step's own ones, then shared."""
        shared = shared_BK.unsqueeze(0).expand(self.options.shared_experts, -1, -1)
        if not self.options.own_experts:
            return shared
        own = steps_TBK.unsqueeze(1).expand(-1, self.options.own_experts, -1, -1)
        return torch.cat([own.flatten(0, 1), shared], dim=0)

    def _steps(self, scores_BTP: Tensor, experts_PBK: Tensor) -> Tensor:
        """Each step's mixture of its own experts and the shared ones, [B, T, K]."""
        num_own = self.options.own_experts
        if not num_own:
            return _mixed(scores_BTP, experts_PBK)
        weights = torch.softmax(scores_BTP, dim=-1)
        num_all_own = self.num_steps * num_own
        experts_BPK = experts_PBK.transpose(0, 1)
        own_BTPK = experts_BPK[:, :num_all_own].reshape(
            -1, self.num_steps, num_own, self.representation_width
        )
        of_own: Tensor = (weights[:, :, None, :num_own] @ own_BTPK).squeeze(2)
        return of_own + weights[:, :, num_own:] @ experts_BPK[:, num_all_own:]


def _mixed(scores_BTP: Tensor, experts_PBK: Tensor) -> Tensor:
    """sum_p softmax(scores)_p e_p, [B, T, K]."""
    return torch.softmax(scores_BTP, dim=-1) @ experts_PBK.transpose(0, 1)
