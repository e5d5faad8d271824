"""Mean average precision of detections at one intersection over union, as COCO computes it."""

import numpy as np
import torch
from torch import Tensor

RECALLS = np.linspace(0, 1, 101)


def corners(boxes: Tensor) -> Tensor:
    """Convert boxes from centre and size to left, top, right, bottom."""
    centre, size = boxes.chunk(2, dim=-1)
    return torch.cat([centre - size / 2, centre + size / 2], dim=-1)


def intersection_over_union(some: Tensor, others: Tensor) -> Tensor:
    """Return the intersection over union of each box with each of the others, `(N, M)`."""
    some, others = corners(some)[:, None], corners(others)[None]
    sides = (torch.minimum(some, others)[..., 2:] - torch.maximum(some, others)[..., :2]).clamp(min=0)
    area, other_area = ((boxes[..., 2:] - boxes[..., :2]).prod(-1) for boxes in (some, others))
    return sides.prod(-1) / (area + other_area - sides.prod(-1))


def average_precision(hits: np.ndarray, total: int) -> float:
    """Return the mean over 101 recalls of the best precision at that recall or a higher one (COCO).

    Args:
        hits: Detections in the order of their scores, each a hit or not.
        total: Number of objects.
    """
    found = hits.cumsum()
    best = np.maximum.accumulate((found / np.arange(1, len(hits) + 1))[::-1])[::-1]
    reached = np.searchsorted(found / total, RECALLS)
    return float(np.append(best, 0)[reached].mean())


def mean_average_precision(detections: list[dict], targets: list[dict], threshold: float = 0.5) -> float:
    """Return the mean average precision over the classes.

    A detection is a hit if the box of its class that it overlaps most has at least this intersection over union. Boxes
    that a detection with a higher score has taken do not count.
    """
    precisions = []
    for label in sorted({int(label) for target in targets for label in target["class_labels"]}):
        scores, hits, total = [], [], 0
        for found, target in zip(detections, targets, strict=True):
            boxes = target["boxes"][target["class_labels"] == label]
            mine = (found["class_labels"] == label).nonzero()[:, 0]
            mine = mine[found["scores"][mine].argsort(descending=True, stable=True)]
            overlaps, total = intersection_over_union(found["boxes"][mine], boxes), total + len(boxes)
            for row, score in zip(overlaps, found["scores"][mine], strict=True):
                best = int(row.argmax()) if len(row) else None
                hits.append(best is not None and bool(row[best] >= threshold))
                scores.append(float(score))
                if hits[-1]:
                    overlaps[:, best] = -1
        order = np.argsort(-np.array(scores), kind="stable")
        precisions.append(average_precision(np.array(hits, int)[order], total))
    return float(np.mean(precisions))
