"""Attention over latent and full pages against the oracle, with NaN in every unused slot."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import ModuleType

import pytest
import torch
from kvfold.kernels.decode_attention import decode_attention, plan_decode, plan_split
from kvfold.kernels.dispatch import triton, use_triton
from kvfold.kernels.folded_pages import FoldedPages, write_folded
from kvfold.kernels.landmarks import Landmarks, write_landmarks
from kvfold.kernels.latent_attention import (
    LatentBasis,
    LatentPlan,
    LatentSplitPlan,
    latent_attention,
    plan_latent_split,
    plan_latents,
)
from kvfold.kernels.rope import RotaryTable

FP8 = torch.float8_e4m3fn
# Bits of a code, 8-bit floats, or the dtype of the model.
Form = int | torch.dtype | None


@dataclass(frozen=True)
class Shape:
    kv_heads: int
    group: int
    head_dim: int
    ranks: tuple[int, int]
    """Of keys and of values."""
    groups: tuple[int, int]
    """Of heads."""
    key_groups: int
    group_tokens: int
    page_size: int
    chunk: int
    width: int = 0
    """Of the rotation; 0 stands for all."""
    is_interleaved: bool = False

    @property
    def n_tokens(self) -> int:
        return self.key_groups * self.group_tokens


SHAPES = [
    Shape(2, 4, 64, (40, 24), (1, 1), 3, 32, 16, 8),
    Shape(1, 7, 128, (200, 64), (1, 1), 2, 12, 8, 4),
    Shape(4, 1, 64, (48, 40), (2, 4), 5, 8, 16, 8, 32, True),
    Shape(4, 2, 32, (24, 72), (4, 1), 7, 6, 4, 3, 20),
]
SETUPS: list[tuple[Shape, Form]] = [
    (SHAPES[0], None),
    (SHAPES[0], 4),
    (SHAPES[1], FP8),
    (SHAPES[1], 8),
    (SHAPES[2], 4),
    (SHAPES[3], None),
]
EVERY = pytest.mark.parametrize(("shape", "form"), SETUPS, ids=str)
# Latent pages and tokens after them; a sequence without such pages is among those with some. Of
# the last page as many groups are written as fit.
CONTEXTS = ((2, 1), (0, 5), (1.4, 30), (5.6, 13), (0, 1), (0.7, 16))
# Seed of the pages' order, whether they are scattered at all, and bytes of a token.
LAYOUTS = [(0, False, 2**40), (1, True, 1)]


def empty(dims: Sequence[int], dtype: torch.dtype, poison: float) -> torch.Tensor:
    """Half of each page of a larger tensor, as in the cache, in which nobody wrote."""
    every = torch.empty(dims[0], 2, *dims[1:], dtype=dtype)
    return every.copy_(torch.tensor(poison if dtype.is_floating_point else 99))[:, 0]


def empty_latents(
    n_pages: int, shape: Shape, dtype: torch.dtype, form: Form, poison: float
) -> FoldedPages:
    bits = form if isinstance(form, int) else None
    stored = torch.int8 if bits else form or dtype
    assert isinstance(stored, torch.dtype)
    rank, value_rank = shape.ranks
    per_byte, half = 8 // bits if bits else 1, torch.float16
    keys = (n_pages, 1, shape.key_groups, shape.group_tokens, rank // per_byte)
    values = (n_pages, 1, 1, shape.n_tokens, value_rank // per_byte)
    return FoldedPages(
        bits=bits,
        keys=empty(keys, stored, poison),
        values=empty(values, stored, poison),
        key_scale=empty((*keys[:3], 2, rank), half, poison) if bits else None,
        value_scale=empty((*values[:3], 2, shape.n_tokens), half, poison) if bits else None,
    )


def empty_landmarks(n_pages: int, shape: Shape, dtype: torch.dtype, form: Form) -> Landmarks:
    bits = form if isinstance(form, int) else None
    places = (n_pages, shape.kv_heads)
    chunks = shape.n_tokens // shape.chunk
    width = shape.head_dim * (bits or 8) // 8
    return Landmarks(
        bits=bits,
        chunk=shape.chunk,
        keys=empty((*places, chunks, width), torch.int8 if bits else dtype, torch.nan),
        scale=empty((*places, 2, chunks), torch.float16, torch.nan) if bits else None,
    )


def written(
    oracle: ModuleType, latents: FoldedPages, pages: torch.Tensor, groups: torch.Tensor
) -> list[torch.Tensor]:
    """[tokens, rank] float64 – the numbers that these groups hold, of keys and of values."""
    by_group = tuple(latents.keys.shape[2:4])
    k = latents.keys[pages, :, groups]
    v = latents.values.unflatten(3, by_group)[pages, :, :, groups]
    if latents.bits is None:
        k, v = k.double(), v.double()
    else:
        assert latents.key_scale is not None
        assert latents.value_scale is not None
        k_scale = latents.key_scale[pages, :, groups]
        v_scale = latents.value_scale.unflatten(4, by_group)[pages, :, :, :, groups]
        k = torch.from_numpy(oracle.dequantize(k.cpu(), k_scale, latents.bits, -2))
        v = torch.from_numpy(oracle.dequantize(v.cpu(), v_scale, latents.bits, -1))
    return [k.flatten(0, 2).cpu(), v.transpose(2, 3).flatten(3).flatten(0, 2).cpu()]


@dataclass(frozen=True)
class Case:
    """`k[s]` and `v[s]` are what the sequence s has, reconstructed and rotated, in order."""

    shape: Shape
    q: torch.Tensor
    basis: LatentBasis
    rotary: RotaryTable
    k: list[torch.Tensor]
    v: list[torch.Tensor]
    latents: FoldedPages
    landmarks: Landmarks
    k_pages: torch.Tensor
    v_pages: torch.Tensor
    folded_table: list[list[int]]
    folded_len: list[int]
    page_table: list[list[int]]

    @property
    def scale(self) -> float:
        return float(self.shape.head_dim**-0.5)

    def plan(
        self, rows: Sequence[int], window: int | None, token_bytes: int = 512, budget: int = 0
    ) -> LatentPlan | LatentSplitPlan:
        tables = [[table[s] for s in rows] for table in (self.folded_table, self.page_table)]
        lengths = [[self.folded_len[s] for s in rows], [len(self.k[s]) for s in rows]]
        if not use_triton(self.q):
            return plan_latents(
                tables[0],
                lengths[0],
                tables[1],
                lengths[1],
                self.shape.n_tokens,
                self.shape.page_size,
                window,
                self.q.device,
                unit=self.shape.chunk if budget else self.shape.group_tokens,
                budget=budget or None,
                token_bytes=token_bytes,
            )
        folded_table, page_table = (rectangle(table) for table in tables)
        return plan_latent_split(
            folded_table,
            torch.tensor(lengths[0]).int(),
            page_table,
            torch.tensor(lengths[1]).int(),
            self.k_pages,
            self.q.shape[1],
            window,
            landmarks=self.landmarks if budget else None,
            budget=budget,
            least_chunk=64,
            least_latent_chunk=128,
        )

    def attend(
        self,
        rows: Sequence[int] = range(len(CONTEXTS)),
        *,
        budget: int = 0,
        window: int | None = None,
        token_bytes: int = 512,
    ) -> torch.Tensor:
        return latent_attention(
            self.q[list(rows)],
            self.basis,
            self.latents,
            self.k_pages,
            self.v_pages,
            self.plan(rows, window, token_bytes, budget),
            self.rotary,
            self.scale,
            landmarks=self.landmarks if budget else None,
            budget=budget,
        )

    def close(self, oracle: ModuleType, got: torch.Tensor, window: int | None = None) -> None:
        for s in range(len(CONTEXTS)):
            position = len(self.k[s]) - 1
            want = oracle.attend(self.q[s], self.k[s], self.v[s], position, self.scale, window)
            oracle.close(got[s], want)


def rectangle(table: list[list[int]]) -> torch.Tensor:
    """[sequences, most pages] int32 – as a device wants it; what is behind a row is not a page."""
    width = max(1, *map(len, table))
    return torch.tensor([row + [2**30] * (width - len(row)) for row in table]).int()


def rotary_table(shape: Shape, positions: int) -> tuple[RotaryTable, torch.Tensor]:
    """The table, and the angles per position."""
    width = shape.width or shape.head_dim
    angle = 10000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    at = torch.arange(positions, dtype=torch.float64)[:, None] * angle
    table = RotaryTable(
        cos=at.cos().float(),
        sin=at.sin().float(),
        interleaved=shape.is_interleaved,
        width=width,
    )
    return table, angle


def rotated(x: torch.Tensor, angle: torch.Tensor, shape: Shape) -> torch.Tensor:
    """[tokens, kv_heads, head_dim] float64, from position 0 on."""
    width = 2 * len(angle)
    pairs = x[..., :width].unflatten(-1, (-1, 2) if shape.is_interleaved else (2, -1))
    dim = -1 if shape.is_interleaved else -2
    turn = torch.exp(1j * torch.arange(len(x))[:, None] * angle)[:, None]
    z = torch.complex(*pairs.unbind(dim)) * turn
    turned = torch.stack((z.real, z.imag), dim).flatten(-2)
    return torch.cat((turned, x[..., width:]), -1)


def random_basis(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> LatentBasis:
    """Keys and values of unit variance around means as large."""
    device = torch.get_default_device()
    heads = (shape.kv_heads, shape.head_dim)

    def random(*dims: int) -> torch.Tensor:
        return torch.randn(*dims, generator=generator, device="cpu").to(device)

    def up(width: int) -> torch.Tensor:
        return (random(*heads, width) / width**0.5).to(dtype)

    (rank, value_rank), (groups, value_groups) = shape.ranks, shape.groups
    return LatentBasis(
        key_up=up(rank // groups),
        key_mean=random(*heads),
        value_up=up(value_rank // value_groups),
        value_mean=random(*heads),
    )


def reconstructed(up: torch.Tensor, mean: torch.Tensor, latent: torch.Tensor) -> torch.Tensor:
    """[tokens, kv_heads, head_dim] float64 – head by head."""
    kv_heads, _, width = up.shape
    groups = latent.shape[1] // width
    heads = []
    for h in range(kv_heads):
        g = h * groups // kv_heads
        part = latent[:, g * width : (g + 1) * width]
        heads.append(mean[h].double().cpu() + part @ up[h].double().cpu().T)
    return torch.stack(heads, 1)


def make(
    oracle: ModuleType,
    shape: Shape,
    dtype: torch.dtype,
    form: Form = None,
    *,
    seed: int = 0,
    scattered: bool = True,
    poison: float = torch.nan,
) -> Case:
    """Random contexts; the pages' numbers follow `seed`, their contents do not."""
    device = torch.get_default_device()
    values = torch.Generator().manual_seed(7)
    size, per_page = shape.page_size, shape.key_groups
    n_groups = [int(n * per_page) for n, _ in CONTEXTS]
    folded_len = [n * shape.group_tokens for n in n_groups]
    lengths = [n + rest for n, (_, rest) in zip(folded_len, CONTEXTS, strict=True)]
    n_pages = sum(-(-n // per_page) for n in n_groups) + sum(-(-n // size) for n in lengths) + 3
    order = list(range(1, n_pages))
    if scattered:
        with torch.device("cpu"):
            shuffled = torch.randperm(len(order), generator=torch.Generator().manual_seed(seed))
        order = [order[i] for i in shuffled.tolist()]
    free = iter(order)
    latents = empty_latents(n_pages, shape, dtype, form, poison)
    landmarks = empty_landmarks(n_pages, shape, dtype, form)
    pools = empty((n_pages, 2 * shape.kv_heads, size, shape.head_dim), dtype, poison).clone()
    k_pages, v_pages = (x.contiguous() for x in pools.unflatten(1, (2, -1)).unbind(1))
    basis = random_basis(shape, dtype, values)
    rotary, angle = rotary_table(shape, max(lengths))
    k, v, folded_table, page_table = [], [], [], []
    for n, whole, length in zip(n_groups, folded_len, lengths, strict=True):
        blocks = list(itertools.islice(free, -(-n // per_page)))
        folded_table.append(blocks)
        with torch.device("cpu"):
            new = torch.randn(2, length, shape.kv_heads, shape.head_dim, generator=values)
            latent = [torch.randn(whole, rank, generator=values) for rank in shape.ranks]
        new[0, 0] *= 2
        stored = new.to(dtype).double()
        if n:
            # A channel that is always negative, and one that stands out.
            latent[0][:, 3] -= 4
            latent[1][:, 5] *= 4
            some = [x.to(device, dtype).view(n, 1, shape.group_tokens, -1) for x in latent]
            group = torch.arange(n)
            places = torch.tensor(blocks)[group // per_page], group % per_page
            write_folded(*some, *places, latents)
            back_k, back_v = written(oracle, latents, *places)
            keys = reconstructed(basis.key_up, basis.key_mean, back_k)
            stored[0, :whole] = rotated(keys, angle, shape)
            stored[1, :whole] = reconstructed(basis.value_up, basis.value_mean, back_v)
            exact = stored[0, :whole].to(device, dtype).unflatten(0, (n, -1)).transpose(1, 2)
            write_landmarks(exact, *places, landmarks)
        k.append(stored[0])
        v.append(stored[1])
        hidden = whole // size
        row = [0] * hidden + list(itertools.islice(free, -(-length // size) - hidden))
        page_table.append(row)
        for j in range(hidden, len(row)):
            # What folding has taken is not to be read here.
            first = max(0, whole - j * size)
            here = new[:, j * size : (j + 1) * size].transpose(1, 2)[:, :, first:]
            for pool, part in zip((k_pages, v_pages), here.to(device, dtype), strict=True):
                pool[row[j], :, first : first + part.shape[1]] = part
    with torch.device("cpu"):
        heads = shape.kv_heads * shape.group
        q = torch.randn(len(lengths), heads, shape.head_dim, generator=values)
    return Case(
        shape,
        q.to(device, dtype),
        basis,
        rotary,
        k,
        v,
        latents,
        landmarks,
        k_pages,
        v_pages,
        folded_table,
        folded_len,
        page_table,
    )


def launches() -> None:
    """Every form, with and without a budget; heads in groups, and rotated in part."""
    arch = triton.runtime.driver.active.get_current_target().arch
    for shape, form, budget in [
        (Shape(8, 4, 128, (200, 200), (1, 1), 6, 32, 32, 8), FP8, 1024),
        (Shape(8, 4, 128, (208, 208), (1, 1), 13, 32, 32, 8), 4, 1024),
        (Shape(8, 4, 128, (512, 512), (4, 2), 1, 32, 32, 8), None, 0),
        (Shape(2, 7, 64, (56, 48), (1, 1), 12, 16, 64, 8, 32, True), 8, 0),
    ]:
        if form is FP8 and arch == 80:
            continue
        dtype, n_pages = torch.bfloat16, 2**20
        latents = empty_latents(n_pages, shape, dtype, form, torch.nan)
        landmarks = empty_landmarks(n_pages, shape, dtype, 4) if budget else None
        heads = (shape.kv_heads, shape.head_dim)
        ups = [
            torch.empty(*heads, rank // groups, dtype=dtype)
            for rank, groups in zip(shape.ranks, shape.groups, strict=True)
        ]
        means = torch.empty(2, *heads)
        width = shape.width or shape.head_dim
        angles = torch.empty(2, 2**17, width // 2)
        page = (shape.page_size, shape.head_dim)
        pools = torch.empty(n_pages, shape.kv_heads, 2, *page, dtype=dtype).unbind(2)
        q = torch.empty(7, shape.kv_heads * shape.group + 8, shape.head_dim, dtype=dtype)[:, :-8]
        tables, lengths = torch.empty(2, 7, 63).int(), torch.empty(2, 7).int()
        plan = plan_latent_split(
            tables[0],
            lengths[0],
            tables[1],
            lengths[1],
            pools[0],
            q.shape[1],
            None,
            landmarks=landmarks,
            budget=budget,
        )
        latent_attention(
            q,
            LatentBasis(key_up=ups[0], key_mean=means[0], value_up=ups[1], value_mean=means[1]),
            latents,
            *pools,
            plan,
            RotaryTable(
                cos=angles[0], sin=angles[1], interleaved=shape.is_interleaved, width=width
            ),
            0.1,
            landmarks=landmarks,
            budget=budget,
        )


@pytest.mark.parametrize(("budget", "window"), [(0, None), (10_000, 70)])
@EVERY
def test_attention(
    path: str,
    dtype: torch.dtype,
    oracle: ModuleType,
    shape: Shape,
    form: Form,
    budget: int,
    window: int | None,
) -> None:
    """To all latent tokens, or to all that were selected where the budget is enough for all."""
    case = make(oracle, shape, dtype, form)
    case.close(oracle, case.attend(window=window, budget=budget), window)


def test_a_window_of_one(path: str, dtype: torch.dtype, oracle: ModuleType) -> None:
    case = make(oracle, SHAPES[0], dtype)
    case.close(oracle, case.attend(window=1), 1)


@pytest.mark.parametrize(
    ("shape", "form", "window"),
    [(*setup, window) for setup, window in zip(SETUPS, (None, 70) * 3, strict=True)],
    ids=str,
)
def test_selected_chunks_alone_are_attended_to(
    path: str, oracle: ModuleType, shape: Shape, form: Form, window: int | None
) -> None:
    """And they are those that an independent computation selects."""
    case = make(oracle, shape, torch.float32, form)
    chunk, n_chunks = shape.chunk, 5
    got = case.attend(window=window, budget=n_chunks * chunk)
    assert not torch.allclose(got[0], case.attend(window=window)[0])
    for s in range(len(CONTEXTS)):
        length, whole = len(case.k[s]), case.folded_len[s]
        begin = 0 if window is None else max(0, length - window)
        seen = range(begin // chunk, whole // chunk)
        for g in range(shape.kv_heads):
            heads = slice(g * shape.group, (g + 1) * shape.group)
            tokens = [*range(max(begin, whole), length)]
            if seen:
                mark = landmarks_of(oracle, case, s, g)[seen.start :]
                logit = case.scale * case.q[s, heads].double().cpu() @ mark.T
                score = logit.log_softmax(-1).amax(0).tolist()
                score[0] = torch.inf if seen.start == 0 else score[0]
                order = sorted(range(len(score)), key=lambda c: (-score[c], c))[:n_chunks]
                chosen = [seen.start + c for c in order]
                tokens += [t for c in chosen for t in range(c * chunk, c * chunk + chunk)]
            tokens = [t for t in tokens if t >= begin]
            k, v = (x[s][tokens, g : g + 1] for x in (case.k, case.v))
            want = oracle.attend(case.q[s, heads], k, v, len(tokens) - 1, case.scale, None)
            oracle.close(got[s, heads], want)


def landmarks_of(oracle: ModuleType, case: Case, s: int, g: int) -> torch.Tensor:
    """[chunks, head_dim] float64 – the landmarks of a sequence, of one KV head."""
    chunk, pages = case.shape.chunk, case.folded_table[s]
    stored = case.landmarks.keys[pages, g]
    if case.landmarks.bits:
        assert case.landmarks.scale is not None
        scale = case.landmarks.scale[pages, g]
        back = torch.from_numpy(oracle.dequantize(stored.cpu(), scale, case.landmarks.bits, -1))
    else:
        back = stored.double().cpu()
    return back.flatten(0, 1)[: case.folded_len[s] // chunk]


@pytest.mark.parametrize("budget", [0, 40], ids="budget={}".format)
@pytest.mark.parametrize(
    ("shape", "form"), [(replace(SHAPES[0], kv_heads=1), 4), (SHAPES[1], None)], ids=str
)
def test_a_sequence_depends_on_itself_alone(
    path: str, dtype: torch.dtype, oracle: ModuleType, shape: Shape, form: Form, budget: int
) -> None:
    """Bitwise: among neighbours, alone, on other pages, and however the pages are read."""
    together = make(oracle, shape, dtype, form).attend(budget=budget)
    assert not torch.equal(together[2], together[3])
    for seed, scattered, token_bytes in LAYOUTS:
        case = make(oracle, shape, dtype, form, seed=seed, scattered=scattered)
        assert torch.equal(case.attend(budget=budget, token_bytes=token_bytes), together)
    for s in (1, 3):
        assert torch.equal(case.attend([s], budget=budget)[0], together[s])


def test_without_latent_pages_it_is_decode_attention(
    path: str, dtype: torch.dtype, oracle: ModuleType
) -> None:
    case = make(oracle, SHAPES[0], dtype)
    whole = [s for s, n in enumerate(case.folded_len) if not n]
    tables, lengths = [case.page_table[s] for s in whole], [len(case.k[s]) for s in whole]
    plan = (
        plan_split(
            rectangle(tables),
            torch.tensor(lengths).int(),
            case.k_pages,
            case.q.shape[1],
            None,
            least_chunk=64,
        )
        if use_triton(case.q)
        else plan_decode(tables, lengths, case.shape.page_size, None, case.q.device)
    )
    want = decode_attention(case.q[whole], case.k_pages, case.v_pages, plan, case.scale)
    assert torch.equal(case.attend(whole), want)


def test_a_nan_in_a_latent_page_stays_with_its_sequence(path: str, oracle: ModuleType) -> None:
    case = make(oracle, SHAPES[2], torch.float32)
    clean = case.attend()
    case.latents.values[case.folded_table[3][1]] = torch.nan
    got = case.attend()
    assert got[3].isnan().all()
    others = [s for s in range(len(CONTEXTS)) if s != 3]
    assert torch.equal(got[others], clean[others])


@pytest.mark.parametrize("form", [None, FP8, 8, 4], ids=str)
def test_what_nobody_wrote_does_not_matter(
    path: str, dtype: torch.dtype, oracle: ModuleType, form: Form
) -> None:
    got = [
        make(oracle, SHAPES[1], dtype, form, poison=poison).attend()
        for poison in (torch.nan, 0, torch.inf)
    ]
    assert torch.equal(got[0], got[1])
    assert torch.equal(got[0], got[2])


def test_large_scores_do_not_overflow(path: str, oracle: ModuleType) -> None:
    case = make(oracle, SHAPES[2], torch.float32, 8)
    case.q.mul_(1e4)
    assert case.attend().isfinite().all()
    assert case.attend(budget=40).isfinite().all()


def test_absorbed_values_are_reconstructed_values(path: str, oracle: ModuleType) -> None:
    """With a full orthonormal basis either is the value itself: nothing is lost but rounding."""
    shape = Shape(2, 2, 32, (64, 64), (1, 1), 3, 8, 4, 4)
    case = make(oracle, shape, torch.float32)
    with torch.device("cpu"):
        keys, values, directions = torch.randn(3, 24, 64, generator=torch.Generator())
        full = torch.linalg.qr(directions.T @ directions + torch.eye(64))[0]
    device, rows = case.q.device, full.view(2, 32, 64)
    for up in (case.basis.key_up, case.basis.value_up):
        up.copy_(rows.to(device))
    pages, groups = torch.tensor(case.folded_table[3][:1] * 3), torch.arange(3)
    means = case.basis.key_mean.cpu(), case.basis.value_mean.cpu()
    latents = [
        ((x - mean.flatten()) @ full).view(3, 1, 8, 64).to(device)
        for x, mean in zip((keys, values), means, strict=True)
    ]
    write_folded(*latents, pages, groups, case.latents)
    # The other latents are unlike their keys now.
    got = case.attend([3], window=None)
    for up, mean, pool, stored in (
        (full, means[0], case.latents.keys[:, 0].flatten(1, 2), case.k[3]),
        (full, means[1], case.latents.values[:, 0, 0], case.v[3]),
    ):
        latent = pool[case.folded_table[3]].flatten(0, 1)[: case.folded_len[3]].cpu()
        stored[: len(latent)] = (latent @ up.T + mean.flatten()).view(-1, 2, 32).double()
    case.k[3][:24], case.v[3][:24] = keys.view(24, 2, 32), values.view(24, 2, 32)
    whole, angle = case.folded_len[3], rotary_table(shape, 1)[1]
    case.k[3][:whole] = rotated(case.k[3][:whole], angle, shape)
    position = len(case.k[3]) - 1
    want = oracle.attend(case.q[3], case.k[3], case.v[3], position, case.scale, None)
    oracle.close(got[0], want)


def test_strangers_are_refused(oracle: ModuleType) -> None:
    case = make(oracle, SHAPES[2], torch.float32)
    plan = case.plan(range(len(CONTEXTS)), None)

    def attend(
        basis: LatentBasis = case.basis,
        latents: FoldedPages = case.latents,
        landmarks: Landmarks | None = None,
    ) -> None:
        pools = case.k_pages, case.v_pages
        latent_attention(
            case.q, basis, latents, *pools, plan, case.rotary, 1.0, landmarks=landmarks, budget=8
        )

    other = make(oracle, SHAPES[0], torch.float32)
    with pytest.raises(ValueError, match=r"basis\.key_up has shape"):
        attend(other.basis)
    with pytest.raises(ValueError, match=r"basis\.key_up has 24 columns for latents of 40"):
        attend(latents=other.latents)
    with pytest.raises(ValueError, match=r"latents\.keys has dtype"):
        attend(latents=make(oracle, SHAPES[2], torch.bfloat16).latents)
    with pytest.raises(ValueError, match=r"landmarks\.chunk is 3"):
        attend(landmarks=make(oracle, SHAPES[3], torch.float32).landmarks)
    with pytest.raises(ValueError, match=r"folded_len\[0\] is 99"):
        plan_latents([[1]], [99], [[1, 2]], [2], 8, 8, None, case.q.device, unit=8)
