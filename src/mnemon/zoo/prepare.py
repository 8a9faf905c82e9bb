"""What a run needs before its first step: a tokenizer, the text's ids, the tasks' vocabulary."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mnemon.zoo import corpus, tasks
from mnemon.zoo.tokenizer import train_tokenizer, word_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def task_vocabulary(tokenizer: PreTrainedTokenizerBase) -> tasks.TaskVocabulary:
    """The ids the task generators write with, taken from the public tokenizer."""

    def encode(text: str) -> list[int]:
        return list(tokenizer(text)["input_ids"])

    return tasks.TaskVocabulary(
        words=np.asarray(word_ids(tokenizer)),
        ordinary=np.arange(3, len(tokenizer)),
        marker=tuple(encode("\n@")),
        separator=tuple(encode(" =")),
        newline=encode("\n")[0],
        bos=int(tokenizer.bos_token_id),
    )


def prepare(out: Path, *, seed: int) -> tuple[PreTrainedTokenizerBase, tasks.Ids]:
    """Learn or reload the tokenizer and the training text's ids.

    Args:
        out: the run's folder; ``tokenizer/`` and ``text.npy`` are kept there.
        seed: the order of the documents.

    Returns:
        The tokenizer and the ids of all training documents, each opened by ``<|bos|>``.
    """
    from transformers import AutoTokenizer

    text_path = out / "text.npy"
    if text_path.exists():
        return AutoTokenizer.from_pretrained(out / "tokenizer"), np.load(text_path).astype(np.int64)
    documents = corpus.load_documents()
    train, _ = corpus.split(documents)
    tokenizer = train_tokenizer(document.text for document in train)
    tokenizer.save_pretrained(out / "tokenizer")
    order = np.random.default_rng([seed, 7]).permutation(len(train))
    ids: list[int] = []
    for index in order:
        ids.append(int(tokenizer.bos_token_id))
        ids.extend(tokenizer(train[index].text, verbose=False)["input_ids"])
    text = np.asarray(ids, dtype=np.uint16)
    np.save(text_path, text)
    (out / "corpus.json").write_text(
        json.dumps(corpus.summarise(documents)._asdict() | {"train_tokens": len(text)}, indent=1)
    )
    return AutoTokenizer.from_pretrained(out / "tokenizer"), text.astype(np.int64)
