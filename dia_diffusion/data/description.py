"""What a command says at its start about the images that it uses."""

import pyarrow.compute as pc

from .pixels import PixelDataset

_MOST_NAMES = 20


def describe_images(pixels: PixelDataset, origin: str) -> str:
    """The number of images, where they come from, their size and kinds, what they are taken as, and their classes.

    Args:
        pixels (`PixelDataset`): The images.
        origin (`str`): The data set or the folder.
    """
    about = pixels.prepared.select_columns(["kind", "file_width", "file_height", "transparent"]).with_format("arrow")[:]
    split = pixels.prepared.split
    widths, heights = pc.min_max(about["file_width"]).as_py(), pc.min_max(about["file_height"]).as_py()
    low, high = (f"{widths[bound]}x{heights[bound]}" for bound in ("min", "max"))
    counts = pc.value_counts(about["kind"]).to_pylist()
    kinds = [(one["values"], one["counts"]) for one in sorted(counts, key=lambda one: -one["counts"])]
    named = ", ".join(kind if len(kinds) == 1 else f"{count:,} {kind}" for kind, count in kinds)
    colour = "grey" if pixels.channels == 1 else "colour"
    lines = [
        f"{len(pixels):,} images of '{origin}'{f', split {split}' if split else ''}: "
        f"{low if low == high else f'from {low} to {high}'} pixels, {named}; "
        f"taken as {pixels.resolution}x{pixels.resolution} in {colour}"
    ]
    transparent = pc.sum(about["transparent"]).as_py()
    if transparent:
        lines.append(f"{transparent:,} of them are transparent: they lie on white")
    lines += pixels.left_out
    if pixels.class_names is not None:
        lines.append(f"{len(pixels.class_names)} classes: {list_names(pixels.class_names)}")
    return "; ".join(lines) + "."


def list_names(names: list[str]) -> str:
    """The names of classes with their numbers where those differ, all or the first twenty."""
    shown = [name if name == str(number) else f"{number} {name}" for number, name in enumerate(names[:_MOST_NAMES])]
    return ", ".join(shown) + (", ..." if names[_MOST_NAMES:] else "")
