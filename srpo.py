"""Score Regularized Policy Optimization (SRPO)

Huayu Chen, Cheng Lu, Zhengyi Wang, Hang Su, Jun Zhu: "Score Regularized Policy Optimization through Diffusion
Behavior", ICLR 2024, arXiv:2310.07297.
Official code: github.com/thu-ml/SRPO, commit b3b916a.

    python srpo.py                              # built-in HalfCheetah data, minutes on a CPU core
    python srpo.py --env hopper-medium-v2       # the paper's run
    python srpo.py --env hopper-medium-v2 --beta 0.1 --reuse runs/srpo/hopper-medium-v2 --out runs/beta0.1
    python srpo.py --env bandit-8gaussians      # a 2-D example; result: bandit.png

An IQL critic and a diffusion model of the behaviour policy are trained apart and frozen. Then a deterministic policy
climbs Q while the diffusion model's score holds it back; nothing is ever sampled from the diffusion model.

    noise       a_t = alpha_t a + sigma_t n,  n ~ N(0, I)                            Eq. 4       schedule, diffuse
    value       L_V  = E |tau - 1(u < 0)| u^2,  u = min(target Q1, Q2)(s, a) - V(s)  Eq. 11      expectile_loss
    critic      L_Q  = E (r + gamma V(s') - Q_i(s, a))^2                             Eq. 12      critic_update
    behaviour   L_mu = E |eps(a_t, t | s) - n|^2,  eps = -sigma_t score of a_t       Eq. 6, 13   denoising_loss
    policy      max  E Q(s, pi(s)) - 1/beta E omega(t) sigma_t / alpha_t KL(pi_t || mu_t)   Eq. 14 (nearly 8 at t = .02)
    its gradient in a = pi(s):
                grad_a Q(s, a) - 1/beta E omega(t) (eps(a_t, t | s) - n)   Eq. 15, 10  q_gradient, score_gradient

    Algorithm 1  1,500,000 times: value, critic, target critic      critic_update
                 2,000,000 times: behaviour model                   behavior_update
                 1,000,000 times: policy                            policy_update
    to act       one pass through pi                                act

The first two phases know nothing of beta and omega, so that --reuse can take them from an earlier run. With omega =
sigma^2, the paper's choice, the score term does not seek modes on actions in [-1, 1]: two equal modes up to 1.3 from
their centre are averaged unless Q decides. omega = alpha / sigma, or a small fixed t, seeks them.

    The paper (P) or its code (C)                           This file, which follows C where nothing else is said
 1. C: n is not subtracted, unlike in P's Eq. 15            subtracted, --no-subtract-baseline: the same expected
                                                            gradient, so the same beta. With small t the baseline adds
                                                            noise (alpha / sigma, --fixed-t)
 2. P: AntMaze divides grad_a Q by its norm                 by its root mean square, which weighs Q sqrt(A) times as
                                                            much, A action dimensions: --q-grad-norm l2
 3. P: that makes 1/beta depend on the state                the score is left alone
 4. P: 1/beta on the score                                  beta on Q: the same direction, and the same to Adam
 5. P: does not say which critics are read                  V: minimum of the targets; policy: mean of the targets
 6. P: V, then Q; no terminal in Eq. 12                     together, V(s') from before V's update;
                                                            r + gamma (1 - terminal) V(s')
 7. P: the behaviour model's t from [0, 1)                  [0.001, 1); the policy's as in P, [0.02, 0.98)
 8. C: the policy's learning rate is a cosine to zero       --no-lr-decay
 9. C: AdamW's default decay, 0.01, of the behaviour model  --weight-decay. Without C's unused layer in each block
10. C: locomotion's rewards by 1000 / (range of returns),   --scale-rewards; AntMaze: r - 1, --reward-offset
    in windows of 1000 rows that drift across episodes,
    since D4RL's time-limit rows are dropped
11. P: one t (Eq. 10); it and sigma4 are no longer in C     --fixed-t 0.02 --weighting alpha/sigma
12. C: batches without replacement; an IQL policy that      neither
    nothing reads
13. C: every evaluation starts from seeds 1001 to 1020      from seeds that belong to the run's seed
14. P: 2-D examples with known Q and no policy network      tests/benchmarks/claim_srpo.py; here a scene is data as any
                                                            other, with a learned Q
15. P: IDQL's network, only with continuous t               C's: fixed Fourier features, PyTorch's initial weights,
                                                            no moving average

To lift this file out: bring `RunArgs`, `Metrics` and your data: `sample(batch_size, generator)` gives obs, action,
reward, next_obs and terminal; `obs_dim`, `action_dim`, `max_action`; for `scale_rewards` reward and terminal of all
rows in order, `name` and `need_order`. Write your own loop in place of `main`; see tests/lifted.
"""

import copy
import math
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn as nn

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
    set_state,
    useless,
)


@dataclass
class Args(RunArgs):
    # SRPO
    critic_steps: int = 1_500_000  # Updates of the first phase, the critic
    behavior_steps: int = 2_000_000  # Updates of the second phase, the behaviour model
    behavior_batch_size: int = 2048  # Transitions per update of the behaviour model
    # Folder <out>/srpo/<env> of another run: take its critic and behaviour model, seed by seed, train only the policy
    reuse: str | None = None
    gamma: float = 0.99  # Discount
    critic_lr: float = 3e-4  # Learning rate of Q and V
    behavior_lr: float = 3e-4  # Learning rate of the behaviour model
    actor_lr: float = 3e-4  # Learning rate of the actor at the start
    lr_decay: bool = True  # Cosine decay of the actor's learning rate to zero over --steps
    tau: float = 0.005  # Rate of the target critic
    expectile: float = 0.7  # tau in Eq. 11
    beta: float = 0.05  # Temperature: weight of Q against the score, Eq. 8 to 15 (Table 2)
    weighting: Literal["sigma2", "one", "alpha/sigma", "sigma4"] = "sigma2"  # omega(t) in Eq. 14 (Sec. 6.3)
    fixed_t: float | None = None  # One diffusion time for the score instead of an average over t (Sec. 6.3)
    subtract_baseline: bool = True  # Subtract the noise from its prediction, Eq. 15
    q_grad_norm: Literal["none", "rms", "l2"] = "none"  # Divide grad_a Q by its root mean square or norm (App. C)
    hidden: int = 256  # Width of critics and actor
    actor_layers: int = 2  # Hidden layers of the actor
    behavior_hidden: int = 256  # Width of the behaviour model; its blocks are four times as wide inside
    dropout: float = 0.1  # Dropout of the behaviour model while it trains
    weight_decay: float = 0.01  # Decoupled weight decay of the behaviour model
    scale_rewards: bool = False  # Multiply rewards by 1000 / (range of returns), as for locomotion
    reward_offset: float = 0.0  # Added to every reward (AntMaze: -1, unless rewards are 0 and -1 already)


LOCOMOTION = dict(scale_rewards=True, eval_every=20_000, eval_episodes=20)
MAZE = dict(expectile=0.9, actor_layers=4, q_grad_norm="rms", reward_offset=-1.0, eval_every=20_000, eval_episodes=20)
PAPER = {  # Table 2: beta; Table 1: score; App. C and official code: the rest
    "halfcheetah-medium-v2": LOCOMOTION | dict(beta=0.2, paper_score=60.4),
    "halfcheetah-medium-replay-v2": LOCOMOTION | dict(beta=0.2, paper_score=51.4),
    "halfcheetah-medium-expert-v2": LOCOMOTION | dict(beta=0.01, paper_score=92.2),
    "hopper-medium-v2": LOCOMOTION | dict(beta=0.05, paper_score=95.5),
    "hopper-medium-replay-v2": LOCOMOTION | dict(beta=0.2, paper_score=101.2),
    "hopper-medium-expert-v2": LOCOMOTION | dict(beta=0.01, paper_score=100.1),
    "walker2d-medium-v2": LOCOMOTION | dict(beta=0.05, paper_score=84.4),
    "walker2d-medium-replay-v2": LOCOMOTION | dict(beta=0.5, paper_score=84.6),
    "walker2d-medium-expert-v2": LOCOMOTION | dict(beta=0.1, paper_score=114.0),
    "antmaze-umaze-v2": MAZE | dict(beta=0.02, paper_score=97.1),
    "antmaze-umaze-diverse-v2": MAZE | dict(beta=0.04, paper_score=82.1),
    "antmaze-medium-play-v2": MAZE | dict(beta=0.08, paper_score=80.7),
    "antmaze-medium-diverse-v2": MAZE | dict(beta=0.05, paper_score=75.0),
    "antmaze-large-play-v2": MAZE | dict(beta=0.06, paper_score=53.6),
    "antmaze-large-diverse-v2": MAZE | dict(beta=0.05, paper_score=53.6),
}
DEMO = dict(hidden=64, behavior_hidden=64, behavior_batch_size=256, critic_lr=1e-3, behavior_lr=1e-3, actor_lr=1e-3,
            expectile=0.9, beta=0.03, q_grad_norm="rms", scale_rewards=True, eval_every=1_000,
            log_every=500)  # fmt: skip
BANDIT = dict(steps=500, critic_steps=1_000, behavior_steps=3_000, behavior_batch_size=512, critic_lr=1e-3,
              behavior_lr=1e-3, actor_lr=3e-3, beta=0.3, q_grad_norm="rms", weighting="alpha/sigma", fixed_t=0.02,
              subtract_baseline=False, behavior_hidden=64, dropout=0.0, eval_every=50, log_every=50)  # fmt: skip
OURS = {  # settings of this project: built-in data on two CPU cores, and 2-D bandits
    "halfcheetah-demo": DEMO | dict(steps=8_000, critic_steps=10_000, behavior_steps=12_000),
    "pendulum-demo": DEMO | dict(steps=2_000, critic_steps=3_000, behavior_steps=4_000, eval_every=250),
    "bandit": BANDIT,
}
PROTOCOL = "last evaluation, 6 seeds, 20 episodes each"

# Noise rates of the variance-preserving SDE (Song et al. 2021), and the times at which each phase uses it
BETA_MIN, BETA_MAX = 0.1, 20.0
BEHAVIOR_T, POLICY_T = (1e-3, 1.0), (0.02, 0.98)


def mlp(sizes, activation, linear=nn.Linear):
    """Linear layers of these sizes, `activation` after all but the last."""
    layers = []
    for d_in, d_out in zip(sizes, sizes[1:]):
        layers += [linear(d_in, d_out), activation()]
    return nn.Sequential(*layers[:-1])


class EnsembleLinear(nn.Module):
    """n linear layers as one batched matmul: [n, B, d_in] -> [n, B, d_out], initialised like nn.Linear."""

    def __init__(self, n, d_in, d_out):
        super().__init__()
        bound = d_in**-0.5
        self.weight = nn.Parameter(torch.empty(n, d_in, d_out).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(n, 1, d_out).uniform_(-bound, bound))

    def forward(self, x):
        return torch.baddbmm(self.bias, x, self.weight)


class Value(nn.Module):
    """V: obs [B, S] -> [B]."""

    def __init__(self, obs_dim, hidden):
        super().__init__()
        self.net = mlp([obs_dim, hidden, hidden, 1], nn.ReLU)

    def forward(self, obs):
        return self.net(obs).squeeze(-1)


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

    def __init__(self, obs_dim, action_dim, hidden, layers, max_action):
        super().__init__()
        self.max_action = max_action
        self.net = mlp([obs_dim, *[hidden] * layers, action_dim], nn.ReLU)

    def forward(self, obs):
        return self.max_action * torch.tanh(self.net(obs))


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


def schedule(t):
    """alpha_t, sigma_t of a_t = alpha_t a + sigma_t n, Eq. 4, with noise rate 0.1 + 19.9 t; alpha^2 + sigma^2 = 1."""
    log_alpha = -0.25 * (BETA_MAX - BETA_MIN) * t**2 - 0.5 * BETA_MIN * t
    return log_alpha.exp(), (-torch.expm1(2 * log_alpha)).sqrt()


OMEGA = {  # omega(t) in Eq. 14: the paper's choice first, then its ablation (Sec. 6.3; sigma4: early code)
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
    """E |eps(a_t, t | s) - noise|^2, summed over the dimensions of the action, Eq. 13; dropout draws too."""
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


@torch.no_grad()
def score_gradient(behavior, obs, action, generator, weighting="sigma2", t_range=POLICY_T, subtract_baseline=True):
    """omega(t) (eps(a_t, t | s) - noise) [B, A]: the direction away from the data, by the behaviour model's score.

    This is the gradient of Eq. 14's KL divergence itself: nothing goes back through the behaviour model.
    """
    t, noisy, noise = diffuse(action, t_range, generator)
    eps = behavior(noisy, obs, t)
    if subtract_baseline:
        eps = eps - noise
    return OMEGA[weighting](*schedule(t)) * eps


def policy_loss(action, score_grad, q_grad, beta):
    """Eq. 15 as a surrogate: its gradient in `action` is [omega(t) (eps - noise) - beta grad_a Q] / B."""
    return ((score_grad - beta * q_grad) * action).sum(-1).mean()


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


class SRPO:
    """All that belongs to one seed: networks, optimisers, the updates of the three phases, and acting."""

    def __init__(self, args, data, seed):
        self.args, self.data = args, data
        device = torch.device(args.device)
        self.generator = torch.Generator(device).manual_seed(seed)
        self.metrics = Metrics()
        torch.manual_seed(seed)
        obs_dim, action_dim = data.obs_dim, data.action_dim
        self.t_range = POLICY_T if args.fixed_t is None else (args.fixed_t, args.fixed_t)

        self.critic = Critic(obs_dim, action_dim, args.hidden).to(device)
        self.value = Value(obs_dim, args.hidden).to(device)
        self.critic_target = copy.deepcopy(self.critic).requires_grad_(False)
        self.behavior = Behavior(obs_dim, action_dim, args.behavior_hidden, args.dropout).to(device)
        self.actor = Actor(obs_dim, action_dim, args.hidden, args.actor_layers, data.max_action).to(device)

        self.critic_opt = adam([*self.critic.parameters(), *self.value.parameters()], args.critic_lr)
        self.behavior_opt = adam(self.behavior.parameters(), args.behavior_lr, weight_decay=args.weight_decay,
                                 decoupled_weight_decay=True)  # fmt: skip
        self.actor_opt = adam(self.actor.parameters(), args.actor_lr)
        self.step = torch.zeros((), device=device)  # updates of the policy phase
        self.state = dict(
            critic=self.critic, value=self.value, critic_target=self.critic_target, critic_opt=self.critic_opt,
            behavior=self.behavior, behavior_opt=self.behavior_opt, actor=self.actor, actor_opt=self.actor_opt,
            step=self.step, generator=self.generator,
        )  # fmt: skip

    def critic_update(self):
        """One update of V, Q and target Q (implicit Q-learning)."""
        batch = self.data.sample(self.args.batch_size, self.generator)
        # value, Eq. 11
        u = self.critic_target(batch.obs, batch.action).amin(0) - self.value(batch.obs)
        value_loss = expectile_loss(u, self.args.expectile)

        # critics, Eq. 12
        with torch.no_grad():
            next_v = self.value(batch.next_obs)
            target = batch.reward + self.args.gamma * (1 - batch.terminal) * next_v
        q = self.critic(batch.obs, batch.action)
        critic_loss = ((q - target) ** 2).mean()

        self.critic_opt.zero_grad()
        (value_loss + critic_loss).backward()
        self.critic_opt.step()
        update_target(self.critic_target, self.critic, self.args.tau)
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
        args = self.args
        batch = self.data.sample(args.batch_size, self.generator)
        action = self.actor(batch.obs)
        q_grad, q = q_gradient(self.critic_target, batch.obs, action, args.q_grad_norm)
        score_grad = score_gradient(
            self.behavior, batch.obs, action, self.generator, args.weighting, self.t_range, args.subtract_baseline
        )
        actor_loss = policy_loss(action, score_grad, q_grad, args.beta)  # Eq. 15
        self.actor_opt.zero_grad()
        actor_loss.backward()
        self.actor_opt.step()
        self.step += 1
        if args.lr_decay:
            set_lr(self.actor_opt, args.actor_lr * cosine(self.step, args.steps))
        self.metrics.add(actor_loss=actor_loss, actor_q=q.mean())

    def act(self, obs, generator):
        """pi, which is deterministic: [n, S] -> [n, A]."""
        return self.actor(obs)


def scale_rewards(data, length=1000):
    """Multiply rewards by 1000 / (best - worst window return), in place.

    A window closes at a terminal or after `length` rows. D4RL's time-limit rows are dropped, so that windows drift
    across episodes (difference 10); the unfinished last one does not count.
    """
    data.need_order("returns (or --no-scale-rewards)")
    returns, total, rows = [], 0.0, 0
    for reward, terminal in zip(data.reward.tolist(), data.terminal.tolist()):
        total, rows = total + reward, rows + 1
        if terminal or rows == length:
            returns.append(total)
            total, rows = 0.0, 0
    if len(returns) < 2 or max(returns) == min(returns):
        raise UserError(
            f"{data.name}: scaling rewards needs two different returns, each up to a terminal or {length} rows, found"
            f" {len(set(returns))}: --no-scale-rewards leaves it out"
        )
    data.reward.mul_(1000 / (max(returns) - min(returns)))


SHARED = """seed fingerprint scale_rewards reward_offset batch_size behavior_batch_size gamma critic_lr behavior_lr tau
expectile hidden behavior_hidden dropout weight_decay""".split()  # what critic and behaviour model were made with


def load_models(learners):
    """--reuse: critic and behaviour model of the same seeds from another run on the same data."""
    for learner, seed in zip(learners, learners[0].args.seed):
        args, data = learner.args, learner.data
        theirs, checkpoint = load_run(__file__, args.reuse, Args, seed, args.device)
        if not {"critic", "behavior"} <= set(checkpoint["done"]):
            raise UserError(f"--reuse {args.reuse}: its critic and behaviour model are not finished")
        ours = vars(args) | vars(data) | dict(seed=(seed,))
        same_settings(args.reuse, vars(theirs) | checkpoint["dims"], ours, SHARED)
        parts = ("critic", "value", "critic_target", "behavior")
        set_state({name: learner.state[name] for name in parts}, checkpoint["learner"])
        args.critic_steps, args.behavior_steps = theirs.critic_steps, theirs.behavior_steps


def check(args, given):
    at_least(args, 1, "behavior_batch_size", "hidden", "actor_layers", "behavior_hidden")
    at_least(args, 0, "critic_steps", "behavior_steps", "gamma", "tau", "expectile", "dropout", "weight_decay")
    at_least(args, 0, "critic_lr", "behavior_lr", "actor_lr", "beta")
    at_most(args, 1, "gamma", "tau", "expectile")
    if not args.dropout < 1:
        raise UserError(f"--dropout must be below 1, found {args.dropout}")
    if args.fixed_t is not None:  # the behaviour model learns no other times
        at_least(args, BEHAVIOR_T[0], "fixed_t")
        at_most(args, BEHAVIOR_T[1], "fixed_t")
    if args.reuse:
        useless(given, ["critic_steps", "behavior_steps"], "with --reuse")
        apart(args, "reuse")


def main():
    args = parse_args(Args, PAPER | OURS, check, proportional=("critic_steps", "behavior_steps"), doc=__doc__)
    if args.evaluate:
        return evaluate_run(args, SRPO)
    data = load_dataset(args.env, args.data_path, judge=args.eval_episodes > 0)
    if args.scale_rewards:
        scale_rewards(data)
    offset_rewards(data, args.reward_offset)
    data = data.to(args.device)
    learners = [SRPO(args, data, seed) for seed in args.seed]
    if args.reuse and not args.resume:
        load_models(learners)  # before the run begins: what does not fit is refused
        print(f"note: critic after {args.critic_steps:,}, behaviour model after {args.behavior_steps:,} updates: "
              f"{args.reuse}")  # fmt: skip
    phases = dict(critic=args.critic_steps, behavior=args.behavior_steps, policy=args.steps)
    if args.reuse:
        phases |= dict(critic=0, behavior=0)
    run = Run(args, learners, data, __file__, PROTOCOL, phases)

    def at_end():
        if args.reuse:
            load_models(learners)  # again: a resumed run may have no checkpoint yet

    update = capture(learners, "critic_update")
    for _ in run.updates("critic"):
        update()
    update = capture(learners, "behavior_update")
    for _ in run.updates("behavior", at_end=at_end):
        update()
    update = capture(learners, "policy_update")
    for _ in run.updates("policy", evaluate=True):
        update()
    run.finish()


if __name__ == "__main__":
    cli(main)
