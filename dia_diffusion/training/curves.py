"""The training curves of a run."""

from pathlib import Path


def save_curves(metrics: list[dict[str, float]], path: Path) -> None:
    """Training loss, held-out loss and learning rate over the steps, from the lines of a metrics.jsonl."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.5), layout="constrained")
    losses = figure.subplots()
    rate = losses.twinx()
    for axis, key, label, style in (
        (losses, "loss", "training loss", {"color": "tab:blue", "alpha": 0.35, "linewidth": 1}),
        (losses, "held_out_loss", "held-out loss", {"color": "tab:red", "marker": "o", "markersize": 4}),
        (rate, "learning_rate", "learning rate", {"color": "tab:gray", "linestyle": ":"}),
    ):
        points = [(line["step"], line[key]) for line in metrics if key in line]
        if points:
            axis.plot(*zip(*points, strict=True), label=label, **style)
    losses.set(xlabel="step", ylabel="mean squared error", yscale="log")
    rate.set(ylabel="learning rate", ylim=(0, None))
    handles = [axis.get_legend_handles_labels() for axis in (losses, rate)]
    losses.legend(handles[0][0] + handles[1][0], handles[0][1] + handles[1][1], loc="upper right")
    losses.grid(alpha=0.3)
    figure.savefig(path, dpi=120, format="png")
