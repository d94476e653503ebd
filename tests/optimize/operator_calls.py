"""Right calls of the operators."""

from typing import Any

import torch

from tests.optimize.twins import apart, generator, random, random_codes, random_gain, random_matrix

Arguments = dict[str, Any]
op = torch.ops.llama_mini
DIM, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, BATCH, LAYERS, VOCAB = 24, 18, 6, 2, 20, 3, 2, 37


def valid(name: str, format_: str = "float", dtype: torch.dtype = torch.float32) -> Arguments:
    """The arguments of a right call. A prompt is a call of layers."""
    rng = generator(1)
    if name in ("gemv", "gemm"):
        w = random_matrix(format_, [HIDDEN], DIM, dtype, rng)
        bias = random((HIDDEN,), dtype, rng)
        return {"x": random((BATCH, DIM), dtype, rng), "w": w.tensors, "bias": bias, "rows": HIDDEN}
    if name == "dequantize_rows":
        w = random_matrix("int4" if format_ == "float" else format_, [40], DIM, dtype, rng)
        return {"w": w.tensors, "at": torch.tensor([3, 47, 3, 0]), "columns": DIM, "dtype": dtype}
    if name == "rms_norm":
        return {"x": random((BATCH, DIM), dtype, rng), "gain": random_gain(DIM, dtype, rng), "eps": 1e-5, "flags": 1}
    if name in ("quantize", "pack", "repack"):
        w = random_matrix("int4" if format_ == "float" else format_, [40], 64, dtype, rng)
        if name == "quantize":
            return {"x": random((24, 64), dtype, rng), "w": w.tensors, "block": 1}
        if name == "pack":
            kind = "int4" if format_ == "float" else format_
            rows = [t for t in random_codes(kind, 24, 64, rng) if t is not None]
            return {"rows": rows, "w": w.tensors, "block": 1}
        block_bytes = 34 if format_ == "int8" else 20
        return {
            "blocks": torch.full((24, 2 * block_bytes), 3, dtype=torch.uint8),
            "w": w.tensors,
            "columns": 64,
            "block": 1,
        }
    if name == "attend":
        k, v = (random((BATCH, KV_HEADS, 11, HEAD_DIM), dtype, rng) for _ in range(2))
        return {
            "qkv": random((BATCH, 1, HEADS + 2 * KV_HEADS, HEAD_DIM), dtype, rng),
            "k_cache": k,
            "v_cache": v,
            "pages": torch.arange(BATCH)[:, None],
            "positions": torch.tensor([[3], [0], [10]]),
            "window": 4,
            "scale": 0.3,
            "softcap": 2.0,
        }
    if name == "step":
        return _step(format_, dtype)
    prompt = name == "prompt"
    angles = torch.rand(BATCH, HEAD_DIM // 2, generator=rng)
    rows = [HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM]
    caches = [random((1 if prompt else BATCH, KV_HEADS, 11, HEAD_DIM), dtype, rng) for _ in range(2 * LAYERS)]
    heads = [random_gain(HEAD_DIM, dtype, rng) for _ in range(2)]
    shapes = [(rows, DIM), ([DIM], HEADS * HEAD_DIM), ([HIDDEN, HIDDEN], DIM), ([DIM], HIDDEN)]
    linears = [random_matrix(format_, *shape, dtype, rng) for shape in shapes * LAYERS]
    matrices = [matrix for linear in linears for matrix in linear.matrices]
    gains = [random_gain(DIM, dtype, rng) for _ in range(5)]
    return {
        "x": random((1, BATCH, DIM) if prompt else (BATCH, 1, DIM), dtype, rng),
        "ropes": [angles.cos(), angles.sin()],
        "pages": [torch.arange(1 if prompt else BATCH)[:, None]],
        "positions": torch.tensor([[5, 6, 7]] if prompt else [[3], [0], [10]]),
        "k_caches": caches[:LAYERS],
        "v_caches": caches[LAYERS:],
        "gains": [gains[0], *heads, torch.empty(0, dtype=dtype), *gains[1:]] * LAYERS,
        "eps": [1e-5, 1e-6, 1e-5, 1e-5, 1e-6, 1e-5, 1e-5, 1e-6] * LAYERS,
        "flags": [0, 1, 2, 0, 3, 1, 0, 1] * LAYERS,
        "matrices": [tensor for matrix in matrices for tensor in matrix.tensors],
        "biases": [torch.empty(0, dtype=dtype)] * len(matrices),
        "settings": [0, 0, 0, apart(linears[0]), 4, 1, -1, apart(linears[4])],
        "scales": [1.0, 1.0, 0.2, 0.0, 1.0, 1.0, 0.5, 1.5, 0.3, 2.0, 1.0, 2.0],
        "heads": HEADS,
        "hidden": HIDDEN,
    }


def _step(format_: str, dtype: torch.dtype) -> Arguments:
    """A whole step: the arguments of `layers` with another beginning and end."""
    rng, arguments = generator(2), valid("layers", format_, dtype)
    embedding, head = (random_matrix(format_, [VOCAB], DIM, dtype, rng) for _ in range(2))
    angles = torch.rand(11, HEAD_DIM // 2, generator=rng)
    del arguments["x"]
    return arguments | {
        "tokens": torch.tensor([[3], [0], [VOCAB - 1]]),
        "embedding": embedding.tensors,
        "ropes": [angles.cos(), angles.sin()],
        "gains": [*arguments["gains"], random_gain(DIM, dtype, rng)],
        "eps": [*arguments["eps"], 1e-5],
        "flags": [*arguments["flags"], 1],
        "head": head.tensors,
        "head_bias": random((VOCAB,), dtype, rng),
        "vocab": VOCAB,
        "embedding_scale": 0.3,
        "logit_scale": 1.4,
        "softcap": 3.0,
    }


def called(name: str) -> Any:
    return getattr(op, "layers" if name == "prompt" else name)
