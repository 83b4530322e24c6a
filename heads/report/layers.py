"""The table of the layers of a network."""

from collections.abc import Mapping

from rich.table import Table


def layer_table(maps: Mapping[str, tuple[int, int, int]]) -> Table:
    """Table of the layers of a network, from {layer: (n_channels, height, width)}."""
    table = Table()
    for column in ("number", "layer", "channels", "map"):
        table.add_column(column, justify="left" if column == "layer" else "right")
    for number, (name, (n_channels, height, width)) in enumerate(maps.items()):
        table.add_row(str(number), name, f"{n_channels:,}", f"{height} x {width}")
    return table
