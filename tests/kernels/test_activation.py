"""silu_mul against the oracle, and alike for every number of rows and threads."""

import itertools
from types import ModuleType

import pytest
import torch
from kvfold.kernels.activation import silu_mul


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize(("tokens", "width"), [(1, 63), (7, 129), (63, 64), (2, 2049)])
def test_silu_mul(oracle: ModuleType, tokens: int, width: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = (torch.randn(tokens, 2 * width) * 4).to(dtype)
    oracle.close(silu_mul(x), oracle.silu_mul(x))


@pytest.mark.usefixtures("path")
def test_large_gates_do_not_overflow_into_nan() -> None:
    gate_up = torch.tensor([[-1e4, -88.0, 88.0, 1e4, 1.0, 1.0, 1.0, 1.0]])
    assert torch.equal(silu_mul(gate_up)[0, [0, 2, 3]], torch.tensor([0.0, 88.0, 1e4]))


@pytest.mark.usefixtures("two_threads", "path")
def test_a_row_depends_on_itself_alone() -> None:
    torch.manual_seed(1)
    x = torch.randn(129, 2 * 1001) * 4
    full = silu_mul(x)
    for n in (1, 7, *range(63, 129, 4)):
        assert torch.equal(silu_mul(x[:n]), full[:n])


def test_an_odd_row_is_refused() -> None:
    with pytest.raises(ValueError, match="gate_up has 7 columns"):
        silu_mul(torch.zeros(1, 7))


def launches() -> None:
    """Widths of the supported models, in both dtypes they are served in."""
    for dtype in (torch.bfloat16, torch.float32):
        for tokens, width in itertools.product((1, 2**17), (4864, 8192, 14336)):
            silu_mul(torch.empty(tokens, 2 * width, dtype=dtype))
