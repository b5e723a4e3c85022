"""Which views of an item and of a query are worth a description: is the item proposed?

    python bench/views.py MODEL.onnx --catalog DIR --work DIR [--per-edit 20]

So many catalog pictures under each of the 27 edits, against the whole catalog. A copy is
proposed where its item is among the nearest few, each item by the nearest of its views to
any view of the query. Vectors are kept in the work folder. Prints Markdown.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import click
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from pic_daemon.descriptor import Descriptor, load_descriptor
from pic_daemon.identification import side_for
from pic_daemon.images import open_rgb, to_pixels
from pic_daemon.margins import within_margins
from pic_training.edits import EDITS

TRAINED = np.array([edit.trained for edit in EDITS])
NEAREST = (1, 3, 5, 10)


def grey(picture: Image.Image) -> Image.Image:
    return picture.convert("L").convert("RGB")


VIEWS: dict[str, Callable[[Image.Image], Image.Image | None]] = {
    "whole": lambda picture: picture,
    "mirrored": ImageOps.mirror,
    "grey": grey,
    "within": within_margins,
    "within, mirrored": lambda p: (w := within_margins(p)) and ImageOps.mirror(w),
}
CHOICES: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (("whole",), ("whole",)),
    (("whole",), ("whole", "mirrored")),
    (("whole",), ("whole", "mirrored", "grey")),
    (("whole", "within"), ("whole", "mirrored")),
    (("whole", "within"), ("whole", "mirrored", "within")),
    (("whole", "within"), ("whole", "mirrored", "grey", "within")),
    (("whole", "within"), tuple(VIEWS)),
    (("whole", "within", "grey"), ("whole", "mirrored", "grey", "within")),
    (("within or whole",), ("whole", "mirrored", "grey", "within")),
)


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--catalog", required=True, type=click.Path(path_type=Path))
@click.option("--work", required=True, type=click.Path(path_type=Path))
@click.option("--per-edit", default=20, show_default=True)
def main(model: Path, catalog: Path, work: Path, per_edit: int) -> None:
    descriptor = load_descriptor(model, "cpu")
    paths = sorted(catalog.iterdir())
    draw = np.random.default_rng(0)
    drawn = [
        (int(n), edit)
        for edit in range(len(EDITS))
        for n in draw.choice(len(paths), per_edit, replace=False)
    ]
    size = side_for(descriptor.info.input_size)

    def known() -> list[Image.Image]:
        return [open_rgb(path.read_bytes(), size)[0] for path in paths]

    def queries() -> list[Image.Image]:
        found = []
        for n, edit in drawn:
            picture = Image.open(paths[n]).convert("RGB")
            data = EDITS[edit].apply(picture, np.random.default_rng([n, edit]))
            found.append(open_rgb(data, size)[0])
        return found

    work.mkdir(parents=True, exist_ok=True)
    items = described(descriptor, known, work / f"items-{descriptor.sha256[:12]}.npz")
    kept = work / f"queries-{per_edit}-{descriptor.sha256[:12]}.npz"
    report(drawn, items, described(descriptor, queries, kept))


def described(
    descriptor: Descriptor, pictures: Callable[[], list[Image.Image]], kept: Path
) -> dict[str, NDArray[np.float32]]:
    """The vectors of every view; zero where a picture has no such view."""
    if kept.exists():
        with np.load(kept) as found:
            return dict(found)
    seen, size = pictures(), descriptor.info.input_size
    vectors = {}
    for name, view in VIEWS.items():
        found = np.zeros((len(seen), descriptor.info.dimensions), np.float32)
        there = [(n, v) for n, picture in enumerate(seen) if (v := view(picture))]
        for start in range(0, len(there), 32):
            part = there[start : start + 32]
            numbers = [n for n, _ in part]
            pixels = np.stack([to_pixels(v, size) for _, v in part])
            found[numbers] = descriptor.describe(pixels)
        vectors[name] = found
    np.savez(kept, **vectors)
    return vectors


def report(
    drawn: Sequence[tuple[int, int]], items: dict[str, NDArray[np.float32]],
    queries: dict[str, NDArray[np.float32]],
) -> None:  # fmt: skip
    own, edits = np.array(drawn).T
    trained = TRAINED[edits]
    there = queries["within"].any(axis=1)
    queries["within or whole"] = np.where(
        there[:, None], queries["within"], queries["whole"]
    )
    print(f"{len(drawn)} copies, {there.mean():.0%} of them with margins; of the items "
          f"{items['within'].any(axis=1).mean():.0%}\n")  # fmt: skip
    head = [f"held-out: in {n}" for n in NEAREST] + ["trained: in 1", "in 5"]
    print("| query | item | descriptions a query | " + " | ".join(head) + " |")
    print("|---" * (3 + len(head)) + "|")
    for asked, known in CHOICES:
        cosines = np.maximum.reduce([queries[q] @ items[k].T for q in asked for k in known])
        place = (cosines > cosines[np.arange(len(own)), own][:, None]).sum(axis=1)
        cells = [(place[~trained] < n).mean() for n in NEAREST]
        cells += [(place[trained] < n).mean() for n in (1, 5)]
        count = sum(queries[q].any(axis=1).mean() for q in asked)
        row = " | ".join(f"{cell:.1%}" for cell in cells)
        print(f"| {', '.join(asked)} | {', '.join(known)} | {count:.2f} | {row} |")


if __name__ == "__main__":
    main()
