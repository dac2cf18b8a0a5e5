"""The README's promises that a test can keep."""

from __future__ import annotations

import json
import re
import sys

from paths import ROOT

TEXT = (ROOT / "README.md").read_text()


def test_example_runs_as_written() -> None:
    (example,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    scope: dict[str, object] = {}
    exec(compile(example, "README.md", "exec"), scope)
    import torch

    loss = scope["loss"]
    assert isinstance(loss, torch.Tensor)
    assert loss.isfinite()


def test_it_stays_short() -> None:
    assert len(TEXT.splitlines()) <= 150


def test_every_public_margin_is_named() -> None:
    import recog_fast

    margins = [name for name in recog_fast.margins.__all__ if isinstance(getattr(recog_fast.margins, name), type)]
    missing = [name for name in margins if name != "MarginFunction" and name not in TEXT]
    assert len(margins) > 5
    assert not missing


def test_measured_table_is_that_of_stored_results() -> None:
    """`python -m benchmarks.readme` wrote it from one of the results files, and nobody since."""
    sys.path.insert(0, str(ROOT))  # benchmarks/ is no part of the installed package
    from benchmarks import readme

    tables = [readme.table(json.loads(path.read_text())) for path in (ROOT / "benchmarks" / "results").glob("*/full.json")]
    page = readme.PAGE.read_text()
    assert any(readme.insert(page, made) == page for made in tables)


def test_comparison_with_others_is_that_of_stored_results() -> None:
    sys.path.insert(0, str(ROOT))
    from benchmarks import readme

    tables = [readme.peers_table(json.loads(path.read_text())) for path in (ROOT / "benchmarks" / "results").glob("*/peers.json")]
    assert any(readme.insert(TEXT, made, readme.PEERS_START, readme.PEERS_END) == TEXT for made in tables)
    assert all(name in tables[0] for name in ("InsightFace", "pytorch-metric-learning", "cut-cross-entropy", "linear_cross_entropy", "recog_fast"))
