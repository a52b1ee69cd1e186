"""Each cell of the support matrix runs and agrees with the oracle, or refuses with a reason."""

import contextlib
import json
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from typer.testing import CliRunner

import attnzoo
from attnzoo.backends.eager import EagerBackend
from attnzoo.cli import app as cli
from attnzoo.conformance.cases import RequestCase, shrink
from attnzoo.registry import ANY_MODEL_TYPE, registry
from attnzoo.reporting import matrix, matrix_text
from attnzoo.spec.segments import FLOATS
from attnzoo.testing import run_case
from tests.support.uncompiled_flex import uncompiled_flex

PAGE = Path(__file__).parents[2] / "docs" / "matrix.md"


@pytest.fixture(scope="module")
def families():
    return matrix.families()


def modules_of(families):
    return [module for modules in families.values() for module in modules]


def is_run(feature, dtype):
    """Whether the test runs the sample of a supported cell. The tests of the kit run each feature in every dtype."""
    return dtype == torch.float32 or feature == "backward"


def hold(backend, modules, device):
    """Run a small sample of the cells of a backend on a device in the conformance kit; return the failures.

    A sample of every refused cell is run. Cells with equal requests are run once. On the CPU, FlexAttention runs
    without its compiler, which takes seconds for each form; the tests of the kit compile.
    """
    outcomes, wrong = {}, defaultdict(list)
    for module in modules:
        row = matrix.row(registry.backend_class(backend), module)
        for (feature, where, dtype), reasons in row.cells.items():
            if where != device or (not reasons and not is_run(feature, dtype)):
                continue
            configured, refused = matrix.configured(registry.backend_class(backend), module, device, dtype), False
            requests = module.requests_with(feature, device, dtype)
            for request in map(shrink, requests):
                if (configured, request) not in outcomes:
                    outcomes[configured, request] = run_case(configured, RequestCase(request), device)
                refused |= outcomes[configured, request].refused
                if outcomes[configured, request].failure:
                    wrong[outcomes[configured, request].failure].append(f"{module}, {feature}, {dtype}")
            # Packages that this machine lacks may support more.
            here = bool(reasons) or any(configured.refusals(request) for request in requests)
            if refused != here:
                difference = f"the matrix says {reasons or 'it runs'}, but refused is {refused}"
                wrong[difference].append(f"{module}, {feature}, {dtype}")
    assert outcomes
    return dict(wrong)


# Cells


def test_the_matrix_has_every_kind_of_attention_module(families):
    """The examples of each adapter reach all of its patch points, and no other attention module."""
    assert set(families) == set(registry.model_types())
    for model_type, modules in families.items():
        assert not isinstance(modules, str), f"{model_type}: {modules}"
        points = [point for point in registry.find_adapter(model_type).points if point.attends]
        assert len(modules) >= len(points)
        if model_type != ANY_MODEL_TYPE:  # its point serves every class
            assert {point.cls.rpartition(":")[2] for point in points} == {module.cls for module in modules}


def test_the_matrix_has_every_cell_with_a_result_or_reasons(families):
    for module in modules_of(families):
        rows = matrix.rows(module)
        assert [row.backend for row in rows] == sorted(attnzoo.backends())
        for row in rows:
            places = {(f, d, t) for f in matrix.FEATURES for d in ("cpu", "cuda") for t in FLOATS}
            assert set(row.cells) == places
            for reasons in row.cells.values():
                assert all(reason.field and reason.got and reason.allowed for reason in reasons)


@pytest.mark.parametrize("backend", sorted(name for name, info in attnzoo.backends().items() if info.available))
def test_every_cell_of_this_machine_agrees_with_the_matrix(families, backend, device):
    with uncompiled_flex() if device == "cpu" else contextlib.nullcontext():
        wrong = hold(backend, modules_of(families), device)
    assert not wrong, "\n".join(f"{failure}\n    {'; '.join(cells[:3])}" for failure, cells in wrong.items())


@pytest.mark.parametrize("backend", sorted(attnzoo.backends()))
def test_a_sample_of_a_cell_that_runs_is_not_refused(families, backend):
    """This holds for every device, also those that this machine lacks. A refused sample would check nothing."""
    for module in modules_of(families):
        for (feature, device, dtype), reasons in matrix.row(registry.backend_class(backend), module).cells.items():
            configured = matrix.configured(registry.backend_class(backend), module, device, dtype)
            for request in module.requests_with(feature, device, dtype) if not reasons else ():
                assert not configured.refusals_anywhere(shrink(request)), (str(module), feature, device, dtype)


@pytest.mark.parametrize("backend", sorted(name for name, info in attnzoo.backends().items() if not info.available))
def test_unavailable_backends_are_shown_and_refused_at_run_time(families, backend):
    """Declarations do not depend on the machine; a call on this machine is refused with the reason."""
    module = modules_of(families)[0]
    row = matrix.row(registry.backend_class(backend), module)
    assert any(not reasons for reasons in row.cells.values())
    assert all(reason.field != "availability" for feature in matrix.FEATURES for reason in row.reasons(feature))
    (request, *_) = module.requests_with("forward", "cpu", torch.bfloat16)
    outcome = run_case(matrix.configured(registry.backend_class(backend), module), RequestCase(shrink(request)))
    assert outcome.refused and not outcome.failure


# Planted faults


@dataclass(frozen=True)
class Boasting(attnzoo.Backend):
    """A backend that declares what eager declares, but ignores the bias."""

    name: ClassVar[str] = "boasting"
    capabilities: ClassVar[attnzoo.Capabilities] = EagerBackend.capabilities

    def run(self, attention, probabilities=False):
        segments = tuple(replace(segment, bias=None) for segment in attention.segments)
        return EagerBackend().run(replace(attention, segments=segments), probabilities)


@dataclass(frozen=True)
class Modest(Boasting):
    """A backend that refuses small requests, although its capabilities include them."""

    name: ClassVar[str] = "modest"

    def refusals(self, request):
        few = request.heads < 8
        return (attnzoo.Refusal("heads", str(request.heads), "at least 8"),) if few else ()


@pytest.fixture
def registered():
    for cls in (Boasting, Modest):
        attnzoo.register_backend(cls)
    yield
    for cls in (Boasting, Modest):
        attnzoo.unregister_backend(cls.name)


@pytest.mark.usefixtures("registered")
def test_a_backend_that_drops_a_declared_feature_is_caught(families):
    wrong = hold("boasting", families["gpt_neox"], "cpu")
    cells = " ".join(cell for cells in wrong.values() for cell in cells)
    assert all(feature in cells for feature in ("relative bias", "dense bias", "trained bias"))
    assert "dropout" not in cells and "key mask" not in cells


@pytest.mark.usefixtures("registered")
def test_a_refused_cell_that_the_matrix_shows_as_running_is_caught(families):
    wrong = hold("modest", families["gpt_neox"], "cpu")
    assert "the matrix says it runs, but refused is True" in wrong


# Samples


def test_a_sample_has_exactly_the_request(families):
    """Only the start of a hash round may differ, because in a sample each round starts after the previous round."""
    for module in modules_of(families):
        for feature in matrix.FEATURES:
            for request in map(shrink, module.requests_with(feature, "cpu", torch.float32)):
                got = RequestCase(request).attention().request()
                segments = tuple(
                    replace(segment, pattern=replace(segment.pattern, start=0))
                    if hasattr(segment.pattern, "start")
                    else segment
                    for segment in got.segments
                )
                assert replace(got, segments=segments) == request


def test_features_are_added_to_the_requests_of_a_module(families):
    local = next(module for module in families["longt5"] if module.cls == "LongT5LocalAttention")
    (plain,) = local.requests_with("forward", "cuda", torch.bfloat16)
    assert (plain.device, plain.dtype, plain.grad, plain.dropout) == ("cuda", torch.bfloat16, False, False)
    assert plain.segments[0].bias == "relative" and plain.segments[0].key_mask
    (trained,) = local.requests_with("trained bias", "cpu", torch.float32)
    assert trained.grad and trained.segments[0].bias_grad
    (grouped,) = local.requests_with("GQA", "cpu", torch.float32)
    assert grouped.segments[0].kv_heads * 2 == grouped.heads == plain.heads


# Text


def test_the_documentation_page_is_up_to_date(families):
    assert PAGE.read_text() == matrix_text.markdown(families) + "\n", (
        f"{PAGE} is stale: adapters or backends declare something else now. Run: make docs-matrix"
    )


def test_cuda_cells_are_marked(families):
    module = families["gpt_neox"][0]
    row = next(row for row in matrix.rows(module) if row.backend == "flash_attention_2")
    assert not row.runs("forward", "cpu") and torch.bfloat16 in row.runs("forward", "cuda")
    line = next(line for line in matrix_text.markdown({"gpt_neox": (module,)}).splitlines() if "| `flash" in line[:9])
    assert "`cuda` bf16 fp16" in line


def run(*arguments):
    done = CliRunner().invoke(cli.app, ["matrix", *arguments])
    assert done.exit_code == 0, done.output
    return done.stdout


def test_both_formats_have_the_same_reasons():
    reason = "mask: got True; allowed: no dense mask"
    markdown, table = run("led", "--markdown"), run("led")
    assert "### `led`" in markdown and "### `longt5`" not in markdown
    for name in ("LEDEncoderSelfAttention", "LEDDecoderAttention", reason, *attnzoo.backends()):
        assert name in markdown and name in table


def test_json_has_the_refusals_of_every_cell():
    rows = json.loads(run("gpt_neox", "--json", "-"))["gpt_neox"]
    assert [row["backend"] for row in rows] == sorted(attnzoo.backends())
    for row in rows:
        assert row["module"] == "GPTNeoXAttention" and row["pattern"]
        assert len(row["cells"]) == len(matrix.FEATURES) * len(matrix.DEVICES) * len(FLOATS)
    assert not any(cell["refusals"] for row in rows for cell in row["cells"] if row["backend"] == "eager")
    flash = next(row for row in rows if row["backend"] == "flash_attention_2")
    cell = dict(feature="forward", device="cuda", dtype="float64")
    assert {**cell, "refusals": [dict(field="dtype", got="float64", allowed="bfloat16, float16")]} in flash["cells"]
    with pytest.raises(attnzoo.InvalidArgumentError, match="json: got - with --markdown; allowed: a file"):
        CliRunner().invoke(cli.app, ["matrix", "--json", "-", "--markdown"], catch_exceptions=False)


def test_an_unknown_family_raises_with_a_suggestion():
    with pytest.raises(attnzoo.UnknownNameError, match="did you mean 'led'"):
        matrix.families(("lde",))


def test_a_family_that_cannot_be_built_has_a_reason(monkeypatch):
    adapter = attnzoo.Adapter(model_types=("no_such_type",), points=())
    attnzoo.register_adapter(adapter)
    try:
        families = matrix.families(("no_such_type",))
        assert "no_such_type" in families["no_such_type"]
        assert families["no_such_type"] in matrix_text.markdown(families)
    finally:
        attnzoo.unregister_adapter("no_such_type")


@dataclass(frozen=True)
class Choosy(EagerBackend):
    """A backend with a required option."""

    name: ClassVar[str] = "choosy"
    window: int


def test_a_backend_with_required_options_is_shown_with_its_example(families, monkeypatch):
    module = families["gpt_neox"][0]
    row = matrix.row(Choosy, module)
    assert row.reasons("forward") == (attnzoo.Refusal("options", "no value for window", "values, e.g. window=..."),)
    monkeypatch.setattr(Choosy, "example", {"window": 7})
    assert not any(matrix.row(Choosy, module).cells.values())
    assert matrix.configured(Choosy, module) == Choosy(window=7)
