"""Tiny random transformers models, one for each form of attention in transformers 5.

Sizes: batch 2, 20 tokens, vocabulary 64, hidden 32, 4 heads, windows and chunks of 8. Token 0 is padding.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn
from transformers import AutoConfig

BATCH, LENGTH, VOCAB, WINDOW = 2, 20, 64, 8
PADDING = 4  # padding tokens at the start of the second sequence of left-padded inputs
PACKED = (12, 8)  # lengths of the sequences in each row of packed inputs
OLDEST, NEVER = "5.17.0", "99"
SEQ2SEQ = ("decoder_attentions", "cross_attentions", "encoder_attentions")
# Given to each configuration that has the field.
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "head_dim": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# Parts of configurations.
FOUR_LAYERS = {"num_hidden_layers": 4}
SLIDING = {**FOUR_LAYERS, "layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": WINDOW}
CHUNKED = {
    **FOUR_LAYERS,
    "layer_types": ["chunked_attention", "full_attention"] * 2,
    "no_rope_layers": [1, 0] * 2,
    "attention_chunk_size": WINDOW,
    "intermediate_size_mlp": 48,
}
GLOBAL_LOCAL = {"attention_types": [[["global", "local"], 1]], "window_size": WINDOW}
SOFTCAP = {"query_pre_attn_scalar": 8, "attn_logit_softcapping": 5.0}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
SMALL_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
SHARED_EXPERT = {**SMALL_EXPERTS, "shared_expert_intermediate_size": 16}
PER_LAYER = {"vocab_size_per_layer_input": VOCAB, "hidden_size_per_layer_input": 8}
GEMMA4 = {"num_kv_shared_layers": 0, "global_head_dim": 16}
SHARED_KV = {"num_kv_shared_layers": 2, "activation_sparsity_pattern": [0.0] * 4, "laurel_rank": 4}
LATENT = {
    "num_key_value_heads": 4,
    "head_dim": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "first_k_dense_replace": 1,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
}
LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    **FOUR_LAYERS,
}
MAMBA2 = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_chunk_size": 8}
JAMBA = {
    **FOUR_LAYERS,
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "num_experts": 4,
    "mamba_d_state": 8,
    "mamba_dt_rank": 4,
    "use_mamba_kernels": False,
}
RECURRENT = {"lru_width": 32, "attention_window_size": WINDOW, "block_types": ["recurrent", "attention"]}
XGLM = {"d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 48}
CTRL = {"n_embd": 32, "n_layer": 2, "n_head": 4, "dff": 48, "n_positions": 64}
BART = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_decoder_layers": 2}
DISENTANGLED = {"relative_attention": True, "position_buckets": 8, "pos_att_type": ["p2c", "c2p"]}
MARKERS = {"cls_token_id": 1, "sep_token_id": 2}
TOWER = {"num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8, "patch_size": 4}
CLIP = {**TOWER, "model_type": "clip_vision_model", "hidden_size": 16, "intermediate_size": 16, "projection_dim": 16}
JANUS = {
    "vision_config": {**TOWER, "hidden_size": 16, "mlp_ratio": 1.0, "projection_dim": 32},
    "vq_config": {
        "embed_dim": 4,
        "latent_channels": 32,
        "num_embeddings": 8,
        "base_channels": 32,
        "num_patches": 2,
        "channel_multiplier": [1],
        "num_res_blocks": 1,
        "projection_dim": 32,
        "image_token_embed_dim": 32,
    },
}
QWEN2_VL = {
    "text_config": {**SIZES, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}},
    "vision_config": {"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 1},
}


def installed(version: str) -> bool:
    """Whether transformers is at least at `version`. NEVER is above all versions."""
    return Version(transformers.__version__) >= Version(version)


@dataclass(frozen=True)
class Family:
    """A model type of transformers at a tiny size."""

    name: str
    model_type: str = ""  # `name` unless given
    config: Mapping[str, Any] = field(default_factory=dict)
    model_class: str = "AutoModelForCausalLM"
    attentions: tuple[str, ...] = ("attentions",)  # names in the model's output
    gain: float = 1.2  # of the random weights
    sdpa: str = OLDEST  # the first version whose "sdpa" gives the result of "eager"
    # The first version that makes a block-diagonal mask from position_ids that restart in a row.
    packed: str = OLDEST

    @property
    def implementations(self) -> tuple[str, ...]:
        """Implementations of attention that the model takes, with the same result."""
        return ("sdpa", "eager") if installed(self.sdpa) else ("eager",)

    @property
    def kinds(self) -> tuple[str, ...]:
        """Names of the inputs that the model takes."""
        return ("plain", "left_padded", "packed") if installed(self.packed) else ("plain", "left_padded")

    def build(self, attn_implementation: str) -> nn.Module:
        """Build the model in float32 and eval mode, with the same weights for each implementation."""
        model_type = self.model_type or self.name
        known = AutoConfig.for_model(model_type)
        fields = {*known.to_dict(), *known.attribute_map}
        sizes = {key: value for key, value in SIZES.items() if key in fields}
        dropouts = {key: 0.0 for key, value in known.to_dict().items() if "drop" in key and isinstance(value, float)}
        config = AutoConfig.for_model(model_type, **{**sizes, **dropouts, **copy.deepcopy(dict(self.config))})
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model: nn.Module = getattr(transformers, self.model_class).from_config(
                config, attn_implementation=attn_implementation
            )
            randomize(model, self.gain)
        return model.float().eval()

    def inputs(self, kind: str = "plain") -> dict[str, Tensor]:
        """Inputs of the forward pass: "plain", "left_padded" or "packed"."""
        tokens = torch.randint(3, VOCAB, (BATCH, LENGTH), generator=torch.Generator().manual_seed(1))
        inputs = {"input_ids": tokens}
        if kind == "left_padded":
            inputs["attention_mask"] = torch.ones_like(tokens)
            inputs["attention_mask"][1, :PADDING] = 0
            tokens[1, :PADDING] = 0
        if kind == "packed":
            inputs["position_ids"] = torch.cat([torch.arange(length) for length in PACKED]).expand(BATCH, LENGTH)
        if "decoder_attentions" in self.attentions:
            inputs["decoder_input_ids"] = tokens.flip(1)[:, : LENGTH - PADDING]
        return inputs


def randomize(model: nn.Module, gain: float) -> None:
    """Give all parameters random values. Many start as zero, or so small that attention is uniform."""
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            if id(parameter) in tables:
                parameter.copy_(noise)
            elif parameter.dim() >= 2:
                parameter.copy_(noise * gain / min(parameter.shape[-2:]) ** 0.5)
            elif name.endswith("sinks"):
                parameter.copy_(noise)
            else:
                # The norms of queries and keys undo the gain of the projections, so it goes to their weights.
                of_head = re.search(r"(q|k|query|key)_(layer)?norm\.weight", name)
                parameter.add_(0.2 * noise + (2 * gain - 1.8 if of_head else 0))


def reference(
    family: Family, model: nn.Module, inputs: Mapping[str, Tensor], output: str | None = None
) -> tuple[Tensor, ...]:
    """Attention probabilities of each layer with attention, (B, H, Q, K), of the eager implementation.

    Args:
        family: the family of `model`.
        model: built with "eager".
        inputs: of `family.inputs`.
        output: a name of `family.attentions`, the first one unless given.
    """
    with torch.no_grad():
        outputs = model(**inputs, output_attentions=True, use_cache=False)
    return tuple(probs for probs in outputs[output or family.attentions[0]] if probs is not None)


def masked(name: str, **fields: Any) -> Family:
    return Family(name, model_class="AutoModelForMaskedLM", packed=NEVER, **fields)


def seq2seq(name: str, config: Mapping[str, Any]) -> Family:
    return Family(name, config=config, model_class="AutoModelForSeq2SeqLM", packed=NEVER, attentions=SEQ2SEQ)


def image_text(name: str, config: Mapping[str, Any], **fields: Any) -> Family:
    return Family(name, config=config, model_class="AutoModelForImageTextToText", **fields)


FAMILIES = {
    family.name: family
    for family in (
        Family("llama"),
        Family("mistral", config={"sliding_window": WINDOW}),
        Family("mixtral", config=EXPERTS),
        Family("ministral", config=SLIDING),
        Family("qwen2", config={"use_sliding_window": True, **SLIDING}),
        Family("qwen2_moe", config=SHARED_EXPERT),
        Family("qwen3"),
        Family("qwen3_moe", config=SMALL_EXPERTS),
        Family("qwen3_next", config={**SHARED_EXPERT, **LINEAR}, packed=NEVER),
        Family("qwen3_5", "qwen3_5_text", LINEAR, packed=NEVER),
        Family("gemma"),
        Family("gemma2", config={**SLIDING, **SOFTCAP}, sdpa=NEVER),
        Family("gemma3", "gemma3_text", {**SLIDING, "query_pre_attn_scalar": 8}),
        Family("gemma3n", "gemma3n_text", {**SLIDING, **PER_LAYER, **SHARED_KV}, gain=0.8),
        Family("gemma4", "gemma4_text", {**SLIDING, **PER_LAYER, **GEMMA4}, gain=0.8),
        Family("vaultgemma", config={**SLIDING, **SOFTCAP}, sdpa=NEVER),
        Family("recurrent_gemma", config=RECURRENT, packed=NEVER),
        Family("phi"),
        Family("phi3", config={"sliding_window": WINDOW}),
        Family("phimoe", config=EXPERTS),
        Family("gpt2"),
        Family("gpt_neo", config=GLOBAL_LOCAL, sdpa=NEVER),
        Family("gpt_neox"),
        Family("gptj", config={"rotary_dim": 4}, sdpa="5.24.0"),
        Family("codegen", config={"rotary_dim": 4}, sdpa="5.24.0"),
        Family("gpt_bigcode", config={"num_key_value_heads": 1}),
        Family("gpt_oss", config={**SLIDING, **EXPERTS}, sdpa=NEVER, packed=NEVER),
        Family("mimo_v2_flash", config={**SLIDING, **SMALL_EXPERTS, "v_head_dim": 16}, sdpa=NEVER),
        Family("opt", config={"ffn_dim": 48, "word_embed_proj_dim": 32}, packed=NEVER),
        Family("bloom", sdpa=NEVER, packed=NEVER),
        Family("falcon", config={"num_kv_heads": 2, "new_decoder_architecture": True}, packed="5.24.0"),
        # "sdpa" adds the bias once, "eager" twice.
        Family("falcon_alibi", "falcon", {"num_kv_heads": 1, "alibi": True}, sdpa=NEVER, packed="5.24.0"),
        Family("mpt", sdpa=NEVER, packed=NEVER),
        Family("xglm", config=XGLM, sdpa=NEVER, packed=NEVER),
        Family("biogpt", packed=NEVER),
        Family("ctrl", config=CTRL),
        Family("olmo"),
        Family("olmo2"),
        Family("olmo3", config=SLIDING),
        Family("cohere"),
        Family("cohere2", config=SLIDING),
        Family("deepseek_v2", config=LATENT),
        Family("deepseek_v3", config=LATENT),
        Family("diffllama"),
        Family("stablelm"),
        Family("starcoder2", config={"sliding_window": WINDOW}),
        Family("glm"),
        Family("glm4"),
        Family("granite", gain=0.8),
        Family("granitemoe", config=EXPERTS),
        Family("granite_swa", config=SLIDING, sdpa=NEVER),
        Family("smollm3", config={"num_hidden_layers": 4}),
        Family("llama4", "llama4_text", {**EXPERTS, **CHUNKED}, packed="5.23.0"),
        Family("exaone4", config=SLIDING),
        Family("nemotron", gain=0.8),
        Family("helium"),
        Family("persimmon"),
        Family("jamba", config=JAMBA, packed=NEVER),
        Family("bamba", config={**MAMBA2, "num_hidden_layers": 4, "attn_layer_indices": [1, 3]}, packed=NEVER),
        Family("falcon_h1", config={**MAMBA2, "mamba_d_ssm": 64}, packed=NEVER),
        Family("lfm2", config={"layer_types": ["conv", "full_attention"]}, packed=NEVER),
        Family("bitnet"),
        Family("ernie4_5"),
        Family("seed_oss"),
        Family("hunyuan", "hunyuan_v1_dense"),
        Family("apertus"),
        Family("nanochat"),
        Family("doge", config={"num_experts": 4}, sdpa="5.18.0"),
        Family("modernbert_decoder", "modernbert-decoder", {**SLIDING, **MARKERS}),
        image_text("janus", {"text_config": SIZES, **JANUS}),
        image_text("llava", {"text_config": {"model_type": "llama", **SIZES}, "vision_config": CLIP}),
        image_text("qwen2_vl", QWEN2_VL, packed=NEVER),
        seq2seq("bart", BART),
        seq2seq("pegasus", BART),
        seq2seq("marian", {**BART, "decoder_vocab_size": VOCAB}),
        seq2seq("t5", T5),
        masked("bert"),
        masked("roberta"),
        masked("distilbert", config={"dim": 32, "hidden_dim": 48}),
        masked("mpnet", sdpa=NEVER),
        masked("deberta_v2", model_type="deberta-v2", config=DISENTANGLED, sdpa=NEVER),
        masked("modernbert", config={**SLIDING, **MARKERS, "local_attention": WINDOW}),
    )
}
