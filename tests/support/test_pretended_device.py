"""The pretended device refuses what CUDA refuses, sees what makes the host wait, and has the CPU's numbers."""

import copy
import gc
import threading
from collections.abc import Callable
from typing import Any

import accelerate
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from support.pretended_device import PretendedDevice
from support.pretended_device import pretended_cuda as pretended

HERE = "support/test_pretended_device.py"
MIXED = "all tensors to be on the same device"


@pytest.fixture
def device(pretended_cuda: PretendedDevice) -> PretendedDevice:
    return pretended_cuda


def rows() -> torch.Tensor:
    return torch.arange(6.0).reshape(2, 3)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def trained(model: nn.Module, device: str, **options: Any) -> dict[str, torch.Tensor]:
    """State of the network after three steps, in main memory."""
    model, inputs = model.to(device), rows().to(device)
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.1, **options)
    for _ in range(3):
        with torch.autocast(device, torch.bfloat16):
            loss = model(inputs).float().square().sum()
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
    return {name: tensor.cpu() for name, tensor in model.state_dict().items()}


# refused


REFUSED: dict[str, Callable[[torch.Tensor, torch.Tensor], Any]] = {
    "a sum": lambda x, g: g + x,
    "a product": lambda x, g: x @ g.T,
    "a sum in place": lambda x, g: x.add_(g),
    "a layer": lambda x, g: functional.linear(g, x),
    "a concatenation": lambda x, g: torch.cat([g, x]),
    "a stack of numbers": lambda x, g: torch.stack([g.sum(), x.sum()]),
    "a choice": lambda x, g: torch.where(g > 0, g, x),
    "a loss": lambda x, g: functional.mse_loss(g, x),
    "values that are set": lambda x, g: g.index_put_((torch.tensor([0]),), x[0]),
    "under inference mode": torch.inference_mode()(lambda x, g: functional.linear(g, x)),
    "inside a function of torch": lambda x, g: torch.einsum("ij,kj->ik", g, x),
}


@pytest.mark.parametrize("mixed", REFUSED.values(), ids=REFUSED)
def test_devices_do_not_mix(device: PretendedDevice, mixed: Callable[[torch.Tensor, torch.Tensor], Any]) -> None:
    with pytest.raises(RuntimeError, match=MIXED):
        mixed(rows(), rows().cuda())


def test_an_index_on_the_device_does_not_read_main_memory(device: PretendedDevice) -> None:
    with pytest.raises(RuntimeError, match="indices should be either on cpu or on the same device"):
        rows()[torch.tensor([0], device="cuda")]


def test_a_network_that_is_half_moved_fails_and_one_wholly_moved_does_not(device: PretendedDevice) -> None:
    model = network()
    weight = model[0].weight
    model[0].to("cuda")
    with pytest.raises(RuntimeError, match=MIXED):
        model(rows().cuda())
    assert model.to("cuda")(rows().cuda()).is_cuda
    assert model[0].weight is weight and isinstance(weight, nn.Parameter)
    model.to("cpu")
    assert model[0].weight is weight and model(rows()).device.type == "cpu"


def test_numpy_does_not_read_the_device(device: PretendedDevice) -> None:
    for read in (torch.Tensor.numpy, np.asarray):
        with pytest.raises(TypeError, match="can't convert cuda:0"):
            read(rows().cuda())
    assert np.array_equal(rows().cuda().cpu().numpy(), rows().numpy())


def test_a_generator_of_the_cpu_does_not_serve_the_device(device: PretendedDevice) -> None:
    with pytest.raises(RuntimeError, match="Expected a 'cuda' device type for generator"):
        torch.randperm(3, device="cuda", generator=torch.Generator())
    assert torch.randperm(3, device="cuda", generator=torch.Generator("cuda")).is_cuda


def test_one_number_in_main_memory_mixes_and_waits_for_nothing(device: PretendedDevice) -> None:
    moved = rows().cuda()
    device.forget()
    assert torch.equal((moved * torch.tensor(2.0)).plain, rows() * 2)
    assert device.waits == device.copies == []


# waits


WAITING: dict[str, Callable[[torch.Tensor], Any]] = {
    "item": lambda g: g[0, 0].item(),
    "float": lambda g: float(g[0, 0]),
    "a condition": lambda g: bool(g.sum() > 0),
    "an index": lambda g: [0, 1][g[0, 1].long()],
    "tolist": lambda g: g.tolist(),
    "cpu": lambda g: g.cpu(),
    "to": lambda g: g.to("cpu", torch.float64),
    "numpy by force": lambda g: g.numpy(force=True),
    "nonzero": lambda g: g.nonzero(),
    "where": lambda g: torch.where(g > 0),
    "a mask": lambda g: g[g > 0],
    "an array as index": lambda g: g[np.array([0])],
    "a list as index": lambda g: g[:, [0, 2]],
    "an index in main memory": lambda g: g[torch.tensor([0])],
    "unique": lambda g: g.unique(),
    "equal": lambda g: torch.equal(g, g),
    "allclose": lambda g: torch.allclose(g, g),
    "repeats": lambda g: torch.repeat_interleave(g, torch.ones(2, dtype=torch.long, device="cuda"), 0),
    "a matrix made of a list": lambda g: torch.tensor([1.0, 2.0], device=g.device),
    "a matrix made of an array": lambda g: torch.as_tensor(np.ones(3), device="cuda"),
    "pageable memory": lambda g: torch.ones(3).to("cuda", non_blocking=True),
    "a blocking copy": lambda g: torch.ones(3).pin_memory().to("cuda"),
    "copy_": lambda g: g[0].copy_(torch.ones(3)),
    "eigenvectors": lambda g: torch.linalg.eigh(g.T @ g),
    "cholesky": lambda g: torch.linalg.cholesky(torch.eye(2, device="cuda")),
    "synchronize": lambda g: torch.cuda.synchronize(),
    "under inference mode": torch.inference_mode()(lambda g: g.max().item()),
}


@pytest.mark.parametrize("wait", WAITING.values(), ids=WAITING)
def test_waits_are_counted_with_their_place(device: PretendedDevice, wait: Callable[[torch.Tensor], Any]) -> None:
    moved = rows().cuda()
    device.forget()
    wait(moved)
    assert len(device.waits) == len(device.waits_in(HERE)) >= 1
    assert device.waits[0].place in device.by_place()


AHEAD: dict[str, Callable[[torch.Tensor], Any]] = {
    "arithmetic": lambda g: (g - g.mean(0)) / g.std(0) @ g.T.softmax(-1),
    "what the device makes": lambda g: torch.zeros(3, device="cuda") + torch.arange(3, device="cuda") + g.new_ones(3),
    "an index on the device": lambda g: g[torch.arange(1, device="cuda")],
    "a number where a mask is": lambda g: g.clone().__setitem__(g > 0, 0.0),
    "slices": lambda g: g[:1, 1:].contiguous().to(torch.float16),
    "a random order": lambda g: g[torch.randperm(2, device=g.device)],
    "functions that torch composes": lambda g: functional.one_hot(g.long(), 6).float().sum().add(functional.gelu(g)),
    "pinned memory": lambda g: torch.ones(3).pin_memory().to("cuda", non_blocking=True),
    "a slice of pinned memory": lambda g: torch.empty(3, pin_memory=True)[1:].cuda(non_blocking=True),
    "a copy that is waited for later": lambda g: g.to("cpu", non_blocking=True),
}


@pytest.mark.parametrize("ahead", AHEAD.values(), ids=AHEAD)
def test_what_needs_no_answer_waits_for_nothing(device: PretendedDevice, ahead: Callable[[torch.Tensor], Any]) -> None:
    moved = rows().cuda()
    device.forget()
    ahead(moved)
    assert device.waits == []


def test_copies_say_their_way_size_and_memory(device: PretendedDevice) -> None:
    moved = rows().pin_memory().to("cuda", non_blocking=True)
    rows().to("cuda")
    moved.cpu()
    assert [(c.way, c.pinned, c.blocking, c.n_bytes) for c in device.copies_in(HERE)] == [
        ("to device", True, False, 24),
        ("to device", False, True, 24),
        ("to host", False, True, 24),
    ]
    assert len(device.copies_in(way="to host")) == 1


def test_a_copy_that_nobody_waited_for_has_no_numbers_yet(device: PretendedDevice) -> None:
    event = torch.cuda.Event()
    copied = rows().cuda().to("cpu", non_blocking=True)
    event.record()
    assert copied.isnan().all()
    event.synchronize()
    assert torch.equal(copied, rows())


def test_pinned_memory_must_not_change_while_it_is_copied(device: PretendedDevice) -> None:
    pinned = rows().pin_memory()
    pinned.to("cuda", non_blocking=True)
    torch.cuda.synchronize()
    pinned.zero_()  # the copy is over
    pinned.to("cuda", non_blocking=True)
    pinned.fill_(1)
    with pytest.raises(RuntimeError, match="written over while it was copied"):
        torch.cuda.synchronize()


# the CPU's numbers


@pytest.mark.parametrize("options", [{"fused": True}, {"foreach": True}, {"foreach": False}], ids=str)
def test_a_training_ends_as_on_the_cpu(device: PretendedDevice, options: dict[str, bool]) -> None:
    expected, found = (trained(network(), where, **options) for where in ("cpu", "cuda"))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_step_of_training_waits_for_nothing(device: PretendedDevice) -> None:
    model, inputs = network().to("cuda"), rows().cuda()
    optimiser = torch.optim.AdamW(model.parameters(), fused=True)
    device.forget()
    for _ in range(2):
        model(inputs).square().mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
    assert device.waits == []


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_accelerate_trains_on_it(device: PretendedDevice, precision: str) -> None:
    AcceleratorState._reset_state(True)
    accelerator = accelerate.Accelerator(mixed_precision=precision)
    model = network()
    model, optimiser = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
    before = model[0].weight.detach().clone()
    for _ in range(8):  # in float16 the first steps find a scale
        accelerator.backward(model(rows().cuda()).square().mean())
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
    assert accelerator.device.type == "cuda" and not torch.equal(model[0].weight, before)


def test_a_scaler_of_gradients_scales_down_after_infinity(device: PretendedDevice) -> None:
    model, scaler = network().to("cuda"), torch.amp.GradScaler("cuda")
    optimiser = torch.optim.AdamW(model.parameters(), fused=True)
    before = copy.deepcopy(model)
    scaler.scale(model(rows().cuda() * torch.inf).sum()).backward()
    scaler.step(optimiser)
    scaler.update()
    assert scaler.get_scale() == 2.0**15
    assert all(torch.equal(a, b) for a, b in zip(before.parameters(), model.parameters(), strict=True))


def test_gradients_are_those_of_the_cpu_through_copies_and_recomputation(device: PretendedDevice) -> None:
    def gradient(where: str) -> torch.Tensor:
        weights = torch.ones(3, 2, requires_grad=True)
        there = weights.to(where) * 2
        checkpoint(lambda w: (rows().to(where) @ w).sigmoid(), there, use_reentrant=False).cpu().sum().backward()
        return weights.grad

    assert torch.equal(gradient("cuda"), gradient("cpu"))


def test_a_copy_of_a_network_is_its_own(device: PretendedDevice) -> None:
    model = network().to("cuda")
    copied = copy.deepcopy(model)
    with torch.no_grad():
        copied[0].weight.zero_()
    assert isinstance(copied[0].weight, nn.Parameter) and copied[0].weight.is_cuda
    assert model[0].weight.abs().sum() > 0


def test_threads_that_start_meanwhile_know_the_device(device: PretendedDevice) -> None:
    made: list[torch.Tensor] = []
    thread = threading.Thread(target=lambda: made.append(torch.ones(2).to("cuda")))
    thread.start()
    thread.join()
    assert made[0].is_cuda


# memory


def test_memory_is_that_of_the_tensors_there_are(device: PretendedDevice) -> None:
    free, total = torch.cuda.mem_get_info()
    held = torch.zeros(1000, device="cuda")
    part, doubled = held[:10], held * 2
    assert device.allocated == 8000 and torch.cuda.mem_get_info() == (free - 8000, total)
    del held, doubled
    gc.collect()
    assert device.allocated == 4000 and device.peak == 8000 and len(part) == 10


def test_an_allocation_beyond_the_memory_fails_and_a_smaller_one_does_not(device: PretendedDevice) -> None:
    device.limit_memory(10_000, others=4_000)
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        torch.zeros(2000, device="cuda")
    assert torch.zeros(1000, device="cuda").sum() == 0


def test_allocations_fail_as_often_as_a_test_asks(device: PretendedDevice) -> None:
    device.refuse_memory(larger_than=1000, times=2)
    for _ in range(2):
        assert torch.zeros(10, device="cuda").is_cuda
        with pytest.raises(torch.OutOfMemoryError):
            torch.zeros(1000, device="cuda")
    assert torch.zeros(1000, device="cuda").is_cuda


def test_afterwards_all_is_as_before() -> None:
    names = ("is_available", "mem_get_info", "Stream", "synchronize")
    before = [getattr(torch.cuda, name) for name in names] + [torch.Generator, threading.Thread.run]
    with pytest.raises(KeyError), pretended():
        raise KeyError
    assert [getattr(torch.cuda, name) for name in names] + [torch.Generator, threading.Thread.run] == before
    assert type(torch.ones(2).to("cpu")) is torch.Tensor
