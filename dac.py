"""Diffusion Actor-Critic (DAC)

Linjiajie Fang, Ruoxue Liu, Jing Zhang, Wenjia Wang, Bing-Yi Jing: "Diffusion Actor-Critic: Formulating Constrained
Policy Iteration as Diffusion Noise Regression for Offline Reinforcement Learning", ICLR 2025, arXiv:2405.20555.
Official code: github.com/Fang-Lin93/DAC, commit e254357.

    python dac.py                              # built-in HalfCheetah data, minutes on a CPU core
    python dac.py --env hopper-medium-v2       # the paper's run
    python dac.py --env bandit-3gaussians --guidance hard      # the authors' 2-D example; result: bandit.png

The improved policy pi* ~ pi_b exp(Q / eta) is a diffusion model whose score, at every noise level, is the data's score
plus grad Q / eta. So one noise predictor, trained by regression, is the policy: no model of the behaviour policy, no
gradient through the denoising chain. (Exact at t = 0 only: the score of noised pi* has log E[exp(Q(a) / eta) | x_t]
in the place of Q(x_t) / eta. What it samples is greedier than pi*: tests/benchmarks/claim_dac.py.)

    noised      x_t = sqrt(abar_t) a + w_t eps,  w_t = sqrt(1 - abar_t),  t uniform in 1..T             noise_schedule
    regression  eps*(x_t, s, t) = eps - w_t g / (2 eta), the minimum of L_A                Eq. 14, 15; Theorems 1, 2
    gradient    g = grad_x mean_h Q_h(s, x) at x = x_t, divided by E |Q_h(s, a)|, a from the data  Eq. 19, q_gradient
    actor       L_A = eta E |eps_theta(x_t, s, t) - eps|^2 + E w_t g . eps_theta(x_t, s, t)
                                                                           Eq. 16, denoising_loss and guidance_loss
    dual        eta <- eta + alpha_eta (E |eps_theta - eps|^2 - b)
    critic      L_C = E (r + gamma Q_LCB(s', a') - Q_h(s, a))^2,  a' from the target actor,  h = 1..H
                Q_LCB = mean_h Q_h - rho std_h Q_h, of the target critics                         Eq. 18, lcb_target
    Algorithm 1 lines 3, 12: update;  4 to 7, 13: critic_step (4: denoise);  8 to 11: actor_step

"Soft" guidance fades with the noise: w_t g. The ablations: "hard", g alone; "denoised", no g but grad Q at the end of
the denoising chain, through the chain. To act: denoise 10 actions, take the one with the largest mean target Q.

Differences between paper, official code and this file (which follows the code unless a flag is named):
 1. Eq. 15 regresses to eps - w g / eta; Eq. 16 and the code lack a factor 2 and reach eps - w g / (2 eta), above.
    Eq. 15 itself: --guidance-scale 2.
 2. The paper writes squared norms; the code averages over action dimensions, and b in the table belongs to that.
 3. t is continuous in Alg. 1, an integer in 1..T in the code.
 4. The dual step takes the loss of the updated actor, its residual is cut to [-1, 1], and eta stays in [0.001, 100].
 5. Alg. 1 moves the target actor at every update; in the code it keeps its random start for 1000 updates and then
    moves at every fifth: --actor-ema-start, --actor-ema-every. The target critics move at every update, before the
    actor's step.
 6. Alg. 1 draws one a'; the code 10, and averages (AntMaze: maximises) each critic over them before it takes mean and
    std over critics, the std with division by H: --next-samples, --max-q-backup.
 7. The mean of |Q| in Eq. 19 is over the minibatch; g sees the mean of the target critics, without pessimism.
 8. The sampler's noise has variance beta_t, not the posterior's, and x_0 is cut to the action box at each step:
    --no-clip-denoised. With T = 5 this shrinks the spread of the data: 0.2 becomes 0.114.
 9. Gradients are clipped to norm 1 (all critics together) and both learning rates fall to zero along a cosine;
    neither is in Alg. 1: --lr-decay-steps.
10. Between 2024-05-28 and 2024-06-02 the code divided rho by sqrt(H) and used 1e-3 for the critic on three more AntMaze
    sets; the table below is that of the last commit: --rho, --critic-lr.
11. AntMaze is the v0 data with rewards 0 and 1000: the code scales by the range of returns there too, without -1.
12. The code draws batches without replacement; here with.
13. Bandits: the code has 800 (moons, circles: 400) actions whose reward noise is new at each visit; here 10,000 with
    one draw each, 5,000 updates instead of 20,000, and one next sample, because every row is terminal.

To lift this file out: bring your own `load_dataset` (a `sample(batch_size, generator)` that returns the six fields of
`Batch`, and `obs_dim`, `action_dim`, `max_action`), `parse_args`, `Run`, `capture`, `Metrics`; the README has 20 lines.
"""

import copy
import math
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
import torch.nn as nn

from common import Dataset, Metrics, Run, RunArgs, capture, cli, evaluate_run, load_dataset, parse_args, save_figure


@dataclass
class Args(RunArgs):
    steps: int = 2_000_000
    eval_every: int = 10_000

    # DAC
    gamma: float = 0.99
    """Discount."""
    lr: float = 3e-4
    """Learning rate of the actor (alpha_theta)."""
    critic_lr: float = 3e-4
    """Learning rate of the critics (alpha_phi)."""
    lr_decay_steps: int | None = None
    """Length of the cosine decay of both learning rates to zero, in updates; --steps unless given."""
    tau: float = 0.005
    """Rate of both targets (alpha_ema)."""
    actor_ema_every: int = 5
    """Updates between moves of the target actor."""
    actor_ema_start: int = 1_000
    """Updates during which the target actor keeps its random start."""
    critics: int = 10
    """Size of the ensemble (H)."""
    rho: float = 1.0
    """Pessimism, in standard deviations over the ensemble (rho)."""
    next_samples: int = 10
    """Next actions per transition in the critic's target."""
    max_q_backup: bool = False
    """Maximum instead of mean over the next actions, for each critic on its own."""
    diffusion_steps: int = 5
    """Denoising steps (T)."""
    clip_denoised: bool = True
    """Cut the prediction of x_0 to the action box at each denoising step."""
    guidance: Literal["soft", "hard", "denoised"] = "soft"
    """Q-guidance: w_t g, g, or the gradient of Q through the denoising chain."""
    guidance_scale: float = 1.0
    """Factor on the guidance; 2 is Eq. 15."""
    eta: float = 1.0
    """Weight of the noise regression (eta), or where its dual ascent begins."""
    eta_lr: float = 1e-3
    """Step of the dual ascent (alpha_eta); 0 keeps eta fixed."""
    bc_threshold: float = 1.0
    """Noise regression loss that the dual ascent aims at (b), per action dimension."""
    hidden: int = 256
    """Width of critics and actor."""
    time_dim: int = 16
    """Size of the time embedding."""
    candidates: int = 10
    """Actions to choose from when acting."""


MAZE = dict(eta=0.1, eta_lr=0.0, max_q_backup=True)  # one fixed eta, so b has no role
PAPER = {  # runs.sh of the official code; what is not named here is the same everywhere
    "halfcheetah-medium-v2": dict(bc_threshold=1.0, rho=0.0),
    "halfcheetah-medium-replay-v2": dict(bc_threshold=1.0, rho=0.0),
    "halfcheetah-medium-expert-v2": dict(bc_threshold=0.1, rho=0.0),
    "hopper-medium-v2": dict(bc_threshold=1.0, rho=1.5),
    "hopper-medium-replay-v2": dict(bc_threshold=1.0, rho=1.5),
    "hopper-medium-expert-v2": dict(bc_threshold=0.05, rho=1.5),
    "walker2d-medium-v2": dict(bc_threshold=1.0, rho=1.0),
    "walker2d-medium-replay-v2": dict(bc_threshold=1.0, rho=1.0),
    "walker2d-medium-expert-v2": dict(bc_threshold=1.0, rho=1.0),
    "antmaze-umaze-v0": MAZE | dict(rho=1.0),
    "antmaze-umaze-diverse-v0": MAZE | dict(rho=1.0),
    "antmaze-medium-play-v0": MAZE | dict(rho=1.0),
    "antmaze-medium-diverse-v0": MAZE | dict(rho=1.0),
    "antmaze-large-play-v0": MAZE | dict(rho=1.1, critic_lr=1e-3),
    "antmaze-large-diverse-v0": MAZE | dict(rho=1.0, critic_lr=1e-3),
}
DEMO = dict(hidden=64, critics=4, next_samples=1, candidates=1, batch_size=128, lr=1e-3, critic_lr=3e-3, tau=0.02,
            actor_ema_every=1, actor_ema_start=0, rho=2.0, eta=0.2, eta_lr=0.01, bc_threshold=0.12,
            eval_every=1_500, log_every=500)  # fmt: skip
BANDIT = dict(steps=5_000, batch_size=128, lr=1e-3, critic_lr=1e-3, critics=5, next_samples=1, candidates=1, hidden=64,
              diffusion_steps=50, clip_denoised=False, eta_lr=0.01, bc_threshold=1.3, actor_ema_start=10,
              eval_every=1_000, log_every=200)  # fmt: skip
OURS = {  # settings of this project: built-in data on two CPU cores, and the bandits of the official code
    "halfcheetah-demo-medium-replay": DEMO | dict(steps=12_000),
    "pendulum-demo-medium": DEMO | dict(steps=4_000, gamma=0.95, eval_every=1_000),
    **{f"bandit-{shape}": BANDIT for shape in ("2gaussians", "3gaussians", "moons", "circles")},
}
PUBLISHED = {  # the paper's main table
    "halfcheetah-medium-v2": 59.1, "hopper-medium-v2": 101.2, "walker2d-medium-v2": 96.8,
    "halfcheetah-medium-replay-v2": 55.0, "hopper-medium-replay-v2": 103.1, "walker2d-medium-replay-v2": 96.8,
    "halfcheetah-medium-expert-v2": 99.1, "hopper-medium-expert-v2": 111.7, "walker2d-medium-expert-v2": 113.6,
    "antmaze-umaze-v0": 99.5, "antmaze-umaze-diverse-v0": 85.0, "antmaze-medium-play-v0": 85.8,
    "antmaze-medium-diverse-v0": 84.0, "antmaze-large-play-v0": 50.3, "antmaze-large-diverse-v0": 55.3,
}  # fmt: skip
PROTOCOL = "mean of the last five evaluations, 8 seeds, 10 episodes each"

B_MIN, B_MAX = 0.1, 10.0  # noise schedule
ETA_MIN, ETA_MAX = 0.001, 100.0
EPS = 1e-6


class EnsembleLinear(nn.Module):
    """n linear layers as one batched matmul: [n, B, d_in] -> [n, B, d_out]; Xavier by each member's own fans."""

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
        layers, width = [], obs_dim + action_dim
        for _ in range(3):
            layers += [EnsembleLinear(n, width, hidden), nn.Mish()]
            width = hidden
        self.net = nn.Sequential(*layers, EnsembleLinear(n, hidden, 1))

    def forward(self, obs, action):
        x = torch.cat([obs, action], dim=-1)
        return self.net(x.expand(self.n, *x.shape)).squeeze(-1)


class Actor(nn.Module):
    """Noise predictor eps: x_t [B, A], obs [B, S], t [B, 1] or, for all rows, [1, 1] -> [B, A]."""

    def __init__(self, obs_dim, action_dim, hidden, time_dim):
        super().__init__()
        self.register_buffer("freqs", torch.exp(-math.log(10_000) * torch.linspace(0, 1, time_dim // 2)))
        self.time = nn.Sequential(nn.Linear(time_dim, 2 * time_dim), nn.Mish(), nn.Linear(2 * time_dim, 2 * time_dim))
        layers, width = [], obs_dim + action_dim + 2 * time_dim
        for _ in range(3):
            layers += [nn.Linear(width, hidden), nn.Mish()]
            width = hidden
        self.net = nn.Sequential(*layers, nn.Linear(hidden, action_dim))
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
        alpha.append(math.exp(-B_MIN / steps - 0.5 * (B_MAX - B_MIN) * (2 * t - 1) / steps**2))
        alpha_bar.append(alpha_bar[-1] * alpha[-1])
    return alpha, alpha_bar


def denoise(net, obs, action_dim, steps, generator, clip=None):
    """One action for each row of obs [B, S] by `steps` denoising steps, each with noise of variance beta_t: [B, A].

    clip: largest absolute action, to which each prediction of x_0 is cut, or None.
    """
    alpha, alpha_bar = noise_schedule(steps)
    x = torch.randn(len(obs), action_dim, device=obs.device, generator=generator)
    for t in range(steps, 0, -1):
        noise = net(x, obs, torch.full((1, 1), float(t), device=obs.device))
        action = (x - math.sqrt(1 - alpha_bar[t]) * noise) / math.sqrt(alpha_bar[t])
        action = action if clip is None else action.clamp(-clip, clip)
        on_action = math.sqrt(alpha_bar[t - 1]) * (1 - alpha[t]) / (1 - alpha_bar[t])
        on_x = math.sqrt(alpha[t]) * (1 - alpha_bar[t - 1]) / (1 - alpha_bar[t])
        x = on_action * action + on_x * x
        if t > 1:
            x = x + math.sqrt(1 - alpha[t]) * torch.randn(x.shape, device=x.device, generator=generator)
    return x  # at t = 1 the two factors are 1 and 0


def lcb_target(q, reward, terminal, gamma, rho, max_q_backup=False):
    """y = r + gamma (1 - terminal) Q_LCB, Eq. 18: q [H, B, N] of the target critics at N next actions -> [B].

    Each critic is averaged (or maximised) over the next actions first; then comes mean - rho std over critics.
    """
    q = q.amax(-1) if max_q_backup else q.mean(-1)
    return reward + gamma * (1 - terminal) * (q.mean(0) - rho * q.std(0, correction=0))


def q_gradient(critic, obs, action, x):
    """g, Eq. 19, and its scale: the mean critic's gradient [B, A] at the noisy action x over mean |Q| at the data's."""
    with torch.no_grad():
        scale = critic(obs, action).abs().mean()
    x = x.detach().requires_grad_()
    return torch.autograd.grad(critic(obs, x).mean(0).sum(), x)[0] / (scale + EPS), scale


def denoising_loss(predicted, noise):
    """E |eps_theta - eps|^2, averaged over dimensions: the first term of Eq. 16 and what b bounds."""
    return ((predicted - noise) ** 2).mean()


def guidance_loss(predicted, gradient, weight):
    """E w g . eps_theta, averaged over dimensions: the second term of Eq. 16 (weight 1: hard guidance)."""
    return (weight * gradient * predicted).mean()


class DAC:
    """All that belongs to one seed: networks, optimisers, the update, and acting."""

    def __init__(self, args, data, seed):
        self.args, self.data = args, data
        device = torch.device(args.device)
        self.generator = torch.Generator(device).manual_seed(seed)
        self.metrics = Metrics()
        torch.manual_seed(seed)
        obs_dim, action_dim = data.obs_dim, data.action_dim
        self.max_action, self.clip = data.max_action, data.max_action if args.clip_denoised else None
        self.alpha_bar = torch.tensor(noise_schedule(args.diffusion_steps)[1], device=device)
        self.actor = Actor(obs_dim, action_dim, args.hidden, args.time_dim).to(device)
        self.actor_target = copy.deepcopy(self.actor).requires_grad_(False)
        self.critic = Critic(args.critics, obs_dim, action_dim, args.hidden).to(device)
        self.critic_target = copy.deepcopy(self.critic).requires_grad_(False)

        def adam(params, lr):
            lr = torch.tensor(lr, device=device)  # a tensor, so that a captured update sees it change
            return torch.optim.Adam(params, lr, fused=True, capturable=device.type == "cuda")

        self.actor_opt = adam(self.actor.parameters(), args.lr)
        self.critic_opt = adam(self.critic.parameters(), args.critic_lr)
        self.eta = torch.tensor(args.eta, device=device)
        self.step = torch.zeros((), device=device)  # updates done
        self.state = dict(
            actor=self.actor, actor_target=self.actor_target, actor_opt=self.actor_opt,
            critic=self.critic, critic_target=self.critic_target, critic_opt=self.critic_opt,
            eta=self.eta, step=self.step, generator=self.generator,
        )  # fmt: skip
        self.opts = [(self.actor_opt, args.lr), (self.critic_opt, args.critic_lr)]

    def update(self):
        """`actor_ema_every` iterations of Algorithm 1, the first of which moves the target actor."""
        for i in range(self.args.actor_ema_every):
            batch = self.data.sample(self.args.batch_size, self.generator)
            self.critic_step(batch)
            self.actor_step(batch)
            with torch.no_grad():
                if i == 0:
                    tau = self.args.tau * (self.step > self.args.actor_ema_start)  # a tensor: 0 until the start
                    for target, online in zip(self.actor_target.parameters(), self.actor.parameters()):
                        target.lerp_(online, tau)
                self.step += 1
                progress = self.step / (self.args.lr_decay_steps or self.args.steps)
                for opt, lr in self.opts:  # cosine to zero
                    opt.param_groups[0]["lr"].copy_(lr * 0.5 * (1 + torch.cos(math.pi * progress.clamp_max(1))))

    def critic_step(self, batch):
        n, k = len(batch.next_obs), self.args.next_samples
        with torch.no_grad():
            next_obs = batch.next_obs.repeat_interleave(k, dim=0)
            next_action = self.sample_actions(self.actor_target, next_obs, self.generator)
            next_q = self.critic_target(next_obs, next_action).view(-1, n, k)
            target = lcb_target(
                next_q, batch.reward, batch.terminal, self.args.gamma, self.args.rho, self.args.max_q_backup
            )
        q = self.critic(batch.obs, batch.action)
        critic_loss = ((q - target) ** 2).mean()  # Eq. 18
        self.critic_opt.zero_grad()
        critic_loss.backward()
        nn.utils.clip_grad_norm_(self.critic.parameters(), 1.0)
        self.critic_opt.step()
        with torch.no_grad():
            torch._foreach_lerp_(list(self.critic_target.parameters()), list(self.critic.parameters()), self.args.tau)
        self.metrics.add(critic_loss=critic_loss, q_std=q.std(0, correction=0).mean())

    def actor_step(self, batch):
        noise = torch.randn(batch.action.shape, device=batch.action.device, generator=self.generator)
        t = torch.randint(
            1, self.args.diffusion_steps + 1, (len(noise), 1), device=noise.device, generator=self.generator
        )
        alpha_bar = self.alpha_bar[t]
        x, weight = alpha_bar.sqrt() * batch.action + (1 - alpha_bar).sqrt() * noise, (1 - alpha_bar).sqrt()
        gradient, scale = q_gradient(self.critic_target, batch.obs, batch.action, x)  # Eq. 19
        predicted = self.actor(x, batch.obs, t)
        behavior_loss = denoising_loss(predicted, noise)
        if self.args.guidance == "denoised":
            action = self.sample_actions(self.actor, batch.obs, self.generator)
            q_loss = -self.critic_target(batch.obs, action).mean() / (scale + EPS)
        else:
            q_loss = guidance_loss(predicted, gradient, weight if self.args.guidance == "soft" else 1)
        actor_loss = self.eta * behavior_loss + self.args.guidance_scale * q_loss  # Eq. 16
        self.actor_opt.zero_grad()
        actor_loss.backward()
        nn.utils.clip_grad_norm_(self.actor.parameters(), 1.0)
        self.actor_opt.step()
        self.metrics.add(actor_loss=actor_loss, behavior_loss=behavior_loss, q_scale=scale,
                         q_gradient=gradient.abs().mean(), eta=self.eta)  # fmt: skip
        if self.args.eta_lr:
            with torch.no_grad():  # dual ascent, with the updated actor at the same noisy actions
                excess = denoising_loss(self.actor(x, batch.obs, t), noise) - self.args.bc_threshold
                self.eta.add_(self.args.eta_lr * excess.clamp(-1, 1)).clamp_(ETA_MIN, ETA_MAX)

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
        return best.clamp(-self.max_action, self.max_action)


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
    data.action.clamp_(-1 + 1e-5, 1 - 1e-5)
    return data


OPTIMUM = (0.4, -0.4)  # best action of the bandits


def bandit(name):
    """The 2-D bandits of the official code: one state, one step, a noisy reward that falls off around OPTIMUM."""
    generator = torch.Generator().manual_seed(0)
    shape = name.split("-")[1]
    if shape.endswith("gaussians"):
        two, three = ((-0.6, 0.6), (0.4, 0.2)), ((-0.6, 0.6), (0.4, 0.4), (-0.4, -0.4))
        centers, std = torch.tensor(two if shape == "2gaussians" else three), 0.1
    else:
        half, whole = torch.linspace(0, math.pi, 20)[:, None], torch.linspace(0, 2 * math.pi, 21)[:20, None]
        if shape == "moons":
            upper = torch.cat([half.cos(), half.sin()], 1)
            centers = torch.cat([upper, torch.tensor([1.0, 0.5]) - upper])
        else:
            circle = torch.cat([whole.cos(), whole.sin()], 1)
            centers = torch.cat([circle, 0.8 * circle])
        low, high = centers.amin(0), centers.amax(0)
        centers, std = 1.1 * (centers - low) / (high - low) + torch.tensor([-0.8, -0.2]), 0.05
    action = centers[torch.randint(len(centers), (10_000,), generator=generator)]
    action = (action + std * torch.randn(action.shape, generator=generator)).clamp(-1, 1)
    data = Dataset.bandit(name, action, lambda action: -(action - torch.tensor(OPTIMUM)).norm(dim=1))
    data.reward.add_(0.5 * torch.randn(len(data), generator=generator))
    return data


def draw_bandit(learner, data, path):
    """Actions of the policy (red) over the data, coloured by reward, contours of the mean critic, and the optimum."""
    obs = torch.zeros(500, 1, device=learner.generator.device)
    grid = torch.linspace(-1.5, 1.5, 61, device=obs.device)
    with torch.no_grad():
        action = learner.sample_actions(learner.actor, obs, torch.Generator(obs.device).manual_seed(0)).cpu()
        points = torch.cartesian_prod(grid, grid)
        q = learner.critic_target(obs[:1].expand(len(points), 1), points).mean(0).view(61, 61).T.cpu()

    def draw(axes):
        axes.scatter(*data.action.cpu().T, c=-(data.action.cpu() - torch.tensor(OPTIMUM)).norm(dim=1), s=2)
        axes.contour(grid.cpu(), grid.cpu(), q, colors="grey", linewidths=0.7)
        axes.scatter(*action.T, c="red", s=3, label="policy")
        axes.plot(*OPTIMUM, "k*", markersize=12, label="optimum")
        axes.set(title=f"{data.name}, {learner.args.guidance}", aspect="equal", xlim=(-1.5, 1.5), ylim=(-1.5, 1.5))
        axes.legend(loc="lower left", fontsize=8)

    save_figure(path, draw)


def main():
    args = parse_args(Args, PAPER | OURS, proportional=("actor_ema_start",), doc=__doc__)
    if args.evaluate:
        return evaluate_run(args, DAC)
    is_bandit = args.env in OURS and args.env.startswith("bandit-")
    judge = args.eval_episodes > 0
    data = bandit(args.env) if is_bandit else prepare(load_dataset(args.env, args.data_path, judge=judge))
    data = data.to(args.device)
    learners = [DAC(args, data, seed) for seed in args.seed]
    args.paper_score = PUBLISHED.get(args.env)
    run = Run(args, learners, data, __file__, PROTOCOL)
    update = capture(learners, "update")
    for _ in run.updates("update", args.steps, stride=args.actor_ema_every, evaluate=True):
        update()
    if is_bandit:
        for learner, folder in zip(learners, run.folders):
            draw_bandit(learner, data, folder / "bandit.png")
    run.finish()


if __name__ == "__main__":
    cli(main)
