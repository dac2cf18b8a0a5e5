"""Several threads and forked processes at once, and what can be copied, pickled and loaded: the same bits as alone."""

from __future__ import annotations

import concurrent.futures
import copy
import inspect
import io
import multiprocessing
import pickle
import queue
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import recog_fast as rf
from recog_fast import models
from recog_fast import recognizability as quality

N, C, D = 24, 800, 64  # N C D passes the size from which the kernels start threads of their own


def batch(seed: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(N, D, generator=g), torch.randint(0, C, (N,), generator=g)


HEADS: list[Callable[[], dict[str, Any]]] = [
    dict,
    lambda: {"margin": rf.AdaFace(), "unknown_weight": 0.1},
    lambda: {"margin": rf.CurricularFace(), "compute_dtype": torch.bfloat16},
    lambda: {"memory": rf.PrototypeMemory(C, D, rf.VPL(start=0))},
    lambda: {"memory": rf.PrototypeMemory(C, D, rf.QAFace(start=0))},
    lambda: {"subcenters": 2, "keep_exponentials": True},
    lambda: {"sample_rate": 0.2, "sample_seed": 3},
    lambda: {"weight_format": "split"},
]


def make_head(kind: int) -> rf.MarginHead:
    """The head of that kind, always with the same W."""
    g = torch.Generator().manual_seed(kind)
    options = {"sample_seed": 1, **HEADS[kind]()}
    head = rf.MarginHead(C, D, **options)
    shape = head.weight.shape
    values = 0.01 * torch.randn(shape, generator=g)
    if options.get("weight_format") == "split":
        head.copy_weight(values)
    else:
        head.weight.data.copy_(values)
        head.invalidate()
    return head


def train(head: rf.MarginHead, optimizer: rf.HeadSGD, seed: int, steps: int = 3) -> list[Tensor]:
    """Some steps; losses, gradients of the embeddings, nearest cosines, and the state left."""
    seen: list[Tensor] = []
    for step in range(steps):
        x, labels = batch(100 * seed + step)
        x.requires_grad_()
        optimizer.zero_grad()
        loss, stats = head(x, labels, keys=x.detach() if head.memory is not None else None, return_stats=True)
        loss.backward()
        optimizer.step()
        assert x.grad is not None
        seen += [loss.detach(), x.grad, stats.nearest_cosine, stats.nearest_index]
    return seen + [value.clone() for value in head.state_dict().values() if isinstance(value, Tensor)]


def work(kind: int) -> list[Tensor]:
    """One worker's whole training, from nothing."""
    head = make_head(kind)
    return train(head, rf.HeadSGD(head, lr=0.5), kind)


def equal(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return len(ours) == len(theirs) and all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_threads_of_python_at_once_give_the_bits_of_one_after_the_other() -> None:
    """Heads train, and one shared head answers, in eight threads that all start kernels' threads of their own."""
    alone = [work(kind) for kind in range(len(HEADS))]
    shared = make_head(0).eval()
    x, labels = batch(7)
    with torch.no_grad():
        answers = [*shared.topk(x, 5), shared.logits(x), shared(x, labels)]

    def ask(_: int) -> list[Tensor]:
        with torch.no_grad():
            return [*shared.topk(x, 5), shared.logits(x), shared(x, labels)]

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for _ in range(2):
            trained = [pool.submit(work, kind) for kind in range(len(HEADS))]
            asked = [pool.submit(ask, i) for i in range(12)]
            assert all(equal(f.result(timeout=120), alone[kind]) for kind, f in enumerate(trained))
            assert all(equal(f.result(timeout=120), answers) for f in asked)


def test_backends_of_threads_are_their_own() -> None:
    """use_backend in one thread leaves the others on the kernels; backward takes the backend of its forward."""
    barrier = concurrent.futures.ThreadPoolExecutor(2)
    ready: queue.Queue[str] = queue.Queue()
    leave: queue.Queue[str] = queue.Queue()

    def reference() -> str:
        with rf.ops.use_backend("reference"):
            ready.put("in")
            leave.get(timeout=60)
            return rf.backends()["cpu"]

    inside = barrier.submit(reference)
    ready.get(timeout=60)
    outside = barrier.submit(lambda: rf.backends()["cpu"]).result(timeout=60)
    leave.put("go")
    assert inside.result(timeout=60).startswith("reference")
    assert outside == rf.backends()["cpu"]
    barrier.shutdown()


def _bytes(tensors: list[Tensor]) -> list[bytes]:
    """Without a torch operation that could start threads."""
    return [t.view(torch.int16).numpy().tobytes() if t.dtype == torch.bfloat16 else t.numpy().tobytes() for t in tensors]


def _child(kinds: list[int], weight: Tensor, results: Any) -> None:
    # The kernels first, with threads of their own. torch's, an OpenMP pool, does not survive a fork: for it one thread, as data workers have.
    prototypes = torch.ops.recog_fast.effective_prototypes(weight, None, None, None, True)
    torch.set_num_threads(1)
    results.put([_bytes([prototypes]), *(_bytes(work(kind)) for kind in kinds)])


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_forked_processes_after_use_give_the_same_bits() -> None:
    """The kernels' threads end with each call, so a fork after one leaves no lock behind."""
    kinds, weight = [0, 2, 3], torch.randn(20_000, D)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        alone = [_bytes([rf.effective_prototypes(weight)]), *(_bytes(work(kind)) for kind in kinds)]
        context = multiprocessing.get_context("fork")
        results: Any = context.Queue()
        children = [context.Process(target=_child, args=(kinds, weight, results), daemon=True) for _ in range(2)]
        for child in children:
            child.start()
        try:
            found = [results.get(timeout=60) for _ in children]
        finally:
            for child in children:
                child.join(5)
                if child.is_alive():
                    child.kill()
    finally:
        torch.set_num_threads(before)
    assert found == [alone, alone]


class Scored(torch.utils.data.Dataset[Tensor]):
    """A dataset whose items use the operations, as a sampler of hard examples would."""

    def __init__(self) -> None:
        self.head = make_head(0).eval()

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Tensor:
        with torch.no_grad():
            loss: Tensor = self.head(*batch(index))
        return loss


def test_data_workers_use_the_operations() -> None:
    data = Scored()
    alone = [data[i] for i in range(len(data))]
    loader = torch.utils.data.DataLoader(data, batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=60)
    assert equal(list(loader), alone)


def modules() -> dict[str, Callable[[], nn.Module]]:
    """Every public class that is an nn.Module, and how one is made."""
    return {
        "AdaFace": rf.AdaFace, "InterclassFilter": lambda: rf.InterclassFilter(rf.AdaFace(), 0.3), "CurricularFace": rf.CurricularFace, "MarginHead": lambda: make_head(1),
        "MomentumEncoder": lambda: rf.MomentumEncoder(nn.Linear(4, 3)), "PrototypeMemory": lambda: filled_memory(),
        "IndexDiversionLoss": lambda: quality.IndexDiversionLoss(k=50), "RecognizabilityRegressor": lambda: quality.RecognizabilityRegressor(8),
        "PerceptibilityAttention": lambda: quality.PerceptibilityAttention(16, 2, 4),
        "RecognizabilityBranches": lambda: quality.RecognizabilityBranches((8, 2, 2), 4),
        "RecognizabilityModel": lambda: quality.RecognizabilityModel(nn.Identity(), quality.RecognizabilityBranches((8, 2, 2), 4)),
        "IResNet": lambda: models.IResNet(18, embedding_dim=4, input_size=16), "MobileFaceNet": lambda: models.MobileFaceNet(embedding_dim=4, input_size=16),
        "MobileNetV1": lambda: models.MobileNetV1(embedding_dim=4, input_size=16), "MobileNetV2": lambda: models.MobileNetV2(embedding_dim=4, input_size=16),
        "TinyNet": lambda: models.TinyNet(embedding_dim=4, input_size=16),
    }  # fmt: skip


def filled_memory() -> rf.PrototypeMemory:
    memory = rf.PrototypeMemory(C, D, rf.QAFace(start=0), capacity=60)
    for step in range(2):
        memory.write(3 * batch(step)[0], batch(step)[1], step)
    memory.flush()
    return memory


def test_every_public_module_is_copied_below() -> None:
    found = {n for m in (rf, quality, models) for n in m.__all__ if inspect.isclass(getattr(m, n)) and issubclass(getattr(m, n), nn.Module)}
    assert found - {"Backbone", "OnnxModel"} == set(modules())  # an abstract one, and one around a file


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in module.state_dict().items() if isinstance(value, Tensor)}


def outputs(module: nn.Module) -> list[Tensor]:
    """What it says to the same input, where it takes one."""
    module.eval()
    if isinstance(module, rf.MarginHead):
        with torch.no_grad():
            return [module(*batch(3)), module.logits(batch(3)[0])]
    if isinstance(module, rf.PrototypeMemory):
        return [*module.gather(torch.arange(C), 2), module.strength(2), module.rows()]
    if isinstance(module, models.Backbone):
        with torch.no_grad():
            return [module(torch.linspace(-1, 1, 2 * 3 * 16 * 16).reshape(2, 3, 16, 16))]
    if isinstance(module, rf.AdaFace | rf.CurricularFace | rf.InterclassFilter):
        return [module(torch.linspace(-0.5, 0.9, 8), torch.linspace(1, 30, 8))]
    return []


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "copy", "weights_only"])
@pytest.mark.parametrize("name", modules())
def test_copies_are_equal(name: str, way: str) -> None:
    torch.manual_seed(0)
    module = modules()[name]()
    if isinstance(module, rf.AdaFace | rf.CurricularFace | rf.InterclassFilter):
        module.train()
        module.update(torch.linspace(-0.2, 0.8, 6), torch.linspace(5, 20, 6), torch.ones(6, dtype=torch.bool))
    before = outputs(module)
    if way == "weights_only":
        file = io.BytesIO()
        torch.save(module.state_dict(), file)
        file.seek(0)
        twin = modules()[name]()
        twin.load_state_dict(torch.load(file, weights_only=True))
    else:
        make: Callable[[Any], Any] = {"deepcopy": copy.deepcopy, "copy": copy.copy, "pickle": lambda m: pickle.loads(pickle.dumps(m))}[way]
        twin = make(module)
    assert type(twin) is type(module)
    ours, theirs = state(module), state(twin)
    assert list(ours) == list(theirs) and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert equal(outputs(twin), before)
    if way != "copy":
        assert not {v.data_ptr() for v in ours.values() if v.numel()} & {v.data_ptr() for v in theirs.values() if v.numel()}, "memory of their own"


@pytest.mark.parametrize("kind", range(len(HEADS)))
def test_a_copied_head_goes_on_as_the_original(kind: int) -> None:
    """Head and optimizer pickled between steps: the next steps of both have the same bits."""
    head = make_head(kind)
    optimizer = rf.HeadSGD(head, lr=0.5)
    train(head, optimizer, 1)
    twin, its = pickle.loads(pickle.dumps((head, optimizer)))
    assert equal(train(twin, its, 2), train(head, optimizer, 2))
