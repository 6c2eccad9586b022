"""python -m tools.baselines --dataset MNIST --components 20

Prints the rows of the README's table for PCA and for raw pixels: accuracy of the probe, and squared error.
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.append(f"{Path(__file__).resolve().parents[1]}")  # for `python tools/baselines.py`
import common


def pca(train_x, x, components):
    """Return the codes (N, components) of train_x and x, (N, 784), and the squared error per pixel of x."""
    mean = train_x.mean(dim=0)  # (784,), over images
    _, vectors = torch.linalg.eigh(torch.cov(train_x.T))  # (784, 784), columns in ascending order
    directions = vectors[:, -components:]  # (784, components)
    codes = (x - mean) @ directions
    mse = (codes @ directions.T + mean - x).square().mean()  # over images and pixels
    return (train_x - mean) @ directions, codes, mse


def main(argv=None):
    parser = argparse.ArgumentParser(
        description="Print the rows of the results table for PCA and for raw pixels."
    )
    parser.add_argument(
        "--dataset",
        choices=["MNIST", "FashionMNIST", "KMNIST"],
        default="MNIST",
        help="images to measure (default: %(default)s)",
    )
    parser.add_argument(
        "--components",
        type=common.positive_int,
        default=20,
        help="number of PCA components (default: %(default)s)",
    )
    parser.print_usage = lambda file: None  # an error is one line; --help has the usage
    args = parser.parse_args(argv)
    if args.components > 784:
        parser.error(f"argument --components: {args.components} is more than 784 pixels")
    try:
        data = common.load_data(common.DATA, args.dataset)
    except (OSError, RuntimeError) as error:
        parser.error(f"argument --dataset: {error}")
    train_x = data.train_images.flatten(1).double() / 255  # (N, 784)
    x = data.test_images.flatten(1).double() / 255
    train_codes, codes, mse = pca(train_x, x, args.components)
    accuracy = common.probe_accuracy(train_codes, data.train_labels, codes, data.test_labels)
    print(f"| PCA, {args.components} components | | | | | {100 * accuracy:.1f} | {1000 * mse:.2f} |")
    accuracy = common.probe_accuracy(train_x, data.train_labels, x, data.test_labels)
    print(f"| raw pixels | | | | | {100 * accuracy:.1f} | |")


if __name__ == "__main__":
    main()
