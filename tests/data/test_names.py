"""Class names: written into the model, and held against later data."""

from types import SimpleNamespace

import pytest

from kroncc.data.labels import check_names, infer_labels, name_classes
from kroncc.errors import DataError


def config(count):
    names = [f"LABEL_{number}" for number in range(count)]
    return SimpleNamespace(
        num_labels=count,
        id2label=dict(enumerate(names)),
        label2id={name: number for number, name in enumerate(names)},
    )


def test_names_of_text_classes_are_written_into_the_config():
    model = config(4)
    name_classes(infer_labels(["good", "bad", "ok"], "d", "label"), model)
    assert model.id2label == {0: "bad", 1: "good", 2: "ok", 3: "LABEL_3"}
    assert model.label2id == {"bad": 0, "good": 1, "ok": 2, "LABEL_3": 3}


def test_numbered_classes_leave_the_config_alone():
    model = config(2)
    name_classes(infer_labels(["0", "1"], "d", "label"), model)
    assert model.id2label == {0: "LABEL_0", 1: "LABEL_1"}
    check_names(infer_labels(["0", "1"], "d", "label"), model, "d")


def test_data_that_numbers_the_classes_differently_is_refused():
    model = config(3)
    name_classes(infer_labels(["good", "bad", "ok"], "d", "label"), model)
    check_names(infer_labels(["ok", "bad", "good"], "e", "label"), model, "e")
    with pytest.raises(DataError, match="'good' is number 0 here and 1 in the model") as caught:
        check_names(infer_labels(["good", "ok"], "e", "label"), model, "e")
    assert caught.value.problems[0].code == "K625"
