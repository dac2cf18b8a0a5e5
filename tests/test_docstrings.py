"""Every public name is documented, and what computes says shapes, errors and source."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator
from typing import Any

import pytest

PACKAGES = (
    "recog_fast", "recog_fast.ops", "recog_fast.margins", "recog_fast.memory", "recog_fast.recognizability", "recog_fast.sharding",
    "recog_fast.checkpoint", "recog_fast.compat.pml", "recog_fast.compat.insightface", "recog_fast.data", "recog_fast.models",
    "recog_fast.evaluation",
)  # fmt: skip
# Those whose names compute something of a paper: losses, heads, margins, operations, memory, recognizability.
COMPUTING = PACKAGES[:5]
SHAPE = re.compile(r"\((N|C|D|E|S|P|B|Q|T|n|K|F|M|G|R|H)\b[^)]*,[^)]*\)")
SOURCE = re.compile(r"Source|math\.md|eq\. \d|et al\.|ArcFace|CosFace|SphereFace|MagFace|QAFace|VPL|UIR|CBAM|Harnessing|InsightFace|Circle Loss|MV-Softmax|Curricular")
# No paper's equation: a switch, a question, files, records whose makers say it.
RECORDS = {"Entries", "Injection", "MemoryPolicy", "NormStatistics", "ClusterRow", "RecognizabilityTerms", "ThresholdRow", "RowStats"}
WITHOUT_SOURCE = {"use_backend", "backends", "save_checkpoint", "load_checkpoint", "MarginFunction", *RECORDS}
# Nothing to refuse.
WITHOUT_RAISES = {"backends", "Softmax", "MarginFunction", *RECORDS}
WITHOUT_SHAPE = {"use_backend", "backends", "save_checkpoint", "load_checkpoint", "MarginFunction", "VPL"}


def public(packages: tuple[str, ...]) -> dict[str, Any]:
    """Dotted name -> class or function; each object once."""
    found: dict[str, Any] = {}
    seen: set[int] = set()
    for package in packages:
        module = importlib.import_module(package)
        for name in module.__all__:
            thing = getattr(module, name)
            if callable(thing) and not inspect.ismodule(thing) and id(thing) not in seen:
                seen.add(id(thing))
                found[f"{package}.{name}"] = thing
    return found


def methods(thing: Any) -> Iterator[tuple[str, Any]]:
    """The class's own public methods and properties."""
    for name, value in vars(thing).items():
        function = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
        if not name.startswith("_") and inspect.isfunction(function):
            yield name, function


ALL = public(PACKAGES)
COMPUTED = public(COMPUTING)


def text_of(thing: Any) -> str:
    """The docstring, with those of the methods where it is a class"""
    own = inspect.getdoc(thing) or ""
    if not inspect.isclass(thing):
        return own
    return "\n".join([own, *(inspect.getdoc(function) or "" for _, function in methods(thing)), inspect.getdoc(vars(thing).get("__call__")) or ""])


@pytest.mark.parametrize("name", ALL)
def test_it_has_a_docstring(name: str) -> None:
    thing = ALL[name]
    own = thing.__doc__ or ""
    generated = inspect.isclass(thing) and own.startswith(f"{thing.__name__}(")  # a dataclass without one shows its signature
    if name.endswith(".MarginFunction"):
        return  # a type, described by its module
    assert own.strip() and not generated, name
    if inspect.isclass(thing):
        # A method that overrides a documented one says the same.
        missing = [m for m, function in methods(thing) if not (function.__doc__ or inspect.getdoc(getattr(thing, m)))]
        assert not missing, f"{name}: {missing}"


def test_every_package_has_a_docstring() -> None:
    assert not [package for package in PACKAGES if not (importlib.import_module(package).__doc__ or "").strip()]


@pytest.mark.parametrize("name", COMPUTED)
def test_what_computes_says_shapes_errors_and_source(name: str) -> None:
    thing, short = COMPUTED[name], name.rpartition(".")[2]
    text = text_of(thing)
    if short not in WITHOUT_SHAPE:
        assert SHAPE.search(text) or "(N,)" in text or "(C,)" in text or "0-dim" in text, f"{name}: no shape"
    if short not in WITHOUT_RAISES:
        assert re.search(r"\b(Raises|ValueError|TypeError|RuntimeError)\b", text), f"{name}: no error"
    if short not in WITHOUT_SOURCE:
        assert SOURCE.search(text), f"{name}: no source"
