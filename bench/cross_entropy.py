"""Cross-entropy's cases: vocabularies, classifiers, few classes, images, options, tiny batches."""

from __future__ import annotations

import math
from collections.abc import Callable
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from _measure import Case, Loss, dtype_name
from torch import Tensor

import lossops

OURS: Loss = lossops.cross_entropy
EAGER: Loss = F.cross_entropy


def _case(
    *shape: int,
    dtype: torch.dtype = torch.float32,
    probabilities: bool = False,
    weight: bool = False,
    label_smoothing: float = 0.0,
    speedup: float | None = None,
    forward_speedup: float | None = None,
) -> Case:
    rows, classes = math.prod(shape) // shape[1], shape[1]
    logits_bytes = math.prod(shape) * dtype.itemsize
    target_bytes = logits_bytes if probabilities else rows * 8  # indices are int64

    def make(device: torch.device) -> dict[str, Tensor]:
        tensors = {"input": torch.randn(shape, dtype=dtype, device=device)}
        if probabilities:
            tensors["target"] = torch.randn(shape, dtype=dtype, device=device).softmax(1)
        else:
            tensors["target"] = torch.randint(classes, (shape[0], *shape[2:]), device=device)
        if weight:
            tensors["weight"] = torch.rand(classes, dtype=dtype, device=device) + 0.5
        return tensors

    options = [
        *(["probabilities"] if probabilities else []),
        *(["weight"] if weight else []),
        *([f"smoothing {label_smoothing}"] if label_smoothing else []),
    ]
    return Case(
        name=" ".join([dtype_name(dtype), "x".join(map(str, shape)), *options]),
        dtype=dtype,
        elements=math.prod(shape),
        # Read the logits and the targets. What is kept for a row, and the class weight, is too
        # little to count.
        forward_bytes=logits_bytes + target_bytes,
        # Read the same again, since nothing of their size is kept, and write the gradient.
        backward_bytes=logits_bytes + target_bytes + logits_bytes,
        make=make,
        options={"label_smoothing": label_smoothing} if label_smoothing else {},
        speedup=speedup,
        forward_speedup=forward_speedup,
        plain=len(shape) == 2 and not options,
    )


F32, BF16, F64 = torch.float32, torch.bfloat16, torch.float64

CASES = [
    _case(1024, 32000, dtype=F32, speedup=6, forward_speedup=7),
    _case(512, 128256, dtype=F32, speedup=6),
    _case(1024, 32000, dtype=BF16, speedup=5),
    _case(512, 128256, dtype=BF16, speedup=5),
    _case(512, 32000, dtype=F64, speedup=3),
    _case(65536, 1000, dtype=F32, speedup=6),
    _case(65536, 1000, dtype=BF16, speedup=6),
    _case(1048576, 10, dtype=F32, speedup=12),
    _case(1048576, 10, dtype=BF16, speedup=12),
    _case(8, 21, 256, 256, speedup=5),
    _case(4096, 1000, probabilities=True, speedup=4),
    _case(4096, 1000, weight=True, label_smoothing=0.1, speedup=4),
    _case(128, 1000, speedup=1),
    _case(32, 10, speedup=1),
]

QUICK = [
    _case(256, 32000),
    _case(8192, 1000),
    _case(131072, 10),
    _case(2, 21, 128, 128),
    _case(32, 10, speedup=1),
]

# A GPU's: enough rows to fill it, tensors that its L2 does not hold.
CUDA_CASES = [
    _case(4096, 32000, dtype=F32),
    _case(4096, 32000, dtype=BF16),
    _case(8192, 128256, dtype=BF16),
    _case(65536, 1000, dtype=F32),
    _case(65536, 1000, dtype=BF16),
    _case(1048576, 10, dtype=F32),
    _case(1048576, 10, dtype=BF16),
    _case(8, 21, 512, 512),
    _case(8, 21, 513, 513),  # an odd number of pixels, as DeepLab's: planes that are not aligned
    _case(4096, 32000, dtype=BF16, label_smoothing=0.1),
    _case(4096, 32000, dtype=BF16, weight=True, label_smoothing=0.1),
    _case(4096, 32000, dtype=BF16, probabilities=True),
    _case(8, 262144, dtype=BF16),  # fewer rows than multiprocessors
    _case(4096, 32000, dtype=F64),
    _case(128, 1000),
    _case(32, 10),
]

CUDA_QUICK = [
    _case(4096, 32000, dtype=BF16),
    _case(65536, 1000),
    _case(1048576, 10),
    _case(8, 21, 512, 512),
    _case(32, 10),
]


# --------------------------------------------------------------------------------------------------
# Peers, for CUDA: imported when first called, so that one that does not load is left out by itself.
# They take (N, C) logits with class indices; their versions differ in what else they take. flash-attn
# and Apex reduce nothing: their mean is torch's, and counts.


def _liger(input: Tensor, target: Tensor) -> Tensor:
    # Makes the gradient in its forward, over the logits, and asks the device for a number on the way.
    from liger_kernel.transformers.functional import liger_cross_entropy

    return liger_cross_entropy(input, target)


def _quack(input: Tensor, target: Tensor) -> Tensor:
    from quack.cross_entropy import cross_entropy

    return cross_entropy(input, target)


def _flash_attn(input: Tensor, target: Tensor) -> Tensor:
    from flash_attn.ops.triton.cross_entropy import cross_entropy_loss

    return cross_entropy_loss(input, target)[0].mean()


def _apex(input: Tensor, target: Tensor) -> Tensor:
    from apex.contrib.xentropy import SoftmaxCrossEntropyLoss

    # Its padding_idx is 0 unless told, and would ignore the first class.
    return SoftmaxCrossEntropyLoss.apply(input, target, 0.0, -100).mean()


_PEERS: dict[str, tuple[str, Callable[[Tensor, Tensor], Tensor]]] = {
    "Liger": ("liger_kernel", _liger),
    "QuACK": ("quack", _quack),
    "flash-attn": ("flash_attn", _flash_attn),
    "Apex": ("apex", _apex),
}
PEERS: dict[str, dict[str, Loss]] = {
    "cuda": {name: loss for name, (package, loss) in _PEERS.items() if find_spec(package)}
}
