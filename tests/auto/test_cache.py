"""The cache of measurements: files are read once, replaced as a whole, and ignored if they are corrupt."""

import json
import multiprocessing
import tempfile
import time
import warnings
from pathlib import Path

import pytest
import torch

import attnzoo
from attnzoo.auto import cache, environment, selection
from attnzoo.reporting import doctor
from attnzoo.tuning import race
from tests.support.tuning import attention, files, forget, measured, neox_inputs, took, tune


def test_tune_measures_again_only_on_request(add, clock):
    slow, fast = add("slow", seconds=4.0), add("fast")
    first = tune(clock)
    slow.runs.clear(), fast.runs.clear()
    second = tune(clock)
    assert second == first and second.modules == first.modules
    assert first.fresh == {measurement.key for measurement in (*first, *first.modules)} and second.fresh == frozenset()
    assert "already stored" in str(second) and "already stored" not in str(first)
    assert max(len(slow.runs), len(fast.runs)) <= 2, "only the forward of the two layers, no measurement"
    assert tune(clock, again=True).fresh == first.fresh


@pytest.mark.parametrize("change", ["new backend", "other code"])
def test_a_new_or_changed_backend_is_measured(add, clock, change):
    add("slow", seconds=4.0), add("fast")
    tune(clock)
    add("faster", seconds=0.5) if change == "new backend" else add("slow", seconds=0.5, version="2")
    assert tune(clock).fresh
    assert took().reason.startswith("measured 500 ms")


def test_another_process_reads_the_file(add, clock):
    add("slow", seconds=4.0, rank=5), add("fast")
    report = tune(clock)
    forget()
    assert took().backend.name == "fast"
    (file,) = cache.stored()
    assert file.measurements == {measurement.key: measurement for measurement in (*report, *report.modules)}
    assert not file.problem
    assert file.environment["versions"]["torch"] == torch.__version__
    assert json.loads(file.path.read_text())["format"] == cache.FORMAT


@pytest.mark.parametrize("other", ["threads", "version", "device"])
def test_each_environment_has_its_file(add, clock, monkeypatch, other):
    add("slow", seconds=4.0, rank=5), add("fast")
    tune(clock)
    if other == "threads":
        monkeypatch.setattr(torch, "get_num_threads", lambda: 63)
    else:
        name = "_version" if other == "version" else "_cpu_model"
        monkeypatch.setattr(environment, name, lambda *package: "9.9")
        monkeypatch.setattr(environment, "_environment", environment._environment.__wrapped__)
    assert took().backend.name == "slow"
    (known,) = cache.stored()
    tune(clock)
    assert len(cache.stored()) == 2 and known in cache.stored()


def test_without_saving_only_this_process_knows_the_measurements(add, clock):
    add("slow", seconds=4.0, rank=5), add("fast")
    tune(clock, save=False)
    assert took().backend.name == "fast" and files() == []
    forget()
    assert took().backend.name == "slow"


def test_a_forward_neither_measures_nor_writes(add, monkeypatch):
    add("slow", rank=5), add("fast")
    monkeypatch.setattr(race, "race", lambda *args, **kwargs: pytest.fail("measured"))
    took()
    selection.choose_for(attention())
    assert files() == []


def test_the_folder_follows_the_environment_variables(monkeypatch, tmp_path):
    assert cache.folder() == tmp_path / "cache" / "auto"
    monkeypatch.delenv("ATTNZOO_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.folder() == tmp_path / "xdg" / "attnzoo" / "auto"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache.folder() == tmp_path / "home" / ".cache" / "attnzoo" / "auto"


def test_user_without_a_home_has_the_folder_of_temporary_files(monkeypatch):
    """In a container, a user may have neither a name nor a home."""

    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("ATTNZOO_CACHE_DIR", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    assert cache.folder() == Path(tempfile.gettempdir()) / ".cache" / "attnzoo" / "auto"


def test_check_writable_creates_the_folder_with_all_parents(monkeypatch, tmp_path):
    monkeypatch.setenv("ATTNZOO_CACHE_DIR", str(tmp_path / "new" / "cache"))
    cache.check_writable()
    assert cache.folder().is_dir() and not list(cache.folder().iterdir())


def corrupt(path, kind):
    data = json.loads(path.read_text())
    if kind == "an entry without seconds' type":
        next(iter(data["measurements"][0]["outcomes"].values()))["seconds"] = "fast"
    elif kind == "not finite":
        next(iter(data["measurements"][0]["outcomes"].values()))["seconds"] = float("nan")
    elif kind == "a first run without a number":
        next(iter(data["measurements"][0]["outcomes"].values()))["first"] = None
    elif kind == "an entry of another kind":
        data["measurements"].append(7)
    elif kind == "a request without segments":
        del data["measurements"][0]["request"]["segments"]
    elif kind == "another format":
        data["format"] = "attnzoo auto 99"
    elif kind == "another environment":
        data["environment"]["name"] = "somebody else's"
    else:
        plain = {"binary": b"\x80\xff\x00", "empty": b"", "a list": b"[]", "endless lists": b"[" * 100_000}
        path.write_bytes(plain.get(kind, path.read_bytes()[:-40]))
        return
    path.write_text(json.dumps(data))


@pytest.mark.parametrize(
    "kind",
    ["an entry without seconds' type", "not finite", "a first run without a number", "an entry of another kind",
     "a request without segments", "another format", "another environment", "cut off", "binary", "empty", "a list",
     "endless lists"],
)  # fmt: skip
def test_a_corrupt_file_gives_one_warning_and_is_ignored_and_replaced(add, clock, kind):
    add("slow", seconds=4.0, rank=5), add("fast")
    tune(clock)
    (path,) = cache.folder().glob("*.json")
    corrupt(path, kind)
    forget()
    with pytest.warns(cache.CacheWarning, match=f"{path.name} is ignored, 'auto' selects by priority: .*tune --clear"):
        assert took().backend.name == "slow"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert took().backend.name == "slow"
        assert tune(clock).fresh
    if kind != "another environment":  # a valid file of that other environment
        assert "is ignored" not in finding().detail
    forget()
    assert took().backend.name == "fast"


def finding():
    (result,) = [item for item in doctor.examine() if item.name == "measurements for auto"]
    return result


def test_doctor_shows_the_cache_and_the_mode_of_auto(add, clock, monkeypatch, tmp_path):
    assert finding().ok and "none in" in finding().detail
    assert not (tmp_path / "cache").exists(), "doctor creates nothing"
    add("slow"), add("fast")
    tune(clock)
    assert finding().detail.startswith("2 in "), "an attention and a module"
    monkeypatch.setenv("ATTNZOO_AUTO", "priority")
    assert "not used: ATTNZOO_AUTO=priority" in finding().detail
    monkeypatch.setenv("ATTNZOO_AUTO", "fastest")
    assert not finding().ok and "ATTNZOO_AUTO: got 'fastest'" in finding().detail
    monkeypatch.delenv("ATTNZOO_AUTO")
    next(cache.folder().glob("*.json")).write_text("{")
    assert not finding().ok and "is ignored: " in finding().detail


def test_tune_checks_that_the_folder_is_writable_before_it_measures(add, clock, monkeypatch, tmp_path):
    slow, fast = add("slow", seconds=4.0, rank=5), add("fast")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ATTNZOO_CACHE_DIR", str(tmp_path / "file" / "below"))
    allowed = "cache: got .*below.*; allowed: a writable folder .*ATTNZOO_CACHE_DIR.*save=False"
    with pytest.raises(attnzoo.CacheError, match=allowed):
        tune(clock)
    assert slow.runs == fast.runs == []
    assert not finding().ok and "cannot be written" in finding().detail
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert took().backend.name == "slow", "a forward does not need the folder"
    tune(clock, save=False)
    assert took().backend.name == "fast"


def test_a_failed_write_keeps_the_old_file(add, clock, monkeypatch):
    add("slow", seconds=4.0), add("fast")
    tune(clock)
    before = next(cache.folder().glob("*.json")).read_bytes()

    def full(self, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(cache.folder()), "replace", full)
    with pytest.raises(attnzoo.CacheError, match="No space left on device"):
        tune(clock, inputs=neox_inputs(50))
    assert next(cache.folder().glob("*.json")).read_bytes() == before
    assert not list(cache.folder().glob("*.part"))
    assert took(inputs=neox_inputs(50)).reason.startswith("measured"), "this process has the measurement"


def _measure_in_a_process(number):
    for length in range(4):
        measured(attention(2 ** (4 * number + length), batch=1), {"slow": 2.0, "fast": 1.0})


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_processes_that_measure_at_the_same_time_lose_nothing(add, monkeypatch):
    """Each process reads the file, waits, adds its measurements and writes the file."""
    read = cache._saved

    def read_slowly(path):
        measurements = read(path)
        time.sleep(0.02)
        return measurements

    monkeypatch.setattr(cache, "_saved", read_slowly)
    add("slow"), add("fast")
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=_measure_in_a_process, args=(number,)) for number in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    (file,) = cache.stored()
    assert len(file.measurements) == 12 and not list(cache.folder().glob("*.part"))


def test_an_environment_names_the_device_its_threads_and_every_package_with_kernels(monkeypatch):
    monkeypatch.setattr(environment, "_version", lambda package: "9.9")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 5)
    environment._environment.cache_clear()
    here, meta = (environment.environment_of(torch.device(device)) for device in ("cpu", "meta"))
    environment._environment.cache_clear()
    packages = {"attnzoo": "9.9", "triton": "9.9", "flash-attn": "9.9", "xformers": "9.9"}
    assert dict(here.versions) == dict(meta.versions) == {"torch": str(torch.__version__), **packages}
    assert (here.device, here.threads) == ("cpu", 5) and (meta.device, meta.name, meta.threads) == ("meta", "meta", 0)
    assert here.file != meta.file
