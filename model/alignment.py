"""AdaFTR-style alignment: a row's neighbouring steps are drawn together, against other rows.

Reconstructed: papers.md 3.3 and 3.4 (of the paper only InfoNCE and a temperature per row, predicted
by a network, are known). Used in training only: nothing of it is part of the network.

Shape letters: n contrasted rows, P = T - 1 pairs of neighbouring steps, K representation width.
"""

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from model.config import AlignmentConfig
from model.contract.blocks import Blocks
from model.contract.errors import SpecError
from model.nets.layers import Net, NetOutput

WINDOW = 100  # steps that the statistics are of
MIN_NORM = 1e-3  # shorter vectors keep less than unit length, which bounds the gradient
RECORDED = (
    "temperature_mean",
    "temperature_std",
    "temperature_min",
    "temperature_max",
    "log_temperature_std",
    "at_bound_share",
    "projected_cosine",
    "representation_cosine",
    "loss",
)


def info_nce(similarity: Tensor, temperature: Tensor, negatives: Tensor) -> Tensor:
    """L_i = -s_ii / tau_i + log sum_{j in N(i) or j = i} exp(s_ij / tau_i), [n] float32 or wider.

    Reconstructed: papers.md 3.3. A row without negatives has loss 0.

    Args:
        similarity: s [n, n], the positives on its diagonal.
        temperature: tau [n].
        negatives: [n, n] bool, true where j is in N(i).
    """
    excess = _excess(similarity, temperature)
    is_positive = torch.eye(len(excess), dtype=torch.bool, device=excess.device)
    return torch.logsumexp(excess.masked_fill(~(negatives | is_positive), -math.inf), dim=1)


def robust_loss(
    similarity: Tensor, temperature: Tensor, negatives: Tensor, *, rho: Tensor
) -> Tensor:
    """J_i = tau_i log(mean_{j in N(i)} exp((s_ij - s_ii) / tau_i)) + rho_i tau_i, [n].

    dJ/dtau = rho - KL(softmax over the negatives, uniform): least where they are equal. Source:
    papers.md 3.4, M2. A row without negatives has loss 0.

    Args:
        similarity: s [n, n], the positives on its diagonal.
        temperature: tau [n].
        negatives: [n, n] bool, true where j is in N(i).
        rho: [n], in (0, log of the number of negatives) for an interior optimum.
    """
    excess = _excess(similarity, temperature)
    counts = negatives.sum(dim=1)
    # Rows without negatives keep all entries, so that no gradient is 0 times infinity.
    left_out = ~negatives & (counts > 0).unsqueeze(1)
    log_sum = torch.logsumexp(excess.masked_fill(left_out, -math.inf), dim=1)
    losses = _wide(temperature) * (log_sum - counts.clamp(min=1).log() + rho)
    return torch.where(counts > 0, losses, torch.zeros_like(losses))


def prior_penalty(temperature: Tensor, *, center: float) -> Tensor:
    """R = mean (log tau - log tau_0)^2, a scalar. Source: papers.md 3.4, M1."""
    return (temperature.log() - math.log(center)).square().mean()


def warm_up(progress: float, *, share: float) -> float:
    """From 0 at the start to 1 after `share` of training, linearly."""
    return min(1.0, progress / share) if share else 1.0


def feature_classes(blocks: Blocks, num_rows: int) -> npt.NDArray[np.int64]:
    """A number per row of the first `num_rows`, equal where all features are, int64 [num_rows]."""
    request_of = blocks.request_of[:num_rows]
    parts: tuple[npt.NDArray[Any], ...] = (  # Any: int64 and float32 side by side
        blocks.request.ids[request_of],
        blocks.request.history[request_of],
        blocks.request.dense[request_of] + np.float32(0.0),  # -0.0 becomes 0.0
        blocks.candidate.ids[:num_rows],
        blocks.candidate.dense[:num_rows] + np.float32(0.0),
    )
    content = np.concatenate(
        [np.ascontiguousarray(part).view(np.uint8) for part in parts if part.shape[1]], axis=1
    )
    known: dict[bytes, int] = {}
    classes = [known.setdefault(row.tobytes(), len(known)) for row in content]
    return np.array(classes, np.int64)


class Alignment(nn.Module):
    """alpha [L_cl / log(1 + |N|) + lambda R(tau)], the term added to the task loss.

    L_cl is the mean over rows and pairs; the division is per row, by its own number of negatives.
    """

    window: Tensor
    num_steps_seen: Tensor

    def __init__(self, config: AlignmentConfig, net: Net, *, num_steps: int) -> None:
        """Checks that the network has what is aligned.

        Args:
            config: of a mode other than "off".
            net: read for its widths only.
            num_steps: T.

        Raises:
            SpecError: there are no two step representations over a shared part.
        """
        super().__init__()
        _check(net, num_steps)
        self.config = config
        self.num_pairs = num_steps - 1
        width = net.representation_width
        self.projections = nn.ModuleList(
            [nn.Linear(width, config.projection) for _ in range(num_steps)]
            if config.projection
            else [nn.Identity() for _ in range(num_steps)]
        )
        self.relatedness = (
            None
            if config.mode == "fixed"
            else RelatednessNetwork(net.shared_width + 2 * width, self.num_pairs, config)
        )
        self.register_buffer("window", torch.zeros(WINDOW, len(RECORDED), dtype=torch.float64))
        self.register_buffer("num_steps_seen", torch.zeros((), dtype=torch.int64))

    def forward(self, output: NetOutput, blocks: Blocks, *, progress: float) -> Tensor:
        """The term, a scalar float32; the first `config.rows` rows are contrasted.

        Args:
            output: of the network, B rows.
            blocks: what it was given: rows of equal features are not contrasted.
            progress: share of the training steps done, in [0, 1).
        """
        # Also where the caller lets torch choose narrower types.
        with torch.autocast(output.representations.device.type, enabled=False):
            representations = _wide(output.representations[: self.config.rows])
            negatives = self._negatives(blocks, len(representations), representations.device)
            temperatures = self.temperatures(output)
            losses, terms, cosines = [], [], []
            for pair in range(self.num_pairs):
                similarity = self._similarity(representations, pair)
                loss, term = self._pair_losses(similarity, temperatures[pair], negatives)
                losses.append(loss)
                terms.append(term)
                cosines.append(similarity.diagonal().mean())
            self._record(
                temperatures, representations, torch.stack(cosines), loss=torch.stack(losses)
            )
            scale = self.config.weight * warm_up(progress, share=self.config.warm_up_share)
            return scale * torch.stack(terms).mean()

    def temperatures(self, output: NetOutput) -> Tensor:
        """Each contrasted row's tau, [P, n] float32; no gradient reaches the network's output."""
        config = self.config
        representations = _wide(output.representations[: config.rows]).detach()
        if self.relatedness is None:
            shape = (self.num_pairs, len(representations))
            return representations.new_full(shape, config.temperature)
        assert output.shared is not None  # checked at the start
        shared = _wide(output.shared[: config.rows]).detach()
        temperatures = torch.stack(
            [
                self.relatedness(
                    torch.cat(
                        [shared, representations[:, pair], representations[:, pair + 1]], dim=1
                    ),
                    pair,
                )
                for pair in range(self.num_pairs)
            ]
        )
        # What is not a number passes, and is reported as the loss.
        assert not (temperatures < temperatures.new_tensor(config.min_temperature)).any()
        return temperatures

    def parameter_groups(self) -> list[dict[str, Any]]:  # Any: what torch's optimisers take
        """Groups for the optimiser; no decay, as none of it is served."""
        groups = [_group(self.projections.parameters(), rate_share=1.0)]
        if self.relatedness is not None:
            share = self.config.network_rate_share
            groups.append(_group(self.relatedness.parameters(), rate_share=share))
        return [group for group in groups if group["params"]]

    def statistics(self) -> dict[str, Any]:  # Any: JSON
        """Over the last `WINDOW` steps; see papers.md 3.4: log_temperature_std under 0.02 is dead.

        The deviations are between the rows of one batch, means over batches and pairs;
        at_bound_share is of rows within 1 % of a bound of the temperature; loss is normalised, so 1
        is no better than chance at equal similarities.
        """
        num_steps = int(self.num_steps_seen)
        if not num_steps:
            return {}
        recorded = self.window[:num_steps]
        result = dict(zip(RECORDED, recorded.mean(dim=0).tolist(), strict=True))
        for name, extreme in (("temperature_min", torch.amin), ("temperature_max", torch.amax)):
            result[name] = float(extreme(recorded[:, RECORDED.index(name)]))
        return {"steps": min(num_steps, WINDOW), **result}

    def _negatives(self, blocks: Blocks, num_rows: int, device: torch.device) -> Tensor:
        """N(i) as [n, n] bool: rows with other features, all or a random one."""
        classes = torch.from_numpy(feature_classes(blocks, num_rows)).to(device)
        negatives = classes.unsqueeze(1) != classes.unsqueeze(0)
        if self.config.negatives == "batch":
            return negatives
        chosen = torch.rand(num_rows, num_rows, device=device).masked_fill(~negatives, -1.0)
        one = torch.zeros_like(negatives).scatter_(1, chosen.argmax(dim=1, keepdim=True), True)
        return one & negatives

    def _similarity(self, representations: Tensor, pair: int) -> Tensor:
        """Cosines of the earlier step's projections with the later's, [n, n]."""
        earlier, later = representations[:, pair], representations[:, pair + 1]
        if not self.config.is_symmetric:
            earlier = earlier.detach()
        earlier = functional.normalize(self.projections[pair](earlier), dim=1, eps=MIN_NORM)
        later = functional.normalize(self.projections[pair + 1](later), dim=1, eps=MIN_NORM)
        return earlier @ later.T

    def _pair_losses(
        self, similarity: Tensor, temperature: Tensor, negatives: Tensor
    ) -> tuple[Tensor, Tensor]:
        """L_cl / log(1 + |N|), and the same with what else trains the relatedness network."""
        config = self.config
        directions = [similarity, similarity.T] if config.is_symmetric else [similarity]
        of_encoder = temperature.detach() if config.mode == "robust" else temperature
        counts = negatives.sum(dim=1).clamp(min=1)
        loss = torch.stack(
            [(info_nce(s, of_encoder, negatives) / counts.log1p()).mean() for s in directions]
        ).mean()
        if config.mode == "prior":
            penalty = prior_penalty(temperature, center=config.temperature)
            return loss, loss + config.prior_weight * penalty
        if config.mode == "robust":
            rho = config.robust_share * counts.log()
            robust = [
                robust_loss(s.detach(), temperature, negatives, rho=rho).mean() for s in directions
            ]
            return loss, loss + torch.stack(robust).mean()
        return loss, loss

    @torch.no_grad()
    def _record(
        self, temperatures: Tensor, representations: Tensor, cosines: Tensor, *, loss: Tensor
    ) -> None:
        """Writes this step's statistics over those of `WINDOW` steps before."""
        config = self.config
        wide = temperatures.double()
        is_at_bound = (wide <= 1.01 * config.min_temperature) | (
            wide >= 0.99 * config.max_temperature
        )
        raw = functional.cosine_similarity(representations[:, 1:], representations[:, :-1], dim=2)
        values = {
            "temperature_mean": wide.mean(),
            "temperature_std": wide.std(dim=1, correction=0).mean(),
            "temperature_min": wide.min(),
            "temperature_max": wide.max(),
            "log_temperature_std": wide.log().std(dim=1, correction=0).mean(),
            "at_bound_share": is_at_bound.double().mean(),
            "projected_cosine": cosines.mean(),
            "representation_cosine": raw.mean(),
            "loss": loss.mean(),
        }
        row = torch.stack([values[name].double() for name in RECORDED])
        self.window[int(self.num_steps_seen) % WINDOW] = row
        self.num_steps_seen += 1


class RelatednessNetwork(nn.Module):
    """tau = tau_max - (tau_max - tau_min) sigmoid(MLP): related rows get a small tau.

    The last layer starts at zero weights, its bias where tau is tau_0.
    """

    def __init__(self, width: int, num_pairs: int, config: AlignmentConfig) -> None:
        super().__init__()
        self.hidden = nn.Linear(width, config.hidden)
        # Added before the activation: a pair embedding through its own weights.
        self.pair = nn.Parameter(torch.zeros(num_pairs, config.hidden)) if num_pairs > 1 else None
        self.output = nn.Linear(config.hidden, 1)
        self.minimum = config.min_temperature
        self.range = config.max_temperature - config.min_temperature
        start = (config.max_temperature - config.temperature) / self.range
        nn.init.zeros_(self.output.weight)
        nn.init.constant_(self.output.bias, math.log(start / (1.0 - start)))

    def forward(self, inputs: Tensor, pair: int) -> Tensor:
        """Temperatures [n] of one pair of steps from [n, width]."""
        hidden = self.hidden(inputs)
        if self.pair is not None:
            hidden = hidden + self.pair[pair]
        relatedness: Tensor = self.output(torch.relu(hidden)).squeeze(1)
        # The same as from tau_max downwards, and never below tau_min by rounding.
        return self.minimum + self.range * torch.sigmoid(-relatedness)


def _check(net: Net, num_steps: int) -> None:
    where = "alignment.mode"
    if num_steps < 2:
        raise SpecError("a single step has no neighbour to align", where=where)
    if not net.shared_width:
        raise SpecError("single-task towers share nothing to align", where=where)
    if not net.has_step_representations:
        raise SpecError("all steps have the same representation: nothing to align", where=where)


def _group(parameters: Iterable[nn.Parameter], *, rate_share: float) -> dict[str, Any]:
    return {"params": list(parameters), "weight_decay": 0.0, "rate_share": rate_share}


def _excess(similarity: Tensor, temperature: Tensor) -> Tensor:
    """(s_ij - s_ii) / tau_i: the positive at 0, where a small loss keeps its digits."""
    similarity = _wide(similarity)
    difference = similarity - similarity.diagonal().unsqueeze(1)
    return difference / _wide(temperature).unsqueeze(1)


def _wide(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()
