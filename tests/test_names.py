"""Names from data: what is refused, with a reason, and what may name a task."""

import pytest
from torch import nn

from dymoe import DymoeError
from dymoe.names import ATTRIBUTES, free_name, parts_of, safe_name, safe_names

REFUSED = {
    "": "empty",
    "a/b": "part paths",
    "a\\b": "part paths",
    "v1.0": "part paths",
    "VQA.v2": "part paths",
    "..": "part paths",
    ".hidden": "part paths",
    "-x": "begin with a letter",
    "_parameters": "begin with a letter",
    "__class__": "begin with a letter",
    " birds": "begin with a letter",
    "birds ": "end in a space",
    "a\nb": "cannot be shown",
    "a\x1b[31mb": "cannot be shown",
    "a\u202eb": "cannot be shown",
    "a\ud800b": "cannot be shown",
    "0": "digits alone",
    "2026": "digits alone",
    "x" * 65: "allowed",
    "\u9ce5" * 64: None,
    "\U00020000" * 64: "allowed",
    "training": "attribute",
    "keys": "attribute",
    "items": "attribute",
    "type": "attribute",
    "forward": "attribute",
    "T_destination": "attribute",
    "model": "parameter names",
    "base_model": "parameter names",
    "base_layer": "parameter names",
    "dymoe_A": "parameter names",
}


@pytest.mark.parametrize("name", REFUSED, ids=ascii)
def test_what_cannot_name_a_group_and_a_file_is_refused_with_the_reason(name):
    if REFUSED[name] is None:
        assert safe_name(name) == name
        return
    with pytest.raises(DymoeError) as caught:
        safe_name(name, "stream.yaml: tasks")
    message = str(caught.value)
    assert message.startswith("stream.yaml: tasks: ")
    assert REFUSED[name] in message
    assert "for example 'birds'" in message
    assert message.isprintable()
    assert len(message) < 400


@pytest.mark.parametrize("name", [0, None, True, b"a", 1.5, ["a"]], ids=repr)
def test_what_is_no_text_is_refused(name):
    with pytest.raises(DymoeError, match="expected a text"):
        safe_name(name)


@pytest.mark.parametrize(
    "name",
    ["ScienceQA", "birds & plates", "V\u00f6gel", "task-1", "task_1", "\u9ce5", "default", "probe", "dymoe", "Items"],
)
def test_everyday_names_are_taken_as_they_are(name):
    assert safe_name(name) == name


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (["Birds", "birds"], "differs from 'Birds' by case"),
        (["V\u00f6gel", "Vo\u0308gel"], "Unicode form alone"),
        (["\ufb01sh", "fish"], "Unicode form alone"),
        (["stra\u00dfe", "STRASSE"], "by case"),
        (["a", "a"], "twice"),
    ],
    ids=ascii,
)
def test_names_that_a_file_system_may_take_for_one_are_refused(names, reason):
    with pytest.raises(DymoeError, match=reason):
        safe_names(names)


def test_names_of_which_one_is_a_part_of_another_may_stand_together():
    names = ("a", "a_b", "b", "task", "task1", "task10", "sk1")
    assert safe_names(names) == names


def test_every_attribute_of_what_keeps_groups_is_refused():
    owners = (nn.Module(), nn.ParameterDict(), nn.ModuleDict(), {})
    attributes = {name for owner in owners for name in dir(owner) if not name.startswith("_")}
    assert attributes <= ATTRIBUTES


def test_a_free_name_differs_from_all_others_in_more_than_case():
    assert free_name("probe", ["ImageNet", "VQAv2"]) == "probe"
    assert free_name("probe", ["Probe", "ImageNet", "probe_"]) == "probe__"


def test_a_part_of_the_models_own_names_is_refused_with_one_that_has_it():
    model = nn.ModuleDict({"mlp": nn.ModuleList([nn.Linear(1, 1)])})
    assert set(parts_of(model)) == {"mlp", "0", "weight", "bias"}
    with pytest.raises(DymoeError, match=r"'mlp': it is a part of the model's own names \(mlp\.0\.weight\)"):
        safe_names(["birds", "mlp"], parts=parts_of(model))
