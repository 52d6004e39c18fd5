"""The op ``lossops::class_indices``: a target among all ranks' classes, of which the kernels know some.

The CPU raises. A GPU would have to be waited for: it keeps the first class index that is out of range for
``check_async_errors``, and the kernels make its row NaN. An op, for torch.compile.
"""

from __future__ import annotations

import os
from functools import cache
from typing import Any

import torch
from torch import Tensor


def _out_of_bounds(op: str, value: int, row: Any, ignore_index: int, classes: int) -> IndexError:
    return IndexError(
        f"{op}: Target {value} is out of bounds: row {row} of the target needs a class index from 0 to C-1 "
        f"for C = {classes}, the classes of all ranks, or ignore_index ({ignore_index})"
    )


def _unknown(target: Tensor, ignore_index: int, classes: int) -> Tensor:
    return (target != ignore_index) & ((target < 0) | (target >= classes))


def _raise(target: Tensor, op: str, ignore_index: int, classes: int) -> Tensor:
    target = target.to(torch.int64, copy=True)
    bad = _unknown(target, ignore_index, classes)
    if bad.any():
        row = bad.nonzero()[0].tolist()
        place = row[0] if len(row) == 1 else tuple(row)
        raise _out_of_bounds(op, int(target[bad][0]), place, ignore_index, classes)
    return target


@cache
def _sync_checks() -> bool:
    """Read once, as the kernels' hosts do."""
    return os.environ.get("LOSSOPS_SYNC_CHECKS") == "1"


_first: dict[tuple[torch.device, str, int, int], Tensor] = {}
"""Of such calls the first row that was out of range and its target, on the device; -1 and -1 before."""


def record(target: Tensor, op: str, ignore_index: int, classes: int) -> Tensor:
    """For a GPU: nothing here waits for it or copies from the host, and a graph may capture it."""
    if _sync_checks() and not (target.is_cuda and torch.cuda.is_current_stream_capturing()):
        return _raise(target, op, ignore_index, classes)
    target = target.to(torch.int64, copy=True)
    if not target.numel():
        return target
    call = target.device, op, ignore_index, classes
    if call not in _first:
        with torch.inference_mode(False):
            _first[call] = target.new_full((2,), -1)
    first, flat = _first[call], target.flatten()
    bad = _unknown(flat, ignore_index, classes)
    row = bad.int().argmax()
    found = torch.stack([row, flat.take(row)])
    first.copy_(found.where(bad.take(row) & (first[0] < 0), first))
    return target


def recorded() -> IndexError | None:
    """The error of one call, of devices that are done; the others are forgotten with it."""
    error = None
    for (_, op, ignore_index, classes), first in _first.items():
        row, value = first.tolist()
        if row >= 0:
            error = error or _out_of_bounds(op, value, row, ignore_index, classes)
            first.fill_(-1)
    return error


_library = torch.library.Library("lossops", "FRAGMENT")
_library.define("class_indices(Tensor target, str op, SymInt ignore_index, SymInt classes) -> Tensor")
_library.impl("class_indices", _raise, "CPU")
_library.impl("class_indices", record, "CUDA")
torch.library.register_fake("lossops::class_indices")(
    lambda target, *_: torch.empty_like(target, dtype=torch.int64)
)

class_indices = torch.ops.lossops.class_indices.default
