"""Score Regularized Policy Optimization (SRPO)

Huayu Chen, Cheng Lu, Zhengyi Wang, Hang Su, Jun Zhu: "Score Regularized Policy Optimization through Diffusion
Behavior", ICLR 2024, arXiv:2310.07297. Official code: github.com/thu-ml/SRPO, commit b3b916a.

    python srpo.py                              # built-in HalfCheetah data, minutes on a CPU core
    python srpo.py --env hopper-medium-v2       # the paper's run
    python srpo.py --env hopper-medium-v2 --beta 0.1 --reuse runs/srpo/hopper-medium-v2 --out runs/beta0.1
    python srpo.py --env bandit-8gaussians      # the 2-D experiments; result: bandit.png

An IQL critic and a diffusion model of the behaviour policy are trained apart and frozen. Then a deterministic policy
climbs Q while the diffusion model's score holds it back; nothing is ever sampled from the diffusion model.

    noise       a_t = alpha_t a + sigma_t n,  n ~ N(0, I)                            Eq. 4       schedule, diffuse
    value       L_V  = E |tau - 1(u < 0)| u^2,  u = min(target Q1, Q2)(s, a) - V(s)  Eq. 11      expectile_loss
    critic      L_Q  = E (r + gamma V(s') - Q_i(s, a))^2                             Eq. 12      critic_update
    behaviour   L_mu = E |eps(a_t, t | s) - n|^2,  eps = -sigma_t score of a_t       Eq. 6, 13   denoising_loss
    policy      max  E Q(s, pi(s)) - 1/beta E omega(t) sigma_t / alpha_t KL(pi_t || mu_t)   Eq. 14, with one t Eq. 8
    its gradient in a = pi(s):
                grad_a Q(s, a) - 1/beta E omega(t) (eps(a_t, t | s) - n)             Eq. 15, 10  q_gradient, policy_loss

Three phases (Alg. 1): critic_update 1.5M times, behavior_update 2M, policy_update 1M. The first two know nothing of
beta and omega, so that --reuse can take them from an earlier run. To act: one pass through pi, `act`.

With omega = sigma^2, the paper's choice, the score term does not seek modes on actions in [-1, 1]: two equal modes up
to 1.3 from their centre are averaged unless Q decides. omega = alpha / sigma, or a small fixed t, does.

Differences between paper, official code and this file (which follows the code unless a flag is named):
 1. Eq. 15 subtracts n as a baseline; the released code by default does not: --no-subtract-baseline. The expected
    gradient, hence beta, is the same. With small t the baseline adds noise instead (alpha / sigma, --fixed-t).
 2. AntMaze: App. C divides grad_a Q by its norm, --q-grad-norm l2; code and this file by its root mean square over the
    dimensions of the action, so that the same beta weighs Q more by the root of their number.
 3. App. C's normalisation makes 1/beta depend on the state; the code normalises grad_a Q and leaves the score alone.
 4. Eq. 15 has 1/beta on the score; here beta is on Q, the same direction and the same to Adam.
 5. The policy climbs the mean of the two target critics, not their minimum; V regresses to the minimum.
 6. V and Q step together: V(s') in Eq. 12 is from before V's update. Eq. 12 prints no terminal; code and this file use
    r + gamma (1 - terminal) V(s').
 7. t is drawn from [0.001, 1) for the behaviour model (paper: [0, 1)) and from [0.02, 0.98) for the policy.
 8. The policy's learning rate is a cosine to zero that the paper does not mention: --no-lr-decay.
 9. Behaviour model: AdamW with decay 0.01 (--weight-decay), the library's default; no average of its weights. Each
    official block holds one more linear layer that is never used: dropped.
10. Rewards: locomotion is scaled by 1000 / (range of returns) as in IQL, but over windows of 1000 rows that slide
    across episodes, since time-limit rows are dropped. AntMaze: r - 1.
11. Fixed-t ablation: dropped from the released code, here --fixed-t 0.02 --weighting alpha/sigma (Eq. 10).
12. The code draws batches without replacement, and trains an IQL policy that nothing reads: neither here.
13. Every evaluation of the code starts from seeds 1001 to 1020; here from seeds that belong to the run's seed.
14. Bandits: data and targets are from the code's first version and its figure; t, optimiser and length were never
    published. Here t = 0.02 without baseline, one free point for each target and beta.

To lift this file out: bring your own `load_dataset` (a `sample(batch_size, generator)` that returns the six fields of
`Batch`, and `obs_dim`, `action_dim`, `max_action`), `parse_args`, `Run`, `capture`, `Metrics`; the README has 20 lines.
"""

import copy
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn as nn

from common import (
    Dataset,
    Metrics,
    Run,
    RunArgs,
    UserError,
    capture,
    cli,
    evaluate_run,
    load_checkpoint,
    load_dataset,
    parse_args,
    save_figure,
    saved_args,
    set_state,
)


@dataclass
class Args(RunArgs):
    # SRPO
    critic_steps: int = 1_500_000
    """Updates of the first phase, the critic."""
    behavior_steps: int = 2_000_000
    """Updates of the second phase, the behaviour model."""
    behavior_batch_size: int = 2048
    """Transitions per update of the behaviour model."""
    reuse: str | None = None
    """Folder <out>/srpo/<env> of another run: take critic and behaviour model of the same seed, as long as it trained
    them, and train only the policy."""
    gamma: float = 0.99
    """Discount."""
    lr: float = 3e-4
    """Learning rate of critic, value and behaviour model."""
    actor_lr: float = 3e-4
    """Learning rate of the actor at the start."""
    lr_decay: bool = True
    """Cosine decay of the actor's learning rate to zero over --steps."""
    tau: float = 0.005
    """Rate of the target critic."""
    expectile: float = 0.7
    """tau in Eq. 11."""
    beta: float = 0.05
    """Temperature: weight of Q against the score, Eq. 8 to 15 (Table 2)."""
    weighting: Literal["sigma2", "one", "alpha/sigma", "sigma4"] = "sigma2"
    """omega(t) in Eq. 14 (Sec. 6.3)."""
    fixed_t: float | None = None
    """One diffusion time for the score instead of an average over t (Sec. 6.3)."""
    subtract_baseline: bool = True
    """Subtract the noise from its prediction, Eq. 15."""
    q_grad_norm: Literal["none", "rms", "l2"] = "none"
    """Divide grad_a Q by its root mean square or its norm (App. C, AntMaze)."""
    hidden: int = 256
    """Width of critics and actor."""
    actor_layers: int = 2
    """Hidden layers of the actor."""
    behavior_hidden: int = 256
    """Width of the behaviour model; its blocks are four times as wide inside."""
    dropout: float = 0.1
    """Dropout of the behaviour model while it trains."""
    weight_decay: float = 0.01
    """Decoupled weight decay of the behaviour model."""
    scale_rewards: bool = False
    """Multiply rewards by 1000 / (range of returns), as for locomotion."""
    reward_offset: float = 0.0
    """Added to every reward (AntMaze: -1)."""


PROTOCOL = "last evaluation, 6 seeds, 20 episodes each"
LOCOMOTION = dict(scale_rewards=True, eval_every=20_000, eval_episodes=20)
MAZE = dict(expectile=0.9, actor_layers=4, q_grad_norm="rms", reward_offset=-1.0, eval_every=20_000, eval_episodes=20)
PAPER = {  # Table 2 and App. C
    "halfcheetah-medium-v2": dict(beta=0.2, **LOCOMOTION),
    "halfcheetah-medium-replay-v2": dict(beta=0.2, **LOCOMOTION),
    "halfcheetah-medium-expert-v2": dict(beta=0.01, **LOCOMOTION),
    "hopper-medium-v2": dict(beta=0.05, **LOCOMOTION),
    "hopper-medium-replay-v2": dict(beta=0.2, **LOCOMOTION),
    "hopper-medium-expert-v2": dict(beta=0.01, **LOCOMOTION),
    "walker2d-medium-v2": dict(beta=0.05, **LOCOMOTION),
    "walker2d-medium-replay-v2": dict(beta=0.5, **LOCOMOTION),
    "walker2d-medium-expert-v2": dict(beta=0.1, **LOCOMOTION),
    "antmaze-umaze-v2": dict(beta=0.02, **MAZE),
    "antmaze-umaze-diverse-v2": dict(beta=0.04, **MAZE),
    "antmaze-medium-play-v2": dict(beta=0.08, **MAZE),
    "antmaze-medium-diverse-v2": dict(beta=0.05, **MAZE),
    "antmaze-large-play-v2": dict(beta=0.06, **MAZE),
    "antmaze-large-diverse-v2": dict(beta=0.05, **MAZE),
}
DEMO = dict(hidden=64, behavior_hidden=64, behavior_batch_size=256, lr=1e-3, actor_lr=1e-3, expectile=0.9, beta=0.03,
            q_grad_norm="rms", scale_rewards=True, eval_every=1_000, log_every=500)  # fmt: skip
BANDIT = dict(steps=500, critic_steps=0, behavior_steps=5_000, batch_size=1176, behavior_batch_size=512, lr=1e-3,
              actor_lr=0.05, beta=1.0, weighting="alpha/sigma", fixed_t=0.02, subtract_baseline=False,
              behavior_hidden=64, dropout=0.0, eval_episodes=0, log_every=100)  # fmt: skip
SHAPES = ("moons", "8gaussians", "checkerboard", "swissroll", "rings", "2spirals")
OURS = {  # settings of this project: built-in data on two CPU cores, and the paper's bandits (Fig. 3, App. A)
    "halfcheetah-demo-medium-replay": DEMO | dict(steps=8_000, critic_steps=10_000, behavior_steps=12_000),
    "pendulum-demo-medium": DEMO | dict(steps=2_000, critic_steps=3_000, behavior_steps=4_000, eval_every=250),
    **{f"bandit-{shape}": BANDIT for shape in SHAPES},
}
PUBLISHED = {  # Table 1
    "halfcheetah-medium-v2": 60.4, "hopper-medium-v2": 95.5, "walker2d-medium-v2": 84.4,
    "halfcheetah-medium-replay-v2": 51.4, "hopper-medium-replay-v2": 101.2, "walker2d-medium-replay-v2": 84.6,
    "halfcheetah-medium-expert-v2": 92.2, "hopper-medium-expert-v2": 100.1, "walker2d-medium-expert-v2": 114.0,
    "antmaze-umaze-v2": 97.1, "antmaze-umaze-diverse-v2": 82.1, "antmaze-medium-play-v2": 80.7,
    "antmaze-medium-diverse-v2": 75.0, "antmaze-large-play-v2": 53.6, "antmaze-large-diverse-v2": 53.6,
}  # fmt: skip

# Noise rates of the variance-preserving SDE (Song et al. 2021), and the times at which each phase uses it
BETA_MIN, BETA_MAX = 0.1, 20.0
BEHAVIOR_T, POLICY_T = (1e-3, 1.0), (0.02, 0.98)


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
        layers, width = [], obs_dim + action_dim
        for _ in range(2):
            layers += [EnsembleLinear(2, width, hidden), nn.ReLU()]
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
        for _ in range(2):
            layers += [nn.Linear(width, hidden), nn.ReLU()]
            width = hidden
        self.net = nn.Sequential(*layers, nn.Linear(hidden, 1))

    def forward(self, obs):
        return self.net(obs).squeeze(-1)


class Actor(nn.Module):
    """Deterministic policy pi: obs [B, S] -> action [B, A] in [-max_action, max_action]."""

    def __init__(self, obs_dim, action_dim, hidden, hidden_layers, max_action):
        super().__init__()
        self.max_action = max_action
        layers, width = [], obs_dim
        for _ in range(hidden_layers):
            layers += [nn.Linear(width, hidden), nn.ReLU()]
            width = hidden
        self.net = nn.Sequential(*layers, nn.Linear(width, action_dim), nn.Tanh())

    def forward(self, obs):
        return self.max_action * self.net(obs)


class ResidualBlock(nn.Module):
    """x + MLP(LayerNorm(dropout(x))): [B, d] -> [B, d]; without a generator nothing is dropped."""

    def __init__(self, width, dropout):
        super().__init__()
        self.dropout = dropout
        self.net = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Mish(), nn.Linear(4 * width, width)
        )

    def forward(self, x, generator):
        if generator is None:
            return x + self.net(x)
        keep = torch.rand(x.shape, device=x.device, generator=generator) >= self.dropout
        return x + self.net(x * keep / (1 - self.dropout))


class Behavior(nn.Module):
    """eps, the noise in a_t: a_t [B, A], obs [B, S], t [B, 1] -> [B, A]. Dropout is on where a generator is given."""

    def __init__(self, obs_dim, action_dim, hidden, dropout):
        super().__init__()
        self.register_buffer("freqs", 30 * torch.randn(32))  # Fourier features of t, never trained
        self.time = nn.Sequential(nn.Linear(64, 128), nn.Mish(), nn.Linear(128, 128))
        self.first = nn.Linear(action_dim + obs_dim + 128, hidden)
        self.blocks = nn.ModuleList([ResidualBlock(hidden, dropout) for _ in range(3)])
        self.last = nn.Sequential(nn.Mish(), nn.Linear(hidden, action_dim))

    def forward(self, x, obs, t, generator=None):
        angle = 2 * math.pi * t * self.freqs
        time = self.time(torch.cat([angle.sin(), angle.cos()], dim=-1))
        x = self.first(torch.cat([x, obs, time], dim=-1))
        for block in self.blocks:
            x = block(x, generator)
        return self.last(x)


def scale_rewards(data, length=1000):
    """Multiply rewards by 1000 / (best - worst window return), in place.

    A window closes at a terminal or after `length` rows. Time-limit rows are not in the data, so that windows slide
    across episodes (difference 10); the unfinished last one does not count.
    """
    returns, total, rows = [], 0.0, 0
    for reward, terminal in zip(data.reward.tolist(), data.terminal.tolist()):
        total, rows = total + reward, rows + 1
        if terminal or rows == length:
            returns.append(total)
            total, rows = 0.0, 0
    if len(returns) < 2 or max(returns) == min(returns):
        raise UserError(f"{data.name}: rewards cannot be scaled, the data's returns do not differ: --no-scale-rewards")
    data.reward.mul_(1000 / (max(returns) - min(returns)))


def schedule(t):
    """alpha_t, sigma_t of a_t = alpha_t a + sigma_t n, with noise rate 0.1 + 19.9 t; alpha^2 + sigma^2 = 1."""
    log_alpha = -0.25 * (BETA_MAX - BETA_MIN) * t**2 - 0.5 * BETA_MIN * t
    return log_alpha.exp(), (-torch.expm1(2 * log_alpha)).sqrt()


OMEGA = {  # omega(t) in Eq. 14: the paper's choice first, then its ablation (Sec. 6.3)
    "sigma2": lambda alpha, sigma: sigma**2,
    "one": lambda alpha, sigma: torch.ones_like(sigma),
    "alpha/sigma": lambda alpha, sigma: alpha / sigma,
    "sigma4": lambda alpha, sigma: sigma**4,
}


def diffuse(action, t_range, generator):
    """A time for each row and its noisy action: t [B, 1], a_t [B, A], noise [B, A]."""
    low, high = t_range
    t = low + (high - low) * torch.rand(len(action), 1, device=action.device, generator=generator)
    noise = torch.randn(action.shape, device=action.device, generator=generator)
    alpha, sigma = schedule(t)
    return t, alpha * action + sigma * noise, noise


def expectile_loss(u, expectile):
    """L2^tau(u) = |tau - 1(u < 0)| u^2, Eq. 11."""
    return (torch.where(u < 0, 1 - expectile, expectile) * u**2).mean()


def denoising_loss(behavior, obs, action, generator):
    """E |eps(a_t, t | s) - noise|^2, a sum over the dimensions of the action, Eq. 13; the generator drops out too."""
    t, noisy, noise = diffuse(action, BEHAVIOR_T, generator)
    return ((behavior(noisy, obs, t, generator) - noise) ** 2).sum(-1).mean()


def q_gradient(critic, obs, action, norm="none"):
    """grad_a Q(s, a) [B, A] and Q [B], the mean over the critics; norm "rms" or "l2" leaves only its direction."""
    action = action.detach().requires_grad_()
    q = critic(obs, action).mean(0)
    gradient = torch.autograd.grad(q.sum(), action)[0]
    if norm != "none":
        square = (gradient**2).sum(-1, keepdim=True)
        if norm == "rms":
            square = square / action.shape[-1]
        gradient = gradient / square.sqrt().clamp_min(1e-8)
    return gradient, q.detach()


def policy_loss(
    behavior, obs, action, q_grad, beta, generator, weighting="sigma2", t_range=POLICY_T, subtract_baseline=True
):
    """Eq. 15 as a surrogate: its gradient in `action` is [omega(t) (eps - noise) - beta grad_a Q] / B.

    No gradient passes through the behaviour model: its Jacobian is left out, as in score distillation.
    """
    with torch.no_grad():
        t, noisy, noise = diffuse(action, t_range, generator)
        score = behavior(noisy, obs, t)
        if subtract_baseline:
            score = score - noise
        pull = OMEGA[weighting](*schedule(t)) * score
    return ((pull - beta * q_grad) * action).sum(-1).mean()


class SRPO:
    """All that belongs to one seed: networks, optimisers, the updates of the three phases, and acting."""

    def __init__(self, args, data, seed):
        self.args, self.data = args, data
        device = torch.device(args.device)
        self.generator = torch.Generator(device).manual_seed(seed)
        self.metrics = Metrics()
        torch.manual_seed(seed)
        obs_dim, action_dim = data.obs_dim, data.action_dim
        self.critic = Critic(obs_dim, action_dim, args.hidden).to(device)
        self.value = Value(obs_dim, args.hidden).to(device)
        self.critic_target = copy.deepcopy(self.critic).requires_grad_(False)
        self.behavior = Behavior(obs_dim, action_dim, args.behavior_hidden, args.dropout).to(device)
        self.actor = Actor(obs_dim, action_dim, args.hidden, args.actor_layers, data.max_action).to(device)
        self.beta = args.beta
        self.t_range = POLICY_T if args.fixed_t is None else (args.fixed_t, args.fixed_t)

        self.critic_opt = self.adam([*self.critic.parameters(), *self.value.parameters()], args.lr)
        self.behavior_opt = self.adam(self.behavior.parameters(), args.lr, args.weight_decay)
        self.actor_opt = self.adam(self.actor.parameters(), args.actor_lr)
        self.step = torch.zeros((), device=device)  # updates of the policy phase
        self.state = dict(
            critic=self.critic, value=self.value, critic_target=self.critic_target, critic_opt=self.critic_opt,
            behavior=self.behavior, behavior_opt=self.behavior_opt, actor=self.actor, actor_opt=self.actor_opt,
            step=self.step, generator=self.generator,
        )  # fmt: skip

    def adam(self, params, lr, weight_decay=0.0):
        device = self.generator.device
        lr = torch.tensor(lr, device=device)  # a tensor, so that a captured update sees it change
        # without decay AdamW is Adam
        return torch.optim.AdamW(params, lr, weight_decay=weight_decay, fused=True, capturable=device.type == "cuda")

    def critic_update(self):
        """One update of V, Q and target Q (implicit Q-learning)."""
        batch = self.data.sample(self.args.batch_size, self.generator)
        with torch.no_grad():
            q_target = self.critic_target(batch.obs, batch.action).amin(0)
            target = batch.reward + self.args.gamma * (1 - batch.terminal) * self.value(batch.next_obs)
        value_loss = expectile_loss(q_target - self.value(batch.obs), self.args.expectile)  # Eq. 11
        q = self.critic(batch.obs, batch.action)
        critic_loss = ((q - target) ** 2).mean()  # Eq. 12, averaged over both critics
        self.critic_opt.zero_grad()
        (value_loss + critic_loss).backward()
        self.critic_opt.step()
        with torch.no_grad():
            torch._foreach_lerp_(list(self.critic_target.parameters()), list(self.critic.parameters()), self.args.tau)
        self.metrics.add(critic_loss=critic_loss, value_loss=value_loss, q=q.mean())

    def behavior_update(self):
        """One update of the diffusion model of the behaviour policy."""
        batch = self.data.sample(self.args.behavior_batch_size, self.generator)
        behavior_loss = denoising_loss(self.behavior, batch.obs, batch.action, self.generator)  # Eq. 13
        self.behavior_opt.zero_grad()
        behavior_loss.backward()
        self.behavior_opt.step()
        self.metrics.add(behavior_loss=behavior_loss)

    def policy_update(self):
        """One update of the policy against the frozen target critic and behaviour model."""
        args, batch = self.args, self.data.sample(self.args.batch_size, self.generator)
        action = self.actor(batch.obs)
        q_grad, q = q_gradient(self.critic_target, batch.obs, action, args.q_grad_norm)
        actor_loss = policy_loss(
            self.behavior, batch.obs, action, q_grad, self.beta, self.generator,
            args.weighting, self.t_range, args.subtract_baseline,
        )  # Eq. 15  # fmt: skip
        self.actor_opt.zero_grad()
        actor_loss.backward()
        self.actor_opt.step()
        self.step += 1
        if args.lr_decay:  # cosine to zero over `steps` updates
            lr = args.actor_lr * 0.5 * (1 + torch.cos(math.pi * self.step / args.steps))
            self.actor_opt.param_groups[0]["lr"].copy_(lr)
        self.metrics.add(actor_loss=actor_loss, actor_q=q.mean())

    def act(self, obs, generator):
        """[n, S] -> [n, A]"""
        return self.actor(obs)

    def reuse(self, folder, seed):
        """Take critic, behaviour model and their numbers of updates from a run of this script with the same seed."""
        folder = Path(folder) if Path(folder).name == f"seed{seed}" else Path(folder) / f"seed{seed}"
        checkpoint, theirs = load_checkpoint(folder, self.args.device), saved_args(folder, Args)
        if not (folder / Path(__file__).name).exists() or not {"critic", "behavior"} <= set(checkpoint["done"]):
            raise UserError(f"--reuse {folder}: no run of srpo.py with finished critic and behaviour model")
        fixed = ["env", "gamma", "lr", "tau", "expectile", "hidden", "behavior_hidden", "behavior_batch_size"]
        fixed += ["dropout", "weight_decay", "scale_rewards", "reward_offset", "obs_dim", "action_dim"]
        theirs, ours = theirs | checkpoint["dims"], vars(self.args) | vars(self.data)
        changed = [f"{name.replace('_', '-')} {theirs[name]}" for name in fixed if theirs[name] != ours[name]]
        if changed:
            raise UserError(f"--reuse {folder}: made with {', '.join(changed)}, unlike this run")
        parts = ("critic", "value", "critic_target", "behavior")
        set_state({name: self.state[name] for name in parts}, checkpoint["learner"])
        self.args.critic_steps, self.args.behavior_steps = theirs["critic_steps"], theirs["behavior_steps"]
        print(f"note: critic after {theirs['critic_steps']:,} and behaviour model after {theirs['behavior_steps']:,} "
              f"updates from {folder}; --critic-steps and --behavior-steps do nothing")  # fmt: skip


# The 2-D experiments (Sec. 3, App. A): behaviour is a 2-D density, Q(a) = -|a - target|^2 is known, and in place of an
# actor there is one free point for each target of a grid and each temperature.
GRID = torch.linspace(-4.5, 4.5, 7)
SWEEP = (10.0, 1.0, 0.1)  # multiples of --beta, one panel each


def bandit(name, n=100_000):
    """The paper's six densities, n actions each, around the origin and about 8 wide."""
    g = torch.Generator().manual_seed(0)
    u, v, w = torch.rand(3, n, generator=g)
    noise, half = torch.randn(n, 2, generator=g), (torch.arange(n) < n // 2).float()

    def polar(radius, angle):
        return torch.stack([radius * angle.cos(), radius * angle.sin()], 1)

    shape = name.removeprefix("bandit-")
    if shape == "moons":
        arc = polar(1, math.pi * u)
        action = torch.where(half.bool()[:, None], arc, torch.tensor([1, 0.5]) - arc)
        action = 2 * (action + 0.1 * noise) - torch.tensor([1, 0.2])
    elif shape == "8gaussians":
        action = (polar(4, math.pi / 4 * (8 * u).floor()) + 0.5 * noise) / 1.414
    elif shape == "checkerboard":
        x = 4 * u - 2
        action = 2 * torch.stack([x, v - 2 * half + x.floor() % 2], 1)
    elif shape == "swissroll":
        angle = 1.5 * math.pi * (1 + 2 * u)
        action = (polar(angle, angle) + noise) / 5
    elif shape == "rings":
        action = polar(0.75 * (1 + (4 * u).floor()), 2 * math.pi * v) + 0.08 * noise
    else:  # 2spirals
        angle = 3 * math.pi * u.sqrt()
        arm = polar(angle, math.pi - angle) + torch.stack([v, w], 1) / 2
        action = (2 * half - 1)[:, None] * arm / 3 + 0.1 * noise
    return Dataset.bandit(name, action, lambda action: 0 * action[:, 0])  # rewards play no part: Q is known


class Points(nn.Module):
    """Free points [P, 2] in place of an actor; row i of a batch belongs to point i mod P."""

    def __init__(self, start):
        super().__init__()
        self.points = nn.Parameter(start.clone())

    def forward(self, obs):
        return self.points[torch.arange(len(obs), device=obs.device) % len(self.points)]


class BanditSRPO(SRPO):
    """SRPO on a 2-D density: the same policy phase for all targets and temperatures at once, each from its target."""

    def __init__(self, args, data, seed):
        super().__init__(args, data, seed)
        device = self.generator.device
        target = torch.cartesian_prod(GRID, GRID).repeat(len(SWEEP), 1).to(device)  # [P, 2]
        beta = args.beta * torch.tensor(SWEEP, device=device).repeat_interleave(len(GRID) ** 2)
        row = torch.arange(args.batch_size, device=device) % len(target)
        self.beta, self.target = beta[row, None], target
        self.critic_target = lambda obs, action: -((action - target[row]) ** 2).sum(-1)[None]
        self.actor = Points(target)
        self.actor_opt = self.adam(self.actor.parameters(), args.actor_lr)
        self.state |= dict(actor=self.actor, actor_opt=self.actor_opt)

    def draw(self, path):
        """The paper's figure: the data, then for each temperature lines from the targets to the extracted points."""
        data = self.data.action[::20].cpu()
        points, targets = self.actor.points.detach().cpu().chunk(len(SWEEP)), self.target.cpu().chunk(len(SWEEP))

        def panel(k, axes):
            axes.scatter(*data.T, s=1, color="C0", alpha=0.3)
            if k >= 0:
                for target, point in zip(targets[k], points[k]):
                    axes.plot(*torch.stack([target, point]).T, color="grey", linewidth=0.5)
                axes.scatter(*targets[k].T, s=6, color="grey")
                axes.scatter(*points[k].T, s=14, color="C2", zorder=3)
            title = f"beta = {SWEEP[k] * self.args.beta:g}" if k >= 0 else self.data.name
            axes.set(xlim=(-5, 5), ylim=(-5, 5), aspect="equal", title=title)

        save_figure(path, *(lambda axes, k=k: panel(k, axes) for k in range(-1, len(SWEEP))))


def main():
    args = parse_args(Args, PAPER | OURS, proportional=("critic_steps", "behavior_steps"), doc=__doc__)
    is_bandit = args.env in OURS and args.env.startswith("bandit-")
    if args.evaluate:
        if is_bandit:
            raise UserError("a bandit has no policy to evaluate; its result is bandit.png in the run folder")
        return evaluate_run(args, SRPO)
    if args.fixed_t is not None and not 0 < args.fixed_t <= 1:
        raise UserError(f"--fixed-t must be above 0 and at most 1, found {args.fixed_t}")
    data = bandit(args.env) if is_bandit else load_dataset(args.env, args.data_path)
    if args.scale_rewards:
        scale_rewards(data)
    data.reward.add_(args.reward_offset)
    data = data.to(args.device)
    learners = [(BanditSRPO if is_bandit else SRPO)(args, data, seed) for seed in args.seed]
    if args.reuse:
        for learner, seed in zip(learners, args.seed):
            learner.reuse(args.reuse, seed)
    args.paper_score = PUBLISHED.get(args.env)
    run = Run(args, learners, data, __file__, PROTOCOL)

    update = capture(learners, "critic_update")
    for _ in run.updates("critic", 0 if args.reuse else args.critic_steps):
        update()
    update = capture(learners, "behavior_update")
    for _ in run.updates("behavior", 0 if args.reuse else args.behavior_steps):
        update()
    update = capture(learners, "policy_update")
    for _ in run.updates("policy", args.steps, evaluate=True):
        update()
    if is_bandit:
        for learner, folder in zip(learners, run.folders):
            learner.draw(folder / "bandit.png")
    run.finish()


if __name__ == "__main__":
    cli(main)
