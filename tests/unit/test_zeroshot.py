"""Zero-shot classification: hits against NumPy, and every fault of a classes file or a label named."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from mmpretrain.core.errors import DataError
from mmpretrain.evaluation.labels import json_label
from mmpretrain.evaluation.zeroshot import class_index, read_classes, top_hits


def classes_file(folder: Path, **changes: object) -> Path:
    path = folder / "classes.json"
    content = {"classes": ["red square", "7", "blue disc"], "templates": ["a {}.", "{}"], **changes}
    path.write_text(json.dumps(content))
    return path


def test_hits_equal_those_of_sorted_scores() -> None:
    generator = np.random.default_rng(0)
    scores, labels = generator.normal(size=(50, 9)).astype(np.float32), generator.integers(9, size=50)
    order = np.argsort(-scores, axis=1)
    first = (order[:, 0] == labels).sum()
    among = (order[:, :5] == labels[:, None]).any(axis=1).sum()
    assert top_hits(torch.from_numpy(scores), torch.from_numpy(labels), 5).tolist() == [first, among, 50]


def test_equal_scores_count_against_the_model() -> None:
    assert top_hits(torch.ones(4, 3), torch.tensor([0, 1, 2, 0]), 3).tolist() == [0, 4, 4]
    assert top_hits(torch.full((1, 3), torch.nan), torch.tensor([0]), 2).tolist() == [0, 0, 1]


def test_a_label_is_a_class_by_name_or_else_by_index(tmp_path: Path) -> None:
    known = read_classes(classes_file(tmp_path))
    assert [class_index(label, known) for label in ("blue disc", "7", "0")] == [2, 1, 0]
    with pytest.raises(DataError, match="label 'green' is not among the 3 classes"):
        class_index("green", known)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"templates": ["a photo"]}, r"each template needs a \{\} for the class name; saw \['a photo'\]"),
        ({"templates": []}, "saw no templates"),
        ({"classes": ["a", "a"]}, "class names must be present and distinct"),
        ({"clases": ["a"]}, "cannot read the classes of"),
    ],
)
def test_a_faulty_classes_file_is_refused(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_classes(classes_file(tmp_path, **changes))


def test_a_missing_classes_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot read the classes of"):
        read_classes(tmp_path / "classes.json")


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"jpg": b""}, r"sample s/1 has no .json member to read 'label' from \(members: \['jpg'\]\)"),
        ({"json": b"{"}, "the .json member of sample s/1 is not JSON"),
        ({"json": b'{"caption": "x"}'}, r"has no key 'label'; it has \['caption'\]"),
        ({"json": b"[1]"}, "has no key 'label'; it has list"),
    ],
)
def test_a_sample_without_its_label_is_refused(members: dict[str, bytes], message: str) -> None:
    with pytest.raises(DataError, match=message):
        json_label(members, "label", "s/1")
