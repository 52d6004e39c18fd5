"""Fixtures that every test file shares: seeded numbers, each CPU instruction set, thread counts."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import lossops


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test sees the same numbers, whichever tests ran before it."""
    torch.manual_seed(20240229)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(20240229)


@pytest.fixture(params=lossops._C.available_cpu_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once with each instruction set that this processor has."""
    before = lossops._C.cpu_isa()
    lossops._C.set_cpu_isa(request.param)
    yield request.param
    lossops._C.set_cpu_isa(before)


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
