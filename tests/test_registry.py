"""The registry: registration, name collisions, suggestions, and entry points that fail to load."""

import importlib.metadata
import re
import subprocess
import sys
import textwrap

import pytest
import torch
from transformers import BloomConfig, BloomModel

import attnzoo
from attnzoo import BackendRefusedError, InvalidArgumentError, UnknownNameError
from attnzoo.backends.eager import EagerBackend
from attnzoo.registry import Registry, registry
from attnzoo.reporting import doctor
from tests.support.fake_backends import fake_backend, small_inputs

pytestmark = pytest.mark.usefixtures("isolated_registry")


def add_entry_points(monkeypatch, group, **results):
    """Add entry points by name; ``load`` returns the result, or raises it if it is an exception."""
    original = importlib.metadata.entry_points

    class Entry:
        def __init__(self, name, result):
            self.name, self.value, self.result = name, f"third_party.{name}:Thing", result

        def load(self):
            if isinstance(self.result, BaseException):
                raise self.result
            return self.result

    def entry_points(**which):
        entries = list(original(**which))
        if which.get("group") == group:
            entries += [Entry(name, result) for name, result in results.items() if which.get("name") in (None, name)]
        return entries

    monkeypatch.setattr(importlib.metadata, "entry_points", entry_points)


# Registering


def test_register_backend_as_a_decorator():
    @attnzoo.register_backend
    class Mine(fake_backend("mine", aliases=("my-own",))):
        """A backend of a user."""

    assert Mine.__doc__ == "A backend of a user."
    info = attnzoo.backends()["mine"]
    assert (info.name, info.aliases, info.available, info.reason, info.exact) == ("mine", ("my-own",), True, "", True)
    assert info.capabilities == Mine.capabilities
    out = attnzoo.attention(**small_inputs(), backend="mine")
    again = attnzoo.attention(**small_inputs(), backend="my-own")
    assert len(Mine.runs) == 2
    assert torch.equal(out, again)


def test_backends_lists_availability_and_capabilities():
    infos = attnzoo.backends()
    assert list(infos) == sorted(infos)
    assert infos["eager"].available and infos["sdpa"].available
    assert infos["eager"].capabilities.probabilities and not infos["sdpa"].capabilities.probabilities


@pytest.mark.parametrize(
    ("name", "names"),
    [("sdpa", ()), ("mine", ("eager",)), ("other-alias", ()), ("mine", ("other-alias",)), ("auto", ()), ("native", ()),
     ("mine", ("auto",))],
)  # fmt: skip
def test_a_taken_name_is_refused(name, names):
    attnzoo.register_backend(fake_backend("other", aliases=("other-alias",)))
    before = attnzoo.backends()
    taken = name if name != "mine" else names[0]
    with pytest.raises(InvalidArgumentError, match=f"backend name: got '{taken}'; allowed: a name other .*'{taken}'"):
        attnzoo.register_backend(fake_backend(name, aliases=names))
    assert attnzoo.backends() == before


def test_registering_the_same_class_twice_is_allowed():
    cls = attnzoo.register_backend(fake_backend("mine", aliases=("my-own",)))
    assert attnzoo.register_backend(cls) is cls


def test_replace_takes_over_a_name():
    cls = attnzoo.register_backend(fake_backend("sdpa"), replace=True)
    attnzoo.attention(**small_inputs(), backend="sdpa")
    assert len(cls.runs) == 1


def test_replace_takes_over_an_alias():
    first = attnzoo.register_backend(fake_backend("first", aliases=("nick",)))
    second = attnzoo.register_backend(fake_backend("second", aliases=("nick",)), replace=True)
    attnzoo.attention(**small_inputs(), backend="nick")
    assert (len(first.runs), len(second.runs)) == (0, 1)


def test_options_are_the_fields_that_users_set():
    """Approximate backends have a further field, which ``patch`` sets for sites that stay exact."""
    options = {name: set(info.options) for name, info in attnzoo.backends().items()}
    assert options["blocked-local"] == {"window", "sinks", "inner"}
    assert options["lsh"] == {"num_hashes", "chunk_length", "num_buckets", "seed", "inner"}
    with pytest.raises(UnknownNameError, match="option of backend 'blocked-local': got 'kept'"):
        attnzoo.configure("blocked-local", window=4, kept=True)


def test_backends_lists_an_alias_at_its_last_owner_only():
    attnzoo.register_backend(fake_backend("first", aliases=("nick", "mine")))
    attnzoo.register_backend(fake_backend("second", aliases=("nick",)), replace=True)
    attnzoo.register_backend(fake_backend("mine"), replace=True)
    aliases = {name: info.aliases for name, info in attnzoo.backends().items()}
    assert (aliases["first"], aliases["second"], aliases["mine"]) == ((), ("nick",), ())
    attnzoo.unregister_backend("second")
    assert attnzoo.backends()["first"].aliases == ("nick",)


def test_replace_does_not_take_over_a_reserved_name():
    with pytest.raises(InvalidArgumentError, match="backend name: got 'auto'"):
        attnzoo.register_backend(fake_backend("auto"), replace=True)


@pytest.mark.parametrize("thing", [lambda: None, EagerBackend(), attnzoo.Backend, "sdpa", object])
def test_register_backend_refuses_anything_but_a_backend_class(thing):
    with pytest.raises(InvalidArgumentError, match=r"cls: got .*; allowed: a subclass of attnzoo\.Backend with a name"):
        attnzoo.register_backend(thing)


def test_unregister_backend_by_name_or_alias():
    attnzoo.register_backend(fake_backend("mine", aliases=("my-own",)))
    attnzoo.unregister_backend("my-own")
    assert "mine" not in attnzoo.backends()
    with pytest.raises(UnknownNameError, match="backend: got 'mine'"):
        attnzoo.unregister_backend("mine")
    attnzoo.register_backend(fake_backend("mine"))


def test_a_taken_name_is_refused_before_entry_points_are_loaded():
    """The test needs a new process, in which no entry point has been loaded."""
    script = """
    import attnzoo
    from attnzoo.errors import InvalidArgumentError
    class Fake(attnzoo.Backend):
        name = "sdpa"
    try:
        attnzoo.register_backend(Fake)
    except InvalidArgumentError as error:
        print(error)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=300, check=True
    )
    assert "backend name: got 'sdpa'" in done.stdout


# Unknown names


@pytest.mark.parametrize(
    ("typed", "meant"), [("spda", "sdpa"), ("egaer", "eager"), ("atuo", "auto"), ("SDPA", "sdpa"), ("nativ", "native")]
)
def test_similar_names_are_suggested(typed, meant):
    with pytest.raises(UnknownNameError, match=f"got '{typed}' .did you mean .*'{meant}'.*allowed: 'auto', .*'eager'"):
        attnzoo.attention(**small_inputs(), backend=typed)


def test_similar_aliases_are_suggested():
    attnzoo.register_backend(fake_backend("mine", aliases=("imitation",)))
    with pytest.raises(UnknownNameError, match="did you mean 'imitation'"):
        attnzoo.attention(**small_inputs(), backend="imitatoin")


@pytest.mark.parametrize("thing", [5, None, ["sdpa"]])
def test_a_backend_that_is_no_string_is_refused(thing):
    with pytest.raises(InvalidArgumentError, match=rf"backend: got {re.escape(repr(thing))}.*; allowed: .*'auto'"):
        attnzoo.attention(**small_inputs(), backend=thing)


def test_options_after_a_colon_are_refused_as_keywords():
    """The command line and ``attn_implementation`` take them. ``patch`` takes keyword arguments."""
    with pytest.raises(InvalidArgumentError) as caught:
        attnzoo.configure("blocked-local:window=64,sinks=4")
    assert str(caught.value) == (
        "backend: got 'blocked-local:window=64,sinks=4'; "
        "allowed: 'blocked-local', and options as keyword arguments: window=64, sinks=4"
    )
    with pytest.raises(UnknownNameError):
        attnzoo.configure("blocked-lokal:window=64")


@pytest.mark.parametrize("thing", ["zzzzzzzz", ""])
def test_a_name_without_similar_names_gets_the_list(thing):
    with pytest.raises(UnknownNameError, match=r"backend: got .*; allowed: .*'eager'.*'sdpa'") as caught:
        attnzoo.attention(**small_inputs(), backend=thing)
    assert "did you mean" not in str(caught.value)


# Entry points and availability checks that fail


def entry_point_findings(name):
    return [finding for finding in doctor.examine() if (finding.kind, finding.name) == ("entry point", name)]


@pytest.mark.parametrize(
    "error",
    [
        ImportError("libcudart.so.13: cannot open shared object file"),
        RuntimeError("built for another torch"),
        OSError("undefined symbol: _ZN3c10"),
        AttributeError("module 'torch' has no attribute 'x'"),
        SyntaxError("invalid syntax"),
    ],
)
def test_an_entry_point_that_fails_to_load_is_listed_with_its_reason(monkeypatch, error):
    add_entry_points(monkeypatch, "attnzoo.backends", broken=error, good=fake_backend("good"))
    with registry.replaced_by(Registry()):
        infos = attnzoo.backends()
        assert infos["good"].available and infos["sdpa"].available
        info = infos["broken"]
        assert (info.available, info.exact, info.capabilities) == (False, False, None)
        assert info.reason == f"third_party.broken:Thing failed to load: {type(error).__name__}: {error}"
        attnzoo.attention(**small_inputs())
        attnzoo.attention(**small_inputs(), backend="good")
        with pytest.raises(InvalidArgumentError) as caught:
            attnzoo.attention(**small_inputs(), backend="broken")
        assert str(error) in str(caught.value)
        assert "allowed: a backend that loads" in str(caught.value)


def test_an_entry_point_that_cannot_be_registered_is_listed_with_its_reason(monkeypatch):
    add_entry_points(monkeypatch, "attnzoo.backends", nonsense=print, thief=fake_backend("thief", aliases=("sdpa",)))
    with registry.replaced_by(Registry()):
        infos = attnzoo.backends()
        assert "a subclass of attnzoo.Backend" in infos["nonsense"].reason
        assert "got 'sdpa'" in infos["thief"].reason
        assert registry.backend_class("sdpa").__module__.startswith("attnzoo.")


@pytest.mark.parametrize(
    ("second", "words"),
    [(fake_backend("sdpa"), "Thing is not used: another object has this name"), (OSError("no"), "OSError: no")],
)
def test_doctor_names_a_second_entry_point_of_a_backend_name(monkeypatch, second, words):
    add_entry_points(monkeypatch, "attnzoo.backends", sdpa=second)
    with registry.replaced_by(Registry()):
        assert attnzoo.backends()["sdpa"].available
        assert registry.backend_class("sdpa").__module__ == "attnzoo.backends.sdpa.backend"
        (finding,) = entry_point_findings("sdpa")
    assert not finding.ok and "third_party.sdpa:Thing" in finding.detail and words in finding.detail


def test_two_entry_points_of_the_same_class_are_allowed(monkeypatch):
    """An installation can have two records that name the same class."""
    add_entry_points(monkeypatch, "attnzoo.backends", eager=EagerBackend)
    with registry.replaced_by(Registry()):
        assert attnzoo.backends()["eager"].available and not entry_point_findings("eager")


def test_patch_names_an_adapter_that_fails_to_load(monkeypatch):
    add_entry_points(monkeypatch, "attnzoo.adapters", bloom=RuntimeError("written for transformers 4"))
    config = BloomConfig(vocab_size=9, hidden_size=8, n_layer=1, n_head=1)
    with pytest.raises(attnzoo.PatchError) as caught:
        attnzoo.patch(BloomModel(config), "sdpa")
    assert "an adapter exists but did not load: bloom: third_party.bloom:Thing" in str(caught.value)
    assert "RuntimeError: written for transformers 4" in str(caught.value)
    assert registry.find_adapter("gpt_neox") is not None


def test_entry_points_of_adapters_are_read_again_only_after_a_change(monkeypatch):
    """Reading entry points is slow (milliseconds), because each installed package has its own file of them."""
    read, original = [], importlib.metadata.entry_points
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda **which: read.append(1) or original(**which))
    registry.adapters()  # loads what is not loaded, which is a change
    read.clear()
    registry.forget()
    for _ in range(3):
        assert registry.adapters() and registry.find_adapter("unknown") is None and registry.model_types()
    assert len(read) == 1
    registry.forget()  # as after an installation
    assert registry.adapters() and len(read) == 2


@pytest.mark.parametrize(
    ("second", "words"),
    [
        (attnzoo.Adapter(model_types=("gpt_neox",), points=()), "Thing is not used: another object has this name"),
        (OSError("no"), "failed to load: OSError: no"),
    ],
)
def test_doctor_names_a_second_entry_point_of_a_model_type(monkeypatch, second, words):
    honest = registry.find_adapter("gpt_neox")
    add_entry_points(monkeypatch, "attnzoo.adapters", gpt_neox=second)
    assert registry.find_adapter("gpt_neox") is honest
    (finding,) = entry_point_findings("gpt_neox")
    assert not finding.ok and "third_party.gpt_neox:Thing" in finding.detail and words in finding.detail
    assert doctor._model("gpt_neox").ok


def test_an_unavailable_backend_is_refused_with_its_reason():
    attnzoo.register_backend(fake_backend("mine", priority=1000, why_not="mine_kernels is missing: pip install mine"))
    info = attnzoo.backends()["mine"]
    assert not info.available and info.reason == "mine_kernels is missing: pip install mine"
    with pytest.raises(BackendRefusedError, match="availability: got mine_kernels is missing") as caught:
        attnzoo.attention(**small_inputs(), backend="mine")
    assert {"eager", "sdpa"} <= set(caught.value.alternatives["attention"])
    assert "mine" not in caught.value.alternatives["attention"]
    attnzoo.attention(**small_inputs())  # auto skips it


def test_an_availability_check_that_raises_gives_the_reason():
    cls = fake_backend("mine", priority=1000)

    def unavailable(cls):
        raise OSError("libmine.so: cannot open shared object file")

    cls.unavailable = classmethod(unavailable)
    attnzoo.register_backend(cls)
    info = attnzoo.backends()["mine"]
    assert not info.available
    assert "OSError: libmine.so: cannot open shared object file" in info.reason
    attnzoo.attention(**small_inputs())
    with pytest.raises(BackendRefusedError, match=r"libmine\.so"):
        attnzoo.attention(**small_inputs(), backend="mine")


# Adapters


def test_register_and_unregister_adapters():
    adapter = attnzoo.Adapter(model_types=("mine", "mine_too"), points=(), versions="5")
    assert attnzoo.register_adapter(adapter) is adapter
    attnzoo.register_adapter(adapter)
    assert {"mine", "mine_too", "led", "gpt_neox"} <= set(registry.model_types())
    other = attnzoo.Adapter(model_types=("new", "mine_too"), points=())
    with pytest.raises(InvalidArgumentError, match=r"model_type: got 'mine_too'; allowed: .*replace=True"):
        attnzoo.register_adapter(other)
    assert registry.find_adapter("new") is None
    attnzoo.register_adapter(other, replace=True)
    assert registry.find_adapter("mine_too") is other
    attnzoo.unregister_adapter("mine_too")
    assert registry.find_adapter("mine_too") is None
    with pytest.raises(UnknownNameError, match=r"model_type: got 'mien' .did you mean 'mine'"):
        attnzoo.unregister_adapter("mien")
    with pytest.raises(InvalidArgumentError, match=r"adapter: got 'led'; allowed: an attnzoo\.Adapter"):
        attnzoo.register_adapter("led")
