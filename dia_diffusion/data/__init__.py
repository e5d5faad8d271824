"""Images to learn from and to compare with: data sets, decoding, rows of pixels, and pictures of many."""

from ..door import open_door

__getattr__, __all__ = open_door(
    __name__,
    description="describe_images",
    decoding="UNREADABLE image_to_pixels to_unit_range",
    embedded="EMBEDDED",
    grid="image_grid",
    pixels="EndlessShuffle PixelDataset",
    preparation="prepare_at_own_size prepare_pixels",
    sources="DIGITS load_all_images load_dataset_splits load_images",
)
