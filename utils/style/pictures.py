"""The picture of a token's training."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure


def plot_training(path: str | Path, loss_history: list[float], health: dict) -> None:
    """Write a picture with the training loss over the steps and the fixed-noise losses with and without the token."""
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    curve, bars = figure.subplots(1, 2, width_ratios=[2, 1])
    window = max(1, len(loss_history) // 40)
    smooth = np.convolve(loss_history, np.ones(window) / window, mode="valid")
    curve.plot(np.arange(1, len(loss_history) + 1), loss_history, color="0.8", linewidth=0.8)
    curve.plot(np.arange(window, len(loss_history) + 1), smooth, color="tab:blue", label=f"mean of {window} steps")
    curve.set(xlabel="step", ylabel="denoising loss", title="training")
    curve.legend()
    arms = ["no_token", "untrained_token", "trained_token"]
    values = [health[f"loss_{arm}"] for arm in arms]
    bars.bar([arm.replace("_", "\n") for arm in arms], values, color=["0.8", "0.6", "tab:blue"])
    bars.bar_label(bars.containers[0], fmt="%.3f")
    bars.margins(y=0.12)  # room for the figures above the bars
    bars.set(title=f"{health['num_images']} {health['images']},\nfixed noise", ylabel="denoising loss")
    figure.savefig(path, dpi=120)
