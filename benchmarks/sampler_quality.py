"""Fréchet distance against the number of model evaluations, for several samplers on one model.

The distance is that of `dia evaluate`, in the features of the digits; the floor is that of the held-out images. Each of
these samplers evaluates the model once a step.

    python benchmarks/sampler_quality.py [MODEL] [--num_images N] [--output RESULT.json] [--picture PICTURE.png]

MODEL is the folder or the Hub id of a pipeline, by default what `make demo` leaves.
"""

import argparse
import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, ScalarFormatter

from dia_diffusion.data.preparation import prepare_pixels
from dia_diffusion.data.sources import load_images
from dia_diffusion.errors import UsageError
from dia_diffusion.process.startup import tune_process
from dia_diffusion.sampling.loading import load_pipeline
from dia_diffusion.sampling.schedulers import make_scheduler
from dia_diffusion.scoring.evaluation import evaluate
from dia_diffusion.scoring.features.named import get_extractor
from dia_diffusion.scoring.images import PipelineImages
from measuring import RESULTS, count, row, save_result

ROOT = Path(__file__).parent.parent
DATA = "digits"
SAMPLERS = {"ddim": "DDIM", "dpm": "DPM-Solver++", "dpm_sde": "DPM-Solver++, stochastic", "unipc": "UniPC"}
STEPS = (5, 10, 15, 25, 50)
BATCH = 250


def measure(model: str, num_images: int, device: str) -> tuple[dict[str, list[dict]], dict]:
    """The points of each sampler's curve, and the floor."""
    pipeline = load_pipeline(model, device=device)
    unet, config = pipeline.unet.config, pipeline.scheduler.config
    train, held_out = (prepare_pixels(split, unet.sample_size, unet.in_channels) for split in load_images(DATA))
    extractor = get_extractor(DATA).to(device)
    curves: dict[str, list[dict]] = {name: [] for name in SAMPLERS}
    for name in SAMPLERS:
        for steps in STEPS:
            pipeline.scheduler = make_scheduler(name, config)
            images = PipelineImages(pipeline, num_images, steps)
            scores = evaluate(images, train, extractor, ("fid",), held_out, BATCH)
            curves[name].append({"evaluations": steps, "fid": scores["fid"], "fid_interval": scores["fid_interval"]})
    return curves, {key: scores["floor"][key] for key in ("fid", "num_images")}


def draw(curves: dict[str, list[dict]], floor: dict, path: Path) -> None:
    """A curve for each sampler, with the 95% intervals, and the floor as a line."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for (name, points), marker in zip(curves.items(), "osD^", strict=True):
        evaluations, distances = ([point[key] for point in points] for key in ("evaluations", "fid"))
        bounds = [point["fid_interval"] or (point["fid"],) * 2 for point in points]
        # A distance is not below zero, but the interval of one near zero can be.
        low = [max(0.0, min(d - bound[0], 0.9 * d)) for d, bound in zip(distances, bounds, strict=True)]
        high = [max(0.0, bound[1] - d) for d, bound in zip(distances, bounds, strict=True)]
        axes.errorbar(
            evaluations, distances, yerr=[low, high], label=SAMPLERS[name], marker=marker, markersize=5, capsize=2
        )
    label = f"floor ({floor['num_images']} held-out images)"
    axes.axhline(floor["fid"], color="tab:gray", linestyle=":", label=label)
    axes.set(xlabel="model evaluations", ylabel="Fréchet distance", xscale="log", yscale="log")
    axes.set_xticks(STEPS)
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "model", nargs="?", default=str(ROOT / "runs" / "digits"), help="folder or Hub id of a pipeline"
    )
    parser.add_argument("--num_images", type=count, default=2000, help="for each point of the curves (default: 2000)")
    parser.add_argument("--output", type=Path, default=RESULTS / "sampler_quality.json", help="JSON file")
    parser.add_argument("--picture", type=Path, default=RESULTS / "samplers.png", help="where the picture goes")
    options = parser.parse_args()
    tune_process()
    try:
        curves, floor = measure(options.model, options.num_images, "cuda" if torch.cuda.is_available() else "cpu")
    except UsageError as error:
        print(f"error: {error} `make demo` trains a model.", file=sys.stderr)
        return 2
    rows = [
        row(f"{SAMPLERS[name]}, {point['evaluations']} evaluations", point["fid"], "Fréchet distance")
        for name, points in curves.items()
        for point in points
    ]
    save_result(options.output, rows, floor=floor, curves=curves, num_images=options.num_images)
    draw(curves, floor, options.picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
