import enum

InterpolationMode = enum.Enum(
    "InterpolationMode", "NEAREST NEAREST_EXACT BOX BILINEAR HAMMING BICUBIC LANCZOS"
)
