"""Each tower, and each supervised head with all it reads, as an ONNX graph that answers as PyTorch does.

Enter: a model on the CPU. Leave: a folder of `<modality>.onnx` (unit embeddings) and `classify-<objective>.onnx`
(logits or values), any number of rows, inputs just as the codecs make them, and `graphs.json`, which describes them.
Refused: operators that the exporter lacks, graphs that differ from PyTorch by more than 1e-4; then nothing is left.
"""

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from mmpretrain.core.containers import require
from mmpretrain.core.errors import ConfigError, MMPretrainError
from mmpretrain.core.folders import made_beside
from mmpretrain.core.types import Array, FieldSpec
from mmpretrain.evaluation.base import CaptionCodec
from mmpretrain.inference.model import Model
from mmpretrain.objectives.supervised import Supervised

TOLERANCE = 1e-4
CHECKED_ROWS = (1, 3)
"""Batch sizes at which a graph is compared; it is traced with another."""
_TRACED_ROWS = 2
_SEED = 20210226


class ExportError(MMPretrainError):
    """The model cannot be exported as asked; nothing was left at the target."""


@dataclass(frozen=True)
class Graph:
    """One graph to be written: what computes it, and the batch fields it reads."""

    module: nn.Module
    fields: Mapping[str, FieldSpec]
    output: str
    names: tuple[str, ...] | None = None
    """What the columns of the output stand for."""

    @property
    def input_names(self) -> list[str]:
        """Fields as ONNX names them: "text.mask" is text_mask."""
        return [name.replace(".", "_") for name in self.fields]


class _Tower(nn.Module):
    """A modality's fields, inputs first, to unit embeddings."""

    def __init__(self, model: Model, modality: str) -> None:
        super().__init__()
        self.network, self.modality = model.network, modality

    def forward(self, *fields: Tensor) -> Tensor:
        return self.network.embed(self.modality, *fields)


class _Head(nn.Module):
    """The fields of all that a head reads, all present, to its outputs."""

    def __init__(self, model: Model, head: Supervised, fields: Mapping[str, FieldSpec]) -> None:
        super().__init__()
        self.network, self.head, self.names = model.network, head, tuple(fields)

    def forward(self, *fields: Tensor) -> Tensor:
        return self.head.predict(self.network.encoder(dict(zip(self.names, fields, strict=True))))


def export_onnx(model: Model, out: Path, only: Sequence[str] = ()) -> dict[str, float]:
    """Write, compare and put in place all graphs, or some; graph -> largest difference from PyTorch."""
    for module in ("onnx", "onnxscript", "onnxruntime"):
        require(module, "onnx", "exporting to ONNX")
    if out.exists():
        raise ConfigError(f"{out} exists; remove it, or write the graphs elsewhere")
    possible = graphs(model)
    if unknown := sorted(set(only) - possible.keys()):
        raise ConfigError(f"{model.source} has no graph {', '.join(unknown)}; it has {', '.join(possible)}")
    with made_beside(out) as folder:
        found = {}
        described = {}
        for name, graph in ((name, possible[name]) for name in only or possible):
            path = folder / f"{name}.onnx"
            _write(graph, model, path, name)
            found[name] = _compare(graph, model, path, name)
            described[name] = _describe(graph, found[name])
        (folder / "graphs.json").write_text(
            json.dumps(described, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        )
        folder.replace(out)
    return found


def graphs(model: Model) -> dict[str, Graph]:
    """One graph for each tower and each supervised objective."""
    towers = {m: Graph(_Tower(model, m), _fields(model, m), "vectors") for m in model.modalities}
    heads = {}
    for name, objective in model.network.objectives.items():
        if isinstance(objective, Supervised):
            fields = {field: spec for m in objective.inputs for field, spec in _fields(model, m).items()}
            module = _Head(model, objective, fields)
            heads[f"classify-{name}"] = Graph(module, fields, "outputs", model.output_names(objective))
    return towers | heads


def _fields(model: Model, modality: str) -> dict[str, FieldSpec]:
    """Inputs, then the mask if there is one."""
    fields = model.processor.decoder(modality).fields
    return {name: fields[name] for name in (modality, f"{modality}.mask") if name in fields}


def example_rows(model: Model, fields: Mapping[str, FieldSpec], rows: int) -> tuple[Tensor, ...]:
    """Inputs as the codecs could have made them: texts, noise, and masks that hide more in each row."""
    texts = [f"{'a red square and ' * number}a blue circle" for number in range(rows)]
    words = {
        name: array
        for modality in fields
        if modality in model.modalities and isinstance(decoder := model.processor.decoder(modality), CaptionCodec)
        for name, array in decoder.encode(texts).items()
    }
    draw = np.random.default_rng(_SEED + rows)
    found = (words[name] if name in words else _noise(spec, rows, draw) for name, spec in fields.items())
    return tuple(torch.from_numpy(array) for array in found)


def _noise(spec: FieldSpec, rows: int, draw: np.random.Generator) -> Array:
    shape = (rows, *spec.shape)
    if spec.dtype == "bool":
        kept = np.linspace(spec.shape[0], 1, rows).astype(np.int64)
        return np.array(np.broadcast_to(np.arange(spec.shape[0]) < kept[:, None], shape))
    if spec.dtype == "uint8":
        return draw.integers(0, 256, shape, np.uint8)
    if spec.dtype == "int16":
        return draw.integers(-8000, 8000, shape, np.int16)
    return draw.standard_normal(shape).astype(spec.dtype)


def _write(graph: Graph, model: Model, path: Path, name: str) -> None:
    rows = torch.export.Dim("rows")
    example = example_rows(model, graph.fields, _TRACED_ROWS)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of names of shapes that two inputs share
        try:
            program = torch.onnx.export(
                graph.module.eval(),
                example,
                dynamo=True,
                dynamic_shapes=(tuple({0: rows} for _ in example),),
                input_names=graph.input_names,
                output_names=[graph.output],
                verbose=False,
            )
        except torch.onnx.errors.OnnxExporterError as error:
            raise ExportError(f"{name} cannot be exported: {' '.join(str(error).split())[:500]}") from error
    assert program is not None
    program.save(path)


def _compare(graph: Graph, model: Model, path: Path, name: str) -> float:
    """The largest difference from PyTorch, in onnxruntime; past the tolerance an ExportError."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    worst = 0.0
    for rows in CHECKED_ROWS:
        example = example_rows(model, graph.fields, rows)
        given = {name: tensor.numpy() for name, tensor in zip(graph.input_names, example, strict=True)}
        (answer,) = session.run([graph.output], given)
        with torch.no_grad():
            expected = graph.module(*example).numpy()
        worst = max(worst, float(np.abs(answer - expected).max()))
    if not worst <= TOLERANCE:
        raise ExportError(
            f"{name}: onnxruntime differs from PyTorch by {worst:.1e}, more than {TOLERANCE:g}; not written"
        )
    return worst


def _describe(graph: Graph, difference: float) -> dict[str, object]:
    inputs = {
        name: {"dtype": spec.dtype, "shape": ["rows", *spec.shape], **({"rate": spec.rate} if spec.rate else {})}
        for name, spec in zip(graph.input_names, graph.fields.values(), strict=True)
    }
    columns = {} if graph.names is None else {"columns": list(graph.names)}
    return {"inputs": inputs, "output": graph.output, **columns, "largest_difference": difference}
