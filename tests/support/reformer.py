"""Tiny Reformers, and a comparison of a patched Reformer with the original.

Two properties make Reformer hard to compare:

- The same seed gives other rotations, and so other hashes, in float32 and float64. So modules are compared on given
  buckets, and models replay recorded buckets (:func:`~attnzoo.patching.replay.replaying`).
- In float32 the original is wrong by some tenths of a percent for tokens that see only themselves, because it hides
  tokens with -1e5. So the reference is the original in float64. The original in float32 only bounds the error.
"""

import copy

import pytest
import torch

import attnzoo
from attnzoo.patching.replay import replaying
from tests.support import models as zoo
from tests.support.compare import assert_obeys_the_error_rule
from tests.support.judge import hashes_of

CHUNK = 4
backends = pytest.mark.parametrize("backend", ["eager", "sdpa"])
causal = pytest.mark.parametrize("is_decoder", [True, False], ids=["causal", "both ways"])
sides = pytest.mark.parametrize("side", ["none", "left", "right", "sample"])
NEIGHBOURS = [(0, 0), (1, 0), (0, 1), (1, 1), (2, 0), (2, 3), (5, 1), (0, 7)]


def reformer(cls=None, **changes):
    """Return a tiny model with spread random weights, in eval mode."""
    sizes = dict(
        hidden_size=24, num_attention_heads=3, attn_layers=["local", "lsh", "local", "lsh"], axial_pos_embds=True,
        axial_pos_shape=[8, 8], axial_pos_embds_dim=[8, 16], num_buckets=4, max_position_embeddings=64, pad_token_id=0,
    )  # fmt: skip
    sizes.update(changes)
    ahead = sizes.get("lsh_num_chunks_after") or sizes.get("local_num_chunks_after")
    decoder = "ReformerModel" if ahead else "ReformerModelWithLMHead"  # the language model refuses chunks ahead
    return zoo.reformer(cls or (decoder if sizes.get("is_decoder", True) else "ReformerForMaskedLM"), **sizes)


def padding(side, batch, length):
    """Return a mask ``(batch, length)`` with padding on a side, or of a whole ``"sample"``; None for ``"none"``."""
    return None if side == "none" else zoo.padded(batch, length, side)


def attentions(model):
    """Return the attention modules of a model, from the first layer to the last."""
    return [layer.attention.self_attention for layer in model.base_model.encoder.layers]


def lsh(**changes):
    return attentions(reformer(attn_layers=["lsh"], **changes))[0]


def local(**changes):
    return reformer(attn_layers=["local"], **changes)


def hidden(batch, length, size=24, seed=3):
    return torch.randn((batch, length, size), generator=torch.Generator().manual_seed(seed))


def outcome(module, states, arguments, real, patch, dtype):
    """Return the output on real tokens, and the gradients of a loss on it for input and parameters."""
    module = copy.deepcopy(module).to(dtype)
    states = states.to(dtype, copy=True).requires_grad_()
    # An attention module has no config, so put it into a container that has one.
    whole = torch.nn.Module()
    whole.module, whole.config = module, reformer().config
    handle = attnzoo.patch(whole, patch) if patch else None
    output = module(states, **arguments).hidden_states
    output = output if real is None else output[real.bool()]
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    (output * weights.to(dtype)).sum().backward()
    if handle is not None:
        assert all(site.calls == 1 for site in handle.sites)
    gradients = [states.grad, *(parameter.grad for parameter in module.parameters())]
    return {"output": output.detach(), "gradients": torch.cat([gradient.flatten() for gradient in gradients])}


def assert_module_equals_the_original(module, states, mask, backend, **arguments):
    arguments["attention_mask"] = mask
    if not hasattr(module, "query"):
        arguments.setdefault("buckets", module(states, **arguments).buckets)

    def run(patch, dtype):
        return outcome(module, states, arguments, mask, patch, dtype)

    exact, oracle = run(None, torch.float64), run("eager", torch.float64)
    original, patched = run(None, torch.float32), run(backend, torch.float32)
    for name in exact:
        torch.testing.assert_close(oracle[name], exact[name], rtol=1e-10, atol=1e-10)
        assert_obeys_the_error_rule(name, patched[name], oracle[name], original[name])


def run(model, arguments, patch, dtype, buckets, train):
    """Return logits on real tokens and, in training, the gradients of all parameters; repeat the buckets, if given."""
    model = copy.deepcopy(model).to(dtype).train(train)
    handle = attnzoo.patch(model, patch) if patch else None
    with replaying(model, buckets), torch.set_grad_enabled(train):
        logits = model(**arguments).logits
        mask = arguments["attention_mask"]
        results = {"logits": logits.detach() if mask is None else logits.detach()[mask.bool()]}
        if train:
            loss = logits.double().square()
            (loss if mask is None else loss * mask[..., None]).sum().backward()
            grads = {name: parameter.grad for name, parameter in model.named_parameters()}
            assert [name for name, grad in grads.items() if grad is None] == ["lm_head.bias"]  # unused by the model
            results["gradients"] = torch.cat([grad.flatten() for grad in grads.values() if grad is not None])
    if handle is not None:
        assert all(site.calls == 1 + train for site in handle.sites)
    return results


def assert_model_equals_the_original(model, arguments, backend, train=False):
    twin = copy.deepcopy(model)
    with hashes_of(twin) as buckets:
        original = run(twin, arguments, None, torch.float32, {}, train)
    exact = run(model, arguments, None, torch.float64, buckets, train)
    oracle = run(model, arguments, "eager", torch.float64, buckets, train)
    patched = run(model, arguments, backend, torch.float32, buckets, train)
    for name in exact:
        torch.testing.assert_close(oracle[name], exact[name], rtol=1e-9, atol=1e-9)
        assert_obeys_the_error_rule(name, patched[name], oracle[name], original[name])
