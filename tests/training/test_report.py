from pathlib import Path

from PIL import Image

from pic_training.report import draw_plot
from pic_training.run_folder import EpochMetrics


def test_the_plot_is_a_picture(tmp_path: Path) -> None:
    history = [EpochMetrics(n, 1 / n, 0.5, 1 / n, 0.5, 1.0, 1.0, 1.0, 1.0) for n in (1, 2)]
    draw_plot(history, tmp_path / "plot.png")
    image = Image.open(tmp_path / "plot.png").convert("RGB")
    assert len(image.getcolors(1 << 20) or []) > 50
