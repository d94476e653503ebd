"""Moving norms so that the model changes as little as a text allows."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from llama_mini.errors import RequestError
from llama_mini.lab.editing import edited_norms
from llama_mini.lab.freezing import Frozen
from llama_mini.lab.inserting import insert
from llama_mini.lab.moving import move, rebuilt, spec_at
from llama_mini.lab.norm_table import effective_gain
from llama_mini.lab.paths import READERS, select
from llama_mini.lab.texts import Ids
from llama_mini.model.llama import Llama
from llama_mini.model.norm_slots import NormSpec

_WRITERS = {"attention.out_norm": "o_proj", "feed_forward.out_norm": "down_proj"}  # whose output the norm reads


@torch.inference_mode(False)
def move_fitted(model: Llama, pattern: str | Sequence[str], to: str, ids: Ids) -> Llama:
    """A new model with norms moved as `move` does, but with gains, and matrices beside them, that fit the new places.

    What a norm does on average stays where it was: g/c, with c the root of the mean square of its inputs on `ids`
    (token 0 of each text apart), is multiplied into the matrices that read it, or for an out norm into the one that
    writes its input. The norm in the new place gets the gain of least squares that `insert` finds. The matrices then
    read vectors of the size that they were trained for, which a plain move does not give them.

    Raises RequestError, naming the path: as `move` does, for norms of other kinds than rms and scale, for one without a
    gain, and for a post norm, since no matrix reads it alone.
    """
    moved = move(model, pattern, to)
    parameters = dict(moved.named_parameters(remove_duplicate=False))
    frozen = edited_norms(model, {path: {"freeze": "quadratic"} for path in select(model, pattern)}, ids)
    targets: dict[NormSpec, list[str]] = {}
    for path, norm in frozen.items():
        at, _, slot = path.rpartition(".")
        place = f"{at.rpartition('.')[2]}.{slot}"
        if place not in READERS | _WRITERS:
            raise RequestError(f"{path} writes the residual stream, so that no matrix can take over its gain")
        assert isinstance(norm, Frozen)
        gain = effective_gain(norm)
        factor = norm.inverse_root * norm.scale * (1.0 if gain is None else gain)
        scaled = [(f"{at}.{matrix}.weight", factor) for matrix in READERS.get(place, ())]
        if place in _WRITERS:
            writer = f"{at}.{_WRITERS[place]}"
            scaled = [(f"{writer}.weight", factor[..., None]), (f"{writer}.bias", factor)]
        for name, by in scaled:
            if name in parameters:  # a feed-forward layer may have no gate, a matrix no bias
                parameters[name] = _times(parameters[name], by)
        spec = spec_at(moved.config, target := f"{at}.{to}_norm")
        assert spec is not None
        targets.setdefault(spec, []).append(target)
    for spec, paths in targets.items():
        grown = insert(model, paths, ids, norm=spec)
        parameters |= {f"{path}.weight": grown.get_parameter(f"{path}.weight") for path in paths}
    return rebuilt(moved, moved.config, parameters)


def _times(p: nn.Parameter, factor: Tensor) -> nn.Parameter:
    return nn.Parameter((p.detach() * factor.to(p.device)).to(p.dtype), requires_grad=p.requires_grad)
