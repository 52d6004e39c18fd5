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
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.benchmark import Timer

import lossops

Loss = Callable[..., Tensor]
Step = Callable[[], Any]

COPY_BYTES = 2**28  # or the caches would be measured


@dataclass(frozen=True, kw_only=True)
class Case:
    """One problem: a loss's arguments, what it must move or multiply at least, and how fast it is to be."""

    name: str
    dtype: torch.dtype
    elements: int  # of the loss's input; for a linear head, of its logits
    forward_bytes: int = 0  # the least that the forward pass must read and write
    backward_bytes: int = 0
    flops: int = 0  # of its matrix products, where those and not the bytes take the time
    # The loss's tensors, `input` among them; it needs a gradient, and so does what requires one.
    make: Callable[[torch.device], dict[str, Tensor]]
    options: dict[str, Any] = field(default_factory=dict)  # its other arguments
    # What it is to reach on the CPU with 2 threads.
    speedup: float | None = None  # eager time / ours, forward + backward
    forward_speedup: float | None = None  # the same, forward only
    speedups: dict[str, float] = field(default_factory=dict)  # a peer's time / ours, forward + backward
    over_floor: float | None = None  # ours / the floor's, at most
    memory: int | None = None  # peak bytes beyond inputs and gradients, at most
    ours: Loss | None = None  # where a case is not of the module's own function
    eager: Loss | None = None  # what is written in torch where its loss lacks an option; else the module's
    floor: Callable[..., Step] | None = None  # of the arguments: what no implementation could leave out
    plain: bool = False  # whether peers take it: (N, C), class indices, no option
    in_place: bool = False  # whether ours writes over the logits
    tolerances: dict[str, float] = field(default_factory=dict)  # of peers less exact than others
    forward: bool = True  # whether the forward pass is timed alone, too
    patience: float = math.inf  # seconds of timings after which a contender sits out the rounds to come

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


def with_own_leaves(shared: dict[str, Any], grad: bool, copy: bool) -> tuple[dict[str, Any], list[Tensor]]:
    """The arguments with leaves of their own, which need a gradient or not, and those leaves.

    On the same memory, unless a copy is asked for.
    """
    arguments = dict(shared)
    leaves = []
    for name, value in shared.items():
        if isinstance(value, Tensor) and value.requires_grad:
            leaf = value.detach().clone() if copy else value.detach()
            arguments[name] = leaf.requires_grad_(grad)
            leaves.append(leaf)
    return arguments, leaves


def clear(leaves: Sequence[Tensor]) -> None:
    for leaf in leaves:
        leaf.grad = None


def make_step(loss: Loss, arguments: dict[str, Any], leaves: Sequence[Tensor], backward: bool) -> Step:
    """A training step's loss and fresh gradients, or an evaluation's loss."""

    def train() -> Tensor:
        clear(leaves)  # or the gradients are added to the last step's
        result = loss(**arguments)
        result.backward()
        return result

    def evaluate() -> Tensor:
        with torch.no_grad():
            return loss(**arguments)

    return train if backward else evaluate


def check_agreement(
    name: str,
    results: Sequence[Tensor | None],
    expected: Sequence[Tensor | None],
    tolerance: float | None = None,
) -> None:
    """Raises where an implementation computes something else: a fast wrong answer is no result.

    That is a loss and its gradients. 2 % is what bfloat16 needs, in which torch rounds its intermediate
    results; float32 lands far below its 0.1 %.
    """
    norm = torch.linalg.vector_norm
    for got, want in zip(results, expected, strict=True):
        if got is None and want is None:
            continue
        if got is None or want is None:
            raise AssertionError(f"{name} and eager PyTorch give gradients to different tensors")
        got, want = got.detach(), want.detach()
        error = norm(got.float() - want.float()) / norm(want.float())
        if not error <= (tolerance or (0.02 if want.dtype.itemsize == 2 else 1e-3)):  # nor NaN
            raise AssertionError(f"{name} disagrees with eager PyTorch by {error:.1%}")


class Cpu:
    """Wall-clock time, and the peak of the resident set as the kernel counts it."""

    device = torch.device("cpu")

    PEAK_SECONDS = 2.0  # after which no further reading of a peak begins, of three

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None)
        self.map_each_block(False)

    def map_each_block(self, each: bool) -> None:
        """Sets from which size on glibc's malloc maps a block of its own.

        It adapts to what a program frees, up to 32 MiB: fixed there, the first case meets the
        malloc that a program has after some steps, and the order of the cases does not matter. For
        the peak every tensor gets its own pages, or a hole that a new one just misses would count.
        """
        m_trim_threshold, m_mmap_threshold = -1, -3
        if hasattr(self._libc, "mallopt"):
            self._libc.mallopt(m_mmap_threshold, 2**17 if each else 2**25)
            self._libc.mallopt(m_trim_threshold, 2**26)

    def host_bound(self, elements: int) -> bool:
        return False  # host and device are one

    def iterations(self, elements: int, seconds: float) -> int:
        """Steps in one timing: one, unless a step is so short that it shows what is in the caches before it.

        Then several, each of which meets there what its own implementation has left, as in a loop.
        """
        return 1 if seconds >= 1e-2 else math.ceil(2e-2 / seconds)

    def time(self, step: Step, leaves: Sequence[Tensor], iterations: int) -> float:
        """Seconds per step."""
        if iterations > 1:
            timer = Timer("step()", globals={"step": step}, num_threads=torch.get_num_threads())
            return timer.timeit(iterations).median
        # Not Timer: it warms up with two steps before each, which here would triple the run.
        clear(leaves)  # giving the last gradients back to the system belongs to no step
        start = time.perf_counter()
        step()
        return time.perf_counter() - start

    def peak(self, step: Step, leaves: Sequence[Tensor], kept: int) -> int | None:
        """Peak bytes during a step beyond what was resident before it and the `kept` gradients.

        Within 1 MB or so: the kernel counts in batches, and malloc's own pages come and go. None
        where there is no /proc.
        """
        readings: list[int] = []
        self.map_each_block(True)
        start = time.perf_counter()
        try:
            while len(readings) < 2 or (
                len(readings) < 3 and time.perf_counter() - start < self.PEAK_SECONDS
            ):
                clear(leaves)
                gc.collect()
                self._libc.malloc_trim(0)  # freed blocks that it holds on to would hide new ones
                lossops.empty_cache()  # and so would those that lossops keeps
                for leaf in leaves:
                    leaf.detach().amax()  # in memory, if the system has taken pages that were idle
                Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
                before = _proc_status("VmRSS")
                step()
                readings.append(_proc_status("VmHWM") - before - kept)
        except (OSError, AttributeError):
            return None
        finally:
            self.map_each_block(False)
        return max(0, min(readings))  # what else the process touches only adds

    def copy_rate(self) -> float:
        """Bytes per second of a large copy, read and write counted."""
        source = torch.ones(COPY_BYTES, dtype=torch.uint8)
        target = torch.zeros_like(source)
        seconds = [self.time(lambda: target.copy_(source), [], 1) for _ in range(7)]
        return 2 * COPY_BYTES / statistics.median(seconds)


def _proc_status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {key}")


class Cuda:
    """Device time with a cold L2, wall time of steps that are all launches, the allocator's peak."""

    device = torch.device("cuda")

    HOST_BOUND_UP_TO = 2**18  # elements: a microsecond for an H100's memory
    WALL_STEPS = 200

    # Cycles that the device spins while the host queues a step: about 1 ms at 2 GHz, several times
    # what a step takes to queue. The second is for a host that was interrupted.
    SLEEP_CYCLES = (2_000_000, 10_000_000)

    def __init__(self) -> None:
        l2 = torch.cuda.get_device_properties(self.device).L2_cache_size
        self._cold = torch.zeros(max(4 * l2, 2**26) // 4, dtype=torch.float32, device=self.device)
        self._sum = torch.zeros((), dtype=torch.float32, device=self.device)

    def host_bound(self, elements: int) -> bool:
        """Whether a step of that size is the host's launches, so that the wall clock is what counts."""
        return elements <= self.HOST_BOUND_UP_TO

    def iterations(self, elements: int, seconds: float) -> int:
        return self.WALL_STEPS if self.host_bound(elements) else 1

    def time(self, step: Step, leaves: Sequence[Tensor], iterations: int) -> float:
        """Seconds of the device for one step; of the wall clock for each of several in a row."""
        return self._wall_time(step, iterations) if iterations > 1 else self._device_time(step, leaves)

    def _wall_time(self, step: Step, iterations: int) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(iterations):
            step()
        torch.cuda.synchronize()
        return (time.perf_counter() - start) / iterations

    def _device_time(self, step: Step, leaves: Sequence[Tensor]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for cycles in self.SLEEP_CYCLES:
            clear(leaves)
            # Empties the L2 by reading: lines that a write left would be written back at the expense
            # of the step (17 us for an H100's 50 MB).
            torch.sum(self._cold, 0, out=self._sum)
            # The device waits for the host, or a gap between two launches would count as the step's.
            torch.cuda._sleep(cycles)
            start.record()
            step()
            end.record()
            if not start.query():  # still asleep: all of the step was queued in time
                break
        # A step that itself waits for the device never is; what its host does then is part of it.
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def peak(self, step: Step, leaves: Sequence[Tensor], kept: int) -> int | None:
        clear(leaves)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return max(0, torch.cuda.max_memory_allocated() - before - kept)

    def copy_rate(self) -> float:
        """Bytes per second of a large copy in device memory, read and write counted."""
        source = torch.ones(4 * COPY_BYTES, dtype=torch.uint8, device=self.device)
        target = torch.zeros_like(source)
        seconds = [self.time(lambda: target.copy_(source), [], 1) for _ in range(21)]
        return 2 * source.numel() / statistics.median(seconds)
