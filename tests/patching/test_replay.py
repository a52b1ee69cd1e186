"""Recorded random choices are repeated call by call, in the order of the recording."""

import pytest
import torch

from attnzoo.patching.replay import replaying
from tests.support.judge import hashes_of
from tests.support.models import causal_inputs, reformer


@torch.no_grad()
def test_each_call_repeats_the_choices_of_its_recorded_call():
    model, inputs = reformer(hash_seed=None, attn_layers=["lsh", "lsh"]), causal_inputs(24, "left")
    with hashes_of(model) as choices:
        first, second = model(**inputs).logits, model(**inputs).logits
    assert not torch.equal(first, second) and [len(calls) for calls in choices.values()] == [2, 2]
    with replaying(model, choices):
        assert torch.equal(model(**inputs).logits, first)
        assert torch.equal(model(**inputs).logits, second)
        with pytest.raises(StopIteration):
            model(**inputs)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
