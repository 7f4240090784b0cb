"""Training data: chat formats, tokenizer, chat template, packing, prepared folders.

Imports neither torch nor transformers: preparing the demo's data takes less time than importing them.
"""

from psyche_node.data.dataset import Batch, PackedDataset
from psyche_node.data.errors import BadSample, DataError, DataMismatch
from psyche_node.data.formats import Sample
from psyche_node.data.manifest import Manifest
from psyche_node.data.prepare import prepare
from psyche_node.data.samples import SampleFormat, Text, read_any, read_samples
from psyche_node.data.sources import DataFolders, build_data
from psyche_node.data.stdlib_chat import ChatCounts, build_stdlib_chat
from psyche_node.data.template import ChatTemplate
from psyche_node.data.tokenizer import train_tokenizer

__all__ = [
    "BadSample",
    "Batch",
    "ChatCounts",
    "ChatTemplate",
    "DataError",
    "DataFolders",
    "DataMismatch",
    "Manifest",
    "PackedDataset",
    "Sample",
    "SampleFormat",
    "Text",
    "build_data",
    "build_stdlib_chat",
    "prepare",
    "read_any",
    "read_samples",
    "train_tokenizer",
]
