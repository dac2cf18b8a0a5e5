"""The table "may import" of the design, asserted over the sources: CONTRIBUTING.md shows it."""

from __future__ import annotations

import ast
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from paths import ROOT
from unsafe_loads import unsafe_loads

PACKAGE = ROOT / "recog_fast"

# Layer -> layers it may import. A layer may always import itself.
MAY_IMPORT: dict[str, set[str]] = {
    "_version": set(),
    "_arguments": set(),  # every layer may import it
    "counting": set(),  # every layer may import it
    "terminal": set(),
    "native": {"_native"},
    "reference": set(),
    "rules": {"reference"},
    "margins": {"reference", "rules"},
    "ops": {"reference", "rules", "native", "_native", "triton_kernels"},
    "memory": {"reference", "rules", "ops"},
    "losses": {"reference", "rules", "margins", "ops"},
    "head_weight": {"ops"},
    "sampling": set(),
    "estimate": set(),
    "sharding": {"reference", "rules", "margins", "ops", "memory", "head_weight"},
    "heads": {"reference", "rules", "margins", "ops", "memory", "losses", "head_weight", "sampling", "sharding"},
    "optim": {"reference", "rules", "ops", "memory", "heads", "sharding"},
    "checkpoint": {"_version", "rules", "margins", "ops", "memory", "heads", "optim", "sharding"},
    "compat": {"rules", "margins", "memory", "losses", "heads", "optim", "sharding", "checkpoint"},
    "recognizability": {"reference", "rules", "ops"},
    "_backends": {"_version", "native", "ops", "triton_kernels"},
    "evaluation": set(),
    "data": set(),
    "models": set(),
    "triton_kernels": set(),
}
# These use what any user could: every public module, no name that begins with an underscore; of each other only these.
USERS: dict[str, set[str]] = {"training": set(), "commands": {"training"}, "cli": {"training", "commands"}, "__main__": {"cli"}}
# Third-party packages of a layer beside torch and numpy.
LIBRARIES: dict[str, set[str]] = {
    "triton_kernels": {"triton"},
    "recognizability": {"scipy", "sklearn"},
    "evaluation": {"scipy", "matplotlib", "faiss", "PIL"},
    "data": {"PIL", "simplejpeg", "matplotlib"},
    "models": {"safetensors", "onnx", "onnxruntime"},
    "training": {"jsonargparse", "yaml", "PIL", "matplotlib"},
    "compat": {"yaml"},
    "terminal": {"rich"},
    "commands": {"yaml", "safetensors"},
}
DISTRIBUTED = {"sharding", "checkpoint"}


@dataclass(frozen=True)
class Import:
    """One imported module or name, dotted from the top: `recog_fast.ops._checks`, `torch.distributed`."""

    layer: str
    name: str
    where: str

    @property
    def target(self) -> str:
        """The layer of this package it belongs to."""
        return self.name.split(".")[1]


def layer_of(path: Path) -> str:
    """First part of the path inside the package, without the suffix."""
    if path.is_relative_to(ROOT / "triton_kernels"):
        return "triton_kernels"
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def module_parts(path: Path) -> tuple[str, ...]:
    """The dotted package a file's relative imports start from, in parts."""
    if path.is_relative_to(ROOT / "triton_kernels"):
        return ("recog_fast", *path.relative_to(ROOT).parent.parts)
    return path.relative_to(ROOT).parent.parts


def imports(path: Path) -> list[Import]:
    """Every import of a file, at any depth of its code, and every literal `import_module("...")`."""
    found: list[str] = []
    lines: list[int] = []
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = module_parts(path)
            base = package[: len(package) - node.level + 1] if node.level else ()
            stem = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{stem}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module") and node.args:
            argument = node.args[0]
            if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                name = argument.value
                names = [".".join(module_parts(path)) + name if name.startswith(".") else name]
        found += names
        lines += [getattr(node, "lineno", 0)] * len(names)
    where = path.relative_to(ROOT)
    return [Import(layer_of(path), n, f"{where}:{line}") for n, line in zip(found, lines, strict=True)]


def sources() -> list[Path]:
    """Python files of the package but its own face, `recog_fast/__init__.py`, which gathers the public names."""
    folders = [PACKAGE, ROOT / "triton_kernels"]
    return [p for folder in folders for p in sorted(folder.rglob("*.py")) if p != PACKAGE / "__init__.py"]


ALL = [one for path in sources() for one in imports(path)]
INSIDE = [one for one in ALL if one.name.startswith("recog_fast.")]


def test_every_module_has_a_layer() -> None:
    layers = {layer_of(path) for path in sources()}
    assert layers <= set(MAY_IMPORT) | set(USERS), "a new module needs its row in the table here and in CONTRIBUTING.md"


def test_table_has_no_cycle() -> None:
    done: set[str] = {"_native"}
    table = MAY_IMPORT | USERS
    while rest := set(table) - done:
        ready = {layer for layer in rest if table[layer] <= done}
        assert ready, f"cycle among {sorted(rest)}"
        done |= ready


@pytest.mark.parametrize("layer", sorted(MAY_IMPORT))
def test_layer_imports_only_what_the_table_allows(layer: str) -> None:
    allowed = MAY_IMPORT[layer] | {layer, "_arguments", "counting"}
    wrong = [f"{one.where}: {one.name}" for one in INSIDE if one.layer == layer and one.target not in allowed]
    assert not wrong, f"{layer} may import {sorted(allowed)}: {wrong}"


@pytest.mark.parametrize("layer", sorted(USERS))
def test_users_import_each_other_in_one_direction(layer: str) -> None:
    allowed = USERS[layer] | {layer}
    wrong = [f"{one.where}: {one.name}" for one in INSIDE if one.layer == layer and one.target in USERS and one.target not in allowed]
    assert not wrong, f"{layer} may import {sorted(allowed)} of {sorted(USERS)}: {wrong}"


def test_nobody_below_imports_the_whole_package() -> None:
    wrong = [f"{one.where}: {one.name}" for one in ALL if one.name == "recog_fast" and one.layer not in USERS]
    assert not wrong


def test_training_and_command_line_use_public_names_only() -> None:
    def private(one: Import) -> bool:
        return any(part.startswith("_") and part != "__version__" for part in one.name.split(".")[1:])

    wrong = [f"{one.where}: {one.name}" for one in INSIDE if one.layer in USERS and private(one)]
    assert not wrong


def test_third_party_packages_of_each_layer() -> None:
    wrong = []
    for one in ALL:
        top = one.name.split(".")[0]
        allowed = {"torch", "numpy", "recog_fast"} | LIBRARIES.get(one.layer, set())
        if top not in sys.stdlib_module_names and top not in allowed:
            wrong.append(f"{one.where}: {one.name}")
    assert not wrong


def test_torch_distributed_only_where_ranks_are_known() -> None:
    users = [one for one in ALL if one.name.startswith("torch.distributed")]
    assert not [f"{one.where}: {one.name}" for one in users if one.layer not in DISTRIBUTED]


def test_extension_has_no_torch_header_and_one_binding_file() -> None:
    files = [p for p in (ROOT / "csrc").rglob("*") if p.is_file()]
    assert files
    for path in files:
        included = re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)', path.read_text(), re.MULTILINE)
        assert not [name for name in included if name.startswith(("torch/", "ATen/", "c10/"))], path
        if path != ROOT / "csrc" / "module.cpp":
            assert not [name for name in included if name.startswith("pybind11") or name == "Python.h"], path


def test_cmake_lists_every_source() -> None:
    listed = (ROOT / "CMakeLists.txt").read_text()
    missing = [p.name for p in (ROOT / "csrc").rglob("*.cpp") if p.relative_to(ROOT).as_posix() not in listed]
    stems = re.search(r"set\(cuda_stems ([^)]*)\)", (ROOT / "cmake" / "cuda.cmake").read_text())
    assert stems is not None
    missing += [p.name for p in (ROOT / "csrc" / "cuda").rglob("*.cu") if p.stem not in stems[1].split()]
    assert not missing


def test_no_pickle_of_a_stranger_is_run() -> None:
    """Every `torch.load`, under whatever name, says `weights_only=True`; `pickle` is read by restricted unpicklers only."""
    wrong = []
    others = [path for folder in ("tests", "benchmarks", "examples", "tools", "recipes") for path in (ROOT / folder).rglob("*.py")]
    for path in [*sources(), PACKAGE / "__init__.py", *others]:
        found = unsafe_loads(path.read_text(), str(path))
        shipped = not path.is_relative_to(ROOT / "tests")
        wrong += [f"{path.relative_to(ROOT)}:{one}" for one in found if shipped or "torch" in one]
    assert not wrong


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.load('x')", "import torch as t\nt.load('x', weights_only=False)", "from torch import load", "from torch import load as l",
        "from torch.serialization import load", "import torch.serialization as s\ns.load('x')", "import torch\nload = torch.load", "from torch import *",
        "import torch\nt = torch\nt.load('x')", "import torch\nt = torch.serialization\nu = t\nu.load('x')", "import torch\ngetattr(torch, 'load')('x')",
        "import torch\ngetattr(torch, name)('x')", "import torch\ntorch.load('x', **options)", "import torch\ntorch.load('x', weights_only=True, **options)",
        "import torch\ntorch.load('x', weights_only=flag)", "import torch\nf = functools.partial(torch.load)", "import torch\nvars(torch)['load']('x')",
        "import torch\ntorch.__dict__['load']('x')", "import torch\nmap(torch.load, files)", "import torch\nif (t := torch):\n    t.load('x')",
        "import torch\ntorch.jit.load('x')", "import torch\ntorch.serialization.add_safe_globals([eval])", "import pickle as p\np.loads(b'')",
        "from pickle import loads", "import pickle\npickle.Unpickler(f).load()", "import pickle\nclass U(pickle.Unpickler):\n    pass", "import _pickle as c\nc.loads(b'')",
        "__import__('pickle').loads(b'')", "import importlib\nimportlib.import_module('pickle')", "import dill", "import numpy as np\nnp.load('x', allow_pickle=True)",
        "import yaml\nyaml.load('x', Loader=L)", "import joblib", "from shelve import open",
    ],
)  # fmt: skip
def test_disguised_loads_are_found(source: str) -> None:
    assert unsafe_loads(source), source


def test_safe_loads_are_let_through() -> None:
    assert not unsafe_loads(
        "import torch, pickle, yaml, json\ntorch.load('x', map_location='cpu', weights_only=True)\npickle.dumps(1)\nyaml.safe_load('')\n"
        "json.load(f)\nself.load('x')\nclass U(pickle.Unpickler):\n    def find_class(self, m, n):\n        raise ValueError\n"
    )
