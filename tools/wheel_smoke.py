"""What a fresh installation is asked to do; run by the Python it was installed for, away from the sources.

`python -I tools/wheel_smoke.py`: exit code 0 and one line of JSON, or an assertion. Needs torch and NumPy only.
"""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
import sysconfig
import time
import warnings
from pathlib import Path

start = time.perf_counter()
import torch  # noqa: E402

after_torch = time.perf_counter()
import recog_fast as rf  # noqa: E402

IMPORT_SECONDS = time.perf_counter() - after_torch
COMMANDS = "demo train eval estimate doctor data import export identify".split()


def step() -> tuple[float, float]:
    """Losses of two training steps of a head on the compiled kernels, the first as the reference has it."""
    torch.manual_seed(0)
    head = rf.MarginHead(1000, 64)
    optimizer = rf.HeadSGD(head, lr=1.0)
    embeddings, labels = torch.randn(16, 64), torch.arange(16)
    with rf.ops.use_backend("reference"):
        expected = float(head(embeddings, labels).detach())
    optimizer.zero_grad()
    losses = []
    for _ in range(2):
        loss = head(embeddings, labels)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert abs(losses[0] - expected) <= 1e-4 * expected, (losses, expected)
    assert losses[1] < losses[0], losses
    return losses[0], losses[1]


def commands() -> None:
    """`recog-fast` beside this Python: version, help of every command, doctor."""
    program = Path(sysconfig.get_path("scripts")) / "recog-fast"

    def output(*arguments: str) -> str:
        done = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, (arguments, done.stdout + done.stderr)
        return done.stdout

    assert output("--version").split()[1] == rf.__version__
    listed = output("--help")
    for name in COMMANDS:
        assert name in listed, f"{name} is not in recog-fast --help"
    output("eval", "--help")
    output("estimate", "--classes", "1e6", "--batch", "64")
    assert str(Path(rf.__file__).parent) in output("doctor")


def main() -> int:
    # A missing extension warns: nothing may fall back here.
    warnings.simplefilter("error", RuntimeWarning)
    package = Path(rf.__file__).resolve()
    assert package.is_relative_to(Path(sys.prefix).resolve()), f"expected recog_fast in {sys.prefix}, got {package}"
    installed = importlib.metadata.version("recog-fast")
    assert installed.split("+")[0] == rf.__version__, (installed, rf.__version__)
    backends = rf.backends()
    assert backends["cpu"].startswith("native "), backends["cpu"]
    assert ("+cu" in installed) == ("CUDA C++ kernels: CUDA " in backends["cuda"]) or "+" not in installed, backends["cuda"]
    first, second = step()
    commands()
    print(json.dumps({
        "python": sys.version.split()[0], "torch": torch.__version__, "recog_fast": installed, "cpu": backends["cpu"].split(",")[0],
        "losses": [round(first, 4), round(second, 4)], "import_seconds": round(IMPORT_SECONDS, 3),
    }))  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
