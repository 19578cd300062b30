"""Where MMFS looks: sampling points and weights of every generated token, and of every cell of a generated image.

The values are collected while the document is generated, from the inputs of the operator that generates it. So they are
those that the result was made with; nothing is computed again for other tokens.

    found = inspect(pipe, ["A red ball.", Image("ball.png"), Text("Where is it?")], max_turns=1)
    found.texts[0].points.weights  # [tokens, layers, heads, images, levels, points]
    write_results(found, Path("inspection"))  # arrays, heat maps and an interactive page
"""

from .collect import InspectedGenerator, inspect, inspect_documents
from .files import load_inspection, save_inspection
from .heat import heat_map, overlay, shares
from .records import ImageRecord, Inspection, MapRecord, Points, TextRecord
from .results import compare, region_units, units_of, word_units, write_results
from .settings import InspectionSettings

__all__ = [
    "ImageRecord",
    "InspectedGenerator",
    "Inspection",
    "InspectionSettings",
    "MapRecord",
    "Points",
    "TextRecord",
    "compare",
    "heat_map",
    "inspect",
    "inspect_documents",
    "load_inspection",
    "overlay",
    "region_units",
    "save_inspection",
    "shares",
    "units_of",
    "word_units",
    "write_results",
]
