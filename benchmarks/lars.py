"""One LARS step on a ResNet-50 pair with 8192-wide projectors: ours against a loop over parameters.

    python -m benchmarks.lars                  # 349 million weights, 9 GB: both ways hold weights and momentum
    python -m benchmarks.lars --width 2048     # a smaller one
    python -m benchmarks.lars --device cuda

Both start from the same weights, get the same gradients, and are compared after three steps.
"""

import copy
from collections.abc import Sequence

import torch

from decur_core.lars import LARS, parameter_groups
from decur_core.model import MultimodalModel

from . import common


class Published(LARS):
    """The rule of Barlow Twins as its authors go about it: one parameter after the other, a new tensor each time."""

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                update = p.grad
                if p.ndim != 1:
                    update = update.add(p, alpha=group["weight_decay"])
                    weight_norm, update_norm, one = torch.norm(p), torch.norm(update), torch.ones((), device=p.device)
                    ratio = torch.where(update_norm > 0, group["trust_coefficient"] * weight_norm / update_norm, one)
                    update = update.mul(torch.where(weight_norm > 0, ratio, one))
                state = self.state[p]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(p)
                state["momentum"].mul_(group["momentum"]).add_(update)
                p.add_(state["momentum"], alpha=-group["lr"])


WAYS = {"published": Published, "ours": LARS}


def optimizers(backbone: str, width: int, device: str) -> dict[str, torch.optim.Optimizer]:
    """One for each way, on equal weights of their own and the same gradients."""
    torch.manual_seed(0)
    model = MultimodalModel(backbone, {m.name: m.channels for m in common.PAIR}, (width,) * 3).to(device)
    made = {}
    for name, way in WAYS.items():
        model = copy.deepcopy(model) if made else model
        made[name] = way(parameter_groups(model, lr=0.2, lr_biases=0.0048), lr=0.2)
    pairs = zip(*(parameters(optimizer) for optimizer in made.values()), strict=True)
    for p, q in pairs:
        p.grad = q.grad = torch.randn_like(p).mul_(p.detach().std(correction=0) + 1e-3)
    return made


def parameters(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def farthest(made: dict[str, torch.optim.Optimizer]) -> float:
    """Largest relative distance between the two ways' weights, over parameters."""
    pairs = zip(*(parameters(optimizer) for optimizer in made.values()), strict=True)
    with torch.no_grad():
        return max(float((p - q).norm() / p.norm().clamp(min=1e-12)) for p, q in pairs)


def main(argv: Sequence[str] | None = None) -> None:
    options = common.arguments(
        __doc__,
        argv,
        backbone=("resnet50", "resnet50", "network of each modality"),
        width=(8192, 8192, "width of the projectors' three layers"),
        repeats=(5, 20, "timed steps of each way; the median counts"),
        threads=(1, 1, "CPU threads"),
    )
    torch.set_num_threads(options.threads)
    made = optimizers(options.backbone, options.width, options.device)
    for _ in range(3):
        for optimizer in made.values():
            optimizer.step()
    if (off := farthest(made)) > 1e-5:
        raise RuntimeError(f"after three steps the weights of the two ways differ by {off:.2g}, relative")
    steps = {name: optimizer.step for name, optimizer in made.items()}
    time = common.seconds(steps, repeats=options.repeats, device=options.device)
    count = sum(p.numel() for p in parameters(made["ours"]))
    row = {"million weights": count / 1e6} | {f"{name} ms": 1e3 * value for name, value in time.items()}
    row |= {"times faster": time["published"] / time["ours"], "difference after 3 steps": off}
    print(common.table([row]))
    print(common.save("lars", settings=vars(options), rows=[row], device=options.device))


if __name__ == "__main__":
    main()
