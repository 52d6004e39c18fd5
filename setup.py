"""Builds lossops._C: the kernels and the ops, as one extension against libtorch's stable ABI.

CUDA is built in where nvcc is found: no GPU is needed, and torch's CPU wheel will do. LOSSOPS_CUDA=0 leaves
it out, LOSSOPS_CUDA=1 makes a missing nvcc an error; TORCH_CUDA_ARCH_LIST and MAX_JOBS mean what they mean
to torch.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
VERSION = (ROOT / "lossops" / "version.txt").read_text().strip()
OLDEST_TORCH = (2, 10)  # the stable ABI that csrc/ is written against
ARCHITECTURES = ("7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0")
# Made from another one's PTX where that is built too: nvcc would make the same PTX of these kernels for both,
# and that takes more than half of its time.
SAME_PTX = {"sm_86": "80", "sm_89": "80"}


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


def find_nvcc() -> str | None:
    wanted = os.environ.get("LOSSOPS_CUDA")
    if wanted == "0" or sanitizer_flags():  # sanitizers see the code of the host alone
        return None
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    folders = [
        *(os.path.join(home, "bin") for home in homes),
        os.environ.get("PATH", os.defpath),
        "/usr/local/cuda/bin",
    ]
    nvcc = shutil.which("nvcc", path=os.pathsep.join(folders))
    if nvcc is None and wanted == "1":
        fail(
            "LOSSOPS_CUDA=1 asks for CUDA, and no nvcc was found in CUDA_HOME, CUDA_PATH, PATH or "
            "/usr/local/cuda; install the CUDA toolkit or set CUDA_HOME to its folder"
        )
    return nvcc


def ask(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False)


def architectures(nvcc: str) -> list[str]:
    """What to compile for: sm_80 is machine code, compute_80 is PTX, for GPUs yet to come."""
    known = re.findall(r"compute_(\d+)", ask(nvcc, "--list-gpu-arch").stdout)
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split()
    if not listed:
        listed = [name for name in ARCHITECTURES if name.replace(".", "") in known]
        listed[-1] += "+PTX"
    result = []
    for name in listed:
        number = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", name)
        if number is None or number[1] + number[2] not in known:
            spelled = ", ".join(f"{n[:-1]}.{n[-1]}" for n in known)
            fail(
                f"TORCH_CUDA_ARCH_LIST names the architecture {name}, which {nvcc} does not know; it knows "
                f"{spelled}, each with +PTX where wanted"
            )
        suffix = number[1] + number[2] + number[3]
        result += [f"sm_{suffix}", *([f"compute_{suffix}"] if number[4] else [])]
    return list(dict.fromkeys(result))


def generate(built: list[str], code: str) -> str:
    """nvcc's option for one of `built`."""
    same = SAME_PTX.get(code)
    virtual = same if f"sm_{same}" in built else code.split("_")[1]
    return f"-gencode=arch=compute_{virtual},code={code}"


def host_compiler(nvcc: str) -> list[str]:
    compiler = os.environ.get("CXX", "").split()[:1]
    flags = ["-ccbin", *compiler] if compiler and not os.environ.get("NVCC_CCBIN") else []
    trial = ask(nvcc, *flags, "-E", "-x", "cu", os.devnull)
    if trial.returncode != 0:
        lines = trial.stderr.splitlines()
        reason = next((line for line in lines if "error" in line), " ".join(lines))
        fail(
            f"{nvcc} does not take this C++ compiler ({reason}); set NVCC_CCBIN to one that it takes, or "
            "LOSSOPS_CUDA=0 to build without CUDA"
        )
    return flags


def compile_cuda(nvcc: str) -> list[str]:
    """Compiles what has changed of csrc/cuda/*.cu and returns all the objects."""
    built = architectures(nvcc)
    sources = sorted(ROOT.glob("csrc/cuda/*.cu"))
    jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
    command = [
        nvcc,
        *host_compiler(nvcc),
        "-std=c++17",
        "-O3",
        "-Xcompiler=-fPIC,-fvisibility=hidden",
        "-Xptxas=-warn-spills,-warn-lmem-usage,-Werror",  # a spill is slow, and silent otherwise
        f"--threads={max(1, jobs // len(sources))}",
        *(generate(built, code) for code in built),
        f'-DLOSSOPS_CUDA_ARCHITECTURES="{" ".join(built)}"',
    ]
    folder = ROOT / "build" / "cuda"  # pip throws its own build folder away
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        "rule nvcc",
        f"  command = {shlex.join(command).replace('$', '$$')} -MD -MF $out.d -c $in -o $out",
        "  description = nvcc $in",
        "  depfile = $out.d",
        "  deps = gcc",
        *(f"build {path.stem}.o: nvcc {os.path.relpath(path, folder)}" for path in sources),
    ]
    (folder / "build.ninja").write_text("\n".join(lines) + "\n")
    ninja = [shutil.which("ninja")] if shutil.which("ninja") else [sys.executable, "-m", "ninja"]
    if subprocess.run([*ninja, "-C", folder, "-j", str(jobs)], check=False).returncode != 0:
        fail("a CUDA kernel did not compile; nvcc's message is above")
    return [str(folder / f"{path.stem}.o") for path in sources]


def cudart_folders(nvcc: str) -> list[str]:
    """Where the toolkit keeps libcudart_static.a; distributions keep it where the linker looks anyway."""
    top = re.search(r"TOP=(.*)", ask(nvcc, "--dryrun", "-E", "-x", "cu", os.devnull).stderr)
    folders = [path for name in ("lib64", "lib", "targets/*/lib") for path in Path(top[1]).glob(name)]
    return [str(path) for path in folders if (path / "libcudart_static.a").is_file()][:1]


def add_cuda(extension) -> None:
    """Adds the CUDA kernels, where there is an nvcc. (torch's CUDAExtension refuses a CPU wheel of torch.)"""
    nvcc = find_nvcc()
    if nvcc is None:
        print("lossops: building for the CPU alone, without nvcc", file=sys.stderr)
        return
    print(f"lossops: building for CUDA with {nvcc}", file=sys.stderr)
    extension.extra_objects += compile_cuda(nvcc)
    extension.extra_compile_args["cxx"].append("-DLOSSOPS_CUDA")
    extension.library_dirs += cudart_folders(nvcc)
    extension.libraries += ["cudart_static", "dl", "pthread", "rt"]
    # torch has a CUDA runtime of its own, perhaps of another version: neither may see the other's symbols.
    extension.extra_link_args.append("-Wl,--exclude-libs,ALL")


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


class BuildLossops(BuildExtension):
    def build_extensions(self) -> None:
        add_cuda(self.extensions[0])
        super().build_extensions()


setup(version=VERSION, ext_modules=[extension()], cmdclass={"build_ext": BuildLossops})
