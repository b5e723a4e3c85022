"""One evaluation as a Markdown table for bench/results.

    python bench/evaluation.py REPORT_DIR

REPORT_DIR is what `pic-evaluate --output` wrote.
"""

import json
from pathlib import Path
from typing import Any

import click


@click.command()
@click.argument("report", type=click.Path(path_type=Path, exists=True, file_okay=False))
def main(report: Path) -> None:
    figures = json.loads((report / "evaluation.json").read_text())
    published = figures["published"]
    print("Published protocol: accuracy", share(published["accuracy"]))
    print(
        f"\nHard protocol at a false positive rate of {figures['plan']['target_fpr']:g}:\n"
    )
    methods = figures["hard"]
    print("| | trained edits | held-out edits | measured rate |\n|---|---|---|---|")
    for name, found in methods.items():
        rate = found["overall"]["false_positive_rate"]
        recalls = (found["trained"]["recall"], found["held_out"]["recall"])
        print(f"| {name} | {share(recalls[0])} | {share(recalls[1])} | {share(rate)} |")
    print(f"\n| edit | {' | '.join(methods)} |\n|---|{'---|' * len(methods)}")
    for edit in methods["model"]["per_edit"]:
        cells = [f"{m['per_edit'][edit]['recall']['value']:.1%}" for m in methods.values()]
        print(f"| {edit} | {' | '.join(cells)} |")


def share(found: dict[str, Any]) -> str:
    return f"{found['value']:.2%} ({found['low']:.2%} to {found['high']:.2%})"


if __name__ == "__main__":
    main()
