"""A byte-level BPE tokenizer trained on the data itself, for models that start from nothing.

Sources: byte-level BPE as GPT-2 defined it; the chat layout is Llama 3's headers, which Hermes 4 uses, too.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from psyche_node.data.errors import DataError
from psyche_node.data.files import write_atomically
from psyche_node.data.formats import Sample
from psyche_node.data.samples import Text, read_any
from psyche_node.data.skipping import Bad, refuse
from psyche_node.folder_files import CONFIG, TEMPLATE, TOKENIZER

BOS, EOS, PAD = "<|begin_of_text|>", "<|eot_id|>", "<|finetune_right_pad_id|>"
SPECIAL = (BOS, EOS, PAD, "<|start_header_id|>", "<|end_header_id|>", "<think>", "</think>")
"""The control tokens of a tokenizer that is trained here."""
_BYTES = 256

# Hermes 4 splits text as Llama 3 does: words, numbers of up to three digits, punctuation, line feeds.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)

CHAT_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {%- if message['role'] == 'assistant' %}
        {%- generation %}
            {{- message['content'] + eos_token }}
        {%- endgeneration %}
    {%- else %}
        {{- message['content'] + eos_token }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""


def train_tokenizer(files: Path | Sequence[Path], vocabulary: int, folder: Path, bad: Bad = refuse) -> int:
    """Train on the contents of data files and write a folder that ``AutoTokenizer.from_pretrained`` loads.

    The same files and vocabulary give the same bytes, whatever the number of threads. Returns the number of tokens,
    which is smaller than ``vocabulary`` where the text has too few different pairs.

    Raises:
        BadSample: a record is not a sample, and ``bad`` does not pass over it.
        DataError: a file cannot be read, or the vocabulary cannot hold the 256 bytes and the special tokens.
    """
    least = _BYTES + len(SPECIAL)
    if vocabulary < least:
        raise DataError(
            f"a vocabulary of {vocabulary} is too small: bytes and special tokens are {least}. Ask for more"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        min_frequency=2,
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts([files] if isinstance(files, Path) else files, bad), trainer)
    config = {
        "backend": "tokenizers",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "clean_up_tokenization_spaces": False,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    write_atomically(folder / TOKENIZER, tokenizer.to_str(pretty=False).encode())
    write_atomically(folder / CONFIG, (json.dumps(config, indent=2) + "\n").encode())
    write_atomically(folder / TEMPLATE, CHAT_TEMPLATE.encode())
    return int(tokenizer.get_vocab_size())


def _texts(files: Sequence[Path], bad: Bad) -> Iterator[str]:
    for sample in chain.from_iterable(read_any(path, bad=bad) for path in files):
        if isinstance(sample, Sample):
            for message in sample.messages:
                yield message["content"]
        elif isinstance(sample, Text):
            yield sample.text
