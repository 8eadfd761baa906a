"""Thousands of product names, in two sets that share no word. Knows no sentence."""

# ruff: noqa: SIM905 (word lists are easier to read as text)

from __future__ import annotations

import random
import zlib

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
    "sports kids double single smart classic solar heavy light short long wide narrow thin thick soft "
    "hard round flat deep warm cold quiet strong simple modern antique rustic striped spotted matt shiny "
    "bamboo steel iron stone paper silk linen velvet rubber ceramic marble oak pine walnut desk wall "
    "floor ceiling window door balcony garage cellar attic beach mountain forest city winter summer "
    "spring autumn morning evening baby junior family office school student chef artist rainproof "
    "magnetic automatic manual foldable adjustable rechargeable compact giant tiny super extra premium"
).split()
TEST_ADJECTIVES = (
    "purple orange copper plastic woollen portable cordless bathroom hallway camping digital deluxe "
    "slim triple"
).split()
SYLLABLES = (
    "ba be bi bo bra bri cal can cor da del den dor fa fel fin flo ga gal gla go hal han hel ja jo ka "
    "kel kin kra la len li lo lum ma mar mel mi mo na nel ni no nor pa pel pi plo po ra rel ri ro sal "
    "san sel ser sha sol sta ta tel ti to tor tra va ven vi vor wa wil ya zan ze zi zo "
    "bu dru fy gre hu ju klo lu mu nu pru ru sku su tu vu wu yu zu fro gno spa"
).split()
ENDINGS = (
    "x n r l s k t m ra na lo ty ix on ex or el is um ax ine ette ius ora d p b g ro mi za arn olt"
).split()
TEST_SHARE = 8  # one invented word in eight belongs to the test set, by its own digest


def _invented(rng: random.Random, test: bool) -> str:
    while True:
        word = "".join(rng.choices(SYLLABLES, k=rng.choice((1, 2, 2, 3)))) + rng.choice(ENDINGS)
        if (zlib.crc32(word.encode()) % TEST_SHARE == 0) == test:
            return word


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
