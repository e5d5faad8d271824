import importlib

import pytest

from training_runs import ROOT


@pytest.fixture
def example(monkeypatch):
    """Imports a module of the examples."""
    monkeypatch.syspath_prepend(ROOT / "examples")
    return importlib.import_module
