"""Fixtures of all tests of exports."""

import logging

import pytest


@pytest.fixture(autouse=True, scope="module")
def _quiet():
    """PyTorch tells pytest's log thousands of things while it traces."""
    logging.getLogger("torch").propagate = False
    yield
    logging.getLogger("torch").propagate = True
