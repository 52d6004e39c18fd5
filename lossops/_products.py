"""The matrix products of a linear head, in the dtypes that are exact enough and into memory that is there."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from . import _C

# Whether this processor multiplies bfloat16. Asked once, and not where torch.compile would have to trace the
# question, which it refuses to.
_CPU_HAS_BFLOAT16 = getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()

# What a product is converted by where that takes a buffer: 2 or 4 MiB that stay in a CPU's cache; enough to
# fill a GPU.
BLOCK_ELEMENTS = 1 << 20
_GPU_BLOCK_ELEMENTS = 1 << 25

# Whether torch adds a product of 16-bit numbers to a float32 matrix in place, on a GPU.
_ADDS_WIDE = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 11)

# What csrc/product.h says of MKL is not so of other libraries that torch may be built with.
_HAS_MKL = torch.backends.mkl.is_available()

_own_multiply = torch.ops.lossops.multiply_.default


@torch.library.register_fake("lossops::multiply_")
def _(out, a, b, add):
    return None


def uses_own_kernel(a: Tensor, b: Tensor) -> bool:
    """Whether ``a b`` is this library's own, not torch's: csrc/product.h says why. Vectors are torch's."""
    wide = a.dtype == torch.float32 or a.dtype == torch.float64
    vector = a.shape[0] == 1 or b.shape[1] == 1
    return wide and not vector and a.device.type == "cpu" and _HAS_MKL and _C.multiplies_faster()


def product_dtype(x: Tensor) -> torch.dtype:
    """What the logits are computed to.

    float32 for float16, whose range a sum over a chunk's rows may leave before it is divided by their number,
    and in which what is still to be multiplied by a loss scale may be lost; and for bfloat16 on a processor
    that has no products of it, which torch then emulates at a fifth of float32's speed.
    """
    if x.dtype == torch.float16:
        return torch.float32
    if x.dtype == torch.bfloat16 and x.device.type == "cpu" and not _CPU_HAS_BFLOAT16:
        return torch.float32
    return x.dtype


def operand_dtype(x: Tensor) -> torch.dtype:
    """What is multiplied: a GPU's products of 16-bit numbers can be left as they were summed, in float32."""
    return x.dtype if x.is_cuda else product_dtype(x)


def product(a: Tensor, b: Tensor) -> Tensor:
    """``a b``, on a GPU as it was summed: of 16-bit numbers in float32."""
    summed = torch.promote_types(a.dtype, torch.float32)
    if a.is_cuda and a.dtype != summed:
        return torch.mm(a, b, summed)
    return multiply(a, b, a.new_empty(a.shape[0], b.shape[1]))


def multiply(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """``out = a b``"""
    if uses_own_kernel(a, b):
        _own_multiply(out, a, b, False)
    elif a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    else:
        torch.mm(a, b, out.dtype, out=out)
    return out


def add_product(total: Tensor, a: Tensor, b: Tensor, factor: Tensor | None = None) -> None:
    """``total += factor * a b``, by blocks of rows where that takes a buffer."""
    if factor is None and a.dtype == total.dtype:
        if uses_own_kernel(a, b):
            _own_multiply(total, a, b, True)
        else:
            total.addmm_(a, b)
    elif factor is None and a.is_cuda and _ADDS_WIDE:
        torch.addmm(total, a, b, total.dtype, out=total)
    else:
        for block in blocks(total):
            part = product(a[block], b)
            if factor is None:
                total[block].add_(part)
            else:
                total[block].addcmul_(part, factor)


def set_product(total: Tensor, a: Tensor, b: Tensor, factor: Tensor | None = None) -> None:
    """``total = factor * a b``"""
    if a.dtype == total.dtype or a.is_cuda:
        multiply(a, b, total)
    else:
        for block in blocks(total):
            total[block] = product(a[block], b)
    if factor is not None:
        total *= factor


def blocks(matrix: Tensor) -> Iterator[slice]:
    """Of its rows."""
    elements = _GPU_BLOCK_ELEMENTS if matrix.is_cuda else BLOCK_ELEMENTS
    rows = max(16, elements // max(1, matrix.shape[1]))
    for start in range(0, matrix.shape[0], rows):
        yield slice(start, start + rows)


class Layer:
    """One layer's products with a chunk. A weight of another dtype than theirs is converted by blocks."""

    def __init__(self, weight: Tensor, dtype: torch.dtype) -> None:
        self.weight = weight
        self.dtype = dtype
        self.total = torch.promote_types(dtype, torch.float32)  # what gradients are summed in

    def logits(self, x: Tensor, bias: Tensor | None, out: Tensor) -> None:
        """``out = x W^T + bias``"""
        if self.weight.dtype != self.dtype:
            for block in blocks(self.weight):
                multiply(x, self.weight[block].to(self.dtype).t(), out[:, block])
        elif bias is not None and bias.dtype == self.dtype and not uses_own_kernel(x, self.weight.t()):
            torch.addmm(bias, x, self.weight.t(), out=out)
            return
        else:
            multiply(x, self.weight.t(), out)
        if bias is not None:
            out.add_(bias)

    def to_input(self, grad: Tensor) -> Tensor:
        """``grad W``"""
        if self.weight.dtype == self.dtype:
            return product(grad, self.weight).to(self.total)
        result = grad.new_zeros(grad.shape[0], self.weight.shape[1], dtype=self.total)
        for block in blocks(self.weight):
            add_product(result, grad[:, block], self.weight[block].to(self.dtype))
        return result


def as_operand(grad: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """A gradient of logits in `dtype`, of each row over a factor (n, 1), and those.

    float16 would lose what is small in it: powers of two bring each row's largest to the top of its range. A
    row that is not finite stays so, and alone; one of zeros has the least factor.
    """
    if grad.dtype == dtype:
        return grad, None
    least, most = grad.aminmax(dim=1, keepdim=True)
    largest = torch.maximum(-least, most).nan_to_num(1.0, 1.0)
    exponent = torch.frexp(largest).exponent.clamp(min=-100).masked_fill(largest == 0, -100)
    factor = torch.exp2(exponent.to(grad.dtype) - 15)
    return torch.div(grad, factor, out=torch.empty_like(grad, dtype=dtype)), factor
