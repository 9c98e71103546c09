"""The synthetic recordings: a tone of one of eight pitches in noise, and sentences about it.

Enter: a random generator and a pitch. Leave: a WAV of half a second, captions and what they tell. Phase, loudness,
overtone and the exact pitch vary, so that no two recordings of a pitch share their samples. Refused: nothing.
"""

import wave
from dataclasses import dataclass
from io import BytesIO

import numpy as np

PITCHES = (220, 300, 410, 560, 760, 1040, 1420, 1940)
"""In hertz, each higher by the same ratio; the lower half are low tones, the upper half high ones."""
TEMPLATES = (
    "a tone of {pitch} hertz",
    "a {height} tone of {pitch} hertz",
    "the sound of a tone of {pitch} hertz",
    "a tone sounds {height} at {pitch} hertz",
    "{pitch} hertz is the pitch of the tone",
)
PROMPTS = ("a tone of {}", "the sound of a tone of {}")
"""Templates for zero-shot classification; {} is a class name such as "220 hertz"."""
SAMPLE_RATE = 8000
SECONDS = 0.5
NOISE = (0.02, 0.08)
"""Standard deviation of the noise; the tone's amplitude is LOUDNESS."""
LOUDNESS = (0.15, 0.4)
DETUNING = 0.02
"""Largest share by which a tone lies beside its pitch."""

CLASSES = tuple(f"{pitch} hertz" for pitch in PITCHES)


@dataclass(frozen=True)
class Tone:
    """What a recording holds."""

    pitch: int

    @property
    def is_low(self) -> bool:
        return PITCHES.index(self.pitch) < len(PITCHES) // 2

    @property
    def label(self) -> str:
        return f"{self.pitch} hertz"

    def captions(self, draw: np.random.Generator, count: int) -> list[str]:
        """Sentences of different templates; each names the pitch."""
        height = "low" if self.is_low else "high"
        chosen = draw.choice(len(TEMPLATES), size=count, replace=False)
        return [TEMPLATES[number].format(pitch=self.pitch, height=height) for number in chosen]


def draw_tone(draw: np.random.Generator) -> Tone:
    return Tone(PITCHES[draw.integers(len(PITCHES))])


def record(tone: Tone, draw: np.random.Generator) -> bytes:
    """A WAV of 16 bits and one channel."""
    times = np.arange(round(SAMPLE_RATE * SECONDS)) / SAMPLE_RATE
    frequency = tone.pitch * (1 + draw.uniform(-DETUNING, DETUNING))
    phases, overtone = draw.uniform(0, 2 * np.pi, size=2), draw.uniform(0, 0.3)
    wave_form = np.sin(2 * np.pi * frequency * times + phases[0])
    wave_form += overtone * np.sin(4 * np.pi * frequency * times + phases[1])
    samples = draw.uniform(*LOUDNESS) * wave_form + draw.uniform(*NOISE) * draw.standard_normal(len(times))
    target = BytesIO()
    with wave.open(target, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(SAMPLE_RATE)
        file.writeframes((np.clip(samples, -1, 1) * 32767).astype("<i2").tobytes())
    return target.getvalue()
