"""A default backend for a whole program: `install(default=...)`, `ATTNZOO_BACKEND` and `attnzoo run`."""

import json
import os
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

PROMPT = dict(max_new_tokens=8, do_sample=False)
# Built by every route, without a request for an implementation; the program does not import attnzoo.
PROGRAM = """
import json, sys, torch, transformers
transformers.logging.set_verbosity_error()
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, LEDForConditionalGeneration
led, neox = sys.argv[1:3]
config = AutoConfig.from_pretrained(neox)
torch.manual_seed(0)
models = [LEDForConditionalGeneration.from_pretrained(led), AutoModel.from_pretrained(led), AutoModel.from_config(config),
          AutoModelForCausalLM.from_pretrained(neox), transformers.GPTNeoXModel(config)]
ids = torch.arange(40)[None] + 3
torch.save([model.eval()(ids)[0].detach() for model in models], sys.argv[3])
if "attnzoo" in sys.modules:
    import attnzoo
    print(json.dumps(attnzoo.stats()))
"""


def run_program(folder, *command, **environment):
    """Run PROGRAM; return the outputs of its models and what it printed."""
    (folder / "program.py").write_text(PROGRAM)
    arguments = [folder / "program.py", HERE / "led", HERE / "gpt_neox", folder / "outputs"]
    done = subprocess.run(
        [sys.executable, *command, *map(str, arguments)],
        capture_output=True, text=True, timeout=200, env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return torch.load(folder / "outputs"), done.stdout


@pytest.mark.parametrize(
    ("options", "environment"),
    [((), {"ATTNZOO_BACKEND": "sdpa"}), (("--backend", "sdpa"), {"ATTNZOO_BACKEND": "eager"})],
)
def test_a_program_runs_on_the_backend_without_an_edit(options, environment, tmp_path):
    plain, printed = run_program(tmp_path)
    assert printed == ""
    outputs, printed = run_program(tmp_path, "-m", "attnzoo", "run", *options, **environment)
    assert json.loads(printed) == {"sdpa": 2 * 8 + 3 * 4}
    for output, expected in zip(outputs, plain, strict=True):
        torch.testing.assert_close(output, expected, rtol=0.1, atol=0.1)  # the checkpoints are in bfloat16


@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_gradients_and_generation_are_those_of_the_original(family):
    """No call runs outside the backend."""
    plain = load(family, torch.float64)
    attnzoo.install(default="sdpa")
    model = load(family, torch.float64)
    before = attnzoo.stats()
    real = slice(None) if family in ("led", "longt5") else slice(0, 1)  # the second text ends with padding
    assert is_close(logits(family, model)[real], logits(family, plain)[real])
    prompt = {name: value for name, value in inputs_of(family).items() if not name.startswith("decoder")}
    if family == "reformer":
        prompt.pop("attention_mask")  # transformers' own generation fails with it
    assert torch.equal(*(generate(each, prompt) for each in (model, plain)))
    gradients = [loss_gradients(family, each) for each in (model, plain)]
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-6, atol=1e-8, msg=name)
    ran = {name: count - before.get(name, 0) for name, count in attnzoo.stats().items()}
    assert {name for name, count in ran.items() if count} == {"sdpa"}
    assert ran["sdpa"] == sum(site.calls for site in attnzoo.handle(model).sites)


def generate(model, prompt):
    torch.manual_seed(0)
    return model.generate(**prompt, **PROMPT)


def loss_gradients(family, model):
    torch.manual_seed(0)
    inputs = inputs_of(family)
    labels = inputs.get("decoder_input_ids", inputs["input_ids"])
    mode = model.train() if family == "reformer" else model  # Reformer's own backward works in training mode only
    for module in mode.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    output = mode(**inputs).logits[:1]
    torch.nn.functional.cross_entropy(output.flatten(0, 1), labels[:1].flatten()).backward()
    model.eval()
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
    """Requested == executed, or an exception."""
    add_backend("no-bias", bias=frozenset())
    attnzoo.install(default="no-bias")
    assert backends_of(load("led")) == {"no-bias"}
    with pytest.raises(attnzoo.BackendRefusedError, match="bias: got relative"):
        load("longt5")
