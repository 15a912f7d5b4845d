"""CPED against numbers with known answers: closed forms, Jacobians, hand-made networks, and counted optimiser steps."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn as nn
from matplotlib.figure import Figure

import cped
from common import Batch, Dataset, UserError, get_state, load_dataset, set_state
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


@pytest.mark.filterwarnings("error")
def test_a_conditional_density_of_one_dimension():
    """It has no half that shifts the other: every coupling shifts it all, by a function of the state."""
    flow = random_flow(3, 1, "conditional", hidden=16, std=0.5)
    obs = torch.randn(3, generator=generator(), dtype=torch.float64)
    grid = torch.linspace(-40, 40, 20_001, dtype=torch.float64).unsqueeze(1)
    obs = obs.expand(len(grid), 3)
    assert torch.exp(-flow.nll(obs, grid)).sum().item() * 80 / 20_000 == pytest.approx(1, abs=1e-4)
    assert (flow(grid, obs) - grid * flow.sigma.exp()).abs().min() > 0.1
    assert (flow.inverse(flow(grid, obs), obs) - grid).abs().max() < 1e-9


@pytest.mark.parametrize("density", ["joint", "conditional"])
def test_samples_are_where_the_flow_maps_to_the_draws_of_the_prior(density):
    flow = random_flow(3, 2, density, hidden=16, std=0.5)
    obs = torch.randn(50, 3, generator=generator(), dtype=torch.float64)
    obs_drawn, action = flow.sample(obs, generator()).split([3, 2], dim=1)
    z = flow(*flow.arrange(obs_drawn, action))
    assert (z.float() - torch.logit(torch.rand(z.shape, generator=generator()))).abs().max() < 1e-4
    assert torch.equal(obs_drawn, obs) == (density == "conditional")


def test_a_draw_of_zero_gives_a_finite_pair(monkeypatch):
    """In float32 a draw is 0 once in 2^24: a hundred times in the paper's first phase."""
    monkeypatch.setattr(torch, "rand", lambda *shape, **_: torch.zeros(shape))
    assert identity_flow(1, 1).sample(torch.zeros(2, 1), generator()).isfinite().all()


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


def test_maximum_likelihood():
    """s ~ Logistic(0, 1), a | s ~ Logistic(s / 2 - 1, 1/4): entropy 4 - ln 4, reached by a total log scale of ln 4."""
    z = torch.logit(torch.rand(2, 100_000, 1, generator=generator()), eps=1e-7)
    obs = z[0]
    action = z[1] / 4 + 0.5 * obs - 1
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
    assert best - 0.01 < nll < best + 0.04
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
    """Once per update(), towards the networks as they then are: all of them, by tau."""
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
    learner = make_learner(**cped.PAPER[env])
    values, until = learner.alpha_values, learner.alpha_until
    return learner.args, lambda t: alpha_at(torch.tensor(float(t)), values, until).item()


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
    """The paper's MuJoCo run with all lengths divided by 10,000; both targets move once an actor update."""
    learner = make_learner(behavior_hidden=4, hidden=4, batch_size=2, steps=100, critic_start=3, q_start=5)
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
        for _ in range(50 // 5):
            learner.pretrain()
        before = snapshot(learner.behavior, learner.discriminator)
        for _ in range(100 // 2):
            learner.update()
    assert same(before, snapshot(learner.behavior, learner.discriminator))  # frozen

    def updates(opt):
        (count,) = {state["step"].item() for state in opt.state.values()}
        return count

    opts = (learner.discriminator_opt, learner.behavior_opt, learner.critic_opt, learner.actor_opt)
    assert [updates(opt) for opt in opts] == [50, 10, 97, 50]
    assert alphas == [1000] * 5 + [10] * 5 + [7.5] * 5 + [5] * 5 + [2.5] * 5 + [1.5] * 25
    assert sum(with_q) == 47 and len(targets) == 100 and learner.step == 100


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


# Flags


@pytest.mark.parametrize("settings", [dict(gan_weight=0.0), dict(gp_weight=0.0)])
def test_flags_of_the_first_phase_change_it(settings):
    plain, other = make_learner(), make_learner(**settings)
    for learner in (plain, other):
        learner.pretrain()
        learner.pretrain()
    parts = [snapshot(learner.behavior, learner.discriminator) for learner in (plain, other)]
    assert any(not torch.equal(a, b) for a, b in zip(*parts))


def test_numbers_of_updates_in_one_call(monkeypatch):
    learner, asked = make_learner(discriminator_steps=2, policy_delay=3), []
    learner.pretrain()
    learner.update()
    opts = (learner.discriminator_opt, learner.behavior_opt, learner.critic_opt, learner.actor_opt)
    assert [next(iter(opt.state.values()))["step"].item() for opt in opts] == [2, 1, 3, 1] and learner.step == 3

    class Run:
        folders = ()

        def __init__(self, *_):
            pass

        def updates(self, phase, stride=1, evaluate=False):
            asked.append(stride)
            return ()

        def finish(self):
            pass

    monkeypatch.setattr(cped, "Run", Run)
    flags = "--env pendulum-demo-medium --device cpu --discriminator-steps 2 --policy-delay 3"
    monkeypatch.setattr("sys.argv", ["cped.py", *flags.split()])
    cped.main()
    assert asked == [2, 3]


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


def main_until_training(monkeypatch, flags):
    """`cped.py flags` until it would train: settings, the rule for time limits, the data's rewards, learners' seeds."""
    data, seen = Dataset.bandit("stand-in", torch.linspace(0, 1, 10)[:, None], lambda action: action[:, 0].round()), []
    monkeypatch.setattr(cped, "load_dataset", lambda env, path, timeout_rule, **_: seen.append(timeout_rule) or data)
    monkeypatch.setattr(cped, "CPED", lambda args, data, seed: seen.append((args, seed)))
    monkeypatch.setattr(cped, "Run", lambda *rest, **more: 1 / 0)  # far enough
    monkeypatch.setattr("sys.argv", ["cped.py", "--device", "cpu", *flags.split()])
    with pytest.raises(ZeroDivisionError):
        cped.main()
    (rule, (args, _), *_), seeds = seen, [seed for _, seed in seen[1:]]
    return args, rule, set(data.reward.tolist()), seeds


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
    _, rule, found, _ = main_until_training(monkeypatch, flags)
    assert rule is (row_counter if counted else None) and found == rewards


def test_lengths_follow_steps_and_seeds_reach_the_learners(monkeypatch):
    args, _, _, seeds = main_until_training(monkeypatch, "--env hopper-medium-v2 --steps 1000 --seed 3 5")
    assert (args.behavior_steps, args.critic_start, args.q_start) == (500, 30, 50) and seeds == [3, 5]


def test_one_alpha_stays(monkeypatch):
    args, *_ = main_until_training(monkeypatch, "--alpha 5")
    assert (args.alpha, args.alpha_until) == ((5.0,), ())


@pytest.mark.parametrize(
    "flags, word",
    [
        ("--epsilon 1", "--epsilon does nothing"),
        ("--alpha-lr 0.1", "--alpha-lr does nothing"),
        ("--alpha-mode dual --alpha-until 0.5", "--alpha-until does nothing"),
        ("--use-timeouts", "--use-timeouts does nothing"),
        ("--alpha 1 --alpha-until 0.5", "--alpha-until"),
        ("--alpha 1 2 3", "--alpha-until"),
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
        *(
            (f"--behavior-steps 0 --{name} 1", f"--{name} does nothing")
            for name in ("discriminator-steps", "gan-weight", "gp-weight")
        ),
    ],
)
def test_settings_that_cannot_go_together_are_refused(flags, word, monkeypatch):
    monkeypatch.setattr("sys.argv", ["cped.py", "--device", "cpu", *flags.split()])
    monkeypatch.setattr(cped, "load_dataset", None)  # before anything is read
    with pytest.raises(UserError, match=word):
        cped.main()


def test_settings_that_all_datasets_share_are_the_official_ones():
    official = dict(
        batch_size=256, gamma=0.99, tau=0.005, policy_delay=2, target_noise=0.2, noise_clip=0.5, critic_lr=3e-4,
        behavior_lr=1e-4, gp_weight=0.5, gan_weight=1.0, discriminator_steps=5, critic_start=30_000, q_start=50_000,
        hidden=256, behavior_hidden=750, density="joint", alpha_mode="schedule", use_timeouts=False,
    )  # fmt: skip
    assert {name: getattr(Args(), name) for name in official} == official and cped.LARGEST_LOSS == 1e7


def test_a_scene_is_drawn_as_a_plane(tmp_path, monkeypatch):
    flags = "--env bandit-ring --behavior-steps 5 --steps 2 --eval-episodes 0 --device cpu --out"
    monkeypatch.setattr("sys.argv", ["cped.py", *flags.split(), str(tmp_path)])
    monkeypatch.setattr(cped, "draw_density", None)
    cped.main()
    assert (tmp_path / "cped" / "bandit-ring" / "seed0" / "density.png").stat().st_size > 10_000


def axes_of(draw, learner, data, monkeypatch):
    """The panels of a figure, as drawn."""
    panels = []
    monkeypatch.setattr(cped, "save_figure", lambda path, *functions, **_: panels.extend(functions))
    draw(learner, data, None)
    axes = Figure().subplots(1, len(panels), squeeze=False)[0]
    for panel, function in zip(axes, panels):
        function(panel)
    return axes


def test_plane_has_the_first_action_to_the_right(monkeypatch):
    """A density around (.5, -.5), Q that grows to the lower right, a policy at (.2, -.7)."""
    learner = SimpleNamespace(
        generator=generator(),
        behavior=SimpleNamespace(nll=lambda obs, action: 9 * ((action - torch.tensor([0.5, -0.5])) ** 2).sum(-1)),
        critic=lambda obs, action: torch.stack([-action[:, 0], action[:, 0] - action[:, 1] - 9]),
        actor=lambda obs: torch.tensor([[0.2, -0.7]]),
    )
    data = SimpleNamespace(max_action=1.0, action=torch.rand(50, 2), name="plane")
    (axes,) = axes_of(cped.draw_plane, learner, data, monkeypatch)
    density = axes.images[0].get_array()
    assert np.unravel_index(density.argmax(), density.shape) == (50, 149) and axes.images[0].origin == "lower"
    some, best, policy = (points.get_offsets().tolist() for points in axes.collections)
    assert some == data.action[::10].tolist() and best == [[1, -1]] and policy == [pytest.approx([0.2, -0.7])]


def test_density_figure_shows_each_action_near_one_state(monkeypatch):
    """At half of the rows, the middle one among them, the actions are (.5, -.5), elsewhere 0."""
    near = torch.arange(1000) % 2 == 0
    action = near[:, None] * torch.tensor([0.5, -0.5])
    data = SimpleNamespace(obs=near[:, None].float(), action=action, action_dim=2)
    data = type("Data", (SimpleNamespace,), dict(__len__=lambda self: 1000))(**vars(data))
    learner = SimpleNamespace(
        behavior=SimpleNamespace(nll=lambda obs, a: 1e6 * ((a - action[0]) ** 2).sum(-1)),
        actor=lambda obs: torch.tensor([[0.3, -0.8]]),
    )
    for j, axes in enumerate(axes_of(cped.draw_density, learner, data, monkeypatch)):
        *bars, outline = axes.patches
        assert [bar.get_x() for bar in bars if bar.get_height()] == [pytest.approx([0.5, -0.5][j], abs=0.06)]
        x, y = outline.get_xy().T
        assert x[y > 0].mean() == pytest.approx([0.5, -0.5][j], abs=0.06)
        assert axes.lines[0].get_xdata()[0] == pytest.approx([0.3, -0.8][j]) and axes.get_title() == f"action {j}"


# Our own readings, without an official counterpart: whole updates against straight lines


class LineAdam:
    def __init__(self, tensors, lr, beta2=0.999, eps=1e-8):
        self.tensors, self.lr, self.beta2, self.eps = list(tensors), lr, beta2, eps
        self.m, self.v, self.n = [0.0] * len(self.tensors), [0.0] * len(self.tensors), 0

    def step(self, loss):
        self.n += 1
        gradients = torch.autograd.grad(loss, self.tensors, retain_graph=True)
        for i, (x, gradient) in enumerate(zip(self.tensors, gradients)):
            self.m[i] = 0.9 * self.m[i] + 0.1 * gradient
            self.v[i] = self.beta2 * self.v[i] + (1 - self.beta2) * gradient**2
            m, v = self.m[i] / (1 - 0.9**self.n), self.v[i] / (1 - self.beta2**self.n)
            x.data = x.data - self.lr * m / (v.sqrt() + self.eps)


def straight_line(learner, rows, args, calls):
    """What `calls` of pretrain() and as many of update() make of the networks and of alpha; the flow is of p(a | s)."""
    names = ("behavior", "discriminator", "critic", "actor", "critic_target", "actor_target")
    nets = {key: {name: x.detach().clone() for name, x in getattr(learner, key).named_parameters()} for key in names}
    for name in names[:4]:
        for x in nets[name].values():
            x.requires_grad_()
    flow, disc = nets["behavior"], nets["discriminator"]
    opt = {name: LineAdam(nets[name].values(), lr) for name, lr in zip(names[1:4], (0.002, 0.003, 0.004))}
    opt["behavior"] = LineAdam(flow.values(), 0.002, beta2=0.01, eps=1e-4)
    g, cat = torch.Generator().manual_seed(0), lambda *parts: torch.cat(parts, 1)
    leaky = lambda x: torch.maximum(x, 0.01 * x)
    line = lambda net, name, x: x @ net[f"{name}.weight"].mT + net[f"{name}.bias"]

    def shift(i, *x):
        x = cat(*x)
        for j in (0, 2, 4):
            x = leaky(line(flow, f"nets.{i}.{j}", x))
        return x

    def nll(s, a):
        a, b = a[:, :1], a[:, 1:]
        b = b + shift(0, a, s)
        a = a + shift(1, b, s)
        b = b + shift(2, a, s)
        a = a + shift(3, b, s)
        z = cat(a, b) * flow["sigma"].exp()
        return -(torch.sigmoid(z) * torch.sigmoid(-z)).log().sum(1) - flow["sigma"].sum()

    def drawn(s):
        u = torch.rand(16, 3, generator=g)
        z = (u / (1 - u)).log() / flow["sigma"].exp()
        a, b = z[:, :1], z[:, 1:]
        a = a - shift(3, b, s)
        b = b - shift(2, a, s)
        a = a - shift(1, b, s)
        return cat(s, a, b - shift(0, a, s))

    def judged(x):
        for j in (0, 3):
            x = line(disc, f"net.{j}", x)
            x = leaky((x - x.mean(1, keepdim=True)) / (x.std(1, keepdim=True) + 1e-6) + disc[f"net.{j + 1}.offset"])
        return line(disc, "net.6", x)

    def q(net, s, a):
        x = cat(s, a)
        for j in (0, 2):
            x = (x @ net[f"net.{j}.weight"] + net[f"net.{j}.bias"]).relu()
        return (x @ net["net.4.weight"] + net["net.4.bias"])[:, :, 0]

    def pi(net, s):
        x = line(net, "net.2", line(net, "net.0", s).relu()).relu()
        return 1.5 * torch.tanh(line(net, "net.4", x))

    pick = lambda: rows[torch.randint(64, (16,), generator=g)]
    for _ in range(calls):
        for i in range(5):
            batch = pick()
            s, a = batch[:, :3], batch[:, 3:6]
            fake, u = drawn(s), torch.randn(16, 1, generator=g)
            x = (u * cat(s, a) + (1 - u) * fake.detach()).requires_grad_()
            (slope,) = torch.autograd.grad(judged(x).sum(), x, create_graph=True)
            penalty = ((slope.square().sum(1).sqrt() - 1) ** 2).mean()
            opt["discriminator"].step(judged(fake.detach()).mean() - judged(cat(s, a)).mean() + 0.7 * penalty)
            if i == 0:
                opt["behavior"].step(nll(s, a).mean() - 3.0 * judged(fake).mean())

    alpha = 7.0
    for t in range(2 * calls):
        batch = pick()
        s, a, r, s2, end = batch[:, :3], batch[:, 3:6], batch[:, 6], batch[:, 7:10], batch[:, 13]
        a2 = pi(nets["actor_target"], s2) + (0.2 * torch.randn(16, 3, generator=g)).clip(-0.3, 0.3)
        y = r + 0.9 * (1 - end) * q(nets["critic_target"], s2, a2).min(0).values
        opt["critic"].step((q(nets["critic"], s, a) - y).square().sum() / 16)
        if t % 2 == 0:
            bound = nll(s, a).mean().item() if args.epsilon is None else args.epsilon
            excess, with_q = nll(s, pi(nets["actor"], s)).mean() - bound, float(t >= 2)
            opt["actor"].step(alpha * excess - with_q * q(nets["critic"], s, pi(nets["actor"], s)).min(0).values.mean())
            alpha = max(0.0, alpha + 0.25 * with_q * excess.item())
            for name in ("critic", "actor"):
                for key, x in nets[f"{name}_target"].items():
                    x.mul_(0.9).add_(0.1 * nets[name][key].data)
    return nets, alpha


@pytest.mark.parametrize("epsilon", [None, -3.0, 50.0])
def test_whole_updates_with_conditional_density_and_dual_alpha(epsilon):
    """Three calls of each phase, in float64; Q joins at the third update, and alpha moves from there on."""
    torch.set_default_dtype(torch.float64)
    try:
        rows = torch.randn(64, 14, generator=generator(5))  # s, a, r, s', a', terminal
        rows[:, 13] = (torch.arange(64) % 4 == 0).double()
        data = Dataset("rows", rows, 3, 3, None, np.zeros(1), None, max_action=1.5)
        args = Args(
            device="cpu", batch_size=16, hidden=8, behavior_hidden=8, density="conditional", alpha_mode="dual",
            alpha=(1000.0, 7.0), alpha_lr=0.25, epsilon=epsilon, critic_start=0, q_start=2, behavior_lr=0.002,
            critic_lr=0.003, actor_lr=0.004, tau=0.1, gamma=0.9, noise_clip=0.3, gan_weight=3.0, gp_weight=0.7,
        )  # fmt: skip
        learner = CPED(args, data, 0)
        for i, (_, x) in enumerate(parameters(learner)):
            x.data = 0.3 * torch.randn(x.shape, generator=generator(100 + i))
        nets, alpha = straight_line(learner, rows, args, calls=3)
        for _ in range(3):
            learner.pretrain()
        for _ in range(3):
            learner.update()
        assert learner.alpha.item() == pytest.approx(alpha, rel=1e-9) and alpha != 7
        for name, x in parameters(learner):
            key, _, rest = name.partition(".")
            torch.testing.assert_close(x.detach(), nets[key][rest].detach(), rtol=1e-9, atol=1e-11, msg=name)
    finally:
        torch.set_default_dtype(torch.float32)


def parameters(learner):
    """Name and value of every parameter of a learner's networks."""
    nets = {key: part for key, part in learner.state.items() if isinstance(part, nn.Module)}
    return [(f"{key}.{name}", x) for key, net in nets.items() for name, x in net.named_parameters()]


def test_a_checkpoint_keeps_the_dual_weight():
    learner, batch = one_state_learner(alpha_mode="dual", epsilon=-1.0, alpha_lr=0.1)
    learner.actor_step(batch)
    other = make_learner(1, 1, alpha_mode="dual")
    set_state(dict(alpha=other.alpha), dict(alpha=get_state(learner.state)["alpha"]))
    assert other.alpha == learner.alpha != 1.5


def test_share_of_actions_at_the_edge_is_logged():
    learner = make_learner()
    learner.data.max_action = learner.actor.max_action = 3.0
    for parameter in learner.actor.parameters():
        nn.init.zeros_(parameter)
    list(learner.actor.parameters())[-1].data.copy_(torch.tensor([4.0, -2.5]))  # tanh: 0.9993 and -0.987
    learner.actor_step(random_batch())
    assert learner.metrics.read()["saturated"] == 0.5
