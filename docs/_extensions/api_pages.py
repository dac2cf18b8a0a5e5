"""One page of directives for autodoc per public package, written before the sources are read: every name of its `__all__`."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path

from sphinx.application import Sphinx

# File -> (title, package, its names; None: `__all__`). A name of `recog_fast` itself is shown under that name.
PAGES: dict[str, tuple[str, str, tuple[str, ...] | None]] = {
    "core": ("Head, losses, optimizer", "recog_fast", None),
    "margins": ("Margins", "recog_fast.margins", None),
    "ops": ("Operations", "recog_fast.ops", None),
    "memory": ("Prototype memory", "recog_fast.memory", None),
    "recognizability": ("Recognizability", "recog_fast.recognizability", None),
    "evaluation": ("Evaluation", "recog_fast.evaluation", None),
    "data": ("Data", "recog_fast.data", None),
    "models": ("Models", "recog_fast.models", None),
    "checkpoint": ("Checkpoints", "recog_fast.checkpoint", None),
    "sharding": ("Classes over ranks", "recog_fast.sharding", None),
    "training": ("Settings of the training script", "recog_fast.training.config", ("TrainConfig", "DataConfig", "RecognizabilityConfig", "read_config")),
    "pml": ("Spellings of pytorch-metric-learning", "recog_fast.compat.pml", None),
    "insightface": ("Spellings of arcface_torch", "recog_fast.compat.insightface", None),
}


def _directive(path: str, thing: object) -> str:
    kind = "class" if inspect.isclass(thing) else "function" if callable(thing) else "data"
    return f".. auto{kind}:: {path}\n"


def names(package: str, listed: tuple[str, ...] | None) -> list[str]:
    """The package's public names that are no modules."""
    module = importlib.import_module(package)
    return [name for name in (listed or module.__all__) if not inspect.ismodule(getattr(module, name))]


def pages() -> dict[str, str]:
    """File name -> reStructuredText; each object once, where it is most at home."""
    top = importlib.import_module("recog_fast")
    made: dict[str, str] = {}
    shown: set[int] = set()
    for file, (title, package, listed) in reversed(PAGES.items()):
        module = importlib.import_module(package)
        directives = []
        for name in sorted(names(package, listed), key=str.lower):
            thing = getattr(module, name)
            if id(thing) not in shown:
                shown.add(id(thing))
                directives.append(_directive(f"recog_fast.{name}" if getattr(top, name, None) is thing else f"{package}.{name}", thing))
        made[file] = "\n".join([title, "=" * len(title), "", f".. automodule:: {package}\n   :no-members:\n", *directives])
    contents = "\n   ".join(PAGES)
    made["index"] = f"API reference\n=============\n\nMade from the docstrings.\n\n.. toctree::\n   :maxdepth: 1\n\n   {contents}\n"
    return made


def _write(app: Sphinx) -> None:
    folder = Path(app.srcdir) / "api"
    folder.mkdir(exist_ok=True)
    for file, text in pages().items():
        path = folder / f"{file}.rst"
        if not path.is_file() or path.read_text() != text:
            path.write_text(text)


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("builder-inited", _write)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
