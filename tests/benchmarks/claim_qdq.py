"""QDQ's claims about the distribution of returns, where that is known: three states, actions in [-1, 1]^2, one step.

    python tests/benchmarks/claim_qdq.py              # 17 CPU minutes; writes tests/{figures,results}
    python tests/benchmarks/claim_qdq.py --seeds 0    # other seeds write to runs/claims instead

(a) The learned distribution is that of the returns.
(b) Its spread H (Eq. 6) is larger off the data than on it.
(c) The pessimistic target (Eq. 7, 8) makes Q smaller where H is large.

(a) comes out for the score model (teacher), not yet for the consistency model (student); (b) for neither. A model of
the returns given (s, a) learns how noisy they are and carries that on to actions that it never saw; how little is known
of an action is another question. The disagreement of five plain regressors of the return (ensemble) answers that one.

The data fill [-1/2, 1/2]^2. The true spread is the same for every action; the action moves the mean of the return in
two states and does nothing in the third. After 20,000 updates of each model, means of three seeds and widths 64 and 128
(the paper's student, 1,000 levels from random weights: 64); narrow | bimodal | no effect:

                        teacher             student             paper's student     ensemble            truth
    (a) Wasserstein-1   1.1 | 4.2 | 4.6     11.9 | 12.4 | 9.1   30.0 | 33.2 | 45.1                      0.9 | 3.5 | 4.4
    (b) spread on data  5.6 | 26.2 | 25.4   17.1 | 14.6 | 14.8  20.0 | 17.4 | 16.6  0.1 | 0.1 | 0.1     5 | 25.7 | 25
        spread off it   6.3 | 25.8 | 25.1   14.4 | 15.0 | 14.8  19.2 | 15.9 | 12.6  0.7 | 0.6 | 0.6     5 | 25.7 | 25
        AUC of spread,  0.73 | 0.42 | 0.51  0.26 | 0.52 | 0.50  0.47 | 0.45 | 0.49  0.97 | 0.94 | 0.95  (claim: near 1)
        off against on
        after 2,500     0.76 | 0.44 | 0.55  0.29 | 0.40 | 0.34  0.49 | 0.42 | 0.64  0.86 | 0.82 | 0.89

(Truth of W1: as many samples of the true returns.) What the teacher does tell, in the narrow state, is an error of a
fit (a spread of 6.3 for 5), and neither updates nor width add to it. Each model is looked at on the way through one
training whose rate falls to zero at the end, the ensemble's early looks are at a high one; students learn from the
final teacher. The ensemble takes 16 to 37 CPU seconds for 20,000 updates.

(c) holds by its formula, but U lies off the data no more often than on it (0.13 to 0.45 of U, chance 0.5).

The authors' released checkpoints, loaded into qdq.py's classes, say the same: AUC of H for actions far outside the box
against random ones inside 0.19, 0.02, 0.10 for hopper medium, replay, expert, 0.78, 0.24, 0.52 for
halfcheetah, 0.36 for walker2d medium (measured elsewhere, the files are not part of the project). So its lengths, up to
1,600,000 updates, bring (b) about in none of these seven sets. On the built-in HalfCheetah data the action adds little
to what the state tells of the return (quadratic regression: 0.864 of its variance, 0.871 with the action).
"""

import argparse
import functools
import itertools
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
    EnsembleLinear,
    adam,
    cosine,
    critic_targets,
    many_steps,
    mlp,
    one_step,
    penalty_weight,
    return_dataset,
    sample_returns,
    set_lr,
)

SEEDS, ROWS, SAMPLES, BATCH = [0, 1, 2], 30_000, 50, 128
LENGTHS, WIDTHS = (2_500, 5_000, 10_000, 20_000), (64, 128)  # updates at which each model is looked at
RECIPES = {  # of the distillation; the second 64 wide only
    "student": dict(levels=18, consistency_tau=0.5, init_from_teacher=True),
    "paper's student": dict(levels=1000, consistency_tau=0.005, init_from_teacher=False),
}
COLORS = {"teacher": "C0", "student": "C1", "paper's student": "C3", "ensemble": "C2"}
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


def make_learner(seed, width, recipe):
    args = Args(device="cpu", batch_size=BATCH, return_hidden=width, hidden=16, score_steps=LENGTHS[-1],
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
def look(predict, n=100):
    """Per state, on | off the data: spread of the predictions, Wasserstein-1 distance to the truth (both in units of
    the return), AUC of the spread. predict: rows [n, 5] and a generator to scaled returns [n, samples]."""
    draw, found = torch.Generator().manual_seed(7), []
    for state in range(3):
        h, w1 = [], []
        for action in (on_data(n, draw), off_data(n, draw)):
            x = predict(pairs(state, action), draw)
            h.append(HALF_RANGE * x.std(dim=1, correction=0))
            truth = mean(torch.tensor(state), action)[:, None] + QUANTILES[state]
            if x.shape[1] == SAMPLES:  # the ensemble predicts means only
                w1.append(HALF_RANGE * (x.sort(dim=1).values - truth).abs().mean().item())
        found.append(dict(h_on=h[0].median().item(), h_off=h[1].median().item(), auc=auc(*h),
                          **dict(zip(("w1_on", "w1_off"), w1))))  # fmt: skip
    return found


def looks_at(sampler, model, update, stride=1):
    """Train, and look on the way."""
    looks = []
    for before, length in zip((0, *LENGTHS), LENGTHS):
        for _ in range((length - before) // stride):
            update()
        looks.append(look(lambda rows, draw: sampler(model, rows, draw)))
    return looks


def samples(sampler):
    return lambda model, rows, draw: sample_returns(sampler, model, rows, SAMPLES, draw)


def make_ensemble(seed, width, rows):
    """Five regressors of the return, each with its own start and batches, and their update."""
    torch.manual_seed(seed)
    net = mlp([5, width, width, 1], torch.nn.SiLU, functools.partial(EnsembleLinear, 5))
    opt, draw, count = adam(net.parameters(), 1e-3), torch.Generator().manual_seed(seed), torch.zeros(())

    def update():
        set_lr(opt, 1e-3 * cosine(count, LENGTHS[-1]))
        batch = rows[torch.randint(len(rows), (5, BATCH), generator=draw)]
        loss = ((net(batch[..., :-1]) - batch[..., -1:]) ** 2).mean(dim=(1, 2)).sum()
        opt.zero_grad()
        loss.backward()
        opt.step()
        count.add_(1)

    return net, update


def train(seed, width):
    """The learner, looks at all models, CPU seconds of the ensemble."""
    learner = make_learner(seed, width, RECIPES["student"])
    looks = dict(teacher=looks_at(samples(many_steps), learner.score, learner.score_update))
    for name in list(RECIPES)[: 2 if width == WIDTHS[0] else 1]:
        pupil = learner if name == "student" else make_learner(seed, width, RECIPES[name])
        pupil.score.load_state_dict(learner.score.state_dict())
        if pupil.args.init_from_teacher:
            pupil.start_from_teacher()
        looks[name] = looks_at(samples(one_step), pupil.consistency, pupil.consistency_update, stride=5)
    start = time.process_time()
    net, update = make_ensemble(seed, width, learner.q_rows)
    looks["ensemble"] = looks_at(lambda net, rows, _: net(rows.expand(5, -1, -1)).squeeze(2).T, net, update)
    return learner, looks, time.process_time() - start


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
    for name, *sampler in (("teacher", many_steps, learner.score), ("student", one_step, learner.consistency)):
        with torch.no_grad():
            x = learner.to_return(sample_returns(*sampler, pairs(1, action), 4_000, draw))
        axes.hist(x.flatten(), bins=60, density=True, histtype="step", color=COLORS[name], label=name)
    axes.set(title="(a) returns of one action in\nthe data (bimodal), seed 0", xlabel="return", yticks=[])
    axes.legend(fontsize=8)


def draw_spread(axes, runs):
    """Longest training, both widths and all seeds."""
    for state, height in enumerate(TRUE_H):
        axes.plot([state - 0.4, state + 0.4], [height] * 2, color="grey", label="truth" if state == 0 else None)
        for i, (model, color) in enumerate(COLORS.items()):
            found = [run["looks"][model][-1][state] for run in runs if model in run["looks"]]
            for side, face, shift in (("h_on", color, -0.04), ("h_off", "white", 0.04)):
                x = [state + 0.2 * (i - 1.5) + shift] * len(found)
                axes.plot(x, [at[side] for at in found], "o", color=color, markerfacecolor=face, markersize=4)
    axes.plot([], [], "ko", label="on the data")
    axes.plot([], [], "ko", markerfacecolor="white", label="off the data")
    axes.set_xticks(range(3), STATES)
    axes.set(
        title=f"(b) spread of the predictions,\n{LENGTHS[-1]:,} updates, each seed", yscale="log", ylim=(0.05, 400)
    )
    axes.legend(fontsize=8, ncols=2, loc="upper center")


def draw_auc(axes, runs):
    """Mean of all states, widths and seeds, and the range of the seeds."""
    for model, color in COLORS.items():
        values = [torch.tensor([[[at["auc"] for at in states] for states in run["looks"][model]] for run in runs
                                if run["seed"] == seed and model in run["looks"]]).mean(dim=(0, 2))
                  for seed in {run["seed"] for run in runs}]  # fmt: skip
        values = torch.stack(values)  # [seeds, lengths]
        axes.plot(LENGTHS, values.mean(0), "o-", color=color, label=model)
        axes.fill_between(LENGTHS, values.amin(0), values.amax(0), color=color, alpha=0.3, linewidth=0)
    axes.axhline(0.5, color="black", linewidth=0.8, label="chance")
    axes.set_xscale("log")
    axes.set_xticks(LENGTHS, [f"{length:,}" for length in LENGTHS], fontsize=8)
    axes.minorticks_off()
    axes.set(title="(b) is the spread larger off the\ndata? AUC, claimed near 1", xlabel="updates of each model",
             ylim=(0, 1.5), yticks=(0, 0.25, 0.5, 0.75, 1))  # fmt: skip
    axes.legend(fontsize=8, loc="upper center", ncols=2, columnspacing=0.8, handlelength=1.2)


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


def show(runs):
    print(f"{'model, width, updates':>28}   state       H on | off | true   W1 on | off | exact   AUC of each seed")
    for model, width, (k, length) in itertools.product(COLORS, WIDTHS, enumerate(LENGTHS)):
        found = [run["looks"][model][k] for run in runs if run["width"] == width and model in run["looks"]]
        for i, name in enumerate(STATES if found else ()):
            rows = [states[i] for states in found]
            of = {key: sum(row[key] for row in rows) / len(rows) for key in rows[0]}
            h = f"{of['h_on']:6.1f} {of['h_off']:5.1f} {TRUE_H[i]:5.1f}"
            w1 = f"{of['w1_on']:6.1f} {of['w1_off']:5.1f} {FLOOR[i]:5.1f}" if "w1_on" in of else " " * 18
            aucs = " ".join(f"{row['auc']:.2f}" for row in rows)
            print(f"{model:>15} {width:>4} {length:>7,}   {name:<10}{h}   {w1}   {aucs}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    seeds = parser.parse_args().seeds
    figures, results = ROOT / "tests/figures", ROOT / "tests/results"
    if seeds != SEEDS:  # any other run leaves the committed files alone
        figures = results = ROOT / "runs/claims"
        results.mkdir(parents=True, exist_ok=True)
    start, runs, learners = time.process_time(), [], []
    for seed, width in itertools.product(seeds, WIDTHS):
        learner, looks, seconds = train(seed, width)
        runs.append(dict(seed=seed, width=width, looks=looks, ensemble_cpu_seconds=round(seconds, 1)))
        print(f"seed {seed}, {width} wide: {time.process_time() - start:.0f} CPU seconds so far", flush=True)
        if width == WIDTHS[-1]:
            learners.append(learner)
    show(runs)
    points = [fixed_points(learner) for learner in learners]
    error = max((found / expected - 1).abs().max().item() for _, _, found, expected in points)
    share = [off[h > h.quantile(Args.beta)].float().mean().item() for h, off, _, _ in points]
    print(f"\n(c) fixed points of Eq. 7 | their closed form: {error:.1e} apart at most")
    print("    share of U off the data, each seed:", *(f"{x:.2f}" for x in share), "| claim near 1, chance 0.50")
    env = "halfcheetah-demo-medium-replay"
    state, both = explained(env)
    print(f"    {env}: the state explains {state:.3f} of the return's variance, with the action {both:.3f}")
    save_figure(
        figures / "qdq.png",
        functools.partial(draw_density, learner=learners[0]),
        functools.partial(draw_spread, runs=runs),
        functools.partial(draw_auc, runs=runs),
        size=3.5,
    )

    result = dict(
        command=" ".join(["python tests/benchmarks/claim_qdq.py", *sys.argv[1:]]), seeds=seeds, torch=torch.__version__,
        cpu_seconds=round(time.process_time() - start), states=STATES, updates=LENGTHS, recipes=RECIPES,
        true_h=TRUE_H.tolist(), w1_of_exact_samples=FLOOR.tolist(), claimed_auc=1.0, runs=runs,
        share_of_uncertain_set_off_data=share, fixed_point_error=error,
        variance_explained=dict(env=env, state=state, state_and_action=both),
    )  # fmt: skip
    (results / "claim_qdq.json").write_text(json.dumps(result, indent=1) + "\n")
    print(f"{result['cpu_seconds']} CPU seconds")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
