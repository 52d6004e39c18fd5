"""Options and statistics of a library that was built for the emulator."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path

ASCENDING, DESCENDING, RANDOM = ORDERS = (0, 1, 2)


class _Site(ctypes.Structure):
    """EmulatorSite of runtime/control.h."""

    _fields_ = (
        ("kernel", ctypes.c_char_p),
        ("file", ctypes.c_char_p),
        ("instruction", ctypes.c_char_p),
        ("line", ctypes.c_int),
        ("is_shared", ctypes.c_int),
        ("is_store", ctypes.c_int),
        ("bytes_per_lane", ctypes.c_uint),
        ("requests", ctypes.c_uint64),
        ("lanes", ctypes.c_uint64),
        ("bytes", ctypes.c_uint64),
        ("sectors", ctypes.c_uint64),
        ("wavefronts", ctypes.c_uint64),
    )


@dataclass(frozen=True)
class Site:
    """What the warps did at one instruction."""

    kernel: str  # mangled
    file: str
    instruction: str
    line: int
    is_shared: bool
    is_store: bool
    bytes_per_lane: int
    requests: int  # executions by a warp
    lanes: int
    bytes: int
    sectors: int  # 32-byte pieces of global memory
    wavefronts: int  # turns of shared memory's banks


class Emulator:
    """The emulator inside `library`, which may be loaded already."""

    def __init__(self, library: Path | str) -> None:
        self.library = ctypes.CDLL(str(library))
        self.library.emulator_executed.restype = ctypes.c_uint64

    def set_order(self, order: int, seed: int = 1) -> None:
        """Of blocks and threads; the seed counts for RANDOM."""
        self.library.emulator_set_order(ctypes.c_int(order))
        self.library.emulator_set_seed(ctypes.c_uint64(seed))

    def check_unwritten(self, check: bool) -> None:
        """Whether reading shared memory that nothing has written is an error."""
        self.library.emulator_check_unwritten(ctypes.c_int(check))

    def reset_statistics(self) -> None:
        self.library.emulator_reset_statistics()

    def executed(self) -> int:
        """PTX instructions of all threads since the reset; 0 but in the flavour stats."""
        return self.library.emulator_executed()

    def statistics(self) -> list[Site]:
        """Of every instruction executed since the reset; empty but in the flavour stats."""
        return [self._site(index) for index in range(self.library.emulator_count_sites())]

    def _site(self, index: int) -> Site:
        raw = _Site()
        self.library.emulator_read_site(ctypes.c_int(index), ctypes.byref(raw))
        values = {name: getattr(raw, name) for name, _ in _Site._fields_}
        for name in ("kernel", "file", "instruction"):
            values[name] = values[name].decode()
        for name in ("is_shared", "is_store"):
            values[name] = bool(values[name])
        return Site(**values)
