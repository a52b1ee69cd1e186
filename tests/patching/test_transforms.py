"""Patched models under ``torch.func`` compute what the originals compute: gradients, tangents, batches.

Attentions without a model are tested in ``tests/properties/test_transforms.py``.
"""

import inspect
from functools import partial
from operator import itemgetter

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacfwd, jacrev, jvp
from torch.utils._pytree import tree_leaves, tree_map

import attnzoo
from attnzoo.patching.mask_arguments import check_visibility
from attnzoo.spec.masks import read_attention_mask
from attnzoo.spec.patterns import Full
from tests.support import compare
from tests.support.models import FAMILIES, gpt_neox, longformer, longt5, reformer

# LED draws a number for each layer, in older releases of transformers in eval mode too.
vmap = partial(torch.func.vmap, randomness="same")
is_close = partial(compare.is_close, tolerance=2e-4)
backends = pytest.mark.parametrize("backend", ["eager", "sdpa"])
MASKS = ("attention_mask", "decoder_attention_mask", "global_attention_mask")
NAMES = [name for name in FAMILIES if name != "reformer"]  # its reversible layers support no transform: see below


def build(name):
    """A model in float32 with the masks of ``eager``, the only implementation with all derivatives."""
    model = FAMILIES[name].build()
    if name.startswith("gpt"):
        model.set_attn_implementation("eager")
    return model


def inputs_of(name):
    """Three samples, two with padding; in LED and Longformer with 0, 1 and 2 global tokens."""
    return FAMILIES[name].inputs(21, "right")


def call(model, parameters=None, **inputs):
    """Logits of real tokens, and zeros for padding; with the given parameters."""
    if "use_cache" in inspect.signature(model.forward).parameters:
        inputs["use_cache"] = False
    logits = (model(**inputs) if parameters is None else functional_call(model, parameters, (), inputs))[0]
    real = inputs.get("decoder_attention_mask", inputs.get("attention_mask"))
    return logits if real is None else logits * real[..., None]


def parameters_of(model):
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def embedded(model, inputs):
    """The embeddings of the token ids, and the other inputs."""
    embeddings = model.get_input_embeddings()(inputs["input_ids"]).detach()
    return embeddings, {name: tensor for name, tensor in inputs.items() if name != "input_ids"}


def direction(tensor):
    return torch.randn(tensor.shape, generator=torch.Generator().manual_seed(3))


def single(sample):
    return {name: tensor[None] for name, tensor in sample.items()}


def gradients(model, inputs):
    return grad(lambda parameters: call(model, parameters, **inputs).square().mean())(parameters_of(model))


def tangent(model, inputs):
    embeddings, rest = embedded(model, inputs)
    return jvp(lambda given: call(model, inputs_embeds=given, **rest), (embeddings,), (direction(embeddings),))


def tangent_of_dual_numbers(model, inputs):
    embeddings, rest = embedded(model, inputs)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(embeddings, direction(embeddings))
        return tuple(forward_ad.unpack_dual(call(model, inputs_embeds=dual, **rest)))


def tangent_without_graph(model, inputs):
    with torch.no_grad():
        return tangent(model, inputs)


def jacobian(model, inputs):
    embeddings, rest = embedded(model, inputs)

    def mean_logits(scale):
        return call(model, inputs_embeds=embeddings * scale, **rest).mean((0, 1))[:5]

    return jacrev(mean_logits)(torch.ones(()))


def curvature(model, inputs):
    embeddings, rest = embedded(model, inputs)

    def loss(scale):
        return call(model, inputs_embeds=embeddings * scale, **rest).square().mean()

    return jacfwd(jacrev(loss), randomness="same")(torch.ones(()))


def looped(function, in_dims=(0,)):
    """Compute what ``vmap`` computes with a loop, for models in which ``vmap`` fails."""

    def run(*arguments):
        mapped = [argument for argument, dim in zip(arguments, in_dims, strict=True) if dim is not None]
        count = len(tree_leaves(mapped)[0])
        results = []
        for number in range(count):
            pairs = zip(arguments, in_dims, strict=True)
            results.append(function(*(one if dim is None else tree_map(itemgetter(number), one) for one, dim in pairs)))
        return tree_map(lambda *parts: torch.stack(parts), *results)

    return run


def batch_under_one_mask(model, inputs, vmap=vmap):
    embeddings, rest = embedded(model, inputs)
    rest = {name: tensor[1:2] for name, tensor in rest.items()}
    return vmap(lambda given: call(model, inputs_embeds=given[None], **rest))(embeddings)


def batch_with_masks(model, inputs):
    embeddings, rest = embedded(model, inputs)
    return vmap(lambda sample: call(model, **single(sample)))({**rest, "inputs_embeds": embeddings})


def gradients_per_sample(model, inputs, masks=MASKS):
    """Return gradients per sample. All samples share the tensors named in ``masks``. The others differ by sample."""
    embeddings, rest = embedded(model, inputs)
    shared = {name: tensor[1:2] for name, tensor in rest.items() if name in masks}
    mapped = {"inputs_embeds": embeddings, **{name: rest[name] for name in rest if name not in masks}}

    def loss(parameters, sample):
        return call(model, parameters, **single(sample), **shared).square().mean()

    return vmap(grad(loss), in_dims=(None, 0))(parameters_of(model), mapped)


def ensemble(model, inputs, vmap=vmap):
    parameters = parameters_of(model)
    both = {name: torch.stack([tensor, tensor * 0.9]) for name, tensor in parameters.items()}
    return vmap(lambda one: call(model, one, **inputs))(both)


LEGS = {
    leg.__name__: leg
    for leg in (
        *(gradients, tangent, tangent_of_dual_numbers, tangent_without_graph, jacobian, curvature),
        *(batch_under_one_mask, batch_with_masks, gradients_per_sample, ensemble),
    )
}
LEGS["gradients_per_sample_with_masks"] = partial(gradients_per_sample, masks=())
# Models whose own code reads the masks: under vmap it fails before any attention module is called.
READS_MASKS = ("led", "longformer", "longt5-local", "longt5-tglobal", "pegasus_x")
# The original's own attention fails under vmap where there are global tokens.
SLICES_BY_COUNT = ("led", "longformer")
# The original's own block-sparse attention fails under vmap.
WRITES_IN_PLACE = ("bigbird", "bigbird_pegasus")
MAPPED = (
    *(
        "batch_under_one_mask",
        "batch_with_masks",
        "ensemble",
        "gradients_per_sample",
        "gradients_per_sample_with_masks",
    ),
)


def flat(result):
    return torch.cat([leaf.flatten() for leaf in tree_leaves(result) if leaf is not None])


@pytest.mark.parametrize("leg", LEGS)
@pytest.mark.parametrize("name", NAMES)
def test_a_patched_model_computes_what_the_original_computes(name, leg):
    model, inputs, run = build(name), inputs_of(name), LEGS[leg]
    if name in WRITES_IN_PLACE and leg in MAPPED:
        with pytest.raises(RuntimeError, match="vmap: inplace"):
            run(model, inputs)
        return
    if leg.endswith("with_masks") and name in READS_MASKS:
        with pytest.raises(RuntimeError, match="vmap"):
            run(model, inputs)
        return
    if leg in ("batch_under_one_mask", "ensemble") and name in SLICES_BY_COUNT:
        with pytest.raises(RuntimeError, match="narrow"):
            run(model, inputs)
        expected = flat(run(model, inputs, looped))
    else:
        expected = flat(run(model, inputs))
    for backend in ("eager", "sdpa", "auto"):
        with attnzoo.patch(model, backend) as handle:
            got = flat(run(model, inputs))
            assert all(site.calls for site in handle.sites)
        assert is_close(got, expected), backend


def test_models_loaded_with_sdpa_with_and_without_a_mask():
    """Models loaded with sdpa get other masks than with eager, and the model's own kernels support no tangents."""
    reference, model, inputs = build("gpt_neox"), gpt_neox(), inputs_of("gpt_neox")
    assert model.config._attn_implementation == "sdpa"
    with pytest.raises(NotImplementedError, match="forward AD"):
        tangent(model, inputs)
    for given in (inputs, {"input_ids": inputs["input_ids"]}):
        expected = flat([leg(reference, given) for leg in (gradients, tangent, curvature)])
        for backend in ("eager", "sdpa"):
            with attnzoo.patch(model, backend):
                got = flat([leg(model, given) for leg in (gradients, tangent, curvature)])
            assert is_close(got, expected), backend


# Modules in models that do not support transforms, or that read the masks themselves


@backends
@pytest.mark.parametrize("kind", ["local", "transient-global"])
def test_the_encoder_of_longt5_supports_a_mask_per_sample(kind, backend):
    model, inputs = longt5("LongT5EncoderModel", kind=kind), FAMILIES["longt5-local"].inputs(21, "right")
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    expected = batch_with_masks(model, inputs)
    with attnzoo.patch(model, backend):
        assert is_close(batch_with_masks(model, inputs), expected)


def longformer_attention():
    """A model, and arguments of its attention modules: states, and a mask that hides padding."""
    model = longformer("LongformerModel")
    real = FAMILIES["longformer"].inputs(24, "right")["attention_mask"]
    mask = torch.where(real == 0, -1e4, 0.0)
    return model, torch.randn(3, 24, 32, generator=torch.Generator().manual_seed(4)), mask


def run_longformer(module, states, mask, has_globals=False):
    marks = dict(is_index_masked=mask[None] < 0, is_index_global_attn=mask[None] > 0, is_global_attn=has_globals)
    return module(states[None], attention_mask=mask[None], **marks)[0] * (mask >= 0)[:, None]


@backends
def test_the_attention_of_longformer_supports_padding_per_sample(backend):
    model, states, mask = longformer_attention()
    module = model.encoder.layer[0].attention.self
    expected = vmap(partial(run_longformer, module))(states, mask)
    with attnzoo.patch(model, backend):
        assert is_close(vmap(partial(run_longformer, module))(states, mask), expected)
        mask[1, 0] = mask[2, 3] = 1e4
        with pytest.raises(attnzoo.InvalidArgumentError, match=r"is_index_global_attn: got .*, which vmap maps over"):
            vmap(partial(run_longformer, module, has_globals=True))(states, mask)


@backends
@pytest.mark.parametrize("number", [0, 1], ids=["local", "lsh"])
def test_the_attention_of_reformer_supports_transforms(number, backend):
    """The model's reversible layers and its own LSH attention support no transform: the reference is a loop."""
    model, inputs = reformer(), FAMILIES["reformer"].inputs(20, "right")
    module = model.reformer.encoder.layers[number].attention.self_attention
    states, mask = torch.randn(3, 20, 16, generator=torch.Generator().manual_seed(4)), inputs["attention_mask"]

    def run(states, mask):
        return module(hidden_states=states, attention_mask=mask).hidden_states * mask[..., None]

    def legs(by_vmap):
        batch = by_vmap(lambda given: run(given[None], mask[1:2]))(states)
        along = jvp(lambda given: run(given, mask), (states,), (direction(states),))[1]
        return batch, grad(lambda given: run(given, mask).square().sum())(states), along

    def by_definition():
        leaf = states.clone().requires_grad_()
        gradient = torch.autograd.grad(run(leaf, mask).square().sum(), leaf)[0]
        along = torch.autograd.functional.jvp(lambda given: run(given, mask), states, direction(states))[1]
        return looped(lambda given: run(given[None], mask[1:2]))(states), gradient, along

    with pytest.raises(RuntimeError, match="setup_context"):
        gradients(model, inputs)
    with attnzoo.patch(model, "eager"):
        expected = by_definition()
    if number == 0:
        assert all(map(is_close, legs(vmap), expected))
    else:
        with pytest.raises(RuntimeError, match="setup_context"):
            grad(lambda given: run(given, mask).square().sum())(states)
    with attnzoo.patch(model, backend):
        assert all(map(is_close, legs(vmap), expected))
        with torch.no_grad():
            assert is_close(vmap(lambda given: run(given[None], mask[1:2]))(states), expected[0])
        if number:
            with pytest.raises(attnzoo.InvalidArgumentError, match=r"attention_mask: got .*, which vmap maps over"):
                vmap(lambda given, one: run(given[None], one[None]), randomness="same")(states, mask)


# Refusals


@pytest.mark.parametrize(
    ("leg", "transform"), [(gradients, "grad"), (tangent_of_dual_numbers, "jvp"), (batch_with_masks, "vmap")]
)
def test_a_backend_without_transforms_refuses_them_before_the_call(leg, transform):
    model, inputs = build("gpt_neox"), inputs_of("gpt_neox")
    expected = flat(leg(model, inputs))
    options = dict(num_hashes=2, chunk_length=8, num_buckets=4)
    with attnzoo.patch(model, "lsh", **options) as handle:
        with pytest.raises(attnzoo.BackendRefusedError) as error:
            leg(model, inputs)
        assert f"torch.func transform: got {transform}; allowed: none" in str(error.value)
        assert "'sdpa', 'eager'" in str(error.value)
        assert handle.sites[0].name in str(error.value)
        assert not any(site.calls for site in handle.sites)
    with attnzoo.patch(model, "lsh", fallback="native", **options) as handle:
        assert torch.equal(flat(leg(model, inputs)), expected)
        assert all(site.fallbacks and not site.calls for site in handle.sites)


def test_blocked_local_refuses_vmap_because_it_reads_masks():
    model, inputs = build("gpt_neox"), inputs_of("gpt_neox")
    with attnzoo.patch(model, "blocked-local", window=64):
        expected = gradients(model, inputs)
        with pytest.raises(attnzoo.BackendRefusedError, match="got vmap; allowed: functionalize, grad, jvp"):
            batch_with_masks(model, inputs)
    assert is_close(flat(expected), flat(gradients(model, inputs)))


def test_capabilities_declare_transforms():
    transforms = {name: info.capabilities.transforms for name, info in attnzoo.backends().items() if info.capabilities}
    assert transforms["eager"] == transforms["sdpa"] == {"grad", "vmap", "jvp", "functionalize"}
    assert not transforms["flash_attention_2"]


# Values that cannot be read


def test_nan_in_a_mask_under_vmap_reaches_the_output():
    masks = torch.zeros(2, 1, 1, 4, 4)
    masks[1, ..., 2, 3] = float("nan")
    masks[:, ..., 0, 1] = float("-inf")
    read = []

    def attend(query, mask):
        read.append(read_attention_mask(mask, (1, 4, 4)))
        return attnzoo.attention(query, query, query, read[-1].pattern, read[-1].bias.values, mask=read[-1].mask)

    output = vmap(attend)(torch.randn(2, 1, 1, 4, 8), masks)
    assert isinstance(read[0].pattern, Full)
    assert output[0].isfinite().all()
    assert output[1, ..., 2, :].isnan().all()
    assert output[1, ..., [0, 1, 3], :].isfinite().all()


@backends
def test_vmap_supports_global_keys_per_sample(backend):
    query = torch.randn(3, 1, 2, 12, 8, generator=torch.Generator().manual_seed(4))
    chosen = torch.zeros(3, 1, 12, dtype=torch.bool)
    chosen[1, 0, 5] = chosen[2, 0, [1, 9]] = True

    def run(query, chosen):
        return attnzoo.attention(query, query, query, attnzoo.Window(2, 2), backend=backend, global_keys=chosen)

    assert is_close(vmap(run)(query, chosen), looped(run, (0, 0))(query, chosen))


def test_an_ambiguous_mask_of_numbers_is_refused_under_vmap():
    def check(mask):
        return check_visibility("encoder_attention_mask", mask, 1, 5, mask.device, 1)

    with pytest.raises(attnzoo.InvalidArgumentError, match=r"encoder_attention_mask: .*under vmap; .* a bool mask"):
        vmap(check)(torch.ones(2, 1, 5))
    assert vmap(check)(torch.ones(2, 1, 5, dtype=torch.bool)).all()


def test_sdpa_uses_the_kernel_that_has_the_derivatives():
    """The fused kernel runs only under a single ``grad`` and without a mask. In all other cases, ``math`` runs."""
    model, inputs = build("gpt_neox"), inputs_of("gpt_neox")
    unmasked = {"input_ids": inputs["input_ids"]}
    model.set_attn_implementation("sdpa")
    kernels = (unmasked, gradients, "flash"), (unmasked, tangent, "math"), (inputs, gradients, "math")
    for given, leg, kernel in kernels:
        with attnzoo.patch(model, "sdpa") as handle:
            leg(model, given)
            assert {site.kernel for site in handle.sites} == {kernel}
