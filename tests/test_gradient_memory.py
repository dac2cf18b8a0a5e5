"""dW in memory that is used again: the same address, the same bits, and no gradient that somebody kept is ever written."""

from __future__ import annotations

import copy
import gc
import io
import multiprocessing
import pickle
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from routes import NATIVE, ROUTES, Route, each
from torch import Tensor

import recog_fast as rf
from recog_fast.ops._buffers import GradientBuffers

N, C, D = 6, 400, 24


@pytest.fixture(autouse=True)
def _compiled() -> Any:
    with NATIVE[0]():  # skips without the compiled kernels
        yield


def make_head(**options: Any) -> rf.MarginHead:
    torch.manual_seed(2)
    return rf.MarginHead(C, D, scale=16.0, **options)


def batch(seed: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(N, D, generator=g), torch.randint(0, C, (N,), generator=g)


def backward(head: rf.MarginHead, seed: int) -> None:
    x, labels = batch(seed)
    head(x, labels).backward()


def gradient(head: rf.MarginHead) -> Tensor:
    assert head.weight.grad is not None
    return head.weight.grad


def fresh_gradient(head: rf.MarginHead, seed: int) -> Tensor:
    """The gradient of a batch without any recycling: the loss of the same weight as a function."""
    w = head.weight.detach().clone().requires_grad_()
    x, labels = batch(seed)
    (d_w,) = torch.autograd.grad(rf.margin_softmax_loss(x, w, labels, scale=16.0), w)
    return d_w


@pytest.mark.parametrize("optimizer", ["AdamW", "SGD", "AdamW foreach", "SGD kept"])
def test_steps_use_one_address_and_keep_their_bits(optimizer: str) -> None:
    """weight.grad lies where it lay, and the weights are those of a head whose memory is released before every step."""
    set_to_none = optimizer != "SGD kept"
    heads = [make_head(), make_head()]
    options: dict[str, Any] = {"foreach": True} if "foreach" in optimizer else {}
    optimizers = [getattr(torch.optim, optimizer.split()[0])([h.weight], lr=0.1, **options) for h in heads]
    addresses = set()
    for step in range(5):
        for i, (head, its) in enumerate(zip(heads, optimizers, strict=True)):
            its.zero_grad(set_to_none=set_to_none)
            if i == 1:
                head.release_gradient_memory()
            backward(head, step)
            its.step()
        addresses.add(gradient(heads[0]).data_ptr())
        assert torch.equal(heads[0].weight, heads[1].weight)
    assert len(addresses) == 1


def poison(head: rf.MarginHead) -> None:
    """NaN in all memory the head keeps and nobody uses."""
    for buffer in head._gradients._kept:
        if buffer.free():
            buffer.memory.fill_(float("nan"))


@pytest.mark.parametrize("options", [{}, {"subcenters": 2}, {"sample_rate": 0.2}, {"sample_rate": 0.2, "unknown_weight": 0.1}], ids=str)
def test_what_lay_there_before_is_never_read(options: dict[str, Any]) -> None:
    results = []
    for poisoned in (False, True):
        head = make_head(**options, **({"sample_seed": 1} if options else {}))
        for step in range(3):
            head.weight.grad = None
            if poisoned:
                poison(head)
            x, labels = batch(step)
            labels[0] = -1
            head(x, labels).backward()
        results.append(gradient(head).clone())
    assert torch.equal(*results)
    assert bool(torch.isfinite(results[0]).all())


def test_accumulated_gradients_use_two_addresses() -> None:
    """Three backward passes a step: one buffer is weight.grad, the other the addend, and no other is made."""
    head = make_head()
    kept: set[int] = set()
    for step in range(4):
        head.weight.grad = None
        for micro in range(3):
            poison(head)
            backward(head, 3 * step + micro)
            kept |= {buffer.memory.data_ptr() for buffer in head._gradients._kept}
        expected = fresh_gradient(head, 3 * step) + fresh_gradient(head, 3 * step + 1) + fresh_gradient(head, 3 * step + 2)
        assert torch.equal(gradient(head), expected)
    assert len(kept) == 2
    assert head._gradients.nbytes == 2 * 4 * C * D


KEEP: dict[str, Callable[[Tensor], Any]] = {
    "tensor": lambda grad: grad,
    "view": lambda grad: grad[3:5],
    "detached": lambda grad: grad.detach(),
    "transposed": lambda grad: grad.t(),
    "numpy": lambda grad: grad.numpy(),
    "numpy view": lambda grad: grad.numpy()[::2],
    "storage": lambda grad: grad.untyped_storage(),
    "typed storage": lambda grad: grad.storage(),
    "dlpack": lambda grad: torch.utils.dlpack.to_dlpack(grad),
    "saved by autograd": lambda grad: torch.ones(C, D, requires_grad=True) * grad,
    "parameter": lambda grad: torch.nn.Parameter(grad),
    "memory of bytes": lambda grad: memoryview(grad.numpy()),
}


def seen(kept: Any) -> Tensor:
    """What whoever kept it sees."""
    if isinstance(kept, Tensor) and kept.grad_fn is not None:
        (leaf,) = [e[0].variable for e in kept.grad_fn.next_functions if e[0] is not None]
        return torch.autograd.grad(kept.sum(), leaf, retain_graph=True)[0].clone()
    if isinstance(kept, Tensor):
        return kept.detach().clone()
    if type(kept).__name__ == "PyCapsule":
        return torch.empty(0)
    if isinstance(kept, torch.UntypedStorage):
        return torch.empty(0).set_(kept).clone()
    if isinstance(kept, torch.TypedStorage):
        return torch.tensor(kept.tolist())
    import numpy as np

    return torch.from_numpy(np.array(kept))


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
@pytest.mark.parametrize("form", list(KEEP))
def test_a_gradient_somebody_kept_is_never_written(form: str) -> None:
    head = make_head()
    backward(head, 0)
    backward_address = gradient(head).data_ptr()
    kept = KEEP[form](gradient(head))
    before = seen(kept)
    for step in (1, 2, 3):
        head.weight.grad = None
        gc.collect()
        backward(head, step)
        assert gradient(head).data_ptr() != backward_address
        assert torch.equal(gradient(head), fresh_gradient(head, step))
        assert torch.equal(seen(kept), before)
    if form == "dlpack":
        kept = torch.utils.dlpack.from_dlpack(kept)
        assert torch.equal(kept, fresh_gradient(head, 0))
    address, head.weight.grad = gradient(head).data_ptr(), None
    del kept
    gc.collect()
    backward(head, 4)  # once it is dropped its memory serves again (or the newer one does)
    assert gradient(head).data_ptr() in (address, backward_address)


def test_hooks_see_and_may_keep_the_gradient() -> None:
    head = make_head()
    kept: list[Tensor] = []
    head.weight.register_hook(lambda grad: kept.append(grad))
    head.weight.register_post_accumulate_grad_hook(lambda w: kept.append(w.grad.detach()))  # type: ignore[union-attr]
    for step in range(4):
        head.weight.grad = None
        backward(head, step)
    for step in range(4):
        truth = fresh_gradient(head, step)
        assert torch.equal(kept[2 * step], truth) and torch.equal(kept[2 * step + 1], truth)
    head.weight.register_hook(lambda grad: 2 * grad)  # a hook may replace it
    head.weight.grad = None
    backward(head, 9)
    assert torch.equal(gradient(head), 2 * fresh_gradient(head, 9))


def test_autograd_grad_returns_memory_of_its_own() -> None:
    head = make_head()
    results = []
    for step in range(3):
        x, labels = batch(step)
        results.append(torch.autograd.grad(head(x, labels), head.weight)[0])
    for step in range(3):
        assert torch.equal(results[step], fresh_gradient(head, step))
    addresses = {result.data_ptr() for result in results}
    assert len(addresses) == 3
    results.clear()
    x, labels = batch(7)
    assert torch.autograd.grad(head(x, labels), head.weight)[0].data_ptr() in addresses


def test_two_losses_in_one_backward() -> None:
    head = make_head()
    for step in (0, 2, 4):
        head.weight.grad = None
        (x, a), (y, b) = batch(step), batch(step + 1)
        (head(x, a) + head(y, b)).backward()
        assert torch.allclose(gradient(head), fresh_gradient(head, step) + fresh_gradient(head, step + 1), rtol=1e-6, atol=1e-9)


def test_retained_graphs() -> None:
    head = make_head()
    x, labels = batch(0)
    loss = head(x, labels)
    loss.backward(retain_graph=True)
    kept, head.weight.grad = gradient(head), None
    loss.backward()
    assert torch.equal(gradient(head), kept)
    assert gradient(head).data_ptr() != kept.data_ptr()



def test_a_gradient_given_to_another_process_is_left_to_it() -> None:
    """share_memory_ moves the storage every tensor of it sees: another process may map it after all names here are gone."""
    head = make_head()
    backward(head, 0)
    address = gradient(head).share_memory_().data_ptr()
    total = gradient(head).double().sum().item()
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    gift = gradient(head)
    process = context.Process(target=_hold, args=(theirs, gift))
    process.start()
    assert ours.recv() == "mapped"
    del gift
    for step in (1, 2):
        head.weight.grad = None
        backward(head, step)
        assert gradient(head).data_ptr() != address
    ours.send("read")
    assert ours.recv() == total
    process.join()


def _hold(pipe: Any, shared: Tensor) -> None:
    pipe.send("mapped")
    pipe.recv()
    pipe.send(shared.double().sum().item())


def test_a_resized_storage_is_not_used() -> None:
    head = make_head()
    backward(head, 0)
    gradient(head).untyped_storage().resize_(0)  # what FSDP does to free it
    head.weight.grad = None
    backward(head, 1)
    assert torch.equal(gradient(head), fresh_gradient(head, 1))


def test_copies_and_saves_do_not_carry_the_memory() -> None:
    head = make_head()
    plain = len(pickle.dumps(make_head()))
    backward(head, 0)
    head.weight.grad = None
    assert head._gradients.nbytes == 4 * C * D
    assert len(pickle.dumps(head)) == plain
    file = io.BytesIO()
    torch.save(head.state_dict(), file)
    assert file.getbuffer().nbytes < 1.2 * 4 * C * D  # the weight alone
    for twin in (copy.deepcopy(head), pickle.loads(pickle.dumps(head))):
        assert twin._gradients.nbytes == 0
        backward(twin, 1)
        assert torch.equal(gradient(twin), fresh_gradient(head, 1))


def test_the_memory_can_be_released() -> None:
    head = make_head()
    backward(head, 0)
    kept, head.weight.grad = gradient(head), None
    truth = kept.clone()
    head.release_gradient_memory()
    assert head._gradients.nbytes == 0
    backward(head, 1)
    assert torch.equal(kept, truth)
    rf.HeadSGD(head, lr=0.1)  # makes no gradient
    assert head._gradients.nbytes == 0
    other = make_head()
    backward(other, 0)
    other.weight.grad = None
    other.to(torch.float64)
    assert other._gradients.nbytes == 0
    backward(other, 0)
    assert gradient(other).dtype == torch.float64


@each([r for r in ROUTES if r.backend == "reference"])
def test_the_reference_keeps_no_memory(route: Route) -> None:
    head = make_head().to(route.dtype)
    with route():
        backward(head, 0)
    assert head._gradients.nbytes == 0


def at_every_instruction(work: Callable[[int], bool], threads: int = 4) -> bool:
    """Runs work(0), work(1), ... at the same time, with as many switches between them as the interpreter makes."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(threads) as pool:
            return all(pool.map(work, range(threads)))
    finally:
        sys.setswitchinterval(interval)


def test_threads_get_memory_of_their_own() -> None:
    buffers, weight = GradientBuffers(), torch.empty(3, 4)

    def take(mine: int) -> bool:
        right = True
        for _ in range(2000):
            memory = buffers.take(weight).fill_(mine)
            right = right and bool((memory + 0 == mine).all()) and bool((memory == mine).all())
        return right

    assert at_every_instruction(take)


def test_threads_get_gradients_of_their_own() -> None:
    head = make_head()
    truth = [fresh_gradient(head, seed) for seed in range(4)]

    def work(first: int) -> bool:
        right = True
        for i in range(30):
            x, labels = batch((first + i) % 4)
            right = right and torch.equal(torch.autograd.grad(head(x, labels), head.weight)[0], truth[(first + i) % 4])
        return right

    assert at_every_instruction(work)


def test_weights_of_other_shapes_get_memory_of_their_own() -> None:
    buffers = GradientBuffers()
    first, second = torch.empty(4, 3), torch.empty(5, 2, 3)
    a = buffers.take(first)
    b = buffers.take(second)
    assert (a.shape, b.shape, b.stride()) == (first.shape, second.shape, second.stride())
    assert buffers.nbytes == 4 * 30
    address = b.data_ptr()
    del b
    assert buffers.take(second).data_ptr() == address
