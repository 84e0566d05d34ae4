"""LARS (You et al. 2017) as Barlow Twins and DeCUR use it, its parameter groups, and the cosine schedule."""

import math

import torch
from torch import Tensor, nn

BLOCK = 2**18  # values of a block, of which three stay in a CPU's cache


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling with momentum.

    For a weight p with gradient g: d = g + weight_decay * p; d *= trust_coefficient * |p| / |d| where both norms are
    positive; m = momentum * m + d; p -= lr * m. Parameters with at most one dimension (biases and normalisation
    parameters) take neither decay nor adaptation (paper, appendix B; the rule of Barlow Twins).

    ``params``: parameters or groups, each group may set its own ``lr``. State: one momentum buffer per parameter.
    Raises ``ValueError`` for a negative rate, decay or trust coefficient and a momentum outside [0, 1).
    """

    def __init__(self, params, lr, momentum=0.9, weight_decay=1e-6, trust_coefficient=0.001):
        defaults = {"lr": lr, "weight_decay": weight_decay, "trust_coefficient": trust_coefficient}
        for name, value in defaults.items():
            if not value >= 0:  # refuses NaN too
                raise ValueError(f"LARS: {name} = {value}; must not be negative")
        if not 0 <= momentum < 1:
            raise ValueError(f"LARS: momentum = {momentum}; must lie in [0, 1)")
        super().__init__(params, defaults | {"momentum": momentum})

    @torch.no_grad()
    def step(self, closure=None):
        """One update of every parameter that has a gradient; returns the closure's loss if one is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            elsewhere = []
            for p in (p for p in group["params"] if p.grad is not None):
                if "momentum" not in self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(p, memory_format=torch.preserve_format)
                if p.device.type == "cpu" and _in_memory(p, p).is_contiguous():
                    self._step_in_blocks(p, group)
                else:
                    elsewhere.append(p)
            if weights := [p for p in elsewhere if p.ndim > 1]:
                self._move(weights, self._adapt(weights, group), group)
            if biases := [p for p in elsewhere if p.ndim <= 1]:
                self._move(biases, [p.grad for p in biases], group)
        return loss

    def _step_in_blocks(self, p: Tensor, group: dict) -> None:
        """The whole update of one parameter, in blocks: memory bounds it, and so a value is fetched only twice."""
        if not _in_memory(self.state[p]["momentum"], p).is_contiguous():  # loaded from a model of another layout
            self.state[p]["momentum"] = torch.empty_like(p).copy_(self.state[p]["momentum"])
        rows = (_in_memory(x, p).reshape(-1).split(BLOCK) for x in (p, p.grad, self.state[p]["momentum"]))
        blocks, decay = list(zip(*rows, strict=True)), group["weight_decay"]
        scratch, ratio = torch.empty_like(blocks[0][0]), 1.0
        if p.ndim > 1:
            squares = [0.0, 0.0]
            for weight, grad, _ in blocks:
                update = torch.add(grad, weight, alpha=decay, out=scratch[: len(weight)])
                norms = (float(torch.linalg.vector_norm(x)) for x in (weight, update))
                squares = [total + norm**2 for total, norm in zip(squares, norms, strict=True)]
            if all(squares):
                ratio = group["trust_coefficient"] * math.sqrt(squares[0] / squares[1])
        for weight, grad, momentum in blocks:
            if p.ndim > 1:
                grad = torch.add(grad, weight, alpha=decay, out=scratch[: len(weight)]).mul_(ratio)
            momentum.mul_(group["momentum"]).add_(grad)
            weight.add_(momentum, alpha=-group["lr"])

    def _adapt(self, params: list[Tensor], group: dict) -> list[Tensor]:
        updates = torch._foreach_add([p.grad for p in params], params, alpha=group["weight_decay"])
        # Norms of all parameters in one tensor: no read-back of a single number, so no wait for the device.
        norms = torch.stack(torch._foreach_norm(params))
        update_norms = torch.stack(torch._foreach_norm(updates))
        ratio = group["trust_coefficient"] * norms / update_norms
        ratio = torch.where((norms > 0) & (update_norms > 0), ratio, 1.0)
        torch._foreach_mul_(updates, list(ratio.unbind()))
        return updates

    def _move(self, params: list[Tensor], updates: list[Tensor], group: dict) -> None:
        buffers = [self.state[p]["momentum"] for p in params]
        torch._foreach_mul_(buffers, group["momentum"])
        torch._foreach_add_(buffers, updates)
        torch._foreach_add_(params, buffers, alpha=-group["lr"])


def _in_memory(x: Tensor, like: Tensor) -> Tensor:
    """``x`` with its dimensions in the order in which those of ``like`` lie in memory (channels last or first)."""
    return x.permute(sorted(range(like.ndim), key=lambda d: -like.stride(d)))


def parameter_groups(module: nn.Module, *, lr: float, lr_biases: float) -> list[dict]:
    """Two groups with their own rate: weights, and biases with normalisation parameters (at most one dimension).

    ``base_lr`` keeps each group's starting rate for ``set_learning_rates``.
    """
    weights = [p for p in module.parameters() if p.requires_grad and p.ndim > 1]
    biases = [p for p in module.parameters() if p.requires_grad and p.ndim <= 1]
    return [
        {"params": weights, "lr": lr, "base_lr": lr},
        {"params": biases, "lr": lr_biases, "base_lr": lr_biases, "weight_decay": 0.0},
    ]


def cosine(step: int, total_steps: int) -> float:
    """Share of the starting rate at ``step`` of ``total_steps``: cosine decay to 0 without restarts or warm-up."""
    return 0.5 * (1 + math.cos(math.pi * step / total_steps))


def set_learning_rates(optimizer: torch.optim.Optimizer, share: float) -> None:
    """Set each group's rate to its ``base_lr`` times ``share``."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * share
