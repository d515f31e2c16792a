"""A tiny random checkpoint, and an engine on it that can be driven by hand."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from kvfold.core.config import CacheSettings, Config, ModelSettings, SchedulerSettings
from kvfold.core.sequence import Output, Request, SamplingParams
from kvfold.engine import engine
from kvfold.engine.blueprint import Blueprint
from kvfold.engine.calibrate import calibrate
from kvfold.engine.device import Device
from kvfold.engine.engine import Engine
from kvfold.models.loader import load


@pytest.fixture(scope="session")
def checkpoint(tiny_llama: Callable[[int], Path]) -> Path:
    return tiny_llama(16)


@pytest.fixture(scope="session")
def wide_checkpoint(tiny_llama: Callable[[int], Path]) -> Path:
    """With heads wide enough to lose channels."""
    return tiny_llama(32)


@pytest.fixture(scope="session")
def artifact(wide_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What CSKV wants to know of the wide checkpoint."""
    folder = tmp_path_factory.mktemp("artifact")
    settings = ModelSettings(path=str(wide_checkpoint), device="cpu", dtype="float32")
    spec = Blueprint.of(Config(model=settings)).spec
    model = load(wide_checkpoint, spec.dtype, spec.device, spec.max_len)
    generator = torch.Generator().manual_seed(1)
    samples = [torch.randint(3, 97, (400,), generator=generator).tolist() for _ in range(3)]
    calibrate(model, samples, spec, Device(spec.device), n_tokens=1200).write(folder)
    return folder


class Driver:
    """An engine and what it has said so far."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.outputs: dict[tuple[str, int], list[Output]] = {}
        self.n_steps = 0

    def add(self, request_id: str, prompt: list[int], **sampling: Any) -> None:
        fields = {"priority", "salt"} & set(sampling)
        extra = {name: sampling.pop(name) for name in fields}
        params = SamplingParams(**{"max_tokens": 16, "temperature": 0.0, **sampling})
        self.engine.add(Request(id=request_id, prompt=tuple(prompt), sampling=params, **extra))

    def step(self) -> None:
        for output in self.engine.step():
            self.outputs.setdefault((output.id, output.index), []).append(output)
        self.n_steps += 1
        self.engine.check()

    def run(self) -> None:
        """Step until nothing is left; a bound turns a hang into a failure."""
        for _ in range(5000):
            if not self.engine.has_work:
                return
            self.step()
        raise AssertionError("the engine never finishes")

    def tokens(self, request_id: str, index: int = 0) -> list[int]:
        return [t for output in self.outputs[request_id, index] for t in output.tokens]


Make = Callable[..., Driver]


@pytest.fixture
def engine_of(checkpoint: Path, wide_checkpoint: Path, artifact: Path) -> Make:
    """Build an engine; keyword arguments beyond those named are scheduler settings.

    `cache` are further settings of the cache, which then gets the wide checkpoint, and CSKV the
    artifact for it.
    """

    def make(
        pages: int = 200,
        page_size: int | None = 16,
        prefix: bool = True,
        max_len: int = 256,
        kind: str = "dense",
        eager: bool = False,
        cache: dict[str, Any] | None = None,
        **settings: Any,
    ) -> Driver:
        head_dim, path = (16, checkpoint) if cache is None else (32, wide_checkpoint)
        if cache and cache["kind"] in ("cskv", "table_cache:TableCSKV"):
            cache = {**cache, "options": {"artifact": str(artifact), **cache.get("options", {})}}
        bytes_per_page = 2 * 2 * 2 * head_dim * 4 * (page_size or 64)
        config = Config(
            model=ModelSettings(
                path=str(path),
                dtype="float32",
                device="cpu",
                max_len=max_len,
                eager=eager,
            ),
            cache=CacheSettings(
                **{"kind": kind, **(cache or {})},
                page_size=page_size,
                memory_bytes=(pages + 1) * bytes_per_page,
                prefix=prefix,
            ),
            scheduler=SchedulerSettings(**{"max_sequences": 32, "max_tokens": 256, **settings}),
        )
        return Driver(Engine(config))

    return make


@pytest.fixture
def far_engine_of(engine_of: Make, monkeypatch: pytest.MonkeyPatch) -> Make:
    """The same, for an engine that works as on a device of its own; decode steps are replayed."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    from table_cache import FarDevice

    def make(**settings: Any) -> Driver:
        with monkeypatch.context() as patch:
            patch.setattr(engine, "open_device", lambda name: FarDevice(torch.device(name)))
            return engine_of(**{"kind": "table_cache:TableCache", **settings})

    return make


@pytest.fixture(params=[False, True], ids=["one-by-one", "overlapped"])
def driver(engine_of: Make, request: pytest.FixtureRequest) -> Make:
    """The same, in both modes: whatever holds for an engine holds when its steps overlap."""
    return partial(engine_of, overlaps=request.param)
