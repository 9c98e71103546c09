"""One rank of the checks of objectives without an engine; started by test_objectives.py.

Enter: a folder. Leaves, written by rank 0: for each case the loss and the gradients averaged over ranks, which is what
data parallel training sees. Contrastive cases run in float64 over one linear tower for each side.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from open_clip.loss import ClipLoss, SigLipLoss
from safetensors.torch import save_file
from tiny_model import build_model, rows_of
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.utils.checkpoint import checkpoint

from mmpretrain.core.collectives import all_reduce_max, all_reduce_sum, gather_rows, rank, world_size
from mmpretrain.core.types import TensorDict
from mmpretrain.objectives.base import ModelFacts, Objective, ObjectiveConfig, expand_all
from mmpretrain.objectives.captioning import CaptioningConfig
from mmpretrain.objectives.data2vec import Data2VecConfig
from mmpretrain.objectives.infonce import InfoNCEConfig
from mmpretrain.objectives.itm import ITMConfig
from mmpretrain.objectives.mae import MAEConfig
from mmpretrain.objectives.mlm import MLMConfig
from mmpretrain.objectives.pairs import encode_pairs
from mmpretrain.objectives.siglip import SigLIPConfig
from mmpretrain.objectives.supervised import SupervisedConfig

ROWS, IN_WIDTH, WIDTH, TILE = 16, 5, 6, 3
SIGLIP_BIAS = -2.0
CONTRASTIVE: dict[str, ObjectiveConfig] = {
    "infonce": InfoNCEConfig(tile=TILE),
    "siglip_ring": SigLIPConfig(implementation="ring", tile=TILE, bias_init=SIGLIP_BIAS),
    "siglip_gather": SigLIPConfig(implementation="gather", tile=TILE, bias_init=SIGLIP_BIAS),
}
CHUNKS = (1, 2, 4)
ABSENT = {"all": (), "some": (0, 1, 2, 3, 9, 14)}
"""Rows without a text; with four ranks of four rows the first has no pair at all."""
WITHOUT_AUDIO = (1, 2, 7, 12)
NUM_HIDDEN = (7, 6, 4, 3)
"""Hidden tokens of each row at probability 1/2: 13 and 7 on two ranks."""
OTHERS: dict[str, ObjectiveConfig] = {
    "mlm": MLMConfig(probability=0.5),
    "mlm_image": MLMConfig(probability=0.5, condition_on=("image",)),
    "mim": MAEConfig(decoder_width=32, decoder_depth=1, decoder_heads=4),
}
DECODER = {"decoder_width": 32, "decoder_depth": 1, "decoder_heads": 4}
TOGETHER: dict[str, ObjectiveConfig] = {
    "itm": ITMConfig(scale=4.0),
    "seen": MAEConfig(condition_on=("text",), **DECODER),
    "features": Data2VecConfig(top_layers=2, **DECODER),
    "class": SupervisedConfig(inputs=("image", "text"), label="class", outputs=3, smoothing=0.1),
}
CAPTION: dict[str, ObjectiveConfig] = {"caption": CaptioningConfig(depth=1, heads=4)}
HUB = expand_all({"itc": InfoNCEConfig(hub="image", tile=TILE)}, ("audio", "image", "text"))


def inputs() -> dict[str, np.ndarray]:
    """Tower inputs [ROWS, IN_WIDTH] and weights [IN_WIDTH, WIDTH] of each modality."""
    generator = np.random.default_rng(0)
    shapes = {"image": (ROWS, IN_WIDTH), "text": (ROWS, IN_WIDTH)} | {
        "image_weight": (IN_WIDTH, WIDTH),
        "text_weight": (IN_WIDTH, WIDTH),
    }
    shapes |= {"audio": (ROWS, IN_WIDTH), "audio_weight": (IN_WIDTH, WIDTH)}
    return {name: generator.normal(size=shape) for name, shape in shapes.items()}


class Towers(nn.Module):
    """Linear towers; implements as much of `Encoder` as contrastive objectives ask for."""

    def __init__(self) -> None:
        super().__init__()
        given = inputs()
        self.image, self.text, self.audio = (
            nn.Parameter(torch.tensor(given[f"{m}_weight"])) for m in ("image", "text", "audio")
        )

    def parts(self, objective: Objective, rows: TensorDict) -> TensorDict:
        return encode_pairs(_Encoder(rows, self), objective.pair)


@dataclass(frozen=True)
class _Encoder:
    batch: TensorDict
    towers: Towers

    def embed(self, modality: str) -> Tensor:
        return normalize(self.batch[modality] @ self.towers.get_parameter(modality), dim=1)


def own_rows(tensors: TensorDict) -> TensorDict:
    return {name: tensor.chunk(world_size())[rank()] for name, tensor in tensors.items()}


def contrastive_rows(absent: tuple[int, ...]) -> TensorDict:
    given = {name: torch.tensor(inputs()[name]) for name in ("image", "text")}
    present = torch.ones(ROWS, dtype=torch.bool)
    present[list(absent)] = False
    return given | {"image.present": torch.ones(ROWS, dtype=torch.bool), "text.present": present}


def averaged(loss: Tensor, *modules: nn.Module) -> TensorDict:
    """Loss and gradients as data parallel training averages them. Communicates."""
    loss.backward()
    named = {name: p.grad for module in modules for name, p in module.named_parameters() if p.grad is not None}
    shared = {"loss": loss.detach().reshape(1), **named}
    return {name: all_reduce_sum(tensor.clone()) / world_size() for name, tensor in shared.items()}


def contrastive_case(name: str, absent: str, chunks: int) -> TensorDict:
    towers, objective = Towers(), CONTRASTIVE[name].build(ModelFacts(WIDTH, {}, None)).double()
    rows = own_rows(contrastive_rows(ABSENT[absent]))
    total = all_reduce_sum(objective.count(rows).clone())
    cut = [
        dict(zip(rows, values, strict=True)) for values in zip(*(t.chunk(chunks) for t in rows.values()), strict=True)
    ]
    done = [checkpoint(towers.parts, objective, chunk, use_reentrant=False) for chunk in cut]
    parts = {key: torch.cat([one[key] for one in done]) for key in done[0]}
    loss = objective.reduce(parts) * world_size() / total
    return averaged(loss, towers, objective) | {name: v.reshape(1) for name, v in objective.metrics(parts).items()}


def open_clip_case(name: str) -> TensorDict:
    towers = Towers()
    encoder = _Encoder(own_rows(contrastive_rows(())), towers)
    features = encoder.embed("image"), encoder.embed("text")
    if name == "infonce":
        options = {"local_loss": True, "gather_with_grad": True}
        loss = ClipLoss(rank=rank(), world_size=world_size(), **options)(*features, 1 / 0.07)
    else:
        loss = SigLipLoss(rank=rank(), world_size=world_size())(*features, 10.0, SIGLIP_BIAS)
    return averaged(loss, towers)


def hub_case() -> TensorDict:
    """The image meets text and audio, each of which some rows lack; what the entry adds is the sum over its pairs."""
    towers = Towers()
    objectives = {name: config.build(ModelFacts(WIDTH, {}, None)).double() for name, config in HUB.items()}
    rows = own_rows(contrastive_rows(ABSENT["some"]) | {"audio": torch.tensor(inputs()["audio"])} | _audio_present())
    losses = {}
    for name, objective in objectives.items():
        total = all_reduce_sum(objective.count(rows).clone())
        losses[name] = objective.reduce(towers.parts(objective, rows)) * world_size() / total
    each = {f"loss.{name}": all_reduce_sum(loss.detach().clone()) / world_size() for name, loss in losses.items()}
    found = averaged(torch.stack(list(losses.values())).sum(), towers, nn.ModuleDict(objectives))
    return found | {name: loss.reshape(1) for name, loss in each.items()}


def _audio_present() -> TensorDict:
    present = torch.ones(ROWS, dtype=torch.bool)
    present[list(WITHOUT_AUDIO)] = False
    return {"audio.present": present}


def together_rows() -> TensorDict:
    """Eight rows of which some lack image, text or label, and two are one sample."""
    rows = rows_of([3, 9, 5, 14, 7, 2, 11, 6])
    rows["image.present"][1] = rows["text.present"][4] = False
    rows["sample"][6] = rows["sample"][0]
    return rows | {"class": torch.arange(8) % 3, "class.present": torch.tensor([1, 1, 0, 0, 1, 0, 0, 1]).bool()}


def together_case(objectives: dict[str, ObjectiveConfig], chunks: int) -> TensorDict:
    """Objectives in one real model, fp32. Communicates."""
    model = build_model(objectives, causal="caption" in objectives)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "teacher" in name:
                parameter.mul_(1.5)
    rows = own_rows(together_rows())
    scales = {name: world_size() / all_reduce_sum(count.clone()) for name, count in model.counts([rows]).items()}
    cut = [
        dict(zip(rows, values, strict=True)) for values in zip(*(t.chunk(chunks) for t in rows.values()), strict=True)
    ]
    outputs = model(cut, scales)
    extra = {name: value.reshape(1) for name, value in outputs.items() if name.startswith("metric.")}
    return averaged(outputs["loss"], model) | extra


def masked_rows() -> TensorDict:
    """Texts whose ordinary tokens are twice what they hide; the second row has no image."""
    rows = rows_of([2 * hidden for hidden in NUM_HIDDEN])
    rows["image.present"][1] = False
    return rows


def masked_case() -> TensorDict:
    """All objectives of independent rows in one real model, fp32. Communicates."""
    model = build_model(OTHERS)
    rows = own_rows(masked_rows())
    counts = model.counts([rows])
    scales = {name: world_size() / all_reduce_sum(count.clone()) for name, count in counts.items()}
    outputs = model([rows], scales)
    extra = {name: value.reshape(1) for name, value in outputs.items() if name.startswith("metric.")}
    gathered = {f"count.{name}.{rank()}": count for name, count in counts.items()}
    return averaged(outputs["loss"], model) | extra | _of_all_ranks(gathered)


def _of_all_ranks(counts: TensorDict) -> TensorDict:
    shared: list[TensorDict] = [{}] * world_size()
    dist.all_gather_object(shared, counts)
    return {name: value.reshape(1) for each in shared for name, value in each.items()}


def gather_case() -> TensorDict:
    """Rank r holds row r and weighs the gathered rows by r + 1; its gradient is what all ranks weigh its row by."""
    row = torch.full((1, 2), float(rank()), requires_grad=True)
    gathered = gather_rows(row)
    (gathered * (rank() + 1)).sum().backward()
    assert row.grad is not None
    return {"rows": gathered.detach(), "grad": row.grad, "highest": all_reduce_max(torch.tensor([float(rank())]))}


def cases() -> Iterator[tuple[str, TensorDict]]:
    for name, absent, chunks in product(CONTRASTIVE, ABSENT, CHUNKS):
        yield f"{name}/{absent}/{chunks}", contrastive_case(name, absent, chunks)
    for name in ("infonce", "siglip"):
        yield f"open_clip/{name}", open_clip_case(name)
    if world_size() <= 2:
        yield "masked", masked_case()
    for chunks in (1, 2):
        yield f"together/{chunks}", together_case(TOGETHER, chunks)
        yield f"caption/{chunks}", together_case(CAPTION, chunks)
    yield "hub", hub_case()
    yield "gather", gather_case()


def run_cases(folder: Path) -> None:
    """All cases; rank 0 writes what came out."""
    results = {f"{case}:{name}": tensor for case, result in cases() for name, tensor in result.items()}
    if rank() == 0:
        save_file(results, folder / f"ranks-{world_size()}.safetensors")
