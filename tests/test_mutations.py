"""Damaged files of every kind: clean errors that name the file, or counted skips; no hang, no memory beyond the file's size.

RECOG_FAST_MUTATIONS=2000 damages so many of each kind instead of a quick share.
"""

from __future__ import annotations

import os

import pytest

pytest.importorskip("scipy.io")
import mutations

COUNT = int(os.environ.get("RECOG_FAST_MUTATIONS", "100"))


@pytest.mark.parametrize("name", ["rec", "idx", "bin", "mat", "tar", "zip", "csv", "jsonl", "ijb", "image"])
def test_damaged_files(name: str) -> None:
    """At most four times the file's bytes are taken and 32 kB (lists: eight times, IJB text: 25 times); the damage is real: a
    good part is refused."""
    result = mutations.run(name, COUNT, seed=1)
    assert result["refused"] > 0.2 * COUNT


def test_the_budget_can_be_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader that believes a size is caught."""
    monkeypatch.setattr(mutations, "read_bin", lambda path: bytearray(10 * path.stat().st_size))
    with pytest.raises(AssertionError, match=r"bin case 0: \d+ bytes for"):
        mutations.run("bin", 3)
