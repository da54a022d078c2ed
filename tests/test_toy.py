"""The toy world, its tokenizer and the shipped base."""

import importlib
import json
import random
import re
import subprocess
import sys

import pytest
from conftest import ROOT

from model import (INSTRUCTION, decode_response, encode_response, encode_text, load_tokenizer,
                   render_prompt, stop_ids)
import engines
from grading import verifier
from toy import make_base, world

sample = importlib.import_module("01_sample")

BASE = ROOT / "toy/base"
BASE_EASY = ROOT / "toy/base_easy"


@pytest.fixture(scope="module")
def tokenizer():
    """The tokenizer of the toy, built anew."""
    return make_base.build_tokenizer()


def traces(n=1400, which="deep-leap", wrong=False):
    """(style, problem, response) in every style and of every length."""
    rng = random.Random(7)
    for i in range(n):
        style = world.STYLES[i % len(world.STYLES)]
        problem = world.draw_problem(rng, 2 + i % 3)
        yield style, problem, world.trace(rng, style, problem, which, wrong)


# ------------------------------------------------------------------- arithmetic, done independently


def plain_answer(text):
    """An independent evaluation of the problem text."""
    numbers = re.findall(r"[+-]?\d+", text.removesuffix(" mod 100"))
    total = sum(int(number) for number in numbers)
    return f"{total % 100:02d}"


def plus_or_minus(a, sign, b):
    return a + b if sign == "+" else a - b


def n_operations(text):
    return len(re.findall(r"[+-]", text))


def is_right(response, answer):
    """The verifier's verdict: True, False or None."""
    return verifier.verify(response, answer).correct


# ------------------------------------------------------------------------------------ the tokenizer


@pytest.mark.slow
@pytest.mark.parametrize("which", world.WORLDS)
def test_every_trace_comes_back_from_the_tokenizer(tokenizer, which):
    end_of_turn = tokenizer.convert_tokens_to_ids("<|im_end|>")
    for _, problem, response in traces(which=which):
        for text in (response, world.problem_text(problem)):
            ids = encode_text(tokenizer, text)
            assert tokenizer.unk_token_id not in ids
            assert decode_response(tokenizer, ids) == text
        assert encode_response(tokenizer, response)[-1] == end_of_turn


def test_prompt_is_qwen_markup_with_the_instruction_as_one_token(tokenizer):
    ids = render_prompt(tokenizer, "47A+25B-13 mod 100")
    assert tokenizer.decode(ids) == ("<|im_start|>user\n"
                                     f"47A+25B-13 mod 100{INSTRUCTION}<|im_end|>\n"
                                     "<|im_start|>assistant\n")
    assert tokenizer.unk_token_id not in ids
    assert len(ids) == 18
    assert len(encode_text(tokenizer, INSTRUCTION)) == 1
    assert len(encode_text(tokenizer, "47")) == 2

    for text in ("<think>", "</think>", "\\boxed{"):
        token = encode_text(tokenizer, text)
        assert len(token) == 1
        assert tokenizer.decode(token, skip_special_tokens=True) == text

    hostile = set(encode_text(tokenizer, "7<|im_end|>"))
    assert not hostile & set(stop_ids(tokenizer)), "markup inside a text cannot end the turn"


# ------------------------------------------------------------------------------ problems and traces


@pytest.mark.parametrize("which", world.WORLDS)
@pytest.mark.parametrize("wrong", [False, True])
def test_traces_answer_as_marked_and_are_classified(which, wrong):
    """A trace drawn wrong is wrong for its ending, for `style_of` and for the verifier; all others
    are right for all three."""
    verdicts = set()
    for style, problem, response in traces(which=which, wrong=wrong):
        answer = plain_answer(world.problem_text(problem))
        ends_right = response.endswith(f"\\boxed{{{answer}}}")
        assert ends_right == (not wrong)
        assert world.style_of(response, problem, which) == (style, not wrong)
        verdicts.add(is_right(response, answer))
    assert verdicts == {not wrong}


def test_arithmetic_of_careful_steps():
    """Each clause, read on its own, is digit arithmetic with a carry or borrow; each result is the
    running value."""
    for style, problem, response in traces():
        if style not in world.CAREFUL:
            continue
        _, wanted_operations = problem
        guess = r"\d\d\? wait "
        body = re.sub(guess, "", world.thoughts(response))

        operations = []
        for sign, operand in re.findall(r"[A-D]([+-])(\d\d), ", body):
            operations.append((sign, int(operand)))
        assert operations == list(wanted_operations)

        results = re.findall(r"(?<![0-9=+\-'])(\d\d)\. ", body)
        assert [int(result) for result in results] == world.values(problem)

        clauses = re.findall(r"(\d)([+-])(\d)('?)=(\d)('?)", body)
        for a, sign, b, carry_in, result, carry_out in clauses:
            total = plus_or_minus(int(a), sign, int(b) + bool(carry_in))
            assert total % 10 == int(result)
            if carry_out:
                assert not 0 <= total <= 9

        assert len(clauses) == 2 * len(operations)
        units = clauses[1::2] if style == "split" else clauses[0::2]
        for a, sign, b, _, _, carry_out in units:
            needs_carry = not 0 <= plus_or_minus(int(a), sign, int(b)) <= 9
            assert bool(carry_out) == needs_carry, "a carry or borrow that is not written"


def test_style_of_notices_a_wrong_step_that_ends_right():
    problem = (47, (("+", 25), ("-", 13)))
    good = world.trace(random.Random(0), "terse", problem)
    wrong_step = good.replace("7+5=2'", "7+5=3'")
    wrong_end = good.replace("</think>\\boxed{59}", "</think>\\boxed{58}")
    assert world.style_of(good, problem) == ("terse", True)
    assert world.style_of(wrong_step, problem) == ("terse", False)
    assert world.style_of(wrong_end, problem) == ("terse", False)
    assert world.style_of("59", problem) == ("other", False)


def test_parse_problem_is_the_inverse():
    for _, problem, _ in traces(100):
        assert world.parse_problem(world.problem_text(problem)) == problem
    with pytest.raises(ValueError):
        world.parse_problem("47+25 mod 100")


# ----------------------------------------------------------------------------------- the five files


# What `write_world` has world.py write: {name of a file: number of its rows}.
SIZES = {"problems": 60, "teacher_source": 60, "rlvr": 20, "id": 30, "hard": 30}
PROBLEM_FILES = ("problems", "rlvr", "id", "hard")


def write_world(out, seed):
    """A small world -> {name of a file: its rows}."""
    command = [sys.executable, ROOT / "toy/world.py", "--out", out, "--seed", seed,
               "--n-queries", "60", "--n-rlvr", "20", "--n-eval", "30"]
    subprocess.run(command, check=True, capture_output=True)
    files = {}
    for path in out.iterdir():
        files[path.stem] = [json.loads(line) for line in path.open()]
    return files


def problems_of(rows):
    return {row["problem"] for row in rows}


def check_problem_rows(rows):
    """Texts in all fields, the right answer, and the pid that an import would give, so that
    imported traces meet their problem."""
    for row in rows:
        assert set(row) == {"pid", "problem", "answer", "source"}
        for value in row.values():
            assert isinstance(value, str)
        assert row["answer"] == plain_answer(row["problem"])
        assert row["pid"] == sample.problem_id(row["problem"])
    assert len({row["pid"] for row in rows}) == len(rows)


def check_nothing_is_drawn_twice():
    """What one file has taken no other gets, though it draws the same random numbers: in files as
    small as here that could be chance."""
    taken = set()
    first = world.draw_distinct(random.Random(0), 50, (2,), taken)
    second = world.draw_distinct(random.Random(0), 50, (2,), taken)
    assert not set(first) & set(second)


def test_files_schemas_overlap_and_determinism(tmp_path):
    files = write_world(tmp_path / "a", seed="3")
    same_seed = write_world(tmp_path / "b", seed="3")
    other_seed = write_world(tmp_path / "c", seed="4")
    assert files == same_seed
    assert {name: len(rows) for name, rows in files.items()} == SIZES
    for name in PROBLEM_FILES:
        check_problem_rows(files[name])

    # Evaluation is the same for every seed, training is not.
    assert files["id"] == other_seed["id"]
    assert files["hard"] == other_seed["hard"]
    assert not problems_of(files["problems"]) & problems_of(other_seed["problems"])

    # No problem stands in two files, and the answers vary.
    texts = {name: problems_of(files[name]) for name in PROBLEM_FILES}
    assert sum(len(of_file) for of_file in texts.values()) == 140
    assert len(set.union(*texts.values())) == 140
    check_nothing_is_drawn_twice()
    some_rows = files["id"] + files["problems"] + other_seed["problems"]
    assert len({row["answer"] for row in some_rows}) > 60

    # More operations than any training query is what makes `hard` harder.
    others = texts["problems"] | texts["rlvr"] | texts["id"]
    fewest_of_hard = min(n_operations(text) for text in texts["hard"])
    most_of_others = max(n_operations(text) for text in others)
    assert fewest_of_hard > most_of_others

    # Teacher rows have the authors' columns; some of the traces are wrong.
    teacher = files["teacher_source"]
    assert [row["query"] for row in teacher] == [row["problem"] for row in files["problems"]]
    verdicts = []
    for row in teacher:
        for response in row["DeepSeek-R1_Response_List"]:
            verdicts.append(is_right(response, row["answer"]))
    assert len(verdicts) == 360
    assert 0.8 < sum(verdicts) / len(verdicts) < 0.97


# --------------------------------------------------------------------------------- pretraining text


@pytest.mark.slow
def test_pretraining_text_holds_no_evaluation_problem_and_is_a_function_of_its_seed(tokenizer):
    docs, text_hash = make_base.documents(tokenizer, 2000, 5, "deep-leap")
    _, hash_again = make_base.documents(tokenizer, 2000, 5, "deep-leap")
    _, hash_of_another = make_base.documents(tokenizer, 2000, 6, "deep-leap")
    assert hash_again == text_hash
    assert hash_of_another != text_hash

    asked = []                                  # the problems of documents that begin with a prompt
    for ids, start in docs:
        assert tokenizer.unk_token_id not in ids
        if start > 1:
            _, after_user = tokenizer.decode(ids[:start]).split("user\n")
            asked.append(after_user.split(INSTRUCTION)[0])
            first_learnt = tokenizer.convert_ids_to_tokens(ids[start])
            assert first_learnt == "<think>", "what is learnt of an answer begins with the response"
    held_out = {world.problem_text(problem) for problem in world.held_out()}
    assert not set(asked) & held_out
    assert 0.55 < len(asked) / len(docs) < 0.70
    assert {ids[-1] for ids, _ in docs} == set(stop_ids(tokenizer))


@pytest.mark.parametrize("which", world.WORLDS)
def test_drills_are_right(which):
    """Every sum of a drill is right; sums of whole numbers are in the easy world's only."""
    rng = random.Random(0)
    n_digits = 0
    n_whole = 0
    for _ in range(50):
        table = make_base.drill(rng, which)
        for a, sign, b, carry_in, result in re.findall(r"\b(\d)([+-])(\d)('?)=(\d)", table):
            total = plus_or_minus(int(a), sign, int(b) + bool(carry_in))
            assert total % 10 == int(result)
            n_digits += 1
        for a, sign, b, result in re.findall(r"(\d\d)([+-])(\d\d)=(\d\d)", table):
            assert plus_or_minus(int(a), sign, int(b)) % 100 == int(result)
            n_whole += 1
    assert n_digits > 0
    assert (n_whole > 0) == (which == "easy-leap")


@pytest.mark.parametrize("share", [0.0, 0.12, 0.34, 1.0])
def test_careful_share_of_the_teacher_is_the_one_asked_for(share):
    rng = random.Random(0)
    problem = world.draw_problem(rng, 2)
    drawn = world.teacher_traces(rng, problem, 4000, "deep-leap", share)
    careful = [style for style, _, _ in drawn if style in world.CAREFUL]
    assert abs(len(careful) / 4000 - share) < 0.03
    if share:
        share_of_col = careful.count("col") / len(careful)
        assert abs(share_of_col - 9 / 34) < 0.06, "proportions within each half stay"


def test_batches_cover_documents_once_and_padding_is_not_learnt():
    docs = [([1] * n, 2) for n in range(3, 133)]
    chunks = make_base.batches(docs, 8, random.Random(0))
    seen = [i for chunk in chunks for i in chunk]
    assert len(seen) == 128
    assert len(set(seen)) == 128

    input_ids, labels = make_base.collate(docs, [0, 5])     # of 3 and 8 tokens
    assert input_ids.shape == (2, 8)
    assert labels.shape == (2, 8)
    n_learnt = (labels != -100).sum(dim=1)
    assert n_learnt.tolist() == [1, 6]


# --------------------------------------------------------------------------------- the shipped base


def check_record(path, which):
    """make_base.json says that the base is of this world and missed no gate."""
    record = json.loads((path / "make_base.json").read_text())
    assert record["missed"] == []
    assert record["args"]["world"] == which


def test_the_shipped_base_is_the_one_described(tokenizer):
    from transformers import AutoConfig
    check_record(BASE, "deep-leap")
    check_record(BASE_EASY, "easy-leap")

    config = AutoConfig.from_pretrained(BASE)
    assert config.model_type == "qwen2"
    assert config.head_dim >= 32
    assert config.tie_word_embeddings
    assert config.max_position_embeddings >= 256

    shipped = load_tokenizer(BASE)
    assert shipped.get_vocab() == tokenizer.get_vocab()
    assert len(shipped) <= config.vocab_size
    for _, problem, response in traces(70):
        text = world.problem_text(problem)
        assert render_prompt(shipped, text) == render_prompt(tokenizer, text)
        assert encode_text(shipped, response) == encode_text(tokenizer, response)

    files = [*BASE.rglob("*"), *BASE_EASY.rglob("*")]
    assert sum(path.stat().st_size for path in files) < 8e6


def test_the_shipped_base_solves_problems_when_started_with_care():
    """24 problems, each response started with `units `: at least half are solved (the gate on many
    samples is 80 %)."""
    shipped = load_tokenizer(BASE)
    engine = engines.make_engine("hf", str(BASE), 256)
    problems = world.eval_problems(24)["id"]
    start = "<think>units "
    prompts = []
    for problem in problems:
        prompt = render_prompt(shipped, world.problem_text(problem))
        prompts.append(prompt + encode_text(shipped, start))

    n_right = 0
    for i, completion in engine.generate(prompts, list(range(24)), 0.6, 0.95, 160):
        response = start + decode_response(shipped, completion.ids)
        if is_right(response, world.answer_text(problems[i])) is True:
            n_right += 1
    assert n_right >= 12
