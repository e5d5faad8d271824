"""This trainer with DIA against the trainer of denoising-diffusion-pytorch, alternating between processes.

The same images of 32x32 pixels, batch and learning rate, with gradient clipping and an exponential moving average of
the weights on both sides, in float32. The UNets cannot be the same: each has three levels of widths 64, 128 and 128,
but the peer's has attention at every level. Parameters and operations of each are printed too. Ratios are of speeds,
so more than 1 is faster than the peer.

    make peers                                # the peer's own environment: a CUDA build of torch, 4 GiB
    python benchmarks/peer_training.py [--rounds N] [--output RESULT.json]
"""

import contextlib
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from measuring import alternate, count_flops, read_arguments, row, save_result, serve_rounds, spread, start_workers

PYTHON = Path(__file__).parent.parent / ".venv-peers" / "bin" / "python"
OURS, PEER = "this trainer, DIA", "denoising-diffusion-pytorch"
SIZE, STEPS_A_ROUND = "32x32", 2


def size_of(unet: nn.Module) -> list[int]:
    """Parameters of a UNet, and floating point operations of its forward pass for an image."""
    with torch.no_grad():
        flops = count_flops(lambda: unet(torch.zeros(1, 3, 32, 32), torch.zeros(1)))
    return [sum(parameter.numel() for parameter in unet.parameters()), flops]


def make_our_round() -> Callable[[], list[int]]:
    """Steps of this trainer. A round gives what `size_of` gives."""
    from attention_cost import SIZES
    from dia_diffusion import DIAUNet2DModel
    from dia_diffusion.data.preparation import prepare_pixels
    from dia_diffusion.process.startup import tune_process
    from training_throughput import RESOLUTION, make_images, this_trainer

    tune_process()
    arguments, batch_size, _ = SIZES[SIZE]
    data = prepare_pixels(make_images(), RESOLUTION)
    loop = this_trainer(data, arguments, batch_size, "no", "lstm", [], use_ema=True)
    size = size_of(DIAUNet2DModel(**arguments))

    def run_round() -> list[int]:
        for _ in range(STEPS_A_ROUND):
            next(loop)
        return size

    return run_round


def make_peer_round(folder: Path, batch_size: int) -> Callable[[], list[int]]:
    """Steps of the peer, on the images in a folder. Runs in the peer's environment."""
    from denoising_diffusion_pytorch import GaussianDiffusion, Trainer, Unet

    unet = Unet(dim=64, dim_mults=(1, 2, 2))
    size = size_of(unet)
    diffusion = GaussianDiffusion(unet, image_size=32, timesteps=1000)
    with contextlib.redirect_stdout(sys.stderr):
        trainer = Trainer(
            diffusion,
            str(folder),
            train_batch_size=batch_size,
            train_lr=1e-4,
            train_num_steps=0,
            save_and_sample_every=10**9,
            calculate_fid=False,
            results_folder=str(folder / "results"),
        )

    def run_round() -> list[int]:
        trainer.train_num_steps += STEPS_A_ROUND
        # It reports on standard output, where a worker gives its answers.
        with contextlib.redirect_stdout(sys.stderr):
            trainer.train()
        return size

    return run_round


def measure(rounds: int) -> list[dict]:
    """The rows of both trainers."""
    from attention_cost import SIZES
    from training_throughput import make_images

    batch_size = SIZES[SIZE][1]
    with tempfile.TemporaryDirectory() as folder:
        for number, example in enumerate(make_images()):
            example["image"].save(Path(folder) / f"{number:04}.png")
        sides = {OURS: [OURS], PEER: [PEER, folder, str(batch_size)]}
        with start_workers(__file__, sides, interpreters={PEER: PYTHON}) as runs:
            sizes: dict[str, list[int]] = {}
            times = alternate(
                {side: lambda s=side, run=run: sizes.update({s: run()}) for side, run in runs.items()}, rounds
            )
    rows = []
    for side in (PEER, OURS):
        ratio = spread(times[PEER], times[side]) if side == OURS else None
        speed = batch_size * STEPS_A_ROUND / statistics.median(times[side])
        case = f"training, {SIZE}, batch {batch_size}, {side}"
        rows.append(row(case, speed, "images/s", f"speed of {PEER}", ratio))
        parameters, flops = sizes[side]
        rows.append(row(f"{case}, parameters", parameters / 1e6, "million"))
        rows.append(row(f"{case}, forward pass", flops / 1e9, "GFLOP an image"))
    return rows


def main() -> int:
    if sys.argv[1:2] == ["--side"]:
        side, *arguments = sys.argv[2:]
        serve_rounds(make_our_round() if side == OURS else make_peer_round(Path(arguments[0]), int(arguments[1])))
        return 0
    options = read_arguments(__doc__, "peer_training", rounds=7)
    if not PYTHON.exists():
        print("The peer is not installed, so it is not measured: make peers.")
        return 0
    listed = subprocess.run([PYTHON, "-m", "pip", "freeze"], capture_output=True, text=True, check=True).stdout.split()
    wanted = Path(__file__).with_name("peers.txt").read_text().split()
    missing = [name for name in wanted if name not in listed]
    if missing:
        raise SystemExit(f"the peer's environment lacks {', '.join(missing)}: make peers")
    save_result(options.output, measure(options.rounds), peers=wanted)
    return 0


if __name__ == "__main__":
    sys.exit(main())
