"""Running evaluation tasks: during training on the live model, and later on a checkpoint.

Enter: a model, codecs and tasks. Leave: figures by name, the same on every rank, handed to the trackers.
"""

import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import nn

from data_pipeline.reader import open_sources
from data_pipeline.sequential import iterate_all
from mmpretrain.config import RunConfig
from mmpretrain.core.collectives import rank
from mmpretrain.core.errors import ConfigError, DataError
from mmpretrain.core.ranks import World
from mmpretrain.core.run_files import PICTURES, replace
from mmpretrain.core.types import Codec, StepReport
from mmpretrain.evaluation.base import EvaluationContext, Rows
from mmpretrain.models.multimodal import MultimodalTransformer
from mmpretrain.tracking.fanout import Trackers
from mmpretrain.training.parts import AUTOCAST
from mmpretrain.training.ranks import join, leave
from mmpretrain.training.run_folder import RunFolder
from mmpretrain.training.trained import TrainedRun, open_trained

log = logging.getLogger(__name__)


def evaluation_context(
    config: RunConfig,
    model: MultimodalTransformer,
    codecs: Mapping[str, Codec],
    world: World,
    device: torch.device,
    run_dir: Path | None,
) -> EvaluationContext:
    """What tasks may use; samples are read in shard order, this rank's contiguous part."""
    training = [pattern for source in config.data.train.sources.values() for pattern in source.shards]

    def rows(shards: Sequence[str] | None, max_samples: int | None) -> Iterator[Rows]:
        patterns = {"evaluation": training if shards is None else shards}
        for part in iterate_all(patterns, codecs, config.micro_batch_size, world, max_samples, config.data.cache):
            for skip in part.skips:
                log.warning("evaluation leaves out %s in %s: %s", skip.key, skip.shard, skip.reason)
            yield Rows(part.tensors, part.keys, part.members)

    return EvaluationContext(model, codecs, rows, device, run_dir)


def run_tasks(config: RunConfig, context: EvaluationContext) -> dict[str, float]:
    """Every task of the config, in eval mode; communicates."""
    figures: dict[str, float] = {}
    context.pictures.clear()
    context.model.train(False)
    try:
        for _, task in sorted(config.evaluation.tasks.items()):
            figures |= task.run(context)
    finally:
        context.model.train()
    _list_pictures(context)
    return figures


def _list_pictures(context: EvaluationContext) -> None:
    """`evaluation/pictures.json`: name -> pictures with their captions, for the report."""
    if not context.pictures or context.run_dir is None or rank():
        return
    folder = context.run_dir / "evaluation"
    listed = {
        name: [{"file": str(one.path.relative_to(folder)), "caption": one.caption} for one in shown]
        for name, shown in context.pictures.items()
    }
    replace(folder / PICTURES, json.dumps(listed, indent=1, ensure_ascii=False))


def evaluate_trained(
    path: Path, overrides: tuple[str, ...] = (), averaged: bool = False
) -> tuple[TrainedRun, dict[str, float]]:
    """Evaluate a run's newest checkpoint, or one checkpoint, by the tasks of its config; any number of ranks.
    `averaged` takes the moving average of its weights."""
    world, device = join()
    try:
        trained = open_trained(path, overrides, averaged)
        if not trained.config.evaluation.tasks:
            raise ConfigError(
                f"{path}: its config has no evaluation.tasks; give one, e.g. evaluation.tasks.retrieval.kind=retrieval"
            )
        model = trained.model
        nn.Module.to(model, device)
        model.autocast_dtype = AUTOCAST[trained.config.precision]
        context = evaluation_context(trained.config, model, trained.codecs, world, device, trained.run_dir)
        figures = run_tasks(trained.config, context)
        if world.is_main:
            _append(trained, figures)
        return trained, figures
    finally:
        leave()


def _append(trained: TrainedRun, figures: Mapping[str, float]) -> None:
    """One line of the run's `evals.jsonl`."""
    position = trained.position
    row = {"step": position.step, "samples": position.samples, "time": time.time(), "averaged": trained.averaged}
    row |= figures
    with (trained.run_dir / "evals.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")


class Evaluator:
    """Evaluates the live model after a step and tells the trackers."""

    def __init__(
        self, config: RunConfig, context: EvaluationContext, world: World, folder: RunFolder, trackers: Trackers
    ) -> None:
        self.config, self.context, self.world = config, context, world
        self.folder, self.trackers = folder, trackers

    def check(self) -> None:
        """Refuse before the first step the shards and files that a task would refuse after hours of them."""
        for name, task in self.config.evaluation.tasks.items():
            task.check_files()
            task.check_model(self.context.model)
            for shards in filter(None, task.shard_sets):
                (source,) = open_sources({"evaluation": shards}, self.context.codecs, cache=self.config.data.cache)
                if task.modalities and all(held.isdisjoint(task.modalities) for held in source.together):
                    raise DataError(
                        f"evaluation.tasks.{name} looks at {', '.join(task.modalities)}, and none of its shards holds "
                        f"any of these; name other shards, or remove the task"
                    )

    def run(self, report: StepReport) -> None:
        """Communicates."""
        if not self.config.evaluation.tasks:
            return
        begin = time.perf_counter()
        with self.folder.phase("evaluate", report.step) if self.world.is_main else nullcontext():
            figures = run_tasks(self.config, self.context)
        figures["val/seconds"] = time.perf_counter() - begin
        self.trackers.log_evaluation(report.step, report.samples, figures, self.context.pictures)
