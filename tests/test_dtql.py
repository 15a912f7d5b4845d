"""DTQL against numbers with known answers: closed forms, quadrature, and hand-made networks."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch

import dtql
from common import Batch
from dtql import DTQL, DTQLKL, Args, denoise, denoising_loss, expectile_loss, kl_loss, sample_sigma

SD = dtql.SIGMA_DATA


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def zero_network(x, obs, level):
    """F = 0: the exact network for data ~ N(0, sigma_data^2)."""
    return torch.zeros_like(x)


def network_of(denoiser):
    """The raw network F whose preconditioned form is `denoiser(x, sigma)`."""

    def net(x_in, obs, level):
        sigma = torch.exp(4 * level)
        total = sigma**2 + SD**2
        x = x_in * total.sqrt()
        return (denoiser(x, sigma) - SD**2 / total * x) / (sigma * SD / total.sqrt())

    return net


def gaussian(mean, variance):
    return network_of(lambda x, sigma: (variance * x + sigma**2 * mean) / (variance + sigma**2))


def mixture(means, weights, variance):
    """Exact denoiser of a one-dimensional mixture, for each coordinate on its own."""

    def denoiser(x, sigma):
        m, w = torch.tensor(means), torch.tensor(weights)
        total = (variance + sigma**2).unsqueeze(-1)
        posterior = torch.softmax(w.log() - (x.unsqueeze(-1) - m) ** 2 / (2 * total), -1)
        return (posterior * (variance * x.unsqueeze(-1) + sigma.unsqueeze(-1) ** 2 * m) / total).sum(-1)

    return network_of(denoiser)


def trust_loss(net, value, n=400_000, clip=None, seed=0):
    """L_TR at one action value and its gradient in the action."""
    action = torch.full((n, 1), float(value), requires_grad=True)
    loss = denoising_loss(net, torch.zeros(n, 1), action, generator(seed), clip)
    return loss.item(), torch.autograd.grad(loss, action)[0].sum().item()


def make_learner(obs_dim=3, action_dim=2, seed=0, max_action=1.0, **settings):
    args = Args(**dict(dict(device="cpu", hidden=32, behavior_hidden=32, candidates=8, batch_size=64), **settings))
    dims = SimpleNamespace(obs_dim=obs_dim, action_dim=action_dim, max_action=max_action)
    return (DTQLKL if args.behavior_reg == "kl" else DTQL)(args, dims, seed)


def random_batch(obs_dim=3, action_dim=2, size=64):
    g = generator(1)
    obs, next_obs = torch.randn(2, size, obs_dim, generator=g)
    action, next_action = torch.rand(2, size, action_dim, generator=g) * 1.8 - 0.9
    return Batch(obs, action, torch.randn(size, generator=g), next_obs, next_action, torch.zeros(size))


def with_batch(learner, batch):
    learner.data.sample = lambda batch_size, generator: batch
    return learner


def values(part):
    return [p.detach().clone() for p in part.parameters()]


def same(old, part):
    return all(torch.equal(a, b) for a, b in zip(old, part.parameters()))


def test_sigma_law():
    """c_skip(sigma) is uniform: log-logistic with scale 1/2, cut to [0.002, 80]."""
    sigma = sample_sigma(1_000_000, generator())
    c_skip = SD**2 / (sigma**2 + SD**2)
    assert c_skip.mean() == pytest.approx(0.5, abs=0.002)
    assert c_skip.var() == pytest.approx(1 / 12, abs=0.001)
    assert c_skip.min() >= 3.9e-5 and c_skip.max() <= 0.999985
    quantiles = torch.quantile(sigma, torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9]))
    assert quantiles.tolist() == pytest.approx([1 / 6, 0.288675, 0.5, 0.866025, 1.5], rel=0.01)


def test_preconditioning():
    sigma = torch.tensor([[0.002], [0.1], [0.5], [3.0], [80.0]])
    zeros, seen = torch.zeros(5, 1), {}

    def spy(x, obs, level):
        seen.update(x=x, level=level)
        return torch.ones_like(x)

    c_skip = denoise(zero_network, zeros + 1, sigma, zeros)
    c_out = denoise(spy, zeros, sigma, zeros)
    denoise(spy, zeros + 1, sigma, zeros)
    c_in = seen["x"]
    assert torch.allclose(c_out**2, sigma**2 * c_skip, rtol=1e-5)
    assert torch.allclose(c_in**2 * (sigma**2 + SD**2), zeros + 1, rtol=1e-5)
    assert torch.allclose(c_skip + sigma**2 * c_in**2, zeros + 1, rtol=1e-5)
    assert c_in[-1].item() == pytest.approx(0.0124998, rel=1e-5)
    assert seen["level"][2].item() == pytest.approx(math.log(0.5) / 4, rel=1e-5)
    assert denoise(spy, zeros + 9, sigma, zeros, clip=1.0).abs().max() == 1


@pytest.mark.parametrize("dims", [1, 3])
def test_behavior_loss_floor_is_a_mean_over_dimensions(dims):
    action = SD * torch.randn(400_000 // dims, dims, generator=generator(1))
    loss = denoising_loss(zero_network, torch.zeros(len(action), 1), action, generator())
    assert loss.item() == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("variance, floor", [(0.01, 0.13412), (0.04, 0.34906), (0.25, 1.0), (1.0, 1.84839)])
def test_behavior_loss_of_the_exact_denoiser(variance, floor):
    action = variance**0.5 * torch.randn(400_000, 1, generator=generator(1))
    loss = denoising_loss(gaussian(0.0, variance), torch.zeros(400_000, 1), action, generator())
    assert loss.item() == pytest.approx(floor, rel=0.02)


@pytest.mark.parametrize("a", [0.0, 0.25, 0.5, 0.75])
def test_trust_loss_of_a_standard_gaussian(a):
    """L_TR = (1 + a^2 / sd^2) / 2 and its gradient is minus the score; detaching either path would show."""
    loss, gradient = trust_loss(zero_network, a)
    assert loss == pytest.approx(0.5 * (1 + a**2 / SD**2), rel=0.015)
    assert gradient == pytest.approx(a / SD**2, rel=0.015, abs=0.02)


@pytest.mark.parametrize("a, loss", [(0.5, 0.9975), (0.75, 1.617), (0.95, 2.271), (1.0, 2.458)])
def test_trust_loss_with_clamp(a, loss):
    assert trust_loss(zero_network, a, clip=1.0)[0] == pytest.approx(loss, abs=0.025)


@pytest.mark.parametrize("variance, loss", [(0.01, 1.6047), (0.04, 1.0243), (0.09, 0.8356), (1.0, 1.2459)])
def test_trust_loss_of_a_gaussian(variance, loss):
    assert trust_loss(gaussian(0.2, variance), 0.6)[0] == pytest.approx(loss, rel=0.015)


@pytest.mark.parametrize("a, loss", [(0.5, 0.4425), (-0.6, 1.4165), (0.0, 1.4388), (1.0, 2.4998)])
def test_trust_loss_of_a_mixture_is_its_noised_likelihood(a, loss):
    net = mixture([-0.6, 0.5], [0.3, 0.7], 0.02)
    assert trust_loss(net, a, n=1_000_000)[0] == pytest.approx(loss, rel=0.02)


def test_actor_equilibrium():
    """min alpha L_TR - b.a at F = 0 is a_i = A b_i sd^2 / alpha: the loss is a mean over the A dimensions."""
    b, action, g = torch.tensor([0.4, -0.2]), torch.zeros(2, requires_grad=True), generator()
    opt = torch.optim.Adam([action], lr=0.01)
    for i in range(600):
        opt.param_groups[0]["lr"] = 0.01 * (1 - i / 600)
        tiled = action.expand(4096, 2)
        loss = denoising_loss(zero_network, torch.zeros(4096, 1), tiled, g) - (tiled @ b).mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
    assert action.tolist() == pytest.approx([0.2, -0.1], abs=0.01)


@pytest.mark.parametrize("reg, std_low, std_high", [("tr", 0, 0.12), ("kl", 0.245, 0.255)])
def test_trust_region_seeks_the_mode_and_kl_matches_the_distribution(reg, std_low, std_high):
    center, g = torch.tensor([0.2, -0.3]), generator()
    mean = torch.tensor([-0.5, 0.5], requires_grad=True)
    log_std = torch.tensor([-0.5, -3.0], requires_grad=True)
    opt = torch.optim.Adam([mean, log_std], lr=0.01)
    obs, tail = torch.zeros(256, 1), []
    for i in range(1500):
        std = log_std.clamp(-5, 2).exp()
        action = mean + std * torch.randn(256, 2, generator=g)
        if reg == "tr":
            loss = denoising_loss(gaussian(center, 0.0625), obs, action, g)
        else:
            fake = gaussian(mean.detach(), std.detach() ** 2)
            loss = kl_loss(gaussian(center, 0.0625), fake, obs, action, g)
        opt.zero_grad()
        loss.backward()
        opt.step()
        if i >= 1000:
            tail.append(torch.cat([mean, std]).detach())
    *mean, std1, std2 = torch.stack(tail).mean(0).tolist()
    assert mean == pytest.approx(center.tolist(), abs=0.012)
    assert std_low <= std1 <= std_high and std_low <= std2 <= std_high


def test_kl_gradient():
    """Denoisers .1 and .3 at a = (.5, -.3) and (.2, .9): w = .4 and .45, gradient (.3 - .1) / w / 4 in each entry."""
    real, fake = (network_of(lambda x, sigma, c=c: torch.full_like(x, c)) for c in (0.1, 0.3))
    action, obs = torch.tensor([[0.5, -0.3], [0.2, 0.9]], requires_grad=True), torch.zeros(2, 1)
    gradient = torch.autograd.grad(kl_loss(real, fake, obs, action, generator()), action)[0]
    assert gradient.flatten().tolist() == pytest.approx([0.125, 0.125, 0.2 / 0.45 / 4, 0.2 / 0.45 / 4], abs=1e-3)
    real = gaussian(0.2, 0.0625)  # both see the same noisy point, so equal denoisers give no gradient at all
    assert torch.autograd.grad(kl_loss(real, real, obs, action, generator()), action)[0].abs().max() == 0
    action, real = torch.ones(2, 2, requires_grad=True), network_of(lambda x, sigma: torch.full_like(x, 5.0))
    loss = kl_loss(real, real, obs, action, generator(), clip=1.0)  # w = 0: all three sit on the edge of the box
    assert torch.autograd.grad(loss, action)[0].abs().max() == 0


@pytest.mark.parametrize("p, tau, v", [(0.5, 0.7, 0.7), (0.5, 0.9, 0.9), (0.2, 0.9, 0.6923), (0.2, 0.7, 0.3684)])
def test_expectile(p, tau, v):
    q = torch.cat([torch.ones(int(1000 * p)), torch.zeros(int(1000 * (1 - p)))])
    value = torch.tensor(v, requires_grad=True)
    assert torch.autograd.grad(expectile_loss(q - value, tau), value)[0].item() == pytest.approx(0, abs=1e-3)


def test_critic_on_a_two_step_mdp():
    """s1 -> s2 -> end with reward 0 or 1 by a coin: V(s2) = tau, Q(s1) = gamma tau; the end does not bootstrap."""
    first, second = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    obs = torch.stack([first, second, second]).repeat(40, 1)
    action = torch.tensor([[0.0], [0.5], [-0.5]]).repeat(40, 1)
    reward, terminal = torch.tensor([0.0, 1.0, 0.0]).repeat(40), torch.tensor([0.0, 1.0, 1.0]).repeat(40)
    batch = Batch(obs, action, reward, second.expand(120, 2), action, terminal)
    learner = make_learner(2, 1, critic_lr=3e-3)
    for _ in range(600):
        learner.critic_step(batch)
    assert learner.value(second[None]).item() == pytest.approx(0.7, abs=0.03)
    assert learner.critic(first[None], action[:1]).mean().item() == pytest.approx(0.99 * 0.7, abs=0.03)


def test_critic_losses_by_hand():
    """V follows the smaller Q; each Q follows r + gamma (1 - terminal) V(s'), and the two errors add."""
    learner = make_learner(gamma=0.9, expectile=0.7)
    batch = random_batch(size=4)._replace(terminal=torch.tensor([0.0, 0.0, 1.0, 1.0]))
    q = torch.tensor([[1.0, -1.0, 2.0, 0.0], [3.0, -2.0, 1.0, 0.5]])
    value, next_value = learner.value(batch.obs).detach(), learner.value(batch.next_obs).detach()
    learner.critic.forward, before = lambda obs, action: q, copy.deepcopy(learner.value)
    learner.critic_step(batch)
    seen, u = learner.metrics.read(), torch.minimum(q[0], q[1]) - value
    target = batch.reward + 0.9 * (1 - batch.terminal) * next_value
    alone = torch.autograd.grad(expectile_loss(q.amin(0) - before(batch.obs), 0.7), before.parameters())
    assert all(torch.allclose(a, p.grad) for a, p in zip(alone, learner.value.parameters()))  # the target is fixed
    assert seen["value_loss"] == pytest.approx((torch.where(u > 0, 0.7, 0.3) * u**2).mean().item(), rel=1e-5)
    assert seen["critic_loss"] == pytest.approx((q - target).square().mean(1).sum().item(), rel=1e-5)


def test_actor_loss_by_hand():
    """alpha L_TR - min Q - w log pi with the online critic."""
    learner, batch = make_learner(alpha=3.0, nll_weight=0.5), random_batch()
    learner.critic.forward = lambda obs, action: torch.stack([action[:, 0], -action[:, 0]])
    learner.critic_target.forward = lambda obs, action: torch.full((2, len(action)), 7.0)
    nll = learner.nll_loss(batch).item()
    learner.actor_step(batch)
    seen = learner.metrics.read()
    assert -0.9 < seen["actor_q"] < -0.1  # -E|a|
    assert seen["actor_loss"] == pytest.approx(3 * seen["trust_loss"] - seen["actor_q"] + 0.5 * nll, rel=1e-4)


def test_nll():
    learner = make_learner(1, 2)
    learner.actor.forward = lambda obs: (torch.zeros(len(obs), 2), torch.zeros(len(obs), 2))
    batch = random_batch(1, 2, size=4)._replace(action=torch.ones(4, 2))
    assert learner.nll_loss(batch).item() == pytest.approx(2 * 8.1417, abs=2e-3)


def test_nll_is_least_at_the_mean_and_std_before_the_tanh():
    learner, batch = make_learner(1, 2, max_action=2.0), random_batch(1, 2)
    pre_tanh = torch.atanh(batch.action / 2.001)
    mean, log_std = pre_tanh.mean(0).requires_grad_(), pre_tanh.std(0, correction=0).log().requires_grad_()
    learner.actor.forward = lambda obs: (mean.expand(64, 2), log_std.expand(64, 2))
    for gradient in torch.autograd.grad(learner.nll_loss(batch), [mean, log_std]):
        assert gradient.abs().max() < 1e-4


def test_policy_is_a_bounded_tanh_gaussian():
    learner = make_learner(1, 2, max_action=2.0)
    with torch.no_grad():
        learner.actor.net[-1].bias.copy_(torch.tensor([0.5, -0.5, -9.0, 9.0]))
    mean, log_std = learner.actor(torch.zeros(1, 1))
    assert log_std.tolist() == [[-5.0, 2.0]]
    action = learner.sample_actions(torch.zeros(4000, 1), generator())
    assert action[:, 0].mean().item() == pytest.approx(2 * math.tanh(0.5), abs=1e-3)
    assert action[:, 0].std().item() == pytest.approx(2 * math.exp(-5) * (1 - math.tanh(0.5) ** 2), rel=0.05)
    pre_tanh = torch.atanh(action[:, 1].double() / 2).clamp(-8, 8)
    assert pre_tanh.median().item() == pytest.approx(-0.5, abs=0.5) and action.abs().max() <= 2


def set_candidates(learner, action, q):
    """Every candidate set becomes `action` with target values `q`; the online critic prefers the opposite."""
    n = len(q)
    learner.sample_actions = lambda obs, g: action.repeat(len(obs) // n, 1)
    learner.critic_target.forward = lambda obs, a: q.repeat(len(obs) // n).expand(2, -1)
    learner.critic.forward = lambda obs, a: -q.repeat(len(obs) // n).expand(2, -1)


def test_candidates_are_drawn_by_softmax_of_the_target_critic():
    learner = make_learner(1, 1, candidates=2)
    set_candidates(learner, torch.tensor([[0.0], [1.0]]), torch.tensor([0.0, math.log(3)]))
    chosen = learner.act(torch.zeros(5000, 1), generator())
    assert chosen.mean().item() == pytest.approx(0.75, abs=0.02)


@pytest.mark.parametrize("slope, std", [(1.0, 1.0), (2.0, 0.5)])
def test_candidates_tilt_a_gaussian(slope, std):
    learner = make_learner(1, 1, candidates=1024)
    learner.sample_actions = lambda obs, g: std * torch.randn(len(obs), 1, generator=g)
    learner.critic_target.forward = lambda obs, a: slope * a.squeeze(-1).expand(2, -1)
    chosen = learner.act(torch.zeros(2000, 1), generator())
    assert chosen.mean().item() == pytest.approx(slope * std**2, abs=0.1)


def test_argmax_selection():
    learner = make_learner(1, 1, candidates=2, eval_select="argmax")
    set_candidates(learner, torch.tensor([[0.0], [1.0]]), torch.tensor([0.0, 0.1]))
    assert (learner.act(torch.zeros(50, 1), generator()) == 1).all()


def test_actor_step_moves_only_the_actor():
    learner, batch = make_learner(nll_weight=1.0), random_batch()
    before = {
        name: values(getattr(learner, name)) for name in ("critic", "value", "critic_target", "behavior", "actor")
    }
    learner.actor_step(batch)
    moved = [name for name, old in before.items() if not same(old, getattr(learner, name))]
    assert moved == ["actor"]


def test_target_moves_every_update_and_rests_in_the_head_start():
    learner = with_batch(make_learner(), random_batch())
    target, actor = values(learner.critic_target), values(learner.actor)
    for _ in range(3):
        learner.pretrain()
    assert same(target, learner.critic_target) and same(actor, learner.actor)
    learner.update()
    for old, new, online in zip(target, learner.critic_target.parameters(), learner.critic.parameters()):
        assert torch.allclose(new, old + 0.005 * (online - old), atol=1e-7)
    assert not same(actor, learner.actor)


@pytest.mark.parametrize("clip_denoised, clip", [(True, 2.0), (False, None)])
def test_an_update_is_algorithm_1(monkeypatch, clip_denoised, clip):
    learner, seen = with_batch(make_learner(max_action=2.0, clip_denoised=clip_denoised), random_batch()), []
    for name in ("critic_step", "behavior_step", "actor_step"):
        step = getattr(learner, name)
        setattr(learner, name, lambda batch, name=name, step=step: (seen.append(name), step(batch)))
    loss = dtql.denoising_loss
    spy = lambda net, obs, action, g, clip=None: seen.append((net, clip)) or loss(net, obs, action, g, clip)
    monkeypatch.setattr(dtql, "denoising_loss", spy)
    learner.update()
    model = (learner.behavior, clip)
    assert seen == ["critic_step", "behavior_step", model, "actor_step", model]


def test_learning_rates():
    learner = with_batch(make_learner(behavior_lr=1e-4, actor_lr=1e-4, lr_decay=True, steps=8, behavior_reg="kl"), random_batch())
    names = ["critic_opt", "behavior_opt", "actor_opt", "fake_opt"]
    rates = lambda: [getattr(learner, name).param_groups[0]["lr"].item() for name in names]
    learner.pretrain()
    assert rates() == pytest.approx([3e-4, 1e-4, 1e-4, 1e-4])
    for k in range(1, 9):
        learner.update()
        factor = 0.5 * (1 + math.cos(math.pi * k / 8))
        assert rates() == pytest.approx([rate * factor for rate in (3e-4, 1e-4, 1e-4, 1e-4)], abs=1e-10)
    names.pop()
    learner = with_batch(make_learner(behavior_lr=1e-4, actor_lr=1e-4), random_batch())
    learner.update()
    assert rates() == pytest.approx([3e-4, 1e-4, 1e-4])


def count(part):
    return sum(p.numel() for p in part.parameters())


@pytest.mark.parametrize(
    "obs_dim, action_dim, denoiser, actor, critic",
    [(17, 6, 210_230, 139_276, 415_491), (11, 3, 207_155, 136_198, 409_347), (45, 24, 226_632, 155_696, 446_211)],
)
def test_parameter_counts(obs_dim, action_dim, denoiser, actor, critic):
    learner = make_learner(obs_dim, action_dim, hidden=256, behavior_hidden=256)
    assert count(learner.behavior) == denoiser
    assert count(learner.actor) == actor
    assert count(learner.critic) + count(learner.value) == critic


def test_structure():
    learner = make_learner(obs_dim=1, behavior_hidden=128, time_dim=4, hidden=256)
    assert count(learner.behavior) == 50_894
    kinds = [type(layer).__name__ for layer in learner.behavior.net]
    assert kinds == ["Linear", "Linear", "Mish", "Linear", "Mish", "Linear", "Mish", "Linear"]
    assert learner.behavior.freqs.tolist() == pytest.approx([1, 1e-4])
    square = learner.actor.net[2]
    assert torch.allclose(square.weight @ square.weight.T, torch.eye(256), atol=1e-5) and not square.bias.any()


def test_ensemble_equals_separate_networks():
    critic, batch = make_learner().critic, random_batch()
    for member in range(2):
        x = torch.cat([batch.obs, batch.action], -1)
        for layer in critic.net:
            if isinstance(layer, dtql.EnsembleLinear):
                x = x @ layer.weight[member] + layer.bias[member]
            elif isinstance(layer, dtql.EnsembleLayerNorm):
                mean, var = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, correction=0)
                x = (x - mean) / (var + 1e-5).sqrt() * layer.weight[member] + layer.bias[member]
            else:
                x = layer(x)
        assert torch.allclose(critic(batch.obs, batch.action)[member], x.squeeze(-1), atol=1e-5)


def test_bandit_actor_has_four_parameters():
    """With the one state s = 0 and zero biases only the head's bias can move."""
    learner = make_learner(1, 2, max_action=11.0, clip_denoised=False)
    before = values(learner.actor)
    learner = with_batch(learner, random_batch(1, 2)._replace(obs=torch.zeros(64, 1), next_obs=torch.zeros(64, 1)))
    for _ in range(5):
        learner.update()
    moved = [not torch.equal(a, b) for a, b in zip(before, learner.actor.parameters())]
    assert moved == [False] * (len(moved) - 1) + [True]


@pytest.mark.parametrize("a, loss", [(0.0, 3.2933), (10.0, 3.3509), (2.5, 21.633), (11.0, 7.111), (12.0, 18.305)])
def test_trust_landscape_of_the_25_gaussians(a, loss):
    net = mixture([-10.0, -5.0, 0.0, 5.0, 10.0], [0.2] * 5, 0.09)
    assert trust_loss(net, a, n=1_000_000)[0] == pytest.approx(loss, rel=0.02)


def test_25_gaussians_with_reward_move_the_best_action_out_of_the_mode():
    """min L_TR - |a| on the diagonal is at (10.185, 10.185): there each coordinate's slope is 2 / sqrt(2)."""
    net = mixture([-10.0, -5.0, 0.0, 5.0, 10.0], [0.2] * 5, 0.09)
    assert trust_loss(net, 10.185, n=1_000_000)[1] == pytest.approx(2**0.5, rel=0.08)


def test_kl_ablation_calls_its_networks_as_the_official_code(monkeypatch):
    """The generator gets noise of scale 2.5 and level 2.5; the fake model learns, detached, the actor's own actions."""
    learner, batch, seen = make_learner(behavior_reg="kl", clip_denoised=True), random_batch(size=4000), {}
    forward = learner.actor.forward
    learner.actor.forward = lambda x, obs, level: seen.update(x=x, level=level) or forward(x, obs, level)
    spy_kl = lambda real, fake, obs, action, g, clip: seen.update(kl=(real, fake, action, clip)) or action.sum()
    monkeypatch.setattr(dtql, "kl_loss", spy_kl)
    loss = dtql.denoising_loss
    spy = lambda net, obs, action, g, clip: seen.update(fake=(net, action)) or loss(net, obs, action, g, clip)
    monkeypatch.setattr(dtql, "denoising_loss", spy)
    behavior = values(learner.behavior)
    learner.actor_step(batch)
    assert seen["x"].std().item() == pytest.approx(2.5, rel=0.03) and (seen["level"] == 2.5).all()
    real, fake, action, clip = seen["kl"]
    assert real is learner.behavior and fake is learner.fake and clip == 1.0
    assert seen["fake"][0] is learner.fake and not seen["fake"][1].requires_grad
    assert torch.equal(seen["fake"][1], action) and same(behavior, learner.behavior)


def test_kl_ablation_trains_its_fake_model_and_starts_from_the_behavior_model():
    learner = with_batch(make_learner(behavior_reg="kl"), random_batch())
    learner.start_from_behavior()
    assert same(values(learner.behavior), learner.fake) and same(values(learner.behavior), learner.actor)
    fake, actor = values(learner.fake), values(learner.actor)
    learner.update()
    assert not same(fake, learner.fake) and not same(actor, learner.actor)
