"""What training minimises: the objective's loss, and what is trained beside the network for it.

Nothing of it reaches the exported graph.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn

from model.config import TrainConfig
from model.contract.blocks import Blocks
from model.contract.errors import SpecError
from model.imputation import ImputationTower, WeightStatistics
from model.nets.layers import Net, NetOutput
from model.objectives import OBJECTIVES, Dials, LossInput, imputation_loss, weight_power


class Criterion(nn.Module):
    """The loss of one batch; its own parameters are saved with the checkpoint."""

    def __init__(self, config: TrainConfig, net: Net, *, step_rates: Sequence[float]) -> None:
        """Checks the configuration against the network.

        Args:
            config: its objective and alignment sections.
            net: whose outputs will be given.
            step_rates: conditional base rate of each step over the training rows.

        Raises:
            SpecError: the configuration names what does not exist, or does not fit the network.
        """
        super().__init__()
        objective, num_steps = config.objective, len(step_rates)
        if objective.name not in OBJECTIVES:
            known = ", ".join(OBJECTIVES)
            raise SpecError(f"no objective {objective.name!r}; there are {known}")
        self._objective = OBJECTIVES[objective.name]
        if net.options.outputs not in self._objective.outputs:
            raise SpecError(
                f"the objective {objective.name!r} reads {self._objective.outputs[0]} outputs, "
                f"net.options.outputs is {net.options.outputs!r}",
                where="objective.name",
            )
        step_weights = objective.step_weights or (1.0,) * num_steps
        if len(step_weights) != num_steps:
            raise SpecError("objective.step_weights does not have one weight per step")
        masses = np.cumprod([1.0, *step_rates[:-1]])
        self._dials = Dials(
            step_weights=step_weights, masses=tuple(masses.tolist()), config=objective
        )
        has_later_steps = num_steps > 1
        self.imputation: ImputationTower | None = None
        if objective.name == "dr" and has_later_steps:
            self.imputation = ImputationTower(
                net,
                step_rates=step_rates,
                hidden=objective.imputation_hidden,
                form=objective.imputation,
            )
        self.weights: WeightStatistics | None = None
        if weight_power(objective) and has_later_steps:
            self.weights = WeightStatistics(num_steps)

    def forward(
        self,
        output: NetOutput,
        labels: Tensor,
        *,
        row_weight: Tensor,
        blocks: Blocks,
        progress: float,
    ) -> Tensor:
        """The loss, a scalar.

        Args:
            output: of the network, in training mode.
            labels: [B, T] float32, cumulative.
            row_weight: [B, T] float32, 0 where a label is not known yet.
            blocks: what the network was given.
            progress: share of the training steps done, in [0, 1).
        """
        del blocks, progress
        seen = LossInput(
            logits=output.logits,
            labels=labels,
            row_weight=row_weight,
            marginal=output.marginal,
            imputed=None if self.imputation is None else self.imputation(output),
        )
        if self.weights is not None:
            self.weights.update(seen, self._dials.config)
        loss = self._objective.loss(seen, self._dials)
        return loss if self.imputation is None else loss + imputation_loss(seen, self._dials)

    def parameter_groups(self) -> list[dict[str, Any]]:  # Any: what torch's optimisers take
        """Groups for the optimiser; `rate_share` scales the learning rate."""
        if self.imputation is None:
            return []
        parameters = list(self.imputation.parameters())
        return [{"params": parameters, "weight_decay": 0.0, "rate_share": 1.0}]

    def statistics(self) -> dict[str, Any]:  # Any: JSON
        """What is to be known of the loss beside its value, over the last steps."""
        return {} if self.weights is None else self.weights.report()
