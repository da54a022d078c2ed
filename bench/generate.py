"""Generation throughput: our Hugging Face engine, vLLM on a CPU, and `generate` of the bare model.

    python bench/generate.py [--model DIR --dtype float32 --rounds 3]
    git show REVISION:engines.py > old.py && python bench/generate.py --model DIR --before old.py

64 responses side by side (8 word problems x 8 samples), temperature 0.6, top-p 0.95, 64 new tokens,
one thread. The engines run in turn in each round, on the same requests. Seconds are CPU seconds of
the process, so that other processes disturb little; the table gives medians over rounds, and ratios
within the round. "vLLM" is vLLM as it comes, its linear layers packed for the CPU; "vLLM, synced"
is as engines.py runs it, where they stay plain so that a trainer's weights can be written there.
Its prefix cache is emptied before each round, as ours keeps nothing either.
"""

import argparse
import importlib.util
import os
import statistics
import sys
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import torch

import engines
from model import load_tokenizer, render_prompt, stop_ids

PROBLEMS = (
    "A baker makes 12 trays of 18 rolls and sells 4 bags of 25. How many rolls are left?",
    "Mia reads 14 pages a day on weekdays and 30 a day at weekends. How many in three weeks?",
    "A tank holds 540 litres and loses 7 an hour. After 2 days, how many litres are in it?",
    "Three friends share 91 stickers; one has 7 more than each other. How many has she?",
    "A train leaves at 9:40 and travels 153 km at 68 km an hour. When does it arrive?",
    "Pens cost 3 for 2 dollars. What do 45 pens cost after a discount of 10 percent?",
    "A garden is twice as long as wide and has 96 metres of fence. What is its area?",
    "Ben has 5 red, 6 blue and 9 green marbles. What share of them is not green?",
)


def run_engine(engine, prompts, args, n_new: int) -> int:
    """Draws all responses with one of our engines; returns the number of tokens."""
    if isinstance(engine, engines.VLLMEngine):
        engine.llm.reset_prefix_cache()
    n_tokens = 0
    seeds = range(len(prompts))
    drawn = engine.generate(prompts, seeds, args.temperature, args.top_p, n_new)
    for _, completion in drawn:
        n_tokens += len(completion.ids)
    return n_tokens


def run_bare(model, prompts, args, n_new: int, stops) -> int:
    """Left-padded, all responses in one call, as a script without an engine does it."""
    longest = max(map(len, prompts))
    tokens = torch.zeros(len(prompts), longest, dtype=torch.int64)
    mask = torch.zeros_like(tokens)
    for row, prompt in enumerate(prompts):
        tokens[row, -len(prompt):] = torch.tensor(prompt)
        mask[row, -len(prompt):] = 1
    torch.manual_seed(0)
    out = model.generate(tokens, attention_mask=mask, do_sample=True, top_k=0, top_p=args.top_p,
                         temperature=args.temperature, max_new_tokens=n_new,
                         eos_token_id=stops, pad_token_id=stops[0])
    new = out[:, longest:]
    ended = torch.isin(new, torch.tensor(stops)).int().cumsum(dim=1)
    before_end = (ended == 0).sum() + (ended > 0).any(dim=1).sum()     # the stop token counts
    return int(before_end)


def ways_to_generate(args, prompts) -> dict:
    """Name -> a function that draws all responses, of at most n_new tokens, and counts these."""
    longest = max(map(len, prompts)) + args.new_tokens
    options = {"device": "cpu", "dtype": args.dtype}
    stops = stop_ids(load_tokenizer(args.model))
    ways = {}

    def add_engine(name, engine):
        ways[name] = lambda n_new: run_engine(engine, prompts, args, n_new)

    if args.before:
        spec = importlib.util.spec_from_file_location("engines_before", args.before)
        before = importlib.util.module_from_spec(spec)
        sys.modules["engines_before"] = before
        spec.loader.exec_module(before)
        dtype = getattr(torch, args.dtype)
        add_engine("ours, before", before.HFEngine(args.model, longest, dtype=dtype))
    add_engine("ours", engines.make_engine("hf", args.model, longest, **options))
    if "bare" in args.peers:
        from transformers import AutoModelForCausalLM
        bare = AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype))
        ways["bare Hugging Face"] = lambda n_new: run_bare(bare, prompts, args, n_new, stops)
    if "vllm" in args.peers:
        plain, engines.keep_linear_weights = engines.keep_linear_weights, as_it_comes
        add_engine("vLLM", engines.make_engine("vllm", args.model, longest, **options))
        engines.keep_linear_weights = plain
    if "vllm-synced" in args.peers:
        add_engine("vLLM, synced", engines.make_engine("vllm", args.model, longest, **options))
    return ways


def as_it_comes():
    """In place of `engines.keep_linear_weights`."""


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / "toy/base"))
    parser.add_argument("--before", help="an older engines.py, measured beside")
    parser.add_argument("--peers", nargs="*", default=["bare", "vllm"],
                        help="bare, vllm, vllm-synced")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=0.6)
    parser.add_argument("--top-p", type=float, default=0.95)
    args = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = load_tokenizer(args.model)
    prompts = []
    for problem in PROBLEMS:
        prompts += [render_prompt(tokenizer, problem)] * args.samples
    ways = ways_to_generate(args, prompts)
    rates = {name: [] for name in ways}
    for draw in ways.values():                                 # warm-up
        draw(2)
    for _ in range(args.rounds):
        for name, draw in ways.items():
            torch.set_num_threads(1)
            begin = time.process_time()
            n_tokens = draw(args.new_tokens)
            seconds = time.process_time() - begin
            rates[name].append(n_tokens / seconds)
            print(f"{name}: {n_tokens} tokens, {seconds:.2f} s", file=sys.stderr, flush=True)
    mean_prompt = sum(map(len, prompts)) / len(prompts)
    print(f"\n{len(prompts)} requests, prompts of {mean_prompt:.0f} tokens, {args.new_tokens} new, "
          f"temperature {args.temperature}, top-p {args.top_p}, {args.dtype}, one thread, "
          f"{args.rounds} rounds; torch {torch.__version__}")
    print(f"{'':20}{'tokens/CPU s':>14}{'ours / this':>14}")
    for name, of_way in rates.items():
        ratio = statistics.median(a / b for a, b in zip(rates["ours"], of_way))
        print(f"{name:20}{statistics.median(of_way):14,.1f}{ratio:14.2f}")


if __name__ == "__main__":
    main()
