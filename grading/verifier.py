"""Is this answer right?

    verify(response, answer)             -> Verdict(correct, status, predicted)
    verify_many([(response, answer), …]) -> [Verdict, …] in order, judged in worker processes that can be killed

`answer` is the gold answer, or a list of golds of which any will do. `correct` is True, False, or None: the gold cannot
be read or the judge failed, so nothing is known, and that is not False. `status` says how the verdict came about:
    ok                                         an answer was read and judged
    no_think_end                               False: no </think>, so the response never came to an answer
    no_box unbalanced_box empty_box too_long   False: nothing to judge in the last \\boxed{} or \\fbox{} after </think>
    unparsed undefined too_big                 False: the answer cannot be read, has no value (1/0), or passes a limit
    gold_unparsed                              None: the gold cannot be read, has no value, or passes a limit
    timeout crashed                            None: a worker process hung or died on this pair, twice

What counts as equal. The answer is normalised (Unicode, spaces, fonts, `$`), parsed, and compared by structure.
Expressions are compared as numbers: rationals exactly, others by whether the difference vanishes as the precision
grows, variables at random points.
  - A number equals only itself: 1/2 = 0.5 = 5e-1, 1\\frac{4}{5} = 9/5, 0.\\overline{3} = 1/3; but 0.33 is not 1/3.
    `N%` equals N and N/100. `12,345` is a number, or else two; `12, 345` is two.
  - Units, currency and degree signs are dropped, not converted: 5 cm = 5 m = 5. In \\sin 30^\\circ the degree counts.
  - `x = 5`, `x \\in A`, `f(x) = 5` give their right side; `x = x` gives nothing. `q = 2, p = 5` is (5, 2), by name.
  - Lists, {…}, unions and ± are unordered and equal in size: `204 or 205` is not 204. (…) and […] are ordered, and
    their kind counts.
  - x < 2 is (-oo, 2). Matrices go by element; a : b and h:mm by part, unreduced; 204_5 by digits and base.
  - Equations are equal if their `left - right` are in a constant ratio; so are inequalities, if its sign fits.
  - Words are equal if their letters are, in either case. \\log is \\ln. An odd root of a negative number is real.
  - Variables are real: \\sqrt{x^2} is |x|, not x; but \\ln x^2 = 2 \\ln x, since only points count where both are real.

The answer is hostile text. Nothing of it is executed. Every size, exponent and the work as a whole are limited by count
(LIMITS in grammar.py), not by a clock, so a verdict does not depend on the machine. The worker processes, with a memory
limit and a deadline, are the second wall. The grammar and the arithmetic are in grammar.py.
"""
import atexit
import collections
import functools
import itertools
import json
import os
import re
import resource
import selectors
import subprocess
import sys
import threading
import time
import unicodedata
from fractions import Fraction

from grading.grammar import (FLIP, FUNCTIONS, GREEK, LIMITS, STRUCTURES, TWO, Parser, TooBig, Undefined, Unreadable, fold, limit,
                   proportional, same_value, spent)

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
Verdict = collections.namedtuple("Verdict", "correct status predicted")


# ----------------------------------------------------------------------------------------------------------- 1. extract
BOX = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.S)


def extract(response):
    """What the last box after the last </think> holds: (predicted, None), or (None, status)."""
    end = response.rfind("</think>")
    if end < 0:
        return None, "no_think_end"
    tail = response[max(end, len(response) - LIMITS["tail"]):]
    is_box, last = [], (-1, -1)  # of each open brace: where the box starts, or -1
    for match in BOX.finditer(tail):
        if match[0] == "}" and is_box:
            start = is_box.pop()
            last = (start, match.start()) if start >= 0 else last  # an outer box closes last, and wins
        elif match[0][-1] == "{" and len(match[0]) != 2:
            is_box.append(match.end() if len(match[0]) > 1 else -1)
    if max(is_box, default=-1) > last[0]:
        return None, "unbalanced_box"
    predicted = tail[last[0]:last[1]].strip()
    if last[0] < 0 or not predicted:
        return None, "no_box" if last[0] < 0 else "empty_box"
    return (None, "too_long") if len(predicted) > LIMITS["answer"] else (predicted, None)


# --------------------------------------------------------------------------------------------------------- 2. normalise
UNICODE = str.maketrans({c: name + " " for c, name in GREEK.items()} | dict(zip("−–—÷⁄º′’€£¥", "---//°''   ")) | {
    "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ",
    "∞": r"\infty ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "≈": r"\approx ",
    "±": r"\pm ", "∓": r"\mp ", "∪": r"\cup ", "∈": r"\in ", "∅": r"\emptyset ", "ℝ": r"\R ",
    "√": r"\sqrt ", "½": r"\frac12 ",
    "⅓": r"\frac13 ", "⅔": r"\frac23 ", "¼": r"\frac14 ", "¾": r"\frac34 "})
END = "(?![a-zA-Z])"
FONTS = rf"(?:mathbf|boldsymbol|bm|mathit|mathsf|mathcal|mathbb *(?=\{{ *[^R ])|pmb|bf|it|rm){END}"
TEXT = r"\\text *\{([^{}]*)\}"
POWER_OF_TEN = {"thousand": 3, "million": 6, "billion": 9, "trillion": 12}
RULES = [(re.compile(pattern), new) for pattern, new in [
    (r"[\0\s]+", " "),
    (r"\\\\", "\n"),                                                                            # the end of a row
    (r"\\?\$|\\[()\[\]]", ""),
    (r"\\(?:left|right)\s*\.", " "),
    (rf"\\(?:left|right|[bB]igg?[lrm]?|displaystyle|textstyle|limits|large|Large|boxed|fbox){END}", " "),
    (rf"\\{FONTS} *\{{ *([a-zA-Z]) *\}}|\\{FONTS}", r" \1"),
    (rf"\\(?:text(?:bf|it|rm|sf|tt|normal|up)?|math(?:rm|op)|mbox|hbox|operatorname\*?){END}", r"\\text"),
    (r"\\text *\{([^{}a-zA-ZµΩÅ]*)\}", r"\1"),                                                  # \text{204}
    (r"^\s*\\text *\{ *\(? *([a-zA-Z]) *\)? *\} *$|\\text *\{ *([eid]) *\}", r" \1\2"),    # \text{(B)}, \mathrm{e}
    (rf"\\text *\{{ *({'|'.join(FUNCTIONS)}) *\}}", r"\\\1 "),
    # plain sqrt(2)
    (rf"(?<![\\a-zA-Z])({'|'.join(FUNCTIONS)}|sqrt|pi(?![a-z])|infty(?![a-z]))(?= *[^a-z ]|$| +[a-z])", r"\\\1 "),
    (r"(?<![0-9.])[0-9]{1,3}(?:(?:\{,\}|,?\\!|\\[,;: ]|~| )[0-9]{3})+(?![0-9])", lambda m: re.sub("[^0-9]", "", m[0])),
    (rf"\\[,;:! ]|~|\\(?:quad|qquad|enspace|thinspace){END}", " "),
    (r"\\([%#&_])", r"\1"),
    (rf"\\[dtc]frac{END}", r"\\frac"), (rf"\\[dt]binom{END}", r"\\binom"), (r"\\mathbb *\{? *R *\}?|\\Reals", r"\\R "),
    (rf"\\leq(?:slant)?{END}|<=", r"\\le "), (rf"\\geq(?:slant)?{END}|>=", r"\\ge "), (rf"\\neq{END}|!=", r"\\ne "),
    (rf"\\lt{END}", "<"), (rf"\\gt{END}", ">"), (rf"\\colon{END}", ":"),
    (rf"\\(?:sim|simeq|cong|equiv){END}", r"\\approx "),
    (rf"\\[lr]?vert{END}|\\mid{END}", "|"), (r"\\lbrace", r"\\{"), (r"\\rbrace", r"\\}"),
    (r"\\varnothing|\\\{ *\\\}", r"\\emptyset "),
    (r"\\var(?=epsilon|phi|theta|rho)", r"\\"), (r"\*\*", "^"),
    (r"\{([^{}]*)\\choose([^{}]*)\}", r"\\binom{\1}{\2}"), (r"\n *(?=\\end)", ""),
    (rf"\\frac *\{{ *{TEXT} *\}} *\{{ *{TEXT} *\}}", r"\\text{\1/\2}"),
    (rf"\\(?:ast|star|cdotp|bullet){END}|\*", r"\\cdot "),
    (rf"\^ *\{{? *\\circ{END} *\}}?|\\degree{END}", "°"),
    (r"\\(?:begin|end) *\{ *(?:aligned|align\*?|cases|gathered) *\}|(?<=\n)&|&(?==)", " "),
    (rf"\\text *\{{ *(?:and|or) *\}}|(?<![a-zA-Z\\])(?:and|or){END}|\\(?:lor|land|vee|wedge){END}", ","),
    (r",(?: *,)+", ","),
    (r"^ *(?:\\text *\{)?[^{}$=]*\b(?:is|are|answer|equals)\b[ :]*(?:\}|(?=[^}]*$)) *:?(?=.*[0-9a-zA-Z])", ""),
    (rf"^[ :=]*(?:\\(?:approx|therefore){END})?[ =]*", ""),
    (rf"(?:\\text *\{{)? *\b({'|'.join(POWER_OF_TEN)})\b *\}}?", lambda m: rf" \cdot 10^{{{POWER_OF_TEN[m[1]]}}}"),
    (r"(?:\\text *\{)? *\bpercent\b *\}?", "%"),
    (r"(?:^|(?<=,)) *([A-Za-z][A-Za-z' .-]*?[a-z]{3}[A-Za-z' .-]*?) *(?=,|$)", r"\\text{\1}"),          # plain words
    (" +", " "),
]]
UNIT = re.compile(rf"(?<=[0-9a-zA-Z)}}\]!°])(?: *(?:/|\\cdot)? *{TEXT}(?: *\^ *(?:\{{ *-?[0-9] *\}}|[0-9]))?)+$|"
                  r"(?<=[0-9)}°]) *(?:[CF]|(?:[ckm]m|m */ *s|kg|ft|mph|min|sec|hrs?|rad| [a-z]{4,})(?: +[a-z]{2,})*"
                  r"(?: */ *[a-z]+)?(?:\^\{?[0-9]\}?)?)$")
NO_UNIT = re.compile(r"\b(?:is|are|if|when|where|for|not?|mod|with|times|choose|factorial|squared|cubed|"
                     r"hundred|dozen|to|more|less|than|at|least|most|[ap]\.?m)\b", re.I)


@functools.lru_cache(65_536)
def normalise(text):
    """One spelling for what is written in many ways; still LaTeX, but a row ends in a newline, a degree sign is °."""
    text = re.sub("[⁰¹²³⁴-⁹⁻]+", lambda m: "^{" + unicodedata.normalize("NFKC", m[0]).replace("−", "-") + "}", text)
    text = unicodedata.normalize("NFKC", text.translate(UNICODE))
    text = "".join(c for c in text if unicodedata.category(c) != "Cf")
    for pattern, new in RULES:
        text = pattern.sub(new, text)
    text = text.strip().rstrip(" .,;")
    unit = UNIT.search(text)
    if unit and re.search("[0-9]", text[:unit.start()]) and not NO_UNIT.search(unit[0]):
        return text[:unit.start()].rstrip()
    return text


# ---------------------------------------------------------------------------------------------------------- 3. judge
def same(a, b):
    """Are two trees the same answer?"""
    a, b = (tree[1] if tree[0] == "union" and len(tree) == 2 else tree for tree in (a, b))
    if a == b:
        return True
    if a[0] in FLIP and b[0] in FLIP:
        named = a[0] == b[0] == "=" and a[3] and b[3] and "+" not in a[3] + b[3]
        return named and same(a[2], b[2]) or proportional(a, b)
    if a[0] in FLIP:
        return bool(a[3]) and same(a[2], b)
    if b[0] in FLIP:
        return bool(b[3]) and "+" not in b[3] and same(a, b[2])  # m + n = 5 is an answer 5; as a gold it is a line
    kinds = {a[0], b[0]}
    if "named" in kinds and len(kinds) == 2 and len(a) == len(b):
        kind = (kinds - {"named"}).pop()
        a, b = ((kind, *(item[2] for item in tree[1:])) if tree[0] == "named" else tree for tree in (a, b))
        kinds = {kind} if kind in ("()", "set") else {kind, "named"}
    if not kinds & STRUCTURES:
        return same_value(a, b)
    if len(kinds) > 1 or len(a) != len(b) or kinds == {"base"}:
        return False
    if kinds == {"named"}:
        a, b = ([*sorted(tree[1:], key=lambda item: item[3])] for tree in (a, b))
        return all(x[3] == y[3] and same(x[2], y[2]) for x, y in zip(a, b))
    if not kinds & {"set", "union"}:
        return all(map(same, a[1:], b[1:]))
    left = list(b[1:])
    for item in a[1:]:
        found = next((k for k, other in enumerate(left) if same(item, other)), None)
        if found is None:
            return False
        del left[found]
    return True


NUMBER = re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)")
GROUPED = re.compile(r"(?<![0-9.,])[0-9]{1,3}(?:,[0-9]{3})+(?![0-9,])")
FAILURES = {Unreadable: "unparsed", Undefined: "undefined", ZeroDivisionError: "undefined", ValueError: "undefined",
            TooBig: "too_big", RecursionError: "too_big", OverflowError: "too_big"}


@functools.lru_cache(4096)
def read(text):
    r"""The trees that an answer may mean: `12,345` is a number, or else a list; `a \pm b` is two, tied to any \mp."""
    trees = []
    joined = GROUPED.sub(lambda m: m[0] if re.search(r"[(\[]|\\\{", text[:m.start()]) else m[0].replace(",", ""), text)
    for reading in dict.fromkeys((joined, text)):
        pieces = re.split(r"\\(pm|mp)(?![a-zA-Z])", reading)
        free = 1 if "mp" in pieces[1::2] else len(pieces) // 2
        limit("items", 2 ** free)
        items = []
        for signs in itertools.product((0, 1), repeat=free):
            marks = ["+-"[sign ^ (mark == "mp")] for mark, sign in zip(pieces[1::2], itertools.cycle(signs or (0,)))]
            tree = Parser("".join(piece + mark for piece, mark in zip(pieces[::2], [*marks, ""]))).whole()
            items += tree[1:] if tree[0] == "set" else [tree]
        trees.append(tree if not free else ("set", *dict.fromkeys(items)))
    return trees


def judge(predicted, gold):
    """(correct, status) of an extracted answer against one gold."""
    spent[0] = 0
    p, g = normalise(predicted), normalise(gold)
    if p and (p == g or fold(p) == fold(g) and r"\text" in p + g):
        return True, "ok"
    try:
        golds = read(g)
    except tuple(FAILURES):
        return None, "gold_unparsed"
    try:
        return any(same(a, b) for a in read(p) for b in golds), "ok"
    except tuple(FAILURES) as error:
        status = FAILURES[type(error)]
    try:
        spent[0] = 0
        any(same(TWO, b) for b in golds)  # has the gold a value, beside something harmless?
    except tuple(FAILURES):
        return None, "gold_unparsed"
    return False, status


def judge_any(predicted, golds):
    """Right if it is any of the golds; unknown if it is none of them and one could not be judged."""
    verdicts = [judge(predicted, gold) for gold in golds]
    return next((v for wanted in (True, None, False) for v in verdicts if v[0] is wanted), (None, "gold_unparsed"))


def golds_of(answer):
    return (answer,) if isinstance(answer, str) else tuple(answer)


def quick(predicted, golds):
    """The cheap cases, which are most of the traffic: True, False, or None if it takes more."""
    if predicted in golds:
        return True
    if not golds or not all(len(text) < 50 and NUMBER.fullmatch(text) for text in (predicted, *golds)):
        return None
    return any(Fraction(predicted) == Fraction(gold) for gold in golds)


def verify(response, answer):
    """Judge one response, in this process."""
    predicted, status = extract(response)
    if status:
        return Verdict(False, status, None)
    known = quick(predicted, golds_of(answer))
    return Verdict(*(judge_any(predicted, golds_of(answer)) if known is None else (known, "ok")), predicted)


# ----------------------------------------------------------------------------- 4. many, in processes that can be killed
class Pool:
    """Worker processes that stay alive between calls. Each is a fresh Python with a clean environment (nothing of
    torchrun, of CUDA, of a preloaded library), a memory limit and no torch, that answers pair by pair: so it is known
    at which pair it was. One that dies, or is longer than `seconds` at a pair, is killed; that pair is tried again
    alone, and only if it fails twice is it the guilty one. No other pair is lost."""

    KEPT = ("PATH", "HOME", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "PYTHONHOME", "PYTHONPATH", "SYSTEMROOT", "TMPDIR")

    def __init__(self, seconds=20, megabytes=512, limits=None):
        self.seconds, self.idle = seconds, []
        self.command = [sys.executable, "-m", "grading.verifier", "--worker", json.dumps([megabytes, limits or {}])]

    def start(self):
        kept = {name: os.environ[name] for name in self.KEPT if name in os.environ}
        worker = subprocess.Popen(self.command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True,
                                  env=kept | {"MPMATH_NOGMPY": "1", "OMP_NUM_THREADS": "1"})
        if worker.stdout.readline() != b"ready\n":
            raise RuntimeError(f"a verifier process does not start (exit code {worker.wait()}): {self.command}")
        return worker

    def stop(self, worker):
        worker.kill()
        worker.wait()
        worker.stdout.close()
        try:
            worker.stdin.close()
        except BrokenPipeError:
            pass                                                                # what it did not read any more

    def close(self):
        while self.idle:
            self.stop(self.idle.pop())

    def judge(self, jobs, workers, done=lambda k: None):
        """[(predicted, golds)…] -> [(correct, status)…]; done(k) is called as job k is judged."""
        verdicts, failures, busy = [None] * len(jobs), collections.Counter(), {}
        size = max(1, min(200, len(jobs) // (4 * workers)))
        queue = collections.deque(range(start, min(start + size, len(jobs))) for start in range(0, len(jobs), size))
        selector = selectors.DefaultSelector()

        def release(worker):
            selector.unregister(worker.stdout)
            return busy.pop(worker)

        def settle(k, verdict):
            verdicts[k] = verdict
            done(k)

        def lose(worker, status):
            guilty, *others = release(worker)[0]
            self.stop(worker)
            failures[guilty] += 1
            if failures[guilty] == 2:
                settle(guilty, (None, status))
            queue.extend([chunk for chunk in (others, [guilty] * (failures[guilty] < 2)) if chunk])

        try:
            while queue or busy:
                while queue and len(busy) < workers:
                    worker, chunk = self.idle.pop() if self.idle else self.start(), queue.popleft()
                    selector.register(worker.stdout, selectors.EVENT_READ, worker)
                    busy[worker] = [collections.deque(chunk), b"", time.monotonic() + self.seconds]
                    try:
                        worker.stdin.write(json.dumps([jobs[k] for k in chunk]).encode() + b"\n")
                        worker.stdin.flush()
                    except BrokenPipeError:  # it died since the last call; its end is read below
                        continue
                soonest = min(deadline for _, _, deadline in busy.values())
                for key, _ in selector.select(max(0.0, soonest - time.monotonic())):
                    worker, data = key.data, os.read(key.fd, 65_536)
                    if not data:
                        lose(worker, "crashed")
                        continue
                    pending, rest, _ = busy[worker]
                    *lines, rest = (rest + data).split(b"\n")
                    for line in lines:
                        settle(pending.popleft(), tuple(json.loads(line)))
                    busy[worker][1:] = rest, time.monotonic() + self.seconds
                    if not pending:
                        release(worker)
                        self.idle.append(worker)
                for worker in [w for w, (_, _, deadline) in busy.items() if deadline <= time.monotonic()]:
                    lose(worker, "timeout")
        finally:
            for worker in list(busy):  # only after an exception: its answers have no reader
                release(worker)
                self.stop(worker)
            selector.close()
        return verdicts


POOL, LOCK = Pool(), threading.Lock()
atexit.register(POOL.close)


def verify_many(pairs, workers=None, progress=None, pool=POOL):
    """verify() for an iterable of (response, answer), in order. Equal (predicted, answer) pairs are judged once; what
    takes more than a comparison of strings or plain numbers goes to `workers` processes (default: the cores, at most
    8; 0: this process). progress(n) is called as n more verdicts stand."""
    verdicts, places = [], collections.defaultdict(list)
    for response, answer in pairs:
        golds = golds_of(answer)
        predicted, status = extract(response)
        known = False if status else quick(predicted, golds)
        if known is None:
            places[predicted, golds].append(len(verdicts))
        verdicts.append(Verdict(known, status or "ok", predicted))
        if progress and known is not None:
            progress(1)
    jobs = list(places)

    def done(k):
        if progress:
            progress(len(places[jobs[k]]))

    workers = min(len(os.sched_getaffinity(0)), 8) if workers is None else workers
    if workers and jobs:
        with LOCK:
            judged = pool.judge(jobs, min(workers, -(-len(jobs) // 50)), done)
    else:
        judged = [(judge_any(*job), done(k))[0] for k, job in enumerate(jobs)]
    for (predicted, golds), (correct, status) in zip(jobs, judged, strict=True):
        for place in places[predicted, golds]:
            verdicts[place] = Verdict(correct, status, predicted)
    return verdicts


def serve(megabytes, limits):
    """A worker: lines of JSON [[predicted, golds]…] in, a line [correct, status] out for each pair as it is judged."""
    LIMITS.update(limits)
    sys.setrecursionlimit(max(1_000, min(10 * LIMITS["depth"], 10**8)))
    size = megabytes << 20
    resource.setrlimit(resource.RLIMIT_AS, (size, size))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    print("ready", flush=True)
    try:
        for line in sys.stdin:
            for predicted, golds in json.loads(line):
                print(json.dumps(judge_any(predicted, golds)), flush=True)
    except MemoryError:  # the state is not to be trusted any more
        sys.exit(f"error: a verifier process went over its {megabytes} MB, and is replaced")


if __name__ == "__main__":
    if sys.argv[1:2] != ["--worker"]:
        sys.exit("error: this is a library; use verify() and verify_many(), or 02_verify_score.py verify")
    serve(*json.loads(sys.argv[2]))
