"""The devices that tests run on, and the marks by which a test names its own.

`cpu`; `cuda`, where there is a GPU; and `cuda-emulated`, which needs none: the CUDA kernels as nvcc compiled
them, run on the CPU for tensors there. A file whose tests run on all three says so with
`pytestmark = pytest.mark.usefixtures("device")`, and its tests make their tensors without naming a device.

pytest -m cuda runs the tests of the GPU, -m "not cuda" all others, -k emulated those of the emulator.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import emulated
import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

import lossops

CPU, EMULATED, CUDA = "cpu", "cuda-emulated", "cuda"
DEVICES = (CPU, EMULATED, CUDA)
BACKENDS = (*(f"cpu-{isa}" for isa in lossops._C.available_cpu_isas()), EMULATED, CUDA)


def on(*devices: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("device", devices, indirect=True)


every_backend = on(*BACKENDS)  # what the kernels compute, with every instruction set of the CPU
cpu_only = on(CPU)  # what reaches no kernel, or is the CPU's own
cuda_kernels = on(EMULATED, CUDA)
gpu_only = on(CUDA)
# What looks at the way to the kernels (compilers, op registration), which is the CPU's for tensors there, or
# is too large for the emulator: it takes a second for a few million elements.
not_emulated = on(CPU, CUDA)
every_real_backend = on(*(backend for backend in BACKENDS if backend != EMULATED))


def why_not(device: str) -> str | None:
    """The reason for which no test can run on a device, or None."""
    if device == EMULATED:
        return emulated.why_not()
    if device == CUDA:
        if lossops._C.cuda_build_info() is None:
            return "lossops was built without CUDA"
        return None if torch.cuda.is_available() else "needs a GPU"
    return None


@contextmanager
def using(backend: str) -> Iterator[str]:
    """Makes tensors and runs kernels there; the device's name."""
    device = backend if backend in DEVICES else CPU
    context = {CPU: lambda: on_cpu(backend), EMULATED: emulated.emulation, CUDA: on_gpu}[device]
    with context():
        yield device
        if device != CPU:
            lossops.check_async_errors()  # no test leaves a bad class index behind


@contextmanager
def on_cpu(backend: str) -> Iterator[None]:
    before = lossops._C.cpu_isa()
    if backend != CPU:
        lossops._C.set_cpu_isa(backend.removeprefix("cpu-"))
    try:
        yield
    finally:
        lossops._C.set_cpu_isa(before)


@contextmanager
def on_gpu() -> Iterator[None]:
    torch.set_default_device("cuda")
    try:
        yield
    finally:
        torch.set_default_device(None)


def here(arguments: Any) -> Any:
    """Tensors that were made when a test file was imported, copied to where this test makes its own."""
    device = torch.get_default_device()
    return tree_map_only(Tensor, lambda t: t.to(device) if t.is_cpu else t, arguments)


def on_the_cpu(arguments: Any) -> Any:
    """Copies for torch's CPU kernels, where its CUDA kernels say otherwise: the mean over one ignored row
    without a batch dimension is NaN on the CPU, as with one, and 0 there."""
    return tree_map_only(Tensor, lambda t: t.detach().cpu(), arguments)


@contextmanager
def raises_index_error(device: str, match: str | None = None) -> Iterator[pytest.ExceptionInfo[IndexError]]:
    """For a class index out of range: the CPU raises in the call, CUDA records it for whoever asks."""
    with pytest.raises(IndexError, match=match) as error:
        yield error
        if device != CPU:
            lossops.check_async_errors()
