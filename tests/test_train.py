"""03: losses against hand-written formulas, one gradient under any split, exact resume, clear refusals."""

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
from model import TokenLogprobs, clip_gradient, load_model
from conftest import ROOT, byte_tokenizer, make_model

train = importlib.import_module("03_train_oxa")


def write_training_set(path, n_ce=12, n_ul=8, seed=0):
    rng = np.random.default_rng(seed)
    with open(path, "w") as file:
        for i in range(n_ce + n_ul):
            words = " ".join(rng.choice(["one", "two", "carry", "so", "wait"], rng.integers(1, 12)))
            file.write(json.dumps({"sid": f"p{i}:t:0", "pid": f"p{i}", "problem": f"{i} + {i}?", "ppl": 2.0, "n_tokens": 1,
                                   "response": f"<think> {words} </think> \\boxed{{{2 * i}}}",
                                   "objective": "ce" if i < n_ce else "ul"}) + "\n")
    return path


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    path = tmp_path_factory.mktemp("train")
    return make_model(path / "model"), write_training_set(path / "train.jsonl")


@pytest.fixture(autouse=True)
def restore_signal_handlers():
    old = {name: signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM)}
    yield
    for name, handler in old.items():
        signal.signal(name, handler)


def arguments(world, out, *more):
    return ["--model", str(world[0]), "--data", str(world[1]), "--out", str(out), "--ce-per-step", "4", "--ul-per-step", "4",
            "--epochs", "2", "--lr", "1e-3", "--token-budget", "800", *more]


def launch(argv, ranks=1, env=None):
    """The script as a user runs it, under torchrun for more than one rank."""
    runner = [sys.executable] if ranks == 1 else [sys.executable, "-m", "torch.distributed.run", "--standalone",
                                                   f"--nproc_per_node={ranks}"]
    return subprocess.run([*runner, str(ROOT / "03_train_oxa.py"), *argv], capture_output=True, text=True, timeout=300,
                          env={**os.environ, **(env or {})})


def test_unlikelihood_equals_its_formula_at_both_ends():
    p = torch.tensor([1e-12, 1e-6, 0.1, 0.5, 0.9, 0.999], dtype=torch.float64)
    assert torch.allclose(train.unlikelihood(p.log()), -torch.log1p(-p), rtol=1e-9)
    sure = torch.tensor([1 - 1e-9], dtype=torch.float64).log()
    assert abs(train.unlikelihood(sure).item() + np.log(1e-6)) < 1e-3, "log p is clamped to log(1 - 1e-6)"


@pytest.mark.parametrize("clamp,expected", [("published", 0.0), ("straight-through", 0.8)])
def test_gradient_of_suppression_where_the_model_is_surest(clamp, expected):
    gap = float(np.log(1 / 8e-7))                                  # p = 1 - 8e-7, beyond the clamp
    z = torch.tensor([[gap, 0.0]], dtype=torch.float64, requires_grad=True)
    train.unlikelihood(z.log_softmax(-1)[:, 0], clamp).sum().backward()
    assert abs(z.grad[0, 0].item() - expected) < 0.01


def plain_loss(path, tokens, ul_weight, normalize):
    """The paper's loss from full logits, a sequence at a time. tokens: [(ids, start, is_ul)]."""
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager")
    per_token = {False: [], True: []}
    for ids, start, is_ul in tokens:
        lp = model(torch.tensor([ids])).logits[0].log_softmax(-1)[range(start - 1, len(ids) - 1), ids[start:]]
        per_token[is_ul].append(-torch.log1p(-lp.exp()) if is_ul else -lp)
    mean = (lambda rows: torch.cat(rows).mean()) if normalize == "token" else (lambda rows: torch.stack([r.mean() for r in rows]).mean())
    loss = mean(per_token[False]) + ul_weight * mean(per_token[True])
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters()}


def gradient_of(policy, data, batch, args, dist):
    """A step of 03 up to its gradient."""
    weights = train.token_weights(data, batch, args.normalize)
    return train.accumulate_gradient(policy, data, train.packs_of_step(data, batch, args, dist), weights, args, dist)


@pytest.mark.parametrize("normalize", ["sequence", "token"])
@pytest.mark.parametrize("budget", [300, 10000])
def test_step_gradient_equals_the_formula_for_any_micro_batch(world, tmp_path, normalize, budget):
    args = train.parse_args(arguments(world, tmp_path, "--normalize", normalize, "--ul-weight", "0.3"))
    train.tokenize(args, byte_tokenizer(), 2048)
    args.token_budget = budget
    data = train.Data(tmp_path)
    batch = train.batch_of_step(data, 2, args)
    loss, expected = plain_loss(world[0], [(*data.sequence(i), bool(data.is_ul[i])) for i in batch], 0.3, normalize)
    model = load_model(world[0], trainable=True)
    sums = gradient_of(TokenLogprobs(model), data, batch, args, common.Dist())
    assert abs(sums["ce_loss"] + 0.3 * sums["ul_loss"] - loss) < 1e-5
    for name, p in model.named_parameters():
        assert (p.grad - expected[name]).norm() < 1e-5 * expected[name].norm(), name


def test_a_pass_uses_every_row_once_and_the_next_is_shuffled_anew():
    rows = np.arange(10, 33)
    passes = [np.concatenate([rows[common.rows_of_step(len(rows), 4, s, 1, "ce")] for s in range(5 * e + 1, 5 * e + 6)])
              for e in (0, 1)]
    assert all(len(set(p)) == 20 and set(p) <= set(rows) for p in passes) and passes[0].tolist() != passes[1].tolist()


GRADIENTS_OF_TWO_RANKS = """
import contextlib, importlib, sys, torch
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
torch.set_num_threads(1)
import common
from model import TokenLogprobs, distribute, load_model
from test_train import gradient_of, train
args = train.parse_args(sys.argv[2:])
dist = common.init_distributed()
data = train.Data(args.out)
sync = train.gradient_sync
for mode in ("ddp", "fully_shard", "forgets-sync", "past-the-wrapper"):
    model = load_model(args.model, device=dist.device, trainable=True)
    inner = TokenLogprobs(model)
    policy = distribute(inner, dist, shard=mode == "fully_shard")
    # two failures that a test has to see: every micro-batch inside no_sync; a loss computed past the wrapper
    train.gradient_sync = sync if mode != "forgets-sync" else lambda module, last: module.no_sync()
    gradient_of(inner if mode == "past-the-wrapper" else policy, data, train.batch_of_step(data, 1, args), args, dist)
    grads = {{n: p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for n, p in model.named_parameters()}}
    if dist.rank == 0:
        torch.save(grads, f"{{sys.argv[1]}}/{{mode}}.pt")
"""


@pytest.mark.slow
def test_gradient_is_the_same_on_one_rank_two_ranks_and_sharded(world, tmp_path):
    args = train.parse_args(arguments(world, tmp_path, "--ul-weight", "0.3"))
    train.tokenize(args, byte_tokenizer(), 2048)
    data, gradients = train.Data(tmp_path), {}
    for budget in (100000, 420, 260):                    # one micro-batch, about four, about eight
        args.token_budget = budget
        model = load_model(world[0], trainable=True)
        gradient_of(TokenLogprobs(model), data, train.batch_of_step(data, 1, args), args, common.Dist())
        gradients[budget] = {n: p.grad for n, p in model.named_parameters()}
    script = tmp_path / "two_ranks.py"
    script.write_text(GRADIENTS_OF_TWO_RANKS.format(root=str(ROOT)))
    argv = [a if a != "800" else "260" for a in arguments(world, tmp_path, "--ul-weight", "0.3")]
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script),
                           str(tmp_path), *argv], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[:4000]
    def distance(a):
        return max(((a[n] - g).norm() / g.norm()).item() for n, g in gradients[100000].items())
    two_ranks = lambda mode: distance(torch.load(tmp_path / f"{mode}.pt"))
    assert max(distance(gradients[420]), distance(gradients[260]), two_ranks("ddp"), two_ranks("fully_shard")) < 1e-6
    assert min(two_ranks("forgets-sync"), two_ranks("past-the-wrapper")) > 1e-2


# Graphs after two packs and after six, with a second model loaded as 04 loads its reference.
COMPILES = """
import sys
sys.path.insert(0, {root!r})
from torch._dynamo.utils import counters
from model import compile_layers, load_model, pack_sequences, token_logprobs
model = load_model({model!r}, trainable=True)
compile_layers(model)
load_model({model!r})
for n in range(2, 8):
    pack = pack_sequences([(list(range(1, 3 + n * k)), 1) for k in range(1, n)])
    token_logprobs(model, pack)[0].sum().backward()
    if n in (3, 7):
        print(counters["stats"]["unique_graphs"])
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled_layers_give_the_same_curve(world, tmp_path):
    curves = {}
    for out, more in (("plain", []), ("compiled", ["--compile"])):
        done = launch(arguments(world, tmp_path / out, "--gradient-checkpointing", *more))
        assert done.returncode == 0, done.stderr[-3000:]
        rows = common.read_jsonl(tmp_path / out / "metrics.jsonl")
        curves[out] = np.array([[row["ce_loss"], row["ul_loss"], row["grad_norm"]] for row in rows])
    assert len(curves["plain"]) == 6 and np.abs(curves["compiled"] - curves["plain"]).max() < 1e-5
    code = COMPILES.format(root=str(ROOT), model=str(world[0]))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    after_two, after_six = map(int, done.stdout.split())
    assert after_two >= 2, "nothing was compiled"
    assert after_six == after_two, "compiled anew for each pack"


@pytest.mark.slow
def test_a_run_that_is_killed_or_stopped_ends_bit_for_bit_like_one_that_is_not(world, tmp_path):
    common_arguments = ["--epochs", "20", "--save-every", "3"]                             # 60 steps
    assert launch(arguments(world, tmp_path / "whole", *common_arguments)).returncode == 0
    log = tmp_path / "broken/metrics.jsonl"
    first = subprocess.Popen([sys.executable, str(ROOT / "03_train_oxa.py"), *arguments(world, tmp_path / "broken", *common_arguments)],
                             stdout=subprocess.PIPE, text=True)
    while first.poll() is None and not (log.exists() and log.read_text().count("\n") >= 5):
        time.sleep(0.01)
    first.send_signal(signal.SIGTERM)
    assert "the same command goes on from there" in first.communicate()[0] and first.returncode == 143
    n_first = log.read_text().count("\n")
    assert (tmp_path / f"broken/step-{n_first:06d}/state.pt").exists() and n_first < 60
    second = subprocess.Popen([sys.executable, str(ROOT / "03_train_oxa.py"), *arguments(world, tmp_path / "broken", *common_arguments)],
                              stdout=subprocess.DEVNULL)
    while second.poll() is None and log.read_text().count("\n") < n_first + 5:
        time.sleep(0.01)
    second.kill()
    assert second.wait() == -9, "killed before its end"
    third = launch(arguments(world, tmp_path / "broken", *common_arguments))
    assert third.returncode == 0 and "going on after step" in third.stdout, third.stderr
    whole, broken = (load_file(tmp_path / run / "final/model.safetensors") for run in ("whole", "broken"))
    assert whole.keys() == broken.keys() and all(torch.equal(whole[k], broken[k]) for k in whole)
    losses = [[r["loss"] for r in common.read_jsonl(tmp_path / run / "metrics.jsonl")] for run in ("whole", "broken")]
    assert losses[0] == losses[1] and len(losses[0]) == 60
    assert "nothing to do" in launch(arguments(world, tmp_path / "broken", *common_arguments)).stdout


def test_the_gradient_is_clipped_to_the_limit_and_0_is_no_limit():
    layer = torch.nn.Linear(2, 1, bias=False)
    for limit, left in ((1.0, 1.0), (0.0, 5.0), (9.0, 5.0)):
        layer.weight.grad = torch.tensor([[3.0, 4.0]])
        assert clip_gradient(layer, limit) == 5.0
        assert abs(float(layer.weight.grad.norm()) - left) < 1e-5


def test_weight_decay_spares_biases_and_the_norms_of_layers(world, tmp_path):
    model = load_model(world[0], trainable=True)
    names = {id(weight): name for name, weight in model.named_parameters()}
    decayed, spared = train.parameter_groups(model, train.parse_args(arguments(world, tmp_path)))
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)
    spared = {names[id(weight)].split(".", 3)[-1] for weight in spared["params"]}
    assert spared == {"input_layernorm.weight", "post_attention_layernorm.weight",
                      *(f"self_attn.{name}_proj.bias" for name in "qkv")}
    assert "model.norm.weight" in {names[id(weight)] for weight in decayed["params"]}
    everything, nothing = train.parameter_groups(model, train.parse_args(arguments(world, tmp_path, "--decay-all")))
    assert len(everything["params"]) == len(names) and not nothing["params"]


def test_tokens_are_made_again_when_what_they_depend_on_has_changed(world, tmp_path):
    def tokens(*more):
        train.tokenize(train.parse_args(arguments(world, tmp_path, *more)), byte_tokenizer(), 2048)
        return len(train.Data(tmp_path).lengths)

    whole = tokens()
    assert tokens("--max-tokens", "190") < whole == tokens(), "another limit gives another set"
    before = (tmp_path / "tokens.bin").stat()
    assert tokens() == whole and (tmp_path / "tokens.bin").stat().st_mtime_ns == before.st_mtime_ns, "a whole cache is kept"
    os.truncate(tmp_path / "tokens.bin", before.st_size - 4)
    assert tokens() == whole and (tmp_path / "tokens.bin").stat().st_size == before.st_size, "a cut one is noticed"
    (tmp_path / "tokens.npz").write_bytes(b"PK torn")
    assert tokens() == whole
    rows = list(common.read_jsonl(world[1]))
    edited = tmp_path / "edited.jsonl"
    for response in (rows[0]["response"], rows[0]["response"][:-1] + "~"):
        rows[0]["response"] = response
        edited.write_text("".join(json.dumps(row) + "\n" for row in rows))
        assert tokens("--data", str(edited)) == whole
        ids, start = train.Data(tmp_path).sequence(0)
        assert byte_tokenizer().decode(ids[start:-1]) == response, "an edited set of the same size is noticed"


def test_bfloat16_on_a_cpu_follows_the_float32_curve(world, tmp_path):
    rows = {}
    for dtype in ("float32", "bfloat16"):
        train.main(arguments(world, tmp_path / dtype, "--dtype", dtype))
        rows[dtype] = list(common.read_jsonl(tmp_path / dtype / "metrics.jsonl"))
    gaps = [abs(a["loss"] / b["loss"] - 1) for a, b in zip(*rows.values(), strict=True)]
    assert 0 < max(gaps) < 0.01 and len(gaps) > 3
    assert load_model(tmp_path / "bfloat16/final").dtype == torch.float32


@pytest.mark.slow
def test_training_promotes_and_suppresses(world, tmp_path):
    last = {}
    for weight in ("0.0", "1.0"):
        run = tmp_path / weight
        train.main(arguments(world, run, "--ul-weight", weight, "--epochs", "8", "--lr", "3e-3"))
        rows = list(common.read_jsonl(run / "metrics.jsonl"))
        last[weight] = rows[-1]
        assert rows[-1]["ce_loss"] < 0.5 * rows[0]["ce_loss"]
    assert last["1.0"]["ul_loss"] < 0.9 * last["0.0"]["ul_loss"]


@pytest.mark.parametrize("change,message", [
    (["--data", "nowhere.jsonl"], "nowhere.jsonl does not exist"), (["--model", "tests"], "is no model"),
    (["--token-budget", "20"], "--token-budget is 20"), (["--ce-per-step", "500"], "fewer than --ce-per-step 500"),
    (["--max-tokens", "3"], "no sequence is shorter"), (["--warmup", "100"], "--warmup is a share"),
    (["--lr", "-1"], "--lr must be at least 0, got -1.0"),
    (["--out", "README.md"], "cannot make the directory README.md")])
def test_bad_input_is_one_sentence_and_exit_2(world, tmp_path, capsys, monkeypatch, change, message):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as stop:
        train.main(arguments(world, tmp_path, *change))
    assert stop.value.code == 2 and message in capsys.readouterr().err
