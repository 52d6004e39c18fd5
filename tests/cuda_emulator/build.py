"""Builds CUDA sources for the emulator: host code as it is, kernels translated from nvcc's PTX.

python build.py --out rowsum --flavour plain samples/rowsum.cu samples/main.cpp
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

HERE = Path(__file__).resolve().parent
CACHE = HERE.parents[1] / "build" / "cuda_emulator"
RUNTIME = HERE / "runtime"
TRANSLATOR = [HERE / name for name in ("translate.py", "instructions.py", "ptx.py")]
CHUNK_BYTES = 1_000_000  # of a translated C++ file: some seconds of g++

# Flags of each flavour: what is translated and the host code, the run time, the link. TSan must not see
# the run time: its switching between fibres is no access of the emulated program.
ADDRESS = ["-fsanitize=address", "-g1"]
THREAD = ["-fsanitize=thread", "-g1"]
FLAVOURS = {
    "plain": ([], [], []),
    "stats": (["-DEMULATOR_STATISTICS"], ["-DEMULATOR_STATISTICS"], []),
    "asan": ([*ADDRESS, "-DEMULATOR_ASAN"], ["-fsanitize=address", "-DEMULATOR_ASAN"], ADDRESS),
    "tsan": ([*THREAD, "-DEMULATOR_TSAN"], ["-DEMULATOR_TSAN"], THREAD),
}

TRANSLATED = [
    "-O1",
    "-ffp-contract=off",  # PTX says itself where a product and a sum are fused
    "-fno-strict-aliasing",
    "-fno-sanitize-address-use-after-scope",  # g++ takes minutes for it, and PTX has no such scopes
]

# Environment of programs in the flavours asan and tsan. TSan would report an address once only, and sleep for
# a second at the end.
SANITIZER_OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0",
    "TSAN_OPTIONS": "suppress_equal_addresses=0:atexit_sleep_ms=0",
}

# The stand-in must not meet a real libcudart in the same process.
VERSION_SCRIPT = "{ local: cuda*; __cuda*; };\n"


class BuildError(Exception):
    """A compiler or the translator refused; the message is what it said."""


@cache
def cuda_home() -> Path | None:
    """Where the toolkit lies, as nvcc itself says; None without nvcc."""
    if shutil.which("nvcc") is None:
        return None
    with tempfile.NamedTemporaryFile(suffix=".cu") as empty:
        said = subprocess.run(["nvcc", "--dryrun", empty.name], capture_output=True, text=True, check=False)
    found = re.search(r"^#\$ TOP=(.*)$", said.stdout + said.stderr, re.MULTILINE)
    return Path(found[1].strip()) if found else None


def processor_flags() -> list[str]:
    """Instructions for fma and half precision, which are slow calls without them."""
    known = Path("/proc/cpuinfo").read_text()
    return ["-march=x86-64-v3"] if all(name in known for name in (" avx2 ", " fma ", " f16c ")) else []


def missing() -> str | None:
    """Why nothing can be built here, or None."""
    if os.uname().machine != "x86_64":
        return "the emulator switches fibres in x86-64 assembly"
    for tool in ("nvcc", "g++", "objcopy"):
        if shutil.which(tool) is None:
            return f"needs {tool}"
    return None


def run(command: Sequence[str | Path]) -> None:
    result = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise BuildError(f"{' '.join(map(str, command))}\n{result.stdout}{result.stderr}")


def digest(*parts: object) -> str:
    return hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()[:24]


def digest_file(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:24] if path.is_file() else "missing"


def dependencies(depfile: Path) -> list[Path]:
    """The files that a compiler's -MMD output names."""
    if not depfile.exists():
        return []
    words = depfile.read_text().replace("\\\n", " ").split(":", 1)[1].split()
    return [Path(word) for word in words]


def cached(key: str, produce: Callable[[Path], object]) -> Path:
    """The folder that `produce` filled for this key, made again when a file that it depended on changed."""
    folder = CACHE / key
    record = folder / "dependencies"
    if record.exists():
        entries = (line.split(" ", 1) for line in record.read_text().splitlines())
        if all(digest_file(Path(name)) == expected for expected, name in entries):
            return folder
    CACHE.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(dir=CACHE))
    try:
        produce(fresh)
        seen = dependencies(fresh / "depfile")
        (fresh / "dependencies").write_text("".join(f"{digest_file(p)} {p.resolve()}\n" for p in seen))
        shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(OSError):  # made meanwhile by another process
            fresh.rename(folder)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return folder


def compile_cpp(source: Path, flags: Sequence[str]) -> Path:
    command = ["g++", "-std=c++17", "-fPIC", *flags, "-c", str(source)]

    def produce(folder: Path) -> None:
        run([*command, "-MMD", "-MF", folder / "depfile", "-o", folder / "object.o"])

    return cached(digest(*command, digest_file(source)), produce) / "object.o"


def compile_cuda(source: Path, architecture: str, flags: Sequence[str]) -> Path:
    """A folder with kernels.ptx and the host's launch.o, from one run of nvcc so that names agree."""
    virtual = f"-gencode=arch=compute_{architecture},code=compute_{architecture}"
    options = ["-std=c++17", "-O3", "-lineinfo", "-Xcompiler=-fPIC"]
    command = [f"{cuda_home()}/bin/nvcc", *options, virtual, *flags, "-c", str(source)]
    # Every source registers its own kernels: those of two files may have the same name.
    own_registration = f"__cudaRegisterFatBinary=cuda_module_{module_name(source)}"

    def produce(folder: Path) -> None:
        kept, launch = folder / "kept", folder / "launch.o"
        kept.mkdir()
        run([*command, "-MMD", "-MF", folder / "depfile", "-keep", "-keep-dir", kept, "-o", launch])
        run(["objcopy", "--redefine-sym", own_registration, launch])
        (kept / f"{source.stem}.ptx").rename(folder / "kernels.ptx")
        shutil.rmtree(kept)

    return cached(digest(*command, digest_file(source)), produce)


def module_name(source: Path) -> str:
    return digest(source.resolve())[:8]


def translate(ptx: Path, module: str) -> list[Path]:
    def produce(folder: Path) -> None:
        run([sys.executable, TRANSLATOR[0], ptx, folder, module, str(CHUNK_BYTES)])

    key = digest(digest_file(ptx), module, CHUNK_BYTES, *map(digest_file, TRANSLATOR))
    return sorted(cached(key, produce).glob("*.cpp"))


def kernel_flags(flavour: str) -> list[str]:
    """Of g++, for what is translated."""
    largest_frame = 96 << 10 if flavour == "asan" else 16 << 10  # of a fibre's stack
    return [
        *TRANSLATED,
        f"-Werror=frame-larger-than={largest_frame}",
        *processor_flags(),
        "-fvisibility=hidden",
        f"-I{RUNTIME}",
        *FLAVOURS[flavour][0],
    ]


def on_the_host(
    hosts: Sequence[Path], flavour: str, architecture: str, flags: Sequence[str]
) -> list[tuple[Path, list[str]]]:
    """The run time's files and `hosts`, and what g++ is given for each; `flags` are for the hosts."""
    for_program, for_runtime, _ = FLAVOURS[flavour]
    toolkit = ["-isystem", f"{cuda_home()}/include", f"-I{RUNTIME}"]
    of_runtime = ["-O2", "-g1", "-fvisibility=hidden", *toolkit, *for_runtime]
    of_cudart = [*of_runtime, f"-DEMULATOR_ARCHITECTURE={architecture}"]
    runtime = sorted(RUNTIME.glob("*.cpp"))
    return [
        *((path, of_cudart if path.name == "cudart.cpp" else of_runtime) for path in runtime),
        *((path, ["-O1", *toolkit, *flags, *for_program]) for path in hosts),
    ]


def build_library(
    out: Path,
    sources: Sequence[Path],
    hosts: Sequence[Path] = (),
    flavour: str = "plain",
    architecture: str = "80",
    include: Sequence[Path | str] = (),
    define: Sequence[str] = (),
    flags: Sequence[str] = (),
    link: Sequence[str] = (),
    jobs: int = 2,
) -> Path:
    """Links CUDA sources and C++ hosts into `out`: a shared library where it ends in .so, else a program.

    `include` and `define` are for both compilers, `flags` for g++ on the hosts, `link` for the linker.
    """
    home = cuda_home()
    if home is None:
        raise BuildError(f"cuda_emulator: {missing() or 'nvcc does not say where its toolkit lies'}")
    for_both = [*(f"-I{path}" for path in include), *(f"-D{name}" for name in define)]
    of_kernels = kernel_flags(flavour)
    on_host = on_the_host(hosts, flavour, architecture, [*for_both, *flags])
    with ThreadPoolExecutor(jobs) as pool:
        compiled = [pool.submit(compile_cuda, source, architecture, for_both) for source in sources]
        objects = [pool.submit(compile_cpp, path, of_path) for path, of_path in on_host]
        for source, folder in zip(sources, compiled, strict=True):
            translated = translate(folder.result() / "kernels.ptx", module_name(source))
            objects += [pool.submit(compile_cpp, path, of_kernels) for path in translated]
        launches = [folder.result() / "launch.o" for folder in compiled]
        return link_objects(
            out, [*launches, *(item.result() for item in objects)], [*FLAVOURS[flavour][2], *link]
        )


def link_objects(out: Path, objects: Sequence[Path], flags: Sequence[str]) -> Path:
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        fresh = Path(folder) / out.name
        shared: list[str] = []
        if out.suffix == ".so":
            script = Path(folder) / "exported.map"
            script.write_text(VERSION_SCRIPT)
            shared = ["-shared", "-Wl,-Bsymbolic", f"-Wl,--version-script={script}"]
        run(["g++", *shared, *objects, *flags, "-o", fresh])
        fresh.replace(out)  # never written to in place: a process may have the old one loaded
    return out


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="+", type=Path, help=".cu sources and .cpp hosts")
    parser.add_argument("--out", required=True, type=Path, help="a shared library where it ends in .so")
    parser.add_argument("--flavour", choices=FLAVOURS, default="plain")
    parser.add_argument("--architecture", default="80", help="virtual architecture that nvcc compiles for")
    parser.add_argument("--include", action="append", default=[], metavar="FOLDER")
    parser.add_argument("--define", action="append", default=[], metavar="NAME[=VALUE]")
    parser.add_argument("--jobs", type=int, default=2)
    given = parser.parse_args()
    try:
        build_library(
            given.out,
            [path for path in given.files if path.suffix == ".cu"],
            [path for path in given.files if path.suffix != ".cu"],
            given.flavour,
            given.architecture,
            given.include,
            given.define,
            jobs=given.jobs,
        )
    except BuildError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
