"""Compare finished runs: a table over seeds, the same for LaTeX, and the rate-distortion plane.

    python -m tools.compare_runs runs/*

Runs that differ only in their seed become one row, mean and standard deviation over seeds. Runs
whose numbers do not compare (other pixels, likelihood or split) get tables of their own.
`comparison.tex` needs booktabs, and fits a column of 3.25 inches.
"""

import json
import re
import statistics
from collections import defaultdict
from pathlib import Path

from matplotlib.ticker import MaxNLocator

import common

MODELS = {"ae.py": "AE", "vae.py": "VAE", "beta_vae.py": "beta-VAE"}
NOT_THE_MODEL = ("seed", "out", "resume", "data", "device", "script")
METRICS = {  # heading, the same in LaTeX, its unit there, decimals, factor
    "recon": ("recon", "recon", "nats", 2, 1),
    "kl": ("KL", "KL", "nats", 2, 1),
    "elbo": ("ELBO", "ELBO", "nats", 2, 1),
    "iw_bound": ("IW bound, K = {K}", r"$\mathcal{{L}}_{{{K}}}$", "nats", 2, 1),  # Burda et al.'s name for it
    "active_units": ("active units", "AU", "units", 1, 1),
    "probe_accuracy": ("probe %", "probe", r"\%", 1, 100),
    "mse": ("1000 MSE", "MSE", "$10^{-3}$", 2, 1000),
}


def read_runs(parser, folders):
    """The metrics.json of each folder; what is no finished run, or there twice, ends in one line."""
    runs = {}
    for folder in folders:
        try:
            run = json.loads((Path(folder) / "metrics.json").read_text())
            done, planned = run["train"]["epochs"], run["args"]["epochs"]
            identity = json.dumps([settings(run), run["args"]["seed"]])
        except (OSError, ValueError, KeyError, TypeError) as error:
            parser.error(f"argument RUN: {folder} holds no finished run: {error}")
        if done < planned:
            parser.error(f"argument RUN: {folder} stopped after {done} of {planned} epochs")
        if identity in runs:
            parser.error(f"argument RUN: {folder} and {runs[identity][0]} are the same run, seed and all")
        runs[identity] = folder, run
    return [run for _, run in runs.values()]


def settings(run):
    """All that makes two runs differ, but for the seed."""
    args = {name: value for name, value in run["args"].items() if name not in NOT_THE_MODEL}
    return {"script": run["environment"]["script"], **args, "precision": run["environment"]["precision"]}


def group_runs(runs):
    """{label: runs that differ only in seed}, the label naming the model and what sets it apart from its kind."""
    groups = defaultdict(list)
    for run in runs:
        groups[json.dumps(settings(run))].append(run)
    groups = [(json.loads(key), members) for key, members in groups.items()]
    groups.sort(key=lambda group: (list(MODELS).index(group[0]["script"]), group[0].get("beta", 0)))
    labelled = {}
    for own, members in groups:
        label = MODELS[own["script"]] + (f", beta = {own['beta']:g}" if "beta" in own else "")
        kind = [other for other, _ in groups if other["script"] == own["script"]]
        for name, value in own.items():
            if name not in ("script", "beta") and any(other.get(name) != value for other in kind):
                label += f", {name} {value}"
        labelled[label] = members
    return labelled


def table(groups):
    """Columns, each (metric, K, heading, LaTeX heading, unit, decimals, factor), and rows (label, seeds, cells).

    A cell is the values of a row's runs as texts: none, one, or their mean and standard deviation.
    """
    runs = [run for members in groups.values() for run in members]
    columns = []
    for metric, (heading, tex, *rest) in METRICS.items():
        # Bounds of other numbers of samples are other quantities: a column each.
        ks = {run["protocol"]["K"] if metric == "iw_bound" else None for run in runs if metric in run["test"]}
        columns += [(metric, k, heading.format(K=k), tex.format(K=k), *rest) for k in sorted(ks, key=str)]

    def cells(tests):  # [(K, metrics of a run)]
        for metric, k, _, _, _, decimals, factor in columns:
            values = [factor * test[metric] for own, test in tests if metric in test and k in (None, own)]
            spread = [statistics.stdev(values)] if len(values) > 1 else []
            yield [f"{value:.{decimals}f}" for value in ([statistics.mean(values), *spread] if values else [])]

    rows = [(label, len(own), [(run["protocol"]["K"], run["test"]) for run in own]) for label, own in groups.items()]
    for latent_dim, test in {run["args"]["latent_dim"]: run["test"] for run in runs}.items():
        pca = {"probe_accuracy": test["pca_probe_accuracy"], "mse": test["pca_mse"]}
        rows.append((f"PCA, {latent_dim} components", "", [(None, pca)]))
    rows.append(("raw pixels", "", [(None, {"probe_accuracy": runs[0]["test"]["pixel_probe_accuracy"]})]))
    return columns, [(label, seeds, list(cells(tests))) for label, seeds, tests in rows]


def markdown(columns, rows):
    lines = [["model", "seeds", *(heading for _, _, heading, *_ in columns)], ["---"] + ["---:"] * (len(columns) + 1)]
    lines += [[label, str(seeds), *(" ± ".join(cell) for cell in cells)] for label, seeds, cells in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def latex(columns, rows, protocol):
    """A table of one column's width: standard deviations below their means, what else names a run below its model."""
    counts = {seeds for _, seeds, _ in rows if seeds}
    caption = f"MNIST, {protocol['pixels']} pixels, {protocol['recon'].split(':')[0]}"
    if counts != {1}:
        caption += ", mean and standard deviation over " + (f"{min(counts)} seeds" if len(counts) == 1 else "$n$ seeds")
    gap = 1.2 if len(columns) > 6 else 3  # points

    def small(text):
        return rf"\scriptsize {text}" if text else ""

    lines = [["", *(small(column[i]) for column in columns)] for i in (3, 4)] + [[r"\midrule"]]
    for label, seeds, cells in rows:
        label = re.sub(r"beta = ([^,]+)", r"$\\beta = \1$", label.replace("beta-", r"$\beta$-").replace("_", " "))
        name, more = re.fullmatch(r"([^,]*(?:, \$[^$]*\$)?)(?:, )?(.*)", label).groups()
        more = ", ".join([more] * bool(more) + [f"$n = {seeds}$"] * (bool(seeds) and len(counts) > 1))
        lines.append([name, *(f"${cell[0]}$" if cell else "" for cell in cells)])
        below = [small(more), *(small(rf"$\pm${cell[1]}") if len(cell) > 1 else "" for cell in cells)]
        lines += [below] if any(below) else []
    begin = [r"\begin{table}", r"\centering", rf"\caption{{{caption}.}}", r"\footnotesize"]
    begin += [rf"\setlength{{\tabcolsep}}{{{gap}pt}}", rf"\begin{{tabular}}{{@{{}}l{'r' * len(columns)}@{{}}}}"]
    body = [" & ".join(line) + r" \\" * (len(line) > 1) for line in lines]
    end = [r"\bottomrule", r"\end{tabular}", r"\end{table}"]
    return "\n".join([*begin, r"\toprule", *body, *end]) + "\n"


def plot_rate_distortion(tables, out):
    """KL against recon, a marker a run, a panel a protocol; along a grey line the ELBO is the same."""
    panels = {}
    for key, groups in tables.items():
        tests = {label: [run["test"] for run in own] for label, own in groups.items() if "kl" in own[0]["test"]}
        panels |= {key: tests} if tests else {}
    if not panels:
        return
    plain = {"boxstyle": "square,pad=0.1", "facecolor": "white", "edgecolor": "none"}
    title, height = "Along a grey line the ELBO is the same", 0.8 * common.WIDTH * len(panels)
    with common.new_figure(out, "rate_distortion", title, height, len(panels)) as axes:
        for ax, (key, tests) in zip(axes, panels.items()):
            ax.margins(0.15)
            points = {label: [(test["kl"], test["recon"]) for test in own] for label, own in tests.items()}
            for label, own in points.items():
                colour = "C0" if label.startswith("VAE") else "C1"
                ax.plot(*zip(*own), "o", color=colour, markersize=3, markeredgewidth=0)
            (left, right), (bottom, top) = ax.get_xlim(), ax.get_ylim()
            for label, own in points.items():
                side = 1 if own[0][0] < (left + right) / 2 else -1  # towards the middle, where there is room
                where = {"xytext": (5 * side, 4 * side), "ha": "left" if side == 1 else "right", "va": "center"}
                ax.annotate(label, own[0], textcoords="offset points", fontsize=6, bbox=plain, **where)
            for total in MaxNLocator(6).tick_values(left + bottom, right + top):
                ax.axline((left, total - left), slope=-1, color="0.8", linewidth=0.5, zorder=0)
                if bottom < total - right < top:  # where the line leaves the panel
                    ax.annotate(f" $-{total:g}$", (right, total - right), color="0.5", fontsize=5, va="center")
            ax.set(xlim=(left, right), ylim=(bottom, top))
            xlabel = f"rate: KL (nats per image, {dict(key)['pixels']} pixels)"
            ax.set(xlabel=xlabel, ylabel="distortion: recon (nats per image)")


def main(argv=None):
    parser = common.Parser(prog="tools.compare_runs", description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a finished run")
    parser.add_argument("--out", metavar="DIR", default=".", help="folder to write to (default: this one)")
    args = parser.parse_args(argv)
    runs = read_runs(parser, args.runs)
    if not Path(args.out).is_dir():
        parser.error(f"argument --out: {args.out} is no folder")

    by_protocol = defaultdict(list)
    for run in runs:
        by_protocol[tuple((name, run["protocol"][name]) for name in ("pixels", "recon", "split"))].append(run)
    tables = {key: group_runs(members) for key, members in by_protocol.items()}
    if len(tables) > 1:
        print("These are not comparable, so they are in tables apart.\n")
    tex = []
    for key, groups in tables.items():
        columns, rows = table(groups)
        print("MNIST, {pixels} pixels; {recon}; {split}. Nats per image.\n".format(**dict(key)))
        print(markdown(columns, rows) + "\n")
        tex.append(latex(columns, rows, dict(key)))
    with common.replacing(Path(args.out) / "comparison.tex") as beside:
        beside.write_text("\n".join(tex))
    plot_rate_distortion(tables, args.out)


if __name__ == "__main__":
    main()
