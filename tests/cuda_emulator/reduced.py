"""The CUDA sources cut down to one dtype and low limits on launches, for checks that build or run often.

The kernels are the same to the letter. Of the dtypes that they are made for one is left, beside what reads
any; and where it would take millions of rows until a block takes a second turn, a few hundred are enough.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from torch.utils.cpp_extension import TORCH_LIB_PATH, include_paths

from .build import CACHE, build_library, compile_cpp, on_the_host

CSRC = Path(__file__).parents[2] / "csrc"
TYPES = {"float16": "__half", "bfloat16": "__nv_bfloat16", "float32": "float", "float64": "double"}

# Limits on launches: file, what is there, what takes its place.
LIMITS = [
    ("cross_entropy.cuh", "kMaxBlocks = 8192", "kMaxBlocks = 3"),
    ("cross_entropy.cuh", "kMaxWarpBlocks = 2048", "kMaxWarpBlocks = 3"),
    ("cross_entropy.cuh", "kMaxShortBlocks = 4096", "kMaxShortBlocks = 2"),
    ("cross_entropy.cuh", "kChunk = kThreads", "kChunk = 32"),
    ("cross_entropy_plan.h", "kBlockClasses = 1024", "kBlockClasses = 512"),
    ("cross_entropy_plan.h", "kWarpBytes = 6144", "kWarpBytes = 1 << 20"),
    ("cross_entropy_plan.h", "kWaveBlocks = 8 * 148", "kWaveBlocks = 40"),
    ("cross_entropy_plan.h", "kMinSlice = 4096", "kMinSlice = 512"),
    ("cross_entropy_plan.h", "kThreadsWanted = kWaveBlocks * kThreads / 2", "kThreadsWanted = 512"),
    ("mse.cu", "kMaxBlocks = 8192", "kMaxBlocks = 3"),
]
DTYPE_OF_SWITCH = re.compile(r"(?:case DType::\w+|default): return f\(Type<(\w+)>\(\), Type<\w+>\(\)\);")
ANY_IN_DOUBLE = "if (a.use_double) return f(Type<AnyType>(), Type<double>());"


class ReductionError(Exception):
    """The sources are not as this file expects them; the message says where."""


def replaced(text: str, old: str, new: str, file: Path) -> str:
    if text.count(old) != 1:
        raise ReductionError(f"reduced.py: expected `{old}` once in {file}; found it {text.count(old)} times")
    return text.replace(old, new)


def reduce_sources(folder: Path, dtype: str) -> None:
    """Fills `folder` with csrc, line by line where it was."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(CSRC, folder)
    reduce_limits(folder)
    for name in ("cross_entropy_plan.h", "mse.cu"):
        file = folder / "cuda" / name
        text = DTYPE_OF_SWITCH.sub(
            lambda found: (
                re.sub(r"^case DType::\w+", "default", found[0]) if found[1] == TYPES[dtype] else ""
            ),
            file.read_text(),
        )
        if dtype != "float64":
            text = replaced(text, ANY_IN_DOUBLE, "", file)
        file.write_text(text)


def reduce_limits(folder: Path) -> None:
    for name, old, new in LIMITS:
        file = folder / "cuda" / name
        file.write_text(replaced(file.read_text(), old, new, file))


DEFINED = [
    "LOSSOPS_EMULATED",
    'LOSSOPS_CUDA_ARCHITECTURES="compute_80"',
    "TORCH_TARGET_VERSION=0x020a000000000000",
]


def hosts(folder: Path) -> list[Path]:
    return [folder / name for name in ("cross_entropy.cpp", "mse.cpp", "library.cpp", "trace.cpp")]


def host_objects(folder: Path, flavour: str) -> list[Path]:
    """Everything but the kernels and their launches."""
    flags = [*(f"-I{path}" for path in include_paths()), *(f"-D{name}" for name in DEFINED)]
    return [compile_cpp(path, own) for path, own in on_the_host(hosts(folder), flavour, "80", flags)]


def build(folder: Path, flavour: str, jobs: int = 2) -> Path:
    """The ops of the sources in `folder`, as a library beside it that torch can load."""
    return build_library(
        folder.with_name(f"{folder.name}_{flavour}.so"),
        sorted(folder.glob("cuda/*.cu")),
        hosts(folder),
        flavour=flavour,
        include=include_paths(),
        define=DEFINED,
        link=[f"-L{TORCH_LIB_PATH}", "-ltorch_cpu"],
        jobs=jobs,
    )


def library(dtype: str, flavour: str, jobs: int = 2) -> Path:
    folder = CACHE / f"reduced_{dtype}"
    reduce_sources(folder, dtype)
    return build(folder, flavour, jobs)
