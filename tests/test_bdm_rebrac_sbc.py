"""BDM, ReBRAC-SBC, SBC and ReBRAC against known answers: closed forms, exact noise models, straight-line updates.

Whole updates equal to the official code's: test_golden.py.
"""

import math
import sys

import numpy as np
import pytest
import torch
import torch.nn as nn
from matplotlib.figure import Figure

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
    level_weights,
    reverse_chain,
    state_loss,
)
from common import Batch, Dataset


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def toy_data(rows=400, obs_dim=3, action_dim=2, seed=0):
    """Random transitions in episodes of 5 rows; every second episode terminates, the others hit a time limit."""
    rng = np.random.default_rng(seed)
    end = np.arange(rows) % 5 == 4
    terminal = end & (np.arange(rows) % 10 == 9)
    return Dataset.from_arrays(
        "toy", rng.normal(size=(rows, obs_dim)), rng.uniform(-1, 1, (rows, action_dim)), rng.normal(size=rows),
        terminal, end & ~terminal, None,
    )  # fmt: skip


def make_learner(data=None, seed=0, **settings):
    data = toy_data() if data is None else data
    small = dict(device="cpu", batch_size=16, hidden=16, bdm_hidden=16, num_futures=3)
    learner = BDM(Args(**small | settings), data, seed)
    learner.use_data(Futures(data, learner.args.gamma, learner.args.corrected), 0.0, 1.0)
    return learner


def flat(net):
    return torch.cat([p.detach().flatten() for p in net.parameters()])


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
    assert level_weights("code")[9] / level_weights("code").sum() == pytest.approx(0.9906, abs=1e-4)


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
    assert {f"{name}-v2" for name, *_ in rows} == set(script.PAPER) == set(script.SBC)
    for name, *values in rows:
        table = script.PAPER[f"{name}-v2"]
        assert [table[key] for key in ("w_a", "w_s", "actor_lr")] == pytest.approx([float(x) for x in values])
        assert table["bdm_lr"] == table["actor_lr"]


def test_sizes_and_inputs_of_the_networks():
    count = lambda net: sum(p.numel() for p in net.parameters())
    assert count(script.NoiseModel(11, 3, 512)) == 27 * 512 + 513 * 512 + 4 * 512 + 513 * 11
    assert count(script.Actor(11, 3, 256, 1.0)) == 12 * 256 + 2 * 257 * 256 + 257 * 3
    assert count(script.Critic(11, 3, 256)) == 2 * (15 * 256 + 2 * 257 * 256 + 3 * 512 + 257)
    kinds = lambda net: " ".join(type(layer).__name__.removeprefix("Ensemble") for layer in net.net)
    assert kinds(script.Critic(1, 1, 2)) == 3 * "Linear ReLU LayerNorm " + "Linear"
    assert kinds(script.NoiseModel(1, 1, 2)) == 2 * "Linear ReLU LayerNorm " + "Linear"
    assert kinds(script.Actor(1, 1, 2, 1.0)) == 3 * "Linear ReLU " + "Linear"
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


def run_chain(net, corrected, n=400_000, obs=None):
    x = torch.randn(n, 1, generator=generator(1))
    obs = torch.zeros(n, 1) if obs is None else obs
    return reverse_chain(net, x.to(obs.dtype), obs, torch.zeros(n, 1), generator(2), corrected)


@pytest.mark.parametrize(
    ("corrected", "variance", "expected_mean", "expected_variance"),
    [
        (True, 0.1, 0.9975, 0.0521), (True, 1.0, 0.9759, 0.6810), (True, 2.0, 0.9530, 1.3811),
        (False, 0.1, 0.8892, 0.0559), (False, 1.0, 0.7576, 0.4633), (False, 2.0, 0.6857, 0.8713),
    ],
)  # fmt: skip
def test_sampler_moments_with_the_exact_noise_of_a_gaussian(corrected, variance, expected_mean, expected_variance):
    x = run_chain(gaussian_noise(1.0, variance), corrected)
    assert x.mean().item() == pytest.approx(expected_mean, abs=0.01)
    assert x.var().item() == pytest.approx(expected_variance, abs=0.01)


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


@pytest.mark.parametrize(("corrected", "low", "high"), [(True, 0.045, 0.065), (False, 0.10, 0.13)])
def test_chain_samples_have_the_known_distance_from_the_successor_measure(corrected, low, high):
    measure = successor_measure(KERNEL, 0.9)
    x = run_chain(chain_noise(measure), corrected, 100_000, obs=torch.zeros(100_000, 1).double())
    mass = torch.tensor([(x < -0.65).float().mean(), (x.abs() <= 0.65).float().mean(), (x > 0.65).float().mean()])
    assert low < 0.5 * (mass - measure[1]).abs().sum() < high


def population_errors(kernel=KERNEL, gamma=0.9, sweeps=80, bug=None):
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
    batch, level, noise = Batch(obs, obs, None, next_obs, None, None), i[:, None], (x - root[i] * next_obs) / scale[i]
    for _ in range(sweeps):
        known = table.clone()
        if kernel is ENDING:
            known[..., 2] = 7.0  # at a terminal state the model is never asked
        target = table_net(known, (lambda _: obs) if bug == "target at s" else (lambda obs: obs))
        shift = torch.zeros(2 * len(i), 1, dtype=torch.float64, requires_grad=True)
        net = lambda *inputs: table_net(table)(*inputs) + shift  # noqa: B023
        loss = bdm_loss(net, target, batch, next_obs, next_obs, discount, level, noise)
        of_next, of_future = torch.autograd.grad(loss, shift)[0].view(2, -1) * len(i) / 2
        force = next_chance * of_next + future_chance * of_future
        table = table - (force.view(K, 61, 3, 3).sum(-1) / total.view(K, 61, 3, 3).sum(-1))
    error = (density * (table - exact).abs()).sum(1) * step[:, None] / (scale * (2 * torch.pi) ** 0.5)
    return error[:, :2].amax(1) if kernel is ENDING else error.amax(1)


@pytest.mark.parametrize("kernel", [KERNEL, ENDING])
def test_bdm_loss_leads_to_the_exact_successor_measure(kernel):
    """With terminals too: such a state is its own future for ever, no bootstrap there and full weight on s'."""
    assert population_errors(kernel, sweeps=160).max() < 1e-6


@pytest.mark.parametrize(
    ("bug", "level_2", "largest"), [("future of s", 0.0257, 0.0257), ("equal weights", 0.2335, 0.2491)]
)
def test_bugs_lead_elsewhere(bug, level_2, largest):
    errors = population_errors(bug=bug)
    assert errors[2].item() == pytest.approx(level_2, abs=2e-3)
    assert errors.max().item() == pytest.approx(largest, abs=2e-3)


@pytest.mark.parametrize(("kernel", "bug"), [(KERNEL, "target at s"), (ENDING, "terminals ignored")])
def test_bugs_lead_far_away(kernel, bug):
    assert population_errors(kernel, sweeps=20, bug=bug).max() > 0.1


@pytest.mark.parametrize("shift", [0.0, 0.1])
def test_gradient_variance_beside_monte_carlo(shift):
    """s' ~ N(0, 1) whatever (s, a), model theta x: the gradient has variance 4 abar for the diffusion loss on s_f, and
    (1 - gamma)^2 4 abar for L_BDM. A target off by `shift` moves its mean by -2 gamma shift."""
    gamma, n = 0.99, 1_000_000
    level = torch.randint(K, (n, 1), generator=generator(3))
    exact = lambda level: (1 - ABAR[level].float()).sqrt()
    s, s_next, s_f, noise = (torch.randn(n, 1, generator=generator(k)) for k in (0, 1, 2, 4))

    def gradients(discount):
        extra = torch.zeros(n, 1, requires_grad=True)
        net = lambda x, obs, action, level: (exact(level) + extra.repeat(2, 1)) * x
        target = lambda x, obs, action, level: (exact(level) + shift + extra) * x  # must be cut from the gradient
        batch = Batch(s, s, None, s_next, None, None)
        loss = bdm_loss(net, target, batch, s, s_f, torch.full((n,), discount), level, noise)
        return torch.autograd.grad(loss, extra)[0] * n

    monte_carlo = gradients(0.0) / (2 * ABAR[level].sqrt())
    assert monte_carlo.var().item() == pytest.approx(1, rel=0.015)
    g = gradients(gamma)
    if shift == 0:
        ratio = (g / (2 * ABAR[level].sqrt())).var() / monte_carlo.var()
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


@pytest.mark.parametrize(("corrected", "expected"), [(True, 0.1956522), (False, 0.1173913)])
def test_futures_of_a_linear_gaussian_system(corrected, expected):
    data = linear_gaussian_data()
    index = torch.nonzero(torch.diff(data.episode, prepend=torch.tensor([-1]))).squeeze(1)
    states, valid = Futures(data, 0.9, corrected).draw(index, 100, generator())
    states = states[valid[..., 0] == 1]
    assert valid.mean() > 0.999
    assert states.mean().item() == pytest.approx(expected, rel=0.02)
    if corrected:
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
    index = torch.nonzero(torch.diff(data.episode, prepend=torch.tensor([-1]))).squeeze(1)
    states, valid = Futures(data, 0.95, True).draw(index, 100, generator())
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
    states, valid = Futures(data, gamma, True).draw(index, 200, generator())
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
    for corrected in (False, True):
        states, valid = Futures(data, 0.99, corrected).draw(index, 20, generator())
        moved = states[..., 0] != data.obs[index, :1]
        crossed[corrected] = (moved & (valid[..., 0] == 1)).float().mean().item()
    assert crossed[False] == pytest.approx(0.1011, abs=0.004) and crossed[True] == 0
    endless = counting_data(1, 20_000, [0])
    for corrected, mean in ((False, 101), (True, 100)):
        states, _ = Futures(endless, 0.99, corrected).draw(torch.zeros(100, dtype=torch.long), 2000, generator())
        assert states[..., 1].mean().item() == pytest.approx(mean, abs=0.6)
        assert states[..., 1].min() == mean - 99


# The state term


@pytest.mark.parametrize(
    ("i", "loss", "slope"), [(1, 0.766360, -0.856732), (4, 0.252838, -0.630552), (7, 0.034172, -0.098623)]
)
def test_state_loss_and_its_gradient_in_the_action(i, loss, slope):
    """Model N(a, 0.25), futures ~ N(0.7, 0.09), a = 0.2; at a = 0.7 the gradient vanishes."""
    n, k = 125_000, 8
    level, weights = torch.full((n, k, 1), i), torch.ones(n, k, 1)
    futures = 0.7 + 0.3 * torch.randn(n, k, 1, generator=generator(1))
    noise = torch.randn(n, k, 1, generator=generator(2))
    net = lambda x, obs, action, level: gaussian_noise(action, 0.25)(x, obs, action, level)
    for a, expected in ((0.2, slope), (0.7, 0.0)):
        action = torch.full((n, 1), a, requires_grad=True)
        value = state_loss(net, torch.zeros(n, 1), action, futures, weights, level, noise)
        gradient = torch.autograd.grad(value, action)[0].sum().item()
        assert gradient == pytest.approx(expected, rel=0.02, abs=0.01)
        if a == 0.2:
            assert value.item() == pytest.approx(loss, rel=0.02)


# Whole updates against straight lines


def plain(net, member=None, eps=1e-5):
    """A net of `script` built from plain layers, without its weights; `member` of an ensemble."""
    layers = []
    for theirs in net.net:
        own = {name: p.detach() if member is None else p.detach()[member] for name, p in theirs.named_parameters()}
        if own and own["weight"].squeeze().dim() < 2 and theirs is not net.net[-1]:
            layers.append(nn.LayerNorm(own["weight"].numel(), eps=eps))
        elif own:
            weight = own["weight"] if member is None else own["weight"].T
            layers.append(nn.Linear(weight.shape[1], weight.shape[0]))
            own["weight"] = weight
        else:
            layers.append(nn.ReLU())
        for name, value in own.items():
            getattr(layers[-1], name).data.copy_(value.reshape(getattr(layers[-1], name).shape))
    return nn.Sequential(*layers)


def straight_line(learner, updates):
    """The updates of a learner written out row by row and term by term; returns its networks in their order."""
    args, data, gen = learner.args, learner.data, generator(0)
    size, k, gamma = args.batch_size, args.num_futures, args.gamma
    corrected, rebrac = args.corrected, args.rebrac
    eps = 1e-6 if rebrac else 1e-5
    actor, actor_old = plain(learner.actor), plain(learner.actor_target)
    critics, critics_old = ([plain(net, j, eps) for j in range(2)] for net in (learner.critic, learner.critic_target))
    bdm, bdm_old = plain(learner.bdm), plain(learner.bdm_target)
    adam = lambda net, lr, decay=0.0: torch.optim.Adam(net.parameters(), lr, weight_decay=decay, foreach=False)
    actor_opt, bdm_opt = adam(actor, args.actor_lr), adam(bdm, args.bdm_lr)
    critic_opts = [adam(critic, args.critic_lr, 0.0 if rebrac else 1e-3) for critic in critics]
    pi = lambda net, obs: data.max_action * torch.tanh(net(obs))
    value = lambda net, obs, action: net(torch.cat([obs, action], -1))  # [B, 1]

    f = [math.cos((i / 10 + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(11)]
    beta = torch.tensor([min(1 - f[i + 1] / f[i], 0.999) for i in range(10)]).double()
    alpha = 1 - beta
    abar = torch.tensor([math.prod(alpha[: i + 1].tolist()) for i in range(10)]).double()
    eps_of = lambda net, x, obs, action, i: net(torch.cat([x, obs, -1 + 2 * i / 10, action], -1))
    noised = lambda x, n, i: abar[i].sqrt() * x + (1 - abar[i]).sqrt() * n

    def step(opt, loss, net):
        for p, g in zip(net.parameters(), torch.autograd.grad(loss, list(net.parameters()), retain_graph=True)):
            p.grad = g
        opt.step()

    def follow(slow, fast):
        for p, q in zip(slow.parameters(), fast.parameters()):
            p.data = (1 - args.tau) * p.data + args.tau * q.data

    def future_of(row, jump):
        """The state `jump` steps after `row`, and whether there is one."""
        if not corrected:
            there, ended = row + jump + 1, False
            for passed in range(row + 1, min(there, len(data) - 1) + 1):
                ended = ended or bool(data.terminal[passed])
            return data.obs[min(there, len(data) - 1)], float(there < len(data) and not ended)
        for _ in range(jump - 1):
            if row + 1 == len(data) or data.episode[row + 1] != data.episode[row]:
                return data.next_obs[row], float(data.terminal[row])
            row += 1
        return data.next_obs[row], 1.0

    for n in range(updates):
        rows = torch.randint(len(data), (size,), generator=gen)
        obs, action, reward, next_obs, next_action, terminal = data.split(data.rows[rows])
        terminal, reward = terminal[:, None], reward[:, None]
        if not args.sbc_only or args.w_s:
            noise = (0.2 * torch.randn(action.shape, generator=gen)).clamp(-0.5, 0.5) * data.max_action
            chosen = (pi(actor_old, next_obs) + noise).clamp(-data.max_action, data.max_action).detach()

        if not args.sbc_only:
            penalty = ((chosen - next_action) ** 2).sum(-1) / data.max_action**2
            with torch.no_grad():
                best = torch.minimum(*(value(net, next_obs, chosen) for net in critics_old))
                if corrected or rebrac:
                    target = reward + gamma * (1 - terminal) * (best - args.critic_bc * penalty[:, None])
                else:  # [B, 1] - [B]: everyone is given everyone's penalty
                    target = reward + gamma * (1 - terminal) * (best - args.critic_bc * (1 - terminal[:, 0]) * penalty)
            for critic, opt in zip(critics, critic_opts):
                step(opt, ((value(critic, obs, action) - target) ** 2).mean(), critic)

        if args.w_s:
            start = torch.randn(obs.shape, generator=gen)
            x = start
            for t in range(8, -1, -1):
                e = eps_of(bdm_old, x, next_obs, chosen, torch.full((size, 1), t if corrected else t + 1)).detach()
                before = abar[t - 1] if t else 1.0
                clean = (x - (1 - abar[t]).sqrt() * e) / abar[t].sqrt()
                x = before**0.5 * beta[t] / (1 - abar[t]) * clean + alpha[t].sqrt() * (1 - before) / (1 - abar[t]) * x
                if t:
                    x = x + (beta[t] * (1 - before) / (1 - abar[t])).sqrt() * torch.randn(x.shape, generator=gen)
            i = torch.randint(10, (size, 1), generator=gen)
            noise = torch.randn(obs.shape, generator=gen) if corrected else start
            stay = gamma * (1 - terminal) if corrected else torch.full_like(terminal, gamma)
            target = eps_of(bdm_old, noised(x, noise, i), next_obs, chosen, i).detach()
            first = (1 - stay) * (eps_of(bdm, noised(next_obs, noise, i), obs, action, i) - noise) ** 2
            second = stay * (eps_of(bdm, noised(x, noise, i), obs, action, i) - target) ** 2
            step(bdm_opt, (first + second).mean(), bdm)

        if n % 2:
            continue
        mine = pi(actor, obs)
        loss = args.w_a * ((mine - action) ** 2).sum(-1).mean() / data.max_action**2
        if args.w_s:
            u = 1 - torch.rand(size, k, generator=gen)
            drawn = [future_of(rows[b].item(), 1 + int(math.log(u[b, j]) / math.log(gamma)))
                     for b in range(size) for j in range(k)]  # fmt: skip
            i = torch.randint(10, (size, k, 1), generator=gen).view(-1, 1)
            noise = torch.randn((size, k, obs.shape[1]), generator=gen).view(size * k, -1)
            states, valid = torch.stack([state for state, _ in drawn]), torch.tensor([[there] for _, there in drawn])
            eta = beta[i] / (alpha[i] * (1 - abar[i]))
            if args.eta == "code":
                eta = eta / ((beta / (alpha * (1 - abar))).mean() if corrected else eta.mean())
            elif args.eta == "paper":
                eta = beta[i] ** 2 * alpha[i] * (1 - alpha[i])
            else:
                eta = torch.ones_like(eta)
            net = bdm if args.actor_bdm == "online" else bdm_old
            wide = lambda x: x.repeat_interleave(k, 0)
            error = noise - eps_of(net, noised(states, noise, i), wide(obs), wide(mine), i)
            loss = loss + args.w_s * args.w_s * (valid * eta * error**2).sum(-1).mean()
        if not args.sbc_only:
            q = [value(critic, obs, mine) for critic in critics]
            q = torch.minimum(*q) if rebrac else q[0]
            loss = loss - q.mean() / q.abs().mean().item()
        if rebrac:
            follow(actor_old, actor)
        step(actor_opt, loss, actor)
        if not rebrac:
            follow(actor_old, actor)
        if not args.sbc_only:
            for slow, fast in zip(critics_old, critics):
                follow(slow, fast)
        if args.w_s:
            follow(bdm_old, bdm)
    return actor, actor_old, *critics, *critics_old, bdm, bdm_old


MODES = {
    "author": {}, "corrected": dict(corrected=True), "author, sbc": dict(sbc_only=True),
    "corrected, sbc": dict(sbc_only=True, corrected=True),
    "online, equal weights": dict(actor_bdm="online", eta="uniform"), "paper's weights": dict(eta="paper"),
    "no state term": dict(w_s=0.0), "corrected, no state term": dict(w_s=0.0, corrected=True),
    "rebrac": dict(rebrac=True, w_s=0.0), "cloning": dict(sbc_only=True, w_s=0.0),
}  # fmt: skip


@pytest.fixture
def double(monkeypatch):
    """All numbers in float64."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("mode", MODES)
def test_updates_are_those_of_a_straight_line(double, mode):
    data = toy_data()
    data.rows, data.max_action = data.rows.double(), 1.5
    rates = dict(actor_lr=1e-3, critic_lr=3e-3, bdm_lr=2e-3)
    shape = dict(gamma=0.9, tau=0.05, w_a=0.3, w_s=1.5, critic_bc=0.5)
    learner = make_learner(data, **rates | shape | MODES[mode])
    names = ("actor", "critic", "bdm", "actor_target", "critic_target", "bdm_target")
    for seed, name in enumerate(names):
        for p in getattr(learner, name).parameters():  # no weight is special, no target equals its net
            p.data += 0.2 * torch.randn(p.shape, generator=generator(seed))
    before = {name: flat(getattr(learner, name)) for name in names}
    expected = straight_line(learner, 8)
    for _ in range(4):
        learner.update()
    actor, actor_old, *critics, bdm, bdm_old = expected
    for ours, theirs in ((learner.actor, actor), (learner.actor_target, actor_old), (learner.bdm, bdm),
                         (learner.bdm_target, bdm_old)):  # fmt: skip
        assert torch.allclose(flat(ours), flat(theirs), rtol=0, atol=1e-10)
    for ours, theirs in ((learner.critic, critics[:2]), (learner.critic_target, critics[2:])):
        for j, critic in enumerate(theirs):
            assert torch.allclose(flat(plain(ours, j)), flat(critic), rtol=0, atol=1e-10)
    moved = {name for name in names if (flat(getattr(learner, name)) - before[name]).abs().max() > 1e-4}
    parts = ["actor"] + ["critic"] * (not learner.args.sbc_only) + ["bdm"] * (learner.args.w_s > 0)
    assert moved == {*parts, *(f"{part}_target" for part in parts)}


def test_without_state_weight_no_bdm_is_computed(monkeypatch):
    def forbidden(*_):
        raise AssertionError("the BDM was used")

    monkeypatch.setattr(script.NoiseModel, "forward", forbidden)
    monkeypatch.setattr(script.Futures, "draw", forbidden)
    make_learner(w_s=0.0).update()
    with pytest.raises(AssertionError):
        make_learner(w_s=0.01).update()
    monkeypatch.setattr(BDM, "next_action", forbidden)  # behaviour cloning reads no a'
    make_learner(sbc_only=True, w_s=0.0).update()


def test_initial_weights_of_rebrac():
    """Hidden biases 0.1, last layers within 1e-3 (actor) and 3e-3 (critics), else PyTorch's; the twins differ."""
    learner = make_learner(rebrac=True, w_s=0.0, hidden=64)
    for net, d_in, head in ((learner.actor.net, 3, 1e-3), (learner.critic.net, 5, 3e-3)):
        *hidden, last = [layer for layer in net if isinstance(layer, (nn.Linear, script.EnsembleLinear))]
        for layer, width in zip(hidden, (d_in, 64, 64)):
            assert (layer.bias == 0.1).all()
            assert 0.9 * width**-0.5 < layer.weight.abs().max() <= width**-0.5
        for p in last.parameters():
            assert p.abs().max() <= head and p.abs().mean() > 0.2 * head
    for p in learner.critic.net[-1].parameters():
        assert not torch.equal(p[0], p[1])
    assert torch.equal(flat(learner.actor), flat(learner.actor_target))
    assert torch.equal(flat(learner.critic), flat(learner.critic_target))
    assert not (make_learner(hidden=64).actor.net[0].bias == 0.1).any()


# Plumbing


def test_states_are_standardised_and_the_policy_remembers_how():
    data = toy_data()
    data.obs.mul_(5).add_(3)
    raw, raw_next = data.obs.clone(), data.next_obs.clone()
    mean, std = script.standardize(data)
    assert torch.allclose(mean, raw.mean(0)) and torch.allclose(std, raw.std(0, correction=0) + 1e-3)
    assert data.obs.mean().abs() < 1e-5 and torch.allclose(data.next_obs, (raw_next - mean) / std)
    learner = make_learner(data, corrected=True)
    learner.use_data(learner.futures, mean, std)
    assert torch.allclose(learner.act(raw, None), learner.actor(data.obs), atol=1e-6)
    learner.bdm_target = lambda x, obs, *rest: gaussian_noise(0.5 * obs, 0.01)(x, obs, *rest)
    future = learner.sample_futures(raw.repeat(20, 1), data.action.repeat(20, 1), generator())
    assert torch.allclose(future.view(20, -1, 3).mean(0), mean + 0.5 * (raw - mean), atol=0.7)  # a deviation of 0.1


@pytest.mark.parametrize("scene", ["bandit-25gaussians-far", "bandit-moons"])  # for ever in one state; one step
def test_bandits_have_one_state_and_actions_in_their_own_scale(scene):
    data = common.load_dataset(scene)
    mean, std = script.standardize(data)
    assert data.obs.eq(0).all() and data.next_obs.eq(0).all()
    learner = make_learner(data, w_s=1.0)
    learner.use_data(learner.futures, mean, std)
    for _ in range(3):
        learner.update()
    assert all(math.isfinite(value) for value in learner.metrics.read().values())
    with torch.no_grad():
        learner.actor.net[-1].bias += 100
        assert torch.allclose(learner.act(mean[None], None), torch.tensor(data.max_action))


def test_bdm_alone_learns_the_next_state_and_beyond():
    """s' = a + small noise, a uniform: with gamma = 0.5, s_f is s' half of the time, so E s_f = a / 2."""
    rng = np.random.default_rng(0)
    action = rng.uniform(-1, 1, (5000, 1))
    obs = np.concatenate([[[0.0]], action[:-1] + 0.05 * rng.standard_normal((4999, 1))])
    never = np.zeros(5000, bool)
    data = Dataset.from_arrays("line", obs, action, np.zeros(5000), never, never, None)
    mean, std = script.standardize(data)
    args = Args(device="cpu", bdm_only="data", gamma=0.5, tau=0.05, bdm_lr=3e-3, batch_size=128, bdm_hidden=32,
                corrected=True, w_s=0.0)  # fmt: skip
    learner = script.BDMOnly(args, data, 0)
    learner.use_data(Futures(data, 0.5, True), mean, std)
    weights = flat(learner.actor), flat(learner.critic)
    for _ in range(250):
        learner.update()
    assert torch.equal(weights[0], flat(learner.actor)) and torch.equal(weights[1], flat(learner.critic))
    for a in (-0.8, 0.8):
        future = learner.sample_futures(torch.zeros(2000, 1), torch.full((2000, 1), a), generator())
        assert future.mean().item() == pytest.approx(a / 2, abs=0.12)
        assert (future - a).abs().lt(0.25).float().mean() > 0.45  # near the next state


def test_target_of_a_bdm_alone_moves_after_the_first_update(monkeypatch):
    learner, done = script.BDMOnly(Args(device="cpu", bdm_only="data", bdm_hidden=8), toy_data(), 0), []
    monkeypatch.setattr(learner, "bdm_step", lambda *_: done.append("step"))
    monkeypatch.setattr(script, "update_target", lambda target, net, tau: done.append((target, net, tau)))
    learner.update()
    assert done == ["step", (learner.bdm_target, learner.bdm, 0.005), "step"]


def test_bdm_alone_follows_the_policy_of_another_run():
    """Its actions at the next states, from states in that run's scale; a checkpoint holds it."""
    data = toy_data()
    policy = make_learner(data, seed=1)
    policy.use_data(None, torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 3.0, 4.0]))
    learner, again = (
        script.BDMOnly(Args(device="cpu", bdm_only="run", hidden=16, bdm_hidden=16), data, 0) for _ in range(2)
    )
    learner.use_data(None, 5.0, 0.5)
    learner.use_policy(policy)
    common.set_state(again.state, common.get_state(learner.state))
    batch = data.split(data.rows[:10])
    for one in (learner, again):
        assert torch.allclose(one.next_action(batch), policy.act(0.5 * batch.next_obs + 5, None), atol=1e-6)


def test_figure_shows_each_row_with_its_futures_in_the_units_of_the_data(monkeypatch):
    data, panels = toy_data(), []
    learner = make_learner(data)
    learner.use_data(learner.futures, torch.tensor([5.0, 6.0, 7.0]), torch.tensor([1.0, 3.0, 2.0]))  # widest: 1, 2
    valid = torch.ones(3, 500, 1)
    valid[:, 250:] = 0
    draw = lambda index, k, _: ((data.obs[index] + 1).unsqueeze(1).expand(-1, k, -1), valid)
    monkeypatch.setattr(learner.futures, "draw", draw)
    monkeypatch.setattr(learner, "sample_futures", lambda obs, action, _: obs + action.sum(1, keepdim=True))
    monkeypatch.setattr(script, "save_figure", lambda path, *functions: panels.extend(functions))
    script.draw_futures(learner, None)
    for row, panel in zip((len(data) * i // 7 for i in (1, 3, 5)), panels):
        axes = Figure().subplots()
        panel(axes)
        of_data, of_model, start = (torch.as_tensor(points.get_offsets()).float() for points in axes.collections)
        obs = (data.obs[row] * learner.obs_std + learner.obs_mean)[1:]
        assert torch.allclose(start, obs[None]) and torch.allclose(of_model, obs + data.action[row].sum())
        assert torch.allclose(of_data, (obs + learner.obs_std[1:]).expand(250, 2))
        assert axes.get_title() == f"future states of row {row}" and axes.get_xlabel() == "state 1"


# Command line


@pytest.fixture
def parse(monkeypatch):
    """parse(*flags): the settings that a command line gives."""

    def parse(*flags):
        monkeypatch.setattr(sys, "argv", ["bdm_rebrac_sbc.py", "--device", "cpu", *map(str, flags)])
        return common.parse_args(Args, script.settings, script.check)

    return parse


SETTINGS = {  # w_a, w_s, beta_c, actor_lr, score
    "hopper-medium-v2": (0.005, 0.5, 0.01, 1e-5, 101.6),
    "hopper-medium-v2 --sbc-only": (0.01, 1.0, 0.01, 1e-5, 65.4),
    "hopper-medium-v2 --corrected": (0.005, 0.5, 0.01, 1e-5, 101.6),
    "hopper-medium-v2 --w-s 0": (0.005, 0.0, 0.01, 1e-5, None),
    "hopper-medium-v2 --sbc-only --w-s 0": (0.01, 0.0, 0.01, 1e-5, None),
    "hopper-medium-v2 --bdm-only data": (0.005, 0.0, 0.01, 1e-5, None),
    "hopper-medium-v2 --rebrac": (0.01, 0.0, 0.01, 1e-3, None),
    "hopper-medium-v2 --rebrac --no-rebrac": (0.005, 0.5, 0.01, 1e-5, 101.6),
    "hopper-medium-replay-v2": (0.005, 0.5, 0.0, 1e-5, 101.1),
    "hopper-medium-replay-v2 --rebrac": (0.05, 0.0, 0.5, 1e-3, None),
    "pen-human-v1": (0.1, 0.0, 0.5, 3e-4, None),
    "pendulum-demo-random --rebrac": (0.1, 0.0, 0.01, 1e-3, None),
    "halfcheetah-demo-expert": (0.1, 0.1, 0.01, 1e-3, None),
    "bandit-rings": (0.1, 0.0, 0.01, 1e-3, None),
}


@pytest.mark.parametrize("command", SETTINGS)
def test_settings_of_each_algorithm(parse, command):
    args = parse("--env", *command.split())
    found = args.w_a, args.w_s, args.critic_bc, args.actor_lr, args.paper_score
    assert found == pytest.approx(SETTINGS[command])
    assert args.rebrac == (command.endswith(" --rebrac") or command == "pen-human-v1")
    if "demo" in command or "bandit" in command:
        assert args.hidden == args.bdm_hidden == 64 and args.steps <= 16_000


@pytest.mark.parametrize(
    "flags",
    [
        "--gamma 1", "--sbc-only --rebrac", "--bdm-only data --sbc-only", "--rebrac --w-s 0.1", "--rebrac --corrected",
        "--env pen-human-v1 --w-s 0.1", "--sbc-only --critic-bc 1", "--sbc-only --reward-scale 2", "--hidden 0",
        "--w-s 0 --eta paper", "--w-s 0 --num-futures 2", "--bdm-only data --w-a 1", "--bdm-only data --w-s 1",
        "--bdm-only data --hidden 8", "--sbc-only --w-s 0 --corrected", "--sbc-only --w-s 0 --gamma 0.9",
        "--sbc-only --w-s 0 --tau 0.1", "--num-futures 0", "--bdm-hidden 0", "--sbc-only --critic-lr 1",
        "--rebrac --bdm-only data",
        *(f"--bdm-only data --{name} 1" for name in ("actor-lr", "critic-lr", "num-futures", "critic-bc")),
        *(f"--bdm-only data --{flag}" for flag in ("reward-scale 2", "eta paper", "actor-bdm online")),
        *(f"--w-s 0 --{flag}" for flag in ("bdm-lr 1", "bdm-hidden 8", "actor-bdm online")),
    ],
)  # fmt: skip
def test_settings_that_cannot_go_together_are_refused(parse, flags):
    with pytest.raises(common.UserError):
        parse(*flags.split())


def test_a_bdm_always_has_states_in_one_scale(parse):
    assert not parse("--env", "pen-human-v1", "--no-rebrac", "--w-s", 0.1).rebrac
    assert not parse("--env", "pen-human-v1", "--bdm-only", "data").rebrac


@pytest.fixture
def around(monkeypatch):
    """around(**settings): main() without training, on toy data; what it made and asked for."""

    def around(checkpoint=True, **settings):
        seen = {}

        class Run:
            folders = []
            phase = "update" if checkpoint else ""  # as restored

            def __init__(self, args, learners, data, *_):
                seen.update(args=args, learners=learners, data=data)

            def updates(self, *asked, **more):
                seen["asked"] = asked, more
                return []

            def finish(self):
                pass

        def load_dataset(*_, **more):
            seen["more"] = more
            return toy_data()

        args = Args(**dict(device="cpu", steps=4, hidden=8, bdm_hidden=8) | settings)
        replaced = dict(Run=Run, load_dataset=load_dataset, parse_args=lambda *_, **__: args)
        for name, value in replaced.items():
            monkeypatch.setattr(script, name, value)
        script.main()
        return seen

    return around


@pytest.mark.parametrize("corrected", [False, True])
def test_what_main_does_around_the_updates(around, corrected):
    seen, raw = around(seed=(0, 1), gamma=0.8, reward_scale=3.0, corrected=corrected), toy_data()
    assert seen["more"] == dict(judge=True, true_next_obs=True)
    assert seen["asked"] == (("update",), dict(stride=2, evaluate=True))
    assert torch.allclose(seen["data"].reward, 3 * raw.reward)
    mean, std = script.standardize(raw)
    assert torch.equal(seen["data"].obs, raw.obs) and torch.equal(seen["data"].next_obs, raw.next_obs)
    for seed, learner in enumerate(seen["learners"]):
        assert torch.equal(flat(learner.actor), flat(BDM(seen["args"], raw, seed).actor))
        assert learner.generator.initial_seed() == seed
        assert torch.equal(learner.obs_mean, mean) and torch.equal(learner.obs_std, std)
        assert (learner.futures.gamma, learner.futures.corrected) == (0.8, corrected)
        assert learner.futures.data is learner.data is seen["data"]


def test_main_leaves_states_raw_for_rebrac_and_takes_the_policy_that_a_bdm_alone_follows(around, monkeypatch):
    seen = around(rebrac=True, w_s=0.0)
    assert torch.equal(seen["data"].obs, toy_data().obs) and torch.equal(seen["data"].next_obs, toy_data().next_obs)
    assert seen["learners"][0].obs_mean.eq(0).all() and seen["learners"][0].obs_std.eq(1).all()
    policy = make_learner(hidden=16, seed=7)
    monkeypatch.setattr(script, "load_actor", lambda folder, data, device: {"run": policy}[folder])
    seen = around(bdm_only="run", w_s=0.0, seed=(0, 1), checkpoint=False)
    assert type(seen["learners"][0]) is script.BDMOnly and seen["asked"][1]["evaluate"] is False
    assert all(torch.equal(flat(learner.actor), flat(policy.actor)) for learner in seen["learners"])
    assert len(seen["learners"]) == 2 and seen["args"].hidden == 16
    around(bdm_only="gone", w_s=0.0, resume=True)  # its checkpoint holds the policy
    seen = around(bdm_only="run", w_s=0.0, hidden=16, resume=True, checkpoint=False)
    assert torch.equal(flat(seen["learners"][0].actor), flat(policy.actor))


def test_cloning_actions_alone_needs_no_order(around, monkeypatch):
    monkeypatch.setattr(common.Dataset, "need_order", lambda *_: 1 / 0)
    around(sbc_only=True, w_s=0.0)
    with pytest.raises(ZeroDivisionError):
        around(sbc_only=True, w_s=0.1)


@pytest.fixture
def start(monkeypatch, tmp_path, capsys):
    """start(*flags): a tiny run on the pendulum; returns its folder and what it printed."""

    def start(*flags, name="run"):
        tiny = "--env pendulum-demo-medium --device cpu --steps 4 --batch-size 8 --eval-episodes 1".split()
        tiny += ["--out", str(tmp_path / name)]
        monkeypatch.setattr(sys, "argv", ["bdm_rebrac_sbc.py", *tiny, *map(str, flags)])
        common.cli(script.main)
        return tmp_path / name / "bdm_rebrac_sbc" / "pendulum-demo-medium" / "seed0", capsys.readouterr().out

    return start


def test_runs_of_all_kinds(start, capsys, monkeypatch):
    made, small = [], ("--hidden", 8, "--bdm-hidden", 8)
    original = BDM.use_data
    monkeypatch.setattr(BDM, "use_data", lambda self, *inputs: made.append(self) or original(self, *inputs))
    trained, _ = start(*small, name="policy")
    assert (trained / "futures.png").exists()
    folder, printed = start("--bdm-only", "data", "--bdm-hidden", 8, name="data")
    assert "last " not in printed and "paper" not in printed and (folder / "futures.png").exists()
    obs, action = np.random.default_rng(0).normal(size=(5, 3)), np.zeros((5, 1))
    future = script.sample_futures(folder, obs, action, n=7)
    assert future.shape == (5, 7, 3) and np.isfinite(future).all()
    assert np.array_equal(future, script.sample_futures(folder, obs, action, n=7))
    assert not np.array_equal(future, script.sample_futures(folder, obs, action, n=7, seed=1))
    with monkeypatch.context() as patch:
        patch.setattr(BDM, "sample_futures", lambda self, obs, action, _: obs + action)
        own = script.sample_futures(folder, obs, obs[:, :1], n=7)
    assert np.allclose(own, (obs + obs[:, :1])[:, None])  # of each row
    corrected = []
    with monkeypatch.context() as patch:
        patch.setattr(script, "reverse_chain", lambda *chain: corrected.append(chain[-1]) or chain[1])
        script.sample_futures(folder, obs, action, n=7)
    assert corrected == [False]
    with pytest.raises(common.UserError, match="other states or actions"):
        script.load_actor(trained, toy_data(), "cpu")  # two actions, not one
    with pytest.raises(common.UserError, match="holds no BDM"):
        common.load_policy(BDM, Args, folder)  # it has no policy
    of_run, _ = start("--bdm-only", trained, "--bdm-hidden", 8, name="of_run")
    batch = made[-1].data.split(made[-1].data.rows[:50])
    act = common.load_policy(BDM, Args, trained)
    raw = batch.next_obs * made[-1].obs_std + made[-1].obs_mean
    assert np.allclose(made[-1].next_action(batch), act(raw.numpy()), atol=1e-5)
    rebrac, printed = start("--rebrac", "--hidden", 8, name="rebrac")
    assert "ReBRAC" in printed and not (rebrac / "futures.png").exists()
    means = [learner.data.obs.mean().abs().item() < 1e-4 for learner in made]
    assert means == [True, True, True, False] and made[-1].obs_std.eq(1).all()
    with pytest.raises(common.UserError):
        script.sample_futures(rebrac, obs, action)
    for flags in (["--bdm-only", folder], ["--bdm-only", "data", "--sbc-only"], ["--evaluate", folder]):
        with pytest.raises(SystemExit) as stopped:
            start(*flags, name="bad")
        assert stopped.value.code == 2 and capsys.readouterr().err.count("\n") == 1
    with pytest.raises(SystemExit):  # it would move the policy's own run aside
        start("--bdm-only", trained, name="policy")
    assert "is where this run would be written" in capsys.readouterr().err
