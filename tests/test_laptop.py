"""`bash run_all.sh` on recipes/laptop.toml in miniature: a random Llama of two layers with a byte-level vocabulary of 4,096
tokens, 16 problems, one of each template, to the report. And the word problems themselves.

The tiny model cannot learn arithmetic, so its teacher is fine-tuned on the answers of the very problems that it is asked, and its
base on those of others: [run] teacher_solutions and warmup, as a user's own files. Everything else is the recipe with smaller counts.
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

WITHOUT = importlib.util.find_spec("reasoning_gym") is None
needs_package = pytest.mark.skipif(WITHOUT, reason="reasoning-gym is not installed (WITH_WORDS=1)")

COUNTS = ["--n-warmup", "64", "--n-solutions", "16", "--n-problems", "16", "--n-rlvr", "16", "--n-seen", "8", "--n-hard", "6"]
CHANGES = {
    'base_model = "HuggingFaceTB/SmolLM2-135M-Instruct"': 'base_model = "TMP/llama"\nwarmup = "TMP/few.jsonl"\nteacher_solutions = "TMP/many.jsonl"',
    "warmup_epochs = 2": "warmup_epochs = 8", "teacher_epochs = 1": "teacher_epochs = 80", "teacher_samples = 9": "teacher_samples = 4",
    'arms = ["sft", "sft_lp", "oxa_mle", "oxa_full", "length_matched", "longest"]': 'arms = ["sft", "oxa_full"]',
    'rlvr_arms = ["sft", "oxa_full"]': 'rlvr_arms = ["oxa_full"]',
    "side_by_side = 1": "side_by_side = 2", "cpu_ranks = 2": "cpu_ranks = 1", "positions = 8192": "positions = 1024",
    "max_prompt_tokens = 256": "max_prompt_tokens = 512", "n_ce = 150": "n_ce = 8", "n_ul = 150": "n_ul = 8",
    "sigma_share = 0.125": "sigma_share = 1.0", "n_bins = 40": "n_bins = 1",
    "lr = 2e-4": "lr = 5e-3", "epochs = 3": "epochs = 2", "ce_per_step = 16": "ce_per_step = 8", "ul_per_step = 16": "ul_per_step = 8",
    "max_steps = 10": "max_steps = 2", "save_every = 20": "save_every = 0", "max_tokens = 128": "max_tokens = 32", "n = 4 ": "n = 2 ", "k = 4": "k = 2"}


def make_problems(folder, *flags):
    done = subprocess.run([sys.executable, ROOT / "toy/word_problems.py", "--out", folder, *flags], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {path.stem: [json.loads(line) for line in open(path)] for path in folder.glob("*.jsonl")}


def make_llama(folder, texts):
    """A random Llama of two layers, and a byte-level BPE tokenizer of 4,096 tokens with the chat markup, trained on `texts`."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True),
                                                  pre_tokenizers.ByteLevel(add_prefix_space=False)])
    core.decoder = decoders.ByteLevel()
    markup = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=4096, special_tokens=markup, initial_alphabet=alphabet))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|endoftext|>", pad_token="<|endoftext|>",
                                        chat_template=CHAT_TEMPLATE)
    assert len(tokenizer) == 4096
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=4096, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
                         num_key_value_heads=1, max_position_embeddings=1024, tie_word_embeddings=True, bos_token_id=None,
                         eos_token_id=2)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_answers(path, pairs):
    """A training set of (problem, answer), the answer in the response's format without a step."""
    with open(path, "w") as file:
        for i, (problem, answer) in enumerate(pairs):
            response = f"<think>\nSo {answer}.\n</think>\n\\boxed{{{answer}}}"
            file.write(json.dumps({"sid": str(i), "pid": str(i), "problem": problem, "response": response, "objective": "ce"}) + "\n")


@needs_package
@pytest.mark.slow
def test_the_laptop_recipe_in_miniature(tmp_path):
    made = make_problems(tmp_path / "made", *COUNTS)
    docs = [path.read_text() for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]]
    make_llama(tmp_path / "llama", docs + [row["problem"] for row in made["problems"]])
    write_answers(tmp_path / "many.jsonl", [(row["problem"], row["answer"]) for row in made["problems"]])
    few = [(row["problem"], re.search(r"boxed\{(\d+)", row["response"])[1]) for row in made["warmup"]]
    write_answers(tmp_path / "few.jsonl", few)
    text = (ROOT / "recipes/laptop.toml").read_text()
    text = re.sub(r"world_args = \[.*\]", f"world_args = {json.dumps(COUNTS)}", text)
    for old, new in CHANGES.items():
        assert old in text, old
        text = text.replace(old, new)
    recipe = tmp_path / "mini.toml"
    recipe.write_text(text.replace("TMP", str(tmp_path)))

    env = {**os.environ, "RUNS": str(tmp_path / "runs"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(["bash", ROOT / "run_all.sh", recipe], capture_output=True, text=True, env=env, timeout=1800)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    run = tmp_path / "runs/mini"
    read = {name: [json.loads(line) for line in open(run / f"data/{name}.jsonl")] for name in ("problems", "teacher.verified", "self.verified")}
    assert read["problems"] == made["problems"]                                   # one seed, the same problems
    share_right = sum(row["correct"] is True for row in read["teacher.verified"]) / len(read["teacher.verified"])
    assert len(read["teacher.verified"]) == 16 * 4 and share_right > 0.3
    assert len(read["self.verified"]) == 16 * 3 and sum(row["correct"] is True for row in read["self.verified"]) < 12
    scored = [json.loads(line) for line in open(run / "data/teacher.scored.jsonl")]
    assert all(row["correct"] for row in scored) and all(row["scorer"].endswith("data/base") for row in scored)
    arm = run / "seed-0/oxa_full"
    objectives = [json.loads(line)["objective"] for line in open(arm / "train.jsonl")]
    assert objectives.count("ce") == 8 and objectives.count("ul") == 8
    for name in ("base/eval", "sft/eval", "oxa_full/eval", "oxa_full/eval_rlvr"):
        results = json.loads((run / "seed-0" / name / "results.json").read_text())["benchmarks"]
        assert {bench: found["n_problems"] for bench, found in results.items()} == {"seen": 8, "hard": 6}
    assert "C1" in done.stdout and (run / "report/REPORT.md").exists()
    again = subprocess.run(["bash", ROOT / "run_all.sh", recipe], capture_output=True, text=True, env=env, timeout=600)
    commands = [line for line in again.stdout.splitlines() if line.startswith("+ ")]
    assert again.returncode == 0 and len(commands) == 1 and "tools.report" in commands[0]


# ------------------------------------------------------------------------------------------------ the problems


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    return make_problems(tmp_path_factory.mktemp("words"), "--n-solutions", "400")


@pytest.mark.slow
@needs_package
def test_every_solution_verifies_and_ends_in_its_answer(sets):
    for row in sets["warmup"] + sets["solutions"]:
        answer = re.search(r"\\boxed\{(\d+)\}$", row["response"])[1]
        assert verifier.verify(row["response"], answer).correct is True and row["response"].startswith("<think>\n")
        steps = row["response"].split("</think>")[0]
        assert answer in re.findall(r"\d+", steps)                                # the last step says it too


@pytest.mark.slow
@needs_package
def test_no_two_problems_share_their_numbers(sets):
    """A problem without its names: words that begin with a capital, or differ between draws of a template, are left out."""
    assert {name: len(rows) for name, rows in sets.items()} == {"warmup": 200, "solutions": 400, "problems": 500, "rlvr": 320,
                                                                "seen": 96, "hard": 64}
    pids = [row["pid"] for rows in sets.values() for row in rows]
    assert len(set(pids)) == len(pids)
    shape = lambda text: (tuple(re.findall(r"\d+", text)), len(text.split()), text.split()[-1])
    shapes = {name: {shape(row["problem"]) for row in rows} for name, rows in sets.items()}
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
    first, again = make_problems(tmp_path / "a", *small), make_problems(tmp_path / "b", *small)
    other = make_problems(tmp_path / "c", "--seed", "1", *small)
    assert first == again and first["seen"] != other["seen"]


@pytest.mark.slow
def test_without_the_package_one_sentence(tmp_path):
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    (tmp_path / "reasoning_gym").mkdir()                     # a package without what is imported, whether or not the real one is there
    (tmp_path / "reasoning_gym/__init__.py").write_text("")
    done = subprocess.run([sys.executable, ROOT / "toy/word_problems.py", "--out", tmp_path / "out"], capture_output=True, text=True,
                          env=env)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "reasoning-gym==0.1.25" in done.stderr and "WITH_WORDS=1" in done.stderr and not (tmp_path / "out").exists()


def test_the_plan_names_the_hours_of_the_core_and_the_card():
    """By hand: 200 x 2 + 2,240 + 7 x 150 x 3 sequences of 142 tokens at 88 a second; responses of 65 tokens at 124; and so on."""
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": "/nonexistent", "RUNS": "runs"}
    done = subprocess.run(["bash", ROOT / "run_all.sh", "laptop", "--plan"], capture_output=True, text=True, env=env, timeout=60)
    assert done.returncode == 0 and "GPU hours (train 0.00 to 0.01 h" in done.stdout
    core = float(re.search(r"Without a GPU: ([\d.]+) h of a CPU core", done.stdout)[1])
    trained = (24 * 16 + 2240 + 7 * 27 * 16) * 142
    drawn = (500 * 9 + 500 * 3 + 9 * 160 * 4) * 65
    scored = (1700 + 0.9 * 1500 + 9 * 160) * 65
    read = 64 * 65 + 8 * 77
    rlvr = 20 * (64 * 65 / 124 + read / 88 + read / 190)
    assert core == pytest.approx((trained / 88 + drawn / 124 + scored / 190 + rlvr) / 3600, abs=0.06)


# ------------------------------------------------------------------------- a base that is made, a teacher that is a model


def planned(folder, changes):
    """The commands of a recipe that starts from the paper's, as lists of words, without python or torchrun."""
    (folder / "paper_1.5b.toml").write_text((ROOT / "recipes/paper_1.5b.toml").read_text())
    recipe = folder / "mine.toml"
    recipe.write_text(f'from = "paper_1.5b"\n[run]\n{changes}\n')
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": "/nonexistent", "RUNS": "runs"}
    done = subprocess.run(["bash", ROOT / "run_all.sh", recipe, "--plan"], capture_output=True, text=True, env=env, timeout=60)
    assert done.returncode == 0, done.stderr
    lines = re.findall(r"^\[\d+\] (.*)$", done.stdout, re.M)
    return [line[re.search(r"\w+\.py|tools\.\w+", line).start():].split() for line in lines]


def flag(words, name):
    return words[words.index(name) + 1]


def test_a_users_own_teacher_samples_what_would_be_imported(tmp_path):
    plain = planned(tmp_path, "")
    mine = planned(tmp_path, 'teacher_model = "o/teacher"\nproblems_source = "o/problems"\nteacher_samples = 5')
    named = [words for words in mine if words not in plain]
    assert [words[:2] for words in named] == [["01_sample.py", "problems"], ["01_sample.py", "model"]]
    assert flag(named[0], "--source") == "o/problems" and "--benchmarks" in named[0]
    assert (flag(named[1], "--model"), flag(named[1], "--n"), flag(named[1], "--name")) == ("o/teacher", "5", "teacher")
    assert flag(named[1], "--problems") == flag(named[0], "--out") == "runs/mine/data/problems.jsonl"
    assert [words[:2] for words in plain if words not in mine] == [["01_sample.py", "teacher"]]


def test_a_base_that_is_made_is_the_base_of_all_that_follows(tmp_path):
    mine = planned(tmp_path, 'self_model = ""\nwarmup = "few.jsonl"\nwarmup_epochs = 3\nteacher_solutions = "many.jsonl"\n'
                             'problems_source = "o/problems"')
    trained = [words for words in mine if words[0] == "03_train_oxa.py"]
    base, teacher = "runs/mine/data/base", "runs/mine/data/teacher"
    assert [flag(words, "--model") for words in trained] == ["runs/mine/base", *[base] * 5]
    assert [flag(words, "--data") for words in trained[:2]] == ["few.jsonl", "many.jsonl"]
    assert [flag(words, "--out") for words in trained[:2]] == [base, teacher] and flag(trained[0], "--epochs") == "3"
    samples = [flag(words, "--model") for words in mine if words[:2] == ["01_sample.py", "model"]]
    assert samples == [teacher, base]
    assert {flag(words, "--model") for words in mine if words[1] == "score"} == {base}


@pytest.mark.parametrize("changes, said", [
    ('teacher_model = "o/t"', "problems_source is missing"), ("warmup_epochs = 0", "warmup_epochs must be at least 1"),
    ("teacher_samples = 0", "teacher_samples must be at least 1"), ('world = "deep-leap"\nworld_base = "base"', "is for real models")])
def test_a_recipe_that_lacks_something_is_one_sentence(tmp_path, changes, said):
    (tmp_path / "paper_1.5b.toml").write_text((ROOT / "recipes/paper_1.5b.toml").read_text())
    recipe = tmp_path / "mine.toml"
    recipe.write_text(f'from = "paper_1.5b"\n[run]\n{changes}\n')
    done = subprocess.run(["bash", ROOT / "run_all.sh", recipe, "--plan"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1
