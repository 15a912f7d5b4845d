"""Diffusion Trusted Q-Learning (DTQL)

Tianyu Chen, Zhendong Wang, Mingyuan Zhou: "Diffusion Policies Creating a Trust Region for Offline Reinforcement
Learning", NeurIPS 2024, arXiv:2405.19690.
Official code: github.com/TianyuCodings/Diffusion_Trusted_Q_Learning, commit 9a29cea.

    python dtql.py                                # built-in HalfCheetah data, minutes on a CPU core
    python dtql.py --env hopper-medium-v2         # the paper's run
    python dtql.py --env bandit-25gaussians-far   # the paper's 2-D example; result: bandit.png

A diffusion model mu of the behaviour policy is trained but never sampled: its denoising loss, taken at the action of a
one-step policy pi, says how far that action is from the data, and so draws a trust region in which pi climbs Q.

    behaviour  L(mu) = E w(sigma) |mu(a + sigma n, sigma | s) - a|^2,  a from the data     Eq. 2  denoising_loss
    value      L_V   = E |tau - 1(u < 0)| u^2,  u = min(Q1, Q2)(s, a) - V(s)               Eq. 6  expectile_loss
    critic     L_Q   = E (r + gamma V(s') - Q_i(s, a))^2                                   Eq. 7  critic_step
    trust      L_TR  = E w(sigma) |mu(a_pi + sigma n, sigma | s) - a_pi|^2,  a_pi ~ pi(s)  Eq. 4  denoising_loss
    actor      L_pi  = alpha L_TR - E min(Q1, Q2)(s, a_pi) - w_nll E log pi(a | s)         Eq. 5  actor_step
    ablation   L_KL  = KL(pi || mu), from a second diffusion model of pi's own actions     Eq. 8  kl_loss

    App. D       50,000 times: behaviour, critic and value                                 pretrain
    Algorithm 1  then: critic and value, behaviour, actor, target critic                   update
    App. B       sigma; c_skip, c_out, c_in, c_noise; w = 1 / c_out^2                      sample_sigma, denoise
    App. C       Algorithm 2: the ablation                                                 DTQLKL
    App. D       to act: 1024 actions of pi, one with probability softmax(target Q)        act

Eq. 1 is Eq. 2 without states, 10 is Eq. 4 in terms of noise and 11 its gradient, 12 is Eq. 8; 3 (the bound that a small
L_TR raises) and 9 (SDS, not used) only argue.

    The paper (P) or its code (C)                           This file, which follows C where nothing else is said
 1. P: Eq. 2 and 4 sum over action dimensions               the mean, to which Table 4's alpha belongs (P's sum:
                                                            --alpha times the number of dimensions)
 2. C: denoised actions clamped to the action box, except   --no-clip-denoised
    in bandits
 3. P: c_in = 1 / (sigma^2 + sigma_data^2), noise a + n     1 / sqrt(.) and a + sigma n, as in EDM
 4. P: Eq. 7 has gamma r and no terminal                    r + gamma (1 - terminal) V(s')
 5. P: Table 4 has one learning rate for each dataset       the critic's is 3e-4 on all of them: --critic-lr
 6. P: log pi(a | s)                                        of atanh(a / 1.001), without the tanh's Jacobian, which
                                                            theta cannot change
 7. P: Alg. 1's target critics stand in no equation         they choose among the 1024; V and actor read the online ones
                                                            (Eq. 5, 6). In `pretrain` they rest, and V learns too
 8. P: "4-layer" denoiser, "3-layer" actor                  5 linear layers, the first without activation; 3 hidden
                                                            layers, orthogonal; log std in [-5, 2]; LayerNorm in Q only
 9. P: which datasets decay the learning rate, not how      cosine to zero, all optimisers, from `update` on
10. C: 300,000 to 400,000 updates on AntMaze-v2's medium    500,000, as in Table 4
    and large
11. C: an averaged actor that nothing reads; env.reset()    neither
    before each update
12. P: Alg. 2 freezes mu and has no Q                       mu trains on, Q is maximised; the generator is the raw net
                                                            at noise level 2.5, actions unbounded. Not as in C: |a - mu|
                                                            in the weight is kept above 1e-8
13. C: bandits take all 10,000 points as one batch, 256     512 drawn, 64 wide (--batch-size 10000 --hidden 256); in
    wide, and weigh Q by 5 in swissroll-far (trust region   swissroll-far alpha is 0.2 (with kl as in C: --alpha 1).
    only)                                                   Three of P's five pictures of the trust region are of seed 2
14. P: Sec. 4.3: EDM breaks the condition of Theorem 1      App. B's sigma (not EDM's log-normal one) meets it: L_TR =
                                                            -(2 / A) E log p(a + sigma n) + const, p the noised data,
                                                            A action dimensions, for an exact mu, unclamped

To lift this file out: bring `RunArgs`, `Metrics` and your data: `sample(batch_size, generator)` gives obs, action,
reward, next_obs and terminal; `obs_dim`, `action_dim`, `max_action`. Write your own loop in place of `main`; see
tests/lifted.
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
    at_least,
    at_most,
    capture,
    cli,
    evaluate_run,
    load_dataset,
    offset_rewards,
    parse_args,
    useless,
)


@dataclass
class Args(RunArgs):
    # DTQL
    pretrain_steps: int = 50_000  # Head start of behaviour model and critics, in updates
    gamma: float = 0.99  # Discount
    behavior_lr: float = 3e-4  # Learning rate of the diffusion models (Table 4)
    critic_lr: float = 3e-4  # Learning rate of Q and V
    actor_lr: float = 3e-4  # Learning rate of the actor (Table 4)
    lr_decay: bool = False  # Cosine decay of all learning rates to zero over --steps (Table 4)
    tau: float = 0.005  # Rate of the target critic
    expectile: float = 0.7  # tau in Eq. 6
    alpha: float = 5.0  # Weight of the trust region, Eq. 5
    nll_weight: float = 0.0  # w_nll, weight of the likelihood of the data's actions, Sec. 2.4
    behavior_reg: Literal["tr", "kl"] = "tr"  # Trust region (Eq. 4) or Kullback-Leibler divergence (Eq. 8, App. C)
    clip_denoised: bool = True  # Clamp denoised actions to the action box in the diffusion losses
    hidden: int = 256  # Width of critics and actor (kl: of critics)
    behavior_hidden: int = 256  # Width of the diffusion networks (kl: also of the actor)
    time_dim: int = 16  # Size of the noise-level embedding
    candidates: int = 1024  # Actions to choose from when acting (N in App. D)
    eval_select: Literal["softmax", "argmax"] = "softmax"  # Choice among candidates by their target Q
    reward_offset: float = 0.0  # Added to every reward (AntMaze: -1, unless rewards are 0 and -1 already)


def table4(lr, alpha, expectile, nll_weight, lr_decay, epochs, score, **more):
    return dict(behavior_lr=lr, actor_lr=lr, alpha=alpha, expectile=expectile, nll_weight=nll_weight,
                lr_decay=lr_decay, steps=1000 * epochs, paper_score=score, **more)  # fmt: skip


MAZE = dict(batch_size=2048, reward_offset=-1.0, eval_episodes=100)  # batch size: official code
HUNDRED = dict(eval_episodes=100)
PAPER = {  # Table 4: lr, alpha, expectile, w_nll, lr decay, epochs of 1000 updates; Table 1 (AntMaze-v2: 6): score
    "halfcheetah-medium-v2": table4(3e-4, 1, 0.7, 0, False, 1000, 57.9),
    "halfcheetah-medium-replay-v2": table4(3e-4, 5, 0.7, 0, False, 1000, 50.9),
    "halfcheetah-medium-expert-v2": table4(3e-4, 50, 0.7, 0, False, 1000, 92.7),
    "hopper-medium-v2": table4(1e-4, 5, 0.7, 0, True, 1000, 99.6),
    "hopper-medium-replay-v2": table4(3e-4, 5, 0.7, 0, False, 1000, 100.0),
    "hopper-medium-expert-v2": table4(3e-4, 20, 0.7, 0, False, 1000, 109.3),
    "walker2d-medium-v2": table4(3e-4, 5, 0.7, 0, True, 1000, 89.4),
    "walker2d-medium-replay-v2": table4(3e-4, 5, 0.7, 0, True, 1000, 88.5),
    "walker2d-medium-expert-v2": table4(3e-4, 5, 0.7, 0, True, 1000, 110.0),
    "antmaze-umaze-v0": table4(3e-4, 1, 0.9, 1, False, 500, 94.8, **MAZE),
    "antmaze-umaze-diverse-v0": table4(3e-5, 1, 0.9, 1, True, 500, 78.8, **MAZE),
    "antmaze-medium-play-v0": table4(3e-4, 1, 0.9, 1, False, 400, 79.6, **MAZE),
    "antmaze-medium-diverse-v0": table4(3e-4, 1, 0.9, 1, False, 400, 82.2, **MAZE),
    "antmaze-large-play-v0": table4(3e-4, 1, 0.9, 1, False, 350, 52.0, **MAZE),
    "antmaze-large-diverse-v0": table4(3e-4, 0.5, 0.9, 1, False, 300, 54.0, **MAZE),
    "antmaze-umaze-v2": table4(3e-4, 1, 0.9, 1, False, 500, 92.6, **MAZE),
    "antmaze-umaze-diverse-v2": table4(3e-5, 1, 0.9, 1, True, 500, 74.4, **MAZE),
    "antmaze-medium-play-v2": table4(3e-4, 1, 0.9, 1, False, 500, 76.0, **MAZE),
    "antmaze-medium-diverse-v2": table4(3e-4, 1, 0.9, 1, False, 500, 80.6, **MAZE),
    "antmaze-large-play-v2": table4(3e-4, 1, 0.9, 1, False, 500, 59.2, **MAZE),
    "antmaze-large-diverse-v2": table4(3e-4, 0.5, 0.9, 1, False, 500, 62.0, **MAZE),
    "pen-human-v1": table4(3e-5, 1500, 0.9, 0, True, 300, 64.1, **HUNDRED),
    "pen-cloned-v1": table4(1e-5, 1500, 0.7, 0, False, 200, 81.3, **HUNDRED),
    "kitchen-complete-v0": table4(1e-4, 200, 0.7, 0, True, 500, 80.8, **HUNDRED),
    "kitchen-partial-v0": table4(1e-4, 100, 0.7, 0, True, 1000, 74.4, **HUNDRED),
    "kitchen-mixed-v0": table4(3e-4, 200, 0.7, 0, True, 500, 60.2, **HUNDRED),
}
KL_SCORES = {"halfcheetah-medium-v2": 24.1, "hopper-medium-v2": 15.0, "walker2d-medium-v2": 3.4}  # Table 5
DEMO = dict(hidden=64, behavior_hidden=64, candidates=64, batch_size=128, eval_every=2_000, log_every=500,
            alpha=20.0, expectile=0.9, lr_decay=True)  # fmt: skip
BANDIT = dict(steps=3_500, pretrain_steps=0, batch_size=512, behavior_lr=3e-3, actor_lr=3e-3, critic_lr=3e-3,
              expectile=0.95, alpha=1.0, clip_denoised=False, hidden=64, behavior_hidden=128, time_dim=4, candidates=1,
              eval_every=500, log_every=100)  # fmt: skip
OURS = {  # settings of this project: built-in data on two CPU cores, and 2-D bandits (the paper's: Sec. 3, App. F.1)
    "halfcheetah-demo": DEMO | dict(steps=16_000, pretrain_steps=2_000),
    "pendulum-demo": DEMO | dict(steps=4_000, pretrain_steps=500, eval_every=1_000, alpha=5.0, gamma=0.95,
                                 behavior_lr=1e-3, actor_lr=1e-3, critic_lr=1e-3),
    "bandit": BANDIT,
    "bandit-swissroll-far": BANDIT | dict(alpha=0.2),
}  # fmt: skip
PROTOCOL = "last evaluation, 5 seeds, 10 episodes each for MuJoCo and 100 elsewhere"

# EDM noise levels (Karras et al. 2022; App. B)
SIGMA_DATA, SIGMA_MIN, SIGMA_MAX = 0.5, 0.002, 80.0


def mlp(sizes, activation, linear=nn.Linear, norm=None):
    """Linear layers of these sizes, `activation` (and before it, `norm`) after all but the last."""
    layers = []
    for d_in, d_out in zip(sizes, sizes[1:]):
        layers += [linear(d_in, d_out), *([norm(d_out)] if norm else []), activation()]
    return nn.Sequential(*layers[: -2 if norm else -1])


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


class Value(nn.Module):
    """V: obs [B, S] -> [B]."""

    def __init__(self, obs_dim, hidden):
        super().__init__()
        self.net = mlp([obs_dim, hidden, hidden, hidden, 1], nn.Mish)

    def forward(self, obs):
        return self.net(obs).squeeze(-1)


class Critic(nn.Module):
    """Q1 and Q2: obs [B, S], action [B, A] -> [2, B]."""

    def __init__(self, obs_dim, action_dim, hidden):
        super().__init__()
        sizes = [obs_dim + action_dim, hidden, hidden, hidden, 1]
        self.net = mlp(sizes, nn.Mish, partial(EnsembleLinear, 2), partial(EnsembleLayerNorm, 2))

    def forward(self, obs, action):
        x = torch.cat([obs, action], dim=-1)
        return self.net(x.expand(2, *x.shape)).squeeze(-1)


class Actor(nn.Module):
    """One-step policy pi, a tanh-Gaussian: obs [B, S] -> mean [B, A], log_std [B, A] before the tanh."""

    def __init__(self, obs_dim, action_dim, hidden):
        super().__init__()
        self.net = mlp([obs_dim, hidden, hidden, hidden, 2 * action_dim], nn.ReLU)
        for layer in self.net:
            if isinstance(layer, nn.Linear):
                nn.init.orthogonal_(layer.weight)
                nn.init.zeros_(layer.bias)

    def forward(self, obs):
        mean, log_std = self.net(obs).chunk(2, dim=-1)
        return mean, log_std.clamp(-5, 2)


class Denoiser(nn.Module):
    """Raw network F of a diffusion model: x [B, A], obs [B, S], noise level [B, 1] -> [B, A]."""

    def __init__(self, obs_dim, action_dim, hidden, time_dim):
        super().__init__()
        self.register_buffer("freqs", torch.exp(-math.log(10_000) * torch.linspace(0, 1, time_dim // 2)))
        self.time = mlp([time_dim, 2 * time_dim, time_dim], nn.Mish)
        first = nn.Linear(action_dim + obs_dim + time_dim, hidden)  # no activation after it (difference 8)
        self.net = nn.Sequential(first, *mlp([hidden, hidden, hidden, hidden, action_dim], nn.Mish))

    def forward(self, x, obs, level):
        angle = level * self.freqs
        time = self.time(torch.cat([angle.sin(), angle.cos()], dim=-1))
        return self.net(torch.cat([x, obs, time], dim=-1))


def sample_sigma(batch_size, generator):
    """Noise levels [B, 1]: ln(sigma) ~ Logistic(ln sigma_data, 1/2) cut to [sigma_min, sigma_max] (App. B).

    With scale 1/2 its distribution function is 1 - c_skip(sigma), so a uniform c_skip gives sigma in closed form.
    """
    low, high = (SIGMA_DATA**2 / (sigma**2 + SIGMA_DATA**2) for sigma in (SIGMA_MAX, SIGMA_MIN))  # of c_skip
    u = torch.rand(batch_size, 1, dtype=torch.float64, device=generator.device, generator=generator)
    c_skip = low + (high - low) * u
    return (SIGMA_DATA * ((1 - c_skip) / c_skip).sqrt()).float()


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
    """A loss whose gradient in `action` is App. C's for Eq. 8: (D_fake - D_real) / |a - D_real|_1 for each row, over B.

    Both denoisers see one noisy point.
    """
    sigma = sample_sigma(len(action), generator)
    noisy = action + sigma * torch.randn(action.shape, device=action.device, generator=generator)
    with torch.no_grad():
        d_real, d_fake = denoise(real, noisy, sigma, obs, clip), denoise(fake, noisy, sigma, obs, clip)
        weight = (action - d_real).abs().mean(dim=-1, keepdim=True).clamp_min(1e-8)
        target = action - (d_fake - d_real) / weight
    return 0.5 * ((action - target) ** 2).mean()


def expectile_loss(u, expectile):
    """L2^tau(u) = |tau - 1(u < 0)| u^2, Eq. 6."""
    return (torch.where(u < 0, 1 - expectile, expectile) * u**2).mean()


def log_prob(mean, log_std, action):
    """log N(action | mean, std) summed over action dimensions: [..., A] -> [...]."""
    return (-0.5 * ((action - mean) / log_std.exp()) ** 2 - log_std - 0.5 * math.log(2 * math.pi)).sum(-1)


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


class DTQL:
    """All that belongs to one seed: networks, optimisers, the updates of both phases, and acting."""

    def __init__(self, args, data, seed):
        self.args, self.data = args, data
        device = torch.device(args.device)
        self.generator = torch.Generator(device).manual_seed(seed)
        self.metrics = Metrics()
        torch.manual_seed(seed)
        obs_dim, action_dim = data.obs_dim, data.action_dim
        self.clip = data.max_action if args.clip_denoised else None

        self.critic = Critic(obs_dim, action_dim, args.hidden).to(device)
        self.value = Value(obs_dim, args.hidden).to(device)
        self.critic_target = copy.deepcopy(self.critic).requires_grad_(False)
        self.behavior = Denoiser(obs_dim, action_dim, args.behavior_hidden, args.time_dim).to(device)
        self.actor = self.make_actor().to(device)

        self.critic_opt = adam([*self.critic.parameters(), *self.value.parameters()], args.critic_lr)
        self.behavior_opt = adam(self.behavior.parameters(), args.behavior_lr)
        self.actor_opt = adam(self.actor.parameters(), args.actor_lr)
        self.rates = [(self.critic_opt, args.critic_lr), (self.behavior_opt, args.behavior_lr),
                      (self.actor_opt, args.actor_lr)]  # fmt: skip
        self.step = torch.zeros((), device=device)  # updates of the second phase
        self.state = dict(
            critic=self.critic, value=self.value, critic_target=self.critic_target, critic_opt=self.critic_opt,
            behavior=self.behavior, behavior_opt=self.behavior_opt, actor=self.actor, actor_opt=self.actor_opt,
            step=self.step, generator=self.generator,
        )  # fmt: skip

    def make_actor(self):
        return Actor(self.data.obs_dim, self.data.action_dim, self.args.hidden)

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
        update_target(self.critic_target, self.critic, self.args.tau)
        self.step += 1
        if self.args.lr_decay:
            for opt, lr in self.rates:
                set_lr(opt, lr * cosine(self.step, self.args.steps))

    def critic_step(self, batch):
        # value, Eq. 6
        q = self.critic(batch.obs, batch.action)
        u = q.detach().amin(0) - self.value(batch.obs)
        value_loss = expectile_loss(u, self.args.expectile)

        # critics, Eq. 7
        with torch.no_grad():
            next_v = self.value(batch.next_obs)
            target = batch.reward + self.args.gamma * (1 - batch.terminal) * next_v
        critic_loss = ((q - target) ** 2).mean(1).sum()

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
        """Eq. 5. Returns the actions that were judged."""
        action = self.sample_actions(batch.obs, self.generator)
        trust_loss = self.trust_loss(batch.obs, action)
        q = self.critic(batch.obs, action).amin(0)
        actor_loss = self.args.alpha * trust_loss - q.mean()
        if self.args.nll_weight:
            actor_loss = actor_loss + self.args.nll_weight * self.nll_loss(batch)
        self.actor_opt.zero_grad()
        actor_loss.backward(inputs=list(self.actor.parameters()))  # behaviour model and critics stay as they are
        self.actor_opt.step()
        self.metrics.add(actor_loss=actor_loss, trust_loss=trust_loss, actor_q=q.mean())
        return action.detach()

    def trust_loss(self, obs, action):
        return denoising_loss(self.behavior, obs, action, self.generator, self.clip)  # Eq. 4

    def nll_loss(self, batch):
        """-E log N(atanh(a / 1.001) | mean, std), summed over action dimensions (Sec. 2.4, difference 6)."""
        mean, log_std = self.actor(batch.obs)
        pre_tanh = torch.atanh(batch.action / (self.data.max_action + 1e-3))
        return -log_prob(mean, log_std, pre_tanh).mean()

    def sample_actions(self, obs, generator):
        """One action of pi for each row of obs, with gradient: [B, S] -> [B, A]."""
        mean, log_std = self.actor(obs)
        noise = torch.randn(mean.shape, device=obs.device, generator=generator)
        return self.data.max_action * torch.tanh(mean + log_std.exp() * noise)

    def act(self, obs, generator):
        """Draw candidates from pi, choose one by the target critic (App. D): [n, S] -> [n, A]."""
        n, k = len(obs), self.args.candidates
        obs = obs.repeat_interleave(k, dim=0)
        action = self.sample_actions(obs, generator)
        q = self.critic_target(obs, action).amin(0).view(n, k)
        if self.args.eval_select == "softmax":  # argmax of q + Gumbel noise, -log(exponential), is a draw
            q = q - torch.empty_like(q).exponential_(generator=generator).log()
        return action.view(n, k, -1)[torch.arange(n, device=obs.device), q.argmax(1)]


class DTQLKL(DTQL):
    """The ablation of App. C: KL divergence instead of the trust region, actor and fake model shaped like mu."""

    def __init__(self, args, data, seed):
        super().__init__(args, data, seed)
        self.fake = self.make_actor().to(args.device)  # a diffusion model of pi's own actions
        self.fake_opt = adam(self.fake.parameters(), args.behavior_lr)
        self.rates.append((self.fake_opt, args.behavior_lr))
        self.state |= dict(fake=self.fake, fake_opt=self.fake_opt)

    def make_actor(self):
        return Denoiser(self.data.obs_dim, self.data.action_dim, self.args.behavior_hidden, self.args.time_dim)

    def start_from_behavior(self):
        """After the head start generator and fake model begin as copies of the behaviour model (Alg. 2)."""
        self.actor.load_state_dict(self.behavior.state_dict())
        self.fake.load_state_dict(self.behavior.state_dict())

    def actor_step(self, batch):
        """Eq. 5 with Eq. 8; then the fake model learns the actions that were judged."""
        action = super().actor_step(batch)
        fake_loss = denoising_loss(self.fake, batch.obs, action, self.generator, self.clip)
        self.fake_opt.zero_grad()
        fake_loss.backward()
        self.fake_opt.step()
        self.metrics.add(fake_loss=fake_loss)
        return action

    def trust_loss(self, obs, action):
        return kl_loss(self.behavior, self.fake, obs, action, self.generator, self.clip)  # Eq. 8

    def sample_actions(self, obs, generator):
        noise = torch.randn(len(obs), self.data.action_dim, device=obs.device, generator=generator)
        return self.actor(2.5 * noise, obs, torch.full_like(noise[:, :1], 2.5))


def check(args, given):
    at_least(args, 1, "hidden", "behavior_hidden", "candidates")
    at_least(args, 0, "pretrain_steps", "gamma", "behavior_lr", "actor_lr", "critic_lr", "tau", "expectile", "alpha")
    at_least(args, 0, "nll_weight")
    at_most(args, 1, "gamma", "tau", "expectile")
    if args.time_dim < 2 or args.time_dim % 2:
        raise UserError(f"--time-dim must be an even number, a sine and a cosine each, found {args.time_dim}")
    if args.candidates == 1:
        useless(given, ["eval_select", "tau"], "with one candidate")  # no choice, so no target critic
    if args.behavior_reg == "kl":
        args.paper_score = KL_SCORES.get(args.env)
        if args.nll_weight:
            useless(given, ["nll_weight"], "with --behavior-reg kl, whose actor has no density")
            print("note: the table's --nll-weight is left out, because the actor of --behavior-reg kl has no density")
            args.nll_weight = 0.0


def main():
    args = parse_args(Args, PAPER | OURS, check, proportional=("pretrain_steps",), doc=__doc__)
    Learner = DTQLKL if args.behavior_reg == "kl" else DTQL
    if args.evaluate:
        return evaluate_run(args, Learner)
    data = load_dataset(args.env, args.data_path, judge=args.eval_episodes > 0)
    offset_rewards(data, args.reward_offset)
    data = data.to(args.device)
    learners = [Learner(args, data, seed) for seed in args.seed]
    phases = dict(pretrain=args.pretrain_steps, update=args.steps)
    run = Run(args, learners, data, __file__, PROTOCOL, phases)

    def at_end():
        if args.behavior_reg == "kl" and args.pretrain_steps:
            for learner in learners:
                learner.start_from_behavior()

    update = capture(learners, "pretrain")
    for _ in run.updates("pretrain", at_end=at_end):
        update()
    update = capture(learners, "update")
    for _ in run.updates("update", evaluate=True):
        update()
    run.finish()


if __name__ == "__main__":
    cli(main)
