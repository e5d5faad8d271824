"""Small VAEs for tests, as diffusers has them: one with random weights, and two that lose nothing."""

import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from torch import nn

KL = {
    "latent_channels": 2,
    "block_out_channels": (8, 8),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 4,
    "layers_per_block": 1,
}


def random_vae(channels=1, **arguments):
    """An AutoencoderKL that halves height and width."""
    torch.manual_seed(5)
    vae = AutoencoderKL(**{"in_channels": channels, "out_channels": channels} | KL | arguments)
    return vae.eval().requires_grad_(False)


def random_tiny(channels=1):
    """An AutoencoderTiny that halves height and width."""
    torch.manual_seed(6)
    blocks = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    counts = {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)}
    vae = AutoencoderTiny(channels, channels, latent_channels=2, **blocks, **counts)
    return vae.eval().requires_grad_(False)


class PatchVAE(AutoencoderKL):
    """An AutoencoderKL whose latents are the 2x2 patches of an image, turned by an orthogonal matrix: nothing is lost,
    and squared differences of latents are those of images."""

    def __init__(self, channels=1, **arguments):
        super().__init__(
            in_channels=channels, out_channels=channels, **KL | {"latent_channels": 4 * channels} | arguments
        )
        turn, _ = torch.linalg.qr(torch.randn(4 * channels, 4 * channels, generator=torch.Generator().manual_seed(3)))
        self.register_buffer("turn", turn)
        self.eval().requires_grad_(False)

    def _encode(self, x):
        mean = torch.einsum("ij,bjhw->bihw", self.turn, nn.functional.pixel_unshuffle(x, 2))
        return torch.cat([mean, torch.full_like(mean, -30)], dim=1)

    def _decode(self, z, return_dict=True):
        return _Decoded(nn.functional.pixel_shuffle(torch.einsum("ij,bihw->bjhw", self.turn, z), 2))


class _Decoded:
    def __init__(self, sample):
        self.sample = sample
