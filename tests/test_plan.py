"""tools/plan.py and tools/recipe.py: sizes against real tiny models, arithmetic by hand, recipes, what is missing."""

import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, make_model

import common
from model import halve_linear, load_model, pack_sequences, save_checkpoint, token_logprobs
import engines
from tools import levers, plan, recipe as recipes, roofline

RECIPES = sorted(path.name for path in (ROOT / "recipes").glob("*.toml"))
BARE = {"run": {"base_model": "Qwen2.5-Math-1.5B"}}
TINY = {"tied": {}, "untied": {"tie": False}, "llama": {"kind": "llama"}, "wide": {"num_attention_heads": 4, "num_hidden_layers": 3,
                                                       "hidden_size": 128}}


@pytest.fixture(scope="module", params=TINY)
def tiny(request, tmp_path_factory):
    """(a plan's model, the real one, its directory)"""
    path = make_model(tmp_path_factory.mktemp(request.param), **TINY[request.param])
    return plan.find_model(path), load_model(path, trainable=True), path


# ----------------------------------------------------------------------------------------- sizes against real models


def test_parameters_are_counted(tiny):
    sizes, model, _ = tiny
    assert sizes.n_params == sum(p.numel() for p in model.parameters())


def test_parameters_of_the_known_models():
    """As their model cards have them."""
    known = {"SmolLM2-135M-Instruct": 134_515_008,
             "Qwen2.5-0.5B": 494_032_768, "Qwen2.5-Math-1.5B": 1_543_714_304, "Qwen2.5-Math-7B": 7_615_616_512,
             "DeepSeek-R1-Distill-Qwen-1.5B": 1_777_088_000, "DeepSeek-R1-Distill-Qwen-7B": 7_615_616_512}
    assert {name: model.n_params for name, model in plan.KNOWN.items()} == known
    assert plan.find_model("Qwen/Qwen2.5-Math-7B") is plan.KNOWN["Qwen2.5-Math-7B"] and plan.find_model("a/b") is None


def test_optimizer_gradients_and_checkpoint(tiny, tmp_path, tiny_tokenizer):
    sizes, model, _ = tiny
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    packed = pack_sequences([(list(range(20)), 1)])
    token_logprobs(model, packed)[0].sum().backward()
    optimizer.step()
    state = sum(t.nbytes for s in optimizer.state.values() for t in s.values() if t.ndim)
    gradients = sum(p.grad.nbytes for p in model.parameters())
    s = {**plan.DEFAULTS["train"], "token_budget": 100}
    memory = plan.training_memory(sizes, s, 1)
    assert (memory["optimizer"], memory["gradients"], memory["weights"]) == (state, gradients, gradients)
    sharded = plan.training_memory(sizes, {**s, "shard": True}, 8)
    assert sharded == {part: size / 8 for part, size in memory.items()}

    save_checkpoint(tmp_path, "step-000001", model, tiny_tokenizer, optimizer, step=1)
    save_checkpoint(tmp_path, "final", model, tiny_tokenizer)
    files = [f for f in tmp_path.rglob("*") if f.name in ("model.safetensors", "state.pt")]
    weights_and_state = sum(f.stat().st_size for f in files)
    expected = plan.checkpoint_bytes(sizes, 1)
    assert 1.0 <= weights_and_state / expected < 1.0 + 60_000 / expected      # headers, names and the random states


def test_kv_cache(tiny):
    sizes, model, _ = tiny
    slots = engines.KVSlots(model.config, 3, 50, torch.bfloat16, "cpu")
    assert sizes.kv_bytes() * 3 * 50 == sum(t.nbytes for t in slots.keys + slots.values)


@pytest.mark.parametrize("tie", [True, False])
def test_frozen_models_keep_their_numbers_in_half_the_memory(tie, tmp_path):
    """bf16 linear layers under autocast: the very numbers of float32 weights under autocast, and the planned bytes."""
    path = make_model(tmp_path / "m", tie=tie)
    model = load_model(path)
    packed = pack_sequences([(list(range(60)), 1), (list(range(7, 30)), 4)])

    def hidden():
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            return model.model(input_ids=packed.input_ids[None], position_ids=packed.position_ids[None], pack=packed,
                               use_cache=False).last_hidden_state
    before = hidden()
    halve_linear(model)
    assert torch.equal(before, hidden())
    assert plan.find_model(path).frozen_bytes() == sum(p.nbytes for p in model.parameters())


# ----------------------------------------------------------------------------------------------- arithmetic by hand


def test_training_by_hand():
    """The traced step of 1.5B on 8 cards: its seconds a token at the mean length of each objective's sequences, and a
    step's end for each step."""
    plans, model = plan.Plan(BARE, 8), plan.KNOWN["Qwen2.5-Math-1.5B"]
    s = plans.settings("train", data="x/sft/train.jsonl", gradient_checkpointing=True)
    cost = plans.train(s, model)
    steps, pack = 50000 // 128 * 6, roofline.traced_pack(model, "ddp", True, 32768)
    assert cost.tokens == steps * 128 * (11000 + 150) and cost.note == "2,340 steps of 128 + 0 sequences"

    def seconds(tokens, length):
        kinds = roofline.pack_seconds(pack, 32768, 1.3 * length, plans.p)
        return (sum(kinds.values()) - kinds["optimizer"]) * tokens / 8 / 32768
    end = steps * roofline.kernel_seconds("optimizer", pack["work"]["optimizer"], plans.p)
    assert cost.seconds == pytest.approx(seconds(cost.tokens, 11150) + end)
    assert sum(cost.memory.values()) == sum(pack["memory"].values()) > 16 * model.n_params
    both = plans.train({**s, "data": "x/oxa_full/train.jsonl"}, model)
    more = steps * 128 * (7000 + 150)
    assert both.tokens == cost.tokens + more
    assert both.seconds == pytest.approx(cost.seconds + seconds(more, 7150))
    alone = roofline.traced_train(model, s, 1)                    # one card, not traced: without DDP's buckets
    assert alone["memory"] == {**pack["memory"], "DDP buckets": 0}


def test_what_was_not_traced_has_no_hours_and_says_so():
    """An R1-distilled 1.5B: 16 bytes a parameter are known, activations and kernels are not."""
    plans, model = plan.Plan({"run": {"base_model": "DeepSeek-R1-Distill-Qwen-1.5B"}}, 8), plan.KNOWN["DeepSeek-R1-Distill-Qwen-1.5B"]
    for section in ("train", "rlvr"):
        cost = plans.cost(section, plans.settings(section, gpu_memory=0.3))
        known = sum(cost.memory[part] for part in ("weights", "gradients", "optimizer"))
        assert known == 16 * model.n_params and "not traced" in cost.note and not cost.kinds
    assert plans.cost("train", plans.settings("train")).seconds == 0
    assert "not traced" in plans.cost("score", plans.settings("score")).note
    assert "not traced" not in plan.Plan(BARE, 8).cost("score", plans.settings("score")).note


def test_decoding_by_hand():
    """64 responses on a card side by side: as many steps as the longest has tokens, all keys and values read in each."""
    p, model = plan.ASSUMED, plan.KNOWN["Qwen2.5-Math-1.5B"]
    bandwidth = 3.35e12 * 0.4
    lengths = [9000] * 63 + [18432]
    read = sum(n * (150 + n / 2) for n in lengths) * 28672
    products = sum(lengths) * 2 * model.n_params / (989e12 * 0.4)
    expected = 18432 * (0.008 + 2 * model.n_params / bandwidth) + read / bandwidth + products
    assert levers.drain_seconds(model, lengths, 60e9, p) == pytest.approx(expected)
    assert levers.drain_seconds(model, lengths, 1e9, p) > 1.5 * expected      # a small cache: they take turns
    one_by_one = (sum(lengths) * (0.008 + 2 * model.n_params / bandwidth) + read / bandwidth + products)
    assert levers.drain_seconds(model, lengths, 0, p) == pytest.approx(one_by_one)


def test_rlvr_says_what_the_paper_length_takes():
    recipe = recipes.load_recipe(ROOT / "recipes/paper_1.5b.toml")
    plans = plan.Plan(recipe, 8)
    cost = plans.rlvr(plans.settings("rlvr"), plans.base)
    assert "300 steps of 512 rollouts" in cost.note
    assert cost.whole == 3120
    whole = plans.rlvr(plans.settings("rlvr", max_steps=0), plans.base)
    assert whole.seconds == pytest.approx(cost.seconds * 3120 / 300) and whole.whole == 0


@pytest.mark.parametrize("name, cards", [("paper_1.5b.toml", 8), ("paper_7b.toml", 8), ("smoke_1gpu.toml", 1)])
def test_recipes_fit_their_cards(name, cards):
    """And 7B would not without fully_shard, nor its RLVR with vLLM awake."""
    recipe = recipes.load_recipe(ROOT / "recipes" / name)
    plans = plan.Plan(recipe, cards)
    fits = lambda section, **given: sum(plans.cost(section, plans.settings(section, **given)).memory.values()) < 80e9
    assert all(fits(section) for section in ("sample", "score", "train", "rlvr", "eval"))
    if "7b" in name:
        assert not fits("train", shard=False) and not fits("rlvr", sleep=False)


def test_read_command():
    recipe = recipes.load_recipe(ROOT / "recipes/paper_1.5b.toml")
    plans = plan.Plan(recipe, 8)
    words = "torchrun --nproc_per_node 8 04_rlvr.py --recipe r --model m/x --max-response-tokens 16384 --out o".split()
    section, s = plan.read_command(words, plans)
    assert section == "rlvr" and s["max_response_tokens"] == 16384 and s["rollouts"] == 8 and s["model"] == "m/x"
    assert plan.read_command("python 01_sample.py model --n 3 --limit 10".split(), plans)[1]["n"] == 3
    assert plan.read_command("python -m tools.report runs/x".split(), plans) == (None, {})
    evaluation = plans.cost("eval", plans.settings("eval"))
    assert evaluation.note == "932 problems, 45,888 samples"           # 160 x 128 + 272 x 64 + 500 x 16


# ------------------------------------------------------------------------------------------------ the paper's recipes


@pytest.mark.parametrize("size, steps", [("1.5b", 18432), ("7b", 16384)])
def test_paper_recipes_have_the_papers_numbers(size, steps):
    recipe = recipes.load_recipe(ROOT / f"recipes/paper_{size}.toml")
    train, rlvr, select, evaluation = (recipe[s] for s in ("train", "rlvr", "select", "eval"))
    assert (train["lr"], select["mu"]) == ((2.5e-4, 2.5) if size == "1.5b" else (5e-5, 3.0))
    assert (train["ce_per_step"], train["ul_per_step"], train["epochs"], train["ul_weight"]) == (128, 128, 6, 1e-4)
    assert (select["n_ce"], select["n_ul"], select["sigma"], select["cap"], select["min_ppl_ul"]) == (50000, 50000,
                                                                                                      .25, 1, 1.2)
    assert (rlvr["prompts_per_step"], rlvr["rollouts"], rlvr["temperature"], rlvr["lr"]) == (64, 8, .85, 2e-6)
    assert (rlvr["kl_coef"], rlvr["dual_clip"], rlvr["grad_clip"]) == (1e-3, 3.0, 1.0)
    assert (rlvr["max_response_tokens"], rlvr["epochs"], rlvr["save_every"]) == (steps, 20, 20)
    assert recipe["run"]["published_rlvr_limits"] == {"sft": steps - 2048, "sft_lp": steps - 2048, "oxa_mle": steps,
                                                      "oxa_full": steps}
    assert (evaluation["n"], evaluation["temperature"], evaluation["top_p"], evaluation["max_tokens"]) == (128, .6,
                                                                                                           .95, 32768)
    assert evaluation["n_of"][0] == "minerva=64" and len(recipe["run"]["benchmarks"]) == 7


# ------------------------------------------------------------------------------------------------ the command itself


def run_all(*args, **env):
    return subprocess.run(["bash", ROOT / "run_all.sh", *args], capture_output=True, text=True, timeout=60, cwd="/",
                          env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": "/nonexistent", **env})


@pytest.mark.slow
@pytest.mark.parametrize("name", ["paper_1.5b", "paper_7b", "smoke_1gpu", "laptop", "toy"])
def test_plan_of_run_all(name, tmp_path):
    done = run_all(name, "--plan", RUNS=str(tmp_path / "runs"))
    assert done.returncode == 0 and not done.stderr
    text = done.stdout
    for script in ("01_sample.py model", "02_verify_score.py score", "02_verify_score.py select", "03_train_oxa.py",
                   "04_rlvr.py", "05_eval.py", "tools.report"):
        assert script in text
    assert "DOES NOT FIT" not in text and not (tmp_path / "runs").exists()
    if name != "toy":
        assert "Missing here: " in text and "network to the hub" in text and " h on " in text and "weights" in text


def test_paper_recipe_cannot_start_here():
    done = run_all("paper_1.5b")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: recipes/paper_1.5b.toml cannot run here, missing: ")
    assert "network to the hub" in done.stderr


def test_plan_needs_nothing_installed():
    commands = "python 03_train_oxa.py --data a/sft/train.jsonl\n"
    done = subprocess.run([sys.executable, "-S", "-m", "tools.plan", ROOT / "recipes/paper_7b.toml"],
                          input=commands,
                          capture_output=True, text=True, cwd=ROOT, env={"PATH": os.environ["PATH"],
                                                                         "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0 and "2,340 steps" in done.stdout


def test_missing_files_cache_and_wrong_recipes(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("HF_HOME", raising=False)
    data = tmp_path / "rlvr.jsonl"
    recipe = {"run": {"world": "none", "base_model": "o/base", "rlvr_source": str(data),
                      "benchmarks": {"b": "o/bench"}}}
    lacking = recipes.missing(recipe)
    assert lacking == [f"the files {data}", "network to the hub, or local copies of o/base, o/bench"]
    data.write_text("{}\n")
    (tmp_path / "cache/models--o--base").mkdir(parents=True)
    assert recipes.missing(recipe) == ["network to the hub, or local copies of o/bench"]
    (tmp_path / "cache/datasets--o--bench").mkdir()
    assert recipes.missing(recipe) == [] and "disk" in recipes.missing(recipe, disk=1e18)[0]
    recipe["run"]["cards"] = 4096
    assert recipes.missing(recipe)[0].startswith("4096 GPUs")
    for text, said in (("[plan]\ncards = 1\n", "unknown keys ['cards']"), ('[run]\nbase_model = "a/b"\n',
                                                                           "sizes of a/b")):
        path = tmp_path / "r.toml"
        path.write_text(text)
        monkeypatch.setattr("sys.stdin", open(os.devnull))
        with pytest.raises(SystemExit) as stop:
            plan.show(path, recipes.load_recipe(path), [], 1)
        assert stop.value.code == 2 and said in capsys.readouterr().err


# --------------------------------------------------------------------------------------------- recipes from recipes


def write_recipes(folder, **texts):
    for name, text in texts.items():
        (folder / f"{name}.toml").write_text(text)


def test_a_recipe_from_another_names_what_differs(tmp_path):
    write_recipes(tmp_path, base='[run]\narms = ["a", "b"]\nn_seeds = 3\n[run.benchmarks]\nx = "1"\ny = "2"\n[train]\nlr = 1.0\n',
                  middle='from = "base"\n[train]\nepochs = 2\n', top='from = "middle"\n[run]\narms = ["c"]\n[run.benchmarks]\nz = "3"\n[eval]\nn = 4\n')
    expected = {"run": {"arms": ["c"], "n_seeds": 3, "benchmarks": {"z": "3"}}, "train": {"lr": 1.0, "epochs": 2},
                "eval": {"n": 4}}
    assert recipes.load_recipe(tmp_path / "top.toml") == expected == common.load_recipe(tmp_path / "top.toml")


@pytest.mark.parametrize("name", RECIPES)
def test_both_loaders_read_alike(name):
    path = ROOT / "recipes" / name
    assert recipes.load_recipe(path) == common.load_recipe(path)


@pytest.mark.parametrize("text, said", [
    ('from = "away"\n', "away.toml does not exist"), ('from = "self"\n', "starts from itself"),
    ('from = "other"\n', "starts from itself"), ("from = 3\n", "not the name of a recipe"),
    ('from = "../x"\n', "not the name of a recipe"), ("train = 3\n", "stands in no section"),
    ("[trian]\nlr = 3\n", "unknown section [trian]"), ("[train\n", "is not valid TOML"), ("\x00", "is not valid TOML"),
    ("a = " + "[" * 5000 + "]" * 5000, "is not valid TOML")])
def test_recipes_that_cannot_be_read(text, said, tmp_path, capsys):
    write_recipes(tmp_path, self=text, other='from = "self"\n')
    for load in (recipes.load_recipe, common.load_recipe):
        with pytest.raises(SystemExit) as stop:
            load(tmp_path / "self.toml")
        err = capsys.readouterr().err
        assert stop.value.code == 2 and said in err and err.count("\n") == 1


def values_of(recipe, **given):
    found = {}
    for key, value in recipes.settings(recipe, **given):
        found.setdefault(key, []).append(value)
    return found


def test_what_the_shell_is_told():
    paper = values_of(recipes.load_recipe(ROOT / "recipes/paper_1.5b.toml"))
    assert paper["seeds"] == [42] and paper["rlvr_seeds"] == [42] and paper["source_of.math500"] == ["HuggingFaceH4/MATH-500"]
    assert len(paper["benchmarks"]) == 7 and not any(key.startswith("rlvr_limit.") for key in paper)
    assert '"lr": 0.00025' in paper["section_of.03_train_oxa.py"][0]
    toy = recipes.load_recipe(ROOT / "recipes/toy.toml")
    assert values_of(toy)["arms"] == ["sft", "sft_lp", "oxa_mle", "oxa_full"] and values_of(toy)["seeds"] == [0]
    study = values_of(toy, n_seeds=5)
    assert study["arms"][4:] == ["length_matched", "longest"] and study["rlvr_arms"] == ["sft", "oxa_full", "oxa_mle"]
    assert study["seeds"] == [0, 1, 2, 3, 4] and study["rlvr_seeds"] == [0, 1, 2]
    toy["run"]["instruction"] = "\nThink.\t"                       # is every stage's, so each runs again
    told = values_of(toy)
    assert all("\\nThink.\\t" in told[key][0] for key in told if key.startswith("section_of."))


@pytest.mark.parametrize("change, said", [
    ({"first_seed": "1"}, "first_seed = '1' must be of type int"), ({"cards": True}, "cards = True"),
    ({"n_seeds": 0}, "n_seeds must be at least 1"), ({"first_seed": -1}, "out of range"), ({"seed": 1}, "unknown key 'seed'"),
    ({"arms": ["../x"]}, "'../x' must be a name"), ({"arms": [3]}, "3 must be a text"), ({"rlvr_arms": ["x"]}, "not one of arms"),
    ({"rlvr_source": "a\tb"}, "without control characters"), ({"benchmarks": ["id"]}, "must name their sources"),
    ({"rlvr_limits": "fair"}, "rlvr_limits = 'fair'"), ({"data_per_seed": "yes"}, "of type bool"), ({"arms": []}, "arms is missing"),
    ({"rlvr_limits": "published", "published_rlvr_limits": {"sft": "x"}, "rlvr_arms": ["sft"]}, "no number of tokens for 'sft'")])
def test_a_wrong_run_section_is_one_sentence(change, said, capsys):
    recipe = recipes.load_recipe(ROOT / "recipes/paper_1.5b.toml")
    recipe["run"] = {**recipe["run"], **change}
    with pytest.raises(SystemExit) as stop:
        values_of(recipe)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and said in err and err.count("\n") == 1


@pytest.mark.parametrize("section, key, value", [
    ("train", "epochs", "x"), ("train", "epochs", [3]), ("train", "shard", "no"), ("train", "model", [3]), ("train", "token_budget", 0),
    ("rlvr", "max_steps", float("nan")), ("train", "epochs", -1), ("select", "n_ce", float("inf")), ("eval", "n_of", 3), ("eval", "n_of", ["x"]),
    ("plan", "card_gb", "x"), ("plan", "card", 3), ("plan", "card", "\x1b[31m"), ("plan", "teacher_tokens", float("nan")),
    ("plan", "self_tokens", -5), ("plan", "utilisation", [0.1]), ("plan", "utilisation", {"a": 1}), ("plan", "max_seqs", True),
    ("plan", "bandwidth_tbs", 0)])
def test_a_value_that_no_plan_can_be_made_with_is_one_sentence(section, key, value, capsys):
    recipe = recipes.load_recipe(ROOT / "recipes/paper_1.5b.toml")
    recipe[section] = {**recipe[section], key: value}
    with pytest.raises(SystemExit) as stop:
        plan.Plan(recipe, 8)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.startswith(f"error: [{section}]: {key} = ") and said.count("\n") == 1 and "\x1b" not in said
