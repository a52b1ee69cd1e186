"""``attnzoo doctor`` reports a broken optional package with the reason, and it breaks nothing else."""

import importlib
import json
import os
import subprocess
import sys
import textwrap
from types import SimpleNamespace

import pytest

import attnzoo
from attnzoo.backends.varlen.kernels import import_package
from attnzoo.benchmarks.plots import require_matplotlib
from attnzoo.reporting import doctor

# What a package may raise on import, and what doctor reports.
KINDS = {
    "ImportError": ("raise ImportError('libcudart.so.12: cannot open')", "ImportError: libcudart.so.12: cannot open"),
    "OSError": ("raise OSError('libcuda.so.1: wrong ELF class')", "OSError: libcuda.so.1: wrong ELF class"),
    "SystemExit": ("raise SystemExit('needs a GPU')", "SystemExit: needs a GPU"),
    "RuntimeError": ("raise RuntimeError('driver too old')", "RuntimeError: driver too old"),
    "AttributeError": ("import torch; torch.no_such_thing", "AttributeError: module 'torch' has no attribute"),
    "BaseException": ("class Own(BaseException): pass\nraise Own('anything')", "Own: anything"),
    "missing": ("import no_such_dependency", "ModuleNotFoundError: No module named 'no_such_dependency'"),
    "syntax": ("def broken(:", "SyntaxError: "),
}
MODULES = {"flash-attn": "flash_attn", "xformers": "xformers", "accelerate": "accelerate", "matplotlib": "matplotlib"}


def plant(folder, distribution, source, metadata=True):
    """Write a package as pip installs it, with this source."""
    (folder / MODULES[distribution]).mkdir(parents=True)
    (folder / MODULES[distribution] / "__init__.py").write_text(source)
    if metadata:
        about = folder / f"{MODULES[distribution]}-9.9.dist-info"
        about.mkdir()
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 9.9\n")


def models():
    return {finding.name: finding for finding in doctor.examine() if finding.kind == "model"}


def look_at(distribution):
    """Examine one package, but no backends, because backends cache whether their packages load."""
    (package,) = [package for package in doctor._PACKAGES if package[0] == distribution]
    return doctor._package(package)


@pytest.fixture
def planted(monkeypatch, tmp_path):
    """Put packages on the import path of this process, and unload modules of the same names."""

    def put(distribution, source, metadata=True):
        plant(tmp_path, distribution, source, metadata)
        for name in [name for name in sys.modules if name.partition(".")[0] == MODULES[distribution]]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.syspath_prepend(tmp_path)

    return put


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("distribution", MODULES)
def test_doctor_reports_what_a_package_raises(planted, distribution, kind):
    source, reason = KINDS[kind]
    planted(distribution, source)
    finding = look_at(distribution)
    assert (finding.kind, finding.name, finding.ok) == ("package", distribution, False)
    assert finding.detail.startswith(f"9.9 is broken: {reason}")


@pytest.mark.parametrize("kind", KINDS)
def test_a_kernel_gives_what_its_package_raises_as_the_reason(planted, kind):
    source, reason = KINDS[kind]
    planted("xformers", source)
    module, why = import_package("xformers", "xformers")
    assert module is None and why.startswith(f"xformers cannot be imported: {reason}")


@pytest.mark.parametrize("kind", sorted(KINDS.keys() - {"BaseException"}))
def test_a_plot_is_refused_with_what_matplotlib_raises(planted, kind):
    source, reason = KINDS[kind]
    planted("matplotlib", source)
    with pytest.raises(attnzoo.InvalidArgumentError, match=r"plot: got a plot.* no plot .--no-plot") as refused:
        require_matplotlib()
    assert f"({reason}" in str(refused.value)


@pytest.mark.parametrize("kind", ["RuntimeError", "missing"])
def test_doctor_reports_a_broken_package_without_metadata(planted, kind):
    """A package that lacks a dependency is reported as broken, not as missing."""
    source, reason = KINDS[kind]
    planted("xformers", source, metadata=False)
    assert look_at("xformers").detail.startswith(f"a copy without a version is broken: {reason}")


def test_doctor_reports_the_version_of_a_working_package(planted):
    planted("xformers", "")
    assert look_at("xformers").ok and look_at("xformers").detail.startswith("9.9 (")


def test_doctor_reports_a_missing_package_with_the_remedy(monkeypatch):
    monkeypatch.setattr(doctor, "_PACKAGES", (("no-such-thing", "no_such_thing", "nothing; optional"),))
    finding = look_at("no-such-thing")
    assert not finding.ok and finding.detail == "not installed (nothing; optional): pip install no-such-thing"


def test_doctor_does_not_catch_an_interrupt(planted):
    planted("xformers", "raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        look_at("xformers")


@pytest.mark.parametrize("error", [RuntimeError("planted"), SystemExit(3), ImportError("planted")])
def test_doctor_reports_a_model_whose_code_cannot_be_imported(monkeypatch, error):
    def broken(name):
        if "gpt_neox" in name:
            raise error
        return importlib.import_module(name)

    monkeypatch.setattr(doctor, "importlib", SimpleNamespace(import_module=broken))
    finding = models()
    assert finding["gpt_neox"].detail == f"its code cannot be imported: {type(error).__name__}: {error}"
    assert finding["led"].ok and finding["longt5"].ok


# In a new process, where nothing is imported yet

PROBE = """
    import json
    import sys

    import attnzoo
    import torch
    from attnzoo.reporting import doctor

    findings = {f"{finding.kind} {finding.name}": [finding.ok, finding.detail] for finding in doctor.examine()}
    infos = {name: [info.available, info.reason] for name, info in attnzoo.backends().items()}
    q = torch.randn(1, 2, 5, 8)
    attended = list(attnzoo.attention(q, q, q, backend="sdpa").shape)
    report = dict(findings=findings, infos=infos, attended=attended)
    if "models" in sys.argv:
        from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

        config = GPTNeoXConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                               intermediate_size=16, max_position_embeddings=32)
        model = GPTNeoXForCausalLM(config).eval()
        verdicts = attnzoo.explain(model)
        report["explained"] = {verdict.backend: [str(reason) for reason in verdict.refusals] for verdict in verdicts}
        with attnzoo.patch(model, "sdpa") as handle:
            model(input_ids=torch.tensor([[1, 2, 3]]))
        report["ran"] = [[site.kernel, site.calls] for site in handle.sites]
        from attnzoo.benchmarks.plots import require_matplotlib

        try:
            require_matplotlib()
        except attnzoo.InvalidArgumentError as error:
            report["plots"] = str(error)
    print(json.dumps(report))
"""


def probe(folder, *arguments):
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    command = [sys.executable, "-c", textwrap.dedent(PROBE), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_broken_packages_break_nothing_else(tmp_path):
    """SystemExit would end the process. The tests above plant the other errors."""
    source, raised = KINDS["SystemExit"]
    broken = ("flash-attn", "xformers", "matplotlib")
    for distribution in broken:
        plant(tmp_path, distribution, source)
    report = probe(tmp_path, "models")
    for distribution in broken:
        ok, detail = report["findings"][f"package {distribution}"]
        assert not ok and f"9.9 is broken: {raised}" in detail
    assert set(report["infos"]) == set(attnzoo.backends()), "a backend is gone because a package is broken"
    available, reason = report["infos"]["xformers"]
    assert not available and f"xformers cannot be imported: {raised}" in reason
    assert any(raised in line for line in report["explained"]["xformers"])
    assert all(report["findings"][f"model {model_type}"][0] for model_type in attnzoo.registry.registry.model_types())
    assert report["explained"]["sdpa"] == report["explained"]["eager"] == []
    assert report["ran"] == [["flash", 1]] and report["attended"] == [1, 2, 5, 8]
    assert f"({raised}" in report["plots"] and "--no-plot" in report["plots"]


def test_a_broken_accelerate_breaks_only_transformers(tmp_path):
    """transformers imports accelerate with every model, so there is no model to patch; the rest works."""
    plant(tmp_path, "accelerate", KINDS["SystemExit"][0])
    report = probe(tmp_path)
    assert "9.9 is broken: SystemExit: needs a GPU" in report["findings"]["package accelerate"][1]
    assert report["infos"]["sdpa"][0] and report["attended"] == [1, 2, 5, 8]
    for model_type in attnzoo.registry.registry.model_types():
        assert "cannot be imported: SystemExit: needs a GPU" in report["findings"][f"model {model_type}"][1]
