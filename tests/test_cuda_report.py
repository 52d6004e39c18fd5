"""What the CUDA kernels move, against the ideal; and the report of it in docs/cuda.md."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import cuda_report
import emulated
import pytest
from cuda_report import Code, ReportError, Traffic, describe, differences, replaced

ALIGNED, UNALIGNED = 1.02, 1.10
ALIGNED_PLANES = 1.03  # row functions leave six numbers a row, and of each slice six too
LIMITS = {
    "64 x 32768": ALIGNED,
    "64 x 32767, rows unaligned": UNALIGNED,
    "64 x 32768, one element off": UNALIGNED,
    "64 x 32768, capped": ALIGNED_PLANES,
    "64 x 32767, capped, rows unaligned": UNALIGNED,
    "MSE, 2^20": ALIGNED,
    "MSE, 2^20, a mask": ALIGNED,
    "MSE, 2^20, both one element off": UNALIGNED,
    "MSE, 2^20, the input one element off": UNALIGNED,
}
DTYPES = ("bfloat16", "float32")

counted = pytest.mark.skipif(emulated.why_not() is not None, reason=str(emulated.why_not()))


@pytest.fixture(scope="module")
def traffic() -> dict[tuple[str, str, str], Traffic]:
    """By case, dtype and op. In a process of its own: the emulator that counts has the ops of the other."""
    tests = Path(cuda_report.__file__).parent
    result = subprocess.run(
        [sys.executable, cuda_report.__file__, "--json"],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, (str(tests), os.environ.get("PYTHONPATH")))),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    listed = [Traffic(**entry) for entry in json.loads(result.stdout)]
    return {(t.case, t.dtype, t.op): t for t in listed}


@counted
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", ["forward", "backward"])
@pytest.mark.parametrize("case", LIMITS)
def test_traffic(traffic: dict[tuple[str, str, str], Traffic], case: str, op: str, dtype: str) -> None:
    """The logits are read once, the gradient written once, and little else."""
    assert traffic[case, dtype, op].over_ideal <= LIMITS[case]


@counted
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", ["forward", "backward"])
@pytest.mark.parametrize(
    "case", [*(case for case in LIMITS if not case.startswith("MSE")), "512 x 1000", "4096 x 10, capped"]
)
def test_no_bank_conflicts(
    traffic: dict[tuple[str, str, str], Traffic], case: str, op: str, dtype: str
) -> None:
    assert traffic[case, dtype, op].wavefronts == traffic[case, dtype, op].least_wavefronts


@counted
def test_forward_writes_little(traffic: dict[tuple[str, str, str], Traffic]) -> None:
    """No softmax goes to memory."""
    for dtype in DTYPES:
        t = traffic["64 x 32768", dtype, "forward"]
        assert t.written < t.read / 100


# The page

PAGE = """Text.

<!-- kernels -->

| a | 1 |
| b | 2 |

<!-- end of kernels -->

More text.
"""


def test_same_page() -> None:
    assert differences(PAGE, {"kernels": "| a | 1 |\n| b | 2 |\n"}) == []


def test_changed_line() -> None:
    changed = differences(PAGE, {"kernels": "| a | 1 |\n| b | 3 |\n"})
    assert changed == ["kernels: no longer true is\n  | b | 2 |", "kernels: now is\n  | b | 3 |"]


def test_replaced() -> None:
    written = replaced(PAGE, {"kernels": "| c | 4 |\n"})
    assert written == PAGE.replace("| a | 1 |\n| b | 2 |\n", "| c | 4 |\n")
    assert replaced(written, {"kernels": "| a | 1 |\n| b | 2 |\n"}) == PAGE


def test_page_without_the_section() -> None:
    with pytest.raises(ReportError, match=r"has no lines <!-- floors -->"):
        replaced(PAGE, {"floors": "| c | 4 |\n"})


def test_page_has_every_table() -> None:
    """And those of nvcc 13.0.88 have been made."""
    page = cuda_report.PAGE.read_text()
    for name in ("traffic", "work", "floors", "kernels", "other kernels", "reasons"):
        match = cuda_report.section(name).search(page)
        assert match is not None and match[1].strip(), name


@pytest.mark.parametrize(
    ("name", "text", "dtype"),
    [
        (
            "void lossops::cuda::(anonymous namespace)::forward_rows<__nv_bfloat16, float, 128, false>(int)",
            "cross-entropy forward, rows by a block",
            "bfloat16",
        ),
        (
            "void lossops::cuda::(anonymous namespace)::backward_tiles<lossops::cuda::AnyType, double, 1, "
            "true>(int)",
            "cross-entropy backward, tiles of rows, target weights",
            "any, in float64",
        ),
        (
            "void lossops::cuda::(anonymous namespace)::gradient_of_tiles<float, float, true>(int)",
            "row functions backward, short rows",
            "float32",
        ),
        (
            "void lossops::cuda::(anonymous namespace)::second_products<128, double>(int)",
            "row functions second derivative, second products by a block",
            "any, in float64",
        ),
        (
            "void lossops::cuda::(anonymous namespace)::backward_packs<__half, float, false, true>(int)",
            "MSE backward, packs, mask",
            "float16",
        ),
        (
            "void lossops::cuda::(anonymous namespace)::forward_elements<float, true>(int)",
            "MSE forward, elements, mask",
            "any, in float32",
        ),
        (
            "lossops::cuda::reduce_blocks(lossops::cuda::Sums const*, int, lossops::cuda::Result)",
            "both, sums of blocks added up",
            "any",
        ),
    ],
)
def test_names_of_kernels(name: str, text: str, dtype: str) -> None:
    assert (describe(name).name, describe(name).dtype) == (text, dtype)


def test_unknown_kernel() -> None:
    with pytest.raises(ReportError, match="does not know the kernel"):
        describe("void lossops::cuda::(anonymous namespace)::novel<float>(int)")


@counted
def test_spill_is_an_error() -> None:
    name = "void lossops::cuda::(anonymous namespace)::forward_packs<float, float, true, false>(int)"
    spilled = dict.fromkeys(cuda_report.ARCHITECTURES, Code(64, 256, 128, 8, {"STL": 1}))
    with pytest.raises(ReportError, match="spills to local memory on sm_80"):
        cuda_report.kernel_tables({name: spilled})


@counted
def test_low_occupancy_wants_a_reason() -> None:
    name = "void lossops::cuda::(anonymous namespace)::forward_packs<float, float, true, false>(int)"
    crowded = dict.fromkeys(cuda_report.ARCHITECTURES, Code(128, 256, 128, 0, {}))
    with pytest.raises(ReportError, match="occupancy is 25%"):
        cuda_report.kernel_tables({name: crowded})
