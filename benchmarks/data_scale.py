"""Measure what grows with the number of images: preparation, memory, disk, later starts, loading, training steps.

Synthetic photograph-like images of 32x32 pixels, PNG files in parquet, of which 10,000 differ. Memory is what all
processes together need more than at their start, without what is mapped from files (Linux).

    python benchmarks/data_scale.py [--rounds N] [--images N] [--dataset DATA] [--work DIR] [--output RESULT.json]

`--dataset` measures that one instead; `--work` names a folder with room for it, 15 KB an image.
"""

import functools
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from io import BytesIO
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from dia_diffusion.data.pixels import EndlessShuffle, PixelDataset, describe_images
from dia_diffusion.data.preparation import prepare_pixels
from dia_diffusion.data.sources import load_dataset_splits
from dia_diffusion.process.startup import available_cores
from measuring import alternate, count, read_arguments, row, save_result, spread

FEW, RESOLUTION, BATCH = 1000, 32, 128
# Files as the Hub has them: `datasets` reads one at a time, and needs as much memory as it has bytes.
_DISTINCT, _IMAGES_A_FILE = 10_000, 50_000
_MIB = 2**20


def write_images(folder: Path, count: int) -> None:
    """Write a data set of `count` images, of which at most 10,000 differ."""
    random = np.random.default_rng(0)
    cells = []
    for small in random.integers(0, 256, (min(count, _DISTINCT), 8, 8, 3), dtype=np.uint8):
        file = BytesIO()
        Image.fromarray(small).resize((RESOLUTION, RESOLUTION), Image.Resampling.BICUBIC).save(file, format="PNG")
        cells.append({"bytes": file.getvalue(), "path": None})
    folder.mkdir(parents=True)
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    features = {"info": {"features": {"image": {"_type": "Image"}}}}
    schema = pa.schema({"image": kind}, metadata={"huggingface": json.dumps(features)})
    files = -(-count // _IMAGES_A_FILE)
    for number in range(files):
        rows = range(number * _IMAGES_A_FILE, min((number + 1) * _IMAGES_A_FILE, count))
        table = pa.table({"image": pa.array([cells[row % len(cells)] for row in rows], kind)}, schema=schema)
        pq.write_table(table, folder / f"train-{number:05d}-of-{files:05d}.parquet", use_dictionary=False)


def load(dataset: str, cache: Path, workers: int) -> PixelDataset:
    """Load the training images as a run does."""
    images, _ = load_dataset_splits(dataset, cache_dir=str(cache))
    return prepare_pixels(images, RESOLUTION, cache_dir=str(cache), num_workers=workers)


def start_run(dataset: str, cache: Path, workers: int) -> dict[str, float]:
    """Prepare images as a run does before its first step; return the seconds and the memory that it takes."""
    process, peak, done = psutil.Process(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.1):
            peak = max(peak, sum(map(_own_memory, [process, *process.children(recursive=True)])))

    watcher = threading.Thread(target=watch)
    watcher.start()
    before, start = _own_memory(process), time.perf_counter()
    data = load(dataset, cache, workers)
    data.digest()
    describe_images(data, dataset)
    next(iter(EndlessShuffle(data, 0, False).__getitems__(range(BATCH)).values()))
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    return {"images": len(data), "seconds": seconds, "memory": peak - before}


def _own_memory(process: psutil.Process) -> int:
    """Return the proportional set size of a process, in bytes, without mapped files."""
    try:
        lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Pss_Anon:"))


def in_a_process(dataset: str, cache: Path, workers: int) -> dict[str, float]:
    """Call `start_run` in a process of its own, and add the seconds that the process took in all."""
    start = time.perf_counter()
    command = [sys.executable, __file__, "--side", dataset, str(cache), str(workers)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(output.splitlines()[-1]) | {"whole": time.perf_counter() - start}


def measure_start(dataset: str, cache: Path, workers: int) -> list[dict]:
    """Return the rows of preparing a data set with this number of processes, and of a later run."""
    first, later = in_a_process(dataset, cache, workers), in_a_process(dataset, cache, workers)
    case = f"{first['images']:,} images"
    disk = sum(path.stat().st_size for path in (cache / "dia_pixels").rglob("*.arrow"))
    return [
        row(f"{case}, prepared by {workers}", first["seconds"], "s"),
        row(f"{case}, prepared by {workers}, memory", first["memory"] / _MIB, "MiB"),
        row(f"{case}, prepared, on disk", disk / _MIB, "MiB"),
        row(f"{case}, start of a later run, imports included", later["whole"], "s"),
        row(f"{case}, start of a later run, memory", later["memory"] / _MIB, "MiB"),
    ]


def measure_steps(many: PixelDataset, few: PixelDataset, rounds: int) -> list[dict]:
    """Return the rows of loading a batch, and of a training step, against the same with few images."""
    from training_throughput import SIZES, this_trainer

    sides = {"many": many, "few": few}
    shuffles = {name: EndlessShuffle(data, 0, False) for name, data in sides.items()}
    positions = {name: itertools.count() for name in sides}

    def load_batch(name: str) -> None:
        for _ in range(10):
            shuffles[name].__getitems__([next(positions[name]) for _ in range(BATCH)])

    loading = alternate({name: functools.partial(load_batch, name) for name in sides}, rounds)
    unet, batch, _ = SIZES["32x32"]
    loops = {name: this_trainer(data, unet, batch, "no", "lstm", []) for name, data in sides.items()}
    steps = alternate({name: functools.partial(next, loop) for name, loop in loops.items()}, rounds)
    case, against = f"{len(many):,} images", f"time with {len(few):,}"
    return [
        row(f"{case}, {name}", scale * statistics.median(times["many"]), "ms", against, spread(*times.values()))
        for name, scale, times in ((f"loading {BATCH}", 100, loading), ("training step", 1e3, steps))
    ]


def measure(work: Path, images: int, dataset: str | None, rounds: int) -> list[dict]:
    few_folder = work / "few"
    write_images(few_folder, FEW)
    if dataset is None:
        dataset = str(work / "many")
        write_images(Path(dataset), images)
    rows = []
    for workers in sorted({1, available_cores()}):
        rows += measure_start(dataset, work / f"cache-{workers}", workers)
    both = load(dataset, work / "cache-1", 1), load(str(few_folder), work / "cache-few", 1)
    return rows + measure_steps(*both, rounds)


def main() -> int:
    if sys.argv[1:2] == ["--side"]:
        dataset, cache, workers = sys.argv[2:]
        print(json.dumps(start_run(dataset, Path(cache), int(workers))))
        return 0
    options = read_arguments(
        __doc__,
        "data_scale",
        rounds=11,
        **{
            "--images": {"type": count, "default": 60_000, "help": "synthetic images (default: 60,000)"},
            "--dataset": {"help": "a data set or a folder instead of synthetic images"},
            "--work": {"type": Path, "help": "a folder for data and cache, removed at the end"},
        },
    )
    with tempfile.TemporaryDirectory(dir=options.work) as work:
        save_result(options.output, measure(Path(work), options.images, options.dataset, options.rounds))
    return 0


if __name__ == "__main__":
    sys.exit(main())
