"""Tiny GPTBigCode models with spread weights, and a comparison of their outputs.

With default initialisation attention is nearly uniform and a lost mask changes little, so weights are spread. The
reference is the original in float64 under sdpa, because its eager attention always computes the softmax in float32.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPTBigCodeConfig

from attnzoo.conformance import error_rule

VOCABULARY, WIDTH, HEADS = 61, 32, 4
BACKENDS = ("eager", "sdpa")
KINDS = pytest.mark.parametrize("multi_query", [True, False], ids=["mqa", "mha"])
BOTH = pytest.mark.parametrize("backend", BACKENDS)


def build(implementation: str = "sdpa", **changes: Any) -> Any:
    sizes: dict[str, Any] = dict(
        vocab_size=VOCABULARY, n_positions=64, n_embd=WIDTH, n_layer=2, n_head=HEADS, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, bos_token_id=1, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    config = GPTBigCodeConfig(**{**sizes, **changes})
    model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation)
    spread_weights(model)
    return model.eval()


def spread_weights(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.weight.normal_(0.0, 1.5 / math.sqrt(module.in_features), generator=generator)
                if module.bias is not None:
                    module.bias.normal_(0.0, 0.5, generator=generator)
        for module in model.modules():  # after the projections, since the output layer is tied to an embedding
            if isinstance(module, nn.Embedding):
                module.weight.normal_(0.0, 1.0, generator=generator)


def twin(model: Any, implementation: str, dtype: torch.dtype = torch.float32) -> Any:
    """Return the original with the same weights in another dtype and under another implementation."""
    config = copy.deepcopy(model.config)
    other = AutoModelForCausalLM.from_config(config, attn_implementation=implementation)
    other.load_state_dict(model.state_dict())
    return other.to(dtype).eval()


def tokens(batch: int, length: int, seed: int = 3) -> Tensor:
    return torch.randint(2, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def padded(batch: int, length: int, side: str) -> dict[str, Tensor]:
    """Return inputs in which padding replaces n thirds of the tokens of sample n, on one side."""
    mask = torch.ones(batch, length, dtype=torch.long)
    for sample in range(batch):
        count = sample * length // 3
        if count and side != "none":
            mask[sample, slice(None, count) if side == "left" else slice(-count, None)] = 0
    return dict(input_ids=tokens(batch, length) * mask, attention_mask=mask)


def results(model: Any, inputs: dict[str, Tensor], real: Tensor | None = None, **more: Any) -> dict[str, Tensor]:
    """Return logits on real tokens, and the gradients of a random linear function of them."""
    real = inputs["attention_mask"].bool() if real is None else real
    model.zero_grad()
    logits = model(**inputs, **more).logits[real]
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    (logits * weights.to(logits.dtype)).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach(), **gradients}


def check(got: dict[str, Tensor], reference: dict[str, Tensor], baseline: dict[str, Tensor]) -> None:
    assert got.keys() == reference.keys() == baseline.keys()
    for name in reference:
        k = error_rule.FORWARD if name == "logits" else error_rule.GRADIENT
        verdict = error_rule.check(name, got[name], reference[name], baseline[name], k)
        assert verdict.ok, str(verdict)
