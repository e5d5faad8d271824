"""Encode rows of pixels to rows of latents, once.

The rows lie in the cache of `datasets` as memory-mapped files, in parts that are each whole or absent: after a kill,
encoding goes on with the missing parts, and any number of processes share them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import datasets
import pyarrow as pa
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from filelock import FileLock, Timeout

from ..data.cache import cache_place, find_in_cache
from ..data.decoding import to_unit_range
from ..data.pixels import PixelDataset
from ..errors import UsageError
from ..files import flush, json_digest, remove_temporaries, replace_file
from ..process.output import print_main, progress_bar
from .autoencoder import VAE, encode_posterior, vae_digest

# Part of the cache key: raise it whenever the same image would give other latents.
_VERSION = 1
# The encoder's memory grows with the pixels: four images of 256x256 at a time, or 256 of 32x32.
_PIXELS_AT_A_TIME, _IMAGES_AT_A_TIME = 2**18, 256
# Images in a part. Each part is an open file during a run, and a kill loses one part at most.
_MOST_PARTS = 64
_SCHEMA = pa.schema({"posterior": pa.large_binary()})


def encode_images(
    vae: VAE, pixels: PixelDataset, flip: bool = False, cache_dir: str | None = None, state: PartialState | None = None
) -> Dataset:
    """Return mean and standard deviation of the latents of each image, from the cache if they are there.

    The fingerprint of the pixels and the digest of the VAE name the files: other weights make other files.

    Args:
        vae: The VAE, in float32.
        pixels (`PixelDataset`): The images; the middle of those that are not square.
        flip (`bool`, *optional*, defaults to `False`): Whether to flip them horizontally first.
        cache_dir (`str`, *optional*): Where the cache is; by default that of `datasets`.
        state (`PartialState`, *optional*): Processes that share the work.

    Returns:
        `datasets.Dataset`: the column `posterior` in the order of the images: float16 `(2, c, r, r)` as bytes.

    Raises:
        UsageError: if latents are not finite in half precision, or there is no room for them.
    """
    state = state or PartialState()
    key = json_digest([pixels.fingerprint, pixels.resolution, vae_digest(vae), flip, _VERSION])[:32]
    folder = find_in_cache(cache_dir, "dia_latents", key)
    parts = _divide(len(pixels), pixels.resolution, folder)
    # All processes or none: one that found the last part a moment later than another would leave that one waiting.
    if any(gather_object([any(_read(path, part) is None for path, part in parts.items())])):
        folder = cache_place(cache_dir, "dia_latents", key)
        parts = _divide(len(pixels), pixels.resolution, folder)
        try:
            _encode_missing(vae, pixels, flip, parts, state)
        except OSError as error:
            raise UsageError(
                f"cannot keep latents in '{folder}': {error}. Name another folder with --cache_dir; what is encoded "
                "already stays."
            ) from error
    rows = [_read(path, part) for path, part in parts.items()]
    return datasets.concatenate_datasets(rows).with_format("arrow")


def _divide(count: int, resolution: int, folder: Path) -> dict[Path, range]:
    """Return the numbers of the images of each part, in whole batches; the same for any number of processes."""
    batch = _batch_size(resolution)
    size = batch * -(-count // (batch * _MOST_PARTS))
    return {
        folder / f"{number:02d}.arrow": range(start, min(start + size, count))
        for number, start in enumerate(range(0, count, size))
    }


def _batch_size(resolution: int) -> int:
    return min(max(1, _PIXELS_AT_A_TIME // resolution**2), _IMAGES_AT_A_TIME)


def _read(path: Path, part: range) -> Dataset | None:
    """Return the rows of a part, or None if it is absent or broken."""
    try:
        rows = Dataset.from_file(str(path))
    except (OSError, pa.ArrowInvalid):
        return None
    return rows if len(rows) == len(part) else None


def _encode_missing(vae: VAE, pixels: PixelDataset, flip: bool, parts: dict[Path, range], state: PartialState) -> None:
    """Encode the missing parts: first those of this process, then those that another machine wrote elsewhere."""
    folder = next(iter(parts)).parent
    folder.mkdir(parents=True, exist_ok=True)
    vae.to(state.device)
    with _alone(folder, state):
        state.wait_for_everyone()
        for shares in ((state.num_processes, state.process_index), (1, 0)):
            mine = dict(list(parts.items())[shares[1] :: shares[0]])
            missing = {path: part for path, part in mine.items() if _read(path, part) is None}
            _encode_parts(vae, pixels, flip, missing, quiet=not state.is_main_process)
            state.wait_for_everyone()
    vae.to("cpu")


@contextmanager
def _alone(folder: Path, state: PartialState) -> Iterator[None]:
    """Let one run at a time encode the same images, so that the next one finds them encoded."""
    if not state.is_main_process:
        yield
        return
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print_main("Another run is encoding the same images: waiting for it.")
        lock.acquire()
    try:
        remove_temporaries(folder)
        yield
    finally:
        lock.release()


def _encode_parts(vae: VAE, pixels: PixelDataset, flip: bool, parts: dict[Path, range], quiet: bool) -> None:
    batch, total = _batch_size(pixels.resolution), sum(map(len, parts.values()))
    name = "Encoding flipped images" if flip else "Encoding images"
    with progress_bar(total=total, desc=name, unit="img", disable=quiet or not total) as progress:
        for path, part in parts.items():
            encoded = []
            for start in range(part.start, part.stop, batch):
                numbers = range(start, min(start + batch, part.stop))
                encoded += _encode(vae, pixels, flip, numbers)
                progress.update(len(numbers))
            replace_file(path, partial(_write, encoded))


def _encode(vae: VAE, pixels: PixelDataset, flip: bool, numbers: range) -> list[bytes]:
    images = to_unit_range(pixels.fetch(numbers)["images"])
    images = images.flip(-1) if flip else images
    posterior = encode_posterior(vae, images.to(vae.device)).to(torch.float16).cpu()
    if not posterior.isfinite().all():
        raise UsageError(
            f"the VAE's latents of images {numbers.start} to {numbers.stop - 1} are not finite in half precision: "
            "choose another VAE."
        )
    return [row.numpy().tobytes() for row in posterior]


def _write(encoded: list[bytes], path: Path) -> None:
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, _SCHEMA) as writer:
        writer.write_table(pa.table({"posterior": pa.array(encoded, pa.large_binary())}), max_chunksize=1000)
    flush(path)
