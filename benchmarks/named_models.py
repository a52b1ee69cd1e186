"""Load a model by its name on the command line: a family of the benchmark, or the folder of a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from attnzoo.benchmarks.models import WORKLOADS
from attnzoo.benchmarks.text import read_tokens
from attnzoo.errors import InvalidArgumentError, UnknownNameError

# Two layers contain every kind of attention of a family. More layers would make the dense oracle too slow.
LAYERS = 2


def load_model(name: str) -> nn.Module:
    """Return a model in eval mode.

    ``name`` is a family of the benchmark, or the folder of a checkpoint that ``save_pretrained`` wrote. The model of a
    family has the published configuration with fewer layers, and random weights.
    """
    if name in WORKLOADS:
        return WORKLOADS[name].build(layers=LAYERS)
    if not Path(name).is_dir():
        raise UnknownNameError("model", name, WORKLOADS, also="the folder of a checkpoint on this machine")
    import transformers

    allowed = "the folder of a checkpoint that save_pretrained wrote"
    logging = transformers.utils.logging
    had_progress_bar = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # the caller shows its own progress bar, or writes to a file
    try:
        config = transformers.AutoConfig.from_pretrained(name)
        if config.architectures:
            return getattr(transformers, config.architectures[0]).from_pretrained(name).eval()
    except Exception as error:  # transformers, safetensors and torch raise many types for damaged files
        raise InvalidArgumentError("model", f"{name!r}: {type(error).__name__}: {error}", allowed) from error
    finally:
        if had_progress_bar:
            logging.enable_progress_bar()
    raise InvalidArgumentError("model", f"{name!r}, whose config.json names no architecture", allowed)


def load_with_passages(
    name: str, seq_len: int, passages: int, dtype: torch.dtype | None = None
) -> tuple[nn.Module, list[dict[str, Any]]]:
    """Return a model, and one dict of forward arguments for each passage of real text.

    For a checkpoint, the token ids are the bytes of the text, because the folder may contain no tokenizer. If ``dtype``
    is None, the weights keep the dtype of the family or of the checkpoint.
    """
    if name in WORKLOADS and (too_long := WORKLOADS[name].too_long(seq_len)):
        raise InvalidArgumentError("seq-len", seq_len, f"a smaller number, because {too_long}")
    model: Any = load_model(name)
    if dtype is not None:
        model = model.to(dtype)
    if name in WORKLOADS:
        return model, _split(WORKLOADS[name].read(passages, seq_len).kwargs, passages)
    tokens = read_tokens(passages, seq_len, 0) % model.config.vocab_size
    batch = {"input_ids": tokens, "attention_mask": tokens.new_ones(tokens.shape)}
    if model.config.is_encoder_decoder:
        batch["decoder_input_ids"] = tokens[:, :64]
    inputs = _split(batch, passages)
    # Configurations have many names for the maximum length. So a forward tests whether the length is allowed.
    try:
        with torch.no_grad():
            model(**inputs[0])
    except Exception as error:
        got = f"{seq_len}, for which {type(model).__name__} itself raises {type(error).__name__}: {error}"
        raise InvalidArgumentError("seq-len", got, "a length for which the unpatched model runs") from error
    return model, inputs


def _split(batch: dict[str, Any], passages: int) -> list[dict[str, Any]]:
    return [
        {name: value[n : n + 1] if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
        for n in range(passages)
    ]
