"""What a server counts, for Prometheus."""

from __future__ import annotations

from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from elastic_decode.core import Completion, Phase, TokenEvent

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_WAITS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_RUNS = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800)
# name in Engine.stats() -> (metric, help)
_GAUGES = {
    "running": ("rows_running", "Samples being decoded"),
    "waiting": ("rows_waiting", "Requests in the engine that have no row yet"),
    "num_pages": ("kv_pages_total", "KV pages there are"),
    "reserved_pages": ("kv_pages_reserved", "KV pages reserved for the bounds of running samples"),
    "used_pages": ("kv_pages_used", "KV pages of running samples that hold something"),
    "free_pages": ("kv_pages_free", "KV pages that nobody holds"),
    "decode_steps": ("decode_steps", "Decode steps since the start"),
}


class Metrics:
    """A registry of its own, so that one process may hold several servers."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        name = "elastic_decode_{}".format
        self.requests = Counter(
            name("requests"),
            "Requests by outcome: completed, refused, overloaded, aborted, failed",
            ("endpoint", "outcome"),
            registry=registry,
        )
        self._prompt_tokens = Counter(name("prompt_tokens"), "Tokens of prompts taken on", registry=registry)
        tokens = Counter(
            name("tokens"), "Output tokens", ("phase", "provenance"), registry=registry
        )  # provenance: sampled or forced
        self._finished = Counter(
            name("samples"), "Samples by what ended them", ("reason",), registry=registry
        )
        self._think_ends = Counter(
            name("think_ends"),
            "Finished samples by how their thinking ended: natural, forced, eos, none",
            ("end",),
            registry=registry,
        )
        self._first = Histogram(
            name("time_to_first_token_seconds"),
            "From a request's arrival to a sample's first token",
            buckets=_WAITS,
            registry=registry,
        )
        self._between = Histogram(
            name("inter_token_latency_seconds"),
            "Between tokens of a sample; those of one horizon share its time",
            buckets=_WAITS,
            registry=registry,
        )
        self.duration = Histogram(
            name("request_duration_seconds"),
            "From a request's arrival to its last token",
            buckets=_RUNS,
            registry=registry,
        )
        self._gauges = {
            key: Gauge(name(metric), text, registry=registry) for key, (metric, text) in _GAUGES.items()
        }
        self._open = Gauge(name("samples_open"), "Samples taken on and not finished", registry=registry)
        self._limit = Gauge(name("samples_limit"), "Most samples taken on at a time", registry=registry)
        # Looked up once, not at every token; and so they are there, and 0, from the start.
        self._by_kind = {
            (phase, forced): tokens.labels(phase.value, "forced" if forced else "sampled")
            for phase in Phase
            for forced in (False, True)
        }
        for end in ("natural", "forced", "eos", "none"):
            self._think_ends.labels(end)

    def accepted(self, prompt_tokens: int) -> None:
        self._prompt_tokens.inc(prompt_tokens)

    def tokens(self, events: Sequence[TokenEvent], since: float, *, first: bool) -> None:
        """New events of one sample, `since` seconds after its last ones, or after its request came."""
        drawn = [event for event in events if event.token_id is not None]
        if not drawn:
            return
        if first:
            self._first.observe(since)
            steps, since = len(drawn) - 1, 0.0  # what came with the first token took no longer
        else:
            steps, since = len(drawn), since / len(drawn)
        for _ in range(steps):
            self._between.observe(since)
        for event in drawn:
            self._by_kind[event.phase, event.forced].inc()

    def finished(self, completion: Completion) -> None:
        self._finished.labels(completion.finish_reason).inc()
        self._think_ends.labels(completion.think_end).inc()

    def page(self, stats: dict[str, int], *, open_samples: int, limit: int) -> bytes:
        """The page Prometheus reads, with the engine's `stats()` as they are now."""
        for key, gauge in self._gauges.items():
            if key in stats:
                gauge.set(stats[key])
        self._open.set(open_samples)
        self._limit.set(limit)
        return generate_latest(self._registry)
