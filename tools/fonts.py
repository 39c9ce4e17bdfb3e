"""Cut the site's fonts down to the characters a book needs. The results are committed.

Needs `fonttools` and `brotli`, and the originals, all under the SIL Open Font License:
`python tools/fonts.py FOLDER` looks below FOLDER for the woff2 files of the packages
`@fontsource/source-serif-4`, `source-sans-3`, `source-code-pro` and `stix-two-math`
(`npm pack` downloads them, `tar xzf` unpacks them). The licence reserves the name
"Source", so the cut fonts carry names of our own; see `book/_static/fonts/LICENSE.txt`.
"""

import sys
from pathlib import Path

from fontTools import subset, ttLib

OUT = Path(__file__).parents[1] / "book" / "_static" / "fonts"

ASCII = range(0x20, 0x7F)
LATIN_1 = range(0xA0, 0x100)
PUNCTUATION = [0x2013, 0x2014, 0x2018, 0x2019, 0x201C, 0x201D, 0x2022, 0x2026, 0x2212]
ACCENTED = [0x107, 0x10D, 0x11B, 0x131, 0x141, 0x142, 0x144, 0x159, 0x161, 0x17E]
EXTRAS = [0xD7, 0x2192, 0x2190, 0x2248, 0x2260, 0x2264, 0x2265, 0x2713]
TEXT = [*ASCII, *LATIN_1, *PUNCTUATION, *ACCENTED, *EXTRAS]
BOXES = [*range(0x2500, 0x2580), *range(0x2580, 0x2590), 0x25A0, 0x25CF]
CODE = [*ASCII, 0xA0, 0xB0, 0xB1, 0xB2, 0xB5, 0xB7, 0xD7, *PUNCTUATION, *EXTRAS, *BOXES]

MATH = [
    *ASCII, 0xA0, 0xAC, 0xB0, 0xB1, 0xB7, 0xD7, 0xF7, 0x131, 0x237,  # Latin
    0x2C6, 0x2C7, 0x2D8, 0x2D9, 0x2DA, 0x2DC, 0xAF, 0xB4, 0x60, 0xA8,  # accents
    *range(0x300, 0x30D), 0x20D7, 0x203E, 0x332, 0x23DE, 0x23DF, 0x23B4, 0x23B5,
    *range(0x391, 0x3AA), *range(0x3B1, 0x3CA),  # Greek
    0x3D1, 0x3D5, 0x3D6, 0x3F1, 0x3F5, 0x2016, *PUNCTUATION,
    0x2032, 0x2033, 0x2061, 0x2062, 0x2063, 0x22EE, 0x22EF, 0x22F1,
    0x210B, 0x2112, 0x211B, 0x2110, 0x2130, 0x2131, 0x2133, 0x212C, 0x2113,  # ℋ ℒ ...
    0x2102, 0x210D, 0x2115, 0x2119, 0x211A, 0x211D, 0x2124, 0x210E,  # double-struck, h
    0x2190, 0x2191, 0x2192, 0x2193, 0x2194, 0x21A6, 0x21D0, 0x21D2, 0x21D4, 0x27F5,
    0x27F6, 0x27F9, 0x27FA,
    0x2200, 0x2202, 0x2203, 0x2205, 0x2206, 0x2207, 0x2208, 0x2209, 0x220B, 0x220F,
    0x2211, 0x2213, 0x2215, 0x2216, 0x2217, 0x2218, 0x2219, 0x221A, 0x221D, 0x221E,
    0x2223, 0x2225, 0x2227, 0x2228, 0x2229, 0x222A, 0x222B, 0x222C, 0x2234, 0x223C,
    0x2243, 0x2245, 0x2248, 0x2250, 0x2254, 0x225C, 0x2260, 0x2261, 0x2264, 0x2265,
    0x226A, 0x226B, 0x2282, 0x2283, 0x2286, 0x2287, 0x2295, 0x2296, 0x2297, 0x2299,
    0x22A4, 0x22A5, 0x22C0, 0x22C1, 0x22C2, 0x22C3, 0x22C5, 0x22C6, 0x25E6,
    0x2308, 0x2309, 0x230A, 0x230B, 0x27E8, 0x27E9,
    0x2A00, 0x2A01, 0x2A02, 0x2A7D, 0x2A7E,
    *range(0x1D400, 0x1D49C),  # bold, italic and bold italic Latin
    *range(0x1D49C, 0x1D4D0),  # script
    *range(0x1D538, 0x1D56C),  # double-struck
    *range(0x1D6A4, 0x1D756), *range(0x1D7CA, 0x1D7E2),  # Greek, digits
]  # fmt: skip

FONTS = {  # new name: (family, original, characters)
    "book-serif-400": ("Book Serif", "source-serif-4-latin-400-normal", TEXT),
    "book-serif-400-italic": ("Book Serif", "source-serif-4-latin-400-italic", TEXT),
    "book-serif-600": ("Book Serif", "source-serif-4-latin-600-normal", TEXT),
    "book-sans-400": ("Book Sans", "source-sans-3-latin-400-normal", TEXT),
    "book-sans-600": ("Book Sans", "source-sans-3-latin-600-normal", TEXT),
    "book-mono-400": ("Book Mono", "source-code-pro-latin-400-normal", CODE),
    "book-math": ("Book Math", "stix-two-math-latin-400-normal", MATH),
}


def cut(source: Path, target: Path, family: str, characters: list[int]) -> None:
    """Write the characters of source, renamed to family, to target as woff2."""
    options = subset.Options()
    options.flavor = "woff2"
    options.hinting = False
    options.notdef_outline = True
    options.name_IDs = [0, 1, 2, 3, 4, 6, 13, 14]  # names, copyright, licence
    # stylistic sets of a mathematical font would drag in thousands of glyphs
    math = target.stem == "book-math"
    options.layout_features = (
        ["ssty", "dtls", "flac"] if math else ["kern", "liga", "mark"]
    )
    font = ttLib.TTFont(source)
    cutter = subset.Subsetter(options)
    cutter.populate(unicodes=characters)
    cutter.subset(font)
    for record in font["name"].names:
        if record.nameID in (1, 3, 4):
            record.string = family
        elif record.nameID == 6:
            record.string = target.stem
    font.flavor = "woff2"
    font.save(target)


if __name__ == "__main__":
    for name, (family, original, characters) in FONTS.items():
        source = next(Path(sys.argv[1]).rglob(f"{original}.woff2"))
        cut(source, OUT / f"{name}.woff2", family, list(characters))
        print(f"{name}: {(OUT / f'{name}.woff2').stat().st_size:,} bytes")
