"""The errors a user can meet, each with the exit code a shell or scheduler sees.

Enter: a message that says what was seen, what was expected and what to do.
Leave: one line on stderr and `exit_code`; never a traceback.
"""


class MMPretrainError(Exception):
    """Base of every error whose message is written for the user."""

    exit_code = 1


class ConfigError(MMPretrainError):
    """The configuration or the command line is at fault."""

    exit_code = 2


class DataError(MMPretrainError):
    """Shards, members or a manifest are missing, damaged or unsafe."""

    exit_code = 3


class ClusterError(MMPretrainError):
    """Ranks, nodes, devices or the scheduler are not as the run needs them."""

    exit_code = 4


class CheckpointError(MMPretrainError):
    """A checkpoint is missing, damaged or belongs to another model."""

    exit_code = 5


class Preempted(MMPretrainError):
    """The run was asked to stop, saved a checkpoint and can be continued."""

    exit_code = 75


class SampleError(Exception):
    """One sample cannot be used; it is counted in the ledger and replaced, the run goes on."""


class AbsentError(SampleError):
    """A sample holds nothing of a modality; it cannot be used where the modality is required."""


class DivergenceError(MMPretrainError):
    """Losses or gradients stay non-finite; going on would waste the allocation."""
