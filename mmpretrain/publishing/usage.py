"""Short programs that use a published model; they stand in the folder and in the card, and are run before publishing.

Enter: which layouts were written, what the towers read. Leave: file name -> source text.
"""

from collections.abc import Mapping

from mmpretrain.core.types import FieldSpec

LOAD_ONLY = '''"""Load mmpretrain's own model."""

from pathlib import Path

from transformers import AutoModel

import mmpretrain.models.multimodal  # makes the architecture known to AutoModel

model = AutoModel.from_pretrained(Path(__file__).parent).eval()
print(sorted(model.facts.towers))
'''

TRANSFORMERS = '''"""Compare an image with texts, by transformers alone."""

from pathlib import Path

import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor

folder = Path(__file__).parent / "{layout}"
model = AutoModel.from_pretrained(folder).eval()
processor = AutoProcessor.from_pretrained(folder)
image = Image.new("RGB", (320, 240), "red")  # your photo
texts = ["a red square", "a blue circle"]

inputs = processor(text=texts, images=image, padding="max_length", truncation=True, return_tensors="pt")
with torch.no_grad():
    print(model(input_ids=inputs["input_ids"], pixel_values=inputs["pixel_values"]).logits_per_image)
'''

OPEN_CLIP = '''"""Compare an image with texts, by open_clip alone."""

from pathlib import Path

import open_clip
import torch
from PIL import Image

name = f"local-dir:{Path(__file__).parent / 'open_clip'}"
model, _, preprocess = open_clip.create_model_and_transforms(name)
words = open_clip.get_tokenizer(name).tokenizer  # which itself leaves texts as training saw them
texts = ["a red square", "a blue circle"]
tokens = words(texts, padding="max_length", truncation=True, return_tensors="pt")["input_ids"]
image = Image.new("RGB", (320, 240), "red")  # your photo

with torch.no_grad():
    image_vector = model.eval().encode_image(preprocess(image)[None], normalize=True)
    print(image_vector @ model.encode_text(tokens, normalize=True).T)  # cosines
'''


OWN = '''"""Embed and compare, by mmpretrain's own model and processor."""

from pathlib import Path

{imports}from mmpretrain.inference import load

model = load(Path(__file__).parent)
vectors = model.embed(
{inputs})
print(model.similarity({shown}))  # cosines
'''

TEXTS = '["a red square", "a blue circle"],'
PICTURE = 'Image.new("RGB", (320, 240), "red"),  # or paths, bytes, pixels'
SOUND = "(np.zeros({rate}, np.int16), {rate}),  # or paths, bytes"
CLIP = "(np.zeros((16, 64, 64, 3), np.uint8), 8),  # frames and their rate; or paths, bytes"


def usage_examples(
    layouts: list[str], inputs: Mapping[str, FieldSpec], has_tokenizer: bool, has_codecs: bool
) -> dict[str, str]:
    """The examples that fit the folder; `inputs`: what each tower reads."""
    if not has_tokenizer and any(spec.dtype == "int64" for spec in inputs.values()):
        return {"usage.py": LOAD_ONLY}
    sources = {"clip": TRANSFORMERS, "siglip": TRANSFORMERS, "open_clip": OPEN_CLIP}
    others = {f"usage_{layout}.py": sources[layout].replace("{layout}", layout) for layout in layouts}
    return {"usage.py": _own(inputs) if has_codecs else LOAD_ONLY, **others}


def _own(inputs: Mapping[str, FieldSpec]) -> str:
    given = [f"    {modality}={_stand_in(spec)}\n" for modality, spec in inputs.items()]
    libraries = {"np.": "import numpy as np", "Image.": "from PIL import Image"}
    needed = [line for use, line in libraries.items() if use in "".join(given)]
    first, second = (*inputs, *inputs)[:2]
    return (
        OWN.replace("{imports}", "".join(f"{line}\n" for line in needed) + ("\n" if needed else ""))
        .replace("{inputs}", "".join(given))
        .replace("{shown}", f'vectors["{first}"], vectors["{second}"]')
    )


def _stand_in(spec: FieldSpec) -> str:
    """An input that can be written in a line, for what a tower reads."""
    if spec.rate is not None:
        return SOUND.replace("{rate}", str(spec.rate))
    if spec.dtype == "int64":
        return TEXTS
    return CLIP if len(spec.shape) == 4 else PICTURE
