"""The command line: every setting has its flag, and every value its source."""

import dataclasses
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from kvfold.cache.registry import BACKENDS
from kvfold.core.config import CacheSettings, Config
from kvfold.core.errors import Refused
from kvfold.server import cli
from typer.testing import CliRunner, Result

# vLLM's spelling where the meaning is the same.
FLAGS = {
    "model.path": "MODEL",
    "model.served_names": "--served-model-name",
    "model.revision": "--revision",
    "model.tokenizer": "--tokenizer",
    "model.chat_template": "--chat-template",
    "model.dtype": "--dtype",
    "model.device": "--device",
    "model.max_len": "--max-model-len",
    "model.eager": "--enforce-eager",
    "model.seed": "--seed",
    "cache.kind": "--kv-cache",
    "cache.options": "--kv-cache-config",
    "cache.dtype": "--kv-cache-dtype",
    "cache.page_size": "--block-size",
    "cache.memory_bytes": "--kv-cache-memory-bytes",
    "cache.host_bytes": "--kv-host-memory",
    "cache.memory_share": "--gpu-memory-utilization",
    "cache.prefix": "--enable-prefix-caching",
    "cache.probe": "--kv-probe",
    "adapters.modules": "--lora-modules",
    "adapters.max_rank": "--max-lora-rank",
    "scheduler.max_sequences": "--max-num-seqs",
    "scheduler.max_tokens": "--max-num-batched-tokens",
    "scheduler.policy": "--scheduling-policy",
    "scheduler.max_queued": "--max-queued-requests",
    "scheduler.overlaps": "--async-scheduling",
    "server.host": "--host",
    "server.port": "--port",
    "server.api_keys": "--api-key",
    "server.in_process": "--in-process",
    "server.strict_params": "--strict-params",
    "server.metrics_compat": "--metrics-compat",
    "server.request_timeout_s": "--request-timeout",
    "server.drain_s": "--shutdown-timeout",
    "server.max_body_bytes": "--max-body-bytes",
    "server.allowed_origins": "--allowed-origins",
}


def serve(*arguments: str, env: dict[str, str] | None = None) -> Result:
    return CliRunner().invoke(cli.app, cli.fold_dotted(["serve", *arguments]), env=env)


def shown(*arguments: str, env: dict[str, str] | None = None) -> dict[str, tuple[str, str]]:
    """Value and source of each setting, as --dry-run prints them."""
    result = serve("--dry-run", *arguments, env=env)
    assert result.exit_code == 0, result.output
    lines = [line.split(maxsplit=1) for line in result.output.splitlines()]
    return {name: tuple(rest.rsplit("  ", 1)) for name, rest in lines}


def test_flags_and_settings_are_in_step() -> None:
    settings = {
        f"{section.name}.{field.name}"
        for section in dataclasses.fields(Config)
        for field in dataclasses.fields(section.default_factory)
    }
    assert settings == set(FLAGS)
    by_flag = cli.flags()
    for setting, flag in FLAGS.items():
        if flag != "MODEL":
            assert by_flag[flag.removeprefix("--")] == setting
    assert set(by_flag.values()) == settings - {"model.path"}


def test_flag_beats_environment_beats_file_beats_default(tmp_path: Path) -> None:
    file = tmp_path / "kvfold.yaml"
    file.write_text(
        "model: somewhere\nserver: {port: 1, drain_s: 3}\nmax-model-len: 4K\nmax_num_seqs: 5\n"
    )
    env = {"KVFOLD_PORT": "2", "KVFOLD_MAX_NUM_SEQS": "6"}
    values = shown("--config", str(file), "--port", "3", env=env)
    values = {name: (value.strip(), source.strip()) for name, (value, source) in values.items()}
    assert values["model.path"] == ('"somewhere"', f"file {file}")
    assert values["server.port"] == ("3", "flag")
    assert values["scheduler.max_sequences"] == ("6", "environment")
    assert values["model.max_len"] == ("4096", f"file {file}")
    assert values["server.drain_s"] == ("3.0", f"file {file}")
    assert values["server.host"] == ('"127.0.0.1"', "default")


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (("--kv-probe", "0.5"), "--kv-probe 0.5"),
        (("--kv-cache", "think", "--kv-cache-config.prune_ratio", "1.5"), "1.5"),
    ],
)
def test_a_dry_run_refuses_what_serving_would(flags: tuple[str, ...], text: str) -> None:
    result = serve("--dry-run", *flags)
    assert result.exit_code == 2
    assert text in result.output


def test_lists_json_and_dots() -> None:
    values = shown(
        *("--served-model-name", "a b", "--served-model-name", "c", "--api-key", "secret"),
        *(
            "--kv-cache=cskv",
            "--kv-cache-config.keep",
            "0.5",
            "--kv-cache-config.mode=exact",
            "--no-enable-prefix-caching",
        ),
    )
    values = {name: (value.strip(), source) for name, (value, source) in values.items()}
    assert values["model.served_names"][0] == '["a", "b", "c"]'
    assert values["cache.options"][0] == '{"keep": 0.5, "mode": "exact"}'
    assert values["cache.prefix"][0] == "false"
    assert "secret" not in str(values)
    both = cli.fold_dotted(["--kv-cache-config", '{"a": 1}', "--kv-cache-config.b", "2", "rest"])
    assert both == ["rest", "--kv-cache-config", '{"a": 1, "b": 2}']


@pytest.mark.parametrize(
    ("text", "number"),
    [("7", 7), ("1k", 1000), ("1K", 1024), ("25.6k", 25600), ("2g", 2 * 10**9), ("2G", 2**31)],
)
def test_counts(text: str, number: int) -> None:
    assert cli.count(text) == number


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--trust-remote-code"], "never runs"),
        (["--port", "x"], "port"),
        (["--port", "70000"], "70000"),
        (["--max-model-len", "1.5"], "whole"),
        (["--max-model-len", "many"], "4096"),
        (["--max-num-seqs", "0"], "at least 1"),
        (["--kv-probe", "2"], "--kv-probe is 2.0; it must be in [0, 1]"),
        (["--dtype", "int3"], "float32"),
        (["--kv-cache-config", "[1]"], "JSON object"),
        (["--kv-cache-config.prefix", "true"], "--no-enable-prefix-caching"),
        (["--no-such-flag"], "no-such-flag"),
        (["--config", "/nonexistent.yaml"], "nonexistent"),
        (["/nonexistent/model"], "nonexistent"),
        (["--chat-template", "/nonexistent"], "nonexistent"),
        (["--tokenizer", "/nonexistent/tokenizer"], "no directory /nonexistent/tokenizer"),
        (["--max-model-len", "1e999.0"], "4096"),
    ],
)
def test_wrong_settings_are_one_line_and_exit_code_2(arguments: list[str], says: str) -> None:
    result = serve(*arguments)
    assert result.exit_code == 2, result.output
    assert says in result.output
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    "content",
    [
        "- a list",
        "nonsense: 1",
        "server: {nonsense: 1}",
        "server: {port: abc}",
        "port: [",
        "server: {host: 5}",
    ],
)
def test_wrong_files(tmp_path: Path, content: str) -> None:
    file = tmp_path / "kvfold.yaml"
    file.write_text(content)
    result = serve("--dry-run", "--config", str(file))
    assert result.exit_code == 2, result.output
    assert len(result.output.strip().splitlines()) == 1


@pytest.mark.parametrize(
    "content",
    [
        "api_keys: [sk-hidden",
        "api_keys: *sk-hidden",
        "api_keys: !sk-hidden x",
        "api-key: {sk-hidden: [}",
        "server: {api_keys: {sk-hidden: 1}}",
        "server: {api_keys: [[sk-hidden]]}",
        "api-key: [sk-hidden, 5]",
    ],
)
def test_wrong_files_never_show_a_key(tmp_path: Path, content: str) -> None:
    file = tmp_path / "kvfold.yaml"
    file.write_text(content)
    result = serve("--dry-run", "--config", str(file))
    assert result.exit_code == 2, result.output
    assert "hidden" not in result.output
    assert "api_keys" in result.output or "line 1, column" in result.output


def test_adapters_follow_each_other_and_a_model_is_none() -> None:
    asked = ["serve", "--dry-run", "--lora-modules", "a=/x", "b=/y z", "./org/step=3"]
    result = CliRunner().invoke(cli.app, cli.spread_values(asked))
    assert re.search(r'adapters.modules +\["a=/x", "b=/y z"\] +flag', result.output)
    assert re.search(r'model.path +"./org/step=3"', result.output)


def test_help_names_every_backend() -> None:
    (kind,) = (f for f in dataclasses.fields(CacheSettings) if f.name == "kind")
    assert set(BACKENDS) < set(re.findall(r"\w+", kind.metadata["text"]))


def test_a_list_of_one_may_be_written_without_brackets(tmp_path: Path) -> None:
    file = tmp_path / "kvfold.yaml"
    file.write_text("api-key: x\nserver: {allowed_origins: 'http://a'}\nserved_model_name: m\n")
    values = shown("--config", str(file))
    assert values["server.api_keys"][0].strip() == "<1 hidden>"
    assert values["server.allowed_origins"][0].strip() == '["http://a"]'
    assert values["model.served_names"][0].strip() == '["m"]'


def test_numbers_in_files_are_refused_by_the_name_of_their_setting(tmp_path: Path) -> None:
    file = tmp_path / "kvfold.yaml"
    file.write_text("max-num-seqs: many")
    assert "scheduler.max_sequences" in serve("--dry-run", "--config", str(file)).output


def test_version() -> None:
    result = CliRunner().invoke(cli.app, ["--version"])
    assert result.output.startswith("kvfold 0.")


def test_settings_refuse_by_name() -> None:
    with pytest.raises(Refused, match=r"cache\.nonsense"):
        cli.resolve({"cache.nonsense": 1})


def test_api_process_and_command_line_stay_light() -> None:
    program = (
        "import sys, kvfold.server.cli; light = set(sys.modules);"
        "import kvfold.server.app, kvfold.server.launch;"
        "print(sorted({'fastapi', 'uvicorn', 'pydantic', 'orjson'} & light),"
        "sorted({'torch', 'transformers', 'triton'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[] []"


def test_calibrate_writes_what_serving_reads(tmp_path: Path):
    small = ["--n-tokens", "1k", "--longest", "512", "--keep", "0.3", "--device", "cpu"]
    out = tmp_path / "bases"
    result = CliRunner().invoke(cli.app, ["calibrate", "cskv", "--out", str(out), *small])
    assert result.exit_code == 0, result.output
    assert "1,000 tokens seen" in result.output
    assert f"--kv-cache-config.artifact {out}" in result.output
    settings = ["--kv-cache", "cskv", f"--kv-cache-config.artifact={out}"]
    assert "cskv" in plan(*SMALL, *settings, "--tokens", "1K").output
    refused = plan(*SMALL, *settings, "--kv-cache-config.keep=0.8")
    assert refused.exit_code == 2
    assert "keep: 0.8 is more than the bases hold, which is 0.2969" in refused.output


def test_calibrate_says_what_serving_accepts(tmp_path: Path):
    small = ["--n-tokens", "600", "--longest", "512", "--keep", "0.1", "--groups", "2"]
    out = tmp_path / "of a model"
    arguments = ["calibrate", "cskv", "--out", str(out), *small, "--device", "cpu"]
    told = CliRunner().invoke(cli.app, arguments).output.splitlines()[-1]
    settings = shlex.split(told.removeprefix("serve with: "))
    result = plan(*SMALL, *settings, "--tokens", "1K")
    assert result.exit_code == 0, result.output


def test_calibrate_refuses_as_serving_does(tmp_path: Path):
    arguments = ["calibrate", "cskv", "--out", str(tmp_path), "--data", str(tmp_path / "none")]
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 2
    assert result.output.startswith("kvfold: --data: ")


def plan(*arguments: str) -> Result:
    spread = cli.spread_values(cli.fold_dotted(["plan", *arguments]))
    return CliRunner().invoke(cli.app, spread)


SMALL = ("--device", "cpu", "--kv-cache-memory-bytes", "64M", "--max-model-len", "4K")


def test_plan_compares_a_backend_with_dense() -> None:
    result = plan(*SMALL, "--kv-cache", "think", "--kv-cache-dtype", "int8", "--tokens", "1K", "2K")
    assert result.exit_code == 0, result.output
    rows = {line[:24].strip(): line.split()[-2:] for line in result.output.splitlines()}
    header = next(line for line in result.output.splitlines() if line.endswith("dense"))
    assert header.split() == ["think", "int8", "dense"]
    folded, dense = map(int, rows["requests of 2,048: seale"])
    assert folded > 2 * dense
    assert rows["requests of 2,048: being"][1] == str(dense)
    assert "requests of 1,024: seale" in rows


@pytest.mark.parametrize(
    ("settings", "page", "channels"),
    [
        (("think",), "85 tokens", "32 of keys, 64 of values"),
        (
            ("think", "--kv-cache-config.value_prune_ratio=0.5"),
            "128 tokens",
            "32 of keys, 32 of values",
        ),
        (("think", "--kv-cache-config.prune_ratio=0.01"), "nothing folds", None),
        (("cskv", "--kv-cache-config.keep=0.95"), "nothing folds", None),
    ],
)
def test_plan_says_what_folds_and_what_is_kept(
    settings: tuple[str, ...], page: str, channels: str | None
) -> None:
    said = plan(*SMALL, "--kv-cache", *settings).output
    rows = {cells[0]: cells[1:] for line in said.splitlines() if (cells := split(line))}
    assert rows["a folded page"] == [page, "nothing folds"]
    assert rows.get("channels kept") == (channels and [channels, "all"])
    told = json.loads(plan(*SMALL, "--kv-cache", *settings, "--json").output)["backends"][0]
    assert (told["folded_tokens"] > 0) == (page != "nothing folds")
    assert bool(told["kept_channels"]) == (channels is not None)


def split(row: str) -> list[str]:
    return re.split(r"\s{2,}", row.strip())


SHADOW = (
    *("--kv-cache", "shadowkv", "--kv-cache-config.threshold", "1024"),
    *("--kv-cache-config.budget", "256", "--kv-cache-config.outliers", "8"),
    *("--kv-cache-config.rank", "32"),
)


@pytest.mark.parametrize(("memory", "limit"), [("1G", "device"), ("20M", "host")])
def test_plan_says_what_is_in_host_memory(memory: str, limit: str) -> None:
    result = plan(*SMALL, *SHADOW, "--kv-host-memory", memory, "--tokens", "4K")
    assert result.exit_code == 0, result.output
    rows = {line[:32].strip(): line.split() for line in result.output.splitlines()}
    shown, nothing = rows["host memory"][2::2]
    assert 0 < int(shown.replace(",", "")) <= cli.count(memory)
    assert nothing == "0"
    row = next(line for line in result.output.splitlines() if "limited by" in line)
    assert row.split()[-4:] == [limit, "memory", "device", "memory"]


def test_plan_tells_programs_the_same() -> None:
    told = json.loads(plan(*SMALL, "--json", "--tokens", "1K").output)
    (dense,) = told["backends"]
    assert dense["kv_bytes"] == dense["n_pages"] * 64 * dense["bytes_per_full_token"] <= 64 * 2**20
    assert [fit["n_tokens"] for fit in dense["fits"]] == [1024]
    assert told["max_len"] == 4096


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["/nonexistent/model"], "nonexistent"),
        (["--kv-cache", "thin"], "did you mean think"),
        (["--kv-cache", "think", "--kv-cache-config.ratio", "1"], "prune_ratio"),
        (["--tokens", "8K"], "--tokens 8,192"),
        (["--tokens", "many"], "write 4096"),
        (["--kv-cache-memory-bytes", "1"], "--kv-cache-memory-bytes"),
        (["--block-size", "12"], "multiple of 8"),
        (["--kv-host-memory", "1G"], "--kv-cache dense, with these settings, keeps nothing"),
        (["--kv-cache", "shadowkv", "--kv-cache-config.host_bytes", "1"], "--kv-host-memory"),
        (
            [*SHADOW, "--kv-host-memory", "1M"],
            "holds 0 pages of values, but one sequence of --max-model-len 4,096 needs",
        ),
    ],
)
def test_plan_refuses_as_serve_does(arguments: list[str], says: str) -> None:
    result = plan(*SMALL, *arguments)
    assert result.exit_code == 2, result.output
    assert says in result.output
    assert "Traceback" not in result.output


HTTP = ("fastapi", "starlette", "uvicorn", "orjson", "msgspec")


@pytest.mark.parametrize(
    ("absent", "code"),
    [
        # typer itself coerces values with pydantic, where it can.
        (HTTP, "from kvfold.server import cli; cli.main()"),
        (
            (*HTTP, "pydantic"),
            "from kvfold.core.config import Config; from kvfold.server.planning import plan;"
            "plan(Config.from_dict({'model': {'device': 'cpu'}}), [1024, 4096], as_json=False)",
        ),
    ],
)
def test_plan_needs_no_http_stack(absent: tuple[str, ...], code: str) -> None:
    program = f"import sys; sys.modules.update(dict.fromkeys({absent})); {code}"
    command = [sys.executable, "-c", program, "plan", *SMALL, "--tokens", "1K", "4K"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "requests of 4,096: sealed" in done.stdout
