"""What in a source could run a stranger's pickle: torch.load without weights_only=True under any name, pickle and its kin."""

from __future__ import annotations

import ast

# Full names; a "torch.load" is allowed where it is called with weights_only=True, the others nowhere.
TORCH = ("torch.load", "torch.serialization.load")
NEVER = {
    "torch.jit.load", "torch.package", "torch.serialization._load", "torch.serialization._legacy_load", "torch.serialization.add_safe_globals",
    "torch.serialization.safe_globals", "pickle.load", "pickle.loads", "_pickle.load", "_pickle.loads", "cPickle", "dill", "cloudpickle",
    "joblib", "shelve", "marshal.load", "marshal.loads", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "pandas.read_pickle",
}  # fmt: skip
BASES = ("pickle.Unpickler", "_pickle.Unpickler", "pickle._Unpickler")  # only as the base of a class that restricts find_class
_MODULES = {name.split(".")[0] for name in (*TORCH, *NEVER, *BASES)}


def unsafe_loads(source: str, path: str = "<source>") -> list[str]:
    """One line "<line>: <name>" for each use in `source`; names are followed through imports and assignments."""
    tree = ast.parse(source, path)
    known = _aliases(tree)
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    found = []
    for node in ast.walk(tree):
        name = _imported(node) or (_full(node, known) if isinstance(node, ast.Name | ast.Attribute) else "") or _reached(node, known)
        if name and not _allowed(node, name, parents):
            found.append(f"{getattr(node, 'lineno', 0)}: {name}")
    return found


def _forbidden(name: str) -> bool:
    return any(name == one or name.startswith(f"{one}.") for one in (*TORCH, *NEVER, *BASES))


def _aliases(tree: ast.AST) -> dict[str, str]:
    """{name in the source: full name} of what imports and plain assignments bind; a few rounds for chains."""
    known: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for one in node.names:
                known[one.asname or one.name.split(".")[0]] = one.name if one.asname else one.name.split(".")[0]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            known |= {one.asname or one.name: f"{node.module}.{one.name}" for one in node.names}
    for _ in range(3):
        for node in ast.walk(tree):
            if isinstance(node, ast.Assign | ast.AnnAssign | ast.NamedExpr) and isinstance(node.value, ast.Name | ast.Attribute):
                name = _full(node.value, known, forbidden=False)
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                if name and name.split(".")[0] in _MODULES:
                    known |= {target.id: name for target in targets if isinstance(target, ast.Name)}
    return known


def _full(node: ast.expr, known: dict[str, str], forbidden: bool = True) -> str:
    """The full name of a chain of attributes that starts at a known name, "" otherwise."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    if not isinstance(node, ast.Name) or node.id not in known:
        return ""
    name = ".".join([known[node.id], *reversed(parts)])
    return name if not forbidden or _forbidden(name) else ""


def _imported(node: ast.AST) -> str:
    """from torch import load, import dill, from pickle import *."""
    if isinstance(node, ast.Import):
        return next((one.name for one in node.names if _forbidden(one.name)), "")
    if isinstance(node, ast.ImportFrom) and node.module and not node.level:
        for one in node.names:
            name = f"{node.module}.{one.name}"
            if _forbidden(name) or (one.name == "*" and node.module.split(".")[0] in _MODULES):
                return name
    return ""


def _reached(node: ast.AST, known: dict[str, str]) -> str:
    """getattr(torch, ...), vars(pickle), torch.__dict__, __import__("pickle"), import_module("pickle"), allow_pickle=True."""
    if isinstance(node, ast.Attribute) and node.attr == "__dict__":
        name = _full(node.value, known, forbidden=False)
        return f"{name}.__dict__" if name.split(".")[0] in _MODULES else ""
    if not isinstance(node, ast.Call):
        return ""
    if any(k.arg == "allow_pickle" and not (isinstance(k.value, ast.Constant) and k.value.value is False) for k in node.keywords):
        return "allow_pickle"
    called = ast.unparse(node.func).split(".")[-1]
    first = node.args[0] if node.args else None
    if called in ("getattr", "vars", "attrgetter", "partial") and isinstance(first, ast.Name | ast.Attribute):
        name = _full(first, known, forbidden=False)
        second = node.args[1] if len(node.args) > 1 else None
        plain = isinstance(second, ast.Constant) and not _forbidden(f"{name}.{second.value}")
        return "" if name not in ("torch", "torch.serialization", "pickle", "_pickle") or plain else f"{called}({name}, ...)"
    if called in ("__import__", "import_module") and isinstance(first, ast.Constant) and str(first.value).split(".")[0] in _MODULES - {"torch", "yaml"}:
        return str(first.value)
    return ""


def _allowed(node: ast.AST, name: str, parents: dict[ast.AST, ast.AST]) -> bool:
    above = parents.get(node)
    if name in TORCH and isinstance(above, ast.Call) and above.func is node:
        said = [k.value for k in above.keywords if k.arg == "weights_only"]
        return len(said) == 1 and isinstance(said[0], ast.Constant) and said[0].value is True and all(k.arg for k in above.keywords)
    if name == "getattr(torch, ...)":  # dtypes are asked for by name
        return (isinstance(above, ast.keyword) and above.arg == "dtype") or (isinstance(above, ast.Call) and ast.unparse(above.func) == "isinstance")
    if name in BASES and isinstance(above, ast.ClassDef) and node in above.bases:
        return any(isinstance(one, ast.FunctionDef) and one.name == "find_class" for one in above.body)
    return False
