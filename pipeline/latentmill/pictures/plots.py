"""Plots with matplotlib, which is an extra."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from latentmill.errors import ConfigError
from latentmill.pictures.colours import DIVERGING

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_latent(
    latent: npt.NDArray[Any], level_db: npt.NDArray[np.float32] | None, seconds: float, title: str
) -> Figure:
    """Plot the level, if it is known, above the latent, on one axis of time."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("plot needs matplotlib: pip install 'latentmill[plots]'.")
    from matplotlib import pyplot
    from matplotlib.colors import ListedColormap

    values = latent if latent.ndim == 2 else np.concatenate(list(latent), axis=1)
    values = values.astype(np.float32)
    ratios = [3] if level_db is None else [1, 3]
    figure, axes = pyplot.subplots(
        len(ratios), sharex=True, squeeze=False, layout="constrained", height_ratios=ratios
    )
    if level_db is not None:
        times = np.arange(len(level_db)) * seconds / len(level_db)
        axes[0, 0].plot(times, np.maximum(level_db, -90), linewidth=0.8)
        axes[0, 0].set_ylabel("level, dBFS")
    limit = float(np.quantile(abs(values), 0.99)) or 1.0
    image = axes[-1, 0].imshow(
        values,
        aspect="auto",
        cmap=ListedColormap(DIVERGING / 255),
        vmin=-limit,
        vmax=limit,
        extent=(0, seconds, len(values) - 0.5, -0.5),
        interpolation="nearest",
    )
    axes[-1, 0].set(xlabel="time, s", ylabel="channel")
    figure.colorbar(image, ax=axes[-1, 0])
    figure.suptitle(title, parse_math=False)
    return figure
