"""What the CPU kernels keep between calls."""

from __future__ import annotations

from . import _C


def empty_cache() -> None:
    """Returns to the system the memory that lossops keeps for the gradients of the next step, on the CPU.

    Gradients (and other results) of 4 MiB and more lie on pages of their own. Of those given back, the two
    largest blocks are kept for the next step, since pages that the system has to clear first cost more time
    than the kernel that fills them. Kept pages are marked as free (``MADV_FREE``): where memory runs short
    the system takes them by itself, though until then they count as the process's. With
    ``LOSSOPS_KEEP_PAGES=0`` in the environment nothing is kept, and torch's allocator serves all.
    """
    _C.empty_cache()
