"""ReBRAC and DAC as one writes them in JAX, each update one jitted function: the peers in straightforward.py.

Needs `jax` alone. Networks begin as those of one of our learners, so that `difference` can compare whole updates.
"""

import os
from functools import partial

os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")  # one thread, as the learner beside it


import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn as nn
from jax.nn import mish, relu

from bdm_rebrac_sbc import CRITIC_DECAY, NOISE_CLIP, POLICY_NOISE, EnsembleLayerNorm
from dac import EPS, ETA_MAX, ETA_MIN, noise_schedule

tree_map = jax.tree.map


def to_jax(net):
    """A network's parameters: for each child a list of layers, each [weight, bias] and LayerNorm's gain and offset."""
    found = {}
    for name, child in net.named_children():
        found[name] = layers = []
        for module in child:
            params = [p.detach().numpy() for p in module.parameters()]
            params = [jnp.array(p.T if isinstance(module, nn.Linear) else p) for p in params]
            if isinstance(module, EnsembleLayerNorm):
                layers[-1] += params
            elif params:
                layers.append(params)
    return found


def mlp(layers, x, activation):
    *hidden, (weight, bias) = layers
    for w, b, *norm in hidden:
        x = activation(x @ w + b)
        if norm:
            x = (x - x.mean(-1, keepdims=True)) * jax.lax.rsqrt(x.var(-1, keepdims=True) + 1e-5)
            x = x * norm[0] + norm[1]
    return x @ weight + bias


def q_values(critics, obs, action, activation):
    x = jnp.concatenate([obs, action], -1)
    return jax.vmap(lambda layers: mlp(layers, x, activation))(critics["net"])[..., 0]


def move(target, net, tau):
    return tree_map(lambda slow, fast: slow + tau * (fast - slow), target, net)


def clipped(grads):
    norm = jnp.sqrt(sum((g**2).sum() for g in jax.tree.leaves(grads)))
    return tree_map(lambda g: g * jnp.minimum(1, 1 / (norm + 1e-6)), grads)


def adam(state, name, grads, lr, decay=0.0):
    """One step of the network `name`, in place in the dictionary."""
    params, (n, m, v) = state[name], state[name + "_adam"]
    n, grads = n + 1, tree_map(lambda g, p: g + decay * p, grads, params)
    m = tree_map(lambda m, g: 0.9 * m + 0.1 * g, m, grads)
    v = tree_map(lambda v, g: 0.999 * v + 0.001 * g * g, v, grads)
    rate, scale = lr / (1 - 0.9**n), 1 / (1 - 0.999**n)
    state[name] = tree_map(lambda p, m, v: p - rate * m / (jnp.sqrt(v * scale) + 1e-8), params, m, v)
    state[name + "_adam"] = (n, m, v)


class Peer:
    """Data and networks of one of our learners; `update` does what the learner's does, each step of it jitted."""

    def __init__(self, args, data, ours):
        self.args, self.ours, self.sizes = args, ours, (data.obs_dim, data.action_dim)
        self.rows, self.key = jnp.array(data.rows.numpy()), jax.random.key(0)
        self.state = {}
        for name in ("actor", "critic"):
            net, target = (to_jax(getattr(ours, name + suffix)) for suffix in ("", "_target"))
            moments = (jnp.zeros(()), tree_map(jnp.zeros_like, net), tree_map(jnp.zeros_like, net))
            self.state |= {name: net, name + "_target": target, name + "_adam": moments}
        self.jitted = jax.jit(self.drawn_step, static_argnames="turn", donate_argnums=0)

    def batch(self, rows, index):
        s, a = self.sizes
        obs, action, reward, next_obs, next_action, terminal = jnp.split(rows[index], np.cumsum([s, a, 1, s, a]), 1)
        return obs, action, reward[:, 0], next_obs, next_action, terminal[:, 0]

    def drawn_step(self, state, rows, key, turn):
        key, *keys = jax.random.split(key, 16)
        randint = lambda low, high, *shape: jax.random.randint(keys.pop(), shape, low, high)
        randn = lambda *shape: jax.random.normal(keys.pop(), shape)
        return *self.step(state, rows, self.draws(randint, randn), turn), key

    def update(self):
        for turn in range(self.turns):
            self.state, self.losses, self.key = self.jitted(self.state, self.rows, self.key, turn=turn)
        jax.block_until_ready(self.state)

    def difference(self):
        """One `update` of ours and of this peer with the same draws: the largest difference of any parameter."""
        g = torch.Generator().manual_seed(0)
        self.ours.generator.manual_seed(0)
        self.ours.update()
        randint = lambda low, high, *shape: torch.randint(low, high, shape, generator=g).numpy()
        randn = lambda *shape: torch.randn(shape, generator=g).numpy()
        for turn in range(self.turns):
            self.state, _ = self.step(self.state, self.rows, self.draws(randint, randn), turn)
        ours = {name: to_jax(getattr(self.ours, name)) for name in ("actor", "actor_target", "critic", "critic_target")}
        gaps = tree_map(lambda a, b: float(jnp.abs(a - b).max()), ours, {name: self.state[name] for name in ours})
        return max(jax.tree.leaves(gaps))


class ReBRAC(Peer):
    turns = 2

    def draws(self, randint, randn):
        size = self.args.batch_size
        return dict(index=randint(0, len(self.rows), size), noise=randn(size, self.sizes[1]))

    def step(self, state, rows, draws, turn):
        args, state = self.args, dict(state)
        obs, action, reward, next_obs, data_next, terminal = self.batch(rows, draws["index"])
        policy = lambda actor, obs: jnp.tanh(mlp(actor["net"], obs, relu))
        noise = jnp.clip(POLICY_NOISE * draws["noise"], -NOISE_CLIP, NOISE_CLIP)
        next_action = jnp.clip(policy(state["actor_target"], next_obs) + noise, -1, 1)
        penalty = ((1 - terminal) * ((next_action - data_next) ** 2).sum(-1)).mean()
        next_q = q_values(state["critic_target"], next_obs, next_action, relu).min(0)
        y = reward + args.gamma * (1 - terminal) * (next_q - args.critic_bc * penalty)

        def critic_loss(critic):
            return ((q_values(critic, obs, action, relu) - y) ** 2).mean(1).sum()

        def actor_loss(actor, critic):
            pi = policy(actor, obs)
            q = q_values(tree_map(lambda p: p[:1], critic), obs, pi, relu)
            bc = ((pi - action) ** 2).sum(-1).mean()
            return args.w_a * bc - q.mean() / jax.lax.stop_gradient(jnp.abs(q).mean())

        losses = {}
        losses["critic"], grads = jax.value_and_grad(critic_loss)(state["critic"])
        adam(state, "critic", grads, args.critic_lr, CRITIC_DECAY)
        if turn == 0:
            losses["actor"], grads = jax.value_and_grad(actor_loss)(state["actor"], state["critic"])
            adam(state, "actor", grads, args.actor_lr)
            for name in ("actor", "critic"):
                state[name + "_target"] = move(state[name + "_target"], state[name], args.tau)
        return state, losses


class DAC(Peer):
    def __init__(self, args, data, ours):
        super().__init__(args, data, ours)
        self.turns = args.actor_ema_every
        self.state |= dict(eta=jnp.array(args.eta), done=jnp.zeros(()))
        self.freqs = jnp.array(ours.actor.freqs.numpy())

    def draws(self, randint, randn):
        size, n, steps = self.args.batch_size, self.args.next_samples, self.args.diffusion_steps
        return dict(
            index=randint(0, len(self.rows), size),
            chain=[randn(size * n, self.sizes[1]) for _ in range(steps)],
            noise=randn(size, self.sizes[1]),
            t=randint(1, steps + 1, size, 1),
        )

    def predict(self, actor, x, obs, t):
        time = mlp(actor["time"], jnp.concatenate([jnp.cos(t * self.freqs), jnp.sin(t * self.freqs)], -1), mish)
        time = jnp.broadcast_to(time, (len(x), time.shape[-1]))
        return mlp(actor["net"], jnp.concatenate([obs, x, time], -1), mish)

    def denoise(self, actor, obs, noises):
        alpha, abar = noise_schedule(self.args.diffusion_steps)
        x, *noises = noises
        for t in range(self.args.diffusion_steps, 0, -1):
            noise = self.predict(actor, x, obs, jnp.full((1, 1), float(t)))
            clean = jnp.clip((x - (1 - abar[t]) ** 0.5 * noise) / abar[t] ** 0.5, -1, 1)
            x = (abar[t - 1] ** 0.5 * (1 - alpha[t]) * clean + alpha[t] ** 0.5 * (1 - abar[t - 1]) * x) / (1 - abar[t])
            if t > 1:
                x = x + (1 - alpha[t]) ** 0.5 * noises.pop(0)
        return x

    def step(self, state, rows, draws, turn):
        args, state = self.args, dict(state)
        obs, action, reward, next_obs, _, terminal = self.batch(rows, draws["index"])
        factor = 0.5 * (1 + jnp.cos(jnp.pi * state["done"] / args.steps))  # of both learning rates

        many = jnp.repeat(next_obs, args.next_samples, 0)
        next_action = self.denoise(state["actor_target"], many, draws["chain"])
        next_q = q_values(state["critic_target"], many, next_action, mish)
        next_v = next_q.reshape(args.critics, -1, args.next_samples).mean(-1)
        y = reward + args.gamma * (1 - terminal) * (next_v.mean(0) - args.rho * next_v.std(0))
        critic_loss = lambda critic: ((q_values(critic, obs, action, mish) - y) ** 2).mean()
        losses = {}
        losses["critic"], grads = jax.value_and_grad(critic_loss)(state["critic"])
        adam(state, "critic", clipped(grads), args.critic_lr * factor)
        state["critic_target"] = move(state["critic_target"], state["critic"], args.tau)

        abar = jnp.array(noise_schedule(args.diffusion_steps)[1])[draws["t"]]
        w, noise, q = jnp.sqrt(1 - abar), draws["noise"], partial(q_values, state["critic_target"], activation=mish)
        x = jnp.sqrt(abar) * action + w * noise
        g = jax.grad(lambda x: q(obs, x).mean(0).sum())(x) / (jnp.abs(q(obs, action)).mean() + EPS)

        def actor_loss(actor):
            predicted = self.predict(actor, x, obs, draws["t"])
            behavior = ((predicted - noise) ** 2).mean()
            return state["eta"] * behavior + args.guidance_scale * (w * g * predicted).mean(), behavior

        (losses["actor"], behavior), grads = jax.value_and_grad(actor_loss, has_aux=True)(state["actor"])
        adam(state, "actor", clipped(grads), args.actor_lr * factor)
        excess = jnp.clip(behavior - args.bc_threshold, -1, 1)
        state["eta"] = jnp.clip(state["eta"] + args.eta_lr * excess, ETA_MIN, ETA_MAX)
        if turn == 0:
            tau = args.tau * (state["done"] > args.actor_ema_start)
            state["actor_target"] = move(state["actor_target"], state["actor"], tau)
        state["done"] += 1
        return state, losses
