"""The server's totals as Prometheus metrics, with llama.cpp's names where it has one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.utils import INF, floatToGoString

# Upper bounds, in seconds, of the histogram of the times to the first token.
BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, INF)
COUNTERS = {  # Prometheus' name and description of each count
    "prompt_tokens": ("llamacpp:prompt_tokens", "Prompt tokens read"),
    "prompt_seconds": ("llamacpp:prompt_seconds", "Seconds spent on prompts"),
    "predicted_tokens": ("llamacpp:tokens_predicted", "Tokens generated"),
    "predicted_seconds": ("llamacpp:tokens_predicted_seconds", "Seconds spent generating"),
    "requests": ("codegemma_requests", "Requests finished"),
    "rejected": ("codegemma_rejected", "Requests refused because too many waited"),
    "cancelled": ("codegemma_cancelled", "Requests cancelled"),
    "cached_tokens": ("codegemma_cached_tokens", "Prompt tokens found in the prefix cache"),
}


class Metrics(Collector):
    """Totals since the start. `running` and `waiting` are the jobs at present."""

    def __init__(self) -> None:
        self.counts = dict.fromkeys(COUNTERS, 0.0)
        self.running = self.waiting = 0
        self._first_token_buckets = dict.fromkeys(BUCKETS_S, 0)
        self._first_token_seconds = 0.0

    def add(self, timings: dict[str, Any]) -> None:
        """Counts a job that has ended, by its timings."""
        for name, value in {
            "requests": 1,
            "cancelled": timings["stop"] == "cancelled",
            "prompt_tokens": timings["prompt_n"] + timings["cache_n"],
            "cached_tokens": timings["cache_n"],
            "predicted_tokens": timings["predicted_n"],
            "prompt_seconds": timings["prompt_ms"] / 1000,
            "predicted_seconds": timings["predicted_ms"] / 1000,
        }.items():
            self.counts[name] += value
        if timings["predicted_n"]:
            seconds = (timings["queue_ms"] + timings["prompt_ms"]) / 1000
            self._first_token_seconds += seconds
            for bound in BUCKETS_S:
                self._first_token_buckets[bound] += seconds <= bound

    def collect(self) -> Iterator[Metric]:
        """Every metric with its present value. The prompt tokens are those that were not cached."""
        uncached = self.counts["prompt_tokens"] - self.counts["cached_tokens"]
        values = self.counts | {"prompt_tokens": uncached}
        for count, (name, description) in COUNTERS.items():
            yield CounterMetricFamily(name, description, values[count])
        yield GaugeMetricFamily("llamacpp:requests_processing", "Requests that run", self.running)
        yield GaugeMetricFamily("llamacpp:requests_deferred", "Requests that wait", self.waiting)
        buckets = [(floatToGoString(bound), count) for bound, count in self._first_token_buckets.items()]
        name = "codegemma_time_to_first_token_seconds"
        description = "From the request to its first token"
        yield HistogramMetricFamily(name, description, buckets, self._first_token_seconds)
