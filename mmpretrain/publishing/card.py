"""The model card: what the run recorded, in the order a reader asks.

Enter: facts, the model's own config, which layouts were written and how they compared. Leave: the text of README.md,
with the Hub's metadata before it. Refused: text that still holds a placeholder.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import yaml

from mmpretrain.publishing.facts import Json, PublishFacts, refuse_placeholders
from mmpretrain.publishing.verify import TOLERANCE, Results

LOADERS = {
    "mmpretrain": "`mmpretrain` (this folder)",
    "clip": "`transformers.CLIPModel` (`clip/`)",
    "siglip": "`transformers.SiglipModel` (`siglip/`)",
    "open_clip": "`open_clip` (`open_clip/`)",
}


@dataclass(frozen=True)
class Contents:
    """What stands in the folder beside the card."""

    architecture: Json
    """The resolved model config."""
    objectives: Json
    num_parameters: int
    obstacles: Mapping[str, list[str]]
    """Layout -> why it was not written; no reasons: it was."""
    results: Results
    usage: Mapping[str, str]
    versions: Mapping[str, str]


def render_card(facts: PublishFacts, contents: Contents) -> str:
    """The whole README.md."""
    sections = [
        _metadata(facts, contents),
        f"# {facts.name}\n\n{_summary(facts, contents)}",
        f"## Use\n\n{_usage(contents)}",
        f"## Layouts\n\n{_layouts(contents)}",
        f"## Training\n\n{_training(facts, contents)}",
        f"## Data\n\n{_data(facts)}",
        f"## Evaluation\n\n{_evaluation(facts)}",
        f"## Limitations\n\n{_limitations(facts)}",
        f"## Versions\n\n{_table(('package', 'version'), contents.versions.items())}",
    ]
    body = "\n\n".join(sections) + "\n"
    refuse_placeholders(body, "the model card")
    return body


def _metadata(facts: PublishFacts, contents: Contents) -> str:
    towers = _towers(contents)
    record: dict[str, object] = {
        "license": facts.license,
        "library_name": "transformers",
        "tags": [
            "mmpretrain",
            "multimodal",
            *(layout for layout, reasons in contents.obstacles.items() if not reasons),
        ],
    }
    if {"image", "text"} <= set(towers):
        record["pipeline_tag"] = "zero-shot-image-classification"
    if facts.evaluations:
        metrics = [{"type": name, "value": round(value, 6)} for name, value in sorted(facts.evaluations.items())]
        dataset = {
            "name": ", ".join(source.name for source in facts.sources) or "the run's shards",
            "type": "webdataset",
        }
        result = {"task": {"type": "image-text-retrieval"}, "dataset": dataset, "metrics": metrics}
        record["model-index"] = [{"name": facts.name, "results": [result]}]
    return f"---\n{yaml.safe_dump(record, sort_keys=False, allow_unicode=True)}---"


def _summary(facts: PublishFacts, contents: Contents) -> str:
    towers = _towers(contents)
    described = ", ".join(f"{name} ({_kind(tower)})" for name, tower in sorted(towers.items()))
    lines = [facts.description] if facts.description else []
    lines.append(
        f"A multimodal transformer with towers {described}, fusion {_kind(contents.architecture.get('fusion'))} and a "
        f"common embedding space of {contents.architecture.get('embed_dim')} dimensions; {contents.num_parameters:,} "
        f"parameters. {_origin(facts)} with mmpretrain for {facts.steps:,} steps, {facts.samples_seen:,} samples."
    )
    if facts.average_decay is not None:
        lines.append(f"The weights are a moving average of those of the run, with decay {facts.average_decay:g}.")
    return "\n\n".join(lines)


def _origin(facts: PublishFacts) -> str:
    parent = facts.parent
    if parent is None:
        return "Pretrained"
    return f"Fine-tuned from {parent.source} ({parent.description}, weights `{parent.digest}`)"


def _usage(contents: Contents) -> str:
    parts = [f"`{name}`:\n\n```python\n{source.strip()}\n```" for name, source in sorted(contents.usage.items())]
    note = "Each program stands in this folder and was run before publication, where its library was installed."
    return "\n\n".join([note, *parts])


def _layouts(contents: Contents) -> str:
    rows = [(LOADERS[layout], _compared(found)) for layout, found in contents.results.items()]
    missed = [
        f"- {LOADERS[name]}: no, {'; '.join(reasons)}." for name, reasons in contents.obstacles.items() if reasons
    ]
    table = _table(("loads in", "largest difference of an embedding's coordinate"), rows)
    note = f"Compared on `probe.safetensors` in a fresh process; more than {TOLERANCE:g} is refused."
    if "usage_open_clip.py" in contents.usage:
        note += (
            " open_clip's own tokenizer cleans texts first (entities, quotes, blanks, line ends), which training did "
            "not; `usage_open_clip.py` goes around that."
        )
    return "\n\n".join([note, table, *(["Not available as:\n\n" + "\n".join(missed)] if missed else [])])


def _compared(found: Mapping[str, float] | None) -> str:
    if found is None:
        return "not verified: the library was not installed where this was published"
    return ", ".join(f"{modality} {value:.1e}" for modality, value in sorted(found.items()))


def _training(facts: PublishFacts, contents: Contents) -> str:
    objectives = [(name, _kind(each), _weight(each)) for name, each in sorted(contents.objectives.items())]
    names = ("precision", "zero_stage", "global_batch_size", "micro_batch_size", "seed", "optimizer", "schedule")
    settings = [(name, _inline(facts.run_config[name])) for name in names if name in facts.run_config]
    settings += [("steps", f"{facts.steps:,}"), ("samples seen", f"{facts.samples_seen:,}")]
    optional = {"hardware": facts.hardware, "code": facts.commit, "curves": facts.run_url}
    settings += [(name, value) for name, value in optional.items() if value]
    return "\n\n".join(
        [
            _table(("objective", "kind", "weight"), objectives),
            _table(("setting", "value"), settings),
            "The whole run config is `training_config.yaml`.",
        ]
    )


def _data(facts: PublishFacts) -> str:
    if not facts.sources:
        return "The data sources were not recorded."
    rows = [
        (s.name, f"{s.num_shards:,}", f"{s.num_samples:,}", s.license or "not recorded", f"`{s.digest}`")
        for s in facts.sources
    ]
    return _table(("source", "shards", "samples", "license", "digest"), rows)


def _evaluation(facts: PublishFacts) -> str:
    if not facts.evaluations:
        return "The run recorded no evaluation."
    at = "" if facts.evaluated_at_step is None else f" at step {facts.evaluated_at_step:,}"
    rows = [(f"`{name}`", f"{value:.4f}") for name, value in sorted(facts.evaluations.items())]
    note = (
        f"Figures of the run's own evaluation{at}. Retrieval: a hit is any right answer among the first k, ties count "
        "against the model; `chance` is the figure of a random order. Tasks and shards are in `training_config.yaml`."
    )
    return f"{note}\n\n{_table(('metric', 'value'), rows)}"


def _limitations(facts: PublishFacts) -> str:
    seen = f"It saw {facts.samples_seen:,} samples of its data and knows little beyond what they show."
    general = (
        "Biases of the captions and pictures it was trained on are its own; none were measured or removed here. "
        "It was not evaluated for any use that affects people. Similarities are not probabilities."
    )
    return "\n\n".join([*([facts.limitations] if facts.limitations else []), seen, general])


def _table(head: tuple[str, ...], rows: Iterable[tuple[object, ...]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    lines += ["| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def _towers(contents: Contents) -> Mapping[str, object]:
    towers = contents.architecture["towers"]
    assert isinstance(towers, Mapping)
    return towers


def _weight(objective: object) -> object:
    weight = objective.get("weight", 1.0) if isinstance(objective, Mapping) else 1.0
    if not isinstance(weight, Sequence):
        return weight
    return ", ".join(f"{point['weight']} at step {point['from_step']}" for point in weight)


def _kind(config: object) -> str:
    return str(config.get("kind", "unknown")) if isinstance(config, Mapping) else "none"


def _inline(value: object) -> str:
    return (
        ", ".join(f"{key} {_inline(each)}" for key, each in value.items()) if isinstance(value, Mapping) else str(value)
    )
