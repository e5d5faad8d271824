"""Run studies for as many minutes as there are, one after the other, and report which runs are left out.

    python studies/for_minutes.py --minutes 14 studies/classification/cifar10_depth_56_long.yaml -- --jobs 6
    python studies/for_minutes.py --minutes 14 studies/cifar10_32_long.yaml -- --jobs 4
    python studies/for_minutes.py --minutes 6 studies/training/cifar10_32.yaml

Files in `training/` are configurations of one `dia train`; the others are run by `dia study`. What follows `--` goes to
these commands. When the time is over, the command at work is told to stop (SIGTERM): it writes a checkpoint, and the
same call resumes it. Each result is written when it is there.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

import yaml

# A command that was interrupted ends within this time: a step, a checkpoint and a report.
GRACE = 60


def command(path: Path, more: list[str]) -> list[str]:
    """Return the command that runs a file."""
    dia = [sys.executable, "-m", "dia_diffusion.cli"]
    if path.parent.name == "training":
        return [*dia, "train", "--config", str(path), "--resume_from_checkpoint", "latest", *more]
    return [*dia, "study", str(path), *more]


def missing_runs(path: Path) -> list[str]:
    """Return the runs of a file that have no result yet."""
    described = yaml.safe_load(path.read_text())
    if path.parent.name == "training":
        finished = (Path(described["output_dir"]) / "metrics.json").exists()
        return [] if finished else [f"the rest of {described['output_dir']}"]
    runs = [f"{variant}/seed-{seed}" for seed in described["seeds"] for variant in described["variants"]]
    return [run for run in runs if not (Path("runs") / path.stem / run / "result.json").exists()]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", type=Path, nargs="+", help="studies, or configurations of dia train")
    parser.add_argument("--minutes", type=float, required=True, help="for all of them together")
    words = sys.argv[1:] if arguments is None else arguments
    mark = words.index("--") if "--" in words else len(words)
    options = parser.parse_args(words[:mark])
    if absent := [path for path in options.files if not path.is_file()]:
        parser.error(f"there is no file '{absent[0]}'.")
    end, status = time.monotonic() + 60 * options.minutes, 0
    for path in options.files:
        if time.monotonic() >= end:
            break
        process = subprocess.Popen(command(path, words[mark + 1 :]))
        try:
            status = process.wait(timeout=end - time.monotonic()) or status
        except subprocess.TimeoutExpired:
            process.terminate()
            try:
                process.wait(timeout=GRACE)
            except subprocess.TimeoutExpired:
                process.kill()
    for path in options.files:
        left = missing_runs(path)
        print(f"{path}: {'complete' if not left else 'left out ' + ', '.join(left)}")
    return status


if __name__ == "__main__":
    sys.exit(main())
