"""Tests of ae.py, vae.py, beta_vae.py and common.py: identities, behaviour, and whole runs on MNIST."""

import contextlib
import csv
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
NARROW = [4, 8, 8, 16]  # channels of a model that trains in milliseconds
QUICK = "--limit 1280 --batch-size 64 --latent-dim 5 --hidden-dims 4 8 8 16 --device cpu --data".split()
QUICK.append(str(ROOT / "data"))


@pytest.fixture(scope="module")
def mnist():
    """The first 512 training and 300 test images: no multiple of the evaluation's batch."""
    data = common.load_mnist(ROOT / "data", limit=512)
    return data._replace(test_images=data.test_images[:300], test_labels=data.test_labels[:300])


def build(model_name="VAE", seed=0):
    torch.manual_seed(seed)
    return common.Encoder(NARROW, 5, model_name), common.Decoder(5, NARROW)


def train(data, out, *flags, seed=0, epochs=2, loss_fn=vae.vae_loss, progress=None):
    """A short run; returns its models and history."""
    parser = common.make_parser("vae", vae.__doc__)
    common.add_likelihood_flags(parser)
    args = parser.parse_args([*QUICK, f"--epochs={epochs}", f"--seed={seed}", *flags])
    models = build("AE" if loss_fn is ae.ae_loss else "VAE", seed)
    models = [model.to(data.train_images.device) for model in models]
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
    own = codes.view(60, 10, 4)  # (images, digits, latent_dim)
    within = (own - own.mean(dim=0)).flatten(0, 1).T.cov(correction=0)
    values, vectors = torch.linalg.eig(torch.linalg.solve(within, own.mean(dim=0).T.cov(correction=0)))
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
    x, padded, (encoder, decoder) = torch.rand(2, 1, 28, 28), [], build("AE")
    encoder.model.register_forward_pre_hook(lambda _, inputs: padded.append(inputs[0]))
    encoder(x)
    assert padded[0].shape == (2, 1, 32, 32) and padded[0].count_nonzero() == x.count_nonzero()
    decoder.expand_dim = 32
    decoder.input_layer = decoder.decoder = decoder.last_layer[0] = torch.nn.Identity()
    assert torch.equal(decoder.logits(padded[0].flatten(1)), x)


def test_a_bias_added_apart_gives_the_images_and_gradients_of_torchs_own_layer():
    torch.manual_seed(0)
    layer = torch.nn.ConvTranspose2d(6, 3, 4, stride=2, padding=1, output_padding=1, groups=3, dilation=2).double()
    results = []
    for mode in (common.BiasApart(), contextlib.nullcontext()):
        z = torch.randn(2, 6, 5, 5, generator=torch.Generator().manual_seed(0)).double().requires_grad_()
        with mode:
            images = layer(z)
        (images * torch.linspace(-1, 1, images.numel()).view_as(images)).sum().backward()
        results.append([images, z.grad, layer.weight.grad, layer.bias.grad])
        layer.zero_grad()
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
        (tests if torch.is_inference_mode_enabled() else steps).append(progress.item())
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

    once = common.binarise(mnist.train_images)
    assert torch.equal(once, common.binarise(mnist.train_images)) and set(once.unique().tolist()) == {0, 255}
    assert common.to_pixels(once).mean().item() == pytest.approx(pixels.mean().item(), abs=0.002)
    data = common.load_mnist(ROOT / "data", limit=512, binarize=True)
    assert torch.equal(data.test_images[:300], common.binarise(data.test_images)[:300])
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
def test_convolutions_are_laid_out_for_the_cpu_and_left_alone_on_mps(kind, mnist, tmp_path, monkeypatch):
    adam, models = Mock(side_effect=NotImplementedError), build()  # as far as a machine without MPS can go
    monkeypatch.setattr(torch.optim, "AdamW", adam)
    with pytest.raises(NotImplementedError):
        data = mnist._replace(train_images=Mock(device=torch.device(kind)))
        common.train_model(*models, data, vae.vae_loss, Mock(precision="auto"), tmp_path)
    kernel = models[0].model[2].weight
    assert kernel.is_contiguous(memory_format=torch.channels_last) == (kind == "cpu")
    assert adam.call_args.kwargs["fused"]


def test_a_terminal_sees_one_line_in_place_and_a_file_one_line_an_epoch(mnist, tmp_path, monkeypatch, capsys):
    train(mnist, tmp_path, "--batch-size=8", epochs=2)
    assert [line.split("  ")[0] for line in capsys.readouterr().out.splitlines()] == ["epoch 1/2", "epoch 2/2"]
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    train(mnist, tmp_path, "--batch-size=8", epochs=2)  # 64 steps an epoch: a line after the 50th and after the last
    output = capsys.readouterr().out
    assert output.count("\r") == 4 and output.count("\n") == 1 and output.endswith("\n")


@pytest.mark.parametrize("has", ["amx_tile", "avx512_bf16", None])
def test_bfloat16_is_taken_where_the_chosen_device_has_it_or_where_it_is_asked_for(has, monkeypatch):
    for name in ("amx_tile", "avx512_bf16"):
        monkeypatch.setattr(torch.cpu, f"_is_{name}_supported", lambda name=name: name == has)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: [(7, 5), (8, 0)][device.index])
    cpu, *others = map(torch.device, ("cpu", "mps", "cuda:0", "cuda:1"))
    reason = {"amx_tile": "native: AMX", "avx512_bf16": "native: AVX512-BF16", None: "no native bfloat16"}[has]
    assert common.pick_precision(cpu) == ("bfloat16" if has else "float32", reason)
    assert [common.pick_precision(other)[0] for other in others] == ["float32", "float32", "bfloat16"]
    for asked, given in {"bf16": "bfloat16", "fp32": "float32"}.items():
        assert common.pick_precision(cpu, asked) == (given, "as asked")


def test_a_gpu_that_cannot_work_is_left_by_auto_with_the_reason_and_refused_by_name(tmp_path, monkeypatch, capsys):
    one, cpu = Mock(device=torch.device("cuda:1")), torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "ones", lambda size, device: one)
    assert common.pick_device() == common.pick_device("cuda:1") == (torch.device("cuda:1"), "")
    one.add.return_value.item.side_effect = RuntimeError("CUDA error: no kernel image is available\nCompile with")
    reason = "cuda cannot be used: CUDA error: no kernel image is available"
    assert common.pick_device() == (cpu, f" ({reason})")
    error = ends(vae.main, ["--device", "cuda"], capsys)
    assert error == f"vae.py: error: argument --device: {reason} (take auto, cpu, cuda, cuda:N or mps)\n"
    monkeypatch.undo()  # torch itself would now look for that GPU
    monkeypatch.setattr(common, "pick_device", lambda name: (cpu, f" ({reason})"))
    ae.main([*QUICK, "--epochs=1", "--precision=fp32", "--out", str(tmp_path / "run")])
    assert capsys.readouterr().out.startswith(f"cpu ({reason}), float32 (as asked), writing to")


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


@pytest.mark.parametrize("steps", [0, 2], ids=["fresh", "resumed"])
@pytest.mark.parametrize("fails", [False, True])
def test_capturing_a_graph_leaves_weights_and_optimizer_as_they_were(fails, steps, mnist, monkeypatch, capsys):
    cuda, x, results = MagicMock(), common.to_pixels(mnist.train_images[:32]), []
    for name in ("default_generators", "CUDAGraph", "Stream", "current_stream", "stream", "graph", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, getattr(cuda, name))
    cuda.stream.return_value.__exit__.return_value = cuda.graph.return_value.__exit__.return_value = False
    if fails:
        cuda.graph.return_value.__exit__.side_effect = RuntimeError("CUDA error: capture failed\nCompile with")

    def step():
        optimizer.zero_grad()
        vae.vae_loss(*models, x)[0].backward()
        optimizer.step()

    for capture in (True, False):
        models = build()
        parameters = [parameter for model in models for parameter in model.parameters()]
        optimizer = torch.optim.Adam(parameters, lr=1e-2)
        for number in range(steps + 3):
            if capture and number == steps:
                graphed = common.as_cuda_graph(step, parameters, optimizer)
                assert graphed is (step if fails else cuda.CUDAGraph.return_value.replay)
            torch.manual_seed(number)
            step()
        results.append(weights(*models))
    assert torch.equal(*results)
    assert capsys.readouterr().out == fails * "no CUDA graph, so training is slower: CUDA error: capture failed\n"
    assert cuda.default_generators.__getitem__.return_value.graphsafe_set_state.called == fails


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_cuda_graph_gives_the_losses_of_the_eager_step(precision, tmp_path, monkeypatch):
    data = common.load_mnist(ROOT / "data", torch.device("cuda:0"), limit=4096)
    *_, graphed = train(data, tmp_path, "--precision", precision, epochs=3)
    monkeypatch.setattr(common, "as_cuda_graph", lambda step, parameters, optimizer: step)
    *_, eager = train(data, tmp_path, "--precision", precision, epochs=3)
    for one, other in zip(graphed, eager):
        assert one["lr"] == other["lr"]
        for name in ("train_loss", "test_elbo"):
            assert one[name] == pytest.approx(other[name], rel=0.01)


# ---- Whole runs, each in a process of its own, on the real images --------------------------------

FIGURES = ["reconstructions", "samples", "interpolations", "loss_curves", "latent_space"]
LATENT_FIGURES = [*FIGURES, "traversals", "kl_per_dimension"]
TERMS = ["loss", "recon", "kl", "elbo"]


@pytest.mark.parametrize(
    "script, flags, figures, terms",
    [
        (ae, "--recon mse", FIGURES, TERMS[:2]),
        (vae, "--binarize --iw-samples 3", LATENT_FIGURES, TERMS),
        (beta_vae, "--capacity 5 --warmup 0.5 --latent-dim 2", [*LATENT_FIGURES, "manifold"], TERMS),
    ],
)
def test_a_script_leaves_every_figure_and_the_numbers_of_the_model_it_saved(script, flags, figures, terms, tmp_path):
    small = "--epochs 1 --limit 512 --hidden-dims 8 16 16 32 --device cpu --data".split()
    done = run_process([ROOT / f"{script.__name__}.py", *flags.split(), *small, ROOT / "data"], tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    out = tmp_path / "runs" / script.__name__
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

    (row,) = csv.DictReader((out / "history.csv").open())
    names = [f"{split}_{term}" for split in ("train", "test") for term in terms]
    assert list(row) == ["epoch", "lr", *names, "seconds"]
    assert all(math.isfinite(float(value)) for value in row.values())

    metrics = json.loads((out / "metrics.json").read_text())
    assert set(metrics) == {"args", "protocol", "test", "train", "environment"}
    test, protocol, binarize = metrics["test"], metrics["protocol"], "--binarize" in flags
    assert protocol["pixels"] == ("binarised" if binarize else "grey") and protocol["K"] == (3 if binarize else None)
    assert protocol["recon"].startswith("Gaussian" if "mse" in flags else "Bernoulli")
    encoder, decoder, args = common.load_model(out)
    assert metrics["train"]["parameters"] == weights(encoder, decoder).numel()
    data = common.load_mnist(ROOT / "data", limit=512, binarize=binarize)
    if binarize:
        data = data._replace(train_images=common.binarise(data.train_images))
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


@pytest.mark.parametrize("script", [vae, beta_vae], ids=["vae", "beta_vae"])
def test_active_units_are_those_whose_mean_varies_over_images(script, tmp_path, monkeypatch):
    scales = torch.tensor([1, 0.2, 0.05, 0.02, 0])  # variances of 1, 0.04, and of less than 0.01
    codes = {size: (3 + scales * torch.randn(size, 5), torch.zeros(size, 5)) for size in (1280, 10_000)}
    monkeypatch.setattr(common, "encode", lambda encoder, images: codes[len(images)])
    script.main([*QUICK, "--epochs=1", "--out", str(tmp_path / "run")])
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["test"]["active_units"] == 2


# ---- Nothing lost: kills, full disks, damage, two runs at once -----------------------------------

DIE = """
import os, signal, common, vae
signal.signal(signal.SIGINT, signal.default_int_handler)  # which shells take from what they run in the background
calls, real = 0, {target}
def dying(*args, **kwargs):
    global calls
    calls += 1
    if calls == {call}:
        os.kill(os.getpid(), signal.{signal})
    return real(*args, **kwargs)
{target} = dying
vae.main({argv!r})
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_a_killed_and_resumed_run_equals_one_that_was_not(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    vae.main([*QUICK, "--epochs", "4", "--out", str(whole)])
    argv = [*QUICK, "--epochs", "4", "--resume", "killed"]  # one command line starts and goes on
    for code, epoch, name, target, call in (
        (-9, 0, "SIGKILL", "common.to_pixels", 3),  # in the first epoch: no checkpoint yet
        (130, 0, "SIGINT", "common.to_pixels", 5),  # nor here: nothing to draw
        (-9, 0, "SIGKILL", "common.os.replace", 2),  # a checkpoint written, but not yet moved into place
        (-9, 1, "SIGKILL", "common.os.replace", 3),  # in place, with the history one epoch behind
        (-9, 1, "SIGKILL", "common.to_pixels", 27),  # in the middle of an epoch
        (130, 2, "SIGINT", "common.to_pixels", 70),  # after the next
    ):
        done = run_process(["-c", DIE.format(signal=name, target=target, call=call, argv=argv)], tmp_path)
        assert done.returncode == code, done.stderr
        if code == 130:
            assert done.stderr == "vae.py: interrupted; go on with: python vae.py --resume killed\n"
        assert (read_checkpoint(killed)["epoch"] if (killed / "checkpoint.pt").exists() else 0) == epoch
        assert (killed / "samples.png").exists() == (code == 130 and epoch > 0), "Ctrl-C draws what was trained"
    assert json.loads((killed / "metrics.json").read_text())["train"]["epochs"] == 2

    vae.main(["--resume", str(killed)])  # with its own flags
    one, other = read_checkpoint(whole), read_checkpoint(killed)
    for part in ("encoder", "decoder"):
        assert all(torch.equal(tensor, other[part][name]) for name, tensor in one[part].items())
    assert timeless(one["history"]) == timeless(other["history"]) and len(one["history"]) == 4
    assert {file.name for file in whole.iterdir()} == {file.name for file in killed.iterdir()}


def test_ctrl_c_goes_back_to_the_last_checkpoint_or_ends_where_there_is_none(mnist, tmp_path):
    def interrupted(encoder, decoder, x):
        calls.append(x)
        if len(calls) == stop:
            raise KeyboardInterrupt
        return vae.vae_loss(encoder, decoder, x)

    stop, calls = 5, []  # in the first epoch, of 8 steps and 2 batches of test images
    with pytest.raises(KeyboardInterrupt):
        train(mnist, tmp_path, loss_fn=interrupted)
    assert not (tmp_path / "checkpoint.pt").exists()
    stop, calls = 15, []  # in the second
    *models, history = train(mnist, tmp_path, loss_fn=interrupted)
    *reference, args = common.load_model(tmp_path)
    assert len(history) == read_checkpoint(tmp_path)["epoch"] == 1
    assert torch.equal(weights(*models), weights(*reference))
    assert (args.latent_dim, args.hidden_dims, reference[0].model_name) == (5, NARROW, "VAE")


def test_resume_keeps_flags_that_are_absent_zero_or_without_a_value_and_takes_new_ones(tmp_path, capsys):
    run = tmp_path / "run"
    beta_vae.main([*QUICK, *"--binarize --capacity 0 --seed 7 --lr 1e-3 --epochs 1 --out".split(), str(run)])
    kept = {"binarize": True, "capacity": 0, "seed": 7, "lr": 1e-3, "hidden_dims": NARROW, "limit": 1280}
    assert {**read_checkpoint(run)["args"], **kept, "iw_samples": None, "epochs": 1} == read_checkpoint(run)["args"]
    beta_vae.main(["--resume", str(run), "--epochs", "2", "--iw-samples", "2"])
    assert {**read_checkpoint(run)["args"], **kept, "iw_samples": 2, "epochs": 2} == read_checkpoint(run)["args"]
    assert "iw_bound" in json.loads((run / "metrics.json").read_text())["test"]
    for flag, value in {"latent-dim": "6", "hidden-dims": "4 8 8 8", "out": "elsewhere"}.items():
        error = ends(beta_vae.main, ["--resume", run, f"--{flag}", *value.split()], capsys)
        assert flag in error.replace("_", "-")
    assert "has script beta_vae.py, not vae.py" in ends(vae.main, ["--resume", run], capsys)


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


def test_a_full_disk_leaves_the_last_checkpoint_and_one_line(tmp_path, monkeypatch, capsys):
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


def test_divergence_names_the_term_and_keeps_the_last_good_checkpoint(mnist, tmp_path, capsys):
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
        if filename in served:
            (Path(root) / filename).write_bytes(served[filename])
        elif not common.check_integrity(Path(root) / filename, md5):
            raise RuntimeError("no network")

    monkeypatch.setattr("torchvision.datasets.utils.download_url", download)
    return raw, served


@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing"])
def test_a_bad_archive_is_named_and_never_trained_on(damage, archives, capsys):
    raw, _ = archives
    archive, root = raw / "train-images-idx3-ubyte.gz", raw.parents[1]
    content = bytearray(archive.read_bytes())
    content[5_000_000] ^= damage == "flipped"
    archive.unlink()
    if damage != "missing":
        archive.write_bytes(content[:-5] if damage == "truncated" else content)
    error = ends(vae.main, ["--data", root, "--out", root / "out"], capsys)
    assert archive.name in error and str(raw) in error and "t10k" not in error
    assert not (root / "out").exists()


def test_a_missing_archive_is_downloaded_and_kept_and_unpacked_files_are_never_read(archives):
    raw, served = archives
    labels = raw / "t10k-labels-idx1-ubyte.gz"
    content = served[labels.name] = labels.read_bytes()
    labels.unlink()
    for archive in raw.glob("*.gz"):
        archive.with_suffix("").write_bytes(bytes([0, 0, 8, 3, 0, 0, 234, 96, 0, 0, 0, 28, 0, 0, 0, 28]))
    data = common.load_mnist(raw.parents[1])
    assert labels.read_bytes() == content and len(data.train_images) == 60_000 and len(data.test_images) == 10_000
    assert data.train_images.float().mean().item() == pytest.approx(33.3184, abs=1e-3)
    assert data.train_labels[:5].tolist() == [5, 0, 4, 1, 9] and data.test_labels[:3].tolist() == [7, 2, 1]


def test_two_runs_never_get_one_folder(tmp_path, monkeypatch, capsys):
    fcntl = pytest.importorskip("fcntl", reason="needs locks")
    monkeypatch.chdir(tmp_path)
    args = common.make_parser("vae", vae.__doc__).parse_args([])
    with ThreadPoolExecutor(8) as pool:
        claims = list(pool.map(common.claim_folder, [args] * 8))
    assert {str(folder) for folder, _ in claims} == {"runs/vae", *(f"runs/vae-{i}" for i in range(2, 9))}
    for flag in ("--out", "--resume"):
        assert "another run writes to runs/vae now" in ends(vae.main, [*QUICK, flag, "runs/vae"], capsys)
    # As on Lustre and NFS: goes on without a lock.
    monkeypatch.setattr(fcntl, "flock", Mock(side_effect=OSError("No locks available")))
    args.resume = "runs/vae"
    for claim in (*claims, common.claim_folder(args)):
        claim[1].close()
    assert [file.name for file in Path("runs/vae").iterdir()] == [".lock"]


# ---- Refusals -----------------------------------------------------------------------------------

WHOLE = ["0", "-1", "1.5", "two", "nan", "inf", "1e3", "99999999999999999999"]
REAL = ["0", "-1", "nan", "inf", "-inf", "1e999", "two"]
VALUES = {
    # Refused by scripts that have them for their value, by the others for the flag.
    **dict.fromkeys(["--epochs", "--latent-dim", "--iw-samples"], WHOLE),
    **dict.fromkeys(["--lr", "--beta"], REAL),
    "--batch-size": [*WHOLE, "257 --limit 256"],
    "--limit": [*WHOLE, "60001"],
    "--seed": WHOLE[1:],
    "--warmup": [*REAL[1:], "21 --epochs 20"],
    "--capacity": REAL[1:],
    "--hidden-dims": ["4 8 8", "4 8 8 0", "4 8 8 nan", "4 8 8 16 32"],
    "--precision": ["fp16"],
    "--recon": ["l1"],
    "--device": "gpu xpu hpu cuda:99 cuda:-1 cuda:x mps:7 meta cuda:99999999999999999999".split(),
    "--out": ["file", "file/below", "occupied", "occupied --data file", "x" * 300],  # before the data is looked at
    "--resume": ["file", "file/below", "x" * 300],
    **dict.fromkeys(["--no-such-flag", "--epoch"], ["3"]),
}


@pytest.mark.parametrize("script", [ae, vae, beta_vae], ids=["ae", "vae", "beta_vae"])
@pytest.mark.parametrize("flag", VALUES)
def test_bad_input_is_refused_in_one_line_and_writes_nothing(script, flag, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("a file")
    (tmp_path / "occupied").mkdir()
    (tmp_path / "occupied" / "metrics.json").write_text("{}")
    before = sorted(tmp_path.rglob("*"))
    for value in VALUES[flag]:
        error = ends(script.main, ["--data", ROOT / "data", flag, *value.split()], capsys)
        assert flag in error or "unrecognized arguments: 32" in error  # a fifth width
        assert sorted(tmp_path.rglob("*")) == before


# ---- Tools --------------------------------------------------------------------------------------


def make_run(folder, script="vae.py", seed=0, pixels="grey", epochs=2, k=None, test=(), **args):
    """A metrics.json as a finished run leaves it, with numbers of one's own; returns the folder."""
    numbers = {"recon": 70.0, "probe_accuracy": 0.9, "mse": 0.01, "pca_mse": 0.02, "pca_probe_accuracy": 0.8}
    run = {
        "args": {"epochs": 2, "seed": seed, "iw_samples": k, "latent_dim": 5, "out": str(folder), **args},
        "protocol": {"pixels": pixels, "recon": "Bernoulli", "split": "60000", "K": k},
        "test": {**numbers, "pixel_probe_accuracy": 0.86, **dict(test)},
        "train": {"epochs": epochs},
        "environment": {"script": script, "precision": "float32"},
    }
    folder.mkdir()
    (folder / "metrics.json").write_text(json.dumps(run))
    return str(folder)


def test_runs_that_differ_in_seed_alone_are_one_row_and_other_protocols_have_tables_of_their_own(tmp_path, capsys):
    runs = [make_run(tmp_path / f"ae{seed}", "ae.py", seed, test={"recon": 50 + seed}) for seed in (0, 1, 2)]
    for beta, seed, kl in ((4.0, 0, 10), (4.0, 1, 13), (8.0, 0, 6)):
        terms = {"recon": 80, "kl": kl, "elbo": -80 - kl, "active_units": 3}
        runs.append(make_run(tmp_path / f"b{beta}-{seed}", "beta_vae.py", seed, beta=beta, test=terms))
    for k in (50, 500):
        test = {**terms, "iw_bound": -k / 10}
        runs.append(make_run(tmp_path / f"k{k}", k=k, pixels="binarised", latent_dim=k, test=test))
    compare_runs.main([*runs, "--out", str(tmp_path)])
    first, second = capsys.readouterr().out.split("\nMNIST")[1:]
    grey, binarised = ([line for line in part.splitlines() if line[0:1] == "|"] for part in (first, second))
    assert grey[0] == "| model | seeds | recon | KL | ELBO | active units | probe % | 1000 MSE |" and len(grey) == 7
    assert grey[2].startswith("| AE | 3 | 51.00 ± 1.00 |  |  |")
    row = "| beta-VAE, beta = 4 | 2 | 80.00 ± 0.00 | 11.50 ± 2.12 | -91.50 ± 2.12 | 3.0 ± 0.0 | 90.0 ±"
    assert grey[3].startswith(row)
    assert grey[4].startswith("| beta-VAE, beta = 8 | 1 | 80.00 | 6.00 | -86.00 | 3.0 | 90.0 | 10.00 |")
    assert grey[5] == "| PCA, 5 components |  |  |  |  |  | 80.0 | 20.00 |"
    assert "ELBO | IW bound, K = 50 | IW bound, K = 500 | active" in binarised[0]
    assert binarised[2].startswith("| VAE, iw_samples 50, latent_dim 50 | 1 |") and "| -5.00 |  |" in binarised[2]
    tex = (tmp_path / "comparison.tex").read_text()
    assert r"$\beta$-VAE, $\beta = 4$ & $80.00$ & $11.50$ & $-91.50$" in tex and tex.count(r"\toprule") == 2
    assert r"\scriptsize $n = 2$ & \scriptsize $\pm$0.00 & \scriptsize $\pm$2.12 & \scriptsize $\pm$2.12" in tex
    assert imread(tmp_path / "rate_distortion.png").std() > 0.01


def test_the_table_and_the_figure_fit_a_column_of_a_paper(tmp_path):
    terms = {"recon": 97.97, "kl": 10.05, "elbo": -108.02, "active_units": 10, "mse": 0.01446, "iw_bound": -104.5}
    test = {"pixels": "binarised", "k": 500, "test": terms}
    runs = [make_run(tmp_path / f"v{seed}", seed=seed, **test) for seed in range(3)]
    for i in range(9):
        more = {"beta": (0.5, 4.0, 8.0)[i // 3], "latent_dim": 9, **test}
        runs.append(make_run(tmp_path / f"b{i}", "beta_vae.py", i % 3, **more))
    compare_runs.main([*runs, "--out", str(tmp_path)])
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


def test_what_is_no_finished_run_is_refused_in_one_line(tmp_path, capsys):
    good, twice = make_run(tmp_path / "good"), make_run(tmp_path / "twice")
    for bad in (make_run(tmp_path / "stopped", epochs=1, seed=5), twice, str(tmp_path), str(tmp_path / "none")):
        assert bad in ends(compare_runs.main, [good, bad, "--out", tmp_path], capsys)
    assert not (tmp_path / "comparison.tex").exists()


def test_both_loops_of_the_benchmark_train_and_report_their_rates(capsys):
    args = benchmark.default_args(f"--epochs 1 --limit 256 --hidden-dims 4 8 8 16 --data {ROOT / 'data'}")
    rate, memory = benchmark.textbook(args, torch.device("cpu"))
    our_rate, our_memory, seconds, loss = benchmark.ours(args, torch.device("cpu"), test_images=10)
    assert min(rate, memory, our_rate, our_memory, seconds) > 0 and 100 < loss < 1000
    assert benchmark.count_flops(benchmark.default_args("")) == 191_774_720  # an image's, counted by hand
    assert "gpu cannot be used" in ends(benchmark.main, ["--device", "gpu"], capsys)
