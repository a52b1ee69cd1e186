"""The handle of a patch: the table it prints, finding it from the model, and replacing the patch."""

from __future__ import annotations

import copy
from collections import Counter

import pytest

import attnzoo
from attnzoo.patching.site_table import table
from attnzoo.patching.sites import Site

# The table


def rows_of(handle):
    """Return the words of each row of the printed table. The terminal is wide, so no line wraps."""
    return [line.split() for line in str(handle).splitlines()]


@pytest.fixture
def wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")


@pytest.mark.usefixtures("wide")
def test_a_handle_prints_one_row_for_equal_sites(led):
    with attnzoo.patch(led.model, "eager") as handle:
        led.logits()
    header, *rows = rows_of(handle)
    assert header == ["backend", "kernel", "calls", "fallbacks", "sites"]
    kinds = {(site.cls, site.pattern): site for site in reversed(handle.sites)}
    assert len(rows) == len(kinds) < len(handle.sites)
    for row, (kind, first) in zip(rows, reversed(kinds.items()), strict=True):
        more = sum((site.cls, site.pattern) == kind for site in handle.sites) - 1
        assert row[:5] == ["eager", "eager", str(first.calls), "0", first.name]
        assert " ".join(row[5:]) == f"and {more} more " * bool(more) + f"({', '.join(kind)})"


@pytest.mark.usefixtures("wide")
def test_sites_with_other_kernels_have_a_separate_row(neox):
    with attnzoo.patch(neox.model, {"*.0.*": "eager", "*": "sdpa"}) as handle:
        assert [row[:4] for row in rows_of(handle)[1:]] == [["eager", "-", "0", "0"], ["sdpa", "-", "0", "0"]]
        neox.logits()
        assert [row[1:3] for row in rows_of(handle)[1:]] == [["eager", "1"], [handle.sites[1].kernel, "1"]]


@pytest.mark.usefixtures("wide")
def test_counts_that_differ_between_equal_sites_print_as_a_range(neox):
    with attnzoo.patch(neox.model, "eager", fallback="native") as handle:
        neox.logits()
    first = handle.sites[0]
    first.kernels["eager"] += 2
    first.fallbacks += 1
    ((backend, kernel, calls, fallbacks, *_),) = rows_of(handle)[1:]
    assert (backend, kernel, calls, fallbacks) == ("eager", "eager", "1-3", "0-1")


@pytest.mark.usefixtures("wide")
def test_the_table_shows_no_kernel_before_the_first_call(neox):
    with attnzoo.patch(neox.model, "sdpa") as handle:
        assert rows_of(handle)[1][:4] == ["sdpa", "-", "0", "0"]


# Finding the handle


def test_handle_returns_the_last_patch_of_a_model(subject):
    assert not attnzoo.is_patched(subject.model)
    with pytest.raises(attnzoo.PatchError, match="not patched"):
        attnzoo.handle(subject.model)
    below = attnzoo.patch(subject.model, "sdpa")
    above = attnzoo.patch(subject.model, "eager")
    assert attnzoo.is_patched(subject.model)
    assert attnzoo.handle(subject.model).sites == above.sites
    subject.logits()
    assert all(site.calls for site in attnzoo.handle(subject.model).sites)
    attnzoo.handle(subject.model).remove()
    assert not above.active and attnzoo.handle(subject.model).sites == below.sites


def test_handle_returns_the_patch_of_a_deep_copy(subject):
    original = attnzoo.patch(subject.model, "sdpa")
    twin = copy.deepcopy(subject.model)
    subject.logits(twin)
    assert all(site.calls for site in attnzoo.handle(twin).sites)
    attnzoo.handle(twin).remove()
    assert not attnzoo.is_patched(twin) and original.active


# Replacing patches


def test_a_patch_with_replace_is_the_only_one(subject, snapshot):
    before = snapshot(subject)
    for backend in ("sdpa", "eager", "sdpa"):
        handle = attnzoo.patch(subject.model, backend, replace=True)
        subject.logits()
        assert {site.backend for site in handle.sites} == {backend} and all(site.calls for site in handle.sites)
    handle.remove()
    before.assert_unchanged()


def test_a_refused_patch_with_replace_leaves_the_old_patches(subject):
    old = attnzoo.patch(subject.model, "sdpa")
    with pytest.raises(attnzoo.BackendRefusedError):
        attnzoo.patch(subject.model, "flash", replace=True)
    assert old.active and attnzoo.handle(subject.model).sites == old.sites


def test_replace_in_a_part_of_a_patched_model_raises_and_changes_nothing(neox):
    """A patch of the part could be removed, but the patch of the model could not. So both stay."""
    outer = attnzoo.patch(neox.model, "sdpa")
    part = neox.model.gpt_neox.layers[1]
    inner = attnzoo.patch(part, "eager")
    with pytest.raises(attnzoo.PatchError, match=r"no longer in place at .*allowed: the whole model that was patched"):
        attnzoo.patch(part, "native", replace=True)
    assert inner.active and outer.active


def site(**changes):
    given = dict(
        name="layers.0", cls="Attention", pattern="causal", backend="blocked-local", changes=("window of 4 keys",)
    )
    return Site(**{**given, **changes})


OTHER_SITES = {
    "class": dict(cls="Other"),
    "pattern": dict(pattern="full"),
    "backend": dict(backend="sdpa"),
    "kernel": dict(kernels=Counter(flash=1), changed=Counter({"window of 4 keys": 1})),
    "approximation": dict(changes=("window of 8 keys",)),
    "exact": dict(changes=()),
}


@pytest.mark.usefixtures("wide")
@pytest.mark.parametrize("changes", OTHER_SITES.values(), ids=OTHER_SITES)
def test_sites_share_a_row_only_if_all_that_the_row_shows_is_equal(changes):
    assert len(table([site(), site(name="layers.1")]).splitlines()) == 2
    assert len(table([site(), site(name="layers.1", **changes)]).splitlines()) == 3


@pytest.mark.usefixtures("wide")
@pytest.mark.parametrize("order", [(2, 1, 3), (1, 2, 3), (3, 2, 1)])
def test_a_range_has_the_smallest_and_the_largest_count(order):
    sites = [site(name=f"layers.{n}", kernels=Counter(flash=n), fallbacks=4 - n, changes=()) for n in order]
    assert table(sites).splitlines()[1].split()[:4] == ["blocked-local", "flash", "1-3", "1-3"]


def test_a_site_lists_the_choices_of_auto_most_frequent_first():
    eager, sdpa = attnzoo.configure("eager"), attnzoo.configure("sdpa")
    once, twice = {attnzoo.Choice(eager, "measured"): 1}, {attnzoo.Choice(sdpa, "measured"): 2}
    for selections in ({**once, **twice}, {**twice, **once}, {**once, **twice, attnzoo.Choice(sdpa, "by priority"): 1}):
        assert site(backend="auto", selections=Counter(selections)).ran == "auto: sdpa+eager"
