"""DAC against numbers with known answers: closed forms, hand-made networks, and small problems with exact solutions."""

import copy
import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn as nn

import common
import dac
from common import Batch, Dataset
from dac import DAC, Args, Critic, denoise, denoising_loss, guidance_loss, lcb_target, noise_schedule, q_gradient

ALPHA, ALPHA_BAR = noise_schedule(5)
W = [math.sqrt(1 - a) for a in ALPHA_BAR]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def make_learner(obs_dim=3, action_dim=2, seed=0, max_action=1.0, sample=None, **settings):
    args = Args(**dict(dict(device="cpu", hidden=32, critics=3, next_samples=2, batch_size=64), **settings))
    data = SimpleNamespace(obs_dim=obs_dim, action_dim=action_dim, max_action=max_action, sample=sample)
    return DAC(args, data, seed)


def random_batch(obs_dim=3, action_dim=2, size=64):
    g = generator(1)
    obs, next_obs = torch.randn(2, size, obs_dim, generator=g)
    action, next_action = torch.rand(2, size, action_dim, generator=g) * 1.8 - 0.9
    return Batch(obs, action, torch.randn(size, generator=g), next_obs, next_action, torch.zeros(size))


def batch_of(action, reward=0.0, terminal=1.0):
    obs, full = torch.zeros(len(action), 1), torch.ones(len(action))
    return Batch(obs, action, reward * full, obs, action, terminal * full)


def give(learner, lr=0.0, **nets):
    """Replace actor or critic of a learner, and its target, by a hand-made one with an optimiser of its own."""
    for name, net in nets.items():
        setattr(learner, name, net)
        setattr(learner, f"{name}_target", copy.deepcopy(net).requires_grad_(False))
        setattr(learner, f"{name}_opt", torch.optim.Adam(net.parameters(), torch.tensor(lr), fused=True))
    learner.rates = [(learner.actor_opt, lr), (learner.critic_opt, lr)]
    return learner


def values(part):
    return [p.detach().clone() for p in part.parameters()]


def same(old, part):
    return all(torch.equal(a, b) for a, b in zip(old, part.parameters()))


def dirac(point):
    """The exact noise predictor of data that all equal `point`."""
    return lambda x, obs, t: (x - math.sqrt(ALPHA_BAR[int(t)]) * point) / W[int(t)]


def gaussian(mean, std, guide=lambda w: 0.0):
    """The exact noise predictor of Gaussian data plus `guide(w_t)`."""

    def net(x, obs, t):
        a, w = ALPHA_BAR[int(t)], W[int(t)]
        return w * (x - math.sqrt(a) * mean) / (std**2 * a + 1 - a) + guide(w)

    return net


def sample(net, n, action_dim=1, clip=1.0, steps=5):
    with torch.no_grad():
        return denoise(net, torch.zeros(n, 1), action_dim, steps, generator(), clip)


class Affine(nn.Module):
    """K_t x + m_t for each t and dimension: the exact class for Gaussian data."""

    def __init__(self, action_dim):
        super().__init__()
        self.k, self.m = nn.Parameter(torch.ones(6, action_dim)), nn.Parameter(torch.zeros(6, action_dim))

    def forward(self, x, obs, t):
        return self.k[t.long().squeeze(-1)] * x + self.m[t.long().squeeze(-1)]


class Shift(nn.Module):
    """The noise of data that are all 0, plus a number: its denoising loss is that number squared."""

    def __init__(self, shift):
        super().__init__()
        self.shift = nn.Parameter(torch.tensor(shift))

    def forward(self, x, obs, t):
        return x / torch.tensor(W)[t.long()] + self.shift


class LinearCritic(nn.Module):
    """Q_h = slope_h . a + offset_h."""

    def __init__(self, slope, offset):
        super().__init__()
        self.slope, self.offset = nn.Parameter(torch.tensor(slope)), nn.Parameter(torch.tensor(offset))

    def forward(self, obs, action):
        return self.slope @ action.T + self.offset[:, None]


def test_schedule():
    t = torch.arange(6, dtype=torch.float64)
    assert ALPHA_BAR == pytest.approx(torch.exp(-0.1 * t / 5 - 4.95 * (t / 5) ** 2).tolist(), abs=1e-6)
    assert ALPHA_BAR[1:] == pytest.approx([0.804125, 0.435178, 0.158500, 0.038852, 0.006409], abs=1e-6)
    assert ALPHA[1:] == pytest.approx([0.804125, 0.541182, 0.364219, 0.245122, 0.164969], abs=1e-6)
    for steps in (5, 20, 50):
        assert noise_schedule(steps)[1][-1] == pytest.approx(0.00640933, abs=1e-6)
    assert make_learner().alpha_bar.tolist() == pytest.approx(ALPHA_BAR)


def test_sampler_finds_a_point():
    assert torch.allclose(sample(dirac(0.7), 1000), torch.tensor(0.7), atol=1e-5)
    assert (sample(dirac(1.7), 1000) == 1).all()  # cut to the box, exactly
    assert torch.allclose(sample(dirac(1.7), 1000, clip=None), torch.tensor(1.7), atol=1e-5)
    assert torch.allclose(sample(dirac(1.7), 1000, clip=1.5), torch.tensor(1.5), atol=1e-5)


def test_sampler_shrinks_a_gaussian_by_a_known_amount():
    action = sample(gaussian(0.3, 0.2), 200_000)
    assert action.mean().item() == pytest.approx(0.2999, abs=0.002)
    assert action.std().item() == pytest.approx(0.1140, abs=0.001)


@pytest.mark.parametrize("eta, clip, mean", [(1, 1, 0.479), (0.5, 1, 0.617), (5, 1, 0.340), (1, None, 0.505)])
def test_sampler_of_a_guided_gaussian(eta, clip, mean):
    action = sample(gaussian(0.3, 0.2, lambda w: -w / (2 * eta)), 200_000, clip=clip)
    assert action.mean().item() == pytest.approx(mean, abs=0.004)


def test_loss_identity():
    """Eq. 16 is stationary, element by element, at eps - w g / (2 eta); at eps its gradient is w g."""
    g = generator()
    noise, gradient = torch.randn(2, 8, 3, dtype=torch.float64, generator=g)
    w, eta = torch.rand(8, 1, dtype=torch.float64, generator=g), 0.7

    def slope(predicted):
        predicted = predicted.requires_grad_()
        loss = eta * denoising_loss(predicted, noise) + guidance_loss(predicted, gradient, w)
        return torch.autograd.grad(loss * noise.numel(), predicted)[0]

    assert slope(noise - w * gradient / (2 * eta)).abs().max() < 1e-6
    assert torch.allclose(slope(noise.clone()), w * gradient)


def y(q, rho=1.0, **options):
    q = torch.tensor(q)
    zeros = torch.zeros(q.shape[1])
    return lcb_target(q, zeros, zeros, 1.0, rho, **options).tolist()


def test_target_reduces_samples_first_then_critics():
    table = [[[0.0, 4.0]], [[3.0, 2.0]]]  # [H, B, N]
    assert y(table) == pytest.approx([2.0])
    assert y(table, max_q_backup=True) == pytest.approx([3.0])
    assert y([[[1.0]], [[2.0]], [[3.0]], [[4.0]]]) == pytest.approx([1.381966], abs=1e-6)


@pytest.mark.parametrize("terminal, y", [(0.0, 2.5345), (1.0, 1.0)])
def test_target_of_a_whole_critic_step(terminal, y):
    """Q_1 = 1 + a, Q_2 = 3 - a at the target actor's 0.7, rho 1.5, r 1; the critic is 0, so its loss is y^2."""
    learner = make_learner(1, 1, critics=2, rho=1.5)
    give(learner, critic=LinearCritic([[0.0], [0.0]], [0.0, 0.0]), actor=Shift(0.0))
    learner.actor_target = dirac(0.7)
    learner.critic_target = LinearCritic([[1.0], [-1.0]], [1.0, 3.0])
    learner.critic_step(batch_of(torch.zeros(16, 1), reward=1.0, terminal=terminal))
    assert learner.metrics.read()["critic_loss"] ** 0.5 == pytest.approx(y, abs=1e-4)


def test_next_actions_stay_with_their_row():
    """Target Q = s: each target is the next state of its own row, however many next actions are drawn there."""

    class StateCritic(LinearCritic):
        def forward(self, obs, action):
            return obs[:, 0].expand(2, -1)

    learner = make_learner(1, 1, critics=2, next_samples=3, rho=0.0, gamma=1.0)
    give(learner, critic=LinearCritic([[0.0], [0.0]], [0.0, 0.0]))
    learner.critic_target = StateCritic([[0.0], [0.0]], [0.0, 0.0])
    next_obs = torch.arange(16.0)[:, None]
    learner.critic_step(batch_of(torch.zeros(16, 1), terminal=0.0)._replace(next_obs=next_obs))
    assert learner.metrics.read()["critic_loss"] == pytest.approx((next_obs**2).mean().item())


def test_max_q_backup_takes_the_best_of_the_next_actions():
    loss = {}
    for max_q_backup in (False, True):
        learner = make_learner(1, 1, critics=2, next_samples=10, rho=0.0, gamma=1.0, max_q_backup=max_q_backup)
        give(learner, critic=LinearCritic([[0.0], [0.0]], [0.0, 0.0]))
        learner.actor_target = gaussian(0.0, 0.2)
        learner.critic_target = LinearCritic([[1.0], [1.0]], [0.0, 0.0])
        learner.critic_step(batch_of(torch.zeros(1000, 1), terminal=0.0))
        loss[max_q_backup] = learner.metrics.read()["critic_loss"]
    assert loss[False] == pytest.approx(0.114**2 / 10, rel=0.2)  # the mean of 10 samples
    assert loss[True] > 20 * loss[False]  # the largest of 10 lies 1.5 standard deviations up


def test_normaliser():
    g = generator()
    obs, action, x = torch.zeros(256, 1), torch.rand(256, 1, generator=g) - 0.2, torch.randn(256, 1, generator=g)
    gradient, scale = q_gradient(LinearCritic([[1.0], [-1.0]], [0.0, 0.0]), obs, action, x)
    assert gradient.abs().max() == 0 and scale.item() == pytest.approx(action.abs().mean().item())

    torch.manual_seed(0)
    critic = Critic(4, 1, 1, 16).requires_grad_(False)
    gradient, scale = q_gradient(critic, obs, action, x)
    times_1000, _ = q_gradient(lambda obs, action: 1000 * critic(obs, action), obs, action, x)
    assert torch.allclose(gradient, times_1000, rtol=1e-4, atol=1e-4)  # EPS is 4e-5 of this scale
    assert torch.equal(q_gradient(critic, obs, action, x + 1)[1], scale)
    step = 1e-2
    slope = (critic(obs, x + step) - critic(obs, x - step)).mean(0) / (2 * step) / scale
    assert torch.allclose(gradient.squeeze(1), slope, atol=1e-3)
    assert not gradient.requires_grad and not scale.requires_grad


@pytest.mark.parametrize(
    "eta, shift, lr, eta_lr, after",
    [
        (1.0, 0.4**0.5, 0.0, 1e-3, 0.9994),
        (1.0, 5**0.5, 0.0, 1e-3, 1.001),  # the residual is cut to 1
        (0.001, 0.4**0.5, 0.0, 1e-3, 0.001),
        (100.0, 5**0.5, 0.0, 1e-3, 100.0),
        (1.0, 1.5, 0.5, 1e-3, 1.001),  # from before Adam takes the shift to 1, which would leave eta at 1
        (1.0, 5**0.5, 0.0, 0.0, 1.0),
    ],
)
def test_dual_step(eta, shift, lr, eta_lr, after):
    learner = give(make_learner(1, 1, eta=eta, eta_lr=eta_lr), lr, actor=Shift(shift))
    learner.critic_target = LinearCritic([[0.0]], [1.0])
    learner.actor_step(batch_of(torch.zeros(64, 1)))
    assert learner.eta.item() == pytest.approx(after, abs=1e-6)


def test_target_actor_keeps_its_start_then_moves_at_every_fifth_update():
    learner = make_learner(sample=lambda n, g: random_batch())
    after, step = [], learner.actor_step

    def actor_step(batch):
        step(batch)
        after.append(values(learner.actor))

    learner.actor_step = actor_step
    learner.step.fill_(1000)
    start = values(learner.actor_target)
    learner.update()  # n = 1000 to 1004
    assert same(start, learner.actor_target)
    learner.update()  # n = 1005 to 1009: only the first counts
    expected = [old + 0.005 * (new - old) for old, new in zip(start, after[5])]
    moved = list(learner.actor_target.parameters())
    assert all(torch.allclose(a, b, rtol=0, atol=1e-7) for a, b in zip(expected, moved))
    assert not same(start, learner.actor_target)
    assert learner.step == 1010


def test_target_actor_flags():
    learner = make_learner(sample=lambda n, g: random_batch(), actor_ema_start=0, actor_ema_every=1)
    start = values(learner.actor_target)
    learner.update()  # n = 0
    assert same(start, learner.actor_target) and learner.step == 1
    learner.update()
    assert not same(start, learner.actor_target)


def test_target_critics_move_at_once_and_before_the_actor_looks(monkeypatch):
    learner = make_learner(sample=lambda n, g: random_batch(), actor_ema_every=1)
    start, seen = values(learner.critic_target), []

    def spy(critic, obs, action, x):
        seen.append(values(critic))
        return q_gradient(critic, obs, action, x)

    monkeypatch.setattr(dac, "q_gradient", spy)
    learner.update()
    assert not same(start, learner.critic_target) and same(seen[0], learner.critic_target)
    expected = [old + 0.005 * (new - old) for old, new in zip(start, learner.critic.parameters())]
    moved = list(learner.critic_target.parameters())
    assert all(torch.allclose(a, b, rtol=0, atol=1e-7) for a, b in zip(expected, moved))


@pytest.mark.parametrize("k, lr", [(500_000, 2.56066e-4), (1_000_000, 1.5e-4), (1_500_000, 4.3934e-5), (2_000_000, 0)])
def test_learning_rates(k, lr):
    settings = dict(sample=lambda n, g: random_batch(), actor_ema_every=1, critic_lr=1e-3)
    learners = [make_learner(**settings), make_learner(steps=1000, lr_decay_steps=2_000_000, **settings)]
    for learner in learners:
        learner.step.fill_(k - 1)
        learner.update()
        assert learner.actor_opt.param_groups[0]["lr"].item() == pytest.approx(lr, abs=1e-9)
        assert learner.critic_opt.param_groups[0]["lr"].item() == pytest.approx(lr / 0.3, abs=1e-9)


@pytest.mark.parametrize(
    "obs_dim, action_dim, actor, critic",
    [(11, 3, 145_987, 135_681), (17, 6, 149_062, 137_985), (29, 8, 153_160, 141_569)],
)
def test_sizes_of_the_networks(obs_dim, action_dim, actor, critic):
    learner = DAC(Args(device="cpu"), SimpleNamespace(obs_dim=obs_dim, action_dim=action_dim, max_action=1.0), 0)
    assert sum(p.numel() for p in learner.actor.parameters()) == actor
    assert sum(p.numel() for p in learner.critic.parameters()) == 10 * critic
    assert same(values(learner.actor), learner.actor_target) and same(values(learner.critic), learner.critic_target)
    assert learner.eta == 1
    assert learner.critic(torch.zeros(1, obs_dim), torch.zeros(1, action_dim)).shape == (10, 1)  # a batch of one


def test_first_weights():
    """Xavier by the fans of one layer of one member, no biases, members unlike each other."""
    learner = make_learner(17, 6, hidden=256, critics=10)
    for layer in (*learner.critic.net, *learner.actor.net, *learner.actor.time):
        if hasattr(layer, "weight"):
            weight = layer.weight if layer.weight.dim() == 3 else layer.weight[None]
            bound = math.sqrt(6 / (weight.shape[1] + weight.shape[2]))
            assert 0.95 * bound < weight.abs().amax((1, 2)).min() and weight.abs().max() <= bound
            assert layer.bias.abs().max() == 0
    first = learner.critic.net[0].weight
    assert not torch.equal(first[0], first[1])
    learner.actor_step(random_batch(17, 6, size=1024))
    assert 1.0 < learner.metrics.read()["behavior_loss"] < 1.2


def test_time_embedding():
    actor, seen = make_learner().actor, []
    actor.time.register_forward_pre_hook(lambda net, inputs: seen.append(inputs[0]))
    x, obs = torch.randn(4, 2, generator=generator()), torch.randn(4, 3, generator=generator(1))
    out = actor(x, obs, torch.full((4, 1), 1))
    cos, sin = [0.540302, 0.964231, 0.997411], [0.841471, 0.265063]
    assert seen[0][0, [0, 1, 2, 8, 9]].tolist() == pytest.approx(cos + sin, abs=1e-6)
    assert torch.allclose(actor(x, obs, torch.full((1, 1), 1.0)), out)  # one t for all rows
    assert not torch.allclose(actor(x, obs, torch.full((4, 1), 2)), out)


def test_gradients_are_clipped_to_one_norm_over_the_whole_net():
    learner = make_learner(eta=100.0, eta_lr=0.0)
    batch = random_batch()
    learner.critic_step(batch._replace(reward=batch.reward + 100))
    learner.actor_step(batch)
    for net in (learner.critic, learner.actor):
        assert sum(p.grad.square().sum() for p in net.parameters()) ** 0.5 == pytest.approx(1, abs=1e-5)


def test_steps_move_only_their_own_net():
    learner, batch = make_learner(), random_batch()
    nets = ("actor", "actor_target", "critic", "critic_target")
    before = {name: values(getattr(learner, name)) for name in nets}

    def moved():
        return [name for name in nets if not same(before[name], getattr(learner, name))]

    learner.actor_step(batch)
    assert moved() == ["actor"]
    learner.critic_step(batch)
    assert moved() == ["actor", "critic"]


def blob(n, g):
    """Actions of N((.3, -.2), .2^2) in one state."""
    return torch.tensor([0.3, -0.2]) + 0.2 * torch.randn(n, 2, generator=g)


def train_affine_actor(slope, steps, **settings):
    """The learner's own actor step under a critic that is linear and has E |Q| = 1 on the data, so that g = slope."""
    settings = dict(sample=lambda n, g: batch_of(blob(n, g)), batch_size=512, steps=steps) | settings
    offset = 1 - (slope[0] * 0.3 - slope[1] * 0.2)
    learner = give(make_learner(1, 2, **settings), 1e-2, actor=Affine(2), critic=LinearCritic([slope], [offset]))
    learner.critic_step = lambda batch: None
    etas = []
    for _ in range(steps // 5):
        learner.update()
        etas.append(learner.eta.item())
    return learner, etas


def test_affine_actor_learns_the_guided_gaussian():
    learner, _ = train_affine_actor([1.0, -0.5], 3000, eta_lr=0.0)
    assert learner.actor.k[1:, 0].tolist() == pytest.approx([1.9408, 1.2908, 1.0820, 1.0184, 1.0030], abs=0.03)
    assert learner.actor.m[1:, 0].tolist() == pytest.approx([-0.7434, -0.6312, -0.5879, -0.5504, -0.5225], abs=0.03)
    with torch.no_grad():
        action = learner.sample_actions(learner.actor, torch.zeros(100_000, 1), generator())
    assert action.mean(0).tolist() == pytest.approx([0.4789, -0.2968], abs=0.01)
    assert action.std(0).tolist() == pytest.approx([0.1137, 0.1140], abs=0.005)


def test_dual_equilibrium():
    _, etas = train_affine_actor([1.0, 1.0], 4000, eta_lr=0.002)
    assert np.mean(etas[-200:]) == pytest.approx(0.4295, abs=0.01)


def two_points(low, high):
    """The exact noise predictor of data that are `low` or `high`, half of the time each."""
    points = torch.tensor([low, high])

    def net(x, obs, t):
        a, w = ALPHA_BAR[int(t)], W[int(t)]
        nearness = -((x - math.sqrt(a) * points) ** 2) / (2 * w**2)  # [n, 1] against [2] -> [n, 2]
        mean = (nearness.softmax(-1) * points).sum(-1, keepdim=True)
        return (x - math.sqrt(a) * mean) / w

    return net


def act_on_two_points(critic):
    """What the learner does in 100 states, and the candidates [100, 10] it had."""
    learner = make_learner(1, 1, candidates=10)
    learner.actor, learner.critic_target = two_points(-0.4, 0.6), critic
    learner.actor_target = learner.critic = None  # acting uses neither
    candidates = learner.sample_actions(learner.actor, torch.zeros(1000, 1), generator()).view(100, 10)
    return learner.act(torch.zeros(100, 1), generator()).squeeze(1), candidates


def test_acting_takes_the_candidate_with_the_largest_mean():
    chosen, candidates = act_on_two_points(lambda obs, action: -((action.T - 0.5) ** 2).expand(3, -1))
    assert 0.35 < (candidates > 0).float().mean() < 0.65
    assert torch.equal((chosen - 0.5).abs(), (candidates - 0.5).abs().amin(1))
    # near -.4 the two critics say (-1, 2), near .6 (0, 0): the mean prefers the first, the minimum the second
    chosen, _ = act_on_two_points(lambda obs, a: torch.where(a.T < 0, torch.tensor([[-1.0], [2.0]]), torch.zeros(2, 1)))
    assert (chosen < 0).all()


def test_actions_stay_in_the_box():
    obs = 10 * torch.randn(50, 3, generator=generator())
    for settings, largest in ((dict(), 1.0), (dict(clip_denoised=False, max_action=0.5), 0.5)):
        action = make_learner(**settings).act(obs, generator())
        assert action.shape == (50, 2) and action.abs().max() <= largest


@pytest.mark.parametrize(
    "guidance, scale, loss",
    [
        ("soft", 1.0, 0.817726),  # mean of w_t
        ("soft", 2.0, 2 * 0.817726),
        ("hard", 1.0, 1.0),
        ("denoised", 1.0, -2.0),  # -Q at the actor's sample, over Q at the data
        ("denoised", 2.0, -4.0),
    ],
)
def test_guidance(guidance, scale, loss):
    """Q = 2 + 2 a, so g = 1 at data that are 0; eta = 0 leaves the guidance; the actor says 1 (or samples 1, cut)."""
    learner = make_learner(1, 1, eta=0.0, eta_lr=0.0, guidance=guidance, guidance_scale=scale, clip_denoised=False)
    actor = Affine(1)
    with torch.no_grad():
        actor.k.zero_()
        actor.m.fill_(-100.0 if guidance == "denoised" else 1.0)
    give(learner, actor=actor)
    learner.critic_target = LinearCritic([[2.0]], [2.0])
    learner.actor_step(batch_of(torch.zeros(8192, 1)))
    assert learner.metrics.read()["actor_loss"] == pytest.approx(loss, rel=0.01)
    assert learner.eta == 0  # only the dual step keeps it above 0.001


def test_denoised_guidance_climbs_through_the_chain():
    learner = make_learner(1, 1, eta=0.0, eta_lr=0.0, guidance="denoised", clip_denoised=False)
    give(learner, 1e-2, actor=Affine(1))
    learner.critic_target = LinearCritic([[1.0]], [1.0])
    learner.actor_step(batch_of(torch.zeros(64, 1)))
    assert (learner.actor.m[1:] < 0).all()  # at every t: less noise predicted, larger action


def test_unclipped_sampler():
    obs, small = torch.zeros(100, 3), make_learner(max_action=0.5)
    assert small.sample_actions(small.actor, obs, generator()).abs().max() == 0.5
    clipped, free = (make_learner(clip_denoised=clip) for clip in (True, False))
    assert clipped.sample_actions(clipped.actor, obs, generator()).abs().max() <= 1
    assert free.sample_actions(free.actor, obs, generator()).abs().max() > 1


def dataset(reward, terminal, timeout):
    """Rows whose observation is their own number; a time-limit row and the last row are dropped, as from D4RL."""
    n = len(reward)
    obs, action = np.arange(n, dtype=np.float32)[:, None], np.linspace(-1, 1, n, dtype=np.float32)[:, None]
    flags = [np.isin(np.arange(n), rows) for rows in (terminal, timeout)]
    return Dataset.from_arrays("toy", obs, action, np.array(reward, np.float32), *flags, make_env=None)


def test_pieces_of_trajectories():
    """One terminal (row 2) and one jump (row 5 is a time limit, dropped) make three pieces; the last is incomplete."""
    data = dataset([0, 0, 0, 0, 1, 9, 0, 1, 9], terminal=[2], timeout=[5])
    assert dac.piece_returns(data).tolist() == [0, 1, 1]
    dac.prepare(data)
    assert data.reward.tolist() == [0, 0, 0, 0, 1000, 0, 1000]
    assert data.action.abs().max() == pytest.approx(1 - 1e-5, abs=1e-6) and data.action[1] == pytest.approx(-0.75)


def test_rewards_of_locomotion_span_1000():
    reward = np.random.default_rng(0).normal(2, 1, 5000)
    data = dataset(reward, terminal=[700, 1500], timeout=range(1999, 5000, 1000))
    dac.prepare(data)
    returns = dac.piece_returns(data)
    assert len(returns) == 6
    assert (returns.max() - returns.min()).item() == pytest.approx(1000, rel=1e-4)


def test_equal_returns_are_left_alone(capsys):
    data = dataset([1, 1, 0, 1, 1, 0], terminal=[], timeout=[2])
    dac.prepare(data)
    assert data.reward.tolist() == [1, 1, 1, 1] and "same return" in capsys.readouterr().out


@pytest.mark.parametrize("env, scaled", [("pendulum-demo-medium", True), ("bandit-moons", False)])
def test_rewards_and_actions_of_scenes_are_left_alone(env, scaled, monkeypatch):
    seen, raw = [], common.load_dataset(env)
    monkeypatch.setattr(dac, "Run", lambda args, learners, data, *_: seen.append(data) or 1 / 0)  # far enough
    monkeypatch.setattr(sys, "argv", f"dac.py --env {env} --device cpu".split())
    with pytest.raises(ZeroDivisionError):
        dac.main()
    (data,) = seen
    spread = dac.piece_returns(data).max() - dac.piece_returns(data).min()
    assert (spread.item() == pytest.approx(1000, rel=1e-4)) == scaled
    assert torch.equal(data.rows, raw.rows) != scaled


def test_bandit_run_draws_a_figure(tmp_path, monkeypatch):
    command = f"dac.py --env bandit-moons --device cpu --steps 5 --eval-episodes 2 --out {tmp_path}"
    monkeypatch.setattr(sys, "argv", command.split())
    common.cli(dac.main)
    folder = tmp_path / "dac" / "bandit-moons" / "seed0"
    assert (folder / "bandit.png").stat().st_size > 10_000
    assert common.load_checkpoint(folder)["learner"]["step"] == 5  # in one call


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--time-dim 5", "--time-dim must be an even number"),
        ("--lr-decay-steps 0", "--lr-decay-steps must be at least 1"),
        ("--diffusion-steps 0", "--diffusion-steps must be at least 1"),
        ("--eta -1", "--eta must be at least 0"),
        ("--gamma 2", "--gamma must be at most 1"),
        ("--critics 1 --rho 2", "--rho does nothing with one critic"),
        ("--next-samples 1 --max-q-backup", "--max-q-backup does nothing with one next action"),
        ("--guidance-scale 0 --guidance hard", "--guidance does nothing with --guidance-scale 0"),
        ("--eta-lr 0 --bc-threshold 1", "--bc-threshold does nothing with a fixed eta"),
    ],
)
def test_settings_that_cannot_be_are_refused(flags, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["dac.py", "--device", "cpu", *flags.split()])
    monkeypatch.setattr(dac, "load_dataset", None)  # before anything is read
    with pytest.raises(SystemExit) as stop:
        common.cli(dac.main)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
