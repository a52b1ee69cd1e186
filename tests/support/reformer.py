"""Tiny Reformers, and a comparison of a patched Reformer with the original.

Two properties make Reformer hard to compare:

- The same seed gives other rotations, and so other hashes, in float32 and float64. So modules are compared on given
  buckets, and models replay recorded buckets (:func:`replayed`).
- In float32 the original is wrong by some tenths of a percent for tokens that see only themselves, because it hides
  tokens with -1e5. So the reference is the original in float64. The original in float32 only bounds the error.
"""

import copy
import math
from collections import defaultdict
from contextlib import contextmanager

import pytest
import torch
import transformers

import attnzoo
from attnzoo.conformance.error_rule import FORWARD, GRADIENT, check

VOCAB, CHUNK = 99, 4
backends = pytest.mark.parametrize("backend", ["eager", "sdpa"])
causal = pytest.mark.parametrize("is_decoder", [True, False], ids=["causal", "both ways"])
sides = pytest.mark.parametrize("side", ["none", "left", "right", "sample"])
NEIGHBOURS = [(0, 0), (1, 0), (0, 1), (1, 1), (2, 0), (2, 3), (5, 1), (0, 7)]


def reformer(cls=None, **changes):
    """Return a tiny model with spread random weights, in eval mode."""
    base = dict(
        vocab_size=VOCAB, hidden_size=24, num_attention_heads=3, attention_head_size=8, feed_forward_size=32,
        attn_layers=["local", "lsh", "local", "lsh"], axial_pos_shape=[8, 8], axial_pos_embds_dim=[8, 16],
        lsh_attn_chunk_length=CHUNK, local_attn_chunk_length=CHUNK, lsh_num_chunks_before=1, lsh_num_chunks_after=0,
        local_num_chunks_before=1, local_num_chunks_after=0, num_hashes=2, num_buckets=4, is_decoder=True,
        max_position_embeddings=64, hidden_dropout_prob=0.0, lsh_attention_probs_dropout_prob=0.0,
        local_attention_probs_dropout_prob=0.0, pad_token_id=0, eos_token_id=2, hash_seed=7,
    )  # fmt: skip
    config = transformers.ReformerConfig(**{**base, **changes})
    ahead = config.lsh_num_chunks_after or config.local_num_chunks_after  # the language model refuses chunks ahead
    decoder = "ReformerModel" if ahead else "ReformerModelWithLMHead"
    cls = cls or (decoder if config.is_decoder else "ReformerForMaskedLM")
    model, random = getattr(transformers, cls)(config), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                std = 1.0 if "embed" in name else 1.5 / math.sqrt(parameter.shape[1])
                parameter.copy_(torch.randn(parameter.shape, generator=random) * std)
    return model.eval()


def ids(*shape, seed=2):
    return torch.randint(3, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def padding(side, batch, length):
    """Return a mask ``(batch, length)`` with padding on a side, or of a whole ``"sample"``; None for ``"none"``."""
    mask = torch.ones((batch, length), dtype=torch.long)
    for row in range(batch):
        cut = row * length // (batch + 1)
        if side == "left":
            mask[row, :cut] = 0
        elif side == "right":
            mask[row, length - cut :] = 0
    if side == "sample":
        mask[-1] = 0
    return None if side == "none" else mask


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
    return {
        "output": output.detach(),
        "gradients": torch.cat([gradient.flatten() for gradient in gradients]),
    }


def assert_module_equals_the_original(module, states, mask, backend, **arguments):
    arguments["attention_mask"] = mask
    if not hasattr(module, "query"):
        arguments.setdefault("buckets", module(states, **arguments).buckets)

    def run(patch, dtype):
        return outcome(module, states, arguments, mask, patch, dtype)

    exact, oracle = run(None, torch.float64), run("eager", torch.float64)
    original, patched = run(None, torch.float32), run(backend, torch.float32)
    for name, k in (("output", FORWARD), ("gradients", GRADIENT)):
        torch.testing.assert_close(oracle[name], exact[name], rtol=1e-10, atol=1e-10)
        verdict = check(name, patched[name], oracle[name], original[name], k)
        assert verdict.ok, str(verdict)


@contextmanager
def replayed(model, record):
    """Record the buckets of every LSH attention if ``record`` is empty; otherwise replay them, in any dtype."""
    recording, handles = not record, []
    for number, module in enumerate(attentions(model)):
        if hasattr(module, "query"):
            continue

        def save(module, args, kwargs, output, number=number):
            if kwargs.get("buckets") is None and output.buckets is not None:
                record[number].append(output.buckets)

        def replay(module, args, kwargs, number=number, turn=iter(tuple(record[number]))):  # noqa: B008
            if kwargs.get("buckets") is None and kwargs["hidden_states"].shape[1] > module.chunk_length:
                kwargs["buckets"] = next(turn)
            return args, kwargs

        if recording:
            handles.append(module.register_forward_hook(save, with_kwargs=True))
        else:
            handles.append(module.register_forward_pre_hook(replay, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def whole(model, arguments, patch, dtype, record, train):
    """Return logits on real tokens and, in training, the gradients of all parameters."""
    model = copy.deepcopy(model).to(dtype).train(train)
    handle = attnzoo.patch(model, patch) if patch else None
    with replayed(model, record), torch.set_grad_enabled(train):
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


def assert_model_equals_the_original(model, arguments, backend, train=False, dtype=torch.float32):
    record = defaultdict(list)
    original = whole(model, arguments, None, dtype, record, train)
    exact = whole(model, arguments, None, torch.float64, record, train)
    oracle = whole(model, arguments, "eager", torch.float64, record, train)
    patched = whole(model, arguments, backend, dtype, record, train)
    for name, k in (("logits", FORWARD), ("gradients", GRADIENT)):
        if name in exact:
            torch.testing.assert_close(oracle[name], exact[name], rtol=1e-9, atol=1e-9)
            verdict = check(name, patched[name], oracle[name], original[name], k, dtype)
            assert verdict.ok, str(verdict)
