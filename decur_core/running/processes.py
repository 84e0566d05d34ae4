"""Several processes that compute what one process with the same global batch computes.

Process r of w holds samples r * n to (r + 1) * n of w * n. In a process of its own no function here changes a bit.
"""

import contextlib
import ctypes
import inspect
import os
import signal
import sys
import traceback
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from datetime import timedelta
from logging import CRITICAL, getLogger
from types import SimpleNamespace
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from decur_core import losses
from decur_core.config import ConfigError
from decur_core.running import tie

asked = ctypes.c_int()  # number of a signal to stop at; memory shared with the process that launched this one
followed = False  # whether that process shows the progress of this one
_side = None  # a second group, over TCP: what hosts tell each other never waits for a GPU


def place() -> tuple[int, int]:
    """This process's number and how many compute together; (0, 1) without a process group."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


@contextlib.contextmanager
def joined(device: torch.device):
    """Inside, this process is one of those that torch's launcher started and gave a number.

    ConfigError where the environment has a part of what the launcher sets, or parts that contradict each other.
    """
    global _side
    _check_launcher(device)
    tie()
    gpu = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if device.type == "cuda" else None
    torch.cuda.set_device(gpu or -1)  # -1 changes nothing
    dist.init_process_group("nccl" if gpu else "gloo", timeout=timedelta(hours=1), device_id=gpu)
    _side = dist.new_group(backend="gloo", timeout=timedelta(days=3))  # the others wait while one converts data
    yield
    dist.destroy_process_group()  # not after an error: NCCL would wait for processes that are stuck


def _check_launcher(device: torch.device) -> None:
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", *["LOCAL_RANK"] * (device.type == "cuda"))
    there = {name: os.environ[name] for name in names if os.environ.get(name)}
    numbers = {name: int(value) for name, value in there.items() if value.isdecimal()}
    way = "start with torchrun, which sets them all, or unset RANK"
    if absent := [name for name in names if name not in there]:
        raise ConfigError(f"the environment has {there}, but no {', '.join(absent)}; {way}")
    if {*names} - {*numbers, "MASTER_ADDR"} or numbers["RANK"] >= numbers["WORLD_SIZE"]:
        raise ConfigError(f"the environment has {there}; expected whole numbers, RANK below WORLD_SIZE; {way}")
    if numbers.get("LOCAL_RANK", -1) >= (gpus := torch.cuda.device_count()) > 0:
        found = f"LOCAL_RANK = {numbers['LOCAL_RANK']}, but torch sees {gpus} GPUs"
        raise ConfigError(f"{found}; start one process for each (torchrun --nproc-per-node {gpus})")


def largest(number: int = 0) -> int:
    """The largest ``number`` of all processes, once all have asked; raises where one has died. No GPU is waited for."""
    value = torch.tensor(int(number))
    if dist.is_initialized():
        dist.all_reduce(value, dist.ReduceOp.MAX, group=_side)
    return int(value)


def shared(value):
    """What the first process has, once all have asked."""
    values = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values, group=_side)
    return values[0]


class _Exchange(torch.autograd.Function):
    """``there`` on the way forward, ``back`` on the gradient; each takes a tensor and returns one."""

    @staticmethod
    def forward(ctx, x: Tensor, there: Callable, back: Callable) -> Tensor:
        ctx.back = back
        return there(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return ctx.back(grad), None, None


def _sum(x: Tensor) -> Tensor:
    x = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(x)
    return x


def _all(x: Tensor) -> Tensor:
    everything = x.new_empty(place()[1] * len(x), *x.shape[1:])
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name before torch 2.13
    gather(everything, x.contiguous())
    return everything


def gather(z: Tensor) -> Tensor:
    """The embeddings of the global batch, (w * n) x K, from each process's n x K; gradients flow back exactly.

    Every process computes the whole loss, so each holds its gradient with respect to all embeddings and keeps its own
    rows: no communication. Their sum over processes gives the parameters' gradient; DDP divides it by w, hence the w.
    """
    rank, world = place()
    return _Exchange.apply(z, _all, lambda grad: grad.chunk(world)[rank] * world) if world > 1 else z


def squares(a: Tensor, b: Tensor) -> Tensor:
    """``losses.squares`` of gathered N x K embeddings, with the rows of A^T B shared out: K / w for each process.

    The value is the sum of the processes' parts; so is the gradient, as each uses ``a`` and ``b`` for its rows alone.
    """
    rank, world = place()
    if world == 1:
        return losses.squares(a, b)
    a, b = (_Exchange.apply(x, Tensor.detach, _sum) for x in (a, b))
    rows = slice(a.shape[1] * rank // world, a.shape[1] * (rank + 1) // world)
    return _Exchange.apply(losses.squares(a[:, rows], b), _sum, Tensor.detach)


class _BatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch normalisation over the samples of all processes (which may hold different numbers of them) on CPUs."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            statistics = self.running_mean, self.running_var
            return F.batch_norm(x, *statistics, self.weight, self.bias, not self.track_running_stats, eps=self.eps)
        rank, world = place()
        wide, per_channel = x.to(torch.promote_types(x.dtype, torch.float32)), (-1, *[1] * (x.ndim - 2))
        var, mean = torch.var_mean(wide, [0, *range(2, x.ndim)], correction=0)
        part = torch.stack([mean, var, torch.full_like(mean, x.numel() / len(mean))])[None]
        parts = _Exchange.apply(part, _all, lambda grad: _sum(grad).chunk(world)[rank])
        means, variances, counts = parts.unbind(1)
        count = counts.sum(0)
        mean = (means * counts).sum(0) / count
        var = ((variances + (means - mean).square()) * counts).sum(0) / count
        if self.track_running_stats:
            with torch.no_grad():
                self.num_batches_tracked += 1
                share = 1 / int(self.num_batches_tracked) if self.momentum is None else self.momentum
                self.running_mean.lerp_(mean, share)
                self.running_var.lerp_(var * (count / (count - 1)), share)
        out = (wide - mean.view(per_channel)) * (var + self.eps).rsqrt().view(per_channel)
        if self.affine:
            out = out * self.weight.view(per_channel) + self.bias.view(per_channel)
        return out.to(x.dtype)


def replicate(model: nn.Module, device: torch.device) -> nn.Module:
    """``model`` as one of w that start equal and average their gradients; BatchNorm works on the global batch."""
    if place()[1] == 1:
        return model
    gpu = device.type == "cuda"
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for module in () if gpu else model.modules():
        if isinstance(module, nn.SyncBatchNorm):
            module.__class__ = _BatchNorm  # torch's refuses CPUs; same state, so the model's keys stay
    replica, options = nn.parallel.DistributedDataParallel, {"gradient_as_bucket_view": True, "static_graph": True}
    known = inspect.signature(replica).parameters
    options["forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"] = False  # older torch
    return replica(model, [torch.cuda.current_device()] if gpu else None, **options)


def launch(function: Callable, *arguments, processes: int, device: torch.device, tick: Callable = lambda: 0) -> None:
    """Run ``function(*arguments)``, importable, in new ``joined`` processes of this machine; none outlives this one.

    ``tick``, called a few times per second, returns the number of a signal to pass on (as ``asked``), or 0. What the
    first process prints is printed here; the first exception is raised here, RuntimeError where one died without.
    """
    for name in ("torch.distributed.elastic.multiprocessing.api", "torch.multiprocessing.spawn"):
        getLogger(name).setLevel(CRITICAL)  # what they have to say comes as an exception
    context = torch.multiprocessing.get_context("spawn")
    stop, said, errors = context.Value("i", 0, lock=False), context.SimpleQueue(), []
    options = {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0", "run_id": uuid.uuid4().hex, "max_restarts": 0}
    options |= {"start_method": "spawn", "local_addr": "localhost"}  # a laptop's own name may lead nowhere
    config = LaunchConfig(1, 1, processes, DefaultLogsSpecs(log_dir=os.devnull), **options)
    # New processes would run the calling script once more; under this name they leave it alone.
    alone = patch.object(sys.modules["__main__"], "__spec__", SimpleNamespace(name="__main__"), create=True)
    with alone, ThreadPoolExecutor(1) as pool:  # the launcher keeps the thread that calls it
        more = (device, os.getpid(), max(1, torch.get_num_threads() // processes), stop, said)
        job = pool.submit(elastic_launch(config, _enter), function, arguments, *more)
        try:
            while wait([job], 0.2).not_done or not said.empty():
                stop.value = stop.value or tick()
                while not said.empty():
                    item = said.get()
                    print(item, end="", flush=True) if isinstance(item, str) else errors.append(item)
        finally:
            stop.value = stop.value or signal.SIGTERM  # in case ``tick`` failed
    silent = processes - len(errors)
    if errors and (silent == 0 or type(errors[0]) is not RuntimeError):  # that is what the others make of a dead one
        raise errors[0]
    if error := job.exception():
        raise RuntimeError(f"{silent} of {processes} processes died without a word (out of memory?)") from error


def _enter(function: Callable, arguments: tuple, device: torch.device, parent: int, threads: int, stop, said) -> None:
    global asked, followed
    tie()
    if os.getppid() != parent:  # it died before the tie
        os._exit(1)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # terminals and SLURM send them to all; the parent passes them on
    asked, followed = stop, True
    torch.set_num_threads(threads)
    # A notebook shows what its kernel prints, not what the kernel's children do.
    to_parent = SimpleNamespace(write=lambda text: place()[0] or said.put(text), flush=lambda: None)
    try:
        with joined(device), contextlib.redirect_stdout(to_parent):
            function(*arguments)
    except Exception as error:
        trace = f"in process {place()[0]}:\n{traceback.format_exc()[-3000:]}"
        error.add_note(trace)
        said.put(error if isinstance(error, ValueError | RuntimeError | OSError) else RuntimeError(trace))
        sys.exit(1)
