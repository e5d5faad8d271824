"""The residual block of diffusers, gated in one pass."""

import torch
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor

from ..attention.hooks import Gate


class FusedResnetBlock2D(ResnetBlock2D):
    """A `ResnetBlock2D` that computes `S(x) + F(x) * gate` (arXiv 2210.16101, eq. 2) in one pass over the features.

    It has the weights and the signature of diffusers' block, and gives the same output where it has no gate. A hook
    that gates its `conv2` would do the same, slower: `benchmarks/attention_cost.py` has the figures.
    """

    gate: Gate | None = None

    def forward(self, input_tensor: Tensor, temb: Tensor | None, *args: object, **kwargs: object) -> Tensor:
        """Maps features `(B, C, H, W)` and a time embedding to features. Further arguments are ignored, as diffusers
        ignores them."""
        shortcut, branch = input_tensor, self.nonlinearity(self.norm1(input_tensor))
        resample = self.upsample or self.downsample
        if resample is not None:
            shortcut, branch = resample(shortcut), resample(branch)
        branch = self._second_norm(self.conv1(branch), temb)
        branch = self.conv2(self.dropout(self.nonlinearity(branch)))
        if self.conv_shortcut is not None:
            shortcut = self.conv_shortcut(shortcut)

        gate = None if self.gate is None else self.gate(branch)
        output = shortcut + branch if gate is None else torch.addcmul(shortcut, branch, gate)
        return output if self.output_scale_factor == 1 else output / self.output_scale_factor

    def _second_norm(self, branch: Tensor, temb: Tensor | None) -> Tensor:
        if self.time_emb_proj is None:
            return self.norm2(branch)
        time = self.time_emb_proj(temb if self.skip_time_act else self.nonlinearity(temb))[:, :, None, None]
        if self.time_embedding_norm == "scale_shift":
            scale, shift = time.chunk(2, dim=1)
            return self.norm2(branch) * (1 + scale) + shift
        return self.norm2(branch + time)
