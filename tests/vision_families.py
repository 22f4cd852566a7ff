"""Vision-language models of transformers, tiny, whose vision tower has as many layers as the language model."""

import torch
import transformers

DEPTH = 4
TEXT = {
    "vocab_size": 200, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": DEPTH,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
TOWER = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": DEPTH, "num_attention_heads": 4,
    "image_size": 32, "patch_size": 8,
}  # fmt: skip
ROTARY = {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0}}
#: Of Qwen-VL, which counts and names things in its own way.
BLOCKS = {"depth": DEPTH, "hidden_size": 32, "num_heads": 4}
SHARED = {"out_hidden_size": 32, "intermediate_size": 64}
GLOBAL = {"num_global_layers": 2, "attention_heads": 4, "vision_output_dim": 96, "intermediate_layers_indices": [1, 3]}

#: Class without `ForConditionalGeneration` -> (settings of the vision tower, of the language model, of both).
CONFIGS = {
    "Llava": (TOWER | {"model_type": "clip_vision_model", "projection_dim": 32}, TEXT | {"model_type": "llama"}, {}),
    "LlavaOnevision": (TOWER | {"model_type": "siglip_vision_model"}, TEXT | {"model_type": "qwen2"}, {}),
    "Idefics3": (TOWER, TEXT | {"model_type": "llama"}, {}),
    "SmolVLM": (TOWER, TEXT | {"model_type": "llama"}, {}),
    "Gemma3": (TOWER | {"model_type": "siglip_vision_model"}, TEXT | {"model_type": "gemma3_text"}, {}),
    "Qwen2VL": (BLOCKS | {"embed_dim": 32, "mlp_ratio": 2}, TEXT | ROTARY, {}),
    "Qwen2_5_VL": (BLOCKS | SHARED | {"fullatt_block_indexes": [1, 3]}, TEXT | ROTARY, {}),
    "Qwen3VL": (BLOCKS | SHARED | {"deepstack_visual_indexes": [1, 2, 3]}, TEXT | ROTARY, {}),
    "PaliGemma": (TOWER | {"model_type": "siglip_vision_model"}, TEXT | {"model_type": "gemma"},
                  {"projection_dim": 32, "hidden_size": 32}),
    "Mllama": (TOWER | GLOBAL, TEXT | {"cross_attention_layers": [1, 3]}, {}),
    "InternVL": (TOWER | {"image_size": [32, 32], "patch_size": [8, 8]}, TEXT | {"model_type": "qwen2"}, {}),
}  # fmt: skip


def vision_language(family, seed=0):
    """A model of a family, in evaluation mode."""
    vision, text, both = CONFIGS[family]
    config = getattr(transformers, f"{family}Config")(vision_config=dict(vision), text_config=dict(text), **both)
    torch.manual_seed(seed)
    return getattr(transformers, f"{family}ForConditionalGeneration")(config).eval()
