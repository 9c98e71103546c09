"""One synthetic sample of four modalities: a picture, a video, a recording, sentences about each, and a question.

Enter: the pairs (colour, shape) of a split and a random generator. Leave: members of a sample. What the video shows
differs from what the picture shows in colour and in shape. The question asks for colour or shape; a low tone tells that
the picture is meant, a high one the video. So the answer, one of twelve words, needs all four: without the tone or the
question one of two words remains, and without the picture (or the video) half of the answers can but be guessed.
Refused: nothing.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from data_pipeline.clips import Clip, draw_clip, film
from data_pipeline.shapes import COLOURS, SHAPES, Scene, draw_scene, render
from data_pipeline.tones import Tone, draw_tone, record
from mmpretrain.core.captions import METADATA_EXTENSION, TEXT_EXTENSION

CAPTIONS_PER_MEDIUM = 3
QUESTIONS = {
    "colour": ("which colour", "what colour is it", "name the colour"),
    "shape": ("which shape", "what shape is it", "name the shape"),
}
ANSWERS = (*COLOURS, *SHAPES)

Pair = tuple[str, str]


@dataclass(frozen=True)
class Question:
    """What is asked, and what a sample answers."""

    asks: str
    """"colour" or "shape"."""
    wording: str

    def answer(self, scene: Scene, clip: Clip, tone: Tone) -> str:
        meant = scene if tone.is_low else clip
        return meant.colour if self.asks == "colour" else meant.shape


def draw_question(draw: np.random.Generator) -> Question:
    asks = tuple(QUESTIONS)[draw.integers(len(QUESTIONS))]
    wordings = QUESTIONS[asks]
    return Question(asks, wordings[draw.integers(len(wordings))])


def draw_sample(pairs: Sequence[Pair], number: int, image_size: int, draw: np.random.Generator) -> dict[str, bytes]:
    """The members of sample `number`; pictures take the pairs in turn, so that each is as frequent as any other.

    Videos have half the height and width of the pictures.
    """
    scene = draw_scene(pairs[number % len(pairs)], draw)
    others = [pair for pair in pairs if pair[0] != scene.colour and pair[1] != scene.shape]
    clip = draw_clip(others[draw.integers(len(others))], draw)
    tone, question = draw_tone(draw), draw_question(draw)
    captions = scene.captions(draw, CAPTIONS_PER_MEDIUM)
    described = {
        "captions": captions,
        "video_captions": clip.captions(draw, CAPTIONS_PER_MEDIUM),
        "audio_captions": tone.captions(draw, CAPTIONS_PER_MEDIUM),
        "question": question.wording,
        "answer": question.answer(scene, clip, tone),
        "label": scene.label,
        "video_label": clip.label,
        "audio_label": tone.label,
        "asks": question.asks,
        **asdict(scene),
        "video": asdict(clip),
        "audio": asdict(tone),
    }
    return {
        "jpg": render(scene, image_size, draw),
        "mp4": film(clip, image_size // 2, draw),
        "wav": record(tone, draw),
        METADATA_EXTENSION: json.dumps(described).encode(),
        TEXT_EXTENSION: captions[0].encode(),
    }
