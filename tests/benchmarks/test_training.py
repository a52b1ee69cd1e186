"""Reformer trains as a whole model: its own backward works in training mode only, and only at some lengths."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from attnzoo.benchmarks.cases import Case, build
from attnzoo.benchmarks.models import REFORMER, WORKLOADS
from attnzoo.errors import InvalidArgumentError

SMALL = dict(
    vocab_size=258, hidden_size=16, num_attention_heads=2, attention_head_size=8, feed_forward_size=16,
    attn_layers=["local", "lsh"], num_buckets=4, lsh_attn_chunk_length=8, local_attn_chunk_length=8,
    axial_pos_embds_dim=[4, 12], axial_pos_shape=[8, 16], max_position_embeddings=128,
)  # fmt: skip
TINY = replace(REFORMER, name="tiny_reformer", published={**REFORMER.published, **SMALL}, heads=2, layers=2)


@pytest.fixture(autouse=True)
def tiny_reformer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(WORKLOADS, "tiny_reformer", TINY)


def case(seq_len: int, train: bool) -> Case:
    return Case("tiny_reformer", "model", seq_len, 1, "float32", "cpu", 1, train)


def test_reversible_layers_train_without_dropout_on_the_published_positions() -> None:
    trained, published = build(case(32, True)), build(case(32, False))
    assert trained.module.training and not published.module.training
    with torch.no_grad():
        torch.testing.assert_close(trained.call(), published.call())
    trained.step()
    for name, parameter in trained.module.base_model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_patch_leaves_num_buckets_of_the_configuration_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(WORKLOADS, "derived", replace(TINY, published={**TINY.published, "num_buckets": None}))
    subject = build(replace(case(32, False), family="derived"))
    handle = subject.patch("sdpa")
    subject.forward()
    assert all(site.calls for site in handle.sites)
    assert subject.module.config.num_buckets is None


def test_shootout_trains_the_whole_model(shootout) -> None:
    rows = shootout("sdpa", families=("tiny_reformer",), seq_lens=(32,), modes=(True,)).rows
    assert [(row.backend, row.status) for row in rows] == [("native", "ok"), ("sdpa", "ok")]
    assert rows[1].kernel == "flash_cpu"


def test_length_without_training_is_skipped_with_the_reason(shootout) -> None:
    rows = shootout("sdpa", families=("tiny_reformer",), modes=(False, True)).rows
    assert {(row.mode, row.status) for row in rows} == {("forward", "ok"), ("forward+backward", "skipped")}
    reasons = [row.reason for row in rows if row.status == "skipped"]
    assert all("got 40 in training; allowed: a multiple of 16" in reason for reason in reasons)
    with pytest.raises(InvalidArgumentError, match="seq-len: got 40"):
        TINY.build(train_at=40)
