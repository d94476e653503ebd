"""The figures for Prometheus, read by its own parser and compared with the replies."""

from collections.abc import Callable
from contextlib import ExitStack

import pytest
from prometheus_client.parser import text_string_to_metric_families

from llama_mini import LLM
from llama_mini.engine import runner
from llama_mini.server.app import create_app
from llama_mini.server.settings import Settings
from tests.server.live import ask, connect, head, post, read_until, serving, until
from tests.server.local import Client
from tests.server.test_responses import Gate

Figures = dict[str, float]
LONG = {"prompt": "one, two", "max_tokens": 400, "ignore_eos": True, "stream": True}


def figures(text: str) -> Figures:
    found = {}
    for family in text_string_to_metric_families(text):
        assert family.name.startswith("llama_mini:")
        assert family.documentation
        for sample in family.samples:
            if not sample.name.endswith(("_created", "_bucket")):
                found[sample.name.removeprefix("llama_mini:") + "".join(sample.labels.values())] = sample.value
    return found


def test_they_count_what_the_replies_say(new_llm: LLM) -> None:
    with Client(new_llm) as client:
        bodies = [
            {"prompt": "a longer prompt of which the second request takes over a part", "max_tokens": 5, "n": 2},
            {"prompt": "a longer prompt of which the second request takes over more", "max_tokens": 3},
            {"prompt": ["x", [75, 76]], "max_tokens": 1},
        ]
        usages = [client.post("/v1/completions", ignore_eos=True, **body)["usage"] for body in bodies]
        client.events("/v1/completions", prompt="x", max_tokens=2, ignore_eos=True)
        client.refused("/v1/completions", prompt="x", max_tokens=-1)
        found = figures(client.http.get("/metrics").text)
    new = sum(usage["completion_tokens"] for usage in usages) + 2
    assert found["generation_tokens_total"] == found["request_generation_tokens_sum"] == new == 17
    assert found["request_success_totallength"] == found["request_generation_tokens_count"] == 6
    assert found["time_to_first_token_seconds_count"] == found["e2e_request_latency_seconds_count"] == 6
    assert found["time_per_output_token_seconds_count"] == 4  # of those with more than one token
    first, *others = [usage["prompt_tokens"] for usage in usages]
    assert found["prompt_tokens_total"] == found["request_prompt_tokens_sum"] == 2 * first + sum(others) + 2
    cached = usages[1]["prompt_tokens_details"]["cached_tokens"]
    assert cached > 32
    assert found["prompt_tokens_cached_total"] >= cached
    assert 0 < found["time_to_first_token_seconds_sum"] < found["e2e_request_latency_seconds_sum"]
    assert found["num_requests_running"] == found["num_requests_waiting"] == found["kv_cache_usage_perc"] == 0


def test_a_client_that_leaves_is_seen_to_leave(new_llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "MAX_ROWS", 2)
    settings = Settings()
    with (
        serving(create_app(new_llm, settings), settings) as (server, port),
        Gate(new_llm) as gate,
        ExitStack() as stack,
    ):

        def now() -> Figures:
            return figures(ask(port, head(path="/metrics"))[2].decode())

        def reached(**expected: float) -> Callable[[], bool]:
            return lambda: {name: now()[name] for name in expected} == expected

        def submitted() -> int:
            seen = new_llm.activity()
            return seen.running + seen.waiting + new_llm._scheduler._inbox.qsize()

        clients = [stack.enter_context(connect(port, post("/v1/completions", LONG))) for _ in range(3)]
        until(lambda: submitted() == 3)  # while the gate holds the first forward pass
        gate.allow(10)
        until(reached(num_requests_running=2, num_requests_waiting=1))
        assert 0 < now()["kv_cache_usage_perc"] <= 1
        read_until(clients[0], b'"text":')
        for n_left, client in zip((2, 1, 0), clients, strict=True):
            client.close()
            until(lambda n_left=n_left: len(server.server_state.tasks) == n_left)
            gate.allow(2)  # within two steps it has left
            until(reached(num_requests_running=min(n_left, 2), num_requests_waiting=0))
        generated = now()["generation_tokens_total"]
        gate.allow(100)
        assert now()["generation_tokens_total"] == generated < 100
        assert now()["request_success_totalabort"] == 3
