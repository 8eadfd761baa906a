"""Weights trained as they are, beside the updates: biases, whole modules, rows of single tokens.

Each is a float32 weight that stands in for one of the base's, which stays as it is: switched off or taken
away, the base answers as before. Knows nothing of updates or files.

# T tokens, H hidden size, K trained rows, V vocabulary
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol, cast

import torch
from torch import Tensor, nn

from phinetune.base.errors import SettingsError, nearest
from phinetune.lora.frozen import TiledLinear
from phinetune.lora.settings import LoraSettings

ROWS = "trainable_tokens_delta"
Kind = Literal["bias", "module", "rows"]


@dataclass(frozen=True, slots=True, kw_only=True)
class WholeName:
    """One weight to be trained whole: where it is, its attribute there, and what it counts as."""

    module: str
    attribute: str
    kind: Kind

    @property
    def name(self) -> str:
        return f"{self.module}.{self.attribute}"


class TrainedWeight:
    """A parameter of a module, trained: the module sees a copy in the base's type wherever it asks for it."""

    def __init__(self, module: nn.Module, place: WholeName) -> None:
        self.place, self.is_enabled = place, True
        frozen = module._parameters[place.attribute]
        assert frozen is not None
        if type(frozen.data).__name__ == "DTensor":
            raise SettingsError(
                f"'{place.name}' cannot be trained whole",
                where="bias" if place.kind == "bias" else "modules_to_save",
                why="--shard divides the weights of the blocks among the processes",
                do="leave --shard out, or train the updates alone",
            )
        del module._parameters[place.attribute]
        self._frozen, self._module, self._class = frozen, module, type(module)
        self.weight = nn.Parameter(frozen.detach().float().clone())
        module.register_parameter(f"trained_{place.attribute}", self.weight)
        # A class of the same name with a property: code that asks for the weight is not changed.
        namespace = {place.attribute: property(lambda _: self.value())}
        module.__class__ = type(self._class.__name__, (self._class,), namespace)

    def value(self) -> Tensor:
        return self.weight.to(self._frozen.dtype) if self.is_enabled else self._frozen

    def reset(self) -> None:
        """The base's own value."""
        with torch.no_grad():
            self.weight.copy_(self._frozen)

    def detach(self, model: nn.Module) -> None:
        self._module.__class__ = self._class
        del self._module._parameters[f"trained_{self.place.attribute}"]
        self._module._parameters[self.place.attribute] = self._frozen


class TokenRows:
    """Rows of the token embedding, trained; of the output head too where the two are one weight."""

    def __init__(self, model: nn.Module, place: WholeName, indices: tuple[int, ...]) -> None:
        self.place = place
        embedding, head = model.get_submodule(place.module), _head(model)
        self._ids_K = torch.tensor(indices, device=_weight(embedding).device)
        self.weight = nn.Parameter(_weight(embedding)[self._ids_K].detach().float().clone())
        self._wrapped: dict[str, _Rows] = {place.module: EmbeddingRows(embedding, self)}
        self._wrapped[place.module].register_parameter("trained_rows", self.weight)
        if head is not None and _weight(head) is _weight(embedding):
            name = next(name for name, module in model.named_modules() if module is head)
            self._wrapped[name] = HeadRows(head, self)
        self.is_enabled = True
        for name, wrapper in self._wrapped.items():
            _put(model, name, wrapper)

    @property
    def ids_K(self) -> Tensor:
        return self._ids_K

    def reset(self) -> None:
        """The base's own rows."""
        with torch.no_grad():
            self.weight.copy_(_weight(self._wrapped[self.place.module].inner)[self._ids_K])

    def detach(self, model: nn.Module) -> None:
        for name, wrapper in self._wrapped.items():
            _put(model, name, wrapper.inner)


class _Rows(nn.Module):
    """What stands in the place of the embedding or the head; model code may ask for its weight."""

    def __init__(self, inner: nn.Module, rows: TokenRows) -> None:
        super().__init__()
        self.inner, self.rows = inner, rows

    @property
    def weight(self) -> Tensor:
        """The frozen weight, without the trained rows."""
        return _weight(self.inner)


class EmbeddingRows(_Rows):
    def __init__(self, inner: nn.Module, rows: TokenRows) -> None:
        super().__init__(inner, rows)
        place_V = torch.full((len(_weight(inner)),), -1, device=rows.ids_K.device)
        place_V[rows.ids_K] = torch.arange(len(rows.ids_K), device=rows.ids_K.device)
        self.register_buffer("place_V", place_V, persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.inner(ids)
        if not self.rows.is_enabled:
            return out
        place = cast(Tensor, self.place_V)[ids]
        own = nn.functional.embedding(place.clamp(min=0), self.rows.weight).to(out.dtype)
        scale = getattr(self.inner, "embed_scale", None)  # Gemma 3 scales inside its embedding
        if scale is not None:
            own = own * torch.as_tensor(scale).to(own)
        return torch.where((place >= 0)[..., None], own, out)


class HeadRows(_Rows):
    """The output head with trained rows, and what the loss needs of it."""

    def forward(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.inner(hidden)
        if not self.rows.is_enabled:
            return logits
        own = nn.functional.linear(hidden, self.rows.weight.to(hidden.dtype))
        return logits.index_copy(-1, self.rows.ids_K, own)


class Part(Protocol):
    """A weight trained whole."""

    place: WholeName
    weight: nn.Parameter
    is_enabled: bool

    def reset(self) -> None:
        """Set the weight to the base's own."""

    def detach(self, model: nn.Module) -> None:
        """Put the base's own weight back."""


def whole_names(
    model: nn.Module, settings: LoraSettings, adapted: Mapping[str, nn.Module]
) -> list[WholeName]:
    """The weights that the settings want trained whole. Raises `SettingsError` where they want none."""
    biases = list(_biases(model, settings, adapted))
    known = {place.name for place in biases}
    modules = [place for place in _modules(model, settings, adapted) if place.name not in known]
    return [*biases, *modules, *_rows(model, settings, modules)]


def make_part(model: nn.Module, place: WholeName, settings: LoraSettings) -> Part:
    """Put one of `whole_names` in the place of the base's weight; the base's own layers, unadapted."""
    if place.kind == "rows":
        return TokenRows(model, place, settings.trainable_token_indices)
    return TrainedWeight(_bare(model, place.module), place)


def whole_shape(model: nn.Module, place: WholeName, settings: LoraSettings) -> tuple[int, ...]:
    """The shape such a weight has in files."""
    module = _bare(model, place.module)
    if place.kind == "rows":
        return len(settings.trainable_token_indices), _weight(module).shape[1]
    return tuple(getattr(module, place.attribute).shape)


def _biases(
    model: nn.Module, settings: LoraSettings, adapted: Mapping[str, nn.Module]
) -> Iterator[WholeName]:
    if settings.bias == "none":
        return
    modules = list(adapted.items() if settings.bias == "lora_only" else model.named_modules())
    if any(isinstance(module, TiledLinear) and module.bias is not None for _, module in modules):
        raise _is_quantized("biases", "bias")
    found = [
        WholeName(module=name, attribute=attribute, kind="bias")
        for name, module in modules
        for attribute, weight in module.named_parameters(recurse=False)
        if "bias" in attribute and weight is not None
    ]
    if not found:
        raise SettingsError(
            f"there are no biases to train with bias: {settings.bias}",
            where="bias",
            why="the adapted layers have none" if settings.bias == "lora_only" else "the model has none",
            do="write bias: none",
        )
    yield from found


def _modules(
    model: nn.Module, settings: LoraSettings, adapted: Mapping[str, nn.Module]
) -> Iterator[WholeName]:
    known = dict(model.named_modules())
    head, embedding = _head(model), _embedding(model)
    is_tied = head is not None and embedding is not None and _weight(head) is _weight(embedding)
    seen: set[str] = set()
    for asked in settings.modules_to_save:
        matched = [name for name in known if name == asked or name.endswith(f".{asked}")]
        if not matched:
            near = nearest(asked, sorted({name.rsplit(".", 1)[-1] for name in known}))
            raise SettingsError(
                f"'{asked}' in modules_to_save is no module of the model",
                where="modules_to_save",
                do=f"write '{near}'" if near else "name modules, for example lm_head",
            )
        for name in matched:
            within = next((other for other in adapted if f"{other}.".startswith(f"{name}.")), None)
            if within:
                raise SettingsError(
                    f"'{asked}' in modules_to_save holds an adapted layer",
                    where="modules_to_save",
                    why=f"'{within}' would be trained twice",
                    do="leave it out of modules_to_save, or out of lora_target_modules",
                )
            if any(isinstance(module, TiledLinear) for module in known[name].modules()):
                raise _is_quantized(f"'{name}'", "modules_to_save")
            if is_tied and known[name] in (head, embedding):
                raise SettingsError(
                    f"'{asked}' cannot be trained as a whole",
                    where="modules_to_save",
                    why="embedding and output head of this model are one weight, which would become two",
                    do="train the rows of the tokens you need: trainable_token_indices",
                )
            for path, _ in known[name].named_parameters(prefix=name):
                if path not in seen:
                    seen.add(path)
                    module, _, attribute = path.rpartition(".")
                    yield WholeName(module=module, attribute=attribute, kind="module")


def _is_quantized(what: str, where: str) -> SettingsError:
    return SettingsError(
        f"{what} of a quantised base cannot be trained whole",
        where=where,
        why="its linear layers are kept in fewer bits",
        do=f"write quantize: none, or leave {where} out",
    )


def _rows(model: nn.Module, settings: LoraSettings, others: list[WholeName]) -> Iterator[WholeName]:
    indices = settings.trainable_token_indices
    if not indices:
        return
    embedding = _embedding(model)
    name = next(name for name, module in model.named_modules() if module is embedding)
    if any(other.module == name for other in others):
        raise SettingsError(
            "the token embedding would be trained twice",
            where="trainable_token_indices",
            why=f"'{name}' is in modules_to_save",
            do="leave out one of the two",
        )
    num_rows = len(_weight(cast(nn.Module, embedding)))
    wrong = [index for index in indices if not 0 <= index < num_rows]
    if wrong or len(set(indices)) < len(indices):
        raise SettingsError(
            f"trainable_token_indices holds {wrong[0]}, which is no token"
            if wrong
            else "trainable_token_indices names a token twice",
            where="trainable_token_indices",
            why=f"the embedding has rows 0 to {num_rows - 1}",
            do="take rows that the tokenizer does not use yet, or of tokens you have given another meaning",
        )
    yield WholeName(module=name, attribute=ROWS, kind="rows")


def _bare(model: nn.Module, name: str) -> nn.Module:
    """The base's own module of this name, under an adapted layer too."""
    module = model.get_submodule(name)
    inner = getattr(module, "base", None)
    return inner if isinstance(inner, nn.Module) and hasattr(module, "lora_A") else module


def _embedding(model: nn.Module) -> nn.Module | None:
    find: Any = getattr(model, "get_input_embeddings", None)
    return cast("nn.Module | None", find()) if find else None


def _head(model: nn.Module) -> nn.Module | None:
    find: Any = getattr(model, "get_output_embeddings", None)
    return cast("nn.Module | None", find()) if find else None


def _weight(module: nn.Module) -> Tensor:
    return cast(Tensor, module.weight)


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent_name, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent_name), child, module)
