"""The GEMMs of the chunk loop: IEEE float32 whatever torch's flags say, and the flags as they were."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import pytest
import torch

from recog_fast.ops._products import float32_product, ieee_float32, slab_products

MATMUL = torch.backends.cuda.matmul


def readable(read: Callable[[], object]) -> object:
    """The flag, or the first words of torch's complaint that its older and newer flags disagree."""
    try:
        return read()
    except RuntimeError as error:
        return str(error)[:40]


def flags() -> tuple[object, ...]:
    return (
        MATMUL.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision, torch.backends.fp32_precision, readable(lambda: MATMUL.allow_tf32),
        readable(torch.get_float32_matmul_precision), MATMUL.allow_bf16_reduced_precision_reduction,
    )  # fmt: skip


@pytest.fixture(autouse=True)
def _defaults() -> Iterator[None]:
    yield
    torch.set_float32_matmul_precision("highest")
    MATMUL.fp32_precision = torch.backends.mkldnn.matmul.fp32_precision = torch.backends.fp32_precision = "none"
    MATMUL.allow_bf16_reduced_precision_reduction = True


@pytest.mark.parametrize("general", ["none", "tf32"])
@pytest.mark.parametrize(("older", "newer", "reduced"), [*itertools.product(("highest", "high", "medium"), (None, "ieee", "tf32", "none"), (True, False))])
def test_flags_are_ieee_within_and_restored(older: str, newer: str | None, reduced: bool, general: str) -> None:
    """Every state the older and newer flags can be in, also those in which torch refuses to read one of them."""
    torch.backends.fp32_precision = general
    torch.set_float32_matmul_precision(older)
    if newer is not None:
        MATMUL.fp32_precision = newer
    MATMUL.allow_bf16_reduced_precision_reduction = reduced
    before = flags()
    with ieee_float32():
        assert (MATMUL.allow_tf32, MATMUL.fp32_precision) == (False, "ieee")
        assert not MATMUL.allow_bf16_reduced_precision_reduction
        with ieee_float32():  # nested
            pass
        assert MATMUL.fp32_precision == "ieee"
    assert flags() == before
    with pytest.raises(KeyError), ieee_float32():
        raise KeyError
    assert flags() == before


# slab: one of several, an exact divisor, more than there is, a column each
@pytest.mark.parametrize("slab", [5, 6, 100, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_slabs_add_up(slab: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    buffer = torch.randn(7, 32).to(dtype)
    a, b = buffer[:, :18], torch.randn(18, 11).to(dtype)
    parts = torch.cat(slab_products(a, b, slab))
    assert parts.shape == (-(-18 // slab), 7, 11) and parts.dtype == torch.float32
    assert (parts.double().sum(0) - a.double() @ b.double()).abs().max() <= 1e-5
    assert (parts[0].double() - a[:, :slab].double() @ b[:slab].double()).abs().max() <= 1e-5
    assert (float32_product(a, b).double() - a.double() @ b.double()).abs().max() <= 1e-5
