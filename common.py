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
import random
import shlex
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
import timeit
from collections import Counter, defaultdict, namedtuple
from functools import partial
from pathlib import Path

import matplotlib.style
import numpy
import torch
import torch.nn.functional as F
import torchvision
from matplotlib.figure import Figure
from torch import nn
from torchvision.datasets.utils import check_integrity, download_url

EVAL_SEED = 0  # for the samples z behind every test number, whatever the run's own seed is
EVAL_BATCH = 250  # images at a time in evaluation: bounds its memory; more are slower on a CPU


# ---- Data --------------------------------------------------------------------------------------
DATA = Path(__file__).resolve().with_name("data")  # a clone has the archives of MNIST there
# The data set's name and, on one device, uint8 images (N, 1, 28, 28) and int64 labels (N,).
Data = namedtuple("Data", "name train_images train_labels test_images test_labels")


def load_data(root, name="MNIST", device="cpu", limit=None, binarize=False):
    """Load torchvision's data set `name` onto `device`, from the archives in root/name/raw or by download.

    limit: number of training images to keep. binarize: draw each test image, once, from Bernoulli(pixel).
    Raises RuntimeError that names an archive that is damaged, or missing and cannot be downloaded.
    """
    source = getattr(torchvision.datasets, name)
    folder = Path(root) / name / "raw"
    archives = [(folder / archive, md5) for archive, md5 in source.resources]
    damaged = [path.name for path, md5 in archives if path.exists() and not check_integrity(path, md5)]
    if damaged:  # they may be the user's own: nothing is written over them
        raise RuntimeError(f"{', '.join(damaged)}: damaged, or not {name}'s; put the original into {folder}")
    for path, md5 in archives:
        if not path.exists():
            download(source.mirrors, path, md5)
    train_images, train_labels, test_images, test_labels = (read_idx(path) for path, _ in archives)
    if binarize:
        test_images = binarize_once(test_images)
    return Data(
        name=name,
        train_images=train_images[:limit, None].to(device),  # (N, 28, 28) -> (N, 1, 28, 28)
        train_labels=train_labels[:limit].long().to(device),
        test_images=test_images[:, None].to(device),
        test_labels=test_labels.long().to(device),
    )


def download(mirrors, path, md5):
    """Fetch the archive `path` from the first mirror that has it, or raise RuntimeError with a reason."""
    with tempfile.TemporaryDirectory() as folder:
        for mirror in mirrors:
            try:
                download_url(mirror + path.name, folder, path.name, md5)
                path.parent.mkdir(parents=True, exist_ok=True)
                write_whole(path, Path(folder, path.name).read_bytes(), suffix=os.getpid())
                return
            except (OSError, RuntimeError) as error:
                reason = error
    raise RuntimeError(f"{path} is missing and cannot be downloaded: {reason}")


def read_idx(path):
    """Read a gzipped IDX file as a uint8 tensor.

    Four bytes, of which the last is the number of dimensions; their sizes, four bytes each; the values.
    """
    content = bytearray(gzip.decompress(path.read_bytes()))
    sizes = struct.unpack_from(f">{content[3]}I", content, offset=4)  # big-endian
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
    """Images (B, 1, 28, 28) in [0, 1] to codes (B, latent_dim): mu for "AE", (mu, logvar, z) for "VAE".

    logvar is at most 2, so that a single unusual image cannot spoil the mean over all images.
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
        h = F.conv_transpose2d(
            x,
            self.weight,
            stride=self.stride,
            padding=self.padding,
            output_padding=self.output_padding,
            groups=self.groups,
            dilation=self.dilation,
        )
        if self.bias is None:
            return h
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
    if kind == "bce":
        pixels = F.binary_cross_entropy_with_logits(logits.float(), x, reduction="none")
    elif kind == "mse":
        pixels = 0.5 * (logits.float().sigmoid() - x).square()
    else:
        raise ValueError(f"kind must be 'bce' or 'mse', not {kind!r}")
    return pixels.sum(dim=(1, 2, 3))  # over pixels


def kl_per_latent(mu, logvar):
    """KL(N(mu, exp(logvar)) || N(0, 1)) in nats: (B, latent_dim) each to (latent_dim,), the batch's mean."""
    mu = mu.float()
    logvar = logvar.float()
    kl = -0.5 * (1 + logvar - mu.square() - logvar.exp())  # Kingma & Welling (2014), appendix B
    return kl.mean(dim=0)  # over the batch


# ---- Training ----------------------------------------------------------------------------------
def learning_rate(step, total_steps, peak):
    """Linear warm-up over the first tenth of the steps, then linear to zero."""
    warmup = max(1, total_steps // 10)
    return peak * min((step + 1) / warmup, (total_steps - step) / max(1, total_steps - warmup))


def seed_epoch(seed, epoch):
    """Seed all generators for one epoch (0: the initial weights), so that resuming needs no saved state."""
    number = seed * 1_000_003 + epoch  # torch's generator on a CPU keeps the last 32 bits
    torch.manual_seed(number)
    random.seed(number)
    numpy.random.seed(number % 2**32)


def epochs_left(history, epochs):
    """Yield the numbers of the epochs still to train. The first Ctrl-C makes the current one the last."""
    stop_requested = False

    def stop(*_):
        nonlocal stop_requested
        stop_requested = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        print("\nstopping after this epoch; Ctrl-C again quits now", file=sys.stderr, flush=True)

    in_main_thread = threading.current_thread() is threading.main_thread()  # only it can handle signals
    if in_main_thread and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, stop)  # a handler of someone else would stay
    try:
        for epoch in range(len(history) + 1, epochs + 1):
            if stop_requested:
                break
            yield epoch
    finally:
        if signal.getsignal(signal.SIGINT) is stop:
            signal.signal(signal.SIGINT, signal.default_int_handler)


ERASE_LINE = "\r\x1b[K"  # on a terminal: back to the start of the line, and clear it


def on_terminal():
    """Whether standard output is a terminal. A logger in its place may not even have isatty."""
    return hasattr(sys.stdout, "isatty") and sys.stdout.isatty()


class Meter:
    """Averages the loss and terms, scalar tensors, over an epoch's steps; shows progress on a terminal.

    Raises ValueError for an epoch without steps.
    """

    def __init__(self, epoch, steps, args):
        if steps == 0:
            raise ValueError(f"there are fewer training images than one batch of {args.batch_size}")
        self.epoch = epoch
        self.steps = steps
        self.args = args
        self.totals = defaultdict(float)
        self.counts = Counter()  # by name, since a term may be missing in some steps
        self.start = time.perf_counter()
        self.shown = self.start

    def add(self, loss, terms):
        for name, term in dict(loss=loss, **terms).items():  # TypeError if a term is named loss
            self.totals[name] += term.detach().float()  # on the device: a step does not wait for its result
            self.counts[name] += 1
        if on_terminal() and time.perf_counter() - self.shown > 1:
            self.show()

    def show(self):
        """Write progress over the terminal's last line."""
        self.totals["loss"].item()  # waits for the device, which may only have queued the steps
        self.shown = time.perf_counter()
        done = self.counts["loss"]
        rate = done / (self.shown - self.start)  # steps per second
        left = (self.args.epochs - self.epoch + 1) * self.steps - done  # steps, in all epochs
        line = f"epoch {self.epoch}/{self.args.epochs}  {rate * self.args.batch_size:,.0f} images/s"
        print(f"{ERASE_LINE}{line}  {left / rate:.0f} s left", end="", flush=True)

    def finish(self):
        """The mean of each term over the steps that had it, and the seconds that all steps took."""
        means = {name: total.item() / self.counts[name] for name, total in self.totals.items()}
        return means, time.perf_counter() - self.start


def history_row(epoch, lr, train, test, seconds):
    """One row of history.csv. Raises FloatingPointError that names a term that is not finite."""
    train_terms = {f"train_{name}": mean for name, mean in train.items()}
    test_terms = {f"test_{name}": mean for name, mean in test.items()}
    row = {"epoch": epoch, "lr": lr, **train_terms, **test_terms, "seconds": seconds}
    for name in sorted(row, key=lambda name: name.endswith("_loss")):  # the loss last: its terms say more
        if not math.isfinite(row[name]):
            raise FloatingPointError(f"{name} is {row[name]} in epoch {epoch}; try a smaller --lr")
    return row


def terms_of(split, row):
    """The terms of one split, "train" or "test", in a row of the history, under their own names."""
    prefix = f"{split}_"
    return {name[len(prefix) :]: value for name, value in row.items() if name.startswith(prefix)}


def print_epoch(history, args):
    """Print the seconds of training left and the last epoch's test terms, those that fit into 80 columns."""
    row = history[-1]
    left = (args.epochs - len(history)) * row["seconds"]
    line = f"epoch {len(history)}/{args.epochs}  {left:.0f} s left  test"
    for name, value in terms_of("test", row).items():
        term = f" {name} {value:.2f}"
        if len(line + term) < 80:
            line += term
    if on_terminal():
        line = ERASE_LINE + line  # over the progress that Meter shows
    print(line, flush=True)


# ---- Evaluation --------------------------------------------------------------------------------
@contextlib.contextmanager
def evaluation(networks, device):
    """Inside: evaluation mode, and noise drawn with EVAL_SEED. Afterwards, all is as it was before."""
    modules = [module for network in networks for module in network.modules()]
    modes = [module.training for module in modules]
    with torch.random.fork_rng([device] if device.type == "cuda" else []):  # bare, it forks every GPU's
        torch.manual_seed(EVAL_SEED)
        for network in networks:
            network.eval()
        try:
            yield
        finally:
            for module, mode in zip(modules, modes):  # one by one: a copy may have frozen some
                module.training = mode


def batches(*tensors):
    """Yield EVAL_BATCH rows of all `tensors` at a time."""
    return zip(*(tensor.split(EVAL_BATCH) for tensor in tensors))


@torch.no_grad()
def evaluate(loss, networks, images, *more, **settings):
    """Mean loss and terms over uint8 images (N, 1, 28, 28), in float32, z drawn with a fixed seed; floats.

    Calls loss(*networks, x, *batch_of_more, **settings) in evaluation mode, under no_grad; more: say, labels.
    Leaves the networks' modes and the random state as they were.
    """
    totals = defaultdict(float)
    counts = Counter()  # of the images, by term, since a term may be missing in some batches
    with evaluation(networks, images.device):
        for batch, *batch_of_more in batches(images, *more):
            value, terms = loss(*networks, to_pixels(batch), *batch_of_more, **settings)
            for name, term in dict(loss=value, **terms).items():
                totals[name] += term * len(batch)  # a short last batch counts for less
                counts[name] += len(batch)
    return {name: total.item() / counts[name] for name, total in totals.items()}


@torch.no_grad()
def encode(encoder, images):
    """The codes (mu, logvar) of uint8 images (N, 1, 28, 28), (N, latent_dim) each; for an AE (mu, None)."""
    with evaluation([encoder], images.device):
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
    total = 0
    with evaluation([], images.device):
        for number, (batch, mean, log_variance) in enumerate(batches(images, mu, logvar), start=1):
            x = to_pixels(batch)
            log_w = []
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
    """Test accuracy of ridge regression, penalty 1e-3 N, from codes (N, D) to one-hot labels."""
    train_codes = train_codes.cpu().double()  # on the CPU, since MPS has no float64
    codes = codes.cpu().double()
    classes, index = train_labels.cpu().unique(return_inverse=True)
    mean = train_codes.mean(dim=0)  # (D,)
    y = F.one_hot(index).double()  # (N, classes)
    scatter = train_codes.T @ train_codes - len(y) * mean.outer(mean)  # (D, D), of the centered codes
    penalty = 1e-3 * len(y) * torch.eye(len(mean), dtype=torch.float64)
    weights = torch.linalg.solve(scatter + penalty, train_codes.T @ (y - y.mean(dim=0)))  # (D, classes)
    scores = (codes - mean) @ weights + y.mean(dim=0)
    return (classes[scores.argmax(dim=1)] == labels.cpu()).double().mean().item()


@torch.no_grad()
def representation_metrics(decoder, data, train_mu, mu):
    """What the test codes mu (N, latent_dim) keep of the images (squared error per pixel) and the classes."""
    errors = [decoder(z) - to_pixels(images) for z, images in batches(mu, data.test_images)]
    return {
        "mse": sum(error.square().sum() for error in errors).item() / data.test_images.numel(),
        "probe_accuracy": probe_accuracy(train_mu, data.train_labels, mu, data.test_labels),
    }


# ---- Figures -----------------------------------------------------------------------------------
WIDTH = 3.25  # inches: fits the columns of ICML, ACM and IEEE unscaled
STYLE = {
    "font.size": 7,
    "axes.titlesize": 7,
    "legend.fontsize": 6,
    "xtick.labelsize": 6,
    "ytick.labelsize": 6,
    "axes.linewidth": 0.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.prop_cycle": matplotlib.cycler(color=["#0072B2", "#D55E00"]),  # Okabe & Ito: colorblind-safe
    "lines.linewidth": 1,
    "image.cmap": "gray_r",  # dark digits on white paper
    "savefig.dpi": 300,
    "pdf.fonttype": 42,  # TrueType: submission systems refuse matplotlib's default, Type 3
}
# Paul Tol's "muted" set, one color per digit, its pale gray darkened.
DIGIT_COLORS = "#CC6677 #332288 #DDCC77 #117733 #88CCEE #882255 #44AA99 #999933 #AA4499 #777777".split()


@contextlib.contextmanager
def new_figure(out, name, title, height, panels=1, layout="constrained"):
    """Yield the axes of `panels`, a column wide, `height` inches high; save a PDF, and a PNG with a title."""
    with matplotlib.style.context(["default", STYLE]):  # whatever the user's matplotlibrc says
        figure = Figure(figsize=(WIDTH, height), layout=layout)
        yield figure.subplots(panels, squeeze=False)[:, 0]
        figure.savefig(Path(out) / f"{name}.pdf", metadata={"CreationDate": None})  # the same bytes each time
        figure.set_figheight(height + 0.14 * len(title.splitlines()))
        figure.axes[0].set_title(title)
        figure.savefig(Path(out) / f"{name}.png")


def plot_grid(images, out, name, title, row_labels=(), column_labels=(), xlabel=""):
    """Draw images (rows, columns, 28, 28) in [0, 1] edge to edge, with a label for each row and column."""
    rows, columns = images.shape[:2]
    tiled = images.permute(0, 2, 1, 3).reshape(rows * 28, columns * 28)
    margin = 0.05  # inches, like the others
    left = 0.6 if row_labels else 0
    below = (0.13 if column_labels else 0) + (0.13 if xlabel else 0)
    cell = (WIDTH - margin - left) / columns
    height = rows * cell + margin + below
    with new_figure(out, name, title, height, layout="compressed") as (ax,):
        ax.imshow(tiled.cpu().numpy(), vmin=0, vmax=1, interpolation="none")
        ax.set_xlabel(xlabel)
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
    grid = torch.cat([images, decode_grid(decoder, mu[None, chosen])])
    title = f"{data.name}: test images"
    plot_grid(grid, out, "reconstructions", title, row_labels=["input", "reconstruction"])


def plot_interpolations(decoder, mu, data, out, steps=11):
    """Straight lines between the codes of test images of two classes: 0 to 1, 2 to 3, ... 8 to 9."""
    chosen = first_of_each_class(data.test_labels)
    if len(chosen) == 1:  # of a single class, two images
        chosen = torch.arange(2, device=mu.device)
    shares = torch.linspace(0, 1, steps, device=mu.device)
    pairs = zip(chosen[0::2], chosen[1::2])
    z = torch.stack([torch.lerp(mu[first], mu[second], shares[:, None]) for first, second in pairs])
    plot_grid(
        decode_grid(decoder, z),  # of codes (pairs, steps, latent_dim)
        out,
        "interpolations",
        title=f"{data.name}: between the codes of two test images",
        column_labels=[f"{share:.1f}" for share in shares.tolist()],
        xlabel="share of the second code",
    )


def plot_loss_curves(history, labels, data, out):
    """One panel for each term in `labels` that the history has: train and test, over epochs."""
    columns = {column for row in history for column in row}
    found = {term: text for term, text in labels.items() if columns & {f"train_{term}", f"test_{term}"}}
    found = found or {"loss": "loss"}
    height = 1 + 0.8 * len(found)
    with new_figure(out, "loss_curves", f"{data.name}: losses", height, panels=len(found)) as axes:
        for ax, (term, label) in zip(axes, found.items()):
            settled = []  # without the first tenth, whose steep fall would flatten the rest
            for split in ("train", "test"):
                curve = {row["epoch"]: row[f"{split}_{term}"] for row in history if f"{split}_{term}" in row}
                ax.plot(list(curve), list(curve.values()), marker=".", markersize=3, label=split)
                settled += [value for epoch, value in curve.items() if epoch > len(history) // 10]
            if settled:
                margin = 0.05 * (max(settled) - min(settled)) or 1
                ax.set_ylim(min(settled) - margin, max(settled) + margin)
            ax.set(xlabel="epoch", ylabel=label)
            ax.set_xlim(0.5, len(history) + 0.5)  # the same in all panels: only the last one shows its ticks
            ax.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)  # also for a single epoch
            ax.label_outer()
        axes[0].legend(ncols=2, frameon=False)


def linear_discriminants(codes, labels):
    """The first two linear discriminants (latent_dim, 2) of codes (N, latent_dim) by label.

    Fisher (1936); for more than two classes, Rao (1948).
    """
    _, index = labels.cpu().unique(return_inverse=True)
    codes = codes.cpu().double()  # on the CPU, since MPS has no float64
    y = F.one_hot(index).double()  # (N, classes)
    means = y @ (y.T @ codes / y.sum(dim=0)[:, None])  # (N, latent_dim): the mean of each code's class
    within = codes - means
    between = means - codes.mean(dim=0)
    variance, axes = torch.linalg.eigh(within.T @ within / len(codes))
    whiten = axes / (variance + 1e-6 * variance.mean() + 1e-9).sqrt()  # finite for dead latents, too
    directions = whiten @ torch.linalg.svd(between @ whiten, full_matrices=False).Vh[:2].T
    return F.pad(directions, (0, 2 - directions.shape[1])).float()  # zero where there is no second one


def plot_latent_space(train_mu, mu, data, out):
    """Test codes mu (N, latent_dim) by class: the plane itself, or along discriminants of train_mu."""
    title = f"{data.name}: codes of the test images"
    points = mu.cpu()
    xlabel = "$\\mu_0$"
    ylabel = "$\\mu_1$"
    if mu.shape[1] != 2:  # not principal components: the KL makes all active latents of a VAE alike
        title += ", along the first two\nlinear discriminants of the training codes"
        points = (points - train_mu.cpu().mean(dim=0)) @ linear_discriminants(train_mu, data.train_labels)
        xlabel = "first linear discriminant of $\\mu$"
        ylabel = "second linear discriminant of $\\mu$"
    classes, index = data.test_labels.cpu().unique(return_inverse=True)
    colors = [DIGIT_COLORS[i % len(DIGIT_COLORS)] for i in range(len(classes))]
    with new_figure(out, "latent_space", title, height=0.9 * WIDTH) as (ax,):
        # In the test set's order, so that no class is drawn on top of all others; a bitmap in the PDF too.
        ax.scatter(*points.T.numpy(), s=1.5, linewidths=0, c=[colors[i] for i in index], rasterized=True)
        for label, color in zip(classes.tolist(), colors):
            ax.scatter([], [], s=12, c=color, label=label)  # an entry of the legend
        ax.figure.legend(loc="outside right center", frameon=False, handletextpad=0.1)
        # By the data's limits: a box that shrank to fit would push the label over the figure's edge.
        ax.set(xlabel=xlabel, ylabel=ylabel, aspect="equal", adjustable="datalim")


def plot_kl_per_dimension(mu, logvar, data, out):
    """Bars of the KL of each latent over the test codes mu, logvar (N, latent_dim), sorted."""
    kl, order = kl_per_latent(mu, logvar).sort(descending=True)
    title = f"{data.name}: sum over latents {kl.sum():.1f} nats"
    with new_figure(out, "kl_per_dimension", title, height=0.5 * WIDTH) as (ax,):
        ax.bar(range(len(kl)), kl.tolist())
        ax.set(xlabel="latents, sorted by their KL", ylabel="KL (nats per image)")
        room = 40 // len(str(len(kl)))  # labels, since the axis has room for 40 digits
        every = math.ceil(len(kl) / room)
        ax.set_xticks(range(0, len(kl), every), order[::every].tolist())


def plot_traversals(decoder, mu, logvar, data, out, rows=10, columns=7):
    """Move one latent from -3 to 3, the others held at the first test image's mu; largest KL on top."""
    kl = kl_per_latent(mu, logvar).tolist()
    order = sorted(range(len(kl)), key=lambda latent: -kl[latent])[:rows]
    values = torch.linspace(-3, 3, columns, device=mu.device)
    z = mu[0].repeat(len(order), columns, 1)  # (rows, columns, latent_dim)
    for row, latent in enumerate(order):
        z[row, :, latent] = values
    shown = f"{rows} of {len(kl)} latents" if len(kl) > rows else "rows"
    plot_grid(
        decode_grid(decoder, z),
        out,
        "traversals",
        title=f"{data.name}: one latent moved,\nothers at a test image's code",
        row_labels=[f"$z_{{{latent}}}$  {kl[latent]:.1f} nats" for latent in order],
        column_labels=[f"{value:g}" for value in values.tolist()],
        xlabel=f"value of the latent; {shown} sorted by KL",
    )


def plot_manifold(decoder, data, out, steps=20):
    """Decode a grid spaced evenly in the prior's quantiles (Kingma & Welling, 2014)."""
    values = torch.special.ndtri((torch.arange(steps) + 0.5) / steps)  # the inverse of the normal CDF
    z = torch.cartesian_prod(-values, values).flip(1).view(steps, steps, 2)  # z_0 to the right, z_1 up
    labels = [f"{value:.2f}" for value in values.tolist()]
    for i in range(steps):
        if min(i, steps - 1 - i) % 4 != 0:  # every fourth one from either end: there is no room for more
            labels[i] = ""
    plot_grid(
        decode_grid(decoder, z.to(data.test_images.device)),
        out,
        "manifold",
        title=f"{data.name}: decoded quantiles of the prior",
        row_labels=labels[::-1],
        column_labels=labels,
        xlabel="$z_0$ to the right, $z_1$ upwards",
    )


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
        major, minor = torch.cuda.get_device_capability(device)
        return "bf16" if major >= 8 else "fp32", f"compute capability {major}.{minor}"
    if device.type != "cpu":
        return "fp32", f"the default on {device.type}"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # next to a busy process, several would wait for each other
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        matrix = torch.ones(256, 256, dtype=dtype)
        # The fastest of many short products: one that no other process interrupts.
        seconds[dtype] = min(timeit.repeat("a @ a", globals={"a": matrix}, number=1, repeat=30))
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
    """Choose the device, load the data, make the folder; print the first line and return (data, out).

    Replaces args.precision "auto" by the one that is faster on the device. Bad input ends the program.
    """
    try:
        device = pick_device(args.device)
        binarize = getattr(args, "binarize", False)  # ae.py has no such flag
        data = load_data(args.data or DATA, args.dataset, device, args.limit, binarize)
        out = Path(args.resume or args.out or free_folder(Path("runs", Path(args.script).stem)))
        out.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError, ValueError) as error:
        print(f"{args.script}: error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    reason = "as requested"
    if args.precision == "auto":
        args.precision, reason = pick_precision(device)
    epochs_done = len(load_checkpoint(out))
    state = f"resumed after epoch {epochs_done}" if epochs_done else "a new run"
    print(f"{device}, {args.precision} ({reason}), seed {args.seed}, writing to {out}, {state}", flush=True)
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
    device = data.train_images.device
    networks = nn.ModuleList(part for part in parts.values() if isinstance(part, nn.Module))
    trained = [parameter for parameter in networks.parameters() if parameter.requires_grad]
    checkpoint = {
        "args": vars(args),
        "history": history,
        "environment": {
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "threads": torch.get_num_threads(),
            "precision": args.precision,
            "python": sys.version.split()[0],
            "torch": str(torch.__version__),
            "torchvision": torchvision.__version__,
            "train_images": len(data.train_images),
            "test_images": len(data.test_images),
            "parameters": sum(parameter.numel() for parameter in trained),
        },
        "model_name": getattr(parts.get("encoder"), "model_name", None),
        **{name: part.state_dict() for name, part in parts.items()},
    }
    buffer = io.BytesIO()  # a full disk is then a plain OSError, unlike torch.save's own error
    torch.save(checkpoint, buffer)
    write_whole(Path(out, "checkpoint.pt"), buffer.getvalue())
    Path(out, "metrics.json").unlink(missing_ok=True)  # it describes fewer epochs
    write_history(out, history)


def write_history(out, history):
    """Write history.csv: a column for each name that any row has, empty where a row lacks it."""
    file = io.StringIO()
    columns = dict.fromkeys(name for row in history for name in row)
    writer = csv.DictWriter(file, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(history)
    try:
        write_whole(Path(out, "history.csv"), file.getvalue().encode())
    except PermissionError as error:  # on Windows, while Excel has it open; the checkpoint has the same rows
        print(f"history.csv was not written: {error}", file=sys.stderr)


def read_checkpoint(folder):
    """The content of folder/checkpoint.pt, on the CPU. Raises OSError if missing, ValueError if damaged."""
    path = Path(folder, "checkpoint.pt")
    content = io.BytesIO(path.read_bytes())
    try:
        checkpoint = torch.load(content, map_location="cpu", weights_only=True)  # runs no code from the file
    except Exception as error:  # damaged bytes raise errors of all kinds
        raise ValueError(f"{path} is damaged: {type(error).__name__}") from error
    if not isinstance(checkpoint, dict) or not {"args", "history", "environment"} <= checkpoint.keys():
        raise ValueError(f"{path} is not a checkpoint of these scripts")
    return checkpoint


def load_checkpoint(out, **parts):
    """Load networks and optimizers from the checkpoint in `out`, if any; returns its history, or else []."""
    if not Path(out, "checkpoint.pt").exists():
        return []
    checkpoint = read_checkpoint(out)
    for name, part in parts.items():
        part.load_state_dict(checkpoint[name])
        if isinstance(part, torch.optim.Optimizer):
            lay_out_like_parameters(part.state)
    write_history(out, checkpoint["history"])  # a kill may have left it an epoch behind
    return checkpoint["history"]


def lay_out_like_parameters(optimizer_state):
    """Give each average the memory layout of its parameter, as fused steps expect.

    Another device may have saved it in another layout.
    """
    for parameter, averages in optimizer_state.items():
        for name, average in averages.items():
            if torch.is_tensor(average) and average.shape == parameter.shape:
                averages[name] = torch.empty_like(parameter).copy_(average)


def load_model(folder):
    """The trained (encoder, decoder, args) of a run with this file's networks, on the CPU, for evaluation."""
    checkpoint = read_checkpoint(folder)
    args = argparse.Namespace(**checkpoint["args"])
    encoder = Encoder(args.hidden_dims, args.latent_dim, checkpoint["model_name"] or "AE")
    decoder = Decoder(args.latent_dim, args.hidden_dims)
    encoder.load_state_dict(checkpoint["encoder"])
    decoder.load_state_dict(checkpoint["decoder"])
    return encoder.eval(), decoder.eval(), args


def read_bound(out):
    """The likelihood bound and its samples in out/metrics.json; {} if there are none."""
    path = Path(out, "metrics.json")
    test = json.loads(path.read_text(encoding="utf-8"))["test"] if path.exists() else {}
    return {name: test[name] for name in ("iw_samples", "iw_bound") if name in test}


def save_metrics(out, measured):
    """Write metrics.json: what the checkpoint in `out` says, its last test terms, and what was `measured`."""
    checkpoint = read_checkpoint(out)
    args = checkpoint["args"]
    history = checkpoint["history"]
    environment = checkpoint["environment"]
    # Later ones win: a new bound over an old one, and a loss's term over a measurement of the same name.
    test = {**read_bound(out), **measured, **terms_of("test", history[-1])}
    for name in list(test):
        try:
            json.dumps(test[name], allow_nan=False)
        except ValueError:
            print(f"{name} is not finite, so it is left out of metrics.json", file=sys.stderr)
            del test[name]
    seconds = sum(row["seconds"] for row in history)
    steps = environment["train_images"] // args["batch_size"]
    images = len(history) * steps * args["batch_size"]
    metrics = {
        "args": args,
        "test": test,
        "train": {"epochs": len(history), "seconds": seconds, "images_per_second": images / seconds},
        "environment": environment,
    }
    write_whole(Path(out, "metrics.json"), f"{json.dumps(metrics, indent=2)}\n".encode())


def end_run(history, args, out):
    """Say where the results are; for a run that was stopped also how to resume it, with exit code 130."""
    print(f"figures and numbers are in {out}", flush=True)
    if len(history) < args.epochs:
        script = sys.argv[0] if Path(sys.argv[0]).name == args.script else args.script  # as it was started
        command = [Path(sys.executable).name, script, "--resume", str(out)]
        line = subprocess.list2cmdline(command) if sys.platform == "win32" else shlex.join(command)
        print(f"stopped after {len(history)} of {args.epochs} epochs; resume with: {line}", flush=True)
        raise SystemExit(130)


# ---- Command line ------------------------------------------------------------------------------
def checked(kind, accept, wanted, text):
    """The value kind(text) of a flag's text. Refused, with what is `wanted`, unless accept(value)."""
    with contextlib.suppress(ValueError):
        value = kind(text)
        if accept(value):
            return value
    raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Adds the default to the help of each flag that has one."""

    def _get_help_string(self, action):
        if action.default is None or isinstance(action.default, bool):
            return action.help
        return super()._get_help_string(action)


# Types of flags, for add_argument.
positive_int = partial(checked, int, lambda value: 1 <= value <= 10**6, "a whole number from 1 to 1000000")
positive_float = partial(checked, float, lambda value: 0 < value < math.inf, "a finite number above 0")
nonnegative_float = partial(
    checked, float, lambda value: 0 <= value < math.inf, "a finite number of at least 0"
)
train_size = partial(checked, int, lambda value: 1 <= value <= 60_000, "a whole number from 1 to 60000")
seed_number = partial(checked, int, lambda value: 0 <= value < 2**32, "a whole number from 0 to 2**32 - 1")
folder_name = partial(checked, os.path.expanduser, bool, "the name of a folder")


def parse_args(parser, argv=None):
    """Parse and check the flags; with --resume DIR they are those of the run in DIR, if there is one."""
    parser.set_defaults(script=parser.prog)
    parser.print_usage = lambda file: None  # an error is one line; --help has the usage
    args = parser.parse_args(argv)
    for name, value in vars(args).items():
        try:
            setattr(args, name, json.loads(json.dumps(value, allow_nan=False)))  # as a checkpoint holds it
        except (TypeError, ValueError):
            flag = name.replace("_", "-")
            parser.error(f"argument --{flag}: {value!r} cannot be stored; use finite numbers, text or lists")
    folder = args.resume or args.out
    try:
        if args.resume and Path(folder, "checkpoint.pt").exists():
            args = resumed_args(parser, argv, args)
        elif folder:
            refuse_results(Path(folder))
    except (OSError, ValueError) as error:
        parser.error(f"argument {'--resume' if args.resume else '--out'}: {error}")
    if args.batch_size > args.limit:
        parser.error(f"argument --batch-size: {args.batch_size} is more than {args.limit} training images")
    return args


def refuse_results(folder):
    """Raise ValueError if `folder` holds a file that a run writes; a scheduler's log may be there."""
    for path in folder.glob("*"):
        if path.name in ("checkpoint.pt", "history.csv", "metrics.json") or path.suffix in (".png", ".pdf"):
            raise ValueError(f"{folder} holds {path.name}; a new run needs a folder without results")


def resumed_args(parser, argv, args):
    """The flags of the run in args.resume. Raises ValueError for a flag in argv that would change the run."""
    stored = read_checkpoint(args.resume)["args"]
    if stored["script"] != args.script:
        raise ValueError(f"the run in {args.resume} is one of {stored['script']}, not of {args.script}")
    resumed = {**vars(args), **stored, "out": None}  # a flag that is new in the script has its default
    if read_bound(args.resume):
        resumed["iw_samples"] = None  # computed already: only the flag itself asks for another bound
    # No default is set over a value that is there, so None stays for each flag that is not in argv.
    given = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(vars(args))))
    for name, value in vars(args).items():
        if getattr(given, name) is None or (name, value) == ("precision", "auto"):
            continue
        expected = stored.get(name, parser.get_default(name))
        if name in ("resume", "device", "data", "iw_samples"):
            resumed[name] = value
        elif value != expected:
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag} is {expected} in that run; for another value, start a new run")
    return argparse.Namespace(**resumed)
