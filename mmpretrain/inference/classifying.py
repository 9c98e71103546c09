"""`mmpretrain classify`: every sample of a folder or of shards with its best classes.

Enter: a model, inputs, classes for zero-shot or the name of a trained head. Leave: one answer per sample, and the
samples that could not be used. Refused: a head that reads what no sample holds.
"""

import csv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from torch import Tensor

from mmpretrain.core.errors import AbsentError, ConfigError, DataError
from mmpretrain.core.progress import progress_bar
from mmpretrain.core.types import Array, TensorDict
from mmpretrain.evaluation.zeroshot import ClassSet, check_classes, read_classes
from mmpretrain.inference.inputs import Name, SampleInputs
from mmpretrain.inference.model import Meaning, Model, Scores
from mmpretrain.inference.processor import Processor, stack
from mmpretrain.inference.stream import Broken, decode_all


@dataclass(frozen=True)
class Answer:
    """The best classes of one sample, best first."""

    name: Name
    best: Sequence[tuple[str, float]]


@dataclass(frozen=True)
class ClassifyReport:
    """What became of the samples."""

    answers: tuple[Answer, ...]
    meaning: Meaning
    broken: tuple[Broken, ...]
    unused: int
    """Samples that hold nothing the model was asked to read."""


@dataclass(frozen=True)
class Classifier:
    """What reads which modalities and gives scores for batch fields."""

    modalities: tuple[str, ...]
    scores: Callable[[TensorDict], Scores]


def zero_shot(model: Model, known: ClassSet, modality: str | None) -> Classifier:
    """Nearness of one modality to the prompts of each class; without a name the only one that is no text."""
    candidates = [name for name in model.modalities if name != model.processor.text_modality]
    if modality is None and len(candidates) != 1:
        raise ConfigError(f"the model reads {', '.join(candidates)}; choose one with --modality")
    chosen = candidates[0] if modality is None else modality
    model.processor.decoder(chosen)
    weights = model.class_vectors(known)

    def scores(fields: TensorDict) -> Scores:
        values: Tensor = model.similarity(model.embed_fields(chosen, fields), weights)
        return Scores(tuple(known.classes), values, "cosine")

    return Classifier((chosen,), scores)


def trained_head(model: Model, objective: str | None) -> Classifier:
    """A supervised objective's own classes."""
    name, head = model.head(objective)
    return Classifier(head.inputs, lambda fields: model.predict_fields(name, fields))


def classify(
    model: Model, classifier: Classifier, inputs: SampleInputs, top: int = 5, batch: int = 64, threads: int = 2
) -> ClassifyReport:
    """Answers in the order of the samples; one that lacks all the modalities has none."""
    if top < 1:
        raise ConfigError(f"--top is {top}; ask for at least 1")
    answers: list[Answer] = []
    broken: list[Broken] = []
    unused = 0
    meaning: Meaning = "cosine"
    with progress_bar() as progress:
        task = progress.add_task("classifying", total=len(inputs))
        decoded = decode_all(inputs, range(len(inputs)), lambda members: _row(model, members, classifier), threads)
        while some := list(islice(decoded, batch)):
            progress.advance(task, len(some))
            broken += [Broken(one.name.key, one.name.path, one.reason or "") for one in some if one.reason is not None]
            usable = [(one.name, one.result) for one in some if one.result]
            unused += sum(one.reason is None and not one.result for one in some)
            if usable:
                scores = classifier.scores(stack([fields for _, fields in usable]))
                meaning = scores.meaning
                names = (name for name, _ in usable)
                answers += [Answer(name, best) for name, best in zip(names, scores.top(top), strict=True)]
    if not answers:
        why = f"; the first broken one is {broken[0].key}: {broken[0].reason}" if broken else ""
        raise DataError(f"the input holds nothing of {', '.join(classifier.modalities)} to classify{why}")
    return ClassifyReport(tuple(answers), meaning, tuple(broken), unused)


def classes_of(given: str, templates: Sequence[str]) -> ClassSet:
    """A classes.json, or names with commas between them; templates on the command line stand before the file's."""
    if given.endswith(".json"):
        known = read_classes(Path(given))
        return known.model_copy(update={"templates": list(templates)}) if templates else known
    names = [name.strip() for name in given.split(",") if name.strip()]
    known = ClassSet(classes=names, templates=list(templates) or ["{}"])
    check_classes(known, "--classes")
    return known


def write_csv(report: ClassifyReport, out: Path) -> None:
    """One line per sample: key, path, then class and score for each place."""
    places = max(len(answer.best) for answer in report.answers)
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        heading = (f"{what}_{place}" for place in range(1, places + 1) for what in ("class", report.meaning))
        writer.writerow(["key", "path", *heading])
        for answer in report.answers:
            cells = [cell for name, value in answer.best for cell in (name, f"{value:.6f}")]
            writer.writerow([answer.name.key, answer.name.path, *cells])


def _row(model: Model, members: Mapping[str, bytes], classifier: Classifier) -> dict[str, Array]:
    """The fields of all modalities with what is missing as zeros; empty where all of them are."""
    row: dict[str, Array] = {}
    found = False
    for modality in classifier.modalities:
        fields = _fields(model.processor, modality, members)
        found |= fields is not None
        row |= model.absent(modality) if fields is None else fields
        row[f"{modality}.present"] = np.array(fields is not None)
    return row if found else {}


def _fields(processor: Processor, modality: str, members: Mapping[str, bytes]) -> dict[str, Array] | None:
    try:
        return processor.decoder(modality).decode(members, None)
    except AbsentError:
        return None
