"""GRPO: 04_rlvr.py and TRL's GRPOTrainer in turn, seconds a step by phase and the reward.

    pip install -r bench/requirements.txt
    python bench/rlvr.py [--model RUN/sft --rounds 3 --steps 12]
    python bench/rlvr.py --model DIR --prompts 4 --steps 3 --rounds 1       a real model's directory

The same problems (the toy's; for another model word problems) in the same order, 16 x 8 rollouts a
step, at most 160 new tokens, temperature 0.85, the same verifier as reward, KL 0.001 against the
start, token-mean loss, AdamW, float32, one thread. TRL generates with transformers' `generate` and
is run with its whole batch in one forward, in micro-batches of 32, and with transformers'
continuous batching. Each run has its own process, and its seconds are CPU seconds, so that other
processes disturb little. The first 2 steps are left out of the times, or the first half of fewer
than 4. The table gives medians over steps and rounds, and the ratio within the round. Each round
has a seed of its own, the same for all; rewards are means over rounds.
"""

import argparse
import collections
import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from bench.data import make_data

GROUP, MAX_TOKENS, TEMPERATURE, LR, KL, SKIP = 8, 160, 0.85, 1e-4, 0.001, 2
PHASES = ("rollout", "verify", "reference", "update", "sync")


def run_ours(args):
    out = Path(args.scratch) / f"ours{time.time()}"
    flags = {
        "--model": args.model,
        "--problems": args.data,
        "--out": out,
        "--lr": LR,
        "--prompts-per-step": args.prompts,
        "--rollouts": GROUP,
        "--max-response-tokens": MAX_TOKENS,
        "--temperature": TEMPERATURE,
        "--kl-coef": KL,
        "--max-steps": args.steps,
        "--token-budget": 4096,
        "--seed": args.seed,
        "--engine": "hf",
        "--verify-workers": 1,
        "--save-every": 1000,
        "--log-rollouts": 0,
    }
    words = [str(word) for pair in flags.items() for word in pair]
    importlib.import_module("04_rlvr").main(words)
    rows = [json.loads(line) for line in open(out / "metrics.jsonl")]
    return [{"total": r["seconds"], **{p: r[f"seconds_{p}"] for p in PHASES}} for r in rows], [
        r["reward"] for r in rows
    ]


def run_trl(args, micro_batch: int, continuous: bool = False):
    micro_batch = min(micro_batch, args.prompts * GROUP)
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer
    import common
    from model import END_OF_TURN, load_tokenizer, model_dir, render_prompt
    from grading import verifier

    tokenizer = load_tokenizer(args.model)
    tokenizer.eos_token = END_OF_TURN
    problems = list(common.read_jsonl(args.data))
    ordered = [
        problems[i]
        for s in range(1, args.steps + 1)
        for i in common.rows_of_step(len(problems), args.prompts, s, args.seed)
    ]
    text = [tokenizer.decode(render_prompt(tokenizer, p["problem"])) for p in ordered]
    assert all(
        tokenizer(t)["input_ids"] == render_prompt(tokenizer, p["problem"])
        for t, p in zip(text, ordered)
    )
    data = Dataset.from_dict({"prompt": text, "answer": [p["answer"] for p in ordered]})

    def reward(prompts, completions, answer, **_):
        return [
            float(v.correct is True)
            for v in verifier.verify_many(list(zip(completions, answer)), workers=1)
        ]

    config = GRPOConfig(
        output_dir=args.scratch + "/trl",
        use_cpu=True,
        bf16=False,
        fp16=False,
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=args.prompts * GROUP // micro_batch,
        num_generations=GROUP,
        max_steps=args.steps,
        max_completion_length=MAX_TOKENS,
        temperature=TEMPERATURE,
        top_p=1.0,
        top_k=0,
        beta=KL,
        loss_type="dapo",
        scale_rewards="group",
        epsilon=0.2,
        learning_rate=LR,
        weight_decay=0.01,
        max_grad_norm=1.0,
        lr_scheduler_type="constant",
        optim="adamw_torch_fused",
        shuffle_dataset=False,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        gradient_checkpointing=False,
        seed=args.seed,
        use_transformers_continuous_batching=continuous,
    )
    marks, rewards, spent = [], [], collections.Counter()

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            marks.append({"begin": time.perf_counter(), "before": collections.Counter(spent)})

        def on_step_end(self, *_, **__):
            marks[-1] |= {"end": time.perf_counter(), "after": collections.Counter(spent)}

        def on_log(self, args, state, control, logs, **_):
            if "reward" in logs:
                rewards.append(logs["reward"])

    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(model_dir(args.model), dtype=torch.float32),
        args=config,
        train_dataset=data,
        processing_class=tokenizer,
        reward_funcs=reward,
        callbacks=[Clock()],
    )

    def timed(name, function):
        def wrapper(*positional, **named):
            phase = (
                name if name != "logps" else "update" if torch.is_grad_enabled() else "reference"
            )
            start = time.perf_counter()
            try:
                return function(*positional, **named)
            finally:
                spent[phase] += time.perf_counter() - start

        return wrapper

    trainer._generate = timed("rollout", trainer._generate)
    trainer._calculate_rewards = timed("verify", trainer._calculate_rewards)
    trainer._get_per_token_logps_and_entropies = timed(
        "logps", trainer._get_per_token_logps_and_entropies
    )
    trainer.train()
    steps = []
    for mark in marks:
        row = {p: mark["after"][p] - mark["before"][p] for p in PHASES}
        row["total"] = mark["end"] - mark["begin"]
        row["update"] = (
            row["total"] - row["rollout"] - row["verify"] - row["reference"]
        )  # forward, backward, AdamW, the rest
        steps.append(row)
    return steps, rewards


VARIANTS = {
    "ours": run_ours,
    "TRL, 128 at once": lambda a: run_trl(a, 128),
    "TRL, 32 at once": lambda a: run_trl(a, 32),
    "TRL, continuous": lambda a: run_trl(a, 32, True),
}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model",
        default=str(ROOT / "toy/base"),
        help="best one that 03 has fine-tuned",
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--prompts", type=int, default=16, help="problems a step")
    parser.add_argument("--seed", type=int, default=42, help="of the first round (default 42)")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    for hidden in ("--only", "--data", "--scratch"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        import torch

        torch.set_num_threads(1)
        time.perf_counter = time.process_time         # 04's clock too
        steps, rewards = VARIANTS[args.only](args)
        skip = min(SKIP, args.steps // 2)
        medians = {p: statistics.median(s[p] for s in steps[skip:]) for p in ("total", *PHASES)}
        print("\n" + json.dumps({"seconds": medians, "rewards": rewards}))
        return
    with tempfile.TemporaryDirectory() as scratch:
        make_data(Path(scratch), args.model)
        rounds = []
        for number in range(args.rounds):
            rounds.append({})
            for name in args.variants:
                out = subprocess.run(
                    [
                        sys.executable,
                        __file__,
                        "--model",
                        args.model,
                        "--steps",
                        str(args.steps),
                        "--prompts",
                        str(args.prompts),
                        "--only",
                        name,
                        "--seed",
                        str(args.seed + number),
                        "--data",
                        scratch + "/rlvr.jsonl",
                        "--scratch",
                        scratch,
                    ],
                    capture_output=True,
                    text=True,
                    env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
                )
                if out.returncode:
                    status = f"{name} failed, exit status {out.returncode}"
                    print(f"{status}: {out.stderr.strip().splitlines()[-1]}", file=sys.stderr)
                    continue
                rounds[-1][name] = json.loads(out.stdout.strip().splitlines()[-1])
                reward = statistics.mean(rounds[-1][name]["rewards"])
                print(
                    f"round {number + 1}: {name:16} {rounds[-1][name]['seconds']['total']:6.2f} "
                    f"s a step, mean reward {reward:.3f}",
                    flush=True,
                )
        print(
            f"\n{'seconds a step':16} "
            + " ".join(f"{p:>9}" for p in ("total", *PHASES))
            + "  it / ours   reward, first 3 -> last 3 steps"
        )
        for name in args.variants:
            got = [r for r in rounds if name in r and "ours" in r]
            if got:
                cells = " ".join(
                    f"{statistics.median(r[name]['seconds'][p] for r in got):9.2f}"
                    for p in ("total", *PHASES)
                )
                ratio = statistics.median(
                    r[name]["seconds"]["total"] / r["ours"]["seconds"]["total"] for r in got
                )
                first, last = (
                    statistics.mean(x for r in got for x in r[name]["rewards"][s])
                    for s in (slice(0, 3), slice(-3, None))
                )
                print(f"{name:16} {cells} {ratio:10.2f}   {first:.3f} -> {last:.3f}")


if __name__ == "__main__":
    main()
