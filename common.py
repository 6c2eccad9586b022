"""What ae.py, vae.py and beta_vae.py share: data, Encoder, Decoder, training, evaluation, figures.

The sections stand in the order in which the data flows, and the machinery (run folder, command line)
comes last. All losses are in nats per image: summed over pixels or latents, averaged over the batch.
"""

import argparse
import contextlib
import csv
import ctypes
import gzip
import io
import itertools
import json
import math
import os
import shlex
import shutil
import sys
import time
from collections import defaultdict, namedtuple
from functools import partial
from pathlib import Path

import matplotlib
import torch
import torch.nn.functional as F
import torchvision
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from torch import nn
from torch.overrides import TorchFunctionMode
from torchvision.datasets.utils import check_integrity, download_url

EVAL_SEED = 0  # of the samples z behind every test number, whatever the run's own seed is
EVAL_BATCH = 250  # images at a time in evaluation: bounds its memory, and more are slower on a CPU


# ---- Data --------------------------------------------------------------------------------------

# The data set's name and, on one device, uint8 images (N, 1, 28, 28) and int64 labels (N,).
Data = namedtuple("Data", "name train_images train_labels test_images test_labels")


def load_data(root, name="MNIST", device="cpu", limit=None, binarize=False):
    """Load MNIST, FashionMNIST or KMNIST onto `device`, from the archives in root/name/raw or else by download.

    limit: how many training images to keep. binarize: draw the test images, once, from Bernoulli(pixel).
    Raises RuntimeError that names every archive that is not the original, or neither there nor to be had.
    """
    source, folder = getattr(torchvision.datasets, name), Path(root) / name / "raw"
    archives = [(folder / archive, md5) for archive, md5 in source.resources]
    bad = [path.name for path, md5 in archives if path.exists() and not check_integrity(path, md5)]
    for path, md5 in archives:
        # A bad one may be another data set's: nothing is written over it, or put beside it.
        if not path.exists() and (bad or not download(source, path, md5)):
            bad.append(path.name)
    if bad:
        problem = f"missing, damaged or not {name}'s in {folder}, and no download"
        raise RuntimeError(f"{', '.join(bad)}: {problem}; put the original there")
    train_images, train_labels, test_images, test_labels = (read_idx(path) for path, _ in archives)
    if binarize:
        test_images = binarize_once(test_images)
    train = train_images[:limit, None].to(device), train_labels[:limit].long().to(device)  # (N, 1, 28, 28), (N,)
    return Data(name, *train, test_images[:, None].to(device), test_labels.long().to(device))


def download(source, path, md5):
    """Fetch the archive `path` from the first of torchvision's mirrors that gives it whole; False if none does."""
    for mirror in source.mirrors:
        with contextlib.suppress(OSError, RuntimeError), replacing(path) as temporary:
            download_url(mirror + path.name, path.parent, temporary.name, md5)
            return True
    return False


def read_idx(path):
    """The uint8 tensor in a gzipped IDX file: four bytes, the last the number of dimensions; their sizes; values."""
    content = bytearray(gzip.decompress(path.read_bytes()))
    sizes = [int.from_bytes(content[4 * i : 4 * i + 4], "big") for i in range(1, content[3] + 1)]
    return torch.frombuffer(content, dtype=torch.uint8, offset=4 + 4 * len(sizes)).view(sizes)


def to_pixels(images):
    """uint8 images in [0, 255] to float32 in [0, 1], same shape. Raises TypeError for images of another type."""
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
    """Images (B, 1, 28, 28) in [0, 1] to mu for model_name "AE", (mu, logvar, z) for "VAE", each (B, latent_dim).

    z is a sample of N(mu, exp(logvar)). Any other name raises ValueError.
    """

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
        self.fc_mean = nn.Linear(hidden_dims[3] * 2 * 2, latent_dim)
        self.fc_logvar = nn.Linear(hidden_dims[3] * 2 * 2, latent_dim)
        self.fc_logvar.requires_grad_(model_name == "VAE")  # an AE has it, and never uses it

    def reparameterize(self, mu, logvar):
        """A sample of N(mu, exp(logvar)) that passes gradients to both (Kingma & Welling, 2014)."""
        std = torch.exp(0.5 * logvar)
        eps = torch.randn_like(std)
        return mu + eps * std

    def forward(self, x):
        x = F.pad(x, (2, 2, 2, 2))  # (B, 1, 28, 28) -> (B, 1, 32, 32)
        h = self.model(x).flatten(1)  # (B, hidden_dims[3], 2, 2) -> (B, hidden_dims[3] * 4)
        mu = self.fc_mean(h)
        if self.model_name == "VAE":
            logvar = self.fc_logvar(h)
            z = self.reparameterize(mu, logvar)
            return mu, logvar, z
        return mu


class Decoder(nn.Module):
    """Codes (B, latent_dim) to images (B, 1, 28, 28) in [0, 1]."""

    def __init__(self, latent_dim, hidden_dims, expand_dim=4):
        super().__init__()
        self.expand_dim = expand_dim
        self.input_layer = nn.Linear(latent_dim, hidden_dims[-1] * expand_dim * expand_dim)
        self.decoder = nn.Sequential(
            nn.ConvTranspose2d(hidden_dims[-1], hidden_dims[-2], 4, 2, 1),
            nn.LeakyReLU(0.01),
            nn.ConvTranspose2d(hidden_dims[-2], hidden_dims[-3], 4, 2, 1),
            nn.LeakyReLU(0.01),
            nn.ConvTranspose2d(hidden_dims[-3], hidden_dims[-4], 4, 2, 1),
            nn.LeakyReLU(0.01),
        )
        self.last_layer = nn.Sequential(
            nn.ConvTranspose2d(hidden_dims[-4], 1, 3, 1, 1),
            nn.Sigmoid(),
        )

    def start_at_mean(self, images):
        """Have the first images be the mean pixel of uint8 `images`, so that no step is spent on finding it."""
        nn.init.constant_(self.last_layer[0].bias, to_pixels(images).mean().logit().item())

    def logits(self, z):
        """The images before the sigmoid: what losses use, since BCE on logits cannot saturate."""
        h = self.input_layer(z)
        h = h.view(h.size(0), -1, self.expand_dim, self.expand_dim)  # (B, hidden_dims[-1], 4, 4)
        h = self.last_layer[0](self.decoder(h))  # (B, 1, 32, 32)
        return h[..., 2:-2, 2:-2]  # (B, 1, 28, 28): the crop that undoes the encoder's padding

    def forward(self, z):
        return self.last_layer[1](self.logits(z))


# ---- Terms of the losses -----------------------------------------------------------------------


def reconstruction_term(logits, x, kind="bce"):
    """-log p(x|z) of each image, in nats. logits, x: (B, 1, 28, 28), x in [0, 1]. Returns (B,).

    kind "bce": Bernoulli pixels. Grey ones make this the cross-entropy, which is no likelihood.
    kind "mse": Gaussian pixels of unit variance around sigmoid(logits), less 784 / 2 log(2 pi) = 720.5 nats.
    """
    if kind == "bce":
        pixels = F.binary_cross_entropy_with_logits(logits.float(), x, reduction="none")
    else:
        pixels = 0.5 * (logits.float().sigmoid() - x).square()
    return pixels.sum(dim=(1, 2, 3))  # over pixels


def kl_per_latent(mu, logvar):
    """KL(N(mu, exp(logvar)) || N(0, 1)) of each latent, in nats, averaged over the batch.

    mu, logvar: (B, latent_dim). Returns (latent_dim,). Kingma & Welling (2014), appendix B.
    """
    mu, logvar = mu.float(), logvar.float()
    return (-0.5 * (1 + logvar - mu.square() - logvar.exp())).mean(dim=0)  # over the batch


# ---- Training ----------------------------------------------------------------------------------

ADAMW = {"betas": (0.9, 0.95), "weight_decay": 0.1}


def learning_rate(step, total_steps, peak):
    """Linear warm-up over the first tenth of the steps, then linear to zero."""
    warmup = max(1, total_steps // 10)
    return peak * min((step + 1) / warmup, (total_steps - step) / max(1, total_steps - warmup))


def seed_epoch(seed, epoch):
    """Seed every generator for one epoch (0: the initial weights), so that no state needs saving."""
    torch.manual_seed(seed * 1_000_003 + epoch)  # of 1,000,000 epochs at most: each has random numbers of its own


def train_model(encoder, decoder, data, loss_fn, args, out, progress=None):
    """Train on data.train_images with AdamW; after each epoch test, and write history and checkpoint to `out`.

    loss_fn(encoder, decoder, x): x (B, 1, 28, 28) in [0, 1]; returns the loss and its named terms, nats per image.
    In bfloat16, codes and logits reach it with three digits: take mu.float() before any arithmetic of your own.
    args: epochs, batch_size, lr, seed, precision, binarize, resume (goes on from the checkpoint in `out`, if any).
    progress: a scalar tensor to keep at the share of the training done, for a loss that changes in its course.
    Returns the history, one dict an epoch; its seconds are those of the training steps alone. After Ctrl-C it and the
    models are the last checkpoint's. Raises KeyboardInterrupt if there is none, FloatingPointError on divergence.
    """
    device = data.train_images.device
    precision, _ = pick_precision(device, args.precision)
    set_up_device(encoder, decoder, device)
    optimizer = torch.optim.AdamW([*encoder.parameters(), *decoder.parameters()], args.lr, **ADAMW, fused=True)
    history = restore(encoder, decoder, optimizer, out) if args.resume else []
    steps = len(data.train_images) // args.batch_size  # full batches only
    progress = torch.zeros((), device=device) if progress is None else progress

    def training_step(batch):  # (B,) indices of images
        x = to_pixels(data.train_images[batch])  # (B, 1, 28, 28)
        if args.binarize:
            x = torch.bernoulli(x)
        with computing_in(precision, device):
            loss, terms = loss_fn(encoder, decoder, x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return {name: term.detach() for name, term in dict(loss=loss, **terms).items()}  # one loss, or an error

    try:
        if device.type == "cuda" and len(history) < args.epochs:
            training_step = as_cuda_graph(training_step, encoder, decoder, optimizer, args.batch_size)
        for epoch in range(len(history) + 1, args.epochs + 1):
            seed_epoch(args.seed, epoch)
            encoder.train()
            decoder.train()
            totals = defaultdict(lambda: torch.zeros((), device=device))  # reading them would stall each step
            start = time.perf_counter()
            order = torch.randperm(len(data.train_images), device=device)[: steps * args.batch_size]
            for step, batch in enumerate(order.split(args.batch_size)):
                done = (epoch - 1) * steps + step
                progress.fill_(done / (args.epochs * steps))
                lr = learning_rate(done, args.epochs * steps, args.lr)
                for group in optimizer.param_groups:
                    group["lr"] = lr
                for name, term in training_step(batch).items():
                    totals[name] += term
                if step % 50 == 49 and sys.stdout.isatty():
                    totals["loss"].item()  # waits for the device, which may have only queued the steps
                    show_progress(history, epoch, args, step + 1, steps, time.perf_counter() - start)
            train = {f"train_{name}": total.item() / steps for name, total in totals.items()}  # waits for the device
            seconds = time.perf_counter() - start
            progress.fill_(epoch / args.epochs)
            test = evaluate(encoder, decoder, data.test_images, loss_fn)
            terms = train | {f"test_{name}": value for name, value in test.items()}
            for name, value in terms.items():
                if not math.isfinite(value):
                    raise FloatingPointError(f"{name} is {value} in epoch {epoch}: try an --lr below {args.lr:g}")
            history.append({"epoch": epoch, "lr": lr, **terms, "seconds": seconds})
            save_checkpoint(encoder, decoder, optimizer, history, args, out)
            show_progress(history, epoch, args, steps, steps, seconds)
    except KeyboardInterrupt:
        history = restore(encoder, decoder, optimizer, out)  # the step or the epoch is half done
        if not history:
            raise
    encoder.eval()
    decoder.eval()
    return history


def show_progress(history, epoch, args, done, steps, elapsed):
    """Speed and time left, after `done` of `steps` of an epoch; test terms are the last finished epoch's."""
    left = elapsed / done * ((args.epochs - epoch + 1) * steps - done)
    line = f"epoch {epoch}/{args.epochs}  {done * args.batch_size / elapsed:,.0f} images/s  {left:.0f} s left"
    if history:
        test = {name: value for name, value in history[-1].items() if name.startswith("test_")}
        line += "  test" + "".join(f" {name.removeprefix('test_')} {value:.2f}" for name, value in test.items())
    if sys.stdout.isatty():  # one line an epoch, updated in place until the epoch ends
        line = line[: shutil.get_terminal_size().columns - 1]  # one that wraps could not be overwritten
        print(f"\r\x1b[K{line}", end="\n" if len(history) == epoch else "", flush=True)
    else:
        print(line, flush=True)


# ---- Evaluation --------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(encoder, decoder, images, loss_fn):
    """Mean loss and terms over all `images` (N, 1, 28, 28) uint8, in float32, z sampled from a fixed seed."""
    encoder.eval()
    decoder.eval()
    torch.manual_seed(EVAL_SEED)
    totals = defaultdict(float)
    for batch in images.split(EVAL_BATCH):
        loss, terms = loss_fn(encoder, decoder, to_pixels(batch))
        for name, value in dict(loss=loss, **terms).items():
            totals[name] += value * len(batch)  # a short last batch counts for less
    return {name: value.item() / len(images) for name, value in totals.items()}


@torch.no_grad()
def encode(encoder, images):
    """The codes (mu, logvar) of uint8 images (N, 1, 28, 28), each (N, latent_dim); of an AE logvar is None."""
    encoder.eval()
    codes = [encoder(to_pixels(batch)) for batch in images.split(EVAL_BATCH)]
    if isinstance(codes[0], torch.Tensor):
        return torch.cat(codes), None
    mu, logvar, _ = zip(*codes)
    return torch.cat(mu), torch.cat(logvar)


@torch.no_grad()
def importance_weighted_bound(decoder, mu, logvar, images, k, kind="bce"):
    """log p(x) bounded from below with k samples of q(z|x) an image, in nats per image: Burda et al. (2016).

        E[log 1/k sum_i w_i],    w_i = p(x|z_i) p(z_i) / q(z_i|x),    z_i ~ q(z|x)

    mu, logvar: (N, latent_dim), the codes of uint8 images (N, 1, 28, 28). kind: as for `reconstruction_term`.
    """
    torch.manual_seed(EVAL_SEED)
    size = 2500 if images.device.type == "cuda" else EVAL_BATCH  # images at a time
    total = 0
    for start in range(0, len(images), size):
        mean, log_variance, batch = (tensor[start : start + size] for tensor in (mu, logvar, images))
        x, log_w = to_pixels(batch), []
        for _ in range(k):
            eps = torch.randn_like(mean)
            z = mean + eps * (0.5 * log_variance).exp()  # (B, latent_dim)
            # log p(z) - log q(z|x), over latents; their log(2 pi) cancel
            log_ratio = 0.5 * (eps.square() + log_variance - z.square()).sum(dim=1)
            log_w.append(log_ratio - reconstruction_term(decoder.logits(z), x, kind))  # (B,)
        total += (torch.stack(log_w).logsumexp(dim=0) - math.log(k)).sum()  # over samples; over images
        done = start + len(batch)
        if done % 1000 == 0:
            print(f"bound of {k} samples: {done}/{len(images)} images", flush=True)
    return total.item() / len(images)


def probe_accuracy(train_codes, train_labels, codes, labels, scatter=None):
    """Share of `codes` (N, D) whose label a linear probe finds: ridge regression to one-hot labels, then argmax.

    scatter: (D, D), the products of the centred train_codes, where they are known already.
    """
    mean, y = train_codes.mean(dim=0), F.one_hot(train_labels, 10).float()  # (D,), (N, 10)
    if scatter is None:
        scatter = train_codes.T @ train_codes - len(y) * mean.outer(mean)
    penalty = 1e-3 * len(y) * torch.eye(len(mean))
    products = train_codes.T @ (y - y.mean(dim=0))  # (D, 10)
    weights = torch.linalg.solve(scatter.cpu() + penalty, products.cpu())  # not every accelerator can solve
    scores = (codes - mean) @ weights.to(codes.device) + y.mean(dim=0)
    return (scores.argmax(dim=1) == labels).float().mean().item()


@torch.no_grad()
def representation_metrics(decoder, data, train_mu, mu):
    """What the test codes mu (N, latent_dim) keep of the images, beside PCA with as many components and raw pixels."""
    batches = zip(mu.split(EVAL_BATCH), data.test_images.split(EVAL_BATCH))
    squares = sum((decoder(code) - to_pixels(images)).square().sum() for code, images in batches)
    train_pixels, pixels = (to_pixels(images).flatten(1) for images in (data.train_images, data.test_images))
    mean = train_pixels.mean(dim=0)
    train_pixels -= mean
    pixels -= mean
    scatter = train_pixels.T @ train_pixels  # (784, 784)
    _, directions = torch.linalg.eigh(scatter.cpu())  # (784, 784), columns in ascending order
    directions = directions[:, -mu.shape[1] :].to(mu.device)  # (784, latent_dim)
    pca = pixels @ directions  # (N, latent_dim)
    probe = partial(probe_accuracy, train_labels=data.train_labels, labels=data.test_labels)
    return {
        "mse": squares.item() / data.test_images.numel(),
        "pca_mse": (pca @ directions.T - pixels).square().mean().item(),
        "probe_accuracy": probe(train_mu, codes=mu),
        "pca_probe_accuracy": probe(train_pixels @ directions, codes=pca),
        "pixel_probe_accuracy": probe(train_pixels, codes=pixels, scatter=scatter),
    }


# ---- Figures -----------------------------------------------------------------------------------

WIDTH = 3.25  # inches: fits the columns of ICML, ACM and IEEE unscaled
STYLE = {
    "font.size": 7,
    "axes.titlesize": 7,
    "axes.labelsize": 7,
    "xtick.labelsize": 6,
    "ytick.labelsize": 6,
    "legend.fontsize": 6,
    "axes.linewidth": 0.5,
    "lines.linewidth": 1,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.prop_cycle": matplotlib.cycler(color=["#0072B2", "#D55E00"]),  # Okabe & Ito: colour-blind-safe
    "image.cmap": "gray_r",  # ink on paper
    "savefig.dpi": 300,
    "pdf.fonttype": 42,  # TrueType, which publishers ask for
}
# Paul Tol's "muted" set, one colour a digit, its pale grey darkened.
DIGIT_COLOURS = "#CC6677 #332288 #DDCC77 #117733 #88CCEE #882255 #44AA99 #999933 #AA4499 #777777".split()
NATS = ("loss", "recon", "kl", "elbo")  # the terms whose unit is known; others may be a script's own


@contextlib.contextmanager
def new_figure(out, name, title, height, panels=1, layout="constrained"):
    """Yields the axes of `panels`, a column wide and `height` inches high; saves a PDF and, with the title, a PNG."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, height), layout=layout)
        yield figure.subplots(panels, squeeze=False)[:, 0]
        with replacing(Path(out) / f"{name}.pdf") as temporary:
            figure.savefig(temporary, format="pdf")
        figure.set_figheight(height + 0.14 * (title.count("\n") + 1))
        figure.axes[0].set_title(title)
        with replacing(Path(out) / f"{name}.png") as temporary:
            figure.savefig(temporary, format="png")


def plot_grid(images, out, name, title, row_labels=(), column_labels=(), xlabel="", ylabel=""):
    """Draw images (rows, columns, 28, 28) in [0, 1] edge to edge, with a label a row and a column."""
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


def one_of_each(labels):
    """Indices (10,) of the first image of each class in labels (N,)."""
    return torch.stack([(labels == label).nonzero()[0, 0] for label in range(10)])


def plot_reconstructions(decoder, mu, data, out):
    """The first test image of each class above its reconstruction from mu (N, latent_dim), the test images' codes."""
    chosen = one_of_each(data.test_labels)
    images = to_pixels(data.test_images[chosen, 0])[None]  # (1, 10, 28, 28)
    rows = torch.cat([images, decode_grid(decoder, mu[None, chosen])])
    plot_grid(rows, out, "reconstructions", f"{data.name}: test images", row_labels=["input", "reconstruction"])


def plot_interpolations(decoder, mu, data, out, steps=11):
    """Straight lines between the codes of test images of two classes: 0 to 1, 2 to 3, ... 8 to 9."""
    first, second = mu[one_of_each(data.test_labels)].view(5, 2, 1, -1).unbind(dim=1)  # each (5, 1, latent_dim)
    share = torch.linspace(0, 1, steps, device=mu.device)
    z = torch.lerp(first, second, share[:, None])  # (5, steps, latent_dim)
    title = f"{data.name}: between the codes of two test images"
    labels = {"column_labels": [f"{value:.1f}" for value in share.tolist()], "xlabel": "share of the second code"}
    plot_grid(decode_grid(decoder, z), out, "interpolations", title, **labels)


def plot_loss_curves(history, labels, data, out):
    """One panel a term, train and test, over epochs; `labels` maps the history's names to those on the axes."""
    height = max(0.6 * WIDTH, 0.4 + len(labels))
    with new_figure(out, "loss_curves", f"{data.name}: losses", height, len(labels)) as axes:
        for ax, (name, label) in zip(axes, labels.items()):
            for split in ("train", "test"):
                values = [row[f"{split}_{name}"] for row in history]
                ax.plot([row["epoch"] for row in history], values, marker=".", markersize=3, label=split)
            # Beside the fall of the first tenth the rest would be a flat line: that fall may leave the panel.
            late = [row[f"{split}_{name}"] for row in history[len(history) // 10 :] for split in ("train", "test")]
            margin = 0.05 * (max(late) - min(late)) or 1
            ax.set_ylim(min(late) - margin, max(late) + margin)
            ax.set(xlabel="epoch", ylabel=f"{label}\n(nats per image)" if name in NATS else label)
            ax.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)  # of a single epoch too
            ax.label_outer()
        axes[0].legend(ncols=2, frameon=False)


def linear_discriminants(codes, labels):
    """The two directions (latent_dim, 2) along which classes differ most, beside their own spread: Fisher (1936).

    codes: (N, latent_dim), labels: (N,). Dead latents, or fewer codes than latents, give finite directions too.
    """
    codes, y = codes.cpu().double(), F.one_hot(labels.cpu(), 10).double()  # not every accelerator has float64
    means = y @ (y.T @ codes / y.sum(dim=0).clamp(min=1)[:, None])  # (N, latent_dim): of each code's class
    within, between = codes - means, means - codes.mean(dim=0)
    variance, axes = torch.linalg.eigh(within.T @ within / len(codes))
    whiten = axes / (variance + 1e-6 * variance.mean() + 1e-9).sqrt()  # (latent_dim, latent_dim): to unit spread
    directions = whiten @ torch.linalg.svd(between @ whiten, full_matrices=False).Vh[:2].T
    return F.pad(directions, (0, 2 - directions.shape[1])).float()  # of a single latent the second is zero


def plot_latent_space(train_mu, mu, data, out):
    """Scatter of the test codes mu (N, latent_dim) by class: the plane itself, or two discriminants of train_mu."""
    points, labels = mu.cpu(), data.test_labels.cpu()
    axes, title = ["$\\mu_0$", "$\\mu_1$"], f"{data.name}: codes of the test images"
    if mu.shape[1] != 2:  # the KL makes a VAE's active latents alike, so that principal components show nothing
        points = (points - train_mu.cpu().mean(dim=0)) @ linear_discriminants(train_mu, data.train_labels)
        axes = [f"{rank} linear discriminant of $\\mu$" for rank in ("first", "second")]
        title += ", along the two\nlinear discriminants of the training codes"
    with new_figure(out, "latent_space", title, 0.9 * WIDTH) as (ax,):
        # In the test set's order, so that no class is drawn on top of all others; a bitmap in the PDF too.
        ax.scatter(*points.T.numpy(), s=1.5, linewidths=0, c=[DIGIT_COLOURS[i] for i in labels], rasterized=True)
        halo = [withStroke(linewidth=2, foreground="white")]
        for label in labels.unique().tolist():  # where two groups coincide, the legend tells them apart
            where = points[labels == label].median(dim=0).values.tolist()
            ax.text(*where, label, weight="bold", ha="center", va="center", path_effects=halo)
        handles = [ax.scatter([], [], s=12, c=colour, label=label) for label, colour in enumerate(DIGIT_COLOURS)]
        ax.figure.legend(handles=handles, loc="outside right center", frameon=False, handletextpad=0.1)
        # By the data's limits: a box that shrank to fit would push the label over the figure's edge.
        ax.set(xlabel=axes[0], ylabel=axes[1], aspect="equal", adjustable="datalim")


def plot_kl_per_dimension(mu, logvar, data, out):
    """Bars of the KL of each latent over the test images' codes mu, logvar (N, latent_dim), sorted."""
    kl, order = kl_per_latent(mu, logvar).sort(descending=True)
    title = f"{data.name}: sum over latents {kl.sum():.1f} nats"
    with new_figure(out, "kl_per_dimension", title, 0.5 * WIDTH) as (ax,):
        ax.bar(range(len(kl)), kl.tolist())
        ax.set(xlabel="latents, sorted by their KL", ylabel="KL (nats per image)")
        every = math.ceil(len(kl) / 30)  # as many numbers as have room
        ax.set_xticks(range(0, len(kl), every), order[::every].tolist())


def plot_traversals(decoder, mu, logvar, data, out, rows=10, columns=7):
    """Move one latent from -3 to 3, the others held at the first test image's mu; largest KL on top."""
    kl, order = kl_per_latent(mu, logvar).sort(descending=True)
    kl, order = kl[:rows].tolist(), order[:rows].tolist()
    values = torch.linspace(-3, 3, columns, device=mu.device)
    z = mu[0].repeat(len(order), columns, 1)  # (rows, columns, latent_dim)
    for row, latent in enumerate(order):
        z[row, :, latent] = values
    title = f"{data.name}: one latent moved,\nothers at a test image's code"
    rows = [f"$z_{{{latent}}}$  {nats:.1f} nats" for latent, nats in zip(order, kl)]
    labels = {"row_labels": rows, "column_labels": [f"{value:g}" for value in values.tolist()]}
    labels |= {"xlabel": "value of the latent", "ylabel": "latent, sorted by its KL"}
    plot_grid(decode_grid(decoder, z), out, "traversals", title, **labels)


def plot_manifold(decoder, data, out, steps=20):
    """Decode a grid over a latent plane, even in the prior's probability (Kingma & Welling, 2014)."""
    values = torch.special.ndtri((torch.arange(steps) + 0.5) / steps)  # the inverse of the normal CDF
    z = torch.cartesian_prod(-values, values).flip(1).view(steps, steps, 2)  # z_0 to the right, z_1 up
    images = decode_grid(decoder, z.to(data.test_images.device))
    title = f"{data.name}: decoded quantiles of the prior"
    plot_grid(images, out, "manifold", title, xlabel="$z_0$, to the right", ylabel="$z_1$, up")


# ---- Device ------------------------------------------------------------------------------------


def first_line(error):
    return (str(error) or repr(error)).splitlines()[0]


def pick_device(name="auto"):
    """The torch.device for a --device value, and what kept `auto` from an accelerator ("" if nothing did).

    A device counts if a tiny operation on it works. Raises ValueError with torch's reason if a named one does not.
    """
    found = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        one = torch.ones(1, device=found if name == "auto" else name)
        one.add(one).item()
        return one.device, ""  # with its index
    except Exception as error:  # of all sorts: no driver, built without it, out of memory
        reason = f"{found if name == 'auto' else name} cannot be used: {first_line(error)}"
        if name != "auto":
            raise ValueError(f"{reason} (take auto, cpu, cuda, cuda:N or mps)") from error
        return torch.device("cpu"), f" ({reason})"


def device_name(device):
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def matmul_seconds(device, dtype, size=256):
    """Seconds that a product of two matrices (size, size) takes; on a CPU of its own time, whoever else is busy."""
    clock = time.thread_time if device.type == "cpu" else time.perf_counter
    a = torch.ones(size, size, device=device).to(dtype)
    (a @ a)[0, 0].item()  # warms up
    start, count = clock(), 0
    while clock() - start < 0.05:
        (a @ a)[0, 0].item()  # waits for the device
        count += 1
    return (clock() - start) / count


def pick_precision(device, wanted="auto"):
    """The precision of the training step on `device` for a --precision value, and why."""
    if wanted != "auto":
        return {"fp32": "float32", "bf16": "bfloat16"}[wanted], "as set"
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)  # of this card, not the first
        return "bfloat16" if capability >= (8, 0) else "float32", "compute capability {}.{}".format(*capability)
    if device.type != "cpu":
        return "float32", f"the default on {device.type}"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # beside a busy process several wait for each other, in both precisions alike
    ratio = matmul_seconds(device, torch.float32) / matmul_seconds(device, torch.bfloat16)
    torch.set_num_threads(threads)
    return "bfloat16" if ratio >= 1.5 else "float32", f"bfloat16 products are {ratio:.2g} times as fast"


def set_up_device(encoder, decoder, device):
    """Make `device`, and the layout of the networks' weights, ready for training: float32 that is exact, and fast."""
    torch.set_float32_matmul_precision("highest")  # float32 is float32, not rounded to TensorFloat-32,
    torch.backends.cudnn.allow_tf32 = False  # in convolutions too
    if device.type == "cuda":
        torch.cuda.set_device(device)  # of several: streams and graphs are the current one's
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt and device.type == "cpu":
        # glibc keeps what a step frees for the next one, instead of mapping and faulting it anew: a sixth of a step.
        mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD, at its largest
        mallopt(-1, (2 << 30) - 1)  # M_TRIM_THRESHOLD
    if device.type != "mps":  # whose kernels are slower so, and were wrong at times (pytorch#143196)
        # channels_last is the layout that convolution kernels want: no reorder around each of them.
        encoder.to(memory_format=torch.channels_last)
        decoder.to(memory_format=torch.channels_last)


class BiasApart(TorchFunctionMode):
    """Has transposed convolutions add their bias apart: oneDNN's bfloat16 gradient of it takes a sixth of a step."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is not F.conv_transpose2d:
            return function(*args, **(kwargs or {}))
        x, weight, bias, *shape = args
        h = function(x, weight, None, *shape)
        return h if bias is None else h + bias.to(h.dtype)[:, None, None]


@contextlib.contextmanager
def computing_in(precision, device):
    """Within, what is computed with float32 weights and images is computed in `precision`, where that is safe."""
    if precision == "float32":
        yield
    else:
        with torch.autocast(device.type, torch.bfloat16):
            with BiasApart() if device.type == "cpu" else contextlib.nullcontext():
                yield


def as_cuda_graph(training_step, encoder, decoder, optimizer, batch_size):
    """`training_step` as one CUDA graph: a replay is one launch, where the step's own hundreds would bound its speed.

    A replay reads the same tensors anew, so batch and learning rate are copied into tensors of the graph's own; it
    draws new random numbers. The steps that capture asks for first, for libraries and AdamW to start, are taken back.
    If it fails, a line says so, and `training_step` comes back.
    """
    tensors = [tensor for model in (encoder, decoder) for tensor in (*model.parameters(), *model.buffers())]
    before = [tensor.detach().clone() for tensor in tensors]
    states = {key: {name: value.clone() for name, value in state.items()} for key, state in optimizer.state.items()}
    device = tensors[0].device
    indices, rate = torch.arange(batch_size, device=device), torch.zeros((), device=device)
    generator = torch.cuda.default_generators[device.index]
    random_state = generator.clone_state()
    graph, side, graphed = torch.cuda.CUDAGraph(), torch.cuda.Stream(), training_step

    def replay(batch):
        indices.copy_(batch)
        rate.fill_(optimizer.param_groups[0]["lr"])
        graph.replay()
        return terms

    encoder.train()
    decoder.train()
    for group in optimizer.param_groups:
        group["lr"] = rate
    side.wait_stream(torch.cuda.current_stream())
    try:
        with torch.cuda.stream(side):  # and back to the current one, however the capture ends
            for _ in range(3):
                training_step(indices)
            for group in optimizer.param_groups:
                group["capturable"] = True  # sooner, and AdamW would warn of steps without a capture
            try:
                with torch.cuda.graph(graph, stream=side):
                    terms = training_step(indices)  # recorded, not run
                graphed = replay
            except RuntimeError as error:
                generator.graphsafe_set_state(random_state)  # a broken capture leaves it unusable
                cause = error.__context__ or error  # an error in the step makes the capture's end fail too
                if isinstance(cause, KeyboardInterrupt):
                    raise cause from None
                print(f"no CUDA graph, so training is slower: {first_line(cause)}")
                for group in optimizer.param_groups:
                    group["capturable"] = False
    finally:
        torch.cuda.synchronize()
    with torch.no_grad():
        for tensor, value in zip(tensors, before):
            tensor.copy_(value)
        for parameter, state in optimizer.state.items():
            for name, value in state.items():
                value.copy_(states[parameter][name] if parameter in states else torch.zeros_like(value))
    return graphed


# ---- Run folder --------------------------------------------------------------------------------

# What a resumed run may change. Anything else, and its numbers would be those of no training that took place.
RESUMABLE = ("epochs", "lr", "iw_samples", "device", "precision", "data")


class OtherNetworks(ValueError):
    """Weights that are not those of the networks they are loaded into."""


@contextlib.contextmanager
def replacing(path):
    """Yield a path to write to, and move it to `path` once it is whole: what fails leaves the old file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")  # one name, so that what a killed run left is written over
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_checkpoint(encoder, decoder, optimizer, history, args, out):
    """Write history.csv and checkpoint.pt."""
    with replacing(Path(out) / "history.csv") as temporary, open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, history[0])
        writer.writeheader()
        writer.writerows(history)
    checkpoint = {
        "model_name": getattr(encoder, "model_name", None),
        "encoder": encoder.state_dict(),
        "decoder": decoder.state_dict(),
        "optimizer": optimizer.state_dict(),
        "epoch": len(history),
        "history": history,
        "args": vars(args),
    }
    buffer = io.BytesIO()  # a full disk is then a plain OSError, which torch.save to a path does not raise
    torch.save(checkpoint, buffer)
    with replacing(Path(out) / "checkpoint.pt") as temporary:
        temporary.write_bytes(buffer.getvalue())


def read_checkpoint(folder):
    """The content of folder/checkpoint.pt, on the CPU. Raises OSError if it is not there, ValueError if it is bad."""
    path = Path(folder) / "checkpoint.pt"
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)  # a pickle that runs code is refused
        return {name: checkpoint[name] for name in "model_name args epoch history encoder decoder optimizer".split()}
    except OSError:
        raise
    except Exception as error:  # damaged bytes raise all sorts of errors
        raise ValueError(f"{path} is damaged, or no checkpoint of these scripts") from error


def load_weights(encoder, decoder, checkpoint):
    """Load the weights of a checkpoint's content. Raises OtherNetworks if they do not fit."""
    try:
        encoder.load_state_dict(checkpoint["encoder"])
        decoder.load_state_dict(checkpoint["decoder"])
    except RuntimeError as error:
        raise OtherNetworks("the weights in the checkpoint are of other networks than these") from error


def restore(encoder, decoder, optimizer, folder):
    """Take weights and optimizer state from the checkpoint in `folder`; returns its history, [] if there is none."""
    if not (Path(folder) / "checkpoint.pt").exists():
        return []
    checkpoint = read_checkpoint(folder)
    load_weights(encoder, decoder, checkpoint)
    saved = checkpoint["optimizer"]
    saved["param_groups"] = optimizer.state_dict()["param_groups"]  # how AdamW runs is this device's matter
    optimizer.load_state_dict(saved)
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if value.shape == parameter.shape:  # an average: in its parameter's own layout, which fused steps assume
                state[name] = torch.empty_like(parameter).copy_(value)
    return checkpoint["history"]


def load_model(folder, build=None):
    """The trained (encoder, decoder, args) of a run folder, on the CPU, in evaluation mode.

    build(args) makes the untrained pair, where its classes are not this file's Encoder and Decoder.
    Raises OtherNetworks if the weights are of another pair, and what `read_checkpoint` raises.
    """
    checkpoint = read_checkpoint(folder)
    args = argparse.Namespace(**checkpoint["args"])
    if build:
        encoder, decoder = build(args)
    else:
        encoder = Encoder(args.hidden_dims, args.latent_dim, checkpoint["model_name"] or "AE")
        decoder = Decoder(args.latent_dim, args.hidden_dims)
    load_weights(encoder, decoder, checkpoint)
    return encoder.eval(), decoder.eval(), args


def save_metrics(encoder, decoder, data, test, history, args, out):
    """Write metrics.json: the last epoch's test terms, what else was measured (`test`), and all that made them."""
    device, seconds = data.test_images.device, sum(row["seconds"] for row in history)
    seen = len(history) * (len(data.train_images) // args.batch_size) * args.batch_size
    terms = {name.removeprefix("test_"): value for name, value in history[-1].items() if name.startswith("test_")}
    kinds = {"bce": "Bernoulli: binary cross-entropy", "mse": "Gaussian of unit variance: half the squared error"}
    parameters = [parameter for model in (encoder, decoder) for parameter in model.parameters()]
    metrics = {
        "args": vars(args),
        "protocol": {
            "split": f"trained on {len(data.train_images)} {data.name} images, tested on {len(data.test_images)}",
            "pixels": "binarised" if args.binarize else "grey",
            "recon": f"{kinds[args.recon]}, summed over pixels",
            "z": "one sample of q(z|x) an image" if "kl" in terms else "the code itself",
            "K": args.iw_samples if "iw_bound" in test else None,
            "seed": args.seed,
            "mse": "per pixel, from the mean code",
            "evaluation_seed": EVAL_SEED,
            "units": "nats per image",
            "optimizer": {"name": "AdamW", "lr": args.lr, **ADAMW, "batch_size": args.batch_size},
            "learning_rate": learning_rate.__doc__,
        },
        "test": terms | test,
        "train": {
            "epochs": len(history),
            "seconds": seconds,
            "images_per_second": seen / seconds,
            "peak_memory_mb": torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else None,
            "parameters": sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
        },
        "environment": {
            "script": args.script,
            "device": device_name(device),
            "precision": pick_precision(device, args.precision)[0],
            "python": sys.version.split()[0],
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
        },
    }
    with replacing(Path(out) / "metrics.json") as temporary:
        temporary.write_text(json.dumps(metrics, indent=2) + "\n")


def free_folder(first):
    """Make and return the first of `first`, `first`-2, `first`-3, ... that is not there yet."""
    for number in itertools.count(1):
        folder = first.with_name(f"{first.name}-{number}") if number > 1 else first
        with contextlib.suppress(FileExistsError):
            folder.mkdir(parents=True)  # makes or fails in one step: two runs never get one folder
            return folder


def lock_folder(folder):
    """Make `folder` and lock it until the file that comes back is closed. Raises OSError if another run has it."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = open(folder / ".lock", "w")
    try:
        import fcntl

        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # falls with the process, however that ends
    except BlockingIOError as error:
        raise BlockingIOError(f"another run writes to {folder} now") from error
    except (ImportError, OSError):
        pass  # Windows, or a file system without locks: go on without one
    return lock


# ---- Command line ------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """Refuses bad input in one line with exit code 2; argparse itself prints the usage too."""

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")

    @contextlib.contextmanager
    def refusing(self, flag):
        """Refuse, by the flag's name, a value that an error within is the fault of."""
        try:
            yield
        except (OSError, RuntimeError, ValueError) as error:
            self.error(f"argument {flag}: {error}")


def checked(kind, accept, wanted):
    """An argparse type: `kind` of the text, refused where `accept` of it is false."""

    def parse(text):
        with contextlib.suppress(ValueError):
            if accept(value := kind(text)):
                return value
        raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")

    return parse


positive_int = checked(int, lambda value: 1 <= value <= 1_000_000, "a whole number from 1 to 1000000")
positive_float = checked(float, lambda value: 0 < value < math.inf, "a finite number above 0")
train_size = checked(int, lambda value: 1 <= value <= 60_000, "a whole number from 1 to 60000")
positive_or_zero = checked(float, lambda value: 0 <= value < math.inf, "a finite number from 0")
seed_value = checked(int, lambda value: 0 <= value < 2**32, "a whole number from 0 to 2**32 - 1")


def make_parser(script, doc):
    """The flags that all scripts have; `script` is its file, which names its runs, `doc` heads the help."""
    name = Path(script).stem
    style = {"formatter_class": argparse.ArgumentDefaultsHelpFormatter, "allow_abbrev": False}
    parser = Parser(prog=f"{name}.py", description=(doc or name).splitlines()[0], **style)
    run = parser.add_argument_group("run")
    folder = run.add_mutually_exclusive_group()
    free = f"the first of runs/{name}, runs/{name}-2, ... that is free"
    folder.add_argument("--out", metavar="DIR", default=argparse.SUPPRESS, help=f"folder to write to (default: {free})")
    folder.add_argument("--resume", metavar="DIR", help="go on with the run in DIR and its flags, or start it there")
    run.add_argument("--seed", type=seed_value, default=0, help="seed of weights, batches and noise")
    run.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    run.add_argument("--precision", choices=["auto", "fp32", "bf16"], default="auto", help="auto: bf16 if much faster")
    data = parser.add_argument_group("data")
    names = ["MNIST", "FashionMNIST", "KMNIST"]
    data.add_argument("--dataset", choices=names, default=names[0], help="what to train and test on")
    data.add_argument("--data", metavar="DIR", default="data", help="folder that holds MNIST/raw/*.gz, or another's")
    data.add_argument("--limit", metavar="N", type=train_size, default=60_000, help="train on the first N images")
    model = parser.add_argument_group("model")
    model.add_argument("--latent-dim", metavar="N", type=positive_int, default=20, help="number of latents")
    widths = {"nargs": 4, "metavar": tuple("ABCD"), "default": [32, 64, 128, 256]}
    model.add_argument("--hidden-dims", type=positive_int, **widths, help="channels of the four convolutions")
    model.add_argument("--recon", choices=["bce", "mse"], default="bce", help="cross-entropy or half the squared error")
    fit = parser.add_argument_group("optimization")
    fit.add_argument("--epochs", metavar="N", type=positive_int, default=20, help="passes over the training images")
    fit.add_argument("--batch-size", metavar="N", type=positive_int, default=128, help="images per step")
    fit.add_argument("--lr", type=positive_float, default=3e-3, help="peak learning rate of AdamW")
    parser.file = script
    parser.set_defaults(script=parser.prog, binarize=False, iw_samples=None, changes=[])
    return parser


def add_likelihood_flags(parser):
    """The flags of models that bound log p(x)."""
    likelihood = parser.add_argument_group("likelihood")
    likelihood.add_argument("--binarize", action="store_true", help="draw each pixel from Bernoulli(pixel)")
    likelihood.add_argument("--iw-samples", metavar="K", type=positive_int, help="samples an image of the IW bound")


def parse_args(parser, argv=None):
    """Parse the flags; with --resume those that the run was started with count, unless given anew."""
    args = parser.parse_args(argv)
    started = {}  # the flags of a run that goes on
    with parser.refusing("--resume"):
        if args.resume and (Path(args.resume) / "checkpoint.pt").exists():
            checkpoint = read_checkpoint(args.resume)
            started = {name: parser.get_default(name) for name in vars(args)}  # of flags that came after that run
            started |= checkpoint["args"]
            parser.set_defaults(**{name: started[name] for name in started.keys() - {"out", "resume", "script"}})
            args = parser.parse_args(argv)
            note_changes(args, started, checkpoint["epoch"])
    with parser.refusing("--out"):
        if "out" in args and Path(args.out).exists() and any(path.name != ".lock" for path in Path(args.out).iterdir()):
            raise OSError(f"{args.out} is not empty; name another one")
    if args.batch_size > args.limit:
        parser.error(f"argument --batch-size: {args.batch_size} is more than the {args.limit} training images")
    if args.iw_samples != started.get("iw_samples") and args.recon == "bce" and not args.binarize:
        parser.error("argument --iw-samples: grey pixels have no likelihood; add --binarize or --recon mse")
    return args


def note_changes(args, started, epoch):
    """Add to args.changes what differs from the flags that a run of `epoch` epochs was started with.

    Raises ValueError where its numbers would then be those of no training that took place.
    """
    if args.precision == "auto":
        args.precision = started["precision"]
    if args.epochs < epoch:
        raise ValueError(f"the run in {args.resume} has {epoch} epochs already, so not --epochs {args.epochs}")
    for name, value in vars(args).items():
        if name in ("resume", "changes") or value == started[name]:
            continue
        if name not in RESUMABLE:
            flag = name if name == "script" else f"--{name.replace('_', '-')}"
            raise ValueError(f"the run in {args.resume} has {flag} {started[name]}, not {value}")
        change = {"after_epoch": epoch, "name": name, "from": started[name], "to": value}
        args.changes = [*args.changes, change]


def how_to_go_on(parser, args, folder):
    """What a run that was stopped says last: the command that goes on with it, if an epoch of it was kept."""
    if not (folder / "checkpoint.pt").exists():
        return f"no epoch had ended, so nothing is kept in {folder}"
    kept = read_checkpoint(folder)["args"]
    here = Path(parser.prog).resolve() == Path(parser.file).resolve()  # or the script lies in another folder
    command = ["python", parser.prog if here else parser.file, "--resume", str(folder)]
    for name in RESUMABLE:  # what was changed when it was resumed last, before another epoch ended
        if getattr(args, name) != kept[name]:
            command += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    return f"go on with: {shlex.join(command)}"


@contextlib.contextmanager
def start_run(parser, args):
    """Pick the device, load the data, claim the folder, in this order; yields (data, folder).

    What is refused ends in one line with exit code 2, before anything is written. What stops the run later
    (full disk, divergence: 1; Ctrl-C: 130) ends in one line too, and the last checkpoint stays.
    """
    with parser.refusing("--device"):
        device, fallback = pick_device(args.device)
    with parser.refusing("--data"):
        data = load_data(args.data, args.dataset, device, args.limit, args.binarize)
    named = args.resume or getattr(args, "out", None)
    with parser.refusing("--resume" if args.resume else "--out"):
        folder = Path(named) if named else free_folder(Path("runs", Path(args.script).stem))
        lock = lock_folder(folder)
    precision, reason = pick_precision(device, args.precision)
    args.out, args.precision = str(folder), "bf16" if precision == "bfloat16" else "fp32"
    print(f"{device_name(device)}{fallback}, {precision} ({reason}), seed {args.seed}, writing to {folder}")
    code, problem = 0, ""
    try:
        with lock:
            yield data, folder
        if read_checkpoint(folder)["epoch"] < args.epochs:  # train_model has come back with the last checkpoint
            code, problem = 130, "interrupted"
    except KeyboardInterrupt:
        code, problem = 130, "interrupted"
    except (FloatingPointError, OSError) as error:
        code, problem = 1, f"error: {error}"
    except OtherNetworks as error:
        parser.error(f"argument --resume: {error}")
    if problem:
        if sys.stdout.isatty():
            print()  # leave the progress line
        parser.exit(code, f"{parser.prog}: {problem}; {how_to_go_on(parser, args, folder)}\n")
    print(f"figures and numbers are in {folder}")
