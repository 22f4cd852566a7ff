"""Vision-language models that are made on the spot, with processors: a LLaVA and an Idefics3 of the same tokens."""

from __future__ import annotations

from functools import lru_cache

import torch
from PIL import Image, ImageDraw
from tiny import byte_tokenizer
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessorPil,
    Idefics3Processor,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

#: Tokens of both processors, so that models of both families have one vocabulary.
IMAGE = "<image>"
SPECIALS = [IMAGE, "<pad>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"]
CHAT_TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }}:{% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant:{% endif %}"
)
COLORS = {"red": (220, 30, 30), "green": (30, 180, 30), "blue": (30, 30, 220), "white": (240, 240, 240)}
SHAPES = ("circle", "square")


@lru_cache
def vision_tokenizer():
    """Bytes as tokens, and those of images."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIALS, "pad_token": "<pad>"})
    return tokenizer


def drawn(color, shape, size=32, place=(6, 6), width=18):
    """A picture of one shape."""
    picture = Image.new("RGB", (size, size), (0, 0, 0))
    box = (*place, place[0] + width, place[1] + width)
    draw = ImageDraw.Draw(picture)
    (draw.ellipse if shape == "circle" else draw.rectangle)(box, fill=COLORS[color])
    return picture


def text_config(layers=2, hidden=32, **more):
    settings = {
        "vocab_size": len(vision_tokenizer()), "hidden_size": hidden, "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 512, "initializer_range": 0.2, "bos_token_id": 256, "eos_token_id": 257,
        "pad_token_id": vision_tokenizer().pad_token_id,
    }  # fmt: skip
    return LlamaConfig(**{**settings, **more})


def llava(seed=0, image_size=32, **text):
    """A LLaVA whose images of `image_size` pixels are (image_size / 8) ** 2 tokens."""
    torch.manual_seed(seed)
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=image_size,
        patch_size=8, projection_dim=32,
    )  # fmt: skip
    image = vision_tokenizer().convert_tokens_to_ids(IMAGE)
    config = LlavaConfig(
        vision_config=vision, text_config=text_config(**text), image_token_index=image, image_seq_length=16
    )
    model = LlavaForConditionalGeneration(config)
    with torch.no_grad():  # random towers say little: make what they say count
        for parameter in model.model.multi_modal_projector.parameters():
            parameter.normal_(0, 0.2)
    return model.eval()


def llava_processor(image_size=32):
    size = {"height": image_size, "width": image_size}
    pictures = CLIPImageProcessorPil(size={"shortest_edge": image_size}, crop_size=size)
    return LlavaProcessor(
        pictures, vision_tokenizer(), patch_size=8, vision_feature_select_strategy="default", image_token=IMAGE,
        num_additional_image_tokens=1, chat_template=CHAT_TEMPLATE,
    )  # fmt: skip


def idefics(seed=0, **text):
    """An Idefics3, as SmolVLM: one view of an image, 4 tokens."""
    torch.manual_seed(seed)
    vision = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4,
        "image_size": 32, "patch_size": 8,
    }  # fmt: skip
    image = vision_tokenizer().convert_tokens_to_ids(IMAGE)
    config = Idefics3Config(
        vision_config=vision, text_config=text_config(**text), image_token_id=image, scale_factor=2,
        pad_token_id=vision_tokenizer().pad_token_id, tie_word_embeddings=False,
    )  # fmt: skip
    model = Idefics3ForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.model.connector.parameters():
            parameter.normal_(0, 0.2)
    return model.eval()


def idefics_processor():
    pictures = Idefics3ImageProcessorPil(
        do_image_splitting=False, size={"longest_edge": 32}, max_image_size={"longest_edge": 32}
    )
    return Idefics3Processor(pictures, vision_tokenizer(), image_seq_len=4, chat_template=CHAT_TEMPLATE)
