"""What test_contract.py asks of every loss, described once for each: functions, modules, ops, inputs.

A new loss joins the contract with a `Loss` and a `Variant` for each kind of call.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from tolerances import assert_near
from torch import Tensor

import lossops
from lossops.cross_entropy import cross_entropy_reference
from lossops.mse import mse_reference


@dataclass(frozen=True)
class Loss:
    """One loss: lossops' function and module, torch's, and the reference of both."""

    name: str
    function: Callable[..., Tensor]
    torch_function: Callable[..., Tensor]
    reference: Callable[..., Tensor]
    module: type[torch.nn.Module]
    torch_module: type[torch.nn.Module]
    constructors: tuple[dict[str, Any], ...]  # arguments of the modules that are worth a test
    ops: str = ""  # its forward op is {ops}_forward, and so on
    saved_per_row: int = 3  # numbers that a row leaves for the backward, at most


@dataclass
class Call:
    """The arguments of one call: tensors that get a gradient, in order, and all others."""

    tensors: tuple[Tensor, ...]
    fixed: tuple[Tensor, ...] = ()  # positional, after `tensors`
    options: dict[str, Any] = field(default_factory=dict)

    def bind(self, function: Callable[..., Tensor], **overrides: Any) -> Callable[..., Tensor]:
        """`function` of the differentiable tensors alone."""
        options = {**self.options, **overrides}
        return lambda *tensors: function(*tensors, *self.fixed, **options)

    def leaves(self) -> tuple[Tensor, ...]:
        return tuple(t.detach().clone().requires_grad_() for t in self.tensors)

    def in_float64(self) -> Call:
        """The same numbers, exactly, for the reference."""
        options = {
            k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v
            for k, v in self.options.items()
        }
        return Call(tuple(t.double() for t in self.tensors), self.fixed, options)


@dataclass(frozen=True)
class Variant:
    """A kind of call of a loss; `make(shape, dtype)` draws the arguments for an input of `shape`."""

    id: str
    loss: Loss
    make: Callable[[tuple[int, ...], torch.dtype], Call]
    weighted: bool = False
    composed: Callable[..., Tensor] | None = None  # of torch's operations, for what its loss lacks

    @property
    def torch_function(self) -> Callable[..., Tensor]:
        return self.composed or self.loss.torch_function

    def __str__(self) -> str:
        return self.id


# --------------------------------------------------------------------------------------------------
# Mean squared error

MSE = Loss(
    "mse",
    lossops.mse_loss,
    F.mse_loss,
    mse_reference,
    lossops.MSELoss,
    torch.nn.MSELoss,
    ({}, {"reduction": "none"}, {"reduction": "sum"}),
    ops="mse",
)


def _mse(shape: tuple[int, ...], dtype: torch.dtype) -> Call:
    return Call((torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)))


def _mse_weighted(shape: tuple[int, ...], dtype: torch.dtype) -> Call:
    call = _mse(shape, dtype)
    call.options["weight"] = (torch.rand(shape) + 0.5).to(dtype)
    return call


def _mask(shape: tuple[int, ...]) -> Tensor:
    mask = torch.rand(shape) < 0.7
    if mask.numel():
        mask.view(-1)[0] = True  # a mean over nothing has a test of its own
    return mask


def _mse_masked(shape: tuple[int, ...], dtype: torch.dtype) -> Call:
    call = _mse(shape, dtype)
    call.options["mask"] = _mask(shape)
    return call


def _mse_weighted_masked_rows(shape: tuple[int, ...], dtype: torch.dtype) -> Call:
    call = _mse_weighted(shape, dtype)
    call.options["mask"] = _mask((*shape[:-1], 1))
    return call


def torch_masked_mse(
    input: Tensor,
    target: Tensor,
    reduction: str = "mean",
    weight: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """What a user of torch writes who has a mask: NaN under it reaches the gradients."""
    if torch.nn._reduction.get_enum(reduction) == 0:
        return F.mse_loss(input, target, reduction="none", weight=weight).masked_fill(~mask, 0)
    total = (F.mse_loss(input, target, reduction="none", weight=weight) * mask).sum()
    counts = mask.expand_as(input) if weight is None else weight * mask
    return total / counts.sum() if reduction == "mean" else total


# --------------------------------------------------------------------------------------------------
# Cross-entropy

CROSS_ENTROPY = Loss(
    "cross_entropy",
    lossops.cross_entropy,
    F.cross_entropy,
    cross_entropy_reference,
    lossops.CrossEntropyLoss,
    torch.nn.CrossEntropyLoss,
    (
        {},
        {"weight": torch.rand(13) + 0.5},
        {"reduction": "none", "label_smoothing": 0.1},
        {"weight": torch.rand(13) + 0.5, "ignore_index": 3, "reduction": "sum", "label_smoothing": 0.2},
    ),
    ops="cross_entropy",
)


def _classes(shape: tuple[int, ...]) -> int:
    return shape[0] if len(shape) == 1 else shape[1]


def _class_weight(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return (torch.rand(_classes(shape)) + 0.5).to(dtype)


def _index(shape: tuple[int, ...], dtype: torch.dtype) -> Call:
    rows = shape[:0] if len(shape) == 1 else (shape[0], *shape[2:])
    target = torch.randint(0, max(1, _classes(shape)), rows)
    return Call((3 * torch.randn(shape).to(dtype),), (target,))


def _index_all(shape: tuple[int, ...], dtype: torch.dtype) -> Call:
    call = _index(shape, dtype)
    (target,) = call.fixed
    ignored = torch.rand(target.shape) < 0.2
    if target.numel():
        ignored.view(-1)[0] = False  # a mean over nothing has a test of its own
    call.fixed = (target.masked_fill(ignored, -7),)
    call.options = {"weight": _class_weight(shape, dtype), "ignore_index": -7, "label_smoothing": 0.1}
    return call


def _probabilities(shape: tuple[int, ...], dtype: torch.dtype) -> Call:
    dim = 0 if len(shape) == 1 else 1
    target = torch.randn(shape).softmax(dim).to(dtype)
    return Call((3 * torch.randn(shape).to(dtype), target))


def _probabilities_all(shape: tuple[int, ...], dtype: torch.dtype) -> Call:
    call = _probabilities(shape, dtype)
    call.options = {"weight": _class_weight(shape, dtype), "label_smoothing": 0.1}
    return call


def torch_family(
    input: Tensor,
    target: Tensor,
    reduction: str = "mean",
    *,
    logit_scale: Tensor,
    softcap: float,
    z_loss: float,
    row_weight: Tensor,
    normalizer: float,
    **options: Any,
) -> Tensor:
    """What a user of torch writes today for the family's options, around torch's own loss."""
    u = softcap * torch.tanh(input * logit_scale / softcap)
    loss = F.cross_entropy(u, target, reduction="none" if reduction in REDUCTIONS else reduction, **options)
    counted = target != options["ignore_index"] if "ignore_index" in options else torch.ones_like(loss)
    loss = row_weight * (loss + z_loss * u.logsumexp(0 if u.dim() == 1 else 1).square() * counted)
    if reduction == "none":
        return loss
    return loss.sum() / (normalizer if reduction == "mean" else 1)


FAMILY = replace(
    CROSS_ENTROPY, torch_function=torch_family, constructors=(), ops="cross_entropy_rows", saved_per_row=12
)


def _with_family(make: Callable[..., Call]) -> Callable[..., Call]:
    """Every option beyond torch's that changes the loss, on top of torch's own."""

    def made(shape: tuple[int, ...], dtype: torch.dtype) -> Call:
        call = make(shape, dtype)
        rows = shape[:0] if len(shape) == 1 else (shape[0], *shape[2:])
        call.options |= {
            "logit_scale": torch.tensor(0.75, dtype=dtype),
            "softcap": 4.0,
            "z_loss": 0.05,
            "row_weight": (torch.rand(rows) + 0.5).to(dtype),
            "normalizer": 6.5,
        }
        return call

    return made


LOSSES = (MSE, CROSS_ENTROPY)
VARIANTS = (
    Variant("mse", MSE, _mse),
    Variant("mse-weight", MSE, _mse_weighted, weighted=True),
    Variant("mse-mask", MSE, _mse_masked, composed=torch_masked_mse),
    Variant("mse-weight-mask-rows", MSE, _mse_weighted_masked_rows, weighted=True, composed=torch_masked_mse),
    Variant("index", CROSS_ENTROPY, _index),
    Variant("index-weight-ignore-smoothing", CROSS_ENTROPY, _index_all, weighted=True),
    Variant("probabilities", CROSS_ENTROPY, _probabilities),
    Variant("probabilities-weight-smoothing", CROSS_ENTROPY, _probabilities_all, weighted=True),
    Variant("index-family", FAMILY, _with_family(_index_all), weighted=True),
    Variant("probabilities-family", FAMILY, _with_family(_probabilities_all), weighted=True),
)
REDUCTIONS = ("none", "mean", "sum")


def value_and_gradients(
    function: Callable[..., Tensor], tensors: tuple[Tensor, ...], upstream: Tensor | None = None
) -> tuple[Tensor, ...]:
    """The loss and its gradient to each tensor, for an upstream gradient (default: ones)."""
    loss = function(*tensors)
    if upstream is None:
        upstream = torch.ones_like(loss)
    return loss.detach(), *torch.autograd.grad(loss, tensors, upstream.to(loss.dtype))


def check_against_reference(
    variant: Variant, call: Call, reduction: str, layout: Callable[[Tensor], Tensor] = lambda t: t
) -> None:
    """Values and gradients for a random upstream gradient; the tensors are views made by `layout`."""
    exact = call.in_float64()
    ours = call.bind(variant.loss.function, reduction=reduction)
    reference = exact.bind(variant.loss.reference, reduction=reduction)
    dtype = call.tensors[0].dtype
    # Views are leaves here: a gradient that autograd sums over what they share is no test of ours.
    leaves = tuple(layout(t).detach().requires_grad_() for t in call.tensors)
    exact_leaves = tuple(layout(t).detach().requires_grad_() for t in exact.tensors)
    upstream = torch.randn(reference(*exact_leaves).shape).to(dtype)
    actual = value_and_gradients(ours, leaves, upstream)
    expected = value_and_gradients(reference, exact_leaves, upstream.double())
    # An unreduced loss and its gradient are differences of terms of the inputs' size.
    size = max([1.0, *(t.abs().max().item() for t in exact.tensors if t.numel())])
    for name, a, e in zip(("loss", "first gradient", "second gradient"), actual, expected, strict=False):
        assert a.dtype == dtype
        assert_near(a, e, scale=size, message=f"{name}, {[tuple(t.shape) for t in leaves]}")
