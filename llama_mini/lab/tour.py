"""What RMSNorm computes, step by step, on activations of a real checkpoint. tour.toml holds the texts, in English and
Korean."""

import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import get_args
from unicodedata import east_asian_width

import torch
from torch import Tensor

from llama_mini.errors import RequestError
from llama_mini.lab.recording import capture
from llama_mini.machine import dtype_name
from llama_mini.model.llama import Llama
from llama_mini.model.norm import Cast, RMSNorm


@dataclass(frozen=True)
class Step:
    """One step of the tour: its title, its text, and lines of numbers, computed from the model."""

    title: str
    text: str
    numbers: list[str]


@torch.inference_mode()  # as a decorator it ends at each `yield`, and so does not hold in the caller
def tour(model: Llama, tokens: list[int], language: str = "en") -> Iterator[Step]:
    """The steps one by one, so that each can be printed as it comes. `tokens` are those of a short text.

    Raises RequestError if the norm that the tour looks at is not an RMSNorm with a gain.
    """
    texts = tomllib.loads(Path(__file__).with_name("tour.toml").read_text(encoding="utf-8"))[language]
    path = f"layers.{len(model.layers) // 2}.feed_forward.pre_norm"
    norm = model.get_submodule(path)
    if not isinstance(norm, RMSNorm) or norm.weight is None:
        raise RequestError(f"the tour looks at {path}, which is not an RMSNorm with a gain; use a LLaMA checkpoint")
    x = capture(model, tokens, at=path)[path].x
    assert x is not None
    for numbers in STEPS:
        words = texts[numbers.__name__[1:]]
        title, text = words["title"].format(path=path), " ".join(words["text"].split())
        lines = numbers(x[0].float(), norm, model, tokens)  # x[0]: (T, C)
        yield Step(title, text, [_translated(line, texts.get("words", {})) for line in lines])


def _translated(line: str, words: dict[str, str]) -> str:
    """The line with each phrase of `words` replaced, and filled up before two spaces: columns stay in line."""
    for phrase in sorted(words, key=len, reverse=True):  # "largest error" before "largest"
        there = words[phrase]
        room = len(phrase) - sum(1 + (east_asian_width(letter) in "WF") for letter in there)
        line = re.sub(rf"(?<!\w){re.escape(phrase)}(?=  )", there + room * " ", line)
        line = re.sub(rf"(?<!\w){re.escape(phrase)}(?![\w(])", there, line)
    return line


def _input(x: Tensor, norm: RMSNorm, model: Llama, tokens: list[int]) -> list[str]:
    row = x[-1]
    return [
        f"x            {_few(row)}",
        f"shape        {tuple(x.shape)}",
        f"RMS          {_rms(row):.4f}    mean {row.mean():+.4f}    largest |x| {row.abs().max():.3f}",
    ]


def _mean(x: Tensor, norm: RMSNorm, model: Llama, tokens: list[int]) -> list[str]:
    squares = x.pow(2)
    lines = [f"mean()                     {tuple(squares.mean().shape)!s:<10} {squares.mean():.4g}"]
    for dim in (0, 1, -1):
        for keepdim in (False, True):
            mean = squares.mean(dim, keepdim=keepdim)
            fits = "x / it divides" if _broadcasts(x, mean) else "x / it fails"
            right = "   <- each row by its own" if dim != 0 and keepdim else ""
            lines.append(f"mean({dim:>2}, keepdim={keepdim!s:<5})    {tuple(mean.shape)!s:<10} {fits}{right}")
    return lines


def _root(x: Tensor, norm: RMSNorm, model: Llama, tokens: list[int]) -> list[str]:
    square = x.pow(2).mean(-1, keepdim=True) + norm.eps
    one, other = torch.rsqrt(square), 1 / torch.sqrt(square)
    exact = 1 / square.double().sqrt()
    return [
        f"rsqrt(s)     {_few(one[:, 0])}    largest error {((one - exact) / exact).abs().max():.0e}",
        f"1 / sqrt(s)  {_few(other[:, 0])}    largest error {((other - exact) / exact).abs().max():.0e}",
    ]


def _wide(x: Tensor, norm: RMSNorm, model: Llama, tokens: list[int]) -> list[str]:
    exact = x.double().pow(2).mean(-1)
    lines = []
    for dtype in (torch.float16, torch.bfloat16):
        squares = x.to(dtype) * x.to(dtype)
        error = ((squares.mean(-1).double() - exact) / exact).abs().max()
        wrong = f"largest error {100 * error:.2g} %" if error.isfinite() else "overflows"
        lines.append(f"mean of squares in {dtype_name(dtype):<9}  {wrong}")
    big = torch.full((1, norm.dim), 300.0, dtype=torch.float16)
    square = float((big * big)[0, 0])
    narrow = float((big * torch.rsqrt((big * big).mean(-1, keepdim=True) + norm.eps))[0, 0])
    wide = float(RMSNorm(norm.dim, norm.eps, gain="none")(big)[0, 0])
    return [*lines, f"float16, every x 300: 300² = {square}, so y = {narrow}; through float32 y = {wide}"]


def _eps(x: Tensor, norm: RMSNorm, model: Llama, tokens: list[int]) -> list[str]:
    lines = []
    for size in (1.0, 1e-2, 1e-3, 1e-4):
        row = x[-1] / _rms(x[-1]) * size
        square = row.pow(2).mean()
        inside, outside = row / (square + norm.eps).sqrt(), row / (square.sqrt() + norm.eps)
        lines.append(f"RMS in {size:<7g} RMS out, eps inside {_rms(inside):.4f}, outside {_rms(outside):.4f}")
    zero = torch.zeros(norm.dim)
    without = float((zero / zero.pow(2).mean().sqrt())[0])
    return [
        *lines,
        f"a row of zeros: with eps {float((zero / (zero.pow(2).mean() + norm.eps).sqrt())[0])}, without {without}",
    ]


def _gain(x: Tensor, norm: RMSNorm, model: Llama, tokens: list[int]) -> list[str]:
    assert norm.weight is not None
    gain = norm.weight.float()
    plain = RMSNorm(norm.dim, norm.eps, gain="none")(x)
    return [
        f"g            {_few(gain)}    smallest {gain.min():.3f}, mean {gain.mean():.3f}, largest {gain.max():.3f}",
        f"x / RMS      {_few(plain[-1])}    RMS {_rms(plain[-1]):.4f}",
        f"x / RMS · g  {_few((plain * gain)[-1])}    RMS {_rms((plain * gain)[-1]):.4f}",
    ]


def _cast(x: Tensor, norm: RMSNorm, model: Llama, tokens: list[int]) -> list[str]:
    outputs = []
    for cast in get_args(Cast):
        twin = RMSNorm(norm.dim, norm.eps, cast=cast)
        twin.weight = norm.weight
        outputs.append(twin(x.bfloat16()))
    differ = (outputs[0] != outputs[1]).float().mean()
    return [f"bfloat16: the two orders differ in {100 * differ:.0f} % of the elements, by the last of eight bits"]


def _claim(x: Tensor, norm: RMSNorm, model: Llama, tokens: list[int]) -> list[str]:
    pre = [f"layers.{i}.attention.pre_norm" for i in range(len(model.layers))]
    record = capture(model, tokens, at=pre, keep="stats")
    sizes = [float(record[path].rms[0, 1:].mean()) for path in pre]  # token 0 has another size
    energy = sorted(record[path].mean_energy for path in pre)[len(pre) // 2]
    with torch.inference_mode(False), torch.enable_grad():
        row = torch.tensor(x[-1].tolist(), dtype=torch.float64, requires_grad=True)
        direction = torch.linspace(-1, 1, norm.dim, dtype=torch.float64)
        (slope,) = torch.autograd.grad(row / (row.pow(2).mean() + norm.eps).sqrt() @ direction, row)
        along = abs(float((slope @ row / slope.norm() / row.norm()).detach()))
    return [
        f"RMS into the first layer's norm {sizes[0]:.3f}, into the last's {sizes[-1]:.3f}; each gives 1",
        f"energy in the mean of a row: {100 * energy:.2f} % (any direction has 1/d on average, {100 / norm.dim:.2f} %)",
        f"share of the gradient that points along x: {along:.0e}",
    ]


STEPS = (_input, _mean, _root, _wide, _eps, _gain, _cast, _claim)


def _rms(row: Tensor) -> float:
    return float(row.double().pow(2).mean().sqrt())


def _few(values: Tensor) -> str:
    return " ".join(f"{float(v):+.3f}" for v in values[:5]) + " …"


def _broadcasts(x: Tensor, other: Tensor) -> bool:
    try:
        return torch.broadcast_shapes(x.shape, other.shape) == x.shape
    except RuntimeError:
        return False
