"""Measure the cost of latents: encoding a data set once, and a training step, in operations and bytes.

    python benchmarks/latents.py [--dataset NAME] [--resolution 32] [--output RESULT.json]

The VAE has random weights, which cost what others cost: three levels of 32, 64 and 64 channels, latents of a quarter of
the height and width. The operations are counted on tensors that have a shape and no values: a training step of the UNet
that `train_unet.py` takes by default, on 256x256 pixels and on their 32x32 latents of four channels, and one encoding
by a VAE with the levels of Stable Diffusion's.
"""

import resource
import tempfile
import time
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DModel

from dia_diffusion.data.preparation import prepare_pixels
from dia_diffusion.data.sources import DIGITS, load_dataset_splits
from dia_diffusion.latents.encoding import encode_images
from dia_diffusion.process.startup import tune_process
from dia_diffusion.training.architecture import default_architecture
from measuring import count, count_flops, read_arguments, row, save_result

SMALL = (32, 64, 64)
# The widths of Stable Diffusion's VAE, which halves height and width three times.
LARGE = (128, 256, 512, 512)


def make_vae(widths: tuple[int, ...], layers: int) -> AutoencoderKL:
    levels = len(widths)
    return AutoencoderKL(
        block_out_channels=widths,
        layers_per_block=layers,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
    ).eval()


def measure_encoding(dataset: str, resolution: int) -> list[dict]:
    """Measure time, memory and disk of encoding all images of a data set."""
    torch.manual_seed(0)
    vae = make_vae(SMALL, layers=1).requires_grad_(False)
    seconds, images, size = 0.0, 0, 0
    with tempfile.TemporaryDirectory() as cache:
        splits = [split for split in load_dataset_splits(dataset) if split is not None]
        pixels = [prepare_pixels(split, resolution, channels=3, cache_dir=cache) for split in splits]
        before = _peak()
        for part in pixels:
            start = time.perf_counter()
            rows = encode_images(vae, part, cache_dir=cache)
            seconds += time.perf_counter() - start
            images += len(rows)
        size = sum(path.stat().st_size for path in Path(cache, "dia_latents").rglob("*.arrow"))
        grown = _peak() - before
    case = f"{images:,} images of {resolution}x{resolution}"
    return [
        row(f"encoding {case}", seconds, "s"),
        row("the same, images a second", images / seconds, "images/s"),
        row("the same, memory beside what was there", grown / 2**20, "MiB"),
        row("the same, disk", size / 2**20, "MiB"),
    ]


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def count_operations() -> list[dict]:
    """Count billions of floating-point operations (a multiply-add is two) for an image."""
    pixels, latents = _step(256, 3), _step(32, 4)
    with torch.device("meta"):
        vae = make_vae(LARGE, layers=2)
        image, latent = torch.zeros(1, 3, 256, 256), torch.zeros(1, 4, 32, 32)
    with torch.no_grad():
        encoding, decoding = count_flops(lambda: vae.encode(image)), count_flops(lambda: vae.decode(latent))
    return [
        row("training step, an image of 256x256 pixels", pixels / 1e9, "GFLOP"),
        row("training step, its latents of 4x32x32", latents / 1e9, "GFLOP"),
        row("encoding of an image of 256x256, once", encoding / 1e9, "GFLOP"),
        row("decoding of an image of 256x256", decoding / 1e9, "GFLOP"),
    ]


def _step(resolution: int, channels: int) -> int:
    with torch.device("meta"):
        size = {"sample_size": resolution, "in_channels": channels, "out_channels": channels}
        unet = UNet2DModel(**default_architecture(resolution) | size)
        sample, timestep = torch.zeros(1, channels, resolution, resolution), torch.zeros(1)
    return count_flops(lambda: unet(sample, timestep).sample.sum().backward())


def main() -> None:
    dataset = {"default": DIGITS, "help": "as train_unet.py --dataset_name (default: digits)"}
    size = {"type": count, "default": 32}
    options = read_arguments(__doc__, "latents", **{"--dataset": dataset, "--resolution": size})
    tune_process()
    save_result(options.output, measure_encoding(options.dataset, options.resolution) + count_operations())


if __name__ == "__main__":
    main()
