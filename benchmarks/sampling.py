"""Images a second with DIA on against diffusers' pipelines with the plain UNet, alternating between processes.

Theirs as they come, DDPMPipeline and DDIMPipeline; ours with the same weights, scheduler and steps, and DIA added: once
as DIAUNetPipeline in Python, and once as `dia sample` runs it, which arranges memory and weights for
speed. Ratios are of images a second, so more than 1 is faster than theirs.

    python benchmarks/sampling.py [--rounds N] [--output RESULT.json]

On a GPU where there is one.
"""

import statistics
import sys
import tempfile

import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler, DiffusionPipeline, UNet2DModel
from tqdm.auto import tqdm

from attention_cost import SIZES
from dia_diffusion import DIAUNet2DModel, DIAUNetPipeline
from dia_diffusion.process.startup import tune_process
from dia_diffusion.sampling.loading import load_pipeline
from measuring import alternate, read_arguments, row, save_result, serve_rounds, spread, start_workers

PEERS = {"DDPM": (DDPMPipeline, DDPMScheduler), "DDIM": (DDIMPipeline, DDIMScheduler)}
THEIRS, OURS, COMMAND, COMPILED = "theirs", "DIAUNetPipeline", "dia sample", "dia sample --compile"
STEPS = 5


def make_pipeline(side: str, size: str, peer: str) -> DiffusionPipeline:
    """Make the pipeline of a side, loaded from a folder as its users do."""
    torch.manual_seed(0)
    unet = UNet2DModel(**SIZES[size][0])
    peer_class, scheduler_class = PEERS[peer]
    with tempfile.TemporaryDirectory() as folder:
        if side == THEIRS:
            peer_class(unet, scheduler_class()).save_pretrained(folder)
            return peer_class.from_pretrained(folder)
        DIAUNetPipeline(DIAUNet2DModel.from_unet(unet), scheduler_class()).save_pretrained(folder)
        if side == OURS:
            return DIAUNetPipeline.from_pretrained(folder)
        return load_pipeline(folder, compile_mode="default" if side == COMPILED else None)


def work(side: str, size: str, peer: str, batch: int, precision: str, steps: int) -> None:
    """Measure one side, in a process of its own."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if side in (COMMAND, COMPILED):
        tune_process()
    pipeline = make_pipeline(side, size, peer).to(device)
    pipeline.set_progress_bar_config(disable=True)

    def sample() -> None:
        generator = torch.Generator(device).manual_seed(0)
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
            pipeline(batch_size=batch, num_inference_steps=steps, generator=generator, output_type="np")

    serve_rounds(sample)


def measure(
    size: str,
    peer: str,
    rounds: int,
    batch: int | None = None,
    precision: str = "no",
    steps: int = STEPS,
    compiled: bool = False,
) -> list[dict]:
    """Return the rows of a size and a peer.

    Args:
        size, peer (`str`): One of `attention_cost.SIZES`, and one of `PEERS`.
        rounds (`int`): Rounds of the alternation.
        batch (`int`, *optional*): Images in a batch, by default those of the size.
        precision (`str`, *optional*, defaults to `"no"`): `bf16` for autocast.
        steps (`int`, *optional*, defaults to 5): Evaluations of the UNet for an image.
        compiled (`bool`, *optional*, defaults to `False`): Whether to measure `dia sample --compile`, too.
    """
    batch = batch or SIZES[size][1]
    names = (THEIRS, OURS, COMMAND, *([COMPILED] if compiled else []))
    sides = {side: [side, size, peer, str(batch), precision, str(steps)] for side in names}
    with start_workers(__file__, sides) as runs:
        times = alternate(runs, rounds)
    case = f"sampling, {size}, batch {batch}, {steps} steps"
    speeds = {side: batch / statistics.median(seconds) for side, seconds in times.items()}
    rows = [row(f"{case}, {peer}Pipeline", speeds[THEIRS], "images/s")]
    for side in names[1:]:
        ratio = spread(times[THEIRS], times[side])
        rows.append(
            row(f"{case}, {side} with DIA, {peer}", speeds[side], "images/s", f"speed of {peer}Pipeline", ratio)
        )
    return rows


def main() -> int:
    if sys.argv[1:2] == ["--side"]:
        side, size, peer, batch, precision, steps = sys.argv[2:]
        work(side, size, peer, int(batch), precision, int(steps))
        return 0
    options = read_arguments(__doc__, "sampling", rounds=9)
    cases = [(size, peer) for size in SIZES for peer in PEERS]
    rows = [line for size, peer in tqdm(cases, desc="Cases") for line in measure(size, peer, options.rounds)]
    save_result(options.output, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
