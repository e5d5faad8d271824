"""The embedded data set: handwritten digits."""

import datasets
import numpy as np
from datasets import Dataset, DatasetDict
from PIL import Image


def load_digits_dataset() -> DatasetDict:
    """The 1,797 handwritten digits of 8x8 pixels that scikit-learn ships (UCI optdigits, test part), with labels.

    A fifth of the images, drawn at random with every class in proportion, is held out as the split `test`: 1,437 images
    for training, 360 held out, always the same. The 17 grey levels of the source are spread over 0 to 255.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bunch = load_digits()
    pixels = np.rint(bunch.images * (255 / 16)).astype(np.uint8)
    features = datasets.Features(
        image=datasets.Image(), label=datasets.ClassLabel(names=[str(name) for name in bunch.target_names])
    )
    train, held_out = train_test_split(np.arange(len(pixels)), test_size=0.2, stratify=bunch.target, random_state=0)
    return DatasetDict(
        {
            split: Dataset.from_dict(
                {"image": [Image.fromarray(image) for image in pixels[rows]], "label": bunch.target[rows]}, features
            )
            for split, rows in (("train", np.sort(train)), ("test", np.sort(held_out)))
        }
    )
