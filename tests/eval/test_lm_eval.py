"""lm-eval's three request types: the figures of its own `hf` model, on tasks that are made here."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lm_eval", reason="lm-eval is not installed")
pytest.importorskip("accelerate", reason="lm-eval's hf model, which is the oracle, needs accelerate")

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from llama_mini import lab
from llama_mini.errors import RequestError
from llama_mini.eval.lm_eval import LlamaMiniLM

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # warnings of lm-eval and datasets
TEXT = (Path(__file__).parents[1] / "golden" / "alice.txt").read_text(encoding="utf-8")
OFFLINE = {"HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def pair(tiny_dir: Path) -> tuple[LlamaMiniLM, HFLM]:
    return both(tiny_dir)


def both(path: Path, **options: Any) -> tuple[LlamaMiniLM, HFLM]:
    ours = LlamaMiniLM(str(path), dtype="float32", **options)
    return ours, HFLM(str(path), dtype="float32", device="cpu", **options)


def instances(kind: str, *args: tuple[Any, ...]) -> list[Instance]:
    return [Instance(kind, {}, arg, i, metadata=("task", i, 1)) for i, arg in enumerate(args)]


def agree(one: list[Any], other: list[Any]) -> None:
    assert [score[1:] for score in one] == [score[1:] for score in other]
    assert [score[0] for score in one] == pytest.approx([score[0] for score in other], abs=1e-4, rel=1e-5)


PAIRS = [
    ("The Rabbit ", "ran."),
    ("The Rabbit", " ran."),
    ("", "Alice was beginning"),
    ("", "A"),
    ("<|begin_of_text|>Alice", " and"),
    ("a \n ", " b"),
    ("<|im_start|>user\nHi<|im_end|>\n", "Good day<|im_end|>"),
    ("Ünï ", "cödé 🙂"),
    (TEXT[:2000], TEXT[2000:2050]),  # longer than the window
    (TEXT[:400], TEXT[400:912]),  # a continuation as long as the window
    *[(TEXT[:300], choice) for choice in (" one", " two", " three", " o")],
]


@pytest.mark.parametrize(
    "options", [{}, {"max_length": 100}, {"add_bos_token": False}, {"prefix_token_id": 65}], ids=str
)
def test_loglikelihood(tiny_dir: Path, options: dict[str, Any]) -> None:
    ours, theirs = both(tiny_dir, **options)
    pairs = [pair for pair in PAIRS if len(pair[1].encode()) <= ours.max_length]
    for context, continuation in pairs:
        if context:
            assert ours._encode_pair(context, continuation) == theirs._encode_pair(context, continuation)
    requests = instances("loglikelihood", *pairs)
    agree(ours.loglikelihood(requests, disable_tqdm=True), theirs.loglikelihood(requests, disable_tqdm=True))


def test_a_greedy_continuation_is_found(pair: tuple[LlamaMiniLM, HFLM]) -> None:
    ours, theirs = pair
    (text,) = ours.generate_until(instances("generate_until", ("The Rabbit", {"until": [], "max_gen_toks": 1})))
    requests = instances("loglikelihood", ("The Rabbit", text), ("The Rabbit", chr(ord(text[0]) ^ 1)))
    found = ours.loglikelihood(requests, disable_tqdm=True)
    assert [greedy for _, greedy in found] == [True, False]
    agree(found, theirs.loglikelihood(requests, disable_tqdm=True))


@pytest.mark.parametrize("max_length", [None, 64])
def test_rolling_windows(tiny_dir: Path, max_length: int | None) -> None:
    ours, theirs = both(tiny_dir, max_length=max_length)
    requests = instances("loglikelihood_rolling", (TEXT[:700],), ("A",), (TEXT[5:68],), (TEXT[:64],), (TEXT[:65],))
    expected = theirs.loglikelihood_rolling(requests, disable_tqdm=True)
    found = ours.loglikelihood_rolling(requests, disable_tqdm=True)
    assert found == pytest.approx(expected, abs=1e-4, rel=1e-6)


@pytest.mark.parametrize("batch_size", [1, 3, "auto"])
def test_generate_until(tiny_dir: Path, batch_size: int | str) -> None:
    ours = LlamaMiniLM(str(tiny_dir), dtype="float32", batch_size=batch_size)
    theirs = HFLM(str(tiny_dir), dtype="float32", device="cpu")
    free = {"until": [], "max_gen_toks": 40, "do_sample": False}
    (sample,) = theirs.generate_until(instances("generate_until", ("Alice", free)), disable_tqdm=True)
    requests = instances(
        "generate_until",
        *[(text, free) for text in ("Alice", "The Rabbit ", "<|im_start|>user\nHi<|im_end|>\n", TEXT[:1500])],
        ("Alice", free | {"until": [sample[9:11]]}),
        ("Alice", free | {"until": sample[5]}),
        ("Alice", free | {"until": ["never", sample[20:23], sample[12]], "temperature": 0.0}),
        ("Alice", {"max_new_tokens": 7}),
    )
    found = ours.generate_until(requests, disable_tqdm=True)
    assert found == theirs.generate_until(requests, disable_tqdm=True)
    assert len(set(found)) >= 6


def test_a_repetition_penalty_is_transformers_own(pair: tuple[LlamaMiniLM, HFLM]) -> None:
    requests = instances("generate_until", ("Alice", {"max_gen_toks": 40, "repetition_penalty": 1.4}))
    texts = [lm.generate_until(requests, disable_tqdm=True) for lm in pair]
    assert texts[0] == texts[1]


def test_sampling_follows_torchs_seed(pair: tuple[LlamaMiniLM, HFLM]) -> None:
    settings = {"do_sample": True, "temperature": 1.0, "top_p": 0.9, "top_k": 50, "max_gen_toks": 20}
    texts = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        texts += pair[0].generate_until(instances("generate_until", ("Alice", settings)), disable_tqdm=True)
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize("prompt", [True, False])
def test_a_chat_template_gives_the_same_ids(pair: tuple[LlamaMiniLM, HFLM], prompt: bool) -> None:
    ours, theirs = pair
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": " Who are you? "}]
    chat += [] if prompt else [{"role": "assistant", "content": "I am"}]
    text, expected = (lm.apply_chat_template(chat, add_generation_prompt=prompt) for lm in pair)
    assert text == expected
    assert ours.tok_encode(text) == theirs.tok_encode(text) == ours.tok_encode(expected)
    assert ours.chat_template(True) == theirs.chat_template(True)
    assert ours.tokenizer_name == theirs.tokenizer_name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": "many"}, "batch_size must be auto or a whole number"),
        ({"batch_size": 0}, "batch_size must be auto"),
        ({"max_length": 513}, "max_length must be a whole number from 2 to 512, the model's context, not 513"),
        ({"dtype": "float7"}, "unknown dtype"),
    ],
    ids=str,
)
def test_a_wrong_option_is_one_sentence(tiny_dir: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        LlamaMiniLM(str(tiny_dir), **options)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_beams": 4}, "unknown settings num_beams"),
        ({"max_gen_toks": 512}, "max_gen_toks, 512, must be less than the context of 512"),
    ],
    ids=str,
)
def test_a_wrong_request_is_one_sentence(
    pair: tuple[LlamaMiniLM, HFLM], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        pair[0].generate_until(instances("generate_until", ("Alice", settings)), disable_tqdm=True)
    with pytest.raises(RequestError, match="a continuation must have 1 to 512 tokens, not 0"):
        pair[0].loglikelihood(instances("loglikelihood", ("Alice", "")), disable_tqdm=True)


TASKS: dict[str, dict[str, Any]] = {
    "tiny_choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "tiny_rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{question}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    },
    "tiny_answer": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{choices[answer]}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 12},
        "metric_list": [{"metric": "exact_match"}],
    },
}


@pytest.fixture(scope="module")
def task_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    questions = [TEXT[start : start + 150] for start in range(0, 900, 150)]
    docs = [{"question": q, "choices": ["yes", "no", "perhaps"], "answer": i % 3} for i, q in enumerate(questions)]
    (folder / "docs.jsonl").write_text("\n".join(map(json.dumps, docs)), encoding="utf-8")
    data = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "docs.jsonl")}, "cache_dir": str(folder / "cache")},
        "test_split": "test",
    }
    for name, task in TASKS.items():
        (folder / f"{name}.yaml").write_text(json.dumps({"task": name} | data | task), encoding="utf-8")
    return folder


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("few", [0, 2])
def test_tasks(task_dir: Path, tiny_dir: Path, monkeypatch: pytest.MonkeyPatch, chat: bool, few: int) -> None:
    for name, value in OFFLINE.items():
        monkeypatch.setenv(name, value)
    names = [name for name in TASKS if name != "tiny_rolling" or not (chat or few)]

    def outcome(model: str) -> tuple[dict[str, Any], list[Any]]:
        found = simple_evaluate(
            model=model,
            model_args={"pretrained": str(tiny_dir), "dtype": "float32"},
            device="cpu",
            tasks=names,
            num_fewshot=few,
            apply_chat_template=chat,
            task_manager=TaskManager(include_path=str(task_dir), include_defaults=False),
            bootstrap_iters=0,
        )
        answers = [sample["resps"] for name in names for sample in found["samples"][name]]
        return found["results"], json.loads(json.dumps(answers))

    (ours, answers), (theirs, expected) = outcome("llama_mini"), outcome("hf")
    assert numbers(answers) == pytest.approx(numbers(expected), abs=1e-4, rel=1e-5)
    assert strings(answers) == strings(expected)
    for name in names:
        metrics = {key: value for key, value in theirs[name].items() if isinstance(value, float)}
        assert {key: ours[name][key] for key in metrics} == pytest.approx(metrics, rel=1e-4)


def numbers(tree: Any) -> list[float]:
    if isinstance(tree, list):
        return [number for item in tree for number in numbers(item)]
    return [] if isinstance(tree, str) else [float(tree)]


def strings(tree: Any) -> list[str]:
    if isinstance(tree, list):
        return [text for item in tree for text in strings(item)]
    return [tree] if isinstance(tree, str) else []


def test_the_command(task_dir: Path, tiny_dir: Path) -> None:
    def run(*more: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "llama_mini.eval", "--model", "llama_mini", "--tasks", "tiny_choice"]
        command += ["--include_path", str(task_dir), "--limit", "3", *more]
        return subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | OFFLINE)

    done = run("--model_args", f"pretrained={tiny_dir},dtype=float32,kernels=off")
    assert done.returncode == 0, done.stderr
    assert "acc_norm" in done.stdout
    done = run("--model_args", "pretrained=/nowhere")
    assert done.returncode == 3
    assert "error: /nowhere does not exist" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_default_checkpoint(smollm2_dir: Path) -> None:
    ours, theirs = both(smollm2_dir)
    requests = instances(
        "loglikelihood",
        ("The capital of France is", " Paris"),
        ("The capital of France is", " London"),
        ("", "Alice was beginning to get very tired"),
        ("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", "Hello!"),
    )
    agree(ours.loglikelihood(requests, disable_tqdm=True), theirs.loglikelihood(requests, disable_tqdm=True))
    settings = {"until": ["\n\n", "."], "max_gen_toks": 24}
    answers = instances("generate_until", ("The capital of France is", settings), ("Once upon a time", settings))
    assert ours.generate_until(answers, disable_tqdm=True) == theirs.generate_until(answers, disable_tqdm=True)


def test_edits_of_norms(tiny_dir: Path, tmp_path: Path) -> None:
    edits = {"layers.*.*.pre_norm": {"gain": ["scale", -1.5]}, "norm": {"eps": 0.5}}
    (tmp_path / "edits.json").write_text(json.dumps(edits), encoding="utf-8")
    plain, edited = (LlamaMiniLM(str(tiny_dir), dtype="float32", edit=edit) for edit in (None, tmp_path / "edits.json"))
    requests = instances("loglikelihood", *PAIRS[:2])
    expected = plain.loglikelihood(requests)
    with lab.edit(plain.llm.model, edits):
        found = plain.loglikelihood(requests)
    assert edited.loglikelihood(requests) == found != expected
