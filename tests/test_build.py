"""The package as built: version, type marker, CUDA or not, choice of instruction set, threads."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from importlib import metadata
from pathlib import Path

import pytest
import torch

import lossops

PACKAGE = Path(lossops.__file__).parent
SETUP = Path(__file__).parents[1] / "setup.py"


def python(program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_version() -> None:
    version = (PACKAGE / "version.txt").read_text().strip()
    assert lossops.__version__ == version
    assert lossops._C.__version__ == version
    assert metadata.version("lossops") == version


def test_typed() -> None:
    assert (PACKAGE / "py.typed").is_file()
    stub = (PACKAGE / "_C.pyi").read_text()
    for name in ("cpu_isa", "set_cpu_isa", "available_cpu_isas", "cuda_build_info"):
        assert f"def {name}(" in stub
        assert callable(getattr(lossops._C, name))


def test_extension_is_built_for_this_python() -> None:
    assert lossops._C.__file__.endswith(sysconfig.get_config_var("EXT_SUFFIX"))


def test_everything_public_exists() -> None:
    for name in lossops.__all__:
        assert getattr(lossops, name) is not None
    for name in lossops.functional.__all__:
        assert getattr(lossops.functional, name) is not None
    assert {"cross_entropy", "mse_loss"} <= set(lossops.functional.__all__)


def test_import_starts_nothing_heavy() -> None:
    """Optional and slow packages stay out until they are asked for."""
    program = (
        "import sys, torch; before = set(sys.modules); import lossops; print(*set(sys.modules) - before)"
    )
    result = python(program)
    assert result.returncode == 0, result.stderr
    new = {name.split(".")[0] for name in result.stdout.split()}
    assert "lossops" in new
    assert not new & {"matplotlib", "numpy", "sklearn", "tqdm", "pandas"}


def test_cuda_build_info() -> None:
    info = lossops.cuda_build_info()
    assert ("CUDA: registered" in torch._C._dispatch_dump("lossops::mse_forward")) == (info is not None)
    if info is None:
        return
    assert re.fullmatch(r"\d+\.\d+\.\d+", info.toolkit)
    assert info.architectures
    assert all(re.fullmatch(r"(sm|compute)_\d+[af]?", name) for name in info.architectures)
    assert info == (info.toolkit, info.architectures)


def test_no_async_errors_where_no_gpu_was_used() -> None:
    """Nothing to wait for, nothing to start: no context is made on any GPU."""
    program = """
import torch, lossops
print(lossops.check_async_errors(), torch.cuda.is_initialized())
try:
    lossops.cross_entropy(torch.ones(2, 3), torch.tensor([0, 3]))
except IndexError:
    print(lossops.check_async_errors())
"""
    result = python(program, LOSSOPS_SYNC_CHECKS="1")
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["None", "False", "None"]


def test_cuda_runtime_stays_inside() -> None:
    """torch may bring a CUDA runtime of another version: neither may see the other's symbols."""
    if lossops.cuda_build_info() is None or shutil.which("nm") is None:
        pytest.skip("needs a build with CUDA, and nm")
    symbols = subprocess.run(["nm", "-D", lossops._C.__file__], capture_output=True, text=True, check=True)
    assert not re.search(r" (__)?cu(da)?[A-Z]\w*$", symbols.stdout, re.MULTILINE)


def build(tmp_path: Path, hide_nvcc: bool = False, **environment: str) -> subprocess.CompletedProcess[str]:
    """`python setup.py build_ext` up to where compiling would begin: what it would build is printed."""
    program = f"""
import os, runpy, shutil, sys
import torch.utils.cpp_extension
class Stop(torch.utils.cpp_extension.BuildExtension):
    def build_extensions(self):
        extension = self.extensions[0]
        print(extension.libraries, extension.extra_compile_args)
torch.utils.cpp_extension.BuildExtension = Stop
which = shutil.which
if {hide_nvcc}:
    shutil.which = lambda name, *a, **k: None if name == "nvcc" else which(name, *a, **k)
sys.argv = ["setup.py", "-q", "build_ext", "--build-temp", {str(tmp_path)!r}]
os.chdir({str(SETUP.parent)!r})
runpy.run_path("setup.py")
"""
    return python(program, **environment)


needs_setup = pytest.mark.skipif(not SETUP.is_file(), reason="needs the source tree")


@needs_setup
@pytest.mark.parametrize("environment", [{"LOSSOPS_CUDA": ""}, {"LOSSOPS_CUDA": "0"}])
def test_builds_without_nvcc(tmp_path: Path, environment: dict[str, str]) -> None:
    result = build(tmp_path, hide_nvcc=environment["LOSSOPS_CUDA"] == "", **environment)
    assert result.returncode == 0, result.stderr
    assert "lossops: building for the CPU alone" in result.stderr
    assert "cudart" not in result.stdout
    assert "LOSSOPS_CUDA" not in result.stdout


@needs_setup
def test_cuda_that_was_asked_for(tmp_path: Path) -> None:
    result = build(tmp_path, hide_nvcc=True, LOSSOPS_CUDA="1")
    assert result.returncode == 1
    assert result.stderr.startswith("lossops: LOSSOPS_CUDA=1 asks for CUDA, and no nvcc was found")


@needs_setup
@pytest.mark.parametrize("architecture", ["3.5", "8.0 99.9+PTX", "9.0;Hopper", "sm_90"])
def test_unknown_architecture(tmp_path: Path, architecture: str) -> None:
    if lossops.cuda_build_info() is None:
        pytest.skip("needs nvcc")
    result = build(tmp_path, LOSSOPS_CUDA="1", TORCH_CUDA_ARCH_LIST=architecture)
    assert result.returncode == 1
    name = re.split("[ ;]", architecture)[-1]
    sentence = result.stderr.splitlines()[-1]
    assert sentence.startswith(f"lossops: TORCH_CUDA_ARCH_LIST names the architecture {name}, which")
    assert "8.0" in sentence


@needs_setup
def test_compiler_that_nvcc_refuses(tmp_path: Path) -> None:
    if lossops.cuda_build_info() is None:
        pytest.skip("needs nvcc")
    result = build(tmp_path, LOSSOPS_CUDA="1", NVCC_CCBIN="/nonexistent/g++")
    assert result.returncode == 1
    sentence = result.stderr.splitlines()[-1]
    assert "does not take this C++ compiler" in sentence
    assert "NVCC_CCBIN" in sentence


@pytest.mark.parametrize("isa", lossops._C.available_cpu_isas())
def test_isa_from_the_environment(isa: str) -> None:
    program = (
        "import torch, lossops; x = torch.arange(12.).view(3, 4)\n"
        "print(lossops._C.cpu_isa(), lossops.cross_entropy(x, torch.tensor([0, 1, 2])).item())"
    )
    result = python(program, LOSSOPS_CPU_ISA=isa)
    assert result.returncode == 0, result.stderr
    name, loss = result.stdout.split()
    assert name == isa
    x = torch.arange(12.0).view(3, 4)
    expected = torch.nn.functional.cross_entropy(x, torch.tensor([0, 1, 2])).item()
    assert float(loss) == pytest.approx(expected, rel=1e-6)


def test_best_isa_by_default() -> None:
    for environment in ({}, {"LOSSOPS_CPU_ISA": ""}):
        clean = {k: v for k, v in os.environ.items() if k != "LOSSOPS_CPU_ISA"}
        result = subprocess.run(
            [sys.executable, "-c", "import lossops; print(lossops._C.cpu_isa())"],
            env={**clean, **environment},
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
        assert result.stdout.strip() == lossops._C.available_cpu_isas()[0]


def test_unknown_isa_in_the_environment() -> None:
    """Importing works; the first use says what is wrong, and so does the second."""
    program = """
import torch, lossops
for _ in range(2):
    for use in (
        lossops._C.cpu_isa,
        lambda: lossops.mse_loss(torch.ones(3), torch.zeros(3)),
        lambda: lossops.cross_entropy(torch.ones(2, 3), torch.zeros(2, dtype=torch.long)),
    ):
        try:
            use()
        except ValueError as error:
            print(error)
"""
    result = python(program, LOSSOPS_CPU_ISA="sse9")
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert len(lines) == 6
    for line in lines:
        assert "instruction set" in line
        assert "sse9" in line
        assert all(isa in line for isa in lossops._C.available_cpu_isas())


def test_unknown_isa_by_name() -> None:
    before = lossops._C.cpu_isa()
    for name in ("sse9", "", "AVX2"):
        with pytest.raises(ValueError, match="instruction set"):
            lossops._C.set_cpu_isa(name)
    assert lossops._C.cpu_isa() == before
    assert before in lossops._C.available_cpu_isas()
    assert "baseline" in lossops._C.available_cpu_isas()


def test_one_thread_starts_no_others() -> None:
    """torch.set_num_threads(1) holds: the kernels run in the calling thread."""
    program = """
import os, torch
torch.set_num_threads(1)
import lossops
x = torch.randn(2000, 1000, requires_grad=True)
lossops.cross_entropy(x, torch.zeros(2000, dtype=torch.long))
before = len(os.listdir("/proc/self/task"))
lossops.mse_loss(x, torch.zeros_like(x))
lossops.cross_entropy(x, torch.zeros(2000, dtype=torch.long))
print(before, len(os.listdir("/proc/self/task")), torch.get_num_threads())
"""
    if not Path("/proc/self/task").is_dir():
        pytest.skip("counts threads in /proc")
    result = python(program)
    assert result.returncode == 0, result.stderr
    before, after, threads = map(int, result.stdout.split())
    assert after == before
    assert threads == 1


def test_threads_of_the_caller(restore_threads: None) -> None:
    """Calls from several Python threads at once, each on torch's own pool."""
    from concurrent.futures import ThreadPoolExecutor

    x = torch.randn(500, 400)
    target = torch.randint(0, 400, (500,))
    expected = lossops.cross_entropy(x, target)

    def work(_: int) -> torch.Tensor:
        leaf = x.clone().requires_grad_()
        lossops.cross_entropy(leaf, target).backward()
        return torch.cat([lossops.cross_entropy(x, target)[None], leaf.grad.flatten()])

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(work, range(16)))
    assert all(torch.equal(results[0], r) for r in results)
    assert torch.equal(results[0][0], expected)
