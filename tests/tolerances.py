"""How far a result may be from the float64 reference: one table for all tests.

The kernels compute in float32 (float64 for float64 operands) and round once to the result's dtype,
so that each entry is the rounding of the dtype plus the error of the arithmetic inside.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Tolerance(NamedTuple):
    rtol: float
    atol: float


TOLERANCES: dict[torch.dtype, Tolerance] = {
    # exp under 2 ulp, and a sum of a few thousand terms in double.
    torch.float64: Tolerance(1e-12, 1e-13),
    # An argument z - max of 30 is rounded by 30*2^-24, which exp passes on as a relative error of
    # 2e-6; S*softmax - t cancels to an absolute error of a few 2^-24 times the upstream gradient.
    torch.float32: Tolerance(5e-6, 4e-7),
    # Half a unit in the last place (2^-11 relative; 2^-25 where subnormal), and float32's error.
    torch.float16: Tolerance(2**-11 + 5e-6, 2**-25 + 4e-7),
    # The same with 8 bits of precision.
    torch.bfloat16: Tolerance(2**-8 + 5e-6, 4e-7),
}

DTYPES = tuple(TOLERANCES)


def assert_near(
    actual: Tensor, expected: Tensor, dtype: torch.dtype | None = None, scale: float = 1.0, message: str = ""
) -> None:
    """`actual` is `expected` (float64) within the tolerance of `dtype`, by default its own.

    `scale` widens the absolute part: the size of the terms whose difference the result is.
    """
    rtol, atol = TOLERANCES[dtype or actual.dtype]
    torch.testing.assert_close(
        actual.double(),
        expected.double(),
        rtol=rtol,
        atol=atol * scale,
        equal_nan=True,
        msg=(lambda text: f"{message}: {text}") if message else None,
    )
