"""Compare finished runs: a table over seeds, the same for LaTeX, and the rate-distortion plane.

    python -m tools.compare_runs runs/*

Runs that differ only in their seed become one row, mean and standard deviation over seeds. Runs whose
numbers do not compare (other data set, pixels, likelihood or split) get tables of their own.
`comparison.tex` needs booktabs and graphicx, and fits a column of 3.25 inches.
"""

import json
import math
import re
import statistics
import textwrap
from collections import defaultdict
from itertools import zip_longest
from pathlib import Path

from matplotlib.ticker import MaxNLocator

import common

MODELS = {"ae.py": "AE", "vae.py": "VAE", "beta_vae.py": "beta-VAE"}
NOT_THE_MODEL = ("seed", "out", "resume", "data", "device", "iw_samples")
METRICS = {  # heading, the same in LaTeX, its unit there, format, factor, what it means
    "recon": ("recon", "recon", "nats", ".2f", 1, ""),
    "kl": ("KL", "KL", "nats", ".2f", 1, ""),
    "elbo": ("ELBO", "ELBO", "nats", ".2f", 1, ""),
    "iw_bound": ("IW bound, K = {K}", r"$\mathcal{{L}}_{{{K}}}$", "nats", ".2f", 1, "bound of $K$ importance samples"),
    "active_units": ("active units", "AU", "units", ".1f", 1, "active units"),
    "probe_accuracy": ("probe %", "probe", r"\%", ".1f", 100, "accuracy of a linear probe of the codes"),
    "mse": ("1000 MSE", "MSE", "$10^{-3}$", ".2f", 1000, "squared error a pixel, from the mean code"),
}
IN_LATEX = str.maketrans({special: "\\" + special for special in "&%$#_{}"})
FIT = r"\resizebox{\ifdim\width>\columnwidth\columnwidth\else\width\fi}{!}{%"  # what is wider than a column
PROTOCOL = "{dataset}, {pixels} pixels; {recon}; {split}"  # what must be the same for numbers to compare


def read_runs(parser, folders):
    """The metrics.json of each folder; all that hold no finished run, or one twice, are named in one line."""
    runs, faults = {}, []
    for folder in folders:
        try:
            run = json.loads((Path(folder) / "metrics.json").read_text())
            args = {"dataset": "MNIST", "changes": [], **run["args"]}  # which older runs lack
            run["heading"] = PROTOCOL.format_map(args | run["protocol"])
            run["test"] = {name: x for name, x in run["test"].items() if type(x) in (int, float) and math.isfinite(x)}
            # All that makes two models differ, but for the seed. A flag that was not given is left out.
            own = args | {name: run["environment"][name] for name in ("script", "precision")}
            own["changes"] = [change for change in args["changes"] if change["name"] in ("epochs", "lr", "precision")]
            own = {name: own[name] for name in sorted(own) if name not in NOT_THE_MODEL and own[name] is not None}
            run["settings"], identity = own, json.dumps([own, run["heading"], args["seed"]])
            if run["train"]["epochs"] < args["epochs"]:
                raise ValueError(f"stopped after {run['train']['epochs']} of {args['epochs']} epochs")
            if identity in runs:
                raise ValueError(f"the same run as {runs[identity][0]}, seed and all")
            runs[identity] = folder, run
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            reason = "no metrics.json" if isinstance(error, FileNotFoundError) else error
            faults.append(f"{folder} ({reason})")
    if faults:
        parser.error(f"argument RUN: no finished run, or one twice: {', '.join(faults)}")
    return [run for _, run in runs.values()]


def group_runs(runs):
    """Yields (label, runs that differ only in seed); a label names the model and what sets it apart from its kind."""
    groups = defaultdict(list)
    for run in runs:
        groups[json.dumps(run["settings"])].append(run)
    groups = [(members[0]["settings"], members) for members in groups.values()]
    scripts = [*MODELS, *sorted({own["script"] for own, _ in groups})]
    groups.sort(key=lambda group: (scripts.index(group[0]["script"]), group[0].get("beta", 0)))
    for own, members in groups:
        label = MODELS.get(own["script"], Path(own["script"]).stem)
        label += f", beta = {own['beta']:g}" if "beta" in own else ""
        told = {"script", "beta", "changes", *(change["name"] for change in own["changes"])}
        for name, value in own.items():
            # Another model may have another recipe, but a reader would not expect it to train for longer.
            kind = [other for other, _ in groups if name == "epochs" or other["script"] == own["script"]]
            if name not in told and any(other.get(name) != value for other in kind):
                label += f", {name.replace('_', ' ')} {value}"
        changes = [", {name} {from} to {to} after epoch {after_epoch}".format(**change) for change in own["changes"]]
        yield label + "".join(changes), members


def table(groups):
    """Columns (metric, K, heading, LaTeX heading, unit, format, factor) and rows (label, seeds, cells of texts)."""
    runs = [run for _, members in groups for run in members]
    columns = []
    terms = {name for run in runs for name in run["test"] if not re.match("loss$|pca_|pixel_", name)}
    # What METRICS does not know is a script's own term, of no known unit.
    own = {name: (name, name.translate(IN_LATEX), "", ".4f", 1, "") for name in sorted(terms - METRICS.keys())}
    for metric, (heading, tex, *rest, _) in {**METRICS, **own}.items():
        # Bounds of other numbers of samples are other quantities: a column each.
        ks = {run["protocol"]["K"] if metric == "iw_bound" else None for run in runs if metric in run["test"]}
        columns += [(metric, k, heading.format(K=k), tex.format(K=k), *rest) for k in sorted(ks, key=lambda k: k or 0)]

    def cells(tests):  # [(K, metrics of a run)]
        for metric, k, _, _, _, style, factor in columns:
            values = [factor * test[metric] for own, test in tests if metric in test and k in (None, own)]
            mean = [f"{statistics.mean(values):{style}}"] if values else []
            spread = [f"± {statistics.stdev(values):{style}}"] if len(values) > 1 else []
            yield mean + spread + [f"(n = {len(values)})"] * (0 < len(values) < len(tests))  # where some lack it

    rows = [(label, len(own), [(run["protocol"]["K"], run["test"]) for run in own]) for label, own in groups]
    linear = {}  # what PCA and raw pixels reach: the same in all runs
    for run in runs:
        for prefix, label in (("pca_", f"PCA, {run['args'].get('latent_dim')} components"), ("pixel_", "raw pixels")):
            test = {name.removeprefix(prefix): x for name, x in run["test"].items() if name.startswith(prefix)}
            linear |= {label: test} if test else {}
    rows += [(label, "", [(None, test)]) for label, test in sorted(linear.items())]
    return columns, [(label, seeds, list(cells(tests))) for label, seeds, tests in rows]


def markdown(columns, rows):
    lines = [["model", "seeds", *(heading for _, _, heading, *_ in columns)], ["---"] + ["---:"] * (len(columns) + 1)]
    lines += [[label, str(seeds), *(" ".join(cell) for cell in cells)] for label, seeds, cells in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def latex(heading, name, groups, columns, rows):
    """A table of one column's width: standard deviations below their means, what else names a run below its model."""
    epochs = {run["args"]["epochs"] for _, members in groups for run in members}
    caption = [heading] + [f"{min(epochs)} epoch" + "s" * (epochs != {1})] * (len(epochs) == 1)
    counts = {len(members) for _, members in groups}
    n = min(counts) if len(counts) == 1 else "$n$"
    caption.append("one seed" if n == 1 else f"mean and standard deviation over {n} seeds")
    shown = [METRICS[metric] for metric in METRICS if any(column[0] == metric for column in columns)]
    caption += [f"{tex.format(K='K')}: {meaning}" for _, tex, *_, meaning in shown if meaning]
    small = r"\scriptsize {}".format
    lines = [["", *(small(column[i]) for column in columns)] for i in (3, 4)]
    for label, seeds, cells in rows:
        label = re.sub(r"\bbeta\b", r"$\\beta$", label.translate(IN_LATEX))
        model, more = re.fullmatch(r"([^,]*(?:, \$\\beta\$ = [^,]*)?)(?:, )?(.*)", label).groups()
        more = ", ".join([more] * bool(more) + [f"$n={seeds}$"] * (n == "$n$" and seeds != ""))
        first = [model, *map(small, textwrap.wrap(more, 22))]  # in as many lines as keep the column narrow
        texts = [[f"${text}$" for text in cell[:1]] + [small(text) for text in cell[1:]] for cell in cells]
        lines += zip_longest(first, *texts, fillvalue="")
    begin = [r"\begin{table}", r"\centering", rf"\caption{{{'; '.join(caption)}.}}", rf"\label{{{name}}}"]
    begin += [r"\smallskip\footnotesize\setlength{\tabcolsep}{2pt}", FIT]
    begin += [rf"\begin{{tabular}}{{@{{}}l{'r' * len(columns)}@{{}}}}", r"\toprule"]
    body = [" & ".join(line).replace("± ", r"$\pm$") + r" \\" for line in lines]
    body.insert(2, r"\midrule")  # below the headings and their units
    return "\n".join([*begin, *body, r"\bottomrule", r"\end{tabular}}", r"\end{table}"]) + "\n"


def plot_rate_distortion(tables, out):
    """KL against recon, a marker a run, a panel a protocol; along a grey line the ELBO is the same."""
    panels = {}
    for heading, groups in tables.items():
        for label, members in groups:
            tests = [run["test"] for run in members if {"kl", "recon"} <= run["test"].keys()]
            if tests:
                panels.setdefault(heading, []).append((label, [(test["kl"], test["recon"]) for test in tests]))
    if not panels:
        return
    title, height = "Along a grey line the ELBO is the same", 0.8 * common.WIDTH * len(panels)
    with common.new_figure(out, "rate_distortion", title, height, len(panels)) as axes:
        for ax, (heading, groups) in zip(axes, panels.items()):
            ax.margins(0.15)
            for i, (label, points) in enumerate(groups):
                look = {"color": common.DIGIT_COLOURS[i % 10], "markersize": 3, "markeredgewidth": 0}
                ax.plot(*zip(*points), "os^Dv"[i % 5], label=textwrap.fill(label, 30), **look)
            (left, right), (bottom, top) = ax.get_xlim(), ax.get_ylim()
            for total in MaxNLocator(6).tick_values(left + bottom, right + top):
                ax.axline((left, total - left), slope=-1, color="0.8", linewidth=0.5, zorder=0)
                if bottom < total - right < top:  # where the line leaves the panel
                    ax.annotate(f" $-{total:g}$", (right, total - right), color="0.5", fontsize=5, va="center")
            xlabel = "rate: KL (nats per image)\n" + textwrap.fill(re.sub(":[^;]*", "", heading), 52)
            ax.set(xlim=(left, right), ylim=(bottom, top), xlabel=xlabel, ylabel="distortion: recon (nats per image)")
            ax.legend(handletextpad=0.1, borderpad=0.2)  # where it covers fewest points


def main(argv=None):
    parser = common.Parser(prog="tools.compare_runs", description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a finished run")
    parser.add_argument("--out", metavar="DIR", default=".", help="folder to write to (default: this one)")
    args = parser.parse_args(argv)
    if not Path(args.out).is_dir():
        parser.error(f"argument --out: {args.out} is no folder")
    tables = defaultdict(list)
    for run in read_runs(parser, args.runs):
        tables[run["heading"]].append(run)
    tables = {heading: list(group_runs(members)) for heading, members in tables.items()}
    tex = []
    for heading, groups in tables.items():
        columns, rows = table(groups)
        print(f"{heading}. Recon, KL, ELBO and bound in nats per image.\n\n{markdown(columns, rows)}\n")
        name = "tab:" + heading.split(" pixels")[0].replace(", ", "-").lower()
        before = sum(f"{{{name}" in other for other in tex)
        name += f"-{before + 1}" * (before > 0)
        tex.append(latex(heading, name, groups, columns, rows))
    with common.replacing(Path(args.out) / "comparison.tex") as temporary:
        temporary.write_text("\n".join(tex))
    plot_rate_distortion(tables, args.out)


if __name__ == "__main__":
    main()
