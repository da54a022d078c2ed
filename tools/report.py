"""The report of a run: REPORT.md, summary.json and figures, from results, metrics and sidecars only (never a model).

    python -m tools.report runs/toy                                       everything into runs/toy/report/
    python -m tools.report runs/toy --contrast runs/toy_easy              with a second world beside it
    python -m tools.report runs/paper_1.5b --card-hour-price 2.5          with costs

A claim compares two arms problem by problem, seed by seed (the same problems, as many samples), averages over
benchmarks with equal weight, and takes its 95 % interval from a bootstrap over problems and seeds (`common.bootstrap`).
The rule of the verdict, fixed before any arm was run:

    not reproduced   the whole interval lies below the smallest effect of interest, 0.01 (a point of Pass@k; 0.01 nats)
    reproduced       otherwise, if the whole interval lies above 0
    undecided        otherwise

C4 has two parts, C1 and C2 after RLVR: reproduced if both are, not reproduced if either is not. With one seed the
interval knows problems only, and the report says so. Pass@k is taken at k = n, the samples drawn, or at --k.

What is missing (an arm, RLVR, the base, a stage's log) is left out of tables and figures; nothing is made up for it.
RUN_DIR/explain.json, if there, is shown as a section of its own: a list of {"title", "text", "columns", "rows",
"figures"}, figures as {"file": path relative to RUN_DIR, "caption"}; all but the title may be missing.
"""

import json
import math
import shutil
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

import common

SMALLEST_EFFECT = 0.01
MAIN_ARMS, REFERENCE, CONTROLS = ("oxa_full", "oxa_mle"), "sft", ("length_matched", "longest")
# claim: its parts, each (what is claimed, measure, evaluated before or after RLVR)
CLAIMS = {
    "C1": {"": ("Pass@1 up", 1, "before")},
    "C2": {"": ("Pass@k up", "k", "before")},
    "C3": {"": ("initial policy entropy up (nats)", "entropy", "before")},
    "C4": {"Pass@1": ("Pass@1 still up after RLVR", 1, "after"),
           "Pass@k": ("Pass@k still up after RLVR", "k", "after")},
}
# colour (Okabe-Ito, told apart by colour-blind readers), marker and line of each arm, the same in every figure
STYLES = {
    "base": ("#6e6e6e", "X", (0, (1, 1.2))), "sft": ("#0072B2", "o", (0, (5, 1.5))),
    "sft_lp": ("#56B4E9", "v", (0, (2.5, 1.5))), "oxa_mle": ("#E69F00", "s", (0, (6, 2, 1, 2))),
    "oxa_full": ("#D55E00", "D", "-"), "length_matched": ("#009E73", "^", (0, (1, 1, 1, 1, 4, 1))),
    "longest": ("#CC79A7", "P", (0, (5, 1, 1, 1, 1, 1))),
}
WHEN = {"before": "before RLVR", "after": "after RLVR"}


def parse(argv=None):
    p = common.make_parser(__doc__)
    p.add_argument("run", metavar="RUN_DIR", help="directory of a run: RUN_DIR/seed-S/ARM/…")
    p.add_argument("--out", default=None, help="where the report goes (without it: RUN_DIR/report)")
    p.add_argument("--contrast", metavar="RUN_DIR2", default=None, help="a second run, shown side by side")
    p.add_argument("--k", type=int, default=0, help="k of the claims about Pass@k (0: all samples drawn)")
    p.add_argument("--card-hour-price", type=float, default=0.0, help="price of one process-hour (0: no cost column)")
    return common.parse_args(p, "report", argv)


# ----------------------------------------------------------------------------------------------------------- reading


@dataclass
class Run:
    """What a run left. evals[seed, arm, when] = (results.json, {benchmark: {pid: row of its problem table}})."""
    path: Path
    seeds: list
    arms: list
    benchmarks: list
    evals: dict

    def table(self, seed, arm, when, benchmark):
        return self.evals[seed, arm, when][1][benchmark]


def load_run(path) -> Run:
    path, evals, arms = Path(path), {}, set()
    folders = {int(p.name[5:]): p for p in path.glob("seed-*") if p.name[5:].isdigit()}
    for seed, folder in sorted(folders.items()):
        for arm in filter(Path.is_dir, folder.iterdir()):
            if (arm / "train.meta.json").exists():
                arms.add(arm.name)
            for when, name in (("before", "eval"), ("after", "eval_rlvr")):
                if (arm / name / "results.json").exists():
                    results = json.loads((arm / name / "results.json").read_text())
                    tables = {b: {row["pid"]: row for row in common.read_jsonl(arm / name / f"{b}.problems.jsonl")}
                              for b in results["benchmarks"]}
                    evals[seed, arm.name, when] = (results, tables)
                    arms.add(arm.name)
    if not evals:
        common.die(f"{path} holds no evaluation (seed-*/ARM/eval/results.json): run the pipeline first")
    known = list(STYLES)
    order = sorted(arms, key=lambda arm: (known.index(arm) if arm in known else len(known), arm))
    benchmarks = list(dict.fromkeys(b for results, _ in evals.values() for b in results["benchmarks"]))
    return Run(path, sorted({seed for seed, _, _ in evals}), order, benchmarks, evals)


def read_metrics(path):
    """metrics.jsonl of a training run -> list of rows; [] if there is none."""
    return list(common.read_jsonl(path)) if path.exists() and path.stat().st_size else []


# -------------------------------------------------------------------------------------------------- effects, verdicts


def scores(row, what, k=0):
    """One row of a problem table -> [K] numbers. `what`: k of Pass@k (a number, "n", or "k": `k` if given, else n),
    "curve" (all k), "entropy", "mean_tokens"."""
    n, n_correct = row["n"], row["n_correct"]
    if what == "curve":
        return common.pass_curve(n, n_correct)
    if what in ("entropy", "mean_tokens"):
        return [row[what]]
    return [common.pass_at_k(n, n_correct, {"k": k or n, "n": n}.get(what, what))]


def estimate(run, what, arm, reference=None, when="before", benchmarks=None, k=0):
    """Mean over seeds, problems and benchmarks of a measure of `arm`, or of its paired difference to `reference`.

    -> {value, low, high ([K] each for a curve), seeds, benchmarks, n_problems}, or None if there is nothing to compare.
    """
    pair = [arm] if reference is None else [arm, reference]
    seeds = [s for s in run.seeds if all((s, a, when) in run.evals for a in pair)]
    benchmarks = [b for b in benchmarks or run.benchmarks
                  if seeds and all(b in run.evals[s, a, when][1] for s in seeds for a in pair)]
    if not benchmarks:
        return None
    groups, same = [], True
    for b in benchmarks:
        pids = [sorted(run.table(s, arm, when, b)) for s in seeds]
        same &= all(p == pids[0] for p in pids)
        for s, ids in zip(seeds, pids):
            if reference and sorted(run.table(s, reference, when, b)) != ids:
                common.die(f"{run.path}, seed {s}, {b}: {arm} and {reference} were evaluated on different problems")
        read = lambda a: [np.array([scores(run.table(s, a, when, b)[pid], what, k) for pid in ids], dtype=float)
                          for s, ids in zip(seeds, pids)]
        groups.append([x - y for x, y in zip(read(arm), read(reference))] if reference else read(arm))
    if any(np.isnan(x).any() for group in groups for x in group):      # entropy was not measured
        return None
    value, low, high = common.bootstrap(groups, same)
    if what not in ("entropy", "mean_tokens"):
        low, high = (np.clip(x, -1.0 if reference else 0.0, 1.0) for x in (low, high))
    if what != "curve":
        value, low, high = float(value[0]), float(low[0]), float(high[0])
    return {"value": value, "low": low, "high": high, "seeds": len(seeds), "benchmarks": benchmarks,
            "n_problems": sum(len(group[0]) for group in groups)}


def verdict(effect):
    if effect["high"] < SMALLEST_EFFECT:
        return "not reproduced"
    return "reproduced" if effect["low"] > 0 else "undecided"


def all_of(verdicts):
    """Of a claim with several parts."""
    if "not reproduced" in verdicts:
        return "not reproduced"
    return "reproduced" if set(verdicts) == {"reproduced"} else "undecided"


def judge_claims(run, arm, reference, k):
    """-> {claim: effect, with what is claimed, verdict, benchmarks: {name: effect}, and at_n, the same at k = n}.

    A claim of several parts has {verdict, parts: {part: effect}}. What cannot be judged is left out.
    """
    found = {}
    for name, parts in CLAIMS.items():
        judged = {}
        for part, (text, what, when) in parts.items():
            effect = estimate(run, what, arm, reference, when, k=k)
            if effect:
                judged[part] = effect | {
                    "claim": text, "verdict": verdict(effect),
                    "benchmarks": {b: estimate(run, what, arm, reference, when, [b], k) for b in effect["benchmarks"]},
                    "at_n": estimate(run, "n", arm, reference, when) if what == "k" else None}
        if len(judged) == len(parts):
            found[name] = judged[""] if "" in judged else {
                "verdict": all_of([effect["verdict"] for effect in judged.values()]), "parts": judged}
    return found


def effects(found):
    """The claims part by part: [(name, effect)]."""
    return [(f"{name} {part}".strip(), effect) for name, claim in found.items()
            for part, effect in claim.get("parts", {"": claim}).items()]


# ------------------------------------------------------------------------------------------------------------ tables


def number(x, digits=3, sign=False):
    """0.476 [0.451, 0.502]"""
    if x is None:
        return "–"
    form = f"{{:{'+' if sign else ''}.{digits}f}}"
    return f"{form.format(x['value'])} [{form.format(x['low'])}, {form.format(x['high'])}]"


def table(head, rows):
    """A Markdown table, its columns as wide as they need to be, so that it reads well in a terminal too."""
    rows = [[str(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    line = lambda cells: "| " + " | ".join(cell.ljust(w) for cell, w in zip(cells, widths)) + " |"
    return "\n".join([line(head), "|" + "|".join("-" * (w + 2) for w in widths) + "|", *map(line, rows)])


def named(text, label):
    """Pass@k is called by its k."""
    return text.replace("Pass@k", label)


def claims_table(claims, labels):
    """`claims`: {(arm, reference): judge_claims(...)}; `labels`: what Pass@k and Pass@n are called."""
    rows, (label, label_n) = [], labels
    for (arm, reference), found in claims.items():
        for name, e in effects(found):
            rows.append([named(name, label), named(e["claim"], label), f"{arm} − {reference}", number(e, sign=True),
                         number(e["at_n"], sign=True), e["seeds"], e["n_problems"], e["verdict"]])
        rows += [[name, "all parts", f"{arm} − {reference}", "", "", "", "", claim["verdict"]]
                 for name, claim in found.items() if "parts" in claim]
    head = ["claim", "", "difference", "effect [95 %]", f"beside: {label_n}", "seeds", "problems", "verdict"]
    keep = [i for i in range(len(head)) if i != 4 or label != label_n]
    return table([head[i] for i in keep], [[row[i] for i in keep] for row in rows])


def benchmarks_table(claims, label):
    """The same effects on each benchmark alone."""
    rows = [[named(name, label), f"{arm} − {reference}", b, number(x, sign=True), x["n_problems"], verdict(x)]
            for (arm, reference), found in claims.items() for name, e in effects(found)
            for b, x in e["benchmarks"].items()]
    return table(["claim", "difference", "benchmark", "effect [95 %]", "problems", "by the same rule"], rows)


def arm_summary(run, k):
    """{arm: {when: {benchmark or "average": {measure: {value, low, high}}}}}: what the tables are printed from."""
    measured = {"pass_at_1": 1, "pass_at_k": "k", "pass_at_n": "n", "entropy": "entropy", "mean_tokens": "mean_tokens"}
    summary = {}
    for arm in run.arms:
        for when in WHEN:
            for b in [*run.benchmarks, "average"]:
                some = None if b == "average" else [b]
                if b == "average" and len(run.benchmarks) == 1:
                    continue
                measures = {name: estimate(run, what, arm, None, when, some, k) for name, what in measured.items()}
                if measures["pass_at_1"]:
                    measures |= rates(run, arm, when, some or run.benchmarks)
                    summary.setdefault(arm, {}).setdefault(when, {})[b] = measures
    return summary


RATES = {"truncation_rate": "cut at the limit", "no_answer_rate": "no answer", "unknown_rate": "could not be judged",
         "duplicate_rate": "repeated"}


def rates(run, arm, when, benchmarks):
    """Shares over all responses of truncation and the like; means over seeds and benchmarks."""
    found = [results["benchmarks"][b] for (_, a, w), (results, _) in run.evals.items() if (a, w) == (arm, when)
             for b in benchmarks if b in results["benchmarks"]]
    return {name: float(np.mean([r[name] for r in found])) for name in RATES}


def labels_of(run, k, benchmark=None):
    """What Pass@k and Pass@n are called, on a benchmark or on all: ("Pass@8", "Pass@32")."""
    drawn = {r["benchmarks"][b]["n_samples"] for r, _ in run.evals.values() for b in r["benchmarks"]
             if benchmark in (b, None)}
    label_n = f"Pass@{drawn.pop()}" if len(drawn) == 1 else "Pass@n"
    return f"Pass@{k}" if k else label_n, label_n


def arms_table(run, summary, k, benchmark=None):
    """Arms by measures on one benchmark (or on average), before and after RLVR."""
    label, label_n = labels_of(run, k, benchmark)
    columns = {"Pass@1": "pass_at_1", label: "pass_at_k", label_n: "pass_at_n", "entropy, nats": "entropy"}
    after = any("after" in found for found in summary.values())
    rows = []
    for arm, found in summary.items():
        where = benchmark or ("average" if len(run.benchmarks) > 1 else run.benchmarks[0])
        now, later = (found.get(when, {}).get(where, {}) for when in WHEN)
        cells, later_cells = ([number(m.get(name)) for name in columns.values()] for m in (now, later))
        tokens = f"{now['mean_tokens']['value']:.0f}" if now else "–"
        rows.append([arm, *cells, tokens, *(later_cells if after else [])])
    return table(["arm", *columns, "tokens", *(f"{name} after RLVR" for name in columns if after)], rows)


def rates_table(summary):
    rows = [[arm, WHEN[when], b, *(f"{m[name]:.1%}" for name in RATES), f"{m['mean_tokens']['value']:.0f}"]
            for arm, found in summary.items() for when, benchmarks in found.items()
            for b, m in benchmarks.items() if b != "average"]
    return table(["arm", "", "benchmark", *RATES.values(), "tokens"], rows)


def selection_table(run):
    """Training sets of every arm, from the sidecars of `select`: means over seeds."""
    rows = []
    for arm in run.arms:
        metas = [m for m in (common.read_meta(run.path / f"seed-{s}" / arm / "train.jsonl") for s in run.seeds) if m]
        for name, label in (("ce", "cross entropy"), ("ul", "unlikelihood")):
            sets = [m[name] for m in metas if name in m]
            if sets:
                mean = lambda read: float(np.mean([read(s) for s in sets]))
                counts = [f"{mean(lambda s: s[name]):,.0f}" for name in ("actual", "shortage", "tokens")]
                spread = [f"{mean(lambda s: s['ppl_quantiles'][q]):.2f}"
                          for q in quantile_names(sets[0]["ppl_quantiles"])]
                rows.append([arm, label, *counts, " · ".join(spread)])
    head = ["arm", "set", "responses", "short by", "tokens", "perplexity: low · median · high"]
    return table(head, rows) if rows else ""


def quantile_names(quantiles):
    """The names of the lowest, the middle and the highest of some quantiles."""
    names = sorted(quantiles, key=float)
    return names[0], names[len(names) // 2], names[-1]


def time_table(run, price):
    """Wall time by stage from the marks run_all.sh leaves (logs/…/NAME.done: the command, then its seconds)."""
    stages = defaultdict(list)
    for mark in sorted((run.path / "logs").rglob("*.done")):
        command, _, rest = mark.read_text().partition("\n")
        if rest.startswith("seconds "):
            words = command.split()
            ranks = math.prod(int(words[words.index(flag) + 1]) for flag in ("--nnodes", "--nproc_per_node")
                              if words[0] == "torchrun" and flag in words)
            stages[mark.stem].append((int(rest.split()[1]), ranks))
    tokens = Counter()
    for s in run.seeds:
        for arm in run.arms:
            for stage, count in (("sft", lambda row: row["tokens"]),
                                 ("rlvr", lambda row: row["tokens_per_second_rollout"] * row["seconds_rollout"])):
                tokens[stage] += sum(map(count, read_metrics(run.path / f"seed-{s}" / arm / stage / "metrics.jsonl")))
            for when, stage in (("before", "eval"), ("after", "eval_rlvr")):
                if (s, arm, when) in run.evals:
                    results = run.evals[s, arm, when][0]["benchmarks"].values()
                    tokens[stage] += sum(r["n_responses"] * r["mean_tokens"] for r in results)
    head = ["stage", "times run", "seconds, sum", "longest", "process-hours", "tokens"] + (["cost"] if price else [])
    rows = []
    for stage, runs in sorted(stages.items(), key=lambda item: -sum(s for s, _ in item[1])):
        hours = sum(seconds * ranks for seconds, ranks in runs) / 3600
        rows.append([stage, len(runs), sum(s for s, _ in runs), max(s for s, _ in runs), f"{hours:.2f}",
                     f"{tokens[stage]:,.0f}" if tokens[stage] else "–", *([f"{hours * price:,.2f}"] if price else [])])
    if rows:
        hours = sum(float(row[4]) for row in rows)
        rows.append(["all", sum(row[1] for row in rows), sum(row[2] for row in rows), "–", f"{hours:.2f}", "–",
                     *([f"{hours * price:,.2f}"] if price else [])])
    return table(head, rows) if rows else ""


def n_problems(run, benchmark):
    """Problems of a benchmark (of one seed)."""
    return next(len(tables[benchmark]) for _, tables in run.evals.values() if benchmark in tables)


def short_path(name, run):
    """A path without what lies above the run or the project: a report does not tell where a machine keeps things."""
    path = Path(name)
    for above in (run.path.resolve(), Path(__file__).parent):
        if path.is_absolute() and path.is_relative_to(above):
            return str(path.relative_to(above))
    return "/".join(path.parts[-3:]) if path.is_absolute() else str(path)


def provenance(run):
    """Commits, versions, seeds and hashes of every sidecar of the run: (facts, {file: hash})."""
    commits, versions, hashes, graders, models = Counter(), defaultdict(Counter), {}, Counter(), set()
    for path in sorted(run.path.rglob("*.meta.json")):
        meta = json.loads(path.read_text())
        commit, _, dirty = meta.get("commit", "unknown").partition("-")
        commits[commit[:12] + ("-" + dirty if dirty else "")] += 1
        for name, version in meta.get("versions", {}).items():
            versions[name][version] += 1
        hashes |= meta.get("inputs", {})
        if meta.get("scorer"):
            models.add(f"perplexity under {short_path(meta['scorer'], run)}")
    for results, _ in run.evals.values():
        graders[results["grader"]] += 1
    several = lambda counter: ", ".join(f"{name} (×{n})" for name, n in counter.most_common())
    facts = {"seeds": ", ".join(map(str, run.seeds)), "commit": several(commits), "grader": several(graders),
             **{name: ", ".join(found) for name, found in versions.items()}, "scorer": ", ".join(sorted(models))}
    hashes = {short_path(name, run): digest for name, digest in hashes.items()}
    return {name: text for name, text in facts.items() if text}, dict(sorted(hashes.items()))


# ----------------------------------------------------------------------------------------------------------- figures


def style(arm, run):
    """Colour, marker and line of an arm; arms outside the paper share what is left, in a fixed order."""
    if arm in STYLES:
        return dict(zip(("color", "marker", "linestyle"), STYLES[arm]))
    others = [a for a in run.arms if a not in STYLES]
    place = others.index(arm)
    return {"color": plt.cm.cividis(0.1 + 0.8 * place / max(len(others) - 1, 1)), "marker": "<>hp*d"[place % 6],
            "linestyle": (0, (1 + place % 4, 1 + place // 4))}


def drawn_arms(run):
    """Nobody tells more than nine lines apart: then only the paper's arms and the controls (the tables have all)."""
    return run.arms if len(run.arms) <= 9 else [arm for arm in run.arms if arm in STYLES]


def panels(n, n_cols, width=9.0, height=2.9):
    """[n] axes in a grid, the unused ones removed, and their figure."""
    n_cols = min(n, n_cols)
    n_rows = math.ceil(n / n_cols)
    figure, axes = plt.subplots(n_rows, n_cols, figsize=(width, height * n_rows + 0.5), squeeze=False,
                                layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.06)
    for ax in axes.flat[n:]:
        ax.remove()
    for ax in axes.flat[:n]:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.25, linewidth=0.6)
        ax.set_axisbelow(True)
    return figure, list(axes.flat[:n])


def save(figure, out, name, legend_from=()):
    """PNG and SVG; the legend of all panels stands once, below them."""
    handles = {}
    for ax in legend_from:
        handles |= dict(zip(*reversed(ax.get_legend_handles_labels())))
    if handles:
        n_cols = min(len(handles), 7 if max(map(len, handles)) < 15 else 3)
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=n_cols, frameon=False,
                      handlelength=3.2)
    figure.savefig(out / f"{name}.png", dpi=150)
    figure.savefig(out / f"{name}.svg", metadata={"Date": None})
    plt.close(figure)
    return name


def figure_claims(worlds, label, out):
    """Effects with their intervals: Pass@1 and Pass@k before and after RLVR on the left, entropy on the right.

    worlds: [(title, run, {(arm, reference): claims})], a row of panels each.
    """
    figure, axes = panels(2 * len(worlds), 2, height=3.2)
    for (title, run, claims), (left, right) in zip(worlds, zip(axes[::2], axes[1::2])):
        for ax, of_entropy in ((left, False), (right, True)):
            names = list(dict.fromkeys(n for found in claims.values() for n, _ in effects(found)))
            names = [n for n in sorted(names) if (n == "C3") == of_entropy]
            for i, (pair, found) in enumerate(claims.items()):
                arm, reference = pair
                color = style(arm if reference == REFERENCE else reference, run)["color"]
                offset = (i - (len(claims) - 1) / 2) * 0.8 / max(len(claims), 1)
                for name, e in effects(found):
                    if name in names:
                        inside, row = color if reference == REFERENCE else "white", names.index(name)
                        ax.errorbar(e["value"], row + offset, xerr=[[e["value"] - e["low"]], [e["high"] - e["value"]]],
                                    color=color, marker=style(arm, run)["marker"], markerfacecolor=inside, markersize=5,
                                    linewidth=1.5, capsize=2.5, linestyle="none", label=f"{arm} − {reference}")
            ax.axvline(0, color="black", linewidth=0.9)
            ax.set_yticks(range(len(names)), [named(n, label) + {
                "C1": " Pass@1", "C2": f" {label}", "C3": " entropy"}.get(n, "\nafter RLVR") for n in names])
            ax.set_ylim(len(names) - 0.4, -0.6)
            ax.grid(axis="y", visible=False)
        left.set_title(f"{title}: Pass@k", fontsize=10)
        left.set_xlabel("difference of Pass@k (share of problems), 95 % interval")
        right.set_title(f"{title}: entropy", fontsize=10)
        right.set_xlabel("difference of policy entropy (nats), 95 % interval")
    for column in (axes[::2], axes[1::2]):                                  # the same scale in every world
        limits = np.array([ax.get_xlim() for ax in column])
        for ax in column:
            ax.set_xlim(limits[:, 0].min(), limits[:, 1].max())
    return save(figure, out, "claims", axes)


def figure_perplexity(run, out):
    """All verified teacher responses, the Gaussian target, and what each arm took of them (first seed that has it)."""
    found = {}
    for s in run.seeds:
        for arm in drawn_arms(run):
            path = run.path / f"seed-{s}" / arm / "train.jsonl"
            if arm not in found and path.exists():
                rows = [(row["ppl"], row["objective"]) for row in common.read_jsonl(path, {"objective": str}) if row["ppl"]]
                found[arm] = (s, common.read_meta(path) or {}, rows)
    gaussian = next((meta for arm in MAIN_ARMS[::-1] if (meta := found.get(arm, (0, {}, 0))[1]).get("bins")), None)
    if not gaussian:
        return None
    edges = np.array([b["low"] for b in gaussian["bins"]] + [gaussian["bins"][-1]["high"]])
    middle, width = (edges[1:] + edges[:-1]) / 2, np.diff(edges)
    available, target = (np.array([b[name] for b in gaussian["bins"]]) for name in ("available", "target"))
    layers = [("all verified", "#b8b8b8", available)]
    for arm, (_, _, rows) in found.items():
        for objective in ("ce", "ul"):
            counts = np.histogram([ppl for ppl, o in rows if o == objective], bins=edges)[0]
            twin = arm == "oxa_full" and objective == "ce" and "oxa_mle" in found       # the same set as oxa_mle's
            if counts.any() and not twin:
                layers.append((arm if objective == "ce" else f"{arm},\nunlikelihood", style(arm, run)["color"], counts))
    figure, axes = panels(len(layers), 1, width=8.0, height=0.8)
    last = edges[min(len(edges) - 1, np.flatnonzero(available + target).max() + 3)]
    for ax, (label, color, counts) in zip(axes, layers):
        ax.bar(middle, counts, width=width, color=color)
        if label in ("all verified", *MAIN_ARMS):
            ax.plot(middle, target, color="black", linewidth=1.3, linestyle=(0, (3, 1.5)), label="target: Gaussian, "
                    f"μ = {gaussian['mu']:.2f}, σ = {gaussian['args']['sigma']}, n = {target.sum():,}")
        ax.set_xlim(edges[0], last)
        ax.set_ylabel(label, rotation=0, ha="right", va="center", labelpad=10)
        ax.text(0.995, 0.9, f"{counts.sum():,}", transform=ax.transAxes, ha="right", va="top", fontsize=8)
        ax.tick_params(labelbottom=ax is axes[-1])
    axes[0].set_title(f"responses per {width[0]:.2g} of perplexity (right: how many lie in the range)", fontsize=10)
    axes[-1].set_xlabel("perplexity of the response under the base model")
    return save(figure, out, "perplexity", axes[:1])


def figure_pass_at_k(run, out):
    """Pass@k of every arm with its interval, a panel for each benchmark, before and after RLVR."""
    shown = [(when, b) for when in WHEN for b in run.benchmarks
             if any(w == when and b in tables for (_, _, w), (_, tables) in run.evals.items())]
    figure, axes = panels(len(shown), max(2, min(4, len(run.benchmarks))))
    for ax, (when, b) in zip(axes, shown):
        for arm in drawn_arms(run):
            curve = estimate(run, "curve", arm, None, when, [b])
            if curve:
                k, look = np.arange(1, len(curve["value"]) + 1), style(arm, run)
                powers = [2**i for i in range(len(k).bit_length())]
                ax.fill_between(k, curve["low"], curve["high"], color=look["color"], alpha=0.12, linewidth=0)
                ax.plot(k, curve["value"], label=arm, markersize=4.5, markevery=[p - 1 for p in powers], **look)
                n_problems = curve["n_problems"]
        ax.set_xscale("log", base=2)
        ax.set_xticks(powers, map(str, powers))
        ax.set_xlim(0.9, len(k) * 1.1)
        ax.set_ylim(-0.02, 1.02)
        ax.set_title(f"{b} ({n_problems} problems), {WHEN[when]}", fontsize=10)
        ax.set_xlabel("k (samples a problem)")
        ax.set_ylabel("Pass@k")
    return save(figure, out, "pass_at_k", axes)


def figure_curves(run, stage, measures, title, out):
    """Metrics over the steps of a stage, a panel each: mean over seeds, running mean over a twenty-fifth of the steps.

    measures: {name in metrics.jsonl: axis label}.
    """
    curves = {name: {} for name in measures}
    for arm in drawn_arms(run):
        runs = [read_metrics(run.path / f"seed-{s}" / arm / stage / "metrics.jsonl") for s in run.seeds]
        runs = [rows for rows in runs if rows]
        for name in measures:
            series = [[row.get(name) for row in rows] for rows in runs]
            empty = (None, 0) if name in ("ul_loss", "entropy_ul") else (None,)      # arms without unlikelihood
            series = [np.array(x, dtype=float) for x in series if any(v not in empty for v in x)]
            if series:
                length = min(map(len, series))
                steps = np.array([row["step"] for row in runs[0]][:length])
                curves[name][arm] = steps, np.array([x[:length] for x in series])
    curves = {name: arms for name, arms in curves.items() if arms}
    if not curves:
        return None
    mean_of = lambda x, w: np.convolve(x, np.ones(w), "same") / np.convolve(np.ones(len(x)), np.ones(w), "same")
    figure, axes = panels(len(curves), 2)
    for ax, (name, arms) in zip(axes, curves.items()):
        for place, (arm, (steps, x)) in enumerate(arms.items()):
            window, every, look = len(steps) // 50 * 2 + 1, max(1, len(steps) // 6), style(arm, run)
            ax.plot(steps, mean_of(x.mean(axis=0), window), label=arm, linewidth=1.5, markersize=4.5,
                    markevery=(place * every // len(arms), every), **look)
            if len(x) > 1:
                ax.fill_between(steps, mean_of(x.min(axis=0), window), mean_of(x.max(axis=0), window),
                                color=look["color"], alpha=0.12, linewidth=0)
        ax.set_xlabel("optimizer step")
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.set_ylabel(measures[name])
        ax.set_ylim(0, 1.08 * max(x.max() for _, x in arms.values()) or 1)
    figure.suptitle(title, fontsize=10)
    return save(figure, out, stage, axes)


def figure_lengths(run, out):
    """Cumulative distribution of response lengths at evaluation, and the share of responses that was cut."""
    figure, axes = panels(len(run.benchmarks) + 1, min(4, len(run.benchmarks) + 1))
    for ax, b in zip(axes, run.benchmarks):
        for arm in drawn_arms(run):
            found = [results["benchmarks"][b]["length_histogram"] for (_, a, when), (results, _) in run.evals.items()
                     if (a, when) == (arm, "before") and b in results["benchmarks"]]
            if found:
                grid = np.unique(np.concatenate([f["edges"] for f in found]))
                shares = [np.concatenate([[0], np.cumsum(f["counts"])]) / sum(f["counts"]) for f in found]
                share = np.mean([np.interp(grid, f["edges"], y) for f, y in zip(found, shares)], axis=0)
                inside = np.flatnonzero((share > 0.002) & (share < 0.998))
                marks = inside[::max(1, len(inside) // 4)].tolist()
                ax.plot(grid, share, label=arm, linewidth=1.5, markersize=4.5, markevery=marks, **style(arm, run))
        ax.set_xscale("log", base=2)
        ax.xaxis.set_major_formatter("{x:.0f}")
        shortest = min(line.get_xdata()[np.argmax(line.get_ydata() > 0)] for line in ax.lines) if ax.lines else 1
        ax.set_xlim(left=max(1, shortest / 1.5))
        ax.set_title(f"{b}, before RLVR", fontsize=10)
        ax.set_xlabel("response length (tokens)")
        ax.set_ylabel("share of responses at most this long")
    ax, evaluated = axes[-1], {(arm, when) for _, arm, when in run.evals}
    done = [(arm, when) for arm in drawn_arms(run) for when in WHEN if (arm, when) in evaluated]
    for place, (arm, when) in enumerate(done):
        cut = rates(run, arm, when, run.benchmarks)["truncation_rate"] * 100
        ax.barh(place, cut, color=style(arm, run)["color"], height=0.7, edgecolor="white",
                hatch="" if when == "before" else "///")
        ax.text(cut, place, f" {cut:.1f}", va="center", fontsize=7)
    ax.set_yticks(range(len(done)), [arm + ("" if when == "before" else ", RLVR") for arm, when in done], fontsize=8)
    ax.invert_yaxis()
    ax.set_xlim(right=max(ax.get_xlim()[1] * 1.15, 1))
    ax.set_title("cut at the limit, all benchmarks", fontsize=10)
    ax.set_xlabel("responses cut (%)")
    return save(figure, out, "lengths", axes[:-1])


# ------------------------------------------------------------------------------------------------------------ report


def first_paragraph(run, claims):
    """What was reproduced, in words, from the main comparison."""
    (arm, reference), found = next(iter(claims.items()), ((None, None), {}))
    if not found:
        return "No claim can be judged: `sft` and an `oxa` arm are needed, evaluated on the same problems."
    names = [n for n in ("C1", "C2", "C3", "C4") if n in found]
    count = Counter(found[n]["verdict"] for n in names)
    shown = lambda claim: " and ".join(number(e, sign=True) for e in claim.get("parts", {"": claim}).values())
    sizes = {(e["seeds"], e["n_problems"]): name for name, e in reversed(effects(found))}
    size = ", ".join(f"{seeds} seed{'s' * (seeds > 1)} and {n} problems" + (f" ({name[:2]})" if len(sizes) > 1 else "")
                     for (seeds, n), name in reversed(sizes.items()))
    text = (f"**{count['reproduced']} of {len(names)} claims reproduced** for `{arm}` over `{reference}`: "
            + "; ".join(f"{n} {found[n]['verdict']} ({shown(found[n])})" for n in names)
            + f". {size}; sets: {', '.join(run.benchmarks)}.")
    if len(names) < 4:
        text += " Not measured in this run: " + ", ".join(n for n in ("C1", "C2", "C3", "C4") if n not in found) + "."
    if any(seeds == 1 for seeds, _ in sizes):
        text += (" **One seed: intervals are over problems only**, and say nothing of how another training run would "
                 "have ended.")
    for (a, control), judged in claims.items():
        if control in CONTROLS and a == arm:
            text += f" Against the control `{control}`: " + ", ".join(
                f"{n} {judged[n]['verdict']} ({judged[n]['value']:+.3f})" for n in ("C1", "C2") if n in judged) + "."
    return text


def contrast(worlds, k, label):
    """The first comparison that both worlds have, side by side, and the arms of each."""
    pair = next((pair for pair in worlds[0][2] if all(pair in claims for _, _, claims in worlds)), None)
    if pair is None:
        return
    yield "## Two worlds"
    yield f"`{pair[0]}` over `{pair[1]}` in each."
    found = [dict(effects(claims[pair])) for _, _, claims in worlds]
    rows = []
    for name in dict.fromkeys(name for world in found for name in world):
        cells = [(number(world[name], sign=True), world[name]["verdict"]) if name in world else ("–", "–")
                 for world in found]
        text = next(world[name]["claim"] for world in found if name in world)
        rows.append([named(name, label), named(text, label), *(x for pair in cells for x in pair)])
    yield table(["claim", "", *(x for title, _, _ in worlds for x in (title, "verdict"))], rows)
    for title, other, _ in worlds[1:]:
        yield f"The arms of `{title}` (those of `{worlds[0][0]}` are below):"
        yield arms_table(other, arm_summary(other, k), k)


def explanation(run, out):
    """The sections of RUN_DIR/explain.json; their figures are copied beside the report's own."""
    path, parts = run.path / "explain.json", []
    for section in json.loads(path.read_text()) if path.exists() else []:
        parts += [f"### {section['title']}", section.get("text", "")]
        if section.get("rows"):
            show = lambda x: f"{x:.3f}" if isinstance(x, float) else str(x)
            parts.append(table(section["columns"], [[show(x) for x in row] for row in section["rows"]]))
        for figure in section.get("figures", []):
            source = run.path / figure["file"]
            if not source.exists():
                common.die(f"{path} names the figure {figure['file']}, which is not there")
            if source.parent.resolve() != (out / "figures").resolve():
                shutil.copy(source, out / "figures" / source.name)
            parts.append(f"![{figure['caption']}](figures/{source.name})\n\n*{figure['caption']}*")
    return [part for part in parts if part]


CONTROLS_TEXT = ("Not in the paper. `length_matched`: random responses with the lengths of those of `oxa_mle`; "
                 "`longest`: the longest responses of all. A lead over them is owed to perplexity, not to length.")


def verdict_rule():
    return (f"*not reproduced*: the whole interval lies below {SMALLEST_EFFECT} (one point; for entropy "
            f"{SMALLEST_EFFECT} nats); *reproduced*: otherwise, if the whole interval lies above 0; *undecided*: "
            "otherwise. C4 holds if both of its parts do. Differences are paired by problem and seed; benchmarks weigh "
            "alike; intervals: bootstrap over problems and seeds.")


def draw(run, worlds, label, out):
    """All figures; what there is no data for is not drawn. -> names of the figures."""
    sft = {"ce_loss": "cross entropy (nats per token)", "ul_loss": "unlikelihood (nats per token)",
           "entropy_ce": "entropy, CE tokens (nats)", "entropy_ul": "entropy, UL tokens (nats)"}
    rlvr = {"reward": "mean reward", "entropy": "policy entropy (nats)",
            "response_tokens_mean": "response length (tokens)", "truncated": "share cut at the limit"}
    return [figure_claims(worlds, label, out) if worlds[0][2] else None, figure_perplexity(run, out),
            figure_pass_at_k(run, out), figure_curves(run, "sft", sft, "supervised fine-tuning", out),
            figure_curves(run, "rlvr", rlvr, "reinforcement learning (GRPO)", out), figure_lengths(run, out)]


def compose(run, worlds, summary, drawn, facts, hashes, k, price, out):
    """The text of REPORT.md, section by section; an empty part is left out."""
    claims, labels, one = worlds[0][2], labels_of(run, k), len(run.benchmarks) == 1
    image = lambda name, caption: f"![{caption}](figures/{name}.png)\n\n*{caption}*" if name in drawn else ""
    over_seeds = "means over seeds; the band spans the seeds" if len(run.seeds) > 1 else "one seed"
    against_sft, against_controls = ({pair: found for pair, found in claims.items() if (pair[1] == REFERENCE) == plain}
                                     for plain in (True, False))
    yield f"# {worlds[0][0]}: what was reproduced"
    yield first_paragraph(run, claims)
    yield image("claims", f"Effects with 95 % intervals. Filled: against `{REFERENCE}`; hollow: against a control.")
    if against_sft:
        yield from ("## Claims", claims_table(against_sft, labels), verdict_rule())
    if against_controls:
        yield from ("### Against the controls", CONTROLS_TEXT, claims_table(against_controls, labels))
    if claims and not one:
        yield from ("### On each benchmark", benchmarks_table(claims, labels[0]))
    if len(worlds) > 1:
        yield from contrast(worlds, k, labels[0])
    yield "## Arms"
    yield f"Means over seeds{'' if one else ' and benchmarks'}, with 95 % intervals over problems and seeds."
    yield arms_table(run, summary, k)
    for b in [] if one else run.benchmarks:
        yield from (f"### {b} ({n_problems(run, b)} problems)", arms_table(run, summary, k, b))
    yield image("pass_at_k", "Unbiased Pass@k for every k, with 95 % bands over problems and seeds.")
    if (run.path / "explain.json").exists():
        yield from ("## Why", *explanation(run, out))
    if sets := selection_table(run):
        yield from ("## Training sets", sets, image("perplexity", f"What each arm trains on (seed {run.seeds[0]})."))
    if {"sft", "rlvr"} & set(drawn):
        yield "## Training"
    yield image("sft", f"Losses and entropies while fine-tuning, {over_seeds}.")
    yield image("rlvr", f"GRPO: reward, entropy, length and truncation, {over_seeds}.")
    yield "## Lengths, and what went wrong"
    yield image("lengths", "Response lengths at evaluation, and what was cut at the limit.")
    yield rates_table(summary)
    if time := time_table(run, price):
        yield from ("## Time", time, "Seconds: wall time of commands that may have run side by side. A process is a "
                    "card on GPUs. Tokens: trained on (sft), generated (rlvr, eval).")
    yield "## Where this comes from"
    yield table(["", ""], facts.items())
    first = [name for name in hashes if not any(f"seed-{s}/" in name for s in run.seeds[1:])]
    yield f"Inputs of seed {run.seeds[0]}; summary.json has those of every seed."
    yield table(["input", "sha256"], [[f"`{name}`", f"`{hashes[name][:12]}`"] for name in first])


def main(argv=None):
    args = parse(argv)
    run = load_run(args.run)
    out = Path(args.out or run.path / "report")
    common.make_dir(out / "figures")
    matplotlib.rcParams.update({"font.size": 9, "svg.hashsalt": "report", "svg.fonttype": "none"})
    pairs = [(arm, ref) for ref in (REFERENCE, *CONTROLS) for arm in MAIN_ARMS]
    worlds = []
    for world in [run] + ([load_run(args.contrast)] if args.contrast else []):
        claims = {pair: found for pair in pairs if (found := judge_claims(world, *pair, args.k))}
        worlds.append((world.path.resolve().name, world, claims))
    title, _, claims = worlds[0]
    labels, summary = labels_of(run, args.k), arm_summary(run, args.k)
    facts, hashes = provenance(run)

    drawn = draw(run, worlds, labels[0], out / "figures")
    parts = list(compose(run, worlds, summary, drawn, facts, hashes, args.k, args.card_hour_price, out))
    with common.replace_file(out / "REPORT.md") as file:
        file.write("\n\n".join(part for part in parts if part) + "\n")
    judged = [{"world": name, "arm": arm, "reference": ref, "claims": found}
              for name, _, of_world in worlds for (arm, ref), found in of_world.items()]
    with common.replace_file(out / "summary.json") as file:
        json.dump({"schema": "summary", "schema_version": common.SCHEMA_VERSION, "run": title, "seeds": run.seeds,
                   "benchmarks": {b: n_problems(run, b) for b in run.benchmarks}, "k": args.k or "n",
                   "pass_at_k_label": labels[0], "pass_at_n_label": labels[1], "smallest_effect": SMALLEST_EFFECT,
                   "claims": judged, "arms": summary, "provenance": facts, "inputs": hashes}, file, indent=1)
    main_claims = {pair: found for pair, found in claims.items() if pair[1] == REFERENCE}
    print(arms_table(run, summary, args.k), claims_table(main_claims, labels) if main_claims else "",
          first_paragraph(run, claims), f"report: {out / 'REPORT.md'}", sep="\n\n")


if __name__ == "__main__":
    main()
