"""Fixtures of the tests with tools."""

import pytest

from tests.support.processes import two_processes


@pytest.fixture(scope="session")
def in_two_processes():
    """``in_two_processes(function, *arguments)`` calls ``function(rank, *arguments)`` in two processes with gloo."""
    with two_processes() as run:
        yield run
