"""Beta-VAE on MNIST.

    maximise  E_q(z|x)[log p(x|z)] - beta KL(q(z|x) || p(z)),    p(z) = N(0, I)

Higgins et al., "beta-VAE: Learning Basic Visual Concepts with a Constrained Variational
Framework", ICLR 2017. With beta 1 it is the VAE; --warmup lets beta grow from 0.

    maximise  E_q(z|x)[log p(x|z)] - beta |KL(q(z|x) || p(z)) - C|

With --capacity, C growing from 0 over the first half of training: Burgess et al., "Understanding
disentangling in beta-VAE", 2018.

    python beta_vae.py --beta 4 --epochs 20 --device cuda

Test ELBO -107.30 +- 0.10 nats (recon 97.16, KL 10.13): beta 4, grey pixels, 10 epochs, seeds 0 to 2,
bfloat16 on a CPU core (AMD EPYC, Zen 5), torch 2.15.0.
"""

from functools import partial

import torch

import common
from common import Decoder, Encoder, decode_grid, kl_per_latent, reconstruction_term


def beta_vae_loss(encoder, decoder, x, beta, progress=1.0, warmup=0.0, capacity=None, kind="bce"):
    """The objective and its terms, in nats per image, for images x (B, 1, 28, 28) in [0, 1].

    progress: the share of the training done. warmup: the share over which beta grows from 0.
    capacity: the nats that the KL shall reach, or None for the plain beta KL.
    `elbo` is the plain one, whatever beta is, so that runs compare.
    """
    mu, logvar, z = encoder(x)
    recon = reconstruction_term(decoder.logits(z), x, kind).mean()  # -E_q(z|x)[log p(x|z)], one sample z an image
    kl = kl_per_latent(mu, logvar).sum()  # KL(q(z|x) || p(z))
    elbo = -(recon + kl)
    progress = torch.as_tensor(progress)
    if warmup:
        beta = beta * (progress / warmup).clamp(max=1)  # linear, from 0
    if capacity is None:
        penalty = beta * kl
    else:
        penalty = beta * (kl - capacity * (2 * progress).clamp(max=1)).abs()  # C grows over the first half
    return recon + penalty, {"recon": recon, "kl": kl, "elbo": elbo}


def main(argv=None):
    parser = common.make_parser(__file__, __doc__)
    objective = parser.add_argument_group("objective")
    objective.add_argument("--beta", type=common.positive_float, default=4.0, help="weight of the KL term")
    epochs = {"metavar": "EPOCHS", "type": common.positive_or_zero, "default": 0.0}
    objective.add_argument("--warmup", **epochs, help="epochs over which beta grows from 0")
    objective.add_argument("--capacity", metavar="NATS", type=common.positive_or_zero, help="C, for beta |KL - C|")
    common.add_likelihood_flags(parser)
    args = common.parse_args(parser, argv)
    if args.warmup > args.epochs:
        parser.error(f"argument --warmup: {args.warmup:g} epochs of a run of {args.epochs}")
    with common.start_run(parser, args) as (data, out):
        device = data.train_images.device
        common.seed_epoch(args.seed, 0)
        encoder = Encoder(args.hidden_dims, args.latent_dim, "VAE").to(device)
        decoder = Decoder(args.latent_dim, args.hidden_dims).to(device)
        decoder.start_at_mean(data.train_images)
        progress = torch.zeros((), device=device)  # train_model keeps it at the share of the training done
        schedule = {"progress": progress, "warmup": args.warmup / args.epochs, "capacity": args.capacity}
        loss_fn = partial(beta_vae_loss, beta=args.beta, **schedule, kind=args.recon)
        history = common.train_model(encoder, decoder, data, loss_fn, args, out, progress)

        mu, logvar = common.encode(encoder, data.test_images)
        if args.binarize:
            data = data._replace(train_images=common.binarize_once(data.train_images))  # once, as the test images are
        train_mu, _ = common.encode(encoder, data.train_images)
        test = common.representation_metrics(decoder, data, train_mu, mu)
        test["active_units"] = (mu.var(dim=0) > 0.01).sum().item()  # Burda et al. (2016)
        test["kl_per_latent"] = kl_per_latent(mu, logvar).tolist()
        common.save_metrics(encoder, decoder, data, test, history, args, out)
        labels = {"loss": f"objective, $\\beta$ = {args.beta:g}", "elbo": "ELBO", "recon": "reconstruction", "kl": "KL"}
        common.plot_loss_curves(history, labels, data, out)
        common.plot_reconstructions(decoder, mu, data, out)
        torch.manual_seed(common.EVAL_SEED)
        samples = decode_grid(decoder, torch.randn(10, 10, args.latent_dim).to(device))
        common.plot_grid(samples, out, "samples", f"{data.name}: samples, $z \\sim N(0, I)$")
        common.plot_interpolations(decoder, mu, data, out)
        common.plot_latent_space(train_mu, mu, data, out)
        common.plot_kl_per_dimension(mu, logvar, data, out)
        common.plot_traversals(decoder, mu, logvar, data, out)
        if args.latent_dim == 2:
            common.plot_manifold(decoder, data, out)
        if args.iw_samples and len(history) == args.epochs:  # last: it may take as long as the training
            bound = common.importance_weighted_bound(decoder, mu, logvar, data.test_images, args.iw_samples, args.recon)
            common.save_metrics(encoder, decoder, data, {**test, "iw_bound": bound}, history, args, out)
    return out


if __name__ == "__main__":
    main()
