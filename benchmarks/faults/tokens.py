"""Class tokens, registers and places of every kind of network in timm, against what the network itself calls them.

    PYTHONPATH=. nice python benchmarks/faults/tokens.py [--n 20] [--seed 0]

Networks of one class that have the same tokens are one kind; the smallest stands for it, with random weights and two
blocks where it can be made with so few. Which tokens of a sequence are which is told by the network's own parameters: a
parameter such as `cls_token` or `reg_token` is changed, and the tokens that come to the first layer and are changed are
of that parameter. Layers are then read as `extract` reads them, and compared with what hooks see:

- a class token is stored exactly where there is one, and it is that token, not a register or one for distillation
- a map has all the tokens that are of no such parameter, in their order, and no other
- the number of tokens without a place is the network's own `num_prefix_tokens`

Prints what is not so, then the counts. `not given`: the sequence has a class token, and timm gives it of no layer;
`later`: it joins the sequence behind the first layers. Leaves with exit code 1 where a token is not what it is called.
"""

import argparse
import gc
import json
import random
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import timm
import torch

from featcache.backbone.network import layers_or_refuse
from featcache.backbone.taps import TIMM, choose_taps, layer_names
from featcache.config import CLASS_TOKEN, LayerConfig
from featcache.errors import BackboneError

FEW_BLOCKS, N_IMAGES = 2, 2


def kinds(most: float = 200.0) -> list[str]:
    """The smallest network of each kind, of at most so many million parameters."""
    smallest: dict[tuple[Any, ...], tuple[float, str]] = {}
    for name in timm.list_models():
        with warnings.catch_warnings(), torch.device("meta"):
            warnings.simplefilter("ignore")
            model = timm.create_model(name)
        tokens = tuple((key, tuple(value.shape[:-1])) for key, value in token_parameters(model).items())
        told = tuple(getattr(model, name, None) for name in ("num_prefix_tokens", "num_reg_tokens", "no_embed_class"))
        kind = (timm.models.model_entrypoint(name).__module__, type(model).__name__, tokens, told)
        size = sum(parameter.numel() for parameter in model.parameters()) / 1e6
        smallest[kind] = min(smallest.get(kind, (size, name)), (size, name))
    return sorted(name for size, name in smallest.values() if size <= most)


def token_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Parameters that are tokens by their name, as cls_token, reg_token, dist_token and register_tokens are."""
    return {name: value for name, value in model.named_parameters() if "token" in name.rpartition(".")[2]}


def small(name: str) -> Any:
    """A network with few blocks if it can be made so, without its classifier."""
    try:
        model = timm.create_model(name, depth=FEW_BLOCKS)
    except (TypeError, AssertionError, RuntimeError, ValueError, IndexError):
        model = timm.create_model(name)
    with suppress(AttributeError, NotImplementedError):  # of a network that never had one
        model.reset_classifier(0)
    return model.eval()


def sequence_of(values: Any) -> torch.Tensor | None:
    """The sequence of tokens among what a layer takes or gives, (n_images, n_tokens, n_channels)."""
    tensors = values if isinstance(values, (tuple, list)) else (values,)
    return next(
        (one for one in tensors if isinstance(one, torch.Tensor) and one.shape[0] == N_IMAGES and one.ndim == 3), None
    )


def seen(model: Any, images: torch.Tensor, layers: list[str]) -> tuple[Any, dict[str, Any]]:
    """The sequence that comes to the first layer, and that each gives, by hooks alone; None for no sequence."""
    first: list[Any] = []
    outputs: dict[str, Any] = {}
    modules = dict(model.named_modules())  # some layers are no submodule by their name
    hooks = []
    if layers[0] in modules:
        keep = lambda _, inputs: first.append(sequence_of(inputs))  # noqa: E731
        hooks.append(modules[layers[0]].register_forward_pre_hook(keep))
    for name in layers:
        hook = lambda _, __, output, name=name: outputs.update({name: sequence_of(output)})  # noqa: E731
        if name in modules:
            hooks.append(modules[name].register_forward_hook(hook))
    with torch.inference_mode():
        model(images)
    for hook in hooks:
        hook.remove()
    return first[0] if first else None, outputs


def places_of_tokens(model: Any, images: torch.Tensor, layers: list[str], first: torch.Tensor) -> dict[str, list[int]]:
    """{parameter: numbers of its tokens in the sequence that comes to the first layer}."""
    found = {}
    for name, parameter in token_parameters(model).items():
        before = parameter.data.clone()
        parameter.data += 1 + torch.rand_like(parameter)
        changed, _ = seen(model, images, layers)
        parameter.data = before
        if changed is not None and changed.shape == first.shape:
            found[name] = torch.nonzero((changed - first).abs().amax((0, 2))).flatten().tolist()
    return found


def _is_map_of(tokens: torch.Tensor, image_map: torch.Tensor, shown_where_it_is: Callable[[], bool]) -> bool:
    """Whether a map (n_images, height, width, n_channels) is these tokens, in their order or in that of the image."""
    places = image_map.flatten(1, 2)
    if torch.allclose(places, tokens, atol=1e-4, rtol=1e-3):
        return True
    nearest = torch.cdist(places[0], tokens[0]).min(1)  # some networks keep the tokens of a window together
    order = nearest.indices
    in_order = torch.allclose(places, tokens[:, order], atol=1e-4, rtol=1e-3)
    return in_order and len(order.unique()) == len(order) and shown_where_it_is()


def shown_at(taps: Any, model: Any, images: torch.Tensor, layer: str) -> bool:
    """Whether a spot in an image changes a map most at the place of the spot, to one place."""
    before = taps.read(model, images)[layer]
    sides, places = images.shape[-2:], before.shape[1:3]
    for spot in ((0.05, 0.22), (0.45, 0.1), (0.9, 0.9), (0.27, 0.67), (0.15, 0.4)):
        at = [int(share * side) for share, side in zip(spot, sides, strict=True)]
        changed = images.clone()
        changed[..., at[0] - 1 : at[0] + 2, at[1] - 1 : at[1] + 2] += 3
        change = (taps.read(model, changed)[layer] - before).abs().sum((0, 3))
        most = divmod(int(change.argmax()), places[1])
        if any(abs(one - share * n) > 1.5 for one, share, n in zip(most, spot, places, strict=True)):
            return False
    return True


def verdict(model: Any, images: torch.Tensor) -> tuple[str, str]:
    """What became of the tokens of a network, and what there is to say about it."""
    layers = layer_names(model)
    first, outputs = seen(model, images, layers)
    size = images.shape[1:]
    with torch.inference_mode():
        with layers_or_refuse(type(model).__name__, model, size, TIMM):
            taps = choose_taps(model, LayerConfig(layers=("all",), grid="native"), size)
        rows = taps.read(model, images)
    stored = [name for name in rows if name.endswith(CLASS_TOKEN)]
    if first is None:
        return ("no sequence", "") if not stored else ("broken", f"{stored} of a network without a sequence of tokens")
    tokens = places_of_tokens(model, images, layers, first)
    of_class = [place for name, places in tokens.items() if "cls" in name for place in places]
    without_place = sorted({place for places in tokens.values() for place in places})
    n_own = getattr(model, "num_prefix_tokens", 0)
    if without_place and len(without_place) != n_own:
        return "broken", f"{len(without_place)} tokens without a place, where the network says {n_own}: {tokens}"
    if len(of_class) > 1 or (stored and not of_class):
        return "broken", f"{stored or 'several class tokens'}, where the network has {tokens}"
    for layer in layers:
        if (sequence := outputs.get(layer)) is None:
            continue
        n_places = rows[layer].shape[1] * rows[layer].shape[2]
        n_before = sequence.shape[1] - n_places
        places = [place for place in range(sequence.shape[1]) if place not in without_place]
        places = places if len(places) == n_places else list(range(n_before, sequence.shape[1]))
        if n_before < 0 or not _is_map_of(
            sequence[:, places], rows[layer], partial(shown_at, taps, model, images, layer)
        ):
            return "broken", f"the map of {layer} is not its places"
        token = rows.get(layer + CLASS_TOKEN)
        if token is not None and not torch.allclose(token, sequence[:, of_class[0]], atol=1e-4, rtol=1e-3):
            return "broken", f"{layer + CLASS_TOKEN} is not the class token"
    if of_class and not stored:
        return "not given", ""
    if stored:
        return ("class token", "") if len(stored) == len(layers) else ("broken", f"only {stored} of {layers}")
    return ("later", "") if any("cls" in name for name in tokens) else ("no class token", "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=0, help="networks, drawn at random; 0: all kinds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--networks", default="", help="names with commas between them, in place of the kinds")
    options = parser.parse_args()
    names = options.networks.split(",") if options.networks else kinds()
    if options.n and not options.networks:
        names = sorted(random.Random(options.seed).sample(names, min(options.n, len(names))))
    counts: Counter[str] = Counter()
    for name in names:
        torch.manual_seed(options.seed)
        model = small(name)
        images = torch.randn(N_IMAGES, *model.pretrained_cfg["input_size"])
        try:
            what, why = verdict(model, images)
        except (BackboneError, NotImplementedError) as error:  # the second by a network that gives no vector
            what, why = "refused", str(error)
        except Exception as error:  # what a user would see as a traceback
            what, why = "broken", f"{type(error).__name__}: {error}"
        counts[what] += 1
        print(f"{name}: {what} {why}".rstrip(), flush=True)
        del model
        gc.collect()
    print(json.dumps({"networks": len(names), **counts}))
    sys.exit(1 if counts["broken"] else 0)


if __name__ == "__main__":
    main()
