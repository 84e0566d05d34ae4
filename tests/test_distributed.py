"""Several processes give what one process gives; they start, stop, fail and die together.

Starting a process costs seconds of imports, so the launches are few and each carries many checks.
"""

import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from conftest import TINY, make_store
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from decur_core import config, losses, pretrain
from decur_core.lars import cosine, set_learning_rates
from decur_core.running import folders as runs
from decur_core.running import history
from decur_core.running import processes as distributed

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
BATCH, CHANNELS = 24, {"sar": 2, "optical": 13}
RELATIVE = {torch.float64: 1e-9, torch.float32: 1e-5}
SHAPES = {"N x N": (64, 56), "K x K": (19, 15)}  # last width and dim_common; 2 * 24 lies between the widths
METHODS = {
    "decur": {},
    "barlow_twins": {},
    "vicreg": {},
    "clip": {},
    "simclr": {},
    "barlow_twins_single": {"single": "optical"},
    "decur, shared projector, across alone": {"method": "decur", "intra": False, "shared_projector": True},
}
ALL = list(itertools.product(METHODS, ("lars", "adamw"), SHAPES, RELATIVE))
CASES = [ALL[k] for k in (0, 3, 5, 6, 9, 10, 12, 15)]  # every pair of choices; the rest is for the soak test
CASES += [(m, *ALL[6 if k % 2 else 0][1:]) for k, m in enumerate([*METHODS][2:])] + [("vicreg", *ALL[6][1:])]
FOUR = [ALL[k] for k in (3, 6, 9, 12)] + [("vicreg", *ALL[6][1:]), CASES[9]]
LOOP = {"batch_size": 16, "epochs": 10, "learning_rate": 1e-4, "learning_rate_biases": 1e-4, "checkpoint_steps": 3}


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def off(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Relative difference."""
    return float((found - wanted).double().norm() / wanted.double().norm().clamp(min=1e-300))


def five_steps(method: str, optimizer: str, shape: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Loss terms and gradients of five steps and the state after them, made with the parts of the training loop."""
    width, dim_common = SHAPES[shape]
    chosen = {"method": method, "optimizer": optimizer, "projector": [32, width], "dim_common": dim_common}
    chosen |= {"learning_rate": 0.2 if optimizer == "lars" else 0.002, **METHODS[method]}
    settings = config.load("start", chosen)
    images = torch.rand(4, BATCH, 13, 8, 8, generator=torch.Generator().manual_seed(1), dtype=dtype)
    torch.manual_seed(0)
    model = pretrain.network(settings, CHANNELS).to(dtype).train()
    if dtype == torch.float32:  # a value that rounding moves over ReLU's kink would change its gradient by all it has
        for module in model.modules():
            for name, part in module.named_children():
                if isinstance(part, nn.ReLU):
                    setattr(module, name, nn.SiLU())
    made = pretrain.optimizer(settings, model)
    replica, (rank, world) = distributed.replicate(model, CPU), distributed.place()
    rows, seen = slice(BATCH * rank // world, BATCH * (rank + 1) // world), {}
    for step in range(5):
        # Which of the four sets of images a view is: first views before second ones.
        several = losses.METHODS[settings.method].views(settings)
        views = {
            m: tuple(images[2 * v + k, rows, :channels] if v < several else None for v in (0, 1))
            for k, (m, channels) in enumerate(CHANNELS.items())
            if m in runs.trained(settings)
        }
        set_learning_rates(made, cosine(step, 5))
        made.zero_grad()
        terms = pretrain.loss(settings, replica, views)
        terms["total"].backward()
        seen |= {f"{name} at step {step}": value.detach() for name, value in terms.items()}
        trained = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
        seen |= parts(f"gradient at step {step}", trained, dtype)
        made.step()
    return seen | parts("state", {k: v for k, v in model.state_dict().items() if v.is_floating_point()}, dtype)


def parts(what: str, values: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Each tensor in float64. In float32 all as one: where a sum nearly cancels, a single bias has fewer digits."""
    if dtype == torch.float64:
        return {f"{what}, {name}": value for name, value in values.items()}
    return {what: torch.cat([value.flatten() for value in values.values()])}


# What follows until the fixtures runs in the processes.


def check_batch_norm(dtype: torch.dtype, sizes: tuple, *shape: int, **options) -> None:
    """Against torch's own on the whole batch, of which each process holds another number of samples."""
    rank, kind = distributed.place()[0], nn.BatchNorm2d if len(shape) > 1 else nn.BatchNorm1d
    g = torch.Generator().manual_seed(0)
    whole, one = kind(shape[0], **options).to(dtype), nn.Sequential(kind(shape[0], **options), nn.PReLU()).to(dtype)
    nn.init.ones_(one[1].weight)  # changes nothing; a replica needs a weight
    for p in whole.parameters():
        nn.init.normal_(p, generator=g)
    one[0].load_state_dict(whole.state_dict())
    replica, mine = distributed.replicate(one, CPU).module, slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    assert replica.state_dict().keys() == one.state_dict().keys() and type(replica[0]) is distributed._BatchNorm
    rtol = RELATIVE[dtype]
    tolerance = {"rtol": rtol, "atol": rtol}
    for _ in range(3):
        x = 50 + 3 * torch.randn(sum(sizes), *shape, generator=g, dtype=dtype)
        weights = torch.randn(x.shape, generator=g, dtype=dtype)
        a, b = x.clone().requires_grad_(), x[mine].clone().requires_grad_()
        wanted, found = whole(a), replica(b)
        (wanted * weights).sum().backward()
        (found * weights[mine]).sum().backward()
        torch.testing.assert_close(found, wanted[mine], **tolerance)
        torch.testing.assert_close(b.grad, a.grad[mine], **tolerance)
    for name, p in replica[0].named_parameters():
        dist.all_reduce(p.grad)
        torch.testing.assert_close(p.grad, getattr(whole, name).grad, rtol=rtol, atol=0)
    torch.testing.assert_close(replica[0].state_dict(), whole.state_dict(), **tolerance)
    replica.eval(), whole.eval()
    torch.testing.assert_close(replica(x), whole(x), **tolerance)


class Sizes(TorchDispatchMode):
    """Remembers the shape of every tensor that an operation makes."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.seen |= {tuple(t.shape) for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, torch.Tensor)}
        return out


def check_rows_are_shared_out(n: int, k: int) -> None:
    world, g = distributed.place()[1], torch.Generator().manual_seed(0)
    x, y = (torch.randn(n, k, generator=g, dtype=torch.float64) for _ in range(2))
    results = []
    for squares in (losses.squares, distributed.squares):
        a, b = x.clone().requires_grad_(), y.clone().requires_grad_()
        with Sizes() as sizes:
            value = squares(a, b)
            value.sin().backward()
        results.append((value.detach(), a.grad, b.grad))
    torch.testing.assert_close(results[1], results[0], rtol=1e-10, atol=1e-10)
    largest = max(shape[0] * shape[1] for shape in sizes.seen if len(shape) == 2 and n not in shape)
    assert largest <= -(-k // world) * k, sizes.seen


def count_bytes(n: int, k: int) -> int:
    """Bytes of what collectives hand to each process in one loss, forward and backward."""
    sent, (_, world), real = [0], distributed.place(), (dist.all_gather_single, dist.all_reduce)

    def gather(out, x):
        sent[0] += out.nbytes
        return real[0](out, x)

    def reduce(x, *rest, **options):
        sent[0] += x.nbytes
        return real[1](x, *rest, **options)

    dist.all_gather_single, dist.all_reduce = gather, reduce
    z = [torch.randn(n // world, k).requires_grad_() for _ in range(4)]
    losses.decur(*map(distributed.gather, z), dim_common=k - k // 8, squares=distributed.squares).total.backward()
    dist.all_gather_single, dist.all_reduce = real
    return sent[0]


BLOCKS = {"a+b+c": 24, "a+b": 8, "b+c": 8, "a": 16, "b": 0, "c": 4}
WITH_BLOCKS = list(itertools.product((8, 120), (False, True), RELATIVE))  # samples: Gram matrices and K x K


def loss_of_blocks(n: int, missing: bool, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Terms of the loss of three modalities and its gradient in the weights that make the embeddings from inputs."""
    (rank, world), g = distributed.place(), torch.Generator().manual_seed(n)
    rows, views, weights = slice(n * rank // world, n * (rank + 1) // world), {}, {}
    inputs = torch.randn(2, n, 20, generator=g, dtype=dtype)
    for m in "abc":
        k = sum(width for block, width in BLOCKS.items() if m in block)
        weights[m] = torch.randn(20, k, generator=g, dtype=dtype).requires_grad_()
        noise = torch.randn(2, n, k, generator=g, dtype=dtype)
        views[m] = [distributed.gather((x @ weights[m] + e)[rows]) for x, e in zip(inputs, noise, strict=True)]
    has = {m: torch.arange(n) % period > 0 for m, period in (("a", 4), ("c", 3))}  # uneven over the processes
    present = {m: distributed.gather(mask[rows]) for m, mask in has.items()} if missing else None
    found = losses.decur_blocks(views, BLOCKS, squares=distributed.squares, present=present)
    found.total.backward()
    for w in weights.values():
        if world > 1:
            dist.all_reduce(w.grad)
        w.grad /= world  # as DDP does
    terms = {name: value.detach() for name, value in found.terms.items()}
    return terms | {f"gradient of {m}": w.grad for m, w in weights.items()}


def losses_of_blocks() -> dict:
    return {case: loss_of_blocks(*case) for case in WITH_BLOCKS}


def check_gather(dtype: torch.dtype) -> None:
    rank, world = distributed.place()
    mine = torch.arange(6, dtype=dtype).view(2, 3).add(10 * rank).requires_grad_()
    everything = distributed.gather(mine)
    assert torch.equal(everything, torch.cat([mine.detach() % 10 + 10 * r for r in range(world)]))
    everything.backward(torch.ones_like(everything) * everything)
    assert torch.equal(mine.grad, world * mine.detach())


def steps_of(cases: list) -> dict:
    return {case: five_steps(*case) for case in cases}


def save_steps(folder: Path, cases: list) -> None:
    rank, world = distributed.place()
    torch.save({world: steps_of(cases)}, folder / f"{rank}.pt")


def in_four_processes(folder: Path, killed: Path, store: Path, settings, port: int) -> None:
    rank, _ = distributed.place()
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        check_gather(dtype)
    for dtype, shape in itertools.product(RELATIVE, ((5,), (5, 4, 3))):
        check_batch_norm(dtype, (3, 1, 6, 2), *shape)
        check_batch_norm(dtype, (3, 1, 6, 2), *shape, momentum=None, affine=False)
        check_batch_norm(dtype, (3, 1, 6, 2), *shape, track_running_stats=False)
    check_rows_are_shared_out(40, 64)
    check_rows_are_shared_out(9, 15)
    assert distributed.largest(rank) == 3
    facts = {"bytes": count_bytes(64, 2048), 4: steps_of(FOUR), "blocks": {4: losses_of_blocks()}}
    pretrain.run(settings, store)
    dist.destroy_process_group()
    # Two worlds of two, each with half of the cases.
    pair = {"RANK": rank % 2, "WORLD_SIZE": 2, "MASTER_PORT": port + rank // 2, "TORCHELASTIC_USE_AGENT_STORE": False}
    os.environ.update({name: str(value) for name, value in pair.items()})
    with distributed.joined(CPU):
        facts[2] = steps_of(CASES[rank // 2 :: 2])
        facts["blocks"][2] = losses_of_blocks()
    torch.save(facts, folder / f"{rank}.pt")
    raise pretrain.NonFinite("as a loss would")


def settings_in(folder: Path, **overrides):
    return config.load("start", {**TINY, **LOOP, "runs": str(folder), **overrides})


def children(pid: int) -> set[int]:
    """Processes below ``pid``, at any depth."""
    below = set()
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        below |= {int(p) for p in file.read_text().split()}
    return below.union(*map(children, below))


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for(condition, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    make_store(folder / "store", count=32, seasons=2, labels=False)
    return folder


# Not guarded by `if __name__ == "__main__"`: the processes must not run it again.
SCRIPT = """
    import json, sys, torch
    torch.set_num_threads(1)
    from decur_core import config, pretrain
    pretrain.run(config.load("start", json.loads(sys.argv[1])), sys.argv[2])
"""


@pytest.fixture(scope="module")
def killed(place):
    """Folder of runs with one that was killed in two processes."""
    settings = settings_in(place / "killed", processes=2, workers=1)
    (place / "script.py").write_text(textwrap.dedent(SCRIPT))
    plain = {k: v for k, v in config.to_dict(settings).items() if k not in ("profile", "sweep")}
    command = [sys.executable, str(place / "script.py"), json.dumps(plain), str(place / "store")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    parent = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    folder = runs.path(settings, "pretrain", runs.title(settings))
    wait_for(lambda: len(history.read(folder)) >= 4 or parent.poll() is not None)
    below = children(parent.pid)
    parent.kill()
    assert parent.wait() == -signal.SIGKILL, parent.stderr.read()
    assert len(below) >= 2
    wait_for(lambda: not any(map(alive, below)), seconds=10)
    return place / "killed"


@pytest.fixture(scope="module")
def uninterrupted(place):
    """What one process gives: the final state and the history."""
    return result(pretrain.run(settings_in(place / "whole"), place / "store"))


def result(folder: Path) -> tuple[dict, list[dict]]:
    return torch.load(folder / "final.pt", weights_only=True)["model"], history.read(folder)


TERMS = ("total", "common", "unique", "intra/sar", "intra/optical")


def assert_same_run(found: tuple, wanted: tuple, tolerance: float = 1e-3, names=TERMS) -> None:
    """Rounding grows from step to step; other samples, seasons or views would differ at once, and by far more."""
    assert [line["step"] for line in found[1]] == [line["step"] for line in wanted[1]]
    for a, b in zip(found[1], wanted[1], strict=True):
        for name in names:
            assert abs(a[name] - b[name]) <= tolerance * b["total"], (a["step"], name)
    assert found[0].keys() == wanted[0].keys()
    for name, value in wanted[0].items():
        assert off(found[0][name], value) <= tolerance, name


@pytest.fixture(scope="module")
def four(place, killed, tmp_path_factory):
    """What four processes found; the launch itself has to raise what they raise at the end."""
    shutil.copytree(killed, place / "resumed by four")
    settings = settings_in(place / "resumed by four")
    nameless = mock.patch("socket.getfqdn", lambda *_: "no-such-host.invalid")  # as a laptop away from its network
    with nameless, pytest.raises(pretrain.NonFinite, match="as a loss would") as error:
        arguments = (place, killed, place / "store", settings, free_port())
        distributed.launch(in_four_processes, *arguments, processes=4, device=CPU)
    assert any("in_four_processes" in note for note in error.value.__notes__)
    return [torch.load(place / f"{rank}.pt") for rank in range(4)]


def assert_steps_of_one_process(found: list[dict], case: tuple) -> None:
    wanted, (_, optimizer, _, dtype) = five_steps(*case), case
    # AdamW starts with steps of one length, g / |g|: where g is all rounding, float32 goes either way.
    tolerance = 1e-3 if (optimizer, dtype) == ("adamw", torch.float32) else RELATIVE[dtype]
    for values in found:
        assert values.keys() == wanted.keys()
        for name, value in wanted.items():
            assert off(values[name], value) <= (RELATIVE[dtype] if name.endswith("step 0") else tolerance), name
        assert all(torch.equal(values[name], found[0][name]) for name in wanted), "processes differ"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_loss_gradients_and_weights_are_those_of_one_process(four, case):
    for world, expected in ((2, 2), (4, 4 * (case in FOUR))):
        found = [facts[world][case] for facts in four if case in facts[world]]
        assert len(found) == expected
        assert_steps_of_one_process(found, case)


@pytest.mark.parametrize("case", WITH_BLOCKS, ids=str)
@pytest.mark.parametrize("world", [2, 4])
def test_loss_and_gradients_of_blocks_are_those_of_one_process(four, case, world):
    wanted = loss_of_blocks(*case)
    for facts in four:
        found = facts["blocks"][world][case]
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            assert off(found[name], value) <= RELATIVE[case[-1]], name


@pytest.mark.soak
@pytest.mark.parametrize("world", [2, 3, 4])
def test_every_combination(tmp_path, world):
    distributed.launch(save_steps, tmp_path, ALL, processes=world, device=CPU)
    found = [torch.load(tmp_path / f"{rank}.pt")[world] for rank in range(world)]
    for case in ALL:
        assert_steps_of_one_process([facts[case] for facts in found], case)


def test_bytes_per_step_are_a_tenth_of_those_of_the_matrices(four):
    """n = 64, k = 2048: the same ratio as n = 256, k = 8192. Three matrices are all-reduced in the published way."""
    n, k = 64, 2048
    assert {facts["bytes"] for facts in four} == {4 * n * k * 4}
    assert four[0]["bytes"] <= 3 * k * k * 4 / 10


def test_a_killed_run_of_two_goes_on_in_one_process_and_in_four(killed, four, place, uninterrupted):
    assert_same_run(result(pretrain.run(settings_in(killed), place / "store")), uninterrupted)
    assert_same_run(result(pretrain.run(settings_in(place / "resumed by four"), place / "store")), uninterrupted)


def interrupt(folder: Path, number: int) -> None:
    wait_for(lambda: len(history.read(folder)) >= 4)
    os.kill(os.getpid(), number)


def test_a_signal_stops_all_after_the_same_step(place, uninterrupted, capsys):
    settings = settings_in(place / "stopped", processes=2, log_steps=2)
    folder = runs.path(settings, "pretrain", runs.title(settings))
    threading.Thread(target=interrupt, args=(folder, signal.SIGUSR1), daemon=True).start()
    with pytest.raises(pretrain.Interrupted, match=r"SIGUSR1 after step \d+ of 20"):
        pretrain.run(settings, place / "store")
    last = history.read(folder)[-1]["step"]
    assert (folder / f"checkpoint-{last:09d}.pt").exists()
    shown = capsys.readouterr().err
    assert "/20" in shown and "pairs/s" in shown
    assert not children(os.getpid()) - tracker()
    assert_same_run(result(pretrain.run(settings_in(place / "stopped", log_steps=2), place / "store")), uninterrupted)


def tracker() -> set[int]:
    """Python keeps one process that tidies up after those it starts, as long as it runs itself."""
    from multiprocessing import resource_tracker

    return {resource_tracker._resource_tracker._pid}


TORCHRUN = """--nnodes=2 --nproc-per-node=1 --rdzv-backend=c10d --rdzv-id=test --max-restarts=0
    --signals-to-handle=SIGTERM,SIGINT,SIGUSR1 -m decur_core.pretrain start --set"""


def nodes(settings, port: int) -> list[subprocess.Popen]:
    """Two launchers, each as it would run on a node of its own."""
    plain = {k: v for k, v in config.to_dict(settings).items() if k != "profile"}
    texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in plain.items()}
    chosen = [f"{name}={text}" for name, text in texts.items()]
    command = [sys.executable, "-m", "torch.distributed.run", f"--rdzv-endpoint=localhost:{port}", *TORCHRUN.split()]
    Path(settings.runs).mkdir(exist_ok=True)  # where torchrun leaves its log folders too
    environment = {**os.environ, "TMPDIR": settings.runs}
    options = {"cwd": ROOT, "env": environment, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return [subprocess.Popen([*command, *chosen], **options) for _ in range(2)]


def world_settings(place: Path):
    data = {"data.source": "world", "data.processes": 0, "data.stores": str(place / "stores")}
    world = {"world.locations": 32, "world.through_files": 0, "world.tile": 24}
    return settings_in(place / "nodes", epochs=4, sweep={}, **data, **world)


def test_two_launchers_train_one_run_and_the_notebook_finds_it(place):
    from decur_core.data import prepare  # which the other tests' processes need not import

    settings = world_settings(place)
    running = nodes(settings, free_port())
    output = [process.communicate(timeout=180)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0], "\n".join(output)
    folder = runs.path(settings, "pretrain", runs.title(settings))
    before, about = (folder / "final.pt").stat().st_mtime_ns, json.loads((folder / "run.json").read_text())
    assert about["processes"] == 2
    store = prepare.pretraining_store(settings)
    assert list(pretrain.run_members(settings, store).values()) == [folder]
    assert (folder / "final.pt").stat().st_mtime_ns == before
    alone = pretrain.run(settings_in(place / "alone", **{"data.source": "world", "epochs": 4}), store)
    assert_same_run(result(folder), result(alone))


def test_a_batch_that_cannot_be_shared_out_is_refused_before_anything_starts(place):
    with pytest.raises(config.ConfigError, match="batch_size = 16 is not divisible by the world size of 3 processes"):
        pretrain.run(settings_in(place / "three", processes=3), place / "store")


def test_gradient_accumulation_is_an_unknown_setting():
    with pytest.raises(config.ConfigError, match="unknown setting 'accumulate_steps'"):
        config.load("start", {"accumulate_steps": 2})


STUBS = {
    "python": """echo "python $*" >> calls
        echo "$DECUR_HEADLESS" > headless
        trap "echo usr1 >> calls; exit 3" USR1
        trap "echo term >> calls; exit 4" TERM
        touch ready
        for _ in $(seq 200); do sleep 0.05; done""",
    "srun": 'echo "srun $*" >> calls; echo $$ > pid; exec python',
    "scancel": 'echo "scancel $*" >> calls; kill -USR1 $(cat pid)',
    "scontrol": 'echo "scontrol $*" >> calls; echo node1',
}


@pytest.mark.parametrize("name", ["one-node", "sweep", "multi-node"])
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_job_scripts_pass_signals_on_and_requeue_before_the_time_limit(tmp_path, name, number):
    script = ROOT / "slurm" / f"{name}.sbatch"
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    for stub, text in STUBS.items():
        (tmp_path / stub).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / stub).chmod(0o755)
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/activate").write_text(f"PATH={tmp_path}:$PATH")
    slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "4", "SLURM_JOB_NODELIST": "n[1-2]"}
    slurm |= {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "5", "SLURM_CPUS_PER_TASK": "64"}
    job = subprocess.Popen(["bash", script, "a100", "20"], cwd=tmp_path, env={**os.environ, **slurm})
    wait_for((tmp_path / "ready").exists, seconds=20)
    job.send_signal(number)
    assert job.wait(20) == (4 if name != "multi-node" and number == signal.SIGTERM else 3)
    said = (tmp_path / "calls").read_text().splitlines()
    assert name == "one-node" or (tmp_path / "headless").read_text() == "1\n"  # there it is the driver that sees to it
    assert ("scontrol requeue 7" in said) == (number == signal.SIGUSR1)
    if name == "one-node":
        assert said[:2] == ["python -m decur_core.run a100 20 --grace 540", number.name[3:].lower()]
    elif name == "sweep":
        assert said[:2] == ["python -m decur_core.pretrain a100 20 --shard 3/5", number.name[3:].lower()]
    else:
        assert said[1].startswith("srun --cpus-per-task=64 torchrun ")  # which srun does not inherit
        assert "--nnodes=2 --nproc-per-node=4" in said[1] and said[1].endswith("-m decur_core.pretrain a100 20")
        assert "--rdzv-endpoint=node1:20007" in said[1] and said[3:5] == ["scancel --signal=USR1 7", "usr1"]


@pytest.mark.soak
def test_a_signal_to_one_node_stops_both_after_the_same_step(place):
    settings = world_settings(place)
    settings = settings.model_copy(update={"epochs": 400, "name": "stopped"})
    running, folder = nodes(settings, free_port()), runs.path(settings, "pretrain", runs.title(settings))
    wait_for(lambda: len(history.read(folder)) >= 4)
    running[1].send_signal(signal.SIGUSR1)
    output = [process.communicate(timeout=120)[0] for process in running]
    assert all(process.returncode for process in running)
    last = history.read(folder)[-1]["step"]
    assert (folder / f"checkpoint-{last:09d}.pt").exists()
    assert all(f"SIGUSR1 after step {last} of 800; the same call resumes" in text for text in output), output


def fail(how: str) -> None:
    if distributed.place()[0] == 1:
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise {"config": config.ConfigError("no such thing"), "key": KeyError("no such key")}[how]
    distributed.largest()


@pytest.mark.soak
@pytest.mark.parametrize(
    ("how", "kind", "text"),
    [
        ("config", config.ConfigError, "no such thing"),
        ("key", RuntimeError, "no such key"),
        ("killed", RuntimeError, "1 of 2 processes died without a word"),
    ],
)
def test_what_fails_in_one_process_is_raised_here(how, kind, text, capfd):
    with pytest.raises(kind, match=text):
        distributed.launch(fail, how, processes=2, device=CPU)
    assert not children(os.getpid()) - tracker()


@pytest.mark.soak
def test_a_notebook_starts_processes_shows_their_progress_and_hands_signals_on(place, capfd):
    import nbformat

    from decur_core import run

    plain = config.to_dict(settings_in(place / "notebook", processes=2))
    overrides = {k: v for k, v in plain.items() if k not in ("profile", "sweep")}
    cells = [
        'profile = "mini"\noverrides = {}',
        "from decur_core import config, pretrain\nfrom decur_core.running import folders as runs",
        f'settings = config.load(profile, overrides)\npretrain.run(settings, "{place / "store"}")',
        "runs.finished()",
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(text) for text in cells])
    notebook.cells[0].metadata["tags"] = ["parameters"]
    nbformat.write(notebook, place / "20_it.ipynb")
    folders = {"output": place / "output", "executed": place / "executed"}
    folder = place / "notebook" / "start" / "pretrain" / "sar_optical-decur-seed0"

    def execute() -> int:
        return run.run([place / "20_it.ipynb"], profile="start", overrides=overrides, **folders)

    threading.Thread(target=interrupt, args=(folder, signal.SIGTERM), daemon=True).start()
    assert execute() == 128 + signal.SIGTERM
    assert "Interrupted" in (place / "output" / "20_it.ipynb").read_text()
    assert sorted(folder.glob("checkpoint-*"))
    assert execute() == 0
    log, done = capfd.readouterr().out, (place / "executed" / "20_it.ipynb").read_text()
    assert "20/20" in done and "pairs/s" in done and "resumes after step" in done
    assert "20/20" in log and "resumes after step" in log


@pytest.mark.parametrize("name", ["broadcast_buffers", "forward_sync_buffers"])
def test_buffers_are_left_alone_by_whichever_name_torch_knows(monkeypatch, name):
    given = {}
    scope = {"given": given}
    exec(f"def wrap(module, device_ids=None, *, {name}=True, **more): given.update(more, {name}={name})", scope)
    monkeypatch.setattr(nn.parallel, "DistributedDataParallel", scope["wrap"])
    monkeypatch.setattr(distributed, "place", lambda: (0, 2))
    distributed.replicate(nn.Linear(2, 2), CPU)
    assert given == {name: False, "gradient_as_bucket_view": True, "static_graph": True}
