"""BDM, ReBRAC-SBC and SBC against known answers: closed forms, exact noise models, a straight-line ReBRAC."""

import json
import sys
from copy import deepcopy

import numpy as np
import pytest
import torch
import torch.nn as nn

import bdm_rebrac_sbc as script
import common
from bdm_rebrac_sbc import (
    ABAR,
    BDM,
    BETA,
    Args,
    Futures,
    K,
    bdm_loss,
    critic_targets,
    level_weights,
    reverse_chain,
    state_coefficient,
    state_loss,
)
from common import Batch, Dataset


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def toy_data(rows=400, obs_dim=3, action_dim=2, terminals=True, seed=0):
    """Random transitions in episodes of 20 rows; every second episode terminates, the others hit a time limit."""
    rng = np.random.default_rng(seed)
    end = np.arange(rows) % 20 == 19
    terminal = end & (np.arange(rows) % 40 == 39) & terminals
    return Dataset.from_arrays(
        "toy", rng.normal(size=(rows, obs_dim)), rng.uniform(-1, 1, (rows, action_dim)), rng.normal(size=rows),
        terminal, end & ~terminal, None,
    )  # fmt: skip


def make_learner(data=None, seed=0, **settings):
    data = toy_data() if data is None else data
    small = dict(device="cpu", batch_size=16, hidden=16, bdm_hidden=16, num_futures=3)
    learner = BDM(Args(**small | settings), data, seed)
    learner.use_data(Futures(data, learner.args.gamma, learner.args.futures), 0.0, 1.0)
    return learner


def flat(net):
    return torch.cat([p.detach().flatten() for p in net.parameters()])


def actor_gradient(learner, seed=0):
    """The gradient of one actor step, which is not taken; and what the step reports."""
    learner.actor_opt.step = lambda: None
    learner.generator.manual_seed(seed)
    index = torch.arange(16)
    learner.actor_step(learner.data.split(learner.data.rows[index]), index)
    return torch.cat([p.grad.flatten() for p in learner.actor.parameters()]), learner.metrics.read()


# Tables


SCHEDULE = """
0 0.027907 0.972093 0         1.028708 0.01020
1 0.075494 0.898706 0.020799  0.806151 0.00799
2 0.124396 0.786911 0.059133  0.666709 0.00661
3 0.177190 0.647478 0.107106  0.610875 0.00606
4 0.237282 0.493844 0.165259  0.614632 0.00609
5 0.309883 0.340810 0.237943  0.681185 0.00675
6 0.404003 0.203121 0.334198  0.850646 0.00843
7 0.536998 0.094046 0.472344  1.280218 0.01269
8 0.743829 0.024092 0.690511  2.975329 0.02950
9 0.999000 0.000024 0.974956  999.024  9.90566
"""


def test_schedule_and_level_weights():
    table = torch.tensor([[float(x) for x in line.split()] for line in SCHEDULE.strip().split("\n")]).double()
    before = torch.cat([torch.ones(1), ABAR[:-1]])
    assert torch.allclose(BETA, table[:, 1], atol=1e-6) and torch.allclose(ABAR, table[:, 2], atol=1e-6)
    assert torch.allclose(BETA * (1 - before) / (1 - ABAR), table[:, 3], atol=1e-6)
    assert abs(ABAR[9] - 2.4092e-5) < 1e-9
    raw = BETA / ((1 - BETA) * (1 - ABAR))
    assert torch.allclose(raw[:9], table[:9, 4], atol=1e-6) and abs(raw[9] - 999.024) < 0.01
    assert abs(raw.mean() - 100.854) < 1e-3
    code = level_weights("code")
    assert torch.allclose(code.double(), table[:, 5], atol=1e-3, rtol=1e-3) and abs(code.sum() - 10) < 1e-4


def test_eta_flag_gives_the_pull_that_the_docstring_names():
    """What the action's gradient sees of level i is proportional to eta_i abar_i (1 - abar_i) for unit variances."""
    pull = {eta: (level_weights(eta) * ABAR * (1 - ABAR)).mean().item() for eta in ("code", "uniform", "paper")}
    assert pull["uniform"] == pytest.approx(0.1259, abs=1e-4)
    assert pull["code"] / pull["uniform"] == pytest.approx(0.00787, abs=1e-5)
    assert pull["paper"] / pull["uniform"] == pytest.approx(0.0186, abs=2e-4)
    code, cut = level_weights("code"), level_weights("drop-last")
    assert cut[9] == 0 and torch.equal(cut[:9], code[:9]) and code[9] / code.sum() == pytest.approx(0.9906, abs=1e-4)


TABLE4 = """
halfcheetah-medium 0.001 0.1 0.0001
halfcheetah-expert 0.01 0.01 0.001
halfcheetah-medium-expert 0.01 0.01 0.001
halfcheetah-medium-replay 0.001 0.01 0.0001
hopper-medium 0.005 0.5 1e-05
hopper-expert 0.1 0.1 0.0001
hopper-medium-expert 0.1 10.0 1e-05
hopper-medium-replay 0.005 0.5 1e-05
walker2d-medium 0.025 0.025 1e-05
walker2d-expert 0.01 0.1 1e-05
walker2d-medium-expert 0.01 0.01 0.001
walker2d-medium-replay 0.0125 1.25 1e-05
"""


def test_table_3_gives_table_4():
    rows = [line.split() for line in TABLE4.strip().split("\n")]
    names = {f"{name}-v2" for name, *_ in rows}
    assert names == set(script.PAPER) == set(script.PUBLISHED) == set(script.PUBLISHED_SBC)
    for name, *values in rows:
        table = script.PAPER[f"{name}-v2"]
        assert [table[key] for key in ("w_a", "w_s", "actor_lr")] == pytest.approx([float(x) for x in values])
        assert table["bdm_lr"] == table["actor_lr"]


def test_coefficient_of_the_state_loss():
    table = script.PAPER["hopper-medium-v2"]
    assert state_coefficient(Args(**table)) == pytest.approx(0.25)
    assert state_coefficient(Args(**table, state_weight="linear")) == pytest.approx(0.5)
    assert state_coefficient(Args(**table, sbc_only=True)) == pytest.approx(0.5)  # w_Q = 2 taken out
    assert state_coefficient(Args(**table | dict(w_q=1), sbc_only=True)) == pytest.approx(0.25)
    assert state_coefficient(Args(**table, c_s=0.3)) == 0.3


def test_sizes_and_inputs_of_the_networks():
    count = lambda net: sum(p.numel() for p in net.parameters())
    assert count(script.NoiseModel(11, 3, 512)) == 27 * 512 + 513 * 512 + 4 * 512 + 513 * 11
    assert count(script.Actor(11, 3, 256, 1.0)) == 12 * 256 + 2 * 257 * 256 + 257 * 3
    assert count(script.Critic(11, 3, 256)) == 2 * (15 * 256 + 2 * 257 * 256 + 3 * 512 + 257)
    net = script.NoiseModel(2, 1, 8)
    seen = []
    net.net[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    net(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]]), torch.tensor([[5.0]]), torch.tensor([[9]]))
    assert seen[0].tolist() == [[1, 2, 3, 4, pytest.approx(0.8), 5]]


# Sampler


def gaussian_noise(mean, variance):
    """The exact noise model of N(mean, variance)."""

    def net(x, obs, action, level):
        abar = ABAR.to(x.dtype)[level]
        return (1 - abar).sqrt() * (x - abar.sqrt() * mean) / (abar * variance + 1 - abar)

    return net


def run_chain(net, sampler, n=400_000, obs=None):
    x = torch.randn(n, 1, generator=generator(1))
    obs = torch.zeros(n, 1) if obs is None else obs
    return reverse_chain(net, x.to(obs.dtype), obs, torch.zeros(n, 1), generator(2), sampler)


@pytest.mark.parametrize(
    ("sampler", "variance", "expected_mean", "expected_variance"),
    [
        ("start8", 0.1, 0.9975, 0.0521), ("start8", 1.0, 0.9759, 0.6810), ("start8", 2.0, 0.9530, 1.3811),
        ("official", 0.1, 0.8892, 0.0559), ("official", 1.0, 0.7576, 0.4633), ("official", 2.0, 0.6857, 0.8713),
    ],
)  # fmt: skip
def test_sampler_moments_with_the_exact_noise_of_a_gaussian(sampler, variance, expected_mean, expected_variance):
    x = run_chain(gaussian_noise(1.0, variance), sampler)
    assert x.mean().item() == pytest.approx(expected_mean, abs=0.01)
    assert x.var().item() == pytest.approx(expected_variance, abs=0.01)


def test_ddim_of_a_gaussian_is_its_affine_map():
    """Each jump scales x - sqrt(abar) m by a factor that the covariance of the two levels gives."""
    mean, variance, factor = 1.0, 0.7, 1.0
    for now, then in ((8, 6), (6, 4), (4, 2), (2, 0), (0, None)):
        a, b = ABAR[now].item(), 1.0 if then is None else ABAR[then].item()
        factor *= ((a * b) ** 0.5 * variance + ((1 - a) * (1 - b)) ** 0.5) / (a * variance + 1 - a)
    x = run_chain(gaussian_noise(mean, variance), "ddim", 1000)
    start = torch.randn(1000, 1, generator=generator(1))
    assert torch.allclose(x, mean + factor * (start - ABAR[8].float().sqrt() * mean), atol=1e-4)
    assert 0.6 * variance < factor**2 < variance


# Successor states of a chain with three states, known exactly


PLACES = torch.tensor([-1.3, 0.0, 1.3]).double()
KERNEL = torch.tensor([[0.1, 0.9, 0.0], [0.0, 0.2, 0.8], [0.5, 0.0, 0.5]]).double()
ENDING = torch.tensor([[0.1, 0.5, 0.4], [0.3, 0.2, 0.5], [0.0, 0.0, 1.0]]).double()  # state 2 is terminal


def successor_measure(kernel, gamma):
    return (1 - gamma) * kernel @ torch.linalg.inv(torch.eye(3).double() - gamma * kernel)


def chain_noise(measure):
    """The exact noise model of a chain's successor measure; obs [..., 1] is the place of the state."""

    def net(x, obs, action, level):
        weights = measure.to(x.dtype)[(obs.squeeze(-1) / 1.3).round().long() + 1]
        abar = ABAR.to(x.dtype)[level]
        centred = x - abar.sqrt() * PLACES
        posterior = torch.softmax(weights.log() - centred**2 / (2 * (1 - abar)), dim=-1)
        return (posterior * centred).sum(-1, keepdim=True) / (1 - abar).sqrt()

    return net


def test_exact_noise_obeys_the_bellman_identity():
    """p(x|s) eps(x|s) = (1-gamma) sum P N eps_data + gamma sum P p(x|s') eps(x|s'): what L_BDM regresses on."""
    gamma, x = 0.9, torch.linspace(-4, 4, 41).double().unsqueeze(1)
    measure = successor_measure(KERNEL, gamma)
    assert torch.allclose(measure[0], torch.tensor([0.227546, 0.334527, 0.437927]).double(), atol=1e-6)
    net = chain_noise(measure)
    for i in range(K):
        level = torch.full((41, 1), i)
        scale = (1 - ABAR[i]).sqrt()
        bells = torch.exp(-((x - ABAR[i].sqrt() * PLACES) ** 2) / (2 * scale**2)) / scale
        density = bells @ measure.T
        noise = torch.cat([net(x, torch.full_like(x, place), None, level) for place in PLACES], dim=1)
        of_data = bells * (x - ABAR[i].sqrt() * PLACES) / scale
        right = (1 - gamma) * of_data @ KERNEL.T + gamma * (density * noise) @ KERNEL.T
        assert torch.allclose(density * noise, right, atol=1e-10)


@pytest.mark.parametrize(("sampler", "low", "high"), [("start8", 0.045, 0.065), ("official", 0.10, 0.13)])
def test_chain_samples_have_the_known_distance_from_the_successor_measure(sampler, low, high):
    measure = successor_measure(KERNEL, 0.9)
    x = run_chain(chain_noise(measure), sampler, 100_000, obs=torch.zeros(100_000, 1).double())
    mass = torch.tensor([(x < -0.65).float().mean(), (x.abs() <= 0.65).float().mean(), (x > 0.65).float().mean()])
    assert low < 0.5 * (mass - measure[1]).abs().sum() < high


def population_errors(monkeypatch, kernel=KERNEL, gamma=0.9, sweeps=80, bug=None):
    """Repeated regression on L_BDM's targets with every row at its exact probability, from eps = sqrt(1 - abar) x.

    Rows: level i, place k of a grid, s, s'. With s_f = s' both terms see the same x, and the law of s_f enters as a
    weight. Returns for each level the largest integral over s of p |eps - exact eps|.
    """
    root, scale, width = ABAR.sqrt()[:, None], (1 - ABAR).sqrt()[:, None], (1.3 * ABAR.sqrt() + 5 * (1 - ABAR).sqrt())
    grid, step = width[:, None] * torch.linspace(-1, 1, 61).double(), width / 30  # [K, 61], [K]
    bell = lambda places: torch.exp(-(((grid[..., None] - root[..., None] * places) / scale[..., None]) ** 2) / 2)
    measure = successor_measure(kernel, gamma)
    density = bell(PLACES) @ measure.T  # [K, 61, s]; here and below without the factor 1 / (scale sqrt(2 pi))

    i, k, s, after = torch.cartesian_prod(torch.arange(K), torch.arange(61), torch.arange(3), torch.arange(3)).T
    obs, next_obs, x = PLACES[s, None], PLACES[after, None], grid[i, k, None]
    discount = torch.full((len(i),), 0.5 if bug == "equal weights" else gamma).double()
    if kernel is ENDING and bug != "terminals ignored":
        discount = discount * (after != 2)
    next_chance = kernel[s, after] * bell(PLACES)[i, k, after]
    future_chance = kernel[s, after] * density[i, k, s if bug == "future of s" else after]
    total = (1 - discount) * next_chance + discount * future_chance

    def table_net(table, of=lambda obs: obs):
        def net(x, obs, action, level):
            place = ((x + width[level]) / step[level]).round().long()
            return table[level, place, (of(obs) / 1.3).round().long() + 1]

        return net

    exact = chain_noise(measure)(grid[..., None, None], PLACES[:, None], None, torch.arange(K)[:, None, None, None])
    exact, table = exact.squeeze(-1), (scale * grid)[..., None].repeat(1, 1, 3)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "randint", lambda *_, **__: i[:, None])
        patch.setattr(torch, "randn", lambda *_, **__: (x - root[i] * next_obs) / scale[i])
        for _ in range(sweeps):
            known = table.clone()
            if kernel is ENDING:
                known[..., 2] = 7.0  # at a terminal state the model is never asked
            target = table_net(known, (lambda _: obs) if bug == "target at s" else (lambda obs: obs))
            shift = torch.zeros(2 * len(i), 1, dtype=torch.float64, requires_grad=True)
            net = lambda *inputs: table_net(table)(*inputs) + shift  # noqa: B023
            loss = bdm_loss(net, target, obs, obs, next_obs, next_obs, next_obs, discount, None)
            of_next, of_future = torch.autograd.grad(loss, shift)[0].view(2, -1) * len(i) / 2
            force = next_chance * of_next + future_chance * of_future
            table = table - (force.view(K, 61, 3, 3).sum(-1) / total.view(K, 61, 3, 3).sum(-1))
    error = (density * (table - exact).abs()).sum(1) * step[:, None] / (scale * (2 * torch.pi) ** 0.5)
    return error[:, :2].amax(1) if kernel is ENDING else error.amax(1)


@pytest.mark.parametrize("kernel", [KERNEL, ENDING])
def test_bdm_loss_leads_to_the_exact_successor_measure(monkeypatch, kernel):
    """With terminals too: such a state is its own future for ever, no bootstrap there and full weight on s'."""
    assert population_errors(monkeypatch, kernel, sweeps=160).max() < 1e-6


@pytest.mark.parametrize(
    ("bug", "level_2", "largest"), [("future of s", 0.0257, 0.0257), ("equal weights", 0.2335, 0.2491)]
)
def test_bugs_lead_elsewhere(monkeypatch, bug, level_2, largest):
    errors = population_errors(monkeypatch, bug=bug)
    assert errors[2].item() == pytest.approx(level_2, abs=2e-3)
    assert errors.max().item() == pytest.approx(largest, abs=2e-3)


@pytest.mark.parametrize(("kernel", "bug"), [(KERNEL, "target at s"), (ENDING, "terminals ignored")])
def test_bugs_lead_far_away(monkeypatch, kernel, bug):
    assert population_errors(monkeypatch, kernel, sweeps=20, bug=bug).max() > 0.1


@pytest.mark.parametrize("shift", [0.0, 0.1])
def test_gradient_variance_beside_monte_carlo(shift):
    """s' ~ N(0, 1) whatever (s, a), model theta x: the gradient has variance 4 abar for the diffusion loss on s_f, and
    (1 - gamma)^2 4 abar for L_BDM. A target off by `shift` moves its mean by -2 gamma shift."""
    gamma, n = 0.99, 1_000_000
    seen = {}

    def gradients(discount):
        exact = lambda level: (1 - ABAR[level].float()).sqrt()
        extra = torch.zeros(n, 1, requires_grad=True)

        def net(x, obs, action, level):
            seen["level"] = level[:n]
            return (exact(level) + extra.repeat(2, 1)) * x

        target = lambda x, obs, action, level: (exact(level) + shift + extra) * x  # must be cut from the gradient
        s, s_next, s_f = (torch.randn(n, 1, generator=generator(k)) for k in range(3))
        loss = bdm_loss(net, target, s, s, s_next, s, s_f, torch.full((n,), discount), generator(3))
        return torch.autograd.grad(loss, extra)[0] * n

    monte_carlo = gradients(0.0) / (2 * ABAR[seen["level"]].sqrt())
    assert monte_carlo.var().item() == pytest.approx(1, rel=0.015)
    g = gradients(gamma)
    if shift == 0:
        ratio = (g / (2 * ABAR[seen["level"]].sqrt())).var() / monte_carlo.var()
        assert ratio.item() == pytest.approx((1 - gamma) ** 2, rel=0.02)
    # the last term: s' and s_f are noised by the same n, which ties the two errors together
    shared = 16 * (1 - gamma) * gamma * shift * ABAR * (1 - ABAR) ** 1.5
    predicted = ((1 - gamma) ** 2 * 4 * ABAR + 8 * gamma**2 * shift**2 + shared).mean().item()
    assert g.mean().item() == pytest.approx(-2 * gamma * shift, abs=2e-3)
    assert g.var().item() == pytest.approx(predicted, rel=0.02)


# Futures from the data


def linear_gaussian_data(episodes=3000, length=150):
    """s' = 0.8 s + 0.5 a + N(0, 0.01); first s = 1, a = 0.2, then a = -0.4 s; cut by a time limit."""
    rng = np.random.default_rng(0)
    obs, action = np.zeros((length, episodes)), np.zeros((length, episodes))
    s = np.ones(episodes)
    for t in range(length):
        obs[t], action[t] = s, 0.2 if t == 0 else -0.4 * s
        s = 0.8 * s + 0.5 * action[t] + 0.1 * rng.standard_normal(episodes)
    end = np.zeros((episodes, length), bool)
    end[:, -1] = True
    column = lambda x: x.T.reshape(-1, 1)
    zeros = np.zeros(end.size)
    return Dataset.from_arrays("lg", column(obs), column(action), zeros, zeros > 0, end.ravel(), None)


@pytest.mark.parametrize(("kind", "expected"), [("corrected", 0.1956522), ("official", 0.1173913)])
def test_futures_of_a_linear_gaussian_system(kind, expected):
    data = linear_gaussian_data()
    index = torch.nonzero(data.step == 0).squeeze(1)
    states, valid = Futures(data, 0.9, kind).draw(index, 100, generator())
    states = states[valid[..., 0] == 1]
    assert valid.mean() > 0.999
    assert states.mean().item() == pytest.approx(expected, rel=0.02)
    if kind == "corrected":
        assert states.var().item() == pytest.approx(0.0963356, rel=0.03)
        assert -(states**2).mean().item() / (1 - 0.9) == pytest.approx(-1.3461538, rel=0.03)  # Q of the reward -s^2


def test_futures_of_a_system_in_two_dimensions():
    """s' = A s + B a + N(0, W), first s = (1, -.5), a = .3, then a = K s: mean and covariance of d in closed form."""
    episodes, length, rng = 2000, 300, np.random.default_rng(0)
    a, b, k = np.array([[1, 0.1], [0, 0.95]]), np.array([[0], [0.1]]), np.array([[-1, -1.2]])
    obs = np.zeros((length, episodes, 2))
    obs[0] = 1, -0.5
    for t in range(length - 1):
        action = np.full((episodes, 1), 0.3) if t == 0 else obs[t] @ k.T
        obs[t + 1] = obs[t] @ a.T + action @ b.T + rng.standard_normal((episodes, 2)) * [0.01, 0.02]
    end = np.zeros((episodes, length), bool)
    end[:, -1] = True
    zeros = np.zeros(end.size)
    obs = obs.transpose(1, 0, 2).reshape(-1, 2)
    data = Dataset.from_arrays("lg", obs, np.zeros((end.size, 1)), zeros, zeros > 0, end.ravel(), None)
    index = torch.nonzero(data.step == 0).squeeze(1)
    states, valid = Futures(data, 0.95, "corrected").draw(index, 100, generator())
    states = states[valid[..., 0] == 1]
    assert states.mean(0).tolist() == pytest.approx([0.404719, -0.286990], rel=0.02)
    expected = torch.tensor([[0.109604, -0.055717], [-0.055717, 0.033402]])
    assert torch.allclose(torch.cov(states.T), expected, rtol=0.03)


def counting_data(episodes, length, ends):
    """obs = (episode, step); after its last row each episode terminates (`ends` 1) or is cut (0)."""
    obs = np.stack(np.divmod(np.arange(episodes * length), length), axis=1).astype(float)
    last = obs[:, 1] == length - 1
    terminal = last & (np.resize(ends, episodes)[obs[:, 0].astype(int)] == 1)
    final = obs + [0, 1]
    zeros = np.zeros(len(obs))
    return Dataset.from_arrays("count", obs, zeros[:, None], zeros, terminal, last & ~terminal, None, ends=final)


def test_futures_stay_in_their_episode_and_in_its_terminal_state():
    data, gamma = counting_data(40, 30, [1, 0]), 0.9
    index = torch.arange(len(data))
    states, valid = Futures(data, gamma, "corrected").draw(index, 200, generator())
    start, valid = data.obs[index].unsqueeze(1), valid[..., 0]
    assert torch.equal(states[..., 0], start[..., 0].expand(-1, 200))
    assert ((states[..., 1] > start[..., 1]) & (states[..., 1] <= 30)).all()
    ends_in_terminal = data.obs[:, 0] % 2 == 0
    assert (valid[ends_in_terminal] == 1).all()
    left = 30 - data.obs[:, 1:]  # steps to the last state
    absorbed = (states[..., 1] == 30).float()[ends_in_terminal].mean()
    assert absorbed.item() == pytest.approx((gamma ** (left[ends_in_terminal] - 1)).mean().item(), abs=0.005)
    # an episode that is cut has lost its last row; what lies beyond is left out, not moved to the last state
    cut = data.obs[:, 0] % 2 == 1
    within = 1 - gamma ** (29 - data.obs[cut, 1])
    assert valid[cut].mean().item() == pytest.approx(within.mean().item(), abs=0.005)
    assert (states[..., 1][cut] <= 29).all()


def test_futures_official_cross_time_limits_and_start_one_step_late():
    data = counting_data(200, 1000, [0])
    index = torch.randint(len(data), (20_000,), generator=generator())
    crossed = {}
    for kind in ("official", "corrected"):
        states, valid = Futures(data, 0.99, kind).draw(index, 20, generator())
        moved = states[..., 0] != data.obs[index, :1]
        crossed[kind] = (moved & (valid[..., 0] == 1)).float().mean().item()
    assert crossed["official"] == pytest.approx(0.1011, abs=0.004) and crossed["corrected"] == 0
    endless = counting_data(1, 20_000, [0])
    for kind, mean in (("official", 101), ("corrected", 100)):
        states, _ = Futures(endless, 0.99, kind).draw(torch.zeros(100, dtype=torch.long), 2000, generator())
        assert states[..., 1].mean().item() == pytest.approx(mean, abs=0.6)
        assert states[..., 1].min() == mean - 99


# The state term


@pytest.mark.parametrize(
    ("i", "loss", "slope"), [(1, 0.766360, -0.856732), (4, 0.252838, -0.630552), (7, 0.034172, -0.098623)]
)
def test_state_loss_and_its_gradient_in_the_action(i, loss, slope):
    """Model N(a, 0.25), futures ~ N(0.7, 0.09), a = 0.2; at a = 0.7 the gradient vanishes."""
    n, k = 125_000, 8
    weights = 10 * (torch.arange(K) == i).float()
    futures = 0.7 + 0.3 * torch.randn(n, k, 1, generator=generator(1))
    net = lambda x, obs, action, level: gaussian_noise(action, 0.25)(x, obs, action, level)
    for a, expected in ((0.2, slope), (0.7, 0.0)):
        action = torch.full((n, 1), a, requires_grad=True)
        value = state_loss(net, torch.zeros(n, 1), action, futures, torch.ones(n, k, 1), weights, generator(2))
        gradient = torch.autograd.grad(value, action)[0].sum().item()
        assert gradient == pytest.approx(expected, rel=0.02, abs=0.01)
        if a == 0.2:
            assert value.item() == pytest.approx(loss, rel=0.02)


def test_masked_futures_count_as_zeros():
    net = lambda x, obs, action, level: x * 0
    futures, valid = torch.randn(2000, 4, 2, generator=generator()), torch.ones(2000, 4, 1)
    state, ones = torch.zeros(2000, 2), torch.ones(K)
    whole = state_loss(net, state, state, futures, valid, ones, generator(1))
    valid[:, :3] = 0
    part = state_loss(net, state, state, futures, valid, ones, generator(1))
    assert part.item() == pytest.approx(whole.item() / 4, rel=0.1)
    assert whole.item() == pytest.approx(2, rel=0.05)  # summed over the two dimensions


# ReBRAC


def test_critic_penalty_of_the_official_code_is_its_mean():
    """[B, 1] - [B] broadcasts to [B, B]; the gradient is that of the mean penalty, the loss differs by a constant."""
    random = lambda seed: torch.randn(64, generator=generator(seed)).double()
    q_next, penalty, q, reward = random(0), random(1) ** 2, random(2).requires_grad_(), random(3)
    terminal = (torch.arange(64) % 5 == 0).double()
    batch = Batch(None, None, reward, None, None, terminal)
    seen = (1 - terminal) * penalty  # the code has no penalty where the next row does not continue this one
    square = reward.unsqueeze(1) + 0.99 * (1 - terminal).unsqueeze(1) * (q_next.unsqueeze(1) - 0.5 * seen)
    theirs = ((q.unsqueeze(1) - square) ** 2).mean()
    ours = ((q - critic_targets(q_next, penalty, batch, 0.99, 0.5, "mean")) ** 2).mean()
    gradients = [torch.autograd.grad(loss, q)[0] for loss in (theirs, ours)]
    assert torch.allclose(*gradients, atol=1e-12)
    constant = (0.99**2 * (1 - terminal)).mean() * (0.5 * seen).var(correction=0)
    assert (theirs - ours).item() == pytest.approx(constant.item(), rel=1e-9)
    single = critic_targets(q_next, penalty, batch, 0.99, 0.5, "none")
    assert torch.allclose(single, reward + 0.99 * (1 - terminal) * (q_next - 0.5 * penalty), atol=1e-12)


def plain_mlp(layers, d_in, hidden, d_out, norm):
    parts, width = [], d_in
    for _ in range(layers):
        parts += [nn.Linear(width, hidden), nn.ReLU()] + ([nn.LayerNorm(hidden)] if norm else [])
        width = hidden
    return nn.Sequential(*parts, nn.Linear(hidden, d_out)).double()


def straight_line_rebrac(learner, updates, w_a, beta, decay, per_sample, use_min):
    """ReBRAC written out with plain layers, from the learner's initial networks and its random draws."""
    data, gen = learner.data, generator(0)
    s, a = data.obs_dim, data.action_dim
    critics = [plain_mlp(3, s + a, 16, 1, True) for _ in range(2)]
    for j, critic in enumerate(critics):
        for theirs, ours in zip(critic, learner.critic.net):
            for name, value in ours.named_parameters():
                value = value[j].T if isinstance(theirs, nn.Linear) and name == "weight" else value[j].squeeze(0)
                getattr(theirs, name).data.copy_(value)
    actor = plain_mlp(3, s, 16, a, False)
    actor.load_state_dict(learner.actor.net.state_dict())
    target_critics, target_actor = deepcopy(critics), deepcopy(actor)
    critic_opts = [torch.optim.Adam(c.parameters(), 1e-3, weight_decay=decay, foreach=False) for c in critics]
    actor_opt = torch.optim.Adam(actor.parameters(), 1e-3, foreach=False)
    evaluate = lambda critic, obs, action: critic(torch.cat([obs, action], 1)).squeeze(1)
    for n in range(updates):
        obs, action, reward, next_obs, next_action, terminal = data.split(
            data.rows[torch.randint(len(data), (16,), generator=gen)]
        )
        noise = (0.2 * torch.randn(16, a, generator=gen)).clamp(-0.5, 0.5)
        with torch.no_grad():
            chosen = (torch.tanh(target_actor(next_obs)) + noise).clamp(-1, 1)
            penalty = ((chosen - next_action) ** 2).sum(1)
            if not per_sample:
                penalty = (penalty * (1 - terminal)).sum() / 16
            q_next = torch.minimum(*(evaluate(c, next_obs, chosen) for c in target_critics))
            target = reward + 0.99 * (1 - terminal) * (q_next - beta * penalty)
        for critic, opt in zip(critics, critic_opts):
            opt.zero_grad()
            (evaluate(critic, obs, action) - target).pow(2).mean().backward()
            opt.step()
        if n % 2 == 0:
            mine = torch.tanh(actor(obs))
            q = [evaluate(c, obs, mine) for c in critics]
            q = torch.minimum(*q) if use_min else q[0]
            loss = w_a * ((mine - action) ** 2).sum(1).mean() - q.mean() / q.detach().abs().mean()
            actor_opt.zero_grad()
            loss.backward()
            actor_opt.step()
            for slow, fast in zip([target_actor, *target_critics], [actor, *critics]):
                for p, q in zip(slow.parameters(), fast.parameters()):
                    p.data = 0.995 * p.data + 0.005 * q.data
    return actor, target_actor, critics, target_critics


@pytest.mark.parametrize("own", [True, False])
def test_without_state_weight_it_is_rebrac(own):
    """--w-s 0 takes the steps of a ReBRAC that knows no BDM: the author's (default) and ReBRAC's own (`own`)."""
    data = toy_data()
    data.rows = data.rows.double()
    settings = dict(critic_bc_reduce="none", actor_q="min", critic_wd=0.0) if own else {}
    learner = make_learner(data, w_s=0.0, w_a=0.1, critic_bc=0.5, **settings)
    for name in ("actor", "critic", "actor_target", "critic_target"):
        getattr(learner, name).double()
    actor, target_actor, critics, target_critics = straight_line_rebrac(
        learner, 10, 0.1, 0.5, settings.get("critic_wd", 1e-3), own, own
    )
    before = flat(learner.actor)
    for _ in range(5):
        learner.update()
    assert (flat(learner.actor) - before).abs().max() > 1e-3
    for ours, theirs in ((learner.actor, actor), (learner.actor_target, target_actor)):
        assert torch.allclose(flat(ours), flat(theirs), atol=1e-6)
    for ours, theirs in ((learner.critic, critics), (learner.critic_target, target_critics)):
        head = ours.net[-1].weight
        for j in range(2):
            assert torch.allclose(head[j].T, theirs[j][-1].weight, atol=1e-6)
            assert torch.allclose(ours.net[0].weight[j].T, theirs[j][0].weight, atol=1e-6)


def test_without_state_weight_no_bdm_is_computed(monkeypatch):
    def forbidden(*_):
        raise AssertionError("the BDM was used")

    monkeypatch.setattr(script.NoiseModel, "forward", forbidden)
    monkeypatch.setattr(script.Futures, "draw", forbidden)
    first, second = make_learner(w_s=0.0), make_learner(w_s=0.0, num_futures=7, eta="uniform", sampler="ddim")
    weights = flat(first.bdm)
    for learner in (first, second):
        for _ in range(3):
            learner.update()
    assert torch.equal(flat(first.actor), flat(second.actor)) and torch.equal(flat(first.bdm), weights)
    with pytest.raises(AssertionError):
        make_learner(w_s=0.01).update()
    monkeypatch.setattr(BDM, "next_action", forbidden)  # behaviour cloning reads no a'
    make_learner(sbc_only=True, w_s=0.0).update()


def test_q_is_normalised_by_its_detached_mean_size():
    learner = make_learner(w_a=0.0, w_s=0.0)
    learner.critic.net[-1].bias.data += 5  # all Q of one sign: without detach the gradient would vanish
    gradient, _ = actor_gradient(learner)
    q = learner.critic(learner.data.obs[:16], learner.actor(learner.data.obs[:16]))[0]
    expected = torch.autograd.grad(-q.mean(), list(learner.actor.parameters()))
    expected = torch.cat([g.flatten() for g in expected]) / q.abs().mean()
    assert gradient.norm() > 1e-6 and torch.allclose(gradient, expected, rtol=1e-4, atol=1e-8)
    learner.critic.net[-1].weight.data *= 3
    learner.critic.net[-1].bias.data *= 3
    assert torch.allclose(actor_gradient(learner)[0], gradient, rtol=1e-4, atol=1e-8)


# Plumbing


@pytest.mark.parametrize(("reading", "factor"), [("square", 4), ("linear", 2)])
def test_doubling_w_s(reading, factor):
    once, twice = (
        actor_gradient(make_learner(sbc_only=True, w_a=0.0, w_s=w_s, state_weight=reading))[0] for w_s in (0.5, 1.0)
    )
    assert once.norm() > 0 and torch.allclose(twice, factor * once, rtol=1e-4, atol=1e-9)


def test_state_loss_reads_the_target_bdm():
    for name, read in (("target", "bdm_target"), ("online", "bdm")):
        learner = make_learner(actor_bdm=name)
        before = actor_gradient(learner)[1]["state_loss"]
        for net in ("bdm", "bdm_target"):
            changed = deepcopy(learner)
            for p in getattr(changed, net).parameters():
                p.data *= 1.5
            after = actor_gradient(changed)[1]["state_loss"]
            assert (after != before) == (net == read)


def test_gradients_stay_where_they_belong():
    learner = make_learner()
    actor_gradient(learner)
    batch = learner.data.split(learner.data.rows[:16])
    assert all(p.grad is None for net in (learner.critic, learner.bdm) for p in net.parameters())
    learner.actor_opt.zero_grad()
    learner.bdm_step(batch, learner.next_action(batch))
    assert all(p.grad is not None for p in learner.bdm.parameters())
    others = (learner.actor, learner.critic, learner.bdm_target, learner.actor_target)
    assert all(p.grad is None for net in others for p in net.parameters())


def test_bdm_step_asks_the_target_model_at_the_next_state_and_does_not_bootstrap_from_terminals(monkeypatch):
    learner, seen = make_learner(gamma=0.9), {}

    def watched(*inputs):
        seen["loss"] = inputs
        return bdm_loss(*inputs)

    def chain(net, x, obs, action, *rest):
        seen["chain"] = net, obs, action
        return reverse_chain(net, x, obs, action, *rest)

    monkeypatch.setattr(script, "bdm_loss", watched)
    monkeypatch.setattr(script, "reverse_chain", chain)
    batch = learner.data.split(learner.data.rows)
    chosen = -batch.next_action
    learner.bdm_step(batch, chosen)
    net, target_net, obs, action, next_obs, next_action, _, discount, _ = seen["loss"]
    assert net is learner.bdm and target_net is seen["chain"][0] is learner.bdm_target
    assert obs is batch.obs and action is batch.action
    assert next_obs is seen["chain"][1] is batch.next_obs and next_action is seen["chain"][2] is chosen
    assert batch.terminal.any() and torch.allclose(discount, 0.9 * (1 - batch.terminal))


def test_targets_move_at_every_second_update():
    learner = make_learner(actor_lr=0.0, bdm_lr=0.0, critic_lr=0.0, batch_size=2, hidden=4, bdm_hidden=4)
    for p, q in zip(learner.online, learner.targets):
        p.data.fill_(1.0)
        q.data.fill_(0.0)
    for _ in range(100):  # 200 updates
        learner.update()
    assert len(learner.targets) == sum(len(list(n.parameters())) for n in (learner.actor, learner.critic, learner.bdm))
    assert torch.allclose(torch.cat([q.flatten() for q in learner.targets]), torch.tensor(0.394229), atol=1e-5)


@pytest.mark.parametrize("name", ["actor", "critic", "bdm"])
def test_each_network_learns_at_its_own_rate(name):
    learner = make_learner(**dict(actor_lr=0.0, critic_lr=0.0, bdm_lr=0.0) | {f"{name}_lr": 1e-3})
    before = {net: flat(getattr(learner, net)) for net in ("actor", "critic", "bdm")}
    learner.update()
    assert [net for net in before if not torch.equal(flat(getattr(learner, net)), before[net])] == [name]


def test_sbc_leaves_the_critics_alone_and_learns_the_bdm():
    learner = make_learner(sbc_only=True)
    before = {name: flat(getattr(learner, name)) for name in ("actor", "critic", "critic_target", "bdm", "bdm_target")}
    for _ in range(5):
        learner.update()
    same = {name for name, value in before.items() if torch.equal(flat(getattr(learner, name)), value)}
    assert same == {"critic", "critic_target"}


def test_sbc_never_sees_rewards():
    data = toy_data()
    first = make_learner(data, sbc_only=True)
    first.update()
    data.reward.add_(100)
    second = make_learner(data, sbc_only=True)
    second.update()
    assert torch.equal(flat(first.actor), flat(second.actor))


FLAGS = dict(
    num_futures=5, futures="official", eta="uniform", sampler="official", critic_bc_reduce="none", actor_q="min",
    critic_wd=0.0, actor_bdm="online", state_weight="linear", c_s=0.5,
)  # fmt: skip


@pytest.mark.parametrize("flag", FLAGS)
def test_every_flag_changes_what_is_learnt(flag):
    plain, other = make_learner(w_s=0.1), make_learner(w_s=0.1, **{flag: FLAGS[flag]})
    for _ in range(2):
        plain.update()
        other.update()
    nets = ("bdm",) if flag == "sampler" else ("critic",) if flag.startswith("critic") else ("actor",)
    assert all(not torch.equal(flat(getattr(plain, net)), flat(getattr(other, net))) for net in nets)


def test_states_are_standardised_and_the_policy_remembers_how():
    data = toy_data()
    data.obs.mul_(5).add_(3)
    raw, raw_next = data.obs.clone(), data.next_obs.clone()
    mean, std = script.standardize(data)
    assert torch.allclose(mean, raw.mean(0)) and torch.allclose(std, raw.std(0, correction=0) + 1e-3)
    assert data.obs.mean().abs() < 1e-5 and torch.allclose(data.next_obs, (raw_next - mean) / std)
    learner = make_learner(data)
    learner.use_data(learner.futures, mean, std)
    assert torch.allclose(learner.act(raw, None), learner.actor(data.obs), atol=1e-6)
    net = gaussian_noise(torch.tensor([0.5, 0.0, -0.5]), 0.04)
    learner.bdm_target = net
    future = learner.sample_futures(raw.repeat(20, 1), data.action.repeat(20, 1), generator())
    assert torch.allclose(future.mean(0), mean + std * torch.tensor([0.5, 0.0, -0.5]), atol=0.15)


def test_bdm_learns_the_next_state_and_beyond():
    """s' = a + small noise, a uniform: with gamma = 0.5, s_f is s' half of the time, so E s_f = a / 2."""
    rng = np.random.default_rng(0)
    action = rng.uniform(-1, 1, (5000, 1))
    obs = np.concatenate([[[0.0]], action[:-1] + 0.05 * rng.standard_normal((4999, 1))])
    never = np.zeros(5000, bool)
    data = Dataset.from_arrays("line", obs, action, np.zeros(5000), never, never, None)
    mean, std = script.standardize(data)
    learner = make_learner(data, bdm_only="data", gamma=0.5, tau=0.05, bdm_lr=3e-3, batch_size=128, bdm_hidden=32)
    learner.use_data(learner.futures, mean, std)
    weights = flat(learner.actor), flat(learner.critic)
    for _ in range(250):
        learner.update()
    assert torch.equal(weights[0], flat(learner.actor)) and torch.equal(weights[1], flat(learner.critic))
    for a in (-0.8, 0.8):
        future = learner.sample_futures(torch.zeros(2000, 1), torch.full((2000, 1), a), generator())
        assert future.mean().item() == pytest.approx(a / 2, abs=0.12)
        assert (future - a).abs().lt(0.25).float().mean() > 0.45  # near the next state


# Command line


@pytest.fixture
def start(monkeypatch, tmp_path, capsys):
    """start(*flags): a tiny run on the pendulum; returns its folder and what it printed."""

    def start(*flags, name="run"):
        tiny = "--env pendulum-demo-medium --device cpu --steps 4 --batch-size 8 --eval-episodes 1 --hidden 8".split()
        tiny += ["--bdm-hidden", "8", "--out", str(tmp_path / name)]
        monkeypatch.setattr(sys, "argv", ["bdm_rebrac_sbc.py", *tiny, *map(str, flags)])
        common.cli(script.main)
        return tmp_path / name / "bdm_rebrac_sbc" / "pendulum-demo-medium" / "seed0", capsys.readouterr().out

    return start


def test_the_coefficient_that_acts_is_printed_and_kept(start):
    folder, printed = start("--w-s", 0.2, "--w-a", 0.3)
    saved = json.loads((folder / "args.json").read_text())["args"]
    assert saved["w_s"] == 0.2 and saved["c_s"] == pytest.approx(0.04)
    assert "w_s 0.2" in printed and "c_s = 0.04" in printed and (folder / "futures.png").exists()
    folder, printed = start("--w-s", 0, name="rebrac")
    assert "no state term" in printed and not (folder / "futures.png").exists()


def test_bdm_alone_of_the_data_and_of_a_run(start, capsys, monkeypatch):
    trained, _ = start(name="policy")
    folder, printed = start("--bdm-only", "data", name="data")
    assert "last " not in printed
    obs, action = np.random.default_rng(0).normal(size=(5, 3)), np.zeros((5, 1))
    future = script.sample_futures(folder, obs, action, n=7)
    assert future.shape == (5, 7, 3) and np.isfinite(future).all()
    assert np.array_equal(future, script.sample_futures(folder, obs, action, n=7))
    seen = {}
    original = script.use_policy

    def watched(run, data, device):
        original(run, data, device)
        act = common.load_policy(BDM, Args, run)
        seen["same"] = np.allclose(data.next_action, act(data.next_obs), atol=1e-6)

    monkeypatch.setattr(script, "use_policy", watched)
    start("--bdm-only", trained, name="of_run")
    assert seen["same"]
    for flags in (["--bdm-only", folder], ["--bdm-only", "data", "--sbc-only"], ["--gamma", 1], ["--evaluate", folder]):
        with pytest.raises(SystemExit) as stopped:
            start(*flags, name="bad")
        assert stopped.value.code == 2 and capsys.readouterr().err.count("\n") == 1
    rebrac, _ = start("--w-s", 0, name="rebrac")
    with pytest.raises(common.UserError):
        script.sample_futures(rebrac, obs, action)
