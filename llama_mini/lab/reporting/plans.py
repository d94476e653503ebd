"""The sections of the report that need no weights: the plan at random init, and a race of plans."""

import shlex

from llama_mini.errors import ConfigError, RequestError
from llama_mini.lab.measurement import init
from llama_mini.lab.reporting import plan_figures
from llama_mini.lab.reporting.page import COMMAND, folded, paragraph, picture, section, table
from llama_mini.lab.reporting.style import svg
from llama_mini.lab.study import label
from llama_mini.lab.theory import Profile, predict
from llama_mini.lab.training import Race
from llama_mini.model.llama import Llama
from llama_mini.model.norm_plan import NormPlan
from llama_mini.validate import join_names

_DIM, _SEEDS = 256, 3  # of the random models


def init_section(model: Llama) -> str:
    plan, depth = model.config.norm_plan, model.config.n_layers
    title = "Theory against measurement, at random init"
    try:
        predicted = predict(plan, depth)
    except RequestError as error:
        return section(title, paragraph(f"There is no prediction: {error}."))
    measured = init(plan, depth, dim=_DIM, seeds=_SEEDS)
    off = measured.deviation(predicted)
    seen = (
        f"{depth} random layers of width {_DIM} with this model's plan: what theory says without a model (line) and "
        f"what {_SEEDS} models give (marks). Largest deviation: {_off(off['second_moment'])} in the second moment, "
        f"{_off(off['gradient'])} in the gradient, {_off(off['angle'])} in the angle."
    )
    command = f"lab.predict(plan, {depth}), lab.init(plan, {depth}, dim={_DIM}, seeds={_SEEDS})"
    if (name := _preset(model)) is not None:
        size = f"--depth {depth} --dim {_DIM} --seeds {_SEEDS}"
        command = f"{COMMAND} init {shlex.quote(name)} {size} --picture init.svg"
    drawn = svg(plan_figures.init_picture(predicted, measured), "init")
    return section(
        title, picture(drawn, seen, command, "Prediction and measurement by layer"), _ends(predicted, measured)
    )


def _preset(model: Llama) -> str | None:
    """The plan as a word of the command line, if it has one."""
    name = model.config.norm_plan.name(model.config.n_layers)
    try:
        NormPlan.parse(name, model.config.n_layers)
    except ConfigError:
        return None
    return name


def _ends(predicted: Profile, measured: Profile) -> str:
    lines = zip(predicted.table(), measured.table(), strict=True)
    rows = [
        {f"{name} {who}": getattr(row, name) for name in ("second_moment", "gradient", "angle") for who, row in pair}
        for pair in ((("predicted", a), ("measured", b)) for a, b in lines)
    ]
    return folded("The numbers", table([{"layer": i} | row for i, row in enumerate(rows)]))


def race_section(race: Race, from_shell: bool) -> str:
    """from_shell: the race has the sizes of the command line, so that a command trains it again."""
    seeds, steps = next(iter(race.loss.values())).shape
    best = min(race.table(), key=lambda row: row.final if row.final == row.final else float("inf"))
    seen = (
        f"{len(race.loss)} plans, {seeds} seeds, {steps} steps from random init without warm-up; band: all "
        f"seeds. Lowest at the end is {best.plan:.60}, {best.final:.3g} nats per byte; dotted is the entropy of the "
        "text's bytes."
    )
    diverged = [row.plan for row in race.table() if row.diverged]
    seen += f" {join_names(diverged)} diverged in a seed or more, where the line ends." if diverged else ""
    plans = shlex.join(label(plan) for plan in race.loss)
    command = f"{COMMAND} race {plans} --steps {steps} --picture race.svg" if from_shell else "lab.race(plans)"
    drawn = picture(svg(plan_figures.race_picture(race), "race"), seen, command, "Training loss by step")
    return section("A race of plans", drawn, table(race.table()))


def _off(share: float) -> str:
    return f"{share:.1%}" if share == share else "not finite"
