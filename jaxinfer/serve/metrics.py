"""`Metrics`: what `/metrics` tells Prometheus. One registry per app."""

from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

from jaxinfer.decode.batcher import Batcher
from jaxinfer.decode.ticket import RequestStats

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4
LONG = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
SHORT = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)


class Metrics:
    """Counters of requests and tokens, times, and what the batcher holds now."""

    def __init__(self, batcher: Batcher):
        self.registry = CollectorRegistry()
        gauges = {
            "running_requests": ("Requests that have a slot.", lambda: batcher.running),
            "waiting_requests": ("Requests in the queue.", lambda: batcher.waiting),
            "slots": ("Requests that run at once, at most.", lambda: batcher.slots),
            "cache_bytes": ("Bytes of the caches of the slots.", lambda: batcher.cache_bytes),
            "prefix_bytes": ("Bytes of earlier texts.", lambda: batcher.prefix_bytes),
        }
        for name, (text, value) in gauges.items():
            self._gauge(name, text).set_function(value)
        self._requests = self._counter("requests", "Answered requests.", ["endpoint", "status"])
        self._refusals = self._counter("refusals", "Refused requests.", ["code"])
        self._prompt = self._counter("prompt_tokens", "Tokens of prompts.")
        self._cached = self._counter("cached_prompt_tokens", "Those that need not be read.")
        self._generated = self._counter("generated_tokens", "Tokens that were generated.")
        self._queue = self._histogram("queue_seconds", "Time in the queue.", LONG)
        self._first = self._histogram("first_token_seconds", "Time to the first token.", LONG)
        self._between = self._histogram("between_tokens_seconds", "Time between tokens.", SHORT)
        self._whole = self._histogram("request_seconds", "Time of a request.", LONG)

    def text(self) -> bytes:
        """The exposition."""
        return generate_latest(self.registry)

    def answered(self, endpoint: str, status: int, seconds: float) -> None:
        """A request was answered, whatever with."""
        self._requests.labels(endpoint, str(status)).inc()
        self._whole.observe(seconds)

    def refused(self, code: str) -> None:
        """A request was refused."""
        self._refusals.labels(code).inc()

    def generated(self, stats: Sequence[RequestStats]) -> None:
        """Tickets of a request have ended; each of them has read its prompt."""
        for one in stats:
            self._prompt.inc(one.prompt_tokens)
            self._cached.inc(one.cached_tokens)
            self._generated.inc(one.new_tokens)
            self._queue.observe(one.queue_s)
            if one.first_token_s:
                self._first.observe(one.first_token_s)
            if one.new_tokens > 1:
                self._between.observe(one.decode_s / (one.new_tokens - 1))

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(f"jaxinfer_{name}", text, registry=self.registry)

    def _counter(self, name: str, text: str, labels: Sequence[str] = ()) -> Counter:
        return Counter(f"jaxinfer_{name}", text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: Sequence[float]) -> Histogram:
        return Histogram(f"jaxinfer_{name}", text, buckets=buckets, registry=self.registry)
