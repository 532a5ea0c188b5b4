"""Learning curves as pictures."""

from __future__ import annotations

import json
import math
from pathlib import Path


def learning_curve(metrics: Path, picture: Path, title: str) -> None:
    """Draw loss and perplexity, training and validation, over tokens, from a metrics.jsonl."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [json.loads(line) for line in metrics.read_text("utf-8").splitlines()]
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for axis, name, value in ((axes[0], "loss (nats per token)", float), (axes[1], "perplexity", math.exp)):
        for key, label, style in (("loss", "train", "-"), ("eval_loss", "valid", "o--")):
            points = [(row["tokens"] / 1e6, value(row[key])) for row in rows if key in row]
            if points:
                axis.plot(*zip(*points, strict=True), style, label=label, markersize=4)
        axis.set_xlabel("million tokens")
        axis.set_ylabel(name)
        axis.grid(alpha=0.3)
        axis.legend()
    axes[1].set_yscale("log")
    figure.suptitle(title)
    figure.savefig(picture, dpi=110)
    pyplot.close(figure)
