"""Tests of the tools: tables and figures of runs, baselines, and the benchmark."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.distributions import Bernoulli, Normal, kl_divergence

import common
import vae
from tools import baselines, benchmark, compare_runs

torch.set_num_threads(1)  # the tensors here are small: threads would wait for each other
ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def mnist():
    """512 training images, and all test images."""
    return common.load_data(common.DATA, limit=512)


@pytest.fixture
def write_run(tmp_path):
    """A function that writes what compare_runs reads of a run, and returns the run's folder."""

    def write(test=None, name=None, trained=2, images=60000, term="kl", **flags):
        folder = tmp_path / (name or f"run-{len([*tmp_path.iterdir()])}")
        metrics = {
            "args": {"script": "vae.py", "seed": 0, "dataset": "MNIST", "recon": "bce", "epochs": 2, **flags},
            "test": test or {"kl": 1},
            "train": {"epochs": trained},
            "environment": {"train_images": images, "test_images": 10000},
        }
        folder.mkdir()
        (folder / "metrics.json").write_text(json.dumps(metrics))
        (folder / "history.csv").write_text(f"epoch,train_mse,test_{term},seconds\n1,2,3,4\n")
        return str(folder)

    return write


@pytest.fixture
def read_table(capsys):
    """A function that runs compare_runs and returns its table as {label: {column: cell}}."""

    def read(*argv):
        compare_runs.main([str(word) for word in argv])
        lines = re.findall(r"^\| (.*) \|$", capsys.readouterr().out, re.M)
        columns, _, *rows = [line.split(" | ") for line in lines]
        return {row[0]: dict(zip(columns, row)) for row in rows}

    return read


@pytest.fixture
def errors_of(capsys):
    """A function that runs a command, which ends with exit code 2, and returns its lines on stderr."""

    def run(main, *argv):
        with pytest.raises(SystemExit, match="2"):
            main([str(word) for word in argv])
        return capsys.readouterr().err.splitlines()

    return run


# ---- All tools -----------------------------------------------------------------------------------
def test_tools_started_by_their_paths_find_the_scripts_and_show_their_usage(tmp_path):
    processes = []
    for tool in ("compare_runs", "baselines", "benchmark"):
        command = [sys.executable, ROOT / "tools" / f"{tool}.py", "--help"]
        processes.append(subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True))
    for process in processes:
        assert process.communicate()[0].startswith("usage:")


# ---- compare_runs: rows --------------------------------------------------------------------------
def test_rows_are_sorted_by_model_and_then_by_beta(write_run, read_table):
    betas = [write_run(script="beta_vae.py", beta=beta) for beta in (10.0, "word", 4.0, [1, 2], 0.5)]
    table = read_table(write_run(script="my|vae.py"), *betas, write_run(), write_run(script="ae.py"))
    labels = ["AE", "VAE", "beta = 0.5", "beta = 4", "beta = 10", "beta = word", "beta = [1, 2]", r"my\|vae"]
    assert [label.removeprefix("beta-VAE, ") for label in table] == labels


@pytest.mark.parametrize(
    "first, second, labels",
    [
        ({"lr": 0.1}, {"lr": 0.2, "script": "ae.py"}, ["AE, lr 0.2", "VAE, lr 0.1"]),
        ({"latent_dim": 5}, {"latent_dim": None}, ["VAE, latent dim 5", "VAE"]),
        ({"binarize": False}, {"script": "ae.py"}, ["AE", "VAE"]),
        ({"out": "a", "device": "cpu", "data": "b"}, {"resume": "c", "iw_samples": 5, "seed": 1}, ["VAE"]),
    ],
)
def test_a_row_names_the_settings_that_set_it_apart(first, second, labels, write_run, read_table):
    assert list(read_table(write_run(**first), write_run(**second))) == labels


def test_seeds_become_a_row_with_mean_and_standard_deviation(write_run, read_table):
    row = read_table(write_run({"kl": 20}), write_run({"kl": 23.0}, seed=1))["VAE"]
    assert row == {"model": "VAE", "seeds": "2", "KL": "21.50 ± 2.12"}


# ---- compare_runs: columns -----------------------------------------------------------------------
def test_each_metric_has_its_place_factor_and_digits(write_run, read_table):
    test = {"tc": -177.5, "mmd": 0.0086149, "mse": 0.0123, "probe_accuracy": 0.876, "active_units": 17}
    test.update(iw_samples=64, iw_bound=-85, elbo=-90, kl=20, recon=70)
    row = read_table(write_run(test))["VAE"]
    columns = "model, seeds, recon, KL, ELBO, IW bound, K = 64, active units, probe %, 1000 MSE, mmd, tc"
    assert ", ".join(row) == columns
    assert " ".join(row.values()) == "VAE 1 70.00 20.00 -90.00 -85.00 17.0 87.6 12.30 0.008615 -177.5"


def test_bounds_of_different_k_are_not_averaged(write_run, read_table):
    few = write_run({"iw_bound": -85, "iw_samples": 64})
    row = read_table(few, write_run({"iw_bound": -80, "iw_samples": 128}, seed=1))["VAE"]
    assert row["IW bound, K = 64"] == "-85.00 (n = 1)"


def test_a_custom_term_named_as_a_measurement_keeps_its_name(write_run, read_table):
    custom = write_run({"mse": 12.3456}, term="mse", script="my_vae.py")
    table = read_table(custom, write_run({"mse": 0.01}))
    assert table["VAE"]["1000 MSE"] == "10.00"
    assert table["my_vae"]["mse"] == "12.35"


def test_lists_text_the_loss_and_pca_numbers_of_old_files_are_hidden(write_run, read_table):
    test = {"kl": 1, "kl_per_latent": [1.0], "word": "x", "flag": True, "loss": 5, "pca_components": 20}
    test.update(pca_mse=0.04, pca_probe_accuracy=0.8, pixel_probe_accuracy=0.9)
    assert list(read_table(write_run(test))["VAE"]) == ["model", "seeds", "KL"]


def test_columns_are_those_asked_for_in_that_order_and_a_model_without_them_has_no_row(write_run, read_table):
    run = write_run({"kl": 1, "recon": 2, "loss": 3, "iw_bound": 4, "iw_samples": 5})
    ae = write_run({"recon": 1}, script="ae.py")
    table = read_table(ae, run, "--columns", "loss", "iw_bound", "kl")
    assert list(table) == ["VAE"]
    assert list(table["VAE"]) == ["model", "seeds", "loss", "IW bound, K = 5", "KL"]


def test_an_unknown_column_is_refused_and_nothing_is_written(write_run, errors_of, tmp_path):
    out = tmp_path / "out"
    [line] = errors_of(compare_runs.main, write_run(), "--out", out, "--columns", "nonsense", "kl")
    assert line.endswith("argument --columns: no run has nonsense")
    assert not out.exists()


# ---- compare_runs: which runs --------------------------------------------------------------------
def test_what_is_no_finished_run_is_left_out_with_the_reason(write_run, tmp_path, capsys):
    reasons = {
        write_run(trained=1): "stopped after 1 of 2 epochs",
        write_run(name="damaged"): "metrics.json is damaged or incomplete",
        str(tmp_path): "no metrics.json",
        "nowhere/*": "no such folder",
    }
    (tmp_path / "damaged" / "metrics.json").write_text("{")
    compare_runs.main([*reasons, write_run()])
    lines = [f"left out: {folder}, {reason}" for folder, reason in reasons.items()]
    assert capsys.readouterr().err.splitlines() == lines


def test_without_a_finished_run_it_ends_with_an_error(errors_of, tmp_path):
    assert errors_of(compare_runs.main, tmp_path)[-1].endswith("error: no finished run to compare")


@pytest.mark.parametrize(
    "test, reason",
    [
        ({"kl": 1, "iw_bound": 3}, "the same run as {}\n"),
        ({"kl": 2}, "since it has the same flags and seed as {}, but other numbers"),
    ],
)
def test_a_run_of_the_same_flags_and_seed_is_left_out(test, reason, write_run, capsys):
    first = write_run()
    second = write_run(test)
    compare_runs.main([first, second])
    captured = capsys.readouterr()
    assert captured.err.startswith(f"left out: {second}, {reason.format(first)}")
    assert "| VAE | 1 | 1.00 |" in captured.out


def test_a_pattern_that_the_shell_did_not_expand_is_expanded(write_run, read_table, tmp_path):
    for seed, name in enumerate(["a1", "a2", "b"]):
        write_run(name=name, seed=seed)
    assert read_table(tmp_path / "a*")["VAE"]["seeds"] == "2"


def test_a_folder_whose_name_is_also_a_pattern_stays_itself(write_run, read_table):
    write_run({"kl": 2}, name="x1")
    assert read_table(write_run(name="x[1]"))["VAE"]["KL"] == "1.00"


def test_out_that_is_a_file_is_refused_in_one_line(write_run, errors_of):
    [line] = errors_of(compare_runs.main, write_run(), "--out", __file__)
    assert "argument --out" in line


def test_each_kind_of_data_pixels_likelihood_and_size_has_a_table(write_run, capsys):
    runs = [
        write_run(),
        write_run(binarize=True),
        write_run(dataset="KMNIST", recon="mse"),
        write_run(recon="learned variance"),
        write_run(images=50000),
    ]
    compare_runs.main(runs)
    assert re.findall("(.*), tested on 10000; nats per image", capsys.readouterr().out) == [
        "MNIST, gray pixels; Bernoulli cross-entropy; trained on 60000 images",
        "MNIST, binarized pixels; Bernoulli cross-entropy; trained on 60000 images",
        "KMNIST, gray pixels; Gaussian of unit variance (constant left out); trained on 60000 images",
        "MNIST, gray pixels; learned variance; trained on 60000 images",
        "MNIST, gray pixels; Bernoulli cross-entropy; trained on 50000 images",
    ]


# ---- compare_runs: LaTeX and the figure ----------------------------------------------------------
@pytest.fixture
def latex_of(tmp_path):
    """A function that runs compare_runs and returns the LaTeX tables."""

    def run(*runs):
        out = tmp_path / "new" / "folder"
        compare_runs.main([*runs, f"--out={out}"])
        return (out / "comparison.tex").read_text(encoding="utf-8")

    return run


def test_latex_shows_names_and_settings_literally(write_run, latex_of):
    name = r"\input{a}$&#%_^~"
    tex = latex_of(write_run({name: 1}, recon=name), write_run(recon=name, note=name))
    assert tex.count(r"\textbackslash{}input\{a\}\$\&\#\%\_\^{}\~{}") == 3  # caption, heading, setting


def test_latex_equals_a_table_written_by_hand(write_run, latex_of):
    runs = [
        write_run({"elbo": n - 4, "active_units": 5}, script="beta_vae.py", beta=2, seed=n) for n in (0, 1)
    ]
    table = r"""over seeds.}\label{tab:comparison-1}\smallskip
\footnotesize\tabcolsep=2pt\resizebox{\ifdim\width>\columnwidth\columnwidth\else\width\fi}{!}{%
\begin{tabular}{@{}lrrr@{}}\toprule
model & seeds & ELBO & active \\
 &  &  & \scriptsize units \\
\midrule
$\beta$-VAE, $\beta$ = 2 & 2 & $-$3.50 & 5.0 \\
 &  & \scriptsize $\pm$ 0.71 & \scriptsize $\pm$ 0.0 \\
\bottomrule\end{tabular}}\end{table}"""
    assert latex_of(*runs).endswith(table)


@pytest.fixture
def draw(write_run, tmp_path, monkeypatch):
    """A function that compares a VAE and a beta-VAE, two runs that have no panel, and others.

    Returns the panels of the figure.
    """
    figures = []

    def savefig(figure, path, **settings):
        figures.append(figure)

    def run(*others):
        runs = [
            write_run({"kl": 20, "recon": -800}),
            write_run({"kl": 10, "recon": -700}, script="beta_vae.py"),
            write_run({"recon": 1}, script="ae.py"),
            write_run({"kl": 1, "recon": 1}, binarize=True),
        ]
        compare_runs.main([*runs, *others, "--out", str(tmp_path)])
        return figures[-1].axes

    monkeypatch.setattr(common.Figure, "savefig", savefig)
    return run


def test_the_figure_has_recon_over_kl_and_a_legend(draw):
    [ax] = draw()
    assert [line.get_xydata().tolist() for line in ax.lines[:2]] == [[[20, -800]], [[10, -700]]]
    assert [text.get_text() for text in ax.get_legend().texts] == ["VAE", r"$\beta$-VAE"]
    assert "KL" in ax.get_xlabel()
    assert "recon" in ax.get_ylabel()
    assert ax.get_title() == "MNIST, gray pixels: rate-distortion"


def test_lines_of_equal_elbo_are_labeled_with_it(draw):
    [ax] = draw()
    assert len(ax.texts) > 2
    for line, text in zip(ax.lines[2:], ax.texts):
        assert line.get_slope() == -1
        assert 270 < text.get_rotation() % 360 < 360  # downwards, as the line
        assert text.get_position() == line.get_xy1()
        assert text.get_text() == f"ELBO ${-sum(line.get_xy1()):g}$"


def test_one_of_several_panels_is_named(write_run, draw):
    runs = [write_run({"kl": 1, "recon": 1}, recon="mse", dataset="KMNIST", seed=seed) for seed in (0, 1)]
    _, ax = draw(*runs)
    name = "KMNIST, gray pixels;\nGaussian of unit variance\n(constant left out)"
    assert ax.texts[-1].get_text() == name


# ---- baselines -----------------------------------------------------------------------------------
@pytest.fixture
def printed_rows(mnist, monkeypatch, capsys):
    """A function that runs baselines on the few images of `mnist` and returns the two rows."""

    def run(*argv):
        baselines.main(argv)
        return capsys.readouterr().out.splitlines()

    monkeypatch.setattr(common, "load_data", lambda root, name: mnist)
    return run


@pytest.fixture
def vectors(mnist):
    """The pixels of training and test images in [0, 1], (N, 784), in float64."""
    return [images.flatten(1).double() / 255 for images in (mnist.train_images, mnist.test_images)]


def test_pca_equals_a_singular_value_decomposition_in_float64(vectors, mnist, printed_rows):
    train_x, x = vectors
    mean = train_x.mean(dim=0)
    directions = torch.linalg.svd(train_x - mean, full_matrices=False).Vh[:5].T
    mse = ((x - mean) @ directions @ directions.T - (x - mean)).square().mean()
    codes = train_x @ directions
    accuracy = common.probe_accuracy(codes, mnist.train_labels, x @ directions, mnist.test_labels)
    row = f"| PCA, 5 components | | | | | {100 * accuracy:.1f} | {1000 * mse:.2f} |"
    assert printed_rows("--components", "5")[0] == row


def test_raw_pixels_are_probed_as_codes_are(vectors, mnist, printed_rows):
    accuracy = common.probe_accuracy(vectors[0], mnist.train_labels, vectors[1], mnist.test_labels)
    assert printed_rows()[1] == f"| raw pixels | | | | | {100 * accuracy:.1f} | |"


def test_more_components_than_pixels_are_refused(errors_of):
    [line] = errors_of(baselines.main, "--components", 785)
    assert line.endswith("argument --components: 785 is more than 784 pixels")


@pytest.mark.parametrize("kind", [OSError, RuntimeError])
def test_archives_that_cannot_be_had_are_named_in_one_line(kind, monkeypatch, errors_of):
    def load_data(root, name):
        raise kind(f"{root / name} cannot be downloaded")

    monkeypatch.setattr(common, "load_data", load_data)
    [line] = errors_of(baselines.main, "--dataset", "KMNIST")
    assert line.endswith(f"argument --dataset: {common.DATA / 'KMNIST'} cannot be downloaded")


# ---- benchmark -----------------------------------------------------------------------------------
def test_the_classic_loss_is_the_negative_elbo_of_torch_distributions():
    torch.manual_seed(0)
    encoder, decoder = benchmark.build_classic(None)
    encoder[3].bias.data[20:] = 2  # a q that is wider than the prior
    x = torch.rand(1, 784).expand(4000, 784)
    mu, logvar = encoder(x).chunk(2, dim=1)
    q = Normal(mu, (0.5 * logvar).exp())
    recon = -Bernoulli(decoder(q.sample()), validate_args=False).log_prob(x).sum(dim=1)
    kl = kl_divergence(q, Normal(0, 1)).sum(dim=1)
    loss, _ = benchmark.classic_loss(encoder, decoder, x)
    assert loss.item() == pytest.approx((recon + kl).mean().item(), rel=1e-3)


def test_the_textbook_loop_takes_a_step_per_batch_and_tests_on_all_images(mnist):
    encoder = torch.nn.Linear(1, 1)
    torch.nn.init.zeros_(encoder.bias)

    def build_one_bias(args):
        return encoder, torch.nn.Identity()

    def mean_pixel_and_bias(encoder, decoder, x):
        return x.mean() + 3 * encoder.bias.sum(), {}

    args = vae.parse_args(["--limit=190", "--batch-size=63", "--epochs=2", "--lr=0.01"])  # 63, 63, 63, 1
    seconds, loss = benchmark.train_textbook(args, "cpu", build_one_bias, mean_pixel_and_bias)
    bias = -0.01 * 4 * 2  # as its gradient is constant, each step of Adam is one learning rate
    assert encoder.bias.item() == pytest.approx(bias)
    assert loss == pytest.approx(common.to_pixels(mnist.test_images[:190]).mean().item() + 3 * bias)
    assert len(seconds) == 2


def test_the_textbook_loop_trains_the_vae_unless_told_otherwise():
    assert benchmark.train_textbook.__defaults__ == (benchmark.build_vae, vae.vae_loss)


def test_a_measurement_has_a_process_of_its_own():
    assert benchmark.in_fresh_process(os.getpid) != os.getpid()


def test_a_script_runs_with_its_flags_and_gives_its_elbo(monkeypatch):
    commands = []

    def run(command, **settings):
        commands.append(command)

    history = [{"seconds": 3, "test_elbo": -99}, {"seconds": 2, "test_elbo": -98}]
    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(common, "load_checkpoint", lambda out: history)
    assert benchmark.run_script(CPU, "--epochs=2") == ([3, 2], -98)
    assert commands[0][1:-1] == [vae.__file__, "--epochs=2", "--device", "cpu", "--out"]


@pytest.fixture
def trainings(monkeypatch):
    """What the benchmark trains: flags of vae.py, and arguments of the textbook loop. Times are made up."""
    trained = []

    def in_fresh_process(function, args, device, *program):
        trained.append((args.lr, args.epochs, *program))
        return [5, 8], 105.5

    def run_script(device, *flags):
        trained.append(" ".join(flags))
        return [5, len(trained)], -101.5

    monkeypatch.setattr(benchmark, "in_fresh_process", in_fresh_process)
    monkeypatch.setattr(benchmark, "run_script", run_script)
    return trained


def test_second_epochs_are_compared_in_float32_and_in_bfloat16(trainings, capsys):
    benchmark.compare_loops(CPU, "bf16")
    ratios = re.findall(r"(\w+): ratio ([\d.]+)", capsys.readouterr().out)
    assert ratios == [("fp32", "1.60"), ("bf16", "1.33")]  # 8 / 5 s, 8 / 6 s


def test_float32_is_not_measured_twice(trainings):
    benchmark.compare_loops(CPU, "fp32")
    assert len(trainings) == 3 * 2


def test_the_classic_program_is_trained_by_its_own_protocol(trainings):
    benchmark.compare_programs(CPU)
    assert trainings[0] == (1e-3, 10, benchmark.build_classic, benchmark.classic_loss)


def test_the_first_look_is_the_readmes(trainings):
    benchmark.compare_programs(CPU)
    assert f"python vae.py {trainings[1]}\n" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_losses_and_times_of_both_programs_are_printed(trainings, monkeypatch, capsys):
    monkeypatch.setattr(benchmark.time, "perf_counter", iter([0, 30, 30, 40]).__next__)
    benchmark.compare_programs(CPU)
    printed = capsys.readouterr().out
    assert "classic program, 10 epochs: 30.0 s, test ELBO -105.50\n" in printed
    assert ": 10.0 s, test ELBO -101.50; ratio 3.00\n" in printed


def test_the_precision_that_a_run_would_take_is_measured(trainings, monkeypatch):
    monkeypatch.setattr(common, "pick_precision", lambda device: ("bf16", "a reason"))
    benchmark.main(["--device", "cpu"])
    flags = "--epochs=2 --limit=1920 --precision="
    assert trainings[1:3] == [f"{flags}fp32", f"{flags}bf16"]


def test_a_device_that_does_not_exist_is_refused_in_one_line(errors_of):
    [line] = errors_of(benchmark.main, "--device", "nonsense")
    assert "--device nonsense" in line
