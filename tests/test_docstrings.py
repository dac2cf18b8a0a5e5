"""Every public name is documented: what it computes, shapes, errors and source; a section that is taken out is missed."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import textwrap
from collections.abc import Iterator
from typing import Any

import pytest
import torch

PACKAGES = (
    "recog_fast", "recog_fast.ops", "recog_fast.margins", "recog_fast.memory", "recog_fast.recognizability", "recog_fast.sharding",
    "recog_fast.checkpoint", "recog_fast.compat.pml", "recog_fast.compat.insightface", "recog_fast.data", "recog_fast.models",
    "recog_fast.evaluation", "recog_fast.estimate",
)  # fmt: skip
# What the documents use of the training script, whose modules export everything to one another.
TRAINING = {
    "recog_fast.training.config": ("DataConfig", "RecognizabilityConfig", "TrainConfig", "read_config", "to_yaml"),
    "recog_fast.training.loop": ("NonFiniteError", "TrainResult", "train"),
    "recog_fast.training.saved": ("find_run", "load_pretrained", "load_quality_model", "load_run"),
}
# Those whose names compute something of a paper: losses, heads, margins, operations, memory, recognizability.
COMPUTING = PACKAGES[:5]
# Those that spell, read or write what others defined, and measures that others published.
FOREIGN = ("recog_fast.compat.pml", "recog_fast.compat.insightface", "recog_fast.data", "recog_fast.models", "recog_fast.evaluation")

SHAPE = re.compile(r"\((N|C|D|E|S|P|B|Q|T|n|K|F|M|G|R|H|U|size|bins|batch|len\(\w+\)|3(?=, H))\b[^)]*,[^)]*\)|\((N|C|P|M|n|bins|classes),\)|0-dim")
ERRORS = re.compile(r"\b(Raises|ValueError|TypeError|RuntimeError)\b")
SOURCE = re.compile(
    r"Sources?:|math\.md|eq\. \d|et al\.|ArcFace|CosFace|SphereFace|MagFace|QAFace|VPL|UIR|CBAM|Harnessing|InsightFace|Circle Loss|MV-Softmax|"
    r"Curricular|NormFace|arcface_torch|mxnet|WebDataset|QMUL|IJB's|SurvFace|YouTube Faces|SCFace|ONNX"
)
# An annotation that means an array or a tensor.
ARRAY = re.compile(r"\b(Tensor|NDArray|ArrayLike|FloatArray|IntArray|BoolArray|Int64|Image|Maps|Counts|Rows|Found)\b")

# No paper's equation: a switch, a question, files, records whose makers say it.
RECORDS = {"Entries", "Injection", "MemoryPolicy", "NormStatistics", "ClusterRow", "RecognizabilityTerms", "ThresholdRow", "RowStats"}
WITHOUT_SOURCE = {"use_backend", "backends", "save_checkpoint", "load_checkpoint", "MarginFunction", *RECORDS} | {
    # data: image files, folders, lists, archives, and what is wrapped around them
    "Augmented", "CorruptImage", "DataReport", "FolderDataset", "ListDataset", "MadeNames", "MixedDataset", "Resized", "ResumableBatches",
    "SkipCorrupt", "StreamBatches", "SyntheticIdentities", "ZipDataset", "check_dataset", "class_subset", "decode_image", "open_dataset",
    "plot_class_sizes", "register_source", "resize_image",
    # models: the base, the registry, this library's own network and folders
    "Backbone", "LoadReport", "ModelCard", "TinyNet", "build_model", "load_model", "model_names", "read_card", "save_model",
    # evaluation: pictures, pages, records, search by cosine, and what others' protocols are put together from
    "Gallery", "GalleryItem", "GallerySearch", "QualityComparison", "ScoreHistograms", "SubgroupReport", "VerificationResult", "compare_qualities",
    "erc_protocol", "overlay", "pair_galleries", "png_data_uri", "require_plots", "resize", "robustness", "search", "strip", "template_scores",
    "to_input", "verification_result", "write_report",
}  # fmt: skip
# Nothing to refuse: records, errors themselves, and functions every value of whose arguments has a meaning.
WITHOUT_RAISES = {"backends", "Softmax", "MarginFunction", *RECORDS} | {
    "CheckpointError", "CorruptImage", "DataReport", "Device", "Gallery", "GalleryItem", "GlobalBatch", "Head", "Item", "LoadReport",
    "Measured", "Message", "ModelCard", "NonFiniteError", "Option", "QualityComparison", "RanksError", "Report", "Shard", "SubgroupReport", "Times",
    "TrainResult", "VerificationResult",
    "buckets", "checkpoint_path", "class_range", "even", "flops", "gather_batch", "gradient_scaler", "gradients_travel", "initial_rows", "is_spread",
    "memory", "messages", "model_names", "post_processing", "seconds", "size", "text", "to_yaml", "traffic", "whole",
}  # fmt: skip
# Tensors of any shape: states, parameters, and shapes that are said once where the record is made.
WITHOUT_SHAPE = {"use_backend", "backends", "save_checkpoint", "load_checkpoint", "MarginFunction", "VPL", "World", "load_backbone"}


def public(packages: tuple[str, ...]) -> dict[str, Any]:
    """Dotted name -> class or function; each object once."""
    found: dict[str, Any] = {}
    seen: set[int] = set()
    for package in packages:
        module = importlib.import_module(package)
        for name in TRAINING.get(package, getattr(module, "__all__", ())):
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


ALL = public((*PACKAGES, *TRAINING))
COMPUTED = public(COMPUTING)
DEFINED_ELSEWHERE = public(FOREIGN)


def own_text(thing: Any) -> str:
    """Its docstring; not the signature that a dataclass without one shows."""
    text = inspect.getdoc(thing) or "" if not inspect.isclass(thing) else inspect.cleandoc(thing.__doc__ or "")
    return "" if inspect.isclass(thing) and text.startswith(f"{thing.__name__}(") else text


def text_of(thing: Any) -> str:
    """The docstring, with those of the methods where it is a class"""
    if not inspect.isclass(thing):
        return own_text(thing)
    return "\n".join([own_text(thing), *(inspect.getdoc(function) or "" for _, function in methods(thing)), inspect.getdoc(vars(thing).get("__call__")) or ""])


def handles_arrays(thing: Any) -> bool:
    """Whether signature, fields or public methods name arrays; modules and datasets do whatever they inherit."""
    if inspect.isclass(thing) and issubclass(thing, (torch.nn.Module, torch.utils.data.Dataset)):
        return True
    functions = [function for _, function in methods(thing)] if inspect.isclass(thing) else [thing]
    annotations = [vars(thing).get("__annotations__", {})] if inspect.isclass(thing) else []
    annotations += [getattr(inspect.unwrap(function), "__annotations__", {}) for function in functions]
    return any(ARRAY.search(str(said)) for given in annotations for said in given.values())


def raised(function: Any) -> set[str]:
    """Names of the errors that a function's own lines raise; `expect` of the checks raises ValueError."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function))))
    except (OSError, TypeError):
        return set()
    told_otherwise = {id(inner) for node in ast.walk(tree) if isinstance(node, ast.Try) and node.handlers for inner in ast.walk(ast.Module(node.body, []))}
    found = set()
    for node in ast.walk(tree):
        if id(node) in told_otherwise:
            continue
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            found.add(ast.unparse(node.exc.func).rpartition(".")[2])
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("_checks.expect"):
            found.add("ValueError")
    return found - {"NotImplementedError", "IndexError"}


def raising(thing: Any) -> Iterator[tuple[str, set[str], str]]:
    """(what, errors its lines raise, where they may be said): a function, or a class's constructor and public methods."""
    if not inspect.isclass(thing):
        yield "", raised(thing), own_text(thing)
        return
    if getattr(thing, "_is_protocol", False):
        return
    made = [(name, vars(thing)[name]) for name in ("__init__", "__post_init__", "__call__") if inspect.isfunction(vars(thing).get(name))]
    for name, function in [*made, *methods(thing)]:
        inherited = inspect.getdoc(getattr(thing, name)) or ""
        yield name, raised(function), f"{own_text(thing)}\n{inspect.getdoc(function) or inherited}"


@pytest.mark.parametrize("name", ALL)
def test_it_has_a_docstring(name: str) -> None:
    thing = ALL[name]
    if name.endswith(".MarginFunction"):
        return  # a type, described by its module
    assert own_text(thing).strip(), name
    if inspect.isclass(thing):
        # A method that overrides a documented one says the same.
        missing = [m for m, function in methods(thing) if not (function.__doc__ or inspect.getdoc(getattr(thing, m)))]
        assert not missing, f"{name}: {missing}"


def test_every_package_has_a_docstring() -> None:
    assert not [package for package in (*PACKAGES, *TRAINING) if not (importlib.import_module(package).__doc__ or "").strip()]


@pytest.mark.parametrize("name", ALL)
def test_it_says_its_errors(name: str) -> None:
    thing, short = ALL[name], name.rpartition(".")[2]
    if short not in WITHOUT_RAISES:
        assert ERRORS.search(text_of(thing)), f"{name}: no error"
    elif short not in RECORDS:
        assert not any(found for _, found, _ in raising(thing)), f"{name} is listed among those that refuse nothing"
    for where, found, said in raising(thing):
        names = {error for error in found if error not in said and not (error == "CheckpointError" and "ValueError" in said)}
        # "Raises as `MarginHead`": the error's name is there.
        assert not names or re.search(r"Raises (what|as) `", said), f"{name}.{where} raises {names} and does not say so"


@pytest.mark.parametrize("name", ALL)
def test_what_takes_or_gives_arrays_says_shapes(name: str) -> None:
    thing, short = ALL[name], name.rpartition(".")[2]
    if (name in COMPUTED or handles_arrays(thing)) and short not in WITHOUT_SHAPE:
        assert SHAPE.search(text_of(thing)), f"{name}: no shape"


@pytest.mark.parametrize("name", [*COMPUTED, *DEFINED_ELSEWHERE])
def test_what_others_defined_says_its_source(name: str) -> None:
    thing, short = {**COMPUTED, **DEFINED_ELSEWHERE}[name], name.rpartition(".")[2]
    if short not in WITHOUT_SOURCE:
        assert SOURCE.search(text_of(thing)), f"{name}: no source"


def test_lists_of_exceptions_name_what_there_is() -> None:
    known = {name.rpartition(".")[2] for name in ALL}
    for listed in (WITHOUT_SOURCE, WITHOUT_RAISES, WITHOUT_SHAPE):
        assert not listed - known, f"no such public name: {sorted(listed - known)}"
