"""Cross-entropy's options beyond torch's, its metrics and log_prob: every promise of their docstrings."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from contract import REDUCTIONS, value_and_gradients
from devices import cpu_only, every_backend, not_emulated, raises_index_error
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tolerances import DTYPES, TOLERANCES, assert_near
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lossops import CrossEntropyLoss, cross_entropy
from lossops.cross_entropy import CrossEntropyMetrics, cross_entropy_reference
from lossops.functional import cross_entropy_with_metrics, log_prob

pytestmark = pytest.mark.usefixtures("device")

# Reproducible, free of limits that a busy machine would break, and on one device for all examples.
modest = settings(
    deadline=None,
    derandomize=True,
    max_examples=400,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)

INF, NAN = float("inf"), float("nan")
each_reduction = pytest.mark.parametrize("reduction", REDUCTIONS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def rows_of(shape: tuple[int, ...]) -> tuple[int, ...]:
    return () if len(shape) == 1 else (shape[0], *shape[2:])


def class_dim(x: Tensor) -> int:
    return 0 if x.dim() == 1 else 1


def exactly(value: Any) -> Any:
    """The same number or numbers in float64."""
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def from_a_layer(logits: Tensor) -> tuple[Tensor, Tensor]:
    """A leaf, and the same logits as an operation's result."""
    leaf = logits.detach().clone().requires_grad_()
    return leaf, leaf * 1


def promoted(logits: Tensor, target: Tensor, weight: Tensor | None) -> torch.dtype:
    """The dtype of the loss."""
    dtypes = {t.dtype for t in (logits, target, weight) if t is not None}
    if not target.is_floating_point() or len(dtypes) == 1:
        return logits.dtype
    return torch.float64 if torch.float64 in dtypes else torch.float32


def check_against_reference(
    logits: Tensor, target: Tensor, options: dict[str, Any], fixed: dict[str, Any]
) -> None:
    """Value and all gradients: of logits, a probability target, and every floating tensor of `options`."""
    names = [k for k, v in options.items() if isinstance(v, Tensor) and v.is_floating_point()]
    if fixed["reduction"] != "mean" and "normalizer" in names:
        names.remove("normalizer")  # divides the mean alone
    others = {k: v for k, v in options.items() if k not in names} | fixed
    floating = (logits, target) if target.is_floating_point() else (logits,)
    given = (*floating, *(options[k] for k in names))

    def bound(function: Callable[..., Tensor], others: dict[str, Any]) -> Callable[..., Tensor]:
        def call(*tensors: Tensor) -> Tensor:
            y = tensors[1] if len(floating) == 2 else target
            return function(
                tensors[0], y, **dict(zip(names, tensors[len(floating) :], strict=True)), **others
            )

        return call

    exact_others = {k: exactly(v) for k, v in others.items() if k not in ("out_dtype", "inplace_backward")}
    leaves = tuple(t.detach().requires_grad_() for t in given)
    exact = tuple(t.detach().double().requires_grad_() for t in given)
    reference = bound(cross_entropy_reference, exact_others)
    result = reference(*exact)
    loss_dtype = fixed.get("out_dtype") or promoted(logits, target, fixed.get("weight"))
    upstream = torch.randn(result.shape).to(loss_dtype).double()
    expected = (result.detach(), *torch.autograd.grad(result, exact, upstream))
    actual = value_and_gradients(bound(cross_entropy, others), leaves, upstream)

    # What the results are differences of: row losses of the logits' size times their weights.
    row_losses = bound(cross_entropy_reference, {**exact_others, "reduction": "none"})(*exact).detach().abs()
    divisor = 1.0
    if fixed["reduction"] == "mean":
        divisor = options.get("normalizer")
        divisor = len(row_losses.reshape(-1)) if divisor is None else abs(float(divisor)) or 1.0
        if "weight" in fixed and "normalizer" not in options:
            divisor *= float(fixed["weight"].double().abs().min())
    reach = max(5.0, logits.detach().double().abs().max().item()) * max(1.0, float(upstream.abs().max()))
    total = max(1.0, row_losses.sum().item() / divisor) * reach
    for name, a, e in zip(
        ("loss", *("logits", "target")[: len(floating)], *names), actual, expected, strict=True
    ):
        scale = 5 * reach * max(1.0, row_losses.max().item())
        if e.dim() == 0:
            scale = 5 * total
        compute = torch.float32 if a.dtype == torch.float64 and logits.dtype != torch.float64 else a.dtype
        assert_near(a, e, compute, scale=scale, message=f"{name} of {tuple(logits.shape)}")


# --------------------------------------------------------------------------------------------------
# All options together


def draw_shape(data: st.DataObject) -> tuple[int, ...]:
    kind = data.draw(st.sampled_from(("few", "few", "tile", "tile", "row", "blocks", "chunks")), "kind")
    classes = {
        "few": st.integers(1, 6),
        "tile": st.integers(2, 47),
        "row": st.integers(48, 400),
        "blocks": st.integers(2049, 4500),
        "chunks": st.integers(65_537, 140_000),
    }[kind]
    c = data.draw(classes, "classes")
    if kind == "chunks":
        return data.draw(st.sampled_from([(c,), (1, c), (2, c)]), "shape")
    rest = st.lists(st.integers(1, 4 if kind == "blocks" else 9), max_size=3)
    rows = data.draw(rest, "rows")
    return (rows[0], c, *rows[1:]) if rows else (c,)


@given(data=st.data())
@modest
def test_any_options_of_any_shape(data: st.DataObject) -> None:
    shape = draw_shape(data)
    dtype = data.draw(st.sampled_from(DTYPES), "dtype")
    some_dtype = st.sampled_from((dtype, torch.float32))
    torch.manual_seed(data.draw(st.integers(0, 1000), "seed"))
    dim = 0 if len(shape) == 1 else 1
    rows = rows_of(shape)

    def maybe(name: str) -> bool:
        return data.draw(st.booleans(), name)

    order = data.draw(st.permutations(range(len(shape))), "memory order")
    inverse = sorted(range(len(shape)), key=order.__getitem__)

    def laid_out(x: Tensor) -> Tensor:  # in another order of dimensions, and with gaps
        y = x.permute(order).contiguous()
        return torch.stack([y, y], -1)[..., 0].permute(inverse)

    logits = laid_out((3 * torch.randn(shape)).to(dtype))
    fixed: dict[str, Any] = {"reduction": data.draw(st.sampled_from(REDUCTIONS), "reduction")}
    if maybe("probabilities"):
        target = laid_out(torch.randn(shape).softmax(dim).to(dtype))
    else:
        target = torch.randint(0, shape[dim], rows)
        if maybe("ignored rows"):
            target = target.masked_fill(torch.rand(rows) < 0.3, -7)
            fixed["ignore_index"] = -7
    if maybe("weight"):
        fixed["weight"] = (torch.rand(shape[dim]) + 0.5).to(data.draw(some_dtype, "weight dtype"))
    if maybe("smoothing"):
        fixed["label_smoothing"] = 0.2
    options: dict[str, Any] = {}
    if maybe("scale"):
        scale = data.draw(st.sampled_from((0.7, -1.3, 2.0)), "logit_scale")
        scale_dtype = data.draw(some_dtype, "scale dtype")
        options["logit_scale"] = torch.tensor(scale, dtype=scale_dtype) if maybe("tensor scale") else scale
    if maybe("softcap"):
        options["softcap"] = data.draw(st.sampled_from((2.0, 5, 30.0)), "softcap")
    if maybe("z_loss"):
        options["z_loss"] = data.draw(st.sampled_from((0.01, -0.1)), "z_loss")
    if maybe("row weight"):
        weights: list[Tensor] = [
            torch.randn(rows).to(data.draw(some_dtype, "row_weight dtype")),  # advantages: some negative
            torch.rand(rows) < 0.7,
            torch.randint(0, 3, rows),
        ]
        options["row_weight"] = weights[data.draw(st.integers(0, 2), "row weight")]
    counted = (target != -7).any() if not target.is_floating_point() else True
    if maybe("normalizer") or not counted:
        divisor = torch.tensor(6.5)
        norms: list[Any] = [6.5, 7, divisor.to(dtype), divisor.long(), divisor.double()]
        options["normalizer"] = norms[data.draw(st.integers(0, 4), "normalizer")]
    fixed["empty"] = data.draw(st.sampled_from(("nan", "zero")), "empty")
    if maybe("out_dtype"):
        fixed["out_dtype"] = data.draw(st.sampled_from((torch.float32, torch.float64)), "out_dtype")
    check_against_reference(logits, target, options, fixed)


@each_reduction
@each_dtype
@every_backend
def test_every_way_through_the_logits(dtype: torch.dtype, reduction: str) -> None:
    """Tiles, rows, several blocks, chunks of rows, strided classes: the same formula on each."""
    for shape, probabilities in itertools.product(
        [(5, 3), (70, 31), (3, 47), (3, 48), (4, 2500), (2, 5, 40), (2, 60, 3), (2, 70_000)], (False, True)
    ):
        target = torch.randn(shape).softmax(1).to(dtype)
        if not probabilities:
            target = torch.randint(0, shape[1], rows_of(shape))
        options = {
            "logit_scale": torch.tensor(0.75, dtype=dtype),
            "softcap": 4.0,
            "z_loss": 0.02,
            "row_weight": torch.randn(rows_of(shape)).to(dtype),
        }
        weight = torch.rand(shape[1]).to(dtype) + 0.5
        fixed = {"reduction": reduction, "label_smoothing": 0.1, "weight": weight}
        check_against_reference((3 * torch.randn(shape)).to(dtype), target, options, fixed)


@each_reduction
@pytest.mark.parametrize("probabilities", [False, True])
def test_options_that_change_nothing_change_nothing(probabilities: bool, reduction: str) -> None:
    """Each neutral value goes the family's way through the kernels."""
    logits = torch.randn(9, 13)
    target = torch.rand(9, 13) if probabilities else torch.randint(0, 13, (9,))
    plain = cross_entropy(logits.double(), target, reduction=reduction)
    for options in (
        {"logit_scale": torch.ones(())},
        {"softcap": 1e30},
        {"row_weight": torch.ones(9, dtype=torch.bool)},
        {"normalizer": 9},
        {"empty": "zero"},
        {"inplace_backward": True},
    ):
        result = cross_entropy(logits, target, reduction=reduction, **options)
        # tanh near 0 is its argument, to 2 ulp.
        assert_near(result, plain, scale=10, message=str(options))


# --------------------------------------------------------------------------------------------------
# Metrics


def metrics_reference(
    logits: Tensor,
    target: Tensor,
    ignore_index: int = -100,
    logit_scale: float | Tensor = 1.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
) -> CrossEntropyMetrics:
    """What cross_entropy_with_metrics says of every row, in plain PyTorch."""
    dim = class_dim(logits)
    u = logits * logit_scale
    if softcap is not None:
        u = softcap * torch.tanh(u / softcap)
    lse = u.logsumexp(dim)
    log_p = u - lse.unsqueeze(dim)
    p = log_p.exp()
    entropy = -(p * log_p.masked_fill(p == 0, 0)).sum(dim)
    predicted = u.argmax(dim)
    if target.is_floating_point():
        logprob = (target * log_p.masked_fill(target == 0, 0)).sum(dim)
        return CrossEntropyMetrics(
            lse, logprob, entropy, z_loss * lse**2, predicted, predicted == target.argmax(dim)
        )
    target = target.long().reshape(lse.shape)
    ignored = target == ignore_index
    logprob = log_p.gather(dim, target.masked_fill(ignored, 0).unsqueeze(dim)).squeeze(dim)
    floats = (t.masked_fill(ignored, 0) for t in (lse, logprob, entropy, z_loss * lse**2))
    return CrossEntropyMetrics(*floats, predicted.masked_fill(ignored, -1), (predicted == target) & ~ignored)


METRIC_SHAPES = [(7,), (1, 1), (5, 11), (3, 60), (2, 3000), (2, 11, 7), (2, 5, 3, 4), (1, 70_000)]


@pytest.mark.parametrize("kind", ["index", "probabilities", "weighted probabilities"])
@each_dtype
@every_backend
def test_metrics_and_their_gradients(dtype: torch.dtype, kind: str) -> None:
    """An arbitrary combination of all results, differentiated in logits, scale and probabilities."""
    fused = {"logit_scale": 0.8, "softcap": 6.0, "z_loss": 0.05}
    for shape, options in itertools.product(METRIC_SHAPES, ({}, {"z_loss": 0.05}, fused)):
        logits = (3 * torch.randn(shape)).to(dtype)
        dim = class_dim(logits)
        loss_options: dict[str, Any] = {"reduction": "none"}
        if kind == "index":
            target = torch.randint(0, shape[dim], rows_of(shape))
            target = target.masked_fill(torch.rand(target.shape) < 0.3, -7)
            loss_options["ignore_index"] = -7
        else:
            target = torch.randn(shape).softmax(dim).to(dtype)
        if kind == "weighted probabilities":
            loss_options |= {"weight": torch.rand(shape[dim]).to(dtype) + 0.5, "label_smoothing": 0.2}
        probabilities = target.is_floating_point()
        scale = options.get("logit_scale", 1.0)
        others = {k: v for k, v in options.items() if k != "logit_scale"}
        row_numbers = [torch.randn(rows_of(shape)).to(dtype).double() for _ in range(5)]

        def combined(loss: Tensor, metrics: CrossEntropyMetrics, numbers: list[Tensor]) -> Tensor:
            terms = (loss, *metrics[:4])
            return sum((t.double() * g).sum() for t, g in zip(terms, numbers, strict=True))  # type: ignore[return-value]

        tensors = (logits, torch.tensor(scale, dtype=dtype), *((target,) if probabilities else ()))
        z, s, *p = (t.detach().requires_grad_() for t in tensors)
        loss, metrics = cross_entropy_with_metrics(
            z, *(p or [target]), logit_scale=s, **others, **loss_options
        )
        ez, es, *ep = (t.detach().double().requires_grad_() for t in tensors)
        exact_options = {k: exactly(v) for k, v in loss_options.items()}
        e_loss = cross_entropy_reference(ez, *(ep or [target]), logit_scale=es, **others, **exact_options)
        ignore = {"ignore_index": -7} if kind == "index" else {}
        e_metrics = metrics_reference(ez, *(ep or [target]), logit_scale=es, **others, **ignore)

        accumulated = torch.float64 if dtype == torch.float64 else torch.float32
        assert (loss.dtype, loss.shape) == (dtype, rows_of(shape))
        assert_near(loss, e_loss, scale=20)
        for name, a, e in zip(metrics._fields[:4], metrics, e_metrics, strict=False):
            assert (a.dtype, a.shape) == (accumulated, rows_of(shape)), name
            assert_near(a, e, scale=20, message=name)
        assert metrics.predicted.dtype == torch.int64
        assert torch.equal(metrics.predicted, e_metrics.predicted)
        assert metrics.correct.dtype == torch.bool
        assert torch.equal(metrics.correct, e_metrics.correct)
        assert not metrics.predicted.requires_grad

        actual = torch.autograd.grad(combined(loss, metrics, row_numbers), (z, s, *p))
        expected = torch.autograd.grad(combined(e_loss, e_metrics, row_numbers), (ez, es, *ep))
        for a, e in zip(actual, expected, strict=True):
            # A scale's gradient is one sum over all classes.
            widened = 50.0 if a.dim() else 50 * float((ez.detach() * expected[0]).abs().sum() + 5)
            if kind == "weighted probabilities":  # two passes, each rounded, and so is their sum
                rtol, atol = TOLERANCES[dtype]
                widened += 4 * rtol / atol * e.abs().max().item()
            assert_near(a, e, scale=widened, message=f"gradient of {tuple(a.shape)}, {options}")


@pytest.mark.parametrize("probabilities", [False, True])
def test_metrics_have_second_derivatives(probabilities: bool) -> None:
    logits = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    scale = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    target = torch.randn(3, 5).softmax(1).double() if probabilities else torch.tensor([1, -100, 4])

    def function(z: Tensor, s: Tensor) -> tuple[Tensor, ...]:
        loss, metrics = cross_entropy_with_metrics(
            z, target, logit_scale=s, softcap=3.0, z_loss=0.1, label_smoothing=0.1
        )
        return (loss, *metrics[:4])

    assert torch.autograd.gradcheck(function, (logits, scale))
    assert torch.autograd.gradgradcheck(function, (logits, scale))
    assert torch.autograd.gradcheck(function, (logits, scale), check_forward_ad=True, check_backward_ad=False)


@every_backend
def test_of_equal_logits_the_lowest_class_is_predicted() -> None:
    for classes in (1, 2, 5, 47, 48, 300, 2048, 2049, 5000, 70_000):
        for shape in ((3, classes), (2, classes, 3), (classes,)):
            if math.prod(shape) > 150_000:
                continue
            logits = torch.zeros(shape)
            dim = class_dim(logits)
            at = sorted({0, classes // 3, classes // 2, classes - 1})
            for first in at:
                logits.zero_().narrow(dim, 0, first).fill_(-1)  # equal from `first` on
                target = torch.full(rows_of(shape), first)
                metrics = cross_entropy_with_metrics(logits, target)[1]
                assert (metrics.predicted == first).all(), (shape, first)
                assert metrics.correct.all()


@every_backend
def test_rows_that_are_not_finite_predict_as_argmax() -> None:
    for classes in (3, 47, 48, 2500):
        rows: list[Tensor] = []
        for bad in (NAN, INF, -INF):
            for places in ([0], [1], [classes - 1], [1, classes - 1], list(range(classes))):
                row = torch.randn(classes)
                row[places] = bad
                rows.append(row)
        mixed = torch.randn(3, classes)
        mixed[0, 0], mixed[0, 2] = INF, NAN
        mixed[1, 0], mixed[1, 1], mixed[1, 2] = -INF, INF, INF
        mixed[2, 1], mixed[2, 2] = NAN, NAN
        logits = torch.cat([torch.stack(rows), mixed])
        target = torch.zeros(len(logits), dtype=torch.long)
        expected = logits.argmax(1)
        loss, metrics = cross_entropy_with_metrics(logits, target, reduction="none")
        assert torch.equal(metrics.predicted, expected)
        assert torch.equal(metrics.correct, expected == 0)
        assert_near(loss, F.cross_entropy(logits.double(), target, reduction="none"))
        assert torch.equal(metrics.logprob.isnan(), logits.log_softmax(1)[:, 0].isnan())
        # Classes across the memory, which makes rows into tiles.
        across = logits.t().contiguous().t()
        assert torch.equal(cross_entropy_with_metrics(across, target)[1].predicted, expected)


def test_metrics_where_there_is_little() -> None:
    for shape in ((0, 4), (0, 4, 3), (2, 4, 0)):
        for target in (torch.zeros(rows_of(shape), dtype=torch.long), torch.zeros(shape)):
            metrics = cross_entropy_with_metrics(torch.zeros(shape), target)[1]
            assert [t.shape for t in metrics] == [rows_of(shape)] * 6
    loss, metrics = cross_entropy_with_metrics(torch.randn(3, 1), torch.zeros(3, dtype=torch.long))
    assert loss.item() == 0
    assert metrics.predicted.tolist() == [0, 0, 0]
    assert metrics.correct.all()
    assert not metrics.entropy.any()
    # No classes: nothing to predict.
    for target in (torch.full((3,), -100), torch.zeros(3, 0)):
        metrics = cross_entropy_with_metrics(torch.zeros(3, 0), target)[1]
        assert metrics.predicted.tolist() == [-1, -1, -1]
        assert not metrics.correct.any()
        assert not metrics.entropy.any()
    # All rows ignored, whatever they hold.
    _, metrics = cross_entropy_with_metrics(torch.full((3, 4), NAN), torch.full((3,), -100), z_loss=1.0)
    assert metrics.predicted.tolist() == [-1, -1, -1]
    for values in (metrics.lse, metrics.logprob, metrics.entropy, metrics.z_loss, metrics.correct):
        assert not values.any()


def test_the_most_probable_class_is_that_of_the_target_as_given() -> None:
    """Whatever the class weights say, which a gradient moves into the target."""
    logits = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    target = torch.tensor([[0.3, 0.5, 0.2], [0.3, 0.5, 0.2]])
    weight = torch.tensor([1.0, 0.1, 5.0])
    for w in (weight, weight.clone().requires_grad_()):
        metrics = cross_entropy_with_metrics(logits, target, w, label_smoothing=0.1)[1]
        assert metrics.correct.tolist() == [True, False]


def test_an_ignored_row_is_never_correct() -> None:
    logits = torch.randn(4, 5)
    for ignore_index in (-1, 2):
        target = torch.full((4,), ignore_index)
        metrics = cross_entropy_with_metrics(logits, target, ignore_index=ignore_index)[1]
        assert not metrics.correct.any()


@pytest.mark.parametrize("probabilities", [False, True])
def test_the_loss_beside_metrics_is_the_loss(probabilities: bool) -> None:
    logits = torch.randn(6, 70)
    target = torch.rand(6, 70) if probabilities else torch.randint(0, 70, (6,))
    for reduction in REDUCTIONS:
        options: dict[str, Any] = {
            "reduction": reduction,
            "label_smoothing": 0.1,
            "weight": torch.rand(70),
            "logit_scale": 0.5,
            "softcap": 3.0,
            "z_loss": 0.1,
            "row_weight": torch.randn(6),
            "normalizer": 4.0,
            "empty": "zero",
            "out_dtype": torch.float64,
        }
        assert torch.equal(
            cross_entropy(logits, target, **options), cross_entropy_with_metrics(logits, target, **options)[0]
        )


# --------------------------------------------------------------------------------------------------
# log_prob


@each_dtype
@every_backend
def test_log_prob(dtype: torch.dtype) -> None:
    for shape, transform in itertools.product(
        [(9,), (5, 11), (4, 3000), (2, 11, 7), (2, 5, 3, 4)],
        ({}, {"logit_scale": -0.7}, {"softcap": 4.0}, {"logit_scale": 1.5, "softcap": 4.0}),
    ):
        logits = (3 * torch.randn(shape)).to(dtype).requires_grad_()
        exact = logits.detach().double().requires_grad_()
        dim = class_dim(logits)
        target = torch.randint(0, shape[dim], rows_of(shape))
        u = exact * transform.get("logit_scale", 1.0)
        cap = transform.get("softcap")
        u = u if cap is None else cap * torch.tanh(u / cap)
        log_p = u.log_softmax(dim)
        expected = log_p.gather(dim, target.unsqueeze(dim)).squeeze(dim)
        entropy = -(log_p.exp() * log_p).sum(dim)

        logprob, both = (
            log_prob(logits, target, **transform),
            log_prob(logits, target, return_entropy=True, **transform),
        )
        assert isinstance(logprob, Tensor)
        assert logprob.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert_near(logprob, expected, scale=10)
        assert_near(both[0], logprob, scale=10)
        assert_near(both[1], entropy, scale=20)
        g, h = (torch.randn(rows_of(shape), dtype=torch.float64) for _ in range(2))
        (actual,) = torch.autograd.grad((both[0].double() * g + both[1].double() * h).sum(), logits)
        (gradient,) = torch.autograd.grad((expected * g + entropy * h).sum(), exact)
        assert actual.dtype == dtype
        assert_near(actual, gradient, scale=50)


def test_log_prob_of_a_language_model() -> None:
    """Classes last, which movedim makes the second dimension without a copy; padding is ignored."""
    logits = torch.randn(2, 7, 50, dtype=torch.float64)
    target = torch.randint(0, 50, (2, 7))
    target[1, 4:] = -100
    result = log_prob(logits.movedim(-1, 1), target)
    expected = logits.log_softmax(-1).gather(-1, target.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    assert isinstance(result, Tensor)
    assert result.shape == (2, 7)
    assert_near(result, expected.masked_fill(target == -100, 0))

    leaf = logits.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(log_prob(leaf.movedim(-1, 1), target).sum(), leaf)  # type: ignore[union-attr]
    assert not gradient[1, 4:].any()
    assert gradient.is_contiguous()
    other = log_prob(logits.movedim(-1, 1), target.masked_fill(target == -100, 3), ignore_index=3)
    assert isinstance(other, Tensor)
    assert not other[1, 4:].any()


def test_log_prob_has_every_derivative() -> None:
    logits = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    scale = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([1, 0, 4])

    def function(z: Tensor, s: Tensor) -> Any:
        return log_prob(z, target, logit_scale=s, softcap=3.0, return_entropy=True)

    assert torch.autograd.gradcheck(function, (logits, scale))
    assert torch.autograd.gradgradcheck(function, (logits, scale))
    per_sample = torch.vmap(torch.func.grad(lambda z, y: log_prob(z, y)))(logits.detach(), target)
    (together,) = torch.autograd.grad(log_prob(logits, target).sum(), logits)  # type: ignore[union-attr]
    assert_near(per_sample, together)


def test_log_prob_errors(device: str) -> None:
    z, y = torch.randn(3, 5), torch.tensor([1, 0, 4])
    cases: list[tuple[type[Exception], str, tuple[Any, ...], dict[str, Any]]] = [
        (RuntimeError, "target of class indices of shape .3,., got probabilities", (z, torch.rand(3, 5)), {}),
        (ValueError, "expected target of shape", (z, y[:2]), {}),
        (RuntimeError, "Long, Int or Byte", (z, y.float()), {}),
        (RuntimeError, "got a 0-d tensor", (z[0, 0], y), {}),
        (NotImplementedError, "not implemented for input of dtype torch.int64", (z.long(), y), {}),
        (NotImplementedError, "dense tensor", (z.to_sparse(), y), {}),
        (TypeError, "expected target to be a Tensor, got list", (z, [1, 0, 4]), {}),
        (TypeError, "expected input to be a Tensor, got NoneType", (None, y), {}),
        (TypeError, "logit_scale to be a float or a Tensor", (z, y), {"logit_scale": "1"}),
        (ValueError, "softcap to be positive and finite", (z, y), {"softcap": 0.0}),
    ]
    for error, sentence, args, options in cases:
        with pytest.raises(error, match=sentence):
            log_prob(*args, **options)
    with raises_index_error(device, "Target 9 is out of bounds"):
        log_prob(z, torch.tensor([1, 9, 4]))


# --------------------------------------------------------------------------------------------------
# empty, normalizer, row_weight, out_dtype


@pytest.mark.parametrize("shape", [(4, 5), (3, 60), (2, 5, 7), (5,)])
def test_a_mean_over_nothing(shape: tuple[int, ...]) -> None:
    logits = torch.randn(shape)
    ignored = torch.full(rows_of(shape), -100)
    zero_weight = torch.zeros(5 if shape != (3, 60) else 60)
    for target, options in (
        (ignored, {}),
        (ignored, {"z_loss": 0.1, "softcap": 3.0, "label_smoothing": 0.1}),
        (ignored.clamp(min=0), {"weight": zero_weight}),
        (ignored.clamp(min=0), {"normalizer": 0}),
        (ignored.clamp(min=0), {"normalizer": torch.tensor(0)}),
        (ignored.clamp(min=0), {"normalizer": torch.tensor(0.0, requires_grad=True)}),
    ):
        leaf = logits.clone().requires_grad_()
        zero = cross_entropy(leaf, target, empty="zero", **options)
        assert zero.item() == 0
        assert zero.requires_grad
        zero.backward()
        assert leaf.grad is not None
        assert not leaf.grad.any()
        assert not cross_entropy(logits, target, empty="nan", **options).isfinite()
        assert not cross_entropy(logits, target, **{"softcap": 1.0, **options}).isfinite()
    some = logits.clone().requires_grad_()
    target = torch.zeros_like(ignored)
    counted = cross_entropy(some, target, normalizer=target.numel())
    assert torch.equal(cross_entropy(some, target, empty="zero"), counted)


def test_empty_concerns_the_mean_alone() -> None:
    logits, target = torch.randn(4, 5), torch.full((4,), -100)
    for reduction in ("none", "sum"):
        assert not cross_entropy(logits, target, reduction=reduction, empty="zero", normalizer=0).any()
    rows = cross_entropy(logits, torch.zeros_like(target), reduction="none", empty="zero", normalizer=0)
    assert rows.all()


def test_no_rows_at_all() -> None:
    for target in (torch.zeros(0, dtype=torch.long), torch.zeros(0, 4)):
        logits = torch.zeros(0, 4, requires_grad=True)
        options: dict[str, Any] = {"softcap": 2.0, "row_weight": torch.zeros(0)}
        assert cross_entropy(logits, target, **options).isnan()
        zero = cross_entropy(logits, target, empty="zero", **options)
        zero.backward()
        assert zero.item() == 0
        assert logits.grad is not None
        assert logits.grad.shape == (0, 4)
        assert cross_entropy(logits, target, normalizer=3, **options).item() == 0
        assert cross_entropy(logits, target, reduction="none", **options).shape == (0,)


NORMALIZERS: list[Any] = [
    12.5,
    12,
    *(torch.tensor(12.5, dtype=dtype) for dtype in DTYPES),
    *(torch.tensor(12, dtype=dtype) for dtype in (torch.int64, torch.int32, torch.uint8)),
]


@pytest.mark.parametrize("normalizer", NORMALIZERS, ids=str)
def test_normalizer_takes_the_place_of_the_count(normalizer: Any) -> None:
    logits, target = torch.randn(6, 9), torch.randint(0, 9, (6,))
    value = float(normalizer)
    for options in ({}, {"weight": torch.rand(9)}, {"empty": "zero"}):
        total = cross_entropy(logits.double(), target, reduction="sum", **options)
        assert_near(cross_entropy(logits, target, normalizer=normalizer, **options), total / value, scale=5)
        # It divides nothing else.
        for reduction in ("none", "sum"):
            assert torch.equal(
                cross_entropy(logits, target, reduction=reduction, normalizer=normalizer, **options),
                cross_entropy(logits, target, reduction=reduction, normalizer=1, **options),
            )


@not_emulated
def test_micro_batches_that_share_a_normalizer_make_one_batch() -> None:
    """Gradient accumulation over micro-batches with unequal numbers of tokens."""
    logits, target = torch.randn(12, 70), torch.randint(0, 70, (12,))
    target[[0, 3, 4, 5]] = -100
    whole = logits.clone().requires_grad_()
    loss = cross_entropy(whole, target)
    loss.backward()
    parts = logits.clone().requires_grad_()
    count = (target != -100).sum()
    losses = [
        cross_entropy(z, y, normalizer=count) for z, y in zip(parts.split(5), target.split(5), strict=True)
    ]
    for part in losses:
        part.backward()
    assert_near(torch.stack(losses).sum(), loss)
    assert_near(parts.grad, whole.grad)  # type: ignore[arg-type]


MASKS = (torch.bool, torch.uint8, torch.int64, torch.float16, torch.float64)


@pytest.mark.parametrize("dtype", MASKS, ids=str)
def test_a_mask_of_any_dtype(dtype: torch.dtype) -> None:
    logits, target = torch.randn(6, 9), torch.randint(0, 9, (6,))
    mask = torch.tensor([1, 0, 1, 1, 0, 1]).to(dtype)
    leaf, kept = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    masked = cross_entropy(leaf, target, row_weight=mask, normalizer=mask.sum())
    expected = cross_entropy(kept[mask.bool()], target[mask.bool()])
    assert masked.dtype == torch.float32
    assert_near(masked, expected)
    masked.backward()
    expected.backward()
    assert_near(leaf.grad, kept.grad)  # type: ignore[arg-type]
    # Alone it leaves the divisor as it is.
    assert_near(cross_entropy(logits, target, row_weight=mask), expected * 4 / 6)


def test_negative_advantages_and_their_gradient() -> None:
    logits, target = torch.randn(6, 9).double(), torch.randint(0, 9, (6,))
    advantages = torch.tensor([-2.0, -0.5, 0.0, 0.25, 1.0, 3.0]).double().requires_grad_()
    rows = F.cross_entropy(logits, target, reduction="none")
    loss = cross_entropy(logits, target, row_weight=advantages, reduction="sum")
    assert_near(loss, (rows * advantages).sum())
    loss.backward()
    assert advantages.grad is not None
    assert_near(advantages.grad, rows)


def test_row_weight_of_the_one_row_without_a_batch() -> None:
    logits, target = torch.randn(9), torch.tensor(3)
    for shape in ((), (1,)):
        for y in (target, target.reshape(1)):
            weight = torch.full(shape, 2.0, requires_grad=True)
            loss = cross_entropy(logits, y, row_weight=weight)
            loss.backward()
            assert loss.shape == ()
            assert_near(loss, 2 * F.cross_entropy(logits.double(), target))
            assert weight.grad is not None
            assert weight.grad.shape == shape


@each_reduction
def test_out_dtype(reduction: str) -> None:
    for dtype, out_dtype, probabilities in itertools.product(DTYPES, DTYPES, (False, True)):
        logits = torch.randn(3, 70).to(dtype).requires_grad_()
        target = torch.rand(3, 70).to(dtype) if probabilities else torch.tensor([1, -100, 69])
        exact = cross_entropy_reference(logits.double(), exactly(target), reduction=reduction)
        for options in ({}, {"empty": "zero"}):  # the plain kernel, and the family's
            loss = cross_entropy(logits, target, reduction=reduction, out_dtype=out_dtype, **options)
            assert loss.dtype == out_dtype
            coarse = torch.float32 if out_dtype == torch.float64 and dtype != torch.float64 else out_dtype
            assert_near(loss, exact, coarse, scale=100)
            (gradient,) = torch.autograd.grad(loss.sum(), logits)
            assert gradient.dtype == dtype


def test_out_dtype_beside_autocast() -> None:
    """Autocast has losses in float32; who names a dtype gets that one."""
    logits, target = torch.randn(4, 5).bfloat16(), torch.randint(0, 5, (4,))
    device = logits.device.type
    with torch.autocast(device, dtype=torch.bfloat16):
        for options in ({}, {"softcap": 3.0}):
            assert cross_entropy(logits, target, **options).dtype == torch.float32
            for out_dtype in DTYPES:
                assert cross_entropy(logits, target, out_dtype=out_dtype, **options).dtype == out_dtype
        assert cross_entropy_with_metrics(logits, target)[0].dtype == torch.float32
        assert log_prob(logits, target).dtype == torch.float32  # type: ignore[union-attr]


# --------------------------------------------------------------------------------------------------
# Determinism and extreme values


@cpu_only
@pytest.mark.parametrize("shape", [(70_000, 5), (2000, 60), (8, 100_000), (1, 200_000)])
def test_the_same_bits_on_any_number_of_threads(shape: tuple[int, int], restore_threads: None) -> None:
    logits, target = torch.randn(shape), torch.randint(0, shape[1], shape[:1])
    weight = torch.randn(shape[0])

    def run(threads: int) -> list[Tensor]:
        torch.set_num_threads(threads)
        z, s, w = (t.detach().clone().requires_grad_() for t in (logits, torch.tensor(0.7), weight))
        n = torch.tensor(5.0, requires_grad=True)
        loss, metrics = cross_entropy_with_metrics(
            z, target, logit_scale=s, softcap=3.0, z_loss=0.1, row_weight=w, normalizer=n
        )
        total = loss + (metrics.entropy * 0.1 + metrics.logprob).sum()
        return [loss.detach(), *metrics, *torch.autograd.grad(total, (z, s, w, n))]

    first = run(1)
    for threads in (1, 2, 2):
        for a, b in zip(first, run(threads), strict=True):
            assert torch.equal(a, b)


@every_backend
def test_extreme_logits() -> None:
    for classes in (5, 60, 3000):
        target = torch.tensor([0, 1, 2, 3])
        for base, scale in ((1e4, 1.0), (1e30, 1.0), (1.0, 1e30), (1e4, -1e3)):
            logits = (base * torch.randn(4, classes)).requires_grad_()
            exact = logits.detach().double().requires_grad_()
            ours = value_and_gradients(
                lambda z, y=target, s=scale: cross_entropy(z, y, logit_scale=s, reduction="none"),
                (logits,),
            )
            expected = value_and_gradients(
                lambda z, y=target, s=scale: F.cross_entropy(z * s, y, reduction="none"), (exact,)
            )
            for a, e in zip(ours, expected, strict=True):
                # u is rounded once, which moves it by half a unit in the last place of |scale*z|.
                assert a.isfinite().all()
                if abs(base * scale) > 1e7:
                    assert_near(a, e, scale=1e-7 * abs(base * scale) * max(1.0, abs(scale)))
                else:
                    assert_near(a, e, scale=abs(scale) * 1e4)


@every_backend
def test_infinite_logits_under_a_cap() -> None:
    """tanh makes them finite, with a gradient of 0."""
    for classes in (5, 60, 3000):
        logits = torch.randn(3, classes)
        logits[0, 1], logits[1, 2], logits[2, 0] = INF, -INF, 1e38
        leaf = logits.clone().requires_grad_()
        loss = cross_entropy(leaf, torch.tensor([1, 2, 3]), softcap=5.0, reduction="none")
        capped = 5 * torch.tanh(logits.double() / 5)
        assert_near(loss, F.cross_entropy(capped, torch.tensor([1, 2, 3]), reduction="none"), scale=5)
        loss.sum().backward()
        assert leaf.grad is not None
        assert leaf.grad.isfinite().all()
        assert (leaf.grad[[0, 1, 2], [1, 2, 0]] == 0).all()
        # NaN stays NaN, and in its own row.
        logits[1, 0] = NAN
        rows = cross_entropy(logits, torch.tensor([1, 2, 3]), softcap=5.0, reduction="none")
        assert rows.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("as_tensor", [False, True])
def test_a_scale_of_0_and_below(as_tensor: bool) -> None:
    logits, target = torch.randn(4, 50).double(), torch.randint(0, 50, (4,))
    for value in (0.0, -0.0, -2.5):
        for softcap in (None, 3.0):
            scale: Any = torch.tensor(value).double() if as_tensor else value
            leaf = logits.clone().requires_grad_()
            loss = cross_entropy(leaf, target, logit_scale=scale, softcap=softcap)
            exact = logits.clone().requires_grad_()
            expected = cross_entropy_reference(exact, target, logit_scale=value, softcap=softcap)
            assert_near(loss, expected)
            loss.backward()
            expected.backward()
            assert_near(leaf.grad, exact.grad)  # type: ignore[arg-type]
    assert_near(
        cross_entropy(logits, target, logit_scale=0.0), torch.tensor(math.log(50), dtype=torch.float64)
    )


def test_rows_of_minus_infinity() -> None:
    """As torch has them: NaN, unless they are ignored."""
    logits = torch.randn(3, 5)
    logits[1] = -INF
    for target, expected in (([0, 1, 2], [False, True, False]), ([0, -100, 2], [False, False, False])):
        y = torch.tensor(target)
        for options in ({"empty": "zero"}, {"z_loss": 0.1}, {"logit_scale": torch.tensor(2.0)}):
            loss = cross_entropy(logits, y, reduction="none", **options)
            assert loss.isnan().tolist() == expected


@pytest.mark.parametrize("classes", [6, 60, 3000])
@every_backend
def test_entropy_asks_nothing_of_probabilities(classes: int) -> None:
    """Their gradient is 0, at a logit of -inf too."""
    logits = torch.randn(3, classes)
    logits[:, 2] = -INF
    target = torch.randn(3, classes).softmax(1).requires_grad_()
    _, metrics = cross_entropy_with_metrics(logits, target)
    (grad,) = torch.autograd.grad(metrics.entropy.sum(), target)
    assert torch.equal(grad, torch.zeros_like(target))


@pytest.mark.parametrize("classes", [6, 60, 3000])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("scale", [1.0, 2.0, "tensor"])
@every_backend
def test_classes_that_are_masked_out(scale: float | str, softcap: float | None, classes: int) -> None:
    """A logit of -inf is one so low that it does not count: in the first and second derivatives as well."""
    target = torch.tensor([0, 1, 3])
    direction = torch.randn(3, classes, dtype=torch.float64)
    masked = torch.randn(3, classes, dtype=torch.float64)
    masked[:, 2] = masked[:, -1] = -INF
    found = []
    for logits in (masked, masked.clamp(min=-1e4)):
        z = logits.clone().requires_grad_()
        s = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
        loss, metrics = cross_entropy_with_metrics(
            z, target, logit_scale=s if scale == "tensor" else float(scale), softcap=softcap, z_loss=0.1
        )
        leaves = (z, s) if scale == "tensor" else (z,)
        value = loss + 0.3 * metrics.entropy.sum()
        grads = torch.autograd.grad(value, leaves, create_graph=True)
        along = (grads[0] * direction).sum() + sum(g for g in grads[1:])
        found.append((value, *metrics, *grads, *torch.autograd.grad(along, leaves)))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)
    assert torch.isfinite(found[0][0])
    if softcap is None:
        leaf = masked[:, :3].float().requires_grad_()
        loss, metrics = cross_entropy_with_metrics(leaf, torch.tensor([0, 1, 2]), reduction="none")
        assert_near(loss, F.cross_entropy(leaf.double(), torch.tensor([0, 1, 2]), reduction="none"))
        assert metrics.logprob.isinf().tolist() == [False, False, True]


# 1.92 ulp in float32, near |x| = 0.64 where (1 - e)/(1 + e) cancels most, and 1.5 ulp in float64, measured
# on these arguments; small enough against the 2 ulp of exp to leave the table of tolerances as it is.
TANH_ULPS = {torch.float32: 2.0, torch.float64: 1.6}


@pytest.mark.parametrize("dtype", TANH_ULPS, ids=str)
@every_backend
def test_tanh_of_the_cap(dtype: torch.dtype) -> None:
    """One class's largest logit under a cap of 1 is tanh itself."""
    x = torch.cat(
        [
            torch.linspace(-12, 12, 20_001).double(),
            torch.linspace(0.6, 0.65, 20_001).double(),
            torch.logspace(-30, 2, 20_001).double(),
            torch.tensor([0.0, 0.625, math.nextafter(0.625, 0), 20.0, 1e30, INF]).double(),
        ]
    )
    x = torch.cat([x, -x]).to(dtype)
    target = torch.zeros(len(x), dtype=torch.long)
    rows_forward = torch.ops.lossops.cross_entropy_rows_forward.default
    exact = np.tanh(x.cpu().numpy().astype(np.longdouble))
    spacing = np.spacing(np.abs(exact.astype(x.cpu().numpy().dtype))).astype(np.longdouble)
    double_only = 0.5 if np.finfo(np.longdouble).nmant < 63 and dtype == torch.float64 else 0.0
    for classes in (1, 64):  # as a tile and along rows
        logits = x[:, None].expand(-1, classes).contiguous()
        planes, _ = rows_forward(logits, target, None, None, 1.0, 1.0, -100, 0.0, False, False)
        result = planes[0].cpu().numpy()
        ulps = np.abs(result.astype(np.longdouble) - exact) / spacing
        assert ulps.max() <= TANH_ULPS[dtype] + double_only, x[int(ulps.argmax())]
        assert (np.abs(result) <= 1).all()
        assert (np.sign(result) == np.sign(x.cpu().numpy())).all()


# --------------------------------------------------------------------------------------------------
# torch.func: batches over every operand, derivatives of every order


def operands() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        torch.randn(4, 6, dtype=torch.float64),
        torch.tensor([1, 0, -100, 5]),
        torch.tensor(0.7, dtype=torch.float64),
        torch.randn(4, dtype=torch.float64),
    )


def loss_of(
    function: Callable[..., Tensor], z: Tensor, y: Tensor, s: Tensor, w: Tensor, **options: Any
) -> Tensor:
    given = {"softcap": 3.0, "z_loss": 0.1, "normalizer": 5.0, **options}
    return function(z, y, logit_scale=s, row_weight=w, **given)


@each_reduction
@pytest.mark.parametrize("batched", [p for n in (1, 2, 3, 4) for p in itertools.combinations(range(4), n)])
def test_vmap_over_any_operands(batched: tuple[int, ...], reduction: str) -> None:
    """Logits, target, scale and row weight, each with a batch or without; and gradients inside."""
    samples = [operands() for _ in range(3)]
    samples = [tuple(s[k] if k in batched else samples[0][k] for k in range(4)) for s in samples]  # type: ignore[misc]
    stacked = [torch.stack([s[k] for s in samples]) if k in batched else samples[0][k] for k in range(4)]
    in_dims = tuple(0 if k in batched else None for k in range(4))

    def ours(*args: Tensor) -> Tensor:
        return loss_of(cross_entropy, *args, reduction=reduction)

    def slopes(*args: Tensor) -> tuple[Tensor, ...]:
        return torch.func.grad(lambda z, s, w: ours(z, args[1], s, w).sum(), (0, 1, 2))(args[0], *args[2:])

    def exact_slopes(*args: Tensor) -> tuple[Tensor, ...]:
        reference = lambda z, s, w: loss_of(cross_entropy_reference, z, args[1], s, w, reduction=reduction)  # noqa: E731
        leaves = tuple(args[k].clone().requires_grad_() for k in (0, 2, 3))
        return torch.autograd.grad(reference(*leaves).sum(), leaves)

    expected = torch.stack([loss_of(cross_entropy_reference, *s, reduction=reduction) for s in samples])
    assert_near(torch.vmap(ours, in_dims)(*stacked), expected, scale=10)
    for a, e in zip(
        torch.vmap(slopes, in_dims)(*stacked),
        zip(*itertools.starmap(exact_slopes, samples), strict=True),
        strict=True,
    ):
        assert_near(a, torch.stack(e), scale=10)


def test_vmap_over_normalizers() -> None:
    z, y, _, _ = operands()
    total = cross_entropy_reference(z, y, reduction="sum")
    divisors = torch.tensor([0.0, 1.0, -2.5]).double()
    expected = torch.tensor([0.0, total, total / -2.5]).double()
    assert_near(torch.vmap(lambda n: cross_entropy(z, y, normalizer=n, empty="zero"))(divisors), expected)


def test_per_sample_gradients() -> None:
    z, y, s, w = operands()
    gradient = torch.func.grad(lambda z, y, s, w: loss_of(cross_entropy, z, y, s, w), (0, 2, 3))
    per_sample = torch.vmap(gradient, (0, 0, None, 0))(z, y, s, w)
    for k in range(4):
        leaves = tuple(t.clone().requires_grad_() for t in (z[k], s, w[k]))
        loss = loss_of(cross_entropy_reference, leaves[0], y[k], *leaves[1:])
        for a, e in zip(per_sample, torch.autograd.grad(loss, leaves), strict=True):
            assert_near(a[k], e)


def test_metrics_under_vmap() -> None:
    z, y, s, _ = operands()
    z, scales = torch.stack([z, z + 1]), torch.stack([s, 2 * s])
    for in_dims in ((0, None), (0, 0), (None, 0)):
        args = z if in_dims[0] == 0 else z[0], scales if in_dims[1] == 0 else s
        batched = torch.vmap(
            lambda z, s: tuple(cross_entropy_with_metrics(z, y, logit_scale=s, z_loss=0.1)[1]), in_dims
        )(*args)
        for k in range(2):
            pair = [a[k] if d == 0 else a for a, d in zip(args, in_dims, strict=True)]
            single = cross_entropy_with_metrics(pair[0], y, logit_scale=pair[1], z_loss=0.1)[1]
            for a, e in zip(batched, single, strict=True):
                torch.testing.assert_close(a[k], e, rtol=1e-12, atol=1e-13)


def along(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda a: torch.func.jvp(function, (a,), (torch.ones_like(a),))[1]


DERIVATIVES = [order for n in (2, 3) for order in itertools.product(("grad", "along"), repeat=n)] + [
    ("along", "grad", "along", "along"),
    ("grad", "along", "along", "grad"),
    ("along",) * 4,
]


@pytest.mark.parametrize("order", DERIVATIVES, ids="-".join)
def test_derivatives_of_any_order_and_mode(order: tuple[str, ...]) -> None:
    """Along a line through logits, probabilities and scale; forward mode in forward mode in forward mode
    once gave 0 for what it had not seen."""
    z, y, _, w = operands()
    v, p = torch.randn(4, 6, dtype=torch.float64), torch.rand(4, 6, dtype=torch.float64)

    def lines(f: Callable[..., Tensor]) -> list[Callable[[Tensor], Tensor]]:
        return [
            lambda a: loss_of(f, z, y, a, w),
            lambda a: loss_of(f, z + a * v, y, torch.tensor(0.7).double(), w * a),
            lambda a: loss_of(f, z + a * v, p * (1 + a), a, w, label_smoothing=0.1),
        ]

    steps = {"grad": torch.func.grad, "along": along}
    at = torch.tensor(0.6, dtype=torch.float64)
    for ours, exact in zip(lines(cross_entropy), lines(cross_entropy_reference), strict=True):
        for step in order:
            ours, exact = steps[step](ours), steps[step](exact)
        assert_near(ours(at), exact(at), scale=1e3)  # derivatives of the third order reach 1e2
    batch = torch.stack([at, 2 * at])
    line = lines(cross_entropy)[0]
    for step in order:
        line = steps[step](line)
    assert_near(torch.vmap(line)(batch), torch.stack([line(a) for a in batch]), scale=1e3)


def test_hessians_over_all_operands() -> None:
    z, y, s, w = (t[:2] if t.dim() else t for t in operands())
    names = (0, 1, 2)
    hessians = [
        torch.func.hessian(lambda z, s, w, f=f: loss_of(f, z, y, s, w), names)(z, s, w)
        for f in (cross_entropy, cross_entropy_reference)
    ]
    for i, j in itertools.product(names, names):
        assert_near(hessians[0][i][j], hessians[1][i][j], scale=10)


def test_third_derivative_in_eager_mode() -> None:
    z, y, s, w = operands()

    def derivatives(function: Callable[..., Tensor]) -> list[Tensor]:
        leaves = tuple(t.clone().requires_grad_() for t in (z, s, w))
        value = loss_of(function, leaves[0], y, *leaves[1:])
        found: list[Tensor] = []
        for _ in range(3):
            grads = torch.autograd.grad(value, leaves, create_graph=True)
            found += [g.detach() for g in grads]
            value = sum((g * g.detach().cos()).sum() for g in grads)  # type: ignore[assignment]
        return found

    for a, e in zip(derivatives(cross_entropy), derivatives(cross_entropy_reference), strict=True):
        assert_near(a, e, scale=100)


# --------------------------------------------------------------------------------------------------
# Rows of weight 0


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("shape", [(6, 7), (6, 60), (6, 3000), (2, 7, 3)])
@every_backend
def test_a_row_of_weight_0_adds_nothing(shape: tuple[int, ...], bad: float) -> None:
    """Not even NaN, to the loss and to every gradient."""
    rows = rows_of(shape)
    for probabilities, options in itertools.product(
        (False, True),
        (
            {},
            {"z_loss": 0.1, "empty": "zero"},
            {"softcap": 3.0, "logit_scale": 0.7},
            {"label_smoothing": 0.1},
        ),
    ):
        logits = torch.randn(shape)
        weight = torch.randn(rows)
        weight.view(-1)[1] = weight.view(-1)[4] = 0
        target = torch.rand(shape) if probabilities else torch.randint(0, shape[1], rows)
        dead = (weight == 0).unsqueeze(1)
        broken = logits.masked_fill(dead, bad)
        one = (1, 0) if len(shape) == 2 else (0, 0, 1)
        broken[one] = 1.0  # partly finite
        if probabilities:
            target[one] = NAN
        for reduction in REDUCTIONS:
            z, w, p = broken.clone().requires_grad_(), weight.clone().requires_grad_(), target.clone()
            loss = cross_entropy(z, p, row_weight=w, reduction=reduction, **options)
            exact = cross_entropy_reference(
                logits.double(),
                target.nan_to_num().double() if probabilities else target,
                row_weight=weight.double(),
                reduction=reduction,
                **options,
            )
            assert_near(loss, exact, scale=50)
            z_gradient, w_gradient = torch.autograd.grad(loss.sum(), (z, w))
            assert z_gradient.isfinite().all()
            assert not z_gradient.masked_select(dead).any()
            assert z_gradient.masked_select(~dead).any()
            assert w_gradient.isfinite().all()


def test_a_weight_of_0_has_the_gradient_of_its_finite_row() -> None:
    logits, target = torch.randn(3, 5).double(), torch.tensor([0, 1, 2])
    weight = torch.zeros(3).double().requires_grad_()
    cross_entropy(logits, target, row_weight=weight, reduction="sum").backward()
    assert weight.grad is not None
    assert_near(weight.grad, F.cross_entropy(logits, target, reduction="none"))


def test_a_loss_that_overflows_in_a_row_of_weight_0() -> None:
    """lse is finite, its square is not."""
    logits = torch.tensor([[1e30, 0.0], [1.0, 2.0]], requires_grad=True)
    loss = cross_entropy(
        logits, torch.tensor([0, 1]), z_loss=1.0, row_weight=torch.tensor([0, 1]), reduction="sum"
    )
    assert loss.isfinite()
    loss.backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_a_zero_instead_of_an_empty_mean_over_nan() -> None:
    for options in ({"normalizer": 0}, {"weight": torch.zeros(5)}, {"normalizer": torch.tensor(0.0)}):
        for bad in (NAN, INF, -INF):
            logits = torch.full((3, 5), bad, requires_grad=True)
            loss = cross_entropy(logits, torch.tensor([0, 1, 2]), empty="zero", z_loss=0.1, **options)
            assert loss.item() == 0
            loss.backward()
            assert logits.grad is not None
            assert not logits.grad.any()


# --------------------------------------------------------------------------------------------------
# inplace_backward: the same gradient in the logits' own memory, or an error, or a copy

VERSION_ERROR = "modified by an inplace operation|modified inplace"
REFUSAL = "inplace_backward=True writes"


@pytest.mark.parametrize("probabilities", [False, True])
@each_dtype
@every_backend
def test_inplace_backward_gives_the_same_bits(dtype: torch.dtype, probabilities: bool) -> None:
    layouts: list[Callable[[Tensor], Tensor]] = [
        lambda x: x * 1,
        lambda x: x.transpose(0, -1).contiguous().transpose(0, -1) * 1,
        lambda x: torch.stack([x, x], -1)[..., 1],
        lambda x: torch.cat([x, x], 1).narrow(1, 2, x.shape[1]),
    ]
    for shape, layout, options in itertools.product(
        [(5, 3), (40, 31), (3, 60), (2, 2500), (2, 5, 40), (2, 70, 3), (1, 70_000)],
        layouts,
        ({"empty": "zero"}, {"z_loss": 0.1, "label_smoothing": 0.1}, {"softcap": 4.0, "operands": True}),
    ):
        x = (3 * torch.randn(shape)).to(dtype)
        scale = torch.tensor(0.7, dtype=dtype)
        weights = torch.randn(rows_of(shape)).to(dtype)
        target = torch.rand(shape).to(dtype) if probabilities else torch.randint(0, shape[1], rows_of(shape))

        found = []
        for in_place in (False, True):
            given: dict[str, Any] = {**options, "target": target}
            logits = layout(x.clone().requires_grad_())
            leaves = [logits]
            if given.pop("operands", False):
                given |= {"logit_scale": scale.clone(), "row_weight": weights.clone()}
                leaves += [given["logit_scale"].requires_grad_(), given["row_weight"].requires_grad_()]
            if probabilities:
                given["target"] = target.clone().requires_grad_()
                leaves.append(given["target"])
            gradients = torch.autograd.grad(cross_entropy(logits, **given, inplace_backward=in_place), leaves)
            assert (gradients[0].data_ptr() == logits.data_ptr()) == in_place
            if in_place:
                assert gradients[0].stride() == logits.stride()
                assert torch.equal(logits, gradients[0])
            found.append(gradients)
        for a, b in zip(*found, strict=True):
            # The scale's is a sum, in an order that the layouts decide.
            if "operands" in options and a is found[0][1]:
                assert_near(a, b, scale=100, message=str((shape, options)))
            else:
                assert torch.equal(a, b), (shape, options)


def test_inplace_backward_through_a_model() -> None:
    x, y = torch.randn(6, 8), torch.randint(0, 70, (6,))
    layer = torch.nn.Linear(8, 70)
    found = []
    for in_place in (False, True):
        layer.zero_grad()
        loss, metrics = cross_entropy_with_metrics(layer(x), y, z_loss=0.1, inplace_backward=in_place)
        (loss + 0.1 * metrics.entropy.mean()).backward()
        found.append([p.grad.clone() for p in layer.parameters() if p.grad is not None])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def test_inplace_backward_without_a_gradient_writes_nothing() -> None:
    logits, y = torch.randn(4, 5), torch.randint(0, 5, (4,))
    before = logits.clone()
    expected = cross_entropy(logits, y)
    assert_near(cross_entropy(logits, y, inplace_backward=True), expected.double())
    scale = torch.tensor(1.0, requires_grad=True)
    cross_entropy(logits, y, logit_scale=scale, inplace_backward=True).backward()
    assert scale.grad is not None
    leaf = logits.clone().requires_grad_()
    with torch.no_grad():  # a leaf too
        assert_near(cross_entropy(leaf, y, inplace_backward=True), expected.double())
    with torch.inference_mode():
        assert_near(cross_entropy(leaf * 1, y, inplace_backward=True), expected.double())
    assert torch.equal(logits, before)
    assert torch.equal(leaf, before)
    # Nor does the forward pass.
    leaf, result = from_a_layer(logits)
    cross_entropy(result, y, inplace_backward=True)
    assert torch.equal(result, before)


def leaf_of(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, requires_grad=True)


REFUSED: dict[str, tuple[str, Callable[[], Tensor]]] = {
    "leaf": ("must not be a leaf", lambda: leaf_of((6, 6))),
    "parameter": ("must not be a leaf", lambda: torch.nn.Parameter(torch.randn(6, 6))),
    "view of a leaf": ("nor a view of one", lambda: leaf_of((36,)).view(6, 6)),
    "transposed leaf": ("nor a view of one", lambda: leaf_of((6, 6)).t()),
    "slice of a leaf": ("nor a view of one", lambda: leaf_of((9, 6))[2:8]),
    "view of a view of a leaf": ("nor a view of one", lambda: leaf_of((36,)).view(4, 9).view(6, 6)),
    "expanded": ("share their memory", lambda: (leaf_of((1, 6)) * 1).expand(6, 6)),
    "windows": ("share their memory", lambda: (leaf_of((11,)) * 1).unfold(0, 6, 1)),
    "overlapping": ("share their memory", lambda: (leaf_of((36,)) * 1).as_strided((6, 6), (5, 1))),
}


@pytest.mark.parametrize("name", REFUSED)
def test_inplace_backward_refuses(name: str) -> None:
    sentence, make = REFUSED[name]
    logits = make()
    before = logits.detach().clone()
    with pytest.raises(RuntimeError, match=f"{REFUSAL}.*{sentence}"):
        cross_entropy(logits, torch.zeros(6, dtype=torch.long), inplace_backward=True).backward()
    assert torch.equal(logits, before)


def test_inplace_backward_takes_views_of_results() -> None:
    """With gaps and in any order, as long as no element is there twice."""
    y = torch.zeros(6, dtype=torch.long)
    for view in (
        lambda x: x.t(),
        lambda x: x[:, ::2],
        lambda x: x.view(3, 2, 12).transpose(0, 1)[:, :, :6],
        lambda x: x[:0],
    ):
        logits = view(torch.randn(6, 12, requires_grad=True) * 1)
        target = torch.zeros(rows_of(logits.shape), dtype=torch.long)
        (gradient,) = torch.autograd.grad(cross_entropy(logits, target, inplace_backward=True), logits)
        assert gradient.data_ptr() == logits.data_ptr()
    assert y.shape == (6,)


def test_inplace_backward_refuses_arguments_in_the_logits_memory() -> None:
    """Written over while they are read, they would give numbers that are nearly right."""
    for make in (
        lambda z: {"target": z.detach().t()},
        lambda z: {"target": z},
        lambda z: {"weight": z.detach()[3]},
        lambda z: {"logit_scale": z[0, 0]},
        lambda z: {"logit_scale": z.detach()[5, 5]},
    ):
        _, logits = from_a_layer(torch.rand(60, 60))
        call = {"target": torch.zeros(60, dtype=torch.long), **make(logits)}
        with pytest.raises(RuntimeError, match=f"{REFUSAL}.*target, weight or logit_scale shares"):
            cross_entropy(logits, **call, inplace_backward=True)


def test_inplace_backward_and_derivatives_of_derivatives() -> None:
    y = torch.zeros(4, dtype=torch.long)
    _, logits = from_a_layer(torch.randn(4, 5))
    with pytest.raises(RuntimeError, match=f"{REFUSAL}.*create_graph=True"):
        torch.autograd.grad(cross_entropy(logits, y, inplace_backward=True), logits, create_graph=True)

    def loss(z: Tensor) -> Tensor:
        return cross_entropy(z * 1, y, inplace_backward=True)

    z = torch.randn(4, 5)
    for transformed in (
        lambda: torch.func.grad(loss)(z),
        lambda: torch.vmap(loss)(z[None]),
        lambda: torch.func.jvp(loss, (z,), (z,)),
        lambda: torch.func.hessian(loss)(z),
    ):
        with pytest.raises(RuntimeError, match=f"{REFUSAL}.*torch.func"):
            transformed()


def consumer_cases() -> dict[str, Callable[[Tensor, Callable[..., Tensor]], Tensor]]:
    """Other uses of the logits z beside the loss: right or an error, and never wrong."""
    return {
        "alone": lambda z, loss: loss(z),
        "saved by its producer": lambda z, loss: loss(z.exp()),
        "softmax producer": lambda z, loss: loss(z.softmax(1)),
        "two losses": lambda z, loss: loss(z) + 2 * loss(z),
        "plain loss before": lambda z, loss: cross_entropy(z, torch.ones(len(z)).long()) + loss(z),
        "plain loss after": lambda z, loss: loss(z) + cross_entropy(z, torch.ones(len(z)).long()),
        "torch's loss before": lambda z, loss: F.cross_entropy(z, torch.ones(len(z)).long()) + loss(z),
        "square before": lambda z, loss: z.square().sum() + loss(z),
        "square after": lambda z, loss: loss(z) + z.square().sum(),
        "unsaved": lambda z, loss: (3 * z).sum() + loss(z) + z.sum(),
        "two halves": lambda z, loss: loss(z[:3]) + loss(z[3:]),
        "chunks": lambda z, loss: sum(map(loss, z.chunk(2))),  # type: ignore[arg-type,return-value]
        "view before": lambda z, loss: z[:2].square().sum() + loss(z[:, :50]),
        "view after": lambda z, loss: loss(z[:, :50]) + z[:2].square().sum(),
        "overlapping views": lambda z, loss: loss(z[:4]) + loss(z[2:]),
        "metrics later": lambda z, loss: loss(z) + log_prob(z, torch.ones(len(z)).long()).sum(),  # type: ignore[union-attr]
        "row weight from them": lambda z, loss: loss(z, row_weight=z[:, 0]),
        "scale from them": lambda z, loss: loss(z, logit_scale=z.mean(), normalizer=z.square().mean()),
        "target from them": lambda z, loss: loss(z, target=z.detach().softmax(1)),
        "negated view": lambda z, loss: loss(torch._neg_view(z)),
        "in-place change before": lambda z, loss: loss(z.add_(1)),
    }


def consume(use: Callable[[Tensor, Callable[..., Tensor]], Tensor], in_place: bool, wrap: Any = None) -> Any:
    """The value and the gradients to an input and a parameter, of `use` of a layer's output."""
    torch.manual_seed(1)
    x, w = torch.randn(6, 8, requires_grad=True), torch.randn(70, 8, requires_grad=True)

    def loss(z: Tensor, target: Tensor | None = None, **options: Any) -> Tensor:
        y = torch.arange(len(z)) if target is None else target
        return cross_entropy(z, y, softcap=3.0, inplace_backward=in_place, **options)

    def model(x: Tensor, w: Tensor) -> Tensor:
        return use(x @ w.t(), loss)

    result = (model if wrap is None else wrap(model))(x, w)
    value = result.detach().clone()
    result.backward()
    return value, x.grad, w.grad


def right_or_an_error(
    use: Callable[[Tensor, Callable[..., Tensor]], Tensor], wrap: Any = None
) -> RuntimeError | None:
    expected = consume(use, False)
    try:
        actual = consume(use, True, wrap)
    except RuntimeError as error:
        assert re.search(VERSION_ERROR, str(error)), error
        return error
    for a, e in zip(actual, expected, strict=True):
        assert_near(a, e.double(), scale=50)
    return None


@pytest.mark.parametrize("name", consumer_cases())
def test_other_uses_of_logits_that_are_written_over(name: str) -> None:
    error = right_or_an_error(consumer_cases()[name])
    fine = {"alone", "plain loss after", "square after", "unsaved", "view after", "metrics later"}
    fine |= {"target from them", "negated view", "in-place change before", "row weight from them"}
    fine |= {"torch's loss before"}  # which saves its own log_softmax
    assert (error is None) == (name in fine)


def saved_as_they_are(model: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def hooked(*args: Tensor) -> Tensor:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
            return model(*args)

    return hooked


def saved_on_cpu(model: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def hooked(*args: Tensor) -> Tensor:
        with torch.autograd.graph.save_on_cpu():
            return model(*args)

    return hooked


def checkpointed(use_reentrant: bool) -> Callable[..., Any]:
    def wrap(model: Callable[..., Tensor]) -> Callable[..., Tensor]:
        device = torch.get_default_device()

        def there(*args: Tensor) -> Tensor:
            with device:  # a GPU's backward has a thread of its own, with torch's default device
                return model(*args)

        return lambda *args: checkpoint(there, *args, use_reentrant=use_reentrant)

    return wrap


@pytest.mark.parametrize(
    "wrap",
    [checkpointed(False), checkpointed(True), saved_as_they_are, saved_on_cpu],
    ids=["checkpoint", "checkpoint-reentrant", "hooks", "save_on_cpu"],
)
@pytest.mark.parametrize("name", consumer_cases())
def test_hooks_on_saved_tensors_ask_no_version(name: str, wrap: Any) -> None:
    """Autograd compares no versions of what hooks have packed: two losses of the same logits would both
    read, without an error, what the first has written over them."""
    right_or_an_error(consumer_cases()[name], wrap)


def test_second_backward_of_logits_written_over() -> None:
    _, logits = from_a_layer(torch.randn(4, 5))
    loss = cross_entropy(logits, torch.zeros(4, dtype=torch.long), inplace_backward=True)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=VERSION_ERROR):
        loss.backward()


def test_hooks_on_logits_written_over() -> None:
    y = torch.randint(0, 5, (4,))
    found = []
    x = torch.randn(4, 5)
    for in_place in (False, True):
        leaf, logits = from_a_layer(x)
        logits.retain_grad()
        logits.register_hook(lambda g: g * 2)
        logits.register_hook(lambda g: g.add_(1))
        (cross_entropy(logits, y, inplace_backward=in_place) + logits.sum()).backward()
        found.append((leaf.grad, logits.grad))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def test_inplace_backward_of_nothing() -> None:
    leaf, logits = from_a_layer(torch.zeros(0, 5))
    cross_entropy(logits, torch.zeros(0, dtype=torch.long), inplace_backward=True).backward()
    assert leaf.grad is not None
    assert leaf.grad.shape == (0, 5)
    leaf, logits = from_a_layer(torch.full((3, 5), NAN))
    cross_entropy(logits, torch.full((3,), -100), inplace_backward=True, empty="zero").backward()
    assert leaf.grad is not None
    assert not leaf.grad.any()


COMPILED_USES = {
    "alone": lambda z, loss: (loss(z),),
    "returned": lambda z, loss: (loss(z), z),
    "saved by its producer": lambda z, loss: ((loss(z.sigmoid())),),
    "two losses": lambda z, loss: (loss(z) + 2 * loss(z),),
    "a plain loss before": lambda z, loss: (cross_entropy(z, z.new_ones(6).long()) + loss(z),),
}


@not_emulated
@pytest.mark.parametrize("name", COMPILED_USES)
def test_inplace_backward_compiled(name: str) -> None:
    """In one graph autograd asks no versions: the gradient gets memory of its own."""

    def outcome(in_place: bool, compiled: bool) -> tuple[Tensor, ...]:
        torch.manual_seed(1)
        x, w = torch.randn(6, 8, requires_grad=True), torch.randn(70, 8, requires_grad=True)

        def loss(z: Tensor) -> Tensor:
            target = torch.arange(6, device=z.device)
            return cross_entropy(z, target, softcap=3.0, inplace_backward=in_place)

        def model(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
            return COMPILED_USES[name](x @ w.t(), loss)

        torch._dynamo.reset()
        run = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
        outputs = run(x, w)
        values = tuple(t.detach().clone() for t in outputs)
        return (*values, *torch.autograd.grad(sum(t.sum() for t in outputs), (x, w)))

    for a, e in zip(outcome(True, True), outcome(False, False), strict=True):
        assert_near(a, e.double(), scale=50)


# What Dynamo looks at on its way.
no_leaf_warning = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


@not_emulated
@no_leaf_warning
@pytest.mark.parametrize("name", ["alone", "two losses"])
def test_inplace_backward_under_compiled_autograd(name: str) -> None:
    def gradients(in_place: bool, compiled: bool) -> list[Tensor]:
        torch.manual_seed(1)
        torch._dynamo.reset()
        leaf, logits = from_a_layer(torch.randn(6, 70))

        def loss(z: Tensor) -> Tensor:
            return cross_entropy(z, torch.arange(6), softcap=3.0, inplace_backward=in_place)

        total = consumer_cases()[name](logits, loss)
        if compiled:
            with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager")):
                total.backward()
        else:
            total.backward()
        assert leaf.grad is not None
        return [leaf.grad]

    for a, e in zip(gradients(True, True), gradients(False, False), strict=True):
        assert_near(a, e.double(), scale=5)


@not_emulated
@no_leaf_warning
def test_inplace_backward_of_logits_from_outside_the_compiled_function() -> None:
    """Of whose other uses the graph knows nothing."""
    torch._dynamo.reset()
    y = torch.arange(6)
    loss = torch.compile(
        lambda z: cross_entropy(z, y, softcap=3.0, inplace_backward=True), fullgraph=True, backend="aot_eager"
    )
    x = torch.randn(6, 70)
    for use in (
        lambda z: loss(z),
        lambda z: cross_entropy(z, y) + loss(z),
        lambda z: loss(z.exp()),
        lambda z: loss(z.view(70, 6).t().reshape(6, 70)),
    ):
        leaf = x.clone().requires_grad_()
        torch._dynamo.reset()
        (gradient,) = torch.autograd.grad(use(leaf), leaf)
        assert torch.equal(leaf, x)
        assert gradient.data_ptr() != leaf.data_ptr()
    exact = x.double().requires_grad_()
    reference = cross_entropy_reference(exact.view(70, 6).t().reshape(6, 70), y, softcap=3.0)
    assert_near(gradient, torch.autograd.grad(reference, exact)[0])


# --------------------------------------------------------------------------------------------------
# Errors


ROWS = torch.ones(3)
BAD_OPTIONS: list[tuple[type[Exception], str, dict[str, Any]]] = [
    (TypeError, "expected logit_scale to be a float or a Tensor, got '1'", {"logit_scale": "1"}),
    (TypeError, "expected logit_scale to be a float or a Tensor, got None", {"logit_scale": None}),
    (TypeError, "expected logit_scale to be a float or a Tensor, got 1j", {"logit_scale": 1j}),
    (ValueError, "0-d floating point tensor, got shape .1,. of", {"logit_scale": torch.ones(1)}),
    (ValueError, "0-d floating point tensor, got shape .. of torch.int64", {"logit_scale": torch.tensor(2)}),
    (ValueError, "of torch.complex64", {"logit_scale": torch.tensor(1j)}),
    (TypeError, "expected softcap to be a float or None, got '5'", {"softcap": "5"}),
    (TypeError, "expected softcap to be a float or None, got tensor", {"softcap": torch.tensor(5.0)}),
    *(
        (ValueError, f"expected softcap to be positive and finite, got {cap}", {"softcap": cap})
        for cap in (0, 0.0, -1.0, INF, NAN)
    ),
    (TypeError, "expected z_loss to be a float, got '1'", {"z_loss": "1"}),
    (TypeError, "expected z_loss to be a float, got None", {"z_loss": None}),
    (ValueError, "expected empty to be 'nan' or 'zero', got 'NaN'", {"empty": "NaN"}),
    (ValueError, "expected empty to be 'nan' or 'zero', got None", {"empty": None}),
    (
        TypeError,
        "expected row_weight to be a Tensor of real numbers, got list",
        {"row_weight": [1.0, 1.0, 1.0]},
    ),
    (
        TypeError,
        "expected row_weight to be a Tensor of real numbers, got torch.complex64",
        {"row_weight": ROWS + 0j},
    ),
    (ValueError, "row_weight of shape .3,., one for each row, got .4,", {"row_weight": torch.ones(4)}),
    (ValueError, "row_weight of shape .3,., one for each row, got .3, 1", {"row_weight": ROWS[:, None]}),
    (ValueError, "row_weight of shape .3,., one for each row, got .", {"row_weight": torch.tensor(1.0)}),
    (
        TypeError,
        "expected normalizer to be a float or a Tensor of real numbers, got str",
        {"normalizer": "3"},
    ),
    (
        TypeError,
        "expected normalizer to be a float or a Tensor of real numbers, got complex",
        {"normalizer": 3j},
    ),
    (TypeError, "Tensor of real numbers, got torch.complex64", {"normalizer": torch.tensor(3j)}),
    (ValueError, "normalizer to be a float or a 0-d tensor, got shape .1,.", {"normalizer": ROWS[:1]}),
    (TypeError, "expected out_dtype to be float16, .*, got torch.int64", {"out_dtype": torch.int64}),
    (TypeError, "expected out_dtype to be float16, .*, got 'float32'", {"out_dtype": "float32"}),
    (RuntimeError, "expected row_weight on .*, got meta", {"row_weight": ROWS.to("meta")}),
    (RuntimeError, "expected logit_scale on .*, got meta", {"logit_scale": torch.ones((), device="meta")}),
    (RuntimeError, "expected normalizer on .*, got meta", {"normalizer": torch.ones((), device="meta")}),
    (ValueError, "is not a valid value for reduction", {"reduction": "average"}),
    (RuntimeError, "label_smoothing must be between 0.0 and 1.0", {"softcap": 3.0, "label_smoothing": 1.5}),
    (TypeError, "expected label_smoothing to be a float", {"softcap": 3.0, "label_smoothing": "0"}),
    (TypeError, "expected ignore_index to be an int", {"softcap": 3.0, "ignore_index": "0"}),
    (ValueError, "expected ignore_index to fit 64 bits", {"softcap": 3.0, "ignore_index": 2**63}),
    (RuntimeError, "weight tensor should be defined", {"softcap": 3.0, "weight": torch.ones(4)}),
    (
        RuntimeError,
        "not differentiable with respect to argument 'weight'",
        {"softcap": 3.0, "weight": torch.ones(5, requires_grad=True)},
    ),
]


@cpu_only
@pytest.mark.parametrize(
    ("error", "sentence", "options"), BAD_OPTIONS, ids=[f"{s[:40]}-{o}"[:60] for _, s, o in BAD_OPTIONS]
)
def test_bad_options(error: type[Exception], sentence: str, options: dict[str, Any]) -> None:
    logits, target = torch.randn(3, 5), torch.tensor([0, 1, 2])
    for function in (cross_entropy, cross_entropy_with_metrics):
        with pytest.raises(error, match=sentence):
            function(logits, target, **options)


@cpu_only
def test_bad_inputs_beside_options(device: str) -> None:
    z, y = torch.randn(3, 5), torch.tensor([0, 1, 2])
    cases: list[tuple[type[Exception], str, Any, Any]] = [
        (ValueError, "expected target of shape", z, y[:2]),
        (RuntimeError, "Long, Int or Byte", z, y.float()),
        (RuntimeError, "Expected floating point type for target with class probabilities", z, z.long()),
        (RuntimeError, "got a 0-d tensor", z[0, 0], y),
        (NotImplementedError, "not implemented for input of dtype torch.int64", z.long(), y),
        (NotImplementedError, "not implemented for input of dtype torch.complex64", z + 0j, y),
        (NotImplementedError, "dense tensor", z.to_sparse(), y),
        (TypeError, "expected input to be a Tensor, got list", [[1.0]], y),
        (TypeError, "expected target to be a Tensor, got NoneType", z, None),
        (RuntimeError, "expected target on cpu, got meta", z, y.to("meta")),
    ]
    for error, sentence, input, target in cases:
        for function in (cross_entropy, cross_entropy_with_metrics):
            with pytest.raises(error, match=sentence):
                function(input, target, softcap=3.0)
    for function in (cross_entropy, cross_entropy_with_metrics):
        with raises_index_error(device, "Target 5 is out of bounds: row 1"):
            function(z, torch.tensor([0, 5, 1]), softcap=3.0)
        with pytest.raises(RuntimeError, match="ignore_index"):
            function(z, torch.rand(3, 5), softcap=3.0, ignore_index=1)


def test_a_bad_index_of_an_ill_row_too(device: str) -> None:
    for shape in ((4, 5), (4, 60), (3, 70_000), (2, 5, 2)):
        logits = torch.randn(shape)
        target = torch.zeros(rows_of(shape), dtype=torch.long)
        target.view(-1)[-1] = shape[1]
        weight = torch.zeros(rows_of(shape))
        with raises_index_error(device, "is out of bounds"):
            cross_entropy(logits, target, row_weight=weight)


# --------------------------------------------------------------------------------------------------
# Other inputs that are legal


def test_views_that_negate_and_share() -> None:
    logits, target = torch.randn(6, 70), torch.randint(0, 70, (6,))
    scale, weight = torch.tensor(-0.7), torch.randn(6)
    expected = cross_entropy(-logits, target, logit_scale=0.7, row_weight=-weight)
    negated = torch._neg_view
    result = cross_entropy(negated(logits), target, logit_scale=negated(scale), row_weight=negated(weight))
    assert_near(result, expected.double(), scale=5)
    # Rows and weights that are one and the same memory, and huge strides.
    shared = cross_entropy(logits[:1].expand(6, 70), target, row_weight=weight[:1].expand(6), softcap=3.0)
    copied = cross_entropy(logits[:1].repeat(6, 1), target, row_weight=weight[:1].repeat(6), softcap=3.0)
    assert torch.equal(shared, copied)
    memory = torch.randn(3_000_000)
    wide = memory.as_strided((3, 5), (1_000_000, 100_003))
    y = torch.tensor([0, 4, 2])
    assert torch.equal(cross_entropy(wide, y, z_loss=0.1), cross_entropy(wide.contiguous(), y, z_loss=0.1))
    windows = memory[:100].unfold(0, 70, 6)  # rows that overlap
    assert torch.equal(
        cross_entropy(windows, target, softcap=3.0), cross_entropy(windows.contiguous(), target, softcap=3.0)
    )


class Tagged(Tensor):
    """A subclass that says nothing."""


@cpu_only
def test_subclasses_of_tensors() -> None:
    z, y, s, w = torch.randn(4, 5), torch.randint(0, 5, (4,)), torch.tensor(0.5), torch.randn(4)
    expected = cross_entropy(z, y, logit_scale=s, row_weight=w)
    for k in range(4):
        given = [t.as_subclass(Tagged) if k == i else t for i, t in enumerate((z, y, s, w))]
        result = cross_entropy(given[0], given[1], logit_scale=given[2], row_weight=given[3])
        assert torch.equal(torch.Tensor(result), expected)
    assert isinstance(cross_entropy(z.as_subclass(Tagged), y, softcap=2.0), Tagged)

    class Asked(Tensor):
        names: list[str] = []  # noqa: RUF012

        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is cross_entropy:
                cls.names = sorted(kwargs)
                return "asked"
            return super().__torch_function__(func, types, args, kwargs or {})

    assert cross_entropy(z.as_subclass(Asked), y, softcap=2.0) == "asked"
    options = {"logit_scale", "softcap", "z_loss", "row_weight", "normalizer", "empty", "out_dtype"}
    assert options | {"inplace_backward"} <= set(Asked.names)


@cpu_only
def test_fake_tensors_have_the_real_ones_shapes() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    def results(dtype: torch.dtype) -> list[tuple[Any, ...]]:
        z = torch.zeros(4, 5, 3, dtype=dtype, requires_grad=True)
        s = torch.ones((), dtype=dtype, requires_grad=True)
        y = torch.zeros(4, 3, dtype=torch.long)
        loss, metrics = cross_entropy_with_metrics(
            z, y, logit_scale=s, softcap=3.0, row_weight=torch.ones(4, 3), normalizer=s.detach(), empty="zero"
        )
        grads = torch.autograd.grad(loss + metrics.entropy.sum(), (z, s))
        return [(t.shape, t.dtype, t.stride()) for t in (loss, *metrics, *grads)]

    for dtype in DTYPES:
        real = results(dtype)
        with FakeTensorMode():
            assert results(dtype) == real


class Exported(torch.nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.loss = CrossEntropyLoss(**options)

    def forward(self, z: Tensor, y: Tensor, w: Tensor, n: Tensor) -> Tensor:
        return self.loss(z, y, row_weight=w, normalizer=n) + self.loss(z, y, normalizer=y.numel())


@cpu_only
@pytest.mark.parametrize("empty", ["nan", "zero"])
def test_export_with_options_and_a_dynamic_batch(empty: str) -> None:
    module = Exported(
        logit_scale=torch.nn.Parameter(torch.tensor(2.0)),
        softcap=3.0,
        z_loss=0.1,
        empty=empty,
        out_dtype=torch.float64,
        inplace_backward=True,
    )

    def arguments(n: int) -> tuple[Tensor, ...]:
        return torch.randn(n, 70), torch.randint(0, 70, (n,)), torch.rand(n), torch.tensor(3.0)

    batch = {0: torch.export.Dim("n")}
    program = torch.export.export(module, arguments(6), dynamic_shapes=(batch, batch, batch, None))
    for n in (2, 9):
        args = arguments(n)
        assert torch.equal(program.module()(*args), module(*args))


# --------------------------------------------------------------------------------------------------
# Module


OPTIONS: dict[str, Any] = {
    "logit_scale": 0.5,
    "softcap": 30.0,
    "z_loss": 1e-4,
    "empty": "zero",
    "out_dtype": torch.float32,
    "inplace_backward": True,
}


def test_module_with_options_is_the_function() -> None:
    logits, target = torch.randn(4, 5).bfloat16(), torch.tensor([0, -100, 2, 3])
    weight, mask = torch.rand(5).bfloat16(), torch.tensor([True, True, False, True])
    module = CrossEntropyLoss(weight, reduction="mean", label_smoothing=0.1, **OPTIONS)
    for batch in ({}, {"row_weight": mask}, {"row_weight": mask, "normalizer": mask.sum()}):
        expected = cross_entropy(logits, target, weight, label_smoothing=0.1, **OPTIONS, **batch)
        result = module(logits, target, **batch)
        assert result.dtype == torch.float32
        assert torch.equal(result, expected)
    assert module(logits, torch.full((4,), -100)).item() == 0
    for name, value in OPTIONS.items():
        assert getattr(module, name) == value
    for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(copied(logits, target), module(logits, target))
        assert repr(copied) == repr(module)


def test_module_says_what_it_was_given() -> None:
    assert repr(CrossEntropyLoss()) == "CrossEntropyLoss()"
    for name, value in OPTIONS.items():
        assert repr(CrossEntropyLoss(**{name: value})) == f"CrossEntropyLoss({name}={value})"
    assert "logit_scale" in repr(CrossEntropyLoss(logit_scale=torch.tensor(1.0)))


def test_module_learns_its_scale() -> None:
    module = CrossEntropyLoss(logit_scale=torch.nn.Parameter(torch.tensor(2.0)))
    assert [name for name, _ in module.named_parameters()] == ["logit_scale"]
    assert list(module.state_dict()) == ["logit_scale"]
    logits, target = torch.randn(4, 5), torch.randint(0, 5, (4,))
    module(logits, target).backward()
    exact = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    F.cross_entropy(logits.double() * exact, target).backward()
    scale = module.logit_scale
    assert isinstance(scale, Tensor)
    assert scale.grad is not None
    assert exact.grad is not None
    assert_near(scale.grad, exact.grad, scale=5)
    copied = copy.deepcopy(module)
    assert copied.logit_scale is not module.logit_scale
    assert torch.equal(copied(logits, target), module(logits, target))
    other = CrossEntropyLoss(logit_scale=torch.nn.Parameter(torch.tensor(7.0)))
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(logits, target), module(logits, target))
    assert module.double().logit_scale.dtype == torch.float64  # type: ignore[union-attr]


def test_module_state_is_torchs() -> None:
    for arguments in ({}, {"weight": torch.rand(5)}):
        ours, theirs = CrossEntropyLoss(**arguments, softcap=3.0), torch.nn.CrossEntropyLoss(**arguments)
        assert list(ours.state_dict()) == list(theirs.state_dict())
        ours.load_state_dict(theirs.state_dict())
        theirs.load_state_dict(ours.state_dict())
        assert isinstance(ours, torch.nn.CrossEntropyLoss)


@not_emulated
@pytest.mark.parametrize("probabilities", [False, True])
def test_compiled_with_every_option(probabilities: bool) -> None:
    """Metrics too, in one graph; scale and normalizer are tensors."""
    torch._dynamo.reset()

    def model(z: Tensor, y: Tensor, s: Tensor, w: Tensor, n: Tensor) -> tuple[Tensor, ...]:
        loss, metrics = cross_entropy_with_metrics(
            z,
            y,
            label_smoothing=0.1,
            logit_scale=s,
            softcap=3.0,
            z_loss=0.1,
            row_weight=w,
            normalizer=n,
            empty="zero",
        )
        return (loss, *metrics)

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for value in (0.5, 2.0, 0.0):
        z, w = torch.randn(6, 70), torch.randn(6)
        y = torch.rand(6, 70) if probabilities else torch.tensor([3, 1, -100, 7, 8, 69])
        s, n = torch.tensor(1 + value), torch.tensor(value)
        found = []
        for function in (compiled, model):
            leaves = tuple(t.clone().requires_grad_() for t in (z, s, w, n))
            results = function(leaves[0], y, *leaves[1:])
            total = results[0] + results[3].sum() + results[2].sum()
            found.append((*results, *torch.autograd.grad(total, leaves)))
        for a, b in zip(*found, strict=True):
            assert_near(a, b.double(), torch.float32, scale=100)
