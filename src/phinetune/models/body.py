"""Let the blocks of well-known models train faster on a CPU: the same arithmetic in fewer passes.

Modules keep their class, weights and names; their `forward` gives way to one of `body_functions` while
gradients are formed on a CPU, and stays transformers' own everywhere else. Only classes known exactly are
touched. Knows nothing of adapters: linear layers are called as they are.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from phinetune.kernels.products import products_for
from phinetune.lora.frozen import frozen_linear
from phinetune.models.attention import IMPLEMENTATION, segment_attention
from phinetune.models.body_functions import branch_norm, gated_silu, rotated_heads

Forward = Callable[..., Any]


def speed_up(model: PreTrainedModel) -> PreTrainedModel:
    """Take the place of what is known in `model`, and return it; it may go to a device afterwards."""
    for module in model.modules():
        kind = _KINDS.get(f"{type(module).__module__.rpartition('.')[2]}.{type(module).__name__}")
        if type(module) is nn.Linear:
            module.forward = functools.partial(_linear, module)  # type: ignore[method-assign]
        elif kind is not None and type(module).__module__.startswith("transformers.models."):
            # An attribute of the module goes before its class's method; a subclass would change its name.
            module.forward = functools.partial(kind, module)
    return model


def _plain(module: nn.Module, *args: Any, **options: Any) -> Any:
    """The class's own forward, of the class that the module has by now: dividing a base changes it."""
    return type(module).forward(module, *args, **options)


def _linear(module: Any, x: Tensor) -> Tensor:
    is_frozen = not any(parameter.requires_grad for parameter in module.parameters(recurse=False))
    if is_frozen and products_for(x.reshape(-1, x.shape[-1]), module.weight.t()) is not None:
        return frozen_linear(x, module.weight, module.bias)
    out: Tensor = _plain(module, x)
    return out


def _is_trained_on_cpu(x: Tensor) -> bool:
    return torch.is_grad_enabled() and x.device.type == "cpu"


def _norm(module: Any, x: Tensor) -> Tensor:
    out: Tensor = _branch(module, x, None)[1] if _is_fast_norm(module, x) else _plain(module, x)
    return out


def _is_fast_norm(module: Any, x: Tensor) -> bool:
    return _is_trained_on_cpu(x) and not module.weight.requires_grad and module.weight.dtype == x.dtype


def _branch(module: Any, x: Tensor, branch: Tensor | None) -> tuple[Tensor, Tensor]:
    """x + branch and its norm, for a norm module of a known kind."""
    return branch_norm(x, branch, module.weight, module.variance_epsilon)


def _is_silu(activation: nn.Module) -> bool:
    return type(activation).__name__ in ("SiLU", "SiLUActivation")


def _mlp(module: Any, x: Tensor) -> Tensor:
    out: Tensor
    if not (_is_trained_on_cpu(x) and _is_silu(module.act_fn)):
        out = _plain(module, x)
    else:
        out = module.down_proj(gated_silu(module.gate_proj(x), module.up_proj(x)))
    return out


def _fused_mlp(module: Any, x: Tensor) -> Tensor:
    out: Tensor
    if not (_is_trained_on_cpu(x) and _is_silu(module.activation_fn)):
        out = _plain(module, x)
    else:
        out = module.down_proj(gated_silu(module.gate_up_proj(x)))
    return out


def _fused_attention(
    module: Any,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    attention_mask: Tensor | None,
    past_key_values: Any = None,
    **options: Any,
) -> tuple[Tensor, Any]:
    """Phi-3's: one projection for query, key and value."""
    config = module.config
    is_ours = config._attn_implementation == IMPLEMENTATION and past_key_values is None
    if not (is_ours and _is_trained_on_cpu(hidden_states)):
        done: tuple[Tensor, Any] = _plain(
            module, hidden_states, position_embeddings, attention_mask, past_key_values, **options
        )
        return done
    q, k, v = rotated_heads(
        module.qkv_proj(hidden_states),
        position_embeddings,
        size=module.head_dim,
        num_heads=config.num_attention_heads,
        kv_heads=module.num_key_value_heads,
    )
    out, weights = segment_attention(
        module,
        q,
        k,
        v,
        attention_mask,
        dropout=module.attention_dropout if module.training else 0.0,
        scaling=module.scaling,
        sliding_window=getattr(config, "sliding_window", None),
        **options,
    )
    return module.o_proj(out.reshape(*hidden_states.shape[:-1], -1)), weights


def _block(
    module: Any, hidden_states: Tensor, *args: Any, wanted_rows: Tensor | None = None, **options: Any
) -> Any:
    # Gradient checkpointing is a matter of the class's own forward; what is within stays fast.
    is_checkpointed = module.training and module.gradient_checkpointing
    if args or is_checkpointed or not _is_fast_norm(module.input_layernorm, hidden_states):
        return _plain(module, hidden_states, *args, **options)
    past, x = _branch(module.input_layernorm, hidden_states, None)
    x, _ = module.self_attn(hidden_states=x, **options)
    if wanted_rows is not None and _is_last(module):
        # No other token is read after this block, and none sees another from here on.
        past, x = past[:, wanted_rows], x[:, wanted_rows]
    past, x = _branch(module.post_attention_layernorm, past, _dropped(module, "resid_attn_dropout", x))
    return past + _dropped(module, "resid_mlp_dropout", module.mlp(x))


def _is_last(module: Any) -> bool:
    return bool(module.self_attn.layer_idx == module.self_attn.config.num_hidden_layers - 1)


def _dropped(module: Any, name: str, x: Tensor) -> Tensor:
    dropout = getattr(module, name, None)  # Phi-3's alone
    return x if dropout is None else dropout(x)


_KINDS: dict[str, Forward] = {
    "modeling_phi3.Phi3Attention": _fused_attention,
    "modeling_phi3.Phi3MLP": _fused_mlp,
}
for _file, _name in (
    ("phi3", "Phi3"),
    ("llama", "Llama"),
    ("mistral", "Mistral"),
    ("qwen2", "Qwen2"),
    ("qwen3", "Qwen3"),
):
    _KINDS[f"modeling_{_file}.{_name}RMSNorm"] = _norm
    _KINDS[f"modeling_{_file}.{_name}DecoderLayer"] = _block
    _KINDS.setdefault(f"modeling_{_file}.{_name}MLP", _mlp)
