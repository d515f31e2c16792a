"""rms_norm against the oracle and Hugging Face's rounding."""

import itertools
from types import ModuleType

import pytest
import torch
from kvfold.kernels.dispatch import forced
from kvfold.kernels.norm import add_rms_norm, rms_norm

SHAPES = [(1, 64), (7, 63), (129, 896), (7, 3, 128)]
EPS = 1e-5


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.usefixtures("path")
def test_rms_norm(oracle: ModuleType, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape).to(dtype)
    weight = torch.randn(shape[-1]).to(dtype)
    got = rms_norm(x, weight, EPS)
    assert got.dtype == dtype
    oracle.close(got, oracle.rms_norm(x, weight, EPS))


def test_the_product_comes_after_the_rounding() -> None:
    torch.manual_seed(1)
    x, weight = torch.randn(63, 896).bfloat16(), torch.randn(896).bfloat16()
    unit = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + EPS)
    assert torch.equal(rms_norm(x, weight, EPS), unit.bfloat16() * weight)


@pytest.mark.usefixtures("path")
def test_heads_of_a_fused_projection(oracle: ModuleType, dtype: torch.dtype) -> None:
    torch.manual_seed(4)
    qkv, weight = torch.randn(7, 5, 64).to(dtype), torch.randn(64).to(dtype)
    got = rms_norm(qkv[:, 1:4], weight, EPS)
    assert got.is_contiguous()
    oracle.close(got, oracle.rms_norm(qkv[:, 1:4], weight, EPS))


@pytest.mark.usefixtures("path")
def test_add_rms_norm_writes_the_residual(oracle: ModuleType, dtype: torch.dtype) -> None:
    torch.manual_seed(2)
    x, residual = torch.randn(2, 7, 129).to(dtype).unbind()
    weight = torch.randn(129).to(dtype)
    total = x + residual
    normed, kept = add_rms_norm(x, residual, weight, EPS)
    assert kept is residual
    assert torch.equal(kept, total)
    oracle.close(normed, oracle.rms_norm(total, weight, EPS))


@pytest.mark.usefixtures("path")
def test_a_row_depends_on_itself_alone(dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    x, weight = torch.randn(129, 896).to(dtype), torch.randn(896).to(dtype)
    full = rms_norm(x, weight, EPS)
    for n in (1, 7, 63):
        assert torch.equal(rms_norm(x[:n], weight, EPS), full[:n])


def test_a_foreign_weight_is_refused() -> None:
    with pytest.raises(ValueError, match=r"weight has shape \[7\], wanted \[64\]"):
        rms_norm(torch.zeros(1, 64), torch.zeros(7), EPS)


def test_scattered_columns_are_refused() -> None:
    with forced("triton"), pytest.raises(ValueError, match="x has strides"):
        rms_norm(torch.zeros(64, 7).T, torch.zeros(64), EPS)


def launches() -> None:
    """Hidden sizes and head widths of the supported models; float32 differs in registers only."""
    for dtype, dims in ((torch.bfloat16, (64, 896, 8192)), (torch.float32, (8192,))):
        for tokens, dim in itertools.product((1, 2**17), dims):
            x, weight = torch.empty(tokens, dim, dtype=dtype), torch.empty(dim, dtype=dtype)
            add_rms_norm(x, x, weight, EPS)
            rms_norm(torch.empty(tokens, 5, dim, dtype=dtype)[:, 1:], weight, EPS)
