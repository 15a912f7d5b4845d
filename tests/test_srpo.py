"""SRPO against numbers with known answers: closed forms, quadrature, and exact models of simple behaviour policies."""

import math
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn

import common
import srpo
from common import Batch, Dataset
from srpo import OMEGA, SRPO, Args, BanditSRPO, denoising_loss, expectile_loss, policy_loss, q_gradient, schedule


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def mixture(means, std):
    """The exact noise prediction eps* for equally likely Gaussians with the given means [K, A] and one std."""
    means = torch.as_tensor(means, dtype=torch.float32)

    def behavior(x, obs, t, generator=None):
        alpha, sigma = schedule(t)
        variance = alpha**2 * std**2 + sigma**2
        gap = x[:, None] - alpha[:, None] * means
        likely = torch.softmax(-(gap**2).sum(-1) / (2 * variance), dim=1)
        return sigma * (likely[..., None] * gap).sum(1) / variance

    return behavior


def pull(behavior, value, q_grad=0.0, beta=1.0, n=200_000, **settings):
    """The expected gradient of the policy's loss at one action [A]."""
    action = torch.as_tensor(value, dtype=torch.float32).reshape(1, -1).repeat(n, 1).requires_grad_()
    q_grad = torch.as_tensor(q_grad, dtype=torch.float32).expand(action.shape)
    loss = policy_loss(behavior, torch.zeros(n, 1), action, q_grad, beta, generator(), **settings)
    return torch.autograd.grad(loss, action)[0].sum(0)


def evenly(action, t_range, generator):
    """In place of `diffuse`: times and noise [n, 1] on a grid of equal weights, so that a mean over rows is exact."""
    side = round(len(action) ** 0.5)
    u = (torch.arange(side) + 0.5) / side
    t = t_range[0] + (t_range[1] - t_range[0]) * u.repeat(side)[:, None]
    noise = 2**0.5 * torch.erfinv(2 * u - 1).repeat_interleave(side)[:, None]
    alpha, sigma = schedule(t)
    return t, alpha * action + sigma * noise, noise


def descend(gradient, value, step=0.1):
    """Where the sign of a one-dimensional gradient leads from `value`."""
    sign = gradient(value) > 0
    while step > 1e-3:
        after = value - step if sign else value + step
        if (gradient(after) > 0) == sign:
            value = after
        else:
            step /= 2
    return value


def make_learner(obs_dim=3, action_dim=2, seed=0, learner=SRPO, **settings):
    small = dict(device="cpu", hidden=32, behavior_hidden=32, batch_size=64, behavior_batch_size=64, steps=100)
    dims = SimpleNamespace(obs_dim=obs_dim, action_dim=action_dim, max_action=1.0)
    return learner(Args(**small | settings), dims, seed)


def random_batch(obs_dim=3, action_dim=2, size=64, terminal=0.0):
    g = generator(1)
    obs, next_obs = torch.randn(2, size, obs_dim, generator=g)
    action, next_action = torch.rand(2, size, action_dim, generator=g) * 1.8 - 0.9
    return Batch(
        obs, action, torch.randn(size, generator=g), next_obs, next_action, torch.full((size,), float(terminal))
    )


def with_batch(learner, batch):
    learner.data.sample = lambda batch_size, generator: batch
    return learner


def values(part):
    return [tensor.clone() for tensor in part.state_dict().values()]


def same(old, part):
    return all(torch.equal(a, b) for a, b in zip(old, part.state_dict().values()))


@pytest.mark.parametrize(
    "t, alpha, sigma",
    [(0.001, 0.999945, 0.010485), (0.02, 0.997014, 0.077215), (0.1, 0.946722, 0.322053), (0.2, 0.811395, 0.584498),
     (0.5, 0.281183, 0.959654), (0.98, 0.008011, 0.999968), (1.0, 0.006572, 0.999978)],
)  # fmt: skip
def test_schedule(t, alpha, sigma):
    exact = schedule(torch.tensor(t, dtype=torch.float64))
    assert [x.item() for x in exact] == pytest.approx([alpha, sigma], rel=1e-4, abs=1e-6)
    assert (exact[0] ** 2 + exact[1] ** 2).item() == pytest.approx(1, abs=1e-12)
    assert schedule(torch.tensor(t))[1].item() == pytest.approx(exact[1].item(), rel=1e-5)  # no digits lost near t = 0


def count(part):
    return sum(p.numel() for p in part.parameters())


@pytest.mark.parametrize(
    "obs_dim, action_dim, layers, critic, value, actor, behavior",
    [(17, 6, 2, 144_386, 70_657, 71_942, 1_643_526), (11, 3, 2, 139_778, 69_121, 69_635, 1_640_451),
     (29, 8, 4, 151_554, 73_729, 207_112, 1_647_624)],
)  # fmt: skip
def test_parameter_counts(obs_dim, action_dim, layers, critic, value, actor, behavior):
    learner = make_learner(obs_dim, action_dim, hidden=256, behavior_hidden=256, actor_layers=layers)
    parts = (learner.critic, learner.value, learner.actor, learner.behavior)
    assert [count(part) for part in parts] == [critic, value, actor, behavior]
    assert learner.behavior.freqs.shape == (32,) and not learner.behavior.freqs.requires_grad
    assert make_learner().behavior.freqs.std().item() == pytest.approx(30, rel=0.4)


def test_behavior_network():
    """Block: x + W2 mish(W1 norm(dropout(x))); time enters as sin and cos of 2 pi W t."""
    net = make_learner().behavior
    x, obs, t = torch.randn(5, 2), torch.randn(5, 3), torch.rand(5, 1)
    angle = 2 * math.pi * t * net.freqs
    h = net.first(torch.cat([x, obs, net.time(torch.cat([angle.sin(), angle.cos()], 1))], 1))
    for block in net.blocks:
        norm, wide, _, narrow = block.net
        h = h + narrow(nn.functional.mish(wide(norm(h))))
    assert torch.allclose(net(x, obs, t), net.last[1](nn.functional.mish(h)), atol=1e-6)


def test_ensemble_equals_separate_networks():
    critic, batch = make_learner().critic, random_batch()
    for member in range(2):
        x = torch.cat([batch.obs, batch.action], -1)
        for layer in critic.net:
            linear = isinstance(layer, srpo.EnsembleLinear)
            x = x @ layer.weight[member] + layer.bias[member] if linear else layer(x)
        assert torch.allclose(critic(batch.obs, batch.action)[member], x.squeeze(-1), atol=1e-5)


@pytest.mark.parametrize(
    "q, tau, v",
    [((0, 1), 0.7, 0.7), ((0, 1), 0.9, 0.9), ((0, 1, 2), 0.7, 1.307692), ((0, 1, 2), 0.9, 1.727273),
     ((-1, 0, 3), 0.7, 1.384615), ((-1, 0, 3), 0.9, 2.363636)],
)  # fmt: skip
def test_expectile(q, tau, v):
    value = torch.tensor(v, requires_grad=True)
    loss = expectile_loss(torch.tensor(q, dtype=torch.float32) - value, tau)
    assert torch.autograd.grad(loss, value)[0].item() == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("terminal", [0, 1])
def test_critic_update(terminal):
    """Targets come from V before the update and from the target critics' minimum; the target critic moves last."""
    learner, batch = make_learner(), random_batch(terminal=terminal)
    for parameter in learner.critic_target.parameters():  # so that online and target critics differ
        parameter.data.mul_(1.3)
    with torch.no_grad():
        y = batch.reward + 0.99 * (1 - terminal) * learner.value(batch.next_obs)
        q = learner.critic(batch.obs, batch.action)
        u = learner.critic_target(batch.obs, batch.action).min(0).values - learner.value(batch.obs)
    critic_loss = 0.5 * (((q[0] - y) ** 2).mean() + ((q[1] - y) ** 2).mean())
    value_loss = torch.where(u < 0, 0.3 * u**2, 0.7 * u**2).mean()
    target = values(learner.critic_target)
    with_batch(learner, batch).critic_update()
    metrics = learner.metrics.read()
    assert metrics["critic_loss"] == pytest.approx(critic_loss.item(), rel=1e-5)
    assert metrics["value_loss"] == pytest.approx(value_loss.item(), rel=1e-5)
    for old, new, online in zip(target, learner.critic_target.parameters(), learner.critic.parameters()):
        assert torch.allclose(new, 0.995 * old + 0.005 * online, atol=1e-6)


def test_critic_update_steps_by_the_two_losses_gradients():
    """The first Adam step is lr times the sign of the gradient: V from L_V alone, Q from L_Q alone."""
    learner, batch = make_learner(), random_batch()
    y = (batch.reward + 0.99 * learner.value(batch.next_obs)).detach()
    u = learner.critic_target(batch.obs, batch.action).amin(0) - learner.value(batch.obs)
    losses = {"value": expectile_loss(u, 0.7), "critic": ((learner.critic(batch.obs, batch.action) - y) ** 2).mean()}
    for name, loss in losses.items():
        parameters = list(getattr(learner, name).parameters())
        losses[name] = [(p.detach().clone(), g) for p, g in zip(parameters, torch.autograd.grad(loss, parameters))]
    with_batch(learner, batch).critic_update()
    for name, pairs in losses.items():
        for (old, gradient), new in zip(pairs, getattr(learner, name).parameters()):
            step = 3e-4 * gradient / (gradient.abs() + 1e-8)
            assert torch.allclose(new, old - step, atol=1e-6)


def test_critic_on_an_endless_penalty():
    """One state, r = -1 for ever, gamma 0.8: Q and V go to -5."""
    learner = make_learner(1, 1, gamma=0.8, lr=3e-3, tau=0.3)
    one = torch.ones(8, 1)
    with_batch(learner, Batch(one, one, -one[:, 0], one, one, 0 * one[:, 0]))
    for _ in range(300):
        learner.critic_update()
    assert learner.value(one).mean().item() == pytest.approx(-5, abs=0.05)
    assert learner.critic(one, one).mean().item() == pytest.approx(-5, abs=0.05)


def test_policy_gradient_is_score_minus_q():
    """d loss / d action = [omega (eps - noise) - beta grad Q] / B; nothing else receives a gradient."""
    learner, batch = make_learner(action_dim=3), random_batch(action_dim=3, size=8)
    behavior, action = learner.behavior, batch.action.clone().requires_grad_()
    q_grad, _ = q_gradient(learner.critic_target, batch.obs, action)
    g = generator(5)
    t = 0.02 + 0.96 * torch.rand(8, 1, generator=g)
    noise = torch.randn(8, 3, generator=g)
    alpha, sigma = schedule(t)
    eps = behavior(alpha * batch.action + sigma * noise, batch.obs, t).detach()
    losses = {}
    for subtract in (True, False):
        loss = policy_loss(
            behavior, batch.obs, action, q_grad, 0.3, generator(5), weighting="one", subtract_baseline=subtract
        )
        gradient = torch.autograd.grad(loss, action, retain_graph=True)[0]
        assert torch.allclose(gradient, (eps - subtract * noise - 0.3 * q_grad) / 8, atol=1e-6)
        losses[subtract] = loss.item()
        loss.backward()
    assert losses[True] - losses[False] == pytest.approx(-(noise * batch.action).sum(1).mean().item(), abs=1e-5)
    assert all(p.grad is None for part in (behavior, learner.critic_target) for p in part.parameters())
    weighted = torch.autograd.grad(policy_loss(behavior, batch.obs, action, q_grad, 0.3, generator(5)), action)[0]
    assert torch.allclose(weighted, (sigma**2 * (eps - noise) - 0.3 * q_grad) / 8, atol=1e-6)


@pytest.mark.parametrize(
    "name, power", [("sigma2", (0, 2)), ("one", (0, 0)), ("alpha/sigma", (1, -1)), ("sigma4", (0, 4))]
)
def test_omega(name, power):
    alpha, sigma = schedule(torch.tensor([0.1, 0.5, 0.9]))
    assert torch.allclose(OMEGA[name](alpha, sigma), alpha ** power[0] * sigma ** power[1])


def test_q_gradient_is_of_the_mean_of_the_critics():
    slopes = torch.tensor([[1.0, 2.0], [5.0, -4.0]])

    def critic(obs, action):
        return slopes @ action.T

    gradient, q = q_gradient(critic, None, torch.tensor([[0.5, 1.0], [0.0, 2.0]]))
    assert gradient.tolist() == [[3.0, -1.0]] * 2 and q.tolist() == [0.5, -2.0]


def test_policy_uses_the_target_critic():
    learner, batch = make_learner(beta=1e6, batch_size=8), random_batch(size=8)  # Q outweighs the score
    twin = make_learner(beta=1e6, batch_size=8)
    nn.init.zeros_(twin.critic.net[-1].weight)  # must not matter
    for one in (learner, twin):
        with_batch(one, batch).policy_update()
    assert same(values(learner.actor), twin.actor)
    nn.init.zeros_(twin.critic_target.net[-1].weight)
    old = values(twin.actor)
    twin.beta, twin.behavior = 1.0, lambda x, obs, t: 0 * x
    twin.args.subtract_baseline = False
    twin.actor_opt.state.clear()
    twin.policy_update()
    assert same(old, twin.actor)  # no slope left: nothing pulls


@pytest.mark.parametrize("norm, length", [("rms", 8**0.5), ("l2", 1.0)])
def test_normalised_q_gradient(norm, length):
    learner, batch = make_learner(action_dim=8), random_batch(action_dim=8)
    gradient = q_gradient(learner.critic_target, batch.obs, batch.action, norm)[0]
    assert torch.allclose(gradient.norm(dim=1), torch.full((64,), length), rtol=1e-5)
    flat = q_gradient(lambda obs, action: 0 * action.T, batch.obs, batch.action, norm)[0]
    assert flat.abs().max() == 0  # no slope, no division by zero
    plain = q_gradient(learner.critic_target, batch.obs, batch.action)[0]
    scaled = q_gradient(lambda *x: 1000 * learner.critic_target(*x), batch.obs, batch.action, norm)[0]
    assert torch.allclose(scaled, gradient, atol=1e-5) and not torch.allclose(plain, gradient, atol=1e-2)


@pytest.mark.parametrize("norm, factor", [("rms", 1.0), ("none", 1000.0)])
def test_scale_of_q(norm, factor):
    """Normalised, the scale of Q is nothing; otherwise it is a factor of beta."""
    first = with_batch(make_learner(q_grad_norm=norm, beta=0.2), random_batch())
    second = with_batch(make_learner(q_grad_norm=norm, beta=0.2 / factor), random_batch())
    critic = second.critic_target
    second.critic_target = lambda obs, action: 1000 * critic(obs, action)
    for learner in (first, second):
        learner.policy_update()
    for a, b in zip(first.actor.parameters(), second.actor.parameters()):
        assert torch.allclose(a, b, atol=2e-6)


PULL = {"sigma2": 0.219335, "one": 0.627224, "alpha/sigma": 1.615587, "sigma4": 0.137807}  # c = E omega alpha sigma / D
FIXED_POINTS = {  # of behaviour N(-0.3, 0.2^2) and Q = -(a - 0.6)^2, for the six values of beta
    "sigma2": (-0.2248, -0.0182, 0.1293, 0.2813, 0.4381, 0.5111),
    "one": (-0.2722, -0.1762, -0.0824, 0.0505, 0.2531, 0.3851),
    "alpha/sigma": (-0.2890, -0.2475, -0.2009, -0.1214, 0.0441, 0.1978),
    "sigma4": (-0.1859, 0.0785, 0.2329, 0.3694, 0.4910, 0.5420),
}


@pytest.mark.parametrize("weighting", FIXED_POINTS)
def test_gaussian_fixed_points(weighting):
    """The expected gradient is linear in a, so that one step by its slope 2 beta + c ends in the fixed point."""
    for beta, fixed_point in zip((0.01, 0.05, 0.1, 0.2, 0.5, 1), FIXED_POINTS[weighting]):
        gradient = pull(mixture([[-0.3]], 0.2), [0.0], q_grad=2 * 0.6, beta=beta, n=400_000, weighting=weighting)
        assert -gradient.item() / (2 * beta + PULL[weighting]) == pytest.approx(fixed_point, abs=0.004)


@pytest.mark.parametrize("std, c", [(0.05, 0.234012), (0.1, 0.230057), (0.3, 0.207552), (0.5, 0.1849), (1, 0.141068)])
def test_strength_of_the_score(std, c):
    assert pull(mixture([[0.2]], std), [1.2]).item() == pytest.approx(c, abs=0.002)


class Scalar(nn.Module):
    """One number for an actor, without a tanh."""

    def __init__(self):
        super().__init__()
        self.value = nn.Parameter(torch.zeros(1, 1))

    def forward(self, obs):
        return self.value.expand(len(obs), 1)


@pytest.mark.parametrize("subtract, tolerance", [(True, 0.003), (False, 0.02)])
def test_policy_phase_on_a_gaussian(subtract, tolerance):
    """The whole phase with the exact score: behaviour N(-0.3, 0.2^2), Q = -(a - 0.6)^2."""
    learner = make_learner(1, 1, steps=1500, actor_lr=0.01, beta=0.1, subtract_baseline=subtract)
    learner.behavior = mixture([[-0.3]], 0.2)
    learner.critic_target = lambda obs, action: -((action - 0.6) ** 2).T
    learner.actor = Scalar()
    learner.actor_opt = learner.adam(learner.actor.parameters(), 0.01)
    with_batch(learner, random_batch(1, 1, size=256))
    for _ in range(1500):
        learner.policy_update()
    assert learner.actor.value.item() == pytest.approx(0.1293, abs=tolerance)


def test_contextual_gaussian():
    """Behaviour N(K s, s_b^2 I) and Q = -|a - L s|^2 / 2: the fixed point is a = (beta L + c K) s / (beta + c)."""
    K, L = torch.tensor([[0.5, -0.2], [0.1, 0.3]]), torch.tensor([[-0.4, 0.6], [0.2, 0.7]])
    obs = torch.randn(200_000, 2, generator=generator(1))
    behavior = lambda x, obs, t: mixture([[0.0, 0.0]], 0.2)(x - schedule(t)[0] * obs @ K.T, obs, t)
    weight = ((0.2 * L + PULL["sigma2"] * K) / (0.2 + PULL["sigma2"])).requires_grad_()
    action = obs @ weight.T
    q_grad, _ = q_gradient(lambda obs, action: -0.5 * ((action - obs @ L.T) ** 2).sum(1)[None], obs, action)
    loss = policy_loss(behavior, obs, action, q_grad, 0.2, generator())
    assert torch.autograd.grad(loss, weight)[0].abs().max() < 0.003


@pytest.mark.parametrize(
    "limit, slope, settings",
    [(0.0, 0.0, dict()), (0.536, 0.0, dict(weighting="one")), (0.752, 0.0, dict(weighting="alpha/sigma")),
     (0.8, 0.0, dict(weighting="alpha/sigma", t_range=(0.02, 0.02))),
     (0.1775, 0.02, dict()), (0.3930, 0.05, dict()), (0.5792, 0.08, dict())],
)  # fmt: skip
def test_two_modes(limit, slope, settings, monkeypatch):
    """Modes at +-0.8, start at 0.3: sigma^2 averages them unless Q tilts it, the others end more or less at one."""
    monkeypatch.setattr(srpo, "diffuse", evenly)
    behavior = mixture([[-0.8], [0.8]], 0.05)
    gradient = lambda a: pull(behavior, [a], q_grad=slope, n=300**2, **settings).item()
    assert descend(gradient, 0.3) == pytest.approx(limit, abs=0.005)


@pytest.mark.parametrize(
    "weighting, std, without, baseline",
    [("sigma2", 0.2, 0.6414, 0.00017), ("sigma2", 0.5, 0.6171, 0.00282), ("sigma2", 1.0, 0.5675, 0.01533),
     ("alpha/sigma", 0.5, 0.268, 2.816)],
)  # fmt: skip
def test_noise_of_the_gradient(weighting, std, without, baseline):
    """The variance of omega eps at the mode: the baseline removes most of it for sigma^2, not for alpha / sigma."""
    n = 1_000_000
    for subtract, variance in ((False, without), (True, baseline)):
        action = torch.zeros(n, 1, requires_grad=True)
        loss = policy_loss(mixture([[0.0]], std), None, action, 0 * action.detach(), 1.0, generator(),
                           weighting, subtract_baseline=subtract)  # fmt: skip
        gradient = n * torch.autograd.grad(loss, action)[0]
        assert gradient.var().item() == pytest.approx(variance, rel=0.03, abs=5e-6)


@pytest.mark.parametrize("std, floor", [(0.1, 0.04061), (0.2, 0.08005), (0.5, 0.17249), (1.0, 0.27527)])
@pytest.mark.parametrize("dims", [1, 3])
def test_denoising_loss_of_the_exact_model(std, floor, dims):
    """A sum over dimensions; t is drawn for each row and from [0.001, 1): from [0, 1) the second would be 0.08097."""
    n = 3_000_000 // dims
    action = 0.4 + std * torch.randn(n, dims, generator=generator(1))
    loss = denoising_loss(mixture([[0.4] * dims], std), None, action, generator())
    assert loss.item() == pytest.approx(dims * floor, rel=0.006)


def test_trained_model_approaches_the_optimum():
    """A small network on N(0.4, 0.5^2 I) gets near the smallest possible loss, 2 x 0.17249, and never below."""
    learner = make_learner(1, 2, lr=3e-3, behavior_hidden=16, behavior_batch_size=256, dropout=0.0)
    learner.behavior.freqs.mul_(0.1)  # smoother in t, so that a short training suffices
    batch = random_batch(1, 2, size=256)._replace(obs=torch.zeros(256, 1))
    for i in range(500):
        batch = batch._replace(action=0.4 + 0.5 * torch.randn(256, 2, generator=generator(i)))
        with_batch(learner, batch).behavior_update()
    action = 0.4 + 0.5 * torch.randn(50_000, 2, generator=generator(999))
    with torch.no_grad():
        loss = denoising_loss(learner.behavior, torch.zeros(50_000, 1), action, generator())
    assert 0.98 * 2 * 0.17249 < loss.item() < 1.15 * 2 * 0.17249


def test_learning_rates():
    learner = with_batch(make_learner(steps=4), random_batch())
    rates = []
    for _ in range(4):
        learner.critic_update()
        learner.behavior_update()
        learner.policy_update()
        opts = (learner.critic_opt, learner.behavior_opt, learner.actor_opt)
        rates.append([opt.param_groups[0]["lr"].item() for opt in opts])
    cosine = [2.5607e-4, 1.5e-4, 4.3934e-5, 0]
    for row, rate in zip(rates, cosine):
        assert row == pytest.approx([3e-4, 3e-4, rate], abs=1e-8)
    learner = with_batch(make_learner(steps=4, lr_decay=False), random_batch())
    learner.policy_update()
    assert learner.actor_opt.param_groups[0]["lr"].item() == pytest.approx(3e-4)


def test_phases_change_only_their_own_parts():
    learner = with_batch(make_learner(), random_batch())
    names = ("critic", "value", "critic_target", "behavior", "actor")
    trained = dict(critic_update=names[:3], behavior_update=names[3:4], policy_update=names[4:])
    for update, parts in trained.items():
        before, freqs = {name: values(getattr(learner, name)) for name in names}, learner.behavior.freqs.clone()
        for _ in range(20):
            getattr(learner, update)()
        assert [name for name in names if not same(before[name], getattr(learner, name))] == list(parts)
        assert torch.equal(freqs, learner.behavior.freqs)


def test_dropout_only_while_the_behavior_model_trains():
    learner, batch = make_learner(dropout=0.25), random_batch()
    t, calls = torch.full((64, 1), 0.5), []
    call = lambda g=None: learner.behavior(batch.action, batch.obs, t, g)
    assert torch.equal(call(), call())
    assert not torch.equal(call(generator(0)), call(generator(1)))
    learner.behavior.forward = lambda x, obs, t, g=None: calls.append(g) or 0 * x + 0 * learner.behavior.first.bias[0]
    with_batch(learner, batch).behavior_update()
    learner.policy_update()
    assert calls == [learner.generator, None]
    block, seen = learner.behavior.blocks[0], []
    block.net.register_forward_pre_hook(lambda net, inputs: seen.append(inputs[0]))
    block(torch.ones(1000, 32), generator())
    kept = seen[0][seen[0] != 0]
    assert kept.numel() / 32_000 == pytest.approx(0.75, abs=0.02)  # what stays is scaled up
    assert torch.allclose(kept, torch.full_like(kept, 4 / 3))


def test_weight_decay_is_for_the_behavior_model():
    for decay in (0.01, 0.1):
        learner = make_learner(weight_decay=decay)
        opts = (learner.critic_opt, learner.behavior_opt, learner.actor_opt)
        assert [opt.param_groups[0]["weight_decay"] for opt in opts] == [0, decay, 0]
    for parameter in learner.behavior.parameters():
        parameter.grad = torch.zeros_like(parameter)
    old = values(learner.behavior.first)
    learner.behavior_opt.step()  # no gradient: a step is the decay alone, decoupled
    assert torch.allclose(learner.behavior.first.weight, old[0] * (1 - 3e-4 * 0.1), rtol=1e-6)


@pytest.mark.parametrize(
    "flag", [dict(fixed_t=0.5), dict(weighting="one"), dict(subtract_baseline=False), dict(q_grad_norm="l2")]
)
def test_flags_reach_the_policy_loss(flag):
    """The logged loss of one update is the loss under the flag, and not that without it."""
    learner, batch = make_learner(**flag), random_batch()
    learner.generator.manual_seed(7)
    action = learner.actor(batch.obs)
    losses = []
    for args in (Args(**flag), Args()):
        q_grad, _ = q_gradient(learner.critic_target, batch.obs, action, args.q_grad_norm)
        t_range = (args.fixed_t, args.fixed_t) if args.fixed_t else srpo.POLICY_T
        settings = (args.weighting, t_range, args.subtract_baseline)
        losses.append(policy_loss(learner.behavior, batch.obs, action, q_grad, 0.05, generator(7), *settings).item())
    with_batch(learner, batch).policy_update()
    assert learner.metrics.read()["actor_loss"] == pytest.approx(losses[0], rel=1e-5)
    assert losses[0] != pytest.approx(losses[1], rel=1e-3)


def test_actor_is_bounded_by_a_tanh():
    learner = make_learner(actor_layers=4)
    assert sum(isinstance(layer, nn.ReLU) for layer in learner.actor.net) == 4
    obs = 1000 * torch.randn(50, 3, generator=generator())
    action = learner.act(obs, generator())
    assert action.shape == (50, 2) and action.abs().max() <= 1 and action.abs().max() > 0.9
    assert torch.equal(action, learner.act(obs, generator(1)))  # deterministic


def dataset(reward, terminal=None):
    """Rows without time limits."""
    zeros, never = torch.zeros(len(reward), 1).numpy(), torch.zeros(len(reward), dtype=torch.bool)
    terminal = never if terminal is None else terminal
    return Dataset.from_arrays(
        "test", zeros, zeros, reward.numpy(), terminal.numpy(), never.numpy(), None, next_obs=zeros
    )


def test_reward_scale_over_windows():
    """Rows without time limits, 999 of each of three episodes: windows of 1000 give 1001 and 1996, the rest is left."""
    reward = torch.tensor([1.0, 2.0, 0.0]).repeat_interleave(999)
    data = dataset(reward)
    srpo.scale_rewards(data)
    assert torch.allclose(data.reward, reward * 1000 / 995)  # not shifted
    reward, terminal = torch.tensor([3.0, 1.0, 1.0, 5.0]), torch.tensor([True, False, True, False])
    data = dataset(reward, terminal)
    srpo.scale_rewards(data)  # windows 3 and 2; the row after the last terminal is no window
    assert torch.allclose(data.reward, reward * 1000)
    with pytest.raises(common.UserError, match="--no-scale-rewards"):
        srpo.scale_rewards(dataset(torch.ones(500)))


TINY = "--device cpu --steps 4 --batch-size 16 --behavior-batch-size 16 --log-every 2"
TINY = [*TINY.split(), "--env", "pendulum-demo-medium", "--eval-episodes", "0"]


@pytest.fixture
def start(monkeypatch):
    def start(*flags):
        monkeypatch.setattr(sys, "argv", ["srpo.py", *TINY, *map(str, flags)])
        common.cli(srpo.main)

    return start


def test_reuse(start, tmp_path, capsys):
    """A second run takes critic and behaviour model of its seed, and trains only the policy."""
    start("--out", tmp_path / "first", "--seed", 0, 1)
    source = tmp_path / "first" / "srpo" / "pendulum-demo-medium"
    start("--out", tmp_path / "second", "--beta", 0.5, "--reuse", source, "--seed", 1)
    start("--out", tmp_path / "third", "--beta", 0.7, "--reuse", tmp_path / "second/srpo/pendulum-demo-medium/seed1",
          "--seed", 1)  # fmt: skip
    runs = [source / "seed1", *(tmp_path / name / "srpo/pendulum-demo-medium/seed1" for name in ("second", "third"))]
    first, second, third = (common.load_checkpoint(run)["learner"] for run in runs)
    for part in ("critic", "value", "critic_target", "behavior"):
        for key, tensor in first[part].items():
            assert torch.equal(tensor, second[part][key]) and torch.equal(tensor, third[part][key])
    assert not torch.equal(first["actor"]["net.0.weight"], second["actor"]["net.0.weight"])
    assert {row["phase"] for row in common.read_csv(runs[1] / "metrics.csv")} == {"policy"}
    capsys.readouterr()
    start(
        "--out", tmp_path / "fourth", "--critic-steps", 7, "--seed", 1, "--reuse", runs[2]
    )  # even the second copy says how long
    assert "critic after 6 and behaviour model after 8 updates" in capsys.readouterr().out

    def refusal(*flags):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            start("--out", tmp_path / "no", *flags)
        error = capsys.readouterr().err
        assert stopped.value.code == 2 and error.count("\n") == 1 and not (tmp_path / "no").exists()
        return error

    assert "holds no checkpoint" in refusal("--reuse", source, "--seed", 2)
    assert "expectile 0.9" in refusal("--reuse", source, "--expectile", 0.8)
    assert "lr 0.001" in refusal("--reuse", source, "--lr", 0.01)
    assert "hidden 64" in refusal("--reuse", source, "--hidden", 32)
    checkpoint = common.load_checkpoint(source / "seed0")
    torch.save(checkpoint | dict(done=["critic"]), source / "seed0" / "checkpoint.pt")
    assert "no run of srpo.py with finished critic and behaviour model" in refusal("--reuse", source)
    assert "--fixed-t" in refusal("--fixed-t", 0)


@pytest.mark.parametrize("flags, reward", [((), -1.0), (("--reward-offset", "-1"), -2.0)])
def test_reward_offset(flags, reward, start, tmp_path, monkeypatch):
    class Stop(BaseException):
        pass

    def check(args, learners, *rest):
        assert (learners[0].data.reward == reward).all()
        raise Stop

    def constant(*args):
        data = srpo.bandit("bandit-moons", 100)
        data.reward.fill_(-1)
        return data

    monkeypatch.setattr(srpo, "load_dataset", constant)
    monkeypatch.setattr(srpo, "Run", check)
    with pytest.raises(Stop):
        start("--no-scale-rewards", *flags)


EIGHT = 4 / 1.414 * torch.tensor([[math.cos(k * math.pi / 4), math.sin(k * math.pi / 4)] for k in range(8)])
EXTRACTED = {  # targets, then the points at beta 1 and 0.1 from the exact score
    "fixed": [((0, 4.5), (0, 3.176), (0, 2.872)), ((0, 1.5), (0, 2.553), (0, 2.795)),
              ((4.5, 1.5), (3.176, 0.312), (2.872, 0.038)), ((3, 3), (2.208, 2.208), (2.026, 2.026))],
    "sigma2": [((0, 4.5), (0, 4.264), (0, 3.111)), ((0, 1.5), (0, 1.474), (0, 1.319)),
               ((4.5, 1.5), (4.255, 1.412), (3.070, 0.999)), ((3, 3), (2.848, 2.848), (2.099, 2.099))],
    "alpha/sigma": [((0, 4.5), (0, 3.937), (0, 3.014)), ((0, 1.5), (0, 1.843), (0, 2.452)),
                    ((4.5, 1.5), (3.913, 1.102), (3.006, 0.329)), ((3, 3), (2.659, 2.659), (2.098, 2.098))],
}  # fmt: skip


@pytest.mark.parametrize("case", EXTRACTED)
def test_eight_gaussians(case, monkeypatch):
    """The 2-D extraction with the exact score, every target of a small grid and two temperatures at once."""
    monkeypatch.setattr(srpo, "GRID", torch.tensor([0, 1.5, 3, 4.5]))
    monkeypatch.setattr(srpo, "SWEEP", (1.0, 0.1))
    settings = dict(weighting="alpha/sigma", fixed_t=0.02) if case == "fixed" else dict(weighting=case)
    learner = make_learner(1, 2, learner=BanditSRPO, batch_size=32 * 150, steps=300, actor_lr=0.1, beta=1.0,
                           subtract_baseline=case == "sigma2", **settings)  # fmt: skip
    learner.behavior = mixture(EIGHT, 0.5 / 1.414)
    with_batch(learner, random_batch(1, 2, size=32 * 150))
    for _ in range(300):
        learner.policy_update()
    points = dict(zip(srpo.SWEEP, learner.actor.points.detach().chunk(2)))
    for target, *expected in EXTRACTED[case]:
        row = (learner.target[:16] - torch.tensor(target)).norm(dim=1).argmin()
        for beta, point in zip((1.0, 0.1), expected):
            assert points[beta][row].tolist() == pytest.approx(point, abs=0.03)


def test_bandit_data():
    """Extents and a few facts of each density."""
    data = {shape: srpo.bandit(f"bandit-{shape}").action for shape in srpo.SHAPES}
    assert all(action.shape == (100_000, 2) and 2.5 < action.abs().max() < 5.5 for action in data.values())
    assert torch.allclose(data["moons"].mean(0), torch.tensor([0.0, 0.3]), atol=0.02)
    gap = torch.cdist(data["8gaussians"], EIGHT)
    assert (gap.min(1).values ** 2).mean().item() == pytest.approx(2 * (0.5 / 1.414) ** 2, rel=0.02)
    assert gap.argmin(1).bincount().min() > 12_000
    cell = (data["checkerboard"] / 2).floor().long()
    assert ((cell.sum(1) % 2) == 0).all() and cell.unique(dim=0).shape == (8, 2)
    radius = data["rings"].norm(dim=1)
    assert ((radius / 0.75 - (radius / 0.75).round().clamp(1, 4)).abs() * 0.75).pow(2).mean().sqrt() < 0.09
    assert radius.max() == pytest.approx(3.3, abs=0.15)
    assert data["2spirals"].mean(0).abs().max() < 0.02 and data["2spirals"].norm(dim=1).max() < 3.9
    assert data["swissroll"].norm(dim=1).median().item() == pytest.approx(1.5 * math.pi * 2 / 5, abs=0.05)


def test_bandit_command_line(start, tmp_path, monkeypatch, capsys):
    start("--env", "bandit-rings", "--behavior-steps", 3, "--batch-size", 147, "--out", tmp_path)
    run = tmp_path / "srpo" / "bandit-rings" / "seed0"
    assert (run / "bandit.png").exists()
    assert {row["phase"] for row in common.read_csv(run / "metrics.csv")} == {"behavior", "policy"}
    monkeypatch.setattr(sys, "argv", ["srpo.py", "--evaluate", str(run)])
    with pytest.raises(SystemExit) as stopped:
        common.cli(srpo.main)
    assert stopped.value.code == 2 and "bandit.png" in capsys.readouterr().err
