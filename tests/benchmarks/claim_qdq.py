"""QDQ's claims about the distribution of returns, where that is known: three states, actions in [-1, 1]^2, one step.

    python tests/benchmarks/claim_qdq.py              # 5 CPU minutes; writes tests/{figures,results}
    python tests/benchmarks/claim_qdq.py --seeds 0    # other seeds write to runs/claims instead

(a) The learned distribution is that of the returns.
(b) Its spread H (Eq. 6) is larger off the data than on it.
(c) The pessimistic target (Eq. 7, 8) makes Q smaller where H is large.

The score model finds the returns; H does not tell actions off the data from those on it. The data fill [-1/2, 1/2]^2.
The true spread is the same for every action; the action moves the mean of the return in two states and does nothing in
the third. Networks 64 wide, means of three seeds, narrow | bimodal | no effect:

                                                  score model, 18 steps   consistency, one step   truth
    (a) Wasserstein-1 distance, on the data       2.8 | 6.0 | 4.5         10.1 | 14.8 | 11.3      0.9 | 3.5 | 4.4 (true
                                                                                                  samples, as many)
    (b) H on the data                                                     15.5 | 16.6 | 17.3      5 | 25.7 | 25
    (b) AUC of the spread, off the data against   0.76 | 0.61 | 0.48      0.26 | 0.55 | 0.40      claimed: near 1
        on it

(c) holds by its formula, but U lies off the data no more often than on it. H is mostly error of the distillation after
4,000 updates; the score model, which the distillation should reach, separates somewhat where the action matters. On the
built-in HalfCheetah data the action adds little to what the state tells of the return (quadratic regression), the case
of "no effect"; that this is why H does not separate there was not tested.

The recipe: (18, 0.5) had the least W1 of four (levels, rate) tried with seed 0 on one bimodal state only; here
the built-in (40, 0.05) does as well on that seed. On that first system H had an AUC of 0.62 after 4,000 updates of
(18, 0.5), 0.66 after 6,000 of (40, 0.05) and 0.46, 0.43 after 4,000 of (40, 0.5), (40, 1): it depends on the recipe.
Width, GroupNorm, input scale and the paper's 1,600,000 updates were not tried; its recipe is far from done after 4,000.
"""

import argparse
import functools
import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
from common import load_dataset, save_figure  # noqa: E402
from qdq import (  # noqa: E402
    QDQ,
    Args,
    critic_targets,
    many_steps,
    one_step,
    penalty_weight,
    return_dataset,
    sample_returns,
)

SEEDS, ROWS, SAMPLES, SCORE_UPDATES = [0, 1, 2], 30_000, 50, 2_500
LENGTHS = (0, 250, 1_000, 4_000)  # updates of the consistency model at which it is looked at
RECIPES = {  # of the distillation; the first for all seeds, the others for the first
    "18 levels": dict(levels=18, consistency_tau=0.5, init_from_teacher=True),
    "built-in": dict(levels=40, consistency_tau=0.05, init_from_teacher=True),
    "paper's": dict(levels=1000, consistency_tau=0.005, init_from_teacher=False),
}
STATES = ("narrow", "bimodal", "no effect")
HALF_RANGE = 100.0  # returns from -100 to 100, scaled to [-1, 1]


def mean(state, action):
    """Mean of the scaled return: depends on the action in two of three states."""
    return (0.4 * action[:, 0] + 0.3 * torch.sin(3 * action[:, 1])) * (state < 2)


def noise(n, generator):
    """The rest of the scaled return, the same for all actions: [3, n]."""
    z, sign = torch.randn(3, n, generator=generator), 2.0 * torch.randint(0, 2, (n,), generator=generator) - 1
    return torch.stack([0.05 * z[0], 0.25 * sign + 0.06 * z[1], 0.25 * z[2]])


TRUTH = noise(1_000_000, torch.Generator().manual_seed(0)).sort(dim=1).values
QUANTILES = TRUTH[:, ((torch.arange(SAMPLES) + 0.5) / SAMPLES * TRUTH.shape[1]).long()]
TRUE_H = HALF_RANGE * torch.tensor([0.05, (0.25**2 + 0.06**2) ** 0.5, 0.25])

EXACT = noise(50_000, torch.Generator().manual_seed(1)).view(3, -1, SAMPLES).sort(dim=2).values
FLOOR = HALF_RANGE * (EXACT - QUANTILES[:, None]).abs().mean(dim=(1, 2))  # W1 of 50 samples of the truth itself


def on_data(n, generator):
    return torch.rand(n, 2, generator=generator) - 0.5


def off_data(n, generator):
    """Uniform in [-1, 1]^2 but for the data's square and a margin."""
    action = 2 * torch.rand(4 * n, 2, generator=generator) - 1
    return action[action.abs().amax(1) > 0.6][:n]


def pairs(state, action):
    return torch.cat([torch.eye(3)[state].expand(len(action), 3), action], dim=1)


def make_learner(seed, recipe):
    args = Args(device="cpu", batch_size=128, return_hidden=64, hidden=16, score_steps=SCORE_UPDATES,
                consistency_steps=LENGTHS[-1], q_samples=SAMPLES, **recipe)  # fmt: skip
    learner = QDQ(args, SimpleNamespace(obs_dim=3, action_dim=2, max_action=1.0), seed)
    draw = torch.Generator().manual_seed(1000 + seed)
    state, action = torch.randint(0, 3, (ROWS,), generator=draw), on_data(ROWS, draw)
    x = mean(state, action) + noise(ROWS, draw).gather(0, state[None])[0]
    rows = torch.cat([torch.eye(3)[state], action, x[:, None]], dim=1)
    learner.use_returns(rows, torch.tensor([-HALF_RANGE, HALF_RANGE]))
    return learner


def auc(on, off):
    """Probability that a draw of `off` is above one of `on`."""
    return (off[:, None] > on).float().mean().item()


@torch.no_grad()
def look(learner, sampler, model, n):
    """Per state, on | off the data: H, Wasserstein-1 distance to the truth (units of the return), AUC of H."""
    draw, found = torch.Generator().manual_seed(7), []
    for state in range(3):
        h, w1 = [], []
        for action in (on_data(n, draw), off_data(n, draw)):
            x = sample_returns(sampler, model, pairs(state, action), SAMPLES, draw)
            truth = mean(torch.tensor(state), action)[:, None] + QUANTILES[state]
            h.append(learner.to_return(x).std(dim=1, correction=0))
            w1.append(HALF_RANGE * (x.sort(dim=1).values - truth).abs().mean().item())
        found.append(dict(h_on=h[0].median().item(), h_off=h[1].median().item(), w1_on=w1[0], w1_off=w1[1],
                          auc=auc(*h)))  # fmt: skip
    return found


def train(recipe, seed, teacher=None):
    """Both phases (the first only without a teacher): the learner, and looks at its models on the way."""
    learner, looks = make_learner(seed, recipe), {}
    if teacher is None:
        for _ in range(SCORE_UPDATES):
            learner.score_update()
        looks["score"] = look(learner, many_steps, learner.score, 60)
    else:
        learner.score.load_state_dict(teacher.score.state_dict())
    if learner.args.init_from_teacher:
        learner.start_from_teacher()
    for before, length in zip((0, *LENGTHS), LENGTHS):
        for _ in range((length - before) // 5):
            learner.consistency_update()
        looks[length] = look(learner, one_step, learner.consistency, 200)
    return learner, looks


@torch.no_grad()
def fixed_points(learner):
    """Claim (c): reward 1 for ever, each action its own successor. H, off the data or not, Q found, Q predicted."""
    draw = torch.Generator().manual_seed(8)
    parts = [(state, where(100, draw)) for where in (on_data, off_data) for state in range(3)]
    rows = torch.cat([pairs(*part) for part in parts])
    h = learner.uncertainty(rows[:, :3], rows[:, 3:], draw)
    alpha, beta, gamma = learner.args.alpha, learner.args.beta, learner.args.gamma
    weight, q = penalty_weight(h, beta, "paper"), torch.zeros(len(h))
    for _ in range(3_000):
        target, low_target = critic_targets(torch.ones_like(h), gamma * torch.ones_like(h), q, weight)
        q = alpha * target + (1 - alpha) * low_target
    expected = torch.where(h > h.quantile(beta), 1 / h, beta)
    return h, torch.arange(len(h)) >= 300, q, 1 / (1 - gamma * (alpha + (1 - alpha) * expected))


def draw_density(axes, learner):
    action, draw = torch.tensor([[0.2, -0.2]]), torch.Generator().manual_seed(0)
    centre = mean(torch.tensor(1), action)
    axes.hist(HALF_RANGE * (centre + TRUTH[1][::100]), bins=80, density=True, color="lightgrey", label="truth")
    for name, *sampler in (("score, 18 steps", many_steps, learner.score), ("one step", one_step, learner.consistency)):
        with torch.no_grad():
            x = learner.to_return(sample_returns(*sampler, pairs(1, action), 4_000, draw))
        axes.hist(x.flatten(), bins=60, density=True, histtype="step", label=name)
    axes.set(title="(a) returns of one action in\nthe data (bimodal), seed 0", xlabel="return", yticks=[])
    axes.legend(fontsize=8)


def draw_line(axes, learners):
    """Means over the seeds."""
    line, draw = torch.linspace(-1, 1, 41), torch.Generator().manual_seed(0)
    action = torch.stack([line, torch.zeros(41)], dim=1)
    for state, style in enumerate(("-", "--")):
        h = torch.zeros(2, 41)
        for learner in learners:
            for i, sampler in enumerate(((many_steps, learner.score), (one_step, learner.consistency))):
                with torch.no_grad():
                    x = sample_returns(*sampler, pairs(state, action), 400, draw)
                h[i] += HALF_RANGE * x.std(dim=1) / len(learners)
        axes.axhline(TRUE_H[state], color="grey", linestyle=style, label=f"truth, {STATES[state]}")
        axes.plot(line, h[0], color="C0", linestyle=style, label="score, 18 steps")
        axes.plot(line, h[1], color="C1", linestyle=style, label="one step: H")
    axes.axvspan(-0.5, 0.5, color="lightgrey", alpha=0.5)
    axes.text(0, 1, "data", ha="center")
    axes.set(
        title="(a, b) spread of the return along\na line of actions, mean of the seeds", xlabel="action", ylim=(0, 48)
    )
    axes.legend(fontsize=7, loc="upper center", ncols=2, columnspacing=0.8, handlelength=1.5)


def draw_auc(axes, looks):
    for state, (name, marker) in enumerate(zip(STATES, "osv")):
        values = torch.tensor([[at[key][state]["auc"] for key in ("score", *LENGTHS)] for at in looks])
        axes.plot(range(1, 1 + len(LENGTHS)), values[:, 1:].mean(0), color=f"C{state + 2}", label=name)
        for seed in values:
            axes.plot(range(1 + len(LENGTHS)), seed, marker, color=f"C{state + 2}", markersize=4)
    axes.axhline(0.5, color="black", linewidth=0.8)
    axes.axhline(1, color="black", linestyle="--", label="claimed")
    axes.set_xticks(range(1 + len(LENGTHS)), ["score\nmodel", *map(str, LENGTHS)], fontsize=8)
    axes.set(title="(b) is H higher off the data?\nAUC, 0.5 is chance", ylim=(0, 1.45),
             xlabel="updates of the consistency model")  # fmt: skip
    axes.legend(fontsize=8, loc="upper center", ncols=2)


def draw_fixed_points(axes, points):
    h, off, found, expected = (values[points[0].argsort()] for values in points)
    for rows, label, color in ((~off, "in the data", "C0"), (off, "off the data", "C3")):
        axes.plot(h[rows], found[rows], ".", color=color, alpha=0.5, markersize=4, label=label)
    axes.plot(h, expected, "k--", linewidth=1, label="closed form")
    axes.set(title="(c) Q of r = 1 for ever (plain:\n100) against H, seed 0", xlabel="uncertainty H")
    axes.legend(fontsize=8)


def explained(env):
    """Share of the truncated return's variance that a quadratic of s | of (s, a) predicts in episodes held out."""
    data = load_dataset(env)
    rows, _ = return_dataset(data, Args.gamma, Args.window, Args.window_stride)
    x, (i, j) = rows.double(), torch.triu_indices(rows.shape[1], rows.shape[1])
    held = torch.arange(len(rows)) // 81 % 5 == 0  # 81 windows in an episode
    inputs = torch.cat([torch.ones(len(x), 1), (x[:, :-1] - x[:, :-1].mean(0)) / x[:, :-1].std(0)], dim=1)
    for width in (1 + data.obs_dim, inputs.shape[1]):
        features = (inputs[:, i] * inputs[:, j])[:, j < width]
        fit, y = features[~held], x[~held, -1]
        weight = torch.linalg.solve(fit.T @ fit + torch.eye(fit.shape[1]), fit.T @ y)
        yield 1 - ((features[held] @ weight - x[held, -1]) ** 2).mean().item() / x[held, -1].var().item()


def show(name, looks):
    print(f"\n{name}\n   model state      H on | off | true    W1 on | off | exact    AUC of each seed | claim near 1")
    for model in looks[0]:
        for i, state in enumerate(STATES):
            rows = [at[model][i] for at in looks]
            mean_of = {key: sum(row[key] for row in rows) / len(rows) for key in rows[0]}
            h, w1 = ("{:6.1f} {:5.1f} {:5.1f}".format(mean_of[key + "_on"], mean_of[key + "_off"], known[i])
                     for key, known in (("h", TRUE_H), ("w1", FLOOR)))  # fmt: skip
            print(f"{model:>8} {state:<10}{h}   {w1}   ", *(f"{row['auc']:.2f}" for row in rows), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    seeds = parser.parse_args().seeds
    figures, results = ROOT / "tests/figures", ROOT / "tests/results"
    if seeds != SEEDS:  # any other run leaves the committed files alone
        figures = results = ROOT / "runs/claims"
        results.mkdir(parents=True, exist_ok=True)
    start, recipe = time.process_time(), next(iter(RECIPES))
    learners, looks = zip(*(train(RECIPES[recipe], seed) for seed in seeds))
    measured = {recipe: looks}
    show(f"{recipe}, means of {len(seeds)} seeds", looks)
    for name in list(RECIPES)[1:]:
        measured[name] = [train(RECIPES[name], seeds[0], learners[0])[1]]
        show(f"{name}, seed {seeds[0]}, from the same score model", measured[name])
    points = [fixed_points(learner) for learner in learners]
    error = max((found / expected - 1).abs().max().item() for _, _, found, expected in points)
    share = [off[h > h.quantile(Args.beta)].float().mean().item() for h, off, _, _ in points]
    print(f"\n(c) fixed points of Eq. 7 | their closed form: {error:.1e} apart at most")
    print("    share of U off the data, each seed:", *(f"{x:.2f}" for x in share), "| claim near 1, chance 0.50")
    env = "halfcheetah-demo-medium-replay"
    state, both = explained(env)
    print(f"    {env}: the state explains {state:.3f} of the return's variance, with the action {both:.3f}")
    save_figure(figures / "qdq.png", functools.partial(draw_density, learner=learners[0]),
                functools.partial(draw_line, learners=learners), functools.partial(draw_auc, looks=looks),
                functools.partial(draw_fixed_points, points=points[0]), size=3)  # fmt: skip
    result = dict(
        command=" ".join(["python tests/benchmarks/claim_qdq.py", *sys.argv[1:]]), seeds=seeds, torch=torch.__version__,
        cpu_seconds=round(time.process_time() - start), states=STATES, recipes=RECIPES,
        true_h=TRUE_H.tolist(), w1_of_exact_samples=FLOOR.tolist(), claimed_auc=1.0, measured=measured,
        share_of_uncertain_set_off_data=share, fixed_point_error=error,
        variance_explained=dict(env=env, state=state, state_and_action=both),
    )  # fmt: skip
    (results / "claim_qdq.json").write_text(json.dumps(result, indent=1) + "\n")
    print(f"{result['cpu_seconds']} CPU seconds")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
