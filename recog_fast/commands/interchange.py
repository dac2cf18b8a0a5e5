"""`recog-fast import`, `recog-fast export` and `recog-fast identify`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any


def add(commands: Any, parents: list[argparse.ArgumentParser]) -> None:
    """Register the three commands."""
    take = commands.add_parser(
        "import", parents=parents, help="others' weights, class centres and recipes", description=_import.__doc__
    )
    take.add_argument(
        "source",
        help="weights (.pt, .pth, .ckpt, .safetensors), a folder of checkpoint_gpu_*.pt, or a recipe (.py, .yaml)",
    )
    take.add_argument("target", help="new model folder; .safetensors for class centres; .yaml for a recipe")
    take.add_argument("--network", help="what the weights are of, e.g. iresnet50, mobilefacenet, mobilenet_v2")
    take.add_argument("--network-options", type=json.loads, default={}, metavar="JSON", help="options of the network")
    take.add_argument("--embedding-size", type=int, default=512)
    take.add_argument("--size", type=int, default=112, help="input side in pixels (112)")
    take.add_argument("--num-classes", type=int, help="what the class centres must add up to")
    _card_options(take)
    take.set_defaults(run=_import)

    give = commands.add_parser(
        "export",
        parents=parents,
        help="a trained backbone as ONNX or as a folder with a card",
        description=_export.__doc__,
    )
    give.add_argument("model", help="output folder of a run, one of its checkpoints, or a model folder")
    give.add_argument("target", help=".onnx file, or new model folder (model.safetensors, card.json, README.md)")
    give.add_argument(
        "--normalize", choices=("auto", "inside", "outside"), default="auto", help="where ONNX normalises pixels"
    )
    give.add_argument("--no-check", action="store_true", help="do not compare with onnxruntime")
    _card_options(give)
    give.set_defaults(run=_export)

    find = commands.add_parser(
        "identify", parents=parents, help="who in a gallery is nearest to each image", description=_identify.__doc__
    )
    find.add_argument("model", help="output folder of a run, one of its checkpoints, or a model folder")
    find.add_argument(
        "--gallery", required=True, help="known people: folder, .rec, .csv, ... (`recog-fast data check`)"
    )
    find.add_argument("--probes", required=True, help="images to look for, in the same formats")
    find.add_argument("--top", type=int, default=5, help="matches shown per image (5)")
    find.add_argument("--threshold", type=float, default=-1.0, help="no match below this cosine")
    find.add_argument("--per-person", action="store_true", help="one mean vector per class of the gallery")
    find.add_argument("--faiss", action="store_true", help="search with faiss instead of exact products")
    find.add_argument("--device", default="cpu")
    find.add_argument("--json", action="store_true", help="one JSON object per image")
    find.set_defaults(run=_identify)


def _card_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--color-order", choices=("RGB", "BGR"), help="channel order the network expects")
    parser.add_argument("--mean", type=float, nargs=3, help="per channel in that order, of 1")
    parser.add_argument("--std", type=float, nargs=3, help="per channel in that order, of 1")
    for name in ("licence", "training-data", "training-data-licence", "protocol", "notes"):
        parser.add_argument(f"--{name}", help="for the model card")
    parser.add_argument(
        "--metric",
        action="append",
        default=[],
        type=json.loads,
        metavar="JSON",
        help="for the model card, e.g. '{\"lfw\": 0.99}'",
    )


def _described(options: argparse.Namespace, backbone: Any, card: Any) -> Any:
    """The card with what the command line says; the backbone takes its pixel convention."""
    import dataclasses

    pixels = backbone.preprocessing
    given = {"color_order": options.color_order, "mean": options.mean, "std": options.std}
    changes = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items() if v is not None}
    backbone.preprocessing = dataclasses.replace(pixels, **changes)
    names = ("licence", "training_data", "training_data_licence", "protocol", "notes")
    said = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    if options.metric:
        said["metrics"] = (*card.metrics, *options.metric)
    return dataclasses.replace(card, **said)


def _import(options: argparse.Namespace, _: list[str]) -> int:
    """Takes over what others trained: a backbone (strictly, with a report) becomes a model folder with a card; the class
    centres in arcface_torch's per-rank files become one file; an arcface_torch recipe becomes settings."""
    source = Path(options.source)
    if source.suffix in (".py", ".yaml", ".yml"):
        return _import_recipe(source, Path(options.target))
    if source.is_dir():
        return _import_head(source, Path(options.target), options.num_classes)
    if options.network is None:
        raise ValueError(f"import: expected --network for the weights {source}, got none")
    from recog_fast.models import ModelCard, build_model, load_backbone, save_model

    arguments = {k: tuple(v) if isinstance(v, list) else v for k, v in options.network_options.items()}
    backbone = build_model(options.network, embedding_dim=options.embedding_size, input_size=options.size, **arguments)
    print(load_backbone(backbone, source))
    card = ModelCard(options.network, options.embedding_size, network_options=options.network_options)
    written = save_model(backbone, options.target, _described(options, backbone, card))
    pixels = written.preprocessing
    print(f"{options.target}: {written.network}, {pixels.color_order}, mean {pixels.mean}, std {pixels.std}")
    return 0


def _import_recipe(source: Path, target: Path) -> int:
    import yaml

    from recog_fast.compat.recipe import read_recipe, recipe_settings
    from recog_fast.training.config import read_config

    recipe = recipe_settings(read_recipe(source))
    text = f"# From {source.name} of arcface_torch.\n" + "".join(f"# {note}.\n" for note in recipe.notes)
    target.write_text(text + yaml.safe_dump(recipe.settings, sort_keys=False, default_flow_style=None, width=120))
    read_config(target)
    print("\n".join([f"{target}: settings for recog-fast train", *recipe.notes]))
    return 0


def _import_head(source: Path, target: Path, num_classes: int | None) -> int:
    from safetensors.torch import save_file

    from recog_fast.compat.insightface import read_head

    weight, placed = read_head(source, num_classes)
    save_file({"weight": weight}, target)
    for path, first, past in placed:
        print(f"{path.name}: classes {first} to {past - 1}" if past > first else f"{path.name}: no classes")
    print(f"{target}: {weight.shape[0]} class centres, D = {weight.shape[1]}")
    return 0


def _export(options: argparse.Namespace, _: list[str]) -> int:
    """Writes a trained backbone for use elsewhere: as ONNX with a symbolic batch, compared with PyTorch at batch 1, 2 and
    17 where onnxruntime is installed; or as a folder of safetensors and a model card."""
    from recog_fast.models import export_onnx, onnx_errors, save_model
    from recog_fast.training.model_files import open_model

    backbone, card = open_model(options.model)
    card = _described(options, backbone, card)
    target = Path(options.target)
    if target.suffix != ".onnx":
        save_model(backbone, target, card)
        print(f"{target}: model.safetensors, card.json, README.md")
        return 0
    inside = export_onnx(backbone, target, normalize=options.normalize)
    print(
        f"{target}: input data, {'RGB pixels 0..255' if inside else f'normalised {backbone.preprocessing.color_order} pixels'}"
    )
    if not options.no_check:
        try:
            for batch, ours, plain in onnx_errors(target, backbone):
                print(f"batch {batch}: error {ours:.1e} of the largest value (PyTorch in float32: {plain:.1e})")
        except ImportError:
            print("not compared: onnxruntime is not installed")
    return 0


def _identify(options: argparse.Namespace, _: list[str]) -> int:
    """Embeds a gallery and probe images (flip sum) and prints, for each probe, the nearest gallery images or people. Where
    both have classes of the same names, rank-1 accuracy is printed too."""
    import torch

    from recog_fast.data import open_dataset
    from recog_fast.evaluation import search, template_embeddings
    from recog_fast.training.model_files import embed_dataset, open_model

    backbone, card = open_model(options.model)
    backbone.to(options.device)
    gallery, probes = (open_dataset(path) for path in (options.gallery, options.probes))
    known, kept = embed_dataset(backbone, gallery, card.input_size)
    looked, shown = embed_dataset(backbone, probes, card.input_size)
    labels = [_class_name(gallery, i) for i in kept]
    names = [gallery.source(i) for i in kept]
    if options.per_person:
        people = sorted(set(labels))
        number = {name: k for k, name in enumerate(people)}
        known = torch.as_tensor(template_embeddings(known, [number[name] for name in labels])[1])
        names = labels = people
    cosine, found = search(looked, known, min(options.top, len(names)), engine="faiss" if options.faiss else "exact")
    right = 0
    for row, i in enumerate(shown):
        matches = [
            {"name": names[k], "class": labels[k], "cosine": round(float(c), 6)}
            for c, k in zip(cosine[row], found[row].tolist(), strict=True)
            if c >= options.threshold
        ]
        own = _class_name(probes, i)
        right += bool(matches) and matches[0]["class"] == own
        if options.json:
            print(json.dumps({"probe": probes.source(i), "class": own, "matches": matches}))
        else:
            text = "   ".join(f"{m['name'] if options.per_person else m['class']} {m['cosine']:.4f}" for m in matches)
            print(f"{probes.source(i)}: {text or 'nobody'}")
    if not options.json and set(labels) & {_class_name(probes, i) for i in shown}:
        print(f"rank 1: {right / len(shown):.4f} of {len(shown)} probes, {len(names)} in the gallery")
    return 0


def _class_name(dataset: Any, index: int) -> str:
    label = int(dataset.labels[index])
    names = getattr(dataset, "class_names", None)
    return str(label) if names is None or label < 0 else str(names[label])
