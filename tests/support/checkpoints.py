"""The trained checkpoints under ``tests/checkpoints``, and text as their inputs."""

import torch
import transformers

from tests.checkpoints.train import HERE, RECIPES, tokens


def load(family, dtype=torch.float32, **options):
    """The checkpoint of a family, in eval mode; ``options`` are keywords of ``from_pretrained``."""
    return getattr(transformers, RECIPES[family].cls).from_pretrained(HERE / family, dtype=dtype, **options).eval()


def passage(family, number=0, length=96, padded=False):
    """Inputs for a family: one passage of text; with ``padded``, two, of which the last quarter of one is padding."""
    batch = 2 if padded else 1
    text = tokens(True)[number * length : (number + batch) * length].reshape(batch, length)
    inputs = {"input_ids": text}
    if RECIPES[family].inputs(text)["input_ids"].shape != text.shape:  # an encoder-decoder
        inputs["decoder_input_ids"] = text[:, : length // 3]
    if family == "led":
        inputs["global_attention_mask"] = torch.zeros_like(text)
        inputs["global_attention_mask"][:, 0] = 1
    inputs["attention_mask"] = torch.ones_like(text)
    if padded:
        inputs["attention_mask"][1, -length // 4 :] = 0
    return inputs
