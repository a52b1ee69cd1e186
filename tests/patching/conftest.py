"""Tiny models whose attention is far from uniform, a check that a model is unchanged, and fake backends.

At default initialisation attention is nearly uniform and hides a dropped mask, so the weights are spread:
projections with std 1.5 / sqrt(fan_in), embeddings with std 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LEDConfig, LEDForConditionalGeneration

import attnzoo
from attnzoo.backends.eager import EagerBackend, evaluate

VOCABULARY = 97


def led_config(**changes: Any) -> LEDConfig:
    sizes: dict[str, Any] = dict(
        vocab_size=VOCABULARY, d_model=16, encoder_layers=2, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, attention_window=[4, 8],
        max_encoder_position_embeddings=64, max_decoder_position_embeddings=32, dropout=0.0, pad_token_id=1,
        bos_token_id=0, eos_token_id=2, decoder_start_token_id=2,
    )  # fmt: skip
    return LEDConfig(**{**sizes, **changes})


def neox_config(**changes: Any) -> GPTNeoXConfig:
    sizes: dict[str, Any] = dict(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=64, hidden_dropout=0.0, attention_dropout=0.0, pad_token_id=1, bos_token_id=0,
        eos_token_id=2,
    )  # fmt: skip
    return GPTNeoXConfig(**{**sizes, **changes})


def spread_weights(model: nn.Module, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.weight.normal_(0.0, 1.5 / math.sqrt(module.in_features), generator=generator)
        for module in model.modules():  # after the projections: an output layer tied to an embedding is an embedding
            if isinstance(module, nn.Embedding):
                module.weight.normal_(0.0, 1.0, generator=generator)


def led_inputs() -> dict[str, Tensor]:
    """Padding on either side; one, two and no global tokens."""
    generator = torch.Generator().manual_seed(7)
    attention_mask, global_attention_mask = torch.ones(3, 21, dtype=torch.long), torch.zeros(3, 21, dtype=torch.long)
    attention_mask[1, :5], attention_mask[2, 15:] = 0, 0
    global_attention_mask[0, 0] = global_attention_mask[1, 7] = global_attention_mask[1, 12] = 1
    return dict(
        input_ids=torch.randint(3, VOCABULARY, (3, 21), generator=generator),
        attention_mask=attention_mask,
        global_attention_mask=global_attention_mask,
        decoder_input_ids=torch.randint(3, VOCABULARY, (3, 6), generator=generator),
    )


def neox_inputs() -> dict[str, Tensor]:
    """Padding on either side."""
    generator = torch.Generator().manual_seed(7)
    attention_mask = torch.ones(3, 11, dtype=torch.long)
    attention_mask[1, :4], attention_mask[2, 8:] = 0, 0
    return dict(
        input_ids=torch.randint(3, VOCABULARY, (3, 11), generator=generator),
        attention_mask=attention_mask,
    )


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
        """Equal on real tokens, but for float32 rounding (LED's logits are all of real decoder tokens)."""
        if self.kind == "gpt_neox":
            real = self.inputs["attention_mask"].bool()
            got, expected = got[real], expected[real]
        return bool((got - expected).abs().max() < 1e-4 * expected.abs().max())


def build(kind: str, config: Any = None, seed: int = 0, **changes: Any) -> Subject:
    if kind == "led":
        model: Any = LEDForConditionalGeneration(config or led_config(**changes))
        encoder = tuple(f"led.encoder.layers.{n}.self_attn.longformer_self_attn" for n in range(2))
        sites = (*encoder, "led.decoder.layers.0.self_attn", "led.decoder.layers.0.encoder_attn")
        subject = Subject(kind, model, led_inputs(), sites, 2 * 2 + 2)
    else:
        model = GPTNeoXForCausalLM(config or neox_config(**changes))
        subject = Subject(kind, model, neox_inputs(), tuple(f"gpt_neox.layers.{n}.attention" for n in range(2)), 2)
    spread_weights(model, seed)
    model.eval()
    return subject


@pytest.fixture
def build_subject() -> Callable[..., Subject]:
    return build


@pytest.fixture(params=["led", "gpt_neox"])
def subject(request: pytest.FixtureRequest) -> Subject:
    return build(request.param)


@pytest.fixture
def led() -> Subject:
    return build("led")


@pytest.fixture
def neox() -> Subject:
    return build("gpt_neox")


def calls(handle: attnzoo.Handle) -> dict[str, int]:
    """How many attentions ran at each site."""
    return {site.name: site.calls for site in handle.sites}


class Before:
    """A model as it was: ``check`` asserts that nothing at all differs now."""

    def __init__(self, subject: Subject) -> None:
        self.subject, self.logits = subject, subject.logits()
        model = subject.model
        self.types = {name: type(module) for name, module in model.named_modules()}
        self.attributes = [set(vars(subject.module(number))) for number in range(len(subject.sites))]
        self.forwards = {
            name: (vars(module).get("forward"), vars(module).get("_old_forward"))
            for name, module in model.named_modules()
        }
        self.state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        self.config, self.implementation = model.config.to_dict(), model.config._attn_implementation
        self.training = {name: module.training for name, module in model.named_modules()}

    def check(self) -> None:
        model = self.subject.model
        assert {name: type(module) for name, module in model.named_modules()} == self.types
        numbers = range(len(self.subject.sites))
        assert [set(vars(self.subject.module(number))) for number in numbers] == self.attributes
        for name, module in model.named_modules():
            slots = (vars(module).get("forward"), vars(module).get("_old_forward"))
            assert slots == self.forwards[name], f"{name} has another forward"
        state = model.state_dict()
        assert list(state) == list(self.state)
        assert all(torch.equal(tensor, self.state[name]) for name, tensor in state.items())
        assert model.config.to_dict() == self.config
        assert model.config._attn_implementation == self.implementation
        assert {name: module.training for name, module in model.named_modules()} == self.training
        assert torch.equal(self.subject.logits(), self.logits)


@pytest.fixture
def as_it_was() -> Callable[[Subject], Before]:
    """Remember a model: ``before = as_it_was(subject)``, and later ``before.check()``."""
    return Before


@pytest.fixture
def add_backend() -> Iterator[Callable[..., type[attnzoo.Backend]]]:
    """Register a backend that computes as eager does and counts its runs in ``runs``; gone after the test.

    ``add_backend("fake", segments=1, ...)`` narrows the capabilities.
    """
    added = []

    def add(name: str, aliases: tuple[str, ...] = (), priority: int = -1000, **narrower: Any) -> type[attnzoo.Backend]:
        capabilities = replace(EagerBackend.capabilities, **narrower)

        def run(self: attnzoo.Backend, attention: attnzoo.Attention, probabilities: bool = False) -> attnzoo.Result:
            type(self).runs += 1  # type: ignore[attr-defined]
            result = evaluate(attention)._replace(kernel=f"{name}-kernel")
            return result if probabilities else result._replace(probabilities=None, dropped=None)

        body = dict(name=name, aliases=aliases, priority=priority, capabilities=capabilities, run=run, runs=0)
        cls = attnzoo.register_backend(type("Fake", (attnzoo.Backend,), body))
        added.append(name)
        return cls

    attnzoo.backends()  # those that come by entry point are there first
    yield add
    for name in added:
        attnzoo.unregister_backend(name)
