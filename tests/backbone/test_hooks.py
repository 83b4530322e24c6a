"""What hooks read is what the modules give, whatever the order of their axes; and which layers are chosen."""

import pytest
import torch
from torch import nn

from featcache.backbone.hooks import Layout, find_layers, layout_of, tensor_of
from featcache.backbone.taps import choose_taps
from featcache.config import LayerConfig
from featcache.errors import BackboneError

SIZE = (3, 32, 32)


@pytest.mark.parametrize(
    ("shape", "size", "expected"),
    [
        ((2, 10), SIZE, ((0, 1), 0, (1, 1), 10)),
        ((2, 5, 8, 8), SIZE, ((0, 2, 3, 1), 0, (8, 8), 5)),
        ((2, 8, 8, 5), SIZE, ((0, 1, 2, 3), 0, (8, 8), 5)),
        ((2, 8, 8, 8), SIZE, ((0, 2, 3, 1), 0, (8, 8), 8)),  # as torch's convolutions, where both are possible
        ((2, 5, 4, 8), (3, 32, 64), ((0, 2, 3, 1), 0, (4, 8), 5)),
        ((2, 16, 5), SIZE, ((0, 1, 2), 0, (4, 4), 5)),
        ((2, 17, 5), SIZE, ((0, 1, 2), 1, (4, 4), 5)),
        ((2, 21, 5), SIZE, ((0, 1, 2), 5, (4, 4), 5)),
        ((17, 2, 5), SIZE, ((1, 0, 2), 1, (4, 4), 5)),
        ((2, 33, 5), (3, 32, 64), ((0, 1, 2), 1, (4, 8), 5)),
        ((2, 1), SIZE, ((0, 1), 0, (1, 1), 1)),
        ((2,), SIZE, None),
        ((1, 10), SIZE, None),
        ((2, 1, 2, 3, 4), SIZE, None),
        ((), SIZE, None),
    ],
)
def test_axes_are_told_by_shape(shape, size, expected):
    assert layout_of(shape, size) == (None if expected is None else Layout(*expected))


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2)])
def test_places_and_the_class_token_are_where_they_were_put(order):
    """Tokens whose numbers say which image, place and channel they are of, in both orders of axes."""
    image, token, channel = torch.meshgrid(torch.arange(2), torch.arange(17), torch.arange(5), indexing="ij")
    values = (image * 1000 + token * 10 + channel).float().permute(order)
    found = layout_of(values.shape, SIZE)
    assert found is not None
    places, cls = found.split(values)
    assert places[1, 3, 2, 1] == 1000 + 10 * (1 + 2 * 4 + 1) + 3 and cls is not None and cls[1, 4] == 1004
    assert torch.equal(found.vector(values), cls)


class Tokens(nn.Module):
    """Patches behind tokens of these names, and one layer on them."""

    def __init__(self, *names):
        super().__init__()
        self.names = names
        self.patches, self.layer = nn.Conv2d(3, 5, 8, 8), nn.Sequential(nn.Linear(5, 5))
        for name in names:
            self.register_parameter(name, nn.Parameter(torch.randn(1, 1, 5)))

    def forward(self, images):
        places = self.patches(images).flatten(2).transpose(1, 2)
        before = [getattr(self, name).expand(len(images), -1, -1) for name in self.names]
        return self.layer(torch.cat([*before, places], 1))


@pytest.mark.parametrize(
    ("names", "stored"),
    [
        (("cls_token", "reg_token"), True),
        (("class_embedding",), True),
        (("prefix",), True),  # of which nothing is known
        (("reg_token",), False),
        (("register_tokens",), False),
        (("storage_tokens", "registers"), False),
    ],
)
def test_registers_are_no_class_token(names, stored):
    model = Tokens(*names).eval()
    reader = find_layers(model, SIZE, ("layer",))
    taps = choose_taps(model, LayerConfig(layers=("all",), grid="native"), SIZE, reader)
    images = torch.randn(2, *SIZE)
    with torch.inference_mode():
        rows, sequence = taps.read(model, images), model(images)
    assert ("layer.cls" in rows) == stored and taps.code == ({} if stored else {"tokens": "registers"})
    torch.testing.assert_close(rows["layer"].flatten(1, 2), sequence[:, len(names) :])
    torch.testing.assert_close(rows["pooled"], sequence[:, 0] if stored else sequence[:, len(names) :].mean(1))


def test_a_map_without_a_class_token_becomes_a_vector_by_its_mean():
    values = torch.randn(2, 5, 8, 8)
    found = layout_of(values.shape, SIZE)
    assert found is not None
    torch.testing.assert_close(found.vector(values), values.mean((2, 3)))


def test_the_tensor_of_an_output_is_the_first_in_it():
    a, b = torch.zeros(1), torch.ones(1)
    assert all(tensor_of(output) is a for output in (a, (a, b), [None, a], {"x": "no", "y": a}))
    for nothing in (None, "text", {}, (1, 2)):
        with pytest.raises(TypeError, match="no tensor"):
            tensor_of(nothing)


def block(before: int, after: int, stride: int = 1) -> nn.Module:
    return nn.Sequential(nn.Conv2d(before, after, 3, stride, 1), nn.ReLU(inplace=True))


class Stages(nn.Module):
    """Three resolutions, with two stages at the second."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one, self.two = block(3, 4, 2), block(4, 6, 2), block(6, 6)
        self.three, self.head = block(6, 8, 2), nn.Linear(8, 5)

    def forward(self, images):
        values = self.three(self.two(self.one(self.stem(images))))
        return self.head(values.mean((2, 3)))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(8), nn.Sequential(nn.Linear(8, 8), nn.GELU())

    def forward(self, tokens):
        return tokens + self.mlp(self.norm(tokens))


class Blocks(nn.Module):
    """A small transformer without attention, whose blocks are in a list, and which gives a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 8, 8)
        self.cls, self.blocks = nn.Parameter(torch.randn(1, 1, 8)), nn.ModuleList([Block() for _ in range(4)])

    def forward(self, images):
        tokens = torch.cat([self.cls.expand(len(images), -1, -1), self.patches(images).flatten(2).transpose(1, 2)], 1)
        for one in self.blocks:
            tokens = one(tokens)
        return {"tokens": tokens}


class Wrapped(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images):
        return self.network(images)


@pytest.mark.parametrize(
    ("network", "layers"),
    [
        (Stages(), ("stem", "two", "three")),
        (Wrapped(Stages()), ("network.stem", "network.two", "network.three")),
        (Wrapped(Wrapped(Blocks())), tuple(f"network.network.blocks.{k}" for k in range(4))),
        (Blocks(), tuple(f"blocks.{k}" for k in range(4))),
        (nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.ReLU(), nn.Conv2d(4, 4, 3, 2), nn.BatchNorm2d(4)), ("0", "3")),
        (nn.Sequential(nn.Flatten(), nn.Linear(3072, 7), nn.ReLU(), nn.Linear(7, 5)), ("3",)),
    ],
)
def test_stages_end_at_a_resolution_and_blocks_are_alike(network, layers):
    assert find_layers(network.eval(), SIZE).chosen == layers


@pytest.mark.parametrize("network", [Stages().eval(), Blocks().eval()])
def test_rows_are_what_hooks_of_torch_alone_see(network):
    reader = find_layers(network, SIZE)
    images, seen = torch.randn(3, *SIZE), {}
    taps = choose_taps(network, LayerConfig(layers=("all",), grid="native"), SIZE, reader)
    for name in reader.chosen:
        network.get_submodule(name).register_forward_hook(lambda _, __, out, name=name: seen.update({name: out + 0}))
    with torch.no_grad():
        output = network(images)
        rows = taps.read(network, images)
    for name in reader.chosen:
        values = seen[name]
        if values.ndim == 4:
            torch.testing.assert_close(rows[name], values.permute(0, 2, 3, 1))
        else:
            torch.testing.assert_close(rows[name], values[:, 1:].unflatten(1, (4, 4)))
            torch.testing.assert_close(rows[f"{name}.cls"], values[:, 0])
    torch.testing.assert_close(rows["pooled"], output["tokens"][:, 0] if isinstance(output, dict) else output)


def test_a_value_that_the_next_module_overwrites_is_read_as_it_was():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True)).eval()
    images = torch.randn(2, *SIZE)
    taps = choose_taps(network, LayerConfig(layers=("0",), grid="native"), SIZE, find_layers(network, SIZE, ("0",)))
    with torch.no_grad():
        (rows,) = taps.read(network, images).values()
        torch.testing.assert_close(rows, network[0](images).permute(0, 2, 3, 1))
    assert (rows < 0).any()


def test_any_submodule_may_be_named_besides_those_that_are_chosen():
    network = Stages().eval()
    taps = choose_taps(network, LayerConfig(layers=("one.0", "head", "pooled")), SIZE, find_layers(network, SIZE))
    assert taps.layers == ("pooled", "one.0", "head") and taps.grids == {"one.0": (7, 7), "head": (1, 1)}


def test_a_module_that_runs_twice_is_no_layer():
    shared = block(4, 4)
    reader = find_layers(nn.Sequential(block(3, 4), shared, nn.Identity(), shared).eval(), SIZE)
    assert "1" not in reader.layouts and "0" in reader.layouts


def test_names_that_cannot_be_read_list_those_that_can():
    with pytest.raises(BackboneError, match=r"found 'four'; choose among .*'three'"):
        find_layers(Stages(), SIZE, ("one", "four"))


def test_a_network_of_one_operation_has_no_layers_and_an_unknown_output_no_pooled_vector():
    class Odd(nn.Module):
        def forward(self, images):
            return images.sum()

    reader = find_layers(Odd(), SIZE)
    with pytest.raises(BackboneError, match="found none in Odd; use --layers pooled"):
        choose_taps(Odd(), LayerConfig(), SIZE, reader)
    with pytest.raises(BackboneError, match=r"--layers pooled: expected .* found a tensor \(\) from Odd"):
        reader.pooled(Odd(), torch.zeros(2, *SIZE))
