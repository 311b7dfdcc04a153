"""The serving form of a trained network: the same probabilities from fewer and larger steps.

Networks keep the form they are trained in. Here their parts are replaced, by type, with equal ones
that cost less to run: weights are combined once, before export, instead of in every run. What is
not known here stays as it is. Sums are taken in another order, so equal means within parity.

Shape letters as in `nets.layers`.
"""

import copy
import operator
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Any, cast

import torch
from torch import Tensor, nn

from model.calibrate import LOGIT_BOUND, Calibrator, CalibratorLayer
from model.nets.layers import Heads, InputLayer, Net, NetInput, NetOutput
from model.nets.shared_bottom import SharedBottom
from model.nets.tafe import Tafe
from model.serving_layers import FlatHeads, Lookup, RequestSide, field_tables, joined_columns
from model.serving_tafe import serving_tafe


class ServingInput(nn.Module):
    """`InputLayer`: the request once, gathered as what the candidates' product starts from."""

    def __init__(self, layer: InputLayer) -> None:
        super().__init__()
        self.request = (
            RequestSide(layer.embedding, layer.request) if layer.request is not None else None
        )
        tables = field_tables(layer.embedding, "candidate")
        self.fields = Lookup(tables) if tables else None
        self.weight = nn.Parameter(layer.candidate.weight.detach().T.contiguous())
        bias = layer.candidate.bias
        self.bias = nn.Parameter(bias.detach()) if bias is not None else None

    def forward(self, inputs: NetInput) -> Tensor:
        """See `InputLayer`."""
        base = self.bias
        if self.request is not None:
            base = self.request(inputs).index_select(0, inputs.request_of)
        assert base is not None
        embedded = [] if self.fields is None else [self.fields(inputs.candidate_ids).flatten(1)]
        return torch.addmm(base, joined_columns([*embedded, inputs.candidate_dense]), self.weight)


class ServingSharedBottom(nn.Module):
    """`SharedBottom`: the heads read the bottom itself instead of T copies of it."""

    def __init__(self, net: SharedBottom) -> None:
        super().__init__()
        self.options = net.options
        self.input, self.bottom = ServingInput(net.input), net.bottom
        self.heads = FlatHeads(net.heads, is_shared=True)

    def forward(self, inputs: NetInput) -> NetOutput:
        """See `Net`."""
        shared = self.bottom(torch.relu(self.input(inputs)))
        return Net.output(
            cast(Net, self), self.heads(shared), representations=shared, shared=shared
        )


def serving_forms() -> Mapping[type[nn.Module], Callable[[Any], nn.Module]]:
    """What each kind of module is replaced with; Any: a module of that kind."""
    return {
        InputLayer: ServingInput,
        Heads: FlatHeads,
        SharedBottom: ServingSharedBottom,
        Tafe: serving_tafe,
    }


def serving_net(net: Net) -> nn.Module:
    """The serving form of a network; the network itself is left as it is."""
    with torch.no_grad():
        return _replaced(copy.deepcopy(net).eval())


def _replaced(module: nn.Module) -> nn.Module:
    make = serving_forms().get(type(module))
    if make is not None:
        return make(module)
    for name, child in list(module.named_children()):
        setattr(module, name, _replaced(child))
    return module


def chain_outputs(conditional: Sequence[Tensor], *, num_unserved: int) -> tuple[Tensor, ...]:
    """Cumulative probability of every served step, then the last conditional, [N] each.

    P_t = P_{t-1} c_t with c_t <= 1: rounding is monotone, so P_t <= P_{t-1} exactly.
    """
    cumulative = list(accumulate(conditional, operator.mul))
    return (*cumulative[num_unserved:], conditional[-1])


class ServingGraph(nn.Module):
    """`export.ScoringGraph` in its serving form: same inputs, same outputs, within parity.

    Lines (identity, temperature, Platt) and the sign that the exponential wants are part of the
    heads' last layer; all steps go through one clip, exponential and reciprocal.
    """

    def __init__(
        self, net: Net, calibrators: Sequence[Calibrator], *, num_unserved: int = 0
    ) -> None:
        super().__init__()
        self.num_unserved = num_unserved
        self.net = serving_net(net)
        self.layers = nn.ModuleList([CalibratorLayer(c) for c in calibrators])
        self.has_knots = any(bool(c.x) for c in calibrators)
        slopes = torch.tensor([-c.slope for c in calibrators], dtype=torch.float32)
        offsets = torch.tensor([-c.offset for c in calibrators], dtype=torch.float32)
        heads = getattr(self.net, "heads", None)
        self.is_mapped = (
            not self.has_knots
            and net.options.outputs == "conditional"
            and isinstance(heads, FlatHeads)
        )
        if self.is_mapped:
            cast(FlatHeads, heads).map_logits(slopes, offsets)
        self.register_buffer("slopes", slopes)
        self.register_buffer("offsets", offsets)

    def forward(
        self,
        request_ids: Tensor,
        request_dense: Tensor,
        request_history: Tensor,
        candidate_ids: Tensor,
        candidate_dense: Tensor,
        request_of: Tensor,
    ) -> tuple[Tensor, ...]:
        """See `export.ScoringGraph`."""
        return self.score(
            NetInput(
                request_ids=request_ids,
                request_dense=request_dense,
                request_history=request_history,
                candidate_ids=candidate_ids,
                candidate_dense=candidate_dense,
                request_of=request_of,
            )
        )

    def score(self, inputs: NetInput) -> tuple[Tensor, ...]:
        """See `chain_outputs`."""
        negated = self._negated(self.net(inputs).logits)
        # Not sigmoid: see `export.ScoringGraph`.
        probabilities = 1.0 / (1.0 + torch.exp(negated.clamp(-LOGIT_BOUND, LOGIT_BOUND)))
        conditional = [probabilities[:, t] for t in range(len(self.layers))]
        return chain_outputs(conditional, num_unserved=self.num_unserved)

    def _negated(self, logits: Tensor) -> Tensor:
        """Calibrated logits with their sign turned, [B, T]."""
        if self.is_mapped:
            return logits
        if self.has_knots:
            columns = [layer(logits[:, t]) for t, layer in enumerate(self.layers)]
            return -torch.stack(columns, dim=1)
        return logits * self.get_buffer("slopes") + self.get_buffer("offsets")
