"""The names of everything a scene can hold, in the order in which scenes, captions and the judge index them."""

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "heart", "diamond")
COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink")
SIZES = ("small", "large")
BACKGROUNDS = ("white", "black", "gray", "beige", "navy")

POSITIONS = ("top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right")
"""Where a lone object is, row by row."""

LAYOUTS = (*POSITIONS, "horizontal", "vertical")
"""Where a lone object is, or the axis along which two objects stand."""
