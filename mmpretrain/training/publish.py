"""From a run folder to a published folder: the weights of its newest checkpoint and the facts it recorded.

Enter: a run, a target, a license. Leave: a verified folder. Refused: a run without checkpoint or record.
"""

import json
import subprocess
from pathlib import Path

from mmpretrain.core.errors import DataError
from mmpretrain.publishing.facts import ParentFacts, PublishFacts, SourceFacts
from mmpretrain.publishing.folder import Published, publish_model
from mmpretrain.tracking.record import Row, read_metrics
from mmpretrain.training.run_folder import RunFolder
from mmpretrain.training.trained import TrainedRun, open_trained


def publish_run(run: Path, out: Path, license_id: str, name: str | None = None) -> Published:
    """Write, verify and put in place; one process."""
    trained = open_trained(run)
    facts = run_facts(trained, license_id, name or out.name)
    return publish_model(trained.model, out, facts, trained.tokenizer, trained.config.data.codecs)


def run_facts(trained: TrainedRun, license_id: str, name: str) -> PublishFacts:
    """What the run folder recorded, up to the step of the weights."""
    evaluated = _last_evaluation(trained)
    return PublishFacts(
        name=name,
        license=license_id,
        steps=trained.position.step,
        samples_seen=trained.position.samples,
        run_config=trained.config.model_dump(mode="json"),
        sources=_sources(trained.run_dir),
        parent=_parent(trained.run_dir),
        evaluations=None if evaluated is None else evaluated.metrics,
        evaluated_at_step=None if evaluated is None else evaluated.step,
        hardware=_hardware(trained.run_dir),
        commit=_commit(),
    )


def _last_evaluation(trained: TrainedRun) -> Row | None:
    try:
        rows = read_metrics(trained.run_dir)
    except DataError:
        return None
    reached = [row for row in rows if not row.is_training and row.step <= trained.position.step]
    return reached[-1] if reached else None


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
