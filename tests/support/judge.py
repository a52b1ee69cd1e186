"""Runs of whole models on real tokens, and their comparison with the oracle under the error rule."""

import torch
import transformers

import attnzoo
from attnzoo.patching.replay import recording, replaying
from attnzoo.patching.sites import find_sites
from tests.support.compare import assert_obeys_the_error_rule


def real_tokens(model, inputs):
    """``(batch, length)``: the tokens whose logits are compared, without decoder tokens of samples without a source."""
    mask = inputs["attention_mask"].bool()
    if not model.config.is_encoder_decoder:
        return mask
    return inputs["decoder_attention_mask"].bool() & mask.any(1, keepdim=True)


def logits_of(model, inputs):
    """Logits of real tokens."""
    return model(**inputs).logits[real_tokens(model, inputs)]


def positions_of(mask):
    """``(batch, length)``: positions that count real tokens only. Padding on the left does not change them."""
    return (mask.cumsum(1) - 1).clamp(min=0)


@torch.no_grad()
def in_one_forward(model, inputs):
    """Logits of the whole sequence in one forward."""
    return model(**inputs, position_ids=positions_of(inputs["attention_mask"])).logits


@torch.no_grad()
def chunked(model, inputs, sizes, static):
    """Logits of the sequence in chunks of new tokens with a cache."""
    tokens, mask = inputs["input_ids"], inputs["attention_mask"]
    positions = positions_of(mask)
    cache = transformers.StaticCache(model.config, max_cache_len=tokens.shape[1] + 7) if static else None
    logits, start = [], 0
    for size in sizes:
        stop = start + size
        step = model(
            input_ids=tokens[:, start:stop], attention_mask=mask[:, :stop], position_ids=positions[:, start:stop],
            past_key_values=cache, use_cache=True,
        )  # fmt: skip
        cache, start = step.past_key_values, stop
        logits.append(step.logits)
    return torch.cat(logits, dim=1)


def hashes_of(model):
    """A context that records the hash buckets that the model's LSH attentions choose at random."""
    targets = [target for target in find_sites(model) if target.point.makes_random_choices]
    return recording({target.name: (target.module, target.point.replay) for target in targets})


def run(model, inputs, mode, patch=None):
    """Logits of real tokens, and the gradient of a random function of them with respect to all parameters.

    If the model refuses (a length that it cannot train, a backward in eval mode), ``"refused"`` holds the error.
    """
    model.train(mode != "eval")
    if mode == "checkpointed":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    handle, results = attnzoo.patch(model, patch) if patch else None, {}
    try:
        logits = logits_of(model, inputs)
        results["logits"] = logits.detach()
        weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
        (logits * weights.to(logits.dtype)).sum().backward()
        results["gradient"] = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    except (ValueError, AssertionError) as error:
        results["refused"] = (type(error), str(error))
    if handle is not None and "logits" in results:
        assert all(site.calls for site in handle.sites), handle
    return results


def judge(family, inputs, mode, dtype=torch.float32):
    """Assert that eager, sdpa and the model's own code pass the error rule against the oracle in float64.

    All runs use the same hash buckets. If the original refuses a call, the patched model must raise the same error.
    The mode is ``"eval"``, ``"train"``, or ``"checkpointed"``, which is training with gradient checkpointing.
    """
    model = family.build().to(dtype)
    with hashes_of(model) as buckets:
        original = run(model, inputs, mode)

    def again(patch, computed=dtype, mode=mode):
        model = family.build().to(dtype).to(computed)  # the weights are those of dtype
        with replaying(model, buckets):
            return run(model, inputs, mode, patch)

    own = again(None, torch.float64) if family.coarse else original
    eager, sdpa = again("eager"), again("sdpa")
    oracle = again("eager", torch.float64, "train" if mode == "checkpointed" else mode)
    assert oracle.pop("refused", None) == original.get("refused") == eager.get("refused") == sdpa.get("refused")
    assert oracle.keys() == original.keys() - {"refused"}
    has_backward = not any(target.point.backward_in_training for target in find_sites(model))
    assert oracle.keys() >= ({"logits", "gradient"} if has_backward else {"logits"} if mode == "eval" else set())
    for what, reference in oracle.items():
        assert_obeys_the_error_rule(f"{what} of the original", own[what], reference, eager[what], dtype=dtype)
        assert_obeys_the_error_rule(f"{what} under eager", eager[what], reference, original[what])
        assert_obeys_the_error_rule(f"{what} under sdpa", sdpa[what], reference, eager[what])
