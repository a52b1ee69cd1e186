"""Names for backends with options."""

import pytest
import torch

import attnzoo
from tests.support.checkpoints import load
from tests.support.fake_backends import fake_backend
from tests.support.installed import backends_of, inputs_of, logits, ran


@pytest.fixture
def short():
    return attnzoo.register_variant("short", "blocked-local", window=16, sinks=2)


def test_a_variant_is_a_configured_backend(short):
    assert short == attnzoo.configure("blocked-local", window=16, sinks=2) == attnzoo.configure("short")


def test_a_variant_works_in_patch(short):
    model, other = load("gpt_neox"), load("gpt_neox")
    attnzoo.patch(model, backend="short")
    attnzoo.patch(other, backend="blocked-local", window=16, sinks=2)
    assert torch.equal(logits("gpt_neox", model), logits("gpt_neox", other))
    assert [str(site) for site in attnzoo.handle(model).sites] == [str(site) for site in attnzoo.handle(other).sites]


def test_a_variant_works_in_every_function(short):
    model = load("gpt_neox")
    assert {verdict.changes for verdict in attnzoo.explain(model, "short")} == {("window of 16 keys and 2 sinks",)}
    assert attnzoo.verify(model, inputs_of("gpt_neox"), "short", gradients=False).ok
    attnzoo.patch(model, {"*layers.0.*": "short", "*": "native"})
    q = torch.ones(1, 1, 4, 8)
    assert attnzoo.attention(q, q, q, attnzoo.Causal(), backend="short").shape == q.shape


def test_a_variant_is_an_attn_implementation(short):
    attnzoo.install()
    for name in ("short", "attnzoo/short"):
        model = load("gpt_neox", attn_implementation=name)
        ran("gpt_neox", model)
        assert {site.approximate for site in attnzoo.handle(model).sites} == {"window of 16 keys and 2 sinks"}
    attnzoo.install(default="short")
    assert backends_of(load("gpt_neox")) == {"blocked-local"}


def test_an_unregistered_variant_is_unknown(short):
    model = load("gpt_neox")
    attnzoo.patch(model, "short")
    attnzoo.unregister_variant("short")
    for use in (attnzoo.configure, attnzoo.unregister_variant, lambda name: attnzoo.patch(model, name)):
        with pytest.raises(attnzoo.UnknownNameError, match="got 'short'"):
            use("short")
    assert ran("gpt_neox", model)


@pytest.mark.parametrize("taken", ["sdpa", "flex", "auto", "native", "short"])
def test_names_of_attnzoo_are_refused(taken, short):
    with pytest.raises(attnzoo.InvalidArgumentError, match=f"variant name: got '{taken}'; allowed: a name other than"):
        attnzoo.register_variant(taken, "blocked-local", window=3)
    assert attnzoo.configure("short") == short


def test_the_same_variant_may_be_registered_again(short):
    """A notebook cell can run twice."""
    assert attnzoo.register_variant("short", "blocked-local", window=16, sinks=2) == short


@pytest.mark.parametrize("name", ["flash_attention_3", "paged|eager", "a/b", "attnzoo/x", "a:b", "", 3, "a b"])
def test_names_that_transformers_reads_in_another_way_are_refused(name):
    with pytest.raises(attnzoo.InvalidArgumentError, match="variant name: got"):
        attnzoo.register_variant(name, "blocked-local", window=3)


def test_a_backend_cannot_take_the_name_of_a_variant(short):
    for replace in (False, True):
        for names in (("short",), ("mine", "short")):
            with pytest.raises(attnzoo.InvalidArgumentError, match="backend name: got 'short'"):
                attnzoo.register_backend(fake_backend(names[0], aliases=names[1:]), replace=replace)
    assert attnzoo.configure("short") == short


@pytest.mark.parametrize(
    ("backend", "options", "error"),
    [
        ("blocked-locl", {}, "got 'blocked-locl' .did you mean 'blocked-local'"),
        ("blocked-local", {"windw": 3}, "option of backend 'blocked-local': got 'windw'"),
        ("blocked-local", {"window": 0}, "window of backend 'blocked-local': got 0"),
        ("auto", {}, "got 'auto', which is not accepted"),
    ],
)
def test_a_variant_of_nothing_is_refused(backend, options, error):
    with pytest.raises(attnzoo.InvalidArgumentError, match=error):
        attnzoo.register_variant("short", backend, **options)
    with pytest.raises(attnzoo.UnknownNameError):
        attnzoo.configure("short")


def test_a_variant_takes_no_further_options(short):
    for use in (
        lambda: attnzoo.configure("short", window=3),
        lambda: attnzoo.patch(load("gpt_neox"), "short", window=3),
    ):
        with pytest.raises(
            attnzoo.InvalidArgumentError, match=r"options of variant 'short': got .'window'.; allowed: none"
        ):
            use()
