"""python -m tools.benchmark --device cpu

Compares the second epoch of train_model with that of the textbook loop (a DataLoader with ToTensor, float32,
one .item() per step), and a short run of vae.py with pytorch/examples' VAE by its own protocol, both whole.
"""

import argparse
import contextlib
import io
import json
import multiprocessing
import shutil
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

DATA = Path(vae.__file__).with_name("data")
QUICK_LOOK = "--epochs 1 --batch-size 32 --hidden-dims 16 32 64 128"  # as in the README


def build(args, device):
    encoder = common.Encoder(args.hidden_dims, args.latent_dim, "VAE").to(device)
    return encoder, common.Decoder(args.latent_dim, args.hidden_dims).to(device)


def build_classic(args, device):
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(784, 400), nn.ReLU(), nn.Linear(400, 2 * 20)).to(device)
    return encoder, nn.Sequential(nn.Linear(20, 400), nn.ReLU(), nn.Linear(400, 784), nn.Sigmoid()).to(device)


def classic_loss(encoder, decoder, x):
    mu, logvar = encoder(x).chunk(2, dim=1)  # (B, 20) each
    z = mu + (0.5 * logvar).exp() * torch.randn_like(mu)
    recon = nn.functional.binary_cross_entropy(decoder(z), x.flatten(1), reduction="sum")
    kl = -0.5 * (1 + logvar - mu.square() - logvar.exp()).sum()
    return (recon + kl) / len(x), {}  # over the batch: Adam takes the same steps on a mean as on a sum


def textbook(args, device, build=build, loss_fn=vae.vae_loss):
    """The textbook loop's seconds of each epoch, and the test loss after the last one."""
    with tempfile.TemporaryDirectory() as root:
        shutil.copytree(DATA, root, dirs_exist_ok=True)  # torchvision unpacks the archives next to them
        train, test = (MNIST(root, split, download=True, transform=ToTensor()) for split in (True, False))
    train = DataLoader(Subset(train, range(args.limit)), args.batch_size, shuffle=True)
    test = DataLoader(Subset(test, range(min(args.limit, 10_000))), args.batch_size)
    torch.manual_seed(args.seed)
    encoder, decoder = build(args, device)
    optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], args.lr)
    seconds = []
    for _ in range(args.epochs):
        start = time.perf_counter()
        for x, _ in train:
            loss, _ = loss_fn(encoder, decoder, x.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss.item()  # for a running mean, as a rule
        seconds.append(time.perf_counter() - start)
        with torch.no_grad():
            total = sum(loss_fn(encoder, decoder, x.to(device))[0].item() * len(x) for x, _ in test)
    return seconds, total / len(test.dataset)


def ours(args, device):
    """The seconds of each epoch of train_model."""
    data = common.load_data(DATA, "MNIST", device, args.limit)
    encoder, decoder = build(args, device)
    decoder.start_at_mean(data.train_images)
    with tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(io.StringIO()):
        history = vae.train_model(encoder, decoder, data, args, out)
    return [row["seconds"] for row in history], None


def quick_look(device):
    """The test -ELBO of a whole run of vae.py, in a process of its own."""
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, vae.__file__, *QUICK_LOOK.split(), "--device", str(device), "--out", out]
        subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
        return -json.loads(Path(out, "metrics.json").read_text(encoding="utf-8"))["test"]["elbo"]


def in_fresh_process(function, *args):  # so that no measurement profits from another's memory
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def main(argv=None):
    parser = argparse.ArgumentParser(prog="tools.benchmark", usage=argparse.SUPPRESS)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    try:
        device = common.pick_device(parser.parse_args(argv).device)
    except ValueError as error:
        parser.error(str(error))
    args = vae.parse_args(["--epochs=2", "--limit=1920" if device.type == "cpu" else "--limit=59904"])
    args.precision, reason = common.pick_precision(device)
    print(
        f"{device}, {args.precision} ({reason}), torch {torch.__version__}, {torch.get_num_threads()} threads"
    )
    rates = {"textbook": [], "train_model": []}
    for _ in range(3):
        for name, function in (("textbook", textbook), ("train_model", ours)):
            seconds, _ = in_fresh_process(function, args, device)
            rates[name].append(args.limit / seconds[1])  # the first epoch also warms up
            print(f"  {name:<12} {rates[name][-1]:10,.0f} images/s")
    low, ratio, high = sorted(mine / theirs for theirs, mine in zip(*rates.values()))
    print(f"ratio {ratio:.2f} (median of 3 pairs, {low:.2f} to {high:.2f})")
    args = vae.parse_args(["--epochs=10", "--lr=1e-3"])
    start = time.perf_counter()
    _, loss = in_fresh_process(textbook, args, device, build_classic, classic_loss)
    classic = time.perf_counter() - start
    print(f"classic program, {args.epochs} epochs: {classic:.1f} s, test -ELBO {loss:.2f}")
    start = time.perf_counter()
    loss = quick_look(device)
    seconds = time.perf_counter() - start
    print(f"vae.py {QUICK_LOOK}: {seconds:.1f} s, test -ELBO {loss:.2f}; ratio {classic / seconds:.2f}")


if __name__ == "__main__":
    main()
