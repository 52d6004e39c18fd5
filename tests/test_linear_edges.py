"""Linear cross-entropy where ways of computing meet: what torch's own loss of the logits does there."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lossops._family import upstream
from lossops._linear_rows import Head, _Chunk, _Gradients, _Results
from lossops.functional import linear_cross_entropy, linear_cross_entropy_with_metrics
from lossops.linear_cross_entropy import linear_cross_entropy_reference

each_reduction = pytest.mark.parametrize("reduction", ["none", "sum", "mean"])


def gradients(loss: torch.Tensor, *values: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(loss.sum(), values)


@each_reduction
def test_the_ignored_class_of_a_narrow_target(reduction: str) -> None:
    """-100 is 156 to a uint8, which torch compares modulo 256: class 156 of a narrow target counts."""
    x = torch.randn(4, 8, requires_grad=True)
    w = torch.randn(200, 8, requires_grad=True)
    target = torch.tensor([156, 3, 156, 4], dtype=torch.uint8)
    loss = linear_cross_entropy(x, w, target, reduction=reduction)
    expected = F.cross_entropy(F.linear(x, w), target.long(), reduction=reduction)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradients(loss, x, w), gradients(expected, x, w))


@pytest.mark.parametrize("dtype", [torch.int16, torch.bool, torch.complex64])
def test_other_targets_are_refused(dtype: torch.dtype) -> None:
    target = torch.zeros(2, dtype=dtype)
    with pytest.raises(RuntimeError, match="Long, Int or Byte"):
        linear_cross_entropy(torch.randn(2, 3), torch.randn(4, 3), target)


@pytest.mark.parametrize("classes", [3, 1 << 21], ids=["many rows a chunk", "few rows a chunk"])
def test_no_rows_and_the_default_chunk(classes: int) -> None:
    x, w = torch.randn(0, 1), torch.randn(classes, 1)
    assert linear_cross_entropy(x, w, torch.zeros(0, dtype=torch.int64), reduction="sum") == 0


@pytest.mark.parametrize("ways", ["first", "create_graph"])
@pytest.mark.parametrize("batch", ["ignored", "empty", "probabilities", "one position", "its probabilities"])
def test_a_mean_of_nothing_has_no_gradient(batch: str, ways: str) -> None:
    """The loss is NaN; the gradients are 0, as torch's are, and the weight survives the step."""
    rows = {"ignored": 3, "one position": 1, "its probabilities": 1}.get(batch, 0)
    x = torch.randn(rows, 4, requires_grad=True)
    w = torch.randn(5, 4, requires_grad=True)
    bias = torch.randn(5, requires_grad=True)
    target = torch.rand(rows, 5) if "probabilities" in batch else torch.full((rows,), -100)
    shift = rows == 1
    loss = linear_cross_entropy(x, w, target, linear_bias=bias, shift=shift)
    assert loss.isnan()
    grads = torch.autograd.grad(loss, (x, w, bias), create_graph=ways == "create_graph")
    assert all((grad == 0).all() for grad in grads)


@each_reduction
@pytest.mark.parametrize("probabilities", [False, True])
def test_unbatched_row_weight_and_metrics(probabilities: bool, reduction: str) -> None:
    x = torch.randn(4, requires_grad=True)
    w = torch.randn(5, 4, requires_grad=True)
    target = torch.rand(5) if probabilities else torch.tensor(2)
    row_weight = torch.tensor(0.5, requires_grad=True)
    options = {"row_weight": row_weight, "reduction": reduction}
    loss, metrics = linear_cross_entropy_with_metrics(x, w, target, **options)
    expected = linear_cross_entropy_reference(x, w, target, **options)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradients(loss, x, w, row_weight), gradients(expected, x, w, row_weight))
    assert all(value.shape == () for value in metrics)
    assert metrics.predicted == F.linear(x, w).argmax()


def test_forward_mode_along_probabilities() -> None:
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    w = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    target = torch.rand(5, 4, dtype=torch.float64, requires_grad=True)

    def loss(*values: torch.Tensor) -> torch.Tensor:
        return linear_cross_entropy(*values, softcap=3.0, z_loss=0.1, chunk_size=2)

    modes = {"check_forward_ad": True, "check_batched_forward_grad": True}
    torch.autograd.gradcheck(loss, (x, w, target), fast_mode=True, **modes)


def test_second_derivatives_on_the_meta_device() -> None:
    x, w = (torch.empty(n, 3, device="meta", requires_grad=True) for n in (5, 4))
    target = torch.empty(5, dtype=torch.int64, device="meta")
    (grad,) = torch.autograd.grad(linear_cross_entropy(x, w, target), x, create_graph=True)
    (second,) = torch.autograd.grad(grad.sum(), w)
    assert second.shape == w.shape


@each_reduction
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_dtypes_of_lora(dtype: torch.dtype, low: torch.dtype, reduction: str) -> None:
    """A and B may have another dtype than the head; their gradients have theirs."""
    x, w = (torch.randn(n, 3, dtype=dtype, requires_grad=True) for n in (6, 5))
    a, b = (torch.randn(size, dtype=low, requires_grad=True) for size in ((2, 3), (5, 2)))
    target = torch.tensor([0, 1, 2, 3, 4, 0])
    values = x, w, a, b
    loss = linear_cross_entropy(x, w, target, lora=(a, b, 0.5), reduction=reduction, chunk_size=4)
    exact = [v.detach().double().requires_grad_() for v in values]
    expected = linear_cross_entropy_reference(*exact[:2], target, lora=(*exact[2:], 0.5), reduction=reduction)
    near = {"rtol": 0.05, "atol": 0.05} if torch.bfloat16 in (dtype, low) else {"rtol": 1e-5, "atol": 1e-5}
    grads = gradients(loss, *values)
    assert [grad.dtype for grad in grads] == [v.dtype for v in values]
    for grad, want in zip(grads, gradients(expected, *exact), strict=True):
        torch.testing.assert_close(grad.double(), want, **near)


@pytest.mark.parametrize("way", ["bfloat16", "float16", "autocast"])
def test_compiles_16_bit_heads(way: str) -> None:
    dtype = torch.float32 if way == "autocast" else getattr(torch, way)
    x, w = (torch.randn(n, 3, dtype=dtype, requires_grad=True) for n in (6, 5))
    target = torch.tensor([0, 1, 2, 3, 4, 0])

    def loss(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=way == "autocast"):
            return linear_cross_entropy(x, w, target)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(x, w)
    near = {"rtol": 2**-6, "atol": 2**-8}
    torch.testing.assert_close(compiled, loss(x, w), **near)
    torch.testing.assert_close(gradients(compiled, x, w), gradients(loss(x, w), x, w), **near)


@pytest.mark.parametrize("counts", [0, 4])
def test_gradient_filter_where_ignored_rows_stay_in_a_chunk(counts: int) -> None:
    """As on a GPU, which does not leave them out: they keep no class, and may be all that there is."""
    n, classes = 8, 50
    x, weight = torch.randn(n, 3), torch.randn(classes, 3)
    target = torch.cat([torch.zeros(counts, dtype=torch.int64), torch.full((n - counts,), -100)])
    absent = None, None, None, None, 0.0
    options = classes, 1.0, 0.0, -100, 0.0, False, False, n, 0.9
    head = Head(x, weight, None, target, *absent, *options)
    chunk = _Chunk(slice(0, n), x, None, x @ weight.t(), target)
    results = _Results(head)
    wanted = _Gradients(results, [True, True, *[False] * 5])
    planes = results.add(chunk)
    assert planes.classes is not None and planes.classes.tolist() == [0]
    wanted.add(chunk, planes, upstream(planes.whole, torch.ones(n)))
    assert all(grad.isfinite().all() for grad in wanted.tensors())
    assert (wanted.sums["x"][counts:] == 0).all()


def test_a_bad_class_index_is_named_by_its_row() -> None:
    target = torch.tensor([-100, 1, 2, 7, 3])
    with pytest.raises(IndexError, match=r"linear_cross_entropy: Target 7 .* row 3 .* for C = 4"):
        linear_cross_entropy(torch.randn(5, 3), torch.randn(4, 3), target, chunk_size=2)
