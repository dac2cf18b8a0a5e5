"""`recog-fast import` and `recog-fast export`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from recog_fast.terminal.console import Commands, UsageError, count, json_option, print_json
from recog_fast.terminal.progress import progress


def add(commands: Commands, parents: list[argparse.ArgumentParser]) -> None:
    """Register both commands."""
    take = commands.add_parser(
        "import",
        parents=parents,
        help="others' weights, class centres and recipes",
        description=_import.__doc__,
        example=(
            "recog-fast import backbone.pth models/mbf --network mobilefacenet --licence MIT",
            "recog-fast import checkpoints/ centres.safetensors --num-classes 93431",
            "recog-fast import ms1mv3_r50.py ms1mv3_r50.yaml",
        ),
    )
    take.add_argument(
        "source",
        help="weights (.pt, .pth, .ckpt, .safetensors), an .onnx file, a folder of checkpoint_gpu_*.pt, or a recipe (.py, .yaml)",
    )
    take.add_argument("target", help="new model folder; .safetensors for class centres; .yaml for a recipe")
    take.add_argument("--network", help="what the weights are of, e.g. iresnet50, mobilefacenet, mobilenet_v2")
    take.add_argument("--network-options", type=_json, default={}, metavar="JSON", help="options of the network, an object ({})")
    take.add_argument("--embedding-size", type=count, default=512, metavar="D", help="embedding size of the network (%(default)s)")
    take.add_argument("--size", type=count, default=112, metavar="PIXELS", help="input side in pixels (%(default)s)")
    take.add_argument("--num-classes", type=count, metavar="C", help="what the class centres must add up to")
    _card_options(take)
    json_option(take, "target, what it holds, and the report of what was read")
    take.set_defaults(run=_import)

    give = commands.add_parser(
        "export",
        parents=parents,
        help="a trained backbone as ONNX or as a folder with a card",
        description=_export.__doc__,
        example=("recog-fast export runs/lfw model.onnx", "recog-fast export runs/lfw model/ --licence CC-BY-4.0"),
    )
    give.add_argument("model", help="output folder of a run, one of its checkpoints, or a model folder")
    give.add_argument("target", help=".onnx file, or new model folder (model.safetensors, card.json, README.md)")
    give.add_argument(
        "--normalize", choices=("auto", "inside", "outside"), default="auto", help="where ONNX normalises pixels (%(default)s)"
    )
    give.add_argument("--no-check", action="store_true", help="do not compare with onnxruntime")
    _card_options(give)
    json_option(give, "target, files or input, and the errors against PyTorch by batch")
    give.set_defaults(run=_export)


def _json(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"expected a JSON object, got {text!r}")
    return value


def _card_options(parser: argparse.ArgumentParser) -> None:
    channels = ("FIRST", "SECOND", "THIRD")
    parser.add_argument("--color-order", choices=("RGB", "BGR"), help="channel order the network expects")
    parser.add_argument("--mean", type=float, nargs=3, metavar=channels, help="mean of each channel in that order, of 1")
    parser.add_argument("--std", type=float, nargs=3, metavar=channels, help="deviation of each channel in that order, of 1")
    for name in ("licence", "training-data", "training-data-licence", "protocol", "notes"):
        parser.add_argument(f"--{name}", metavar="TEXT", help=f"{name.replace('-', ' ')} for the model card")
    parser.add_argument(
        "--metric", action="append", default=[], type=_json, metavar="JSON",
        help="a result for the model card, e.g. '{\"lfw\": 0.99}'; may be given several times",
    )  # fmt: skip


def _described(options: argparse.Namespace, backbone: Any, card: Any) -> Any:
    """The card with what the command line says; the backbone takes its pixel convention."""
    import dataclasses

    pixels = backbone.preprocessing
    given = {"color_order": options.color_order, "mean": options.mean, "std": options.std}
    changes = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items() if v is not None}
    backbone.preprocessing = dataclasses.replace(pixels, **changes)
    return _said(options, card)


def _said(options: argparse.Namespace, card: Any) -> Any:
    import dataclasses

    names = ("licence", "training_data", "training_data_licence", "protocol", "notes")
    said = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    if options.metric:
        said["metrics"] = (*card.metrics, *options.metric)
    return dataclasses.replace(card, **said)


def _told(options: argparse.Namespace, document: dict[str, Any], lines: list[str]) -> int:
    """The result, once everything is written: the document or the lines."""
    if options.json:
        print_json({"target": options.target, **document})
    else:
        print("\n".join(lines))
    return 0


def _import(options: argparse.Namespace, _: list[str]) -> int:
    """Takes over what others trained: a backbone (strictly, with a report) becomes a model folder with a card; the class
    centres in arcface_torch's per-rank files become one file; an arcface_torch recipe becomes settings."""
    source = Path(options.source)
    if source.suffix in (".py", ".yaml", ".yml"):
        return _import_recipe(options, source, Path(options.target))
    if source.is_dir():
        return _import_head(options, source, Path(options.target))
    if source.suffix == ".onnx":
        return _import_onnx(options)
    if options.network is None:
        raise UsageError(f"import: expected --network for the weights {source}, got none")
    from recog_fast.models import ModelCard, build_model, load_backbone, model_names, save_model

    if options.network not in model_names():
        raise UsageError(f"import: expected --network in {', '.join(model_names())}, got {options.network}")
    arguments = {k: tuple(v) if isinstance(v, list) else v for k, v in options.network_options.items()}
    backbone = build_model(options.network, embedding_dim=options.embedding_size, input_size=options.size, **arguments)
    read = str(load_backbone(backbone, source))
    card = ModelCard(options.network, options.embedding_size, network_options=options.network_options)
    written = save_model(backbone, options.target, _described(options, backbone, card))
    pixels = written.preprocessing
    line = f"{options.target}: {written.network}, {pixels.color_order}, mean {pixels.mean}, std {pixels.std}"
    return _told(options, {"kind": "model", "read": read, **_of_card(written)}, [read, line])


def _of_card(card: Any) -> dict[str, Any]:
    pixels = card.preprocessing
    return {"network": card.network, "embedding_size": card.embedding_dim, "color_order": pixels.color_order, "mean": pixels.mean, "std": pixels.std}


def _import_onnx(options: argparse.Namespace) -> int:
    from recog_fast.models import ModelCard, Preprocessing, import_onnx

    given = [options.color_order, options.mean, options.std]
    pixels = None
    if any(given):
        if not all(given):
            raise UsageError("import: expected --color-order, --mean and --std together for an .onnx file, got some of them")
        pixels = Preprocessing(tuple(options.mean), tuple(options.std), options.color_order)
    card = ModelCard("onnx", options.embedding_size, input_size=(options.size, options.size))
    written = import_onnx(options.source, options.target, _said(options, card), pixels)
    found = written.preprocessing
    why = "as given" if pixels else "as the file says, or as InsightFace's reader would take it"
    line = f"{options.target}: {written.embedding_dim} numbers; {found.color_order}, mean {found.mean}, std {found.std} ({why})"
    return _told(options, {"kind": "onnx", "pixels": why, **_of_card(written)}, [line])


def _import_recipe(options: argparse.Namespace, source: Path, target: Path) -> int:
    import yaml

    from recog_fast.compat.recipe import read_recipe, recipe_settings
    from recog_fast.training.config import read_config

    recipe = recipe_settings(read_recipe(source))
    text = f"# From {source.name} of arcface_torch.\n" + "".join(f"# {note}.\n" for note in recipe.notes)
    target.write_text(text + yaml.safe_dump(recipe.settings, sort_keys=False, default_flow_style=None, width=120))
    read_config(target)
    lines = [f"{target}: settings for recog-fast train", *recipe.notes]
    return _told(options, {"kind": "settings", "notes": recipe.notes}, lines)


def _import_head(options: argparse.Namespace, source: Path, target: Path) -> int:
    from safetensors.torch import save_file

    from recog_fast.compat.insightface import read_head

    with progress("files read") as step:
        weight, placed = read_head(source, options.num_classes, step)
    save_file({"weight": weight}, target)
    lines = [f"{path.name}: classes {first} to {past - 1}" if past > first else f"{path.name}: no classes" for path, first, past in placed]
    files = [{"file": path.name, "first": first, "classes": past - first} for path, first, past in placed]
    document = {"kind": "head", "classes": weight.shape[0], "embedding_size": weight.shape[1], "files": files}
    return _told(options, document, [*lines, f"{target}: {weight.shape[0]} class centres, D = {weight.shape[1]}"])


def _export(options: argparse.Namespace, _: list[str]) -> int:
    """Writes a trained backbone for use elsewhere: as ONNX with a symbolic batch, compared with PyTorch at batch 1, 2 and
    17 where onnxruntime is installed; or as a folder of safetensors and a model card."""
    from recog_fast.models import OnnxModel, export_onnx, onnx_errors, save_model, save_onnx_card
    from recog_fast.training.model_files import open_model

    backbone, card = open_model(options.model)
    if isinstance(backbone, OnnxModel):
        raise ValueError(f"export: expected a run or a model folder with weights, got the ONNX network {options.model}")
    card = _described(options, backbone, card)
    target = Path(options.target)
    if target.suffix != ".onnx":
        save_model(backbone, target, card)
        files = ["model.safetensors", "card.json", "README.md"]
        return _told(options, {"kind": "model", "files": files}, [f"{target}: {', '.join(files)}"])
    inside = export_onnx(backbone, target, normalize=options.normalize)
    save_onnx_card(target, backbone, card, inside)
    what = "RGB pixels 0..255" if inside else f"normalised {backbone.preprocessing.color_order} pixels"
    lines = [f"{target}: input data, {what}"]
    errors = None
    if not options.no_check:
        try:
            errors = [{"batch": batch, "error": ours, "pytorch": plain} for batch, ours, plain in onnx_errors(target, backbone)]
            lines += [f"batch {e['batch']}: error {e['error']:.1e} of the largest value (PyTorch in float32: {e['pytorch']:.1e})" for e in errors]
        except ImportError:
            lines.append("not compared: onnxruntime is not installed")
    return _told(options, {"kind": "onnx", "input": what, "errors": errors}, lines)
