"""What predict, init, sweep and race share: plans as arguments, results as JSON, and the progress bar."""

import json
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from llama_mini.checkpoint.io.files import decode_json, read_json
from llama_mini.errors import ConfigError, RequestError
from llama_mini.lab.table import finite
from llama_mini.model.norm_plan import NormPlan
from llama_mini.validate import check_whole, short_repr

Plan = NormPlan | str  # the name of a preset, JSON, or a .json file
Floats = NDArray[np.float64]
DEEPEST, MOST_SEEDS = 1000, 1000

progress = partial(tqdm, delay=1, leave=False, disable=None)  # shown on a terminal only, after a second


def as_plan(plan: Plan, depth: int) -> NormPlan:
    """The plan for a model of `depth` layers. Raises RequestError, ConfigError or CheckpointError."""
    check_whole("depth", depth, RequestError, 1, DEEPEST)
    plan = _read(plan)
    parsed = NormPlan.parse(plan, depth) if isinstance(plan, str) else plan
    parsed.check_depth(depth)
    return parsed


def as_plans(plans: Plan | Sequence[Plan], depths: Sequence[int]) -> dict[Plan, Plan]:
    """Plans without repeats, by what the caller gave, each read once and checked at every depth before the work."""
    given = [plans] if isinstance(plans, NormPlan | str) else list(plans)
    if not given:
        raise RequestError("the list of plans is empty: give at least one, such as 'pre'")
    read = [_read(plan) for plan in given]
    for plan in read:
        for depth in depths:
            as_plan(plan, depth)
    return dict(zip(given, read, strict=True))


def _read(plan: Plan) -> Plan:
    """JSON as `NormPlan.to_dict` gives it, in a text or a file, as a plan. The name of a preset stays: what it stands
    for depends on the depth."""
    if isinstance(plan, NormPlan):
        return plan
    if not isinstance(plan, str):
        raise RequestError(f"a plan must be a NormPlan or the text of one, such as 'out+qk', not {short_repr(plan)}")
    try:
        if plan.endswith(".json"):
            return NormPlan.from_dict(read_json(Path(plan)))
        return NormPlan.from_dict(decode_json(plan)) if plan.lstrip().startswith("{") else plan
    except (ValueError, ConfigError) as error:
        name = plan if plan.endswith(".json") else f"the plan {short_repr(plan)}"
        raise RequestError(f"{name}: {error}") from None


def label(plan: Plan) -> str:
    return plan if isinstance(plan, str) else json.dumps(plan.to_dict())


def as_json(result: Any) -> str:
    """A dataclass of arrays as a JSON object. A plan as a key is its text; a number that is not finite is null."""
    return json.dumps(_plain(result), indent=2)


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, dict):
        return {label(key): _plain(v) for key, v in value.items()}
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return finite(value)
