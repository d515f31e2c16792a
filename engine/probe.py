"""How much folding changes what the model says, measured on a few steps of what is being served.

The first step after a prompt was sealed reads its folded pages. For a sampled share of prompts a
*shadow* computes the same token in the same batch, in the full pages that the prompt was computed
in: `Scheduler.seal` forks it before they fold, and it is gone as soon as its step is launched.
What the shadow says is compared, and never drawn from.
"""

from collections.abc import Callable
from collections.abc import Sequence as Rows
from hashlib import blake2b

import numpy as np
import torch
from torch.nn import functional as F

from ..core.report import ProbeStats
from .device import Device


def is_sampled(request_id: str, share: float) -> bool:
    """Whether a request is of the `share`, 0 to 1, that is probed: by its id alone."""
    digest = blake2b(request_id.encode(), digest_size=4).digest()
    return int.from_bytes(digest) < share * (1 << 32)


def compare(
    logits: torch.Tensor, folded: Rows[int], dense: Rows[int], device: Device
) -> Callable[[], list[ProbeStats]]:
    """Compare rows of `logits` [R, vocab]: row `folded[i]` with row `dense[i]`.

    The result is on its way; the call that is returned waits for it.
    """
    rows = device.put({"folded": np.array(folded), "dense": np.array(dense)})
    # Double: the logarithms of sums alone would differ by as much as the lowest bound.
    q, p = (logits.index_select(0, at).double().log_softmax(dim=1) for at in rows.values())
    kl = F.kl_div(q, p, reduction="none", log_target=True).sum(dim=1).clamp_(min=0)
    arrival = device.fetch(kl, q.argmax(dim=1) == p.argmax(dim=1))
    return lambda: list(map(ProbeStats.of, *(column.tolist() for column in arrival())))
