"""`recog-fast classes add` and `recog-fast classes merge`: other identities for a trained head, without starting over."""

from __future__ import annotations

import argparse
import csv
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from recog_fast.terminal.console import Commands, UsageError, at_least, count, json_option, print_json
from recog_fast.terminal.progress import progress


def add(commands: Commands, parents: list[argparse.ArgumentParser]) -> None:
    """Adds the commands to the subparsers `commands`."""
    classes = commands.add_parser(
        "classes",
        help="add identities to a trained head, or merge some",
        description="Adds identities to a trained head, or merges some, without starting over.",
        example=("recog-fast classes add runs/a runs/b --count 1000", "recog-fast classes merge runs/b runs/c --groups same_person.csv"),
    )
    inner = classes.add_subparsers(dest="action", metavar="ACTION", required=True)
    more = inner.add_parser(
        "add",
        parents=parents,
        help="new identities, untrained or from their images",
        description=_add.__doc__,
        example=("recog-fast classes add runs/a runs/b --images new_people/ --total-images 5822653", "recog-fast classes add runs/a runs/b --count 1000"),
    )
    _places(more)
    more.add_argument("--count", type=count, metavar="A", help="so many new classes, drawn as a new head's")
    more.add_argument("--embeddings", metavar="FILE", help=".npy (M, D): of images of the new identities; one row each, or several with --labels")
    more.add_argument("--labels", metavar="FILE", help=".npy (M,) int: 0 .. A - 1, which new identity a row of --embeddings shows")
    more.add_argument("--images", metavar="FOLDER", help="folder of one folder of images per new identity; the run's backbone embeds them")
    more.add_argument("--at", type=_ids, metavar="ID,ID,...", help="ids of the new classes among all, ascending (default: behind the others)")
    more.add_argument("--seed", type=at_least(0), default=0, help="of what is drawn (%(default)s)")
    more.set_defaults(run=_add)
    merge = inner.add_parser(
        "merge",
        parents=parents,
        help="classes that turned out to be one identity",
        description=_merge.__doc__,
        example="recog-fast classes merge runs/b runs/c --groups same_person.csv --counts images_per_class.npy",
    )
    _places(merge)
    merge.add_argument("--groups", required=True, metavar="FILE", help=".csv (a line of ids per group) or .jsonl (a list of ids per line)")
    merge.add_argument("--counts", metavar="FILE", help=".npy (C,): images of each class, which weigh its centre (default: all the same)")
    merge.set_defaults(run=_merge)


def _places(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help="output folder of a run (its last checkpoint), or a checkpoint")
    parser.add_argument("output", help="new run folder (of a checkpoint without a run: new checkpoint folder)")
    parser.add_argument("--total-images", type=count, metavar="N", help="training images from now on, where that changes: the epoch starts over")
    json_option(parser, "checkpoint written, file of old and new class ids, number of classes added or merged")


def _ids(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected ids such as 3,17,20, got {text!r}") from None


def _add(options: argparse.Namespace, _: list[str]) -> int:
    """Writes a run (or checkpoint) with more classes: `recog-fast train OUTPUT/config.yaml --resume true --data.path ...` goes on with it.
    W of a new class points to the mean of its normalised embeddings, or is drawn; nothing else of the training state moves. labels.csv says which
    old class is which new one."""
    from recog_fast.checkpoint import add_classes

    ways = [f"--{name}" for name in ("count", "embeddings", "images") if getattr(options, name) is not None]
    if len(ways) != 1:
        raise UsageError(f"classes add: expected one of --count, --embeddings and --images, got {' and '.join(ways) or 'none'}")
    if options.labels is not None and options.embeddings is None:
        raise UsageError(f"classes add: expected --embeddings with --labels {options.labels}, got none")
    checkpoint, target = _open(options)
    directions = _directions(options)
    added = options.count if directions is None else len(directions)
    label_map = add_classes(checkpoint, target, added, directions=directions, at=options.at, seed=options.seed, images=options.total_images)
    return _finish(options, checkpoint, target, label_map.tolist(), "added", added)


def _merge(options: argparse.Namespace, _: list[str]) -> int:
    """Writes a run (or checkpoint) in which the classes of each group are one, its centre their mean direction. labels.csv says which old
    class is which new one: the data's labels must follow it."""
    import numpy as np
    import torch

    from recog_fast.checkpoint import merge_classes

    checkpoint, target = _open(options)
    counts = None if options.counts is None else torch.from_numpy(np.load(options.counts, allow_pickle=False))
    groups = list(read_groups(Path(options.groups)))
    label_map = merge_classes(checkpoint, target, groups, counts=counts, images=options.total_images).tolist()
    return _finish(options, checkpoint, target, label_map, "merged", len(label_map) - len(set(label_map)))


def _open(options: argparse.Namespace) -> tuple[Path, Path]:
    """The checkpoint to read, and the folder the new one becomes."""
    from recog_fast.checkpoint import latest_checkpoint

    place, output = Path(options.source), Path(options.output)
    checkpoint = place if (place / "manifest.json").is_file() else latest_checkpoint(place / "checkpoints", verified=True)
    if checkpoint is None:
        raise FileNotFoundError(f"classes {options.action}: expected a run or a checkpoint, found none in {place}")
    if output.exists() and any(output.iterdir()):
        raise ValueError(f"classes {options.action}: expected a new or empty output folder, got {output}")
    return checkpoint, output / "checkpoints" / checkpoint.name if _config(checkpoint) else output


def _config(checkpoint: Path) -> Path | None:
    """Settings of the run that a checkpoint belongs to."""
    file = checkpoint.absolute().parent.parent / "config.yaml"
    return file if file.is_file() else None


def _finish(options: argparse.Namespace, checkpoint: Path, target: Path, label_map: list[int], what: str, changed: int) -> int:
    """Settings and label map beside the new checkpoint."""
    import yaml

    output, config = Path(options.output), _config(checkpoint)
    if config is not None:
        settings = yaml.safe_load(config.read_text())
        settings["output"] = str(output)
        (output / "config.yaml").write_text(yaml.safe_dump(settings, sort_keys=False, default_flow_style=None, width=120))
        model = config.with_name("model.pt")
        if model.is_file():
            shutil.copyfile(model, output / "model.pt")
    labels = output / "labels.csv" if config is not None else output.with_name(output.name + ".labels.csv")
    with labels.open("w", newline="") as file:
        csv.writer(file).writerows([("old", "new"), *enumerate(label_map)])
    if options.json:
        print_json({"checkpoint": target, "labels": labels, what: changed})
    else:
        print(f"{changed} classes {what}{' into others' if what == 'merged' else ''}: {target}   old and new classes: {labels}")
    return 0


def _directions(options: argparse.Namespace) -> Any:
    """(A, D) mean of the normalised embeddings of each new identity, or None."""
    import numpy as np
    import torch

    if options.embeddings is not None:
        rows = torch.from_numpy(np.load(options.embeddings, allow_pickle=False)).float()
        labels = torch.arange(len(rows)) if options.labels is None else torch.from_numpy(np.load(options.labels, allow_pickle=False))
    elif options.images is not None:
        rows, labels = _embedded(options)
    else:
        return None
    if labels.is_floating_point() or rows.dim() != 2 or labels.shape != rows.shape[:1] or not len(rows):
        raise ValueError(f"classes add: expected embeddings (M, D) with integer labels (M,), got {tuple(rows.shape)} and {labels.dtype} {tuple(labels.shape)}")
    labels = labels.long()
    size = int(labels.max()) + 1
    if int(labels.min()) < 0 or len(labels.unique()) != size:
        raise ValueError(f"classes add: expected labels 0 .. A - 1 with no gap, got {len(labels.unique())} from {int(labels.min())} to {size - 1}")
    return torch.zeros(size, rows.shape[1]).index_add_(0, labels, torch.nn.functional.normalize(rows, dim=1))


def _embedded(options: argparse.Namespace) -> tuple[Any, Any]:
    """Embeddings of a folder's images by the run's backbone, and whose they are."""
    import torch

    from recog_fast.counting import counted
    from recog_fast.data import FolderDataset, resize_image
    from recog_fast.evaluation import embed_images
    from recog_fast.training.verification import load_backbone

    backbone, size = load_backbone(options.source, None, 0, 0)
    source = FolderDataset(options.images)
    images = (resize_image(source[i][0], size) for i in range(len(source)))
    with progress("images embedded") as step:
        return embed_images(backbone, counted(images, len(source), step)), torch.as_tensor(source.labels).long()


def read_groups(file: Path) -> Iterator[list[int]]:
    """The groups of a .csv file (ids of a group in a line) or a .jsonl file (a list in a line); ValueError naming a bad line."""
    if file.suffix not in (".csv", ".jsonl"):
        raise ValueError(f"classes merge: expected groups in a .csv or .jsonl file, got {file}")
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            ids = json.loads(line) if file.suffix == ".jsonl" else [int(part) for part in line.split(",")]
            if not isinstance(ids, list) or not all(type(i) is int for i in ids):
                raise ValueError
        except ValueError:
            raise ValueError(f"classes merge: expected ids of a group in line {number} of {file}, got {line!r:.80}") from None
        yield ids
