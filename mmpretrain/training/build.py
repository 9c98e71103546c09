"""The composition root: a config becomes the parts of a run, joined and, where a checkpoint exists, restored.

Enter: a RunConfig, this rank's place and the run folder. Leave: `Run`. All that can be wrong with config, data, device
or checkpoint is refused here, before the first step.
"""

import logging
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial

import torch
from torch import nn

from data_pipeline.ledger import Ledger
from data_pipeline.loader import Loader, build_loader
from data_pipeline.sample_order import data_step
from mmpretrain.config import RunConfig
from mmpretrain.core import run_files
from mmpretrain.core.config import dump_yaml
from mmpretrain.core.errors import CheckpointError, DivergenceError
from mmpretrain.core.logging import configure_logging
from mmpretrain.core.ranks import BatchPlan, World
from mmpretrain.core.seeding import key_of
from mmpretrain.core.types import StepReport
from mmpretrain.modalities.images_on_gpu import leave_to_gpu
from mmpretrain.models.config import ModelConfig, resolve
from mmpretrain.models.multimodal import MultimodalTransformer
from mmpretrain.models.parent import Parent
from mmpretrain.models.trained_parts import prepare
from mmpretrain.tracking.base import RunFacts
from mmpretrain.tracking.fanout import Trackers, build_trackers
from mmpretrain.training import checkpoint
from mmpretrain.training.engine import Engine, check_precision
from mmpretrain.training.evaluate import Evaluator, evaluation_context
from mmpretrain.training.fetching import fetch_newest
from mmpretrain.training.hooks import (
    Do,
    Every,
    Heartbeat,
    Hook,
    Profile,
    RecordConsumed,
    Requested,
    StopOnDivergence,
    TraceSamples,
    Verdict,
    WarnBelow,
    WriteSkippedSteps,
)
from mmpretrain.training.loop import Parts
from mmpretrain.training.manifest import PassedOver
from mmpretrain.training.parts import build_codecs, source_facts
from mmpretrain.training.ranks import device_name, first_on_main, on_main
from mmpretrain.training.reporting import Reporter
from mmpretrain.training.requests import Requests, answer_stack_requests
from mmpretrain.training.run_folder import RunFolder, State
from mmpretrain.training.saver import Saver, upload_folder
from mmpretrain.training.schedule import learning_rate
from mmpretrain.training.sources import check_sources
from mmpretrain.training.spikes import (
    RollBack,
    WatchForSpikes,
    meter_at,
    read_rollbacks,
    restore_rollbacks,
    write_rollback,
)
from mmpretrain.training.text import prepare_tokenizer
from mmpretrain.training.utilization import utilization
from mmpretrain.training.warm_start import find_parent, start_from, warn_of_random_parts

log = logging.getLogger(__name__)
COLLAPSED = 0.1
"""Standard deviation of a teacher's targets below which data2vec's own code stops (arXiv 2202.03555)."""


@dataclass(frozen=True)
class Run:
    """A run that is ready to train."""

    config: RunConfig
    engine: Engine
    loader: Loader
    reporter: Reporter
    ledger: Ledger
    trackers: Trackers
    saver: Saver
    evaluate: Callable[[StepReport], None]
    folder: RunFolder
    world: World
    start: int
    """Steps done when this attempt began."""

    @property
    def step(self) -> int:
        """Steps done so far."""
        return max(self.start, self.reporter.step)

    def close(self, state: State, message: str, reason: str = "", asked: float | None = None) -> None:
        """Record how the attempt ended."""
        if state == "completed":
            self.saver.finish_uploads()
        self.trackers.close(state)
        if self.world.is_main:
            self.folder.write_outcome(state, self.step, message, reason, asked)


def build(config: RunConfig, world: World, device: torch.device, folder: RunFolder, requests: Requests) -> Run:
    """Join everything; communicates."""
    check_precision(config, device)
    plan = BatchPlan(config.global_batch_size, config.micro_batch_size, world)
    attempt, folder.before = on_main(
        lambda: (folder.begin_attempt(world.size, device_name(device), config.steps), folder.before)
    )
    answer_stack_requests(folder.path, world.rank)
    folder.write_rank(world.rank)
    configure_logging(world, folder.path)
    _make_deterministic(config)
    parent = find_parent(config, folder)
    tokenizer, facts = prepare_tokenizer(config, folder, parent)
    model_config = resolve(config.model, facts)
    codecs = build_codecs(config, model_config, tokenizer)
    trained_on = leave_to_gpu(codecs) if device.type == "cuda" else codecs
    loader = first_on_main(lambda: build_loader(config.data, trained_on, plan, config.seed, 0, config.steps))
    check_sources(config, loader)
    engine = _build_engine(config, model_config, world, device, folder, parent)
    start = _restore(config, engine, folder, world, loader.fingerprint)
    if world.is_main:  # a run that was refused has left the record of the one before as it was
        folder.begin_steps(start)
        folder.rewind(start, _next_position(config, folder, start))
        folder.write_config(dump_yaml(config))
        folder.write_sources([asdict(facts) for facts in source_facts(loader.sources)])
    trackers = _build_trackers(config, folder, attempt, start, world)
    context = evaluation_context(config, engine.model, codecs, world, device, folder.path)
    evaluator = Evaluator(config, context, world, folder, trackers)
    first_on_main(evaluator.check)
    ledger = Ledger(folder.path / run_files.LEDGER, config.data.bad_sample_budget, writes=world.is_main)
    count_flops = partial(utilization, config, model_config, codecs, device)
    saver = Saver(config, engine, folder, world, trackers, order_hash(config, loader.fingerprint))
    reporter = Reporter(
        config.global_batch_size, requests, config.trace_samples, device, count_flops, lambda: saver.is_written
    )
    return Run(config, engine, loader, reporter, ledger, trackers, saver, evaluator.run, folder, world, start)


def parts_from(run: Run, step: int) -> Parts:
    """What the loop needs to go on from a step. Communicates."""
    config, folder = run.config, run.folder
    gone_back = on_main(lambda: read_rollbacks(folder.path))
    run.reporter.spikes = on_main(lambda: meter_at(folder.path, step, config.spikes.window))
    gaps = [one.gap for one in gone_back]
    run.reporter.epochs = lambda done: run.loader.order.epochs(data_step(done, gaps) * config.global_batch_size)
    return Parts(
        engine=run.engine,
        batches=run.loader.from_step(step, gaps),
        learning_rate=partial(learning_rate, config),
        reporter=run.reporter,
        hooks=_hooks(run, len(gone_back)),
        save=run.saver.save,
        settle=run.saver.settle,
        evaluate=run.evaluate,
        start_step=step,
        last_step=config.steps,
    )


def go_back(run: Run, spike: RollBack) -> Parts:
    """The parts from the newest checkpoint on, without the data since then. Communicates."""
    run.saver.settle()
    position = checkpoint.load(run.engine, run.folder.checkpoints)
    if position is None:
        raise DivergenceError(
            f"{spike}, and there is no checkpoint yet to go back to; lower optimizer.lr or save sooner"
        )
    if run.world.is_main:
        write_rollback(run.folder.path, PassedOver(position.step, spike.step, spike.score))
        run.folder.rewind(position.step, _next_position(run.config, run.folder, position.step))
        run.trackers.note(f"back to step {position.step}, past the data of {spike.step - position.step} steps")
    return parts_from(run, position.step)


def _next_position(config: RunConfig, folder: RunFolder, step: int) -> int:
    """Where the data of the step after `step` begins."""
    gaps = [one.gap for one in read_rollbacks(folder.path)]
    return data_step(step, gaps) * config.global_batch_size


def order_hash(config: RunConfig, fingerprint: str) -> str:
    """What fixes which sample stands at which position: the loader's fingerprint and the global batch."""
    return f"{fingerprint}-{config.global_batch_size}"


def _make_deterministic(config: RunConfig) -> None:
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


def _build_engine(
    config: RunConfig,
    model_config: ModelConfig,
    world: World,
    device: torch.device,
    folder: RunFolder,
    parent: Parent | None,
) -> Engine:
    """Every rank draws the same initial weights; afterwards each has random streams of its own."""
    torch.manual_seed(key_of(config.seed, "weights") >> 1)
    model = MultimodalTransformer.create(model_config, config.objectives)
    transfer = None if parent is None else start_from(parent, model, folder, world)
    if config.finetune is not None:
        prepare(model, config.finetune)
    if transfer is not None and world.is_main:
        warn_of_random_parts(model, transfer)
    nn.Module.to(model, device)
    engine = Engine(model, config, device)
    torch.manual_seed(key_of(config.seed, "rank", world.rank) >> 1)
    return engine


def _restore(config: RunConfig, engine: Engine, folder: RunFolder, world: World, fingerprint: str) -> int:
    """Load the newest valid checkpoint; returns the number of steps already done. Communicates."""
    if (url := upload_folder(config)) is not None:
        on_main(lambda: fetch_newest(url, folder.checkpoints))
    position = checkpoint.load(engine, folder.checkpoints)
    if position is None:
        return 0
    if position.data_hash != order_hash(config, fingerprint):
        raise CheckpointError(
            f"{folder.path} holds a run with another seed, global_batch_size or other data.train shards, so its order "
            f"of samples cannot go on; the config.yaml in its checkpoint has them: put them back, or choose another "
            f"output"
        )
    if world.is_main and position.wandb_id and not (folder.path / "wandb_id").exists():
        (folder.path / "wandb_id").write_text(position.wandb_id)
    if world.is_main:
        restore_rollbacks(folder.path, position.passed_over)
    log.info("continuing from step %d of %d", position.step, config.steps)
    return position.step


def _build_trackers(config: RunConfig, folder: RunFolder, attempt: int, start: int, world: World) -> Trackers:
    """The run's trackers on the main rank, none on the others."""
    if not world.is_main:
        return Trackers()
    facts = RunFacts(
        run_dir=folder.path,
        name=folder.path.name,
        experiment=folder.path.parent.name,
        attempt=attempt,
        total_steps=config.steps,
        start_step=start,
        global_batch=config.global_batch_size,
        config=config.model_dump(mode="json"),
        log_every=config.tracking.log_every,
    )
    return build_trackers(config.tracking.trackers, facts)


def _hooks(run: Run, rollbacks: int) -> list[Hook]:
    """In the order they run: what must be written before anything may stop the run comes first."""
    config, folder = run.config, run.folder
    shared: list[Hook] = [
        Do(run.saver.after_step),
        Do(run.ledger.add_report),
        StopOnDivergence(config.max_skipped_steps),
        WatchForSpikes(config.spikes, rollbacks, run.trackers.alert),
        Every(config.checkpoint.every, config.steps, Verdict.SAVE),
        Every(config.evaluation.every, config.steps, Verdict.EVALUATE),
        Requested(),
    ]
    if not run.world.is_main:
        return shared
    mine: list[Hook] = [
        Do(run.trackers.log),
        WriteSkippedSteps(folder.path / "skipped.jsonl"),
        RecordConsumed(folder.path / run_files.CONSUMED),
        Heartbeat(folder),
        Profile(folder),
        WarnBelow("train/target_std", COLLAPSED, "the teacher says the same of every patch; lower the rate"),
    ]
    if config.trace_samples:
        mine.append(TraceSamples(folder.path / "samples.jsonl"))
    return mine + shared
