import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dia_diffusion import attach


@pytest.fixture
def score(example):
    return example("helpers.average_precision")


def detections(*found):
    """Of class, score, and centre and size of the box."""
    classes, scores, boxes = zip(*found, strict=True) if found else ((), (), ())
    return {
        "class_labels": torch.tensor(classes, dtype=torch.long),
        "scores": torch.tensor(scores, dtype=torch.float32),
        "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
    }


def truth(*objects):
    return detections(*((label, 1.0, box) for label, box in objects))


LEFT, RIGHT = (0.2, 0.5, 0.2, 0.2), (0.8, 0.5, 0.2, 0.2)


def test_intersection_over_union(score):
    boxes = torch.tensor([LEFT, (0.3, 0.5, 0.2, 0.2), (0.2, 0.5, 0.1, 0.1), RIGHT])
    # Shifted by half a side: a half of three halves. Half as wide and high inside: a quarter.
    expected = torch.tensor([[1.0, 1 / 3, 1 / 4, 0.0]])
    torch.testing.assert_close(score.intersection_over_union(boxes[:1], boxes), expected)


@pytest.mark.parametrize(
    ("hits", "total", "expected"),
    [
        ([1, 1], 2, 1.0),
        ([1, 1], 4, 51 / 101),  # recalls 0 to 0.5 are reached
        ([0, 1], 1, 1 / 2),
        ([1, 0, 1], 2, (51 + 50 * 2 / 3) / 101),
        ([0, 1, 1], 2, 2 / 3),  # at recall 0.5 the precision of a higher recall counts
        ([0, 0], 3, 0.0),
        ([], 3, 0.0),
    ],
)
def test_average_precision(score, hits, total, expected):
    assert score.average_precision(np.array(hits, int), total) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ([(1, 0.9, LEFT), (2, 0.8, RIGHT)], 1.0),
        ([(1, 0.9, LEFT)], 0.5),  # class 2 is missed
        ([(2, 0.9, LEFT), (1, 0.8, RIGHT)], 0.0),  # the classes are exchanged
        ([(1, 0.9, LEFT), (1, 0.8, LEFT), (2, 0.7, RIGHT)], 1.0),  # the second of a box is a miss, behind full recall
        ([(1, 0.7, LEFT), (1, 0.9, RIGHT), (2, 0.8, RIGHT)], 0.75),  # a miss with a higher score
        ([(1, 0.9, (0.3, 0.5, 0.2, 0.2)), (2, 0.8, RIGHT)], 0.5),  # overlaps by a third
        ([(1, 0.9, (0.25, 0.5, 0.2, 0.2)), (2, 0.8, RIGHT)], 1.0),  # by three fifths
        ([(1, 0.9, LEFT), (2, 0.8, RIGHT), (7, 1.0, LEFT)], 1.0),  # no such class is there
        ([], 0.0),
    ],
)
def test_mean_average_precision_of_one_picture(score, found, expected):
    target = truth((1, LEFT), (2, RIGHT))
    assert score.mean_average_precision([detections(*found)], [target]) == pytest.approx(expected)


def test_mean_average_precision_ranks_the_detections_of_all_pictures_together(score):
    targets = [truth((1, LEFT)), truth((1, LEFT)), truth()]
    found = [detections((1, 0.5, LEFT)), detections((1, 0.9, LEFT)), detections((1, 0.7, LEFT))]
    # In order: a hit, a miss where nothing is, a hit.
    assert score.mean_average_precision(found, targets) == pytest.approx((51 + 50 * 2 / 3) / 101)


def test_boxes_are_where_the_digits_are(example):
    detection = example("object_detection")
    pictures, targets = detection.compose(*detection.load_digits(0), 100, seed=3)
    assert pictures.shape == (100, 3, 64, 64)
    assert {len(target["boxes"]) for target in targets} == {1, 2, 3, 4}
    for picture, target in zip(pictures[:, 0], targets, strict=True):
        rest = picture.clone()
        for x, y, width, height in (target["boxes"] * 64).tolist():
            rows, columns = (
                slice(round(middle - side / 2), round(middle + side / 2)) for middle, side in ((y, height), (x, width))
            )
            inside = picture[rows, columns]
            # The digit touches each side of its box.
            assert all(edge.any() for edge in (inside[0], inside[-1], inside[:, 0], inside[:, -1]))
            rest[rows, columns] = 0
        assert not rest.any()
    again, _ = detection.compose(*detection.load_digits(0), 100, seed=3)
    assert torch.equal(again, pictures)
    assert not set(map(bytes, detection.load_digits(0)[0])) & set(map(bytes, detection.load_digits(1)[0]))


def test_detections_are_the_best_pairs_of_query_and_class(example):
    logits = torch.full((1, 2, 10), -5.0)
    logits[0, 0, 3], logits[0, 1, 7] = 1.0, 2.0
    outputs = SimpleNamespace(logits=logits, pred_boxes=torch.tensor([[LEFT, RIGHT]]))
    model = SimpleNamespace(eval=lambda: lambda pixel_values: outputs)
    (found,) = example("object_detection").detect(model, torch.zeros(1, 3, 64, 64))
    assert found["class_labels"].tolist() == [7, 3]
    torch.testing.assert_close(found["scores"], torch.tensor([2.0, 1.0]).sigmoid())
    torch.testing.assert_close(found["boxes"], torch.tensor([RIGHT, LEFT]))


def test_the_detector_is_trained_with_its_attention_and_its_backbone(example, tmp_path):
    detection = example("object_detection")
    arguments = ["--steps", "4", "--batch_size", "2", "--test_pictures", "4", "--output_dir", str(tmp_path)]
    result = detection.main(arguments)
    assert result == json.loads((tmp_path / "result.json").read_text())
    assert result["step"] == 4
    assert 0 <= result["map_50"] <= 1

    trained = load_file(tmp_path / "detector.safetensors")
    torch.manual_seed(result["options"]["seed"])
    model = detection.make_detector()
    attach(model)
    assert len(model.dia.widths) == 8
    changed = {name for name, value in model.named_parameters() if not torch.equal(value, trained[name])}
    assert {name for name, _ in model.dia.named_parameters() if name.startswith("decoders")} <= {
        name.removeprefix("dia.") for name in changed
    }
    assert any("backbone" in name and "convolution" in name for name in changed)
    model.load_state_dict(trained)
