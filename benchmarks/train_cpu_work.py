"""The work of `train_cpu.py`: a random model, made-up chats and a fresh adapter, the same for all sides.

Rows are drawn so that there is something to learn (token frequencies fall off as in real text) but
nothing to download. Knows nothing of who trains on them. Imports no torch at the top: the driver must
stay small, because a child process inherits the peak memory of the process that starts it.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

VOCAB, HIDDEN, INTER, LAYERS, HEADS = 32_064, 768, 2_048, 12, 12
PAD = 32_000
TARGETS = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """Sizes and hyperparameters that every side uses."""

    num_steps: int
    rows_per_step: int
    num_layers: int = LAYERS
    learning_rate: float = 2e-3
    rank: int = 16
    alpha: int = 32
    dropout: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    max_grad_norm: float = 1.0
    seed: int = 0

    def write(self, folder: Path) -> None:
        (folder / "work.json").write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> Work:
        return cls(**json.loads((folder / "work.json").read_text(encoding="utf-8")))


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One chat: token ids, of which the first `num_prompt` are not trained."""

    ids: list[int]
    num_prompt: int

    @property
    def labels(self) -> list[int]:
        """Ids where trained, else -100: what TRL takes."""
        return [-100] * self.num_prompt + self.ids[self.num_prompt :]


def read_rows(folder: Path) -> list[Row]:
    with (folder / "rows.jsonl").open(encoding="utf-8") as file:
        return [Row(**json.loads(line)) for line in file]


def prepare(folder: Path) -> None:
    """Write the rows, the model (bfloat16 safetensors, with a tokenizer) and the first adapter."""
    _write_rows(folder)
    _write_model(folder)
    _write_adapter(folder)


def _write_rows(folder: Path) -> None:
    import numpy as np

    work = Work.read(folder)
    rng = np.random.default_rng(work.seed)
    count = work.num_steps * work.rows_per_step
    lengths = np.clip(np.exp(rng.normal(5.0, 0.6, size=count)), 16, 1024).astype(int)
    by_rank = rng.permutation(np.arange(3, PAD))
    weights = 1 / np.arange(1, len(by_rank) + 1)
    weights /= weights.sum()
    with (folder / "rows.jsonl").open("w", encoding="utf-8") as file:
        for length in lengths:
            ids = rng.choice(by_rank, size=length, p=weights).tolist()
            num_prompt = max(1, int(length * rng.uniform(0.60, 0.75)))
            file.write(json.dumps({"ids": ids, "num_prompt": num_prompt}) + "\n")


def _write_model(folder: Path) -> None:
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import Phi3Config, Phi3ForCausalLM, PreTrainedTokenizerFast

    work = Work.read(folder)
    config = Phi3Config(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=INTER,
        num_hidden_layers=work.num_layers,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=4096,
        pad_token_id=PAD,
        bos_token_id=1,
        eos_token_id=PAD,
        tie_word_embeddings=False,
    )
    torch.manual_seed(work.seed)
    Phi3ForCausalLM(config).bfloat16().save_pretrained(folder / "model")
    # SFTTrainer asks for a tokenizer even when the rows are token ids already.
    words = Tokenizer(WordLevel({"<unk>": 0, "<end>": PAD}, unk_token="<unk>"))
    PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", pad_token="<end>", eos_token="<end>"
    ).save_pretrained(folder / "model")


def _write_adapter(folder: Path) -> None:
    from phinetune.lora.attach import LoraSettings, attach
    from phinetune.lora.files import save_adapter
    from phinetune.models.loading import load_base

    work = Work.read(folder)
    base = load_base(str(folder / "model"), device_name="cpu", dtype="bfloat16")
    settings = LoraSettings(rank=work.rank, alpha=work.alpha, dropout=work.dropout, target_modules=TARGETS)
    (folder / "adapter").mkdir()
    save_adapter(
        attach(base.model, settings, seed=work.seed), folder / "adapter", base_name="random", metadata={}
    )
