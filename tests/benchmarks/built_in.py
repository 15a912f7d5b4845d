"""The README's results: every script on the built-in HalfCheetah replay data, three seeds.

    python tests/benchmarks/built_in.py     # 36 minutes of one CPU core; writes the table in README.md

A run is the script's own command; its summary goes to tests/results/<name>.json, with the CPU minutes of one seed. Runs
that are finished are not run again (runs/built_in).
"""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
OUT = ROOT / "runs" / "built_in"
SEEDS = "0 1 2"
RUNS = dict(
    dtql="dtql.py",
    srpo="srpo.py",
    dac="dac.py",
    qdq="qdq.py",
    cped="cped.py",
    bdm_rebrac_sbc="bdm_rebrac_sbc.py",
    rebrac="bdm_rebrac_sbc.py --w-s 0",
)


def train(name, command):
    """The summary of all seeds, made now or earlier."""
    script, *flags = command.split()
    folder = OUT / name / Path(script).stem / "halfcheetah-demo-medium-replay"
    if not (folder / "cpu_minutes").exists():
        words = [sys.executable, ROOT / script, *flags, "--seed", *SEEDS.split(), "--device", "cpu"]
        with open(OUT / f"{name}.log", "w") as log:
            words += ["--out", OUT / name]
            child = subprocess.Popen(words, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"})
            _, status, used = os.wait4(child.pid, 0)
        if status:
            sys.exit(f"{name} failed, see {log.name}")
        (folder / "cpu_minutes").write_text(str((used.ru_utime + used.ru_stime) / 60 / len(SEEDS.split())))
    minutes = float((folder / "cpu_minutes").read_text())
    summary = json.loads((folder / "summary.json").read_text()) | dict(cpu_minutes=minutes)
    (ROOT / f"tests/results/{name}.json").write_text(json.dumps(summary, indent=1) + "\n")
    return summary


def main():
    OUT.mkdir(parents=True, exist_ok=True)
    lines = ["| script | last evaluation | mean of the last five | updates of the last phase | CPU minutes a seed |"]
    lines.append("|---|---|---|---|---|")
    for name, command in RUNS.items():
        found = train(name, command)
        cells = ["{mean:,.0f} ± {std:,.0f}".format(**found["return"][when]) for when in ("last", "last_five")]
        lines.append(f"| `{command}` | {' | '.join(cells)} | {found['steps']:,} | {found['cpu_minutes']:.1f} |")
        print(lines[-1], flush=True)
    page, begin, end = ROOT / "README.md", "<!-- built_in.py -->\n", "<!-- end -->"
    head, rest = page.read_text().split(begin)
    page.write_text(head + begin + "\n".join(lines) + "\n" + rest[rest.index(end) :])


if __name__ == "__main__":
    main()
