"""Judging whole models: what a run gives on real tokens, and whether the patched model gives what the original does."""

import torch
import transformers

import attnzoo
from attnzoo.conformance.error_rule import check, factor
from attnzoo.patching.replay import recording, replaying
from attnzoo.patching.sites import find_sites


def real_tokens(model, inputs):
    """``(batch, length)``: whose logits are compared. A decoder's count where its sample has a source."""
    mask = inputs["attention_mask"].bool()
    if not model.config.is_encoder_decoder:
        return mask
    return inputs["decoder_attention_mask"].bool() & mask.any(1, keepdim=True)


def logits_of(model, inputs):
    """Logits on real tokens."""
    return model(**inputs).logits[real_tokens(model, inputs)]


def positions_of(mask):
    """``(batch, length)``: positions that count real tokens, which padding on the left does not move."""
    return (mask.cumsum(1) - 1).clamp(min=0)


@torch.no_grad()
def in_one_forward(model, inputs):
    """Logits of the whole sequence at once."""
    return model(**inputs, position_ids=positions_of(inputs["attention_mask"])).logits


@torch.no_grad()
def chunked(model, inputs, sizes, static):
    """Logits of the sequence in chunks of new tokens on a cache."""
    tokens, mask = inputs["input_ids"], inputs["attention_mask"]
    positions = positions_of(mask)
    cache = transformers.StaticCache(model.config, max_cache_len=tokens.shape[1] + 7) if static else None
    found, start = [], 0
    for size in sizes:
        stop = start + size
        step = model(
            input_ids=tokens[:, start:stop], attention_mask=mask[:, :stop], position_ids=positions[:, start:stop],
            past_key_values=cache, use_cache=True,
        )  # fmt: skip
        cache, start = step.past_key_values, stop
        found.append(step.logits)
    return torch.cat(found, dim=1)


def hashes_of(model):
    """A context that records what the model's attentions choose at random: the buckets of those that hash."""
    found = find_sites(model)
    return recording({one.name: (one.module, one.point.replay) for one in found if one.point.makes_random_choices})


def run(model, inputs, mode, patch=None):
    """Logits on real tokens, and the gradient of a random function of them with respect to all parameters.

    Where the model refuses (a length it does not train, a backward pass in eval mode), the error is found instead.
    """
    model.train(mode != "eval")
    if mode == "checkpointed":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    handle, found = attnzoo.patch(model, patch) if patch else None, {}
    try:
        logits = logits_of(model, inputs)
        found["logits"] = logits.detach()
        weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
        (logits * weights.to(logits.dtype)).sum().backward()
        found["gradient"] = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    except (ValueError, AssertionError) as error:
        found["refused"] = (type(error), str(error))
    if handle is not None and "logits" in found:
        assert all(site.calls for site in handle.sites), handle
    return found


def judge(family, inputs, mode, dtype=torch.float32):
    """Assert that the model under every backend, and its own code, are within the error rule of the oracle in float64.

    All runs hash alike, where the model hashes. What the original refuses, the patched model refuses in the same words.

    Args:
        family: of :data:`~tests.support.models.FAMILIES`.
        inputs: of the forward.
        mode: ``"eval"``, ``"train"``, or ``"checkpointed"``, which is training with gradient checkpointing.
        dtype: of the weights and of all runs but the oracle's.
    """
    model = family.build().to(dtype)
    with hashes_of(model) as made:
        original = run(model, inputs, mode)

    def again(patch, computed=dtype, mode=mode):
        model = family.build().to(dtype).to(computed)
        with replaying(model, made):
            return run(model, inputs, mode, patch)

    own = again(None, torch.float64) if family.coarse else original
    eager, fused = again("eager"), again("sdpa")
    oracle = again("eager", torch.float64, "train" if mode == "checkpointed" else mode)
    assert oracle.pop("refused", None) == original.get("refused") == eager.get("refused") == fused.get("refused")
    assert oracle.keys() == original.keys() - {"refused"}
    whole = not any(one.point.backward_in_training for one in find_sites(model))
    assert oracle.keys() >= ({"logits", "gradient"} if whole else {"logits"} if mode == "eval" else set())
    for what, reference in oracle.items():
        verdicts = [
            check(f"{what} of the original", own[what], reference, eager[what], factor(what), dtype),
            check(f"{what} under eager", eager[what], reference, original[what], factor(what)),
            check(f"{what} under sdpa", fused[what], reference, eager[what], factor(what)),
        ]
        assert all(verdict.ok for verdict in verdicts), "\n".join(map(str, verdicts))
