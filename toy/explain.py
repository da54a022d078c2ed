"""Why the arms of a toy run differ: which strategy a model chooses, and how often it executes it right.

    python toy/explain.py runs/toy                             writes runs/toy/explain.json, runs/toy/explain/*.png
    python toy/explain.py runs/toy --contrast runs/toy_easy    with the strategies of the second world

report.py shows explain.json as a section of the report. Accuracy is a sum over styles of

    (share of responses in the style) x (share of these that are right),

so a difference between two arms splits exactly into a part owed to the choice of styles and a part owed to execution
(`split_difference`). The style of a response is read off its text (`world.style_of`); right is the grader's verdict.

Where the entropy sits: every token of some stored samples is one of three kinds. *Choice*: the first token after
`<think>`, where the style is chosen. *Words*: every other token that is a word. *Arithmetic*: digits, signs, markup.
Entropy is the model's own (T = 1), as in 05_eval.py; kinds add up to the policy entropy, share by share.

RUN_DIR/ablations/seed-S/NAME-VALUE/eval (toy/study.sh), if there, gives one figure for each NAME: Pass@1, Pass@8 and entropy
over VALUE, on the seeds that have every value, with the run's own arm as one of the values (cap: it has data of its own).
RUN_DIR/longer/ARM, if there, gives a table of RLVR for more steps.

Deliberate simplifications: a number is the mean over seeds, and behind it stands the range over seeds, not an interval
(report.py has intervals); the sets of problems weigh alike; a rate over fewer than 20 responses is not shown.
"""

import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import torch

matplotlib.use("Agg")
import matplotlib.pyplot as plt

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common
from model import (load_model, load_tokenizer, pack_sequences, plan_packs, render_prompt,
                   token_logprobs)
from toy import world

STYLES = (*world.STYLES, "other")
CAREFUL = np.array([style in world.CAREFUL for style in STYLES])
KINDS = ("choice", "words", "arithmetic")
WHEN = {"before": ("eval", "sft"), "after": ("eval_rlvr", "rlvr")}      # directories of the evaluation, of the model
REFERENCE = "sft"
FEW = 20                                                                # responses; a rate over fewer is not shown
# colour and marker of an arm, as in report.py
ARMS = {
    "base": ("#6e6e6e", "X"), "sft": ("#0072B2", "o"), "sft_lp": ("#56B4E9", "v"), "oxa_mle": ("#E69F00", "s"),
    "oxa_full": ("#D55E00", "D"), "length_matched": ("#009E73", "^"), "longest": ("#CC79A7", "P"),
}
# shallow styles are greys, careful ones greens
STYLE_COLORS = dict(zip(STYLES, ("#4d4d4d", "#8c8c8c", "#bdbdbd",
                                 "#00441b", "#1b7837", "#5aae61", "#a6dba0", "#762a83")))
# NAME of an ablation: (the run's own arm, its sidecar that has the run's own value, axis label, logarithmic)
ABLATIONS = {
    "ul_weight": ("oxa_full", "sft/metrics.jsonl", "weight of the unlikelihood loss", True),
    "mu_quantile": ("oxa_mle", "train.jsonl", "μ, as a quantile of perplexity", False),
    "cap": ("oxa_mle", None, "cap: most examples of one query", False),                     # fewer queries than in the run
}


def parse(argv=None):
    p = common.make_parser(__doc__)
    p.add_argument("run", metavar="RUN_DIR", help="a finished toy run: RUN_DIR/seed-S/ARM/…")
    p.add_argument("--contrast", metavar="RUN_DIR2", default=None, help="a run of world easy-leap, shown as well")
    p.add_argument("--world", choices=world.WORLDS, default="deep-leap", help="the world of RUN_DIR")
    p.add_argument("--base", default=str(Path(__file__).parent / "base"), help="the model of the arm 'base'")
    p.add_argument("--entropy-samples", type=int, default=2, help="stored samples a problem to measure entropy on")
    args = p.parse_args(argv)
    if args.entropy_samples < 1:
        common.die("--entropy-samples must be at least 1")
    return args


# ---------------------------------------------------------------------------------------------- choice and execution


@dataclass
class Run:
    """counts[arm, when][benchmark][seed] = [K, 3]: responses of each style, right ones, ones with every step right."""
    path: Path
    seeds: list
    benchmarks: list
    counts: dict


def count_styles(rows, problems, which):
    """Evaluation rows, {pid: problem text} -> [K, 3] numbers per style: responses, right ones, every step right."""
    counts = np.zeros((len(STYLES), 3), dtype=int)
    for row in rows:
        style, every_step = world.style_of(row["response"], world.parse_problem(problems[row["pid"]]), which)
        counts[STYLES.index(style)] += (1, row["correct"] is True, every_step)
    return counts


def load_run(path, which):
    path, counts, seeds, benchmarks = Path(path), {}, [], []
    for folder in sorted(path.glob("seed-*"), key=lambda p: int(p.name[5:])):
        seed = int(folder.name[5:])
        for arm in (a for a in ARMS if (folder / a).is_dir()):
            for when, (evaluation, _) in WHEN.items():
                if not (folder / arm / evaluation / "results.json").exists():
                    continue
                for b in json.loads((folder / arm / evaluation / "results.json").read_text())["benchmarks"]:
                    texts = common.read_jsonl(folder / "data" / f"{b}.jsonl", {"pid": str, "problem": str})
                    rows = common.read_jsonl(folder / arm / evaluation / f"{b}.jsonl", {"pid": str, "response": str})
                    found = count_styles(rows, {row["pid"]: row["problem"] for row in texts}, which)
                    counts.setdefault((arm, when), {}).setdefault(b, {})[seed] = found
                    benchmarks += [b] * (b not in benchmarks)
                    seeds += [seed] * (seed not in seeds)
    if not counts:
        common.die(f"{path} holds no evaluation (seed-*/ARM/eval/results.json): run the pipeline first")
    order = sorted(counts, key=lambda key: (list(WHEN).index(key[1]), list(ARMS).index(key[0])))
    return Run(path, seeds, sorted(benchmarks, key=lambda b: (b != "id", b)), {key: counts[key] for key in order})


def rate(part, whole):
    """part / whole [...], nan where there are too few to tell."""
    return np.where(whole >= FEW, part / np.maximum(whole, 1), np.nan)


def split_difference(counts, reference):
    """Accuracy of `counts` minus that of `reference` ([K, 3] each) -> (owed to choice, owed to execution).

    Exact: with s the shares and r the right rates, s r - s' r' = (s - s')(r + r')/2 + (s + s')/2 (r - r'), summed over
    styles (Kitagawa 1955). A style that one of the two never wrote has no rate there and takes the other's: all choice.
    """
    (n, n_right), (m, m_right) = counts[:, :2].T, reference[:, :2].T
    r, r_ref = n_right / np.maximum(n, 1), m_right / np.maximum(m, 1)
    r, r_ref = np.where(n > 0, r, r_ref), np.where(m > 0, r_ref, r)
    s, s_ref = n / n.sum(), m / m.sum()
    return float(((s - s_ref) * (r + r_ref) / 2).sum()), float(((s + s_ref) / 2 * (r - r_ref)).sum())


def cell(values, digits=3, sign=False):
    """Mean over seeds, and their range: `0.412 (0.40–0.43)`."""
    values = [v for v in values if not np.isnan(v)]
    if not values:
        return "–"
    form = f"{{:{'+' if sign else ''}.{digits}f}}"
    text = form.format(np.mean(values))
    return text if len(values) == 1 else f"{text} ({form.format(min(values))} to {form.format(max(values))})"


def name_of(arm, when):
    return arm if when == "before" else f"{arm}, RLVR"


def choice_table(run):
    """Arms by: careful share, right of these and of the others, Pass@1; on each set."""
    rows = []
    for (arm, when), of_benchmark in run.counts.items():
        for b in run.benchmarks:
            x = np.array(list(of_benchmark.get(b, {}).values()))                               # [seeds, K, 3]
            if len(x):
                n, right, steps = x.sum(axis=1).T
                careful, other = x[:, CAREFUL].sum(axis=1), x[:, ~CAREFUL].sum(axis=1)
                parts = (careful[:, 0] / n, rate(careful[:, 1], careful[:, 0]), rate(other[:, 1], other[:, 0]),
                         right / n, steps / n)
                rows.append([name_of(arm, when), b, *(cell(part, 2) for part in parts)])
    return ["arm", "set", "careful: share", "of these right", "of the others right", "right (Pass@1)",
            "every step right"], rows


def styles_table(run, b):
    """Arms by styles on one set: share x right, means over seeds."""
    rows = []
    for (arm, when), of_benchmark in run.counts.items():
        x = np.array(list(of_benchmark.get(b, {}).values()))
        if len(x):
            n, right = x[..., 0].sum(axis=0), x[..., 1].sum(axis=0)
            share, good = n / n.sum(), rate(right, n)
            rows.append([name_of(arm, when), *(f"{s:.2f} × " + ("–" if np.isnan(g) else f"{g:.2f}")
                                               for s, g in zip(share, good))])
    return ["arm", *STYLES], rows


def differences(run):
    """{(arm, when): {benchmark: [seeds, 2]}}: what choice and execution add to the right answers of sft then."""
    found = {}
    for (arm, when), of_benchmark in run.counts.items():
        for b, seeds in of_benchmark.items() if arm != REFERENCE else ():
            reference = run.counts.get((REFERENCE, when), {}).get(b, {})
            parts = [split_difference(x, reference[s]) for s, x in seeds.items() if s in reference]
            if parts:
                found.setdefault((arm, when), {})[b] = np.array(parts)
    return found


def differences_table(found):
    rows = [[name_of(*key), b, *(cell(column, sign=True) for column in (x.sum(axis=1), *x.T))]
            for key, of_benchmark in found.items() for b, x in of_benchmark.items()]
    return ["arm", "set", f"right, minus {REFERENCE}", "owed to choice", "owed to execution"], rows


# ----------------------------------------------------------------------------------------------------------- entropy


def kinds_of(pieces):
    """Pieces of one response (text of each token) -> [L] index into KINDS: choice, word or arithmetic."""
    kinds = [1 if re.match("[A-Za-z]{2}", piece) else 2 for piece in pieces]
    if len(pieces) > 1 and pieces[0] == world.THINK:
        kinds[1] = 0
    return kinds


@torch.no_grad()
def entropy_by_kind(model, tokenizer, samples):
    """[(problem text, response ids)] -> [3, 2]: share of the tokens and mean entropy (nats, or nan) of each kind."""
    sequences, kinds = [], []
    for problem, ids in samples:
        prompt = render_prompt(tokenizer, problem)
        sequences.append((prompt + ids, len(prompt)))
        kinds.append(kinds_of(tokenizer.convert_ids_to_tokens(ids)))
    lengths, total, n = [len(ids) for ids, _ in sequences], np.zeros(len(KINDS)), np.zeros(len(KINDS))
    for indices in plan_packs(lengths, max(8192, *lengths))[0]:
        _, entropy = token_logprobs(model, pack_sequences([sequences[i] for i in indices]), entropy=True)
        kind = np.concatenate([kinds[i] for i in indices])
        total += np.bincount(kind, weights=entropy.numpy(), minlength=len(KINDS))
        n += np.bincount(kind, minlength=len(KINDS))
    return np.stack([n / n.sum(), np.divide(total, n, out=np.full(len(KINDS), np.nan), where=n > 0)], axis=1)


def measure_entropies(run, base, n_samples):
    """{(arm, when): {benchmark: [seeds, 3, 2]}} on the first `n_samples` stored samples of each problem."""
    found = {}
    for (arm, when), of_benchmark in run.counts.items():
        evaluation, model = WHEN[when]
        for b, seeds in of_benchmark.items():
            each = []
            for seed in seeds:
                folder = run.path / f"seed-{seed}"
                where = base if arm == "base" else folder / arm / model
                if not Path(where).exists():
                    common.die(f"{where} does not exist: entropy is measured with the model that wrote the responses")
                problems = {row["pid"]: row["problem"] for row in common.read_jsonl(folder / "data" / f"{b}.jsonl")}
                path = folder / arm / evaluation / f"{b}.jsonl"
                rows = [row for row in common.read_jsonl(path, {"k": int}) if row["k"] < n_samples]
                if not all("ids" in row for row in rows):
                    common.die(f"{path} keeps the tokens of fewer than {n_samples} samples a problem: lower --entropy-samples")
                samples = [(problems[row["pid"]], row["ids"]) for row in rows]
                each.append(entropy_by_kind(load_model(where), load_tokenizer(where), samples))
            found.setdefault((arm, when), {})[b] = np.array(each)
            print(f"entropy: {name_of(arm, when)}, {b}, {len(each)} seeds", flush=True)
    return found


def entropy_table(found):
    rows = [[name_of(*key), b, *(cell(x[:, i, 1]) for i in range(len(KINDS))), f"{x[:, 1, 0].mean():.2f}",
             cell(np.nansum(x.prod(axis=2), axis=1))]
            for key, of_benchmark in found.items() for b, x in of_benchmark.items()]
    return ["arm", "set", "choice", "words", "arithmetic", "words: share", "all tokens"], rows


# --------------------------------------------------------------------------------------------------------- ablations


def measures_of(folders, k=8):
    """Evaluations of one arm, a folder a seed -> {set: {measure: (mean, low, high)}}, intervals over problems and seeds."""
    found = {}
    for path in sorted(Path(folders[0]).glob("*.problems.jsonl")):
        values = {}
        for folder in folders:
            table = list(common.read_jsonl(Path(folder) / path.name, {"n": int, "n_correct": int}))
            k_here = min(k, *(row["n"] for row in table))
            for name, column in (("Pass@1", [row["n_correct"] / row["n"] for row in table]),
                                 (f"Pass@{k_here}", [common.pass_at_k(row["n"], row["n_correct"], k_here) for row in table]),
                                 ("entropy (nats)", [row["entropy"] for row in table])):
                values.setdefault(name, []).append(column)
        found[path.name.split(".")[0]] = {
            name: tuple(float(x[0]) for x in common.bootstrap([[np.array(x, dtype=float)[:, None] for x in v]]))
            for name, v in values.items()}
    return found


def load_ablation(run, name):
    """-> (seeds, own value or None, {value: measures_of(...)}) of RUN_DIR/ablations/seed-*/NAME-* and the run's own arm, or
    None if there are none."""
    arm, sidecar, _, _ = ABLATIONS[name]
    folders = {}                                                                              # {value: {seed: folder}}
    for path in (run.path / "ablations").glob(f"seed-*/{name}-*/eval/results.json"):
        value, seed = float(path.parts[-3][len(name) + 1:]), int(path.parts[-4].removeprefix("seed-"))
        folders.setdefault(value, {})[seed] = path.parent
    if not folders:
        return None
    seeds, value = sorted(set.intersection(*(set(of_seed) for of_seed in folders.values()))), None
    if sidecar:
        own = {seed: run.path / f"seed-{seed}" / arm for seed in seeds}
        for folder in own.values():
            if not (folder / "eval" / "results.json").exists():
                common.die(f"{run.path / 'ablations'} has values of {name}, but the run's own arm {folder} has no evaluation")
        value = float(common.read_meta(own[seeds[0]] / sidecar)["args"][name])
        folders[value] = {seed: folder / "eval" for seed, folder in own.items()}
    points = {v: measures_of([of_seed[seed] for seed in seeds]) for v, of_seed in folders.items()}
    return seeds, value, dict(sorted(points.items()))


def longer_table(run, seed):
    """Arms whose RLVR was run for more steps (RUN_DIR/longer/ARM): rows of (arm, steps, measures on each set)."""
    rows = []
    for path in sorted((run.path / "longer").glob("*/eval/results.json")):
        arm = path.parts[-3]
        own = run.path / f"seed-{seed}" / arm
        for folder, log in ((own / "eval", None), (own / "eval_rlvr", own / "rlvr"), (path.parent, path.parents[1] / "rlvr")):
            found = measures_of([folder])
            steps = sum(1 for _ in open(log / "metrics.jsonl")) if log else 0
            rows.append([arm, steps, *(f"{x[0]:.3f}" for b in run.benchmarks for x in found[b].values())])
    names = ("Pass@1", "Pass@8", "entropy")
    return ["arm", "steps of RLVR", *(f"{b}: {name}" for b in run.benchmarks for name in names)], rows


def ablation_table(points):
    measures = [m for of_set in points.values() for x in of_set.values() for m in x]
    measures = list(dict.fromkeys(measures))
    sets = sorted(next(iter(points.values())), key=lambda b: (b != "id", b))
    rows = [[f"{value:g}", *(f"{of_set[b][m][0]:.3f}" for b in sets for m in measures)]
            for value, of_set in points.items()]
    return ["value", *(f"{b}: {m}" for b in sets for m in measures)], rows


# ----------------------------------------------------------------------------------------------------------- figures


def panels(n_rows, n_cols, width=9.0, height=2.9):
    figure, axes = plt.subplots(n_rows, n_cols, figsize=(width, height * n_rows + 0.5), squeeze=False,
                                layout="constrained")
    for ax in axes.flat:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.25, linewidth=0.6)
        ax.set_axisbelow(True)
    return figure, axes


def save(figure, run, name, caption, legend=None, ncols=8):
    if legend:
        figure.legend(*legend, loc="outside lower center", ncols=ncols, frameon=False)
    path = run.path / "explain" / f"{name}.png"
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return {"file": f"explain/{name}.png", "caption": caption}


def unique_legend(axes):
    handles = {}
    for ax in np.ravel(axes):
        for handle, label in zip(*ax.get_legend_handles_labels()):
            handles.setdefault(label, handle)
    return handles.values(), handles.keys()


def bar_names(ax, names):
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.4, -0.6)
    ax.grid(axis="y", visible=False)


def figure_choice(run, name="choice"):
    """Stacked bars: the share of each style, its right part in full colour; a panel for each set."""
    figure, axes = panels(1, len(run.benchmarks), height=0.6 + 0.3 * len(run.counts))
    for ax, b in zip(axes[0], run.benchmarks):
        for place, of_benchmark in enumerate(run.counts.values()):
            x = np.array(list(of_benchmark.get(b, {}).values())).sum(axis=0)
            total, left = x[:, 0].sum(), 0.0
            for style, (n, right, _) in zip(STYLES, x):
                color = STYLE_COLORS[style]
                ax.barh(place, right / total, left=left, height=0.72, color=color)
                ax.barh(place, (n - right) / total, left=left + right / total, height=0.72, color=color, alpha=0.3)
                left += n / total
        bar_names(ax, [name_of(*key) for key in run.counts])
        ax.tick_params(labelleft=ax is axes[0][0])
        ax.set_xlim(0, 1)
        ax.set_title(b, fontsize=10)
        ax.set_xlabel("share of responses")
    patches = [plt.Rectangle((0, 0), 1, 1, color=STYLE_COLORS[style]) for style in STYLES]
    return save(figure, run, name, "Styles chosen: shallow ones grey, careful ones green. Full colour: right answers; "
                "pale: wrong ones. The full-coloured parts of a bar add up to Pass@1.", (patches, STYLES))


def figure_execution(run, when="before"):
    """Right answers within each style, by arm, with the range over seeds."""
    arms = [arm for arm, w in run.counts if w == when]
    figure, axes = panels(1, len(run.benchmarks), height=2.9)
    for ax, b in zip(axes[0], run.benchmarks):
        for i, arm in enumerate(arms):
            x = np.array(list(run.counts[arm, when].get(b, {}).values()))
            right = rate(x[..., 1], x[..., 0])                                                  # [seeds, K]
            for style in (k for k in range(len(world.STYLES)) if not np.isnan(right[:, k]).all()):
                y, place = right[:, style], style + (i - (len(arms) - 1) / 2) * 0.11
                color, marker = ARMS[arm]
                ax.plot([place] * 2, [np.nanmin(y), np.nanmax(y)], color=color, linewidth=1.5)
                ax.plot(place, np.nanmean(y), color=color, marker=marker, markersize=4.5, linestyle="none", label=arm)
        ax.set_xticks(range(len(world.STYLES)), world.STYLES)
        ax.set_xlim(-0.5, len(world.STYLES) - 0.5)
        ax.grid(axis="x", visible=False)
        for border in range(1, len(world.STYLES)):
            ax.axvline(border - 0.5, color="black", alpha=0.12, linewidth=0.6)
        ax.set_ylim(-0.02, 1.02)
        ax.set_title(f"{b}, {when} RLVR", fontsize=10)
        ax.set_ylabel("right, of the responses in the style")
    return save(figure, run, "execution", f"How often a style, once chosen, leads to the right answer (bars: range "
                f"over seeds; styles with fewer than {FEW} responses are left out).", unique_legend(axes), ncols=7)


def figure_differences(run, found):
    """Bars: what choice and execution add to the right answers of sft."""
    figure, axes = panels(1, len(run.benchmarks), height=0.6 + 0.34 * len(found))
    for ax, b in zip(axes[0], run.benchmarks):
        for place, of_benchmark in enumerate(found.values()):
            for i, (label, color) in enumerate((("owed to choice", "#117733"), ("owed to execution", "#DDAA33"))):
                y, at = of_benchmark[b][:, i], place + (i - 0.5) * 0.36
                ax.barh(at, y.mean(), height=0.34, color=color, label=label)
                ax.plot([y.min(), y.max()], [at] * 2, color="black", linewidth=1.0)
        ax.axvline(0, color="black", linewidth=0.9)
        bar_names(ax, [name_of(*key) for key in found])
        ax.tick_params(labelleft=ax is axes[0][0])
        ax.set_title(b, fontsize=10)
        ax.set_xlabel(f"right answers, minus those of {REFERENCE}")
    limits = np.array([ax.get_xlim() for ax in axes[0]])
    for ax in axes[0]:
        ax.set_xlim(limits[:, 0].min(), limits[:, 1].max())
    return save(figure, run, "choice_or_execution", f"The difference to {REFERENCE} in right answers, split exactly; after "
                f"RLVR against {REFERENCE} after RLVR (lines: range over seeds).", unique_legend(axes))


def figure_entropy(run, found):
    """Entropy at the choice, in words and in arithmetic; means over the sets, range over seeds."""
    figure, axes = panels(1, len(KINDS), height=0.6 + 0.3 * len(found))
    for i, (ax, kind) in enumerate(zip(axes[0], KINDS)):
        for place, ((arm, when), of_benchmark) in enumerate(found.items()):
            y = np.mean([x[:, i, 1] for x in of_benchmark.values()], axis=0)
            color, marker = ARMS[arm]
            ax.plot([0, y.mean()], [place] * 2, color=color, linewidth=1.0, alpha=0.4)
            ax.plot([y.min(), y.max()], [place] * 2, color=color, linewidth=2.5)
            ax.plot(y.mean(), place, color=color, marker=marker, markersize=6,
                    markerfacecolor=color if when == "before" else "white")
        bar_names(ax, [name_of(*key) for key in found])
        ax.tick_params(labelleft=i == 0)
        ax.set_xlim(left=0)
        share = np.mean([x[:, i, 0].mean() for of_benchmark in found.values() for x in of_benchmark.values()])
        ax.set_title(f"{kind} ({share:.0%} of tokens)", fontsize=10)
        ax.set_xlabel("mean entropy (nats per token)")
    return save(figure, run, "entropy", "Policy entropy by kind of token: the first token after `<think>`, where the style "
                "is chosen, other words, and arithmetic (lines: range over seeds; hollow: after RLVR).")


def figure_ablation(run, name, seeds, own, points):
    """Pass@1, Pass@8 and entropy over the values; sft's level as a line."""
    arm, _, label, logarithmic = ABLATIONS[name]
    reference = measures_of([run.path / f"seed-{seed}" / REFERENCE / "eval" for seed in seeds])
    measures = list(next(iter(next(iter(points.values())).values())))
    figure, axes = panels(1, len(measures), height=2.6)
    for ax, measure in zip(axes[0], measures):
        for b, line, face in zip(run.benchmarks, ("-", "--"), (ARMS[arm][0], "white")):
            x, y = list(points), np.array([of_set[b][measure] for of_set in points.values()])      # [V, 3]
            ax.errorbar(x, y[:, 0], yerr=np.abs(y[:, 1:] - y[:, :1]).T, color=ARMS[arm][0], linestyle=line,
                        marker=ARMS[arm][1], markerfacecolor=face, markersize=5, capsize=2.5, label=f"{arm}, {b}")
            if b in reference:
                ax.axhline(reference[b][measure][0], color=ARMS[REFERENCE][0], linestyle=line, linewidth=1.2,
                           label=f"{REFERENCE}, {b}")
        if own is not None:
            ax.axvline(own, color="black", alpha=0.25, linewidth=6, zorder=0)
        if logarithmic:
            ax.set_xscale("log")
            ax.set_xlim(min(points) / 2, max(points) * 2)
        else:
            ax.set_xticks(list(points), [f"{v:g}" for v in points])
        ax.set_ylim(bottom=0, top=1.02 if measure.startswith("Pass") else None)
        ax.set_title(measure, fontsize=10)
        ax.set_xlabel(label)
    return save(figure, run, f"ablation_{name}", f"`{arm}` over {name} ({named(seeds)}; the run's own value shaded; "
                "intervals over problems and seeds).", unique_legend(axes), ncols=4)


# ---------------------------------------------------------------------------------------------------------- sections


def section(title, text, table, figures=()):
    return {"title": title, "text": text, "columns": table[0], "rows": table[1], "figures": list(figures)}


def strategies(run):
    share = lambda arm: np.mean([x[CAREFUL, 0].sum() / x[:, 0].sum() for x in run.counts[arm, "before"]["id"].values()])
    seen = [a for a in ("base", "sft", "oxa_mle", "oxa_full") if "id" in run.counts.get((a, "before"), {})]
    yield section("Which strategy is chosen, and how often it leads to the right answer",
                  "Careful styles in distribution: " + ", ".join(f"`{a}` {share(a):.0%}" for a in seen) + ". Means "
                  "over seeds, their range in brackets.", choice_table(run), [figure_choice(run)])
    for b in run.benchmarks:
        yield section(f"Share × right, for each style ({b})", "", styles_table(run, b),
                      [figure_execution(run)] if b == run.benchmarks[0] else [])
    found = differences(run)
    if found:
        text = f"Right answers more than `{REFERENCE}`, mean over the sets: "
        parts = {key: np.mean([x.mean(axis=0) for x in sets.values()], axis=0) for key, sets in found.items()}
        text += "; ".join(f"`{name_of(*key)}` {p.sum():+.3f} = {p[0]:+.3f} by choice {p[1]:+.3f} by execution"
                          for key, p in parts.items() if key[0].startswith("oxa")) + "."
        yield section("Choice or execution", text, differences_table(found), [figure_differences(run, found)])


def named(seeds) -> str:
    return f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"


def training_sets(run, name, seeds) -> str:
    """How many rows each value selects, and which values select the same ones and so are one run; "" if none is selected anew."""
    values, n_rows = {}, []
    for path in sorted((run.path / "ablations" / f"seed-{seeds[0]}").glob(f"{name}-*/train.jsonl")):
        value = path.parent.name.removeprefix(f"{name}-")
        values.setdefault(common.sha256_file(path), []).append(value)
        n_rows.append(f"{value}: {common.read_meta(path)['rows']}")
    same = "".join(f" Values {' and '.join(same)} select the same training set: one point, not {len(same)}."
                   for same in values.values() if len(same) > 1)
    return (f" Examples: {', '.join(n_rows)}." if n_rows else "") + same


def explain(args):
    """Yield the sections of explain.json."""
    run = load_run(args.run, args.world)
    yield from strategies(run)
    entropies = measure_entropies(run, args.base, args.entropy_samples)
    yield section("Where the entropy sits", "Nats per token at T = 1, on the first "
                  f"{args.entropy_samples} stored samples of each problem.", entropy_table(entropies),
                  [figure_entropy(run, entropies)])
    if (table := longer_table(run, run.seeds[0]))[1]:
        yield section("How the lead closes", f"RLVR for more steps than the run's, seed {run.seeds[0]} (no verdict rests on it).", table)
    for name, (arm, _, label, _) in ABLATIONS.items():
        if found := load_ablation(run, name):
            seeds, own, points = found
            own_value = "made on a fifth of the teacher's rows" if own is None else f"the run's own value is {own:g}"
            one = " One seed: others may differ a lot." if len(seeds) == 1 else ""
            yield section(f"Ablation: {label}", f"`{arm}` of {named(seeds)}, one flag changed; {own_value}.{one}"
                          f"{training_sets(run, name, seeds)}", ablation_table(points),
                          [figure_ablation(run, name, seeds, own, points)])
    if args.contrast:
        other = load_run(args.contrast, "easy-leap")
        figure = figure_choice(Run(run.path, other.seeds, other.benchmarks, other.counts), "choice_contrast")
        yield section("The same in the world where the shortcut can be learnt",
                      "World `easy-leap`: shallow styles, too, take one operation at a time.",
                      choice_table(other), [figure])


def main(argv=None):
    args = parse(argv)
    matplotlib.rcParams.update({"font.size": 9})
    sections = list(explain(args))
    out = Path(args.run) / "explain.json"
    with common.replace_file(out) as file:
        json.dump(sections, file, indent=1, ensure_ascii=False)
    print(f"{out}: {len(sections)} sections, {sum(len(s['figures']) for s in sections)} figures")


if __name__ == "__main__":
    main()
