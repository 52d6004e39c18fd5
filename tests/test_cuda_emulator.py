"""The emulator that the CUDA kernels are tested with: right answers, and every mistake found."""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
from pathlib import Path

import pytest
import torch
from cuda_emulator import build
from cuda_emulator.control import ASCENDING, ORDERS, RANDOM, Emulator, Site

pytestmark = pytest.mark.skipif(build.missing() is not None, reason=f"cuda_emulator: {build.missing()}")

SAMPLES = build.HERE / "samples"
OUT = build.CACHE / "tests"

INVALID_VALUE = 1  # cudaErrorInvalidValue
INVALID_CONFIGURATION = 9  # cudaErrorInvalidConfiguration


def build_kernels(flavour: str, architecture: str = "80") -> Emulator:
    out = OUT / f"kernels_{flavour}_{architecture}.so"
    return Emulator(
        build.build_library(out, [SAMPLES / "kernels.cu"], flavour=flavour, architecture=architecture)
    )


@pytest.fixture(scope="module", params=["75", "80", "90"])
def any_architecture(request: pytest.FixtureRequest) -> Emulator:
    """For the arithmetic of halves, which is made of other instructions on each."""
    return build_kernels("plain", request.param)


@pytest.fixture(scope="module")
def kernels() -> Emulator:
    return build_kernels("plain")


@pytest.fixture(scope="module")
def counting() -> Emulator:
    return build_kernels("stats")


def pointer(tensor: torch.Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


# Right answers


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("classes", [1, 37, 128, 1003])
def test_softmax(any_architecture: Emulator, classes: int, dtype: torch.dtype, order: int) -> None:
    emulator = any_architecture
    emulator.set_order(order)
    logits = (torch.randn(5, classes) * 4).to(dtype)
    out = torch.empty_like(logits)
    index = [torch.float32, torch.float16, torch.bfloat16].index(dtype)
    shape = ctypes.c_int64(5), ctypes.c_int64(classes)
    assert emulator.library.launch_softmax(index, pointer(logits), pointer(out), *shape) == 0
    expected = torch.softmax(logits.double(), 1)
    assert torch.allclose(out.double(), expected, rtol=4 * torch.finfo(dtype).eps, atol=1e-7)


@pytest.mark.parametrize("order", ORDERS)
def test_vector_copy(kernels: Emulator, order: int) -> None:
    kernels.set_order(order)
    x = torch.randint(0, 256, (16 * 1001,), dtype=torch.uint8)
    out = torch.zeros_like(x)
    assert kernels.library.launch_copy(pointer(x), pointer(out), ctypes.c_int64(x.numel())) == 0
    assert torch.equal(out, x)


@pytest.mark.parametrize("order", ORDERS)
def test_device_variables(kernels: Emulator, order: int) -> None:
    """Initial values, atomics, and copies from and to symbols."""
    kernels.set_order(order)
    values = torch.zeros(200, dtype=torch.int64)
    values[[17, 150]] = torch.tensor([2**40, 2**41])
    out = torch.zeros(3, dtype=torch.int64)
    arguments = pointer(values), ctypes.c_int64(200), ctypes.c_int64(1), pointer(out)
    assert kernels.library.launch_find(*arguments) == 0
    index, value, visits = out.tolist()
    assert (index, value) in [(17, 2**40), (150, 2**41)]
    if order != RANDOM:
        assert index == (17 if order == ASCENDING else 150)  # blocks run in the order that was asked for
    assert visits == 40 + 200


def test_warp_functions(kernels: Emulator) -> None:
    out = torch.zeros(9, 32, dtype=torch.int32)
    assert kernels.library.launch_warp(pointer(out)) == 0
    lanes = range(32)
    assert [[value % 2**32 for value in row] for row in out.tolist()] == [
        [n + 3 if n + 3 < 32 else n for n in lanes],
        [n - 3 if n >= 3 else n for n in lanes],
        [5] * 32,
        [n ^ 4 for n in lanes],
        [n + 3 if n % 8 + 3 < 8 else n for n in lanes],
        [sum(1 << n for n in lanes if n % 3 == 0)] * 32,
        [n ^ 1 if n < 16 else n ^ 2 for n in lanes],
        [1] * 32,
        [10] * 32,
    ]


FUNCTIONS = [
    torch.exp,
    torch.log,
    torch.reciprocal,
    torch.tanh,
    torch.log1p,
    torch.sqrt,
    lambda x: torch.round(x * 8),
    lambda x: x.clamp(min=0.5),
    lambda x: torch.trunc(torch.trunc(x * 1000) / 7),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("function", range(len(FUNCTIONS)))
def test_functions(kernels: Emulator, function: int, dtype: torch.dtype) -> None:
    """CUDA's own, from its instructions to single digits."""
    x = torch.rand(1000, dtype=dtype) * 20
    out = torch.zeros_like(x)
    is_double = ctypes.c_bool(dtype == torch.float64)
    assert kernels.library.launch_apply(is_double, function, pointer(x), pointer(out), 1000) == 0
    assert torch.allclose(out, FUNCTIONS[function](x), rtol=4 * torch.finfo(dtype).eps, atol=0)


@pytest.fixture(scope="module")
def newer() -> Emulator:
    return Emulator(build.build_library(OUT / "newer.so", [SAMPLES / "newer.cu"], architecture="90"))


@pytest.mark.parametrize("order", ORDERS)
def test_cluster(newer: Emulator, order: int) -> None:
    newer.set_order(order)
    x = torch.randint(-1000, 1000, (8, 64), dtype=torch.int32)
    out = torch.zeros(8, dtype=torch.int32)
    assert newer.library.launch_cluster_sum(pointer(x), pointer(out), 8) == 0
    assert out.tolist() == [x[:4].sum()] * 4 + [x[4:].sum()] * 4
    assert newer.library.launch_cluster_sum(pointer(x), pointer(out), 6) == INVALID_CONFIGURATION


@pytest.mark.parametrize("order", ORDERS)
def test_copy_ahead(newer: Emulator, order: int) -> None:
    newer.set_order(order)
    x = torch.randn(2, 32, 4)
    out = torch.zeros(2, 32, 4)
    assert newer.library.launch_copy_ahead(pointer(x), pointer(out)) == 0
    assert torch.equal(out, x.flip(1))


def test_warp_reductions(newer: Emulator) -> None:
    out = torch.zeros(3, 32, dtype=torch.int32)
    assert newer.library.launch_warp_sums(pointer(out)) == 0
    assert out.tolist() == [[31 * 16] * 32, [-7] * 32, [-1] * 32]


@pytest.mark.parametrize(("choice", "expected"), [(-1, 2 + 10), (1, 10 * 3)])
def test_generic_addresses(newer: Emulator, choice: int, expected: int) -> None:
    x = torch.zeros(32)
    assert newer.library.launch_any_memory(pointer(x), choice) == 0
    assert x.tolist() == [expected] * 32


# Launches that CUDA refuses


@pytest.mark.parametrize(
    ("x", "y", "threads", "error"),
    [
        (1, 65535, 1, 0),
        (1, 65536, 1, INVALID_CONFIGURATION),
        (0, 1, 1, INVALID_CONFIGURATION),
        (1, 1, 1025, INVALID_CONFIGURATION),
    ],
)
def test_launch_limits(kernels: Emulator, x: int, y: int, threads: int, error: int) -> None:
    assert kernels.library.launch_grid(x, y, threads) == error


def test_shared_memory_limits(kernels: Emulator) -> None:
    """48 KB with the static part, more for a kernel that asks for it first."""
    classes = (48 * 1024 - 32 * 8) // 4
    x = torch.randn(1, 2 * classes)
    out = torch.zeros_like(x)

    def launch(function: str, classes: int) -> int:
        arguments = (pointer(x), pointer(out), ctypes.c_int64(1), ctypes.c_int64(classes))
        if function == "launch_softmax":
            return kernels.library.launch_softmax(0, *arguments)
        return kernels.library[function](*arguments)

    assert launch("launch_softmax", classes) == 0
    assert launch("launch_softmax", classes + 1) == INVALID_VALUE
    assert launch("launch_softmax_with_more_shared_memory", 2 * classes) == 0
    assert torch.allclose(out, torch.softmax(x, 1), rtol=1e-5, atol=1e-9)


# Mistakes

PLAIN_BUGS = {
    "mask_of_exited": "names lane",
    "mask_without_caller": "without the calling lane",
    "masks_differ": "deadlock|meets __shfl_xor_sync with mask",
    "barrier_of_some": "threads have exited",
    "deadlock": "deadlock",
    "past_shared": "out of bounds in shared memory: 4 bytes at offset 256 of .*tile",
    "past_dynamic_shared": "out of bounds in shared memory: 4 bytes at offset 256 of dynamic shared memory",
    "unwritten_shared": "reads shared memory that nothing has written",
    "misaligned": "misaligned address: 16 bytes",
    "null_pointer": "null pointer: 4 bytes",
    "division_by_zero": "integer division by zero",
}
SANITIZER_BUGS = {
    "asan": {"past_global": "heap-buffer-overflow", "past_shared": "out of bounds in shared memory"},
    "tsan": dict.fromkeys(
        ("missing_barrier", "missing_syncwarp", "missing_fence", "missing_atomic"), "data race"
    ),
}
BUGS = [
    *(("plain", name, message) for name, message in PLAIN_BUGS.items()),
    *((flavour, name, message) for flavour, bugs in SANITIZER_BUGS.items() for name, message in bugs.items()),
]


@pytest.fixture(scope="module")
def bugs() -> dict[str, Path]:
    """Programs that run one wrong kernel, by flavour."""
    files = [SAMPLES / "bugs.cu"], [SAMPLES / "bugs.cpp"]
    return {
        flavour: build.build_library(OUT / f"bugs_{flavour}", *files, flavour=flavour, include=[SAMPLES])
        for flavour in ("plain", "asan", "tsan")
    }


def run(program: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(program), *map(str, arguments)],
        env={**os.environ, **build.SANITIZER_OPTIONS},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("flavour", "name", "message"), BUGS)
def test_mistake_is_found(bugs: dict[str, Path], flavour: str, name: str, message: str, order: int) -> None:
    result = run(bugs[flavour], order, name)
    assert result.returncode not in (0, 2)
    assert re.search(message, result.stderr)
    assert re.search(rf"kernel void .*{name}<false>\(", result.stderr)
    assert re.search(r"bugs.cu:\d+", result.stderr) or name == "deadlock"


@pytest.mark.parametrize(("flavour", "name"), [(flavour, name) for flavour, name, _ in BUGS])
def test_right_kernel_passes(bugs: dict[str, Path], flavour: str, name: str) -> None:
    result = run(bugs[flavour], RANDOM, name, "fixed")
    assert (result.returncode, result.stderr) == (0, "")


def test_mistake_says_where(bugs: dict[str, Path]) -> None:
    """The instruction, its line, the kernel, the block and the thread."""
    result = run(bugs["plain"], ASCENDING, "past_shared")
    line = 1 + (SAMPLES / "bugs.cu").read_text().splitlines().index(
        "  tile[threadIdx.x + (Fixed ? 0 : 1)] = out[threadIdx.x];"
    )
    assert f"{SAMPLES / 'bugs.cu'}:{line}, `st.shared.f32 " in result.stderr
    assert "past_shared<false>(float*), block (0, 0, 0), thread (63, 0, 0)" in result.stderr


# Memory


def only(sites: list[Site], instruction: str) -> Site:
    found = [site for site in sites if site.instruction.startswith(instruction)]
    assert len(found) == 1, found
    return found[0]


def test_sectors_of_vectors(counting: Emulator) -> None:
    """32 lanes with 16 bytes each are 512 bytes, 16 sectors: none twice, none in part."""
    x = torch.zeros(3 * 64 * 16 // 4)
    out = torch.empty_like(x)
    counting.reset_statistics()
    assert counting.library.launch_copy(pointer(x), pointer(out), ctypes.c_int64(x.numel() * 4)) == 0
    for instruction, is_store in (("ld.global.nc.v4", False), ("st.global.v4", True)):
        site = only(counting.statistics(), instruction)
        assert (site.is_store, site.is_shared, site.bytes_per_lane) == (is_store, False, 16)
        assert (site.requests, site.lanes, site.bytes, site.sectors) == (6, 192, 192 * 16, 6 * 16)
        assert "copy_vectors" in site.kernel
        assert site.file.endswith("kernels.cu")


def test_executed_instructions(counting: Emulator) -> None:
    """In proportion to the threads' work, wherever branches lead; none without a launch."""
    counts = []
    for vectors in (64, 128, 0):
        x = torch.zeros(4 * 64 * 3)
        counting.reset_statistics()
        if vectors:
            assert counting.library.launch_copy(pointer(x), pointer(x), ctypes.c_int64(16 * vectors)) == 0
        counts.append(counting.executed())
    assert counts[0] > 64 and counts[2] == 0
    assert counts[1] > counts[0] + 64


@pytest.mark.parametrize(("stride", "sectors"), [(1, 4), (2, 8), (8, 32), (32, 32)])
def test_sectors_of_strides(counting: Emulator, stride: int, sectors: int) -> None:
    storage = torch.zeros(64 * stride + 8)
    x = storage[-storage.data_ptr() // 4 % 8 :]  # from the start of a sector
    counting.reset_statistics()
    assert counting.library.launch_copy_strided(pointer(x), pointer(x), stride) == 0
    for instruction in ("ld.global", "st.global"):
        assert only(counting.statistics(), instruction).sectors == sectors


@pytest.mark.parametrize(("pitch", "wavefronts"), [(32, 32), (33, 1)])
def test_bank_conflicts(counting: Emulator, pitch: int, wavefronts: int) -> None:
    """A column of a tile lies in one bank, unless its rows are padded."""
    x = torch.randn(32, 32)
    out = torch.zeros(32, 32)
    counting.reset_statistics()
    assert counting.library.launch_transpose(pointer(x), pointer(out), pitch) == 0
    assert torch.equal(out, x.T)
    shared = [site for site in counting.statistics() if site.is_shared]
    for site in shared:
        expected = 1 if site.is_store else wavefronts
        assert site.wavefronts == expected * site.requests
    assert sum(site.requests for site in shared) == 2 * 32


# Translation

PTX = """
.version 9.0
.target sm_80
.address_size 64
.visible .entry kernel(.param .u64 kernel_param_0)
{{
  .reg .b32 %r<9>;
  .reg .b64 %rd<9>;
  .reg .pred %p<3>;
  {0}
  ret;
}}
"""


def translate(tmp_path: Path, statement: str) -> list[Path]:
    source = tmp_path / "kernels.ptx"
    source.write_text(PTX.format(statement))
    return build.translate(source, "test")


def test_known_instruction(tmp_path: Path) -> None:
    text = "".join(path.read_text() for path in translate(tmp_path, "add.s32 %r1, %r2, 5;"))
    assert "add(" in text


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("mma.sync.aligned.m8n8k4 %r1, %r2, %r3, %r4;", "unknown instruction mma.sync.aligned.m8n8k4"),
        ("add.cc.s32 %r1, %r2, %r3;", "unknown modifier .cc"),
        ("add.rz.f64 %rd1, %rd2, %rd3;", ".rz of .f64"),
        ("mov.u32 %r1, %clock;", "unknown operand %clock"),
        ("add.s32 %r1, %r2, %r3, %r4;", "4 operands"),
        ("bar.sync 1, 64;", "2 operands"),
        ("bar.sync 1;", "named barrier 1"),
        ("activemask.b32 %r1;", "activemask"),
        ("cvt.rz.bf16x2.f32 %r1, %r2, %r3;", "none of rn"),
        ("call.uni helper, (%r1);", "unknown instruction call.uni"),
        ("ld.global.L2::cache_hint.u32 %r1, [%rd1], %rd2;", "unknown modifier .L2::cache_hint"),
        (".pragma2 something;", "statement .pragma2 something"),
    ],
)
def test_unknown_instruction_stops(tmp_path: Path, statement: str, message: str) -> None:
    with pytest.raises(build.BuildError, match=re.escape(message)):
        translate(tmp_path, statement)


def test_compilers_refusal_is_an_error(tmp_path: Path) -> None:
    source = tmp_path / "wrong.cu"
    source.write_text("__global__ void kernel() { nonsense; }\n")
    with pytest.raises(build.BuildError, match="nonsense"):
        build.build_library(tmp_path / "wrong.so", [source])


# Building


def test_nothing_is_built_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    header, source = tmp_path / "value.h", tmp_path / "sample.cu"
    header.write_text("#define VALUE 3\n")
    source.write_text(
        '#include "value.h"\n__global__ void kernel(int* x) { *x = VALUE; }\n'
        'extern "C" void launch(int* x) { kernel<<<1, 1>>>(x); }\n'
    )
    commands = []
    real_run = build.run
    monkeypatch.setattr(build, "run", lambda command: (commands.append(str(command[0])), real_run(command)))

    def result(name: str) -> int:
        library = ctypes.CDLL(str(build.build_library(tmp_path / name, [source])))
        value = ctypes.c_int()
        library.launch(ctypes.byref(value))
        return value.value

    assert result("first.so") == 3
    assert any(command.endswith("nvcc") for command in commands)
    commands.clear()
    assert result("second.so") == 3
    assert commands == ["g++"]  # the link
    header.write_text("#define VALUE 4\n")
    assert result("third.so") == 4


def test_same_names_in_two_sources(tmp_path: Path) -> None:
    """Kernels and variables with internal linkage stay apart."""
    sources = []
    for number in (1, 2):
        folder = tmp_path / str(number)
        folder.mkdir()
        source = folder / "same.cu"
        source.write_text(
            f"static __device__ int value = {number};\n"
            "static __global__ void kernel(int* x) { *x = value; }\n"
            f'extern "C" int launch{number}() {{ int x; kernel<<<1, 1>>>(&x); return x; }}\n'
        )
        sources.append(source)
    library = ctypes.CDLL(str(build.build_library(tmp_path / "both.so", sources)))
    assert (library.launch1(), library.launch2()) == (1, 2)


def test_no_cuda_symbols_outside(kernels: Emulator) -> None:
    """A real libcudart in the process must neither see the stand-in nor be seen by it."""
    library = OUT / "kernels_plain_80.so"
    listed = subprocess.run(["nm", "-D", library], capture_output=True, text=True, check=True).stdout
    names = [line.split()[-1] for line in listed.splitlines()]
    assert "emulator_set_order" in names
    assert not [name for name in names if "cuda" in name.lower()]
