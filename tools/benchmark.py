"""python -m tools.benchmark --device cpu

Compares the second epoch of train_model with that of a textbook loop (a DataLoader with ToTensor, float32,
one .item() per step), and a short run of vae.py with pytorch/examples' VAE by its own protocol, both whole.
"""

import argparse
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

sys.path.append(f"{Path(__file__).resolve().parents[1]}")  # for `python tools/benchmark.py`
import common
import vae

QUICK_LOOK = "--epochs 1 --batch-size 32 --hidden-dims 16 32 64 128"  # as in the README


def build_vae(args):
    encoder = common.Encoder(args.hidden_dims, args.latent_dim, "VAE")
    return encoder, common.Decoder(args.latent_dim, args.hidden_dims)


def build_classic(args):
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(784, 400), nn.ReLU(), nn.Linear(400, 2 * 20))
    return encoder, nn.Sequential(nn.Linear(20, 400), nn.ReLU(), nn.Linear(400, 784), nn.Sigmoid())


def classic_loss(encoder, decoder, x):
    mu, logvar = encoder(x).chunk(2, dim=1)  # (B, 20) each
    z = mu + (0.5 * logvar).exp() * torch.randn_like(mu)
    recon = nn.functional.binary_cross_entropy(decoder(z), x.flatten(1), reduction="sum")
    kl = -0.5 * (1 + logvar - mu.square() - logvar.exp()).sum()
    return (recon + kl) / len(x), {}  # over the batch: Adam takes the same steps on a mean as on a sum


def train_textbook(args, device, build=build_vae, loss_fn=vae.vae_loss):
    """Train with the textbook loop; return the seconds of each epoch, and the last epoch's test loss."""
    with tempfile.TemporaryDirectory() as root:
        shutil.copytree(common.DATA, root, dirs_exist_ok=True)  # where torchvision unpacks the archives
        train, test = (MNIST(root, split, download=True, transform=ToTensor()) for split in (True, False))
    train = DataLoader(Subset(train, range(args.limit)), args.batch_size, shuffle=True)
    test = DataLoader(Subset(test, range(min(args.limit, 10_000))), args.batch_size)
    torch.manual_seed(args.seed)
    encoder, decoder = build(args)
    networks = nn.ModuleList([encoder, decoder]).to(device)
    optimizer = torch.optim.Adam(networks.parameters(), args.lr)
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


def run_script(device, *flags):
    """Run vae.py in a process of its own; return the seconds of each epoch, and the test ELBO."""
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, vae.__file__, *flags, "--device", str(device), "--out", out]
        subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
        history = common.load_checkpoint(out)
    return [row["seconds"] for row in history], history[-1]["test_elbo"]


def in_fresh_process(function, *args):  # so that no measurement profits from another's memory
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def compare_loops(device, precision):
    """Time both loops in turn: train_model in float32, and in `precision` if that is another one."""
    flags = ["--epochs=2", "--limit=1920" if device.type == "cpu" else "--limit=59904"]
    args = vae.parse_args(flags)
    rates = {"textbook": [], "fp32": [], precision: []}
    for _ in range(3):
        for name in rates:
            if name == "textbook":
                seconds, _ = in_fresh_process(train_textbook, args, device)
            else:
                seconds, _ = run_script(device, *flags, f"--precision={name}")
            rates[name].append(args.limit / seconds[1])  # the first epoch also warms up
            print(f"  {name:<8} {rates[name][-1]:10,.0f} images/s")
    textbook_rates = rates.pop("textbook")
    for name in rates:
        low, median, high = sorted(rate / textbook for rate, textbook in zip(rates[name], textbook_rates))
        print(f"train_model in {name}: ratio {median:.2f} (median of 3 pairs, {low:.2f} to {high:.2f})")


def compare_programs(device):
    """Time two whole programs: pytorch/examples' VAE and the README's first look."""
    args = vae.parse_args(["--epochs=10", "--lr=1e-3"])
    start = time.perf_counter()
    _, loss = in_fresh_process(train_textbook, args, device, build_classic, classic_loss)
    classic = time.perf_counter() - start
    print(f"classic program, {args.epochs} epochs: {classic:.1f} s, test ELBO {-loss:.2f}")
    start = time.perf_counter()
    _, elbo = run_script(device, *QUICK_LOOK.split())
    quick = time.perf_counter() - start
    print(f"vae.py {QUICK_LOOK}: {quick:.1f} s, test ELBO {elbo:.2f}; ratio {classic / quick:.2f}")


def main(argv=None):
    parser = argparse.ArgumentParser(
        description="Time train_model and a textbook loop, then vae.py and pytorch/examples' VAE."
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (default: auto)")
    parser.print_usage = lambda file: None  # an error is one line; --help has the usage
    args = parser.parse_args(argv)
    try:
        device = common.pick_device(args.device)
    except ValueError as error:
        parser.error(str(error))
    precision, reason = common.pick_precision(device)
    print(f"{device}, {precision} ({reason}), torch {torch.__version__}, {torch.get_num_threads()} threads")
    compare_loops(device, precision)
    compare_programs(device)


if __name__ == "__main__":
    main()
