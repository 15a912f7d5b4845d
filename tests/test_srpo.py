"""SRPO against numbers with known answers: closed forms, quadrature, and exact models of simple behaviour policies."""

import functools
import sys
from types import SimpleNamespace

import pytest
import torch

import common
import srpo
from common import Batch, Dataset
from srpo import (
    OMEGA,
    SRPO,
    Args,
    denoising_loss,
    expectile_loss,
    policy_loss,
    q_gradient,
    schedule,
    score_gradient,
)


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
    score_grad = score_gradient(behavior, torch.zeros(n, 1), action, generator(), **settings)
    loss = policy_loss(action, score_grad, q_grad, beta)
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


def make_learner(obs_dim=3, action_dim=2, seed=0, **settings):
    small = dict(device="cpu", hidden=32, behavior_hidden=32, batch_size=64, behavior_batch_size=64, steps=100)
    dims = SimpleNamespace(obs_dim=obs_dim, action_dim=action_dim, max_action=1.0)
    return SRPO(Args(**small | settings), dims, seed)


def random_batch(obs_dim=3, action_dim=2, size=64):
    g = generator(1)
    obs, next_obs = torch.randn(2, size, obs_dim, generator=g)
    action, next_action = torch.rand(2, size, action_dim, generator=g) * 1.8 - 0.9
    return Batch(obs, action, torch.randn(size, generator=g), next_obs, next_action, torch.zeros(size))


def with_batch(learner, batch):
    learner.data.sample = lambda batch_size, generator: batch
    return learner


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


@pytest.mark.parametrize(
    "q, tau, v",
    [((0, 1), 0.7, 0.7), ((0, 1), 0.9, 0.9), ((0, 1, 2), 0.7, 1.307692), ((0, 1, 2), 0.9, 1.727273),
     ((-1, 0, 3), 0.7, 1.384615), ((-1, 0, 3), 0.9, 2.363636)],
)  # fmt: skip
def test_expectile(q, tau, v):
    value = torch.tensor(v, requires_grad=True)
    loss = expectile_loss(torch.tensor(q, dtype=torch.float32) - value, tau)
    assert torch.autograd.grad(loss, value)[0].item() == pytest.approx(0, abs=1e-4)


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
    for subtract in (True, False):
        score_grad = score_gradient(behavior, batch.obs, action, generator(5), subtract_baseline=subtract)
        loss = policy_loss(action, score_grad, q_grad, 0.3)
        gradient = torch.autograd.grad(loss, action, retain_graph=True)[0]
        assert torch.allclose(gradient, (sigma**2 * (eps - subtract * noise) - 0.3 * q_grad) / 8, atol=1e-6)
        loss.backward()
    assert all(p.grad is None for part in (behavior, learner.critic_target) for p in part.parameters())


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


@pytest.mark.parametrize("norm, length", [("rms", 8**0.5), ("l2", 1.0)])
def test_normalised_q_gradient(norm, length):
    learner, batch = make_learner(action_dim=8), random_batch(action_dim=8)
    gradient = q_gradient(learner.critic_target, batch.obs, batch.action, norm)[0]
    assert torch.allclose(gradient.norm(dim=1), torch.full((64,), length), rtol=1e-5)
    flat = q_gradient(lambda obs, action: 0 * action.T, batch.obs, batch.action, norm)[0]
    assert flat.abs().max() == 0  # no slope, no division by zero
    plain = q_gradient(learner.critic_target, batch.obs, batch.action)[0]
    assert not torch.allclose(plain, gradient, atol=1e-2)
    for factor in (1e-4, 1000):
        large = lambda *x, factor=factor: factor * learner.critic_target(*x)
        scaled = q_gradient(large, batch.obs, batch.action, norm)[0]
        assert torch.allclose(scaled, gradient, atol=1e-5)


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


def test_contextual_gaussian():
    """Behaviour N(K s, s_b^2 I) and Q = -|a - L s|^2 / 2: the fixed point is a = (beta L + c K) s / (beta + c)."""
    K, L = torch.tensor([[0.5, -0.2], [0.1, 0.3]]), torch.tensor([[-0.4, 0.6], [0.2, 0.7]])
    obs = torch.randn(200_000, 2, generator=generator(1))
    behavior = lambda x, obs, t: mixture([[0.0, 0.0]], 0.2)(x - schedule(t)[0] * obs @ K.T, obs, t)
    weight = ((0.2 * L + PULL["sigma2"] * K) / (0.2 + PULL["sigma2"])).requires_grad_()
    action = obs @ weight.T
    q_grad, _ = q_gradient(lambda obs, action: -0.5 * ((action - obs @ L.T) ** 2).sum(1)[None], obs, action)
    loss = policy_loss(action, score_gradient(behavior, obs, action, generator()), q_grad, 0.2)
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
    "weighting, std, without, baseline", [("sigma2", 0.2, 0.6414, 0.00017), ("alpha/sigma", 0.5, 0.268, 2.816)]
)
def test_noise_of_the_gradient(weighting, std, without, baseline):
    """The variance of omega eps at the mode: the baseline removes most of it for sigma^2, not for alpha / sigma."""
    for subtract, variance in ((False, without), (True, baseline)):
        pulls = score_gradient(mixture([[0.0]], std), None, torch.zeros(1_000_000, 1), generator(),
                               weighting, subtract_baseline=subtract)  # fmt: skip
        assert pulls.var().item() == pytest.approx(variance, rel=0.03, abs=5e-6)


@pytest.mark.parametrize("dims, std, floor", [(1, 0.2, 0.08005), (3, 0.5, 0.17249)])
def test_denoising_loss_of_the_exact_model(dims, std, floor):
    """A sum over dimensions; t is drawn for each row and from [0.001, 1): from [0, 1) the second would be 0.08097."""
    n = 3_000_000 // dims
    action = 0.4 + std * torch.randn(n, dims, generator=generator(1))
    loss = denoising_loss(mixture([[0.4] * dims], std), None, action, generator())
    assert loss.item() == pytest.approx(dims * floor, rel=0.006)


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


@pytest.mark.parametrize("flag", [dict(fixed_t=0.5), dict(weighting="sigma4"), dict(q_grad_norm="l2")])
def test_flags_reach_the_policy_loss(flag):
    """The logged loss of one update is the loss under the flag, and not that without it."""
    learner, batch = make_learner(**flag), random_batch()
    learner.generator.manual_seed(7)
    action = learner.actor(batch.obs)
    losses = []
    for args in (Args(**flag), Args()):
        q_grad, _ = q_gradient(learner.critic_target, batch.obs, action, args.q_grad_norm)
        t_range = (args.fixed_t, args.fixed_t) if args.fixed_t else srpo.POLICY_T
        score_grad = score_gradient(learner.behavior, batch.obs, action, generator(7), args.weighting, t_range)
        losses.append(policy_loss(action, score_grad, q_grad, 0.05).item())
    with_batch(learner, batch).policy_update()
    assert learner.metrics.read()["actor_loss"] == pytest.approx(losses[0], rel=1e-5)
    assert losses[0] != pytest.approx(losses[1], rel=1e-3)


MODELS = dict.fromkeys("gamma critic_lr tau expectile".split(), ["critic", "value", "critic_target", "actor"])
MODELS |= dict.fromkeys("behavior_lr dropout weight_decay behavior_hidden".split(), ["behavior", "actor"])
MODELS |= dict(hidden=["critic", "value", "critic_target", "behavior", "actor"])  # the behaviour model by other draws
OTHER = dict(gamma=0.5, critic_lr=0.1, behavior_lr=1e-2, actor_lr=1e-2, lr_decay=False, tau=0.5, expectile=0.9,
             beta=1.0, weighting="one", fixed_t=0.5, subtract_baseline=False, q_grad_norm="rms", hidden=16,
             actor_layers=3, behavior_hidden=16, dropout=0.5, weight_decay=1.0)  # fmt: skip


@functools.cache
def trained(**settings):
    """The networks as bytes, after four updates of each phase."""
    learner = with_batch(make_learner(**dict(tau=0.1, critic_lr=0.01) | settings), random_batch())
    for _ in range(4):
        learner.critic_update()
        learner.behavior_update()
        learner.policy_update()
    names = ("critic", "value", "critic_target", "behavior", "actor")
    return {name: [p.numpy().tobytes() for p in getattr(learner, name).state_dict().values()] for name in names}


@pytest.mark.parametrize("flag", OTHER)
def test_every_setting_moves_its_own_networks(flag):
    usual, changed = trained(), trained(**{flag: OTHER[flag]})
    assert [name for name in usual if usual[name] != changed[name]] == MODELS.get(flag, ["actor"])


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
    with pytest.raises(common.UserError, match="a terminal or 1000 rows, found 0: --no-scale-rewards"):
        srpo.scale_rewards(dataset(torch.ones(500)))


def test_main_scales_rewards_before_it_adds_the_offset(start, monkeypatch):
    monkeypatch.setattr(srpo, "Run", lambda args, learners, data, *_: seen.append(data) or 1 / 0)  # far enough
    seen, raw = [], common.load_dataset("pendulum-demo-medium")
    srpo.scale_rewards(raw)
    with pytest.raises(ZeroDivisionError):
        start("--scale-rewards", "--reward-offset", 2)
    assert torch.allclose(seen[0].reward, raw.reward + 2)


TINY = "--device cpu --env pendulum-demo-medium --steps 4 --batch-size 16 --behavior-batch-size 16 --eval-episodes 0"


@pytest.fixture
def start(monkeypatch):
    def start(*flags):
        monkeypatch.setattr(sys, "argv", ["srpo.py", *TINY.split(), *map(str, flags)])
        common.cli(srpo.main)

    return start


@pytest.fixture
def refusal(start, tmp_path, capsys):
    def refusal(*flags):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            start("--out", tmp_path / "no", *flags)
        error = capsys.readouterr().err
        assert stopped.value.code == 2 and error.count("\n") == 1 and not (tmp_path / "no").exists()
        return error

    return refusal


def test_reuse(start, refusal, tmp_path, capsys):
    """A second run takes critic and behaviour model of its seed, and trains only the policy."""
    start("--out", tmp_path / "first", "--seed", 0, 1, "--critic-steps", 5, "--behavior-steps", 7)
    source = tmp_path / "first" / "srpo" / "pendulum-demo-medium"
    start("--out", tmp_path / "second", "--beta", 0.5, "--reuse", source, "--seed", 0, 1)
    start("--out", tmp_path / "third", "--beta", 0.7, "--reuse", tmp_path / "second/srpo/pendulum-demo-medium/seed1",
          "--seed", 1)  # fmt: skip
    assert "critic after 5, behaviour model after 7 updates" in capsys.readouterr().out  # of the first run
    runs = [source / "seed1", *(tmp_path / name / "srpo/pendulum-demo-medium/seed1" for name in ("second", "third"))]
    first, second, third = (common.load_checkpoint(run)["learner"] for run in runs)
    for part in ("critic", "value", "critic_target", "behavior"):
        for key, tensor in first[part].items():
            assert torch.equal(tensor, second[part][key]) and torch.equal(tensor, third[part][key])
    assert not torch.equal(first["actor"]["net.0.weight"], second["actor"]["net.0.weight"])
    assert {row["phase"] for row in common.read_csv(runs[1] / "metrics.csv")} == {"policy"}

    moved = source.rename(tmp_path / "moved")  # a run that reused resumes without its source
    start("--resume", runs[1])
    (runs[1] / "checkpoint.pt").unlink()  # but not before its first checkpoint
    with pytest.raises(SystemExit):
        start("--resume", runs[1])
    moved.rename(source)
    start("--resume", runs[1])
    again = common.load_checkpoint(runs[1])["learner"]
    assert torch.equal(again["behavior"]["first.weight"], first["behavior"]["first.weight"])

    for place in (source, source / "seed0"):
        assert "is where this run would be written" in refusal("--reuse", place, "--out", tmp_path / "first")
    assert "holds no checkpoint" in refusal("--reuse", source, "--seed", 2)
    assert "was made with --seed 1" in refusal("--reuse", source / "seed1")
    assert "--critic-steps does nothing with --reuse" in refusal("--reuse", source, "--critic-steps", 6)
    assert "--behavior-steps does nothing with --reuse" in refusal("--reuse", source, "--behavior-steps", 8)
    assert "other data" in refusal("--reuse", source, "--env", "pendulum-demo-expert")
    checkpoint = common.load_checkpoint(source / "seed0")
    torch.save(checkpoint | dict(done=["critic"]), source / "seed0" / "checkpoint.pt")
    assert "critic and behaviour model are not finished" in refusal("--reuse", source)


CHANGED = OTHER | dict(batch_size=8, behavior_batch_size=8, scale_rewards=True, reward_offset=1.0)
COMPARED = [*MODELS, "batch_size", "behavior_batch_size", "scale_rewards", "reward_offset"]


@pytest.mark.parametrize("name", COMPARED)
def test_reuse_compares(name, monkeypatch):
    """Whatever went into critic and behaviour model."""
    learner, theirs = make_learner(**{name: CHANGED[name]}), make_learner()
    learner.data.fingerprint = "0"
    checkpoint = dict(done=["critic", "behavior"], dims=dict(fingerprint="0"))
    monkeypatch.setattr(srpo, "load_run", lambda *args: (theirs.args, checkpoint))
    with pytest.raises(common.UserError, match=f"made with --{name.replace('_', '-')} {getattr(theirs.args, name)}, "):
        learner.args.reuse = "there"
        srpo.load_models([learner])


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--critic-steps -1", "--critic-steps must be at least 0"),
        ("--behavior-steps -1", "--behavior-steps must be at least 0"),
        ("--behavior-batch-size 0", "--behavior-batch-size must be at least 1"),
        ("--hidden 0", "--hidden must be at least 1"),
        ("--actor-layers 0", "--actor-layers must be at least 1"),
        ("--behavior-hidden 0", "--behavior-hidden must be at least 1"),
        ("--critic-lr -1", "--critic-lr must be at least 0"),
        ("--behavior-lr -1", "--behavior-lr must be at least 0"),
        ("--actor-lr -1", "--actor-lr must be at least 0"),
        ("--weight-decay -1", "--weight-decay must be at least 0"),
        ("--gamma 1.5", "--gamma must be at most 1"),
        ("--tau 2", "--tau must be at most 1"),
        ("--expectile 7", "--expectile must be at most 1"),
        ("--dropout 1", "--dropout must be below 1"),
        ("--fixed-t 0", "--fixed-t must be at least 0.001"),
        ("--fixed-t 2", "--fixed-t must be at most 1.0"),
        ("--beta -1", "--beta must be at least 0"),
    ],
)
def test_settings_that_cannot_be_are_refused(flags, message, refusal, monkeypatch):
    monkeypatch.setattr(srpo, "load_dataset", None)  # before anything is read
    assert message in refusal(*flags.split())


def test_a_scene_in_its_own_scale(start, tmp_path):
    """Actions beyond 1, and a state that leads back to itself."""
    start("--env", "bandit-25gaussians-far", "--eval-episodes", 1, "--out", tmp_path)
    act = common.load_policy(SRPO, Args, tmp_path / "srpo" / "bandit-25gaussians-far" / "seed0")
    assert act([[100.0]]).shape == (1, 2) and 2 < abs(act([[100.0]])).max() < 11.5
