"""Tests of ae.py, vae.py, beta_vae.py, common.py and tools: science, training, figures, runs, refusals."""

import argparse
import csv
import importlib.util
import inspect
import itertools
import json
import math
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import matplotlib
import pytest
import torch
import torch.nn.functional as F
import torchvision
from matplotlib.image import imread
from torch.distributions import Bernoulli, MultivariateNormal, Normal, kl_divergence

import ae
import beta_vae
import common
import vae

ROOT = Path(__file__).parent
# The networks here are small: on a busy machine, threads that wait for each other would only slow them down.
torch.set_num_threads(1)
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
NARROW = [4, 8, 8, 16]  # channels of a model that trains in milliseconds
SMALL = "--latent-dim 5 --hidden-dims 4 8 8 16 --batch-size 64 --device cpu".split()
SCRIPTS = [ae, vae, beta_vae]
by_name = {"ids": lambda value: getattr(value, "__name__", None)}


@pytest.fixture(scope="module")
def mnist():
    """The first 512 training and 300 test images: no multiple of the evaluation's batch."""
    data = common.load_data(ROOT / "data", limit=512)
    return data._replace(test_images=data.test_images[:300], test_labels=data.test_labels[:300])


@pytest.fixture
def small(mnist, monkeypatch):
    """Makes every run load the few images of `mnist`, whatever its flags say; returns them."""
    monkeypatch.setattr(common, "load_data", lambda *_: mnist)
    return mnist


@pytest.fixture
def figures(monkeypatch):
    """The figures that a run saves, by file name, without the time that rendering takes."""
    saved = {}
    monkeypatch.setattr(
        common.Figure, "savefig", lambda figure, path: saved.update({Path(path).name: figure})
    )
    return saved


def build(model_name="VAE", seed=0):
    torch.manual_seed(seed)
    return common.Encoder(NARROW, 5, model_name), common.Decoder(5, NARROW)


def weights(*networks):
    return torch.cat([tensor.flatten() for network in networks for tensor in network.state_dict().values()])


def ends(main, flags, capsys, code=2):
    """The one line on stderr with which a command ends."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main([str(flag) for flag in flags])
    error = capsys.readouterr().err
    assert stop.value.code == code and error.count("\n") == 1
    return error


# ---- Science: identities, each against an independent reference -----------------------------------
def test_kl_equals_torch_distributions():
    mu, logvar = 2 * torch.randn(64, 7), 2 * torch.randn(64, 7)
    reference = kl_divergence(Normal(mu, (0.5 * logvar).exp()), Normal(0, 1)).mean(dim=0)
    torch.testing.assert_close(common.kl_per_latent(mu, logvar), reference)


def test_reconstruction_terms_equal_float64_references_even_in_saturation():
    x, logits = torch.rand(16, 1, 28, 28), 3 * torch.randn(16, 1, 28, 28)
    p, gray, constant = logits.double().sigmoid(), x.double(), 784 / 2 * math.log(2 * math.pi)
    close = partial(torch.testing.assert_close, rtol=1e-5, atol=0, check_dtype=False)
    cross_entropy = -(gray * p.log() + (1 - gray) * (1 - p).log()).sum(dim=(1, 2, 3))
    close(common.reconstruction_term(logits, x), cross_entropy)
    bernoulli = -Bernoulli(logits=logits).log_prob(x.round()).sum(dim=(1, 2, 3))
    close(common.reconstruction_term(logits, x.round(), "bce"), bernoulli)
    gaussian = -Normal(p, 1).log_prob(gray).sum(dim=(1, 2, 3)) - constant
    close(common.reconstruction_term(logits, x, "mse"), gaussian)
    with pytest.raises(ValueError, match="'l1'"):
        common.reconstruction_term(logits, x, "l1")
    saturated = torch.full((1, 1, 28, 28), 200.0)
    close(common.reconstruction_term(saturated, torch.zeros_like(saturated)), torch.tensor([200.0 * 784]))


@pytest.mark.parametrize("kind", ["bce", "mse"])
def test_losses_compose_as_the_papers_say(kind, mnist):
    x, (encoder, decoder) = common.to_pixels(mnist.train_images[:32]), build()
    torch.manual_seed(1)
    mu, logvar, z = encoder(x)
    recon = common.reconstruction_term(decoder.logits(z), x, kind).sum() / 32
    kl = kl_divergence(Normal(mu, (0.5 * logvar).exp()), Normal(0, 1)).sum() / 32
    terms, beta_loss = {"recon": recon, "kl": kl, "elbo": -(recon + kl)}, beta_vae.beta_vae_loss
    objectives = {vae.vae_loss: recon + kl, partial(beta_loss, beta=4): recon + 4 * kl}
    for capacity in (25, 0):  # above and below the KL
        objectives[partial(beta_loss, beta=3, capacity=capacity)] = recon + 3 * (kl - capacity).abs()
    for loss, objective in objectives.items():
        torch.manual_seed(1)  # the same z
        torch.testing.assert_close(loss(encoder, decoder, x, kind=kind), (objective, terms))
    torch.testing.assert_close(ae.ae_loss(lambda x: z, decoder, x, kind), (recon, {"recon": recon}))


def test_beta_and_capacity_grow_linearly_also_within_an_epoch():
    args = argparse.Namespace(beta=4.0, warmup=2.0, capacity=30.0, epochs=6)
    for epochs, beta, capacity in [(0, 0, 0), (0.25, 0.5, 2.5), (1.5, 3, 15), (2.5, 4, 25), (6, 4, 30)]:
        assert beta_vae.schedule(args, epochs) == pytest.approx({"beta": beta, "capacity": capacity})
    args.warmup, args.capacity = 0.0, None
    assert beta_vae.schedule(args, 0) == {"beta": 4, "capacity": None}


def test_the_bound_is_log_p_for_the_posterior_and_rises_to_it_for_a_poor_q(mnist):
    torch.manual_seed(0)  # p(x|z) = N(Wz + 1/2, I) for 100 pixels x, z ~ N(0, I): all in closed form
    center = (..., slice(9, 19), slice(9, 19))
    x = common.to_pixels(mnist.test_images)[center].flatten(1).double() - 0.5  # (N, 100)
    directions = torch.linalg.qr(torch.randn(100, 4, dtype=torch.float64)).Q  # orthogonal: q is diagonal
    weight = directions * torch.tensor([0.9, 0.8, 0.7, 0.6])
    covariance = weight @ weight.T + torch.eye(100)
    log_p = MultivariateNormal(torch.zeros_like(x[0]), covariance).log_prob(x).mean().item()
    variance = 1 / (1 + weight.square().sum(dim=0))  # p(z|x) = N(S W^T (x - 1/2), S), S = (I + W^T W)^-1
    mu, logvar = (x @ weight * variance).float(), variance.log().float().expand(len(x), 4)

    def log_likelihood(x, z):
        return Normal(z.double() @ weight.T + 0.5, 1).log_prob(x[center].flatten(1)).sum(dim=1)

    bound = partial(common.importance_weighted_bound, log_likelihood, images=mnist.test_images)
    for k in (1, 7):  # all weights p(x|z) p(z) / q(z|x) are p(x): no wrong sign, constant or axis hides
        assert bound(mu, logvar, k=k) == pytest.approx(log_p, abs=2e-4)
    poor = mu + 0.7, logvar + 0.7
    q, posterior = (Normal(mean, (0.5 * log).exp()) for mean, log in (poor, (mu, logvar)))
    elbo = log_p - kl_divergence(q, posterior).sum(dim=1).mean().item()
    assert bound(*poor, k=1) == pytest.approx(elbo, abs=0.4)
    assert elbo + 0.5 < bound(*poor, k=3) < log_p - 0.2
    assert bound(*poor, k=500) == pytest.approx(log_p, abs=0.02)


def ridge_accuracy(train_codes, train_labels, codes, labels):
    """The probe by least squares: its penalty as further rows of data, sqrt(penalty) I w = 0."""
    classes, (n, d), mean = train_labels.unique(), train_codes.shape, train_codes.mean(dim=0)
    onehot = (train_labels[:, None] == classes).double()
    rows = torch.cat([train_codes - mean, (1e-3 * n) ** 0.5 * torch.eye(d)])
    answers = torch.cat([onehot - onehot.mean(dim=0), torch.zeros(d, len(classes))])
    scores = (codes - mean) @ torch.linalg.lstsq(rows, answers).solution + onehot.mean(dim=0)
    return (classes[scores.argmax(dim=1)] == labels).double().mean().item()


@pytest.mark.parametrize("n, components", [(1, 0), (12, 11), (19, 18), (192, 20), (256, 20), (512, 20)])
def test_metrics_equal_those_of_svd_and_least_squares_in_float64(n, components, mnist):
    torch.manual_seed(0)  # labels 1 to 10; 12 training images lack three of them
    train_labels, labels = mnist.train_labels[:n] + 1, mnist.test_labels + 1
    data = mnist._replace(train_images=mnist.train_images[:n], train_labels=train_labels, test_labels=labels)
    train_x, x = (images.flatten(1).double() / 255 for images in (data.train_images, data.test_images))
    scales = torch.logspace(-2, 0, 20).double()  # the penalty decides how much the first latents count
    train_mu, mu = (0.1 * part @ torch.randn(784, 20).double() * scales for part in (train_x, x))
    decoder, mean = common.Decoder(20, NARROW).double(), train_x.mean(dim=0)
    expected = {"mse": (decoder(mu).flatten(1) - x).square().mean().item()}
    codes = {"probe": (train_mu, mu), "pixel_probe": (train_x, x)}
    if components:
        directions = torch.linalg.svd(train_x - mean, full_matrices=False).Vh[:components].T
        codes["pca_probe"] = (train_x - mean) @ directions, (x - mean) @ directions
        error = (x - mean) - (x - mean) @ directions @ directions.T
        expected |= {"pca_components": components, "pca_mse": error.square().mean().item()}
    for name, (train_part, part) in codes.items():
        expected[f"{name}_accuracy"] = ridge_accuracy(train_part, train_labels, part, labels)
    assert common.representation_metrics(decoder, data, train_mu, mu) == pytest.approx(expected)


def test_linear_discriminants_solve_the_generalized_eigenvalue_problem():
    torch.manual_seed(0)
    labels = torch.arange(10).repeat(60)
    codes = torch.randn(10, 4)[labels] + torch.randn(600, 4) @ torch.randn(4, 4)
    by_class = codes.view(60, 10, 4)  # (images, classes, latent_dim)
    within = (by_class - by_class.mean(dim=0)).flatten(0, 1).T.cov(correction=0)
    values, vectors = torch.linalg.eig(torch.linalg.solve(within, by_class.mean(dim=0).T.cov(correction=0)))
    reference = vectors.real[:, values.real.argsort(descending=True)[:2]]
    directions = common.linear_discriminants(codes, 2 * labels + 5)
    assert torch.cosine_similarity(directions, reference, dim=0).abs().min() > 0.9999
    dead = torch.cat([codes, torch.zeros(600, 1)], dim=1)
    for singular in (codes[:1], codes[:3], codes[:, :1], dead):
        found = common.linear_discriminants(singular, labels[: len(singular)])
        assert found.shape == (singular.shape[1], 2) and found.isfinite().all()
    torch.testing.assert_close(found[:4].abs(), directions.abs(), rtol=1e-3, atol=0)  # of `dead`


def test_samples_of_the_ae_have_the_mean_and_covariance_of_its_codes():
    torch.manual_seed(0)
    codes = torch.randn(50, 3) @ torch.tensor([[2.0, 0, 0], [1, 1, 0], [0, 0, 0]]) + 5  # one latent is dead
    samples = ae.sample_codes(codes, 100_000)
    torch.testing.assert_close(samples.mean(dim=0), codes.mean(dim=0), atol=0.03, rtol=0)
    torch.testing.assert_close(samples.T.cov(), codes.T.cov(), atol=0.02, rtol=0.01)
    torch.testing.assert_close(ae.sample_codes(codes[:1], 4), codes[:1].expand(4, 3))  # of a single code


def plain_networks(encoder, decoder, x):
    """(mu, logvar, logits of mu), each of plain functions with the weights of the two networks."""
    w = dict(encoder.named_parameters()) | dict(decoder.named_parameters())
    h = F.pad(x, (2, 2, 2, 2))
    for i in (0, 2, 4, 6):
        h = F.leaky_relu(F.conv2d(h, w[f"model.{i}.weight"], w[f"model.{i}.bias"], 2, 1), 0.01)
    mu, logvar = (F.linear(h.flatten(1), w[f"{n}.weight"], w[f"{n}.bias"]) for n in ("fc_mean", "fc_logvar"))
    h = F.linear(mu, w["input_layer.weight"], w["input_layer.bias"]).view(len(x), -1, 4, 4)
    for i in (0, 2, 4):
        h = F.leaky_relu(F.conv_transpose2d(h, w[f"decoder.{i}.weight"], w[f"decoder.{i}.bias"], 2, 1), 0.01)
    h = F.conv_transpose2d(h, w["last_layer.0.weight"], w["last_layer.0.bias"], 1, 1)
    return mu, logvar, h[..., 2:30, 2:30]  # without what the padding added


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 0.05)])
def test_both_networks_equal_plain_functions_in_output_and_gradients(dtype, tolerance):
    (encoder, decoder), x = build(), torch.rand(16, 1, 28, 28)
    with torch.autocast("cpu", enabled=dtype == torch.bfloat16):
        mu, logvar, _ = encoder(x)
        outputs, references = [mu, logvar, decoder.logits(mu)], [*plain_networks(encoder, decoder, x)]
        assert torch.equal(decoder(mu), outputs[2].sigmoid()) and outputs[2].dtype == dtype
    for tensors in (outputs, references):
        total = sum(tensor.float().square().sum() for tensor in tensors)
        tensors += torch.autograd.grad(total, [*encoder.parameters(), *decoder.parameters()])
    for tensor, reference in zip(outputs, references):
        assert (tensor - reference).abs().max() <= tolerance * reference.abs().max()


def test_reparameterize_has_the_mean_variance_and_gradients_of_a_gaussian():
    mu, logvar = torch.tensor([[-3.0, 0.0, 2.0], [-2.0, 0.0, 1.0]]).repeat_interleave(200_000, 0).chunk(2)
    mu, logvar = mu.requires_grad_(), logvar.requires_grad_()
    z = build()[0].reparameterize(mu, logvar)
    torch.testing.assert_close(z.mean(dim=0), mu[0], atol=0.02, rtol=0)
    torch.testing.assert_close(z.var(dim=0), logvar[0].exp(), atol=0, rtol=0.02)
    of_mu, of_logvar = torch.autograd.grad(z.sum(), [mu, logvar])
    torch.testing.assert_close((of_mu, of_logvar), (torch.ones_like(mu), 0.5 * (z - mu)))


def test_binarized_test_images_are_drawn_once_with_seed_0(mnist):
    binarized = common.load_data(ROOT / "data", limit=512, binarize=True)
    draws = torch.rand(10_000, 28, 28, generator=torch.Generator().manual_seed(0))[:300, None]
    assert torch.equal(binarized.test_images[:300] / 255, (draws < mnist.test_images / 255).float())
    assert torch.equal(binarized.train_images, mnist.train_images), "they are drawn in training"


@pytest.mark.parametrize("batch", [7, 250, 1000])
def test_evaluate_is_the_mean_over_images_and_labels_however_batched(batch, mnist, monkeypatch):
    def loss(one, two, three, x, label, scale):
        assert not any([torch.is_grad_enabled(), one.training, two.training, three.training])
        return scale * (x.mean(dim=(1, 2, 3)) * label).mean(), {"label": label.float().mean()}

    monkeypatch.setattr(common, "EVAL_BATCH", batch)
    images, labels = mnist.test_images, mnist.test_labels
    found = common.evaluate(loss, (*build(), torch.nn.Dropout()), images, labels, scale=3)
    product = (images / 255).mean(dim=(1, 2, 3)) * labels
    assert found == pytest.approx({"loss": 3 * product.mean().item(), "label": labels.float().mean().item()})


def test_encode_takes_mu_a_pair_or_a_triple_in_evaluation_mode(mnist):
    single, pair, triple = build("AE")[0], build()[0], build()[0]
    mu, logvar, _ = triple(mnist.test_images / 255)
    forward = pair.forward
    pair.forward = lambda x: forward(x)[:2]
    for encoder, expected in ((single, (mu, None)), (pair, (mu, logvar)), (triple, (mu, logvar))):
        encoder.model.append(torch.nn.Dropout())  # does nothing in evaluation mode
        torch.testing.assert_close(common.encode(encoder, mnist.test_images), expected)


# ---- Training ------------------------------------------------------------------------------------
def train(data, out, *flags, networks=None):
    """The networks and the history of two epochs of vae.train_model."""
    args = vae.parse_args([*SMALL, "--epochs=2", "--precision=fp32", *flags])
    out.mkdir(exist_ok=True)
    networks = networks or build()
    return networks, vae.train_model(*networks, data, args, out)


DEFAULTS = {"epochs": 20, "batch_size": 128, "lr": 3e-3, "latent_dim": 20, "hidden_dims": [32, 64, 128, 256]}
DEFAULTS |= {"seed": 0, "limit": 60_000, "recon": "bce", "dataset": "MNIST", "device": "auto"}
DEFAULTS |= {"precision": "auto", "data": None, "out": None, "resume": None}
OF_VAE = {"binarize": False, "iw_samples": None}
OF_BETA_VAE = {**OF_VAE, "beta": 4, "warmup": 0, "capacity": None}


@pytest.mark.parametrize("script, more", [(ae, {}), (vae, OF_VAE), (beta_vae, OF_BETA_VAE)], **by_name)
def test_the_defaults_are_those_of_the_published_numbers(script, more):
    assert vars(script.parse_args([])) == {**DEFAULTS, **more, "script": f"{script.__name__}.py"}


RUNS = [(ae, ae.ae_loss, ""), (vae, vae.vae_loss, "--binarize")]
RUNS += [(beta_vae, beta_vae.beta_vae_loss, "--binarize --beta 3 --warmup 2 --capacity 200")]


@pytest.mark.parametrize("script, loss, flags", RUNS, **by_name)
def test_a_run_equals_a_plain_training_loop(script, loss, flags, small, figures, tmp_path):
    flags += " --recon mse --seed 5 --epochs 3 --batch-size 40 --lr 1e-2 --precision fp32 --out"
    out = script.main([*SMALL, *flags.split(), str(tmp_path / "run")])
    torch.manual_seed(5 * 1_000_003)
    networks = common.Encoder(NARROW, 5, "AE" if script is ae else "VAE"), common.Decoder(5, NARROW)
    images, test_images = small.train_images / 255, small.test_images / 255
    networks[1].last_layer[0].bias.data.fill_((images.mean() / (1 - images.mean())).log())
    parameters = [parameter for network in networks for parameter in network.parameters()]
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.95), weight_decay=0.1)

    def add_terms(x, epochs, prefix, share):
        """Adds a share of the terms of images x to the row of this epoch."""
        beta, capacity = 3 * min(1, epochs / 2), 200 * min(1, epochs / 1.5)
        settings = {"beta": beta, "capacity": capacity} if script is beta_vae else {}
        value, terms = loss(*networks, x, kind="mse", **settings)
        for name, term in {"loss": value, **terms}.items():
            row[prefix + name] = row.get(prefix + name, 0) + share * term.item()
        return value

    history, step = common.read_checkpoint(out)["history"], 0
    for epoch in (1, 2, 3):
        row = {"epoch": epoch}
        torch.manual_seed(5 * 1_000_003 + epoch)
        for batch in torch.randperm(512).split(40)[:12]:  # not the 32 images that are left
            row["lr"] = 1e-2 * min((step + 1) / 3, (36 - step) / 33)  # warm-up over 3 of 36 steps
            optimizer.param_groups[0]["lr"] = row["lr"]
            x = images[batch] if script is ae else torch.bernoulli(images[batch])
            optimizer.zero_grad()
            add_terms(x, step / 12, "train_", 1 / 12).backward()
            optimizer.step()
            step += 1
        torch.manual_seed(0)
        for x in test_images.split(250):
            add_terms(x, epoch, "test_", len(x) / 300)
        assert history[epoch - 1].pop("seconds") > 0 and history[epoch - 1] == pytest.approx(row, rel=1e-4)
    trained = common.load_model(out)[:2]
    torch.testing.assert_close(weights(*trained), weights(*networks), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_shows_images_per_second_and_time_left(terminal, mnist, tmp_path, monkeypatch, capsys):
    def loss(encoder, decoder, x, kind):
        calls.append(x)
        return 0 * decoder.last_layer[0].bias.sum() + 3.14159, {"kl": torch.tensor(2.0)}

    calls = []
    monkeypatch.setattr(vae, "vae_loss", loss)
    monkeypatch.setattr(common.time, "perf_counter", lambda: len(calls) ** 2 / 100)  # slower and slower
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    train(mnist, tmp_path, "--batch-size=5")  # 102 steps per epoch, and two batches of test images
    lines = [
        "epoch 1/2  10 images/s  77 s left",  # 50 steps in 25 s, 154 are left
        "epoch 1/2  5 images/s  104 s left",  # 100 steps in 100 s, 104 are left
        "epoch 1/2  104 s left  test loss 3.14 kl 2.00\n",  # 102 steps in 104 s, 102 are left
        "epoch 2/2  2 images/s  134 s left",  # 50 steps in 129 s, 52 are left
        "epoch 2/2  2 images/s  6 s left",
        "epoch 2/2  0 s left  test loss 3.14 kl 2.00\n",
    ]
    expected = "".join(f"\r\x1b[K{line}" for line in lines) if terminal else lines[2] + lines[5]
    assert capsys.readouterr().out == expected


def test_terms_that_do_not_fit_80_columns_are_cut_between_words(capsys):
    terms = {f"test_{name}": 123.456 for name in ("loss", "recon", "kl", "elbo", "discriminator")}
    common.print_epoch([{"epoch": 1, **terms, "seconds": 2.0}], argparse.Namespace(epochs=100))
    line = "epoch 1/100  198 s left  test loss 123.46 recon 123.46 kl 123.46 elbo 123.46\n"
    assert capsys.readouterr().out == line


def test_learning_rate_warms_up_over_a_tenth_and_falls_to_zero():
    rates = [common.learning_rate(step, 1000, 2e-3) for step in range(1001)]
    straight = [*torch.linspace(2e-5, 2e-3, 100).tolist(), *torch.linspace(2e-3, 0, 901).tolist()]
    assert rates == pytest.approx(straight, abs=1e-9)
    assert common.learning_rate(0, 1, 2e-3) == 2e-3  # a run of one step


def test_one_seed_gives_the_same_run_to_the_bit_and_another_does_not(mnist, tmp_path):
    seeds = {"first": 3, "again": 3, "other": 4}
    first, again, other = (weights(*train(mnist, tmp_path / run, f"--seed={seeds[run]}")[0]) for run in seeds)
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_bfloat16_trains_to_nearly_the_loss_of_float32_with_float32_weights(mnist, tmp_path):
    runs = [train(mnist, tmp_path / precision, f"--precision={precision}") for precision in ("bf16", "fp32")]
    low, full = (history[-1]["test_loss"] for _, history in runs)
    assert low != full and low == pytest.approx(full, rel=0.02)
    assert weights(*runs[0][0]).dtype == torch.float32


@pytest.mark.parametrize("kind", ["cpu", "mps"])
def test_float32_stays_exact_and_layouts_are_channels_last_but_on_mps(kind, monkeypatch):
    before, layer = torch.get_float32_matmul_precision(), torch.nn.Conv2d(2, 2, 3)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    torch.set_float32_matmul_precision("high")
    common.set_up_device(torch.device(kind), layer, layer)
    found = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision(before)
    assert found == ("highest", False)
    assert layer.weight.is_contiguous(memory_format=torch.channels_last) == (kind == "cpu")


@pytest.mark.parametrize("ratio, capability, found", [(1.49, (7, 5), "fp32"), (1.51, (8, 0), "bf16")])
def test_bfloat16_is_used_where_it_is_half_again_as_fast(ratio, capability, found, monkeypatch):
    def repeat(*_, globals, **__):
        threads.append(torch.get_num_threads())
        return [9, {torch.float32: ratio, torch.bfloat16: 1}[globals["a"].dtype], 9]  # the fastest counts

    threads = []
    monkeypatch.setattr(common.timeit, "repeat", repeat)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    torch.set_num_threads(2)
    measured = common.pick_precision(torch.device("cpu"))
    threads.append(torch.get_num_threads())
    torch.set_num_threads(1)
    assert measured == (found, "bfloat16 products are 1.5 times as fast") and threads == [1, 1, 2]
    assert common.pick_precision(torch.device("cuda"))[0] == found


def test_layers_are_switched_between_training_and_evaluation(mnist, tmp_path):
    (encoder, decoder), modes = build(), {True: set(), False: set()}
    encoder.model.append(torch.nn.BatchNorm2d(NARROW[3]))
    decoder.decoder.append(torch.nn.Dropout())
    for layer in (encoder.model[-1], decoder.decoder[-1]):
        layer.register_forward_hook(lambda layer, *_: modes[torch.is_grad_enabled()].add(layer.training))
    train(mnist, tmp_path, networks=(encoder, decoder))
    assert modes == {True: {True}, False: {False}} and not encoder.training and not decoder.training


def test_divergence_names_term_and_epoch_and_keeps_the_last_checkpoint(mnist, tmp_path, monkeypatch):
    factors = iter([1] * 17 + [math.inf] * 3)  # 8 training and 2 test batches per epoch: 18 is the last step
    monkeypatch.setattr(vae, "kl_per_latent", lambda *codes: common.kl_per_latent(*codes) * next(factors))
    with pytest.raises(FloatingPointError, match="train_kl is inf in epoch 2"):
        train(mnist, tmp_path)
    checkpoint = common.read_checkpoint(tmp_path)
    assert [row["epoch"] for row in checkpoint["history"]] == [1]
    assert all(tensor.isfinite().all() for tensor in checkpoint["encoder"].values())


def test_a_term_named_loss_is_refused():
    with pytest.raises(TypeError, match="loss"):
        common.Meter(1, 1, None).add(torch.ones(()), {"loss": torch.ones(())})


# ---- Shared text ---------------------------------------------------------------------------------
# How those lines begin that may differ from vae.py: in ae.py (loss, binarize, KL, bound, samples) ...
IN_AE = r"parser\.description|bound|if args\.binarize|x = torch\.bernoulli|loss, terms =|encoder = Encoder"
IN_AE += r"|test = common\.(evaluate|representation_metrics)\(|# Training draws|fixed =|mu, |train_mu, _ ="
IN_AE += r"|test\[|labels =|z =|title =|common\.plot_(kl_per_dimension|traversals|manifold)\("
IN_AE += r"|if args\.(latent_dim|iw_samples)|def log_likelihood|return -recon|common\.save_metrics\("
# ... and in beta_vae.py (loss and beta)
IN_BETA_VAE = r"parser\.description|objective|epochs =|capacity =|settings =|networks =|loss, terms ="
IN_BETA_VAE += r"|test = common\.evaluate\(|labels \|?="


@pytest.mark.parametrize("name", ["parse_args", "train_model", "main"])
@pytest.mark.parametrize("script, may_differ", [(ae, IN_AE), (beta_vae, IN_BETA_VAE)], ids=["ae", "beta_vae"])
def test_scripts_are_the_same_text_where_their_models_do_not_differ(script, may_differ, name):
    def shared(module):
        text = inspect.getsource(getattr(module, name)).splitlines()
        return [line for line in text if line and not re.match(rf" *({may_differ})", line)]

    assert shared(script) == shared(vae) and len(shared(vae)) > 10


# ---- Figures: what they draw -----------------------------------------------------------------------


def spell(z):
    """A decoder whose images spell their codes."""
    return torch.nn.functional.pad(z, (0, 784 - z.shape[1])).view(-1, 1, 28, 28)


@pytest.fixture
def calls(figures, monkeypatch):
    """What functions of common.py were last called with, by argument; plot_grid under the figure's name."""
    given = {}

    def record(function, *args, **settings):
        arguments = inspect.signature(function).bind(*args, **settings).arguments
        given[arguments.get("name", function.__name__)] = arguments
        return function(*args, **settings)

    for name in dir(common):
        if name.startswith(("plot_", "representation_", "importance_")):
            monkeypatch.setattr(common, name, partial(record, getattr(common, name)))
    return given


@pytest.mark.parametrize("digits, pairs", [(range(10), 5), ([0, 1], 1), ([3, 5, 8], 1), ([7], 1)])
def test_reconstructions_and_interpolations_show_what_their_labels_name(digits, pairs, mnist, calls):
    kept = torch.isin(mnist.test_labels, torch.tensor(digits))
    images, labels = mnist.test_images[kept], mnist.test_labels[kept] + 1  # labels need not start at 0
    data, mu = mnist._replace(test_images=images, test_labels=labels), torch.randn(len(labels), 5)
    first = [labels.tolist().index(digit + 1) for digit in digits]
    common.plot_reconstructions(spell, mu, data, "out")
    shown = dict(zip(calls["reconstructions"]["row_labels"], calls["reconstructions"]["images"]))
    expected = {"input": common.to_pixels(images[first])[:, 0], "reconstruction": spell(mu[first])[:, 0]}
    torch.testing.assert_close(shown, expected, rtol=0, atol=0)
    common.plot_interpolations(spell, mu, data, "out")
    grid, codes = calls["interpolations"], mu[first] if len(first) > 1 else mu[:2]
    shares = torch.tensor([float(label) for label in grid["column_labels"]])[:, None]
    assert shares.min() == 0 and shares.max() == 1 and "second" in grid["xlabel"]
    z = torch.lerp(codes[: 2 * pairs : 2, None], codes[1 : 2 * pairs : 2, None], shares)
    torch.testing.assert_close(grid["images"].flatten(2)[..., :5], z)


def test_traversals_and_manifold_move_the_latents_that_their_labels_name(mnist, calls):
    mu, logvar = 3 * torch.rand(12) * torch.randn(300, 12), torch.randn(300, 12)
    common.plot_traversals(spell, mu, logvar, mnist, "out")
    grid, (kl, order) = calls["traversals"], common.kl_per_latent(mu, logvar).sort(descending=True)
    moved, values = torch.nn.functional.one_hot(order[:10], 12).bool()[:, None], torch.arange(-3.0, 4)
    assert torch.equal(grid["images"].flatten(2)[..., :12], torch.where(moved, values[:, None], mu[0]))
    assert [float(label) for label in grid["column_labels"]] == values.tolist()
    numbers = [re.findall(r"[\d.]+", label) for label in grid["row_labels"]]
    assert numbers == [[f"{latent}", f"{nats:.1f}"] for latent, nats in zip(order[:10], kl)]
    assert grid["xlabel"].startswith("value") and grid["ylabel"].startswith("latent")
    common.plot_manifold(spell, mnist, "out")
    grid, quantiles = calls["manifold"], torch.special.ndtri(torch.arange(0.025, 1, 0.05))
    right_and_up = torch.stack(torch.meshgrid(quantiles, quantiles.flip(0), indexing="xy"), dim=2)
    torch.testing.assert_close(grid["images"].flatten(2)[..., :2], right_and_up)
    assert grid["xlabel"].startswith("$z_0$") and grid["ylabel"].startswith("$z_1$")


def test_a_grid_is_true_to_its_images_and_labels_and_only_its_png_has_a_title(monkeypatch):
    (images, labels), saved = (0.2 + 0.6 * torch.rand(2, 3, 28, 28), list("abcde")), []
    monkeypatch.setattr(common.Figure, "savefig", lambda fig, _: saved.append((fig, fig.axes[0].get_title())))
    common.plot_grid(images, "out", "grid", "of what", labels[:2], labels[2:], "across", "down")
    (figure, pdf_title), (_, png_title) = saved
    (ax,), (drawn,) = figure.axes, figure.axes[0].images
    assert (drawn.get_array() == torch.cat([torch.cat([*row], dim=1) for row in images]).numpy()).all()
    assert drawn.origin == "upper" and ax.yaxis_inverted() and not ax.xaxis_inverted()
    assert (drawn.get_clim(), drawn.get_interpolation(), drawn.cmap.name) == ((0, 1), "none", "gray_r")
    assert [label.get_text() for label in (*ax.get_yticklabels(), *ax.get_xticklabels())] == labels
    assert [tick // 28 for tick in (*ax.get_yticks(), *ax.get_xticks())] == [0, 1, 0, 1, 2]
    assert (ax.get_xlabel(), ax.get_ylabel(), pdf_title, png_title) == ("across", "down", "", "of what")


@pytest.mark.parametrize("latents, names", [(2, ["mu_0", "mu_1"]), (5, ["first", "second"])])
def test_codes_classes_colors_legend_and_axes_of_the_latent_space_agree(latents, names, mnist, figures):
    mnist = mnist._replace(test_labels=mnist.test_labels + 3)  # labels need not be 0 to 9
    train_mu, mu = torch.randn(512, latents) + mnist.train_labels[:, None], torch.randn(300, latents)
    common.plot_latent_space(train_mu, mu, mnist, "out")
    directions = common.linear_discriminants(train_mu, mnist.train_labels)
    points = mu if latents == 2 else (mu - train_mu.mean(dim=0)) @ directions
    ax, (legend,) = figures["latent_space.pdf"].axes[0], figures["latent_space.pdf"].legends
    assert ax.collections[0].get_offsets().data == pytest.approx(points.numpy(), abs=1e-4)
    assert names[0] in ax.get_xlabel() and names[1] in ax.get_ylabel()
    colors = ax.collections[0].get_facecolors()
    assert len({*map(tuple, colors)}) == len(ax.texts) == len(legend.get_texts()) == 10
    for label, text, name, handle in zip(range(3, 13), ax.texts, legend.get_texts(), legend.legend_handles):
        own = mnist.test_labels == label
        assert text.get_text() == name.get_text() == str(label)
        assert (colors[own] == handle.get_facecolor()).all()
        assert text.get_position() == pytest.approx(points[own].median(dim=0).values.tolist(), abs=1e-4)


def test_kl_bars_fall_above_the_numbers_of_their_latents_and_the_title_is_their_sum(mnist, figures):
    mu, logvar = torch.randn(300, 64) * torch.rand(64), torch.zeros(300, 64)
    common.plot_kl_per_dimension(mu, logvar, mnist, "out")
    kl, ax = common.kl_per_latent(mu, logvar), figures["kl_per_dimension.png"].axes[0]
    heights, latents = (
        [bar.get_height() for bar in ax.patches],
        [int(t.get_text()) for t in ax.get_xticklabels()],
    )
    assert heights == sorted(kl.tolist(), reverse=True) and f" {kl.sum():.1f} nats" in ax.get_title()
    assert len(latents) > 20 and [heights[tick] for tick in ax.get_xticks()] == kl[latents].tolist()


def test_loss_curves_draw_all_epochs_and_only_the_first_tenth_may_leave_the_panel(mnist, figures):
    names = ["train_kl", "test_kl", "train_heat", "test_heat"]
    history = [{"epoch": i, **{name: top / i for top, name in enumerate(names, 3)}} for i in range(1, 21)]
    common.plot_loss_curves(history, {"kl": "KL", "none": "not there", "heat": "own"}, mnist, "out")
    axes = figures["loss_curves.pdf"].axes
    lines = [(line, name) for ax, name in zip(axes, ["kl", "heat"]) for line in ax.lines]
    drawn = {f"{line.get_label()}_{name}": [*zip(*line.get_data())] for line, name in lines}
    assert drawn == {name: [(row["epoch"], row[name]) for row in history] for name in names}
    low, high = axes[0].get_ylim()
    assert low < 3 / 20 and 4 / 3 < high < 3 / 2  # the lowest of all; the highest of epochs 3 and 2
    assert [ax.get_ylabel() for ax in axes] == ["KL", "own"]
    common.plot_loss_curves([{"epoch": 1, "train_loss": 2.0, "test_loss": 3.0}], {}, mnist, "out")
    assert all(tick.is_integer() for tick in figures["loss_curves.pdf"].axes[0].get_xticks())


def test_figures_do_not_depend_on_the_users_settings(mnist, tmp_path, monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "0")  # the date in a PDF
    user = {"image.origin": "lower", "axes.grid": True, "savefig.bbox": "tight", "text.usetex": True}
    mu, written = torch.randn(300, 2), []
    for settings in ({}, {**user, "axes.facecolor": "black", "pdf.fonttype": 3, "font.size": 30}):
        with matplotlib.rc_context(settings):
            common.plot_latent_space(mu, mu, mnist, tmp_path)
            common.plot_reconstructions(spell, mu, mnist, tmp_path)
        written.append(files(tmp_path))
    assert written[0] == written[1] and len(written[0]) == 4


# ---- Scripts: what they hand to common.py ----------------------------------------------------------

LABELS = {ae: ["reconstruction"], vae: ["$-$ELBO", "reconstruction", "KL"]}  # of the loss curves
LABELS[beta_vae] = ["objective, $\\beta$ = 4", "ELBO", "reconstruction", "KL"]
CURVES = {ae: ["recon"], vae: ["loss", "recon", "kl"], beta_vae: ["loss", "elbo", "recon", "kl"]}


@pytest.mark.parametrize("script", SCRIPTS, **by_name)
def test_a_script_hands_the_right_codes_to_each_figure(script, small, calls, monkeypatch, tmp_path):
    to_mu = torch.randn(784, 5) * torch.tensor([1, 0.3, 0.1, 0.001, 0])  # only three latents vary
    pixels = partial(lambda images: common.to_pixels(images).flatten(1))
    monkeypatch.setattr(common, "encode", lambda _, x: (pixels(x) @ to_mu, pixels(x)[:, 200:205]))
    flags = [] if script is ae else "--binarize --recon mse --iw-samples 3".split()
    out = script.main([*SMALL, "--epochs=1", *flags, "--out", str(tmp_path / "run")])
    train_images = small.train_images if script is ae else common.binarize_once(small.train_images)
    (train_mu, _), (mu, logvar) = (common.encode(None, x) for x in (train_images, small.test_images))
    right = {"train_mu": train_mu, "mu": mu, "logvar": logvar, "k": 3}
    given = [(name, argument) for name in calls for argument in calls[name].keys() & right.keys()]
    torch.testing.assert_close([calls[name][key] for name, key in given], [right[key] for _, key in given])
    assert torch.equal(calls["representation_metrics"]["data"].train_images, train_images)
    labels = dict(zip(CURVES[script], [f"{label} (nats)" for label in LABELS[script]]))
    assert calls["plot_loss_curves"]["labels"] == labels
    decoder = common.load_model(out)[1]
    torch.manual_seed(common.EVAL_SEED)  # whatever the random state of a run, new or resumed
    z = ae.sample_codes(train_mu, 100) if script is ae else torch.randn(100, 5)
    torch.testing.assert_close(calls["samples"]["images"], common.decode_grid(decoder, z.view(10, 10, 5)))
    if script is not ae:
        test = json.loads((out / "metrics.json").read_text())["test"]
        assert test["kl_per_latent"] == pytest.approx(common.kl_per_latent(mu, logvar).tolist())
        assert test["active_units"] == test["iw_samples"] == 3
        images = common.to_pixels(small.test_images[:100])
        reference = -common.reconstruction_term(decoder.logits(z), images, "mse")
        log_likelihood = calls["importance_weighted_bound"]["log_likelihood"]
        torch.testing.assert_close(log_likelihood(images, z), reference)


# ---- Whole runs, each in a process of its own, on the real test images -----------------------------

FIGURES = ["reconstructions", "samples", "interpolations", "loss_curves", "latent_space"]
OF_LATENTS = [*FIGURES, "traversals", "kl_per_dimension"]
WHOLE_RUNS = {  # flags, figures, and what the loss is given at the end
    ae: ("--recon mse --precision fp32", FIGURES, {"kind": "mse"}),
    vae: ("--binarize --iw-samples 3 --precision bf16", OF_LATENTS, {}),
    beta_vae: ("--capacity 5 --latent-dim 2", [*OF_LATENTS, "manifold"], {"beta": 4, "capacity": 5}),
}
of_each_run = pytest.mark.parametrize("script", WHOLE_RUNS, **by_name)


@pytest.fixture(scope="module")
def whole_runs(tmp_path_factory):
    """Waits for the run of a script and returns its folder and process; two run at a time."""
    folder = tmp_path_factory.mktemp("whole")
    shared = [*SMALL, *"--epochs 2 --limit 500 --seed 7 --data".split(), ROOT / "data"]

    def run(script):
        argv = [sys.executable, ROOT / f"{script.__name__}.py", *shared, *WHOLE_RUNS[script][0].split()]
        process = subprocess.run(argv, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True)
        return folder / "runs" / script.__name__, process

    with ThreadPoolExecutor(2) as pool:
        runs = {script: pool.submit(run, script) for script in WHOLE_RUNS}
        yield lambda script: runs[script].result()


@of_each_run
def test_a_run_leaves_the_files_of_its_model_with_figures_that_fit_a_column(script, whole_runs):
    out, process = whole_runs(script)
    assert (process.returncode, process.stderr) == (0, ""), process.stderr
    precision = {ae: r"fp32 \(as set\)", vae: r"bf16 \(as set\)"}.get(script, r"(fp32|bf16) \(.* as fast\)")
    where = re.escape(str(Path("runs", script.__name__)))
    assert re.match(rf"cpu, {precision}, seed 7, writing to {where}\n", process.stdout)
    figures = {f"{name}.{kind}" for name in WHOLE_RUNS[script][1] for kind in ("png", "pdf")}
    assert files(out).keys() == figures | {"history.csv", "metrics.json", "checkpoint.pt"}
    for pdf in out.glob("*.pdf"):
        image = imread(pdf.with_suffix(".png"))
        edges = image[0], image[-1], image[:, 0], image[:, -1]
        assert image.std() > 0.01, f"{pdf.stem} is blank"
        assert all(edge.min() == 1 for edge in edges), f"{pdf.stem} is cut off"
        assert float(re.search(rb"/MediaBox \[ ?0 0 ([\d.]+)", pdf.read_bytes())[1]) == 3.25 * 72  # points
        assert b"/Type3" not in pdf.read_bytes()


@of_each_run
def test_history_and_metrics_say_how_a_run_was_trained(script, whole_runs):
    out, _ = whole_runs(script)
    rows, metrics = rows_of(out), json.loads((out / "metrics.json").read_text())
    terms = ["loss", "recon"] if script is ae else ["loss", "recon", "kl", "elbo"]
    names = [f"{split}_{term}" for split in ("train", "test") for term in terms]
    assert len(rows) == 2 and list(rows[0]) == ["epoch", "lr", *names, "seconds"]
    assert all(math.isfinite(value) for row in rows for value in row.values())
    assert metrics.keys() == {"args", "test", "train", "environment"}
    encoder, decoder, args = common.load_model(out)
    given = {"seed": 7, "batch_size": 64, "limit": 500, "epochs": 2, "hidden_dims": NARROW, "device": "cpu"}
    assert {**vars(args), **given, "script": f"{script.__name__}.py"} == metrics["args"]
    seconds = sum(row["seconds"] for row in rows)
    rate = 2 * 7 * 64 / seconds  # two epochs of seven full batches
    assert metrics["train"] == pytest.approx({"epochs": 2, "seconds": seconds, "images_per_second": rate})
    unused = weights(encoder.fc_logvar).numel() if script is ae else 0
    environment = {"device": "cpu", "threads": 1, "precision": args.precision, "train_images": 500}
    environment |= {"test_images": 10_000, "parameters": weights(encoder, decoder).numel() - unused}
    environment |= {"python": platform.python_version(), "torch": torch.__version__}
    assert metrics["environment"] == {**environment, "torchvision": torchvision.__version__}


@of_each_run
def test_the_test_numbers_of_a_run_are_those_of_the_model_that_it_saved(script, whole_runs):
    out, _ = whole_runs(script)
    (encoder, decoder, _), binarize = common.load_model(out), script is vae
    assert not encoder.training and not decoder.training
    data = common.load_data(ROOT / "data", limit=500, binarize=binarize)
    if binarize:
        data = data._replace(train_images=common.binarize_once(data.train_images))
    (train_mu, _), (mu, _) = (common.encode(encoder, x) for x in (data.train_images, data.test_images))
    loss, settings = getattr(script, f"{script.__name__}_loss"), WHOLE_RUNS[script][2]
    again = common.evaluate(loss, (encoder, decoder), data.test_images, **settings)
    again |= common.representation_metrics(decoder, data, train_mu, mu)
    test = json.loads((out / "metrics.json").read_text())["test"]
    assert {name: test[name] for name in again} == pytest.approx(again, rel=1e-4, abs=5e-4)


# ---- Kill and resume -------------------------------------------------------------------------------

RUN = [*SMALL, *"--recon mse --capacity 0 --seed 7 --lr 1e-3 --limit 512 --epochs 2 --precision bf16".split()]


def at_call(number, act, function):
    """`function`, but at one of its calls `act()` comes first."""
    numbers = itertools.count(1)
    return lambda *args, **settings: (next(numbers) == number and act(), function(*args, **settings))[1]


def ctrl_c():
    signal.raise_signal(signal.SIGINT)


def files(folder):
    """The content of each file in a folder by its name; names that start with a dot do not count."""
    return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.name[0] != "."}


def rows_of(out):
    table = csv.DictReader((out / "history.csv").read_text().splitlines())
    return [{name: float(text) for name, text in row.items()} for row in table]


def result(out):
    """A run's weights, history (as in history.csv) without its seconds, and names of files."""
    history = common.read_checkpoint(out)["history"]
    assert rows_of(out) == history
    networks = common.load_model(out)[:2]
    return weights(*networks).tolist(), [{**row, "seconds": 0} for row in history], files(out).keys()


@pytest.fixture(scope="module")
def finished(mnist, tmp_path_factory):
    """The folder of a finished run of two epochs, not to be changed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "load_data", lambda *_: mnist)
        patch.setattr(common.Figure, "savefig", lambda *_: None)
        return beta_vae.main([*RUN, "--out", str(tmp_path_factory.mktemp("finished") / "run")])


# Each epoch has eight steps, and puts two files into place: checkpoint.pt, then history.csv.
STOPS = {
    "killed before the checkpoint": (os, "replace", 3, sys.exit, SystemExit, 1),
    "killed before history.csv": (os, "replace", 4, sys.exit, SystemExit, 2),
    "a full disk": (Path, "write_bytes", 3, Mock(side_effect=OSError), OSError, 1),
    "Ctrl-C twice in an epoch": (common.Meter, "add", 12, lambda: (ctrl_c(), ctrl_c()), KeyboardInterrupt, 1),
}


@pytest.mark.parametrize("owner, name, call, act, error, epochs", STOPS.values(), ids=STOPS)
def test_a_run_that_broke_off_and_is_resumed_equals_one_that_did_not(
    owner, name, call, act, error, epochs, finished, small, figures, monkeypatch, tmp_path
):
    flags, path = [*RUN, "--resume", str(tmp_path / "run")], tmp_path / "run" / "checkpoint.pt"
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, at_call(call, act, getattr(owner, name)))
        pytest.raises(error, beta_vae.main, flags)
    checkpoint = common.read_checkpoint(path.parent)
    assert len(checkpoint["history"]) == epochs and not figures
    for state in checkpoint["optimizer"]["state"].values():  # in the layout in which MPS saves averages
        state.update(
            {key: value.clone(memory_format=torch.contiguous_format) for key, value in state.items()}
        )
    torch.save(checkpoint, path)
    assert result(beta_vae.main(flags)) == result(finished)


def test_a_process_that_got_sigkill_is_resumed_to_the_same_weights(finished, small, figures, tmp_path):
    flags = [*RUN, "--data", str(ROOT / "data"), "--resume", str(tmp_path / "run")]
    process = subprocess.Popen([sys.executable, ROOT / "beta_vae.py", *flags], env=ENVIRONMENT)
    while process.poll() is None and not (tmp_path / "run" / "checkpoint.pt").exists():
        time.sleep(0.01)
    process.kill()
    assert process.wait() != 0
    assert result(beta_vae.main(flags))[0] == result(finished)[0]


@pytest.mark.parametrize("step, code", [(3, 130), (12, 0)], ids=["in the first epoch", "in the last"])
def test_ctrl_c_ends_a_run_after_its_epoch_with_figures_and_a_command(
    step, code, finished, small, figures, monkeypatch, tmp_path, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["some where/beta_vae.py"])
    monkeypatch.setattr(common.Meter, "add", at_call(step, ctrl_c, common.Meter.add))
    with pytest.raises(SystemExit) as stop:
        beta_vae.main([*RUN, "--iw-samples=2", "--out=a run"])
        sys.exit(0)
    assert stop.value.code == code and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    output, error = capsys.readouterr()
    assert error.strip() == "stopping after this epoch; Ctrl-C again quits now" and "samples.png" in figures
    command = "resume with: python 'some where/beta_vae.py' --resume 'a run'\n"
    assert (
        output.endswith(command) == ("iw_bound" not in Path("a run/metrics.json").read_text()) == (code > 0)
    )
    assert result(beta_vae.main(["--resume=a run"])) == result(finished)


def test_ctrl_c_is_left_alone_in_a_thread_and_where_someone_else_handles_it():
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(lambda: [*common.epochs_left([], 2)]).result() == [1, 2]
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    handlers = [signal.getsignal(signal.SIGINT) for _ in common.epochs_left([], 2)]
    assert handlers == [signal.SIG_IGN] * 2 and signal.signal(signal.SIGINT, before) is signal.SIG_IGN


OTHERS = {"seed": "8", "precision": "fp32", "dataset": "KMNIST", "limit": "511", "latent_dim": "6"}
OTHERS |= {"hidden_dims": "4 8 8 8", "recon": "bce", "epochs": "3", "batch_size": "32", "lr": "2e-3"}
OTHERS |= {"beta": "3", "warmup": "1", "capacity": "1", "binarize": ""}


def test_a_resumed_run_has_its_own_flags_and_refuses_almost_all_others_by_name(finished, tmp_path, capsys):
    run, checkpoint = Path(shutil.copytree(finished, tmp_path / "run")), common.read_checkpoint(finished)
    stored = {**checkpoint["args"], "out": None, "resume": str(run)}
    del checkpoint["args"]["dataset"]  # which then counts as its default
    torch.save(checkpoint, run / "checkpoint.pt")
    before, resume = files(run), ["--resume", str(run)]
    may_differ = {"device": "auto", "data": "elsewhere", "iw_samples": 2}
    others = "--device=auto --data=elsewhere --iw-samples=2 --precision=auto".split()
    assert vars(beta_vae.parse_args([*resume, *RUN])) == vars(beta_vae.parse_args(resume)) == stored
    assert vars(beta_vae.parse_args([*resume, *others])) == {**stored, **may_differ}
    assert stored.keys() - may_differ.keys() - {"out", "resume", "script"} == OTHERS.keys()
    for name, value in OTHERS.items():
        flag = f"--{name.replace('_', '-')}"
        error = ends(beta_vae.main, [*resume, flag, *value.split()], capsys)
        assert f"{flag} is {stored[name]} there; start a new run with {flag}" in error
    assert "is one of beta_vae.py, not of vae.py" in ends(vae.main, resume, capsys)
    assert files(run) == before


def test_metrics_say_what_the_checkpoint_says_and_keep_a_bound(finished, small, figures, tmp_path):
    run, checkpoint = Path(shutil.copytree(finished, tmp_path / "run")), common.read_checkpoint(finished)
    checkpoint["environment"] |= {"device": "another", "threads": 96}
    torch.save(checkpoint, run / "checkpoint.pt")
    beta_vae.main(["--resume", str(run), "--device=auto", "--iw-samples=2"])
    first = json.loads((run / "metrics.json").read_text())
    assert (first["args"], first["environment"]) == (checkpoint["args"], checkpoint["environment"])
    assert first["test"]["iw_samples"] == 2 and "iw_bound" in first["test"]
    beta_vae.main(["--resume", str(run)])
    assert json.loads((run / "metrics.json").read_text()) == first


def test_a_term_wins_over_a_measurement_and_what_is_not_finite_is_left_out(mnist, tmp_path, capsys):
    args, row = argparse.Namespace(precision="fp32", batch_size=64), {"epoch": 1, "seconds": 2.0}
    common.save_checkpoint(tmp_path, [{**row, "test_mse": 3.0}], args, mnist)
    common.save_metrics(tmp_path, {"mse": 0.5, "pca_mse": math.nan, "kl_per_latent": [1.0, math.inf], "k": 1})
    assert json.loads((tmp_path / "metrics.json").read_text())["test"] == {"mse": 3.0, "k": 1}
    assert re.findall(r"(\w+) is not finite", capsys.readouterr().err) == ["pca_mse", "kl_per_latent"]
    common.save_checkpoint(tmp_path, [row, row], args, mnist)
    assert files(tmp_path).keys() == {"checkpoint.pt", "history.csv"}, "the numbers were of fewer epochs"


def test_damaged_and_foreign_checkpoints_are_refused_in_one_line(finished, tmp_path, capsys):
    path, good = tmp_path / "checkpoint.pt", (finished / "checkpoint.pt").read_bytes()
    for foreign in ({"epoch": 1}, [1, 2], Path("of a class that weights_only refuses"), None):
        path.write_bytes(good[:-1000]) if foreign is None else torch.save(foreign, path)
        assert f"--resume: {path} is damaged" in ends(beta_vae.main, ["--resume", tmp_path], capsys)


# ---- Refusals and data -----------------------------------------------------------------------------

REFUSED = [  # flags, and values that each of them refuses
    (
        "--epochs --latent-dim --iw-samples --batch-size --limit",
        "0 -1 1.5 two nan inf 1e3 99999999999999999999",
    ),
    ("--seed", "-1 1.5 two nan inf 1e3 4294967296"),
    ("--lr --beta --warmup --capacity", "-1 nan inf -inf 1e999 two"),
    ("--precision --recon --dataset", "other"),
    ("--device", "gpu xpu hpu cuda:99 cuda:-1 cuda:x meta cuda:99999999999999999999"),
    ("--out --resume", "file file/below occupied " + "x" * 300),
]
COMMANDS = [
    f"{flag}={value}" for flags, values in REFUSED for flag in flags.split() for value in values.split()
]
COMMANDS += "--lr=0 --beta=0 --warmup=2 --limit=60001 --out= --resume= --data= --none=3 --epoch=3".split()
COMMANDS += ["--batch-size=257 --limit=256", "--iw-samples=3", "--hidden-dims 4 8 8", "--hidden-dims 4 8 8 0"]
OTHER_SCRIPTS = [(vae, "--beta=3"), (vae, "--warmup=1"), (ae, "--capacity=3"), (ae, "--binarize")]


def test_bad_input_is_refused_in_one_line_by_name_and_writes_nothing(small, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("a file")
    Path("occupied", "folder").mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    for script, command in [*((beta_vae, command) for command in COMMANDS), *OTHER_SCRIPTS]:
        error = ends(script.main, [*SMALL, "--epochs=1", *command.split()], capsys)
        flag, _, value = command.split()[0].partition("=")
        assert flag in error or (flag in ("--out", "--resume") and value in error), command
        assert sorted(tmp_path.rglob("*")) == before, command


def test_two_runs_never_get_one_folder_and_a_file_named_runs_is_refused(small, tmp_path, monkeypatch, capsys):
    with ThreadPoolExecutor(8) as pool:
        folders = [*pool.map(common.free_folder, [tmp_path / "runs" / "vae"] * 8)]
    assert {path.name for path in folders} == {"vae", *(f"vae-{number}" for number in range(2, 9))}
    monkeypatch.chdir(folders[0])
    Path("runs").write_text("as a link to nowhere would be")
    assert "'runs'" in ends(vae.main, SMALL, capsys)


def test_a_run_asks_for_the_data_that_its_flags_name(mnist, tmp_path, monkeypatch):
    asked, cpu = [], torch.device("cpu")
    monkeypatch.setattr(common, "load_data", lambda *args: asked.append(args) or mnist)
    for variable in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(variable, str(tmp_path))
    flags = "--out=~/x --data=~/y --dataset=KMNIST --limit=77 --binarize".split()
    assert common.start_run(vae.parse_args([*SMALL, *flags]))[1] == tmp_path / "x"
    common.start_run(ae.parse_args([*SMALL, "--out=~/z"]))
    assert asked[0] == (str(tmp_path / "y"), "KMNIST", cpu, 77, True)
    assert asked[1] == (ROOT / "data", "MNIST", cpu, 60_000, False)


def test_data_is_limited_binarized_and_moved_to_the_device():
    data, binary = (common.load_data(ROOT / "data", limit=70, binarize=yes) for yes in (False, True))
    assert data.train_images.shape == (70, 1, 28, 28) and data.test_images.shape == (10_000, 1, 28, 28)
    assert data.train_labels[:5].tolist() == [5, 0, 4, 1, 9] and data.test_labels[:3].tolist() == [7, 2, 1]
    assert torch.equal(binary.test_images, common.binarize_once(data.test_images))
    assert torch.equal(binary.train_images, data.train_images), "which are drawn in training"
    moved = common.load_data(ROOT / "data", device="meta", limit=70)
    assert all(part.is_meta for part in moved[1:]) and len(moved.train_labels) == 70


@pytest.fixture
def archives(tmp_path, monkeypatch):
    """A copy of the archives' folder; what mirrors serve, by address; and what they were asked for."""
    raw, served, asked = tmp_path / "MNIST" / "raw", {}, []
    shutil.copytree(ROOT / "data" / "MNIST" / "raw", raw)

    def download_url(url, root, filename=None, md5=None):
        asked.append((url, md5))
        if url not in served:
            raise RuntimeError(f"nothing at {url}")
        Path(root, filename).write_bytes(served[url])

    monkeypatch.setattr(common, "download_url", download_url)
    return raw, served, asked


@pytest.mark.parametrize("damage", ["truncated", "flipped", "another's"])
def test_a_damaged_archive_is_named_and_neither_trained_on_nor_replaced(damage, archives, capsys):
    raw, _, asked = archives
    archive, labels = raw / "train-images-idx3-ubyte.gz", raw / "t10k-labels-idx1-ubyte.gz"
    flipped = bytearray(archive.read_bytes())
    flipped[5_000_000] ^= 1
    bad = {"truncated": flipped[:5_000_000], "flipped": flipped, "another's": labels.read_bytes()}
    archive.write_bytes(bad[damage])
    labels.unlink()
    before = files(raw)
    error = ends(vae.main, ["--data", raw.parents[1], "--out", raw / "out"], capsys)
    assert f"{archive.name}: damaged" in error and str(raw) in error and labels.name not in error
    assert files(raw) == before and not asked


def test_a_missing_archive_comes_from_the_first_mirror_that_has_it(archives):
    raw, served, asked = archives
    labels, md5 = raw / "t10k-labels-idx1-ubyte.gz", "ec29112dd5afa0611ce80d1b7f02629c"
    first, second = (mirror + labels.name for mirror in torchvision.datasets.MNIST.mirrors[:2])
    content = served[second] = labels.read_bytes()
    labels.unlink()
    for archive in raw.glob("*.gz"):
        archive.with_suffix("").write_bytes(b"unpacked files are never read")
    assert common.load_data(raw.parents[1]).test_labels[:3].tolist() == [7, 2, 1]
    assert asked == [(first, md5), (second, md5)] and labels.read_bytes() == content


@pytest.mark.parametrize("name", ["MNIST", "FashionMNIST", "KMNIST"])
def test_a_failed_download_gives_the_last_mirrors_reason_and_leaves_no_folder(
    name, archives, capsys, tmp_path
):
    flags, source = ["--dataset", name, "--data", tmp_path / "new"], getattr(torchvision.datasets, name)
    error, (archive, _) = ends(vae.main, [*flags, "--out", tmp_path / "out"], capsys), source.resources[0]
    path = tmp_path / "new" / name / "raw" / archive
    assert f"{path} is missing and cannot be downloaded: nothing at {source.mirrors[-1]}{archive}" in error
    assert [path.name for path in tmp_path.iterdir()] == ["MNIST"]


# ---- Copies of a script ----------------------------------------------------------------------------


def copy_of_vae(path, changes):
    """Imports a copy of vae.py, in which some texts are replaced, from `path`."""
    text = (ROOT / "vae.py").read_text(encoding="utf-8")
    for old, new in changes.items():
        assert old in text, f"vae.py has no {old!r}"
        text = text.replace(old, new)
    path.write_text(text, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    return module


def test_the_readmes_own_model_is_recorded_as_itself_and_resumes(small, figures, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    loss = re.search(r"## Your own model.*?```python\n(.*?)```", readme, re.DOTALL)[1]
    changes = {inspect.getsource(vae.vae_loss): loss, "vae_loss": "iwae_loss"}
    iwae = copy_of_vae(tmp_path / "iwae.py", changes)
    with monkeypatch.context() as patch:
        patch.setattr(common, "epochs_left", lambda *_: [1])
        pytest.raises(SystemExit, iwae.main, [*SMALL, "--epochs=2"])
    figures.clear()
    metrics = json.loads((iwae.main(["--resume=runs/iwae"]) / "metrics.json").read_text())
    assert metrics["args"]["script"] == "iwae.py" and metrics["train"]["epochs"] == 2
    assert math.isfinite(metrics["test"]["loss"]) and len(figures) == 2 * len(OF_LATENTS)


def test_a_copy_whose_loss_and_decoder_take_labels_trains_on_two_digits(mnist, tmp_path):
    changes = {'decoder, x, kind="bce"': 'decoder, x, y, kind="bce"'}
    changes["logits(z), x, kind"] = "logits(torch.cat([z, y[:, None]], dim=1)), x, kind"
    changes["decoder, x, kind=args"] = "decoder, x, data.train_labels[batch], kind=args"
    changes["test_images, kind=args"] = "test_images, data.test_labels, kind=args"
    cvae, networks = copy_of_vae(tmp_path / "cvae.py", changes), (build()[0], common.Decoder(6, NARROW))
    train, test = ((labels < 2).nonzero()[:, 0] for labels in (mnist.train_labels, mnist.test_labels))
    images, labels = mnist.test_images[test], mnist.test_labels[test]
    data = common.Data("MNIST", mnist.train_images[train], mnist.train_labels[train], images, labels)
    args = cvae.parse_args([*SMALL, "--epochs=2", "--precision=fp32"])
    history = cvae.train_model(*networks, data, args, tmp_path)
    again, exchanged = (common.evaluate(cvae.vae_loss, networks, images, y) for y in (labels, 1 - labels))
    assert history[-1]["test_recon"] == pytest.approx(again["recon"]) != exchanged["recon"]


def test_a_copy_keeps_the_name_of_its_likelihood_and_refuses_values_that_are_not_plain(
    small, figures, tmp_path, capsys
):
    name, last = "Gaussian, one learned variance", "    return common.parse_args(parser, argv)"
    cache = (
        f'    training.add_argument("--cache", type=Path)\n    parser.set_defaults(recon="{name}")\n{last}'
    )
    copy = copy_of_vae(tmp_path / "own.py", {last: cache, "logits(z), x, kind": 'logits(z), x, "mse"'})
    assert "argument --cache" in ends(copy.main, [*SMALL, "--out", tmp_path / "out", "--cache=x"], capsys)
    assert not (tmp_path / "out").exists()
    copy.main([*SMALL, "--epochs=1", "--out", str(tmp_path / "out")])
    out = copy.main(["--resume", str(tmp_path / "out")])
    assert json.loads((out / "metrics.json").read_text())["args"]["recon"] == name
