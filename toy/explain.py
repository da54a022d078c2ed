"""Why the arms of a toy run differ: which strategy a model chooses, how often it executes it right.

    python toy/explain.py runs/toy                             writes runs/toy/explain.jsonl
    python toy/explain.py runs/toy --contrast runs/toy_easy    with a second world's strategies

tools/report.py shows explain.jsonl as a section of the report. Accuracy is a sum over styles of

    (share of responses in the style) x (share of these that are right),

so a difference between two arms splits exactly into a part owed to the choice of styles and a part
owed to execution (`split_difference`). The style of a response is read off its text
(`world.style_of`); right is the grader's verdict.

Where the entropy sits: every token of some stored samples is one of three kinds. *Choice*: the
first token after `<think>`, where the style is chosen. *Words*: every other token that is a word.
*Arithmetic*: digits, signs, markup. Entropy is the model's own (T = 1), as in 05_eval.py; kinds add
up to the policy entropy, share by share.

RUN_DIR/ablations/seed-S/NAME-VALUE/eval (toy/study.sh), if there, gives one figure for each NAME:
Pass@1, Pass@8 and entropy over VALUE, on the seeds that have every value, with the run's own arm as
one of the values (cap: it has data of its own). RUN_DIR/longer/ARM, if there, gives a table of RLVR
for more steps.

Deliberate simplifications: a number is the mean over seeds, and behind it stands the range over
seeds, not an interval (the report has intervals); the sets of problems weigh alike; a rate over
fewer than 20 responses is not shown.

Shapes: S seeds, K styles; the last axis of a count is (responses, right ones, every step right).
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common

import dataclasses
import json
import re

import matplotlib
import numpy as np
import torch

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from model import (load_model, load_tokenizer, pack_sequences, plan_packs, render_prompt,
                   token_logprobs)
from tools import report
from toy import world

ARMS = list(report.STYLES)
REFERENCE = report.REFERENCE
STYLES = (*world.STYLES, "other")
CAREFUL = np.array([style in world.CAREFUL for style in STYLES])
# shallow styles are greys, careful ones greens
STYLE_COLORS = ("#4d4d4d", "#8c8c8c", "#bdbdbd", "#00441b", "#1b7837", "#5aae61", "#a6dba0",
                "#762a83")
KINDS = ("choice", "words", "arithmetic")
MODELS = {"before": "sft", "after": "rlvr"}          # RLVR, and the directory of the arm's model
FEW = 20                                             # responses; a rate over fewer is not shown


@dataclasses.dataclass
class Ablation:
    arm: str               # the run's own arm, which has one of the values
    sidecar: str | None    # where that value stands; None: the ablation has data of its own
    label: str
    logarithmic: bool


ABLATIONS = {
    "ul_weight": Ablation("oxa_full", "sft/metrics.jsonl", "weight of the unlikelihood loss", True),
    "mu_quantile": Ablation("oxa_mle", "train.jsonl", "μ, as a quantile of perplexity", False),
    "cap": Ablation("oxa_mle", None, "cap: most examples of one query", False),
}


def parse_args(argv=None):
    p = common.make_parser(__doc__)
    p.add_argument("run", metavar="RUN_DIR", help="a finished toy run: RUN_DIR/seed-S/ARM/…")
    p.add_argument("--contrast", metavar="RUN_DIR2", default=None,
                   help="a run of world easy-leap, shown as well")
    p.add_argument("--world", choices=world.WORLDS, default="deep-leap",
                   help="the world of RUN_DIR")
    p.add_argument("--base", default=str(Path(__file__).parent / "base"),
                   help="the model of the arm 'base'")
    p.add_argument("--entropy-samples", type=int, default=2,
                   help="stored samples a problem to measure entropy on")
    args = p.parse_args(argv)
    common.check_range(args, entropy_samples=1)
    return args


# --------------------------------------------------------------------------- choice and execution


@dataclasses.dataclass
class Run:
    path: Path
    seeds: list
    benchmarks: list
    counts: dict        # counts[arm, "before" or "after" RLVR][benchmark] = {seed: [K, 3]}

    def of_seeds(self, key, benchmark):
        """[S, K, 3], or None where the arm was not evaluated."""
        of_seed = self.counts.get(key, {}).get(benchmark)
        return np.array(list(of_seed.values())) if of_seed else None

    def cells(self):
        """Yield (key, benchmark, [S, K, 3]) of everything that was evaluated."""
        for key in self.counts:
            for b in self.benchmarks:
                counts = self.of_seeds(key, b)
                if counts is not None:
                    yield key, b, counts


def count_styles(rows, problems, which):
    """Evaluation rows, {pid: problem text} -> [K, 3] responses of each style, right ones, ones with
    every step right."""
    counts = np.zeros((len(STYLES), 3), dtype=int)
    for row in rows:
        problem = world.parse_problem(problems[row["pid"]])
        style, every_step = world.style_of(row["response"], problem, which)
        counts[STYLES.index(style)] += (1, row["correct"] is True, every_step)
    return counts


def load_run(path, which):
    path = Path(path)
    counts, seeds, benchmarks = {}, set(), set()
    for when, name in report.WHEN.items():
        for arm in ARMS:
            for results in sorted(path.glob(f"seed-*/{arm}/{name}/results.json")):
                folder = results.parents[2]
                seed = int(folder.name.removeprefix("seed-"))
                for b in json.loads(results.read_text())["benchmarks"]:
                    problems = problem_texts(folder, b)
                    rows = common.read_jsonl(results.with_name(f"{b}.jsonl"), {"response": str})
                    of_benchmark = counts.setdefault((arm, when), {}).setdefault(b, {})
                    of_benchmark[seed] = count_styles(rows, problems, which)
                    benchmarks.add(b)
                seeds.add(seed)
    if not counts:
        common.die(f"{path} holds no evaluation (seed-*/ARM/eval/results.json): "
                   "run the pipeline first")
    in_distribution_first = sorted(benchmarks, key=lambda b: (b != "id", b))
    return Run(path, sorted(seeds), in_distribution_first, counts)


def problem_texts(folder, benchmark) -> dict:
    """{pid: text} of a benchmark of one seed."""
    path = folder / "data" / f"{benchmark}.jsonl"
    return {row["pid"]: row["problem"] for row in common.read_jsonl(path, {"problem": str})}


def rate(part, whole):
    """part / whole [...], nan where there are too few to tell."""
    return np.where(whole >= FEW, part / np.maximum(whole, 1), np.nan)


def split_difference(counts, reference):
    """Accuracy of `counts` minus that of `reference` ([K, 3] each) -> (owed to choice, owed to
    execution).

    Exact: with s the shares and r the right rates,
    s r - s' r' = (s - s') (r + r') / 2 + (s + s') / 2 (r - r'), summed over styles (Kitagawa 1955).
    A style that one of the two never wrote has no rate there and takes the other's: all choice.
    """
    n, n_right = counts[:, 0], counts[:, 1]
    m, m_right = reference[:, 0], reference[:, 1]
    r = n_right / np.maximum(n, 1)
    r_ref = m_right / np.maximum(m, 1)
    r, r_ref = np.where(n > 0, r, r_ref), np.where(m > 0, r_ref, r)
    s = n / n.sum()
    s_ref = m / m.sum()
    choice = (s - s_ref) * (r + r_ref) / 2
    execution = (s + s_ref) / 2 * (r - r_ref)
    return float(choice.sum()), float(execution.sum())


def differences(run):
    """{(arm, when): {benchmark: [S, 2]}}: what choice and execution add to the right answers of
    `sft` then."""
    found = {}
    for (arm, when), of_benchmark in run.counts.items():
        if arm == REFERENCE or (REFERENCE, when) not in run.counts:
            continue
        for b, seeds in of_benchmark.items():
            reference = run.counts[REFERENCE, when].get(b, {})
            parts = []
            for seed, counts in seeds.items():
                if seed in reference:
                    parts.append(split_difference(counts, reference[seed]))
            if parts:
                found.setdefault((arm, when), {})[b] = np.array(parts)
    return found


def cell(values, digits=3, sign=""):
    """Mean over seeds, and their range: `0.412 (0.400 to 0.430)`."""
    values = [value for value in values if not np.isnan(value)]
    if not values:
        return "–"
    mean = f"{np.mean(values):{sign}.{digits}f}"
    if len(values) == 1:
        return mean
    return f"{mean} ({min(values):{sign}.{digits}f} to {max(values):{sign}.{digits}f})"


def name_of(key):
    arm, when = key
    return arm if when == "before" else f"{arm}, RLVR"


def choice_table(run):
    """Arms by: careful share, right of these and of the others, Pass@1; on each set."""
    rows = []
    for key, b, counts in run.cells():
        n, right, steps = counts.sum(axis=1).T                                          # [S] each
        careful = counts[:, CAREFUL].sum(axis=1)                                        # [S, 3]
        other = counts[:, ~CAREFUL].sum(axis=1)
        columns = [careful[:, 0] / n, rate(careful[:, 1], careful[:, 0]),
                   rate(other[:, 1], other[:, 0]), right / n, steps / n]
        rows.append([name_of(key), b, *[cell(column, 2) for column in columns]])
    head = ["arm", "set", "careful: share", "of these right", "of the others right",
            "right (Pass@1)", "every step right"]
    return head, rows


def styles_table(run, benchmark):
    """Arms by styles on one set: share x right, means over seeds."""
    rows = []
    for key, b, counts in run.cells():
        if b != benchmark:
            continue
        n = counts[..., 0].sum(axis=0)
        right = rate(counts[..., 1].sum(axis=0), n)
        row = [name_of(key)]
        for share, of_these in zip(n / n.sum(), right):
            row.append(f"{share:.2f} × " + ("–" if np.isnan(of_these) else f"{of_these:.2f}"))
        rows.append(row)
    return ["arm", *STYLES], rows


def differences_table(found):
    rows = []
    for key, of_benchmark in found.items():
        for b, parts in of_benchmark.items():
            columns = (parts.sum(axis=1), parts[:, 0], parts[:, 1])
            rows.append([name_of(key), b, *[cell(column, sign="+") for column in columns]])
    head = ["arm", "set", f"right, minus {REFERENCE}", "owed to choice", "owed to execution"]
    return head, rows


# ---------------------------------------------------------------------------------------- entropy


def kinds_of(pieces):
    """Pieces of one response (text of each token) -> [L] index into KINDS."""
    kinds = [1 if re.match("[A-Za-z]{2}", piece) else 2 for piece in pieces]
    if len(pieces) > 1 and pieces[0] == world.THINK:
        kinds[1] = 0
    return kinds


@torch.no_grad()
def entropy_by_kind(model, tokenizer, samples):
    """[(problem text, response ids)] -> [3, 2]: share of the tokens and mean entropy (nats, or nan)
    of each kind."""
    sequences, kinds = [], []
    for problem, ids in samples:
        prompt = render_prompt(tokenizer, problem)
        sequences.append((prompt + ids, len(prompt)))
        kinds.append(kinds_of(tokenizer.convert_ids_to_tokens(ids)))
    lengths = [len(ids) for ids, _ in sequences]
    total, n = np.zeros(len(KINDS)), np.zeros(len(KINDS))
    for indices in plan_packs(lengths, max(8192, *lengths))[0]:
        pack = pack_sequences([sequences[i] for i in indices])
        _, entropy = token_logprobs(model, pack, entropy=True)
        kind = np.concatenate([kinds[i] for i in indices])
        total += np.bincount(kind, weights=entropy.numpy(), minlength=len(KINDS))
        n += np.bincount(kind, minlength=len(KINDS))
    mean = np.where(n > 0, total / np.maximum(n, 1), np.nan)
    return np.stack([n / n.sum(), mean], axis=1)


def measure_entropies(run, base, n_samples):
    """{(arm, when): {benchmark: [S, 3, 2]}} on the first `n_samples` stored samples of each
    problem."""
    found = {}
    for key, b, _ in run.cells():
        arm, when = key
        each = []
        for seed in run.counts[key][b]:
            folder = run.path / f"seed-{seed}"
            model = Path(base) if arm == "base" else folder / arm / MODELS[when]
            if not model.exists():
                common.die(f"{model} does not exist: entropy is measured with the model that wrote "
                           "the responses")
            rows = folder / arm / report.WHEN[when] / f"{b}.jsonl"
            samples = stored_samples(rows, problem_texts(folder, b), n_samples)
            each.append(entropy_by_kind(load_model(model), load_tokenizer(model), samples))
        found.setdefault(key, {})[b] = np.array(each)
        print(f"entropy: {name_of(key)}, {b}, {len(each)} seeds", flush=True)
    return found


def stored_samples(path, problems, n_samples):
    """[(problem text, response ids)] of the samples whose tokens 05 keeps."""
    samples = []
    for row in common.read_jsonl(path, {"k": int}):
        if row["k"] < n_samples:
            if "ids" not in row:
                common.die(f"{path} keeps the tokens of fewer than {n_samples} samples a problem: "
                           "lower --entropy-samples")
            samples.append((problems[row["pid"]], row["ids"]))
    return samples


def entropy_table(found):
    rows = []
    for key, of_benchmark in found.items():
        for b, x in of_benchmark.items():                                               # [S, 3, 2]
            share, entropy = x[..., 0], x[..., 1]
            whole = np.nansum(share * entropy, axis=1)
            rows.append([name_of(key), b, *[cell(column) for column in entropy.T],
                         f"{share[:, 1].mean():.2f}", cell(whole)])
    return ["arm", "set", *KINDS, "words: share", "all tokens"], rows


# ---------------------------------------------------------------------------------------- ablations


def measures_of(folders, k=8):
    """Evaluations of one arm, a folder a seed -> {set: {measure: {value, low, high}}}, intervals
    over problems and seeds."""
    found = {}
    for path in sorted(Path(folders[0]).glob("*.problems.jsonl")):
        values, benchmark = {}, path.name.removesuffix(".problems.jsonl")
        for folder in folders:
            table = report.read_table(Path(folder) / "results.json", benchmark)
            k_here = min(k, int(table["n"].min()))
            columns = {"Pass@1": 1, f"Pass@{k_here}": k_here, "entropy (nats)": "entropy"}
            for name, measure in columns.items():
                values.setdefault(name, []).append(report.measured(table, measure)[:, None])
        of_set = {}
        for name, of_seeds in values.items():
            value, low, high = common.bootstrap([of_seeds])
            of_set[name] = {"value": float(value[0]), "low": float(low[0]), "high": float(high[0])}
        found[benchmark] = of_set
    return found


def load_ablation(run, name):
    """RUN_DIR/ablations/seed-*/NAME-* and the run's own arm -> (seeds, own value or None,
    {value: measures_of(...)}), or None if there are none."""
    ablation = ABLATIONS[name]
    folders = {}                                                         # {value: {seed: folder}}
    for path in (run.path / "ablations").glob(f"seed-*/{name}-*/eval/results.json"):
        value = float(path.parts[-3].removeprefix(f"{name}-"))
        seed = int(path.parts[-4].removeprefix("seed-"))
        folders.setdefault(value, {})[seed] = path.parent
    if not folders:
        return None
    seeds = sorted(set.intersection(*map(set, folders.values())))
    own_value = None
    if ablation.sidecar:
        own = {seed: run.path / f"seed-{seed}" / ablation.arm for seed in seeds}
        for folder in own.values():
            if not (folder / "eval" / "results.json").exists():
                common.die(f"{run.path / 'ablations'} has values of {name}, but the run's own arm "
                           f"{folder} has no evaluation")
        meta = common.read_meta(own[seeds[0]] / ablation.sidecar)
        own_value = float(meta["args"][name])
        folders[own_value] = {seed: folder / "eval" for seed, folder in own.items()}
    points = {}
    for value, of_seed in sorted(folders.items()):
        points[value] = measures_of([of_seed[seed] for seed in seeds])
    return seeds, own_value, points


def ablation_table(points, benchmarks):
    rows = []
    for value, of_set in points.items():
        cells = []
        for b in benchmarks:
            cells += [f"{x['value']:.3f}" for x in of_set[b].values()]
        rows.append([f"{value:g}", *cells])
    return ["value", *measure_names(points, benchmarks)], rows


def measure_names(points, benchmarks):
    """A column for each measure on each set, as in the rows."""
    of_set = next(iter(points.values()))
    return [f"{b}: {measure}" for b in benchmarks for measure in of_set[b]]


def longer_table(run, seed):
    """Arms whose RLVR was run for more steps (RUN_DIR/longer/ARM): before, after the run's own
    RLVR, after more of it."""
    rows, names = [], []
    for path in sorted((run.path / "longer").glob("*")):
        if not (path / "eval" / "results.json").exists():                       # not at its end
            continue
        own = run.path / f"seed-{seed}" / path.name
        for folder, log in ((own / "eval", None), (own / "eval_rlvr", own / "rlvr"),
                            (path / "eval", path / "rlvr")):
            found = measures_of([folder])
            steps = sum(1 for _ in open(log / "metrics.jsonl")) if log else 0
            cells = [f"{x['value']:.3f}" for b in run.benchmarks for x in found[b].values()]
            rows.append([path.name, steps, *cells])
            names = measure_names({steps: found}, run.benchmarks)
    return ["arm", "steps of RLVR", *names], rows


# ---------------------------------------------------------------------------------------- figures


def save(figure, run, name, caption):
    report.add_legend(figure)
    path = run.path / "explain" / f"{name}.png"
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return f"explain/{name}.png", caption


def bar_names(ax, names):
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.4, -0.6)
    ax.grid(axis="y", visible=False)


def figure_choice(run, name="choice"):
    """Stacked bars: the share of each style, its right part in full colour; a panel a set."""
    keys = list(run.counts)
    figure, axes = report.panels(len(run.benchmarks), height=0.6 + 0.3 * len(keys))
    panel = dict(zip(run.benchmarks, axes))
    for key, b, counts in run.cells():
        share = counts[..., :2].sum(axis=0) / counts[..., 0].sum()                          # [K, 2]
        left = 0.0
        for style, color, (of_all, right) in zip(STYLES, STYLE_COLORS, share):
            bar = {"height": 0.72, "color": color}
            panel[b].barh(keys.index(key), right, left=left, label=style, **bar)
            panel[b].barh(keys.index(key), of_all - right, left=left + right, alpha=0.3, **bar)
            left += of_all
    for b, ax in panel.items():
        bar_names(ax, [name_of(key) for key in keys])
        ax.set_xlim(0, 1)
        ax.set_title(b, fontsize=10)
        ax.set_xlabel("share of responses")
    return save(figure, run, name, "Styles chosen: shallow ones grey, careful ones green. Full "
                "colour: right answers; pale: wrong ones. The full-coloured parts of a bar add up "
                "to Pass@1.")


def figure_entropy(run, found):
    """Entropy at the choice, in words and in arithmetic; means over the sets, range over seeds."""
    figure, axes = report.panels(len(KINDS), height=0.6 + 0.3 * len(found))
    for i, ax in enumerate(axes):
        for place, (key, of_benchmark) in enumerate(found.items()):
            entropy = np.mean([x[:, i, 1] for x in of_benchmark.values()], axis=0)             # [S]
            color, marker = report.STYLES[key[0]]
            face = color if key[1] == "before" else "white"
            ax.plot([entropy.min(), entropy.max()], [place] * 2, color=color, linewidth=2.5)
            ax.plot(entropy.mean(), place, color=color, marker=marker, markerfacecolor=face)
        bar_names(ax, [name_of(key) for key in found])
        ax.set_xlim(left=0)
        ax.set_title(KINDS[i], fontsize=10)
        ax.set_xlabel("mean entropy (nats per token)")
    return save(figure, run, "entropy", "Policy entropy by kind of token: the first token after "
                "`<think>`, where the style is chosen, other words, and arithmetic (lines: range "
                "over seeds; hollow: after RLVR).")


def figure_ablation(run, name, seeds, own_value, points):
    """Pass@1, Pass@8 and entropy over the values; the level of `sft` as a line."""
    ablation = ABLATIONS[name]
    color, marker = report.STYLES[ablation.arm]
    sft = measures_of([run.path / f"seed-{seed}" / REFERENCE / "eval" for seed in seeds])
    measures = list(sft[run.benchmarks[0]])
    figure, axes = report.panels(len(measures), height=2.6)
    for ax, measure in zip(axes, measures):
        for b, line in zip(run.benchmarks, ("-", "--")):
            found = [of_set[b][measure] for of_set in points.values()]
            y = np.array([x["value"] for x in found])
            below = y - [x["low"] for x in found]
            above = [x["high"] for x in found] - y
            ax.errorbar(list(points), y, yerr=np.array([below, above]), color=color, marker=marker,
                        linestyle=line, capsize=2.5, label=f"{ablation.arm}, {b}")
            ax.axhline(sft[b][measure]["value"], color=report.STYLES[REFERENCE][0], linestyle=line,
                       label=f"{REFERENCE}, {b}")
        if own_value is not None:
            ax.axvline(own_value, color="black", alpha=0.25, linewidth=6, zorder=0)
        if ablation.logarithmic:
            ax.set_xscale("log")
        ax.set_ylim(bottom=0)
        ax.set_title(measure, fontsize=10)
        ax.set_xlabel(ablation.label)
    return save(figure, run, f"ablation_{name}", f"`{ablation.arm}` over {name} ({named(seeds)}; "
                "the run's own value shaded; intervals over problems and seeds).")


# --------------------------------------------------------------------------------------- sections


def section(title, text, table, figures=()):
    head, rows = table
    return {"title": title, "text": text, "columns": head, "rows": rows, "figures": dict(figures)}


def strategies(run):
    shares = []
    for arm in ("base", REFERENCE, "oxa_mle", "oxa_full"):
        counts = run.of_seeds((arm, "before"), "id")
        if counts is not None:
            careful = counts[:, CAREFUL, 0].sum(axis=1) / counts[..., 0].sum(axis=1)
            shares.append(f"`{arm}` {careful.mean():.0%}")
    yield section("Which strategy is chosen, and how often it leads to the right answer",
                  f"Careful styles in distribution: {', '.join(shares)}. Means over seeds, their "
                  "range in brackets.", choice_table(run), [figure_choice(run)])
    for b in run.benchmarks:
        yield section(f"Share × right, for each style ({b})", "", styles_table(run, b))
    found = differences(run)
    if found:
        sentences = []
        for key, of_benchmark in found.items():
            if key[0].startswith("oxa"):
                parts = np.mean([x.mean(axis=0) for x in of_benchmark.values()], axis=0)
                sentences.append(f"`{name_of(key)}` {parts.sum():+.3f} = {parts[0]:+.3f} by choice "
                                 f"{parts[1]:+.3f} by execution")
        yield section("Choice or execution", f"Right answers more than `{REFERENCE}`, mean over "
                      f"the sets: {'; '.join(sentences)}.", differences_table(found))


def named(seeds) -> str:
    return f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"


def training_sets(run, name, seeds) -> str:
    """How many rows each value selects, and which values select the same ones and so are one run;
    "" if none is selected anew."""
    values, counts = {}, []
    folder = run.path / "ablations" / f"seed-{seeds[0]}"
    for path in sorted(folder.glob(f"{name}-*/train.jsonl")):
        value = path.parent.name.removeprefix(f"{name}-")
        values.setdefault(common.sha256_file(path), []).append(value)
        counts.append(f"{value}: {common.read_meta(path)['rows']}")
    text = f" Examples: {', '.join(counts)}." if counts else ""
    for same in values.values():
        if len(same) > 1:
            text += (f" Values {' and '.join(same)} select the same training set: one point, not "
                     f"{len(same)}.")
    return text


def ablation_section(run, name, found):
    seeds, own_value, points = found
    ablation = ABLATIONS[name]
    made = "made on a fifth of the teacher's rows"
    if own_value is not None:
        made = f"the run's own value is {own_value:g}"
    one = " One seed: others may differ a lot." if len(seeds) == 1 else ""
    text = (f"`{ablation.arm}` of {named(seeds)}, one flag changed; {made}.{one}"
            f"{training_sets(run, name, seeds)}")
    return section(f"Ablation: {ablation.label}", text, ablation_table(points, run.benchmarks),
                   [figure_ablation(run, name, seeds, own_value, points)])


def explain(args):
    """Yield the sections of explain.jsonl."""
    run = load_run(args.run, args.world)
    yield from strategies(run)
    entropies = measure_entropies(run, args.base, args.entropy_samples)
    yield section("Where the entropy sits", "Nats per token at T = 1, on the first "
                  f"{args.entropy_samples} stored samples of each problem.",
                  entropy_table(entropies), [figure_entropy(run, entropies)])
    longer = longer_table(run, run.seeds[0])
    if longer[1]:
        yield section("How the lead closes", f"RLVR for more steps than the run's, seed "
                      f"{run.seeds[0]} (no verdict rests on it).", longer)
    for name in ABLATIONS:
        found = load_ablation(run, name)
        if found:
            yield ablation_section(run, name, found)
    if args.contrast:
        other = load_run(args.contrast, "easy-leap")
        other = dataclasses.replace(other, path=run.path)              # its figure goes beside ours
        yield section("The same in the world where the shortcut can be learnt",
                      "World `easy-leap`: shallow styles, too, take one operation at a time.",
                      choice_table(other), [figure_choice(other, "choice_contrast")])


def main(argv=None):
    args = parse_args(argv)
    matplotlib.rcParams["font.size"] = 9
    sections = list(explain(args))
    out = Path(args.run) / "explain.jsonl"
    with common.replace_file(out) as file:
        for each in sections:
            file.write(json.dumps(each, ensure_ascii=False) + "\n")
    print(f"{out}: {len(sections)} sections")


if __name__ == "__main__":
    main()
