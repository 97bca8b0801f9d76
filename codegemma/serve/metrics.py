"""The server's totals as Prometheus metrics, with llama.cpp's names where it has one."""

from __future__ import annotations

import math
from collections.abc import Iterator

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

from codegemma.serve.requests import Metrics


class MetricsCollector(Collector):
    """Reads a service's Metrics when it is asked."""

    def __init__(self, metrics: Metrics) -> None:
        self.metrics = metrics

    def collect(self) -> Iterator[Metric]:
        """Every metric with its present value."""
        metrics, counts = self.metrics, self.metrics.counts
        counters = {
            "llamacpp:prompt_tokens": (
                "Prompt tokens read",
                counts["prompt_tokens"] - counts["cached_tokens"],
            ),
            "llamacpp:prompt_seconds": ("Seconds spent on prompts", counts["prompt_seconds"]),
            "llamacpp:tokens_predicted": ("Tokens generated", counts["predicted_tokens"]),
            "llamacpp:tokens_predicted_seconds": ("Seconds spent generating", counts["predicted_seconds"]),
            "codegemma_requests": ("Requests finished", counts["requests"]),
            "codegemma_rejected": ("Requests refused because too many waited", counts["rejected"]),
            "codegemma_cancelled": ("Requests cancelled", counts["cancelled"]),
            "codegemma_cached_tokens": ("Prompt tokens found in the prefix cache", counts["cached_tokens"]),
        }
        for name, (description, value) in counters.items():
            yield CounterMetricFamily(name, description, value)
        yield GaugeMetricFamily("llamacpp:requests_processing", "Requests that run", metrics.running)
        yield GaugeMetricFamily("llamacpp:requests_deferred", "Requests that wait", metrics.waiting)
        buckets = [("+Inf" if math.isinf(le) else str(le), count) for le, count in metrics.buckets.items()]
        name = "codegemma_time_to_first_token_seconds"
        yield HistogramMetricFamily(name, "From the request to its first token", buckets, metrics.waited)
