"""Diffusion Trusted Q-Learning (DTQL)

Tianyu Chen, Zhendong Wang, Mingyuan Zhou: "Diffusion Policies Creating a Trust Region for Offline Reinforcement
Learning", NeurIPS 2024, arXiv:2405.19690.
Official code: github.com/TianyuCodings/Diffusion_Trusted_Q_Learning, commit 9a29cea.

    python dtql.py                              # built-in HalfCheetah data, minutes on a CPU core
    python dtql.py --env hopper-medium-v2       # the paper's run

A diffusion model mu of the behaviour policy is trained but never sampled: its denoising loss, taken at the action of a
one-step policy pi, says how far that action is from the data, and so draws a trust region in which pi climbs Q.

    behaviour  L(mu) = E w(sigma) |mu(a + sigma n, sigma | s) - a|^2,  a from the data     Eq. 2  denoising_loss
    value      L_V   = E |tau - 1(u < 0)| u^2,  u = min(Q1, Q2)(s, a) - V(s)               Eq. 6  expectile_loss
    critic     L_Q   = E (r + gamma V(s') - Q_i(s, a))^2                                   Eq. 7  critic_step
    trust      L_TR  = E w(sigma) |mu(a_pi + sigma n, sigma | s) - a_pi|^2,  a_pi ~ pi(s)  Eq. 4  denoising_loss
    actor      L_pi  = alpha L_TR - E min(Q1, Q2)(s, a_pi) - w_nll E log pi(a | s)         Eq. 5  actor_step
    ablation   L_KL  = KL(pi || mu), from a second diffusion model of pi's own actions     Eq. 8  kl_loss

Each iteration (Alg. 1, `update`): critic and value, behaviour, actor, target critic. The behaviour model and the
critics have a head start of 50,000 updates (`pretrain`). To act (App. D, `act`): draw 1024 actions from pi, pick one
with probability softmax(target Q). App. B: ln(sigma) in `sample_sigma`, c_skip, c_out, c_in, c_noise in `denoise`,
w = 1 / c_out^2. App. C: Alg. 2 is `pretrain`, `start_from_behavior`, `kl_loss`, and the fake model in `actor_step`.
Sec. 2.4: `nll_loss`. Eq. 1 is Eq. 2 without states, 10 is Eq. 4 in terms of noise and 11 its gradient, 12 is Eq. 8;
3 (the bound that L_TR maximises) and 9 (SDS, not used) only argue.

Differences between paper, official code and this file (which follows the code unless a flag is named):
 1. The paper sums the squared error of Eq. 2 and 4 over action dimensions; code and this file average. alpha in Table 4
    belongs to the average: for the sum use alpha divided by the number of dimensions.
 2. The code clamps the denoised action to the action box in both losses (not in the bandits): --no-clip-denoised.
 3. App. B prints c_in = 1 / (sigma^2 + sigma_data^2) and noise "a + n"; EDM and the code: 1 / sqrt(.) and a + sigma n.
 4. Eq. 7 prints gamma r and no terminal; code and this file use r + gamma (1 - terminal) V(s').
 5. The code's critic learns at 3e-4 on every dataset, whatever Table 4 says of the rest: --critic-lr.
 6. The likelihood term is the density of atanh(a / 1.001) before the tanh, without its Jacobian (constant in theta).
 7. V and the actor use the online critics; the target critic is read only to choose among the 1024 candidates. The
    head start trains V too, and leaves the target critic alone.
 8. The denoiser has five linear layers of which the first has no activation; Q has LayerNorm, V has not. The actor
    has three hidden layers and a head, orthogonal weights, and log std cut to [-5, 2].
 9. Learning-rate decay, where Table 4 says so, is a cosine to zero for all three optimisers after the head start.
10. AntMaze-v2 medium and large run 500,000 updates in Table 4, 300,000 to 400,000 in the code: the paper's here.
11. The code keeps an averaged actor that nothing reads, and resets the environment before every update: both dropped.
12. KL ablation: Alg. 2 freezes mu and has no Q; the code trains mu on and maximises Q, as here. Its generator calls
    the raw network at noise level 2.5 and leaves actions unbounded. |a - mu| in its weight is kept above 1e-8 here.
13. Bandits: the code takes all 10,000 points as one batch; here 512 are drawn per update (--batch-size 10000). Its
    weight is on Q, 5 for the trust region in swissroll-far and else 1: --alpha 0.2. Three of the five published
    pictures of the trust region are of seed 2.
14. Sec. 4.3 says that EDM breaks the condition of Theorem 1. So it is with EDM's log-normal sigma; with App. B's,
    as in the code and here, the condition holds: up to a constant L_TR = -2 E log p(a + sigma n), p the noised data.

To lift this file out: bring your own `load_dataset` (a `sample(batch_size, generator)` that returns the six fields of
`Batch`, and `obs_dim`, `action_dim`, `max_action`), `parse_args`, `Run`, `capture`, `Metrics`; the README has 20 lines.
"""

import copy
import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F

from common import Dataset, Metrics, Run, RunArgs, capture, cli, evaluate_run, load_dataset, parse_args, save_figure


@dataclass
class Args(RunArgs):
    # DTQL
    pretrain_steps: int = 50_000
    """Head start of behaviour model and critics, in updates."""
    gamma: float = 0.99
    """Discount."""
    lr: float = 3e-4
    """Learning rate of behaviour model and actor (Table 4)."""
    critic_lr: float = 3e-4
    """Learning rate of Q and V."""
    lr_decay: bool = False
    """Cosine decay of all learning rates to zero over --steps (Table 4)."""
    tau: float = 0.005
    """Rate of the target critic."""
    expectile: float = 0.7
    """tau in Eq. 6."""
    alpha: float = 5.0
    """Weight of the trust region, Eq. 5."""
    nll_weight: float = 0.0
    """w_nll, weight of the likelihood of the data's actions, Sec. 2.4."""
    behavior_reg: Literal["tr", "kl"] = "tr"
    """Trust region (Eq. 4) or Kullback-Leibler divergence (Eq. 8, App. C)."""
    clip_denoised: bool = True
    """Clamp denoised actions to the action box in the diffusion losses."""
    hidden: int = 256
    """Width of critics and actor."""
    behavior_hidden: int = 256
    """Width of the diffusion networks."""
    time_dim: int = 16
    """Size of the noise-level embedding."""
    candidates: int = 1024
    """Actions to choose from when acting (N in Sec. 4)."""
    eval_select: Literal["softmax", "argmax"] = "softmax"
    """Choice among candidates by their target Q."""
    reward_offset: float = 0.0
    """Added to every reward (AntMaze: -1)."""


def table4(lr, alpha, expectile, nll_weight, lr_decay, epochs, batch_size=256, **more):
    return dict(lr=lr, alpha=alpha, expectile=expectile, nll_weight=nll_weight, lr_decay=lr_decay, steps=1000 * epochs,
                batch_size=batch_size, **more)  # fmt: skip


MAZE = dict(batch_size=2048, reward_offset=-1.0, eval_episodes=100)
PAPER = {  # Table 4 (batch sizes from the official code); epochs of 1000 updates
    "halfcheetah-medium-v2": table4(3e-4, 1, 0.7, 0, False, 1000),
    "halfcheetah-medium-replay-v2": table4(3e-4, 5, 0.7, 0, False, 1000),
    "halfcheetah-medium-expert-v2": table4(3e-4, 50, 0.7, 0, False, 1000),
    "hopper-medium-v2": table4(1e-4, 5, 0.7, 0, True, 1000),
    "hopper-medium-replay-v2": table4(3e-4, 5, 0.7, 0, False, 1000),
    "hopper-medium-expert-v2": table4(3e-4, 20, 0.7, 0, False, 1000),
    "walker2d-medium-v2": table4(3e-4, 5, 0.7, 0, True, 1000),
    "walker2d-medium-replay-v2": table4(3e-4, 5, 0.7, 0, True, 1000),
    "walker2d-medium-expert-v2": table4(3e-4, 5, 0.7, 0, True, 1000),
    "antmaze-umaze-v0": table4(3e-4, 1, 0.9, 1, False, 500, **MAZE),
    "antmaze-umaze-diverse-v0": table4(3e-5, 1, 0.9, 1, True, 500, **MAZE),
    "antmaze-medium-play-v0": table4(3e-4, 1, 0.9, 1, False, 400, **MAZE),
    "antmaze-medium-diverse-v0": table4(3e-4, 1, 0.9, 1, False, 400, **MAZE),
    "antmaze-large-play-v0": table4(3e-4, 1, 0.9, 1, False, 350, **MAZE),
    "antmaze-large-diverse-v0": table4(3e-4, 0.5, 0.9, 1, False, 300, **MAZE),
    "antmaze-umaze-v2": table4(3e-4, 1, 0.9, 1, False, 500, **MAZE),
    "antmaze-umaze-diverse-v2": table4(3e-5, 1, 0.9, 1, True, 500, **MAZE),
    "antmaze-medium-play-v2": table4(3e-4, 1, 0.9, 1, False, 500, **MAZE),
    "antmaze-medium-diverse-v2": table4(3e-4, 1, 0.9, 1, False, 500, **MAZE),
    "antmaze-large-play-v2": table4(3e-4, 1, 0.9, 1, False, 500, **MAZE),
    "antmaze-large-diverse-v2": table4(3e-4, 0.5, 0.9, 1, False, 500, **MAZE),
    "pen-human-v1": table4(3e-5, 1500, 0.9, 0, True, 300, eval_episodes=100),
    "pen-cloned-v1": table4(1e-5, 1500, 0.7, 0, False, 200, eval_episodes=100),
    "kitchen-complete-v0": table4(1e-4, 200, 0.7, 0, True, 500, eval_episodes=100),
    "kitchen-partial-v0": table4(1e-4, 100, 0.7, 0, True, 1000, eval_episodes=100),
    "kitchen-mixed-v0": table4(3e-4, 200, 0.7, 0, True, 500, eval_episodes=100),
}
DEMO = dict(hidden=64, behavior_hidden=64, candidates=64, batch_size=128, eval_every=2_000, log_every=500,
            alpha=20.0, expectile=0.9, lr_decay=True)  # fmt: skip
BANDIT = dict(steps=3_500, pretrain_steps=0, batch_size=512, lr=3e-3, critic_lr=3e-3, expectile=0.95, alpha=1.0,
              clip_denoised=False, behavior_hidden=128, time_dim=4, eval_every=500, log_every=100)  # fmt: skip
OURS = {  # settings of this project: built-in data on two CPU cores, and the paper's bandits (Sec. 3, App. F.1)
    "halfcheetah-demo-medium-replay": DEMO | dict(steps=16_000, pretrain_steps=2_000),
    "pendulum-demo-medium": DEMO
    | dict(steps=4_000, pretrain_steps=500, eval_every=1_000, alpha=5.0, gamma=0.95, lr=1e-3, critic_lr=1e-3),
    **{f"bandit-25gaussians-{reward}": BANDIT for reward in ("far", "near", "hard", "same")},
    **{f"bandit-swissroll-{reward}": BANDIT for reward in ("far", "near", "same")},
}
PUBLISHED = {  # Table 1; AntMaze-v2: Table 6
    "halfcheetah-medium-v2": 57.9, "hopper-medium-v2": 99.6, "walker2d-medium-v2": 89.4,
    "halfcheetah-medium-replay-v2": 50.9, "hopper-medium-replay-v2": 100.0, "walker2d-medium-replay-v2": 88.5,
    "halfcheetah-medium-expert-v2": 92.7, "hopper-medium-expert-v2": 109.3, "walker2d-medium-expert-v2": 110.0,
    "antmaze-umaze-v0": 94.8, "antmaze-umaze-diverse-v0": 78.8, "antmaze-medium-play-v0": 79.6,
    "antmaze-medium-diverse-v0": 82.2, "antmaze-large-play-v0": 52.0, "antmaze-large-diverse-v0": 54.0,
    "antmaze-umaze-v2": 92.6, "antmaze-umaze-diverse-v2": 74.4, "antmaze-medium-play-v2": 76.0,
    "antmaze-medium-diverse-v2": 80.6, "antmaze-large-play-v2": 59.2, "antmaze-large-diverse-v2": 62.0,
    "pen-human-v1": 64.1, "pen-cloned-v1": 81.3,
    "kitchen-complete-v0": 80.8, "kitchen-partial-v0": 74.4, "kitchen-mixed-v0": 60.2,
}  # fmt: skip
PROTOCOL = "last evaluation, 5 seeds, 10 episodes each for MuJoCo and 100 elsewhere"

# EDM noise levels (Karras et al. 2022; App. B)
SIGMA_DATA, SIGMA_MIN, SIGMA_MAX = 0.5, 0.002, 80.0


class EnsembleLinear(nn.Module):
    """n linear layers as one batched matmul: [n, B, d_in] -> [n, B, d_out], initialised like nn.Linear."""

    def __init__(self, n, d_in, d_out):
        super().__init__()
        bound = d_in**-0.5
        self.weight = nn.Parameter(torch.empty(n, d_in, d_out).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(n, 1, d_out).uniform_(-bound, bound))

    def forward(self, x):
        return torch.baddbmm(self.bias, x, self.weight)


class EnsembleLayerNorm(nn.Module):
    """LayerNorm with a gain and an offset per member: [n, B, d] -> [n, B, d]."""

    def __init__(self, n, d):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n, 1, d))
        self.bias = nn.Parameter(torch.zeros(n, 1, d))

    def forward(self, x):
        return torch.addcmul(self.bias, F.layer_norm(x, x.shape[-1:]), self.weight)


class Critic(nn.Module):
    """Q1 and Q2: obs [B, S], action [B, A] -> [2, B]."""

    def __init__(self, obs_dim, action_dim, hidden):
        super().__init__()
        layers, width = [], obs_dim + action_dim
        for _ in range(3):
            layers += [EnsembleLinear(2, width, hidden), EnsembleLayerNorm(2, hidden), nn.Mish()]
            width = hidden
        self.net = nn.Sequential(*layers, EnsembleLinear(2, hidden, 1))

    def forward(self, obs, action):
        x = torch.cat([obs, action], dim=-1)
        return self.net(x.expand(2, *x.shape)).squeeze(-1)


class Value(nn.Module):
    """V: obs [B, S] -> [B]."""

    def __init__(self, obs_dim, hidden):
        super().__init__()
        layers, width = [], obs_dim
        for _ in range(3):
            layers += [nn.Linear(width, hidden), nn.Mish()]
            width = hidden
        self.net = nn.Sequential(*layers, nn.Linear(hidden, 1))

    def forward(self, obs):
        return self.net(obs).squeeze(-1)


class Actor(nn.Module):
    """One-step policy pi, a tanh-Gaussian: obs [B, S] -> mean [B, A], log_std [B, A] before the tanh."""

    def __init__(self, obs_dim, action_dim, hidden):
        super().__init__()
        layers, width = [], obs_dim
        for _ in range(3):
            layers += [nn.Linear(width, hidden), nn.ReLU()]
            width = hidden
        self.net = nn.Sequential(*layers, nn.Linear(hidden, 2 * action_dim))
        for layer in self.net:
            if isinstance(layer, nn.Linear):
                nn.init.orthogonal_(layer.weight)
                nn.init.zeros_(layer.bias)

    def forward(self, obs):
        mean, log_std = self.net(obs).chunk(2, dim=-1)
        return mean, log_std.clamp(-5, 2)


class Denoiser(nn.Module):
    """Raw network F of the diffusion model: x [B, A], obs [B, S], noise level [B, 1] -> [B, A]."""

    def __init__(self, obs_dim, action_dim, hidden, time_dim):
        super().__init__()
        self.register_buffer("freqs", torch.exp(-math.log(10_000) * torch.linspace(0, 1, time_dim // 2)))
        self.time = nn.Sequential(nn.Linear(time_dim, 2 * time_dim), nn.Mish(), nn.Linear(2 * time_dim, time_dim))
        self.net = nn.Sequential(
            nn.Linear(action_dim + obs_dim + time_dim, hidden),  # no activation here (difference 8)
            nn.Linear(hidden, hidden), nn.Mish(),
            nn.Linear(hidden, hidden), nn.Mish(),
            nn.Linear(hidden, hidden), nn.Mish(),
            nn.Linear(hidden, action_dim),
        )  # fmt: skip

    def forward(self, x, obs, level):
        angle = level * self.freqs
        time = self.time(torch.cat([angle.sin(), angle.cos()], dim=-1))
        return self.net(torch.cat([x, obs, time], dim=-1))


def sample_sigma(batch_size, generator):
    """Noise levels [B, 1]: ln(sigma) ~ Logistic(ln sigma_data, 1/2) cut to [sigma_min, sigma_max] (App. B).

    With scale 1/2 its distribution function is 1 - c_skip(sigma), so a uniform c_skip gives sigma in closed form.
    """
    low, high = (SIGMA_DATA**2 / (sigma**2 + SIGMA_DATA**2) for sigma in (SIGMA_MAX, SIGMA_MIN))
    u = torch.rand(batch_size, 1, dtype=torch.float64, device=generator.device, generator=generator)
    u = low + (high - low) * u
    return (SIGMA_DATA * ((1 - u) / u).sqrt()).float()


def denoise(net, x, sigma, obs, clip=None):
    """D(x, sigma | s) = c_skip x + c_out F(c_in x, s, ln(sigma) / 4), App. B; clip: largest absolute action or None."""
    total = sigma**2 + SIGMA_DATA**2
    c_skip, c_out, c_in = SIGMA_DATA**2 / total, sigma * SIGMA_DATA / total.sqrt(), total.rsqrt()
    denoised = c_skip * x + c_out * net(c_in * x, obs, sigma.log() / 4)
    return denoised if clip is None else denoised.clamp(-clip, clip)


def denoising_loss(net, obs, action, generator, clip=None):
    """mean |D(a + sigma n, sigma | s) - a|^2 / c_out^2: Eq. 2 at the data's actions, Eq. 4 at the policy's.

    Gradients reach `action` both as the point that is noised and as the target (Eq. 11, unlike SDS and SRPO).
    """
    sigma = sample_sigma(len(action), generator)
    noise = torch.randn(action.shape, device=action.device, generator=generator)
    c_out = sigma * SIGMA_DATA / (sigma**2 + SIGMA_DATA**2).sqrt()
    return (((denoise(net, action + sigma * noise, sigma, obs, clip) - action) / c_out) ** 2).mean()


def kl_loss(real, fake, obs, action, generator, clip=None):
    """Eq. 8 as a surrogate: its gradient in `action` is (D_fake - D_real) / |a - D_real|_1 at a shared noisy point."""
    sigma = sample_sigma(len(action), generator)
    noisy = action + sigma * torch.randn(action.shape, device=action.device, generator=generator)
    with torch.no_grad():
        real, fake = denoise(real, noisy, sigma, obs, clip), denoise(fake, noisy, sigma, obs, clip)
        weight = (action - real).abs().mean(dim=-1, keepdim=True).clamp_min(1e-8)
        target = action - (fake - real) / weight
    return 0.5 * ((action - target) ** 2).mean()


def expectile_loss(u, expectile):
    """L2^tau(u) = |tau - 1(u < 0)| u^2, Eq. 6."""
    return (torch.where(u < 0, 1 - expectile, expectile) * u**2).mean()


class DTQL:
    """All that belongs to one seed: networks, optimisers, the updates of both phases, and acting."""

    def __init__(self, args, data, seed):
        self.args, self.data = args, data
        device = torch.device(args.device)
        self.generator = torch.Generator(device).manual_seed(seed)
        self.metrics = Metrics()
        torch.manual_seed(seed)
        obs_dim, action_dim = data.obs_dim, data.action_dim
        self.max_action, self.clip = data.max_action, data.max_action if args.clip_denoised else None
        self.critic = Critic(obs_dim, action_dim, args.hidden).to(device)
        self.value = Value(obs_dim, args.hidden).to(device)
        self.critic_target = copy.deepcopy(self.critic).requires_grad_(False)
        self.behavior = Denoiser(obs_dim, action_dim, args.behavior_hidden, args.time_dim).to(device)
        if args.behavior_reg == "kl":  # the actor is a network of the same shape, called once (App. C)
            self.actor = Denoiser(obs_dim, action_dim, args.behavior_hidden, args.time_dim).to(device)
            self.fake = Denoiser(obs_dim, action_dim, args.behavior_hidden, args.time_dim).to(device)
        else:
            self.actor = Actor(obs_dim, action_dim, args.hidden).to(device)

        def adam(params, lr):
            lr = torch.tensor(lr, device=device)  # a tensor, so that a captured update sees it change
            return torch.optim.Adam(params, lr, fused=True, capturable=device.type == "cuda")

        self.critic_opt = adam([*self.critic.parameters(), *self.value.parameters()], args.critic_lr)
        self.behavior_opt = adam(self.behavior.parameters(), args.lr)
        self.actor_opt = adam(self.actor.parameters(), args.lr)
        self.step = torch.zeros((), device=device)  # updates of the second phase
        self.state = dict(
            critic=self.critic, value=self.value, critic_target=self.critic_target, critic_opt=self.critic_opt,
            behavior=self.behavior, behavior_opt=self.behavior_opt, actor=self.actor, actor_opt=self.actor_opt,
            step=self.step, generator=self.generator,
        )  # fmt: skip
        self.opts = [(self.critic_opt, args.critic_lr), (self.behavior_opt, args.lr), (self.actor_opt, args.lr)]
        if args.behavior_reg == "kl":
            self.fake_opt = adam(self.fake.parameters(), args.lr)
            self.state |= dict(fake=self.fake, fake_opt=self.fake_opt)
            self.opts.append((self.fake_opt, args.lr))

    def pretrain(self):
        """One update of the head start: behaviour model, then critics."""
        batch = self.data.sample(self.args.batch_size, self.generator)
        self.behavior_step(batch)
        self.critic_step(batch)

    def update(self):
        """One iteration of Algorithm 1."""
        batch = self.data.sample(self.args.batch_size, self.generator)
        self.critic_step(batch)
        self.behavior_step(batch)
        self.actor_step(batch)
        with torch.no_grad():
            torch._foreach_lerp_(list(self.critic_target.parameters()), list(self.critic.parameters()), self.args.tau)
            self.step += 1
            if self.args.lr_decay:
                for opt, lr in self.opts:  # cosine to zero over `steps` updates
                    opt.param_groups[0]["lr"].copy_(lr * 0.5 * (1 + torch.cos(math.pi * self.step / self.args.steps)))

    def critic_step(self, batch):
        q = self.critic(batch.obs, batch.action)
        value_loss = expectile_loss(q.detach().amin(0) - self.value(batch.obs), self.args.expectile)  # Eq. 6
        with torch.no_grad():
            target = batch.reward + self.args.gamma * (1 - batch.terminal) * self.value(batch.next_obs)
        critic_loss = ((q - target) ** 2).mean(1).sum()  # Eq. 7
        self.critic_opt.zero_grad()
        (value_loss + critic_loss).backward()
        self.critic_opt.step()
        self.metrics.add(critic_loss=critic_loss, value_loss=value_loss, q=q.mean())

    def behavior_step(self, batch):
        behavior_loss = denoising_loss(self.behavior, batch.obs, batch.action, self.generator, self.clip)  # Eq. 2
        self.behavior_opt.zero_grad()
        behavior_loss.backward()
        self.behavior_opt.step()
        self.metrics.add(behavior_loss=behavior_loss)

    def actor_step(self, batch):
        action = self.sample_actions(batch.obs, self.generator)
        if self.args.behavior_reg == "kl":
            trust_loss = kl_loss(self.behavior, self.fake, batch.obs, action, self.generator, self.clip)  # Eq. 8
        else:
            trust_loss = denoising_loss(self.behavior, batch.obs, action, self.generator, self.clip)  # Eq. 4
        q = self.critic(batch.obs, action).amin(0)
        actor_loss = self.args.alpha * trust_loss - q.mean()  # Eq. 5
        if self.args.nll_weight:
            actor_loss = actor_loss + self.args.nll_weight * self.nll_loss(batch)
        self.actor_opt.zero_grad()
        actor_loss.backward(inputs=list(self.actor.parameters()))  # behaviour model and critics stay as they are
        self.actor_opt.step()
        self.metrics.add(actor_loss=actor_loss, trust_loss=trust_loss, actor_q=q.mean())
        if self.args.behavior_reg == "kl":
            fake_loss = denoising_loss(self.fake, batch.obs, action.detach(), self.generator, self.clip)
            self.fake_opt.zero_grad()
            fake_loss.backward()
            self.fake_opt.step()
            self.metrics.add(fake_loss=fake_loss)

    def nll_loss(self, batch):
        """-E log N(atanh(a / 1.001) | mean, std), summed over action dimensions (Sec. 2.4, difference 6)."""
        mean, log_std = self.actor(batch.obs)
        pre_tanh = torch.atanh(batch.action / (self.max_action + 1e-3))
        log_prob = -0.5 * ((pre_tanh - mean) / log_std.exp()) ** 2 - log_std - 0.5 * math.log(2 * math.pi)
        return -log_prob.sum(-1).mean()

    def sample_actions(self, obs, generator):
        """One action of pi for each row of obs, with gradient: [B, S] -> [B, A]."""
        if self.args.behavior_reg == "kl":
            noise = torch.randn(len(obs), self.data.action_dim, device=obs.device, generator=generator)
            return self.actor(2.5 * noise, obs, torch.full_like(noise[:, :1], 2.5))
        mean, log_std = self.actor(obs)
        noise = torch.randn(mean.shape, device=obs.device, generator=generator)
        return self.max_action * torch.tanh(mean + log_std.exp() * noise)

    def act(self, obs, generator):
        """Draw candidates from pi, choose one by the target critic: [n, S] -> [n, A]."""
        n, k = len(obs), self.args.candidates
        obs = obs.repeat_interleave(k, dim=0)
        action = self.sample_actions(obs, generator)
        q = self.critic_target(obs, action).amin(0).view(n, k)
        if self.args.eval_select == "softmax":  # a Gumbel draw: argmax of q - log(exponential)
            q = q - torch.empty_like(q).exponential_(generator=generator).log()
        return action.view(n, k, -1)[torch.arange(n, device=obs.device), q.argmax(1)]

    def start_from_behavior(self):
        """KL ablation: after the head start, generator and fake model begin as copies of the behaviour model."""
        self.actor.load_state_dict(self.behavior.state_dict())
        self.fake.load_state_dict(self.behavior.state_dict())


def bandit(name):
    """The 2-D bandits of Sec. 3 and App. F.1: one state, 10,000 actions, a reward that depends on the radius."""
    generator = torch.Generator().manual_seed(0)
    _, shape, kind = name.split("-")
    if shape == "25gaussians":
        grid = torch.linspace(-10, 10, 5)
        action = torch.cartesian_prod(grid, grid).repeat_interleave(400, 0)
        action = action + 0.3 * torch.randn(action.shape, generator=generator)
    else:
        t = 1.5 * math.pi * (1 + 2 * torch.rand(10_000, 1, generator=generator))
        action = t * torch.cat([t.cos(), t.sin()], 1) + 0.1 * torch.randn(10_000, 2, generator=generator)
    largest = action.norm(dim=1).max()

    def reward(action):
        radius = action.norm(dim=1)
        if kind == "near":
            return largest - radius
        corner = (action[:, 0] < -7.5) & (action[:, 1] > 7.5) & (kind == "hard")
        return 0 * radius if kind == "same" else torch.where(corner, 2 * radius, radius)

    # one state that leads to itself and never ends, as in the official code
    return Dataset.bandit(name, action, reward, terminal=False)


def draw_bandit(learner, data, path):
    """Actions of pi (red) over the data, coloured by reward."""
    obs = torch.zeros(1000, 1, device=learner.generator.device)
    with torch.no_grad():
        action = learner.sample_actions(obs, torch.Generator(obs.device).manual_seed(0)).cpu()

    def draw(axes):
        axes.scatter(*data.action.cpu().T, c=data.reward.cpu(), s=2, cmap="viridis")
        axes.scatter(*action.T, c="red", s=2)
        axes.set(title=f"{data.name}, {learner.args.behavior_reg}", aspect="equal")

    save_figure(path, draw)


def main():
    args = parse_args(Args, PAPER | OURS, proportional=("pretrain_steps",), doc=__doc__)
    if args.evaluate:
        return evaluate_run(args, DTQL)
    is_bandit = args.env in OURS and args.env.startswith("bandit-")
    data = bandit(args.env) if is_bandit else load_dataset(args.env, args.data_path)
    data.reward.add_(args.reward_offset)
    data = data.to(args.device)
    learners = [DTQL(args, data, seed) for seed in args.seed]
    args.paper_score = PUBLISHED.get(args.env)
    run = Run(args, learners, data, __file__, PROTOCOL)

    def at_end():
        if args.behavior_reg == "kl" and args.pretrain_steps:
            for learner in learners:
                learner.start_from_behavior()

    update = capture(learners, "pretrain")
    for _ in run.updates("pretrain", args.pretrain_steps, at_end=at_end):
        update()
    update = capture(learners, "update")
    for _ in run.updates("update", args.steps, evaluate=True):
        update()
    if is_bandit:
        for learner, folder in zip(learners, run.folders):
            draw_bandit(learner, data, folder / "bandit.png")
    run.finish()


if __name__ == "__main__":
    cli(main)
