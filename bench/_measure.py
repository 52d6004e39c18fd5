"""What a case is, and how time, memory and the machine's copy rate are measured.

`Cpu` and `Cuda` are the two meters; they have the same methods, and nothing else in bench/ knows
the device.
"""

from __future__ import annotations

import ctypes
import gc
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.benchmark import Timer

Loss = Callable[..., Tensor]
Step = Callable[[], Tensor]

COPY_BYTES = 2**28  # or the caches would be measured


@dataclass(frozen=True, kw_only=True)
class Case:
    """One problem: a loss's arguments, what it must move at least, and how fast it is to be."""

    name: str
    dtype: torch.dtype
    elements: int
    forward_bytes: int  # the least that the forward pass must read and write
    backward_bytes: int
    make: Callable[[torch.device], dict[str, Tensor]]  # the loss's tensors, `input` among them
    options: dict[str, Any] = field(default_factory=dict)  # its other arguments
    speedup: float | None = None  # target for eager time / ours, forward + backward, CPU, 2 threads
    forward_speedup: float | None = None  # the same, forward only
    plain: bool = False  # whether peers take it: (N, C), class indices, no option

    def bytes_moved(self, backward: bool) -> int:
        return self.forward_bytes + (self.backward_bytes if backward else 0)

    def target(self, backward: bool) -> float | None:
        return self.speedup if backward else self.forward_speedup

    def arguments(self, device: torch.device) -> dict[str, Any]:
        torch.manual_seed(0)
        tensors = self.make(device)
        tensors["input"].requires_grad_()
        return {**tensors, **self.options}


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def make_step(loss: Loss, arguments: dict[str, Any], backward: bool) -> Step:
    """A training step's loss and fresh gradient, or an evaluation's loss."""
    x = arguments["input"]

    def train() -> Tensor:
        x.grad = None  # or the gradient is added to the last step's
        result = loss(**arguments)
        result.backward()
        return result

    def evaluate() -> Tensor:
        with torch.no_grad():
            return loss(**arguments)

    return train if backward else evaluate


def check_agreement(
    name: str, result: Tensor, grad: Tensor | None, expected: Tensor, expected_grad: Tensor | None
) -> None:
    """Raises where an implementation computes something else: a fast wrong answer is no result.

    2 % is what bfloat16 needs, in which torch rounds its intermediate results.
    """
    norm = torch.linalg.vector_norm
    pairs = [(result.detach(), expected.detach())]
    if grad is not None and expected_grad is not None:
        pairs.append((grad, expected_grad))
    for got, want in pairs:
        error = norm(got.float() - want.float()) / norm(want.float())
        if not error <= 0.02:  # nor NaN
            raise AssertionError(f"{name} disagrees with eager PyTorch by {error:.1%}")


class Cpu:
    """Wall-clock time, and the peak of the resident set as the kernel counts it."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None)
        self._map_each_block(False)

    def _map_each_block(self, each: bool) -> None:
        """Sets from which size on glibc's malloc maps a block of its own.

        It adapts to what a program frees, up to 32 MiB: fixed there, the first case meets the
        malloc that a program has after some steps, and the order of the cases does not matter. For
        the peak every tensor gets its own pages, or a hole that a new one just misses would count.
        """
        m_trim_threshold, m_mmap_threshold = -1, -3
        if hasattr(self._libc, "mallopt"):
            self._libc.mallopt(m_mmap_threshold, 2**17 if each else 2**25)
            self._libc.mallopt(m_trim_threshold, 2**26)

    def iterations(self, seconds: float) -> int:
        """Steps in one timing: one, unless a step is so short that the clock would show."""
        return 1 if seconds >= 1e-3 else math.ceil(5e-3 / seconds)

    def time(self, step: Step, x: Tensor, iterations: int) -> float:
        """Seconds per step."""
        if iterations > 1:
            timer = Timer("step()", globals={"step": step}, num_threads=torch.get_num_threads())
            return timer.timeit(iterations).median
        # Not Timer: it warms up with two steps before each, which here would triple the run.
        x.grad = None  # giving the last gradient back to the system belongs to no step
        start = time.perf_counter()
        step()
        return time.perf_counter() - start

    def peak(self, step: Step, x: Tensor, kept: int) -> int | None:
        """Peak bytes during a step beyond what was resident before it and the `kept` gradient.

        Within 1 MB or so: the kernel counts in batches, and malloc's own pages come and go. None
        where there is no /proc.
        """
        readings = []
        self._map_each_block(True)
        try:
            for _ in range(3):
                x.grad = None
                gc.collect()
                self._libc.malloc_trim(0)  # freed blocks that it holds on to would hide new ones
                Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
                before = _proc_status("VmRSS")
                step()
                readings.append(_proc_status("VmHWM") - before - kept)
        except (OSError, AttributeError):
            return None
        finally:
            self._map_each_block(False)
        return max(0, min(readings))  # what else the process touches only adds

    def copy_rate(self) -> float:
        """Bytes per second of a large copy, read and write counted."""
        source = torch.ones(COPY_BYTES, dtype=torch.uint8)
        target = torch.zeros_like(source)
        seconds = [self.time(lambda: target.copy_(source), source, 1) for _ in range(7)]
        return 2 * COPY_BYTES / statistics.median(seconds)


def _proc_status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {key}")


class Cuda:
    """Device events with a cold L2, and the caching allocator's own peak."""

    device = torch.device("cuda")

    def __init__(self) -> None:
        l2 = torch.cuda.get_device_properties(self.device).L2_cache_size
        self._flush = torch.empty(max(4 * l2, 2**26), dtype=torch.uint8, device=self.device)

    def iterations(self, seconds: float) -> int:
        return 10

    def time(self, step: Step, x: Tensor, iterations: int) -> float:
        events = []
        for _ in range(iterations):
            x.grad = None
            # Overwrites the L2, and keeps the device busy while the host queues a short step.
            self._flush.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            step()
            end.record()
            events.append((start, end))
        torch.cuda.synchronize()
        return statistics.median(start.elapsed_time(end) for start, end in events) / 1e3

    def peak(self, step: Step, x: Tensor, kept: int) -> int | None:
        x.grad = None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return max(0, torch.cuda.max_memory_allocated() - before - kept)

    def copy_rate(self) -> float:
        source = torch.ones(4 * COPY_BYTES, dtype=torch.uint8, device=self.device)
        target = torch.zeros_like(source)
        return 2 * source.numel() / self.time(lambda: target.copy_(source), source, 20)
