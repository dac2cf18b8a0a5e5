"""Every example under `examples/` runs, and learns; those of packages that are not installed are skipped by name."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from paths import ROOT

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
NEEDS = {"lightning_module": "lightning", "accelerate_loop": "accelerate"}
DISTRIBUTED = ("ddp", "fsdp2")
# Everywhere, without a C++ compiler; with inductor: test_the_compiled_backbone_of_the_default_backend.
OPTIONS: dict[str, dict[str, Any]] = {"torch_compile": {"backend": "aot_eager", "steps": 12}}


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", ROOT / "examples" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_short_and_in_the_readme(path: Any) -> None:
    lines = path.read_text().splitlines()
    assert len(lines) < 40 and lines[0].startswith('"""')
    assert f"{path.stem}.py" in (ROOT / "examples" / "README.md").read_text()


@pytest.mark.parametrize("name", [path.stem for path in EXAMPLES if path.stem not in DISTRIBUTED])
def test_it_learns(name: str) -> None:
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    losses = load(name).main(**OPTIONS.get(name, {}))
    assert losses[-1] < 0.4 * losses[0]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="inductor needs a C++ compiler: none as CXX or g++")
def test_the_compiled_backbone_of_the_default_backend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With nothing compiled before: 13 s of CPU."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    losses = load("torch_compile").main(steps=12)
    assert losses[-1] < 0.4 * losses[0]
    assert list(tmp_path.rglob("*.so"))  # it is inductor that ran


def test_one_backward_is_the_same_as_several() -> None:
    """Summed losses, and one backward each with retain_graph: the same training."""
    main = load("two_heads").main
    assert main(steps=10) == pytest.approx(main(steps=10, separately=True), rel=1e-4)


def test_the_swap_changes_nothing() -> None:
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    main = load("pml_swap").main
    assert main(steps=10) == pytest.approx(main(steps=10, loss_class=losses.ArcFaceLoss), rel=1e-3)


def of_two_ranks(name: str) -> list[list[tuple[str, str]]]:
    """(loss, |W|) that each of two processes prints."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = []
    for rank in range(2):
        launcher = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        environment = {**os.environ, **launcher, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, f"examples/{name}.py"]
        ranks.append(subprocess.Popen(command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    outs = [process.communicate(timeout=300)[0] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], outs
    return [re.findall(r"rank \d loss (\S+) \|W\| (\S+)", out) for out in outs]


def test_ranks_agree_and_fsdp_is_ddp() -> None:
    """Two processes: the same loss and the same whole W on both ranks, from DDP and FSDP2, and the loss falls."""
    rows, sharded = of_two_ranks("ddp"), of_two_ranks("fsdp2")
    assert rows[0] == rows[1] and sharded[0] == sharded[1] and len(rows[0]) == len(sharded[0]) == 2
    (first, _), (last, norm) = rows[0]
    assert float(last) < 0.4 * float(first) and float(norm) > 0
    assert [float(v) for row in sharded[0] for v in row] == pytest.approx([float(v) for row in rows[0] for v in row], rel=1e-5)
