"""Plots of what a loss says: over the training, and over the samples.

Needs matplotlib: ``pip install 'lossops[plots]'``. Both functions draw into the Axes given, without
touching pyplot's state, or into a new pyplot figure where none is given.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from typing import TypeAlias

    import numpy as np
    from matplotlib.axes import Axes
    from numpy.typing import ArrayLike, NDArray

    Values: TypeAlias = ArrayLike | Tensor

__all__ = ["error_bars", "loss_curve"]


def loss_curve(
    curves: Mapping[str, Values],
    ax: Axes | None = None,
    *,
    lowest: str = "validation",
    steps: Values | None = None,
    xlabel: str = "epoch",
    ylabel: str = "loss",
) -> Axes:
    """Losses over the training: the mean over the runs, and their standard deviation as a band.

    Both curves high: under-fitting. Training loss falling while validation loss rises: over-fitting,
    which begins at the mark.

    Args:
        curves: for each name in the legend (``"training"``, ``"validation"``), losses of shape
            (runs, steps), or (steps) for one run; tensors, arrays or nested lists.
        ax: the Axes to draw into; a new pyplot figure if not given.
        lowest: the curve whose lowest mean is marked; no mark where ``curves`` has no such name.
        steps: where on the x axis the losses were taken; 1, 2, 3, ... if not given.
        xlabel, ylabel: of the axes.

    Returns:
        The Axes. The band reaches one (population) standard deviation to each side, but no further
        down than the lowest run: a skewed spread would otherwise show losses below zero, which a
        logarithmic axis cannot.

    Raises:
        ValueError: losses that are not of shape (runs, steps) with at least one of each, or not as
            many as ``steps``.
        ImportError: no ``ax``, and no matplotlib to make one with.
    """
    ax = _new_axes() if ax is None else ax
    import numpy as np

    for name, losses in curves.items():
        runs = np.atleast_2d(_array(losses))
        if runs.ndim != 2 or runs.size == 0:
            raise ValueError(
                f"loss_curve: expected {name!r} of shape (runs, steps), not empty, got shape {runs.shape}"
            )
        x = np.arange(1.0, runs.shape[1] + 1) if steps is None else _array(steps)
        if x.shape != runs.shape[1:]:
            raise ValueError(
                f"loss_curve: expected steps of shape {runs.shape[1:]}, one for each loss of {name!r}, "
                f"got shape {x.shape}"
            )
        mean, low, high = _mean_and_spread(runs)
        (line,) = ax.plot(x, mean, label=name, zorder=3)
        if len(runs) > 1:
            ax.fill_between(x, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
        if name == lowest:
            # A run that diverges ends in NaN, which argmin would pick.
            at = int(np.nan_to_num(mean, nan=np.inf).argmin())
            ax.axvline(x[at], color="0.5", linestyle=":", linewidth=1, zorder=1)
            ax.plot(
                x[at],
                mean[at],
                "o",
                color=line.get_color(),
                markeredgecolor="white",
                markersize=9,
                label=f"lowest {name}: {mean[at]:.3g} at {xlabel} {x[at]:.10g}",
                zorder=4,
            )
    ax.set_xlabel(xlabel)
    ax.set_ylabel(ylabel)
    ax.legend()
    return ax


def error_bars(
    errors_by_group: Mapping[str, Values],
    ax: Axes | None = None,
    *,
    xlabel: str = "group",
    ylabel: str = "error",
) -> Axes:
    """Mean and standard deviation of the samples' errors, group by group.

    Args:
        errors_by_group: for each group (a class, a range of the target), the errors of its samples,
            as a loss with ``reduction="none"`` gives them; tensors, arrays or lists of any shape.
        ax: the Axes to draw into; a new pyplot figure if not given.
        xlabel, ylabel: of the axes.

    Returns:
        The Axes. A bar reaches one (population) standard deviation to each side, but no further
        down than the smallest error of its group: squared errors and cross-entropies are skewed,
        and would otherwise seem to fall below zero.

    Raises:
        ValueError: a group without errors.
        ImportError: no ``ax``, and no matplotlib to make one with.
    """
    ax = _new_axes() if ax is None else ax
    groups = {name: _array(errors).reshape(-1, 1) for name, errors in errors_by_group.items()}
    empty = [name for name, errors in groups.items() if errors.size == 0]
    if empty:
        raise ValueError(f"error_bars: expected errors in every group, got none in {', '.join(empty)}")
    statistics = _array([_mean_and_spread(errors) for errors in groups.values()]).reshape(-1, 3)
    mean, low, high = statistics.T
    ax.errorbar(
        range(len(groups)),
        mean,
        yerr=[mean - low, high - mean],
        fmt="o",
        markersize=7,
        capsize=5,
        linewidth=1.5,
    )
    ax.set_xticks(range(len(groups)), list(groups))
    ax.margins(x=0.08)
    if groups and (low >= 0).all():
        ax.set_ylim(bottom=0)
    ax.grid(axis="y", alpha=0.3)
    ax.set_xlabel(xlabel)
    ax.set_ylabel(ylabel)
    return ax


def _mean_and_spread(values: NDArray[np.float64]) -> tuple[NDArray[np.float64], ...]:
    """Mean over the first dimension, and the ends of one standard deviation to each side of it."""
    import numpy as np

    with np.errstate(invalid="ignore"):  # infinite losses of a diverged run: their spread is NaN
        mean, std = values.mean(0), values.std(0)
        # The mean of equal numbers may be rounded to below them, and errorbar takes no negative length.
        low = np.minimum(mean, np.maximum(mean - std, values.min(0)))
    return mean, low, mean + std


def _array(values: Values) -> NDArray[np.float64]:
    import numpy as np

    if isinstance(values, Tensor):
        values = values.detach().to("cpu", torch.float64).numpy()
    return np.asarray(values, dtype=np.float64)


def _new_axes() -> Axes:
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError(
            "lossops.plots: needs matplotlib, which is not installed; run pip install 'lossops[plots]'"
        ) from error
    return plt.subplots(layout="constrained")[1]
