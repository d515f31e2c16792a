"""CSKV: what its latents stand for, where they lie, what they save, and who shares them."""

import dataclasses
import random
from collections.abc import Callable
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import pytest
import torch
from kvfold.cache.cskv import CSKVCache
from kvfold.cache.cskv_basis import Basis, Calibration, LayerBases, choose_ranks
from kvfold.core.errors import Refused
from kvfold.core.sequence import Sequence
from kvfold.kernels.latent_attention import reconstruct
from kvfold.kernels.quantize import affine, unpack
from kvfold.kernels.rope import RotaryTable, rotate


def text(n: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [0, *(rng.randrange(1, 64) for _ in range(n - 1))]


@pytest.fixture
def cskv(lab: Callable) -> Callable:
    """A lab on this backend."""

    def make(**options: Any) -> Any:
        return lab("cskv", **options)

    return make


def restored(one: Any, tokens: list[int], n_folded: int) -> tuple[torch.Tensor, torch.Tensor]:
    """[layers, tokens, kv_heads, head_dim] – rotated keys and values, the first ones projected.

    Every value is made whole: nothing is absorbed.
    """
    keys, values = [], []
    for layer, bases in enumerate(one.config.calibration.layers):
        sides = []
        for basis, table in zip(bases, (one.table.k, one.table.v), strict=True):
            whole = table[tokens, layer].double().flatten(1)
            mean, encoder, decoder = (
                x.double() for x in (basis.mean, basis.encoder, basis.decoder)
            )
            whole[:n_folded] = (whole[:n_folded] - mean) @ encoder @ decoder + mean
            sides.append(whole.view(len(tokens), *table.shape[2:]))
        keys.append(rotate(sides[0].float(), torch.arange(len(tokens)), one.rotary))
        values.append(sides[1])
    return torch.stack(keys), torch.stack(values)


def within(one: Any, tokens: list[int], n_folded: int, window: int) -> torch.Tensor:
    """[layers, heads, head_dim] – of the last token, over the last `window` of them."""
    k, v = (
        x[:, -window:].double().repeat_interleave(2, 2) for x in restored(one, tokens, n_folded)
    )
    q = one.queries(tokens)[:, -1].double()
    weight = (torch.einsum("lhd,lkhd->lhk", q, k) * one.spec.scale).softmax(-1)
    return torch.einsum("lhk,lkhd->lhd", weight, v)


@pytest.mark.parametrize("windows", [(None, None), (None, 70), (40, 300)], ids=str)
def test_all_components_equal_dense(
    lab: Callable, monkeypatch: pytest.MonkeyPatch, windows: tuple[int | None, ...]
):
    """Nothing folds unless forced to, and then nothing is lost."""
    spec = dataclasses.replace(lab().spec, windows=windows)
    dense, whole = lab("dense", spec=spec), lab("cskv", spec=spec, keep=1.0)
    assert not whole.cache.folded_size
    allocate = CSKVCache._allocate

    def folding(cache: Any, n_pages: int) -> Any:
        cache._folds = True
        return allocate(cache, n_pages)

    monkeypatch.setattr(CSKVCache, "_allocate", folding)
    calibrated = CSKVCache.calibrated(whole.config, whole.calibrate())
    monkeypatch.setattr(CSKVCache, "prepared", lambda *_: calibrated)
    forced = lab("cskv", spec=spec)
    outputs = []
    for one in (dense, whole, forced):
        seq = one.add(text(200))
        prompt = one.prefill(seq, 77)
        outputs.append(torch.cat((prompt, one.decode(seq, text(40, seed=1))), dim=1))
        one.check()
    assert seq.n_folded == (239 - 32) // 16 * 16
    assert torch.equal(outputs[0], outputs[1])
    torch.testing.assert_close(outputs[0], outputs[2], atol=1e-5, rtol=1e-5)


def test_a_window_beyond_the_text_equals_dense(lab: Callable):
    outputs = []
    for one in (lab("dense"), lab("cskv", window=300)):
        seq = one.add(text(200))
        outputs.append(torch.cat((one.prefill(seq), one.decode(seq, text(99, seed=1))), dim=1))
    assert not seq.folded
    assert torch.equal(*outputs)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("recent", [0, 5, 32])
@pytest.mark.parametrize("chunk", [512, 33])
def test_attention_is_that_over_what_latents_stand_for(
    cskv: Callable, recent: int, chunk: int, groups: int
):
    one = cskv(recent=recent, keep=0.5, groups=groups)
    ranks = [[basis.rank for basis in bases] for bases in one.config.calibration.layers]
    assert sum(map(sum, ranks)) == 128
    seq = one.add(text(150))
    first = one.prefill(seq, chunk)
    # Prompts are exact: the first token is drawn from what dense computes.
    want = one.exact(seq.tokens, first.shape[1])
    torch.testing.assert_close(first.double(), want, atol=4e-6, rtol=1e-6)
    for token in text(70, seed=1):
        n_folded = max(0, (seq.n_computed - recent) // 16 * 16)
        got = one.decode(seq, [token])
        assert seq.n_folded == n_folded
        want = one.exact(seq.tokens, 1, *restored(one, seq.tokens, n_folded))
        torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=1e-5)
        one.check()
    dense = one.exact(seq.tokens, 1)
    assert (want - dense).abs().max() > 1e-2


def test_a_window_hides_latents(cskv: Callable):
    one = cskv(spec=dataclasses.replace(cskv().spec, windows=(90, 70)))
    seq = one.add(text(200))
    one.prefill(seq)
    got = one.decode(seq, [7])[:, 0].double()
    for layer, window in enumerate((90, 70)):
        want = within(one, seq.tokens, seq.n_folded, window)[layer]
        torch.testing.assert_close(got[layer], want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("dtype", "most"), [("int8", 0.01), ("int4", 0.15)])
def test_codes_err_little_beside_the_numbers_that_they_stand_for(
    cskv: Callable, dtype: str, most: float
):
    one = cskv(dtype=dtype, keep=0.7)
    seq = one.add(text(300))
    one.prefill(seq)
    got = one.decode(seq, [7]).double()
    want = one.exact(seq.tokens, 1, *restored(one, seq.tokens, seq.n_folded))
    error = (got - want).norm() / want.norm()
    assert seq.n_folded > 200
    assert 1e-5 < error < most


# Options, the groups of a folded page in the bytes of 16 tokens of 8 · 128 keys and values in
# bfloat16, and the share of those bytes that is left over, at most.
FORMS: list[tuple[dict[str, Any], tuple[int, int], float]] = [
    ({}, (5, 16), 0.01),
    ({"keep": 0.5}, (2, 16), 0.001),
    ({"keep": 0.3}, (2, 26), 0.03),
    ({"keep": 0.9}, (1, 17), 0.05),
    ({"keep_k": 0.1, "keep_v": 0.2}, (5, 21), 0.03),
    ({"dtype": "fp8"}, (10, 16), 0.01),
    ({"dtype": "int8"}, (5, 31), 0.03),
    ({"dtype": "int4"}, (10, 31), 0.04),
    # Whole chunks in whole groups.
    ({"mode": "selective"}, (4, 16), 0.08),
    ({"mode": "selective", "dtype": "int4", "chunk": 16}, (7, 32), 0.11),
]


def wide(one: Any, **fields: Any) -> Any:
    """Layers as large as those of a model of 8 billion parameters."""
    shape = {"n_heads": 32, "n_kv_heads": 8, "head_dim": 128, "dtype": torch.bfloat16}
    return dataclasses.replace(one.spec, **{**shape, **fields})


def made_up(spec: Any) -> Calibration:
    """Components that are worth less and less, without a pass over text."""
    n = spec.n_kv_heads * spec.head_dim

    def basis(worth: float) -> Basis:
        fall = worth * torch.logspace(0, -3, n, dtype=torch.float64)
        eye = torch.eye(n)
        return Basis(mean=torch.zeros(n), encoder=eye, decoder=eye, energies=fall, gains=fall)

    layers = tuple(LayerBases(basis(1.0 + i), basis(0.5)) for i in range(spec.n_layers))
    return Calibration(
        identity=spec.identity, key_metric="", value_metric="", n_tokens=1, layers=layers
    )


def cache_of(spec: Any, options: dict[str, Any], n_pages: int) -> Any:
    config = CSKVCache.calibrated(CSKVCache.parse(options), made_up(spec))
    table = RotaryTable(
        cos=torch.ones(spec.max_len, 64),
        sin=torch.zeros(spec.max_len, 64),
        interleaved=False,
        width=128,
    )
    return CSKVCache(spec, table, config, n_pages)


@pytest.mark.parametrize(("options", "form", "left_over"), FORMS, ids=str)
def test_a_folded_page_fills_its_block_and_no_more(
    lab: Callable, options: dict[str, Any], form: tuple[int, int], left_over: float
):
    spec = wide(lab())
    cache = cache_of(spec, options, 4)
    assert (cache._fold.key_groups, cache._fold.group_tokens) == form
    ranks = {(of.latents.n_channels, of.latents.n_value_channels) for of in cache._layers}
    assert len(ranks) == 2, "layers should differ for this test to show anything"
    parts = []
    for layer in cache._layers:
        of_pages = [layer.latents, *([] if layer.landmarks is None else [layer.landmarks])]
        parts += [x for pages in of_pages for x in vars_of(pages)]
    begin = cache._full[0, 2].data_ptr()
    spans = sorted((x[2].data_ptr() - begin, x[2].nbytes) for x in parts)
    block_bytes = 2 * 2 * 16 * 1024 * 2
    assert all(a + n <= b for (a, n), (b, _) in pairwise([*spans, (block_bytes, 0)]))
    assert sum(n for _, n in spans) >= (1 - left_over) * block_bytes


def vars_of(pages: Any) -> list[torch.Tensor]:
    found = (getattr(pages, f.name) for f in dataclasses.fields(pages))
    return [x for x in found if isinstance(x, torch.Tensor)]


# Stored form, bytes of a folded token over those of a dense one, and requests of 8k tokens over
# those that dense holds.
SAVINGS = [("auto", 0.205, 4.5), ("int8", 0.12, 8.0), ("int4", 0.065, 13.0)]


@pytest.mark.parametrize(("dtype", "most", "times"), SAVINGS)
def test_a_pool_admits_more_requests(
    lab: Callable, monkeypatch: pytest.MonkeyPatch, dtype: str, most: float, times: float
):
    """With their recent tokens, groups that wait, pages in part, and prompts that come in dense."""
    n_dense, n_pages = 12, 8192 // 16
    spec = wide(lab(), n_layers=1, windows=(None,), max_len=8400, max_sequences=512)
    one = lab()
    one.cache = cache_of(spec, {"dtype": dtype, "prefix": False}, n_dense * n_pages + 2)
    # Blocks count, not what is in them.
    monkeypatch.setattr(one.cache, "_move", lambda *_: None)
    footprint = CSKVCache.footprint(spec, one.cache._config)
    dense_bytes = 2 * 1024 * 2
    assert footprint.bytes_per_token <= most * dense_bytes
    prompt = text(8192)
    n_admitted = 0
    while True:
        seq = one.add(prompt)
        # The scheduler's question: is there room for the whole prompt, dense?
        if seq.n_uncomputed > one.cache.n_free_tokens:
            break
        assert one.cache.reserve(seq, 8192)
        seq.n_computed = 8192
        one.cache.commit(seq)
        one.cache.seal(seq)
        n_admitted += 1
        held = one.cache._pool.n_held * 16 * dense_bytes / n_admitted
        n_folded = len(seq.folded) * 16 * dense_bytes
        assert n_folded <= most * dense_bytes * (8192 - 32) + 16 * dense_bytes
        assert one.cache.n_pages(spec, one.cache._config, 8192) * 16 * dense_bytes == held
    assert n_admitted >= times * n_dense
    one.check()


def test_all_chunks_selected_is_attention_to_all(cskv: Callable):
    one = cskv(mode="selective", budget=512, keep=0.5)
    seq = one.add(text(150))
    one.prefill(seq)
    got = one.decode(seq, text(40, seed=1))[:, -1:]
    want = one.exact(seq.tokens, 1, *restored(one, seq.tokens, seq.n_folded))
    assert seq.n_folded == (189 - 32) // 16 * 16
    torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=1e-5)


def test_no_more_chunks_are_read_than_the_budget_allows(cskv: Callable):
    """Two chunks: the first, which is always read, and for each KV head the one it wants most."""
    one = cskv(mode="selective", budget=23, chunk=8, keep=0.5)
    # Codes of landmarks are too coarse to tell which of two chunks a query wants more by little.
    seq = one.add(text(150, seed=38))
    one.prefill(seq)
    got = one.decode(seq, [7])[:, 0].double().unflatten(1, (2, 2))
    q = one.queries(seq.tokens)[:, -1].double().unflatten(1, (2, 2)) * one.spec.scale
    marks = one.keys(seq.tokens)[:, : seq.n_folded].double().unflatten(1, (-1, 8)).mean(2)
    wish = torch.einsum("lhgd,lchd->lhgc", q, marks).softmax(-1).amax(2)
    k, v = (x.double() for x in restored(one, seq.tokens, seq.n_folded))
    for layer, head in product(range(2), repeat=2):
        best = 8 * (1 + int(wish[layer, head, 1:].argmax()))
        seen = [*range(8), *range(best, best + 8), *range(seq.n_folded, 151)]
        score = q[layer, head] @ k[layer, seen, head].mT
        want = score.softmax(-1) @ v[layer, seen, head]
        torch.testing.assert_close(got[layer, head], want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("chunk", [4, 8, 16])
def test_landmarks_are_means_of_the_keys_that_folded(cskv: Callable, chunk: int):
    one = cskv(mode="selective", chunk=chunk, recent=0)
    seq = one.add(text(200))
    one.prefill(seq)
    n = seq.n_folded // chunk
    assert n > 10
    keys = one.keys(seq.tokens)
    for layer, of_layer in enumerate(one.cache._layers):
        marks = of_layer.landmarks
        step, low = affine(marks.scale[seq.folded], marks.bits)
        found = unpack(marks.keys[seq.folded], marks.bits, torch.float32)
        found = (found * step.unsqueeze(3) + low.unsqueeze(3)).transpose(1, 2).flatten(0, 1)[:n]
        want = keys[layer, : n * chunk].unflatten(0, (n, chunk)).mean(1)
        assert (found - want).abs().max() <= 0.51 * step.max()


def test_after_an_exact_prefill_a_second_turn_is_a_fresh_request(cskv: Callable):
    one, fresh = cskv(), cskv()
    seq = one.add(text(150))
    one.prefill(seq, 70)
    one.decode(seq, text(60, seed=1))
    turn = [*seq.tokens, *text(40, seed=2)]
    outputs = []
    for each in (one, fresh):
        again = each.add(turn)
        if each is fresh:
            each.step((again, 144))
        outputs.append(torch.cat((each.prefill(again), each.decode(again, [3, 4])), 1))
        assert again.n_folded == (251 - 32) // 16 * 16
        assert again.n_published == 250 // 16
    assert torch.equal(*outputs)
    # Its prompt was found, its answer was not: that read latents.
    assert one.cache.attach(Sequence(seq.request, tokens=list(turn))) == 144


def prefilled(one: Any, seq: Sequence, chunk: int) -> None:
    """Compute a prompt, and hold each chunk against attention to what the policy names."""
    while seq.n_uncomputed:
        n = min(chunk, seq.n_uncomputed)
        assert one.cache.reserve(seq, n)
        n_folded = seq.n_folded
        (got,) = one.step((seq, n))
        tokens = seq.tokens[: seq.n_computed]
        want = one.exact(tokens, n, *restored(one, tokens, n_folded))
        torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=1e-5)
        one.check()
    assert not seq.folded or seq.n_computed - seq.n_folded >= one.config.recent


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("dtype", ["auto", "int8", "int4"])
def test_what_prompts_read_is_what_decode_steps_read(cskv: Callable, dtype: str, groups: int):
    one = cskv(dtype=dtype, groups=groups, keep=0.5)
    seq = one.add(text(300))
    one.prefill(seq)
    got = one.decode(seq, [7]).double()
    fold = one.cache._fold
    folded, every = torch.tensor(seq.folded), torch.arange(seq.n_folded // fold.group_tokens)
    keys, values = restored(one, seq.tokens, 0)
    for layer, of in enumerate(one.cache._layers):
        k, v, at = reconstruct(of.up, of.latents, folded, every, one.rotary)
        keys[layer, at], values[layer, at] = k, v.double()
    assert at.tolist() == list(range(seq.n_folded))
    want = one.exact(seq.tokens, 1, keys, values)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("chunk", [100, 33, 1])
def test_later_chunks_read_latents_where_prompts_need_not_be_exact(
    cskv: Callable, chunk: int, prefix: bool
):
    one = cskv(exact_prefill=False, keep=0.3, prefix=prefix)
    seq = one.add(text(250))
    prefilled(one, seq, chunk)
    assert seq.n_folded == one.cache._fold.n_due(250 - 32, 16) > 180
    for token in text(60, seed=1):
        seq.tokens.append(token)
        prefilled(one, seq, 1)


def test_equal_prefixes_share_latents(cskv: Callable):
    """The stated policy: what is found is read as it is, the rest is computed upon it."""
    one = cskv(exact_prefill=False, keep=0.3)
    size = one.cache.folded_size
    first = one.add(text(250))
    prefilled(one, first, 100)
    one.decode(first, text(100, seed=1))
    n_shared = 250 // size
    assert len(first.folded) > n_shared + 1
    # Another question on the same document: full pages behind the last complete latent page are
    # found as well, whether anybody reads them still or not.
    other = one.add([*first.tokens[:250], *text(60, seed=2)])
    assert other.folded == first.folded[:n_shared]
    assert other.n_folded == n_shared * size
    assert other.n_computed == 250 // 16 * 16
    one.check()
    prefilled(one, other, 33)
    # A second turn finds what was generated, too, after everybody has gone.
    turn = [*first.tokens, *text(60, seed=3)]
    found = first.folded[: (first.n_folded // size)]
    for seq in (first, other):
        one.drop(seq)
        one.check()
    assert one.cache._pool.n_held == 0
    again = one.add(turn)
    assert again.folded == found
    prefilled(one, again, 50)
    child = Sequence(again.request, tokens=again.tokens.copy())
    one.live.append(child)
    assert one.cache.fork(again, child)
    assert child.folded[: len(found)] == found
    for token, seq in ((5, child), (6, again)):
        seq.tokens.append(token)
        prefilled(one, seq, 1)
    # Who needs the room evicts them.
    for seq in (again, child):
        one.drop(seq)
    for seed in range(4, 8):
        long = one.add(text(500, seed=seed))
        one.prefill(long, 100)
        one.check()


@pytest.mark.parametrize("n_more", [1, 20, 31, 32, 33])
def test_what_is_found_leaves_the_recent_tokens_whole(cskv: Callable, n_more: int):
    one = cskv(exact_prefill=False, keep=0.3)
    end = 3 * one.cache.folded_size
    prefilled(one, one.add(text(end + 100)), 100)
    again = one.add(text(end + n_more))
    n_found = 2 + (n_more >= one.config.recent)
    assert again.n_folded == n_found * one.cache.folded_size
    prefilled(one, again, 20)


def test_a_latent_page_that_ends_within_a_full_one_stands_alone(
    cskv: Callable, monkeypatch: pytest.MonkeyPatch
):
    """The full page of its last tokens was never filled from its start: nobody hits it."""
    one = cskv(exact_prefill=False, keep=0.3, recent=0)
    size = one.cache.folded_size
    assert size % 16
    first = one.add(text(2 * size + 30))
    with monkeypatch.context() as patch:
        # As if they had been evicted.
        patch.setattr(one.cache, "_publish", lambda *_: None)
        prefilled(one, first, 50)
    again = one.add([*text(2 * size + 30), *text(40, seed=4)])
    assert again.n_computed == again.n_folded == 2 * size
    prefilled(one, again, 20)
    late = one.add(again.tokens)
    assert late.n_computed >= 3 * size
    prefilled(one, late, 100)


def test_whatever_changes_stored_bytes_changes_the_keys(cskv: Callable):
    salts = [
        cskv(**options).cache.salt()
        for options in (
            {"exact_prefill": False},
            {"exact_prefill": False, "keep": 0.3},
            {"exact_prefill": False, "recent": 0},
            {"exact_prefill": False, "mode": "selective"},
            {"exact_prefill": False, "mode": "selective", "chunk": 4},
            {"exact_prefill": False, "dtype": "int8"},
            {"exact_prefill": False, "dtype": "int4"},
            {},
        )
    ]
    assert len(set(salts)) == len(salts)
    # Full pages are the same whatever folds.
    assert cskv(keep=0.5, dtype="int8").cache.salt() == salts[-1]


def test_what_is_kept_is_told(cskv: Callable):
    one = cskv(keep=0.5)
    kept = one.cache.stats([]).kept
    assert kept["keys"] + kept["values"] == 1
    assert one.cache.stats([]).bytes_in_use == {"full": 0, "folded": 0}
    assert cskv(keep=1.0).cache.stats([]).kept == {}


def test_an_artifact_is_read_before_there_is_a_model(lab: Callable, tmp_path: Path):
    one = lab("cskv")
    one.calibrate().write(tmp_path)
    config = CSKVCache.prepared(one.spec, CSKVCache.parse({"artifact": str(tmp_path)}))
    assert config.calibration.digest() == one.config.calibration.digest()
    assert CSKVCache.prepared(one.spec, config) is config
    with pytest.raises(Refused, match=r"groups: 2, but .* state --kv-cache-config\.groups 1"):
        CSKVCache.prepared(one.spec, CSKVCache.parse({"artifact": str(tmp_path), "groups": 2}))
    with pytest.raises(Refused, match="made for another model"):
        CSKVCache.prepared(
            dataclasses.replace(one.spec, identity="other"),
            CSKVCache.parse({"artifact": str(tmp_path)}),
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 0.5}, r"config\.ratio: there is no such setting.*keep \(float, 0\.2\)"),
        ({"keep": 0.0}, r"keep: 0\.0 must be in \(0, 1\]"),
        ({"keep_k": 1.5}, r"keep_k: 1\.5 must be in \[0, 1\]"),
        ({"mode": "fast"}, "mode: 'fast' must be one of exact, selective"),
        ({"chunk": 0}, "chunk: 0 must be 1 to 32"),
        ({"mode": "selective", "budget": 15}, "budget: 15 must be at least two chunks, 16"),
        ({"budget": 64}, "budget: it belongs to mode selective"),
        ({"budget": 512}, "budget: it belongs to mode selective"),
        ({"chunk": 16}, "chunk: it belongs to mode selective"),
        ({"chunk": 8}, "chunk: it belongs to mode selective"),
        ({"keep": 0.2, "keep_k": 0.1, "keep_v": 0.2}, "keep: keep_k and keep_v replace it"),
        ({"window": -1}, "window: -1 must be an int of at least 0"),
        ({"window": True}, "window: True must be an int"),
        ({"window": 1, "recent": 1}, "window: it is another name of recent"),
    ],
)
def test_wrong_settings_are_named(options: dict[str, Any], message: str):
    with pytest.raises(Refused, match=message):
        CSKVCache.parse(options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 0.1}, r"keep: 0\.1 must be 0\.125 to 1 for this model"),
        ({"keep": 0.00001}, r"keep: 1e-05 must be 0\.125 to 1"),
        ({"keep": 0.13, "dtype": "int8"}, r"keep: 0\.13 must be 0\.1329 to 1"),
        ({"keep_k": 0.001}, r"keep_k: 0\.001 must be 0\.125 to 1"),
        ({"keep_k": 0.6}, r"keep_k: 0\.6 leaves -0\.2 for keep_v with keep 0\.2"),
        ({"groups": 3}, "groups: 3 must divide 2 KV heads"),
    ],
    ids=str,
)
def test_shares_that_cannot_be_are_refused_before_there_is_a_model(
    lab: Callable, options: dict[str, Any], message: str
):
    with pytest.raises(Refused, match=message):
        CSKVCache.prepared(lab().spec, CSKVCache.parse(options))


def test_what_folds_nothing_says_so_and_still_reads_its_artifact(
    lab: Callable, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    one = lab("cskv", keep=0.97)
    assert not one.cache.folded_size
    assert caplog.text.count("cskv folds nothing") == 1
    with pytest.raises(Refused, match=r"basis\.json: it cannot be read"):
        CSKVCache.prepared(one.spec, CSKVCache.parse({"keep": 0.97, "artifact": str(tmp_path)}))


def test_heads_in_groups_that_do_not_divide_a_step_are_served(lab: Callable):
    """What is stored for less holds components for each group."""
    spec = dataclasses.replace(lab().spec, n_heads=20, n_kv_heads=10)
    one = lab("cskv", spec=spec, keep=0.3, groups=5)
    found = one.calibrate(5)
    stored = found.cut(choose_ranks(found.layers, 0.3, groups=5))
    config = CSKVCache.calibrated(CSKVCache.parse({"keep": 0.3, "groups": 5}), stored)
    CSKVCache(spec, one.rotary, config, 4)


def test_a_page_that_nobody_may_hit_stays_so(cskv: Callable):
    """A hit ends within a full page, and the next chunk does not get to the end of that."""
    one = cskv(exact_prefill=False, keep=0.3, recent=0)
    size = one.cache.folded_size
    end = 2 * size
    assert 0 < end % 16 < 14
    first = one.add(text(end))
    prefilled(one, first, 50)
    one.decode(first, [7])
    one.drop(first)
    again = one.add([*text(end), *text(20, seed=4)])
    assert again.n_folded == again.n_computed == end
    prefilled(one, again, 1)
    assert one.cache._index.find(*one.cache._page(again, end // 16)) is None


def test_full_pages_below_latents_are_evicted_before_anything_else(cskv: Callable):
    one = cskv(exact_prefill=False, keep=0.3)
    size = one.cache.folded_size
    old, seq = one.add(text(64, seed=1)), one.add(text(250))
    for each in (old, seq):
        prefilled(one, each, 100)
    n_latent = seq.n_folded // size
    assert n_latent > 2
    one.drop(old)
    one.drop(seq)
    n_below = n_latent * size // 16
    pool, index = one.cache._pool, one.cache._index
    pages = [index.find(*one.cache._page(seq, i)) for i in range(n_below)]
    assert all(pages)
    # The least valuable first: what comes last in the text.
    assert pool.take(len(pool._free) + 2) is not None
    assert [index.find(*one.cache._page(seq, i)) for i in range(n_below)] == [
        *pages[:-2],
        None,
        None,
    ]
    assert pool.take(n_below - 2) is not None
    assert not any(index.find(*one.cache._page(seq, i)) for i in range(n_below))
    assert one.cache.attach(Sequence(seq.request, tokens=text(250))) > n_latent * size
    assert one.cache.attach(Sequence(old.request, tokens=text(64, seed=1))) >= 48
