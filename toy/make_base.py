"""Pretrain the toy base: a small Qwen2 model that is competent but lazy, and the measurements that
show it.

*Competent*: started in a careful style it solves most in-distribution problems. *Lazy*: left alone
it rarely starts so. The pretraining text makes it so, in two phases: the answers to questions are
first mostly careful, then mostly shallow. A quarter is text without a question, so that perplexity
without a prompt is measured in the model's distribution.

    python toy/make_base.py --out toy/base
    python toy/make_base.py --out toy/base_easy --world easy-leap --n-docs 120000
    # measure an existing base again, for toy.toml's teacher
    python toy/make_base.py --out toy/base --gates-only --careful-share 0.12 --traces 16 \\
        --mu-quantile 0.92

writes a Hugging Face directory (config, safetensors, tokenizer) with make_base.json (seed, data
hash, time, gates) in it, and exits with code 1 if a gate is missed. One thread; 6 and 10 minutes.

Deliberate simplifications: one epoch over fresh text, right-padded batches of documents of like
length, no dropout.
"""

import argparse
import hashlib
import json
import math
import os
import random
import sys
import time
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common
from model import (
    decode_response,
    encode_text,
    END_OF_TEXT,
    END_OF_TURN,
    INSTRUCTION,
    load_model,
    load_tokenizer,
    pack_sequences,
    render_prompt,
    stop_ids,
    token_logprobs,
)
import engines
from toy import world

SPECIAL = (END_OF_TEXT, "<|im_start|>", END_OF_TURN)
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] "
    "}}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# What the base reads, in two phases: it first learns to solve with care, then takes on lazy habits.
# Shares of the styles in answers to a question (of each phase), and in text without a question
# (throughout).
STUDY_MIX = {
    "boiler": 0.10, "leap": 0.10, "noisy": 0.02,
    "terse": 0.24, "col": 0.18, "split": 0.18, "reflect": 0.18,
}  # fmt: skip
HABIT_MIX = {
    "boiler": 0.29, "leap": 0.31, "noisy": 0.04,
    "terse": 0.12, "col": 0.08, "split": 0.08, "reflect": 0.08,
}  # fmt: skip
TEXT_MIX = {
    "boiler": 0.22, "leap": 0.12, "noisy": 0.06,
    "terse": 0.12, "col": 0.16, "split": 0.16, "reflect": 0.16,
}  # fmt: skip
STUDY_SHARE, TEXT_SHARE = 0.62, 0.25
# Tables of sums: all of the first text, and a share of the rest of the first phase. Sums of two
# digits take longer to learn.
DRILLS_UNTIL, DRILL_SHARE = {"deep-leap": 0.175, "easy-leap": 0.25}, 0.1
LONGER_AFTER = (
    0.26,
    0.34,
    0.42,
)  # the share of the text after which problems of 2, 3, 4 operations appear
N_OPS = {
    1: 0.12,
    2: 0.36,
    3: 0.32,
    4: 0.20,
}  # operations of a problem; one alone is always solved with care

# Limits of the gates: fixed before any arm was run (docs/LOG.md). (name, lowest, highest) allowed.
GATES = {
    "deep-leap": (
        ("careful_right_id", 0.80, 1.0),  # started in a careful style: solved
        ("careful_share_alone", 0.0, 0.20),  # left alone: how often it starts so
        ("pass1_alone", 0.05, 0.40),  # neither chance nor high
        ("shallow_right_id", 0.0, 0.20),  # the shortcut cannot be executed
        (
            "picked_by_gaussian",
            0.85,
            1.0,
        ),  # share of careful traces that a Gaussian at the quantile picks
        ("picked_by_lowest_ppl", 0.0, 0.25),
        ("picked_by_longest", 0.0, 0.30),
        ("picked_by_like_length", 0.0, 0.70),
    ),
    "easy-leap": (
        ("careful_right_id", 0.80, 1.0),
        ("careful_share_alone", 0.0, 0.20),
        ("shallow_right_id", 0.70, 1.0),  # the contrast: the shortcut can be executed
        ("picked_by_gaussian", 0.85, 1.0),
    ),
}
# Width of the Gaussian, as in recipes/toy.toml, and the range of perplexities whose quantile is its
# centre.
SIGMA, PPL_RANGE = 0.15, (1.0, 5.0)


# ---------------------------------------------------------------------------------------- tokenizer


def build_tokenizer():
    """One token for each piece of the world's text; decoding is concatenation, so that every trace
    comes back exactly."""
    added = (world.THINK, world.END_THINK, world.BOXED, INSTRUCTION)
    vocabulary = {piece: i for i, piece in enumerate((*SPECIAL, "<unk>", *added, *world.PIECES))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    longest_first = sorted(world.PIECES, key=len, reverse=True)
    # The last alternative cuts foreign text into characters (unknown ones), so that markup inside a
    # text is not a token.
    pattern = (
        "|".join("".join("\\" + c if c in "+.?}" else c for c in piece) for piece in longest_first)
        + "|."
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in added])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token=END_OF_TURN, pad_token=END_OF_TEXT,
        chat_template=CHAT_TEMPLATE, clean_up_tokenization_spaces=False, model_max_length=512,
    )  # fmt: skip


# --------------------------------------------------------------------------------- pretraining text


def drill(rng, which, n=12):
    """Digit sums with and without a carry or borrow, as careful steps use them: `7+5=2', 4+2'=7,
    ...`

    In world easy-leap half of these tables are sums of two digits, as its shallow steps use them:
    `47+25=72, ...`
    """
    out, whole = [], which == "easy-leap" and rng.random() < 0.5
    for _ in range(n):
        if whole:
            a, sign, b = rng.randint(0, 99), rng.choice("+-"), rng.randint(10, 99)
            out.append(f"{a:02d}{sign}{b}={(a + b if sign == '+' else a - b) % 100:02d}")
            continue
        a, sign, b, carry = (
            rng.randint(0, 9),
            rng.choice("+-"),
            rng.randint(0, 9),
            rng.randint(0, 1),
        )
        if carry:
            out.append(f"{a}{sign}{b}'={(a + b + 1 if sign == '+' else a - b - 1) % 10}")
        else:
            out.append(world.units_clause(a, sign, b)[0])
    return ", ".join(out) + ". "


def documents(tokenizer, n, seed, which):
    """n documents -> (list of (ids, start), sha256 of the text). Tokens start.. are learnt: the
    answer, not the question."""
    rng, banned, digest = random.Random(f"toy base {seed}"), world.held_out(), hashlib.sha256()
    problems, texts = [], []
    while len(texts) < n:
        studying = len(texts) < STUDY_SHARE * n
        if studying and (len(texts) < DRILLS_UNTIL[which] * n or rng.random() < DRILL_SHARE):
            problems.append(None)
            texts.append(drill(rng, which))
            digest.update(f"{texts[-1]}\n".encode())
            continue
        longest = 1 + sum(len(texts) > share * n for share in LONGER_AFTER)
        choices = [n_ops for n_ops in N_OPS if n_ops <= longest]
        problem = world.draw_problem(
            rng, rng.choices(choices, weights=[N_OPS[c] for c in choices])[0]
        )
        if problem in banned:
            continue
        asked = rng.random() >= TEXT_SHARE
        mix = TEXT_MIX if not asked else STUDY_MIX if studying else HABIT_MIX
        styles = [s for s in mix if len(problem[1]) > 1 or s in world.CAREFUL]
        style = rng.choices(styles, weights=[mix[s] for s in styles])[0]
        problems.append(world.problem_text(problem) if asked else None)
        texts.append(world.trace(rng, style, problem, which))
        digest.update(f"{problems[-1]}\t{texts[-1]}\n".encode())
    encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
    end_turn, end_text = stop_ids(tokenizer)
    out = []
    for problem, ids in zip(problems, encoded):
        prompt = render_prompt(tokenizer, problem) if problem else []
        out.append((prompt + ids + [end_turn if problem else end_text], max(1, len(prompt))))
    return out, digest.hexdigest()


def batches(docs, size, rng):
    """Batches of documents of like length, in the order of the text but for a shuffle of 64
    batches: lists of indices."""
    out = []
    for i in range(0, len(docs), size * 64):
        pool = list(range(i, min(i + size * 64, len(docs))))
        rng.shuffle(pool)
        pool.sort(key=lambda j: len(docs[j][0]))
        chunk = [pool[j : j + size] for j in range(0, len(pool) - size + 1, size)]
        rng.shuffle(chunk)
        out += chunk
    return out


def collate(docs, indices):
    """-> input_ids [B, T], labels [B, T] (-100 where nothing is learnt). Padding stands on the
    right, so causal attention never sees it and no mask is needed."""
    longest = max(len(docs[i][0]) for i in indices)
    input_ids = torch.zeros(len(indices), longest, dtype=torch.long)
    labels = torch.full((len(indices), longest), -100)
    for row, i in enumerate(indices):
        ids, start = docs[i]
        input_ids[row, : len(ids)] = torch.tensor(ids)
        labels[row, start : len(ids)] = input_ids[row, start : len(ids)]
    return input_ids, labels


def pretrain(args, tokenizer):
    torch.manual_seed(args.seed)
    config = Qwen2Config(
        vocab_size=math.ceil(len(tokenizer) / 8) * 8,
        hidden_size=args.hidden,
        intermediate_size=args.hidden * 2,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 32,
        num_key_value_heads=args.hidden // 64,
        head_dim=32,
        max_position_embeddings=512,
        rope_theta=10000.0,
        tie_word_embeddings=True,
        use_sliding_window=False,
        initializer_range=0.1,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    model = Qwen2ForCausalLM(config)
    model.generation_config.eos_token_id = stop_ids(tokenizer)
    docs, text_hash = documents(tokenizer, args.n_docs, args.seed, args.world)
    schedule = batches(docs, args.batch, random.Random(args.seed))
    n_tokens = sum(len(ids) for ids, _ in docs)
    n_parameters = sum(p.numel() for p in model.parameters())
    print(
        f"{n_parameters} parameters, {len(docs)} documents, {n_tokens} tokens, "
        f"{len(schedule)} steps, data {text_hash[:12]}",
        flush=True,
    )
    # Muon for the matrices inside the layers: copying from the prompt is learnt in 0.5M tokens
    # instead of more than 3M. The large initial weights matter too: with 0.02 digit sums stayed at
    # chance in the same time.
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    inside = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in inside]
    optimizers = [
        torch.optim.Muon(matrices, lr=args.lr, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=args.lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]
    warmup, began, seen = 100, time.time(), 0
    for step, indices in enumerate(schedule):
        lr = (
            args.lr
            * min(1, (step + 1) / warmup)
            * 0.5
            * (1 + math.cos(math.pi * step / len(schedule)))
        )
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
        input_ids, labels = collate(docs, indices)
        loss = model(input_ids=input_ids, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        seen += input_ids.numel()
        if step % 200 == 0:
            seconds = time.time() - began
            print(
                f"step {step} loss {loss.item():.4f} lr {lr:.2e} {seen / seconds:.0f} tok/s "
                f"{seconds:.0f} s",
                flush=True,
            )
        if args.probe_every and step and step % args.probe_every == 0:
            save(args.out, model, tokenizer)
            print(
                "probe",
                {k: round(v, 3) for k, v in execution(args, tokenizer, 48, 1).items()},
                flush=True,
            )
    save(args.out, model, tokenizer)
    return {"data_sha256": text_hash, "n_tokens": n_tokens, "seconds": round(time.time() - began),
            "steps": len(schedule), "final_loss": round(loss.item(), 4)}  # fmt: skip


def save(out, model, tokenizer):
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


# -------------------------------------------------------------------------------------------- gates


def sample_responses(args, tokenizer, jobs):
    """jobs: list of (problem, first text of the response) -> responses, first text included."""
    engine = engines.make_engine("hf", args.out, 256)
    prompts = [
        render_prompt(tokenizer, world.problem_text(problem)) + encode_text(tokenizer, first)
        for problem, first in jobs
    ]
    seeds = [common.request_seed(args.seed, "gate", i) for i in range(len(jobs))]
    out = [None] * len(jobs)
    for i, completion in engine.generate(prompts, seeds, 0.6, 0.95, 180):
        out[i] = jobs[i][1] + decode_response(tokenizer, completion.ids)
    return out


def execution(args, tokenizer, n_problems=96, n_alone=8):
    """How often is each style executed right when the response is started in it, and what does the
    base do alone?"""
    sets, out = world.eval_problems(n_problems), {}
    for name, problems in sets.items():
        jobs = [
            (
                problem,
                world.THINK + world.OPENINGS[style][i % len(world.OPENINGS[style])] + extra,
                style,
            )
            for style in world.STYLES
            for i, problem in enumerate(problems)
            for extra in [
                (
                    f"{problem[0]}{problem[1][0][0]}"
                    if style == "leap"
                    else "so " if style == "noisy" else ""
                )
            ]
        ]
        responses = sample_responses(args, tokenizer, [job[:2] for job in jobs])
        right = {style: [] for style in world.STYLES}
        for (problem, _, style), response in zip(jobs, responses):
            right[style].append(response.endswith(f"{world.BOXED}{world.answer_text(problem)}}}"))
        for style in world.STYLES:
            out[f"{style}_right_{name}"] = sum(right[style]) / n_problems
        for group, styles in (("careful", world.CAREFUL), ("shallow", world.SHALLOW)):
            out[f"{group}_right_{name}"] = sum(
                out[f"{style}_right_{name}"] for style in styles
            ) / len(styles)
    problems = sets["id"] * n_alone
    alone = sample_responses(args, tokenizer, [(problem, "") for problem in problems])
    styles = [world.style_of(response)[0] for response in alone]
    for style in (*world.STYLES, "other"):
        out[f"{style}_share_alone"] = styles.count(style) / len(styles)
    out["careful_share_alone"] = sum(out[f"{style}_share_alone"] for style in world.CAREFUL)
    out["pass1_alone"] = sum(
        response.endswith(f"{world.BOXED}{world.answer_text(problem)}}}")
        for response, problem in zip(alone, problems)
    ) / len(alone)
    return out


@torch.no_grad()
def perplexities(args, tokenizer, texts):
    """Of the response text alone, as 02_verify_score.py measures it: [N]."""
    model = load_model(args.out)
    out = []
    for i in range(0, len(texts), 64):
        pack = pack_sequences([(encode_text(tokenizer, text), 1) for text in texts[i : i + 64]])
        logp, _ = token_logprobs(model, pack)
        for j in range(len(texts[i : i + 64])):
            out.append(math.exp(-logp[pack.seq == j].mean().item()))
    return out


def selection(args, tokenizer, n_queries=300):
    """Which traces would each rule pick? Share of careful ones, and the perplexity and length of
    every style."""
    rng, taken = random.Random("gates"), world.held_out()
    rows = []  # (query, style, n_tokens, ppl)
    for q, problem in enumerate(world.draw_distinct(rng, n_queries, world.N_OPS_TRAIN, taken)):
        for style, wrong, text in world.teacher_traces(
            rng, problem, args.traces, args.world, args.careful_share
        ):
            if not wrong:
                rows.append((q, style, text))
    ppl = perplexities(args, tokenizer, [text for *_, text in rows])
    rows = [
        (q, style, len(encode_text(tokenizer, text)), p) for (q, style, text), p in zip(rows, ppl)
    ]
    care = [float(style in world.CAREFUL) for _, style, _, _ in rows]
    out = {}
    for style in world.STYLES:
        for name, column in (("ppl", 3), ("tokens", 2)):
            of_style = sorted(row[column] for row in rows if row[1] == style)
            out[f"{name}_{style}"] = [
                round(of_style[int(f * (len(of_style) - 1))], 3) for f in (0.05, 0.5, 0.95)
            ]
    inside = sorted(p for p in ppl if PPL_RANGE[0] <= p <= PPL_RANGE[1])
    mu = inside[int(args.mu_quantile * (len(inside) - 1))]
    weight = [math.exp(-0.5 * ((p - mu) / SIGMA) ** 2) for p in ppl]
    out["mu"] = mu
    out["picked_by_random"] = sum(care) / len(care)
    out["picked_by_gaussian"] = sum(w * c for w, c in zip(weight, care)) / sum(weight)
    lowest, longest = {}, {}  # of each query, its row
    for i, (q, _, n_tokens, p) in enumerate(rows):
        if q not in lowest or p < ppl[lowest[q]]:
            lowest[q] = i
        if q not in longest or n_tokens > rows[longest[q]][2]:
            longest[q] = i
    best = sorted(lowest.values(), key=lambda i: ppl[i])[: n_queries * 2 // 3]
    out["picked_by_lowest_ppl"] = sum(care[i] for i in best) / len(best)
    out["picked_by_longest"] = sum(care[i] for i in longest.values()) / len(longest)
    # A random trace of the same length, for every trace that the Gaussian would pick.
    by_length = {}
    for row, c in zip(rows, care):
        by_length.setdefault(row[2], []).append(c)
    out["picked_by_like_length"] = sum(
        w * sum(by_length[row[2]]) / len(by_length[row[2]]) for w, row in zip(weight, rows)
    ) / sum(weight)
    return out


def measure_gates(args, tokenizer):
    """-> (figures, list of missed gates); both printed."""
    figures = {**execution(args, tokenizer), **selection(args, tokenizer)}
    figures = {
        name: round(value, 3) if isinstance(value, float) else value
        for name, value in figures.items()
    }
    for name, value in figures.items():
        print(f"  {name:24s} {value}")
    missed = []
    for name, low, high in GATES[args.world]:
        passed = low <= figures[name] <= high
        missed += [] if passed else [name]
        print(
            f"gate {name:24s} {figures[name]:.3f} in [{low:g}, {high:g}]: "
            f"{'passed' if passed else 'MISSED'}"
        )
    return figures, missed


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", required=True, help="Hugging Face directory of the base")
    parser.add_argument(
        "--world", choices=world.WORLDS, default="deep-leap", help="default deep-leap"
    )
    parser.add_argument("--seed", type=int, default=0, help="default 0")
    parser.add_argument(
        "--n-docs", type=int, default=80000, help="documents, each read once (default 80000)"
    )
    parser.add_argument("--batch", type=int, default=32, help="documents a step (default 32)")
    parser.add_argument("--lr", type=float, default=4e-3, help="peak learning rate (default 4e-3)")
    parser.add_argument(
        "--hidden", type=int, default=128, help="hidden size, a multiple of 64 (default 128)"
    )
    parser.add_argument("--layers", type=int, default=3, help="default 3")
    parser.add_argument(
        "--probe-every",
        type=int,
        default=0,
        help="steps between short measurements; 0: none (default)",
    )
    parser.add_argument(
        "--careful-share",
        type=float,
        default=world.CAREFUL_SHARE,
        help=f"gates: of the teacher's traces (default {world.CAREFUL_SHARE})",
    )
    parser.add_argument(
        "--traces", type=int, default=6, help="gates: teacher traces a query (default 6)"
    )
    parser.add_argument(
        "--mu-quantile",
        type=float,
        default=0.82,
        help="gates: where the Gaussian stands (default 0.82)",
    )
    parser.add_argument(
        "--gates-only", action="store_true", help="measure the base in --out, train nothing"
    )
    args = parser.parse_args(argv)
    tokenizer = load_tokenizer(args.out) if args.gates_only else build_tokenizer()
    record_path = Path(args.out) / "make_base.json"
    if args.gates_only:
        record = json.loads(record_path.read_text()) if record_path.exists() else {}
    else:
        record = {
            "args": {k: v for k, v in vars(args).items() if k != "out"},
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "cpus": os.cpu_count(),
            **pretrain(args, tokenizer),
        }
    record["teacher"] = {
        "careful_share": args.careful_share,
        "traces": args.traces,
        "mu_quantile": args.mu_quantile,
    }
    record["gates"], record["missed"] = measure_gates(args, tokenizer)
    record_path.write_text(json.dumps(record, indent=1) + "\n")
    return 1 if record["missed"] else 0


if __name__ == "__main__":
    sys.exit(main())
