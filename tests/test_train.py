"""03: losses against their formulas, one gradient however a step is split, exact resume, and bad
input refused in one sentence."""

import collections
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import common
from conftest import ROOT, byte_tokenizer, make_model
from model import (
    TokenLogprobs, clip_gradient, compile_layers, distribute, load_model, pack_sequences,
    token_logprobs)

train = importlib.import_module("03_train_oxa")

SCRIPT = str(ROOT / "03_train_oxa.py")
MAX_POSITIONS = 2048                            # of the tiny model

# What a test runs in processes of its own is a function of this file; they begin with this.
IMPORT_THIS_FILE = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import test_train
"""


def write_training_set(path, n_ce=12, n_ul=8, seed=0):
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(n_ce + n_ul):
        words = rng.choice(["one", "two", "carry", "so", "wait"], rng.integers(1, 12))
        thoughts = " ".join(words)
        rows.append({"sid": f"p{i}:t:0",
                     "pid": f"p{i}",
                     "problem": f"{i} + {i}?",
                     "ppl": 2.0,
                     "n_tokens": 1,
                     "response": f"<think> {thoughts} </think> \\boxed{{{2 * i}}}",
                     "objective": "ce" if i < n_ce else "ul"})
    write_rows(path, rows)
    return path


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


World = collections.namedtuple("World", "model data")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    path = tmp_path_factory.mktemp("train")
    return World(make_model(path / "model", positions=MAX_POSITIONS),
                 write_training_set(path / "train.jsonl"))


@pytest.fixture(autouse=True)
def restore_signal_handlers():
    """03's main leaves its own behind: the next test must not meet them."""
    old = {name: signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM)}
    yield
    for name, handler in old.items():
        signal.signal(name, handler)


def arguments(world, out, *more):
    """The flags of a run of 6 steps, 3 an epoch; `more` come last, so they override."""
    return ["--model", str(world.model), "--data", str(world.data), "--out", str(out),
            "--ce-per-step", "4", "--ul-per-step", "4", "--epochs", "2", "--lr", "1e-3",
            "--token-budget", "800", *more]


def tokenized(args):
    """The training set of these arguments, tokenized as 03 does before its first step."""
    train.tokenize(args, byte_tokenizer(), MAX_POSITIONS)
    return train.Data(args.out)


def launch(argv):
    """The script as a user runs it, to its end."""
    return subprocess.run([sys.executable, SCRIPT, *argv],
                          capture_output=True, text=True, timeout=300)


def metrics_of(out):
    return list(common.read_jsonl(out / "metrics.jsonl"))


def gradients_of(model):
    return {name: weight.grad for name, weight in model.named_parameters()}


# ------------------------------------------------------------------------------------------- losses


def test_unlikelihood_equals_its_formula_at_both_ends():
    p = torch.tensor([1e-12, 1e-6, 0.1, 0.5, 0.9, 0.999], dtype=torch.float64)
    assert torch.allclose(train.unlikelihood(p.log()), -torch.log1p(-p), rtol=1e-9)
    sure = torch.tensor([1 - 1e-9], dtype=torch.float64)
    loss = train.unlikelihood(sure.log()).item()
    assert abs(loss + np.log(1e-6)) < 1e-3, "log p is clamped to log(1 - 1e-6)"


@pytest.mark.parametrize("clamp,expected", [("published", 0.0), ("straight-through", 0.8)])
def test_gradient_of_suppression_where_the_model_is_surest(clamp, expected):
    """Beyond the clamp the published loss has no gradient; straight-through keeps it."""
    gap = float(np.log(1 / 8e-7))                                        # p = 1 - 8e-7
    logits = torch.tensor([[gap, 0.0]], dtype=torch.float64, requires_grad=True)
    logp = logits.log_softmax(-1)[:, 0]
    train.unlikelihood(logp, clamp).sum().backward()
    assert abs(logits.grad[0, 0].item() - expected) < 0.01


# ------------------------------------------------------------ one gradient, however a step is split


def mean_loss(losses, normalize):
    """losses: a tensor [n] for each sequence of a set, one number a token."""
    if normalize == "token":
        return torch.cat(losses).mean()
    return torch.stack([loss.mean() for loss in losses]).mean()


def plain_loss(path, sequences, ul_weight, normalize):
    """(loss, gradients) by the paper's formula, from full logits, a sequence at a time.

    sequences: [(ids, start, is_ul)].
    """
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager")
    ce_losses = []
    ul_losses = []
    for ids, start, is_ul in sequences:
        table = model(torch.tensor([ids])).logits[0].log_softmax(-1)        # [L, V]
        rows = range(start - 1, len(ids) - 1)              # the row before a token predicts it
        logp = table[rows, ids[start:]]
        if is_ul:
            ul_losses.append(-torch.log1p(-logp.exp()))
        else:
            ce_losses.append(-logp)
    loss = mean_loss(ce_losses, normalize) + ul_weight * mean_loss(ul_losses, normalize)
    loss.backward()
    return loss.item(), gradients_of(model)


def accumulate_step(policy, data, batch, args, dist):
    """A step of 03 up to its gradient, which stays on the policy; returns its sums."""
    weights = train.token_weights(data, batch, args.normalize)
    packs = train.packs_of_step(data, batch, args, dist)
    return train.accumulate_gradient(policy, data, packs, weights, args, dist)


@pytest.mark.parametrize("normalize", ["sequence", "token"])
@pytest.mark.parametrize("budget", [300, 10000])
def test_step_gradient_equals_the_formula_for_any_micro_batch(world, tmp_path, normalize, budget):
    flags = ["--normalize", normalize, "--ul-weight", "0.3"]
    args = train.parse_args(arguments(world, tmp_path, *flags))
    data = tokenized(args)
    args.token_budget = budget
    batch = train.batch_of_step(data, 2, args)
    sequences = [(*data.sequence(i), bool(data.is_ul[i])) for i in batch]
    expected_loss, expected = plain_loss(world.model, sequences, 0.3, normalize)

    model = load_model(world.model, trainable=True)
    sums = accumulate_step(TokenLogprobs(model), data, batch, args, common.Dist())
    loss = sums["ce_loss"] + 0.3 * sums["ul_loss"]
    assert abs(loss - expected_loss) < 1e-5
    for name, gradient in gradients_of(model).items():
        error = (gradient - expected[name]).norm()
        assert error < 1e-5 * expected[name].norm(), name


def test_a_pass_uses_every_row_once_and_the_next_is_shuffled_anew():
    rows = np.arange(10, 33)                                 # 23 rows: 5 steps of 4 in a pass

    def rows_of_pass(first_step):
        chosen = []
        for step in range(first_step, first_step + 5):
            places = common.rows_of_step(len(rows), 4, step, 1, "ce")
            chosen += rows[places].tolist()
        return chosen

    first = rows_of_pass(1)
    second = rows_of_pass(6)
    for chosen in (first, second):
        assert len(set(chosen)) == 20
        assert set(chosen) <= set(rows.tolist())
    assert first != second


def never_sync(module, last):
    """The fault of gradient_sync that forgets the last micro-batch: ranks never exchange."""
    return module.no_sync()


def save_gradients(folder, argv):
    """Each of two ranks runs this: FOLDER/MODE.pt is the gradient of step 1 by DDP and by
    fully_shard, and with two faults that the test has to see."""
    args = train.parse_args(argv)
    dist = common.init_distributed()
    data = train.Data(args.out)
    batch = train.batch_of_step(data, 1, args)
    gradient_sync = train.gradient_sync
    for mode in ("ddp", "fully_shard", "forgets-sync", "past-the-wrapper"):
        model = load_model(args.model, device=dist.device, trainable=True)
        inner = TokenLogprobs(model)
        policy = distribute(inner, dist, shard=mode == "fully_shard")
        train.gradient_sync = never_sync if mode == "forgets-sync" else gradient_sync
        called = inner if mode == "past-the-wrapper" else policy
        accumulate_step(called, data, batch, args, dist)

        gradients = gradients_of(model)
        if mode == "fully_shard":
            gradients = {name: shard.full_tensor() for name, shard in gradients.items()}
        if dist.rank == 0:
            torch.save(gradients, f"{folder}/{mode}.pt")


@pytest.mark.slow
def test_gradient_is_the_same_on_one_rank_two_ranks_and_sharded(world, tmp_path):
    args = train.parse_args(arguments(world, tmp_path, "--ul-weight", "0.3"))
    data = tokenized(args)
    batch = train.batch_of_step(data, 1, args)

    def on_one_rank(token_budget):
        args.token_budget = token_budget
        model = load_model(world.model, trainable=True)
        accumulate_step(TokenLogprobs(model), data, batch, args, common.Dist())
        return gradients_of(model)

    in_one_piece = on_one_rank(100000)

    def distance(gradients):
        """The largest relative error of a weight's gradient."""
        errors = []
        for name, exact in in_one_piece.items():
            errors.append((gradients[name] - exact).norm() / exact.norm())
        return torch.stack(errors).max()

    assert distance(on_one_rank(420)) < 1e-6                 # about four micro-batches
    assert distance(on_one_rank(260)) < 1e-6                 # about eight

    script = tmp_path / "two_ranks.py"
    script.write_text(IMPORT_THIS_FILE + "test_train.save_gradients(sys.argv[1], sys.argv[2:])\n")
    argv = arguments(world, tmp_path, "--ul-weight", "0.3", "--token-budget", "260")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run([*torchrun, str(script), str(tmp_path), *argv],
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[:4000]

    def on_two_ranks(mode):
        return torch.load(tmp_path / f"{mode}.pt")

    assert distance(on_two_ranks("ddp")) < 1e-6
    assert distance(on_two_ranks("fully_shard")) < 1e-6
    assert distance(on_two_ranks("forgets-sync")) > 1e-2
    assert distance(on_two_ranks("past-the-wrapper")) > 1e-2


# ---------------------------------------------------------------------------------------- --compile


def print_graph_counts(path):
    """Graphs compiled after two packs and after six, with a second model loaded as 04 loads its
    reference."""
    from torch._dynamo.utils import counters
    model = load_model(path, trainable=True)
    compile_layers(model)
    load_model(path)
    for n in range(2, 8):
        sequences = [(list(range(1, 3 + n * k)), 1) for k in range(1, n)]
        logp, _ = token_logprobs(model, pack_sequences(sequences))
        logp.sum().backward()
        if n in (3, 7):
            print(counters["stats"]["unique_graphs"])


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None,
                    reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled_layers_give_the_same_curve(world, tmp_path):
    def curve(out, *more):
        done = launch(arguments(world, out, "--gradient-checkpointing", *more))
        assert done.returncode == 0, done.stderr[-3000:]
        columns = ("ce_loss", "ul_loss", "grad_norm")
        rows = []
        for row in metrics_of(out):
            rows.append([row[column] for column in columns])
        return np.array(rows)

    plain = curve(tmp_path / "plain")
    compiled = curve(tmp_path / "compiled", "--compile")
    assert len(plain) == 6
    assert np.abs(compiled - plain).max() < 1e-5

    code = IMPORT_THIS_FILE + "test_train.print_graph_counts(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", code, str(world.model)],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    after_two, after_six = map(int, done.stdout.split())
    assert after_two >= 2, "nothing was compiled"
    assert after_six == after_two, "compiled anew for each pack"


# ------------------------------------------------------------------------------------------- resume


def n_rows(log):
    return log.read_text().count("\n") if log.exists() else 0


def wait_for_rows(process, log, n):
    """Until the log has n rows; no longer than the process runs."""
    while process.poll() is None and n_rows(log) < n:
        time.sleep(0.01)


@pytest.mark.slow
def test_a_run_that_is_killed_or_stopped_ends_bit_for_bit_like_one_that_is_not(world, tmp_path):
    flags = ["--epochs", "20", "--save-every", "3"]                           # 60 steps
    whole = tmp_path / "whole"
    broken = tmp_path / "broken"
    log = broken / "metrics.jsonl"
    assert launch(arguments(world, whole, *flags)).returncode == 0

    # stopped: it finishes its step, saves, and says how to go on
    argv = arguments(world, broken, *flags)
    first = subprocess.Popen([sys.executable, SCRIPT, *argv], stdout=subprocess.PIPE, text=True)
    wait_for_rows(first, log, 5)
    first.send_signal(signal.SIGTERM)
    said, _ = first.communicate()
    assert "the same command goes on from there" in said
    assert first.returncode == 143
    n_first = n_rows(log)
    assert n_first < 60
    assert (broken / f"step-{n_first:06d}/state.pt").exists()

    # killed: it saves nothing more
    second = subprocess.Popen([sys.executable, SCRIPT, *argv], stdout=subprocess.DEVNULL)
    wait_for_rows(second, log, n_first + 5)
    second.kill()
    assert second.wait() == -9, "killed before its end"

    third = launch(argv)
    assert third.returncode == 0, third.stderr
    assert "going on after step" in third.stdout, third.stderr

    weights = load_file(broken / "final/model.safetensors")
    expected = load_file(whole / "final/model.safetensors")
    assert weights.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(weights[name], weight), name
    losses = [row["loss"] for row in metrics_of(broken)]
    expected_losses = [row["loss"] for row in metrics_of(whole)]
    assert len(expected_losses) == 60
    assert losses == expected_losses
    assert "nothing to do" in launch(argv).stdout


# ---------------------------------------------------------------------- the optimizer, and the data


def test_the_gradient_is_clipped_to_the_limit_and_0_is_no_limit():
    layer = torch.nn.Linear(2, 1, bias=False)
    for limit, left in ((1.0, 1.0), (0.0, 5.0), (9.0, 5.0)):
        layer.weight.grad = torch.tensor([[3.0, 4.0]])
        assert clip_gradient(layer, limit) == 5.0
        assert abs(float(layer.weight.grad.norm()) - left) < 1e-5


def test_weight_decay_spares_biases_and_the_norms_of_layers(world, tmp_path):
    model = load_model(world.model, trainable=True)
    names = {id(weight): name for name, weight in model.named_parameters()}
    args = train.parse_args(arguments(world, tmp_path))
    decayed, spared = train.parameter_groups(model, args)
    assert decayed["weight_decay"] == 0.1
    assert spared["weight_decay"] == 0.0

    def names_in(group):
        return {names[id(weight)] for weight in group["params"]}

    spared_in_a_layer = {name.split(".", 3)[-1] for name in names_in(spared)}   # model.layers.N.
    assert spared_in_a_layer == {
        "input_layernorm.weight",
        "post_attention_layernorm.weight",
        "self_attn.q_proj.bias",
        "self_attn.k_proj.bias",
        "self_attn.v_proj.bias"}
    assert "model.norm.weight" in names_in(decayed)

    args = train.parse_args(arguments(world, tmp_path, "--decay-all"))
    everything, nothing = train.parameter_groups(model, args)
    assert len(everything["params"]) == len(names)
    assert not nothing["params"]


def test_tokens_are_made_again_when_what_they_depend_on_has_changed(world, tmp_path):
    tokens = tmp_path / "tokens.bin"

    def n_sequences(*more):
        args = train.parse_args(arguments(world, tmp_path, *more))
        return len(tokenized(args).lengths)

    whole = n_sequences()
    assert n_sequences("--max-tokens", "190") < whole, "another limit gives another set"
    assert n_sequences() == whole

    before = tokens.stat()
    assert n_sequences() == whole
    assert tokens.stat().st_mtime_ns == before.st_mtime_ns, "a whole cache is kept"

    os.truncate(tokens, before.st_size - 4)
    assert n_sequences() == whole
    assert tokens.stat().st_size == before.st_size, "a cut one is noticed"

    (tmp_path / "tokens.npz").write_bytes(b"PK torn")
    assert n_sequences() == whole

    rows = list(common.read_jsonl(world.data))
    edited = tmp_path / "edited.jsonl"
    original = rows[0]["response"]
    for response in (original, original[:-1] + "~"):
        rows[0]["response"] = response
        write_rows(edited, rows)
        assert n_sequences("--data", str(edited)) == whole
        ids, start = train.Data(tmp_path).sequence(0)
        text = byte_tokenizer().decode(ids[start:-1])
        assert text == response, "an edited set of the same size is noticed"


# --------------------------------------------------------------------------------------- whole runs


def test_bfloat16_on_a_cpu_follows_the_float32_curve(world, tmp_path):
    def losses(dtype):
        out = tmp_path / dtype
        train.main(arguments(world, out, "--dtype", dtype))
        return [row["loss"] for row in metrics_of(out)]

    exact = losses("float32")
    rounded = losses("bfloat16")
    gaps = [abs(a / b - 1) for a, b in zip(exact, rounded, strict=True)]
    assert len(gaps) > 3
    assert 0 < max(gaps) < 0.01
    assert load_model(tmp_path / "bfloat16/final").dtype == torch.float32


@pytest.mark.slow
def test_training_promotes_and_suppresses(world, tmp_path):
    """Cross-entropy falls with and without unlikelihood; its loss falls below that of a run that
    gave it no weight."""
    last_ul_loss = {}
    for weight in ("0.0", "1.0"):
        out = tmp_path / weight
        flags = ["--ul-weight", weight, "--epochs", "8", "--lr", "3e-3"]
        train.main(arguments(world, out, *flags))
        rows = metrics_of(out)
        assert rows[-1]["ce_loss"] < 0.5 * rows[0]["ce_loss"]
        last_ul_loss[weight] = rows[-1]["ul_loss"]
    assert last_ul_loss["1.0"] < 0.9 * last_ul_loss["0.0"]


@pytest.mark.parametrize("change,message", [
    (["--data", "nowhere.jsonl"], "nowhere.jsonl does not exist"),
    (["--model", "tests"], "is no model"),
    (["--token-budget", "20"], "--token-budget is 20"),
    (["--ce-per-step", "500"], "fewer than --ce-per-step 500"),
    (["--max-tokens", "3"], "no sequence is shorter"),
    (["--warmup", "100"], "--warmup is a share"),
    (["--lr", "-1"], "--lr must be at least 0, got -1.0"),
    (["--out", "README.md"], "cannot make the directory README.md")])
def test_bad_input_is_one_sentence_and_exit_2(
        world, tmp_path, capsys, monkeypatch, change, message):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as stop:
        train.main(arguments(world, tmp_path, *change))
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
