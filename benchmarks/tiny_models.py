"""Tiny random models of any model type of transformers, and inputs for them.

The sizes of a default configuration are reduced by name. Not every combination of sizes is valid for every model, so
:func:`build` tries several and takes the first with which the model runs.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from attnzoo.benchmarks.weights import spread

VOCABULARY = 99
_LENGTH, _BATCH, _DECODER_LENGTH = 24, 2, 12
_HEADS = 4
_END = VOCABULARY - 5
_MOST_PARAMETERS = 20_000_000
_SIZES: Mapping[str, int] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "embed_dim", "dim", "embedding_size", "text_embed_dim"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_decoder_layers", "num_encoder_layers", "depth"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "num_attn_heads"), _HEADS),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), _HEADS),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "d_ff", "n_inner"), 32),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "q_lora_rank", "kv_lora_rank"), 16),
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), 8),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), VOCABULARY),
    **dict(num_experts_per_tok=2, max_position_embeddings=128, max_source_positions=64, max_target_positions=64),
    **dict(image_size=32, patch_size=8, projection_dim=16, num_mel_bins=16, sliding_window=8, local_attention=8),
}
_GROUPED = {"num_key_value_heads": 2}
_HEAD_DIM = {"head_dim": 8, "d_kv": 8}
_UNGROUPED = {"num_key_value_heads": _HEADS}
_VARIANTS: tuple[Mapping[str, int], ...] = (
    {**_SIZES, **_GROUPED, **_HEAD_DIM},
    {**_SIZES, **_UNGROUPED, **_HEAD_DIM},
    {**_SIZES, **_UNGROUPED},
    {**_SIZES, **_UNGROUPED, "hidden_size": 64, "intermediate_size": 64},
    {name: _SIZES[name] for name in ("num_hidden_layers", "vocab_size", "encoder_layers", "decoder_layers")},
)


@dataclass(frozen=True)
class Example:
    """A tiny model, and keyword arguments for its forward.

    Attributes:
        model: the model, in eval mode, with attention implementation ``eager``.
        inputs: keyword arguments of ``model.forward``. Tokens have no padding.
    """

    model: nn.Module
    inputs: Mapping[str, Any]

    def padded(self, side: str) -> dict[str, Any]:
        """Return the inputs with five padding tokens in the first sample, on the side ``left`` or ``right``."""
        ids: Tensor = self.inputs["input_ids"]
        mask = torch.ones_like(ids)
        mask[0, slice(0, 5) if side == "left" else slice(-5, None)] = 0
        return {**self.inputs, "attention_mask": mask}

    @property
    def has_padding(self) -> bool:
        """Whether the model takes tokens and a padding mask."""
        names = inspect.signature(self.model.forward).parameters
        return "input_ids" in self.inputs and "attention_mask" in names


def build(model_type: str, auto_class: Any = None) -> Example:
    """Return a tiny model of a model type, with spread random weights.

    Args:
        model_type: a model type of transformers.
        auto_class: a class such as ``AutoModelForCausalLM``. None means ``AutoModel``.

    Raises:
        ValueError: no combination of sizes gives a model that runs. The message has the first reason.
    """
    from transformers import CONFIG_MAPPING, AutoModel

    reasons = []
    for variant in _VARIANTS:
        try:
            config = CONFIG_MAPPING[model_type](**_shrunk(CONFIG_MAPPING[model_type](), variant))
            return _build(config, auto_class or AutoModel)
        except Exception as error:  # models and configurations raise anything
            reasons.append(f"{type(error).__name__}: {error}".partition("\n")[0][:160])
    raise ValueError(f"{model_type}: {reasons[0]}")


def _shrunk(config: Any, sizes: Mapping[str, int]) -> dict[str, Any]:
    """Return keyword arguments for the class of ``config`` that reduce the sizes, also in configurations inside."""
    from transformers import PretrainedConfig

    values = {name: getattr(config, name, None) for name in sizes}
    changes: dict[str, Any] = {name: sizes[name] for name, value in values.items() if type(value) is int}
    changes |= {name: _shrunk(part, sizes) for name, part in vars(config).items() if isinstance(part, PretrainedConfig)}
    for name, value in vars(config).items():
        if name.endswith("_token_id") and type(value) is int and value >= VOCABULARY:
            changes[name] = _END if name == "eos_token_id" else 2
    kinds = getattr(config, "layer_types", None)
    if isinstance(kinds, list):
        changes["layer_types"] = (list(dict.fromkeys(kinds)) * 2)[:2]
    return changes


def _build(config: Any, auto_class: Any) -> Example:
    # Grouped matrix products of experts do not support float64.
    arguments = dict(attn_implementation="eager", experts_implementation="eager")
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in auto_class.from_config(config, **arguments).parameters())
    if count > _MOST_PARAMETERS:
        raise ValueError(f"{count} parameters")
    torch.manual_seed(0)
    model = auto_class.from_config(config, **arguments).eval()
    spread(model)
    error: Exception | None = None
    for inputs in _candidate_inputs(model, config):
        try:
            with torch.no_grad():
                model(**inputs)
            return Example(model, inputs)
        except Exception as raised:
            error = error or raised
    raise error or ValueError("no inputs")


def _candidate_inputs(model: Any, config: Any) -> Iterator[dict[str, Any]]:
    """Yield inputs: tokens alone if the model takes tokens, then everything that the forward accepts."""
    names = inspect.signature(model.forward).parameters
    vision = getattr(config, "vision_config", config)
    size, channels = getattr(vision, "image_size", 32), getattr(vision, "num_channels", 3)
    size = size if isinstance(size, int) else 32
    frames = 2 * (getattr(config, "max_source_positions", None) or 64)
    bins = getattr(config, "num_mel_bins", None) or getattr(config, "feature_size", None) or 16
    tokens = torch.randint(5, VOCABULARY - 9, (_BATCH, _LENGTH))
    tokens[:, _LENGTH // 2] = _END  # some models return the state of the end of text, which must not be padding
    text = {"input_ids": tokens, "decoder_input_ids": tokens[:, :_DECODER_LENGTH].clone()}
    other = {
        "pixel_values": torch.randn(_BATCH, channels or 3, size, size),
        "input_features": torch.randn(_BATCH, bins, frames),
        "input_values": torch.randn(_BATCH, 2000),
        "bbox": torch.randint(0, 30, (_BATCH, _LENGTH, 4)),
    }
    common = {"use_cache": False} if "use_cache" in names else {}
    for given in ({**text, **other}, text, other):
        chosen = {name: value for name, value in given.items() if name in names}
        if chosen:
            yield {**chosen, **common}
