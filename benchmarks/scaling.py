"""Pairs per second of pretraining with 1, 2 and 4 processes on one machine, started by the library itself.

    python -m benchmarks.scaling                  # ResNet-18 at 64 px on a CPU, one thread for each process
    python -m benchmarks.scaling --device cuda    # one GPU for each process, as many as there are

The global batch stays the same. More processes than cores (or GPUs) cannot be faster. What the start takes does not
count: rates are the medians of the log after its first line.
"""

import os
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from decur_core import config, pretrain
from decur_core.running import history

from . import common


def settings(options, processes: int, folder: str) -> config.Settings:
    """Of a run of random pixels; every line of the log covers a quarter of the steps."""
    sizes = {"backbone": options.backbone, "projector": [options.k] * 3, "dim_common": options.k * 7 // 8}
    sizes |= {"crop_size": options.size, "batch_size": options.batch, "epochs": options.steps}
    sizes |= {"workers": options.workers}
    quiet = {"log_steps": max(1, options.steps // 4), "checkpoint_steps": 10**9, "runs": folder}
    where = {"device": torch.device(options.device).type, "processes": processes, "name": f"processes{processes}"}
    return config.load("start", sizes | quiet | where | {"optimizer": "lars", "data.source": "published"})


def main(argv: Sequence[str] | None = None) -> None:
    gpus = [n for n in (1, 2, 4) if n <= torch.cuda.device_count()] or [1]
    known = {"backbone": ("resnet18", "resnet50", "network of each modality"), "side": (72, 264, "of images, pixels")}
    known |= {"size": (64, 224, "of views, pixels"), "batch": (64, 256, "pairs in a step, over all processes")}
    known |= {"k": (2048, 8192, "embedding dimensions, and width of the projectors' other layers")}
    known |= {"processes": ([1, 2, 4], gpus, "numbers of processes"), "workers": (0, 8, "loader workers of each")}
    known |= {"steps": (12, 60, "of each run"), "threads": (1, 1, "CPU threads of each process")}
    options = common.arguments(__doc__, argv, **known)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        # An epoch is one step: more pairs would take room and teach nothing about speed.
        store = common.random_store(Path(folder, "store"), count=options.batch, side=options.side, seasons=1)
        for processes in options.processes:
            torch.set_num_threads(options.threads * processes)  # the launcher shares them out
            run = pretrain.run(settings(options, processes, folder), store.path)
            later = history.read(run)[max(1, options.steps // 4) :]
            rate = statistics.median(line["pairs_per_second"] for line in later)
            rows.append({"processes": processes, "pairs/s": rate})
    rows = [row | {"speed-up": row["pairs/s"] / rows[0]["pairs/s"]} for row in rows]
    print(common.table(rows))
    cores = len(os.sched_getaffinity(0))
    print(f"{cores} cores: on a CPU, more than {cores} processes cannot be faster.")
    print(common.save("scaling", settings=vars(options), rows=rows, device=options.device))


if __name__ == "__main__":
    main()
