"""Wrong calls of the operators, by what is wrong with them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from llama_mini.optimize.packed_linear import PackedLinear
from tests.optimize.operator_calls import DIM, HEAD_DIM, HEADS, HIDDEN, KV_HEADS, VOCAB, Arguments
from tests.optimize.twins import generator, random_codes, random_matrix


def wrong(name: str, **changes: Any) -> tuple[str, Callable[[Arguments], Arguments]]:
    """A call with some arguments changed: a function is given what was there."""
    return name, lambda a: {k: change(a[k]) if callable(change) else change for k, change in changes.items()}


def last(new: Callable[[Any], Any]) -> Callable[[list[Any]], list[Any]]:
    return lambda values: [*values[:-1], new(values[-1])]


def longer(t: Tensor) -> Tensor:
    return torch.cat((t, t), -1)


def strided(t: Tensor) -> Tensor:
    return longer(t)[..., ::2]


def two_rows(t: Tensor) -> Tensor:
    return torch.cat((t, t))


def two_columns(t: Tensor) -> Tensor:
    return torch.cat((t, t), 1)


def two_rows_each(values: list[Tensor]) -> list[Tensor]:
    return list(map(two_rows, values))


def as_long(t: Tensor) -> Tensor:
    return t.long()


def quantized(format_: str = "int8", rows: int = HIDDEN) -> PackedLinear:
    return random_matrix(format_, [rows], DIM, torch.float32, generator(0))


def matrix_to_fill(format_: str) -> list[Tensor]:
    """As those of `quantize`, `pack` and `repack`."""
    return random_matrix(format_, [40], 64, torch.float32, generator(1)).tensors


def codes(format_: str, change: Callable[[list[Tensor]], list[Tensor]]) -> tuple[str, Callable[[Arguments], Arguments]]:
    """gemv with the tensors of a quantized matrix changed."""
    return wrong("gemv", w=lambda _: change(quantized(format_).tensors), bias=torch.empty(0))


def cut(vectors: int) -> Callable[[list[Tensor]], list[Tensor]]:
    """The codes of each block cut to so many vectors, or repeated up to them."""
    return lambda t: [torch.cat((t[0], t[0]), 2)[:, :, :vectors].contiguous(), *t[1:]]


def codes_of_v(v: list[Tensor]) -> list[Tensor]:
    return [v[0][: (HEADS + KV_HEADS) * HEAD_DIM], *quantized(rows=KV_HEADS * HEAD_DIM).tensors, *v[1:]]


STORE = ("quantize", "pack", "repack")
LISTS = ("k_caches", "v_caches", "gains", "eps", "flags", "matrices", "biases", "settings", "scales")
WRONG = {
    "step: no layers": wrong("layers", **{each: [] for each in LISTS}),
    **{f"step: {each} too short": wrong("layers", **{each: lambda v: v[:-1]}) for each in LISTS},
    **{f"step: {each} shorter": wrong("layers", **{each: last(lambda t: t[..., :-1])}) for each in LISTS[:3]},
    **{f"step: {each} strided": wrong("layers", **{each: last(strided)}) for each in (*LISTS[:3], "matrices")},
    **{f"step: {each} of bfloat16": wrong("layers", **{each: last(Tensor.bfloat16)}) for each in LISTS[:3]},
    "step: last matrix longer": wrong("layers", matrices=last(longer)),
    "step: last matrix of bfloat16": wrong("layers", matrices=last(Tensor.bfloat16)),
    "step: codes without scales": wrong("layers", matrices=lambda v: [quantized().tensors[0], *v[1:]]),
    "step: scales without codes": wrong("layers", matrices=lambda v: [quantized().tensors[1], *v]),
    "step: scales after floats": wrong("layers", matrices=lambda v: [v[0], quantized().tensors[1], *v[1:]]),
    "step: codes of fewer rows": wrong("layers", matrices=lambda v: [*quantized().tensors, *v[1:]]),
    "step: last bias too long": wrong("layers", biases=last(lambda _: torch.ones(DIM + 1))),
    "step: x of float64": wrong("layers", x=Tensor.double),
    "step: x strided": wrong("layers", x=strided),
    "step: x wider": wrong("layers", x=longer),
    "step: x without width": wrong("layers", x=lambda x: x[..., :0]),
    "step: one row too few": wrong("layers", x=lambda x: x[:-1]),
    "step: cos too long": wrong("layers", ropes=lambda v: [longer(v[0]), v[1]]),
    "step: sin of float64": wrong("layers", ropes=last(Tensor.double)),
    "step: more pairs than a head has": wrong("layers", ropes=lambda v: [longer(t) for t in v]),
    "step: cosines alone": wrong("layers", ropes=lambda v: v[:1]),
    "step: another rotation than there are": wrong("layers", settings=lambda v: [*v[:-2], 1, 0]),
    "step: a rotation below none": wrong("layers", settings=lambda v: [*v[:-2], -2, 0]),
    "step: a matrix apart that there is not": wrong("layers", settings=last(lambda _: 2)),
    "step: more apart than q, k and v": wrong("layers", settings=last(lambda _: 4)),
    "step: fewer than none apart": wrong("layers", settings=last(lambda _: -1)),
    "step: codes of v beside floats": wrong(
        "layers", matrices=codes_of_v, biases=[], settings=lambda v: [*v[:3], 2, *v[4:]]
    ),
    "step: an activation that there is not": wrong("layers", settings=lambda v: [v[0], 2, *v[2:]]),
    "step: position past the end": wrong("layers", positions=torch.tensor([[3], [0], [11]])),
    "step: position before the start": wrong("layers", positions=torch.tensor([[-1], [0], [10]])),
    "step: positions of int32": wrong("layers", positions=Tensor.int),
    "step: a page past the end": wrong("layers", pages=[torch.tensor([[0], [3], [2]])]),
    "step: a page before the start": wrong("layers", pages=[torch.tensor([[0], [-1], [2]])]),
    "step: pages of int32": wrong("layers", pages=last(Tensor.int)),
    "step: pages of two rows": wrong("layers", pages=last(lambda t: t[:2])),
    "step: rows without pages": wrong("layers", pages=last(lambda t: t[:, :0])),
    "step: two pages of 11 positions": wrong("layers", pages=last(two_columns)),
    "step: no pages": wrong("layers", pages=[]),
    "step: three kinds of pages": wrong("layers", pages=lambda v: 3 * v),
    "step: a page past the end of the layers with a window": wrong("layers", pages=lambda v: [*v, v[0] + 1]),
    "step: no heads": wrong("layers", heads=0),
    "step: heads no multiple": wrong("layers", heads=7),
    "step: no KV heads": wrong("layers", **dict.fromkeys(LISTS[:2], lambda v: [t[:, :0] for t in v])),
    "step: fewer KV heads in one layer": wrong("layers", **dict.fromkeys(LISTS[:2], last(lambda t: t[:, :1].clone()))),
    "step: tokens of two rows": wrong("layers", x=lambda x: x[:2].repeat(1, 2, 1)),
    "step: hidden": wrong("layers", hidden=HIDDEN - 1),
    "step: hidden below zero": wrong("layers", hidden=-1),
    **{f"whole step: {each} too short": wrong("step", **{each: lambda v: v[:-1]}) for each in LISTS[2:5]},
    "whole step: no layers": wrong("step", **{each: [] for each in LISTS}),
    "whole step: no norm before the head": wrong("step", gains=last(lambda t: t[:0])),
    "whole step: last gain longer": wrong("step", gains=last(longer)),
    "whole step: a token past the end": wrong("step", tokens=torch.tensor([[3], [0], [VOCAB]])),
    "whole step: a token below zero": wrong("step", tokens=torch.tensor([[3], [-1], [0]])),
    "whole step: tokens of int32": wrong("step", tokens=Tensor.int),
    "whole step: two tokens of a row": wrong("step", tokens=two_columns),
    "whole step: no tokens": wrong("step", **dict.fromkeys(("tokens", "pages", "positions"), lambda t: t[:0])),
    "whole step: fewer tokens than rows": wrong("step", tokens=lambda t: t[:2]),
    "whole step: a table that is too short": wrong("step", ropes=lambda v: [v[0][:10], v[1]]),
    "whole step: a table that is too wide": wrong("step", ropes=last(longer)),
    "whole step: a table of float64": wrong("step", ropes=lambda v: [t.double() for t in v]),
    "whole step: position before the start": wrong("step", positions=torch.tensor([[-1], [0], [10]])),
    "whole step: vocabulary too large": wrong("step", vocab=VOCAB + 1),
    "whole step: no vocabulary": wrong("step", vocab=0),
    "whole step: no embedding": wrong("step", embedding=[]),
    "whole step: embedding of bfloat16": wrong("step", embedding=last(Tensor.bfloat16)),
    "whole step: embedding too short": wrong("step", embedding=last(lambda t: t[:-1])),
    "whole step: head wider": wrong("step", head=last(longer)),
    "whole step: bias of the head too short": wrong("step", head_bias=lambda t: t[:-1]),
    "prompt: nothing new": wrong(
        "prompt", x=lambda x: x[:, :0], positions=lambda t: t[:, :0], ropes=lambda v: [t[:0] for t in v]
    ),
    "prompt: positions apart": wrong("prompt", positions=lambda t: t.flip(1)),
    "prompt: a position twice": wrong("prompt", positions=torch.tensor([[5, 6, 6]])),
    "prompt: past the end": wrong("prompt", positions=lambda t: t + 4),
    "prompt: before the start": wrong("prompt", positions=lambda t: t - 6),
    "prompt: two rows": wrong(
        "prompt",
        **dict.fromkeys(("x", "positions"), two_rows),
        **dict.fromkeys(("pages", "ropes", *LISTS[:2]), two_rows_each),
    ),
    "prompt: pages of two rows": wrong("prompt", pages=[torch.tensor([[0], [0]])]),
    "prompt: a page past the end": wrong("prompt", pages=[torch.tensor([[1]])]),
    "prompt: narrow": wrong("prompt", x=lambda t: t[..., :-1].contiguous()),
    "prompt: strided": wrong("prompt", x=strided),
    "prompt: no heads": wrong("prompt", heads=0),
    "prompt: heads below zero": wrong("prompt", heads=-2),
    "prompt: no KV heads": wrong("prompt", **dict.fromkeys(LISTS[:2], lambda v: [t[:, :0] for t in v])),
    "prompt: gain too short": wrong("prompt", gains=last(lambda t: t[:-1])),
    "attend: strided": wrong("attend", qkv=strided),
    "attend: two tokens of a row": wrong("attend", qkv=lambda x: x.transpose(0, 1).contiguous()),
    "attend: keys and values alone": wrong("attend", qkv=lambda x: x[:, :, : 2 * KV_HEADS].contiguous()),
    "attend: heads no multiple": wrong("attend", qkv=lambda x: x[:, :, 1:].contiguous()),
    "attend: another head_dim": wrong("attend", qkv=lambda x: x[..., :10].contiguous()),
    "attend: integers": wrong("attend", qkv=as_long),
    "attend: cache of bfloat16": wrong("attend", k_cache=Tensor.bfloat16),
    "attend: keys of int8 alone": wrong("attend", k_cache=Tensor.char),
    "attend: int8 without scales": wrong("attend", k_cache=Tensor.char, v_cache=Tensor.char),
    "attend: cache of fewer rows": wrong("attend", v_cache=lambda t: t[:1]),
    "attend: a page past the end": wrong("attend", pages=torch.tensor([[0], [3], [2]])),
    "attend: two pages of 11 positions": wrong("attend", pages=two_columns),
    "attend: position past the end": wrong("attend", positions=torch.tensor([[3], [0], [11]])),
    "prompt: last matrix longer": wrong("prompt", matrices=last(longer)),
    "prompt: last bias too long": wrong("prompt", biases=last(lambda _: torch.ones(DIM + 1))),
    "prompt: integers": wrong("prompt", x=as_long),
    "gemv: rows": wrong("gemv", rows=HIDDEN + 1),
    "gemv: rows below zero": wrong("gemv", rows=-1),
    "gemv: no tensor": wrong("gemv", w=[]),
    "gemv: bias too short": wrong("gemv", bias=lambda t: t[:-1]),
    "gemv: bias strided": wrong("gemv", bias=strided),
    "gemv: x wider": wrong("gemv", x=longer),
    "gemv: x without width": wrong("gemv", x=lambda x: x[:, :0], w=lambda w: [w[0][:, :0]]),
    "gemv: integers": wrong("gemv", x=as_long, w=lambda w: [as_long(w[0])], bias=as_long),
    "gemv: x of integers, codes": wrong("gemv", x=as_long, w=lambda _: quantized().tensors, bias=as_long),
    "gemm: rows": wrong("gemm", rows=HIDDEN + 1),
    "gemm: rows below zero": wrong("gemm", rows=-1),
    "gemm: no tensor": wrong("gemm", w=[]),
    "gemm: rows of codes": wrong("gemm", rows=HIDDEN + 16, w=lambda _: quantized().tensors, bias=torch.empty(0)),
    "gemm: bias too short": wrong("gemm", bias=lambda t: t[:-1]),
    "gemm: x wider": wrong("gemm", x=lambda x: torch.cat((x, x), -1)),
    "gemm: integers": wrong("gemm", x=as_long, w=lambda w: [as_long(w[0])], bias=as_long),
    "gemm: x of integers, codes": wrong("gemm", x=as_long, w=lambda _: quantized().tensors, bias=as_long),
    "codes: of one bit": codes("int2", cut(1)),
    "codes: of seven bits": codes("int8", cut(7)),
    "codes: of nine bits": codes("int8", cut(9)),
    "codes: groups of 16 where there are none": codes("int8", lambda t: [t[0], torch.cat((t[1], t[1]), 1)]),
    "codes: groups of 32 where there are none": codes("q6_k", lambda t: [t[0], t[1][:, :1].contiguous(), t[2]]),
    "codes: groups of 8": codes("q6_k", lambda t: [t[0], torch.cat((t[1], t[1]), 1), t[2]]),
    "codes: int8 scales alone": codes("q6_k", lambda t: t[:2]),
    "codes: int8 scales and minimums alone": codes("q4_k", lambda t: t[:3]),
    "codes: factors of float16 scales": codes("int4", lambda t: [*t, t[1][:, None].contiguous()]),
    "codes: factors of more rows": codes("q4_k", last(two_rows)),
    "codes: factors of scales alone": codes("q4_k", last(lambda t: t[:, :, :1].contiguous())),
    "codes: factors of float32": codes("q4_k", last(Tensor.float)),
    "codes: int8 minimums of float16 scales": codes("int4", last(Tensor.char)),
    "codes: five tensors": codes("q4_k", lambda t: [*t, t[-1]]),
    "codes: scales of no group": codes("int4", lambda t: [t[0], *(values[:, :0] for values in t[1:])]),
    "codes: two bits of twice the columns": codes("int4", lambda t: [t[0].view(2, 2, 2, 16, 4), *t[1:]]),
    "codes: minimums of eight bits": codes("int8", lambda t: [*t, t[1]]),
    "codes: no minimums": codes("int5", lambda t: t[:2]),
    "codes: minimums of half the groups": codes("q2_k", lambda t: [*t[:2], t[2][:, :1].contiguous(), t[3]]),
    "codes: no table": codes("nvfp4", lambda t: t[:2]),
    "codes: a table of 15": codes("iq4", lambda t: [*t[:2], t[2][:15]]),
    "codes: a table of 17": codes("nvfp4", lambda t: [*t[:2], torch.cat((t[2], t[2][:1]))]),
    "codes: a table of eight bits": codes("int8", lambda t: [*t, quantized("iq4").tensors[2]]),
    "codes: a table of bfloat16": codes("iq4", lambda t: [*t[:2], t[2].bfloat16()]),
    **{
        f"codes: {value} in a table": codes("iq4", last(lambda t, v=value: t.index_fill(0, torch.tensor(5), v)))
        for value in (-129, 128, 0.5, float("inf"))
    },
    **{
        f"quantize: to {name}": wrong("quantize", w=lambda _, name=name: matrix_to_fill(name))
        for name in ("iq4", "q2_k", "q4_k")
    },
    "dequantize_rows: past the end": wrong("dequantize_rows", at=torch.tensor([0, 48])),
    "dequantize_rows: before the start": wrong("dequantize_rows", at=torch.tensor([-1])),
    "dequantize_rows: far past the end": wrong("dequantize_rows", at=torch.tensor([2**63 - 1])),
    "dequantize_rows: numbers of int32": wrong("dequantize_rows", at=Tensor.int),
    "dequantize_rows: no columns": wrong("dequantize_rows", columns=0),
    "dequantize_rows: columns below zero": wrong("dequantize_rows", columns=-1),
    "dequantize_rows: too wide": wrong("dequantize_rows", columns=DIM + 32),
    "dequantize_rows: of floats": wrong("dequantize_rows", w=[torch.ones(48, DIM)]),
    "dequantize_rows: no tensor": wrong("dequantize_rows", w=[]),
    "dequantize_rows: scales of float32": wrong("dequantize_rows", w=lambda w: [w[0], w[1].float(), w[2]]),
    "dequantize_rows: codes cut": wrong("dequantize_rows", w=lambda w: [w[0][:-1], *w[1:]]),
    "dequantize_rows: codes strided": wrong("dequantize_rows", w=lambda w: [strided(w[0]), *w[1:]]),
    "dequantize_rows: least values cut": wrong("dequantize_rows", w=lambda w: [*w[:2], w[2][:-1]]),
    **{f"{name}: block {block}": wrong(name, block=block) for name in STORE for block in (-1, 2, 2**60)},
    **{f"{name}: no tensor": wrong(name, w=[]) for name in STORE},
    **{f"{name}: floats": wrong(name, w=[torch.ones(48, 64)]) for name in STORE},
    **{f"{name}: codes strided": wrong(name, w=lambda w: [strided(w[0]), *w[1:]]) for name in STORE},
    **{f"{name}: scales cut": wrong(name, w=lambda w: [w[0], w[1][:-1], w[2]]) for name in STORE},
    "rms_norm: no gain": wrong("rms_norm", gain=torch.ones(0)),
    "rms_norm: gain too short": wrong("rms_norm", gain=lambda t: t[:-1]),
    "rms_norm: gain strided": wrong("rms_norm", gain=strided),
    "rms_norm: gain of bfloat16": wrong("rms_norm", gain=Tensor.bfloat16),
    "rms_norm: integers": wrong("rms_norm", x=as_long, gain=as_long),
    "rms_norm: no width": wrong("rms_norm", x=lambda x: x[:, :0]),
    "quantize: wider": wrong("quantize", x=longer),
    "quantize: strided": wrong("quantize", x=strided),
    "quantize: no rows": wrong("quantize", x=lambda x: x[:0]),
    "quantize: no width": wrong("quantize", x=lambda x: x[:, :0]),
    "quantize: float16": wrong("quantize", x=Tensor.half),
    "pack: strided": wrong("pack", rows=lambda r: [strided(r[0]), *r[1:]]),
    "pack: codes of int32": wrong("pack", rows=lambda r: [r[0].int(), *r[1:]]),
    "pack: codes of half a group": wrong("pack", rows=lambda r: [r[0][:, :48].contiguous(), *r[1:]]),
    "pack: wider": wrong(
        "pack", rows=[longer(torch.zeros(24, 64, dtype=torch.uint8)), *[torch.ones(24, 4).half()] * 2]
    ),
    "pack: no rows": wrong("pack", rows=lambda r: [t[:0] for t in r]),
    "pack: without minimums": wrong("pack", rows=lambda r: r[:2]),
    "pack: codes alone": wrong("pack", rows=lambda r: r[:1], w=lambda w: w[:1]),
    "pack: scales cut": wrong("pack", rows=lambda r: [r[0], r[1][:-1], r[2]]),
    "pack: scales strided": wrong("pack", rows=lambda r: [r[0], strided(r[1]), r[2]]),
    "pack: minimums of float32": wrong("pack", rows=lambda r: [*r[:2], r[2].float()]),
    **{
        f"pack: K-quant, {what}": wrong(
            "pack",
            w=lambda _: matrix_to_fill("q4_k"),
            rows=lambda _, change=change: change(list(random_codes("q4_k", 24, 64, generator(1)))),
        )
        for what, change in {
            "without factors": lambda r: r[:3],
            "factors cut": last(lambda t: t[:-1]),
            "factors of scales alone": last(lambda t: t[:, :1].contiguous()),
            "factors of float32": last(Tensor.float),
            "scales of float16": lambda r: [r[0], r[1].half(), *r[2:]],
            "minimums cut": lambda r: [*r[:2], r[2][:-1], r[3]],
        }.items()
    },
    "pack: float16 scales into a K-quant": wrong("pack", w=lambda _: matrix_to_fill("q4_k")),
    "pack: a K-quant into float16 scales": wrong(
        "pack", rows=lambda _: list(random_codes("q4_k", 24, 64, generator(1)))
    ),
    **{
        f"repack: blocks for {name}": wrong("repack", w=lambda _, name=name: matrix_to_fill(name))
        for name in ("int5", "q4_k")
    },
    "repack: blocks of eight bits": wrong("repack", blocks=torch.zeros(24, 68, dtype=torch.uint8)),
    "repack: half a block": wrong("repack", blocks=lambda t: t[:, :-1].contiguous()),
    "repack: strided": wrong("repack", blocks=strided),
    "repack: integers": wrong("repack", blocks=as_long),
    "repack: no rows": wrong("repack", blocks=lambda t: t[:0]),
    **{f"repack: columns {n}": wrong("repack", columns=n) for n in (-64, 0, 32, 63, 128)},
    "dequantize_rows: as integers": wrong("dequantize_rows", dtype=torch.long),
    "dequantize_rows: as float16": wrong("dequantize_rows", dtype=torch.float16),
}
