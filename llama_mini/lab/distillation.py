"""Training a changed model to predict what the untouched one predicts.

The loss is KL(untouched ‖ changed) over the whole vocabulary at every position. What lies below the first changed
layer is the same in both, so it runs once for both, and without gradient.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from llama_mini.engine.finite import first_nonfinite
from llama_mini.engine.logprobs import LOGITS_AT_ONCE
from llama_mini.errors import NumericalError
from llama_mini.lab.cost import standard_error
from llama_mini.lab.students import Taper, trained
from llama_mini.lab.study import progress
from llama_mini.machine import as_dtype
from llama_mini.model.attention import causal_mask
from llama_mini.model.llama import Llama

BATCH = 2  # rows of a step
LR = 2e-4
_WARM_UP = 5  # steps
_POINTS = 8  # of the curve, its first and last included
_KEEP_EVERY = 60  # seconds of training
_TIMED = 3  # steps that measure how long one takes


@dataclass(frozen=True)
class Point:
    """What a model costs at one moment of its training, on texts that it is not trained on.

    tokens, seconds: of training so far. dloss, se, kl, top1: as in Score, against the untouched model.
    error: where NaN or infinity first appear, if they do; the costs are then NaN.
    """

    tokens: int
    seconds: float
    dloss: float
    se: float
    kl: float
    top1: float
    error: str | None = None


@dataclass
class State:
    """How far a training is. `tensors` and `optimizer` are filled only in what is written to a file and read."""

    steps: int
    tapered: bool
    step: int = 0
    seconds: float = 0.0
    curve: list[dict[str, Any]] = field(default_factory=list)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)


class Distillation:
    """The untouched model, texts, and what it takes to train any changed model against them.

    Args:
        model: the untouched model, in float32 or float64.
        first: the first layer in which the models differ; -1 if the norm of the embedding does.
        rows: what to train on, (N, T) int64.
        held_out: texts to measure the cost on, each (T,) int64.
        seed: of the order of the rows.
    """

    def __init__(self, model: Llama, first: int, rows: Tensor, held_out: Sequence[Tensor], seed: int) -> None:
        self.model, self.first, self.rows, self.held_out, self.seed = model, first, rows, held_out, seed
        self.device, self.wide = model.device.type, model.dtype
        fast = as_dtype("auto", self.device) if self.wide == torch.float32 else self.wide
        # A cache of rounded weights would outlive the step where own_modes is around it, and hide the updates.
        self.autocast = torch.autocast(self.device, torch.bfloat16, enabled=fast == torch.bfloat16, cache_enabled=False)
        self.teacher = model
        if fast == torch.bfloat16:  # matrices that need no gradient: autocast would round them again at each step
            self.teacher = deepcopy(model, {id(p): _rounded(p) for p in model.parameters()})

    def hidden(self, teacher: Llama, student: Llama, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The last hidden states of both models, (B, T, C) each, for tokens (B, T)."""
        tokens = tokens.to(teacher.device)
        positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
        first, last = max(self.first, 0), len(teacher.layers)

        def embedded(model: Llama) -> Tensor:
            return model.embed_norm(model.embed(tokens).to(self.wide))

        def run(model: Llama, x: Tensor, layers: range) -> Tensor:
            for i in layers:
                x = model.layers[i](x, ropes[i], masks[i], None)
            return x

        # The student's own modules, since frozen norms learn from them what is read.
        ropes, masks = student.by_layer(positions, causal_mask(positions, tokens.shape[1]), cached=False)
        ours = embedded(student)
        with torch.no_grad():
            shared = run(teacher, ours if self.first >= 0 else embedded(teacher), range(first))
            theirs = teacher.norm(run(teacher, shared, range(first, last)))
        return theirs, student.norm(run(student, shared if self.first >= 0 else ours, range(first, last)))

    @torch.no_grad()
    def cost(self, student: Llama, state: State) -> Point:
        """What the student costs now, on the held-out texts, without rounding to bfloat16."""
        seen = state.step * BATCH * self.rows.shape[1]
        longest, n = max(map(len, self.held_out)), sum(map(len, self.held_out))
        differences = torch.full((len(self.held_out), longest - 1), torch.nan, dtype=torch.float64)
        kl, same = 0.0, 0
        for row, text in zip(differences, self.held_out, strict=True):
            theirs, ours = (x[0] for x in self.hidden(self.model, student, text[None]))
            next_ids = torch.cat([text[1:], text[:1]]).to(ours.device)  # the last row is not used
            parts = zip(*(x.split(LOGITS_AT_ONCE) for x in (theirs, ours, next_ids)), strict=True)
            found = []
            for x, y, ids in parts:
                log_p, log_q = (m.logits(h).log_softmax(-1) for m, h in ((self.model, x), (student, y)))
                if not math.isfinite(float(log_q.sum())):
                    where = first_nonfinite(student, map(student, [text[None].to(y.device)]))
                    error = f"NaN or infinity in the logits, first at {where}"
                    return Point(seen, state.seconds, math.nan, math.nan, math.nan, math.nan, error)
                kl += float(_divergence(log_p, log_q).double().sum())
                same += int((log_p.argmax(-1) == log_q.argmax(-1)).sum())
                found.append((log_p - log_q).gather(-1, ids[:, None])[:, 0].double().cpu())
            row[: len(text) - 1] = torch.cat(found)[:-1]
        return Point(seen, state.seconds, float(differences.nanmean()), standard_error(differences), kl / n, same / n)

    def gradients(self, student: Llama, tokens: Tensor) -> float:
        """Adds the gradients of the mean KL on tokens (B, T) to the student's parameters, and returns that KL."""
        # The head is not trained, and so the teacher's, which is rounded already, serves both, unless it was changed.
        head = self.teacher if self.first >= 0 else student
        kl, n = 0.0, tokens.numel()
        with self.autocast:
            theirs, ours = self.hidden(self.teacher, student, tokens)
            gradient = []
            parts = (x.detach().flatten(0, 1).split(LOGITS_AT_ONCE) for x in (theirs, ours))
            for x, y in zip(*parts, strict=True):
                logits = head.logits(y.requires_grad_())
                with torch.no_grad():
                    log_p, log_q = self.teacher.logits(x).log_softmax(-1), logits.log_softmax(-1)
                    kl += float(_divergence(log_p, log_q).sum())
                    slope = log_q.exp_().sub_(log_p.exp_()).div_(n)  # of the KL by the logits
                logits.backward(slope)
                gradient.append(y.grad)
        ours.backward(torch.cat(gradient).view_as(ours).to(ours.dtype))
        return kl / n

    def batches(self, steps: int) -> Iterator[Tensor]:
        """The rows of each step, (BATCH, T): all of them in a random order, then again in another one."""
        generator = torch.Generator().manual_seed(self.seed)
        passes = -(-steps * BATCH // len(self.rows))
        order = torch.cat([torch.randperm(len(self.rows), generator=generator) for _ in range(passes)])
        return (self.rows[chosen] for chosen in order[: steps * BATCH].view(steps, BATCH))

    def can_train(self, student: Llama) -> bool:
        """Whether loss and gradients are finite at the first step."""
        kl = self.gradients(student, next(self.batches(1)))
        norm = nn.utils.get_total_norm([p.grad for p in trained(student).values() if p.grad is not None])
        student.zero_grad()
        return math.isfinite(kl + float(norm))

    def steps_in(self, student: Llama, minutes: float) -> int:
        """How many steps fit: the middle one of three steps is timed, and nothing is changed."""
        times = []
        for tokens in self.batches(_TIMED):
            started = time.perf_counter()
            self.gradients(student, tokens)
            student.zero_grad()
            times.append(time.perf_counter() - started)
        return max(1, int(60 * minutes / sorted(times)[_TIMED // 2]))

    def train(
        self, student: Llama, state: State, tapers: Sequence[Taper], keep: Callable[[State], None], name: str
    ) -> State:
        """Trains the student from where `state` stands to its last step; `keep` is called with the state now and then.

        AdamW, betas 0.9 and 0.95, no weight decay, gradients clipped to norm 1. The rate rises over 5 steps and falls
        linearly to 0 at the last one. With tapers, the change comes in over the first half of the steps.

        Raises NumericalError if the loss or a gradient is not finite.
        """
        parameters, steps = trained(student), state.steps
        optimizer = torch.optim.AdamW(parameters.values(), LR, (0.9, 0.95), weight_decay=0, fused=True)
        if state.step:
            for key, parameter in parameters.items():
                parameter.data.copy_(state.tensors[key])
            optimizer.load_state_dict(state.optimizer)
        state.tensors, state.optimizer, kept_at = {}, {}, state.seconds
        measured_at = {round(i * steps / (_POINTS - 1)) for i in range(_POINTS)}
        with progress(total=steps, initial=state.step, desc=name, unit="step") as bar:
            for tokens in islice(self.batches(steps), state.step, None):
                started = time.perf_counter()
                for taper in tapers:
                    taper.share = max(0.0, 1 - 2 * state.step / steps)
                for group in optimizer.param_groups:
                    group["lr"] = LR * min(1, (state.step + 1) / _WARM_UP) * (1 - state.step / steps)
                kl = self.gradients(student, tokens)
                norm = float(nn.utils.clip_grad_norm_(parameters.values(), 1.0))
                if not math.isfinite(kl + norm):
                    raise NumericalError(_not_finite(name, state, kl, norm))
                optimizer.step()
                optimizer.zero_grad()
                state.step, state.seconds = state.step + 1, state.seconds + time.perf_counter() - started
                if state.step in measured_at:
                    for taper in tapers:
                        taper.share = 0.0  # the whole change
                    state.curve.append(vars(self.cost(student, state)))
                if state.seconds - kept_at > _KEEP_EVERY or state.step == steps:
                    kept_at = state.seconds
                    tensors = {key: p.detach() for key, p in parameters.items()}
                    keep(replace(state, tensors=tensors, optimizer=optimizer.state_dict()))
                bar.set_postfix(kl=f"{kl:.3g}", refresh=False)
                bar.update()
        return state


def _rounded(p: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(p.detach().to(torch.bfloat16) if p.ndim == 2 else p.detach(), requires_grad=False)


def _divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p ‖ q) of each token in nats: log-probabilities (N, V) twice -> (N,)."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def _not_finite(name: str, state: State, kl: float, norm: float) -> str:
    advice = "it cannot be trained" if state.tapered else "try taper, which brings the change in slowly"
    found = f"the KL is {kl:.4g} and the norm of its gradient {norm:.4g}"
    return f"{name}: in step {state.step + 1} of {state.steps} {found}; {advice}"
