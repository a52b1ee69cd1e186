"""The plug-in's own tests, as its authors would write them: run where it is installed (``tests/test_plugin.py``)."""

import pytest
import torch
from transformers import GPTNeoConfig, GPTNeoForCausalLM

import attnzoo
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
    made = GPTNeoForCausalLM(config)
    for parameter in made.parameters():  # far from uniform attention, or a lost mask goes unseen
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=1.5 * parameter.shape[1] ** -0.5)
    return made.eval()


@pytest.fixture
def inputs():
    mask = torch.ones(3, 21, dtype=torch.long)
    mask[1, :6], mask[2, 15:] = 0, 0
    return dict(input_ids=torch.randint(3, 99, (3, 21)), attention_mask=mask)


def test_backend_and_adapter_are_found():
    info = attnzoo.backends()["tiled"]
    assert info.available and info.exact and info.aliases == ("online-softmax",) and info.options == ("tile",)
    assert "gpt_neo" in registry.model_types()


def test_the_support_matrix_has_them():
    page = matrix_text.markdown(matrix.families(("gpt_neo",)))
    assert "**GPTNeoSelfAttention**: causal, local" in page
    assert "| `tiled` | `cpu` [" in page


def test_the_backend_conforms():
    """Every case the kit knows: what is declared runs and agrees with the oracle, what is not is refused."""
    report = attnzoo.testing.check_backend("tiled")
    ran = [outcome.case for outcome in report.outcomes if not outcome.refused]
    assert {case.dtype for case in ran} == {torch.float64, torch.float32, torch.bfloat16, torch.float16}
    assert not any(case.dropout or case.probabilities for case in ran)


def test_the_backend_conforms_on_tiles_that_fit_nothing():
    backend = attnzoo.configure("tiled", tile=7)
    for case in attnzoo.testing.cases((torch.float32,)):
        if case.mask != "none" and case.kv_heads == 2 and case.q_len < 100:
            assert not attnzoo.testing.run_case(backend, case).failure


@pytest.mark.parametrize("tile", [0, -1, 2.5, True])
def test_an_option_that_makes_no_sense_is_refused(tile):
    with pytest.raises(attnzoo.InvalidArgumentError, match=r"tile: got .*; allowed: a positive integer"):
        attnzoo.configure("tiled", tile=tile)


@pytest.mark.parametrize("backend", ["tiled", "sdpa", "eager", "auto"])
def test_the_model_computes_the_same(model, inputs, backend):
    report = attnzoo.verify(model, inputs, backend)
    assert report.ok, str(report)
    assert len({site.name for site in report.sites}) == 2


def test_the_backend_serves_a_model_of_attnzoo(inputs):
    from transformers import LEDConfig, LEDForConditionalGeneration

    config = LEDConfig(
        vocab_size=99, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, attention_window=[8],
        max_encoder_position_embeddings=64, max_decoder_position_embeddings=64, dropout=0.0,
    )  # fmt: skip
    globals_ = torch.zeros_like(inputs["input_ids"])
    globals_[:, 7] = 1
    whole = dict(**inputs, global_attention_mask=globals_, decoder_input_ids=inputs["input_ids"][:, :5])
    report = attnzoo.verify(LEDForConditionalGeneration(config), whole, "tiled", tile=4)
    assert report.ok, str(report)


def test_sites_say_what_they_are_and_what_ran(model, inputs):
    with attnzoo.patch(model, "tiled", tile=4) as handle:
        model(**inputs)
    assert [site.pattern for site in handle.sites] == ["causal, global", "causal, local"]
    assert [(site.backend, site.kernel, site.calls) for site in handle.sites] == [("tiled", "tiled", 1)] * 2


def test_generation_gives_the_original_tokens(model):
    prompt = dict(input_ids=torch.randint(3, 99, (2, 9)), max_new_tokens=12, do_sample=False)
    tokens = model.generate(**prompt)
    with attnzoo.patch(model, "tiled"):
        assert torch.equal(model.generate(**prompt), tokens)


def test_what_the_backend_cannot_do_is_refused_or_falls_back(model, inputs):
    own = model(**inputs).logits
    with attnzoo.patch(model, "tiled"), pytest.raises(attnzoo.BackendRefusedError, match="attention probabilities"):
        model(**inputs, output_attentions=True)
    with attnzoo.patch(model, "eager"):
        shown = model(**inputs, output_attentions=True).attentions
    assert [tuple(weights.shape) for weights in shown] == [(3, 4, 21, 21)] * 2
    with attnzoo.patch(model, "tiled", fallback="native") as handle:
        assert torch.equal(model(**inputs, output_attentions=True).logits, own)
    assert [(site.calls, site.fallbacks) for site in handle.sites] == [(0, 1)] * 2
    model.train()
    model.transformer.h[0].attn.attention.attn_dropout.p = 0.1
    with pytest.raises(attnzoo.BackendRefusedError, match=r"dropout: got requested; allowed: dropout=0\.0"):
        attnzoo.patch(model, "tiled")
