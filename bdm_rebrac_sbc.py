"""Bellman Diffusion Models (BDM): ReBRAC with State Behaviour Cloning (ReBRAC-SBC), SBC alone, and ReBRAC

Liam Schramm, Abdeslam Boularias: "Bellman Diffusion Models for Offline Reinforcement Learning", arXiv:2407.12163.
Author's code, to which the paper does not link: github.com/schrammlb2/Bellman-Diffusion-Offline-RL, commit 384666e
(the method's own file: 3940f95).

    python bdm_rebrac_sbc.py                                         # built-in HalfCheetah data, minutes on a CPU core
    python bdm_rebrac_sbc.py --env hopper-medium-v2                  # the paper's run: the author's algorithm, whole
    python bdm_rebrac_sbc.py --env hopper-medium-v2 --corrected      # the same without the slips of the code (below)
    python bdm_rebrac_sbc.py --env hopper-medium-v2 --sbc-only       # imitation: no critics, no rewards (App. C)
    python bdm_rebrac_sbc.py --env hopper-medium-v2 --w-s 0          # without the state term: what BDM adds
    python bdm_rebrac_sbc.py --env hopper-medium-v2 --rebrac         # ReBRAC as its own authors run it
    python bdm_rebrac_sbc.py --env hopper-medium-v2 --bdm-only data  # only the model of the data's future states

A diffusion model eps learns, by temporal differences, the successor state measure d(s_f | s, a): the law of the state
G ~ Geometric(1 - gamma) steps on. The actor then clones not only the data's actions but, through the model, the states
that followed in the data.

    noised  x_i(s) = sqrt(abar_i) s + sqrt(1 - abar_i) n,  n ~ N(0, I),  i one of K levels     Sec. 4.2  noised
    BDM     L_BDM = E (1 - gamma) |eps(x_i(s'), s, a, i) - n|^2
                    + gamma |eps(x_i(s_f), s, a, i) - eps'(x_i(s_f), s', a', i)|^2             Alg. 1    bdm_loss
            a' = pi'(s') + clipped noise;  s_f ~ d'(. | s', a') by the reverse chain of eps'             reverse_chain
    critic  L_c = E (r + gamma (1 - terminal) (min(Q1', Q2')(s', a') - beta_c |a' - a'_data|^2)
                    - Q_j(s, a))^2                                                             ReBRAC    critic_step
    action  L_a = E |pi(s) - a|^2                                                              Alg. 2    actor_step
    state   L_s = E eta_i |eps'(x_i(s_f), s, pi(s), i) - n|^2,  s_f from the future of s       Alg. 2    state_loss
    actor   L = L_Q + w_a L_a + w_s^2 L_s,  L_Q = -E Q1(s, pi(s)) / mean |Q1|                  Alg. 2    actor_step

    each update       a', critics, BDM                                                         update
    every second one  actor and all targets (', rate tau); to act: pi(s)                       update, act
    App. B            Table 4 from Table 3                                                     table4
    Sec. 4.2          draws from d of a trained model                                          sample_futures

|.|^2 is a sum over dimensions, in L_BDM their mean. States are z-scored, since the chain starts from N(0, I). Without
critics (--sbc-only, App. C) L_Q is left out.

    The paper (P) or the author's code (C)            This file, which follows C; X: with --corrected
 1. P: L_s has weight w_s                             w_s^2, multiplied twice: for P give --w-s its root
 2. P: eta = beta^2 alpha (1 - alpha)                 beta / (alpha (1 - abar)), the Lemma's for variance beta, over its
                                                      mean: 99 % of the weight is on the noisiest level, where nothing
                                                      is to be learnt, 0.8 % of the pull of equal weights is left.
                                                      --eta paper; --eta uniform, for an equal pull with 0.089 w_s.
                                                      X: the mean of the levels, 100.854, not of the batch
 3. P: L_s reads eps                                  the target eps': --actor-bdm online
 4. P: adds min Q to the loss (a slip of sign)        climbs Q1, scaled as in TD3+BC
 5. P: a_pi with noise, L_a over 2 sigma^2            neither, so that w_a has ReBRAC's scale
 6. P: one s_f per row in L_s                         16: --num-futures 1
 7. P: "hyperparameters from ReBRAC"                  z-scored states, L2 decay of the critics, beta_c 0 on
                                                      hopper-medium-replay (ReBRAC: 0.5)
 8. P: SBC with "the same hyperparameters"            w_a and w_s without w_Q of Table 3. C also moves target
                                                      critics that nothing reads; not here
 9. P: alpha_i; s_f ~ d(. | s, a), eps(s'_i, i)       abar_i; s_f ~ d(. | s', a'), as in Alg. 1; eps(s'_i, s, a, i)
10. C: s_f in L_s is G + 1 steps on, across time      X: G ~ Geometric(1 - gamma) steps on in its episode, for ever in a
    limits too and from a terminal row, none beyond   terminal state, none beyond a time limit. Where there is none
    a later terminal                                  L_s counts a zero. Share with one, C and X, on data made with
                                                      SAC: Hopper medium 0.841, 0.984; replay 0.559, 0.999;
                                                      HalfCheetah medium 1.000, 0.901
11. P: no sampler, no K. C: DDPM, K = 10, the         X: at the step's: N(1, 1) comes out with mean 0.98, not 0.76
    network called one level above the step's
12. C: the BDM ignores terminals                      X: a terminal s' is its own future: gamma (1 - terminal)
13. C: the chain starts at the n that noises s_f      X: at a draw of its own
14. C: critics' penalty [B], values [B, 1], target    X: each sample's own penalty
    [B, B]: each sample is given the mean penalty
15. ReBRAC's authors (CORL, eeeeef2): hidden biases   --rebrac, and the rows of REBRAC that TABLE3 lacks; else
    0.1, last layers within 1e-3 (pi), 3e-3 (Q)       PyTorch's start (Q 16 to 33 % higher after 250 to 1,000
                                                      updates, 2 to 5 % after 12,000)
16. They: LayerNorm's eps 1e-6; pi' follows pi from   --rebrac; else 1e-5; after its step
    before its step
17. They: raw states, no decay, each sample's         --rebrac; else see 4, 7, 14
    penalty, min(Q1, Q2)
18. P: "about 99%" of the target's variance goes      exact for the target, on average over a stationary law of s; of
                                                      the gradient (1 - gamma)^2 is left where d does not depend on
                                                      (s, a), more with a network, whose errors at (s, a) and (s', a')
                                                      differ

To lift this file out: bring `RunArgs`, `Metrics` and your data: `rows` and `split`, which names their six columns as in
`Batch`; these columns of all rows in order, and their number as `len`; `episode` [N], an index that changes where an
episode ends; `obs_dim`, `action_dim`, `max_action`. Write your own loop in place of `main`; see tests/lifted.
"""

import copy
import math
from dataclasses import dataclass
from functools import cache, partial
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
    apart,
    at_least,
    at_most,
    capture,
    cli,
    evaluate_run,
    load_dataset,
    load_run,
    parse_args,
    save_figure,
    set_state,
    useless,
)


@dataclass
class Args(RunArgs):
    batch_size: int = 1024

    # ReBRAC-SBC
    corrected: bool = False  # Without the slips of the author's code: differences 2 and 10 to 14
    sbc_only: bool = False  # Imitation alone: no critics, no L_Q (App. C)
    rebrac: bool = False  # ReBRAC as its own authors run it, without a BDM
    # Train the BDM alone, without evaluations: of the data's policy (`data`), or of a run's, by its folder
    bdm_only: str | None = None
    gamma: float = 0.99  # Discount, of rewards and of future states
    bdm_lr: float = 1e-3  # Learning rate of the BDM (lr_diffusion in Table 4)
    critic_lr: float = 1e-3  # Learning rate of the critics
    actor_lr: float = 1e-3  # Learning rate of the actor (lr_pi in Table 4)
    tau: float = 0.005  # Rate of the target networks
    w_a: float = 0.01  # Weight of cloning actions, Table 4
    w_s: float = 0.01  # Weight of cloning states, Table 4; w_s^2 multiplies L_s (difference 1). 0: no BDM
    # eta_i, weight of noise level i in L_s: as in the author's code, equal, or as in the paper (difference 2)
    eta: Literal["code", "uniform", "paper"] = "code"
    actor_bdm: Literal["target", "online"] = "target"  # The BDM that L_s reads (difference 3)
    num_futures: int = 16  # Future states per row in L_s
    critic_bc: float = 0.01  # beta_c, weight of ReBRAC's penalty in the critics' target
    hidden: int = 256  # Width of critics and actor
    bdm_hidden: int = 512  # Width of the BDM
    reward_scale: float = 1.0  # Multiplies every reward (ReBRAC on AntMaze: 100)


def table4(w_a0, critic_bc, w_sa, omega, w_q, paper_score):
    """Table 4 from Table 3: w_a0 is ReBRAC's w_a, w_sa the state weight relative to w_a, omega divides rates."""
    w_a, lr = w_a0 / w_q, 1e-3 / omega
    return dict(w_a=w_a, w_s=w_sa * w_a, critic_bc=critic_bc, actor_lr=lr, bdm_lr=lr, paper_score=paper_score)


TABLE3 = {
    # ReBRAC's w_a, beta_c (the author's configs) | w_s/a, omega, w_Q (Table 3) | score (Table 2), of SBC (Table 5)
    "halfcheetah-medium-v2": (0.001, 0.01, 100, 10, 1, 65.0, 42.21),
    "halfcheetah-expert-v2": (0.01, 0.01, 1, 1, 1, 105.9, 93.05),
    "halfcheetah-medium-expert-v2": (0.01, 0.1, 1, 1, 1, 105.8, 69.07),
    "halfcheetah-medium-replay-v2": (0.01, 0.001, 10, 10, 10, 54.7, 36.67),
    "hopper-medium-v2": (0.01, 0.01, 100, 100, 2, 101.6, 65.40),
    "hopper-expert-v2": (0.1, 0.1, 1, 10, 1, 111.5, 111.46),
    "hopper-medium-expert-v2": (0.1, 0.01, 100, 100, 1, 107.3, 86.10),
    "hopper-medium-replay-v2": (0.05, 0.0, 100, 100, 10, 101.1, 43.93),
    "walker2d-medium-v2": (0.05, 0.1, 1, 100, 2, 88.7, 73.73),
    "walker2d-expert-v2": (0.01, 0.5, 10, 100, 1, 111.8, 108.51),
    "walker2d-medium-expert-v2": (0.01, 0.01, 1, 1, 1, 110.7, 95.55),
    "walker2d-medium-replay-v2": (0.05, 0.01, 100, 100, 4, 87.9, 33.11),
}
PAPER = {env: table4(*row[:5], paper_score=row[5]) for env, row in TABLE3.items()}
SBC = {env: table4(*row[:4], w_q=1, paper_score=row[6]) for env, row in TABLE3.items()}  # for --sbc-only


def rebrac(w_a, critic_bc, **more):
    return dict(rebrac=True, w_s=0.0, w_a=w_a, critic_bc=critic_bc, **more)


MAZE = dict(batch_size=256, actor_lr=3e-4, critic_lr=5e-5, gamma=0.999, reward_scale=100.0, eval_episodes=100)
PEN = dict(batch_size=256, actor_lr=3e-4, critic_lr=3e-4)
REBRAC = {env: rebrac(*row[:2]) for env, row in TABLE3.items()} | {
    # w_a, beta_c: CORL, eeeeef2, configs/offline/rebrac; for --rebrac; rows that TABLE3 lacks also without it
    "hopper-medium-replay-v2": rebrac(0.05, 0.5),
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
    "halfcheetah-demo": DEMO | dict(steps=16_000),
    "pendulum-demo": DEMO | dict(steps=4_000, eval_every=1_000),
    "bandit": DEMO | dict(steps=4_000, eval_every=1_000, w_s=0.0),  # one state: no futures to clone
}
PROTOCOL = "last evaluation, 10 episodes; number of seeds not stated, 4 in the author's job scripts"

POLICY_NOISE, NOISE_CLIP = 0.2, 0.5  # of a' (TD3, ReBRAC)
CRITIC_DECAY = 1e-3  # L2, in the critics' Adam (ReBRAC: 0)
K = 10  # noise levels


def mlp(sizes, activation, linear=nn.Linear, norm=None):
    """Linear layers of these sizes, `activation` (and after it, `norm`) after all but the last."""
    layers = []
    for d_in, d_out in zip(sizes, sizes[1:]):
        layers += [linear(d_in, d_out), activation(), *([norm(d_out)] if norm else [])]
    return nn.Sequential(*layers[: -2 if norm else -1])


class EnsembleLinear(nn.Module):
    """n linear layers as one batched matmul: [n, B, d_in] -> [n, B, d_out], initialised like nn.Linear.

    A shorter input, [m, B, d_in], goes through the first m layers.
    """

    def __init__(self, n, d_in, d_out):
        super().__init__()
        bound = d_in**-0.5
        self.weight = nn.Parameter(torch.empty(n, d_in, d_out).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(n, 1, d_out).uniform_(-bound, bound))

    def forward(self, x):
        return torch.baddbmm(self.bias[: len(x)], x, self.weight[: len(x)])


class EnsembleLayerNorm(nn.Module):
    """LayerNorm with a gain and an offset per member: [n, B, d] -> [n, B, d], or the first m of them."""

    def __init__(self, n, d, eps=1e-5):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n, 1, d))
        self.bias = nn.Parameter(torch.zeros(n, 1, d))
        self.eps = eps

    def forward(self, x):
        x = F.layer_norm(x, x.shape[-1:], eps=self.eps)
        return torch.addcmul(self.bias[: len(x)], x, self.weight[: len(x)])


class Critic(nn.Module):
    """Q1 and Q2, or Q1 alone: obs [B, S], action [B, A] -> [members, B]."""

    def __init__(self, obs_dim, action_dim, hidden, eps=1e-5):
        super().__init__()
        sizes = [obs_dim + action_dim, hidden, hidden, hidden, 1]
        self.net = mlp(sizes, nn.ReLU, partial(EnsembleLinear, 2), partial(EnsembleLayerNorm, 2, eps=eps))

    def forward(self, obs, action, members=2):
        x = torch.cat([obs, action], dim=-1)
        return self.net(x.expand(members, *x.shape)).squeeze(-1)


class Actor(nn.Module):
    """Deterministic policy pi: obs [B, S] -> action [B, A] in [-max_action, max_action]."""

    def __init__(self, obs_dim, action_dim, hidden, max_action):
        super().__init__()
        self.max_action = max_action
        self.net = mlp([obs_dim, hidden, hidden, hidden, action_dim], nn.ReLU)

    def forward(self, obs):
        return self.max_action * torch.tanh(self.net(obs))


class NoiseModel(nn.Module):
    """eps of the BDM: noised state x [..., S], condition obs [..., S], action [..., A], level [..., 1] -> [..., S]."""

    def __init__(self, obs_dim, action_dim, hidden):
        super().__init__()
        self.net = mlp([2 * obs_dim + 1 + action_dim, hidden, hidden, obs_dim], nn.ReLU, norm=nn.LayerNorm)

    def forward(self, x, obs, action, level):
        return self.net(torch.cat([x, obs, 2 * level / K - 1, action], dim=-1))


@torch.no_grad()
def rebrac_start(net, head):
    """ReBRAC's initial weights: as PyTorch's, but hidden biases 0.1 and a last layer uniform in [-head, head]."""
    *hidden, last = [layer for layer in net if isinstance(layer, (nn.Linear, EnsembleLinear))]
    for layer in hidden:
        layer.bias.fill_(0.1)
    last.weight.uniform_(-head, head)
    last.bias.uniform_(-head, head)


def cosine_schedule(levels):
    """beta_i and abar_i of each level, 0 the least noisy: squared cosine with beta cut to 0.999, in float64."""
    u = torch.linspace(0, 1, levels + 1, dtype=torch.float64)
    f = torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
    beta = (1 - f[1:] / f[:-1]).clamp_max(0.999)
    return beta, torch.cumprod(1 - beta, dim=0)


BETA, ABAR = cosine_schedule(K)


def level_weights(eta):
    """eta_i for the squared error of the noise at each level, [K]."""
    alpha = 1 - BETA
    if eta == "uniform":
        return torch.ones(K)
    if eta == "paper":
        return (BETA**2 * alpha * (1 - alpha)).float()
    weights = BETA / (alpha * (1 - ABAR))
    return (weights / weights.mean()).float()


@cache
def abar_on(device, dtype):
    """ABAR on a device; kept there, because a captured update cannot copy it from the host."""
    return ABAR.to(device, dtype)


def noised(x, noise, level):
    """x_i = sqrt(abar_i) x + sqrt(1 - abar_i) noise, Sec. 4.2: x, noise [..., S], level [..., 1] -> [..., S]."""
    abar = abar_on(x.device, x.dtype)[level]
    return abar.sqrt() * x + (1 - abar).sqrt() * noise


def reverse_chain(net, x, obs, action, generator, corrected):
    """A state from the model: x ~ N(0, I) [B, S] -> s_f [B, S], for the condition obs [B, S], action [B, A].

    DDPM's chain from level 8. At level 9, where beta was cut, the next x would hold 32 times the error of the network.
    The author's code reads the network one level too high.
    """
    beta, abar = BETA.tolist(), ABAR.tolist()
    for i in range(K - 2, -1, -1):
        level = torch.full((len(x), 1), i if corrected else i + 1, device=x.device)
        abar_next = abar[i - 1] if i else 1.0
        clean = (x - (1 - abar[i]) ** 0.5 * net(x, obs, action, level)) / abar[i] ** 0.5
        x = (abar_next**0.5 * beta[i] * clean + (1 - beta[i]) ** 0.5 * (1 - abar_next) * x) / (1 - abar[i])
        if i:
            variance = beta[i] * (1 - abar_next) / (1 - abar[i])
            x = x + variance**0.5 * torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator)
    return x


def bdm_loss(net, target_net, batch, next_action, future, discount, level, noise):
    """L_BDM, Alg. 1. future [B, S]: s_f from the target model at (s', a'); discount [B]: gamma.

    A discount of 0 leaves the plain diffusion loss on next_obs: such a state is its own future.
    """
    x_next, x_future = noised(batch.next_obs, noise, level), noised(future, noise, level)
    with torch.no_grad():
        target = target_net(x_future, batch.next_obs, next_action, level)
    obs, action = batch.obs.repeat(2, 1), batch.action.repeat(2, 1)
    of_next, of_future = net(torch.cat([x_next, x_future]), obs, action, level.repeat(2, 1)).chunk(2)
    discount = discount.unsqueeze(-1)
    return ((1 - discount) * (of_next - noise) ** 2 + discount * (of_future - target) ** 2).mean()


def state_loss(net, obs, action, futures, weights, level, noise):
    """L_s, Alg. 2: futures, noise [B, k, S], weights, level [B, k, 1]; its gradient is that in `action`."""
    obs, action = (x.unsqueeze(1).expand(*futures.shape[:2], -1) for x in (obs, action))
    error = net(noised(futures, noise, level), obs, action, level) - noise
    return (weights * error**2).sum(-1).mean()


def rebrac_target(next_q, penalty, batch, gamma, critic_bc, own_penalty):
    """ReBRAC's target: next_q [B] of the target critics at a', penalty [B] = |a' - a'_data|^2.

    Each row has its own penalty, or all have the batch's mean with terminal rows as zeros (difference 14).
    """
    if not own_penalty:
        penalty = ((1 - batch.terminal) * penalty).mean()
    return batch.reward + gamma * (1 - batch.terminal) * (next_q - critic_bc * penalty)


class Futures:
    """The data's own future states, G ~ Geometric(1 - gamma) steps after a row (author's code: G + 1)."""

    def __init__(self, data, gamma, corrected):
        self.data, self.gamma, self.corrected = data, gamma, corrected
        length = data.episode.unique_consecutive(return_counts=True)[1]
        self.last = (length.cumsum(0) - 1).repeat_interleave(length)  # last row of each row's episode
        self.terminals = data.terminal.cumsum(0)

    def draw(self, index, k, generator):
        """For rows `index` [B]: k future states each, [B, k, S], and 1 where there is one, else 0, [B, k, 1]."""
        index, data = index.unsqueeze(1), self.data
        u = 1 - torch.rand(len(index), k, device=index.device, generator=generator)  # in (0, 1]
        steps = 1 + (u.log() / math.log(self.gamma)).long()  # G = 1, 2, ...
        if self.corrected:
            row, last = index + steps - 1, self.last[index]
            valid = (row <= last) | (data.terminal[last] == 1)
            return data.next_obs[torch.minimum(row, last)], valid.unsqueeze(-1).float()
        row = index + steps + 1
        inside = row.clamp_max(len(data) - 1)
        valid = (row == inside) & (self.terminals[inside] == self.terminals[index])
        return data.obs[inside], valid.unsqueeze(-1).float()


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


class BDM:
    """All that belongs to one seed: networks, optimisers, the update, acting, and sampling future states."""

    def __init__(self, args, data, seed):
        self.args, self.data = args, data
        device = torch.device(args.device)
        self.generator = torch.Generator(device).manual_seed(seed)
        self.metrics = Metrics()
        torch.manual_seed(seed)
        obs_dim, action_dim = data.obs_dim, data.action_dim
        self.has_critic = not args.sbc_only
        self.has_bdm = args.w_s != 0
        self.target_first = args.rebrac  # difference 16

        self.actor = Actor(obs_dim, action_dim, args.hidden, data.max_action).to(device)
        self.critic = Critic(obs_dim, action_dim, args.hidden, eps=1e-6 if args.rebrac else 1e-5).to(device)
        self.bdm = NoiseModel(obs_dim, action_dim, args.bdm_hidden).to(device)
        if args.rebrac:
            rebrac_start(self.actor.net, 1e-3)
            rebrac_start(self.critic.net, 3e-3)
        self.actor_target = copy.deepcopy(self.actor).requires_grad_(False)
        self.critic_target = copy.deepcopy(self.critic).requires_grad_(False)
        self.bdm_target = copy.deepcopy(self.bdm).requires_grad_(False)

        self.actor_opt = adam(self.actor.parameters(), args.actor_lr)
        decay = 0.0 if args.rebrac else CRITIC_DECAY
        self.critic_opt = adam(self.critic.parameters(), args.critic_lr, weight_decay=decay)
        self.bdm_opt = adam(self.bdm.parameters(), args.bdm_lr)
        self.eta = level_weights(args.eta).to(device)
        self.obs_mean, self.obs_std = torch.zeros(obs_dim, device=device), torch.ones(obs_dim, device=device)
        self.state = dict(
            actor=self.actor, actor_target=self.actor_target, actor_opt=self.actor_opt, critic=self.critic,
            critic_target=self.critic_target, critic_opt=self.critic_opt, bdm=self.bdm, bdm_target=self.bdm_target,
            bdm_opt=self.bdm_opt, obs_mean=self.obs_mean, obs_std=self.obs_std, generator=self.generator,
        )  # fmt: skip

    def use_data(self, futures, mean, std):
        """What training takes from the data: future states, and the scale of observations, which a policy keeps."""
        self.futures = futures
        self.obs_mean.copy_(mean)
        self.obs_std.copy_(std)

    def update(self):
        """Two updates: critics and BDM in both; actor and all targets in the first."""
        for i in range(2):
            index, batch = self.sample()
            next_action = self.next_action(batch) if self.has_critic or self.has_bdm else None
            if self.has_critic:
                self.critic_step(batch, next_action)
            if self.has_bdm:
                self.bdm_step(batch, next_action)
            if i == 0:
                self.actor_step(batch, index)
                if self.has_critic:
                    update_target(self.critic_target, self.critic, self.args.tau)
                if self.has_bdm:
                    update_target(self.bdm_target, self.bdm, self.args.tau)

    def sample(self):
        """Numbers and contents of random rows."""
        size, device = (self.args.batch_size,), self.generator.device
        index = torch.randint(len(self.data.rows), size, device=device, generator=self.generator)
        return index, self.data.split(self.data.rows[index])

    @torch.no_grad()
    def next_action(self, batch):
        """a' of critics and BDM: the target actor's with clipped noise (TD3)."""
        limit = self.data.max_action
        noise = POLICY_NOISE * torch.randn(batch.action.shape, device=batch.action.device, generator=self.generator)
        action = self.actor_target(batch.next_obs) + limit * noise.clamp(-NOISE_CLIP, NOISE_CLIP)
        return action.clamp(-limit, limit)

    def distance(self, action, other):
        """|a - a'|^2 in units of max_action, so that w_a and beta_c mean the same for all data."""
        return (((action - other) / self.data.max_action) ** 2).sum(-1)

    def critic_step(self, batch, next_action):
        # critics, L_c
        args = self.args
        with torch.no_grad():
            next_q = self.critic_target(batch.next_obs, next_action).amin(0)
            penalty = self.distance(next_action, batch.next_action)  # the policy's a' from the data's
            own_penalty = args.corrected or args.rebrac
            target = rebrac_target(next_q, penalty, batch, args.gamma, args.critic_bc, own_penalty)
        q = self.critic(batch.obs, batch.action)
        critic_loss = ((q - target) ** 2).mean(1).sum()

        self.critic_opt.zero_grad()
        critic_loss.backward()
        self.critic_opt.step()
        self.metrics.add(critic_loss=critic_loss, q=q.mean())

    def bdm_step(self, batch, next_action):
        args, generator, device = self.args, self.generator, batch.obs.device
        start = torch.randn(batch.obs.shape, device=device, generator=generator)
        with torch.no_grad():  # s_f
            future = reverse_chain(self.bdm_target, start, batch.next_obs, next_action, generator, args.corrected)
        level = torch.randint(K, (len(start), 1), device=device, generator=generator)
        if args.corrected:
            noise = torch.randn(start.shape, device=device, generator=generator)
            discount = args.gamma * (1 - batch.terminal)
        else:  # differences 12 and 13
            noise, discount = start, torch.full_like(batch.terminal, args.gamma)
        loss = bdm_loss(self.bdm, self.bdm_target, batch, next_action, future, discount, level, noise)
        self.bdm_opt.zero_grad()
        loss.backward()
        self.bdm_opt.step()
        self.metrics.add(bdm_loss=loss)

    def actor_step(self, batch, index):
        args = self.args
        action = self.actor(batch.obs)

        # L_a: near the data's actions
        bc_loss = self.distance(action, batch.action).mean()
        actor_loss = args.w_a * bc_loss
        self.metrics.add(bc_loss=bc_loss)

        # L_s: near the data's future states
        if self.has_bdm:
            state_loss = self.state_term(batch.obs, action, index)
            actor_loss = actor_loss + args.w_s**2 * state_loss
            self.metrics.add(state_loss=state_loss)

        # L_Q: up Q, scaled
        if self.has_critic:
            q = self.critic(batch.obs, action, members=2 if args.rebrac else 1).amin(0)
            actor_loss = actor_loss - q.mean() / q.abs().mean().detach()

        self.actor_opt.zero_grad()
        actor_loss.backward(inputs=list(self.actor.parameters()))  # critics and BDM stay as they are
        if self.target_first:
            update_target(self.actor_target, self.actor, args.tau)
        self.actor_opt.step()
        if not self.target_first:
            update_target(self.actor_target, self.actor, args.tau)
        self.metrics.add(actor_loss=actor_loss)

    def state_term(self, obs, action, index):
        """L_s with futures, levels and noise drawn for each row."""
        args, generator = self.args, self.generator
        futures, valid = self.futures.draw(index, args.num_futures, generator)
        level = torch.randint(K, valid.shape, device=obs.device, generator=generator)
        noise = torch.randn(futures.shape, device=obs.device, generator=generator)
        eta = self.eta[level]
        if args.eta == "code" and not args.corrected:
            eta = eta / eta.mean()  # difference 2
        net = self.bdm_target if args.actor_bdm == "target" else self.bdm
        return state_loss(net, obs, action, futures, valid * eta, level, noise)

    def act(self, obs, generator):
        """pi, which is deterministic: [n, S] -> [n, A]."""
        return self.actor((obs - self.obs_mean) / self.obs_std)

    @torch.no_grad()
    def sample_futures(self, obs, action, generator):
        """One future state s_f ~ d(. | s, a) for each row: obs [B, S], action [B, A] -> [B, S], in the data's units."""
        obs = (obs - self.obs_mean) / self.obs_std
        start = torch.randn(obs.shape, device=obs.device, generator=generator)
        future = reverse_chain(self.bdm_target, start, obs, action, generator, self.args.corrected)
        return future * self.obs_std + self.obs_mean


class BDMOnly(BDM):
    """--bdm-only: the BDM alone, of the data's next actions or of another run's policy."""

    def __init__(self, args, data, seed):
        super().__init__(args, data, seed)
        self.has_bdm = True
        self.policy_mean, self.policy_std = self.obs_mean.clone(), self.obs_std.clone()
        self.state |= dict(policy_mean=self.policy_mean, policy_std=self.policy_std)

    def use_policy(self, policy):
        """The actor of another run, and the scale of its observations."""
        self.actor.load_state_dict(policy.actor.state_dict())
        self.policy_mean.copy_(policy.obs_mean)
        self.policy_std.copy_(policy.obs_std)

    def update(self):
        """Two updates; the target moves in the first."""
        for i in range(2):
            _, batch = self.sample()
            self.bdm_step(batch, self.next_action(batch))
            if i == 0:
                update_target(self.bdm_target, self.bdm, self.args.tau)

    @torch.no_grad()
    def next_action(self, batch):
        if self.args.bdm_only == "data":
            return batch.next_action
        obs = batch.next_obs * self.obs_std + self.obs_mean
        return self.actor((obs - self.policy_mean) / self.policy_std)


def load_learner(folder, device="cpu"):
    """The learner of a run of this script, without its data."""
    args, checkpoint = load_run(__file__, folder, Args, device=device)
    learner = (BDMOnly if args.bdm_only else BDM)(args, SimpleNamespace(**checkpoint["dims"]), 0)
    set_state(learner.state, checkpoint["learner"])
    return learner


def load_actor(folder, data, device):
    """The learner of a run whose policy can act in `data`."""
    learner = load_learner(folder, device)
    if learner.args.bdm_only:
        raise UserError(f"{folder} was made with --bdm-only and holds no policy")
    if any(getattr(learner.data, name) != getattr(data, name) for name in ("obs_dim", "action_dim", "max_action")):
        raise UserError(f"{folder} ran on {learner.args.env}, which has other states or actions than {data.name}")
    return learner


def sample_futures(folder, obs, action, n=100, seed=0, device="cpu"):
    """Future states of a run's policy: the state after G ~ Geometric(1 - gamma) steps that begin with `action`.

    folder: of a run with a BDM, such as `runs/bdm_rebrac_sbc/hopper-medium-v2/seed0`
    obs [B, S], action [B, A]: numpy arrays, states as the environment gives them, actions in [-1, 1]
    Returns a numpy array [B, n, S]. A reward of states r(s) has Q(s, a) = mean of r over n, divided by 1 - gamma.
    """
    learner = load_learner(folder, device)
    if not learner.has_bdm:
        raise UserError(f"{folder} was made without a state term and holds no model of future states")
    rows = (torch.as_tensor(x, dtype=torch.float32, device=device).repeat_interleave(n, 0) for x in (obs, action))
    future = learner.sample_futures(*rows, torch.Generator(device).manual_seed(seed))
    return future.view(-1, n, learner.data.obs_dim).cpu().numpy()


def draw_futures(learner, path):
    """Future states in the data (grey) and from the BDM (red) for three rows, in the two widest dimensions."""
    data = learner.data
    dims = learner.obs_std.topk(2).indices.tolist() if data.obs_dim > 1 else [0, 0]
    index = torch.tensor([1, 3, 5], device=learner.generator.device) * len(data) // 7
    generator = torch.Generator(index.device).manual_seed(0)
    true, valid = learner.futures.draw(index, 500, generator)
    true, start = (x * learner.obs_std + learner.obs_mean for x in (true, data.obs[index]))
    conditions = (x.repeat_interleave(500, 0) for x in (start, data.action[index]))
    sampled = learner.sample_futures(*conditions, generator).view(3, 500, -1)

    def draw(axes, k):
        axes.scatter(*true[k][valid[k, :, 0] == 1][:, dims].cpu().T, c="grey", s=6, label="data")
        axes.scatter(*sampled[k][:, dims].cpu().T, c="red", s=3, alpha=0.5, label="BDM")
        axes.scatter(*start[k, dims].cpu(), c="black", marker="x", label="s")
        axes.set(title=f"future states of row {index[k]:,}", xlabel=f"state {dims[0]}", ylabel=f"state {dims[1]}")
        axes.legend(fontsize=8)

    save_figure(path, *(partial(draw, k=k) for k in range(3)))


def standardize(data):
    """z-score obs and next_obs in place; returns mean and standard deviation [S]."""
    mean, std = data.obs.mean(0), data.obs.std(0, correction=0) + 1e-3
    for states in (data.obs, data.next_obs):
        states.sub_(mean).div_(std)
    return mean, std


def settings(given):
    """The table for what the command line asks for."""
    if given.get("rebrac"):
        return REBRAC | OURS
    if given.get("sbc_only"):
        return SBC | OURS
    return PAPER | OURS if given.get("bdm_only") else REBRAC | PAPER | OURS


def check(args, given):
    at_least(args, 1, "hidden", "bdm_hidden", "num_futures")
    at_least(args, 0, "actor_lr", "bdm_lr", "critic_lr", "tau", "w_a", "w_s", "critic_bc")
    at_most(args, 1, "tau")
    if not 0 < args.gamma < 1:
        raise UserError(f"--gamma must lie between 0 and 1, found {args.gamma}")
    modes = [mode for mode in ("sbc_only", "rebrac", "bdm_only") if getattr(args, mode)]
    if len(modes) > 1:
        raise UserError("--sbc-only, --rebrac and --bdm-only exclude each other")
    if args.bdm_only and args.evaluate:
        raise UserError(f"{args.evaluate} was made with --bdm-only and holds no policy to evaluate")
    if args.rebrac:
        if args.w_s and "w_s" in given:
            raise UserError("ReBRAC as its authors run it has raw states and no BDM: --w-s takes --no-rebrac with it")
        where = "with --rebrac" if "rebrac" in given else "with --rebrac, set for these data (--no-rebrac)"
        useless(given, ["corrected"], where)
        if not args.evaluate:
            print("note: ReBRAC as its authors run it, without a BDM")
    if args.sbc_only:
        useless(given, ["critic_lr", "critic_bc", "reward_scale"], "with --sbc-only")
        if args.w_s == 0:
            useless(given, ["gamma", "tau", "corrected"], "with --sbc-only without a state term")
    if args.bdm_only:
        actor = ["actor_lr", "critic_lr", "w_a", "w_s", "eta", "actor_bdm", "num_futures", "critic_bc", "reward_scale"]
        useless(given, [*actor, "hidden"], "with --bdm-only")
        args.eval_episodes = 0  # there is no policy
        if args.bdm_only != "data":
            apart(args, "bdm_only")
    if args.rebrac or args.bdm_only:  # neither has a state term
        args.w_s = 0.0
    if args.w_s == 0:
        args.paper_score = None  # that of another algorithm
        if not args.bdm_only:
            useless(given, ["bdm_lr", "bdm_hidden", "eta", "actor_bdm", "num_futures"], "without a state term")


def main():
    args = parse_args(Args, settings, check, doc=__doc__)
    Learner = BDMOnly if args.bdm_only else BDM
    if args.evaluate:
        return evaluate_run(args, Learner)
    data = load_dataset(args.env, args.data_path, judge=args.eval_episodes > 0, true_next_obs=True)
    if args.w_s or not args.sbc_only:
        data.need_order("next actions and the states that follow")
    follows = args.bdm_only not in (None, "data")  # the policy of another run
    if follows and not args.resume:
        args.hidden = load_actor(args.bdm_only, data, args.device).args.hidden
    data.reward.mul_(args.reward_scale)
    mean, std = (0.0, 1.0) if args.rebrac else standardize(data)
    data = data.to(args.device)
    learners = [Learner(args, data, seed) for seed in args.seed]
    futures = Futures(data, args.gamma, args.corrected) if learners[0].has_bdm else None
    for learner in learners:
        learner.use_data(futures, mean, std)
    phases = dict(update=args.steps)
    run = Run(args, learners, data, __file__, PROTOCOL, phases)
    if follows and not run.phase:  # no checkpoint, which would hold it
        for learner in learners:
            learner.use_policy(load_actor(args.bdm_only, data, args.device))

    update = capture(learners, "update")
    for _ in run.updates("update", stride=2, evaluate=not args.bdm_only):
        update()
    if learners[0].has_bdm:
        for learner, folder in zip(learners, run.folders):
            draw_futures(learner, folder / "futures.png")
    run.finish()


if __name__ == "__main__":
    cli(main)
