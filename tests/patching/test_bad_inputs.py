"""Bad input to ``attnzoo.attention`` raises ``argument: got ...; allowed: ...``, and each test checks the message.

Bad input to models is tested in ``test_bad_inputs_to_models.py``.
"""

from __future__ import annotations

import re

import pytest
import torch

import attnzoo
from attnzoo import AttnzooError, BackendRefusedError, Causal, Chunks, InvalidArgumentError, Window

NAN = float("nan")


def call(backend="auto", pattern=None, **changes):
    """A valid call with some arguments changed."""
    generator = torch.Generator().manual_seed(0)
    arguments = dict(
        q=torch.randn(2, 4, 6, 8, generator=generator),
        k=torch.randn(2, 2, 7, 8, generator=generator),
        v=torch.randn(2, 2, 7, 8, generator=generator),
        pattern=Window(2, 2) if pattern is None else pattern,
        backend=backend,
    )
    return attnzoo.attention(**{**arguments, **changes})


def test_the_call_without_changes_is_valid():
    assert call().shape == (2, 4, 6, 8)


def zeros(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


def with_nan(*shape):
    mask = torch.zeros(shape)
    mask.view(-1)[1] = NAN
    return mask


Q = r"\bq(uery)?\b"
K = r"\bk(ey)?\b"
V = r"\bv(alue)?\b"
FLOATS = r"float64.*float32.*bfloat16.*float16"

BAD = {
    # wrong rank
    "q of rank 3": (dict(q=zeros(4, 6, 8)), Q, r"\(4, 6, 8\), float32 on cpu", r"\(batch, heads, length, head_dim\)"),
    "q of rank 5": (dict(q=zeros(1, 2, 4, 6, 8)), Q, r"\(1, 2, 4, 6, 8\)", r"\(batch, heads, length, head_dim\)"),
    "q a scalar": (dict(q=torch.tensor(1.0)), Q, r"\(\), float32", r"\(batch, heads, length, head_dim\)"),
    "k of rank 3": (dict(k=zeros(2, 7, 8)), K, r"\(2, 7, 8\)", r"\(batch, heads, length, head_dim\)"),
    "v of rank 2": (dict(v=zeros(7, 8)), V, r"\(7, 8\)", r"\(batch, heads, length, head_dim\)"),
    "v a list": (dict(v=[1.0]), V, r"list \[1\.0\]", r"a tensor of shape \(batch, heads, length, head_dim\)"),
    "k None": (dict(k=None), K, "None", r"a tensor of shape \(batch, heads, length, head_dim\)"),
    # heads, batch, head_dim
    "heads no multiple": (dict(k=zeros(2, 3, 7, 8), v=zeros(2, 3, 7, 8)), f"{K} heads", "3", "a divisor of .* 4"),
    "more key heads": (dict(k=zeros(2, 8, 7, 8), v=zeros(2, 8, 7, 8)), f"{K} heads", "8", "a divisor of .* 4"),
    "v of other heads": (dict(v=zeros(2, 4, 7, 8)), V, r"\(2, 4, 7, 8\)", r"\(2, 2, 7\) \+ \(value_dim,\)"),
    "k of another batch": (dict(k=zeros(3, 2, 7, 8)), f"{K} batch", "3", "2, like the query"),
    "v of another batch": (dict(v=zeros(1, 2, 7, 8)), f"{V} batch", "1", "2, like the query"),
    "k of another head_dim": (dict(k=zeros(2, 2, 7, 16)), f"{K} head_dim", "16", "8, like the query"),
    "v of another length": (dict(v=zeros(2, 2, 9, 8)), V, r"\(2, 2, 9, 8\)", r"\(2, 2, 7\) \+ \(value_dim,\)"),
    # dtype
    "k of another dtype": (dict(k=zeros(2, 2, 7, 8).half()), f"{K} dtype", "torch.float16", "torch.float32, like"),
    "v of another dtype": (dict(v=zeros(2, 2, 7, 8).double()), f"{V} dtype", "torch.float64", "torch.float32, like"),
    "integers": (dict(q=zeros(2, 4, 6, 8).long()), f"{Q} dtype", "torch.int64", FLOATS),
    "complex": (dict(q=zeros(2, 4, 6, 8) + 0j), f"{Q} dtype", "torch.complex64", FLOATS),
    # empty
    "no queries": (dict(q=zeros(2, 4, 0, 8)), Q, r"\(2, 4, 0, 8\)", "at least 1"),
    "no keys": (dict(k=zeros(2, 2, 0, 8), v=zeros(2, 2, 0, 8)), K, r"\(2, 2, 0, 8\)", "at least 1"),
    "no samples": (dict(q=zeros(0, 4, 6, 8)), Q, r"\(0, 4, 6, 8\)", "at least 1"),
    "no head_dim": (dict(q=zeros(2, 4, 6, 0)), Q, r"\(2, 4, 6, 0\)", "at least 1"),
    "no value_dim": (dict(v=zeros(2, 2, 7, 0)), V, r"\(2, 2, 7, 0\)", "at least 1"),
    # dropout
    "dropout 1": (dict(dropout=1.0), "dropout", r"1\.0", r"a probability in \[0, 1\)"),
    "dropout below 0": (dict(dropout=-0.1), "dropout", r"-0\.1", r"a probability in \[0, 1\)"),
    "dropout nan": (dict(dropout=NAN), "dropout", "nan", r"a probability in \[0, 1\)"),
    "dropout a string": (dict(dropout="0.1"), "dropout", "0.1", r"a probability in \[0, 1\)"),
    # scale
    "scale nan": (dict(scale=NAN), "scale", "nan", "finite"),
    "scale a string": (dict(scale="1"), "scale", "1", "finite"),
    # pattern
    "pattern a string": (dict(pattern="causal"), "pattern", "'causal'", r"a pattern, e\.g\. attnzoo\.Causal\(\)"),
    "pattern a class": (dict(pattern=Causal), "pattern", "Causal", r"a pattern, e\.g\. attnzoo\.Causal\(\)"),
    "chunks of unequal lengths": (dict(pattern=Chunks(4)), "pattern", "6 queries and 7 keys", "as many queries as k"),
    # masks
    "mask float": (dict(mask=zeros(2, 4, 6, 7)), "mask", r"\(2, 4, 6, 7\), float32", r"bool tensor .*6, 7"),
    "mask with NaN": (dict(mask=with_nan(2, 4, 6, 7)), "mask", "float32 on cpu, with NaN", "a bool tensor"),
    "mask of integers": (dict(mask=zeros(2, 4, 6, 7).long()), "mask", "int64", "bool tensor .*True: visible"),
    "mask of rank 2": (dict(mask=zeros(6, 7).bool()), "mask", r"\(6, 7\), bool", r"\(1, 1, 6, 7\)"),
    "mask of other lengths": (dict(mask=zeros(2, 4, 7, 6).bool()), "mask", r"\(2, 4, 7, 6\)", r"\(2, 4, 6, 7\)"),
    "mask of other heads": (dict(mask=zeros(2, 2, 6, 7).bool()), "mask", r"\(2, 2, 6, 7\)", r"\(2, 4, 6, 7\)"),
    "mask no tensor": (dict(mask=True), "mask", "bool True", "bool tensor .*True: visible"),
    "key_mask integers": (dict(key_mask=zeros(2, 7).long()), "key_mask", r"\(2, 7\), int64", r"bool tensor .*\(2, 7\)"),
    "key_mask with NaN": (dict(key_mask=with_nan(2, 7)), "key_mask", "with NaN", r"a bool tensor .*\(2, 7\)"),
    "key_mask of q_len": (dict(key_mask=zeros(2, 6).bool()), "key_mask", r"\(2, 6\), bool", r"\(2, 7\)"),
    "key_mask of batch 1": (dict(key_mask=zeros(1, 7).bool()), "key_mask", r"\(1, 7\), bool", r"\(2, 7\)"),
    "query_mask of kv_len": (dict(query_mask=zeros(2, 7).bool()), "query_mask", r"\(2, 7\), bool", r"\(2, 6\)"),
    "query_mask float": (dict(query_mask=zeros(2, 6)), "query_mask", r"float32", r"bool tensor .*\(2, 6\)"),
    "global_keys of q_len": (dict(global_keys=zeros(2, 6).bool()), "global_keys", r"\(2, 6\), bool", r"shape \(2, 7\)"),
    "global_keys integers": (dict(global_keys=zeros(2, 7).long()), "global_keys", "int64", r"bool .*shape \(2, 7\)"),
    "global_keys indices": (dict(global_keys=[0, 3]), "global_keys", r"list \[0, 3\]", r"bool .*shape \(2, 7\)"),
    "global_keys and mask": (
        dict(global_keys=zeros(2, 7).bool(), mask=zeros(1, 1, 6, 7).bool()),
        "global_keys", "together with mask or bias", "no mask and no bias",
    ),
    # bias
    "bias with NaN": (dict(bias=with_nan(1, 1, 6, 7)), "bias", r"float32 on cpu, with NaN", "finite.*mask="),
    "bias with -Inf": (dict(bias=zeros(1, 1, 6, 7) - torch.inf), "bias", "with NaN, Inf", "finite.*mask="),
    "bias beyond the dtype": (
        dict(bias=zeros(1, 1, 6, 7).double() - 1e300), "bias", "float64 on cpu, with .* outside the range of .*32",
        "finite values of torch.float32, like the query .*mask=",
    ),
    "bias of other lengths": (dict(bias=zeros(1, 4, 6, 6)), "bias", r"\(1, 4, 6, 6\)", r"\(1 or 2, 1 or 4, 6, 7\)"),
    "bias of rank 2": (dict(bias=zeros(6, 7)), "bias", r"\(6, 7\)", r"\(1 or 2, 1 or 4, 6, 7\)"),
    "bias a bool mask": (dict(bias=zeros(1, 1, 6, 7).bool()), "bias", "bool", "mask="),
    "bias no tensor": (dict(bias=[0.0]), "bias", r"\[0\.0\]", "RelativeBias"),
    "relative bias of other heads": (
        dict(bias=attnzoo.RelativeBias(zeros(3, 5), zero=2)), "bias", r"shape \(3, 5\), zero=2", r"\(1 or 4, R\)",
    ),
    "relative bias without a zero": (
        dict(bias=attnzoo.RelativeBias(zeros(4, 5), zero=5)), "bias", r"shape \(4, 5\), zero=5", r"0 <= zero < R",
    ),
    "relative bias with half a zero": (
        dict(bias=attnzoo.RelativeBias(zeros(4, 5), zero=2.0)), "bias", r"shape \(4, 5\), zero=2\.0", "an integer",
    ),
    "relative bias at half an offset": (
        dict(bias=attnzoo.RelativeBias(zeros(4, 5), zero=2, offset=0.5)), "bias offset", r"0\.5", "an integer, or None",
    ),
    "relative bias at a list of positions": (
        dict(bias=attnzoo.RelativeBias(zeros(4, 5), zero=2, positions=[1])), "bias positions", r"\[1\]", r"\(2, 6\)",
    ),
    "relative bias of integers": (
        dict(bias=attnzoo.RelativeBias(zeros(4, 5).long(), zero=2)), "bias values", "torch.int64", "floating-p",
    ),
    "relative bias of a list": (dict(bias=attnzoo.RelativeBias([0.0], zero=0)), "bias values", r"0\.0", "floating-p"),
    "dense bias a bool mask": (
        dict(bias=attnzoo.DenseBias(zeros(1, 1, 6, 7).bool())), "bias values", "torch.bool", "floating-point .*mask=",
    ),
    "dense bias of complex numbers": (
        dict(bias=attnzoo.DenseBias(zeros(1, 1, 6, 7) + 1j)), "bias values", "torch.complex64", "a floating-point",
    ),
    # devices
    "bias elsewhere": (dict(bias=zeros(1, 1, 6, 7).to("meta")), "bias device", "meta", "cpu, like the query"),
    "global_keys elsewhere": (
        dict(global_keys=zeros(2, 7).bool().to("meta")), "global_keys device", "meta", "cpu, like q",
    ),
    # names
    "native without a model": (dict(backend="native"), "backend", "'native', which is not a", "'eager'.*'sdpa'"),
    "a nested q": (
        dict(q=torch.nested.nested_tensor([zeros(4, 6, 8)], layout=torch.jagged)), Q, "a nested or s", "a dense tensor",
    ),
    "a sparse k": (dict(k=zeros(2, 2, 7, 8).to_sparse()), K, "a nested or sparse tensor", r"a dense tensor of shape"),
    "unknown backend": (dict(backend="spda"), "backend", r"'spda' .did you mean 'sdpa'", "'eager'.*'sdpa'"),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "argument", "got", "allowed"), BAD.values(), ids=BAD)
def test_a_bad_argument_raises_and_is_named(changes, argument, got, allowed):
    with pytest.raises(InvalidArgumentError, match=f"(?s){argument}.*: got .*{got}.*; allowed: .*{allowed}") as caught:
        call(**changes)
    assert isinstance(caught.value, AttnzooError)
    assert isinstance(caught.value, ValueError)
    assert (caught.value.argument, caught.value.got, caught.value.allowed) != ("", "", "")


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_bad_input_raises_before_a_backend_runs(backend):
    with pytest.raises(InvalidArgumentError, match="key heads: got 3"):
        call(backend, k=zeros(2, 3, 7, 8), v=zeros(2, 3, 7, 8))


def test_unknown_keyword_arguments_raise():
    with pytest.raises(TypeError, match="attn_mask"):
        call(attn_mask=zeros(2, 4, 6, 7).bool())


def test_a_pattern_that_no_backend_supports_is_refused():
    class Diagonal(attnzoo.Pattern):
        def mask_mod(self, q_len, kv_len):
            return lambda b, h, q, kv: q == kv

    with pytest.raises(BackendRefusedError, match=r"pattern: got .*Diagonal.*; allowed: Causal, .*Full, .*Wind"):
        call("sdpa", pattern=Diagonal())
    with pytest.raises(BackendRefusedError, match="pattern"):
        call(pattern=Diagonal())


def test_a_cuda_backend_refuses_cpu_tensors(add_backend):
    fake = add_backend("gpu", devices=frozenset({"cuda"}))
    with pytest.raises(BackendRefusedError, match="device: got cpu; allowed: cuda") as caught:
        call("gpu")
    assert re.search(r"backends that support it: 'sdpa'.*, 'eager'$", str(caught.value), re.M)
    assert not fake.runs


def test_tensors_on_a_device_that_no_backend_supports_are_refused():
    tensors = {name: zeros(1, 2, 3, 8).to("meta") for name in "qkv"}
    for backend in ("auto", "sdpa"):
        with pytest.raises(BackendRefusedError, match="device: got meta; allowed: cpu, cuda"):
            attnzoo.attention(**tensors, backend=backend)
