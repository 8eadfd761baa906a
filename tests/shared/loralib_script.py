# ruff: noqa: F821
"""A script in the steps of loralib's README: adapt, load, mark, train, save, load again, merge.

Whoever runs it gives FOLDER to write to, SEED, BIAS, and FOUND, the folder of the checkpoints to load in
the end. `results` holds every tensor that a reader could look at.
"""

import loralib as lora
import torch
from torch import nn


class PlainModel(nn.Module):
    """The pre-trained model: nothing of it knows of LoRA."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 12)
        self.qkv_proj = nn.Linear(12, 36)
        self.q_proj = nn.Linear(12, 12)
        self.norm = nn.LayerNorm(12)
        self.image = nn.Sequential()
        self.image.conv = nn.Conv2d(1, 3, 3, padding=1, bias=False)
        self.head = nn.Linear(12, 5, bias=False)

    def forward(self, ids):
        query, key, value = self.qkv_proj(self.embed(ids)).chunk(3, dim=-1)
        mixed = torch.softmax(query @ key.mT, dim=-1) @ value
        seen = self.image(self.norm(self.q_proj(mixed))[:, None]).mean(dim=1)
        return self.head(seen)


class BigModel(PlainModel):
    """The same with layers of loralib in the places of some."""

    def __init__(self):
        super().__init__()
        self.embed = lora.Embedding(11, 12, r=2)
        self.qkv_proj = lora.MergedLinear(12, 36, r=2, lora_alpha=4, enable_lora=[True, False, True])
        self.q_proj = lora.Linear(12, 12, r=3, lora_alpha=2, lora_dropout=0.1)
        self.image = lora.Conv2d(1, 3, 3, r=2, padding=1, bias=False)
        self.head = lora.Linear(12, 5, r=2, bias=False, merge_weights=False)


results = {}
ids = torch.arange(24).view(4, 6) * 5 % 11

torch.manual_seed(SEED)
torch.save(PlainModel().state_dict(), FOLDER / "ckpt_pretrained.pt")

torch.manual_seed(SEED + 1)
model = BigModel()
results |= {f"drawn {name}": value.clone() for name, value in model.state_dict().items() if "lora_" in name}
model.load_state_dict(torch.load(FOLDER / "ckpt_pretrained.pt", weights_only=True), strict=False)
lora.mark_only_lora_as_trainable(model, bias=BIAS)

optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
model.train()
for step in range(4):
    torch.manual_seed(step)  # for the dropout
    loss = nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten() % 5)
    optimizer.zero_grad()
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    results |= {f"gradient {step} {name}": value for name, value in gradients.items()}
    results[f"loss {step}"] = loss.detach()
    optimizer.step()

torch.save(lora.lora_state_dict(model, bias=BIAS), FOLDER / "ckpt_lora.pt")
saved = torch.load(FOUND / "ckpt_lora.pt", weights_only=True)
results |= {f"saved {name}": value for name, value in saved.items()}

again = BigModel()
again.load_state_dict(torch.load(FOUND / "ckpt_pretrained.pt", weights_only=True), strict=False)
again.load_state_dict(saved, strict=False)
for name, trained in (("trained", model), ("loaded", again)):
    with torch.no_grad():
        trained.eval()
        results[f"{name}, merged"] = trained(ids)
        results |= {f"{name}, merged {key}": value.clone() for key, value in trained.state_dict().items()}
        trained.train()
        torch.manual_seed(9)
        results[f"{name}, training"] = trained(ids)
