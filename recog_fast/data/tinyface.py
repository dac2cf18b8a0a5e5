"""TinyFace's 1:N protocol files (QMUL; Cheng, Zhu, Gong, ACCV 2018): MATLAB v5, nested object arrays."""

from __future__ import annotations

import os

import numpy as np
from numpy.typing import NDArray


def read_tinyface(path: str | os.PathLike[str]) -> tuple[list[str], NDArray[np.int64]]:
    """File names and identity numbers (n,) int64 of `probe_img_ID_pairs.mat` or `gallery_match_img_ID_pairs.mat`.

    The file holds one `*_set` of names and one `*_ids` of numbers of the same length. Needs scipy.
    Raises ValueError naming the file for anything else.
    """
    import scipy.io  # type: ignore[import-untyped, unused-ignore]

    if not os.path.isfile(path):
        raise ValueError(f"read_tinyface: expected a .mat file, got {os.fspath(path)}, which is no file")
    try:
        with open(path, "rb") as file:
            content = scipy.io.loadmat(file)
        (name,) = (key for key in content if key.endswith("_set"))
        numbers = np.asarray(content[name.removesuffix("_set") + "_ids"])
        names = [str(np.asarray(cell).item()) for cell in content[name].ravel()]
        ids: NDArray[np.int64] = numbers.ravel().astype(np.int64)
        if len(names) != len(ids) or not np.array_equal(ids, numbers.ravel()):
            raise ValueError(f"{len(names)} names and {len(ids)} ids")
    except Exception as error:  # scipy's reader raises almost any type on a damaged file
        raise ValueError(
            f"read_tinyface: expected <name>_set and <name>_ids of one length in {os.fspath(path)}, "
            f"got {type(error).__name__}: {error}"
        ) from error
    return names, ids
