"""A loss function at work: lossops beside torch.nn, trained on real data that scikit-learn ships.

A loss function measures how far a model's predictions are from the truth, as one number: the lower,
the better. It stands between the two halves of a training step. The forward pass turns inputs into
predictions; the loss scores them; the backward pass carries the loss's gradient back through the
model, and so tells the optimiser which way to move each weight.

The target decides which loss:

- a quantity (regression): mean squared error, the mean of (prediction - truth)^2, in which an error
  twice as large counts four times;
- a class (classification): cross-entropy, -log(the probability that the model gives to the true
  class), which is 0 for certain and right, and grows without bound for certain and wrong.

    python examples/demo.py --out demo-output
"""

from __future__ import annotations

import argparse
import copy
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_diabetes, load_digits
from torch import Tensor, nn
from tqdm import tqdm

import lossops
from lossops.plots import error_bars, loss_curve

ROOT = Path(__file__).resolve().parent.parent
BARS = "mean and standard deviation\n(bars cut off at the group's smallest error)"


@dataclass
class Task:
    """What there is to learn, and the same loss from both libraries."""

    name: str
    description: str
    features: Tensor
    target: Tensor
    outputs: int
    losses: dict[str, nn.Module]
    score_name: str
    score: Callable[[Tensor, Tensor], float]
    learning_rate: float
    batch_size: int
    epochs: int


@dataclass
class Run:
    """What one training leaves: its curves, and predictions for samples it has never seen."""

    training: list[float] = field(default_factory=list)
    validation: list[float] = field(default_factory=list)
    held_out: Tensor = field(default_factory=lambda: torch.empty(0))
    best_prediction: Tensor = field(default_factory=lambda: torch.empty(0))
    last_prediction: Tensor = field(default_factory=lambda: torch.empty(0))


# ------------------------------------------------------------------------------------------------
# The tasks


def digits() -> Task:
    data = load_digits()
    return Task(
        name="digits",
        description=f"{len(data.target)} images of 8x8 pixels, 10 classes",
        features=torch.tensor(data.data, dtype=torch.float32) / 16,
        target=torch.tensor(data.target),
        # One logit a class. Both libraries take logits: cross-entropy includes the softmax.
        outputs=10,
        losses={"lossops": lossops.CrossEntropyLoss(), "torch.nn": nn.CrossEntropyLoss()},
        score_name="accuracy",
        score=lambda logits, target: (logits.argmax(1) == target).double().mean().item(),
        learning_rate=3e-3,
        batch_size=64,
        epochs=60,
    )


def diabetes() -> Task:
    data = load_diabetes(scaled=False)
    return Task(
        name="diabetes",
        description=f"{len(data.target)} patients, progression of the disease after one year in points",
        features=torch.tensor(data.data, dtype=torch.float32),
        # A column, like the model's output: (N,) against (N, 1) would broadcast to (N, N).
        target=torch.tensor(data.target, dtype=torch.float32).unsqueeze(1),
        outputs=1,
        losses={"lossops": lossops.MSELoss(), "torch.nn": nn.MSELoss()},
        score_name="R2",
        # The share of the target's variance that the model explains: 1 is perfect, 0 is the mean.
        score=lambda output, target: 1 - (lossops.mse_loss(output, target) / target.var(correction=0)).item(),
        learning_rate=5e-4,
        batch_size=32,
        epochs=200,
    )


# ------------------------------------------------------------------------------------------------
# Training: model family, loss, optimiser


def train(
    task: Task, loss: nn.Module, seed: int, epochs: int, on_epoch: Callable[[], object] = lambda: None
) -> Run:
    """Trains on 60 % of the samples, validates on 20 %, and predicts the 20 % held out.

    The seed decides split, initial weights and order of the batches, and nothing else is random:
    two losses that compute the same give the same curves.
    """
    torch.manual_seed(seed)
    order = torch.randperm(len(task.target))
    training, validation, held_out = order.tensor_split([len(order) * 6 // 10, len(order) * 8 // 10])

    x, y, center, scale = task.features, task.target, torch.tensor(0.0), torch.tensor(1.0)
    if y.is_floating_point():
        # Statistics of the training samples only: the others must stay unseen. With a target of
        # variance 1, a loss of 1 is what predicting the mean costs.
        x = (x - x[training].mean(0)) / x[training].std(0)
        center, scale = y[training].mean(), y[training].std()
        y = (y - center) / scale

    # 1. The model family: which functions the training may choose from.
    model = nn.Sequential(
        nn.Linear(x.shape[1], 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, task.outputs)
    )
    # 2. The loss, an argument of this function: which of them is best.
    # 3. The optimiser: how to get there.
    optimizer = torch.optim.Adam(model.parameters(), lr=task.learning_rate)

    run = Run(held_out=held_out)
    best_state = copy.deepcopy(model.state_dict())
    for _ in range(epochs):
        for batch in training[torch.randperm(len(training))].split(task.batch_size):
            optimizer.zero_grad()
            loss(model(x[batch]), y[batch]).backward()
            optimizer.step()
        with torch.no_grad():
            run.training.append(loss(model(x[training]), y[training]).item())
            run.validation.append(loss(model(x[validation]), y[validation]).item())
        if run.validation[-1] == min(run.validation):
            best_state = copy.deepcopy(model.state_dict())
        on_epoch()

    # The training loss goes on falling while the model learns its samples by heart; the validation
    # loss tells when. Early stopping keeps the weights from before.
    with torch.no_grad():
        run.last_prediction = model(x[held_out]) * scale + center
        model.load_state_dict(best_state)
        run.best_prediction = model(x[held_out]) * scale + center
    return run


def train_all(task: Task, seeds: int, epochs: int) -> dict[str, list[Run]]:
    """A run for each library and seed: one seed's difference may be luck, the spread tells."""
    with tqdm(total=len(task.losses) * seeds * epochs, desc=task.name, unit="epoch", disable=None) as bar:
        return {
            library: [train(task, loss, seed, epochs, bar.update) for seed in range(seeds)]
            for library, loss in task.losses.items()
        }


def curves(runs: list[Run]) -> dict[str, Tensor]:
    """Losses of shape (seeds, epochs)."""
    return {
        "training": torch.tensor([run.training for run in runs], dtype=torch.float64),
        "validation": torch.tensor([run.validation for run in runs], dtype=torch.float64),
    }


def largest_difference(results: dict[str, list[Run]]) -> float:
    """Between the two libraries' training curves, over all seeds and epochs."""
    ours, theirs = (curves(runs)["training"] for runs in results.values())
    return (ours - theirs).abs().max().item()


def report(task: Task, results: dict[str, list[Run]]) -> None:
    """Prints losses and scores, each as its mean and standard deviation over the seeds."""

    def over_seeds(values: list[float]) -> str:
        numbers = torch.tensor(values, dtype=torch.float64)
        return f"{numbers.mean():8.4f} +/- {numbers.std(correction=0):.4f}"

    heads = [
        "training loss",
        "validation loss",
        f"{task.score_name} at the end",
        f"{task.score_name}, stopped early",
    ]
    print(f"{'':10}" + "".join(f"{head:>26}" for head in heads))
    for library, runs in results.items():
        columns = [
            [run.training[-1] for run in runs],
            [run.validation[-1] for run in runs],
            [task.score(run.last_prediction, task.target[run.held_out]) for run in runs],
            [task.score(run.best_prediction, task.target[run.held_out]) for run in runs],
        ]
        print(f"{library:10}" + "".join(f"{over_seeds(column):>26}" for column in columns))
    difference = largest_difference(results)
    print(f"largest difference between the two training curves, all seeds and epochs: {difference:.1e}")


# ------------------------------------------------------------------------------------------------
# Pictures


def draw_losses(task: Task, results: dict[str, list[Run]], path: Path, ylabel: str, log: bool) -> None:
    seeds = len(results["lossops"])
    figure = Figure(figsize=(8, 5), layout="constrained")
    ax = loss_curve(curves(results["lossops"]), figure.subplots(), ylabel=ylabel)
    if log:
        ax.set_yscale("log")
    ax.set_title(f"{task.name}: loss after each epoch, mean and standard deviation over the seeds ({seeds})")
    save(figure, path)


def draw_digits_errors(task: Task, runs: list[Run], path: Path) -> None:
    logits = torch.cat([run.best_prediction for run in runs])
    target = torch.cat([task.target[run.held_out] for run in runs])
    # "none" leaves out the last step, the mean: one error a sample, to see where the model fails.
    errors = lossops.cross_entropy(logits, target, reduction="none")
    groups = {str(digit): errors[target == digit] for digit in range(10)}

    figure = Figure(figsize=(8, 5), layout="constrained")
    ax = error_bars(groups, figure.subplots(), xlabel="true digit", ylabel="cross-entropy of a sample (nats)")
    ax.set_title(f"digits: held-out samples by class, {BARS}")
    save(figure, path)


def draw_diabetes_errors(task: Task, runs: list[Run], path: Path) -> None:
    output = torch.cat([run.best_prediction for run in runs])
    target = torch.cat([task.target[run.held_out] for run in runs])
    squared = lossops.mse_loss(output, target, reduction="none")
    absolute = (output - target).abs()

    edges = task.target.quantile(torch.linspace(0, 1, 6)).tolist()
    labels = [f"{low:.0f} to {high:.0f}" for low, high in pairwise(edges)]
    group = torch.bucketize(target, torch.tensor(edges[1:-1]))

    figure = Figure(figsize=(11, 5), layout="constrained")
    figure.suptitle(f"diabetes: held-out samples by fifths of the target, {BARS}")
    for ax, errors, ylabel in zip(
        figure.subplots(1, 2),
        (absolute, squared),
        ("absolute error of a sample (points)", "squared error of a sample (points²)"),
        strict=True,
    ):
        groups = {label: errors[group == i] for i, label in enumerate(labels)}
        error_bars(groups, ax, xlabel="true progression (points)", ylabel=ylabel)
    save(figure, path)


def save(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=120)
    print(f"wrote {path}")


# ------------------------------------------------------------------------------------------------


def benchmark(out: Path) -> None:
    """Draws the speed chart with the quick benchmark, in a process of its own."""
    print("\n== Speed: the quick benchmark (about a minute)", flush=True)
    command = [
        sys.executable,
        str(ROOT / "bench" / "run.py"),
        "--device",
        "cpu",
        "--quick",
        "--out",
        str(out),
    ]
    code = subprocess.run(command).returncode
    if code != 0:
        raise SystemExit(f"demo: the quick benchmark failed with exit code {code}; its output is above")
    if not (out / "speed.png").is_file():
        raise SystemExit(f"demo: the quick benchmark ended without a chart in {out / 'speed.png'}")
    print(f"wrote {out / 'speed.png'}")


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {number}")
    return number


def main() -> None:
    parser = argparse.ArgumentParser(description="Train with lossops and with torch.nn, and draw the losses.")
    parser.add_argument("--out", type=Path, default=Path("demo-output"), help="directory for the pictures")
    parser.add_argument("--seeds", type=positive, default=5, help="runs of each training (default: 5)")
    parser.add_argument("--no-bench", action="store_true", help="leave out the benchmark and its chart")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    # The models are so small that handing work to a second thread costs more than it saves.
    torch.set_num_threads(1)

    task = digits()
    print(f"== {task.name}: {task.description}; cross-entropy, {args.seeds} seeds", flush=True)
    results = train_all(task, args.seeds, task.epochs)
    report(task, results)
    draw_losses(task, results, args.out / "digits-loss.png", "cross-entropy (nats)", log=True)
    draw_digits_errors(task, results["lossops"], args.out / "digits-errors.png")

    task = diabetes()
    print(f"\n== {task.name}: {task.description}; mean squared error, {args.seeds} seeds", flush=True)
    results = train_all(task, args.seeds, task.epochs)
    report(task, results)
    ylabel = "mean squared error (in variances of the target)"
    draw_losses(task, results, args.out / "diabetes-loss.png", ylabel, log=False)
    draw_diabetes_errors(task, results["lossops"], args.out / "diabetes-errors.png")

    if not args.no_bench:
        benchmark(args.out / "bench")
    print(f"\nThe pictures are in {args.out.resolve()}")


if __name__ == "__main__":
    main()
