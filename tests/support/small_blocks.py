"""Internal blocks of a few rows, so that short inputs have many blocks."""

import contextlib
from unittest import mock

from attnzoo.backends.approximate import lsh, visible_keys
from attnzoo.backends.common import blocks
from attnzoo.backends.sdpa import backend as sdpa
from attnzoo.backends.sdpa import grouped_stacks, sorted_stacks, stacks
from attnzoo.backends.varlen import calls
from attnzoo.spec import documents, hashed, masks

_SIZES = (
    (blocks, "DENSE_ROWS", 5),
    (blocks, "_MOST_KEYS", 0),
    (sdpa, "DENSE_ROWS", 5),
    (stacks, "_ROWS", 64),
    (sorted_stacks, "_ROWS", 64),
    (grouped_stacks, "_ROWS", 6),
    (grouped_stacks, "_FEWEST", 1),
    (grouped_stacks, "DENSE_ROWS", 5),
    (hashed, "_KEYS_AT_ONCE", 7),
    (documents, "_ENTRIES_AT_ONCE", 50),
    (masks, "_ENTRIES_AT_ONCE", 50),
    (visible_keys, "_ENTRIES_AT_ONCE", 50),
    (lsh, "_ROWS_AT_ONCE", 5),
    (calls, "MAX_SEQUENCES", 3),
)


@contextlib.contextmanager
def block_sizes(are_small):
    """Use small internal blocks, or the sizes of attnzoo."""
    with contextlib.ExitStack() as stack:
        for module, name, size in _SIZES if are_small else ():
            stack.enter_context(mock.patch.object(module, name, size))
        yield
