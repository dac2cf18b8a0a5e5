"""Where the shared golden cases and the small real data lie; tests that need them skip with the reason where they are absent."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def _find(variable: str, folder: str) -> Path:
    """The folder named by the environment variable, else ../shared/<folder> beside the checkout; skips the test if absent."""
    named = os.environ.get(variable)
    path = Path(named) if named else ROOT.parent / "shared" / folder
    if not path.is_dir():
        pytest.skip(f"{folder} not found: {path} is no folder (set {variable} to where it lies)", allow_module_level=True)
    return path


def golden_dir() -> Path:
    """Folder of the golden cases (`*.npz`, `manifest.json`)."""
    return _find("RECOG_FAST_GOLDEN", "golden") / "cases"


def data_dir() -> Path:
    """Folder of the small real data (lfw112, omniglot, weights, formats, ...)."""
    return _find("RECOG_FAST_DATA", "data")
