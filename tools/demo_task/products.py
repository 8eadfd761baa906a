"""Thousands of product names, in two sets that share no word. Knows no sentence."""

# ruff: noqa: SIM905 (word lists are easier to read as text)

from __future__ import annotations

import random

TRAIN_NOUNS = (
    "kettle toaster lamp chair desk sofa table mirror clock radio camera phone tablet laptop printer "
    "keyboard mouse monitor speaker charger router drone scooter bicycle helmet tent backpack suitcase "
    "jacket coat shirt dress skirt scarf hat belt boots sandals gloves watch necklace bracelet wallet "
    "umbrella pillow blanket curtain carpet vase candle basket bucket broom vacuum iron heater fan "
    "fridge freezer oven stove blender mixer juicer grill pan pot bowl plate fork spoon knife bottle "
    "cup jug tray drill saw hammer ladder wrench shovel rake mower hose fence shed bench swing slide "
    "puzzle doll robot kite guitar piano violin drum flute easel brush notebook pen stapler calendar "
    "globe telescope microscope treadmill dumbbell racket skateboard surfboard kayak paddle rope "
    "compass torch lantern thermometer scale shaver hairdryer toothbrush"
).split()
TEST_NOUNS = (
    "wardrobe bookcase dishwasher teapot saucepan headset projector webcam barbecue hammock wheelbarrow "
    "stroller crib rug sweater raincoat sneakers earrings binoculars trumpet harmonica accordion "
    "snowboard tricycle dehumidifier thermostat doorbell padlock mattress quilt armchair footstool "
    "chandelier"
).split()
TRAIN_ADJECTIVES = (
    "red blue green black white brown grey pink yellow silver golden small large mini tall round square "
    "wooden metal glass leather cotton electric wireless folding travel garden kitchen office outdoor "
    "sports kids double single smart classic solar"
).split()
TEST_ADJECTIVES = (
    "purple orange copper plastic woollen portable cordless bathroom bedroom camping digital deluxe "
    "slim triple"
).split()
TRAIN_SYLLABLES = (
    "ba be bi bo bra bri cal can cor da del den dor fa fel fin flo ga gal gla go hal han hel ja jo ka "
    "kel kin kra la len li lo lum ma mar mel mi mo na nel ni no nor pa pel pi plo po ra rel ri ro sal "
    "san sel ser sha sol sta ta tel ti to tor tra va ven vi vor wa wil ya zan ze zi zo"
).split()
TRAIN_ENDINGS = ("x n r l s k t m ra na lo ty ix on ex or el is um ax ine ette ius ora").split()
TEST_SYLLABLES = (
    "bu dru fy gre hu ju klo lu mu nu pru qua ru sku su thu tru vu wu yu zu bly dwi fro gno spa"
).split()
TEST_ENDINGS = ("d p b g ck nd lt ro mi za ock ude arn ip usk olt emp").split()


def _invented(rng: random.Random, test: bool) -> str:
    syllables, endings = (TEST_SYLLABLES, TEST_ENDINGS) if test else (TRAIN_SYLLABLES, TRAIN_ENDINGS)
    return "".join(rng.choices(syllables, k=rng.choice((1, 2, 2, 3)))) + rng.choice(endings)


def product(rng: random.Random, test: bool) -> str:
    """One or two words: mostly invented, often with a real noun or adjective."""
    nouns = TEST_NOUNS if test else TRAIN_NOUNS
    adjectives = TEST_ADJECTIVES if test else TRAIN_ADJECTIVES
    shape = rng.random()
    if shape < 0.30:
        return _invented(rng, test)
    if shape < 0.55:
        return f"{_invented(rng, test).capitalize()} {rng.choice(nouns)}"
    if shape < 0.70:
        return f"{rng.choice(adjectives)} {_invented(rng, test)}"
    if shape < 0.80:
        return f"{_invented(rng, test)} {_invented(rng, test)}"
    if shape < 0.92:
        return f"{rng.choice(adjectives)} {rng.choice(nouns)}"
    return rng.choice(nouns)
