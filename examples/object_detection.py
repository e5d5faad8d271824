"""Train a small detector with shared attention in its ResNet, on pictures composed of handwritten digits.

RT-DETR of transformers finds 1 to 4 digits of different sizes on a canvas of 64x64 pixels.

    python examples/object_detection.py      # 2,000 steps with DIA, about 20 minutes on one core; no download
    python examples/object_detection.py --attention none

Results in `runs/object_detection` (`--output_dir`): `result.json`, with the mean average precision on held-out digits,
and the weights, `detector.safetensors`.

Such detectors learn slowly: with `--steps 1400` the precision was 0.36 and rising after 1,250 steps and 13 minutes (one
of 2 busy cores of an x86-64 server, November 2026, one seed). The same without attention has not been measured.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import RTDetrConfig, RTDetrForObjectDetection, RTDetrResNetConfig

from dia_diffusion import attach
from dia_diffusion.data.preparation import prepare_pixels
from dia_diffusion.data.sources import load_dataset_splits
from dia_diffusion.errors import UsageError
from dia_diffusion.files import write_json
from helpers import flags
from helpers.average_precision import mean_average_precision

CANVAS, CLASSES = 64, 10


def load_digits(split: int) -> tuple[np.ndarray, np.ndarray]:
    """Load the digits of a split (0: training, 1: held out): images `(N, 8, 8)` and their classes."""
    data = prepare_pixels(load_dataset_splits("digits")[split], resolution=8, channels=1, with_labels=True)
    batch = data.fetch(range(len(data)))
    return batch["images"][:, 0].numpy(), batch["labels"].numpy()


def compose(images: np.ndarray, labels: np.ndarray, number: int, seed: int) -> tuple[Tensor, list[dict[str, Tensor]]]:
    """Compose pictures of 1 to 4 digits that do not overlap, each magnified 2 to 3 times.

    Returns:
        Pixels in [0, 1], and for each picture the targets of transformers' detectors: `class_labels`, and `boxes` as
        centre and size in shares of the canvas.
    """
    rng, canvas, targets = np.random.default_rng(seed), np.zeros((number, CANVAS, CANVAS), np.float32), []
    for picture in canvas:
        boxes, classes, taken = [], [], np.zeros((CANVAS, CANVAS), bool)
        for index in rng.integers(len(images), size=rng.integers(1, 5)):
            digit = np.kron(images[index], np.ones((rng.integers(2, 4),) * 2)) / 255
            rows, columns = np.flatnonzero(digit.any(1)), np.flatnonzero(digit.any(0))
            digit = digit[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
            height, width = digit.shape
            top, left = rng.integers(CANVAS - height + 1), rng.integers(CANVAS - width + 1)
            area = np.s_[top : top + height, left : left + width]
            if not taken[area].any():
                picture[area], taken[area] = digit, True
                boxes.append([left + width / 2, top + height / 2, width, height])
                classes.append(labels[index])
        boxes = torch.tensor(boxes, dtype=torch.float32) / CANVAS
        targets.append({"class_labels": torch.tensor(np.array(classes)), "boxes": boxes})
    return torch.from_numpy(canvas)[:, None].repeat(1, 3, 1, 1), targets


def make_detector() -> RTDetrForObjectDetection:
    """Build an RT-DETR small enough for one core."""
    backbone = RTDetrResNetConfig(
        embedding_size=16,
        hidden_sizes=[16, 32, 64, 96],
        depths=[2, 2, 2, 2],
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )
    width = {"encoder_hidden_dim": 64, "encoder_ffn_dim": 128, "d_model": 64, "decoder_ffn_dim": 128}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    config = RTDetrConfig(
        backbone_config=backbone,
        # These suit a pretrained backbone.
        freeze_backbone_batch_norms=False,
        encoder_in_channels=[32, 64, 96],
        decoder_in_channels=[64, 64, 64],
        decoder_layers=2,
        hidden_expansion=0.5,
        num_queries=20,
        num_denoising=20,
        num_labels=CLASSES,
        **width,
        **heads,
    )
    return RTDetrForObjectDetection(config)


@torch.no_grad()
def detect(model: RTDetrForObjectDetection, pictures: Tensor) -> list[dict[str, Tensor]]:
    """Return the classes, scores and boxes of the detections in each picture."""
    outputs = model.eval()(pixel_values=pictures)
    scores, labels = outputs.logits.sigmoid().flatten(1).sort(descending=True)
    scores, labels = scores[:, : outputs.logits.shape[1]], labels[:, : outputs.logits.shape[1]]
    boxes = outputs.pred_boxes.gather(1, (labels // CLASSES)[..., None].expand(-1, -1, 4))
    return [
        {"class_labels": classes % CLASSES, "scores": score, "boxes": box}
        for classes, score, box in zip(labels, scores, boxes, strict=True)
    ]


def main(arguments: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--attention", choices=("none", "dia"), default="dia")
    parser.add_argument("--steps", type=flags.count, default=2000)
    parser.add_argument("--batch_size", type=flags.count, default=32)
    parser.add_argument("--learning_rate", type=flags.natural, default=1e-3)
    parser.add_argument("--test_pictures", type=flags.count, default=500)
    parser.add_argument("--seed", type=flags.seed, default=0)
    parser.add_argument("--output_dir", type=flags.folder, default=Path("runs/object_detection"))
    options = parser.parse_args(arguments)
    try:
        digits, test_digits = load_digits(0), load_digits(1)
    except UsageError as error:
        parser.error(str(error))

    torch.manual_seed(options.seed)
    model, start = make_detector(), time.perf_counter()
    # After the detector is built, because some freeze parts of their backbone while they are built.
    if options.attention == "dia":
        attach(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.learning_rate, total_steps=options.steps)
    history, losses = [], []
    test_pictures, test_targets = compose(*test_digits, options.test_pictures, seed=0)
    for step in range(1, options.steps + 1):
        pictures, targets = compose(*digits, options.batch_size, seed=(options.seed, step))
        loss = model.train()(pixel_values=pictures, labels=targets).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 250 == 0 or step == options.steps:
            precision = mean_average_precision(detect(model, test_pictures), test_targets)
            seconds = round(time.perf_counter() - start)
            history.append({"step": step, "loss": float(np.mean(losses)), "map_50": precision, "seconds": seconds})
            losses.clear()
            print(", ".join(f"{name} {value:.4g}" for name, value in history[-1].items()), flush=True)
    result = history[-1] | {"options": vars(options) | {"output_dir": str(options.output_dir)}, "history": history}
    options.output_dir.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), options.output_dir / "detector.safetensors")
    write_json(options.output_dir / "result.json", result)
    return result


if __name__ == "__main__":
    main()
