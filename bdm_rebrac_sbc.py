"""Bellman Diffusion Models (BDM): ReBRAC with State Behaviour Cloning (ReBRAC-SBC), and SBC alone

Liam Schramm, Abdeslam Boularias: "Bellman Diffusion Models for Offline Reinforcement Learning", arXiv:2407.12163.
Author's code, to which the paper does not link: github.com/schrammlb2/Bellman-Diffusion-Offline-RL, commit 384666e.

    python bdm_rebrac_sbc.py                          # built-in HalfCheetah data, minutes on a CPU core
    python bdm_rebrac_sbc.py --env hopper-medium-v2   # the paper's run
    python bdm_rebrac_sbc.py --env hopper-medium-v2 --sbc-only         # imitation: no critics, no rewards (App. C)
    python bdm_rebrac_sbc.py --env hopper-medium-v2 --w-s 0            # without the state term: ReBRAC
    python bdm_rebrac_sbc.py --env hopper-medium-v2 --bdm-only data    # only the model of the data's future states

A diffusion model eps of the successor state measure d(s_f | s, a), the law of the state at which a policy stops that
stops after each step with probability 1 - gamma, is learnt by temporal differences. The actor then clones not only the
data's actions but, through the model, the states that followed in the data.

    noised      x_i(s) = sqrt(abar_i) s + sqrt(1 - abar_i) n,  n ~ N(0, I),  i uniform over K = 10 levels
    BDM         L_BDM = E (1 - gamma) |eps(x_i(s'), s, a, i) - n|^2
                        + gamma |eps(x_i(s_f), s, a, i) - eps'(x_i(s_f), s', a', i)|^2                 Alg. 1
                a' = pi'(s') + clipped noise;  s_f ~ d'(. | s', a') by the reverse chain of eps'
    critic      L_Q = E (r + gamma (min(Q1', Q2')(s', a') - beta_c |a' - a'_data|^2) - Q_j(s, a))^2    ReBRAC
    action      L_a = E |pi(s) - a|^2                                                                  Alg. 2
    state       L_s = E eta_i |eps'(x_i(s_f), s, pi(s), i) - n|^2,  s_f from the data's future of s    Alg. 2
    actor       L = -E Q1(s, pi(s)) / mean |Q1| + w_a L_a + c_s L_s                                    Alg. 2

Where: Sec. 4.2's x_i in `noised`; Alg. 1 in `bdm_step`: a' `next_action`, s_f `reverse_chain`, L_1, L_2 and L
`bdm_loss`; Alg. 2 (App. A, eq. 1) in `actor_step`: L_a, L_Q and L there, s_f `Futures.draw`, L_s `state_loss`, eta_i
(Lemma) `level_weights`; ReBRAC's target `critic_targets`; draws from d (Sec. 4.2) `sample_futures`; App. B `table3`.

Everything trains together. Critics and BDM learn in every update; the actor and all targets (', rate tau) in every
second. To act: pi(s). States are z-scored, since the chain starts from N(0, I).

What w_s means: --w-s is the number of the paper's Table 4. The author's code multiplies by it twice, so what acts is
c_s = w_s^2 (--state-weight linear: w_s). The code also scales eta to mean 1, which puts 99 % of the weight on the
noisiest level, where nothing is to be learnt; only 0.8 % of the pull of equal weights is left, so --eta uniform with
--c-s 0.0079 c_s pulls as hard on average. A run prints its c_s, and args.json holds it.

What BDM adds: compare with --w-s 0, the author's ReBRAC, for which no BDM is computed. ReBRAC as its own authors run it
(but for initial weights) takes w_a and beta_c from their table, for example for hopper-medium: --w-s 0 --w-a 0.01
--critic-bc 0.01 --actor-lr 1e-3 --critic-bc-reduce none --actor-q min --critic-wd 0 --no-normalize-states. Datasets
that the paper did not run have these settings by default.

Differences between paper, author's code and this file (which follows the code, except where it says "here"):
 1. L_s has weight w_s in the paper, w_s^2 in the code: --state-weight linear, or --c-s.
 2. eta is beta^2 alpha (1 - alpha) in Alg. 2. In the code it is beta / (alpha (1 - abar)), which the Lemma gives for
    variance beta, divided by its mean over the batch; here by that over the levels, 100.854. --eta paper, uniform, or
    drop-last: the code's weights without the noisiest level.
 3. L_s reads eps in Alg. 2, the target eps' in the code: --actor-bdm online.
 4. Alg. 2 adds min Q to the loss (a slip of sign); the code climbs Q1, scaled as in TD3+BC. ReBRAC: --actor-q min.
 5. Alg. 2 draws a_pi with noise and divides L_a by 2 sigma^2; the code has neither, so that w_a has ReBRAC's scale.
 6. The code subtracts the critics' penalty [B] from values [B, 1] and averages over [B, B]: each sample is given the
    mean penalty, a constant. ReBRAC: --critic-bc-reduce none. hopper-medium-replay has beta_c 0 (ReBRAC 0.5).
 7. "Hyperparameters from ReBRAC", but the code z-scores states and adds L2 decay 1e-3 to the critics' Adam.
 8. One s_f per row in Alg. 2, 16 in the code: --num-futures 1.
 9. Here s_f is G ~ Geometric(1 - gamma) steps on, in the row's own episode; an episode that terminates stays in its
    last state, and what lies beyond a time limit is left out. The code takes G + 1 steps, across time limits too, and
    leaves out what lies beyond a terminal: --futures official.
10. Alg. 1 and 2 print alpha_i for abar_i; Sec. 4.2 draws s_f from d(. | s, a), but Alg. 1, right, from d(. | s', a');
    the last formula of Sec. 4.2 leaves (s, a) out of the first eps, Alg. 1 does not.
11. The paper has no sampler. The code's calls the network one level above the level it steps from, so that samples
    shrink: N(1, 1) comes out with mean 0.76, here 0.98. --sampler official; ddim is new and needs 5 calls, not 9.
12. The BDM ignores terminals in paper and code; here a terminal s' stays for ever: gamma (1 - terminal).
13. The code starts the reverse chain at the very n that then noises s' and s_f; here at a draw of its own.
14. SBC has "the same hyperparameters" in App. C, but the code's script leaves out w_Q of Table 3, by which w_a and w_s
    are divided. Without Q only c_s / w_a matters, so --sbc-only multiplies c_s by w_Q here: --w-q 1 for the paper.
15. Sec. 4.2 has 99 % less variance than a Monte Carlo target: of the target, that is exact only on average over a
    stationary law of s; of the gradient, (1 - gamma)^2 is left where d does not depend on (s, a), and more with a
    network, whose errors at (s, a) and (s', a') differ.

To lift this file out: bring your own `load_dataset` (`rows` and `split`, which names their six columns as in `Batch`;
`episode` [N], an index that changes where an episode ends; `obs_dim`, `action_dim`, `max_action`), `parse_args`, `Run`,
`capture`, `Metrics`; the README has 20 lines.
"""

import copy
import functools
import math
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F

from common import (
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
    batch_size: int = 1024

    # ReBRAC-SBC
    sbc_only: bool = False
    """Imitation alone: no critics, no L_Q (App. C)."""
    bdm_only: str | None = None
    """Train only the BDM: `data` for that of the data's policy, or the folder of a run for that of its policy."""
    gamma: float = 0.99
    """Discount, of rewards and of future states."""
    tau: float = 0.005
    """Rate of all target networks."""
    actor_lr: float = 1e-3
    """lr_pi in Table 4."""
    bdm_lr: float = 1e-3
    """lr_diffusion in Table 4."""
    critic_lr: float = 1e-3
    """Learning rate of the critics."""
    critic_wd: float = 1e-3
    """L2 weight decay of the critics (ReBRAC: 0)."""
    w_a: float = 0.01
    """Weight of cloning actions, Table 4."""
    w_s: float = 0.01
    """Weight of cloning states as in Table 4; 0 for ReBRAC without a BDM."""
    state_weight: Literal["square", "linear"] = "square"
    """L_s enters with c_s = w_s^2 (author's code) or w_s (Alg. 2)."""
    c_s: float | None = None
    """What really multiplies L_s; follows from --w-s and --state-weight unless given."""
    w_q: float = 1.0
    """w_Q in Table 3, already in w_a and w_s; --sbc-only takes it out again: c_s = w_s^2 w_Q."""
    eta: Literal["code", "uniform", "paper", "drop-last"] = "code"
    """eta_i, weight of noise level i in L_s."""
    actor_bdm: Literal["target", "online"] = "target"
    """The BDM that L_s reads."""
    num_futures: int = 16
    """Future states per row in L_s."""
    futures: Literal["corrected", "official"] = "corrected"
    """How they are drawn from the data (difference 9)."""
    sampler: Literal["start8", "official", "ddim"] = "start8"
    """Reverse chain that draws s_f in L_BDM (difference 11)."""
    critic_bc: float = 0.01
    """beta_c, weight of ReBRAC's penalty in the critics' target."""
    critic_bc_reduce: Literal["mean", "none"] = "mean"
    """That penalty: mean of the batch (author's code) or of each sample (ReBRAC)."""
    actor_q: Literal["q1", "min"] = "q1"
    """Q in the actor's loss: Q1 (author's code) or min(Q1, Q2) (ReBRAC)."""
    normalize_states: bool = True
    """z-score the states (ReBRAC does not; the BDM needs it)."""
    reward_scale: float = 1.0
    """Multiplies every reward (ReBRAC on AntMaze: 100)."""
    hidden: int = 256
    """Width of actor and critics."""
    bdm_hidden: int = 512
    """Width of the BDM."""


def table3(w_a0, critic_bc, w_sa, omega, w_q):
    """Table 4 from Table 3: w_a0 and critic_bc are ReBRAC's, w_sa the state weight relative to w_a, omega slows."""
    w_a, lr = w_a0 / w_q, 1e-3 / omega
    return dict(w_a=w_a, w_s=w_sa * w_a, w_q=w_q, critic_bc=critic_bc, actor_lr=lr, bdm_lr=lr)


PAPER = {  # Table 3; ReBRAC's two coefficients from its Table of best hyperparameters, as in the author's configs
    "halfcheetah-medium-v2": table3(0.001, 0.01, 100, 10, 1),
    "halfcheetah-expert-v2": table3(0.01, 0.01, 1, 1, 1),
    "halfcheetah-medium-expert-v2": table3(0.01, 0.1, 1, 1, 1),
    "halfcheetah-medium-replay-v2": table3(0.01, 0.001, 10, 10, 10),
    "hopper-medium-v2": table3(0.01, 0.01, 100, 100, 2),
    "hopper-expert-v2": table3(0.1, 0.1, 1, 10, 1),
    "hopper-medium-expert-v2": table3(0.1, 0.01, 100, 100, 1),
    "hopper-medium-replay-v2": table3(0.05, 0.0, 100, 100, 10),
    "walker2d-medium-v2": table3(0.05, 0.1, 1, 100, 2),
    "walker2d-expert-v2": table3(0.01, 0.5, 10, 100, 1),
    "walker2d-medium-expert-v2": table3(0.01, 0.01, 1, 1, 1),
    "walker2d-medium-replay-v2": table3(0.05, 0.01, 100, 100, 4),
}


def rebrac(w_a, critic_bc, **more):
    """ReBRAC as its authors run it."""
    return dict(w_s=0.0, w_a=w_a, critic_bc=critic_bc, critic_bc_reduce="none", actor_q="min", critic_wd=0.0,
                normalize_states=False, **more)  # fmt: skip


MAZE = dict(batch_size=256, actor_lr=3e-4, critic_lr=5e-5, gamma=0.999, reward_scale=100.0, eval_episodes=100)
PEN = dict(batch_size=256, actor_lr=3e-4, critic_lr=3e-4)
REBRAC = {  # not in the paper: ReBRAC's own settings (CORL, eeeeef2, configs/offline/rebrac), no state term
    "halfcheetah-random-v2": rebrac(0.001, 0.1),
    "halfcheetah-full-replay-v2": rebrac(0.001, 0.1),
    "hopper-random-v2": rebrac(0.001, 0.01),
    "hopper-full-replay-v2": rebrac(0.01, 0.01),
    "walker2d-random-v2": rebrac(0.01, 0.0),
    "walker2d-full-replay-v2": rebrac(0.01, 0.01),
    "antmaze-umaze-v2": rebrac(0.003, 0.002, **MAZE),
    "antmaze-umaze-diverse-v2": rebrac(0.003, 0.001, **MAZE),
    "antmaze-medium-play-v2": rebrac(0.001, 0.0005, **MAZE),
    "antmaze-medium-diverse-v2": rebrac(0.001, 0.0, **MAZE),
    "antmaze-large-play-v2": rebrac(0.002, 0.001, **MAZE),
    "antmaze-large-diverse-v2": rebrac(0.002, 0.002, **MAZE),
    "pen-human-v1": rebrac(0.1, 0.5, **PEN),
    "pen-cloned-v1": rebrac(0.05, 0.5, **PEN),
    "pen-expert-v1": rebrac(0.01, 0.01, **PEN),
}
DEMO = dict(hidden=64, bdm_hidden=64, batch_size=128, num_futures=4, gamma=0.95, tau=0.02, w_a=0.1, w_s=0.1,
            eval_every=2_000, log_every=500)  # fmt: skip
OURS = {  # settings of this project: built-in data on two CPU cores
    "halfcheetah-demo-medium-replay": DEMO | dict(steps=16_000),
    "pendulum-demo-medium": DEMO | dict(steps=4_000, eval_every=1_000),
}
PUBLISHED = {  # Table 2
    "halfcheetah-medium-v2": 65.0, "halfcheetah-expert-v2": 105.9, "halfcheetah-medium-expert-v2": 105.8,
    "halfcheetah-medium-replay-v2": 54.7, "hopper-medium-v2": 101.6, "hopper-expert-v2": 111.5,
    "hopper-medium-expert-v2": 107.3, "hopper-medium-replay-v2": 101.1, "walker2d-medium-v2": 88.7,
    "walker2d-expert-v2": 111.8, "walker2d-medium-expert-v2": 110.7, "walker2d-medium-replay-v2": 87.9,
}  # fmt: skip
PUBLISHED_SBC = {  # Table 5
    "halfcheetah-medium-v2": 42.21, "halfcheetah-expert-v2": 93.05, "halfcheetah-medium-expert-v2": 69.07,
    "halfcheetah-medium-replay-v2": 36.67, "hopper-medium-v2": 65.40, "hopper-expert-v2": 111.46,
    "hopper-medium-expert-v2": 86.10, "hopper-medium-replay-v2": 43.93, "walker2d-medium-v2": 73.73,
    "walker2d-expert-v2": 108.51, "walker2d-medium-expert-v2": 95.55, "walker2d-medium-replay-v2": 33.11,
}  # fmt: skip
PROTOCOL = "last evaluation, 10 episodes; number of seeds not stated, 4 in the author's job scripts"

POLICY_NOISE, NOISE_CLIP = 0.2, 0.5  # of a' (TD3, ReBRAC)


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
            layers += [EnsembleLinear(2, width, hidden), nn.ReLU(), EnsembleLayerNorm(2, hidden)]
            width = hidden
        self.net = nn.Sequential(*layers, EnsembleLinear(2, hidden, 1))

    def forward(self, obs, action):
        x = torch.cat([obs, action], dim=-1)
        return self.net(x.expand(2, *x.shape)).squeeze(-1)


class Actor(nn.Module):
    """Deterministic policy pi: obs [B, S] -> action [B, A]."""

    def __init__(self, obs_dim, action_dim, hidden, max_action):
        super().__init__()
        layers, width = [], obs_dim
        for _ in range(3):
            layers += [nn.Linear(width, hidden), nn.ReLU()]
            width = hidden
        self.net = nn.Sequential(*layers, nn.Linear(hidden, action_dim))
        self.max_action = max_action

    def forward(self, obs):
        return self.max_action * torch.tanh(self.net(obs))


class NoiseModel(nn.Module):
    """eps of the BDM: noised state x [..., S], condition obs [..., S], action [..., A], level [..., 1] -> [..., S]."""

    def __init__(self, obs_dim, action_dim, hidden):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(2 * obs_dim + 1 + action_dim, hidden), nn.ReLU(), nn.LayerNorm(hidden),
            nn.Linear(hidden, hidden), nn.ReLU(), nn.LayerNorm(hidden),
            nn.Linear(hidden, obs_dim),
        )  # fmt: skip

    def forward(self, x, obs, action, level):
        return self.net(torch.cat([x, obs, 2 * level / K - 1, action], dim=-1))


def cosine_schedule(levels):
    """beta_i and abar_i of each level, 0 the least noisy: squared cosine with beta cut to 0.999, in float64."""
    u = torch.linspace(0, 1, levels + 1, dtype=torch.float64)
    f = torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
    beta = (1 - f[1:] / f[:-1]).clamp(max=0.999)
    return beta, torch.cumprod(1 - beta, dim=0)


K = 10  # noise levels (author's code; the paper does not say)
BETA, ABAR = cosine_schedule(K)


def level_weights(eta):
    """eta_i for the squared error of the noise at each level, [K] (difference 2)."""
    if eta == "uniform":
        return torch.ones(K)
    if eta == "paper":
        return (BETA**2 * (1 - BETA) * BETA).float()  # alpha = 1 - beta
    weights = BETA / ((1 - BETA) * (1 - ABAR))
    weights = weights / weights.mean()
    if eta == "drop-last":
        weights[-1] = 0
    return weights.float()


@functools.cache
def abar_on(device, dtype):
    """ABAR on a device; kept there, because a captured update cannot copy it from the host."""
    return ABAR.to(device, dtype)


def noised(x, noise, level):
    """x_i = sqrt(abar_i) x + sqrt(1 - abar_i) noise: x, noise [..., S], level [..., 1] -> [..., S]."""
    abar = abar_on(x.device, x.dtype)[level]
    return abar.sqrt() * x + (1 - abar).sqrt() * noise


def reverse_chain(net, x, obs, action, generator, sampler="start8"):
    """A state from the model: x ~ N(0, I) [B, S] -> s_f [B, S], for the condition obs [B, S], action [B, A].

    start8: DDPM's chain from level 8, 9 calls. At level 9, where beta was cut, the next x would hold 32 times the error
    of the network. official: each call reads the network one level too high. ddim: levels 8, 6, 4, 2, 0, without noise.
    """
    beta, abar = BETA.tolist(), ABAR.tolist()
    stride = 2 if sampler == "ddim" else 1
    for i in range(K - 2, -1, -stride):
        level = torch.full((len(x), 1), i + (sampler == "official"), device=x.device)
        noise = net(x, obs, action, level)
        abar_next = abar[i - stride] if i else 1.0
        clean = (x - (1 - abar[i]) ** 0.5 * noise) / abar[i] ** 0.5
        if sampler == "ddim":
            x = abar_next**0.5 * clean + (1 - abar_next) ** 0.5 * noise
            continue
        x = (abar_next**0.5 * beta[i] * clean + (1 - beta[i]) ** 0.5 * (1 - abar_next) * x) / (1 - abar[i])
        if i:
            variance = beta[i] * (1 - abar_next) / (1 - abar[i])
            x = x + variance**0.5 * torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator)
    return x


def bdm_loss(net, target_net, obs, action, next_obs, next_action, future, discount, generator):
    """L_BDM, Alg. 1. future [B, S]: s_f from the target model at (s', a'); discount [B]: gamma, 0 at terminals.

    A discount of 0 leaves the plain diffusion loss on next_obs: a terminal state is its own future.
    """
    level = torch.randint(K, (len(obs), 1), device=obs.device, generator=generator)
    noise = torch.randn(obs.shape, dtype=obs.dtype, device=obs.device, generator=generator)
    x_next, x_future = noised(next_obs, noise, level), noised(future, noise, level)
    with torch.no_grad():
        target = target_net(x_future, next_obs, next_action, level)
    both = net(torch.cat([x_next, x_future]), obs.repeat(2, 1), action.repeat(2, 1), level.repeat(2, 1))
    of_next, of_future = both.chunk(2)
    discount = discount.unsqueeze(-1)
    return ((1 - discount) * (of_next - noise) ** 2 + discount * (of_future - target) ** 2).mean()


def state_loss(net, obs, action, futures, valid, weights, generator):
    """L_s, Alg. 2: futures [B, k, S], valid [B, k, 1] of 0 and 1, weights [K]; its gradient is that in `action`."""
    b, k, _ = futures.shape
    level = torch.randint(K, (b, k, 1), device=obs.device, generator=generator)
    noise = torch.randn(futures.shape, dtype=obs.dtype, device=obs.device, generator=generator)
    obs, action = (x.unsqueeze(1).expand(b, k, x.shape[-1]) for x in (obs, action))
    error = net(noised(futures, noise, level), obs, action, level) - noise
    return (valid * weights[level] * error**2).sum(-1).mean()


def critic_targets(q_next, penalty, batch, gamma, critic_bc, reduce):
    """ReBRAC's target: q_next [B] of the target critics at a', penalty [B] = |a' - a'_data|^2 (difference 6)."""
    if reduce == "mean":
        penalty = ((1 - batch.terminal) * penalty).mean()
    return batch.reward + gamma * (1 - batch.terminal) * (q_next - critic_bc * penalty)


def state_coefficient(args):
    """c_s, what really multiplies L_s (differences 1 and 14)."""
    if args.c_s is not None:
        return args.c_s
    if args.state_weight == "linear":
        return args.w_s
    return args.w_s**2 * (args.w_q if args.sbc_only else 1)


class Futures:
    """The data's own future states, G ~ Geometric(1 - gamma) steps after a row (difference 9)."""

    def __init__(self, data, gamma, kind):
        data.need_order("next actions and the states that follow")
        self.data, self.gamma, self.kind = data, gamma, kind
        rows = torch.arange(len(data), device=data.rows.device)
        ends = torch.cat([data.episode.diff() != 0, torch.ones_like(data.episode[:1], dtype=torch.bool)])
        self.last = rows[ends][torch.searchsorted(rows[ends], rows)]  # last row of each row's episode
        self.terminals = data.terminal.cumsum(0)

    def draw(self, index, k, generator):
        """For rows `index` [B]: k future states each, [B, k, S], and 1 where there is one, else 0, [B, k, 1]."""
        index, data = index.unsqueeze(1), self.data
        u = 1 - torch.rand(len(index), k, device=index.device, generator=generator)  # in (0, 1]
        steps = 1 + (u.log() / math.log(self.gamma)).long()  # G = 1, 2, ...
        if self.kind == "official":
            row = index + steps + 1
            inside = row.clamp(max=len(data) - 1)
            valid = (row == inside) & (self.terminals[inside] == self.terminals[index])
            return data.obs[inside], valid.unsqueeze(-1).float()
        row, last = index + steps - 1, self.last[index]
        valid = (row <= last) | (data.terminal[last] == 1)
        return data.next_obs[torch.minimum(row, last)], valid.unsqueeze(-1).float()


class BDM:
    """All that belongs to one seed: networks, optimisers, the update, acting, and sampling future states."""

    def __init__(self, args, data, seed):
        self.args, self.data = args, data
        device = torch.device(args.device)
        self.generator = torch.Generator(device).manual_seed(seed)
        self.metrics = Metrics()
        torch.manual_seed(seed)
        obs_dim, action_dim = data.obs_dim, data.action_dim
        self.actor = Actor(obs_dim, action_dim, args.hidden, data.max_action).to(device)
        self.critic = Critic(obs_dim, action_dim, args.hidden).to(device)
        self.bdm = NoiseModel(obs_dim, action_dim, args.bdm_hidden).to(device)
        self.actor_target = copy.deepcopy(self.actor).requires_grad_(False)
        self.critic_target = copy.deepcopy(self.critic).requires_grad_(False)
        self.bdm_target = copy.deepcopy(self.bdm).requires_grad_(False)

        def adam(params, lr, weight_decay=0.0):
            lr = torch.tensor(lr, device=device)  # a tensor, so that a captured update sees it change
            return torch.optim.Adam(
                params, lr, weight_decay=weight_decay, fused=True, capturable=device.type == "cuda"
            )  # fmt: skip

        self.actor_opt = adam(self.actor.parameters(), args.actor_lr)
        self.critic_opt = adam(self.critic.parameters(), args.critic_lr, args.critic_wd)
        self.bdm_opt = adam(self.bdm.parameters(), args.bdm_lr)
        self.obs_mean, self.obs_std = torch.zeros(obs_dim, device=device), torch.ones(obs_dim, device=device)
        self.state = dict(
            actor=self.actor, critic=self.critic, bdm=self.bdm, actor_target=self.actor_target,
            critic_target=self.critic_target, bdm_target=self.bdm_target, actor_opt=self.actor_opt,
            critic_opt=self.critic_opt, bdm_opt=self.bdm_opt, obs_mean=self.obs_mean, obs_std=self.obs_std,
            generator=self.generator,
        )  # fmt: skip

        self.c_s = state_coefficient(args)
        self.eta = level_weights(args.eta).to(device)
        self.has_actor = args.bdm_only is None
        self.has_critic = self.has_actor and not args.sbc_only
        self.has_bdm = self.c_s != 0 or not self.has_actor
        pairs = self.has_actor * [(self.actor_target, self.actor)]
        pairs += self.has_critic * [(self.critic_target, self.critic)]
        pairs += self.has_bdm * [(self.bdm_target, self.bdm)]
        self.targets = [param for target, _ in pairs for param in target.parameters()]
        self.online = [param for _, net in pairs for param in net.parameters()]

    def use_data(self, futures, mean, std):
        """What training takes from the data: future states, and the scale of observations, which a policy keeps."""
        self.futures = futures
        self.obs_mean.copy_(mean)
        self.obs_std.copy_(std)

    def update(self):
        """Two updates: critics and BDM in both; actor and all targets in the first."""
        for delayed in (False, True):
            index = torch.randint(
                len(self.data.rows), (self.args.batch_size,), device=self.generator.device, generator=self.generator
            )
            batch = self.data.split(self.data.rows[index])
            next_action = self.next_action(batch) if self.has_critic or self.has_bdm else None
            if self.has_critic:
                self.critic_step(batch, next_action)
            if self.has_bdm:
                self.bdm_step(batch, next_action)
            if delayed:
                continue
            if self.has_actor:
                self.actor_step(batch, index)
            with torch.no_grad():
                torch._foreach_lerp_(self.targets, self.online, self.args.tau)

    @torch.no_grad()
    def next_action(self, batch):
        """a' of critics and BDM: the target actor's with clipped noise (TD3); the data's with --bdm-only."""
        if not self.has_actor:
            return batch.next_action
        noise = POLICY_NOISE * torch.randn(batch.action.shape, device=batch.action.device, generator=self.generator)
        action = self.actor_target(batch.next_obs) + noise.clamp(-NOISE_CLIP, NOISE_CLIP)
        return action.clamp(-self.data.max_action, self.data.max_action)

    def critic_step(self, batch, next_action):
        args = self.args
        with torch.no_grad():
            q_next = self.critic_target(batch.next_obs, next_action).amin(0)
            penalty = ((next_action - batch.next_action) ** 2).sum(-1)
            target = critic_targets(q_next, penalty, batch, args.gamma, args.critic_bc, args.critic_bc_reduce)
        q = self.critic(batch.obs, batch.action)
        critic_loss = ((q - target) ** 2).mean(1).sum()
        self.critic_opt.zero_grad()
        critic_loss.backward()
        self.critic_opt.step()
        self.metrics.add(critic_loss=critic_loss, q=q.mean())

    def bdm_step(self, batch, next_action):
        with torch.no_grad():
            start = torch.randn(batch.obs.shape, device=batch.obs.device, generator=self.generator)
            future = reverse_chain(
                self.bdm_target, start, batch.next_obs, next_action, self.generator, self.args.sampler
            )  # fmt: skip
        discount = self.args.gamma * (1 - batch.terminal)
        loss = bdm_loss(self.bdm, self.bdm_target, batch.obs, batch.action, batch.next_obs, next_action, future,
                        discount, self.generator)  # fmt: skip
        self.bdm_opt.zero_grad()
        loss.backward()
        self.bdm_opt.step()
        self.metrics.add(bdm_loss=loss)

    def actor_step(self, batch, index):
        args = self.args
        action = self.actor(batch.obs)
        bc_loss = ((action - batch.action) ** 2).sum(-1).mean()  # L_a
        actor_loss = args.w_a * bc_loss
        if self.has_bdm:
            net = self.bdm_target if args.actor_bdm == "target" else self.bdm
            futures, valid = self.futures.draw(index, args.num_futures, self.generator)
            cloning_loss = state_loss(net, batch.obs, action, futures, valid, self.eta, self.generator)
            actor_loss = actor_loss + self.c_s * cloning_loss
            self.metrics.add(state_loss=cloning_loss)
        if self.has_critic:
            q = self.critic(batch.obs, action)
            q = q[0] if args.actor_q == "q1" else q.amin(0)
            actor_loss = actor_loss - q.mean() / q.abs().mean().detach()
        self.actor_opt.zero_grad()
        actor_loss.backward(inputs=list(self.actor.parameters()))  # critics and BDM stay as they are
        self.actor_opt.step()
        self.metrics.add(actor_loss=actor_loss, bc_loss=bc_loss)

    def act(self, obs, generator):
        """[n, S] -> [n, A]; `generator` is not needed, pi is deterministic."""
        return self.actor((obs - self.obs_mean) / self.obs_std)

    @torch.no_grad()
    def sample_futures(self, obs, action, generator):
        """One future state s_f ~ d(. | s, a) for each row: obs [B, S], action [B, A] -> [B, S], in the data's units."""
        obs = (obs - self.obs_mean) / self.obs_std
        start = torch.randn(obs.shape, device=obs.device, generator=generator)
        future = reverse_chain(self.bdm_target, start, obs, action, generator, self.args.sampler)
        return future * self.obs_std + self.obs_mean


def load_learner(folder, device="cpu"):
    """The learner of a finished run of this script, without its data."""
    checkpoint, saved = load_checkpoint(folder, device), saved_args(folder, Args)
    if "w_s" not in saved:
        raise UserError(f"{folder} is not a run of this script")
    learner = BDM(replace(Args(), **saved | dict(device=device)), SimpleNamespace(**checkpoint["dims"]), 0)
    set_state(learner.state, checkpoint["learner"])
    return learner


def sample_futures(folder, obs, action, n=100, seed=0, device="cpu"):
    """Future states of a run's policy: the state after G ~ Geometric(1 - gamma) steps that begin with `action`.

    folder: of a run with a BDM, such as `runs/bdm_rebrac_sbc/hopper-medium-v2/seed0`
    obs [B, S], action [B, A]: numpy arrays, states as the environment gives them, actions in [-1, 1]
    Returns a numpy array [B, n, S]. A reward of states r(s) has Q(s, a) = mean of r over n, divided by 1 - gamma.
    """
    learner = load_learner(folder, device)
    if not learner.has_bdm:
        raise UserError(f"{folder} was made with --w-s 0 and holds no model of future states")
    rows = (torch.as_tensor(x, dtype=torch.float32, device=device).repeat_interleave(n, 0) for x in (obs, action))
    future = learner.sample_futures(*rows, torch.Generator(device).manual_seed(seed))
    return future.view(-1, n, learner.data.obs_dim).cpu().numpy()


def draw_futures(learner, path):
    """Future states in the data (grey) and from the BDM (red) for three rows, in the two widest dimensions."""
    data, dims = learner.data, learner.obs_std.topk(2).indices.tolist() if learner.data.obs_dim > 1 else [0, 0]
    index = torch.tensor([1, 3, 5], device=learner.generator.device) * len(data) // 7
    generator = torch.Generator(index.device).manual_seed(0)
    true, valid = learner.futures.draw(index, 500, generator)
    true, start = (x * learner.obs_std + learner.obs_mean for x in (true, data.obs[index]))
    conditions = (x.repeat_interleave(500, 0) for x in (start, data.action[index]))
    sampled = learner.sample_futures(*conditions, generator).view(3, 500, -1)

    def panel(k):
        def draw(axes):
            axes.scatter(*true[k][valid[k, :, 0] == 1][:, dims].cpu().T, c="grey", s=6, label="data")
            axes.scatter(*sampled[k][:, dims].cpu().T, c="red", s=3, alpha=0.5, label="BDM")
            axes.scatter(*start[k, dims].cpu(), c="black", marker="x", label="s")
            axes.set(title=f"future states of row {index[k]:,}", xlabel=f"state {dims[0]}", ylabel=f"state {dims[1]}")
            axes.legend(fontsize=8)

        return draw

    save_figure(path, *map(panel, range(3)))


def standardize(data):
    """z-score obs and next_obs in place; returns mean and standard deviation [S]."""
    mean, std = data.obs.mean(0), data.obs.std(0, correction=0) + 1e-3
    for states in (data.obs, data.next_obs):
        states.sub_(mean).div_(std)
    return mean, std


def use_policy(folder, data, device):
    """Put the actions of a run's policy in the place of the data's next actions."""
    learner = load_learner(folder, device)
    if not learner.has_actor:
        raise UserError(f"{folder} was made with --bdm-only and holds no policy")
    if (learner.data.obs_dim, learner.data.action_dim) != (data.obs_dim, data.action_dim):
        raise UserError(f"{folder} ran on {learner.args.env}, which has other states or actions than {data.name}")
    with torch.no_grad():
        for rows in torch.arange(len(data)).split(100_000):
            data.next_action[rows] = learner.act(data.next_obs[rows].to(device), None).to(data.rows.device)


def check(args):
    if not 0 < args.gamma < 1:
        raise UserError(f"--gamma must be between 0 and 1, found {args.gamma}")
    if args.bdm_only and args.sbc_only:
        raise UserError("--bdm-only trains no policy, --sbc-only trains one: give one of them")
    if args.bdm_only and args.evaluate:
        raise UserError(f"{args.evaluate} was made with --bdm-only and holds no policy to evaluate")


def describe_weights(args):
    """The line at the start of a run that says how much the state term weighs."""
    if args.bdm_only:
        return f"only the BDM, of the policy in {args.bdm_only}"
    if args.c_s == 0:
        return f"no state term, no BDM: plain {'behaviour cloning' if args.sbc_only else 'ReBRAC'}, w_a {args.w_a:g}"
    name = "SBC" if args.sbc_only else "ReBRAC-SBC"
    return f"{name}: w_a {args.w_a:g}, w_s {args.w_s:g} (as in Table 4); in the loss c_s = {args.c_s:g} multiplies L_s"


def main():
    args = parse_args(Args, PAPER | REBRAC | OURS, doc=__doc__)
    check(args)
    if args.evaluate:
        return evaluate_run(args, BDM)
    args.c_s = state_coefficient(args)
    if args.env in REBRAC:
        print(f"note: the paper did not run {args.env}; its settings are ReBRAC's, with w_s = 0 unless given")
    print(describe_weights(args))
    data = load_dataset(args.env, args.data_path, judge=args.eval_episodes > 0, true_next_obs=True)
    if args.bdm_only not in (None, "data"):
        use_policy(args.bdm_only, data, args.device)
    data.reward.mul_(args.reward_scale)
    mean, std = standardize(data) if args.normalize_states else (torch.zeros(data.obs_dim), torch.ones(data.obs_dim))
    data = data.to(args.device)
    learners = [BDM(args, data, seed) for seed in args.seed]
    futures = Futures(data, args.gamma, args.futures)
    for learner in learners:
        learner.use_data(futures, mean, std)
    published = PUBLISHED_SBC if args.sbc_only else PUBLISHED if learners[0].has_bdm else {}
    args.paper_score = published.get(args.env)
    run = Run(args, learners, data, __file__, PROTOCOL)

    update = capture(learners, "update")
    for _ in run.updates("update", args.steps, stride=2, evaluate=learners[0].has_actor):
        update()
    if learners[0].has_bdm:
        for learner, folder in zip(learners, run.folders):
            draw_futures(learner, folder / "futures.png")
    run.finish()


if __name__ == "__main__":
    cli(main)
