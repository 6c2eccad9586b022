"""Tests of ae.py, vae.py, beta_vae.py, common.py and tools: science, training, figures, runs, refusals."""

import importlib
import inspect
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
from unittest.mock import Mock

import matplotlib.image
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch.distributions import Bernoulli, MultivariateNormal, Normal, kl_divergence

import ae
import beta_vae
import common
import vae
from tools import benchmark, compare_runs

ROOT = Path(__file__).parent
# The networks here are small: on a busy machine, threads that wait for each other would only slow them down.
torch.set_num_threads(1)
NARROW = [4, 8, 8, 16]  # channels of a model that trains in milliseconds
SMALL = "--latent-dim 5 --hidden-dims 4 8 8 16 --batch-size 64 --device cpu".split()
NAMES = {"ids": ["ae", "vae", "beta_vae"]}
each_script = pytest.mark.parametrize("script", [ae, vae, beta_vae], **NAMES)


@pytest.fixture(scope="module")
def mnist():  # 512 training images, and 300 test images: no multiple of the evaluation's batch
    data = common.load_data(ROOT / "data", limit=512)
    return data._replace(test_images=data.test_images[:300], test_labels=data.test_labels[:300])


@pytest.fixture
def small(mnist, monkeypatch):  # makes every run load the few images of `mnist`, whatever its flags say
    monkeypatch.setattr(common, "load_data", lambda *_: mnist)
    return mnist


@pytest.fixture
def figures(monkeypatch):  # that a run saves, by file name, without the time that rendering takes
    saved = {}
    monkeypatch.setattr(common.Figure, "savefig", lambda figure, path: saved.update({path.name: figure}))
    return saved


def build(model_name="VAE"):
    torch.manual_seed(0)
    return common.Encoder(NARROW, 5, model_name), common.Decoder(5, NARROW)


def weights(*networks):
    return torch.cat([tensor.flatten() for network in networks for tensor in network.state_dict().values()])


def ends(main, flags, capsys):  # the one line on stderr with which a command ends, with exit code 2
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main([str(flag) for flag in flags])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1
    return error


# ---- Science: identities, each against an independent reference -----------------------------------
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
    pytest.raises(ValueError, common.reconstruction_term, logits, x, "l1")
    pytest.raises(TypeError, common.to_pixels, x)
    saturated = torch.full((1, 1, 28, 28), 200.0)
    close(common.reconstruction_term(saturated, torch.zeros_like(saturated)), torch.tensor([200.0 * 784]))


@pytest.mark.parametrize("kind", ["bce", "mse"])
def test_losses_compose_as_the_papers_say_with_the_kl_of_torch_distributions(kind, mnist):
    x, (encoder, decoder) = common.to_pixels(mnist.train_images[:32]), build()
    encoder.fc_logvar.weight.data *= 30  # variances far from the prior's
    torch.manual_seed(1)
    mu, logvar, z = encoder(x)
    recon = common.reconstruction_term(decoder.logits(z), x, kind).sum() / 32
    per_latent = kl_divergence(Normal(mu, (0.5 * logvar).exp()), Normal(0, 1)).mean(dim=0)
    torch.testing.assert_close(common.kl_per_latent(mu, logvar), per_latent)
    kl, beta_loss = per_latent.sum(), beta_vae.beta_vae_loss
    terms = {"recon": recon, "kl": kl, "elbo": -(recon + kl)}
    objectives = {vae.vae_loss: recon + kl, partial(beta_loss, beta=4): recon + 4 * kl}
    for capacity in (2 * kl.item(), 0):  # above and below the KL
        objectives[partial(beta_loss, beta=3, capacity=capacity)] = recon + 3 * (kl - capacity).abs()
    for loss, objective in objectives.items():
        torch.manual_seed(1)  # the same z
        torch.testing.assert_close(loss(encoder, decoder, x, kind=kind), (objective, terms))
    torch.testing.assert_close(ae.ae_loss(lambda x: z, decoder, x, kind), (recon, {"recon": recon}))


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
    assert bound(*poor, k=1) == bound(*poor, k=1) == pytest.approx(elbo, abs=0.4)
    assert elbo + 0.5 < bound(*poor, k=3) < log_p - 0.2
    assert bound(*poor, k=500) == pytest.approx(log_p, abs=0.02)


def ridge_accuracy(train_codes, train_labels, codes, labels):  # by least squares; the penalty is more rows
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
    reference /= (reference * (within @ reference)).sum(dim=0).sqrt()  # to unit variance within the classes
    directions = common.linear_discriminants(codes, 2 * labels + 5)
    torch.testing.assert_close(directions.abs(), reference.abs(), rtol=1e-3, atol=1e-4)
    dead = torch.cat([codes, torch.zeros(600, 1)], dim=1)
    for singular in (codes[:1], codes[:3], codes[:, :1], dead):
        found = common.linear_discriminants(singular, labels[: len(singular)])
        assert found.shape == (singular.shape[1], 2) and found.isfinite().all()
    torch.testing.assert_close(found[:4].abs(), directions.abs(), rtol=1e-3, atol=0)  # of `dead`


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 0.05)])
def test_both_networks_equal_plain_functions_in_output_and_gradients(dtype, tolerance):
    (encoder, decoder), x = build(), torch.rand(16, 1, 28, 28)
    w = dict(encoder.named_parameters()) | dict(decoder.named_parameters())
    with torch.autocast("cpu", enabled=dtype == torch.bfloat16):
        outputs = [*encoder(x)[:2], decoder.logits(encoder(x)[0])]
        assert torch.equal(decoder(encoder(x)[0]), outputs[2].sigmoid()) and outputs[2].dtype == dtype
        h = F.pad(x, (2, 2, 2, 2))
        for name in ("model.0", "model.2", "model.4", "model.6"):
            h = F.leaky_relu(F.conv2d(h, w[f"{name}.weight"], w[f"{name}.bias"], 2, 1), 0.01)
        mu = F.linear(h.flatten(1), w["fc_mean.weight"], w["fc_mean.bias"])
        logvar = F.linear(h.flatten(1), w["fc_logvar.weight"], w["fc_logvar.bias"])
        h = F.linear(mu, w["input_layer.weight"], w["input_layer.bias"]).view(len(x), -1, 4, 4)
        for name in ("decoder.0", "decoder.2", "decoder.4"):
            h = F.leaky_relu(F.conv_transpose2d(h, w[f"{name}.weight"], w[f"{name}.bias"], 2, 1), 0.01)
        h = F.conv_transpose2d(h, w["last_layer.0.weight"], w["last_layer.0.bias"], 1, 1)
    references = [mu, logvar, h[..., 2:30, 2:30]]  # without what the padding added
    for tensors in (outputs, references):
        total = sum(tensor.float().square().sum() for tensor in tensors)
        tensors += torch.autograd.grad(total, [*w.values()])
    for tensor, reference in zip(outputs, references):
        assert (tensor - reference).abs().max() <= tolerance * reference.abs().max()


def test_samples_of_q_and_of_the_ae_have_the_right_moments_and_gradients():
    torch.manual_seed(0)
    mu, logvar = torch.tensor([[-3.0, 0.0, 2.0], [-2.0, 0.0, 1.0]]).repeat_interleave(200_000, 0).chunk(2)
    z = build()[0].reparameterize(mu.requires_grad_(), logvar.requires_grad_())
    close = partial(torch.testing.assert_close, atol=0.03, rtol=0.01)
    close((z.mean(dim=0), z.var(dim=0)), (mu[0], logvar[0].exp()))
    close(torch.autograd.grad(z.sum(), [mu, logvar]), (torch.ones_like(mu), 0.5 * (z - mu)))
    codes = torch.randn(50, 3) @ torch.tensor([[2.0, 0, 0], [1, 1, 0], [0, 0, 0]]) + 5  # one latent is dead
    samples = ae.sample_codes(codes, 100_000)
    close((samples.mean(dim=0), samples.T.cov()), (codes.mean(dim=0), codes.T.cov()))
    close(ae.sample_codes(codes[:1], 4), codes[:1].expand(4, 3))  # of a single code


def test_binarized_test_images_are_drawn_once_with_seed_0(mnist):
    binarized = common.load_data(ROOT / "data", limit=512, binarize=True)
    draws = torch.rand(10_000, 28, 28, generator=torch.Generator().manual_seed(0))[:300, None]
    assert torch.equal(binarized.test_images[:300] / 255, (draws < mnist.test_images / 255).float())
    assert torch.equal(binarized.train_images, mnist.train_images), "they are drawn in training"


def test_evaluate_and_encode_take_all_images_and_what_copies_hand_to_them(mnist):
    def loss(one, two, three, x, label, scale):
        assert not any([torch.is_grad_enabled(), one.training, two.training, three.training])
        return scale * (x.mean(dim=(1, 2, 3)) * label).mean(), {"label": label.float().mean()}

    images, labels = mnist.test_images, mnist.test_labels
    found = common.evaluate(loss, (*build(), torch.nn.Dropout()), images, labels, scale=3)
    product = (images / 255).mean(dim=(1, 2, 3)) * labels
    assert found == pytest.approx({"loss": 3 * product.mean().item(), "label": labels.float().mean().item()})
    single, pair, triple = build("AE")[0], build()[0], build()[0]
    mu, logvar, _ = triple(mnist.test_images / 255)
    pair.forward = lambda x, forward=pair.forward: forward(x)[:2]
    for encoder, expected in ((single, (mu, None)), (pair, (mu, logvar)), (triple, (mu, logvar))):
        encoder.model.append(torch.nn.Dropout())  # does nothing in evaluation mode
        torch.testing.assert_close(common.encode(encoder, mnist.test_images), expected)
    pytest.raises(ValueError, common.Encoder, NARROW, 5, "GAN")


# ---- Training ------------------------------------------------------------------------------------
def train(data, out, *flags):  # two epochs of vae.train_model; returns networks and history
    args = vae.parse_args([*SMALL, "--epochs=2", "--precision=fp32", *flags])
    out.mkdir(exist_ok=True)
    networks = build()
    return networks, vae.train_model(*networks, data, args, out)


@each_script
def test_the_defaults_are_those_of_the_published_numbers(script):
    expected = {"epochs": 20, "batch_size": 128, "lr": 3e-3, "latent_dim": 20, "limit": 60_000, "seed": 0}
    expected |= {"hidden_dims": [32, 64, 128, 256], "recon": "bce", "dataset": "MNIST", "data": None}
    expected |= dict(device="auto", precision="auto", out=None, resume=None, script=f"{script.__name__}.py")
    expected |= {} if script is ae else {"binarize": False, "iw_samples": None}
    expected |= {"beta": 4, "warmup": 0, "capacity": None} if script is beta_vae else {}
    assert vars(script.parse_args([])) == expected


@each_script
def test_a_run_equals_a_plain_training_loop(script, small, figures, tmp_path):
    loss = {ae: ae.ae_loss, vae: vae.vae_loss}.get(script, beta_vae.beta_vae_loss)
    flags = {ae: "", vae: "--binarize"}.get(script, "--binarize --beta 3 --warmup 2 --capacity 200")
    flags += " --recon mse --seed 5 --epochs 3 --batch-size 40 --lr 1e-2 --precision fp32 --out"
    out = script.main([*SMALL, *flags.split(), str(tmp_path / "run")])
    torch.manual_seed(5 * 1_000_003)
    networks = common.Encoder(NARROW, 5, "AE" if script is ae else "VAE"), common.Decoder(5, NARROW)
    images, test_images = small.train_images / 255, small.test_images / 255
    networks[1].last_layer[0].bias.data.fill_((images.mean() / (1 - images.mean())).log())
    parameters = torch.nn.ModuleList(networks).parameters()
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.95), weight_decay=0.1)

    def add_terms(x, epochs, prefix, share):
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
    assert common.learning_rate(0, 1, 2e-3) == 2e-3, "of a run of one step"
    trained = common.load_model(out)[:2]
    torch.testing.assert_close(weights(*trained), weights(*networks), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_shows_speed_and_time_left_in_80_columns(terminal, mnist, tmp_path, monkeypatch, capsys):
    def loss(encoder, decoder, x, kind):
        assert encoder.training == decoder.training == torch.is_grad_enabled()
        calls.append(x)
        number = torch.tensor(2.0 if len(calls) <= 104 else 3.0)  # in the first epoch and in the second
        terms = dict.fromkeys(["kl", "a_term_of_a_script_β_copy", "more"], number)
        return 0 * decoder.last_layer[0].bias.sum() + 3.14159, terms

    calls = []
    monkeypatch.setattr(vae, "vae_loss", loss)
    monkeypatch.setattr(common.time, "perf_counter", lambda: 1000 + len(calls) ** 2 / 100)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    train(mnist, tmp_path, "--batch-size=5")  # 102 steps per epoch, and two batches of test images
    pytest.raises(TypeError, common.Meter(1, 1, None).add, calls[0], {"loss": calls[0]})  # the name is taken
    terms = "test loss 3.14 kl 2.00 a_term_of_a_script_β_copy 2.00\n"  # cut between words
    lines = [
        "epoch 1/2  10 images/s  77 s left",  # 50 steps in 25 s, 154 are left
        "epoch 1/2  5 images/s  104 s left",  # 100 steps in 100 s, 104 are left
        f"epoch 1/2  104 s left  {terms}",  # 102 steps in 104 s, 102 are left
        "epoch 2/2  2 images/s  134 s left",  # 50 steps in 129 s, 52 are left
        "epoch 2/2  2 images/s  6 s left",
        f"epoch 2/2  0 s left  {terms.replace('2.00', '3.00')}",
    ]
    expected = "".join(f"\r\x1b[K{line}" for line in lines) if terminal else lines[2] + lines[5]
    assert capsys.readouterr().out == expected


def test_bfloat16_ends_near_float32_and_a_finished_run_is_in_evaluation_mode(mnist, tmp_path):
    flags = {"fp32": [], "bf16": ["--precision=bf16"]}
    full, low = (train(mnist, tmp_path / name, *flags[name])[1][-1]["train_loss"] for name in flags)
    assert low != full and low == pytest.approx(full, rel=0.02)
    networks, _ = train(mnist, tmp_path / "bf16")  # with no epoch left
    assert not any(network.training for network in networks) and weights(*networks).dtype == torch.float32


def test_float32_stays_exact_and_layouts_are_channels_last_but_on_mps(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    torch.set_float32_matmul_precision("high")
    for kind in ("cpu", "mps"):
        common.set_up_device(torch.device(kind), torch.nn.ReLU(), layer := torch.nn.Conv2d(2, 2, 3))
        assert layer.weight.is_contiguous(memory_format=torch.channels_last) == (kind == "cpu")
    assert torch.get_float32_matmul_precision() == "highest" and not torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize("ratio, capability, found", [(1.49, (7, 5), "fp32"), (1.51, (8, 0), "bf16")])
def test_bfloat16_is_used_where_it_is_half_again_as_fast(ratio, capability, found, monkeypatch):
    def repeat(*_, globals, **__):
        assert torch.get_num_threads() == 1
        return [9, {torch.float32: ratio, torch.bfloat16: 1}[globals["a"].dtype], 9]  # the fastest counts

    monkeypatch.setattr(common.timeit, "repeat", repeat)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    torch.set_num_threads(2)
    on_cpu, on_cuda, on_mps = (common.pick_precision(torch.device(x)) for x in ("cpu", "cuda", "mps"))
    assert on_cpu == (found, "bfloat16 products are 1.5 times as fast") and on_cuda[0] == found
    assert torch.get_num_threads() == 2 and on_mps[0] == "fp32"
    torch.set_num_threads(1)


def test_divergence_names_term_and_epoch_and_keeps_the_last_checkpoint(mnist, tmp_path, monkeypatch):
    factors = iter([1] * 17 + [math.inf] * 3)  # 8 training and 2 test batches per epoch: 18 is the last step
    monkeypatch.setattr(vae, "kl_per_latent", lambda *codes: common.kl_per_latent(*codes) * next(factors))
    with pytest.raises(FloatingPointError, match="train_kl is inf in epoch 2"):
        train(mnist, tmp_path)
    assert [row["epoch"] for row in common.read_checkpoint(tmp_path)["history"]] == [1]


# ---- Shared text ---------------------------------------------------------------------------------
# How lines begin that may differ from vae.py: in ae.py (loss, binarize, KL, bound, samples); in beta_vae.py
IN_AE = r"parser\.description|bound|if args\.binarize|x = torch\.bernoulli|loss, terms =|encoder = Encoder"
IN_AE += r"|test = common\.(evaluate|representation_metrics)\(|# Training draws|fixed =|mu, |train_mu, _ ="
IN_AE += r"|test\[|labels =|z =|title =|common\.plot_(kl_per_dimension|traversals|manifold)\("
IN_AE += r"|if args\.(latent_dim|iw_samples)|def log_likelihood|return -recon|common\.save_metrics\("
IN_BETA_VAE = r"parser\.description|objective|epochs =|capacity =|settings =|networks =|loss, terms ="
IN_BETA_VAE += r"|test = common\.evaluate\(|labels \|?="


@pytest.mark.parametrize("script, may_differ", [(ae, IN_AE), (beta_vae, IN_BETA_VAE)], ids=["ae", "beta_vae"])
def test_scripts_are_the_same_text_where_their_models_do_not_differ(script, may_differ):
    for name in ("parse_args", "train_model", "main"):
        texts = [inspect.getsource(getattr(module, name)).splitlines() for module in (script, vae)]
        own, of_vae = ([x for x in text if x and not re.match(rf" *({may_differ})", x)] for text in texts)
        assert own == of_vae and len(own) > 10


# ---- Figures: what they draw, and what scripts hand to them ----------------------------------------
def spell(z):  # a decoder whose images spell their codes
    return F.pad(z, (0, 784 - z.shape[1])).view(-1, 1, 28, 28)


@pytest.fixture
def calls(figures, monkeypatch):  # the arguments of the last calls, by name; plot_grid's by figure
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
    grid, rows = calls["reconstructions"], [common.to_pixels(images[first]), spell(mu[first])]
    assert torch.equal(grid["images"], torch.stack(rows)[:, :, 0])
    assert grid["row_labels"] == ["input", "reconstruction"]
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
    images, labels, saved = 0.2 + 0.6 * torch.rand(2, 3, 28, 28), list("abcde"), []
    monkeypatch.setattr(common.Figure, "savefig", lambda fig, _: saved.append((fig, fig.axes[0].get_title())))
    common.plot_grid(images, "out", "grid", "of what", labels[:2], labels[2:], "across", "down")
    (figure, pdf_title), (_, png_title) = saved
    (ax,), (drawn,) = figure.axes, figure.axes[0].images
    assert (drawn.get_array() == torch.cat([torch.cat([*row], dim=1) for row in images]).numpy()).all()
    assert drawn.origin == "upper" and ax.yaxis_inverted() and not ax.xaxis_inverted()
    assert (drawn.get_clim(), drawn.get_interpolation(), drawn.cmap.name) == ((0, 1), "none", "gray_r")
    assert [label.get_text() for label in (*ax.get_yticklabels(), *ax.get_xticklabels())] == labels
    assert [(tick - 14) / 28 for tick in (*ax.get_yticks(), *ax.get_xticks())] == [0, 1, 0, 1, 2]
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
    assert ax.get_aspect() == 1 and ax.collections[0].get_rasterized()
    colors, texts, handles = ax.collections[0].get_facecolors(), legend.get_texts(), legend.legend_handles
    assert len({*map(tuple, colors)}) == len(ax.texts) == len(texts) == 10
    for label, text, name, handle in zip(range(3, 13), ax.texts, texts, handles):
        own = mnist.test_labels == label
        assert text.get_text() == name.get_text() == str(label)
        assert (colors[own] == handle.get_facecolor()).all()
        assert text.get_position() == pytest.approx(points[own].median(dim=0).values.tolist(), abs=1e-4)


def test_bars_and_curves_draw_the_numbers_that_their_labels_name(mnist, figures):
    mu, logvar = torch.randn(300, 64) * torch.rand(64), torch.zeros(300, 64)
    common.plot_kl_per_dimension(mu, logvar, mnist, "out")
    kl, ax = common.kl_per_latent(mu, logvar), figures["kl_per_dimension.png"].axes[0]
    heights = [height for _, height in sorted((bar.get_x(), bar.get_height()) for bar in ax.patches)]
    latents = [int(label.get_text()) for label in ax.get_xticklabels()]
    assert heights == sorted(kl.tolist(), reverse=True) and f" {kl.sum():.1f} nats" in ax.get_title()
    assert len(latents) > 20 and [heights[tick] for tick in ax.get_xticks()] == kl[latents].tolist()
    history = [{"epoch": i, "train_kl": 3 / i, "test_kl": 4 / i} for i in range(1, 21)]
    history[8]["test_kl"], history[10]["test_kl"] = 2.0, 900  # one test image can do that
    for epochs in (1, 20):
        common.plot_loss_curves(history[:epochs], {"kl": "KL", "none": "no such term"}, mnist, "out")
        (ax,) = figures["loss_curves.pdf"].axes
        assert {tick % 1 for tick in ax.get_xticks()} == {0}
    drawn = {f"{line.get_label()}_kl": [*line.get_ydata()] for line in ax.lines}
    assert drawn == {name: [row[name] for row in history] for name in ("train_kl", "test_kl")}
    assert ax.get_ylim()[0] < 3 / 20 and 2 < ax.get_ylim()[1] < 3  # without epoch 1 or the spike


def test_figures_do_not_depend_on_the_users_settings(mnist, tmp_path, monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "0")  # the date in a PDF
    user = {"image.origin": "lower", "axes.grid": True, "text.usetex": True, "axes.facecolor": "black"}
    mu, written = torch.randn(300, 2), []
    for settings in ({}, {**user, "savefig.bbox": "tight", "pdf.fonttype": 3}):
        with matplotlib.rc_context(settings):
            common.plot_latent_space(mu, mu, mnist, tmp_path)
            common.plot_reconstructions(spell, mu, mnist, tmp_path)
        written.append(files(tmp_path))
    assert written[0] == written[1] and len(written[0]) == 4


@each_script
def test_a_script_hands_the_right_codes_to_each_figure(script, small, calls, monkeypatch, tmp_path):
    to_mu = torch.randn(784, 5) * torch.tensor([1, 0.3, 0.1, 0.001, 0])  # only three latents vary
    monkeypatch.setattr(common, "encode", lambda _, x: ((x / 255).flatten(1) @ to_mu, x[:, 0, 9, 9:14] / 255))
    monkeypatch.setattr(common, "load_data", lambda *args: asked.append(args) or small)
    flags, asked = [*SMALL, "--epochs=1", "--resume", str(tmp_path / "run")], []
    flags += [] if script is ae else "--binarize --recon mse --iw-samples 3".split()
    out, _ = (script.main(flags) for _ in range(2))  # the second draws again, from another random state
    train_images = small.train_images if script is ae else common.binarize_once(small.train_images)
    (train_mu, _), (mu, logvar) = (common.encode(None, x) for x in (train_images, small.test_images))
    right = {"train_mu": train_mu, "mu": mu, "logvar": logvar, "k": 3}
    given = [(name, argument) for name in calls for argument in calls[name].keys() & right.keys()]
    torch.testing.assert_close([calls[name][key] for name, key in given], [right[key] for _, key in given])
    assert asked[:1] == [(ROOT / "data", "MNIST", torch.device("cpu"), 60_000, script is not ae)]
    labels = {"loss": "objective,\n$\\beta$ = 4" if script is beta_vae else "$-$ELBO"}
    for term, label in calls["plot_loss_curves"]["labels"].items():
        assert label.lower().startswith(labels.get(term, term).lower()) and label.endswith(" (nats)")
    encoder, decoder, _ = common.load_model(out)
    torch.manual_seed(common.EVAL_SEED)  # whatever the random state of a run, new or resumed
    z = ae.sample_codes(train_mu, 100) if script is ae else torch.randn(100, 5)
    torch.testing.assert_close(calls["samples"]["images"], common.decode_grid(decoder, z.view(10, 10, 5)))
    assert ("a Gaussian fitted to" in calls["samples"]["title"]) == (script is ae)
    test = json.loads((out / "metrics.json").read_text())["test"]
    again = common.representation_metrics(decoder, small._replace(train_images=train_images), train_mu, mu)
    assert {name: test[name] for name in again} == pytest.approx(again, rel=1e-4)
    if script is not ae:
        assert test["kl_per_latent"] == pytest.approx(common.kl_per_latent(mu, logvar).tolist())
        assert test["active_units"] == test["iw_samples"] == 3
        log_p = calls["importance_weighted_bound"]["log_likelihood"](x := torch.rand(100, 1, 28, 28), z)
        torch.testing.assert_close(-log_p, common.reconstruction_term(decoder.logits(z), x, "mse"))


# ---- Whole runs, each in a process of its own, on the real test images -----------------------------
FIGURES = ["reconstructions", "samples", "interpolations", "loss_curves", "latent_space"]
OF_LATENTS = [*FIGURES, "traversals", "kl_per_dimension"]
WHOLE_RUNS = [  # script, flags, the first line's precision, figures
    (ae, "--recon mse --precision fp32", r"fp32 \(as set\)", FIGURES),
    (vae, "--binarize --iw-samples 3 --precision bf16", r"bf16 \(as set\)", OF_LATENTS),
    (beta_vae, "--capacity 5 --latent-dim 2", r"(fp32|bf16) \(.* as fast\)", [*OF_LATENTS, "manifold"]),
]


@pytest.fixture(scope="module")
def whole_runs(tmp_path_factory):  # all at once; by script, the folder, what was printed, and errors
    folder, processes = tmp_path_factory.mktemp("whole"), {}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": folder}
    for script, flags, *_ in WHOLE_RUNS:
        flags = [*SMALL, *f"--epochs 2 --limit 500 --seed 7 {flags}".split()]
        argv = [sys.executable, ROOT / f"{script.__name__}.py", *flags]
        processes[script] = subprocess.Popen(argv, env={**os.environ, "OMP_NUM_THREADS": "1"}, **pipes)
    return {x: (folder / "runs" / x.__name__, *process.communicate()) for x, process in processes.items()}


@pytest.mark.parametrize("script, flags, precision, names", WHOLE_RUNS, **NAMES)
def test_a_run_leaves_figures_and_says_how_it_was_trained(script, flags, precision, names, whole_runs):
    out, printed, errors = whole_runs[script]
    assert re.match(rf"cpu, {precision}, seed 7, writing to runs.{script.__name__}\n", printed) and not errors
    figures = {f"{name}.{kind}" for name in names for kind in ("png", "pdf")}
    assert files(out).keys() == figures | {"history.csv", "metrics.json", "checkpoint.pt"}
    for pdf in out.glob("*.pdf"):
        image = matplotlib.image.imread(pdf.with_suffix(".png"))
        edges = {image[0].min(), image[-1].min(), image[:, 0].min(), image[:, -1].min()}
        assert image.std() > 0.01 and edges == {1}, f"{pdf.stem} is blank or cut off"
        assert float(re.search(rb"/MediaBox \[ ?0 0 ([\d.]+)", pdf.read_bytes())[1]) == 3.25 * 72  # points
        assert b"/Type3" not in pdf.read_bytes()
    (_, history, _), metrics = result(out), json.loads((out / "metrics.json").read_text())
    terms = ["loss", "recon"] if script is ae else ["loss", "recon", "kl", "elbo"]
    columns = [f"{split}_{term}" for split in ("train", "test") for term in terms]
    assert [list(row) for row in history] == 2 * [["epoch", "lr", *columns, "seconds"]]
    encoder, decoder, args = common.load_model(out)
    assert not encoder.training and not decoder.training and (encoder.model_name == "AE") == (script is ae)
    given = {"seed": 7, "batch_size": 64, "limit": 500, "epochs": 2, "hidden_dims": NARROW, "device": "cpu"}
    assert {**vars(args), **given, "script": f"{script.__name__}.py"} == metrics["args"]
    seconds = sum(row["seconds"] for row in common.read_checkpoint(out)["history"])
    train = {"epochs": 2, "seconds": seconds, "images_per_second": 2 * 7 * 64 / seconds}  # seven batches
    assert metrics["train"] == pytest.approx(train)
    assert metrics["test"]["recon"] == history[1]["test_recon"] != history[0]["test_recon"]
    unused = weights(encoder.fc_logvar).numel() if script is ae else 0
    found = {"device": "cpu", "threads": 1, "precision": args.precision, "train_images": 500}
    found |= {"test_images": 10_000, "parameters": weights(encoder, decoder).numel() - unused}
    found |= {"torch": torch.__version__, "torchvision": torchvision.__version__}
    assert metrics["environment"] == {**found, "python": "{}.{}.{}".format(*sys.version_info)}


# ---- Kill and resume -------------------------------------------------------------------------------
RUN = [*SMALL, *"--recon mse --capacity 0 --seed 7 --lr 1e-3 --limit 512 --epochs 2 --precision bf16".split()]
ctrl_c = partial(signal.raise_signal, signal.SIGINT)
# An epoch has eight steps, and puts two files into place: checkpoint.pt, then history.csv.
STOPS = [((os, "replace", 3, sys.exit), 1), ((os, "replace", 4, sys.exit), 2)]
STOPS += [((Path, "write_bytes", 3, Mock(side_effect=OSError("No space left on device"))), 1)]
STOPS += [((common.Meter, "add", 12, lambda: (ctrl_c(), ctrl_c())), 1)]


def at_call(patch, owner, name, number, act):  # patches owner.name: at one of its calls `act()` comes first
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may start us with Ctrl-C ignored
    numbers, function = iter(range(1, 10**6)), getattr(owner, name)
    patch.setattr(owner, name, lambda *args: (next(numbers) == number and act(), function(*args))[1])


def files(folder):  # by name; those that start with a dot do not count
    return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.name[0] != "."}


def result(out):  # weights, history (which is that of history.csv) without its seconds, and names of files
    history = common.read_checkpoint(out)["history"]
    names, *rows = (line.split(",") for line in (out / "history.csv").read_text().splitlines())
    assert [dict(zip(names, map(float, row))) for row in rows] == history
    networks, history = common.load_model(out)[:2], [{**row, "seconds": 0} for row in history]
    return weights(*networks).tolist(), history, files(out).keys()


@pytest.fixture(scope="module")
def finished(mnist, tmp_path_factory):  # the folder of a run of two epochs, not to be changed
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "load_data", lambda *_: mnist)
        patch.setattr(common.Figure, "savefig", lambda *_: None)
        return beta_vae.main([*RUN, "--out", str(tmp_path_factory.mktemp("finished") / "run")])


@pytest.mark.parametrize("stop, epochs", STOPS)
def test_a_resumed_run_equals_a_whole_one(stop, epochs, finished, small, figures, monkeypatch, tmp_path):
    flags = [*RUN, "--resume", str(tmp_path)]
    (tmp_path / ".DS_Store").touch()  # does not count
    with monkeypatch.context() as patch:
        at_call(patch, *stop)
        pytest.raises((OSError, SystemExit, KeyboardInterrupt), beta_vae.main, flags)
    checkpoint = common.read_checkpoint(tmp_path)
    assert len(checkpoint["history"]) == epochs and len(files(tmp_path)) == 2 and not figures
    for state in checkpoint["optimizer"]["state"].values():  # in the layout in which MPS saves averages
        state.update({name: average.contiguous() for name, average in state.items()})
    torch.save(checkpoint, tmp_path / "checkpoint.pt")
    assert result(beta_vae.main(flags)) == result(finished)


@pytest.mark.parametrize("epochs, code", [(1, 130), (2, 0)], ids=["in the first epoch", "in the last"])
def test_ctrl_c_stops_after_the_epoch(epochs, code, finished, small, figures, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["a b/beta_vae.py"])
    at_call(monkeypatch, common.Meter, "add", 8 * epochs - 3, ctrl_c)
    with pytest.raises(SystemExit) as stop:
        sys.exit(beta_vae.main([*RUN, "--iw-samples=2", "--out=run"]) and 0)
    output, error = capsys.readouterr()
    assert error.strip() == "stopping after this epoch; Ctrl-C again quits now" and "samples.png" in figures
    metrics = json.loads(Path("run", "metrics.json").read_text())
    resume = "in run\nstopped after 1 of 2 epochs; resume with: python 'a b/beta_vae.py' --resume run\n"
    found = stop.value.code, metrics["train"]["epochs"], "iw_bound" in metrics["test"]
    assert found == (code, epochs, epochs == 2) and output.endswith(resume) == (epochs == 1)
    assert result(beta_vae.main(["--resume=run"])) == result(finished)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert ThreadPoolExecutor(1).submit(list, common.epochs_left([], 2)).result() == [1, 2]  # without signals
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # someone else's: it stays
    assert [signal.getsignal(signal.SIGINT) for _ in common.epochs_left([], 2)] == 2 * [signal.SIG_IGN]
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_a_resumed_run_has_its_own_flags_and_refuses_almost_all_others_by_name(finished, tmp_path, capsys):
    refused = {"seed": "8", "precision": "fp32", "dataset": "KMNIST", "limit": "511", "latent_dim": "6"}
    refused |= {"hidden_dims": "4 8 8 8", "recon": "bce", "epochs": "3", "batch_size": "32", "lr": "2e-3"}
    refused |= {"beta": "3", "warmup": "1", "capacity": "1", "binarize": ""}
    checkpoint, resume = common.read_checkpoint(finished), ["--resume", str(tmp_path)]
    stored = {**checkpoint["args"], "out": None, "resume": str(tmp_path)}
    del checkpoint["args"]["dataset"]  # which then counts as its default
    torch.save(checkpoint, tmp_path / "checkpoint.pt")
    before = files(tmp_path)
    may_differ = {"device": "auto", "data": "elsewhere", "iw_samples": 2}
    others = "--device=auto --data=elsewhere --iw-samples=2 --precision=auto".split()
    assert vars(beta_vae.parse_args([*resume, *RUN])) == vars(beta_vae.parse_args(resume)) == stored
    assert vars(beta_vae.parse_args([*resume, *others])) == {**stored, **may_differ}
    assert stored.keys() - may_differ.keys() - {"out", "resume", "script"} == refused.keys()
    for name, value in refused.items():
        flag = f"--{name.replace('_', '-')}"
        error = ends(beta_vae.main, [*resume, flag, *value.split()], capsys)
        assert f"{flag} is {stored[name]} in that run; for another value, start a new run" in error
    assert "is one of beta_vae.py, not of vae.py" in ends(vae.main, resume, capsys)
    assert files(tmp_path) == before
    path, code = tmp_path / "checkpoint.pt", {**checkpoint, "more": Path("x")}
    for damaged in (path.read_bytes()[:-1000], {"epoch": 1}, [1, 2], code):
        path.write_bytes(damaged) if isinstance(damaged, bytes) else torch.save(damaged, path)
        assert f"--resume: {path} is damaged" in ends(beta_vae.main, resume, capsys)


def test_metrics_keep_environment_bound_and_own_terms_but_not_nan(finished, small, figures, tmp_path, capsys):
    checkpoint = common.read_checkpoint(finished)
    checkpoint["environment"] |= {"device": "another", "threads": 96}
    torch.save(checkpoint, tmp_path / "checkpoint.pt")
    beta_vae.main(["--resume", str(tmp_path), "--iw-samples=2"])
    first = json.loads((tmp_path / "metrics.json").read_text())
    assert (first["args"], first["environment"]) == (checkpoint["args"], checkpoint["environment"])
    assert first["test"]["iw_samples"] == 2 and "iw_bound" in first["test"]
    beta_vae.main(["--resume", str(tmp_path)])
    assert json.loads((tmp_path / "metrics.json").read_text()) == first
    args, row = vae.parse_args(SMALL), {"epoch": 1, "seconds": 2.0, "test_mse": 3.0}
    common.save_checkpoint(tmp_path, [row], args, small)
    assert files(tmp_path).keys() == {"checkpoint.pt", "history.csv"}, "the numbers were of other epochs"
    common.save_metrics(tmp_path, {"mse": 0.5, "pca_mse": math.nan, "kl_per_latent": [1.0, math.inf], "k": 1})
    assert json.loads((tmp_path / "metrics.json").read_text())["test"] == {"mse": 3.0, "k": 1}
    assert re.findall(r"(\w+) is not finite", capsys.readouterr().err) == ["pca_mse", "kl_per_latent"]


# ---- Refusals and data -----------------------------------------------------------------------------
def test_bad_input_is_refused_in_one_line_by_name_and_writes_nothing(small, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("a file")
    Path("occupied", "folder").mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    values = {
        "--epochs --latent-dim --iw-samples --batch-size --limit": "0 -1 1.5 two nan inf 1e3 99999999999999",
        "--seed": "-1 1.5 two nan inf 1e3 4294967296",
        "--lr --beta --warmup --capacity": "-1 nan inf -inf 1e999 two",
        "--precision --recon --dataset": "other",
        "--device": "gpu xpu hpu cuda:99 cuda:-1 cuda:x meta cuda:99999999999999999999",
        "--out --resume": "file file/below occupied " + "x" * 300,
    }
    bad = [f"{flag}={value}" for flags in values for flag in flags.split() for value in values[flags].split()]
    bad += "--lr=0 --beta=0 --warmup=2 --limit=60001 --out= --resume= --data= --none=3 --epoch=3".split()
    bad += ["--batch-size=257 --limit=256", "--iw-samples=3", "--hidden-dims 4 8 8", "--hidden-dims 4 8 8 0"]
    others = [(vae, "--beta=3"), (vae, "--warmup=1"), (ae, "--capacity=3"), (ae, "--binarize")]
    for script, command in [*((beta_vae, command) for command in bad), *others]:
        error = ends(script.main, [*SMALL, "--epochs=1", *command.split()], capsys)
        flag, _, value = command.split()[0].partition("=")
        assert flag in error or flag in ("--out", "--resume"), command
        assert value in error or command == "--iw-samples=3", command
        assert sorted(tmp_path.rglob("*")) == before, command
    assert [common.free_folder(Path("a", "b")).name for _ in range(3)] == ["b", "b-2", "b-3"]
    beta_vae.parse_args([*SMALL, "--limit=64", "--epochs=2", "--warmup=2"])  # as much as there is
    Path("runs").write_text("as refused as a link to nowhere")
    assert "'runs'" in ends(vae.main, SMALL, capsys)


@pytest.fixture
def asked(monkeypatch):  # what mirrors are asked for; only the last of MNIST's has anything
    asked, last = [], torchvision.datasets.MNIST.mirrors[-1]

    def download_url(url, root, filename=None, md5=None):
        asked.append((url, md5))
        if url != f"{last}{filename}":
            raise RuntimeError(f"nothing at {url}")
        shutil.copy(ROOT / "data" / "MNIST" / "raw" / filename, root)

    monkeypatch.setattr(common, "download_url", download_url)
    return asked


def test_a_damaged_archive_is_named_and_neither_trained_on_nor_replaced(asked, tmp_path, capsys):
    raw = Path(shutil.copytree(ROOT / "data" / "MNIST" / "raw", tmp_path / "MNIST" / "raw"))
    archive, labels = raw / "train-images-idx3-ubyte.gz", raw / "t10k-labels-idx1-ubyte.gz"
    cut, another = archive.read_bytes()[:-1], labels.read_bytes()
    labels.unlink()
    for damaged in (cut, cut + b"?", another):
        archive.write_bytes(damaged)
        before = files(raw)
        error = ends(vae.main, [*SMALL, "--epochs=1", "--data", tmp_path, "--out", raw / "out"], capsys)
        assert f"{archive.name}: damaged" in error and str(raw) in error and labels.name not in error
        assert files(raw) == before and not asked


def test_missing_archives_come_from_the_first_mirror_that_has_them(asked, mnist, tmp_path):
    source, raw = torchvision.datasets.MNIST, tmp_path / "MNIST" / "raw"
    data = common.load_data(tmp_path, device="meta", limit=70)
    assert [(len(part), part.is_meta) for part in data[1:]] == [(70, True)] * 2 + [(10_000, True)] * 2
    assert asked == [(mirror + name, md5) for name, md5 in source.resources for mirror in source.mirrors]
    assert files(raw) == files(ROOT / "data" / "MNIST" / "raw")
    assert mnist.train_labels[:5].tolist() == [5, 0, 4, 1, 9] and mnist.test_labels[:3].tolist() == [7, 2, 1]


@pytest.mark.parametrize("name", ["FashionMNIST", "KMNIST"])
def test_a_failed_download_gives_a_reason_and_leaves_no_folder(name, asked, capsys, monkeypatch, tmp_path):
    for variable in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(variable, str(tmp_path))
    flags, source = [*SMALL, "--epochs=1", f"--dataset={name}"], getattr(torchvision.datasets, name)
    error = ends(vae.main, [*flags, "--data=~/new", "--out=~/out"], capsys)
    path = tmp_path / "new" / name / "raw" / source.resources[0][0]
    assert f"{path} is missing and cannot be downloaded: nothing at {source.mirrors[-1]}{path.name}" in error
    assert not any(tmp_path.iterdir())


def test_the_readmes_own_model_keeps_its_name_and_flags(small, figures, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    readme, text = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "vae.py"))
    loss, end = re.search(r"```python\n([^`]*iwae_loss[^`]*)```", readme)[1], "    return common.parse_args("
    own = '    parser.add_argument("--masks", type=Path, default=(1, 2))\n'
    own += '    parser.set_defaults(recon="Gaussian, one learned variance")\n'
    changes = {inspect.getsource(vae.vae_loss): loss, "vae_loss": "iwae_loss", end: own + end}
    for old, new in {**changes, ", kind=args.recon": ""}.items():
        assert old in text, f"vae.py has no {old!r}"
        text = text.replace(old, new)
    Path("iwae.py").write_text(text, encoding="utf-8")
    iwae = importlib.import_module("iwae")
    with monkeypatch.context() as patch:
        patch.setattr(common, "epochs_left", lambda *_: [1])
        pytest.raises(SystemExit, iwae.main, [*SMALL, "--epochs=2"])
    assert capsys.readouterr().out.endswith("python iwae.py --resume runs/iwae\n")
    metrics = json.loads((iwae.main(["--resume=runs/iwae"]) / "metrics.json").read_text())
    found = [metrics["args"][name] for name in ("script", "recon", "masks")]
    assert found == ["iwae.py", "Gaussian, one learned variance", [1, 2]] and metrics["train"]["epochs"] == 2
    assert math.isfinite(metrics["test"]["bound"]) and len(figures) == 2 * len(OF_LATENTS)
    iwae.parse_args(["--iw-samples=2"])  # which gray pixels with bce are refused
    assert "argument --masks" in ends(iwae.main, ["--masks=folder"], capsys)
    assert "--masks is [1, 2]" in ends(iwae.main, ["--masks=folder", "--resume=runs/iwae"], capsys)


def make_run(folder, test, images=60000, done=2, own="kl", **args):  # writes the files of a run
    flags = {"script": "vae.py", "seed": 0, "dataset": "MNIST", "recon": "bce", "epochs": 2, **args}
    environment = {"train_images": images, "test_images": 10000, "precision": "bf16"}
    metrics = {"args": flags, "test": test, "train": {"epochs": done}, "environment": environment}
    folder.mkdir()
    (folder / "metrics.json").write_text(json.dumps(metrics))
    (folder / "history.csv").write_text(f"epoch,train_mse,test_{own},seconds\n1,2,3,4\n")
    return str(folder)


def compare(capsys, *argv):  # the heading of each printed table with its lines of cells
    compare_runs.main([str(arg) for arg in argv])
    tables = re.findall(r"^(\w.*)\n\n((?:\|.*\n)+)", capsys.readouterr().out, re.M)
    return [(heading, [line[2:-2].split(" | ") for line in table.splitlines()]) for heading, table in tables]


def test_rows_are_sorted_by_model_and_beta_and_name_what_sets_them_apart(tmp_path, capsys):
    runs = [make_run(tmp_path / "own", {"kl": 1}, script="my|vae.py", epochs=3, done=3)]
    runs.append(make_run(tmp_path / "c", {"kl": 1}, script="beta_vae.py", beta=4.0, capacity=9.0))
    for beta in ([1, 2], "word", 10.0, 4.0, 0.5):
        runs.append(make_run(tmp_path / f"{beta}", {"kl": 1}, script="beta_vae.py", beta=beta, capacity=None))
    runs += [make_run(tmp_path / "v", {"kl": 1}, lr=1), make_run(tmp_path / "a", {"mse": 1}, script="ae.py")]
    [(_, table)] = compare(capsys, *runs)
    betas = ["0.5", "4, capacity 9.0", "4", "10", "[1, 2]", "word"]
    labels = ["AE", "VAE", *(f"beta-VAE, beta = {beta}" for beta in betas), r"my\|vae"]
    assert [row[0].split(", epochs")[0] for row in table[2:]] == labels
    assert table[2][0] == "AE, epochs 2" and table[-1][0] == r"my\|vae, epochs 3"


def test_seeds_become_a_row_in_which_each_metric_has_its_factor_and_digits(tmp_path, capsys, monkeypatch):
    test = {"mse": 0.0123, "probe_accuracy": 0.876, "active_units": 17, "elbo": -90, "kl": 20, "recon": 70}
    test |= {"iw_bound": -85, "iw_samples": 64, "tc": -177.0, "mmd": 0.00861, "loss": 5.0, "x": [1.0]}
    other = {"kl": 22.0, "iw_bound": -80.0, "iw_samples": 128, "mmd": math.nan, "word": "x", "flag": True}
    runs = [make_run(tmp_path / "a", test, out="a", device="cpu", data="x", iw_samples=64)]
    runs.append(make_run(tmp_path / "b", other, seed=1, resume="b", device="cuda", iw_samples=128))
    runs.append(make_run(tmp_path / "c", {"kl": 27.0}, seed=2))
    monkeypatch.chdir(tmp_path)
    [(_, table)] = compare(capsys, *runs)
    headings = "model seeds recon KL ELBO IW128 IW64 active_units probe_% 1000_MSE mmd tc".split()
    numbers = "VAE 3 70.00 23.00±3.61 -90.00 -80.00 -85.00 17.0 87.6 12.30 0.00861 -177.0".split()
    assert [heading.replace("IW bound, K = ", "IW").replace(" ", "_") for heading in table[0]] == headings
    assert [cell.replace(" (n = 1)", "").replace(" ", "") for cell in table[2]] == numbers
    assert table[1][:3] == ["---", "---:", "---:"] and table[2][2] == "70.00 (n = 1)" and len(table) == 3
    [(_, table)] = compare(capsys, *runs, "--columns", "mse", "iw_bound", "kl")
    assert table[0][2:] == ["1000 MSE", "IW bound, K = 128", "IW bound, K = 64", "KL"]
    assert "nonsense" in ends(compare_runs.main, [*runs, "--columns", "nonsense"], capsys)
    assert len([*tmp_path.iterdir()]) == 3, "nothing is written without --out"


def test_a_custom_term_keeps_its_name_and_pca_and_raw_pixels_get_rows(tmp_path, capsys):
    test = {"mse": 0.01, "pca_mse": 0.04, "pca_components": 5, "pca_probe_accuracy": 0.8}
    more = {"mse": 12.34567, "pca_mse": 0.02, "pca_components": 20, "pixel_probe_accuracy": 0.86}
    runs = [make_run(tmp_path / "own", {**test, **more}, script="my_vae.py", own="mse")]
    [(_, [headings, _, *rows])] = compare(capsys, *runs, make_run(tmp_path / "vae", test))
    assert headings == ["model", "seeds", "probe %", "1000 MSE", "mse"]
    assert rows[:2] == [["VAE", "1", "", "10.00", ""], ["my_vae", "1", "", "", "12.35"]]
    assert [row[0] for row in rows[2:]] == ["PCA, 5 components", "PCA, 20 components", "raw pixels"]
    assert [row[2:] for row in rows[2:]] == [["80.0", "40.00", ""], ["80.0", "20.00", ""], ["86.0", "", ""]]


def test_what_is_no_finished_run_is_left_out_with_the_reason(tmp_path, capsys):
    good, twice = make_run(tmp_path / "good", {"kl": 1}), make_run(tmp_path / "twice", {"kl": 2})
    stopped, damaged = make_run(tmp_path / "s", {}, done=3, epochs=20), make_run(tmp_path / "d", {})
    Path(damaged, "metrics.json").write_text("{")
    reasons = {twice: f"the same run as {good}", stopped: "stopped after 3 of 20 epochs"}
    reasons |= {damaged: "metrics.json is damaged", __file__: "no metrics.json"}
    compare_runs.main([good, *reasons])
    out, err = capsys.readouterr()
    assert "| VAE | 1 | 1.00 |" in out
    assert err.splitlines() == [f"left out: {run}, {reason}" for run, reason in reasons.items()]
    pytest.raises(SystemExit, compare_runs.main, [stopped])


def test_latex_shows_names_and_settings_literally(tmp_path, capsys, figures):
    name, out = r"\input{a}$&#%_^~", tmp_path / "new" / "folder"
    literal = r"\textbackslash{}input\{a\}\$\&\#\%\_\^{}\~{}"
    runs = [make_run(tmp_path / f"{i}", {"kl": 9.0 + i, name: 1}, seed=i, recon=name) for i in range(2)]
    runs.append(make_run(tmp_path / "a", {"kl": -3.0}, script="beta_vae.py", recon=name, note=name))
    runs.append(make_run(tmp_path / "b", {"recon": 3.0}, script="beta_vae.py", recon=name))
    compare(capsys, *runs, "--out", out)
    tex = (out / "comparison.tex").read_text()
    assert tex.count(literal) == 3 and name not in tex  # in caption, heading and setting
    assert "VAE & 2 &  & 9.50 & 1" in tex and r" &  &  & \scriptsize $\pm$ 0.71 & " in tex
    assert r"$\beta$-VAE" in tex and "& $-$3.00 &" in tex and tex.count("{") == tex.count("}")


def test_each_protocol_has_a_table_and_with_two_runs_a_panel(tmp_path, capsys, figures):
    changes = [{}, {"binarize": True}, {"recon": "mse"}, {"recon": "Gaussian, one learned variance"}]
    changes += [{"dataset": "KMNIST"}, {"images": 50000}, {"seed": 1}, {"recon": "mse", "seed": 1}]
    runs = [make_run(tmp_path / f"{i}", {"kl": i, "recon": 1}, **change) for i, change in enumerate(changes)]
    headings = [heading for heading, _ in compare(capsys, *runs, "--out", tmp_path)]
    words = ["gray pixels; Bernoulli", "binarized", "unit variance", "learned variance", "KMNIST", "50000"]
    assert len(headings) == 6 and all(word in heading for word, heading in zip(words, headings))
    captions = re.findall(r"caption{(.*?) Mean.*-(\d)}", (tmp_path / "comparison.tex").read_text())
    assert captions == [*zip(headings, "123456")]
    panels = [ax.texts[-1].get_text() for ax in figures["rate_distortion.pdf"].axes]
    assert panels == [
        f"MNIST, gray pixels;\n{x}" for x in ("Bernoulli cross-entropy", "Gaussian of unit variance")
    ]


def test_the_figure_has_recon_over_kl_and_lines_labeled_with_their_elbo(tmp_path, capsys, figures):
    for name, kl, recon in (("vae", 20, -800), ("beta_vae", 10, -700)):
        make_run(tmp_path / name, {"kl": kl, "recon": recon}, script=f"{name}.py")
    compare(capsys, tmp_path / "vae", tmp_path / "beta_vae", "--out", tmp_path)
    (ax,), _ = (figures[f"rate_distortion.{kind}"].axes for kind in ("png", "pdf"))
    points, lines = [line.get_xydata().tolist() for line in ax.lines[:2]], ax.lines[2:]
    assert points == [[[20, -800]], [[10, -700]]] and len(lines) == len(ax.texts) > 2
    assert "KL" in ax.get_xlabel() and "recon" in ax.get_ylabel()
    assert [text.get_text() for text in ax.get_legend().texts] == ["VAE", r"$\beta$-VAE"]
    for line, text in zip(lines, ax.texts):
        assert line.get_slope() == -1 and text.get_position() == line.get_xy1()
        assert text.get_text() == f"ELBO ${-sum(line.get_xy1()):g}$"


def test_the_benchmark_trains_the_classic_program_and_compares_second_epochs(small, monkeypatch, capsys):
    args = vae.parse_args(["--limit=190", "--batch-size=189", "--epochs=2"])  # the last batch is one image
    encoder, decoder = networks = benchmark.build_classic(args, "cpu")
    encoder[3].bias.data[20:] = 2  # a q whose samples are far from its mean
    _, loss = benchmark.textbook(args, "cpu", lambda *_: networks, benchmark.classic_loss)
    x = common.to_pixels(small.test_images[:190]).flatten(1)
    mu, logvar = encoder(x).chunk(2, dim=1)
    q = Normal(mu, (0.5 * logvar).exp())
    recon = -Bernoulli(decoder(q.sample()), validate_args=False).log_prob(x).sum()
    assert loss == pytest.approx((recon + kl_divergence(q, Normal(0, 1)).sum()).item() / 190, abs=5)
    args = vae.parse_args([*SMALL, "--epochs=2"])
    assert len(benchmark.ours(args, torch.device("cpu"))[0]) == 2
    measured = {"textbook": iter(4 * [([5, 4], 100)]), "ours": iter([([9, s], None) for s in (1, 4, 2)])}
    monkeypatch.setattr(benchmark, "in_fresh_process", lambda function, *_: next(measured[function.__name__]))
    monkeypatch.setattr(benchmark, "quick_look", lambda _: 99)
    monkeypatch.setattr(benchmark, "time", Mock(perf_counter=Mock(side_effect=[0, 30, 30, 40])))
    benchmark.main(["--device", "cpu"])
    assert re.findall(r"ratio ([\d.]+)", capsys.readouterr().out) == ["2.00", "3.00"]
    assert f"python vae.py {benchmark.QUICK_LOOK}\n" in (ROOT / "README.md").read_text(encoding="utf-8")
