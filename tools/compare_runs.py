"""python -m tools.compare_runs runs/* --out comparison

Prints tables of finished runs; with --out, also writes them for LaTeX (booktabs, graphicx) and as a figure.
"""

import argparse
import json
import math
import re
import statistics
import sys
import textwrap
from collections import defaultdict
from functools import partial
from itertools import zip_longest
from pathlib import Path

import common

MODELS = {"ae.py": "AE", "vae.py": "VAE", "beta_vae.py": "beta-VAE"}
LIKELIHOODS = {"bce": "Bernoulli cross-entropy", "mse": "Gaussian of unit variance (constant left out)"}
NOT_SETTINGS = {"seed", "out", "resume", "data", "device", "iw_samples"}  # may differ within a row
HEADINGS = {"recon": "recon", "kl": "KL", "elbo": "ELBO", "iw_bound": "IW bound"}
HEADINGS |= {"active_units": "active units", "probe_accuracy": "probe %", "mse": "1000 MSE"}
DIGITS = dict.fromkeys(HEADINGS.values(), ".2f") | {"active units": ".1f", "probe %": ".1f"}
FACTORS = {"probe %": 100, "1000 MSE": 1000}
# Columns only if --columns names them; PCA and raw pixels have rows instead.
HIDDEN = {"loss", "iw_samples", "pca_components", "pca_mse", "pca_probe_accuracy", "pixel_probe_accuracy"}
IN_LATEX = str.maketrans({character: "\\" + character for character in "{}$&#%_"})
IN_LATEX |= str.maketrans({"\\": r"\textbackslash{}", "^": r"\^{}", "~": r"\~{}", "±": r"$\pm$"})
ON_LINE = dict(rotation=-45, rotation_mode="anchor", transform_rotates_text=True, va="bottom", color="0.4")
wrap = partial(textwrap.wrap, break_long_words=False, break_on_hyphens=False)
greek = partial(re.sub, r"\bbeta(?=-VAE| = )", r"$\\beta$")  # for LaTeX and matplotlib


def read_runs(folders):
    """Return {protocol: [(order, settings, test)]}; a line on stderr says why a folder is left out."""
    runs, seen = defaultdict(list), {}
    for folder in folders:
        try:
            metrics = json.loads(Path(folder, "metrics.json").read_text(encoding="utf-8"))
            args, epochs, images = metrics["args"], metrics["train"]["epochs"], metrics["environment"]
            pixels = "binarized" if args.get("binarize") else "gray"
            protocol = f"{args['dataset']}, {pixels} pixels; {LIKELIHOODS.get(args['recon'], args['recon'])}"
            protocol += f"; trained on {images['train_images']} images, tested on {images['test_images']}"
            script, beta = args["script"], args.get("beta")
            order = [*MODELS, script].index(script), script, beta if type(beta) in (int, float) else math.inf
            settings = {name: x for name, x in args.items() if name not in NOT_SETTINGS and x is not None}
            identity = json.dumps([protocol, settings, args["seed"]], sort_keys=True)
            run = order, settings, read_test(folder, metrics["test"])
            done = epochs >= args["epochs"]
            reason = seen.get(identity) if done else f"stopped after {epochs} of {args['epochs']} epochs"
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            reason = "no metrics.json" if isinstance(error, OSError) else "metrics.json is damaged"
        if reason:
            print(f"left out: {folder}, {reason}", file=sys.stderr)
        else:
            runs[protocol].append(run)
            seen[identity] = f"the same run as {folder}"
    return runs


def read_test(folder, test):
    """Return {heading: number}. A custom term wins over a measurement, and its heading is its own name."""
    history = Path(folder, "history.csv")
    header = history.read_text(encoding="utf-8").splitlines()[0] if history.exists() else ""
    custom = {name.removeprefix("test_") for name in header.split(",")} - {"recon", "kl", "elbo"}
    headings = {name: name if name in custom else HEADINGS.get(name, name) for name in test}
    headings["iw_bound"] = f"IW bound, K = {test.get('iw_samples')}"  # another bound for each K
    return {headings[name]: x for name, x in test.items() if type(x) in (int, float) and math.isfinite(x)}


def make_rows(runs):
    """Return (label, seeds, tests) for runs that differ only in their seed, then for PCA and raw pixels."""
    groups, rows = defaultdict(list), {}
    for _, settings, test in sorted(runs, key=lambda run: run[0]):
        groups[json.dumps(settings, sort_keys=True)].append(test)
    for key, tests in groups.items():
        own = json.loads(key)
        label = MODELS.get(own["script"], Path(own["script"]).stem)
        if "beta" in own:
            label += f", beta = {str(own['beta']).removesuffix('.0')}"
        for name in sorted(own.keys() - {"script", "beta"}):
            others = [other for _, other, _ in runs if name in other or other["script"] == own["script"]]
            if any(other.get(name) != own[name] for other in others):
                label += f", {name.replace('_', ' ')} {own[name]}"
        rows[key] = label, str(len(tests)), tests
    for prefix, text in (("pca_", "PCA, {} components"), ("pixel_", "raw pixels")):
        for test in sorted((test for *_, test in runs), key=lambda test: test.get("pca_components", 0)):
            label = text.format(test.get("pca_components"))
            found = {HEADINGS[name]: test[prefix + name] for name in HEADINGS if prefix + name in test}
            rows[label] = label, "", [found]  # the same in all runs
    return list(rows.values())


def make_table(rows, names):
    """Return lines of cells; a cell is a list of texts, which LaTeX sets below each other."""
    found = sorted({heading for *_, tests in rows for test in tests for heading in test})
    names = names or [*HEADINGS, *(x for x in found if x not in HIDDEN.union(HEADINGS, HEADINGS.values()))]
    columns = [x for name in names for x in found if x.split(", K = ")[0] in (name, HEADINGS.get(name))]
    table = [[["model"], ["seeds"], *(wrap(heading, 9) for heading in columns)]]
    for label, seeds, tests in rows:
        table.append([wrap(label, 24), [seeds]])
        for heading in columns:
            values = [FACTORS.get(heading, 1) * test[heading] for test in tests if heading in test]
            mean = statistics.mean(values or [0])
            digits = DIGITS.get(heading.split(", K = ")[0], ".1f" if abs(mean) >= 100 else ".4g")
            texts = [f"{mean:{digits}}"] if values else []
            texts += [f"± {statistics.stdev(values):{digits}}"] if len(values) > 1 else []
            texts += [f"(n = {len(values)})"] if 0 < len(values) < len(tests) else []
            table[-1].append(texts)
    return table[:1] + [line for line in table[1:] if any(line[2:])]


def latex(heading, number, table):
    """Return a LaTeX table, with standard deviations below the means to keep it narrow."""
    lines = []
    for line in table:
        for i, texts in enumerate(zip_longest(*line, fillvalue="")):
            size = r"\scriptsize " if i > 0 else ""
            text = greek(" & ".join(text and size + text.translate(IN_LATEX) for text in texts))
            lines.append(re.sub(r"(?<=& )-(?=\d)", "$-$", text) + r" \\")
    lines.insert(max(map(len, table[0])), r"\midrule")  # below the headings
    body, caption = "\n".join(lines), heading.translate(IN_LATEX)
    return rf"""\begin{{table}}\centering
\caption{{{caption} Mean and standard deviation over seeds.}}\label{{tab:comparison-{number}}}\smallskip
\footnotesize\tabcolsep=2pt\resizebox{{\ifdim\width>\columnwidth\columnwidth\else\width\fi}}{{!}}{{%
\begin{{tabular}}{{@{{}}l{"r" * (len(table[0]) - 1)}@{{}}}}\toprule
{body}
\bottomrule\end{{tabular}}}}\end{{table}}"""


def plot_rate_distortion(tables, out):
    """Plot recon against KL, with lines of equal ELBO: a panel per protocol with at least two such runs."""
    panels = {}
    for protocol, rows in tables.items():
        points = [(label, test) for label, _, tests in rows for test in tests if {"KL", "recon"} <= {*test}]
        if len(points) > 1:
            panels[protocol] = points
    if not panels:
        return
    with common.new_figure(out, "rate_distortion", "Rate-distortion", 2.1 * len(panels), len(panels)) as axes:
        for ax, (protocol, points) in zip(axes, panels.items()):
            ax.set_prop_cycle(color=common.DIGIT_COLORS * 7, marker=list("os^Dv<>") * 10)
            for label in dict.fromkeys(label for label, _ in points):
                xy = [(test["KL"], test["recon"]) for other, test in points if other == label]
                text = greek("\n".join(wrap(label, 20)).replace("$", r"\$"))
                ax.plot(*zip(*xy), linestyle="", markersize=3.5, label=text)
            ax.margins(0.2)  # room for the lines
            left, right, bottom, top = ax.axis(ax.axis())  # and keeps them
            for value in ax.yaxis.get_major_locator().tick_values(left + bottom, right + top):
                share = (value - left - bottom) / (right - left + top - bottom)
                x = left + share * (right - left)  # on the panel's diagonal, upwards
                if 0.12 < share < 0.75:
                    ax.axline((x, value - x), slope=-1, color="0.8", linewidth=0.5, zorder=0)
                    ax.text(x, value - x, f"ELBO ${0 - value:g}$", fontsize=5, zorder=1, **ON_LINE)
            if len(panels) > 1:
                name = "\n".join(wrap(re.split(r" \(|; trained", protocol)[0], 25))
                ax.text(right, top, name, ha="right", va="top", backgroundcolor="white", parse_math=False)
            ax.set(xlabel="rate: KL (nats per image)", ylabel="distortion: recon (nats per image)")
            ax.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False, handletextpad=0.1)


def main(argv=None):
    parser = argparse.ArgumentParser(prog="tools.compare_runs", usage=argparse.SUPPRESS)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a finished run")
    parser.add_argument("--columns", nargs="+", metavar="NAME", help="test metrics to show, in this order")
    parser.add_argument("--out", metavar="DIR", help="where to write comparison.tex and rate_distortion")
    args = parser.parse_args(argv)
    tables = {protocol: make_rows(runs) for protocol, runs in read_runs(args.runs).items()}
    if not tables:
        parser.error("no finished run to compare")
    tests = [test for rows in tables.values() for *_, tests in rows for test in tests]
    if unknown := set(args.columns or []).difference(HEADINGS, *tests):
        parser.error(f"argument --columns: no run has {' or '.join(unknown)}")
    tex = []
    for protocol, rows in tables.items():
        heading, table = f"{protocol}; nats per image.", make_table(rows, args.columns)
        lines = [[" ".join(texts).replace("|", r"\|") for texts in line] for line in table]
        lines.insert(1, ["---", *("---:" for _ in lines[0][1:])])
        print(heading, "", *(f"| {' | '.join(line)} |" for line in lines), "", sep="\n")
        tex.append(latex(heading, len(tex) + 1, table))
    if args.out:
        Path(args.out).mkdir(parents=True, exist_ok=True)
        Path(args.out, "comparison.tex").write_text("\n\n".join(tex), encoding="utf-8")
        plot_rate_distortion(tables, args.out)


if __name__ == "__main__":
    main()
