import dataclasses
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lossops.plots import error_bars, loss_curve

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def ax(monkeypatch):
    pytest.importorskip("matplotlib").use("Agg")
    from matplotlib import pyplot
    from matplotlib.figure import Figure

    def forbidden(*args, **kwargs):
        raise AssertionError("pyplot was used although an Axes was given")

    monkeypatch.setattr(pyplot, "subplots", forbidden)
    monkeypatch.setattr(pyplot, "gca", forbidden)
    return Figure().subplots()


def line(ax, label):
    (found,) = [line for line in ax.lines if line.get_label().startswith(label)]
    return torch.tensor(found.get_xydata())


def bars(ax):
    """Positions, means, lower and upper ends, as drawn."""
    (container,) = ax.containers
    x, mean = torch.tensor(container.lines[0].get_xydata()).unbind(1)
    segments = container.lines[2][0].get_segments()
    ends = torch.tensor([segment[:, 1].tolist() for segment in segments], dtype=torch.float64)
    return x, mean, ends[:, 0], ends[:, 1]


# --------------------------------------------------------------------------------------------------
# loss_curve


def test_loss_curve_draws_mean_and_std_over_the_runs(ax):
    losses = torch.tensor([[4.0, 2.0, 5.0], [6.0, 3.0, 5.0], [5.0, 4.0, 5.0], [9.0, 3.0, 5.0]])
    assert loss_curve({"training": losses}, ax) is ax
    drawn = line(ax, "training")
    assert drawn[:, 0].tolist() == [1, 2, 3]
    assert drawn[:, 1].tolist() == losses.mean(0).tolist()
    (band,) = ax.collections
    vertices = torch.tensor(band.get_paths()[0].vertices)
    mean, std = losses.double().mean(0), losses.double().std(0, correction=0)
    for i in range(3):
        at_step = vertices[vertices[:, 0] == i + 1, 1]
        torch.testing.assert_close(at_step.min(), (mean - std)[i].clamp(min=losses[:, i].min()))
        torch.testing.assert_close(at_step.max(), (mean + std)[i])


def test_loss_curve_marks_the_lowest_mean_validation_loss(ax):
    # The lowest single loss is at step 4, the lowest mean at step 2, and training has a lower one.
    validation = [[3.0, 1.0, 2.0, 0.5], [3.0, 1.2, 2.0, 9.0]]
    loss_curve({"training": [[3.0, 0.4, 0.2, 0.1]], "validation": validation}, ax)
    assert line(ax, "lowest validation").tolist() == [[2, 1.1]]
    assert "lowest validation: 1.1 at epoch 2" in [t.get_text() for t in ax.get_legend().get_texts()]


def test_loss_curve_marks_the_curve_and_the_step_named(ax):
    loss_curve({"held out": [5.0, 4.0, 6.0]}, ax, lowest="held out", steps=[10, 20, 30], xlabel="iteration")
    assert line(ax, "lowest held out").tolist() == [[20, 4]]
    assert ax.get_xlabel() == "iteration"


def test_loss_curve_without_the_named_curve_has_no_mark(ax):
    loss_curve({"training": [[3.0, 1.0]]}, ax)
    assert [line.get_label() for line in ax.lines] == ["training"]


def test_loss_curve_marks_a_step_before_a_run_diverged(ax):
    nan, inf = float("nan"), float("inf")
    loss_curve({"validation": [[3.0, 2.0, inf, nan], [3.0, 2.0, 1.0, 0.5]]}, ax)
    assert line(ax, "lowest validation").tolist() == [[2, 2]]


def test_loss_curve_of_diverged_runs_only(ax):
    loss_curve({"validation": torch.full((2, 3), float("nan"))}, ax)
    assert line(ax, "validation").isnan().any()


def test_loss_curve_band_stays_positive_for_skewed_runs(ax):
    loss_curve({"training": [[1.0], [1.0], [1.0], [10.0]]}, ax)
    (band,) = ax.collections
    assert min(band.get_paths()[0].vertices[:, 1]) == 1


def test_loss_curve_of_one_run_has_no_band(ax):
    loss_curve({"training": torch.tensor([2.0, 1.0], requires_grad=True)}, ax)
    assert line(ax, "training")[:, 1].tolist() == [2, 1]
    assert not ax.collections


@pytest.mark.parametrize("losses", [torch.ones(2, 3, 4), torch.ones(0, 3), []])
def test_loss_curve_rejects_other_shapes(ax, losses):
    with pytest.raises(ValueError, match=r"loss_curve: expected 'training' of shape \(runs, steps\)"):
        loss_curve({"training": losses}, ax)


def test_loss_curve_rejects_steps_that_do_not_fit(ax):
    with pytest.raises(ValueError, match=r"expected steps of shape \(3,\).* 'training', got shape \(2,\)"):
        loss_curve({"training": torch.ones(2, 3)}, ax, steps=[1, 2])


# --------------------------------------------------------------------------------------------------
# error_bars


def test_error_bars_draws_mean_and_std_of_each_group(ax):
    groups = {"a": torch.tensor([4.0, 6.0, 5.0, 3.5]), "b": [[1.0, 2.0], [2.0, 1.0]], "c": (7.0,)}
    assert error_bars(groups, ax, xlabel="class", ylabel="nats") is ax
    x, mean, low, high = bars(ax)
    tensors = [torch.as_tensor(errors, dtype=torch.float64) for errors in groups.values()]
    expected_mean = torch.stack([t.mean() for t in tensors])
    expected_std = torch.stack([t.std(correction=0) for t in tensors])
    torch.testing.assert_close(mean, expected_mean)
    torch.testing.assert_close(high, expected_mean + expected_std)
    smallest = torch.stack([t.min() for t in tensors])
    torch.testing.assert_close(low, torch.maximum(expected_mean - expected_std, smallest))
    assert low[0] > 3.5  # a bar that is not cut off
    assert x.tolist() == [0, 1, 2]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["a", "b", "c"]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("class", "nats")


def test_error_bars_of_skewed_errors_end_at_the_smallest(ax):
    error_bars({"a": [0.25] * 9 + [10.0]}, ax)
    _, mean, low, _ = bars(ax)
    assert low.item() == 0.25 < mean.item()
    assert ax.get_ylim()[0] == 0


def test_error_bars_of_equal_errors_have_no_length(ax):
    error_bars({"a": [0.7] * 3}, ax)  # their mean is rounded to below them
    _, mean, low, high = bars(ax)
    torch.testing.assert_close(torch.stack([low, high]), mean.expand(2, 1))


def test_error_bars_shows_negative_errors(ax):
    error_bars({"a": [-2.0, 1.0], "b": [3.0, 4.0]}, ax)
    assert ax.get_ylim()[0] < -2


def test_error_bars_rejects_an_empty_group(ax):
    with pytest.raises(ValueError, match="expected errors in every group, got none in b, d"):
        error_bars({"a": [1.0], "b": [], "d": torch.empty(0, 3)}, ax)


# --------------------------------------------------------------------------------------------------
# matplotlib


@pytest.mark.parametrize("plot", [loss_curve, error_bars])
def test_missing_matplotlib_is_said_in_a_sentence(monkeypatch, plot):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match=r"needs matplotlib.*pip install 'lossops\[plots\]'"):
        plot({"a": [1.0]})


def test_matplotlib_is_imported_only_for_new_axes():
    code = "import lossops, lossops.plots, sys; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("plot", [loss_curve, error_bars])
def test_new_axes_without_ax(plot):
    pytest.importorskip("matplotlib").use("Agg")
    from matplotlib import pyplot

    ax = plot({"validation": [1.0, 2.0]})
    try:
        assert pyplot.gcf() is ax.figure
    finally:
        pyplot.close(ax.figure)


# --------------------------------------------------------------------------------------------------
# The demo


@pytest.fixture(scope="module")
def demo():
    pytest.importorskip("matplotlib").use("Agg")
    pytest.importorskip("sklearn")
    spec = importlib.util.spec_from_file_location("lossops_demo", ROOT / "examples" / "demo.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["lossops_demo"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["lossops_demo"]


@pytest.fixture
def short_demo(demo, monkeypatch):
    for name in ("digits", "diabetes"):
        task = dataclasses.replace(getattr(demo, name)(), epochs=2)
        monkeypatch.setattr(demo, name, lambda task=task: task)
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)  # the other tests' threads
    return demo


@pytest.mark.parametrize("name", ["digits", "diabetes"])
def test_demo_trains_alike_with_lossops_and_torch(demo, name):
    task = getattr(demo, name)()
    assert [type(loss).__module__.split(".")[0] for loss in task.losses.values()] == ["lossops", "torch"]
    results = demo.train_all(task, seeds=2, epochs=4)
    ours, theirs = (demo.curves(runs) for runs in results.values())
    for kind in ("training", "validation"):
        assert ours[kind].shape == (2, 4)
        torch.testing.assert_close(ours[kind], theirs[kind], rtol=1e-5, atol=1e-6)
        assert (ours[kind][:, -1] < ours[kind][:, 0]).all()
        assert not torch.equal(ours[kind][0], ours[kind][1])  # each seed is a training of its own
    assert demo.largest_difference(results) == (ours["training"] - theirs["training"]).abs().max()
    for a, b in zip(*results.values(), strict=True):
        torch.testing.assert_close(a.best_prediction, b.best_prediction, rtol=1e-4, atol=1e-4)


def test_demo_predicts_with_the_weights_of_the_lowest_validation_loss(demo):
    task = dataclasses.replace(demo.diabetes(), learning_rate=0.05)
    loss = task.losses["lossops"]
    run = demo.train(task, loss, seed=0, epochs=12)
    best = run.validation.index(min(run.validation)) + 1
    assert best < 12
    again = demo.train(task, loss, seed=0, epochs=best)
    assert torch.equal(run.best_prediction, again.last_prediction)
    assert not torch.equal(run.best_prediction, run.last_prediction)


def test_demo_draws_its_pictures_and_says_where(short_demo, monkeypatch, capsys, tmp_path):
    out = tmp_path / "a" / "b"
    monkeypatch.setattr(sys, "argv", ["demo.py", "--out", str(out), "--seeds", "1", "--no-bench"])
    short_demo.main()
    pictures = {"digits-loss.png", "digits-errors.png", "diabetes-loss.png", "diabetes-errors.png"}
    assert {path.name for path in out.iterdir()} == pictures
    assert capsys.readouterr().out.splitlines()[-1] == f"The pictures are in {out}"


@pytest.mark.parametrize(
    ("script", "sentence"),
    [
        ("import sys; sys.exit(3)", "demo: the quick benchmark failed with exit code 3"),
        ("", "demo: the quick benchmark ended without a chart"),
    ],
)
def test_demo_fails_with_its_benchmark(demo, monkeypatch, tmp_path, script, sentence):
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "run.py").write_text(script)
    monkeypatch.setattr(demo, "ROOT", tmp_path)
    with pytest.raises(SystemExit, match=sentence):
        demo.benchmark(tmp_path / "out")


def test_demo_says_where_the_chart_is(demo, monkeypatch, capsys, tmp_path):
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "run.py").write_text(
        "import pathlib, sys\n"
        "assert sys.argv[1:5] == ['--device', 'cpu', '--quick', '--out'], sys.argv\n"
        "pathlib.Path(sys.argv[5]).mkdir()\n"
        "pathlib.Path(sys.argv[5], 'speed.png').touch()\n"
    )
    monkeypatch.setattr(demo, "ROOT", tmp_path)
    demo.benchmark(tmp_path / "out")
    assert str(tmp_path / "out" / "speed.png") in capsys.readouterr().out
