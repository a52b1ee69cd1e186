"""The tokenizer of the checkpoints: byte ``b`` is token ``b + 3``; 0 begins a text, 1 is padding, 2 ends a text.

    python -m tests.checkpoints.tokenizer

writes it into the folder of every checkpoint.
"""

from __future__ import annotations

import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers.convert_slow_tokenizer import bytes_to_unicode

from tests.checkpoints.train import HERE, OFFSET, RECIPES


def byte_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Return the tokenizer. It adds no special tokens to a text."""
    specials = {"<s>": 0, "<pad>": 1, "</s>": 2}
    # Byte-level tokenizers write each byte as a printable character.
    tokens = {character: byte + OFFSET for byte, character in bytes_to_unicode().items()}
    tokenizer = Tokenizer(models.BPE(vocab={**specials, **tokens}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        pad_token="<pad>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
    )


if __name__ == "__main__":
    for family in RECIPES:
        byte_tokenizer().save_pretrained(HERE / family)
