"""Settings: what is refused, what crosses a process, what "auto" becomes."""

import dataclasses
from typing import Any

import pytest
from kvfold.core.config import (
    CacheSettings,
    Config,
    Hardware,
    ModelSettings,
    SchedulerSettings,
    ServerSettings,
    resolve,
)
from kvfold.core.errors import Refused

LARGE = 2**30


def test_a_config_crosses_as_json():
    config = Config(
        model=ModelSettings(path="/m", served_names=("a", "b"), max_len=7),
        cache=CacheSettings(options={"rank": 3}),
        server=ServerSettings(api_keys=("k",)),
    )
    assert Config.from_json(config.to_json()) == config


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"modle": {}}, "unknown config section 'modle'; there are model, cache"),
        ({"model": {"pth": ""}}, r"unknown setting model\.pth; section model has .*path"),
        ({"model": {"dtype": "int8"}}, "--dtype is 'int8'; it must be one of auto, float32"),
        ({"model": {"max_len": 0}}, "--max-model-len is 0; it must be at least 1"),
        ({"cache": {"options": {"dtype": "int8"}}}, "config.dtype: .* say --kv-cache-dtype"),
        ({"cache": {"dtype": "int2"}}, "--kv-cache-dtype is 'int2'; it must be one of auto, fp8"),
        ({"cache": {"page_size": 12}}, "--block-size is 12; it must be a multiple of 8"),
        ({"cache": {"memory_bytes": -1}}, "--kv-cache-memory-bytes is -1; it must be at least 1"),
        ({"cache": {"memory_share": 1.5}}, r"--gpu-memory-utilization is 1.5; .* \(0, 1\]"),
        ({"scheduler": {"policy": "lifo"}}, "--scheduling-policy is 'lifo'"),
        ({"scheduler": {"max_tokens": 8}}, r"--max-num-batched-tokens \(8\) is below .* \(64\)"),
        ({"server": {"api_keys": ["k", " "]}}, "an --api-key is empty"),
        ({"server": {"request_timeout_s": float("nan")}}, "--request-timeout is nan; .* finite"),
        ({"server": {"request_timeout_s": -5.0}}, r"--request-timeout is -5\.0"),
        ({"server": {"drain_s": float("inf")}}, "--shutdown-timeout is inf; it must be finite"),
        ({"server": {"port": 70000}}, "--port is 70000; it must be at most 65535"),
    ],
)
def test_refusals_name_the_flag_and_the_limit(sections: dict[str, Any], message: str):
    with pytest.raises(Refused, match=message):
        Config.from_dict(sections)


def test_every_setting_says_what_it_is_for():
    for section in (ModelSettings, CacheSettings, SchedulerSettings, ServerSettings):
        assert all(field.metadata["text"] for field in dataclasses.fields(section))


@pytest.mark.parametrize(
    ("device", "has_bfloat16", "stored", "n_bytes", "wanted", "dtype"),
    [
        ("cpu", True, "bfloat16", LARGE, "auto", "bfloat16"),
        ("cpu", True, "float16", LARGE, "auto", "bfloat16"),
        ("cpu", True, "float32", LARGE, "auto", "float32"),
        ("cpu", True, "bfloat16", 2**20, "auto", "float32"),
        ("cpu", True, "bfloat16", 2**20, "bfloat16", "bfloat16"),
        ("cpu", False, "bfloat16", LARGE, "auto", "float32"),
        ("cpu", False, "float16", LARGE, "auto", "float32"),
        ("cpu", False, "bfloat16", LARGE, "float16", "float16"),
        ("cuda", True, "float16", LARGE, "auto", "float16"),
        ("cuda", True, "bfloat16", 2**20, "auto", "bfloat16"),
    ],
)
def test_auto_disappears(
    device: str, has_bfloat16: bool, stored: str, n_bytes: int, wanted: str, dtype: str
):
    hardware = Hardware(
        device=device, name="", free_bytes=0, total_bytes=0, has_bfloat16=has_bfloat16
    )
    config = Config(model=ModelSettings(dtype=wanted))
    resolved = resolve(config, hardware, stored, n_bytes)
    assert (resolved.model.dtype, resolved.model.device) == (dtype, device)
    assert resolve(resolved, hardware, stored, n_bytes) == resolved


def test_8_bit_floats_need_hardware():
    hardware = Hardware(device="cuda", name="A100", free_bytes=0, total_bytes=0, has_bfloat16=True)
    config = Config(cache=CacheSettings(dtype="fp8"))
    with pytest.raises(Refused, match=r"fp8: A100 does not.*capability 8\.9"):
        resolve(config, hardware, "bfloat16", 0)
    newer = dataclasses.replace(hardware, has_float8=True)
    assert resolve(config, newer, "bfloat16", 0).cache.dtype == "fp8"


@pytest.mark.parametrize(
    ("device", "wanted", "overlaps"),
    [("cpu", None, False), ("cuda", None, True), ("cpu", True, True), ("cuda", False, False)],
)
def test_steps_overlap_where_the_host_would_wait(device: str, wanted: bool | None, overlaps: bool):
    hardware = Hardware(device=device, name="", free_bytes=0, total_bytes=0, has_bfloat16=True)
    config = Config(scheduler=SchedulerSettings(overlaps=wanted))
    assert resolve(config, hardware, "float32", 0).scheduler.overlaps is overlaps
