"""Prometheus metrics: `kvfold:` series, and the same series under vLLM's names.

Everything is registered here, in the API process: the engine's numbers arrive with its snapshots,
so the client library's multi-process mode is never needed. Names and buckets follow vLLM.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample
from prometheus_client.utils import floatToGoString

from ..core.config import CacheSettings
from ..core.report import KL_BOUNDS, EngineInfo, EngineStats, ProbeStats

_TO_FIRST_S = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
_BETWEEN_S = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
_WHOLE_S = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0),
    *(40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
_LENGTHS = tuple(float(m * 10**e) for e in range(6) for m in (1, 2, 5))

_HISTOGRAMS = {
    "request_prompt_tokens": ("Tokens of the prompt", _LENGTHS),
    "request_generation_tokens": ("Tokens generated and delivered", _LENGTHS),
    "request_max_num_generation_tokens": ("Tokens of its longest continuation", _LENGTHS),
    "request_params_max_tokens": ("max_tokens of the request", _LENGTHS),
    "request_params_n": ("n of the request", (1.0, 2.0, 5.0, 10.0, 20.0)),
    "time_to_first_token_seconds": ("From arrival to the first token", _TO_FIRST_S),
    "inter_token_latency_seconds": ("Between two tokens of a sequence", _BETWEEN_S),
    "request_time_per_output_token_seconds": ("Mean of a request after its first", _BETWEEN_S),
    "e2e_request_latency_seconds": ("From arrival to the end", _WHOLE_S),
    "request_queue_time_seconds": ("From arrival to the first step", _WHOLE_S),
    "request_prefill_time_seconds": ("From the first step to the first token", _WHOLE_S),
    "request_decode_time_seconds": ("From the first token to the last", _WHOLE_S),
    "request_inference_time_seconds": ("From the first step to the last token", _WHOLE_S),
}
_GAUGES: dict[str, tuple[str, Callable[[EngineStats], float]]] = {
    "num_requests_running": ("Sequences that run", lambda s: s.n_running),
    "num_requests_waiting": ("Sequences that wait", lambda s: s.n_waiting),
    "kv_cache_usage_perc": ("Share of the KV pool in use, 0 to 1", lambda s: s.kv_usage),
    "kv_cache_tokens": ("Tokens that live sequences hold", lambda s: s.kv_tokens),
    "kv_cache_host_bytes": (
        "Bytes of host memory that live sequences hold",
        lambda s: s.kv_host_bytes,
    ),
}
_COUNTERS: dict[str, tuple[str, Callable[[EngineStats], float]]] = {
    "prefix_cache_queries": ("Prompt tokens looked up", lambda s: s.prefix_queries),
    "prefix_cache_hits": ("Prompt tokens found", lambda s: s.prefix_hits),
    "num_preemptions": ("Sequences that had to give way", lambda s: s.n_preempted),
    "prompt_tokens": ("Prompt tokens computed", lambda s: s.prompt_tokens),
    "generation_tokens": ("Tokens generated", lambda s: s.generated_tokens),
    "kv_selected_chunks": (
        "Chunks that steps chose to read, by layer and head",
        lambda s: s.selection.n_selected,
    ),
    "kv_missed_chunks": (
        "Of those, chunks that had to be made whole",
        lambda s: s.selection.n_missed,
    ),
    "kv_fetched_bytes": (
        "Read from host memory for that",
        lambda s: s.selection.fetched_bytes,
    ),
    "kv_factorised_layers": (
        "Sequences times layers whose keys were factorised",
        lambda s: s.selection.n_sealed,
    ),
    "kv_key_error": (
        "Sum over those of the relative error of the keys",
        lambda s: s.selection.key_error_sum,
    ),
    "kv_probe_steps": ("Decode steps computed densely as well", lambda s: s.probe.n_steps),
    "kv_probe_top1_agreement": (
        "Of those, steps in which both found the same token likeliest",
        lambda s: s.probe.n_agreed,
    ),
}
_OURS_ALONE = frozenset(
    f"kvfold:{name}"
    for name in (
        *("kv_cache_bytes", "kv_cache_tokens", "kv_cache_compression_ratio"),
        *("kv_cache_host_bytes", "kv_selected_chunks", "kv_missed_chunks", "kv_fetched_bytes"),
        *("kv_factorised_layers", "kv_key_error"),
        *("kv_cache_kept_channels", "kv_probe_steps", "kv_probe_top1_agreement", "kv_probe_kl"),
        *("engine_restarts", "requests_rejected"),
    )
)


@dataclass(slots=True, kw_only=True)
class Timeline:
    """When the stations of one request were passed, in monotonic seconds, and what it made."""

    arrived: float
    n_prompt: int
    max_tokens: int
    n: int
    scheduled: float | None = None
    first: float | None = None
    last: float | None = None
    n_generated: int = 0
    n_longest: int = 0
    """Tokens of the longest continuation."""


class Metrics(Collector):
    """The series of one app, in a registry of its own."""

    def __init__(
        self,
        model_name: str,
        *,
        stats: Callable[[], EngineStats],
        info: Callable[[], EngineInfo | None],
        n_restarts: Callable[[], int],
        cache: CacheSettings,
        has_aliases: bool,
    ) -> None:
        self.registry = CollectorRegistry()
        self._labels = {"model_name": model_name}
        self._stats = stats
        self._info = info
        self._n_restarts = n_restarts
        self._cache = cache
        self._has_aliases = has_aliases
        self._families = {
            name: Histogram(f"kvfold:{name}", text, ["model_name"], buckets=buckets, registry=None)
            for name, (text, buckets) in _HISTOGRAMS.items()
        }
        self._histograms = {
            name: family.labels(**self._labels) for name, family in self._families.items()
        }
        self._success = Counter(
            "kvfold:request_success",
            "Requests that ended, by how",
            ["model_name", "finished_reason"],
            registry=None,
        )
        self._rejected = Counter(
            "kvfold:requests_rejected",
            "Requests that were not admitted, by why",
            ["model_name", "reason"],
            registry=None,
        )
        self._gone = Counter(
            "kvfold:http_requests_client_disconnected",
            "Clients that left before their response was complete",
            ["model_name"],
            registry=None,
        )
        self._gone.labels(**self._labels)
        self.registry.register(self)

    def expose(self) -> bytes:
        """The text that a scrape gets."""
        return generate_latest(self.registry)

    def client_gone(self) -> None:
        """A client left early."""
        self._gone.labels(**self._labels).inc()

    def rejected(self, reason: str) -> None:
        """A request was not admitted."""
        self._rejected.labels(**self._labels, reason=reason).inc()

    def tokens(self, n_tokens: int, seconds: float) -> None:
        """Tokens of one sequence arrived that long after the one before."""
        for _ in range(n_tokens):
            self._histograms["inter_token_latency_seconds"].observe(seconds / n_tokens)

    def first_token(self, seconds: float) -> None:
        """The first token of a request arrived that long after the request."""
        self._histograms["time_to_first_token_seconds"].observe(seconds)

    def ended(self, line: Timeline, reason: str, now: float) -> None:
        """A request ended: finished, aborted or failed."""
        self._success.labels(**self._labels, finished_reason=reason).inc()
        observed = {
            "request_prompt_tokens": line.n_prompt,
            "request_generation_tokens": line.n_generated,
            "request_max_num_generation_tokens": line.n_longest,
            "request_params_max_tokens": line.max_tokens,
            "request_params_n": line.n,
            "e2e_request_latency_seconds": now - line.arrived,
        }
        if line.scheduled is not None:
            observed["request_queue_time_seconds"] = line.scheduled - line.arrived
            if line.first is not None and line.last is not None:
                observed["request_prefill_time_seconds"] = line.first - line.scheduled
                observed["request_inference_time_seconds"] = line.last - line.scheduled
        if line.first is not None and line.last is not None:
            decode_s = line.last - line.first
            observed["request_decode_time_seconds"] = decode_s
            if line.n_generated > line.n:
                per_token = decode_s / (line.n_generated - line.n) * line.n
                observed["request_time_per_output_token_seconds"] = per_token
        for name, value in observed.items():
            self._histograms[name].observe(value)

    def collect(self) -> Iterator[Metric]:
        """Every family, and its alias where vLLM has the same."""
        for family in self._own():
            # The client library's creation times are gauges that no dashboard reads.
            family.samples = [s for s in family.samples if not s.name.endswith("_created")]
            yield family
            if self._has_aliases and family.name not in _OURS_ALONE:
                yield _alias(family)

    def _own(self) -> Iterator[Metric]:
        stats = self._stats()
        names, values = list(self._labels), list(self._labels.values())
        for name, (text, read) in _GAUGES.items():
            gauge = GaugeMetricFamily(f"kvfold:{name}", text, labels=names)
            gauge.add_metric(values, read(stats))
            yield gauge
        for name, (text, read) in _COUNTERS.items():
            counter = CounterMetricFamily(f"kvfold:{name}", text, labels=names)
            counter.add_metric(values, read(stats))
            yield counter
        held = GaugeMetricFamily(
            "kvfold:kv_cache_bytes", "Bytes that live sequences hold", labels=[*names, "pool"]
        )
        info = self._info()
        # Of an engine that has made no step yet, nothing is known but its pools.
        for pool in () if info is None else info.kv_pools:
            held.add_metric([*values, pool], stats.kv_bytes.get(pool, 0))
        yield held
        ratio = GaugeMetricFamily(
            "kvfold:kv_cache_compression_ratio",
            "Bytes of the keys and values of these tokens as the model makes them, over "
            "kv_cache_bytes; no sample while there are none",
            labels=names,
        )
        if n_bytes := sum(stats.kv_bytes.values()):
            ratio.add_metric(values, stats.kv_full_bytes / n_bytes)
        yield ratio
        kept = GaugeMetricFamily(
            "kvfold:kv_cache_kept_channels",
            "Share of the channels of keys and of values that sealed tokens keep, 0 to 1",
            labels=[*names, "part"],
        )
        for part, share in stats.kv_kept.items():
            kept.add_metric([*values, part], share)
        yield kept
        yield self._divergence(stats.probe)
        restarts = CounterMetricFamily(
            "kvfold:engine_restarts", "Times that the engine was replaced", labels=names
        )
        restarts.add_metric(values, self._n_restarts())
        yield restarts
        if info is not None:
            yield self._cache_config(info)
        for histogram in self._families.values():
            yield from histogram.collect()
        for family in (self._success, self._rejected, self._gone):
            yield from family.collect()

    def _divergence(self, probe: ProbeStats) -> Metric:
        family = HistogramMetricFamily(
            "kvfold:kv_probe_kl",
            "KL divergence of a probed step from the same step computed densely, in nats",
            labels=list(self._labels),
        )
        bounds = [*map(floatToGoString, KL_BOUNDS), "+Inf"]
        counts = zip(bounds, accumulate(probe.kl_counts), strict=True)
        family.add_metric(list(self._labels.values()), list(counts), probe.kl_sum)
        return family

    def _cache_config(self, info: EngineInfo) -> Metric:
        family = GaugeMetricFamily(
            "kvfold:cache_config_info", "Facts of the KV cache, as labels", labels=[]
        )
        facts = {
            "block_size": info.page_size,
            "num_gpu_blocks": info.n_pages,
            "kv_cache": info.kv_cache,
            "bytes_per_token": info.bytes_per_token,
            "enable_prefix_caching": self._cache.prefix,
            "gpu_memory_utilization": self._cache.memory_share,
        }
        labels = self._labels | {name: str(value) for name, value in facts.items()}
        family.add_sample("kvfold:cache_config_info", labels, 1)
        return family


def _alias(family: Metric) -> Metric:
    """The same family under vLLM's name, with vLLM's `engine` label."""
    alias = Metric(_renamed(family.name), family.documentation, family.type, family.unit)
    alias.samples = [
        Sample(
            _renamed(sample.name),
            {**sample.labels, "engine": "0"},
            sample.value,
            sample.timestamp,
            sample.exemplar,
        )
        for sample in family.samples
    ]
    return alias


def _renamed(name: str) -> str:
    return "vllm:" + name.removeprefix("kvfold:")
