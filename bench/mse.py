"""Mean squared error's cases: one batch of a regression, large tensors, a weight for each element."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from _measure import Case, Loss, dtype_name
from torch import Tensor

import lossops

OURS: Loss = lossops.mse_loss
EAGER: Loss = F.mse_loss
PEERS: dict[str, Loss] = {}  # none that fuses this loss is known


def _case(
    elements: int, *, dtype: torch.dtype = torch.float32, weight: bool = False, speedup: float | None = None
) -> Case:
    tensor_bytes = elements * dtype.itemsize
    names = ["input", "target", "weight"] if weight else ["input", "target"]

    def make(device: torch.device) -> dict[str, Tensor]:
        return {name: torch.rand(elements, dtype=dtype, device=device) for name in names}

    power = elements.bit_length() - 1
    size = f"2^{power}" if elements == 2**power and power > 10 else str(elements)
    return Case(
        name=" ".join([dtype_name(dtype), size, *names[2:]]),
        dtype=dtype,
        elements=elements,
        # Read every operand.
        forward_bytes=len(names) * tensor_bytes,
        # Read them again and write the input's gradient; the target needs none.
        backward_bytes=(len(names) + 1) * tensor_bytes,
        make=make,
        speedup=speedup,
    )


CASES = [
    _case(2**26, speedup=4),
    _case(2**26, dtype=torch.bfloat16, speedup=5),
    _case(2**24, weight=True, speedup=5),
    _case(1024, speedup=1),
]

QUICK = [
    _case(2**22),
    _case(1024, speedup=1),
]

CUDA_CASES = [
    _case(2**27),
    _case(2**27, dtype=torch.bfloat16),
    _case(2**26, dtype=torch.float64),
    _case(2**26, weight=True),
    _case(1024),
]

CUDA_QUICK = [
    _case(2**27),
    _case(1024),
]
