"""The test by which a miniature world's factors are admitted: can a supervised network read them?"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from decur_core.backbones import build


def supervised_r2(
    names: Iterable[str],
    view: Callable[[Tensor, int, torch.Generator], Tensor],
    held_out: Tensor,
    target: Tensor,
    train: int,
    *,
    steps: int,
    batch: int = 64,
    rate: float = 5e-3,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> dict[str, float]:
    """R2 of every factor on held-out locations, by a supervised network of the mini backbone's size.

    ``view(rows, step, generator)``: uint8 images (batch, C, H, W) of these of the first ``train`` locations, augmented;
    ``held_out``: those of the others; ``target``: factors (locations, F).
    """
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        backbone, width = build("small", held_out.shape[1])
        network = torch.nn.Sequential(backbone, torch.nn.Linear(width, target.shape[1]))
    network.to(memory_format=memory_format)
    optimizer = torch.optim.AdamW(network.parameters(), lr=rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    for step in range(steps):
        rows = torch.randint(train, (batch,), generator=generator)
        loss = (network(view(rows, step, generator) / 255) - target[rows]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    network.eval()
    with torch.no_grad():
        error = network(held_out / 255) - target[train:]
    r2 = 1 - error.square().mean(0) / target[train:].var(0, correction=0)
    return dict(zip(names, r2.tolist(), strict=True))
