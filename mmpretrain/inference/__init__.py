"""A trained model at work: embeddings, search, classification, ONNX.

`load` takes a run folder, a checkpoint or a published folder; nothing of training is imported for the last.
"""

from mmpretrain.inference.model import Model
from mmpretrain.inference.opening import load
from mmpretrain.inference.processor import Processor

__all__ = ["Model", "Processor", "load"]
