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
    tables(report)


def tables(report: Path) -> None:
    figures = json.loads((report / "evaluation.json").read_text())
    print(", ".join(f"{count:,} {what}" for what, count in figures["counts"].items()))
    print("\nPublished protocol: accuracy", share(figures["published"]["accuracy"]))
    rate = figures["plan"]["target_fpr"]
    print(f"\nHard protocol at a false positive rate of {rate:g}:\n")
    methods = figures["hard"]
    overall(methods)
    print("\nAt the thresholds stored in the files:\n")
    overall(figures["hard_at_own_threshold"])
    naming = {name: m["named"] for name, m in methods.items() if m["named"]}
    print("\n| right item first | trained edits | held-out edits |\n|---|---|---|")
    for name, named in naming.items():
        print(f"| {name} | {named['trained']:.1%} | {named['held_out']:.1%} |")
    last = list(naming)[-1:]
    served = figures["hard_at_own_threshold"]
    beside = [f"{n}, as served" for n in last if n in served]
    beside += [f"{n}: item first" for n in last]
    print(f"\n| edit | {' | '.join([*methods, *beside])} |")
    print(f"|---|{'---|' * (len(methods) + len(beside))}")
    for number, edit in enumerate(methods["model"]["per_edit"]):
        cells = [m["per_edit"][edit]["recall"]["value"] for m in methods.values()]
        cells += [
            served[n]["per_edit"][edit]["recall"]["value"] for n in last if n in served
        ]
        cells += [methods[name]["named_per_edit"][number] for name in last]
        print(f"| {edit} | {' | '.join(f'{cell:.1%}' for cell in cells)} |")


def overall(methods: dict[str, Any]) -> None:
    print("| | threshold | trained edits | held-out edits | measured rate |")
    print("|---|---|---|---|---|")
    for name, found in methods.items():
        rate = found["overall"]["false_positive_rate"]
        recalls = (found["trained"]["recall"], found["held_out"]["recall"])
        shares = " | ".join(map(share, (*recalls, rate)))
        print(f"| {name} | {found['threshold']:.4g} | {shares} |")


def share(found: dict[str, Any]) -> str:
    return f"{found['value']:.2%} ({found['low']:.2%} to {found['high']:.2%})"


if __name__ == "__main__":
    main()
