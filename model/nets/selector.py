"""Pattern selectors: G patterns to one representation per step, chosen by indicator vectors.

Reconstructed: papers.md 2.3 (5); which of them the paper uses is not known.
"""

import math
from typing import Literal, assert_never

import torch
from torch import Tensor, nn

SelectorKind = Literal["softmax", "sparsemax", "gate", "hard", "off"]


class PatternSelector(nn.Module):
    """t_t = sum_g a_tg h_g, a from scores <u_t, h_g W> / sqrt(d_u). Reconstructed: 2.3 (5).

    Kinds of a: "softmax"; "sparsemax", which can leave patterns out; "hard", the best pattern
    alone, with the gradient of the softmax: an ablation, whose scores jump where two patterns are
    nearly as good, so that export's parity check may refuse it.
    """

    def __init__(
        self,
        num_steps: int,
        pattern: int,
        indicator: int,
        *,
        kind: Literal["softmax", "sparsemax", "hard"] = "softmax",
    ) -> None:
        super().__init__()
        self.kind = kind
        self.indicators = indicator_vectors(num_steps, indicator)
        self.key = nn.Linear(pattern, indicator, bias=False)

    def weights(self, patterns_GBK: Tensor) -> Tensor:
        """Selection [B, T, G]; sums to 1 over G."""
        keys = self.key(patterns_GBK)  # [G, B, d_u]
        scores = keys @ self.indicators.T / math.sqrt(self.indicators.shape[1])  # [G, B, T]
        scores = scores.permute(1, 2, 0)
        if self.kind == "sparsemax":
            return sparsemax(scores)
        soft = torch.softmax(scores, dim=-1)
        return straight_through(soft) if self.kind == "hard" else soft

    def forward(self, patterns_GBK: Tensor) -> Tensor:
        """Step representations [B, T, K]."""
        return self.weights(patterns_GBK) @ patterns_GBK.permute(1, 0, 2)


class PatternGate(nn.Module):
    """t_t = mean_g sigmoid(W [u_t; h_g]) * h_g, element by element. Reconstructed: 2.3 (5).

    papers.md writes one h; with several patterns each is gated, and their mean taken. [derived]
    """

    def __init__(self, num_steps: int, pattern: int, indicator: int) -> None:
        super().__init__()
        self.indicators = indicator_vectors(num_steps, indicator)
        self.from_indicator = nn.Linear(indicator, pattern)
        self.from_pattern = nn.Linear(pattern, pattern, bias=False)

    def gates(self, patterns_GBK: Tensor) -> Tensor:
        """[B, T, G, K] in (0, 1)."""
        of_pattern = self.from_pattern(patterns_GBK).transpose(0, 1).unsqueeze(1)  # [B, 1, G, K]
        of_step = self.from_indicator(self.indicators)[:, None, :]  # [T, 1, K]
        return torch.sigmoid(of_pattern + of_step)

    def weights(self, patterns_GBK: Tensor) -> Tensor:
        """Each pattern's share of the gates' openings, [B, T, G]; sums to 1 over G."""
        opening = self.gates(patterns_GBK).mean(dim=-1)
        return opening / opening.sum(dim=-1, keepdim=True)

    def forward(self, patterns_GBK: Tensor) -> Tensor:
        """Step representations [B, T, K]."""
        return (self.gates(patterns_GBK) * patterns_GBK.transpose(0, 1).unsqueeze(1)).mean(dim=2)


class PatternMean(nn.Module):
    """No selection: every step gets the mean of the patterns, the very same numbers."""

    def __init__(self, num_steps: int) -> None:
        super().__init__()
        self.num_steps = num_steps

    def weights(self, patterns_GBK: Tensor) -> Tensor:
        """1/G, [B, T, G]."""
        num_patterns, rows = patterns_GBK.shape[:2]
        return patterns_GBK.new_full((rows, self.num_steps, num_patterns), 1.0 / num_patterns)

    def forward(self, patterns_GBK: Tensor) -> Tensor:
        """Step representations [B, T, K]."""
        return patterns_GBK.mean(dim=0).unsqueeze(1).expand(-1, self.num_steps, -1)


Selector = PatternSelector | PatternGate | PatternMean


def make_selector(kind: SelectorKind, *, num_steps: int, pattern: int, indicator: int) -> Selector:
    """The selector of a kind."""
    match kind:
        case "softmax" | "sparsemax" | "hard":
            return PatternSelector(num_steps, pattern, indicator, kind=kind)
        case "gate":
            return PatternGate(num_steps, pattern, indicator)
        case "off":
            return PatternMean(num_steps)
        case _:
            assert_never(kind)


def indicator_vectors(num_steps: int, width: int) -> nn.Parameter:
    """u_t, [T, width], of about unit length."""
    return nn.Parameter(torch.randn(num_steps, width) / math.sqrt(width))


def sparsemax(scores: Tensor) -> Tensor:
    """The nearest point of the simplex over the last dimension: max(z - tau, 0), sums to 1.

    tau = max_k (sum of the k largest - 1) / k: the running value rises while the next score is
    above it, and falls from then on. The threshold is sparsemax's [memory]; as a maximum it is
    [derived].
    """
    largest = scores.sort(dim=-1, descending=True).values
    counts = torch.arange(1, scores.shape[-1] + 1, dtype=scores.dtype, device=scores.device)
    threshold = ((largest.cumsum(dim=-1) - 1.0) / counts).amax(dim=-1, keepdim=True)
    return torch.relu(scores - threshold)


def straight_through(soft: Tensor) -> Tensor:
    """One-hot of the largest, with the gradient of `soft`; of equal ones the first counts."""
    places = torch.arange(soft.shape[-1], device=soft.device)
    chosen = (soft.argmax(dim=-1, keepdim=True) == places).to(soft.dtype)
    return chosen + (soft - soft.detach())
