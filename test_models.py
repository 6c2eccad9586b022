"""Tests of ae.py, vae.py, beta_vae.py and common.py: science, training, figures, runs, refusals."""

import importlib
import inspect
import json
import math
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
from argparse import ArgumentParser, Namespace
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import matplotlib.image
import numpy
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.distributions import MultivariateNormal, Normal, kl_divergence
from torch.testing import assert_close

import ae
import beta_vae
import common
import vae
from tools import compare_runs

ROOT = Path(__file__).parent
# The networks here are small: on a busy machine, threads that wait for each other would only slow them down.
torch.set_num_threads(1)
NARROW = [4, 8, 8, 16]  # channels of a model that trains in milliseconds
SMALL = "--latent-dim 5 --hidden-dims 4 8 8 16 --batch-size 64 --device cpu --precision fp32".split()
SCRIPTS = [ae, vae, beta_vae]
parametrize = pytest.mark.parametrize
each_script = parametrize("script", SCRIPTS)
each_vae = parametrize("script", [vae, beta_vae])
each_kind = parametrize("kind", ["bce", "mse"])


@pytest.fixture(scope="module")
def mnist():
    """512 training images, and 300 test images, which is no multiple of the evaluation's batch."""
    data = common.load_data(ROOT / "data", limit=512)
    return data._replace(test_images=data.test_images[:300], test_labels=data.test_labels[:300])


@pytest.fixture
def few_images(mnist, monkeypatch):
    """Makes every run use the images of `mnist`, whatever its flags say."""
    monkeypatch.setattr(common, "load_data", lambda *_: mnist)
    return mnist


def remember_figures(patch):
    """From now on, figures are kept by file name, without the time that rendering takes."""
    figures = {}

    def remember(figure, path, **_):
        figures[path.name] = figure

    patch.setattr(common.Figure, "savefig", remember)
    return figures


@pytest.fixture
def saved_figures(monkeypatch):
    return remember_figures(monkeypatch)


def build(model_name="VAE"):
    torch.manual_seed(0)
    return common.Encoder(NARROW, 5, model_name), common.Decoder(5, NARROW)


def all_weights(*networks):
    return torch.cat([tensor.flatten() for network in networks for tensor in network.state_dict().values()])


def train(data, out, *flags):
    """Two epochs of vae.train_model in float32; returns the networks and the history."""
    args = vae.parse_args([*SMALL, "--epochs=2", *flags])
    out.mkdir(exist_ok=True)
    networks = build()
    return networks, vae.train_model(*networks, data, args, out)


def refusal(main, argv, capsys):
    """The one line on stderr with which a command ends, with exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit, match="^2$"):
        main([str(argument) for argument in argv])
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def read_metrics(folder):
    return json.loads(Path(folder, "metrics.json").read_text(encoding="utf-8"))


def visible_files(folder):
    """The content of each file, by name; names that start with a dot do not count."""
    return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.name[0] != "."}


# ---- Terms of the losses, each against an independent reference
@parametrize(
    "kind, log_p",
    [
        ("bce", lambda x, p: x * p.log() + (1 - x) * (1 - p).log()),
        ("mse", lambda x, p: -0.5 * (x - p) ** 2),
    ],
)
def test_reconstruction_terms_sum_log_p_over_pixels(kind, log_p):
    logits = 3 * torch.randn(16, 1, 28, 28)
    x = torch.rand_like(logits)
    expected = -log_p(x.double(), logits.double().sigmoid()).sum(dim=(1, 2, 3))
    assert_close(common.reconstruction_term(logits, x, kind), expected.float(), rtol=1e-5, atol=0)


def test_the_bce_term_does_not_saturate():
    logits = torch.full((1, 1, 28, 28), 200.0)
    assert common.reconstruction_term(logits, torch.zeros_like(logits)).item() == 200 * 784


def test_an_unknown_kind_of_pixels_images_or_model_is_refused():
    x = torch.rand(1, 1, 28, 28)
    pytest.raises(ValueError, common.reconstruction_term, x, x, "l1")
    pytest.raises(TypeError, common.to_pixels, x)
    pytest.raises(ValueError, common.Encoder, NARROW, 5, "GAN")


@parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kl_is_that_of_torch_distributions_and_in_float32(dtype):
    mu, logvar = (2 * torch.randn(2, 64, 5)).to(dtype)
    posterior = Normal(mu.double(), (0.5 * logvar.double()).exp())
    reference = kl_divergence(posterior, Normal(0, 1)).mean(dim=0)
    assert_close(common.kl_per_latent(mu, logvar), reference.float(), rtol=1e-5, atol=0)


@each_kind
@parametrize(
    "loss, settings, penalty",
    [
        (vae.vae_loss, {}, lambda kl: kl),
        (beta_vae.beta_vae_loss, {"beta": 4}, lambda kl: 4 * kl),
        (beta_vae.beta_vae_loss, {"beta": 3, "capacity": 0}, lambda kl: 3 * kl),
        (beta_vae.beta_vae_loss, {"beta": 3, "capacity": 999}, lambda kl: 3 * (999 - kl)),
    ],
)
def test_losses_are_those_of_the_papers(loss, settings, penalty, kind):
    encoder, decoder = build()
    x = torch.rand(32, 1, 28, 28)
    torch.manual_seed(1)
    mu, logvar, z = encoder(x)
    recon = common.reconstruction_term(decoder.logits(z), x, kind).sum() / 32
    kl = kl_divergence(Normal(mu, (0.5 * logvar).exp()), Normal(0, 1)).sum() / 32
    expected = recon + penalty(kl), {"recon": recon, "kl": kl, "elbo": -recon - kl}
    torch.manual_seed(1)  # the same z
    assert_close(loss(encoder, decoder, x, kind=kind, **settings), expected)


@each_kind
def test_the_loss_of_the_ae_is_the_reconstruction_term(kind):
    encoder, decoder = build("AE")
    x = torch.rand(32, 1, 28, 28)
    recon = common.reconstruction_term(decoder.logits(encoder(x)), x, kind).sum() / 32
    assert_close(ae.ae_loss(encoder, decoder, x, kind), (recon, {"recon": recon}))


@pytest.fixture
def linear_gaussian(mnist):
    """p(x|z) = N(W z + 1/2, I) for pixels x, with z ~ N(0, I): all of it in closed form.

    Returns log p(x|z) as a function, the posterior's mu and logvar, and the mean of log p(x) over the images.
    """
    torch.manual_seed(0)
    x = mnist.test_images.flatten(1).double() / 255 - 0.5  # (N, 784)
    orthogonal = torch.linalg.qr(torch.randn(784, 4).double()).Q  # makes the posterior diagonal
    weight = orthogonal * torch.tensor([0.9, 0.8, 0.7, 0.6])
    covariance = weight @ weight.T + torch.eye(784)
    log_p = MultivariateNormal(torch.zeros_like(x[0]), covariance).log_prob(x).mean().item()
    variance = 1 / (1 + weight.square().sum(dim=0))  # p(z|x) = N(S W^T (x - 1/2), S), S = (I + W^T W)^-1
    mu = (x @ weight * variance).float()
    logvar = variance.log().float().expand(len(x), 4)

    def log_likelihood(x, z):
        return Normal(z.double() @ weight.T + 0.5, 1).log_prob(x.flatten(1)).sum(dim=1)

    return log_likelihood, mu, logvar, log_p


@parametrize("k", [1, 7])
def test_for_the_true_posterior_the_bound_is_log_p(k, linear_gaussian, mnist):
    log_likelihood, mu, logvar, log_p = linear_gaussian
    bound = common.importance_weighted_bound(log_likelihood, mu, logvar, mnist.test_images, k)
    assert bound == pytest.approx(log_p, abs=2e-4)  # no wrong sign, constant or axis could hide


def test_for_a_poor_posterior_one_sample_gives_the_elbo_and_many_log_p(linear_gaussian, mnist):
    log_likelihood, mu, logvar, log_p = linear_gaussian
    gap = 0.5 * (0.7**2 / logvar[0].exp()).sum().item()  # the KL of Gaussians whose means are 0.7 apart
    for k, expected, tolerance in ((1, log_p - gap, 0.2), (500, log_p, 0.02)):
        bound = common.importance_weighted_bound(log_likelihood, mu + 0.7, logvar, mnist.test_images, k)
        assert bound == pytest.approx(expected, abs=tolerance)


# ---- Networks
def torchs_autoencoder():
    """From images to logits by way of mu, in torch's own layers."""
    layers = [nn.ZeroPad2d(2)]
    for channels in ((1, 4), (4, 8), (8, 8), (8, 16)):
        layers += [nn.Conv2d(*channels, 4, 2, 1), nn.LeakyReLU(0.01)]
    layers += [nn.Flatten(), nn.Linear(16 * 2 * 2, 5), nn.Linear(5, 16 * 4 * 4), nn.Unflatten(1, (16, 4, 4))]
    for channels in ((16, 8), (8, 8), (8, 4)):
        layers += [nn.ConvTranspose2d(*channels, 4, 2, 1), nn.LeakyReLU(0.01)]
    return nn.Sequential(*layers, nn.ConvTranspose2d(4, 1, 3, 1, 1), nn.ZeroPad2d(-2))


def output_and_gradients(function, parameters, x, dtype):
    with torch.autocast("cpu", enabled=dtype == torch.bfloat16):
        output = function(x)
    assert output.dtype == dtype
    return [output, *torch.autograd.grad(output.float().square().sum(), parameters)]


@parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 0.05)])
def test_networks_equal_torchs_own_layers_in_output_and_gradients(dtype, tolerance):
    encoder, decoder = build("AE")
    reference = torchs_autoencoder()
    parameters = [*encoder.model.parameters(), *encoder.fc_mean.parameters(), *decoder.parameters()]
    for copy, parameter in zip(reference.parameters(), parameters):
        copy.data = parameter.data
    x = torch.rand(16, 1, 28, 28)
    found = output_and_gradients(lambda x: decoder.logits(encoder(x)), parameters, x, dtype)
    expected = output_and_gradients(reference, [*reference.parameters()], x, dtype)
    for tensor, right in zip(found, expected):
        assert (tensor - right).abs().max() <= tolerance * right.abs().max()


def test_images_are_the_sigmoid_of_the_logits():
    _, decoder = build()
    z = torch.randn(4, 5)
    assert torch.equal(decoder(z), decoder.logits(z).sigmoid())


def test_below_the_bound_the_log_variance_is_that_of_the_layer():
    encoder, _ = build()
    encoder.fc_logvar.bias.data = torch.linspace(-20, 1.5, 5)
    x = torch.rand(16, 1, 28, 28)
    _, logvar, _ = encoder(x)
    encoder.fc_mean = encoder.fc_logvar
    assert torch.equal(encoder(x)[0], logvar)


def test_in_training_the_encoder_of_a_vae_samples_z_from_q():
    encoder, _ = build()
    encoder.fc_logvar.bias.data = torch.linspace(-4, 1.5, 5)
    with torch.no_grad():
        mu, logvar, z = encoder(torch.rand(1, 1, 28, 28).expand(20_000, -1, -1, -1))
    eps = (z - mu) / (0.5 * logvar).exp()
    assert eps.mean(dim=0).abs().max() < 0.04
    assert (eps.T.cov() - torch.eye(5)).abs().max() < 0.06


def test_the_encoder_of_an_ae_gives_mu_alone():
    x = torch.rand(4, 1, 28, 28)
    assert torch.equal(build("AE")[0](x), build("VAE")[0](x)[0])


def test_a_sample_of_q_passes_gradients_to_mu_and_logvar():
    mu = torch.randn(8, 5, requires_grad=True)
    logvar = torch.randn(8, 5, requires_grad=True)
    z = build()[0].reparameterize(mu, logvar)
    gradients = torch.autograd.grad(z.sum(), [mu, logvar])
    assert_close(gradients, (torch.ones_like(mu), 0.5 * (z - mu)))


def test_an_unusual_image_gets_a_log_variance_of_2_and_a_finite_loss():
    encoder, decoder = build()
    encoder.fc_logvar.bias.data.fill_(100)
    x = torch.rand(16, 1, 28, 28)
    assert (encoder(x)[1] == 2).all()
    assert vae.vae_loss(encoder, decoder, x)[0].isfinite()


@parametrize("bias", [True, False])
def test_our_transposed_convolution_takes_all_options_of_torchs(bias):
    options = {"stride": 2, "output_padding": 1, "groups": 2, "dilation": 2, "bias": bias}
    ours = common.ConvTranspose2d(4, 4, 3, **options)
    theirs = nn.ConvTranspose2d(4, 4, 3, **options)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 4, 7, 7)
    assert_close(ours(x), theirs(x))


# ---- Evaluation
def ridge_accuracy(train_codes, train_labels, codes, labels):
    """Accuracy of ridge regression by least squares, where the penalty is more rows."""
    train_codes = train_codes.double()
    codes = codes.double()
    classes = train_labels.unique()
    onehot = (train_labels[:, None] == classes).double()
    mean = train_codes.mean(dim=0)
    penalty = (1e-3 * len(train_codes)) ** 0.5 * torch.eye(len(mean))
    inputs = torch.cat([train_codes - mean, penalty])
    outputs = torch.cat([onehot - onehot.mean(dim=0), torch.zeros(len(mean), len(classes))])
    scores = (codes - mean) @ torch.linalg.lstsq(inputs, outputs).solution + onehot.mean(dim=0)
    return (classes[scores.argmax(dim=1)] == labels).double().mean().item()


@parametrize("n", [12, 192, 512])  # 12 training images lack three of the labels
def test_the_probe_equals_least_squares_in_float64(n, mnist):
    torch.manual_seed(0)
    scales = torch.logspace(-2, 0, 20).double()  # the penalty decides how much the first latents count
    to_codes = 0.1 * torch.randn(784, 20) * scales / 255
    train_codes = mnist.train_images[:n].flatten(1).double() @ to_codes
    codes = mnist.test_images.flatten(1).double() @ to_codes
    arguments = train_codes, mnist.train_labels[:n] + 1, codes, mnist.test_labels + 1
    assert common.probe_accuracy(*arguments) == pytest.approx(ridge_accuracy(*arguments))


def test_linear_discriminants_solve_the_generalized_eigenvalue_problem():
    torch.manual_seed(0)
    labels = torch.arange(10).repeat(60)
    codes = torch.randn(10, 4)[labels] + torch.randn(600, 4) @ torch.randn(4, 4)
    by_class = codes.view(60, 10, 4)  # (images, classes, latent_dim)
    within = (by_class - by_class.mean(dim=0)).flatten(0, 1).T.cov(correction=0)
    between = by_class.mean(dim=0).T.cov(correction=0)
    eigenvalues, vectors = torch.linalg.eig(torch.linalg.solve(within, between))
    reference = vectors.real[:, eigenvalues.real.argsort(descending=True)[:2]]
    reference /= (reference * (within @ reference)).sum(dim=0).sqrt()  # to unit variance within the classes
    directions = common.linear_discriminants(codes, 2 * labels + 5)
    assert_close(directions.abs(), reference.abs(), rtol=1e-3, atol=1e-4)


@parametrize("n", [1, 3, 99])  # only four latents of the 99 codes are alive
def test_discriminants_of_few_codes_and_of_dead_latents_are_finite(n):
    directions = common.linear_discriminants(torch.eye(n, 4), torch.arange(n) % 10)
    assert directions.isfinite().all()


def test_samples_of_an_ae_have_the_mean_and_covariance_of_its_codes():
    codes = torch.randn(50, 3) @ torch.tensor([[2.0, 0, 0], [1, 1, 0], [0, 0, 0]]) + 5  # one latent is dead
    samples = ae.sample_codes(codes, 100_000)
    assert_close(samples.mean(dim=0), codes.mean(dim=0), atol=0.05, rtol=0)
    assert_close(samples.T.cov(), codes.T.cov(), atol=0.05, rtol=0.03)
    assert torch.equal(ae.sample_codes(codes[:1], 1), codes[:1])  # of a single code


def test_binarized_test_images_are_drawn_once_with_seed_0(mnist):
    binarized = common.load_data(ROOT / "data", limit=512, binarize=True)
    draws = torch.rand(10_000, 28, 28, generator=torch.Generator().manual_seed(0))[:300, None]
    assert torch.equal(binarized.test_images[:300] / 255, (draws < mnist.test_images / 255).float())
    assert torch.equal(binarized.train_images, mnist.train_images)  # they are drawn in training


def test_evaluation_averages_over_the_images_that_have_a_term(mnist):
    def loss(network, x, label, scale):
        assert not torch.is_grad_enabled()
        assert not network.training
        terms = {"late": label.float().mean()} if len(x) == 50 else {}  # of 300 images, in batches of 250
        return scale * (x.mean(dim=(1, 2, 3)) * label).mean(), terms

    found = common.evaluate(loss, [nn.Dropout()], mnist.test_images, mnist.test_labels, scale=3)
    product = common.to_pixels(mnist.test_images).mean(dim=(1, 2, 3)) * mnist.test_labels
    late = mnist.test_labels[250:].float().mean().item()
    assert found == pytest.approx({"loss": 3 * product.mean().item(), "late": late})


def test_evaluation_leaves_modes_and_random_state_as_they_were(mnist):
    encoder, decoder = build()
    frozen = encoder.model.append(nn.BatchNorm2d(16).eval())[-1]
    state = torch.get_rng_state()
    common.evaluate(vae.vae_loss, [encoder, decoder], mnist.test_images)
    mu, logvar = common.encode(encoder, mnist.test_images)
    common.importance_weighted_bound(lambda x, z: 0, mu, logvar, mnist.test_images, k=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert encoder.training
    assert decoder.training
    assert not frozen.training


@parametrize("outputs", [1, 2, 3])
def test_encode_takes_encoders_with_one_two_or_three_outputs(outputs, mnist):
    class Copy(nn.Module):
        def forward(self, x):
            return (x, 2 * x, 3 * x)[:outputs] if outputs > 1 else x

    mu, logvar = common.encode(Copy(), mnist.test_images)
    assert torch.equal(mu, common.to_pixels(mnist.test_images))
    assert logvar is None if outputs == 1 else torch.equal(logvar, 2 * mu)


# ---- Training
@each_script
def test_the_defaults_are_those_of_the_published_numbers(script):
    defaults = {
        "out": None,
        "resume": None,
        "seed": 0,
        "device": "auto",
        "precision": "auto",
        "dataset": "MNIST",
        "data": None,
        "limit": 60_000,
        "latent_dim": 20,
        "hidden_dims": [32, 64, 128, 256],
        "recon": "bce",
        "epochs": 20,
        "batch_size": 128,
        "lr": 3e-3,
        "script": f"{script.__name__}.py",
    }
    if script is not ae:
        defaults.update(binarize=False, iw_samples=None)
    if script is beta_vae:
        defaults.update(beta=4, warmup=0, capacity=None)
    assert vars(script.parse_args([])) == defaults


def plain_loop(script, data):
    """Networks and history after three epochs of seed 5 in steps of 40 images, written out as in a paper."""
    torch.manual_seed(5 * 1_000_003)
    encoder = common.Encoder(NARROW, 5, "AE" if script is ae else "VAE")
    decoder = common.Decoder(5, NARROW)
    networks = nn.ModuleList([encoder, decoder])
    images = data.train_images / 255
    mean = images.mean()
    decoder.last_layer[0].bias.data.fill_((mean / (1 - mean)).log())
    optimizer = torch.optim.AdamW(networks.parameters(), betas=(0.9, 0.95), weight_decay=0.1)

    def add_terms(row, x, epochs, prefix, share):
        schedule = {"beta": 3 * min(1, epochs / 2), "capacity": 200 * min(1, epochs / 1.5)}
        settings = schedule if script is beta_vae else {}
        loss_function = getattr(script, f"{script.__name__}_loss")
        loss, terms = loss_function(encoder, decoder, x, kind="mse", **settings)
        for name, term in {"loss": loss, **terms}.items():
            row[prefix + name] = row.get(prefix + name, 0) + share * term.item()
        return loss

    history = []
    for epoch in (1, 2, 3):
        row = {"epoch": epoch}
        torch.manual_seed(5 * 1_000_003 + epoch)
        batches = torch.randperm(512).split(40)[:12]  # not the 32 images that are left
        for step, batch in enumerate(batches, start=12 * (epoch - 1)):
            row["lr"] = 1e-2 * min((step + 1) / 3, (36 - step) / 33)  # warm-up over 3 of 36 steps
            optimizer.param_groups[0]["lr"] = row["lr"]
            x = images[batch] if script is ae else torch.bernoulli(images[batch])
            optimizer.zero_grad()
            add_terms(row, x, step / 12, "train_", share=1 / 12).backward()
            optimizer.step()
        torch.manual_seed(0)
        for x in (data.test_images / 255).split(250):
            add_terms(row, x, epoch, "test_", share=len(x) / 300)
        history.append(row)
    return networks, history


@each_script
def test_a_run_equals_a_plain_training_loop(script, few_images, saved_figures, tmp_path):
    flags = "--recon mse --seed 5 --epochs 3 --batch-size 40 --lr 1e-2"
    flags += {ae: "", vae: " --binarize", beta_vae: " --binarize --beta 3 --warmup 2 --capacity 200"}[script]
    out = script.main([*SMALL, *flags.split(), f"--out={tmp_path}/run"])
    networks, history = plain_loop(script, few_images)
    for row, expected in zip(common.read_checkpoint(out)["history"], history):
        assert row.pop("seconds") > 0
        assert list(row) == list(expected)  # in this order
        assert row == pytest.approx(expected, rel=1e-4)
    trained = all_weights(*common.load_model(out)[:2])
    assert_close(trained, all_weights(*networks), rtol=1e-3, atol=1e-4)


def test_the_learning_rate_of_a_single_step_is_the_peak():
    assert common.learning_rate(0, 1, 2e-3) == 2e-3


def test_every_epoch_seeds_the_generators_of_torch_random_and_numpy():
    def noise():
        common.seed_epoch(2**32 - 1, 7)
        return torch.rand(1).item(), common.random.random(), numpy.random.rand()

    assert noise() == noise()


@pytest.fixture
def meter(monkeypatch):
    """Of the second of three epochs, with 100 steps of 60 images; and a function that adds steps of 0.6 s."""
    clock = [0.0]
    monkeypatch.setattr(common.time, "perf_counter", lambda: clock[0])
    meter = common.Meter(2, 100, Namespace(epochs=3, batch_size=60))

    def add(steps, terms):
        for _ in range(steps):
            clock[0] += 0.6
            meter.add(torch.tensor(1.0), terms)

    return meter, add


def test_a_terminal_shows_speed_and_time_left_at_most_once_a_second(meter, monkeypatch, capsys):
    _, add = meter
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    add(5, {})
    lines = ["epoch 2/3  100 images/s  119 s left", "epoch 2/3  100 images/s  118 s left"]
    assert capsys.readouterr().out == "".join(f"\r\x1b[K{line}" for line in lines)


def test_a_logger_without_isatty_in_place_of_stdout_is_no_terminal(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    assert not common.on_terminal()


def test_a_term_is_averaged_over_the_steps_that_have_it(meter):
    meter, add = meter
    add(3, {"recon": torch.tensor(2.0)})
    add(1, {"recon": torch.tensor(6.0), "late": torch.tensor(5.0)})
    assert meter.finish() == ({"loss": 1, "recon": 3, "late": 5}, pytest.approx(2.4))


def test_a_term_must_not_be_named_loss(meter):
    _, add = meter
    with pytest.raises(TypeError):
        add(1, {"loss": torch.tensor(1.0)})


def test_fewer_images_than_a_batch_are_refused_before_the_first_step(mnist, tmp_path):
    few = mnist._replace(train_images=mnist.train_images[:63])
    with pytest.raises(ValueError, match="fewer training images than one batch of 64"):
        train(few, tmp_path)


def test_a_finished_epoch_leaves_a_line_of_whole_terms_in_80_columns(capsys):
    row = {
        "seconds": 2.0,
        "train_kl": 1,
        "test_kl": 2.0,
        "test_elbo": -1 / 3,
        f"test_{'x' * 40}": 1,
        "test_y": 9,
    }
    common.print_epoch([row], Namespace(epochs=6))
    assert capsys.readouterr().out == "epoch 1/6  10 s left  test kl 2.00 elbo -0.33 y 9.00\n"


@pytest.fixture
def in_bfloat16(mnist, tmp_path):
    return train(mnist, tmp_path / "bf16", "--precision=bf16")


def test_bfloat16_ends_near_float32_and_trains_float32_weights(in_bfloat16, mnist, tmp_path):
    networks, history = in_bfloat16
    full = train(mnist, tmp_path / "fp32")[1][-1]["train_loss"]
    assert history[-1]["train_loss"] != full
    assert history[-1]["train_loss"] == pytest.approx(full, rel=0.02)
    assert all_weights(*networks).dtype == torch.float32


def test_after_training_in_bfloat16_test_terms_are_those_of_float32(in_bfloat16, mnist):
    networks, history = in_bfloat16
    expected = common.evaluate(vae.vae_loss, networks, mnist.test_images)
    assert common.terms_of("test", history[-1]) == pytest.approx(expected, rel=1e-6)


def test_networks_train_in_training_mode_and_end_in_evaluation_mode(mnist, tmp_path, monkeypatch):
    def loss(encoder, decoder, x, kind):
        assert encoder.training == decoder.training == torch.is_grad_enabled()
        return vae_loss(encoder, decoder, x, kind)

    vae_loss = vae.vae_loss
    monkeypatch.setattr(vae, "vae_loss", loss)
    args = vae.parse_args([*SMALL, "--epochs=1"])
    networks = [network.eval() for network in build()]
    for _ in range(2):  # the second time, no epoch is left
        vae.train_model(*networks, mnist, args, tmp_path)
        assert not any(network.training for network in networks)


@parametrize("split, calls_before", [("train", 17), ("test", 18)])
def test_divergence_names_term_and_epoch_and_keeps_the_last_checkpoint(
    split, calls_before, mnist, tmp_path, monkeypatch
):
    def diverge():
        monkeypatch.setattr(vae, "kl_per_latent", lambda mu, logvar: torch.tensor(math.inf))

    before_call(monkeypatch, vae, "kl_per_latent", calls_before, diverge)
    with pytest.raises(FloatingPointError, match=f"{split}_kl is inf in epoch 2"):
        train(mnist, tmp_path)  # 8 training and 2 test batches per epoch
    assert len(common.read_checkpoint(tmp_path)["history"]) == 1


# ---- Device
def test_float32_is_exact(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    torch.set_float32_matmul_precision("high")
    common.set_up_device(torch.device("cpu"))
    assert torch.get_float32_matmul_precision() == "highest"
    assert not torch.backends.cudnn.allow_tf32


@parametrize("kind, channels_last", [("cpu", True), ("mps", False)])
def test_weights_are_channels_last_but_not_on_mps(kind, channels_last):
    layer = nn.Conv2d(2, 2, 3)
    common.set_up_device(torch.device(kind), nn.ModuleList([layer]))
    assert layer.weight.is_contiguous(memory_format=torch.channels_last) == channels_last


@parametrize("ratio, precision", [(1.49, "fp32"), (1.51, "bf16")])
def test_a_cpu_computes_in_bfloat16_where_that_is_half_again_as_fast(ratio, precision, monkeypatch):
    def repeat(*_, globals, **__):
        assert torch.get_num_threads() == 1
        fastest = {torch.float32: ratio, torch.bfloat16: 1}[globals["a"].dtype]
        return [9, fastest, 9]

    monkeypatch.setattr(common.timeit, "repeat", repeat)
    torch.set_num_threads(2)
    assert common.pick_precision(torch.device("cpu"))[0] == precision
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)


@parametrize(
    "kind, capability, precision", [("cuda", (7, 5), "fp32"), ("cuda", (8, 0), "bf16"), ("mps", None, "fp32")]
)
def test_cuda_computes_in_bfloat16_from_capability_8_and_mps_in_float32(
    kind, capability, precision, monkeypatch
):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert common.pick_precision(torch.device(kind))[0] == precision


# ---- Shared text
LINES_THAT_VAE_PY_LACKS = """\
ae parse_args 3: two help texts and the end
ae train_model 2: the loss, twice
ae main 5: the encoder, no KL, labels, samples
beta_vae parse_args 11: two help texts, the flags of the objective
beta_vae train_model 4: the loss and its schedule, twice
beta_vae main 6: labels"""


@parametrize("place_and_lines", LINES_THAT_VAE_PY_LACKS.splitlines())
def test_scripts_are_the_same_text_where_their_models_do_not_differ(place_and_lines):
    script, function, lines = place_and_lines.split(":")[0].split()
    of_vae = inspect.getsource(getattr(vae, function)).splitlines()
    of_script = inspect.getsource(getattr(sys.modules[script], function)).splitlines()
    assert sum(line not in of_vae for line in of_script) == int(lines)


# ---- Figures: what they draw, and what scripts hand to them
def copy_codes(z):
    """A decoder whose images hold their codes in their first pixels."""
    return F.pad(z, (0, 784 - z.shape[1])).view(-1, 1, 28, 28)


def codes_in(images, latents):
    return images.flatten(-2)[..., :latents]


def record_plots(patch):
    """From now on, keep the arguments of plot_* functions, by their name; of plot_grid, by the figure's."""
    arguments = {}

    def recorded(function):
        def record(*args, **settings):
            bound = inspect.signature(function).bind(*args, **settings).arguments
            arguments[bound.get("name", function.__name__)] = bound
            return function(*args, **settings)

        return record

    for name in dir(common):
        if name.startswith(("plot_", "importance_")):
            patch.setattr(common, name, recorded(getattr(common, name)))
    return arguments


@pytest.fixture
def plot_arguments(saved_figures, monkeypatch):
    return record_plots(monkeypatch)


def with_classes(count, data):
    """`data` with other labels of the test images: count, ..., 2, 1, over and over."""
    return data._replace(test_labels=count - torch.arange(300) % count)


@parametrize("classes", [10, 2, 1])
def test_reconstructions_stand_below_the_first_image_of_each_class(classes, mnist, plot_arguments):
    data = with_classes(classes, mnist)
    mu = torch.randn(300, 5)
    first = torch.arange(classes).flip(0)
    common.plot_reconstructions(copy_codes, mu, data, "out")
    grid = plot_arguments["reconstructions"]
    assert torch.equal(grid["images"][0], data.test_images[first, 0] / 255)
    assert torch.equal(codes_in(grid["images"][1], 5), mu[first])
    assert grid["row_labels"] == ["input", "reconstruction"]


@parametrize("classes, starts, ends", [(4, [3, 1], [2, 0]), (3, [2], [1]), (1, [0], [1])])
def test_interpolations_go_from_one_class_to_the_next(classes, starts, ends, mnist, plot_arguments):
    mu = torch.randn(300, 5)
    common.plot_interpolations(copy_codes, mu, with_classes(classes, mnist), "out")
    grid = plot_arguments["interpolations"]
    shares = torch.linspace(0, 1, 11)[:, None]
    assert_close(codes_in(grid["images"], 5), torch.lerp(mu[starts, None], mu[ends, None], shares))
    assert grid["column_labels"] == "0.0 0.1 0.2 0.3 0.4 0.5 0.6 0.7 0.8 0.9 1.0".split()
    assert "second code" in grid["xlabel"]


@parametrize("latents, shown", [(12, "; 10 of 12 latents sorted by KL"), (3, "; rows sorted by KL")])
def test_traversals_move_the_latents_of_largest_kl(latents, shown, mnist, plot_arguments):
    mu = 3 * torch.rand(latents) * torch.randn(300, latents)
    logvar = torch.randn(300, latents)
    common.plot_traversals(copy_codes, mu, logvar, mnist, "out")
    grid = plot_arguments["traversals"]
    kl, order = common.kl_per_latent(mu, logvar).sort(descending=True)
    moved = F.one_hot(order[:10], latents).bool()[:, None]
    steps = torch.arange(-3.0, 4)
    assert torch.equal(codes_in(grid["images"], latents), torch.where(moved, steps[:, None], mu[0]))
    assert grid["column_labels"] == "-3 -2 -1 0 1 2 3".split()
    labels = [f"$z_{{{latent}}}$  {nats:.1f} nats" for latent, nats in zip(order[:10], kl)]
    assert grid["row_labels"] == labels
    assert shown in grid["xlabel"]


def test_the_manifold_shows_the_priors_quantiles_to_the_right_and_upwards(mnist, plot_arguments):
    common.plot_manifold(copy_codes, mnist, "out")
    grid = plot_arguments["manifold"]
    quantiles = Normal(0, 1).icdf(torch.arange(0.025, 1, 0.05))
    expected = torch.stack(torch.meshgrid(quantiles, quantiles.flip(0), indexing="xy"), dim=2)
    assert_close(codes_in(grid["images"], 2), expected, atol=1e-5, rtol=1e-5)
    assert grid["column_labels"][::4] == ["-1.96", "-0.76", "-0.19", "", ""]
    assert grid["column_labels"][11::4] == ["0.19", "0.76", "1.96"]
    assert grid["row_labels"] == grid["column_labels"][::-1]
    assert grid["xlabel"] == "$z_0$ to the right, $z_1$ upwards"


def test_a_grid_shows_its_images_from_the_top_left_with_labels_at_their_middle(saved_figures):
    images = 0.2 + 0.6 * torch.rand(2, 3, 28, 28)
    common.plot_grid(images, "out", "grid", "title", ["a", "b"], ["c", "d", "e"], "across")
    ax = saved_figures["grid.png"].axes[0]
    (drawn,) = ax.images
    tiled = torch.cat([torch.cat([*row], dim=1) for row in images])
    assert (drawn.get_array() == tiled.numpy()).all()
    assert drawn.get_clim() == (0, 1)
    assert [*drawn.get_extent()] == [-0.5, 83.5, 55.5, -0.5]  # left, right, bottom, top
    rows = {label.get_text(): label.get_position()[1] for label in ax.get_yticklabels()}
    columns = {label.get_text(): label.get_position()[0] for label in ax.get_xticklabels()}
    assert rows == {"a": 14, "b": 42}
    assert columns == {"c": 14, "d": 42, "e": 70}
    assert ax.get_xlabel() == "across"


def test_a_png_has_a_title_and_a_pdf_has_none(monkeypatch):
    titles = []

    def savefig(figure, path, **_):
        titles.append((path.suffix, figure.axes[0].get_title()))

    monkeypatch.setattr(common.Figure, "savefig", savefig)
    common.plot_grid(torch.rand(1, 1, 28, 28), "out", "grid", "of what")
    assert titles == [(".pdf", ""), (".png", "of what")]


@parametrize("latents", [1, 2, 5])
def test_the_latent_space_is_the_plane_or_the_first_two_discriminants(latents, mnist, saved_figures):
    train_mu = torch.randn(512, latents) + mnist.train_labels[:, None]
    mu = torch.randn(300, latents)
    common.plot_latent_space(train_mu, mu, mnist, "out")
    directions = common.linear_discriminants(train_mu, mnist.train_labels)
    points = mu if latents == 2 else (mu - train_mu.mean(dim=0)) @ directions
    ax = saved_figures["latent_space.pdf"].axes[0]
    assert ax.collections[0].get_offsets().data == pytest.approx(points.numpy(), abs=1e-4)
    assert ax.collections[0].get_rasterized()
    assert ("mu_0" if latents == 2 else "first") in ax.get_xlabel()
    assert ("mu_1" if latents == 2 else "second") in ax.get_ylabel()
    assert ax.get_aspect() == 1


def test_the_legend_of_the_latent_space_names_the_class_of_each_color(mnist, saved_figures):
    data = mnist._replace(test_labels=mnist.test_labels + 3)  # labels need not be 0 to 9
    common.plot_latent_space(None, torch.randn(300, 2), data, "out")
    figure = saved_figures["latent_space.pdf"]
    colors = figure.axes[0].collections[0].get_facecolors()
    assert len({*map(tuple, colors)}) == 10
    for text, handle in zip(figure.legends[0].texts, figure.legends[0].legend_handles):
        assert (colors[data.test_labels == int(text.get_text())] == handle.get_facecolor()).all()


@parametrize("latents, labels", [(1, 1), (20, 20), (200, 13)])  # as many as have room
def test_bars_are_the_kl_of_the_latents_that_their_labels_name(latents, labels, mnist, saved_figures):
    mu = torch.randn(300, latents) * torch.rand(latents)
    kl = common.kl_per_latent(mu, torch.zeros_like(mu))
    common.plot_kl_per_dimension(mu, torch.zeros_like(mu), mnist, "out")
    ax = saved_figures["kl_per_dimension.png"].axes[0]
    heights = [bar.get_height() for bar in ax.patches]  # from left to right
    assert heights == sorted(kl.tolist(), reverse=True)
    named = [int(label.get_text()) for label in ax.get_xticklabels()]
    assert [heights[tick] for tick in ax.get_xticks()] == kl[named].tolist()
    assert len(named) == labels
    assert f" {kl.sum():.1f} nats" in ax.get_title()


def loss_panels(epochs, data, figures):
    """The panels that a history of so many epochs gets, in which one term starts with the sixth."""
    history = [{"epoch": i, "train_kl": 3 / i, "test_kl": 4 / i} for i in range(1, epochs + 1)]
    for row in history[5:]:
        row["train_late"] = 10 / row["epoch"]
    labels = {"kl": "KL (nats)", "late": "late term", "none": "no such term"}
    common.plot_loss_curves(history, labels, data, "out")
    return figures["loss_curves.pdf"].axes


def test_loss_curves_draw_each_split_of_each_term_over_its_epochs(mnist, saved_figures):
    kl, late = loss_panels(20, mnist, saved_figures)
    for line, first, label in zip(kl.lines, (3, 4), ("train", "test")):
        assert line.get_xydata().tolist() == [[i, first / i] for i in range(1, 21)]
        assert line.get_label() == label
    assert late.lines[0].get_xydata().tolist() == [[i, 10 / i] for i in range(6, 21)]
    assert kl.get_ylabel() == "KL (nats)"
    assert late.get_ylabel() == "late term"
    assert late.get_xlabel() == "epoch"


def test_loss_curves_cover_every_value_after_the_first_tenth_of_the_epochs(mnist, saved_figures):
    kl, late = loss_panels(20, mnist, saved_figures)
    assert kl.get_ylim() == pytest.approx((3 / 20, 4 / 3), abs=0.1)  # not the values of the first two epochs
    assert late.get_ylim() == pytest.approx((10 / 20, 10 / 6), abs=0.1)
    assert kl.get_xlim() == late.get_xlim() == (0.5, 20.5)


def test_the_users_matplotlibrc_does_not_change_a_figure(saved_figures):
    with matplotlib.rc_context({"axes.facecolor": "black"}):
        common.plot_grid(torch.rand(1, 1, 28, 28), "out", "grid", "title")
    assert saved_figures["grid.png"].axes[0].get_facecolor() == (1, 1, 1, 1)


def pixels_as_codes(encoder, images):
    """In place of common.encode: five latents, of which three have a variance above 0.01."""
    x = common.to_pixels(images).flatten(1)
    return x[:, 404:409] * torch.tensor([9, 3, 0.3, 0.1, 0]), x[:, 409:414]


@pytest.fixture(scope="module")
def drawn_runs(mnist, tmp_path_factory):
    """Of each script: the folder of a run that was drawn twice, the last plots' arguments, and the codes."""
    runs = {}
    for script in SCRIPTS:
        of_vaes = [] if script is ae else "--binarize --recon mse --iw-samples 3".split()
        folder = tmp_path_factory.mktemp("drawn") / "run"
        flags = [*SMALL, "--epochs=1", f"--resume={folder}", *of_vaes]
        with pytest.MonkeyPatch.context() as patch:
            remember_figures(patch)
            arguments = record_plots(patch)
            patch.setattr(common, "load_data", lambda *_: mnist)
            patch.setattr(common, "encode", pixels_as_codes)
            patch.setattr(common, "EVAL_SEED", 11)  # not the run's own seed
            script.main(flags)
            script.main(flags)
            train_images = common.binarize_once(mnist.train_images) if of_vaes else mnist.train_images
        train_mu, _ = pixels_as_codes(None, train_images)
        mu, logvar = pixels_as_codes(None, mnist.test_images)
        runs[script] = folder, arguments, {"train_mu": train_mu, "mu": mu, "logvar": logvar}
    return runs


@each_script
def test_a_script_hands_the_codes_of_the_right_images_to_each_figure(script, drawn_runs):
    _, plots, codes = drawn_runs[script]
    handed = [(name, plot[name]) for plot in plots.values() for name in plot.keys() & codes.keys()]
    assert len(handed) == (4 if script is ae else 10)
    for name, tensor in handed:
        assert_close(tensor, codes[name])


@each_script
def test_samples_are_drawn_with_the_evaluation_seed(script, drawn_runs):
    folder, plots, codes = drawn_runs[script]
    _, decoder, _ = common.load_model(folder)
    torch.manual_seed(11)
    z = ae.sample_codes(codes["train_mu"], 100) if script is ae else torch.randn(100, 5)
    assert_close(plots["samples"]["images"], common.decode_grid(decoder, z.view(10, 10, 5)))
    assert ("a Gaussian fitted to" in plots["samples"]["title"]) == (script is ae)


@each_script
def test_panels_of_loss_curves_are_labeled_with_their_term(script, drawn_runs):
    _, plots, _ = drawn_runs[script]
    labels = {"recon": "recon (nats)"}
    if script is not ae:
        labels = {"elbo": "ELBO (nats)", "recon": "recon (nats)", "kl": "KL (nats)"}
    if script is beta_vae:
        labels["loss"] = "objective,\n$\\beta$ = 4 (nats)"
    assert plots["plot_loss_curves"]["labels"] == labels


@each_script
def test_a_script_measures_squared_error_and_probe_of_its_codes(script, drawn_runs, mnist):
    folder, _, codes = drawn_runs[script]
    test = read_metrics(folder)["test"]
    _, decoder, _ = common.load_model(folder)
    errors = decoder(codes["mu"]) - mnist.test_images / 255
    assert test["mse"] == pytest.approx(errors.square().mean().item())
    probe = ridge_accuracy(codes["train_mu"], mnist.train_labels, codes["mu"], mnist.test_labels)
    assert test["probe_accuracy"] == pytest.approx(probe)


@each_vae
def test_a_vae_measures_kl_active_units_and_the_bound_of_its_likelihood(script, drawn_runs):
    folder, plots, codes = drawn_runs[script]
    test = read_metrics(folder)["test"]
    kl = common.kl_per_latent(codes["mu"], codes["logvar"])
    assert test["kl_per_latent"] == pytest.approx(kl.tolist())
    assert test["active_units"] == 3
    bound = plots["importance_weighted_bound"]
    assert test["iw_samples"] == bound["k"] == 3
    _, decoder, _ = common.load_model(folder)
    x = torch.rand(4, 1, 28, 28)
    z = torch.randn(4, 5)
    assert_close(bound["log_likelihood"](x, z), -common.reconstruction_term(decoder.logits(z), x, "mse"))


# ---- Whole runs, each in a process of its own, on the real test images
FLAGS = {
    ae: "--recon mse",
    vae: "--binarize --iw-samples 3 --precision bf16",
    beta_vae: "--capacity 5 --latent-dim 2 --precision auto",
}


@pytest.fixture(scope="module")
def whole_runs(tmp_path_factory):
    """Of each script, the folder of a run, and what it printed; all of them run at once."""
    folder = tmp_path_factory.mktemp("whole")
    processes = {}
    for script in SCRIPTS:
        flags = [*SMALL, *f"--epochs 2 --limit 500 --seed 7 {FLAGS[script]}".split()]
        processes[script] = subprocess.Popen(
            [sys.executable, ROOT / f"{script.__name__}.py", *flags],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
    return {
        script: (folder / "runs" / script.__name__, run.communicate()[0]) for script, run in processes.items()
    }


def read_history_csv(out):
    names, *rows = (line.split(",") for line in (out / "history.csv").read_text().split("\n")[:-1])
    return [{name: float(cell) for name, cell in zip(names, row)} for row in rows]


@parametrize(
    "script, precision",
    [
        (ae, r"fp32 \(as requested\)"),
        (vae, r"bf16 \(as requested\)"),
        (beta_vae, r"(fp32|bf16) \(bfloat16 products are .* times as fast\)"),
    ],
)
def test_the_first_line_says_how_a_run_is_trained_and_where_it_writes(script, precision, whole_runs):
    _, printed = whole_runs[script]
    folder = f"runs.{script.__name__}"  # the dot: on Windows, another slash
    assert re.match(rf"cpu, {precision}, seed 7, writing to {folder}, a new run\nepoch 1/2 ", printed)


@parametrize(
    "script, further_figures",
    [
        (ae, ""),
        (vae, "traversals kl_per_dimension"),
        (beta_vae, "traversals kl_per_dimension manifold"),
    ],
)
def test_a_run_leaves_its_figures_and_three_other_files(script, further_figures, whole_runs):
    out, _ = whole_runs[script]
    names = f"reconstructions samples interpolations loss_curves latent_space {further_figures}".split()
    figures = {f"{name}.{kind}" for name in names for kind in ("png", "pdf")}
    assert visible_files(out).keys() == figures | {"history.csv", "metrics.json", "checkpoint.pt"}


@each_script
def test_no_figure_is_blank_cut_off_or_too_wide_for_a_column(script, whole_runs):
    out, _ = whole_runs[script]
    for pdf in out.glob("*.pdf"):
        image = matplotlib.image.imread(pdf.with_suffix(".png"))
        assert image.std() > 0.01, f"{pdf.stem} is blank"
        image[1:-1, 1:-1] = 1  # leaves the edges
        assert image.min() == 1, f"{pdf.stem} is cut off"
        content = pdf.read_bytes()
        assert float(re.search(rb"/MediaBox \[ ?0 0 ([\d.]+)", content)[1]) == 3.25 * 72  # points
        assert b"/Type3" not in content
        assert b"Date" not in content


@each_script
def test_metrics_describe_the_run_and_its_environment(script, whole_runs):
    out, _ = whole_runs[script]
    metrics = read_metrics(out)
    encoder, decoder, args = common.load_model(out)
    assert not encoder.training
    assert not decoder.training
    history = read_history_csv(out)
    seconds = sum(row["seconds"] for row in history)
    speed = 2 * 7 * 64 / seconds  # two epochs of seven batches
    unused = all_weights(encoder.fc_logvar).numel() if script is ae else 0
    assert metrics["args"] == vars(args)
    assert metrics["test"]["recon"] == history[1]["test_recon"]
    assert metrics["train"] == pytest.approx({"epochs": 2, "seconds": seconds, "images_per_second": speed})
    assert metrics["environment"] == {
        "device": "cpu",
        "threads": 1,
        "precision": args.precision,
        "python": "{}.{}.{}".format(*sys.version_info),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "train_images": 500,
        "test_images": 10_000,
        "parameters": all_weights(encoder, decoder).numel() - unused,
    }


def test_the_table_of_runs_shows_what_a_run_wrote(whole_runs, capsys):
    out, _ = whole_runs[beta_vae]
    compare_runs.main([str(out)])
    row = capsys.readouterr().out.splitlines()[-2]
    last = read_history_csv(out)[-1]
    assert row.startswith(f"| beta-VAE, beta = 4 | 1 | {last['test_recon']:.2f} | {last['test_kl']:.2f} |")


# ---- Kill and resume
RUN = [*SMALL, *"--recon mse --capacity 0 --seed 7 --lr 1e-3 --limit 512 --epochs 2".split()]


@pytest.fixture(autouse=True)
def pythons_own_ctrl_c():
    """A shell may start us with Ctrl-C ignored; no test leaves another handler."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, signal.default_int_handler)


def ctrl_c():
    signal.raise_signal(signal.SIGINT)


def ctrl_c_twice():
    ctrl_c()
    ctrl_c()


def full_disk():
    raise OSError("No space left on device")


def before_call(patch, owner, name, number, action):
    """Patch owner.name so that `action` comes before its call with this number."""
    function = getattr(owner, name)
    calls = []

    def patched(*args):
        calls.append(args)
        if len(calls) == number:
            action()
        return function(*args)

    patch.setattr(owner, name, patched)


def weights_and_history(out):
    """What a run has learned: its weights, and its history without the seconds."""
    history = [{**row, "seconds": 0} for row in common.read_checkpoint(out)["history"]]
    return all_weights(*common.load_model(out)[:2]).tolist(), history


@pytest.fixture(scope="module")
def finished(mnist, tmp_path_factory):
    """The folder of a run of two epochs, not to be changed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "load_data", lambda *_: mnist)
        patch.setattr(common.Figure, "savefig", lambda *_, **__: None)
        return beta_vae.main([*RUN, "--out", str(tmp_path_factory.mktemp("finished") / "run")])


@parametrize(
    "owner, name, number, action, epochs",
    [  # an epoch has eight steps, and puts two files into place: checkpoint.pt, then history.csv
        (os, "replace", 3, sys.exit, 1),
        (os, "replace", 4, sys.exit, 2),
        (Path, "write_bytes", 3, full_disk, 1),
        (common.Meter, "add", 12, ctrl_c_twice, 1),
    ],
)
def test_a_resumed_run_equals_a_whole_one(
    owner, name, number, action, epochs, finished, few_images, saved_figures, monkeypatch, tmp_path
):
    flags = [*RUN, f"--resume={tmp_path}"]
    (tmp_path / "slurm-1.out").touch()  # a log may be there
    with monkeypatch.context() as patch:
        before_call(patch, owner, name, number, action)
        with pytest.raises((OSError, SystemExit, KeyboardInterrupt)):
            beta_vae.main(flags)
    assert len(common.read_checkpoint(tmp_path)["history"]) == epochs
    assert not saved_figures
    beta_vae.main(flags)
    assert weights_and_history(tmp_path) == weights_and_history(finished)
    assert read_history_csv(tmp_path) == common.read_checkpoint(tmp_path)["history"]


def test_averages_of_another_device_get_the_layout_of_their_parameter(copy_of_finished):
    networks = nn.ModuleList(build())  # contiguous, as on MPS; the checkpoint's averages are channels_last
    optimizer = torch.optim.AdamW(networks.parameters())
    common.load_checkpoint(copy_of_finished, optimizer=optimizer)
    for parameter, averages in optimizer.state.items():
        assert averages["exp_avg"].stride() == parameter.stride()


def test_ctrl_c_stops_after_the_epoch_and_names_the_command_that_resumes(
    few_images, saved_figures, monkeypatch, tmp_path, capsys
):
    monkeypatch.setattr(sys, "argv", ["a b/beta_vae.py"])
    monkeypatch.setattr(sys, "executable", "/usr/bin/python3.9")
    before_call(monkeypatch, common.Meter, "add", 5, ctrl_c)
    with pytest.raises(SystemExit, match="130"):
        beta_vae.main([*RUN, "--iw-samples=2", f"--out={tmp_path}"])
    output, error = capsys.readouterr()
    assert error == "\nstopping after this epoch; Ctrl-C again quits now\n"
    assert "stopped after 1 of 2 epochs; " in output
    quote = '"' if sys.platform == "win32" else "'"
    assert output.endswith(f": python3.9 {quote}a b/beta_vae.py{quote} --resume {tmp_path}\n")
    assert "samples.png" in saved_figures
    assert "iw_bound" not in read_metrics(tmp_path)["test"]


def test_ctrl_c_in_the_last_epoch_lets_the_run_finish(
    finished, few_images, saved_figures, monkeypatch, tmp_path
):
    before_call(monkeypatch, common.Meter, "add", 13, ctrl_c)
    out = beta_vae.main([*RUN, "--iw-samples=2", f"--out={tmp_path}/run"])
    assert weights_and_history(out) == weights_and_history(finished)
    assert "iw_bound" in read_metrics(out)["test"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_training_in_a_thread_leaves_signals_alone():
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(list, common.epochs_left([], 2)).result() == [1, 2]


def test_someone_elses_handler_of_ctrl_c_stays():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for _ in common.epochs_left([{}], 3):
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


@pytest.fixture
def copy_of_finished(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "copy"))


def test_device_data_and_bound_alone_may_change_in_a_resumed_run(copy_of_finished):
    stored = common.read_checkpoint(copy_of_finished)["args"]
    flags = [*RUN, *"--device=auto --data=elsewhere --iw-samples=2 --precision=auto".split()]
    args = beta_vae.parse_args([f"--resume={copy_of_finished}", *flags])
    changed = {"device": "auto", "data": "elsewhere", "iw_samples": 2}
    assert vars(args) == {**stored, **changed, "out": None, "resume": str(copy_of_finished)}


def test_a_flag_that_a_checkpoint_lacks_counts_as_its_default(copy_of_finished, capsys):
    checkpoint = common.read_checkpoint(copy_of_finished)
    del checkpoint["args"]["dataset"]
    torch.save(checkpoint, copy_of_finished / "checkpoint.pt")
    resume = [f"--resume={copy_of_finished}"]
    assert beta_vae.parse_args([*resume, "--dataset=MNIST"]).dataset == "MNIST"
    assert "--dataset is MNIST in that run" in refusal(beta_vae.main, [*resume, "--dataset=KMNIST"], capsys)


@parametrize(
    "content", [{"epoch": 1}, [1, 2], {"args": {}, "history": [], "environment": Path("code")}, None]
)
def test_a_damaged_checkpoint_is_refused(content, copy_of_finished, capsys):
    path = copy_of_finished / "checkpoint.pt"
    if content is None:
        path.write_bytes(path.read_bytes()[:-1000])
    else:
        torch.save(content, path)
    assert f"argument --resume: {path} is " in refusal(
        beta_vae.main, [f"--resume={copy_of_finished}"], capsys
    )


def parse_unusual_flags(argv):
    """The flags of a copied script, some of which argparse does not simply store."""
    parser = ArgumentParser()
    parser.add_argument("--resume")
    parser.add_argument("--mask", action="append", default=["first"])
    parser.add_argument("-v", action="count", default=0)
    parser.set_defaults(precision="fp32", batch_size=1, limit=1)
    return common.parse_args(parser, argv)


def test_the_same_command_resumes_a_run_whatever_its_flags_do(mnist, tmp_path):
    argv = [f"--resume={tmp_path}", "--mask=second", "-vv"]
    args = parse_unusual_flags(argv)
    assert args.mask == ["first", "second"]
    assert args.v == 2
    args.out = None
    common.save_checkpoint(tmp_path, [{"epoch": 1}], args, mnist)
    assert parse_unusual_flags(argv) == args
    assert parse_unusual_flags(argv[:2]) == args


@parametrize("value", [math.inf, Path("folder")])
def test_a_flag_whose_value_json_cannot_hold_is_refused_by_name(value, capsys):
    parser = ArgumentParser()
    parser.add_argument("--my-flag", default=value)
    error = refusal(partial(common.parse_args, parser), [], capsys)
    assert "argument --my-flag: " in error


# ---- Numbers and files of a run
def test_a_run_gets_its_bound_once_and_another_one_by_its_flag_alone(
    copy_of_finished, few_images, saved_figures, capsys
):
    checkpoint = common.read_checkpoint(copy_of_finished)
    checkpoint["args"]["iw_samples"] = 2  # as if it had been killed before its bound
    checkpoint["environment"]["device"] = "another"
    torch.save(checkpoint, copy_of_finished / "checkpoint.pt")
    for flags, samples in (([], 2), (["--iw-samples=3"], 3), ([], 3)):
        beta_vae.main([f"--resume={copy_of_finished}", *flags])
        metrics = read_metrics(copy_of_finished)
        assert metrics["test"]["iw_samples"] == samples
        assert metrics["environment"] == checkpoint["environment"]
    assert f"writing to {copy_of_finished}, resumed after epoch 2\n" in capsys.readouterr().out


@pytest.fixture
def own_run(mnist, tmp_path):
    """A run of one epoch whose loss has a term named mse."""
    row = {"epoch": 1, "seconds": 2.0, "test_mse": 3.0}
    (tmp_path / "metrics.json").write_text("{}")
    common.save_checkpoint(tmp_path, [row], vae.parse_args(SMALL), mnist)
    return tmp_path


def test_a_checkpoint_removes_metrics_of_fewer_epochs(own_run):
    assert visible_files(own_run).keys() == {"checkpoint.pt", "history.csv"}


def test_measurements_that_are_not_finite_or_terms_of_the_loss_are_left_out(own_run, capsys):
    common.save_metrics(own_run, {"mse": 0.5, "a": math.nan, "b": [1.0, math.inf], "c": 1})
    assert read_metrics(own_run)["test"] == {"mse": 3.0, "c": 1}
    left_out = "{} is not finite, so it is left out of metrics.json\n"
    assert capsys.readouterr().err == left_out.format("a") + left_out.format("b")


def test_a_term_that_some_epochs_lack_is_an_empty_cell(tmp_path):
    common.write_history(tmp_path, [{"epoch": 1, "a": 2}, {"epoch": 2, "b": 3}])
    assert (tmp_path / "history.csv").read_bytes() == b"epoch,a,b\n1,2,\n2,,3\n"


def test_a_locked_history_csv_is_reported_and_does_not_end_training(mnist, tmp_path, monkeypatch, capsys):
    def locked():
        raise PermissionError("open in Excel")

    before_call(monkeypatch, os, "replace", 4, locked)
    _, history = train(mnist, tmp_path)
    assert capsys.readouterr().err == "history.csv was not written: open in Excel\n"
    common.load_checkpoint(tmp_path)
    assert read_history_csv(tmp_path) == history


def test_folders_are_numbered_from_the_second_on(tmp_path):
    names = [common.free_folder(tmp_path / "a" / "b").name for _ in range(3)]
    assert names == ["b", "b-2", "b-3"]


# ---- Refusals
NOT_WHOLE = "0 -1 1.5 two nan inf 1e3 99999999999999"
NOT_FINITE = "-1 nan inf -inf 1e999 two"
BAD_VALUES = {
    "--epochs": NOT_WHOLE,
    "--latent-dim": NOT_WHOLE,
    "--iw-samples": NOT_WHOLE,
    "--batch-size": NOT_WHOLE,
    "--limit": f"{NOT_WHOLE} 60001",
    "--seed": "-1 1.5 two nan inf 1e3 4294967296",
    "--lr": f"0 {NOT_FINITE}",
    "--beta": f"0 {NOT_FINITE}",
    "--warmup": NOT_FINITE,
    "--capacity": NOT_FINITE,
    "--precision": "other",
    "--recon": "other",
    "--dataset": "other",
    "--device": "gpu xpu hpu cuda:99 cuda:-1 cuda:x meta cuda:99999999999999999999",
    "--none": "3",
    "--epoch": "3",  # no abbreviations
}


@parametrize("flag", BAD_VALUES)
def test_a_bad_value_is_refused_with_its_flag(flag, few_images, capsys):
    for value in BAD_VALUES[flag].split():
        error = refusal(beta_vae.main, [f"{flag}={value}"], capsys)
        assert flag in error
        assert value in error


@pytest.fixture
def folder_of_many(finished, few_images, tmp_path):
    """Holds a run, files of other runs, and files with the names `file` and `runs`."""
    shutil.copytree(finished, tmp_path / "run")
    for name in "png/a.png pdf/a.pdf csv/history.csv json/metrics.json file runs".split():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
    return tmp_path


REFUSED = """\
vae --beta=3: unrecognized arguments: --beta
ae --binarize: unrecognized arguments: --binarize
vae --batch-size=257 --limit=256: argument --batch-size: 257 is more than 256 training images
beta_vae --warmup=3 --epochs=2: argument --warmup: 3 epochs in a run of 2
vae --iw-samples=3: argument --iw-samples: gray pixels have no likelihood
beta_vae --iw-samples=3: argument --iw-samples: gray pixels have no likelihood
ae --hidden-dims 4 8 8: argument --hidden-dims: expected 4 arguments
ae --hidden-dims 4 8 8 0: argument --hidden-dims: '0' is not a whole number
ae --out=: argument --out: '' is not the name of a folder
ae --resume=: argument --resume: '' is not the name of a folder
ae --data=: argument --data: '' is not the name of a folder
ae --out a --resume b: argument --resume: not allowed with argument --out
vae --out a --resume b: argument --resume: not allowed with argument --out
beta_vae --out a --resume b: argument --resume: not allowed with argument --out
vae --resume run: argument --resume: the run in run is one of beta_vae.py, not of vae.py
beta_vae --resume run --seed 8: --seed is 7 in that run; for another value, start a new run
beta_vae --resume run --precision bf16: --precision is fp32 in that run
beta_vae --resume run --dataset KMNIST: --dataset is MNIST in that run
beta_vae --resume run --limit 511: --limit is 512 in that run
beta_vae --resume run --latent-dim 6: --latent-dim is 5 in that run
beta_vae --resume run --hidden-dims 4 8 8 8: --hidden-dims is [4, 8, 8, 16] in that run
beta_vae --resume run --recon bce: --recon is mse in that run
beta_vae --resume run --epochs 3: --epochs is 2 in that run
beta_vae --resume run --batch-size 32: --batch-size is 64 in that run
beta_vae --resume run --lr 2e-3: --lr is 0.001 in that run
beta_vae --resume run --beta 3: --beta is 4.0 in that run
beta_vae --resume run --warmup 1: --warmup is 0.0 in that run
beta_vae --resume run --capacity 1: --capacity is 0.0 in that run
beta_vae --resume run --binarize: --binarize is False in that run
vae --out run: argument --out: run holds
vae --resume png: argument --resume: png holds a.png
vae --out pdf: argument --out: pdf holds a.pdf
vae --out csv: argument --out: csv holds history.csv
vae --out json: argument --out: json holds metrics.json
vae --out file: file
vae --resume file/below: below
vae: runs"""  # a file has this name


@parametrize("command_and_reason", REFUSED.splitlines())
def test_what_cannot_be_done_is_refused_with_the_reason(
    command_and_reason, folder_of_many, monkeypatch, capsys
):
    command, reason = command_and_reason.split(": ", maxsplit=1)
    script, *flags = command.split()
    monkeypatch.chdir(folder_of_many)
    before = sorted(folder_of_many.rglob("*")), visible_files("run")
    assert reason in refusal(sys.modules[script].main, [*SMALL, *flags], capsys)
    assert (sorted(folder_of_many.rglob("*")), visible_files("run")) == before


@each_vae
@parametrize("flags", ["--limit=64", "--iw-samples=3 --binarize", "--iw-samples=3 --recon=mse"])
def test_the_least_that_is_enough_is_accepted(script, flags):
    script.parse_args([*SMALL, *flags.split()])
    beta_vae.parse_args([*SMALL, "--epochs=2", "--warmup=2"])


def test_help_has_a_usage_line_and_no_default_of_none(capsys):
    with pytest.raises(SystemExit):
        beta_vae.parse_args(["--help"])
    text = capsys.readouterr().out
    assert text.startswith("usage: beta_vae.py ")
    assert "batches and noise (default: 0)" in " ".join(text.split())
    assert "None" not in text
    assert "False" not in text


# ---- Data
@pytest.fixture
def requests(monkeypatch):
    """What mirrors are asked for; only the last of MNIST's has anything, and another one fails."""
    requests = []
    first, *_, last = torchvision.datasets.MNIST.mirrors

    def download_url(url, root, filename=None, md5=None):
        requests.append((url, md5))
        if url.startswith(first):
            raise OSError("no route")
        if url != f"{last}{filename}":
            raise RuntimeError(f"nothing at {url}")
        shutil.copy(ROOT / "data" / "MNIST" / "raw" / filename, root)

    monkeypatch.setattr(common, "download_url", download_url)
    return requests


@parametrize("last_byte", [b"", b"?"])
def test_a_damaged_archive_is_named_and_neither_trained_on_nor_replaced(
    last_byte, requests, tmp_path, capsys
):
    raw = Path(shutil.copytree(ROOT / "data" / "MNIST" / "raw", tmp_path / "MNIST" / "raw"))
    archive = raw / "train-images-idx3-ubyte.gz"
    archive.write_bytes(archive.read_bytes()[:-1] + last_byte)
    (raw / "t10k-labels-idx1-ubyte.gz").unlink()
    before = visible_files(raw)
    error = refusal(vae.main, [*SMALL, f"--data={tmp_path}", f"--out={tmp_path}/out"], capsys)
    assert f" {archive.name}: damaged" in error
    assert visible_files(raw) == before
    assert not requests


def test_missing_archives_come_from_the_first_mirror_that_has_them(requests, tmp_path):
    source = torchvision.datasets.MNIST
    common.load_data(tmp_path)
    assert requests == [(mirror + name, md5) for name, md5 in source.resources for mirror in source.mirrors]
    assert visible_files(tmp_path / "MNIST" / "raw") == visible_files(ROOT / "data" / "MNIST" / "raw")


def test_an_archive_is_put_into_place_in_one_step(requests, tmp_path, monkeypatch):
    before_call(monkeypatch, os, "replace", 1, sys.exit)
    pytest.raises(SystemExit, common.load_data, tmp_path)
    assert visible_files(tmp_path / "MNIST" / "raw") == {}


def test_data_are_those_of_mnist_on_the_device_and_limited(mnist):
    assert mnist.train_labels[:5].tolist() == [5, 0, 4, 1, 9]
    _, *parts = common.load_data(ROOT / "data", device="meta", limit=70)
    assert [len(part) for part in parts] == [70, 70, 10_000, 10_000]
    assert all(part.is_meta for part in parts)


@parametrize("name", ["FashionMNIST", "KMNIST"])
def test_a_failed_download_gives_a_reason_and_leaves_no_folder(name, requests, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))  # the home folder on Windows
    flags = [*SMALL, "--epochs=1", f"--dataset={name}", "--data=~/new", "--out=~/out"]
    source = getattr(torchvision.datasets, name)
    path = tmp_path / "new" / name / "raw" / source.resources[0][0]
    reason = f"nothing at {source.mirrors[-1]}{path.name}"
    assert f"{path} is missing and cannot be downloaded: {reason}" in refusal(vae.main, flags, capsys)
    assert not any(tmp_path.iterdir())


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege there")
def test_data_are_found_next_to_the_code_that_a_link_names(tmp_path):
    link = tmp_path / "common.py"
    link.symlink_to(ROOT / "common.py")
    assert runpy.run_path(str(link))["DATA"] == ROOT / "data"


# ---- The README's own model
@pytest.fixture
def iwae(tmp_path, monkeypatch):
    """The README's IWAE: a copy of vae.py with another loss, a flag, and a likelihood with a name."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    text = (ROOT / "vae.py").read_text(encoding="utf-8")
    end = "    args = common.parse_args("
    likelihood = '    parser.set_defaults(recon="Gaussian, one learned variance")\n'
    changes = {
        inspect.getsource(vae.vae_loss): re.search(r"```python\n([^`]*iwae_loss[^`]*)```", readme)[1],
        "vae_loss": "iwae_loss",
        end: likelihood + end,
        ", kind=args.recon": "",
        'labels = {"': 'labels = {"bound": "bound (nats)", "',
    }
    for old, new in changes.items():
        assert old in text, f"vae.py has no {old!r}"
        text = text.replace(old, new)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Path("iwae.py").write_text(text, encoding="utf-8")
    return importlib.import_module("iwae")


def test_the_readmes_own_model_keeps_its_name_and_draws_its_bound(iwae, few_images, saved_figures):
    out = iwae.main([*SMALL, "--epochs=1"])
    args = read_metrics(out)["args"]
    assert out == Path("runs", "iwae")
    assert args["script"] == "iwae.py"
    assert args["recon"] == "Gaussian, one learned variance"
    panels = [ax.get_ylabel() for ax in saved_figures["loss_curves.png"].axes]
    assert panels == ["bound (nats)", "ELBO (nats)", "recon (nats)", "KL (nats)"]
