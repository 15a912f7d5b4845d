"""QDQ against numbers with known answers: closed forms, worked examples, and hand-made exact networks."""

import functools
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from torch import nn

import common
import qdq
from qdq import QDQ, Args, ConsistencyModel, ScoreModel, consistency_loss, noise_levels, truncated_returns

F64 = torch.float64


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def exact_denoiser(mean, std):
    """D* of data ~ N(mean, std^2)."""
    return lambda x, t, obs_action: (std**2 * x + t**2 * mean) / (std**2 + t**2)


def exact_consistency(mean, std):
    """f* of the same data: the flow from (x, t) to T_MIN in closed form."""
    return lambda x, t, obs_action: mean + (x - mean) * ((std**2 + qdq.T_MIN**2) / (std**2 + t**2)).sqrt()


def make_data(n=64, obs_dim=3, action_dim=2, terminal=0.0):
    draw = generator(9)
    obs, next_obs = (torch.randn(n, obs_dim, generator=draw).numpy() for _ in range(2))
    action = (2 * torch.rand(n, action_dim, generator=draw) - 1).numpy()
    reward, no = torch.randn(n, generator=draw).numpy(), np.zeros(n, bool)
    data = common.Dataset.from_arrays("made", obs, action, reward, no, no, None, next_obs=next_obs)
    data.terminal.fill_(terminal)
    return data


def make_learner(data=None, seed=0, **settings):
    small = dict(device="cpu", hidden=16, return_hidden=16, layers=2, batch_size=8, q_samples=4, levels=10)
    data = data or make_data()
    learner = QDQ(Args(**small | settings), data, seed)
    x = torch.linspace(-1, 1, len(data))[:, None]
    learner.use_returns(torch.cat([data.obs, data.action, x], 1), torch.tensor([-10.0, 30.0]))
    return learner


def snapshot(module):
    return [tensor.clone() for tensor in module.state_dict().values()]


def same(module, before):
    return all(torch.equal(a, b) for a, b in zip(module.state_dict().values(), before))


# Truncated returns


@pytest.mark.parametrize(
    "length, windows, start, value",
    [
        (1, 1, 0, 1.0), (199, 1, 0, 86.46670), (200, 1, 0, 86.60203), (201, 2, 10, 85.33365), (210, 2, 10, 86.60203),
        (211, 3, 20, 85.33365), (700, 51, 500, 86.60203), (999, 81, 800, 86.46670), (1000, 81, 800, 86.60203),
        (1191, 100, 990, 86.60203), (5000, 100, 990, 86.60203),
    ],
)  # fmt: skip
def test_windows_of_one_episode(length, windows, start, value):
    end = torch.zeros(length, dtype=torch.bool)
    end[-1] = True
    starts, values = truncated_returns(torch.ones(length), end, 0.99, 200, 10)
    assert starts.tolist() == list(range(0, 10 * windows, 10)) and starts[-1] == start
    assert values[-1].item() == pytest.approx(value, abs=1e-4)


def test_toy_window_values():
    end = torch.arange(12) == 11
    starts, values = truncated_returns(torch.arange(1.0, 13.0), end, 0.5, 5, 2)
    assert starts.tolist() == [0, 2, 4, 6, 8]
    assert values.tolist() == pytest.approx([3.5625, 7.4375, 11.3125, 15.1875, 18.25], abs=1e-4)


def test_windows_of_many_episodes_equal_the_loop():
    """Window by window as the official code scans each trajectory, over episodes of 1 to 60 steps."""
    draw = generator()
    reward, gamma, window, stride, most = torch.randn(1500, generator=draw).double(), 0.9, 20, 3, 8
    end = torch.rand(1500, generator=draw) < 0.04
    end[-1] = True
    expected, first = [], 0
    for last in end.nonzero().squeeze(1).tolist():
        rewards = reward[first : last + 1].tolist()
        for begin in range(0, most * stride, stride):
            expected.append((first + begin, sum(gamma**i * r for i, r in enumerate(rewards[begin : begin + window]))))
            if begin + window >= len(rewards):
                break
        first = last + 1
    starts, values = truncated_returns(reward, end, gamma, window, stride, most)
    assert starts.tolist() == [start for start, _ in expected]
    assert torch.allclose(values, torch.tensor([value for _, value in expected], dtype=F64))


def test_return_dataset_ends_episodes_at_jumps_terminals_and_the_last_row():
    n, ends = 12, [3, 7, 11]  # a jump, a terminal, the last row
    obs = np.arange(n + 1, dtype=np.float32)[:, None]
    next_obs = obs[1:].copy()
    next_obs[3] = 50.0
    terminal = np.arange(n) == 7
    data = common.Dataset.from_arrays(
        "made", obs[:-1], obs[:-1] / 20, np.arange(1.0, n + 1), terminal, terminal & False, None, next_obs=next_obs
    )
    rows, (low, high) = qdq.return_dataset(data, 0.5, window=2, stride=1)
    expected = [(i, i + 1 + (0.5 * (i + 2) if i not in ends else 0)) for i in range(n) if i not in ends]
    assert rows[:, 0].tolist() == [i for i, _ in expected] and torch.equal(rows[:, 1], rows[:, 0] / 20)
    values = torch.tensor([value for _, value in expected])
    assert low == values.min() and high == values.max()
    assert torch.allclose(low + (rows[:, 2] + 1) / 2 * (high - low), values)


def test_scaling_to_the_unit_interval_and_back():
    draw = generator()
    obs, reward = torch.randn(5000, 2, generator=draw).numpy(), 100 * torch.randn(5000, generator=draw).numpy()
    no = np.zeros(5000, bool)
    data = common.Dataset.from_arrays("made", obs, obs, reward, no, no, None, next_obs=obs)  # every row is an episode
    rows, q_range = qdq.return_dataset(data, 0.99, 200, 10)
    x = rows[:, -1]
    assert x.min() == -1 and x.max() == 1
    learner = make_learner()
    learner.use_returns(rows, q_range)
    assert torch.allclose(learner.to_return(x), torch.from_numpy(reward), rtol=1e-5, atol=1e-3)
    for low, high, spread in ((115.09845, 334.08118, 10.949137), (-86.602036, 0.0, 4.330102)):
        learner.q_range.copy_(torch.tensor([low, high]))
        samples = learner.to_return(torch.tensor([[0.1, -0.1]]))  # a standard deviation of 0.1
        assert samples.std(dim=1, correction=0).item() == pytest.approx(spread, abs=1e-4)


def test_data_without_spread_is_refused():
    no, zero = np.zeros(4, bool), np.zeros((4, 1))
    data = common.Dataset.from_arrays("flat", zero, zero, np.ones(4), no, no, None, next_obs=zero + 1)
    with pytest.raises(common.UserError, match="no distribution"):
        qdq.return_dataset(data, 0.99, 200, 10)


# Score model


@pytest.mark.parametrize("t", [0.002, 0.05, 0.5, 3.0, 80.0])
def test_score_loss_is_one_at_every_level_for_a_silent_network(t, monkeypatch):
    model = ScoreModel(2, 16)
    nn.init.zeros_(model.net[-1].weight)
    monkeypatch.setattr(qdq, "sample_t", lambda n, generator: torch.full((n, 1), t))
    x = 0.5 * torch.randn(200_000, 1, generator=generator(1))
    with torch.no_grad():
        loss = qdq.score_loss(model, x, torch.zeros(len(x), 2), generator())
    assert loss.item() == pytest.approx(1.0, abs=0.01)


def test_training_levels_are_lognormal_and_not_cut():
    log_t = qdq.sample_t(400_000, generator()).log()
    assert log_t.shape == (400_000, 1)
    assert log_t.mean().item() == pytest.approx(-1.2, abs=0.01) and log_t.std().item() == pytest.approx(1.2, abs=0.01)
    assert log_t.min() < math.log(qdq.T_MIN)


# Consistency model


def unit_raw(model):
    """The model with raw network 1, so that f(0, t) = k_out and f(1, t) - f(0, t) = k_skip."""
    model.raw = lambda x, t, obs_action: torch.ones_like(x)
    return model.double()


def test_consistency_coefficients_and_boundary():
    model = ConsistencyModel(2, 16)
    x, pair = torch.randn(50, 1, generator=generator()), torch.zeros(50, 2)
    for weight in model.parameters():
        nn.init.normal_(weight)
    assert torch.allclose(model(x, torch.full_like(x, 0.002), pair), x, atol=1e-7)
    model = unit_raw(model)
    for t, k_skip, k_out in ((80.0, 3.90629e-5, 0.4999777), (0.5, 0.502004, 0.352139)):
        at_zero, at_one = (model(torch.full((1, 1), x, dtype=F64), torch.full((1, 1), t), None).item() for x in (0, 1))
        assert at_zero == pytest.approx(k_out, rel=1e-5) and at_one - at_zero == pytest.approx(k_skip, rel=1e-5)


def test_score_coefficients():
    model = unit_raw(ScoreModel(2, 16))
    for t in (0.002, 0.5, 80.0):
        at_zero, at_one = (model(torch.full((1, 1), x, dtype=F64), torch.full((1, 1), t), None).item() for x in (0, 1))
        assert at_zero == pytest.approx(t * 0.5 / math.sqrt(t**2 + 0.25), rel=1e-6)  # 0.002 at T_MIN, not 0
        assert at_one - at_zero == pytest.approx(0.25 / (t**2 + 0.25), rel=1e-6)


def test_input_scaling_and_time_embedding():
    """What the raw network is given at t = 80: c_in x = 0.01249976 x and Fourier features of ln(t) / 4 = 1.0955067."""
    model, seen = ScoreModel(2, 16), {}
    model.time.register_forward_pre_hook(lambda _, inputs: seen.update(time=inputs[0]))
    model.net.register_forward_pre_hook(lambda _, inputs: seen.update(net=inputs[0]))
    model.raw(torch.tensor([[10.0]]), torch.tensor([[80.0]]), torch.tensor([[3.0, 4.0]]))
    angle = 2 * math.pi * 1.0955067 * model.freqs
    assert torch.allclose(seen["time"][0], torch.cat([angle.sin(), angle.cos()]), atol=1e-3)
    assert seen["net"].shape == (1, 35)
    assert seen["net"][0, :3].tolist() == pytest.approx([3.0, 4.0, 0.1249976], rel=1e-5)


def test_noise_levels():
    levels = noise_levels(1000)
    assert levels.dtype == F64 and len(levels) == 1000
    expected = {0: 80.0, 1: 79.563825, 500: 2.503974, 998: 0.00205020, 999: 0.002}
    assert all(levels[i].item() == pytest.approx(value, rel=1e-5) for i, value in expected.items())
    expected = [80.0, 57.58598, 40.78557, 28.37458]
    assert noise_levels(18)[:4].tolist() == pytest.approx(expected, abs=1e-5)
    assert noise_levels(18)[-2].item() == pytest.approx(0.00753, abs=1e-5)


def test_distillation_draws_every_level_but_the_ends():
    """The student sees t_1 .. t_{N-2}, its target the next lower level each time."""
    levels, seen = noise_levels(12).float(), {}

    def record(name):
        return lambda x, t, obs_action: seen.setdefault(name, t) * 0 + x

    x = torch.zeros(5000, 1)
    consistency_loss(record("student"), record("target"), exact_denoiser(0.0, 1.0), x, None, levels, generator())
    index = {name: torch.searchsorted(-levels, -t.squeeze(1)) for name, t in seen.items()}
    assert index["student"].unique().tolist() == list(range(1, 11))
    assert torch.equal(index["target"], index["student"] + 1)


@pytest.mark.parametrize("n, low, high", [(1000, 0, 1e-16), (18, 1.4e-6, 1.7e-6)])
def test_distillation_loss_of_the_exact_flow(n, low, high):
    """Float64, data N(.3, .1^2): only Heun's error is left (2.8e-17 and 1.5e-6); Euler has 6e-13 and 7e-6."""
    x = 0.3 + 0.1 * torch.randn(100_000, 1, dtype=F64, generator=generator(1))
    flow, teacher = exact_consistency(0.3, 0.1), exact_denoiser(0.3, 0.1)
    loss = consistency_loss(flow, flow, teacher, x, None, noise_levels(n), generator())
    assert low <= loss.item() <= high


def test_distillation_moves_only_the_student():
    x, pair = torch.randn(32, 1), torch.randn(32, 4)
    student, average, teacher = ConsistencyModel(4, 16), ConsistencyModel(4, 16), ScoreModel(4, 16)
    consistency_loss(student, average, teacher, x, pair, noise_levels(10).float(), generator()).backward()
    assert all(weight.grad is not None for weight in student.parameters())
    assert all(weight.grad is None for net in (average, teacher) for weight in net.parameters())


def test_one_step_samples_of_the_exact_flow():
    pair = torch.zeros(4000, 1, dtype=F64)
    samples = qdq.sample_returns(qdq.one_step, exact_consistency(0.3, 0.1), pair, 50, generator())
    assert samples.shape == (4000, 50)
    assert samples.mean().item() == pytest.approx(0.29962, rel=0.01)
    assert samples.std().item() == pytest.approx(0.100020, rel=0.01)


@pytest.mark.parametrize("std, end", [(0.5, 0.825646), (0.1, 0.408608)])
def test_heun_sampler_path(std, end):
    x = qdq.many_steps(exact_denoiser(0.3, std), torch.full((1, 1), 80.0, dtype=F64), None)
    assert x.item() == pytest.approx(end, abs=1e-6)


# Uncertainty and targets


def test_uncertainty_is_the_population_std_of_each_row_in_units_of_the_return():
    learner = make_learner(q_samples=50)  # returns from -10 to 30: half a range is 20
    learner.consistency = lambda x, t, obs_action: obs_action[:, :1] * x / 80  # x ~ N(0, obs^2)
    spread = torch.linspace(0.1, 1.0, 4000)
    obs = torch.cat([spread[:, None], torch.zeros(4000, 2)], 1)
    h = learner.uncertainty(obs, torch.zeros(4000, 2), generator())
    ratio = h / (20 * spread)
    assert ratio.mean().item() == pytest.approx(0.98491, abs=0.006)  # 0.99491 with n - 1
    assert ratio.std().item() == pytest.approx(0.0997, rel=0.05)  # a mix of rows would add the spread of `spread`
    swapped = learner.uncertainty(obs.flip(0), torch.zeros(4000, 2), generator())
    assert (swapped / (20 * spread.flip(0))).std() < 0.11


def test_every_draw_of_the_uncertainty_is_fresh():
    learner = make_learner()
    obs, action = learner.data.obs, learner.data.action
    first, second = (learner.uncertainty(obs, action, learner.generator) for _ in range(2))
    assert not torch.isclose(first, second).any()


@pytest.mark.parametrize("beta, flagged", [(0.8, 51), (0.9, 26)])
def test_flagged_actions(beta, flagged):
    h = torch.arange(1.0, 257.0)
    weight = qdq.penalty_weight(h, beta, "keep")
    assert (weight != 1).sum() == flagged and torch.equal(weight[-flagged:], 1 / h[-flagged:])
    assert (qdq.penalty_weight(torch.full((256,), 3.0), beta, "paper") == torch.tensor(beta)).all()


@pytest.mark.parametrize(
    "penalty, alpha, weight, mixed",
    [
        ("paper", 0.992, [0.8, 0.8, 0.1, 0.8], [10.88416, 17.791488, 28.48616, 2]),
        ("mild", 0.99, [1, 1, 1.09, 1], [10.9, 17.82, 28.72673, 2]),
        ("keep", 0.01, [1, 1, 0.1, 1], [10.9, 17.82, 2.2373, 2]),
    ],
)
def test_worked_targets(penalty, alpha, weight, mixed):
    h, reward = torch.tensor([2.0, 4.0, 10.0, 5.0]), torch.tensor([1.0, 0.0, -1.0, 2.0])
    next_q = torch.tensor([10.0, 18.0, 30.0, 40.0])
    w = qdq.penalty_weight(h, 0.8, penalty)
    assert w.tolist() == pytest.approx(weight, abs=1e-6)
    high, low = qdq.critic_targets(reward, 0.99 * torch.tensor([1.0, 1.0, 1.0, 0.0]), next_q, w)
    assert high.tolist() == pytest.approx([10.9, 17.82, 28.7, 2], abs=1e-5)
    if penalty == "paper":
        assert low.tolist() == pytest.approx([8.92, 14.256, 1.97, 2], abs=1e-5)
    assert (alpha * high + (1 - alpha) * low).tolist() == pytest.approx(mixed, abs=1e-4)


def test_critic_gradient_is_clipped_jointly():
    learner = make_learner(clip_grad=0.01)
    learner.critic_step(learner.data.sample(32, generator(3)))
    norm = torch.cat([weight.grad.flatten() for weight in learner.critic.parameters()]).norm().item()
    assert norm == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize(
    "beta, penalty, h, all_flagged, expected",
    [
        (0.9, "paper", 20.0, False, 92.6612), (0.8, "paper", 20.0, False, 86.3260), (0.9, "keep", 20.0, False, 100.0),
        (0.9, "mild", 20.0, False, 100.0), (0.9, "paper", 10.0, True, 58.3839), (0.9, "paper", 2.0, True, 71.6332),
    ],
)  # fmt: skip
def test_fixed_point_of_one_state(beta, penalty, h, all_flagged, expected, monkeypatch):
    """r = 1 for ever: Q = 1 / (1 - gamma m), m = alpha + (1 - alpha) w."""
    if all_flagged:
        monkeypatch.setattr(torch, "quantile", lambda h, beta: torch.tensor(0.0))
    one, q = torch.ones(1), torch.zeros(1, dtype=F64)
    w = qdq.penalty_weight(torch.full((1,), h), beta, penalty)
    for _ in range(3000):
        high, low = qdq.critic_targets(one, 0.99 * one, q, w)
        q = 0.992 * high + 0.008 * low
    assert q.item() == pytest.approx(expected, rel=1e-3)


def test_fixed_point_with_a_tenth_flagged():
    """26 of 256 next actions flagged, H = 20: the horizon shrinks from 100 to 87.14."""
    h = 20 + 1e-9 * torch.arange(256, dtype=F64)
    w = qdq.penalty_weight(h, 0.9, "paper").double()
    q = torch.zeros(256, dtype=F64)
    for _ in range(3000):
        high, low = qdq.critic_targets(torch.ones(256), torch.full((256,), 0.99), q, w)
        q = (0.992 * high + 0.008 * low).mean().expand(256)
    assert q[0].item() == pytest.approx(87.1405, rel=1e-3)


@pytest.mark.parametrize("most", [1.0, 4.0])
def test_target_action(most):
    """Clipped noise of TD3 around the target policy's mean; with target_sample also the policy's own spread."""
    data = make_data()
    data.max_action = most
    obs, spread = torch.zeros(100_000, 3), {}
    for target_sample in (False, True):
        learner = make_learner(data, target_sample=target_sample)
        learner.actor_target.net[-1].weight.zero_()
        learner.actor.net[-1].bias.data.fill_(5.0)  # the online policy must not matter
        learner.actor_target.log_std.fill_(math.log(0.2))
        action = learner.next_action(obs)
        assert action.abs().max() <= most and abs(action.mean().item()) < 0.01 * most
        spread[target_sample] = action.std().item() / most
        assert target_sample or action.abs().max() == 0.5 * most
        learner.actor_target.net[-1].bias.fill_(5.0)
        assert learner.next_action(obs).max() == most
    assert spread[False] == pytest.approx(0.198, abs=0.004) and spread[True] == pytest.approx(0.281, abs=0.004)


def test_policy_scales_with_the_actions():
    obs, policies = torch.randn(5, 3, generator=generator()), []
    for most in (1.0, 4.0):
        torch.manual_seed(0)
        policies.append(qdq.Actor(3, 2, 8, 2, most)(obs))
    (mean, log_std), (wide_mean, wide_log_std) = policies
    assert torch.allclose(wide_mean, 4 * mean) and torch.allclose(wide_log_std.exp(), 4 * log_std.exp())


# Actor


class FreeActor(nn.Module):
    """A policy whose mean (after the tanh) and log_std are free numbers."""

    def __init__(self, mean, log_std=0.0, dim=1):
        super().__init__()
        self.mean = nn.Parameter(torch.full((dim,), mean))
        self.log_std = nn.Parameter(torch.full((dim,), log_std))

    def forward(self, obs):
        return self.mean.expand(len(obs), -1), self.log_std


@pytest.mark.parametrize("value, bound", [(-9.0, -5), (1.5, 1.5), (9.0, 2)])
def test_bounds_of_the_spread(value, bound):
    actor = qdq.Actor(3, 2, 8, 2, 1.0)
    actor.log_std.data.fill_(value)
    assert (actor(torch.zeros(1, 3))[1] == bound).all()


@pytest.mark.parametrize("bc_coef, mean, log_std", [(0.8, -0.21572, -1.52771), (0.0, 0.5, 0.3)])
def test_equilibrium_of_value_and_likelihood(bc_coef, mean, log_std):
    """Q = -(a - .5)^2 against data of mean -.3 and variance .04: no gradient is left there."""
    actor, obs, action = FreeActor(mean, log_std), torch.zeros(2, 1), torch.tensor([[-0.5], [-0.1]])

    def critic(obs, action):  # the second is less everywhere, the first has another slope
        q = -((action - 0.5) ** 2).squeeze(1)
        return torch.stack([q + 4 + 2 * action.squeeze(1), q])

    qdq.pg_loss(actor, critic, obs, action, bc_coef).backward()
    assert actor.mean.grad.item() == pytest.approx(0, abs=1e-3)
    assert actor.log_std.grad.item() == pytest.approx(0, abs=1e-3)


def test_log_prob_sums_over_action_dimensions():
    mean, log_std, action = (torch.randn(5, 3, generator=generator(seed)) for seed in range(3))
    expected = torch.distributions.Normal(mean, log_std.exp()).log_prob(action).sum(-1)
    assert torch.allclose(qdq.log_prob(mean, log_std, action), expected)


@pytest.mark.parametrize(
    "advantage, weight", [(0.0, 1.0), (0.8, 100.0), (0.767, 99.68), (0.5, 20.0855), (-1, 0.00247875)]
)
def test_awr_weights(advantage, weight):
    """A data action that is better by `advantage` than the others in its state; the first critic is never the least."""
    obs, action, seen = 5.0 * torch.arange(4)[:, None], torch.full((4, 1), 0.7), []

    def critic(obs, drawn):
        seen.append(drawn)
        q = advantage * (drawn == 0.7).float().squeeze(1) + obs.squeeze(1)
        return torch.stack([q + 20 + drawn.squeeze(1), q])

    actor, target = FreeActor(0.2), FreeActor(-0.4)
    loss = qdq.awr_loss(actor, target, critic, obs, action, generator())
    plain = -qdq.log_prob(*actor(obs), action).mean()
    assert (loss / plain).item() == pytest.approx(weight, rel=1e-3)
    drawn = seen[0]
    assert drawn.shape == (4 * 30, 1) and abs(drawn.mean() + 0.4) < 0.3 and drawn.abs().max() > 1  # target, unclipped
    loss.backward()
    plain_gradient = torch.autograd.grad(plain, actor.mean)[0]
    assert actor.mean.grad.item() == pytest.approx(weight * plain_gradient.item(), rel=1e-3)
    assert target.mean.grad is None


@pytest.mark.parametrize("actor_loss", ["pg", "awr"])
def test_actor_update_leaves_no_gradient_in_the_critic(actor_loss):
    learner = make_learner(actor_loss=actor_loss)
    learner.actor_step(learner.data.sample(8, generator()))
    assert all(weight.grad is None for weight in learner.critic.parameters())


# Schedules


def test_learning_rates():
    learner = make_learner(steps=1_000_000, score_steps=100, consistency_steps=100)

    def rate(opt):
        return opt.param_groups[0]["lr"].item()

    learner.actor_count.fill_(499_999)
    learner.policy_update()
    assert rate(learner.actor_opt) == pytest.approx(1.5e-4, abs=1e-9)
    assert rate(learner.critic_opt) == pytest.approx(3e-4)
    for count, factor in ((0, 1.0), (50, 0.5), (99, 0.5 * (1 + math.cos(0.99 * math.pi)))):
        learner.score_count.fill_(count)
        learner.score_update()
        assert rate(learner.score_opt) == pytest.approx(5e-4 * factor, rel=1e-3)
    learner.consistency_count.fill_(95)  # the last of five updates is number 99
    learner.consistency_update()
    rectified = qdq.rectified(torch.tensor(99.0)).item()
    assert rate(learner.consistency_opt) == pytest.approx(4e-4 * factor * rectified, rel=1e-3)


def test_adam_with_the_rectified_rate_is_radam():
    """The same steps as torch.optim.RAdam from the sixth update on, none before."""
    start, draw = torch.zeros(4), generator()
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    adam = torch.optim.Adam([ours], torch.tensor(1e-3), fused=True)
    radam = torch.optim.RAdam([theirs], 1e-3)
    for step in range(400):
        ours.grad = torch.randn(4, generator=draw)
        theirs.grad = ours.grad.clone()
        before = ours.detach().clone(), theirs.detach().clone()
        qdq.set_lr(adam, 1e-3 * qdq.rectified(torch.tensor(float(step))))
        adam.step()
        radam.step()
        if step < 5:
            assert torch.equal(ours, before[0])
        else:
            assert torch.allclose(ours - before[0], theirs - before[1], rtol=1e-3, atol=1e-7)


# Networks


def count(module):
    return sum(weight.numel() for weight in module.parameters())


def test_sizes_of_the_official_networks():
    learner = QDQ(Args(device="cpu"), SimpleNamespace(obs_dim=11, action_dim=3, max_action=1.0), 0)  # Hopper
    for model in (learner.score, learner.consistency):
        assert count(model) == 147_265 and [buffer.numel() for buffer in model.buffers()] == [8]
    assert count(learner.actor) == 135_430 and count(learner.critic) == 2 * 135_681
    for obs_dim, action_dim, width in ((29, 8, 70), (17, 6, 56), (11, 3, 47)):
        assert ScoreModel(obs_dim + action_dim, 256).net[0].in_features == width


def test_networks_start_like_the_official_ones():
    """Xavier-uniform weights, no bias; orthogonal head of the actor with gain sqrt(2); sigma = 1; 32 groups."""
    learner = QDQ(Args(device="cpu"), SimpleNamespace(obs_dim=11, action_dim=3, max_action=1.0), 0)
    for weight in (learner.critic.net[2].weight, learner.actor.net[2].weight, learner.consistency.net[3].weight):
        bound = (6 / 512) ** 0.5
        assert 0.99 * bound < weight.abs().max() <= bound
    for net in (learner.critic, learner.actor, learner.consistency):
        assert all((value == 0).all() for name, value in net.named_parameters() if name.endswith("bias"))
    head = learner.actor.net[-1].weight
    assert torch.allclose(head @ head.T, 2 * torch.eye(3), atol=1e-5)
    assert (learner.actor.log_std == 0).all()
    assert same(learner.critic_target, snapshot(learner.critic)) and same(learner.actor_target, snapshot(learner.actor))
    first, second = learner.critic(torch.randn(4, 11), torch.randn(4, 3))
    assert not torch.isclose(first, second).any()

    norm = learner.consistency.net[1]
    groups = norm(3 + 2 * torch.randn(64, 256)).view(64, 32, 8)
    assert norm.eps == 1e-6 and groups.mean(-1).abs().max() < 1e-5
    assert torch.allclose(groups.var(-1, correction=0), torch.ones(64, 32), atol=1e-3)


def test_fourier_frequencies_never_change():
    learner = make_learner()
    before = learner.score.freqs.clone(), learner.consistency.freqs.clone()
    score = snapshot(learner.score)
    learner.score_update()
    assert not same(learner.score, score)
    learner.consistency_update()
    assert torch.equal(learner.score.freqs, before[0]) and torch.equal(learner.consistency.freqs, before[1])
    assert torch.equal(learner.consistency_target.freqs, before[1])


def test_start_from_teacher():
    learner = make_learner()
    learner.start_from_teacher()
    teacher = snapshot(learner.score)
    assert same(learner.consistency, teacher) and same(learner.consistency_target, teacher)


# Figures


def axes_of(draw, *inputs, monkeypatch):
    """The panels of a figure, as drawn."""
    panels = []
    monkeypatch.setattr(qdq, "save_figure", lambda path, *functions: panels.extend(functions))
    draw(*inputs, None)
    axes = Figure().subplots(1, len(panels), squeeze=False)[0]
    for panel, function in zip(axes, panels):
        function(panel)
    return axes


def test_returns_figure_names_the_models_and_orders_the_pairs(monkeypatch):
    """Models that always say .5 and -.5, returns from -10 to 30 in no order."""
    learner = make_learner()
    learner.q_rows = learner.q_rows[torch.randperm(64, generator=generator())]
    learner.consistency = lambda x, t, pair: torch.full_like(x, 0.5)
    learner.score = lambda x, t, pair: torch.full_like(x, -0.5)
    axes = axes_of(qdq.draw_returns, learner, monkeypatch=monkeypatch)
    for panel in axes:
        found = {patch.get_label(): patch.get_xy() for patch in panel.patches if "model" in patch.get_label()}
        places = [x[y > 0].mean() for x, y in (found[name].T for name in found)]
        assert [name.split()[0] for name in found] == ["consistency", "score"]
        assert places == [pytest.approx(20, abs=1), pytest.approx(0, abs=1)]
    assert sum(patch.get_height() * patch.get_width() for patch in axes[0].patches[:60]) == pytest.approx(1)
    assert [panel.lines[0].get_xdata()[0] for panel in axes[1:]] == pytest.approx(
        [-10 + 40 * i / 63 for i in (6, 31, 56)]
    )


def test_uncertainty_figure_tells_the_data_from_random_actions(monkeypatch):
    data = make_data()
    data.action.fill_(2.0)
    learner = make_learner(data)
    learner.uncertainty = lambda obs, action, _: action[:, 0]
    (axes,) = axes_of(qdq.draw_uncertainty, learner, data, monkeypatch=monkeypatch)
    assert axes.get_title().startswith("median H 2 in data, ") and axes.get_title().split()[5] != "2"
    of_data, random = axes.patches[:49], axes.patches[49:]
    assert (of_data[0].get_label(), random[0].get_label()) == ("actions of the data", "random actions")
    assert of_data[-1].get_height() == 1000 > random[-1].get_height()


# Settings and the command line


def test_table_of_the_official_configurations():
    table = {env: Args(**settings) for env, settings in qdq.PAPER.items()}
    assert len(table) == 15
    for env, args in table.items():
        gym = not env.startswith("antmaze")
        assert args.layers == (3 if gym else 2) and args.layer_norm == ("large" in env)
        assert args.reward_offset == (0 if gym else -1)
        assert args.beta == (0.8 if env.startswith(("hopper", "walker2d")) else 0.9)
        assert args.alpha == (0.992 if gym else 0.01 if "umaze-diverse" in env else 0.99)
        assert args.actor_loss == ("pg" if gym or "umaze-diverse" in env else "awr")
        assert args.penalty == ("paper" if gym else "keep" if "umaze-diverse" in env else "mild")
        assert args.clip_grad == (10 if gym else 3 if "large-diverse" in env else 7)
    weights = {env: args.bc_coef for env, args in table.items() if args.actor_loss == "pg"}
    assert list(weights.values()) == [0, 0.1, 2, 0.8, 0.8, 2, 0.8, 0.8, 2, 1.5]
    assert [env for env, args in table.items() if not args.target_sample] == [
        "halfcheetah-medium-v2", "antmaze-umaze-v0", "antmaze-medium-play-v0", "antmaze-large-play-v0",
        "antmaze-large-diverse-v0",
    ]  # fmt: skip
    odd = {env: args.consistency_steps for env, args in table.items() if args.consistency_steps != 1_600_000}
    assert odd == {"halfcheetah-medium-replay-v2": 1_000_000, "walker2d-medium-expert-v2": 2_000_000}


@pytest.fixture
def start(monkeypatch, tmp_path):
    """start(*flags): a tiny run on the pendulum data, from the command line; returns its checkpoint."""

    def start(*flags, out="a", draw=False, env="pendulum-demo-medium"):
        tiny = f"qdq.py --env {env} --device cpu --steps 4 --batch-size 8 --eval-episodes 0 --hidden 16"
        out = tmp_path / out
        monkeypatch.setattr(sys, "argv", [*tiny.split(), "--return-hidden", "16", "--out", str(out), *map(str, flags)])
        with monkeypatch.context() as patch:
            if not draw:
                patch.setattr(qdq, "save_figure", lambda *args: None)
            qdq.main()
        return common.load_checkpoint(out / "qdq" / env / "seed0")

    return start


def run_folder(tmp_path, out="a"):
    return Path(tmp_path / out / "qdq" / "pendulum-demo-medium" / "seed0")


def test_reuse_takes_the_models_and_skips_their_phases(start, tmp_path, capsys, monkeypatch):
    own = "--levels 9 --score-lr 0.1 --consistency-lr 0.2 --consistency-tau 0.5 --init-from-teacher".split()
    first = start("--score-steps", 3, "--consistency-steps", 5, *own)["learner"]
    second = start("--reuse", run_folder(tmp_path), out="b")["learner"]
    one, two = (common.read_about(run_folder(tmp_path, *place))["args"] for place in ((), ("b",)))
    assert one["levels"] == 9 and all(one[name] == two[name] for name in qdq.UNUSED)
    for name in ("score", "consistency", "consistency_target"):
        assert all(torch.equal(first[name][key], second[name][key]) for key in first[name])
    assert torch.equal(first["q_range"], second["q_range"]) and second["score_count"] == 0 < first["score_count"]
    assert second["consistency_count"] == 0 and second["actor_count"] == 2
    rows = common.read_csv(run_folder(tmp_path, "b") / "metrics.csv")
    assert {row["phase"] for row in rows} == {"policy"}
    moved = run_folder(tmp_path).rename(tmp_path / "moved")  # a run that reused resumes without its source
    start("--resume", run_folder(tmp_path, "b"), out="b")
    moved.rename(run_folder(tmp_path))
    (run_folder(tmp_path, "b") / "checkpoint.pt").unlink()  # before its first checkpoint it takes the models again
    second = start("--resume", run_folder(tmp_path, "b"), out="b")["learner"]
    assert torch.equal(first["score"]["net.0.weight"], second["score"]["net.0.weight"])
    capsys.readouterr()
    start("--reuse", run_folder(tmp_path, "b"), out="c")  # a run that reused can be reused
    assert "score model after 3, consistency model after 5 updates" in capsys.readouterr().out
    start("--reuse", run_folder(tmp_path), "--seed", 3)
    beside = run_folder(tmp_path).with_name("seed3")  # --evaluate writes no run, whatever its seed
    monkeypatch.setattr(sys, "argv", f"qdq.py --evaluate {beside} --seed 0 --eval-episodes 1".split())
    qdq.main()
    assert "over 1 episodes" in capsys.readouterr().out


@pytest.mark.parametrize(
    "name, value",
    dict(return_hidden=32, reward_offset=5.0, batch_size=16, gamma=0.5, window=9, window_stride=3).items(),
)
def test_reuse_compares(name, value, monkeypatch):
    learner, theirs = make_learner(**{name: value}), make_learner()
    checkpoint = dict(done=["score", "consistency"], dims=dict(fingerprint=learner.data.fingerprint))
    monkeypatch.setattr(qdq, "load_run", lambda *args: (theirs.args, checkpoint))
    flag = name.replace("_", "-")
    with pytest.raises(common.UserError, match=f"there was made with --{flag} {getattr(theirs.args, name)}, "):
        learner.args.reuse = "there"
        qdq.load_models([learner])


def test_reuse_reaches_all_seeds(start, tmp_path):
    first = start("--score-steps", 1, "--consistency-steps", 5)["learner"]
    start("--reuse", run_folder(tmp_path), "--seed", 0, 1, out="b")
    second = common.load_checkpoint(run_folder(tmp_path, "b").parent / "seed1")["learner"]
    assert all(torch.equal(first["score"][key], second["score"][key]) for key in first["score"])


def test_reuse_refuses_what_does_not_fit(start, tmp_path):
    with pytest.raises(common.UserError, match="no checkpoint"):
        start("--reuse", run_folder(tmp_path), out="b")
    start("--score-steps", 1, "--consistency-steps", 5)
    for place in (run_folder(tmp_path), run_folder(tmp_path).parent):
        with pytest.raises(common.UserError, match="--reuse .* is where this run would be written"):
            start("--reuse", place)
    assert not list(run_folder(tmp_path).parent.glob("*.old*"))
    path = run_folder(tmp_path) / "checkpoint.pt"
    with pytest.raises(common.UserError, match="other data"):
        start("--reuse", path.parent, env="pendulum-demo-expert", out="b")
    torch.save(torch.load(path, weights_only=True) | dict(done=["score"]), path)
    with pytest.raises(common.UserError, match="consistency model is not finished"):
        start("--reuse", path.parent, out="b")
    assert not (tmp_path / "b").exists()


def test_phases_of_a_run(monkeypatch):
    """Their lengths and strides, of the paper's table and with --reuse; seeds differ."""
    asked = []

    class Run:
        folders = ()

        def __init__(self, args, learners, data, script, protocol, phases):
            self.phases = phases
            first, second = (snapshot(learner.critic) for learner in learners)
            assert not torch.equal(first[0], second[0]) and args.paper_score == 93.2

        def updates(self, phase, stride=1, evaluate=False, at_end=None):
            asked.append((phase, self.phases[phase], stride, evaluate))
            return ()

        def finish(self):
            asked.append("finished")

    monkeypatch.setattr(qdq, "Run", Run)
    monkeypatch.setattr(qdq, "load_dataset", lambda *args, **_: make_data())
    monkeypatch.setattr(qdq, "load_models", lambda learners: None)
    flags = "--env walker2d-medium-replay-v2 --device cpu --seed 0 1 --hidden 8 --return-hidden 8".split()
    for more in ([], ["--reuse", "there"]):
        monkeypatch.setattr(sys, "argv", ["qdq.py", *flags, *more])
        qdq.main()
    last = [("policy", 1_000_000, 2, True), "finished"]
    assert asked[:4] == [("score", 800_000, 1, False), ("consistency", 1_600_000, 5, False), *last]
    assert asked[4:] == [("score", 0, 1, False), ("consistency", 0, 5, False), *last]


def test_init_from_teacher_by_its_flag(start, monkeypatch):
    monkeypatch.setattr(QDQ, "consistency_update", lambda learner: None)
    learned = start("--score-steps", 3, "--consistency-steps", 5, "--init-from-teacher")["learner"]
    assert all(torch.equal(learned["consistency"][key], value) for key, value in learned["score"].items())
    learned = start("--score-steps", 3, "--consistency-steps", 5, "--no-init-from-teacher", out="b")["learner"]
    assert not all(torch.equal(learned["consistency"][key], value) for key, value in learned["score"].items())


def test_reward_offset_reaches_the_returns(start):
    plain, moved = start()["learner"]["q_range"], start("--reward-offset", "-1", out="b")["learner"]["q_range"]
    assert (plain[0] - moved[0]).item() == pytest.approx(sum(0.95**i for i in range(50)), abs=1e-3)


@pytest.mark.parametrize("scene, draw", [("bandit-8gaussians", False), ("bandit-25gaussians-far", True)])
def test_scenes(scene, draw, start, tmp_path):
    """An episode of one step gives its reward, whether it ends there or is cut, although all states are alike."""
    data = common.load_dataset(scene)
    rows, (low, high) = qdq.return_dataset(data, 0.9, 200, 10)
    assert torch.equal(rows[:, 1:3], data.action)
    assert torch.allclose(low + (rows[:, 3] + 1) / 2 * (high - low), data.reward, atol=1e-4)
    start(env=scene, draw=draw)
    run = tmp_path / "a" / "qdq" / scene / "seed0"
    assert not draw or {"returns.png", "uncertainty.png"} <= {path.name for path in run.iterdir()}
    act = common.load_policy(QDQ, Args, run)
    assert 1 < abs(act([[1000.0]])).max() <= data.max_action  # of a state far away the policy goes to an edge


# What each setting moves, after a few updates of all phases
RETURNS = dict(score_lr=1e-2, score_steps=9, return_hidden=24)
DISTILLED = dict(consistency_lr=1e-2, consistency_steps=60, levels=20, consistency_tau=0.5)
CRITIC = dict(gamma=0.5, critic_lr=1e-2, tau=0.5, alpha=0.1, beta=0.2, penalty="mild", q_samples=9, target_sample=False,
              clip_grad=0.01, layer_norm=True)  # fmt: skip
ACTOR = dict(actor_lr=1e-2, actor_loss="awr", bc_coef=3.0, steps=8, hidden=24, layers=1)
MOVED = dict.fromkeys(RETURNS, "score") | dict.fromkeys(DISTILLED, "consistency") | dict.fromkeys(CRITIC, "critic")
MOVED |= dict.fromkeys(ACTOR, "actor")


@functools.cache
def trained(**settings):
    """The networks as bytes."""
    learner = make_learner(**dict(steps=100, score_steps=100, consistency_steps=100, alpha=0.5) | settings)
    for update in (learner.score_update, learner.consistency_update, learner.policy_update):
        for _ in range(4):
            update()
    return {name: [weight.detach().numpy().tobytes() for weight in getattr(learner, name).parameters()]
            for name in ("score", "consistency", "critic", "actor")}  # fmt: skip


@pytest.mark.parametrize("flag", MOVED)
def test_every_setting_moves_its_network(flag):
    """And not those of the phases before its own."""
    value = (RETURNS | DISTILLED | CRITIC | ACTOR)[flag]
    usual, changed = trained(), trained(**{flag: value})
    moved = [name for name in usual if usual[name] != changed[name]]
    earlier = dict(score=[], consistency=["score"]).get(MOVED[flag], ["score", "consistency"])
    assert MOVED[flag] in moved and not set(earlier) & set(moved)


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--beta 1.5", "--beta must be at most 1"),
        ("--beta -1", "--beta must be at least 0"),
        ("--alpha 2", "--alpha must be at most 1"),
        ("--gamma nan", "--gamma must be at least 0"),
        ("--tau 2", "--tau must be at most 1"),
        ("--consistency-tau 2", "--consistency-tau must be at most 1"),
        ("--score-steps -1", "--score-steps must be at least 0"),
        ("--consistency-steps -1", "--consistency-steps must be at least 0"),
        ("--score-lr -1", "--score-lr must be at least 0"),
        ("--consistency-lr -1", "--consistency-lr must be at least 0"),
        ("--critic-lr -1", "--critic-lr must be at least 0"),
        ("--actor-lr -1", "--actor-lr must be at least 0"),
        ("--bc-coef -1", "--bc-coef must be at least 0"),
        ("--clip-grad -1", "--clip-grad must be at least 0"),
        ("--window 0", "--window must be at least 10, the --window-stride"),
        ("--window 5 --window-stride 6", "--window must be at least 6"),
        ("--window-stride 0", "--window-stride must be at least 1"),
        ("--hidden 0", "--hidden must be at least 1"),
        ("--layers 0", "--layers must be at least 1"),
        ("--q-samples 1", "--q-samples must be at least 2"),
        ("--levels 2", "--levels must be at least 3"),
        ("--return-hidden 20", "--return-hidden must be a multiple of 8"),
        ("--return-hidden 0", "--return-hidden must be a multiple of 8"),
        ("--alpha 1 --beta 0.5", "--beta does nothing with --alpha 1"),
        ("--alpha 1 --penalty keep", "--penalty does nothing with --alpha 1"),
        ("--alpha 1 --q-samples 9", "--q-samples does nothing with --alpha 1"),
        ("--actor-loss awr --bc-coef 1", "--bc-coef does nothing with --actor-loss awr"),
        ("--reuse there --score-steps 5", "--score-steps does nothing with --reuse"),
        ("--reuse there --consistency-steps 5", "--consistency-steps does nothing with --reuse"),
        ("--reuse there --no-init-from-teacher", "--init-from-teacher does nothing with --reuse"),
        ("--reuse there --levels 9", "--levels does nothing with --reuse"),
    ],
)
def test_settings_that_cannot_be_are_refused(flags, message, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["qdq.py", "--device", "cpu", *flags.split()])
    monkeypatch.setattr(qdq, "load_dataset", None)  # before anything is read
    with pytest.raises(common.UserError, match=message):
        qdq.main()
