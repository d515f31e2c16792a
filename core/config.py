"""Settings of a server, as frozen dataclasses: composed, never inherited, never written back.

Each field says in its metadata what it is for; `server/cli.py` shows that text and a test keeps
flags and fields in step. The value "auto" disappears in `resolve`, once, in the engine process.
"""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .errors import Refused


def _text(default: Any, text: str) -> Any:
    return field(default=default, metadata={"text": text})


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSettings:
    """Which weights, and how they are held."""

    path: str = _text("", "directory or hub id; empty is the embedded demo model")
    served_names: tuple[str, ...] = _text((), "names that requests may use; default is the path")
    revision: str | None = _text(None, "hub revision")
    tokenizer: str | None = _text(None, "directory or hub id of the tokenizer, if not the model's")
    chat_template: str | None = _text(None, "file with a chat template that replaces the model's")
    dtype: str = _text("auto", "auto, float32, bfloat16 or float16")
    device: str = _text("auto", "auto, cpu or cuda")
    max_len: int | None = _text(None, "longest sequence in tokens; default is the model's own")
    eager: bool = _text(False, "launch every kernel anew instead of replaying CUDA graphs")
    seed: int = _text(0, "seed from which requests without one draw theirs")


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheSettings:
    """Where keys and values live."""

    kind: str = _text("dense", "dense, think, cskv or shadowkv, or a backend's module:Class")
    options: dict[str, Any] = field(
        default_factory=dict,
        metadata={"text": "the backend's own settings; --kv-cache-config.NAME VALUE states one"},
    )
    dtype: str = _text("auto", "auto, fp8, int8 or int4: how sealed keys and values are stored")
    page_size: int | None = _text(
        None,
        "tokens of a page; default is 64, but 32 for dense and think in int8 or int4, and 16 for "
        "cskv",
    )
    memory_bytes: int | None = _text(None, "bytes of the KV pool; default is a share of memory")
    host_bytes: int | None = _text(
        None, "bytes of host memory for sealed values; default is half of what is free"
    )
    memory_share: float = _text(0.9, "share of device memory for weights and KV pool together")
    prefix: bool = _text(True, "reuse the pages of equal prompt prefixes")
    probe: float = _text(
        0.0, "share of sealed prompts whose next step is repeated densely, to measure what is lost"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterSettings:
    """What requests may choose instead of the bare model."""

    modules: tuple[str, ...] = _text((), "adapters to serve, each as name=directory")
    max_rank: int = _text(64, "highest rank that an adapter may have")

    @property
    def paths(self) -> dict[str, str]:
        """Directory of each adapter by its name."""
        split = (module.partition("=") for module in self.modules)
        return {name: path for name, _, path in split}

    def check(self) -> None:
        """Refuse modules that name no directory, or a name twice."""
        for module in self.modules:
            name, _, path = module.partition("=")
            if not (name and path):
                raise Refused(f"--lora-modules {module!r} must be name=directory")
            if sum(other.startswith(f"{name}=") for other in self.modules) > 1:
                raise Refused(f"--lora-modules names {name!r} twice; drop one of them")


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerSettings:
    """How requests share a step."""

    max_sequences: int = _text(64, "sequences that run at the same time")
    max_tokens: int = _text(2048, "tokens that one step computes; longer prompts are chunked")
    policy: str = _text("fcfs", "fcfs or priority")
    max_queued: int = _text(
        1024, "sequences that may wait beside those that run; more are answered 429"
    )
    overlaps: bool | None = _text(
        None, "plan a step while the device computes the one before; default is on for cuda"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """The HTTP side."""

    host: str = _text("127.0.0.1", "address to bind")
    port: int = _text(8000, "port to bind")
    api_keys: tuple[str, ...] = _text((), "keys that clients must present; none leaves it open")
    in_process: bool = _text(False, "run the engine on a thread of the API process")
    strict_params: bool = _text(False, "refuse request keys that nobody knows")
    metrics_compat: str = _text("vllm", "vllm adds vllm:-named aliases, none does not")
    request_timeout_s: float = _text(600.0, "seconds after which a request is ended")
    drain_s: float = _text(30.0, "seconds that SIGTERM leaves open requests to finish")
    max_body_bytes: int = _text(16 * 2**20, "largest request body")
    allowed_origins: tuple[str, ...] = _text((), "origins that browsers may call from (CORS)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Everything that a server is told."""

    model: ModelSettings = field(default_factory=ModelSettings)
    cache: CacheSettings = field(default_factory=CacheSettings)
    adapters: AdapterSettings = field(default_factory=AdapterSettings)
    scheduler: SchedulerSettings = field(default_factory=SchedulerSettings)
    server: ServerSettings = field(default_factory=ServerSettings)

    def to_json(self) -> str:
        """The config as JSON text, for the engine process."""
        return json.dumps(dataclasses.asdict(self))

    @staticmethod
    def from_json(text: str) -> "Config":
        """The config that `to_json` wrote. Raises `Refused` on an unknown or ill-typed field."""
        return Config.from_dict(json.loads(text))

    @staticmethod
    def from_dict(sections: Mapping[str, Mapping[str, Any]]) -> "Config":
        """The config from nested dicts (a YAML file). Raises `Refused`, naming what is wrong."""
        kinds = {f.name: f.default_factory for f in dataclasses.fields(Config)}
        built: dict[str, Any] = {}
        for name, values in sections.items():
            if name not in kinds:
                raise Refused(f"unknown config section {name!r}; there are {', '.join(kinds)}")
            known = {f.name for f in dataclasses.fields(kinds[name])}  # type: ignore[arg-type]
            unknown = sorted(set(values) - known)
            if unknown:
                raise Refused(
                    f"unknown setting {name}.{unknown[0]}; section {name} has "
                    + ", ".join(sorted(known))
                )
            # JSON has no tuples; every sequence-valued setting is one.
            plain = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
            built[name] = kinds[name](**plain)  # type: ignore[operator]
        config = Config(**built)
        config.check()
        return config

    def check(self) -> None:
        """Refuse values that no hardware could make right, naming value, limit and fix."""
        one_of = (
            ("dtype", self.model.dtype, ("auto", "float32", "bfloat16", "float16")),
            ("device", self.model.device, ("auto", "cpu", "cuda")),
            ("scheduling-policy", self.scheduler.policy, ("fcfs", "priority")),
            ("kv-cache-dtype", self.cache.dtype, ("auto", "fp8", "int8", "int4")),
            ("metrics-compat", self.server.metrics_compat, ("vllm", "none")),
        )
        for flag, value, allowed in one_of:
            if value not in allowed:
                raise Refused(f"--{flag} is {value!r}; it must be one of {', '.join(allowed)}")
        self.adapters.check()
        at_least = (
            ("max-num-seqs", self.scheduler.max_sequences, 1),
            ("max-num-batched-tokens", self.scheduler.max_tokens, 1),
            ("max-queued-requests", self.scheduler.max_queued, 1),
            ("block-size", self.cache.page_size, 8),
            ("max-model-len", self.model.max_len, 1),
            ("max-lora-rank", self.adapters.max_rank, 1),
            ("kv-cache-memory-bytes", self.cache.memory_bytes, 1),
            ("kv-host-memory", self.cache.host_bytes, 1),
            ("port", self.server.port, 0),
            ("max-body-bytes", self.server.max_body_bytes, 1),
        )
        seconds = (
            ("request-timeout", self.server.request_timeout_s, 0.001),
            ("shutdown-timeout", self.server.drain_s, 0.0),
        )
        for flag, duration_s, least_s in seconds:
            if not least_s <= duration_s < float("inf"):
                raise Refused(
                    f"--{flag} is {duration_s}; it must be finite and at least {least_s} s"
                )
        if not all(key.strip() for key in self.server.api_keys):
            raise Refused(
                "an --api-key is empty, which would let everybody in; give a key or leave it out"
            )
        if self.server.port > 65535:
            raise Refused(f"--port is {self.server.port}; it must be at most 65535")
        for flag, number, least in at_least:
            if number is not None and number < least:
                raise Refused(f"--{flag} is {number}; it must be at least {least}")
        if self.scheduler.max_tokens < self.scheduler.max_sequences:
            raise Refused(
                f"--max-num-batched-tokens ({self.scheduler.max_tokens}) is below --max-num-seqs "
                f"({self.scheduler.max_sequences}): a step could not give every running sequence "
                "one token; raise the first or lower the second"
            )
        flags = {
            "prefix": "--enable-prefix-caching or --no-enable-prefix-caching",
            "dtype": "--kv-cache-dtype",
            "host_bytes": "--kv-host-memory",
        }
        for name in self.cache.options:
            if name in flags:
                raise Refused(
                    f"--kv-cache-config.{name}: no backend decides that; say {flags[name]}"
                )
        if (self.cache.page_size or 0) % 8:
            raise Refused(f"--block-size is {self.cache.page_size}; it must be a multiple of 8")
        if not 0.0 < self.cache.memory_share <= 1.0:
            raise Refused(
                f"--gpu-memory-utilization is {self.cache.memory_share}; it must be in (0, 1]"
            )
        if not 0.0 <= self.cache.probe <= 1.0:
            raise Refused(f"--kv-probe is {self.cache.probe}; it must be in [0, 1]")


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """What the engine process found to run on."""

    device: str
    """cpu or cuda."""
    name: str
    free_bytes: int
    """Memory of the device that is free before the model is loaded."""
    total_bytes: int
    has_bfloat16: bool
    """Whether bfloat16 matrix products run at full speed."""
    has_float8: bool = False
    """Whether 8-bit floats are converted in hardware."""
    host_free_bytes: int = 0
    """Memory of the host that is free before the model is loaded."""


HOST_SHARE = 0.5
"""Of free host memory for values, unless told otherwise: on a CPU the weights and the pool come out
of the rest."""
SMALL_BYTES = 64 * 2**20
"""Weights below this are not limited by memory bandwidth on any CPU."""


def resolve(
    config: Config, hardware: Hardware, checkpoint_dtype: str, checkpoint_bytes: int
) -> Config:
    """Replace every "auto" by what this hardware and this checkpoint make of it.

    The dtype is the checkpoint's, but on a CPU float32 where bfloat16 has no fast products, and for
    small models: they are no slower, and their greedy text then does not change when a prompt is
    chunked differently or found in the prefix cache. Raises `Refused` for what the hardware lacks.
    """
    model = config.model
    if config.cache.dtype == "fp8" and not hardware.has_float8:
        raise Refused(
            f"--kv-cache-dtype fp8: {hardware.name} does not convert 8-bit floats, which takes a "
            "CUDA device of compute capability 8.9 or higher; int8 takes as many bytes and runs "
            "everywhere",
            param="kv-cache-dtype",
        )
    device = hardware.device if model.device == "auto" else model.device
    dtype = model.dtype
    if dtype == "auto":
        dtype = checkpoint_dtype
        if device == "cpu":
            is_small = checkpoint_bytes < SMALL_BYTES
            dtype = "bfloat16" if hardware.has_bfloat16 and dtype == "float16" else dtype
            dtype = dtype if hardware.has_bfloat16 and not is_small else "float32"
    host_bytes = config.cache.host_bytes
    if host_bytes is None:
        host_bytes = int(hardware.host_free_bytes * HOST_SHARE)
    overlaps = config.scheduler.overlaps
    return dataclasses.replace(
        config,
        model=dataclasses.replace(model, dtype=dtype, device=device),
        cache=dataclasses.replace(config.cache, host_bytes=host_bytes),
        scheduler=dataclasses.replace(
            config.scheduler, overlaps=device == "cuda" if overlaps is None else overlaps
        ),
    )
