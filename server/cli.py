"""The `kvfold` command.

A setting comes from its flag, else from `KVFOLD_…` in the environment, else from `--config`, else
it has its default; `--dry-run` shows which. The heavy imports are inside the verbs.
"""

import dataclasses
import json
import re
import shlex
import sys
import typing
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from .. import __version__
from ..core.config import Config
from ..core.errors import KvfoldError, NotFound, Refused

_SUFFIXES = {"k": 10**3, "m": 10**6, "g": 10**9, "K": 2**10, "M": 2**20, "G": 2**30}
_SECTIONS: dict[str, Any] = {f.name: f.default_factory for f in dataclasses.fields(Config)}
_SETTINGS: dict[str, Any] = {
    f"{section}.{name}": hint
    for section, kind in _SECTIONS.items()
    for name, hint in typing.get_type_hints(kind).items()
}
"""Type of every setting, by section and name."""
_COUNTS = (int, int | None)
_HIDDEN = "server.api_keys"

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
calibrate = typer.Typer(
    help="Find out, once, what a backend wants to know of a model.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.add_typer(calibrate, name="calibrate")


def main() -> None:
    """The console entry."""
    app(spread_values(fold_dotted(sys.argv[1:])), prog_name="kvfold")


def fold_dotted(arguments: list[str]) -> list[str]:
    """`--kv-cache-config.field value` pairs as one JSON value, so that typer sees a known flag."""
    whole = "--kv-cache-config"
    folded: dict[str, Any] = {}
    rest = []
    pending = iter(arguments)
    for argument in pending:
        spelled, equals, value = argument.partition("=")
        if spelled != whole and not spelled.startswith(f"{whole}."):
            rest.append(argument)
            continue
        value = value if equals else next(pending, "")
        try:
            parsed = json.loads(value)
        except json.JSONDecodeError:
            parsed = value
        if spelled != whole:
            folded[spelled.removeprefix(f"{whole}.")] = parsed
        elif isinstance(parsed, dict):
            folded |= parsed
        else:
            # Not an object: the option itself refuses it.
            rest += [whole, value]
    return [*rest, whole, json.dumps(folded)] if folded else rest


def spread_values(arguments: list[str]) -> list[str]:
    """`--tokens 1k 8k` as `--tokens 1k --tokens 8k`: an option takes one value at a time.

    Adapters are spread alike. What follows a value of the option and looks like another is one,
    which a MODEL does not.
    """
    looks = {"--tokens": r"\d", "--lora-modules": r"[^-=./~][^=]*=."}
    spread: list[str] = []
    for argument in arguments:
        option = spread[-2] if len(spread) > 1 else ""
        if option in looks and re.match(looks[option], argument):
            spread.append(option)
        spread.append(argument)
    return spread


def count(text: str) -> int:
    """An integer as people write it: 4096, 1k = 1000, 1K = 1024, 25.6k = 25600, 2g, 2G."""
    number, factor = text, 1
    if text[-1:] in _SUFFIXES:
        number, factor = text[:-1], _SUFFIXES[text[-1]]
    try:
        value = float(number) * factor if "." in number else int(number) * factor
        whole = int(value)
    except (ValueError, OverflowError):
        raise typer.BadParameter(f"{text!r} is no number; write 4096, 4k, 4K or 4G") from None
    if value != whole:
        raise typer.BadParameter(f"{text!r} is no whole number")
    return whole


def flag(setting: str, *spellings: str, **more: Any) -> Any:
    """The option for a setting: its text from the config's metadata, its variable from its name."""
    section, name = setting.split(".")
    field = next(f for f in dataclasses.fields(_SECTIONS[section]) if f.name == name)
    main_spelling = spellings[0].partition("/")[0].removeprefix("--")
    return typer.Option(
        *spellings,
        help=field.metadata["text"],
        envvar="KVFOLD_" + main_spelling.upper().replace("-", "_"),
        rich_help_panel=section,
        show_default=False,
        **more,
    )


# What more than one verb takes.
ModelPath = Annotated[
    str | None,
    typer.Argument(metavar="[MODEL]", help="Directory or hub id; default is the demo model."),
]
Revision = Annotated[str | None, flag("model.revision", "--revision")]
Tokenizer = Annotated[str | None, flag("model.tokenizer", "--tokenizer")]
Dtype = Annotated[str | None, flag("model.dtype", "--dtype")]
Device = Annotated[str | None, flag("model.device", "--device")]
MaxLen = Annotated[int | None, flag("model.max_len", "--max-model-len", parser=count)]
CacheKind = Annotated[str | None, flag("cache.kind", "--kv-cache")]
CacheOptions = Annotated[str | None, flag("cache.options", "--kv-cache-config", metavar="JSON")]
CacheDtype = Annotated[str | None, flag("cache.dtype", "--kv-cache-dtype")]
PageSize = Annotated[int | None, flag("cache.page_size", "--block-size", parser=count)]
MemoryBytes = Annotated[
    int | None, flag("cache.memory_bytes", "--kv-cache-memory-bytes", parser=count)
]
HostBytes = Annotated[int | None, flag("cache.host_bytes", "--kv-host-memory", parser=count)]
MemoryShare = Annotated[float | None, flag("cache.memory_share", "--gpu-memory-utilization")]
MaxSequences = Annotated[
    int | None, flag("scheduler.max_sequences", "--max-num-seqs", parser=count)
]


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
) -> None:
    """An OpenAI-compatible LLM inference server that keeps only the KV cache that matters."""
    if version:
        typer.echo(f"kvfold {__version__}")
        raise typer.Exit


@app.command()
def serve(
    ctx: typer.Context,
    # The setting a parameter stands for is its name with the first underscore as a dot.
    model_path: ModelPath = None,
    model_served_names: Annotated[
        list[str] | None, flag("model.served_names", "--served-model-name")
    ] = None,
    model_revision: Revision = None,
    model_tokenizer: Tokenizer = None,
    model_chat_template: Annotated[
        str | None, flag("model.chat_template", "--chat-template")
    ] = None,
    model_dtype: Dtype = None,
    model_device: Device = None,
    model_max_len: MaxLen = None,
    model_eager: Annotated[
        bool | None, flag("model.eager", "--enforce-eager/--no-enforce-eager")
    ] = None,
    model_seed: Annotated[int | None, flag("model.seed", "--seed")] = None,
    cache_kind: CacheKind = None,
    cache_options: CacheOptions = None,
    cache_dtype: CacheDtype = None,
    cache_page_size: PageSize = None,
    cache_memory_bytes: MemoryBytes = None,
    cache_host_bytes: HostBytes = None,
    cache_memory_share: MemoryShare = None,
    cache_prefix: Annotated[
        bool | None,
        flag("cache.prefix", "--enable-prefix-caching/--no-enable-prefix-caching"),
    ] = None,
    cache_probe: Annotated[float | None, flag("cache.probe", "--kv-probe")] = None,
    adapters_modules: Annotated[
        list[str] | None, flag("adapters.modules", "--lora-modules", metavar="NAME=PATH")
    ] = None,
    adapters_max_rank: Annotated[
        int | None, flag("adapters.max_rank", "--max-lora-rank", parser=count)
    ] = None,
    scheduler_max_sequences: MaxSequences = None,
    scheduler_max_tokens: Annotated[
        int | None, flag("scheduler.max_tokens", "--max-num-batched-tokens", parser=count)
    ] = None,
    scheduler_max_queued: Annotated[
        int | None, flag("scheduler.max_queued", "--max-queued-requests", parser=count)
    ] = None,
    scheduler_policy: Annotated[str | None, flag("scheduler.policy", "--scheduling-policy")] = None,
    scheduler_overlaps: Annotated[
        bool | None,
        flag("scheduler.overlaps", "--async-scheduling/--no-async-scheduling"),
    ] = None,
    server_host: Annotated[str | None, flag("server.host", "--host")] = None,
    server_port: Annotated[int | None, flag("server.port", "--port")] = None,
    server_api_keys: Annotated[list[str] | None, flag("server.api_keys", "--api-key")] = None,
    server_in_process: Annotated[
        bool | None, flag("server.in_process", "--in-process/--no-in-process")
    ] = None,
    server_strict_params: Annotated[
        bool | None, flag("server.strict_params", "--strict-params/--no-strict-params")
    ] = None,
    server_metrics_compat: Annotated[
        str | None, flag("server.metrics_compat", "--metrics-compat")
    ] = None,
    server_request_timeout_s: Annotated[
        float | None, flag("server.request_timeout_s", "--request-timeout")
    ] = None,
    server_drain_s: Annotated[float | None, flag("server.drain_s", "--shutdown-timeout")] = None,
    server_max_body_bytes: Annotated[
        int | None, flag("server.max_body_bytes", "--max-body-bytes", parser=count)
    ] = None,
    server_allowed_origins: Annotated[
        list[str] | None, flag("server.allowed_origins", "--allowed-origins")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="YAML file with settings.", envvar="KVFOLD_CONFIG")
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Refused: kvfold never runs a model's code.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show every setting with its source and exit.")
    ] = False,
) -> None:
    """Serve MODEL, or without one the embedded demo model, over an OpenAI-compatible API."""
    with _refusals():
        if trust_remote_code:
            raise Refused(
                "--trust-remote-code is refused: kvfold has its own model implementations and "
                "never runs Python that comes with a checkpoint"
            )
        given, sources = _given(ctx)
        read = _read_file(config)
        for setting in read:
            sources.setdefault(setting, f"file {config}")
        settings = resolve(read | given)
        if dry_run:
            from ..engine.blueprint import chosen_backend

            chosen_backend(settings)
            _show(settings, sources)
            return
        from .launch import launch

        raise typer.Exit(launch(settings))


@app.command()
def plan(
    ctx: typer.Context,
    model_path: ModelPath = None,
    model_revision: Revision = None,
    model_dtype: Dtype = None,
    model_device: Device = None,
    model_max_len: MaxLen = None,
    cache_kind: CacheKind = None,
    cache_options: CacheOptions = None,
    cache_dtype: CacheDtype = None,
    cache_page_size: PageSize = None,
    cache_memory_bytes: MemoryBytes = None,
    cache_host_bytes: HostBytes = None,
    cache_memory_share: MemoryShare = None,
    scheduler_max_sequences: MaxSequences = None,
    tokens: Annotated[
        list[int] | None,
        typer.Option(parser=count, metavar="N...", help="Lengths of requests to fit."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what MODEL takes and how many requests fit, without loading it."""
    with _refusals():
        from .planning import plan as show

        given, _ = _given(ctx)
        show(Config.from_dict(_sections(given)), tokens or (), as_json=as_json)


@calibrate.command("cskv")
def calibrate_cskv(
    out: Annotated[Path, typer.Option(help="Directory to write the bases to.")],
    model_path: ModelPath = None,
    data: Annotated[
        list[Path] | None,
        typer.Option(help="File of text, several times for several; default is built-in text."),
    ] = None,
    n_tokens: Annotated[
        int | None, typer.Option(parser=count, help="Tokens to calibrate on; default is 64K.")
    ] = None,
    longest: Annotated[
        int | None, typer.Option(parser=count, help="Tokens of a sample, at most; default is 8K.")
    ] = None,
    keep: Annotated[
        float | None, typer.Option(help="Largest share that serving may keep; default is 0.5.")
    ] = None,
    key_metric: Annotated[
        str | None, typer.Option(help="What an error in keys costs: plain or queries.")
    ] = None,
    value_metric: Annotated[
        str | None, typer.Option(help="What an error in values costs: plain or output.")
    ] = None,
    groups: Annotated[
        int | None, typer.Option(help="Of heads with latents of their own, as serving has them.")
    ] = None,
    model_revision: Revision = None,
    model_dtype: Dtype = None,
    model_device: Device = None,
    model_tokenizer: Tokenizer = None,
) -> None:
    """Run MODEL over text, and write the bases for `--kv-cache cskv`."""
    with _refusals():
        from ..cache.cskv import CSKVConfig
        from ..engine.calibrate import calibrate_cskv as run

        given = {
            "data": data,
            "n_tokens": n_tokens,
            "longest": longest,
            "keep": keep,
            "key_metric": key_metric,
            "value_metric": value_metric,
            "groups": groups,
            "device": model_device,
            "dtype": model_dtype,
            "revision": model_revision,
            "tokenizer": model_tokenizer,
        }
        stated: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        found = run(model_path or "", out, **stated)
    typer.echo(f"{found.n_tokens:,} tokens seen; components of keys and values, layer by layer:")
    typer.echo(" ".join(f"{keys.rank}+{values.rank}" for keys, values in found.layers))
    served = CSKVConfig(artifact=str(out), groups=found.groups)
    wanted = {"artifact": shlex.quote(served.artifact)}
    if served.groups > 1:
        wanted["groups"] = str(served.groups)
    if keep is not None and keep < served.keep:
        wanted["keep"] = f"{keep:g}"
    settings = " ".join(f"--kv-cache-config.{name} {value}" for name, value in wanted.items())
    typer.echo(f"serve with: --kv-cache cskv {settings}")


@contextmanager
def _refusals() -> Iterator[None]:
    """End the command with one line and an exit code for what is refused."""
    try:
        yield
    except (Refused, NotFound, typer.BadParameter) as error:
        typer.echo(f"kvfold: {error.message}", err=True)
        raise typer.Exit(2) from None
    except KvfoldError as error:
        typer.echo(f"kvfold: {error.message}", err=True)
        raise typer.Exit(1) from None


def _given(ctx: typer.Context) -> tuple[dict[str, Any], dict[str, str]]:
    """The settings that flags and environment state, and which of the two did."""
    given, sources = {}, {}
    for name, value in ctx.params.items():
        source = ctx.get_parameter_source(name)
        setting = name.replace("_", ".", 1)
        kind = "" if source is None else source.name
        if kind not in ("COMMANDLINE", "ENVIRONMENT") or setting not in _SETTINGS:
            continue
        if setting == "cache.options":
            value = _json_object(value)
        elif setting == "model.served_names":
            value = [part for text in value for part in text.split()]
        given[setting] = value
        sources[setting] = "flag" if kind == "COMMANDLINE" else "environment"
    return given, sources


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = None
    if not isinstance(value, dict):
        raise Refused(f"--kv-cache-config must be a JSON object, not {text[:100]!r}")
    return value


def _read_file(path: Path | None) -> dict[str, Any]:
    """The settings of a YAML file: sections of `Config`, or flags by their names."""
    if path is None:
        return {}
    import yaml

    try:
        content = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        # Its message quotes the file, which may hold keys.
        mark = getattr(error, "problem_mark", None)
        where = "" if mark is None else f": line {mark.line + 1}, column {mark.column + 1}"
        raise Refused(f"--config {path} is not valid YAML{where}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise Refused(f"--config {path} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise Refused(f"--config {path} must hold a mapping")
    settings: dict[str, Any] = {}
    for key, value in content.items():
        if key in _SECTIONS and isinstance(value, dict):
            settings |= {f"{key}.{name}": inner for name, inner in value.items()}
        elif key == "model":
            settings["model.path"] = value
        elif (name := str(key).replace("_", "-")) in flags():
            settings[flags()[name]] = value
        else:
            raise Refused(f"--config {path}: unknown setting {key!r}")
    return settings


def flags() -> dict[str, str]:
    """The setting behind each flag of `serve`, by the flag's long name."""
    command = typer.main.get_group(app).commands["serve"]
    return {
        option.removeprefix("--"): setting
        for parameter in command.params
        if (setting := parameter.name.replace("_", ".", 1)) in _SETTINGS
        for option in parameter.opts
        if option.startswith("--")
    }


def resolve(settings: Mapping[str, Any]) -> Config:
    """The config that the stated settings make. Raises `Refused` on a wrong name, type or value."""
    from pydantic import TypeAdapter, ValidationError

    typed = {}
    for setting, value in settings.items():
        if (hint := _SETTINGS.get(setting)) is not None:
            if hint == tuple[str, ...] and not isinstance(value, list | tuple):
                value = (value,)
            try:
                if isinstance(value, str) and hint in _COUNTS:
                    value = count(value)
                value = TypeAdapter(hint).validate_python(value)
            except typer.BadParameter as invalid:
                raise Refused(f"{setting}: {invalid.message}") from None
            except ValidationError as invalid:
                shown = "wrong" if setting == _HIDDEN else repr(value)
                raise Refused(f"{setting} is {shown}: {invalid.errors()[0]['msg']}") from None
        typed[setting] = value
    return Config.from_dict(_sections(typed))


def _sections(settings: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    sections: dict[str, dict[str, Any]] = {}
    for setting, value in settings.items():
        section, _, name = setting.partition(".")
        sections.setdefault(section, {})[name] = value
    return sections


def _show(config: Config, sources: Mapping[str, str]) -> None:
    """Print every setting with its value and where that came from."""
    for setting in _SETTINGS:
        section, name = setting.split(".")
        value = getattr(getattr(config, section), name)
        shown = f"<{len(value)} hidden>" if setting == _HIDDEN and value else json.dumps(value)
        typer.echo(f"{setting:28} {shown:32} {sources.get(setting, 'default')}")
