"""A default backend for a whole program: `install(default=...)`, `ATTNZOO_BACKEND` and `attnzoo run`."""

import os
import runpy
import subprocess
import sys

import pytest
import torch
import transformers

import attnzoo
from tests.checkpoints.train import HERE
from tests.support.checkpoints import load
from tests.support.compare import is_close
from tests.support.installed import FAMILIES, backends_of, inputs_of, logits

# Models built by every route, without a request for an implementation. The program does not import attnzoo.
PROGRAM = """
import sys, torch, transformers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, LEDForConditionalGeneration
led, neox, outputs = sys.argv[1:]
config = AutoConfig.from_pretrained(neox)
torch.manual_seed(0)
models = [LEDForConditionalGeneration.from_pretrained(led), AutoModel.from_pretrained(led),
          AutoModelForCausalLM.from_pretrained(neox), AutoModel.from_config(config), transformers.GPTNeoXModel(config)]
ids = torch.arange(40)[None] + 3
torch.save([model.float().eval()(ids)[0].detach() for model in models], outputs)
if "attnzoo" in sys.modules:
    print("calls:", sys.modules["attnzoo"].stats())
"""
CALLS = 2 * 6 + 3 * 4  # two LED models with 6 attentions, three GPT-NeoX models with 4


@pytest.fixture
def program(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    return [str(argument) for argument in (tmp_path / "program.py", HERE / "led", HERE / "gpt_neox", tmp_path / "out")]


def test_a_program_runs_on_the_backend_without_an_edit(program, monkeypatch):
    monkeypatch.setattr(sys, "argv", program)
    before = attnzoo.stats()
    runpy.run_path(program[0])
    assert attnzoo.stats() == before
    plain = torch.load(program[-1])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ATTNZOO_BACKEND": "sdpa"}
    command = [sys.executable, "-m", "attnzoo", "run", *program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"calls: {{'sdpa': {CALLS}}}\n"
    for output, expected in zip(torch.load(program[-1]), plain, strict=True):
        assert is_close(output, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_generation_and_gradients_are_those_of_the_original(family):
    """The backend runs every attention of a model that is loaded under a default."""
    plain, patched = load(family, torch.float64), load(family, torch.float64)
    attnzoo.install(default="sdpa")
    model = load(family, torch.float64)
    before = attnzoo.stats()
    real = slice(None) if family in ("led", "longt5") else slice(0, 1)  # the second text ends with padding
    assert is_close(logits(family, model)[real], logits(family, plain)[real])
    assert torch.equal(*(generated(family, each) for each in (model, plain)))
    gradients = gradients_of(family, model)
    assert {name for name, count in calls_since(before).items() if count} == {"sdpa"}
    assert calls_since(before)["sdpa"] == sum(site.calls for site in attnzoo.handle(model).sites)
    attnzoo.patch(patched, "sdpa")  # its gradients obey the error rule
    expected = gradients_of(family, patched)
    assert gradients.keys() == expected.keys()
    assert all(torch.equal(gradient, expected[name]) for name, gradient in gradients.items())


def calls_since(before):
    return {name: count - before.get(name, 0) for name, count in attnzoo.stats().items()}


def generated(family, model):
    torch.manual_seed(0)
    given = {name: value for name, value in inputs_of(family).items() if not name.startswith("decoder")}
    if family == "reformer":
        given.pop("attention_mask")  # transformers' own generation fails with it
    return model.generate(**given, max_new_tokens=8, do_sample=False)


def gradients_of(family, model):
    torch.manual_seed(0)
    model.train(family == "reformer")  # the backward of Reformer works in training mode only
    model(**inputs_of(family)).logits[:1].square().mean().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def test_a_request_wins_over_the_default():
    attnzoo.install(default="sdpa")
    assert backends_of(load("led", attn_implementation="attnzoo/eager")) == {"eager"}
    assert not attnzoo.is_patched(load("led", attn_implementation="eager"))
    assert not attnzoo.is_patched(load("gpt_neox", attn_implementation="sdpa"))
    model = load("led")
    model.set_attn_implementation("eager")
    assert not attnzoo.is_patched(model) and not attnzoo.is_patched(type(model)(model.config))


def test_a_saved_name_wins_over_the_default(tmp_path):
    attnzoo.install()
    load("led", attn_implementation="attnzoo/eager").save_pretrained(tmp_path)
    attnzoo.install(default="sdpa")
    assert backends_of(transformers.LEDModel.from_pretrained(tmp_path)) == {"eager"}


def test_a_default_is_not_saved(tmp_path):
    attnzoo.install(default="sdpa")
    model = load("led")
    model.save_pretrained(tmp_path)
    assert "attnzoo" not in (tmp_path / "config.json").read_text()
    attnzoo.install(default="eager")
    assert backends_of(transformers.LEDModel.from_pretrained(tmp_path)) == {"eager"}
    assert backends_of(transformers.LEDModel(model.config)) == {"eager"}
    attnzoo.install()
    assert not attnzoo.is_patched(transformers.LEDModel(model.config))


def test_other_families_stay_as_they_are():
    attnzoo.install(default="sdpa")
    config = transformers.BertConfig(vocab_size=9, hidden_size=8, num_attention_heads=2, num_hidden_layers=1)
    model = transformers.BertModel(config)
    assert not attnzoo.is_patched(model)
    assert (type(config._attn_implementation), config._attn_implementation) == (str, "sdpa")


def test_a_default_that_refuses_a_model_is_an_error(add_backend):
    """attnzoo raises, and does not run another backend instead."""
    add_backend("no-bias", bias=frozenset())
    attnzoo.install(default="no-bias")
    assert backends_of(load("led")) == {"no-bias"}
    with pytest.raises(attnzoo.BackendRefusedError, match="bias: got relative"):
        load("longt5")
