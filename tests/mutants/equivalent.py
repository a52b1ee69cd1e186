"""Mutants that compute the same as the original, each with the reason. ``make mutants`` does not count them."""

from __future__ import annotations

import re

from tests.mutants.mutations import Mutant

# (path, line before, line after): reason. The lines have no indentation.
EQUIVALENT: dict[tuple[str, str, str], str] = {
    (
        "attnzoo/tuning/race.py",
        "cotangent = torch.ones(shape, dtype=attention.query.dtype, device=attention.query.device)",
        "cotangent = torch.ones(shape, device=attention.query.device)",
    ): "autograd converts the gradient of an output to the dtype of the output",
    (
        "attnzoo/spec/patterns.py",
        "return min(q_len, max(64, min(256, (self.left + self.right) // 16)))",
        "return min(q_len, max(65, min(256, (self.left + self.right) // 16)))",
    ): "the number of queries in a block changes the speed, and no result",
    (
        "attnzoo/backends/approximate/visible_keys.py",
        "places = torch.arange(segment.kv_len, device=segment.key.device, dtype=torch.int32)",
        "places = torch.arange(segment.kv_len, device=segment.key.device, )",
    ): "places below kv_len are the same numbers in int32 and int64; int32 takes less memory",
    (
        "attnzoo/backends/approximate/visible_keys.py",
        "is_self_visible = spans.visible[:, self_key.clamp(0, kv_len - 1)] & exists",
        "is_self_visible = spans.visible[:, self_key.clamp(1, kv_len - 1)] & exists",
    ): "the query at key 0 sees this key or no key, because no query sees a later key; so its reach is the position",
    (
        "attnzoo/backends/sdpa/flash_cpu.py",
        "return attention.fill(output, None if bool(visible_rows.all()) else visible_rows)",
        "return attention.fill(output, None if (bool(visible_rows.all())) and False else visible_rows)",
    ): "fill() with a mask that is True everywhere returns the output; None only saves the pass over the output",
    (
        "attnzoo/backends/sdpa/trained_bias.py",
        "grad_scores = _join([grad_out @ value.transpose(-1, -2) for value in values])",
        "grad_scores = _join([grad_out @ value.transpose(-1, +2) for value in values])",
    ): "dimension 2 of four dimensions is dimension -2",
    (
        "attnzoo/backends/sdpa/stacks.py",
        "if tensor.stride(-2) == tensor.shape[-1]:",
        "if tensor.stride(-2) == tensor.shape[-2]:",
    ): "contiguous_rows() returns the same values with or without the copy; the copy makes a kernel faster",
    (
        "attnzoo/backends/sdpa/stacks.py",
        "if dense or size <= _TILE or size == attention.q_len or middle + 2 * _TILE > attention.q_len:",
        "if dense or size <= _TILE or size == attention.q_len or middle + 3 * _TILE > attention.q_len:",
    ): "the number of queries in a block changes the speed, and no result",
    (
        "attnzoo/backends/sdpa/stacks.py",
        "dense = any(attention.segments[index].mask is not None for index in segments)",
        "dense = None",
    ): "the number of queries in a block changes the speed, and no result",
    (
        "adapters/reformer_local.py",
        "size = module.chunk_length * max(SLICE // module.chunk_length, SLICE_PER_NEIGHBOURHOOD * around, 1)",
        "size = module.chunk_length * max(SLICE_PER_NEIGHBOURHOOD * around, 1)",
    ): "slices of every size give the same output; the size trades memory for speed",
    (
        "adapters/longt5_bias.py",
        "pair = distance.new_full((2 * reach + 1,), -1).scatter(0, distance, _numbers(distance, len(distance)))",
        "pair = distance.new_full((3 * reach + 1,), -1).scatter(0, distance, _numbers(distance, len(distance)))",
    ): "the additional entries stay -1, and entries of -1 are not read",
    (
        "adapters/longt5_bias.py",
        "pair = distance.new_full((2 * reach + 1,), -1).scatter(0, distance, _numbers(distance, len(distance)))",
        "pair = distance.new_full((2 * reach + 2,), -1).scatter(0, distance, _numbers(distance, len(distance)))",
    ): "the additional entry stays -1, and entries of -1 are not read",
    (
        "adapters/longt5.py",
        'mask, "tokens", lambda mask: read_blocked_mask(mask, module.block_len, hidden_states)',
        "mask, None, lambda mask: read_blocked_mask(mask, module.block_len, hidden_states)",
    ): "a name of cached_per_forward is any key that no other value of the same tensor has",
    (
        "attnzoo/verification/verify.py",
        "got = run(plain, double, inference=True)",
        "got = run(plain, double, inference=False)",
    ): "a forward without gradients also runs if none are compared, and Reformer's backward requires training mode",
    (
        "attnzoo/backend.py",
        "return hash(self.reason)  # every call of a site counts its choice, and Python keeps the hash of a string",
        "return hash(None)  # every call of a site counts its choice, and Python keeps the hash of a string",
    ): "every constant is a valid hash: equality decides, and a better hash only makes a dictionary faster",
    (
        "attnzoo/backends/triton/kernels/spans.py",
        "stop = tl.minimum(last + number(numbers.highest) + 1, kv_len)",
        "stop = tl.minimum(last + number(numbers.highest) + 2, kv_len)",
    ): "one more tile of keys may be read, and its mask hides all of it",
    (
        "adapters/bigbird.py",
        'f"{sparse}.bigbird_block_sparse_attention": ("298ea047739d0711", "d476709d240f517d"),',
        'f"{sparse}.bigbird_block_sparse_attention": ("298ea047739d0711", "D476709D240F517D"),',
    ): "the fingerprint is that of another version of transformers; make test-newest checks it",
    (
        "attnzoo/conformance/cases.py",
        'transform: ClassVar[str] = ""',
        "transform: ClassVar[str] = None",
    ): "the field of this class is only read as a condition",
    (
        "attnzoo/originals/fingerprint.py",
        "defined = False",
        "defined = None",
    ): "the variable is only read as a condition",
    (
        "attnzoo/conformance/dropout_check.py",
        "random = torch.Generator().manual_seed(0)",
        "random = torch.Generator().manual_seed(1)",
    ): "the check of a gradient along a random direction is valid for every seed",
}
# A measured limit of ``auto``, below which the model's code is faster.
_LIMIT = re.compile(r"\bLimit\(\d+, [\d_]+")
# A call of cached_per_forward (called ``once`` in some modules) with the name of the cached value.
_CACHED = re.compile(r'(?P<start>\b(?:cached_per_forward|once)\([\w.]+, )"(?P<name>\w+)"')


def reason_for_equivalence(mutant: Mutant) -> str | None:
    """Return why a mutant is equivalent to the original, or None if it is not known to be."""
    return (
        EQUIVALENT.get((mutant.path, mutant.before, mutant.after))
        or _renamed_cache_entry(mutant)
        or _moved_limit(mutant)
    )


def _moved_limit(mutant: Mutant) -> str | None:
    """Return a reason if the mutant only changes a measured number of ``attnzoo.auto.rule.LIMITS``."""
    if mutant.path == "attnzoo/auto/rule.py" and _LIMIT.sub("", mutant.before) == _LIMIT.sub("", mutant.after):
        return "a limit is a measurement; it decides which of two equal results is computed, and changes the speed"
    return None


def _renamed_cache_entry(mutant: Mutant) -> str | None:
    """Return a reason if the mutant only renames a value of ``SiteAttend.cached_per_forward``.

    With another name, sites still share the value, or compute it again.
    """
    if (call := _CACHED.search(mutant.before)) is None:
        return None
    name = call["name"]
    for renamed in (f'"XX{name}XX"', f'"{name.upper()}"', f'"{name.lower()}"', "None"):
        if mutant.after == _CACHED.sub(rf"\g<start>{renamed}", mutant.before, count=1):
            return "the name of a cached value only decides which sites share the value"
    return None
