"""SamplingParams: how one request samples and when it stops. The constructor checks every value."""

import math
import secrets
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import cached_property, wraps
from typing import Any

import torch
from torch import Tensor

from llama_mini.engine.structured import STRUCTURES, checked_structure, of_response_format
from llama_mini.errors import RequestError, errors_about, warn
from llama_mini.validate import (
    as_plain,
    check_flag,
    check_number,
    check_token_ids,
    check_whole,
    is_finite,
    is_token,
    is_whole,
    short_repr,
)

LogitsProcessor = Callable[[list[int], Tensor], Tensor]

MAX_BIAS = 1e30  # larger than any logit, and the sum of both is finite in float32
MAX_SEQUENCES = 16384  # vLLM's limit: all answers to a prompt are held in memory before the first one runs
MINUS_ONE_IS_UNSET = ("top_k", "seed", "max_tokens")  # as vLLM, llama.cpp and LM Studio write it

_OTHER_NAMES = {  # in transformers, OpenAI, llama.cpp, Ollama, lm-eval and Meta's llama3
    "max_tokens": "max_new_tokens max_completion_tokens n_predict num_predict max_gen_toks max_gen_len",
    "min_tokens": "min_new_tokens",
    "temperature": "temp",
    "seed": "random_seed",
    "repetition_penalty": "repeat_penalty",
    "n": "num_return_sequences",
    "stop_token_ids": "eos_token_id",
    "stop": "stop_strings stop_sequences until",
    "top_logprobs": "logprobs",
}
ALIASES = {alias: field for field, aliases in _OTHER_NAMES.items() for alias in aliases.split()}
_CONVERTED = ("do_sample", "response_format")
ELSEWHERE = {  # settings of others that have no field here -> what to do
    "max_length": "give max_tokens, which counts new tokens alone",
    "min_length": "give min_tokens, which counts new tokens alone",
    "stream": "call llm.stream",
    "num_beams": "there is no beam search; give n for several answers",
}


def sampling_params(base: "SamplingParams | Mapping[str, Any] | None" = None, /, **keywords: Any) -> "SamplingParams":
    """`base`, or the defaults, with the settings that keywords give; None is "not given", so that base's value stays.

    The names of ALIASES work as well, `do_sample`: False is temperature 0; True keeps a temperature, else it is 1; and
    OpenAI's `response_format`, which becomes `json_schema`.

    Raises RequestError for an unknown name, with the nearest one, and for one setting with two values.
    """
    if base is None or isinstance(base, Mapping):
        base = SamplingParams(**{str(name): value for name, value in (base or {}).items()})
    if not isinstance(base, SamplingParams):
        raise RequestError(f"params must be SamplingParams or a dict of its settings, not {short_repr(base)}")
    return replace(base, **_settings(keywords, base.temperature)) if keywords else base


def is_setting(name: str) -> bool:
    """Whether a keyword belongs to the sampling rather than to a chat template."""
    return name in SamplingParams.__dataclass_fields__ or name in {*ALIASES, *ELSEWHERE, *_CONVERTED}


def _settings(keywords: Mapping[str, Any], temperature: float = 0.0) -> dict[str, Any]:
    """Keywords as fields of SamplingParams; `temperature` is the one that holds if they name none."""
    settings: dict[str, Any] = {}
    names: dict[str, str] = {}
    for name, value in keywords.items():
        ours, value = ALIASES.get(name, name), as_plain(value)
        if name == "response_format" and value is not None:
            ours, value = "json_schema", of_response_format(value)
        if name == "logprobs" and isinstance(value, bool):
            ours = "token_logprobs"
        if ours not in SamplingParams.__dataclass_fields__ and name not in _CONVERTED:
            near = get_close_matches(name, [*SamplingParams.__dataclass_fields__, *ALIASES, *_CONVERTED], 1)
            known = f"known: {', '.join(SamplingParams.__dataclass_fields__)}"
            advice = ELSEWHERE.get(name, f"did you mean {near[0]}?" if near else known)
            raise RequestError(f"unknown setting {short_repr(name)}; {advice}")
        if value is None:
            continue
        if ours in settings and settings[ours] != value:
            both = f"{short_repr(settings[ours])} and {short_repr(value)}"
            raise RequestError(f"{names[ours]} and {name} are one setting and have two values, {both}: give one")
        settings[ours], names[ours] = value, name
    if keywords.get("eos_token_id") is not None:  # in transformers it replaces the model's own ones
        settings.setdefault("ignore_eos", True)
    if "do_sample" in settings:
        check_flag("do_sample", do_sample := settings.pop("do_sample"), RequestError)
        given = settings.get("temperature")
        if do_sample and given == 0:
            raise RequestError("do_sample=True needs a temperature above 0, not 0: leave one of them out")
        if not do_sample and given:
            warn(f"do_sample=False is greedy: the temperature of {short_repr(given)} has no effect")
        settings["temperature"] = (given or temperature or 1.0) if do_sample else 0.0
    return settings


def _with_aliases(cls: "type[SamplingParams]") -> "type[SamplingParams]":
    """Lets the constructor take the names of ALIASES too; `wraps` keeps its signature for editors and `help`."""
    constructor = cls.__init__

    @wraps(constructor)
    def __init__(self: "SamplingParams", *unnamed: object, **keywords: Any) -> None:
        if unnamed:
            raise RequestError(f"give settings by name, as in temperature=0.7, not {short_repr(unnamed[0])}")
        constructor(self, **_settings(keywords))

    cls.__init__ = __init__  # type: ignore[method-assign]
    return cls


@_with_aliases
@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to sample and when to stop. The default is greedy, to the end of the text or of the context.

    Everything is applied in the order of transformers: logit_bias, repetition_penalty, presence_penalty and
    frequency_penalty, min_tokens, the structure that the answer must have, logits_processors, then temperature, top_k,
    top_p, min_p. Greedy sampling takes the likeliest token after the processors.

    None is "not given", for every setting. The names that transformers, OpenAI, vLLM and llama.cpp have for a setting
    work too: `max_new_tokens`, `stop_strings`, `do_sample` and the others of ALIASES. `eos_token_id` replaces the
    model's end-of-text tokens: it sets `ignore_eos` too.

    Args:
        temperature: divides the logits; 0 is greedy sampling, where top_k, top_p and min_p have no effect.
        top_k: keeps the k likeliest tokens; 0 or -1 keeps all.
        top_p: keeps the likeliest tokens that together reach this probability; 1 keeps all.
        min_p: keeps tokens at least min_p times as likely as the likeliest; 0 keeps all.
        repetition_penalty: for tokens of prompt and answer, divides positive logits and multiplies negative ones.
        presence_penalty: subtracted from the logit of each token that the answer contains; -2 to 2.
        frequency_penalty: subtracted once for each time that the token occurs in the answer; -2 to 2.
        logit_bias: token id -> number to add to its logit; -inf bans the token.
        logits_processors: functions (token_ids, logits) -> logits. The ids include the prompt; the logits are (V,)
            float32, -inf for a banned token.
        n: number of answers to each prompt.
        seed: seeds the random numbers of this request, 64 bits with or without a sign; None or -1 chooses one.
        min_tokens: number of new tokens before which nothing ends the answer but max_time: end-of-text tokens and
            stop_token_ids are banned, and a stop string that is complete by then is text.
        max_tokens: maximum number of new tokens; None or -1: as many as fit in the context.
        max_time: seconds after which the answer is cut off; None means no limit.
        stop: a string, or several, that end the answer. They are not part of it. The text of a control token, such as
            `<|im_end|>`, also ends it at that token.
        stop_token_ids: tokens that end the answer like an end-of-text token.
        ignore_eos: do not stop at end-of-text tokens.
        top_logprobs: number of likeliest tokens to return for each token, with their log-probabilities.
        prompt_logprobs: return the log-probabilities of the prompt's tokens too.
        token_logprobs: return the log-probability of each token; False, or `logprobs=False`, saves some time.
        cache_salt: prompts share keys and values only with those of the same salt. So a user cannot find out, by the
            time that an answer takes, what others have asked.
        json_schema: the answer is JSON that matches this schema, a dict or JSON text; True allows any JSON. A schema
            with keywords that are not supported is refused. At most one of these four can be given:
        regex: the whole answer matches this regular expression, without lookaround and references; \\d is 0 to 9.
        grammar: the answer matches this grammar, in Lark's or in llama.cpp's syntax (GBNF).
        choice: the answer is one of these texts.

    Raises:
        RequestError: names the parameter, its value and the allowed values.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = field(default=None, hash=False)  # a dict has no hash
    logits_processors: Sequence[LogitsProcessor] = ()
    n: int = 1
    seed: int | None = None
    min_tokens: int = 0
    max_tokens: int | None = None
    max_time: float | None = None
    stop: str | Collection[str] = ()
    stop_token_ids: Collection[int] = ()
    ignore_eos: bool = False
    top_logprobs: int = 0
    prompt_logprobs: bool = False
    token_logprobs: bool = True
    cache_salt: str | None = None
    json_schema: str | None = None
    regex: str | None = None
    grammar: str | None = None
    choice: Sequence[str] | None = None

    def __post_init__(self) -> None:
        for name in MINUS_ONE_IS_UNSET:
            if is_whole(getattr(self, name)) and getattr(self, name) == -1:
                object.__setattr__(self, name, getattr(type(self), name))  # the default
        check_number("temperature", self.temperature, RequestError, 0)
        for name in ("top_p", "min_p"):
            check_number(name, getattr(self, name), RequestError, 0, 1)
        check_number("repetition_penalty", self.repetition_penalty, RequestError, above=0)
        for name in ("presence_penalty", "frequency_penalty"):
            check_number(name, getattr(self, name), RequestError, -2, 2)
        for name in ("top_k", "min_tokens"):
            check_whole(name, getattr(self, name), RequestError, 0)
        check_whole("n", self.n, RequestError, 1, MAX_SEQUENCES)
        check_whole("top_logprobs", self.top_logprobs, RequestError, 0)
        for name in ("ignore_eos", "prompt_logprobs", "token_logprobs"):
            check_flag(name, getattr(self, name), RequestError)
        if self.cache_salt is not None and not isinstance(self.cache_salt, str):
            raise RequestError(f"cache_salt must be a text, not {short_repr(self.cache_salt)}")
        if self.seed is not None:
            check_whole("seed", self.seed, RequestError, -(2**63), 2**64 - 1)
        if self.max_time is not None:
            check_number("max_time", self.max_time, RequestError, above=0)
        if self.max_tokens is not None:
            check_whole("max_tokens", self.max_tokens, RequestError)
            if self.min_tokens > self.max_tokens:
                limits = f"{short_repr(self.max_tokens)}, not {short_repr(self.min_tokens)}"
                raise RequestError(f"min_tokens must be at most max_tokens, {limits}")
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        if is_whole(self.stop_token_ids):
            object.__setattr__(self, "stop_token_ids", (self.stop_token_ids,))
        self._to_tuple("stop", lambda text: isinstance(text, str) and text != "", "non-empty strings", unordered=True)
        self._to_tuple("stop_token_ids", is_token, "a list of token ids, whole numbers from 0 up", unordered=True)
        self._to_tuple("logits_processors", callable, "a list of functions (token_ids, logits) -> logits")
        if self.logit_bias is not None:
            object.__setattr__(self, "logit_bias", _checked_biases(self.logit_bias))
        given = [name for name in STRUCTURES if getattr(self, name) is not None]
        if len(given) > 1:
            raise RequestError(f"{given[0]} and {given[1]} both say what the answer may be: give one of them")
        for name in given:
            object.__setattr__(self, name, checked_structure(name, getattr(self, name)))

    def _to_tuple(self, name: str, accept: Callable[[Any], bool], expected: str, unordered: bool = False) -> None:
        values: Any = getattr(self, name)
        as_set = unordered and isinstance(values, set | frozenset)
        if not (as_set or isinstance(values, list | tuple)) or not all(accept(as_plain(value)) for value in values):
            raise RequestError(f"{name} must be {expected}, not {short_repr(values)}")
        plain = map(as_plain, values)
        object.__setattr__(self, name, tuple(sorted(plain) if as_set else plain))  # equal sets make equal params

    def generator(self) -> torch.Generator:
        """A new random generator, seeded with `seed` or at random."""
        return torch.Generator().manual_seed(secrets.randbits(64) if self.seed is None else self.seed % 2**64)

    @cached_property
    def changes_logits(self) -> bool:
        """Whether anything before the temperature changes the logits."""
        used = self.logit_bias, self.presence_penalty, self.frequency_penalty, self.min_tokens, self.logits_processors
        return self.repetition_penalty != 1 or any(used) or self.structure is not None

    @cached_property
    def structure(self) -> tuple[str, Any] | None:
        """The name and the value of the setting that says what the answer may be, if there is one."""
        return next(((name, getattr(self, name)) for name in STRUCTURES if getattr(self, name) is not None), None)


def _checked_biases(biases: Any) -> dict[int, float]:
    if not isinstance(biases, Mapping):
        raise RequestError(f"logit_bias must be a dict of token id to number, not {short_repr(biases)}")
    biases = {as_plain(token): as_plain(bias) for token, bias in biases.items()}
    for token, bias in biases.items():
        if not is_token(token):
            raise RequestError(f"logit_bias must have token ids, whole numbers from 0 up, not {short_repr(token)}")
        bans = isinstance(bias, float) and bias == -math.inf
        if not bans and not (is_finite(bias) and abs(bias) <= MAX_BIAS):
            allowed = f"a number from {-MAX_BIAS:.0e} to {MAX_BIAS:.0e}, or -inf to ban it"
            raise RequestError(f"logit_bias of token {short_repr(token)} must be {allowed}, not {short_repr(bias)}")
    return biases


def check_vocab(params: SamplingParams, vocab_size: int) -> None:
    """Raises RequestError for a token id outside of the model's vocabulary."""
    for name, ids in (("logit_bias", params.logit_bias or ()), ("stop_token_ids", params.stop_token_ids)):
        with errors_about(name):
            check_token_ids(ids, vocab_size, RequestError)
