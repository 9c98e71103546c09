"""Short programs that use a published model; they stand in the folder and in the card, and are run before publishing.

Enter: which layouts were written. Leave: file name -> source text.
"""

OWN = '''"""Compare an image with texts, by mmpretrain's own model."""

from pathlib import Path

import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

import mmpretrain.models.multimodal  # makes the architecture known to AutoModel

folder = Path(__file__).parent
model = AutoModel.from_pretrained(folder).eval()
image = Image.new("RGB", (320, 240), "red")  # your photo
texts = ["a red square", "a blue circle"]

pixels = AutoImageProcessor.from_pretrained(folder)(image, return_tensors="pt")["pixel_values"]
tokens = AutoTokenizer.from_pretrained(folder)(texts, padding="max_length", truncation=True, return_tensors="pt")
with torch.no_grad():
    image_vector = model.embed("image", pixels)
    text_vectors = model.embed("text", tokens["input_ids"], tokens["attention_mask"].bool())
print(image_vector @ text_vectors.T)  # cosines
'''

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
tokens = open_clip.get_tokenizer(name)(["a red square", "a blue circle"])
image = Image.new("RGB", (320, 240), "red")  # your photo

with torch.no_grad():
    image_vector = model.eval().encode_image(preprocess(image)[None], normalize=True)
    print(image_vector @ model.encode_text(tokens, normalize=True).T)  # cosines
'''


def usage_examples(layouts: list[str], has_tokenizer: bool, towers: set[str]) -> dict[str, str]:
    """The examples that fit the folder."""
    if not (has_tokenizer and {"image", "text"} <= towers):
        return {"usage.py": LOAD_ONLY}
    sources = {"clip": TRANSFORMERS, "siglip": TRANSFORMERS, "open_clip": OPEN_CLIP}
    others = {f"usage_{layout}.py": sources[layout].replace("{layout}", layout) for layout in layouts}
    return {"usage.py": OWN, **others}
