"""Options that say which images."""

from dataclasses import dataclass
from typing import Literal

from .fields import Count, Location, Natural, Options, option


@dataclass
class DataOptions(Options):
    """Which images, and how they are prepared."""

    dataset_name: Location | None = option(
        None, "digits, mnist5k, a data set on the Hub, or a folder that datasets can load."
    )
    dataset_config_name: str | None = option(None, "Configuration of a data set that has several.")
    train_data_dir: Location | None = option(None, "A folder of images, instead of --dataset_name.")
    cache_dir: Location | None = option(None, "Where data sets and prepared images are kept.")
    image_column: str | None = option(None, "Column of the images; by default the first of type Image.")
    label_column: str | None = option(None, "Column of the classes; by default the first of type ClassLabel.")
    resolution: Count = option(64, "Pixels of height and width.")
    channels: Literal[1, 3] | None = option(None, "1 (grey) or 3 (colour); by default as the images are.")
    center_crop: bool = option(False, "Cut images that are not square in the middle, instead of at random.")
    random_flip: bool = option(False, "Flip images horizontally at random.")
    preserve_input_precision: bool = option(False, "Keep 16 bits of images that have them, instead of 8.")
    on_bad_image: Literal["error", "skip"] = option("error", "What to do about an image that cannot be read.")
    vae: Location | None = option(
        None, "Train in the latent space of this AutoencoderKL or AutoencoderTiny: a folder or a Hub id."
    )
    class_conditional: bool = option(False, "Condition the model on the labels of the data set.")
    preprocessing_num_workers: Count | None = option(
        None, "Processes that decode the images, once; by default one for each core."
    )
    dataloader_num_workers: Natural = option(0, "Processes that load data; 0 loads in the main process.")
