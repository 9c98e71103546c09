"""The files of a checkpoint: its manifest, what damages it, and reading any range of any tensor from it.

Enter: a checkpoint folder. Leave: the manifest, whole tensors or ranges. Refuses files whose size or SHA-256 differ,
a manifest that differs from the SHA-256 it ends with, and one that names files elsewhere or pieces that do not make up
their tensors: a stranger may have written it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mmpretrain.core.errors import CheckpointError
from mmpretrain.core.folders import is_plain_name
from mmpretrain.core.json_text import parse_json
from mmpretrain.core.run_files import MANIFEST, fits, record_of
from mmpretrain.training.loss_scale import LossScale

FORMAT = 2
_UNSEALED = 1
"""The format before, which is still read: its manifest holds no SHA-256 of its own, and none of config.yaml."""


@dataclass(frozen=True)
class PassedOver:
    """One return to a checkpoint: after step `to_step` the data of step `from_step` + 1 follows."""

    to_step: int
    """Steps done by the checkpoint from which the run went on."""
    from_step: int
    """Step after which it went back."""
    score: float

    @property
    def gap(self) -> tuple[int, int]:
        """As the loader counts: the step before which data is left out, and of how many steps."""
        return (self.to_step, self.from_step - self.to_step)


@dataclass(frozen=True)
class Position:
    """Where a run stands: all that is not a tensor and must survive."""

    step: int
    samples: int
    data_hash: str
    """Hash of what fixes the order of samples; a resume under another one is refused."""
    wandb_id: str | None = None
    passed_over: tuple[PassedOver, ...] = ()
    """Data that the run left out when it went back to checkpoints, in order."""
    loss_scale: LossScale | None = None
    """Of the next step, in fp16."""

    @classmethod
    def read(cls, raw: dict[str, Any]) -> Position:
        """From the JSON of a manifest; ValueError where it tells no place of a run."""
        plain = {name: value for name, value in raw.items() if name not in ("passed_over", "loss_scale")}
        passed_over = tuple(record_of(PassedOver, one) for one in raw.get("passed_over", ()))
        scale = raw.get("loss_scale")
        loss_scale = None if scale is None else record_of(LossScale, scale)
        return replace(record_of(cls, plain), passed_over=passed_over, loss_scale=loss_scale)


@dataclass(frozen=True)
class Piece:
    """Elements [offset, offset + length) of one tensor, and the file that holds them."""

    offset: int
    length: int
    file: str


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint holds; written last."""

    position: Position
    zero_stage: int
    world_size: int
    optimizer_step: int
    shapes: Mapping[str, list[int]]
    pieces: Mapping[str, Mapping[str, list[Piece]]]
    """Tensor name -> kind ("master", "exp_avg", "exp_avg_sq", "average", "replica") -> pieces by rising offset."""
    files: Mapping[str, tuple[int, str]]
    """File name -> (size in bytes, SHA-256) of all other files of the checkpoint."""
    format: int = FORMAT

    @property
    def has_average(self) -> bool:
        """Whether a moving average of the weights is among them."""
        return any("average" in kinds for kinds in self.pieces.values())


def read_manifest(path: Path) -> Manifest:
    """Read and check a manifest's form; CheckpointError names what is wrong."""
    try:
        text = (path / MANIFEST).read_text()
        raw = parse_json(text)
        if raw["format"] not in (_UNSEALED, FORMAT):
            raise CheckpointError(f"{path / MANIFEST}: format {raw['format']}, this version reads format {FORMAT}")
        if raw["format"] == FORMAT and text != _sealed(text[: -len(_sealed(""))] + "}"):
            raise CheckpointError(f"{path / MANIFEST} does not match its own SHA-256")
        manifest = Manifest(
            position=Position.read(raw["position"]),
            zero_stage=raw["zero_stage"],
            world_size=raw["world_size"],
            optimizer_step=raw["optimizer_step"],
            shapes=raw["shapes"],
            pieces={
                name: {key: [Piece(*piece) for piece in pieces] for key, pieces in kinds.items()}
                for name, kinds in raw["pieces"].items()
            },
            files={name: (int(size), str(digest)) for name, (size, digest) in raw["files"].items()},
        )
        _refuse_lies(manifest)
        return manifest
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as fault:
        raise CheckpointError(f"{path}: no readable {MANIFEST} ({fault})") from fault


def _refuse_lies(manifest: Manifest) -> None:
    """ValueError names what no save would have written."""
    for name in manifest.files:
        if not is_plain_name(name):
            raise ValueError(f"it names a file {name!r}, which is none of its folder")
    if not all(fits(n, int) for n in (manifest.zero_stage, manifest.world_size, manifest.optimizer_step)):
        raise ValueError("stage, ranks or optimizer step are no numbers")
    if not manifest.pieces.keys() <= manifest.shapes.keys():
        raise ValueError("it has pieces of a tensor without a shape")
    for name, kinds in manifest.pieces.items():
        shape = manifest.shapes[name]
        if not isinstance(shape, list) or not all(fits(size, int) and size >= 0 for size in shape):
            raise ValueError(f"the shape of {name} is {shape}")
        for key, pieces in kinds.items():
            if not _make_up(pieces, math.prod(shape), manifest.files):
                raise ValueError(f"the pieces of {key!r} of {name} do not make up its {math.prod(shape)} elements")


def _make_up(pieces: Sequence[Piece], total: int, files: Mapping[str, object]) -> bool:
    """Whether they follow each other from the first element to the last, in files of the checkpoint."""
    end = 0
    for piece in pieces:
        if not fits(piece.length, int) or piece.length < 0 or piece.offset != end or piece.file not in files:
            return False
        end += piece.length
    return end == total


def read_weights(path: Path, averaged: bool = False) -> dict[str, Tensor]:
    """All parameters (fp32 masters, or their moving average) and buffers of a checkpoint, whole and on the CPU."""
    manifest = read_manifest(path)
    if averaged and not manifest.has_average:
        raise CheckpointError(
            f"{path} holds no moving average of the weights; leave --ema out, or train with ema: {{decay: 0.9999}}"
        )
    fault = damage(path, manifest, sorted(manifest.files))
    if fault:
        raise CheckpointError(f"{path}: {fault}")
    weights: dict[str, Tensor] = {}
    wanted = ("average", "master", "replica") if averaged else ("master", "replica")
    try:
        with Reader(path) as reader:
            for name, kinds in manifest.pieces.items():
                key = next((one for one in wanted if one in kinds), None)
                if key is None:
                    raise CheckpointError(f"{path}: {name} has none of {', '.join(wanted)}")
                shape = manifest.shapes[name]
                weights[name] = reader.read(name, key, kinds[key], 0, math.prod(shape)).view(shape)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: its weights cannot be read ({error})") from error
    return weights


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Write `manifest.json` into the folder; its last entry is the SHA-256 of all that stands before it."""
    content = vars(manifest) | {"position": asdict(manifest.position)}
    content["pieces"] = {
        name: {key: [(p.offset, p.length, p.file) for p in parts] for key, parts in kinds.items()}
        for name, kinds in manifest.pieces.items()
    }
    (path / MANIFEST).write_text(_sealed(json.dumps(content)))


def _sealed(text: str) -> str:
    """A JSON object with one more entry: the SHA-256 of its text."""
    return f'{text[:-1]}, "sha256": "{hashlib.sha256(text.encode()).hexdigest()}"}}'


def damage(path: Path, manifest: Manifest, names: Iterable[str]) -> str | None:
    """What is wrong with these files of a checkpoint; None when nothing is."""
    for name in names:
        size, digest = manifest.files[name]
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes, {size} were written"
        if sha256(file) != digest:
            return f"{name} does not match its SHA-256"
    return None


def address(name: str, key: str, offset: int) -> str:
    """Name of a fragment inside its safetensors file."""
    return f"{key}/{name}/{offset}"


class Reader:
    """Reads ranges of named flat tensors from the files of one checkpoint, each file opened once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.open_files: dict[str, safe_open] = {}

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *exc: object) -> None:
        self.open_files.clear()

    def _file(self, name: str) -> safe_open:
        if name not in self.open_files:
            self.open_files[name] = safe_open(self.path / name, framework="pt")
        return self.open_files[name]

    def read(self, name: str, key: str, pieces: Sequence[Piece], offset: int, length: int) -> Tensor:
        """Elements [offset, offset + length) of the flattened tensor."""
        parts: list[Tensor] = []
        position, end = offset, offset + length
        for piece in pieces:
            start, stop = max(position, piece.offset), min(end, piece.offset + piece.length)
            if start == position < stop:
                stored = self._file(piece.file).get_slice(address(name, key, piece.offset))
                if stored.get_shape() != [piece.length]:
                    raise CheckpointError(
                        f"{piece.file} holds {key!r} of {name} in another shape than the manifest says"
                    )
                parts.append(stored[start - piece.offset : stop - piece.offset])
                position = stop
        if position != end:
            raise CheckpointError(f"{name}: elements {position} to {end} of {key!r} are in no file")
        return torch.cat(parts) if parts else torch.empty(0)

    def tensors(self, file: str, prefix: str) -> dict[str, Tensor]:
        """All tensors of one file whose address begins with `prefix`, under the rest of their address."""
        opened = self._file(file)
        names = [name for name in opened.keys() if name.startswith(prefix)]  # noqa: SIM118 - not a mapping
        return {name.removeprefix(prefix): opened.get_tensor(name) for name in names}


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
