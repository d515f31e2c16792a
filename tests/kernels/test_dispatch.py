"""A refused argument is named, with what was got and what is wanted."""

import pytest
import torch
from kvfold.kernels.dispatch import check

X = torch.zeros(2, 3)


def test_what_fits_passes() -> None:
    check(X, "x")
    check(X, "x", shape=(None, 3), dtype=torch.float32, device=X.device)
    check(X, "x", dtype=(torch.bfloat16, torch.float32))


@pytest.mark.parametrize("shape", [(2, 4), (2,), (None, 3, 1)], ids=str)
def test_shape_is_refused(shape: tuple[int | None, ...]) -> None:
    with pytest.raises(ValueError, match=r"x has shape \[2, 3\], wanted \["):
        check(X, "x", shape=shape)


def test_dtype_is_refused() -> None:
    with pytest.raises(ValueError, match=r"x has dtype torch\.float32, wanted torch\.int64"):
        check(X, "x", dtype=torch.int64)


def test_device_is_refused() -> None:
    with pytest.raises(ValueError, match="x is on cpu, wanted meta"):
        check(X, "x", device=torch.device("meta"))
