"""Variational autoencoder on MNIST.

    maximise  ELBO = E_q(z|x)[log p(x|z)] - KL(q(z|x) || p(z)),    p(z) = N(0, I)

Kingma & Welling, "Auto-Encoding Variational Bayes", ICLR 2014.

    python vae.py --epochs 20 --device cuda

Test ELBO -91.78 nats (recon 68.69, KL 23.09): grey pixels, 20 epochs, seed 0, 10 minutes in
bfloat16 on two CPU cores (AMD EPYC, Zen 5), torch 2.15.0. Binarised: -log p(x) at most 83.56 nats
(--binarize --latent-dim 32 --epochs 50 --iw-samples 128, float32, on a Zen 3, torch 2.14.1).
"""

from functools import partial

import torch

import common
from common import Decoder, Encoder, decode_grid, kl_per_latent, reconstruction_term


def vae_loss(encoder, decoder, x, kind="bce"):
    """The negative ELBO and its terms, in nats per image, for images x (B, 1, 28, 28) in [0, 1]."""
    mu, logvar, z = encoder(x)
    recon = reconstruction_term(decoder.logits(z), x, kind).mean()  # -E_q(z|x)[log p(x|z)], one sample z an image
    kl = kl_per_latent(mu, logvar).sum()  # KL(q(z|x) || p(z))
    elbo = -(recon + kl)
    return -elbo, {"recon": recon, "kl": kl, "elbo": elbo}


def main(argv=None):
    parser = common.make_parser(__file__, __doc__)
    common.add_likelihood_flags(parser)
    args = common.parse_args(parser, argv)
    with common.start_run(parser, args) as (data, out):
        device = data.train_images.device
        common.seed_epoch(args.seed, 0)
        encoder = Encoder(args.hidden_dims, args.latent_dim, "VAE").to(device)
        decoder = Decoder(args.latent_dim, args.hidden_dims).to(device)
        decoder.start_at_mean(data.train_images)
        loss_fn = partial(vae_loss, kind=args.recon)
        history = common.train_model(encoder, decoder, data, loss_fn, args, out)

        mu, logvar = common.encode(encoder, data.test_images)
        if args.binarize:
            data = data._replace(train_images=common.binarize_once(data.train_images))  # once, as the test images are
        train_mu, _ = common.encode(encoder, data.train_images)
        test = common.representation_metrics(decoder, data, train_mu, mu)
        test["active_units"] = (mu.var(dim=0) > 0.01).sum().item()  # Burda et al. (2016)
        test["kl_per_latent"] = kl_per_latent(mu, logvar).tolist()
        common.save_metrics(encoder, decoder, data, test, history, args, out)
        labels = {"loss": "$-$ELBO", "recon": "reconstruction", "kl": "KL"}
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
