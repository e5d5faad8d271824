"""Peak memory of a training step, with and without gradient checkpointing, of a DIA-UNet against UNet2DModel.

On a GPU the peak that torch's allocator counts. On a CPU the bytes of all tensors that live at the same time, counted
at each operation; what an operation needs within itself is not in it.

    python benchmarks/memory.py [--output RESULT.json]
"""

import sys

import torch
from torch.distributed._tools.mem_tracker import MemTracker
from tqdm.auto import tqdm

from attention_cost import DIA, PLAIN, SIZES, make_models, make_passes
from measuring import read_arguments, row, save_result, spread

MIB = 2**20


def peak_of_step(
    size: str, side: str, checkpointing: bool, device: str, batch: int | None = None, dtype: torch.dtype | None = None
) -> int:
    """Return the peak memory of a model's second step, in bytes."""
    config, usual_batch, _ = SIZES[size]
    with MemTracker() as tracker:
        model = make_models(config, device, (side,))[side]
        if checkpointing:
            model.enable_gradient_checkpointing()
        step = make_passes(model, model, batch or usual_batch, dtype=dtype)["step"]
        step()
        tracker.reset_mod_stats()
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        step()
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return tracker.get_tracker_snapshot("peak")[torch.device(device)]["Total"]


def measure(size: str, device: str, batch: int | None = None, dtype: torch.dtype | None = None) -> list[dict]:
    """Return the rows of a size."""
    rows = []
    for checkpointing in (False, True):
        peaks = {side: peak_of_step(size, side, checkpointing, device, batch, dtype) for side in (PLAIN, DIA)}
        case = f"memory, {size}{', checkpointing' if checkpointing else ''}"
        rows.append(row(f"{case}, {PLAIN}", peaks[PLAIN] / MIB, "MiB"))
        ratio = spread([peaks[DIA]], [peaks[PLAIN]])
        rows.append(row(f"{case}, {DIA}", peaks[DIA] / MIB, "MiB", f"memory of {PLAIN}", ratio))
    return rows


def main() -> int:
    options = read_arguments(__doc__, "memory")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    save_result(options.output, [line for size in tqdm(SIZES, desc="Sizes") for line in measure(size, device)])
    return 0


if __name__ == "__main__":
    sys.exit(main())
