"""Compare the textbook loop with train_model, and the classic program with a run of vae.py.

    python -m tools.benchmark --device cpu

The textbook loop is what most scripts do: a DataLoader with ToTensor, float32, one .item() a step. Its images/s, and
train_model's, are of the second of two passes of one model over the same images, without loading and evaluation.
The classic program is what most people start from, pytorch/examples' VAE by its protocol; both are timed whole.
"""

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
from torch.utils.flop_counter import FlopCounterMode
from torchvision.datasets import MNIST
from torchvision.transforms import ToTensor

import common
import vae

QUICK_LOOK = "--epochs 1 --batch-size 32 --hidden-dims 16 32 64 128"  # the README's


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
    """Images/s of the textbook loop, its peak memory in MiB, and its last test loss."""
    with tempfile.TemporaryDirectory() as root:
        shutil.copytree(args.data, root, dirs_exist_ok=True)  # unpacked there, not in the user's folder
        train, test = (MNIST(root, split, download=True, transform=ToTensor()) for split in (True, False))
    train = DataLoader(Subset(train, range(args.limit)), args.batch_size, shuffle=True)
    test = DataLoader(Subset(test, range(min(args.limit, 10_000))), args.batch_size)
    torch.manual_seed(args.seed)
    encoder, decoder = build(args, device)
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
    return args.limit / seconds, peak_memory_mb(device), total / len(test.dataset)


def ours(args, device):
    """Images/s of train_model, and its peak memory in MiB."""
    data = common.load_data(args.data, "MNIST", device, args.limit)
    data = data._replace(test_images=data.test_images[:500])
    with tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(io.StringIO()):
        history = common.train_model(*build(args, device), data, vae.vae_loss, args, out)
    return args.limit // args.batch_size * args.batch_size / history[-1]["seconds"], peak_memory_mb(device)


def whole_run(flags):
    """Test -ELBO of a whole run of vae.py."""
    with tempfile.TemporaryDirectory() as out:
        subprocess.run([sys.executable, vae.__file__, *flags, "--out", out], stdout=subprocess.DEVNULL, check=True)
        return -json.loads((Path(out) / "metrics.json").read_text())["test"]["elbo"]


def peak_memory_mb(device):
    """Peak memory in MiB: of the GPU's allocator on CUDA, else of the process; NaN on Windows."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource
    except ImportError:
        return float("nan")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10  # bytes there, KiB elsewhere


def count_flops(args):
    """Floating-point operations of one image's share of a training step, as torch counts them."""
    with FlopCounterMode(display=False) as counter:
        vae.vae_loss(*build(args, "cpu"), torch.rand(1, 1, 28, 28))[0].backward()
    return counter.get_total_flops()


def in_fresh_process(function, *args):  # so that no measurement profits from another's memory
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def main(argv=None):
    parser = common.Parser(prog="tools.benchmark", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    with parser.refusing("--device"):
        device, _ = common.pick_device(parser.parse_args(argv).device)
    parse = common.make_parser(vae.__file__, vae.__doc__).parse_args
    args = parse(["--epochs=2", *(["--limit=1920"] if device.type == "cpu" else [])])  # seconds for either
    print(f"{common.device_name(device)}, torch {torch.__version__}, {torch.get_num_threads()} threads")

    rates = {"textbook": [], "train_model": []}
    for _ in range(3):
        for name, function in (("textbook", textbook), ("train_model", ours)):
            rate, memory, *_ = in_fresh_process(function, args, device)
            rates[name].append(rate)
            print(f"  {name:<12} {rate:10,.0f} images/s  {memory:6,.0f} MiB")
    ratios = [mine / theirs for theirs, mine in zip(*rates.values())]
    print(f"ratio {statistics.median(ratios):.2f} (median of 3 pairs, {min(ratios):.2f} to {max(ratios):.2f})")

    flops = count_flops(args) * statistics.median(rates["train_model"])
    print("train_model: {} ({}), {:,.0f} GFLOP/s".format(*common.pick_precision(device), flops / 1e9))
    size = 1024 if device.type == "cpu" else 8192
    for name in ("float32", "bfloat16"):
        rate = 2 * size**3 / in_fresh_process(common.matmul_seconds, device, getattr(torch, name), size)
        print(f"  {flops / rate:.2f} times the {rate / 1e9:,.0f} GFLOP/s of a {name} matrix product")

    args = parse(["--epochs=10", "--lr=1e-3"])
    start = time.perf_counter()
    *_, loss = in_fresh_process(textbook, args, device, build_classic, classic_loss)
    classic = time.perf_counter() - start
    print(f"classic program, {args.epochs} epochs: {classic:.1f} s, test -ELBO {loss:.2f}")
    start = time.perf_counter()
    loss = whole_run([*QUICK_LOOK.split(), "--device", str(device)])
    seconds = time.perf_counter() - start
    print(f"vae.py {QUICK_LOOK}: {seconds:.1f} s, test -ELBO {loss:.2f}; ratio of the seconds {classic / seconds:.2f}")


if __name__ == "__main__":
    main()
