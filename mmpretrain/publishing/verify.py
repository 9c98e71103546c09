"""Hold a folder's layouts against its probe, in a process that knows nothing of training.

Enter: `python -m mmpretrain.publishing.verify DIR ...`. Leave: one JSON line a folder, {layout: {"image": largest
difference, ...}}, with null for a layout whose library is not installed; a message and exit code 1 past 1e-5.
The folder's own usage examples are run as well. Nothing is fetched from a network.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoTokenizer, CLIPModel, SiglipModel

from mmpretrain.core.types import TensorDict
from mmpretrain.modalities.text import TextCodecConfig
from mmpretrain.models.multimodal import MultimodalTransformer
from mmpretrain.publishing.facts import PublishError
from mmpretrain.publishing.probe import embed, read_probe

TOLERANCE = 1e-5
TEXTS = ("a red square", "one of more words than fit " * 99)
Differences = dict[str, float]
Results = dict[str, Differences | None]


def verify_in_fresh_process(folder: Path) -> Results:
    """Verify by a new interpreter without network; raises PublishError with what it said when anything differs."""
    command = [sys.executable, "-m", "mmpretrain.publishing.verify", str(folder)]
    offline = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    outcome = subprocess.run(command, env=offline, capture_output=True, text=True, check=False)
    if outcome.returncode:
        tail = "\n".join(outcome.stderr.strip().splitlines()[-12:])
        raise PublishError(
            f"the published copy does not answer as the trained model does; nothing was published:\n{tail}"
        )
    results: Results = json.loads(outcome.stdout.strip().splitlines()[-1])
    return results


def verify(folder: Path) -> Results:
    """Load each layout of the folder and compare its embeddings of the probe."""
    probe = read_probe(folder)
    results: Results = {"mmpretrain": _compare("mmpretrain", _own(folder, probe), probe)}
    for name, answer in LAYOUTS.items():
        if (folder / name).is_dir():
            results[name] = _compare(name, answer(folder / name, probe), probe) if _installed(name) else None
            if (folder / name / "tokenizer.json").exists():
                _compare_words(name, folder)
    for example in sorted(folder.glob("usage*.py")):
        if not _installed(example.stem.removeprefix("usage_")):
            continue
        with contextlib.redirect_stdout(sys.stderr):
            runpy.run_path(str(example))
    return results


def _installed(layout: str) -> bool:
    return layout != "open_clip" or importlib.util.find_spec("open_clip") is not None


def _compare(layout: str, answers: TensorDict, probe: TensorDict) -> Differences:
    found = {m: float((vectors - probe[f"embedding.{m}"]).abs().max()) for m, vectors in answers.items()}
    wrong = {modality: value for modality, value in found.items() if not value <= TOLERANCE}
    if wrong:
        raise PublishError(f"{layout}: embeddings differ from the trained model's by {wrong}, more than {TOLERANCE}")
    return found


def _compare_words(layout: str, folder: Path) -> None:
    """Ids that a layout's tokenizer gives, beside those that training gave."""
    inputs = AutoConfig.from_pretrained(folder).parsed_model().inputs
    expected = TextCodecConfig().build(inputs, str(folder)).encode(TEXTS)["text"].tolist()
    words = AutoTokenizer.from_pretrained(folder / layout)
    if words(list(TEXTS), padding="max_length", truncation=True)["input_ids"] != expected:
        raise PublishError(f"{layout}: its tokenizer gives other ids than the trained model's")


def _own(folder: Path, probe: TensorDict) -> TensorDict:
    model = AutoModel.from_pretrained(folder)
    assert isinstance(model, MultimodalTransformer)
    return {modality: embed(model, modality, probe) for modality in model.facts.towers}


def _clip(folder: Path, probe: TensorDict) -> TensorDict:
    return _transformers_pair(CLIPModel.from_pretrained(folder), folder, probe)


def _siglip(folder: Path, probe: TensorDict) -> TensorDict:
    return _transformers_pair(SiglipModel.from_pretrained(folder), folder, probe)


def _transformers_pair(model: CLIPModel | SiglipModel, folder: Path, probe: TensorDict) -> TensorDict:
    with torch.no_grad():
        images = model.get_image_features(pixel_values=_normalised(folder, probe["image"])).pooler_output
        texts = model.get_text_features(input_ids=probe["text"]).pooler_output
    return _unit({"image": images, "text": texts})


def _open_clip(folder: Path, probe: TensorDict) -> TensorDict:
    import open_clip

    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    normalise = preprocess.transforms[-1]
    with torch.no_grad():
        images = model.eval().encode_image(normalise(probe["image"] / 255.0))
        return _unit({"image": images, "text": model.encode_text(probe["text"])})


def _normalised(folder: Path, images: Tensor) -> Tensor:
    """The folder's own image processor on pixels that already have the right size."""
    processor = AutoImageProcessor.from_pretrained(folder)  # type: ignore[no-untyped-call]
    pixels: Tensor = processor(list(images), return_tensors="pt")["pixel_values"]
    return pixels


def _unit(vectors: TensorDict) -> TensorDict:
    return {name: rows / rows.norm(dim=1, keepdim=True) for name, rows in vectors.items()}


LAYOUTS: dict[str, Callable[[Path, TensorDict], TensorDict]] = {
    "clip": _clip,
    "siglip": _siglip,
    "open_clip": _open_clip,
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare the layouts of published folders with their probes.")
    parser.add_argument("folders", type=Path, nargs="+")
    for folder in parser.parse_args().folders:
        with contextlib.redirect_stdout(sys.stderr):
            try:
                results = verify(folder)
            except PublishError as error:
                sys.exit(f"error: {folder}: {error}")
        sys.stdout.write(json.dumps(results) + "\n")


if __name__ == "__main__":
    main()
