"""Which path a kernel takes, and the checks at its public entry; triton may be absent."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal

from torch import Size, Tensor, device, dtype

__all__ = ["check", "forced", "jit", "tl", "triton", "use_triton"]

if TYPE_CHECKING:
    # The body of a kernel is Triton's language, which borrows Python's syntax and not its types.
    # mypy knows this decorator by its bare name: with options, write @no_type_check above it.
    from typing import no_type_check as jit

    triton: Any
    tl: Any
else:
    try:
        import triton
        from triton import jit
        from triton import language as tl
    except ImportError:
        triton = None
        # What is evaluated while a module with kernels is imported.
        tl = SimpleNamespace(constexpr=lambda value: value)

        def jit(kernel=None, **options):
            return jit if kernel is None else kernel


Path = Literal["torch", "triton"]
_forced: ContextVar[Path | None] = ContextVar("forced", default=None)


def use_triton(x: Tensor) -> bool:
    """Whether a kernel reading `x` takes its Triton path: on a GPU, unless a test forced a path."""
    path = _forced.get()
    return x.is_cuda if path is None else path == "triton"


@contextmanager
def forced(path: Path) -> Iterator[None]:
    """Take this path whatever the device; for tests, as only they run Triton off a GPU."""
    token = _forced.set(path)
    try:
        yield
    finally:
        _forced.reset(token)


def check(
    x: Tensor,
    name: str,
    *,
    shape: tuple[int | None, ...] | None = None,
    dtype: dtype | tuple[dtype, ...] | None = None,
    device: device | None = None,
    dense: int = 0,
) -> None:
    """Compare `x` with what the kernel can take; `None`, also within `shape`, accepts anything.

    Args:
        x: the argument.
        name: the argument's name.
        shape: its size per dimension.
        dtype: its dtype, or the dtypes to choose from.
        device: where it lies.
        dense: how many of its last dimensions lie in memory without gaps, in order.

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
    if dense and not _is_dense(x, dense):
        raise ValueError(
            f"{name} has strides {list(x.stride())} for shape {list(x.shape)},"
            f" wanted its last {dense} dimensions contiguous"
        )


def _fits(got: Size, wanted: tuple[int | None, ...]) -> bool:
    return len(got) == len(wanted) and all(
        w is None or g == w for g, w in zip(got, wanted, strict=True)
    )


def _is_dense(x: Tensor, n: int) -> bool:
    stride = 1
    for size, step in zip(x.shape[: -n - 1 : -1], x.stride()[: -n - 1 : -1], strict=True):
        if size != 1 and step != stride:
            return False
        stride *= size
    return True
