"""The linear head's conversion step is a logistic regression on the raw numbers, and no more."""

from dataclasses import replace

import pytest
import tiny
import torch

from model.contract.encode import Encoder
from model.contract.errors import SpecError
from model.nets import build_net
from model.nets.layers import Net, NetInput, NetSpec

SPEC = NetSpec.of(Encoder(tiny.fitted_schema()))
ROWS = 6


def make(spec: NetSpec = SPEC) -> Net:
    torch.manual_seed(0)
    net = build_net("linear_head", spec=spec, options={"embedding": 4, "widths": (16, 8)})
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return net.eval()


def inputs(seed: int = 0) -> NetInput:
    generator = torch.Generator().manual_seed(seed)
    length = sum(length for _, length in SPEC.histories)
    return NetInput(
        request_ids=torch.randint(1, 5, (ROWS, len(SPEC.request_tables)), generator=generator),
        request_dense=torch.randn(ROWS, SPEC.request_dense, generator=generator),
        request_history=torch.randint(1, 5, (ROWS, length), generator=generator),
        candidate_ids=torch.randint(1, 5, (ROWS, len(SPEC.candidate_tables)), generator=generator),
        candidate_dense=torch.randn(ROWS, SPEC.candidate_dense, generator=generator),
        request_of=torch.arange(ROWS),
    )


def test_conversion_logit_is_linear_in_the_numbers_and_the_clicks_is_not() -> None:
    net, one, other = make(), inputs(0), inputs(1)
    middle = replace(
        one,
        request_dense=(one.request_dense + other.request_dense) / 2,
        candidate_dense=(one.candidate_dense + other.candidate_dense) / 2,
    )
    other = replace(one, request_dense=other.request_dense, candidate_dense=other.candidate_dense)

    at_middle = net(middle).logits.detach()
    mean = ((net(one).logits + net(other).logits) / 2).detach()

    torch.testing.assert_close(at_middle[:, 1], mean[:, 1], rtol=0, atol=1e-5)
    assert (at_middle[:, 0] - mean[:, 0]).abs().max() > 1e-3


def test_conversion_logit_reads_neither_ids_nor_histories() -> None:
    net, given, other = make(), inputs(0), inputs(1)
    changed = replace(
        other, request_dense=given.request_dense, candidate_dense=given.candidate_dense
    )

    assert torch.equal(net(given).logits[:, 1], net(changed).logits[:, 1])
    assert not torch.equal(net(given).logits[:, 0], net(changed).logits[:, 0])


def test_without_a_number_there_is_nothing_to_be_linear_in() -> None:
    with pytest.raises(SpecError, match="linear_head needs a numeric"):
        make(replace(SPEC, request_dense=0, candidate_dense=0))
