"""How fast the service works off a backlog, beside its limit and what else one could use.

    python bench/throughput.py --images DIR --model MODEL.onnx --work DIR

--images holds photos of several megapixels. From them it makes folders of JPEGs of about
500 x 400, of 2 and of 12 megapixels, PNG and WebP, each file with bytes of its own. On each
it runs in turn, --rounds times: the limit (libjpeg-turbo's scaled decode to 64 pixels and
nothing else, all cores), pic-daemon from its start to the last committed row, pHash and PDQ
(all cores), and a naive loop (watchdog, full decode, batch of one, a commit a row). Writes
throughput.json and throughput.png to --work and prints tables in Markdown.
"""

import io
import json
import multiprocessing
import os
import queue
import sqlite3
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterable
from contextlib import suppress
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from statistics import median

import click
import imagehash
import matplotlib
import numpy as np
import simplejpeg
from PIL import Image
from watchdog.events import FileCreatedEvent, FileMovedEvent, FileSystemEventHandler
from watchdog.observers import Observer

from pic_daemon.decoding import keep_freed_memory
from pic_daemon.model import load_model

matplotlib.use("Agg")
from matplotlib import pyplot

BIN = Path(sys.executable).parent
PORT = 9467
SETS = {  # longest side in pixels, format, files for the service
    "JPEG 500 px": (500, "JPEG", 10_000),
    "JPEG 2 MP": (1650, "JPEG", 5_000),
    "JPEG 12 MP": (4080, "JPEG", 500),
    "PNG 500 px": (500, "PNG", 5_000),
    "WebP 500 px": (500, "WEBP", 5_000),
}
PEERS_S = 6.0  # how long a peer is given, at most
STAGES = ("decode", "inference", "commit", "choose", "wait")
CPU = ("workers CPU", "main CPU")


@click.command()
@click.option("--images", required=True, type=click.Path(path_type=Path, exists=True))
@click.option("--model", required=True, type=click.Path(path_type=Path, exists=True))
@click.option("--work", required=True, type=click.Path(path_type=Path))
@click.option("--rounds", default=3, show_default=True)
@click.option("--only", multiple=True, type=click.Choice([*SETS]), help="These sets alone.")
@click.option("--daemon-only", is_flag=True, help="Leave the peers out.")
@click.option("--provider", default="auto", help="The service's.", show_default=True)
@click.option("--count", type=int, help="Files in each folder [as many as suit its kind].")
def main(
    images: Path,
    model: Path,
    work: Path,
    rounds: int,
    only: tuple[str, ...],
    daemon_only: bool,
    provider: str,
    count: int | None,
) -> None:
    if not daemon_only and not find_spec("pdqhash"):
        raise click.UsageError("PDQ wants pip install '.[peers]'; or --daemon-only")
    work.mkdir(parents=True, exist_ok=True)
    results: dict[str, list[dict[str, float]]] = {}
    context = multiprocessing.get_context("forkserver")
    with context.Pool(initializer=keep_freed_memory) as pool:
        for name in only or SETS:
            side, kind, usual = SETS[name]
            files = corpus(images, work, name, side, kind, count or usual)
            pool.map(scaled_decode, files)  # warms the page cache and the pool
            results[name] = []
            for number in range(rounds):
                rates = {"limit": rate(pool, scaled_decode, files)}
                rates |= service(files[0].parent, len(files), model, work, provider)
                if not daemon_only:
                    rates["pHash"] = rate(pool, phash, files)
                    rates["PDQ"] = rate(pool, pdq, files)
                    rates["naive"] = naive(files[:400], model, work / "naive")
                print(name, number, json.dumps({k: round(v, 3) for k, v in rates.items()}))
                results[name].append(rates)
    (work / "throughput.json").write_text(json.dumps(results, indent=1))
    report(results)
    picture(results, work / "throughput.png")


def corpus(
    images: Path, work: Path, name: str, side: int, kind: str, count: int
) -> list[Path]:
    folder = work / f"{name.replace(' ', '-')}-{count}"
    files = [folder / f"{n:06d}.{kind.lower()}" for n in range(count)]
    if folder.exists():
        return files
    folder.mkdir()
    pictures = []
    for path in sorted(images.iterdir()):
        with Image.open(path) as opened:
            if max(opened.size) >= min(side, 3900):
                picture = opened.convert("RGB")
                picture = picture.resize(
                    [round(n * side / max(picture.size)) for n in picture.size]
                )
                data = io.BytesIO()
                picture.save(data, kind, quality=85)
                pictures.append(data.getvalue())
    for number, file in enumerate(files):
        # A tail that no decoder reads makes each file's content its own.
        file.write_bytes(pictures[number % len(pictures)] + number.to_bytes(8))
    return files


def rate(pool, work: Callable[[Path], None], files: list[Path]) -> float:  # type: ignore[no-untyped-def]
    """Images a second, of as many files as take PEERS_S: at the end alone does a core wait
    for another."""

    def took(part: list[Path]) -> float:
        begun = time.perf_counter()
        pool.map(work, part, chunksize=8)
        return time.perf_counter() - begun

    some = files[: 8 * 2 * (os.cpu_count() or 1)]
    took(some)  # which imports what it needs
    part = files[: max(len(some), round(len(some) * PEERS_S / took(some)))]
    return len(part) / took(part)


def scaled_decode(path: Path) -> None:
    data = path.read_bytes()
    if data.startswith(b"\xff\xd8"):  # simplejpeg.is_jpeg wants the end marker last
        simplejpeg.decode_jpeg(data, "RGB", min_height=64, min_width=64)
    else:
        Image.open(io.BytesIO(data)).load()


def phash(path: Path) -> None:
    with Image.open(path) as image:
        imagehash.phash(image)


def pdq(path: Path) -> None:
    import pdqhash  # of the extra `peers`

    with Image.open(path) as image:
        pdqhash.compute(np.asarray(image.convert("RGB")))


def service(
    folder: Path, count: int, model: Path, work: Path, provider: str
) -> dict[str, float]:
    database = work / "throughput.db"
    for file in work.glob("throughput.db*"):
        file.unlink()
    command = [BIN / "pic-daemon", "run", "--watch", folder, "--model", model]
    command += ["--database", database, "--metrics", f"127.0.0.1:{PORT}"]
    command += ["--provider", provider]
    log = work / "daemon.log"
    begun = time.time()
    with log.open("w") as stream:
        process = subprocess.Popen(
            [*map(str, command)], stderr=stream, start_new_session=True
        )
    try:
        while "ready" not in log.read_text():
            assert process.poll() is None, log.read_text()
            time.sleep(0.01)
        ready = time.time()
        _, main_before, workers_before = usage(process.pid)
        rss = 0
        done: tuple[int, str | None] = (0, None)
        while done[0] < count:
            time.sleep(0.25)
            assert process.poll() is None, "the service ended"
            done = ask(database)
            resident, main_s, workers_s = usage(process.pid)
            rss = max(rss, resident)
        stages = scrape()
    finally:
        process.terminate()
        process.wait()
    assert done[1]
    took = datetime.fromisoformat(done[1]).timestamp() - ready
    return {
        "service": count / took,
        "service from start": count / (took + ready - begun),
        "start-up s": ready - begun,
        "RSS MiB": rss / 2**20,
        "main CPU ms": 1000 * (main_s - main_before) / count,
        "workers CPU ms": 1000 * (workers_s - workers_before) / count,
        **{f"{stage} ms": 1000 * stages.get(stage, 0.0) / count for stage in STAGES},
    }


def ask(database: Path) -> tuple[int, str | None]:
    connection = sqlite3.connect(f"file:{database}?mode=ro", uri=True, timeout=60)
    row = connection.execute("SELECT count(*), max(classified_at) FROM images").fetchone()
    connection.close()
    return row  # type: ignore[no-any-return]


def usage(service: int) -> tuple[int, float, float]:
    """Resident bytes of all processes of a session, what they share counted each time;
    CPU seconds of the one that leads it, and of the others."""
    pages, seconds = 0, {True: 0.0, False: 0.0}
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            fields = (process / "stat").read_text().rsplit(")", 1)[1].split()
            if int(fields[3]) == service:
                pages += int(fields[21])
                ticks = int(fields[11]) + int(fields[12])
                seconds[int(process.name) == service] += ticks / os.sysconf("SC_CLK_TCK")
    return pages * os.sysconf("SC_PAGESIZE"), seconds[True], seconds[False]


def scrape() -> dict[str, float]:
    text = urllib.request.urlopen(f"http://127.0.0.1:{PORT}/metrics").read().decode()
    prefix = "pic_stage_seconds_total{stage="
    rows = [line.removeprefix(prefix) for line in text.splitlines() if prefix in line]
    return {row.split('"')[1]: float(row.split()[-1]) for row in rows}


class _Arrivals(FileSystemEventHandler):
    def __init__(self, inbox: "queue.Queue[str]") -> None:
        self.inbox = inbox

    def on_created(self, event) -> None:  # type: ignore[no-untyped-def]
        if isinstance(event, FileCreatedEvent):
            self.inbox.put(str(event.src_path))

    def on_moved(self, event) -> None:  # type: ignore[no-untyped-def]
        if isinstance(event, FileMovedEvent):
            self.inbox.put(str(event.dest_path))


def naive(files: Iterable[Path], model: Path, folder: Path) -> float:
    """What one writes in an afternoon, in one thread."""
    folder.mkdir(exist_ok=True)
    database = folder.with_suffix(".db")
    for file in (*folder.iterdir(), *folder.parent.glob("naive.db*")):
        file.unlink()
    session = load_model(model, "cpu").session
    size = session.get_inputs()[0].shape[1]
    connection = sqlite3.connect(database)
    connection.execute("CREATE TABLE rows (path TEXT, score REAL)")
    inbox: queue.Queue[str] = queue.Queue()
    observer = Observer()
    observer.schedule(_Arrivals(inbox), str(folder))
    observer.start()
    begun = time.perf_counter()
    done = 0
    for file in files:
        os.link(file, folder / file.name)
    while True:
        try:
            path = inbox.get(timeout=1)
        except queue.Empty:
            break
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB").resize((size, size)))
        (scores,) = session.run(["score"], {"images": pixels[None]})
        connection.execute("INSERT INTO rows VALUES (?, ?)", [path, float(scores[0])])
        connection.commit()
        done += 1
        ended = time.perf_counter()
        if ended - begun > PEERS_S:
            break
    observer.stop()
    observer.join()
    connection.close()
    return done / (ended - begun)


def report(results: dict[str, list[dict[str, float]]]) -> None:
    columns = [key for key in next(iter(results.values()))[0] if not key.endswith(" ms")]
    print("| images/s, median (lowest to highest) | " + " | ".join(columns) + " |")
    print("|---" * (len(columns) + 1) + "|")
    for name, rounds in results.items():
        print(f"| {name} | " + " | ".join(spread(rounds, key) for key in columns) + " |")
    peers = [key for key in ("limit", "pHash", "PDQ", "naive") if key in columns]
    print("\n| service, as a multiple of | " + " | ".join(peers) + " |")
    print("|---" * (len(peers) + 1) + "|")
    for name, rounds in results.items():
        ratios = [{key: r["service"] / r[key] for key in peers} for r in rounds]
        print(f"| {name} | " + " | ".join(spread(ratios, key, 2) for key in peers) + " |")
    print("\n| ms an image | " + " | ".join(STAGES + CPU) + " |")
    print("|---" * (len(STAGES + CPU) + 1) + "|")
    for name, rounds in results.items():
        cells = [spread(rounds, f"{stage} ms", 3) for stage in STAGES + CPU]
        print(f"| {name} | " + " | ".join(cells) + " |")


def spread(rounds: list[dict[str, float]], key: str, digits: int = 0) -> str:
    values = [r[key] for r in rounds]
    low, high = min(values), max(values)
    return f"{median(values):,.{digits}f} ({low:,.{digits}f} to {high:,.{digits}f})"


def picture(results: dict[str, list[dict[str, float]]], path: Path) -> None:
    """Time per image of the three that work side by side: decoders, network, loop."""
    figure, axes = pyplot.subplots(figsize=(8, 0.8 + 0.7 * len(results)))
    names = [*results]
    left = np.zeros(len(names))
    for stage in STAGES:
        share = (os.cpu_count() or 1) if stage == "decode" else 1
        values = [median(r[f"{stage} ms"] for r in results[n]) / share for n in names]
        if stage in ("decode", "inference"):
            row = -0.27 if stage == "decode" else 0.0
            label = "decode / cores" if stage == "decode" else stage
            axes.barh(np.arange(len(names)) + row, values, 0.25, label=label)
        else:
            axes.barh(
                np.arange(len(names)) + 0.27,
                values,
                0.25,
                left=left,
                label=f"loop: {stage}",
            )
            left += values
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel("ms an image, side by side")
    axes.invert_yaxis()
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
