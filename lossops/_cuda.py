"""What was built for CUDA, and the errors that its kernels leave behind."""

from __future__ import annotations

from typing import NamedTuple

import torch

from . import _C
from ._class_indices import recorded


class CudaBuildInfo(NamedTuple):
    toolkit: str
    """Version of the CUDA toolkit, such as ``13.0.88``."""
    architectures: tuple[str, ...]
    """``sm_80`` is machine code for that GPU, ``compute_80`` PTX for it and all later ones."""


def cuda_build_info() -> CudaBuildInfo | None:
    """The CUDA toolkit and architectures that lossops was built with, or None where it has no CUDA.

    It says nothing about the GPUs of this machine.
    """
    info = _C.cuda_build_info()
    return None if info is None else CudaBuildInfo(info[0], tuple(info[1].split()))


def check_async_errors() -> None:
    """Raises the IndexError of a class index that was out of range on a GPU, if there was one.

    On the CPU such an index raises at once. A GPU's kernels run on after the call has returned: they make
    the loss and the gradient of that row NaN, spoil nothing else, and record the first such row for this
    function. It waits for every GPU on which ``cross_entropy`` has read class indices: call it where the
    program waits anyway (once an epoch, before a checkpoint), or when a loss is NaN, and not while a graph
    is being captured. A record is raised once.

    With ``LOSSOPS_SYNC_CHECKS=1`` in the environment when the first such call is made, every call waits and
    raises by itself, except while a graph is being captured.
    """
    try:
        torch.ops.lossops.check_async_errors()
    except IndexError as error:
        # Of a sharded vocabulary the kernels have seen one rank's classes, and a chunk's rows.
        raise recorded() or error from None
