"""Tiny random models of many architectures: text, vision, audio, state spaces, experts."""

from __future__ import annotations

from typing import Any

import torch
import transformers

TEXT = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {**TEXT, "num_key_value_heads": 2}
HEADS = {**GROUPED, "head_dim": 8}
EXPERTS = {**GROUPED, "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
IMAGE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}
LINEAR_ATTENTION = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}
PAIR = {
    "vocab_size": 96,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}
T5 = {"vocab_size": 96, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "num_decoder_layers": 3}
AUDIO = {**TEXT, "conv_dim": (16, 16), "conv_kernel": (3, 3), "conv_stride": (2, 2), "num_feat_extract_layers": 2,
         "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}  # fmt: skip

#: class name -> arguments of its config.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    **{f"{name}ForCausalLM": HEADS for name in (
        "Llama", "Mistral", "Qwen2", "Qwen3", "Gemma", "Gemma2", "Cohere", "Olmo", "Olmo2", "StableLm", "Starcoder2",
        "Phi", "Phi3", "Granite", "Glm", "Helium", "SmolLM3", "Ernie4_5", "Exaone4", "Nemotron", "SeedOss",
    )},
    "Gemma3ForCausalLM": HEADS,
    "GPT2LMHeadModel": {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "GPTJForCausalLM": {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "rotary_dim": 4},
    "GPTNeoXForCausalLM": TEXT,
    "GPTBigCodeForCausalLM": {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "BloomForCausalLM": {"vocab_size": 96, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    "FalconForCausalLM": TEXT,
    "OPTForCausalLM": {**TEXT, "ffn_dim": 48, "word_embed_proj_dim": 32},
    "MptForCausalLM": {"vocab_size": 96, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64},
    "MambaForCausalLM": {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8},
    "Mamba2ForCausalLM": {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "num_heads": 8,
                          "head_dim": 8, "n_groups": 1},
    "RwkvForCausalLM": {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48},
    "Qwen3_5ForCausalLM": {**HEADS, **LINEAR_ATTENTION},
    "Qwen3NextForCausalLM": {**HEADS, **EXPERTS, **LINEAR_ATTENTION, "shared_expert_intermediate_size": 16},
    "MixtralForCausalLM": EXPERTS,
    "Qwen2MoeForCausalLM": {**EXPERTS, "shared_expert_intermediate_size": 24},
    "Qwen3MoeForCausalLM": {**EXPERTS, "head_dim": 8},
    "OlmoeForCausalLM": EXPERTS,
    "GptOssForCausalLM": {**EXPERTS, "head_dim": 8},
    "PhimoeForCausalLM": EXPERTS,
    "DeepseekV3ForCausalLM": {**TEXT, "num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
                              "moe_intermediate_size": 16, "n_group": 2, "topk_group": 1, "q_lora_rank": 8,
                              "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8,
                              "first_k_dense_replace": 1},
    "Glm4MoeForCausalLM": {**HEADS, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
                           "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1},
    **{f"{name}ForMaskedLM": TEXT for name in ("Bert", "Roberta", "Electra", "Camembert", "XLMRoberta", "MPNet")},
    "BertForSequenceClassification": TEXT,
    "RobertaForTokenClassification": TEXT,
    "BertModel": TEXT,
    "AlbertForMaskedLM": {**TEXT, "embedding_size": 16},
    "DistilBertForMaskedLM": {"vocab_size": 96, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4},
    "DebertaV2ForSequenceClassification": TEXT,
    "ModernBertForMaskedLM": {**TEXT, "cls_token_id": 1, "sep_token_id": 2},
    "T5ForConditionalGeneration": {**T5, "decoder_start_token_id": 0},
    "MT5ForConditionalGeneration": {**T5, "decoder_start_token_id": 0},
    "BartForConditionalGeneration": PAIR,
    "MBartForConditionalGeneration": PAIR,
    "PegasusForConditionalGeneration": PAIR,
    "MarianMTModel": {**PAIR, "decoder_vocab_size": 96},
    "WhisperForConditionalGeneration": {**PAIR, "num_mel_bins": 8, "max_source_positions": 32,
                                        "max_target_positions": 32,
                                        "suppress_tokens": None, "begin_suppress_tokens": None},
    "Wav2Vec2ForCTC": AUDIO,
    "HubertForCTC": AUDIO,
    "ViTForImageClassification": IMAGE,
    "DeiTForImageClassification": IMAGE,
    "Dinov2Model": {**IMAGE, "mlp_ratio": 2},
    "ResNetForImageClassification": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1],
                                     "layer_type": "basic"},
    "ConvNextForImageClassification": {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2},
    "CLIPModel": {"text_config": TEXT, "vision_config": IMAGE, "projection_dim": 16},
    "SiglipModel": {"text_config": {**TEXT, "projection_size": 32}, "vision_config": IMAGE},
    "LlavaForConditionalGeneration": {"text_config": {**HEADS, "model_type": "llama"}, "image_token_index": 90,
                                      "vision_config": {**IMAGE, "model_type": "clip_vision_model"}},
    "Gemma3ForConditionalGeneration": {"text_config": HEADS, "mm_tokens_per_image": 4, "image_token_index": 90,
                                       "boi_token_index": 91, "eoi_token_index": 92,
                                       "vision_config": {**IMAGE, "model_type": "siglip_vision_model"}},
    "Qwen2VLForConditionalGeneration": {
        "text_config": {**GROUPED, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}},
        "vision_config": {"depth": 3, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "mlp_ratio": 2},
    },
    "PaliGemmaForConditionalGeneration": {"text_config": {**HEADS, "model_type": "gemma"}, "projection_dim": 32,
                                          "image_token_index": 90,
                                          "vision_config": {**IMAGE, "model_type": "siglip_vision_model"}},
}  # fmt: skip


def tiny(name: str, seed: int = 0) -> Any:
    """A model of an architecture with random parameters in float32."""
    kind = getattr(transformers, name)
    torch.manual_seed(seed)
    model = kind(kind.config_class(**ARCHITECTURES[name])).eval()
    with torch.no_grad():
        for _, parameter in model.named_parameters():
            if parameter.dtype.is_floating_point:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model
