"""`from_pretrained(..., attn_implementation=NAME)` and every other way of building a model."""

import pytest
import tokenizers
import torch
import transformers

import attnzoo
from tests.checkpoints.train import HERE, RECIPES
from tests.support.checkpoints import load, passage
from tests.support.compare import is_close
from tests.support.installed import FAMILIES, backends_of, logits, no_weights_loaded, ran
from tests.support.models import longformer

EAGER_ONLY = ("led", "longt5", "pegasus_x", "bigbird_pegasus", "reformer")


@pytest.fixture(autouse=True)
def install():
    attnzoo.install()


@pytest.mark.parametrize("family", EAGER_ONLY)
def test_sdpa_runs_on_families_for_which_transformers_refuses_it(family):
    model = load(family, attn_implementation="sdpa")
    assert ran(family, model) <= {"flash_cpu", "math_blocks", "math", "flash"}
    assert backends_of(model) == {"sdpa"}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("name", "backend"), [("attnzoo/sdpa", "sdpa"), ("auto", "auto"), ("attnzoo/native", "native")]
)
def test_every_family_gives_the_results_of_the_original(family, name, backend):
    model = load(family, torch.float64, attn_implementation=name)
    assert backends_of(model) == {backend}
    assert ran(family, model)
    attnzoo.uninstall()
    real = slice(None) if family in ("led", "longt5") else slice(0, 1)  # the second text ends with padding
    assert is_close(logits(family, model)[real], logits(family, load(family, torch.float64))[real])


@pytest.mark.parametrize("family", FAMILIES)
def test_attnzoo_eager_runs_eager_of_attnzoo(family):
    assert ran(family, load(family, attn_implementation="attnzoo/eager")) == {"eager"}


@pytest.mark.parametrize(("alias", "backend"), [("flex", "flex_attention"), ("attnzoo/flex", "flex_attention")])
def test_aliases_are_accepted(alias, backend):
    assert backends_of(load("led", attn_implementation=alias)) == {backend}


def test_transformers_does_not_look_for_our_names_on_the_hub(monkeypatch):
    """For transformers, a/b is the kernel b of the user a."""

    def download(*args, **kwargs):
        raise AssertionError("transformers asked the hub")

    monkeypatch.setattr("transformers.modeling_utils.lazy_import_flash_attention", download)
    with pytest.raises(AssertionError, match="the hub"):
        load("led", attn_implementation="some-user/attention")
    assert backends_of(load("led", attn_implementation="attnzoo/sdpa")) == {"sdpa"}
    with pytest.raises(attnzoo.UnknownNameError):
        load("led", attn_implementation="attnzoo/flashy")


def test_options_may_follow_the_name():
    model = load("gpt_neox", attn_implementation="blocked-local:window=16,sinks=2")
    ran("gpt_neox", model)
    assert {site.approximate for site in attnzoo.handle(model).sites} == {"window of 16 keys and 2 sinks"}


@pytest.mark.parametrize("family", FAMILIES)
def test_eager_stays_transformers_own_on_every_family(family):
    model = load(family, attn_implementation="eager")
    assert not attnzoo.is_patched(model)
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize(
    ("family", "name"), [("gpt_neox", "sdpa"), ("gpt_bigcode", "sdpa"), ("gpt_neox", "flex_attention")]
)
def test_a_name_that_transformers_serves_on_the_model_stays_its_own(family, name):
    model = load(family, attn_implementation=name)
    assert not attnzoo.is_patched(model)
    assert model.config._attn_implementation == name


@pytest.mark.parametrize("family", FAMILIES)
def test_without_a_request_nothing_changes(family):
    model = load(family)
    assert not attnzoo.is_patched(model)
    assert type(model.config._attn_implementation) is str
    assert "attnzoo" not in str(model.config)


# What is refused


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["flash_attention_2", "attnzoo/flash", "xformers"])
@pytest.mark.skipif(torch.cuda.is_available(), reason="the backends may run with CUDA")
def test_a_refusal_lists_reasons_and_alternatives_before_weights_are_loaded(family, name):
    with (
        no_weights_loaded(),
        pytest.raises(attnzoo.BackendRefusedError, match=r"backends that support it: .*'sdpa'") as caught,
    ):
        load(family, attn_implementation=name)
    assert "availability: got" in str(caught.value) and "device: got cpu; allowed: cuda" in str(caught.value)
    assert len(caught.value.refusals) == len(attnzoo.patch(load(family), "eager").sites)


def test_a_dtype_is_refused_before_weights_are_loaded(add_backend):
    add_backend("single", dtypes=frozenset({torch.float32}))
    assert backends_of(load("led", attn_implementation="single")) == {"single"}
    with no_weights_loaded(), pytest.raises(attnzoo.BackendRefusedError, match="dtype: got bfloat16; allowed: float32"):
        load("led", dtype=torch.bfloat16, attn_implementation="single")


@pytest.mark.parametrize("name", ["attnzoo/spda", "attnzoo/", "attnzoo/attnzoo/sdpa", "attnzoo/kernels-community/x"])
def test_an_unknown_name_of_ours_is_refused_before_weights_are_loaded(name):
    with (
        no_weights_loaded(),
        pytest.raises(attnzoo.UnknownNameError, match=r"attn_implementation: got .*; allowed: 'auto', 'blocked-local'"),
    ):
        load("led", attn_implementation=name)


def test_a_misspelled_name_gets_a_suggestion():
    with (
        no_weights_loaded(),
        pytest.raises(attnzoo.UnknownNameError, match=r"got 'spda' \(did you mean 'sdpa'\?\)") as caught,
    ):
        load("led", attn_implementation="spda")
    assert "is not supported. The only possible arguments" in str(caught.value.__cause__)


@pytest.mark.parametrize("name", ["blocked-local:windw=3", "blocked-local:window", "lsh:window=3"])
def test_a_wrong_option_is_refused_before_weights_are_loaded(name):
    with no_weights_loaded(), pytest.raises(attnzoo.InvalidArgumentError, match=r"option|name:option=value"):
        load("gpt_neox", attn_implementation=name)


def test_missing_options_are_refused_before_weights_are_loaded():
    with (
        no_weights_loaded(),
        pytest.raises(attnzoo.BackendRefusedError, match=r"options: got no value for window; allowed: window=\.\.\."),
    ):
        load("gpt_neox", attn_implementation="blocked-local")


@pytest.mark.parametrize("name", ["attnzoo/sdpa", "blocked-local"])
def test_a_family_without_adapter_is_refused_by_name(name):
    config = transformers.BloomConfig(vocab_size=9, hidden_size=8, n_head=2, n_layer=1)
    with pytest.raises(attnzoo.PatchError, match="got BloomModel of model type bloom, but no adapter"):
        transformers.BloomModel._from_config(config, attn_implementation=name)


@pytest.mark.parametrize(("name", "options"), [("attnzoo/sdpa", ""), ("blocked-local", ":window=4,sinks=1")])
def test_a_model_of_another_family_runs_the_named_backend_if_it_calls_the_interface(name, options):
    config = transformers.LlamaConfig(vocab_size=9, hidden_size=8, num_attention_heads=2, num_hidden_layers=1)
    model = transformers.LlamaModel._from_config(config, attn_implementation=name + options).eval()
    with torch.no_grad():
        model(torch.arange(8)[None])
    (site,) = attnzoo.handle(model).sites
    assert (site.backend, site.calls) == (name.removeprefix("attnzoo/"), 1)


def test_names_that_nobody_knows_are_transformers_error():
    with pytest.raises(ValueError, match=r"is not supported. The only possible arguments") as caught:
        load("led", attn_implementation="something-else")
    assert not isinstance(caught.value, attnzoo.AttnzooError)


@pytest.mark.parametrize("family", EAGER_ONLY)
def test_without_install_a_foreign_name_is_transformers_error(family):
    attnzoo.uninstall()
    for name in ("sdpa", "blocked-local", "flex"):
        with pytest.raises(ValueError, match=r"not supported|does not support"):
            load(family, attn_implementation=name)


# Every route


def led_config(name=None):
    config = transformers.LEDConfig.from_pretrained(HERE / "led")
    if name is not None:
        config._attn_implementation = name
    return config


def tokenizer():
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 3, "?": 4}, unk_token="?"))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="a")


ROUTES = {
    "auto class": lambda name: transformers.AutoModelForSeq2SeqLM.from_pretrained(
        HERE / "led", attn_implementation=name
    ),
    "given config": lambda name: transformers.LEDModel.from_pretrained(HERE / "led", config=led_config(name)),
    "auto config": lambda name: transformers.AutoModel.from_pretrained(
        HERE / "led", config=transformers.AutoConfig.from_pretrained(HERE / "led", attn_implementation=name)
    ),
    "from_config": lambda name: transformers.AutoModel.from_config(led_config(), attn_implementation=name),
    "from_config of the config": lambda name: transformers.AutoModel.from_config(led_config(name)),
    "constructor": lambda name: transformers.LEDModel(led_config(name)),
    "config keyword": lambda name: transformers.LEDModel(
        transformers.LEDConfig(**{**led_config().to_dict(), "attn_implementation": name})
    ),
    "pipeline": lambda name: (
        transformers.pipeline(
            "text-generation", str(HERE / "gpt_neox"), tokenizer=tokenizer(), model_kwargs={"attn_implementation": name}
        ).model
    ),
    "loading info": lambda name: transformers.LEDModel.from_pretrained(
        HERE / "led", attn_implementation=name, output_loading_info=True
    )[0],
}


@pytest.mark.parametrize("route", ROUTES.values(), ids=ROUTES)
def test_every_route_patches(route):
    model = route("attnzoo/sdpa")
    assert backends_of(model) == {"sdpa"}
    assert {site.name for site in attnzoo.handle(model).sites} == {
        name for name, module in model.named_modules() if type(module).__name__ in SITES
    }


SITES = ("LEDEncoderSelfAttention", "LEDDecoderAttention", "GPTNeoXAttention")


@pytest.mark.parametrize("route", ROUTES.values(), ids=ROUTES)
def test_every_route_refuses(route):
    with pytest.raises(Exception, match="did you mean 'sdpa'"):
        route("attnzoo/spda")


def test_longformer():
    config = longformer().config
    config._attn_implementation = "sdpa"
    assert backends_of(transformers.LongformerForMaskedLM(config)) == {"sdpa"}


def test_the_handle_is_that_of_a_patch():
    """Sites, kernels and counts are the same as after `attnzoo.patch`."""
    model, other = load("led", attn_implementation="sdpa"), load("led")
    handle = attnzoo.patch(other, "sdpa")
    logits("led", model), logits("led", other)
    assert str(attnzoo.handle(model)) == str(handle)
    attnzoo.unpatch(model)
    assert not attnzoo.is_patched(model)
    attnzoo.unpatch(other)
    assert torch.equal(logits("led", model), logits("led", other))


def test_a_model_in_training_mode_is_checked_in_the_call(add_backend):
    """A program may switch a new model to inference, so the plan assumes inference."""
    add_backend("forward-only", grad=False)
    model = transformers.AutoModelForSeq2SeqLM.from_config(led_config(), attn_implementation="forward-only")
    assert model.training and all(module.training for module in model.modules())
    with pytest.raises(attnzoo.BackendRefusedError, match="grad"):
        model(**passage("led"))
    assert ran("led", model.eval()) == {"forward-only-kernel"}


def test_every_family_is_tested():
    assert set(FAMILIES) == set(RECIPES)
