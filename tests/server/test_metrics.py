"""What a scrape sees: after a workload every series has moved, under both names."""

import dataclasses
from collections.abc import AsyncGenerator

import pytest
from kvfold.core.sequence import FinishReason, Output, Request
from kvfold.server.supervisor import State
from prometheus_client.parser import text_string_to_metric_families

from .scripted import TEXT, Client, config, output, serving

pytestmark = pytest.mark.anyio
VLLM = {
    *("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"),
    *("prefix_cache_queries", "prefix_cache_hits", "num_preemptions", "prompt_tokens"),
    *("generation_tokens", "request_success", "request_prompt_tokens"),
    *("request_generation_tokens", "request_params_max_tokens", "request_params_n"),
    *("request_max_num_generation_tokens", "time_to_first_token_seconds"),
    "inter_token_latency_seconds",
    *("request_time_per_output_token_seconds", "e2e_request_latency_seconds"),
    *("request_queue_time_seconds", "request_prefill_time_seconds"),
    *("request_decode_time_seconds", "request_inference_time_seconds", "cache_config_info"),
}
OURS = {
    *("kv_cache_bytes", "kv_cache_tokens", "kv_cache_compression_ratio"),
    *("kv_cache_host_bytes", "kv_selected_chunks", "kv_missed_chunks", "kv_fetched_bytes"),
    *("kv_factorised_layers", "kv_key_error"),
    *("kv_cache_kept_channels", "kv_probe_steps", "kv_probe_top1_agreement", "kv_probe_kl"),
    *("engine_restarts", "requests_rejected"),
}
RESTING = {"num_requests_running": "nothing runs when the scrape comes"}


async def script(request: Request) -> AsyncGenerator[tuple[Output, ...]]:
    for finish in (None, None, FinishReason.LENGTH):
        yield (output(request, TEXT.encode("a"), finish=finish),)


async def scrape(client: Client) -> dict[str, float]:
    """The largest value of each family."""
    text = (await client.get("/metrics")).body.decode()
    return {
        family.name: max(
            (s.value for s in family.samples if not s.name.endswith("_created")), default=0.0
        )
        for family in text_string_to_metric_families(text)
    }


async def test_every_series_moves() -> None:
    async with serving(script) as client:
        await client.post("/v1/completions", {"prompt": "x"})
        client.supervisor.n_restarts = 1
        client.supervisor.state = State.DEGRADED
        await client.post("/v1/completions", {"prompt": "x"})
        client.supervisor.state = State.READY
        client.app.state.api.metrics.client_gone()
        values = await scrape(client)
    names = {name.removeprefix("kvfold:") for name in values if name.startswith("kvfold:")}
    assert names == VLLM | OURS | {"http_requests_client_disconnected"}
    for name, value in values.items():
        assert value > 0 or name.partition(":")[2] in RESTING, name


async def test_aliases_are_vllms_names_and_can_be_left_out() -> None:
    async with serving(script) as client:
        values = await scrape(client)
        aliases = {name.removeprefix("vllm:") for name in values if name.startswith("vllm:")}
        assert aliases == VLLM | {"http_requests_client_disconnected"}
        body = (await client.get("/metrics")).body.decode()
        assert 'vllm:num_requests_waiting{engine="0",model_name="test"} 0.0' in body
    async with serving(script, settings=config(metrics_compat="none")) as client:
        assert not any(name.startswith("vllm:") for name in await scrape(client))


async def test_pool_has_a_sample_before_the_first_step_and_after_a_restart() -> None:
    line = 'kvfold:kv_cache_bytes{model_name="test",pool="dense"} 0.0'
    async with serving(script) as client:
        assert line in (await client.get("/metrics")).body.decode()
        await client.post("/v1/completions", {"prompt": "x"})
        assert line not in (await client.get("/metrics")).body.decode()
        await client.supervisor._retire()
        assert line in (await client.get("/metrics")).body.decode()


async def test_bytes_and_tokens_give_bytes_per_token() -> None:
    async with serving(script) as client:
        await client.post("/v1/completions", {"prompt": "x"})
        body = (await client.get("/metrics")).body.decode()
        assert 'kvfold:kv_cache_bytes{model_name="test",pool="dense"} 384.0' in body
        assert 'kvfold:kv_cache_tokens{model_name="test"} 48.0' in body
        assert 'kvfold:kv_cache_compression_ratio{model_name="test"} 1.5' in body


async def test_what_a_backend_keeps_and_loses() -> None:
    async with serving(script) as client:
        body = (await client.get("/metrics")).body.decode()
        assert "kvfold:kv_cache_compression_ratio{" not in body
        await client.post("/v1/completions", {"prompt": "x"})
        # An engine that is replaced takes none of it along.
        await client.supervisor._retire()
        body = (await client.get("/metrics")).body.decode()
        for line in (
            'kv_probe_steps_total{model_name="test"} 3.0',
            'kv_probe_top1_agreement_total{model_name="test"} 3.0',
            'kv_probe_kl_bucket{le="1e-06",model_name="test"} 0.0',
            'kv_probe_kl_bucket{le="0.01",model_name="test"} 0.0',
            'kv_probe_kl_bucket{le="0.03",model_name="test"} 3.0',
            'kv_probe_kl_bucket{le="+Inf",model_name="test"} 3.0',
            'kv_probe_kl_count{model_name="test"} 3.0',
            'kv_probe_kl_sum{model_name="test"} 0.06',
        ):
            assert f"kvfold:{line}" in body


async def test_kept_channels_are_told_by_part() -> None:
    async with serving(script) as client:
        body = (await client.get("/metrics")).body.decode()
        assert 'kvfold:kv_cache_kept_channels{model_name="test",part="keys"} 0.5' in body
        assert 'kvfold:kv_cache_kept_channels{model_name="test",part="values"} 1.0' in body


async def test_what_was_selected_is_told() -> None:
    async with serving(script) as client:
        await client.post("/v1/completions", {"prompt": "x"})
        body = (await client.get("/metrics")).body.decode()
        for line in (
            "kv_selected_chunks_total 120.0",
            "kv_missed_chunks_total 45.0",
            "kv_fetched_bytes_total 720.0",
            "kv_factorised_layers_total 6.0",
            "kv_key_error_total 0.75",
            "kv_cache_host_bytes 1536.0",
        ):
            name, value = line.split()
            assert f'kvfold:{name}{{model_name="test"}} {value}' in body


async def test_counts_of_one_request() -> None:
    async with serving(script) as client:
        await client.post("/v1/completions", {"prompt": "xy", "max_tokens": 5})
        body = (await client.get("/metrics")).body.decode()
        for line in (
            'request_success_total{finished_reason="length",model_name="test"} 1.0',
            'request_prompt_tokens_sum{model_name="test"} 2.0',
            'request_generation_tokens_sum{model_name="test"} 3.0',
            'request_params_max_tokens_sum{model_name="test"} 5.0',
            'request_max_num_generation_tokens_sum{model_name="test"} 3.0',
            'inter_token_latency_seconds_count{model_name="test"} 2.0',
            'time_to_first_token_seconds_count{model_name="test"} 1.0',
        ):
            assert f"kvfold:{line}" in body


async def test_two_apps_share_nothing() -> None:
    async with serving(script) as one, serving(script) as other:
        await one.post("/v1/completions", {"prompt": "x"})
        assert (await scrape(other))["kvfold:request_prompt_tokens"] == 0


def test_snapshot_has_no_field_that_nobody_shows() -> None:
    from kvfold.core.report import EngineStats
    from kvfold.server import metrics

    # Read by benches, not by dashboards.
    unshown = {"step_s", "n_free_pages", "n_steps", "step_tokens"}
    # Of families that have more labels, or are ratios; each has a test of its own.
    composed = {"kv_bytes", "kv_full_bytes", "kv_kept", "selection", "probe"}
    for field in dataclasses.fields(EngineStats):
        if field.name in unshown | composed:
            continue
        moved = dataclasses.replace(EngineStats(), **{field.name: 5})
        readers = [*metrics._GAUGES.values(), *metrics._COUNTERS.values()]
        assert any(read(moved) == 5 for _, read in readers), field.name
