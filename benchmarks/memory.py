"""Peak memory of a training step, with and without gradient checkpointing, of a DIA-UNet against UNet2DModel.

On a GPU the peak that torch's allocator counts. On a CPU the bytes of all tensors that live at the same time, counted
at each operation; what an operation needs within itself is not in it. The first step, which makes the state of the
optimizer, does not count.

    python benchmarks/memory.py [--output RESULT.json]
"""

import sys
import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary
from tqdm.auto import tqdm

from attention_cost import DIA, PLAIN, SIZES, make_models, make_passes
from measuring import read_arguments, row, save_result, spread

MIB = 2**20


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that operations make inside of it.

    Attributes:
        now, peak (`int`): Bytes of the tensors that live, and the most there were; `peak` may be set back to `now`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._note(tensor.untyped_storage())
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        # Views share their storage, and operations in place return one that is known.
        if storage in self._known:
            return
        size = storage.nbytes()
        self._known[storage] = size
        weakref.finalize(storage, self._forget, size)
        self.now += size
        self.peak = max(self.peak, self.now)

    def _forget(self, size: int) -> None:
        self.now -= size


def peak_of_step(
    size: str, side: str, checkpointing: bool, device: str, batch: int | None = None, dtype: torch.dtype | None = None
) -> int:
    """Bytes at the peak of a model's second step."""
    config, usual_batch, _ = SIZES[size]
    with LiveBytes() as live:
        model = make_models(config, device, (side,))[side]
        if checkpointing:
            model.enable_gradient_checkpointing()
        step = make_passes(model, model, batch or usual_batch, dtype=dtype)["step"]
        step()
        live.peak = live.now
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        step()
    return live.peak if device == "cpu" else torch.cuda.max_memory_allocated()


def measure(size: str, device: str, batch: int | None = None, dtype: torch.dtype | None = None) -> list[dict]:
    """The rows of a size."""
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
