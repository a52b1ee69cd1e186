"""Whole models of drawn configurations agree with the oracle: lengths, padding, global tokens, and caches.

On CUDA, every backend runs in a drawn dtype. A backend may refuse a model, but only by name.
"""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, note, settings
from torch.utils._pytree import tree_map_only

import attnzoo
from tests.conftest import DEVICES
from tests.properties.conftest import EXCEPT_THE_ORACLE
from tests.support.models import (
    causal_inputs,
    gpt_bigcode,
    gpt_neox,
    led,
    led_inputs,
    longformer,
    longformer_inputs,
    longt5,
    longt5_inputs,
    reformer,
)

A_FEW = settings(max_examples=max(2, settings().max_examples // 30))
SIDES = st.sampled_from(["right", "none", "left", "sample"])
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# With a window of 2, the model's own code raises.
windows = st.sampled_from([8, 4, 6, 16])


@st.composite
def _led(draw):
    heads = draw(st.sampled_from([2, 1, 4]))
    window = draw(windows)
    changes = dict(encoder_layers=1, decoder_layers=1, encoder_attention_heads=heads, attention_window=[window])
    return led(**changes), led_inputs, dict(globals_=draw(st.sampled_from(["varying", "zero", "one", "all"])))


@st.composite
def _longformer(draw):
    changes = dict(num_hidden_layers=1, num_attention_heads=draw(st.sampled_from([2, 4])))
    kind = draw(st.sampled_from(["varying", "zero", "one", "all"]))
    return longformer(**changes, attention_window=[draw(windows)]), longformer_inputs, dict(globals_=kind)


@st.composite
def _longt5(draw):
    changes = dict(
        num_layers=1, num_decoder_layers=1, local_radius=draw(st.integers(1, 12)), num_heads=draw(st.integers(1, 3)),
        global_block_size=draw(st.sampled_from([4, 2, 5])), relative_attention_max_distance=draw(st.integers(9, 40)),
    )  # fmt: skip
    return longt5(kind=draw(st.sampled_from(["local", "transient-global"])), **changes), longt5_inputs, {}


@st.composite
def _reformer(draw):
    chunks = dict(
        lsh_attn_chunk_length=draw(st.sampled_from([4, 8])), local_attn_chunk_length=draw(st.sampled_from([4, 3, 8])),
        lsh_num_chunks_before=draw(st.integers(0, 2)), local_num_chunks_before=draw(st.integers(0, 2)),
    )  # fmt: skip
    changes = dict(num_hashes=draw(st.integers(1, 3)), num_buckets=draw(st.sampled_from([8, 4, [2, 4]])))
    return reformer(attn_layers=draw(st.sampled_from([["lsh"], ["local"]])), **chunks, **changes), causal_inputs, {}


@st.composite
def _gpt_neox(draw):
    heads = draw(st.sampled_from([2, 1, 4]))
    return gpt_neox(num_hidden_layers=1, num_attention_heads=heads), causal_inputs, {}


@st.composite
def _gpt_bigcode(draw):
    heads = draw(st.sampled_from([2, 1, 4]))
    return gpt_bigcode(n_layer=1, n_head=heads, multi_query=draw(st.booleans())), causal_inputs, {}


MODELS = {
    "led": _led(),
    "longformer": _longformer(),
    "longt5": _longt5(),
    "reformer": _reformer(),
    "gpt_neox": _gpt_neox(),
    "gpt_bigcode": _gpt_bigcode(),
}
# Without gradients in a compiler that takes minutes, flex_attention stays out, as in conftest.py.
ON_A_CARD = [name for name in (*EXCEPT_THE_ORACLE, "auto") if name != "flex_attention"]
SUBJECTS = [
    ("cpu", "sdpa"),
    *(pytest.param("cuda", name, marks=DEVICES[1].marks) for name in ON_A_CARD),
]
subjects = pytest.mark.parametrize(("device", "backend"), SUBJECTS)


@A_FEW
@given(data=st.data(), length=st.integers(2, 70), side=SIDES)
@pytest.mark.parametrize("family", MODELS)
@subjects
def test_models_agree_with_the_oracle_forward_and_backward(family, device, backend, data, length, side):
    model, inputs, more = data.draw(MODELS[family])
    dtype = data.draw(st.sampled_from(DTYPES)) if device == "cuda" else torch.float32
    note(f"{model.config}")
    model, given_inputs = model.to(device, dtype), _on(device, inputs(length, side, **more))
    try:
        report = attnzoo.verify(model, given_inputs, backend)
    except attnzoo.BackendRefusedError:
        assert device == "cuda", "sdpa computes every family on the CPU"
        return
    assert report.ok, str(report)


@A_FEW
@given(data=st.data(), length=st.integers(1, 30), side=st.sampled_from(["left", "none"]), beams=st.sampled_from([1, 2]))
@pytest.mark.parametrize("family", ["led", "longt5", "gpt_neox", "gpt_bigcode"])
@subjects
def test_cached_generation_gives_the_tokens_of_the_original(family, device, backend, data, length, side, beams):
    """Weights are spread, so two tokens are rarely equally likely."""
    model, inputs, more = data.draw(MODELS[family])
    prompt = {
        name: value
        for name, value in inputs(length, side, **more).items()
        if not name.startswith("decoder_")  # generate makes these
    }
    model, prompt = model.to(device), _on(device, prompt)
    options = dict(do_sample=False, num_beams=beams, min_new_tokens=4, max_new_tokens=4)
    expected = model.generate(**prompt, **options)
    try:
        with attnzoo.patch(model, backend):
            tokens = model.generate(**prompt, **options)
    except attnzoo.BackendRefusedError:
        assert device == "cuda", "sdpa computes every family on the CPU"
        return
    assert torch.equal(tokens, expected)


def _on(device, inputs):
    return tree_map_only(torch.Tensor, lambda tensor: tensor.to(device), inputs)
