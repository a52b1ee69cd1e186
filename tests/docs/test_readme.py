"""The numbers on README's first page are numbers of the result files."""

from __future__ import annotations

import re

from matplotlib import image

from attnzoo.benchmarks import plots
from attnzoo.benchmarks.rows import OK, Shootout
from tests.docs.pages import DOCS, ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
NAMES = {
    "led": "LED",
    "longt5_local": "LongT5 local",
    "longt5_tglobal": "LongT5 transient-global",
    "reformer": "Reformer",
    "gpt_neox": "GPT-NeoX",
    "gpt_bigcode": "GPTBigCode",
}


def whole_models(folder):
    """Rows of ``sdpa`` by family, length and mode."""
    rows = {}
    for path in (ROOT / "benchmarks" / "results" / folder).glob("*-model-*.json"):
        for row in Shootout.read(path).rows:
            if row.status == OK and row.backend == "sdpa" and row.peak_ratio is not None:
                rows[row.family, row.seq_len, row.mode] = row
    return rows


def test_table_of_gains_has_the_measured_numbers():
    lines = [line.replace("*", "") for line in README.splitlines()]
    measured = whole_models("epyc")
    forwards = [row for (_, _, mode), row in measured.items() if mode == "forward"]
    assert len(forwards) == len(NAMES)
    for row in forwards:
        train = measured[row.family, row.seq_len, "forward+backward"]
        numbers = (row.speedup, row.peak_ratio, train.speedup, train.peak_ratio)
        cells = " | ".join(["", str(row.seq_len), *(f"{number:.2f}x" for number in numbers), ""]).strip()
        layers = " (2 layers)" if "2 layer(s)" in row.note else ""
        line = re.compile(rf"\| {NAMES[row.family]}{re.escape(layers)}(, already on `sdpa`)? {re.escape(cells)}")
        assert any(line.fullmatch(text) for text in lines), line.pattern


def test_memory_at_16384_tokens_has_the_measured_numbers():
    text = " ".join(README.split())
    ratios = {
        row.family: f"{row.peak_ratio:.2f}x" for row in whole_models("epyc-shared").values() if row.seq_len == 16384
    }
    assert (
        f"needs {ratios['led']} of the original's memory for LED, {ratios['longt5_local']} and "
        f"{ratios['longt5_tglobal']} for LongT5 local and transient-global, and {ratios['reformer']} for Reformer"
        in text
    )


def test_first_page_and_site_show_a_small_picture():
    picture = DOCS / "images" / "led-model.png"
    assert "(docs/images/led-model.png)" in README and "(images/led-model.png)" in (DOCS / "index.md").read_text()
    assert picture.stat().st_size < 200_000


def test_picture_is_drawn_from_the_results(tmp_path):
    (result,) = (ROOT / "benchmarks" / "results" / "epyc-cpu-time").glob("led-model-forward.json")
    plots.draw_front(Shootout.read(result), tmp_path / "front.png")
    drawn, stored = (image.imread(path) for path in (tmp_path / "front.png", DOCS / "images" / "led-model.png"))
    assert drawn.shape == stored.shape and abs(drawn - stored).mean() < 0.02, "run: make docs-plot"


def test_first_page_names_the_two_commands_of_a_fresh_clone():
    assert re.search(r"```bash\nmake shootout .*\nmake test ", README)
