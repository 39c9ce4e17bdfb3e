"""A stand-in accelerator in pure Python: what goes wrong on a card goes wrong here.

    import standin
    standin.install()  # before anything looks for a device; for the whole process

Then PyTorch has an accelerator named `standin`, as others have `cuda` or `mps`. The
processor computes with its tensors, but

- an operation that meets a tensor of the processor too raises RuntimeError. Allowed
  are, as on a card, tensors without dimensions and positions that pick elements;
- `.numpy()` raises TypeError, and so does whatever needs it, such as plots;
- it has no float64 (TypeError), like Apple's GPUs; `install(float64=True)` allows it;
- it has random numbers of its own, which `torch.manual_seed` starts anew as well, and
  wants a generator of its own;
- a position out of range is a RuntimeError, since it stops a card, not an IndexError;
- a forked process cannot use it;
- `install(tf32=True)` rounds the factors of products and convolutions to ten bits, as
  recent cards of NVIDIA may.

How: a tensor of the device is a tensor of the processor under another label, over the
same memory (`relabel`). Every operation that PyTorch does not make out of others comes
to `compute`: it takes the labels off, lets the processor work and puts them on again.

It lacks what the book does not use: complex numbers, sparse and nested tensors, pinned
memory, autocast, figures of memory, kernels made by torch.compile (other backends of it
work), and functions in which PyTorch computes with float64 except on mps (quantile,
pinv, matrix_rank). Encoders take no fast path, as on mps.
"""

import contextlib
import ctypes
import functools
import os

import torch
from torch.utils import backend_registration
from torch.utils._pytree import tree_map_only

NAME = "standin"
CPU, DEVICE = 1, 12  # DLPack's numbers of the processor and of a device of one's own
PICKING = {"index", "index_put", "index_put_", "_index_put_impl_"}
FACTORS = {"mm": (0, 1), "bmm": (0, 1), "addmm": (1, 2), "baddbmm": (1, 2)}
FACTORS |= {"convolution": (0, 1), "convolution_backward": (0, 1, 2)}
aten = torch.ops.aten
settings, generators, kept = {}, {}, []
process, stream = os.getpid(), torch.Generator()
pointer = ctypes.pythonapi.PyCapsule_GetPointer
pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]


def relabel(tensor: torch.Tensor, kind: int) -> torch.Tensor:
    """The same memory as a tensor of the processor (CPU) or of the device (DEVICE)."""
    capsule = torch._C._to_dlpack(tensor.detach())
    address = pointer(capsule, b"dltensor") + ctypes.sizeof(ctypes.c_void_p)
    ctypes.c_int32.from_address(address).value = kind
    return torch._C._from_dlpack(capsule)


def to_cpu(value, pairs: list, mixed: bool = False, is_out: bool = False):
    """An argument for the processor; tensors of the device are noted with their alias.

    Unless mixed, tensors of the processor are refused, except for numbers.
    """
    if isinstance(value, list | tuple):
        return [to_cpu(v, pairs, mixed, is_out) for v in value]
    if not isinstance(value, torch.Tensor):
        return value
    if value.is_cpu:
        if value.dim() and not mixed:
            raise RuntimeError(
                "Expected all tensors to be on the same device, but found at least two "
                f"devices, {NAME}:0 and cpu!"
            )
        return value
    plain = relabel(value, CPU)
    if not value.numel() or (is_out and not value.dim()):  # it may get another size
        plain = plain.new_empty([*value.shape] or 0)
    pairs.append((value, plain))
    return plain


def to_device(value, pairs: list):
    """A result of the processor for the device; a known alias becomes its tensor."""
    if isinstance(value, list | tuple):
        return type(value)(to_device(v, pairs) for v in value)
    if not isinstance(value, torch.Tensor):
        return value
    for tensor, plain in pairs:
        if plain is value:
            return tensor
    if value.is_complex() or (value.dtype == torch.float64 and not settings["float64"]):
        raise TypeError(f"{NAME} has no {value.dtype}")
    return relabel(value, DEVICE)


@contextlib.contextmanager
def own_stream():
    """The processor's random numbers come from the device's stream."""
    before = torch.get_rng_state()
    torch.set_rng_state(stream.get_state())
    try:
        yield
    finally:
        stream.set_state(torch.get_rng_state())
        torch.set_rng_state(before)


def ten_bits(tensor: torch.Tensor) -> torch.Tensor:
    """Float32 numbers with ten bits behind the point instead of 23."""
    if tensor.dtype != torch.float32:
        return tensor
    return ((tensor.view(torch.int32) + 0x1000) & -0x2000).view(torch.float32)


@functools.cache
def traits(op) -> tuple:
    """What an operation's schema says: see `compute`, its only user."""
    name, arguments = op._schema.name.removeprefix("aten::"), op._schema.arguments
    random = torch.Tag.nondeterministic_seeded in op.tags
    outs = {a.name for a in arguments if a.is_out}
    tensors = [i for i, a in enumerate(arguments) if str(a.type) == "Tensor"]
    takes_numbers = torch._C._should_allow_numbers_as_tensors(name)
    return name, random, outs, [] if takes_numbers else tensors


def compute(op, *args, **kwargs):
    """Let the processor carry out an operation on tensors of the device."""
    if os.getpid() != process:
        raise RuntimeError(f"Cannot use {NAME} in a forked process")
    name, random, outs, tensors = traits(op)
    if op.is_view or name == "set_":  # no numbers change: this kernel suits any device
        keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
        return op.redispatch(keys, *args, **kwargs)
    pairs, picks = [], name in PICKING
    args = [to_cpu(a, pairs, mixed=picks and isinstance(a, list)) for a in args]
    kwargs = {k: to_cpu(v, pairs, is_out=k in outs) for k, v in kwargs.items()}
    for i, value in enumerate(args):
        if i in tensors and isinstance(value, int | float):
            args[i] = torch.tensor(value)
    generator = kwargs.get("generator")
    if generator and generator._cdata not in generators:
        raise RuntimeError(f"Expected a generator of {NAME}, found one of the cpu")
    if kwargs.get("device"):
        kwargs["device"] = "cpu"
    for i in FACTORS.get(name, ()) if settings["tf32"] else ():
        args[i] = ten_bits(args[i])
    try:
        with own_stream() if random else contextlib.nullcontext():
            result = op(*args, **kwargs)
    except IndexError as error:
        if "Dimension" in str(error):  # noticed before the card gets to work
            raise
        raise RuntimeError(f"Device-side assert: {error}") from None
    for tensor, plain in pairs:
        if plain.shape != tensor.shape:
            tensor.set_(relabel(plain, DEVICE))
        elif plain.data_ptr() != tensor.data_ptr():
            relabel(tensor, CPU).copy_(plain)
    return to_device(result, pairs)


def copy_from(source, target, non_blocking=False):
    """The one operation in which tensors of two devices meet."""
    source, plain = to_cpu([source, target], [], mixed=True)
    plain.copy_(source)
    return target


def convolution_backward(gradient, x, weight, *rest):
    op, bias_shape = aten.convolution_backward.default, [gradient.shape[1]]
    return compute(op, gradient, x, weight, bias_shape, *rest)


def recurrent(op, *args):
    """LSTM and GRU, packed or not, in one piece on the processor."""
    packed = op._overloadname == "data"  # its second argument stays on the processor
    to_cpu([a for i, a in enumerate(args) if not (packed and i == 1)], [])
    with own_stream():
        result = op(*tree_map_only(torch.Tensor, torch.Tensor.cpu, args))
    return tuple(tensor.to(NAME) for tensor in result)


class Generator(torch.Generator):
    """A generator of the processor, or of the device: then it is in the table."""

    def __new__(cls, device="cpu"):
        self = super().__new__(cls)
        self.place = torch.device(device)
        if self.place.type == NAME:
            generators[self._cdata] = self
        return self

    device = property(lambda self: self.place)


def new_storage(cls, *args, device=None, **kwargs):
    """The memory that `copy.deepcopy` and `torch.load` ask for."""
    if device is None or torch.device(device).type != NAME:
        return torch._C.StorageBase.__new__(cls, *args, device=device, **kwargs)
    return torch.empty(*args, dtype=torch.uint8, device=NAME).untyped_storage()


class Module(backend_registration._DummyBackendModule):
    """What PyTorch and notebooks ask of `torch.standin`."""

    device = contextlib.nullcontext

    def _is_in_bad_fork(self):
        return os.getpid() != process

    def manual_seed_all(self, seed):
        stream.manual_seed(seed)

    manual_seed = manual_seed_all

    def get_rng_state(self, device=NAME):
        return stream.get_state()

    def set_rng_state(self, new_state, device=NAME):
        stream.set_state(new_state)

    def synchronize(self, device=NAME):
        pass


def install(float64: bool = False, tf32: bool = False) -> None:
    """Make the stand-in this process's accelerator; it cannot be undone."""
    settings.update(float64=float64, tf32=tf32)
    backend_registration._setup_privateuseone_for_python_backend(NAME, Module())
    backend_registration._privateuse1_backend_name = ""  # no fast path for encoders
    torch._tensor_str.tensor_totype = torch.Tensor.float  # prints without float64
    torch.Generator, torch.UntypedStorage.__new__ = Generator, new_storage
    torch.accelerator.synchronize = lambda device=None: None
    everything = torch.library.Library("_", "IMPL")
    everything.fallback(compute, "PrivateUse1")
    kernels = torch.library.Library("aten", "IMPL")
    kept.extend([everything, kernels])  # a library ends with its object
    convolution = functools.partial(compute, aten.convolution.default)
    zeros = functools.partial(compute, aten.zeros.default)
    kernels.impl("_copy_from", copy_from, "PrivateUse1")
    kernels.impl("_efficientzerotensor", zeros, "PrivateUse1")
    kernels.impl("convolution_overrideable", convolution, "PrivateUse1")
    kernels.impl(
        "convolution_backward_overrideable", convolution_backward, "PrivateUse1"
    )
    for op in (aten.lstm.input, aten.lstm.data, aten.gru.input, aten.gru.data):
        for key in ("PrivateUse1", "AutogradPrivateUse1"):
            kernels.impl(op, functools.partial(recurrent, op), key)
