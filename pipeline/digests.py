"""Digests of what a run starts from (weights, tokenizers, rows), by which a resumed run knows them again.

A digest is the same in every process and on every device, for any number of processes and any backend.
"""

import hashlib
import json
from pathlib import Path

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

# Hexadecimal digits of a digest that are kept.
LENGTH = 16


def text_digest(*texts: str) -> str:
    """Digest of texts, in their order."""
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:LENGTH]


def weights_digest(path: str | Path) -> str:
    """Digest of a local model's safetensors files; the name itself for a model of the hub."""
    files = sorted(Path(path).glob("*.safetensors"))
    if not files:
        return str(path)
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()[:LENGTH]


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Digest of a tokenizer's vocabulary, special tokens and chat template."""
    parts = (sorted(tokenizer.get_vocab().items()), tokenizer.special_tokens_map, tokenizer.chat_template)
    return text_digest(json.dumps(parts, sort_keys=True, default=str))


def rows_digest(dataset: Dataset) -> str:
    """Digest of the content of all rows and columns; `datasets`' own fingerprint changes from start to start."""
    digest = hashlib.sha256(json.dumps(dataset.column_names).encode())
    # As Arrow has them, so that images and sounds are not decoded.
    for table in dataset.with_format("arrow").iter(1000):
        digest.update(json.dumps(table.to_pylist(), default=str).encode())
    return digest.hexdigest()[:LENGTH]
