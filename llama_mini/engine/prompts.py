"""The prompts of a call and their parameters, in all the forms that callers have them in."""

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice, repeat, zip_longest
from typing import Any

from llama_mini.engine.sampling_params import SamplingParams, sampling_params
from llama_mini.errors import ContextError, RequestError
from llama_mini.model.config import LlamaConfig
from llama_mini.tokenizer import Tokenizer
from llama_mini.validate import as_plain, check_token_ids, is_whole, short_repr

_EXPECTED = "a prompt is a text or a list of token ids, whole numbers"
_MISSING = object()


def split_prompts(prompts: Any) -> Iterable[Any]:
    """Each prompt of a call, as it was given. A generator stays one, so that its prompts are made when they are needed.

    One prompt: a text, or ids in a list, tuple, range, array or tensor (1-D). Several: any iterable of these, or an
    array or tensor (2-D). Raises RequestError for anything else.
    """
    prompts = as_plain(prompts)
    if isinstance(prompts, str):
        return [prompts]
    no_order = isinstance(prompts, bytes | bytearray | set | frozenset | Mapping)
    if no_order or not isinstance(prompts, Iterable) or is_messages(prompts):
        raise RequestError(f"{_EXPECTED}, or a list of these, not {short_repr(prompts)}{_advice(prompts)}")
    is_one = isinstance(prompts, list | tuple | range) and prompts and all(is_whole(as_plain(i)) for i in prompts)
    return [prompts] if is_one else prompts


def one_prompt(prompt: Any) -> Any:
    """The prompt where only one is possible: a list or a batch of one will do. Raises RequestError for several."""
    prompts = list(islice(split_prompts(prompt), 2))
    if len(prompts) == 2:
        text_or_ids(prompts[0])  # what is wrong with a prompt comes first
        raise RequestError(f"one prompt is expected here, not {short_repr(prompt)}: several are for llm.generate")
    return prompts[0] if prompts else []


def params_argument(params: Any, settings: dict[str, Any]) -> Any:
    """`params`, or the keyword `sampling_params`, its name in vLLM, which is taken out of the settings."""
    if "sampling_params" in settings:
        if params is not None:
            raise RequestError("params and sampling_params are the same argument: give one of them")
        return settings.pop("sampling_params")
    return params


def with_params(prompts: Any, params: Any, settings: dict[str, Any]) -> Iterator[tuple[Any, Any]]:
    """Each prompt of a call with its SamplingParams, or with the RequestError for its wrong ones."""
    if prompts is None:
        prompts = settings.pop("prompt_token_ids", None)  # its name in vLLM
    batch, params = split_prompts(prompts), params_argument(params, settings)
    if isinstance(params, Iterable) and not isinstance(params, Mapping | str):
        return _with_each(batch, params, settings)
    return zip(batch, repeat(sampling_params(params, **settings)), strict=False)


def token_ids(prompt: Any, n_new: int, tokenizer: Tokenizer, config: LlamaConfig) -> list[int]:
    """A prompt as token ids; raises RequestError unless they and `n_new` more tokens fit in the context."""
    given = text_or_ids(prompt)
    ids = tokenizer.encode(given) if isinstance(given, str) else given
    if not ids:
        raise RequestError("the prompt is empty: there is no token to start from")
    check_token_ids(ids, config.vocab_size, RequestError)
    if len(ids) + n_new > (limit := config.max_seq_len):
        raise ContextError(f"{len(ids)} prompt tokens and {n_new} new ones exceed the context of {limit}")
    return ids


def text_or_ids(prompt: Any) -> str | list[int]:
    """One prompt as a text or a list of ids. Raises RequestError for anything else."""
    prompt = as_plain(prompt)
    if isinstance(prompt, list | tuple) and len(prompt) == 1 and isinstance(only := as_plain(prompt[0]), list | tuple):
        prompt = only  # a batch of one, as tokenizers return it
    if isinstance(prompt, str):
        return prompt
    is_list = isinstance(prompt, list | tuple | range)
    if is_list and set(map(type, prompt)) <= {int}:  # the usual case, ten times faster
        return list(prompt)
    ids = [as_plain(i) for i in prompt] if is_list else []
    if wrong := [i for i in ids if not is_whole(i)] if is_list else [prompt]:
        raise RequestError(f"{_EXPECTED}, not {short_repr(wrong[0])}{_advice(prompt)}")
    return ids


def is_messages(prompt: Any) -> bool:
    """Whether a prompt is the messages of a chat: a list of dicts, or of objects, with a role."""
    if not isinstance(prompt, list | tuple) or not prompt:
        return False
    return "role" in prompt[0] if isinstance(prompt[0], Mapping) else hasattr(prompt[0], "role")


def _with_each(batch: Iterable[Any], params: Any, settings: dict[str, Any]) -> Iterator[tuple[Any, Any]]:
    pairs: Iterable[Any] = zip_longest(batch, params, fillvalue=_MISSING)
    for count, (prompt, given) in enumerate(pairs):
        if prompt is _MISSING or given is _MISSING:
            fewer, more = ("params", "prompts") if given is _MISSING else ("prompts", "params")
            raise RequestError(f"there are only {count} {fewer}, but more {more}: give one for each")
        try:
            sampling: SamplingParams | RequestError = sampling_params(given, **settings)
        except RequestError as error:
            sampling = error
        yield prompt, sampling


def _advice(value: Any) -> str:
    """What to do about a value that callers often have in place of a prompt."""
    if is_messages(value) or is_messages([value]):
        return ": llm.chat answers messages"
    if isinstance(value, Mapping):
        return ": give its text or its token ids alone"
    if isinstance(value, bytes | bytearray):
        return ": decode it first"
    return ": a set has no order" if isinstance(value, set | frozenset) else ""
