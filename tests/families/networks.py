"""Every architecture of transformers that a task takes, at toy size with random weights: built by rule, not one by one.

A configuration's own defaults are shrunk by the names of its fields; a family whose fields say otherwise has a row in
``OWN``. What cannot be made small by either is told apart from what ranksure refuses.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, PreTrainedModel
from transformers.models.auto import modeling_auto

CLASSES = 3
WORDS = ["[PAD]", "[UNK]", "<s>", "</s>", "[MASK]", "good", "bad", "film", "food", "the", "a", "was", "not", "very"]
WORDS += ["fine", "awful", "poor", "nice", "warm", "cold", "red"]
MOST_PARAMETERS = 7_000_000

MAPPINGS = {
    "text": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "image": modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    "speech": modeling_auto.MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES,
    "causal": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
}
"""By kind: the model types of transformers and the class that the kind's auto class makes of each."""

_WIDTH, _HEADS, _INNER, _LAYERS, _LENGTH = 16, 2, 24, 2, 64
_SHRUNK: dict[str, Any] = {
    **dict.fromkeys(["vocab_size", "vocab_size_per_layer_input", "decoder_vocab_size"], len(WORDS)),
    **dict.fromkeys(
        ["hidden_size", "d_model", "n_embd", "emb_dim", "dim", "embedding_size", "word_embed_proj_dim", "d_latents"]
        + ["input_embedding_size", "output_embedding_size", "pooler_hidden_size", "embedding_dim", "output_hidden_size"]
        + ["pooler_output_size", "projection_dim", "lru_width", "prediction_head_size", "classifier_proj_size"]
        + ["hidden_size_per_layer_input", "router_hidden_size", "attention_hidden_size", "decoder_hidden_size"],
        _WIDTH,
    ),
    **dict.fromkeys(
        ["num_attention_heads", "num_key_value_heads", "n_head", "n_heads", "num_kv_heads", "attention_heads"]
        + ["encoder_attention_heads", "decoder_attention_heads", "num_encoder_attention_heads", "index_n_heads"]
        + ["num_decoder_attention_heads", "linear_num_key_heads", "linear_num_value_heads", "linear_num_heads"]
        + ["swa_num_attention_heads", "swa_num_key_value_heads", "num_query_groups", "moe_num_experts"],
        _HEADS,
    ),
    **dict.fromkeys(
        ["head_dim", "qk_rope_head_dim", "v_head_dim", "qk_nope_head_dim", "d_kv", "d_head", "kv_channels", "dim_head"]
        + ["linear_key_head_dim", "linear_value_head_dim", "linear_head_dim", "swa_head_dim", "attention_head_size"]
        + ["kv_lora_rank", "q_lora_rank", "index_head_dim", "o_lora_rank", "mamba_d_state", "state_size", "d_rel"]
        + ["mamba_d_head", "mamba_headdim", "mamba_dt_rank", "time_step_rank", "adapter_rank", "laurel_rank"]
        + ["ssm_state_size", "mamba_head_dim", "rotary_dim", "hc_lowrank"],
        8,
    ),
    "qk_head_dim": 16,
    "attention_head_dim": 16,
    "mamba_n_heads": 4,
    "mamba_num_heads": 4,
    **dict.fromkeys(
        ["intermediate_size", "encoder_ffn_dim", "decoder_ffn_dim", "ffn_dim", "d_inner", "d_ff", "dff", "hidden_dim"]
        + ["moe_intermediate_size", "shared_expert_intermediate_size", "ffn_hidden_size", "feed_forward_size"]
        + ["shared_intermediate_size", "dense_intermediate_size", "intermediate_size_mlp", "expert_ffn_hidden_size"]
        + ["shared_experts_intermediate_size", "moe_shared_expert_intermediate_size", "dim_ff", "n_inner"],
        _INNER,
    ),
    **dict.fromkeys(
        ["num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers"]
        + ["num_encoder_layers", "num_decoder_layers", "num_decoder_layers", "num_blocks", "max_window_layers"],
        _LAYERS,
    ),
    **dict.fromkeys(
        ["max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "n_ctx", "context_length"]
        + ["max_2d_position_embeddings", "max_source_positions", "max_target_positions", "sliding_window"],
        _LENGTH,
    ),
    **dict.fromkeys(
        ["num_experts", "num_local_experts", "n_routed_experts", "zero_expert_num", "num_experts_per_tok", "moe_topk"]
        + ["num_codevectors_per_group", "num_latents", "num_self_attends_per_block", "num_clusters", "num_ctc_classes"],
        4,
    ),
    **dict.fromkeys(["num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k"], 2),
    **dict.fromkeys(["n_group", "topk_group", "hash_code_len", "num_hash", "num_zero_experts"], 1),
    **dict.fromkeys(["image_size", "input_size"], 32),
    **dict.fromkeys(["patch_size"], 8),
    "num_mel_bins": 16,
    "initializer_range": 0.3,
    "init_std": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 3,
    "sep_token_id": 3,
    "cls_token_id": 2,
    "mask_token_id": 4,
    "decoder_start_token_id": 0,
    "hybrid_layer_ids": [1],
}
"""Values by the name of a field that a configuration has."""

_WAVES = {
    "conv_dim": [8, 8],
    "conv_kernel": [10, 4],
    "conv_stride": [5, 4],
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "num_feat_extract_layers": 2,
    "tdnn_dim": [16, 16],
    "tdnn_kernel": [3, 3],
    "tdnn_dilation": [1, 1],
}
_PYRAMID = {"hidden_sizes": [8, 12, 16, 16], "depths": [1, 1, 1, 1]}
_HYBRID = {"layers_block_type": ["linear_attention", "hybrid"]}
OWN: dict[str, dict[str, Any]] = {
    "bit": {**_PYRAMID, "num_groups": 2, "embedding_size": 8},
    "convnext": {**_PYRAMID, "image_size": 64},
    "convnextv2": {**_PYRAMID, "image_size": 64},
    "cvt": {"embed_dim": [8, 12, 16], "num_heads": [1, 2, 2], "depth": [1, 1, 1], "image_size": 64},
    "efficientnet": {"width_coefficient": 0.1, "depth_coefficient": 0.1, "hidden_dim": 128, "image_size": 32},
    "focalnet": {**_PYRAMID, "embed_dim": 8, "patch_size": 2},
    "hgnet_v2": {
        "stem_channels": [3, 8, 8],
        "stage_in_channels": [8, 8, 12, 12],
        "stage_mid_channels": [8, 8, 8, 8],
        "stage_out_channels": [8, 12, 12, 16],
        "stage_numb_of_layers": [1, 1, 1, 1],
        "stage_num_blocks": [1, 1, 1, 1],
        "hidden_sizes": [8, 12, 12, 16],
        "embedding_size": 8,
    },
    "hiera": {"embed_dim": 8, "image_size": [64, 64], "depths": [1, 1, 1, 1], "num_heads": [1, 1, 1, 1]},
    "levit": {
        "patch_size": 16,
        "image_size": 64,
        "hidden_sizes": [16, 16, 16],
        "num_attention_heads": [2, 2, 2],
        "depths": [1, 1, 1],
        "key_dim": [8, 8, 8],
        "initializer_range": 0.1,  # its batch norms do not normalise: larger weights make logits of 1e34
    },
    "mobilenet_v1": {"depth_multiplier": 0.25},
    "mobilevit": {"hidden_sizes": [8, 12, 16], "neck_hidden_sizes": [4, 4, 8, 8, 8, 12, 16], "patch_size": 2},
    "mobilevitv2": {"patch_size": 2, "image_size": 64},
    "poolformer": _PYRAMID,
    "pvt": {**_PYRAMID, "num_attention_heads": [1, 1, 1, 1], "mlp_ratios": [2, 2, 2, 2]},
    "pvt_v2": {**_PYRAMID, "num_attention_heads": [1, 1, 1, 1], "mlp_ratios": [2, 2, 2, 2]},
    "regnet": {**_PYRAMID, "groups_width": 4, "embedding_size": 8},
    "resnet": {**_PYRAMID, "embedding_size": 8},
    "segformer": {**_PYRAMID, "num_attention_heads": [1, 1, 2, 2], "mlp_ratios": [2, 2, 2, 2]},
    "siglip2": {"num_patches": 16},
    "swiftformer": {"embed_dims": [8, 12, 16, 16], "depths": [1, 1, 1, 1]},
    "swin": {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "patch_size": 4, "window_size": 2},
    "swinv2": {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "patch_size": 4, "window_size": 2},
    "donut-swin": {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "patch_size": 4, "window_size": 2},
    "textnet": {"hidden_sizes": [8, 8, 8, 8, 8], "stem_out_channels": 8},
    **dict.fromkeys(
        ["data2vec-audio", "hubert", "unispeech", "unispeech-sat", "wav2vec2", "wav2vec2-conformer", "wavlm"], _WAVES
    ),
    "sew": _WAVES,
    "sew-d": _WAVES,
    "audio-spectrogram-transformer": {"max_length": 64, "patch_size": 8, "frequency_stride": 8, "time_stride": 8},
    "wav2vec2-bert": {"feature_projection_input_dim": 32, "num_conv_pos_embedding_groups": 2},
    "whisper": {"max_source_positions": 1500},
    "deepseek_v2": {"num_experts_per_tok": 2, "topk_method": "greedy"},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8, "moe_topk": [2, 2]},
    "ministral": {"head_dim": 8},
    "nemotron": {"head_dim": 8, "num_key_value_heads": 2},
    "esm": {"vocab_size": len(WORDS), "mask_token_id": 4, "pad_token_id": 0},
    "lilt": {"channel_shrink_ratio": 4, "hidden_size": 24},
    "layoutlmv3": {"coordinate_size": 3, "shape_size": 2, "visual_embed": False},
    "luke": {"entity_vocab_size": 10, "entity_emb_size": 8},
    "reformer": {
        "axial_pos_embds_dim": [8, 8],
        "axial_pos_shape": [8, 8],
        "attn_layers": ["local", "lsh"],
        "local_attn_chunk_length": 8,
        "lsh_attn_chunk_length": 8,
        "is_decoder": False,
    },
    "roc_bert": {
        "pronunciation_vocab_size": 12,
        "shape_vocab_size": 12,
        "pronunciation_embed_dim": 8,
        "shape_embed_dim": 8,
    },
    "xmod": {"default_language": "en_XX"},
    "zamba": _HYBRID,
    "zamba2": {**_HYBRID, "mamba_headdim": 8, "n_mamba_heads": 4},
    "funnel": {"block_sizes": [1, 1]},
    "t5": {"decoder_start_token_id": 0},
    "cohere_compass_text": {"layer_types": ["full_attention", "full_attention"]},
    "mistral4": {"qk_head_dim": 16},
    "bamba": {"attn_layer_indices": [1]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "attention_window_size": 64},
    "kimi_linear": {"layer_types": ["linear_attention", "full_attention"]},
    "lfm3": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 4, "head_dim": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2},
    "codegen": {"n_head": 4, "n_embd": 32},
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2},
    "zaya": {"num_experts_per_tok": 1},
    "diffllama": {"attention_dropout": 0.0},
}
"""By model type: fields that the rule gets wrong."""


@dataclass(frozen=True)
class Family:
    """An architecture of one kind of task: model type and class of transformers."""

    kind: str
    model_type: str
    name: str

    @property
    def config(self) -> Any:
        """Its configuration, at toy size."""
        return tiny_config(self.model_type, num_labels=CLASSES)


def families(kind: str | None = None) -> Iterator[Family]:
    """All of them, in transformers' order, each class once."""
    seen: set[tuple[str, str]] = set()
    for each in [kind] if kind else MAPPINGS:
        for model_type, names in MAPPINGS[each].items():
            name = names if isinstance(names, str) else names[0]
            if (each, name) not in seen:
                seen.add((each, name))
                yield Family(each, model_type, name)


def tiny_config(model_type: str, **more: Any) -> Any:
    """A configuration of a model type at toy size."""
    kind = CONFIG_MAPPING[model_type]
    return kind(**{**_shrunk(kind().to_dict()), **OWN.get(model_type, {}), **more})


def _shrunk(defaults: dict[str, Any]) -> dict[str, Any]:
    layers = next((defaults[key] for key in ("num_hidden_layers", "num_layers", "n_layer") if defaults.get(key)), None)
    out: dict[str, Any] = {}
    for key, value in defaults.items():
        if isinstance(value, dict) and key.endswith(("_config", "encoder", "decoder")) and "model_type" in value:
            out[key] = _shrunk(value) | {"model_type": value["model_type"]}
        elif key in _SHRUNK and value is not None and not isinstance(value, bool):
            out[key] = (
                [_SHRUNK[key]] * len(value) if isinstance(value, list) and key != "hybrid_layer_ids" else _SHRUNK[key]
            )
        elif isinstance(value, list) and layers and len(value) == layers and layers > _LAYERS:
            out[key] = [value[0], value[-1]]
    return out


def build(family: Family) -> PreTrainedModel:
    """The network in float64, with random weights of a size that shows in the logits.

    Raises:
        Exception: whatever transformers raises of such a configuration; ``ValueError`` where it stays large.
    """
    config = family.config
    config._experts_implementation = "eager"  # the grouped product of experts takes no float64
    cls: Any = getattr(transformers, family.name)
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in cls(config).parameters())
    if size > MOST_PARAMETERS:
        raise ValueError(f"{size:,} parameters at toy size")
    torch.manual_seed(0)
    model = cls(config)
    return model.double().eval()
