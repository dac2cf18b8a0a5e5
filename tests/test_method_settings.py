"""What a method's name and the settings files fill in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from paths import ROOT

import recog_fast as rf
from recog_fast.training import loop
from recog_fast.training.config import TrainConfig, read_config
from recog_fast.training.methods import METHODS, apply_method


def test_a_method_fills_in_what_its_paper_says() -> None:
    plain = TrainConfig()
    assert apply_method(plain) == plain
    vpl = apply_method(TrainConfig(method="vpl"))
    assert vpl.memory == {"name": "VPL"} and not vpl.memory_momentum
    qaface = apply_method(TrainConfig(method="qaface"))
    assert qaface.memory == {"name": "QAFace"} and qaface.memory_momentum == 0.99
    uir = apply_method(TrainConfig(method="uir"))
    assert (uir.unknown_weight, uir.unlabelled_share) == (0.1, 0.25)
    ri = apply_method(TrainConfig(method="ri")).recognizability
    assert ri is not None and (ri.regression, ri.diversion, ri.attention, ri.tau, ri.beta) == (5, 2, 1, 2, 0.75)
    both = apply_method(TrainConfig(method="qaface+uir+ri", unknown_weight=0.0, memory={"tau": 1.0}))
    assert both.memory == {"name": "QAFace", "tau": 1.0} and both.unknown_weight == 0.0 and both.recognizability == ri
    assert apply_method(both) == both
    for name in METHODS:
        assert apply_method(TrainConfig(method=name)).method == name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "qaface+vpl"}, "each method once, and vpl or qaface"),
        ({"method": "uir+uir"}, "each method once"),
        ({"method": "qafase"}, "did you mean 'qaface'"),
        ({"method": "vpl", "memory": {"name": "QAFace"}}, "memory.name 'VPL' with method 'vpl', got 'QAFace'"),
    ],
)
def test_methods_that_do_not_go_together_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="^train: expected ") as error:
        apply_method(TrainConfig(**changes))
    assert message in str(error.value)


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_settings_file_reads_and_builds_its_head(file: Path) -> None:
    config = apply_method(read_config(file))
    head = loop.build_head(config, 50, 10)
    assert (head.memory is not None) == (config.memory is not None)


def test_settings_of_the_papers() -> None:
    qaface = apply_method(read_config(ROOT / "configs" / "qaface.yaml"))
    assert (qaface.num_epoch, qaface.lr_epochs, qaface.augment.crop, qaface.augment.low_resolution) == (
        24,
        [10, 16, 22],
        0.2,
        0.2,
    )
    head = loop.build_head(qaface, 100, steps_per_epoch=7)
    assert head.memory is not None
    assert head.memory.policy == rf.QAFace(tau=2.0, delta=1000, start=28)
    uir = apply_method(read_config(ROOT / "configs" / "uir.yaml"))
    assert (uir.unknown_weight, uir.unlabelled_share, uir.pretrained_head) == (0.1, 0.25, True)
    ri = read_config(ROOT / "configs" / "ri.yaml").recognizability
    assert ri is not None and (ri.regression, ri.diversion, ri.attention) == (5, 2, 1)
    vpl = loop.build_head(apply_method(read_config(ROOT / "configs" / "vpl.yaml")), 100)
    assert vpl.memory is not None and vpl.memory.policy == rf.VPL(0.17647, 200, 8000)
