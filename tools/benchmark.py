"""python -m tools.benchmark --device cpu

Compares vae.py's training loop with a textbook loop: a DataLoader with ToTensor, float32, one .item() per
step. Both train the same networks on the same images; their speed is that of the second of two epochs,
without loading and evaluation. Then compares two whole programs: pytorch/examples' VAE by its own protocol,
and the first look of the README.
"""

import argparse
import contextlib
import io
import json
import multiprocessing
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, Subset
from torchvision.datasets import MNIST
from torchvision.transforms import ToTensor

import common
import vae

FIRST_LOOK = "--epochs 1 --batch-size 32 --hidden-dims 16 32 64 128"  # the README's
DATA = Path(common.__file__).with_name("data")


def build(args):
    return common.Encoder(args.hidden_dims, args.latent_dim, "VAE"), common.Decoder(
        args.latent_dim, args.hidden_dims
    )


def build_classic(args):
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(784, 400), nn.ReLU(), nn.Linear(400, 2 * 20))
    return encoder, nn.Sequential(nn.Linear(20, 400), nn.ReLU(), nn.Linear(400, 784), nn.Sigmoid())


def classic_loss(encoder, decoder, x):
    mu, logvar = encoder(x).chunk(2, dim=1)  # (B, 20) each
    z = mu + (0.5 * logvar).exp() * torch.randn_like(mu)
    recon = nn.functional.binary_cross_entropy(decoder(z), x.flatten(1), reduction="sum")
    kl = -0.5 * (1 + logvar - mu.square() - logvar.exp()).sum()
    return (recon + kl) / len(x), {}  # over the batch: Adam takes the same steps on a mean as on a sum


def textbook(args, device, build=build, loss_fn=vae.vae_loss):
    """Images per second of the textbook loop's last epoch, and its last test loss."""
    with tempfile.TemporaryDirectory() as root:
        shutil.copytree(DATA, root, dirs_exist_ok=True)  # unpacked there, not in the user's folder
        train, test = (MNIST(root, split, download=True, transform=ToTensor()) for split in (True, False))
    train = DataLoader(Subset(train, range(args.limit)), args.batch_size, shuffle=True)
    test = DataLoader(Subset(test, range(min(args.limit, 10_000))), args.batch_size)
    torch.manual_seed(args.seed)
    encoder, decoder = (network.to(device) for network in build(args))
    optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=args.lr)
    for _ in range(args.epochs):
        start, total = time.perf_counter(), 0
        for x, _ in train:
            loss, _ = loss_fn(encoder, decoder, x.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item()
        seconds = time.perf_counter() - start
        with torch.no_grad():
            total = sum(loss_fn(encoder, decoder, x.to(device))[0].item() * len(x) for x, _ in test)
    return args.limit / seconds, total / len(test.dataset)


def ours(args, device):
    """Images per second of the last epoch of vae.py's train_model."""
    data = common.load_data(DATA, "MNIST", device, args.limit)
    data = data._replace(test_images=data.test_images[:500])
    encoder, decoder = (network.to(device) for network in build(args))
    with tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(io.StringIO()):
        history = vae.train_model(encoder, decoder, data, args, out)
    return args.limit // args.batch_size * args.batch_size / history[-1]["seconds"]


def whole_run(flags):
    """Test -ELBO of a whole run of vae.py."""
    with tempfile.TemporaryDirectory() as out:
        subprocess.run(
            [sys.executable, vae.__file__, *flags, "--out", out], stdout=subprocess.DEVNULL, check=True
        )
        return -json.loads(Path(out, "metrics.json").read_text(encoding="utf-8"))["test"]["elbo"]


def in_fresh_process(function, *args):  # so that no measurement profits from another's memory
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def main(argv=None):
    parser = argparse.ArgumentParser("tools.benchmark", usage=argparse.SUPPRESS)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    try:
        device = common.pick_device(parser.parse_args(argv).device)
    except ValueError as error:
        parser.error(str(error))
    args = vae.parse_args(
        ["--epochs=2", *(["--limit=1920"] if device.type == "cpu" else [])]
    )  # a few seconds
    args.precision, reason = common.pick_precision(device)
    print(
        f"{device}, torch {torch.__version__}, {torch.get_num_threads()} threads; {args.precision} ({reason})"
    )
    ratios = []
    for _ in range(3):
        (theirs, _), mine = in_fresh_process(textbook, args, device), in_fresh_process(ours, args, device)
        ratios.append(mine / theirs)
        print(
            f"  textbook loop {theirs:,.0f} images/s, train_model {mine:,.0f} images/s: ratio {ratios[-1]:.2f}"
        )
    print(
        f"ratio {statistics.median(ratios):.2f} (median of 3 pairs, {min(ratios):.2f} to {max(ratios):.2f})"
    )
    args, start = vae.parse_args(["--epochs=10", "--lr=1e-3"]), time.perf_counter()
    _, loss = in_fresh_process(textbook, args, device, build_classic, classic_loss)
    classic = time.perf_counter() - start
    print(f"pytorch/examples' VAE, 10 epochs: {classic:.1f} s, test -ELBO {loss:.2f}")
    start = time.perf_counter()
    loss = whole_run([*FIRST_LOOK.split(), "--device", str(device)])
    seconds = time.perf_counter() - start
    print(f"vae.py {FIRST_LOOK}: {seconds:.1f} s, test -ELBO {loss:.2f}; ratio {classic / seconds:.2f}")


if __name__ == "__main__":
    main()
