"""The synthetic pictures: one coloured shape on a noisy ground, and sentences about it.

Enter: a random generator and a pair (colour, shape). Leave: a JPEG, captions and what they tell; and the strokes that
moving pictures are painted with as well. Pairs whose numbers add up to a multiple of six are held out of training: to
know them, a model must combine colours and shapes. Refused: nothing.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

COLOURS = {
    "red": (215, 40, 40),
    "green": (40, 165, 60),
    "blue": (45, 75, 225),
    "yellow": (235, 210, 45),
    "purple": (150, 45, 175),
    "cyan": (50, 205, 215),
}
SHAPES = ("circle", "ring", "triangle", "cross", "bar", "pillar")
SIZES = {"small": (0.20, 0.23), "large": (0.31, 0.34)}
"""Radius as a fraction of the side of the picture."""
PLACES = {"centre": (0.5, 0.5), "left": (0.37, 0.5), "right": (0.63, 0.5), "top": (0.5, 0.37), "bottom": (0.5, 0.63)}
"""Middle of the shape as fractions of the side, from the top left."""
TEMPLATES = (
    "a {colour} {shape}",
    "a picture of a {colour} {shape}",
    "a {size} {colour} {shape}",
    "a {colour} {shape} at the {place}",
    "there is a {size} {colour} {shape} at the {place} of the picture",
    "the {shape} at the {place} is {colour}",
    "the {size} {shape} is {colour}",
)
PROMPTS = ("a {}", "a picture of a {}")
"""Templates for zero-shot classification; {} is a class name such as "red circle"."""
OVERSAMPLING = 4
NOISE = 8.0
"""Standard deviation of the pixel noise, of 255."""

PAIRS = tuple((colour, shape) for colour in COLOURS for shape in SHAPES)
HELD_OUT = tuple(
    (colour, shape) for c, colour in enumerate(COLOURS) for s, shape in enumerate(SHAPES) if (c + s) % len(SHAPES) == 0
)
SEEN = tuple(pair for pair in PAIRS if pair not in HELD_OUT)


@dataclass(frozen=True)
class Scene:
    """What a picture shows."""

    colour: str
    shape: str
    size: str
    place: str

    @property
    def label(self) -> str:
        return f"{self.colour} {self.shape}"

    def captions(self, draw: np.random.Generator, count: int) -> list[str]:
        """Sentences of different templates; each names colour and shape."""
        chosen = draw.choice(len(TEMPLATES), size=count, replace=False)
        return [
            TEMPLATES[number].format(colour=self.colour, shape=self.shape, size=self.size, place=self.place)
            for number in chosen
        ]


def draw_scene(pair: tuple[str, str], draw: np.random.Generator) -> Scene:
    sizes, places = tuple(SIZES), tuple(PLACES)
    return Scene(*pair, sizes[draw.integers(len(sizes))], places[draw.integers(len(places))])


def render(scene: Scene, side: int, draw: np.random.Generator) -> bytes:
    """A JPEG of `side` pixels; exact place, radius, angle, shade, ground and noise vary."""
    look = draw_look(scene.colour, SIZES[scene.size], draw)
    x, y = PLACES[scene.place]
    middle = (x + draw.uniform(-0.02, 0.02), y + draw.uniform(-0.02, 0.02))
    pixels = add_noise(paint(scene.shape, look, middle, side), draw)
    target = BytesIO()
    Image.fromarray(pixels).save(target, "JPEG", quality=92)
    return target.getvalue()


@dataclass(frozen=True)
class Look:
    """How a shape is painted, wherever it stands."""

    fill: tuple[int, int, int]
    ground: int
    """Grey level around it."""
    radius: float
    """As a fraction of the side of the picture."""
    angle: float
    """In radians."""


def draw_look(colour: str, radii: tuple[float, float], draw: np.random.Generator) -> Look:
    """A shade of the colour on a grey ground; the radius lies between the two of `radii`."""
    ground = int(draw.integers(60, 200))
    shade = np.clip(np.array(COLOURS[colour]) + draw.integers(-18, 19, size=3), 0, 255)
    fill = (int(shade[0]), int(shade[1]), int(shade[2]))
    return Look(fill, ground, draw.uniform(*radii), draw.uniform(-0.12, 0.12))


def paint(shape: str, look: Look, middle: tuple[float, float], side: int) -> NDArray[np.uint8]:
    """RGB [side, side, 3] with smooth edges and no noise; `middle` in fractions of the side from the top left."""
    large = side * OVERSAMPLING
    canvas = Image.new("RGB", (large, large), (look.ground,) * 3)
    stamp = _Stamp(large * middle[0], large * middle[1], large * look.radius, look.angle)
    _PAINTERS[shape](ImageDraw.Draw(canvas), stamp, look.fill)
    return np.asarray(canvas.resize((side, side), Image.Resampling.BOX))


def add_noise(pixels: NDArray[np.uint8], draw: np.random.Generator) -> NDArray[np.uint8]:
    """Pixels with grain of NOISE levels."""
    grain = draw.standard_normal(pixels.shape, np.float32) * np.float32(NOISE)
    noisy: NDArray[np.uint8] = np.clip(pixels + grain, 0, 255).astype(np.uint8)
    return noisy


@dataclass(frozen=True)
class _Stamp:
    """Where a shape stands on the canvas, in pixels and radians."""

    x: float
    y: float
    radius: float
    angle: float

    @property
    def box(self) -> tuple[float, float, float, float]:
        return (self.x - self.radius, self.y - self.radius, self.x + self.radius, self.y + self.radius)

    def outline(self, corners: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
        """Corners in units of the radius, turned and moved onto the canvas."""
        cos, sin = math.cos(self.angle), math.sin(self.angle)
        return [
            (self.x + self.radius * (u * cos - v * sin), self.y + self.radius * (u * sin + v * cos)) for u, v in corners
        ]


_Colour = tuple[int, int, int]
_Painter = Callable[[ImageDraw.ImageDraw, _Stamp, _Colour], None]


def _circle(canvas: ImageDraw.ImageDraw, stamp: _Stamp, fill: _Colour) -> None:
    canvas.ellipse(stamp.box, fill=fill)


def _ring(canvas: ImageDraw.ImageDraw, stamp: _Stamp, fill: _Colour) -> None:
    canvas.ellipse(stamp.box, outline=fill, width=int(stamp.radius * 0.42))


def _triangle(canvas: ImageDraw.ImageDraw, stamp: _Stamp, fill: _Colour) -> None:
    canvas.polygon(stamp.outline([(0.0, -1.15), (1.1, 0.7), (-1.1, 0.7)]), fill=fill)


def _bar(canvas: ImageDraw.ImageDraw, stamp: _Stamp, fill: _Colour) -> None:
    canvas.polygon(stamp.outline(_rectangle(1.1, 0.35)), fill=fill)


def _pillar(canvas: ImageDraw.ImageDraw, stamp: _Stamp, fill: _Colour) -> None:
    canvas.polygon(stamp.outline(_rectangle(0.35, 1.1)), fill=fill)


def _cross(canvas: ImageDraw.ImageDraw, stamp: _Stamp, fill: _Colour) -> None:
    _bar(canvas, stamp, fill)
    _pillar(canvas, stamp, fill)


def _rectangle(right: float, down: float) -> list[tuple[float, float]]:
    return [(right, down), (-right, down), (-right, -down), (right, -down)]


_PAINTERS: dict[str, _Painter] = {
    "circle": _circle,
    "ring": _ring,
    "triangle": _triangle,
    "cross": _cross,
    "bar": _bar,
    "pillar": _pillar,
}
