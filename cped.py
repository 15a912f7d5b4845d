"""Constrained Policy optimization with Explicit behavior Density (CPED)

Jing Zhang, Chi Zhang, Wenjia Wang, Bing-Yi Jing: "Constrained Policy Optimization with Explicit Behavior Density for
Offline Reinforcement Learning", NeurIPS 2023, arXiv:2301.12130.
Official code: github.com/evalarzj/cped, commit 1c5494d.

    python cped.py                                # built-in HalfCheetah data, minutes on a CPU core
    python cped.py --env hopper-medium-v2         # the paper's run
    python cped.py --env bandit-ring              # a 2-D example; results: bandit.png, density.png

A flow-GAN learns the density p(s, a) of the data and is frozen. Then TD3 climbs Q where that density is high.

    flow          z = f(x), x = [s, a]: four additive couplings (NICE), then a scale exp(sigma) per coordinate     Flow
    density       -log p(x) = sum_j [2 softplus(z_j) - z_j] - sum_j sigma_j     (logistic prior)               Flow.nll
    discriminator min E D(f^-1(z)) - E D(x) + w_gp E (|grad D| - 1)^2           (WGAN-GP)            discriminator_loss
    flow-GAN      min -w_gan E D(f^-1(z)) - E log p(x), w_gan = 1 / lambda      Eq. 4                     behavior_step
    critic        min E (Q_i(s, a) - y)^2, y = r + gamma (1 - terminal) min_i Q_i'(s', a~)                  critic_step
                  a~ = pi'(s') + clip(noise, -c, c)                                                       target_action
    actor         max E min_i Q_i(s, pi(s)) subject to -log p(s, pi(s)) < epsilon    Eq. 7, --alpha-mode dual
    as trained    min alpha(t) E [log p(s, a) - log p(s, pi(s))] - 1(t >= t_Q) E min_i Q_i(s, pi(s))         actor_step

    Algorithm 1  first loop, --behavior-steps updates of D, one of the flow after each five                    pretrain
                 second loop, --steps updates t = 0, 1, ...: critics, actor, targets                             update

The actor first follows the density alone, the critics join at t = --critic-start, Q at t_Q = --q-start; alpha(t)
(`alpha_at`) changes at fractions of --steps. C's lengths: 500,000 + 1,000,000 for MuJoCo; AntMaze has 1,000,000 in all.
Eq. 5 (Prop. 3.1: Eq. 4 as inverse RL) is an argument, not computed.

    The paper (P, by its authors' slides) or its code (C)   This file, which follows C where nothing else is said
 1. P: dual gradient descent on alpha. C: a table          the table; --alpha-mode dual: alpha <- max(0, alpha + lr E
    alpha(t), and for epsilon -log p of the data's own      [-log p(s, pi(s)) - epsilon]) from t_Q on, epsilon as in C
    action                                                  unless --epsilon gives a number
 2. P: the flow maps actions. C: it maps [s, a]             [s, a]; --density conditional models p(a | s)
 3. P: the flow-GAN goes on training beside the policy      frozen
 4. P: actor and targets move at every update, critics and  every second (--policy-delay 1); critics and Q join later
    Q are there from the start; no terminal in y; the       (--critic-start 0 --q-start 0)
    critic's equation has max over a'
 5. C: AntMaze's alpha and MuJoCo's last threshold count    alpha counts from the start of phase 2, for any length. C
    from the start of phase 1: alpha is 0 for one update,   changes some values one actor update later; AntMaze's first
    0 or negative for many after a shorter phase 1          actor update has alpha 0.5 there after 300,000
 6. C: the sampler applies exp(-sigma) after undoing the    the exact inverse; only the GAN term sees it
    couplings: no inverse of its density
 7. C: couplings end in a LeakyReLU (NICE: linear), and     the LeakyReLU; the factor is left out
    each of their layers divides by sqrt(1 + 1e-6)
 8. C: D has S + A outputs, whose mean is the loss and      as C (WGAN-GP: one output, u uniform, weight 10)
    whose sum the penalty takes, at u x + (1 - u) f^-1(z),
    u ~ N(0, 1), weight 0.5
 9. C: Adam of the flow has betas (0.9, 0.01), eps 1e-4     as C
10. TD3 clamps a~ to the action box and climbs Q1           as C: no clamp, min(Q1, Q2)
11. C: updates of D and flow are skipped where the loss is  as C (`actor_skipped`: the actor's share), but a loss that
    not finite, the actor's also above 1e7, perhaps for     is not finite ends the run at the next log line
    ever
12. C: drops every 1000th row of a stretch without          as C on the paper's datasets as downloaded; --use-timeouts,
    terminals, so that AntMaze's shorter episodes run into  and all other data: the file's own time limits
    each other
13. C: evaluates 5,000 steps every 1,000 updates, each      whole episodes, --eval-episodes every --eval-every updates,
    rollout cut at the steps left; one cut short is         the last policy too
    dropped. The last policy is never evaluated
14. C: each call of the flow resets the global generators;  neither; targets start as copies, as in effect after C's
    the penalty has a NaN gradient at zero                  phase 1
15. C: AntMaze-large: notes say 400,000 or 500,000 updates  400,000. An earlier code (rl-study-group/rl_study_cped) has
    of phase 1, and type 300,000                            other schedules and two couplings: not followed

To lift this file out: bring `RunArgs`, `Metrics` and your data: `sample(batch_size, generator)` gives obs, action,
reward, next_obs and terminal; `obs_dim`, `action_dim`, `max_action`. Write your own loop in place of `main`; see
tests/lifted.
"""

import copy
import math
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
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
    offset_rewards,
    parse_args,
    save_figure,
    useless,
)


@dataclass
class Args(RunArgs):
    # CPED
    # Updates of the discriminator in the first phase; the flow has one after each --discriminator-steps of them
    behavior_steps: int = 500_000
    critic_start: int = 30_000  # Update of the second phase from which the critics learn
    q_start: int = 50_000  # Update of the second phase from which the actor climbs Q (t_Q)
    gamma: float = 0.99  # Discount
    behavior_lr: float = 1e-4  # Learning rate of flow and discriminator
    critic_lr: float = 3e-4  # Learning rate of the critics
    actor_lr: float = 1e-4  # Learning rate of the actor
    tau: float = 0.005  # Rate of the target networks (kappa in Alg. 1)
    policy_delay: int = 2  # Critic updates for each update of actor and targets
    target_noise: float = 0.2  # Standard deviation of the noise on target actions
    noise_clip: float = 0.5  # Largest noise on target actions (c in Alg. 1)
    # Weight of the density constraint from a table, or by dual gradient descent (Alg. 1)
    alpha_mode: Literal["schedule", "dual"] = "schedule"
    # Weight of the density constraint, one value for each stretch of --steps; dual: the last is where it starts
    alpha: tuple[float, ...] = (1000.0, 10.0, 7.5, 5.0, 2.5, 1.5)
    # Fractions of --steps at which alpha goes to its next value (schedule)
    alpha_until: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5)
    alpha_lr: float = 1e-3  # Step of dual gradient descent on alpha (dual)
    epsilon: float | None = None  # Largest -log density allowed, Eq. 7 (dual); none: that of the data's own action
    density: Literal["joint", "conditional"] = "joint"  # Model p(s, a) or p(a | s)
    discriminator_steps: int = 5  # Discriminator updates for each update of the flow (r in Alg. 1)
    gan_weight: float = 1.0  # Weight of the GAN loss beside the likelihood (1 / lambda in Eq. 4)
    gp_weight: float = 0.5  # Weight of the gradient penalty
    hidden: int = 256  # Width of critics and actor
    behavior_hidden: int = 750  # Width of the flow's networks
    reward_offset: float = 0.0  # Added to every reward (AntMaze: -1, unless rewards are 0 and -1 already)
    use_timeouts: bool = False  # On the paper's datasets: the file's time limits, not every 1000th row (difference 12)


def maze(behavior_steps, alpha_until):
    return dict(behavior_steps=behavior_steps, steps=1_000_000 - behavior_steps, actor_lr=3e-4, alpha=(0.25, 0.1, 0.08),
                alpha_until=alpha_until, reward_offset=-1.0, eval_episodes=100)  # fmt: skip


SMALL_MAZE = maze(300_000, (2 / 7, 5 / 7))
LARGE_MAZE = maze(400_000, (1 / 6, 4 / 6))
PAPER = {  # official code and its notes, which name one dataset of each family and have no table; scores: result tables
    "halfcheetah-medium-v2": dict(paper_score=61.8),
    "halfcheetah-medium-replay-v2": dict(paper_score=55.8),
    "halfcheetah-medium-expert-v2": dict(paper_score=85.4),
    "hopper-medium-v2": dict(paper_score=100.1),
    "hopper-medium-replay-v2": dict(paper_score=98.1),
    "hopper-medium-expert-v2": dict(paper_score=95.3),
    "walker2d-medium-v2": dict(paper_score=90.2),
    "walker2d-medium-replay-v2": dict(paper_score=91.9),
    "walker2d-medium-expert-v2": dict(paper_score=113.04),
    "antmaze-umaze-v2": SMALL_MAZE | dict(paper_score=96.8),
    "antmaze-umaze-diverse-v2": SMALL_MAZE | dict(paper_score=55.6),
    "antmaze-medium-play-v2": SMALL_MAZE | dict(paper_score=85.1),
    "antmaze-medium-diverse-v2": SMALL_MAZE | dict(paper_score=72.1),
    "antmaze-large-play-v2": LARGE_MAZE | dict(paper_score=34.9),
    "antmaze-large-diverse-v2": LARGE_MAZE | dict(paper_score=32.3),
}
DEMO = dict(hidden=64, behavior_hidden=64, batch_size=128, behavior_lr=1e-3, critic_lr=1e-3, actor_lr=3e-4, tau=0.02,
            alpha=(10.0, 2.0), alpha_until=(0.1,), eval_every=2_500, log_every=500)  # fmt: skip
OURS = {  # settings of this project: built-in data on two CPU cores, and 2-D bandits
    "halfcheetah-demo": DEMO | dict(behavior_steps=10_000, steps=20_000, critic_start=500, q_start=1_000),
    "pendulum-demo": DEMO | dict(behavior_steps=4_000, steps=6_000, critic_start=250, q_start=500, eval_every=1_000),
    "bandit": DEMO | dict(density="conditional", behavior_hidden=128, behavior_steps=20_000, steps=5_000,
                          critic_start=0, q_start=1_000, actor_lr=1e-3, alpha=(0.3,), alpha_until=(),
                          eval_every=1_000),
}  # fmt: skip
PROTOCOL = "number of seeds, and whether last, best or mean, not known to us"

LARGEST_LOSS = 1e7  # an actor update with a larger loss is skipped


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


class Critic(nn.Module):
    """Q1 and Q2: obs [B, S], action [B, A] -> [2, B]."""

    def __init__(self, obs_dim, action_dim, hidden):
        super().__init__()
        self.net = mlp([obs_dim + action_dim, hidden, hidden, 1], nn.ReLU, partial(EnsembleLinear, 2))

    def forward(self, obs, action):
        x = torch.cat([obs, action], dim=-1)
        return self.net(x.expand(2, *x.shape)).squeeze(-1)


class Actor(nn.Module):
    """Deterministic policy pi: obs [B, S] -> action [B, A] in [-max_action, max_action]."""

    def __init__(self, obs_dim, action_dim, hidden, max_action):
        super().__init__()
        self.max_action = max_action
        self.net = mlp([obs_dim, hidden, hidden, action_dim], nn.ReLU)

    def forward(self, obs):
        return self.max_action * torch.tanh(self.net(obs))


class OffsetLayerNorm(nn.Module):
    """(x - mean) / (standard deviation + 1e-6) + offset, the deviation with n - 1; unlike LayerNorm it has no gain."""

    def __init__(self, d):
        super().__init__()
        self.offset = nn.Parameter(torch.zeros(d))

    def forward(self, x):
        std, mean = torch.std_mean(x, dim=-1, keepdim=True)
        return (x - mean) / (std + 1e-6) + self.offset


class Discriminator(nn.Module):
    """D: [s, a] [B, k] -> [B, k] (difference 8), with the official initialisation."""

    def __init__(self, k):
        super().__init__()
        self.net = mlp([k, 2 * k, 4 * k, k], nn.LeakyReLU, norm=OffsetLayerNorm)  # slope 0.01
        *hidden, last = [layer for layer in self.net if isinstance(layer, nn.Linear)]
        for layer in hidden:
            nn.init.uniform_(layer.weight, -(layer.out_features**-0.5), layer.out_features**-0.5)
            nn.init.constant_(layer.bias, 0.1)
        nn.init.uniform_(last.weight, -3e-3, 3e-3)
        nn.init.uniform_(last.bias, -3e-3, 3e-3)

    def forward(self, x):
        return self.net(x)


def coupling_net(d_in, d_out, hidden):
    """m in x2 <- x2 + m(x1); nearly zero at first."""
    net = nn.Sequential(*mlp([d_in, hidden, hidden, d_out], nn.LeakyReLU), nn.LeakyReLU())  # at the end too (diff. 7)
    for layer in net:
        if isinstance(layer, nn.Linear):
            nn.init.uniform_(layer.weight, -0.01, 0.01)
            nn.init.zeros_(layer.bias)
    return net


class Flow(nn.Module):
    """NICE: an invertible map x -> z, [B, k] both, whose Jacobian's determinant is exp(sum of sigma) everywhere.

    joint: x = [s, a] and no context; conditional: x = a and context s, which every coupling sees.
    """

    def __init__(self, obs_dim, action_dim, hidden, density="joint", couplings=4):
        super().__init__()
        self.conditional = density == "conditional"
        k = action_dim if self.conditional else obs_dim + action_dim
        context_dim = obs_dim if self.conditional else 0
        self.sizes = [k // 2, k - k // 2]  # of the halves x1, x2
        self.reads = [i % 2 if k > 1 else 0 for i in range(couplings)]  # the half that each coupling reads
        self.nets = nn.ModuleList(
            coupling_net(self.sizes[i] + context_dim, self.sizes[1 - i], hidden) for i in self.reads
        )
        self.sigma = nn.Parameter(torch.zeros(k))

    def arrange(self, obs, action):
        """x and context."""
        return (action, obs) if self.conditional else (torch.cat([obs, action], dim=-1), obs[:, :0])

    def forward(self, x, context):
        """z = f(x): couplings 0, 2, ... shift x2 by a function of x1, the others x1 by one of x2.

        One dimension is all x2: there every coupling shifts it by a function of the context.
        """
        halves = list(x.split(self.sizes, dim=-1))
        for i, net in zip(self.reads, self.nets):
            halves[1 - i] = halves[1 - i] + net(torch.cat([halves[i], context], dim=-1))
        return torch.cat(halves, dim=-1) * self.sigma.exp()

    def inverse(self, z, context):
        """x = f^-1(z): the same steps backwards."""
        halves = list((z * torch.exp(-self.sigma)).split(self.sizes, dim=-1))
        for i, net in reversed(list(zip(self.reads, self.nets))):
            halves[1 - i] = halves[1 - i] - net(torch.cat([halves[i], context], dim=-1))
        return torch.cat(halves, dim=-1)

    def nll(self, obs, action):
        """-log p(s, a), or -log p(a | s): [B]."""
        return logistic_nll(self(*self.arrange(obs, action))).sum(-1) - self.sigma.sum()

    def sample(self, obs, generator):
        """Pairs [s, a] of the model, [B, S + A]; conditional: the given s with the model's a."""
        u = torch.rand(len(obs), sum(self.sizes), device=obs.device, generator=generator)
        z = torch.logit(u, eps=1e-7)
        if self.conditional:
            return torch.cat([obs, self.inverse(z, obs)], dim=-1)
        return self.inverse(z, obs[:, :0])


def logistic_nll(z):
    """-log density of the standard logistic distribution, elementwise."""
    return 2 * F.softplus(z) - z


def gradient_penalty(discriminator, real, fake, generator):
    """E (|grad sum_j D_j| - 1)^2 on the line through a real and a fake pair, not only between them (difference 8)."""
    u = torch.randn(len(real), 1, device=real.device, generator=generator)
    mixed = (u * real + (1 - u) * fake).requires_grad_()
    gradient = torch.autograd.grad(discriminator(mixed).sum(), mixed, create_graph=True)[0]
    return ((gradient.norm(dim=-1) - 1) ** 2).mean()


def discriminator_loss(discriminator, real, fake, gp_weight, generator):
    """WGAN-GP: E D(fake) - E D(real) + w_gp penalty; real, fake: [B, k] without gradient."""
    penalty = gradient_penalty(discriminator, real, fake, generator)
    return discriminator(fake).mean() - discriminator(real).mean() + gp_weight * penalty


def target_action(actor, obs, target_noise, noise_clip, generator):
    """a~ = pi'(s') + clip(target_noise N(0, 1), -c, c), which may leave the action box (difference 10)."""
    action = actor(obs)
    noise = target_noise * torch.randn(action.shape, device=action.device, generator=generator)
    return action + noise.clamp(-noise_clip, noise_clip)


def alpha_at(step, values, until):
    """alpha(t): values[i] for until[i - 1] <= t < until[i], all of them tensors."""
    return torch.take(values, torch.bucketize(step, until, right=True))


def adam(parameters, lr, **more):
    """Fused Adam; its rate is a tensor, which a captured update reads anew each time."""
    parameters = list(parameters)
    device = parameters[0].device
    lr = torch.tensor(lr, device=device)
    return torch.optim.Adam(parameters, lr, fused=True, capturable=device.type == "cuda", **more)


@torch.no_grad()
def update_target(target, net, tau):
    """target <- (1 - tau) target + tau net"""
    torch._foreach_lerp_(list(target.parameters()), list(net.parameters()), tau)


def step_where(opt, condition):
    """opt.step() if the boolean scalar tensor `condition` holds, else nothing, decided on the device.

    Fused Adam leaves parameters and moments alone where `found_inf` is 1; that is how AMP skips overflowing updates.
    """
    opt.found_inf = (~condition).float()
    opt.step()


class CPED:
    """All that belongs to one seed: networks, optimisers, the updates of both phases, and acting."""

    def __init__(self, args, data, seed):
        self.args, self.data = args, data
        device = torch.device(args.device)
        self.generator = torch.Generator(device).manual_seed(seed)
        self.metrics = Metrics()
        torch.manual_seed(seed)
        obs_dim, action_dim = data.obs_dim, data.action_dim

        self.behavior = Flow(obs_dim, action_dim, args.behavior_hidden, args.density).to(device)
        self.discriminator = Discriminator(obs_dim + action_dim).to(device)
        self.critic = Critic(obs_dim, action_dim, args.hidden).to(device)
        self.critic_target = copy.deepcopy(self.critic).requires_grad_(False)
        self.actor = Actor(obs_dim, action_dim, args.hidden, data.max_action).to(device)
        self.actor_target = copy.deepcopy(self.actor).requires_grad_(False)

        self.behavior_opt = adam(self.behavior.parameters(), args.behavior_lr, betas=(0.9, 0.01), eps=1e-4)
        self.discriminator_opt = adam(self.discriminator.parameters(), args.behavior_lr)
        self.critic_opt = adam(self.critic.parameters(), args.critic_lr)
        self.actor_opt = adam(self.actor.parameters(), args.actor_lr)
        self.step = torch.zeros((), device=device)  # t, updates of the second phase
        self.alpha = torch.tensor(args.alpha[-1], device=device)
        self.alpha_values = torch.tensor(args.alpha, device=device)
        self.alpha_until = torch.tensor([float(round(args.steps * end)) for end in args.alpha_until], device=device)
        self.state = dict(
            behavior=self.behavior, behavior_opt=self.behavior_opt, discriminator=self.discriminator,
            discriminator_opt=self.discriminator_opt, critic=self.critic, critic_target=self.critic_target,
            critic_opt=self.critic_opt, actor=self.actor, actor_target=self.actor_target, actor_opt=self.actor_opt,
            alpha=self.alpha, step=self.step, generator=self.generator,
        )  # fmt: skip

    def pretrain(self):
        """First loop of Algorithm 1: --discriminator-steps updates of the discriminator; after the first the flow."""
        for i in range(self.args.discriminator_steps):
            batch = self.data.sample(self.args.batch_size, self.generator)
            fake = self.behavior.sample(batch.obs, self.generator)
            self.discriminator_step(batch, fake.detach())
            if i == 0:
                self.behavior_step(batch, fake)

    def update(self):
        """Second loop of Algorithm 1: --policy-delay updates of the critics; after the first actor and targets."""
        for i in range(self.args.policy_delay):
            batch = self.data.sample(self.args.batch_size, self.generator)
            self.critic_step(batch)
            if i == 0:
                self.actor_step(batch)
                update_target(self.critic_target, self.critic, self.args.tau)
                update_target(self.actor_target, self.actor, self.args.tau)
            self.step += 1

    def discriminator_step(self, batch, fake):
        real = torch.cat([batch.obs, batch.action], dim=-1)
        loss = discriminator_loss(self.discriminator, real, fake, self.args.gp_weight, self.generator)
        self.discriminator_opt.zero_grad()
        loss.backward()
        step_where(self.discriminator_opt, loss.isfinite())
        self.metrics.add(discriminator_loss=loss)

    def behavior_step(self, batch, fake):
        # likelihood and GAN, Eq. 4
        nll = self.behavior.nll(batch.obs, batch.action).mean()
        behavior_loss = nll - self.args.gan_weight * self.discriminator(fake).mean()

        self.behavior_opt.zero_grad()
        behavior_loss.backward(inputs=list(self.behavior.parameters()))  # the discriminator stays as it is
        step_where(self.behavior_opt, behavior_loss.isfinite())
        self.metrics.add(behavior_loss=behavior_loss, nll=nll)

    def critic_step(self, batch):
        args = self.args
        with torch.no_grad():
            next_action = target_action(
                self.actor_target, batch.next_obs, args.target_noise, args.noise_clip, self.generator
            )
            next_q = self.critic_target(batch.next_obs, next_action).amin(0)
            target = batch.reward + args.gamma * (1 - batch.terminal) * next_q
        q = self.critic(batch.obs, batch.action)
        critic_loss = ((q - target) ** 2).mean(1).sum()

        self.critic_opt.zero_grad()
        critic_loss.backward()
        step_where(self.critic_opt, self.step >= args.critic_start)
        self.metrics.add(critic_loss=critic_loss, q=q.mean())

    def actor_step(self, batch):
        action = self.actor(batch.obs)

        # density: -log p(s, pi(s)) - epsilon, at most 0 in Eq. 7
        epsilon = self.args.epsilon
        if epsilon is None:
            with torch.no_grad():
                epsilon = self.behavior.nll(batch.obs, batch.action).mean()
        excess = self.behavior.nll(batch.obs, action).mean() - epsilon

        # Q, from t_Q on
        q = self.critic(batch.obs, action).amin(0).mean()
        q_weight = (self.step >= self.args.q_start).float()

        if self.args.alpha_mode == "schedule":
            self.alpha.copy_(alpha_at(self.step, self.alpha_values, self.alpha_until))
        actor_loss = self.alpha * excess - q_weight * q
        self.actor_opt.zero_grad()
        actor_loss.backward(inputs=list(self.actor.parameters()))  # flow and critics stay as they are
        allowed = actor_loss.isfinite() & (actor_loss <= LARGEST_LOSS)
        step_where(self.actor_opt, allowed)
        saturated = (action.abs() > 0.99 * self.data.max_action).float().mean()
        self.metrics.add(actor_loss=actor_loss, actor_q=q, excess_nll=excess, alpha=self.alpha, saturated=saturated,
                         actor_skipped=1 - allowed.float())  # fmt: skip
        if self.args.alpha_mode == "dual":
            with torch.no_grad():
                self.alpha.add_(self.args.alpha_lr * q_weight * excess).clamp_min_(0)

    def act(self, obs, generator):
        """pi, which is deterministic: [n, S] -> [n, A]."""
        return self.actor(obs)


def row_counter(terminal):
    """Time limits as the official code counts them: every 1000th row since the last terminal, [N] bool -> [N] bool."""
    row = np.arange(len(terminal))
    first = np.concatenate([[True], terminal[:-1]])  # rows after a terminal
    start = np.maximum.accumulate(np.where(first, row, 0))
    return (row - start) % 1000 == 999


@torch.no_grad()
def sample_density(behavior, obs, action, generator, updates=500, width=0.1):
    """Draws of the learned p(a | s) for one obs [S]: Metropolis chains that start at `action` [n, A]."""
    obs = obs.expand(len(action), -1)
    for _ in range(updates):
        proposal = action + width * torch.randn(action.shape, device=action.device, generator=generator)
        ratio = torch.exp(behavior.nll(obs, action) - behavior.nll(obs, proposal))
        accept = torch.rand(ratio.shape, device=action.device, generator=generator) < ratio
        action = torch.where(accept[:, None], proposal, action)
    return action


def draw_density(learner, data, path):
    """One state's learned action density beside the actions that the data hold at the 500 nearest states."""
    obs = data.obs[len(data) // 2]
    distance = ((data.obs - obs) / data.obs.std(0).clamp_min(1e-6)).norm(dim=1)
    near = data.action[distance.topk(min(500, len(data)), largest=False).indices]
    drawn = sample_density(learner.behavior, obs, near, torch.Generator(obs.device).manual_seed(0)).cpu()
    with torch.no_grad():
        action = learner.actor(obs[None])[0].cpu()

    def draw(axes, j):
        bins = np.linspace(-1.2, 1.2, 49)
        axes.hist(near[:, j].cpu(), bins, density=True, color="lightgrey", label="data near the state")
        axes.hist(drawn[:, j], bins, density=True, histtype="step", color="C0", label="learned density")
        axes.axvline(action[j], color="red", label="policy")
        axes.set(title=f"action {j}")
        if j == 0:
            axes.legend(loc="upper right", fontsize=7)

    save_figure(path, *(partial(draw, j=j) for j in range(min(data.action_dim, 6))), size=3.5)


def draw_plane(learner, data, path):
    """A 2-D scene: learned density, the data's actions, the policy's action, and where Q alone would lead."""
    device, size = learner.generator.device, data.max_action
    side = torch.linspace(-size, size, 200, device=device)
    grid = torch.cartesian_prod(side, side)
    obs = torch.zeros(len(grid), 1, device=device)
    with torch.no_grad():
        density = torch.exp(-learner.behavior.nll(obs, grid)).view(200, 200).T.cpu().numpy()
        best = grid[learner.critic(obs, grid).amin(0).argmax()].cpu()
        action = learner.actor(obs[:1])[0].cpu()

    def draw(axes):
        axes.imshow(density, origin="lower", extent=(-size, size, -size, size), cmap="Blues")
        axes.scatter(*data.action[::10].cpu().T, s=1, c="grey", label="data")
        axes.scatter(*best, marker="x", c="black", label="greatest Q in the box")
        axes.scatter(*action, c="red", label="policy")
        axes.set(title=data.name)
        axes.legend(loc="lower right", fontsize=8)

    save_figure(path, draw)


def published(args):
    """Whether the data are the paper's own, read as they were downloaded."""
    return args.env in PAPER and not args.data_path


def check(args, given):
    at_least(args, 1, "hidden", "behavior_hidden", "policy_delay", "discriminator_steps")
    at_least(args, 0, "behavior_steps", "critic_start", "q_start", "gamma", "behavior_lr", "critic_lr", "actor_lr")
    at_least(args, 0, "tau", "target_noise", "noise_clip", "alpha_lr", "gan_weight", "gp_weight")
    at_most(args, 1, "gamma", "tau")
    if not args.alpha or not all(math.isfinite(alpha) and alpha >= 0 for alpha in args.alpha):
        raise UserError(f"--alpha takes weights of at least 0, found {list(args.alpha)}")
    if args.alpha_mode == "dual":
        useless(given, ["alpha_until"], "with --alpha-mode dual")
        if "alpha" in given and len(args.alpha) > 1:
            raise UserError(f"--alpha takes one value with --alpha-mode dual, its start, found {list(args.alpha)}")
    else:
        useless(given, ["epsilon", "alpha_lr"], "with --alpha-mode schedule")
        if len(args.alpha) == 1 and "alpha_until" not in given:
            args.alpha_until = ()
        ends = [0, *args.alpha_until, 1]
        if len(ends) != len(args.alpha) + 1 or not all(a < b for a, b in zip(ends, ends[1:])):
            raise UserError(
                "--alpha-until takes increasing fractions of --steps, one fewer than --alpha has values, found "
                f"{list(args.alpha)} and {list(args.alpha_until)}"
            )
    if args.behavior_steps == 0:
        flow = ["behavior_lr", "discriminator_steps", "gan_weight", "gp_weight"]
        useless(given, flow, "without a first phase (--behavior-steps 0)")
    if args.gan_weight == 0:
        useless(given, ["gp_weight"], "with --gan-weight 0, where nothing heeds the discriminator")
    if args.target_noise == 0:
        useless(given, ["noise_clip"], "with --target-noise 0")
    if not published(args):
        useless(given, ["use_timeouts"], "here: only the paper's datasets, as downloaded, are read in another way")


def main():
    args = parse_args(
        Args, PAPER | OURS, check, proportional=("behavior_steps", "critic_start", "q_start"), doc=__doc__
    )
    if args.evaluate:
        return evaluate_run(args, CPED)
    rule = row_counter if published(args) and not args.use_timeouts else None
    data = load_dataset(args.env, args.data_path, judge=args.eval_episodes > 0, timeout_rule=rule)
    offset_rewards(data, args.reward_offset)
    data = data.to(args.device)
    learners = [CPED(args, data, seed) for seed in args.seed]
    phases = dict(behavior=args.behavior_steps, policy=args.steps)
    run = Run(args, learners, data, __file__, PROTOCOL, phases)

    update = capture(learners, "pretrain")
    for _ in run.updates("behavior", stride=args.discriminator_steps):
        update()
    update = capture(learners, "update")
    for _ in run.updates("policy", stride=args.policy_delay, evaluate=True):
        update()
    draw = draw_plane if args.env in SCENES else draw_density
    for learner, folder in zip(learners, run.folders):
        draw(learner, data, folder / "density.png")
    run.finish()


if __name__ == "__main__":
    cli(main)
