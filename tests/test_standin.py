"""The stand-in accelerator refuses what cards refuse, and computes as the processor."""

import contextlib
import copy
import functools
import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import grad, hessian, vmap
from torch.utils import backend_registration

pytestmark = pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this PyTorch has no devices written in Python",
)
NAME = "standin"


def install():
    import standin

    standin.install()


@functools.cache
def other_process() -> ProcessPoolExecutor:
    """A process that has a stand-in, since nothing can take it away again."""
    return ProcessPoolExecutor(1, get_context("spawn"), initializer=install)


def run(name: str, *args) -> None:
    globals()[name].__wrapped__(*args)


def with_standin(test):
    """Turn a test into one that runs in the process with a stand-in."""

    @functools.wraps(test)
    def outside(**fixtures):
        other_process().submit(run, test.__name__, *fixtures.values()).result()

    return outside


@contextlib.contextmanager
def setting(**changes):
    import standin

    before = standin.settings.copy()
    standin.settings.update(changes)
    yield
    standin.settings.update(before)


@with_standin
def test_it_is_the_accelerator():
    assert torch.accelerator.is_available()
    device = torch.accelerator.current_accelerator()
    assert device.type == NAME
    assert str(torch.ones(2, device=device)) == "tensor([1., 1.], device='standin:0')"


@with_standin
def test_tensors_of_two_devices_do_not_meet():
    x, plain, rows = torch.ones(2, 3).to(NAME), torch.ones(2, 3), torch.tensor([0, 1])
    for call in (
        lambda: x + plain,
        lambda: plain.add_(x),
        lambda: plain @ x.T,
        lambda: torch.cat([x, plain]),
        lambda: x.index_put_([rows], plain),
        lambda: plain[rows.to(NAME)],
        lambda: nn.Linear(3, 1).to(NAME)(plain),
        lambda: nn.LSTM(3, 1).to(NAME)(plain),
        lambda: nn.Embedding(2, 3).to(NAME)(rows),
        lambda: F.cross_entropy(x, rows),
    ):
        with pytest.raises(RuntimeError, match="same device"):
            call()


@with_standin
def test_numbers_and_positions_of_the_processor_are_allowed():
    x = torch.zeros(2, 3, device=NAME)
    x[torch.tensor([0, 1])] = torch.tensor(2.0)
    x[torch.tensor([True, False])] = 3.0
    x[1, :2] = torch.ones(2)  # copied
    x = x * torch.tensor(2.0, dtype=torch.float64) % 4
    assert x.tolist() == [[2, 2, 2], [2, 2, 0]]


@with_standin
def test_it_has_no_float64():
    for call in (
        lambda: torch.ones(2, device=NAME).double(),
        lambda: torch.ones(2, dtype=torch.float64, device=NAME),
        lambda: torch.ones(2, dtype=torch.float64).to(NAME),
    ):
        with pytest.raises(TypeError, match="float64"):
            call()
        with setting(float64=True):
            assert call().dtype == torch.float64


@with_standin
def test_numpy_does_not_take_its_tensors():
    with pytest.raises(TypeError, match="Tensor.cpu"):
        torch.ones(2, device=NAME).numpy()


@with_standin
def test_a_position_out_of_range_stops_a_card():
    with pytest.raises(RuntimeError, match="Device-side assert"):
        F.cross_entropy(torch.zeros(1, 2, device=NAME), torch.tensor([2], device=NAME))
    with pytest.raises(IndexError, match="Dimension"):
        torch.zeros(2, device=NAME).sum(dim=1)


@with_standin
def test_a_forked_process_cannot_use_it():
    x = torch.ones(2, device=NAME)
    child = os.fork()
    if not child:
        try:
            x + 1
        except RuntimeError:
            os._exit(7)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


@with_standin
def test_products_of_ten_bits():
    x = torch.tensor([[1 + 2**-10], [1 + 2**-12]], device=NAME)
    ones = torch.ones(1, 1, device=NAME)
    assert torch.equal(x @ ones, x)
    with setting(tf32=True):
        assert (x @ ones).tolist() == [[1 + 2**-10], [1]]


@with_standin
def test_its_random_numbers_are_its_own():
    torch.manual_seed(0)
    first, plain = torch.rand(3, device=NAME), torch.rand(3)
    torch.manual_seed(0)
    assert torch.equal(torch.rand(3), plain)
    state = torch.standin.get_rng_state()
    assert torch.equal(torch.rand(3, device=NAME), first)
    torch.standin.set_rng_state(state)
    assert torch.equal(torch.rand(3, device=NAME), first)
    generator = torch.Generator(NAME).manual_seed(0)
    assert torch.equal(torch.rand(3, device=NAME, generator=generator), first)
    with pytest.raises(RuntimeError, match="Expected a generator of standin"):
        torch.rand(3, device=NAME, generator=torch.Generator())


class Net(nn.Module):
    """A bit of everything."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4)
        self.lstm, self.gru = nn.LSTM(4, 8), nn.GRU(8, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 2))

    def forward(self, x):
        x = self.norm(self.conv(x)).relu().amax(dim=3).permute(2, 0, 1)
        x = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([6, 4, 1]))
        x, _ = nn.utils.rnn.pad_packed_sequence(self.lstm(x)[0])
        x = self.gru(x)[0].transpose(0, 1)
        return self.head(self.attention(x, x, x)[0].mean(dim=1))


@with_standin
def test_it_trains_as_the_processor_does():
    torch.manual_seed(0)
    inputs, labels = torch.randn(3, 1, 8, 8), torch.tensor([0, 1, 0])
    start = Net()
    states = []
    for device in ("cpu", NAME):
        net = copy.deepcopy(start).to(device)
        optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
        for _ in range(3):
            optimizer.zero_grad()
            logits = net(inputs.to(device))
            F.cross_entropy(logits, labels.to(device)).backward()
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
        states.append(copy.deepcopy(net).cpu().state_dict())
    torch.testing.assert_close(*states, atol=1e-3, rtol=0)
    moved = (states[0]["head.1.weight"] - start.head[1].weight).abs()
    assert moved.mean() > 0.01


@with_standin
def test_transforms_of_functions():
    def f(x):
        return (x**3).sum()

    x = torch.rand(2, 3)
    for call in (grad(f), hessian(f), vmap(grad(f))):
        torch.testing.assert_close(call(x.to(NAME)).cpu(), call(x))


@with_standin
def test_tensors_are_saved_and_loaded(tmp_path):
    x = torch.ones(2, 3, device=NAME)
    torch.save([x, x[1]], tmp_path / "x.pt")
    for place in (None, "cpu", NAME):
        whole, row = torch.load(tmp_path / "x.pt", map_location=place)
        assert whole.device.type == row.device.type == (place or NAME)
        row.zero_()  # the same memory
        assert whole.tolist() == [[1, 1, 1], [0, 0, 0]]
