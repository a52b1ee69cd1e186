"""``import attnzoo`` loads nothing, and every exported name is imported at first use."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import attnzoo

SOURCE = Path(attnzoo.__file__).read_text(encoding="utf-8")


def run_python(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def imports_for_type_checkers():
    """The pairs of name and module in the block ``if TYPE_CHECKING``."""
    (block,) = [
        node
        for node in ast.parse(SOURCE).body
        if isinstance(node, ast.If)
        and "TYPE_CHECKING" in ast.dump(node.test)
        and not isinstance(node.test, ast.UnaryOp)
    ]
    return {alias.name: node.module for node in block.body for alias in node.names}


def test_import_loads_neither_torch_nor_transformers():
    assert run_python("import attnzoo, sys; print({'torch', 'transformers', 'typer'} & set(sys.modules))") == "set()"


@pytest.mark.parametrize("name", attnzoo.__all__)
def test_an_exported_name_is_the_object_that_type_checkers_see(name):
    module = importlib.import_module(imports_for_type_checkers()[name])
    assert getattr(attnzoo, name) is getattr(module, name)


def test_type_checkers_see_the_exported_names_only():
    assert set(imports_for_type_checkers()) == set(attnzoo.__all__) <= set(dir(attnzoo))


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match=r"module 'attnzoo' has no attribute 'pach'"):
        attnzoo.pach  # noqa: B018


def test_backends_is_the_function_and_not_the_package():
    code = "import attnzoo.backends.eager, attnzoo; print(attnzoo.backends is attnzoo.registry.backends)"
    assert run_python(code) == "True"
