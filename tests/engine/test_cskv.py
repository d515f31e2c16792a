"""Requests on CSKV: where its bases come from, and prompts that read latents."""

import json
import logging
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from kvfold.core.config import CacheSettings, Config, ModelSettings
from kvfold.core.errors import Refused
from kvfold.core.sequence import Request, SamplingParams
from kvfold.demo.generate import make_task
from kvfold.demo.where import model_dir
from kvfold.engine import calibrate
from kvfold.engine.engine import Engine
from kvfold.engine.forecast import forecast
from kvfold.engine.text import Text

NOTHING = {"full": 0, "folded": 0}


def prompt(n: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(3, 97) for _ in range(n)]


def inexact(**options: Any) -> dict[str, Any]:
    return {"kind": "cskv", "options": {"exact_prefill": False, **options}}


def test_the_demo_model_is_calibrated_as_it_starts(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    """And then still knows, of a document of which a fifth is kept, what it is asked."""
    monkeypatch.setattr(calibrate, "_BRIEF_TOKENS", 2048)
    config = Config(
        model=ModelSettings(device="cpu", dtype="float32", max_len=1024),
        cache=CacheSettings(kind="cskv", dtype="int8", memory_bytes=2**25),
    )
    with caplog.at_level(logging.WARNING, logger="kvfold.engine.calibrate"):
        engine = Engine(config)
    assert "calibrating on 2048 tokens of built-in text; `kvfold calibrate cskv" in caplog.text
    told = forecast(config).backends[0]
    assert (told.n_pages, told.kv_bytes) == (engine.info.n_pages, engine.info.kv_bytes)
    kept = engine.stats().kv_kept
    assert 0.3 < kept["keys"] + kept["values"] <= 0.4
    text = Text.load(str(model_dir()))
    task = make_task(7, 600, "single", "heldout")
    question = [{"role": "user", "content": f"{task.document}\n{task.question}"}]
    asked = text.chat_ids(question, add_generation_prompt=True)
    stop = tuple(engine.info.eos_ids)
    sampling = SamplingParams(max_tokens=20, temperature=0, stop_token_ids=stop)
    engine.add(Request(id="r", prompt=tuple(asked), sampling=sampling))
    said = []
    while engine.has_work:
        said += [token for output in engine.step() for token in output.tokens]
    assert text.decode(said[:-1]).strip() == task.answer


def test_bases_of_another_model_are_refused(engine_of: Callable, artifact: Path, tmp_path: Path):
    for file in artifact.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    facts = json.loads((tmp_path / "basis.json").read_text())
    (tmp_path / "basis.json").write_text(json.dumps({**facts, "identity": "another"}))
    with pytest.raises(Refused, match="it was made for another model: 2 layers, fingerprint anoth"):
        engine_of(cache={"kind": "cskv", "options": {"artifact": str(tmp_path)}})


def test_what_prompts_read_cannot_be_probed(engine_of: Callable):
    with pytest.raises(Refused, match=r"--kv-probe 0\.5: --kv-cache cskv .* nothing to measure"):
        engine_of(cache={**inexact(), "probe": 0.5})


@pytest.mark.parametrize("recent", [0, 32])
@pytest.mark.parametrize("overlaps", [False, True])
def test_an_equal_prefix_reads_latents_if_it_need_not_be_exact(
    engine_of: Callable, overlaps: bool, recent: int
):
    one = engine_of(cache=inexact(keep=0.5, recent=recent), max_tokens=64, overlaps=overlaps)
    for name in ("first", "again"):
        one.add(name, prompt(200), max_tokens=30)
        one.run()
    assert one.engine.stats().prefix_hits == 192
    # A second turn, with what was generated.
    n_hits = 192
    turn = [*prompt(200), *one.tokens("first"), *prompt(20, seed=1)]
    one.add("turn", turn, max_tokens=3)
    one.run()
    assert one.engine.stats().prefix_hits - n_hits > 200
    # Tokens fold before the full page they are in is known to be full.
    assert not one.engine._cache._index.holds(0)
    assert one.engine.stats().kv_bytes == NOTHING


@pytest.mark.parametrize("seed", range(3))
def test_mixed_traffic_returns_every_page_if_prompts_read_latents(engine_of: Callable, seed: int):
    rng = random.Random(seed)
    mode = rng.choice([{}, {"mode": "selective", "budget": 32}])
    cache = inexact(recent=rng.choice([0, 32]), **mode)
    one = engine_of(pages=17, max_tokens=rng.choice([33, 64]), cache=cache, overlaps=seed != 1)
    shared = prompt(150, seed)
    alive = []
    for i in range(30):
        if rng.random() < 0.6:
            alive.append(f"r{i}")
            wish = {"n": rng.choice([1, 1, 3]), "max_tokens": rng.choice([30, 80]), "seed": i}
            one.add(
                alive[-1],
                shared[: rng.randint(1, 150)] + prompt(rng.randint(1, 70), seed=i),
                temperature=1.0,
                **wish,
            )
        if alive and rng.random() < 0.3:
            one.engine.abort(alive.pop(rng.randrange(len(alive))))
            one.engine.check()
        if one.engine.has_work:
            one.step()
    one.run()
    stats = one.engine.stats()
    assert stats.kv_bytes == NOTHING
    assert stats.kv_tokens == 0
    assert stats.n_preempted > 0
    assert stats.prefix_hits > 0
