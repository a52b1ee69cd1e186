import pytest
import transformers
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel

import attnzoo


def transformers_state():
    """Everything of transformers that `install` could change."""
    classes = (PreTrainedModel, PreTrainedConfig, AttentionInterface, AttentionMaskInterface)
    registries = [dict(cls._global_mapping) for cls in (AttentionInterface, AttentionMaskInterface)]
    return [dict(vars(cls)) for cls in classes] + registries


@pytest.fixture(autouse=True)
def transformers_unchanged(isolated_registry, monkeypatch):
    """Uninstall after each test, and assert that transformers is the same as before."""
    monkeypatch.delenv("ATTNZOO_BACKEND", raising=False)
    transformers.utils.logging.disable_progress_bar()
    before = transformers_state()
    yield
    attnzoo.uninstall()
    assert transformers_state() == before
