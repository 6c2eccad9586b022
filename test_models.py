"""Tests of ae.py, vae.py, beta_vae.py and common.py: identities, behaviour, and whole runs on MNIST."""

import contextlib
import csv
import gzip
import hashlib
import importlib
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from unittest.mock import MagicMock, Mock

import pytest
import torch
import torchvision
from matplotlib.image import imread
from torch.distributions import Bernoulli, MultivariateNormal, Normal, kl_divergence

import ae
import beta_vae
import common
import vae
from common import read_checkpoint
from tools import benchmark, compare_runs

ROOT = Path(__file__).parent
# The models here are small: on a busy machine, threads that wait for each other would only slow them down.
torch.set_num_threads(1)
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
TERMS = ["loss", "recon", "kl", "elbo"]
NARROW = [4, 8, 8, 16]  # channels of a model that trains in milliseconds
QUICK = "--limit 1280 --batch-size 64 --latent-dim 5 --hidden-dims 4 8 8 16 --device cpu --data".split()
QUICK.append(str(ROOT / "data"))


@pytest.fixture(scope="module")
def mnist():
    """The first 512 training and 300 test images: no multiple of the evaluation's batch."""
    data = common.load_data(ROOT / "data", limit=512)
    return data._replace(test_images=data.test_images[:300], test_labels=data.test_labels[:300])


def build(model_name="VAE", seed=0):
    torch.manual_seed(seed)
    return common.Encoder(NARROW, 5, model_name), common.Decoder(5, NARROW)


def train(data, out, *flags, seed=0, epochs=2, loss_fn=vae.vae_loss, progress=None, models=None):
    """A short run; returns its models and history."""
    parser = common.make_parser("vae.py", vae.__doc__)
    common.add_likelihood_flags(parser)
    args = parser.parse_args([*QUICK, f"--epochs={epochs}", f"--seed={seed}", *flags])
    models = [model.to(data.train_images.device) for model in models or build(seed=seed)]
    models[1].start_at_mean(data.train_images)
    return *models, common.train_model(*models, data, loss_fn, args, out, progress)


def run_process(argv, cwd):
    argv = [sys.executable, *map(str, argv)]
    return subprocess.run(argv, cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, check=False)


def ends(main, flags, capsys, code=2):
    """The one line in which a command ends."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(list(map(str, flags)))
    error = capsys.readouterr().err
    assert stop.value.code == code and error.count("\n") == 1
    return error


def few_test_images(load_data):
    """`load_data`, but for most test images: for runs whose numbers do not matter."""

    def load(*args):
        data = load_data(*args)
        return data._replace(test_images=data.test_images[:500], test_labels=data.test_labels[:500])

    return load


@pytest.fixture
def figures(monkeypatch):
    """The figures that were saved, but for the time that rendering takes; tests are on few images."""
    saved = []
    monkeypatch.setattr(common.Figure, "savefig", lambda figure, path, format: saved.append(figure) or path.touch())
    monkeypatch.setattr(common, "load_data", few_test_images(common.load_data))
    return saved


def weights(*models):
    return torch.cat([tensor.flatten() for model in models for tensor in model.state_dict().values()])


def timeless(history):
    return [{**row, "seconds": 0} for row in history]


# ---- Identities: each against an independent reference ------------------------------------------


def test_kl_equals_torch_distributions_and_is_zero_at_the_prior():
    mu, logvar = 2 * torch.randn(64, 7), 2 * torch.randn(64, 7)
    reference = kl_divergence(Normal(mu, (0.5 * logvar).exp()), Normal(0, 1)).mean(dim=0)
    torch.testing.assert_close(common.kl_per_latent(mu, logvar), reference)
    assert common.kl_per_latent(torch.zeros(3, 4), torch.zeros(3, 4)).count_nonzero() == 0


def test_reconstruction_terms_equal_float64_references_and_stay_exact_where_a_sigmoid_would_saturate():
    x, logits = torch.rand(16, 1, 28, 28), 3 * torch.randn(16, 1, 28, 28)
    p, grey, constant = logits.double().sigmoid(), x.double(), 784 / 2 * math.log(2 * math.pi)
    close = partial(torch.testing.assert_close, rtol=1e-5, atol=0)
    cross_entropy = -(grey * p.log() + (1 - grey) * (1 - p).log()).sum(dim=(1, 2, 3))
    close(common.reconstruction_term(logits, x).double(), cross_entropy)
    bernoulli = -Bernoulli(logits=logits).log_prob(x.round()).sum(dim=(1, 2, 3))
    close(common.reconstruction_term(logits, x.round()), bernoulli)
    gaussian = -Normal(p, 1).log_prob(grey).sum(dim=(1, 2, 3)) - constant
    close(common.reconstruction_term(logits, x, "mse").double(), gaussian)
    saturated = torch.full((1, 1, 28, 28), 200.0)
    close(common.reconstruction_term(saturated, torch.zeros_like(saturated)), torch.tensor([200.0 * 784]))


class LinearGaussian:
    """p(x|z) = N(Wz + 1/2, I) with z ~ N(0, I): log p(x) and p(z|x) in closed form. Stands in for a decoder."""

    def __init__(self, images):
        x = common.to_pixels(images).flatten(1).double()  # (N, 784)
        directions = torch.linalg.qr(torch.randn(784, 4, dtype=torch.float64)).Q  # orthogonal: q is diagonal
        self.weight = directions * torch.tensor([0.9, 0.8, 0.7, 0.6])
        # log p(x) = log N(x; 1/2, W W^T + I), less the constant that `kind` "mse" leaves out
        covariance = self.weight @ self.weight.T + torch.eye(784, dtype=torch.float64)
        log_p = MultivariateNormal(torch.full((784,), 0.5, dtype=torch.float64), covariance).log_prob(x)
        self.log_p = (log_p + 784 / 2 * math.log(2 * math.pi)).mean().item()
        # p(z|x) = N(S W^T (x - 1/2), S), S = (I + W^T W)^-1
        variance = 1 / (1 + self.weight.square().sum(dim=0))
        self.mu = ((x - 0.5) @ self.weight * variance).float()  # (N, 4)
        self.logvar = variance.log().float().expand_as(self.mu)

    def logits(self, z):
        return (z.double() @ self.weight.T + 0.5).clamp(1e-6, 1 - 1e-6).logit().view(-1, 1, 28, 28)


def test_the_bound_is_log_p_for_the_posterior_and_rises_to_it_from_the_elbo_for_a_poor_q(mnist):
    torch.manual_seed(0)
    model, images = LinearGaussian(mnist.test_images), mnist.test_images
    for k in (1, 7, 64):  # every weight p(x|z) p(z) / q(z|x) is p(x): a wrong sign, constant or axis cannot hide
        bound = common.importance_weighted_bound(model, model.mu, model.logvar, images, k, "mse")
        assert bound == pytest.approx(model.log_p, abs=2e-4)
    mu, logvar = model.mu + 0.7, model.logvar + 0.7
    posterior = Normal(model.mu, (0.5 * model.logvar).exp())
    gap = kl_divergence(Normal(mu, (0.5 * logvar).exp()), posterior).sum(dim=1).mean().item()  # log p(x) - ELBO
    bounds = []
    for k, times in ((1, 30), (3, 10), (10, 3), (1000, 1)):  # for small k many draws, so that their mean is exact
        many = mu.repeat(times, 1), logvar.repeat(times, 1), images.repeat(times, 1, 1, 1)
        bounds.append(common.importance_weighted_bound(model, *many, k, "mse"))
    assert gap > 1 and bounds[0] == pytest.approx(model.log_p - gap, abs=0.07)
    assert bounds == sorted(bounds) and bounds[-1] == pytest.approx(model.log_p, abs=0.01)


def test_probe_accuracy_is_that_of_ridge_regression_by_least_squares():
    torch.manual_seed(0)
    labels = torch.arange(10).repeat(60)
    scales = torch.tensor([1, 1, 1, 0.03, 0.03, 0.03])  # the penalty decides how much the last three count
    codes = (torch.randn(10, 6)[labels] + 0.8 * torch.randn(600, 6)) * scales + 7  # classes that overlap
    train, test = slice(0, 400), slice(400, 600)
    centre, onehot = codes[train].mean(dim=0), torch.nn.functional.one_hot(labels[train], 10).float()
    # The penalty, 1e-3 for each of 400 codes, as further rows of data: sqrt(penalty) I w = 0. Others score otherwise.
    rows = torch.cat([codes[train] - centre, 0.4**0.5 * torch.eye(6)])
    answers = torch.cat([onehot - onehot.mean(dim=0), torch.zeros(6, 10)])
    scores = (codes[test] - centre) @ torch.linalg.lstsq(rows, answers).solution + onehot.mean(dim=0)
    reference = (scores.argmax(dim=1) == labels[test]).float().mean().item()
    accuracy = common.probe_accuracy(codes[train], labels[train], codes[test], labels[test])
    assert 0.3 < accuracy < 0.95 and accuracy == pytest.approx(reference)


def test_linear_discriminants_solve_the_generalised_eigenvalue_problem():
    torch.manual_seed(0)
    labels = torch.arange(10).repeat(60)
    codes = torch.randn(10, 4)[labels] + torch.randn(600, 4) @ torch.randn(4, 4)
    by_class = codes.view(60, 10, 4)  # (images, classes, latent_dim)
    within = (by_class - by_class.mean(dim=0)).flatten(0, 1).T.cov(correction=0)
    values, vectors = torch.linalg.eig(torch.linalg.solve(within, by_class.mean(dim=0).T.cov(correction=0)))
    reference = vectors.real[:, values.real.argsort(descending=True)[:2]]
    directions = common.linear_discriminants(codes, labels)
    assert torch.cosine_similarity(directions, reference, dim=0).abs().min() > 0.9999
    for singular in (codes[:1], codes[:3], codes[:, :1], torch.cat([codes, torch.zeros(600, 1)], dim=1)):
        found = common.linear_discriminants(singular, labels[: len(singular)])
        assert found.shape == (singular.shape[1], 2) and found.isfinite().all()
    torch.testing.assert_close(found[:4].abs(), directions.abs(), rtol=1e-3, atol=0)  # the last: one dead latent


def test_metrics_equal_those_of_a_mean_reconstruction_and_of_a_singular_value_decomposition(mnist):
    encoder, decoder = build()
    encoder.fc_mean.weight.data *= 30  # codes that the probe's penalty does not silence
    train_x, x = (images.double() / 255 for images in (mnist.train_images, mnist.test_images))
    (train_mu, _), (mu, logvar) = (common.encode(encoder, images) for images in (mnist.train_images, mnist.test_images))
    torch.testing.assert_close(logvar, encoder(x.float())[1])
    metrics = common.representation_metrics(decoder, mnist, train_mu, mu)
    reference = torch.nn.functional.mse_loss(decoder(encoder(x.float())[0]), x.float()).item()
    assert metrics["mse"] == pytest.approx(reference, rel=1e-5)

    train_x, x = train_x.flatten(1), x.flatten(1)
    mean = train_x.mean(dim=0)
    directions = torch.linalg.svd(train_x - mean, full_matrices=False).Vh[:5]  # (5, 784)
    train_codes, codes = ((part - mean) @ directions.T for part in (train_x, x))
    assert metrics["pca_mse"] == pytest.approx((codes @ directions + mean - x).square().mean().item(), rel=1e-4)
    pairs = {"probe": (train_mu, mu), "pca_probe": (train_codes, codes), "pixel_probe": (train_x, x)}
    for name, (train_part, part) in pairs.items():
        reference = common.probe_accuracy(train_part.float(), mnist.train_labels, part.float(), mnist.test_labels)
        assert metrics[f"{name}_accuracy"] == pytest.approx(reference, abs=0.004)  # one image in 300


def test_losses_compose_as_the_papers_say(mnist):
    x, models = common.to_pixels(mnist.train_images[:32]), build()

    def seeded(loss_fn):
        torch.manual_seed(1)  # the same z
        return loss_fn(*models, x)

    loss, terms = seeded(vae.vae_loss)
    torch.manual_seed(1)
    mu, logvar, z = models[0](x)
    kl = kl_divergence(Normal(mu, (0.5 * logvar).exp()), Normal(0, 1)).sum() / 32
    torch.testing.assert_close((terms["kl"], loss), (kl, terms["recon"] + kl))
    assert terms["elbo"] == -loss
    for beta in (0.5, 1.0, 4.0):
        objective, same_terms = seeded(partial(beta_vae.beta_vae_loss, beta=beta))
        torch.testing.assert_close(objective, terms["recon"] + beta * terms["kl"])
        assert same_terms == terms, "the terms and the plain ELBO do not depend on beta"
    for kind in ("bce", "mse"):
        recon = common.reconstruction_term(models[1].logits(z), x, kind).sum() / 32
        for loss_fn in (vae.vae_loss, partial(beta_vae.beta_vae_loss, beta=2)):
            torch.testing.assert_close(seeded(partial(loss_fn, kind=kind))[1]["recon"], recon)
        loss, terms = ae.ae_loss(lambda x: z, models[1], x, kind)
        torch.testing.assert_close((loss, terms["recon"]), (recon, recon))


def test_warmup_and_capacity_follow_their_schedules(mnist):
    x, models = common.to_pixels(mnist.train_images[:32]), build()

    def penalty(progress, **schedule):
        torch.manual_seed(1)
        loss, terms = beta_vae.beta_vae_loss(*models, x, 4, progress, **schedule)
        return (loss - terms["recon"]).item(), terms["kl"].item()

    for progress, weight in ((0.0, 0), (0.1, 2), (0.2, 4), (1.0, 4)):  # linear from 0 to beta
        value, kl = penalty(progress, warmup=0.2)
        assert value == pytest.approx(weight * kl, abs=1e-3)
    for progress, target in ((0.0, 0), (0.25, 15), (0.5, 30), (1.0, 30)):  # C grows over the first half
        value, kl = penalty(progress, capacity=30)
        assert value == pytest.approx(4 * abs(kl - target), abs=1e-3)


def test_the_loss_does_not_depend_on_how_images_are_batched(mnist, monkeypatch):
    encoder, decoder = build("AE")
    whole, _ = ae.ae_loss(encoder, decoder, common.to_pixels(mnist.test_images))
    for batch in (1, 7, 128, 300, 1000):  # 7 and 128 leave a short last batch
        monkeypatch.setattr(common, "EVAL_BATCH", batch)
        split = common.evaluate(encoder, decoder, mnist.test_images, ae.ae_loss)
        assert split["loss"] == split["recon"] == pytest.approx(whole.item(), rel=1e-5)


def test_samples_of_the_ae_have_the_mean_and_covariance_of_its_codes():
    torch.manual_seed(0)
    codes = torch.randn(500, 3) @ torch.tensor([[2.0, 0, 0], [1, 1, 0], [0, 0, 0]]) + 5  # one latent is dead
    samples = ae.sample_codes(codes, 50_000)
    torch.testing.assert_close(samples.mean(dim=0), codes.mean(dim=0), atol=0.05, rtol=0)
    torch.testing.assert_close(samples.T.cov(), codes.T.cov(), atol=0.1, rtol=0)


# ---- Behaviour ----------------------------------------------------------------------------------


def test_encoder_returns_the_mean_or_a_triple_and_decoder_images_in_the_unit_interval():
    x, (encoder, decoder) = torch.rand(6, 1, 28, 28), build("AE")
    mu, (vae_mu, logvar, z) = encoder(x), build("VAE")[0](x)
    assert mu.shape == logvar.shape == z.shape == (6, 5)
    assert torch.equal(mu, vae_mu), "one seed gives both the same weights"
    images = decoder(100 * z)
    assert images.shape == x.shape and images.min() >= 0 and images.max() <= 1
    torch.testing.assert_close(images, decoder.logits(100 * z).sigmoid())
    with pytest.raises(ValueError, match="GAN"):
        common.Encoder(NARROW, 5, "GAN")


def test_test_terms_come_from_a_sample_of_q_and_not_from_its_mean(mnist):
    encoder, decoder = build()
    decoder.input_layer.weight.data *= 30  # images that depend on z
    mu, _ = common.encode(encoder, mnist.test_images)
    of_mean = common.reconstruction_term(decoder.logits(mu.clone()), common.to_pixels(mnist.test_images)).mean()
    assert common.evaluate(encoder, decoder, mnist.test_images, vae.vae_loss)["recon"] > of_mean + 1


def test_the_decoders_crop_undoes_the_encoders_padding():
    x, seen, (encoder, decoder) = torch.rand(2, 1, 28, 28), [], build("AE")
    encoder.model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    decoder.last_layer[0].register_forward_hook(lambda *call: seen.append(call[-1]))
    logits = decoder.logits(encoder(x))
    for inner, outer in zip((x, logits), seen):
        assert outer.shape == (2, 1, 32, 32) and torch.equal(outer[..., 2:-2, 2:-2], inner)
    assert seen[0].count_nonzero() == x.count_nonzero()


def test_a_bias_added_apart_gives_the_images_and_gradients_of_torchs_own_layers():
    decoder, results = build()[1].double(), []
    for mode in (common.BiasApart(), contextlib.nullcontext()):
        z = torch.linspace(-2, 2, 15).view(3, 5).double().requires_grad_()
        with mode:
            images = decoder(z)
        gradients = torch.autograd.grad(images.square().sum(), [z, *decoder.parameters()])
        results.append([images, *gradients])
    torch.testing.assert_close(*results)


def test_reparameterize_has_the_mean_and_variance_it_is_given_and_passes_gradients_to_both():
    encoder, _ = build()
    mu, logvar = torch.tensor([[-3.0, 0.0, 2.0]]), torch.tensor([[-2.0, 0.0, 1.0]])
    z = encoder.reparameterize(mu.expand(200_000, 3), logvar.expand(200_000, 3))
    torch.testing.assert_close(z.mean(dim=0), mu[0], atol=0.02, rtol=0)
    torch.testing.assert_close(z.var(dim=0), logvar[0].exp(), atol=0, rtol=0.02)
    mu, logvar = torch.zeros(4, 5, requires_grad=True), torch.zeros(4, 5, requires_grad=True)
    z = encoder.reparameterize(mu, logvar)
    z.sum().backward()
    assert torch.equal(mu.grad, torch.ones(4, 5))  # dz/dmu = 1
    torch.testing.assert_close(logvar.grad, 0.5 * z.detach())  # dz/dlogvar = eps std / 2, here z / 2


def test_one_seed_gives_the_same_run_to_the_bit_and_another_does_not(mnist, tmp_path):
    first, again, other = (train(mnist, tmp_path, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(weights(*first[:2]), weights(*again[:2]))
    assert not torch.equal(weights(*first[:2]), weights(*other[:2]))
    assert timeless(first[2]) == timeless(again[2]) != timeless(other[2])
    seeds = set()
    for number in range(25):
        common.seed_epoch(*divmod(number, 5))
        seeds.add(torch.initial_seed())
    assert len(seeds) == 25, "every seed and epoch has random numbers of its own"


def test_progress_runs_from_0_to_1_and_is_1_in_the_last_test(mnist, tmp_path):
    progress, steps, tests = torch.zeros(()), [], []

    def loss_fn(encoder, decoder, x):
        (steps if torch.is_grad_enabled() else tests).append(progress.item())
        return vae.vae_loss(encoder, decoder, x)

    train(mnist, tmp_path, loss_fn=loss_fn, progress=progress)
    assert steps == [i / 16 for i in range(16)]
    assert tests == [0.5, 0.5, 1, 1]  # two batches of test images an epoch


def test_binarised_training_draws_anew_and_the_test_set_is_drawn_once(mnist, tmp_path):
    batches = []

    def loss_fn(encoder, decoder, x):
        if torch.is_grad_enabled():
            batches.append(x)
        return vae.vae_loss(encoder, decoder, x)

    train(mnist, tmp_path, "--binarize", epochs=4, loss_fn=loss_fn)
    drawn = torch.cat(batches).view(4, 512, 784)  # each epoch in an order of its own
    assert set(drawn.unique().tolist()) == {0, 1} and len(drawn.sum(dim=(1, 2)).unique()) == 4
    pixels = common.to_pixels(mnist.train_images).flatten(1)
    torch.testing.assert_close(drawn.mean(dim=(0, 1)), pixels.mean(dim=0), atol=0.06, rtol=0)

    once = common.binarize_once(mnist.train_images)
    assert torch.equal(once, common.binarize_once(mnist.train_images)) and set(once.unique().tolist()) == {0, 255}
    assert common.to_pixels(once).mean().item() == pytest.approx(pixels.mean().item(), abs=0.002)
    data = common.load_data(ROOT / "data", limit=512, binarize=True)
    assert torch.equal(data.test_images[:300], common.binarize_once(data.test_images)[:300])
    assert torch.equal(data.train_images, mnist.train_images), "they are drawn in training"


def test_bfloat16_trains_to_the_loss_of_float32_which_casts_nothing(mnist, tmp_path, monkeypatch):
    losses = []
    for precision in ("bf16", "fp32"):
        *models, history = train(mnist, tmp_path, "--precision", precision)
        losses.append(history[-1]["test_loss"])
        assert all(tensor.dtype == torch.float32 for model in models for tensor in model.state_dict().values())
        monkeypatch.setattr(torch, "autocast", None)  # not to be touched where there is nothing to cast
        monkeypatch.setattr(common, "BiasApart", None)
    assert losses[0] != losses[1] and losses[1] == pytest.approx(losses[0], rel=0.02)


@pytest.mark.parametrize("kind", ["cpu", "mps"])
def test_convolutions_are_laid_out_for_the_cpu_and_left_alone_on_mps(kind):
    models = build()
    common.set_up_device(*models, torch.device(kind))
    assert models[0].model[2].weight.is_contiguous(memory_format=torch.channels_last) == (kind == "cpu")


def test_a_terminal_sees_a_line_an_epoch_that_updates_in_place_and_stays(mnist, tmp_path, monkeypatch, capsys):
    train(mnist, tmp_path, "--batch-size=8", epochs=2)
    assert [line.split("  ")[0] for line in capsys.readouterr().out.splitlines()] == ["epoch 1/2", "epoch 2/2"]
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    train(mnist, tmp_path, "--batch-size=8", epochs=2)  # 64 steps an epoch: a line after the 50th and after the last
    output = capsys.readouterr().out
    assert output.count("\r") == 4 and re.findall(r"epoch (\d)/2.*\n", output) == ["1", "2"]


def test_bfloat16_is_taken_where_the_chosen_device_is_faster_in_it_or_where_it_is_asked_for(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: [(7, 5), (8, 0)][device.index])
    cpu, *others = map(torch.device, ("cpu", "mps", "cuda:0", "cuda:1"))
    for ratio, precision in ((0.021, "float32"), (1.49, "float32"), (1.51, "bfloat16")):
        seconds = {torch.float32: ratio, torch.bfloat16: 1}
        monkeypatch.setattr(common, "matmul_seconds", lambda device, dtype, seconds=seconds: seconds[dtype])
        assert common.pick_precision(cpu) == (precision, f"bfloat16 products are {ratio:.2g} times as fast")
    assert [common.pick_precision(other)[0] for other in others] == ["float32", "float32", "bfloat16"]
    for asked, given in {"bf16": "bfloat16", "fp32": "float32"}.items():
        assert common.pick_precision(cpu, asked) == (given, "as set")


def test_timing_a_product_gives_seconds_and_leaves_the_threads_as_they_were():
    assert 0 < common.matmul_seconds(torch.device("cpu"), torch.float32, 32) < 1
    torch.set_num_threads(2)
    precision, _ = common.pick_precision(torch.device("cpu"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert threads == 2 and precision in ("float32", "bfloat16")


def test_a_gpu_that_cannot_work_is_left_by_auto_with_the_reason_and_refused_by_name(monkeypatch, capsys):
    one = Mock(device=torch.device("cuda:1"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "ones", lambda size, device: one)
    assert common.pick_device() == common.pick_device("cuda:1") == (torch.device("cuda:1"), "")
    one.add.return_value.item.side_effect = RuntimeError("CUDA error: no kernel image is available\nCompile with")
    reason = "cuda cannot be used: CUDA error: no kernel image is available"
    assert common.pick_device() == (torch.device("cpu"), f" ({reason})")
    error = ends(vae.main, ["--device", "cuda"], capsys)
    assert error == f"vae.py: error: argument --device: {reason} (take auto, cpu, cuda, cuda:N or mps)\n"


def test_training_equals_the_textbook_loop_with_the_same_seeds_and_rates(mnist, tmp_path):
    *models, history = train(mnist, tmp_path, "--precision=fp32", "--lr=1e-2")
    trained, models = weights(*models), build()
    parameters = [parameter for model in models for parameter in model.parameters()]
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.95), weight_decay=0.1)
    mean = common.to_pixels(mnist.train_images).mean()
    models[1].last_layer[0].bias.data.fill_((mean / (1 - mean)).log())  # a decoder that says the mean pixel
    for epoch in (0, 1):
        common.seed_epoch(0, epoch + 1)
        for step, batch in enumerate(torch.randperm(512).split(64)):
            optimizer.param_groups[0]["lr"] = lr = common.learning_rate(8 * epoch + step, 16, 1e-2)
            loss, _ = vae.vae_loss(*models, common.to_pixels(mnist.train_images[batch]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert history[epoch]["lr"] == lr
    torch.testing.assert_close(trained, weights(*models), rtol=1e-3, atol=1e-4)


def test_learning_rate_warms_up_over_a_tenth_and_falls_to_zero():
    rates = [common.learning_rate(step, 1000, 2e-3) for step in range(1001)]
    assert rates[99] == rates[100] == max(rates) == 2e-3 and rates[1000] == 0
    straight = [*torch.linspace(2e-5, 2e-3, 100).tolist(), *torch.linspace(2e-3, 0, 901).tolist()]
    assert rates == pytest.approx(straight, abs=1e-9)
    assert common.learning_rate(0, 1, 2e-3) == 2e-3  # a run of one step


@pytest.fixture
def fake_cuda(monkeypatch):
    """Stand-ins for what a capture calls: replaying runs nothing, and `fails` says in what a capture ends."""
    cuda = MagicMock()
    for name in ("default_generators", "CUDAGraph", "Stream", "current_stream", "stream", "graph", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, getattr(cuda, name))
    cuda.stream.return_value.__exit__.return_value = cuda.graph.return_value.__exit__.return_value = False
    return cuda


@pytest.mark.parametrize("steps", [0, 2], ids=["fresh", "resumed"])
@pytest.mark.parametrize(
    "error, line",
    [
        (None, ""),
        (RuntimeError("out of memory\nCompile with"), "no CUDA graph, so training is slower: out of memory\n"),
        (RuntimeError(""), "no CUDA graph, so training is slower: RuntimeError('')\n"),
    ],
)
def test_a_capture_leaves_weights_buffers_and_optimizer_as_they_were(error, line, steps, mnist, fake_cuda, capsys):
    fake_cuda.graph.return_value.__exit__.side_effect = error
    x, results = common.to_pixels(mnist.train_images[:32]), []

    def training_step(indices):
        loss, terms = vae.vae_loss(*models, x[indices])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return terms

    for capture in (True, False):
        models = build()
        models[0].model.append(torch.nn.BatchNorm2d(NARROW[3]))
        optimizer = torch.optim.AdamW([*models[0].parameters(), *models[1].parameters()], fused=True)
        for number in range(steps + 3):
            if capture and number == steps:
                graphed = common.as_cuda_graph(training_step, *models, optimizer, 16)
                assert (graphed is training_step) == (error is not None)
                assert optimizer.param_groups[0]["capturable"] == (error is None)
            optimizer.param_groups[0].update(lr=1e-2 / (number + 1), capturable=False)
            torch.manual_seed(number)
            training_step(torch.arange(32))
        results.append(weights(*models))
    assert torch.equal(*results)
    assert capsys.readouterr().out == line


def test_a_graph_reads_its_batch_and_rate_anew(mnist, fake_cuda):
    models, seen = build(), []
    optimizer = torch.optim.AdamW([*models[0].parameters(), *models[1].parameters()], fused=True)

    def training_step(indices):
        seen.append((indices, optimizer.param_groups[0]["lr"]))
        return {"loss": indices.sum()}

    replay = common.as_cuda_graph(training_step, *models, optimizer, 3)
    (indices, rate), batch = seen[-1], torch.tensor([7, 8, 9])
    optimizer.param_groups[0]["lr"] = 0.25  # as the loop sets it
    replay(batch)
    assert torch.equal(indices, batch) and rate.item() == 0.25
    assert fake_cuda.CUDAGraph.return_value.replay.call_count == 1


def test_ctrl_c_in_a_capture_is_no_failed_capture(fake_cuda):
    def training_step(indices):
        calls.append(indices)
        if len(calls) == 4:  # after three to warm up
            raise KeyboardInterrupt

    calls, models = [], build()
    fake_cuda.graph.return_value.__exit__.side_effect = RuntimeError("the capture's end fails too")
    with pytest.raises(KeyboardInterrupt):
        common.as_cuda_graph(training_step, *models, torch.optim.AdamW(models[0].parameters()), 3)
    assert fake_cuda.synchronize.called and fake_cuda.default_generators[0].graphsafe_set_state.called


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_cuda_graph_gives_the_losses_of_the_eager_step(precision, tmp_path, monkeypatch):
    data = common.load_data(ROOT / "data", device=torch.device("cuda:0"), limit=4096)
    *_, graphed = train(data, tmp_path, "--precision", precision, epochs=3)
    monkeypatch.setattr(common, "as_cuda_graph", lambda training_step, *_: training_step)
    *_, eager = train(data, tmp_path, "--precision", precision, epochs=3)
    for one, other in zip(graphed, eager):
        assert one["lr"] == other["lr"]
        for name in ("train_loss", "test_elbo"):
            assert one[name] == pytest.approx(other[name], rel=0.01)


# ---- Figures: what they draw ---------------------------------------------------------------------


def spell(z):
    """A decoder whose images spell their codes."""
    return torch.nn.functional.pad(z, (0, 784 - z.shape[1])).view(-1, 1, 28, 28)


def test_reconstructions_and_interpolations_show_the_images_and_codes_that_their_labels_name(mnist, monkeypatch):
    monkeypatch.setattr(common, "plot_grid", grid := Mock())
    chosen, mu = [mnist.test_labels.tolist().index(digit) for digit in range(10)], torch.randn(300, 5)
    common.plot_reconstructions(spell, mu, mnist, "out")
    rows = torch.cat([mnist.test_images[chosen] / 255, spell(mu[chosen])])
    assert torch.equal(grid.call_args.args[0].flatten(0, 1), rows[:, 0])
    assert grid.call_args.kwargs["row_labels"] == ["input", "reconstruction"]
    common.plot_interpolations(spell, mu, mnist, "out")
    shares = torch.tensor([float(label) for label in grid.call_args.kwargs["column_labels"]])  # of the second code
    z = torch.lerp(mu[chosen[::2], None], mu[chosen[1::2], None], shares[:, None])
    torch.testing.assert_close(grid.call_args.args[0].flatten(2)[..., :5], z)


def test_traversals_and_manifold_move_the_latents_that_their_labels_name(mnist, monkeypatch):
    monkeypatch.setattr(common, "plot_grid", grid := Mock())
    mu, logvar = 3 * torch.rand(12) * torch.randn(300, 12), torch.randn(300, 12)
    common.plot_traversals(spell, mu, logvar, mnist, "out")
    kl, order = common.kl_per_latent(mu, logvar).sort(descending=True)
    moved = torch.nn.functional.one_hot(order[:10], 12).bool()[:, None]  # (10, 1, 12)
    values = torch.tensor([float(label) for label in grid.call_args.kwargs["column_labels"]])[:, None]
    assert torch.equal(grid.call_args.args[0].flatten(2)[..., :12], torch.where(moved, values, mu[0]))
    numbers = [re.findall(r"[\d.]+", label) for label in grid.call_args.kwargs["row_labels"]]
    assert numbers == [[str(latent), f"{nats:.1f}"] for latent, nats in zip(order[:10].tolist(), kl)]
    common.plot_manifold(spell, mnist, "out")
    quantiles = Normal(0, 1).icdf((torch.arange(20) + 0.5) / 20)
    plane = torch.stack(torch.meshgrid(quantiles, quantiles.flip(0), indexing="xy"), dim=2)  # z_0 right, z_1 up
    torch.testing.assert_close(grid.call_args.args[0].flatten(2)[..., :2], plane)


def test_a_grid_starts_at_the_top_left_and_has_each_label_beside_its_row_or_column(figures, tmp_path):
    images, labels = torch.rand(2, 3, 28, 28), list("abcde")
    common.plot_grid(images, tmp_path, "grid", "title", labels[:2], labels[2:])
    ax, (drawn,) = figures[-1].axes[0], figures[-1].axes[0].images
    assert (drawn.get_array() == torch.cat([torch.cat([*row], dim=1) for row in images]).numpy()).all()
    assert drawn.origin == "upper" and ax.yaxis_inverted() and not ax.xaxis_inverted()
    assert [label.get_text() for label in (*ax.get_yticklabels(), *ax.get_xticklabels())] == labels
    assert [tick // 28 for tick in (*ax.get_yticks(), *ax.get_xticks())] == [0, 1, 0, 1, 2]


def test_codes_their_class_and_the_legend_agree_in_place_and_colour(mnist, figures, tmp_path):
    train_mu, mu = torch.randn(512, 5) + mnist.train_labels[:, None], torch.randn(300, 5)
    common.plot_latent_space(train_mu[:, :2], mu[:, :2], mnist, tmp_path)
    assert (figures[-1].axes[0].collections[0].get_offsets() == mu[:, :2].numpy()).all()
    common.plot_latent_space(train_mu, mu, mnist, tmp_path)
    points = (mu - train_mu.mean(dim=0)) @ common.linear_discriminants(train_mu, mnist.train_labels)
    ax, (legend,) = figures[-1].axes[0], figures[-1].legends
    assert ax.collections[0].get_offsets().data == pytest.approx(points.numpy(), abs=1e-4)
    assert len({*map(tuple, colours := ax.collections[0].get_facecolors())}) == 10
    for digit, (text, name, handle) in enumerate(zip(ax.texts, legend.get_texts(), legend.legend_handles)):
        own = mnist.test_labels == digit
        assert text.get_text() == name.get_text() == str(digit) and (colours[own] == handle.get_facecolor()).all()
        assert text.get_position() == pytest.approx(points[own].median(dim=0).values.tolist(), abs=1e-4)


def test_kl_bars_fall_and_have_the_numbers_of_their_latents_below_them(mnist, figures, tmp_path):
    mu, logvar = torch.randn(300, 64) * torch.rand(64), torch.zeros(300, 64)
    common.plot_kl_per_dimension(mu, logvar, mnist, tmp_path)
    kl, ax = common.kl_per_latent(mu, logvar), figures[-1].axes[0]
    heights = [bar.get_height() for bar in ax.patches]
    assert heights == sorted(kl.tolist(), reverse=True)
    latents = [int(label.get_text()) for label in ax.get_xticklabels()]
    assert len(latents) > 20 and [heights[tick] for tick in ax.get_xticks()] == kl[latents].tolist()


def test_loss_curves_draw_all_epochs_in_a_panel_that_only_the_first_tenth_may_leave(mnist, figures, tmp_path):
    names = ["train_kl", "test_kl", "train_heat", "test_heat"]
    history = [{"epoch": i, **{name: top / i for top, name in enumerate(names, 3)}} for i in range(1, 21)]
    common.plot_loss_curves(history, {"kl": "KL", "heat": "own term"}, mnist, tmp_path)
    lines = [(line, name) for ax, name in zip(figures[-1].axes, ["kl", "heat"]) for line in ax.lines]
    drawn = {f"{line.get_label()}_{name}": [*zip(*line.get_data())] for line, name in lines}
    assert drawn == {name: [(row["epoch"], row[name]) for row in history] for name in names}
    low, high = figures[-1].axes[0].get_ylim()
    assert low < 3 / 20 and 4 / 3 < high < 3 / 2  # the lowest of all, the highest of the third and second epochs
    assert [ax.get_ylabel() for ax in figures[-1].axes] == ["KL\n(nats per image)", "own term"]
    common.plot_loss_curves(history[:1], {"kl": "KL"}, mnist, tmp_path)
    assert all(tick.is_integer() for tick in figures[-1].axes[0].get_xticks())


# ---- Scripts: what they hand to common.py --------------------------------------------------------


@pytest.fixture
def run(mnist, tmp_path, monkeypatch, figures):
    """Runs a script's main() on 500 images, five steps an epoch; figures are not rendered."""
    monkeypatch.setattr(common, "load_data", lambda *_: mnist._replace(name="KMNIST"))
    small = [*QUICK, "--batch-size=100", "--precision=fp32", "--out", str(tmp_path / "run")]
    return lambda script, flags: script.main([*small, *flags.split()])


@pytest.mark.parametrize("script", [ae, vae, beta_vae], ids=["ae", "vae", "beta_vae"])
def test_a_scripts_numbers_and_samples_are_those_its_flags_ask_for(script, run, mnist, monkeypatch, figures):
    monkeypatch.setattr(script, "decode_grid", grid := Mock(wraps=common.decode_grid))
    out = run(script, "--epochs 2 --recon mse --latent-dim 2" + " --iw-samples 3" * (script is not ae))
    script.main(["--resume", str(out)])  # from another random state, since it trains no further
    metrics, (encoder, decoder, _) = json.loads((out / "metrics.json").read_text()), common.load_model(out)
    test, train_mu = metrics["test"], common.encode(encoder, mnist.train_images)[0]
    # In nats of half the squared error: cross-entropy has 287, a decoder that does not start at the mean pixel 82.
    assert test["recon"] < 60 and test.get("iw_bound", 0) > -60
    seconds = sum(row["seconds"] for row in common.read_checkpoint(out)["history"])
    assert metrics["train"]["seconds"] == seconds and metrics["train"]["images_per_second"] == 2 * 500 / seconds
    unused = 130 * (script is ae)  # the weights of fc_logvar
    assert metrics["train"]["parameters"] == weights(encoder, decoder).numel() - unused
    torch.manual_seed(common.EVAL_SEED)
    samples = ae.sample_codes(train_mu, 100) if script is ae else torch.randn(100, 2)
    torch.testing.assert_close(grid.call_args.args[1].view(100, 2), samples)
    assert all(figure.axes[0].get_title().startswith("KMNIST: ") for figure in figures)
    assert (out / "manifold.pdf").exists() == (script is not ae)


@pytest.mark.parametrize("script", [vae, beta_vae], ids=["vae", "beta_vae"])
def test_active_units_are_those_whose_mean_varies_over_images(script, run, monkeypatch):
    scales = torch.tensor([1, 0.2, 0.05, 0.02, 0])  # variances of 1, 0.04, and of less than 0.01
    codes = {size: (3 + scales * torch.randn(size, 5), torch.zeros(size, 5)) for size in (512, 300)}
    monkeypatch.setattr(common, "encode", lambda encoder, images: codes[len(images)])
    metrics = json.loads((run(script, "--epochs 1") / "metrics.json").read_text())
    assert metrics["test"]["active_units"] == 2


def test_beta_vae_trains_with_the_schedule_that_its_flags_ask_for(run):
    out = run(beta_vae, "--epochs 4 --beta 3 --warmup 2 --capacity 100")
    for row, beta, capacity in zip(common.read_checkpoint(out)["history"], (1.5, 3, 3, 3), (50, 100, 100, 100)):
        penalty = beta * abs(capacity - row["test_kl"])
        assert row["test_loss"] == pytest.approx(row["test_recon"] + penalty, rel=1e-4)


@pytest.mark.parametrize("script", [vae, beta_vae], ids=["vae", "beta_vae"])
def test_a_stopped_run_reports_no_samples_of_a_bound(script, run, monkeypatch, tmp_path):
    monkeypatch.setattr(common, "evaluate", Mock(side_effect=[dict.fromkeys(TERMS, 1.0), KeyboardInterrupt]))
    with pytest.raises(SystemExit):
        run(script, "--epochs 2 --recon mse --iw-samples 3")
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["protocol"]["K"] is None and "iw_bound" not in metrics["test"]


def test_test_numbers_do_not_depend_on_the_random_state(mnist):
    (encoder, decoder), images, codes = build(), mnist.test_images, (torch.randn(300, 5), torch.randn(300, 5))
    first, second = (common.evaluate(encoder, decoder, images, vae.vae_loss) for _ in range(2))
    bound, again = (common.importance_weighted_bound(decoder, *codes, images, 2) for _ in range(2))
    assert first == second and bound == again


# ---- Whole runs, each in a process of its own, on the real images --------------------------------

FIGURES = ["reconstructions", "samples", "interpolations", "loss_curves", "latent_space"]
LATENT_FIGURES = [*FIGURES, "traversals", "kl_per_dimension"]
WHOLE_RUNS = {  # flags, figures and terms
    vae: ("--binarize --iw-samples 3", LATENT_FIGURES, TERMS),
    beta_vae: ("--capacity 5 --warmup 0.5 --latent-dim 2", [*LATENT_FIGURES, "manifold"], TERMS),
    ae: ("--recon mse", FIGURES, TERMS[:2]),
}


@pytest.fixture(scope="module")
def whole_runs(tmp_path_factory):
    """The folder that holds runs/, and by script the process that wrote there: two at a time."""
    folder, small = tmp_path_factory.mktemp("whole"), "--epochs 1 --limit 512 --hidden-dims 8 16 16 32 --device cpu"
    with ThreadPoolExecutor(2) as pool:
        argvs = {
            script: [f"{ROOT}/{script.__name__}.py", *f"{flags} {small} --data".split(), ROOT / "data"]
            for script, (flags, *_) in WHOLE_RUNS.items()
        }
        yield folder, {script: pool.submit(run_process, argv, folder) for script, argv in argvs.items()}


@pytest.mark.parametrize("script", WHOLE_RUNS, ids=lambda script: script.__name__)
def test_a_script_leaves_every_figure_and_the_numbers_of_the_model_it_saved(script, whole_runs):
    (folder, processes), (flags, figures, terms) = whole_runs, WHOLE_RUNS[script]
    done, out = processes[script].result(), folder / "runs" / script.__name__
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    expected = {f"{figure}.{suffix}" for figure in figures for suffix in ("png", "pdf")}
    assert {file.name for file in out.iterdir()} == expected | {"history.csv", "metrics.json", "checkpoint.pt", ".lock"}
    for figure in figures:
        image = imread(out / f"{figure}.png")
        assert image.std() > 0.01, f"{figure} is blank"
        edges = (image[0], image[-1], image[:, 0], image[:, -1])
        assert all(edge.min() == 1 for edge in edges), f"{figure} is cut off"
        pdf = (out / f"{figure}.pdf").read_bytes()
        assert len(pdf) < 500_000 and b"/Type3" not in pdf
        assert float(re.search(rb"/MediaBox \[ ?0 0 ([\d.]+)", pdf)[1]) == 3.25 * 72  # points: a column's width

    (row,) = csv.DictReader((out / "history.csv").read_text().splitlines())
    names = [f"{split}_{term}" for split in ("train", "test") for term in terms]
    assert list(row) == ["epoch", "lr", *names, "seconds"]
    assert all(math.isfinite(float(value)) for value in row.values())

    metrics = json.loads((out / "metrics.json").read_text())
    assert set(metrics) == {"args", "protocol", "test", "train", "environment"}
    test, protocol, binarize = metrics["test"], metrics["protocol"], "--binarize" in flags
    assert protocol["pixels"] == ("binarised" if binarize else "grey") and protocol["K"] == (3 if binarize else None)
    assert protocol["recon"].startswith("Gaussian" if "mse" in flags else "Bernoulli")
    encoder, decoder, args = common.load_model(out)
    data = common.load_data(ROOT / "data", limit=512, binarize=binarize)
    if binarize:
        data = data._replace(train_images=common.binarize_once(data.train_images))
    (train_mu, _), (mu, logvar) = (common.encode(encoder, part) for part in (data.train_images, data.test_images))
    loss_fn = partial(ae.ae_loss if script is ae else vae.vae_loss, kind=args.recon)
    again = common.evaluate(encoder, decoder, data.test_images, loss_fn)
    again |= common.representation_metrics(decoder, data, train_mu, mu)
    again |= {"loss": float(row["test_loss"])}  # the objective's, with its schedule at the end
    if "kl" in terms:
        again |= {"active_units": (mu.var(dim=0) > 0.01).sum().item()}
        assert test.pop("kl_per_latent") == pytest.approx(common.kl_per_latent(mu, logvar).tolist(), rel=1e-4)
    if binarize:
        assert test["elbo"] < test.pop("iw_bound") < test["elbo"] + 5
    assert test == pytest.approx(again, rel=1e-4, abs=5e-4)


# ---- A script of one's own ----------------------------------------------------------------------


def test_the_readmes_own_model_is_recorded_as_itself_and_stands_in_a_table(tmp_path, monkeypatch, capsys, figures):
    readme, script = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "vae.py"))
    loss = re.search(r"## Your own model.*?```python\n(.*?)```", readme, re.DOTALL)[1]
    own = re.sub(r"def vae_loss.*?\n\n\n", lambda _: f"{loss}\n\n", script, flags=re.DOTALL)
    (tmp_path / "iwae.py").write_text(own.replace("vae_loss", "iwae_loss"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    iwae = importlib.import_module("iwae")
    iwae.main([*QUICK, "--epochs=1"])
    runs = [iwae.main(["--resume", "runs/iwae", "--epochs=2"]), vae.main([*QUICK, "--epochs=2"])]
    metrics = json.loads((runs[0] / "metrics.json").read_text())
    assert metrics["environment"]["script"] == "iwae.py" and metrics["test"]["bound"] > metrics["test"]["elbo"]
    assert metrics["protocol"]["optimizer"]["weight_decay"] == 0.1
    capsys.readouterr()
    compare_runs.main(list(map(str, runs)))
    output = capsys.readouterr().out
    assert "| bound |" in output and "| VAE | 1 |" in output and "| iwae, epochs 1 to 2 after epoch 1 | 1 |" in output


# ---- Nothing lost: kills, full disks, damage, two runs at once -----------------------------------

DIE = """
import os, signal, common, vae
from test_models import few_test_images
common.load_data = few_test_images(common.load_data)
calls, real = 0, {target}
def dying(*args, **kwargs):
    global calls
    calls += 1
    if calls == {call}:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args, **kwargs)
{target} = dying
vae.main({argv!r})
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_a_run_that_was_killed_or_stopped_and_resumed_equals_one_that_was_not(tmp_path, monkeypatch, capsys, figures):
    monkeypatch.chdir(tmp_path)
    whole, killed = vae.main([*QUICK, "--epochs=4", "--out=whole"]), Path("killed")
    argv = [*QUICK, "--epochs=4", "--resume=killed"]  # one command line starts and goes on

    def ctrl_c(call):
        """Stop a run at a step; what was kept by then, and the line in which it ends."""
        steps, to_pixels = itertools.count(1), common.to_pixels

        def stopping(images):
            if next(steps) == call:
                raise KeyboardInterrupt
            return to_pixels(images)

        with monkeypatch.context() as patch:
            patch.setattr(common, "to_pixels", stopping)
            line = ends(vae.main, argv, capsys, code=130)
        return (killed / "checkpoint.pt").exists(), (killed / "samples.png").exists(), line

    nothing = "vae.py: interrupted; no epoch had ended, so nothing is kept in killed\n"
    assert ctrl_c(5) == (False, False, nothing)  # in the first epoch
    for epoch, target, call in (
        (0, "common.os.replace", 2),  # a checkpoint written, but not yet moved into place
        (1, "common.os.replace", 3),  # in place, with the history one epoch behind
        (1, "common.to_pixels", 15),  # in the middle of an epoch
    ):
        done = run_process(["-c", DIE.format(target=target, call=call, argv=argv)], tmp_path)
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert (read_checkpoint(killed)["epoch"] if (killed / "checkpoint.pt").exists() else 0) == epoch
        assert not (killed / "samples.png").exists()
    assert ctrl_c(30) == (True, True, f"vae.py: interrupted; go on with: python {vae.__file__} --resume killed\n")
    assert json.loads((killed / "metrics.json").read_text())["train"]["epochs"] == 2, "it draws what was trained"

    vae.main(["--resume", "killed"])  # with its own flags
    one, other = read_checkpoint(whole), read_checkpoint(killed)
    for part in ("encoder", "decoder"):
        assert all(torch.equal(tensor, other[part][name]) for name, tensor in one[part].items())
    assert timeless(one["history"]) == timeless(other["history"]) and len(one["history"]) == 4
    assert {file.name for file in whole.iterdir()} == {file.name for file in killed.iterdir()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a finished run of two epochs, of digits whose likelihood is bounded; to be copied, not changed."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "load_data", few_test_images(common.load_data))
        flags = "--binarize --capacity 0 --seed 7 --lr 1e-3 --epochs 2 --out".split()
        return beta_vae.main([*QUICK, *flags, str(folder)])


def test_a_resumed_run_takes_new_epochs_and_rates_and_says_what_changed_when(finished, tmp_path, figures):
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    started = read_checkpoint(run)["args"]
    flags = {"epochs": 3, "lr": 2e-3, "iw_samples": 2, "data": f"{ROOT}/data/"}
    argv = [str(word) for name, value in flags.items() for word in (f"--{name.replace('_', '-')}", value)]
    assert beta_vae.main(["--resume", str(run), *argv]) == run
    args, metrics = read_checkpoint(run)["args"], json.loads((run / "metrics.json").read_text())
    expected = [{"after_epoch": 2, "name": name, "from": started[name], "to": flags[name]} for name in flags]
    assert sorted(args["changes"], key=str) == sorted(expected, key=str) and metrics["args"] == args
    kept = {"binarize": True, "capacity": 0, "seed": 7, "hidden_dims": NARROW, "limit": 1280}
    assert {**args, **kept} == args and "iw_bound" in metrics["test"]


def test_a_resumed_run_refuses_by_name_what_would_falsify_its_numbers(finished, tmp_path, capsys):
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    before = {file.name: file.read_bytes() for file in run.iterdir()}
    refused = "--epochs 1,--recon mse,--limit 1279,--beta 3,--seed 8,--batch-size 32,--warmup 1,--capacity 1"
    refused += ",--latent-dim 6,--hidden-dims 4 8 8 8,--dataset KMNIST,--out elsewhere"
    for flags in refused.split(","):
        flag, *values = flags.split()
        error = ends(beta_vae.main, ["--resume", run, flag, *values], capsys)
        assert flag in error and (flag == "--out" or values[-1] in error.split(f"{flag} ")[-1])
    assert "has script beta_vae.py, not vae.py" in ends(vae.main, ["--resume", run], capsys)
    assert {file.name: file.read_bytes() for file in run.iterdir()} == before


def test_a_stopped_run_names_the_flags_it_was_given_last(finished, tmp_path, monkeypatch, capsys, figures):
    run = Path(shutil.copytree(finished, tmp_path / "a run"))
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(common, "evaluate", Mock(side_effect=KeyboardInterrupt))  # in the third epoch
    error = ends(beta_vae.main, ["--resume", run, "--epochs", "4", "--lr", "2e-3"], capsys, code=130)
    assert error.endswith(f"go on with: python beta_vae.py --resume '{run}' --epochs 4 --lr 0.002\n")


def test_checkpoints_that_lack_later_flags_go_on_in_the_precision_that_auto_gives(finished, tmp_path, capsys, figures):
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    checkpoint = torch.load(run / "checkpoint.pt")
    for name in ("dataset", "changes"):
        del checkpoint["args"][name]
    assert checkpoint["args"]["precision"] in ("fp32", "bf16"), "the precision that was taken, not auto"
    other = {"fp32": "bf16", "bf16": "fp32"}[checkpoint["args"]["precision"]]
    for kept, line in (("auto", "products are"), (other, "as set")):
        checkpoint["args"]["precision"] = kept
        torch.save(checkpoint, run / "checkpoint.pt")
        beta_vae.main(["--resume", str(run), "--precision", "auto"])
        assert line in capsys.readouterr().out.splitlines()[0]
        args = json.loads((run / "metrics.json").read_text())["args"]
        assert args["changes"] == [] and args["dataset"] == "MNIST" and args["precision"] != "auto"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_averages_in_another_devices_layout_go_on_to_the_bit(precision, mnist, tmp_path):
    results = []
    for layout in (torch.preserve_format, torch.contiguous_format):  # the second is how MPS would have saved them
        train(mnist, tmp_path / "run", "--precision", precision, epochs=1)
        checkpoint = torch.load(tmp_path / "run" / "checkpoint.pt")
        for state in checkpoint["optimizer"]["state"].values():
            state.update({name: value.clone(memory_format=layout) for name, value in state.items()})
        torch.save(checkpoint, tmp_path / "run" / "checkpoint.pt")
        *models, _ = train(mnist, tmp_path / "run", "--precision", precision, "--resume", str(tmp_path / "run"))
        results.append(weights(*models))
    assert torch.equal(*results)


def test_other_networks_are_refused_or_built_by_the_callers_function(finished, tmp_path, capsys, monkeypatch):
    with pytest.raises(common.OtherNetworks, match="other networks"):
        common.load_model(finished, lambda args: (common.Encoder(NARROW, 6, "VAE"), common.Decoder(6, NARROW)))
    encoder, decoder, args = common.load_model(
        finished, lambda args: (common.Encoder(args.hidden_dims, 5, "VAE"), common.Decoder(5, args.hidden_dims))
    )
    assert not encoder.training and not decoder.training and args.seed == 7
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    monkeypatch.setattr(beta_vae, "Encoder", lambda dims, *rest: common.Encoder([2, *dims[1:]], *rest))
    error = ends(beta_vae.main, ["--resume", run, "--epochs", "3"], capsys)
    assert "argument --resume" in error and "other networks" in error


def test_damaged_and_foreign_checkpoints_are_refused_in_one_line(mnist, tmp_path, capsys):
    train(mnist, tmp_path, epochs=1)
    path = tmp_path / "checkpoint.pt"
    good = path.read_bytes()
    foreign = {**torch.load(path), "more": Path("of a class that weights_only refuses")}
    for content in (foreign, [1, 2], {"epoch": 1}, good[:-1000], b""):
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            torch.save(content, path)
        assert "checkpoint.pt is damaged, or no checkpoint" in ends(vae.main, ["--resume", tmp_path], capsys)
        with pytest.raises(ValueError, match="damaged"):
            common.load_model(tmp_path)


def test_a_full_disk_leaves_the_last_checkpoint_and_one_line(tmp_path, monkeypatch, capsys, figures):
    resource = pytest.importorskip("resource", reason="needs a limit on file sizes")
    vae.main([*QUICK, "--epochs", "1", "--out", str(tmp_path / "run")])
    before = {file.name: file.read_bytes() for file in (tmp_path / "run").iterdir()}
    limits, train_model = resource.getrlimit(resource.RLIMIT_FSIZE), common.train_model

    def on_a_full_disk(*args):
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))  # no file beyond 10 kB
        return train_model(*args)

    monkeypatch.setattr(common, "train_model", on_a_full_disk)
    try:
        error = ends(vae.main, ["--resume", tmp_path / "run", "--epochs", "2"], capsys, code=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "File too large" in error and f"--resume {tmp_path}" in error
    after = {file.name: file.read_bytes() for file in (tmp_path / "run").iterdir()}
    assert {name for name in before if before[name] != after[name]} == {"history.csv"} and set(after) == set(before)


def test_divergence_names_the_term_and_keeps_the_last_good_checkpoint(mnist, tmp_path, capsys, figures):
    def diverging_loss(encoder, decoder, x):
        loss, terms = vae.vae_loss(encoder, decoder, x)
        good = not (tmp_path / "checkpoint.pt").exists()  # fine in the first epoch
        return loss, {**terms, "kl": terms["kl"] * (1 if good else math.nan)}

    with pytest.raises(FloatingPointError, match="train_kl is nan in epoch 2: try an --lr below 0.003"):
        train(mnist, tmp_path, loss_fn=diverging_loss)
    encoder, decoder, _ = common.load_model(tmp_path)
    assert read_checkpoint(tmp_path)["epoch"] == 1 and weights(encoder, decoder).isfinite().all()
    error = ends(vae.main, [*QUICK, "--lr", "1e30", "--out", tmp_path / "run"], capsys, code=1)
    assert "in epoch 1: try an --lr below 1e+30" in error and not (tmp_path / "run" / "checkpoint.pt").exists()


@pytest.fixture
def archives(tmp_path, monkeypatch):
    """A copy of the four archives, and a mirror that serves what is put into a dictionary."""
    served, raw = {}, Path(shutil.copytree(ROOT / "data" / "MNIST" / "raw", tmp_path / "MNIST" / "raw"))

    def download(url, root, filename, md5):
        name = url.rsplit("/", 1)[-1]
        if name not in served:
            raise RuntimeError("no network")
        (Path(root) / filename).write_bytes(served[name])

    monkeypatch.setattr(common, "download_url", download)
    return raw, served


@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing"])
def test_a_bad_archive_is_named_and_neither_trained_on_nor_replaced(damage, archives, capsys):
    raw, served = archives
    archive, root = raw / "train-images-idx3-ubyte.gz", raw.parents[1]
    content = bytearray(archive.read_bytes())
    if damage != "missing":
        # To be had, but the file may be another data set's.
        served |= {file.name: file.read_bytes() for file in raw.glob("t*")}
    content[5_000_000] ^= damage == "flipped"
    archive.unlink()
    if damage != "missing":
        archive.write_bytes(content[:-5] if damage == "truncated" else content)
    (raw / "t10k-labels-idx1-ubyte.gz").unlink()
    before = {file.name: file.read_bytes() for file in raw.iterdir()}
    error = ends(vae.main, ["--data", root, "--out", root / "out"], capsys)
    assert archive.name in error and str(raw) in error and "t10k-labels" in error and "t10k-images" not in error
    assert not (root / "out").exists() and {file.name: file.read_bytes() for file in raw.iterdir()} == before


def test_a_missing_archive_is_downloaded_and_kept_and_unpacked_files_are_never_read(archives):
    raw, served = archives
    labels = raw / "t10k-labels-idx1-ubyte.gz"
    content = served[labels.name] = labels.read_bytes()
    labels.unlink()
    for archive in raw.glob("*.gz"):
        archive.with_suffix("").write_bytes(bytes([0, 0, 8, 3, 0, 0, 234, 96, 0, 0, 0, 28, 0, 0, 0, 28]))
    data = common.load_data(raw.parents[1])
    assert labels.read_bytes() == content and len(data.train_images) == 60_000 and len(data.test_images) == 10_000
    assert data.train_images.float().mean().item() == pytest.approx(33.3184, abs=1e-3)
    assert data.train_labels[:5].tolist() == [5, 0, 4, 1, 9] and data.test_labels[:3].tolist() == [7, 2, 1]


@pytest.mark.parametrize("name", ["FashionMNIST", "KMNIST"])
def test_another_data_set_is_read_from_its_folder_and_named(name, tmp_path, monkeypatch, capsys, figures):
    raw, resources = tmp_path / name / "raw", []
    raw.mkdir(parents=True)
    monkeypatch.setattr(common, "download_url", Mock(side_effect=RuntimeError("no network")))
    flags = [*QUICK[:-1], str(tmp_path), "--dataset", name, "--epochs=1", "--limit=128"]
    error = ends(vae.main, [*flags, "--out", tmp_path / "run"], capsys)
    assert all(archive in error for archive, _ in getattr(torchvision.datasets, name).resources)
    images = {"train": torch.randint(256, (200, 28, 28)), "t10k": torch.randint(256, (50, 28, 28))}
    for split, pixels in images.items():
        for kind, values in (("images-idx3", pixels), ("labels-idx1", torch.arange(len(pixels)) % 10)):
            header = bytes([0, 0, 8, values.dim()]) + b"".join(size.to_bytes(4, "big") for size in values.shape)
            path = raw / f"{split}-{kind}-ubyte.gz"
            path.write_bytes(gzip.compress(header + bytes(values.flatten().tolist())))
            resources.append((path.name, hashlib.md5(path.read_bytes()).hexdigest()))
    monkeypatch.setattr(getattr(torchvision.datasets, name), "resources", resources)
    data = common.load_data(tmp_path, name)
    assert torch.equal(data.train_images[:, 0], images["train"].byte()) and data.name == name
    assert torch.equal(data.test_labels, torch.arange(50) % 10)
    run = vae.main([*flags, "--out", str(tmp_path / "run")])
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["args"]["dataset"] == name
    assert metrics["protocol"]["split"] == f"trained on 128 {name} images, tested on 50"


def test_two_runs_never_get_one_folder(tmp_path, monkeypatch, capsys):
    fcntl = pytest.importorskip("fcntl", reason="needs locks")
    monkeypatch.chdir(tmp_path)
    with ThreadPoolExecutor(8) as pool:
        folders = list(pool.map(common.free_folder, [Path("runs/vae")] * 8))
    assert set(folders) == {Path("runs/vae"), *(Path(f"runs/vae-{i}") for i in range(2, 9))}
    with common.lock_folder(folders[0]):
        for flag in ("--out", "--resume"):
            assert f"another run writes to {folders[0]} now" in ends(vae.main, [*QUICK, flag, folders[0]], capsys)
        monkeypatch.setattr(fcntl, "flock", Mock(side_effect=OSError("No locks available")))  # as on Lustre and NFS
        common.lock_folder(folders[0]).close()


def test_pixels_are_a_copy_and_images_that_are_not_bytes_are_refused():
    images = torch.full((2, 1, 28, 28), 255, dtype=torch.uint8)
    assert common.to_pixels(images).max() == 1 and images.min() == 255
    with pytest.raises(TypeError, match="must be uint8"):
        common.encode(build()[0], images.float())


def test_a_term_that_would_hide_the_loss_is_refused(mnist, tmp_path):
    with pytest.raises(TypeError, match="'loss'"):
        train(mnist, tmp_path, loss_fn=lambda *call: (vae.vae_loss(*call)[0], {"loss": torch.zeros(())}))


def test_layers_that_differ_in_training_are_switched_and_codes_are_ordinary_tensors(mnist, tmp_path):
    models = build()
    models[0].model.append(torch.nn.Sequential(torch.nn.BatchNorm2d(NARROW[3]), torch.nn.Dropout(0.5)))
    train(mnist, tmp_path, models=models)
    assert models[0].model[-1][0].num_batches_tracked == 16, "of two epochs of 8 steps, and of no test batch"
    assert not (models[0].training or models[1].training)
    calls = iter(range(100))

    def interrupted(encoder, decoder, x):
        if torch.is_grad_enabled() and next(calls) == 12:  # in the second epoch
            raise KeyboardInterrupt
        return vae.vae_loss(encoder, decoder, x)

    *pair, history = train(mnist, tmp_path, loss_fn=interrupted)
    assert len(history) == 1 and not (pair[0].training or pair[1].training)
    assert torch.equal(weights(*pair), weights(*common.load_model(tmp_path)[:2])), "those of the last checkpoint"
    models[0].train()
    mu, logvar = common.encode(models[0], mnist.test_images)
    assert torch.equal(mu, common.encode(models[0], mnist.test_images)[0]), "no dropout"
    torch.testing.assert_close(mu[:1], common.encode(models[0], mnist.test_images[:1])[0])  # nor its neighbours
    assert common.encode(build("AE")[0], mnist.test_images)[1] is None
    (mu @ torch.ones(5, 1, requires_grad=True)).sum().backward()  # a probe of one's own


# ---- Refusals -----------------------------------------------------------------------------------

WHOLE = ["0", "-1", "1.5", "two", "nan", "inf", "1e3", "99999999999999999999"]
REAL = ["0", "-1", "nan", "inf", "-inf", "1e999", "two"]
VALUES = {
    **dict.fromkeys(["--epochs", "--latent-dim", "--iw-samples"], WHOLE),
    **dict.fromkeys(["--lr", "--beta"], REAL),
    "--batch-size": [*WHOLE, "257 --limit 256"],
    "--limit": [*WHOLE, "60001"],
    "--seed": WHOLE[1:],
    "--warmup": [*REAL[1:], "2"],
    "--capacity": REAL[1:],
    "--hidden-dims": ["4 8 8", "4 8 8 0", "4 8 8 nan", "4 8 8 16 32"],
    "--precision": ["fp16"],
    "--recon": ["l1"],
    "--dataset": ["EMNIST"],
    "--device": "gpu xpu hpu cuda:99 cuda:-1 cuda:x meta cuda:99999999999999999999".split(),
    "--out": ["file", "file/below", "occupied", "occupied --data file", "x" * 300],  # before the data is looked at
    "--resume": ["file", "file/below", "x" * 300],
    **dict.fromkeys(["--no-such-flag", "--epoch"], ["3"]),
}
NOT_THEIRS = [(vae, "--beta"), (vae, "--warmup"), (ae, "--capacity"), (ae, "--binarize"), (ae, "--iw-samples")]


@pytest.mark.parametrize(
    "script, flag, values",
    [(beta_vae, *item) for item in VALUES.items()] + [(script, flag, ["3"]) for script, flag in NOT_THEIRS],
    ids=lambda value: getattr(value, "__name__", value if isinstance(value, str) else ""),
)
def test_bad_input_is_refused_in_one_line_and_writes_nothing(script, flag, values, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("a file")
    (tmp_path / "occupied").mkdir()
    (tmp_path / "occupied" / "metrics.json").write_text("{}")
    before = sorted(tmp_path.rglob("*"))
    for value in values:
        error = ends(script.main, [*QUICK, "--limit=256", "--epochs=1", flag, *value.split()], capsys)
        assert flag in error or "unrecognized arguments: 32" in error  # a fifth width
        assert sorted(tmp_path.rglob("*")) == before


def test_a_bound_of_what_is_no_likelihood_is_refused_with_what_would_be_one(capsys):
    error = ends(vae.main, [*QUICK, "--epochs=1", "--iw-samples=3"], capsys)
    assert "--binarize" in error and "--recon mse" in error


# ---- Tools --------------------------------------------------------------------------------------


def make_run(folder, script="vae.py", seed=0, pixels="grey", kind="Bernoulli", epochs=2, k=None, test=(), **args):
    """A metrics.json as a finished run leaves it, with numbers of one's own (None: none); returns the folder."""
    test = {"recon": 70.0, "loss": 70.0, "probe_accuracy": 0.9, "mse": 0.01, "kl_per_latent": [1.0], **dict(test)}
    split = f"trained on 60000 {args.get('dataset', 'MNIST')} images, tested on 10000"
    run = {
        "args": {"epochs": max(2, epochs), "seed": seed, "iw_samples": k, "latent_dim": 5, "out": str(folder), **args},
        "protocol": {"pixels": pixels, "recon": kind, "split": split, "K": k},
        "test": {"pca_mse": 0.02, "pca_probe_accuracy": 0.8, "pixel_probe_accuracy": 0.86, **test},
        "train": {"epochs": epochs},
        "environment": {"script": script, "precision": "float32"},
    }
    folder.mkdir()
    (folder / "metrics.json").write_text(json.dumps(run))
    return str(folder)


def compare(runs, out, capsys):
    """The lines of each table that compare_runs prints of `runs`, and comparison.tex."""
    compare_runs.main([*runs, "--out", str(out)])
    tables = re.split(r"\n\n(?=\w)", capsys.readouterr().out)
    return [part.splitlines() for part in tables], (out / "comparison.tex").read_text()


def test_runs_that_differ_in_seed_alone_are_one_row_and_other_protocols_have_tables_of_their_own(tmp_path, capsys):
    runs = [make_run(tmp_path / f"ae{seed}", "ae.py", seed, test={"recon": 50 + seed}) for seed in (0, 1, 2)]
    for beta, seed, kl in ((4.0, 0, 10), (4.0, 1, 13), (8.0, 0, 6)):
        terms = {"recon": 80, "kl": kl, "elbo": -80 - kl, "active_units": 3}
        runs.append(make_run(tmp_path / f"b{beta}-{seed}", "beta_vae.py", seed, beta=beta, test=terms))
    for seed, k in enumerate((500, 500, 50)):  # which is no setting of the model
        test = {**terms, "iw_bound": -k / 10}
        runs.append(make_run(tmp_path / f"k{seed}", seed=seed, k=k, pixels="binarised", test=test))
    ((_, _, *grey), (_, _, *binarised)), tex = compare(runs, tmp_path, capsys)
    assert grey[0] == "| model | seeds | recon | KL | ELBO | active units | probe % | 1000 MSE |" and len(grey) == 7
    assert grey[2].startswith("| AE | 3 | 51.00 ± 1.00 |  |  |")
    assert grey[3].startswith("| beta-VAE, beta = 4 | 2 | 80.00 ± 0.00 | 11.50 ± 2.12 | -91.50 ± 2.12 | 3.0 ± 0.0 |")
    assert grey[4].startswith("| beta-VAE, beta = 8 | 1 | 80.00 | 6.00 | -86.00 | 3.0 | 90.0 | 10.00 |")
    assert grey[5] == "| PCA, 5 components |  |  |  |  |  | 80.0 | 20.00 |"
    assert "ELBO | IW bound, K = 50 | IW bound, K = 500 | active" in binarised[0]
    assert binarised[2].startswith("| VAE | 3 |") and "| -5.00 (n = 1) | -50.00 ± 0.00 (n = 2) |" in binarised[2]
    assert r"$\beta$-VAE, $\beta$ = 4 & $80.00$ & $11.50$ & $-91.50$" in tex and tex.count(r"\toprule") == 2
    assert r"\scriptsize $n=2$ & \scriptsize $\pm$0.00 & \scriptsize $\pm$2.12 & \scriptsize $\pm$2.12" in tex
    assert imread(tmp_path / "rate_distortion.png").std() > 0.01


def test_a_run_whose_recipe_changed_on_the_way_is_a_row_of_its_own_but_old_and_moved_runs_are_not(tmp_path, capsys):
    runs = [make_run(tmp_path / "old"), make_run(tmp_path / "ae", "ae.py", epochs=3, dataset="MNIST")]
    for seed, name in enumerate(("device", "epochs", "lr", "precision"), 1):
        changed = {"changes": [{"after_epoch": 1, "name": name, "from": 8, "to": 9}], "dataset": "MNIST", "c": None}
        runs.append(make_run(tmp_path / name, seed=seed, **changed))
    (table,), _ = compare(runs, tmp_path, capsys)
    rows = [f"VAE, {name} 8 to 9 after epoch 1 | 1 " for name in ("epochs", "epochs 2, lr", "epochs 2, precision")]
    assert [line[2:].split("| 70")[0] for line in table[4:9]] == ["AE, epochs 3 | 1 ", "VAE, epochs 2 | 2 ", *rows]


def test_any_script_and_data_set_is_compared_by_the_terms_it_has(tmp_path, capsys, monkeypatch):
    panels, bare = [], dict.fromkeys("recon probe_accuracy mse pca_mse pca_probe_accuracy pixel_probe_accuracy".split())
    monkeypatch.setattr("matplotlib.axes.Axes.legend", lambda ax, **_: panels.append(ax))
    runs = [make_run(tmp_path / "w", "wae.py", test={"mmd_z": 0.5, "m": math.nan}, free=[1, 2], dataset="MNIST")]
    runs += [make_run(tmp_path / "i", "iwae.py", test=bare | {"kl": 3.0}), make_run(tmp_path / "v", test={"kl": 2.0})]
    runs += [make_run(tmp_path / "f", dataset="FashionMNIST", test=bare | {"kl": 2.0, "recon": 9.0})]
    (mnist, fashion), tex = compare(runs, tmp_path, capsys)
    assert mnist[0].startswith("MNIST, grey") and "10000. Recon, KL, ELBO and bound in nats per image." in mnist[0]
    rows = ["| VAE | 1 | 70.00 | 2.00 | 90.0 | 10.00 |  |", "| iwae | 1 |  | 3.00 |  |  |  |"]
    assert mnist[2] == "| model | seeds | recon | KL | probe % | 1000 MSE | mmd_z |" and mnist[4:6] == rows
    assert mnist[6] == "| wae | 1 | 70.00 |  | 90.0 | 10.00 | 0.5000 |"
    assert fashion[0].startswith("FashionMNIST, grey") and fashion[4:] == ["| VAE | 1 | 9.00 | 2.00 |", ""]
    drawn = [(ax.get_xlabel().split("\n")[1][:6], ax.get_legend_handles_labels()[1]) for ax in panels]
    assert drawn == [("MNIST,", ["VAE"]), ("Fashio", ["VAE"])]
    assert r"\caption{FashionMNIST, grey pixels;" in tex and r" & \scriptsize mmd\_z \\" in tex


def test_the_table_and_the_figure_fit_a_column_of_a_paper_and_the_caption_says_what_they_show(tmp_path, capsys):
    terms = {"recon": 97.97, "kl": 10.05, "elbo": -108.02, "active_units": 10, "mse": 0.01446, "iw_bound": -104.5}
    test = {"pixels": "binarised", "k": 500, "test": terms}
    runs = [make_run(tmp_path / f"v{seed}", seed=seed, **test) for seed in range(3)]
    for i, beta in enumerate((0.5, 0.5, 0.5, 4.0, 4.0, 4.0, 8.0, 8.0, 8.0)):
        runs.append(make_run(tmp_path / f"b{i}", "beta_vae.py", i % 3, beta=beta, latent_dim=9, **test))
    test["test"] = terms | {"total_correlation": 1.0}
    runs += [make_run(tmp_path / f"m{i}", "my_vae.py", hidden_dims=[i] * 4, bits=f"{i}%", **test) for i in (128, 256)]
    runs += [make_run(tmp_path / kind, kind=kind) for kind in ("Bernoulli: bce", "Gaussian")]
    _, tex = compare(runs, tmp_path, capsys)
    assert "{MNIST, binarised pixels; Bernoulli; trained on 60000 MNIST images, tested on 10000; 2 epochs; mean" in tex
    assert r"over $n$ seeds; $\mathcal{L}_{K}$: bound of $K$ importance samples; AU: active units; probe: acc" in tex
    assert re.findall(r"\\label{(.*)}", tex) == ["tab:mnist-binarised", "tab:mnist-grey", "tab:mnist-grey-2"]
    pdf = (tmp_path / "rate_distortion.pdf").read_bytes()
    assert float(re.search(rb"/MediaBox \[ ?0 0 ([\d.]+)", pdf)[1]) == 3.25 * 72
    if not shutil.which("pdflatex"):
        pytest.skip("no pdflatex to typeset the table with")
    page = r"\documentclass{article}\usepackage{booktabs,graphicx}\textwidth=3.25in\begin{document}"
    page += r"\input{comparison}\noindent\includegraphics{rate_distortion}\end{document}"
    (tmp_path / "page.tex").write_text(page)
    subprocess.run(["pdflatex", "-interaction=batchmode", "page"], cwd=tmp_path, check=True, capture_output=True)
    overfull = re.findall(r"Overfull \\hbox \(([\d.]+)pt", (tmp_path / "page.log").read_text())
    assert all(float(points) <= 1 for points in overfull)


def test_all_that_are_no_finished_runs_are_named_in_one_line(tmp_path, capsys):
    good, stopped = make_run(tmp_path / "good"), make_run(tmp_path / "stopped", epochs=1, seed=5)
    twice, damaged = make_run(tmp_path / "twice", k=50, dataset="MNIST"), make_run(tmp_path / "damaged", seed=6)
    (tmp_path / "damaged" / "metrics.json").write_text('{"args": {}}')
    line = ends(compare_runs.main, [good, stopped, damaged, tmp_path / "none", twice, "--out", tmp_path], capsys)
    assert all(f"{tmp_path / bad} (" in line for bad in ("stopped", "damaged", "none")) and f"{good} (" not in line
    assert f"{twice} (the same run as {good}, seed and all)" in line
    assert not (tmp_path / "comparison.tex").exists()


def test_the_benchmark_times_both_loops_and_whole_programs_and_sums_nats_rightly(mnist, monkeypatch, capsys, figures):
    args = common.make_parser(vae.__file__, vae.__doc__).parse_args([*QUICK, "--limit=190", "--batch-size=189"])
    encoder, decoder = networks = benchmark.build_classic(args, "cpu")
    encoder[3].bias.data[20:] = 2  # a q whose samples are far from its mean
    *rates, loss = benchmark.textbook(args, torch.device("cpu"), lambda *_: networks, benchmark.classic_loss)
    x = common.to_pixels(mnist.test_images[:190]).flatten(1)  # the last batch is one image, a 1, which costs less
    mu, logvar = encoder(x).chunk(2, dim=1)
    q = Normal(mu, (0.5 * logvar).exp())
    elbo = Bernoulli(decoder(q.sample()), validate_args=False).log_prob(x).sum() - kl_divergence(q, Normal(0, 1)).sum()
    assert loss == pytest.approx(-elbo.item() / 190, abs=5)  # of 206: from q's mean 240, the mean of batches' means 177
    assert min(*rates, *benchmark.textbook(args, x.device)[:2], *benchmark.ours(args, x.device)) > 0
    assert benchmark.count_flops(args) == 2_018_560
    monkeypatch.setattr(subprocess, "run", lambda argv, **_: vae.main(argv[2:]))  # in this process
    assert 100 < benchmark.whole_run([*QUICK, "--epochs=1"]) < 400
    assert f"python vae.py {benchmark.QUICK_LOOK}\n" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert "gpu cannot be used" in ends(benchmark.main, ["--device", "gpu"], capsys)
