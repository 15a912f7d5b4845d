"""Diffusion Actor-Critic (DAC)

Linjiajie Fang, Ruoxue Liu, Jing Zhang, Wenjia Wang, Bing-Yi Jing: "Diffusion Actor-Critic: Formulating Constrained
Policy Iteration as Diffusion Noise Regression for Offline Reinforcement Learning", ICLR 2025, arXiv:2405.20555.
Official code: github.com/Fang-Lin93/DAC, commit e254357.

    python dac.py                                            # built-in HalfCheetah data, minutes on a CPU core
    python dac.py --env hopper-medium-v2                     # the paper's run
    python dac.py --env bandit-3gaussians --guidance hard    # the authors' 2-D example; result: bandit.png

The improved policy pi*, in proportion to pi_b exp(Q / eta), is a diffusion model whose score is the data's plus grad Q
/ eta. So one noise predictor, trained by regression, is the policy: no model of pi_b, no gradient through the denoising
chain. (Exact at t = 0 only: what it samples is greedier than pi*, see tests/benchmarks/claim_dac.py.)

    noised     x_t = sqrt(abar_t) a + w_t eps,  w_t = sqrt(1 - abar_t),  t in 1..T                      noise_schedule
    gradient   g = grad_x mean_h Q_h(s, x) / E |Q_h(s, a)| at x = x_t, a from the data         Eq. 19   q_gradient
    actor      L_A = eta E |eps_theta(x_t, s, t) - eps|^2                                      Eq. 16   denoising_loss
                     + E w_t g . eps_theta(x_t, s, t)                                                   guidance_loss
               least at eps_theta = E[eps | x_t, s] - w_t g / (2 eta)                          Theorems 1, 2
    dual       eta <- eta + alpha_eta (E |eps_theta - eps|^2 - b)                                       actor_step
    critic     L_C = E (r + gamma Q_LCB(s', a') - Q_h(s, a))^2,  a' of the target actor        Eq. 18   critic_step
               Q_LCB = mean_h Q_h - rho std_h Q_h, of the target critics, h = 1..H                      lcb_target

    Algorithm 1  lines 3, 12, 13: update;  4 to 7: critic_step (4: denoise);  8 to 11: actor_step
    ablations    "hard" guidance: g without the w_t that weakens "soft" guidance as the noise shrinks; "denoised":
                 grad Q at the end of the denoising chain and through it
    to act       10 actions denoised, the one with the largest mean target Q                            act

    The paper (P, by its authors' slides) or its code (C)   This file, which follows C where nothing else is said
 1. P: Eq. 15 regresses to eps - w_t g / eta                Eq. 16 lacks a factor 2, hence the 2 eta above; for Eq. 15
                                                            --guidance-scale 2
 2. P: squared norms                                        means over action dimensions, to which the table's b belongs
 3. P: t is continuous                                      an integer
 4. P: the dual step follows the actor's                    its loss is from before the actor's step, the residual is
                                                            cut to [-1, 1], and eta stays in [0.001, 100]
 5. P: both targets move last, at every update              critics: before the actor's step; actor: at every fifth
                                                            update, after 1000 with its random start:
                                                            --actor-ema-every, --actor-ema-start
 6. P: one a'                                               10, averaged (AntMaze: maximised) for each critic, before
                                                            mean and std over critics (the std divides by H):
                                                            --next-samples, --max-q-backup
 7. P: E |Q| over the data                                  over the minibatch; g sees the mean of the target critics,
                                                            without pessimism
 8. C: the sampler's noise has variance 1 - alpha_t, not    the same, --no-clip-denoised. With T = 5 a spread of 0.2
    the posterior's; x_0 is cut to the action box           in the data becomes 0.114. "denoised" guidance always cuts
 9. P: neither gradient clipping nor decay                  norm 1 for each net, all critics together; both rates fall
                                                            to zero along a cosine: --lr-decay-steps
10. C: from 2024-05-28 to 06-02 rho was divided by          the table is that of the last commit: --rho, --critic-lr
    sqrt(H), and critics of three more AntMaze sets
    learned at 1e-3
11. C: AntMaze-v0, rewards scaled by the range of returns   the same: rewards are 0 and 1000, without -1
12. C: batches without replacement                          with
13. C: bandits of 800 actions (3gaussians 1,200, moons and  10,000 with one draw each; 5,000 updates, decay over them,
    circles 400) with new reward noise at each visit;       and one a', because every row is terminal; pictures cut at
    20,000 updates, decay over 2,000,000; pictures cut      the data's largest |a|
    at 1.45

To lift this file out: bring `RunArgs`, `Metrics` and your data: `sample(batch_size, generator)` gives obs, action,
reward, next_obs and terminal; `obs_dim`, `action_dim`, `max_action`; for `prepare` these columns of all rows in
order, `name` and `need_order`. Write your own loop in place of `main`; see tests/lifted.
"""

import copy
import math
from dataclasses import dataclass
from functools import cache, partial
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F

from common import (
    SCENES,
    Metrics,
    Run,
    RunArgs,
    UserError,
    at_least,
    at_most,
    capture,
    cli,
    evaluate_run,
    load_dataset,
    parse_args,
    useless,
)


@dataclass
class Args(RunArgs):
    steps: int = 2_000_000
    eval_every: int = 10_000

    # DAC
    gamma: float = 0.99  # Discount
    critic_lr: float = 3e-4  # Learning rate of the critics (alpha_phi)
    actor_lr: float = 3e-4  # Learning rate of the actor (alpha_theta)
    lr_decay_steps: int | None = None  # Updates over which both rates fall to zero; --steps unless given
    tau: float = 0.005  # Rate of the target networks (alpha_ema)
    actor_ema_every: int = 5  # Updates between moves of the target actor; --steps is rounded up to a multiple of it
    actor_ema_start: int = 1_000  # Updates during which the target actor keeps its random start
    critics: int = 10  # Size of the ensemble (H)
    rho: float = 1.0  # Pessimism, in standard deviations over the ensemble
    next_samples: int = 10  # Next actions per transition in the critic's target
    max_q_backup: bool = False  # Maximum instead of mean over the next actions, for each critic on its own
    diffusion_steps: int = 5  # Denoising steps (T)
    # Cut the prediction of x_0 to the action box at each denoising step, as "denoised" guidance always does
    clip_denoised: bool = True
    guidance: Literal["soft", "hard", "denoised"] = "soft"  # w_t g, g, or grad Q through the denoising chain
    guidance_scale: float = 1.0  # Factor on the guidance; 2 is Eq. 15
    eta: float = 1.0  # Weight of the noise regression, or where its dual ascent begins
    eta_lr: float = 1e-3  # Step of the dual ascent (alpha_eta); 0 keeps eta fixed
    bc_threshold: float = 1.0  # Noise regression loss that the dual ascent aims at (b), per action dimension
    hidden: int = 256  # Width of critics and actor
    time_dim: int = 16  # Size of the time embedding
    candidates: int = 10  # Actions to choose from when acting


MAZE = dict(eta=0.1, eta_lr=0.0, max_q_backup=True)  # one fixed eta, so b has no role
PAPER = {  # runs.sh of the official code: b, rho (what is not named is the same everywhere); the paper's table: score
    # b = 1 is the loss of a net that predicts no noise at all: eta falls to 0.02 or less, and Q all but decides
    "halfcheetah-medium-v2": dict(bc_threshold=1.0, rho=0.0, paper_score=59.1),
    "halfcheetah-medium-replay-v2": dict(bc_threshold=1.0, rho=0.0, paper_score=55.0),
    "halfcheetah-medium-expert-v2": dict(bc_threshold=0.1, rho=0.0, paper_score=99.1),
    "hopper-medium-v2": dict(bc_threshold=1.0, rho=1.5, paper_score=101.2),
    "hopper-medium-replay-v2": dict(bc_threshold=1.0, rho=1.5, paper_score=103.1),
    "hopper-medium-expert-v2": dict(bc_threshold=0.05, rho=1.5, paper_score=111.7),
    "walker2d-medium-v2": dict(bc_threshold=1.0, rho=1.0, paper_score=96.8),
    "walker2d-medium-replay-v2": dict(bc_threshold=1.0, rho=1.0, paper_score=96.8),
    "walker2d-medium-expert-v2": dict(bc_threshold=1.0, rho=1.0, paper_score=113.6),
    "antmaze-umaze-v0": MAZE | dict(rho=1.0, paper_score=99.5),
    "antmaze-umaze-diverse-v0": MAZE | dict(rho=1.0, paper_score=85.0),
    "antmaze-medium-play-v0": MAZE | dict(rho=1.0, paper_score=85.8),
    "antmaze-medium-diverse-v0": MAZE | dict(rho=1.0, paper_score=84.0),
    "antmaze-large-play-v0": MAZE | dict(rho=1.1, critic_lr=1e-3, paper_score=50.3),
    "antmaze-large-diverse-v0": MAZE | dict(rho=1.0, critic_lr=1e-3, paper_score=55.3),
}
DEMO = dict(hidden=64, critics=4, next_samples=1, candidates=1, batch_size=128, actor_lr=1e-3, critic_lr=3e-3,
            tau=0.02, actor_ema_every=1, actor_ema_start=0, rho=2.0, eta=0.2, eta_lr=0.01, bc_threshold=0.12,
            eval_every=1_500, log_every=500)  # fmt: skip
BANDIT = dict(steps=5_000, batch_size=128, actor_lr=1e-3, critic_lr=1e-3, critics=5, next_samples=1, candidates=1,
              hidden=64, diffusion_steps=50, clip_denoised=False, eta_lr=0.01, bc_threshold=1.3, actor_ema_start=10,
              eval_every=1_000, log_every=200)  # fmt: skip
OURS = {  # settings of this project: built-in data on two CPU cores, and 2-D bandits (the official code's)
    "halfcheetah-demo": DEMO | dict(steps=12_000),
    "pendulum-demo": DEMO | dict(steps=4_000, gamma=0.95, eval_every=1_000),
    "bandit": BANDIT,
}
PROTOCOL = "mean of the last five evaluations, 8 seeds, 10 episodes each"

BETA_MIN, BETA_MAX = 0.1, 10.0  # noise rates
ETA_MIN, ETA_MAX = 0.001, 100.0
EPS = 1e-6  # keeps a division by E |Q| finite


class Mish(nn.Module):
    """x tanh(softplus(x)); on a CPU, without gradient, as x (2 / d - 1), d = 1 + sigmoid(-x)^2, which is faster."""

    def forward(self, x):
        if x.is_cuda or torch.is_grad_enabled():
            return F.mish(x)
        d = torch.sigmoid(x).sub_(1).square_().add_(1)
        return d.reciprocal_().mul_(2).sub_(1).mul_(x)


def mlp(sizes, activation, linear=nn.Linear):
    """Linear layers of these sizes, `activation` after all but the last."""
    layers = []
    for d_in, d_out in zip(sizes, sizes[1:]):
        layers += [linear(d_in, d_out), activation()]
    return nn.Sequential(*layers[:-1])


class EnsembleLinear(nn.Module):
    """n linear layers as one batched matmul: [n, B, d_in] -> [n, B, d_out], Xavier-uniform weights, zero biases."""

    def __init__(self, n, d_in, d_out):
        super().__init__()
        bound = math.sqrt(6 / (d_in + d_out))
        self.weight = nn.Parameter(torch.empty(n, d_in, d_out).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(n, 1, d_out))

    def forward(self, x):
        return torch.baddbmm(self.bias, x, self.weight)


class Critic(nn.Module):
    """Q_1 to Q_n: obs [B, S], action [B, A] -> [n, B]."""

    def __init__(self, n, obs_dim, action_dim, hidden):
        super().__init__()
        self.n = n
        self.net = mlp([obs_dim + action_dim, hidden, hidden, hidden, 1], Mish, partial(EnsembleLinear, n))

    def forward(self, obs, action):
        x = torch.cat([obs, action], dim=-1)
        return self.net(x.expand(self.n, *x.shape)).squeeze(-1)


class Actor(nn.Module):
    """Noise predictor eps_theta: x_t [B, A], obs [B, S], t [B, 1] or, for all rows, [1, 1] -> [B, A]."""

    def __init__(self, obs_dim, action_dim, hidden, time_dim):
        super().__init__()
        self.register_buffer("freqs", torch.exp(-math.log(10_000) * torch.linspace(0, 1, time_dim // 2)))
        self.time = mlp([time_dim, 2 * time_dim, 2 * time_dim], Mish)
        self.net = mlp([obs_dim + action_dim + 2 * time_dim, hidden, hidden, hidden, action_dim], Mish)
        for layer in (*self.time, *self.net):
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)

    def forward(self, x, obs, t):
        angle = t * self.freqs
        time = self.time(torch.cat([angle.cos(), angle.sin()], dim=-1))
        return self.net(torch.cat([obs, x, time.expand(len(x), -1)], dim=-1))


@cache
def noise_schedule(steps):
    """alpha_t and abar_t for t = 0..steps, two lists with 1 at t = 0: abar_t = exp(-0.1 t / T - 4.95 (t / T)^2)."""
    alpha, alpha_bar = [1.0], [1.0]
    for t in range(1, steps + 1):
        alpha.append(math.exp(-BETA_MIN / steps - 0.5 * (BETA_MAX - BETA_MIN) * (2 * t - 1) / steps**2))
        alpha_bar.append(alpha_bar[-1] * alpha[-1])
    return alpha, alpha_bar


def denoise(net, obs, action_dim, steps, generator, clip=None):
    """An action for each row of obs [B, S] by `steps` denoising steps, with noise of variance 1 - alpha_t each: [B, A].

    clip: largest absolute action, to which each prediction of x_0 is cut, or None.
    """
    alpha, alpha_bar = noise_schedule(steps)
    x = torch.randn(len(obs), action_dim, device=obs.device, generator=generator)
    for t in range(steps, 0, -1):
        noise = net(x, obs, torch.full((1, 1), float(t), device=obs.device))
        action = (x - math.sqrt(1 - alpha_bar[t]) * noise) / math.sqrt(alpha_bar[t])
        action = action if clip is None else action.clamp(-clip, clip)
        # mean of x_{t-1} given x_t and x_0 = action, as in DDPM
        on_action = math.sqrt(alpha_bar[t - 1]) * (1 - alpha[t]) / (1 - alpha_bar[t])
        on_x = math.sqrt(alpha[t]) * (1 - alpha_bar[t - 1]) / (1 - alpha_bar[t])
        x = on_action * action + on_x * x
        if t > 1:
            x = x + math.sqrt(1 - alpha[t]) * torch.randn(x.shape, device=x.device, generator=generator)
    return x  # at t = 1 the two factors are 1 and 0


def lcb_target(next_q, reward, terminal, gamma, rho, max_q_backup=False):
    """y = r + gamma (1 - terminal) Q_LCB, Eq. 18: next_q [H, B, N] of the target critics at N next actions -> [B].

    Each critic is averaged (or maximised) over the next actions first; then comes mean - rho std over critics.
    """
    next_v = next_q.amax(-1) if max_q_backup else next_q.mean(-1)
    q_lcb = next_v.mean(0) - rho * next_v.std(0, correction=0)
    return reward + gamma * (1 - terminal) * q_lcb


def q_gradient(critic, obs, action, x):
    """g, Eq. 19, and its scale: the mean critic's gradient [B, A] at the noisy action x over mean |Q| at the data's."""
    with torch.no_grad():
        scale = critic(obs, action).abs().mean()
    x = x.detach().requires_grad_()
    gradient = torch.autograd.grad(critic(obs, x).mean(0).sum(), x)[0]
    return gradient / (scale + EPS), scale


def denoising_loss(predicted, noise):
    """E |eps_theta - eps|^2, averaged over dimensions: the first term of Eq. 16 and what b bounds."""
    return ((predicted - noise) ** 2).mean()


def guidance_loss(predicted, gradient, weight):
    """E w g . eps_theta, averaged over dimensions: the second term of Eq. 16 (weight 1: hard guidance)."""
    return (weight * gradient * predicted).mean()


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


@torch.no_grad()
def update_target(target, net, tau):
    """target <- (1 - tau) target + tau net"""
    torch._foreach_lerp_(list(target.parameters()), list(net.parameters()), tau)


class DAC:
    """All that belongs to one seed: networks, optimisers, the update, and acting."""

    def __init__(self, args, data, seed):
        self.args, self.data = args, data
        device = torch.device(args.device)
        self.generator = torch.Generator(device).manual_seed(seed)
        self.metrics = Metrics()
        torch.manual_seed(seed)
        obs_dim, action_dim = data.obs_dim, data.action_dim
        self.clip = data.max_action if args.clip_denoised else None
        self.alpha_bar = torch.tensor(noise_schedule(args.diffusion_steps)[1], device=device)

        self.actor = Actor(obs_dim, action_dim, args.hidden, args.time_dim).to(device)
        self.actor_target = copy.deepcopy(self.actor).requires_grad_(False)
        self.critic = Critic(args.critics, obs_dim, action_dim, args.hidden).to(device)
        self.critic_target = copy.deepcopy(self.critic).requires_grad_(False)

        self.actor_opt = adam(self.actor.parameters(), args.actor_lr)
        self.critic_opt = adam(self.critic.parameters(), args.critic_lr)
        self.rates = [(self.actor_opt, args.actor_lr), (self.critic_opt, args.critic_lr)]
        self.decay_steps = args.lr_decay_steps or args.steps
        self.eta = torch.tensor(args.eta, device=device)
        self.step = torch.zeros((), device=device)  # updates done
        self.state = dict(
            actor=self.actor, actor_target=self.actor_target, actor_opt=self.actor_opt,
            critic=self.critic, critic_target=self.critic_target, critic_opt=self.critic_opt,
            eta=self.eta, step=self.step, generator=self.generator,
        )  # fmt: skip

    def update(self):
        """`actor_ema_every` iterations of Algorithm 1; the first moves the target actor.

        All in one call, because a captured update cannot ask which iteration it is.
        """
        for i in range(self.args.actor_ema_every):
            batch = self.data.sample(self.args.batch_size, self.generator)
            self.critic_step(batch)
            update_target(self.critic_target, self.critic, self.args.tau)
            self.actor_step(batch)
            if i == 0:
                self.update_actor_target()
            self.step += 1
            factor = cosine(self.step.clamp_max(self.decay_steps), self.decay_steps)
            for opt, lr in self.rates:
                set_lr(opt, lr * factor)

    def critic_step(self, batch):
        # critics, Eq. 18
        args = self.args
        with torch.no_grad():
            n, k = len(batch.next_obs), args.next_samples
            next_obs = batch.next_obs.repeat_interleave(k, dim=0)
            next_action = self.sample_actions(self.actor_target, next_obs, self.generator)
            next_q = self.critic_target(next_obs, next_action).view(-1, n, k)
            target = lcb_target(next_q, batch.reward, batch.terminal, args.gamma, args.rho, args.max_q_backup)
        q = self.critic(batch.obs, batch.action)
        critic_loss = ((q - target) ** 2).mean()

        self.critic_opt.zero_grad()
        critic_loss.backward()
        nn.utils.clip_grad_norm_(self.critic.parameters(), 1.0)
        self.critic_opt.step()
        self.metrics.add(critic_loss=critic_loss, q_std=q.std(0, correction=0).mean())

    def actor_step(self, batch):
        args = self.args

        # noise regression, first term of Eq. 16
        noise = torch.randn(batch.action.shape, device=batch.action.device, generator=self.generator)
        t = torch.randint(1, args.diffusion_steps + 1, (len(noise), 1), device=noise.device, generator=self.generator)
        alpha_bar = self.alpha_bar[t]
        w = (1 - alpha_bar).sqrt()
        x = alpha_bar.sqrt() * batch.action + w * noise
        predicted = self.actor(x, batch.obs, t)
        behavior_loss = denoising_loss(predicted, noise)

        # guidance, Eq. 19 and second term of Eq. 16
        gradient, scale = q_gradient(self.critic_target, batch.obs, batch.action, x)
        if args.guidance == "denoised":
            dims, box = self.data.action_dim, self.data.max_action  # cut even with --no-clip-denoised, as in C
            action = denoise(self.actor, batch.obs, dims, args.diffusion_steps, self.generator, box)
            q_loss = -self.critic_target(batch.obs, action).mean() / (scale + EPS)
        else:
            q_loss = guidance_loss(predicted, gradient, w if args.guidance == "soft" else 1)

        actor_loss = self.eta * behavior_loss + args.guidance_scale * q_loss  # Eq. 16
        self.actor_opt.zero_grad()
        actor_loss.backward()
        nn.utils.clip_grad_norm_(self.actor.parameters(), 1.0)
        self.actor_opt.step()
        self.metrics.add(actor_loss=actor_loss, behavior_loss=behavior_loss, q_scale=scale,
                         q_gradient=gradient.abs().mean(), eta=self.eta)  # fmt: skip

        # dual ascent: eta <- eta + alpha_eta (loss - b)
        if args.eta_lr:
            excess = behavior_loss.detach() - args.bc_threshold
            self.eta.add_(args.eta_lr * excess.clamp(-1, 1)).clamp_(ETA_MIN, ETA_MAX)

    @torch.no_grad()
    def update_actor_target(self):
        """Like update_target, but its rate is a tensor, 0 until `actor_ema_start`: a captured update cannot branch."""
        tau = self.args.tau * (self.step > self.args.actor_ema_start)
        for target, online in zip(self.actor_target.parameters(), self.actor.parameters()):
            target.lerp_(online, tau)

    def sample_actions(self, actor, obs, generator):
        """One action of `actor` for each row of obs: [B, S] -> [B, A]."""
        return denoise(actor, obs, self.data.action_dim, self.args.diffusion_steps, generator, self.clip)

    def act(self, obs, generator):
        """Draw candidates from the online actor, choose one by the mean target critic: [n, S] -> [n, A]."""
        n, k = len(obs), self.args.candidates
        obs = obs.repeat_interleave(k, dim=0)
        action = self.sample_actions(self.actor, obs, generator)
        q = self.critic_target(obs, action).mean(0).view(n, k)
        best = action.view(n, k, -1)[torch.arange(n, device=obs.device), q.argmax(1)]
        return best.clamp(-self.data.max_action, self.data.max_action)


def piece_returns(data):
    """Return [P] of each trajectory piece: cut where a row is terminal or the next row begins somewhere else."""
    continues = (data.obs[1:] - data.next_obs[:-1]).norm(dim=1) <= 1e-6
    cut = ~continues | (data.terminal[:-1] == 1)
    piece = torch.cat([cut.new_zeros(1), cut]).cumsum(0)
    return torch.zeros(piece[-1] + 1, dtype=torch.float64).index_add_(0, piece, data.reward.double())


def prepare(data):
    """Scale rewards by 1000 / (range of the pieces' returns), keep actions off the edge of the box; in place."""
    data.need_order("returns")
    returns = piece_returns(data)
    spread = returns.max() - returns.min()
    if spread > 0:
        data.reward.mul_(1000 / spread)
    else:
        print(f"note: all trajectories of {data.name} have the same return; rewards are left as they are")
    limit = data.max_action - 1e-5
    data.action.clamp_(-limit, limit)


def check(args, given):
    at_least(args, 1, "actor_ema_every", "critics", "next_samples", "diffusion_steps", "hidden", "candidates")
    at_least(args, 0, "gamma", "actor_lr", "critic_lr", "tau", "actor_ema_start", "rho", "guidance_scale", "eta")
    at_least(args, 0, "eta_lr", "bc_threshold")
    at_most(args, 1, "gamma", "tau")
    if args.lr_decay_steps is not None:
        at_least(args, 1, "lr_decay_steps")
    if args.time_dim < 2 or args.time_dim % 2:
        raise UserError(f"--time-dim must be an even number, a sine and a cosine each, found {args.time_dim}")
    if args.critics == 1:
        useless(given, ["rho"], "with one critic")
    if args.next_samples == 1:
        useless(given, ["max_q_backup"], "with one next action")
    if args.guidance_scale == 0:
        useless(given, ["guidance"], "with --guidance-scale 0")
    if args.eta_lr == 0:
        useless(given, ["bc_threshold"], "with a fixed eta (--eta-lr 0)")


def main():
    args = parse_args(Args, PAPER | OURS, check, proportional=("actor_ema_start",), doc=__doc__)
    if args.evaluate:
        return evaluate_run(args, DAC)
    data = load_dataset(args.env, args.data_path, judge=args.eval_episodes > 0)
    if args.env not in SCENES:  # bandits keep rewards and actions as they are
        prepare(data)
    data = data.to(args.device)
    learners = [DAC(args, data, seed) for seed in args.seed]
    phases = dict(update=args.steps)
    run = Run(args, learners, data, __file__, PROTOCOL, phases)

    update = capture(learners, "update")
    for _ in run.updates("update", stride=args.actor_ema_every, evaluate=True):
        update()
    run.finish()


if __name__ == "__main__":
    cli(main)
