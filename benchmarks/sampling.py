"""Images a second of DIAUNetPipeline with DIA on against diffusers' pipelines with the plain UNet, at equal steps.

Theirs as they come, DDPMPipeline and DDIMPipeline; ours with the same weights and scheduler, and DIA added. Both are
saved and loaded, ours as `dia sample` loads it. Ratios are of images a second, so more than 1 is faster than theirs.

    python benchmarks/sampling.py [--rounds N] [--output RESULT.json]

On a GPU where there is one.
"""

import statistics
import sys
import tempfile
from pathlib import Path

import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler, DiffusionPipeline, UNet2DModel
from tqdm.auto import tqdm

from attention_cost import SIZES
from dia_diffusion import DIAUNet2DModel, DIAUNetPipeline
from dia_diffusion.sampling import load_pipeline
from measuring import alternate, read_arguments, row, save_result, spread

PEERS = {"DDPM": (DDPMPipeline, DDPMScheduler), "DDIM": (DDIMPipeline, DDIMScheduler)}
STEPS = 5


def make_pipelines(size: str, peer: str, device: str) -> tuple[DiffusionPipeline, DiffusionPipeline]:
    """Theirs and ours, loaded from a folder each."""
    torch.manual_seed(0)
    unet = UNet2DModel(**SIZES[size][0])
    pipeline_class, scheduler_class = PEERS[peer]
    with tempfile.TemporaryDirectory() as folder:
        theirs, ours = Path(folder, "theirs"), Path(folder, "ours")
        pipeline_class(unet, scheduler_class()).save_pretrained(theirs)
        DIAUNetPipeline(DIAUNet2DModel.from_unet(unet), scheduler_class()).save_pretrained(ours)
        pipelines = pipeline_class.from_pretrained(theirs).to(device), load_pipeline(str(ours), device=device)
    for pipeline in pipelines:
        pipeline.set_progress_bar_config(disable=True)
    return pipelines


def measure(
    size: str, peer: str, rounds: int, device: str, batch: int | None = None, dtype: torch.dtype | None = None
) -> list[dict]:
    """The rows of a size and a peer."""
    batch = batch or SIZES[size][1]
    theirs, ours = make_pipelines(size, peer, device)

    def sample(pipeline: DiffusionPipeline) -> None:
        generator = torch.Generator(device).manual_seed(0)
        with torch.autocast(device, dtype, enabled=dtype is not None):
            pipeline(batch_size=batch, num_inference_steps=STEPS, generator=generator, output_type="np")

    times = alternate({"theirs": lambda: sample(theirs), "ours": lambda: sample(ours)}, rounds)
    speeds = {name: batch / statistics.median(seconds) for name, seconds in times.items()}
    case = f"sampling, {size}, {STEPS} steps"
    return [
        row(f"{case}, {peer}Pipeline", speeds["theirs"], "images/s"),
        row(
            f"{case}, DIA, {peer}",
            speeds["ours"],
            "images/s",
            f"speed of {peer}Pipeline",
            spread(times["theirs"], times["ours"]),
        ),
    ]


def main() -> int:
    options = read_arguments(__doc__, "sampling", rounds=15)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = []
    for size in tqdm(SIZES, desc="Sizes"):
        for peer in PEERS:
            rows += measure(size, peer, options.rounds, device)
    save_result(options.output, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
