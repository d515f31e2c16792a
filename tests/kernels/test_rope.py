"""Rotation against complex multiplication, and back again."""

from types import ModuleType

import pytest
import torch
from kvfold.kernels.rope import RotaryTable, rotate, rotate_back

DTYPES = [torch.float32, torch.bfloat16]
POSITIONS = 500
# tokens, heads, head_dim, width
SHAPES = [(1, 1, 64, 64), (7, 3, 96, 96), (63, 2, 128, 32), (5, 14, 64, 64)]


def angles(width: int) -> torch.Tensor:
    return 10_000 ** (-torch.arange(0, width, 2).double() / width)


def table(width: int, *, interleaved: bool, factor: float = 1.0) -> RotaryTable:
    turn = torch.arange(POSITIONS).double().outer(angles(width))
    return RotaryTable(
        cos=(turn.cos() * factor).float(),
        sin=(turn.sin() * factor).float(),
        interleaved=interleaved,
        width=width,
    )


@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "heads", "head_dim", "width"), SHAPES)
def test_rotate(
    oracle: ModuleType,
    tokens: int,
    heads: int,
    head_dim: int,
    width: int,
    dtype: torch.dtype,
    interleaved: bool,
) -> None:
    torch.manual_seed(0)
    x = torch.randn(tokens, heads, head_dim).to(dtype)
    positions = torch.randint(POSITIONS, (tokens,))
    got = rotate(x, positions, table(width, interleaved=interleaved))
    oracle.close(got, oracle.rotate(x, positions, angles(width), interleaved=interleaved))
    assert torch.equal(got[..., width:], x[..., width:])


def test_the_pairings_differ() -> None:
    torch.manual_seed(1)
    x, positions = torch.randn(7, 2, 64), torch.arange(1, 8)
    halves, pairs = (rotate(x, positions, table(64, interleaved=i)) for i in (False, True))
    assert not torch.allclose(halves, pairs)


@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
def test_an_attention_factor_scales_and_rotate_back_undoes_it(
    oracle: ModuleType, interleaved: bool
) -> None:
    torch.manual_seed(2)
    x, positions = torch.randn(63, 2, 96), torch.randint(POSITIONS, (63,))
    rotary = table(64, interleaved=interleaved, factor=1.25)
    turned = rotate(x, positions, rotary)
    want = oracle.rotate(x, positions, angles(64), interleaved=interleaved, factor=1.25)
    oracle.close(turned, want)
    oracle.close(rotate_back(turned, positions, rotary), oracle.array(x))


@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
def test_a_row_depends_on_itself_alone(interleaved: bool) -> None:
    torch.manual_seed(3)
    x, positions = torch.randn(129, 7, 96), torch.randint(POSITIONS, (129,))
    rotary = table(96, interleaved=interleaved)
    full = rotate(x, positions, rotary)
    for n in (1, 7, 63):
        assert torch.equal(rotate(x[:n], positions[:n], rotary), full[:n])


def test_strangers_are_refused() -> None:
    rotary = table(64, interleaved=False)
    with pytest.raises(ValueError, match="head_dim 32, wanted at least the width 64"):
        rotate(torch.zeros(1, 1, 32), torch.zeros(1, dtype=torch.int64), rotary)
    with pytest.raises(ValueError, match="positions has shape"):
        rotate(torch.zeros(1, 1, 64), torch.zeros(2, dtype=torch.int64), rotary)
