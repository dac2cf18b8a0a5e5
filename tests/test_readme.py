"""The README's promises that a test can keep."""

from __future__ import annotations

import re

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
