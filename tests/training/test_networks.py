from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn

from pic_daemon.errors import InputError
from pic_training.networks import ARCHITECTURES, Normalised, cnn_trunk, resnet50_trunk


def test_the_cnn_is_the_published_one() -> None:
    network = Normalised(ARCHITECTURES["cnn"])
    layers = [*network.trunk.children(), network.head]
    assert sum(p.numel() for p in network.parameters()) == 25_167_785
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


@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_each_architecture_gives_one_logit_per_uint8_image(name: str) -> None:
    architecture = ARCHITECTURES[name]
    network = Normalised(architecture).eval()
    images = torch.randint(0, 256, (2, architecture.size, architecture.size, 3))
    with torch.no_grad():
        logits = network(images.to(torch.uint8))
    assert logits.shape == (2,)
    assert logits.dtype == torch.float32


def test_a_local_state_dict_is_the_start_of_the_resnet(tmp_path: Path) -> None:
    stored = torchvision.models.resnet50().state_dict()
    wrapped = {f"module.pre.{key}": value for key, value in stored.items()}
    torch.save(wrapped, tmp_path / "weights.pth")
    loaded = resnet50_trunk(str(tmp_path / "weights.pth")).state_dict()
    assert torch.equal(loaded["layer4.2.conv3.weight"], stored["layer4.2.conv3.weight"])
    assert not any(key.startswith("fc.") for key in loaded)


def test_frozen_stages_stay_as_they_are_while_the_rest_is_trained() -> None:
    architecture = ARCHITECTURES["resnet50"]
    network = Normalised(architecture)
    network.freeze(architecture.stages[:-1])
    before = {key: value.clone() for key, value in network.state_dict().items()}
    learned = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(learned, 0.1)
    images = torch.randint(0, 256, (4, 64, 64, 3), dtype=torch.uint8)
    network.train()(images).sum().backward()
    optimizer.step()
    changed = {key for key, value in network.state_dict().items()
               if not torch.equal(value, before[key])}  # fmt: skip
    stages = {key.split(".")[1] for key in changed if key.startswith("trunk.")}
    assert stages == {"layer4"}
    assert "trunk.layer4.0.bn1.running_mean" in changed
    assert "head.weight" in changed


def test_statistics_that_are_kept_stay_while_the_weights_beside_them_are_trained() -> None:
    network = Normalised(ARCHITECTURES["resnet50"])
    network.keep_statistics()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    images = torch.randint(0, 256, (4, 64, 64, 3), dtype=torch.uint8)
    network.train()(images).sum().backward()
    torch.optim.SGD(network.parameters(), 0.1).step()
    changed = {key for key, value in network.state_dict().items()
               if not torch.equal(value, before[key])}  # fmt: skip
    assert "trunk.layer4.0.bn1.weight" in changed
    assert not any("running" in key or "num_batches" in key for key in changed)


def test_wrong_weights_are_named(tmp_path: Path) -> None:
    file = tmp_path / "weights.pth"
    stored = torchvision.models.resnet50().state_dict()

    torch.save(torchvision.models.resnet18().state_dict(), file)
    with pytest.raises(
        InputError, match=r"keys are missing, among them layer1.0.conv3.weight"
    ):
        resnet50_trunk(str(file))

    torch.save({**stored, "bn1.weight": torch.zeros(3)}, file)
    with pytest.raises(InputError, match=r"bn1.weight has shape \(3,\), not \(64,\)"):
        resnet50_trunk(str(file))

    file.write_text("no state dict")
    with pytest.raises(InputError, match="cannot be read as a state dict"):
        resnet50_trunk(str(file))
    with pytest.raises(InputError, match=r"missing.pth cannot be read: No such file"):
        resnet50_trunk(str(tmp_path / "missing.pth"))
    for value in (0.5, torch.full((64, 3, 7, 7), float("nan"))):
        torch.save({**resnet50_trunk("none").state_dict(), "conv1.weight": value}, file)
        with pytest.raises(InputError, match=r"conv1\.weight holds no numbers"):
            resnet50_trunk(str(file))
    with pytest.raises(InputError, match="no pretrained weights for the cnn"):
        cnn_trunk("imagenet")
