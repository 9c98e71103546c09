"""The weights a fine-tuning run begins with, and the record of where they came from.

Enter: a run config with a `finetune` part. Leave: a `Parent` for a run that begins, none for one that continues from
its own checkpoint; `parent.json` in the run folder. Refused: no parent, one whose weights fit nowhere, a run folder
that began from another.
"""

import hashlib
import logging
from dataclasses import asdict
from pathlib import Path

from mmpretrain.config import RunConfig
from mmpretrain.core.errors import CheckpointError, ConfigError
from mmpretrain.core.ranks import World
from mmpretrain.core.run_files import saved_checkpoints
from mmpretrain.models.multimodal import MultimodalTransformer
from mmpretrain.models.parent import Parent, open_pretrained
from mmpretrain.models.transfer import Transfer, take_over
from mmpretrain.publishing.facts import ParentFacts
from mmpretrain.training.ranks import first_on_main, on_main
from mmpretrain.training.run_folder import RunFolder
from mmpretrain.training.trained import is_checkpoint, is_run, open_trained

log = logging.getLogger(__name__)


def find_parent(config: RunConfig, folder: RunFolder) -> Parent | None:
    """What the run begins from; None where nothing is to be taken over. Communicates."""
    if config.finetune is None:
        return None
    name = config.finetune.parent
    if name is None:
        raise ConfigError(
            "the run has a finetune part and nothing to start from; give --from CHECKPOINT to `mmpretrain finetune`, "
            "or set finetune=null to train from scratch"
        )
    if on_main(lambda: _continues(folder, name)):
        return None
    return open_parent(name, config)


def open_parent(name: str, config: RunConfig) -> Parent:
    """A run folder, a checkpoint or a published folder of ours, or a model of transformers. Communicates."""
    path = Path(name)
    if on_main(lambda: is_run(path) or is_checkpoint(path)):
        trained = open_trained(path)
        return Parent(
            source=name,
            description=f"step {trained.position.step} of an mmpretrain run",
            towers=trained.model.config.parsed_model().towers,
            weights=trained.model.state_dict(),
            tokenizer=None if trained.tokenizer is None else str(trained.tokenizer),
        )
    return first_on_main(lambda: open_pretrained(name, config.model.towers))


def start_from(parent: Parent, model: MultimodalTransformer, folder: RunFolder, world: World) -> Transfer:
    """Put the parent's weights into the model; the main rank tells what became of each, and writes it down."""
    transfer = take_over(model, parent)
    if world.is_main:
        log.info("weights from %s (%s), in values:\n%s", parent.source, parent.description, transfer.table())
        facts = ParentFacts(parent.source, parent.description, _digest(parent))
        accounts = {
            part: asdict(account) | {"notes": list(account.notes)} for part, account in transfer.accounts.items()
        }
        folder.write_parent(asdict(facts) | {"weights": accounts})
    return transfer


def warn_of_random_parts(model: MultimodalTransformer, transfer: Transfer) -> None:
    """Of a model whose frozen parts are chosen."""
    for part, values in sorted(transfer.never_learned(model).items()):
        log.warning(
            "%s: %s values are frozen that %s does not have, so they stay random; give the tower the parent's "
            "architecture, or let it learn (finetune.towers)",
            part,
            f"{values:,}",
            transfer.parent.source,
        )


def _continues(folder: RunFolder, name: str) -> bool:
    """Whether the folder holds a run that goes on; it must have begun from the same parent."""
    if not saved_checkpoints(folder.checkpoints):
        return False
    began = folder.read_parent()
    if began is None or began["source"] != name:
        raise CheckpointError(
            f"{folder.path} holds a run that began from {'scratch' if began is None else began['source']}, not from "
            f"{name}; choose another output, or name what it began from to go on"
        )
    return True


def _digest(parent: Parent) -> str:
    """Sixteen hex digits that change with any weight."""
    digest = hashlib.sha256()
    for name, tensor in sorted(parent.weights.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().data)
    return digest.hexdigest()[:16]
