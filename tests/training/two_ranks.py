"""One of two processes that talk to each other; writes what it saw as JSON.

Usage: python two_ranks.py STORE RANK OUT
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "shared"))

import torch
import torch.distributed as dist
from tiny_training import TinyTraining, tiny_training
from torch.distributed.tensor import DTensor

from phinetune.base.errors import PhinetuneError
from phinetune.base.events import Event, Stepped, Trained, Warned
from phinetune.lora.attach import Adapter, attach
from phinetune.models.batch import PackedBatch
from phinetune.models.loss import trained_token_loss
from phinetune.models.sharding import shard_blocks
from phinetune.training import step as step_module
from phinetune.training.distributed import Ranks, joined
from phinetune.training.loop import train

STEPS = {
    "finetune_train_batch_size": 4, "num_training_steps": 4, "adam_epsilon": 1e-5, "learning_rate": 1e-3,
    "eval_steps": 2, "save_steps": 2,
}  # fmt: skip


def train_all(training: TinyTraining, ranks: Ranks) -> Iterator[Event]:
    rows = training.train_rows, training.test_rows
    return train(training.base, training.state, training.settings, training.plan, *rows, ranks)


def followed(ranks: Ranks, changes: dict[str, Any]) -> dict[str, Any]:
    training = tiny_training(**changes)
    events = list(train_all(training, ranks))
    (trained,) = (event for event in events if isinstance(event, Trained))
    return {
        "losses": [event.loss for event in events if isinstance(event, Stepped)],
        "norms": [event.grad_norm for event in events if isinstance(event, Stepped)],
        "warned": [event.what for event in events if isinstance(event, Warned)],
        "best_step": trained.best_step,
        "weights": {name: weight.tolist() for name, weight in training.adapter.snapshot().items()},
    }


def full_memory(ranks: Ranks) -> dict[str, Any]:
    """The second rank's device holds fewer tokens at once."""
    original = step_module.trained_token_loss

    def limited(base: Any, batch: Any, *options: Any) -> Any:
        if ranks.rank == 1 and batch.num_tokens > 60:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return original(base, batch, *options)

    step_module.trained_token_loss = limited
    try:
        return followed(ranks, STEPS)
    finally:
        step_module.trained_token_loss = original


def alike(ranks: Ranks) -> dict[str, Any]:
    return followed(ranks, STEPS)


def same_beginning(ranks: Ranks) -> dict[str, Any]:
    return followed(ranks, {**STEPS, "num_shared": 24, "finetune_train_seqlen": 128})


def with_dropout(ranks: Ranks) -> dict[str, Any]:
    return followed(ranks, {**STEPS, "lora_dropout": 0.3})


def state_of_the_first(ranks: Ranks) -> dict[str, Any]:
    """The second rank begins with another adapter and takes the first's whole state, in mid-training."""
    training = tiny_training(**STEPS, seed=1 + ranks.rank)
    if ranks.is_first:
        events = training.events()
        assert isinstance(events[-1], Trained)
    ranks.share_state(training.state)
    kept = [training.state.optimizer.state[weight] for weight in training.adapter.parameters()]
    moments = [{name: float(value.sum()) for name, value in entry.items()} for entry in kept]
    return {
        "weights": {name: weight.tolist() for name, weight in training.adapter.snapshot().items()},
        "best": {name: weight.tolist() for name, weight in training.state.best_weights.items()},
        "step": training.state.step,
        "best_loss": training.state.best_loss,
        "moments": moments,
    }


def weights_apart(ranks: Ranks) -> dict[str, Any]:
    training = tiny_training(**STEPS)
    if ranks.rank == 1:
        with torch.no_grad():
            training.adapter.parameters()[0][0, 0] += 1e-7
    return refused(lambda: list(train_all(training, ranks)))


def other_facts(ranks: Ranks) -> dict[str, Any]:
    answer = refused(lambda: ranks.require_same({"base": "abc", "train data": str(ranks.rank)}))
    if "error" in answer:
        ranks.any(False)  # what the first one waits for
    return answer


def divided_base(ranks: Ranks) -> dict[str, Any]:
    """Gradients before and after the blocks are divided, and how many numbers this process holds then."""
    training = tiny_training()
    base, batch = training.base, PackedBatch.lay(training.train_rows[:3])

    def gradients(adapter: Adapter) -> torch.Tensor:
        base.model.train()
        with torch.no_grad():
            for weight in adapter.parameters():
                weight += 0.01
        trained_token_loss(base, batch)[0].backward()
        return torch.cat([weight.grad.flatten() for weight in adapter.parameters()])  # type: ignore[union-attr]

    before = gradients(training.adapter)
    training.adapter.detach(base.model)
    shard_blocks(base.model, base.device)
    after = gradients(attach(base.model, training.adapter.settings, seed=training.settings.seed))
    held = [weight for weight in base.model.parameters() if isinstance(weight, DTensor)]
    return {
        "furthest": float((before - after).abs().max()),
        "largest": float(before.abs().max()),
        "whole": sum(weight.numel() for weight in held),
        "part": sum(weight.to_local().numel() for weight in held),
    }


def a_word_to_all(ranks: Ranks) -> dict[str, Any]:
    words = [b"from the first" if ranks.is_first else b"", b""]
    return {
        "told": [ranks.from_first(word).decode() for word in words],
        "any": [ranks.any(ranks.rank == 1), ranks.any(False)],
        "highest": ranks.highest(10 - ranks.rank),
    }


def refused(work: Callable[[], object]) -> dict[str, Any]:
    try:
        work()
    except PhinetuneError as error:
        return {"error": type(error).__name__, "what": error.what, "why": error.why}
    return {}


CASES = [
    alike, same_beginning, with_dropout, full_memory, state_of_the_first, weights_apart, other_facts,
    divided_base, a_word_to_all,
]  # fmt: skip


def main() -> None:
    store_path, rank, out = Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    with joined(rank, 2, store=dist.FileStore(str(store_path), 2)) as ranks:
        answers = {case.__name__: case(ranks) for case in CASES}
    out.write_text(json.dumps(answers), encoding="utf-8")


if __name__ == "__main__":
    main()
