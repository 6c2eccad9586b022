"""Train the VAE with the textbook loop and with train_model, in turn, and compare their speed.

    python -m tools.benchmark --device cpu

The textbook loop is what most scripts do: a DataLoader with ToTensor, float32, one .item() a step.
Both train the same model on the same images with batches of 128. Every measurement is a process of
its own, so that neither loop profits from the other's memory; images/s are those of the second of
two passes, loading and evaluation left out.
"""

import contextlib
import io
import multiprocessing
import shutil
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor

import torch
from torch.utils.data import DataLoader, Subset
from torch.utils.flop_counter import FlopCounterMode
from torchvision.datasets import MNIST
from torchvision.transforms import ToTensor

import common
import vae

ROUNDS = 3
TARGET = 105.6  # nats: test -ELBO of pytorch/examples' VAE after 10 epochs
EPOCHS = 2  # the shortest schedule of whole epochs that gets there


def default_args(flags):
    parser = common.make_parser("vae", vae.__doc__)
    common.add_likelihood_flags(parser)
    return parser.parse_args(flags.split())


def build(args, device):
    common.seed_epoch(args.seed, 0)
    encoder = common.Encoder(args.hidden_dims, args.latent_dim, "VAE").to(device)
    return encoder, common.Decoder(args.latent_dim, args.hidden_dims).to(device)


def textbook(args, device):
    """Images/s of the textbook loop, and its peak memory in MiB."""
    with tempfile.TemporaryDirectory() as root:
        shutil.copytree(args.data, root, dirs_exist_ok=True)  # unpacked there, not in the user's folder
        images = Subset(MNIST(root, download=True, transform=ToTensor()), range(args.limit))
    loader = DataLoader(images, args.batch_size, shuffle=True, drop_last=True)
    encoder, decoder = build(args, device)
    optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=args.lr)
    for _ in range(args.epochs):
        start, total = time.perf_counter(), 0
        for x, _ in loader:
            loss, _ = vae.vae_loss(encoder, decoder, x.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item()
        seconds = time.perf_counter() - start
    return len(loader) * args.batch_size / seconds, peak_memory_mb(device)


def ours(args, device, test_images=500):
    """Images/s of train_model, its peak memory in MiB, its seconds, and the test -ELBO it reaches."""
    data = common.load_mnist(args.data, device, args.limit)
    data = data._replace(test_images=data.test_images[:test_images])
    encoder, decoder = build(args, device)
    with tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(io.StringIO()):
        history = common.train_model(encoder, decoder, data, vae.vae_loss, args, out)
    rate = args.limit // args.batch_size * args.batch_size / history[-1]["seconds"]
    seconds = sum(row["seconds"] for row in history)
    return rate, peak_memory_mb(device), seconds, -history[-1]["test_elbo"]


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
    encoder, decoder = build(args, "cpu")
    with FlopCounterMode(display=False) as counter:
        loss, _ = vae.vae_loss(encoder, decoder, torch.rand(args.batch_size, 1, 28, 28))
        loss.backward()
    return counter.get_total_flops() / args.batch_size


def matmul_rate(device, dtype):
    """Floating-point operations a second of a square matrix product."""
    size = 1024 if device.type == "cpu" else 8192
    a = torch.randn(size, size, device=device).to(dtype)
    (a @ a)[0, 0].item()
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < 0.5:
        (a @ a)[0, 0].item()  # waits for the device
        count += 1
    return count * 2 * size**3 / (time.perf_counter() - start)


def in_fresh_process(function, *args):
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def main(argv=None):
    parser = common.Parser(prog="tools.benchmark", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    flags = parser.parse_args(argv)
    with parser.refusing("--device"):
        device, _ = common.pick_device(flags.device)
    limit = 1920 if device.type == "cpu" else 60_000  # seconds for either
    args = default_args(f"--epochs 2 --limit {limit}")
    precision, reason = common.pick_precision(device)
    print(f"{common.device_name(device)}, torch {torch.__version__}, {torch.get_num_threads()} threads")

    rates = {"textbook": [], "train_model": []}
    for _ in range(ROUNDS):
        for name, function in (("textbook", textbook), ("train_model", ours)):
            rate, memory, *_ = in_fresh_process(function, args, device)
            rates[name].append(rate)
            print(f"  {name:<12} {rate:10,.0f} images/s  {memory:6,.0f} MiB")
    ratios = [mine / theirs for theirs, mine in zip(*rates.values())]
    print(f"ratio {statistics.median(ratios):.2f} (median of {ROUNDS} pairs, {min(ratios):.2f} to {max(ratios):.2f})")

    flops = count_flops(args) * statistics.median(rates["train_model"])
    print(f"train_model: {precision} ({reason}), {flops / 1e9:,.0f} GFLOP/s")
    for name in ("float32", "bfloat16"):
        rate = in_fresh_process(matmul_rate, device, getattr(torch, name))
        print(f"  {flops / rate:.2f} times the {rate / 1e9:,.0f} GFLOP/s of a {name} matrix product")

    args = default_args(f"--epochs {EPOCHS}")
    _, _, seconds, loss = in_fresh_process(ours, args, device, None)
    print(f"{EPOCHS} epochs: test -ELBO {loss:.1f} (target: {TARGET}) after {seconds:.1f} s of training")


if __name__ == "__main__":
    main()
