"""Arithmetic: random shapes and values, exp and log seen through the softmax, and 16-bit rounding."""

from __future__ import annotations

import pytest
import torch
from contract import VARIANTS, Variant, value_and_gradients
from devices import every_backend
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tolerances import DTYPES, assert_near
from torch import Tensor

from lossops import cross_entropy, mse_loss
from lossops.cross_entropy import cross_entropy_reference
from lossops.mse import mse_reference

pytestmark = pytest.mark.usefixtures("device")

# Reproducible, free of limits that a busy machine would break, and on one device for all examples.
settings.register_profile(
    "lossops",
    deadline=None,
    derandomize=True,
    max_examples=25,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
settings.load_profile("lossops")

shapes = st.lists(st.integers(1, 40), min_size=1, max_size=4).filter(
    lambda s: torch.Size(s).numel() <= 20_000
)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@given(data=st.data())
def test_any_shape_layout_and_option(variant: Variant, data: st.DataObject) -> None:
    shape = tuple(data.draw(shapes, "shape"))
    dtype = data.draw(st.sampled_from(DTYPES), "dtype")
    reduction = data.draw(st.sampled_from(["none", "mean", "sum"]), "reduction")
    order = data.draw(st.permutations(range(len(shape))), "memory order")
    torch.manual_seed(data.draw(st.integers(0, 1000), "seed"))
    call = variant.make(shape, dtype)
    # The same numbers, laid out in another order of dimensions.
    inverse = sorted(range(len(shape)), key=order.__getitem__)
    leaves = tuple(t.permute(order).contiguous().permute(inverse).requires_grad_() for t in call.tensors)
    exact = call.in_float64()
    actual = value_and_gradients(call.bind(variant.loss.function, reduction=reduction), leaves)
    expected = value_and_gradients(exact.bind(variant.loss.reference, reduction=reduction), exact.leaves())
    for a, e in zip(actual, expected, strict=True):
        assert (a.shape, a.dtype) == (e.shape, dtype)
        assert_near(a, e, scale=10)


@given(data=st.data())
def test_any_mask(data: st.DataObject) -> None:
    """Masks that broadcast along any dimensions, in any memory order, with NaN where nothing counts."""
    shape = tuple(data.draw(shapes, "shape"))
    dtype = data.draw(st.sampled_from(DTYPES), "dtype")
    reduction = data.draw(st.sampled_from(["none", "mean", "sum"]), "reduction")
    of_mask = tuple(n if data.draw(st.booleans(), "full") else 1 for n in shape)
    of_mask = of_mask[data.draw(st.integers(0, len(shape)), "dimensions left out") :]
    order = data.draw(st.permutations(range(len(of_mask))), "memory order of the mask")
    torch.manual_seed(data.draw(st.integers(0, 1000), "seed"))
    inverse = sorted(range(len(of_mask)), key=order.__getitem__)
    share = data.draw(st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]), "share")
    mask = (torch.rand(of_mask) < share).permute(order).contiguous().permute(inverse)
    x, y = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    leaves = tuple(torch.where(mask, t, float("nan")).requires_grad_() for t in (x, y))
    exact = tuple(t.double().requires_grad_() for t in (x, y))
    loss = mse_loss(*leaves, reduction=reduction, mask=mask)
    expected = mse_reference(*exact, reduction, mask=mask)
    assert (loss.shape, loss.dtype) == (expected.shape, dtype)
    assert_near(loss, expected)
    for a, e in zip(
        torch.autograd.grad(loss.sum(), leaves), torch.autograd.grad(expected.sum(), exact), strict=True
    ):
        assert_near(a, e, scale=10)


@given(
    rows=st.integers(1, 70),
    classes=st.integers(1, 300),
    centre=st.sampled_from([0.0, 100.0, -1e4, 1e8]),
    spread=st.sampled_from([0.0, 1e-3, 1.0, 30.0, 1e3]),
    seed=st.integers(0, 1000),
)
def test_softmax_of_any_range(rows: int, classes: int, centre: float, spread: float, seed: int) -> None:
    """The loss and gradient of float32 logits far from 0, close together or far apart."""
    torch.manual_seed(seed)
    logits = (centre + spread * torch.randn(rows, classes)).requires_grad_()
    target = torch.randint(0, classes, (rows,))
    exact = logits.detach().double().requires_grad_()
    loss, gradient = value_and_gradients(lambda z: cross_entropy(z, target, reduction="none"), (logits,))
    exact_loss, exact_gradient = value_and_gradients(
        lambda z: cross_entropy_reference(z, target, reduction="none"), (exact,)
    )
    assert_near(loss, exact_loss)
    # z - max is exact to half a unit in its last place, which exp turns into a relative error.
    reach = (exact.detach().amax(1) - exact.detach().amin(1)).max().item()
    relative = (4 + 2 * min(reach, 90.0)) * 2.0**-24
    error = (gradient.double() - exact_gradient).abs()
    assert (error <= relative * exact_gradient.abs() + 3 * 2.0**-24).all()


def softmax_through_the_gradient(logits: Tensor) -> Tensor:
    """Row sums' gradient with S = 1 and all of t at class 0: softmax everywhere else, to the last bit."""
    leaf = logits.clone().requires_grad_()
    target = torch.zeros(len(logits), dtype=torch.long)
    return value_and_gradients(lambda z: cross_entropy(z, target, reduction="sum"), (leaf,))[1]


@pytest.mark.parametrize("classes", [2, 3, 70])
@every_backend
def test_exp_over_its_whole_range(classes: int) -> None:
    """One logit at x against a maximum of 0: exp(x) for float32 x from 0 to where it vanishes."""
    x = -torch.cat([torch.linspace(0, 104, 20_001), torch.logspace(-8, 1, 5_000)])
    logits = torch.full((len(x), classes), -1e4)
    logits[:, 0] = 0.0
    logits[:, 1] = x
    exact = logits.double().softmax(1)[:, 1]
    result = softmax_through_the_gradient(logits)[:, 1].double()
    normal = exact >= 2.0**-125
    # 2 ulp of exp, the rounding of log-sum (below ln 2: half an ulp of 2^-1) and of its subtraction.
    relative = ((result - exact).abs() / exact)[normal]
    allowed = (4 + 2 * x.abs().double()[normal]) * 2.0**-24
    assert (relative <= allowed).all()
    assert (result[~normal] <= 2.0**-124).all()
    assert (result >= 0).all()


@every_backend
def test_exp_in_float64() -> None:
    x = -torch.cat([torch.linspace(0, 750, 20_001), torch.logspace(-16, 1, 5_000)]).double()
    logits = torch.stack([torch.zeros_like(x), x], 1)
    exact = (x - torch.log1p(x.exp())).exp()
    result = softmax_through_the_gradient(logits)[:, 1]
    normal = exact >= 2.0**-1020
    relative = ((result - exact).abs() / exact)[normal]
    assert (relative <= (6 + 3 * x.abs()[normal]) * 2.0**-53).all()
    assert (result[~normal] <= 2.0**-1019).all()


@every_backend
def test_log_of_one_to_many_classes() -> None:
    """Equal logits: the loss is log C, for every C to 2049 and some beyond."""
    for classes in (*range(1, 2050), 4097, 65_536, 200_003):
        loss = cross_entropy(torch.zeros(1, classes), torch.tensor([0])).double()
        exact = torch.tensor(float(classes), dtype=torch.float64).log()
        assert (loss - exact).abs() <= 2 * 2.0**-23 * exact, classes


@every_backend
def test_confident_rows_keep_their_digits() -> None:
    """log-sum near 0, where 1 + exp(-x) has few digits left of exp(-x)."""
    gap = torch.linspace(0, 15, 301)
    logits = torch.stack([gap, torch.zeros_like(gap)], 1)
    loss = cross_entropy(logits, torch.zeros(301, dtype=torch.long), reduction="none").double()
    exact = torch.log1p((-gap.double()).exp())
    assert ((loss - exact).abs() <= 2.0**-23).all()


# --------------------------------------------------------------------------------------------------
# 16-bit formats

SIXTEEN_BITS = (torch.float16, torch.bfloat16)


def every_value(dtype: torch.dtype) -> Tensor:
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)


def assert_same_bits(actual: Tensor, expected: Tensor) -> None:
    """Equal to the sign of zero; any NaN is like another."""
    assert actual.dtype == expected.dtype
    nan = expected.isnan()
    assert torch.equal(actual.isnan(), nan)
    as_bits = torch.int16 if actual.element_size() == 2 else torch.int32
    assert torch.equal(actual[~nan].view(as_bits), expected[~nan].view(as_bits))


@pytest.mark.parametrize("dtype", SIXTEEN_BITS)
@every_backend
def test_widening_is_exact_for_every_bit_pattern(dtype: torch.dtype) -> None:
    """A float32 target of 0 makes the result float32: the square of the widened value, rounded once."""
    x = every_value(dtype)
    zero = torch.zeros(len(x))
    assert_same_bits(mse_loss(x, zero, reduction="none"), x.float() * x.float())
    # The gradient to the float32 target is -2*(x - 0): the widened value itself, its sign included.
    target = zero.requires_grad_()
    (gradient,) = torch.autograd.grad(mse_loss(x, target, reduction="sum"), target)
    assert_same_bits(gradient, -2 * (x.float() - 0.0))


@pytest.mark.parametrize("dtype", SIXTEEN_BITS)
@every_backend
def test_rounding_is_to_nearest_even_for_every_square(dtype: torch.dtype) -> None:
    x = every_value(dtype)
    assert_same_bits(mse_loss(x, torch.zeros_like(x), reduction="none"), (x.float() * x.float()).to(dtype))


@pytest.mark.parametrize("dtype", SIXTEEN_BITS)
@every_backend
def test_rounding_of_gradients(dtype: torch.dtype) -> None:
    """2*(x - y) of float32 and 16-bit operands, with ties, subnormals and overflow, rounded once."""
    x = every_value(dtype)
    for offset in (0.0, 2.0**-11, 2.0**-25, 3 * 2.0**-26, 1.0 + 2.0**-11, 32_760.0, 1e30):
        for step in (1, 3, 4096):
            y = torch.full((len(x),), offset) * step
            leaf = x.clone().requires_grad_()
            (gradient,) = torch.autograd.grad(mse_loss(leaf, y, reduction="sum"), leaf)
            assert_same_bits(gradient, (2 * (x.float() - y)).to(dtype))


@pytest.mark.parametrize("dtype", SIXTEEN_BITS)
@every_backend
def test_rounding_at_every_stride_and_remainder(dtype: torch.dtype) -> None:
    """Vector bodies, tails and strided stores round alike."""
    values = every_value(dtype)[torch.randperm(2**16)]
    for n in (*range(1, 40), 1023, 1024, 1025):
        for step in (1, 2):
            x = values[: n * step : step].requires_grad_()
            y = torch.ones(n * step)[::step] / 3
            loss = mse_loss(x, y.to(dtype), reduction="none")
            difference = x.detach().float() - y.to(dtype).float()
            assert_same_bits(loss.detach(), (difference * difference).to(dtype))


@pytest.mark.parametrize("dtype", SIXTEEN_BITS)
@every_backend
def test_every_value_as_a_logit(dtype: torch.dtype) -> None:
    """Rows (v, 0) for every v, along the classes and across a tile: infinities and NaN like float32's."""
    x = every_value(dtype)
    for logits in (torch.stack([x, torch.zeros_like(x)], 1), torch.stack([x, torch.zeros_like(x)])[None]):
        rows = logits.select(1, 0).shape
        target = torch.zeros(rows, dtype=torch.long)
        loss = cross_entropy(logits, target, reduction="none")
        exact = torch.nn.functional.cross_entropy(logits.double(), target, reduction="none")
        assert torch.equal(loss.isnan(), exact.isnan())
        assert_near(loss, exact)
