"""The cross-entropy family: one row for each option, against what is written around torch's loss today."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from _measure import Case, Loss, dtype_name
from torch import Tensor
from torch.autograd import Function

import lossops
from lossops.functional import cross_entropy_with_metrics, log_prob

OURS: Loss = lossops.cross_entropy
PEERS: dict[str, dict[str, Loss]] = {}  # each of them has some of these options, and none all


def EAGER(  # noqa: N802 (a name of every file here)
    input: Tensor,
    target: Tensor,
    *,
    logit_scale: Tensor | float = 1.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    row_weight: Tensor | None = None,
    normalizer: Tensor | None = None,
    empty: str = "nan",
    out_dtype: torch.dtype | None = None,
    **options: Any,
) -> Tensor:
    u = input if isinstance(logit_scale, float) else input * logit_scale
    if softcap is not None:
        u = softcap * torch.tanh(u / softcap)
    if out_dtype is not None:
        u = u.to(out_dtype)
    if not z_loss and row_weight is None and normalizer is None and empty == "nan":
        return F.cross_entropy(u, target, **options)
    loss = F.cross_entropy(u, target, reduction="none", **options)
    if z_loss:
        loss = loss + z_loss * u.logsumexp(1).square()
    if row_weight is not None:
        loss = loss * row_weight
    count = (target != -100).sum() if normalizer is None else normalizer
    return loss.sum() / (count.clamp(min=1) if empty == "zero" else count)


def _metrics_eager(input: Tensor, target: Tensor) -> Tensor:
    loss = F.cross_entropy(input, target)
    with torch.no_grad():
        log_p = input.log_softmax(1)
        entropy = -(log_p.exp() * log_p).sum(1)
        accuracy = (input.argmax(1) == target).float().mean()
    return loss + 0 * (entropy.mean() + accuracy)


def _metrics(input: Tensor, target: Tensor) -> Tensor:
    loss, metrics = cross_entropy_with_metrics(input, target)
    return loss + 0 * (metrics.entropy.detach().mean() + metrics.correct.float().mean())


def _log_prob_eager(input: Tensor, target: Tensor) -> Tensor:
    log_p = input.log_softmax(1)
    chosen = log_p.gather(1, target.unsqueeze(1)).squeeze(1)
    return (chosen - 0.01 * (log_p.exp() * log_p).sum(1)).mean()


def _log_prob(input: Tensor, target: Tensor) -> Tensor:
    chosen, entropy = log_prob(input, target, return_entropy=True)
    return (chosen + 0.01 * entropy).mean()


class _Produce(Function):
    """Logits that are not a leaf, without the time of a copy: their memory is the leaf's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def _in_place(input: Tensor, target: Tensor) -> Tensor:
    return lossops.cross_entropy(_Produce.apply(input), target, inplace_backward=input.requires_grad)


def _case(
    option: str,
    rows: int = 4096,
    classes: int = 32000,
    *,
    dtype: torch.dtype = torch.float32,
    tensors: Callable[[int, torch.device], dict[str, Tensor]] = lambda rows, device: {},
    ours: Loss | None = None,
    eager: Loss | None = None,
    speedup: float | None = None,
    in_place: bool = False,
    **options: Any,
) -> Case:
    logits_bytes = rows * classes * dtype.itemsize

    def make(device: torch.device) -> dict[str, Tensor]:
        logits = torch.randn(rows, classes, dtype=dtype, device=device)
        target = torch.randint(classes, (rows,), device=device)
        return {"input": logits, "target": target, **tensors(rows, device)}

    return Case(
        name=f"{dtype_name(dtype)} {rows}x{classes} {option}",
        dtype=dtype,
        elements=rows * classes,
        # Read the logits; read them again and write the gradient. What belongs to a row does not count.
        forward_bytes=logits_bytes,
        backward_bytes=2 * logits_bytes,
        make=make,
        options=options,
        ours=ours,
        eager=eager,
        speedup=speedup,
        in_place=in_place,
    )


def _scale(rows: int, device: torch.device) -> dict[str, Tensor]:
    return {"logit_scale": torch.tensor(math.e, device=device, requires_grad=True)}


def _row_weight(rows: int, device: torch.device) -> dict[str, Tensor]:
    return {"row_weight": torch.rand(rows, device=device)}


def _normalizer(rows: int, device: torch.device) -> dict[str, Tensor]:
    return {"normalizer": torch.tensor(float(rows), device=device)}


def _cases(rows: int, classes: int, speedup: float | None) -> list[Case]:
    def case(option: str, **given: Any) -> Case:
        return _case(option, rows, classes, speedup=speedup, **given)

    return [
        case("learnable scale", tensors=_scale),
        case("softcap", softcap=30.0),
        case("z-loss", z_loss=1e-4),
        case("row weight", tensors=_row_weight),
        case("normalizer", tensors=_normalizer),
        case("empty zero", empty="zero"),
        case("out float32", dtype=torch.bfloat16, out_dtype=torch.float32),
        case("metrics", ours=_metrics, eager=_metrics_eager),
        case("log-prob and entropy", ours=_log_prob, eager=_log_prob_eager),
        case("all of them", tensors=_scale, softcap=30.0, z_loss=1e-4, empty="zero", label_smoothing=0.1),
        case("in place", ours=_in_place, in_place=True),
    ]


CASES = [
    *_cases(4096, 32000, speedup=5),
    _case("in place", 1024, ours=_in_place, in_place=True, speedup=10),
]
QUICK = [_case("softcap", 256, softcap=30.0)]
CUDA_CASES = _cases(4096, 32000, speedup=None)
CUDA_QUICK = [_case("softcap", softcap=30.0)]
