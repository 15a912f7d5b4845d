"""Kills a run again and again (SIGKILL), resumes it, and compares its end, bit for bit, with a run never disturbed.

    python tests/benchmarks/kill.py
    python tests/benchmarks/kill.py --script srpo --kills 20 -- --env halfcheetah-demo-medium-replay --steps 500

What follows `--` goes to the script. Exit code 0 if both runs end with equal checkpoints, 1 if not.
"""

import argparse
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from common import load_checkpoint  # noqa: E402

SMALL = "--env pendulum-demo-medium --steps 800 --checkpoint-every 20 --eval-every 400 --eval-episodes 2".split()


def start(script, out, flags):
    command = [sys.executable, "-u", str(ROOT / f"{script}.py"), *SMALL, *flags, "--out", str(out), "--resume"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def checkpoint_of(out):
    return next(Path(out).glob("*/*/seed*/checkpoint.pt"), None)


def saved_at(out):
    """When the run's checkpoint was written, None before the first."""
    path = checkpoint_of(out)
    return path and path.stat().st_mtime_ns


def kill_after(process, out, writes, wait):
    """Let the run write `writes` checkpoints, wait some seconds more, and kill it; False if it ended before."""
    process.stdout.readline()  # "resuming ..." or "no checkpoint to resume": training begins
    last = saved_at(out)
    while writes and process.poll() is None:
        if saved_at(out) != last:
            last, writes = saved_at(out), writes - 1
        time.sleep(0.001)
    time.sleep(wait)
    ended = process.poll() is not None
    process.kill()
    process.communicate()
    return not ended


def same(a, b):
    """Whether two nested containers hold the same values, tensors bit for bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def main():
    split = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--script", default="dtql")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    args = parser.parse_args(sys.argv[1:split])
    flags, rng = sys.argv[split + 1 :], random.Random(args.seed)

    with tempfile.TemporaryDirectory() as folder:
        whole, broken = Path(folder, "whole"), Path(folder, "broken")
        process = start(args.script, whole, flags)
        process.stdout.readline()
        begin, writes, last = time.perf_counter(), 0, None
        while process.poll() is None:
            if saved_at(whole) != last:
                last, writes = saved_at(whole), writes + 1
            time.sleep(0.001)
        gap = (time.perf_counter() - begin) / max(writes, 1)  # seconds between two checkpoints
        if process.returncode:
            sys.exit("error: the undisturbed run failed")
        if writes < 2 * args.kills + 2:
            sys.exit(
                f"error: {writes} checkpoints are too few for {args.kills} kills: give a smaller --checkpoint-every"
            )
        print(f"undisturbed run: {writes} checkpoints, one in {gap:.2f} s", flush=True)

        for number in range(1, args.kills + 1):
            more, wait = rng.choice((0, 1, 2)), rng.random() * gap
            if not kill_after(start(args.script, broken, flags), broken, more, wait):
                sys.exit(f"error: the run ended before kill {number}")
            text = "before the first checkpoint"
            if path := checkpoint_of(broken):
                checkpoint = load_checkpoint(path.parent)
                text = f"checkpoint at {checkpoint['phase']} update {checkpoint['step']}"
            print(f"kill {number}: {more} checkpoints and {wait:.2f} s after the start, {text}", flush=True)
        process = start(args.script, broken, flags)
        process.communicate()
        if process.returncode:
            sys.exit("error: the resumed run failed")

        ends = [load_checkpoint(checkpoint_of(out).parent) for out in (whole, broken)]
        different = [key for key in ("phase", "step", "done", "dims") if ends[0][key] != ends[1][key]]
        learners = [end["learner"] for end in ends]
        different += [name for name in learners[0] if not same(learners[0][name], learners[1][name])]
    if different:
        sys.exit(f"error: the runs differ in {', '.join(different)}")
    print(f"equal, bit for bit, after {args.kills} kills: {', '.join(learners[0])}")


if __name__ == "__main__":
    main()
