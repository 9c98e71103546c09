"""A published folder, whole or not at all.

Enter: a loaded model on the CPU in fp32, facts, a tokenizer folder. Leave: a folder with our own model, every layout
that fits, processor, tokenizer, card, provenance, checksums. It is written beside the target, verified in a fresh
process, and only then renamed into place. Refused: a target that exists, missing facts, a copy that answers
differently, pickles.
"""

import hashlib
import json
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

import yaml

from mmpretrain.core.folders import made_beside
from mmpretrain.modalities.base import CodecConfig
from mmpretrain.models.multimodal import MultimodalTransformer
from mmpretrain.models.quiet import no_progress_bar
from mmpretrain.publishing.card import Contents, render_card
from mmpretrain.publishing.exports import image_processor, sized_tokenizer, write_exports
from mmpretrain.publishing.facts import PublishError, PublishFacts, check_facts
from mmpretrain.publishing.probe import write_probe
from mmpretrain.publishing.processor import write_codecs
from mmpretrain.publishing.usage import usage_examples
from mmpretrain.publishing.verify import Results, verify_in_fresh_process

SUMS = "SHA256SUMS"
PACKAGES = ("mmpretrain", "torch", "transformers", "deepspeed", "safetensors", "tokenizers", "open_clip_torch")
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")


@dataclass(frozen=True)
class Published:
    """A folder in place and what was found out about it."""

    folder: Path
    results: Results
    """Layout -> largest difference by modality; None where its library was not installed."""
    obstacles: Mapping[str, list[str]]
    """Layout -> why it was not written; no reasons: it was."""


def publish_model(
    model: MultimodalTransformer,
    out: Path,
    facts: PublishFacts,
    tokenizer: Path | None = None,
    codecs: Mapping[str, CodecConfig] | None = None,
) -> Published:
    """Write, verify and put in place; `codecs`: what made the inputs in training, by the batch field each makes."""
    check_facts(facts)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise PublishError(f"{out} already holds something; publish to a new folder, or remove it first")
    with made_beside(out) as folder:
        with no_progress_bar():
            obstacles = write_layouts(model, folder, tokenizer)
        layouts = [name for name, reasons in obstacles.items() if not reasons]
        if codecs is not None:
            write_codecs(codecs, folder)
        inputs = model.config.parsed_model().inputs
        usage = usage_examples(layouts, inputs, tokenizer is not None, codecs is not None)
        for name, source in usage.items():
            (folder / name).write_text(source, encoding="utf-8")
        results = verify_in_fresh_process(folder)
        _warn_unverified(results)
        _write_record(model, folder, facts, obstacles, results, usage)
        _refuse_pickles(folder)
        write_sums(folder)
        if out.exists():
            out.rmdir()
        folder.replace(out)
    return Published(out, results, obstacles)


def write_layouts(model: MultimodalTransformer, folder: Path, tokenizer: Path | None) -> dict[str, list[str]]:
    """Our own model with processor, tokenizer and probe, and the layouts that fit; returns each layout's obstacles."""
    model.save_pretrained(folder, state_dict=model.published_state())
    inputs = model.config.parsed_model().inputs
    image, text = inputs.get("image"), inputs.get("text")
    if image is not None:
        image_processor(image.shape[-1], None).save_pretrained(folder)
    if tokenizer is not None and text is not None:
        sized_tokenizer(tokenizer, text.shape[0]).save_pretrained(folder)
    write_probe(model, folder)
    return write_exports(model, folder, tokenizer)


def _write_record(
    model: MultimodalTransformer,
    folder: Path,
    facts: PublishFacts,
    obstacles: Mapping[str, list[str]],
    results: Results,
    usage: Mapping[str, str],
) -> None:
    versions = {name: version for name in PACKAGES if (version := _version(name)) is not None}
    contents = Contents(
        architecture=model.config.model,
        objectives=model.config.objectives,
        num_parameters=sum(p.numel() for name, p in model.named_parameters() if name in model.published_state()),
        obstacles=obstacles,
        results=results,
        usage=usage,
        versions=versions,
    )
    (folder / "README.md").write_text(render_card(facts, contents), encoding="utf-8")
    config = yaml.safe_dump(dict(facts.run_config), sort_keys=False, allow_unicode=True)
    (folder / "training_config.yaml").write_text(config, encoding="utf-8")
    record = {**asdict(facts), "versions": versions, "verification": results, "obstacles": dict(obstacles)}
    (folder / "provenance.json").write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def write_sums(folder: Path) -> None:
    """`SHA256SUMS` over every file, in the format of sha256sum."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != SUMS)
    lines = [f"{_digest(path)}  {path.relative_to(folder).as_posix()}\n" for path in files]
    (folder / SUMS).write_text("".join(lines), encoding="utf-8")


def check_sums(folder: Path) -> None:
    """Raise PublishError naming the files that differ from `SHA256SUMS`, are missing or were added."""
    lines = (folder / SUMS).read_text(encoding="utf-8", errors="replace").splitlines()
    listed = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    present = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()} - {SUMS}
    wrong = {name for name in present & set(listed) if _digest(folder / name) != listed[name]}
    wrong |= present ^ set(listed)
    if wrong:
        raise PublishError(f"{folder} is not as published: {sorted(wrong)} differ from {SUMS}; publish it again")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _refuse_pickles(folder: Path) -> None:
    found = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.suffix in PICKLES]
    if found:
        raise PublishError(
            f"the folder would hold pickles ({found}), which run code when loaded; nothing was published"
        )


def _warn_unverified(results: Results) -> None:
    for layout, found in results.items():
        if found is None:
            warnings.warn(
                f"the {layout} layout was written but not verified: {layout} is not installed here; "
                "install open_clip_torch and publish again to have it checked",
                stacklevel=3,
            )


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
