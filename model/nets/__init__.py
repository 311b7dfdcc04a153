"""Networks: tensors in, step logits and representations out."""

from typing import Any

from pydantic import ValidationError

from model.contract.errors import SpecError
from model.contract.spec import describe_errors
from model.nets.aitm import Aitm
from model.nets.experts import Mmoe, Ple
from model.nets.layers import Net, NetSpec
from model.nets.linear_head import LinearHead
from model.nets.shared_bottom import SharedBottom
from model.nets.tafe import Tafe
from model.nets.towers import CrossStitch, SingleTask

ARCHITECTURES: dict[str, type[Net]] = {
    "single_task": SingleTask,
    "shared_bottom": SharedBottom,
    "cross_stitch": CrossStitch,
    "mmoe": Mmoe,
    "ple": Ple,
    "aitm": Aitm,
    "tafe": Tafe,
    "linear_head": LinearHead,
}


def build_net(name: str, *, spec: NetSpec, options: dict[str, Any]) -> Net:  # Any: TOML values
    """Builds a network by name.

    Raises:
        SpecError: there is no such architecture, or it has no such option.
    """
    if name not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise SpecError(f"no architecture {name!r}; there are {known}", where="net.architecture")
    architecture = ARCHITECTURES[name]
    try:
        checked = architecture.options_type.model_validate(options)
    except ValidationError as exc:
        raise SpecError(f"net.options: {describe_errors(exc)}", where="net.options") from exc
    return architecture(spec, checked)
