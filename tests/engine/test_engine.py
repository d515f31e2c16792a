"""Whatever the neighbours do, a request gets its own tokens, and every page comes back."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from kvfold.cache.base import KVCache
from kvfold.cache.prefix import PrefixIndex
from kvfold.core.batch import Batch
from kvfold.core.errors import NotFound, Refused, TooLong
from kvfold.core.faults import InjectedFault, arm
from kvfold.core.sequence import FinishReason, Request, SamplingParams
from kvfold.engine.scheduler import SCORED_TOKENS
from kvfold.models.transformer import Decoder
from transformers import LlamaForCausalLM


def prompts(n: int, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(3, 97) for _ in range(rng.randint(1, 90))] for _ in range(n)]


@pytest.fixture(scope="module")
def greedy(checkpoint: Path) -> list[list[int]]:
    """What Hugging Face generates for the prompts, one at a time."""
    model = LlamaForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    found = []
    for prompt in prompts(32):
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False
            )
        found.append(out[0, len(prompt) :].tolist())
    return found


def check_greedy(driver, greedy: list[list[int]], **sampling) -> None:
    for i, prompt in enumerate(prompts(32)):
        driver.add(f"r{i}", prompt, stop_token_ids=(1,), **sampling)
    driver.run()
    assert [driver.tokens(f"r{i}") for i in range(32)] == greedy


def test_the_oracle_has_something_to_say(greedy: list[list[int]]):
    assert len({tuple(tokens) for tokens in greedy}) > 24
    assert len({token for tokens in greedy for token in tokens}) > 40


def test_greedy_alone(driver: Callable, greedy: list[list[int]]):
    one = driver()
    for i, prompt in enumerate(prompts(32)):
        one.add(f"r{i}", prompt, stop_token_ids=(1,))
        one.run()
        assert one.tokens(f"r{i}") == greedy[i]


def test_greedy_among_strangers(driver: Callable, greedy: list[list[int]]):
    check_greedy(driver(), greedy)


@pytest.mark.parametrize("max_tokens", [32, 33, 47, 100])
def test_greedy_with_chunked_prefill(driver: Callable, greedy: list[list[int]], max_tokens: int):
    check_greedy(driver(max_tokens=max_tokens), greedy)


@pytest.mark.parametrize("max_tokens", [1, 2, 7])
def test_greedy_with_tiny_chunks(driver: Callable, greedy: list[list[int]], max_tokens: int):
    check_greedy(driver(max_sequences=1, max_tokens=max_tokens), greedy)


def test_greedy_after_preemption(driver: Callable, greedy: list[list[int]]):
    tight = driver(pages=16)
    check_greedy(tight, greedy)
    assert tight.engine.stats().n_preempted > 0


def test_greedy_after_a_prefix_hit(driver: Callable, greedy: list[list[int]]):
    warm = driver()
    check_greedy(warm, greedy)
    warm.outputs.clear()
    check_greedy(warm, greedy)
    assert warm.engine.stats().prefix_hits > 200
    assert warm.outputs["r1", 0][0].n_cached == (len(prompts(32)[1]) - 1) // 16 * 16


def test_tenants_share_nothing(driver: Callable):
    one = driver()
    prompt = list(range(3, 70))
    for i, salt in enumerate(["", "a", "b", "a"]):
        one.add(f"r{i}", prompt, salt=salt)
        one.run()
    assert [one.outputs[f"r{i}", 0][0].n_cached for i in range(4)] == [0, 0, 0, 64]


def test_prefix_caching_can_be_off(driver: Callable):
    one = driver(prefix=False)
    for i in range(2):
        one.add(f"r{i}", list(range(3, 70)))
        one.run()
    assert one.engine.stats().prefix_hits == 0


def test_a_seed_fixes_the_text(driver: Callable):
    def sampled(neighbours: int) -> list[int]:
        one = driver()
        for i, prompt in enumerate(prompts(neighbours, seed=9)):
            one.add(f"n{i}", prompt, temperature=0.7, seed=i)
        one.add("r", [5, 6, 7], temperature=1.0, top_p=0.9, seed=11, max_tokens=24)
        one.run()
        return one.tokens("r")

    assert sampled(0) == sampled(9)


def test_continuations_of_one_prompt_differ_and_share_its_pages(driver: Callable):
    one = driver()
    prompt = list(range(3, 70))
    one.add("r", prompt, n=4, temperature=1.0, seed=1, max_tokens=12)
    one.step()
    assert one.engine.stats().kv_bytes["dense"] == (4 + 4) * 2 * 2 * 2 * 16 * 4 * 16
    one.run()
    texts = [tuple(one.tokens("r", i)) for i in range(4)]
    assert len(set(texts)) == 4
    alone = driver()
    alone.add("r", prompt, n=1, temperature=1.0, seed=1, max_tokens=12)
    alone.run()
    assert tuple(alone.tokens("r")) == texts[0]
    tight = driver(pages=16)
    for i, other in enumerate(prompts(6)):
        tight.add(f"n{i}", other)
    tight.add("r", prompt, n=4, temperature=1.0, seed=1, max_tokens=12)
    tight.run()
    assert [tuple(tight.tokens("r", i)) for i in range(4)] == texts


def test_finish_reasons(driver: Callable):
    one = driver()
    one.add("length", [5, 6, 7], max_tokens=3)
    one.run()
    tokens = one.tokens("length")
    assert one.outputs["length", 0][-1].finish is FinishReason.LENGTH
    assert len(tokens) == 3
    one.add("stop", [5, 6, 7], max_tokens=9, stop_token_ids=(tokens[1],))
    one.run()
    last = one.outputs["stop", 0][-1]
    assert (last.finish, last.stop_token) == (FinishReason.STOP, tokens[1])
    assert one.tokens("stop") == tokens[:2]
    one.add("later", [5, 6, 7], max_tokens=9, min_tokens=5, stop_token_ids=(tokens[1],))
    one.run()
    assert len(one.tokens("later")) >= 5
    assert tokens[1] not in one.tokens("later")[:5]


def test_logprobs_are_those_of_the_model(driver: Callable, checkpoint: Path):
    one = driver(max_tokens=40)
    prompt = list(range(3, 80))
    one.add("r", prompt, logprobs=3, prompt_logprobs=2, max_tokens=4, temperature=0.0)
    one.run()
    outputs = one.outputs["r", 0]
    model = LlamaForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    tokens = one.tokens("r")
    with torch.inference_mode():
        reference = model(torch.tensor([prompt + tokens])).logits[0].log_softmax(-1)
    scored = outputs[0].prompt_logprobs
    assert scored is not None
    assert scored[0] is None
    assert len(scored) == len(prompt)
    for at, entry in enumerate(scored[1:]):
        assert entry.token == prompt[at + 1]
        assert entry.logprob == pytest.approx(float(reference[at, entry.token]), abs=1e-4)
        assert entry.top_tokens == tuple(reference[at].topk(2).indices.tolist())
    for at, output in enumerate(outputs, start=len(prompt) - 1):
        (entry,) = output.logprobs
        assert entry.logprob == pytest.approx(float(reference[at, entry.token]), abs=1e-4)
        assert entry.token == entry.top_tokens[0]
        assert entry.logprob == entry.top_logprobs[0]
        assert len(entry.top_tokens) == 3


def test_a_prompt_can_be_scored_without_generating(driver: Callable):
    one = driver()
    one.add("r", [5, 6, 7], prompt_logprobs=0, max_tokens=0)
    one.run()
    (output,) = one.outputs["r", 0]
    assert (output.tokens, output.finish) == ((), FinishReason.LENGTH)
    assert len(output.prompt_logprobs) == 3


def test_a_step_has_few_rows_of_logits_whoever_wants_his_prompt_scored(
    driver: Callable, monkeypatch: pytest.MonkeyPatch
):
    rows = []
    compute = Decoder.__call__

    def counting(self: Decoder, batch: Batch, cache: KVCache) -> torch.Tensor:
        rows.append(len(batch.logits_at))
        return compute(self, batch, cache)

    monkeypatch.setattr(Decoder, "__call__", counting)
    one = driver(max_tokens=2048, max_sequences=12)
    for i in range(8):
        one.add(f"r{i}", [3 + i, *range(3, 90)] * 2, max_tokens=1, prompt_logprobs=0)
    one.run()
    assert max(rows) <= SCORED_TOKENS + 12
    assert len(one.outputs["r7", 0][-1].prompt_logprobs) == 176


def test_a_prompt_starts_only_where_it_can_be_finished(driver: Callable):
    # Scored prompts take turns of 256 tokens, so that several can be half-way at once.
    one = driver(pages=48, max_len=512, max_tokens=512)
    for name in "ab":
        one.add(name, list(range(3, 93)) * 5, prompt_logprobs=0, max_tokens=2)
    one.run()
    assert one.engine.stats().n_preempted == 0
    assert one.tokens("a") == one.tokens("b")


def test_a_blocked_head_hashes_its_prompt_once(driver: Callable, monkeypatch: pytest.MonkeyPatch):
    n_hashed = 0

    def extend(key: bytes, tokens: list[int]) -> bytes:
        nonlocal n_hashed
        n_hashed += 1
        return hashed(key, tokens)

    hashed = PrefixIndex.extend
    monkeypatch.setattr(PrefixIndex, "extend", staticmethod(extend))
    one = driver(pages=16)
    shared = list(range(3, 83))
    one.add("before", shared, max_tokens=1)
    one.run()
    one.add("runs", list(range(96, 21, -1)) * 2, max_tokens=60)
    one.step()
    n_before = n_hashed
    one.add("head", shared + list(range(40, 97)), max_tokens=1)
    for _ in range(20):
        one.step()
        assert one.engine.stats().n_waiting == 1
    # Of the head five pages that are found and one that is not; of the other what it completed.
    assert n_hashed - n_before == 6 + (150 + 20) // 16 - 150 // 16


def test_a_scored_prompt_survives_preemption(driver: Callable):
    def scored(pages: int) -> tuple:
        one = driver(pages=pages, max_tokens=40)
        for i, prompt in enumerate(prompts(8)):
            one.add(f"n{i}", prompt, max_tokens=40)
        one.add("r", list(range(3, 90)), prompt_logprobs=0, max_tokens=2)
        one.run()
        return one.outputs["r", 0][0].prompt_logprobs, one.engine.stats().n_preempted

    roomy, tight = scored(200), scored(16)
    assert tight[1] > roomy[1] == 0
    assert [e and e.token for e in tight[0]] == [e and e.token for e in roomy[0]]


def test_penalties_and_bias(driver: Callable):
    one = driver()
    one.add("plain", [5, 6, 7])
    one.add("banned", [5, 6, 7], logit_bias=tuple((t, -100.0) for t in range(50)))
    one.add("forced", [5, 6, 7], logit_bias=((42, 100.0),))
    one.add("varied", [5, 6, 7], logit_bias=((42, 20.0), (43, 20.0)), frequency_penalty=2.0)
    one.run()
    assert min(one.tokens("banned")) >= 50
    assert set(one.tokens("forced")) == {42}
    assert set(one.tokens("varied")) >= {42, 43}
    assert set(one.tokens("plain")) != {42}


def test_priority_runs_first(driver: Callable):
    one = driver(policy="priority", max_sequences=1)
    for name, priority in (("late", 5), ("urgent", -1), ("normal", 0)):
        one.add(name, [5, 6, 7], priority=priority, max_tokens=2)
    one.run()
    assert list(one.outputs) == [("urgent", 0), ("normal", 0), ("late", 0)]


def test_abort_at_every_stage(driver: Callable):
    one = driver(max_tokens=8, max_sequences=2)
    one.add("decoding", [5, 6], max_tokens=100)
    one.add("prefilling", list(range(3, 90)), max_tokens=100)
    one.add("queued", list(range(3, 60)), max_tokens=100, n=3)
    for _ in range(3):
        one.step()
    for name in ("queued", "prefilling", "decoding", "unknown", "queued"):
        one.engine.abort(name)
        one.engine.check()
    assert not one.engine.has_work
    assert one.engine.stats().kv_bytes == {"dense": 0}


def test_refusals_change_nothing(driver: Callable):
    one = driver()
    with pytest.raises(TooLong, match=r"250 tokens and 16 more.*266 together.*256"):
        one.add("r", [5] * 250)
    with pytest.raises(NotFound, match="no adapter 'x'"):
        one.engine.add(
            Request(id="r", prompt=(5,), sampling=SamplingParams(max_tokens=1), adapter="x")
        )
    assert not one.engine.has_work
    one.add("r", [5])
    one.run()
    assert list(one.outputs) == [("r", 0)]


def test_a_waiting_prompt_is_held_once_whatever_n_is(driver: Callable):
    one = driver(max_sequences=1)
    one.add("runs", [5, 6, 7], max_tokens=200)
    one.step()
    prompt = list(range(3, 93))
    one.add("r", prompt, n=128, max_tokens=1)
    waiting = one.engine._sequences["r"]
    assert sum(len(seq.tokens) for seq in waiting) == len(prompt)
    one.engine.abort("r", 0)
    assert sum(len(seq.tokens) for seq in waiting) == 2 * len(prompt)
    one.engine.abort("runs")
    one.run()
    assert sorted(index for name, index in one.outputs if name == "r") == list(range(1, 128))


def test_a_failed_step_leaves_an_empty_engine_that_serves(driver: Callable):
    one = driver()
    for i, prompt in enumerate(prompts(5)):
        one.add(f"r{i}", prompt, n=2)
    one.step()
    with arm("engine.step"), pytest.raises(InjectedFault):
        one.engine.step()
    outputs = one.engine.fail_all(Refused("told"))
    assert {(o.id, o.index) for o in outputs} == {(f"r{i}", j) for i in range(5) for j in (0, 1)}
    assert all(o.finish is FinishReason.ERROR and o.error[1] == "told" for o in outputs)
    one.engine.check()
    assert not one.engine.has_work
    one.add("next", [5, 6, 7])
    one.run()
    assert len(one.tokens("next")) == 16


def test_every_allocation_may_fail(driver: Callable):
    for nth in range(1, 100):
        one = driver(pages=20)
        for i, prompt in enumerate(prompts(4)):
            one.add(f"r{i}", prompt, n=2, max_tokens=3)
        with arm("kv.alloc", nth) as armed:
            while one.engine.has_work:
                try:
                    one.step()
                except InjectedFault:
                    one.engine.fail_all(Refused("told"))
                    one.engine.check()
                    assert one.engine.stats().kv_bytes == {"dense": 0}
        if armed.hits < nth:
            return
    raise AssertionError("the point was always hit")


@pytest.mark.parametrize("seed", range(4))
def test_random_traffic_changes_no_text_and_returns_every_page(driver: Callable, seed: int):
    rng = random.Random(seed)
    one = driver(pages=24, max_tokens=rng.choice([32, 64, 200]))
    shared = [rng.randrange(3, 97) for _ in range(60)]
    alive: dict[str, dict] = {}
    for i in range(60):
        if rng.random() < 0.6:
            wish = {
                "prompt": shared[: rng.randint(1, 60)] + prompts(1, seed=i)[0],
                "n": rng.choice([1, 1, 3]),
                "temperature": rng.choice([0.0, 1.0]),
                "seed": i,
                "frequency_penalty": rng.choice([0.0, 0.5]),
                "repetition_penalty": rng.choice([1.0, 1.3]),
            }
            one.add(f"r{i}", **wish)
            alive[f"r{i}"] = wish
        if alive and rng.random() < 0.3:
            name = rng.choice(list(alive))
            del alive[name]
            one.engine.abort(name)
        if one.engine.has_work:
            one.step()
    one.run()
    stats = one.engine.stats()
    assert stats.kv_bytes == {"dense": 0}
    assert stats.kv_tokens == 0
    assert stats.n_preempted > 0
    assert stats.prefix_hits > 0
    roomy = driver(prefix=False)
    for name, wish in alive.items():
        roomy.add(name, **wish)
        roomy.run()
        for index in range(wish["n"]):
            assert one.tokens(name, index) == roomy.tokens(name, index)


@pytest.mark.parametrize("n", [5, 16])
def test_more_continuations_than_rows_wait_their_turn(driver: Callable, n: int):
    prompt = list(range(3, 70))
    roomy = driver(max_tokens=64)
    roomy.add("r", prompt, n=n, temperature=1.0, seed=1, max_tokens=12)
    roomy.run()
    narrow = driver(max_sequences=4, max_tokens=8)
    narrow.add("stranger", [5, 6, 7], max_tokens=30)
    narrow.add("r", prompt, n=n, temperature=1.0, seed=1, max_tokens=12)
    while narrow.engine.has_work:
        narrow.step()
        assert narrow.engine.stats().n_running <= 4
    for index in range(n):
        assert narrow.tokens("r", index) == roomy.tokens("r", index)
    assert len(narrow.tokens("stranger")) == 30


@pytest.mark.parametrize("gone", [0, 2, 3])
@pytest.mark.parametrize("n_steps", [0, 1, 4])
def test_one_continuation_can_be_aborted(driver: Callable, gone: int, n_steps: int):
    def texts(aborts: bool) -> list[list[int]]:
        one = driver(max_tokens=40)
        one.add("r", list(range(3, 70)), n=4, temperature=1.0, seed=1, max_tokens=12)
        for _ in range(n_steps):
            one.step()
        if aborts:
            one.engine.abort("r", gone)
            one.engine.check()
        one.run()
        assert one.engine.stats().kv_bytes == {"dense": 0}
        return [one.tokens("r", i) if ("r", i) in one.outputs else [] for i in range(4)]

    whole, rest = texts(False), texts(True)
    assert len(rest[gone]) < 12
    assert [t for i, t in enumerate(rest) if i != gone] == [
        t for i, t in enumerate(whole) if i != gone
    ]


def test_bytes_per_token_are_true_when_pages_are_shared(driver: Callable):
    one = driver()
    prompt = list(range(3, 67))
    one.add("r", prompt, n=4, temperature=1.0, seed=1, max_tokens=9)
    one.step()
    one.add("again", prompt, max_tokens=9)
    one.step()
    stats = one.engine.stats()
    # The prompt once, a token of each continuation, and what the latecomer computed again.
    assert stats.kv_tokens == 64 + 4 + 16
    assert stats.kv_bytes["dense"] == (4 + 4 + 1) * 16 * one.engine.info.bytes_per_token
    one.run()
    assert one.outputs["again", 0][0].n_cached == 48


def test_a_continuation_that_has_left_counts_no_more(driver: Callable):
    one = driver()
    one.add("r", list(range(3, 67)), n=4, temperature=1.0, seed=1, max_tokens=40)
    for _ in range(6):
        one.step()
    for index in (1, 2, 3):
        one.engine.abort("r", index)
    one.step()
    assert 64 < one.engine.stats().kv_tokens < 64 + 16
