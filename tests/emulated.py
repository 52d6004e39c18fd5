"""The CUDA ops for CPU tensors, run by the emulator, and how they take the place of the CPU's own."""

from __future__ import annotations

import ctypes
import fcntl
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch
from cuda_emulator.build import CACHE, build_library, missing
from cuda_emulator.control import ASCENDING, ORDERS, Emulator

from lossops import _C, _ahead, _class_indices, _direct

CSRC = Path(__file__).parents[1] / "csrc"
OPS = "lossops_emulated"


def why_not() -> str | None:
    """Why nothing can be emulated here, or None."""
    reason = missing()
    return reason and f"the CUDA emulator {reason}"


@cache
def load(flavour: str = "plain") -> Path:
    """Builds what has changed (all of it takes over a minute) and registers torch.ops.lossops_emulated.

    A process can have one flavour only: both register the same ops.
    """
    from torch.utils.cpp_extension import TORCH_LIB_PATH, include_paths  # takes its time

    CACHE.mkdir(parents=True, exist_ok=True)
    with open(CACHE / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of pytest-xdist's workers one builds
        library = build_library(
            CACHE / f"{OPS}_{flavour}.so",
            sorted(CSRC.glob("cuda/*.cu")),
            [
                *(CSRC / name for name in ("cross_entropy.cpp", "mse.cpp", "library.cpp", "trace.cpp")),
                Path(__file__).with_name("emulated_trace.cpp"),
            ],
            flavour=flavour,
            include=include_paths(),
            define=[
                "LOSSOPS_EMULATED",
                'LOSSOPS_CUDA_ARCHITECTURES="compute_80"',
                "TORCH_TARGET_VERSION=0x020a000000000000",
            ],
            link=[f"-L{TORCH_LIB_PATH}", "-ltorch_cpu"],
        )
        torch.ops.load_library(library)
    return library


@contextmanager
def traced(library: Path) -> Iterator[None]:
    """While it lasts, `explain` finds what the library records, too."""
    emulated = ctypes.CDLL(str(library))
    emulated.emulated_stop_trace.restype = ctypes.c_char_p
    start, stop = _C.start_trace, _C.stop_trace

    def start_both() -> None:
        start()
        emulated.emulated_start_trace()

    def stop_both() -> list[tuple[str, str, str, int]]:
        lines = emulated.emulated_stop_trace().decode().splitlines()
        entries = (line.split("\t") for line in lines)
        return stop() + [(what, how, device, int(amount)) for what, how, device, amount in entries]

    _C.start_trace, _C.stop_trace = start_both, stop_both
    try:
        yield
    finally:
        _C.start_trace, _C.stop_trace = start, stop


@contextmanager
def in_place_of_the_cpus() -> Iterator[None]:
    """While it lasts, CPU tensors go to the ops of the library that is loaded, plain calls too."""
    before = _direct.ENABLED, _ahead.ENABLED
    _direct.ENABLED = _ahead.ENABLED = False
    overrides = torch.library.Library("lossops", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Warning only once for all operators")  # that a kernel is replaced
        for key in ("CPU", "CompositeExplicitAutograd"):
            for name in torch._C._dispatch_get_registrations_for_dispatch_key(key):
                namespace, _, op = name.partition("::")
                if namespace == OPS:
                    emulated = getattr(getattr(torch.ops, OPS), op).default
                    overrides.impl(op, emulated, key, allow_override=True)
        overrides.impl("class_indices", _class_indices.record, "CPU", allow_override=True)
    try:
        yield
    finally:
        overrides._destroy()
        _direct.ENABLED, _ahead.ENABLED = before


@contextmanager
def emulation() -> Iterator[None]:
    """While it lasts, CPU tensors go to the CUDA kernels."""
    library = load()
    with in_place_of_the_cpus(), traced(library):
        yield


@contextmanager
def order(run: int) -> Iterator[None]:
    """Blocks and threads in another order for each run: ascending, descending, random."""
    emulator = Emulator(load("plain"))
    emulator.set_order(ORDERS[run % len(ORDERS)], seed=run)
    try:
        yield
    finally:
        emulator.set_order(ASCENDING)
