"""The report of a run: REPORT.md, summary.json and figures, from results, metrics and sidecars.

    python -m tools.report runs/toy                              everything into runs/toy/report/
    python -m tools.report runs/toy --contrast runs/toy_easy     a second world's claims beside it

A claim compares two arms problem by problem, seed by seed, and averages over benchmarks with equal
weight, those of --beside left out (MATH-500: the paper's six remain). Its 95 % interval comes from
a bootstrap over problems and seeds (`common.bootstrap`); the rule of the verdict, fixed before any
arm was run, is `RULE` below. Pass@k is taken at --k, or at k = n: the samples of a problem, or the
fewest where evaluations drew unlike numbers. Beside C3 stands the entropy that the RL trainer logs
at its first step (04's `entropy`), the one that the published code logs.

What is missing (an arm, RLVR, a stage's log) is left out. RUN_DIR/explain.jsonl, if there, is shown
as well, a section a row: title, text, columns, rows, figures ({PNG inside RUN_DIR: caption}). Names
and texts that come from files are shown as text: no Markdown, no HTML.
"""

import common

import json
import math
import re
import shutil
import urllib.parse
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SMALLEST_EFFECT = 0.01
MAIN_ARMS, REFERENCE, CONTROLS = ("oxa_full", "oxa_mle"), "sft", ("length_matched", "longest")
WHEN = {"before": "eval", "after": "eval_rlvr"}       # RLVR, and the directory of the evaluation
# claim: what is claimed, its measure, evaluated before or after RLVR
CLAIMS = {
    "C1": ("Pass@1 up", 1, "before"),
    "C2": ("Pass@k up", "k", "before"),
    "C3": ("initial policy entropy up (nats)", "entropy", "before"),
    "C4 Pass@1": ("Pass@1 still up after RLVR", 1, "after"),
    "C4 Pass@k": ("Pass@k still up after RLVR", "k", "after"),
}
VERDICTS = ("not reproduced", "undecided", "reproduced")
# name in summary.json: measure
ARM_MEASURES = {
    "pass_at_1": 1, "pass_at_k": "k", "pass_at_n": "n", "entropy": "entropy",
    "mean_tokens": "mean_tokens", "truncation_rate": "truncation_rate",
}
# colour (Okabe-Ito, told apart by colour-blind readers) and marker of each arm
STYLES = {
    "base": ("#6e6e6e", "X"), "sft": ("#0072B2", "o"), "sft_lp": ("#56B4E9", "v"),
    "oxa_mle": ("#E69F00", "s"), "oxa_full": ("#D55E00", "D"),
    "length_matched": ("#009E73", "^"), "longest": ("#CC79A7", "P"),
}
OTHER_STYLE = ("black", ".")
# stage: {name in its metrics.jsonl: title of its panel}
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
weigh alike; intervals: bootstrap over problems and seeds."""
OF_CONTROLS = """\
`length_matched` (random responses with the lengths of those of `oxa_mle`) and `longest` are
controls, not in the paper: a lead over them is owed to perplexity, not to length."""
ALIKE = ("grader", "instruction", "temperature", "top_p", "max_tokens")     # of all evaluations


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
    k: int              # of Pass@k; 0: all samples
    seeds: list
    arms: list
    n_problems: dict    # of each benchmark, in one seed
    n_samples: dict     # of each benchmark: the fewest of a problem
    counted: list       # benchmarks in claims and averages
    left_out: set       # benchmarks that not every evaluation has
    tables: dict        # tables[seed, arm, when][benchmark] = what read_table returns
    graders: set

    def labels(self) -> list:
        """What Pass@k and Pass@n are called: ["Pass@8", "Pass@32"]."""
        drawn = {self.n_samples[b] for b in self.counted}
        label_n = f"Pass@{drawn.pop()}" if len(drawn) == 1 else "Pass@n"
        return [f"Pass@{self.k}" if self.k else label_n, label_n]


def load_run(path, k, beside) -> Run:
    """Every evaluation of a run. A benchmark is shown only if all of them have it."""
    path = Path(path).resolve()
    tables, graders, settings = {}, set(), {}
    for folder in sorted(path.glob("seed-*/*")):
        seed = folder.parent.name.removeprefix("seed-")
        for when, name in WHEN.items():
            file = folder / name / "results.json"
            if seed.isdecimal() and file.exists():
                results = common.parse_row(file.read_bytes(), str(file))
                common.check_fields(results, {"grader": str, "benchmarks": dict}, str(file))
                graders.add(results["grader"])
                refuse_unlike(file, results, settings)
                found = {b: read_table(file, b) for b in results["benchmarks"]}
                tables[int(seed), folder.name, when] = found
    if not tables:
        common.die(f"{path} holds no evaluation (seed-*/ARM/eval/results.json): "
                   "run the pipeline first")

    everywhere = set.intersection(*map(set, tables.values()))
    left_out = set().union(*tables.values()) - everywhere
    n_problems, n_samples = {}, {}
    for b, first in next(iter(tables.values())).items():
        if b in everywhere:
            n_problems[b] = len(first["pid"])
            n_samples[b] = min(int(found[b]["n"].min()) for found in tables.values())
    counted = [b for b in n_samples if b not in beside]
    if not counted:
        common.die(f"{path}: no benchmark that all evaluations have is left for the average; "
                   "name fewer with --beside (without a name: none)")
    for b in counted:
        if k > n_samples[b]:
            common.die(f"{path}: {n_samples[b]} samples a problem on {b}, too few for --k {k}; "
                       f"draw more, or name a k of at most {n_samples[b]}")
    seeds, arms, _ = map(dict.fromkeys, zip(*tables))                # each once, in order
    arms = [arm for arm in STYLES if arm in arms] + [arm for arm in arms if arm not in STYLES]
    return Run(path, k, sorted(seeds), arms, n_problems, n_samples, counted, left_out, tables,
               graders)


def refuse_unlike(file, results, settings):
    """Evaluations are compared, so all are made alike. `settings`: {name: (value, first file)}."""
    for name in ALIKE:
        value, first = settings.setdefault(name, (results.get(name), file))
        if value != results.get(name):
            cure = "05_eval.py --regrade" if name == "grader" else "evaluate one of them again"
            common.die(f"{first} and {file} differ in {name}, so they cannot be compared: {cure}")


def read_table(results, benchmark) -> dict:
    """The problem table beside a results.json, by its columns: pid, a list in order, and [P] each
    n, n_correct, truncation_rate, mean_tokens, entropy (nan: not measured)."""
    if Path(benchmark).name != benchmark:
        common.die(f"{results}: {benchmark!r} is no benchmark's name")
    path = results.with_name(f"{benchmark}.problems.jsonl")
    numbers = {"n": int, "n_correct": int, "n_truncated": int, "mean_tokens": (float, int),
               "entropy": (float, int, type(None))}
    rows = []
    for row in common.read_jsonl(path, {"pid": str, **numbers}, key="pid"):
        rows.append(row)
        if not 0 <= row["n_correct"] <= row["n"] or row["n"] == 0:
            common.die(f"{path}:{len(rows)}: {row['n_correct']} of {row['n']} samples are right, "
                       "which cannot be; evaluate again with --regrade")
    rows.sort(key=lambda row: row["pid"])
    table = {"pid": [row["pid"] for row in rows]}
    for name in numbers:
        table[name] = np.array([row[name] for row in rows], dtype=float)
    table["truncation_rate"] = table["n_truncated"] / table["n"]
    return table


def read_metric(run, seed, arm, stage, name) -> list:
    """A metric of a training run step by step; nothing if it left no log."""
    path = run.path / f"seed-{seed}" / arm / stage / "metrics.jsonl"
    if not path.exists() or path.stat().st_size == 0:
        return []
    return [row.get(name) for row in common.read_jsonl(path, {"step": int})]


# ------------------------------------------------------------------------------ effects, verdicts


def measured(table, measure) -> np.ndarray:
    """[P]: Pass@k if `measure` is a number, else that column."""
    if isinstance(measure, str):
        return table[measure]
    if measure > table["n"].min():          # on a benchmark that stands beside
        return np.full(len(table["n"]), np.nan)
    counts = zip(table["n"].tolist(), table["n_correct"].tolist())
    return np.array([common.pass_at_k(n, n_correct, measure) for n, n_correct in counts])


def difference(run, seed, arms, when, benchmark, measure) -> np.ndarray:
    """[P] of the first of `arms`, minus the second if there are two."""
    first, *second = [run.tables[seed, arm, when][benchmark] for arm in arms]
    values = measured(first, measure)
    for table in second:
        if table["pid"] != first["pid"]:
            common.die(f"{run.path}, seed {seed}, {benchmark}: {' and '.join(arms)} were evaluated "
                       "on different problems")
        values = values - measured(table, measure)
    return values


def estimate(run, measure, arms, when="before", benchmarks=None):
    """Mean over seeds, problems and benchmarks (these weigh alike, A51) of a measure of an arm, or
    of its paired difference to a second one. `measure` as in CLAIMS and ARM_MEASURES.

    -> {value, low, high, seeds, benchmarks, n_problems}, or None if there is nothing to compare.
    """
    seeds = run.seeds
    for arm in arms:
        seeds = [seed for seed in seeds if (seed, arm, when) in run.tables]
    if not seeds:
        return None
    benchmarks = benchmarks or run.counted
    groups, same_problems = [], True
    for b in benchmarks:
        n = run.n_samples[b]
        here = {"k": run.k or n, "n": n}.get(measure, measure)
        of_seeds = [difference(run, seed, arms, when, b, here) for seed in seeds]
        if np.isnan(np.concatenate(of_seeds)).any():
            return None                                   # not measured, or not defined
        groups.append([values[:, None] for values in of_seeds])
        pids = [run.tables[seed, arms[0], when][b]["pid"] for seed in seeds]
        same_problems &= all(each == pids[0] for each in pids)
    value, low, high = np.ravel(common.bootstrap(groups, same_problems)).tolist()
    if measure not in ("entropy", "mean_tokens"):         # a share, or a difference of two
        low = max(low, 0.0 if len(arms) == 1 else -1.0)
        high = min(high, 1.0)
    return {"value": value, "low": low, "high": high, "seeds": len(seeds),
            "benchmarks": benchmarks, "n_problems": sum(run.n_problems[b] for b in benchmarks)}


def verdict(effect) -> str:
    if effect["high"] < SMALLEST_EFFECT:
        return "not reproduced"
    return "reproduced" if effect["low"] > 0 else "undecided"


def judge_claims(run) -> dict:
    """{(arm, reference): {claim: effect}}, an effect being an estimate with what is claimed, its
    verdict, and what stands beside it (`at_n`: the same at k = n; `at_rl_step_1`)."""
    judged = {}
    for reference in (REFERENCE, *CONTROLS):
        for arm in MAIN_ARMS:
            found = {}
            for name, (text, measure, when) in CLAIMS.items():
                effect = estimate(run, measure, [arm, reference], when)
                if effect is None:
                    continue
                found[name] = {**effect, "claim": text, "verdict": verdict(effect)}
                if measure == "k":
                    found[name]["at_n"] = estimate(run, "n", [arm, reference], when)
                if measure == "entropy":
                    found[name]["at_rl_step_1"] = entropy_at_rl_start(run, arm, reference)
            if found:
                judged[arm, reference] = found
    return judged


def entropy_at_rl_start(run, arm, reference):
    """{value, seeds}: the difference of the entropies that 04 logs at its first step (nats, mean
    over tokens, RL prompts and temperature; A52), or None if there was no RLVR."""
    differences = []
    for seed in run.seeds:
        ours, theirs = (read_metric(run, seed, x, "rlvr", "entropy") for x in (arm, reference))
        if ours and theirs:
            differences.append(ours[0] - theirs[0])
    if not differences:
        return None
    return {"value": float(np.mean(differences)), "seeds": len(differences)}


def join_parts(found) -> dict:
    """{claim: effect}, C4 as {verdict, parts}: the worse of the verdicts of its two parts."""
    claims = {name: effect for name, effect in found.items() if " " not in name}
    parts = {name.split()[1]: effect for name, effect in found.items() if " " in name}
    if parts:
        verdicts = [effect["verdict"] for effect in parts.values()]
        claims["C4"] = {"verdict": min(verdicts, key=VERDICTS.index), "parts": parts}
    return claims


def arm_summary(run) -> dict:
    """{arm: {when: {benchmark or "average": {name: estimate}}}}"""
    places = {b: [b] for b in run.n_samples}
    if len(run.counted) > 1:
        places["average"] = run.counted
    summary = {}
    for arm in run.arms:
        for when in WHEN:
            for place, benchmarks in places.items():
                found = {name: estimate(run, measure, [arm], when, benchmarks)
                         for name, measure in ARM_MEASURES.items()}
                if found["pass_at_1"]:
                    summary.setdefault(arm, {}).setdefault(when, {})[place] = found
    return summary


def provenance(run) -> dict:
    """{what: text}, from the sidecars of the run."""
    facts = {"seeds": set(map(str, run.seeds)), "code": set(), "packages": set(),
             "perplexity under": set(), "grader": run.graders}
    for path in sorted(run.path.rglob("*.meta.json")):
        meta = common.read_meta(path.with_name(path.name.removesuffix(".meta.json")))
        facts["code"].add(meta.get("commit", "unknown"))
        for name, version in meta.get("versions", {}).items():
            facts["packages"].add(f"{name} {version}")
        if "scorer" in meta:
            facts["perplexity under"].add(Path(meta["scorer"]).name)
    return {name: ", ".join(sorted(found)) for name, found in facts.items()}


# ----------------------------------------------------------------------------------------- tables


def number(x, sign="") -> str:
    """0.476 [0.451, 0.502]; with sign "+": +0.476 [+0.451, +0.502]"""
    if x is None:
        return "–"
    return f"{x['value']:{sign}.3f} [{x['low']:{sign}.3f}, {x['high']:{sign}.3f}]"


def safe(text) -> str:
    """`text` from a file, on one line, shown as it stands: nothing in it is Markdown or HTML but
    words as code, between backticks."""
    def shown(match):
        return match[0] if len(match[0]) > 1 else "\\" + match[0]

    text = common.printable(str(text)).replace("\n", " ")
    edge = r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])"             # inside oxa_full it is only a letter
    return re.sub(rf"`[\w ,+−-]+`|[\\`*\[\]<>~&|]|{edge}", shown, text)


def paragraph(text) -> str:
    """`safe`, and no heading, list, rule or block of code by how it begins."""
    return re.sub(r"^(\d*)(?=[-+#=.)])", r"\1\\", safe(text).strip())


def table(head, rows) -> str:
    """A Markdown table."""
    lines = []
    for row in (head, ["---"] * len(head), *rows):
        lines.append("| " + " | ".join(map(str, row)) + " |")
    return "\n".join(lines)


def claims_table(worlds) -> str:
    """The claims of the last of the worlds, [(run, its judged claims)]; side by side with those of
    the one before it, if there are two."""
    label_k = worlds[0][0].labels()[0]
    head = ["claim", "", "difference"]
    for run, _ in worlds:
        head += [f"{safe(run.path.name)}: effect [95 %]", "beside", "seeds", "verdict"]
    rows = []
    for pair, found in worlds[-1][1].items():
        for name, effect in found.items():
            row = [text.replace("Pass@k", label_k) for text in (name, effect["claim"])]
            row.append(" − ".join(pair))
            for run, claims in worlds:
                e = claims.get(pair, {}).get(name)
                if e is None:
                    row += ["–"] * 4
                else:
                    row += [number(e, "+"), beside(e, run.labels()), e["seeds"], e["verdict"]]
            rows.append(row)
    return table(head, rows)


def beside(effect, labels) -> str:
    """What is shown beside a claim."""
    if effect.get("at_n") and labels[0] != labels[1]:
        return f"{labels[1]}: {number(effect['at_n'], '+')}"
    if effect.get("at_rl_step_1"):
        return f"at step 1 of RLVR: {effect['at_rl_step_1']['value']:+.3f}"
    return ""


def arms_table(run, summary, place) -> str:
    """Arms by measures on a benchmark, or on "average", before and after RLVR."""
    names_of_k = dict(zip(("pass_at_k", "pass_at_n"), run.labels()))
    if len(set(names_of_k.values())) == 1:                         # k is n
        del names_of_k["pass_at_n"]
    rows = []
    for arm, found in summary.items():
        for when, places in found.items():
            m = places[place]
            row = [safe(arm), when]
            row += [number(m[name]) for name in ("pass_at_1", *names_of_k, "entropy")]
            row.append(f"{m['mean_tokens']['value']:.0f}")
            row.append(f"{m['truncation_rate']['value']:.1%}")
            rows.append(row)
    head = ["arm", "RLVR", "Pass@1", *names_of_k.values(), "entropy, nats", "tokens", "cut"]
    return table(head, rows)


# ---------------------------------------------------------------------------------------- figures
# Each saves a PNG and returns the Markdown that shows it, or "" without data.


def panels(n, height=2.9):
    """A figure, and [n] axes in a grid."""
    n_rows = math.ceil(n / 4)
    figure, axes = plt.subplots(n_rows, min(n, 4), figsize=(9.0, height * n_rows + 0.5),
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


def draw_lines(shown, x_label, path, caption) -> str:
    """shown: {title of a panel: {arm: (x [T], [3, T] of the line and its band's two ends)}}"""
    if not shown:
        return ""
    figure, axes = panels(len(shown))
    for ax, (title, lines) in zip(axes, shown.items()):
        for arm, (x, (y, low, high)) in lines.items():
            color, marker = STYLES.get(arm, OTHER_STYLE)
            ax.plot(x, y, label=arm, color=color, marker=marker, markevery=max(1, len(x) // 8))
            ax.fill_between(x, low, high, color=color, alpha=0.12)
        ax.set_ylim(bottom=0)
        ax.set_title(title, fontsize=9)
        ax.set_xlabel(x_label)
        if x_label == "k":
            ax.set_xscale("log", base=2)
            ax.xaxis.set_major_formatter("{x:.0f}")
    return save(figure, path, caption)


def figure_claims(run, claims, out) -> str:
    """Effects with their intervals."""
    if not claims:
        return ""
    figure, (ax,) = panels(1, height=0.6 + 0.8 * len(claims))
    for (arm, reference), found in claims.items():
        color, marker = STYLES[arm if reference == REFERENCE else reference]
        for name, e in found.items():
            interval = [[e["value"] - e["low"]], [e["high"] - e["value"]]]
            ax.errorbar(e["value"], f"{name}: {arm} − {reference}", xerr=interval, capsize=2.5,
                        linestyle="none", color=color, marker=marker)
    ax.axvline(0, color="black", linewidth=0.9)
    ax.invert_yaxis()
    ax.set_xlabel("difference of Pass@k; C3: of policy entropy (nats)")
    return save(figure, out / "claims.png", "Effects with 95 % intervals.")


def figure_perplexity(run, out) -> str:
    """The verified teacher responses over perplexity, the Gaussian's target, and what it took."""
    paths = sorted(run.path.glob(f"seed-{run.seeds[0]}/oxa_*/train.jsonl"))
    metas = [common.read_meta(path) for path in paths]
    metas = [meta for meta in metas if meta and meta.get("bins")]
    if not metas:
        return ""
    meta = metas[0]
    x = [b["low"] for b in meta["bins"]]
    available = np.array([b["available"] for b in meta["bins"]])
    target = np.array([b["target"] for b in meta["bins"]])
    actual = np.array([b["actual"] for b in meta["bins"]])
    shown = {"verified responses": {"teacher": (x, [available, 0 * available, available])},
             "selected": {"target": (x, [target, target, target]),
                          "oxa_mle": (x, [actual, 0 * actual, actual])}}
    caption = (f"Gaussian-guided selection (seed {run.seeds[0]}), responses of each bin: "
               f"{meta['ce']['actual']:,} of {meta['ce']['target']:,} wanted.")
    return draw_lines(shown, "perplexity", out / "perplexity.png", caption)


def figure_pass_at_k(run, out) -> str:
    """A panel for each benchmark, before and after RLVR; k: powers of 2, and all samples."""
    shown = {}
    for when in WHEN:
        for b, n in run.n_samples.items():
            ks = sorted({n, *(2 ** np.arange(n.bit_length())).tolist()})
            for arm in run.arms:
                found = [estimate(run, k, [arm], when, [b]) for k in ks]
                if found[0]:
                    curve = np.array([(e["value"], e["low"], e["high"]) for e in found]).T
                    shown.setdefault(f"Pass@k, {b}, {when} RLVR", {})[arm] = (ks, curve)
    caption = "Unbiased Pass@k, with 95 % bands over problems and seeds."
    return draw_lines(shown, "k", out / "pass_at_k.png", caption)


def figure_training(run, stage, out) -> str:
    """Metrics over the steps of a stage, as far as every seed has them."""
    shown = {}
    for name, title in CURVES[stage].items():
        for arm in run.arms:
            series = [read_metric(run, seed, arm, stage, name) for seed in run.seeds]
            series = [values for values in series if any(values)]    # no unlikelihood: nulls, zeros
            if series:
                y = np.array(list(zip(*series)), dtype=float)
                curve = [y.mean(axis=1), y.min(axis=1), y.max(axis=1)]
                shown.setdefault(title, {})[arm] = (np.arange(1, len(y) + 1), curve)
    caption = f"Metrics of {stage}: means over seeds, the band their range."
    return draw_lines(shown, "optimizer step", out / f"{stage}.png", caption)


# ----------------------------------------------------------------------------------------- report


def first_paragraph(claims) -> str:
    """What was reproduced, in words, from the main comparison."""
    if not claims:
        return "No claim can be judged: `sft` and an `oxa` arm are needed."
    (arm, reference), found = next(iter(claims.items()))
    joined = join_parts(found)
    judged = []
    for name, claim in joined.items():
        numbers = [number(e, "+") for e in claim.get("parts", {"": claim}).values()]
        judged.append(f"{name} {claim['verdict']} ({' and '.join(numbers)})")
    n_good = sum(claim["verdict"] == "reproduced" for claim in joined.values())
    text = (f"**{n_good} of {len(joined)} claims reproduced** for `{arm}` over `{reference}`: "
            f"{'; '.join(judged)}.")
    missing = [name for name in ("C1", "C2", "C3", "C4") if name not in joined]
    if missing:
        text += f" Not measured in this run: {', '.join(missing)}."
    if any(e["seeds"] == 1 for e in found.values()):
        text += (" **One seed: intervals are over problems only**, and say nothing of how another "
                 "training run would have ended.")
    return text


def not_run(run) -> str:
    """What of the paper's arms and our controls has no evaluation, and which arms lack seeds."""
    lacking = []
    for arm in STYLES:
        n = sum((seed, arm, "before") in run.tables for seed in run.seeds)
        if n == 0:
            lacking.append(f"`{arm}`")
        elif n < len(run.seeds):
            lacking.append(f"`{arm}` in {len(run.seeds) - n} of {len(run.seeds)} seeds")
    with_rlvr = {arm for _, arm, when in run.tables if when == "after"}
    if not with_rlvr:
        lacking.append("RLVR")
    return f"Not run, or not evaluated: {', '.join(lacking)}." if lacking else ""


def explanation(folder, out) -> list[str]:
    """The sections of RUN_DIR/explain.jsonl; their figures are copied beside the report's own."""
    path = folder / "explain.jsonl"
    fields = {"title": str, "text": str, "columns": list, "rows": list, "figures": dict}
    parts = []
    for section in common.read_jsonl(path, fields) if path.exists() else ():
        parts += [f"### {safe(section['title'])}", paragraph(section["text"])]
        rows = []
        for row in section["rows"]:
            if not isinstance(row, list) or len(row) != len(section["columns"]):
                common.die(f"{path}: {row!r} does not fit the columns of {section['title']!r}")
            rows.append(map(safe, row))
        if rows:
            parts.append(table([safe(name) for name in section["columns"]], rows))
        for name, caption in section["figures"].items():
            source = (folder / name).resolve()                       # links are followed first
            inside = source.is_relative_to(folder.resolve())
            if not inside or source.suffix != ".png" or not source.is_file():
                common.die(f"{path} names the figure {name!r}, which is no PNG inside {folder}")
            shutil.copy(source, out / f"explain_{source.name}")
            parts.append(image(f"explain_{source.name}", caption))
    return parts


def compose(worlds, summary, out) -> list[str]:
    """The parts of REPORT.md in their order; empty ones are left out."""
    run, claims = worlds[0]
    parts = [f"# {safe(run.path.name)}: what was reproduced", first_paragraph(claims),
             figure_claims(run, claims, out)]
    if claims:
        of_controls = OF_CONTROLS if any(reference in CONTROLS for _, reference in claims) else ""
        parts += ["## Claims", claims_table(worlds[:1]), f"{RULE} {of_controls}".strip()]
    if worlds[1:]:
        parts += [f"## The contrast: {safe(worlds[1][0].path.name)}", claims_table(worlds)]
    parts += ["## Arms", "Means over seeds, with 95 % intervals over problems and seeds.",
              not_run(run)]
    if run.left_out:
        parts.append("Left out, because not every evaluation has it: "
                     f"{safe(', '.join(sorted(run.left_out)))}.")
    if len(run.counted) > 1:
        n = sum(run.n_problems[b] for b in run.counted)
        parts += [f"### Average over {safe(', '.join(run.counted))} ({n} problems)",
                  arms_table(run, summary, "average")]
    for b, n in run.n_samples.items():
        aside = "" if b in run.counted else "; in no claim and no average"
        parts += [f"### {safe(b)} ({run.n_problems[b]} problems, {n} samples each{aside})",
                  arms_table(run, summary, b)]
    parts += ["## Pass@k", figure_pass_at_k(run, out), *explanation(run.path, out), "## Training",
              figure_perplexity(run, out), figure_training(run, "sft", out),
              figure_training(run, "rlvr", out), "## Where this comes from"]
    lines = [f"- {name}: {safe(text)}" for name, text in provenance(run).items()]
    return [part for part in parts if part] + ["\n".join(lines)]


def write_summary(worlds, arms, path):
    run, _ = worlds[0]
    judged = []
    for world, claims in worlds:
        for (arm, reference), found in claims.items():
            judged.append({"world": world.path.name, "arm": arm, "reference": reference,
                           "claims": join_parts(found)})
    label_k, label_n = run.labels()
    content = {
        "schema": "summary", "schema_version": common.SCHEMA_VERSION, "run": run.path.name,
        "seeds": run.seeds, "benchmarks": run.n_problems, "averaged_over": run.counted,
        "k": run.k or "n", "pass_at_k_label": label_k, "pass_at_n_label": label_n,
        "smallest_effect": SMALLEST_EFFECT, "claims": judged, "arms": arms,
        "provenance": provenance(run),
    }
    with common.replace_file(path) as file:
        json.dump(content, file, indent=1)


def main(argv=None):
    args = parse_args(argv)
    matplotlib.rcParams.update({"font.size": 8, "text.parse_math": False})    # a name may have a $
    worlds = []
    for path in filter(None, (args.run, args.contrast)):
        run = load_run(path, args.k, args.beside)
        worlds.append((run, judge_claims(run)))
    run, claims = worlds[0]
    out = Path(args.out or run.path / "report")
    common.make_dir(out / "figures")

    summary = arm_summary(run)
    with common.replace_file(out / "REPORT.md") as file:
        file.write("\n\n".join(compose(worlds, summary, out / "figures")) + "\n")
    write_summary(worlds, summary, out / "summary.json")
    print(first_paragraph(claims), f"report: {out / 'REPORT.md'}", sep="\n\n")


if __name__ == "__main__":
    common.run(main)
