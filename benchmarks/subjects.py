"""Models by name for the command line: a family of the shootout, or a checkpoint on disk, with real text to read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from attnzoo.benchmarks.models import WORKLOADS
from attnzoo.benchmarks.text import read_tokens
from attnzoo.errors import InvalidArgumentError, UnknownNameError

# Layers a family is verified with: two show every kind of attention it has, and the dense oracle stays affordable.
LAYERS = 2


def load(name: str) -> nn.Module:
    """A model in eval mode.

    Args:
        name: a family of the shootout (published configuration with fewer layers, random spread weights), or the folder
            of a checkpoint that ``save_pretrained`` wrote.

    Raises:
        UnknownNameError: neither a family nor a folder.
        InvalidArgumentError: a folder without a checkpoint that loads.
    """
    if name in WORKLOADS:
        return WORKLOADS[name].build(layers=LAYERS)
    if not Path(name).is_dir():
        raise UnknownNameError("model", name, WORKLOADS, also="the folder of a checkpoint on this machine")
    import transformers

    allowed = "the folder of a checkpoint that save_pretrained wrote"
    bars = transformers.utils.logging
    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()  # what calls this has a bar to show, or writes to a file
    try:
        config = transformers.AutoConfig.from_pretrained(name)
        if config.architectures:
            return getattr(transformers, config.architectures[0]).from_pretrained(name).eval()
    except Exception as error:  # of transformers, safetensors, torch: whatever is wrong with the files
        raise InvalidArgumentError("model", f"{name!r}: {type(error).__name__}: {error}", allowed) from error
    finally:
        if shown:
            bars.enable_progress_bar()
    raise InvalidArgumentError("model", f"{name!r}, whose config.json names no architecture", allowed)


def subject(name: str, seq_len: int) -> tuple[nn.Module, dict[str, Any]]:
    """A model and forward arguments of ``seq_len`` tokens of real text, which checkpoints read as bytes.

    Raises:
        UnknownNameError, InvalidArgumentError: as :func:`load`; or more tokens than the model has positions for.
    """
    model, (inputs,) = subject_with_passages(name, seq_len, 1)
    return model, inputs


def subject_with_passages(
    name: str, seq_len: int, passages: int, dtype: torch.dtype | None = None
) -> tuple[nn.Module, list[dict[str, Any]]]:
    """A model and forward arguments of several passages of real text, one after the other.

    Args:
        name: as for :func:`load`.
        seq_len: tokens of a passage.
        passages: how many.
        dtype: of the weights; None: as they are built or stored.

    Raises:
        UnknownNameError, InvalidArgumentError: as for :func:`subject`.
    """
    if name in WORKLOADS:
        too_long = WORKLOADS[name].beyond(seq_len)
        if too_long is not None:
            raise InvalidArgumentError("seq-len", seq_len, f"less: {too_long}")
        return _in_dtype(load(name), dtype), _apart(WORKLOADS[name].read(passages, seq_len).kwargs, passages)
    model: Any = _in_dtype(load(name), dtype)
    tokens = read_tokens(passages, seq_len, 0) % model.config.vocab_size
    together = {"input_ids": tokens, "attention_mask": tokens.new_ones(tokens.shape)}
    if model.config.is_encoder_decoder:
        together["decoder_input_ids"] = tokens[:, :64]
    inputs = _apart(together, passages)
    try:
        with torch.no_grad():
            model(**inputs[0])
    except Exception as error:  # configurations have many names for how many positions there are
        got = f"{seq_len}, on which {type(model).__name__} itself raises {type(error).__name__}: {error}"
        raise InvalidArgumentError("seq-len", got, "a length that the model itself takes") from error
    return model, inputs


def _in_dtype(model: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    return model if dtype is None else model.to(dtype)


def _apart(inputs: dict[str, Any], passages: int) -> list[dict[str, Any]]:
    """The inputs of each passage of a batch."""
    return [
        {name: value[n : n + 1] if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}
        for n in range(passages)
    ]
