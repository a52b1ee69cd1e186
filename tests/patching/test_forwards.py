"""``cached_per_forward``: sites share a value made from a tensor within a forward, and no longer."""

from __future__ import annotations

import copy
import gc

import pytest
import torch

import attnzoo
from attnzoo.patching import interface


def test_a_cached_value_is_freed_with_its_mask(neox):
    """The cached value of a bool mask is the mask itself. The cache must not keep the masks of all forwards."""
    mask = torch.ones(3, 11, dtype=torch.long)
    mask[0, :4] = 0
    with attnzoo.patch(neox.model, "sdpa") as handle, torch.no_grad():
        for _ in range(3):
            neox.model(input_ids=torch.full((3, 11), 5), attention_mask=mask)
        gc.collect()
        assert not any(len(forward._attend._memory) for forward in handle.forwards)


def test_a_value_cached_in_inference_mode_is_used_only_there(neox):
    """An inference tensor cannot be saved for a backward, even if the tensor it is made from can."""
    mask = torch.ones(3, 11)
    with attnzoo.patch(neox.model, "sdpa") as handle:
        first, second = (forward._attend.cached_per_forward for forward in handle.forwards[:2])
        with torch.inference_mode():
            value = first(mask, "more", lambda tensor: tensor + 1)
        assert not second(mask, "more", lambda tensor: tensor + 1).is_inference() and value.is_inference()


def test_a_value_made_without_gradients_is_not_used_with_gradients(neox):
    mask = torch.zeros(2, 2, requires_grad=True)
    with attnzoo.patch(neox.model, "sdpa") as handle:
        first, second = (forward._attend.cached_per_forward for forward in handle.forwards[:2])
        with torch.no_grad():
            assert not first(mask, "more", lambda tensor: tensor + 1).requires_grad
        assert second(mask, "more", lambda tensor: tensor + 1).requires_grad


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_value_is_made_once_per_forward(neox, mode):
    """This holds even if the mask changes between forwards but its version counter does not."""
    with attnzoo.patch(neox.model, "sdpa") as handle, mode():
        mask = torch.ones(3, 11)
        sites = [forward._attend.cached_per_forward for forward in handle.forwards]
        for value in (1.0, 2.0, 3.0):
            mask.data.fill_(value)
            values = [cached(mask, "more", lambda tensor: tensor + 1) for cached in sites]
            assert all(other is values[0] for other in values) and values[0].eq(value + 1).all()


def test_a_mask_that_is_changed_between_two_layers_is_read_again(neox):
    with attnzoo.patch(neox.model, "sdpa") as handle:
        first, second = (forward._attend.cached_per_forward for forward in handle.forwards[:2])
        mask = torch.ones(3, 11)
        assert first(mask, "more", lambda tensor: tensor + 1).eq(2.0).all()
        mask.add_(1.0)
        assert second(mask, "more", lambda tensor: tensor + 1).eq(3.0).all()


def test_layers_of_a_copy_share_cached_values_but_not_with_the_original(neox, monkeypatch):
    read, masks = [], interface.read_attention_mask
    monkeypatch.setattr(interface, "read_attention_mask", lambda *given: read.append(given) or masks(*given))
    mask = torch.ones(3, 11, dtype=torch.long)
    mask[0, :4] = 0
    inputs = dict(input_ids=torch.full((3, 11), 5), attention_mask=mask)
    with attnzoo.patch(neox.model, "sdpa"), torch.no_grad():
        for model in (neox.model, copy.deepcopy(neox.model)):
            read.clear()
            model(**inputs)
            assert len(read) == 1
