"""`bash run_all.sh` on recipes/laptop.toml in miniature, from the problems to the report: a random
Llama of two layers with a byte-level vocabulary of 4,096 tokens, and 16 problems. Also the word
problems themselves, and the plan of a recipe that makes its base or has a model as its teacher.

The tiny model cannot learn arithmetic, so its teacher is fine-tuned on the answers of the very
problems that it is asked, and its base on those of others: [run] teacher_solutions and warmup, as
files of a user's own. Everything else is the recipe with smaller counts.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys

import pytest
from conftest import CHAT_TEMPLATE, ROOT

from grading import verifier

HAS_PACKAGE = importlib.util.find_spec("reasoning_gym") is not None
needs_package = pytest.mark.skipif(
    not HAS_PACKAGE, reason="reasoning-gym is not installed (WITH_WORDS=1)")


def make_problems(folder, *flags):
    """What toy/word_problems.py writes: {name of a file: its rows}."""
    command = [sys.executable, ROOT / "toy/word_problems.py", "--out", folder, *flags]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {path.stem: rows_of(path) for path in folder.glob("*.jsonl")}


def rows_of(path):
    return [json.loads(line) for line in open(path)]


def boxed(response):
    """The number in the box that a response ends with."""
    return re.search(r"\\boxed\{(\d+)\}$", response)[1]


def run_all(recipe, *flags, timeout=60, **settings):
    """`bash run_all.sh RECIPE FLAGS` without network; `settings`: environment variables."""
    env = {**os.environ, "HF_HUB_OFFLINE": "1", **settings}
    command = ["bash", ROOT / "run_all.sh", recipe, *flags]
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=timeout)


def plan(recipe):
    """`run_all.sh --plan` where no model has been downloaded."""
    return run_all(recipe, "--plan", HF_HOME="/nonexistent", RUNS="runs")


# ------------------------------------------------------------------- the whole recipe, in miniature

COUNTS = ["--n-warmup", "64", "--n-solutions", "16", "--n-problems", "16",
          "--n-rlvr", "16", "--n-seen", "8", "--n-hard", "6"]

MODELS = """base_model = "TMP/llama"
warmup = "TMP/few.jsonl"
teacher_solutions = "TMP/many.jsonl"
"""

# What is replaced in the text of the recipe, in this order.
CHANGES = {
    'base_model = "HuggingFaceTB/SmolLM2-135M-Instruct"': MODELS,
    "warmup_epochs = 2": "warmup_epochs = 8",
    "teacher_epochs = 1": "teacher_epochs = 80",
    "teacher_samples = 9": "teacher_samples = 4",
    'arms = ["sft", "sft_lp", "oxa_mle", "oxa_full", "length_matched", "longest"]':
        'arms = ["sft", "oxa_full"]',
    'rlvr_arms = ["sft", "oxa_full"]': 'rlvr_arms = ["oxa_full"]',
    "side_by_side = 1": "side_by_side = 2",
    "cpu_ranks = 2": "cpu_ranks = 1",
    "positions = 8192": "positions = 1024",
    "max_prompt_tokens = 256": "max_prompt_tokens = 512",
    "n_ce = 150": "n_ce = 8",
    "n_ul = 150": "n_ul = 8",
    "sigma_share = 0.125": "sigma_share = 1.0",
    "n_bins = 40": "n_bins = 1",
    "lr = 2e-4": "lr = 5e-3",
    "epochs = 3": "epochs = 2",
    "ce_per_step = 16": "ce_per_step = 8",
    "ul_per_step = 16": "ul_per_step = 8",
    "max_steps = 10": "max_steps = 2",
    "save_every = 20": "save_every = 0",
    "max_tokens = 128": "max_tokens = 32",
    "n = 4 ": "n = 2 ",
    "k = 4": "k = 2",
}


def make_llama(folder, texts):
    """A random Llama of two layers, and a byte-level BPE tokenizer of 4,096 tokens with the chat
    markup, trained on `texts`."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    tokenizer = train_tokenizer(texts)
    assert len(tokenizer) == 4096
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=4096, hidden_size=64, intermediate_size=128,
                         num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
                         max_position_embeddings=1024, tie_word_embeddings=True,
                         bos_token_id=None, eos_token_id=2)
    LlamaForCausalLM(config).save_pretrained(folder)


def train_tokenizer(texts):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False)])
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4096, special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    core.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|endoftext|>",
                                   pad_token="<|endoftext|>", chat_template=CHAT_TEMPLATE)


def write_answers(path, pairs):
    """A training set of (problem, answer); a response gives the answer and no step towards it."""
    with open(path, "w") as file:
        for i, (problem, answer) in enumerate(pairs):
            row = {"sid": str(i),
                   "pid": str(i),
                   "problem": problem,
                   "response": f"<think>\nSo {answer}.\n</think>\n\\boxed{{{answer}}}",
                   "objective": "ce"}
            file.write(json.dumps(row) + "\n")


def write_miniature(folder):
    """The recipe with COUNTS and CHANGES, each of which must still be there to be changed."""
    text = (ROOT / "recipes/laptop.toml").read_text()
    text = re.sub(r"world_args = \[.*\]", f"world_args = {json.dumps(COUNTS)}", text)
    for old, new in CHANGES.items():
        assert old in text, old
        text = text.replace(old, new)
    recipe = folder / "mini.toml"
    recipe.write_text(text.replace("TMP", str(folder)))
    return recipe


@needs_package
@pytest.mark.slow
def test_the_laptop_recipe_in_miniature(tmp_path):
    """One command leads from problems to report; given again, it makes the report only."""
    # the problems' answers for the teacher, those of others for the base; the model; the recipe
    made = make_problems(tmp_path / "made", *COUNTS)
    asked = [(row["problem"], row["answer"]) for row in made["problems"]]
    write_answers(tmp_path / "many.jsonl", asked)
    others = [(row["problem"], boxed(row["response"])) for row in made["warmup"]]
    write_answers(tmp_path / "few.jsonl", others)
    documents = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    texts = [path.read_text() for path in documents]
    make_llama(tmp_path / "llama", texts + [problem for problem, _ in asked])
    recipe = write_miniature(tmp_path)

    settings = {"RUNS": str(tmp_path / "runs"), "OMP_NUM_THREADS": "1"}
    done = run_all(recipe, timeout=3600, **settings)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    run = tmp_path / "runs/mini"

    # data: the same problems for the same seed; a teacher that is right often, a base that is not
    assert rows_of(run / "data/problems.jsonl") == made["problems"]
    teacher = rows_of(run / "data/teacher.verified.jsonl")
    assert len(teacher) == 16 * 4
    assert n_correct(teacher) / len(teacher) > 0.3
    own = rows_of(run / "data/self.verified.jsonl")
    assert len(own) == 16 * 3
    assert n_correct(own) < 12

    # scores: of the right traces only, under the base that was made
    for row in rows_of(run / "data/teacher.scored.jsonl"):
        assert row["correct"]
        assert row["scorer"].endswith("data/base")

    # the arm's training set, the evaluations, the report
    objectives = [row["objective"] for row in rows_of(run / "seed-0/oxa_full/train.jsonl")]
    assert objectives.count("ce") == 8
    assert objectives.count("ul") == 8
    for name in ("base/eval", "sft/eval", "oxa_full/eval", "oxa_full/eval_rlvr"):
        results = json.loads((run / "seed-0" / name / "results.json").read_text())
        n_problems = {bench: found["n_problems"] for bench, found in results["benchmarks"].items()}
        assert n_problems == {"seen": 8, "hard": 6}
    assert "C1" in done.stdout
    assert (run / "report/REPORT.md").exists()

    again = run_all(recipe, timeout=1200, **settings)
    assert again.returncode == 0
    commands = [line for line in again.stdout.splitlines() if line.startswith("+ ")]
    assert len(commands) == 1
    assert "tools.report" in commands[0]


def n_correct(rows):
    return sum(row["correct"] is True for row in rows)


# -------------------------------------------------------------------------------- the word problems


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    return make_problems(tmp_path_factory.mktemp("words"), "--n-solutions", "400")


@pytest.mark.slow
@needs_package
def test_every_solution_verifies_and_ends_in_its_answer(sets):
    for row in sets["warmup"] + sets["solutions"]:
        response = row["response"]
        answer = boxed(response)
        assert verifier.verify(response, answer).correct is True
        assert response.startswith("<think>\n")
        steps = response.split("</think>")[0]
        assert answer in re.findall(r"\d+", steps)                # not in the box alone


def shape(problem):
    """A problem without its names: its numbers, how many words it has, and the last of them."""
    words = problem.split()
    return tuple(re.findall(r"\d+", problem)), len(words), words[-1]


@pytest.mark.slow
@needs_package
def test_no_two_problems_share_their_numbers(sets):
    """Otherwise the model is evaluated on problems that it was trained on, under other names."""
    counts = {name: len(rows) for name, rows in sets.items()}
    assert counts == {"warmup": 200, "solutions": 400, "problems": 500,
                      "rlvr": 320, "seen": 96, "hard": 64}
    pids = []
    shapes = {}
    for name, rows in sets.items():
        pids += [row["pid"] for row in rows]
        shapes[name] = {shape(row["problem"]) for row in rows}
    assert len(set(pids)) == len(pids)
    held_out = shapes["seen"] | shapes["hard"]
    for name in ("warmup", "solutions", "problems", "rlvr"):
        assert not held_out & shapes[name], name


@pytest.mark.slow
@needs_package
def test_the_harder_set_has_larger_numbers(sets):
    def mean_answer(name):
        return sum(int(row["answer"]) for row in sets[name]) / len(sets[name])

    assert mean_answer("hard") > 1.5 * mean_answer("seen")


@pytest.mark.slow
@needs_package
def test_a_seed_gives_the_same_bytes_and_another_one_others(tmp_path):
    small = ["--n-solutions", "20", "--n-problems", "20"]
    first = make_problems(tmp_path / "a", *small)
    again = make_problems(tmp_path / "b", *small)
    other = make_problems(tmp_path / "c", "--seed", "1", *small)
    assert first == again
    assert first["seen"] != other["seen"]


@pytest.mark.slow
def test_without_the_package_one_sentence(tmp_path):
    """It says what to install, whether or not the package is installed here: another, empty one
    of this name comes first."""
    (tmp_path / "reasoning_gym").mkdir()
    (tmp_path / "reasoning_gym/__init__.py").write_text("")
    out = tmp_path / "out"
    done = subprocess.run([sys.executable, ROOT / "toy/word_problems.py", "--out", out],
                          capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "reasoning-gym==0.1.25" in done.stderr
    assert "WITH_WORDS=1" in done.stderr
    assert not out.exists()


# ----------------------------------------------------------------------------------------- the plan


def test_the_plan_names_the_hours_of_the_core_and_the_card():
    """Reckoned by hand from the recipe's counts, lengths and speeds (its [plan]), in seconds of a
    core: 65 tokens a response, 142 a trace with its prompt, whole steps of 16 sequences."""
    done = plan("laptop")
    assert done.returncode == 0
    assert "GPU hours (train 0.00 to 0.01 h" in done.stdout
    hours = float(re.search(r"Without a GPU: ([\d.]+) h of a CPU core", done.stdout)[1])

    train = (24 * 16 + 2240 + 7 * 27 * 16) * 142 / 88
    draw = (500 * 9 + 500 * 3 + 9 * 160 * 4) * 65 / 124
    score = (1700 + 0.9 * 1500 + 9 * 160) * 65 / 190
    step = 64 * 65 + 8 * 77                            # tokens of an RLVR step that a model reads
    rlvr = 20 * (64 * 65 / 124 + step / 88 + step / 190)
    assert hours == pytest.approx((train + draw + score + rlvr) / 3600, abs=0.06)


# --------------------------------------------------- a base that is made, a teacher that is a model


def write_recipe(folder, changes):
    """A recipe that starts from a copy of the paper's; `changes`: lines of its [run]."""
    (folder / "paper_1.5b.toml").write_text((ROOT / "recipes/paper_1.5b.toml").read_text())
    recipe = folder / "mine.toml"
    recipe.write_text(f'from = "paper_1.5b"\n[run]\n{changes}\n')
    return recipe


def planned(folder, changes):
    """The commands of such a recipe, as lists of words, without python or torchrun."""
    done = plan(write_recipe(folder, changes))
    assert done.returncode == 0, done.stderr
    commands = []
    for line in re.findall(r"^\[\d+\] (.*)$", done.stdout, re.M):
        script = re.search(r"\w+\.py|tools\.\w+", line)
        commands.append(line[script.start():].split())
    return commands


def flag(words, name):
    """The value of a flag in a command."""
    return words[words.index(name) + 1]


def test_a_users_own_teacher_samples_what_would_be_imported(tmp_path):
    """The import of traces is replaced by an import of problems and sampling; the rest stays."""
    plain = planned(tmp_path, "")
    mine = planned(tmp_path, 'teacher_model = "o/teacher"\n'
                             'problems_source = "o/problems"\n'
                             "teacher_samples = 5")
    added = [words for words in mine if words not in plain]
    removed = [words for words in plain if words not in mine]
    assert [words[:2] for words in added] == [["01_sample.py", "problems"],
                                              ["01_sample.py", "model"]]
    assert [words[:2] for words in removed] == [["01_sample.py", "teacher"]]

    imported, sampled = added
    assert flag(imported, "--source") == "o/problems"
    assert "--benchmarks" in imported
    assert flag(imported, "--out") == "runs/mine/data/problems.jsonl"
    assert flag(sampled, "--problems") == "runs/mine/data/problems.jsonl"
    assert flag(sampled, "--model") == "o/teacher"
    assert flag(sampled, "--n") == "5"
    assert flag(sampled, "--name") == "teacher"


def test_a_base_that_is_made_is_the_base_of_all_that_follows(tmp_path):
    """Trained, sampled and scored from the warmed-up model, never from the one it was made of."""
    mine = planned(tmp_path, 'self_model = ""\n'
                             'warmup = "few.jsonl"\n'
                             "warmup_epochs = 3\n"
                             'teacher_solutions = "many.jsonl"\n'
                             'problems_source = "o/problems"')
    base = "runs/mine/data/base"
    teacher = "runs/mine/data/teacher"

    trained = [words for words in mine if words[0] == "03_train_oxa.py"]
    warmup, teaching = trained[:2]
    assert [flag(words, "--model") for words in trained] == ["runs/mine/base", *[base] * 5]
    assert flag(warmup, "--data") == "few.jsonl"
    assert flag(warmup, "--out") == base
    assert flag(warmup, "--epochs") == "3"
    assert flag(teaching, "--data") == "many.jsonl"
    assert flag(teaching, "--out") == teacher

    sampled = [words for words in mine if words[:2] == ["01_sample.py", "model"]]
    assert [flag(words, "--model") for words in sampled] == [teacher, base]
    scored = [words for words in mine if words[1] == "score"]
    assert {flag(words, "--model") for words in scored} == {base}


@pytest.mark.parametrize("changes, said", [
    ('teacher_model = "o/t"', "problems_source is missing"),
    ("warmup_epochs = 0", "warmup_epochs must be at least 1"),
    ("teacher_samples = 0", "teacher_samples must be at least 1"),
    ('world = "deep-leap"\nworld_base = "base"', "is for real models"),
])
def test_a_recipe_that_lacks_something_is_one_sentence(tmp_path, changes, said):
    done = plan(write_recipe(tmp_path, changes))
    assert done.returncode == 2
    assert said in done.stderr
    assert done.stderr.count("\n") == 1
