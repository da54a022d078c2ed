"""The report of a run: REPORT.md, summary.json and figures, from results, metrics and sidecars.

    python -m tools.report runs/toy                              everything into runs/toy/report/
    python -m tools.report runs/toy --contrast runs/toy_easy     with a second world beside it

A claim compares two arms problem by problem, seed by seed (the same problems, as many samples),
averages over benchmarks with equal weight, and takes its 95 % interval from a bootstrap over
problems and seeds (`common.bootstrap`). The rule of the verdict, fixed before any arm was run:

    not reproduced   the whole interval lies below the smallest effect of interest, 0.01
                     (a point of Pass@k; 0.01 nats)
    reproduced       otherwise, if the whole interval lies above 0
    undecided        otherwise

C4 has two parts, C1 and C2 after RLVR: reproduced if both are, not reproduced if either is not.
With one seed the interval knows problems only, and the report says so. Pass@k is taken at k = n,
the samples drawn, or at --k. Claims and averages are over all benchmarks but those of --beside
(the paper's six, without MATH-500), which have tables of their own. Beside C3 stands the entropy
that the RL trainer logs at its first step (04's `entropy`), the one that the published code logs.

What is missing (an arm, RLVR, the base, a stage's log) is left out; nothing is made up for it.
RUN_DIR/explain.json, if there, is shown as a section of its own: a list of {"title", "text",
"columns", "rows", "figures"}, figures as {"file": a PNG inside RUN_DIR, "caption"}; all but the
title may be missing. Names and texts that come from files are shown as text: no Markdown, no HTML.
"""

import common

import json
import math
import re
import shutil
import urllib.parse
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SMALLEST_EFFECT = 0.01
MAIN_ARMS, REFERENCE, CONTROLS = ("oxa_full", "oxa_mle"), "sft", ("length_matched", "longest")
WHEN = {"before": "eval", "after": "eval_rlvr"}       # RLVR, and the directory of the evaluation
# (claim, part, what is claimed, measure, evaluated before or after RLVR)
CLAIMS = (
    ("C1", "", "Pass@1 up", 1, "before"),
    ("C2", "", "Pass@k up", "k", "before"),
    ("C3", "", "initial policy entropy up (nats)", "entropy", "before"),
    ("C4", "Pass@1", "Pass@1 still up after RLVR", 1, "after"),
    ("C4", "Pass@k", "Pass@k still up after RLVR", "k", "after"),
)
# name in summary.json: measure
ARM_MEASURES = {
    "pass_at_1": 1, "pass_at_k": "k", "pass_at_n": "n", "entropy": "entropy",
    "mean_tokens": "mean_tokens", "truncation_rate": "n_truncated",
}
# colour (Okabe-Ito, told apart by colour-blind readers) and marker of each arm
STYLES = {
    "base": ("#6e6e6e", "X"), "sft": ("#0072B2", "o"), "sft_lp": ("#56B4E9", "v"),
    "oxa_mle": ("#E69F00", "s"), "oxa_full": ("#D55E00", "D"),
    "length_matched": ("#009E73", "^"), "longest": ("#CC79A7", "P"),
}
OTHER_STYLE = ("black", ".")
# stage: {name in its metrics.jsonl: axis label}
CURVES = {
    "sft": {"ce_loss": "cross entropy (nats per token)", "ul_loss": "unlikelihood (nats per token)",
            "entropy_ce": "entropy, CE tokens (nats)"},
    "rlvr": {"reward": "mean reward", "entropy": "policy entropy (nats)",
             "response_tokens_mean": "response length (tokens)"},
}
RULE = f"""\
*not reproduced*: the whole interval lies below {SMALLEST_EFFECT} (one point; for entropy
{SMALLEST_EFFECT} nats); *reproduced*: otherwise, if the whole interval lies above 0; *undecided*:
otherwise. C4 holds if both of its parts do. Differences are paired by problem and seed; benchmarks
weigh alike; intervals: bootstrap over problems and seeds. `length_matched` (random responses with
the lengths of those of `oxa_mle`) and `longest` are controls, not in the paper: a lead over them is
owed to perplexity, not to length."""


def parse_args(argv=None):
    p = common.make_parser(__doc__)
    p.add_argument("run", metavar="RUN_DIR", help="directory of a run: RUN_DIR/seed-S/ARM/…")
    p.add_argument("--out", default=None, help="where the report goes (else RUN_DIR/report)")
    p.add_argument("--contrast", metavar="RUN_DIR2", default=None,
                   help="a second run, its claims shown as well")
    p.add_argument("--k", type=int, default=0,
                   help="k of the claims about Pass@k (0: all samples drawn)")
    p.add_argument("--beside", nargs="*", default=["math500"], metavar="BENCHMARK",
                   help="shown, but in no claim and no average")
    args = common.parse_args(p, "report", argv)
    common.check_range(args, k=0)
    return args


# ---------------------------------------------------------------------------------------- reading


@dataclass
class Run:
    """What a run left. `when` is "before" or "after" RLVR."""
    path: Path
    k: int              # of Pass@k; 0: all samples drawn
    seeds: list
    arms: list
    benchmarks: list    # all that were evaluated
    counted: list       # those in claims and averages
    tables: dict        # tables[seed, arm, when, benchmark] = {pid: row of 05's problem table}
    graders: Counter

    @property
    def name(self):
        return self.path.resolve().name


def load_run(path, k=0, beside=()) -> Run:
    path = Path(path)
    tables, graders = {}, Counter()
    for folder in sorted(path.glob("seed-*/*")):
        seed = folder.parent.name.removeprefix("seed-")
        for when, name in WHEN.items():
            if not seed.isdigit() or not (folder / name / "results.json").exists():
                continue
            results = read_json(folder / name / "results.json", {"grader": str, "benchmarks": dict})
            graders[results["grader"]] += 1
            for b in results["benchmarks"]:
                if Path(b).name != b:
                    common.die(f"{folder / name / 'results.json'}: {b!r} is no benchmark's name")
                table = read_table(folder / name / f"{b}.problems.jsonl")
                tables[int(seed), folder.name, when, b] = table
    if not tables:
        common.die(f"{path} holds no evaluation (seed-*/ARM/eval/results.json): "
                   "run the pipeline first")
    seeds, arms, _, benchmarks = map(dict.fromkeys, zip(*tables))    # each once, in order
    arms = [arm for arm in STYLES if arm in arms] + [arm for arm in arms if arm not in STYLES]
    counted = [b for b in benchmarks if b not in beside]
    if not counted:
        common.die(f"{path}: all benchmarks ({', '.join(benchmarks)}) stand beside the average; "
                   "name fewer with --beside (without a name: none)")
    check_k(path, k, tables, counted)
    return Run(path, k, sorted(seeds), arms, list(benchmarks), counted, tables, graders)


def read_json(path, fields) -> dict:
    """A JSON object that has these fields, of these types."""
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        common.die(f"{path}: not valid JSON ({error}); evaluate again")
    for name, kind in fields.items():
        if not isinstance(content, dict) or not isinstance(content.get(name), kind):
            common.die(f"{path}: '{name}' is missing or no {kind.__name__}; evaluate again")
    return content


def read_table(path) -> dict:
    """{pid: row} of a problem table of 05."""
    table = {}
    fields = {"pid": str, "n": int, "n_correct": int, "n_truncated": int,
              "mean_tokens": (float, int), "entropy": (float, int, type(None))}
    for number, row in enumerate(common.read_jsonl(path, fields, key="pid"), 1):
        if not 0 <= row["n_correct"] <= row["n"] or row["n"] == 0:
            common.die(f"{path}:{number}: {row['n_correct']} of {row['n']} samples are right, "
                       "which cannot be; evaluate again with --regrade")
        table[row["pid"]] = row
    return table


def check_k(path, k, tables, counted):
    """Pass@k of fewer than k samples is not defined."""
    for (seed, arm, _, b), table in tables.items():
        fewest = min(samples_drawn(table))
        if b in counted and k > fewest:
            common.die(f"{path}, seed {seed}: {arm} has {fewest} samples a problem on {b}, too few "
                       f"for --k {k}; draw more, or name a k of at most {fewest}")


# ------------------------------------------------------------------------------ effects, verdicts


def measured(row, measure, k):
    """One row of a problem table -> a number, or for "curve" Pass@k for every k, [n].

    measure: "curve"; k of Pass@k: a number, "k" (that of the run) or "n" (all samples); "entropy",
    "mean_tokens"; or "n_truncated", as a share of the responses.
    """
    n, n_correct = row["n"], row["n_correct"]
    if measure == "curve":
        return common.pass_curve(n, n_correct)
    if measure in ("entropy", "mean_tokens"):
        return math.nan if row[measure] is None else row[measure]
    if measure == "n_truncated":
        return row["n_truncated"] / n
    k = {"k": k or n, "n": n}.get(measure, measure)
    if k > n:                               # on a benchmark that stands beside
        return math.nan
    return common.pass_at_k(n, n_correct, k)


def values_of(run, key, reference, measure) -> dict:
    """{pid: value} of the arm in `key` (of Run.tables), minus that of `reference` if given."""
    seed, arm, when, b = key
    table = run.tables[key]
    values = {pid: measured(table[pid], measure, run.k) for pid in sorted(table)}
    if reference is None:
        return values
    other = run.tables[seed, reference, when, b]
    if table.keys() != other.keys():
        common.die(f"{run.path}, seed {seed}, {b}: {arm} and {reference} were evaluated on "
                   "different problems")
    if measure in ("k", "n") and samples_drawn(table) != samples_drawn(other):
        if not run.k:
            common.die(f"{run.path}, seed {seed}, {b}: {arm} and {reference} have different "
                       "numbers of samples a problem; compare them at a --k that both have")
        if measure == "n":
            return dict.fromkeys(values, math.nan)
    return {pid: value - measured(other[pid], measure, run.k) for pid, value in values.items()}


def samples_drawn(table) -> set:
    return {row["n"] for row in table.values()}


def as_columns(values) -> np.ndarray:
    """{pid: number, or [K]} -> [P, K]"""
    array = np.array(list(values.values()), dtype=float)
    return array.reshape(len(values), -1)


def in_common(run, arms, when) -> tuple[list, list]:
    """Seeds in which all of `arms` were evaluated, and the benchmarks they have in all of these."""
    seeds, benchmarks = set(run.seeds), set(run.benchmarks)
    for arm in arms:
        seeds &= {s for s, a, w, _ in run.tables if (a, w) == (arm, when)}
    for arm in arms:
        for seed in seeds:
            key = (seed, arm, when)
            benchmarks &= {b for *place, b in run.tables if tuple(place) == key}
    return sorted(seeds), [b for b in run.benchmarks if b in benchmarks]


def estimate(run, measure, arm, reference=None, when="before", benchmarks=None):
    """Mean over seeds, problems and benchmarks of a measure of `arm`, or of its paired difference
    to `reference`. Benchmarks weigh alike; those beside the average are left out (A51).

    -> {value, low, high ([K] each for a curve), seeds, benchmarks, n_problems}, or None if there
    is nothing to compare.
    """
    arms = [arm] if reference is None else [arm, reference]
    seeds, evaluated = in_common(run, arms, when)
    benchmarks = [b for b in benchmarks or run.counted if b in evaluated]
    if not seeds or not benchmarks:
        return None
    groups, n_problems, same_problems = [], 0, True
    for b in benchmarks:
        of_seeds = [values_of(run, (s, arm, when, b), reference, measure) for s in seeds]
        pids = of_seeds[0].keys()
        same_problems &= all(values.keys() == pids for values in of_seeds)
        n_problems += len(pids)
        groups.append([as_columns(values) for values in of_seeds])
    if any(np.isnan(values).any() for of_seeds in groups for values in of_seeds):
        return None                                       # not measured, or not defined
    value, low, high = common.bootstrap(groups, same_problems)
    if measure not in ("entropy", "mean_tokens"):         # a share, or a difference of two
        low, high = np.clip([low, high], -1.0 if reference else 0.0, 1.0)
    if measure != "curve":
        value, low, high = float(value[0]), float(low[0]), float(high[0])
    return {"value": value, "low": low, "high": high, "seeds": len(seeds),
            "benchmarks": benchmarks, "n_problems": n_problems}


def verdict(effect) -> str:
    if effect["high"] < SMALLEST_EFFECT:
        return "not reproduced"
    return "reproduced" if effect["low"] > 0 else "undecided"


def all_of(verdicts) -> str:
    """Of a claim with several parts."""
    if "not reproduced" in verdicts:
        return "not reproduced"
    return "reproduced" if set(verdicts) == {"reproduced"} else "undecided"


def judge_claims(run) -> dict:
    """{(arm, reference): {claim: effect, with what is claimed, its verdict, and what stands beside
    it (`at_n`: the same at k = n; `at_rl_step_1`)}}. C4 is {verdict, parts: {part: effect}}. What
    cannot be judged is left out."""
    judged = {}
    for reference in (REFERENCE, *CONTROLS):
        for arm in MAIN_ARMS:
            found = {}
            for claim, part, text, measure, when in CLAIMS:
                effect = estimate(run, measure, arm, reference, when)
                if effect is None:
                    continue
                effect |= {"claim": text, "verdict": verdict(effect)}
                if measure == "k":
                    effect["at_n"] = estimate(run, "n", arm, reference, when)
                if measure == "entropy":
                    effect["at_rl_step_1"] = entropy_at_rl_start(run, arm, reference)
                if part:
                    found.setdefault(claim, {"parts": {}})["parts"][part] = effect
                else:
                    found[claim] = effect
            if "C4" in found:
                parts = found["C4"]["parts"].values()
                found["C4"]["verdict"] = all_of([effect["verdict"] for effect in parts])
            if found:
                judged[arm, reference] = found
    return judged


def entropy_at_rl_start(run, arm, reference):
    """{value, seeds}: the difference of the entropies that 04 logs at its first step (nats, mean
    over tokens, RL prompts and temperature; A52), or None if there was no RLVR."""
    differences = []
    for seed in run.seeds:
        first = []
        for of_arm in (arm, reference):
            rows = read_metrics(run, seed, of_arm, "rlvr")
            first += [row["entropy"] for row in rows if row["step"] == 1]
        if len(first) == 2:
            differences.append(first[0] - first[1])
    if not differences:
        return None
    return {"value": float(np.mean(differences)), "seeds": len(differences)}


def read_metrics(run, seed, arm, stage) -> list[dict]:
    """metrics.jsonl of a training run; none if it left none."""
    path = run.path / f"seed-{seed}" / arm / stage / "metrics.jsonl"
    if not path.exists() or path.stat().st_size == 0:
        return []
    return list(common.read_jsonl(path, {"step": int}))


def effects(found) -> list[tuple]:
    """Judged claims part by part: [(name, effect)]"""
    listed = []
    for name, claim in found.items():
        for part, effect in claim.get("parts", {"": claim}).items():
            listed.append((f"{name} {part}".strip(), effect))
    return listed


def arm_summary(run) -> dict:
    """{arm: {when: {benchmark or "average": {name: estimate}}}}"""
    places = {b: [b] for b in run.benchmarks}
    if len(run.counted) > 1:
        places["average"] = run.counted
    summary = {}
    for arm in run.arms:
        for when in WHEN:
            for place, benchmarks in places.items():
                found = {}
                for name, measure in ARM_MEASURES.items():
                    found[name] = estimate(run, measure, arm, None, when, benchmarks)
                if found["pass_at_1"]:
                    summary.setdefault(arm, {}).setdefault(when, {})[place] = found
    return summary


# ----------------------------------------------------------------------------------------- tables


def number(x, sign="") -> str:
    """0.476 [0.451, 0.502]; with sign "+": +0.476 [+0.451, +0.502]"""
    if x is None:
        return "–"
    return f"{x['value']:{sign}.3f} [{x['low']:{sign}.3f}, {x['high']:{sign}.3f}]"


def safe(text) -> str:
    """`text` from a file, on one line, shown as it stands: nothing in it is Markdown or HTML but
    `code` between single backticks, where nothing is."""
    text = common.printable(str(text)).replace("\n", " ")
    parts = text.split("`")
    if "``" in text or len(parts) % 2 == 0:             # not in pairs: none of them is code
        text = escape(text)
    else:
        parts[0::2] = map(escape, parts[0::2])
        text = "`".join(parts)
    return text.replace("|", "\\|")                     # ends a cell of a table even in code


def escape(text) -> str:
    return re.sub(r"([\\`*\[\]<>~&])", r"\\\1", text)


def table(head, rows) -> str:
    """A Markdown table."""
    lines = []
    head = list(head)
    for row in (head, ["---"] * len(head), *rows):
        lines.append("| " + " | ".join(map(str, row)) + " |")
    return "\n".join(lines)


def labels_of(run) -> tuple[str, str]:
    """What Pass@k and Pass@n are called: ("Pass@8", "Pass@32")."""
    drawn = set()
    for (_, _, _, b), table in run.tables.items():
        if b in run.counted:
            drawn |= samples_drawn(table)
    label_n = f"Pass@{drawn.pop()}" if len(drawn) == 1 else "Pass@n"
    return f"Pass@{run.k}" if run.k else label_n, label_n


def claims_table(run, claims) -> str:
    """claims: of `judge_claims`."""
    label_k, label_n = labels_of(run)
    rows = []
    for (arm, reference), found in claims.items():
        difference = f"{arm} − {reference}"
        for name, e in effects(found):
            beside = ""
            if e.get("at_n") and label_k != label_n:
                beside = f"{label_n}: {number(e['at_n'], '+')}"
            if e.get("at_rl_step_1"):
                beside = f"at step 1 of RLVR: {e['at_rl_step_1']['value']:+.3f}"
            rows.append([name, e["claim"], difference, number(e, "+"), beside, e["seeds"],
                         e["n_problems"], e["verdict"]])
        if "C4" in found:
            rows.append(["C4", "all parts", difference, "", "", "", "", found["C4"]["verdict"]])
    head = ["claim", "", "difference", "effect [95 %]", "beside", "seeds", "problems", "verdict"]
    return table(head, rows).replace("Pass@k", label_k)


def arms_table(run, summary, place) -> str:
    """Arms by measures on a benchmark, or on "average", before and after RLVR."""
    rows = []
    for arm, found in summary.items():
        for when, places in found.items():
            if place in places:
                m = places[place]
                rows.append([safe(arm), when, number(m["pass_at_1"]), number(m["pass_at_k"]),
                             number(m["pass_at_n"]), number(m["entropy"]),
                             f"{m['mean_tokens']['value']:.0f}",
                             f"{m['truncation_rate']['value']:.1%}"])
    head = ["arm", "RLVR", "Pass@1", *labels_of(run), "entropy, nats", "tokens", "cut"]
    return table(head, rows)


# ------------------------------------------------------------------------------------- provenance


def provenance(run) -> tuple[dict, dict]:
    """From every sidecar of the run: ({what: text}, {input file: sha256})."""
    counters = {name: Counter() for name in ("code", "packages", "perplexity under")}
    hashes = {}
    for path in sorted(run.path.rglob("*.meta.json")):
        meta = common.read_meta(path.with_name(path.name.removesuffix(".meta.json")))
        counters["code"][meta.get("commit", "unknown")] += 1
        packages = [f"{name} {version}" for name, version in meta.get("versions", {}).items()]
        counters["packages"][", ".join(packages)] += 1
        if "scorer" in meta:
            counters["perplexity under"][short_path(meta["scorer"])] += 1
        for name, digest in meta.get("inputs", {}).items():
            hashes[short_path(name)] = digest
    facts = {"seeds": ", ".join(map(str, run.seeds))}
    for name, counter in (counters | {"grader": run.graders}).items():
        if counter:
            facts[name] = "; ".join(f"{what} (×{n})" for what, n in counter.most_common())
    return facts, dict(sorted(hashes.items()))


def short_path(name) -> str:
    """A report does not tell where a machine keeps things."""
    path = Path(name)
    return "/".join(path.parts[-5:]) if path.is_absolute() else str(path)


# ---------------------------------------------------------------------------------------- figures
# Each saves a PNG and returns the Markdown that shows it, or "" without data.


def style(arm) -> dict:
    color, marker = STYLES.get(arm, OTHER_STYLE)
    return {"color": color, "marker": marker}


def panels(n, n_cols=4, height=2.9):
    """A figure, and [n] axes in a grid."""
    n_cols = min(n, n_cols)
    n_rows = math.ceil(n / n_cols)
    figure, axes = plt.subplots(n_rows, n_cols, figsize=(9.0, height * n_rows + 0.5),
                                squeeze=False, layout="constrained")
    for ax in axes.flat[n:]:
        ax.remove()
    for ax in axes.flat[:n]:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.25, linewidth=0.6)
    return figure, list(axes.flat[:n])


def add_legend(figure):
    """The legend of all panels stands once, below them."""
    handles = {}
    for ax in figure.axes:
        for handle, label in zip(*ax.get_legend_handles_labels()):
            handles.setdefault(label, handle)
    if handles:
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4,
                      frameon=False)


def save(figure, path, caption) -> str:
    add_legend(figure)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return image(path.name, caption)


def image(name, caption) -> str:
    caption = safe(caption)
    return f"![{caption}](figures/{urllib.parse.quote(name)})\n\n*{caption}*"


def figure_claims(run, claims, out) -> str:
    """Effects with their intervals: of Pass@k on the left, of entropy on the right."""
    if not claims:
        return ""
    figure, axes = panels(2, height=0.6 + 0.7 * len(claims))
    for (arm, reference), found in claims.items():
        for name, e in effects(found):
            ax = axes[name == "C3"]
            interval = [[e["value"] - e["low"]], [e["high"] - e["value"]]]
            label = f"{name}: {arm} − {reference}".replace("Pass@k", labels_of(run)[0])
            ax.errorbar(e["value"], label, xerr=interval, capsize=2.5, linestyle="none",
                        **style(arm if reference == REFERENCE else reference))
    for ax, title in zip(axes, ("Pass@k", "policy entropy (nats)")):
        ax.axvline(0, color="black", linewidth=0.9)
        ax.invert_yaxis()
        ax.set_title(f"difference of {title}", fontsize=9)
    return save(figure, out / "claims.png", "Effects with 95 % intervals, against "
                "`sft` and against the controls.")


def figure_perplexity(run, out) -> str:
    """The verified teacher responses, the Gaussian's target, and what it took of them."""
    for seed in run.seeds:
        for arm in MAIN_ARMS:
            meta = common.read_meta(run.path / f"seed-{seed}" / arm / "train.jsonl")
            if meta and meta.get("bins"):
                return draw_perplexity(meta, seed, out)
    return ""


def draw_perplexity(meta, seed, out) -> str:
    bins = meta["bins"]
    low = [b["low"] for b in bins]
    width = bins[0]["high"] - bins[0]["low"]
    sigma = meta.get("sigma", meta["args"]["sigma"])
    figure, axes = panels(2, n_cols=1, height=1.6)
    axes[0].bar(low, [b["available"] for b in bins], width, align="edge", color="#b8b8b8",
                label="verified teacher responses")
    axes[1].bar(low, [b["actual"] for b in bins], width, align="edge", color=STYLES["oxa_mle"][0],
                label="picked for oxa_mle and oxa_full")
    axes[1].step(low, [b["target"] for b in bins], where="post", color="black",
                 label=f"target: Gaussian, μ = {meta['mu']:.2f}, σ = {sigma:.2g}")
    axes[1].sharex(axes[0])
    axes[1].set_xlabel(f"perplexity of the response under the base model, bins of {width:.2g}")
    picked = f"{meta['ce']['actual']:,} of {meta['ce']['target']:,} wanted"
    caption = f"The Gaussian-guided selection (seed {seed}): {picked}."
    return save(figure, out / "perplexity.png", caption)


def figure_pass_at_k(run, out) -> str:
    """Pass@k of every arm with its interval, a panel for each benchmark, before and after RLVR."""
    evaluated = {when for _, _, when, _ in run.tables}
    shown = [(when, b) for when in WHEN for b in run.benchmarks if when in evaluated]
    figure, axes = panels(len(shown))
    for ax, (when, b) in zip(axes, shown):
        for arm in run.arms:
            curve = estimate(run, "curve", arm, None, when, [b])
            if curve:
                k = np.arange(1, len(curve["value"]) + 1)
                powers = 2 ** np.arange(len(k).bit_length()) - 1
                ax.plot(k, curve["value"], label=arm, markevery=powers.tolist(), **style(arm))
                ax.fill_between(k, curve["low"], curve["high"], color=style(arm)["color"],
                                alpha=0.12)
        ax.set_xscale("log", base=2)
        ax.xaxis.set_major_formatter("{x:.0f}")
        ax.set_ylim(-0.02, 1.02)
        ax.set_title(f"{b}, {when} RLVR", fontsize=9)
        ax.set_xlabel("k (samples a problem)")
        ax.set_ylabel("Pass@k")
    caption = "Unbiased Pass@k for every k, with 95 % bands over problems and seeds."
    return save(figure, out / "pass_at_k.png", caption)


def figure_curves(run, stage, out) -> str:
    """Metrics over the steps of a stage, a panel each: mean over seeds, the band their range."""
    curves = {}
    for name in CURVES[stage]:
        for arm in run.arms:
            found = metric_of_seeds(run, arm, stage, name)
            if found is not None:
                curves.setdefault(name, {})[arm] = found
    if not curves:
        return ""
    figure, axes = panels(len(curves))
    for ax, (name, arms) in zip(axes, curves.items()):
        for arm, values in arms.items():
            steps = np.arange(1, values.shape[1] + 1)
            every = max(1, len(steps) // 6)
            ax.plot(steps, values.mean(axis=0), label=arm, markevery=every, **style(arm))
            ax.fill_between(steps, values.min(axis=0), values.max(axis=0), alpha=0.12,
                            color=style(arm)["color"])
        ax.set_xlabel("optimizer step")
        ax.set_ylabel(CURVES[stage][name])
        ax.set_ylim(bottom=0)
    return save(figure, out / f"{stage}.png", f"{stage}: mean over seeds, the band their range.")


def metric_of_seeds(run, arm, stage, name):
    """[S, T] over the steps that every seed has, or None without the metric."""
    series = []
    for seed in run.seeds:
        values = [row.get(name) for row in read_metrics(run, seed, arm, stage)]
        if any(values):                         # an arm without unlikelihood has nulls or zeros
            series.append(values)
    if not series:
        return None
    shortest = min(map(len, series))
    return np.array([values[:shortest] for values in series], dtype=float)


# ----------------------------------------------------------------------------------------- report


def first_paragraph(run, claims) -> str:
    """What was reproduced, in words, from the main comparison."""
    if not claims:
        return ("No claim can be judged: `sft` and an `oxa` arm are needed, evaluated on the same "
                "problems.")
    (arm, reference), found = next(iter(claims.items()))
    judged = []
    for name, claim in found.items():
        numbers = [number(e, "+") for _, e in effects({name: claim})]
        judged.append(f"{name} {claim['verdict']} ({' and '.join(numbers)})")
    n_good = sum(claim["verdict"] == "reproduced" for claim in found.values())
    text = (f"**{n_good} of {len(found)} claims reproduced** for `{arm}` over `{reference}`: "
            f"{'; '.join(judged)}.")
    missing = [name for name in ("C1", "C2", "C3", "C4") if name not in found]
    if missing:
        text += f" Not measured in this run: {', '.join(missing)}."
    some = {b for _, e in effects(found) for b in run.counted if b not in e["benchmarks"]}
    if some:
        text += f" Not evaluated by both, so not in every claim: {safe(', '.join(sorted(some)))}."
    if any(e["seeds"] == 1 for _, e in effects(found)):
        text += (" **One seed: intervals are over problems only**, and say nothing of how another "
                 "training run would have ended.")
    return text


def explanation(folder, out) -> list[str]:
    """The sections of RUN_DIR/explain.json; their figures are copied beside the report's own."""
    path = folder / "explain.json"
    if not path.exists():
        return []
    parts = ["## Why"]
    for section in read_sections(path):
        parts += [f"### {safe(section['title'])}", safe(section.get("text", ""))]
        if section.get("rows"):
            rows = []
            for row in section["rows"]:
                rows.append([f"{x:.3f}" if isinstance(x, float) else safe(x) for x in row])
            parts.append(table(map(safe, section["columns"]), rows))
        for figure in section.get("figures", []):
            source = figure_inside(folder, figure["file"])
            shutil.copy(source, out / f"explain_{source.name}")
            parts.append(image(f"explain_{source.name}", figure["caption"]))
    return parts


def read_sections(path) -> list[dict]:
    """explain.json, its form checked."""
    try:
        sections = json.loads(path.read_text())
        for section in sections:
            columns = section.get("columns", [])
            figures = section.get("figures", [])
            sound = [isinstance(section["title"], str), isinstance(columns, list)]
            sound += [len(row) == len(columns) for row in section.get("rows", [])]
            sound += [isinstance(figure["file"] + figure["caption"], str) for figure in figures]
            if not all(sound):
                raise ValueError(f"section {sections.index(section) + 1}")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        common.die(f"{path} is no list of sections as tools/report.py describes it ({error}); "
                   "mend or remove it")
    return sections


def figure_inside(folder, name) -> Path:
    """A PNG inside the run; links are followed first."""
    source = (folder / name).resolve()
    if not source.is_relative_to(folder.resolve()):
        common.die(f"{folder / 'explain.json'} names the figure {name!r}, outside {folder}; "
                   "figures must lie inside")
    if source.suffix != ".png" or not source.is_file():
        common.die(f"{folder / 'explain.json'} names the figure {name!r}, which is no PNG file")
    return source


def n_problems(run, benchmark) -> int:
    """Problems of a benchmark (of one seed)."""
    return next(len(table) for (_, _, _, b), table in run.tables.items() if b == benchmark)


def compose(run, claims, other, summary, facts, out) -> list[str]:
    """The parts of REPORT.md in their order; an empty one is left out. other: (run, claims) of a
    contrast, or None."""
    figures = out / "figures"
    parts = [f"# {safe(run.name)}: what was reproduced", first_paragraph(run, claims),
             figure_claims(run, claims, figures)]
    if claims:
        parts += ["## Claims", claims_table(run, claims), RULE]
    if other:
        parts += [f"## The contrast: {safe(other[0].name)}", first_paragraph(*other),
                  claims_table(*other)]
    parts += ["## Arms", "Means over seeds, with 95 % intervals over problems and seeds."]
    if len(run.counted) > 1:
        average = safe(", ".join(run.counted))
        parts += [f"### Average over {average}", arms_table(run, summary, "average")]
    for b in run.benchmarks:
        beside = "" if b in run.counted else "; in no claim and no average"
        parts += [f"### {safe(b)} ({n_problems(run, b)} problems{beside})",
                  arms_table(run, summary, b)]
    parts += ["## Pass@k", figure_pass_at_k(run, figures)]
    parts += explanation(run.path, figures)
    parts += ["## Training", figure_perplexity(run, figures),
              figure_curves(run, "sft", figures), figure_curves(run, "rlvr", figures)]
    lines = [f"- {name}: {safe(text)}" for name, text in facts.items()]
    parts += ["## Where this comes from", "\n".join(lines),
              "summary.json has the sha256 of every input."]
    return [part for part in parts if part]


def write_summary(worlds, summary, facts, hashes, path):
    run, _ = worlds[0]
    label_k, label_n = labels_of(run)
    judged = []
    for world, claims in worlds:
        for (arm, reference), found in claims.items():
            judged.append({"world": world.name, "arm": arm, "reference": reference,
                           "claims": found})
    content = {
        "schema": "summary", "schema_version": common.SCHEMA_VERSION, "run": run.name,
        "seeds": run.seeds, "benchmarks": {b: n_problems(run, b) for b in run.benchmarks},
        "averaged_over": run.counted,
        "k": run.k or "n", "pass_at_k_label": label_k, "pass_at_n_label": label_n,
        "smallest_effect": SMALLEST_EFFECT, "claims": judged, "arms": summary,
        "provenance": facts, "inputs": hashes,
    }
    with common.replace_file(path) as file:
        json.dump(content, file, indent=1)


def main(argv=None):
    args = parse_args(argv)
    matplotlib.rcParams.update({"font.size": 8, "text.parse_math": False})    # a name may have a $
    run = load_run(args.run, args.k, args.beside)
    worlds = [(run, judge_claims(run))]
    if args.contrast:
        other = load_run(args.contrast, args.k, args.beside)
        worlds.append((other, judge_claims(other)))
    out = Path(args.out or run.path / "report")
    common.make_dir(out / "figures")

    claims = worlds[0][1]
    contrast = worlds[1] if args.contrast else None
    summary = arm_summary(run)
    facts, hashes = provenance(run)
    parts = compose(run, claims, contrast, summary, facts, out)
    with common.replace_file(out / "REPORT.md") as file:
        file.write("\n\n".join(parts) + "\n")
    write_summary(worlds, summary, facts, hashes, out / "summary.json")
    print(first_paragraph(run, claims), f"report: {out / 'REPORT.md'}", sep="\n\n")


if __name__ == "__main__":
    common.run(main)
