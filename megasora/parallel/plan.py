"""Which layer of which family is split how. Data, not code: patterns of module names, the first that matches counts.

column: some outputs, of the tokens that all ranks of the group have together; column_whole: of tokens that each has anyway;
row: some inputs; norm: over a width that is split. The first group of a column's pattern names the layers with one input.
"""

from megasora.parallel.tensor import Style

ATTENTION: list[tuple[str, Style]] = [
    (r"(blocks\.\d+(?:\.space|\.time)?\.(?:self_)?attention)\.[qkv]", "column"),
    (r"(blocks\.\d+(?:\.space|\.time)?\.cross_attention)\.q", "column"),
    (r"blocks\.\d+(?:\.space|\.time)?\.cross_attention\.[kv]", "column_whole"),
    (r"blocks\.\d+(?:\.space|\.time)?\.(?:self_|cross_)?attention\.out", "row"),
]
MLP: list[tuple[str, Style]] = [
    (r"(blocks\.\d+(?:\.space|\.time)?\.mlp)\.0", "column"),
    (r"blocks\.\d+(?:\.space|\.time)?\.mlp\.2", "row"),
]
PLANS: dict[str, list[tuple[str, Style]]] = {
    "video_dit": [*ATTENTION, (r"blocks\.\d+\.(?:self|cross)_attention\.norm_[qk]", "norm"), *MLP],
    "stdit": [*ATTENTION, *MLP],
    "dit": [*ATTENTION, *MLP],
}
