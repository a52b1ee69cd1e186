"""The sweep over the model types of transformers: outcomes of single types, and the recorded table."""

from pathlib import Path

import pytest
import torch

from attnzoo.benchmarks import architectures
from attnzoo.benchmarks.architectures import Outcome, check, model_types, read, to_markdown
from attnzoo.benchmarks.tiny_models import build

ROOT = Path(__file__).parents[2]
RECORDED = ROOT / "benchmarks/results/architectures.jsonl"
DOCUMENTED = ROOT / "docs/architectures.md"
EVERY_CHECK = ("forward and gradients", "padding right", "padding left", "generation")


def test_a_decoder_agrees_in_every_check():
    outcome = check("qwen3", "sdpa")
    assert (outcome.kind, outcome.checks, outcome.sites) == ("agrees", EVERY_CHECK, 2)


@pytest.mark.parametrize("model_type", ["vit", "bart", "albert", "olmo2"])
def test_models_of_other_kinds_agree(model_type):
    assert check(model_type, "sdpa").kind == "agrees"


@pytest.mark.parametrize(
    ("model_type", "kind", "detail"),
    [("gemma2", "refused", "softcap"), ("bloom", "other attention", ""), ("no-such-type", "not built", "no-such-type")],
)
def test_other_outcomes_have_a_kind_and_a_reason(model_type, kind, detail):
    outcome = check(model_type, "sdpa")
    assert outcome.kind == kind
    assert detail in outcome.detail


def test_a_wrong_backend_differs(add_backend, monkeypatch):
    backend = add_backend("half")
    run = backend.run
    monkeypatch.setattr(backend, "run", lambda *given: (result := run(*given))._replace(output=result.output * 0.5))
    assert check("llama", "half").kind == "differs"


def test_padding_is_on_the_named_side():
    example = build("llama")
    assert torch.equal(example.padded("left")["attention_mask"][0, :6], torch.tensor([0, 0, 0, 0, 0, 1]))
    assert torch.equal(example.padded("right")["attention_mask"][0, -6:], torch.tensor([1, 0, 0, 0, 0, 0]))


def test_the_documented_table_is_the_recorded_one():
    text = DOCUMENTED.read_text()
    versions = next(line for line in text.splitlines() if line.startswith("Versions: "))
    assert text == to_markdown(read(RECORDED).values(), versions.removeprefix("Versions: ").removesuffix("."))


def test_at_least_150_architectures_agree_and_none_differs():
    outcomes = read(RECORDED).values()
    for backend in architectures.BACKENDS:
        kinds = [outcome.kind for outcome in outcomes if outcome.backend == backend]
        assert kinds.count("agrees") >= 150
        assert "differs" not in kinds


def test_the_table_covers_the_model_types_of_the_verified_transformers():
    import transformers

    recorded = {model_type for model_type, _ in read(RECORDED)}
    if f"transformers {transformers.__version__}," not in DOCUMENTED.read_text():
        pytest.skip("the table was recorded with another version of transformers")
    assert recorded == set(model_types())


def test_outcomes_survive_the_file(tmp_path, capsys):
    path = tmp_path / "outcomes.jsonl"
    assert architectures.main(["bloom", "--backend", "sdpa", "--json", str(path)]) == 0
    assert read(path) == {("bloom", "sdpa"): Outcome("bloom", "sdpa", "other attention")}
    architectures.main(["bloom", "--backend", "sdpa", "--json", str(path)])  # is not repeated
    assert len(path.read_text().splitlines()) == 1
    assert capsys.readouterr().out.count("bloom") == 1
