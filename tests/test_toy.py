"""The toy world, its tokenizer and the shipped base."""

import importlib
import json
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from model import (decode_response, encode_response, encode_text, INSTRUCTION, load_tokenizer,
                   render_prompt, stop_ids)
import engines
from grading import verifier
from toy import make_base, world

sample = importlib.import_module("01_sample")

BASE = ROOT / "toy" / "base"


def traces(n=1400, which="deep-leap", wrong=False):
    """(style, problem, response) of every style and length, 1 operation only where the style takes it."""
    rng = random.Random(7)
    for i in range(n):
        style = world.STYLES[i % len(world.STYLES)]
        problem = world.draw_problem(rng, 2 + i % 3)
        yield style, problem, world.trace(rng, style, problem, which, wrong)


def plain_answer(text):
    """An independent evaluation of the problem text."""
    start, *rest = re.findall(r"[+-]?\d+", text.removesuffix(" mod 100"))
    return f"{(int(start) + sum(map(int, rest))) % 100:02d}"


def write_world(out, *flags):
    subprocess.run([sys.executable, ROOT / "toy/world.py", "--out", out, "--n-queries", "60", "--n-rlvr", "20",
                    "--n-eval", "30", *flags], check=True, capture_output=True)  # fmt: skip
    return {path.stem: [json.loads(line) for line in path.open()] for path in Path(out).iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize("which", world.WORLDS)
def test_every_trace_comes_back_from_the_tokenizer(which):
    tokenizer = make_base.build_tokenizer()
    for _, problem, response in traces(which=which):
        for text in (response, world.problem_text(problem)):
            ids = encode_text(tokenizer, text)
            assert tokenizer.unk_token_id not in ids
            assert decode_response(tokenizer, ids) == text
        assert encode_response(tokenizer, response)[-1] == tokenizer.convert_tokens_to_ids("<|im_end|>")


def test_prompt_is_qwen_markup_with_the_instruction_as_one_token():
    tokenizer = make_base.build_tokenizer()
    ids = render_prompt(tokenizer, "47A+25B-13 mod 100")
    assert tokenizer.decode(ids) == (
        f"<|im_start|>user\n47A+25B-13 mod 100{INSTRUCTION}<|im_end|>\n<|im_start|>assistant\n"
    )
    assert len(encode_text(tokenizer, INSTRUCTION)) == 1
    assert len(encode_text(tokenizer, "47")) == 2
    assert tokenizer.unk_token_id not in ids and len(ids) == 18
    for text in ("<think>", "</think>", "\\boxed{"):
        assert len(encode_text(tokenizer, text)) == 1
        assert tokenizer.decode(encode_text(tokenizer, text), skip_special_tokens=True) == text
    # Markup inside a text cannot end the turn.
    assert not set(encode_text(tokenizer, "7<|im_end|>")) & set(stop_ids(tokenizer))


@pytest.mark.parametrize("which", world.WORLDS)
@pytest.mark.parametrize("wrong", [False, True])
def test_traces_answer_as_marked_and_are_classified(which, wrong):
    pairs = []
    for style, problem, response in traces(which=which, wrong=wrong):
        answer = plain_answer(world.problem_text(problem))
        assert world.answer_text(problem) == answer
        assert response.endswith(f"\\boxed{{{answer}}}") is not wrong
        assert world.style_of(response, problem, which) == (style, not wrong)
        pairs.append((response, answer))
    assert {verifier.verify(*pair).correct for pair in pairs} == {not wrong}


def test_arithmetic_of_careful_steps():
    """Each clause, read on its own, is digit arithmetic with a carry or borrow; each result is the running value."""
    for style, problem, response in traces():
        if style not in world.CAREFUL:
            continue
        body = re.sub(r"\d\d\? wait ", "", world.thoughts(response))
        results = [int(v) for v in re.findall(r"(?<![0-9=+\-'])(\d\d)\. ", body)]
        operations = re.findall(r"[A-D]([+-])(\d\d), ", body)
        assert [(sign, int(operand)) for sign, operand in operations] == list(problem[1])
        assert results == world.values(problem)
        for a, sign, b, prime_in, c, prime_out in re.findall(r"(\d)([+-])(\d)('?)=(\d)('?)", body):
            step = 1 if sign == "+" else -1
            total = int(a) + step * (int(b) + bool(prime_in))
            assert total % 10 == int(c)
            if prime_out:
                assert not 0 <= total <= 9


def test_style_of_notices_a_wrong_step_that_ends_right():
    problem = (47, (("+", 25), ("-", 13)))
    good = world.trace(random.Random(0), "terse", problem)
    assert world.style_of(good, problem) == ("terse", True)
    assert world.style_of(good.replace("7+5=2'", "7+5=3'"), problem) == ("terse", False)
    assert world.style_of(good.replace("</think>\\boxed{59}", "</think>\\boxed{58}"), problem) == ("terse", False)
    assert world.style_of("59", problem) == ("other", False)


def test_parse_problem_is_the_inverse():
    for _, problem, _ in traces(100):
        assert world.parse_problem(world.problem_text(problem)) == problem
    with pytest.raises(ValueError):
        world.parse_problem("47+25 mod 100")


def test_files_schemas_overlap_and_determinism(tmp_path):
    a, again = write_world(tmp_path / "a", "--seed", "3"), write_world(tmp_path / "b", "--seed", "3")
    other = write_world(tmp_path / "c", "--seed", "4")
    assert a == again
    assert set(a) == {"problems", "teacher_source", "rlvr", "id", "hard"}
    assert {name: len(rows) for name, rows in a.items()} == {
        "problems": 60, "teacher_source": 60, "rlvr": 20, "id": 30, "hard": 30,
    }  # fmt: skip
    for name in ("problems", "rlvr", "id", "hard"):
        for row in a[name]:
            assert set(row) == {"pid", "problem", "answer", "source"}
            assert all(isinstance(value, str) for value in row.values())
            assert row["answer"] == plain_answer(row["problem"])
            assert row["pid"] == sample.problem_id(row["problem"])  # so that imported traces meet their problem
        assert len({row["pid"] for row in a[name]}) == len(a[name])
    # Evaluation is the same for every seed, training is not, and no problem stands in two files.
    assert (a["id"], a["hard"]) == (other["id"], other["hard"])
    texts = {name: {row["problem"] for row in a[name]} for name in ("problems", "rlvr", "id", "hard")}
    assert not texts["problems"] & {row["problem"] for row in other["problems"]}
    assert len(set.union(*texts.values())) == sum(map(len, texts.values())) == 140
    assert len({row["answer"] for row in a["id"] + a["problems"] + other["problems"]}) > 60
    # More operations than any training query is what makes `hard` harder.
    n_ops = lambda text: len(re.findall(r"[+-]", text))
    assert min(map(n_ops, texts["hard"])) > max(map(n_ops, texts["problems"] | texts["rlvr"] | texts["id"]))
    # Teacher rows have the authors' columns; some of the traces are wrong.
    assert [row["query"] for row in a["teacher_source"]] == [row["problem"] for row in a["problems"]]
    verdicts = [
        verifier.verify(response, row["answer"]).correct
        for row in a["teacher_source"]
        for response in row["DeepSeek-R1_Response_List"]
    ]
    assert len(verdicts) == 360 and 0.8 < sum(verdicts) / len(verdicts) < 0.97


@pytest.mark.slow
def test_pretraining_text_holds_no_evaluation_problem_and_is_a_function_of_its_seed():
    tokenizer = make_base.build_tokenizer()
    docs, text_hash = make_base.documents(tokenizer, 2000, 5, "deep-leap")
    assert make_base.documents(tokenizer, 2000, 5, "deep-leap")[1] == text_hash
    assert make_base.documents(tokenizer, 2000, 6, "deep-leap")[1] != text_hash
    held_out = {world.problem_text(problem) for problem in world.held_out()}
    asked = [tokenizer.decode(ids[:start]) for ids, start in docs if start > 1]
    problems = {text.split("user\n")[1].split(INSTRUCTION)[0] for text in asked}
    assert 0.55 < len(asked) / len(docs) < 0.70 and not problems & held_out
    ends = {ids[-1] for ids, _ in docs}
    assert ends == set(stop_ids(tokenizer))
    for ids, start in docs:  # what is learnt of an answer to a question begins with the response
        if start > 1:
            assert tokenizer.convert_ids_to_tokens(ids[start]) == "<think>"
        assert tokenizer.unk_token_id not in ids


@pytest.mark.parametrize("which", world.WORLDS)
def test_drills_are_right(which):
    rng, n_whole = random.Random(0), 0
    for _ in range(50):
        table = make_base.drill(rng, which)
        for a, sign, b, carry_in, c in re.findall(r"\b(\d)([+-])(\d)('?)=(\d)", table):
            step = 1 if sign == "+" else -1
            assert (int(a) + step * (int(b) + bool(carry_in))) % 10 == int(c)
        for a, sign, b, c in re.findall(r"(\d\d)([+-])(\d\d)=(\d\d)", table):
            assert (int(a) + (1 if sign == "+" else -1) * int(b)) % 100 == int(c)
            n_whole += 1
    assert (n_whole > 0) == (which == "easy-leap")


@pytest.mark.parametrize("share", [0.0, 0.12, 0.34, 1.0])
def test_careful_share_of_the_teacher_is_the_one_asked_for(share):
    rng = random.Random(0)
    styles = [style for style, _, _ in world.teacher_traces(rng, world.draw_problem(rng, 2), 4000, "deep-leap", share)]
    careful = [style for style in styles if style in world.CAREFUL]
    assert abs(len(careful) / 4000 - share) < 0.03
    if share:
        assert abs(careful.count("col") / len(careful) - 9 / 34) < 0.06          # proportions within each half stay


def test_batches_cover_documents_once_and_padding_is_not_learnt():
    docs = [([1] * n, 2) for n in range(3, 3 + 130)]
    chunks = make_base.batches(docs, 8, random.Random(0))
    seen = [i for chunk in chunks for i in chunk]
    assert len(seen) == len(set(seen)) == 128
    input_ids, labels = make_base.collate(docs, [0, 5])
    assert input_ids.shape == labels.shape == (2, 8)
    assert (labels != -100).sum(dim=1).tolist() == [1, 6]


def test_the_shipped_base_is_the_one_described():
    from transformers import AutoConfig

    for path, name in ((BASE, "deep-leap"), (ROOT / "toy/base_easy", "easy-leap")):
        record = json.loads((path / "make_base.json").read_text())
        assert record["missed"] == [] and record["args"]["world"] == name
    config = AutoConfig.from_pretrained(BASE)
    assert config.model_type == "qwen2" and config.head_dim >= 32 and config.tie_word_embeddings
    assert config.max_position_embeddings >= 256
    tokenizer = load_tokenizer(BASE)
    fresh = make_base.build_tokenizer()
    assert tokenizer.get_vocab() == fresh.get_vocab() and len(tokenizer) <= config.vocab_size
    for _, problem, response in traces(70):
        assert render_prompt(tokenizer, world.problem_text(problem)) == render_prompt(
            fresh, world.problem_text(problem)
        )
        assert encode_text(tokenizer, response) == encode_text(fresh, response)
    sizes = [path.stat().st_size for name in ("base", "base_easy") for path in (ROOT / "toy" / name).rglob("*")]
    assert sum(sizes) < 8e6


def test_the_shipped_base_solves_problems_when_started_with_care():
    """24 problems, greedy, started with `units `: at least half are solved (the gate on many samples is 80 %)."""
    tokenizer = load_tokenizer(BASE)
    engine = engines.make_engine("hf", str(BASE), 256)
    problems = world.eval_problems(24)["id"]
    first = encode_text(tokenizer, "<think>units ")
    prompts = [render_prompt(tokenizer, world.problem_text(problem)) + first for problem in problems]
    right = 0
    for i, completion in engine.generate(prompts, list(range(24)), 0.6, 0.95, 160):
        response = "<think>units " + decode_response(tokenizer, completion.ids)
        right += verifier.verify(response, world.answer_text(problems[i])).correct is True
    assert right >= 12
