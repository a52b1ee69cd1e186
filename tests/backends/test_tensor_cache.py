"""The tensor cache returns no value of another or changed tensor, and drops old values."""

import weakref

import pytest
import torch

from attnzoo.backends.common import tensor_cache
from attnzoo.backends.common.tensor_cache import TensorCache


class Value:
    """A value that a weak reference can watch."""


@pytest.fixture
def cache():
    return TensorCache(size=3)


def away():
    """A tensor on another device, whose content cannot be read."""
    return torch.ones(3, device="meta")


@pytest.mark.parametrize("tensor", [torch.ones(3), away()], ids=["cpu", "another device"])
def test_equal_tensors_and_keys_give_the_cached_value(cache, tensor):
    other = torch.zeros(3)
    value = cache.get("key", (tensor, other), Value)
    assert cache.get("key", (tensor, other), Value) is value
    for key, tensors in (("another", (tensor, other)), ("key", (other, tensor)), ("key", (tensor,)), ("key", ())):
        assert cache.get(key, tensors, Value) is not value


WRITES = {
    "itself": lambda tensor: tensor.zero_(),
    "a part": lambda tensor: tensor[:1].zero_(),
    "detached": lambda tensor: tensor.detach().zero_(),
    "a view": lambda tensor: tensor.view(1, 3).fill_(2.0),
}
UNSEEN = {"data": lambda tensor: tensor.data.zero_(), "numpy": lambda tensor: tensor.numpy().fill(0)}


@pytest.mark.parametrize("write", (WRITES | UNSEEN).values(), ids=WRITES | UNSEEN)
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_a_write_to_a_tensor_invalidates_its_value(cache, write, mode):
    tensor = torch.ones(3)
    value = cache.get("key", (tensor,), Value)
    with mode():
        write(tensor)
    assert cache.get("key", (tensor,), Value) is not value


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_a_write_to_a_tensor_on_another_device_invalidates_its_value(cache, write):
    tensor = away()
    value = cache.get("key", (tensor,), Value)
    write(tensor)
    assert cache.get("key", (tensor,), Value) is not value


def test_on_the_cpu_equal_content_is_enough_in_inference_mode(cache):
    with torch.inference_mode():
        value = cache.get("key", (torch.ones(3, dtype=torch.bool),), Value)
        assert cache.get("key", (torch.ones(6, dtype=torch.bool)[::2],), Value) is value
        assert cache.get("key", (torch.ones(3, 1, dtype=torch.bool),), Value) is not value
        assert cache.get("key", (torch.ones(3, dtype=torch.uint8),), Value) is not value


def test_a_new_tensor_with_the_id_of_a_dead_one_gets_a_new_value(cache, monkeypatch):
    monkeypatch.setattr(tensor_cache, "id", lambda tensor: 7, raising=False)
    value = cache.get("key", (away(),), Value)
    assert cache.get("key", (away(),), Value) is not value


def test_values_are_dropped_with_their_tensors_and_by_age(cache):
    tensor = away()
    gone, old = (weakref.ref(cache.get(name, tensors, Value)) for name, tensors in (("gone", (tensor,)), ("old", ())))
    assert gone() is not None
    del tensor
    cache.get("next", (), Value)
    assert gone() is None and old() is not None
    for name in ("second", "third"):
        cache.get(name, (), Value)
    assert old() is None


def test_inference_tensors_on_another_device_are_not_cached(cache):
    with torch.inference_mode():
        tensor = away()
        assert cache.get("key", (tensor,), Value) is not cache.get("key", (tensor,), Value)


def test_values_from_inference_mode_are_not_used_in_training(cache):
    tensor = torch.ones(3)
    with torch.inference_mode():
        value = cache.get("key", (tensor,), lambda: tensor + 1)
        assert cache.get("key", (tensor,), lambda: tensor + 1) is value
    assert not cache.get("key", (tensor,), lambda: tensor + 1).is_inference()


@pytest.mark.parametrize("tensors", [(), (torch.ones(3),), (away(),)], ids=["no tensor", "cpu", "another device"])
def test_the_value_used_least_recently_is_dropped_first(cache, tensors):
    first, second, third = (cache.get(name, tensors, Value) for name in ("first", "second", "third"))
    assert cache.get("first", tensors, Value) is first
    fourth = cache.get("fourth", tensors, Value)
    assert cache.get("first", tensors, Value) is first, "used after the second"
    assert cache.get("third", tensors, Value) is third and cache.get("fourth", tensors, Value) is fourth
    assert cache.get("second", tensors, Value) is not second
