"""Train the classifier behind `dia_diffusion.scoring.features.DigitsFeatures` and write its weights into the package.

    python tools/train_digits_features.py

It sees the training split of the embedded digits only; the held-out split serves for the accuracy printed at the end.
Some seconds on one core.
"""

from pathlib import Path

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor

from dia_diffusion.data.preparation import prepare_pixels
from dia_diffusion.data.sources import load_digits_dataset
from dia_diffusion.scoring.features.named import DIGITS_WEIGHTS, digits_classifier

SEED = 0
EPOCHS = 60
BATCH_SIZE = 64
PEAK_LEARNING_RATE = 3e-3
NOISE = 0.05


def load_split(split: str) -> tuple[Tensor, Tensor]:
    """Load images as floats in [0, 1], `(N, 1, 8, 8)`, and their classes, `(N,)`."""
    data = prepare_pixels(load_digits_dataset()[split], resolution=8, channels=1, with_labels=True)
    batch = data.fetch(range(len(data)))
    return batch["images"].float() / 255, batch["labels"]


def augment(images: Tensor) -> Tensor:
    """Shift each image by at most one pixel, with zeros at the edge, and add a little noise."""
    shifted = F.pad(images, (1, 1, 1, 1)).unfold(2, 8, 1).unfold(3, 8, 1)
    down, across = torch.randint(3, (2, len(images)))
    images = shifted[torch.arange(len(images)), :, down, across]
    return images + NOISE * torch.randn_like(images)


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    images, labels = load_split("train")
    held_out_images, held_out_labels = load_split("test")

    model = digits_classifier()
    steps = EPOCHS * (len(images) // BATCH_SIZE)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LEARNING_RATE, total_steps=steps)
    for _ in range(EPOCHS):
        # The last, smaller batch of an epoch is left out: its statistics would be the noisiest.
        for rows in torch.randperm(len(images)).split(BATCH_SIZE)[: len(images) // BATCH_SIZE]:
            loss = F.cross_entropy(model(augment(images[rows])), labels[rows], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()

    model.eval()
    with torch.no_grad():
        accuracy = (model(held_out_images).argmax(1) == held_out_labels).float().mean().item()
    metadata = {
        "held_out_accuracy": f"{accuracy:.4f}",
        "train_images": str(len(images)),
        "held_out_images": str(len(held_out_images)),
        "seed": str(SEED),
    }
    path = Path(str(DIGITS_WEIGHTS))
    path.write_bytes(safetensors.torch.save(model.state_dict(), metadata))
    print(f"held-out accuracy {accuracy:.4f}, {path.stat().st_size / 1000:.0f} kB written to {path}")


if __name__ == "__main__":
    main()
