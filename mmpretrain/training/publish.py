"""From a run folder to a published folder: the weights of its newest checkpoint and the facts it recorded.

Enter: a run, a target, a license. Leave: a verified folder. Refused: a run without checkpoint or record.
"""

import json
import subprocess
from collections.abc import Mapping
from pathlib import Path

from mmpretrain.core.errors import DataError
from mmpretrain.publishing.facts import ParentFacts, PublishFacts, SourceFacts
from mmpretrain.publishing.folder import Published, publish_model
from mmpretrain.tracking.record import read_metrics
from mmpretrain.training.run_folder import RunFolder
from mmpretrain.training.trained import TrainedRun, open_trained

Evaluated = tuple[Mapping[str, float], int]
"""Figures by name, and the step of the weights that were measured."""


def publish_run(run: Path, out: Path, license_id: str, name: str | None = None, averaged: bool = False) -> Published:
    """Write, verify and put in place; one process. `averaged` takes the moving average of the weights."""
    trained = open_trained(run, averaged=averaged)
    facts = run_facts(trained, license_id, name or out.name)
    return publish_model(trained.model, out, facts, trained.tokenizer, trained.config.data.codecs)


def run_facts(trained: TrainedRun, license_id: str, name: str) -> PublishFacts:
    """What the run folder recorded, up to the step of the weights."""
    evaluated = _last_evaluation(trained)
    decay = None if trained.config.ema is None or not trained.averaged else trained.config.ema.decay
    return PublishFacts(
        name=name,
        license=license_id,
        steps=trained.position.step,
        samples_seen=trained.position.samples,
        run_config=trained.config.model_dump(mode="json"),
        sources=_sources(trained.run_dir),
        parent=_parent(trained.run_dir),
        evaluations=None if evaluated is None else evaluated[0],
        evaluated_at_step=None if evaluated is None else evaluated[1],
        hardware=_hardware(trained.run_dir),
        commit=_commit(),
        average_decay=decay,
    )


def _last_evaluation(trained: TrainedRun) -> Evaluated | None:
    """What was last measured of these weights; of an average, by `mmpretrain eval --ema` at its step."""
    if trained.averaged:
        return _last_of_average(trained)
    try:
        rows = read_metrics(trained.run_dir)
    except DataError:
        return None
    reached = [row for row in rows if not row.is_training and row.step <= trained.position.step]
    return (reached[-1].metrics, reached[-1].step) if reached else None


def _last_of_average(trained: TrainedRun) -> Evaluated | None:
    path = trained.run_dir / "evals.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    here = [row for row in rows if row["step"] == trained.position.step and row.get("averaged")]
    if not here:
        return None
    return {name: value for name, value in here[-1].items() if "/" in name}, trained.position.step


def _sources(run_dir: Path) -> tuple[SourceFacts, ...]:
    path = run_dir / "data.json"
    return tuple(SourceFacts(**fields) for fields in json.loads(path.read_text())) if path.exists() else ()


def _parent(run_dir: Path) -> ParentFacts | None:
    record = RunFolder(run_dir).read_parent()
    if record is None:
        return None
    return ParentFacts(*(str(record[name]) for name in ("source", "description", "digest")))


def _hardware(run_dir: Path) -> str | None:
    path = run_dir / "attempts.jsonl"
    if not path.exists():
        return None
    last = json.loads(path.read_text().splitlines()[-1])
    return f"{last['ranks']} ranks on {last['device']}"


def _commit() -> str | None:
    """Commit of the checkout that this code runs from; None for an installed copy."""
    checkout = Path(__file__).resolve().parents[2]
    if not (checkout / ".git").exists():
        return None
    done = subprocess.run(
        ["git", "-C", str(checkout), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or None
