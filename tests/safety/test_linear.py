"""The bundled classifier is what its card says it is."""

from __future__ import annotations

import pytest

from phinetune.safety.categories import Category, Severity
from phinetune.safety.linear import WEIGHTS, bundled, features


def test_plain_requests_are_safe():
    classifier = bundled()
    for text in ("What is the capital of France?", "Book a table for two at seven", "My parcel is late"):
        assert set(classifier.severities(text).values()) == {Severity.SAFE}, text


def test_threats_are_not():
    assert bundled().severities("I am going to kill you and your whole family")[Category.VIOLENCE] > 0


def test_thresholds_rise_with_the_severity():
    for levels in bundled().thresholds.values():
        assert levels[Severity.LOW] < levels[Severity.MEDIUM] < levels[Severity.HIGH]


def test_features_have_length_one_and_see_through_clothes():
    buckets, weights = features("Hello there hello")
    assert float((weights**2).sum()) == pytest.approx(1)
    assert sorted(features("ＨELLO thеre hello")[0].tolist()) == sorted(buckets.tolist())
    assert features("")[0].size == 0


def test_the_weights_are_small_and_no_pickle():
    assert WEIGHTS.stat().st_size < 2_000_000
    assert bundled().probabilities("hello")
