"""Before the first import: offline, and the Triton interpreter where there is no GPU."""

import os
from collections.abc import Iterator

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

# The models of the tests are too small to share among threads.
torch.set_num_threads(1)

if not torch.cuda.is_available():
    # Chosen when a kernel is decorated, so it must be set before kernels are imported.
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True)
def poison() -> Iterator[None]:
    """Fill fresh memory with NaN, so that reading what nobody wrote shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def anyio_backend() -> str:
    """Async tests run on asyncio, as the server does."""
    return "asyncio"
