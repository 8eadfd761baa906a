"""The same training as a run of ours, written with PEFT and transformers alone: the reference for BLEU.

Same base, rows, order, steps, learning rates, clipping and first weights; a plain loop over padded
batches, and transformers' own greedy generation. Knows our packages only as the source of the rows.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM

from phinetune.text.render import Rendered
from phinetune.training.packing import Rows, batches, epoch_sequences
from phinetune.training.plan import Plan
from phinetune.training.schedule import learning_rate_factor
from phinetune.training.settings import TrainingSettings

NOT_TRAINED = -100
ROWS_PER_FORWARD = 16
PROMPTS_PER_BATCH = 64


def trained_by_peft(
    base_folder: Path,
    dtype: torch.dtype,
    first_adapter: Path,
    settings: TrainingSettings,
    plan: Plan,
    rows: Sequence[Rendered],
) -> tuple[Any, list[float]]:
    """The trained model and the loss of each step."""
    base = AutoModelForCausalLM.from_pretrained(base_folder, dtype=dtype)
    tensors = load_file(first_adapter / "adapter_model.safetensors")
    model: Any = get_peft_model(
        base,
        LoraConfig(
            r=settings.lora_r,
            lora_alpha=settings.lora_alpha,  # type: ignore[arg-type]
            lora_dropout=settings.lora_dropout,
            target_modules=sorted({name.split(".")[-3] for name in tensors}),
            task_type="CAUSAL_LM",
        ),
    )
    loaded: Any = set_peft_model_state_dict(model, tensors)
    assert not loaded.unexpected_keys, loaded.unexpected_keys
    learnt = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        learnt,
        lr=settings.learning_rate,
        betas=(settings.adam_beta1, settings.adam_beta2),
        eps=settings.adam_epsilon,
        weight_decay=settings.weight_decay,
    )
    model.train()
    losses = []
    for step, group in enumerate(_steps(settings, plan)):
        factor = learning_rate_factor(
            step, plan.num_steps, settings.lr_scheduler_type, settings.num_warmup_steps
        )
        for parameters in optimizer.param_groups:
            parameters["lr"] = settings.learning_rate * factor
        # Rows of like length share a forward pass; the update is that of the whole group.
        chosen = sorted((rows[row] for sequence in group for row in sequence), key=lambda row: row.num_tokens)
        num_trained = sum(row.num_trained for row in chosen)
        optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for start in range(0, len(chosen), ROWS_PER_FORWARD):
            loss = _summed_loss(model, chosen[start : start + ROWS_PER_FORWARD]) / num_trained
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(learnt, settings.max_grad_norm)
        optimizer.step()
        losses.append(total)
    return model.eval(), losses


@torch.no_grad()
def mean_loss(model: Any, rows: Sequence[Rendered]) -> float:
    """Mean negative log-likelihood per trained token."""
    ordered = sorted(rows, key=lambda row: row.num_tokens)
    groups = range(0, len(ordered), ROWS_PER_FORWARD)
    total = sum(_summed_loss(model, ordered[start : start + ROWS_PER_FORWARD]).item() for start in groups)
    return total / sum(row.num_trained for row in rows)


@torch.no_grad()
def generated(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Collection[int],
    pad_id: int,
) -> list[list[int]]:
    """Greedy answers by transformers' `generate`, stop tokens left out, in the order of the prompts."""
    answers: list[list[int]] = [[] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    for start in range(0, len(order), PROMPTS_PER_BATCH):
        chosen = order[start : start + PROMPTS_PER_BATCH]
        width = max(len(prompts[index]) for index in chosen)
        ids = torch.full((len(chosen), width), pad_id)
        mask = torch.zeros_like(ids)
        for line, index in enumerate(chosen):
            ids[line, width - len(prompts[index]) :] = torch.tensor(prompts[index])
            mask[line, width - len(prompts[index]) :] = 1
        out = model.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=max_new_tokens,
            eos_token_id=sorted(stop_ids),
            pad_token_id=pad_id,
        )
        for line, index in enumerate(chosen):
            answers[index] = _until_stop(out[line, width:].tolist(), stop_ids)
    return answers


def _steps(settings: TrainingSettings, plan: Plan) -> Iterator[list[Rows]]:
    """The rows of each update, as the plan of our run orders them."""
    done = epoch = 0
    while done < plan.num_steps:
        sequences = epoch_sequences(plan.train_sequences, seed=settings.seed, epoch=epoch)
        for group in batches(sequences, settings.effective_batch_size):
            if done == plan.num_steps:
                return
            yield group
            done += 1
        epoch += 1


def _summed_loss(model: Any, rows: Sequence[Rendered]) -> Tensor:
    ids = [torch.from_numpy(row.ids).long() for row in rows]
    labels = [
        torch.where(torch.from_numpy(row.trained), row_ids, NOT_TRAINED)
        for row, row_ids in zip(rows, ids, strict=True)
    ]
    mask = [torch.ones_like(row_ids) for row_ids in ids]
    logits = model(
        input_ids=pad_sequence(ids, batch_first=True),
        attention_mask=pad_sequence(mask, batch_first=True),
        use_cache=False,
    ).logits
    targets = pad_sequence(labels, batch_first=True, padding_value=NOT_TRAINED)[:, 1:]
    return cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), targets.flatten(), ignore_index=NOT_TRAINED, reduction="sum"
    )


def _until_stop(ids: list[int], stop_ids: Collection[int]) -> list[int]:
    for place, token in enumerate(ids):
        if token in stop_ids:
            return ids[:place]
    return ids
