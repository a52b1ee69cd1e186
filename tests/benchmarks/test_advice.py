"""docs/guide/which-backend.md contains the JSON in the repository, and recommends only what was measured."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from attnzoo.benchmarks import advice
from attnzoo.errors import InvalidArgumentError

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "guide" / "which-backend.md"


@pytest.fixture
def page_of(plain, tmp_path):
    """Return a function that makes the page from one run, in which the backends have these seconds and peaks."""

    def make(folder="one", device="cpu", **backends):
        first, *_ = plain.rows
        values = {"native": (1.0, 1000), **backends}
        rows = [
            replace(first, backend=name, seconds=seconds, peak_bytes=peak, device=device)
            for name, (seconds, peak) in values.items()
        ]
        rows = [replace(row, versions={**row.versions, "gpu": "a card"}).compared_with(rows[0]) for row in rows]
        replace(plain, rows=tuple(rows)).write(tmp_path / folder / "tiny.json")
        return advice.page(tmp_path)

    return make


def lines_of(page):
    return [line.split(" | ") for line in page.splitlines() if line.startswith("| tiny")]


def test_page_in_the_documentation_is_up_to_date():
    assert PAGE.read_text() == advice.page(ROOT / "benchmarks" / "results") + "\n", (
        f"{PAGE} does not show the results in benchmarks/results. Run: make docs-advice"
    )


def test_the_fastest_backend_is_recommended(page_of):
    (line,) = lines_of(page_of(sdpa=(0.5, 900), flex_attention=(0.4, 950)))
    assert line[1:6] == ["40", "inference", "`flex_attention`", "2.50x", "0.95x"]


@pytest.mark.parametrize(
    ("seconds", "peak", "take", "speed"),
    [
        (0.99, 1000, "`auto`", "1.01x with `sdpa`"),  # noise
        (1.2, 950, "`auto`", "0.83x with `sdpa`"),
        (0.9, 1100, "`sdpa`", "1.11x"),
        (1.2, 100, "`sdpa`", "0.83x"),  # a tenth of the memory
    ],
)
def test_a_backend_without_gain_is_not_recommended(page_of, seconds, peak, take, speed):
    (line,) = lines_of(page_of(sdpa=(seconds, peak)))
    assert line[3:5] == [take, speed]


def test_times_of_a_shared_machine_decide_nothing(page_of):
    (line,) = lines_of(page_of("one-shared", sdpa=(0.1, 500), flex_attention=(9.0, 400)))
    assert line[3:6] == ["`flex_attention`", "", "0.40x"]


def test_results_of_a_machine_that_just_started_are_left_out(page_of):
    with pytest.raises(InvalidArgumentError, match=r"folder: got .*, without a case"):
        page_of("one-just-started", sdpa=(0.1, 500))


def test_page_says_whether_a_gpu_was_measured(page_of):
    assert advice.NO_CUDA in page_of(sdpa=(0.5, 900))
    page = page_of(device="cuda", sdpa=(0.5, 900))
    assert advice.NO_CUDA not in page and "a card" in page
