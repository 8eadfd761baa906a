"""Every parameter of `lora.yaml`: name, type, default, limits and meaning, written once.

Names and defaults are those of Microsoft's list for Phi Silica fine-tuning; the keys of the last
group are ours. The YAML file, `--set`, the documentation and the checks all come from this class.
Knows nothing of tensors; imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from phinetune.lora.settings import STARTS, Bias

SchedulerType = Literal["linear", "linear_with_warmup", "cosine", "cosine_with_warmup"]
OptimizerName = Literal["adamw", "adam", "sgd", "adafactor", "lion"]
SinkName = Literal["tensorboard", "mlflow", "wandb", "trackio"]
PositiveInt = Annotated[int, Field(ge=1)]
NotNegativeInt = Annotated[int, Field(ge=0)]
BatchSize = PositiveInt | Literal["auto"]


def _in(group: str, default: Any, meaning: str, **limits: Any) -> Any:
    return Field(default=default, description=meaning, json_schema_extra={"group": group}, **limits)


class TrainingSettings(BaseModel):
    """The settings of one run; frozen, every field checked, unknown keys refused.

    >>> TrainingSettings(epochs=2, learning_rate=1e-3).effective_batch_size
    4
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    system_prompt: str | None = _in(
        "data", None, "System prompt put before every example; replaces a system message of the data."
    )
    varied_seqlen: bool = _in(
        "data",
        False,
        "false: examples are packed into sequences of finetune_train_seqlen tokens, each seeing only itself. "
        "true: one example per sequence.",
    )
    finetune_dataset: str = _in(
        "data", "wikitext2", "Folder with train.json and test.json, relative to the project; or wikitext2."
    )
    finetune_train_nsamples: int = _in(
        "data", 4096, "Most training samples per epoch: packed sequences, or examples if varied_seqlen.", ge=1
    )
    finetune_test_nsamples: int = _in(
        "data", 128, "Most test samples: packed sequences, or examples if varied_seqlen.", ge=1
    )
    finetune_train_batch_size: BatchSize = _in(
        "data",
        4,
        "Sequences per training step and accumulation. auto: as many as memory holds of the same update of "
        "4 x gradient_accumulation_steps sequences.",
    )
    finetune_test_batch_size: BatchSize = _in(
        "data", 8, "Sequences per evaluation batch. auto: as many as memory holds."
    )
    finetune_train_seqlen: int = _in(
        "data", 2048, "Most tokens per training sequence; for longer examples see overlong.", ge=8
    )
    finetune_test_seqlen: int = _in(
        "data", 2048, "Most tokens per test sequence; for longer examples see overlong.", ge=8
    )

    early_stopping_patience: int = _in(
        "finetuning", 5, "Stop after this many evaluations without a lower test loss.", ge=1
    )
    epochs: float = _in("finetuning", 1.0, "Passes over the training data; may be a fraction.", gt=0, le=1000)
    eval_steps: int = _in("finetuning", 64, "Steps between evaluations.", ge=1)
    save_steps: int = _in(
        "finetuning",
        64,
        "Steps between checkpoints; a multiple of eval_steps when evaluating by steps.",
        ge=1,
    )
    learning_rate: float = _in("finetuning", 2e-4, "Peak learning rate.", gt=0, le=1)
    lr_scheduler_type: SchedulerType = _in(
        "finetuning", "linear", "How the rate falls to zero; only the _with_warmup kinds warm up."
    )
    num_warmup_steps: int = _in(
        "finetuning", 400, "Steps over which a _with_warmup schedule rises to learning_rate.", ge=0
    )

    seed: int = _in("advanced", 42, "Fixes sampling, order, initialisation and dropout.", ge=0, le=2**31 - 1)
    evaluation_strategy: Literal["steps", "epoch", "no"] = _in(
        "advanced",
        "steps",
        "Evaluate every eval_steps, after each epoch, or only at the end.",
    )
    lora_dropout: float = _in(
        "advanced", 0.1, "Share of each LoRA input set to zero in training.", ge=0, lt=1
    )
    adam_beta1: float = _in("advanced", 0.9, "AdamW, Adam, Lion: decay of the gradient's mean.", ge=0, lt=1)
    adam_beta2: float = _in(
        "advanced", 0.95, "AdamW, Adam: decay of the gradient's square; Lion: of its momentum.", ge=0, lt=1
    )
    adam_epsilon: float = _in("advanced", 1e-8, "AdamW, Adam: added to the denominator.", gt=0)
    num_training_steps: int | None = _in(
        "advanced", None, "Steps to train for; null derives them from epochs and the packed data.", ge=1
    )
    gradient_accumulation_steps: int = _in(
        "advanced", 1, "Batches summed into one update, weighted by trained tokens.", ge=1
    )
    eval_accumulation_steps: int | None = _in(
        "advanced", None, "Evaluation batches kept on the device before moving to the CPU; null: all.", ge=1
    )
    eval_delay: float | None = _in(
        "advanced", 0.0, "Steps (or epochs, by evaluation_strategy) before the first evaluation.", ge=0
    )
    weight_decay: float = _in(
        "advanced",
        0.0,
        "Weight decay of the adapter's matrices: decoupled, with adam and sgd added to the gradient.",
        ge=0,
        le=1,
    )
    max_grad_norm: float = _in("advanced", 1.0, "Gradients are scaled down to this norm; above 0.", gt=0)
    gradient_checkpointing: bool = _in(
        "advanced", False, "Recompute activations in the backward pass: less memory, slower."
    )

    model: str = _in("phinetune", "demo", "Base model: demo, a local folder, or a Hugging Face name.")
    lora_r: int = _in("phinetune", 16, "Rank of the adapter.", ge=1, le=1024)
    lora_alpha: float = _in("phinetune", 32.0, "The update is scaled by lora_alpha / lora_r.", gt=0)
    lora_target_modules: Annotated[tuple[str, ...], Field(min_length=1)] | None = _in(
        "phinetune", None, "Names of the linear layers to adapt; null: all of the model's, by architecture."
    )
    use_rslora: bool = _in(
        "variants", False, "rsLoRA: scale the update by lora_alpha / √lora_r; for ranks of 64 and more."
    )
    loraplus_lr_ratio: float = _in(
        "variants", 1.0, "LoRA+: the learning rate of B is this many times that of A; 16 is usual.", gt=0
    )
    use_dora: bool = _in(
        "variants",
        False,
        "DoRA: also train the length of each row of the adapted weights; see docs/variants.md.",
    )
    init_lora_weights: Annotated[str, Field(pattern=f"^({STARTS})$")] = _in(
        "variants",
        "paper",
        "Where A and B begin: paper (random, zero), gaussian, or in the base's own weight: pissa, "
        "pissa_niter_4 (fast), olora.",
    )
    rank_pattern: dict[str, Annotated[int, Field(ge=1, le=1024)]] = _in(
        "variants", {}, "Ranks of single layers by name: {down_proj: 4, layers.0.mlp.down_proj: 32}."
    )
    alpha_pattern: dict[str, Annotated[float, Field(gt=0)]] = _in(
        "variants", {}, "lora_alpha of single layers by name: {down_proj: 8}."
    )
    layers_to_transform: Annotated[tuple[NotNegativeInt, ...], Field(min_length=1)] | None = _in(
        "variants", None, "Adapt only the blocks of these numbers, from 0: [30, 31]; null: all."
    )
    layers_pattern: tuple[str, ...] = _in(
        "variants", (), "Names of the lists that layers_to_transform counts in, where a model has several."
    )
    bias: Bias = _in(
        "variants", "none", "Also train the biases of the adapted layers (lora_only), or all of the model's."
    )
    modules_to_save: tuple[str, ...] = _in(
        "variants", (), "Modules to train as a whole and save with the adapter, for example [lm_head]."
    )
    trainable_token_indices: tuple[NotNegativeInt, ...] = _in(
        "variants", (), "Rows of the token embedding to train, for new tokens: [32011, 32012]."
    )
    optimizer: OptimizerName = _in(
        "phinetune",
        "adamw",
        "What makes an update of a gradient; with sgd or lion another learning_rate fits.",
    )
    sgd_momentum: float = _in("phinetune", 0.9, "SGD: share of the last update that goes on.", ge=0, lt=1)
    label_smoothing: float = _in(
        "phinetune",
        0.0,
        "Share of each target spread evenly over all tokens. The test loss stays the plain one.",
        ge=0,
        lt=1,
    )
    warmup_ratio: float | None = _in(
        "phinetune",
        None,
        "Warm-up of a _with_warmup schedule as a share of the steps; null: num_warmup_steps counts.",
        ge=0,
        le=1,
    )
    task: Literal["auto", "chat", "text", "classification"] = _in(
        "phinetune",
        "auto",
        "auto takes chats and text; chat, text refuse the other. classification: learn each row's label.",
    )
    labels_file: str | None = _in(
        "phinetune",
        None,
        "classification: file with the names of the classes; null: those of the training rows, sorted.",
    )
    class_weights: Literal["none", "balanced"] = _in(
        "phinetune",
        "none",
        "classification: balanced weighs each class by the inverse of its count in the training rows.",
    )
    loss_on: Literal["assistant", "all"] = _in(
        "phinetune", "assistant", "Train on assistant turns only, or on every token. Plain text: always all."
    )
    overlong: Literal["error", "cut", "drop"] = _in(
        "phinetune",
        "error",
        "Chats longer than a sequence: refuse to run, cut them, or leave them out. Long text is split.",
    )
    device: Literal["auto", "cpu", "cuda", "mps"] = _in("phinetune", "auto", "Where to compute.")
    dtype: Literal["auto", "float32", "bfloat16"] = _in(
        "phinetune",
        "auto",
        "Type of the frozen base; auto probes for fast bfloat16. Adapter weights: float32.",
    )
    quantize: Literal["none", "int8", "nf4"] = _in(
        "phinetune",
        "none",
        "Keep the base's linear layers in 8 or 4 bits: less memory, slower. nf4 needs phinetune[quantize].",
    )
    retry_on_divergence: bool = _in(
        "phinetune",
        False,
        "When loss or gradient stop being finite: go back to the last checkpoint once, at half the rate.",
    )
    report_to: tuple[SinkName, ...] = _in(
        "phinetune",
        (),
        "Show the run live in other tools too: [tensorboard, mlflow, wandb, trackio], any of them.",
    )
    compare_nsamples: int = _in(
        "phinetune",
        200,
        "Test examples that base and adapter answer at the end; 0: compare losses only.",
        ge=0,
    )
    constrain_answers: Literal["none", "training"] = _in(
        "phinetune",
        "none",
        "training: in the comparison both sides may only give answers that stand in the training rows.",
    )
    compare_max_new_tokens: int | None = _in(
        "phinetune",
        None,
        "Longest answer in the comparison; null: the longest reference and a quarter more.",
        ge=1,
    )

    @model_validator(mode="after")
    def _agree(self) -> TrainingSettings:
        if self.evaluation_strategy == "steps" and self.save_steps % self.eval_steps:
            raise ValueError(
                f"save_steps ({self.save_steps}) must be a multiple of eval_steps ({self.eval_steps}), "
                f"or a saved checkpoint would have no test loss; "
                f"write save_steps: {-(-self.save_steps // self.eval_steps) * self.eval_steps}"
            )
        if self.use_dora and self.init_lora_weights != "paper":
            raise ValueError(
                f"init_lora_weights ({self.init_lora_weights}) and use_dora do not go together; "
                "write init_lora_weights: paper, or use_dora: false"
            )
        return self

    @property
    def train_batch_size(self) -> int:
        """Sequences per forward and backward pass; the default while `auto` is not resolved."""
        return _number(self, "finetune_train_batch_size")

    @property
    def test_batch_size(self) -> int:
        """Sequences per evaluation batch; the default while `auto` is not resolved."""
        return _number(self, "finetune_test_batch_size")

    @property
    def effective_batch_size(self) -> int:
        """Sequences per optimizer step."""
        return self.train_batch_size * self.gradient_accumulation_steps

    @property
    def scaling(self) -> float:
        """The factor of the update in layers that no pattern names."""
        return self.lora_alpha / (math.sqrt(self.lora_r) if self.use_rslora else self.lora_r)

    @property
    def has_warmup(self) -> bool:
        return self.lr_scheduler_type.endswith("_with_warmup")


GROUPS = {
    "data": "Data",
    "finetuning": "Fine-tuning",
    "advanced": "Advanced",
    "phinetune": "Of phinetune",
    "variants": "Variants of LoRA",
}

# What `quickstart` trains the bundled demo base with; measured on the bundled data.
QUICKSTART: Mapping[str, Any] = {
    "finetune_dataset": "dataset",
    "finetune_train_seqlen": 512,
    "finetune_test_seqlen": 512,
    "finetune_train_batch_size": 2,
    "epochs": 4.0,
    "eval_steps": 100,
    "save_steps": 100,
    "learning_rate": 2e-3,
    "lr_scheduler_type": "cosine_with_warmup",
    "num_warmup_steps": 20,
    "lora_dropout": 0.05,
    "lora_r": 32,
    "lora_alpha": 64.0,
    "model": "demo",
}


def _number(settings: TrainingSettings, name: str) -> int:
    value = getattr(settings, name)
    return int(TrainingSettings.model_fields[name].default if value == "auto" else value)


def group_of(name: str) -> str:
    """The group of `GROUPS` a setting belongs to."""
    extra = TrainingSettings.model_fields[name].json_schema_extra
    assert isinstance(extra, dict)
    return str(extra["group"])
