"""tools/plan.py and tools/recipe.py: sizes against real tiny models, arithmetic by hand, recipes,
and what is missing on this machine."""

import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, make_model

import common
import engines
from model import halve_linear, load_model, pack_sequences, save_checkpoint, token_logprobs
from tools import levers, plan, recipe as recipes, roofline

RECIPES = sorted(path.name for path in (ROOT / "recipes").glob("*.toml"))
BARE = {"run": {"base_model": "Qwen2.5-Math-1.5B"}}

# Name -> what is changed of conftest's tiny model.
TINY = {
    "tied": {},
    "untied": {"tie": False},
    "llama": {"kind": "llama"},
    "wide": {"num_attention_heads": 4, "num_hidden_layers": 3, "hidden_size": 128},
}


@pytest.fixture(scope="module", params=TINY)
def tiny(request, tmp_path_factory):
    """(a tiny model as the plan sees it, the real one)"""
    path = make_model(tmp_path_factory.mktemp(request.param), **TINY[request.param])
    return plan.find_model(path), load_model(path, trainable=True)


def paper_recipe(size="1.5b"):
    return recipes.load_recipe(ROOT / f"recipes/paper_{size}.toml")


def refused(capsys, function, *args):
    """Call `function`, which must end with code 2 and one line -> that line."""
    with pytest.raises(SystemExit) as stop:
        function(*args)
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    return said


def total_bytes(tensors):
    return sum(tensor.nbytes for tensor in tensors)


# ------------------------------------------------------------------------ sizes against real models


def test_parameters_are_counted(tiny):
    sizes, model = tiny
    assert sizes.n_params == sum(p.numel() for p in model.parameters())


def test_parameters_of_the_known_models():
    """As their model cards have them."""
    known = {
        "SmolLM2-135M-Instruct": 134_515_008,
        "Qwen2.5-0.5B": 494_032_768,
        "Qwen2.5-Math-1.5B": 1_543_714_304,
        "Qwen2.5-Math-7B": 7_615_616_512,
        "DeepSeek-R1-Distill-Qwen-1.5B": 1_777_088_000,
        "DeepSeek-R1-Distill-Qwen-7B": 7_615_616_512,
    }
    assert {name: model.n_params for name, model in plan.KNOWN.items()} == known
    assert plan.find_model("Qwen/Qwen2.5-Math-7B") is plan.KNOWN["Qwen2.5-Math-7B"]
    assert plan.find_model("a/b") is None


def test_optimizer_gradients_and_checkpoint(tiny, tmp_path, tiny_tokenizer):
    """After a real step of AdamW the planned bytes are those of its tensors and files."""
    sizes, model = tiny
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    logp, _ = token_logprobs(model, pack_sequences([(list(range(20)), 1)]))
    logp.sum().backward()
    optimizer.step()
    moments = 0
    for state in optimizer.state.values():
        moments += total_bytes(t for t in state.values() if t.ndim)       # not its count of steps
    gradients = total_bytes(p.grad for p in model.parameters())

    flags = {**plan.DEFAULTS["train"], "token_budget": 100}
    memory = plan.training_memory(sizes, flags, 1)
    assert memory["optimizer"] == moments
    assert memory["gradients"] == gradients
    assert memory["weights"] == gradients
    sharded = plan.training_memory(sizes, {**flags, "shard": True}, 8)
    assert sharded == {part: size / 8 for part, size in memory.items()}

    save_checkpoint(tmp_path, "step-000001", model, tiny_tokenizer, optimizer, step=1)
    save_checkpoint(tmp_path, "final", model, tiny_tokenizer)
    written = 0
    for name in ("model.safetensors", "state.pt"):
        written += sum(path.stat().st_size for path in tmp_path.rglob(name))
    expected = plan.checkpoint_bytes(sizes, 1)
    assert expected <= written < expected + 60_000       # headers, names and the random states


def test_kv_cache(tiny):
    """Bytes a token, against the engine's own cache of 3 slots of 50 tokens."""
    sizes, model = tiny
    slots = engines.KVSlots(model.config, 3, 50, torch.bfloat16, "cpu")
    assert sizes.kv_bytes() * 3 * 50 == total_bytes(slots.keys + slots.values)


@pytest.mark.parametrize("tie", [True, False])
def test_frozen_models_keep_their_numbers_in_half_the_memory(tie, tmp_path):
    """bf16 linear layers under autocast: the very numbers of float32 weights under autocast, and
    the planned bytes."""
    path = make_model(tmp_path / "m", tie=tie)
    model = load_model(path)
    pack = pack_sequences([(list(range(60)), 1), (list(range(7, 30)), 4)])

    def hidden():
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            out = model.model(input_ids=pack.input_ids[None], position_ids=pack.position_ids[None],
                              pack=pack, use_cache=False)
        return out.last_hidden_state

    before = hidden()
    halve_linear(model)
    assert torch.equal(before, hidden())
    assert plan.find_model(path).frozen_bytes() == total_bytes(model.parameters())


# ------------------------------------------------------------------------------- arithmetic by hand


def test_training_by_hand():
    """The traced step of 1.5B on 8 cards: its seconds a token at the mean length of each
    objective's sequences, and a step's end for each step."""
    plans = plan.Plan(BARE, 8)
    model = plan.KNOWN["Qwen2.5-Math-1.5B"]
    pack = roofline.traced_pack(model, "ddp", True, 32768)
    in_pack = sum(pack["memory"].values())
    steps = 50000 // 128 * 6
    step_end = roofline.kernel_seconds("optimizer", pack["work"]["optimizer"], plans.p)

    def seconds(tokens, length):
        """Without the ends of the steps. A mean token sits in a sequence of 1.3 x the mean length.
        """
        kinds = roofline.pack_seconds(pack, 32768, 1.3 * length, plans.p)
        a_pack = sum(kinds.values()) - kinds["optimizer"]
        return a_pack * tokens / 8 / 32768

    flags = plans.settings("train", data="x/sft/train.jsonl", gradient_checkpointing=True)
    sft = plans.train(flags, model)
    assert sft.tokens == steps * 128 * (11000 + 150)
    assert sft.note == "2,340 steps of 128 + 0 sequences"
    assert sft.seconds == pytest.approx(seconds(sft.tokens, 11150) + steps * step_end)
    assert sum(sft.memory.values()) == in_pack
    assert in_pack > 16 * model.n_params

    both = plans.train({**flags, "data": "x/oxa_full/train.jsonl"}, model)
    more = steps * 128 * (7000 + 150)
    assert both.tokens == sft.tokens + more
    assert both.seconds == pytest.approx(sft.seconds + seconds(more, 7150))

    one_card = roofline.traced_train(model, flags, 1)        # not traced: without DDP's buckets
    assert one_card["memory"] == {**pack["memory"], "DDP buckets": 0}


def test_what_was_not_traced_has_no_hours_and_says_so():
    """An R1-distilled 1.5B: 16 bytes a parameter are known, activations and kernels are not."""
    name = "DeepSeek-R1-Distill-Qwen-1.5B"
    plans = plan.Plan({"run": {"base_model": name}}, 8)
    for section in ("train", "rlvr"):
        cost = plans.cost(section, plans.settings(section, gpu_memory=0.3))
        known = sum(cost.memory[part] for part in ("weights", "gradients", "optimizer"))
        assert known == 16 * plan.KNOWN[name].n_params
        assert "not traced" in cost.note
        assert not cost.kinds
    assert plans.cost("train", plans.settings("train")).seconds == 0
    assert "not traced" in plans.cost("score", plans.settings("score")).note

    traced = plan.Plan(BARE, 8)
    assert "not traced" not in traced.cost("score", traced.settings("score")).note


def test_decoding_by_hand():
    """64 responses on a card side by side: as many steps as the longest has tokens, all keys and
    values read in each."""
    model = plan.KNOWN["Qwen2.5-Math-1.5B"]
    lengths = [9000] * 63 + [18432]
    bandwidth = 3.35e12 * 0.4
    token_bytes = 28672                  # 28 layers x 2 heads of 128 x keys and values x bf16
    read = sum(n * (150 + n / 2) for n in lengths) * token_bytes
    products = sum(lengths) * 2 * model.n_params / (989e12 * 0.4)
    reading_and_products = read / bandwidth + products
    a_step = 0.008 + 2 * model.n_params / bandwidth
    side_by_side = 18432 * a_step + reading_and_products
    one_by_one = sum(lengths) * a_step + reading_and_products

    def seconds(cache):
        return levers.drain_seconds(model, lengths, cache, plan.ASSUMED)

    assert seconds(cache=60e9) == pytest.approx(side_by_side)
    assert seconds(cache=1e9) > 1.5 * side_by_side, "they take turns"
    assert seconds(cache=0) == pytest.approx(one_by_one)


def test_rlvr_says_what_the_paper_length_takes():
    """The recipe stops after 300 of the paper's 3,120 steps."""
    plans = plan.Plan(paper_recipe(), 8)
    cost = plans.rlvr(plans.settings("rlvr"), plans.base)
    assert "300 steps of 512 rollouts" in cost.note
    assert cost.whole == 3120

    whole = plans.rlvr(plans.settings("rlvr", max_steps=0), plans.base)
    assert whole.seconds == pytest.approx(cost.seconds * 3120 / 300)
    assert whole.whole == 0


@pytest.mark.parametrize("name, cards", [
    ("paper_1.5b.toml", 8),
    ("paper_7b.toml", 8),
    ("smoke_1gpu.toml", 1)])
def test_recipes_fit_their_cards(name, cards):
    """And 7B would not without fully_shard, nor its RLVR with vLLM awake."""
    plans = plan.Plan(recipes.load_recipe(ROOT / "recipes" / name), cards)

    def fits(section, **flags):
        cost = plans.cost(section, plans.settings(section, **flags))
        return sum(cost.memory.values()) < 80e9

    for section in ("sample", "score", "train", "rlvr", "eval"):
        assert fits(section), section
    if "7b" in name:
        assert not fits("train", shard=False)
        assert not fits("rlvr", sleep=False)


def test_read_command():
    """The flags of a command go over the recipe's, and the recipe's over the defaults."""
    plans = plan.Plan(paper_recipe(), 8)

    def read(command):
        return plan.read_command(command.split(), plans)

    section, flags = read("torchrun --nproc_per_node 8 04_rlvr.py --recipe r --model m/x "
                          "--max-response-tokens 16384 --out o")
    assert section == "rlvr"
    assert flags["max_response_tokens"] == 16384
    assert flags["rollouts"] == 8
    assert flags["model"] == "m/x"
    _, flags = read("python 01_sample.py model --n 3 --limit 10")
    assert flags["n"] == 3
    assert read("python -m tools.report runs/x") == (None, {})

    evaluation = plans.cost("eval", plans.settings("eval"))
    samples = 160 * 128 + 272 * 64 + 500 * 16
    assert evaluation.note == f"932 problems, {samples:,} samples"


# ------------------------------------------------------------------------------ the paper's recipes


def assert_has(section, **values):
    """Keys of a recipe's section have these values."""
    assert {key: section[key] for key in values} == values


@pytest.mark.parametrize("size, limit", [("1.5b", 18432), ("7b", 16384)])
def test_paper_recipes_have_the_papers_numbers(size, limit):
    """`limit`: tokens of a response in RLVR."""
    lr = {"1.5b": 2.5e-4, "7b": 5e-5}[size]
    mu = {"1.5b": 2.5, "7b": 3.0}[size]
    recipe = paper_recipe(size)
    run = recipe["run"]

    assert_has(recipe["select"], mu=mu, sigma=0.25, n_ce=50000, n_ul=50000, cap=1, min_ppl_ul=1.2)
    assert_has(recipe["train"], lr=lr, epochs=6, ce_per_step=128, ul_per_step=128, ul_weight=1e-4)
    assert_has(recipe["rlvr"], lr=2e-6, prompts_per_step=64, rollouts=8, temperature=0.85,
               kl_coef=1e-3, dual_clip=3.0, grad_clip=1.0, max_response_tokens=limit,
               epochs=20, save_every=20)
    assert run["published_rlvr_limits"] == {"sft": limit - 2048, "sft_lp": limit - 2048,
                                            "oxa_mle": limit, "oxa_full": limit}
    assert_has(recipe["eval"], n=128, temperature=0.6, top_p=0.95, max_tokens=32768)
    assert recipe["eval"]["n_of"][0] == "minerva=64"
    assert len(run["benchmarks"]) == 7


# ------------------------------------------------------------------------------- the command itself


def run_all(*args, **env):
    """run_all.sh without a network or a cache of the hub."""
    without_hub = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": "/nonexistent"}
    return subprocess.run(["bash", ROOT / "run_all.sh", *args], capture_output=True, text=True,
                          timeout=60, cwd="/", env={**without_hub, **env})


@pytest.mark.slow
@pytest.mark.parametrize("name", ["paper_1.5b", "paper_7b", "smoke_1gpu", "laptop", "toy"])
def test_plan_of_run_all(name, tmp_path):
    """--plan prints every stage's command and figures, and makes nothing."""
    done = run_all(name, "--plan", RUNS=str(tmp_path / "runs"))
    assert done.returncode == 0
    assert not done.stderr
    assert not (tmp_path / "runs").exists()
    commands = ("01_sample.py model", "02_verify_score.py score", "02_verify_score.py select",
                "03_train_oxa.py", "04_rlvr.py", "05_eval.py", "tools.report")
    for command in commands:
        assert command in done.stdout
    assert "DOES NOT FIT" not in done.stdout
    if name != "toy":
        for words in ("Missing here: ", "network to the hub", " h on ", "weights"):
            assert words in done.stdout


def test_paper_recipe_cannot_start_here():
    done = run_all("paper_1.5b")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: recipes/paper_1.5b.toml cannot run here, missing: ")
    assert "network to the hub" in done.stderr


def test_plan_needs_nothing_installed():
    """python -S: without site-packages."""
    done = subprocess.run(
        [sys.executable, "-S", "-m", "tools.plan", ROOT / "recipes/paper_7b.toml"],
        input="python 03_train_oxa.py --data a/sft/train.jsonl\n", capture_output=True, text=True,
        cwd=ROOT, env={"PATH": os.environ["PATH"], "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0
    assert "2,340 steps" in done.stdout


def test_missing_files_cache_and_wrong_recipes(tmp_path, monkeypatch, capsys):
    """What is missing is named until it is there; a recipe that no plan can be made of is refused.
    """
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("HF_HOME", raising=False)
    data = tmp_path / "rlvr.jsonl"
    run = {"world": "none",
           "base_model": "o/base",
           "rlvr_source": str(data),
           "benchmarks": {"b": "o/bench"}}
    recipe = {"run": run}
    from_hub = "network to the hub, or local copies of"

    assert recipes.missing(recipe) == [f"the files {data}", f"{from_hub} o/base, o/bench"]
    data.write_text("{}\n")
    (tmp_path / "cache/models--o--base").mkdir(parents=True)
    assert recipes.missing(recipe) == [f"{from_hub} o/bench"]
    (tmp_path / "cache/datasets--o--bench").mkdir()
    assert recipes.missing(recipe) == []
    assert "disk" in recipes.missing(recipe, disk=1e18)[0]
    run["cards"] = 4096
    assert recipes.missing(recipe)[0].startswith("4096 GPUs")

    def refusal_of(text):
        path = tmp_path / "r.toml"
        path.write_text(text)
        return refused(capsys, plan.show, path, recipes.load_recipe(path), [], 1)

    assert "unknown keys ['cards']" in refusal_of("[plan]\ncards = 1\n")
    assert "sizes of a/b" in refusal_of('[run]\nbase_model = "a/b"\n')


# ----------------------------------------------------------------------------- recipes from recipes


def write_recipes(folder, **texts):
    """A file NAME.toml of each text."""
    for name, text in texts.items():
        (folder / f"{name}.toml").write_text(text)


def test_a_recipe_from_another_names_what_differs(tmp_path):
    """Keys go over keys, section by section; a table is one value, and goes over the whole."""
    write_recipes(
        tmp_path,
        base='[run]\narms = ["a", "b"]\nn_seeds = 3\n'
             '[run.benchmarks]\nx = "1"\ny = "2"\n'
             '[train]\nlr = 1.0\n',
        middle='from = "base"\n[train]\nepochs = 2\n',
        top='from = "middle"\n[run]\narms = ["c"]\n[run.benchmarks]\nz = "3"\n[eval]\nn = 4\n')
    expected = {"run": {"arms": ["c"], "n_seeds": 3, "benchmarks": {"z": "3"}},
                "train": {"lr": 1.0, "epochs": 2},
                "eval": {"n": 4}}
    assert recipes.load_recipe(tmp_path / "top.toml") == expected
    assert common.load_recipe(tmp_path / "top.toml") == expected


@pytest.mark.parametrize("name", RECIPES)
def test_both_loaders_read_alike(name):
    path = ROOT / "recipes" / name
    assert recipes.load_recipe(path) == common.load_recipe(path)


@pytest.mark.parametrize("text, said", [
    ('from = "away"\n', "away.toml does not exist"),
    ('from = "self"\n', "starts from itself"),
    ('from = "other"\n', "starts from itself"),
    ("from = 3\n", "not the name of a recipe"),
    ('from = "../x"\n', "not the name of a recipe"),
    ("train = 3\n", "stands in no section"),
    ("[trian]\nlr = 3\n", "unknown section [trian]"),
    ("[train\n", "is not valid TOML"),
    ("\x00", "is not valid TOML"),
    ("a = " + "[" * 5000 + "]" * 5000, "is not valid TOML")])
def test_recipes_that_cannot_be_read(text, said, tmp_path, capsys):
    write_recipes(tmp_path, self=text, other='from = "self"\n')
    for load in (recipes.load_recipe, common.load_recipe):
        assert said in refused(capsys, load, tmp_path / "self.toml")


def values_of(recipe, **given):
    """key -> all its values, of what the shell is told."""
    found = {}
    for key, value in recipes.settings(recipe, **given):
        found.setdefault(key, []).append(value)
    return found


def test_what_the_shell_is_told():
    """Of the paper's recipe, of the toy's, of the toy's with more seeds and with a new instruction.
    """
    paper = values_of(paper_recipe())
    assert paper["seeds"] == [42]
    assert paper["rlvr_seeds"] == [42]
    assert paper["source_of.math500"] == ["HuggingFaceH4/MATH-500"]
    assert len(paper["benchmarks"]) == 7
    assert not any(key.startswith("rlvr_limit.") for key in paper)
    assert '"lr": 0.00025' in paper["section_of.03_train_oxa.py"][0]

    recipe = recipes.load_recipe(ROOT / "recipes/toy.toml")
    toy = values_of(recipe)
    assert toy["arms"] == ["sft", "sft_lp", "oxa_mle", "oxa_full"]
    assert toy["seeds"] == [0]

    study = values_of(recipe, n_seeds=5)
    assert study["arms"][4:] == ["length_matched", "longest"]
    assert study["rlvr_arms"] == ["sft", "oxa_full", "oxa_mle"]
    assert study["seeds"] == [0, 1, 2, 3, 4]
    assert study["rlvr_seeds"] == [0, 1, 2]

    recipe["run"]["instruction"] = "\nThink.\t"              # is every stage's, so each runs again
    instructed = values_of(recipe)
    stages = [key for key in instructed if key.startswith("section_of.")]
    assert len(stages) == len(recipes.SECTION_OF)
    for stage in stages:
        assert "\\nThink.\\t" in instructed[stage][0]


@pytest.mark.parametrize("change, said", [
    ({"first_seed": "1"}, "first_seed = '1' must be of type int"),
    ({"cards": True}, "cards = True"),
    ({"n_seeds": 0}, "n_seeds must be at least 1"),
    ({"first_seed": -1}, "out of range"),
    ({"seed": 1}, "unknown key 'seed'"),
    ({"arms": ["../x"]}, "'../x' must be a name"),
    ({"arms": [3]}, "3 must be a text"),
    ({"rlvr_arms": ["x"]}, "not one of arms"),
    ({"rlvr_source": "a\tb"}, "without control characters"),
    ({"benchmarks": ["id"]}, "must name their sources"),
    ({"rlvr_limits": "fair"}, "rlvr_limits = 'fair'"),
    ({"data_per_seed": "yes"}, "of type bool"),
    ({"arms": []}, "arms is missing"),
    ({"rlvr_limits": "published", "published_rlvr_limits": {"sft": "x"}, "rlvr_arms": ["sft"]},
     "no number of tokens for 'sft'")])
def test_a_wrong_run_section_is_one_sentence(change, said, capsys):
    recipe = paper_recipe()
    recipe["run"] |= change
    assert said in refused(capsys, values_of, recipe)


@pytest.mark.parametrize("section, key, value", [
    ("train", "epochs", "x"),
    ("train", "epochs", [3]),
    ("train", "shard", "no"),
    ("train", "model", [3]),
    ("train", "token_budget", 0),
    ("rlvr", "max_steps", float("nan")),
    ("train", "epochs", -1),
    ("select", "n_ce", float("inf")),
    ("eval", "n_of", 3),
    ("eval", "n_of", ["x"]),
    ("plan", "card_gb", "x"),
    ("plan", "card", 3),
    ("plan", "card", "\x1b[31m"),
    ("plan", "teacher_tokens", float("nan")),
    ("plan", "self_tokens", -5),
    ("plan", "utilisation", [0.1]),
    ("plan", "utilisation", {"a": 1}),
    ("plan", "max_seqs", True),
    ("plan", "bandwidth_tbs", 0)])
def test_a_value_that_no_plan_can_be_made_with_is_one_sentence(section, key, value, capsys):
    recipe = paper_recipe()
    recipe[section][key] = value
    said = refused(capsys, plan.Plan, recipe, 8)
    assert said.startswith(f"error: [{section}]: {key} = ")
    assert "\x1b" not in said
