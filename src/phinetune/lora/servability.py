"""Which engines will run an adapter as it is, and what to change for the others.

Read from the sources: vLLM 0.32, llama.cpp's converter and server, Ollama, ONNX Runtime GenAI 0.18,
MLX-LM 0.32, PEFT 0.3 to 0.21. Nothing is run here. Knows nothing of files.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from phinetune.lora.forms import Form
from phinetune.lora.fusing import FUSIONS
from phinetune.lora.weights import AdapterWeights

Answer = Literal["as it is", "with a setting", "after conversion", "no"]
# vLLM allocates for one of these; the smallest that holds the adapter must be asked for, 16 is the default.
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
# Ollama converts safetensors adapters where the base's GGUF has the architecture llama or gemma2.
_OLLAMA_SAFETENSORS = ("llama", "mistral", "gemma2")
# The first release of PEFT that reads what the adapter uses; it ignores or refuses the keys it does not know.
_PEFT_VERSIONS = {"DoRA": "0.9", "rsLoRA": "0.8", "ranks or alphas by layer": "0.6"}
_MERGE = "merge it into the base: phinetune adapter merge"


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Whether one engine runs the adapter; `why` and `do` where it is not as it is."""

    engine: str
    answer: Answer
    why: str = ""
    do: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Facts:
    weights: AdapterWeights
    form: Form
    model_type: str

    @property
    def is_folded(self) -> bool:
        """Whether every scale is the one alpha over the rank, as the simplest readers assume."""
        settings = self.weights.settings
        return not settings.use_rslora and not settings.alpha_pattern

    @property
    def is_transposed(self) -> bool:
        return self.weights.is_transposed or self.model_type == "gpt2"

    @property
    def has_fused(self) -> bool:
        return any(fusion.fused in self.weights.target_modules for fusion in FUSIONS)

    @property
    def has_separate_on_fused_base(self) -> bool:
        return is_separate_on_fused(self.weights, self.model_type)


def is_separate_on_fused(weights: AdapterWeights, model_type: str) -> bool:
    """Whether the adapter updates q, k, v or gate, up one by one, and the base has each in one layer."""
    parts = {part for fusion in FUSIONS for part in fusion.parts}
    return model_type == "phi3" and bool(parts & set(weights.target_modules))


def servability(weights: AdapterWeights, form: Form, model_type: str = "") -> list[Verdict]:
    """One verdict per engine; `model_type` is the base's, as transformers calls it, "" when not known."""
    facts = _Facts(weights=weights, form=form, model_type=model_type)
    return [_vllm(facts), _llama_cpp(facts), _ollama(facts), _onnx(facts), _mlx(facts), _peft(facts)]


def _vllm(facts: _Facts) -> Verdict:
    engine, weights = "vLLM", facts.weights
    rank = max(update.rank for update in weights.updates.values())
    if weights.uses_dora:
        return Verdict(engine=engine, answer="no", why="it refuses DoRA", do=_MERGE)
    if facts.is_transposed:
        return Verdict(engine=engine, answer="no", why="its GPT-2 takes no adapters", do=_MERGE)
    if rank > VLLM_RANKS[-1]:
        why = f"the rank is {rank}, the greatest it takes is {VLLM_RANKS[-1]}"
        return Verdict(
            engine=engine, answer="after conversion", why=why, do="cut it: adapter convert --rank 512"
        )
    if facts.has_separate_on_fused_base:
        return _to_fused(engine)
    if facts.form != "peft":
        return Verdict(
            engine=engine,
            answer="after conversion",
            why="it takes PEFT folders",
            do="adapter convert --to peft",
        )
    if rank > 16:
        needed = next(size for size in VLLM_RANKS if size >= rank)
        return Verdict(
            engine=engine,
            answer="with a setting",
            why=f"the rank is {rank}, its default limit 16",
            do=f"--enable-lora --max-lora-rank {needed}",
        )
    return Verdict(engine=engine, answer="as it is", do="--enable-lora --lora-modules name=folder")


def _llama_cpp(facts: _Facts) -> Verdict:
    return _gguf_fault("llama.cpp", facts) or Verdict(
        engine="llama.cpp",
        answer="after conversion",
        why="it takes GGUF adapters",
        do="llama.cpp's convert_lora_to_gguf.py, then --lora file.gguf",
    )


def _ollama(facts: _Facts) -> Verdict:
    fault = _gguf_fault("Ollama", facts)
    if fault:
        return fault
    alpha = facts.weights.settings.alpha
    reads_alpha = alpha >= 0 and alpha == int(alpha)
    if facts.model_type in _OLLAMA_SAFETENSORS and reads_alpha:
        return Verdict(engine="Ollama", answer="as it is", do="ADAPTER folder, in the Modelfile")
    why = "it reads safetensors adapters of Llama, Mistral and Gemma 2 only"
    if not reads_alpha:
        why = f"it reads whole numbers as lora_alpha only, this one is {alpha:g}"
    elif not facts.model_type:
        why += "; this base is not known"
    return Verdict(
        engine="Ollama",
        answer="after conversion",
        why=why,
        do="llama.cpp's convert_lora_to_gguf.py, then ADAPTER file.gguf",
    )


def _gguf_fault(engine: str, facts: _Facts) -> Verdict | None:
    if facts.weights.uses_dora:
        return Verdict(engine=engine, answer="no", why="its converter ignores DoRA", do=_MERGE)
    if facts.is_transposed:
        return Verdict(
            engine=engine, answer="no", why="its converter turns GPT-2's updates the wrong way", do=_MERGE
        )
    if facts.has_separate_on_fused_base:
        return _to_fused(engine)
    if not facts.is_folded:
        return Verdict(
            engine=engine,
            answer="after conversion",
            why="its converter ignores use_rslora and alpha_pattern, and would scale wrongly",
            do="adapter convert --fold, and convert the result to GGUF",
        )
    if facts.form != "peft":
        return Verdict(
            engine=engine,
            answer="after conversion",
            why="its converter reads PEFT folders",
            do="adapter convert --to peft",
        )
    return None


def _to_fused(engine: str) -> Verdict:
    return Verdict(
        engine=engine,
        answer="after conversion",
        why="this base has fused projections, the adapter separate ones",
        do="adapter convert --layout fused",
    )


def _onnx(facts: _Facts) -> Verdict:
    engine = "ONNX Runtime GenAI"
    if facts.weights.uses_dora or facts.has_fused:
        why = "its graphs have no DoRA" if facts.weights.uses_dora else "its builder splits fused projections"
        return Verdict(engine=engine, answer="no", why=f"{why}, so names cannot match", do=_MERGE)
    return Verdict(
        engine=engine,
        answer="after conversion",
        why="it takes .onnx_adapter files for graphs with LoRA inputs",
        do="Olive's convert-adapters, on a model built with LoRA inputs; or merge it",
    )


def _mlx(facts: _Facts) -> Verdict:
    if facts.weights.uses_dora:
        return Verdict(engine="MLX", answer="no", why="its DoRA files are not written here", do=_MERGE)
    if facts.has_separate_on_fused_base:
        return _to_fused("MLX")
    if facts.form == "mlx":
        return Verdict(engine="MLX", answer="as it is", do="--adapter-path folder")
    if not all(".layers." in f".{name}" for name in facts.weights.updates):
        return Verdict(engine="MLX", answer="no", why="it adapts only layers named layers.N", do=_MERGE)
    return Verdict(
        engine="MLX",
        answer="after conversion",
        why="it has a folder form of its own",
        do="adapter convert --to mlx",
    )


def _peft(facts: _Facts) -> Verdict:
    if facts.has_separate_on_fused_base:
        return _to_fused("PEFT")
    if facts.form != "peft":
        return Verdict(
            engine="PEFT",
            answer="after conversion",
            why="it takes PEFT folders",
            do="adapter convert --to peft",
        )
    settings = facts.weights.settings
    uses = {
        "DoRA": facts.weights.uses_dora,
        "rsLoRA": settings.use_rslora,
        "ranks or alphas by layer": bool(settings.rank_pattern or settings.alpha_pattern),
    }
    newest = next((name for name in _PEFT_VERSIONS if uses[name]), "")
    version = _PEFT_VERSIONS[newest] if newest else "0.4"
    why = f"{newest} needs PEFT {version} or newer" if newest else ""
    return Verdict(engine="PEFT", answer="as it is", why=why, do="PeftModel.from_pretrained(base, folder)")
