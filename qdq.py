"""Q-Distribution guided Q-learning (QDQ)

Jing Zhang, Linjiajie Fang, Kexin Shi, Wenjia Wang, Bing-Yi Jing: "Q-Distribution Guided Q-Learning for Offline
Reinforcement Learning: Uncertainty Penalized Q-Value via Consistency Model", NeurIPS 2024, arXiv:2410.20312.
Official code (JAX): github.com/evalarzj/qdq, commit f083a57 (score and consistency model: 57a2b12, where they run).

    python qdq.py                              # built-in HalfCheetah data, minutes on a CPU core
    python qdq.py --env hopper-medium-v2       # the paper's run, all three phases
    python qdq.py --env hopper-medium-v2 --seed 1 2 3 4 --reuse runs/qdq/hopper-medium-v2/seed0    # last phase only
    python qdq.py --env bandit-8gaussians      # a 2-D example; result: bandit.png

A generative model of the returns seen after (s, a) says how uncertain Q is there: its samples, says the paper, spread
more for actions far from the data (but see difference 13). Where they spread most, a second, pessimistic target of the
critic divides Q' by their spread.

    returns     G(s_b, a_b) = sum_{i < 200} gamma^i r_{b+i},  scaled to x in [-1, 1]   Eq. 5  return_dataset
    score       L = E w(t) (D(x + t z, t | s, a) - x)^2                                       score_loss
    consistency L = E (f(x_t, t | s, a) - f'(x^, t' | s, a))^2,                               consistency_loss
                x^ one Heun step of D from x_t to t' < t                                      heun_step
    uncertainty H(s, a) = std of Q_1..Q_n,  Q_j = f(80 z_j, 80 | s, a) as a return     Eq. 6  QDQ.uncertainty
    target      Q_L = Q / H on the uncertain set U, beta Q off it;                     Eq. 8  penalty_weight
                U = {H > its beta-quantile in the batch}
    critic      L = alpha E (r + gamma Q' - Q)^2 + (1 - alpha) E (r + gamma Q_L' - Q)^2   Eq. 7  critic_step
    actor       L = -E min(Q1, Q2)(s, pi(s)) - w_bc E log pi(a | s)                    Eq. 9  pg_loss (or awr_loss)

    Algorithm 1  a truncated return every 10 steps                                            return_dataset
                 800,000 times: score model D (EDM)                                           score_update
                 1,600,000 times: consistency model f, whose moving average is f'             consistency_update
                 1,000,000 times: critic; on every second actor and targets                   policy_update
    to act       the mean of pi                                                               act

    The paper (P) or its code (C)                           This file, which follows C, as C's released checkpoints do
 1. P: 80,000 and 160,000 updates of score and consistency  800,000 and 1,600,000 (1,000,000 halfcheetah-medium-replay,
    model (Table G.1)                                       2,000,000 walker2d-medium-expert), as the checkpoints have
 2. P: alpha .99 (halfcheetah, hopper-medium, -replay,      .992 (MuJoCo), .99 (AntMaze), .01 (umaze-diverse): --alpha;
    AntMaze) or .95, w_bc 0 or 1, beta .8 for hopper        w_bc 0 to 2: --bc-coef; .8 for walker2d too: --beta
 3. P: Eq. 8 has beta Q off U                               AntMaze has Q there, and in five sets the factor
                                                            1 + 0.1 (1 - 1/H) on U: --penalty
 4. P: Eq. 9 draws a from pi                                its mean; AntMaze except umaze-diverse extracts the policy
                                                            by AWR: --actor-loss
 5. C: target action: the target policy's mean, or where    a setting of its own: --no-target-sample belongs to
    w_bc > 0 a draw from it, plus TD3 noise                 --bc-coef 0 (in antmaze-medium-diverse sampling is all
                                                            that w_bc does)
 6. P: Eq. 6 divides by n - 1; Eq. 5 discounts from the     by n; from the start of the window. An episode of up to 200
    start of the episode                                    steps gives one window, a longer one at most 100
 7. P: three hidden layers                                  AntMaze: two (--layers), and LayerNorm in the critic for the
                                                            large mazes (--layer-norm); C's --clip-grad
 8. P: Alg. 1 moves actor and targets at every update       at every second. The actor's cosine (C) counts its updates
                                                            over --steps and so ends at half the learning rate
 9. C: f begins from random weights and does not            so here; --init-from-teacher copies D, as usual.
    see the highest noise level (80), where it is sampled   f' begins as a copy and keeps f's Fourier frequencies
    later; f' has weights and Fourier frequencies of its
    own, which the moving average moves
10. C: RAdam for the consistency model                      Adam with RAdam's factor on its rate; RAdam's first five
                                                            updates, of plain momentum, are left out
11. C: batches without replacement; actions clipped to      neither
    1 - 1e-5
12. C: all seeds share one score and consistency model      each trains its own without --reuse
13. P: H is larger off the data                             not so in tests/benchmarks/claim_qdq.py, a small known
                                                            system: the better the score model, the nearer its spread is
                                                            to that of the returns, off the data as on it; the
                                                            consistency model adds error of the distillation (see
                                                            returns.png). The disagreement of five regressors does tell.
                                                            The method needs H > 1 / beta on U: so it is on MuJoCo, in
                                                            units of the return, not surely in umaze-diverse. And Q > 0:
                                                            a negative Q (umaze-diverse, pendulum) is raised by 1/H
14. C: actions in [-1, 1]                                   mean, spread and noise of the policy scale with max_action

To lift this file out: bring `RunArgs`, `Metrics` and your data: `sample(batch_size, generator)` gives obs, action,
reward, next_obs and terminal; `obs_dim`, `action_dim`, `max_action`; for returns these columns of all rows in order,
`episode`, `name` and `need_order`. Write your own loop in place of `main`; see tests/lifted.
"""

import copy
import math
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F

from common import (
    Metrics,
    Run,
    RunArgs,
    UserError,
    apart,
    at_least,
    at_most,
    capture,
    cli,
    evaluate_run,
    load_dataset,
    load_run,
    offset_rewards,
    parse_args,
    same_settings,
    save_figure,
    set_state,
    useless,
)


@dataclass
class Args(RunArgs):
    # QDQ
    score_steps: int = 800_000  # Updates of the score model
    consistency_steps: int = 1_600_000  # Updates of the consistency model
    reuse: str | None = None  # Folder of a run on the same data: take its score and consistency model, skip both phases
    gamma: float = 0.99  # Discount, of the truncated returns too
    window: int = 200  # Rewards in a truncated return, Eq. 5
    window_stride: int = 10  # Steps between the starts of two truncated returns, Eq. 5
    score_lr: float = 5e-4  # Learning rate of the score model, cosine to zero
    consistency_lr: float = 4e-4  # Learning rate of the consistency model, cosine to zero
    levels: int = 1000  # Noise levels of the distillation
    consistency_tau: float = 0.005  # Rate of the moving average f', moved every fifth update
    init_from_teacher: bool = False  # Start the consistency model from the score model's weights
    return_hidden: int = 256  # Width of score and consistency model
    critic_lr: float = 3e-4  # Learning rate of the critics
    actor_lr: float = 3e-4  # Learning rate of the actor, cosine to half
    tau: float = 0.005  # Rate of the target networks (kappa in Alg. 1)
    alpha: float = 0.992  # Weight of the plain Bellman error, Eq. 7
    beta: float = 0.9  # Quantile of H above which an action is uncertain; --penalty paper: also Q's factor below, Eq. 8
    # Factor of Q on / off the uncertain set. paper: 1/H, beta (Eq. 8); keep: 1/H, 1; mild: 1 + 0.1 (1 - 1/H), 1
    penalty: Literal["paper", "keep", "mild"] = "paper"
    q_samples: int = 50  # Samples of the consistency model for each H (n in Eq. 6)
    # Policy gradient with likelihood (Eq. 9) or advantage-weighted regression
    actor_loss: Literal["pg", "awr"] = "pg"
    # Weight of the likelihood of the data's actions (gamma in Eq. 9), pg only. At 0 nothing trains the policy's spread:
    # then add --no-target-sample
    bc_coef: float = 0.8
    target_sample: bool = True  # Draw the target action from the target policy, before the TD3 noise
    clip_grad: float = 10.0  # Largest norm of the critics' gradient
    hidden: int = 256  # Width of critics and actor
    layers: int = 3  # Hidden layers of critics and actor
    layer_norm: bool = False  # LayerNorm in the critics
    reward_offset: float = 0.0  # Added to every reward (AntMaze: -1, unless rewards are 0 and -1 already)


def mujoco(beta, bc_coef, score, **more):
    return dict(beta=beta, bc_coef=bc_coef, target_sample=bc_coef > 0, eval_every=5_000, paper_score=score, **more)


def maze(score, **more):
    return dict(alpha=0.99, penalty="mild", actor_loss="awr", target_sample=False, clip_grad=7.0, layers=2,
                reward_offset=-1.0, eval_every=100_000, eval_episodes=100, paper_score=score) | more  # fmt: skip


DIVERSE = dict(alpha=0.01, penalty="keep", actor_loss="pg", bc_coef=1.5, target_sample=True)
PAPER = {  # official code, configs/<dataset>/qdq_config.py (differences 1, 2): beta, w_bc; Tables 1 and 2: score
    "halfcheetah-medium-v2": mujoco(0.9, 0.0, 74.1),
    "halfcheetah-medium-replay-v2": mujoco(0.9, 0.1, 63.7, consistency_steps=1_000_000),
    "halfcheetah-medium-expert-v2": mujoco(0.9, 2.0, 99.3),
    "hopper-medium-v2": mujoco(0.8, 0.8, 99.0),
    "hopper-medium-replay-v2": mujoco(0.8, 0.8, 102.4),
    "hopper-medium-expert-v2": mujoco(0.8, 2.0, 113.5),
    "walker2d-medium-v2": mujoco(0.8, 0.8, 86.9),
    "walker2d-medium-replay-v2": mujoco(0.8, 0.8, 93.2),
    "walker2d-medium-expert-v2": mujoco(0.8, 2.0, 115.9, consistency_steps=2_000_000),
    "antmaze-umaze-v0": maze(98.6),
    "antmaze-umaze-diverse-v0": maze(67.8, **DIVERSE),
    "antmaze-medium-play-v0": maze(81.5),
    "antmaze-medium-diverse-v0": maze(85.4, target_sample=True),
    "antmaze-large-play-v0": maze(35.6, layer_norm=True),
    "antmaze-large-diverse-v0": maze(31.2, layer_norm=True, clip_grad=3.0),
}
DEMO = dict(hidden=64, return_hidden=64, batch_size=128, q_samples=8, levels=40, consistency_tau=0.05,
            init_from_teacher=True, critic_lr=1e-3, actor_lr=1e-3, tau=0.01, bc_coef=2.0, log_every=500)  # fmt: skip
OURS = {  # settings of this project: built-in data on two CPU cores, and 2-D bandits
    "halfcheetah-demo": DEMO | dict(steps=12_000, score_steps=8_000, consistency_steps=8_000, eval_every=1_500),
    "pendulum-demo": DEMO | dict(steps=4_000, score_steps=2_000, consistency_steps=2_000, eval_every=500, window=50,
                                 gamma=0.95),
    "bandit": DEMO | dict(steps=4_000, score_steps=1_500, consistency_steps=1_500, eval_every=500, log_every=100),
}  # fmt: skip
PROTOCOL = (
    "5 seeds, 10 episodes each for MuJoCo and 100 for AntMaze; the code reports the mean of the last five evaluations "
    "and the best, the paper does not say which it prints"
)

# EDM noise levels (Karras et al. 2022)
SIGMA_DATA, T_MIN, T_MAX, RHO = 0.5, 0.002, 80.0, 7

POLICY_NOISE, NOISE_CLIP = 0.2, 0.5  # of a' (TD3)


def mlp(sizes, activation, linear=nn.Linear, norm=None):
    """Linear layers of these sizes, `activation` (and before it, `norm`) after all but the last."""
    layers = []
    for d_in, d_out in zip(sizes, sizes[1:]):
        layers += [linear(d_in, d_out), *([norm(d_out)] if norm else []), activation()]
    return nn.Sequential(*layers[: -2 if norm else -1])


def xavier_linear(d_in, d_out):
    """nn.Linear with the official start: Xavier-uniform weights, zero biases."""
    layer = nn.Linear(d_in, d_out)
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class EnsembleLinear(nn.Module):
    """n linear layers as one batched matmul: [n, B, d_in] -> [n, B, d_out], Xavier-uniform weights, zero biases."""

    def __init__(self, n, d_in, d_out):
        super().__init__()
        bound = math.sqrt(6 / (d_in + d_out))
        self.weight = nn.Parameter(torch.empty(n, d_in, d_out).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(n, 1, d_out))

    def forward(self, x):
        return torch.baddbmm(self.bias, x, self.weight)


class EnsembleLayerNorm(nn.Module):
    """LayerNorm with a gain and an offset per member: [n, B, d] -> [n, B, d]."""

    def __init__(self, n, d):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n, 1, d))
        self.bias = nn.Parameter(torch.zeros(n, 1, d))

    def forward(self, x):
        return torch.addcmul(self.bias, F.layer_norm(x, x.shape[-1:], eps=1e-6), self.weight)


class Critic(nn.Module):
    """Q1 and Q2: obs [B, S], action [B, A] -> [2, B]."""

    def __init__(self, obs_dim, action_dim, hidden, layers, layer_norm):
        super().__init__()
        sizes = [obs_dim + action_dim, *[hidden] * layers, 1]
        norm = partial(EnsembleLayerNorm, 2) if layer_norm else None
        self.net = mlp(sizes, nn.Mish, partial(EnsembleLinear, 2), norm)

    def forward(self, obs, action):
        x = torch.cat([obs, action], dim=-1)
        return self.net(x.expand(2, *x.shape)).squeeze(-1)


class Actor(nn.Module):
    """Policy pi, a Gaussian around a tanh: obs [B, S] -> mean [B, A] in [-max_action, max_action], log_std [A]."""

    def __init__(self, obs_dim, action_dim, hidden, layers, max_action):
        super().__init__()
        self.max_action = max_action
        self.net = mlp([obs_dim, *[hidden] * layers, action_dim], nn.ReLU, xavier_linear)
        nn.init.orthogonal_(self.net[-1].weight, gain=2**0.5)
        self.log_std = nn.Parameter(torch.zeros(action_dim))  # in units of max_action

    def forward(self, obs):
        return self.max_action * torch.tanh(self.net(obs)), self.log_std.clamp(-5, 2) + math.log(self.max_action)


class ReturnNet(nn.Module):
    """Raw network N of score and consistency model: x, t [B, 1], obs_action [B, S + A] -> [B, 1]."""

    def __init__(self, d_in, hidden):
        super().__init__()
        self.register_buffer("freqs", 16 * torch.randn(8))
        self.time = nn.Sequential(*mlp([16, 32, 32], nn.SiLU, xavier_linear), nn.SiLU())
        norm = lambda d: nn.GroupNorm(max(d // 8, 1), d, eps=1e-6)  # groups of 8
        self.net = mlp([d_in + 1 + 32, hidden, hidden, hidden, 1], nn.SiLU, xavier_linear, norm)

    def raw(self, x, t, obs_action):
        """N(c_in x, ln(t) / 4 | s, a)."""
        angle = 2 * math.pi * t.log() / 4 * self.freqs
        time = self.time(torch.cat([angle.sin(), angle.cos()], dim=-1))
        return self.net(torch.cat([obs_action, x * (t**2 + SIGMA_DATA**2).rsqrt(), time], dim=-1))


class ScoreModel(ReturnNet):
    """Denoiser D(x, t | s, a) = c_skip x + c_out N; the score is (D - x) / t^2."""

    def forward(self, x, t, obs_action):
        total = t**2 + SIGMA_DATA**2
        c_skip, c_out = SIGMA_DATA**2 / total, t * SIGMA_DATA * total.rsqrt()
        return c_skip * x + c_out * self.raw(x, t, obs_action)


class ConsistencyModel(ReturnNet):
    """f(x, t | s, a) = k_skip x + k_out N, from any point of a path of the diffusion to its start; f(x, T_MIN) = x."""

    def forward(self, x, t, obs_action):
        k_skip = SIGMA_DATA**2 / ((t - T_MIN) ** 2 + SIGMA_DATA**2)
        k_out = (t - T_MIN) * SIGMA_DATA * (t**2 + SIGMA_DATA**2).rsqrt()
        return k_skip * x + k_out * self.raw(x, t, obs_action)


def noise_levels(n):
    """T_MAX = t_0 > ... > t_{n-1} = T_MIN, evenly spaced in t^(1/rho): [n] in float64."""
    ramp = torch.linspace(0, 1, n, dtype=torch.float64)
    levels = (T_MAX ** (1 / RHO) + ramp * (T_MIN ** (1 / RHO) - T_MAX ** (1 / RHO))) ** RHO
    levels[0], levels[-1] = T_MAX, T_MIN  # free of rounding
    return levels


def sample_t(batch_size, generator):
    """Noise levels [B, 1] to train the score model on: ln t ~ N(-1.2, 1.2^2), not cut."""
    return torch.exp(-1.2 + 1.2 * torch.randn(batch_size, 1, device=generator.device, generator=generator))


def score_loss(denoiser, x, obs_action, generator):
    """E w(t) (D(x + t z, t | s, a) - x)^2 with EDM's weight 1 / c_out^2."""
    t = sample_t(len(x), generator)
    noisy = x + t * torch.randn(x.shape, device=x.device, generator=generator)
    weight = (t**2 + SIGMA_DATA**2) / (t * SIGMA_DATA) ** 2
    return (weight * (denoiser(noisy, t, obs_action) - x) ** 2).mean()


def heun_step(denoiser, x, t, t_next, obs_action):
    """One step of the probability flow dx/dt = (x - D(x, t)) / t from t to t_next < t."""
    slope = (x - denoiser(x, t, obs_action)) / t
    euler = x + (t_next - t) * slope
    slope_next = (euler - denoiser(euler, t_next, obs_action)) / t_next
    return x + (t_next - t) * (slope + slope_next) / 2


def consistency_loss(student, average, teacher, x, obs_action, levels, generator):
    """E (f(x_t, t | s, a) - f'(x^, t' | s, a))^2 at neighbouring levels t > t'."""
    i = torch.randint(1, len(levels) - 1, (len(x), 1), device=x.device, generator=generator)  # not t_0 (difference 9)
    t, t_next = levels[i], levels[i + 1]
    noisy = x + t * torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator)
    with torch.no_grad():
        target = average(heun_step(teacher, noisy, t, t_next, obs_action), t_next, obs_action)
    return ((student(noisy, t, obs_action) - target) ** 2).mean()


def one_step(consistency, x, obs_action):
    """Noise at T_MAX to a return, by the consistency model: [B, 1] -> [B, 1]."""
    return consistency(x, torch.full_like(x, T_MAX), obs_action)


def many_steps(denoiser, x, obs_action, n=18):
    """The same by the score model, n - 1 Heun steps and an Euler step to t = 0; only for figures."""
    levels = noise_levels(n).to(x)[:, None, None].expand(n, len(x), 1)
    for t, t_next in zip(levels, levels[1:]):
        x = heun_step(denoiser, x, t, t_next, obs_action)
    return denoiser(x, levels[-1], obs_action)


def sample_returns(sampler, model, obs_action, n, generator):
    """n scaled returns for each row of obs_action: [B, S + A] -> [B, n]."""
    obs_action = obs_action.repeat_interleave(n, dim=0)
    noise = torch.randn(len(obs_action), 1, dtype=obs_action.dtype, device=obs_action.device, generator=generator)
    return sampler(model, T_MAX * noise, obs_action).view(-1, n)


def penalty_weight(h, beta, penalty):
    """w in Q_L = w Q, Eq. 8 (difference 3): h [B] -> [B]."""
    uncertain = h > torch.quantile(h, beta)
    inside = 1 + 0.1 * (1 - 1 / h) if penalty == "mild" else 1 / h
    return torch.where(uncertain, inside, beta if penalty == "paper" else 1.0)


def critic_targets(reward, discount, next_q, weight):
    """r + gamma Q' and r + gamma Q_L' of Eq. 7: reward, discount (0 after a terminal), next_q, weight [B]."""
    return reward + discount * next_q, reward + discount * weight * next_q


def log_prob(mean, log_std, action):
    """log N(action | mean, std) summed over action dimensions: [..., A] -> [...]."""
    return (-0.5 * ((action - mean) / log_std.exp()) ** 2 - log_std - 0.5 * math.log(2 * math.pi)).sum(-1)


def pg_loss(actor, critic, obs, action, bc_coef):
    """-E min(Q1, Q2)(s, mean of pi) - bc_coef E log pi(a | s), Eq. 9 with difference 4."""
    mean, log_std = actor(obs)
    q = critic(obs, mean).amin(0)
    return -bc_coef * log_prob(mean, log_std, action).mean() - q.mean()


def awr_loss(actor, actor_target, critic, obs, action, generator, temperature=6.0, most=100.0, samples=30):
    """-E min(exp(6 (Q - V)), 100) log pi(a | s), V the mean of Q over actions of the target policy."""
    with torch.no_grad():
        many = obs.repeat_interleave(samples, dim=0)
        mean, log_std = actor_target(many)
        noise = torch.randn(mean.shape, dtype=mean.dtype, device=mean.device, generator=generator)
        drawn = mean + log_std.exp() * noise  # may leave the action box
        v = critic(many, drawn).amin(0).view(-1, samples).mean(1)
        q = critic(obs, action).amin(0)
        weight = torch.exp(temperature * (q - v)).clamp_max(most)
    return -(weight * log_prob(*actor(obs), action)).mean()


def adam(parameters, lr, **more):
    """Fused Adam; its rate is a tensor, which a captured update reads anew each time."""
    parameters = list(parameters)
    device = parameters[0].device
    lr = torch.tensor(lr, device=device)
    return torch.optim.Adam(parameters, lr, fused=True, capturable=device.type == "cuda", **more)


def set_lr(opt, lr):
    opt.param_groups[0]["lr"].copy_(lr)


def cosine(step, steps):
    """Factor of a learning rate after `step` (a tensor) of `steps` updates: 1 to 0."""
    return 0.5 * (1 + torch.cos(math.pi * step / steps))


def rectified(step):
    """RAdam (Liu et al. 2020) as a factor of Adam's learning rate after `step` updates (difference 10)."""
    t, longest = step.double() + 1, 1999.0  # 2 / (1 - 0.999) - 1
    length = longest - 2 * t * 0.999**t / (1 - 0.999**t)  # of the average that estimates the variance
    ratio = (length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)
    return torch.where(length > 5, ratio.sqrt(), 0.0)


@torch.no_grad()
def update_target(target, net, tau):
    """target <- (1 - tau) target + tau net"""
    torch._foreach_lerp_(list(target.parameters()), list(net.parameters()), tau)


class QDQ:
    """All that belongs to one seed: networks, optimisers, the updates of the three phases, and acting."""

    def __init__(self, args, data, seed):
        self.args, self.data = args, data
        device = torch.device(args.device)
        self.generator = torch.Generator(device).manual_seed(seed)
        self.metrics = Metrics()
        torch.manual_seed(seed)
        obs_dim, action_dim = data.obs_dim, data.action_dim

        self.score = ScoreModel(obs_dim + action_dim, args.return_hidden).to(device)
        self.consistency = ConsistencyModel(obs_dim + action_dim, args.return_hidden).to(device)
        self.consistency_target = copy.deepcopy(self.consistency).requires_grad_(False)
        self.critic = Critic(obs_dim, action_dim, args.hidden, args.layers, args.layer_norm).to(device)
        self.critic_target = copy.deepcopy(self.critic).requires_grad_(False)
        self.actor = Actor(obs_dim, action_dim, args.hidden, args.layers, data.max_action).to(device)
        self.actor_target = copy.deepcopy(self.actor).requires_grad_(False)

        self.score_opt = adam(self.score.parameters(), args.score_lr)
        self.consistency_opt = adam(self.consistency.parameters(), args.consistency_lr)
        self.critic_opt = adam(self.critic.parameters(), args.critic_lr)
        self.actor_opt = adam(self.actor.parameters(), args.actor_lr)
        self.levels = noise_levels(args.levels).float().to(device)
        self.q_rows = None  # D_Q, set by `use_returns`
        self.q_range = torch.zeros(2, device=device)  # Qmin, Qmax
        self.score_count = torch.zeros((), device=device)  # updates so far, for the learning rates
        self.consistency_count = torch.zeros((), device=device)
        self.actor_count = torch.zeros((), device=device)
        self.state = dict(
            score=self.score, score_opt=self.score_opt, score_count=self.score_count,
            consistency=self.consistency, consistency_target=self.consistency_target,
            consistency_opt=self.consistency_opt, consistency_count=self.consistency_count,
            critic=self.critic, critic_target=self.critic_target, critic_opt=self.critic_opt,
            actor=self.actor, actor_target=self.actor_target, actor_opt=self.actor_opt, actor_count=self.actor_count,
            q_range=self.q_range, generator=self.generator,
        )  # fmt: skip

    def use_returns(self, q_rows, q_range):
        """Take D_Q (see `return_dataset`) as training data of the first two phases."""
        self.q_rows = q_rows
        self.q_range.copy_(q_range)

    def sample_q_rows(self):
        """obs_action [B, S + A] and x [B, 1], uniform from D_Q."""
        n, shape, device = len(self.q_rows), (self.args.batch_size,), self.q_rows.device
        rows = self.q_rows[torch.randint(n, shape, device=device, generator=self.generator)]
        return rows[:, :-1], rows[:, -1:]

    def score_update(self):
        """One update of the score model."""
        set_lr(self.score_opt, self.args.score_lr * cosine(self.score_count, self.args.score_steps))
        obs_action, x = self.sample_q_rows()
        loss = score_loss(self.score, x, obs_action, self.generator)
        self.score_opt.zero_grad()
        loss.backward()
        self.score_opt.step()
        self.score_count += 1
        self.metrics.add(score_loss=loss)

    def consistency_update(self):
        """Five updates of the consistency model; its moving average follows after the first."""
        for i in range(5):
            factor = cosine(self.consistency_count, self.args.consistency_steps) * rectified(self.consistency_count)
            set_lr(self.consistency_opt, self.args.consistency_lr * factor)
            obs_action, x = self.sample_q_rows()
            loss = consistency_loss(
                self.consistency, self.consistency_target, self.score, x, obs_action, self.levels, self.generator
            )
            self.consistency_opt.zero_grad()
            loss.backward()
            self.consistency_opt.step()
            self.consistency_count += 1
            self.metrics.add(consistency_loss=loss)
            if i == 0:
                update_target(self.consistency_target, self.consistency, self.args.consistency_tau)

    def policy_update(self):
        """Two iterations of Algorithm 1; actor and targets move in the first."""
        for i in range(2):
            batch = self.data.sample(self.args.batch_size, self.generator)
            self.critic_step(batch)
            if i == 0:
                self.actor_step(batch)
                update_target(self.critic_target, self.critic, self.args.tau)
                update_target(self.actor_target, self.actor, self.args.tau)

    def critic_step(self, batch):
        # next action, its uncertainty, and both targets, Eq. 6 to 8
        with torch.no_grad():
            next_action = self.next_action(batch.next_obs)
            h = self.uncertainty(batch.next_obs, next_action, self.generator)
            weight = penalty_weight(h, self.args.beta, self.args.penalty)
            next_q = self.critic_target(batch.next_obs, next_action).amin(0)
            discount = self.args.gamma * (1 - batch.terminal)
            target, low_target = critic_targets(batch.reward, discount, next_q, weight)

        # critics, Eq. 7
        q = self.critic(batch.obs, batch.action)
        high_loss = ((q - target) ** 2).mean(1).sum()
        low_loss = ((q - low_target) ** 2).mean(1).sum()
        critic_loss = self.args.alpha * high_loss + (1 - self.args.alpha) * low_loss

        self.critic_opt.zero_grad()
        critic_loss.backward()
        nn.utils.clip_grad_norm_(self.critic.parameters(), self.args.clip_grad)
        self.critic_opt.step()
        self.metrics.add(critic_loss=critic_loss, high_loss=high_loss, low_loss=low_loss, q=q.mean(),
                         uncertainty=h.mean(), least_uncertainty=h.amin())  # fmt: skip

    def actor_step(self, batch):
        obs, action = batch.obs, batch.action
        if self.args.actor_loss == "pg":
            actor_loss = pg_loss(self.actor, self.critic, obs, action, self.args.bc_coef)  # Eq. 9
        else:
            actor_loss = awr_loss(self.actor, self.actor_target, self.critic, obs, action, self.generator)
        set_lr(self.actor_opt, self.args.actor_lr * cosine(self.actor_count, self.args.steps))  # half of it in the end
        self.actor_opt.zero_grad()
        actor_loss.backward(inputs=list(self.actor.parameters()))  # the critic stays as it is
        self.actor_opt.step()
        self.actor_count += 1
        self.metrics.add(actor_loss=actor_loss, log_std=self.actor.log_std.mean())

    def next_action(self, next_obs):
        """a' of the target policy with the smoothing noise of TD3: [B, S] -> [B, A]."""
        limit = self.data.max_action
        action, log_std = self.actor_target(next_obs)
        if self.args.target_sample:
            action = action + log_std.exp() * torch.randn(action.shape, device=action.device, generator=self.generator)
        noise = POLICY_NOISE * torch.randn(action.shape, device=action.device, generator=self.generator)
        action = action + limit * noise.clamp(-NOISE_CLIP, NOISE_CLIP)
        return action.clamp(-limit, limit)

    def to_return(self, x):
        """Scaled returns in [-1, 1] back to their own units."""
        q_min, q_max = self.q_range
        return q_min + (x + 1) / 2 * (q_max - q_min)

    def uncertainty(self, obs, action, generator):
        """H of Eq. 6, in units of the return: [B, S], [B, A] -> [B]."""
        obs_action = torch.cat([obs, action], dim=-1)
        x = sample_returns(one_step, self.consistency, obs_action, self.args.q_samples, generator)
        return self.to_return(x).std(dim=1, correction=0)

    def act(self, obs, generator):
        """The mean of pi: [n, S] -> [n, A]."""
        return self.actor(obs)[0]

    def start_from_teacher(self):
        """The consistency model and its average begin as copies of the score model (difference 9)."""
        self.consistency.load_state_dict(self.score.state_dict())
        self.consistency_target.load_state_dict(self.score.state_dict())


def truncated_returns(reward, end, gamma, window, stride, most=100):
    """Discounted sums of at most `window` rewards, Eq. 5: their first rows [n] and their values [n] in float64.

    reward [N], end [N] (true on the last row of each episode). Windows begin every `stride` steps of an episode, up to
    the first that reaches its end, at most `most` of them.
    """
    last = end.nonzero().squeeze(1)
    first = torch.cat([last.new_zeros(1), last[:-1] + 1])
    length = last - first + 1
    count = (1 + (length - window + stride - 1).clamp_min(0) // stride).clamp_max(most)  # windows of each episode
    episode = torch.arange(len(count)).repeat_interleave(count)  # of each window
    number = torch.arange(len(episode)) - (count.cumsum(0) - count)[episode]  # of each window in its episode
    start = first[episode] + stride * number
    total = torch.zeros(len(start), dtype=torch.float64)
    for i in reversed(range(window)):  # from the last reward back
        row = start + i
        inside = row <= last[episode]
        total = torch.where(inside, reward[row.clamp_max(len(reward) - 1)] + gamma * total, 0.0)
    return start, total


def return_dataset(data, gamma, window, stride):
    """D_Q: rows (s, a, x) [n, S + A + 1], x the truncated return scaled to [-1, 1], and (Qmin, Qmax) [2]."""
    data.need_order("returns")
    jump = (data.obs[1:] - data.next_obs[:-1]).norm(dim=1) > 1e-6  # a time limit or a reset
    jump |= data.episode.diff() > 0  # where resets look alike
    end = torch.cat([jump | (data.terminal[:-1] > 0), torch.tensor([True])])
    start, value = truncated_returns(data.reward.double(), end, gamma, window, stride)
    q_min, q_max = value.min(), value.max()
    if q_min == q_max:
        all_of = f"all {len(value):,} truncated returns in {data.name} are {q_min:g}"
        raise UserError(f"{all_of}: no distribution to learn (a shorter --window gives more of them)")
    x = 2 * (value - q_min) / (q_max - q_min) - 1
    q_rows = torch.cat([data.obs[start], data.action[start], x.float()[:, None]], dim=1)
    return q_rows, torch.stack([q_min, q_max]).float()


def draw_returns(learner, path):
    """The learned distribution of truncated returns beside the data: all pairs, and three with a low to high return."""
    generator = torch.Generator(learner.q_rows.device).manual_seed(0)
    rows = learner.q_rows[learner.q_rows[:, -1].argsort()]
    samplers = {"consistency model, one step": (one_step, learner.consistency),
                "score model, 18 Heun steps": (many_steps, learner.score)}  # fmt: skip

    def samples(rows, n):
        with torch.no_grad():
            return {name: learner.to_return(sample_returns(*sampler, rows[:, :-1], n, generator)).cpu()
                    for name, sampler in samplers.items()}  # fmt: skip

    def draw_all(axes):
        some = rows[torch.linspace(0, len(rows) - 1, 2000, device=rows.device).long()]
        axes.hist(learner.to_return(some[:, -1]).cpu(), bins=60, density=True, color="lightgrey", label="data")
        for name, values in samples(some, 1).items():
            axes.hist(values.flatten(), bins=60, density=True, histtype="step", label=name)
        axes.set(title="all state-action pairs", xlabel="truncated return")
        axes.legend(fontsize=7)

    def draw_pair(axes, fraction):
        row = rows[int(fraction * (len(rows) - 1))][None]
        for name, values in samples(row, 1000).items():
            axes.hist(values.flatten(), bins=40, density=True, histtype="step", label=name)
        axes.axvline(learner.to_return(row[0, -1]).item(), color="black", linestyle="--", label="data")
        axes.set(title=f"a pair with a return at the {100 * fraction:.0f}th percentile", xlabel="truncated return")

    save_figure(path, draw_all, *(partial(draw_pair, fraction=fraction) for fraction in (0.1, 0.5, 0.9)))


def draw_uncertainty(learner, data, path):
    """H for the data's actions and for actions drawn at random in the same states."""
    generator = torch.Generator(learner.generator.device).manual_seed(0)
    obs, action, *_ = data.sample(1000, generator)
    anywhere = data.max_action * (2 * torch.rand(action.shape, device=action.device, generator=generator) - 1)
    with torch.no_grad():
        known, unknown = (learner.uncertainty(obs, a, generator).cpu() for a in (action, anywhere))

    def draw(axes):
        bins = torch.linspace(0, max(known.max(), unknown.max()), 50)
        axes.hist(known, bins=bins, alpha=0.6, label="actions of the data")
        axes.hist(unknown, bins=bins, alpha=0.6, label="random actions")
        axes.set(title=f"median H {known.median():.3g} in data, {unknown.median():.3g} random", xlabel="uncertainty H")
        axes.legend(fontsize=8)

    save_figure(path, draw)


UNUSED = "score_steps consistency_steps score_lr consistency_lr levels consistency_tau init_from_teacher".split()
# What both were made with
SHARED = "fingerprint reward_offset batch_size gamma window window_stride return_hidden".split()


def load_models(learners):
    """--reuse: score and consistency model, Qmin and Qmax of another run on the same data, of whatever seed."""
    for learner, seed in zip(learners, learners[0].args.seed):
        args, data = learner.args, learner.data
        theirs, checkpoint = load_run(__file__, args.reuse, Args, seed, args.device)
        if "consistency" not in checkpoint["done"]:
            raise UserError(f"--reuse {args.reuse}: its consistency model is not finished")
        same_settings(args.reuse, vars(theirs) | checkpoint["dims"], vars(args) | vars(data), SHARED)
        parts = ("score", "consistency", "consistency_target", "q_range")
        set_state({name: learner.state[name] for name in parts}, checkpoint["learner"])
        for name in UNUSED:
            setattr(args, name, getattr(theirs, name))


def check(args, given):
    at_least(args, 1, "window_stride", "hidden", "layers")
    if not args.window >= args.window_stride:  # else a window could begin beyond its episode
        raise UserError(f"--window must be at least {args.window_stride}, the --window-stride, found {args.window}")
    at_least(args, 2, "q_samples")
    at_least(args, 3, "levels")
    at_least(args, 0, "score_steps", "consistency_steps", "gamma", "tau", "consistency_tau", "alpha", "beta")
    at_least(args, 0, "score_lr", "consistency_lr", "critic_lr", "actor_lr", "bc_coef", "clip_grad")
    at_most(args, 1, "gamma", "tau", "consistency_tau", "alpha", "beta")
    if args.return_hidden < 8 or args.return_hidden % 8:
        raise UserError(f"--return-hidden must be a multiple of 8, the size of a group, found {args.return_hidden}")
    if args.alpha == 1:
        useless(given, ["beta", "penalty", "q_samples"], "with --alpha 1")
    if args.actor_loss == "awr":
        useless(given, ["bc_coef"], "with --actor-loss awr")
    if args.reuse:
        useless(given, UNUSED, "with --reuse")
        apart(args, "reuse")


def main():
    args = parse_args(Args, PAPER | OURS, check, proportional=("score_steps", "consistency_steps"), doc=__doc__)
    if args.evaluate:
        return evaluate_run(args, QDQ)
    data = load_dataset(args.env, args.data_path, judge=args.eval_episodes > 0)
    offset_rewards(data, args.reward_offset)
    q_rows, q_range = return_dataset(data, args.gamma, args.window, args.window_stride)
    data, q_rows = data.to(args.device), q_rows.to(args.device)
    learners = [QDQ(args, data, seed) for seed in args.seed]
    for learner in learners:
        learner.use_returns(q_rows, q_range)
    if args.reuse and not args.resume:
        load_models(learners)  # before the run begins: what does not fit is refused
        print(f"note: score model after {args.score_steps:,}, consistency model after {args.consistency_steps:,} "
              f"updates: {args.reuse}")  # fmt: skip
    phases = dict(score=args.score_steps, consistency=args.consistency_steps, policy=args.steps)
    if args.reuse:
        phases |= dict(score=0, consistency=0)
    run = Run(args, learners, data, __file__, PROTOCOL, phases)

    def at_end():
        if args.reuse:
            load_models(learners)  # again: a resumed run may have no checkpoint yet
        elif args.init_from_teacher:
            for learner in learners:
                learner.start_from_teacher()

    update = capture(learners, "score_update")
    for _ in run.updates("score", at_end=at_end):
        update()
    update = capture(learners, "consistency_update")
    for _ in run.updates("consistency", stride=5):
        update()
    for learner, folder in zip(learners, run.folders):
        draw_returns(learner, folder / "returns.png")
        draw_uncertainty(learner, data, folder / "uncertainty.png")
    update = capture(learners, "policy_update")
    for _ in run.updates("policy", stride=2, evaluate=True):
        update()
    run.finish()


if __name__ == "__main__":
    cli(main)
