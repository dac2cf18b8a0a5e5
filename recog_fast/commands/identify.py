"""`recog-fast identify`: who in a gallery is nearest to each image."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np


def add(commands: Any, parents: list[argparse.ArgumentParser]) -> None:
    """Register the command."""
    find = commands.add_parser(
        "identify", parents=parents, help="who in a gallery is nearest to each image", description=_identify.__doc__
    )
    find.add_argument("model", help="output folder of a run, one of its checkpoints, a model folder, or an .onnx file with its card")
    find.add_argument("--gallery", required=True, help="known people: folder, .rec, .csv, ... (`recog-fast data check`)")
    find.add_argument("--probes", required=True, help="images to look for, in the same formats")
    find.add_argument("--top", type=int, default=5, help="matches shown per image (5)")
    limit = find.add_mutually_exclusive_group()
    limit.add_argument("--threshold", type=float, help="no match below this cosine")
    limit.add_argument("--fpir", type=float, help="choose the threshold so that at most this share of people who are not in the gallery gets a match")
    find.add_argument("--strangers", help="with --fpir: images of people who are not in the gallery; else the probes whose class is not in it")
    find.add_argument("--per-person", action="store_true", help="one mean vector per class of the gallery")
    find.add_argument("--faiss", action="store_true", help="search with faiss instead of exact products")
    find.add_argument("--block", type=int, default=4096, help="gallery images embedded and searched at a time (4096)")
    find.add_argument("--device", default="cpu")
    find.add_argument("--json", action="store_true", help="one JSON object per image; with --fpir a last one about the threshold")
    find.set_defaults(run=_identify)


def _identify(options: argparse.Namespace, _: list[str]) -> int:
    """Embeds a gallery and probe images (flip sum) and prints, for each probe, the classes of the nearest gallery images (--json names the
    images too) or people. The gallery comes by in blocks: what is held is the probes and their matches (with --faiss or --per-person also the index
    or a vector per person). Where both have classes of the same names, rank-1 accuracy is printed too; with --fpir the
    open-set threshold and the share of known people found above it."""
    from recog_fast.data import open_dataset
    from recog_fast.evaluation import GallerySearch
    from recog_fast.training.model_files import embed_dataset, open_model

    if options.block < 1 or options.top < 1:
        raise ValueError(f"identify: expected --block and --top >= 1, got {options.block} and {options.top}")
    if options.strangers and options.fpir is None:
        raise ValueError(f"identify: expected --fpir with --strangers {options.strangers}, got none")
    network, card = open_model(options.model)
    network.to(options.device)
    gallery, probes = (open_dataset(path) for path in (options.gallery, options.probes))
    looked, shown = embed_dataset(network, probes, card.input_size)
    asked, strangers = looked.numpy(), 0
    if options.strangers:
        more = embed_dataset(network, open_dataset(options.strangers), card.input_size)[0]
        asked, strangers = np.concatenate([asked, more.numpy()]), len(more)
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
    for row, place in enumerate(shown):
        pairs = zip(cosine[row].tolist(), found[row].tolist(), strict=True)
        matches = [(*known.of(k), c) for c, k in pairs if c >= threshold]
        _show(options, str(probes.source(place)), own[row], matches)
    if said is not None:
        print(json.dumps({"open_set": said}) if options.json else _in_words(said))
    if not options.json and mated.any():
        print(f"rank 1: {right[mated].mean():.4f} of {int(mated.sum())} probes, {search.rows} in the gallery")
    return 0


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
    for block, kept in embed_blocks(network, gallery, size, options.block):
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


def _show(options: argparse.Namespace, probe: str, own: str, matches: list[tuple[str, str, float]]) -> None:
    if options.json:
        rows = [{"name": name, "class": label, "cosine": round(c, 6)} for name, label, c in matches]
        print(json.dumps({"probe": probe, "class": own, "matches": rows}))
        return
    text = "   ".join(f"{label} {c:.4f}" for _, label, c in matches)
    print(f"{probe}: {text or 'nobody'}")


def _class_name(dataset: Any, index: int) -> str:
    label = int(dataset.labels[index])
    names = getattr(dataset, "class_names", None)
    return str(label) if names is None or label < 0 else str(names[label])
