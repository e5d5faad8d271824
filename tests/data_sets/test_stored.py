"""`dia cache`: what it lists is what commands left, and it removes nothing else."""

import subprocess
import sys
import tempfile

import pytest

from dia_diffusion.cli import main
from dia_diffusion.data.preparation import prepare_pixels
from dia_diffusion.data.sources import load_digits_dataset


@pytest.fixture
def caches(tmp_path, monkeypatch):
    for name in ("data", "scores", "temporary"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "data"))
    monkeypatch.setenv("DIA_CACHE", str(tmp_path / "scores"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    return tmp_path


def test_caches_are_listed_and_removed_and_nothing_else(caches, capsys):
    assert main(["cache", "--clean"]) == 0
    assert capsys.readouterr().out == "Nothing is cached.\nRemoved 0 files, 0.0 MB.\n"
    prepare_pixels(load_digits_dataset()["test"], 8, cache_dir=str(caches / "data"))
    mine = [caches / "data" / "other" / "a.arrow", caches / "scores" / "thesis.txt", caches / "elsewhere" / "b"]
    cached = [caches / "scores" / "references" / "a.safetensors", caches / "scores" / "inception-2015-12-05.pt"]
    for path in (*mine, *cached):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(100_000))
    # A link to what is not a cache.
    (caches / "data" / "dia_latents").symlink_to(caches / "elsewhere")
    assert main(["cache"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines] == [
        "prepared images",
        "statistics of real images",
        "networks of scores",
    ]
    assert "0.1 MB       1 files" in lines[1]
    assert lines[0].endswith(str(caches / "data" / "dia_pixels"))
    assert all(path.exists() for path in cached)
    assert main(["cache", "--clean"]) == 0
    assert not any(path.exists() for path in cached)
    assert not (caches / "data" / "dia_pixels").exists()
    assert all(path.exists() for path in mine)
    # What was removed is made again.
    assert len(prepare_pixels(load_digits_dataset()["test"], 8, cache_dir=str(caches / "data"))) == 360
    assert main(["cache", "--cache_dir", str(caches / "elsewhere")]) == 0


def test_listing_needs_neither_torch_nor_datasets(caches):
    code = (
        "import sys; from dia_diffusion.cli import main; main(['cache']); "
        "assert not {'torch', 'datasets', 'diffusers'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
