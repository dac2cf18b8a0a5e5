"""Settings of a training run: plain frozen dataclasses, read from YAML and the command line by jsonargparse.

Names are InsightFace's (arcface_torch) where the meaning is the same.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from recog_fast.data import Augmentation
from recog_fast.data.formats import DRAWN, MIXED, training_kinds


@dataclass(frozen=True)
class DataConfig:
    """Where images come from. The number of classes is counted, never typed.

    `TrainConfig` raises the ValueError for what does not fit.
    """

    kind: str = "synthetic"  # rec, folder, list, zip, tar, synthetic, mixed, or a kind of `recog_fast.data.register_source`
    path: str = ""
    size: int = 112  # images are resized to size x size
    min_images: int = 1  # identities with fewer images are left out
    holdout_classes: float = (
        0.0  # share (< 1) or number of identities kept out of training, for the val target "holdout"
    )
    cache: bool = False  # decode and resize all images once, into memory
    max_corrupt: int = 100  # so many unreadable images are replaced and listed; one more ends the run
    # 0: images in any order. > 0: nearly in the order they are stored in, as a shuffle buffer of so many images gives (slow disks)
    shuffle_buffer: int = 0
    # Further arguments of the dataset; mixed: {sources: [{kind: ..., path: ...}, ...], share_classes: false, unlabelled: [1],
    # rows: [96, 32]}, where rows are so many of each batch from each source (batch_size in all), each with epochs of its own
    options: dict[str, Any] = field(default_factory=dict)
    keep: str = ""  # a list of `recog-fast filter-overlap`: only its images are used


@dataclass(frozen=True)
class RecognizabilityConfig:
    """The recognizability index (method ri): L = L_cls + regression L_L1 + diversion L_ID + attention L_MSE (math.md 4).

    A weight of 0 switches its term off. `TrainConfig` raises the ValueError for what does not fit.
    """

    regression: float = 5.0
    diversion: float = 2.0
    attention: float = 1.0
    tau: float = 2.0  # of the index diversion
    beta: float = 0.75  # of the smooth L1
    dropout: float = 0.0  # before the regression
    elements: Literal["mean", "sum"] = "mean"  # of the attention error; sum: as printed
    statistics: Literal["normal", "images"] = (
        "normal"  # mu, sigma of the diversion: of N(0, 1), or predicted for the UI images
    )
    ui: DataConfig | None = None  # unrecognizable faces; null: training images, severely corrupted
    ui_images: int = 1000  # at most so many of them
    clip_grad_norm: float = 5.0  # of these modules, apart from the backbone's: one common clip would starve it
    start: float = 0.0  # epochs before these terms count, for a run that does not start from a pretrained network


@dataclass(frozen=True)
class TrainConfig:
    """One training run; `recog-fast train --help-settings` lists the fields.

    Raises ValueError naming the setting, what was expected and what came.
    """

    # margin, vpl, qaface, uir, ri, or several joined by +: fills in what the method needs where it is null (methods.py)
    method: str = "margin"
    data: DataConfig = field(default_factory=DataConfig)
    unlabelled: DataConfig | None = None  # images of unknown people, with label -1
    # Share of each batch's rows that are unlabelled (UIR: 0.25); an epoch is then one pass over the labelled images.
    # 0: all images in one pool. null: as the method wants it.
    unlabelled_share: float | None = None
    augment: Augmentation = field(default_factory=Augmentation)

    pretrained: str = ""  # output folder, checkpoint or weights file to start from
    pretrained_head: bool = False  # the class centres too (same classes; from a run or checkpoint)
    network: str = "tiny"
    network_options: dict[str, Any] = field(default_factory=dict)
    embedding_size: int = 512
    margin: dict[str, Any] = field(
        default_factory=lambda: {"name": "ArcFace"}
    )  # name and parameters: {name: ArcFace, m: 0.5}
    margin_ramp: float = 0.0  # epochs over which the margin grows from 0 to full
    scale: float = 64.0
    subcenters: int = 1
    unknown_weight: float | None = None  # w of the UIR excess; null: as the method wants it (0.1), else 0
    unknown_start: float = 0.0  # epochs of supervised training alone before it counts
    sample_rate: float = 1.0  # share of the classes that are a step's negatives (Partial FC)
    unsampled: Literal["dense", "sparse"] = "dense"  # momentum and decay of the other classes; sparse (HeadSGD): left alone
    # Of the CPU kernels, and not exact: MarginHead's keep_exponentials (float32 is exact), drop_mass and drop_elements, one of them;
    # the log shows the share dropped.
    keep_exponentials: Literal["float32", "bfloat16"] | None = None
    drop_mass: float = 0.0
    drop_elements: float = 0.0
    # Prototype memory: {name: VPL | QAFace, start_epoch: 4, capacity: 4096, ...}; start_epoch is `start` in epochs,
    # capacity by default what can be valid at once: min(C, delta * rows of a step).
    memory: dict[str, Any] | None = None
    memory_momentum: float | None = (
        None  # > 0: memory keys come from a momentum encoder with this gamma; null: the method's
    )
    recognizability: RecognizabilityConfig | None = None

    batch_size: int = 128  # rows of one forward over all ranks (torchrun): a run is the same for any number of them
    gradient_acc: int = 1  # one step sees batch_size * gradient_acc images
    drop_last: bool = True  # the images of an epoch that fill no step; false: a shorter last step
    num_epoch: int = 20
    max_steps: int = 0  # end (the schedule too) after this many steps whatever num_epoch says; 0: no limit
    optimizer: Literal["sgd", "adamw"] = "sgd"
    head_optimizer: Literal["headsgd", "sgd", "adamw"] = "headsgd"
    weight_format: Literal["float32", "split"] = "float32"  # of the head; split and bfloat16 momentum (6 bytes per element) are HeadSGD's
    momentum_dtype: Literal["float32", "bfloat16"] = "float32"
    lr: float = 0.1
    head_lr: float | None = None  # null: lr
    momentum: float = 0.9
    weight_decay: float = 5e-4
    head_weight_decay: float | None = None  # null: weight_decay
    lr_schedule: Literal["polynomial", "polynomial_smooth", "cosine", "multistep"] = "polynomial"
    warmup_epoch: float = 0.0
    lr_epochs: list[float] = field(default_factory=list)  # multistep: after these epochs ...
    lr_gamma: float = 0.1  # ... the rate is multiplied by this
    clip_grad_norm: float = 5.0  # of the backbone; 0: no clipping
    nonfinite: Literal["raise", "skip"] = "raise"

    device: str = "auto"
    # auto: bf16 autocast on CUDA, float32 on the CPU; fp16: with a gradient scaler (not with head_optimizer headsgd)
    precision: Literal["auto", "float32", "bf16", "fp16"] = "auto"
    # Over several ranks the head's classes are spread; the backbone: a copy each (ddp), or its weights spread too (fsdp2)
    parallel: Literal["ddp", "fsdp2"] = "ddp"
    sync_batchnorm: bool = False  # batch statistics of all ranks' rows instead of each rank's own
    timeout: float = 600.0  # seconds a rank waits for another in a step or a save before the run ends with an error
    num_workers: int = 2
    num_threads: int = 0  # of torch on the CPU; 0: torch's own choice
    seed: int = 2048

    val_targets: list[str] = field(default_factory=list)  # .bin files, or "holdout", or "synthetic"
    val_sizes: list[int] = field(default_factory=list)  # also verify with images taken down to these sizes and up again
    val_pairs: int = 3000  # pairs drawn for "holdout" and "synthetic"
    verbose: int = 0  # steps between verifications; 0: once per epoch
    frequent: int = 10  # steps between log lines
    output: str = "runs/train"
    save_interval: int = 0  # steps between checkpoints; 0: once per epoch
    keep_last: int = 2
    async_save: bool = False  # checkpoints are written by a thread while training goes on; costs a copy in memory
    resume: bool = False
    report: bool = True  # `recog-fast train` measures the finished network and writes output/report.html

    def __post_init__(self) -> None:
        _check(self)


def read_config(
    path: str | Path, overrides: Sequence[str] = (), changes: Mapping[str, Any] | None = None
) -> TrainConfig:
    """The settings in a YAML file, or in an arcface_torch recipe (.py), with `changes` ({"data.size": 56}), then `--key value`
    overrides (nested: `--data.size 56`) on top.

    Raises FileNotFoundError, and ValueError naming an unknown key (and its nearest match) or a value of the wrong type.
    """
    import yaml

    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"train: no settings file {file}")
    if file.suffix == ".py":  # read, never run
        from recog_fast.compat.recipe import read_recipe, recipe_settings

        return _resolve(recipe_settings(read_recipe(file)).settings, file, overrides, changes)
    try:
        values = yaml.safe_load(file.read_text()) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"train: {file} is no valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ValueError(f"train: expected {file} to hold keys and values, got {type(values).__name__}")
    return _resolve(values, file, overrides, changes)


def _resolve(values: dict[str, Any], file: Path, overrides: Sequence[str], changes: Mapping[str, Any] | None) -> TrainConfig:
    for key, value in (changes or {}).items():
        place = values
        *above, last = key.split(".")
        for name in above:
            if not isinstance(place.get(name), dict):
                place[name] = {}
            place = place[name]
        place[last] = value
    _refuse_unknown(values, TrainConfig, str(file))
    for argument in overrides:
        if argument.startswith("--"):
            _refuse_unknown(_nested(argument[2:].split("=", 1)[0].rstrip("+")), TrainConfig, "the command line")
    return _parse(values, overrides, str(file))


def to_yaml(config: TrainConfig) -> str:
    """The resolved settings as YAML that `read_config` reads back to an equal object."""
    import yaml

    plain = dataclasses.asdict(config)
    plain["augment"] = {k: list(v) if isinstance(v, tuple) else v for k, v in plain["augment"].items()}
    text: str = yaml.safe_dump(plain, sort_keys=False, default_flow_style=None, width=120)
    return text


def help_text() -> str:
    """All settings with type and default, as jsonargparse prints them."""
    text: str = _parser().format_help()
    return text


def setting_names() -> list[str]:
    """All settings as the command line spells them: lr, data.kind, ..."""

    def names(kind: type, prefix: str) -> list[str]:
        nested = _NESTED.get(kind, {})
        found = []
        for one in dataclasses.fields(kind):
            found.append(prefix + one.name)
            found += names(nested[one.name], f"{prefix}{one.name}.") if one.name in nested else []
        return found

    return names(TrainConfig, "")


def _parser() -> Any:
    import jsonargparse

    parser = jsonargparse.ArgumentParser(
        prog="recog-fast train CONFIG.yaml", exit_on_error=False, usage="%(prog)s [--key value ...]"
    )
    parser.add_class_arguments(TrainConfig, as_group=False)
    return parser


def _parse(values: Mapping[str, Any], overrides: Sequence[str], source: str) -> TrainConfig:
    parser = _parser()
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            base = parser.parse_object(dict(values))
            merged = parser.parse_args(list(overrides), namespace=base) if overrides else base
            # The older name of the same method, before jsonargparse 4.49.
            instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes
            fields = instantiate(merged)
    except (Exception, SystemExit) as error:  # jsonargparse has no one error class; all of them mean "bad settings"
        if isinstance(error, ValueError) and str(error).startswith("train:"):
            raise
        raise ValueError(f"train: {source}: {' '.join(str(error).split())}") from error
    return TrainConfig(**{f.name: fields[f.name] for f in dataclasses.fields(TrainConfig)})


_NESTED: dict[type, dict[str, type]] = {
    TrainConfig: {
        "data": DataConfig,
        "unlabelled": DataConfig,
        "augment": Augmentation,
        "recognizability": RecognizabilityConfig,
    },
    RecognizabilityConfig: {"ui": DataConfig},
}


def _nested(dotted: str) -> dict[str, Any]:
    head, _, rest = dotted.partition(".")
    return {head: _nested(rest) if rest else None}


def _refuse_unknown(values: Mapping[str, Any], kind: type, source: str, prefix: str = "") -> None:
    """Free dicts (margin, options) are checked by whoever receives them; dataclass levels are checked here."""
    nested = _NESTED.get(kind, {})
    known = [f.name for f in dataclasses.fields(kind)]
    for key, value in values.items():
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"; did you mean {prefix + near[0]!r}?" if near else f"; known keys: {', '.join(known)}"
            raise ValueError(f"train: unknown key {prefix + str(key)!r} in {source}{hint}")
        if key in nested and isinstance(value, Mapping):
            _refuse_unknown(value, nested[key], source, f"{prefix}{key}.")


def _check(config: TrainConfig) -> None:
    at_least = {
        "batch_size": 1, "gradient_acc": 1, "num_epoch": 1, "embedding_size": 1, "subcenters": 1, "keep_last": 1, "frequent": 1, "val_pairs": 20,
        "max_steps": 0, "num_workers": 0, "num_threads": 0, "verbose": 0, "save_interval": 0, "seed": 0,
        "lr": 0, "momentum": 0, "weight_decay": 0, "warmup_epoch": 0, "margin_ramp": 0, "clip_grad_norm": 0, "unknown_weight": 0,
        "unknown_start": 0,
    }  # fmt: skip
    for name, low in at_least.items():
        value = getattr(config, name)
        if value is not None and not value >= low:
            raise ValueError(f"train: expected {name} >= {low}, got {value}")
    for name in ("unlabelled_share", "memory_momentum"):
        value = getattr(config, name)
        if value is not None and not 0 <= value < 1:
            raise ValueError(f"train: expected {name} in [0, 1) or null, got {value}")
    sources = [("data", config.data), ("unlabelled", config.unlabelled)]
    if config.recognizability is not None:
        _check_recognizability(config.recognizability)
        sources.append(("recognizability.ui", config.recognizability.ui))
    for label, data in sources:
        if data is not None:
            _check_kind(label, data.kind)
        if data is not None and data.kind not in (DRAWN, MIXED) and not data.path:
            raise ValueError(f"train: expected {label}.path with {label}.kind = {data.kind!r}, got none")
        if data is not None and (data.size < 8 or min(data.min_images - 1, data.holdout_classes, data.max_corrupt, data.shuffle_buffer) < 0):
            raise ValueError(
                f"train: expected {label}.size >= 8, min_images >= 1, holdout_classes >= 0, max_corrupt >= 0 and shuffle_buffer >= 0, got {data}"
            )
    for name in ("drop_mass", "drop_elements"):
        if not 0 <= getattr(config, name) < 1:
            raise ValueError(f"train: expected {name} in [0, 1), got {getattr(config, name)}")
    for name in ("weight_format", "momentum_dtype"):
        if getattr(config, name) != "float32" and config.head_optimizer != "headsgd":
            raise ValueError(f"train: expected head_optimizer 'headsgd' with {name} = {getattr(config, name)!r}, got {config.head_optimizer!r}")
    if not 0 < config.sample_rate <= 1:
        raise ValueError(f"train: expected sample_rate in (0, 1], got {config.sample_rate}")
    if config.head_optimizer != "headsgd" and config.unsampled == "sparse":
        raise ValueError(f"train: expected head_optimizer 'headsgd' with unsampled 'sparse', got {config.head_optimizer!r}")
    if config.head_optimizer == "headsgd" and config.precision == "fp16":
        raise ValueError("train: expected head_optimizer sgd or adamw with precision fp16 (HeadSGD has no gradient to unscale; bf16 needs no scaler), got 'headsgd'")
    if not config.timeout > 0:
        raise ValueError(f"train: expected timeout > 0 seconds, got {config.timeout}")
    if not config.scale > 0:
        raise ValueError(f"train: expected scale > 0, got {config.scale}")
    if not config.warmup_epoch < config.num_epoch:
        raise ValueError(f"train: expected warmup_epoch < num_epoch, got {config.warmup_epoch} and {config.num_epoch}")
    if "holdout" in config.val_targets and not config.data.holdout_classes:
        raise ValueError("train: expected data.holdout_classes > 0 with the val target 'holdout', got 0")


def _check_kind(label: str, kind: str) -> None:
    known = training_kinds()
    if kind not in known:
        near = difflib.get_close_matches(kind, known, n=1)
        raise ValueError(f"train: expected {label}.kind in {', '.join(known)}, got {kind!r}" + (f"; did you mean {near[0]!r}?" if near else ""))


def _check_recognizability(config: RecognizabilityConfig) -> None:
    for name in ("regression", "diversion", "attention", "tau", "clip_grad_norm", "start"):
        if not getattr(config, name) >= 0:
            raise ValueError(f"train: expected recognizability.{name} >= 0, got {getattr(config, name)}")
    if config.ui_images < 2:
        raise ValueError(f"train: expected recognizability.ui_images >= 2, got {config.ui_images}")
