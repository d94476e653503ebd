"""Clients that others wrote, against a server process: openai, langchain-openai, llm, lm-eval."""

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from benchmark.servers import Server
from llama_mini import LLM

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # warnings of the clients' own
NAME, KEY = "tiny", "secret"
MESSAGES: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who is the White Rabbit?"}]
SCHEMA = {
    "type": "object",
    "properties": {"animal": {"enum": ["rabbit", "cat"]}, "late": {"type": "boolean"}},
    "required": ["animal", "late"],
    "additionalProperties": False,
}
GREEDY: Any = {"model": NAME, "messages": MESSAGES, "temperature": 0, "max_tokens": 24}


@pytest.fixture(scope="module")
def server(tiny_dir: Path) -> Iterator[Server]:
    with serving(tiny_dir) as running:
        yield running


def serving(path: Path, *options: str) -> Server:
    command = [sys.executable, "-m", "llama_mini.serve", "--model", str(path), "--port", "{port}"]
    return Server([*command, "--served-model-name", NAME, "--dtype", "float32", "--threads", "1", *options])


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
        yield made


@pytest.fixture(scope="module")
def text(tiny_dir: Path) -> str:
    return LLM(tiny_dir, dtype="float32").chat(MESSAGES, temperature=0, max_tokens=24).text


def test_openai_has_the_text_of_the_engine_whole_and_streamed(client: openai.OpenAI, text: str) -> None:
    whole = client.chat.completions.create(**GREEDY)
    assert whole.choices[0].message.content == text
    assert whole.usage is not None
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    chunks = list(client.chat.completions.create(**GREEDY, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == text
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == whole.choices[0].finish_reason
    assert [c.usage for c in chunks if c.usage] == [chunks[-1].usage]
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert len({c.id for c in chunks}) == 1


def test_openai_reads_log_probabilities_and_several_answers(client: openai.OpenAI, text: str) -> None:
    found = client.chat.completions.create(**GREEDY, logprobs=True, top_logprobs=3, n=2)
    assert [choice.message.content for choice in found.choices] == [text, text]
    for choice in found.choices:
        assert choice.logprobs is not None
        assert choice.logprobs.content is not None
        for token in choice.logprobs.content:
            assert token.logprob == pytest.approx(max(top.logprob for top in token.top_logprobs))
            assert len(token.top_logprobs) == 3
    echoed = client.completions.create(model=NAME, prompt=["Alice", "Rabbit"], max_tokens=4, echo=True, logprobs=0)
    for choice, prompt in zip(echoed.choices, ["Alice", "Rabbit"], strict=True):
        assert choice.text.startswith(prompt)
        assert choice.logprobs is not None
        assert choice.logprobs.token_logprobs is not None
        assert choice.logprobs.token_logprobs[0] is None


def test_openai_parses_an_answer_by_its_schema(client: openai.OpenAI) -> None:
    wanted: Any = {"type": "json_schema", "json_schema": {"name": "seen", "schema": SCHEMA, "strict": True}}
    settings = GREEDY | {"temperature": 1, "max_tokens": 100}
    for seed in range(5):
        found = client.chat.completions.create(**settings, seed=seed, response_format=wanted)
        answer = json.loads(found.choices[0].message.content or "")
        assert answer["animal"] in ("rabbit", "cat")
        assert isinstance(answer["late"], bool)


def test_forty_requests_of_the_asynchronous_client_run_at_once(server: Server, text: str) -> None:
    async def ask() -> list[str | None]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            found = await asyncio.gather(*(client.chat.completions.create(**GREEDY) for _ in range(40)))
            return [each.choices[0].message.content for each in found]

    assert asyncio.run(ask()) == [text] * 40


def test_openai_has_an_error_of_its_own_for_each_of_ours(tiny_dir: Path) -> None:
    with serving(tiny_dir, "--api-key", KEY) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0)
        assert [model.id for model in client.models.list()] == [NAME]
        with pytest.raises(openai.NotFoundError, match="nobody"):
            client.chat.completions.create(**GREEDY | {"model": "nobody"})
        with pytest.raises(openai.BadRequestError, match="temperature") as refused:
            client.chat.completions.create(**GREEDY | {"temperature": -1})
        assert refused.value.param == "temperature"
        with pytest.raises(openai.BadRequestError, match="512"):
            client.chat.completions.create(**GREEDY | {"max_tokens": 10_000}, stream=True)
        with pytest.raises(openai.AuthenticationError):
            client.with_options(api_key="wrong").chat.completions.create(**GREEDY)


def test_openai_asks_again_when_the_server_is_full(tiny_dir: Path, text: str) -> None:
    with serving(tiny_dir, "--max-queue", "1") as server:

        async def ask(retries: int) -> list[Any]:
            async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=retries) as client:
                asked = (client.chat.completions.create(**GREEDY) for _ in range(6))
                return await asyncio.gather(*asked, return_exceptions=True)

        refused = [each for each in asyncio.run(ask(0)) if isinstance(each, openai.InternalServerError)]
        assert {each.status_code for each in refused} == {503}
        assert [each.choices[0].message.content for each in asyncio.run(ask(20))] == [text] * 6


def test_langchain_invokes_streams_and_reads_a_schema(server: Server, text: str) -> None:
    from langchain_openai import ChatOpenAI

    settings: Any = {"model": NAME, "base_url": f"{server.url}/v1", "api_key": "none", "temperature": 0}
    model = ChatOpenAI(**settings, max_tokens=24)
    asked = [("system", MESSAGES[0]["content"]), ("user", MESSAGES[1]["content"])]
    answer = model.invoke(asked)
    assert answer.content == text
    assert answer.usage_metadata["output_tokens"] > 0
    assert "".join(chunk.content for chunk in model.stream(asked)) == text
    assert [each.content for each in model.batch([asked] * 3)] == [text] * 3
    shaped = ChatOpenAI(**settings, max_tokens=100).with_structured_output(
        {"title": "seen", **SCHEMA}, method="json_schema"
    )
    assert shaped.invoke(asked)["animal"] in ("rabbit", "cat")


def test_llm_answers_on_the_command_line(server: Server, text: str, tmp_path: Path) -> None:
    model = {"model_id": NAME, "model_name": NAME, "api_base": f"{server.url}/v1"}
    (tmp_path / "extra-openai-models.yaml").write_text(json.dumps([model]))  # YAML reads JSON
    options = ["-m", NAME, "-o", "temperature", "0", "-o", "max_tokens", "24", "--no-log"]
    for more in ([], ["--no-stream"]):
        command = [sys.executable, "-m", "llm", *options, *more, "-s", MESSAGES[0]["content"], MESSAGES[1]["content"]]
        ran = subprocess.run(
            command, env=os.environ | {"LLM_USER_PATH": str(tmp_path)}, capture_output=True, text=True, timeout=120
        )
        assert ran.returncode == 0, ran.stderr
        assert ran.stdout.strip() == text.strip()


def test_lm_eval_scores_by_http_what_it_scores_in_process(server: Server, tiny_dir: Path) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    pytest.importorskip("tenacity", reason="what lm-eval[api] needs is not installed")
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    from llama_mini.eval.lm_eval import LlamaMiniLM

    options: Any = {"tokenizer": str(tiny_dir), "tokenizer_backend": "huggingface", "num_concurrent": 4}
    options["add_bos_token"] = True  # without it lm-eval sends prompts without their first token
    theirs = LocalCompletionsAPI(model=NAME, base_url=f"{server.url}/v1/completions", max_length=512, **options)
    ours = LlamaMiniLM(str(tiny_dir), dtype="float32")
    scored = [("The Rabbit", " ran."), ("Alice was", " beginning"), ("a b c", " d e"), ("Ünï ", "cödé")]
    requests = [Instance("loglikelihood", {}, args, i, metadata=("task", i, 1)) for i, args in enumerate(scored)]
    http, here = theirs.loglikelihood(requests, disable_tqdm=True), ours.loglikelihood(requests, disable_tqdm=True)
    assert [greedy for _, greedy in http] == [greedy for _, greedy in here]
    assert [score for score, _ in http] == pytest.approx([score for score, _ in here], abs=1e-4)
    until = {"until": ["\n"], "max_gen_toks": 16}
    asked = [
        Instance("generate_until", {}, (text, until), i, metadata=("task", i, 1)) for i, (text, _) in enumerate(scored)
    ]
    assert theirs.generate_until(asked, disable_tqdm=True) == ours.generate_until(asked, disable_tqdm=True)
