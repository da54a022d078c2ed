"""Does GRPO teach the toy model, and do shuffled rewards not? Held-out Pass@1 before and after, a
seed a row.

    bash run_all.sh toy --seeds 3 && python bench/rlvr_learns.py [RUN --seeds 0 1 2 --arm sft]

For each seed of a finished toy run: the arm's Pass@1 on the in-distribution problems before and
after its GRPO, as the run measured them, and after the same GRPO (same recipe, model, problems and
seed) with the rewards of each step permuted over its rollouts: as many rewards, but not for those
who earned them. The control goes to RUN/shuffled; what exists there is kept. About a minute a seed.
"""

import argparse
import importlib
import os
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import torch

import common


def shuffled(rewards_of):
    """04's `rewards_of`, with the rewards of each step permuted over its rollouts."""
    generator = torch.Generator().manual_seed(0)

    def shuffled_rewards(verdicts):
        rewards = rewards_of(verdicts)
        return rewards[torch.randperm(len(rewards), generator=generator)]

    return shuffled_rewards


def call(*argv):
    subprocess.run(
        [sys.executable, *map(str, argv)],
        check=True,
        stdout=subprocess.DEVNULL,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def pass1(evaluated: Path) -> float:
    rows = list(common.read_jsonl(evaluated / "id.problems.jsonl"))
    return sum(r["n_correct"] for r in rows) / sum(r["n"] for r in rows)


def rewards(trained: Path) -> str:
    reward = [row["reward"] for row in common.read_jsonl(trained / "metrics.jsonl")]
    return f"{statistics.fmean(reward[:3]):.3f} -> {statistics.fmean(reward[-3:]):.3f}"


def main():
    if sys.argv[1:2] == ["--shuffled"]:
        rlvr = importlib.import_module("04_rlvr")
        rlvr.rewards_of = shuffled(rlvr.rewards_of)
        return rlvr.main(sys.argv[2:])
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "run",
        nargs="?",
        default="runs/toy",
        type=Path,
        help="a finished run of the recipe (default runs/toy)",
    )
    parser.add_argument("--recipe", default=ROOT / "recipes/toy.toml")
    parser.add_argument("--arm", default="sft")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    print(
        "seed   before   GRPO   shuffled   training reward, first 3 -> last 3 steps   the same, "
        "shuffled"
    )
    for seed in args.seeds:
        home = args.run.resolve() / f"seed-{seed}"
        arm, control = home / args.arm, args.run.resolve() / "shuffled" / f"seed-{seed}" / args.arm
        call(
            Path(__file__).resolve(),
            "--shuffled",
            "--recipe",
            args.recipe,
            "--model",
            arm / "sft",
            "--problems",
            home / "data/rlvr.jsonl",
            "--out",
            control / "rlvr",
            "--seed",
            seed,
        )
        call(
            "05_eval.py",
            "--recipe",
            args.recipe,
            "--model",
            control / "rlvr",
            "--problems",
            home / "data/id.jsonl",
            "--out",
            control / "eval",
            "--seed",
            seed,
            "--entropy-samples",
            0,
        )
        print(
            f"{seed:4}    {pass1(arm / 'eval'):.3f}   {pass1(arm / 'eval_rlvr'):.3f}   "
            f"{pass1(control / 'eval'):.3f}      "
            f"{rewards(arm / 'rlvr')}                           {rewards(control / 'rlvr')}",
            flush=True,
        )


if __name__ == "__main__":
    main()
