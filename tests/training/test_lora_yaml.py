"""lora.yaml: what is written is read back; every mistake is refused with its line and what to write."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phinetune.base.errors import SettingsError
from phinetune.training.lora_yaml import load_settings, lora_yaml
from phinetune.training.settings import GROUPS, QUICKSTART, TrainingSettings, group_of


def load(tmp_path, text, overrides=None):
    path = tmp_path / "lora.yaml"
    path.write_text(text, encoding="utf-8")
    return load_settings(path, overrides)


def refused(tmp_path, text, overrides=None):
    with pytest.raises(SettingsError) as caught:
        load(tmp_path, text, overrides)
    return caught.value


def test_an_empty_file_gives_the_defaults(tmp_path):
    assert load(tmp_path, "") == TrainingSettings()
    assert load(tmp_path, "# only a comment\n") == TrainingSettings()


@pytest.mark.parametrize("values", [{}, QUICKSTART])
def test_presets_come_back_as_they_were_written(tmp_path, values):
    settings = TrainingSettings(**values)
    assert load(tmp_path, lora_yaml(settings)) == settings


@given(
    system_prompt=st.none() | st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=40),
    rate=st.floats(1e-12, 1.0),
    epochs=st.floats(1e-6, 1000.0),
    seed=st.integers(0, 2**31 - 1),
    targets=st.none() | st.lists(st.text("abc*._", min_size=1, max_size=9), min_size=1).map(tuple),
    steps=st.none() | st.integers(1, 10**9),
    is_varied=st.booleans(),
)
def test_any_settings_come_back_as_they_were_written(
    tmp_path_factory, system_prompt, rate, epochs, seed, targets, steps, is_varied
):
    settings = TrainingSettings(
        system_prompt=system_prompt, learning_rate=rate, epochs=epochs, seed=seed,
        lora_target_modules=targets, num_training_steps=steps, varied_seqlen=is_varied,
    )  # fmt: skip
    assert load(tmp_path_factory.getbasetemp(), lora_yaml(settings)) == settings


def test_the_file_explains_every_setting_in_its_group():
    text = lora_yaml(TrainingSettings())
    for name, field in TrainingSettings.model_fields.items():
        assert f"# {field.description}\n{name}: " in text
        assert group_of(name) in GROUPS
        assert len(field.description) > 15
    for title in GROUPS.values():
        assert text.count(f" {title} -") == 1


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("1e-4", 1e-4),
        ("1E-4", 1e-4),
        ("0.0001", 1e-4),
        ("1.e-4", 1e-4),
        ("1", 1.0),
        ("+.5", 0.5),
        (".5", 0.5),
    ],
)
def test_a_number_is_a_number_however_it_is_written(tmp_path, written, value):
    rate = load(tmp_path, f"learning_rate: {written}").learning_rate
    assert rate == value
    assert type(rate) is float


@pytest.mark.parametrize("word", ["no", "off", "yes", "on", "y"])
def test_words_are_words(tmp_path, word):
    assert load(tmp_path, f"system_prompt: {word}").system_prompt == word
    assert load(tmp_path, "evaluation_strategy: no").evaluation_strategy == "no"


def test_values_have_pythons_own_types(tmp_path):
    settings = load(
        tmp_path, "epochs: 2\nlora_target_modules: [a, 'b']\nsystem_prompt: |\n  two\n  lines\nseed: 0x10\n"
    )
    assert type(settings.epochs) is float
    assert settings.lora_target_modules == ("a", "b")
    assert type(settings.lora_target_modules[0]) is str
    assert settings.system_prompt == "two\nlines\n"
    assert type(settings.system_prompt) is str
    assert type(settings.seed) is int


def test_a_file_with_a_byte_order_mark_and_windows_lines_is_read(tmp_path):
    (tmp_path / "lora.yaml").write_bytes(b"\xef\xbb\xbfepochs: 2\r\nseed: 7\r\n")
    settings = load_settings(tmp_path / "lora.yaml")
    assert (settings.epochs, settings.seed) == (2.0, 7)


def test_an_unknown_key_is_refused_with_its_line_and_the_nearest_name(tmp_path):
    error = refused(tmp_path, "epochs: 2\n\n# a comment\nlearning_rte: 1e-4\n")
    assert error.what == "unknown setting 'learning_rte'"
    assert error.where == f"{tmp_path / 'lora.yaml'}:4"
    assert "write 'learning_rate'" in error.do


def test_a_key_like_no_other_is_refused_without_a_guess(tmp_path):
    error = refused(tmp_path, "zzz: 1\n")
    assert "no setting has a name like it" in error.why


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("epochs: many", "number"),
        ("epochs: true", "number"),
        ("epochs: '2'", "number"),
        ("epochs: 0", "greater than 0"),
        ("epochs: .nan", "finite"),
        ("epochs: .inf", "finite"),
        ("epochs: null", "number"),
        ("eval_steps: 1.5", "integer"),
        ("eval_steps: 64.0", "integer"),
        ("eval_steps: 0", "greater than or equal to 1"),
        ("eval_steps: yes", "integer"),
        ("varied_seqlen: no", "boolean"),
        ("varied_seqlen: 1", "boolean"),
        ("system_prompt: 3", "string"),
        ("lr_scheduler_type: constant", "linear"),
        ("learning_rate: 3", "less than or equal to 1"),
        ("max_grad_norm: 0", "greater than 0"),
        ("lora_dropout: 1", "less than 1"),
        ("lora_target_modules: q_proj", "tuple"),
        ("lora_target_modules: []", "at least 1"),
        ("lora_target_modules: [1]", "string"),
        ("finetune_train_seqlen: 4", "greater than or equal to 8"),
        ("seed: -1", "greater than or equal to 0"),
        ("model: {a: 1}", "string"),
        ("dtype: float16", "float32"),
    ],
)
def test_a_wrong_value_is_refused_with_its_line_and_meaning(tmp_path, line, why):
    key = line.split(":")[0]
    error = refused(tmp_path, f"# first\n{line}\n")
    assert error.what.startswith(f"'{key}' cannot be ")
    assert error.where.endswith("lora.yaml:2")
    assert why in error.why
    assert TrainingSettings.model_fields[key].description in error.do
    assert "Default: " in error.do


def test_a_checkpoint_must_fall_on_an_evaluation(tmp_path):
    error = refused(tmp_path, "eval_steps: 10\nsave_steps: 25\n")
    assert error.where.endswith("lora.yaml:2")
    assert "write save_steps: 30" in error.why
    assert load(tmp_path, "eval_steps: 10\nsave_steps: 30\n").save_steps == 30
    assert load(tmp_path, "eval_steps: 10\nsave_steps: 25\nevaluation_strategy: epoch\n").save_steps == 25


@pytest.mark.parametrize(
    ("text", "what", "line"),
    [
        ("epochs: 1\nseed: 1\nepochs: 2\n", "written twice", 3),
        ("a: &x 1\nb: *x\n", "alias", None),
        ("epochs: [1\n", "not valid YAML", 2),
        ("epochs: 1\n bad: 2\n", "not valid YAML", 2),
        ("- epochs\n", "does not hold settings", None),
        ("just words\n", "does not hold settings", None),
        ("epochs: !!python/object:os.system x\n", "", None),
        ("epochs: 2020-01-01\n", "cannot be", 1),
        ("? [a, b]\n: 1\n", "", None),
        ("1: 2\n", "unknown setting '1'", 1),
        ("epochs: 1\n---\nepochs: 2\n", "not valid YAML", None),
    ],
)
def test_what_is_not_plain_settings_is_refused(tmp_path, text, what, line):
    error = refused(tmp_path, text)
    assert what in error.what
    assert str(tmp_path / "lora.yaml") in error.where
    if line:
        assert error.where.endswith(f"lora.yaml:{line}")


def test_a_bomb_of_aliases_is_refused_quickly(tmp_path):
    levels = "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12))
    error = refused(tmp_path, "a0: &a0 x\n" + levels)
    assert "alias" in error.what


def test_a_huge_file_is_refused(tmp_path):
    assert "larger than 1 MB" in refused(tmp_path, "#" * 1_000_001).what


def test_a_file_that_is_not_text_is_refused(tmp_path):
    (tmp_path / "lora.yaml").write_bytes(b"epochs: \xff\xfe\n")
    with pytest.raises(SettingsError, match="not text in UTF-8"):
        load_settings(tmp_path / "lora.yaml")


def test_a_missing_file_is_said(tmp_path):
    with pytest.raises(SettingsError, match=r"no lora\.yaml"):
        load_settings(tmp_path / "lora.yaml")


def test_overrides_win_and_are_written_as_yaml(tmp_path):
    overrides = {
        "epochs": "3", "learning_rate": "1e-3", "system_prompt": "no", "lora_target_modules": "[a, b]",
        "num_training_steps": "null", "varied_seqlen": "true",
    }  # fmt: skip
    settings = load(tmp_path, "epochs: 9\nnum_training_steps: 5\n", overrides)
    assert settings.epochs == 3.0
    assert settings.learning_rate == 1e-3
    assert settings.system_prompt == "no"
    assert settings.lora_target_modules == ("a", "b")
    assert settings.num_training_steps is None
    assert settings.varied_seqlen is True


@pytest.mark.parametrize(
    ("overrides", "where"),
    [
        ({"epochs": "many"}, "--set epochs=many"),
        ({"epoch": "1"}, "--set epoch=1"),
        ({"save_steps": "65"}, "--set save_steps=65"),
        ({"epochs": "[1"}, "--set epochs=[1"),
        ({"epochs": "1\nseed: 3"}, "--set epochs=1"),
    ],
)
def test_a_wrong_override_is_refused_at_its_place(tmp_path, overrides, where):
    error = refused(tmp_path, "epochs: 1\n", overrides)
    assert where in error.where


def test_defaults_are_those_of_the_published_list():
    expected = {
        "system_prompt": None, "varied_seqlen": False, "finetune_dataset": "wikitext2",
        "finetune_train_nsamples": 4096, "finetune_test_nsamples": 128, "finetune_train_batch_size": 4,
        "finetune_test_batch_size": 8, "finetune_train_seqlen": 2048, "finetune_test_seqlen": 2048,
        "early_stopping_patience": 5, "epochs": 1.0, "eval_steps": 64, "save_steps": 64,
        "learning_rate": 2e-4, "lr_scheduler_type": "linear", "num_warmup_steps": 400, "seed": 42,
        "evaluation_strategy": "steps", "lora_dropout": 0.1, "adam_beta1": 0.9, "adam_beta2": 0.95,
        "adam_epsilon": 1e-8, "num_training_steps": None, "gradient_accumulation_steps": 1,
        "eval_accumulation_steps": None, "eval_delay": 0.0, "weight_decay": 0.0, "max_grad_norm": 1.0,
        "gradient_checkpointing": False,
    }  # fmt: skip
    settings = TrainingSettings()
    assert {key: getattr(settings, key) for key in expected} == expected
    ours = {name for name in TrainingSettings.model_fields if group_of(name) in ("phinetune", "variants")}
    assert ours.isdisjoint(expected)
    assert ours | set(expected) == set(TrainingSettings.model_fields)


def test_settings_are_frozen():
    with pytest.raises(ValueError, match="frozen"):
        TrainingSettings().epochs = 2.0


def test_derived_values_follow():
    settings = TrainingSettings(
        finetune_train_batch_size=3, gradient_accumulation_steps=5, lora_alpha=8.0, lora_r=16
    )
    assert settings.effective_batch_size == 15
    assert settings.scaling == 0.5
    assert not settings.has_warmup
    assert TrainingSettings(lr_scheduler_type="cosine_with_warmup").has_warmup
    assert math.isclose(TrainingSettings().scaling, 2.0)


@pytest.mark.parametrize(
    ("text", "what", "line"),
    [
        ("use_dora: true\ninit_lora_weights: pissa\n", "two settings are in conflict", 2),
        ("init_lora_weights: eva\n", "'init_lora_weights' cannot be", 1),
        ("init_lora_weights: pissa_niter_0\n", "'init_lora_weights' cannot be", 1),
        ("rank_pattern: {o_proj: 0}\n", "'rank_pattern' cannot be", 1),
        ("alpha_pattern: {o_proj: -1}\n", "'alpha_pattern' cannot be", 1),
        ("layers_to_transform: []\n", "'layers_to_transform' cannot be", 1),
        ("layers_to_transform: [-1]\n", "'layers_to_transform' cannot be", 1),
        ("trainable_token_indices: [-3]\n", "'trainable_token_indices' cannot be", 1),
        ("bias: some\n", "'bias' cannot be", 1),
        ("loraplus_lr_ratio: 0\n", "'loraplus_lr_ratio' cannot be", 1),
    ],
)
def test_a_variant_that_cannot_be_is_refused_with_its_line(tmp_path, text, what, line):
    path = tmp_path / "lora.yaml"
    path.write_text(text)
    with pytest.raises(SettingsError, match=what) as caught:
        load_settings(path)
    assert caught.value.where == f"{path}:{line}"


def test_patterns_and_numbers_of_blocks_are_read_and_written_back(tmp_path):
    path = tmp_path / "lora.yaml"
    path.write_text("rank_pattern: {o_proj: 4, layers.0.mlp.down_proj: 8}\nalpha_pattern: {o_proj: 8}\n"
                    "layers_to_transform: [0, 1]\ninit_lora_weights: pissa_niter_4\n")  # fmt: skip
    settings = load_settings(path)
    assert settings.rank_pattern == {"o_proj": 4, "layers.0.mlp.down_proj": 8}
    assert settings.alpha_pattern == {"o_proj": 8.0}
    path.write_text(lora_yaml(settings))
    assert load_settings(path) == settings


def test_anchors_that_nothing_uses_are_read_over(tmp_path):
    path = tmp_path / "lora.yaml"
    path.write_text("epochs: &x 2.0\nseed: &x 7\n", "utf-8")
    assert load_settings(path).seed == 7
