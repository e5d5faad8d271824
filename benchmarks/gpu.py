"""The other benchmarks on a GPU, at the size of the CIFAR-10 DDPM with bfloat16: one table.

Training step and forward pass of all models of `attention_cost.py`, and of the UNet without attention and with DIA
compiled, and compiled with CUDA graphs, with the seconds of compiling, without and with the compiler's cache, and the
share of the chip's matrix rate that the step reaches. Then training and sampling against diffusers, eager and compiled,
and memory. A profile of the step shows the time of its kernels alone: where it is less than the step's, the GPU waits
for the host. Each part is written when it is measured. Without a GPU it says so and ends.

    python benchmarks/gpu.py [--rounds N] [--output RESULT.json]
"""

import statistics
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch._inductor.utils import fresh_cache
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from tqdm.auto import tqdm

import memory
import sampling
import training_throughput
from attention_cost import CONTIGUOUS, DIA, NONE, SIDES, SIZES, make_models, make_passes
from measuring import alternate, count_flops, read_arguments, row, save_result, spread, write_result

SIZE, BATCH = "CIFAR-10", 128
# How the models are called: which of them, and arguments of torch.compile, none for not at all. Compiling one takes
# minutes, so only the two that are to be compared are.
CALLS = {
    "eager": (tuple(SIDES), None),
    "compiled": ((NONE, DIA), {"mode": "default"}),
    "CUDA graphs": ((NONE, DIA), {"mode": "reduce-overhead"}),
    "compiled with channels first": ((NONE, CONTIGUOUS), {"mode": "default"}),
}
SAMPLING_STEPS = 50
# Dense bfloat16 matrix rate in FLOP/s: NVIDIA's data sheets of the H100, the H200 and the A100. The first name that the
# name of the device holds counts.
PEAK_RATES = {"H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "A100": 312e12}


def peak_rate(device_name: str) -> float | None:
    """Return the peak rate of matrix products of a device, or `None` if it is not known."""
    return next((rate for name, rate in PEAK_RATES.items() if name in device_name), None)


def measure_passes(
    call: str, rounds: int, device: str, peak: float | None, size: str = SIZE, batch: int = BATCH
) -> list[dict]:
    """Return the rows of step and forward pass for a way to call the models, one of `CALLS`."""
    # The compiler gives up on code that it has compiled many times, for other models too.
    torch.compiler.reset()
    sides, arguments = CALLS[call]
    runs, flops, rows = {}, {}, []
    for side, model in make_models(SIZES[size][0], device, sides).items():
        flops[side] = count_flops(make_passes(model, model, batch, dtype=torch.bfloat16)["step"])
        called = model if arguments is None else torch.compile(model, **arguments)
        runs[side] = make_passes(model, called, batch, dtype=torch.bfloat16)
    if arguments is not None:
        rows += compiling_rows(f"first step, {size}, batch {batch}, {call}", runs)
    for kind in ("step", "forward"):
        times = alternate({side: run[kind] for side, run in runs.items()}, rounds, warm_up=4)
        for side, seconds in times.items():
            median, case = statistics.median(seconds), f"{kind}, {size}, batch {batch}, {call}, {side}"
            ratio = None if side == NONE else spread(seconds, times[NONE])
            rows.append(row(case, 1e3 * median, "ms", f"time of {NONE}", ratio))
            if kind == "step":
                rate = flops[side] / median
                share = "peak unknown" if peak is None else f"{rate / peak:.1%} of the peak"
                rows.append(row(f"{case}, rate", rate / 1e12, f"TFLOP/s ({share})"))
    return rows


def compiling_rows(case: str, runs: Mapping[str, Mapping[str, Callable[[], Any]]]) -> list[dict]:
    """Return the rows of the seconds of each side's first step, which compiles, and of a second start."""
    seconds: dict[str, list[float]] = {side: [] for side in runs}
    with fresh_cache():
        for _ in range(2):
            torch.compiler.reset()
            for side, run in runs.items():
                start = time.perf_counter()
                run["step"]()
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                seconds[side].append(time.perf_counter() - start)
    rows = []
    for side, (first, again) in seconds.items():
        rows += [row(f"{case}, {side}", first, "s"), row(f"{case}, from the compiler's cache, {side}", again, "s")]
    return rows


def profile_step(side: str, device: str, size: str = SIZE, batch: int = BATCH) -> tuple[float, str]:
    """Return the milliseconds for which the device is busy in a step, and a table of them by operation.

    Where the step takes longer than that, the device waits for the host to give it work.
    """
    (model,) = make_models(SIZES[size][0], device, (side,)).values()
    step = make_passes(model, model, batch, dtype=torch.bfloat16)["step"]
    step()
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device == "cuda" else [])
    with profile(activities=activities) as profiler:
        step()
    events = profiler.key_averages()
    if device == "cuda":
        of_device = [e for e in events if e.device_type == DeviceType.CUDA and not e.is_user_annotation]
        key = "self_device_time_total"
    else:
        of_device, key = events, "self_cpu_time_total"
    # Profilers count microseconds.
    busy = sum(getattr(event, key) for event in of_device) / 1e3
    return busy, events.table(sort_by=key, row_limit=12, max_name_column_width=60)


def measure_kernels(device: str, size: str = SIZE, batch: int = BATCH) -> tuple[list[dict], str]:
    """Return the rows of the busy time of a step without attention and with DIA, and the table of the latter."""
    sides = (NONE, CONTIGUOUS, DIA)
    (without, _), *others = (profile_step(side, device, size, batch) for side in sides)
    case = f"step, {size}, batch {batch}, eager, kernels alone"
    rows = [row(f"{case}, {NONE}", without, "ms")]
    for side, (busy, _) in zip(sides[1:], others, strict=True):
        rows.append(row(f"{case}, {side}", busy, "ms", f"time of {NONE}", spread([busy], [without])))
    return rows, others[-1][1]


def main() -> int:
    options = read_arguments(__doc__, "gpu", rounds=9)
    if not torch.cuda.is_available():
        print("There is no GPU here: nothing measured.")
        return 0
    peak, rounds = peak_rate(torch.cuda.get_device_name()), options.rounds
    passes = {call: partial(measure_passes, call, rounds, "cuda", peak) for call in CALLS}
    sample = partial(sampling.measure, SIZE, "DDIM", rounds, precision="bf16", steps=SAMPLING_STEPS, compiled=True)
    parts = [
        passes["eager"],
        passes["compiled"],
        passes["CUDA graphs"],
        partial(training_throughput.measure, SIZE, rounds, BATCH, "bf16", compiled=True),
        partial(sample, batch=BATCH),
        partial(sample, batch=1),
        partial(memory.measure, SIZE, "cuda", BATCH, torch.bfloat16),
        passes["compiled with channels first"],
    ]
    rows, table = measure_kernels("cuda")
    for part in tqdm(parts, desc="Parts"):
        rows += part()
        write_result(options.output, rows, profile=table.splitlines())
    save_result(options.output, rows, profile=table.splitlines())
    print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
