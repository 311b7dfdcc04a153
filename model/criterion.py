"""What training minimises: the objective's loss, and what is trained beside the network for it.

Nothing of it reaches the exported graph.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from model.alignment import Alignment
from model.config import TrainConfig
from model.contract.blocks import Blocks
from model.contract.errors import SpecError
from model.nets.layers import Net, NetOutput
from model.objectives import OBJECTIVES


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
        if config.objective.name not in OBJECTIVES:
            known = ", ".join(OBJECTIVES)
            raise SpecError(f"no objective {config.objective.name!r}; there are {known}")
        self._objective = OBJECTIVES[config.objective.name]
        self._step_weights = config.objective.step_weights or (1.0,) * len(step_rates)
        if len(self._step_weights) != len(step_rates):
            raise SpecError("objective.step_weights does not have one weight per step")
        self._alignment = (
            None
            if config.alignment.mode == "off"
            else Alignment(config.alignment, net, num_steps=len(step_rates))
        )

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
        loss = self._objective(
            output.logits, labels, row_weight=row_weight, step_weights=self._step_weights
        )
        if self._alignment is not None:
            loss = loss + self._alignment(output, blocks, progress=progress)
        return loss

    def parameter_groups(self) -> list[dict[str, Any]]:  # Any: what torch's optimisers take
        """Groups for the optimiser; `rate_share` scales the learning rate."""
        return [] if self._alignment is None else self._alignment.parameter_groups()

    def statistics(self) -> dict[str, Any]:  # Any: JSON
        """What is to be known of the loss beside its value, over the last steps."""
        return {} if self._alignment is None else {"alignment": self._alignment.statistics()}
