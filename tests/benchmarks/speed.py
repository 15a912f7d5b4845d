"""How fast the scripts are: operations and updates per second of each phase, memory, start-up, evaluation.

    python tests/benchmarks/speed.py                                  # the paper's sizes, walker2d's dimensions
    python tests/benchmarks/speed.py --demo --device cpu              # the small settings of the built-in data
    python tests/benchmarks/speed.py --scripts dtql --seeds 4 --json after.json
    python tests/benchmarks/speed.py --compare before.json after.json

Each script's own main() runs on random data with `Run` and `capture` replaced, so that settings, learners and phases
are the script's. Columns: `operations` are calls into PyTorch's backend for one update, without views and
allocations; `kernels` what reaches a GPU; `eager` and `captured` are updates per second, plain and as a CUDA graph,
the median of some windows after a warm-up; `together` is the time of --seeds learners side by side over that of one.
"""

import argparse
import importlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import gymnasium
import h5py
import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import common  # noqa: E402

SCRIPTS = ("bdm_rebrac_sbc", "cped", "dac", "dtql", "qdq", "srpo")
SIZES = {"walker2d-medium-v2": (17, 6), "hopper-medium-v2": (11, 3)}  # whose settings; observations, actions
DEMO = "halfcheetah-demo-medium-replay"
WINDOWS = 5


class Operations(TorchDispatchMode):
    """Counts calls into the backend, without views and allocations."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not func.is_view and "empty" not in str(func) and "detach" not in str(func)
        return func(*args, **(kwargs or {}))


def random_arrays(rows, obs_dim, action_dim):
    """Episodes of 1,000 steps of noise, as D4RL's files name them."""
    rng = np.random.default_rng(0)
    return dict(
        observations=rng.standard_normal((rows, obs_dim), np.float32),
        actions=np.tanh(rng.standard_normal((rows, action_dim), np.float32)),
        rewards=rng.standard_normal(rows, np.float32),
        terminals=np.zeros(rows, bool),
        timeouts=np.arange(1, rows + 1) % 1000 == 0,
    )


def random_dataset(env, rows, obs_dim, action_dim):
    arrays = random_arrays(rows, obs_dim, action_dim).values()
    return common.Dataset.from_arrays(env, *arrays, make_env=lambda: common.make_env("HalfCheetah-v4"))


def wait_for(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def rate(step, seconds, device):
    """Calls of `step` per second: the median of some windows of that length."""
    step()
    wait_for(device)
    start, calls = time.perf_counter(), 0
    while calls < 2 or time.perf_counter() - start < seconds:  # warm-up; tells how many calls fill a window
        step()
        calls += 1
    wait_for(device)
    calls = max(round(calls * seconds / (time.perf_counter() - start)), 1)
    rates = []
    for _ in range(WINDOWS):
        start = time.perf_counter()
        for _ in range(calls):
            step()
        wait_for(device)
        rates.append(calls / (time.perf_counter() - start))
    return statistics.median(rates)


def count_kernels(step):
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        step()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in trace.events())


def evaluation_seconds(act, steps):
    """Ten episodes of HalfCheetah, `steps` long."""
    envs = [gymnasium.wrappers.TimeLimit(common.make_env("HalfCheetah-v4"), steps) for _ in range(10)]
    start = time.perf_counter()
    common.evaluate(act, envs, seed=0)
    return time.perf_counter() - start


class Probe:
    """In place of common.Run and common.capture: measures the phases that a script's main() goes through."""

    def __init__(self, script, options, results):
        self.script, self.options, self.results = script, options, results

    def capture(self, learners, method):
        self.method = method

    def __call__(self, args, learners, data, script, protocol, phases):
        self.args, self.learners = args, learners
        self.folders = [Path(self.options.folder) for _ in learners]
        return self

    def updates(self, phase, stride=1, evaluate=False, at_end=None):
        options, first, device = self.options, self.learners[0], self.learners[0].generator.device
        plain = getattr(first, self.method)
        result = self.results[f"{self.script}/{phase}"] = {}
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        plain()
        with Operations() as operations:
            plain()
        result["operations"] = operations.count / stride
        if device.type == "cuda":
            result["kernels"] = count_kernels(plain) / stride
        result["eager"] = stride * rate(plain, options.seconds, device)
        alone = result["eager"]
        if device.type == "cuda":
            alone = result["captured"] = stride * rate(common.capture([first], self.method), options.seconds, device)
            result["memory MB"] = torch.cuda.max_memory_allocated(device) / 1e6
        if len(self.learners) > 1:
            result["together"] = (
                alone / stride / rate(common.capture(self.learners, self.method), options.seconds, device)
            )
        show(f"{self.script}/{phase}", result)
        if at_end:
            at_end()
        if evaluate and options.eval_steps and first.data.obs_dim == 17:
            act = common.policy_of(first)
            act(np.zeros((10, 17), np.float32))
            result = dict(seconds=evaluation_seconds(act, options.eval_steps))
            self.results[f"{self.script}/evaluation"] = result
            show(f"{self.script}/evaluation", result)
        return ()

    def finish(self):
        pass


def measure_phases(script, options, results):
    """Run a script's main() with a Probe for its books."""
    module, probe = importlib.import_module(script), Probe(script, options, results)
    module.Run, module.capture = probe, probe.capture
    module.load_dataset = lambda env, *_, **__: random_dataset(env, options.rows, *options.size)
    sys.argv = [f"{script}.py", "--env", options.env, "--device", options.device]
    sys.argv += ["--seed", *map(str, range(options.seeds)), "--out", options.folder]
    module.main()


def measure_start_up(script, options, results):
    """Seconds from the start of Python to the end of the first update, data in the file cache; in all and by part."""
    code = "import sys; sys.path.insert(0, sys.argv.pop(1)); import speed; speed.start_up(sys.argv.pop(1))"
    command = [sys.executable, "-c", code, str(Path(__file__).parent), script, "--env", options.env]
    command += ["--device", options.device, "--out", options.folder]
    command += [] if options.demo else ["--data-path", options.file]
    runs = []
    for _ in range(3):
        start = time.time()
        answer = subprocess.run(command, capture_output=True, text=True)
        if answer.returncode:
            sys.exit(f"error: {script} did not start: {answer.stderr.strip().splitlines()[-1]}")
        stamps = json.loads(answer.stdout.splitlines()[-1])
        parts = dict(zip(stamps, np.diff([start, *stamps.values()]).tolist()))
        runs.append(parts | dict(seconds=stamps["first update"] - start))
    result = results[f"{script}/start-up"] = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
    show(f"{script}/start-up", result)


def start_up(script):
    """In a fresh process: run `script` up to its first update, print when each part was done, and vanish."""
    module = importlib.import_module(script)
    stamps, load, capture = dict(imports=time.time()), module.load_dataset, module.capture

    def load_dataset(*args, **more):
        data = load(*args, **more)
        stamps["data"] = time.time()
        return data

    def capture_first(learners, phase):
        update = capture(learners, phase)

        def step():
            update()
            learners[0].metrics.read()  # waits for the device
            stamps["first update"] = time.time()
            print(json.dumps(stamps), flush=True)
            os._exit(0)

        return step

    module.load_dataset, module.capture = load_dataset, capture_first
    sys.argv[0] = f"{script}.py"
    module.main()


def write_hdf5(path, arrays):
    with h5py.File(path, "w") as file:
        for name, array in arrays.items():
            file.create_dataset(name, data=array, compression="gzip", compression_opts=4)


def show(name, result):
    numbers = ", ".join(f"{key} {value:.4g}" for key, value in result.items())
    print(f"{name:<32} {numbers}", flush=True)


def compare(first, second):
    """The numbers that two files share, and the second over the first."""
    old, new = (json.loads(Path(path).read_text())["results"] for path in (first, second))
    for name in old:
        for key in old[name]:
            if key in new.get(name, {}):
                a, b = old[name][key], new[name][key]
                print(f"{name:<32} {key:<14} {a:10.4g} {b:10.4g}   x {b / a:.2f}")


def main():
    there = [name for name in SCRIPTS if (ROOT / f"{name}.py").exists()]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scripts", nargs="*", default=there, choices=there, metavar="SCRIPT")
    parser.add_argument("--env", default="walker2d-medium-v2", choices=list(SIZES))
    parser.add_argument("--demo", action="store_true", help="the small settings of the built-in HalfCheetah data")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=2.0, help="length of a window")
    parser.add_argument("--seeds", type=int, default=1, help="learners side by side")
    parser.add_argument("--rows", type=int, default=1_000_000, help="transitions in the data")
    parser.add_argument("--threads", type=int, help="of PyTorch on the CPU")
    parser.add_argument("--eval-steps", type=int, default=1000, help="length of an episode; 0: no evaluation")
    parser.add_argument("--no-start-up", dest="start_up", action="store_false")
    parser.add_argument("--json", help="file for the results")
    parser.add_argument("--compare", nargs=2, metavar="JSON")
    options = parser.parse_args()
    if options.compare:
        return compare(*options.compare)
    if options.threads:
        torch.set_num_threads(options.threads)
    options.size = SIZES[options.env]
    if options.demo:
        options.env, options.size = DEMO, (17, 6)

    device = torch.device(options.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    machine = f"{name}, {platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    about = dict(machine=machine, load=os.getloadavg(), torch=torch.__version__, command=" ".join(sys.argv))
    print(*(f"{key:<10} {value}" for key, value in about.items()), sep="\n", flush=True)
    results = {}
    with tempfile.TemporaryDirectory() as options.folder:
        for script in options.scripts:
            measure_phases(script, options, results)
        if options.eval_steps:
            mlp = torch.nn.Sequential(torch.nn.Linear(17, 256), torch.nn.ReLU(), torch.nn.Linear(256, 256),
                                      torch.nn.ReLU(), torch.nn.Linear(256, 6), torch.nn.Tanh()).to(device)  # fmt: skip

            @torch.no_grad()
            def act(obs):
                return mlp(torch.as_tensor(obs, device=device)).cpu().numpy()

            results["plain network/evaluation"] = dict(seconds=evaluation_seconds(act, options.eval_steps))
            show("plain network/evaluation", results["plain network/evaluation"])
        if options.start_up and options.scripts:
            options.file = f"{options.folder}/random.hdf5"
            write_hdf5(options.file, random_arrays(options.rows, *options.size))
            for script in options.scripts:
                measure_start_up(script, options, results)
    if options.json:
        Path(options.json).write_text(json.dumps(about | dict(results=results), indent=2))


if __name__ == "__main__":
    main()
