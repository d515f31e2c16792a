"""Copies between host and device keep what they carry."""

import numpy as np
import pytest
import torch
from kvfold.engine.device import Device, open_device

ARRAYS = {
    "tokens": np.arange(7),
    "none": np.zeros(0, np.int64),
    "table": np.arange(6, dtype=np.int32).reshape(2, 3),
    "turned": np.arange(6, dtype=np.int32).reshape(2, 3).T,
    "share": np.array([0.5, -1.0], np.float32),
    "empty": np.zeros((0, 3), np.int32),
    "seed": np.array([-(2**63)]),
}


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Device:
    return open_device(request.param)


def test_arrays_arrive_as_they_were(device: Device):
    moved = device.put(ARRAYS)
    assert list(moved) == list(ARRAYS)
    for name, array in ARRAYS.items():
        assert moved[name].device == device.device
        assert moved[name].shape == array.shape
        assert moved[name].cpu().numpy().dtype == array.dtype
        assert (moved[name].cpu().numpy() == array).all()


def test_they_lie_in_one_block_each_at_an_aligned_place(device: Device):
    moved = device.put(ARRAYS)
    (block,) = {x.untyped_storage().data_ptr() for x in moved.values()}
    assert not any((x.data_ptr() - block) % 128 for x in moved.values() if x.numel())


def test_a_later_copy_leaves_an_earlier_one_alone(device: Device):
    moved = [device.put({"n": np.full(1000, i)})["n"] for i in range(50)]
    arrived = [device.fetch(x) for x in moved]
    for i, wait in enumerate(arrived):
        (host,) = wait()
        assert host.is_cpu
        assert (host == i).all()


def test_what_is_fetched_is_what_it_was_when_it_was_asked_for(device: Device):
    x = torch.ones(3, device=device.device)
    wait = device.fetch(x + 1, x)
    assert [host.tolist() for host in wait()] == [[2.0] * 3, [1.0] * 3]


def test_recorded_work_is_done_on_what_tensors_hold_by_then(device: Device):
    x, y = (torch.zeros(4, device=device.device) for _ in range(2))
    record = device.recorder()

    def work() -> None:
        y.copy_(x * 2 + 1)

    def more() -> None:
        y[:2].copy_(x[:2] - 1)

    again, then = record(work), record(more)
    x.fill_(3)
    again()
    assert y.tolist() == [7.0] * 4
    then()
    assert y.tolist() == [2.0, 2.0, 7.0, 7.0]


@pytest.mark.gpu
def test_a_peak_is_what_work_takes_and_gives_back():
    device = open_device("cuda")
    before = device.used_bytes()
    peak = device.peak_bytes(lambda: torch.ones(2**26, device="cuda").sum().item())
    assert 2**28 <= peak < 2**29
    assert device.used_bytes() < before + 2**28
