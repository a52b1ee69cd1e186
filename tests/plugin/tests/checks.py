"""Example tests that a plug-in should have. ``tests/test_plugin.py`` runs them on the installed plug-in."""

import itertools

import pytest
import torch
from transformers import GPTNeoConfig, GPTNeoForCausalLM
from typer.testing import CliRunner

import attnzoo
from attnzoo.cli.app import app
from attnzoo.registry import registry
from attnzoo.reporting import matrix, matrix_text


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = GPTNeoConfig(
        vocab_size=99, hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]],
        window_size=5, intermediate_size=48, max_position_embeddings=64, attention_dropout=0.0, resid_dropout=0.0,
        embed_dropout=0.0, bos_token_id=0, eos_token_id=2, pad_token_id=1,
    )  # fmt: skip
    model = GPTNeoForCausalLM(config)
    for parameter in model.parameters():  # with uniform attention, a missing mask would change nothing
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=1.5 * parameter.shape[1] ** -0.5)
    return model.eval()


@pytest.fixture
def inputs():
    mask = torch.ones(3, 21, dtype=torch.long)
    mask[1, :6], mask[2, 15:] = 0, 0
    return dict(input_ids=torch.randint(3, 99, (3, 21)), attention_mask=mask)


def test_entry_points_register_backend_and_adapter():
    info = attnzoo.backends()["tiled"]
    assert info.available and info.exact and info.aliases == ("online-softmax",) and info.options == ("tile",)
    assert "gpt_neo" in registry.model_types()


def test_support_matrix_lists_backend_and_adapter():
    page = matrix_text.markdown(matrix.families(("gpt_neo",)))
    assert "**GPTNeoSelfAttention**: causal, local" in page
    assert "| `tiled` | `cpu` [" in page


def test_doctor_lists_backend_and_adapter(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    output = CliRunner().invoke(app, ["doctor"]).output
    assert "tiled (also online-softmax)" in output and "GPTNeoSelfAttention; transformers 5.17 to 5.24" in output


def test_backend_passes_the_conformance_kit():
    """Declared requests run and agree with the oracle. The backend refuses all other requests.

    One code serves every dtype. So all cases run in float64, and a sample runs in each other dtype.
    """
    report = attnzoo.testing.check_backend("tiled", dtypes=(torch.float64,))
    ran = [outcome.case for outcome in report.outcomes if not outcome.refused]
    assert ran and not any(case.dropout or case.probabilities for case in ran)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_backend_passes_a_sample_of_the_kit(dtype):
    sample = itertools.islice(attnzoo.testing.cases((dtype,)), 0, None, 17)
    outcomes = [attnzoo.testing.run_case(attnzoo.configure("tiled"), case) for case in sample]
    assert not [f"{outcome.case}: {outcome.failure}" for outcome in outcomes if outcome.failure]
    assert sum(not outcome.refused for outcome in outcomes) > 10


def test_backend_conforms_with_a_tile_that_divides_no_length():
    backend = attnzoo.configure("tiled", tile=7)
    for case in attnzoo.testing.cases((torch.float32,)):
        if case.mask != "none" and case.kv_heads == 2 and case.q_len < 100:
            assert not attnzoo.testing.run_case(backend, case).failure


@pytest.mark.parametrize("tile", [0, -1, 2.5, True])
def test_backend_refuses_an_invalid_tile(tile):
    with pytest.raises(attnzoo.InvalidArgumentError, match=r"tile: got .*; allowed: an integer >= 1"):
        attnzoo.configure("tiled", tile=tile)


@pytest.mark.parametrize("backend", ["tiled", "sdpa", "eager", "auto"])
def test_patched_model_equals_the_original(model, inputs, backend):
    report = attnzoo.verify(model, inputs, backend)
    assert report.ok, str(report)
    assert len({site.name for site in report.sites}) == 2


def test_backend_serves_a_model_with_a_built_in_adapter(inputs):
    from transformers import LEDConfig, LEDForConditionalGeneration

    config = LEDConfig(
        vocab_size=99, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, attention_window=[8],
        max_encoder_position_embeddings=64, max_decoder_position_embeddings=64, dropout=0.0,
    )  # fmt: skip
    global_mask = torch.zeros_like(inputs["input_ids"])
    global_mask[:, 7] = 1
    led_inputs = dict(**inputs, global_attention_mask=global_mask, decoder_input_ids=inputs["input_ids"][:, :5])
    report = attnzoo.verify(LEDForConditionalGeneration(config), led_inputs, "tiled", tile=4)
    assert report.ok, str(report)


def test_sites_report_pattern_backend_and_kernel(model, inputs):
    with attnzoo.patch(model, "tiled", tile=4) as handle:
        model(**inputs)
    assert [site.pattern for site in handle.sites] == ["causal, global", "causal, local"]
    assert [(site.backend, site.kernel, site.calls) for site in handle.sites] == [("tiled", "tiled", 1)] * 2


def test_generation_returns_the_original_tokens(model):
    prompt = dict(input_ids=torch.randint(3, 99, (2, 9)), max_new_tokens=12, do_sample=False)
    tokens = model.generate(**prompt)
    with attnzoo.patch(model, "tiled"):
        assert torch.equal(model.generate(**prompt), tokens)


def test_unsupported_call_raises_or_falls_back(model, inputs):
    original = model(**inputs).logits
    with attnzoo.patch(model, "tiled"), pytest.raises(attnzoo.BackendRefusedError, match="attention probabilities"):
        model(**inputs, output_attentions=True)
    with attnzoo.patch(model, "eager"):
        attentions = model(**inputs, output_attentions=True).attentions
    assert [tuple(weights.shape) for weights in attentions] == [(3, 4, 21, 21)] * 2
    with attnzoo.patch(model, "tiled", fallback="native") as handle:
        assert torch.equal(model(**inputs, output_attentions=True).logits, original)
    assert [(site.calls, site.fallbacks) for site in handle.sites] == [(0, 1)] * 2
    model.train()
    model.transformer.h[0].attn.attention.attn_dropout.p = 0.1
    with pytest.raises(attnzoo.BackendRefusedError, match=r"dropout: got True; allowed: dropout=0\.0"):
        attnzoo.patch(model, "tiled")
