"""python -m tools.compare_runs runs/* --out comparison

Prints tables of finished runs; with --out, also writes them for LaTeX (booktabs, graphicx) and as a figure.
"""

import argparse
import glob
import json
import math
import re
import statistics
import sys
import textwrap
from collections import defaultdict, namedtuple
from functools import partial
from itertools import zip_longest
from pathlib import Path

sys.path.append(f"{Path(__file__).resolve().parents[1]}")  # for `python tools/compare_runs.py`
import common

MODELS = {"ae.py": "AE", "vae.py": "VAE", "beta_vae.py": "beta-VAE"}  # in the order of their rows
LIKELIHOODS = {"bce": "Bernoulli cross-entropy", "mse": "Gaussian of unit variance (constant left out)"}
NOT_SETTINGS = {"out", "resume", "data", "device", "iw_samples"}  # do not change what is learned
HEADINGS = {
    "recon": "recon",
    "kl": "KL",
    "elbo": "ELBO",
    "iw_bound": "IW bound",
    "active_units": "active units",
    "probe_accuracy": "probe %",
    "mse": "1000 MSE",
}
DIGITS = {**dict.fromkeys(HEADINGS.values(), ".2f"), "active units": ".1f", "probe %": ".1f"}
FACTORS = {"probe %": 100, "1000 MSE": 1000}
# Columns only if --columns names them; the last four are in files of older versions.
HIDDEN = {
    "loss",
    "iw_samples",
    "pca_components",
    "pca_mse",
    "pca_probe_accuracy",
    "pixel_probe_accuracy",
}
IN_LATEX = str.maketrans(
    {
        **{character: "\\" + character for character in "{}$&#%_"},
        "\\": r"\textbackslash{}",
        "^": r"\^{}",
        "~": r"\~{}",
        "±": r"$\pm$",
    }
)
wrap = partial(textwrap.wrap, break_long_words=False, break_on_hyphens=False)
greek = partial(re.sub, r"\bbeta(?=-VAE| = )", r"$\\beta$")  # for LaTeX and matplotlib

# protocol: phrases that name data, likelihood and images; only runs with the same protocol are compared.
Run = namedtuple("Run", "folder protocol settings epochs test")


def expand(names):
    """Return folders; a name that does not exist may be a pattern, which Windows does not expand."""
    folders = []
    for name in names:
        folders += [name] if Path(name).exists() else sorted(glob.glob(name)) or [name]
    return folders


def read_runs(folders):
    """Return {protocol: runs}; a line on stderr says why a folder is left out."""
    protocols = defaultdict(list)
    for folder in folders:
        try:
            run = read_run(folder)
            reason = reason_to_leave_out(run, protocols.get(run.protocol, []))
        except OSError:
            reason = "no metrics.json" if Path(folder).exists() else "no such folder"
        except (ValueError, LookupError, TypeError, AttributeError):
            reason = "metrics.json is damaged or incomplete"
        if reason:
            print(f"left out: {folder}, {reason}", file=sys.stderr)
        else:
            protocols[run.protocol].append(run)
    return protocols


def read_run(folder):
    """Return the run in `folder`; raises what reading a missing or damaged file raises."""
    metrics = json.loads(Path(folder, "metrics.json").read_bytes())
    args = metrics["args"]
    images = metrics["environment"]
    pixels = "binarized" if args.get("binarize") else "gray"
    protocol = (
        f"{args['dataset']}, {pixels} pixels",
        LIKELIHOODS.get(args["recon"], args["recon"]),
        f"trained on {images['train_images']} images, tested on {images['test_images']}",
        "nats per image.",
    )
    settings = {name: x for name, x in args.items() if name not in NOT_SETTINGS and x is not None}
    return Run(folder, protocol, settings, metrics["train"]["epochs"], read_test(folder, metrics["test"]))


def read_test(folder, test):
    """Return {heading: number}. A custom term wins over a measurement, and its heading is its own name."""
    history = Path(folder, "history.csv")
    header = history.read_text(encoding="utf-8").splitlines()[0] if history.exists() else ""
    custom = {name.removeprefix("test_") for name in header.split(",")} - {"recon", "kl", "elbo"}
    headings = {name: name if name in custom else HEADINGS.get(name, name) for name in test}
    headings["iw_bound"] = f"IW bound, K = {test.get('iw_samples')}"  # another bound for each K
    return {headings[name]: x for name, x in test.items() if type(x) in (int, float)}


def reason_to_leave_out(run, runs):
    """Say why `run` does not belong in a table of `runs`; empty if it does."""
    if run.epochs < run.settings["epochs"]:
        return f"stopped after {run.epochs} of {run.settings['epochs']} epochs"
    for other in runs:
        if other.settings == run.settings:
            if all(other.test[heading] == run.test[heading] for heading in other.test.keys() & run.test):
                return f"the same run as {other.folder}"
            same = f"since it has the same flags and seed as {other.folder}"
            return f"{same}, but other numbers (another machine or an edited script?)"
    return ""


def place_in_table(run):
    script = run.settings["script"]
    beta = run.settings.get("beta")
    return [*MODELS, script].index(script), script, beta if type(beta) in (int, float) else math.inf


def make_rows(runs):
    """Return {label: tests}, in which runs that differ only in their seeds share a label."""
    rows = defaultdict(list)
    for run in sorted(runs, key=place_in_table):
        rows[make_label(run.settings, runs)].append(run.test)
    return rows


def make_label(settings, runs):
    """Name the model and the settings that set it apart; a model that lacks a flag does not count."""
    script = settings["script"]
    label = MODELS.get(script, Path(script).stem)
    if "beta" in settings:
        label += f", beta = {str(settings['beta']).removesuffix('.0')}"
    for name in sorted(settings.keys() - {"script", "beta", "seed"}):
        others = [run.settings for run in runs if name in run.settings or run.settings["script"] == script]
        if any(other.get(name) != settings[name] for other in others):
            label += f", {name.replace('_', ' ')} {settings[name]}"
    return label


def choose_columns(runs, names):
    """Return the headings of the metrics in `names`, or of all that are not hidden."""
    found = sorted({heading for run in runs for heading in run.test})
    names = names or [*HEADINGS, *(heading for heading in found if heading not in HIDDEN)]
    columns = [x for name in names for x in found if x.split(", K = ")[0] in (name, HEADINGS.get(name))]
    return list(dict.fromkeys(columns))  # each once


def make_table(rows, columns):
    """Return lines of cells; a cell is a list of texts, which LaTeX sets below each other."""
    table = [[["model"], ["seeds"], *(wrap(heading, 9) for heading in columns)]]
    for label, tests in rows.items():
        cells = [make_cell(heading, tests) for heading in columns]
        if any(cells):
            table.append([wrap(label, 24), [str(len(tests))], *cells])
    return table


def make_cell(heading, tests):
    """Return the mean, the standard deviation if there are several runs, and how many have the metric."""
    numbers = [FACTORS.get(heading, 1) * test[heading] for test in tests if heading in test]
    if not numbers:
        return []
    mean = statistics.mean(numbers)
    digits = DIGITS.get(heading.split(", K = ")[0], ".4g")
    texts = [f"{mean:{digits}}"]
    if len(numbers) > 1:
        texts.append(f"± {statistics.stdev(numbers):{digits}}")
    if len(numbers) < len(tests):
        texts.append(f"(n = {len(numbers)})")
    return texts


def to_markdown(table):
    lines = [" | ".join(" ".join(texts).replace("|", r"\|") for texts in cells) for cells in table]
    lines.insert(1, f"---{' | ---:' * (len(table[0]) - 1)}")
    return "\n".join(f"| {line} |" for line in lines)


def to_latex(heading, number, table):
    """Return a LaTeX table, with standard deviations below the means to keep it narrow."""
    lines = []
    for cells in table:
        for i, texts in enumerate(zip_longest(*cells, fillvalue="")):
            size = r"\scriptsize " if i else ""
            line = " & ".join(text and size + text.translate(IN_LATEX) for text in texts)
            lines.append(re.sub(r"(?<=& )-(?=\d)", "$-$", greek(line)) + r" \\")
    lines.insert(max(map(len, table[0])), r"\midrule")  # below the headings
    body = "\n".join(lines)
    caption = f"{heading.translate(IN_LATEX)} Mean and standard deviation over seeds."
    return rf"""\begin{{table}}\centering
\caption{{{caption}}}\label{{tab:comparison-{number}}}\smallskip
\footnotesize\tabcolsep=2pt\resizebox{{\ifdim\width>\columnwidth\columnwidth\else\width\fi}}{{!}}{{%
\begin{{tabular}}{{@{{}}l{"r" * (len(table[0]) - 1)}@{{}}}}\toprule
{body}
\bottomrule\end{{tabular}}}}\end{{table}}"""


def plot_rate_distortion(protocols, out):
    """Plot recon against KL: a panel for each protocol with at least two runs that have both."""
    panels = {}
    for protocol, runs in protocols.items():
        runs = [run for run in runs if {"KL", "recon"} <= run.test.keys()]
        if len(runs) > 1:
            panels[protocol] = make_rows(runs)
    if not panels:
        return
    data = {protocol[0] for protocol in panels}
    title = f"{data.pop()}: rate-distortion" if len(data) == 1 else "Rate-distortion"
    with common.new_figure(out, "rate_distortion", title, 2.1 * len(panels), len(panels)) as axes:
        for ax, (protocol, rows) in zip(axes, panels.items()):
            plot_points(ax, rows)
            plot_elbo_lines(ax)
            if len(panels) > 1:
                name = "\n".join(wrap("; ".join(protocol[:2]), 26))
                ax.text(
                    1,
                    1,
                    name,
                    ha="right",
                    va="top",
                    transform=ax.transAxes,
                    backgroundcolor="white",
                    parse_math=False,
                )


def plot_points(ax, rows):
    """Plot the runs of {label: tests}, with a color and a marker for each label."""
    ax.set_prop_cycle(color=common.DIGIT_COLORS * 7, marker=list("os^Dv<>") * 10)
    for label, tests in rows.items():
        kl = [test["KL"] for test in tests]
        recon = [test["recon"] for test in tests]
        text = greek("\n".join(wrap(label, 20)).replace("$", r"\$"))
        ax.plot(kl, recon, linestyle="", markersize=3.5, label=text)
    ax.set(xlabel="rate: KL (nats per image)", ylabel="distortion: recon (nats per image)")
    ax.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False, handletextpad=0.1)


def plot_elbo_lines(ax):
    """Draw lines of equal ELBO = -(KL + recon), with labels on the panel's rising diagonal."""
    ax.margins(0.2)  # room for the lines
    left, right, bottom, top = ax.axis()
    for total in ax.yaxis.get_major_locator().tick_values(left + bottom, right + top):
        share = (total - left - bottom) / (right - left + top - bottom)  # of the diagonal's length
        if 0.15 < share < 0.75:
            point = left + share * (right - left), bottom + share * (top - bottom)
            ax.axline(point, slope=-1, color="0.8", linewidth=0.5, zorder=0)
            ax.text(
                *point,
                f"ELBO ${0 - total:g}$",  # not -0
                fontsize=5,
                color="0.4",
                va="bottom",
                rotation=-45,  # in units of the data, as the line
                rotation_mode="anchor",
                transform_rotates_text=True,
            )


def main(argv=None):
    parser = argparse.ArgumentParser(
        description="Print tables of finished runs; runs that differ only in their seeds become one row."
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a finished run")
    parser.add_argument(
        "--columns", nargs="+", metavar="NAME", help="show only these test metrics, in this order"
    )
    parser.add_argument(
        "--out", metavar="DIR", help="also write comparison.tex and rate_distortion to this folder"
    )
    parser.print_usage = lambda file: None  # an error is one line; --help has the usage
    args = parser.parse_args(argv)
    protocols = read_runs(expand(args.runs))
    if not protocols:
        parser.error("no finished run to compare")
    tests = [run.test for runs in protocols.values() for run in runs]
    unknown = set(args.columns or []).difference(HEADINGS, *tests)
    if unknown:
        parser.error(f"argument --columns: no run has {' or '.join(sorted(unknown))}")

    latex = []
    for protocol, runs in protocols.items():
        table = make_table(make_rows(runs), choose_columns(runs, args.columns))
        heading = "; ".join(protocol)
        print(f"{heading}\n\n{to_markdown(table)}\n")
        latex.append(to_latex(heading, len(latex) + 1, table))
    if args.out:
        try:
            Path(args.out).mkdir(parents=True, exist_ok=True)
            Path(args.out, "comparison.tex").write_text("\n\n".join(latex), encoding="utf-8")
        except OSError as error:
            parser.error(f"argument --out: {error}; choose another folder")
        plot_rate_distortion(protocols, args.out)


if __name__ == "__main__":
    main()
