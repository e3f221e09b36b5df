"""Models by name: every listed one builds, a user's own function too, and what is misspelled gets a suggestion."""

import sys

import pytest
import torch
from torch import nn

from models.video import MODELS, TSM, build

OWN_MODEL = """
from torch import nn

def small_network(*, num_classes, width=4):
    return nn.Linear(width, num_classes)

def anything(**options):
    return nn.Linear(1, len(options))

def not_a_model():
    return "logits"
"""


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    (tmp_path / "my_project").mkdir()
    (tmp_path / "my_project" / "networks.py").write_text(OWN_MODEL)
    (tmp_path / "my_project" / "broken.py").write_text("import a_package_that_is_not_installed\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield "my_project.networks"
    for name in [name for name in sys.modules if name.split(".")[0] == "my_project"]:
        del sys.modules[name]


@pytest.mark.parametrize("name", MODELS)
def test_every_listed_model_builds_under_the_name_of_its_function(name):
    with torch.device("meta"):
        model = build(name, num_classes=7, num_segments=4, width=16, stem_stride=2)

    assert MODELS[name].__name__ == name
    assert model.fc.out_features == 7
    assert model.num_segments == 4
    assert isinstance(model, TSM) == name.startswith("tsm")
    num_blocks = {18: 8, 34: 16, 50: 16, 101: 33}[int(name.partition("resnet")[2])]
    assert len(list(model.blocks())) == num_blocks


def test_a_users_own_function_is_built_by_package_module_and_function(own_module):
    model = build(f"{own_module}:small_network", num_classes=3)

    assert isinstance(model, nn.Linear)
    assert model.out_features == 3
    assert build(f"{own_module}:anything", a=1, b=2).out_features == 2


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("tsm_resnet5O", {}, "unknown model 'tsm_resnet5O'; did you mean 'tsm_resnet50'?"),
        ("transformer", {}, "unknown model 'transformer'; known are tsm_resnet18, .*package.module:function"),
        ("tsm_resnet18", {"num_clases": 5}, "unknown argument 'num_clases'; did you mean 'num_classes'?"),
        ("tsm_resnet18", {"widht": 5}, "unknown argument 'widht'; did you mean 'width'?"),
        ("tsn_resnet18", {"shift_div": 8}, "unknown argument 'shift_div'.*it takes num_classes, num_segments"),
        ("tsm_resnet18", {"shift_div": 0}, "fold_div=0"),
        (":tsm_resnet18", {}, "write your own model as 'package.module:function'"),
        ("no_such_package.networks:f", {}, "there is no module 'no_such_package'"),
        ("my_project.network:f", {}, "there is no module 'my_project.network'"),
        ("my_project.networks:smal_network", {}, "no function 'smal_network'; did you mean 'small_network'?"),
        ("my_project.networks:small_network", {}, "needs the argument 'num_classes'"),
        ("my_project.networks:not_a_model", {}, "returned a str, not an nn.Module"),
    ],
)
def test_what_cannot_be_built_is_refused_with_the_nearest_name(own_module, name, arguments, message):
    with pytest.raises(ValueError, match=message):
        build(name, **arguments)


def test_an_import_that_fails_inside_a_users_module_is_not_disguised(own_module):
    with pytest.raises(ModuleNotFoundError, match="a_package_that_is_not_installed"):
        build("my_project.broken:f")
