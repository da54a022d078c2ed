"""Training throughput: 03_train_oxa.py, TRL's SFTTrainer (padded and packed) and the bare model
(padded, as the rows come and sorted by length), in turn.

    pip install -r bench/requirements.txt && python bench/train.py [--rounds 3 --steps 40]
    python bench/train.py --model DIR --per-step 8 --steps 6 --rounds 1     a real model's directory

The same traces (the toy's; for another model word problems, which need reasoning-gym), 32 sequences
a step, float32, AdamW, one thread, cross entropy on the response. Bare: forward, backward and AdamW
of the stock Hugging Face model on padded batches, and nothing else; sorted by length it is the most
that the model gives without packing. Tokens are the sequences' own (prompt + response, padding not
counted), over the median seconds of a step; the first 5 steps are left out, or the first half of
fewer than 10. Each runs in its own process, and its seconds are CPU seconds, so that other
processes disturb little; the table gives medians over rounds and ratios within the round.
"""

import argparse
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

SKIP = 5


def sequences(args):
    import common
    from model import encode_response, load_tokenizer, render_prompt

    tokenizer = load_tokenizer(args.model)
    for row in common.read_jsonl(args.data):
        prompt = render_prompt(tokenizer, row["problem"])
        yield prompt + encode_response(tokenizer, row["response"]), len(prompt)


def first_rows(args) -> Path:
    """A training set of as many rows as the steps take."""
    lines = Path(args.data).read_text().splitlines(keepends=True)
    n = args.steps * args.per_step
    if len(lines) < n:
        raise SystemExit(f"{args.steps} steps of {args.per_step} need {n} rows; the data have "
                         f"{len(lines)}")
    path = Path(args.scratch) / "first.jsonl"
    path.write_text("".join(lines[:n]))
    return path


def run_ours(args):
    out = Path(args.scratch) / f"ours{time.time()}"
    flags = {
        "--model": args.model,
        "--data": first_rows(args),
        "--out": out,
        "--lr": args.lr,
        "--epochs": 1,
        "--ce-per-step": args.per_step,
        "--token-budget": 4096,
        "--save-every": 0,
    }
    words = [str(word) for pair in flags.items() for word in pair]
    importlib.import_module("03_train_oxa").main(words)
    rows = [json.loads(line) for line in open(out / "metrics.jsonl")]
    return [r["seconds"] for r in rows], [r["tokens"] for r in rows], [r["ce_loss"] for r in rows]


def run_bare(args, by_length: bool):
    """Padded batches of stock Hugging Face, as the rows come or of like lengths."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    rows = list(sequences(args))
    if by_length:
        rows.sort(key=lambda s: len(s[0]))
    seconds, tokens, losses = [], [], []
    generator = torch.Generator().manual_seed(0)
    for start in (
        torch.randperm(len(rows) // args.per_step, generator=generator)[: args.steps]
        * args.per_step
    ).tolist():
        batch = rows[start : start + args.per_step]
        width = max(len(ids) for ids, _ in batch)
        begin = time.perf_counter()
        ids = torch.tensor([s + [0] * (width - len(s)) for s, _ in batch])
        labels = torch.tensor([[-100] * p + s[p:] + [-100] * (width - len(s)) for s, p in batch])
        mask = torch.tensor([[1] * len(s) + [0] * (width - len(s)) for s, _ in batch])
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - begin)
        tokens.append(sum(len(s) for s, _ in batch))
        losses.append(loss.item())
    return seconds, tokens, losses


def run_trl(args, micro_batch: int, packing: bool):
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, TrainerCallback
    from trl import SFTConfig, SFTTrainer
    from model import load_tokenizer

    micro_batch = min(micro_batch, args.per_step)
    rows = list(sequences(args))
    data = Dataset.from_dict(
        {
            "input_ids": [s for s, _ in rows],
            "completion_mask": [[0] * p + [1] * (len(s) - p) for s, p in rows],
        }
    )
    mean_tokens = sum(len(s) for s, _ in rows) / len(rows)
    # packed: rows of 512 tokens, as many a step as hold the same number of tokens
    accumulation = args.per_step // micro_batch
    if packing:
        accumulation = max(1, round(args.per_step * mean_tokens / 512))
    config = SFTConfig(
        output_dir=args.scratch + "/trl",
        use_cpu=True,
        bf16=False,
        fp16=False,
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=accumulation,
        max_steps=args.steps,
        learning_rate=args.lr,
        weight_decay=0.1,
        adam_beta2=0.95,
        lr_scheduler_type="constant",
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        gradient_checkpointing=False,
        packing=packing,
        max_length=512,
        seed=0,
        completion_only_loss=True,
        optim="adamw_torch_fused",
    )
    marks, losses, counted = [], [], []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            marks.append([time.perf_counter()])

        def on_step_end(self, *_, **__):
            marks[-1].append(time.perf_counter())

        def on_log(self, args, state, control, logs, **_):
            if "loss" in logs:
                losses.append(logs["loss"])

    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32),
        args=config,
        train_dataset=data,
        processing_class=load_tokenizer(args.model),
        callbacks=[Clock()],
    )
    forward = trainer.compute_loss

    def counting(model, inputs, *rest, **more):  # the sequences' own tokens that went through
        mask = inputs.get("attention_mask")
        counted.append(int(mask.sum()) if mask is not None else inputs["input_ids"].numel())
        return forward(model, inputs, *rest, **more)

    trainer.compute_loss = counting
    trainer.train()
    tokens = [sum(counted[i : i + accumulation]) for i in range(0, len(counted), accumulation)]
    return [b - a for a, b in marks], tokens, losses


VARIANTS = {
    "ours": run_ours,
    "bare, padded": lambda a: run_bare(a, False),
    "bare, sorted": lambda a: run_bare(a, True),
    "TRL padded, 8": lambda a: run_trl(a, 8, False),
    "TRL padded, 32": lambda a: run_trl(a, 32, False),
    "TRL packed": lambda a: run_trl(a, 1, True),
}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=str(ROOT / "toy/base"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--per-step", type=int, default=32, help="sequences")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    for hidden in ("--only", "--data", "--scratch"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        import torch

        torch.set_num_threads(1)
        time.perf_counter = time.process_time         # 03's clock too
        seconds, tokens, losses = VARIANTS[args.only](args)
        skip = min(SKIP, args.steps // 2)
        rate = statistics.median(n / s for n, s in zip(tokens[skip:], seconds[skip:]))
        print(
            "\n"
            + json.dumps(
                {
                    "rate": rate,
                    "first": statistics.mean(losses[:3]),
                    "last": statistics.mean(losses[-5:]),
                }
            )
        )
        return
    with tempfile.TemporaryDirectory() as scratch:
        data = make_data(Path(scratch), args.model) / "train.jsonl"
        rounds = []
        for number in range(args.rounds):
            rounds.append({})
            for name in args.variants:
                out = subprocess.run(
                    [
                        sys.executable,
                        __file__,
                        *sys.argv[1:],
                        "--only",
                        name,
                        "--data",
                        data,
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
                print(
                    f"round {number + 1}: {name:16} {rounds[-1][name]['rate']:8.0f} tokens/s",
                    flush=True,
                )
        print(
            f"\n{'':16} {'tokens/s':>9} {'ours / it':>10}   loss, first 3 -> last 5 of "
            f"{args.steps} steps"
        )
        for name in args.variants:
            got = [r for r in rounds if name in r and "ours" in r]
            if got:
                ratio = statistics.median(r["ours"]["rate"] / r[name]["rate"] for r in got)
                print(
                    f"{name:16} {statistics.median(r[name]['rate'] for r in got):9.0f} "
                    f"{ratio:10.2f}   "
                    f"{got[0][name]['first']:.3f} -> {got[0][name]['last']:.3f}"
                )


if __name__ == "__main__":
    main()
