"""What the trees of grammar.py are worth, and whether two are worth the same: the arithmetic of
verifier.py.

Rationals are exact. Other numbers are computed twice, the second time with so many digits that the
smallest number in the expression could not hide behind the largest. Variables take random values at
several points; a verdict "equal" needs agreement at three of them at least, where both sides exist.
Sets of reals are compared as sorted intervals.

A tree is a tuple of an operation and its parts: ("num", Fraction), ("sym", name), ("+", a, b, …);
grammar.py lists them.
"""
import functools
import math
import random
from fractions import Fraction

from mpmath import mp

from grading.spelling import FUNCTIONS

LIMITS = {
    "tail": 20_000,          # characters of a response, from its end
    "answer": 2_000,         # characters of an answer
    "tokens": 1_500,
    "depth": 60,             # brackets and operators inside each other
    "items": 40,             # of a list, a matrix, a chain
    "bits": 200_000,         # of a rational number
    "digits": 4_000,         # of the precision that tells two values apart
    "factorial": 5_000,
    "exponent": 10**8,
    "terms": 1_000,          # of a sum
    "work": 10_000,          # operations
}


class Unreadable(Exception):
    """The text is not an answer that the grammar knows."""


class Undefined(Exception):
    """The expression has no value, or none at enough points."""


class TooBig(Exception):
    """A limit is passed."""


class Unknown(Exception):
    """Two answers that can be neither called equal nor told apart."""


def limit(name, amount):
    if amount > LIMITS[name]:
        raise TooBig(name)


# -------------------------------------------------------------------------------------------- trees
CONSTANTS = {"e": lambda: +mp.e, r"\pi": lambda: +mp.pi, "i": lambda: mp.mpc(0, 1)}
NO_NUMBERS = {r"\infty", r"\emptyset", r"\Z", r"\N", r"\Q", r"\C"}  # symbols without a value
TEXTS = {"word", "opaque", "dots"}  # equal to themselves only
LEAVES = {"num", "base"} | TEXTS
INTERVALS = {"()", "(]", "[)", "[]"}
INFINITY = ("sym", r"\infty")
MINUS_INFINITY = ("neg", INFINITY)
FLIP = {"<": ">", ">": "<", r"\le": r"\ge", r"\ge": r"\le", r"\ne": r"\ne", "=": "="}


def symbols(tree):
    """The names in a tree, of constants and functions too."""
    if tree[0] in LEAVES:
        return set()
    if tree[0] == "sym":
        return {tree[1]}
    found = {tree[1]} if tree[0] == "apply" else set()
    for child in tree[1:]:
        if isinstance(child, tuple):
            found |= symbols(child)
    return found


def variables(tree):
    return symbols(tree) - CONSTANTS.keys() - {r"\infty"}


def contains(tree, kinds):
    """Is there an operation of one of these kinds in the tree?"""
    if tree[0] in kinds:
        return True
    return any(isinstance(child, tuple) and contains(child, kinds) for child in tree[1:])


# --------------------------------------------------------------------------------------- operations
class Meter:
    """What one judgement has spent, and the binary exponents of the largest and smallest number it
    came across."""

    def __init__(self):
        self.restart()

    def restart(self):
        self.spent = 0
        self.cost = 1                    # of an operation at the present precision
        self.reset_range()

    def reset_range(self):
        self.high = 0
        self.low = 0

    def charge(self, work):
        self.spent += work * self.cost
        limit("work", self.spent)

    def note(self, exponent):
        self.high = max(self.high, exponent)
        self.low = min(self.low, exponent)


METER = Meter()


def bits(x):
    """The size of a rational number."""
    return max(x.numerator.bit_length(), x.denominator.bit_length())


def charged(result, work=1):
    """The result of an operation, after its size and its work are counted."""
    if isinstance(result, Fraction):
        limit("bits", bits(result))
        METER.charge(work + (bits(result) // 2000) ** 2)
        if result:
            METER.note(result.numerator.bit_length() - result.denominator.bit_length())
    elif isinstance(result, (mp.mpf, mp.mpc)):
        METER.charge(work)
        if not mp.isfinite(result):
            raise Undefined("infinite")
        if result:
            METER.note(int(mp.mag(result)))
    else:
        METER.charge(work)
    return result


def lift(*values):
    """Rationals stay exact among themselves; beside anything else they become numbers of the
    current precision."""
    if all(isinstance(v, Fraction) for v in values):
        return values
    return tuple(inexact(v) for v in values)


def inexact(x):
    return mp.mpf(x.numerator) / x.denominator if isinstance(x, Fraction) else x


def is_whole(x):
    return isinstance(x, Fraction) and x.denominator == 1


def add(*terms):
    return functools.reduce(lambda a, b: charged(a + b), lift(*terms))


def multiply(*factors):
    return functools.reduce(lambda a, b: charged(a * b), lift(*factors))


def reciprocal(x):
    if x == 0:
        raise Undefined("division by zero")
    return 1 / x


def divide(a, b):
    return multiply(a, reciprocal(b))


def power(base, exponent):
    whole = is_whole(exponent)
    if isinstance(base, mp.matrix) or isinstance(exponent, mp.matrix):
        if not whole or not 0 <= exponent <= 50:
            raise Unreadable("a power of a matrix")
        return base ** int(exponent)
    if base == 0:
        if isinstance(exponent, mp.mpc) or exponent <= 0:
            raise Undefined("zero to the power of zero or less")
        return Fraction(0)
    if whole and isinstance(base, Fraction):
        limit("bits", abs(exponent) * bits(base))
        return base ** int(exponent)
    odd_root = isinstance(exponent, Fraction) and exponent.denominator % 2
    if odd_root and not isinstance(base, mp.mpc) and base < 0:
        return power(-base, exponent) * (-1) ** (exponent.numerator % 2)
    base, exponent = inexact(base), inexact(exponent)
    limit("exponent", abs(exponent * mp.log(base)))
    return mp.power(base, exponent)


def factorial(x):
    limit("factorial", abs(x))
    if not is_whole(x):
        return mp.gamma(inexact(x) + 1)
    if x < 0:
        raise Undefined("the factorial of a negative number")
    return charged(Fraction(math.factorial(int(x))), int(x) // 10)


def double_factorial(x):
    """9!! = 9·7·5·3·1."""
    limit("factorial", abs(x))
    if not is_whole(x) or x < -1:
        raise Undefined("a double factorial of what is no whole number")
    product = Fraction(1)
    for factor in range(int(x), 1, -2):
        product = charged(product * factor)
    return product


def binomial(n, k):
    if is_whole(n) and is_whole(k) and 0 <= k <= n:
        limit("bits", min(k, n - k) * int(n).bit_length())
        return charged(Fraction(math.comb(int(n), int(k))), int(min(k, n - k)) // 10)
    limit("factorial", abs(n) + abs(k))
    return mp.binomial(inexact(n), inexact(k))


def rounded(name):
    """Floor or ceiling; what is within the precision of an integer is that integer, so that
    floor(log_2 8) is 3."""
    def function(x):
        if isinstance(x, Fraction):
            return Fraction(getattr(math, name)(x))
        if isinstance(x, mp.mpc):
            raise Undefined("the floor of a complex number")
        limit("digits", max(0, mp.mag(x)) // 3)
        nearest = mp.nint(x)
        if abs(x - nearest) <= mp.mpf(10) ** (-mp.dps // 2):
            return Fraction(int(nearest))
        return Fraction(int(getattr(mp, name)(x)))
    return function


def whole_numbers(name):
    """gcd and lcm, of integers."""
    def function(*xs):
        if not all(map(is_whole, xs)):
            raise Undefined(f"{name} of what are no integers")
        return Fraction(getattr(math, name)(*map(int, xs)))
    return function


def extreme(choose):
    def function(*xs):
        if any(isinstance(x, mp.mpc) for x in xs):
            raise Undefined("the largest of complex numbers")
        return choose(lift(*xs))
    return function


def numeric(name):
    def function(x):
        limit("exponent", abs(x) if name not in ("ln", "log10") else 0)
        return getattr(mp, name)(inexact(x))
    return function


def cis(x):
    limit("exponent", abs(x))
    return mp.expj(inexact(x))


def matrix(n, *cells):
    return mp.matrix([[*map(inexact, cells[i:i + int(n)])] for i in range(0, len(cells), int(n))])


def percent(x):
    return multiply(x, Fraction(1, 100))


def degree(x):
    return inexact(x) * mp.pi / 180


def negative(x):
    return -x


OPERATIONS = {
    "+": add, "*": multiply, "/": divide, "inv": reciprocal, "neg": negative, "abs": abs,
    "^": power, "!": factorial, "!!": double_factorial, "binomial": binomial,
    "floor": rounded("floor"), "ceil": rounded("ceil"),
    "det": mp.det, "percent": percent, "degree": degree, "matrix": matrix, "cis": cis,
    "gcd": whole_numbers("gcd"), "lcm": whole_numbers("lcm"),
    "max": extreme(max), "min": extreme(min),
}
for function_name in {*FUNCTIONS.values(), "asinh", "acosh", "atanh"} - OPERATIONS.keys():
    OPERATIONS[function_name] = numeric(function_name)


# ------------------------------------------------------------------------------------------- points
# Of the points; the first three are positive, the fourth negative, those from the eighth on are for
# functions of a narrow domain.
SCALES = [Fraction(scale) for scale in "1 7 1/5 1 1 3 2 1/20 40 1/2 5 200 1/100 1000".split()]
USUAL_POINTS = 7
WANTED = 3                                                        # points that must agree
INTEGER_POINTS = 20


class Point(dict):
    """A value for every variable, a pure function of the number of the point and the name."""

    def __init__(self, number, largest=0, **bound):
        super().__init__(bound)
        self.number = number
        self.largest = largest  # 0: real; else whole numbers from 1 to this
        self.drawn = False

    def __missing__(self, name):
        rng = random.Random(f"{name} {self.number} {self.largest}")
        self.drawn = True
        if self.largest:
            self[name] = Fraction(rng.randint(1, self.largest))
            return self[name]
        sign = 1 if self.number < 3 else -1 if self.number == 3 else rng.choice((1, -1))
        self[name] = sign * SCALES[self.number] * Fraction(rng.randint(600, 2000), 997)
        return self[name]

    def function(self, name, *args):
        """The value of a function that is not known: a polynomial of its own for each name and
        point."""
        rng = random.Random(f"{name}() {self.number}")
        terms = [Fraction(rng.randint(1, 50), 7)]
        for x in args:
            factor = Fraction(1)
            for _ in range(5):
                factor = multiply(factor, x)
                terms.append(multiply(factor, Fraction(rng.randint(-50, 50) or 51, 7)))
        if len(args) > 1:
            terms.append(multiply(*args))
        self.drawn = True  # it has another value at another point
        return add(*terms)


def value(tree, point):
    """A Fraction while all is rational, else an mpf, mpc or matrix of the current precision."""
    kind, *args = tree
    if kind == "num":
        return charged(args[0])
    if kind == "sym":
        if args[0] in CONSTANTS and args[0] not in point:
            return CONSTANTS[args[0]]()
        if args[0] in NO_NUMBERS:
            raise Undefined(f"{args[0]} in an expression")
        return point[args[0]]
    if kind in ("sum", "prod"):
        return series(kind, *args, point)
    if kind == "int":
        return integral(*args, point)
    if kind in ("word", "opaque", "dots"):
        raise Undefined(f"{kind} in an expression")
    if kind == "apply":
        return point.function(args[0], *(value(arg, point) for arg in args[1:]))
    if kind not in OPERATIONS:
        raise Unreadable(f"{kind} is not a number")
    values = [value(arg, point) for arg in args]
    matrices = sum(isinstance(v, mp.matrix) for v in values)
    sum_of_matrices = kind == "+" and matrices == len(values)
    if matrices and kind not in ("*", "^", "neg", "det") and not sum_of_matrices:
        raise Unreadable(f"{kind} of a matrix")
    try:
        result = OPERATIONS[kind](*values)
    except TypeError as error:  # mpmath's, for the order of complex numbers
        raise Undefined(f"{kind}: {error}") from error
    return charged(result, 8 if kind == "^" or kind in FUNCTIONS else 1)


def bound_value(body, name, number, point):
    """The value of `body` where the bound variable is `number`."""
    inner = Point(point.number, point.largest, **{name: number})
    result = value(body, inner)
    point.drawn = point.drawn or inner.drawn
    return result


def series(kind, variable, low, high, body, point):
    low, high = value(low, point), value(high, point)
    if not is_whole(low) or not is_whole(high):
        raise Undefined("bounds that are not integers")
    limit("terms", high - low + 1)
    terms = []
    for k in range(int(low), int(high) + 1):
        terms.append(bound_value(body, variable[1], Fraction(k), point))
    return OPERATIONS["+" if kind == "sum" else "*"](Fraction(kind == "prod"), *terms)


# Newton and Cotes on nine points, exact for polynomials of degree nine; in so many panels that
# another body comes within the part in a hundred at which an integral is called unknown.
PANELS = 4
WEIGHTS = (989, 5888, -928, 10496, -4540, 10496, -928, 5888, 989)     # parts of 28,350


def integral(variable, low, high, body, point):
    low, high = value(low, point), value(high, point)
    width = add(high, -low)
    terms = []
    for panel in range(PANELS):
        for k, weight in enumerate(WEIGHTS):
            x = add(low, multiply(width, Fraction(8 * panel + k, 8 * PANELS)))
            height = bound_value(body, variable[1], x, point)
            terms.append(multiply(Fraction(weight, 28_350 * PANELS), height))
    return multiply(width, add(*terms))


# ----------------------------------------------------------------------------------------- equality
def entries(x):
    return list(x) if isinstance(x, mp.matrix) else [inexact(x)]


def shape(x):
    return (x.rows, x.cols) if isinstance(x, mp.matrix) else None


def agree(first, second):
    """Do two computations give the same value, and are both real?

    Rationals are compared exactly. Else the difference must vanish at a precision at which the
    smallest number of the computation is still seen beside the largest: this tells e^{100} from
    e^{100} + 10^{-300}, and sin(pi) from 1e-50.
    """
    with mp.workdps(50):
        METER.reset_range()
        a, b = first(), second()
        if isinstance(a, Fraction) and isinstance(b, Fraction):
            return a == b, True
        if shape(a) != shape(b):
            return False, True
        pairs = list(zip(entries(a), entries(b)))
        real = all(abs(mp.im(x)) <= mp.mpf(10) ** -40 * abs(x) for pair in pairs for x in pair)
        largest = mp.mpf(2) ** METER.high
        if first is second:
            return True, real
        if differ(pairs, largest * mp.mpf(10) ** -40):
            return False, real
        digits = 100 + 4 * int(0.302 * (METER.high - METER.low))
    if digits > LIMITS["digits"]:
        raise Unknown("too near to be told apart")
    METER.cost = max(1, digits // 100)
    try:
        with mp.workdps(digits):
            pairs = list(zip(entries(first()), entries(second())))
            return not differ(pairs, largest * mp.mpf(10) ** -(digits * 6 // 10)), real
    finally:
        METER.cost = 1


def agree_at(point, first, second):
    here = functools.partial(first, point)
    return agree(here, here if first is second else functools.partial(second, point))


def differ(pairs, smallest):
    """Is a difference larger than what rounding leaves?"""
    return any(abs(a - b) > smallest for a, b in pairs)


def real_points(first, second, complex_, left_out=None):
    """Do two functions of a point agree at the points where both are real (with i in them: at three
    positive ones)?"""
    counted = 0
    others = []
    numbers = [number for number in range(len(SCALES)) if number != left_out]
    for number in numbers[:WANTED] if complex_ else numbers:
        if number >= USUAL_POINTS and counted >= WANTED:
            break
        point = Point(number)
        try:
            equal, real = agree_at(point, first, second)
        except (Undefined, ZeroDivisionError, ValueError):
            continue
        if not point.drawn or not equal and (real or complex_):
            return equal
        if real or complex_:
            counted += 1
        elif number < 3 or number >= USUAL_POINTS:
            others.append(equal)
    if counted >= WANTED:
        return True
    if counted + len(others) < WANTED or not others and counted:
        raise Undefined("no value at enough points")
    return all(others)


def integer_points(first, second, largest=0):
    """Do two functions agree wherever the variables are whole numbers: up to `largest`, or small,
    large and huge ones?"""
    counted = 0
    for number in range(INTEGER_POINTS):
        point = Point(number, largest or (10 if number % 2 else 300 ** (1 + number // 8)))
        try:
            equal, _ = agree_at(point, first, second)
        except (Undefined, ZeroDivisionError, ValueError):
            continue
        except TooBig:  # 2^n at a large n; the work is limited as a whole
            limit("work", METER.spent)
            continue
        if not point.drawn or not equal:
            return equal
        counted += 1
    if counted < 2 * WANTED:
        raise Undefined("no value at enough points")
    return True


# Operations for whole numbers only; \lfloor x \rfloor takes any number, and what its letters are is
# asked below.
WHOLE_ONLY = {"!!", "gcd", "lcm"}
STEPS = {"floor", "ceil"}
INTEGER_LETTERS = {*"ijklmnpqNMK"}
REAL_LETTERS = {*"rstuvwxyz", r"\theta", r"\alpha", r"\lambda"}


def needs_integers(tree):
    """Is there an operation that makes sense for whole numbers only: (2n-1)!!, (-1)^n, a sum up to
    n?"""
    kind = tree[0]
    if kind in LEAVES or kind == "sym":
        return False
    if kind in WHOLE_ONLY and variables(tree):
        return True
    if kind in ("sum", "prod") and variables(tree[2]) | variables(tree[3]):
        return True
    if kind == "^" and tree[1][0] == "neg" and not variables(tree[1]) and variables(tree[2]):
        return True
    return any(isinstance(child, tuple) and needs_integers(child) for child in tree[1:])


def stepped_letters(tree):
    """The variables inside floors and ceilings."""
    if tree[0] in STEPS:
        return variables(tree)
    found = set()
    for child in tree[1:]:
        if isinstance(child, tuple):
            found |= stepped_letters(child)
    return found


def vanishes(tree):
    """Are there variables that are multiplied by 0, raised to 0, or raise 1?"""
    kind = tree[0]
    if kind in LEAVES or kind == "sym":
        return False
    children = [child for child in tree[1:] if isinstance(child, tuple)]
    zero, one = ("num", Fraction(0)), ("num", Fraction(1))
    hidden = kind in ("*", "/") and zero in children
    hidden = hidden or kind == "^" and (children[0] == one or children[1] == zero)
    return hidden and bool(variables(tree)) or any(map(vanishes, children))


def same_value(a, b):
    """Are two expressions worth the same, whatever the values of their variables? `b` is the
    gold."""
    if a == b and a[0] in ("sym", "word", "opaque", "num"):
        return True
    if contains(a, TEXTS) or contains(b, TEXTS):
        return same_text(a, b)
    if INFINITY in (a, b) or MINUS_INFINITY in (a, b):
        return a == b
    if a[0] != b[0] and "percent" in (a[0], b[0]):
        if same_value(*(tree[1] if tree[0] == "percent" else tree for tree in (a, b))):
            return True
    if not variables(b) and vanishes(a):
        return False                                               # 0x, 0 plus one: no answer 0
    first = functools.partial(value, a)
    second = first if a == b else functools.partial(value, b)
    letters = stepped_letters(a) | stepped_letters(b)
    if needs_integers(a) or needs_integers(b):
        series_ = contains(a, {"sum", "prod"}) or contains(b, {"sum", "prod"})
        return integer_points(first, second, 12 if series_ else 0)
    if not letters:
        return everywhere(a, b, first, second)
    if not integer_points(first, second):
        return False
    if letters <= INTEGER_LETTERS or everywhere(a, b, first, second):
        return True
    if letters & REAL_LETTERS:
        return False
    raise Unknown("equal for whole numbers only")


def everywhere(a, b, first, second):
    equal = real_points(first, second, "i" in symbols(a) | symbols(b))
    if not equal and (contains(a, {"int"}) or contains(b, {"int"})) and close(first, second):
        raise Unknown("an integral that is computed roughly")
    return equal


def close(first, second):
    """Are two numbers within a part in a hundred?"""
    with mp.workdps(20):
        x, y = first(Point(0)), second(Point(0))
        if shape(x) or shape(y):
            return False
        return abs(inexact(x) - inexact(y)) <= 0.01 * max(abs(inexact(x)), abs(inexact(y)))


def same_text(a, b):
    """Text in an expression: equal if the trees are, in any order of terms and factors. If not, and
    the text is the gold's, who knows."""
    if sorted_tree(a) == sorted_tree(b):
        return True
    if b[0] == "word" or not contains(b, TEXTS):
        return False
    raise Unknown("text in an expression")


def sorted_tree(tree):
    """The tree with the terms of each sum and the factors of each product in one order."""
    if tree[0] in LEAVES or tree[0] == "sym":
        return tree
    children = [sorted_tree(child) if isinstance(child, tuple) else child for child in tree[1:]]
    if tree[0] in ("+", "*"):
        children.sort(key=repr)
    return (tree[0], *children)


def rounding(rounded, exact):
    """Is a decimal of at least three figures the rounding of a number? 0.4134 is, of 246/595."""
    with mp.workdps(50):
        near, far = value(rounded, Point(0)), value(exact, Point(0))
        if variables(exact) or shape(far) or not isinstance(near, Fraction) or not near:
            return False
        unit = Fraction(1)
        while near % unit and unit > Fraction(1, 10**30):
            unit /= 10
        figures = len(str(abs(near) // unit).strip("0"))
        return figures >= 3 and abs(inexact(far) - inexact(near)) <= inexact(unit) / 2


def proportional(a, b):
    """Is (left - right) of one relation a constant multiple, not zero, of the other's, of a sign
    that fits?"""
    if contains(a, TEXTS) or contains(b, TEXTS):
        return sorted_tree(a) == sorted_tree(b)
    over = ("+", a[1], ("neg", a[2]))
    under = ("+", b[1], ("neg", b[2]))
    if not variables(over) or variables(over) != variables(under):
        return False
    ratio = ("/", over, under)
    constant = constant_ratio(ratio)
    if constant is None:
        return False
    start, first = constant
    if b[0] != (a[0] if a[0] == "=" or first > 0 else FLIP[a[0]]):
        return False

    def at_start(point):
        point.drawn = True
        return value(ratio, start)

    if needs_integers(ratio) or stepped_letters(ratio):
        return integer_points(at_start, functools.partial(value, ratio), 12)
    anywhere = functools.partial(value, ratio)
    return real_points(at_start, anywhere, "i" in symbols(ratio), start.number)


def constant_ratio(ratio):
    """(point, ratio there) of the first point where it is real and not zero, or None."""
    for number in range(WANTED):
        start = Point(number)
        try:
            with mp.workdps(50):
                first = inexact(value(ratio, start))
                real = abs(mp.im(first)) <= mp.mpf(10) ** -40 * abs(first)
                if real and abs(first) > mp.mpf(10) ** -30:
                    return start, mp.re(first)
        except (Undefined, ZeroDivisionError, ValueError):
            continue
    return None


# ------------------------------------------------------------------------------------ sets of reals
# A set is a sorted list of pieces (low, low is in, high, high is in) of trees; a point has low =
# high.
def place(tree):
    """Where an end stands on the line, as a float or mpf for sorting."""
    if tree == INFINITY:
        return mp.inf
    if tree == MINUS_INFINITY:
        return -mp.inf
    with mp.workdps(50):
        x = inexact(value(tree, Point(0)))
        if isinstance(x, mp.matrix) or mp.im(x) != 0:
            raise Undefined("an end that is no real number")
        return mp.mpf(mp.nstr(mp.re(x), 40))


def pieces(tree):
    """The pieces of a set of reals with ends that are numbers, or None."""
    if tree[0] in INTERVALS and len(tree) == 3:
        if variables(tree) or contains(tree, INTERVALS - {tree[0]}):
            return None
        return joined([(tree[1], tree[0][0] == "[", tree[2], tree[0][1] == "]")])
    if tree[0] in ("union", "set"):
        found = []
        for part in tree[1:]:
            inside = pieces(part)
            if inside is None:
                return None
            found += inside
        return joined(found)
    if tree[0] == "setminus":
        whole, taken = pieces(tree[1]), pieces(tree[2])
        if whole is None or taken is None:
            return None
        return common(whole, complement(taken))
    if tree[0] in OPERATIONS or tree[0] == "num" or tree[0] == "sym" and tree[1] in CONSTANTS:
        return None if variables(tree) or r"\infty" in symbols(tree) else [(tree, True, tree, True)]
    return None


def joined(found):
    """Pieces sorted, those that touch or overlap made one, empty ones left out."""
    kept = []
    for piece in sorted(found, key=lambda piece: (place(piece[0]), not piece[1])):
        low, low_in, high, high_in = piece
        if place(low) > place(high) or place(low) == place(high) and not (low_in and high_in):
            continue
        if kept:
            start, start_in, end, end_in = kept[-1]
            gap = place(low) - place(end)
            if gap < 0 or gap == 0 and (low_in or end_in):
                if place(high) > place(end) or place(high) == place(end) and high_in:
                    kept[-1] = (start, start_in, high, high_in)
                continue
        kept.append(piece)
    return kept


def complement(found):
    gaps = []
    low, low_in = MINUS_INFINITY, False
    for start, start_in, end, end_in in found:
        if start != MINUS_INFINITY:
            gaps.append((low, low_in, start, not start_in))
        low, low_in = end, not end_in
    if low != INFINITY:
        gaps.append((low, low_in, INFINITY, False))
    return joined(gaps)


def common(first, second):
    both = []
    for a in first:
        for b in second:
            low, low_in = max(a[:2], b[:2], key=lambda end: (place(end[0]), not end[1]))
            high, high_in = min(a[2:], b[2:], key=lambda end: (place(end[0]), end[1]))
            both.append((low, low_in, high, high_in))
    return joined(both)


def as_union(found):
    """Pieces as a tree."""
    parts = []
    for low, low_in, high, high_in in found:
        if low == high:
            parts.append(low)
        else:
            parts.append(("([" [low_in] + ")]"[high_in], low, high))
    return ("union", *parts)


def same_pieces(a, b):
    """Are two sets of reals the same, end by end?"""
    if len(a) != len(b):
        return False
    for (low, low_in, high, high_in), (start, start_in, end, end_in) in zip(a, b):
        if low_in != start_in or high_in != end_in:
            return False
        if not same_value(low, start) or not same_value(high, end):
            return False
    return True
