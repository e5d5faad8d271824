"""Time sides in alternation, take ratios with their spread, and write results as JSON: shared by the benchmarks.

python benchmarks/measuring.py [FOLDER]      the results in a folder as one Markdown table
"""

import argparse
import contextlib
import datetime
import functools
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from dia_diffusion.files import write_json
from dia_diffusion.options.fields import COUNT, number_type
from dia_diffusion.page import markdown_table

# The type of options that take a whole number from 1.
count = number_type(int, COUNT)
RESULTS = Path(__file__).parent.parent / "runs" / "benchmarks"


def read_arguments(document: str, name: str, rounds: int | None = None, **flags: Any) -> argparse.Namespace:
    """Read the options of a benchmark: `output`, `rounds` where it has them, and others by name.

    A switch has its help, another option the arguments of `add_argument`.
    """
    parser = argparse.ArgumentParser(description=document, formatter_class=argparse.RawDescriptionHelpFormatter)
    if rounds is not None:
        parser.add_argument(
            "--rounds", type=count, default=rounds, help=f"rounds of the alternation (default: {rounds})"
        )
    for flag, given in flags.items():
        parser.add_argument(flag, **(given if isinstance(given, dict) else {"action": "store_true", "help": given}))
    parser.add_argument("--output", type=Path, default=RESULTS / f"{name}.json", help="JSON file for the result")
    return parser.parse_args()


def alternate(sides: Mapping[str, Callable[[], Any]], rounds: int, warm_up: int = 1) -> dict[str, list[float]]:
    """Return the seconds that each side takes in each round, after `warm_up` rounds that do not count.

    The order is reversed every other round, so that what a side leaves behind (a warm chip, a full cache) does not
    always meet the same other side.
    """
    times: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(-warm_up, rounds):
        for name in list(sides) if number % 2 else reversed(sides):
            _wait_for_device()
            start = time.perf_counter()
            sides[name]()
            _wait_for_device()
            if number >= 0:
                times[name].append(time.perf_counter() - start)
    return times


def _wait_for_device() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@contextlib.contextmanager
def start_workers(script: str, sides: Mapping[str, Sequence[str]]) -> Iterator[dict[str, Callable[[], Any]]]:
    """Start a process for each side, which runs `script --side` with its arguments and then `serve_rounds`.

    Yields:
        For each side a function that makes its process run a round, and returns the result.
    """

    def run_round(worker: subprocess.Popen) -> Any:
        worker.stdin.write("go\n")
        worker.stdin.flush()
        return json.loads(worker.stdout.readline())

    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with contextlib.ExitStack() as stack:
        workers = {
            name: stack.enter_context(
                subprocess.Popen([sys.executable, script, "--side", *arguments], text=True, **pipes)
            )
            for name, arguments in sides.items()
        }
        yield {name: functools.partial(run_round, worker) for name, worker in workers.items()}


def serve_rounds(run: Callable[[], Any]) -> None:
    """Run a round for each line that this process is sent, and answer with its result."""
    for _ in sys.stdin:
        result = run()
        _wait_for_device()
        print(json.dumps(result), flush=True)


def spread(numerators: Sequence[float], denominators: Sequence[float]) -> dict[str, float]:
    """Return the median and the extremes of the ratios of the rounds."""
    ratios = [above / below for above, below in zip(numerators, denominators, strict=True)]
    return {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}


def count_flops(step: Callable[[], Any]) -> int:
    """Count the floating point operations of a step's matrix products and convolutions, forward and backward."""
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def row(case: str, value: float, unit: str, against: str = "", ratio: Mapping[str, float] | None = None) -> dict:
    """Make a row of a result: the case, its figure, and its ratio to what it was measured against."""
    compared = {} if ratio is None else {"against": against, "ratio": {k: round(v, 3) for k, v in ratio.items()}}
    return {"case": case, "value": float(f"{value:.4g}"), "unit": unit} | compared


def describe_machine() -> str:
    """Describe the device that torch would use."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU ({platform.machine()}), threads: {torch.get_num_threads()}"


def write_result(path: Path, rows: Sequence[dict], **more: Any) -> None:
    """Write a result as JSON."""
    result = {
        "machine": describe_machine(),
        "date": datetime.date.today().isoformat(),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in ("torch", "diffusers")},
        "rows": list(rows),
    } | more
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, result)


def save_result(path: Path, rows: Sequence[dict], **more: Any) -> None:
    """Print a result and write it."""
    print(format_rows(rows))
    write_result(path, rows, **more)


def format_row(line: Mapping[str, Any]) -> list[str]:
    """Return the cells of a row: case, figure, what it is compared with, ratio."""
    ratio = line.get("ratio")
    compared = f"{ratio['median']:.3f}" if ratio else ""
    if ratio and ratio["min"] < ratio["max"]:
        compared += f" ({ratio['min']:.3f} to {ratio['max']:.3f})"
    return [line["case"], f"{line['value']:g} {line['unit']}", line.get("against", ""), compared]


def format_rows(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the rows of a result as a table in Markdown."""
    return markdown_table(["case", "figure", "against", "ratio, median (extremes)"], list(map(format_row, rows)))


def make_table(folder: Path) -> str:
    """Return the table of all results in a folder, under the machine, the date and the versions of each."""
    lines = []
    for path in sorted(folder.glob("*.json")):
        result = json.loads(path.read_text())
        versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
        lines += [f"**{path.stem}** ({result['machine']}, {result['date']}, {versions})", ""]
        lines += [format_rows(result["rows"]), ""]
    return "\n".join(lines)


if __name__ == "__main__":
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS
    print(make_table(folder) or f"There are no results in {folder}.")
