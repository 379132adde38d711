# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Long Range Arena: read, compare and extend the results
#
# You will see the committed results of this repository, their learning curves, how far they are
# from the published rows and why they must not be read against them yet, how much of a task is
# local; then a run of your own, trained in seconds, that appears beside the others. It takes about
# 20 seconds on one CPU core.
#
# [Long Range Arena](https://arxiv.org/abs/2011.04006) is a set of six classification tasks whose
# inputs have 1,000 to 16,000 tokens: nested lists of operators (ListOps), reviews as bytes (Text),
# pairs of documents (Retrieval), images as rows of pixels (Image, Pathfinder, Path-X). Transformers
# failed at some of them; state-space models did not, and that is how they became known.

# %%
import os
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt

import experiments
from experiments.lra import page, published, report, rows, train

os.chdir(Path(experiments.__file__).parents[1])  # the commands are run from the repository's root
plt.style.use("tableau-colorblind10")
plt.rcParams.update({"figure.constrained_layout.use": True, "font.size": 10})

# %% [markdown]
# ## Read
#
# Each run of `seqmodels lra train` leaves one JSON file: the whole config, the curve,
# the test accuracy, baselines, versions, device and time. `read_rows` reads folders of them.

# %%
ours = rows.read_rows(rows.COMMITTED)
for row in ours:
    print(f"{row.label:40} {row.accuracy:6.2f} %  {row.minutes:6.1f} min  {row.longest:6,} tokens")

# %%
figure, plots = plt.subplots(1, 2, figsize=(11, 3.6))
styles = ("-", "--", "-.", ":")
for number, row in enumerate(ours):
    losses = [(p.tokens / 1e6, p.loss) for p in row.curve("train") if p.tokens and p.loss]
    scores = [(p.tokens / 1e6, 100 * p.accuracy) for p in row.curve("eval") if p.tokens]
    for axes, points in zip(plots, (losses, scores), strict=True):
        axes.plot(*zip(*points, strict=True), styles[number % 4], label=row.label, linewidth=1.2)
plots[0].set(xlabel="million tokens of training", ylabel="training loss", xscale="log")
plots[1].set(xlabel="million tokens of training", ylabel="validation accuracy in %", xscale="log")
plots[1].legend(bbox_to_anchor=(1.01, 1), loc="upper left", fontsize=8)
figure.suptitle("How the committed runs came about")
plt.show()
# %% [markdown]
# ## Compare
#
# A row may be read against the published ones only if data, model and schedule have the published
# scale. `caveats` says why not:

# %%
for row in ours:
    print(f"{row.label}: {'; '.join(row.caveats) or 'comparable'}")

# %% [markdown]
# The published rows carry the place where each was read. Grey: all of them, for the two tasks of
# the benchmark that we have a row of; blue: ours, at a smaller scale; dashed: the best predictor
# that has no sequence model at all, such as the counts of the tokens.

# %%
WHITE = {"facecolor": "white", "edgecolor": "none", "pad": 1}
figure, plots = plt.subplots(1, 2, figsize=(11, 2.6))
for axes, task in zip(plots, ("listops", "text"), strict=True):
    theirs = [(r.accuracy(task), r.model) for r in published.ROWS if r.accuracy(task) is not None]
    axes.scatter([a for a, _ in theirs], [1] * len(theirs), color="gray", alpha=0.4)
    best, name = max(theirs)
    axes.annotate(
        name,
        (best, 1),
        xytext=(0, 8),
        textcoords="offset points",
        ha="right",
        fontsize=8,
        bbox=WHITE,
    )
    mine = [row for row in ours if row.config.task == task and row.config.model != "conv5"]
    mine = [row for row in mine if row.config.classifier.window is None]
    axes.scatter(
        [r.accuracy for r in mine], [0] * len(mine), facecolor="white", edgecolor="C0", s=60
    )
    for row in mine:
        axes.annotate(
            row.label, (row.accuracy, 0), xytext=(0, 8), textcoords="offset points",
            ha="center", fontsize=8, bbox=WHITE,
        )  # fmt: skip
    axes.axvline(mine[0].baseline[1], color="gray", linestyle="--", linewidth=1)
    axes.set_yticks([0, 1], ["ours, smaller", "published"])
    axes.set(xlabel="test accuracy in %", title=task, ylim=(-0.5, 1.7), xlim=(10, 100))
figure.suptitle("Published rows, and ours at a smaller scale")
plt.show()
# %% [markdown]
# ## How much of it is local?
#
# Critics of the benchmark found that models which see a few tokens only do well on some tasks. The
# columns "window" test that: the same model, trained as long, on rows cut into pieces of 5 or 61
# tokens, with nothing passing from piece to piece but the mean before the head. "-": not run.

# %%
page.to_terminal(report.accuracies(ours))

# %% [markdown]
# ## Extend
#
# Now a run of your own: the command that `make lra` uses, called as a function, with everything so
# small that it takes seconds. It learns next to nothing; what matters is where it appears. The
# model is one layer of the LRU, which has no committed row yet.

# %%
own = Path(tempfile.mkdtemp())
small = {
    "steps": 20,
    "data.train": 256,
    "data.validation": 64,
    "data.test": 64,
    "data.min_length": 16,
    "data.max_length": 40,
    "lengths": 40,
    "classifier.backbone.layout": "lru",
    "classifier.backbone.width": 16,
    "train.batch_size": 16,
    "train.log_every": 2,
    "train.eval_every": 10,
    "train.warmup_steps": 2,
}
options = [f"--{name}={value}" for name, value in small.items()]
folders = {"run-dir": "run", "results-dir": "results", "cache-dir": "cache"}
options += [f"--{name}={own / folder}" for name, folder in folders.items()]
code = train.main(["--task=listops", "--model=lru", "--preset=cpu", "--no-progress", *options])
assert code == 0

# %%
together = rows.read_rows(rows.COMMITTED, own / "results")
page.to_terminal(report.accuracies([row for row in together if row.config.task == "listops"]))

# %%
mine = next(row for row in together if not row.committed)
figure, axes = plt.subplots(figsize=(8, 3))
for row in together:
    if row.config.task == "listops" and row.config.classifier.window is None:
        points = [(p.tokens, p.loss) for p in row.curve("train") if p.tokens and p.loss]
        name = row.label if row.committed else f"{row.label}, yours"
        axes.plot(*zip(*points, strict=True), "-" if row.committed else "o--", label=name)
axes.set(xlabel="tokens of training", ylabel="training loss", xscale="log")
axes.set_title("Your run beside the committed ones")
axes.legend()
plt.show()

# %% [markdown]
# ## Next
#
# - `seqmodels lra report` prints the whole page, and writes it with its pictures.
# - `seqmodels lra train --task listops --model gla --minutes 10` trains a row that is
#   worth reading. With `--preset paper` on an accelerator it has the published scale.
# - `seqmodels lra report --check listops-s5-cpu-seed0` trains a committed row again, up
#   to its first evaluation, and compares.
