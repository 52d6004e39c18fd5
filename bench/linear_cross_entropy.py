"""A linear head and its cross-entropy: vocabularies, against the logits at once, torch's own chunks, and
the matrix products alone."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from _measure import Case, Loss, Step, dtype_name
from _report import OURS as OURS_NAME
from torch import Tensor

import lossops

OURS: Loss = lossops.linear_cross_entropy
KERNELS = "cross_entropy_rows"  # those of its own: the products are torch's


def EAGER(input: Tensor, linear_weight: Tensor, target: Tensor) -> Tensor:  # noqa: N802 (a name of every file here)
    return F.cross_entropy(F.linear(input, linear_weight), target)


def _chunked(input: Tensor, linear_weight: Tensor, target: Tensor) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions()  # from torch 2.13 on
    classes, features = linear_weight.shape
    if input.device.type == "cpu" and classes > 256 * features:
        # It takes chunks of N H / C rows or so, and goes through the weight and its gradient in each.
        raise RuntimeError("its chunks are of a few rows here, and a step takes minutes")
    return F.linear_cross_entropy(input, linear_weight, target, options=options)


CHUNKED = "torch chunked"
# By dtype and contender, where eager's own error is not all there is: the chunked op adds up the loss of its
# chunks in bfloat16, and small gradients of float16 are lost to eager.
_TOLERANCES = {torch.bfloat16: {CHUNKED: 0.05}, torch.float16: {OURS_NAME: 0.03}}
PEERS: dict[str, dict[str, Loss]] = {"cpu": {CHUNKED: _chunked}, "cuda": {CHUNKED: _chunked}}


def _products(input: Tensor, linear_weight: Tensor, target: Tensor) -> Step:
    """The logits, and the products of both gradients with the logits in the place of theirs, into memory
    in use."""
    x, weight = input.detach(), linear_weight.detach()
    logits = x @ weight.t()
    to_x, to_weight = torch.empty_like(x), torch.empty_like(weight)

    def multiply() -> tuple[Tensor, Tensor, Tensor]:
        torch.mm(x, weight.t(), out=logits)
        torch.mm(logits, weight, out=to_x)
        torch.mm(logits.t(), x, out=to_weight)
        return logits, to_x, to_weight

    return multiply


def _case(
    rows: int,
    features: int,
    classes: int,
    *,
    dtype: torch.dtype = torch.float32,
    speedup: float | None = None,
    over_chunked: float | None = None,
    over_products: float | None = None,
    memory: int | None = None,
    patience: float = 10,
) -> Case:
    def make(device: torch.device) -> dict[str, Tensor]:
        x = torch.randn(rows, features, dtype=dtype, device=device)
        weight = torch.randn(classes, features, dtype=dtype, device=device) / math.sqrt(features)
        target = torch.randint(classes, (rows,), device=device)
        return {"input": x, "linear_weight": weight.requires_grad_(), "target": target}

    return Case(
        name=f"{dtype_name(dtype)} {rows}x{features}x{classes}",
        dtype=dtype,
        elements=rows * classes,
        flops=3 * 2 * rows * features * classes,
        make=make,
        speedup=speedup,
        speedups={} if over_chunked is None else {CHUNKED: over_chunked},
        over_floor=over_products,
        memory=memory,
        floor=_products,
        plain=True,
        tolerances=_TOLERANCES.get(dtype, {}),
        forward=False,  # the head of a training step: no evaluation waits for it
        patience=patience,
    )


F32, BF16 = torch.float32, torch.bfloat16
MB = 10**6

# Memory: the default chunk of 125 * 2^17 logits, a few numbers for each row, and for bfloat16 the float32 sum
# of the weight's gradient; of the largest, a tenth of its logits, the gradients included.
CASES = [
    _case(4096, 512, 32000, dtype=F32, speedup=1.4, over_chunked=2, over_products=1.15, memory=72 * MB),
    _case(4096, 512, 32000, dtype=BF16, over_chunked=2, over_products=1.3, memory=100 * MB),
    _case(
        *(8192, 256, 128256),
        dtype=BF16,
        memory=8192 * 128256 * 2 // 10 - (8192 + 128256) * 256 * 2,
        patience=5,
    ),
]

QUICK = [_case(512, 512, 8192)]

CUDA_CASES = [
    _case(4096, 1024, 32000, dtype=F32),
    _case(4096, 1024, 32000, dtype=torch.float16),
    _case(8192, 4096, 128256, dtype=BF16),
]

CUDA_QUICK = [_case(4096, 1024, 32000, dtype=F32)]
