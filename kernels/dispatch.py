"""Checks at the public entry of a kernel: shape, dtype and device, with the argument named."""

from torch import Size, Tensor, device, dtype


def check(
    x: Tensor,
    name: str,
    *,
    shape: tuple[int | None, ...] | None = None,
    dtype: dtype | tuple[dtype, ...] | None = None,
    device: device | None = None,
) -> None:
    """Compare `x` with what the kernel can take; `None`, also within `shape`, accepts anything.

    Raises:
        ValueError: naming the argument, what was got and what is wanted.
    """
    if shape is not None and not _fits(x.shape, shape):
        wanted = ", ".join("any" if n is None else str(n) for n in shape)
        raise ValueError(f"{name} has shape {list(x.shape)}, wanted [{wanted}]")
    if dtype is not None and x.dtype not in (dtype if isinstance(dtype, tuple) else (dtype,)):
        raise ValueError(f"{name} has dtype {x.dtype}, wanted {dtype}")
    if device is not None and x.device != device:
        raise ValueError(f"{name} is on {x.device}, wanted {device}")


def _fits(got: Size, wanted: tuple[int | None, ...]) -> bool:
    return len(got) == len(wanted) and all(
        w is None or g == w for g, w in zip(got, wanted, strict=True)
    )
