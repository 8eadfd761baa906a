"""Errors say what, where, why and what to do, and know which of them are the user's."""

from __future__ import annotations

import pytest

from phinetune.base import errors


def test_text_holds_only_the_parts_that_were_given():
    error = errors.UserError("no such file", where="train.json", do="check the path")
    assert str(error) == "no such file\n  where: train.json\n  do:    check the path"
    assert str(errors.UserError("no such file")) == "no such file"
    assert str(errors.UserError("a", why="b")) == "a\n  why:   b"


@pytest.mark.parametrize(
    "kind",
    ["DataError", "SettingsError", "ModelError", "AdapterError", "IncompatibleLowRankAdapter", "SpaceError"],
)
def test_faults_of_the_input_are_user_errors(kind):
    assert issubclass(getattr(errors, kind), errors.UserError)


def test_a_diverged_run_is_not_the_users_input():
    assert issubclass(errors.DivergedError, errors.RunError)
    assert not issubclass(errors.RunError, errors.UserError)
    assert issubclass(errors.RunError, errors.PhinetuneError)


def test_data_error_keeps_its_findings():
    assert errors.DataError("two faults", findings=(1, 2)).findings == (1, 2)


@pytest.mark.parametrize(
    ("name", "expected"), [("learning_rat", "learning_rate"), ("epoch", "epochs"), ("zzz", "")]
)
def test_nearest_names_a_close_name_or_none(name, expected):
    assert errors.nearest(name, ["learning_rate", "epochs"]) == expected
