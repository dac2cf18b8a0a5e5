"""arcface_torch's training recipes (configs/*.py, or the same fields as YAML) as settings of `recog-fast train`.

A .py recipe is read, not run: lines `config.<field> = <value>` count, a value being a literal or arithmetic of numbers and
earlier fields (`config.num_epoch // 10`); imports and `config = edict()` are passed over, and anything else is refused.
Fields a recipe leaves out have the values of arcface_torch's configs/base.py.
"""

from __future__ import annotations

import ast
import dataclasses
import operator
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from .insightface import margin_from_list

# configs/base.py of arcface_torch.
BASE: dict[str, Any] = {
    "margin_list": (1.0, 0.5, 0.0), "network": "r50", "resume": False, "save_all_states": False, "embedding_size": 512,
    "sample_rate": 1.0, "interclass_filtering_threshold": 0, "fp16": False, "batch_size": 128, "optimizer": "sgd",
    "lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4, "verbose": 2000, "frequent": 10, "gradient_acc": 1, "seed": 2048,
    "num_workers": 2, "warmup_epoch": 0, "num_epoch": 20, "val_targets": [],
}  # fmt: skip
NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    **{f"r{depth}": (f"iresnet{depth}", {}) for depth in (18, 34, 50, 100, 200)},
    "mbf": ("mobilefacenet", {"blocks": [1, 4, 6, 2], "scale": 2}),
    "mbf_large": ("mobilefacenet", {"blocks": [2, 8, 12, 4], "scale": 4}),
}
_SAME = (
    "embedding_size", "batch_size", "gradient_acc", "lr", "momentum", "weight_decay", "num_epoch", "verbose", "frequent",
    "seed", "num_workers", "resume", "sample_rate",
)  # fmt: skip
# Without a counterpart, or counted from the data here.
_PASSED_OVER = frozenset(
    "num_classes num_image dali dali_aug save_all_states using_wandb suffix_run_name wandb_key wandb_entity wandb_project "
    "wandb_log_all wandb_resume wandb_save_artifacts wandb_artifact notes fp16 rec network margin_list optimizer "
    "interclass_filtering_threshold warmup_epoch val_targets output loss ckpt decay_epoch lr_func".split()
)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """settings: nested values for `recog-fast train`; notes: what a reader should know, one line each."""

    settings: dict[str, Any]
    notes: tuple[str, ...]


def read_recipe(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The fields of a .py or .yaml recipe, literal values only. Raises ValueError naming the file and line."""
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"read_recipe: expected a .py or .yaml recipe, got {file}, which is no file")
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".py":
        return _literal_fields(text, file)
    import yaml

    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"read_recipe: expected YAML in {file}, got {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ValueError(f"read_recipe: expected keys and values in {file}, got {type(values).__name__}")
    return {str(name): value for name, value in values.items()}


def _literal_fields(text: str, file: Path) -> dict[str, Any]:
    try:
        body = ast.parse(text, str(file)).body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"read_recipe: expected Python in {file}, got {error}") from error
    fields: dict[str, Any] = {}
    for statement in body:
        if isinstance(statement, (ast.Import, ast.ImportFrom)) or _is_text(statement):
            continue
        target = statement.targets[0] if isinstance(statement, ast.Assign) and len(statement.targets) == 1 else None
        if (
            isinstance(target, ast.Name)
            and target.id == "config"
            and isinstance(statement, ast.Assign)
            and _is_empty(statement.value)
        ):
            continue
        plain = isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name) and target.value.id == "config"
        try:
            if not plain or not isinstance(statement, ast.Assign) or not isinstance(target, ast.Attribute):
                raise ValueError("another statement")
            fields[target.attr] = _value(statement.value, fields)
        except (ValueError, TypeError, SyntaxError, ArithmeticError, RecursionError, MemoryError) as error:
            line = ast.unparse(statement).splitlines()[0]
            raise ValueError(
                f"read_recipe: expected lines config.<field> = <literal or arithmetic> in {file}, got line {statement.lineno}: {line:.80}"
            ) from error
    return fields


def _no_less_than_0(warmup: Any) -> Any:
    """Old recipes write -1 for no warm-up."""
    return max(0, warmup) if isinstance(warmup, int | float) else warmup


_ARITHMETIC: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod,
}  # fmt: skip


def _value(node: ast.expr, fields: Mapping[str, Any]) -> Any:
    """A literal, an earlier field (`config.lr`), or arithmetic of numbers among them; ValueError for anything else."""
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "config":
        if node.attr not in fields:
            raise ValueError(f"config.{node.attr} comes later or not at all")
        return fields[node.attr]
    if isinstance(node, ast.BinOp) and type(node.op) in _ARITHMETIC:
        pair = _value(node.left, fields), _value(node.right, fields)
        if not all(isinstance(value, int | float) for value in pair):
            raise ValueError("arithmetic of something else than numbers")
        return _ARITHMETIC[type(node.op)](*pair)
    return ast.literal_eval(node)


def _is_text(statement: ast.stmt) -> bool:
    return (
        isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
    )


def _is_empty(value: ast.expr) -> bool:
    """edict(), EasyDict(), dict() or {}."""
    if isinstance(value, ast.Dict):
        return not value.keys
    named = (
        isinstance(value, ast.Call)
        and isinstance(value.func, ast.Name)
        and value.func.id in ("edict", "EasyDict", "dict")
    )
    return named and isinstance(value, ast.Call) and not value.args and not value.keywords


def _margin_settings(margin: Any) -> dict[str, Any]:
    """{name, parameters} of a margin that `margin_from_list` made."""
    if hasattr(margin, "threshold"):
        return {"name": "InterclassFilter", "margin": _margin_settings(margin.margin), "threshold": margin.threshold}
    return {"name": type(margin).__name__, **dataclasses.asdict(margin)}


def recipe_settings(fields: Mapping[str, Any]) -> Recipe:
    """arcface_torch's fields as settings that repeat its training: the margin's straight-through gradient without fallback,
    W from N(0, 0.01), the polynomial schedule with its full rate at step 0, decay of every weight, gradients of the
    backbone clipped to 5, horizontal flips.

    Raises ValueError for a network or margin that is not here, TypeError for a value of another kind.
    """
    values = {**BASE, **fields}
    if values["network"] not in NETWORKS:
        raise ValueError(f"recipe_settings: expected network in {', '.join(NETWORKS)}, got {values['network']!r}")
    network, options = NETWORKS[values["network"]]
    rec = str(values.get("rec", ""))
    adam = values["optimizer"] == "adamw"
    settings: dict[str, Any] = {
        "data": {"kind": "rec", "path": os.path.join(rec, "train.rec"), "size": 112},
        "augment": {"flip": 0.5},
        "network": network,
        "network_options": options,
        "margin": _margin_settings(
            margin_from_list(values["margin_list"], float(values["interclass_filtering_threshold"]))
        ),
        "scale": 64.0,
        **{name: values[name] for name in _SAME},
        "optimizer": "adamw" if adam else "sgd",
        "head_optimizer": "adamw" if adam else "headsgd",
        "lr_schedule": "polynomial",
        "warmup_epoch": _no_less_than_0(values["warmup_epoch"]),
        "clip_grad_norm": 5.0,
        "precision": "auto" if values["fp16"] else "float32",
        "val_targets": [os.path.join(rec, f"{name}.bin") for name in values["val_targets"]],
        "output": values.get("output") or f"runs/{values['network']}",
    }
    notes = [
        f"{name} = {fields[name]!r} has no counterpart" for name in sorted(set(fields) - set(_SAME) - _PASSED_OVER)
    ]
    if "num_classes" in fields:
        notes.append(f"num_classes = {fields['num_classes']} is counted from the data")
    if values["fp16"]:
        notes.append("fp16: bfloat16 on a GPU, without a gradient scaler")
    return Recipe(settings, tuple(notes))
