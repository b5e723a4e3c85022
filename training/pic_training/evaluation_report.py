"""The evaluation for people: one HTML page with tables, curves and mistakes."""

import base64
import html
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import matplotlib
import numpy as np
import onnxruntime
from PIL import Image

from pic_daemon.folders import text_of
from pic_daemon.images import open_rgb
from pic_daemon.model import Model
from pic_daemon.promise import Interval
from pic_training.edits import EDITS
from pic_training.evaluation import Evaluation, MethodResult
from pic_training.evaluation_scores import OURS, Scored, sample_file
from pic_training.peers import peer_versions
from pic_training.report import versions
from pic_training.sources import working_side

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.figure import Figure

_MISTAKES = 12
_THUMBNAIL = 120


def as_json(evaluation: Evaluation, model: Model) -> dict[str, Any]:
    """Every figure, ready for json.dumps."""
    return {
        "model": {"sha256": model.sha256, **model.info.to_metadata()},
        "plan": asdict(evaluation.plan),
        "versions": versions() | {"onnxruntime": onnxruntime.__version__} | peer_versions(),
        "counts": evaluation.counts,
        "published": asdict(evaluation.published),
        "published_at_threshold": asdict(evaluation.published_at_threshold),
        "hard_at_own_threshold": {
            name: _figures(result) for name, result in evaluation.own.items()
        },
        "hard": {name: _figures(result) for name, result in evaluation.methods.items()},
    }


def _figures(result: MethodResult) -> dict[str, Any]:
    per_edit = zip(EDITS, result.per_edit, strict=True)
    return {
        **asdict(result),
        "per_edit": {edit.name: asdict(found) for edit, found in per_edit},
    }


def as_html(evaluation: Evaluation, model: Model) -> str:
    """One self-contained page."""
    published = evaluation.published
    rate = f"{evaluation.plan.target_fpr:g}"
    counts = ", ".join(f"{n:,} {name}" for name, n in evaluation.counts.items())
    sections = [
        f"<h1>Evaluation of {html.escape(text_of(model.path.name))}</h1>",
        f"<p>{html.escape(model.info.architecture)}, {model.sha256[:12]}. {counts}.</p>",
        "<h2>Published protocol: augmentations against "
        f"{'general pictures' if evaluation.counts['general pictures'] else 'look-alikes'}"
        "</h2>",
        _table(
            ["", "accuracy", "recall", "false positive rate"],
            [
                [name, _share(c.accuracy), _share(c.recall), _share(c.false_positive_rate)]
                for name, c in (
                    ("at a score of one half", published),
                    ("at the model's threshold", evaluation.published_at_threshold),
                )
            ],
        ),
        f"<h2>Hard protocol: look-alikes, false positive rate {rate}</h2>",
        "<p>Edits are made on copies of the pictures whose longer side is at most "
        f"{working_side(model.info.input_size)} pixels. "
        "Each method at its own threshold, chosen on the calibration half; figures of "
        "the test half, with 95% intervals bootstrapped by picture.</p>",
        _methods_table(evaluation.methods),
        "<p>At the thresholds stored in the files, by which the service decides:</p>",
        _methods_table(evaluation.own),
        _figure(_curves(evaluation)),
        "<h2>Recall by edit</h2>",
        _edits_table(evaluation),
        _figure(_edit_bars(evaluation)),
        "<h2>Shortcut checks</h2>",
        _shortcuts(evaluation),
        f"<h2>Worst mistakes of the {evaluation.decisive}</h2>",
        "<p>Look-alikes with the highest scores, then copies with the lowest; of each "
        "picture the worst.</p>",
        _sheet(evaluation),
    ]
    style = (
        "body{font:15px sans-serif;max-width:60em;margin:2em auto}"
        "table{border-collapse:collapse}td,th{padding:.2em .7em;border:1px solid #ccc;"
        "text-align:right}td:first-child{text-align:left}img{max-width:100%}"
    )
    return (
        "<!doctype html><html lang=en><meta charset=utf-8><title>Evaluation</title>"
        f"<style>{style}</style>{''.join(sections)}</html>\n"
    )


def _share(share: Interval) -> str:
    if share.value is None:
        return "-"
    return f"{share.value:.2%} ({share.low:.2%} to {share.high:.2%})"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    header = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>"
        for row in rows
    )
    return f"<table><tr>{header}</tr>{body}</table>"


def _methods_table(methods: Mapping[str, MethodResult]) -> str:
    return _table(
        [
            "method",
            "threshold",
            "recall, trained edits",
            "recall, held-out edits",
            "measured rate",
            "right item first, trained",
            "held-out",
        ],
        [
            [
                name,
                f"{result.threshold:.4g}",
                _share(result.trained.recall),
                _share(result.held_out.recall),
                _share(result.overall.false_positive_rate),
                *(
                    f"{result.named[kind]:.2%}" if result.named else "-"
                    for kind in ("trained", "held_out")
                ),
            ]
            for name, result in methods.items()
        ],
    )


def _edits_table(evaluation: Evaluation) -> str:
    rows = []
    for number, edit in enumerate(EDITS):
        recalls = [r.per_edit[number].recall for r in evaluation.methods.values()]
        kind = "trained" if edit.trained else "held out"
        rows.append([edit.name, kind, *(_share(recall) for recall in recalls)])
        for result in evaluation.methods.values():
            if result.named_per_edit:
                rows[-1].append(f"{result.named_per_edit[number]:.2%}")
    naming = [n for n, r in evaluation.methods.items() if r.named_per_edit]
    head = ["edit", "", *evaluation.methods, *(f"{name}: item first" for name in naming)]
    return _table(head, rows)


def _shortcuts(evaluation: Evaluation) -> str:
    pristine = evaluation.own[OURS].per_edit[0].recall  # at the model's own threshold
    strangers = evaluation.published_at_threshold.false_positive_rate
    return _table(
        ["check", "result"],
        [
            ["pristine catalog originals that match", _share(pristine)],
            ["augmented strangers that match", _share(strangers)],
        ],
    )


def _curves(evaluation: Evaluation) -> Figure:
    figure, (roc, precision, scores) = pyplot.subplots(1, 3, figsize=(15, 4.5))
    for name in evaluation.methods:
        good = np.sort(evaluation.hard.positives.scores[name])
        bad = np.sort(evaluation.hard.decoys.scores[name])
        cuts = np.unique(np.concatenate([good, bad]))
        recall = 1 - np.searchsorted(good, cuts) / len(good)
        rate = 1 - np.searchsorted(bad, cuts) / len(bad)
        roc.plot(np.maximum(rate, 1e-5), recall, label=name)
        with np.errstate(invalid="ignore"):
            precision.plot(recall, recall / (recall + rate), label=name)
    roc.set(xscale="log", xlabel="false positive rate", ylabel="recall", title="ROC")
    roc.axvline(evaluation.plan.target_fpr, color="grey", linestyle=":")
    precision.set(xlabel="recall", ylabel="precision, classes balanced", title="Precision")
    for scored, label in (
        (evaluation.hard.positives, "copies"),
        (evaluation.hard.decoys, "look-alikes"),
    ):
        scores.hist(
            scored.scores[evaluation.decisive],
            bins=50,
            range=(0, 1),
            alpha=0.6,
            label=label,
        )
    title = f"Scores of the {evaluation.decisive}"
    scores.set(yscale="log", xlabel="score", ylabel="samples", title=title)
    for axes in (roc, precision, scores):
        axes.grid(alpha=0.3)
        axes.legend()
    return figure


def _edit_bars(evaluation: Evaluation) -> Figure:
    figure, axes = pyplot.subplots(figsize=(12, 8))
    height = 0.8 / len(evaluation.methods)
    for place, (name, result) in enumerate(evaluation.methods.items()):
        recalls = [found.recall.value or 0 for found in result.per_edit]
        axes.barh(np.arange(len(EDITS)) + place * height, recalls, height, label=name)
    labels = [e.name + ("" if e.trained else " *") for e in EDITS]
    axes.set_yticks(np.arange(len(EDITS)) + 0.4, labels)
    axes.invert_yaxis()
    rate = f"{evaluation.plan.target_fpr:g}"
    axes.set(xlabel=f"recall at {rate} (* not in training)", xlim=(0, 1))
    axes.grid(alpha=0.3, axis="x")
    axes.legend()
    return figure


def _sheet(evaluation: Evaluation) -> str:
    decoys, positives = evaluation.hard.decoys, evaluation.hard.positives
    worst_in = np.argsort(-decoys.scores[evaluation.decisive], kind="stable")
    worst_out = np.argsort(positives.scores[evaluation.decisive], kind="stable")
    rows = []
    for scored, worst in ((decoys, worst_in), (positives, worst_out)):
        drawn = evaluation.hard.groups[[scored.samples[n].picture for n in worst]]
        _, firsts = np.unique(drawn, return_index=True)  # one picture's edits would fill it
        shown = worst[np.sort(firsts)[:_MISTAKES]]
        cells = "".join(_thumbnail(scored, int(n), evaluation) for n in shown)
        rows.append(f"<div>{cells}</div>")
    return "<hr>".join(rows)


def _thumbnail(scored: Scored, number: int, evaluation: Evaluation) -> str:
    sample, score = scored.samples[number], scored.scores[evaluation.decisive][number]
    source = evaluation.sources.pictures[sample.picture]
    data = sample_file(sample, source, evaluation.sources.file, evaluation.plan.seed)
    image, _ = open_rgb(data, 256)
    image.thumbnail((_THUMBNAIL, _THUMBNAIL), Image.Resampling.BILINEAR)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=85)
    words = f"{source.path.rsplit('/', 1)[-1]}, {EDITS[sample.edit].name}: {score:.4f}"
    if scored.proposed:
        words += f", nearest {scored.proposed.items[scored.proposed.best][number]}"
    name = html.escape(text_of(words))
    return f'<img alt="{name}" title="{name}" src="{_inline(file.getvalue(), "jpeg")}">'


def _figure(figure: Figure) -> str:
    file = io.BytesIO()
    figure.tight_layout()
    figure.savefig(file, format="png", dpi=90)
    pyplot.close(figure)
    return f'<img alt="" src="{_inline(file.getvalue(), "png")}">'


def _inline(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
