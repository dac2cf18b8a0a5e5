"""`recog-fast identify`: who in a gallery is nearest to each image."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from recog_fast.terminal.console import Commands, UsageError, between, count, device_name, json_option, print_json
from recog_fast.terminal.progress import progress


def add(commands: Commands, parents: list[argparse.ArgumentParser]) -> None:
    """Register the command."""
    find = commands.add_parser(
        "identify",
        parents=parents,
        help="who in a gallery is nearest to each image",
        description=_identify.__doc__,
        example=(
            "recog-fast identify models/mbf --gallery people/ --probes photos/ --top 3",
            "recog-fast identify models/mbf --gallery people/ --probes photos/ --strangers others/ --fpir 0.01 --json",
        ),
    )
    find.add_argument("model", help="output folder of a run, one of its checkpoints, a model folder, or an .onnx file with its card")
    find.add_argument("--gallery", required=True, metavar="SOURCE", help="known people: folder, .rec, .csv, ... (`recog-fast data check`)")
    find.add_argument("--probes", required=True, metavar="SOURCE", help="images to look for, in the same formats")
    find.add_argument("--top", type=count, default=5, metavar="N", help="matches shown per image (%(default)s)")
    limit = find.add_mutually_exclusive_group()
    limit.add_argument("--threshold", type=between(-1, 1), metavar="COSINE", help="no match below this cosine")
    limit.add_argument(
        "--fpir", type=between(0, 1), metavar="SHARE", help="choose the threshold so that at most this share of people who are not in the gallery gets a match"
    )
    find.add_argument(
        "--strangers", metavar="SOURCE", help="with --fpir: images of people who are not in the gallery; else the probes whose class is not in it"
    )
    find.add_argument("--per-person", action="store_true", help="one mean vector per class of the gallery")
    find.add_argument("--faiss", action="store_true", help="search with faiss instead of exact products")
    find.add_argument("--block", type=count, default=4096, metavar="N", help="gallery images embedded and searched at a time (%(default)s)")
    find.add_argument("--device", type=device_name, default="cpu", help="cpu, cuda, cuda:1, ... (%(default)s)")
    json_option(find, "probes with their matches, rank 1, and with --fpir the threshold (open_set)")
    find.set_defaults(run=_identify)


def _identify(options: argparse.Namespace, _: list[str]) -> int:
    """Embeds a gallery and probe images (flip sum) and prints, for each probe, the classes of the nearest gallery images (--json names the
    images too) or people. The gallery comes by in blocks: what is held is the probes and their matches (with --faiss or --per-person also the index
    or a vector per person). Where both have classes of the same names, rank-1 accuracy is printed too; with --fpir the
    open-set threshold and the share of known people found above it."""
    from recog_fast.commands.host import device_here
    from recog_fast.data import open_dataset
    from recog_fast.evaluation import GallerySearch
    from recog_fast.training.model_files import open_model

    if options.strangers and options.fpir is None:
        raise UsageError(f"identify: expected --fpir with --strangers {options.strangers}, got none")
    device = device_here(options.device)
    network, card = open_model(options.model)
    network.to(device)
    gallery, probes = (open_dataset(path) for path in (options.gallery, options.probes))
    looked, shown = _embedded("probes embedded", network, probes, card.input_size)
    asked, strangers = looked, 0
    if options.strangers:
        more, _places = _embedded("strangers embedded", network, open_dataset(options.strangers), card.input_size)
        asked, strangers = np.concatenate([asked, more]), len(more)
    search = GallerySearch(asked, options.top, engine="faiss" if options.faiss else "exact")
    known = _fill(search, network, gallery, card.input_size, options)
    all_cosines, found = search.result()
    cosine = all_cosines[: len(shown)]
    own = [_class_name(probes, i) for i in shown]
    mated = np.array([name in known.classes for name in own])
    right = np.array([known.of(int(row))[1] == name for row, name in zip(found[: len(shown), 0], own, strict=True)])
    threshold, said = -math.inf if options.threshold is None else options.threshold, None
    if options.fpir is not None:
        others = all_cosines[len(shown) :, 0] if strangers else cosine[~mated, 0]
        said = _open_set(others, cosine[:, 0], mated, right, options.fpir)
        threshold = said["threshold"]
    rows = []
    for row, place in enumerate(shown):
        pairs = zip(cosine[row].tolist(), found[row].tolist(), strict=True)
        matches = [(*known.of(k), c) for c, k in pairs if c >= threshold]
        named = [{"name": name, "class": label, "cosine": round(c, 6)} for name, label, c in matches]
        rows.append({"probe": str(probes.source(place)), "class": own[row], "matches": named})
    first = {"accuracy": float(right[mated].mean()), "probes": int(mated.sum())} if mated.any() else None
    _tell(options, {"probes": rows, "gallery": search.rows, "rank_1": first, "open_set": said})
    return 0


def _embedded(what: str, network: Any, source: Any, size: tuple[int, int]) -> tuple[Any, list[int]]:
    from recog_fast.training.model_files import embed_dataset

    with progress(what) as step:
        vectors, places = embed_dataset(network, source, size, progress=step)
    return vectors.numpy(), places


@dataclass(frozen=True)
class _Known:
    """of(row of the search) -> (name, class); the classes in the gallery."""

    of: Callable[[int], tuple[str, str]]
    classes: set[str]


def _fill(search: Any, network: Any, gallery: Any, size: tuple[int, int], options: argparse.Namespace) -> _Known:
    """Hand the gallery to the search, block by block, or as one vector for each person."""
    from recog_fast.training.model_files import embed_blocks

    places: list[Any] = []
    sums: dict[str, Any] = {}
    with progress("gallery embedded") as step:
        for block, kept in embed_blocks(network, gallery, size, options.block, progress=step):
            if options.per_person:
                for vector, i in zip(block.double().numpy(), kept, strict=True):
                    name = _class_name(gallery, i)
                    sums[name] = sums[name] + vector if name in sums else vector
            else:
                search.add(block)
                places.append(np.array(kept, dtype=np.int64))
    if options.per_person:
        people = sorted(sums)
        if people:
            search.add(np.stack([sums[name] for name in people]))
        return _Known(lambda row: (people[row], people[row]), set(people))
    where = np.concatenate(places) if places else np.empty(0, np.int64)
    classes = {_class_name(gallery, i) for i in _one_of_each(gallery, where)}
    return _Known(lambda row: (str(gallery.source(int(where[row]))), _class_name(gallery, int(where[row]))), classes)


def _one_of_each(gallery: Any, places: Any) -> list[int]:
    _, first = np.unique(np.asarray(gallery.labels)[places], return_index=True)
    return [int(places[k]) for k in first]


def _open_set(others: Any, best: Any, mated: Any, right: Any, fpir: float) -> dict[str, Any]:
    """The threshold of an FPIR over non-mated searches, and what it does to the mated ones; cosines to six digits, as printed."""
    from recog_fast.evaluation import fpir_threshold

    if not len(others):
        raise ValueError("identify: expected --strangers, or probes of people who are not in the gallery, with --fpir, got neither")
    exact = fpir_threshold(np.asarray(others, np.float64), fpir)
    threshold = -1.0 if exact == -math.inf else math.ceil(exact * 1e6) / 1e6
    found = (best >= threshold) & right
    return {
        "fpir": fpir, "threshold": threshold, "non_mated": len(others), "false_positives": int((others >= threshold).sum()),
        "mated": int(mated.sum()), "tpir": float(found[mated].mean()) if mated.any() else None,
    }  # fmt: skip


def _in_words(said: dict[str, Any]) -> str:
    tpir = "" if said["tpir"] is None else f"; {said['tpir']:.4f} of {said['mated']} known people are first and above it (TPIR)"
    return f"threshold {said['threshold']:.6f}: {said['false_positives']} of {said['non_mated']} people who are not in the gallery get a match{tpir}"


def _tell(options: argparse.Namespace, found: dict[str, Any]) -> None:
    if options.json:
        print_json(found)
        return
    for row in found["probes"]:
        text = "   ".join(f"{match['class']} {match['cosine']:.4f}" for match in row["matches"])
        print(f"{row['probe']}: {text or 'nobody'}")
    if found["open_set"] is not None:
        print(_in_words(found["open_set"]))
    if found["rank_1"] is not None:
        print(f"rank 1: {found['rank_1']['accuracy']:.4f} of {found['rank_1']['probes']} probes, {found['gallery']} in the gallery")


def _class_name(dataset: Any, index: int) -> str:
    label = int(dataset.labels[index])
    names = getattr(dataset, "class_names", None)
    return str(label) if names is None or label < 0 else str(names[label])
