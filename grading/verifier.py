r"""Is this answer right?

    verify(response, answer)             -> Verdict(correct, status, predicted)
    verify_many([(response, answer), …]) -> [Verdict, …] in order, judged in worker processes
    unreadable_golds([answer, …])        -> [answer, …] that no response can be judged against

`answer` is the gold answer, or a list of golds of which any will do. `correct` is True, False, or
None: the gold cannot be read, the two cannot be told apart, or the judge failed; nothing is known,
and that is not False. `status` says how the verdict came about:
    ok              an answer was read and judged
    no_think_end    False: no </think>, so the response never came to an answer
    no_box unbalanced_box empty_box too_long
                    False: nothing to judge in the last \boxed{} or \fbox{} after </think>
    unparsed undefined too_big
                    False: the answer cannot be read, has no value (1/0), or passes a limit
    gold_unparsed   None: the gold cannot be read, has no value, or passes a limit
    unknown         None: the gold is read in part (an ellipsis, text in an expression), or a letter
                    may be a function or a factor, or two numbers are too near to be told apart
    timeout crashed None: a worker process hung or died on this pair, twice

What counts as equal. The answer is spelled in one way (spelling.py), parsed (grammar.py), and
compared by structure; expressions as numbers (values.py).
  - A number equals only itself: 1/2 = 0.5 = 5e-1, 1\frac{4}{5} = 9/5, 0.\overline{3} = 1/3; but
    0.33 is not 1/3. `N%` equals N and N/100. `12,345` is a number, or else two; `12, 345` is two.
  - Declared units, currency and degree signs are dropped, not converted: 5 cm = 5 m = 5. Any other
    word makes the answer another one: 3 tenths, 204 lakh, 204 plus one. A letter that is a variable
    of the gold is none of its units. In \sin 30^\circ the degree counts.
  - `x = 5`, `x \in A`, `f(x) = 5` give their right side; `x = x` gives nothing; x = 5 is not y = 5.
    A chain gives its value if all its members have it; `22/7 \approx 3.14` gives both if the one is
    a rounding of the other to three figures at least. `q = 2, p = 5` is (5, 2), by name.
  - Lists, {…}, unions and ± are unordered and equal in size: `204 or 205` is not 204. (…) and […]
    are ordered, and their kind counts. (1)(3)(4) is a list of statements.
  - x < 2 is (-oo, 2); sets of reals are equal if their sorted pieces are. Matrices go by element;
    a : b and h:mm by part, unreduced; 204_5 by digits and base. 5 \pmod 7 is an answer 5.
  - Equations are equal if they have the same variables and their `left - right` are in a constant
    ratio at three points at least where both are real; so are inequalities, if its sign fits.
  - f(0), I(t) are values of a function, not products; n(n+1) is a product. Where h(a+b) may be
    either and that decides, the verdict is unknown.
  - Words are equal if their letters are, in either case; \text{(C) } 12 is the choice C. \log is
    \ln. An odd root of a negative number is real.
  - Variables are real: \sqrt{x^2} is |x|, not x; but \ln x^2 = 2 \ln x, since only points count
    where both are real. Inside floors, and in (-1)^n, n!! and sums up to n, they are whole numbers.
  - "for all x", "where c is a constant", "k \in Z" behind an answer are dropped.

The answer is hostile text. Nothing of it is executed. Every size, exponent and the work as a whole
are limited by count (LIMITS in values.py), not by a clock, so a verdict does not depend on the
machine. The worker processes, with a memory limit and a deadline, are the second wall.
"""
import atexit
import collections
import functools
import hashlib
import itertools
import json
import os
import re
import resource
import selectors
import signal
import subprocess
import sys
import threading
import time
from fractions import Fraction
from pathlib import Path

from grading.grammar import STRUCTURES, TOKEN, Parser, listed
from grading.spelling import fold, is_wordy, normalise, split_qualifier, split_unit
from grading.values import (FLIP, LIMITS, METER, TEXTS, Point, TooBig, Undefined, Unknown,
                            Unreadable, contains, limit, pieces, proportional, same_pieces,
                            same_value, sorted_tree, value, variables)

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
Verdict = collections.namedtuple("Verdict", "correct status predicted")


# --------------------------------------------------------------------------------------- 1. extract
BOX = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.S)


def extract(response):
    """What the last box after the last </think> holds (A36, A48): (predicted, None), or (None,
    status)."""
    end = response.rfind("</think>")
    if end < 0:
        return None, "no_think_end"
    tail = response[max(end, len(response) - LIMITS["tail"]):]
    is_box, last = [], (-1, -1)  # of each open brace: where the box starts, or -1
    for match in BOX.finditer(tail):
        if match[0] == "}" and is_box:
            start = is_box.pop()
            if start >= 0:
                last = (start, match.start())  # an outer box closes last, and wins
        elif match[0][-1] == "{" and len(match[0]) != 2:
            is_box.append(match.end() if len(match[0]) > 1 else -1)
    if max(is_box, default=-1) > last[0]:
        return None, "unbalanced_box"
    predicted = tail[last[0]:last[1]].strip()
    if last[0] < 0 or not predicted:
        return None, "no_box" if last[0] < 0 else "empty_box"
    return (None, "too_long") if len(predicted) > LIMITS["answer"] else (predicted, None)


# ------------------------------------------------------------------------------------------ 2. read
# What cannot be judged, and the status of an answer that is so.
FAILURES = {
    Unreadable: "unparsed",
    Undefined: "undefined", ZeroDivisionError: "undefined", ValueError: "undefined",
    TooBig: "too_big", RecursionError: "too_big", OverflowError: "too_big",
}
Reading = collections.namedtuple("Reading", "trees functions doubtful")
GROUPED = re.compile(r"(?<![0-9.,])[0-9]{1,3}(?:,[0-9]{3})+(?![0-9,])")
SMALL_ARRAY = re.compile(r"\( *\\begin *\{array\} *\{[lcr]\}"
                         r"([^&\n\\]*)\n([^&\n\\]*)\\end *\{array\} *\)")
DENOMINATOR = re.compile(r"/([A-Z][A-Za-z]|[a-z][A-Z])(?![A-Za-z(^_])")
PLUS_MINUS = re.compile(r"\\(pm|mp)(?![a-zA-Z])")


def ungrouped(text):
    """12,345 is 12345, except in brackets, where it is two."""
    def one(match):
        brackets = re.search(r"[(\[]|\\\{", text[:match.start()])
        return match[0] if brackets else match[0].replace(",", "")
    return GROUPED.sub(one, text)


def signs_of(text):
    r"""The texts that a \pm b stands for: two, each sign tied to that of any \mp; without a \mp the
    signs are free."""
    pieces_, marks = PLUS_MINUS.split(text)[::2], PLUS_MINUS.split(text)[1::2]
    free = 1 if "mp" in marks else len(marks)
    limit("items", 2 ** free)
    for choice in itertools.product("+-", repeat=free):
        signs = []
        for mark, sign in zip(marks, itertools.cycle(choice or "+")):
            signs.append(sign if mark == "pm" else "-+"[sign == "-"])
        yield "".join(piece + sign for piece, sign in zip(pieces_, [*signs, ""]))


@functools.lru_cache(4096)
def read(text, functions=frozenset(), factors=frozenset()):
    r"""The trees that an answer may mean: 12,345 is a number, or else a list; a \pm b is two
    values."""
    trees, found, sure = [], set(), set(functions)
    failure = None
    readings = (ungrouped(text), text, DENOMINATOR.sub(r"/(\1)", text),
                SMALL_ARRAY.sub(r"\\binom{\1}{\2}", text))
    for reading in dict.fromkeys(readings):
        try:
            items = []
            for signed in signs_of(reading):
                parser = Parser(signed, functions, factors)
                tree = parser.whole()
                if not parser.sure <= functions:  # u(t) - u(t-1): a function in both places
                    parser = Parser(signed, functions | parser.sure, factors)
                    tree = parser.whole()
                found |= parser.applied
                sure |= parser.functions
                items += tree[1:] if tree[0] == "set" else [tree]
        except tuple(FAILURES) as error:
            failure = failure or error
            continue
        trees.append(listed((",", *dict.fromkeys(items))) if PLUS_MINUS.search(reading) else tree)
    if not trees:
        raise failure
    return Reading(trees, frozenset(found), frozenset(found - sure))


Gold = collections.namedtuple("Gold", "text trees functions letters doubtful partial too_big")


@functools.lru_cache(4096)
def understand(text):
    """What a gold means, decided once for both sides: its trees, which letters are functions and
    which are variables."""
    clock = CLOCK.fullmatch(text)
    if clock and clock[4]:
        text = text[:clock.start(4)].partition("\\")[0]  # 7:55 p.m.; same_time() knows the rest
    if choice(text) and not CHOICE.fullmatch(text):
        text = CHOICE_AND_TEXT.fullmatch(text)["text"]  # (E) 5 is 5, too
    text = split_unit(split_qualifier(text)[0])[0]
    reading = read(text)
    trees, too_big, failure = [], False, None
    for tree in reading.trees:
        try:
            check(tree)
        except TooBig:
            too_big = True
        except tuple(FAILURES) as error:
            failure = error
            continue
        trees.append(tree)
    if not trees:
        raise failure
    letters = frozenset().union(*(variables(tree) for tree in trees))
    partial = any(tree[0] != "word" and has_text(tree) for tree in trees)
    return Gold(text, trees, reading.functions, letters - reading.functions, reading.doubtful,
                partial, too_big)


def has_text(tree):
    """Is there text inside an expression, which can be compared by its spelling only?"""
    if tree[0] in STRUCTURES or tree[0] in ("named", "chain"):
        parts = [part for part in tree[1:] if isinstance(part, tuple)]
        return any(part[0] != "word" and has_text(part) for part in parts)
    if tree[0] == "=" and tree[3]:
        return tree[2][0] != "word" and has_text(tree[2])
    return contains(tree, TEXTS)


def check(tree):
    """Raise what a gold without a value raises."""
    kind = tree[0]
    if kind in FLIP:
        if tree[3]:
            check(tree[2])
        elif not proportional(tree, tree):
            raise Undefined("an equation without a value")
    elif kind in STRUCTURES or kind in ("named", "either", "claim"):
        for part in tree[1:]:
            if isinstance(part, tuple) and kind != "base":
                check(part)
    elif kind != "dots":
        same_value(tree, tree)


# ----------------------------------------------------------------------------------------- 3. judge
def same(a, b):
    """Are two trees the same answer? `b` is the gold."""
    if a == b:
        return True
    if a[0] == "either":
        return same(a[1], b) or same(a[2], b)
    if a[0] == "claim":
        return bool(variables(a[1])) and same(a[2], b)             # v = \sqrt{2gh} = 14 is 14
    if b[0] in ("either", "claim"):
        return same(a, b[1]) or same(a, b[2])
    if a[0] in FLIP or b[0] in FLIP:
        return same_relation(a, b)
    a, b = (tree[1] if tree[0] == "union" and len(tree) == 2 else tree for tree in (a, b))
    if a[0] == "apply" and b[0] == "()" and a[1].isupper():
        a = ("()", *a[2:])                                         # P(2, 3) is a point
    if "mod" in (a[0], b[0]):
        return same_residue(a, b)
    if {a[0], b[0]} & {"union", "setminus"}:
        first, second = pieces(a), pieces(b)
        if first and second:
            return same_pieces(first, second)
    a, b = unnamed(a, b)
    if contains_dots(b):
        return same_sequence(a, b)
    if a[0] not in STRUCTURES and b[0] not in STRUCTURES:
        return same_value(a, b)
    if a[0] != b[0] or len(a) != len(b) or a[0] == "base":
        return False
    if a[0] == "named":
        return same_named(a, b)
    if a[0] in ("set", "union", "cases"):
        return same_items(a[1:], b[1:])
    return all(map(same, a[1:], b[1:]))


COORDINATES = {"x", "y", "z"}
ARGUMENT = re.compile(r"[a-zA-Z]\(([a-z])\)")                      # f(n) = n is f(x) = x
# \cos A = 1/2 is not A = 1/2, y' = x not y = x.
PART_OF_MEANING = re.compile(r"\\(?:sin|cos|tan|cot|dot|ddot|frac)(?![a-z])|'")
WIDE_NAME = re.compile(r"[A-Z]{2,3}")


def same_names(a, b):
    """May two named values be the same? Names differ freely (v = 5, v_0 = 5), but x = 5 is not y =
    5, and PV = nRT not P = nRT."""
    first, second = a[3], b[3]
    if first == second:
        return bool(first)
    if not first or not second or "+" in first + second or {first, second} <= COORDINATES:
        return False
    if PART_OF_MEANING.search(first) or PART_OF_MEANING.search(second):
        return False
    return not variables(b[2]) or not WIDE_NAME.fullmatch(first) and not WIDE_NAME.fullmatch(second)


def renamed(tree, old, new):
    """The tree with another letter for one of its variables."""
    if tree == ("sym", old):
        return ("sym", new)
    return tuple(renamed(child, old, new) if isinstance(child, tuple) else child for child in tree)


def same_relation(a, b):
    """y = 2x against 2x - y = 0, or against 2x; m + n = 5 is an answer 5, but as a gold it is a
    line."""
    if a[0] in FLIP and b[0] in FLIP:
        if a[0] == b[0] == "=" and same_names(a, b):
            letters = ARGUMENT.fullmatch(a[3]), ARGUMENT.fullmatch(b[3])
            if all(letters) and letters[1][1] not in variables(a[2]):
                a = renamed(a, letters[0][1], letters[1][1])
            given = a[2]
            if same(given, b[2]):
                return True
        return proportional(a, b)
    if a[0] in FLIP:
        return bool(a[3]) and same(a[2], b)
    return bool(b[3]) and "+" not in b[3] and same(a, b[2])


def same_residue(a, b):
    """5 (mod 7) is an answer 5, but as a gold it is every number with that residue."""
    if b[0] != "mod":
        return is_residue(a) and same(a[1], b)
    if a[0] != "mod" or not same(a[2], b[2]):
        return False
    steps = value(("/", ("+", a[1], ("neg", b[1])), b[2]), Point(0))
    return isinstance(steps, Fraction) and steps.denominator == 1


def is_residue(tree):
    """5 (mod 7) and 5 (mod p) are, 204 (mod 5) is not, nor n mod 2: that is a remainder, not n."""
    if variables(tree[1]):
        return False
    if variables(tree[2]):
        return True
    residue, modulus = (value(part, Point(0)) for part in tree[1:])
    if not isinstance(residue, Fraction) or not isinstance(modulus, Fraction):
        return False
    return abs(residue) < abs(modulus)


def unnamed(a, b):
    """Without the names on one side, if the other has none: p = 5, q = 2 against (5, 2) or 5, 2."""
    if a[0] == "named" and b[0] in ("()", "set"):
        return (b[0], *(item[2] for item in a[1:])), b
    if b[0] == "named" and a[0] in ("()", "set"):
        return a, (a[0], *(item[2] for item in b[1:]))
    return a, b


def same_named(a, b):
    first = sorted(a[1:], key=lambda item: item[3])
    second = sorted(b[1:], key=lambda item: item[3])
    return all(x[3] == y[3] and same(x[2], y[2]) for x, y in zip(first, second))


def same_items(a, b):
    """Is each item of one list in the other, in any order?"""
    left = list(b)
    for item in a:
        found = next((k for k, other in enumerate(left) if same(item, other)), None)
        if found is None:
            return False
        del left[found]
    return True


def contains_dots(tree):
    return tree[0] in STRUCTURES and any(part == ("dots",) for part in tree[1:])


def same_sequence(a, b):
    """A gold with an ellipsis: right if the answer shows the same items, wrong if it begins or ends
    otherwise or is shorter than what the gold shows, else unknown."""
    items = a[1:] if a[0] in STRUCTURES else (a,)
    shown = [item for item in b[1:] if item != ("dots",)]
    if a[0] not in (b[0], "set", "()") or ("dots",) not in items and len(items) <= len(shown):
        return False
    if differ_from_start(items, b[1:]) or differ_from_start(items[::-1], b[:0:-1]):
        return False
    if len(items) == len(b) - 1 and all(map(same, items, b[1:])):
        return True
    raise Unknown("an ellipsis")


def differ_from_start(first, second):
    """Do two lists differ before the ellipsis of either?"""
    for x, y in zip(first, second):
        if ("dots",) in (x, y):
            return False
        if not same(x, y):
            return True
    return False


CHOICE = re.compile(r"\(? *([A-J]) *\)?")
CHOICE_AND_TEXT = re.compile(
    r"(?:\\text *\{ *)?(?:\( *([A-J]) *\)|([A-J]) *[).:])(?: *\})?(?![A-Za-z+*/^=-])"
    r"(?P<text>.*)", re.S)
OTHER_CHOICE = re.compile(r"\(? *\b[A-J] *[).]|\\l?or\b|\\land\b|,|\b(?:or|and|not|nor|but)\b")


def choice(text):
    """The letter of '(C)', '(C) 12' or 'C. \\frac34', if one option is named and no other."""
    alone = CHOICE.fullmatch(text)
    if alone:
        return alone[1]
    found = CHOICE_AND_TEXT.fullmatch(text)
    if not found or OTHER_CHOICE.search(found["text"]):
        return None
    return found[1] or found[2]


CLOCK = re.compile(r"([0-9]{1,2}) *: *([0-9]{2})(?: *: *([0-9]{2}))? *"
                   r"(?:\\text *\{ *)?([ap]\.? *m)?\.? *\}?", re.I)


def same_time(p, g):
    """Times of the day, one of them with a.m. or p.m.: 3:00 p.m. is 15:00 or 3:00, not 3:00 a.m.
    None if they are not."""
    first, second = CLOCK.fullmatch(p), CLOCK.fullmatch(g)
    if not first or not second or not (first[4] or second[4]):
        return None
    halves = [match[4][0].lower() if match[4] else "" for match in (first, second)]
    minutes = [60 * int(match[1]) + int(match[2]) for match in (first, second)]
    if first[3] != second[3]:
        return False
    if minutes[0] == minutes[1] and (halves[0] == halves[1] or "" in halves):
        return True
    in_day = [m % 720 + 720 * (half == "p") if half else m for m, half in zip(minutes, halves)]
    return in_day[0] == in_day[1]


@functools.lru_cache(4096)
def spelled(text):
    """The tokens of a text, without braces around a single sign: x_{1} is x_1, but \\frac{1}{23} is
    not \\frac 1 23."""
    return re.sub(r"\{ (\S|\\[a-zA-Z]+) \}", r"\1", " ".join(TOKEN.findall(text)))


def judge_text(p, g):
    """True or False if two normalised answers can be judged by their text; else None."""
    if p and (p == g or spelled(p) == spelled(g)):
        return True
    if p and (is_wordy(p) or is_wordy(g)) and fold(p) == fold(g):
        return True
    if choice(p) and choice(g):
        return choice(p) == choice(g)
    return same_time(p, g)


def judge(predicted, gold):
    """(correct, status) of an extracted answer against one gold; of no answer (None): can the gold
    be judged?"""
    METER.restart()
    if predicted is None:
        return judge_gold(gold)
    p, g = normalise(predicted), normalise(gold)
    known = judge_text(p, g)
    if known is not None:
        return known, "ok"
    try:
        meant = understand(g)
    except Unknown:
        return None, "unknown"
    except tuple(FAILURES):
        return None, "gold_unparsed"
    METER.restart()
    try:
        right = equal(p, meant)
        return (right, "ok") if right or not meant.too_big else (None, "gold_unparsed")
    except Unknown:
        return None, "unknown"
    except tuple(FAILURES) as error:
        return False, FAILURES[type(error)]


def judge_gold(gold):
    """(True, "ok") if any answer can be judged against this gold, else (None, why not)."""
    try:
        meant = understand(normalise(gold))
    except Unknown:
        return None, "unknown"
    except tuple(FAILURES):
        return None, "gold_unparsed"
    if meant.too_big:
        return None, "gold_unparsed"
    return (None, "unknown") if meant.partial else (True, "ok")


def equal(p, gold):
    """Does a normalised answer say what the gold says? Its letters are what they are in the
    gold."""
    body = split_qualifier(p)[0]
    number, unit = split_unit(body)
    if unit and not set(re.findall("[a-zA-Z]", unit)) & gold.letters:
        body = number
    answer = read(body, gold.functions, gold.letters)
    if gold.too_big:
        return any(sorted_tree(a) == sorted_tree(b) for a in answer.trees for b in gold.trees)
    if any(same(a, b) for a in answer.trees for b in gold.trees):
        return True
    doubtful = gold.doubtful | answer.doubtful
    if doubtful:  # h(a+b): a function, or a product after all?
        factors = gold.letters | doubtful
        products = read(gold.text, gold.functions - doubtful, factors).trees
        answers = read(body, gold.functions - doubtful, factors).trees
        if any(same(a, b) for a in answers for b in products):
            raise Unknown("a letter that is a function or a factor")
    return False


def judge_any(predicted, golds):
    """Right if it is any of the golds; unknown if it is none of them and one could not be
    judged."""
    verdicts = [judge(predicted, gold) for gold in golds]
    for wanted in (True, None, False):
        for verdict in verdicts:
            if verdict[0] is wanted:
                return verdict
    return None, "gold_unparsed"


def golds_of(answer):
    return (answer,) if isinstance(answer, str) else tuple(answer)


NUMBER = re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)")


def quick(predicted, golds):
    """The cheap cases, which are most of the traffic: True, False, or None if it takes more."""
    if predicted in golds:
        return True
    texts = (predicted, *golds)
    if not golds or not all(len(text) < 50 and NUMBER.fullmatch(text) for text in texts):
        return None
    return any(Fraction(predicted) == Fraction(gold) for gold in golds)


def verify(response, answer):
    """Judge one response, in this process: one judge for every stage (A8)."""
    predicted, status = extract(response)
    if status:
        return Verdict(False, status, None)
    known = quick(predicted, golds_of(answer))
    if known is not None:
        return Verdict(known, "ok", predicted)
    return Verdict(*judge_any(predicted, golds_of(answer)), predicted)


# --------------------------------------------------------- 4. many, in processes that can be killed
class Work:
    """What a worker is busy with: the places of the pairs that it has not judged, a half-read line,
    a deadline."""

    def __init__(self, chunk, seconds):
        self.pending = collections.deque(chunk)
        self.rest = b""
        self.seconds = seconds
        self.extend()

    def extend(self):
        self.deadline = time.monotonic() + self.seconds

    def lines(self, data):
        """The whole lines that have come in."""
        *lines, self.rest = (self.rest + data).split(b"\n")
        return lines


class Pool:
    """Worker processes that stay alive between calls. Each is a fresh Python with a clean
    environment (nothing of torchrun, of CUDA, of a preloaded library), a memory limit and no torch,
    that answers pair by pair: so it is known at which pair it was. One that dies, or is longer than
    `seconds` at a pair, is killed; that pair is tried again alone, and only if it fails twice is it
    the guilty one. No other pair is lost."""

    KEPT = ("PATH", "HOME", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "PYTHONHOME", "PYTHONPATH",
            "SYSTEMROOT", "TMPDIR")

    def __init__(self, seconds=20, megabytes=512, limits=None):
        self.seconds = seconds
        self.idle = []
        settings = json.dumps([megabytes, limits or {}])
        self.command = [sys.executable, "-m", "grading.verifier", "--worker", settings]

    def start(self):
        kept = {name: os.environ[name] for name in self.KEPT if name in os.environ}
        kept |= {"MPMATH_NOGMPY": "1", "OMP_NUM_THREADS": "1"}
        command = [*self.command, str(os.getpid())]
        worker = subprocess.Popen(command, cwd=ROOT, env=kept, start_new_session=True,
                                  stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        if worker.stdout.readline() != b"ready\n":
            code = worker.wait()
            raise RuntimeError(f"a verifier process does not start (exit code {code}): {command}")
        return worker

    def stop(self, worker):
        worker.kill()
        worker.wait()
        worker.stdout.close()
        try:
            worker.stdin.close()
        except BrokenPipeError:
            pass                                                   # what it did not read any more

    def close(self):
        while self.idle:
            self.stop(self.idle.pop())

    def judge(self, jobs, workers):
        """[(predicted, golds)…] -> [(correct, status)…]"""
        size = max(1, min(200, len(jobs) // (4 * workers)))
        places = range(len(jobs))
        queue = collections.deque(places[start:start + size] for start in places[::size])
        verdicts = [None] * len(jobs)
        failures = collections.Counter()
        busy = {}                                                  # worker -> Work
        with selectors.DefaultSelector() as selector:
            try:
                while queue or busy:
                    while queue and len(busy) < workers:
                        chunk = queue.popleft()
                        worker = self.send([jobs[k] for k in chunk])
                        busy[worker] = Work(chunk, self.seconds)
                        selector.register(worker.stdout, selectors.EVENT_READ, worker)
                    for worker, status in self.receive(selector, busy, verdicts):
                        selector.unregister(worker.stdout)
                        work = busy.pop(worker)
                        if status == "done":
                            self.idle.append(worker)
                            continue
                        self.stop(worker)
                        queue.extend(retries(work.pending, status, failures, verdicts))
            finally:
                for worker in busy:  # only after an exception: nobody reads their answers
                    self.stop(worker)
        return verdicts

    def send(self, pairs):
        """A worker that has been given the pairs."""
        worker = self.idle.pop() if self.idle else self.start()
        try:
            worker.stdin.write(json.dumps(pairs).encode() + b"\n")
            worker.stdin.flush()
        except BrokenPipeError:
            pass  # it died since the last call: receive() reads its end
        return worker

    def receive(self, selector, busy, verdicts):
        """Wait for answers, and note them; [(worker, status)…] of those that are done, crashed or
        too slow."""
        ended = []
        soonest = min(work.deadline for work in busy.values())
        for key, _ in selector.select(max(0.0, soonest - time.monotonic())):
            work = busy[key.data]
            data = os.read(key.fd, 65_536)
            if not data:
                ended.append((key.data, "crashed"))
                continue
            for line in work.lines(data):
                verdicts[work.pending.popleft()] = tuple(json.loads(line))
            work.extend()
            if not work.pending:
                ended.append((key.data, "done"))
        known = [worker for worker, _ in ended]
        for worker, work in busy.items():
            if work.deadline <= time.monotonic() and worker not in known:
                ended.append((worker, "timeout"))
        return ended


def retries(pending, status, failures, verdicts):
    """The chunks to try again after a worker was lost at the first of its pending pairs: the others
    together, and that one alone, unless it is the second time."""
    guilty, *others = pending
    failures[guilty] += 1
    if failures[guilty] == 2:
        verdicts[guilty] = (None, status)
        return [others] if others else []
    return [others, [guilty]] if others else [[guilty]]


POOL = Pool()
LOCK = threading.Lock()
atexit.register(POOL.close)


def n_cores():
    return min(len(os.sched_getaffinity(0)), 8)


def verify_many(pairs, workers=None, pool=POOL):
    """verify() for an iterable of (response, answer), in order. Equal (predicted, answer) pairs are
    judged once; what takes more than a comparison of strings or plain numbers goes to `workers`
    processes (default: the cores, at most 8; 0: this process)."""
    verdicts = []
    places = collections.defaultdict(list)  # (predicted, golds) -> where it stands
    for response, answer in pairs:
        golds = golds_of(answer)
        predicted, status = extract(response)
        known = False if status else quick(predicted, golds)
        if known is None:
            places[predicted, golds].append(len(verdicts))
        verdicts.append(Verdict(known, status or "ok", predicted))
    jobs = list(places)
    for job, (correct, status) in zip(jobs, judge_jobs(jobs, workers, pool), strict=True):
        for place in places[job]:
            verdicts[place] = Verdict(correct, status, job[0])
    return verdicts


def judge_jobs(jobs, workers=None, pool=POOL):
    """[(predicted, golds)…] -> [(correct, status)…], in worker processes or in this one."""
    workers = n_cores() if workers is None else workers
    if not jobs or not workers:
        return [judge_any(*job) for job in jobs]
    with LOCK:
        return pool.judge(jobs, min(workers, -(-len(jobs) // 50)))


def unreadable_golds(answers, workers=None, pool=POOL):
    """The answers (as given, in order; each a gold or a list of golds) that cannot be judged: a
    gold of theirs cannot be read, has no value, passes a limit, or is read only in part (text
    inside an expression, an ellipsis), so that a wrong response to it would be unknown."""
    distinct = list(dict.fromkeys(gold for answer in answers for gold in golds_of(answer)))
    # A gold and no answer: the worker says whether the gold can be judged.
    jobs = [(None, (gold,)) for gold in distinct]
    verdicts = judge_jobs(jobs, workers, pool)
    readable = {gold for gold, (known, _) in zip(distinct, verdicts) if known}
    return [answer for answer in answers
            if not golds_of(answer) or not readable.issuperset(golds_of(answer))]


def grader_name() -> str:
    """Verdicts are only comparable under one grader, so it is named by its source."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return f"grading/verifier.py {digest.hexdigest()[:12]}"


# ----------------------------------------------------------------------------- 5. the worker's side
def requests(parent):
    """Lines from standard input until it ends, or until the parent is gone while others keep its
    end of the pipe."""
    data = b""
    with selectors.DefaultSelector() as selector:
        selector.register(0, selectors.EVENT_READ)
        while os.getppid() == parent:
            if not selector.select(2.0):
                continue
            more = os.read(0, 1 << 20)
            if not more:
                return
            *lines, data = (data + more).split(b"\n")
            yield from map(json.loads, lines)


def serve(megabytes, limits, parent):
    """A worker: lines of JSON [[predicted, golds]…] in, a line [correct, status] out for each pair
    as it is judged."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which decides
    LIMITS.update(limits)
    sys.setrecursionlimit(max(1_000, min(10 * LIMITS["depth"], 10**8)))
    size = megabytes << 20
    resource.setrlimit(resource.RLIMIT_AS, (size, size))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        print("ready", flush=True)
        for pairs in requests(parent):
            for predicted, golds in pairs:
                print(json.dumps(judge_any(predicted, golds)), flush=True)
    except BrokenPipeError:                                        # the parent is gone
        os._exit(0)
    except MemoryError:  # the state is not to be trusted any more
        sys.exit(f"error: a verifier process went over its {megabytes} MB, and is replaced")


if __name__ == "__main__":
    if sys.argv[1:2] != ["--worker"]:
        sys.exit("error: this is a library; use verify(), or 02_verify_score.py verify")
    serve(*json.loads(sys.argv[2]), int(sys.argv[3]))
