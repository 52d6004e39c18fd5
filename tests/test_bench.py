"""The benchmarks' arithmetic, and one run of them. Nothing here looks at a clock."""

import importlib
import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

BENCH = Path(__file__).parent.parent / "bench"
LOSSES = ["cross_entropy", "cross_entropy_rows", "mse"]


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


@pytest.fixture
def gpu(bench, monkeypatch):
    """A GPU that computes on the CPU and whose clock is the host's; its list of what was asked of it."""
    calls = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            calls.append("record")
            self.time = time.perf_counter()

        def query(self):
            return gpu.awake

        def synchronize(self):
            calls.append("wait")

        def elapsed_time(self, end):
            return (end.time - self.time) * 1e3  # milliseconds, as the real one

    properties = SimpleNamespace(L2_cache_size=2**22)
    memory = iter(range(0, 10**12, 10**6))
    fakes = {
        "Event": Event,
        "_sleep": lambda cycles: calls.append(cycles),
        "synchronize": lambda: calls.append("wait"),
        "is_available": lambda: True,
        "get_device_name": lambda: "NVIDIA H100 80GB HBM3",
        "get_device_properties": lambda device: properties,
        "reset_peak_memory_stats": lambda: calls.append("reset"),
        "memory_allocated": lambda: next(memory),
        "max_memory_allocated": lambda: next(memory),
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda op, key: True)
    measure = bench("_measure")
    monkeypatch.setattr(measure.Cuda, "device", torch.device("cpu"))
    monkeypatch.setattr(measure, "COPY_BYTES", 2**20)
    gpu = SimpleNamespace(calls=calls, awake=False, meter=measure.Cuda)
    return gpu


def find(module, name, cases="CASES"):
    (case,) = [case for case in getattr(module, cases) if case.name == name]
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
    assert find(module, "float32 2^24 mask").bytes_moved(backward=True) == 5 * 2**26 + 2 * 2**24


def test_masked_mse_is_compared_with_what_computes_the_same(bench):
    module = bench("mse")
    case = module._case(1000, mask=True)
    arguments = case.arguments(torch.device("cpu"))
    torch.testing.assert_close(module.OURS(**arguments), case.eager(**arguments))
    assert not torch.isclose(module.OURS(arguments["input"], arguments["target"]), case.eager(**arguments))


def test_the_family_is_compared_with_what_computes_the_same(bench):
    module = bench("cross_entropy_rows")
    for case in module._cases(16, 50, speedup=None):
        arguments = case.arguments(torch.device("cpu"))
        ours, eager = case.ours or module.OURS, case.eager or module.EAGER
        expected = eager(**arguments)
        torch.testing.assert_close(ours(**arguments).float(), expected.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("loss", LOSSES)
def test_cases_are_what_they_say(bench, loss):
    module = bench(loss)
    torchs = {"mse": F.mse_loss, "cross_entropy": F.cross_entropy}
    assert module.EAGER is torchs.get(loss, module.EAGER)
    for case in module.QUICK:
        arguments = case.arguments(torch.device("cpu"))
        assert arguments["input"].dtype == case.dtype
        assert arguments["input"].numel() == case.elements
        assert arguments["input"].requires_grad and not arguments["target"].requires_grad
    for cases in (module.CASES, module.QUICK, module.CUDA_CASES, module.CUDA_QUICK):
        assert len({case.name for case in cases}) == len(cases)
    assert {case.name for case in module.CUDA_QUICK} <= {case.name for case in module.CUDA_CASES}


def test_cases_of_a_gpu(bench):
    measure = bench("_measure")
    cases = [case for loss in LOSSES for case in bench(loss).CUDA_CASES]
    for case in cases:
        # Nothing in between: device time of a few microseconds is launches and says little.
        assert case.elements <= measure.Cuda.HOST_BOUND_UP_TO or case.elements >= 2**21
        assert case.bytes_moved(backward=True) < 2**34  # a tenth of a second at worst
        assert case.target(True) is None and case.target(False) is None  # they are for 2 CPU threads
    largest = find(bench("cross_entropy"), "bfloat16 8192x128256", "CUDA_CASES")
    assert largest.plain  # peers take it
    logits, target = 8192 * 128256 * 2, 8192 * 8
    assert largest.bytes_moved(backward=True) == 3 * logits + 2 * target
    image = find(bench("cross_entropy"), "float32 8x21x513x513", "CUDA_CASES")
    assert image.bytes_moved(backward=False) == 8 * 513 * 513 * (21 * 4 + 8) and not image.plain
    double = find(bench("mse"), "float64 2^26", "CUDA_CASES")
    assert double.bytes_moved(backward=True) == 5 * 2**29


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
    del seconds["ours"]
    assert make_row(seconds=seconds).verdict() == make_row(seconds={}).verdict() == "FAIL: no result"


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


def test_table_of_a_gpu(bench, make_row):
    report = bench("_report")
    failed = make_row(seconds={"eager": [0.5], "Liger": [0.2]}, target=None)
    launches = make_row(case="float32 1024", target=None, host_bound=True)
    lines = report.table([failed, launches], copy_rate=3e12)
    header, broken, tiny = (dict(zip(lines[0], line, strict=True)) for line in lines)
    assert list(header)[3:6] == ["eager/ours", "compile/ours", "Liger/ours"]
    assert (broken["eager ms"], broken["ours ms"], broken["Liger/ours"]) == ("500.00", "-", "-")
    assert broken["verdict"] == "FAIL: no result"
    # How long launches take says nothing about bytes.
    assert (tiny["case"], tiny["GB/s"], tiny["% of copy"]) == ("float32 1024, wall time", "-", "-")
    line = report.summary(make_row(), copy_rate=2e10)
    assert line.startswith(
        "mse float32 2^24 fwd+bwd: ours 100.0000 ms; eager 500.0000 ms; compile 200.0000 ms;"
    )
    assert line.endswith("; eager/ours 5.00; compile/ours 2.00; 10 GB/s (50% of copy); pass")
    assert report.summary(make_row(seconds={}), 2e10) == "mse float32 2^24 fwd+bwd: FAIL: no result"


def test_device_time(gpu):
    x = torch.ones(4, requires_grad=True)
    x.grad = torch.ones(4)

    def step():
        assert x.grad is None
        gpu.calls.append("step")
        return x.sum()

    meter, (short, long) = gpu.meter(), gpu.meter.SLEEP_CYCLES
    assert meter.iterations(2**22, 1e-9) == 1 and not meter.host_bound(2**22)
    assert 0 < meter.time(step, x, 1) < 1
    assert gpu.calls == [short, "record", "step", "record", "wait"]
    # The device woke before the host had queued the step: once more, with a longer sleep.
    gpu.calls.clear()
    gpu.awake = True
    meter.time(step, x, 1)
    assert gpu.calls == [short, "record", "step", "record", long, "record", "step", "record", "wait"]
    # Launches are timed by the wall, many in a row.
    gpu.calls.clear()
    steps = meter.iterations(32 * 10, 1e-6)
    meter.time(step, x, steps)
    assert meter.host_bound(32 * 10) and gpu.calls == ["wait", *["step"] * steps, "wait"]
    assert meter.peak(step, x, 0) == 10**6 and meter.peak(step, x, 2 * 10**6) == 0


def test_a_run_on_a_gpu_writes_beside_the_cpus(bench, gpu, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    run = bench("run")
    options = ["--quick", "--no-compile", "--rounds", "1", "--case", "32x10", "--out", str(tmp_path)]
    run.main(["--device", "cuda", *options])
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "memory-cuda.png",
        "results-cuda-NVIDIA-H100-80GB-HBM3.json",
        "results-cuda-NVIDIA-H100-80GB-HBM3.md",
        "speed-cuda.png",
    ]
    results = json.loads((tmp_path / "results-cuda-NVIDIA-H100-80GB-HBM3.json").read_text())
    assert results["machine"]["gpu"] == "NVIDIA H100 80GB HBM3" and results["machine"]["driver"]
    assert [(row["host_bound"], row["target"]) for row in results["rows"]] == [(True, None)] * 2
    printed = capsys.readouterr().out
    assert printed.startswith("NVIDIA H100 80GB HBM3; torch")
    assert "\ncross_entropy float32 32x10, wall time fwd+bwd: ours " in printed


def test_what_fails_is_left_out(bench, gpu, tmp_path, capsys, monkeypatch):
    run, module = bench("run"), bench("cross_entropy")

    def wrong(input, target):
        return 2 * F.cross_entropy(input, target)

    def interrupted(input, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "OURS", wrong)
    monkeypatch.setattr(run, "plot_speed", lambda *_: None)
    monkeypatch.setattr(run, "plot_memory", lambda *_: None)
    options = ["--device", "cuda", "--no-compile", "--rounds", "1", "--out", str(tmp_path)]
    with pytest.raises(SystemExit, match="no result in some row"):
        run.main([*options, "--case", "32x10"])
    assert "ours is left out of cross_entropy float32 32x10 fwd: ours disagrees" in capsys.readouterr().err
    # What was measured before an interruption is there.
    monkeypatch.setattr(module, "OURS", module.EAGER)
    monkeypatch.setattr(module, "CUDA_CASES", module.CUDA_QUICK[-1:])
    monkeypatch.setattr(bench("cross_entropy_rows"), "CUDA_CASES", [])
    monkeypatch.setattr(bench("mse"), "CUDA_CASES", bench("mse").CUDA_QUICK[-1:])
    monkeypatch.setattr(bench("mse"), "OURS", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run.main(options)
    (data,) = tmp_path.glob("*.json")
    assert [row["case"] for row in json.loads(data.read_text())["rows"]] == ["float32 32x10"] * 2


def test_what_writes_over_the_logits_has_its_own(bench, make_row):
    run, module, measure = bench("run"), bench("cross_entropy_rows"), bench("_measure")
    case = next(c for c in module.CASES if c.in_place)
    arguments = {"input": torch.randn(64, 300), "target": torch.randint(300, (64,))}
    before = arguments["input"].clone()
    losses = {run.EAGER: module.EAGER, run.OURS: case.ours, run.COMPILE: module.EAGER}
    row = make_row(backward=True)
    run.measure(measure.Cpu(), row, losses, arguments, 1, (run.EAGER, run.COMPILE))
    assert set(row.seconds) == set(losses)
    assert torch.equal(arguments["input"], before)


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
    run = bench("run")
    assert sorted(run.LOSSES) == LOSSES

    def choose(*options):
        return [(loss, case.name) for loss, _, case in run.select_cases(run.parse_arguments([*options]))]

    assert choose("--loss", "mse", "--case", "2^26") == [("mse", "float32 2^26"), ("mse", "bfloat16 2^26")]
    assert choose("--case", "2^26", "--dtype", "bfloat16") == [("mse", "bfloat16 2^26")]
    with pytest.raises(SystemExit, match="no case matches"):
        choose("--case", "no such case")
    assert choose("--device", "cuda", "--case", "2^27", "--quick") == [("mse", "float32 2^27")]
    assert len(choose("--device", "cuda")) == sum(len(bench(loss).CUDA_CASES) for loss in LOSSES)


def test_how_long_to_compile(bench):
    parse = bench("run").parse_arguments
    assert parse([]).compile_seconds == float("inf")
    assert parse(["--device", "cuda"]).compile_seconds == 150
    assert parse(["--device", "cuda", "--compile-seconds", "20"]).compile_seconds == 20
    assert parse(["--device", "cuda", "--no-compile"]).compile_seconds == 0


def test_cuda_without_a_gpu(bench, monkeypatch):
    run = bench("run")
    arguments = run.parse_arguments(["--device", "cuda"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="needs a GPU"):
        run.choose_meter(arguments)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda op, key: False)
    with pytest.raises(SystemExit, match="no CUDA kernels for cross_entropy"):
        run.choose_meter(arguments)
