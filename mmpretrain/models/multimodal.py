"""The whole model: towers, projections, fusion and objectives, from config to the loss of one rank's share.

Enter: micro-batches of tensors. Leave: the scaled loss, sums per objective, embeddings. Refused: an objective without
the tower or the fusion it needs, an embedding of the wrong width. It builds from its config in a fresh process.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from mmpretrain.core.errors import ConfigError
from mmpretrain.core.registry import discover
from mmpretrain.core.types import TensorDict
from mmpretrain.layers.blocks import CheckpointedBlock
from mmpretrain.layers.initialization import Linear, Resettable
from mmpretrain.layers.phases import Phased
from mmpretrain.layers.recompute import Recompute, checkpoint_options
from mmpretrain.models.config import ModelConfig, resolve
from mmpretrain.models.encoding import ChunkEncoder, run_fusion
from mmpretrain.models.towers.base import Tower, TowerConfig
from mmpretrain.objectives.base import Average, Encoder, ModelFacts, Objective, ObjectiveConfig, expand_all
from mmpretrain.objectives.weights import weight_at


class MultimodalConfig(PretrainedConfig):  # type: ignore[no-untyped-call]
    """The resolved model and objectives as plain JSON, in the file transformers looks for."""

    model_type = "mmpretrain"
    model: dict[str, Any] | None = None
    """`ModelConfig`, dumped."""
    objectives: dict[str, Any] | None = None
    """Name -> `ObjectiveConfig`, dumped."""

    def parsed_model(self) -> ModelConfig:
        return ModelConfig.model_validate(self.model)

    def parsed_objectives(self) -> dict[str, ObjectiveConfig]:
        return {name: _parse_objective(name, fields) for name, fields in sorted((self.objectives or {}).items())}


class MultimodalTransformer(PreTrainedModel):  # type: ignore[no-untyped-call]
    """Towers under their modality's name, objectives under theirs; parts are in sorted order, whatever the file's."""

    config_class = MultimodalConfig
    base_model_prefix = "model"
    main_input_name = "micro_batches"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _keep_in_fp32_modules_strict = {"logit_scale", "logit_bias"}

    autocast_dtype: torch.dtype | None = None
    """Matrix products run in this precision, parameters keep theirs; None: all in the parameters' precision."""
    when_encoded: Callable[[], None] | None = None
    """Called in every forward when the rows are encoded, before objectives meet those of other ranks."""

    def __init__(self, config: MultimodalConfig) -> None:
        super().__init__(config)
        model, objectives = config.parsed_model(), config.parsed_objectives()
        towers = {modality: tower.build(modality) for modality, tower in sorted(model.towers.items())}
        widths = {modality: tower.facts().width for modality, tower in towers.items()}
        projections = {m: _projection(m, model.towers[m], widths[m], model.embed_dim) for m in towers}
        self.towers = nn.ModuleDict(towers)
        self.projections = nn.ModuleDict(projections)
        self.readers = dict(sorted(model.readers.items()))
        self.fusion = model.fusion.build({name: widths[tower] for name, tower in self.readers.items()})
        self.facts = ModelFacts(
            embed_dim=model.embed_dim,
            towers={name: towers[tower].facts() for name, tower in self.readers.items()},
            fusion_width=None if self.fusion is None else self.fusion.width,
            build_tower=lambda name: model.towers[model.readers[name]].build(model.readers[name]),
        )
        for name, objective in objectives.items():
            _check_objective(name, objective, model)
        self.objectives = nn.ModuleDict({name: each.build(self.facts) for name, each in objectives.items()})
        self._keys_to_ignore_on_load_missing = [rf"^{prefix}" for prefix in self._scaffolding()]
        self._weights = {name: objective.weight for name, objective in objectives.items()}
        self.begin_step(0)
        self.post_init()  # type: ignore[no-untyped-call]

    @classmethod
    def create(cls, model: ModelConfig, objectives: Mapping[str, ObjectiveConfig]) -> MultimodalTransformer:
        """A new model: our parts initialised, towers with named weights loaded from them."""
        config = MultimodalConfig(
            model=resolve(model, None).model_dump(mode="json"),
            objectives={
                name: objective.model_dump(mode="json")
                for name, objective in expand_all(objectives, model.towers).items()
            },
        )
        created = cls(config)
        if not any(parameter.is_meta for parameter in created.parameters()):
            for tower in created.towers_by_modality().values():
                tower.load_pretrained()
        return created

    @property
    def scheduled(self) -> tuple[str, ...]:
        """Objectives whose weight changes over the steps."""
        return tuple(name for name, weight in self._weights.items() if not isinstance(weight, float))

    @property
    def spans_batch(self) -> bool:
        """Whether some objective needs all of a rank's rows in one forward."""
        return any(objective.spans_batch for objective in self.objectives_by_name().values())

    def forward(self, micro_batches: Sequence[TensorDict], scales: TensorDict) -> TensorDict:
        """The loss of these rows: {"loss", "sum.<objective>", "metric.<name>"}, fp32 [] each.

        `loss` is the sum over objectives of weight * sum * scales[objective]. Objectives may communicate.
        """
        with self.autocast(micro_batches[0]):
            parts = self._encode_all(micro_batches)
        if self.when_encoded is not None:
            self.when_encoded()
        return self.join(parts, scales, _rows(micro_batches[0]) if len(micro_batches) > 1 else None)

    def encode(self, batch: TensorDict) -> TensorDict:
        """What all objectives make of one chunk, as "<objective>/<part>"; run it under `autocast`."""
        encoder = self.encoder(batch)
        return {
            f"{name}/{key}": part
            for name, objective in self.objectives_by_name().items()
            for key, part in objective.encode(encoder).items()
        }

    def join(self, parts: TensorDict, scales: TensorDict, at_once: int | None = None) -> TensorDict:
        """What `forward` gives, from the parts of all rows; those fused anew are fused `at_once` at a time."""
        fuse = partial(self._fuse_rows, at_once=at_once)
        outputs: TensorDict = {}
        figures: dict[str, TensorDict] = {}
        losses = []
        for name, objective in self.objectives_by_name().items():
            own = {key.removeprefix(f"{name}/"): part for key, part in parts.items() if key.startswith(f"{name}/")}
            total = objective.reduce_fused(own, fuse)
            losses.append(self.weights[name] * total * scales[name])
            outputs[f"sum.{name}"] = total.detach()
            figures[name] = objective.metrics(own)
        return {"loss": torch.stack(losses).sum()} | outputs | _named_metrics(figures)

    def begin_step(self, step: int) -> None:
        """Let objectives weigh, and towers see, from now on what they are to in step `step`, counted from 0."""
        self.weights = {name: weight_at(weight, step) for name, weight in self._weights.items()}
        for module in self.modules():
            if isinstance(module, Phased):
                module.begin_step(step)

    def after_step(self, step: int, average: Average) -> None:
        """Let every objective do what it does after step number `step`, or before the first (0). Communicates."""
        for objective in self.objectives_by_name().values():
            objective.after_step(step, self._read_by(), average)

    def published_state(self) -> TensorDict:
        """All weights but those that training alone needs."""
        return {
            name: tensor
            for name, tensor in self.state_dict().items()
            if not name.startswith(tuple(self._scaffolding()))
        }

    def trimmed(self, batch: TensorDict) -> TensorDict:
        """The batch without the last columns of texts that are padding in all of its rows, for towers that do not see
        padding. Looks at values, so call it before they go to a device; lengths may then differ between micro-batches
        and ranks."""
        short: TensorDict = {}
        for name, tower in self._read_by().items():
            mask = batch.get(f"{name}.mask")
            columns = None if mask is None else tower.columns(batch[name], mask)
            if columns is not None and columns < batch[name].shape[1]:
                short |= {key: batch[key][:, :columns].contiguous() for key in (name, f"{name}.mask")}
        return batch | short

    def counts(self, micro_batches: Sequence[TensorDict]) -> TensorDict:
        """Targets of each objective in this rank's rows, fp32 []; does not communicate."""
        return {
            name: torch.stack([objective.count(batch) for batch in micro_batches]).sum()
            for name, objective in self.objectives_by_name().items()
        }

    def embed(self, modality: str, inputs: Tensor, mask: Tensor | None = None) -> Tensor:
        """Unit embeddings of inputs as the batch holds them: fp32 [B, embed_dim]."""
        batch = {modality: inputs} if mask is None else {modality: inputs, f"{modality}.mask": mask}
        with self.autocast(batch):
            return self.encoder(batch).embed(modality)

    def encoder(self, batch: TensorDict) -> Encoder:
        """The model as objectives see it, over these rows; run it under the caller's autocast."""
        projections = cast(Mapping[str, nn.Module], self.projections)
        projected_by = {name: projections[tower] for name, tower in self.readers.items()}
        return ChunkEncoder(self._read_by(), projected_by, self.fusion, batch)

    def set_activation_checkpointing(self, policy: Recompute) -> None:
        """Keep of every transformer block in training only what the policy says, and compute the rest again."""
        for module in self.modules():
            if isinstance(module, CheckpointedBlock):
                module.gradient_checkpointing, module.recompute = policy != "none", policy
            elif isinstance(module, GradientCheckpointingLayer):
                module.gradient_checkpointing = policy != "none"
                again = partial(checkpoint, **checkpoint_options(policy))
                module._gradient_checkpointing_func = again  # type: ignore[assignment]

    def init_weights(self) -> None:
        """Every part initialised itself when it was built, so that nothing is left to do."""

    def _init_weights(self, module: nn.Module) -> None:
        """Initialise a part that a checkpoint lacks; transformers keeps loaded parameters from being touched."""
        if isinstance(module, Resettable):
            module.reset_parameters()

    def _encode_all(self, micro_batches: Sequence[TensorDict]) -> TensorDict:
        """The parts of all rows. With several chunks, all but the last are computed again in the backward.

        Gradient caching (Gao et al. 2021) in one graph: the backward begins with the last chunk, whose activations are
        gone before those of another are computed.
        """
        *early, last = micro_batches
        recompute = self.spans_batch and torch.is_grad_enabled()
        chunks: list[TensorDict] = [
            checkpoint(self.encode, batch, use_reentrant=False) if recompute else self.encode(batch) for batch in early
        ]
        chunks.append(self.encode(last))
        return chunks[0] if len(chunks) == 1 else {key: torch.cat([c[key] for c in chunks]) for key in chunks[0]}

    def _fuse_rows(self, outputs: Mapping[str, TensorDict], at_once: int | None) -> TensorDict:
        """Fuse rows an objective put together; implements `FuseRows`.

        In the parts of a batch in chunks: `at_once` rows at a time, computed again in the backward as towers are.
        """
        if at_once is None or not torch.is_grad_enabled():
            return self._fuse(outputs)
        cut = {m: {name: torch.split(part, at_once) for name, part in output.items()} for m, output in outputs.items()}
        number = len(next(iter(cut.values()))["tokens"])
        parts: list[TensorDict] = [
            checkpoint(
                self._fuse,
                {m: {name: pieces[index] for name, pieces in output.items()} for m, output in cut.items()},
                use_reentrant=False,
            )
            for index in range(number)
        ]
        return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}

    def _fuse(self, outputs: Mapping[str, TensorDict]) -> TensorDict:
        assert self.fusion is not None, "an objective that fuses rows says so by needs_pooled or needs_fusion"
        with self.autocast(next(iter(outputs.values()))):
            return run_fusion(self.fusion, outputs, {modality: output["mask"] for modality, output in outputs.items()})

    def _scaffolding(self) -> list[str]:
        """Beginnings of the names of weights that training alone needs."""
        return [
            f"objectives.{name}.{child}."
            for name, objective in self.objectives_by_name().items()
            for child in objective.scaffolding
        ]

    def autocast(self, batch: TensorDict) -> AbstractContextManager[object]:
        """The precision of the run's matrix products, on the device of the batch."""
        if self.autocast_dtype is None:
            return nullcontext()
        device = next(iter(batch.values())).device
        return torch.autocast(device.type, dtype=self.autocast_dtype)

    def _read_by(self) -> Mapping[str, Tower]:
        """Every input -> the tower that reads it."""
        towers = self.towers_by_modality()
        return {name: towers[tower] for name, tower in self.readers.items()}

    def towers_by_modality(self) -> Mapping[str, Tower]:
        """`towers`, as what they are."""
        return cast(Mapping[str, Tower], self.towers)

    def objectives_by_name(self) -> Mapping[str, Objective]:
        """`objectives`, as what they are."""
        return cast(Mapping[str, Objective], self.objectives)


def _rows(batch: TensorDict) -> int:
    return next(iter(batch.values())).shape[0]


def _named_metrics(figures: Mapping[str, TensorDict]) -> TensorDict:
    """All objectives' figures as "metric.<name>"; a name that several give carries the objective's behind it."""
    shared = Counter(name for metrics in figures.values() for name in metrics)
    return {
        f"metric.{name}" if shared[name] == 1 else f"metric.{name}_{objective}": value.detach()
        for objective, metrics in figures.items()
        for name, value in metrics.items()
    }


def _projection(modality: str, config: TowerConfig, width: int, embed_dim: int) -> nn.Module:
    """From a tower's pooled vector to the common space; identity where the config says so."""
    if config.projection:
        return Linear(width, embed_dim, std=width**-0.5, bias=config.projection_bias)
    if width != embed_dim:
        raise ConfigError(
            f"towers.{modality}.projection is false, so its width {width} must be embed_dim {embed_dim}; "
            f"set embed_dim to {width} or projection to true"
        )
    return nn.Identity()


def _parse_objective(name: str, fields: Mapping[str, Any]) -> ObjectiveConfig:
    kinds = discover("mmpretrain.objectives", ObjectiveConfig)
    kind = fields.get("kind")
    if kind not in kinds:
        raise ConfigError(f"objectives.{name}.kind is {kind!r}; this version knows {', '.join(kinds)}")
    parsed: ObjectiveConfig = kinds[kind].model_validate(fields)
    return parsed


def _check_objective(name: str, objective: ObjectiveConfig, model: ModelConfig) -> None:
    missing = sorted(set(objective.modalities) - set(model.readers))
    if missing:
        known = ", ".join(sorted(model.readers))
        raise ConfigError(
            f"objective {name} needs the towers {', '.join(missing)}, the model has {known}; "
            "add them under model.towers or remove the objective"
        )
    if lack := model.lacking_fusion(objective):
        raise ConfigError(f"objective {name} {lack}")


AutoConfig.register(MultimodalConfig.model_type, MultimodalConfig)
AutoModel.register(MultimodalConfig, MultimodalTransformer)
