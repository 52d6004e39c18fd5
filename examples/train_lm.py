"""A small language model trained without its logits, and once more with them.

A causal language model predicts every next token of a text: its head gives each position one logit for each
token of the vocabulary, and cross-entropy scores them. With a vocabulary of 16384 the logits are by far the
largest tensor of a training step. `lossops.functional.linear_cross_entropy` takes the place of the head
(`F.linear`) and of the loss (`F.cross_entropy`) and makes only a chunk of the logits at a time.

The text is on every machine: the sources of Python's standard library, cut into tokens by a byte-pair
vocabulary that is trained on them. Both trainings start from the same seed and see the same batches, so their
curves have to agree but for rounding. Each runs in a process of its own, whose peak memory is then its own;
the two take turns.

    python examples/train_lm.py --out demo-output/lm

Exits with an error where the curves differ by more than TOLERANCE.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import platform
import statistics
import sysconfig
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from tqdm import tqdm

import lossops
from lossops.plots import loss_curve

WIDTH, HEADS, BLOCKS = 128, 4, 2
SEQUENCES, LENGTH = 16, 128  # of a batch
VALIDATION_BATCHES = 2
CURVE_POINTS = 20  # how often a training stops to look at the held-out files
LEARNING_RATE, WARM_UP = 1e-3, 20
SEED = 0
END_OF_FILE = "<|end of file|>"

# How far the two curves may be apart, in nats. Sums in another order differ by a rounding of the loss, some
# 1e-6, and at this learning rate that is all: over 200 steps they were never more than 2e-6 apart. At three
# times the rate training itself amplifies any rounding, up to 0.07 at step 200; torch against torch drifts
# apart as fast there (seen with a vocabulary of 2048), with initial weights that are off by 1e-7.
TOLERANCE = 1e-3

# ------------------------------------------------------------------------------------------------
# The contenders: from what the last block leaves, (batch, length, width), to the loss


def with_lossops(hidden: Tensor, head: Tensor, tokens: Tensor) -> Tensor:
    """Position t is scored against the token at t + 1: `shift` says so, and the last position has none."""
    return lossops.functional.linear_cross_entropy(hidden, head, tokens, shift=True)


def with_torch(hidden: Tensor, head: Tensor, tokens: Tensor) -> Tensor:
    """The same, and all the logits. (Cutting the last position off `hidden` spares a copy of them.)"""
    logits = F.linear(hidden[:, :-1], head)
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


CONTENDERS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "lossops.functional.linear_cross_entropy": with_lossops,
    "F.linear + F.cross_entropy": with_torch,
}
OURS, THEIRS = CONTENDERS

# ------------------------------------------------------------------------------------------------
# The text


class Text(NamedTuple):
    """Tokens, and how many different ones there are."""

    vocabulary: int
    training: Tensor
    validation: Tensor


def standard_library(limit: int | None) -> tuple[list[str], list[str]]:
    """The sources of this Python's standard library, without its tests: every tenth file is held out."""
    root = Path(sysconfig.get_path("stdlib"))
    left_out = {"test", "tests", "site-packages", "dist-packages"}
    paths = sorted(
        path for path in root.rglob("*.py") if not left_out.intersection(path.relative_to(root).parts)
    )[:limit]
    if len(paths) < 10:
        raise SystemExit(f"train_lm: expected at least 10 Python files in {root}, found {len(paths)}")
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in paths]
    held_out = texts[9::10]
    del texts[9::10]
    return texts, held_out


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> Tokenizer:
    """A byte-pair encoding: beginning with single bytes, the most frequent pair becomes a token of its own,
    again and again."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_FILE],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, texts: list[str], name: str) -> Tensor:
    end = tokenizer.token_to_id(END_OF_FILE)
    tokens: list[int] = []
    for text in tqdm(texts, desc=f"encoding, {name}", unit="file", disable=None):
        tokens += tokenizer.encode(text).ids
        tokens.append(end)
    if len(tokens) < LENGTH:
        raise SystemExit(f"train_lm: expected at least {LENGTH} tokens for {name}, got {len(tokens)}")
    return torch.tensor(tokens)


# ------------------------------------------------------------------------------------------------
# The model, without its head: that is the contenders' part


class LanguageModel(nn.Module):
    def __init__(self, vocabulary: int, tied: bool) -> None:
        super().__init__()
        self.token = nn.Embedding(vocabulary, WIDTH)
        self.position = nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                WIDTH,
                HEADS,
                4 * WIDTH,
                dropout=0.0,
                activation=F.gelu,
                batch_first=True,
                norm_first=True,
            )
            for _ in range(BLOCKS)
        )
        self.norm = nn.LayerNorm(WIDTH)
        self.head = self.token if tied else nn.Linear(WIDTH, vocabulary, bias=False)
        for module in (self.token, self.position, self.head):
            nn.init.normal_(module.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        length = tokens.shape[1]
        # Nobody looks ahead.
        mask = nn.Transformer.generate_square_subsequent_mask(length)
        x = self.token(tokens) + self.position.weight[:length]
        for block in self.blocks:
            x = block(x, src_mask=mask, is_causal=True)
        return self.norm(x)


# ------------------------------------------------------------------------------------------------
# The trainings, each in a process of its own


@dataclass
class Run:
    """What one training leaves."""

    parameters: int = 0
    training: list[float] = field(default_factory=list)  # of every step's batch
    steps: list[int] = field(default_factory=list)  # after which there was a validation
    validation: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)  # of every step
    peak: float = 0.0  # MB beyond what the process held before its first step

    def training_means(self) -> list[float]:
        """The batches' mean loss between one validation and the next: single batches are noise."""
        starts = [0, *self.steps]
        return [
            statistics.fmean(self.training[start:end])
            for start, end in zip(starts, self.steps, strict=False)  # the last start has no end
        ]


def memory(name: str) -> float:
    """A line of this process's status, in MB: VmRSS is what it holds now, VmHWM the most that it held.

    Not getrusage, whose peak a process inherits from the one that started it.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        key, _, value = line.partition(":")
        if key == name:
            return int(value.removesuffix("kB")) * 1024 / 1e6
    raise SystemExit(f"train_lm: /proc/self/status has no {name}")


def windows(tokens: Tensor, starts: Tensor) -> Tensor:
    return tokens[starts.unsqueeze(1) + torch.arange(LENGTH)]


class Training:
    def __init__(self, contender: str, text_path: Path, tied: bool) -> None:
        # The seed decides the initial weights and the batches, and nothing else is random.
        torch.manual_seed(SEED)
        self.random = torch.Generator().manual_seed(SEED)
        self.loss_function = CONTENDERS[contender]
        self.text = Text(**torch.load(text_path))
        self.model = LanguageModel(self.text.vocabulary, tied)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=LEARNING_RATE, fused=True)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: min(1.0, (step + 1) / WARM_UP)
        )
        last_start = len(self.text.validation) - LENGTH
        starts = torch.linspace(0, last_start, VALIDATION_BATCHES * SEQUENCES).long()
        self.held_out = starts.split(SEQUENCES)
        self.run = Run(sum(p.numel() for p in self.model.parameters()))
        self.memory_before = memory("VmRSS")
        with contextlib.suppress(OSError):  # without the right to: the peak of the imports is lower anyway
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew

    def loss(self, batch: Tensor) -> Tensor:
        return self.loss_function(self.model(batch), self.model.head.weight, batch)

    def step(self) -> float:
        last_start = len(self.text.training) - LENGTH
        starts = torch.randint(last_start + 1, (SEQUENCES,), generator=self.random)
        loss = self.loss(windows(self.text.training, starts))
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        return loss.item()

    def advance(self, last: int) -> Run:
        """Trains up to the step `last`, and looks at the held-out files after it."""
        run = self.run
        while len(run.training) < last:
            began = time.perf_counter()
            run.training.append(self.step())
            run.seconds.append(time.perf_counter() - began)
        with torch.no_grad():
            losses = [self.loss(windows(self.text.validation, starts)).item() for starts in self.held_out]
        run.validation.append(statistics.fmean(losses))
        run.steps.append(last)
        run.peak = memory("VmHWM") - self.memory_before
        return run


training_here: Training  # of this process, where it is one of those that train


def begin(*arguments: Any) -> None:
    global training_here
    training_here = Training(*arguments)


def advance(last: int) -> Run:
    return training_here.advance(last)


def train_in_turn(text_path: Path, tied: bool, steps: int) -> dict[str, Run]:
    """A process for each contender (no fork, which would begin with this one's memory). They take turns, so
    that whatever else the machine does slows down both."""
    spawn = multiprocessing.get_context("spawn")
    interval = -(-steps // CURVE_POINTS)
    runs: dict[str, Run] = {}
    with (
        contextlib.ExitStack() as stack,
        tqdm(total=len(CONTENDERS) * steps, desc="training", unit="step", disable=None) as bar,
    ):
        processes = {
            contender: stack.enter_context(ProcessPoolExecutor(1, spawn, begin, (contender, text_path, tied)))
            for contender in CONTENDERS
        }
        for first in range(0, steps, interval):
            last = min(first + interval, steps)
            for contender, process in processes.items():
                runs[contender] = process.submit(advance, last).result()
                bar.update(last - first)
    return runs


# ------------------------------------------------------------------------------------------------
# What comes of it


def differences(ours: list[float], theirs: list[float]) -> Tensor:
    return (torch.tensor(ours, dtype=torch.float64) - torch.tensor(theirs, dtype=torch.float64)).abs()


def report(runs: dict[str, Run], logits: float) -> None:
    heads = ["training loss", "validation loss", "ms per step", "peak memory, MB"]
    print(f"{'':42}" + "".join(f"{head:>17}" for head in heads))
    for contender, run in runs.items():
        values = [
            f"{run.training_means()[-1]:.4f}",
            f"{run.validation[-1]:.4f}",
            f"{1e3 * statistics.median(run.seconds):.0f}",
            f"{run.peak:.0f}",
        ]
        print(f"{contender:42}" + "".join(f"{value:>17}" for value in values))
    ours, theirs = runs[OURS], runs[THEIRS]
    time_ratio = statistics.median(ours.seconds) / statistics.median(theirs.seconds)
    print(
        "Losses in nats a token, at the end; the median step; the process's peak memory beyond what it held\n"
        f"before its first step, of a model of {ours.parameters / 1e6:.1f} million parameters.\n"
        f"The logits alone, once, are {logits:.0f} MB. lossops peaks at {ours.peak / theirs.peak:.0%} of "
        f"torch's memory, in {time_ratio:.0%} of its time."
    )


def check(runs: dict[str, Run]) -> None:
    """Says how far the curves are apart, and ends the program where that is too far."""
    ours, theirs = runs[OURS], runs[THEIRS]
    training = differences(ours.training, theirs.training).max()
    validation = differences(ours.validation, theirs.validation).max()
    print(
        f"largest difference between the two trainings, over all {len(ours.training)} steps: "
        f"training loss {training:.1e}, validation loss {validation:.1e}"
    )
    # torch's maximum, for which a NaN is the largest of all
    if not torch.maximum(training, validation) <= TOLERANCE:
        raise SystemExit(f"train_lm: the curves differ by more than {TOLERANCE}: not the same training")
    print(f"The two curves are the same within rounding (a difference up to {TOLERANCE} is allowed).")


def draw_losses(runs: dict[str, Run], path: Path) -> None:
    ours, theirs = runs[OURS], runs[THEIRS]
    figure = Figure(figsize=(12, 5), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[3, 2])
    curves = {
        f"training, mean of {ours.steps[0]} batches": ours.training_means(),
        "validation": ours.validation,
    }
    loss_curve(curves, left, steps=ours.steps, xlabel="step", ylabel="cross-entropy (nats a token)")
    for values in (theirs.training_means(), theirs.validation):
        (crosses,) = left.plot(theirs.steps, values, "kx", markersize=5, zorder=5)
    crosses.set_label("both, with F.linear + F.cross_entropy")
    left.legend(loc="upper right")
    left.set_title("Losses with linear_cross_entropy (lines), and with torch (crosses)")

    x = range(1, len(ours.training) + 1)
    right.semilogy(x, differences(ours.training, theirs.training), ".", markersize=4, label="training")
    right.semilogy(ours.steps, differences(ours.validation, theirs.validation), "o", label="validation")
    right.axhline(TOLERANCE, color="0.5", linestyle="--", label="tolerance")
    right.set_ylim(1e-7, max(10 * TOLERANCE, right.get_ylim()[1]))
    right.set_xlabel("step")
    right.set_ylabel("difference of the losses (nats a token)")
    right.set_title("How far they are apart (where not equal)")
    right.legend(loc="center right")
    save(figure, path)


def draw_memory(runs: dict[str, Run], logits: float, path: Path) -> None:
    figure = Figure(figsize=(8, 5), layout="constrained")
    ax = figure.subplots()
    bars = ax.bar(list(runs), [run.peak for run in runs.values()], width=0.5, color=["C0", "0.6"])
    ax.bar_label(bars, fmt="%.0f MB", padding=3)
    ax.axhline(logits, color="C3", linestyle="--", label=f"the logits alone, once: {logits:.0f} MB")
    ax.margins(y=0.15)
    ax.set_ylabel("peak beyond what the process held before (MB)")
    ax.set_title("Peak memory of the training's process, with gradients and Adam's state")
    ax.legend(loc="upper left")
    save(figure, path)


def save(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=120)
    print(f"wrote {path}")


# ------------------------------------------------------------------------------------------------


def at_least(least: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"expected at least {least}, got {text}")
        return int(text)

    return number


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Train a small language model with linear_cross_entropy and with torch's head and loss: "
        "curves, time per step and peak memory."
    )
    parser.add_argument("--out", type=Path, default=Path("demo-output/lm"), help="directory for the pictures")
    parser.add_argument(
        "--steps",
        type=at_least(1),
        default=200,
        help="of each training (default: 200; rounding grows with every step)",
    )
    parser.add_argument("--vocab", type=at_least(300), default=16384, help="tokens (default: 16384)")
    parser.add_argument("--tied", action="store_true", help="the head is the embedding")
    parser.add_argument("--files", type=at_least(10), help="of the standard library (default: all)")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    # Threads that spin while they wait take much time from each other where the cores are shared.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

    began = time.perf_counter()
    training, held_out = standard_library(args.files)
    print(
        f"== Text: {len(training)} files of the standard library of Python {platform.python_version()} "
        f"({sum(map(len, training)) / 1e6:.1f} million characters), and {len(held_out)} held out",
        flush=True,
    )
    tokenizer = train_tokenizer(training, args.vocab)
    text = Text(
        tokenizer.get_vocab_size(),
        encode(tokenizer, training, "training"),
        encode(tokenizer, held_out, "held out"),
    )
    cache = args.out / "tokens.pt"
    torch.save(text._asdict(), cache)
    print(
        f"== A byte-pair vocabulary of {text.vocabulary} tokens: {len(text.training)} tokens to train on, "
        f"{len(text.validation)} held out ({time.perf_counter() - began:.0f} s)",
        flush=True,
    )

    print(
        f"== Training twice, {args.steps} steps of {SEQUENCES} x {LENGTH} tokens in float32: "
        f"width {WIDTH}, {BLOCKS} blocks, {'tied' if args.tied else 'untied'} head",
        flush=True,
    )
    runs = train_in_turn(cache, args.tied, args.steps)
    logits = SEQUENCES * (LENGTH - 1) * text.vocabulary * 4 / 1e6
    report(runs, logits)
    draw_losses(runs, args.out / "lm-loss.png")
    draw_memory(runs, logits, args.out / "lm-memory.png")
    check(runs)
    print(f"\nThe pictures are in {args.out.resolve()}")


if __name__ == "__main__":
    main()
