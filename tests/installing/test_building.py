"""`install` and models that are built in parts, without data, in quantised form, or by a subclass."""

import copy

import accelerate
import pytest
import torch
import transformers
from torch import nn
from transformers import LEDConfig, LEDForConditionalGeneration, LEDModel, PreTrainedModel

import attnzoo
from tests.checkpoints.train import HERE
from tests.support.checkpoints import load
from tests.support.installed import backends_of, logits, ran
from tests.support.models import gpt_neox, led_config

LED = HERE / "led"


@pytest.fixture(autouse=True)
def install():
    attnzoo.install()


def requesting(name, config=None):
    config = led_config() if config is None else config
    config._attn_implementation = name
    return config


# Without data


def test_a_model_on_the_meta_device_is_patched_and_loaded_later():
    plain = load("led")
    with torch.device("meta"):
        model = LEDForConditionalGeneration(requesting("sdpa", copy.deepcopy(plain.config))).eval()
    assert backends_of(model) == {"sdpa"}
    model.load_state_dict(plain.state_dict(), assign=True)
    model.tie_weights()
    assert ran("led", model)
    attnzoo.patch(plain, "sdpa")
    assert torch.equal(logits("led", model), logits("led", plain))


def test_a_call_without_data_is_refused():
    with torch.device("meta"):
        model = transformers.GPTNeoXModel(requesting("attnzoo/sdpa", gpt_neox().config))
        with pytest.raises(attnzoo.BackendRefusedError, match="device: got meta; allowed: cpu"):
            model(torch.ones(1, 5, dtype=torch.long))


def test_accelerate_loads_a_model_that_was_built_empty(tmp_path):
    plain = load("led")
    plain.save_pretrained(tmp_path)
    with accelerate.init_empty_weights():
        model = LEDForConditionalGeneration(requesting("sdpa", copy.deepcopy(plain.config)))
    model.tie_weights()
    accelerate.load_checkpoint_and_dispatch(model, str(tmp_path / "model.safetensors"), device_map={"": "cpu"})
    assert ran("led", model.eval())
    attnzoo.patch(plain, "sdpa")
    assert torch.equal(logits("led", model), logits("led", plain))


def test_patch_still_refuses_a_model_without_data():
    with torch.device("meta"):
        model = LEDModel(led_config())
    with pytest.raises(attnzoo.PatchError, match="got a parameter on the meta device"):
        attnzoo.patch(model, "sdpa")


# Options of from_pretrained


@pytest.mark.parametrize(
    "device_map", ["auto", "cpu", {"": "cpu"}, {"led.shared": "cpu", "led": "cpu", "lm_head": "cpu"}]
)
def test_device_map(device_map):
    model = load("led", attn_implementation="sdpa", device_map=device_map)
    assert ran("led", model)
    assert torch.equal(logits("led", model), logits("led", load("led", attn_implementation="sdpa")))


def test_weights_on_disk(tmp_path):
    others = ("shared", "encoder.embed_tokens", "encoder.embed_positions", "encoder.layernorm_embedding", "decoder")
    device_map = {f"led.{name}": "cpu" for name in others} | {"lm_head": "cpu", "final_logits_bias": "cpu"}
    device_map["led.encoder.layers"] = "disk"
    model = load("led", attn_implementation="sdpa", device_map=device_map, offload_folder=tmp_path)
    assert model.led.encoder.layers[0].self_attn.longformer_self_attn.query.weight.is_meta
    assert backends_of(model) == {"sdpa"}
    assert ran("led", model)
    assert torch.equal(logits("led", model), logits("led", load("led", attn_implementation="sdpa")))


@pytest.mark.parametrize("dtype", ["auto", "bfloat16", torch.bfloat16, torch.float64])
@pytest.mark.parametrize("keyword", ["dtype", "torch_dtype"])
def test_dtype(dtype, keyword):
    model = LEDForConditionalGeneration.from_pretrained(LED, attn_implementation="sdpa", **{keyword: dtype})
    assert model.dtype == (torch.float64 if dtype == torch.float64 else torch.bfloat16)  # the checkpoint is in bfloat16
    assert ran("led", model)


class Int8Linear(nn.Linear):
    """A linear layer with weights of 8 bits, as quantisation makes."""

    def __init__(self, linear):
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = nn.Parameter(torch.zeros_like(linear.weight, dtype=torch.int8), requires_grad=False)
        self.bias = linear.bias

    def forward(self, states):
        return nn.functional.linear(states, self.weight.to(states.dtype) / 64, self.bias)


def quantise(model):
    """Replace the linear layers, as quantisers of transformers do before the weights are loaded."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Linear and "lm_head" not in name:
                setattr(module, name, Int8Linear(child))


@pytest.mark.parametrize("family", ["led", "longt5"])
def test_layers_that_a_quantiser_replaces(family):
    """In a quantised LongT5, only the relative bias of the attention is floating-point."""
    from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
    from transformers.utils.quantization_config import QuantizationConfigMixin

    @register_quantization_config("int8-of-tests")
    class Config(QuantizationConfigMixin):
        def __init__(self, **kwargs):
            self.quant_method = "int8-of-tests"

    @register_quantizer("int8-of-tests")
    class Quantiser(HfQuantizer):
        requires_calibration = False

        def _process_model_before_weight_loading(self, model, **kwargs):
            quantise(model)

        def _process_model_after_weight_loading(self, model, **kwargs):
            return model

        is_trainable = property(lambda self: False)

        def is_serializable(self, **kwargs):
            return True

    plain = load(family)
    state = {
        name: (tensor * 64).round().to(torch.int8) if is_quantised(plain, name) else tensor
        for name, tensor in plain.state_dict().items()
    }
    try:
        models = [
            type(plain)
            .from_pretrained(
                None,
                config=plain.config,
                state_dict=dict(state),
                quantization_config=Config(),
                attn_implementation=name,
            )
            .eval()
            for name in ("sdpa", "eager")
        ]
    finally:
        del AUTO_QUANTIZATION_CONFIG_MAPPING["int8-of-tests"], AUTO_QUANTIZER_MAPPING["int8-of-tests"]
    model, original = models
    assert any(isinstance(module, Int8Linear) for module in model.modules())
    assert ran(family, model) and not attnzoo.is_patched(original)
    torch.testing.assert_close(logits(family, model), logits(family, original), rtol=1e-4, atol=1e-4)


def is_quantised(model, name):
    owner, _, parameter = name.rpartition(".")
    return parameter == "weight" and type(model.get_submodule(owner)) is nn.Linear and owner != "lm_head"


# Subclasses, as code on the hub defines them


class RemoteConfig(LEDConfig):
    model_type = "remote-led"


class RemoteModel(LEDForConditionalGeneration):
    config_class = RemoteConfig

    def __init__(self, config):
        super().__init__(config)
        self.adapter = nn.Linear(config.d_model, config.d_model)
        self.post_init()


class Changed(RemoteModel):
    """A subclass that replaces a layer after the constructor of the base class."""

    def __init__(self, config):
        super().__init__(config)
        self.led.decoder.layers[0] = type(self.led.decoder.layers[0])(config, layer_idx=0)
        self.post_init()


@pytest.mark.parametrize("cls", [RemoteModel, Changed])
@pytest.mark.parametrize("default", [None, "sdpa"])
def test_a_subclass_with_another_model_type(cls, default, tmp_path):
    attnzoo.install(default)
    model = cls(requesting(None if default else "sdpa", RemoteConfig(**led_config().to_diff_dict())))
    assert len(attnzoo.handle(model).sites) == 6
    assert all("forward" in vars(module) for name, module in model.named_modules() if name.endswith("encoder_attn"))
    model.save_pretrained(tmp_path)
    assert len(attnzoo.handle(cls.from_pretrained(tmp_path)).sites) == 6


def test_a_model_whose_attention_is_its_own_is_refused():
    class Attention(transformers.models.led.modeling_led.LEDDecoderAttention):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    class Own(RemoteModel):
        def __init__(self, config):
            super().__init__(config)
            self.led.decoder.layers[0].self_attn = Attention(32, 4, is_decoder=True, layer_idx=0)
            self.post_init()

    with pytest.raises(attnzoo.DriftError, match=r"overrides LEDDecoderAttention.forward"):
        Own(requesting("sdpa", RemoteConfig(**led_config().to_diff_dict())))


class NoPostInit(PreTrainedModel):
    """A model that never calls `post_init` itself."""

    config_class = LEDConfig

    def __init__(self, config):
        super().__init__(config)
        self.first, self.second = LEDModel(config), LEDModel(config)


def test_parts_of_a_model_without_post_init_are_patched():
    model = NoPostInit(requesting("sdpa"))
    assert backends_of(model.first) == backends_of(model.second) == {"sdpa"}


def test_models_in_a_plain_module_are_patched_alone():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = LEDModel(requesting("sdpa")), LEDModel(led_config())

    model = Pair()
    assert (backends_of(model.first), backends_of(model.second)) == ({"sdpa"}, set())


def test_a_constructor_that_failed_does_not_matter_later():
    class Fails(LEDForConditionalGeneration):
        def __init__(self, config):
            super().__init__(config)
            failed.append(self)
            raise KeyError

        def later(self):
            self.post_init()

    failed = []
    with pytest.raises(KeyError):
        Fails(requesting("sdpa"))
    assert backends_of(LEDModel(requesting("sdpa"))) == {"sdpa"}


# Composite models


def composite_config(encoder="longformer", implementation=None):
    """An encoder-decoder model. Longformer has an adapter of its family, BERT has only the generic adapter."""
    sizes = dict(vocab_size=99, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    longformer = transformers.LongformerConfig(
        **sizes, attention_window=[8], max_position_embeddings=64, pad_token_id=1
    )
    bert = transformers.BertConfig(**sizes, is_decoder=True, add_cross_attention=True)
    parts = longformer if encoder == "longformer" else transformers.BertConfig(**sizes), bert
    config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(*parts)
    if implementation is not None:
        config._attn_implementation = implementation
    return config


def test_one_part_of_a_composite_model(tmp_path):
    config = composite_config(implementation={"encoder": "sdpa", "decoder": "eager"})
    model = transformers.EncoderDecoderModel(config).eval()
    assert {site.name for site in attnzoo.handle(model).sites} == {"encoder.encoder.layer.0.attention.self"}
    assert model.decoder.config._attn_implementation == "eager"
    model.save_pretrained(tmp_path)
    loaded = transformers.EncoderDecoderModel.from_pretrained(tmp_path).eval()
    assert backends_of(loaded) == {"sdpa"}
    inputs = dict(input_ids=torch.arange(20)[None] + 3, decoder_input_ids=torch.arange(5)[None] + 3)
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
    assert {site.kernel for site in attnzoo.handle(loaded).sites} != {None}


def test_a_name_for_a_whole_composite_model_is_for_all_parts():
    model = transformers.EncoderDecoderModel(composite_config(implementation="attnzoo/sdpa"))
    assert {site.name.partition(".")[0] for site in attnzoo.handle(model).sites} == {"encoder", "decoder"}


def test_the_smallest_part_around_a_module_decides():
    names = {"": "attnzoo/sdpa", "encoder": "attnzoo/eager", "decoder": "eager"}
    assert backends_of(transformers.EncoderDecoderModel(composite_config(implementation=names))) == {"eager"}


def test_a_name_that_reaches_no_module_is_refused():
    class Wrapper(PreTrainedModel):
        config_class = RemoteConfig

        def __init__(self, config):
            super().__init__(config)
            self.led = LEDModel(led_config())
            self.post_init()

    with pytest.raises(attnzoo.PatchError, match=r"got .sdpa. for Wrapper, whose attention modules belong to parts"):
        Wrapper(requesting("sdpa", RemoteConfig()))
    names = {"": "attnzoo/sdpa", "encoder": "eager", "decoder": "eager"}
    with pytest.raises(attnzoo.PatchError, match="got 'sdpa' for EncoderDecoderModel"):
        transformers.EncoderDecoderModel(composite_config(implementation=names))


def test_a_default_is_for_the_parts_of_a_family_with_an_adapter():
    attnzoo.install("sdpa")
    model = transformers.EncoderDecoderModel(composite_config())
    assert {site.name for site in attnzoo.handle(model).sites} == {"encoder.encoder.layer.0.attention.self"}
    model = transformers.EncoderDecoderModel(composite_config("bert"))
    assert not attnzoo.is_patched(model)


def test_a_composite_model_of_loaded_parts(tmp_path):
    built = transformers.EncoderDecoderModel(composite_config())
    built.encoder.save_pretrained(tmp_path / "encoder")
    built.decoder.save_pretrained(tmp_path / "decoder")
    model = transformers.EncoderDecoderModel.from_encoder_decoder_pretrained(
        tmp_path / "encoder", tmp_path / "decoder", encoder_attn_implementation="sdpa"
    )
    assert backends_of(model) == {"sdpa"}
    model.set_attn_implementation({"encoder": "attnzoo/eager"})
    assert backends_of(model) == {"eager"}
    model.set_attn_implementation({"encoder": "eager", "decoder": "sdpa"})
    assert not attnzoo.is_patched(model)
    assert (model.encoder.config._attn_implementation, model.decoder.config._attn_implementation) == ("eager", "sdpa")
    model.set_attn_implementation("attnzoo/sdpa")
    assert {site.name.partition(".")[0] for site in attnzoo.handle(model).sites} == {"encoder", "decoder"}


def test_a_part_that_a_user_patched_keeps_its_patches():
    model = transformers.EncoderDecoderModel(composite_config(implementation={"encoder": "sdpa"}))
    encoder = model.encoder
    attnzoo.unpatch(model)
    encoder.set_attn_implementation("sdpa")
    handle = attnzoo.patch(encoder, "eager")
    whole = transformers.EncoderDecoderModel(encoder=encoder, decoder=model.decoder)
    assert backends_of(whole) == {"eager"} and handle.active
    attnzoo.unpatch(encoder)
    assert backends_of(whole) == {"sdpa"}
    again = transformers.EncoderDecoderModel(encoder=encoder, decoder=model.decoder)
    attnzoo.unpatch(again)  # one patch of the whole model has replaced the patch of the part
    assert not attnzoo.is_patched(encoder)


def test_the_other_parts_are_patched_beside_a_part_that_a_user_patched():
    encoder = transformers.LongformerModel(requesting("sdpa", composite_config().encoder))
    user = attnzoo.patch(encoder, "eager")
    sizes = dict(vocab_size=99, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=2)
    config = transformers.GPTBigCodeConfig(**sizes, add_cross_attention=True, multi_query=False)
    decoder = transformers.GPTBigCodeForCausalLM(requesting("attnzoo/sdpa", config))
    attnzoo.unpatch(decoder)  # the configuration still requests sdpa
    whole = transformers.EncoderDecoderModel(encoder=encoder, decoder=decoder)
    assert {site.name.partition(".")[0] for site in attnzoo.handle(whole).sites} == {"decoder"}
    assert user.active and backends_of(encoder) == {"eager"}
