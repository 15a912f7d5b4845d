"""DTQL against numbers with known answers: closed forms, quadrature, and hand-made networks."""

import math
import sys
from types import SimpleNamespace

import pytest
import torch

import common
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
    small = sigma[sigma < 0.01]  # where 1 - c_skip has lost its digits in float32
    assert len(small.unique()) == len(small) > 300


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


@pytest.mark.parametrize("std", [1.0, 0.5])
def test_candidates_tilt_a_gaussian(std):
    """With min Q = s a a Gaussian's mean moves by s std^2; the two critics have different slopes, states differ."""
    learner = make_learner(1, 1, candidates=1024)
    learner.sample_actions = lambda obs, g: std * torch.randn(len(obs), 1, generator=g)
    learner.critic_target.forward = lambda obs, a: torch.stack([2 * obs * a + 9, obs * a]).squeeze(-1)
    chosen = learner.act(torch.tensor([[-1.0], [0.5]]).repeat(1000, 1), generator())
    assert chosen.view(1000, 2).mean(0).tolist() == pytest.approx([-(std**2), 0.5 * std**2], abs=0.1)


def test_argmax_selection():
    learner = make_learner(candidates=8, eval_select="argmax")
    learner.critic_target = dtql.Critic(3, 2, 32)
    obs = torch.randn(50, 3, generator=generator(1))
    candidates = learner.sample_actions(obs.repeat_interleave(8, 0), generator()).view(50, 8, 2)
    for state, options, chosen in zip(obs, candidates, learner.act(obs, generator())):
        q = learner.critic_target(state.expand(8, 3), options).amin(0)
        assert torch.equal(chosen, options[q.argmax()])


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


def test_bandit_actor_has_four_parameters():
    """With the one state s = 0 and zero biases only the head's bias can move."""
    learner = make_learner(1, 2, max_action=11.0, clip_denoised=False)
    before = values(learner.actor)
    learner = with_batch(learner, random_batch(1, 2)._replace(obs=torch.zeros(64, 1), next_obs=torch.zeros(64, 1)))
    for _ in range(5):
        learner.update()
    moved = [not torch.equal(a, b) for a, b in zip(before, learner.actor.parameters())]
    assert moved == [False] * (len(moved) - 1) + [True]


@pytest.mark.parametrize("a, loss", [(2.5, 21.633), (11.0, 7.111)])
def test_trust_landscape_of_the_25_gaussians(a, loss):
    net = mixture([-10.0, -5.0, 0.0, 5.0, 10.0], [0.2] * 5, 0.09)
    assert trust_loss(net, a, n=1_000_000)[0] == pytest.approx(loss, rel=0.02)


def test_25_gaussians_with_reward_move_the_best_action_out_of_the_mode():
    """min L_TR - |a| on the diagonal is at (10.185, 10.185): there each coordinate's slope is 2 / sqrt(2)."""
    net = mixture([-10.0, -5.0, 0.0, 5.0, 10.0], [0.2] * 5, 0.09)
    assert trust_loss(net, 10.185, n=1_000_000)[1] == pytest.approx(2**0.5, rel=0.08)


@pytest.mark.parametrize("reg, calls", [("tr", 2), ("kl", 4)])
@pytest.mark.parametrize("clip, limit", [(True, 1.5), (False, None)])
def test_every_loss_of_an_update_is_clamped_or_none(reg, calls, clip, limit, monkeypatch):
    seen, plain = [], dtql.denoise
    monkeypatch.setattr(dtql, "denoise", lambda *x: seen.append(x[4]) or plain(*x))
    learner = make_learner(max_action=1.5, clip_denoised=clip, behavior_reg=reg, behavior_hidden=16)
    with_batch(learner, random_batch()).update()
    assert seen == [limit] * calls


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--time-dim 5", "--time-dim must be an even number"),
        ("--time-dim 0", "--time-dim must be an even number"),
        ("--candidates 0", "--candidates must be at least 1"),
        ("--hidden 0", "--hidden must be at least 1"),
        ("--behavior-hidden 0", "--behavior-hidden must be at least 1"),
        ("--pretrain-steps -1", "--pretrain-steps must be at least 0"),
        ("--behavior-lr -1", "--behavior-lr must be at least 0"),
        ("--actor-lr -1", "--actor-lr must be at least 0"),
        ("--critic-lr -1", "--critic-lr must be at least 0"),
        ("--alpha -1", "--alpha must be at least 0"),
        ("--nll-weight -1", "--nll-weight must be at least 0"),
        ("--gamma 1.5", "--gamma must be at most 1"),
        ("--gamma nan", "--gamma must be at least 0"),
        ("--expectile 7", "--expectile must be at most 1"),
        ("--tau 2", "--tau must be at most 1"),
        ("--behavior-reg kl --nll-weight 1", "--nll-weight does nothing with --behavior-reg kl"),
        ("--candidates 1 --eval-select argmax", "--eval-select does nothing with one candidate"),
        ("--candidates 1 --tau 0.1", "--tau does nothing with one candidate"),
    ],
)
def test_settings_that_cannot_be_are_refused(flags, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["dtql.py", "--device", "cpu", *flags.split()])
    monkeypatch.setattr(dtql, "load_dataset", None)  # before anything is read
    with pytest.raises(SystemExit) as stop:
        common.cli(dtql.main)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def parse(monkeypatch, flags):
    monkeypatch.setattr(sys, "argv", ["dtql.py", "--device", "cpu", *flags.split()])
    return common.parse_args(Args, dtql.PAPER | dtql.OURS, dtql.check, proportional=("pretrain_steps",))


def test_kl_leaves_out_the_likelihood_of_the_table_and_has_its_own_scores(monkeypatch, capsys):
    args = parse(monkeypatch, "--env antmaze-umaze-v0 --behavior-reg kl")
    assert args.nll_weight == 0 and args.paper_score is None
    assert "--nll-weight is left out" in capsys.readouterr().out
    assert parse(monkeypatch, "--env antmaze-umaze-v0 --behavior-reg kl --nll-weight 0").nll_weight == 0
    assert capsys.readouterr().out == ""
    args = parse(monkeypatch, "--env antmaze-umaze-v0")
    assert args.nll_weight == 1 and args.paper_score == 94.8


@pytest.mark.parametrize("steps", [0, 2])
def test_generator_is_a_copy_of_the_behaviour_model_if_there_was_a_head_start(steps, monkeypatch):
    class Run:
        def __init__(self, args, learners, *_):
            self.learners = learners

        def updates(self, phase, evaluate=False, at_end=None):
            if at_end:
                at_end()
            return ()

        def finish(self):
            for learner in self.learners:
                for net in (learner.actor, learner.fake):
                    assert same(values(learner.behavior), net) == (steps > 0)

    monkeypatch.setattr(dtql, "Run", Run)
    flags = f"--env pendulum-demo-medium --behavior-reg kl --pretrain-steps {steps} --device cpu --seed 0 1"
    flags += " --hidden 8 --behavior-hidden 16"
    monkeypatch.setattr(sys, "argv", ["dtql.py", *flags.split()])
    dtql.main()


@pytest.mark.parametrize("reg, learner", [("tr", DTQL), ("kl", DTQLKL)])
def test_each_kind_of_run_is_scored_as_what_it_is(reg, learner, monkeypatch):
    found = []
    monkeypatch.setattr(dtql, "parse_args", lambda *_, **__: Args(behavior_reg=reg, evaluate="run"))
    monkeypatch.setattr(dtql, "evaluate_run", lambda args, Learner: found.append(Learner))
    dtql.main()
    assert found == [learner]
