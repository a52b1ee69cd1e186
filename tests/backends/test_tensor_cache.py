"""What backends remember of tensors: nothing of others, nothing that has changed, and not for ever."""

import weakref

import pytest
import torch

from attnzoo.backends.common import tensor_cache
from attnzoo.backends.common.tensor_cache import TensorCache


class Made:
    """A value made, which can be watched."""


@pytest.fixture
def memory():
    return TensorCache(size=3)


def away():
    """A tensor of another device, whose content cannot be looked at."""
    return torch.ones(3, device="meta")


@pytest.mark.parametrize("one", [torch.ones(3), away()], ids=["cpu", "elsewhere"])
def test_the_same_tensors_and_key_give_the_same_value(memory, one):
    other = torch.zeros(3)
    made = memory.get("key", (one, other), Made)
    assert memory.get("key", (one, other), Made) is made
    for key, tensors in (("another", (one, other)), ("key", (other, one)), ("key", (one,)), ("key", ())):
        assert memory.get(key, tensors, Made) is not made


WRITES = {
    "itself": lambda tensor: tensor.zero_(),
    "a part": lambda tensor: tensor[:1].zero_(),
    "detached": lambda tensor: tensor.detach().zero_(),
    "a view": lambda tensor: tensor.view(1, 3).fill_(2.0),
}
UNSEEN = {"data": lambda tensor: tensor.data.zero_(), "numpy": lambda tensor: tensor.numpy().fill(0)}


@pytest.mark.parametrize("write", (WRITES | UNSEEN).values(), ids=WRITES | UNSEEN)
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_a_tensor_that_was_written_to_is_another(memory, write, mode):
    tensor = torch.ones(3)
    made = memory.get("key", (tensor,), Made)
    with mode():
        write(tensor)
    assert memory.get("key", (tensor,), Made) is not made


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_so_is_one_on_another_device(memory, write):
    tensor = away()
    made = memory.get("key", (tensor,), Made)
    write(tensor)
    assert memory.get("key", (tensor,), Made) is not made


def test_on_the_cpu_equal_content_is_enough_in_inference_mode_too(memory):
    with torch.inference_mode():
        made = memory.get("key", (torch.ones(3, dtype=torch.bool),), Made)
        assert memory.get("key", (torch.ones(6, dtype=torch.bool)[::2],), Made) is made
        assert memory.get("key", (torch.ones(3, 1, dtype=torch.bool),), Made) is not made
        assert memory.get("key", (torch.ones(3, dtype=torch.uint8),), Made) is not made


def test_a_tensor_at_the_place_of_one_that_is_gone_is_another(memory, monkeypatch):
    monkeypatch.setattr(tensor_cache, "id", lambda tensor: 7, raising=False)
    made = memory.get("key", (away(),), Made)
    assert memory.get("key", (away(),), Made) is not made


def test_values_go_with_their_tensors_and_after_a_while(memory):
    tensor = away()
    gone, old = (weakref.ref(memory.get(name, tensors, Made)) for name, tensors in (("gone", (tensor,)), ("old", ())))
    assert gone() is not None
    del tensor
    memory.get("next", (), Made)
    assert gone() is None and old() is not None
    for name in ("second", "third"):
        memory.get(name, (), Made)
    assert old() is None


def test_elsewhere_inference_tensors_are_not_remembered(memory):
    with torch.inference_mode():
        own = away()
        assert memory.get("key", (own,), Made) is not memory.get("key", (own,), Made)


def test_what_is_made_in_inference_mode_is_not_for_training(memory):
    tensor = torch.ones(3)
    with torch.inference_mode():
        made = memory.get("key", (tensor,), lambda: tensor + 1)
        assert memory.get("key", (tensor,), lambda: tensor + 1) is made
    assert not memory.get("key", (tensor,), lambda: tensor + 1).is_inference()
