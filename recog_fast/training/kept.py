"""Lists of images to keep, as `recog-fast filter-overlap` writes them, and sources restricted to one."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset

from recog_fast.data.names import chosen_names


class Kept(Dataset[tuple[Any, int]]):
    """The images `indices` of a source, with its classes and labels."""

    def __init__(self, source: Any, indices: NDArray[np.int64]) -> None:
        self.source, self.indices, self.num_classes = source, indices, source.num_classes
        self.labels: NDArray[np.int64] = np.asarray(source.labels, dtype=np.int64)[indices]
        self.paths = chosen_names(source.paths, indices)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image, label = self.source[int(self.indices[index])]
        return image, label


def write_kept(path: str | Path, source: Any, indices: NDArray[np.int64], probabilities: NDArray[np.float64]) -> None:
    """One line {"path", "label": -1, "index", "p_max"} per kept image: a list `ListDataset` reads where the paths are files,
    and `read_kept` for any source. Written under another name and renamed."""
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(file.name + ".partial")
    with partial.open("w", encoding="utf-8") as out:
        names = source.paths
        for i, p in zip(indices.tolist(), probabilities.tolist(), strict=True):
            name = names[i]
            entry = {
                "path": os.path.abspath(name) if os.path.isfile(name) else name,
                "label": -1,
                "index": i,
                "p_max": round(p, 6),
            }
            out.write(json.dumps(entry) + "\n")
    partial.replace(file)


def read_kept(path: str | Path, source: Any) -> Kept:
    """`source` restricted to the list at `path`.

    Raises FileNotFoundError, and ValueError for a line that is no entry of such a list, an index beyond the source or a path
    that is another there (the list was made from something else), and for an empty list.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"train: no list of kept images {file}")
    names, indices = source.paths, []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        try:
            entry = json.loads(line)
            index, name = int(entry["index"]), str(entry["path"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"train: expected an entry of filter-overlap in line {number} of {file}, got {line!r:.80}"
            ) from error
        here = names[index] if 0 <= index < len(source) else None
        if here is None or os.path.basename(here) != os.path.basename(name):
            raise ValueError(
                f"train: expected {file} to be made from this source, got {name!r} as image {index} in line {number}, which is {here!r}"
            )
        indices.append(index)
    if not indices:
        raise ValueError(f"train: expected images in {file}, got an empty list")
    return Kept(source, np.array(indices, dtype=np.int64))
