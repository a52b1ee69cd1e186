"""A tiny LED or GPT-NeoX with inputs and the names of its attention modules, and a check that it is unchanged."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attnzoo
from tests.support.compare import is_close
from tests.support.models import VOCAB, gpt_neox, led, spread

REMOVALS = {"handle": lambda handle, model: handle.remove(), "model": lambda handle, model: attnzoo.unpatch(model)}
removals = pytest.mark.parametrize("remove", REMOVALS.values(), ids=REMOVALS)
_SIZES = {
    "led": dict(
        d_model=16, decoder_layers=1, decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24,
        attention_window=[4, 8], max_encoder_position_embeddings=64, max_decoder_position_embeddings=32,
    ),
    "gpt_neox": dict(hidden_size=16, intermediate_size=24, max_position_embeddings=64),
}  # fmt: skip


def inputs_of(kind):
    """Return inputs with padding on either side; for LED with two, one and no global tokens."""
    length, random = (21 if kind == "led" else 11), torch.Generator().manual_seed(7)
    tokens, mask = torch.randint(3, VOCAB, (3, length), generator=random), torch.ones(3, length, dtype=torch.long)
    mask[1, : length // 4], mask[2, -(length // 4) :] = 0, 0
    inputs = dict(input_ids=tokens, attention_mask=mask)
    if kind == "led":
        inputs["global_attention_mask"] = torch.zeros_like(mask)
        inputs["global_attention_mask"][[0, 1, 1], [0, 7, 12]] = 1
        inputs["decoder_input_ids"] = torch.randint(3, VOCAB, (3, 6), generator=random)
    return inputs


@dataclass(eq=False)
class Subject:
    """A model, inputs with padding, and the names of its attention modules."""

    kind: str
    model: Any = field(repr=False)
    inputs: dict[str, Tensor] = field(repr=False)
    sites: tuple[str, ...]
    attentions: int  # attentions computed per forward: LED's encoder computes one more for its global tokens

    def logits(self, model: nn.Module | None = None, **more: Any) -> Tensor:
        with torch.no_grad():
            return (self.model if model is None else model)(**{**self.inputs, **more}).logits

    def module(self, number: int = 0) -> nn.Module:
        return self.model.get_submodule(self.sites[number])

    def close(self, got: Tensor, expected: Tensor) -> bool:
        """Whether logits of real tokens differ by float32 rounding only. (All decoder tokens of LED are real.)"""
        if self.kind == "gpt_neox":
            real = self.inputs["attention_mask"].bool()
            got, expected = got[real], expected[real]
        return is_close(got, expected)


def build_subject(kind: str, config: Any = None, seed: int = 1, **changes: Any) -> Subject:
    """Build a model with spread weights, or with ``config`` a model that has this configuration object."""
    model = (led if kind == "led" else gpt_neox)(**_SIZES[kind], **changes)
    if config is not None:
        model = type(model)(config)
    if kind == "led":
        encoder = tuple(f"led.encoder.layers.{n}.self_attn.longformer_self_attn" for n in range(2))
        sites = (*encoder, "led.decoder.layers.0.self_attn", "led.decoder.layers.0.encoder_attn")
    else:
        sites = tuple(f"gpt_neox.layers.{n}.attention" for n in range(2))
    return Subject(kind, spread(model, seed), inputs_of(kind), sites, attentions=6 if kind == "led" else 2)


def calls(handle):
    """Return how many attentions ran at each site."""
    return {site.name: site.calls for site in handle.sites}


def mask_with_hole(neox):
    """Return a mask that is more than causality and padding: only the third query sees the third key."""
    length = neox.inputs["input_ids"].shape[1]
    grid = torch.ones(length, length, dtype=torch.bool).tril()
    grid[3:, 2] = False
    return dict(attention_mask=grid.expand(3, 1, -1, -1))


class Snapshot:
    """The state of a model, to assert later that nothing has changed."""

    def __init__(self, subject: Subject) -> None:
        self.subject, self.logits, self.before = subject, subject.logits(), _state_of(subject)
        self.state = {name: tensor.clone() for name, tensor in subject.model.state_dict().items()}

    def assert_unchanged(self, patched: bool = False) -> None:
        """Assert that nothing differs; with ``patched``, except forwards, attributes of sites, and roundings."""
        now = _state_of(self.subject)
        for what, before in self.before.items():
            assert now[what] == before or (patched and what in ("attributes", "forwards")), f"{what} changed"
        state = self.subject.model.state_dict()
        assert list(state) == list(self.state)
        assert all(torch.equal(tensor, self.state[name]) for name, tensor in state.items())
        assert patched or torch.equal(self.subject.logits(), self.logits)


def _state_of(subject):
    model, modules = subject.model, dict(subject.model.named_modules())
    return {
        "types": {name: type(module) for name, module in modules.items()},
        "attributes": [set(vars(subject.module(number))) for number in range(len(subject.sites))],
        "forwards": {name: [vars(m).get(slot) for slot in ("forward", "_old_forward")] for name, m in modules.items()},
        "config": model.config.to_dict(),
        "implementation": model.config._attn_implementation,
        "training": {name: module.training for name, module in modules.items()},
    }
