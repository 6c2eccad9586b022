"""What ae.py, vae.py and beta_vae.py share, in the order of the data; the machinery comes last.

Losses are in nats per image: summed over pixels or latents, averaged over the batch.
"""

import argparse
import contextlib
import csv
import ctypes
import gzip
import io
import json
import math
import os
import shlex
import signal
import sys
import tempfile
import time
import timeit
from collections import namedtuple
from functools import partial
from pathlib import Path

import matplotlib.style
import torch
import torch.nn.functional as F
import torchvision
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from torch import nn
from torchvision.datasets.utils import check_integrity, download_url

EVAL_SEED = 0  # of the samples z behind every test number, whatever the run's own seed is
EVAL_BATCH = 250  # images at a time in evaluation: bounds its memory; more are slower on a CPU


# ---- Data --------------------------------------------------------------------------------------
# The data set's name and, on one device, uint8 images (N, 1, 28, 28) and int64 labels (N,).
Data = namedtuple("Data", "name train_images train_labels test_images test_labels")


def load_data(root, name="MNIST", device="cpu", limit=None, binarize=False):
    """Load torchvision's data set `name` onto `device`, from the archives in root/name/raw or by download.

    limit: number of training images to keep. binarize: draw each test image, once, from Bernoulli(pixel).
    Raises RuntimeError that names an archive that is damaged, or missing and cannot be downloaded.
    """
    source, folder = getattr(torchvision.datasets, name), Path(root) / name / "raw"
    archives = [(folder / archive, md5) for archive, md5 in source.resources]
    damaged = [path.name for path, md5 in archives if path.exists() and not check_integrity(path, md5)]
    if damaged:  # they may be the user's own: nothing is written over them
        raise RuntimeError(f"{', '.join(damaged)}: damaged, or not {name}'s; put the original into {folder}")
    for path, md5 in archives:
        if not path.exists():
            download(source.mirrors, path, md5)
    train_images, train_labels, test_images, test_labels = (read_idx(path) for path, _ in archives)
    test_images = binarize_once(test_images) if binarize else test_images
    train = train_images[:limit, None].to(device), train_labels[:limit].long().to(device)
    return Data(name, *train, test_images[:, None].to(device), test_labels.long().to(device))


def download(mirrors, path, md5):
    """Fetch the archive `path` from the first mirror that has it, or raise RuntimeError with a reason."""
    with tempfile.TemporaryDirectory() as folder:
        for mirror in mirrors:
            try:
                download_url(mirror + path.name, folder, path.name, md5)
                path.parent.mkdir(parents=True, exist_ok=True)
                return write_whole(path, Path(folder, path.name).read_bytes(), os.getpid())
            except (OSError, RuntimeError) as error:
                reason = error
    raise RuntimeError(f"{path} is missing and cannot be downloaded: {reason}")


def read_idx(path):
    """The uint8 tensor in a gzipped IDX file: four bytes, the last the number of sizes; sizes; values."""
    content = bytearray(gzip.decompress(path.read_bytes()))
    sizes = [int.from_bytes(content[4 * i : 4 * i + 4], "big") for i in range(1, content[3] + 1)]
    return torch.frombuffer(content, dtype=torch.uint8, offset=4 + 4 * len(sizes)).view(sizes)


def to_pixels(images):
    """uint8 images to float32 in [0, 1], same shape. Raises TypeError for images of another type."""
    if images.dtype != torch.uint8:
        raise TypeError(f"images must be uint8 in [0, 255], not {images.dtype}")
    return images.float().div_(255)


def binarize_once(images):
    """uint8 images drawn from Bernoulli(pixel) with a fixed seed: 0 or 255, same shape."""
    generator = torch.Generator().manual_seed(EVAL_SEED)  # on the CPU: the same images on every device
    ones = torch.rand(images.shape, generator=generator).to(images.device) < to_pixels(images)
    return ones.to(torch.uint8) * 255


# ---- Model -------------------------------------------------------------------------------------
class Encoder(nn.Module):
    """Images (B, 1, 28, 28) in [0, 1] to codes (B, latent_dim): mu for "AE", (mu, logvar, z) for "VAE"."""

    def __init__(self, hidden_dims, latent_dim, model_name="AE"):
        super().__init__()
        if model_name not in ("AE", "VAE"):
            raise ValueError(f"model_name must be 'AE' or 'VAE', not {model_name!r}")
        self.model_name = model_name
        self.model = nn.Sequential(
            nn.Conv2d(1, hidden_dims[0], 4, 2, 1),
            nn.LeakyReLU(0.01),
            nn.Conv2d(hidden_dims[0], hidden_dims[1], 4, 2, 1),
            nn.LeakyReLU(0.01),
            nn.Conv2d(hidden_dims[1], hidden_dims[2], 4, 2, 1),
            nn.LeakyReLU(0.01),
            nn.Conv2d(hidden_dims[2], hidden_dims[3], 4, 2, 1),
            nn.LeakyReLU(0.01),
        )
        self.fc_mean = nn.Linear(hidden_dims[3] * 2 * 2, latent_dim)  # four halvings: 32 -> 16 -> 8 -> 4 -> 2
        self.fc_logvar = nn.Linear(hidden_dims[3] * 2 * 2, latent_dim)
        self.fc_logvar.requires_grad_(model_name == "VAE")  # an AE never uses it

    def reparameterize(self, mu, logvar):
        """A sample of N(mu, exp(logvar)) that passes gradients to both (Kingma & Welling, 2014)."""
        std = torch.exp(0.5 * logvar)
        eps = torch.randn_like(std)
        return mu + eps * std

    def forward(self, x):
        x = F.pad(x, (2, 2, 2, 2))  # (B, 1, 28, 28) -> (B, 1, 32, 32), the decoder's size before its crop
        h = self.model(x).flatten(1)  # (B, hidden_dims[3], 2, 2) -> (B, hidden_dims[3] * 4)
        mu = self.fc_mean(h)
        if self.model_name == "VAE":
            # A posterior more than e times as wide as the prior is never useful.
            logvar = self.fc_logvar(h).clamp(max=2)
            z = self.reparameterize(mu, logvar)
            return mu, logvar, z
        return mu


class ConvTranspose2d(nn.ConvTranspose2d):
    """torch's layer with its bias added separately: on a CPU, oneDNN's own gradient of that bias is slow."""

    def forward(self, x):
        h = F.conv_transpose2d(x, self.weight, None, self.stride, self.padding)
        return h + self.bias.to(h.dtype)[:, None, None]


class Decoder(nn.Module):
    """Codes (B, latent_dim) to images (B, 1, 28, 28) in [0, 1]."""

    def __init__(self, latent_dim, hidden_dims, expand_dim=4):
        super().__init__()
        self.expand_dim = expand_dim
        self.input_layer = nn.Linear(latent_dim, hidden_dims[-1] * expand_dim * expand_dim)
        self.decoder = nn.Sequential(
            ConvTranspose2d(hidden_dims[-1], hidden_dims[-2], 4, 2, 1),
            nn.LeakyReLU(0.01),
            ConvTranspose2d(hidden_dims[-2], hidden_dims[-3], 4, 2, 1),
            nn.LeakyReLU(0.01),
            ConvTranspose2d(hidden_dims[-3], hidden_dims[-4], 4, 2, 1),
            nn.LeakyReLU(0.01),
        )
        self.last_layer = nn.Sequential(ConvTranspose2d(hidden_dims[-4], 1, 3, 1, 1), nn.Sigmoid())

    def start_at_mean(self, images):
        """Set the last bias to the mean pixel of uint8 `images`, so that no step is spent on finding it."""
        nn.init.constant_(self.last_layer[0].bias, to_pixels(images).mean().logit().item())

    def logits(self, z):
        """The images before the sigmoid: what losses use, since BCE on logits cannot saturate."""
        h = self.input_layer(z)
        h = h.view(h.size(0), -1, self.expand_dim, self.expand_dim)  # (B, hidden_dims[-1], 4, 4)
        h = self.last_layer[0](self.decoder(h))  # (B, 1, 32, 32)
        return h[..., 2:-2, 2:-2]  # (B, 1, 28, 28): the crop undoes the encoder's padding

    def forward(self, z):
        return self.last_layer[1](self.logits(z))


# ---- Terms of the losses -----------------------------------------------------------------------
def reconstruction_term(logits, x, kind="bce"):
    """-log p(x|z) of each image, in nats. logits, x: (B, 1, 28, 28), x in [0, 1]. Returns (B,).

    kind "bce": Bernoulli pixels; for gray pixels this is a cross-entropy, not a likelihood.
    kind "mse": Gaussian pixels of variance 1 around sigmoid(logits), without 784 / 2 log(2 pi) = 720.4 nats.
    """
    if kind not in ("bce", "mse"):
        raise ValueError(f"kind must be 'bce' or 'mse', not {kind!r}")
    if kind == "bce":
        pixels = F.binary_cross_entropy_with_logits(logits.float(), x, reduction="none")
    else:
        pixels = 0.5 * (logits.float().sigmoid() - x).square()
    return pixels.sum(dim=(1, 2, 3))  # over pixels


def kl_per_latent(mu, logvar):
    """KL(N(mu, exp(logvar)) || N(0, 1)) in nats: (B, latent_dim) each to (latent_dim,), the batch's mean."""
    mu, logvar = mu.float(), logvar.float()  # Kingma & Welling (2014), appendix B
    return (-0.5 * (1 + logvar - mu.square() - logvar.exp())).mean(dim=0)  # over the batch


# ---- Training ----------------------------------------------------------------------------------
def learning_rate(step, total_steps, peak):
    """Linear warm-up over the first tenth of the steps, then linear to zero."""
    warmup = max(1, total_steps // 10)
    return peak * min((step + 1) / warmup, (total_steps - step) / max(1, total_steps - warmup))


def seed_epoch(seed, epoch):
    """Seed all generators for one epoch (0: the initial weights), so that resuming needs no saved state."""
    torch.manual_seed(seed * 1_000_003 + epoch)  # no two alike: a run has at most 1,000,000 epochs


def epochs_left(history, epochs):
    """Yield the numbers of the epochs still to train. The first Ctrl-C makes the current one the last."""
    stopping = []

    def stop(*_):
        stopping.append(True)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        print("\nstopping after this epoch; Ctrl-C again quits now", file=sys.stderr, flush=True)

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else Ctrl-C is someone else's
        with contextlib.suppress(ValueError):  # in a thread, which cannot handle signals
            signal.signal(signal.SIGINT, stop)
    try:
        for epoch in range(len(history) + 1, epochs + 1):
            if not stopping:
                yield epoch
    finally:
        if signal.getsignal(signal.SIGINT) is stop:
            signal.signal(signal.SIGINT, signal.default_int_handler)


class Meter:
    """Sums the loss and terms, scalar tensors, of an epoch's steps; shows progress on a terminal."""

    def __init__(self, epoch, steps, args):
        self.epoch, self.steps, self.args = epoch, steps, args
        self.totals, self.done, self.start = {}, 0, time.perf_counter()

    def add(self, loss, terms):
        for name, term in dict(loss=loss, **terms).items():  # a term named loss is a TypeError
            self.totals[name] = self.totals.get(name, 0) + term.detach().float()  # no wait for the device
        self.done += 1
        if self.done % 50 == 0 and sys.stdout.isatty():
            self.totals["loss"].item()  # waits for the device, which may only have queued the steps
            rate = self.done / (time.perf_counter() - self.start)  # steps per second
            left = ((self.args.epochs - self.epoch + 1) * self.steps - self.done) / rate
            line = f"epoch {self.epoch}/{self.args.epochs}  {rate * self.args.batch_size:,.0f} images/s"
            print(f"\r\x1b[K{line}  {left:.0f} s left", end="", flush=True)

    def finish(self):
        """The mean of each term over the steps, and the seconds that they took."""
        means = {name: total.item() / self.done for name, total in self.totals.items()}  # waits, too
        return means, time.perf_counter() - self.start


def history_row(epoch, lr, train, test, seconds):
    """One row of history.csv. Raises FloatingPointError that names a term that is not finite."""
    terms = {f"train_{name}": value for name, value in train.items()}
    terms |= {f"test_{name}": value for name, value in test.items()}
    for name in sorted(terms, key=lambda name: name.endswith("_loss")):  # the terms before their sum
        if not math.isfinite(terms[name]):
            raise FloatingPointError(f"{name} is {terms[name]} in epoch {epoch}; one thing to check is --lr")
    return {"epoch": epoch, "lr": lr, **terms, "seconds": seconds}


def print_epoch(history, args):
    """Print the seconds of training left and the last epoch's test terms, as far as 80 columns hold them."""
    row, epochs = history[-1], f"{len(history)}/{args.epochs}"
    line = f"epoch {epochs}  {(args.epochs - len(history)) * row['seconds']:.0f} s left  test"
    terms = [f" {name[5:]} {value:.2f}" for name, value in row.items() if name.startswith("test_")]
    while terms and len(line + terms[0]) < 80:
        line += terms.pop(0)
    print("\r\x1b[K" * sys.stdout.isatty() + line, flush=True)  # over the line that Meter shows


# ---- Evaluation --------------------------------------------------------------------------------
@torch.no_grad()
def evaluate(loss, networks, images, *more, **settings):
    """Mean loss and terms over uint8 images (N, 1, 28, 28), in float32, z drawn with a fixed seed; floats.

    Calls loss(*networks, x, *batch_of_more, **settings) in evaluation mode, under no_grad; more: say, labels.
    """
    for network in networks:
        network.eval()
    torch.manual_seed(EVAL_SEED)
    totals = {}
    for batch, *rest in zip(*(tensor.split(EVAL_BATCH) for tensor in (images, *more))):
        value, terms = loss(*networks, to_pixels(batch), *rest, **settings)
        for name, term in dict(loss=value, **terms).items():
            totals[name] = totals.get(name, 0) + term * len(batch)  # a short last batch counts for less
    return {name: total.item() / len(images) for name, total in totals.items()}


@torch.no_grad()
def encode(encoder, images):
    """The codes (mu, logvar) of uint8 images (N, 1, 28, 28), (N, latent_dim) each; for an AE (mu, None)."""
    encoder.eval()
    codes = [encoder(to_pixels(batch)) for batch in images.split(EVAL_BATCH)]
    if isinstance(codes[0], torch.Tensor):
        return torch.cat(codes), None
    mu, logvar, *_ = zip(*codes)
    return torch.cat(mu), torch.cat(logvar)


@torch.no_grad()
def importance_weighted_bound(log_likelihood, mu, logvar, images, k):
    """A lower bound on log p(x) from k samples of q(z|x) per image, in nats per image (Burda et al., 2016).

        E[log 1/k sum_i w_i],    w_i = p(x|z_i) p(z_i) / q(z_i|x),    z_i ~ q(z|x)

    log_likelihood(x, z): log p(x|z), (B,), of x (B, 1, 28, 28) in [0, 1] and z (B, latent_dim). The bound
    lacks what it leaves out: 720.4 nats for --recon mse. mu, logvar: (N, latent_dim), codes of uint8 images.
    """
    torch.manual_seed(EVAL_SEED)
    total, batches = 0, zip(*(tensor.split(EVAL_BATCH) for tensor in (images, mu, logvar)))
    for number, (batch, mean, log_variance) in enumerate(batches, start=1):
        x, log_w = to_pixels(batch), []
        for _ in range(k):
            eps = torch.randn_like(mean)
            z = mean + eps * (0.5 * log_variance).exp()  # (B, latent_dim)
            # log p(z) - log q(z|x), over latents; their log(2 pi) cancel
            log_ratio = 0.5 * (eps.square() + log_variance - z.square()).sum(dim=1)
            log_w.append(log_ratio + log_likelihood(x, z))  # (B,)
        total += (torch.stack(log_w).logsumexp(dim=0) - math.log(k)).sum()  # over samples; over images
        if number % 4 == 0:
            print(f"bound of {k} samples: {number * EVAL_BATCH} of {len(images)} images", flush=True)
    return total.item() / len(images)


def probe_accuracy(train_codes, train_labels, codes, labels):
    """Share of `codes` (N, D) whose label ridge regression from train_codes to one-hot labels finds."""
    train_codes, codes = train_codes.cpu().double(), codes.cpu().double()  # no float64 on MPS
    classes, index = train_labels.cpu().unique(return_inverse=True)
    mean, y = train_codes.mean(dim=0), F.one_hot(index).double()  # (D,), (N, classes)
    scatter = train_codes.T @ train_codes - len(y) * mean.outer(mean)  # (D, D), of the centered codes
    penalty = 1e-3 * len(y) * torch.eye(len(mean), dtype=torch.float64)
    weights = torch.linalg.solve(scatter + penalty, train_codes.T @ (y - y.mean(dim=0)))  # (D, classes)
    scores = (codes - mean) @ weights + y.mean(dim=0)
    return (classes[scores.argmax(dim=1)] == labels.cpu()).double().mean().item()


@torch.no_grad()
def representation_metrics(decoder, data, train_mu, mu):
    """What the test codes mu (N, latent_dim) keep of the images, compared with PCA and with raw pixels."""
    batches = zip(mu.split(EVAL_BATCH), data.test_images.split(EVAL_BATCH))
    squares = sum((decoder(z) - to_pixels(images)).square().sum() for z, images in batches)
    metrics = {"mse": squares.item() / data.test_images.numel()}
    train_labels, labels = data.train_labels, data.test_labels
    metrics["probe_accuracy"] = probe_accuracy(train_mu, train_labels, mu, labels)
    # In float64: in float32, the eigenvectors of few images' scatter matrix may not converge.
    train_x, x = (images.cpu().flatten(1).double() / 255 for images in (data.train_images, data.test_images))
    metrics["pixel_probe_accuracy"] = probe_accuracy(train_x, train_labels, x, labels)
    components = min(mu.shape[1], train_x.shape[1], len(train_x) - 1)  # as many as latents, if there are
    if components:
        mean = train_x.mean(dim=0)
        train_x, x = train_x.sub_(mean), x.sub_(mean)
        _, vectors = torch.linalg.eigh(train_x.T @ train_x)  # (784, 784), columns in ascending order
        directions = vectors[:, -components:]  # (784, components)
        codes = x @ directions  # (N, components)
        metrics["pca_components"] = components
        metrics["pca_mse"] = (codes @ directions.T - x).square().mean().item()
        metrics["pca_probe_accuracy"] = probe_accuracy(train_x @ directions, train_labels, codes, labels)
    return metrics


# ---- Figures -----------------------------------------------------------------------------------
WIDTH = 3.25  # inches: fits the columns of ICML, ACM and IEEE unscaled
STYLE = {"font.size": 7, "axes.titlesize": 7, "legend.fontsize": 6, "xtick.labelsize": 6, "pdf.fonttype": 42}
STYLE |= {"ytick.labelsize": 6, "axes.linewidth": 0.5, "lines.linewidth": 1, "savefig.dpi": 300}
STYLE |= {"axes.spines.top": False, "axes.spines.right": False, "image.cmap": "gray_r"}  # ink on paper
STYLE["axes.prop_cycle"] = matplotlib.cycler(color=["#0072B2", "#D55E00"])  # Okabe & Ito: colorblind-safe
# Paul Tol's "muted" set, one color per digit, its pale gray darkened.
DIGIT_COLORS = "#CC6677 #332288 #DDCC77 #117733 #88CCEE #882255 #44AA99 #999933 #AA4499 #777777".split()


@contextlib.contextmanager
def new_figure(out, name, title, height, panels=1, layout="constrained"):
    """Yield the axes of `panels`, a column wide, `height` inches high; save a PDF, and a PNG with a title."""
    with matplotlib.style.context(["default", STYLE]):  # whatever the user's matplotlibrc says
        figure = Figure(figsize=(WIDTH, height), layout=layout)
        yield figure.subplots(panels, squeeze=False)[:, 0]
        figure.savefig(Path(out) / f"{name}.pdf")
        figure.set_figheight(height + 0.14 * (title.count("\n") + 1))
        figure.axes[0].set_title(title)
        figure.savefig(Path(out) / f"{name}.png")


def plot_grid(images, out, name, title, row_labels=(), column_labels=(), xlabel="", ylabel=""):
    """Draw images (rows, columns, 28, 28) in [0, 1] edge to edge, with a label for each row and column."""
    rows, columns = images.shape[:2]
    tiled = images.permute(0, 2, 1, 3).reshape(rows * 28, columns * 28)  # (rows * 28, columns * 28)
    cell = (WIDTH - 0.05 - 0.6 * bool(row_labels) - 0.15 * bool(ylabel)) / columns  # inches
    height = rows * cell + 0.05 + 0.13 * (bool(column_labels) + bool(xlabel))
    with new_figure(out, name, title, height, layout="compressed") as (ax,):
        ax.imshow(tiled.cpu().numpy(), vmin=0, vmax=1, interpolation="none")
        ax.set(xlabel=xlabel, ylabel=ylabel)
        ax.set_yticks([28 * row + 14 for row in range(len(row_labels))], row_labels)
        ax.set_xticks([28 * column + 14 for column in range(len(column_labels))], column_labels)
        ax.tick_params(length=0)
        ax.spines[:].set_visible(False)


@torch.no_grad()
def decode_grid(decoder, z):
    """Codes z (rows, columns, latent_dim) to images (rows, columns, 28, 28) in [0, 1]."""
    return decoder(z.flatten(0, 1)).view(*z.shape[:2], 28, 28)


def first_of_each_class(labels):
    """Indices of the first image of each class that occurs in labels (N,), by class."""
    return torch.stack([(labels == label).nonzero()[0, 0] for label in labels.unique()])


def plot_reconstructions(decoder, mu, data, out):
    """The first test image of each class above its reconstruction from mu (N, latent_dim), the test codes."""
    chosen = first_of_each_class(data.test_labels)
    images = to_pixels(data.test_images[chosen, 0])[None]  # (1, classes, 28, 28)
    rows = torch.cat([images, decode_grid(decoder, mu[None, chosen])])
    plot_grid(rows, out, "reconstructions", f"{data.name}: test images", ["input", "reconstruction"])


def plot_interpolations(decoder, mu, data, out, steps=11):
    """Straight lines between the codes of test images of two classes: 0 to 1, 2 to 3, ... 8 to 9."""
    chosen = first_of_each_class(data.test_labels)
    chosen = chosen if len(chosen) > 1 else torch.arange(2, device=mu.device)  # of a single class, two images
    first, second = mu[chosen[: len(chosen) // 2 * 2]].view(-1, 2, 1, mu.shape[1]).unbind(dim=1)
    share = torch.linspace(0, 1, steps, device=mu.device)[:, None]
    images = decode_grid(decoder, torch.lerp(first, second, share))  # of codes (pairs, steps, latent_dim)
    title = f"{data.name}: between the codes of two test images"
    columns = [f"{value:.1f}" for value in share.flatten().tolist()]
    plot_grid(images, out, "interpolations", title, (), columns, "share of the second code")


def plot_loss_curves(history, labels, data, out):
    """One panel for each term in `labels` that the history has: train and test, over epochs."""
    labels = {term: text for term, text in labels.items() if f"test_{term}" in history[0]} or {"loss": "loss"}
    with new_figure(out, "loss_curves", f"{data.name}: losses", 1 + 0.8 * len(labels), len(labels)) as axes:
        for ax, (name, label) in zip(axes, labels.items()):
            late, tenth = [], len(history) // 10  # the range shows neither the first fall nor a test's spike
            for split in ("train", "test"):
                values = [row[f"{split}_{name}"] for row in history]
                ax.plot([row["epoch"] for row in history], values, marker=".", markersize=3, label=split)
                late += values[tenth:] if split == "train" else sorted(values[tenth:])[tenth : -tenth or None]
            low, high = min(late), max(late)
            late += [value for value in values[tenth:] if 2 * low - high < value < 2 * high - low]
            margin = 0.05 * (max(late) - min(late)) or 1
            ax.set(xlabel="epoch", ylabel=label, ylim=(min(late) - margin, max(late) + margin))
            ax.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)  # also for a single epoch
            ax.label_outer()
        axes[0].legend(ncols=2, frameon=False)


def linear_discriminants(codes, labels):
    """The two directions (latent_dim, 2) that best separate codes (N, latent_dim) by label: Fisher (1936)."""
    _, index = labels.cpu().unique(return_inverse=True)
    codes, y = codes.cpu().double(), F.one_hot(index).double()  # no float64 on MPS
    means = y @ (y.T @ codes / y.sum(dim=0)[:, None])  # (N, latent_dim): of each code's class
    within, between = codes - means, means - codes.mean(dim=0)
    variance, axes = torch.linalg.eigh(within.T @ within / len(codes))
    whiten = axes / (variance + 1e-6 * variance.mean() + 1e-9).sqrt()  # finite for dead latents, too
    directions = whiten @ torch.linalg.svd(between @ whiten, full_matrices=False).Vh[:2].T
    return F.pad(directions, (0, 2 - directions.shape[1])).float()  # zero where there is no second one


def plot_latent_space(train_mu, mu, data, out):
    """Test codes mu (N, latent_dim) by class: the plane itself, or two linear discriminants of train_mu."""
    points, axes, title = mu.cpu(), ["$\\mu_0$", "$\\mu_1$"], f"{data.name}: codes of the test images"
    if mu.shape[1] != 2:  # not principal components: the KL makes all active latents of a VAE alike
        points = (points - train_mu.cpu().mean(dim=0)) @ linear_discriminants(train_mu, data.train_labels)
        axes = [f"{rank} linear discriminant of $\\mu$" for rank in ("first", "second")]
        title += ", along the two\nlinear discriminants of the training codes"
    classes, index = data.test_labels.cpu().unique(return_inverse=True)
    colors = [DIGIT_COLORS[i % len(DIGIT_COLORS)] for i in index]
    halo = [withStroke(linewidth=2, foreground="white")]
    with new_figure(out, "latent_space", title, 0.9 * WIDTH) as (ax,):
        # In the test set's order, so that no class is drawn on top of all others; a bitmap in the PDF too.
        ax.scatter(*points.T.numpy(), s=1.5, linewidths=0, c=colors, rasterized=True)
        for i, label in enumerate(classes.tolist()):
            where = points[index == i].median(dim=0).values.tolist()
            ax.text(*where, label, weight="bold", ha="center", va="center", path_effects=halo)
            ax.scatter([], [], s=12, c=DIGIT_COLORS[i % len(DIGIT_COLORS)], label=label)  # for the legend
        ax.figure.legend(loc="outside right center", frameon=False, handletextpad=0.1)
        # By the data's limits: a box that shrank to fit would push the label over the figure's edge.
        ax.set(xlabel=axes[0], ylabel=axes[1], aspect="equal", adjustable="datalim")


def plot_kl_per_dimension(mu, logvar, data, out):
    """Bars of the KL of each latent over the test codes mu, logvar (N, latent_dim), sorted."""
    kl, order = kl_per_latent(mu, logvar).sort(descending=True)
    title = f"{data.name}: sum over latents {kl.sum():.1f} nats"
    with new_figure(out, "kl_per_dimension", title, 0.5 * WIDTH) as (ax,):
        ax.bar(range(len(kl)), kl.tolist())
        ax.set(xlabel="latents, sorted by their KL", ylabel="KL (nats per image)")
        every = math.ceil(len(kl) / 30)  # as many numbers as have room
        ax.set_xticks(range(0, len(kl), every), order[::every].tolist())


def plot_traversals(decoder, mu, logvar, data, out, rows=10, columns=7):
    """Move one latent from -3 to 3, the others held at the first test image's mu; largest KL on top."""
    kl, order = (tensor[:rows] for tensor in kl_per_latent(mu, logvar).sort(descending=True))
    values = torch.linspace(-3, 3, columns, device=mu.device)
    z = mu[0].repeat(len(order), columns, 1)  # (rows, columns, latent_dim)
    for row, latent in enumerate(order):
        z[row, :, latent] = values
    title = f"{data.name}: one latent moved,\nothers at a test image's code"
    row_labels = [f"$z_{{{latent}}}$  {nats:.1f} nats" for latent, nats in zip(order, kl)]
    labels = row_labels, [f"{value:g}" for value in values], "value of the latent", "latent, sorted by its KL"
    plot_grid(decode_grid(decoder, z), out, "traversals", title, *labels)


def plot_manifold(decoder, data, out, steps=20):
    """Decode a grid over a latent plane, even in the prior's probability (Kingma & Welling, 2014)."""
    values = torch.special.ndtri((torch.arange(steps) + 0.5) / steps)  # the inverse of the normal CDF
    z = torch.cartesian_prod(-values, values).flip(1).view(steps, steps, 2)  # z_0 to the right, z_1 up
    images = decode_grid(decoder, z.to(data.test_images.device))
    title = f"{data.name}: decoded quantiles of the prior"
    plot_grid(images, out, "manifold", title, xlabel="$z_0$, to the right", ylabel="$z_1$, up")


# ---- Device ------------------------------------------------------------------------------------
def pick_device(name="auto"):
    """The torch.device for a --device value. Raises ValueError with torch's reason if it cannot be used."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        one = torch.ones(1, device=name)
        one.add(one).item()
        return one.device  # with its index
    except Exception as error:  # of all kinds: no driver, built without it, out of memory
        reason = (str(error) or repr(error)).splitlines()[0]
        raise ValueError(f"--device {name}: {reason}; choose auto, cpu, cuda, cuda:N or mps") from error


def pick_precision(device):
    """The --precision, "bf16" or "fp32", in which training is faster on `device`, and how that is known."""
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        return "bf16" if capability >= (8, 0) else "fp32", "compute capability {}.{}".format(*capability)
    if device.type != "cpu":
        return "fp32", f"the default on {device.type}"
    threads, seconds = torch.get_num_threads(), {}
    torch.set_num_threads(1)  # next to a busy process, several would wait for each other
    for dtype in (torch.float32, torch.bfloat16):
        names = {"a": torch.ones(256, 256, dtype=dtype)}
        seconds[dtype] = min(timeit.repeat("a @ a", globals=names, timer=time.thread_time, number=10))
    torch.set_num_threads(threads)
    ratio = seconds[torch.float32] / seconds[torch.bfloat16]
    return "bf16" if ratio >= 1.5 else "fp32", f"bfloat16 products are {ratio:.2g} times as fast"


def set_up_device(device, *networks):
    """Make float32 exact on `device`, and training fast: memory is reused, weights are channels_last."""
    torch.set_float32_matmul_precision("highest")  # float32 is not rounded to TensorFloat-32, in products
    torch.backends.cudnn.allow_tf32 = False  # and in convolutions
    if device.type == "cpu" and sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda *_: None)  # glibc's; saves a sixth of a step
        mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD, at its largest
        mallopt(-1, (2 << 30) - 1)  # M_TRIM_THRESHOLD
    if device.type != "mps":  # its channels_last kernels are slower, and were wrong at times (pytorch#143196)
        for network in networks:
            network.to(memory_format=torch.channels_last)  # the layout that convolution kernels work in


# ---- Run folder --------------------------------------------------------------------------------
def start_run(args):
    """Pick the device, load the data, make the folder; returns (data, out). Bad input ends the program."""
    try:
        device = pick_device(args.device)
        root = args.data or Path(__file__).with_name("data")
        data = load_data(root, args.dataset, device, args.limit, getattr(args, "binarize", False))
        out = Path(args.resume or args.out or free_folder(Path("runs", Path(args.script).stem)))
        out.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError, ValueError) as error:
        print(f"{args.script}: error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    args.out, reason = str(out), "as set"
    if args.precision == "auto":
        args.precision, reason = pick_precision(device)
    print(f"{device}, {args.precision} ({reason}), seed {args.seed}, writing to {out}", flush=True)
    return data, out


def free_folder(first):
    """Make and return the first of `first`, `first`-2, `first`-3, ... that does not exist."""
    first.parent.mkdir(parents=True, exist_ok=True)
    for number in range(1, 1_000_000):
        folder = first.with_name(f"{first.name}-{number}") if number > 1 else first
        with contextlib.suppress(FileExistsError):
            folder.mkdir()  # makes it or fails, in one step: two runs never get the same folder
            return folder


def write_whole(path, content, suffix="tmp"):
    """Write bytes to a file in one step, so that a kill or a full disk leaves the old file."""
    temporary = path.with_name(f".{path.name}.{suffix}")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def save_checkpoint(out, history, args, data, **parts):
    """Write checkpoint.pt, then history.csv. parts: the networks and optimizers, under their names."""
    weights = [p for part in parts.values() if isinstance(part, nn.Module) for p in part.parameters()]
    device = data.train_images.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    environment = {"device": name, "threads": torch.get_num_threads(), "precision": args.precision}
    environment |= {"python": sys.version.split()[0], "torch": str(torch.__version__)}
    environment |= {"torchvision": torchvision.__version__, "train_images": len(data.train_images)}
    environment |= {"test_images": len(data.test_images)}
    environment["parameters"] = sum(p.numel() for p in weights if p.requires_grad)
    checkpoint = {name: part.state_dict() for name, part in parts.items()}
    checkpoint |= {"args": vars(args), "history": history, "environment": environment}
    checkpoint["model_name"] = getattr(parts.get("encoder"), "model_name", None)
    buffer = io.BytesIO()  # a full disk is then a plain OSError, unlike torch.save's own error
    torch.save(checkpoint, buffer)
    write_whole(Path(out, "checkpoint.pt"), buffer.getvalue())
    Path(out, "metrics.json").unlink(missing_ok=True)  # it describes fewer epochs
    write_history(out, history)


def write_history(out, history):
    file = io.StringIO(newline="")
    csv.writer(file).writerows([history[0].keys(), *(row.values() for row in history)])
    write_whole(Path(out, "history.csv"), file.getvalue().encode())


def read_checkpoint(folder):
    """The content of folder/checkpoint.pt, on the CPU. Raises OSError if missing, ValueError if damaged."""
    path = Path(folder, "checkpoint.pt")
    content = io.BytesIO(path.read_bytes())
    try:
        checkpoint = torch.load(content, map_location="cpu", weights_only=True)  # runs no code from the file
        return checkpoint | {name: checkpoint[name] for name in ("args", "history", "environment")}
    except Exception as error:  # damaged bytes raise errors of all kinds
        raise ValueError(f"{path} is damaged, or not a checkpoint of these scripts") from error


def load_checkpoint(out, **parts):
    """Load networks and optimizers from the checkpoint in `out`, if any; returns its history, or else []."""
    if not Path(out, "checkpoint.pt").exists():
        return []
    checkpoint = read_checkpoint(out)
    for name, part in parts.items():
        part.load_state_dict(checkpoint[name])
        # Fused steps assume that averages lie in memory as their parameter does; another device's may not.
        for parameter, state in getattr(part, "state", {}).items():
            for key, value in state.items():
                if torch.is_tensor(value) and value.shape == parameter.shape:
                    state[key] = torch.empty_like(parameter).copy_(value)
    write_history(out, checkpoint["history"])  # a kill may have left it an epoch behind
    return checkpoint["history"]


def load_model(folder):
    """The trained (encoder, decoder, args) of a run with this file's networks, on the CPU, for evaluation."""
    checkpoint = read_checkpoint(folder)
    args = argparse.Namespace(**checkpoint["args"])
    encoder = Encoder(args.hidden_dims, args.latent_dim, checkpoint["model_name"] or "AE")
    decoder = Decoder(args.latent_dim, args.hidden_dims)
    encoder.load_state_dict(checkpoint["encoder"])
    decoder.load_state_dict(checkpoint["decoder"])
    return encoder.eval(), decoder.eval(), args


def save_metrics(out, measured):
    """Write metrics.json: what the checkpoint in `out` says, its last test terms, and what was `measured`."""
    path, checkpoint = Path(out) / "metrics.json", read_checkpoint(out)
    args, history, environment = (checkpoint[name] for name in ("args", "history", "environment"))
    terms = {name[5:]: value for name, value in history[-1].items() if name.startswith("test_")}
    older = json.loads(path.read_text(encoding="utf-8"))["test"] if path.exists() else {}
    # The bound of a file that is replaced stays; a term of the script wins over a measurement of its name.
    test = {**terms, **{name: older[name] for name in older if name.startswith("iw_")}, **measured, **terms}
    for name, text in {name: json.dumps(value) for name, value in test.items()}.items():
        if "NaN" in text or "Infinity" in text:
            print(f"{name} is not finite, so it is left out of {path}", file=sys.stderr)
            del test[name]
    seconds = sum(row["seconds"] for row in history)
    images = len(history) * (environment["train_images"] // args["batch_size"]) * args["batch_size"]
    train = {"epochs": len(history), "seconds": seconds, "images_per_second": images / seconds}
    metrics = {"args": args, "test": test, "train": train, "environment": environment}
    write_whole(path, f"{json.dumps(metrics, indent=2)}\n".encode())


def end_run(history, args):
    """Say where the results are; for a run that was stopped also how to resume it, with exit code 130."""
    print(f"figures and numbers are in {args.out}", flush=True)
    if len(history) < args.epochs:
        script = sys.argv[0] if Path(sys.argv[0]).name == args.script else args.script  # as it was started
        command = shlex.join(["python", script, "--resume", args.out])
        print(f"stopped after {len(history)} of {args.epochs} epochs; resume with: {command}", flush=True)
        raise SystemExit(130)


# ---- Command line ------------------------------------------------------------------------------
def checked(kind, accept, wanted, text):
    """`kind` of the text of a flag, refused unless `accept` of it is true."""
    with contextlib.suppress(ValueError):
        if accept(value := kind(text)):
            return value
    raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")


positive_int = partial(checked, int, lambda value: 1 <= value <= 10**6, "a whole number from 1 to 1000000")
positive_float = partial(checked, float, lambda value: 0 < value < math.inf, "a finite number above 0")
positive_or_zero = partial(checked, float, lambda value: 0 <= value < math.inf, "a finite number from 0")
train_size = partial(checked, int, lambda value: 1 <= value <= 60_000, "a whole number from 1 to 60000")
seed = partial(checked, int, lambda value: 0 <= value < 2**32, "a whole number from 0 to 2**32 - 1")
folder = partial(checked, os.path.expanduser, bool, "the name of a folder")


def parse_args(parser, argv=None):
    """Parse and check the flags; with --resume DIR they are those of the run in DIR, if there is one."""
    parser.set_defaults(script=parser.prog)
    args = parser.parse_args(argv)
    flag, named = ("--resume", args.resume) if args.resume else ("--out", args.out)
    try:
        if args.resume and Path(named, "checkpoint.pt").exists():
            args = resumed_args(parser, argv, args)
        elif named and Path(named).exists() and any(path.name[0] != "." for path in Path(named).iterdir()):
            raise ValueError(f"{named} is neither an empty folder nor a run to resume")
    except (OSError, ValueError) as error:
        parser.error(f"argument {flag}: {error}")
    for name, value in vars(args).items():
        try:
            setattr(args, name, json.loads(json.dumps(value)))  # plain values, as a checkpoint holds
        except TypeError as error:
            parser.error(f"argument --{name}: {error}; use a type such as str or float")
    if args.batch_size > args.limit:
        parser.error(f"argument --batch-size: {args.batch_size} is more than {args.limit} training images")
    if getattr(args, "warmup", 0) > args.epochs:
        parser.error(f"argument --warmup: {args.warmup:g} epochs in a run of {args.epochs}")
    if getattr(args, "iw_samples", None) and args.recon == "bce" and not getattr(args, "binarize", False):
        parser.error("argument --iw-samples: gray pixels have no likelihood; add --binarize or --recon mse")
    return args


def resumed_args(parser, argv, args):
    """The flags of the run in args.resume. Raises ValueError for a value in argv that would change it."""
    stored = read_checkpoint(args.resume)["args"]
    if stored["script"] != args.script:
        raise ValueError(f"the run in {args.resume} is one of {stored['script']}, not of {args.script}")
    stored = {name: stored.get(name, parser.get_default(name)) for name in vars(args)}
    parser.set_defaults(**{name: stored[name] for name in stored.keys() - {"out", "resume"}})
    args = parser.parse_args(argv)
    if args.precision == "auto":
        args.precision = stored["precision"]
    for name in stored.keys() - {"out", "resume", "device", "data", "iw_samples"}:
        if json.dumps(getattr(args, name), default=str) != json.dumps(stored[name]):
            flag = f"--{name.replace('_', '-')}"
            raise ValueError(f"{flag} is {stored[name]} in that run; for another value, start a new run")
    return args
