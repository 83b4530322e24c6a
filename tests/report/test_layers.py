"""The table of layers numbers them as `extract --layers` counts."""

import io

from rich.console import Console

from heads.report.layers import layer_table


def test_layers_are_numbered_from_0_in_the_order_of_the_network():
    out = io.StringIO()
    Console(file=out, width=80).print(layer_table({"stem": (1024, 12, 10), "last": (8, 3, 3)}))
    rows = [
        [cell.strip() for cell in line.strip("│").split("│")] for line in out.getvalue().splitlines() if "│" in line
    ]
    assert rows == [["0", "stem", "1,024", "12 x 10"], ["1", "last", "8", "3 x 3"]]
