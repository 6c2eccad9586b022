"""Compare finished runs: a table over seeds, the same for LaTeX, and the rate-distortion plane.

    python -m tools.compare_runs runs/*

Runs that differ only in their seed become one row, mean and standard deviation over seeds. Runs
whose numbers do not compare (other pixels, likelihood or split) get tables of their own.
"""

import json
import statistics
from collections import defaultdict
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

import common

MODELS = {"ae.py": "AE", "vae.py": "VAE", "beta_vae.py": "beta-VAE"}
NOT_THE_MODEL = ("seed", "out", "overwrite", "resume", "data", "device", "script")
COLUMNS = {  # metric: heading, decimals, factor
    "recon": ("recon", 2, 1),
    "kl": ("KL", 2, 1),
    "elbo": ("ELBO", 2, 1),
    "iw_bound": ("IW bound", 2, 1),
    "active_units": ("active units", 1, 1),
    "probe_accuracy": ("probe %", 1, 100),
    "mse": ("1000 MSE", 2, 1000),
}


def read_runs(parser, folders):
    """The metrics.json of each folder; what is no finished run, or there twice, ends in one line."""
    runs, seen = [], {}
    for folder in folders:
        try:
            run = json.loads((Path(folder) / "metrics.json").read_text())
            done, planned = run["train"]["epochs"], run["args"]["epochs"]
            identity = json.dumps([settings(run), run["args"]["seed"]])
        except (OSError, ValueError, KeyError, TypeError) as error:
            parser.error(f"argument RUN: {folder} holds no finished run: {error}")
        if done < planned:
            parser.error(f"argument RUN: {folder} stopped after {done} of {planned} epochs")
        if identity in seen:
            parser.error(f"argument RUN: {folder} and {seen[identity]} are the same run, seed and all")
        seen[identity] = folder
        runs.append(run)
    return runs


def settings(run):
    """All that makes two runs differ, but for the seed."""
    args = {name: value for name, value in run["args"].items() if name not in NOT_THE_MODEL}
    return {"script": run["environment"]["script"], **args, "precision": run["environment"]["precision"]}


def protocol(run):
    return tuple((name, run["protocol"][name]) for name in ("pixels", "recon", "split"))


def group_runs(runs):
    """{label: runs that differ only in seed}, the label naming the model and what sets it apart from its kind."""
    groups = defaultdict(list)
    for run in runs:
        groups[json.dumps(settings(run))].append(run)
    groups = [(json.loads(key), members) for key, members in groups.items()]
    groups.sort(key=lambda group: (list(MODELS).index(group[0]["script"]), group[0].get("beta", 0)))
    labelled = {}
    for own, members in groups:
        label = MODELS[own["script"]] + (f", beta {own['beta']:g}" if "beta" in own else "")
        kind = [other for other, _ in groups if other["script"] == own["script"]]
        for name, value in own.items():
            if name not in ("script", "beta") and any(other.get(name) != value for other in kind):
                label += f", {name} {value}"
        labelled[label] = members
    return labelled


def table(groups):
    """Header and rows of cells. A cell is None, a number as text, or (mean, standard deviation) as texts."""
    runs = [run for members in groups.values() for run in members]
    columns = []  # (heading, decimals, factor, value of a run)
    for metric, (heading, decimals, factor) in COLUMNS.items():
        # Bounds of other numbers of samples are other quantities: a column each.
        ks = sorted({run["protocol"]["K"] for run in runs if metric in run["test"]}) if metric == "iw_bound" else [None]
        for k in ks:
            name = f"{heading}, K = {k}" if k else heading
            columns.append((name, metric, k, decimals, factor))
    columns = [column for column in columns if any(column[1] in run["test"] for run in runs)]
    rows = []
    for label, members in groups.items():
        row = [label, str(len(members))]
        for _, metric, k, decimals, factor in columns:
            use = [run for run in members if metric in run["test"] and k in (None, run["protocol"]["K"])]
            row.append(cell([factor * run["test"][metric] for run in use], decimals))
        rows.append(row)
    for label, names in baselines(runs).items():
        row = [label, None]
        row += [cell([names[metric] * factor] if metric in names else [], n) for _, metric, _, n, factor in columns]
        rows.append(row)
    return ["model", "seeds", *(column[0] for column in columns)], rows


def baselines(runs):
    """{label: metrics} of PCA with as many components as the runs have latents, and of raw pixels."""
    rows = {}
    for run in runs:
        test = run["test"]
        rows[f"PCA, {run['args']['latent_dim']} components"] = {
            "probe_accuracy": test["pca_probe_accuracy"],
            "mse": test["pca_mse"],
        }
    rows["raw pixels"] = {"probe_accuracy": runs[0]["test"]["pixel_probe_accuracy"]}
    return rows


def cell(values, decimals):
    if not values:
        return None
    mean = f"{statistics.mean(values):.{decimals}f}"
    return (mean, f"{statistics.stdev(values):.{decimals}f}") if len(values) > 1 else mean


def markdown(header, rows):
    def text(content):
        return " ± ".join(content) if isinstance(content, tuple) else content or ""

    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(map(text, line)) + " |" for line in lines)


def latex(header, rows, caption):
    def text(content):
        if isinstance(content, tuple):
            return rf"${content[0]} \pm {content[1]}$"
        content = (content or "").replace("%", r"\%").replace("_", r"\_").replace("beta", r"$\beta$")
        return f"${content}$" if content.startswith("-") else content

    head, *body = (" & ".join(map(text, row)) + r" \\" for row in [header, *rows])
    lines = [r"\begin{table}", r"\centering", rf"\caption{{{text(caption)}}}"]
    lines += [rf"\begin{{tabular}}{{l{'r' * (len(header) - 1)}}}", r"\toprule", head, r"\midrule", *body]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", r"\end{table}"]) + "\n"


@matplotlib.rc_context(common.STYLE)
def plot_rate_distortion(tables, out):
    """KL against recon, a marker a run, a panel a protocol; along a grey line the ELBO is the same."""
    panels = {key: groups for key, groups in tables.items() if any("kl" in run[0]["test"] for run in groups.values())}
    if not panels:
        return
    figure = Figure(figsize=(common.WIDTH, 0.8 * common.WIDTH * len(panels)), layout="constrained")
    plain = {"boxstyle": "square,pad=0.1", "facecolor": "white", "edgecolor": "none"}
    for ax, (key, groups) in zip(figure.subplots(len(panels), squeeze=False)[:, 0], panels.items()):
        points = {
            label: [(run["test"]["kl"], run["test"]["recon"]) for run in members]
            for label, members in groups.items()
            if "kl" in members[0]["test"]
        }
        ax.margins(0.15)
        for label, own in points.items():
            ax.plot(*zip(*own), "o", color="C0" if label.startswith("VAE") else "C1", markersize=3, markeredgewidth=0)
        (left, right), (bottom, top) = ax.get_xlim(), ax.get_ylim()
        for label, own in points.items():
            x, y = own[0]
            side = 1 if x < (left + right) / 2 else -1  # towards the middle, where there is room
            where = {"xytext": (5 * side, 4 * side), "ha": "left" if side == 1 else "right", "va": "center"}
            ax.annotate(label, (x, y), textcoords="offset points", fontsize=6, bbox=plain, **where)
        for total in MaxNLocator(6).tick_values(left + bottom, right + top):
            ax.axline((left, total - left), slope=-1, color="0.8", linewidth=0.5, zorder=0)
            if bottom < total - right < top:  # where the line leaves the panel
                ax.annotate(f" $-{total:g}$", (right, total - right), color="0.5", fontsize=5, va="center")
        ax.set(xlim=(left, right), ylim=(bottom, top))
        ax.set(xlabel="rate: KL (nats per image)", ylabel="distortion: recon (nats per image)")
        ax.set_title(f"{dict(key)['pixels']} pixels; along a grey line the ELBO is the same")
    common.save_figure(figure, out, "rate_distortion")


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
        by_protocol[protocol(run)].append(run)
    tables = {key: group_runs(members) for key, members in by_protocol.items()}
    for name in ("pixels", "recon", "split"):
        values = sorted({dict(key)[name] for key in tables})
        if len(values) > 1:
            print(f"Not comparable, so in tables apart: {name} is {' / '.join(values)}.\n")
    text, tex = [], []
    for key, groups in tables.items():
        header, rows = table(groups)
        caption = "{pixels} pixels; {recon}; {split}. Nats per image, mean and standard deviation over seeds."
        caption = "MNIST, " + caption.format(**dict(key))
        text.append(f"{caption}\n\n{markdown(header, rows)}\n")
        tex.append(latex(header, rows, caption))
    with common.replacing(Path(args.out) / "comparison.tex") as beside:
        beside.write_text("\n".join(tex))
    plot_rate_distortion(tables, args.out)
    print("\n".join(text))


if __name__ == "__main__":
    main()
