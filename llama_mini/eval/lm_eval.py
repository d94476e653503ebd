"""The model `llama_mini` for EleutherAI's lm-eval: python -m llama_mini.eval --model llama_mini --model_args ...

Requests are tokenized by the rules of lm-eval's own `hf` model, so that both report the same figures.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from llama_mini.engine.llm import LLM
from llama_mini.engine.logprobs import predictions, token_logprobs
from llama_mini.engine.prefix_cache import common_prefix_length
from llama_mini.engine.runner import MAX_ROWS
from llama_mini.engine.sampling_params import SamplingParams
from llama_mini.errors import NumericalError, RequestError
from llama_mini.lab.edits_file import edited_by
from llama_mini.memory import check_cache_fits
from llama_mini.validate import check_whole, join_names, short_repr

DEFAULT_NEW_TOKENS = 256  # as lm-eval's hf model
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
Encoded = tuple[Any, list[int], list[int]]  # lm-eval's key of the request, context, continuation


@register_model("llama_mini")
class LlamaMiniLM(TemplateLM):
    """lm-eval's three request types, run by an LLM.

    Args:
        pretrained, dtype, device, quantize, kernels, threads: as for `LLM`; `cuda` means `cpu` if there is no GPU.
        batch_size: number of answers to generate at once, or `auto`; it does not change their text.
        max_length: tokens per window; default: the model's context.
        add_bos_token: False adds no tokens around a text; True and None add those of the checkpoint's rule.
        edit: a JSON file of edits of norms, as for `--edit`.
        prefix_token_id: the token that replaces an empty context; default: BOS, or else the end-of-text token.
    """

    def __init__(
        self,
        pretrained: str,
        dtype: str = "auto",
        device: str = "cpu",
        quantize: str | None = "auto",
        kernels: str = "auto",
        threads: int | None = None,
        batch_size: int | str = 1,
        max_length: int | None = None,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        edit: str | None = None,
    ) -> None:
        super().__init__()
        self.batch_size = _batch_size(batch_size)
        self.pretrained = str(pretrained)
        if str(device).startswith("cuda") and not torch.cuda.is_available():
            device = "cpu"  # lm-eval's command passes cuda:0 by default
        self.llm = LLM(self.pretrained, dtype, device, quantize, kernels, threads)
        self._edits = ExitStack()  # which this object keeps open
        self._edits.enter_context(edited_by(self.llm, edit))
        limit = self.llm.config.max_seq_len
        self.max_length = limit if max_length is None else max_length
        check_whole("max_length", self.max_length, RequestError, 2, limit, ", the model's context")
        self.add_bos_token = add_bos_token
        self._prefix_token_id = prefix_token_id
        self._device = self.llm.model.device

    @property
    def eot_token_id(self) -> int:
        tokenizer = self.llm.tokenizer
        if not tokenizer.eos_ids:
            raise RequestError("the checkpoint names no end-of-text token: give prefix_token_id")
        return min(tokenizer.eos_ids) if tokenizer.eos_id is None else tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        if self._prefix_token_id is not None:
            return self._prefix_token_id
        bos = self.llm.tokenizer.bos_id
        return self.eot_token_id if bos is None else bos

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Ids of a text. Control tokens spelled out in it become control tokens: a rendered chat arrives as text."""
        if add_special_tokens is None:
            add_special_tokens = self.add_bos_token
            if string.startswith(self._text_of(self.prefix_token_id)):
                add_special_tokens = False
        return self.llm.tokenizer.encode(string, add_special_tokens is not False, parse_special=True)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of each text, in windows of the whole context; the first starts with the prefix token."""
        windows: list[Encoded] = []
        for text_index, (text,) in enumerate(request.args for request in requests):
            ids = self.tok_encode(text)
            for pair in get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1):
                windows.append((text_index, *make_disjoint_window(pair)))
        totals = [0.0] * len(requests)
        scores = self._loglikelihood_tokens(windows, disable_tqdm)
        for (text_index, *_), (logprob, _) in zip(windows, scores, strict=True):
            totals[text_index] += logprob
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _loglikelihood_tokens(
        self, requests: list[Encoded], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """The log-likelihood of each continuation, and whether greedy decoding produces it.

        Requests are sorted by their tokens, so that a prefix shared by several of them runs once.
        """
        windows = [self._window(context, continuation) for _, context, continuation in requests]
        order = sorted(range(len(requests)), key=windows.__getitem__)
        results: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        longest = max(map(len, windows), default=2) - 1  # the last token is not fed to the model
        model = self.llm.model
        check_cache_fits(self.llm.config, 1, model.dtype, longest, longest, model.device)
        with self.llm.exclusive():
            cache = model.new_cache(1, longest)
            cached_ids: list[int] = []
            for index in tqdm(order, "loglikelihood", unit="request", disable=disable_tqdm or None):
                key, _, continuation = requests[index]
                ids = windows[index]
                first = len(ids) - len(continuation)
                n_shared = min(common_prefix_length(cached_ids, ids), first - 1)
                cache.truncate(0, n_shared)
                cached_ids = ids[:-1]
                results[index] = _judge(predictions(model, ids[n_shared:], first - n_shared, cache))
                if isinstance(key, tuple):
                    self.cache_hook.add_partial("loglikelihood", key, results[index])
        return results

    def _window(self, context: list[int], continuation: list[int]) -> list[int]:
        """Context and continuation, cut on the left to max_length tokens and one more, which is only predicted."""
        if not continuation or len(continuation) > self.max_length:
            raise RequestError(f"a continuation must have 1 to {self.max_length} tokens, not {len(continuation)}")
        return (context + continuation)[-(self.max_length + 1) :]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The answer to each context, up to the first of its `until` strings or the end of the text."""
        texts: list[str] = []
        with tqdm(desc="generate_until", total=len(requests), unit="request", disable=disable_tqdm or None) as bar:
            for start in range(0, len(requests), self.batch_size):
                batch = requests[start : start + self.batch_size]
                params = [self._params(request.args[1]) for request in batch]
                prompts = [self._prompt(request.args[0], each) for request, each in zip(batch, params, strict=True)]
                for request, completion in zip(batch, self.llm.generate(prompts, params), strict=True):
                    if completion.error is not None:
                        raise NumericalError(completion.error)
                    texts.append(completion.text)
                    self.cache_hook.add_partial("generate_until", request.args, completion.text)
                bar.update(len(batch))
        return texts

    def _prompt(self, context: str, params: SamplingParams) -> list[int]:
        """The ids of a context, cut on the left so that the new tokens fit."""
        assert params.max_tokens is not None
        n_context = self.max_length - params.max_tokens
        if n_context < 1:
            raise RequestError(f"max_gen_toks, {params.max_tokens}, must be less than the context of {self.max_length}")
        return self.tok_encode(context)[-n_context:]

    def _params(self, settings: dict[str, Any]) -> SamplingParams:
        """lm-eval's generation settings as parameters. The seed comes from torch's generator, which lm-eval seeds."""
        kwargs: dict[str, Any] = dict(normalize_gen_kwargs(settings, DEFAULT_NEW_TOKENS))
        stop = handle_stop_sequences(kwargs.pop("until"), eos=self._text_of(self.eot_token_id))
        max_tokens, sampled = kwargs.pop("max_gen_toks"), kwargs.pop("do_sample")
        if unknown := kwargs.keys() - set(SAMPLING):
            raise RequestError(f"unknown settings {join_names(sorted(unknown))}; known: {join_names(SAMPLING)}")
        seed = int(torch.randint(2**31, ())) if sampled else None
        return SamplingParams(**kwargs, max_tokens=max_tokens, stop=[text for text in stop if text], seed=seed)

    def apply_chat_template(self, chat_history: Sequence[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A chat as text, by the checkpoint's template; without the generation prompt it ends in the last message."""
        tokenizer = self.llm.tokenizer
        ids = tokenizer.apply_chat_template(chat_history, continue_final_message=not add_generation_prompt)
        return tokenizer.decode(ids, skip_special_tokens=False)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template, which lm-eval records. Choosing one of several by name is not supported."""
        if isinstance(chat_template, str):
            raise RequestError(f"unknown chat template {short_repr(chat_template)}: give --apply_chat_template alone")
        return self.llm.tokenizer.chat_template or "" if chat_template else None

    @property
    def tokenizer_name(self) -> str:
        return self.pretrained.replace("/", "__")

    def _text_of(self, token_id: int) -> str:
        return self.llm.tokenizer.decode([token_id], skip_special_tokens=False)


def _batch_size(value: int | str) -> int:
    if str(value) == "auto":
        return MAX_ROWS
    if not str(value).isdecimal() or int(value) < 1:
        raise RequestError(f"batch_size must be auto or a whole number of at least 1, not {short_repr(value)}")
    return int(value)


def _judge(pairs: Iterator[tuple[torch.Tensor, torch.Tensor]]) -> tuple[float, bool]:
    """The summed log-probability of a continuation, and whether each of its tokens is the likeliest."""
    total, greedy = 0.0, True
    for logits, tokens in pairs:
        total += float(token_logprobs(logits, tokens).double().sum())
        greedy = greedy and bool((logits.argmax(-1) == tokens).all())
    return total, greedy
