"""Fixtures that every test file shares: seeded numbers, devices, thread counts."""

from __future__ import annotations

import os
from collections.abc import Iterator

# Before torch: threads that spin while they wait take two thirds of the time where cores are shared.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch
from devices import CPU, CUDA, DEVICES, EMULATED, using, why_not


def device_of(item: pytest.Item) -> str:
    return item.callspec.params.get("device", CPU) if hasattr(item, "callspec") else CPU


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the tests of the GPU: -m cuda selects them, -m 'not cuda' all others."""
    for item in items.copy():
        device = device_of(item)
        if device == CUDA:
            item.add_marker(pytest.mark.cuda)
        if device in (EMULATED, CUDA) and item.callspec.params.get("threads", 1) > 1:
            items.remove(item)  # threads are the CPU's


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips what cannot run here. (Not in the fixture, whose skips are reported test by test.)"""
    reason = why_not(device_of(item))
    if reason is not None:
        pytest.skip(reason)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test sees the same numbers, whichever tests ran before it."""
    torch.manual_seed(20240229)


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Where the test's tensors are made and its kernels run: cpu, cuda-emulated or cuda."""
    with using(request.param) as name:
        yield name


@pytest.fixture
def restore_threads() -> Iterator[None]:
    """For tests that set the number of threads themselves."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest, restore_threads: None) -> int:
    torch.set_num_threads(request.param)
    return request.param
