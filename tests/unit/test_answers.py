"""Answers evaluated whole and without each modality, against predictions made by hand."""

from collections.abc import Iterator, Sequence

import pytest
import torch
from test_shares import OBJECTIVES, batch, build

from mmpretrain.core.errors import DataError
from mmpretrain.core.types import Codec
from mmpretrain.evaluation.answers import AnswersConfig
from mmpretrain.evaluation.base import EvaluationContext, Rows
from mmpretrain.models.multimodal import MultimodalTransformer
from mmpretrain.objectives.infonce import InfoNCEConfig

CODECS: dict[str, Codec] = {}


def context(model: MultimodalTransformer, rows: dict[str, torch.Tensor]) -> EvaluationContext:
    def read(shards: Sequence[str] | None, max_samples: int | None) -> Iterator[Rows]:
        for part in (slice(0, 3), slice(3, 4)):
            tensors = {name: value[part] for name, value in rows.items() if name not in ("draw", "sample", "position")}
            keys = tuple(f"k{number}" for number in range(4))[part]
            yield Rows(tensors, keys, tuple({} for _ in keys))

    return EvaluationContext(model, CODECS, read, torch.device("cpu"))


def accuracy(model: MultimodalTransformer, rows: dict[str, torch.Tensor], absent: str | None) -> float:
    """By the fusion itself, the absent modality left out of the call altogether, over the labelled rows."""
    encoder = model.encoder(rows)
    towers = {name: encoder.tower(name) for name in ("image", "question") if name != absent}
    with torch.no_grad():
        outputs = model.objectives["answer"].head(encoder.fuse(towers)["pooled"])
    known = rows["label.present"]
    return float((outputs.argmax(1) == rows["label"])[known].float().mean())


def sharp(model: MultimodalTransformer) -> MultimodalTransformer:
    """With a head that tells rows apart, as the small initial one does not."""
    torch.manual_seed(1)
    torch.nn.init.normal_(model.objectives["answer"].head.predict.weight, std=5.0)
    return model.train(False)


def test_each_figure_is_that_of_predictions_without_the_modality() -> None:
    model, rows = sharp(build()), batch()
    rows["label.present"] = torch.tensor([True, True, True, False])
    with torch.no_grad():
        encoder = model.encoder(rows)
        towers = {name: encoder.tower(name) for name in ("image", "question")}
        rows["label"] = model.objectives["answer"].head(encoder.fuse(towers)["pooled"]).argmax(1)
    figures = AnswersConfig(prefix="test").run(context(model, rows))
    assert figures["test/answer_acc"] == 1.0
    for absent in ("image", "question"):
        assert figures[f"test/answer_acc_no_{absent}"] == pytest.approx(accuracy(model, rows, absent))
    shares = torch.bincount(rows["label"][:3], minlength=3) / 3
    assert figures["test/answer_acc_guess"] == pytest.approx(float(shares.max()))
    assert len(figures) == 4


def test_rows_that_lack_a_modality_anyway_are_measured_with_what_they_have() -> None:
    model, rows = sharp(build()), batch()
    rows["question.present"] = torch.tensor([True, False, True, False])
    figures = AnswersConfig().run(context(model, rows))
    alone = accuracy(model, rows, "question")
    assert figures["val/answer_acc_no_question"] == pytest.approx(alone)


def test_samples_without_labels_are_refused() -> None:
    rows = batch()
    rows["label.present"] = torch.zeros(4, dtype=torch.bool)
    with pytest.raises(DataError, match="the evaluation of answer found no labels 'label'; check its shards"):
        AnswersConfig().run(context(build(), rows))


def test_a_run_without_a_supervised_objective_has_no_answers() -> None:
    (fault,) = AnswersConfig().faults(["image"], {"itc": InfoNCEConfig()})
    assert fault == "needs a supervised objective, the run has itc; add one or remove the task"
    assert not list(AnswersConfig().faults(["image"], OBJECTIVES))
