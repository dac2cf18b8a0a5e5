"""Files and functions are as short as CONTRIBUTING.md says; ruff looks at the lines."""

from __future__ import annotations

import ast
from pathlib import Path

from paths import ROOT

FOLDERS = ("recog_fast", "triton_kernels", "tests", "benchmarks", "recipes", "tools", "examples", "docs")
FILE, FUNCTION, KERNEL = 400, 60, 120
# "path:name" -> why it may be longer. None is at present.
LONGER: dict[str, str] = {}


def sources() -> list[Path]:
    """Every Python file of the project."""
    return [ROOT / "setup.py", *(path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py")))]


def parsed(path: Path) -> tuple[list[str], ast.Module]:
    """The lines and the tree of a file."""
    text = path.read_text()
    return text.splitlines(), ast.parse(text, str(path))


FILES = {path.relative_to(ROOT).as_posix(): parsed(path) for path in sources()}


def is_kernel(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether Triton compiles it."""
    return any("triton.jit" in ast.unparse(decorator) for decorator in node.decorator_list)


def too_long(lines: int, kernels: int) -> dict[str, int]:
    """path:name -> lines, docstring counted, of every function over `lines`, of kernels over `kernels`."""
    found = {}
    for name, (_, tree) in FILES.items():
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                count = (node.end_lineno or node.lineno) - node.lineno + 1
                if count > (kernels if is_kernel(node) else lines):
                    found[f"{name}:{node.name}"] = count
    return found


def test_no_file_is_longer_than_400_lines() -> None:
    assert len(FILES) > 300
    assert not {name: len(lines) for name, (lines, _) in FILES.items() if len(lines) > FILE}


def test_no_function_is_longer_than_60_lines_and_no_kernel_than_120() -> None:
    found = too_long(FUNCTION, KERNEL)
    assert not {name: count for name, count in found.items() if name not in LONGER}
    assert set(LONGER) <= set(found), "in the list, and no longer too long"
