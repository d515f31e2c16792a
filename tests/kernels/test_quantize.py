"""The quantiser: half a step of error at most, for groups of any sign, size and spread."""

from types import ModuleType

import pytest
import torch
from kvfold.kernels.quantize import affine, quantize, unpack

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(7, 2), (1, 16), (29, 64), (32, 96), (61, 128)]


def read_back(codes: torch.Tensor, scale: torch.Tensor, bits: int, dim: int) -> torch.Tensor:
    """What attention takes stored numbers for, without folding the scale into a factor."""
    factor, base = (part.unsqueeze(dim) for part in affine(scale, bits))
    return factor * unpack(codes, bits, torch.float32) + base


def numbers(shape: tuple[int, ...], mean: float, spread: float, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return (mean + spread * torch.randn(shape, generator=generator)).to(dtype)


@pytest.mark.parametrize("dim", [-2, -1])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("mean", "spread"),
    [(0.0, 1.0), (50.0, 1.0), (-50.0, 3.0), (0.0, 1e-7), (100.0, 1e-4), (0.0, 1e4), (3.0, 0.0)],
)
def test_every_number_comes_back_within_half_a_step(
    oracle: ModuleType,
    shape: tuple[int, int],
    dtype: torch.dtype,
    bits: int,
    dim: int,
    mean: float,
    spread: float,
) -> None:
    x = numbers((3, *shape), mean, spread, dtype)
    codes, scale = quantize(x, bits, dim)
    assert codes.shape == (3, shape[0], shape[1] * bits // 8)
    assert codes.dtype == torch.int8
    assert scale.dtype == torch.float16
    got = read_back(codes, scale, bits, dim)
    assert got.shape == x.shape
    want = oracle.dequantize(codes, scale, bits, dim)
    oracle.close(got, want)
    step = scale.double()[:, 0].unsqueeze(dim)
    error = (torch.from_numpy(want) - x.double()).abs()
    # The quotient is rounded once in float32.
    assert bool((error <= step * 0.5001 + 1e-6 * x.double().abs()).all())


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_one_signed_group_loses_no_more_than_a_centred_one(bits: int, sign: int) -> None:
    x = numbers((32, 64), 0.0, 1.0, torch.float32)
    errors = [
        (read_back(*quantize(x + shift, bits, -2), bits, -2) - x - shift).square().mean().sqrt()
        for shift in (0.0, 17.0 * sign)
    ]
    assert errors[1] <= 1.1 * errors[0]


@pytest.mark.parametrize("bits", [8, 4])
def test_steps_are_no_wider_than_the_range_needs(bits: int) -> None:
    x = numbers((4, 64, 128), 1.0, 2.0, torch.float32)
    _, scale = quantize(x, bits, -2)
    needed = (x.amax(-2) - x.amin(-2)) / (2**bits - 1)
    # A float16 ulp of the minimum, spread over the levels, and one of the scale.
    assert bool((scale[:, 0] <= needed * 1.002 + 2e-2 / (2**bits - 1)).all())


def test_representable_constants_are_exact() -> None:
    x = torch.full((2, 8, 4), -1.5)
    for bits in (8, 4):
        codes, scale = quantize(x, bits, -1)
        assert torch.equal(read_back(codes, scale, bits, -1), x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_codes_unpack_exactly(dtype: torch.dtype) -> None:
    every = torch.arange(-128, 128).to(torch.int8).view(2, 128)
    assert unpack(every, 8, dtype).double().flatten().tolist() == list(range(-128, 128))
    low, high = unpack(every, 4, dtype).chunk(2, -1)
    assert (low.amin(), low.amax()) == (-8, 7)
    assert torch.equal(low % 16 + 16 * high, unpack(every, 8, dtype))


def test_nonsense_is_refused() -> None:
    x = torch.zeros(4, 3)
    with pytest.raises(ValueError, match="bits is 5, wanted one of"):
        quantize(x, 5, -1)
    with pytest.raises(ValueError, match="x has 3 channels, wanted an even number"):
        quantize(x, 4, -1)
