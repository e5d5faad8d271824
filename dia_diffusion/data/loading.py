"""The images of a run: its training images and its held-out ones."""

from ..options.data import DataOptions
from ..process.output import print_main
from .pixels import PixelDataset, describe_images
from .preparation import prepare_pixels
from .sources import load_dataset_splits


def load_pixels(options: DataOptions) -> tuple[PixelDataset, PixelDataset | None]:
    """The training images of a run, and the held-out ones if there are any."""
    train_split, held_out_split = load_dataset_splits(
        options.dataset_name,
        options.dataset_config_name,
        options.train_data_dir,
        options.cache_dir,
        options.label_column,
        options.class_conditional,
    )
    settings = {
        "image_column": options.image_column,
        "label_column": options.label_column,
        "with_labels": options.class_conditional,
        "on_bad_image": options.on_bad_image,
        "bits": 16 if options.preserve_input_precision else 8,
        "cache_dir": options.cache_dir,
        "num_workers": options.preprocessing_num_workers,
    }
    data = prepare_pixels(train_split, options.resolution, options.channels, **settings)
    if held_out_split is None:
        return data, None
    trained = None if data.class_names is None else (data.class_names, data.labels)
    held_out = prepare_pixels(held_out_split, options.resolution, data.channels, **settings, trained=trained)
    if len(held_out) == 0:
        print_main(f"No images are held out: {'; '.join(held_out.left_out)}.")
        return data, None
    return data, held_out


def describe_data(options: DataOptions, data: PixelDataset, held_out: PixelDataset | None) -> str:
    """What a run says at its start about the images it uses."""
    origin = options.dataset_name or options.train_data_dir
    held = "none." if held_out is None else describe_images(held_out, origin)
    return f"Training images: {describe_images(data, origin)}\nHeld-out images: {held}"
