"""What every family has in common: dropout, scales, learned biases, weights and counts, at every one of its sites."""

from functools import partial

import pytest
import torch

import attnzoo
from attnzoo import BackendRefusedError
from attnzoo.patching.sites import find_sites
from tests.models.test_attentions import real_rows, weights_of
from tests.support.judge import logits_of
from tests.support.models import FAMILIES, gpt_bigcode, ids

RATE = 0.25
families = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
with_dropout = pytest.mark.parametrize("family", [family for family in FAMILIES.values() if family.dropouts], ids=str)
learned_bias = pytest.mark.parametrize(
    "family", [family for family in FAMILIES.values() if "longt5" in family.name], ids=str
)


def sites_of(model):
    """Return the attention modules of a model by name."""
    return {target.label: target.module for target in find_sites(model) if target.point.attends}


def observed(handle):
    """Return a list that receives the name of the site and the attention of every later call."""
    seen = []
    for site in handle.sites:
        site.observer = lambda site, attention, result, backend: seen.append((site.name, attention))
    return seen


def kinds_of(patterns):
    """Return the types of patterns, and whether a full pattern is that of cross-attention."""
    return {(type(pattern).__name__, getattr(pattern, "cross", None)) for pattern in patterns}


def built(family):
    return family.build(), family.inputs(37, "right")


def with_cross_attention():
    """Build a GPTBigCode with cross-attention, and inputs."""
    inputs = dict(input_ids=ids(2, 5), encoder_hidden_states=torch.randn(2, 6, 32))
    return gpt_bigcode(add_cross_attention=True, multi_query=False), inputs


@pytest.mark.parametrize(
    "build",
    [*(partial(built, family) for family in FAMILIES.values()), with_cross_attention],
    ids=[*FAMILIES, "gpt_bigcode-cross"],
)
def test_the_patterns_that_run_were_declared(build):
    """Refusals before a call, approximate backends and ``auto`` decide by ``PatchPoint.requests``."""
    model, inputs = build()
    with attnzoo.patch(model, "eager") as handle, torch.no_grad():
        seen = observed(handle)
        model(**inputs)
    targets = {target.label: target for target in find_sites(model)}
    for name, attention in seen:
        point, module = targets[name].point, targets[name].module
        declared = [segment.pattern for request in point.requests(module) for segment in request.segments]
        assert kinds_of(segment.pattern for segment in attention.segments) <= kinds_of(declared), name
    assert {name for name, _ in seen} == set(sites_of(model))


# Dropout


@with_dropout
def test_a_backend_without_dropout_is_refused_at_every_site_in_training(family, add_backend):
    fake = add_backend("without-dropout", dropout=False)
    model = family.build(**dict.fromkeys(family.dropouts, RATE)).train()
    with pytest.raises(BackendRefusedError) as caught:
        attnzoo.patch(model, "without-dropout")
    assert list(caught.value.refusals) == list(sites_of(model))
    assert {reason.field for reasons in caught.value.refusals.values() for reason in reasons} == {"dropout"}
    with attnzoo.patch(model.eval(), "without-dropout") as handle:
        model.train()
        with pytest.raises(BackendRefusedError, match=r"dropout: got True; allowed: dropout=0\.0"):
            model(**family.inputs(24, "none"))
        assert not fake.runs and not any(site.calls for site in handle.sites)
    attnzoo.patch(family.build().train(), "without-dropout").remove()


@with_dropout
def test_attentions_have_the_dropout_rate_of_the_model_in_training_only(family):
    model, inputs = family.build(**dict.fromkeys(family.dropouts, RATE)), family.inputs(24, "left")
    with attnzoo.patch(model, "eager") as handle, torch.no_grad():
        for training in (True, False):
            seen = observed(handle)
            model.train(training)(**inputs)
            assert {name for name, _ in seen} == set(sites_of(model))
            assert {attention.dropout for _, attention in seen} == {RATE if training else 0.0}


@families
def test_weights_are_returned_after_dropout_where_the_original_does_so(family):
    """Weights before dropout sum to 1 in each row. Dropped weights do not."""
    model, inputs = family.build(**dict.fromkeys(family.dropouts, RATE)).train(), family.inputs(24, "none")
    if family.name not in ("reformer", "led", "longformer"):
        model.set_attn_implementation("eager")

    def sums():
        tensors = weights_of(model(**inputs, output_attentions=True))
        return {name: bool((tensor.sum(-1) - 1).abs().max() > 0.01) for name, tensor in tensors.items()}

    expected = sums()
    with attnzoo.patch(model, "eager"):
        assert sums() == expected and expected


@families
@pytest.mark.parametrize("requested_by", ["argument", "config"])
def test_weights_equal_the_originals(family, requested_by):
    side = "none" if family.name == "reformer" else "right"
    model, inputs = family.build().double(), family.inputs(21 if "longt5" in family.name else 24, side)
    if family.name not in ("reformer", "led", "longformer"):
        model.set_attn_implementation("eager")

    options = dict(output_attentions=True) if requested_by == "argument" else {}
    if requested_by == "config":
        for part in model.modules():
            if hasattr(part, "config"):
                part.config.output_attentions = True

    def weights():
        return weights_of(model(**inputs, **options))

    with torch.no_grad():
        expected = weights()
        with attnzoo.patch(model, "eager"):
            got = weights()
        with (
            attnzoo.patch(model, "sdpa"),
            pytest.raises(BackendRefusedError, match="attention probabilities: got True"),
        ):
            weights()
    assert got.keys() == expected.keys() and expected
    for name, weight in expected.items():
        assert got[name].shape == weight.shape, name
        rows = 1 if family.name == "reformer" else real_rows(name, weight, inputs)  # Reformer's rows are sorted
        difference = ((got[name] - weight) * rows).abs().max()
        assert difference < 1e-5, f"{name}: {difference}"  # float64 models, too, use a float32 softmax


# Scales


def scaled(family):
    return any(hasattr(module, "scaling") for module in sites_of(family.build()).values())


@pytest.mark.parametrize("family", [family for family in FAMILIES.values() if scaled(family)], ids=str)
@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_each_layer_has_the_scale_of_its_module(family, backend):
    model, inputs = family.build(), family.inputs(24, "left")
    modules = {name: module for name, module in sites_of(model).items() if hasattr(module, "scaling")}
    for number, module in enumerate(modules.values()):
        module.scaling *= 0.5 + 0.25 * number
    with torch.no_grad():
        expected = logits_of(model, inputs)
        with attnzoo.patch(model, backend) as handle:
            seen = observed(handle)
            got = logits_of(model, inputs)
    scales = {name: attention.scale for name, attention in seen if name in modules}
    assert scales == {name: module.scaling for name, module in modules.items()}
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("change", [{}, {"scale_attn_weights": False}], ids=["scaled", "not scaled"])
def test_self_and_cross_attention_of_gpt_bigcode_follow_scale_attn_weights(change):
    model = gpt_bigcode(add_cross_attention=True, multi_query=False, **change)
    with attnzoo.patch(model, "eager") as handle, torch.no_grad():
        seen = observed(handle)
        model(input_ids=ids(2, 5), encoder_hidden_states=torch.randn(2, 6, 32))
    assert [attention.scale for _, attention in seen] == [1.0 if change else 16**-0.5] * 4


# Learned biases


@learned_bias
def test_a_backend_that_trains_no_bias_runs_without_gradients(family, add_backend):
    fake = add_backend("without-bias-gradient", bias_grad=False)
    model, inputs = family.build(), family.inputs(24, "left")
    with torch.no_grad():
        expected = logits_of(model, inputs)
    with attnzoo.patch(model, "without-bias-gradient") as handle:
        for training in (False, True):
            with torch.no_grad():
                got = logits_of(model.train(training), inputs)
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
        assert [site.calls for site in handle.sites] == [2] * len(handle.sites)
        assert any(segment.bias is not None for attention in fake.runs for segment in attention.segments)
        with pytest.raises(BackendRefusedError, match="bias: got values that require grad"):
            logits_of(model.eval(), inputs)
        assert [site.calls for site in handle.sites] == [2] * len(handle.sites)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("relative_attention_bias" not in name)
        logits_of(model, inputs).sum().backward()
        assert [site.calls for site in handle.sites] == [3] * len(handle.sites)


@learned_bias
def test_each_bias_table_that_trains_is_refused(family, add_backend):
    """Every table counts: those of the encoder, of its global blocks and of the decoder."""
    add_backend("without-bias-gradient", bias_grad=False)
    model = family.build().train()
    tables = [name for name, _ in model.named_parameters() if "relative_attention_bias" in name]
    assert len(tables) == (3 if "tglobal" in family.name else 2)
    for table in tables:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name == table)
        with pytest.raises(BackendRefusedError) as caught:
            attnzoo.patch(model, "without-bias-gradient")
        assert {name.split(".")[0] for name in caught.value.refusals} == {table.split(".")[0]}
        assert len(caught.value.refusals) == 2  # both layers of the stack use the table


# Counts


@families
def test_every_site_counts_the_attentions_that_its_backend_computed(family):
    model, inputs = family.build(), family.inputs(24, "left")
    runs = {name: 0 for name in sites_of(model)}
    with attnzoo.patch(model, "sdpa") as handle, torch.no_grad():
        seen = observed(handle)
        for number in (1, 2):
            model(**inputs)
            for name, _ in seen:
                runs[name] += 1
            seen.clear()
            assert {site.name: site.calls for site in handle.sites} == runs and all(runs.values()), number
        assert {site.fallbacks for site in handle.sites} == {0}


@families
def test_a_call_of_one_module_counts_at_its_site_only(family):
    model, inputs = family.build(), family.inputs(24, "left")
    inputs |= {} if family.name == "longformer" else dict(use_cache=False)
    given = {}
    with torch.no_grad(), attnzoo.patch(model, "eager") as handle:
        hooks = [
            module.register_forward_pre_hook(
                lambda module, args, kwargs: given.setdefault(module, (args, kwargs)) and None, with_kwargs=True
            )
            for module in sites_of(model).values()
        ]
        model(**inputs)
        for hook in hooks:
            hook.remove()
        for name, module in sites_of(model).items():
            before = {site.name: site.calls for site in handle.sites}
            args, kwargs = given[module]
            module(*args, **kwargs)
            assert {site.name for site in handle.sites if site.calls > before[site.name]} == {name}


@families
def test_mixed_calls_count_fallbacks_and_kernels_separately(family):
    """sdpa refuses probabilities, so each of these calls falls back once per site and counts no kernel."""
    model, inputs = family.build(), family.inputs(24, "none")
    with torch.no_grad(), attnzoo.patch(model, "sdpa", fallback="native") as handle:
        model(**inputs)
        once = {site.name: site.calls for site in handle.sites}
        assert {site.fallbacks for site in handle.sites} == {0}
        model(**inputs, output_attentions=True)
        model(**inputs, output_attentions=True)
        assert {site.name: site.calls for site in handle.sites} == once
        model(**inputs)
        assert {site.name: (site.calls, site.fallbacks) for site in handle.sites} == {
            name: (2 * count, 2) for name, count in once.items()
        }


def test_a_refusal_without_a_right_original_counts_no_fallback(add_backend):
    """transformers' cross-attention of GPTBigCode is wrong, so nothing falls back to it."""
    add_backend("without-probabilities", probabilities=False)
    model = gpt_bigcode(add_cross_attention=True, multi_query=False)
    model.set_attn_implementation("eager")
    given = dict(input_ids=ids(2, 5), encoder_hidden_states=torch.randn(2, 6, 32))
    with attnzoo.patch(model, {"*crossattention": "without-probabilities"}, fallback="native") as handle:
        with pytest.raises(BackendRefusedError, match="probabilities"):
            model(**given, output_attentions=True)
        assert {(site.calls, site.fallbacks) for site in handle.sites} == {(0, 0)}
        model(**given)
        assert {(site.calls, site.fallbacks) for site in handle.sites} == {(1, 0)}
