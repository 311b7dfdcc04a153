"""The imputation tower of `dr`, and what is to be known of the propensities' weights."""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from model.config import ObjectiveConfig
from model.nets.layers import Heads, Net, NetOutput
from model.objectives import LossInput, log_reached_before, propensity_weight, rows_with_step_before

NUM_REMEMBERED = 200  # training steps whose weights are reported


class ImputationTower(nn.Module):
    """A small MLP per step from the second on, on the network's representations.

    It reads them detached, so that it cannot bend them to its own task.
    """

    def __init__(
        self,
        net: Net,
        *,
        step_rates: Sequence[float],
        hidden: int,
        form: Literal["label", "error"],
    ) -> None:
        super().__init__()
        self.heads = Heads(
            len(step_rates) - 1,
            net.representation_width + net.shared_width,
            hidden,
            dropout=0.0,
        )
        rates = np.array(step_rates[1:], np.float64)
        if form == "error":
            # softplus(logit(1 - exp(-h))) = h: starts at the entropy of the base rate.
            entropy = -(rates * np.log(rates) + (1.0 - rates) * np.log(1.0 - rates))
            rates = -np.expm1(-entropy)
        self.heads.set_base_rates(rates.tolist())

    def forward(self, output: NetOutput) -> Tensor:
        """[B, T - 1] float32; see `objectives.dr` for what they are."""
        read = output.representations[:, 1:].detach()
        if output.shared is not None:
            shared = output.shared.detach().unsqueeze(1).expand(-1, read.shape[1], -1)
            read = torch.cat([read, shared], dim=2)
        imputed: Tensor = self.heads(read)
        return imputed


class WeightStatistics(nn.Module):
    """Clipping and spread of w_t(x) over the last steps.

    Kept in buffers, so that a resumed run reports what an uninterrupted one does.
    """

    def __init__(self, num_steps: int) -> None:
        super().__init__()
        # Per remembered training step and chain step from the second on: rows whose label is known,
        # clipped of them; rows with the step before, clipped of them, their sums of w and of w
        # squared, their largest w.
        self.register_buffer(
            "remembered", torch.zeros(NUM_REMEMBERED, 7, num_steps - 1, dtype=torch.float64)
        )
        self.register_buffer("num_seen", torch.zeros((), dtype=torch.int64))

    def update(self, seen: LossInput, config: ObjectiveConfig) -> None:
        """Remembers a batch's weights in place of the oldest."""
        before = log_reached_before(seen.logits)[:, 1:]
        weight = propensity_weight(before, config).double()
        clipped = before < float(np.log(config.propensity_clip))
        known = seen.row_weight[:, 1:] > 0
        reached = rows_with_step_before(seen)[:, 1:] > 0
        weight = weight * reached
        sums = torch.stack(
            [
                known.sum(dim=0),
                (known & clipped).sum(dim=0),
                reached.sum(dim=0),
                (reached & clipped).sum(dim=0),
                weight.sum(dim=0),
                weight.square().sum(dim=0),
                weight.max(dim=0).values,
            ]
        )
        place = self.get_buffer("num_seen")
        self.get_buffer("remembered")[int(place) % NUM_REMEMBERED] = sums
        place += 1

    def report(self) -> dict[str, Any]:  # Any: JSON
        """Per chain step from the second on; a share without rows is None.

        clipped_share is of the rows whose label is known, clipped_share_reached of those with the
        step before; effective_share is (sum w)^2 / (n sum w^2) of the latter.
        """
        remembered = self.get_buffer("remembered")
        known, clipped, reached, clipped_reached, total, squares, _ = remembered.sum(dim=0).tolist()
        largest = remembered[:, 6].max(dim=0).values.tolist()
        steps = [
            {
                "step": t + 2,
                "clipped_share": clipped[t] / known[t] if known[t] else None,
                "clipped_share_reached": clipped_reached[t] / reached[t] if reached[t] else None,
                "effective_share": total[t] ** 2 / (reached[t] * squares[t])
                if reached[t]
                else None,
                "largest_weight": largest[t] if reached[t] else None,
            }
            for t in range(len(known))
        ]
        over = min(int(self.get_buffer("num_seen")), NUM_REMEMBERED)
        return {"propensity_weights": {"training_steps": over, "steps": steps}}
