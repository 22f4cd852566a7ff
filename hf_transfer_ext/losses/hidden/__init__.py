"""Losses inside the network: hidden states, attention and relations of mapped layers. One file each."""

from collections.abc import Callable

from torch import Tensor

from hf_transfer_ext.losses.hidden.attention_mse import attention_mse
from hf_transfer_ext.losses.hidden.attention_relation import attention_relation
from hf_transfer_ext.losses.hidden.dual_head import dual_head
from hf_transfer_ext.losses.hidden.feature_norm_direction import feature_norm_direction
from hf_transfer_ext.losses.hidden.hidden_cosine import hidden_cosine
from hf_transfer_ext.losses.hidden.hidden_mse import hidden_mse
from hf_transfer_ext.losses.hidden.minilm import minilm
from hf_transfer_ext.losses.hidden.talking_models import talking_models
from hf_transfer_ext.losses.hidden.token_relationship_graph import token_relationship_graph
from hf_transfer_ext.losses.layer_map import LAYER_MAPS, layer_pairs
from hf_transfer_ext.losses.layer_reading import check_hidden_loss
from hf_transfer_ext.registry import Registry

_LOSSES: list[Callable[..., Tensor]] = [
    hidden_mse,
    hidden_cosine,
    attention_mse,
    attention_relation,
    minilm,
    token_relationship_graph,
    feature_norm_direction,
    dual_head,
    talking_models,
]
HIDDEN_LOSSES = Registry("hidden loss", _LOSSES, check=check_hidden_loss)

__all__ = ["HIDDEN_LOSSES", "LAYER_MAPS", "layer_pairs", *HIDDEN_LOSSES]
