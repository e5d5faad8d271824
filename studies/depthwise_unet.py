"""A small UNet of convolutions that are 1x1 or depthwise 3x3, with adaptive norms, after DiCo (Ai et al. 2025, arXiv
2505.11196): what mixes channels sees one pixel, and what sees neighbours mixes no channels."""

from itertools import pairwise
from types import SimpleNamespace

import torch
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor, nn

EMBEDDING = 128


class CompactChannelAttention(nn.Module):
    """DiCo's own: a map of each block's, `sigmoid(W mean(x))`, of one C x C matrix."""

    def __init__(self, channels: int):
        super().__init__()
        self.map = nn.Linear(channels, channels)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden * self.map(hidden.mean((2, 3))).sigmoid()[:, :, None, None]


class DepthwiseBlock(nn.Module):
    """Two residual branches, each modulated by the embedding of the timestep and closed at first (adaLN-Zero, Peebles
    and Xie 2023): depthwise convolution between two of 1x1, and a network of two layers at each pixel.

    `mixed` is the place of the channel attention: what the depthwise convolution gives, `(B, C, H, W)`.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.norms = nn.ModuleList(nn.GroupNorm(1, channels, affine=False) for _ in range(2))
        self.modulation = nn.Linear(EMBEDDING, 6 * channels)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)
        self.enter, self.leave = nn.Conv2d(channels, channels, 1), nn.Conv2d(channels, channels, 1)
        self.depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.mixed = nn.GELU()
        # `attach` reads the width there.
        self.mixed.out_channels = channels
        self.attention = nn.Identity()
        widen, narrow = nn.Conv2d(channels, 2 * channels, 1), nn.Conv2d(2 * channels, channels, 1)
        self.pointwise = nn.Sequential(widen, nn.GELU(), narrow)

    def forward(self, hidden: Tensor, embedding: Tensor) -> Tensor:
        parts = self.modulation(embedding)[:, :, None, None].chunk(6, dim=1)
        branch = self.norms[0](hidden) * (1 + parts[0]) + parts[1]
        branch = self.leave(self.attention(self.mixed(self.depthwise(self.enter(branch)))))
        hidden = hidden + parts[2] * branch
        branch = self.pointwise(self.norms[1](hidden) * (1 + parts[3]) + parts[4])
        return hidden + parts[5] * branch


class DepthwiseUNet(nn.Module):
    """Called as diffusers' UNet2DModel is, with images `(B, C, R, R)`, timesteps and labels.

    Args:
        channels (`int`): Of the images.
        classes (`int`, *optional*): Class embeddings, that of "no class" included.
        widths (sequence of `int`), depth (`int`): Channels of each level, and blocks of each on the way down and up.
    """

    def __init__(self, channels: int, classes: int | None, widths: tuple[int, ...] = (64, 96, 128), depth: int = 1):
        super().__init__()
        self.config = SimpleNamespace(dropout=0.0)
        self.embedding = nn.Sequential(nn.Linear(EMBEDDING, EMBEDDING), nn.SiLU(), nn.Linear(EMBEDDING, EMBEDDING))
        self.classes = None if classes is None else nn.Embedding(classes, EMBEDDING)
        self.first = nn.Conv2d(channels, widths[0], 3, padding=1)
        blocks = lambda width: nn.ModuleList(DepthwiseBlock(width) for _ in range(depth))  # noqa: E731
        pairs = list(pairwise(widths))
        self.down = nn.ModuleList(map(blocks, widths[:-1]))
        self.shrink = nn.ModuleList(nn.Conv2d(narrow, wide, 2, stride=2) for narrow, wide in pairs)
        self.middle = blocks(widths[-1])
        self.grow = nn.ModuleList(nn.ConvTranspose2d(wide, narrow, 2, stride=2) for narrow, wide in reversed(pairs))
        self.join = nn.ModuleList(nn.Conv2d(2 * narrow, narrow, 1) for narrow in reversed(widths[:-1]))
        self.up = nn.ModuleList(map(blocks, reversed(widths[:-1])))
        self.last = nn.Sequential(nn.GroupNorm(1, widths[0]), nn.SiLU(), nn.Conv2d(widths[0], channels, 3, padding=1))

    def forward(self, sample: Tensor, timestep: Tensor, class_labels: Tensor | None = None) -> UNet2DOutput:
        timestep = torch.as_tensor(timestep, device=sample.device).expand(len(sample))
        embedding = self.embedding(get_timestep_embedding(timestep, EMBEDDING, flip_sin_to_cos=True))
        if self.classes is not None:
            embedding = embedding + self.classes(class_labels)
        embedding = nn.functional.silu(embedding)

        def through(blocks: nn.ModuleList, hidden: Tensor) -> Tensor:
            for block in blocks:
                hidden = block(hidden, embedding)
            return hidden

        hidden, skips = self.first(sample), []
        for blocks, shrink in zip(self.down, self.shrink, strict=True):
            skips.append(through(blocks, hidden))
            hidden = shrink(skips[-1])
        hidden = through(self.middle, hidden)
        for grow, join, blocks in zip(self.grow, self.join, self.up, strict=True):
            hidden = through(blocks, join(torch.cat([grow(hidden), skips.pop()], dim=1)))
        return UNet2DOutput(sample=self.last(hidden))

    def add_own_attention(self) -> list[nn.Module]:
        """Gives each block DiCo's attention, without another draw for the weights that are there, and returns them."""
        blocks = [module for module in self.modules() if isinstance(module, DepthwiseBlock)]
        for block in blocks:
            block.attention = CompactChannelAttention(block.mixed.out_channels)
        return [block.attention for block in blocks]

    def places(self) -> list[str]:
        """Names of the places of channel attention, in order of execution."""
        rooms = [*(f"down.{n}" for n in range(len(self.down))), "middle", *(f"up.{n}" for n in range(len(self.up)))]
        return [f"{room}.{n}.mixed" for room in rooms for n in range(len(self.get_submodule(room)))]
