"""The transforms of ``torch.func`` around a call, which only private functions of PyTorch return."""

import torch
from torch.autograd import forward_ad
from torch.func import grad, hessian, jvp, vmap

from attnzoo.spec.transforms import readable, transforms_around


def test_transforms_are_listed_outermost_first():
    seen = []

    def look(tensor):
        seen.append((transforms_around([tensor]), readable(tensor)))
        return tensor.square().sum()

    given = torch.randn(3, 4)
    look(given)
    grad(look)(given)
    vmap(look)(given)
    jvp(look, (given,), (given,))
    vmap(grad(look))(given)
    vmap(lambda one: look(given))(given)
    torch.func.functionalize(look)(given)
    with forward_ad.dual_level():
        look(given)
        look(forward_ad.make_dual(given, given))
    hessian(look)(given)
    assert seen == [
        ((), True),
        (("grad",), True),
        (("vmap",), False),
        (("jvp",), True),
        (("vmap", "grad"), False),
        (("vmap",), True),
        (("functionalize",), True),
        ((), True),
        (("jvp",), True),
        (("vmap", "jvp", "grad"), True),
    ]


def test_this_pytorch_has_the_private_functions():
    assert torch._C._are_functorch_transforms_active() is False
    assert not torch._C._functorch.get_interpreter_stack()
    assert torch.func.debug_unwrap(torch.ones(2)).ndim == 1
    assert forward_ad._current_level == -1
    with forward_ad.dual_level():
        assert forward_ad._current_level == 0
