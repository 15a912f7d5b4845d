"""One update on the CPU: the scripts' against the way such code is usually written in PyTorch, and in JAX.

    python tests/benchmarks/straightforward.py    # the papers' sizes and the small built-in ones, 1 and 2 threads
    taskset -c 0 python tests/benchmarks/straightforward.py --jax    # ReBRAC and DAC beside JAX (pip install jax)

"Usual" means: two critics as two modules called in turn, torch's default Adam, targets moved in a Python loop, batches
gathered column by column with numpy's indices, and losses read as numbers in every update. The mathematics is the same.
--jax (`jax_peers.py`): first both compute the same update in float64, then milliseconds of CPU time for one update.
Results of both: README.md, "Speed".
"""

import copy
import sys
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parent)]
from speed import random_dataset  # noqa: E402

import bdm_rebrac_sbc  # noqa: E402
import dac  # noqa: E402
import dtql  # noqa: E402
from common import Batch  # noqa: E402


def mlp(d_in, d_out, hidden, activation, norm=nn.Identity):
    layers = []
    for width in (d_in, hidden, hidden):
        layers += [nn.Linear(width, hidden), *activation(hidden, norm)]
    return nn.Sequential(*layers, nn.Linear(hidden, d_out))


class Usual:
    """What both have in common: data, twin critics, optimisers, targets."""

    def __init__(self, args, data, actor, critic):
        self.args, self.columns = args, [column.contiguous() for column in data.split(data.rows)]
        self.actor, self.critics = actor, [critic, copy.deepcopy(critic)]
        self.target = copy.deepcopy([actor, *self.critics])  # DTQL reads no target actor: 1 % of its time
        self.critic_opt = torch.optim.Adam([p for net in self.critics for p in net.parameters()], args.critic_lr)
        self.losses = {}

    def sample(self):
        index = np.random.randint(len(self.columns[0]), size=self.args.batch_size)
        return Batch(*(column[index] for column in self.columns))

    def q(self, nets, obs, action):
        return [net(torch.cat([obs, action], -1)).squeeze(-1) for net in nets]

    def move_targets(self):
        for target, net in zip(self.target, [self.actor, *self.critics]):
            for slow, fast in zip(target.parameters(), net.parameters()):
                slow.data.copy_(self.args.tau * fast.data + (1 - self.args.tau) * slow.data)

    def step(self, opt, loss, name):
        opt.zero_grad()
        loss.backward()
        opt.step()
        self.losses[name] = loss.item()


class UsualReBRAC(Usual):
    def __init__(self, args, data):
        def relu(hidden, norm):
            return [nn.ReLU(), norm(hidden)]

        actor = nn.Sequential(mlp(data.obs_dim, data.action_dim, args.hidden, relu), nn.Tanh())
        super().__init__(args, data, actor, mlp(data.obs_dim + data.action_dim, 1, args.hidden, relu, nn.LayerNorm))
        self.actor_opt = torch.optim.Adam(actor.parameters(), args.actor_lr)

    def update(self):
        for delayed in (False, True):
            obs, action, reward, next_obs, data_next, terminal = self.sample()
            with torch.no_grad():
                noise = (0.2 * torch.randn_like(action)).clamp(-0.5, 0.5)
                next_action = (self.target[0](next_obs) + noise).clamp(-1, 1)
                penalty = ((next_action - data_next) ** 2).sum(-1).mean()
                next_q = torch.min(*self.q(self.target[1:], next_obs, next_action))
                y = reward + self.args.gamma * (1 - terminal) * (next_q - self.args.critic_bc * penalty)
            self.step(self.critic_opt, sum(F.mse_loss(q, y) for q in self.q(self.critics, obs, action)), "critic")
            if not delayed:
                pi = self.actor(obs)
                q = self.q(self.critics[:1], obs, pi)[0]
                bc = ((pi - action) ** 2).sum(-1).mean()
                self.step(self.actor_opt, self.args.w_a * bc - q.mean() / q.abs().mean().detach(), "actor")
                self.move_targets()


class UsualDTQL(Usual):
    def __init__(self, args, data):
        def mish(hidden, norm):
            return [norm(hidden), nn.Mish()]

        s, a = data.obs_dim, data.action_dim
        super().__init__(args, data, dtql.Actor(s, a, args.hidden), mlp(s + a, 1, args.hidden, mish, nn.LayerNorm))
        self.value = mlp(s, 1, args.hidden, mish)
        self.behavior = dtql.Denoiser(s, a, args.behavior_hidden, args.time_dim)
        self.value_opt = torch.optim.Adam(self.value.parameters(), args.critic_lr)
        self.actor_opt = torch.optim.Adam(self.actor.parameters(), args.actor_lr)
        self.behavior_opt = torch.optim.Adam(self.behavior.parameters(), args.behavior_lr)
        self.generator = torch.Generator().manual_seed(0)

    def update(self):
        args = self.args
        obs, action, reward, next_obs, _, terminal = self.sample()
        with torch.no_grad():
            q = torch.min(*self.q(self.critics, obs, action))
            y = reward + args.gamma * (1 - terminal) * self.value(next_obs).squeeze(-1)
        u = q - self.value(obs).squeeze(-1)
        self.step(self.value_opt, (torch.abs(args.expectile - (u < 0).float()) * u**2).mean(), "value")
        self.step(self.critic_opt, sum(F.mse_loss(q, y) for q in self.q(self.critics, obs, action)), "critic")
        loss = dtql.denoising_loss(self.behavior, obs, action, self.generator, 1.0)
        self.step(self.behavior_opt, loss, "behavior")
        mean, log_std = self.actor(obs)
        pi = torch.tanh(mean + log_std.exp() * torch.randn_like(mean))
        trust = dtql.denoising_loss(self.behavior, obs, pi, self.generator, 1.0)
        self.step(self.actor_opt, args.alpha * trust - torch.min(*self.q(self.critics, obs, pi)).mean(), "actor")
        self.move_targets()


def rates(*steps, seconds=3.0, windows=5, clock=time.perf_counter, of_windows=median):
    """Calls per second of each function, medians; they take turns, so that a busy machine slows all of them."""
    found = [[] for _ in steps]
    for step in steps:
        step()
    for _ in range(windows):
        for rate, step in zip(found, steps):
            start, calls = clock(), 0
            while clock() - start < seconds / windows:
                step()
                calls += 1
            rate.append(calls / (clock() - start))
    return [of_windows(rate) for rate in found]


def beside_jax(data):
    """ReBRAC and DAC on one thread beside their JAX peers: CPU time, the best of some windows."""
    try:
        import jax
        import jax_peers
    except ImportError as error:
        sys.exit(f"--jax needs `pip install jax` ({error})")
    torch.set_num_threads(1)
    few = dict(critics=4, next_samples=1, actor_ema_every=1)  # as on the built-in data

    def pairs(size, **more):
        args = bdm_rebrac_sbc.Args(device="cpu", w_s=0.0, **more)
        yield f"ReBRAC {size}", jax_peers.ReBRAC(args, data, bdm_rebrac_sbc.BDM(args, data, 0))
        args = dac.Args(device="cpu", actor_ema_start=-1, **more, **(few if more else {}))
        yield f"DAC {size}", jax_peers.DAC(args, data, dac.DAC(args, data, 0))

    def in_double(double):
        torch.set_default_dtype(torch.float64 if double else torch.float32)
        jax.config.update("jax_enable_x64", double)
        data.rows = data.rows.to(torch.get_default_dtype())

    in_double(True)
    for name, peer in pairs("64 wide", hidden=64, batch_size=128):
        gap = peer.difference()
        print(f"{name}: parameters after an update differ from the peer's by {gap:.0e} at most", flush=True)
        assert gap < 1e-10
    in_double(False)
    for name, peer in [*pairs("paper"), *pairs("64 wide", hidden=64, batch_size=128)]:
        found = rates(peer.ours.update, peer.update, seconds=6, windows=6, clock=time.process_time, of_windows=max)
        ours, theirs = (1e3 / rate / peer.turns for rate in found)
        print(f"{name}: {ours:6.2f} ms, JAX {theirs:6.2f}, {ours / theirs:.2f} times", flush=True)


def main():
    data = random_dataset("random", 100_000, 17, 6)
    if "--jax" in sys.argv[1:]:
        return beside_jax(data)
    small = dict(hidden=64, batch_size=128)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for size, more in (("paper", {}), ("small", small)):
            args = bdm_rebrac_sbc.Args(device="cpu", w_s=0.0, **more)
            ours = bdm_rebrac_sbc.BDM(args, data, 0)
            fast, usual = rates(ours.update, UsualReBRAC(args, data).update)  # two updates a call, both
            print(f"ReBRAC {size}, {threads} threads: {2 * fast:6.1f} updates/s, usual {2 * usual:6.1f}", flush=True)
            args = dtql.Args(device="cpu", **more, **(dict(behavior_hidden=64) if more else {}))
            ours = dtql.DTQL(args, data, 0)
            fast, usual = rates(ours.update, UsualDTQL(args, data).update)
            print(f"DTQL   {size}, {threads} threads: {fast:6.1f} updates/s, usual {usual:6.1f}", flush=True)


if __name__ == "__main__":
    main()
