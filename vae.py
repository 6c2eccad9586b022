"""Variational autoencoder on MNIST.

    maximize  ELBO = E_q(z|x)[log p(x|z)] - KL(q(z|x) || p(z)),    p(z) = N(0, I)

Kingma & Welling, "Auto-Encoding Variational Bayes", ICLR 2014.

    python vae.py --epochs 20 --device cuda

Test ELBO -91.77 +- 0.07 nats (recon 68.64, KL 23.13): gray pixels, 20 epochs, seeds 0 to 2,
bfloat16 on a CPU core (AMD EPYC Zen 5 or Intel Xeon with AMX), torch 2.14.1.
"""

import argparse
from pathlib import Path

import torch
from torch import nn

import common
from common import Decoder, Encoder, kl_per_latent, reconstruction_term


def vae_loss(encoder, decoder, x, kind="bce"):
    """The negative ELBO and its terms, in nats per image, for images x (B, 1, 28, 28) in [0, 1]."""
    mu, logvar, z = encoder(x)
    recon = reconstruction_term(decoder.logits(z), x, kind).mean()  # -E_q[log p(x|z)], one sample per image
    kl = kl_per_latent(mu, logvar).sum()  # KL(q(z|x) || p(z))
    elbo = -(recon + kl)
    return -elbo, {"recon": recon, "kl": kl, "elbo": elbo}


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        prog=Path(__file__).name, allow_abbrev=False, formatter_class=common.HelpFormatter
    )
    parser.description = "Train a variational autoencoder and write figures and numbers to a folder."
    run = parser.add_argument_group("run")
    folder = run.add_mutually_exclusive_group()
    out_help = "output folder (default: runs/vae, or runs/vae-2, ...)"
    folder.add_argument("--out", metavar="DIR", type=common.folder_name, help=out_help)
    resume_help = "resume the run in this folder, or start one there"
    folder.add_argument("--resume", metavar="DIR", type=common.folder_name, help=resume_help)
    run.add_argument(
        "--seed", type=common.seed_number, default=0, help="random seed for weights, batches and noise"
    )
    run.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    run.add_argument(
        "--precision", choices=["auto", "fp32", "bf16"], default="auto", help="training precision"
    )
    data = parser.add_argument_group("data")
    data.add_argument(
        "--dataset", choices=["MNIST", "FashionMNIST", "KMNIST"], default="MNIST", help="data set"
    )
    data_help = "folder that holds MNIST/raw (default: data/ next to common.py)"
    data.add_argument("--data", metavar="DIR", type=common.folder_name, help=data_help)
    data.add_argument("--limit", type=common.train_size, default=60_000, help="number of training images")
    model = parser.add_argument_group("model")
    model.add_argument("--latent-dim", type=common.positive_int, default=20, help="number of latents")
    dims = "channels of the encoder's four convolutions; the decoder mirrors them"
    model.add_argument(
        "--hidden-dims", type=common.positive_int, nargs=4, metavar="N", default=[32, 64, 128, 256], help=dims
    )
    model.add_argument(
        "--recon", choices=["bce", "mse"], default="bce", help="Bernoulli (bce) or Gaussian (mse) pixels"
    )
    training = parser.add_argument_group("training")
    training.add_argument(
        "--epochs", type=common.positive_int, default=20, help="passes over the training images"
    )
    training.add_argument("--batch-size", type=common.positive_int, default=128, help="images per step")
    training.add_argument("--lr", type=common.positive_float, default=3e-3, help="peak learning rate")
    likelihood = parser.add_argument_group("likelihood")
    likelihood.add_argument("--binarize", action="store_true", help="draw each pixel from Bernoulli(pixel)")
    likelihood.add_argument(
        "--iw-samples", metavar="K", type=common.positive_int, help="importance samples per test image"
    )
    args = common.parse_args(parser, argv)
    if args.iw_samples and args.recon == "bce" and not args.binarize:
        parser.error("argument --iw-samples: gray pixels have no likelihood; add --binarize or --recon mse")
    return args


def train_model(encoder, decoder, data, args, out):
    """Train both networks on data.train_images; after each epoch, test them and write a checkpoint to `out`.

    Resumes from the checkpoint in `out`, if there is one. Returns the history, one dict per epoch, which is
    shorter than args.epochs after Ctrl-C. Raises FloatingPointError if a term is not finite.
    """
    device = data.train_images.device
    networks = nn.ModuleList([encoder, decoder])
    common.set_up_device(device, networks)
    parameters = networks.parameters()  # a weight that both networks share counts once
    optimizer = torch.optim.AdamW(parameters, args.lr, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    parts = {"encoder": encoder, "decoder": decoder, "optimizer": optimizer}  # what a checkpoint holds
    history = common.load_checkpoint(out, **parts)
    steps = len(data.train_images) // args.batch_size  # per epoch, full batches only

    for epoch in common.epochs_left(history, args.epochs):
        common.seed_epoch(args.seed, epoch)
        networks.train()
        meter = common.Meter(epoch, steps, args)
        order = torch.randperm(len(data.train_images), device=device)[: steps * args.batch_size]
        for step, batch in enumerate(order.split(args.batch_size), start=(epoch - 1) * steps):
            lr = common.learning_rate(step, args.epochs * steps, args.lr)
            for group in optimizer.param_groups:
                group["lr"] = lr
            x = common.to_pixels(data.train_images[batch])  # (B, 1, 28, 28)
            if args.binarize:
                x = torch.bernoulli(x)
            with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
                loss, terms = vae_loss(encoder, decoder, x, kind=args.recon)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            meter.add(loss, terms)
        train, seconds = meter.finish()  # waits for the device
        test = common.evaluate(vae_loss, networks, data.test_images, kind=args.recon)
        history.append(common.history_row(epoch, lr, train, test, seconds))
        common.save_checkpoint(out, history, args, data, **parts)
        common.print_epoch(history, args)
    networks.eval()
    return history


def main(argv=None):
    args = parse_args(argv)
    data, out = common.start_run(args)
    device = data.train_images.device
    common.seed_epoch(args.seed, 0)  # for the initial weights; training starts with epoch 1
    encoder = Encoder(args.hidden_dims, args.latent_dim, "VAE").to(device)
    decoder = Decoder(args.latent_dim, args.hidden_dims).to(device)
    decoder.start_at_mean(data.train_images)
    history = train_model(encoder, decoder, data, args, out)

    # Training draws binary images again for every batch; from here on they stay the same.
    if args.binarize:
        data = data._replace(train_images=common.binarize_once(data.train_images))
    mu, logvar = common.encode(encoder, data.test_images)
    train_mu, _ = common.encode(encoder, data.train_images)
    test = common.representation_metrics(decoder, data, train_mu, mu)
    test["active_units"] = (mu.var(dim=0) > 0.01).sum().item()  # Burda et al. (2016)
    test["kl_per_latent"] = kl_per_latent(mu, logvar).tolist()
    common.save_metrics(out, test)

    labels = {"elbo": "ELBO (nats)", "recon": "recon (nats)", "kl": "KL (nats)"}
    common.plot_loss_curves(history, labels, data, out)
    common.plot_reconstructions(decoder, mu, data, out)
    torch.manual_seed(common.EVAL_SEED)
    z = torch.randn(10, 10, args.latent_dim).to(device)  # drawn on the CPU: the same on every device
    title = f"{data.name}: samples, $z \\sim N(0, I)$"
    common.plot_grid(common.decode_grid(decoder, z), out, "samples", title)
    common.plot_interpolations(decoder, mu, data, out)
    common.plot_latent_space(train_mu, mu, data, out)
    common.plot_kl_per_dimension(mu, logvar, data, out)
    common.plot_traversals(decoder, mu, logvar, data, out)
    if args.latent_dim == 2:
        common.plot_manifold(decoder, data, out)

    if args.iw_samples and len(history) == args.epochs:  # last: it can take longer than training

        def log_likelihood(x, z):
            return -reconstruction_term(decoder.logits(z), x, args.recon)

        bound = common.importance_weighted_bound(
            log_likelihood, mu, logvar, data.test_images, k=args.iw_samples
        )
        common.save_metrics(out, {**test, "iw_samples": args.iw_samples, "iw_bound": bound})
    common.end_run(history, args, out)
    return out


if __name__ == "__main__":
    main()
