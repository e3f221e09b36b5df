"""Foreign checkpoints convert exactly or are refused with the keys named."""

import pytest
import torch

from models.video import tsm_resnet18, tsm_resnet50
from models.video.checkpoints import CheckpointError, from_torchvision, from_tsm_repository
from models.video.resnet import resnet18


def _tsm_layout(state, *, wrapped="conv1"):
    """The names that the TSM repository gives to a ResNet with residual shifts, trained with DataParallel."""
    renamed = {}
    for key, value in state.items():
        name = f"base_model.{key}" if not key.startswith("fc.") else key.replace("fc.", "new_fc.")
        if "layer" in name and wrapped == "conv1":
            name = name.replace(".conv1.", ".conv1.net.")
        if wrapped == "block" and "layer" in name:
            stage, index, rest = name.removeprefix("base_model.").split(".", 2)
            name = f"base_model.{stage}.{index}.net.{rest}"
        renamed[f"module.{name}"] = value
    return renamed


@pytest.fixture(scope="module")
def model():
    return tsm_resnet18(num_classes=5, width=16)


@pytest.fixture(scope="module")
def source():
    return tsm_resnet18(num_classes=5, width=16).state_dict()


def test_layout_of_these_tests_is_the_repositorys():
    with torch.device("meta"):
        layout = _tsm_layout(tsm_resnet50().state_dict())

    for key in (
        "module.base_model.conv1.weight",
        "module.base_model.layer1.0.conv1.net.weight",
        "module.base_model.layer3.5.bn3.num_batches_tracked",
        "module.base_model.layer4.0.downsample.0.weight",
        "module.new_fc.weight",
    ):
        assert key in layout


@pytest.mark.parametrize("wrapped", ["conv1", "block", "nothing"])
def test_tsm_checkpoint_loads_strictly_with_every_value(model, source, wrapped):
    layout = _tsm_layout(source, wrapped=wrapped)
    in_another_order = dict(reversed(layout.items()))

    converted = from_tsm_repository(in_another_order, target=model.state_dict())

    assert list(converted) == list(model.state_dict())
    assert all(converted[key] is source[key] for key in source)
    model.load_state_dict(converted, strict=True)


def test_tsm_checkpoint_without_dataparallel_or_dropout_loads_too(model, source):
    layout = {
        key.removeprefix("module.").replace("new_fc", "base_model.fc"): value
        for key, value in _tsm_layout(source).items()
    }

    assert from_tsm_repository(layout, target=model.state_dict()).keys() == source.keys()


def test_keep_head_false_keeps_the_targets_own_classes(source):
    other = tsm_resnet18(num_classes=9, width=16)

    converted = from_tsm_repository(_tsm_layout(source), target=other.state_dict(), keep_head=False)

    assert torch.equal(converted["fc.weight"], other.fc.weight)
    assert converted["layer1.0.conv1.weight"] is source["layer1.0.conv1.weight"]


def test_other_classes_are_refused_with_what_to_do(source):
    other = tsm_resnet18(num_classes=9, width=16)

    with pytest.raises(CheckpointError, match=r"fc.weight \(5, 128\) instead of \(9, 128\).*pass keep_head=False"):
        from_tsm_repository(_tsm_layout(source), target=other.state_dict())


def test_imagenet_weights_load_without_their_head(model):
    imagenet = resnet18(num_classes=1000, width=16).state_dict()
    del imagenet["bn1.num_batches_tracked"]  # the files of before 2018 have none

    converted = from_torchvision(imagenet, target=model.state_dict())

    assert converted["conv1.weight"] is imagenet["conv1.weight"]
    assert torch.equal(converted["fc.weight"], model.fc.weight)
    assert converted["bn1.num_batches_tracked"] == 0
    model.load_state_dict(converted, strict=True)


def test_imagenet_head_can_be_kept():
    imagenet = resnet18(num_classes=10, width=16).state_dict()
    target = resnet18(num_classes=10, width=16).state_dict()

    assert from_torchvision(imagenet, target=target, keep_head=True)["fc.weight"] is imagenet["fc.weight"]


def test_conversion_leaves_both_inputs_alone(model, source):
    layout = _tsm_layout(source)
    keys, target = list(layout), dict(model.state_dict())

    from_tsm_repository(layout, target=target, keep_head=False)

    assert list(layout) == keys
    assert all(target[key] is value for key, value in dict(target).items())
    assert list(target) == list(model.state_dict())


def _without(key):
    return lambda layout: layout.pop(key)


def _with(key, value=None):
    return lambda layout: layout.update({key: torch.zeros(1) if value is None else value})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_without("module.base_model.layer1.0.conv1.net.weight"), "missing: layer1.0.conv1.weight"),
        (_with("module.base_model.layer9.weight"), "unknown: layer9.weight"),
        (_with("module.stem.weight"), "unknown key 'module.stem.weight'; expected names like"),
        (_with("module.base_model.layer1.0.conv1.weight"), "two keys map to 'layer1.0.conv1.weight'"),
        (_with("module.base_model.layer2.0.nl.g.weight"), "has non-local blocks"),
        (_with("module.base_model.features.0.0.weight"), "is a MobileNetV2"),
        (_with("module.base_model.layer2.net.0.conv1.net.weight"), "was trained with temporal pooling"),
        (_with("module.base_model.conv1.weight", torch.zeros(16, 10, 7, 7)), r"conv1.weight \(16, 10, 7, 7\) instead"),
        (_with("epoch", 50), "'epoch' is a int, not a tensor"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_with_the_key_named(model, source, damage, message):
    layout = _tsm_layout(source)
    damage(layout)

    with pytest.raises(CheckpointError, match=message):
        from_tsm_repository(layout, target=model.state_dict())


def test_a_whole_checkpoint_file_is_refused_with_the_entry_to_pass(model, source):
    with pytest.raises(CheckpointError, match="pass its entry 'state_dict'"):
        from_tsm_repository({"epoch": 50, "state_dict": _tsm_layout(source)}, target=model.state_dict())


def test_weights_of_another_depth_name_what_is_left_over_and_how_many_more(model):
    with torch.device("meta"):
        deeper = tsm_resnet50(num_classes=5, width=16).state_dict()

    with pytest.raises(CheckpointError, match=r"unknown: .* and \d+ more.*check depth, width"):
        from_torchvision(deeper, target=model.state_dict())
