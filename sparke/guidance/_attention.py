"""The attention layers of somebody else's network, and where they make their queries.

Attention code differs in everything but this: some submodule's output is the query Q, and the
softmax is of a multiple of Q K^T. So the logits are scaled where the query is made. Its attribute
``scale`` would not do: the processors of diffusers that call ``scaled_dot_product_attention``
ignore it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

from torch import nn

from sparke.errors import ArgumentError

__all__ = ["Layers", "Query", "checked", "queries"]

Layers: TypeAlias = (
    "str | tuple[float, float] | Sequence[str] | Sequence[nn.Module]"
    " | Callable[[str, nn.Module], bool] | None"
)
"""Which attention layers; see [tempered][sparke.guidance.erg.tempered]."""

KEYS = ("to_k", "k_proj", "k", "key", "to_kv", "kv_proj")
FUSED = ("to_qkv", "qkv_proj", "to_qkv_mlp_proj")
STREAMS = (
    # of the layer's own tokens: what normalises the query, what makes it, what makes q, k and v
    (("norm_q", "q_norm", "q_rms_norm", "query_norm"), ("to_q", "q_proj", "q", "query"), FUSED[:2]),
    # of the text tokens that share a joint attention
    (("norm_added_q", "q_rms_norm_t"), ("add_q_proj", "to_q_t"), ("to_added_qkv",)),
)
SHARED_NORM = "qk_norm"
"""One module that both queries and keys pass through."""
A_QUERY_NORM = re.compile(r"(^|_)q(uery)?(_|$)")
STAGES = {"down_blocks": 0, "mid_block": 1, "up_blocks": 2}
"""U-Nets register their middle last."""
GIVE_MODULES = "Give the modules themselves: layers=[network.blocks[0].attn, ...]."


@dataclass(frozen=True)
class Query:
    """A module whose output the query is made of.

    Attributes:
        module: its output is to be scaled.
        third: only the first third of its channels is the query; keys and values follow.
        power: of the factor; 1/2 where the keys pass through the module as well.
    """

    module: nn.Module
    third: bool = False
    power: float = 1.0


@dataclass(frozen=True)
class Layer:
    """One attention layer: its name, the queries it makes, or why they cannot be reached."""

    name: str
    module: nn.Module
    queries: tuple[Query, ...]
    obstacle: str = ""


def checked(name: str, layers: Layers) -> Layers:
    """`layers` if it has one of the forms that tell layers.

    Raises:
        ArgumentError: it has none of them.
    """
    if layers is None or isinstance(layers, str) or _is_function(layers):
        return layers
    parts: list[Any] = list(layers) if isinstance(layers, Sequence) else []
    if parts and all(isinstance(part, str) for part in parts):
        return layers
    if parts and all(isinstance(part, nn.Module) for part in parts):
        return layers
    shares = len(parts) == 2 and all(isinstance(part, (int, float)) for part in parts)
    if shares and 0 <= parts[0] < parts[1] <= 1:
        return layers
    raise ArgumentError(
        f"{name} must be None, a pattern of names or a list of them, a pair of shares of the depth "
        f"with 0 <= from < to <= 1, a list of modules, or a function of name and module; got "
        f"{layers!r}."
    )


def queries(model: Any, layers: Layers) -> list[Query]:
    """Where the attention layers of `model` that `layers` tells make their queries.

    Raises:
        ArgumentError: there are none, or they cannot be reached.
    """
    given: Any = layers
    if isinstance(given, Sequence) and isinstance(given[0], nn.Module):
        picked = [_layer(type(m).__name__, m) or Layer("", m, (Query(m),)) for m in given]
    elif isinstance(model, nn.Module):
        picked = _picked(model, given)
    else:
        raise ArgumentError(
            f"the model is a {type(model).__name__} and no torch module, so its attention layers "
            f"cannot be found. {GIVE_MODULES}"
        )
    for layer in picked:
        if layer.obstacle:
            raise ArgumentError(
                f"the queries of {layer.name} ({type(layer.module).__name__}) cannot be scaled: "
                f"{layer.obstacle}. Leave it out of layers=, or give there the module that makes "
                "its queries."
            )
    unique = {id(query.module): query for layer in picked for query in layer.queries}
    return list(unique.values())


def _picked(model: nn.Module, layers: Any) -> list[Layer]:
    known = _layers(model)
    if layers is None:
        picked = known
    elif _is_function(layers):
        picked = [layer for layer in known if layers(layer.name, layer.module)]
    elif isinstance(layers, str) or isinstance(layers[0], str):
        patterns = [layers] if isinstance(layers, str) else layers
        picked = [one for one in known if any(fnmatchcase(one.name, p) for p in patterns)]
    else:
        low, high = (share * len(known) for share in layers)
        picked = known[math.floor(low) : math.ceil(high)]
    if picked:
        return picked
    network = type(model).__name__
    if not known:
        seen = (f"{name} {type(module).__name__}" for name, module in model.named_modules())
        if any("att" in one.lower() for one in seen):
            raise ArgumentError(f"{network} has no attention layer known here. {GIVE_MODULES}")
        raise ArgumentError(
            f"{network} has no attention layer known here, and no module called attention. ERG "
            "needs attention, whose logits it scales: guide this network by another method. If it "
            "has attention under other names, layers= takes the modules."
        )
    names = ", ".join(layer.name for layer in known[:6])
    raise ArgumentError(
        f"layers={layers!r} tells none of the {len(known)} attention layers of {network}: {names}"
        f"{', ...' if len(known) > 6 else ''}."
    )


def _layers(model: nn.Module) -> list[Layer]:
    """The attention layers of a network, in the order of its depth."""
    named = ((name.replace("_orig_mod.", ""), module) for name, module in model.named_modules())
    found = [layer for name, module in named if (layer := _layer(name, module)) is not None]
    return sorted(found, key=lambda layer: STAGES.get(layer.name.split(".")[0], 0))


def _layer(name: str, module: nn.Module) -> Layer | None:
    """The module as an attention layer, None if it is none."""
    if isinstance(module, nn.MultiheadAttention):
        return Layer(name, module, (), "one parameter makes its queries, keys and values")
    inner = dict(module.named_children())
    norms, makers, _ = STREAMS[0]
    pair = any(part in inner for part in (*norms, *makers)) and any(p in inner for p in KEYS)
    if not pair and not any(part in inner for part in FUSED):
        return None
    layer = Layer(name, module, _queries_of(inner))
    known = {part for norms, _, _ in STREAMS for part in norms}
    odd = [p for p in inner if "norm" in p and A_QUERY_NORM.search(p) and p not in known]
    if odd:
        return replace(layer, obstacle=f"{odd[0]} may undo it")
    if isinstance(getattr(module, "scale", None), nn.Parameter):
        return replace(layer, obstacle="it compares directions only and learned its own scale")
    if not layer.queries:
        return replace(layer, obstacle="none of its submodules gives the query alone")
    return layer


def _queries_of(inner: dict[str, nn.Module]) -> tuple[Query, ...]:
    if SHARED_NORM in inner:
        return (Query(inner[SHARED_NORM], power=0.5),)
    found: list[Query] = []
    for norms, makers, fused in STREAMS:
        last = [Query(inner[part]) for part in norms if part in inner]
        if last:
            found += last[:1]
            continue
        # A layer may hold its projections and the fused one at once; it calls one of them.
        found += [Query(inner[part]) for part in makers if part in inner]
        found += [Query(inner[part], third=True) for part in fused if part in inner]
    return tuple(found)


def _is_function(layers: Any) -> bool:
    return callable(layers) and not isinstance(layers, nn.Module)
