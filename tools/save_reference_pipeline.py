"""Save a tiny pipeline with random weights, and images from it, for the test that old files load.

python tools/save_reference_pipeline.py tests/data/pipeline-0.1.0
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from diffusers import DDIMScheduler

from dia_diffusion import DIAUNet2DModel, DIAUNetPipeline


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where to save")
    folder = parser.parse_args().folder
    torch.manual_seed(0)
    unet = DIAUNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(4, 8),
        layers_per_block=1,
        norm_num_groups=2,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        num_class_embeds=3,
        dia_hidden_size=4,
        dia_bridge="skip",
    ).eval()
    for decoder in unet.dia.decoders.values():
        # A fresh model's gates are all 1.
        torch.nn.init.normal_(decoder.weight)
    pipeline = DIAUNetPipeline(unet, DDIMScheduler())
    pipeline.save_pretrained(folder)
    images = pipeline(
        batch_size=2,
        num_inference_steps=4,
        generator=torch.Generator().manual_seed(0),
        class_labels=[0, 1],
        guidance_scale=2.0,
        output_type="np",
    ).images
    np.save(folder / "images.npy", images)


if __name__ == "__main__":
    main()
