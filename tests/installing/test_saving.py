"""Backend names in saved models, and in configurations that models share."""

import copy
import json
import os
import pickle
import subprocess
import sys

import pytest
import torch
import transformers

import attnzoo
from tests.support.checkpoints import load
from tests.support.installed import FAMILIES, backends_of, logits

PLAIN_PROCESS = """
import sys, torch, transformers
folder, inputs, outputs = sys.argv[1:]

def logits():
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder)
    assert model.config._attn_implementation == "eager", model.config._attn_implementation
    assert not any("forward" in vars(module) for module in model.modules())
    return model(**torch.load(inputs)).logits

sys.modules["attnzoo"] = None  # an import would raise
without = logits()
del sys.modules["attnzoo"]
before = dict(vars(transformers.PreTrainedModel))
import attnzoo
assert dict(vars(transformers.PreTrainedModel)) == before  # also with ATTNZOO_BACKEND
torch.save((without, logits()), outputs)
"""


@pytest.fixture(autouse=True)
def install():
    attnzoo.install()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["attnzoo/sdpa", "blocked-local:window=8,sinks=1"])
def test_a_saved_model_loads_with_the_same_backend(family, name, tmp_path):
    if family == "reformer" and "window" in name:
        name = "native"  # all attention of Reformer is local, so blocked-local refuses options
    model = load(family, attn_implementation=name)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert [str(site) for site in attnzoo.handle(loaded).sites] == [str(site) for site in attnzoo.handle(model).sites]
    assert torch.equal(logits(family, loaded), logits(family, model))
    loaded.save_pretrained(tmp_path / "again")
    assert saved(tmp_path) == saved(tmp_path / "again") == name.removeprefix("attnzoo/")


def saved(folder):
    return json.loads((folder / "config.json").read_text()).get("attnzoo_backend")


def test_a_saved_model_loads_in_a_process_without_install(tmp_path):
    """It loads where attnzoo cannot be imported, and where attnzoo is imported, but not installed."""
    model = load("led", attn_implementation="sdpa")
    model.save_pretrained(tmp_path)
    inputs = {"input_ids": torch.arange(40)[None] % 200 + 3, "decoder_input_ids": torch.arange(9)[None] + 3}
    torch.save(inputs, tmp_path / "inputs")
    arguments = [tmp_path, tmp_path / "inputs", tmp_path / "logits"]
    command = [sys.executable, "-c", PLAIN_PROCESS, *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ATTNZOO_BACKEND": "sdpa"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    attnzoo.unpatch(model)
    with torch.no_grad():
        expected = model(**inputs).logits
    for loaded in torch.load(tmp_path / "logits"):
        torch.testing.assert_close(loaded, expected, rtol=1e-5, atol=1e-5)


def test_an_explicit_name_wins_over_a_saved_name(tmp_path):
    load("led", attn_implementation="sdpa").save_pretrained(tmp_path)
    for auto_class in (transformers.LEDForConditionalGeneration, transformers.AutoModelForSeq2SeqLM):
        assert backends_of(auto_class.from_pretrained(tmp_path, attn_implementation="attnzoo/eager")) == {"eager"}
        plain = auto_class.from_pretrained(tmp_path, attn_implementation="eager")
        assert not attnzoo.is_patched(plain)
        plain.save_pretrained(tmp_path / "plain")
        assert saved(tmp_path / "plain") is None


def test_a_saved_name_that_nobody_knows_is_refused(tmp_path):
    attnzoo.register_variant("short", "blocked-local", window=4)
    load("gpt_neox", attn_implementation="short").save_pretrained(tmp_path)
    assert saved(tmp_path) == "short"
    attnzoo.unregister_variant("short")
    with pytest.raises(attnzoo.UnknownNameError, match="attn_implementation: got 'short'"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not attnzoo.is_patched(
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="sdpa")
    )


def test_a_patch_is_not_saved(tmp_path):
    model = load("led")
    attnzoo.patch(model, "sdpa")
    model.save_pretrained(tmp_path)
    assert saved(tmp_path) is None


# Configurations in memory


COPIES = {
    "same": lambda config: config,
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda config: pickle.loads(pickle.dumps(config)),
    "dict": lambda config: type(config).from_dict(config.to_dict()),
}


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_a_second_model_with_the_configuration_has_the_same_backend(copied):
    """In transformers, too, models that share a configuration have the same attention implementation."""
    first = load("led", attn_implementation="sdpa")
    config = copied(first.config)
    assert backends_of(type(first)(config)) == {"sdpa"}
    config._attn_implementation = "eager"
    assert not attnzoo.is_patched(type(first)(config))
    config._attn_implementation = "attnzoo/eager"
    assert backends_of(type(first)(config)) == {"eager"}
    assert backends_of(first) == {"sdpa"}


def test_the_field_of_transformers_holds_a_name_of_transformers():
    for family in FAMILIES:
        model = load(family, attn_implementation="attnzoo/sdpa")
        field = model.config._attn_implementation
        assert field == load(family).config._attn_implementation
        assert field in {"eager": 1, "sdpa": 2}


def test_the_compiler_reads_the_field_as_a_string():
    config = load("gpt_neox", attn_implementation="attnzoo/sdpa").config

    @torch.compile(backend="eager", fullgraph=True)
    def add(values):
        field = config._attn_implementation
        return values + {"eager": 1, "sdpa": 2}[field] * field.startswith("s")

    assert add(torch.zeros(1)).item() == 2


def test_another_model_with_the_same_configuration_object_stays_as_built():
    plain = load("led")
    before = logits("led", plain)
    plain.config._attn_implementation = "sdpa"
    assert backends_of(type(plain)(plain.config)) == {"sdpa"}
    assert not attnzoo.is_patched(plain)
    assert torch.equal(logits("led", plain), before)
