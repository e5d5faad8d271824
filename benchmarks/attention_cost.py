"""Measure the cost of attention: training step and forward pass of UNets with DIA, and the operations of a gate.

DIA is compared with the same model without attention, with SE in each block, with its gates as hooks instead of in the
fused residual block, and with diffusers' UNet2DModel, whose residual block adds and divides in two passes more. Ratios
are of times, so 1.03 is 3% slower; the models take turns. Also measured: the model without attention with its channels
first in memory, the calls of operators that a gate adds, and the time until torch.compile has traced the model.

    python benchmarks/attention_cost.py [--families] [--rounds N] [--output RESULT.json]

With `--families` also what attached attention adds to a forward and backward pass of a small model of each family.

On a GPU where there is one.
"""

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from diffusers import UNet2DModel
from diffusers.models.resnet import ResnetBlock2D
from torch import nn
from torch.profiler import ProfilerActivity, profile
from tqdm.auto import tqdm

from dia_diffusion import DIAUNet2DModel, attach
from dia_diffusion.models.branches import FusedResnetBlock2D
from dia_diffusion.models.memory_format import lay_out
from dia_diffusion.process.startup import tune_process
from measuring import alternate, read_arguments, row, save_result, spread

PLAIN = "UNet2DModel"
FAMILY_BATCH = 4
NONE, DIA, HOOKS, SE = "no attention", "DIA", "DIA by hooks", "SE in each block"
CONTIGUOUS = "no attention, contiguous"
# Arguments of DIAUNet2DModel, or none for diffusers' own class.
SIDES = {
    PLAIN: {},
    NONE: {"dia_attention": "none"},
    DIA: {"dia_attention": "lstm"},
    HOOKS: {"dia_attention": "lstm"},
    SE: {"dia_attention": "se", "dia_sharing": "block"},
    CONTIGUOUS: {"dia_attention": "none"},
}


def _plain_levels(levels: int) -> dict[str, Any]:
    return {"down_block_types": ("DownBlock2D",) * levels, "up_block_types": ("UpBlock2D",) * levels}


CIFAR10 = {
    "sample_size": 32,
    "block_out_channels": (128, 256, 256, 256),
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
}
# Configuration, batch, and passes in a round.
SIZES: dict[str, tuple[dict[str, Any], int, int]] = {
    "digits": (
        {
            "sample_size": 8,
            "in_channels": 1,
            "out_channels": 1,
            "block_out_channels": (32, 64),
            "layers_per_block": 1,
            "norm_num_groups": 8,
            **_plain_levels(2),
        },
        64,
        5,
    ),
    "32x32": ({"sample_size": 32, "block_out_channels": (64, 128, 128), **_plain_levels(3)}, 16, 1),
    "CIFAR-10": (CIFAR10, 2, 1),
}


def make_models(config: dict[str, Any], device: str, sides: Sequence[str] = SIDES) -> dict[str, UNet2DModel]:
    """Make the plain UNet, and those with attention and the same weights, as the trainer places them."""
    models = {}
    for side in sides:
        torch.manual_seed(0)
        model = DIAUNet2DModel(**config, **SIDES[side]) if SIDES[side] else UNet2DModel(**config)
        if side == HOOKS:
            gate_by_hooks(model)
        models[side] = model.to(device) if side == CONTIGUOUS else lay_out(model.to(device))
    return models


def gate_by_hooks(model: DIAUNet2DModel) -> None:
    """Put diffusers' residual blocks back, and gate their branches by hooks."""
    for module in model.modules():
        if isinstance(module, FusedResnetBlock2D):
            module.__class__, gate = ResnetBlock2D, module.gate
            module.conv2.register_forward_hook(gate.hook)


def count_calls(model: UNet2DModel, batch: int) -> tuple[int, int]:
    """Return the calls under `aten::` of a forward and of a backward pass that torch's profiler sees, views and all."""
    predict = make_passes(model, model, batch)["predict"]

    for _ in range(2):
        model.zero_grad()
        output, forward = profile_calls(predict)
        _, backward = profile_calls(output.sum().backward)
    return forward, backward


def profile_calls(function: Callable) -> tuple[Any, int]:
    """Return the result of a function and the number of calls under `aten::` that torch's profiler sees."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        result = function()
    return result, sum(event.name.startswith("aten::") for event in profiler.events())


def call_rows() -> list[dict]:
    """Return the calls that each block adds, and those that are made once a pass, from models of two depths."""
    counts, blocks = {}, {}
    for layers in (1, 2):
        config, batch, _ = SIZES["digits"]
        models = make_models(config | {"layers_per_block": layers}, "cpu", (NONE, DIA))
        plain, gated = (count_calls(models[side], batch) for side in (NONE, DIA))
        counts[layers] = [after - before for before, after in zip(plain, gated, strict=True)]
        blocks[layers] = sum(isinstance(module, ResnetBlock2D) for module in models[DIA].modules())
    rows = []
    for number, kind in enumerate(("forward", "backward")):
        each = (counts[2][number] - counts[1][number]) / (blocks[2] - blocks[1])
        once = counts[1][number] - each * blocks[1]
        rows += [row(f"a gate, {kind}", each, "calls"), row(f"once a pass, {kind}", once, "calls")]
    return rows


def trace_rows(size: str, rounds: int) -> list[dict]:
    """Return the CPU time of a first call that `torch.compile` traces with its backward pass, without a compiler."""
    config, batch, _ = SIZES[size]
    seconds: dict[str, list[float]] = {NONE: [], DIA: []}
    for number in range(-1, rounds):
        for side, model in make_models(config, "cpu", (NONE, DIA)).items():
            torch._dynamo.reset()
            predict = make_passes(model, torch.compile(model, backend="aot_eager", fullgraph=True), batch)["predict"]
            start = time.process_time()
            predict()
            # The first round also pays for what Python imports and caches.
            if number >= 0:
                seconds[side].append(time.process_time() - start)
    torch._dynamo.reset()
    value, ratio = statistics.median(seconds[DIA]), spread(seconds[DIA], seconds[NONE])
    return [row(f"tracing, {size}, {DIA}", value, "s", f"time of {NONE}", ratio)]


def make_passes(
    model: UNet2DModel, call: Callable, batch: int, passes: int = 1, dtype: torch.dtype | None = None
) -> dict[str, Callable[[], Any]]:
    """Return a training step (forward, backward, optimizer), a forward pass, and a prediction with its graph.

    Args:
        model (`UNet2DModel`): What is trained.
        call (`Callable`): How it is called: itself, or compiled.
        batch, passes (`int`): Images in a batch, and how often it runs each time.
        dtype (`torch.dtype`, *optional*): The data type of autocast; none by default.
    """
    size, channels = model.config.sample_size, model.config.in_channels
    images = torch.randn(batch, channels, size, size, device=model.device)
    if not model.conv_out.weight.is_contiguous():
        images = lay_out(images)
    timesteps = torch.arange(batch, device=model.device) * 1000 // batch
    noise = torch.randn_like(images)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def predict() -> torch.Tensor:
        with torch.autocast(model.device.type, dtype, enabled=dtype is not None):
            return call(images, timesteps, return_dict=False)[0]

    def step() -> None:
        for _ in range(passes):
            nn.functional.mse_loss(predict().float(), noise).backward()
            optimizer.step()
            optimizer.zero_grad()

    @torch.no_grad()
    def forward() -> None:
        for _ in range(passes):
            predict()

    return {"step": step, "forward": forward, "predict": predict}


def measure(size: str, rounds: int, device: str) -> list[dict]:
    """Return the rows of a size: the step and the forward pass of each model."""
    config, batch, passes = SIZES[size]
    models = make_models(config, device)
    runs = {name: make_passes(model, model, batch, passes) for name, model in models.items()}
    rows = []
    for kind in ("step", "forward"):
        times = alternate({name: run[kind] for name, run in runs.items()}, rounds)
        for name, seconds in times.items():
            ratio = None if name == PLAIN else spread(seconds, times[PLAIN])
            value = 1e3 * statistics.median(seconds) / passes
            rows.append(row(f"{kind}, {size}, {name}", value, "ms", f"time of {PLAIN}", ratio))
        value = 1e3 * statistics.median(times[DIA]) / passes
        for other in (NONE, HOOKS, SE):
            shares = spread(times[DIA], times[other])
            rows.append(row(f"{kind}, {size}, {DIA}", value, "ms", f"time of {other}", shares))
        value, shares = 1e3 * statistics.median(times[CONTIGUOUS]) / passes, spread(times[CONTIGUOUS], times[NONE])
        rows.append(row(f"{kind}, {size}, {CONTIGUOUS}", value, "ms", f"time of {NONE}", shares))
    return rows


def measure_families(rounds: int, device: str, names: Sequence[str] | None = None) -> list[dict]:
    """Return a row for each of these models: forward and backward pass with attention attached, and without."""
    # The models of the tests, wider.
    sys.path[:0] = [str(Path(__file__).parents[1] / "tests" / part) for part in ("", "models")]
    from backbones import make_backbones, outputs

    def step(model: nn.Module, inputs: dict[str, Any]) -> None:
        sum(output.square().mean() for output in outputs(model, inputs)).backward()
        model.zero_grad()

    backbones = {name: one for name, one in make_backbones(scale=4).items() if one.ends is None}
    rows = []
    for name in tqdm(names or backbones, desc="Families"):
        torch.manual_seed(0)
        inputs = send_to_device(backbones[name].inputs(FAMILY_BATCH), device)
        sides = {side: backbones[name].make().to(device) for side in (PLAIN, DIA)}
        sides[DIA].load_state_dict(sides[PLAIN].state_dict())
        attach(sides[DIA])
        times = alternate({side: partial(step, model, inputs) for side, model in sides.items()}, rounds)
        ratio = spread(times[DIA], times[PLAIN])
        rows.append(row(f"step, {name}", 1e3 * statistics.median(times[DIA]), "ms", "time without attention", ratio))
    return rows


def main() -> int:
    options = read_arguments(__doc__, "attention_cost", 15, **{"--families": "measure a model of each family, too"})
    tune_process()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = call_rows() + trace_rows("CIFAR-10", rounds=3)
    for size in tqdm(SIZES, desc="Sizes"):
        rows += measure(size, options.rounds, device)
    if options.families:
        rows += measure_families(options.rounds, device)
    save_result(options.output, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
