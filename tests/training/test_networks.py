from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn

from pic_daemon.errors import InputError
from pic_training.networks import ARCHITECTURES, Normalised, cnn, resnet50


def test_the_cnn_is_the_published_one() -> None:
    layers = list(cnn())
    assert sum(p.numel() for p in cnn().parameters()) == 25_167_785
    convolutions = [layer for layer in layers if isinstance(layer, nn.Conv2d)]
    assert [(c.in_channels, c.out_channels) for c in convolutions] == [
        (3, 4),
        (4, 8),
        (8, 16),
    ]
    assert {(c.kernel_size, c.padding, c.stride) for c in convolutions} == {
        ((3, 3), (1, 1), (1, 1))
    }
    linear = [layer for layer in layers if isinstance(layer, nn.Linear)]
    assert [(m.in_features, m.out_features) for m in linear] == [(65_536, 384), (384, 1)]
    assert linear[0].bias is None
    assert not any("Pool" in type(layer).__name__ for layer in layers)


@pytest.mark.parametrize("name", ["cnn", "resnet50"])
def test_each_architecture_gives_one_logit_per_uint8_image(name: str) -> None:
    architecture = ARCHITECTURES[name]
    network = Normalised(architecture.build("none"), architecture).eval()
    images = torch.randint(0, 256, (2, architecture.size, architecture.size, 3))
    with torch.no_grad():
        logits = network(images.to(torch.uint8))
    assert logits.shape == (2,)
    assert logits.dtype == torch.float32


def test_a_local_state_dict_is_the_start_of_the_resnet(tmp_path: Path) -> None:
    stored = torchvision.models.resnet50().state_dict()
    wrapped = {f"module.pre.{key}": value for key, value in stored.items()}
    torch.save(wrapped, tmp_path / "weights.pth")
    loaded = resnet50(str(tmp_path / "weights.pth")).state_dict()
    assert torch.equal(loaded["layer4.2.conv3.weight"], stored["layer4.2.conv3.weight"])
    assert loaded["fc.weight"].shape == (1, 2048)


def test_wrong_weights_are_named(tmp_path: Path) -> None:
    file = tmp_path / "weights.pth"
    stored = torchvision.models.resnet50().state_dict()

    torch.save(torchvision.models.resnet18().state_dict(), file)
    with pytest.raises(
        InputError, match=r"keys are missing, among them layer1.0.conv3.weight"
    ):
        resnet50(str(file))

    torch.save({**stored, "bn1.weight": torch.zeros(3)}, file)
    with pytest.raises(InputError, match=r"bn1.weight has shape \(3,\), not \(64,\)"):
        resnet50(str(file))

    file.write_text("no state dict")
    with pytest.raises(InputError, match="cannot be read as a state dict"):
        resnet50(str(file))
    with pytest.raises(InputError, match=r"cannot be read as a state dict: .*No such file"):
        resnet50(str(tmp_path / "missing.pth"))
    with pytest.raises(InputError, match="no pretrained weights for the cnn"):
        cnn("imagenet")
