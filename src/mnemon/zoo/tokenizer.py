"""The bundled model's tokenizer: byte-level BPE, so that any text survives a round trip.

Recall tasks are written in *words*: tokens that are one space and a few lower-case
letters. A sequence of words is tokenised back into the same tokens, whatever its order.
"""

from __future__ import annotations

import string
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

VOCAB_SIZE = 4096
BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '# ' + message['role'] + ': ' + message['content'] + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '# assistant:' }}{% endif %}"
)
_LETTERS = frozenset(string.ascii_lowercase)


def train_tokenizer(
    texts: Iterable[str], *, vocab_size: int = VOCAB_SIZE, context: int = 4096
) -> PreTrainedTokenizerBase:
    """Learn a byte-level BPE with three special tokens and a minimal chat template.

    Args:
        texts: the training documents (never the held-out ones).
        vocab_size: tokens in all, the special ones included.
        context: the longest sequence of the model, tokens.

    Returns:
        A tokenizer whose ``save_pretrained`` output loads with ``AutoTokenizer``.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    make: Any = PreTrainedTokenizerFast
    tokenizer: PreTrainedTokenizerBase = make(
        tokenizer_object=core,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=context,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )
    return tokenizer


def word_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of the words that recall tasks are written in, ascending.

    A word is a single token that reads as one space and two to ten lower-case letters.
    """
    found = []
    for token_id in range(len(tokenizer)):
        text = tokenizer.decode([token_id])
        if text[:1] == " " and 2 <= len(text) - 1 <= 10 and set(text[1:]) <= _LETTERS:
            found.append(token_id)
    return found
