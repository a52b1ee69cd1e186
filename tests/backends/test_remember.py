"""What backends remember of tensors: nothing of others, nothing that has changed, and not for ever."""

import weakref

import pytest
import torch

from attnzoo.backends import remember
from attnzoo.backends.remember import Memory


class Made:
    """A value made, which can be watched."""


@pytest.fixture
def memory():
    return Memory(kept=3)


def test_the_same_tensors_and_key_give_the_same_value(memory):
    one, other = torch.ones(3), torch.ones(3)
    made = memory.get("key", (one, other), Made)
    assert memory.get("key", (one, other), Made) is made
    for key, tensors in (("another", (one, other)), ("key", (other, one)), ("key", (one,)), ("key", ())):
        assert memory.get(key, tensors, Made) is not made


@pytest.mark.parametrize(
    "write",
    [
        lambda tensor: tensor.zero_(),
        lambda tensor: tensor[:1].zero_(),
        lambda tensor: tensor.detach().zero_(),
        lambda tensor: tensor.view(1, 3).fill_(2.0),
    ],
    ids=["itself", "a part", "detached", "a view"],
)
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
def test_a_tensor_that_was_written_to_is_another(memory, write, mode):
    tensor = torch.ones(3)
    made = memory.get("key", (tensor,), Made)
    with mode():
        write(tensor)
    assert memory.get("key", (tensor,), Made) is not made


def test_a_tensor_at_the_place_of_one_that_is_gone_is_another(memory, monkeypatch):
    monkeypatch.setattr(remember, "id", lambda tensor: 7, raising=False)
    made = memory.get("key", (torch.ones(3),), Made)
    assert memory.get("key", (torch.ones(3),), Made) is not made


def test_values_go_with_their_tensors_and_after_a_while(memory):
    tensor = torch.ones(3)
    gone, old = (weakref.ref(memory.get(name, tensors, Made)) for name, tensors in (("gone", (tensor,)), ("old", ())))
    assert gone() is not None
    del tensor
    memory.get("next", (), Made)
    assert gone() is None and old() is not None
    for name in ("second", "third"):
        memory.get(name, (), Made)
    assert old() is None


def test_inference_tensors_are_not_remembered_nor_what_is_made_of_others_beside_them(memory):
    tensor = torch.ones(3)
    with torch.inference_mode():
        own = torch.ones(3)
        assert memory.get("key", (own,), Made) is not memory.get("key", (own,), Made)
        made = memory.get("key", (tensor,), lambda: tensor + 1)
        assert memory.get("key", (tensor,), lambda: tensor + 1) is made
    assert not memory.get("key", (tensor,), lambda: tensor + 1).is_inference()
