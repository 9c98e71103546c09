"""Running evaluation tasks: during training on the live model, and later on a checkpoint.

Enter: a model, codecs and tasks. Leave: figures by name, the same on every rank, handed to the trackers.
"""

import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch

from data_pipeline.sequential import iterate_all
from mmpretrain.config import RunConfig
from mmpretrain.core.ranks import World
from mmpretrain.core.seeding import key_of
from mmpretrain.core.types import Codec, StepReport, TensorDict
from mmpretrain.evaluation.base import EvaluationContext, Rows
from mmpretrain.models.multimodal import MultimodalTransformer
from mmpretrain.tracking.fanout import Trackers
from mmpretrain.training.run_folder import RunFolder

log = logging.getLogger(__name__)
EVALUATION_SEED = 0


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
        for part in iterate_all(patterns, codecs, config.micro_batch_size, world, max_samples):
            for skip in part.skips:
                log.warning("evaluation leaves out %s in %s: %s", skip.key, skip.shard, skip.reason)
            yield Rows(part.tensors | _row_facts(part.keys, codecs), part.keys, part.members)

    return EvaluationContext(model, codecs, rows, device, run_dir)


def _row_facts(keys: Sequence[str], modalities: Iterable[str]) -> TensorDict:
    """What a training batch says of its rows; masking follows from a sample's name, whoever reads it."""
    draws = [key_of(EVALUATION_SEED, key) >> 1 for key in keys]
    present = {f"{name}.present": torch.ones(len(keys), dtype=torch.bool) for name in modalities}
    return present | {"draw": torch.tensor(draws, dtype=torch.int64)}


def run_tasks(config: RunConfig, context: EvaluationContext) -> dict[str, float]:
    """Every task of the config, in eval mode; communicates."""
    figures: dict[str, float] = {}
    context.model.eval()
    try:
        for _, task in sorted(config.evaluation.tasks.items()):
            figures |= task.run(context)
    finally:
        context.model.train()
    return figures


class Evaluator:
    """Evaluates the live model after a step and tells the trackers."""

    def __init__(
        self, config: RunConfig, context: EvaluationContext, world: World, folder: RunFolder, trackers: Trackers
    ) -> None:
        self.config, self.context, self.world = config, context, world
        self.folder, self.trackers = folder, trackers

    def run(self, report: StepReport) -> None:
        """Communicates."""
        if not self.config.evaluation.tasks:
            return
        if self.world.is_main:
            self.folder.write_heartbeat(report.step, "evaluate")
        begin = time.perf_counter()
        figures = run_tasks(self.config, self.context)
        figures["val/seconds"] = time.perf_counter() - begin
        self.trackers.log_evaluation(report.step, report.samples, figures)
