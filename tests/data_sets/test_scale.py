"""Many images: prepared by several processes, and each taken once an epoch."""

import os
import signal
import subprocess
import sys
import time
from io import BytesIO
from pathlib import Path

import datasets
import numpy as np
import psutil
import pytest
from datasets import Dataset
from PIL import Image

from dia_diffusion.data import preparation
from dia_diffusion.data.pixels import EndlessShuffle
from dia_diffusion.data.preparation import prepare_pixels
from dia_diffusion.errors import UsageError

BROKEN = (170, 290)


def make_images(count=330, broken=()):
    """Grey images with labels; `broken` numbers some that are none."""
    random = np.random.default_rng(0)
    cells = []
    for number in range(count):
        file = BytesIO()
        Image.fromarray(random.integers(0, 256, (8, 8), dtype=np.uint8)).save(file, format="PNG")
        cells.append({"bytes": b"no image" if number in broken else file.getvalue(), "path": None})
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["even", "odd"]))
    return Dataset.from_dict({"image": cells, "label": [number % 2 for number in range(count)]}, features)


@pytest.fixture(autouse=True)
def small_shares(monkeypatch):
    """Processes are worth starting for fewer images than usual."""
    monkeypatch.setattr(preparation, "_IMAGES_A_PROCESS", 100)


def files_in(folder):
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("dia_pixels/*/*.arrow")}


def test_the_rows_are_the_same_whatever_the_number_of_processes(tmp_path):
    def prepare(place, num_workers):
        settings = {"with_labels": True, "on_bad_image": "skip", "cache_dir": str(tmp_path / place)}
        return prepare_pixels(images, 8, num_workers=num_workers, **settings)

    images = make_images(broken=BROKEN)
    alone, together = prepare("alone", 1), prepare("together", 3)
    written = files_in(tmp_path / "together")
    assert (len(files_in(tmp_path / "alone")), len(written)) == (1, 3)
    assert len(together) == len(images) - len(BROKEN)
    assert together.fingerprint == alone.fingerprint
    assert together.digest() == alone.digest()
    assert together.left_out == alone.left_out
    assert together.prepared[:] == alone.prepared[:]
    # Another number finds them ready.
    assert prepare("together", 1).prepared[:] == alone.prepared[:]
    assert files_in(tmp_path / "together") == written
    # What a killed run did not finish is done by the next one, whatever its number.
    lost = sorted(tmp_path.glob("together/dia_pixels/*/*_00001_of_*.arrow"))[0]
    lost.unlink()
    (lost.parent / "tmp0123").touch()
    assert prepare("together", 2).prepared[:] == alone.prepared[:]
    again = files_in(tmp_path / "together")
    assert {name for name in written if again[name] != written[name]} == {lost.name}
    assert not (lost.parent / "tmp0123").exists()


def test_a_broken_image_is_named_by_its_number_in_the_whole(tmp_path):
    with pytest.raises(UsageError, match=rf"number {BROKEN[1]} of the data set\) cannot be read"):
        prepare_pixels(make_images(broken=BROKEN[1:]), 8, num_workers=3, cache_dir=str(tmp_path))


SLOWLY = """
import sys, time
from pathlib import Path
from dia_diffusion.data import preparation
from test_scale import make_images

folder = Path(sys.argv[1])
image_to_pixels = preparation.image_to_pixels
def slowly(*arguments):
    (folder / f"at-work-{preparation.os.getpid()}").touch()
    time.sleep(0.1)
    return image_to_pixels(*arguments)

preparation.image_to_pixels = slowly
preparation._IMAGES_A_PROCESS = 100
preparation.prepare_pixels(make_images(), 8, channels=1, num_workers=2, cache_dir=str(folder))
"""


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGKILL])
def test_no_process_decodes_on_after_the_end_of_the_one_that_started_it(signum, tmp_path):
    """A terminal sends Ctrl-C to all of them, and a scheduler kills the first."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    process = subprocess.Popen([sys.executable, "-c", SLOWLY, str(tmp_path)], env=environment, start_new_session=True)
    deadline = time.monotonic() + 120
    while len(list(tmp_path.glob("at-work-*"))) < 2:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)
    # Those that decode, and the helper of their queue.
    at_work = psutil.Process(process.pid).children(recursive=True)
    assert len(at_work) == 3
    if signum == signal.SIGINT:
        os.killpg(process.pid, signum)
    else:
        process.send_signal(signum)
    assert process.wait(timeout=60) == -signum
    assert not psutil.wait_procs(at_work, timeout=60)[1]


def test_a_process_that_is_killed_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(preparation, "image_to_pixels", lambda *arguments: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(UsageError, match="one of 3 processes that decoded images was killed"):
        prepare_pixels(make_images(), 8, num_workers=3, cache_dir=str(tmp_path))


def test_each_epoch_has_each_image_once(tmp_path):
    data = prepare_pixels(make_images(30), 8, cache_dir=str(tmp_path))
    shuffle = EndlessShuffle(data, seed=0, center_crop=True)
    # Batches of seven go over the end of an epoch.
    batches = [shuffle.__getitems__(range(start, start + 7))["images"] for start in range(0, 63, 7)]
    taken = [image.tobytes() for batch in batches for image in batch.numpy()]
    everything = sorted(image.tobytes() for image in data.fetch(range(30))["images"].numpy())
    first, second = taken[:30], taken[30:60]
    assert sorted(first) == sorted(second) == everything
    assert first != second
