"""Where, in a parent, the values of each weight of a new model stand, and how they are made to fit.

Enter: a model, its `Parent`, the name of a weight. Leave: `Fit`: the values, or none with the reason. Towers fit when
they are of one kind and width with as many heads; other settings that differ are remarked upon, since shapes do not
show them. Refused: nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mmpretrain.core.registry import kind_of
from mmpretrain.layers.parameters import LearnedPositions, SpaceTimePositions
from mmpretrain.layers.resampling import Grid, inflate_kernel, resample_positions
from mmpretrain.modalities.base import PatchStem
from mmpretrain.models.multimodal import MultimodalTransformer
from mmpretrain.models.parent import Parent
from mmpretrain.models.towers.base import TowerConfig
from mmpretrain.models.towers.frames import FramesTower, FramesTowerConfig
from mmpretrain.models.towers.hf_auto import HFAutoTowerConfig
from mmpretrain.models.towers.native import NativeTowerConfig
from mmpretrain.objectives.infonce import InfoNCE
from mmpretrain.objectives.siglip import SigLIP

_COMPARED = ("pooling", "causal", "attend_padding", "pre_norm", "activation", "norm_eps")
_COMPARED_OF_STEMS = ("positions", "mean", "std")
_LOGITS = {"logit_scale.log": "logit_scale", "logit_bias.value": "logit_bias"}


@dataclass(frozen=True)
class Fit:
    """What was found for one weight."""

    values: Tensor | None
    """None: it stays fresh."""
    source: str = ""
    """Name in the parent."""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Route:
    """All weights whose name begins with `prefix` come from those that begin with `source`."""

    prefix: str
    source: str
    obstacle: str | None = None
    notes: tuple[str, ...] = ()


class Places:
    """Looks up the weights of one model in one parent."""

    def __init__(self, model: MultimodalTransformer, parent: Parent) -> None:
        self.weights = parent.weights
        self.routes = [*_routes(model.config.parsed_model().towers, parent), *_logits(model, parent)]
        self.here, self.there = _Grids.of(model), _Grids.of(_outline(parent))

    def find(self, name: str, tensor: Tensor) -> Fit:
        """Values for the weight `name`, whose shape is that of `tensor`."""
        route = next((one for one in self.routes if name.startswith(one.prefix)), _Route("", ""))
        if route.obstacle is not None:
            return Fit(None, notes=(route.obstacle,))
        source = route.source + name.removeprefix(route.prefix)
        if source not in self.weights:
            return self._without_time(name, source, tensor, route.notes)
        values, note = self._shaped(name, source, self.weights[source])
        if values.shape != tensor.shape:
            short = name.split(".", 2)[-1]
            return Fit(None, notes=(f"{short} is {list(values.shape)} there, {list(tensor.shape)} here",))
        return Fit(values, source, (*route.notes, *note))

    def _shaped(self, name: str, source: str, values: Tensor) -> tuple[Tensor, tuple[str, ...]]:
        """Values made to fit where grids or kernels differ, and what was done."""
        old, new = self.there.positions.get(source), self.here.positions.get(name)
        if old is not None and new is not None and old != new and len(old) <= len(new):
            return resample_positions(values, old, new), (f"positions {_shown(old)} -> {_shown(new)}",)
        kernel, wanted = self.there.kernels.get(source), self.here.kernels.get(name)
        if kernel is not None and wanted is not None and kernel == (wanted[0], *wanted[2:]):
            return inflate_kernel(values, kernel[0], wanted[1]), (f"kernels inflated to {wanted[1]} frames",)
        return values, ()

    def _without_time(self, name: str, source: str, tensor: Tensor, notes: tuple[str, ...]) -> Fit:
        """Positions in time and space from an image's: those of time begin at zero, so that all frames are alike."""
        owner, _, axis = source.rpartition(".")
        image = f"{owner}.weight"
        if name not in self.here.positions or image not in self.there.positions or axis not in ("time", "space"):
            return Fit(None)
        if axis == "time":
            return Fit(torch.zeros_like(tensor), image, (*notes, "positions in time begin at zero"))
        old, new = self.there.positions[image], self.here.positions[name]
        if len(old) != len(new):
            return Fit(None)
        changed = () if old == new else (f"positions {_shown(old)} -> {_shown(new)}",)
        return Fit(resample_positions(self.weights[image], old, new), image, (*notes, *changed))


@dataclass(frozen=True)
class _Grids:
    """What the shapes of positions and kernels do not tell."""

    positions: Mapping[str, Grid]
    """Parameter -> the grid it has one vector a place of."""
    kernels: Mapping[str, tuple[int, ...]]
    """Patch projection -> channels and sizes of a patch."""

    @classmethod
    def of(cls, root: nn.Module) -> _Grids:
        positions: dict[str, Grid] = {}
        kernels: dict[str, tuple[int, ...]] = {}
        for path, module in root.named_modules():
            if isinstance(module, PatchStem):
                kernels[f"{path}.project.weight"] = module.patch_shape
            grid = _grid_around(root, path)
            if isinstance(module, LearnedPositions):
                positions[f"{path}.weight"] = grid or (module.weight.shape[0],)
            elif isinstance(module, SpaceTimePositions) and grid is not None:
                positions |= {f"{path}.time": (grid[0], 1, 1), f"{path}.space": grid[1:]}
        return cls(positions, kernels)


def _grid_around(root: nn.Module, path: str) -> Grid | None:
    owner = root.get_submodule(path.rpartition(".")[0])
    if isinstance(owner, FramesTower):
        return (owner.facts().num_tokens, 1, 1)
    return owner.grid if isinstance(owner, PatchStem) else None


def _outline(parent: Parent) -> nn.Module:
    """The parent's towers without memory; those of transformers say nothing of their grids and stay out."""
    with torch.device("meta"):
        towers = {m: t.build(m) for m, t in parent.towers.items() if not isinstance(t, HFAutoTowerConfig)}
    return nn.ModuleDict({"towers": nn.ModuleDict(towers)})


def _routes(towers: Mapping[str, TowerConfig], parent: Parent) -> Iterator[_Route]:
    """The towers' routes, special ones first."""
    for modality, tower in towers.items():
        if modality in parent.towers:
            yield _pair(f"towers.{modality}.", tower, f"towers.{modality}.", parent.towers[modality])
        elif modality == "video" and "image" in parent.towers:
            yield from _from_image(tower, parent.towers["image"])
        elif modality in parent.obstacles:
            yield _Route(f"towers.{modality}.", "", parent.obstacles[modality])


def _from_image(video: TowerConfig, image: TowerConfig) -> Iterator[_Route]:
    if isinstance(video, FramesTowerConfig):
        yield _pair("towers.video.image.", video.image, "towers.image.", image)
    else:
        yield _pair("towers.video.", video, "towers.image.", image)
    yield _Route("projections.video.", "projections.image.")


def _pair(prefix: str, here: TowerConfig, source: str, there: TowerConfig) -> _Route:
    if kind_of(type(here)) != kind_of(type(there)):
        obstacle = f"the tower is of kind {kind_of(type(here))}, the parent's of kind {kind_of(type(there))}"
        return _Route(prefix, source, obstacle)
    if isinstance(here, NativeTowerConfig) and isinstance(there, NativeTowerConfig):
        if (here.width, here.heads) != (there.width, there.heads):
            obstacle = f"{there.heads} heads, width {there.width} there, {here.heads} heads, width {here.width} here"
            return _Route(prefix, source, obstacle)
        return _Route(prefix, source, None, tuple(_differences(here, there)))
    return _Route(prefix, source)


def _differences(here: NativeTowerConfig, there: NativeTowerConfig) -> Iterator[str]:
    """Settings that change what the weights compute without changing a shape, and the depth."""
    pairs = [(here, there, ("depth", *_COMPARED)), (here.stem, there.stem, _COMPARED_OF_STEMS)]
    for own, other, names in pairs:
        left, right = own.model_dump(include=set(names)), other.model_dump(include=set(names))
        for name in names:
            if name in left and name in right and left[name] != right[name]:
                yield f"{name} is {right[name]} there, {left[name]} here"


def _logits(model: MultimodalTransformer, parent: Parent) -> Iterator[_Route]:
    """Scale and bias of the objective that contrasts image and text, which transformers' models hold by themselves."""
    for name, objective in model.objectives.items():
        if isinstance(objective, InfoNCE | SigLIP) and set(objective.pair) == {"image", "text"}:
            for ours, theirs in _LOGITS.items():
                if theirs in parent.weights:
                    yield _Route(f"objectives.{name}.{ours}", theirs)


def _shown(grid: Grid) -> str:
    """Times alone, places, or both."""
    return "x".join(map(str, grid)).removesuffix("x1x1")
