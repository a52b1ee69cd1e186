"""No tensor of a patched model is as large as the square of the input length.

The tests look at single tensors, so that they need no long inputs: a tensor of ``length ** 2`` elements stands out at
any length that is large compared with the sizes of the tiny models.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import attnzoo
from tests.support.models import FAMILIES

LENGTH = 1024
ENCODERS = (
    "led",
    "longformer",
    "longt5-local",
    "longt5-tglobal",
    "bigbird",
    "bigbird_pegasus",
    "pegasus_x",
    "reformer",
)
DECODERS = ("gpt_neox", "gpt_bigcode-mqa", "gpt_bigcode-mha")


class LargestTensor(TorchDispatchMode):
    """Records the operation that returned the largest tensor, measured by its storage."""

    def __init__(self):
        super().__init__()
        self.elements, self.operation = 0, None

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                elements = tensor.untyped_storage().nbytes() // tensor.element_size()
                if elements > self.elements:
                    self.elements, self.operation = elements, f"{operation} of shape {tuple(tensor.shape)}"
        return result


def largest_tensor(model, inputs, mode):
    """The largest tensor of a forward; in every mode but ``"forward"``, of forward and backward."""
    model.train(mode in ("train", "checkpointed"))
    if mode == "checkpointed":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    with torch.set_grad_enabled(mode != "forward"), LargestTensor() as largest:
        output = model(**inputs)[0]
        if mode != "forward":
            output.square().mean().backward()
    return largest


def modes(name):
    checkpointing = FAMILIES[name].build().supports_gradient_checkpointing
    return "forward", "train", *(["checkpointed"] if checkpointing else [])


CASES = [
    *((name, mode, (side,)) for name in ENCODERS for mode in modes(name) for side in ("none", "every")),
    *((name, mode, ("none",)) for name in DECODERS for mode in ("forward", "train")),
    *((name, "forward", ("every", tokens)) for name in ENCODERS[:2] for tokens in ("zero", "one", "varying")),
]


@pytest.mark.parametrize(("name", "mode", "options"), CASES, ids=str)
def test_patched_model_has_no_quadratic_tensor(name, mode, options):
    """Decoders run without padding. LED and Longformer also run with given numbers of global tokens."""
    changes = dict(block_size=32) if "bigbird" in name else {}  # every block is a kernel call
    model, inputs = FAMILIES[name].build(**changes), FAMILIES[name].inputs(LENGTH, *options)
    with attnzoo.patch(model, "sdpa") as handle:
        largest = largest_tensor(model, inputs, mode)
        assert all(site.calls for site in handle.sites)
    assert largest.elements < LENGTH**2, largest.operation


@pytest.mark.parametrize("name", ["led", "longformer"])
def test_original_has_a_quadratic_tensor(name):
    """This shows that the tests above would fail on the original."""
    family = FAMILIES[name]
    assert largest_tensor(family.build(), family.inputs(LENGTH, "none"), "forward").elements >= LENGTH**2
