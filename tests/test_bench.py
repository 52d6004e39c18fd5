"""The benchmarks' arithmetic, and one run of them. Nothing here looks at a clock."""

import importlib
import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

BENCH = Path(__file__).parent.parent / "bench"
LOSSES = ["cross_entropy", "cross_entropy_rows", "linear_cross_entropy", "mse"]


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
            "targets": {"eager": 4.0},
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


def test_the_products_of_a_linear_head(bench):
    module = bench("linear_cross_entropy")
    case = find(module, "float32 4096x512x32000")
    assert case.flops == 3 * 2 * 4096 * 512 * 32000 and case.elements == 4096 * 32000
    assert case.bytes_moved(backward=True) == 0
    assert (case.target(True), case.speedups, case.over_floor) == (1.4, {"torch chunked": 2}, 1.15)
    assert find(module, "bfloat16 4096x512x32000").over_floor == 1.3
    large = find(module, "bfloat16 8192x256x128256")
    gradients = 2 * 256 * (8192 + 128256)
    assert large.memory + gradients == pytest.approx(0.1 * 8192 * 128256 * 2)
    arguments = module._case(8, 4, 100).arguments(torch.device("cpu"))
    x, weight = arguments["input"].detach(), arguments["linear_weight"].detach()
    multiply = case.floor(**arguments)
    results = multiply()
    z = x @ weight.t()
    torch.testing.assert_close(results, (z, z @ weight, z.t() @ x))
    assert [y.data_ptr() for y in multiply()] == [y.data_ptr() for y in results]


def test_torchs_own_chunks(bench):
    module = bench("linear_cross_entropy")
    chunked = module.PEERS["cpu"]["torch chunked"]
    arguments = module._case(64, 16, 100).arguments(torch.device("cpu"))
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        torch.testing.assert_close(chunked(**arguments), module.EAGER(**arguments))
    arguments = module._case(2, 1, 300).arguments(torch.device("cpu"))
    with pytest.raises((RuntimeError, AttributeError), match=r"takes minutes|LinearCrossEntropyOptions"):
        chunked(**arguments)


@pytest.mark.parametrize("loss", LOSSES)
def test_cases_are_what_they_say(bench, loss):
    module = bench(loss)
    torchs = {"mse": F.mse_loss, "cross_entropy": F.cross_entropy}
    assert module.EAGER is torchs.get(loss, module.EAGER)
    for case in module.QUICK:
        arguments = case.arguments(torch.device("cpu"))
        assert arguments["input"].dtype == case.dtype
        if loss == "linear_cross_entropy":
            assert len(arguments["input"]) * len(arguments["linear_weight"]) == case.elements
            assert arguments["linear_weight"].requires_grad
        else:
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
        assert case.bytes_moved(backward=True) < 2**34 and case.flops < 2**45  # a tenth of a second at worst
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
    results = []
    for function in (module.EAGER, module.OURS):
        own, leaves = measure.with_own_leaves(arguments, grad=True, copy=False)
        assert [leaf.data_ptr() for leaf in leaves] == [
            x.data_ptr() for x in arguments.values() if isinstance(x, torch.Tensor) and x.requires_grad
        ]
        step = measure.make_step(function, own, leaves, backward=True)
        step()
        results.append([step(), *(x.grad for x in leaves)])  # not added to the first step's
    assert len(results[0]) == (3 if loss == "linear_cross_entropy" else 2)
    assert arguments["input"].grad is None
    expected, ours = results
    measure.check_agreement("ours", ours, expected)
    for k in range(len(ours)):
        wrong = [x * 1.1 if k == j else x for j, x in enumerate(ours)]
        with pytest.raises(AssertionError, match="ours disagrees"):
            measure.check_agreement("ours", wrong, expected)
    measure.check_agreement("ours", [*ours[:-1], ours[-1] * 1.1], expected, tolerance=0.15)
    with pytest.raises(AssertionError, match="gradients to different tensors"):
        measure.check_agreement("ours", [*ours[:-1], None], expected)
    own, leaves = measure.with_own_leaves(arguments, grad=False, copy=True)
    assert own["input"].data_ptr() != arguments["input"].data_ptr()
    assert not measure.make_step(module.OURS, own, leaves, backward=False)().requires_grad
    assert all(x.grad is None for x in leaves)


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
    assert make_row(seconds=seconds).verdict() == "FAIL: eager/ours below 4, slower than compile"
    assert make_row(seconds=seconds, targets={}).misses() == ["slower than compile"]
    assert make_row(seconds=seconds, elements=100_000).misses() == ["eager/ours below 4"]
    assert make_row(seconds=seconds).misses("eager") == ["eager/ours below 4"]
    del seconds["compile"]
    assert make_row(seconds=seconds, targets={"eager": 3.0}).verdict() == "pass"
    del seconds["ours"]
    assert make_row(seconds=seconds).verdict() == make_row(seconds={}).verdict() == "FAIL: no result"


def test_targets_over_a_floor_and_of_memory(bench, make_row):
    targets = {"eager": 1.4, "torch chunked": 2, "bare products": 1.15}
    seconds = {"ours": [1.1], "eager": [1.6], "bare products": [1.0], "torch chunked": [2.3]}
    peaks = {"ours": 70 * 10**6}

    def row(**changes):
        changes = {
            "seconds": seconds,
            "peak_bytes": peaks,
            "targets": targets,
            "memory": 72 * 10**6,
            **changes,
        }
        return make_row(flops=2 * 10**9, bytes_moved=0, **changes)

    assert row().verdict() == "pass"
    assert row().ratio("bare products") == pytest.approx(1.1)
    assert row().speedup("bare products") == pytest.approx(1 / 1.1)
    slow = row(seconds={**seconds, "bare products": [0.9], "torch chunked": [2.1]})
    assert slow.verdict() == "FAIL: torch chunked/ours below 2, ours/bare products above 1.15"
    assert slow.misses("bare products") == ["ours/bare products above 1.15"]
    assert row(memory=69 * 10**6).verdict() == "FAIL: above 69 MB"
    rest = {name: times for name, times in seconds.items() if name != "torch chunked"}
    assert row(seconds=rest).verdict() == "pass, but no torch chunked"
    assert bench("_report").implementations([row()]) == ["ours", "eager", "torch chunked", "bare products"]


def test_table_of_products(bench, make_row):
    report = bench("_report")
    seconds = {"ours": [0.5] * 5, "eager": [1.0] * 5, "torch chunked": [3.0, 4.0], "bare products": [0.4] * 5}
    row = make_row(
        seconds=seconds,
        rounds=5,
        flops=10**11,
        bytes_moved=0,
        targets={"eager": 1.4, "bare products": 1.3},
        memory=10**8,
    )
    lines = report.table([row, make_row()], copy_rate=2e10)
    header, products, plain = (dict(zip(lines[0], line, strict=True)) for line in lines)
    assert list(header)[3:7] == ["eager/ours", "compile/ours", "torch chunked/ours", "ours/bare products"]
    assert (products["torch chunked/ours"], products["ours/bare products"]) == ("7.00", "1.25")
    assert (products["ours ms"], products["torch chunked ms"]) == ("500.00", "3500.00 (2)")
    assert (products["GB/s"], products["% of copy"], products["GFLOP/s"]) == ("-", "-", "200")
    assert (plain["GB/s"], plain["GFLOP/s"]) == ("10.0", "-")
    assert products["target"] == "eager 1.4, bare products 1.3, 100 MB"
    assert "bare products MB" not in header and "GFLOP/s" not in report.table([make_row()], 2e10)[0]
    assert "torch chunked 3500.0000 ms (2);" in report.summary(row, 2e10)
    assert report.summary(row, 2e10).endswith("; ours/bare products 1.25; 200 GFLOP/s; pass")


def test_table(bench, make_row):
    report = bench("_report")
    small = make_row(
        case="float32 1024", targets={}, input_bytes=4096, seconds={"ours": [2e-5], "eager": [1e-5]}
    )
    lines = report.table([make_row(), small], copy_rate=2e10)
    header, large, tiny = (dict(zip(lines[0], line, strict=True)) for line in lines)
    assert list(header)[3:8] == ["eager/ours", "compile/ours", "ours ms", "eager ms", "compile ms"]
    assert (large["eager/ours"], large["ours ms"], large["GB/s"]) == ("5.00", "100.00", "10.0")
    assert (large["% of copy"], large["target"], large["verdict"]) == ("50", "eager 4", "pass")
    assert (large["ours MB"], large["eager MB"], large["compile MB"]) == ("0.0", "67.1", "-")
    # A small case tells nothing about memory; its times need more digits; compile did not run.
    assert (tiny["eager MB"], tiny["ours ms"], tiny["compile ms"]) == ("-", "0.0200", "-")
    assert (tiny["compile/ours"], tiny["target"]) == ("-", "-")
    assert [line.count("|") for line in report.as_markdown(lines).split("\n")] == [len(lines[0]) + 1] * 4
    assert len(report.as_text(lines).split("\n")) == 3


def test_table_of_a_gpu(bench, make_row):
    report = bench("_report")
    failed = make_row(seconds={"eager": [0.5], "Liger": [0.2]}, targets={})
    launches = make_row(case="float32 1024", targets={}, host_bound=True)
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
    assert 0 < meter.time(step, [x], 1) < 1
    assert gpu.calls == [short, "record", "step", "record", "wait"]
    # The device woke before the host had queued the step: once more, with a longer sleep.
    gpu.calls.clear()
    gpu.awake = True
    meter.time(step, [x], 1)
    assert gpu.calls == [short, "record", "step", "record", long, "record", "step", "record", "wait"]
    # Launches are timed by the wall, many in a row.
    gpu.calls.clear()
    steps = meter.iterations(32 * 10, 1e-6)
    meter.time(step, [x], steps)
    assert meter.host_bound(32 * 10) and gpu.calls == ["wait", *["step"] * steps, "wait"]
    assert meter.peak(step, [x], 0) == 10**6 and meter.peak(step, [x], 2 * 10**6) == 0


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
    assert [(row["host_bound"], row["targets"]) for row in results["rows"]] == [(True, {})] * 2
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
    for loss in ("cross_entropy_rows", "linear_cross_entropy"):
        monkeypatch.setattr(bench(loss), "CUDA_CASES", [])
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
    run.measure(measure.Cpu(), row, case, losses, arguments, 1)
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
    peak = meter.peak(one_temporary, [x], 0)
    if peak is None:
        pytest.skip("no /proc/self/clear_refs here")
    assert abs(peak - x.nbytes) < 2**21
    assert meter.peak(in_place, [x], 0) < 2**21


def test_where_memory_is_limited_it_is_read_in_fresh_processes(bench, make_row, monkeypatch, capfd):
    run, module = bench("run"), bench("linear_cross_entropy")
    (case,) = module.QUICK
    row = make_row(loss="linear_cross_entropy", case=case.name)
    peak = run.peak_apart(row, "ours")
    if peak is not None or sys.platform == "linux":  # elsewhere there is no /proc
        assert abs(peak - 4 * case.elements) < 2**22  # one chunk
    assert run.peak_apart(row, "nobody") is None
    assert "nobody has no peak in linear_cross_entropy float32 512x512x8192" in capfd.readouterr().err
    small = module._case(8, 4, 9, memory=10**6)
    losses = {run.EAGER: module.EAGER, run.OURS: module.OURS}
    monkeypatch.setattr(run, "peak_apart", lambda row, name: f"{name} apart")
    row = make_row(peak_bytes={})
    run.measure(run.Cpu(), row, small, losses, small.arguments(torch.device("cpu")), 1)
    assert row.peak_bytes == {"ours": "ours apart", "eager": "eager apart"}


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


def test_a_row_with_a_floor_and_a_slow_peer(bench, tmp_path, monkeypatch):
    run, module, report = bench("run"), bench("linear_cross_entropy"), bench("_report")
    case = replace(module._case(64, 16, 500, speedup=1e-9, over_products=1e9), patience=0.02)

    def slow(**arguments):
        time.sleep(0.03)
        return module.EAGER(**arguments)

    monkeypatch.setattr(run, "LEAST_SECONDS", 0)
    monkeypatch.setattr(run, "plot_speed", lambda *_: None)
    monkeypatch.setattr(run, "plot_memory", lambda *_: None)
    monkeypatch.setattr(module, "CASES", [case])
    monkeypatch.setattr(module, "PEERS", {"cpu": {"slow": slow}})
    monkeypatch.setattr(bench("_measure"), "COPY_BYTES", 2**20)
    options = ["--loss", "linear_cross_entropy", "--no-compile", "--rounds", "3", "--out", str(tmp_path)]
    run.main(options)
    (row,) = json.loads((tmp_path / "results.json").read_text())["rows"]  # forward alone is not timed
    assert row["mode"] == "fwd+bwd" and row["flops"] == case.flops and row["gflop_s"] > 0
    assert row["gb_s"] is None and row["verdict"] == "pass"
    assert list(row["ms"]) == ["ours", "eager", "slow", report.FLOOR]
    assert len(row["rounds_ms"]["slow"]) == 1  # it had used up its time
    assert row["ratio"][report.FLOOR] == pytest.approx(row["ms"]["ours"] / row["ms"][report.FLOOR])
    assert set(row["peak_bytes"]) == {"ours", "eager", "slow"}


def test_what_is_a_loss(bench, tmp_path):
    (tmp_path / "loss.py").write_text("import nothing\n\nCASES: list = []\n")
    (tmp_path / "script.py").write_text("from mse import CASES\n\nprint(CASES)\n")
    assert bench("run").losses_of(tmp_path) == ["loss"]


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


def test_messages_of_a_sharded_vocabulary():
    options = ["--ranks", "2", "--rows", "64", "--features", "4", "--classes", "16", "--rounds", "1"]
    command = [sys.executable, str(BENCH / "vocab_parallel.py"), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in done.stdout.splitlines()[3:]]
    assert [row[:3] for row in rows] == [
        ["2", "lossops", "1 all_gather_into_tensor"],
        ["2", "loss_parallel", "3 all_reduce"],
        ["2", "linear head", "1 all_gather_into_tensor, 1 all_reduce"],
    ]
    # Three numbers a row and seven a message; three numbers a row, twice; and the gradient of 4 features.
    assert [row[3] for row in rows] == ["12.4", "12.0", "28.4"]
