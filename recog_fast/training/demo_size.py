"""How large the demo is, and its options; nothing heavy is imported here, so that the command line's help is quick."""

from __future__ import annotations

import argparse
import dataclasses
from dataclasses import dataclass
from pathlib import Path

from recog_fast.terminal.console import at_least, json_option


@dataclass(frozen=True)
class Size:
    """How much is drawn and trained; the defaults take about two minutes on two cores."""

    identities: int = 600
    images: int = 12  # pictures of each
    strangers: int = 200  # unlabelled people, half as many pictures of each
    holdout: int = 40  # identities behind the accuracy curve
    test_identities: int = 100
    test_pairs: int = 2000
    pixels: int = 40
    epochs: int = 8
    batch_size: int = 64
    embedding_size: int = 128


QUICK = Size(
    identities=24,
    images=6,
    strangers=10,
    holdout=6,
    test_identities=20,
    test_pairs=100,
    pixels=32,
    epochs=1,
    batch_size=32,
    embedding_size=32,
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The demo's options."""
    parser.add_argument("--quick", action="store_true", help="a run of seconds: every part works, the numbers mean nothing")
    parser.add_argument("--identities", type=at_least(20), metavar="N", help=f"people to train on ({Size.identities})")
    parser.add_argument("--epochs", type=at_least(1), metavar="N", help=f"passes over their pictures ({Size.epochs})")
    parser.add_argument("--output", type=Path, default=Path("runs/demo"), metavar="FOLDER", help="folder to write to (%(default)s)")
    parser.add_argument("--seed", type=at_least(0), default=0, help="of people, weights and order (%(default)s)")
    parser.add_argument("--threads", type=at_least(0), default=0, help="of torch; 1 is faster on a busy machine, 0 is torch's choice (%(default)s)")
    json_option(parser, "finished, report, results of the trained and the untrained network, seconds; the log goes to standard error")


def size_of(options: argparse.Namespace) -> Size:
    """The size that the options ask for."""
    changes = {name: getattr(options, name) for name in ("identities", "epochs") if getattr(options, name) is not None}
    return dataclasses.replace(QUICK if options.quick else Size(), **changes)
