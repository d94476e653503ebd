"""Figures for Prometheus, named as vLLM's."""

from collections.abc import Iterable, Iterator, Sequence

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.requests import Request as HTTPRequest
from starlette.responses import Response

from llama_mini.engine.llm import LLM
from llama_mini.engine.request import Request

PREFIX = "llama_mini:"
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)


class Metrics:
    """Counts of one server. A request is counted when it ends; what the engine does is read when somebody asks."""

    def __init__(self, llm: LLM) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_Engine(llm))

        def histogram(name: str, meaning: str, buckets: Sequence[float]) -> Histogram:
            return Histogram(PREFIX + name, meaning, buckets=buckets, registry=self._registry)

        def counter(name: str, meaning: str, *labels: str) -> Counter:
            return Counter(PREFIX + name, meaning, labels, registry=self._registry)

        self._ended = counter("request_success", "answers by the reason for their end", "finished_reason")
        self._prompt = counter("prompt_tokens", "tokens of prompts")
        self._cached = counter("prompt_tokens_cached", "tokens of prompts that were not prefilled again")
        self._first = histogram("time_to_first_token_seconds", "from the request to its first token", SECONDS)
        self._each = histogram("time_per_output_token_seconds", "mean time between the tokens of an answer", SECONDS)
        self._all = histogram("e2e_request_latency_seconds", "from the request to its last token", SECONDS)
        self._prompt_size = histogram("request_prompt_tokens", "tokens of a prompt", TOKENS)
        self._answer_size = histogram("request_generation_tokens", "tokens of an answer", TOKENS)

    def count(self, requests: Iterable[Request]) -> None:
        """Counts requests that have ended. One that is not finished was left by its client."""
        for request in requests:
            new, stats = len(request.token_ids), request.completion.stats if request.completion else None
            self._ended.labels(request.finish_reason or "abort").inc()
            self._prompt.inc(len(request.prompt))
            self._cached.inc(request.cached_tokens)
            self._prompt_size.observe(len(request.prompt))
            self._answer_size.observe(new)
            if stats is not None and stats.ttft_seconds is not None:
                self._first.observe(stats.ttft_seconds)
                token = 1 / stats.decode_tok_s if stats.decode_tok_s else 0.0
                self._all.observe(stats.ttft_seconds + (new - 1) * token)
                if new > 1:
                    self._each.observe(token)

    async def show(self, _: HTTPRequest) -> Response:
        return Response(generate_latest(self._registry), media_type=CONTENT_TYPE_LATEST)


class _Engine(Collector):
    def __init__(self, llm: LLM) -> None:
        self._llm = llm

    def collect(self) -> Iterator[Metric]:
        now = self._llm.activity()
        yield GaugeMetricFamily(PREFIX + "num_requests_running", "answers that are generated", now.running)
        yield GaugeMetricFamily(PREFIX + "num_requests_waiting", "answers that wait for their turn", now.waiting)
        yield GaugeMetricFamily(PREFIX + "kv_cache_usage_perc", "share of the cache in use, 0 to 1", now.cache_usage)
        yield CounterMetricFamily(PREFIX + "generation_tokens", "tokens generated", now.generated_tokens)
