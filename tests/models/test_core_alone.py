"""`attach` with nothing but torch and diffusers beside the package."""

from environments import run_python, without

CODE = """
import torch
from diffusers import UNet2DConditionModel
from dia_diffusion import attach, detach

unet = UNet2DConditionModel(
    block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, attention_head_dim=4, cross_attention_dim=12,
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
)
inputs = torch.randn(2, 4, 8, 8), 10, torch.randn(2, 5, 12)
expected = unet(*inputs).sample
dia = attach(unet)
assert torch.equal(unet(*inputs).sample, expected)
unet.requires_grad_(False)
dia.requires_grad_(True)
unet(*inputs).sample.square().mean().backward()
assert all(parameter.grad is not None for parameter in dia.parameters())
for parameter in dia.parameters():
    torch.nn.init.normal_(parameter, std=0.3)
gated = unet(*inputs).sample
assert not torch.allclose(gated, expected)
dia.save_pretrained(sys.argv[1])
detach(unet)
assert torch.equal(unet(*inputs).sample, expected)
attach(unet, pretrained=sys.argv[1])
assert torch.equal(unet(*inputs).sample, gated)
loaded = {name.split(".")[0] for name, module in sys.modules.items() if module is not None}
print(sorted(loaded & set(BLOCKED)))
"""


def test_attaching_needs_neither_accelerate_nor_datasets_nor_transformers(tmp_path):
    blocked = ("accelerate", "datasets", "transformers", "torchmetrics", "sklearn", "matplotlib", "peft")
    assert run_python(without(blocked) + CODE, tmp_path).strip() == "[]"
    for name in blocked[:3]:
        assert "ModuleNotFoundError" in run_python(without([name]) + f"import {name}", status=1)
