"""What predict, init, sweep and race share: plans as arguments, results as JSON, and the progress bar."""

import json
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from llama_mini.errors import RequestError
from llama_mini.lab.table import finite
from llama_mini.model.norm_plan import NormPlan
from llama_mini.validate import check_whole, short_repr

Plan = NormPlan | str
Floats = NDArray[np.float64]
DEEPEST, MOST_SEEDS = 1000, 1000

progress = partial(tqdm, delay=1, leave=False, disable=None)  # shown on a terminal only, after a second


def as_plan(plan: Plan, depth: int) -> NormPlan:
    """The plan for a model of `depth` layers. Raises RequestError or ConfigError."""
    check_whole("depth", depth, RequestError, 1, DEEPEST)
    parsed = NormPlan.parse(plan, depth) if isinstance(plan, str) else plan
    if not isinstance(parsed, NormPlan):
        raise RequestError(f"a plan must be a NormPlan or the text of one, such as 'out+qk', not {short_repr(plan)}")
    parsed.check_depth(depth)
    return parsed


def as_plans(plans: Plan | Sequence[Plan], depths: Sequence[int]) -> list[Plan]:
    """A list of plans without repeats, each checked at every depth before the work starts."""
    several = [plans] if isinstance(plans, NormPlan | str) else list(plans)
    if not several:
        raise RequestError("the list of plans is empty: give at least one, such as 'pre'")
    for plan in several:
        for depth in depths:
            as_plan(plan, depth)
    return list(dict.fromkeys(several))


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
