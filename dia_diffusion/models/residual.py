"""The residual blocks of diffusers with a gate on the residual branch."""

import torch
from diffusers.models.resnet import ResnetBlock2D, ResnetBlockCondNorm2D
from torch import Tensor

from ..attention.sharing import AttentionState, SharedAttention


class GatedResnet:
    """A residual block `S(x) + F(x)` that computes `S(x) + F(x) * gate` in one pass (arXiv 2210.16101, eq. 2)."""

    def forward(
        self, hidden_states: Tensor, temb: Tensor, attention: SharedAttention | None, state: AttentionState | None
    ) -> tuple[Tensor, AttentionState | None]:
        shortcut, branch = hidden_states, self.nonlinearity(self._first_norm(hidden_states, temb))
        resample = self.upsample or self.downsample
        if resample is not None:
            shortcut, branch = resample(shortcut), resample(branch)
        branch = self._second_norm(self.conv1(branch), temb)
        branch = self.conv2(self.dropout(self.nonlinearity(branch)))
        if self.conv_shortcut is not None:
            shortcut = self.conv_shortcut(shortcut)

        if attention is None:
            output = shortcut + branch
        else:
            gate, state = attention(branch, state)
            output = torch.addcmul(shortcut, branch, gate)
        return output if self.output_scale_factor == 1 else output / self.output_scale_factor, state


class DIAResnetBlock2D(GatedResnet, ResnetBlock2D):
    def _first_norm(self, hidden_states: Tensor, temb: Tensor) -> Tensor:
        return self.norm1(hidden_states)

    def _second_norm(self, hidden_states: Tensor, temb: Tensor) -> Tensor:
        time = self.time_emb_proj(temb if self.skip_time_act else self.nonlinearity(temb))[:, :, None, None]
        if self.time_embedding_norm == "scale_shift":
            scale, shift = time.chunk(2, dim=1)
            return self.norm2(hidden_states) * (1 + scale) + shift
        return self.norm2(hidden_states + time)


class DIAResnetBlockCondNorm2D(GatedResnet, ResnetBlockCondNorm2D):
    def _first_norm(self, hidden_states: Tensor, temb: Tensor) -> Tensor:
        return self.norm1(hidden_states, temb)

    def _second_norm(self, hidden_states: Tensor, temb: Tensor) -> Tensor:
        return self.norm2(hidden_states, temb)
