"""The positions of global keys: any number per sample, ascending, with padding entries after them."""

import torch

from attnzoo.spec.global_keys import find_global_keys

IS_GLOBAL = torch.tensor([[False, True, False, False, True], [True, False, False, False, False], [False] * 5])


def test_positions_of_each_sample_are_ascending_and_padded_to_the_largest_number():
    positions, valid = find_global_keys(IS_GLOBAL)
    assert valid.tolist() == [[True, True], [True, False], [False, False]]
    assert positions[0].tolist() == [1, 4] and positions[1, 0] == 0
    assert positions.dtype == torch.long and bool((positions < 5).all()), "padding entries are positions, too"


def test_no_global_key_in_the_batch_gives_none():
    assert find_global_keys(torch.zeros(3, 5, dtype=torch.bool)) is None


def test_rows_at_the_positions():
    tensor = torch.randn(3, 2, 5, 4)
    keys = find_global_keys(IS_GLOBAL)
    rows = keys.take(tensor)
    assert rows.shape == (3, 2, 2, 4)
    for sample, number in keys.valid.nonzero().tolist():
        assert torch.equal(rows[sample, :, number], tensor[sample, :, keys.positions[sample, number]])


def test_under_vmap_the_number_of_keys_is_the_length():
    """Python cannot read the number of global keys of a sample that vmap maps over."""

    def both(is_global):
        keys = find_global_keys(is_global[None])
        return keys.positions, keys.valid

    positions, valid = torch.func.vmap(both)(IS_GLOBAL)
    assert positions.shape == valid.shape == (3, 1, 5)
    assert valid.sum(-1).flatten().tolist() == [2, 1, 0]
    assert positions[0, 0, :2].tolist() == [1, 4] and positions[1, 0, 0] == 0
