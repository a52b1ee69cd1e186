"""Models by name for the command line: a family of the shootout, or a checkpoint on disk, with real text to read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from attnzoo.benchmarks.models import WORKLOADS
from attnzoo.benchmarks.text import read_tokens
from attnzoo.errors import InvalidArgumentError, UnknownNameError

# Layers a family is verified with: two show every kind of attention it has, and the dense oracle stays affordable.
LAYERS = 2


def subject(name: str, seq_len: int) -> tuple[nn.Module, dict[str, Any]]:
    """A model and forward arguments of ``seq_len`` tokens of real text.

    Args:
        name: a family of the shootout (published configuration with fewer layers, random spread weights), or the folder
            of a checkpoint that ``save_pretrained`` wrote, which reads the text as bytes.
        seq_len: tokens.

    Raises:
        UnknownNameError: neither a family nor a folder.
        InvalidArgumentError: a folder without a checkpoint, or more tokens than the family has positions for.
    """
    if name not in WORKLOADS:
        if not Path(name).is_dir():
            raise UnknownNameError("model", name, WORKLOADS, also="the folder of a checkpoint on this machine")
        return _checkpoint(Path(name), seq_len)
    workload = WORKLOADS[name]
    too_long = workload.obstacle(seq_len, train=False)
    if too_long is not None:
        raise InvalidArgumentError("seq-len", seq_len, f"less: {too_long}")
    return workload.build(layers=LAYERS), workload.read(1, seq_len).kwargs


def _checkpoint(folder: Path, seq_len: int) -> tuple[nn.Module, dict[str, Any]]:
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(folder)
        model = getattr(transformers, config.architectures[0]).from_pretrained(folder)
    except (OSError, ValueError, AttributeError, TypeError, IndexError) as error:
        allowed = "the folder of a checkpoint that save_pretrained wrote"
        raise InvalidArgumentError("model", f"{str(folder)!r}: {type(error).__name__}: {error}", allowed) from error
    tokens = read_tokens(1, seq_len, 0) % config.vocab_size
    inputs = {"input_ids": tokens, "attention_mask": tokens.new_ones(tokens.shape)}
    if config.is_encoder_decoder:
        inputs["decoder_input_ids"] = tokens[:, :64]
    return model.eval(), inputs
