import functools
import os
import sys
import tempfile
from pathlib import Path

import pytest

os.environ["OMP_NUM_THREADS"] = "1"  # networks are tiny here, and the tests share the cores
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp()  # built-in data are cached here, not in the user's folder
sys.path.insert(0, str(Path(__file__).parents[1]))

import common  # noqa: E402

help_once = functools.cache(common.help_texts)


@pytest.fixture(autouse=True)
def fast_help(monkeypatch):
    """Every command line reads the sources for its help, a third of a second: here each only once."""
    monkeypatch.setattr(common, "help_texts", help_once)
