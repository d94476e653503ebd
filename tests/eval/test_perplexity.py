"""Perplexity against transformers' sliding windows, and the comparison against float64 NumPy."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from llama_mini import LLM
from llama_mini.errors import NumericalError, RequestError
from llama_mini.eval.perplexity import compare, perplexity, windows

TEXT = (Path(__file__).parents[1] / "golden" / "alice.txt").read_text(encoding="utf-8")[:3000]


@pytest.fixture(scope="module")
def tiny(tiny_dir: Path) -> LLM:
    return LLM(tiny_dir, dtype="float32", kernels="off")


@pytest.fixture(scope="module")
def theirs(tiny_dir: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_dir, dtype=torch.float32)


def transformers_nll(model: Any, ids: list[int], context: int, stride: int) -> tuple[float, int]:
    """Mean NLL and tokens by the loop of transformers' guide to perplexity, its losses weighted by what they average.

    (The guide takes one token too few off the weight of every window whose first token is no label.)
    """
    total, n_tokens, done = 0.0, 0, 0
    for begin in range(0, len(ids), stride):
        end = min(begin + context, len(ids))
        tokens = torch.tensor([ids[begin:end]])
        labels = tokens.clone()
        labels[:, : -(end - done)] = -100
        if n := int((labels[:, 1:] != -100).sum()):
            with torch.no_grad():
                total += float(model(tokens, labels=labels).loss) * n
            n_tokens += n
        done = end
        if end == len(ids):
            break
    return total / n_tokens, n_tokens


LONG, SHORT = (700, 513, 65, 2), (65, 2)


@pytest.mark.parametrize(
    ("context", "stride", "lengths"),
    [
        (512, 512, LONG),
        (512, 100, LONG),
        (64, 64, LONG),
        (64, 63, LONG),
        (64, 32, LONG),
        (100, 7, (400, *SHORT)),
        (2, 1, SHORT),
        (2, 2, SHORT),
        (300, 299, LONG),
    ],
)
def test_transformers_windows_on_a_random_model(
    tiny: LLM, theirs: Any, context: int, stride: int, lengths: tuple[int, ...]
) -> None:
    for length in lengths:
        ids = tiny.tokenizer.encode(TEXT)[:length]
        ours = perplexity(tiny, ids, context, stride)
        nll, n_tokens = transformers_nll(theirs, ids, context, stride)
        assert ours.tokens == n_tokens
        assert ours.nll == pytest.approx(nll, abs=1e-4)
        assert ours.perplexity == pytest.approx(math.exp(nll), rel=1e-4)


@pytest.mark.slow
def test_transformers_windows_on_the_default_checkpoint(smollm2_dir: Path) -> None:
    llm = LLM(smollm2_dir, dtype="float32")
    model = AutoModelForCausalLM.from_pretrained(smollm2_dir, dtype=torch.float32)
    ids = llm.tokenizer.encode(TEXT)[:300]
    for context, stride in ((128, 128), (128, 50), (400, 400)):
        found = perplexity(llm, ids, context, stride)
        nll, n_tokens = transformers_nll(model, ids, context, stride)
        assert found.tokens == n_tokens
        assert found.nll == pytest.approx(nll, abs=1e-4)


def test_without_windows_it_is_what_score_gives(tiny: LLM) -> None:
    ids = tiny.tokenizer.encode(TEXT)[:400]
    found = perplexity(tiny, ids)
    scores = tiny.score(ids)[1:]
    assert (found.context, found.stride, found.bos, found.tokens) == (512, 512, None, 399)
    assert found.nll == pytest.approx(-sum(scores) / 399, abs=1e-5)
    assert found.bits_per_byte == pytest.approx(found.nll / math.log(2), abs=1e-6)  # a token of it is a byte


def test_chunks_change_nothing(tiny: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = tiny.tokenizer.encode(TEXT)[:330]
    whole = perplexity(tiny, ids, context=200, stride=60)
    monkeypatch.setattr("llama_mini.engine.logprobs.PREFILL_CHUNK", 50)
    monkeypatch.setattr("llama_mini.engine.logprobs.LOGITS_AT_ONCE", 8)
    cut = perplexity(tiny, ids, context=200, stride=60)
    assert cut.tokens == whole.tokens
    assert cut.nll == pytest.approx(whole.nll, abs=1e-6)


def test_bos_before_each_window_takes_one_of_its_places(tiny: LLM) -> None:
    ids = tiny.tokenizer.encode(TEXT, add_special_tokens=False)[:50]
    found = perplexity(tiny, ids, context=21, bos=256)
    scores = [tiny.score([256, *ids[start : start + 20]])[1:] for start in (0, 20, 40)]
    assert (found.tokens, found.stride, found.bos) == (50, 20, 256)
    assert found.nll == pytest.approx(-sum(map(sum, scores)) / 50, abs=1e-5)


def test_texts_share_no_window(tiny: LLM) -> None:
    one, other = tiny.tokenizer.encode(TEXT[:90]), tiny.tokenizer.encode(TEXT[90:130])
    found = perplexity(tiny, [one, other], context=64, stride=20)
    parts = [perplexity(tiny, ids, context=64, stride=20) for ids in (one, other)]
    assert found.tokens == sum(part.tokens for part in parts)
    assert found.nll * found.tokens == pytest.approx(sum(part.nll * part.tokens for part in parts), abs=1e-3)


def test_ids_and_numbers_of_numpy_and_torch(tiny: LLM) -> None:
    ids = [[256, 5, 9, 100], [256, 7, 7, 30]]
    expected = perplexity(tiny, ids, context=4, stride=2, bos=256)
    for given in (np.array(ids), torch.tensor(ids), map(torch.tensor, ids)):
        assert perplexity(tiny, given, context=np.int64(4), stride=np.int32(2), bos=torch.tensor(256)) == expected
    assert perplexity(tiny, torch.tensor(ids[0])) == perplexity(tiny, ids[0])


def test_every_token_is_scored_once() -> None:
    for context, stride, first in [(8, 8, 1), (8, 3, 1), (8, 8, 0), (8, 1, 0), (2, 1, 1)]:
        for length in range(2, 40):
            scored = [i for _, end, scored in windows(length, context, stride, first) for i in range(scored, end)]
            unseen = set(range(0, length, stride)) if stride == context and first else set()
            assert scored == [i for i in range(length) if i not in ({0} if first else set()) | unseen]


def test_compared_against_float64(tiny: LLM, tiny_dir: Path) -> None:
    ids = tiny.tokenizer.encode(TEXT)[:400]
    coded = LLM(tiny_dir, dtype="float32", quantize="int8")
    found = compare(coded, tiny, ids)
    tokens = torch.tensor([ids])
    p, q = (
        llm.model(tokens, llm.model.new_cache(1, 400))[0, :-1].double().log_softmax(-1).numpy() for llm in (tiny, coded)
    )
    kl = (np.exp(p) * (p - q)).sum(-1)
    at = np.array(ids[1:])[:, None]
    moved = np.take_along_axis(p - q, at, -1)[:, 0]
    assert found.kl_mean == pytest.approx(kl.mean(), rel=1e-3)
    assert found.kl_mean > 1e-6
    assert found.kl_median == pytest.approx(np.median(kl), rel=1e-3)
    assert found.kl_99 == pytest.approx(np.quantile(kl, 0.99), rel=1e-3)
    assert found.kl_max == pytest.approx(kl.max(), rel=1e-3)
    assert found.top1 == pytest.approx((p.argmax(-1) == q.argmax(-1)).mean(), abs=1e-9)
    assert found.nll_difference == pytest.approx(moved.mean(), abs=1e-6)
    assert found.nll_error == pytest.approx(moved.std(ddof=1) / math.sqrt(399), rel=1e-3)
    assert found.reference == perplexity(tiny, ids)
    assert found.model == perplexity(coded, ids)


def test_a_model_is_at_no_distance_from_itself(tiny: LLM, tiny_dir: Path) -> None:
    found = compare(LLM(tiny_dir, dtype="float32", kernels="off"), tiny, tiny.tokenizer.encode(TEXT)[:300], stride=100)
    assert (found.kl_max, found.top1, found.nll_difference, found.nll_error) == (0, 1, 0, 0)


def test_other_vocabularies_are_refused(tiny: LLM, tiny_dir: Path, tmp_path: Path) -> None:
    other = shutil.copytree(tiny_dir, tmp_path / "other")
    vocabulary = json.loads((other / "tokenizer.json").read_text(encoding="utf-8"))
    words = vocabulary["model"]["vocab"]
    words["A"], words["B"] = words["B"], words["A"]
    (other / "tokenizer.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    with pytest.raises(RequestError, match="the tokenizers differ: token"):
        compare(tiny, LLM(other, dtype="float32", kernels="off"), [1, 2, 3])


@pytest.mark.parametrize(
    ("ids", "options", "message"),
    [
        ([5], {}, "the text has 1 tokens; at least 2"),
        ([], {}, "the text has 0 tokens"),
        ([[1, 2], [3]], {}, "the text has 1 tokens"),
        ([1, 260], {}, "token id 260 is outside the vocabulary of 260"),
        ([1, 2], {"bos": -1}, "token id -1 is outside"),
        ("text", {}, "a text is a list of token ids"),
        (None, {}, "not None"),
        ([1.0, 2.0], {}, "not 1.0"),
        ([1, 2], {"context": 513}, "context must be a whole number from 2 to 512, the model's context, not 513"),
        ([1, 2], {"context": 1}, "context must be a whole number from 2"),
        ([1, 2], {"stride": 0}, "stride must be a whole number from 1 to 512, the context of 512, not 0"),
        ([1, 2], {"context": 10, "stride": 11}, "stride must be a whole number from 1 to 10"),
        ([1, 2], {"context": 10, "stride": 10, "bos": 256}, "from 1 to 9, the context of 10 less BOS, not 10"),
    ],
    ids=str,
)
def test_a_wrong_request_is_one_sentence(tiny: LLM, ids: object, options: dict[str, int], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        perplexity(tiny, ids, **options)


def test_numbers_that_fail_are_an_error(tiny_dir: Path) -> None:
    llm = LLM(tiny_dir, dtype="float32", kernels="off")
    llm.model.norm.weight.data[3] = math.nan
    with pytest.raises(NumericalError, match="NaN or infinity"):
        perplexity(llm, [1, 2, 3])
    llm.model.norm.weight.data[3] = 1
    assert perplexity(llm, [1, 2, 3]).tokens == 2  # it is free again
