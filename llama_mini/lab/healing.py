"""What a change of the norms costs a real model once it has had a few minutes to adapt."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from llama_mini.checkpoint.plain import check_plain
from llama_mini.engine.logprobs import LOGITS_AT_ONCE
from llama_mini.errors import CapacityError, RequestError, warn
from llama_mini.lab.distillation import BATCH, Distillation, Point, State
from llama_mini.lab.editing import Edits
from llama_mini.lab.healing_texts import HELD_OUT, LENGTH, fingerprint, held_out_texts, rows_of, samples, training_text
from llama_mini.lab.kept import Kept
from llama_mini.lab.measurement import own_modes
from llama_mini.lab.students import Taper, as_wide, copied, student_of, tapers_of, trained
from llama_mini.lab.table import Table
from llama_mini.lab.texts import Ids, as_texts
from llama_mini.machine import available_memory, format_bytes, peak_memory_bytes
from llama_mini.model.llama import Llama
from llama_mini.tokenizer import Tokenizer
from llama_mini.validate import check_flag, check_number, check_whole

_CALIBRATION_ROWS = 4
_NEAR = 0.04  # relative, how near the control's KL must be to the change's
_MOST_TRIES = 30  # for that
_MOST_STEPS = 1_000_000


@dataclass(frozen=True, eq=False, repr=False)
class Healed:
    """A changed model before, during and after its training.

    curve: its cost on the held-out texts, from before the first step to after the last; see Point.
    tapered: whether the change came in slowly.
    peak_memory_bytes: the most that the process has held; None where the system does not say.
    model: the trained model, in float32 (float64 for a float64 model). It shares what was not trained with the
        untouched one. A change that a norm plan can express is in its config, so that the model can be saved.
    control: the same for a random change of equal KL, or None.
    """

    curve: Table[Point]
    steps: int
    tapered: bool
    peak_memory_bytes: int | None
    model: Llama
    control: "Healed | None" = None

    @property
    def before(self) -> Point:
        return self.curve[0]

    @property
    def after(self) -> Point:
        return self.curve[-1]

    @property
    def tokens(self) -> int:
        return self.after.tokens

    @property
    def tokens_per_second(self) -> float:
        return self.after.tokens / self.after.seconds

    def table(self) -> Table[Any]:
        """The curve, and below it that of the control; columns as in Point."""
        runs = {"change": self.curve, "control": () if self.control is None else self.control.curve}
        return Table([SimpleNamespace(run=run, **vars(point)) for run, curve in runs.items() for point in curve])

    def summary(self) -> str:
        speed = f"{self.steps} steps, {self.tokens:,} tokens, {self.tokens_per_second:.0f} tokens/s"
        memory = "" if self.peak_memory_bytes is None else f", peak memory {format_bytes(self.peak_memory_bytes)}"
        return f"{speed}{memory}{', tapered' if self.tapered else ''}"

    def __repr__(self) -> str:
        return f"{self.table()}\n{self.summary()}"


@own_modes()
def heal(
    model: Llama,
    change: Edits | Llama,
    minutes: float = 2,
    seed: int = 0,
    *,
    steps: int | None = None,
    tokenizer: Tokenizer | None = None,
    text: Ids | None = None,
    held_out: Ids | None = None,
    taper: bool | None = None,
    control: bool = True,
    folder: str | Path | None = None,
) -> Healed:
    """Trains a changed model for a few minutes to predict what `model` does, and says what the change still costs.

    The loss is KL(model ‖ changed model) over the whole vocabulary at every position. Trained are the layers from the
    first changed one on, and the final norm; embedding and head are not. Steps are of 2 × 256 tokens, with AdamW at
    2e-4, in bfloat16 autocast where the machine has it. `model` does not change.

    Args:
        change: what `edit` takes, {pattern: settings}, or a model that `move` or `insert` made of this one. The
            statistic of frozen norms is measured on the first four rows of the training text.
        minutes: of training. The first three steps are timed, without an effect, and the number of steps that fit is
            fixed then; rate and taper follow it. Texts, measurements and the control take their own time.
        steps: exactly this many steps, instead of `minutes`. On one machine, the same steps and seed give the same
            weights, bit for bit.
        tokenizer: the model's. It reads the default texts: trained on are Python's language reference and 56 rows that
            the model writes, held out are rows of a novel and of another part of Python's documentation.
        text, held_out: other texts for these purposes. Without them and a tokenizer, the model writes both. Training
            reads rows of 256 tokens (or as long as the longest text); the end of a text that fills no row is left out.
        taper: let the change come in over the first half of the steps. None: only if the changed model's logits, or
            their gradients, are NaN or infinite.
        control: also train a random change, the same layers' matrices plus noise, whose KL on the held-out texts is
            that of the change within 4 %. It takes as many steps again. What the change keeps costing, and this one
            does not, is due to the norms.
        folder: where the state is kept once a minute. A call with the same arguments goes on from there.

    Raises RequestError, and what `edit` raises; CapacityError if the training does not fit in memory; NumericalError if
    the training diverges.
    """
    check_number("minutes", minutes, RequestError, above=0)
    check_whole("seed", seed, RequestError, 0, 2**63 - 1)
    if steps is not None:
        check_whole("steps", steps, RequestError, 1, _MOST_STEPS)
    for name, flag in {"taper": bool(taper) if taper is None else taper, "control": control}.items():
        check_flag(name, flag, RequestError)
    check_plain(model)
    made: dict[int, nn.Parameter] = {}
    model = as_wide(model, made)
    rows, held = _texts(model, tokenizer, text, held_out)
    change = as_wide(change, made) if isinstance(change, Llama) else change
    student, first = student_of(model, change, rows[:_CALIBRATION_ROWS])
    run = Distillation(model, first, rows, held, seed)
    _check_fits(run, student)
    kept = Kept(
        None if folder is None else Path(folder),
        {
            "model": fingerprint(model.parameters()),
            "change": fingerprint(student.parameters(), str(student if isinstance(change, Llama) else change)),
            "text": fingerprint([rows]),
            "held-out text": fingerprint(held),
            "budget": f"{minutes} minutes" if steps is None else f"{steps} steps",
            "seed": str(seed),
            "taper": str(taper),
        },
    )
    state = kept.load("heal")
    if state is None:
        before = run.cost(student, State(0, False))
        tapered = before.error is not None or not run.can_train(student) if taper is None else taper
        state = State(steps or run.steps_in(student, minutes), tapered, curve=[vars(before)])
    tapers = tapers_of(model, student) if state.tapered else {}
    for path, module in tapers.items():
        student.set_submodule(path, module)
    healed = _trained(run, student, state, [*tapers.values()], kept, "heal")
    for path, module in tapers.items():
        student.set_submodule(path, module.new)
    if not control or healed.before.error is not None:
        return healed
    return replace(healed, control=_control(run, healed, kept))


def _trained(run: Distillation, student: Llama, state: State, tapers: Sequence[Taper], kept: Kept, name: str) -> Healed:
    with kept.resumable(name, state):
        run.train(student, state, tapers, kept.keep(name), name)
    curve = Table([Point(**point) for point in state.curve])
    return Healed(curve, state.steps, state.tapered, peak_memory_bytes(), student.requires_grad_(False))


def _control(run: Distillation, healed: Healed, kept: Kept) -> Healed | None:
    """The same training for noise in the matrices of the same layers, of a size that costs the same KL."""
    state, student = kept.load("control"), copied(run.model, run.first)
    if state is None:
        before = _perturb(run, student, healed.before.kl)
        if before is None:
            warn(f"no control: no noise in the matrices of the trained layers has a KL of {healed.before.kl:.4g}")
            return None
        state = State(healed.steps, False, curve=[vars(before)])
    return _trained(run, student, state, [], kept, "control")


def _perturb(run: Distillation, student: Llama, target: float) -> Point | None:
    """Adds noise to the student's trained matrices, so much that its KL is `target`. None if that is not possible."""
    generator = torch.Generator().manual_seed(run.seed)
    matrices = [p for p in trained(student).values() if p.ndim == 2]
    whole = [(p.detach().clone(), p.detach().pow(2).mean().sqrt()) for p in matrices]
    noise = [torch.randn(p.shape, generator=generator, dtype=p.dtype).to(p.device) for p in matrices]
    below, above, size = 0.0, math.inf, 0.1  # of the noise, relative to the RMS of each matrix
    for _ in range(_MOST_TRIES if matrices else 0):
        for p, (w, rms), random in zip(matrices, whole, noise, strict=True):
            p.data = w + size * rms * random
        found = run.cost(student, State(0, False))
        if abs(found.kl - target) <= _NEAR * target:
            return found
        below, above = (size, above) if found.kl < target else (below, size)
        size = 2 * below if above == math.inf else (below + above) / 2
    return None


def _texts(
    model: Llama, tokenizer: Tokenizer | None, text: Ids | None, held_out: Ids | None
) -> tuple[Tensor, list[Tensor]]:
    """Rows to train on, (N, T), and texts to hold out; see `heal`."""
    length = min(LENGTH, model.config.max_seq_len)
    enough = text is not None and (held_out is not None or tokenizer is not None)
    written = [] if enough else [*samples(model, length)]
    if held_out is not None:
        held = _split(model, held_out)
    else:
        held = written[:HELD_OUT] if tokenizer is None else held_out_texts(tokenizer, length)
    if text is not None:
        texts = _split(model, text)
    else:
        texts = written[HELD_OUT:] + ([] if tokenizer is None else [training_text(tokenizer)])
    return rows_of(texts, min(length, max(map(len, texts)))), held


def _split(model: Llama, ids: Ids) -> list[Tensor]:
    return [tokens[real].cpu() for tokens, real in zip(*as_texts(model, ids), strict=True)]


def _check_fits(run: Distillation, student: Llama) -> None:
    """Checks that weights, gradients, AdamW's two moments, the rounded copy and a step's values fit in memory."""
    config, size = run.model.config, run.model.dtype.itemsize
    n_trained = sum(p.numel() for p in trained(student).values())
    values = 16 * config.dim + 8 * config.hidden_dim  # that a layer keeps of each token for its gradient
    step = BATCH * run.rows.shape[1] * values * (len(run.model.layers) - max(run.first, 0))
    rounded = 2 * sum(p.numel() for p in run.model.parameters())
    need = size * (3 * n_trained + step + 6 * LOGITS_AT_ONCE * config.vocab_size) + rounded
    available = available_memory(run.model.device)
    if available is not None and need > available:
        raise CapacityError(
            f"the training needs {format_bytes(need)} beside the model, to train {n_trained:,} parameters from layer "
            f"{max(run.first, 0)} on, but {run.model.device} has {format_bytes(available)} available: change norms of "
            "later layers, or take a smaller model"
        )
