"""Packed weights compute the product, hold what they say, and treat every row alike."""

from types import ModuleType

import pytest
import torch
from kvfold.kernels.dispatch import forced
from kvfold.kernels.linear import linear, linear_few, pack
from torch.nn import functional as F

DTYPES = [torch.float32, torch.bfloat16]


def case(
    out_features: int, in_features: int, dtype: torch.dtype, tokens: int = 129
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    weight = (torch.randn(out_features, in_features) / in_features**0.5).to(dtype)
    return torch.randn(tokens, in_features).to(dtype), weight, torch.randn(out_features).to(dtype)


@pytest.mark.parametrize("with_bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("out_features", "in_features"), [(1, 7), (63, 129), (129, 64)])
@pytest.mark.parametrize("tokens", [1, 7, 129])
def test_linear(
    oracle: ModuleType,
    tokens: int,
    out_features: int,
    in_features: int,
    dtype: torch.dtype,
    with_bias: bool,
) -> None:
    x, weight, bias = case(out_features, in_features, dtype, tokens)
    given = bias if with_bias else None
    oracle.close(linear(x, pack(weight, given)), oracle.linear(x, weight, given))


@pytest.mark.parametrize("with_bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("out_features", "in_features"), [(1152, 896), (128, 4864), (63, 129)], ids=str
)
def test_a_row_depends_on_itself_alone(
    out_features: int, in_features: int, dtype: torch.dtype, with_bias: bool
) -> None:
    x, weight, bias = case(out_features, in_features, dtype)
    packed = pack(weight, bias if with_bias else None)
    if packed.packed is None:
        pytest.skip("this torch packs nothing on this machine")
    full = linear(x, packed)
    for n in (1, 2, 3, 7, 32):
        assert torch.equal(linear(x[:n], packed), full[:n])
        assert torch.equal(linear(x[-n:], packed), full[-n:])


@pytest.mark.parametrize("keep", [False, True], ids=["dropped", "kept"])
def test_bytes_held(keep: bool) -> None:
    _, weight, bias = case(128, 256, torch.float32)
    packed = pack(weight, bias, keep=keep)
    assert (packed.weight is weight) == (keep or packed.packed is None)
    copies = 2 if keep and packed.packed is not None else 1
    assert packed.nbytes == copies * weight.nbytes + bias.nbytes


def test_few_row_counts_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each count that oneDNN has met costs memory that it never returns."""
    multiply = torch.ops.mkldnn._linear_pointwise
    met = set()

    def counting(x: torch.Tensor, *rest: object) -> torch.Tensor:
        met.add(len(x))
        return multiply(x, *rest)

    x, weight, _ = case(8, 8, torch.float32, tokens=2048)
    packed = pack(weight)
    if packed.packed is None:
        pytest.skip("this torch packs nothing on this machine")
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", counting)
    full = linear(x, packed)
    for n in range(1, 2049):
        assert torch.equal(linear(x[:n], packed), full[:n])
    assert len(met) <= 32
    assert all(any(n <= m <= 1.25 * n for m in met) for n in range(16, 2049))


def test_no_rows() -> None:
    x, weight, _ = case(63, 129, torch.float32, tokens=0)
    assert linear(x, pack(weight)).shape == (0, 63)


def test_without_the_private_operators_the_plain_product_serves(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def missing(*_: object) -> None:
        raise AttributeError("_reorder_linear_weight")

    monkeypatch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", missing, raising=False)
    x, weight, bias = case(63, 129, torch.float32)
    packed = pack(weight, bias)
    assert packed.packed is None
    assert torch.equal(linear(x, packed), F.linear(x, weight, bias))


def test_a_wrong_private_operator_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(x: torch.Tensor, *_: object) -> torch.Tensor:
        return torch.zeros(len(x), 63)

    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", wrong, raising=False)
    _, weight, _ = case(63, 129, torch.float32)
    assert pack(weight).packed is None


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("with_bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize(("out_features", "in_features"), [(1, 7), (65, 129), (63, 1200)])
@pytest.mark.parametrize("tokens", [0, 1, 7, 16])
def test_linear_few(
    oracle: ModuleType,
    tokens: int,
    out_features: int,
    in_features: int,
    dtype: torch.dtype,
    with_bias: bool,
) -> None:
    """Inputs in one span and in several."""
    x, weight, bias = case(out_features, in_features, dtype, tokens)
    given = bias if with_bias else None
    got = linear_few(x, weight, given)
    assert got.dtype == dtype
    oracle.close(got, oracle.linear(x, weight, given))


@pytest.mark.usefixtures("path")
def test_a_row_among_few_depends_on_itself_alone(path: str) -> None:
    if path == "torch":
        pytest.skip("only the device path promises it")
    x, weight, bias = case(65, 1200, torch.float16, 16)
    full = linear_few(x, weight, bias)
    for n in (1, 2, 7):
        assert torch.equal(linear_few(x[:n], weight, bias), full[:n])
        assert torch.equal(linear_few(x[-n:], weight, bias), full[-n:])


def test_many_rows_are_not_few() -> None:
    with forced("triton"), pytest.raises(ValueError, match="x has 17 rows, wanted at most 16"):
        linear_few(torch.zeros(17, 8), torch.zeros(3, 8), None)


def test_strangers_are_refused() -> None:
    with pytest.raises(ValueError, match=r"x has shape \[1, 7\], wanted \[any, 8\]"):
        linear(torch.zeros(1, 7), pack(torch.zeros(3, 8)))
    with pytest.raises(ValueError, match="bias has shape"):
        pack(torch.zeros(3, 8), torch.zeros(8))


def launches() -> None:
    """Projections of the supported models from the narrowest to the vocabulary."""
    for dtype, n_out, n_in in [
        (torch.bfloat16, 1152, 896),
        (torch.bfloat16, 151936, 896),
        (torch.float16, 4096, 14336),
        (torch.float32, 1152, 896),
    ]:
        weight, bias = torch.empty(n_out, n_in, dtype=dtype), torch.empty(n_out, dtype=dtype)
        for rows in (1, 7, 16):
            x = torch.empty(rows, n_in, dtype=dtype)
            linear_few(x, weight, bias)
    linear_few(x, weight, None)
