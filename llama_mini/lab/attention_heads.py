"""What each head attends to, beside the size of the residual stream, so that the sink can be seen to follow it."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from llama_mini.lab.recording import first_and_median, watched
from llama_mini.lab.table import Table
from llama_mini.lab.texts import Ids, Texts, as_texts
from llama_mini.model.attention import Attention
from llama_mini.model.llama import Llama

_SCORES_AT_ONCE = 2**24  # elements: a long text is read in parts


@dataclass(frozen=True)
class AttentionHead:
    """One head on a text. Every query counts but the first of each text, which sees itself alone.

    first_mass: the mean probability of the first token. It is 0 for a query whose window does not reach that token.
    entropy: of the probabilities, the mean in nats; 0 where each query attends to a single token.
    largest_logit: the largest input of the softmax, after the scale and the soft cap.
    first_rms, median_rms: √(mean x²) of the residual stream that the layer reads, of the first token (the median over
        the texts) and of the others. All heads of a layer share them.
    """

    layer: int
    head: int
    first_mass: float
    entropy: float
    largest_logit: float
    first_rms: float
    median_rms: float


def attention(model: Llama, ids: Ids) -> Table[AttentionHead]:
    """A row for each head of each layer, from one forward pass.

    The probabilities are computed from the queries and keys that attend: normed, rotated, and in the model's dtype,
    with its scale, soft cap and windows. To see a head without its q norm, edit the model first.

    Raises RequestError for ids that the model cannot read, and for a text of a single token.
    """
    texts = as_texts(model, ids)
    heads: dict[int, list[list[float]]] = {}
    sizes: dict[int, tuple[float, float]] = {}

    def see_heads(layer: int, module: Attention, q: Tensor, k: Tensor, mask: Tensor) -> None:
        heads[layer] = _statistics(module, q, k, mask, texts).T.tolist()

    def see_stream(layer: str, x: Tensor, _: Tensor) -> None:
        rms = x.to(torch.promote_types(x.dtype, torch.float32)).pow(2).mean(-1).sqrt()
        sizes[int(layer)] = first_and_median(rms, texts.real)

    layers = {str(i): layer for i, layer in enumerate(model.layers)}
    with torch.inference_mode(), watched(layers, see_stream), _watched_attention(model, see_heads):
        model(texts.tokens)
    return Table(
        [
            AttentionHead(layer, head, mass, entropy, largest, *sizes[layer])
            for layer, rows in heads.items()
            for head, (mass, entropy, largest) in enumerate(rows)
        ]
    )


@contextmanager
def _watched_attention(model: Llama, see: Callable[[int, Attention, Tensor, Tensor, Tensor], None]) -> Iterator[None]:
    """Calls see(layer, module, q, k, mask) whenever a layer attends. Hooks see modules alone, and `attend` is none."""

    def seen(i: int, module: Attention, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        see(i, module, q, k, mask)
        return type(module).attend(module, q, k, v, mask)

    with ExitStack() as stack:
        for i, layer in enumerate(model.layers):
            module: Attention = layer.attention  # type: ignore[assignment]
            vars(module)["attend"] = partial(seen, i, module)
            stack.callback(vars(module).pop, "attend")
        yield


def _statistics(module: Attention, q: Tensor, k: Tensor, mask: Tensor, texts: Texts) -> Tensor:
    """q (B, H, T, D), k (B, K, T, D) -> first_mass, entropy and largest_logit of each head: (3, H) float64."""
    real = texts.real[:, None, 1:]  # (B, 1, T-1)
    n_heads, n_keys = q.shape[1], k.shape[2]
    mass, entropy, largest = (torch.zeros(n_heads, dtype=torch.float64, device=q.device) for _ in range(3))
    largest -= torch.inf
    step = max(1, _SCORES_AT_ONCE // (len(q) * n_heads * n_keys))
    for begin in range(1, n_keys, step):
        part = slice(begin, begin + step)
        counts = real[..., begin - 1 : begin - 1 + step]
        scores = _scores(module, q[:, :, part], k, mask[:, :, part])  # (B, H, step, T)
        p = scores.softmax(-1)
        mass += (p[..., 0].double() * counts).sum((0, 2))
        entropy += (torch.special.entr(p).sum(-1).double() * counts).sum((0, 2))
        largest = largest.maximum(scores.amax(-1).double().masked_fill(~counts, -torch.inf).amax((0, 2)))
    return torch.stack((mass / real.sum(), entropy / real.sum(), largest))


def _scores(module: Attention, q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
    """The inputs of the softmax, in float32 or wider: (B, H, T, S)."""
    if module.softcap is not None:
        return module.capped_scores(q, k, mask, module.softcap)
    wide = torch.promote_types(q.dtype, torch.float32)
    scale = module.head_dim**-0.5 if module.scale is None else module.scale
    grouped = q.to(wide).unflatten(1, (module.n_kv_heads, -1)) * scale  # (B, K, H/K, T, D)
    return (grouped @ k.to(wide)[:, :, None].mT).flatten(1, 2).masked_fill(~mask, -torch.inf)
