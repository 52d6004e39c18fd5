"""Builds lossops._C: the CPU kernels and the ops, as one extension against libtorch's stable ABI."""

import os
import shutil
import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
VERSION = (ROOT / "lossops" / "version.txt").read_text().strip()
OLDEST_TORCH = (2, 10)  # the stable ABI that csrc/ is written against


def fail(sentence: str) -> None:
    sys.exit(f"lossops: {sentence}")


def check_torch() -> None:
    try:
        import torch
    except ImportError:
        fail(
            "building needs torch in the active environment, and found none; install torch, then run "
            "`pip install --no-build-isolation .`"
        )
    found = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if found < OLDEST_TORCH:
        wanted = ".".join(map(str, OLDEST_TORCH))
        fail(f"building needs torch {wanted} or later, and found {torch.__version__}; upgrade torch")


def check_compiler() -> None:
    from torch.utils.cpp_extension import get_cxx_compiler

    if shutil.which(get_cxx_compiler().split()[0]) is None:
        fail(
            f"building needs a C++17 compiler, and found no {get_cxx_compiler()}; install g++ or set CXX "
            "to the compiler's name"
        )


def sanitizer_flags() -> list[str]:
    """Of `make sanitize`. What they build loads only under a preloaded libasan."""
    names = os.environ.get("LOSSOPS_SANITIZE")
    if not names:
        return []
    return [
        f"-fsanitize={names}",
        "-fno-sanitize-recover=undefined",
        "-fno-wrapv",  # CPython sets -fwrapv, under which no signed overflow is an error
        "-fno-omit-frame-pointer",
        "-O1",
        "-g",
    ]


def extension():
    from torch.utils.cpp_extension import CppExtension

    sources = sorted(ROOT.glob("csrc/*.cpp")) + sorted(ROOT.glob("csrc/cpu/*.cpp"))
    major, minor = OLDEST_TORCH
    return CppExtension(
        "lossops._C",
        [str(path.relative_to(ROOT)) for path in sources],
        depends=[str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/**/*.*")],
        extra_compile_args={
            "cxx": [
                "-O3",
                "-std=c++17",
                "-fopenmp-simd",
                "-fno-math-errno",  # never -ffast-math: NaN and infinity must behave
                "-fno-trapping-math",
                "-fno-loop-unroll-and-jam",  # it joins two classes of a tile and drops the vectors
                "-fvisibility=hidden",
                "-Wall",
                "-Wno-unknown-pragmas",
                f"-DTORCH_TARGET_VERSION=0x{major:02x}{minor:02x}000000000000",
                f'-DLOSSOPS_VERSION="{VERSION}"',
                *sanitizer_flags(),
            ]
        },
        extra_link_args=sanitizer_flags(),
    )


check_torch()
check_compiler()

from torch.utils.cpp_extension import BuildExtension  # noqa: E402  (only after the checks above)

setup(version=VERSION, ext_modules=[extension()], cmdclass={"build_ext": BuildExtension})
