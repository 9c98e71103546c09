"""What goes wrong where weights are read that somebody else wrote: garbage, no tensors, pickles that would run code."""

from pickle import UnpicklingError

from safetensors import SafetensorError

UNREADABLE = (OSError, SafetensorError, UnpicklingError, RuntimeError, EOFError, ValueError, LookupError, TypeError)
"""Raised by torch.load, safetensors and transformers for garbage; `weights_only` makes code in a pickle one of them."""


def first_line(error: BaseException) -> str:
    """What an error says first."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
