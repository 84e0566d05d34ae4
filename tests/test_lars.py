"""LARS by hand, against its own formula over many steps, and through save and load."""

import copy
import io
import math

import pytest
import torch
from torch import nn

from decur_core import lars
from decur_core.lars import LARS, cosine, parameter_groups, set_learning_rates


def parameter(values, gradient, dtype=torch.float64):
    p = nn.Parameter(torch.tensor(values, dtype=dtype))
    p.grad = None if gradient is None else torch.tensor(gradient, dtype=dtype)
    return p


def step(p, **options):
    optimizer = LARS([p], **({"lr": 0.5, "momentum": 0.9, "weight_decay": 0.1, "trust_coefficient": 0.01} | options))
    optimizer.step()
    return optimizer


def test_one_step_of_a_weight_matrix_by_hand():
    # |p| = 5; d = g + 0.1 p = (0.3, 0.4) with |d| = 0.5; d * 0.01 * 5 / 0.5 = (0.03, 0.04); times lr: (0.015, 0.02)
    p = parameter([[3.0, 4.0]], [[0.0, 0.0]])
    step(p)
    torch.testing.assert_close(p.data, torch.tensor([[2.985, 3.98]], dtype=torch.float64), rtol=1e-14, atol=0)


def test_one_step_of_a_convolution_by_hand():
    # |p| = sqrt(4 * 2^2) = 4; d = 1 + 0.1 * 2 = 1.2 each, |d| = 2.4; d' = 1.2 * 0.01 * 4 / 2.4 = 0.02; step 0.01
    p = parameter([[[[2.0, 2.0], [2.0, 2.0]]]], [[[[1.0, 1.0], [1.0, 1.0]]]])
    step(p)
    torch.testing.assert_close(p.data, torch.full_like(p.data, 1.99), rtol=1e-14, atol=0)


@pytest.mark.parametrize("values", [[3.0, 4.0], 7.0], ids=["bias or norm", "scalar"])
def test_one_step_without_decay_and_adaptation_by_hand(values):
    p = parameter(values, [1.0, -2.0] if isinstance(values, list) else 1.0)
    before, gradient = p.detach().clone(), p.grad.clone()
    step(p)
    torch.testing.assert_close(p.data, before - 0.5 * gradient, rtol=1e-14, atol=0)


def test_second_step_carries_momentum():
    bias, weight = parameter([1.0], [2.0]), parameter([[2.0]], [[1.0]])
    optimizer = LARS([bias, weight], lr=0.5, momentum=0.9, weight_decay=0.0, trust_coefficient=0.01)
    optimizer.step()  # m = 2, p = 1 - 1 = 0;          m = 0.01 * 2 / 1 * 1 = 0.02, p = 2 - 0.01 = 1.99
    optimizer.step()  # m = 1.8 + 2 = 3.8, p = -1.9;   m = 0.018 + 0.0199 = 0.0379, p = 1.99 - 0.01895
    assert bias.item() == pytest.approx(-1.9, rel=1e-14) and weight.item() == pytest.approx(1.97105, rel=1e-14)


def test_zero_norms_leave_the_update_as_it_is():
    zero_weight = parameter([[0.0, 0.0]], [[3.0, 4.0]])
    step(zero_weight)
    torch.testing.assert_close(zero_weight.data, torch.tensor([[-1.5, -2.0]], dtype=torch.float64))
    nothing_to_do = parameter([[3.0, 4.0]], [[0.0, 0.0]])
    step(nothing_to_do, weight_decay=0.0)
    assert nothing_to_do.tolist() == [[3.0, 4.0]]
    both = parameter([[0.0, 0.0]], [[0.0, 0.0]])
    step(both)
    assert both.tolist() == [[0.0, 0.0]]


def test_one_zero_parameter_does_not_touch_the_others():
    zero, usual, alone = (
        parameter([[0.0, 0.0]], [[0.0, 0.0]]),
        parameter([[3.0, 4.0]], [[1.0, 0.0]]),
        parameter([[3.0, 4.0]], [[1.0, 0.0]]),
    )
    LARS([zero, usual], lr=0.5).step()
    LARS([alone], lr=0.5).step()
    assert torch.equal(usual, alone) and not torch.isnan(zero).any()


def test_parameters_without_a_gradient_stay_and_take_no_state():
    still, moved = parameter([[3.0, 4.0]], None), parameter([[3.0, 4.0]], [[1.0, 0.0]])
    optimizer = LARS([still, moved], lr=0.5)
    optimizer.step()
    assert still.tolist() == [[3.0, 4.0]] and still not in optimizer.state and moved in optimizer.state
    still.grad = torch.ones_like(still)  # comes in later, as an unfrozen layer does
    optimizer.step()
    assert still.tolist() != [[3.0, 4.0]]
    LARS([parameter([1.0], None)], lr=0.1).step()


def test_parameters_of_one_dimension_are_left_out_in_any_group():
    bias, weight = parameter([3.0, 4.0], [1.0, 0.0]), parameter([[3.0, 4.0]], [[1.0, 0.0]])
    groups = [{"params": [weight, bias], "weight_decay": 10.0}, {"params": [parameter([5.0], [1.0])], "lr": 2.0}]
    optimizer = LARS(groups, lr=0.5, momentum=0.0)
    optimizer.step()
    assert bias.tolist() == [2.5, 4.0]
    assert optimizer.param_groups[1]["params"][0].item() == 3.0


def network(dtype=torch.float64):
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 5), nn.Linear(5, 3)
    return nn.Sequential(*layers).to(dtype)


def set_gradients(model, i):
    """The gradients that a loss of step ``i`` leaves: of a fresh random batch."""
    g = torch.Generator().manual_seed(i)
    dtype = next(model.parameters()).dtype
    model.zero_grad()
    model(torch.randn(6, 3, 4, 4, generator=g).to(dtype)).square().mean().backward()


def test_trajectory_equals_the_formula_over_50_steps():
    lr, lr_biases, momentum, decay, trust, total = 0.3, 0.02, 0.9, 1e-2, 0.02, 50
    model, other = network(), network()
    optimizer = LARS(
        parameter_groups(model, lr=lr, lr_biases=lr_biases),
        lr=lr,
        momentum=momentum,
        weight_decay=decay,
        trust_coefficient=trust,
    )
    velocity = {name: torch.zeros_like(p) for name, p in other.named_parameters()}
    with torch.no_grad():
        for m in (model, other):
            m[5].weight.zero_()  # starts at norm zero
    for i in range(total):
        set_gradients(model, i)
        set_learning_rates(optimizer, cosine(i, total))
        optimizer.step()

        set_gradients(other, i)
        share = (1 + math.cos(math.pi * i / total)) / 2
        for name, p in other.named_parameters():
            update = p.grad
            if p.ndim > 1:
                update = update + decay * p.data
                norms = p.data.norm().item(), update.norm().item()
                if norms[0] > 0 and norms[1] > 0:
                    update = update * (trust * norms[0] / norms[1])
            velocity[name] = momentum * velocity[name] + update
            p.data -= share * (lr if p.ndim > 1 else lr_biases) * velocity[name]
        for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-13, msg=f"{name} at step {i}")
    start = dict(network().named_parameters())
    assert all((p - start[name]).norm() > 1e-3 for name, p in model.named_parameters() if p.ndim > 1)


def train(model, optimizer, steps):
    for i in steps:
        set_gradients(model, i)
        set_learning_rates(optimizer, cosine(i, 8))
        optimizer.step()


def test_state_survives_save_and_load():
    def made():
        model = network(torch.float32)
        return model, LARS(parameter_groups(model, lr=0.2, lr_biases=0.01), lr=0.2, trust_coefficient=0.02)

    whole, optimizer = made()
    train(whole, optimizer, range(8))
    first, optimizer = made()
    train(first, optimizer, range(4))
    file = io.BytesIO()
    torch.save({"model": first.state_dict(), "optimizer": optimizer.state_dict()}, file)
    saved = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    resumed, optimizer = made()
    resumed.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    assert all(optimizer.state[p]["momentum"].any() for p in resumed.parameters())
    train(resumed, optimizer, range(4, 8))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_channels_last_parameters_follow_the_same_path():
    plain, last = network(), network().to(memory_format=torch.channels_last)
    optimizers = [LARS(m.parameters(), lr=0.3, trust_coefficient=0.02) for m in (plain, last)]
    for i in range(5):
        for model, optimizer in zip((plain, last), optimizers, strict=True):
            set_gradients(model, i)
            optimizer.step()
    for p, q in zip(plain.parameters(), last.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)
    kernel = last[0].weight
    assert kernel.is_contiguous(memory_format=torch.channels_last)
    assert optimizers[1].state[kernel]["momentum"].stride() == kernel.stride()


def test_closure_is_called_once_with_gradients_on():
    p = parameter([1.0], None)
    calls = []

    def closure():
        loss = (p * 3).sum()
        loss.backward()
        calls.append(torch.is_grad_enabled())
        return loss

    assert LARS([p], lr=0.1).step(closure).item() == 3.0
    assert calls == [True] and p.item() == pytest.approx(0.7)
    assert LARS([p], lr=0.1).step() is None


@pytest.mark.parametrize(
    ("name", "value"),
    [("lr", -0.1), ("weight_decay", -1e-6), ("trust_coefficient", -1.0), ("momentum", 1.0), ("momentum", -0.1)],
)
def test_impossible_numbers_are_refused_by_name_and_value(name, value):
    with pytest.raises(ValueError, match=f"LARS: {name} = {value}; must"):
        LARS([parameter([1.0], None)], **({"lr": 0.1} | {name: value}))


def test_defaults_are_those_of_the_paper():
    group = LARS([parameter([1.0], None)], 0.2).param_groups[0]
    assert {k: group[k] for k in ("lr", "momentum", "weight_decay", "trust_coefficient")} == {
        "lr": 0.2,
        "momentum": 0.9,
        "weight_decay": 1e-6,
        "trust_coefficient": 0.001,
    }


def test_groups_hold_every_trained_parameter_once():
    model = network()
    model[4].requires_grad_(False)
    weights, biases = parameter_groups(model, lr=0.2, lr_biases=0.0048)
    assert [p.ndim for p in weights["params"]] == [4, 2] and {p.ndim for p in biases["params"]} == {1}
    found = sorted(id(p) for group in (weights, biases) for p in group["params"])
    assert found == sorted(id(p) for p in model.parameters() if p.requires_grad)
    assert (weights["lr"], biases["lr"], biases["weight_decay"]) == (0.2, 0.0048, 0.0)


def test_cosine_falls_from_one_to_zero_in_both_groups():
    assert [cosine(s, 4) for s in (0, 2, 4)] == pytest.approx([1, 0.5, 0])
    assert all(cosine(s, 100) > cosine(s + 1, 100) for s in range(100))
    optimizer = LARS(parameter_groups(network(), lr=0.2, lr_biases=0.0048), lr=0.2)
    for share in (0.5, 0.25):  # of the starting rate, not of the one before
        set_learning_rates(optimizer, share)
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.2 * share, 0.0048 * share])


def test_blocks_through_a_cache_and_whole_lists_are_the_same_steps(monkeypatch):
    """What lies together in a CPU's memory is stepped in blocks, all else, as on GPUs, in lists of tensors."""
    monkeypatch.setattr(lars, "BLOCK", 7)
    torch.manual_seed(0)
    shapes = [(4, 3, 5, 2), (6, 9), (11,), (5, 1, 1, 1)]
    dense = [nn.Parameter(torch.randn(shape, dtype=torch.float64)) for shape in shapes]
    dense[0] = nn.Parameter(dense[0].data.contiguous(memory_format=torch.channels_last))
    spread = [nn.Parameter(p.detach().new_zeros(*p.shape, 2)[..., 0]) for p in dense]
    for p, q in zip(dense, spread, strict=True):
        q.data.copy_(p.data)
    calls, real = [], LARS._step_in_blocks
    monkeypatch.setattr(LARS, "_step_in_blocks", lambda self, p, group: calls.append(p) or real(self, p, group))
    optimizers = [LARS(params, lr=0.3, weight_decay=0.01) for params in (dense, spread)]
    for _ in range(3):
        for p, q in zip(dense, spread, strict=True):
            gradient = torch.randn(p.shape, dtype=torch.float64)  # of another layout than the first one's
            p.grad, q.grad = gradient, torch.stack([gradient, gradient], -1)[..., 0]
        for optimizer in optimizers:
            optimizer.step()
    assert len(calls) == 12 and all(any(p is called for p in dense) for called in calls)
    for p, q in zip(dense, spread, strict=True):
        torch.testing.assert_close(p.data, q.data, rtol=1e-13, atol=1e-15)


def test_momentum_of_another_layout_goes_on():
    torch.manual_seed(0)
    weights, gradients = torch.randn(4, 3, 5, 2), torch.randn(2, 4, 3, 5, 2)
    plain = nn.Parameter(weights.clone())
    last = nn.Parameter(weights.contiguous(memory_format=torch.channels_last))
    first, second = (LARS([p], lr=0.3) for p in (plain, last))
    plain.grad = last.grad = gradients[0]
    first.step()
    second.step()
    second.load_state_dict(copy.deepcopy(first.state_dict()))  # which holds the tensors themselves
    plain.grad = last.grad = gradients[1]
    first.step()
    second.step()
    torch.testing.assert_close(plain.data, last.data, rtol=1e-6, atol=1e-8)
