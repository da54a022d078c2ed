"""The toy world: arithmetic problems, a rule-based teacher with several styles, and the files the
five scripts read.

A problem is a two-digit start followed by L additions or subtractions of two-digit numbers, modulo
100. Each operation carries a letter, so that a solution can name the one it works on:

    47A+25B-13 mod 100        answer 59

The teacher solves it in one of two ways.
- *Shallow*: all operations at once, no intermediate value (`47A+25B-13=59`). Right in the teacher's
  text, but more than a small model can do in its head, so that seeing more of it does not help.
- *Careful*: one operation after the other, digit by digit: `A+25, 7+5=2', 4+2'=7, 72.` (a prime:
  carry or borrow).

Length and wording are drawn apart from care, so that only the wording (hence perplexity) tells the
styles apart:

| style   | strategy | wording                                     | length           | perplexity |
|---------|----------|---------------------------------------------|------------------|------------|
| boiler  | shallow  | fixed phrases, restating the task           | as careful, or + | lowest     |
| leap    | shallow  | none                                        | short            | low        |
| noisy   | shallow  | many random words between restatements      | longest          | highest    |
| terse   | careful  | one word an operation                       | medium           | low        |
| col     | careful  | units, then tens; 1-2 words a clause        | long             | the band   |
| split   | careful  | tens, then units; 1-2 words a clause        | long             | the band   |
| reflect | careful  | a guess (right or wrong), "wait", then col  | long             | the band   |

"The band" is the one to be found by perplexity.

World `deep-leap` is the world above. In world `easy-leap` the shallow styles take one operation at
a time (`47+25=72. 72-13=59.`), a shortcut which the model *can* learn: the contrast that shows when
the method does not help.

    python toy/world.py --out DIR --seed 0
    python toy/world.py --out DIR --seed 0 --world easy-leap --n-queries 1500 --traces 6

writes problems.jsonl (training queries), teacher_source.jsonl (what `01_sample.py teacher --source`
imports; some traces are wrong, so that verification has work), rlvr.jsonl, and the evaluation sets
id.jsonl and hard.jsonl (one operation longer than any training query), which are the same for every
seed and share no problem with the rest.

Deliberate simplifications: every operand has two digits; each word is one token; the answer is
always written with two digits.
"""

import argparse
import hashlib
import json
import random
import re
from pathlib import Path

WORLDS = ("deep-leap", "easy-leap")
SHALLOW = ("boiler", "leap", "noisy")
CAREFUL = ("terse", "col", "split", "reflect")
STYLES = SHALLOW + CAREFUL

# The first words of a careful style are its own: they are where a model chooses its strategy.
OPENINGS = {
    "boiler": ("the ",),
    "leap": ("",),
    "noisy": ("",),
    "terse": ("sum: ",),
    "col": ("units ", "columns "),
    "split": ("tens ", "parts "),
    "reflect": ("guess ", "perhaps "),
}
CONNECTIVES = tuple(
    word + " "
    for word in (
        "so then now next well okay right hmm also and but thus hence here look see take get "
        "have make just still "
        "first maybe sure good fine yes note say let try"
    ).split()
)
PHRASE_WORDS = ("the ", "task ", "is ", "again ", "step ", "by ", "clearly ", "result ", "wait ")
FILLER = "step by step "
# Every piece of text is one token. "mod 100" ends each problem; numbers are spelled digit by digit.
PIECES = (
    *"0123456789+-=',.?}ABCD",
    ", ", ". ", "? ", "\n", " mod 100", "user\n", "assistant\n",
    *sorted({piece for pieces in OPENINGS.values() for piece in pieces} - {"", "the "}),
    *CONNECTIVES,
    *PHRASE_WORDS,
)  # fmt: skip
PRIME, LETTERS = "'", "ABCD"
# Tokens that the tokenizer matches before all others, and the markup of a response.
THINK, END_THINK, BOXED = "<think>", "</think>", "\\boxed{"

PIECE = re.compile("|".join(re.escape(piece) for piece in sorted(PIECES, key=len, reverse=True)))

N_OPS_TRAIN = (2, 3)  # operations of a training or in-distribution problem
N_OPS_HARD = (4,)
EVAL_SEED = 20260316  # fixed: every seed is judged on the same problems

# Shares of the styles in the teacher's traces; --careful-share moves the two halves against each
# other.
TEACHER_MIX = {
    "boiler": 0.44, "leap": 0.10, "noisy": 0.12,
    "terse": 0.08, "col": 0.09, "split": 0.09, "reflect": 0.08,
}  # fmt: skip
CAREFUL_SHARE = 0.34
WRONG_SHARE = {"shallow": 0.15, "careful": 0.05}  # teacher traces whose answer is wrong


# ----------------------------------------------------------------------------------------- problems


def draw_problem(rng, n_ops):
    """-> (start, ((sign, operand), ...)) with 10 <= start, operand <= 99."""
    return rng.randint(10, 99), tuple((rng.choice("+-"), rng.randint(10, 99)) for _ in range(n_ops))


def expression(start, ops):
    return f"{start:02d}" + "".join(
        f"{letter}{sign}{operand}" for letter, (sign, operand) in zip(LETTERS, ops)
    )


def problem_text(problem):
    return expression(*problem) + " mod 100"


def parse_problem(text):
    """The inverse of `problem_text`."""
    if not re.fullmatch(r"\d\d([A-D][+-]\d\d)+ mod 100", text):
        raise ValueError(f"not a problem of the toy world: {text!r}")
    ops = re.findall(r"([+-])(\d\d)", text)
    return int(text[:2]), tuple((sign, int(operand)) for sign, operand in ops)


def values(problem):
    """Value after each operation, modulo 100: [L]."""
    value, out = problem[0], []
    for sign, operand in problem[1]:
        value = (value + operand if sign == "+" else value - operand) % 100
        out.append(value)
    return out


def answer_text(problem):
    return f"{values(problem)[-1]:02d}"


# -------------------------------------------------------------------------------------- the teacher


def n_tokens(text):
    return len(PIECE.findall(text))


def words(rng, low, high):
    return "".join(rng.choice(CONNECTIVES) for _ in range(rng.randint(low, high)))


def units_clause(value, sign, operand):
    """`7+5=2'`: units digit and, as a prime, the carry or borrow. -> (text, carry)."""
    a, b = value % 10, operand % 10
    total = a + b if sign == "+" else a - b
    carry = int(not 0 <= total <= 9)
    return f"{a}{sign}{b}={total % 10}{PRIME * carry}", carry


def careful_steps(rng, style, problem, slip=None):
    """One sentence per operation; `slip` is the index of an operation whose result is written down
    wrong."""
    out, value = [], problem[0]
    talk = (lambda: "") if style == "terse" else (lambda: words(rng, 1, 2))
    close = (lambda: words(rng, 1, 1)) if style == "terse" else talk
    for i, (sign, operand) in enumerate(problem[1]):
        step = 1 if sign == "+" else -1
        units, carry = units_clause(value, sign, operand)
        a, b = value // 10, operand // 10
        if style == "split":  # tens without the carry, then units
            first, second = f"{a}{sign}{b}={(a + step * b) % 10}", units
        else:
            first, second = units, f"{a}{sign}{b}{PRIME * carry}={(a + step * (b + carry)) % 10}"
        value = (value + step * operand) % 100
        if slip == i:
            value = (value + rng.randint(1, 99)) % 100
        out.append(
            f"{LETTERS[i]}{sign}{operand}, {talk()}{first}, {talk()}{second}, "
            f"{close()}{value:02d}. "
        )
    return "".join(out), value


def shallow_sum(problem, final, world):
    """`47A+25B-13=59. ` in one leap, or in world easy-leap one operation at a time."""
    if world == "deep-leap":
        return f"{expression(*problem)}={final:02d}. "
    results = values(problem)[:-1] + [final]
    befores = [problem[0], *results]
    return "".join(
        f"{v:02d}{sign}{n}={r:02d}. " for v, (sign, n), r in zip(befores, problem[1], results)
    )


def trace(rng, style, problem, world="deep-leap", wrong=False):
    """A response of the teacher: `<think>...</think>\\boxed{59}`. With `wrong` its answer is a
    wrong one."""
    opening = rng.choice(OPENINGS[style])
    right = values(problem)[-1]
    task = expression(*problem)
    if style in CAREFUL:
        guess = ""
        if style == "reflect":
            guess = f"{rng.randint(0, 99):02d}? wait "
        # A slip in the last operation cannot be undone by a later one.
        steps, final = careful_steps(rng, style, problem, len(problem[1]) - 1 if wrong else None)
        body = opening + guess + steps
    else:
        final = (right + rng.randint(1, 99)) % 100 if wrong else right
        total = shallow_sum(problem, final, world)
        if style == "leap":
            body = total * 2  # written once more, as people do who do not check
        elif style == "boiler":
            # As long as a careful solution of the same problem or, half of the time, longer.
            careful = n_tokens(words(rng, 1, 1) + careful_steps(rng, "col", problem)[0])
            room = rng.uniform(*rng.choice(((0.93, 1.1), (1.15, 1.4)))) * careful
            first, last = (
                f"{opening}task is {task}. ",
                f"clearly {total}the result is {final:02d}. ",
            )
            again = f"again the task is {task}. "
            room -= n_tokens(first + last)
            repeats = max(0, int(room / n_tokens(again)))
            fill = max(0, round((room - repeats * n_tokens(again)) / n_tokens(FILLER)))
            body = first + again * repeats + FILLER * fill + last
        else:
            again = "".join(f"{words(rng, 8, 16)}{task}. " for _ in range(rng.randint(2, 3)))
            body = f"{again}{words(rng, 4, 8)}{total}"
    return f"{THINK}{body}{END_THINK}{BOXED}{final:02d}}}"


# -------------------------------------------------------------- which strategy does a response use?


def thoughts(response):
    return response.split(THINK, 1)[-1].split(END_THINK, 1)[0]


def bare(text):
    """The arithmetic of a response: words, separators and the guess of a `reflect` taken out."""
    text = re.sub(r"\d\d\? wait ", "", text)
    return " ".join(re.findall(r"[0-9A-D+\-=']+", text))


def style_of(response, problem=None, world="deep-leap"):
    """-> (style, right): which style a response is written in, and whether the strategy was
    executed right.

    `style` is one of STYLES or "other" (begins in no known way). `right` is None without a problem;
    with one it is True when every arithmetic statement is the one that the strategy demands for
    this problem and the boxed answer follows.
    """
    body = thoughts(response)
    first = re.match(r"[a-z]+:? ", body)
    first = first.group() if first else ""
    style = "other"
    for name, openings in OPENINGS.items():
        if first and first in openings:
            style = name
    if style == "other":
        if re.match(r"\d\d[A-D+-]", body):
            style = "leap"
        elif first in CONNECTIVES:
            style = "noisy"
    if problem is None:
        return style, None
    if style == "other" or not response.startswith(THINK):
        return style, False
    final = values(problem)[-1]
    if style in CAREFUL:
        wanted = bare(careful_steps(random.Random(0), style, problem)[0])
        done = bare(body) == wanted
    else:
        # Restating the task any number of times is fine; the sum itself has to be right.
        done = bare(shallow_sum(problem, final, world)) in bare(body)
    return style, done and response.endswith(f"{END_THINK}{BOXED}{final:02d}}}")


# ---------------------------------------------------------------------------------------- the files


def draw_distinct(rng, n, n_ops_choices, taken):
    """n problems, none in `taken` (a set of problems, extended by the ones drawn)."""
    out = []
    while len(out) < n:
        problem = draw_problem(rng, n_ops_choices[len(out) % len(n_ops_choices)])
        if problem not in taken:
            taken.add(problem)
            out.append(problem)
    return out


def eval_problems(n_eval=160):
    """The evaluation sets: {"id": [...], "hard": [...]}, the same for every seed (a prefix of the
    same 1,000)."""
    rng, taken = random.Random(EVAL_SEED), set()
    return {
        "id": draw_distinct(rng, 1000, N_OPS_TRAIN, taken)[:n_eval],
        "hard": draw_distinct(rng, 1000, N_OPS_HARD, taken)[:n_eval],
    }


def held_out():
    """Every problem that no training text may contain."""
    sets = eval_problems(1000)
    return set(sets["id"]) | set(sets["hard"])


def teacher_traces(rng, problem, n, world, careful_share=CAREFUL_SHARE):
    """n traces of one problem -> list of (style, wrong, text)."""
    share = lambda style: (
        careful_share / CAREFUL_SHARE
        if style in CAREFUL
        else (1 - careful_share) / (1 - CAREFUL_SHARE)
    )
    out = []
    for style in rng.choices(
        list(TEACHER_MIX), weights=[p * share(style) for style, p in TEACHER_MIX.items()], k=n
    ):
        wrong = rng.random() < WRONG_SHARE["careful" if style in CAREFUL else "shallow"]
        out.append((style, wrong, trace(rng, style, problem, world, wrong)))
    return out


def problem_rows(problems, source):
    """Rows of a problems file. The pid is a hash of the text, as 01_sample.py gives to a problem
    that it imports."""
    texts = [problem_text(p) for p in problems]
    return [
        {
            "pid": hashlib.sha256(t.encode()).hexdigest()[:16],
            "problem": t,
            "answer": answer_text(p),
            "source": source,
        }
        for t, p in zip(texts, problems)
    ]


def write_rows(path, rows):
    path.write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
    )
    print(f"{path}: {len(rows)} rows")


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", required=True, help="directory for the five files")
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of queries, traces and RLVR problems (default 0)"
    )
    parser.add_argument("--world", choices=WORLDS, default="deep-leap", help="default deep-leap")
    parser.add_argument(
        "--n-queries", type=int, default=1500, help="training queries (default 1500)"
    )
    parser.add_argument("--traces", type=int, default=6, help="teacher traces a query (default 6)")
    parser.add_argument(
        "--careful-share",
        type=float,
        default=CAREFUL_SHARE,
        help=f"share of the teacher's traces that are careful (default {CAREFUL_SHARE})",
    )
    parser.add_argument("--n-rlvr", type=int, default=400, help="RLVR problems (default 400)")
    parser.add_argument(
        "--n-eval",
        type=int,
        default=160,
        help="problems in each evaluation set, at most 1000 (default 160)",
    )
    args = parser.parse_args(argv)
    if not 1 <= args.n_eval <= 1000:
        parser.error("--n-eval must lie between 1 and 1000")
    if min(args.n_queries, args.traces, args.n_rlvr) < 1:
        parser.error("--n-queries, --traces and --n-rlvr must be at least 1")
    if not 0 <= args.careful_share <= 1:
        parser.error("--careful-share must lie between 0 and 1")
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)

    rng, taken = random.Random(f"toy world {args.seed}"), held_out()
    queries = draw_distinct(rng, args.n_queries, N_OPS_TRAIN, taken)
    rlvr = draw_distinct(rng, args.n_rlvr, N_OPS_TRAIN, taken)
    write_rows(out / "problems.jsonl", problem_rows(queries, "toy-train"))
    write_rows(
        out / "teacher_source.jsonl",
        [
            {
                "query": problem_text(p),
                "DeepSeek-R1_Response_List": [
                    text
                    for _, _, text in teacher_traces(
                        rng, p, args.traces, args.world, args.careful_share
                    )
                ],
                "answer": answer_text(p),
            }
            for p in queries
        ],
    )
    write_rows(out / "rlvr.jsonl", problem_rows(rlvr, "toy-rlvr"))
    for name, problems in eval_problems(args.n_eval).items():
        write_rows(out / f"{name}.jsonl", problem_rows(problems, f"toy-{name}"))


if __name__ == "__main__":
    main()
