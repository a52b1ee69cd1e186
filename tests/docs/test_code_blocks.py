"""Every Python block of README.md and of docs/ runs. The blocks of a page run in order and share their names.

The pages name models of the hub. Here these names stand for the trained checkpoints in tests/checkpoints, which have
the same architectures, and for a tiny Llama. A block with a title is a file: it is written before the next block runs.
"""

from __future__ import annotations

import socket
import sys

import pytest
import torch
import transformers

import attnzoo
from tests.checkpoints.tokenizer import byte_tokenizer
from tests.checkpoints.train import HERE, VOCAB
from tests.docs.pages import PAGES, blocks_of, name_of

HUB = {
    "allenai/led-base-16384": HERE / "led",
    "google/long-t5-tglobal-base": HERE / "longt5",
    "google/reformer-crime-and-punishment": HERE / "reformer",
    "EleutherAI/pythia-160m": HERE / "gpt_neox",
}
LLAMA = "meta-llama/Llama-3.2-1B"
PAGES_WITH_CODE = [page for page in PAGES if any(block.language == "python" for block in blocks_of(page))]


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """The folder of a tiny Llama with the tokenizer of the checkpoints."""
    folder = tmp_path_factory.mktemp("llama")
    config = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=4096, bos_token_id=0, pad_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def torchrun_variables():
    """The variables that torchrun sets for one process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))


@pytest.fixture
def run_page(llama, isolated_registry, tmp_path, monkeypatch):
    """Return a function that runs the Python blocks of a page in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "book.txt").write_text("Call me Ishmael. " * 60)
    folders = {**HUB, LLAMA: llama}

    def run(page):
        if "torchrun --nproc" in page.read_text():
            for name, value in torchrun_variables().items():
                monkeypatch.setenv(name, value)
        names = {"__name__": "__main__"}
        for block in blocks_of(page):
            code = block.text
            for name, folder in folders.items():
                code = code.replace(f'"{name}"', f'"{folder}"')
            if block.title:
                (tmp_path / block.title).parent.mkdir(parents=True, exist_ok=True)
                (tmp_path / block.title).write_text(code)
            elif block.language == "python":
                # The number of the line in an error is that of the page.
                exec(compile("\n" * block.line + code, str(page), "exec"), names)

    modules, threads = set(sys.modules), torch.get_num_threads()
    yield run
    attnzoo.uninstall()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    torch.set_num_threads(threads)
    torch.set_grad_enabled(True)
    for name in set(sys.modules) - modules:  # the files of a page
        if (path := getattr(sys.modules[name], "__file__", None)) and path.startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.mark.parametrize("page", PAGES_WITH_CODE, ids=name_of)
def test_code_of_the_page_runs(page, run_page):
    run_page(page)


def test_a_block_that_fails_fails_the_test(run_page, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# Page\n\n```python\nx = 1\n```\n\n    ```python\n    assert x == 2\n    ```\n")
    with pytest.raises(AssertionError) as failed:
        run_page(page)
    assert failed.traceback[-1].lineno + 1 == 8


def test_blocks_of_the_site_have_a_language():
    """A block without a language is not coloured, and no test sees it."""
    for page in PAGES:
        fences = [line for line in page.read_text().splitlines() if line.lstrip().startswith("```")]
        assert len(fences) == 2 * len(blocks_of(page)), name_of(page)
