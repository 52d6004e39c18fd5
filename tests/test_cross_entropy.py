"""What is cross-entropy's own: targets, weights, ignored rows, smoothing, edges and errors."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from contract import REDUCTIONS, value_and_gradients
from devices import CPU, every_backend, here, on_the_cpu, raises_index_error
from tolerances import DTYPES, assert_near
from torch import Tensor

from lossops import CrossEntropyLoss, cross_entropy
from lossops.cross_entropy import cross_entropy_reference

pytestmark = pytest.mark.usefixtures("device")

each_reduction = pytest.mark.parametrize("reduction", REDUCTIONS)
INF, NAN = float("inf"), float("nan")


def gradient(function: Callable[..., Tensor], logits: Tensor, *arguments: Any, **options: Any) -> Tensor:
    leaf = logits.detach().clone().requires_grad_()
    return value_and_gradients(lambda z: function(z, *arguments, **options), (leaf,))[1]


def assert_like_reference(logits: Tensor, target: Tensor, scale: float = 5.0, **options: Any) -> None:
    """Value and every gradient against the float64 reference."""
    floating = target.is_floating_point()
    tensors = (logits, target) if floating else (logits,)
    fixed = () if floating else (target,)
    exact_options = {k: v.double() if isinstance(v, Tensor) else v for k, v in options.items()}
    exact = tuple(t.detach().double().requires_grad_() for t in tensors)
    upstream = torch.randn(cross_entropy_reference(*exact, *fixed, **exact_options).shape).to(logits.dtype)
    ours = value_and_gradients(
        lambda *t: cross_entropy(*t, *fixed, **options),
        tuple(t.detach().requires_grad_() for t in tensors),
        upstream,
    )
    expected = value_and_gradients(
        lambda *t: cross_entropy_reference(*t, *fixed, **exact_options), exact, upstream.double()
    )
    for a, e in zip(ours, expected, strict=True):
        dtype = torch.float32 if torch.float64 in (a.dtype,) and logits.dtype != torch.float64 else a.dtype
        assert_near(a, e, dtype, scale=scale, message=str(tuple(logits.shape)))


# --------------------------------------------------------------------------------------------------
# All options together

SHAPES = [(11,), (5, 11), (3, 70), (2, 11, 7), (2, 5, 3, 4), (2, 3, 2, 1, 2)]


def rows_of(shape: tuple[int, ...]) -> tuple[int, ...]:
    return () if len(shape) == 1 else (shape[0], *shape[2:])


def classes_of(shape: tuple[int, ...]) -> int:
    return shape[0] if len(shape) == 1 else shape[1]


@each_reduction
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_backend
def test_index_targets(dtype: torch.dtype, reduction: str) -> None:
    index_dtypes = itertools.cycle((torch.int64, torch.int32, torch.uint8, torch.int64, torch.int32))
    for shape, weighted, ignore_index, smoothing in itertools.product(
        SHAPES, (False, True), (None, 1, 250), (0.0, 0.1, 1.0)
    ):
        classes = classes_of(shape)
        target = torch.randint(0, classes, rows_of(shape)).to(next(index_dtypes))
        options: dict[str, Any] = {"label_smoothing": smoothing, "reduction": reduction}
        if weighted:
            options["weight"] = (torch.rand(classes) + 0.5).to(dtype)
        if ignore_index is not None:
            options["ignore_index"] = ignore_index
            if target.dim() and ignore_index >= classes:
                target.view(-1)[::3] = ignore_index
        if target.numel():
            target.view(-1)[-1] = 0  # at least one row counts: a mean over nothing has a test of its own
        assert_like_reference(torch.randn(shape).to(dtype), target, **options)


@each_reduction
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_backend
def test_probability_targets(dtype: torch.dtype, reduction: str) -> None:
    for shape, weighted, smoothing, total in itertools.product(
        SHAPES, (False, True), (0.0, 0.1, 1.0), (1.0, 2.5)
    ):
        classes = classes_of(shape)
        # Probabilities that do not sum to 1 are weights all the same.
        target = (total * torch.randn(shape).softmax(0 if len(shape) == 1 else 1)).to(dtype)
        options: dict[str, Any] = {"label_smoothing": smoothing, "reduction": reduction}
        if weighted:
            options["weight"] = (torch.rand(classes) + 0.5).to(dtype)
        assert_like_reference(torch.randn(shape).to(dtype), target, **options)


@each_reduction
def test_every_option_against_torch(reduction: str) -> None:
    """float64, so that torch's own rounding is out of the way."""
    for shape, weighted, smoothing, probabilities in itertools.product(
        SHAPES, (False, True), (0.0, 0.3), (False, True)
    ):
        classes = classes_of(shape)
        logits = torch.randn(shape, dtype=torch.float64)
        options: dict[str, Any] = {"label_smoothing": smoothing, "reduction": reduction}
        if weighted:
            options["weight"] = torch.rand(classes, dtype=torch.float64)
        if probabilities:
            target = torch.rand(shape, dtype=torch.float64)
        else:
            target = torch.randint(0, classes, rows_of(shape))
            options["ignore_index"] = 2
        ours, torchs = (
            value_and_gradients(lambda z, f=f, y=y, o=o: f(z, y, **o), (x.clone().requires_grad_(),))
            for f, (x, y, o) in (
                (cross_entropy, (logits, target, options)),
                (F.cross_entropy, on_the_cpu((logits, target, options))),
            )
        )
        for a, e in zip(on_the_cpu(ours), torchs, strict=True):
            assert (a.shape, a.dtype) == (e.shape, e.dtype)
            assert_near(a, e, scale=10)


@pytest.mark.parametrize("ignore_index", [-1, -100, 0, 3, 10, 255, 2**31, 2**62, -(2**63), 2**63 - 1])
def test_ignore_index_of_any_value(ignore_index: int) -> None:
    logits = torch.randn(6, 5, dtype=torch.float64)
    target = torch.tensor([0, 1, 2, 3, 4, 0])
    target[1] = target[4] = ignore_index
    for smoothing in (0.0, 0.1):
        options = {"ignore_index": ignore_index, "label_smoothing": smoothing}
        for reduction in REDUCTIONS:
            assert_near(
                cross_entropy(logits, target, reduction=reduction, **options),
                F.cross_entropy(logits, target, reduction=reduction, **options),
            )
        ours = gradient(cross_entropy, logits, target, **options)
        assert_near(ours, gradient(F.cross_entropy, logits, target, **options))
        assert not ours[target == ignore_index].any()


@pytest.mark.parametrize("index_dtype", [torch.uint8, torch.int32])
def test_narrow_targets_do_not_meet_a_wide_ignore_index_by_wrapping(index_dtype: torch.dtype) -> None:
    """uint8 target 156 is not -100, int32 target 0 is not 2^32."""
    logits = torch.randn(2, 200)
    target = torch.tensor([156, 0], dtype=index_dtype)
    for ignore_index in (-100, 156 - 256, 2**32, 2**32 + 156):
        loss = cross_entropy(logits, target, ignore_index=ignore_index, reduction="none")
        assert_near(
            loss, cross_entropy_reference(logits.double(), target.long(), reduction="none"), torch.float32
        )
        assert (loss != 0).all()
        reference = cross_entropy_reference(logits, target, ignore_index=ignore_index, reduction="none")
        assert_near(reference, loss)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@each_reduction
def test_float32_weight_with_16_bit_logits(dtype: torch.dtype, reduction: str) -> None:
    logits, weight = torch.randn(6, 9).to(dtype), torch.rand(9) / 3
    target = torch.randint(0, 9, (6,))
    assert cross_entropy(logits, target, weight, reduction=reduction).dtype == dtype
    assert_like_reference(logits, target, weight=weight, reduction=reduction)
    assert_like_reference(logits, target, weight=weight, reduction=reduction, label_smoothing=0.1)


FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("target_dtype", FLOATING, ids=str)
@pytest.mark.parametrize("weight_dtype", [None, *FLOATING], ids=str)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_mixed_dtypes_of_probability_targets(
    dtype: torch.dtype, target_dtype: torch.dtype, weight_dtype: torch.dtype | None, smoothing: float
) -> None:
    """The result has torch's dtype, a weight's included, and each gradient its tensor's."""
    logits, target = torch.randn(6, 9).to(dtype), torch.randn(6, 9).softmax(1).to(target_dtype)
    weight = None if weight_dtype is None else (torch.rand(9) + 0.5).to(weight_dtype)
    for reduction in REDUCTIONS:
        options = {"weight": weight, "label_smoothing": smoothing, "reduction": reduction}
        leaves = logits.clone().requires_grad_(), target.clone().requires_grad_()
        ours = cross_entropy(*leaves, **options)
        assert ours.dtype == F.cross_entropy(logits, target, **options).dtype
        exact = cross_entropy_reference(
            logits.double(),
            target.double(),
            weight if weight is None else weight.double(),
            -100,
            reduction,
            smoothing,
        )
        precise = torch.float64 in (dtype, target_dtype, weight_dtype)
        assert_near(
            ours, exact, ours.dtype if ours.dtype != torch.float64 or precise else torch.float32, scale=5
        )
        gradients = torch.autograd.grad(ours.sum(), leaves)
        assert [g.dtype for g in gradients] == [dtype, target_dtype]


# --------------------------------------------------------------------------------------------------
# Gradients to the target and the weight


@each_reduction
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 3, 2)], ids=str)
def test_gradients_to_probabilities_and_class_weight(
    reduction: str, smoothing: float, shape: tuple[int, ...]
) -> None:
    logits, target = torch.randn(shape, dtype=torch.float64), torch.rand(shape, dtype=torch.float64)
    weight = torch.rand(classes_of(shape), dtype=torch.float64)
    tensors = tuple(t.requires_grad_() for t in (logits, target, weight))

    def loss_of(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *t: function(*t, reduction=reduction, label_smoothing=smoothing)

    ours = value_and_gradients(loss_of(cross_entropy), tensors)
    for a, e in zip(ours, value_and_gradients(loss_of(F.cross_entropy), tensors), strict=True):
        assert a.shape == e.shape
        assert_near(a, e, scale=10)
    assert torch.autograd.gradcheck(loss_of(cross_entropy), tensors, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(loss_of(cross_entropy), tensors)


@pytest.mark.parametrize("probabilities", [False, True])
@each_reduction
def test_forward_derivative_along_the_class_weight(probabilities: bool, reduction: str) -> None:
    logits, weight, direction = torch.randn(3, 4).double(), torch.rand(4).double(), torch.randn(4).double()
    target = torch.rand(3, 4).double() if probabilities else torch.tensor([0, 3, 1])

    def along(function: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
        return torch.func.jvp(
            lambda w: function(logits, target, w, reduction=reduction), (weight,), (direction,)
        )

    if not probabilities:  # torch returns a derivative of 0 here, which is wrong
        with pytest.raises((RuntimeError, NotImplementedError), match="weight"):
            along(cross_entropy)
        return
    for a, e in zip(along(cross_entropy), along(F.cross_entropy), strict=True):
        assert_near(a, e, scale=10)


def test_class_weight_that_needs_a_gradient_is_used_without_one() -> None:
    """A parameter as class weight serves index targets where no gradient is recorded, as in torch."""
    logits, target = torch.randn(3, 4), torch.tensor([0, 3, 1])
    weight = torch.nn.Parameter(torch.rand(4))
    with torch.no_grad():
        assert_near(cross_entropy(logits, target, weight), F.cross_entropy(logits, target, weight))


@pytest.mark.parametrize("in_dims", [(0, 0), (0, None), (None, 0), (-1, 0), (1, -1)], ids=str)
@each_reduction
@pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 4, 3)], ids=str)
def test_vmap_over_index_targets(
    in_dims: tuple[int | None, int | None], reduction: str, shape: tuple[int, ...]
) -> None:
    """Against one call a sample: torch has no vmap of its own for most of these."""
    logits = torch.randn((5, *shape), dtype=torch.float64)
    target = torch.randint(0, 4, (5, *rows_of(shape)))
    target_dim = 0 if target.dim() == 1 and in_dims[1] is not None else in_dims[1]
    batch = (
        logits[0] if in_dims[0] is None else logits.movedim(0, in_dims[0]),
        target[0] if target_dim is None else target.movedim(0, target_dim),
    )
    samples = [
        (logits[0 if in_dims[0] is None else k], target[0 if target_dim is None else k]) for k in range(5)
    ]
    for options in ({}, {"weight": torch.rand(4).double(), "label_smoothing": 0.1, "ignore_index": 1}):
        options["reduction"] = reduction

        def loss(z: Tensor, y: Tensor, options: dict[str, Any] = options) -> Tensor:
            return cross_entropy(z, y, **options)

        def slope(z: Tensor, y: Tensor, options: dict[str, Any] = options) -> Tensor:
            return torch.func.grad(lambda z: cross_entropy(z, y, **options).sum())(z)

        expected = torch.stack([F.cross_entropy(*sample, **options) for sample in samples])
        assert_near(torch.vmap(loss, in_dims=(in_dims[0], target_dim))(*batch), expected, scale=10)
        expected = torch.stack([gradient(F.cross_entropy, *sample, **options) for sample in samples])
        assert_near(torch.vmap(slope, in_dims=(in_dims[0], target_dim))(*batch), expected, scale=10)


def test_vmap_over_class_weights() -> None:
    logits, target = torch.randn(3, 4).double(), torch.tensor([0, 3, 1])
    weights = torch.rand(5, 4).double()
    for reduction in REDUCTIONS:
        options = {"reduction": reduction}
        ours = torch.vmap(lambda w, o=options: cross_entropy(logits, target, w, **o))(weights)
        assert_near(ours, torch.stack([F.cross_entropy(logits, target, w, **options) for w in weights]))


def test_ensemble_of_models() -> None:
    """torch.func's own use: vmap over stacked parameters, grad per model."""
    x, y = torch.randn(16, 8), torch.randint(0, 5, (16,))
    weights = torch.randn(3, 5, 8)

    def gradients(function: Callable[..., Tensor]) -> Tensor:
        return torch.vmap(torch.func.grad(lambda w: function(x @ w.T, y)))(weights)

    assert_near(gradients(cross_entropy), gradients(F.cross_entropy))


# --------------------------------------------------------------------------------------------------
# Edges


@each_reduction
def test_no_rows(reduction: str) -> None:
    for logits, target in (
        (torch.zeros(0, 4), torch.zeros(0, dtype=torch.long)),
        (torch.zeros(0, 4), torch.zeros(0, 4)),
        (torch.zeros(0, 4, 3), torch.zeros(0, 3, dtype=torch.long)),
        (torch.zeros(2, 4, 0), torch.zeros(2, 0, dtype=torch.long)),
        (torch.zeros(2, 4, 0), torch.zeros(2, 4, 0)),
    ):
        for smoothing in (0.0, 0.1):
            options = {"reduction": reduction, "label_smoothing": smoothing}
            ours, torchs = (f(logits, target, **options) for f in (cross_entropy, F.cross_entropy))
            assert ours.shape == torchs.shape
            assert_near(ours, torchs)
            assert gradient(cross_entropy, logits, target, **options).shape == logits.shape


@each_reduction
def test_no_classes(reduction: str, device: str) -> None:
    for logits in (torch.zeros(3, 0), torch.zeros(0), torch.zeros(2, 0, 3)):
        target = torch.zeros_like(logits)
        ours, torchs = (f(logits, target, reduction=reduction) for f in (cross_entropy, F.cross_entropy))
        assert ours.shape == torchs.shape
        assert_near(ours, torchs)
        assert gradient(cross_entropy, logits, target, reduction=reduction).shape == logits.shape
    index = torch.full((3,), -100)
    ours, torchs = (
        f(torch.zeros(3, 0), index, reduction=reduction) for f in (cross_entropy, F.cross_entropy)
    )
    assert_near(ours, torchs)
    with raises_index_error(device):
        cross_entropy(torch.zeros(3, 0), torch.zeros(3, dtype=torch.long))


@each_reduction
def test_one_class(reduction: str) -> None:
    for shape in ((1,), (5, 1), (2, 1, 3)):
        logits = torch.randn(shape)
        for target in (torch.zeros(rows_of(shape), dtype=torch.long), torch.rand(shape)):
            for smoothing in (0.0, 0.1):
                assert_like_reference(logits, target, reduction=reduction, label_smoothing=smoothing)
        assert not cross_entropy(
            logits, torch.zeros(rows_of(shape), dtype=torch.long), reduction=reduction
        ).any()


@each_reduction
def test_one_row_with_a_target_of_shape_1(reduction: str) -> None:
    """torch takes a target (1) for logits (C), and returns a scalar."""
    logits, target = torch.randn(5), torch.tensor([3])
    ours, torchs = (f(logits, target, reduction=reduction) for f in (cross_entropy, F.cross_entropy))
    assert ours.shape == torchs.shape
    assert_near(ours, torchs)
    assert_near(
        gradient(cross_entropy, logits, target, reduction=reduction),
        gradient(F.cross_entropy, logits, target[0], reduction=reduction),
    )


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("shape", [(6, 5), (6, 100), (3, 5, 4), (3, 100_000)], ids=str)
def test_all_rows_ignored(smoothing: float, shape: tuple[int, ...]) -> None:
    logits = torch.randn(shape)
    target = torch.full(rows_of(shape), -100)
    for weight in (None, torch.rand(classes_of(shape))):
        options = {"label_smoothing": smoothing, "weight": weight}
        assert cross_entropy(logits, target, **options).isnan()  # torch's contract
        assert cross_entropy(logits, target, reduction="sum", **options) == 0
        assert not cross_entropy(logits, target, reduction="none", **options).any()
        for reduction in REDUCTIONS:
            assert not gradient(cross_entropy, logits, target, reduction=reduction, **options).any()


@pytest.mark.parametrize("shape", [(6, 5), (6, 100), (6, 5, 4), (3, 100_000)], ids=str)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_ignored_rows_add_nothing_whatever_they_hold(shape: tuple[int, ...], smoothing: float) -> None:
    clean = torch.randn(shape)
    target = torch.randint(0, classes_of(shape), rows_of(shape))
    target[1] = -100
    for junk in (NAN, INF, -INF, 3e38):
        logits = clean.clone()
        logits[1] = junk
        for reduction in REDUCTIONS:
            options = {"reduction": reduction, "label_smoothing": smoothing}
            assert torch.equal(
                cross_entropy(logits, target, **options), cross_entropy(clean, target, **options)
            )
            assert torch.equal(
                gradient(cross_entropy, logits, target, **options),
                gradient(cross_entropy, clean, target, **options),
            )


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("shape", [(4, 5), (4, 100), (4, 5000), (2, 100_000), (4, 7, 3)], ids=str)
@every_backend
def test_infinite_and_nan_logits_like_torch(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    target = torch.zeros(rows_of(shape), dtype=torch.long)
    for place, value in itertools.product((0, 1, classes_of(shape) - 1), (INF, -INF, NAN)):
        logits = torch.randn(shape).to(dtype)
        logits[0, place] = value
        # torch in float32: its 16-bit kernels differ from themselves in the smallest gradients.
        wide = logits.float() if dtype.itemsize == 2 else logits
        for smoothing in (0.0, 0.1):
            options = {"reduction": "none", "label_smoothing": smoothing}
            assert_near(
                cross_entropy(logits, target, **options), F.cross_entropy(wide, target, **options), dtype, 5
            )
            assert_near(
                gradient(cross_entropy, logits, target, **options),
                gradient(F.cross_entropy, wide, target, **options),
                dtype,
                scale=5,
            )


@pytest.mark.parametrize("finite", [1, 3, 2049])
@pytest.mark.parametrize("shape", [(20, 5000), (2, 5000), (2, 200_000), (3, 5000, 2)], ids=str)
@every_backend
def test_finite_logits_after_blocks_of_minus_infinity(shape: tuple[int, ...], finite: int) -> None:
    """The running maximum stays -inf for whole blocks: no NaN may come of -inf - -inf."""
    classes = classes_of(shape)
    for first in (False, True):
        logits = torch.full(shape, -INF)
        where = slice(0, finite) if first else slice(classes - finite, classes)
        logits[:, where] = torch.randn(logits[:, where].shape)
        target = torch.full(rows_of(shape), 0 if first else classes - 1)
        assert_near(cross_entropy(logits, target), F.cross_entropy(logits.double(), target), torch.float32)
        assert_near(
            gradient(cross_entropy, logits, target, reduction="sum"),
            gradient(F.cross_entropy, logits.double(), target, reduction="sum"),
            torch.float32,
        )
        probabilities = torch.zeros(shape)
        probabilities[:, where] = 1 / finite
        loss = cross_entropy(logits, probabilities)
        assert_near(loss, cross_entropy_reference(logits.double(), probabilities.double()), torch.float32, 10)


def test_probability_zero_at_minus_infinity_adds_nothing() -> None:
    """torch returns NaN here: 0 * inf."""
    logits = torch.tensor([[0.0, -INF, 1.0], [-INF, 2.0, -INF]])
    target = torch.tensor([[0.5, 0.0, 0.5], [0.0, 1.0, 0.0]])
    assert F.cross_entropy(logits, target).isnan()
    expected = cross_entropy(torch.tensor([[0.0, 1.0]]), torch.tensor([[0.5, 0.5]])) / 2
    assert_near(cross_entropy(logits, target), expected)
    result = gradient(cross_entropy, logits, target)
    assert result.isfinite().all()
    assert result[0, 1] == result[1].abs().sum() == 0
    # The same through a class weight of 0, which smoothing would otherwise make infinite.
    weight = torch.tensor([1.0, 0.0, 1.0])
    assert cross_entropy(logits[:1], torch.full((1, 3), 0.5), weight, label_smoothing=0.1).isfinite()


def test_masked_classes_in_a_tile_of_rows() -> None:
    """The same for index targets of many rows with few classes."""
    logits = torch.randn(300, 6)
    logits[:, 2] = -INF
    logits[::2, 5] = -INF
    target = torch.randint(0, 2, (300,))
    assert_near(cross_entropy(logits, target), F.cross_entropy(logits.double(), target), torch.float32)
    probabilities = torch.zeros(300, 6)
    probabilities[:, :2] = 0.5
    assert cross_entropy(logits, probabilities).isfinite()
    assert gradient(cross_entropy, logits, probabilities).isfinite().all()


@pytest.mark.parametrize("classes", [3, 100, 5000, 100_000])
def test_whole_row_of_minus_infinity_is_nan(classes: int) -> None:
    logits = torch.randn(3, classes)
    logits[1] = -INF
    for target in (torch.zeros(3, dtype=torch.long), torch.full((3, classes), 1 / classes)):
        ours = cross_entropy(logits, target, reduction="none")
        torchs = F.cross_entropy(logits, target, reduction="none")
        assert torch.equal(ours.isnan(), torchs.isnan())
        assert ours.isnan().tolist() == [False, True, False]
        assert torch.equal(
            gradient(cross_entropy, logits, target).isnan(), gradient(F.cross_entropy, logits, target).isnan()
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("classes", [3, 100, 5000])
@every_backend
def test_huge_logits(dtype: torch.dtype, classes: int) -> None:
    for size in (1e4, 1e30):
        logits = (torch.randn(4, classes) * size).to(dtype)
        target = torch.randint(0, classes, (4,))
        exact = logits.double()
        ours = cross_entropy(logits, target, reduction="none")
        expected = cross_entropy_reference(exact, target, reduction="none")
        torch.testing.assert_close(
            ours.double(), expected, rtol=1e-2 if dtype.itemsize == 2 else 1e-6, atol=1e-5
        )
        assert_near(
            gradient(cross_entropy, logits, target), gradient(F.cross_entropy, exact, target), dtype, 100
        )


def test_equal_huge_logits_keep_their_digits() -> None:
    """max and log-sum are kept apart: their rounded sum would lose all of log C."""
    logits = torch.full((2, 10), 1e30)
    target = torch.tensor([0, 9])
    assert_near(cross_entropy(logits, target), torch.tensor(10.0).log())
    assert_near(gradient(cross_entropy, logits, target)[0, 1], torch.tensor(0.05))


def test_half_mean_over_70000_rows() -> None:
    """On the CPU torch sums and counts rows in float16, which overflows, and returns 0 or NaN."""
    logits = torch.randn(70_000, 4).half()
    target = torch.randint(0, 4, (70_000,))
    assert not F.cross_entropy(logits.cpu(), target.cpu()) > 0
    assert_near(
        cross_entropy(logits, target), cross_entropy_reference(logits.double(), target), torch.float16
    )
    result = gradient(cross_entropy, logits, target)
    assert result.any()
    # The upstream gradient is divided in float32; float16's subnormals then round to 2^-24.
    exact = gradient(F.cross_entropy, logits.double(), target)
    assert (result.double() - exact).abs().max() <= 2.0**-25 * 1.001


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("rows", [2, 15])
@every_backend
def test_few_rows_with_many_classes(dtype: torch.dtype, rows: int, threads: int) -> None:
    """The row is split over the threads."""
    for classes in (32_769, 200_000) if rows == 2 else (65_537,):
        logits = torch.randn(rows, classes).to(dtype)
        target = torch.randint(0, classes, (rows,))
        weight = torch.rand(classes).to(dtype) + 0.5
        assert_like_reference(logits, target)
        if rows == 2:
            target[0] = 7
            assert_like_reference(logits, target, weight=weight, label_smoothing=0.1, ignore_index=7)
            assert_like_reference(logits, torch.rand(rows, classes).to(dtype) / classes, weight=weight)


def test_more_classes_than_pieces_of_a_row() -> None:
    classes = 64 * 32_768 + 12_345
    logits = torch.randn(2, classes)
    assert_like_reference(logits, torch.tensor([0, classes - 1]))


# --------------------------------------------------------------------------------------------------
# Layouts that images and models have


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("classes", [3, 21, 70])
@every_backend
def test_images(classes: int, dtype: torch.dtype) -> None:
    images = torch.randn(2, classes, 15, 18).to(dtype)
    for logits in (
        images,
        images.contiguous(memory_format=torch.channels_last),
        images[:, :, 3:-4, 5:-2],  # a crop, whose positions do not merge
        images.contiguous(memory_format=torch.channels_last)[:, :, 3:-4, 5:-2],
        images.transpose(2, 3),
        images[:, :, ::2, ::3],
        images.permute(0, 2, 1, 3).contiguous().permute(0, 2, 1, 3),  # the class dimension between
    ):
        rows = (2, *logits.shape[2:])
        for target in (
            torch.randint(0, classes, rows),
            torch.randint(0, classes, (*rows[:2], 1)).expand(rows),
        ):
            assert_like_reference(logits, target, reduction="none")
        assert_like_reference(logits, torch.rand(logits.shape).to(dtype))


@pytest.mark.parametrize("shape", [(10, 5), (10, 70)], ids=str)
@every_backend
def test_views_of_rows(shape: tuple[int, int]) -> None:
    rows, classes = shape
    big = torch.randn(2 * rows + 1, 2 * classes + 1)
    target = torch.randint(0, classes, (2 * rows,))
    for logits in (
        big[:rows, :classes],
        big[1 : rows + 1, 1 : classes + 1],
        big[: 2 * rows : 2, : 2 * classes : 2],
        torch.randn(classes, rows).T,
        big[:1, :classes].expand(rows, classes),
        big[:rows, :1].expand(rows, classes),
    ):
        for y in (target[:rows], target[: 2 * rows : 2], target[:1].expand(rows)):
            assert_like_reference(logits, y, reduction="none")
            assert_like_reference(logits, y, reduction="mean", label_smoothing=0.1)


def test_next_token_slices() -> None:
    """logits[:, :-1] against tokens[:, 1:], flattened or with the class dimension moved."""
    logits, tokens = torch.randn(3, 9, 50), torch.randint(0, 50, (3, 9))
    flat = cross_entropy(logits[:, :-1].reshape(-1, 50), tokens[:, 1:].reshape(-1))
    assert_near(flat, F.cross_entropy(logits[:, :-1].reshape(-1, 50), tokens[:, 1:].reshape(-1)))
    assert_near(cross_entropy(logits[:, :-1].transpose(1, 2), tokens[:, 1:]), flat)
    assert_like_reference(logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none")


def test_many_dimensions() -> None:
    for dims in (8, 17, 20):
        shape = (2, 3, *(1,) * (dims - 3), 2)
        logits, target = torch.randn(shape), torch.randint(0, 3, rows_of(shape))
        assert_near(cross_entropy(logits, target), F.cross_entropy(logits, target))


def test_strided_class_weight() -> None:
    logits, target = torch.randn(6, 5), torch.randint(0, 5, (6,))
    for weight in (torch.rand(10)[::2], torch.rand(1).expand(5), torch.rand(6)[1:]):
        assert_near(cross_entropy(logits, target, weight), F.cross_entropy(logits, target, weight.clone()))


# --------------------------------------------------------------------------------------------------
# Modules


def test_module_uses_every_argument() -> None:
    logits, target = torch.randn(6, 5), torch.tensor([0, 1, 2, 3, 4, 0])
    options = {"weight": torch.rand(5), "ignore_index": 2, "label_smoothing": 0.2, "reduction": "sum"}
    assert torch.equal(CrossEntropyLoss(**options)(logits, target), cross_entropy(logits, target, **options))


# --------------------------------------------------------------------------------------------------
# Errors

x45, y4, p45 = torch.randn(4, 5), torch.tensor([0, 1, 2, 3]), torch.rand(4, 5)

SAME_ERROR: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "0-d logits": ((torch.tensor(1.0), torch.tensor(0)), {}),
    "batch of another size": ((x45, y4[:3]), {}),
    "target with a dimension too many": ((x45, y4[:, None]), {}),
    "target without dimensions": ((x45[:1], torch.tensor(0)), {}),
    "positions of another size": ((torch.rand(2, 3, 4), torch.zeros(2, 5, dtype=torch.long)), {}),
    "positions missing": ((torch.rand(2, 3, 4), torch.zeros(2, dtype=torch.long)), {}),
    "images of another size": ((torch.rand(2, 3, 4, 5), torch.zeros(2, 4, 6, dtype=torch.long)), {}),
    "another number of images": ((torch.rand(2, 3, 4, 5), torch.zeros(1, 4, 5, dtype=torch.long)), {}),
    "volumes of another size": ((torch.rand(2, 3, 4, 5, 6), torch.zeros(2, 4, 5, 7, dtype=torch.long)), {}),
    "one row, two targets": ((torch.rand(5), torch.zeros(2, dtype=torch.long)), {}),
    "one row, a target of two dimensions": ((torch.rand(5), torch.zeros(1, 1, dtype=torch.long)), {}),
    "probabilities of too few classes": ((x45, p45[:, :3]), {}),
    "probabilities of too few rows": ((x45, p45[:2]), {}),
    "int16 target": ((x45, y4.short()), {}),
    "int8 target": ((x45, y4.to(torch.int8)), {}),
    "bool target": ((x45, y4 > 1), {}),
    "floating point indices": ((x45, y4.float()), {}),
    "integer probabilities": ((x45, p45.long()), {}),
    "complex probabilities": ((x45, p45.cfloat()), {}),
    "integer logits": ((x45.long(), y4), {}),
    "bool logits": ((x45 > 0, y4), {}),
    "complex logits": ((x45.cfloat(), y4), {}),
    "float8 logits": ((x45.to(torch.float8_e4m3fn), y4), {}),
    "sparse logits": ((x45.to_sparse(), y4), {}),
    "sparse indices": ((x45, y4.to_sparse()), {}),
    "sparse weight": ((x45, y4), {"weight": torch.rand(5).to_sparse()}),
    "target on another device": ((x45, y4.to("meta")), {}),
    "logits on another device": ((x45.to("meta"), y4), {}),
    "weight on another device": ((x45, y4), {"weight": torch.rand(5, device="meta")}),
    "weight of another length": ((x45, y4), {"weight": torch.rand(4)}),
    "weight of another length for probabilities": ((x45, p45), {"weight": torch.rand(4)}),
    "weight of two dimensions": ((x45, y4), {"weight": torch.rand(5, 1)}),
    "weight of two dimensions for probabilities": ((x45, p45), {"weight": torch.rand(1, 5)}),
    "weight without dimensions": ((x45, y4), {"weight": torch.tensor(1.0)}),
    "integer weight": ((x45, y4), {"weight": torch.ones(5, dtype=torch.long)}),
    "weight that needs a gradient": ((x45, y4), {"weight": torch.rand(5, requires_grad=True)}),
    "weight that needs a gradient, of another length": (
        (x45, p45),
        {"weight": torch.rand(1, requires_grad=True)},
    ),
    "weight that needs a gradient, of two dimensions": (
        (x45, p45),
        {"weight": torch.rand(1, 5, requires_grad=True)},
    ),
    "smoothing of 1.5": ((x45, y4), {"label_smoothing": 1.5}),
    "smoothing of 1.5 with probabilities": ((x45, p45), {"label_smoothing": 1.5}),
    "smoothing of 2 and a weight that needs a gradient": (
        (x45, p45),
        {"label_smoothing": 2.0, "weight": torch.rand(5, requires_grad=True)},
    ),
    "smoothing that is no number": ((x45, y4), {"label_smoothing": "a"}),
    "target of C": ((x45, y4 + 2), {}),
    "target of -1": ((x45, y4 - 1), {}),
    "target far out": ((x45, y4 + 2**40), {}),
    "ignore_index with probabilities": ((x45, p45), {"ignore_index": 1}),
    "ignore_index 0 with probabilities": ((x45, p45), {"ignore_index": 0}),
    "ignore_index that is no integer": ((x45, y4), {"ignore_index": 1.5}),
    "ignore_index beyond 64 bits": ((x45, y4), {"ignore_index": 2**63}),
    "reduction": ((x45, y4), {"reduction": "average"}),
}


@pytest.mark.parametrize("case", SAME_ERROR)
def test_same_exception_as_torch(case: str, device: str) -> None:
    """As torch's on the CPU: a class index out of range would leave it without its GPU."""
    arguments, options = SAME_ERROR[case]
    with pytest.raises(Exception) as torchs:
        F.cross_entropy(*arguments, **options)
    arguments, options = here((arguments, options))
    expected = raises_index_error(device) if torchs.type is IndexError else pytest.raises(torchs.type)
    with expected as ours:
        cross_entropy(*arguments, **options)
    assert ours.type is torchs.type
    assert len(str(ours.value)) > 15


@pytest.mark.parametrize("smoothing", [NAN, -0.1, -INF, INF, 1.0 + 1e-9])
def test_smoothing_outside_0_to_1(smoothing: float) -> None:
    """torch takes NaN and negative numbers for 0 without a word."""
    for logits, target in here(((x45, y4), (x45, p45))):
        with pytest.raises(RuntimeError, match="label_smoothing must be between"):
            cross_entropy(logits, target, label_smoothing=smoothing)


MORE_GENEROUS: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "int32 target": ((x45, y4.int()), {}),
    "float64 weight, float32 logits": ((x45, y4), {"weight": torch.ones(5, dtype=torch.float64)}),
    "float32 weight, float16 logits": ((x45.half(), y4), {"weight": torch.ones(5)}),
    "one row, target of shape (1), smoothing": (
        (x45[0], y4[:1]),
        {"label_smoothing": 0.1, "reduction": "none"},
    ),
}


@pytest.mark.parametrize("case", MORE_GENEROUS)
def test_more_generous_than_torch(case: str) -> None:
    arguments, options = MORE_GENEROUS[case]
    with pytest.raises(RuntimeError):
        F.cross_entropy(*arguments, **options)
    arguments, options = here((arguments, options))
    assert cross_entropy(*arguments, **options).isfinite().all()


@pytest.mark.parametrize("shape", [(4, 5), (40, 100), (300, 7), (3, 100_000), (2, 7, 5, 6)], ids=str)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_target_out_of_range_is_named(
    shape: tuple[int, ...], dtype: torch.dtype, threads: int, device: str
) -> None:
    rows, classes = rows_of(shape), classes_of(shape)
    logits = torch.randn(shape)
    for bad in (classes, -1, 2**31 - 1, -(2**31), 2**62, -(2**63), 255):
        info = torch.iinfo(dtype)
        if not info.min <= bad <= info.max or 0 <= bad < classes:
            continue
        target = torch.zeros(rows, dtype=dtype)
        target.view(-1)[-1] = bad
        last = target.numel() - 1 if device != CPU or len(rows) == 1 else tuple(r - 1 for r in rows)
        for options in ({}, {"label_smoothing": 0.1}, {"weight": torch.rand(classes)}, {"reduction": "none"}):
            with raises_index_error(device) as error:
                cross_entropy(logits, target, **options)
            for part in (f"Target {bad} ", f"row {last} ", f"C = {classes}"):
                assert part in str(error.value)
        # The first of several is named.
        target.view(-1)[1] = bad
        with raises_index_error(device, match=f"Target {bad} "):
            cross_entropy(logits, target)
    assert cross_entropy(logits, torch.zeros(rows, dtype=dtype)).isfinite()  # the process is none the worse


def test_target_changed_between_forward_and_backward(device: str) -> None:
    """An index that goes bad through .data, which autograd cannot see, is caught by the backward op."""
    logits, target = torch.randn(4, 5, requires_grad=True), torch.tensor([0, 1, 2, 3])
    loss = cross_entropy(logits, target)
    target.data[2] = 77
    with raises_index_error(device, match="Target 77 is out of bounds: row 2"):
        loss.backward()
    if device == CPU:
        assert logits.grad is None
    else:
        assert logits.grad.isnan().sum(1).tolist() == [0, 0, 5, 0]


def test_errors_name_the_op(device: str) -> None:
    name = "cross_entropy: " if device == CPU else "cross_entropy on cuda:0: "
    logits, target = here((x45, y4 + 5))
    with raises_index_error(device, match=f"^{name}"):
        cross_entropy(logits, target)


ops = torch.ops.lossops
one, rows4 = torch.ones(()), torch.rand(4)
stats2, stats3, planes6 = torch.zeros(2, 4), torch.zeros(3, 4), torch.zeros(6, 4)
normalizer = torch.tensor(4.0, dtype=torch.float64)


def forward(logits: Any = x45, target: Any = y4, weight: Any = None, *more: Any) -> Callable[[], Any]:
    return lambda: ops.cross_entropy_forward(*here((logits, target, weight)), *(more or (1, -100, 0.0, None)))


def backward(
    grad: Any = one,
    logits: Any = x45,
    target: Any = y4,
    weight: Any = None,
    stats: Any = stats2,
    divisor: Any = normalizer,
    ignore: Any = -100,
    smoothing: Any = 0.0,
    need_logits: bool = True,
    need_target: bool = False,
) -> Callable[[], Any]:
    return lambda: ops.cross_entropy_backward(
        *here((grad, logits, target, weight, stats, divisor)), ignore, smoothing, need_logits, need_target
    )


def rows(
    grad: Any = None,
    planes: Any = planes6,
    logits: Any = x45,
    target: Any = y4,
    weight: Any = None,
    scale: Any = None,
    cap: float = 0.0,
    smoothing: Any = 0.0,
    need_target: bool = False,
) -> Callable[[], Any]:
    saved = torch.ones(6, 4) if grad is None else grad, planes, logits, target, weight, scale
    options = 1.0, cap, -100, smoothing
    return lambda: ops.cross_entropy_rows_backward(*here(saved), *options, True, need_target, False)


def rows_forward(
    logits: Any = x45, target: Any = y4, weight: Any = None, scale: Any = None, cap: float = 0.0
) -> Callable[[], Any]:
    tensors = logits, target, weight, scale
    return lambda: ops.cross_entropy_rows_forward(*here(tensors), 1.0, cap, -100, 0.0, True, True)


def twice(tangent: Any = x45, tau: Any = one, **given: Any) -> Callable[[], Any]:
    saved = torch.ones(6, 4), torch.zeros(6, 4), x45, given.get("target", y4), None, given.get("scale")
    needs = True, given.get("need_target", False), True
    return lambda: ops.cross_entropy_rows_backward_backward(
        *here((tangent, tau, *saved)), 1.0, 0.0, -100, 0.0, *needs
    )


HOSTILE: dict[str, Callable[[], Any]] = {
    "forward: reduction 3": forward(x45, y4, None, 3, -100, 0.0, None),
    "forward: reduction -1": forward(x45, y4, None, -1, -100, 0.0, None),
    "forward: smoothing": forward(x45, y4, None, 1, -100, NAN, None),
    "forward: out_dtype integer": forward(x45, y4, None, 1, -100, 0.0, torch.int32),
    "forward: out_dtype complex": forward(x45, y4, None, 0, -100, 0.0, torch.complex64),
    "forward: weight": forward(x45, y4, torch.rand(4)),
    "forward: weight of two dimensions": forward(x45, y4, torch.rand(1, 5)),
    "forward: weight's device": forward(x45, y4, torch.rand(5, device="meta")),
    "forward: target": forward(x45, y4[:2]),
    "forward: integer logits": forward(x45.long(), y4),
    "forward: no dimensions": forward(one, y4),
    "forward: out of range": forward(x45, y4 + 9),
    "backward: out of range": backward(target=y4 + 9),
    "backward: negative target": backward(target=y4 - 5),
    "backward: out of range, gradient a row": backward(rows4, target=y4 + 9),
    "backward: out of range, few classes": backward(rows4, x45[:, :2], y4),
    "backward: out of range, many classes": backward(torch.ones(()), torch.rand(4, 100), y4 + 97),
    "backward: out of range, one long row": backward(
        one, torch.rand(1, 70_000), torch.tensor([70_000]), stats=torch.zeros(2, 1)
    ),
    "backward: gradient of 3 rows": backward(rows4[:3]),
    "backward: gradient of 5 rows": backward(torch.rand(5)),
    "backward: gradient of shape (1)": backward(rows4[:1]),
    "backward: gradient of the logits' shape": backward(x45),
    "backward: integer gradient": backward(one.long()),
    "backward: complex gradient": backward(one.cfloat()),
    "backward: gradient's device": backward(one.to("meta")),
    "backward: stats without S": backward(smoothing=0.1),
    "backward: stats without S for probabilities": backward(target=p45),
    "backward: stats of too few rows": backward(stats=torch.zeros(2, 3)),
    "backward: stats of one plane": backward(stats=torch.zeros(1, 4)),
    "backward: stats of no rows": backward(stats=torch.zeros(2, 0)),
    "backward: stats flat": backward(stats=torch.zeros(8)),
    "backward: stats in float64": backward(stats=stats2.double()),
    "backward: stats in float16": backward(stats=stats2.half()),
    "backward: float32 stats of float64 logits": backward(logits=x45.double()),
    "backward: stats' device": backward(stats=stats2.to("meta")),
    "backward: normalizer in float32": backward(divisor=one),
    "backward: normalizer of shape (1)": backward(divisor=normalizer[None]),
    "backward: empty normalizer": backward(divisor=normalizer[None][:0]),
    "backward: normalizer's device": backward(divisor=normalizer.to("meta")),
    "backward: gradient of an index": backward(need_target=True),
    "backward: weight": backward(weight=torch.rand(6)),
    "backward: smoothing": backward(smoothing=7.0),
    "backward: target of other rows": backward(target=y4[:2]),
    "backward: sparse": backward(logits=x45.to_sparse()),
    "rows: out of range": rows_forward(target=y4 + 9),
    "rows: target": rows_forward(target=y4[:2]),
    "rows: weight": rows_forward(weight=torch.rand(4)),
    "rows: cap below 0": rows_forward(cap=-1.0),
    "rows: infinite cap": rows_forward(cap=INF),
    "rows: NaN as a cap": rows_forward(cap=NAN),
    "rows: scale of shape (1)": rows_forward(scale=torch.ones(1)),
    "rows: scale in float64": rows_forward(scale=one.double()),
    "rows: scale's device": rows_forward(scale=one.to("meta")),
    "rows: integer logits": rows_forward(x45.long()),
    "rows backward: out of range": rows(target=y4 + 9),
    "rows backward: negative target": rows(target=y4 - 5),
    "rows backward: two planes": rows(planes=torch.zeros(2, 4)),
    "rows backward: eight planes": rows(torch.ones(8, 4), torch.zeros(8, 4)),
    "rows backward: planes of 3 rows": rows(planes=torch.zeros(6, 3)),
    "rows backward: planes without rows": rows(planes=torch.zeros(6)),
    "rows backward: planes without dimensions": rows(planes=one),
    "rows backward: planes in float64": rows(planes=torch.zeros(6, 4).double()),
    "rows backward: gradient of 7 planes": rows(torch.ones(7, 4)),
    "rows backward: gradient in float16": rows(torch.ones(6, 4).half()),
    "rows backward: gradient's device": rows(torch.ones(6, 4, device="meta")),
    "rows backward: gradient of an index": rows(need_target=True),
    "twice: tangent of another shape": twice(x45[:, :3]),
    "twice: tangent of one row": twice(x45[:1]),
    "twice: tangent flat": twice(x45.flatten()),
    "twice: integer tangent": twice(x45.long()),
    "twice: tangent's device": twice(x45.to("meta")),
    "twice: scale's tangent of shape (1)": twice(tau=torch.ones(1)),
    "twice: integer scale's tangent": twice(tau=one.long()),
    "twice: gradient of an index": twice(need_target=True),
    "twice: out of range": twice(target=y4 + 9),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_ops_called_directly_with_wrong_arguments(case: str, device: str) -> None:
    bad_index = "out of range" in case or "negative target" in case
    wrong = (RuntimeError, ValueError, NotImplementedError)
    with raises_index_error(device) if bad_index else pytest.raises(wrong) as error:
        HOSTILE[case]()
    assert len(str(error.value)) > 15


def test_ops_called_directly_with_strange_but_valid_arguments() -> None:
    """Strided stats, expanded gradients, mixed dtypes: right, or an exception; here they are right."""
    plain = backward(rows4, divisor=None)()[0]
    strided = torch.zeros(4, 4)[::2]
    strided.copy_(stats2)
    for call in (
        backward(rows4.double(), divisor=None),
        backward(rows4.repeat_interleave(2)[::2], divisor=None),
        backward(rows4, stats=torch.zeros(4, 2).T, divisor=None),
        backward(rows4, stats=torch.zeros(1, 1).expand(2, 4), divisor=None),
    ):
        try:
            result = call()[0]
        except RuntimeError as error:
            assert "stats" in str(error) or "grad_loss" in str(error)
        else:
            assert_near(result, plain)
