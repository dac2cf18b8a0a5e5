"""`recog-fast eval`: verification of a trained backbone on pair files."""

from __future__ import annotations

import argparse
import itertools
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recog_fast.terminal.console import Commands, UsageError, count, device_name, json_option, print_json
from recog_fast.terminal.progress import progress


def add(commands: Commands, parents: list[argparse.ArgumentParser]) -> None:
    """Registers `eval`."""
    evaluate = commands.add_parser(
        "eval",
        parents=parents,
        help="verify a trained backbone on pair files",
        description=_eval.__doc__,
        example=("recog-fast eval runs/lfw --target lfw.bin --target agedb_30.bin", "recog-fast eval model.onnx --target lfw.bin --down 16 --json"),
    )
    evaluate.add_argument(
        "model",
        help="output folder of a run, one of its checkpoints, a model folder (card.json), an .onnx file with its card, or a file of weights (.pt; then give --network)",
    )
    evaluate.add_argument("--target", action="append", required=True, metavar="FILE", help=".bin file of pairs; may be given several times")
    evaluate.add_argument(
        "--down", action="append", type=count, default=[], metavar="PIXELS", help="also with images down to this side and up again; may be given several times"
    )
    evaluate.add_argument("--network", help="network of a file of weights, e.g. iresnet50")
    evaluate.add_argument("--embedding-size", type=count, default=512, metavar="D", help="embedding size of a file of weights (%(default)s)")
    evaluate.add_argument("--size", type=count, default=112, metavar="PIXELS", help="input side of a file of weights in pixels (%(default)s)")
    evaluate.add_argument("--device", type=device_name, default="cpu", help="cpu, cuda, cuda:1, ... (%(default)s)")
    json_option(evaluate, "per target (its name, with folders where names agree; @PIXELS) accuracy, deviation, EER, TAR at FAR")
    evaluate.set_defaults(run=_eval)


def _eval(options: argparse.Namespace, _: list[str]) -> int:
    """Prints 10-fold verification accuracy (flip sum), EER and TAR at FAR of a backbone on InsightFace .bin files."""
    from recog_fast.commands.host import device_here
    from recog_fast.models import model_names
    from recog_fast.training.verification import load_backbone, pairs_of_bin, verify

    names = names_of(options.target)
    shown = [name + (f"@{down}" if down else "") for name in names for down in (0, *options.down)]
    if len(set(shown)) < len(shown):
        raise UsageError(f"eval: expected every --target and --down once, got {', '.join(sorted({n for n in shown if shown.count(n) > 1}))} twice")
    if options.network is None and Path(options.model).is_file() and Path(options.model).suffix != ".onnx":
        raise UsageError(f"eval: expected --network for the weights file {options.model}, got none")
    if options.network not in (None, *model_names()):
        raise UsageError(f"eval: expected --network in {', '.join(model_names())}, got {options.network}")
    device = device_here(options.device)
    backbone, size = load_backbone(options.model, options.network, options.embedding_size, options.size)
    backbone.to(device)
    for target in options.target:  # before the first one has taken its minutes
        if not Path(target).is_file():
            raise FileNotFoundError(f"eval: no pair file {target}")
    report: dict[str, Any] = {}
    for target, stem in zip(options.target, names, strict=True):
        pairs = pairs_of_bin(target, size)
        for down in [0, *options.down]:
            name = stem + (f"@{down}" if down else "")
            with progress(f"{name}: images embedded") as step:
                result, balanced = verify(backbone, pairs, down, progress=step)
            report[name] = {**result.summary(), "balanced": balanced}
            if not options.json:
                row = report[name]
                tar = "   ".join(f"TAR@{far} {value:.4f}" for far, value in row["tar"].items())
                print(
                    f"{name}: accuracy {row['accuracy']:.4f} +- {row['std']:.4f} (balanced folds {balanced:.4f})   EER {row['eer']:.4f}   {tar}   ({row['form']})",
                    flush=True,
                )
    if options.json:
        print_json(report)
    return 0


def names_of(targets: Sequence[str]) -> list[str]:
    """A name for each file: its stem, with as many of its folders as tell it from the others (a/lfw, b/lfw)."""
    spelled = []
    for target in targets:
        parts = (Path(target).parent / Path(target).stem).parts
        spelled.append([*(str(Path(*parts[-k:])) for k in range(1, len(parts) + 1)), str(Path(target))])
    counts = Counter(itertools.chain.from_iterable(map(set, spelled)))
    return [next((name for name in names if counts[name] == 1), names[-1]) for names in spelled]
