"""What ae.py, vae.py and beta_vae.py share: data, Encoder, Decoder, training, evaluation, figures.

The sections stand in the order in which the data flows, and the machinery (run folder, command line)
comes last. All losses are in nats per image: summed over pixels or latents, averaged over the batch.
"""

import argparse
import contextlib
import csv
import ctypes
import io
import json
import math
import os
import shutil
import sys
import tempfile
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
from torchvision.datasets import MNIST
from torchvision.datasets.utils import check_integrity

EVAL_SEED = 0  # of the samples z behind every test number, whatever the run's own seed is
EVAL_BATCH = 250  # images at a time in evaluation: bounds its memory, and more are slower on a CPU


# ---- Data --------------------------------------------------------------------------------------

# On one device: uint8 images (N, 1, 28, 28) and int64 labels (N,).
Mnist = namedtuple("Mnist", "train_images train_labels test_images test_labels")


def load_mnist(root, device="cpu", limit=None, binarize=False):
    """Load MNIST onto `device`, from the archives in root/MNIST/raw or else by download.

    limit: how many training images to keep. binarize: draw the test images, once, from Bernoulli(pixel).
    Raises OSError or RuntimeError that names what is neither there, whole, nor to be had.
    """
    raw = Path(root) / "MNIST" / "raw"
    absent = [name for name, md5 in MNIST.resources if not check_integrity(raw / name, md5)]
    # Unpacked anew in a folder of this process alone: no damaged file is ever trained on, and two runs never meet.
    with tempfile.TemporaryDirectory() as private:
        unpacked = Path(private) / "MNIST" / "raw"
        unpacked.mkdir(parents=True)
        for name in {name for name, _ in MNIST.resources} - set(absent):
            shutil.copy(raw / name, unpacked)
        try:
            train, test = (MNIST(private, train, download=True) for train in (True, False))
        except (OSError, RuntimeError) as error:
            names = f"{', '.join(absent) or 'MNIST'}: missing or damaged in {raw}"
            raise RuntimeError(f"{names}, and no download; put the original there") from error
        for name in absent:
            raw.mkdir(parents=True, exist_ok=True)
            shutil.copy(unpacked / name, raw)  # if it is cut short, the next run finds that
    test_images = binarise(test.data) if binarize else test.data
    parts = train.data[:limit, None], train.targets[:limit], test_images[:, None], test.targets  # (N, 1, 28, 28), (N,)
    return Mnist(*(part.to(device) for part in parts))


def to_pixels(images):
    """uint8 images in [0, 255] to float32 in [0, 1], same shape."""
    return images.float().div_(255)


def binarise(images):
    """uint8 images drawn once from Bernoulli(pixel), with a fixed seed: 0 or 255, same shape."""
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

    def features(self, x):
        x = F.pad(x, (2, 2, 2, 2))  # (B, 1, 28, 28) -> (B, 1, 32, 32)
        return self.model(x).flatten(1)  # (B, hidden_dims[3], 2, 2) -> (B, hidden_dims[3] * 4)

    def reparameterize(self, mu, logvar):
        """A sample of N(mu, exp(logvar)) that passes gradients to both (Kingma & Welling, 2014)."""
        std = torch.exp(0.5 * logvar)
        eps = torch.randn_like(std)
        return mu + eps * std

    def forward(self, x):
        h = self.features(x)
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


def pick_precision(device, wanted="auto"):
    """The precision of the training step on `device` for a --precision value, and why."""
    if wanted != "auto":
        return {"fp32": "float32", "bf16": "bfloat16"}[wanted], "as asked"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0):  # of this card, not the first
        return "bfloat16", "native"
    if device.type == "cpu" and torch.cpu._is_amx_tile_supported():
        return "bfloat16", "native: AMX"
    if device.type == "cpu" and torch.cpu._is_avx512_bf16_supported():
        return "bfloat16", "native: AVX512-BF16"
    return "float32", "no native bfloat16"


def keep_freed_memory():
    """Have glibc keep freed activations for the next step, instead of mapping and faulting them anew."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD, at its largest
        mallopt(-1, (2 << 30) - 1)  # M_TRIM_THRESHOLD


class BiasApart(TorchFunctionMode):
    """Has transposed convolutions add their bias apart: on CPUs oneDNN's bfloat16 gradient of it is slow."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is not F.conv_transpose2d:
            return function(*args, **(kwargs or {}))
        x, weight, bias, *shape = args
        h = function(x, weight, None, *shape)
        return h + bias.to(h.dtype)[:, None, None]


def seed_epoch(seed, epoch):
    """Seed every generator for one epoch (0: the initial weights), so that no state needs saving."""
    torch.manual_seed(seed * 1_000_003 + epoch)


def learning_rate(step, total_steps, peak):
    """Linear warm-up over the first tenth of the steps, then linear to zero."""
    warmup = max(1, total_steps // 10)
    return peak * min((step + 1) / warmup, (total_steps - step) / max(1, total_steps - warmup))


def train_model(encoder, decoder, data, loss_fn, args, out, progress=None):
    """Train on data.train_images with AdamW; after each epoch test, and write history and checkpoint to `out`.

    loss_fn(encoder, decoder, x): x (B, 1, 28, 28) in [0, 1]; returns the loss and its named terms, nats per image.
    args: epochs, batch_size, lr, seed, precision, binarize, resume (goes on from the checkpoint in `out`, if any).
    progress: a scalar tensor to keep at the share of the training done, for a loss that changes in its course.
    Returns the history, one dict an epoch; its seconds are those of the training steps alone. After Ctrl-C it and the
    models are the last checkpoint's. Raises KeyboardInterrupt if there is none, FloatingPointError on divergence.
    """
    images, device = data.train_images, data.train_images.device
    on_cuda, narrow = device.type == "cuda", pick_precision(device, args.precision)[0] == "bfloat16"
    torch.set_float32_matmul_precision("highest")  # float32 is float32, not rounded to TensorFloat-32,
    torch.backends.cudnn.allow_tf32 = False  # in convolutions too
    if on_cuda:
        torch.cuda.set_device(device)  # of several: streams and graphs are the current one's
    keep_freed_memory()
    if device.type != "mps":  # whose kernels are slower so, and were wrong at times (pytorch#143196)
        # channels_last is the layout that convolution kernels want: no reorder around each of them.
        encoder.to(memory_format=torch.channels_last)
        decoder.to(memory_format=torch.channels_last)
    parameters = [*encoder.parameters(), *decoder.parameters()]
    # A CUDA graph reads what changes from step to step out of tensors, so there Adam keeps its rate in one.
    rate = torch.tensor(args.lr, device=device) if on_cuda else args.lr
    recipe = {"lr": rate, "betas": (0.9, 0.95), "weight_decay": 0.1}
    optimizer = torch.optim.AdamW(parameters, **recipe, fused=True, capturable=on_cuda)
    nn.init.constant_(decoder.last_layer[0].bias, to_pixels(images).mean().logit().item())  # starts at the mean image
    history = restore(encoder, decoder, optimizer, out) if args.resume else []

    steps = len(images) // args.batch_size  # full batches only
    index = torch.zeros(args.batch_size, dtype=torch.int64, device=device)  # of the step's images
    progress = torch.zeros((), device=device) if progress is None else progress
    totals = defaultdict(lambda: torch.zeros((), device=device))  # on the device: reading them would stall each step
    cast = torch.autocast(device.type, torch.bfloat16) if narrow else contextlib.nullcontext()
    apart = BiasApart() if narrow and device.type == "cpu" else contextlib.nullcontext()

    def training_step():
        x = to_pixels(images[index])
        if args.binarize:
            x = torch.bernoulli(x)
        with cast, apart:
            loss, terms = loss_fn(encoder, decoder, x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for name, term in {"loss": loss, **terms}.items():
            totals[name] += term.detach()

    try:
        step_once = as_cuda_graph(training_step, parameters, optimizer) if on_cuda else training_step
        for epoch in range(len(history) + 1, args.epochs + 1):
            seed_epoch(args.seed, epoch)
            start = time.perf_counter()
            order = torch.randperm(len(images), device=device)[: steps * args.batch_size]  # what is left over varies
            for total in totals.values():
                total.zero_()
            for step, batch in enumerate(order.split(args.batch_size)):
                done = (epoch - 1) * steps + step
                lr = learning_rate(done, args.epochs * steps, args.lr)
                for group in optimizer.param_groups:
                    group["lr"] = group["lr"].fill_(lr) if on_cuda else lr
                progress.fill_(done / (args.epochs * steps))
                index.copy_(batch)
                step_once()
                if step % 50 == 49 and sys.stdout.isatty():
                    totals["loss"].item()  # waits for the device, which may have only queued the steps
                    show_progress(history, epoch, args, step + 1, steps, time.perf_counter() - start)
            train = {f"train_{name}": value.item() / steps for name, value in totals.items()}  # waits for the device
            elapsed = time.perf_counter() - start
            progress.fill_(epoch / args.epochs)
            test = evaluate(encoder, decoder, data.test_images, loss_fn)
            terms = train | {f"test_{name}": value for name, value in test.items()}
            for name, value in terms.items():
                if not math.isfinite(value):
                    raise FloatingPointError(f"{name} is {value} in epoch {epoch}: try an --lr below {args.lr:g}")
            history.append({"epoch": epoch, "lr": lr, **terms, "seconds": elapsed})
            save_checkpoint(encoder, decoder, optimizer, history, args, out)
            show_progress(history, epoch, args, steps, steps, elapsed)
    except KeyboardInterrupt:
        history = restore(encoder, decoder, optimizer, out)  # the step or the epoch is half done
        if not history:
            raise
    return history


def as_cuda_graph(step, parameters, optimizer):
    """`step` as one CUDA graph: a replay is one launch, where the step's own hundreds would bound its speed.

    A replay reads the same tensors anew, the learning rate's too, and draws new random numbers. The steps that capture
    asks for first, for libraries and Adam to start, are taken back. If it fails, a line says so: `step` comes back.
    """
    weights = [parameter.detach().clone() for parameter in parameters]
    states = {key: {name: value.clone() for name, value in state.items()} for key, state in optimizer.state.items()}
    generator = torch.cuda.default_generators[parameters[0].device.index]
    random_state = generator.clone_state()
    graph, side, graphed = torch.cuda.CUDAGraph(), torch.cuda.Stream(), step
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # and back to the current one, however the capture ends
        for _ in range(3):
            step()
        try:
            with torch.cuda.graph(graph, stream=side):
                step()  # recorded, not run
            graphed = graph.replay
        except RuntimeError as error:
            generator.graphsafe_set_state(random_state)  # a broken capture leaves it unusable
            print(f"no CUDA graph, so training is slower: {str(error.__context__ or error).splitlines()[0]}")
    torch.cuda.synchronize()
    with torch.no_grad():
        for parameter, weight in zip(parameters, weights):
            parameter.copy_(weight)
            for name, value in optimizer.state[parameter].items():
                value.copy_(states[parameter][name] if parameter in states else torch.zeros_like(value))
    return graphed


def show_progress(history, epoch, args, done, steps, elapsed):
    """Speed and time left, after `done` of `steps` of an epoch; test terms are the last epoch's."""
    left = elapsed / done * ((args.epochs - epoch + 1) * steps - done)
    line = f"epoch {epoch}/{args.epochs}  {done * args.batch_size / elapsed:,.0f} images/s  {left:.0f} s left"
    if history:
        test = {name: value for name, value in history[-1].items() if name.startswith("test_")}
        line += "  test" + "".join(f" {name.removeprefix('test_')} {value:.2f}" for name, value in test.items())
    if sys.stdout.isatty():  # one line, updated in place
        line = line[: shutil.get_terminal_size().columns - 1]  # one that wraps could not be overwritten
        print(f"\r\x1b[K{line}", end="\n" if len(history) == args.epochs else "", flush=True)
    else:
        print(line, flush=True)


# ---- Evaluation --------------------------------------------------------------------------------


@torch.inference_mode()
def evaluate(encoder, decoder, images, loss_fn):
    """Mean loss and terms over all `images` (N, 1, 28, 28) uint8, in float32, z sampled from a fixed seed."""
    torch.manual_seed(EVAL_SEED)
    totals = defaultdict(float)
    for batch in images.split(EVAL_BATCH):
        loss, terms = loss_fn(encoder, decoder, to_pixels(batch))
        for name, value in {"loss": loss, **terms}.items():
            totals[name] += value * len(batch)  # a short last batch counts for less
    return {name: value.item() / len(images) for name, value in totals.items()}


@torch.inference_mode()
def encode(encoder, images):
    """The codes (mu, logvar) of uint8 images (N, 1, 28, 28), each (N, latent_dim). An AE's logvar means nothing."""
    features = [encoder.features(to_pixels(batch)) for batch in images.split(EVAL_BATCH)]
    return tuple(torch.cat([head(h) for h in features]) for head in (encoder.fc_mean, encoder.fc_logvar))


@torch.inference_mode()
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


def probe_accuracy(train_codes, train_labels, codes, labels):
    """Share of `codes` (N, D) whose label a linear probe finds: ridge regression to one-hot labels, then argmax."""
    train_codes, codes, labels = train_codes.cpu(), codes.cpu(), labels.cpu()  # not every accelerator can solve
    mean, y = train_codes.mean(dim=0), F.one_hot(train_labels.cpu(), 10).float()  # (D,), (N, 10)
    scatter = train_codes.T @ train_codes - len(y) * mean.outer(mean)  # (D, D), of the centred codes
    penalty = 1e-3 * len(y) * torch.eye(len(mean))
    weights = torch.linalg.solve(scatter + penalty, train_codes.T @ (y - y.mean(dim=0)))  # (D, 10)
    scores = (codes - mean) @ weights + y.mean(dim=0)
    return (scores.argmax(dim=1) == labels).float().mean().item()


@torch.inference_mode()
def representation_metrics(decoder, data, train_mu, mu):
    """What the test codes mu (N, latent_dim) keep of the images, beside PCA with as many components and raw pixels."""
    parts = zip(mu.split(EVAL_BATCH), data.test_images.split(EVAL_BATCH))
    squares = sum((decoder(code) - to_pixels(batch)).square().sum() for code, batch in parts)
    train_pixels, pixels = (to_pixels(images.cpu()).flatten(1) for images in (data.train_images, data.test_images))
    mean = train_pixels.mean(dim=0)
    train_pixels, pixels = train_pixels - mean, pixels - mean
    _, directions = torch.linalg.eigh(train_pixels.T @ train_pixels)  # (784, 784), columns in ascending order
    directions = directions[:, -mu.shape[1] :]  # (784, latent_dim)
    pca = pixels @ directions  # (N, latent_dim)
    probe = partial(probe_accuracy, train_labels=data.train_labels, labels=data.test_labels)
    return {
        "mse": squares.item() / data.test_images.numel(),
        "pca_mse": (pca @ directions.T - pixels).square().mean().item(),
        "probe_accuracy": probe(train_mu, codes=mu),
        "pca_probe_accuracy": probe(train_pixels @ directions, codes=pca),
        "pixel_probe_accuracy": probe(train_pixels, codes=pixels),
    }


# ---- Figures -----------------------------------------------------------------------------------

WIDTH = 3.25  # inches: fits the columns of ICML, ACM and IEEE unscaled
STYLE = {
    **dict.fromkeys(("font.size", "axes.titlesize", "axes.labelsize", "figure.labelsize"), 7),
    **dict.fromkeys(("xtick.labelsize", "ytick.labelsize", "legend.fontsize"), 6),
    "axes.linewidth": 0.5,
    "lines.linewidth": 1,
    **dict.fromkeys(("axes.spines.top", "axes.spines.right"), False),
    "axes.prop_cycle": matplotlib.cycler(color=["#0072B2", "#D55E00"]),  # Okabe & Ito: colour-blind-safe
    "image.cmap": "gray_r",  # ink on paper
    "savefig.dpi": 300,
    "pdf.fonttype": 42,  # TrueType, which publishers ask for
}
# Paul Tol's "muted" set, one colour a digit, its pale grey darkened.
DIGIT_COLOURS = "#CC6677 #332288 #DDCC77 #117733 #88CCEE #882255 #44AA99 #999933 #AA4499 #777777".split()


@contextlib.contextmanager
def new_figure(out, name, title, height, panels=1, layout="constrained"):
    """Yields the axes of `panels`, a column wide and `height` inches high; saves a PDF and, with the title, a PNG."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, height), layout=layout)
        yield figure.subplots(panels, squeeze=False)[:, 0]
        with replacing(Path(out) / f"{name}.pdf") as beside:
            figure.savefig(beside, format="pdf")
        figure.set_figheight(height + 0.14 * (title.count("\n") + 1))
        figure.axes[0].set_title(title)
        with replacing(Path(out) / f"{name}.png") as beside:
            figure.savefig(beside, format="png")


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


@torch.inference_mode()
def decode_grid(decoder, z):
    """Codes z (rows, columns, latent_dim) to images (rows, columns, 28, 28) in [0, 1]."""
    return decoder(z.flatten(0, 1)).view(*z.shape[:2], 28, 28)


def one_of_each(labels):
    """Indices (10,) of the first image of each digit in labels (N,)."""
    return torch.stack([(labels == digit).nonzero()[0, 0] for digit in range(10)])


def plot_reconstructions(decoder, mu, images, labels, out):
    """The first test image of each digit above its reconstruction from mu."""
    chosen = one_of_each(labels)
    pair = torch.cat([to_pixels(images[chosen, 0])[None], decode_grid(decoder, mu[None, chosen])])  # (2, 10, 28, 28)
    plot_grid(pair, out, "reconstructions", "Test images", ["input", "reconstruction"])


def plot_interpolations(decoder, mu, labels, out, steps=11):
    """Straight lines in code space between test images of two digits: 0 to 1, 2 to 3, ... 8 to 9."""
    ends = mu[one_of_each(labels)].view(5, 2, 1, -1)  # (pair, end, 1, latent_dim)
    t = torch.linspace(0, 1, steps, device=mu.device)
    z = torch.lerp(ends[:, 0], ends[:, 1], t[:, None])  # (pair, steps, latent_dim)
    columns = [f"{weight:.1f}" for weight in t.tolist()]
    title = "Between the codes of two test images"
    plot_grid(decode_grid(decoder, z), out, "interpolations", title, (), columns, "share of the second code")


def plot_loss_curves(history, terms, out):
    """One panel a term, train and test, over epochs; `terms` maps the history's names to labels."""
    shown = history[len(history) // 10 :]  # without the warm-up, beside whose fall the rest would be a flat line
    with new_figure(out, "loss_curves", "Losses", max(0.6 * WIDTH, 0.4 + len(terms)), len(terms)) as axes:
        for ax, (name, label) in zip(axes, terms.items()):
            for split in ("train", "test"):
                values = [row[f"{split}_{name}"] for row in shown]
                ax.plot([row["epoch"] for row in shown], values, marker=".", markersize=3, label=split)
            ax.set(xlabel="epoch", ylabel=f"{label}\n(nats per image)")
            ax.xaxis.get_major_locator().set_params(integer=True)
            ax.label_outer()
        axes[0].legend(ncols=2, frameon=False)


def linear_discriminants(codes, labels):
    """The two directions (latent_dim, 2) along which digits differ most, beside their own spread: Fisher (1936).

    codes: (N, latent_dim), labels: (N,). Dead latents, or fewer codes than latents, give finite directions too.
    """
    codes, y = codes.cpu().double(), F.one_hot(labels.cpu(), 10).double()  # not every accelerator has float64
    means = y @ (y.T @ codes / y.sum(dim=0).clamp(min=1)[:, None])  # (N, latent_dim): of each code's digit
    within, between = codes - means, means - codes.mean(dim=0)
    variance, axes = torch.linalg.eigh(within.T @ within / len(codes))
    whiten = axes / (variance + 1e-6 * variance.mean() + 1e-9).sqrt()  # (latent_dim, latent_dim): to unit spread
    directions = whiten @ torch.linalg.svd(between @ whiten, full_matrices=False).Vh[:2].T
    return F.pad(directions, (0, 2 - directions.shape[1])).float()  # of a single latent the second is zero


def plot_latent_space(train_mu, train_labels, mu, labels, out):
    """Scatter of test codes mu (N, latent_dim) by digit: the plane itself, or two linear discriminants of train_mu."""
    points, labels = mu.cpu(), labels.cpu()
    axes, title = ["$\\mu_0$", "$\\mu_1$"], "Codes of the test images"
    if mu.shape[1] != 2:  # the KL makes a VAE's active latents alike, so that principal components show nothing
        points = (points - train_mu.cpu().mean(dim=0)) @ linear_discriminants(train_mu, train_labels)
        axes = [f"{rank} linear discriminant of $\\mu$" for rank in ("first", "second")]
        title += ", along the two\nlinear discriminants of the training codes"
    with new_figure(out, "latent_space", title, 0.9 * WIDTH) as (ax,):
        # In the test set's order, so that no digit is drawn on top of all others; a bitmap in the PDF too.
        ax.scatter(*points.T.numpy(), s=1.5, linewidths=0, c=[DIGIT_COLOURS[i] for i in labels], rasterized=True)
        halo = [withStroke(linewidth=2, foreground="white")]
        for digit in labels.unique().tolist():  # where two groups coincide, the legend tells them apart
            where = points[labels == digit].median(dim=0).values.tolist()
            ax.text(*where, digit, weight="bold", ha="center", va="center", path_effects=halo)
        handles = [ax.scatter([], [], s=12, c=colour, label=digit) for digit, colour in enumerate(DIGIT_COLOURS)]
        ax.figure.legend(handles=handles, loc="outside right center", frameon=False, handletextpad=0.1)
        # By the data's limits: a box that shrank to fit would push the label over the figure's edge.
        ax.set(xlabel=axes[0], ylabel=axes[1], aspect="equal", adjustable="datalim")


def plot_kl_per_dimension(mu, logvar, out):
    """Bars of the KL of each latent over codes mu, logvar (N, latent_dim), sorted."""
    kl, order = kl_per_latent(mu, logvar).sort(descending=True)
    with new_figure(out, "kl_per_dimension", f"Sum over latents: {kl.sum():.1f} nats", 0.5 * WIDTH) as (ax,):
        ax.bar(range(len(kl)), kl.tolist())
        ax.set(xlabel="latents, sorted by their KL", ylabel="KL (nats per image)")
        every = math.ceil(len(kl) / 30)  # as many numbers as have room
        ax.set_xticks(range(0, len(kl), every), order[::every].tolist())


def plot_traversals(decoder, mu, logvar, out, rows=10, columns=7):
    """Move one latent from -3 to 3, the others held at the first test image's mu; largest KL on top."""
    kl, order = (values[:rows] for values in kl_per_latent(mu, logvar).sort(descending=True))
    values = torch.linspace(-3, 3, columns, device=mu.device)
    z = mu[0].repeat(len(order), columns, 1)  # (rows, columns, latent_dim)
    z[torch.arange(len(order), device=z.device), :, order] = values
    row_labels = [f"$z_{{{latent}}}$  {nats:.1f} nats" for latent, nats in zip(order.tolist(), kl.tolist())]
    labels = row_labels, [f"{value:g}" for value in values.tolist()], "value of the latent", "latent, sorted by its KL"
    plot_grid(decode_grid(decoder, z), out, "traversals", "One latent moved,\nothers at a test image's code", *labels)


def plot_manifold(decoder, out, steps=20):
    """Decode a grid over a latent plane, even in the prior's probability (Kingma & Welling, 2014)."""
    values = torch.special.ndtri((torch.arange(steps) + 0.5) / steps)  # the inverse of the normal CDF
    z = torch.cartesian_prod(-values, values).flip(1).view(steps, steps, 2)  # z_0 to the right, z_1 up
    images = decode_grid(decoder, z.to(decoder.input_layer.weight.device))
    plot_grid(images, out, "manifold", "Decoded quantiles of the prior", (), (), "$z_0$, to the right", "$z_1$, up")


# ---- Run folder --------------------------------------------------------------------------------


def device_name(device):
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


@contextlib.contextmanager
def replacing(path):
    """Yield a path to write to, and move it to `path` once it is whole: what fails leaves the old file."""
    beside = path.with_name(f".{path.name}.tmp")  # one name, so that what a killed run left is written over
    try:
        yield beside
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def save_checkpoint(encoder, decoder, optimizer, history, args, out):
    """Write history.csv and checkpoint.pt."""
    with replacing(Path(out) / "history.csv") as beside, open(beside, "w", newline="") as file:
        writer = csv.DictWriter(file, history[0])
        writer.writeheader()
        writer.writerows(history)
    models = {"model_name": encoder.model_name, "encoder": encoder.state_dict(), "decoder": decoder.state_dict()}
    run = {"args": vars(args), "epoch": len(history), "history": history, "optimizer": optimizer.state_dict()}
    buffer = io.BytesIO()  # a full disk is then a plain OSError, which torch.save to a path does not raise
    torch.save({**models, **run}, buffer)
    with replacing(Path(out) / "checkpoint.pt") as beside:
        beside.write_bytes(buffer.getbuffer())


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


def restore(encoder, decoder, optimizer, folder):
    """Take weights and optimizer state from the checkpoint in `folder`; returns its history, [] if there is none."""
    if not (Path(folder) / "checkpoint.pt").exists():
        return []
    checkpoint = read_checkpoint(folder)
    encoder.load_state_dict(checkpoint["encoder"])
    decoder.load_state_dict(checkpoint["decoder"])
    # Its state alone: how Adam runs (fused or not) is this device's matter, not the checkpoint's.
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": checkpoint["optimizer"]["state"], "param_groups": groups})
    return checkpoint["history"]


def load_model(folder):
    """The trained (encoder, decoder, args) of a run folder, on the CPU. Errors: see `read_checkpoint`."""
    checkpoint = read_checkpoint(folder)
    args = argparse.Namespace(**checkpoint["args"])
    encoder = Encoder(args.hidden_dims, args.latent_dim, checkpoint["model_name"])
    decoder = Decoder(args.latent_dim, args.hidden_dims)
    encoder.load_state_dict(checkpoint["encoder"])
    decoder.load_state_dict(checkpoint["decoder"])
    return encoder, decoder, args


def save_metrics(encoder, decoder, data, test, history, args, out):
    """Write metrics.json: the last epoch's test terms, what else was measured (`test`), and all that made them."""
    device, seconds = data.test_images.device, sum(row["seconds"] for row in history)
    seen = len(history) * (len(data.train_images) // args.batch_size) * args.batch_size
    terms = {name.removeprefix("test_"): value for name, value in history[-1].items() if name.startswith("test_")}
    kinds = {"bce": "Bernoulli: binary cross-entropy", "mse": "Gaussian of unit variance: half the squared error"}
    protocol = {
        "split": f"trained on {len(data.train_images)} MNIST images, tested on {len(data.test_images)}",
        "pixels": "binarised" if args.binarize else "grey",
        "recon": f"{kinds[args.recon]}, summed over pixels",
        "z": "one sample of q(z|x) an image" if "kl" in terms else "the code itself",
        "K": args.iw_samples if "iw_bound" in test else None,
        "seed": args.seed,
    }
    protocol |= {"mse": "per pixel, from the mean code", "evaluation_seed": EVAL_SEED, "units": "nats per image"}
    train = {"epochs": len(history), "seconds": seconds, "images_per_second": seen / seconds}
    train["peak_memory_mb"] = torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else None
    train["parameters"] = sum(parameter.numel() for model in (encoder, decoder) for parameter in model.parameters())
    versions = {"python": sys.version.split()[0], "torch": torch.__version__, "torchvision": torchvision.__version__}
    precision = pick_precision(device, args.precision)[0]
    metrics = {"args": vars(args), "protocol": protocol, "test": terms | test, "train": train}
    metrics["environment"] = {"script": args.script, "device": device_name(device), "precision": precision} | versions
    with replacing(Path(out) / "metrics.json") as beside:
        beside.write_text(json.dumps(metrics, indent=2) + "\n")


def claim_folder(args):
    """Make and lock the folder of --resume or --out or, without them, the first free one of runs/vae, runs/vae-2, ...

    Returns it and the lock, held until closed. Raises OSError where that cannot be.
    """
    folder = first = Path(args.resume or getattr(args, "out", Path("runs", args.script).with_suffix("")))
    number, numbered = 1, not args.resume and "out" not in args
    while numbered:
        try:
            folder.mkdir(parents=True)  # makes or fails in one step: two runs never get one folder
            break
        except FileExistsError:
            number += 1
            folder = first.with_name(f"{first.name}-{number}")
    folder.mkdir(parents=True, exist_ok=True)
    lock = open(folder / ".lock", "w")
    try:
        import fcntl

        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # falls with the process, however that ends
    except BlockingIOError as error:
        raise BlockingIOError(f"another run writes to {folder} now") from error
    except (ImportError, OSError):
        pass  # Windows, or a file system without locks: go on without one
    return folder, lock


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


def make_parser(name, doc):
    """The flags that all scripts have; `name` is the script's, the first line of `doc` heads the help."""
    style = argparse.ArgumentDefaultsHelpFormatter
    parser = Parser(prog=f"{name}.py", description=doc.splitlines()[0], formatter_class=style, allow_abbrev=False)
    run = parser.add_argument_group("run")
    folder = run.add_mutually_exclusive_group()
    free = f"the first of runs/{name}, runs/{name}-2, ... that is free"
    folder.add_argument("--out", metavar="DIR", default=argparse.SUPPRESS, help=f"folder to write to (default: {free})")
    folder.add_argument("--resume", metavar="DIR", help="go on with the run in DIR and its flags, or start it there")
    run.add_argument("--seed", type=seed_value, default=0, help="seed of weights, batches and noise")
    run.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    run.add_argument("--precision", choices=["auto", "fp32", "bf16"], default="auto", help="auto: bf16 where native")
    data = parser.add_argument_group("data")
    data.add_argument("--data", metavar="DIR", default="data", help="folder that holds MNIST/raw/*.gz")
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
    parser.set_defaults(script=parser.prog, binarize=False, iw_samples=None)
    return parser


def add_likelihood_flags(parser):
    """The flags of models that bound log p(x)."""
    likelihood = parser.add_argument_group("likelihood")
    likelihood.add_argument("--binarize", action="store_true", help="draw each pixel from Bernoulli(pixel)")
    likelihood.add_argument("--iw-samples", metavar="K", type=positive_int, help="samples an image of the IW bound")


def parse_args(parser, argv=None):
    """Parse the flags; with --resume those that the run was started with count, unless given anew."""
    args = parser.parse_args(argv)
    with parser.refusing("--resume"):
        if args.resume and (Path(args.resume) / "checkpoint.pt").exists():
            saved = read_checkpoint(args.resume)["args"]
            parser.set_defaults(**{name: saved[name] for name in saved.keys() - {"out", "resume", "script"}})
            args = parser.parse_args(argv)
            for name in ("script", "latent_dim", "hidden_dims"):
                if getattr(args, name) != saved[name]:
                    raise ValueError(f"the run in {args.resume} has {name} {saved[name]}, not {getattr(args, name)}")
    with parser.refusing("--out"):
        if "out" in args and Path(args.out).exists() and any(path.name != ".lock" for path in Path(args.out).iterdir()):
            raise OSError(f"{args.out} is not empty; name another one")
    if args.batch_size > args.limit:
        parser.error(f"argument --batch-size: {args.batch_size} is more than the {args.limit} training images")
    return args


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
        reason = f"{found if name == 'auto' else name} cannot be used: {(str(error) or repr(error)).splitlines()[0]}"
        if name != "auto":
            raise ValueError(f"{reason} (take auto, cpu, cuda, cuda:N or mps)") from error
        return torch.device("cpu"), f" ({reason})"


@contextlib.contextmanager
def start_run(parser, args):
    """Pick the device, load the data, claim the folder, in this order; yields (data, folder).

    What is refused ends in one line with exit code 2, before anything is written. What stops the run later
    (full disk, divergence: 1; Ctrl-C: 130) ends in one line too, and the last checkpoint stays.
    """
    with parser.refusing("--device"):
        device, fallback = pick_device(args.device)
    with parser.refusing("--data"):
        data = load_mnist(args.data, device, args.limit, args.binarize)
    with parser.refusing("--resume" if args.resume else "--out"):
        folder, lock = claim_folder(args)
    args.out = str(folder)
    precision, reason = pick_precision(device, args.precision)
    print(f"{device_name(device)}{fallback}, {precision} ({reason}), writing to {folder}")
    try:
        with lock:
            yield data, folder
            if read_checkpoint(folder)["epoch"] < args.epochs:
                raise KeyboardInterrupt
    except (KeyboardInterrupt, FloatingPointError, OSError) as error:
        if sys.stdout.isatty():
            print()  # leave the progress line
        status, what = (130, "interrupted") if isinstance(error, KeyboardInterrupt) else (1, f"error: {error}")
        parser.exit(status, f"{parser.prog}: {what}; go on with: python {parser.prog} --resume {folder}\n")
    print(f"figures and numbers are in {folder}")
