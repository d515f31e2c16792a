"""What is tried before the pool is sized is the most that can be asked for."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from kvfold.cache.base import KVCache
from kvfold.cache.dense import DenseCache, DenseConfig
from kvfold.core.config import SchedulerSettings
from kvfold.core.errors import Refused
from kvfold.core.faults import arm
from kvfold.core.sequence import Sequence
from kvfold.engine.device import Device
from kvfold.engine.profile import GRAPH_BYTES, Need, measure
from kvfold.engine.runner import Flight, Runner
from kvfold.models.loader import load


class Meter(Device):
    """A CPU whose every look at memory finds more of it taken."""

    n_seen = 0

    def peak_bytes(self, work: Callable[[], None]) -> int:
        work()
        return 1000

    def used_bytes(self) -> int:
        self.n_seen += 1
        return 70 * self.n_seen


@pytest.mark.parametrize(
    ("settings", "contexts", "planned"),
    [
        ({"max_tokens": 48, "max_sequences": 5}, [64, 1, 1, 1, 44], [1, 1, 1, 1, 44]),
        ({"max_tokens": 132, "max_sequences": 3}, [64, 1, 2, 64, 64], [1, 1, 2, 64, 64]),
        ({"max_tokens": 65, "max_sequences": 1}, [1, 64], [1, 64]),
        ({"max_tokens": 4, "max_sequences": 4}, [64, 1, 1, 1], [1, 1, 1, 1]),
    ],
)
def test_the_largest_step_is_tried(
    checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    settings: dict,
    contexts: list[int],
    planned: list[int],
):
    tried = []
    launch = Runner.launch

    def noted(self: Runner, step: list[Sequence]) -> Flight:
        tried.append([(len(seq.tokens), seq.n_planned) for seq in step])
        flight = launch(self, step)
        assert len(flight.draws) == len(step)
        assert len(step[-1].prompt_logprobs) == step[-1].n_planned - 1
        return flight

    monkeypatch.setattr(Runner, "launch", noted)
    need = measured(Meter(torch.device("cpu")), DenseCache, checkpoint, settings, records=False)
    assert tried == [list(zip(contexts, planned, strict=True))]
    assert (need.step_bytes, need.graph_bytes) == (1000, 0)


def test_recording_is_tried_at_the_largest_size_alone(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    from table_cache import TableCache

    settings = {"max_sequences": 8, "max_tokens": 64}
    need = measured(Meter(torch.device("cpu")), TableCache, checkpoint, settings, records=True)
    assert need.graph_bytes == 70 + 3 * GRAPH_BYTES


def test_a_device_that_cannot_hold_the_largest_step_is_refused(checkpoint: Path):
    settings = {"max_sequences": 8, "max_tokens": 64}
    device = Meter(torch.device("cpu"))
    with (
        arm("runner.forward", error=torch.OutOfMemoryError),
        pytest.raises(Refused, match=r"--max-num-batched-tokens 64 for --max-num-seqs 8.*lower"),
    ):
        measured(device, DenseCache, checkpoint, settings, records=False)


def measured(
    device: Device, kind: type[KVCache], checkpoint: Path, settings: dict, *, records: bool
) -> Need:
    model = load(checkpoint, torch.float32, device.device, 64)
    spec = model.config.cache_spec(model.identity, 16, 64, 8, torch.float32, device.device)
    scheduler = SchedulerSettings(**settings)
    return measure(model, kind, DenseConfig(), spec, device, scheduler, records=records)
