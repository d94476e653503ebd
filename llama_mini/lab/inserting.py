"""New norms in empty slots of a real model, with the gains that change the function least."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from llama_mini.checkpoint.plain import check_plain
from llama_mini.errors import RequestError
from llama_mini.lab.moving import Placed, with_norms
from llama_mini.lab.paths import select, slot_width
from llama_mini.lab.recording import watched
from llama_mini.lab.texts import Ids, as_texts
from llama_mini.model.config import LlamaConfig
from llama_mini.model.llama import Llama
from llama_mini.model.norm import Norm
from llama_mini.model.norm_slots import HEAD_SLOTS, NormSpec
from llama_mini.validate import check_choice, short_repr

_GAINS = ("lstsq", "one")


@torch.inference_mode(False)  # the new gains can be trained even if the caller only infers
def insert(
    model: Llama,
    pattern: str | Sequence[str],
    ids: Ids,
    gain: Literal["lstsq", "one"] = "lstsq",
    norm: NormSpec = NormSpec(),  # noqa: B008  (frozen)
) -> Llama:
    """A new model with norms in the empty slots at `pattern`, such as `layers.*.*.out_norm` for pre -> peri.

    gain: "lstsq" fits the gains on `ids` in one pass through `model`: of all gains g, g_i = <x_i, x̂_i> / <x̂_i, x̂_i>
        brings g·x̂ closest to x, what the slot passes on now, where x̂ is what the norm makes of x before its gain; the
        sums run over all tokens, in float64. An element that is always zero gets 1, and so does a bias zero. "one"
        leaves all gains at one, and does not read `ids`.
    norm: kind, eps, cast and so on of the new norms, in slots q, k and v also the view.

    All gains are fitted in the unchanged model, so that norms one after another do not know of each other. The new
    model shares all other parameters with `model`, which does not change, and can be saved.

    Raises RequestError, naming the path: for a slot that is taken, and for a model that is edited or optimized;
    ConfigError for a norm that the slot cannot hold.
    """
    check_choice("gain", gain, _GAINS, RequestError)
    if not isinstance(norm, NormSpec):
        raise RequestError(f"norm must be a NormSpec, not {short_repr(norm)}")
    if gain == "lstsq" and norm.gain == "none":
        raise RequestError("a norm without a gain has none to fit: give gain='one', or a norm with gain w or 1+w")
    check_plain(model)
    norms: dict[str, Placed] = {}
    for path in select(model, pattern, empty=True):
        if isinstance(model.get_submodule(path), Norm):
            raise RequestError(f"{path} holds a norm already; leave it out, or change it with edit or move")
        norms[path] = norm, norm.build(_width(model.config, path, norm), model.config.norm_eps)
    if gain == "lstsq":
        _fit(model, {path: module for path, (_, module) in norms.items()}, ids)
    trained = model.tok_embeddings.weight.requires_grad
    for _, module in norms.values():
        module.to(model.device, model.dtype).requires_grad_(trained)
    return with_norms(model, norms)


def _fit(model: Llama, norms: dict[str, nn.Module], ids: Ids) -> None:
    """Gives each norm the gain of least squares on the texts."""
    texts = as_texts(model, ids, at_least=1)

    def fit(path: str, x: Tensor, _: Tensor) -> None:
        norm = norms[path]
        assert isinstance(norm, Norm)
        assert norm.weight is not None
        wide = x[texts.real].double().reshape(-1, norm.dim)
        normed = norm.double().to(x.device)(wide)
        product, square = wide * normed, normed.square()
        if norm.n_gains == 1:
            product, square = product.flatten()[:, None], square.flatten()[:, None]
        best = product.sum(0) / square.sum(0)
        best = torch.where(square.sum(0) > 0, best, 1.0)
        norm.weight.data = best - 1 if norm.gain == "1+w" else best

    with torch.no_grad(), watched({path: model.get_submodule(path) for path in norms}, fit):
        model(texts.tokens)


def _width(config: LlamaConfig, path: str, norm: NormSpec) -> int:
    slot, width = path.rpartition(".")[2].removesuffix("_norm"), slot_width(config, path)
    if slot not in HEAD_SLOTS or norm.view == "head":
        return width
    return width * (config.n_heads if slot == "q" else config.n_kv_heads)
