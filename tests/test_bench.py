"""The benchmarks' arithmetic, and one run of them. Nothing here looks at a clock."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

BENCH = Path(__file__).parent.parent / "bench"
LOSSES = ["cross_entropy", "mse"]


@pytest.fixture
def bench(monkeypatch):
    """Imports a file of bench/ as its run does: by its own name, from its own folder."""
    monkeypatch.syspath_prepend(str(BENCH))
    yield importlib.import_module
    for name in ("_measure", "_report", "run", *LOSSES):
        sys.modules.pop(name, None)


@pytest.fixture
def make_row(bench):
    report = bench("_report")

    def make(**changes):
        values = {
            "loss": "mse",
            "case": "float32 2^24",
            "backward": True,
            "elements": 2**24,
            "input_bytes": 2**26,
            "bytes_moved": 10**9,
            "target": 4.0,
            "seconds": {"ours": [0.1, 9.0, 0.05], "eager": [0.5, 0.4, 0.7], "compile": [0.2, 0.2, 0.2]},
            "peak_bytes": {"ours": 0, "eager": 67_100_000, "compile": None},
        }
        return report.Row(**{**values, **changes})

    return make


def find(module, name):
    (case,) = [case for case in module.CASES if case.name == name]
    return case


def test_bytes_of_cross_entropy(bench):
    module = bench("cross_entropy")
    logits, target = 1024 * 32000 * 4, 1024 * 8
    case = find(module, "float32 1024x32000")
    assert case.bytes_moved(backward=False) == logits + target
    assert case.bytes_moved(backward=True) == (logits + target) + (logits + target + logits)
    assert find(module, "bfloat16 1024x32000").bytes_moved(False) == logits // 2 + target
    logits = 4096 * 1000 * 4
    assert find(module, "float32 4096x1000 probabilities").bytes_moved(False) == 2 * logits
    image = find(module, "float32 8x21x256x256")
    assert image.bytes_moved(False) == 8 * 256 * 256 * (21 * 4 + 8)


def test_bytes_of_mse(bench):
    module = bench("mse")
    assert find(module, "float32 2^26").bytes_moved(backward=False) == 2 * 2**28
    assert find(module, "float32 2^26").bytes_moved(backward=True) == 2 * 2**28 + 3 * 2**28
    assert find(module, "float32 2^24 weight").bytes_moved(backward=True) == 3 * 2**26 + 4 * 2**26


@pytest.mark.parametrize("loss", LOSSES)
def test_cases_are_what_they_say(bench, loss):
    module = bench(loss)
    assert module.EAGER is getattr(F, "mse_loss" if loss == "mse" else loss)
    for case in module.QUICK:
        arguments = case.arguments(torch.device("cpu"))
        assert arguments["input"].dtype == case.dtype
        assert arguments["input"].numel() == case.elements
        assert arguments["input"].requires_grad and not arguments["target"].requires_grad
    for cases in (module.CASES, module.QUICK):
        assert len({case.name for case in cases}) == len(cases)


@pytest.mark.parametrize("loss", LOSSES)
def test_steps_agree(bench, loss):
    measure, module = bench("_measure"), bench(loss)
    arguments = module.QUICK[-1].arguments(torch.device("cpu"))
    x = arguments["input"]
    results = []
    for function in (module.EAGER, module.OURS):
        step = measure.make_step(function, arguments, backward=True)
        step()
        results.append((step(), x.grad))  # the second step's gradient is not added to the first's
    measure.check_agreement("ours", *results[1], *results[0])
    with pytest.raises(AssertionError, match="ours disagrees"):
        measure.check_agreement("ours", results[1][0], results[1][1] * 1.1, *results[0])
    x.grad = None
    assert not measure.make_step(module.OURS, arguments, backward=False)().requires_grad
    assert x.grad is None


def test_medians_and_ratios(make_row):
    row = make_row()
    assert row.median("ours") == 0.1 and row.median("eager") == 0.5
    assert row.ratio("eager") == pytest.approx(5) and row.ratio("compile") == pytest.approx(2)
    assert row.rate() == pytest.approx(1e10)
    assert row.ratio("Liger") is None
    assert row.mode == "fwd+bwd"


def test_verdicts(make_row):
    seconds = {"ours": [1.0], "eager": [3.0], "compile": [0.9]}
    assert make_row().verdict() == "pass"
    assert make_row(seconds=seconds).verdict() == "FAIL: below target, slower than compile"
    assert make_row(seconds=seconds, target=None).misses() == ["slower than compile"]
    assert make_row(seconds=seconds, elements=100_000).misses() == ["below target"]
    assert make_row(seconds=seconds).misses("eager") == ["below target"]
    del seconds["compile"]
    assert make_row(seconds=seconds, target=3.0).verdict() == "pass"


def test_table(bench, make_row):
    report = bench("_report")
    small = make_row(
        case="float32 1024", target=None, input_bytes=4096, seconds={"ours": [2e-5], "eager": [1e-5]}
    )
    lines = report.table([make_row(), small], copy_rate=2e10)
    header, large, tiny = (dict(zip(lines[0], line, strict=True)) for line in lines)
    assert list(header)[3:8] == ["eager/ours", "compile/ours", "ours ms", "eager ms", "compile ms"]
    assert (large["eager/ours"], large["ours ms"], large["GB/s"]) == ("5.00", "100.00", "10.0")
    assert (large["% of copy"], large["target"], large["verdict"]) == ("50", "4", "pass")
    assert (large["ours MB"], large["eager MB"], large["compile MB"]) == ("0.0", "67.1", "-")
    # A small case tells nothing about memory; its times need more digits; compile did not run.
    assert (tiny["eager MB"], tiny["ours ms"], tiny["compile ms"]) == ("-", "0.0200", "-")
    assert (tiny["compile/ours"], tiny["target"]) == ("-", "-")
    assert [line.count("|") for line in report.as_markdown(lines).split("\n")] == [len(lines[0]) + 1] * 4
    assert len(report.as_text(lines).split("\n")) == 3


def test_peak_sees_a_temporary(bench):
    measure = bench("_measure")
    x = torch.ones(2**22, requires_grad=True)  # 16 MiB

    def one_temporary():
        return (x.detach() + 1).sum()

    def in_place():
        return x.detach().add_(1)

    meter = measure.Cpu()
    peak = meter.peak(one_temporary, x, 0)
    if peak is None:
        pytest.skip("no /proc/self/clear_refs here")
    assert abs(peak - x.nbytes) < 2**21
    assert meter.peak(in_place, x, 0) < 2**21


def test_a_run_writes_its_results(tmp_path):
    pytest.importorskip("matplotlib")
    pytest.importorskip("tqdm")
    options = ["--quick", "--no-compile", "--rounds", "1", "--case", "32x10", "--out", str(tmp_path)]
    command = [sys.executable, str(BENCH / "run.py"), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["machine"]["torch"] == torch.__version__ and results["machine"]["copy_gb_s"] > 0
    assert [(row["case"], row["mode"]) for row in results["rows"]] == [
        ("float32 32x10", "fwd+bwd"),
        ("float32 32x10", "fwd"),
    ]
    for row in results["rows"]:
        assert set(row["ms"]) == {"ours", "eager"}
        assert row["ratio"]["eager"] == pytest.approx(row["ms"]["eager"] / row["ms"]["ours"])
    for name in ("speed.png", "memory.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    markdown = (tmp_path / "results.md").read_text()
    assert markdown.startswith("| loss | case | pass | eager/ours |")
    assert "| cross_entropy | float32 32x10 | fwd+bwd |" in markdown
    assert str(tmp_path) in done.stdout


def test_choosing_cases(bench):
    pytest.importorskip("tqdm")
    run = bench("run")
    assert sorted(run.LOSSES) == LOSSES

    def choose(*options):
        return [(loss, case.name) for loss, _, case in run.select_cases(run.parse_arguments([*options]))]

    assert choose("--loss", "mse", "--case", "2^26") == [("mse", "float32 2^26"), ("mse", "bfloat16 2^26")]
    assert choose("--case", "2^26", "--dtype", "bfloat16") == [("mse", "bfloat16 2^26")]
    with pytest.raises(SystemExit, match="no case matches"):
        choose("--case", "no such case")


def test_cuda_without_a_gpu(bench, monkeypatch):
    pytest.importorskip("tqdm")
    run = bench("run")
    arguments = run.parse_arguments(["--device", "cuda"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="needs a GPU"):
        run.choose_meter(arguments)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda op, key: False)
    with pytest.raises(SystemExit, match="no CUDA kernels for cross_entropy"):
        run.choose_meter(arguments)
