"""Evaluation tasks refuse what they cannot measure, and take modalities away as they say."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from tiny_model import build_model, rows_of

from mmpretrain.core.errors import ConfigError, DataError
from mmpretrain.core.types import FieldSpec
from mmpretrain.evaluation.ablation import AblatedEncoder, without
from mmpretrain.evaluation.base import EvaluationContext, Rows, TaskConfig
from mmpretrain.evaluation.health import HealthConfig
from mmpretrain.evaluation.knn import KNNTaskConfig
from mmpretrain.evaluation.losses import LossesTaskConfig
from mmpretrain.evaluation.mlm import MLMTaskConfig
from mmpretrain.evaluation.retrieval import RetrievalConfig
from mmpretrain.evaluation.retrieval_items import is_pictured
from mmpretrain.evaluation.retrieval_samples import thumbnail
from mmpretrain.modalities.image import ImageCodec, ImageCodecConfig
from mmpretrain.objectives.infonce import InfoNCEConfig
from mmpretrain.objectives.mlm import MLMConfig

OBJECTIVES = {"itc": InfoNCEConfig(), "words": MLMConfig(condition_on=("image",))}


def context_of(present: bool, members: dict[str, bytes]) -> EvaluationContext:
    """Four rows with a text and, if present, an image; the image alone has a codec."""

    def rows(shards: object, max_samples: object) -> Iterator[Rows]:
        tensors = rows_of([5, 6, 7, 8])
        tensors["image.present"] = torch.full((4,), present)
        yield Rows(tensors, ("a", "b", "c", "d"), (members,) * 4)

    codecs = {"image": ImageCodec(16, 16, ImageCodecConfig())}
    return EvaluationContext(build_model(OBJECTIVES).eval(), codecs, rows, torch.device("cpu"))


def test_a_batch_without_a_modality_keeps_all_else() -> None:
    batch = rows_of([5, 6])
    taken = without(batch, ["image"])
    assert not taken["image.present"].any()
    assert not taken["image"].any()
    assert batch["image.present"].all()
    assert {name for name in batch if taken[name] is not batch[name]} == {"image", "image.present"}


def test_an_objective_counts_the_same_targets_without_a_modality_and_sees_none_of_it() -> None:
    model = build_model(OBJECTIVES).eval()
    batch, other = rows_of([5, 6]), rows_of([5, 6])
    other["image"] = 255 - other["image"]
    objective = model.objectives["words"]
    with torch.no_grad():
        whole = objective.encode(model.encoder(batch))
        parts = [objective.encode(AblatedEncoder(model, rows, ["image"])) for rows in (batch, other)]
        swapped = objective.encode(model.encoder(other))
    assert parts[0]["count"] == whole["count"] == objective.count(batch)
    assert parts[0]["sum"] == parts[1]["sum"]
    assert len({whole["sum"].item(), swapped["sum"].item(), parts[0]["sum"].item()}) == 3


@pytest.mark.parametrize(
    ("task", "members", "message"),
    [
        (KNNTaskConfig(), {"json": b'{"label": 3}'}, r"needs two classes .* have \['3'\] under 'label'"),
        (KNNTaskConfig(), {}, "sample a has no .json member to read 'label' from"),
    ],
)
def test_samples_that_a_probe_cannot_use_are_refused(task: TaskConfig, members: dict[str, bytes], message: str) -> None:
    with pytest.raises(DataError, match=message):
        task.run(context_of(True, members))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (KNNTaskConfig, "a probe saw no samples that hold 'image'; check its train_shards"),
        (HealthConfig, "at least 2 samples that hold image and text; saw 0"),
        (lambda: LossesTaskConfig(objectives=["words"]), "the evaluation of words found nothing to predict; check"),
    ],
)
def test_shards_without_the_modality_are_refused(make: Callable[[], TaskConfig], message: str) -> None:
    context = context_of(False, {"json": b"{}"})
    rows = rows_of([5])
    codecs = {**context.codecs, "text": _Words(rows)}
    with pytest.raises(DataError, match=message):
        make().run(replace(context, codecs=codecs))


class _Words:
    """Fields of the tiny text tower, for stand-ins."""

    def __init__(self, rows: dict[str, torch.Tensor]) -> None:
        length = rows["text"].shape[1]
        self.fields = {"text": FieldSpec((length,), "int64"), "text.mask": FieldSpec((length,), "bool")}


def test_losses_that_depend_on_the_batch_are_refused_before_training() -> None:
    model = build_model(OBJECTIVES)
    LossesTaskConfig().check_model(model)
    with pytest.raises(
        ConfigError, match="names itc, whose loss compares the rows of a batch and so depends on its size"
    ):
        LossesTaskConfig(objectives=["itc", "words"]).check_model(model)
    with pytest.raises(ConfigError, match=r"each objective of the model \(itc\) compares the rows of a batch; remove"):
        LossesTaskConfig().check_model(build_model({"itc": InfoNCEConfig()}))


def test_a_config_is_told_what_its_model_lacks_for_a_task() -> None:
    towers, objectives = ("image", "text"), OBJECTIVES
    (fault,) = LossesTaskConfig(objectives=["mim"]).faults(towers, objectives)
    assert fault == "names the objective mim, the run has itc, words; name one of those"
    (fault,) = MLMTaskConfig(modality="notes").faults(towers, objectives)
    assert "needs an mlm objective on notes, the model has the objectives itc, words; remove the task" in fault
    (fault,) = RetrievalConfig(pairs="all").faults(("image",), objectives)
    assert "compares modalities, the model has image alone; remove the task or add a tower" in fault
    assert not list(MLMTaskConfig().faults(towers, objectives))


def test_pairs_are_one_or_several_or_all() -> None:
    towers = ("text", "image", "audio")
    assert RetrievalConfig().chosen(towers) == [("image", "text")]
    assert RetrievalConfig(pair=("audio", "image")).modalities == ("audio", "image")
    assert RetrievalConfig(pairs="all").chosen(towers) == [("audio", "image"), ("audio", "text"), ("image", "text")]
    assert RetrievalConfig(pairs="all").modalities == ()
    assert RetrievalConfig(pair=("text", "image")).figure_groups(towers) < RetrievalConfig(pairs="all").figure_groups(
        towers
    )
    for fields, message in (
        ({"pair": ["image", "text"], "pairs": "all"}, "both pair and pairs are given; put all of them into pairs"),
        ({"pairs": [["image", "text"], ["text", "image"]]}, "names a pair twice; name each once, in either order"),
        ({"pair": ["image", "image"]}, "both modalities are 'image'; name two different ones"),
        ({"pairs": []}, "at least 1 item"),
    ):
        with pytest.raises(ValidationError, match=message):
            RetrievalConfig.model_validate(fields)


def test_pictures_are_known_by_their_form_and_a_clip_is_shown_by_its_middle_frame(tmp_path: Path) -> None:
    assert is_pictured(FieldSpec((3, 8, 8), "uint8"))
    assert is_pictured(FieldSpec((4, 3, 8, 8), "uint8"))
    assert not is_pictured(FieldSpec((16000,), "int16"))
    assert not is_pictured(FieldSpec((3, 8, 8), "float32"))
    clip = torch.zeros(3, 3, 8, 8, dtype=torch.uint8)
    clip[1] = 200
    assert thumbnail(clip) == thumbnail(clip[1])
    assert thumbnail(clip) != thumbnail(clip[0])
