import copy
import inspect
import math
import subprocess
import sys

import pytest
import torch

import saelib
from saelib import auxk, sources
from saelib.auxk import auxk_term, default_k_aux
from saelib.loop import Loop
from saelib.sae import SAE
from saelib.train import paper_lr, schedule, train

X = sources.normalise(torch.randn(2000, 16, generator=torch.Generator().manual_seed(0)))


def batches_of(x, n_steps, size=100):
    return lambda start: (x[torch.arange(i * size, (i + 1) * size) % len(x)] for i in range(start, n_steps))


def short(seed=0, n_steps=30, n_latents=40, **options):
    sae = SAE(16, n_latents, "topk", 4, seed=seed)
    return sae, train(sae, batches_of(X, n_steps), n_steps, lr=1e-3, **options)


def test_the_loss_falls_and_the_log_is_the_terms_that_were_optimised():
    _, history = short(n_steps=60)
    assert history[-1]["squared_error"] < 0.8 * history[0]["squared_error"]
    assert set(history[0]) == {"step", "tokens", "l0", "dead_fraction", "squared_error", "auxk"}


def test_a_penalty_rises_from_zero_and_the_second_loss_of_multi_topk_does_not():
    for method, sparsity, term in (("relu", 0.1, "l1"), ("multi_topk", 3, "multi_topk")):
        sae = SAE(16, 40, method, sparsity)
        history = train(sae, batches_of(X, 10), 10, lr=1e-3, penalty_warmup=0.5)
        assert (history[0][term] > 0) == (method == "multi_topk") and history[-1][term] > 0


def test_the_decoder_has_unit_rows_after_every_step():
    sae = SAE(16, 40, "topk", 4)
    norms = []
    train(sae, batches_of(X, 10), 10, lr=1e-2, on_step=lambda step: norms.append(sae.W_dec.norm(dim=1).detach()))
    torch.testing.assert_close(torch.stack(norms), torch.ones(10, 40))


def test_the_same_seed_gives_the_same_losses_and_another_seed_others():
    assert short(seed=1)[1] == short(seed=1)[1] != short(seed=2)[1]


def test_the_sparse_path_and_its_dense_twin_train_alike():
    fast, twin = short(path="sparse")[1], short(path="dense")[1]
    assert [r["squared_error"] for r in fast] == pytest.approx([r["squared_error"] for r in twin], rel=1e-3)


def test_a_step_keeps_the_order_of_the_design(monkeypatch):
    seen = []

    def note(owner, name, word):
        original = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, **k: (seen.append(word), original(*a, **k))[1])

    note(SAE, "run", "forward"), note(Loop, "count_fired", "count"), note(Loop, "terms", "terms")
    note(saelib.loop, "check_finite", "finite"), note(torch.optim.Adam, "zero_grad", "zero")
    note(torch.Tensor, "backward", "backward"), note(SAE, "remove_parallel_gradient", "project")
    note(torch.nn.utils, "get_total_norm", "clip"), note(torch.optim.Adam, "step", "step")
    note(SAE, "normalise_decoder", "renormalise"), note(torch.optim.swa_utils.AveragedModel, "update_parameters", "ema")
    short(n_steps=1, ema_decay=0.9, on_step=lambda step: seen.append("on_step"))
    assert seen[:12] == ["zero", "forward", "count", "terms", "finite", "backward", "project", "clip", "step",
                         "renormalise", "ema", "on_step"]


@pytest.mark.parametrize("length", [0.5, 1.0, 3.0])
def test_gradients_are_clipped_to_norm_1_and_shorter_ones_left_as_they_are(monkeypatch, length):
    loop = Loop(SAE(16, 40, "topk", 4), 1e-3, 1, 0.0, 1, 0.0)
    for parameter in loop.sae.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(9))
    loop.sae.remove_parallel_gradient()
    norm = torch.nn.utils.get_total_norm([p.grad for p in loop.sae.parameters()])
    torch._foreach_mul_([p.grad for p in loop.sae.parameters()], length / norm)
    monkeypatch.setattr(SAE, "remove_parallel_gradient", lambda sae: None)
    wanted = [p.grad * min(1, 1 / length) for p in loop.sae.parameters()]
    loop.update()
    for parameter, grad in zip(loop.sae.parameters(), wanted):
        torch.testing.assert_close(parameter.grad, grad)


def test_adam_has_the_betas_and_the_epsilon_of_the_paper():
    """A step is lr m / (√v + eps), with both moments corrected: here for a gradient g, and then for one of 0."""
    loop, g = Loop(SAE(2, 4, "topk", 1), 1e-3, 1, 0.0, 1, 0.0), torch.tensor([6.25e-10, 0.5])
    for gradient, m, v in ((g, 1, 1), (0 * g, 0.9 * 0.1 / (1 - 0.9**2), 0.999 * 0.001 / (1 - 0.999**2))):
        before = loop.sae.b_pre.detach().clone()
        for parameter in loop.sae.parameters():
            parameter.grad = torch.zeros_like(parameter)
        loop.sae.b_pre.grad = gradient
        loop.update()
        torch.testing.assert_close((before - loop.sae.b_pre) / 1e-3, m * g / (v**0.5 * g + 6.25e-10), atol=0, rtol=1e-4)


def test_a_checkpoint_of_another_device_leaves_the_optimiser_as_this_one_needs_it():
    loops = [Loop(SAE(16, 40, "topk", 4), 1e-3, 1000, 0.0, 8, 0.0) for _ in range(2)]
    loops[0].one(X[:50], 1.0, 1.0, "sparse", "fp32", log=True)
    state = copy.deepcopy(loops[0].state())
    state["adam"]["param_groups"][0] |= {"lr": 0.5, "capturable": True}
    loops[1].restore(state)
    for loop in loops:
        loop.one(X[50:100], 0.5, 1.0, "sparse", "fp32", log=True)
    assert loops[1].adam.param_groups[0]["capturable"] is False and loops[0].history == loops[1].history
    assert torch.equal(loops[0].sae.W_dec, loops[1].sae.W_dec)


@pytest.mark.parametrize("options", [{}, {"n_latents": 400, "dead_after": 200, "auxk_coef": 1 / 4}, {"ema_decay": 0.9}])
def test_an_interrupted_run_goes_on_to_the_same_end(tmp_path, monkeypatch, options):
    monkeypatch.setattr(saelib.train, "CHECKPOINT_SECONDS", 0)

    def stop(step):
        if step == 11:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        short(checkpoint=tmp_path / "c.pt", on_step=stop, **options)
    resumed, history = short(checkpoint=tmp_path / "c.pt", **options)
    straight, expected = short(**options)
    assert history == expected and all(map(torch.equal, resumed.parameters(), straight.parameters()))
    assert ("dead_after" in options) == any(row["auxk"] > 0 for row in history)


def test_a_loss_that_is_not_finite_stops_the_run_and_says_where():
    bad = X.clone()
    bad[500] = float("inf")
    sae = SAE(16, 40, "topk", 4)
    with pytest.raises(FloatingPointError, match=r"not finite at step 5: squared_error = "):
        train(sae, batches_of(bad, 20), 20)
    assert all(torch.isfinite(p).all() for p in sae.parameters())


def test_the_average_of_the_weights_is_that_of_its_formula_with_unit_rows():
    """m <- decay m + (1 - decay) w after each step, from the first step's w on."""
    sae, seen = SAE(16, 40, "topk", 4), []
    train(sae, batches_of(X, 3), 3, lr=1e-2, ema_decay=0.9,
          on_step=lambda step: seen.append({n: p.detach().clone() for n, p in sae.named_parameters()}))
    for name, averaged in sae.named_parameters():
        mean = seen[0][name]
        for later in seen[1:]:
            mean = 0.9 * mean + 0.1 * later[name]
        torch.testing.assert_close(averaged.detach(), mean / mean.norm(dim=1, keepdim=True) if name == "W_dec"
                                   else mean)


def test_more_batches_than_steps_are_left_and_fewer_are_an_error(tmp_path):
    longer, expected = SAE(16, 40, "topk", 4), short()[1]
    assert train(longer, batches_of(X, 10**9), 30, lr=1e-3) == expected
    with pytest.raises(ValueError, match="batches ended after 10 steps: they must last for n_steps = 30"):
        train(SAE(16, 40, "topk", 4), batches_of(X, 10), 30)


def test_the_log_counts_the_tokens_of_a_shorter_last_batch():
    parts = [X[:100], X[100:200], X[200:237]]
    history = train(SAE(16, 40, "topk", 4), lambda start: iter(parts[start:]), 3)
    assert [row["tokens"] for row in history] == [100, 200, 237]


def test_the_last_step_leaves_a_row_whatever_their_number(monkeypatch):
    monkeypatch.setattr(saelib.train, "LOG_POINTS", 3)
    assert [row["step"] for row in short(n_steps=8)[1]] == [2, 4, 6, 8]
    assert [row["step"] for row in short(n_steps=7)[1]] == [2, 4, 6, 7]


def test_the_log_counts_as_dead_what_was_silent_for_more_than_dead_after_tokens():
    sae = SAE(16, 40, "topk", 1)
    history = train(sae, lambda start: iter([X[:20]] * 5), 5, lr=0.0, dead_after=60)
    silent = (sae.encode(X[:20]) == 0).all(0).float().mean().item()
    assert [row["dead_fraction"] for row in history] == [0, 0, 0, silent, silent] and silent > 0


def test_the_penalty_rises_over_its_warmup_and_then_stays():
    history = train(SAE(16, 40, "relu", 0.1), lambda start: iter([X[:20]] * 10), 10, lr=0.0, penalty_warmup=0.5)
    assert [row["l1"] / history[-1]["l1"] for row in history] == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1, 1, 1, 1, 1])


@pytest.mark.parametrize("changes, message", [({"lr": 2e-3}, "of a run with lr 0.001"),
                                              ({"n_steps": 40}, "of a run with n_steps 30"),
                                              ({"precision": "bf16"}, "of a run with precision 'fp32'")])
def test_a_checkpoint_of_another_run_is_refused(tmp_path, monkeypatch, changes, message):
    monkeypatch.setattr(saelib.train, "CHECKPOINT_SECONDS", 0)

    def stop(step):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        short(checkpoint=str(tmp_path / "c.pt"), on_step=lambda step: step > 2 and stop(step))
    settings = {"n_steps": 30, "lr": 1e-3} | changes
    with pytest.raises(ValueError, match=message):
        train(SAE(16, 40, "topk", 4), batches_of(X, 40), checkpoint=tmp_path / "c.pt", **settings)
    for damaged in (b"", b"no checkpoint"):
        (tmp_path / "c.pt").write_bytes(damaged)
        with pytest.raises(ValueError, match="checkpoint is '.*c.pt': it must be a file that `train` wrote"):
            short(checkpoint=tmp_path / "c.pt")


def test_auxk_is_zero_with_nothing_dead():
    sae = SAE(16, 40, "topk", 4)
    assert auxk_term(sae, X[:50], sae(X[:50]), torch.empty(0, dtype=torch.long), 8).item() == 0


def test_auxk_reaches_the_dead_encoder_rows_and_no_others():
    sae, dead = SAE(16, 40, "topk", 4), torch.tensor([3, 17, 29])
    auxk_term(sae, X[:50], sae(X[:50]), dead, 8).backward()
    touched = sae.W_enc.grad.to_dense().abs().sum(1).nonzero().squeeze(1)
    assert torch.equal(touched, dead)


def test_auxk_does_not_reach_a_latent_of_relu_that_is_silent_on_the_batch():
    sae = SAE(16, 40, "relu", 0.1)
    with torch.no_grad():
        sae.b_enc[:9] = -100
    dead = (~sae.run(X[:50]).fired()).nonzero().squeeze(1)
    term = auxk_term(sae, X[:50], sae(X[:50]), dead, 4)
    term.backward()
    assert len(dead) >= 9
    assert term > 0
    assert not any(p.grad.to_dense().any() for p in sae.parameters() if p.grad is not None)


def test_auxk_predicts_the_residual_without_b_pre_from_the_largest_dead_latents():
    sae, x, dead = SAE(16, 40, "topk", 4), X[:50], torch.arange(10, 30)
    x_hat = sae(x).detach()
    kept = torch.relu((x - sae.b_pre) @ sae.W_enc[dead].t()).topk(5, dim=1)
    predicted = torch.stack([(v[:, None] * sae.W_dec[dead][i]).sum(0) for v, i in zip(kept.values, kept.indices)])
    expected = ((x - x_hat) - predicted).pow(2).sum() / ((x - x_hat) - (x - x_hat).mean(0)).pow(2).sum()
    torch.testing.assert_close(auxk_term(sae, x, x_hat, dead, 5), expected)


@pytest.mark.parametrize("n_dead", [3, 8, 40])
def test_auxk_is_the_same_on_the_sparse_path_with_all_its_gradients(n_dead, monkeypatch):
    sae, dead = SAE(16, 40, "topk", 4, seed=3), torch.arange(n_dead)
    found = []
    for few in (0, 1000):  # always sparse, never
        monkeypatch.setattr(auxk, "FEW_OF_MANY", few)
        term = auxk_term(sae, X[:50], sae(X[:50]), dead, min(5, n_dead))
        found.append([term.detach(), *(g.to_dense() for g in torch.autograd.grad(term, list(sae.parameters())))])
    for ours, twin in zip(*found):
        torch.testing.assert_close(ours, twin)


def test_batchtopk_trains_and_keeps_its_threshold(tmp_path):
    fit = saelib.fit(X, "batchtopk", 4, n_latents=40, n_tokens=20_000, batch_size=200, lr=1e-2, progress=False)
    assert fit.metrics["l0"] == pytest.approx(4, rel=0.2) and fit.metrics["normalized_mse"] < 0.8
    fit.sae.save(tmp_path)
    assert torch.equal(saelib.load(tmp_path)(X), fit.sae(X)) and fit.sae.method.threshold > 0


def test_dead_is_counted_in_tokens_since_a_latent_fired():
    loop = Loop(SAE(16, 40, "topk", 4), 1e-3, 250, 0.0, 8, 0.0)
    out = loop.sae.run(X[:100])
    for _ in range(3):
        loop.count_fired(out)
    fired = torch.zeros(40, dtype=torch.bool)
    fired[out.active.indices.flatten().long()] = True
    assert (loop.tokens_since_fired[fired] == 0).all() and (loop.tokens_since_fired[~fired] == 300).all()


def test_the_learning_rate_falls_as_one_over_the_root_of_n():
    assert paper_lr(2**14) == 2e-4 and paper_lr(2**12) == pytest.approx(4e-4)


@pytest.mark.parametrize("step, wanted", [(0, 0.2), (3, 0.8), (4, 1), (50, 1), (80, 1), (90, 0.5), (99, 0.05)])
def test_the_learning_rate_rises_over_a_twentieth_of_the_steps_and_falls_over_the_last_fifth(step, wanted):
    assert schedule(step, 100) == pytest.approx(wanted)


def test_left_alone_the_learning_rate_follows_the_latents_and_k_aux_the_dimensions():
    found = []
    for options in ({}, {"lr": 2e-4 * 8, "k_aux": 8}):
        sae = SAE(16, 256, "topk", 1)
        train(sae, batches_of(X, 5), 5, dead_after=50, **options)
        found.append(sae.W_enc)
    assert torch.equal(*found)


def test_k_aux_is_a_power_of_two_about_half_of_d():
    assert [default_k_aux(d) for d in (2, 64, 384, 768)] == [1, 32, 256, 512]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", ["topk", "batchtopk", "relu"])
def test_batches_of_any_type_train_as_float32_ones_do(method, dtype):
    found = []
    for to in (dtype, torch.float32):
        sae = SAE(16, 40, method, 0.1 if method == "relu" else 4)
        train(sae, lambda step: (X[i * 50: (i + 1) * 50].to(dtype).to(to) for i in range(step, 8)), 8, lr=1e-2)
        found.append(sae.W_enc.detach())
    assert torch.equal(*found)


def test_batchtopk_counts_its_cuts_on_the_dense_path_in_bfloat16():
    sae = SAE(16, 40, "batchtopk", 4)
    sae.run(X[:50], "dense", "bf16")
    assert sae.method.threshold > 0


@pytest.mark.parametrize(("options", "message"), [
    (dict(penalty_warmup=-1), "penalty_warmup is -1: it must be a number from 0 to 1"),
    (dict(lr=-1.0), "lr is -1.0: it must be a finite number, 0 or more"),
    (dict(auxk_coef=math.inf), "auxk_coef is inf: it must be a finite number, 0 or more"),
    (dict(k_aux=0), "k_aux is 0: it must be a whole number, 1 or more"),
    (dict(path="auto"),
     "path is 'auto': it must be one of sparse, graph, native, dense"),
])
def test_what_training_does_not_take_is_named_before_the_first_step(options, message):
    with pytest.raises(ValueError, match=message):
        train(SAE(16, 40, "topk", 4), lambda step: iter([X]), 1, **options)


def test_weights_of_half_precision_are_not_trained():
    with pytest.raises(ValueError, match="sae is 'of torch.bfloat16': it must be of float32 weights"):
        train(SAE(16, 40, "topk", 4).to(torch.bfloat16), lambda step: iter([X]), 1)


NUMPY = """
import numpy, sys, torch
from saelib import train as t
from saelib.sae import SAE
t.CHECKPOINT_SECONDS, x = 0, torch.randn(50, 8)
def stop(step):
    if step == 3:
        raise KeyboardInterrupt
def go(**more):
    sae = SAE(8, 20, "topk", numpy.int64(4))
    return t.train(sae, lambda step: iter([x] * (6 - step)), 6, lr=numpy.float64(1e-3), checkpoint=sys.argv[1], **more)
try:
    go(on_step=stop)
except KeyboardInterrupt:
    steps = []
    go(on_step=steps.append)
    assert steps == [4, 5, 6]
"""


def test_a_run_of_numpy_numbers_is_resumed(tmp_path):
    # beside the type checks of these tests
    subprocess.run([sys.executable, "-c", NUMPY, tmp_path / "c.pt"], check=True)


@pytest.mark.parametrize("name", ["squared_error", "auxk"])
def test_a_penalty_does_not_take_the_place_of_another_term(name):
    sae = SAE(16, 32, "relu", 0.1)
    sae.method.penalty = lambda sae, x, out: {name: out.latents.sum()}
    with pytest.raises(ValueError, match=f"penalty is .'{name}'.: it must be a dict of terms with other names"):
        train(sae, lambda start: iter(X.split(100)), 2)


def test_auxk_takes_for_dead_what_was_silent_for_more_than_dead_after_tokens():
    loop = Loop(SAE(16, 40, "topk", 4), 1e-3, 250, 0.0, 8, 0.0)
    loop.tokens_since_fired[:3] = torch.tensor([249, 250, 251])
    assert loop.dead()[0].tolist() == [2]


def test_an_sae_that_was_in_use_is_trained_in_training_mode():
    sae = SAE(16, 40, "batchtopk", 4).eval()
    train(sae, batches_of(X, 20), 20, lr=1e-3)
    assert sae.method.threshold > 0 and not sae.training


@pytest.mark.parametrize("options, message", [(dict(dead_after=0),
                                               "dead_after is 0: it must be a whole number, 1 or more"),
                                              (dict(n_steps=0), "n_steps is 0: it must be a whole number, 1 or more")])
def test_a_number_of_tokens_or_steps_below_1_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        train(SAE(16, 40, "topk", 4), lambda step: iter([X]), **{"n_steps": 1} | options)


@pytest.mark.parametrize("name, here", [("penalty_warmup", 0.5), ("auxk_coef", 0.25), ("k_aux", 4),
                                        ("dead_after", 500), ("ema_decay", 0.5), ("sparsity", 5),
                                        ("method", "multi_topk")])
def test_a_checkpoint_of_a_run_with_any_other_setting_is_refused(tmp_path, monkeypatch, name, here):
    def stop(step):
        raise KeyboardInterrupt

    def go(on_step=None, method="topk", sparsity=4, **options):
        train(SAE(16, 40, method, sparsity), batches_of(X, 30), 30, lr=1e-3, checkpoint=tmp_path / "c.pt",
              on_step=on_step,
                    **{"penalty_warmup": 0.1, "auxk_coef": 0.5, "k_aux": 8, "dead_after": 1000, "ema_decay": 0.9}
              | options)

    monkeypatch.setattr(saelib.train, "CHECKPOINT_SECONDS", 0)
    with pytest.raises(KeyboardInterrupt):
        go(stop)
    with pytest.raises(ValueError, match=f"of a run with {name} .*: it must be of this run, with {here!r}"):
        go(**{name: here})


def test_every_step_is_taken_at_the_rate_of_the_schedule(monkeypatch):
    rates = []
    monkeypatch.setattr(torch.optim.Adam, "step", lambda adam: rates.append(float(adam.param_groups[0]["lr"])))
    short(n_steps=40)
    assert rates == pytest.approx([1e-3 * schedule(step, 40) for step in range(40)])


@pytest.mark.parametrize(("method", "sparsity"), [("topk", 4), ("relu", 0.1)])
def test_the_log_says_how_many_latents_were_active_for_a_token(method, sparsity):
    sae = SAE(16, 40, method, sparsity)
    wanted = (sae.encode(X[:20]) != 0).sum().item() / 20
    assert train(sae, lambda start: iter([X[:20]]), 1, lr=0.0)[0]["l0"] == pytest.approx(wanted)


def test_the_weight_of_auxk_and_when_a_latent_is_dead_are_the_papers_by_default():
    default = {name: parameter.default for name, parameter in inspect.signature(train).parameters.items()}
    assert (default["auxk_coef"], default["dead_after"]) == (1 / 32, 10_000_000)


def test_activations_that_are_not_as_the_sae_expects_them_are_refused_at_once():
    sae = SAE(16, 40, "topk", 4, normalisation="unit_norm")
    before = sae.W_enc.detach().clone()
    with pytest.raises(ValueError, match="x is 'with a vector of norm 50': it must be what `SAE.normalised` makes"):
        train(sae, batches_of(50 * X, 5), 5)
    assert torch.equal(sae.W_enc, before)


@pytest.mark.parametrize("run, here, message", [
    ({"seed": 1}, {"run": None}, "of a run with seed 1': it must be of this run, with None"),
    (None, {"run": {"seed": 1}}, "of a run with seed None': it must be of this run, with 1"),
    (None, {"normalisation": "unit_norm"}, "a run with normalisation 'none'\": it must be of this run, with 'unit_n")])
def test_a_checkpoint_of_a_run_that_was_told_apart_is_refused(tmp_path, monkeypatch, run, here, message):
    def stop(step):
        raise KeyboardInterrupt

    def go(run=run, normalisation="none", on_step=None):
        train(SAE(16, 40, "topk", 4, normalisation=normalisation), batches_of(X, 30), 30, lr=1e-3, run=run,
              checkpoint=tmp_path / "c.pt", on_step=on_step)

    monkeypatch.setattr(saelib.train, "CHECKPOINT_SECONDS", 0)
    with pytest.raises(KeyboardInterrupt):
        go(on_step=stop)
    with pytest.raises(ValueError, match=message):
        go(**here)


def test_a_checkpoint_without_a_part_leaves_the_weights_as_they_were(tmp_path, monkeypatch):
    monkeypatch.setattr(saelib.train, "CHECKPOINT_SECONDS", 0)
    with pytest.raises(ZeroDivisionError):
        short(checkpoint=tmp_path / "c.pt", on_step=lambda step: 1 / (2 - step))
    state = torch.load(tmp_path / "c.pt", weights_only=True)
    del state["adam"]
    torch.save(state, tmp_path / "c.pt")
    sae = SAE(16, 40, "topk", 4)
    before = sae.W_enc.detach().clone()
    with pytest.raises(ValueError, match="checkpoint is 'a file without adam': it must be one that `train` wrote"):
        train(sae, batches_of(X, 30), 30, lr=1e-3, checkpoint=tmp_path / "c.pt")
    assert torch.equal(sae.W_enc, before)


def test_a_name_of_the_loops_own_does_not_tell_runs_apart():
    with pytest.raises(ValueError, match=r"run is \{'lr': 1\}: it must be a dict with other names than d_model, "):
        short(run={"lr": 1})


def test_decoder_rows_of_other_norms_are_refused_before_any_step():
    sae = SAE(16, 40, "topk", 4)
    sae.W_dec.data *= torch.linspace(0.5, 2, 40)[:, None]
    before = sae.W_dec.detach().clone()
    with pytest.raises(ValueError, match="sae is 'with decoder rows of norm 0.5 to 2': it must be of unit rows"):
        train(sae, batches_of(X, 1), 1, lr=0.0)
    assert torch.equal(sae.W_dec, before)


def test_an_average_of_weights_is_refused_where_a_threshold_is_learnt_for_others():
    with pytest.raises(ValueError, match="ema_decay is 0.9: it must be 0 for batchtopk, whose buffers"):
        train(SAE(16, 40, "batchtopk", 4), batches_of(X, 1), 1, ema_decay=0.9)


def test_no_gradients_are_left():
    sae, _ = short(n_steps=2)
    assert all(p.grad is None for p in sae.parameters())


def test_true_is_no_learning_rate():
    with pytest.raises(ValueError, match="lr is True: it must be a finite number"):
        train(SAE(16, 40), batches_of(X, 1), 1, lr=True)
