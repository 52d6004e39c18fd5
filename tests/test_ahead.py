"""Gradients computed with their loss: the bits of two passes, and only where the guess is a good one."""

from __future__ import annotations

import gc
import importlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from devices import BACKENDS, on
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import lossops
from lossops import _ahead, _direct

OPS = ("cross_entropy_forward_backward", "mse_forward_backward")
MEAN, SUM = 1, 2
NEVER = 1 << 60  # bytes: more than any gradient has
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

every_isa = on(*(backend for backend in BACKENDS if backend.startswith("cpu-")))


@pytest.fixture(params=[NEVER, 0], ids=["through the caches", "past the caches"])
def stream_bytes(request: pytest.FixtureRequest) -> Iterator[int]:
    """Whether gradients are written past the caches, which they are by themselves when they are large."""
    before = lossops._C.set_stream_bytes(request.param)
    yield request.param
    lossops._C.set_stream_bytes(before)


def target_of(kind: str, logits: Tensor) -> Tensor:
    rows = (*logits.shape[:1], *logits.shape[2:])
    if kind == "probabilities":
        return logits.double().roll(1, 0).softmax(1).to(logits.dtype)
    target = torch.randint(0, logits.shape[1], rows, dtype=getattr(torch, kind))
    return target.masked_fill(torch.rand(rows) < 0.2, 1)  # with ignore_index=1


SHAPES = (
    (1, 1),
    (7, 3),
    (301, 10),  # short rows as they lie
    (130, 47),
    (67, 48),  # along each row
    (33, 129),
    (400, 49),  # more rows than exponentials are kept of at a time
    (5, 2048),  # the longest whose exponentials are kept
    (5, 2049),
    (2, 70001),  # rows cut into pieces
    (3, 4, 7, 41),  # across tiles of neighbouring rows
    (2, 33, 700),
    (1, 300, 3),
    (0, 5),
)


@every_isa
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_cross_entropy_has_the_bits_of_two_passes(shape, dtype, device, stream_bytes) -> None:
    ops = torch.ops.lossops
    logits = torch.randn(shape).mul(4).to(dtype)
    for kind, reduction, smoothing, weighted in itertools.product(
        ("int64", "int32", "uint8", "probabilities"), (MEAN, SUM), (0.0, 0.1), (False, True)
    ):
        if kind == "uint8" and shape[1] > 255:
            continue
        target = target_of(kind, logits)
        weight = torch.rand(shape[1]) if weighted else None
        options = -100 if kind == "probabilities" else 1, smoothing
        lossops._C.set_stream_bytes(NEVER)
        loss, stats, normalizer = ops.cross_entropy_forward(logits, target, weight, reduction, *options, None)
        divisor = normalizer if reduction == MEAN else None
        one = torch.ones((), dtype=loss.dtype)
        backward = one, logits, target, weight, stats, divisor, *options
        gradient, _ = ops.cross_entropy_backward(*backward, True, False)
        lossops._C.set_stream_bytes(stream_bytes)
        ahead = ops.cross_entropy_forward_backward(logits, target, weight, reduction, *options, None)
        for a, b in zip(ahead, (loss, stats, normalizer, gradient), strict=True):
            assert torch.equal(a.nan_to_num(7), b.nan_to_num(7))
        if kind == "probabilities":  # whose gradient is streamed too
            _, expected = ops.cross_entropy_backward(*backward, False, True)
            lossops._C.set_stream_bytes(NEVER)
            assert torch.equal(ops.cross_entropy_backward(*backward, False, True)[1], expected)


@every_isa
@pytest.mark.parametrize("dtype", DTYPES)
def test_mse_has_the_bits_of_two_passes(dtype, device, stream_bytes) -> None:
    ops = torch.ops.lossops
    sizes = (0, 1, 2, 7, 15, 16, 17, 31, 33, 63, 64, 65, 127, 129, 1023, 1024, 1025, 2047, 16384, 50001)
    for size, reduction, other in itertools.product(sizes, (MEAN, SUM), DTYPES):
        x, y = torch.randn(size).to(dtype), torch.randn(size).to(other)
        lossops._C.set_stream_bytes(NEVER)
        loss, normalizer = ops.mse_forward(x, y, None, None, reduction, None)
        divisor = normalizer if reduction == MEAN else None
        backward = torch.ones_like(loss), x, y, None, None, divisor
        gradients = ops.mse_backward(*backward, True, True)
        lossops._C.set_stream_bytes(stream_bytes)
        ahead = ops.mse_forward_backward(x, y, reduction, None)
        for a, b in zip(ahead, (loss, normalizer, gradients[0]), strict=True):
            assert torch.equal(a.nan_to_num(7), b.nan_to_num(7))
        for a, b in zip(ops.mse_backward(*backward, True, True), gradients, strict=True):
            assert torch.equal(a, b)


@every_isa
def test_streamed_gradients_in_parts_of_other_memory(device, stream_bytes) -> None:
    """Gradients of every alignment and length stay within their elements."""
    for columns, offset in itertools.product((*range(1, 70), 127, 255), (0, 1, 5)):
        base = torch.randn(9, columns + 7)
        x = base[:, offset : offset + columns].requires_grad_()
        y = torch.randn(9, columns)
        (gradient,) = torch.autograd.grad(lossops.mse_loss(x, y), x)
        torch.testing.assert_close(gradient, 2 * (x.detach() - y) / x.numel(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("reduction", [MEAN, SUM])
def test_opcheck(op: str, reduction: int) -> None:
    logits = torch.randn(6, 9)
    arguments = {
        "cross_entropy_forward_backward": (
            logits,
            torch.arange(6),
            torch.rand(9),
            reduction,
            -100,
            0.1,
            None,
        ),
        "mse_forward_backward": (logits, torch.randn(6, 9), reduction, torch.float64),
    }[op]
    results = torch.library.opcheck(getattr(torch.ops.lossops, op).default, arguments)
    assert set(results.values()) == {"SUCCESS"}
    unreduced = [0 if a is reduction else a for a in arguments]
    with pytest.raises(ValueError, match=f"{op}: expected reduction 1"):
        getattr(torch.ops.lossops, op)(*unreduced)


# --------------------------------------------------------------------------------------------------
# When the gradient is computed ahead


class Case:
    """A loss, and how often its gradient was computed ahead."""

    def __init__(self, loss: Callable[..., Tensor], torch_loss: Callable[..., Tensor], y: Tensor) -> None:
        self.loss, self.torch_loss, self.y = loss, torch_loss, y
        self.x = torch.randn(40, 30, requires_grad=True)
        self.ahead = 0

    def step(self, upstream: float = 1.0, **kwargs: Any) -> bool:
        """A training step, checked against torch's; whether it went ahead."""
        before = self.ahead
        x = self.x.detach().clone().requires_grad_()
        (self.loss(x, self.y, **kwargs) * upstream).backward()
        expected = self.x.detach().clone().requires_grad_()
        (self.torch_loss(expected, self.y, **kwargs) * upstream).backward()
        torch.testing.assert_close(x.grad, expected.grad, rtol=1e-5, atol=1e-7)
        self.gradient = x.grad
        return self.ahead > before


class Counting(_ahead.Ahead):
    def __init__(self, case: Case) -> None:
        super().__init__(case.loss.__name__)
        self.case = case

    def is_asked_of_plain(self, ctx: Any, on_cpu: bool) -> bool:
        asked = super().is_asked_of_plain(ctx, on_cpu)
        self.case.ahead += asked
        return asked


@pytest.fixture(params=["cross_entropy", "mse_loss"])
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=["small", "large"])
def case(request: pytest.FixtureRequest, name: str, monkeypatch: pytest.MonkeyPatch) -> Case:
    # The function of its name hides the one module from an import statement.
    module = importlib.import_module(f"lossops.{name.removesuffix('_loss')}")
    y = torch.randint(30, (40,)) if name == "cross_entropy" else torch.randn(40, 30)
    case = Case(getattr(lossops, name), getattr(F, name), y)
    monkeypatch.setattr(module, "_ahead", Counting(case))
    if request.param == "large":
        monkeypatch.setattr(_direct, "ENABLED", False)
    return case


def test_a_loop_goes_ahead_from_its_second_step(case: Case) -> None:
    assert case.step() is False
    first = case.gradient
    assert [case.step() for _ in range(3)] == [True] * 3
    assert torch.equal(case.gradient, first)


def test_a_scaled_loss_does_not(case: Case) -> None:
    assert [case.step(s) for s in (1, 0.5, 0.5, 1, 1)] == [False, True, False, False, True]


def test_reductions(case: Case) -> None:
    assert [case.step(reduction="sum") for _ in range(2)] == [False, True]
    x = case.x.detach().clone().requires_grad_()
    case.loss(x, case.y, reduction="none").sum().backward()
    assert case.ahead == 1


def test_switched_off(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_ahead, "ENABLED", False)
    assert [case.step() for _ in range(3)] == [False] * 3


def test_what_is_never_differentiated_goes_ahead_once(case: Case) -> None:
    case.step()
    for _ in range(3):
        case.loss(case.x, case.y)
    assert case.ahead == 1
    with torch.no_grad():
        case.loss(case.x, case.y)
    case.step()
    assert case.ahead == 1


def test_of_several_losses_one_goes_ahead(case: Case) -> None:
    case.step()
    xs = [case.x.detach().clone().requires_grad_() for _ in range(3)]
    sum(case.loss(x, case.y) for x in xs).backward()
    assert case.ahead == 1
    assert all(torch.equal(x.grad, xs[0].grad) for x in xs)


def test_a_second_backward_is_computed_anew(case: Case) -> None:
    case.step()
    loss = case.loss(case.x, case.y)
    assert case.ahead == 1
    first, second, scaled = (
        torch.autograd.grad(loss, case.x, torch.tensor(u), retain_graph=True)[0] for u in (1.0, 1.0, 2.0)
    )
    assert torch.equal(first, second) and first.data_ptr() != second.data_ptr()
    torch.testing.assert_close(scaled, 2 * first)


def test_the_gradient_is_handed_over_without_a_copy(case: Case) -> None:
    case.step()
    loss = case.loss(case.x, case.y)
    address = loss.grad_fn.gradient.data_ptr()
    loss.backward()
    assert case.x.grad.data_ptr() == address and loss.grad_fn.gradient is None


def test_second_derivatives(case: Case) -> None:
    def hessian_times_ones(loss: Callable[..., Tensor]) -> Tensor:
        x = case.x.detach().double().requires_grad_()
        y = case.y.double() if case.y.is_floating_point() else case.y
        (gradient,) = torch.autograd.grad(loss(x, y), x, create_graph=True)
        return torch.autograd.grad(gradient.pow(2).sum(), x)[0]

    case.step()
    torch.testing.assert_close(hessian_times_ones(case.loss), hessian_times_ones(case.torch_loss))
    assert case.ahead == 1


def test_batched_upstream_gradients(case: Case) -> None:
    case.step()
    loss, upstream = case.loss(case.x, case.y), torch.tensor([1.0, 1.0, -2.0])
    assert case.ahead == 1
    (batched,) = torch.autograd.grad(loss, case.x, upstream, is_grads_batched=True, retain_graph=True)
    (one,) = torch.autograd.grad(loss, case.x)
    torch.testing.assert_close(batched, upstream[:, None, None] * one)


@pytest.mark.parametrize("which", ["x", "y"])
def test_an_operand_that_was_changed_is_still_an_error(case: Case, which: str) -> None:
    case.step()
    x = case.x.detach().clone().requires_grad_()
    operands = {"x": x * 1, "y": case.y.clone()}
    loss = case.loss(**dict(zip(("input", "target"), operands.values(), strict=True)))
    assert case.ahead == 1
    operands[which].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


class Watching(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def test_where_it_never_goes_ahead(case: Case) -> None:
    def saved_through_hooks() -> None:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
            case.loss(case.x, case.y)

    def watched() -> None:
        with Watching():
            case.loss(case.x, case.y)

    transposed = case.x.detach().T.contiguous().T.requires_grad_()
    for attempt in (
        saved_through_hooks,
        watched,
        lambda: case.loss(transposed, case.y),
        lambda: torch.func.grad(case.loss)(case.x, case.y),
        lambda: torch.compile(case.loss, backend="aot_eager", fullgraph=True)(case.x, case.y).backward(),
        lambda: lossops.explain(case.loss, case.x, case.y),
    ):
        case.step()
        ahead = case.ahead
        attempt()
        assert case.ahead == ahead
        case.x.grad = None
    if case.y.is_floating_point():
        case.step()
        ahead = case.ahead
        case.loss(case.x, case.y.clone().requires_grad_())
        assert case.ahead == ahead


def test_compiled_autograd_computes_it_anew(case: Case) -> None:
    case.step()
    loss = case.loss(case.x, case.y)
    assert case.ahead == 1
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
        loss.backward()
    expected = case.x.detach().clone().requires_grad_()
    case.torch_loss(expected, case.y).backward()
    torch.testing.assert_close(case.x.grad, expected.grad, rtol=1e-5, atol=1e-7)


def test_a_bad_index_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_direct, "ENABLED", False)
    x = torch.randn(40, 30, requires_grad=True)
    lossops.cross_entropy(x, torch.arange(40) % 30).backward()
    with pytest.raises(IndexError, match="Target 30 is out of bounds: row 30 "):
        lossops.cross_entropy(x, torch.arange(40))


def test_a_loss_that_is_dropped_frees_its_gradient(case: Case) -> None:
    case.step()
    loss = case.loss(case.x, case.y)
    gradient = loss.grad_fn.gradient
    references = len(gc.get_referrers(gradient))
    del loss
    gc.collect()
    assert len(gc.get_referrers(gradient)) < references


def test_explain_says_so(case: Case) -> None:
    text = str(lossops.explain(case.loss, case.x, case.y))
    assert "later steps compute this gradient in the forward pass" in text
    text = str(lossops.explain(lambda x, y: 2 * case.loss(x, y), case.x, case.y))
    assert "later steps" not in text
