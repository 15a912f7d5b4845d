"""CPED against numbers with known answers: closed forms, Jacobians, hand-made networks, and counted optimiser steps."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn as nn

import cped
from common import Batch, Dataset, UserError, load_dataset
from cped import CPED, Args, Flow, alpha_at, gradient_penalty, logistic_nll, row_counter, target_action


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def make_learner(obs_dim=3, action_dim=2, batch=None, **settings):
    """A small learner; `batch` (one fixed batch) stands in for its data."""
    small = dict(device="cpu", hidden=16, behavior_hidden=16, batch_size=32, critic_start=0, q_start=0)
    data = SimpleNamespace(obs_dim=obs_dim, action_dim=action_dim, max_action=1.0)
    data.sample = lambda batch_size, generator: batch or random_batch(obs_dim, action_dim)
    return CPED(Args(**small | settings), data, seed=0)


def random_batch(obs_dim=3, action_dim=2, size=32):
    g = generator(1)
    obs, next_obs = torch.randn(2, size, obs_dim, generator=g)
    action, next_action = torch.rand(2, size, action_dim, generator=g) * 1.8 - 0.9
    return Batch(obs, action, torch.randn(size, generator=g), next_obs, next_action, torch.zeros(size))


def random_flow(obs_dim, action_dim, density="joint", hidden=750, std=0.05):
    """A flow far from its start: weights N(0, std^2), sigma N(0, 0.5^2), in double precision."""
    torch.manual_seed(0)
    flow = Flow(obs_dim, action_dim, hidden, density).double()
    for name, parameter in flow.named_parameters():
        nn.init.normal_(parameter, std=0.5 if name == "sigma" else std)
    return flow


def identity_flow(obs_dim, action_dim, sigma=None):
    """All couplings zero: z = x exp(sigma)."""
    flow = Flow(obs_dim, action_dim, 8)
    for parameter in flow.parameters():
        nn.init.zeros_(parameter)
    if sigma is not None:
        flow.sigma.data = torch.tensor(sigma)
    return flow


def snapshot(*parts):
    return [parameter.detach().clone() for part in parts for parameter in part.parameters()]


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# Flow and density


def test_logistic_density():
    z = torch.tensor([0.0, 2.0, -2.0, 0.7], requires_grad=True)
    nll = logistic_nll(z)
    assert nll.tolist()[:3] == pytest.approx([1.3862944, 2.2538561, 2.2538561], abs=1e-5)
    (slope,) = torch.autograd.grad(nll[3], z)
    assert slope[3].item() == pytest.approx(math.tanh(0.35), abs=1e-5)


@pytest.mark.parametrize("obs_dim, action_dim", [(11, 3), (17, 6), (29, 8)])
def test_log_determinant_is_the_sum_of_sigma(obs_dim, action_dim):
    flow, k = random_flow(obs_dim, action_dim), obs_dim + action_dim
    x = torch.randn(1, k, generator=generator(), dtype=torch.float64)
    obs, action = x.split([obs_dim, action_dim], dim=1)
    jacobian = torch.autograd.functional.jacobian(lambda x: flow(x, x[:, :0]), x).view(k, k)
    log_det = torch.linalg.slogdet(jacobian).logabsdet.item()
    assert log_det == pytest.approx(flow.sigma.sum().item(), abs=1e-4) and abs(log_det) > 0.1
    z = flow(x, x[:, :0])
    assert flow.nll(obs, action).item() == pytest.approx(logistic_nll(z).sum().item() - log_det, abs=1e-4)


@pytest.mark.parametrize("density", ["joint", "conditional"])
def test_inverse(density):
    flow = random_flow(11, 3, density)
    obs = torch.randn(50, 11, generator=generator(), dtype=torch.float64)
    x, context = flow.arrange(obs, torch.randn(50, 3, generator=generator(1), dtype=torch.float64))
    z = flow(x, context)
    assert (z - x * flow.sigma.exp()).abs().max() > 0.1  # the couplings do something
    assert (flow.inverse(z, context) - x).abs().max() < 1e-5


def test_inverse_by_hand():
    """m1 = 0.3 and sigma = (0, ln 2): x2 = 1 / 2 - 0.3, not (1 - 0.3) / 2 as with the scale undone last."""
    flow = identity_flow(1, 1, [0.0, math.log(2)])
    flow.nets[0][-2].bias.data.fill_(0.3)
    assert flow.inverse(torch.tensor([[0.0, 1.0]]), torch.zeros(1, 0))[0].tolist() == pytest.approx([0.0, 0.2])


@pytest.mark.parametrize("density", ["joint", "conditional"])
def test_samples_are_where_the_flow_maps_to_the_draws_of_the_prior(density):
    flow = random_flow(3, 2, density, hidden=16, std=0.5)
    obs = torch.randn(50, 3, generator=generator(), dtype=torch.float64)
    obs_drawn, action = flow.sample(obs, generator()).split([3, 2], dim=1)
    z = flow(*flow.arrange(obs_drawn, action))
    assert (z.float() - torch.logit(torch.rand(z.shape, generator=generator()))).abs().max() < 1e-4
    assert torch.equal(obs_drawn, obs) == (density == "conditional")


def test_generated_pairs_are_distributed_as_the_density_says():
    """With identity couplings x = z exp(-sigma), whose variance is pi^2 / 3 exp(-2 sigma)."""
    flow = identity_flow(1, 1, [0.5, -0.5])
    x = flow.sample(torch.zeros(200_000, 1), generator())
    assert x.mean(0).tolist() == pytest.approx([0, 0], abs=0.03)
    expected = [math.pi**2 / 3 * math.exp(-1), math.pi**2 / 3 * math.exp(1)]
    assert x.var(0).tolist() == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize(
    "obs_dim, action_dim, flow_size, d_size, actor_size, critic_size",
    [
        (11, 3, 2_298_042, 2_926, 69_635, 69_889),
        (17, 6, 2_325_069, 7_705, 71_942, 72_193),
        (29, 8, 2_367_111, 19_647, 75_528, 75_777),
    ],
)
def test_start(obs_dim, action_dim, flow_size, d_size, actor_size, critic_size):
    learner = make_learner(obs_dim, action_dim, hidden=256, behavior_hidden=750)

    def size(part):
        return sum(parameter.numel() for parameter in part.parameters())

    parts = (learner.behavior, learner.discriminator, learner.actor, learner.critic)
    assert [size(part) for part in parts] == [flow_size, d_size, actor_size, 2 * critic_size]
    k = obs_dim + action_dim
    x = torch.randn(100, k, generator=generator())
    flow = learner.behavior
    assert (flow(x, x[:, :0]) - x).abs().max() < 3e-3  # seen: 0.0012, 0.0015 and, at k = 37, 0.0022
    at_zero = flow.nll(torch.zeros(1, obs_dim), torch.zeros(1, action_dim)).item()
    assert at_zero == pytest.approx(2 * k * math.log(2), abs=0.05)
    assert flow.sizes == [k // 2, k - k // 2]


@pytest.mark.parametrize("kind", ["independent", "shifted", "dependent"])
def test_maximum_likelihood(kind):
    """s ~ Logistic(0, 1) and a | s ~ Logistic(., 1/4): entropy 4 - ln 4, reached by a total log scale of ln 4."""
    z = torch.logit(torch.rand(2, 100_000, 1, generator=generator()), eps=1e-7)
    obs = z[0]
    action = z[1] / 4 + dict(independent=0.0, shifted=-1.0, dependent=0.5 * obs)[kind]
    torch.manual_seed(0)
    flow, g = Flow(1, 1, 32), generator(1)
    opt = torch.optim.Adam(flow.parameters(), 3e-3)
    for _ in range(800):
        rows = torch.randint(len(obs), (256,), generator=g)
        opt.zero_grad()
        flow.nll(obs[rows], action[rows]).mean().backward()
        opt.step()
    with torch.no_grad():
        nll = flow.nll(obs, action).mean().item()
    best = 4 - math.log(4)
    assert best - 0.01 < nll < best + (0.02 if kind == "independent" else 0.04)
    assert flow.sigma.sum().item() == pytest.approx(math.log(4), abs=0.05)


def test_conditional_density_integrates_to_one_for_each_state():
    flow = random_flow(1, 2, "conditional", hidden=16, std=0.3)
    side = torch.linspace(-30, 30, 401, dtype=torch.float64)
    action = torch.cartesian_prod(side, side)
    for obs in (-2.0, 1.0):
        with torch.no_grad():
            density = torch.exp(-flow.nll(torch.full_like(action[:, :1], obs), action)).view(401, 401)
        assert torch.trapezoid(torch.trapezoid(density, side), side).item() == pytest.approx(1, abs=2e-3)


# Discriminator


def test_gradient_penalty_by_hand():
    """D(x) = x W with W = (2 / sqrt d) I: the sum over outputs has gradient norm 2 everywhere."""
    discriminator = nn.Linear(4, 4, bias=False)
    nn.init.eye_(discriminator.weight).data.mul_(2 / 4**0.5)
    real, fake = torch.randn(2, 64, 4, generator=generator())
    penalty = gradient_penalty(discriminator, real, fake, generator())
    assert penalty.item() == pytest.approx(1.0, abs=1e-5)
    (slope,) = torch.autograd.grad(penalty, discriminator.weight)
    assert slope.abs().max() > 0.1
    loss = cped.discriminator_loss(discriminator, real, fake, Args.gp_weight, generator())
    assert loss.item() == pytest.approx((fake.mean() - real.mean()).item() + 0.5, abs=1e-5)


def test_penalty_is_taken_beyond_the_ends_of_the_line():
    seen = []

    def discriminator(x):
        seen.append(x.detach())
        return x

    gradient_penalty(discriminator, torch.ones(1000, 1), torch.zeros(1000, 1), generator())
    assert seen[0].min() < -1 and seen[0].max() > 2  # real at 1, fake at 0
    assert seen[0].mean().item() == pytest.approx(0, abs=0.15)  # u ~ N(0, 1) multiplies the real pair


def test_offset_layer_norm():
    norm = cped.OffsetLayerNorm(3)
    assert norm(torch.tensor([[1.0, 2.0, 3.0]]))[0].tolist() == pytest.approx([-1, 0, 1], abs=1e-5)
    assert [name for name, _ in norm.named_parameters()] == ["offset"]


def test_the_flow_moves_its_samples_to_where_the_discriminator_is_high():
    """Eq. 4 subtracts E D(fake): with D(x) = sum of x and a large weight, samples must grow."""
    learner = make_learner(gan_weight=1e4, behavior_lr=0.05)
    learner.discriminator = lambda x: x
    batch = random_batch(size=512)
    first = learner.behavior.sample(batch.obs, generator()).mean()
    for _ in range(20):
        learner.behavior_step(batch, learner.behavior.sample(batch.obs, generator()))
    assert learner.behavior.sample(batch.obs, generator()).mean() > first + 0.02


def test_adam_of_the_flow():
    """Gradients 1 and 0.1 give steps of -0.99990 and -3.73752 learning rates."""
    learner = make_learner(behavior_lr=1e-4)
    sigma, steps = learner.behavior.sigma, []
    for gradient in (1.0, 0.1):
        before = sigma.detach().clone()
        sigma.grad = torch.full_like(sigma, gradient)
        learner.behavior_opt.step()
        steps.append((sigma - before)[0].item() / 1e-4)
    assert steps == pytest.approx([-0.99990, -3.73752], rel=1e-4)


# Actor and critic


class HandMadeActor(nn.Module):
    """max_action tanh(theta) in every state, for one-dimensional actions."""

    def __init__(self, theta=0.0):
        super().__init__()
        self.theta = nn.Parameter(torch.tensor([theta]))

    def forward(self, obs):
        return torch.tanh(self.theta).expand(len(obs), 1)


def one_state_learner(slopes=(2.0, 5.0), offsets=(0.0, 10.0), **settings):
    """One state, one action, p(a) logistic with log scale ln 4, critics Q_i(a) = slope_i a + offset_i."""
    learner = make_learner(1, 1, **settings)
    learner.behavior = identity_flow(1, 1, [0.0, math.log(4)])
    learner.critic = lambda obs, action: torch.stack([s * action[:, 0] + o for s, o in zip(slopes, offsets)])
    learner.actor = HandMadeActor()
    learner.actor_opt = torch.optim.Adam(learner.actor.parameters(), 1e-2, fused=True)
    zeros = torch.zeros(4, 1)
    return learner, Batch(zeros, zeros, zeros[:, 0], zeros, zeros, zeros[:, 0])


@pytest.mark.parametrize(
    "slopes, offsets, alpha, low, high",
    [
        ((2.0, 5.0), (0.0, 10.0), 1.0, 0.27365, 0.27565),  # 2 artanh(2 / 4) / 4
        ((5.0, 2.0), (10.0, 0.0), 1.0, 0.27365, 0.27565),
        ((2.0, 5.0), (0.0, 10.0), 1000.0, -0.75e-3, 1.25e-3),
        ((5.0, 5.0), (0.0, 10.0), 1.0, 0.99, 1.0),  # beyond the largest pull alpha exp(sigma) = 4
    ],
)
def test_actor_finds_the_optimum(slopes, offsets, alpha, low, high):
    """From an action of 0.987 down to the optimum, or further up."""
    learner, batch = one_state_learner(slopes, offsets, alpha=(alpha,), alpha_until=())
    learner.actor.theta.data.fill_(2.5)
    for _ in range(500):
        learner.actor_step(batch)
    assert low <= learner.actor(batch.obs)[0].item() <= high


def test_threshold_has_no_gradient():
    """The actor's gradient is the same whatever -log p(s, pi(s)) is compared with; by default, the data's action."""
    gradients, batch = [], random_batch()
    for epsilon in (None, 0.0, 1e3):
        learner = make_learner(epsilon=epsilon)
        with torch.no_grad():
            pairs = [(batch.obs, action) for action in (learner.actor(batch.obs), batch.action)]
            ours, data = (learner.behavior.nll(*pair).mean().item() for pair in pairs)
        learner.actor_step(batch)
        expected = ours - (data if epsilon is None else epsilon)
        assert learner.metrics.read()["excess_nll"] == pytest.approx(expected, rel=1e-4) and abs(expected) > 0.1
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in learner.actor.parameters()]))
    assert gradients[0].abs().max() > 1e-3
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-6, atol=0)
    torch.testing.assert_close(gradients[0], gradients[2], rtol=1e-6, atol=0)


def test_actor_skips_huge_and_infinite_losses():
    learner = make_learner(epsilon=0.0)
    before = snapshot(learner.actor)
    learner.behavior.sigma.data.fill_(16)  # -log density of about 1e7, times alpha = 1000
    learner.actor_step(random_batch())
    assert same(before, snapshot(learner.actor)) and learner.metrics.read()["actor_skipped"] == 1
    learner.behavior.sigma.data.fill_(0)
    critic = learner.critic
    for value in (math.nan, math.inf, -math.inf):
        learner.critic = lambda obs, action, value=value: critic(obs, action) + value
        learner.actor_step(random_batch())
        assert same(before, snapshot(learner.actor)) and learner.metrics.read()["actor_skipped"] == 1
    learner.critic = critic
    learner.actor_step(random_batch())
    assert not same(before, snapshot(learner.actor)) and learner.metrics.read()["actor_skipped"] == 0


def test_losses_that_are_not_finite_change_nothing():
    batch = random_batch()
    broken = batch._replace(action=torch.full_like(batch.action, math.nan))
    learner = make_learner(batch=broken)
    before = snapshot(learner.behavior, learner.discriminator)
    learner.pretrain()
    assert same(before, snapshot(learner.behavior, learner.discriminator))
    assert math.isnan(learner.metrics.read()["behavior_loss"])  # which ends the run


def test_targets_move_by_tau():
    """Once per update(), towards the networks that the first of its two batches has left: all of them, by tau."""
    learner = make_learner(critic_lr=0.1, actor_lr=0.1, tau=0.25, policy_delay=1)
    targets, online = (learner.critic_target, learner.actor_target), (learner.critic, learner.actor)
    before = snapshot(*targets)
    assert same(before, snapshot(*online))  # they start as copies
    learner.update()
    for old, new, target in zip(before, snapshot(*online), snapshot(*targets), strict=True):
        torch.testing.assert_close(target, old + 0.25 * (new - old))
    assert not same(before, snapshot(*targets))


def test_target_action_is_noisy_clipped_and_leaves_the_box():
    action = target_action(lambda obs: torch.ones(len(obs), 1), torch.zeros(100_000, 1), 0.2, 0.5, generator())
    assert action.mean().item() == pytest.approx(1, abs=2e-3)  # 0.92 if it were clamped to the box
    assert action.std().item() == pytest.approx(0.2 * 0.985, abs=2e-3)
    assert (action - 1).abs().max().item() == pytest.approx(0.5, abs=1e-6)


@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
def test_target_is_the_lesser_target_critic_at_the_target_action(order):
    """min(a + 3, 10 a) at a = 1.5, outside the action box."""
    learner = make_learner(1, 1, gamma=1.0, target_noise=0.0, critic_lr=0.0)
    learner.actor_target = lambda obs: torch.full((len(obs), 1), 1.5)
    learner.critic_target = lambda obs, action: torch.stack([action[:, 0] + 3, 10 * action[:, 0]])[order]
    learner.critic = ZeroCritic()
    learner.critic_opt = torch.optim.Adam(learner.critic.parameters(), 1e-3, fused=True)
    zeros = torch.zeros(8, 1)
    learner.critic_step(Batch(zeros, zeros, zeros[:, 0], zeros, zeros, zeros[:, 0]))
    assert learner.metrics.read()["critic_loss"] == pytest.approx(2 * 4.5**2)
    (gradient,) = (parameter.grad for parameter in learner.critic.parameters())
    assert gradient.item() == pytest.approx(2 * 2 * -4.5)


class ZeroCritic(nn.Module):
    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, obs, action):
        return self.bias.expand(2, len(obs))


# Schedules


def official_alpha(n, behavior_steps=500_000):
    """The official table for MuJoCo, in updates counted from the start of the first phase."""
    if n <= behavior_steps + 100_000:
        return 1000
    if n <= 1_000_000:
        return 10 - 2.5 * math.floor((n - behavior_steps - 100_000) / 100_000)
    return 1.5


def official_maze_alpha(n):
    return next(value for until, value in ((3e5, 0.5), (5e5, 0.25), (8e5, 0.1), (math.inf, 0.08)) if n <= until)


def table_of(env):
    args = Args(**cped.PAPER[env])
    values, until = torch.tensor(args.alpha), args.steps * torch.tensor(args.alpha_until)
    return args, lambda t: alpha_at(torch.tensor(float(t)), values, until).item()


def test_alpha_table_of_mujoco():
    args, alpha = table_of("hopper-medium-v2")
    assert (args.behavior_steps, args.steps) == (500_000, 1_000_000)
    known = {0: 1000, 99_998: 1000, 100_002: 10, 199_998: 10, 200_000: 7.5, 300_000: 5, 400_000: 2.5, 499_998: 2.5}
    assert {t: alpha(t) for t in known} == known
    assert alpha(500_002) == alpha(999_998) == 1.5
    steps = sorted({*range(0, 1_000_000, 9_998), *(100_000 * i + j for i in range(1, 10) for j in (-2, 0, 2))})
    different = [t for t in steps if alpha(t) != official_alpha(t + 500_000)]
    assert different == [100_000, 500_000]  # one actor update each; at the second the official alpha is 0
    assert official_alpha(700_000, 50_000) == -2.5  # what counting from the start of the second phase rules out


def test_alpha_table_of_antmaze():
    for env, start, total in (("antmaze-umaze-v2", 300_000, 1_000_000), ("antmaze-large-play-v2", 400_000, 1_000_000)):
        args, alpha = table_of(env)
        assert args.behavior_steps == start and args.behavior_steps + args.steps == total
        for n in (start + 2, 499_998, 500_002, 799_998, 800_002, 999_998):
            assert alpha(n - start) == pytest.approx(official_maze_alpha(n))


def test_official_numbers_of_updates():
    """The paper's MuJoCo run with all lengths divided by 1000; both targets move once an actor update."""
    learner = make_learner(behavior_hidden=4, hidden=4, batch_size=2, steps=1000, critic_start=30, q_start=50)
    with_q, alphas, add = [], [], learner.metrics.add

    def watch(**values):
        add(**values)
        if "actor_loss" in values:
            alphas.append(values["alpha"].item())
            with_q.append((values["actor_loss"] != values["alpha"] * values["excess_nll"]).item())

    learner.metrics.add = watch
    lerp, targets = torch._foreach_lerp_, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "_foreach_lerp_", lambda *some: targets.append(lerp(*some)))
        for _ in range(500 // 5):
            learner.pretrain()
        before = snapshot(learner.behavior, learner.discriminator)
        for _ in range(1000 // 2):
            learner.update()
    assert same(before, snapshot(learner.behavior, learner.discriminator))  # frozen

    def updates(opt):
        (count,) = {state["step"].item() for state in opt.state.values()}
        return count

    opts = (learner.discriminator_opt, learner.behavior_opt, learner.critic_opt, learner.actor_opt)
    assert [updates(opt) for opt in opts] == [500, 100, 970, 500]
    assert alphas == [1000] * 50 + [10] * 50 + [7.5] * 50 + [5] * 50 + [2.5] * 50 + [1.5] * 250
    assert sum(with_q) == 475 and len(targets) == 1000 and learner.step == 1000


def test_dual_ascent():
    """alpha grows while the policy is less likely than epsilon allows, falls otherwise, and stays at 0 or above."""
    for epsilon, expected in ((-1.0, 1.5 + 0.1 * (4 * math.log(2) - math.log(4) + 1)), (100.0, 0.0)):
        learner, batch = one_state_learner(alpha_mode="dual", epsilon=epsilon, alpha_lr=0.1)
        assert learner.alpha.item() == 1.5
        learner.actor_step(batch)
        assert learner.alpha.item() == pytest.approx(expected)
    learner, batch = one_state_learner(alpha_mode="dual", epsilon=-1.0, alpha_lr=0.1, q_start=1)
    learner.actor_step(batch)
    assert learner.alpha.item() == 1.5  # not before the actor climbs Q


def test_dual_finds_the_multiplier_that_keeps_the_threshold():
    """Q = 2 a and -log p(a) <= epsilon: the policy ends where the density is epsilon, with alpha = 2 / slope there."""
    a = 0.3
    epsilon = 4 * math.log(2) - math.log(4) + 2 * math.log(math.cosh(2 * a))
    learner, batch = one_state_learner(alpha_mode="dual", epsilon=epsilon, alpha_lr=0.01)
    for _ in range(1000):
        learner.actor_step(batch)
    assert learner.actor(batch.obs)[0].item() == pytest.approx(a, abs=5e-3)
    assert learner.alpha.item() == pytest.approx(2 / (4 * math.tanh(2 * a)), rel=0.03)


# Flags


@pytest.mark.parametrize("settings", [dict(density="conditional"), dict(gan_weight=0.0), dict(gp_weight=0.0)])
def test_flags_of_the_first_phase_change_it(settings):
    plain, other = make_learner(), make_learner(**settings)
    for learner in (plain, other):
        learner.pretrain()
        learner.pretrain()
    parts = [snapshot(learner.behavior, learner.discriminator) for learner in (plain, other)]
    assert any(a.shape != b.shape or not torch.equal(a, b) for a, b in zip(*parts))


# Data and figures


@pytest.mark.parametrize(
    "rows, terminals, dropped",
    [(2500, [], [999, 1999]), (2500, [499], [1499, 2499]), (2000, [999], [999, 1999]), (1600, [500, 550], [1550])],
)
def test_row_counter(rows, terminals, dropped):
    """A last row that is dropped costs nothing: it has no successor anyway."""
    terminal = np.zeros(rows, bool)
    terminal[terminals] = True
    assert np.flatnonzero(row_counter(terminal)).tolist() == dropped


def test_row_counter_of_a_million_rows():
    assert row_counter(np.zeros(1_000_000, bool)).sum() == 1000  # the last row has no successor: 999,000 are kept


def test_row_counter_is_the_official_loop():
    terminal = np.random.default_rng(0).random(20_000) < 1 / 1500
    count, dropped = 0, []
    for i, end in enumerate(terminal):
        if count >= 999:
            dropped.append(i)
            count = 0
        else:
            count = 0 if end else count + 1
    assert np.flatnonzero(row_counter(terminal)).tolist() == dropped and len(dropped) > 3


def test_time_limits_of_the_loader(tmp_path):
    """2500 rows, a time limit every 100: the counter keeps all but 2 and the last, the file's limits all but 25."""
    timeouts = np.arange(2500) % 100 == 99
    arrays = dict(observations=np.zeros((2500, 17)), actions=np.zeros((2500, 6)), rewards=np.zeros(2500))
    np.savez(tmp_path / "data.npz", **arrays, terminals=np.zeros(2500, bool), timeouts=timeouts)
    path = str(tmp_path / "data.npz")
    assert len(load_dataset("HalfCheetah-v4", path, timeout_rule=row_counter)) == 2497
    assert len(load_dataset("HalfCheetah-v4", path, timeout_rule=None)) == 2475


def test_density_is_sampled():
    """Metropolis draws of p(a | s) for a known density: logistic with scale 1/4."""
    flow = identity_flow(1, 1, [0.0, math.log(4)])
    drawn = cped.sample_density(flow, torch.zeros(1), torch.zeros(4000, 1), generator(), updates=400, width=0.5)
    assert drawn.mean().item() == pytest.approx(0, abs=0.04)
    assert drawn.std().item() == pytest.approx(math.pi / 3**0.5 / 4, rel=0.05)


# Command line


def main_until_data(monkeypatch, flags):
    """`cped.py flags` up to the loading of its data: the settings, the rule for time limits, and the data's rewards."""
    data, seen = Dataset.bandit("stand-in", torch.linspace(0, 1, 10)[:, None], lambda action: action[:, 0].round()), []
    monkeypatch.setattr(cped, "load_dataset", lambda env, path, timeout_rule: seen.append(timeout_rule) or data)
    monkeypatch.setattr(cped, "CPED", lambda args, data, seed: seen.append(args))
    monkeypatch.setattr(cped, "Run", lambda *rest: 1 / 0)  # far enough
    monkeypatch.setattr("sys.argv", ["cped.py", "--device", "cpu", *flags.split()])
    with pytest.raises(ZeroDivisionError):
        cped.main()
    return seen[1], seen[0], set(data.reward.tolist())


@pytest.mark.parametrize(
    "flags, counted, rewards",
    [
        ("--env antmaze-umaze-v2", True, {-1.0, 0.0}),
        ("--env hopper-medium-v2", True, {0.0, 1.0}),
        ("--env hopper-medium-v2 --use-timeouts", False, {0.0, 1.0}),
        ("--env hopper-medium-v2 --data-path mine.hdf5", False, {0.0, 1.0}),
        ("--env Hopper-v4 --data-path mine.npz", False, {0.0, 1.0}),
        ("--env hopper-expert-v2", False, {0.0, 1.0}),
        ("--env pendulum-demo-expert", False, {0.0, 1.0}),
    ],
)
def test_the_official_row_counter_is_for_the_papers_own_files(flags, counted, rewards, monkeypatch):
    _, rule, found = main_until_data(monkeypatch, flags)
    assert rule is (row_counter if counted else None) and found == rewards


@pytest.mark.parametrize(
    "flags, word",
    [
        ("--epsilon 1", "--epsilon does nothing"),
        ("--alpha-lr 0.1", "--alpha-lr does nothing"),
        ("--alpha-mode dual --alpha-until 0.5", "--alpha-until does nothing"),
        ("--use-timeouts", "--use-timeouts does nothing"),
        ("--alpha 1", "--alpha-until"),
        ("--alpha 1 2 3 --alpha-until 0.5 0.1", "--alpha-until"),
        ("--alpha 1 2 3 --alpha-until 0.5 0.5", "--alpha-until"),
        ("--alpha 1 2 --alpha-until 1.5", "--alpha-until"),
        ("--alpha 2 1 --alpha-mode dual", "--alpha takes one value"),
        ("--behavior-steps 0 --behavior-lr 1", "--behavior-lr does nothing"),
        ("--gan-weight 0 --gp-weight 1", "--gp-weight does nothing"),
        ("--target-noise 0 --noise-clip 1", "--noise-clip does nothing"),
        ("--alpha -1 --alpha-until", "--alpha"),
        ("--policy-delay 0", "--policy-delay"),
        ("--discriminator-steps 0", "--discriminator-steps"),
        ("--behavior-hidden 0", "--behavior-hidden"),
        ("--gamma 1.5", "--gamma"),
        ("--critic-lr -1", "--critic-lr"),
    ],
)
def test_settings_that_cannot_go_together_are_refused(flags, word, monkeypatch):
    monkeypatch.setattr("sys.argv", ["cped.py", "--device", "cpu", *flags.split()])
    with pytest.raises(UserError, match=word):
        cped.main()


# Our own readings, without an official counterpart: whole updates against straight lines


def line_net(net, x):
    """A coupling's network, layer by layer."""
    for i in (0, 2, 4):
        x = x @ net[i].weight.T + net[i].bias
        x = torch.where(x > 0, x, 0.01 * x)
    return x


def line_nll(flow, obs, action):
    """-log p(a | s) of the conditional flow for two-dimensional actions."""
    a, b = action[:, :1], action[:, 1:]
    for i in (0, 2):
        b = b + line_net(flow.nets[i], torch.cat([a, obs], 1))
        a = a + line_net(flow.nets[i + 1], torch.cat([b, obs], 1))
    z = torch.cat([a, b], 1) * torch.exp(flow.sigma)
    return (2 * torch.log1p(torch.exp(z)) - z).sum(1) - flow.sigma.sum()


def adam_step(parameter, gradient, lr, beta1=0.9, beta2=0.999, eps=1e-8):
    """Where Adam's first step leads."""
    m, v = (1 - beta1) * gradient / (1 - beta1), (1 - beta2) * gradient**2 / (1 - beta2)
    return parameter - lr * m / (v.sqrt() + eps)


@pytest.mark.parametrize("epsilon", [None, -3.0])
def test_a_whole_update_with_conditional_density_and_dual_alpha(epsilon):
    """Two critic updates, one of the actor between them, and alpha's step, from q_start on."""
    settings = dict(density="conditional", alpha_mode="dual", alpha=(7.0,), alpha_lr=0.3, epsilon=epsilon, tau=0.1)
    learner = make_learner(critic_lr=1e-2, actor_lr=1e-2, **settings)
    batches = iter(batches_of_rows := [random_batch(), random_batch(size=16)])
    learner.data.sample = lambda batch_size, generator: next(batches)
    reference = CPED(learner.args, learner.data, 0)  # the same start
    for name in ("critic_target", "actor_target"):  # targets of their own
        for mine, its in zip(getattr(learner, name).parameters(), getattr(reference, name).parameters()):
            mine.data.mul_(1.5)
            its.data.mul_(1.5)
    learner.update()

    g, batch = reference.generator, batches_of_rows[0]
    noise = 0.2 * torch.randn(32, 2, generator=g)
    next_action = reference.actor_target(batch.next_obs) + noise.clamp(-0.5, 0.5)
    target = batch.reward + 0.99 * reference.critic_target(batch.next_obs, next_action).min(0).values.detach()
    q = reference.critic(batch.obs, batch.action)
    loss = ((q[0] - target) ** 2).mean() + ((q[1] - target) ** 2).mean()
    gradients = torch.autograd.grad(loss, list(reference.critic.parameters()))
    for parameter, gradient in zip(reference.critic.parameters(), gradients):
        parameter.data = adam_step(parameter.data, gradient, 1e-2)

    action = reference.actor(batch.obs)
    bound = line_nll(reference.behavior, batch.obs, batch.action).mean().item() if epsilon is None else epsilon
    excess = line_nll(reference.behavior, batch.obs, action).mean() - bound
    q = reference.critic(batch.obs, action).min(0).values.mean()
    gradients = torch.autograd.grad(7.0 * excess - q, list(reference.actor.parameters()))
    for parameter, gradient in zip(reference.actor.parameters(), gradients):
        parameter.data = adam_step(parameter.data, gradient, 1e-2)

    assert learner.alpha.item() == pytest.approx(max(0.0, 7.0 + 0.3 * excess.item()), rel=1e-5)
    assert learner.metrics.read()["excess_nll"] == pytest.approx(excess.item(), rel=1e-4)
    for mine, its in zip(learner.actor.parameters(), reference.actor.parameters(), strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-4, atol=1e-5)
    pairs = zip(learner.actor_target.parameters(), reference.actor_target.parameters(), learner.actor.parameters())
    for mine, old, online in pairs:
        torch.testing.assert_close(mine, 0.9 * old + 0.1 * online)


def test_a_whole_update_of_the_conditional_flow():
    """First phase: the flow's step on -log p(a | s) less the discriminator's view of its own actions at the same s."""
    learner = make_learner(density="conditional", discriminator_steps=1, behavior_lr=1e-3, gan_weight=2.0)
    batch = random_batch()
    learner.data.sample = lambda batch_size, generator: batch
    reference = CPED(learner.args, learner.data, 0)
    learner.pretrain()

    flow, z = reference.behavior, torch.logit(torch.rand(32, 2, generator=reference.generator), eps=1e-7)
    x = z * torch.exp(-flow.sigma)
    a, b = x[:, :1], x[:, 1:]
    for i in (3, 1):
        a = a - line_net(flow.nets[i], torch.cat([b, batch.obs], 1))
        b = b - line_net(flow.nets[i - 1], torch.cat([a, batch.obs], 1))
    fake = torch.cat([batch.obs, a, b], 1)
    loss = line_nll(flow, batch.obs, batch.action).mean() - 2.0 * learner.discriminator(fake).mean()  # already moved
    gradients = torch.autograd.grad(loss, list(flow.parameters()))
    for parameter, gradient in zip(flow.parameters(), gradients):
        parameter.data = adam_step(parameter.data, gradient, 1e-3, beta2=0.01, eps=1e-4)
    for mine, its in zip(learner.behavior.parameters(), flow.parameters(), strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-4, atol=1e-5)
