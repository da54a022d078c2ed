"""Evaluate a checkpoint: Pass@1, Pass@k for every k, and policy entropy, each with its interval.

    python 05_eval.py --model runs/x/sft --problems data/aime24.jsonl data/math500.jsonl --n 128 \\
        --out runs/x/eval
    torchrun --nproc_per_node 8 -- 05_eval.py …             (`--`: torchrun has its own --n…)
    python 05_eval.py --problems data/aime24.jsonl --out runs/x/eval --regrade    grade again
    python 05_eval.py --problems data/aime24.jsonl --out runs/x/eval --show 3     read three

For each benchmark BENCH (the name of its problems file) in --out:

    BENCH.jsonl           one row per response: pid, k, seed, response, n_tokens, finish, predicted,
                          correct, status; the first ones of each problem with their token ids
    BENCH.entropy.jsonl   one row per problem: mean token entropy of the policy on its own samples
    BENCH.problems.jsonl  one row per problem: what report.py's paired comparisons are made from
    results.json          all that is printed, and Pass@k for all k (names: docs/METRICS.md)

Three passes, and each resumes where it stopped: generate (rows are appended as they finish),
measure entropy, grade. The seed of a response is a function of (--seed, pid, k), so neither a
restart nor the number of ranks changes any of them, and a larger --n keeps those that are there.
Grading works on stored text only, so it can be repeated; rows that another version of the grader
judged, or against other answers, are graded again.

Deliberate simplifications
- A response that could not be judged (correct null) counts as not correct in Pass@k, and is shown
  in its own column.
- Entropy is taken at temperature 1 without top-p, the model's own distribution, on samples drawn at
  --temperature and --top-p. Problems are equally weighted, as in Pass@1; in `entropy_per_token` of
  results.json tokens are.
- Intervals are over problems: they say how much the number would vary over other samples of similar
  problems. The spread over training seeds needs several runs: report.py.
- The responses of one benchmark are held in memory for grading (128 x 500 long ones: 2 GB).

Shapes: P problems, n samples of each, N scored tokens of a pack, S sequences in it.
"""

import common

import json
import os
import random
import re
import time
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from common import die, printable
from engines import make_engine, settle_engine
from grading import verifier
from model import (
    add_dtype_flag,
    add_instruction_flag,
    check_instruction,
    check_model_dir,
    decode_response,
    load_model,
    load_tokenizer,
    model_dir,
    pack_sequences,
    plan_packs,
    render_prompt,
    settle_dtype,
    token_logprobs,
)

PROBLEM = {"pid": str, "problem": str, "answer": (str, list)}
RESPONSE = {"pid": str, "k": int, "response": str, "n_tokens": int, "finish": str, "status": str,
            "predicted": (str, type(None)), "correct": (bool, type(None))}
ENTROPY = {"pid": str, "entropy": float, "n_entropy_tokens": int, "of": str}
UNGRADED = "ungraded"          # status of a row between generation and grading
VERDICT = ("predicted", "correct", "status")
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
LABEL = {True: "correct", False: "wrong", None: "unknown"}

# What two benchmarks in one results.json must have in common.
SETTINGS = ("model", "instruction", "temperature", "top_p", "max_tokens", "seed", "engine", "dtype")

# What may change from one call to the next without changing a response that is there.
FREE = ("problems", "n", "n_of", "token_budget", "verify_workers", "regrade", "second_grader",
        "show", "show_pid")


def parse_args(argv=None):
    parser = common.make_parser(__doc__)
    add = parser.add_argument
    add("--model",
        help="checkpoint; not needed to grade again or to look at stored responses")
    add("--problems", nargs="+", required=True,
        help="one problems.jsonl a benchmark: pid, problem, answer")
    add("--out", required=True,
        help="directory of the results; continued if it holds some")
    common.add_force_flag(add)
    add_instruction_flag(add)
    add("--n", type=int, default=32,
        help="samples a problem; a larger one keeps those that are there")
    add("--n-of", nargs="*", default=[], metavar="NAME=N",
        help="another number for some benchmarks")
    add("--temperature", type=float, default=0.6,
        help="of sampling (0: greedy)")
    add("--top-p", type=float, default=0.95,
        help="of sampling")
    add("--max-tokens", type=int, default=32768,
        help="a response is cut here")
    add("--seed", type=int, default=42,
        help="of sampling")
    add("--engine", choices=["auto", "vllm", "hf"], default="auto",
        help="auto: vLLM on a GPU if installed")
    add_dtype_flag(add)
    add("--entropy-samples", type=int, default=4,
        help="samples a problem to measure entropy on (0: none)")
    add("--token-budget", type=int, default=32768,
        help="tokens of a pack while entropy is measured (a CPU is faster at 2,048)")
    add("--verify-workers", type=int, default=os.cpu_count(),
        help="processes that grade")
    add("--regrade", action="store_true",
        help="grade the stored responses again, list what changed")
    add("--second-grader", choices=["math-verify"],
        help="grade with this too and list the disagreements")
    add("--show", type=int, default=0, metavar="N",
        help="print N random responses of each")
    add("--show-pid", nargs="*", default=[], metavar="PID",
        help="with --show: only of these problems")
    args = common.parse_args(parser, "eval", argv)
    common.check_range(args, ["top_p"], n=1, max_tokens=1, entropy_samples=0, token_budget=1,
                       temperature=0, verify_workers=1, show=0)
    if args.force and (args.regrade or args.model is None):
        die("--force draws the responses anew: it needs --model, and goes without --regrade")
    if 0 < args.temperature < 0.01:               # vLLM would take 0.01
        die(f"--temperature must be 0 (greedy) or at least 0.01, got {args.temperature}")
    return args


# -------------------------------------------------------------------------------------- benchmarks


class Benchmark:
    """A set of problems, and where its rows are kept."""

    def __init__(self, path, out):
        self.source = Path(path)
        self.name = self.source.name.removesuffix(".jsonl")
        if re.search(r"\.(entropy|problems|disagreements|rank\d+)$", self.name):
            die(f"{path}: files of another benchmark have such a name in --out; rename it")
        self.problems = list(common.read_jsonl(path, PROBLEM, key="pid"))
        self.pids = [row["pid"] for row in self.problems]
        self.answers = {row["pid"]: row["answer"] for row in self.problems}
        out = Path(out)
        self.rows = out / f"{self.name}.jsonl"
        self.entropy = out / f"{self.name}.entropy.jsonl"
        self.table = out / f"{self.name}.problems.jsonl"

    def merge(self):
        """Rank 0, while nobody writes: every rank's rows into one file, in the order of the
        problems and of k."""
        place = {pid: i for i, pid in enumerate(self.pids)}

        def place_of_problem(pid):
            return place.get(pid, len(place))

        def place_of_row(key):
            pid, k = key
            return place_of_problem(pid), k

        common.merge_parts(self.rows, ("pid", "k"), place_of_row)
        common.merge_parts(self.entropy, "pid", place_of_problem)

    def stored_rows(self):
        """The responses, in the order of the problems and of k."""
        rows = list(common.read_jsonl(self.rows, RESPONSE, key=("pid", "k")))
        place = {pid: i for i, pid in enumerate(self.pids)}
        for row in rows:
            if row["pid"] not in place:
                die(f"{self.rows} has responses to problem {printable(row['pid'])}, "
                    f"which {self.source} has not")
        return sorted(rows, key=lambda row: (place[row["pid"]], row["k"]))

    def sidecar(self) -> dict:
        meta = common.read_meta(self.rows)
        path = common.meta_path(self.rows)
        if meta is None:
            die(f"{path}, which says how {self.rows} was drawn, is missing")
        model = meta.get("args", {}).get("model")
        if "inputs" not in meta or not isinstance(model, str):
            die(f"{path} does not say which model drew {self.rows}")
        return meta

    def note(self, **facts):
        """Write facts into the sidecar; what it says of the call that drew the rows stays."""
        meta = {**self.sidecar(), **facts}
        with common.replace_file(common.meta_path(self.rows)) as file:
            json.dump(meta, file, indent=1)

    def settings(self) -> dict:
        """How the responses were drawn, the model's weights by their hash."""
        meta = self.sidecar()
        settings = {name: meta["args"].get(name) for name in SETTINGS}
        model = Path(settings["model"])
        settings["weights"] = None                # of a hub id
        for path in (model, model / "final"):     # see model_dir
            if str(path) in meta["inputs"]:
                settings["weights"] = meta["inputs"][str(path)]
        return settings


def open_benchmarks(args) -> list[Benchmark]:
    benches = [Benchmark(path, args.out) for path in args.problems]
    names = [bench.name for bench in benches]
    if len(set(names)) < len(names):
        die("two --problems files have the same name, so their results would overwrite each other")
    for pair in args.n_of:
        name, _, number = pair.partition("=")
        if not number.isdecimal() or int(number) < 1:
            die(f"--n-of takes NAME=N with N at least 1, not {printable(pair)}")
        if name not in names:
            die(f"--n-of {printable(pair)}: no --problems file has that name; "
                f"there is {', '.join(map(printable, names))}")
    return benches


def begin(bench, args):
    """Rank 0, before responses are drawn: those that are there must have been drawn alike."""
    check_instruction(args.model, args.instruction)
    inputs = [bench.source, model_dir(args.model)]
    out = Path(args.out)
    beside = [bench.entropy, bench.table, out / f"{bench.name}.disagreements.jsonl",
              out / "results.json"]               # which holds one model at one setting
    old = {} if args.force else common.read_meta(bench.rows) or {}
    common.start_output(bench.rows, "eval", args, inputs, FREE, beside=beside)
    bench.note(grader=old.get("grader"))          # of the verdicts that are there already


def refuse_mixed_settings(benches, out):
    """A results.json is one model at one setting: its benchmarks are averaged and compared."""
    found = {bench.name: bench.settings() for bench in benches}
    results = stored_results(out)
    for name in results["benchmarks"]:
        if name not in found:
            found[name] = {key: results.get(key) for key in (*SETTINGS, "weights")}
    first, *others = found
    for name in others:
        differing = [key for key in found[first] if found[name][key] != found[first][key]]
        if differing:
            die(f"{out}: {printable(first)} and {printable(name)} were not drawn alike "
                f"({', '.join(differing)}); one of them needs another --out")


def show_unreadable_golds(benches, args):
    """Say before hours of sampling which answers no response can be wrong or right against."""
    for bench in benches:
        unreadable = verifier.unreadable_golds(list(bench.answers.values()), args.verify_workers)
        if not unreadable:
            continue
        print(f"{printable(bench.name)}: {len(unreadable)} of {len(bench.pids)} answers cannot be "
              "judged, so that responses to them will mostly be unknown:")
        for pid, answer in bench.answers.items():
            if answer in unreadable[:10]:
                print(f"    {printable(pid)}: {answer!r}")


def stored_results(out) -> dict:
    """OUT/results.json as an earlier run left it; without one, no benchmark and no seconds.

    Its benchmarks stay beside the new ones if they were drawn alike (refuse_mixed_settings).
    """
    path = Path(out) / "results.json"
    if not path.exists():
        return {"benchmarks": {}, "seconds": {}}
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        die(f"{path} is not valid JSON ({error}); remove it, it is made anew")
    for name in ("benchmarks", "seconds"):
        if not isinstance(results, dict) or not isinstance(results.get(name), dict):
            die(f"{path} has no {name}; remove it, it is made anew")
    return results


# ------------------------------------------------------------------------------------- 1. generate


def missing_samples(bench, args) -> list:
    """[(problem row, k)] still to be drawn."""
    own = dict(pair.split("=") for pair in args.n_of)
    n = int(own.get(bench.name, args.n))
    stored = common.stored_keys(bench.rows, ("pid", "k"))
    n_stored = max((k + 1 for _, k in stored), default=0)
    if n_stored > n:
        die(f"{bench.rows} holds {n_stored} samples a problem, more than --n {n}: "
            "give that --n, or another --out")
    missing = []
    for row in bench.problems:
        missing += [(row, k) for k in range(n) if (row["pid"], k) not in stored]
    return missing


def generate(benches, missing, args, dist):
    """Draw this rank's share of the missing samples of all benchmarks in one stream, so that the
    engine runs dry once.

    A row keeps its token ids where entropy will be measured: a text does not always encode to the
    tokens it came from.
    """
    requests = []
    for bench in benches:
        requests += [(bench, row, k) for row, k in missing[bench.name]]
    requests = requests[dist.rank::dist.world]
    if not requests:
        return
    tokenizer = load_tokenizer(args.model)
    texts = {row["problem"] for _, row, _ in requests}
    encoded = {text: render_prompt(tokenizer, text, args.instruction) for text in texts}
    prompts = [encoded[row["problem"]] for _, row, _ in requests]
    seeds = [common.request_seed(args.seed, row["pid"], k) for _, row, k in requests]
    longest = max(len(prompt) for prompt in prompts) + args.max_tokens
    engine = make_engine(args.engine, args.model, longest, device=dist.device, dtype=args.dtype,
                         sleep=True)
    writers = {}
    for bench in benches:
        part = common.part_path(bench.rows, dist.rank)
        _, writer = common.append_jsonl(part, ("pid", "k"))
        writers[bench.name] = writer
    bar = tqdm(total=len(requests), desc="generate", unit="resp", disable=dist.rank > 0,
               mininterval=2)
    with bar:
        drawn = engine.generate(prompts, seeds, args.temperature, args.top_p, args.max_tokens, bar)
        for i, done in drawn:
            bench, problem, k = requests[i]
            row = {
                "pid": problem["pid"],
                "k": k,
                "seed": seeds[i],
                "response": decode_response(tokenizer, done.ids),
                "n_tokens": len(done.ids),
                "finish": done.finish,
                "predicted": None,
                "correct": None,
                "status": UNGRADED,
            }
            if k < args.entropy_samples:
                row["ids"] = [int(token) for token in done.ids]
            writers[bench.name].write(row)
    engine.sleep()                                # the GPU is free for the entropy's model
    for writer in writers.values():
        writer.close()


# -------------------------------------------------------------------------------------- 2. entropy


def sampled_ids(bench) -> dict[str, list]:
    """pid -> the token ids of its samples that entropy is measured on, in the order of k."""
    samples = {pid: [] for pid in bench.pids}
    for row in bench.stored_rows():
        if "ids" in row:
            samples[row["pid"]].append(row["ids"])
    return samples


def fingerprint(ids: list, settings: dict) -> str:
    """What an entropy is a function of: the samples, the weights, the type they compute in, and
    the instruction of the prompt."""
    return common.sha256_text(json.dumps(ids), settings["weights"], settings["dtype"],
                              settings["instruction"])


def stored_entropy(bench) -> dict[str, dict]:
    """pid -> its stored entropy, if that was measured on the samples that are there."""
    if not bench.entropy.exists() or bench.entropy.stat().st_size == 0:
        return {}
    samples, settings = sampled_ids(bench), bench.settings()
    entropy = {}
    for row in common.read_jsonl(bench.entropy, ENTROPY, key="pid"):
        ids = samples.get(row["pid"])
        if ids and row["of"] == fingerprint(ids, settings):
            entropy[row["pid"]] = row
    return entropy


def forget_other_entropies(bench):
    """Rank 0: drop entropies of samples that are no longer there, or not all that there are now."""
    if bench.entropy.exists():
        rows = stored_entropy(bench).values()
        with common.replace_file(bench.entropy) as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


def blocks_of(sizes: list[int], budget: int) -> list[list[int]]:
    """Indices in runs of at most `budget` tokens each (a larger problem is a run of its own).

    A function of the samples alone, not of ranks or of what is done already: so a problem always
    stands in the same pack, and every bit of its entropy is the same after a restart.
    """
    blocks, room = [], 0
    for i, size in enumerate(sizes):
        if not blocks or size > room:
            blocks.append([])
            room = budget
        blocks[-1].append(i)
        room -= size
    return blocks


@torch.no_grad()
def measure_entropy(bench, model, tokenizer, args, dist):
    """Mean token entropy (nats, temperature 1; A47) over the first --entropy-samples responses of
    each problem, problems packed together; this rank's share."""
    samples, settings = sampled_ids(bench), bench.settings()
    done = stored_entropy(bench)
    prompts = [render_prompt(tokenizer, row["problem"], args.instruction)
               for row in bench.problems]
    sizes = []
    for pid, prompt in zip(bench.pids, prompts):
        sizes.append(sum(len(prompt) + len(ids) for ids in samples[pid]))
    blocks = blocks_of(sizes, args.token_budget)[dist.rank::dist.world]
    part = common.part_path(bench.entropy, dist.rank)
    _, writer = common.append_jsonl(part, "pid")
    with writer:
        for block in tqdm(blocks, desc=f"entropy {printable(bench.name)}", unit="pack",
                          disable=dist.rank > 0, mininterval=2):
            pids = [bench.pids[i] for i in block]
            if done.keys() >= set(pids):
                continue
            sequences = []
            for i, pid in zip(block, pids):
                prompt = prompts[i]
                sequences += [(prompt + ids, len(prompt)) for ids in samples[pid]]
            bf16 = args.dtype == "bfloat16"
            sums = entropy_sums(model, sequences, args.token_budget, dist.device, bf16)   # [S]
            of_problem = sums.split([len(samples[pid]) for pid in pids])
            for pid, sums_of_problem in zip(pids, of_problem):
                if pid not in done:
                    n_tokens = sum(len(ids) for ids in samples[pid])
                    writer.write({
                        "pid": pid,
                        "entropy": sums_of_problem.sum().item() / n_tokens,
                        "n_entropy_tokens": n_tokens,
                        "of": fingerprint(samples[pid], settings),
                    })


def entropy_sums(model, sequences, budget: int, device, bf16=False) -> torch.Tensor:
    """Sum of the entropies at the response tokens of each sequence, [S] float64. One pack, if the
    sequences fit the budget; prompts that they share are read once."""
    lengths = [len(ids) for ids, _ in sequences]
    sums = torch.zeros(len(sequences), dtype=torch.float64)
    for indices in plan_packs(lengths, max(budget, *lengths))[0]:
        pack = pack_sequences([sequences[i] for i in indices], device, share=True)
        _, entropy = token_logprobs(model, pack, entropy=True, bf16=bf16)             # [N]
        of_pack = torch.zeros(len(indices), dtype=torch.float64, device=device)
        of_pack.index_add_(0, pack.seq, entropy.double())
        sums[indices] = of_pack.cpu()
    return sums


# ---------------------------------------------------------------------------------------- 3. grade


def grade(bench, args):
    """Grade the rows that have no valid verdict (--regrade: all), and write all back, sorted.

    A verdict is valid under the grader and the problems file that it was given with.
    -> rows, [(before, after)] of those that had one and have another now.
    """
    rows = bench.stored_rows()
    refuse_unequal_numbers(bench, rows)
    meta = bench.sidecar()
    source_hash = common.sha256_file(bench.source)
    same_grader = meta.get("grader") == verifier.grader_name()
    same_answers = source_hash in meta["inputs"].values()
    todo = rows
    if same_grader and same_answers and not args.regrade:
        todo = [row for row in rows if row["status"] == UNGRADED]
    pairs = [(row["response"], bench.answers[row["pid"]]) for row in todo]
    verdicts = []
    if pairs:
        verdicts = verifier.verify_many(pairs, workers=args.verify_workers)
    changed = []
    for row, verdict in zip(todo, verdicts, strict=True):
        before = dict(row)
        row["predicted"] = verdict.predicted
        row["correct"] = verdict.correct
        row["status"] = verdict.status
        if row["finish"] == "length" and row["correct"] is False and row["predicted"] is None:
            row["status"] = "truncated"
        differs = any(before[name] != row[name] for name in VERDICT)
        if differs and before["status"] != UNGRADED:
            changed.append((before, row))
    with common.replace_file(bench.rows) as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    weights = bench.settings()["weights"]
    inputs = {str(bench.source): source_hash}
    for path, digest in meta["inputs"].items():
        if digest == weights:
            inputs[path] = digest
    bench.note(inputs=inputs, rows=len(rows), grader=verifier.grader_name(), regraded=args.regrade)
    if args.regrade or changed:
        print_changes(bench, rows, changed)
    return rows, changed


def refuse_unequal_numbers(bench, rows):
    """Pass@k of a benchmark needs the same n for every problem: a call was not finished."""
    drawn = Counter(row["pid"] for row in rows)
    for pid in bench.pids:
        if drawn[pid] < max(drawn.values()):
            die(f"{bench.rows} lacks responses to problem {printable(pid)}: "
                "complete it with --model")


def print_changes(bench, rows, changed):
    """What --regrade judged otherwise: pairs of a row before and after."""
    print(f"{printable(bench.name)}: {len(changed)} of {len(rows)} verdicts changed")
    for before, after in changed:
        which = f"{printable(after['pid'])} k={after['k']}"
        print(f"    {which}: {verdict_of(before)} -> {verdict_of(after)}")


def verdict_of(row) -> str:
    """As --regrade prints it."""
    return f"{row['correct']} ({row['status']}, {row['predicted']!r})"


def math_verify_grader():
    """(response, answer) -> bool by Hugging Face's math-verify: the last word of other people's
    graders."""
    try:
        from math_verify import parse as parse_math, verify as verify_math
    except ImportError:
        die("--second-grader math-verify needs the package 'math-verify': "
            "pip install 'math-verify[antlr4_13_2]'")

    def judge(response, answer):
        predicted = []
        if "</think>" in response:
            predicted = parse_math(response.rsplit("</think>", 1)[1])
        golds = [answer] if isinstance(answer, str) else answer
        return any(verify_math(parse_math(f"\\boxed{{{gold}}}"), predicted) for gold in golds)

    return judge


def second_opinion(bench, rows, judge, out) -> int:
    """Write and count the responses on which a second grader decides otherwise; unknown ones are
    not compared."""
    differing = []
    for row in tqdm(rows, desc=f"second grader {printable(bench.name)}", unit="resp",
                    mininterval=2):
        if row["correct"] is None:
            continue
        answer = bench.answers[row["pid"]]
        second = judge(row["response"], answer)
        if second != row["correct"]:
            differing.append({
                "pid": row["pid"],
                "k": row["k"],
                "answer": answer,
                "predicted": row["predicted"],
                "correct": row["correct"],
                "second": second,
            })
    path = Path(out) / f"{bench.name}.disagreements.jsonl"
    with common.replace_file(path) as file:
        for row in differing:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    print(f"{printable(bench.name)}: the second grader disagrees on {len(differing)} of "
          f"{len(rows)} responses; listed in {path}")
    for row in differing[:10]:
        print(f"    {printable(row['pid'])} k={row['k']}: answer {row['answer']!r}, predicted "
              f"{row['predicted']!r}, here {row['correct']}, there {row['second']}")
    return len(differing)


# ------------------------------------------------------------------------------------ 4. summarise


def problem_table(bench, rows, entropy: dict) -> list[dict]:
    """One row a problem, in the order of the problems file. `entropy`: of every problem, or {}."""
    rows_of = defaultdict(list)
    for row in rows:
        rows_of[row["pid"]].append(row)
    table = []
    for pid in bench.pids:
        mine = rows_of[pid]
        measured = entropy.get(pid, {"entropy": None, "n_entropy_tokens": 0})
        table.append({
            "pid": pid,
            "n": len(mine),
            "n_correct": sum(row["correct"] is True for row in mine),
            "n_unknown": sum(row["correct"] is None for row in mine),      # not correct (A49)
            "n_truncated": sum(row["finish"] == "length" for row in mine),
            "n_no_answer": sum(row["predicted"] is None and row["correct"] is False
                               for row in mine),
            "n_distinct": len({row["response"] for row in mine}),
            "mean_tokens": sum(row["n_tokens"] for row in mine) / len(mine),
            "entropy": measured["entropy"],
            "n_entropy_tokens": measured["n_entropy_tokens"],
        })
    return table


def interval(values) -> dict:
    """[P] per-problem values -> {value, low, high}: the mean over problems and its 95 % bootstrap
    interval."""
    column = np.asarray(values, dtype=float)[:, None]                                  # [P, 1]
    mean, low, high = common.bootstrap([[column]])
    return {"value": mean[0], "low": low[0], "high": high[0]}


def pass_curve_with_interval(table) -> dict:
    """Pass@k for k = 1..n with its interval; a share, so the interval is kept within [0, 1]."""
    curves = [common.pass_curve(row["n"], row["n_correct"]) for row in table]
    mean, low, high = common.bootstrap([[np.stack(curves)]])                           # [n] each
    return {
        "k": list(range(1, table[0]["n"] + 1)),
        "value": mean.tolist(),
        "low": np.clip(low, 0.0, 1.0).tolist(),
        "high": np.clip(high, 0.0, 1.0).tolist(),
    }


def summarise(rows, table) -> dict:
    """The results of one benchmark; every name is defined in docs/METRICS.md."""
    curve = pass_curve_with_interval(table)
    lengths = np.array([row["n_tokens"] for row in rows])
    edges = np.geomspace(1, max(lengths.max() + 1, 2), 161)
    edges = np.unique(np.round(edges).astype(int))
    counts, _ = np.histogram(lengths, bins=edges)

    def rate(name):
        return sum(row[name] for row in table) / len(rows)

    result = {
        "n_problems": len(table),
        "n_samples": table[0]["n"],
        "n_responses": len(rows),
        "pass_at_1": {name: curve[name][0] for name in ("value", "low", "high")},
        "pass_at_n": {name: curve[name][-1] for name in ("value", "low", "high")},
        "pass_at_k": curve,
        "entropy": None,
        "entropy_per_token": None,
        "unknown_rate": rate("n_unknown"),
        "truncation_rate": rate("n_truncated"),
        "no_answer_rate": rate("n_no_answer"),
        "duplicate_rate": 1 - rate("n_distinct"),
        "mean_tokens": float(lengths.mean()),
        "token_quantiles": {str(q): float(np.quantile(lengths, q)) for q in QUANTILES},
        "length_histogram": {"edges": edges.tolist(), "counts": counts.tolist()},
        "statuses": dict(sorted(Counter(row["status"] for row in rows).items())),
    }
    if table[0]["entropy"] is not None:
        entropies = [row["entropy"] for row in table]
        n_tokens = [row["n_entropy_tokens"] for row in table]
        result["entropy"] = interval(entropies)
        result["entropy_per_token"] = float(np.average(entropies, weights=n_tokens))
    return result


def write_results(out, new: dict, settings: dict, seconds: dict) -> dict:
    """Put the benchmarks `new` (name -> result) into results.json, beside those that it has."""
    old = stored_results(out)
    if old.get("grader") != verifier.grader_name():
        for name in set(old["benchmarks"]) - set(new):
            print(f"{printable(name)} leaves results.json: another version of the grader judged "
                  "it; name it in --problems too")
            del old["benchmarks"][name]
    spent = {}
    for name in ("generate", "entropy"):
        spent[name] = old.get("seconds", {}).get(name, 0) + seconds.get(name, 0)
    results = {
        "schema": "results",
        "schema_version": common.SCHEMA_VERSION,
        "grader": verifier.grader_name(),
        **settings,
        "seconds": spent,
        "benchmarks": {**old["benchmarks"], **new},
    }
    with common.replace_file(Path(out) / "results.json") as file:
        json.dump(results, file, indent=1)
    return results


def print_table(results):
    """The results, a line a benchmark: intervals and the number of problems beside each number."""
    model = printable(results["model"])
    sampling = (f"temperature {results['temperature']}, top-p {results['top_p']}, "
                f"at most {results['max_tokens']} tokens")
    print(f"\n{model}  ·  {printable(sampling)}  ·  grader {results['grader']}")
    lines = []
    for name, b in results["benchmarks"].items():
        lines.append({
            "benchmark": printable(name),
            "problems": str(b["n_problems"]),
            "n": str(b["n_samples"]),
            "Pass@1 [95 %]": with_interval(b["pass_at_1"]),
            "Pass@n [95 %]": with_interval(b["pass_at_n"]),
            "entropy, nats [95 %]": with_interval(b["entropy"]),
            "unknown": f"{b['unknown_rate']:.1%}",
            "cut": f"{b['truncation_rate']:.1%}",
            "no answer": f"{b['no_answer_rate']:.1%}",
            "repeated": f"{b['duplicate_rate']:.1%}",
            "tokens": f"{b['mean_tokens']:.0f}",
        })
    head = {name: name for name in lines[0]}
    width = {}
    for name in head:
        width[name] = max(len(line[name]) for line in [head, *lines])
    for line in [head, *lines]:
        cells = [line["benchmark"].ljust(width["benchmark"])]
        cells += [line[name].rjust(width[name]) for name in list(head)[1:]]
        print("  ".join(cells))


def with_interval(x) -> str:
    """An estimate with its 95 % interval."""
    if x is None:
        return "–"
    return f"{x['value']:.3f} [{x['low']:.3f}, {x['high']:.3f}]"


def show_responses(bench, rows, args):
    """N responses to read: random (by --seed), or of the chosen problems."""
    chosen = [row for row in rows if not args.show_pid or row["pid"] in args.show_pid]
    chosen = random.Random(args.seed).sample(chosen, min(args.show, len(chosen)))
    problem_of = {row["pid"]: row["problem"] for row in bench.problems}
    for row in chosen:
        facts = [
            bench.name,
            row["pid"],
            f"k={row['k']}",
            f"{LABEL[row['correct']]} ({row['status']})",
            f"predicted {row['predicted']}",
            f"answer {bench.answers[row['pid']]}",
            f"{row['n_tokens']} tokens",
            row["finish"],
        ]
        common.print_row(facts, problem_of[row["pid"]], row["response"])


# -------------------------------------------------------------------------------------------- main


def main(argv=None):
    args = parse_args(argv)
    judge = math_verify_grader() if args.second_grader else None
    benches = open_benchmarks(args)
    dist = common.init_distributed(patience_hours=24)
    settle_dtype(args, dist.device)
    settle_engine(args)
    draws = args.model is not None and not args.regrade
    if draws:
        check_model_dir(args.model)
    if dist.rank == 0:
        common.claim_output(Path(args.out) / "results.json")
        for bench in benches:
            common.claim_output(bench.rows, [bench.source])
            if draws:
                begin(bench, args)
            bench.merge()
            if not draws and not bench.rows.exists():
                die(f"{bench.rows} does not exist: --model is needed to draw responses")
        refuse_mixed_settings(benches, args.out)
        if draws:
            show_unreadable_golds(benches, args)
    common.barrier()
    seconds = draw_and_measure(benches, args, dist) if draws else {}
    if dist.rank == 0:
        results = {}
        for bench in benches:
            rows, _ = grade(bench, args)
            entropy = stored_entropy(bench)
            if len(entropy) < len(bench.pids):
                entropy = {}
            table = problem_table(bench, rows, entropy)
            with common.replace_file(bench.table) as file:
                for row in table:
                    file.write(json.dumps(row) + "\n")
            results[bench.name] = summarise(rows, table)
            if judge:
                n = second_opinion(bench, rows, judge, args.out)
                results[bench.name]["second_grader_disagreements"] = n
            if args.show:
                show_responses(bench, rows, args)
        print_table(write_results(args.out, results, benches[0].settings(), seconds))
        print(f"results: {Path(args.out) / 'results.json'}")


def draw_and_measure(benches, args, dist) -> dict:
    """The two passes that need a model, where something is missing; -> seconds of each."""
    seconds = {}
    missing = {bench.name: missing_samples(bench, args) for bench in benches}
    start = time.time()
    if any(missing.values()):
        generate(benches, missing, args, dist)
        merge(benches, dist)
        seconds["generate"] = time.time() - start
    if args.entropy_samples == 0:
        return seconds
    if dist.rank == 0:
        for bench in benches:
            forget_other_entropies(bench)
    common.barrier()
    unmeasured = [bench for bench in benches if len(stored_entropy(bench)) < len(bench.pids)]
    start = time.time()
    if unmeasured:
        model = load_model(args.model, device=dist.device)
        tokenizer = load_tokenizer(args.model)
        for bench in unmeasured:
            measure_entropy(bench, model, tokenizer, args, dist)
        merge(unmeasured, dist)
        seconds["entropy"] = time.time() - start
    return seconds


def merge(benches, dist):
    common.barrier()
    if dist.rank == 0:
        for bench in benches:
            bench.merge()
    common.barrier()


if __name__ == "__main__":
    common.run(main)
