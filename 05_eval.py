"""Stage 5: evaluate a checkpoint. Pass@1, Pass@k for every k, policy entropy, each with its interval.

    python 05_eval.py --model runs/x/sft --problems data/aime24.jsonl data/math500.jsonl --n 128 --out runs/x/eval
    torchrun --nproc_per_node 8 -- 05_eval.py --model … --problems … --n 128 --out …   (`--`: torchrun has its own --n…)
    python 05_eval.py --regrade --problems data/aime24.jsonl --out runs/x/eval       grade the stored responses again
    python 05_eval.py --show 3 --problems data/aime24.jsonl --out runs/x/eval        read three of them

For each benchmark BENCH (the name of its problems file) in --out:

    BENCH.jsonl           one row a response: pid, k, seed, response, n_tokens, finish, predicted, correct, status
    BENCH.entropy.jsonl   mean token entropy of the policy on its own samples, per problem
    BENCH.problems.jsonl  one row a problem: what the paired comparisons of report.py are made from
    results.json          everything that is printed, and Pass@k for all k; names are defined in docs/METRICS.md

Three passes, each of which goes on where it stopped: generate (rows are appended as they finish), measure entropy,
grade. The seed of a response is a function of (--seed, pid, k), so neither a restart nor the number of ranks changes
any of them; at the end the rows are sorted, so the files are a function of the set. Grading works on stored text only,
which is why it can be done again.

Deliberate simplifications
- A response that could not be judged (correct null) counts as not correct in Pass@k, and is shown in its own column.
- Entropy is taken at temperature 1 without top-p, the model's own distribution, on samples drawn at --temperature and
  --top-p. Every problem weighs alike, as in Pass@1; `entropy_per_token` in results.json weighs every token alike.
- Intervals are over problems: they say how far another draw of problems of this kind might move the number. The spread
  over training seeds needs several runs: report.py.
- The responses of one benchmark are held in memory for grading (128 x 500 long ones: about 2 GB).
"""

import argparse
import hashlib
import json
import os
import random
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import common
from model import (decode_response, load_model, load_tokenizer, model_dir, pack_sequences,
                   plan_packs, render_prompt, token_logprobs)
from grading import verifier

UNGRADED = "ungraded"          # status of a row between generation and grading
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95, 1.0)


def parse(argv=None):
    p = common.make_parser(__doc__)
    p.add_argument("--model", help="checkpoint; not needed to grade again or to look at stored responses")
    p.add_argument("--problems", nargs="+", required=True, help="one problems.jsonl a benchmark: pid, problem, answer")
    p.add_argument("--out", required=True, help="directory of the results; continued if it holds some")
    p.add_argument("--n", type=int, default=32, help="samples a problem")
    p.add_argument("--n-of", nargs="*", default=[], metavar="NAME=N", help="another number for some benchmarks")
    p.add_argument("--temperature", type=float, default=0.6, help="of sampling (0: greedy)")
    p.add_argument("--top-p", type=float, default=0.95, help="of sampling")
    p.add_argument("--max-tokens", type=int, default=32768, help="a response is cut here")
    p.add_argument("--seed", type=int, default=42, help="of sampling")
    p.add_argument("--engine", choices=["auto", "vllm", "hf"], default="auto", help="auto: vLLM on a GPU if installed")
    p.add_argument("--entropy-samples", type=int, default=4, help="samples a problem to measure entropy on (0: none)")
    p.add_argument("--token-budget", type=int, default=32768, help="tokens of a pack while entropy is measured")
    p.add_argument("--verify-workers", type=int, default=os.cpu_count(), help="processes that grade")
    p.add_argument("--regrade", action="store_true", help="grade the stored responses again, list what changed")
    p.add_argument("--second-grader", choices=["math-verify"], help="grade with this too and list the disagreements")
    p.add_argument("--show", type=int, default=0, metavar="N", help="print N random responses of each benchmark")
    p.add_argument("--show-pid", nargs="*", default=[], metavar="PID", help="with --show: only of these problems")
    args = common.parse_args(p, "eval", argv)
    common.check_range(args, ["top_p"], n=1, max_tokens=1, entropy_samples=0, token_budget=1, temperature=0, verify_workers=1, show=0)
    return args


# ------------------------------------------------------------------------------------------------------- benchmarks


class Benchmark:
    """A set of problems and where its rows are kept."""

    def __init__(self, path, out):
        self.source, self.name = Path(path), Path(path).name.removesuffix(".jsonl")
        self.problems = list(common.read_jsonl(path, {"pid": str, "problem": str, "answer": (str, list)}))
        self.pids = [row["pid"] for row in self.problems]
        repeated = [pid for pid, times in Counter(self.pids).items() if times > 1]
        if repeated:
            common.die(f"{path}: pid {repeated[0]} appears more than once")
        self.answers = {row["pid"]: row["answer"] for row in self.problems}
        self.rows, self.entropy = Path(out) / f"{self.name}.jsonl", Path(out) / f"{self.name}.entropy.jsonl"

    def merge(self):
        """Rank 0, while nobody writes: every rank's rows into one file, in the order of the problems and of k."""
        place = {pid: i for i, pid in enumerate(self.pids)}
        common.merge_parts(self.rows, ("pid", "k"), lambda key: (place.get(key[0], len(place)), key[1]))
        common.merge_parts(self.entropy, "pid", lambda pid: place.get(pid, len(place)))

    def sorted_rows(self):
        """Stored rows, each key once, in the order of the problems file and then of k."""
        place = {pid: i for i, pid in enumerate(self.pids)}
        rows = {(row["pid"], row["k"]): row for row in common.read_jsonl(self.rows, {"pid": str, "k": int, "response": str})}
        strange = [pid for pid, _ in rows if pid not in place]
        if strange:
            common.die(f"{self.rows} has responses to problem {strange[0]}, which {self.source} has not")
        return [rows[key] for key in sorted(rows, key=lambda key: (place[key[0]], key[1]))]


# ------------------------------------------------------------------------------------------------------ 1. generate


def samples_a_problem(bench, args):
    """--n, or the benchmark's own of --n-of."""
    own = dict(pair.partition("=")[::2] for pair in args.n_of).get(bench.name, str(args.n))
    if not own.isdigit() or int(own) < 1:
        common.die(f"--n-of takes NAME=N with N at least 1, not {bench.name}={own}")
    return int(own)


def missing_samples(bench, args):
    """[(problem row, k)] still to be drawn."""
    have, n = common.stored_keys(bench.rows, ("pid", "k")), samples_a_problem(bench, args)
    if any(k >= n for _, k in have):
        common.die(f"{bench.rows} holds {max(k for _, k in have) + 1} samples a problem, more than --n {n}: "
              "give that --n, or another --out")
    return [(row, k) for row in bench.problems for k in range(n) if (row["pid"], k) not in have]


def generate(benches, missing, args, dist):
    """Draw this rank's share of the missing samples of all benchmarks in one stream, so that the engine runs dry once.

    A row keeps its token ids where entropy will be measured: a text does not always encode to the tokens it came from.
    """
    tokenizer = load_tokenizer(args.model)
    requests = [(bench, row, k) for bench in benches for row, k in missing[bench.name]][dist.rank::dist.world]
    if not requests:
        return
    encoded = {text: render_prompt(tokenizer, text) for text in {row["problem"] for _, row, _ in requests}}
    prompts = [encoded[row["problem"]] for _, row, _ in requests]
    from engines import make_engine
    longest = max(map(len, prompts)) + args.max_tokens
    engine = make_engine(args.engine, args.model, longest, device=dist.device, sleep=True)
    writers = {bench.name: common.append_jsonl(common.part_path(bench.rows, dist.rank), ("pid", "k"))[1] for bench in benches}
    seeds = [common.request_seed(args.seed, row["pid"], k) for _, row, k in requests]
    with tqdm(total=len(requests), desc="generate", unit="resp", disable=dist.rank > 0, mininterval=2) as progress:
        for i, done in engine.generate(prompts, seeds, args.temperature, args.top_p, args.max_tokens, progress):
            bench, row, k = requests[i]
            kept = {"ids": list(map(int, done.ids))} if k < args.entropy_samples else {}
            writers[bench.name].write({
                "pid": row["pid"], "k": k, "seed": seeds[i], "response": decode_response(tokenizer, done.ids),
                "n_tokens": len(done.ids), "finish": done.finish,
                "predicted": None, "correct": None, "status": UNGRADED, **kept})
    engine.sleep()                                                            # the card is free for the entropy's model
    for writer in writers.values():
        writer.close()


# ------------------------------------------------------------------------------------------------------- 2. entropy


@torch.no_grad()
def measure_entropy(bench, model, tokenizer, args, dist):
    """Mean token entropy (nats, temperature 1) over the first --entropy-samples responses of each problem.

    The unit of work is a problem, packed alone, so that no bit depends on its neighbours or on a restart.
    """
    have = common.stored_keys(bench.entropy, "pid")
    todo = [row for row in bench.problems if row["pid"] not in have][dist.rank::dist.world]
    samples = {row["pid"]: [] for row in todo}
    for row in common.read_jsonl(bench.rows):
        if row["pid"] in samples and row["k"] < args.entropy_samples:
            samples[row["pid"]].append((row["k"], row["ids"]))
    with common.append_jsonl(common.part_path(bench.entropy, dist.rank), "pid")[1] as writer:
        for row in tqdm(todo, desc=f"entropy {bench.name}", unit="problem", disable=dist.rank > 0, mininterval=2):
            prompt = render_prompt(tokenizer, row["problem"])
            sequences = [(prompt + ids, len(prompt)) for _, ids in sorted(samples[row["pid"]])]
            lengths = [len(ids) for ids, _ in sequences]
            total, n_tokens = 0.0, 0
            for indices in plan_packs(lengths, max(args.token_budget, *lengths))[0]:
                _, entropy = token_logprobs(model, pack_sequences([sequences[i] for i in indices], dist.device), entropy=True)
                total, n_tokens = total + entropy.double().sum().item(), n_tokens + len(entropy)
            writer.write({"pid": row["pid"], "entropy": total / n_tokens, "n_entropy_tokens": n_tokens})


def stored_entropy(bench):
    """Stored entropies by problem; {} if they are not there for every problem."""
    stored = {row["pid"]: row for row in common.read_jsonl(bench.entropy)} if bench.entropy.exists() else {}
    return stored if set(bench.pids) <= set(stored) else {}


# --------------------------------------------------------------------------------------------------------- 3. grade


def grade(bench, args):
    """Grade the ungraded rows (--regrade: all), write them back sorted. -> rows, [(before, after)] of changed ones."""
    rows, changed = bench.sorted_rows(), []
    drawn = Counter(row["pid"] for row in rows)
    short = [pid for pid in bench.pids if drawn[pid] < max(drawn.values())]
    if short:
        common.die(f"{bench.rows} lacks responses to problem {short[0]}: complete it with --model")
    todo = [i for i, row in enumerate(rows) if args.regrade or row["status"] == UNGRADED]
    verdicts = verifier.verify_many([(rows[i]["response"], bench.answers[rows[i]["pid"]]) for i in todo],
                                    workers=args.verify_workers) if todo else []
    for i, verdict in zip(todo, verdicts, strict=True):
        old = dict(rows[i])
        cut = rows[i]["finish"] == "length" and verdict.correct is False and verdict.predicted is None
        status = "truncated" if cut else verdict.status
        rows[i].update(predicted=verdict.predicted, correct=verdict.correct, status=status)
        if old["status"] != UNGRADED and any(old[name] != rows[i][name] for name in ("predicted", "correct", "status")):
            changed.append((old, rows[i]))
    with common.replace_file(bench.rows) as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return rows, changed


def math_verify_grader():
    """(response, answer) -> bool by Hugging Face's math-verify: the last word of other people's graders."""
    try:
        from math_verify import parse as parse_math, verify as verify_math
    except ImportError:
        common.die("--second-grader math-verify needs the package 'math-verify': pip install 'math-verify[antlr4_13_2]'")

    def judge(response, answer):
        predicted = parse_math(response.rsplit("</think>", 1)[1]) if "</think>" in response else []
        golds = [answer] if isinstance(answer, str) else answer
        return any(verify_math(parse_math(f"\\boxed{{{gold}}}"), predicted) for gold in golds)

    return judge


def second_opinion(bench, rows, judge, out):
    """Write and count the responses on which a second grader decides otherwise; unknown ones are not compared."""
    differing = []
    for row in tqdm(rows, desc=f"second grader {bench.name}", unit="resp", mininterval=2):
        if row["correct"] is not None:
            second = judge(row["response"], bench.answers[row["pid"]])
            if second != row["correct"]:
                differing.append({"pid": row["pid"], "k": row["k"], "answer": bench.answers[row["pid"]],
                                  "predicted": row["predicted"], "correct": row["correct"], "second": second})
    path = out / f"{bench.name}.disagreements.jsonl"
    with common.replace_file(path) as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in differing)
    print(f"{bench.name}: the second grader disagrees on {len(differing)} of {len(rows)} responses; listed in {path}")
    for row in differing[:10]:
        print(f"    {row['pid']} k={row['k']}: answer {row['answer']!r}, predicted {row['predicted']!r}, "
              f"here {row['correct']}, there {row['second']}")
    return len(differing)


# ----------------------------------------------------------------------------------------------------- 4. summarise


def problem_table(bench, rows, entropy: dict):
    """One row a problem, in the order of the problems file."""
    grouped = {pid: [] for pid in bench.pids}
    for row in rows:
        grouped[row["pid"]].append(row)
    return [{
        "pid": pid, "n": len(mine),
        "n_correct": sum(row["correct"] is True for row in mine),
        "n_unknown": sum(row["correct"] is None for row in mine),
        "n_truncated": sum(row["finish"] == "length" for row in mine),
        "n_no_answer": sum(row["predicted"] is None and row["correct"] is False for row in mine),
        "n_distinct": len({row["response"] for row in mine}),
        "mean_tokens": sum(row["n_tokens"] for row in mine) / len(mine),
        "entropy": entropy[pid]["entropy"] if entropy else None,
        "n_entropy_tokens": entropy[pid]["n_entropy_tokens"] if entropy else 0,
    } for pid, mine in grouped.items()]


def interval(values):
    """[P] per-problem values -> {value, low, high}: the mean over problems and its 95 % bootstrap interval."""
    mean, low, high = common.bootstrap([[np.asarray(values, dtype=float)[:, None]]])
    return {"value": mean[0], "low": low[0], "high": high[0]}


def clip(x):
    """A share stays in [0, 1]: the stretched percentile interval may reach over."""
    return np.clip(x, 0.0, 1.0).tolist()


def summarise(rows, table):
    """The results of one benchmark; every name is defined in docs/METRICS.md."""
    n, n_responses = table[0]["n"], len(rows)
    mean, low, high = common.bootstrap([[np.stack([common.pass_curve(row["n"], row["n_correct"]) for row in table])]])
    curve = {"k": list(range(1, n + 1)), "value": mean.tolist(), "low": clip(low), "high": clip(high)}
    lengths = np.array([row["n_tokens"] for row in rows])
    edges = np.unique(np.round(np.geomspace(1, max(lengths.max() + 1, 2), 161)).astype(int))
    rate = lambda name: sum(row[name] for row in table) / n_responses
    result = {
        "n_problems": len(table), "n_samples": n, "n_responses": n_responses,
        "pass_at_1": {name: curve[name][0] for name in ("value", "low", "high")},
        "pass_at_n": {name: curve[name][-1] for name in ("value", "low", "high")},
        "pass_at_k": curve,
        "entropy": None, "entropy_per_token": None,
        "unknown_rate": rate("n_unknown"), "truncation_rate": rate("n_truncated"),
        "no_answer_rate": rate("n_no_answer"), "duplicate_rate": 1 - rate("n_distinct"),
        "mean_tokens": float(lengths.mean()),
        "token_quantiles": {str(q): float(np.quantile(lengths, q)) for q in QUANTILES},
        "length_histogram": {"edges": edges.tolist(), "counts": np.histogram(lengths, bins=edges)[0].tolist()},
        "statuses": dict(sorted(Counter(row["status"] for row in rows).items())),
    }
    if table[0]["entropy"] is not None:
        weights = [row["n_entropy_tokens"] for row in table]
        result["entropy"] = interval([row["entropy"] for row in table])
        result["entropy_per_token"] = float(np.average([row["entropy"] for row in table], weights=weights))
    return result


def print_table(results):
    """The results, a line a benchmark: intervals and the number of problems beside each number."""
    show = lambda x: "–" if x is None else f"{x['value']:.3f} [{x['low']:.3f}, {x['high']:.3f}]"
    print(f"\n{results['model']}  ·  temperature {results['temperature']}, top-p {results['top_p']}, at most "
          f"{results['max_tokens']} tokens  ·  grader {results['grader']}")
    head = ("benchmark", "problems", "n", "Pass@1 [95 %]", "Pass@n [95 %]", "entropy, nats [95 %]",
            "unknown", "cut", "no answer", "repeated", "tokens")
    rates = ("unknown_rate", "truncation_rate", "no_answer_rate", "duplicate_rate")
    body = [(name, str(b["n_problems"]), str(b["n_samples"]), show(b["pass_at_1"]), show(b["pass_at_n"]),
             show(b["entropy"]), *(f"{b[key]:.1%}" for key in rates), f"{b['mean_tokens']:.0f}")
            for name, b in results["benchmarks"].items()]
    widths = [max(len(line[i]) for line in [head, *body]) for i in range(len(head))]
    for line in [head, *body]:
        print("  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths))))


def show_responses(bench, rows, args):
    """N responses to read: random (by --seed), or of the chosen problems."""
    chosen = [row for row in rows if not args.show_pid or row["pid"] in args.show_pid]
    chosen = random.Random(args.seed).sample(chosen, min(args.show, len(chosen)))
    text_of = {row["pid"]: row["problem"] for row in bench.problems}
    for row in chosen:
        verdict = {True: "correct", False: "wrong", None: "unknown"}[row["correct"]]
        common.print_row((bench.name, row["pid"], f"k={row['k']}", f"{verdict} ({row['status']})", f"predicted {row['predicted']}",
                            f"answer {bench.answers[row['pid']]}", f"{row['n_tokens']} tokens", row["finish"]),
                           text_of[row["pid"]], row["response"])


def finish(benches, args, out, seconds):
    """Rank 0, at the end: grade, write tables and results.json, print."""
    if args.second_grader:
        judge = math_verify_grader()
    results_path = out / "results.json"
    results = json.loads(results_path.read_text()) if results_path.exists() else {"benchmarks": {}}
    for bench in benches:
        rows, changed = grade(bench, args)
        table = problem_table(bench, rows, stored_entropy(bench))
        with common.replace_file(out / f"{bench.name}.problems.jsonl") as file:
            file.writelines(json.dumps(row) + "\n" for row in table)
        made = common.read_meta(bench.rows)["args"]                               # the settings that drew the responses
        common.write_meta(bench.rows, "eval", argparse.Namespace(**made), [bench.source, *weight_files(made["model"])],
                     rows=len(rows), model=made["model"], seed=made["seed"], grader=grader_name(),
                     regraded=args.regrade)
        result = summarise(rows, table)
        if args.regrade:
            print(f"{bench.name}: {len(changed)} of {len(rows)} verdicts changed")
            for before, after in changed:
                print(f"    {after['pid']} k={after['k']}: {before['correct']} ({before['status']}, "
                      f"{before['predicted']!r}) -> {after['correct']} ({after['status']}, {after['predicted']!r})")
        if args.second_grader:
            result["second_grader_disagreements"] = second_opinion(bench, rows, judge, out)
        results["benchmarks"][bench.name] = result
        if args.show:
            show_responses(bench, rows, args)
    results = {"schema": "results", "schema_version": common.SCHEMA_VERSION, "grader": grader_name(),
               **{name: made[name] for name in ("model", "temperature", "top_p", "max_tokens", "seed", "engine")},
               "seconds": {name: results.get("seconds", {}).get(name, 0) + seconds.get(name, 0)
                           for name in ("generate", "entropy")},
               "benchmarks": results["benchmarks"]}
    with common.replace_file(results_path) as file:
        json.dump(results, file, indent=1)
    print_table(results)
    print(f"results: {results_path}")


def grader_name():
    """Verdicts are only comparable under one grader, so it is named by its source."""
    digest = hashlib.sha256()
    for name in ("verifier.py", "grammar.py"):
        digest.update((Path(__file__).parent / "grading" / name).read_bytes())
    return f"grading/verifier.py {digest.hexdigest()[:12]}"


def weight_files(model):
    return sorted(Path(model_dir(model)).glob("*.safetensors")) if Path(model).exists() else []


def main(argv=None):
    args = parse(argv)
    args.entropy_samples = min(args.entropy_samples, args.n)
    out = Path(args.out)
    benches = [Benchmark(path, out) for path in args.problems]
    if len({bench.name for bench in benches}) < len(benches):
        common.die("two --problems files have the same name, so their results would overwrite each other")
    dist, seconds = common.init_distributed(patience_hours=24), {}
    if dist.rank == 0:
        for bench in benches:
            bench.merge()
    common.barrier()
    if args.regrade or args.model is None:                                  # what is stored, whatever its number
        for bench in benches:
            if not bench.rows.exists():
                common.die(f"{bench.rows} does not exist: --model is needed to draw responses")
    else:
        seconds = draw_and_measure(benches, args, dist)
    if dist.rank == 0:
        finish(benches, args, out, seconds)


def draw_and_measure(benches, args, dist):
    """The passes that need a model, where something is missing. -> seconds of each pass that ran."""
    seconds = {}
    missing = {bench.name: missing_samples(bench, args) for bench in benches}
    n_missing = sum(map(len, missing.values()))
    unmeasured = [bench for bench in benches if args.entropy_samples
                  and len(common.stored_keys(bench.entropy, "pid")) < len(bench.pids)]
    if dist.rank == 0:
        for bench in benches:
            common.start_output(bench.rows, "eval", args, [bench.source, *weight_files(args.model)], may_differ=(
                "problems", "n", "n_of", "token_budget", "verify_workers", "regrade", "second_grader", "show",
                "show_pid"))
    common.barrier()
    start = time.time()
    if n_missing:
        generate(benches, missing, args, dist)
        common.barrier()
        if dist.rank == 0:
            for bench in benches:
                bench.merge()
        common.barrier()
        seconds["generate"] = time.time() - start
    if unmeasured:
        start = time.time()
        dtype = torch.bfloat16 if dist.device.startswith("cuda") else torch.float32
        model = load_model(args.model, dtype, dist.device)
        tokenizer = load_tokenizer(args.model)
        for bench in unmeasured:
            measure_entropy(bench, model, tokenizer, args, dist)
        common.barrier()
        if dist.rank == 0:
            for bench in unmeasured:
                bench.merge()
        seconds["entropy"] = time.time() - start
    return seconds


if __name__ == "__main__":
    main()
