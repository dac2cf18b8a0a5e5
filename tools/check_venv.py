"""Says what is wrong with .venv, by looking only (0.1 s): exit code 0 if it is whole, else 1.

With the argument `packages`, the package's own installation is left out.
"""

from __future__ import annotations

import importlib.util
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MODULES = "pip setuptools cmake ninja pybind11 torch numpy pytest pytest_benchmark hypothesis ruff mypy matplotlib jsonargparse rich yaml"


def complaints(installed: bool) -> list[str]:
    """What is missing or belongs to another folder."""
    found = [f"{name} is missing" for name in MODULES.split() if importlib.util.find_spec(name) is None]
    made_for = (ROOT / ".venv" / ".packages").read_text().strip()
    if Path(made_for).resolve() != ROOT:
        found.append("it was made for another folder")
    if installed:
        package = importlib.util.find_spec("recog_fast")
        if package is None or package.origin is None or Path(package.origin).resolve().parent != ROOT / "recog_fast":
            found.append("recog_fast is not installed from this folder")
        if not (ROOT / "recog_fast" / f"_native{sysconfig.get_config_var('EXT_SUFFIX')}").exists():
            found.append("the compiled kernels are missing")
    return found


def main() -> int:
    found = complaints(installed="packages" not in sys.argv[1:])
    if found:
        print(f"make: .venv: {', '.join(found)}", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main())
