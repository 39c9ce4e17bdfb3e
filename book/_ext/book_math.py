"""Formulas become MathML while the site is built, so no page needs a script for them.

`latex2mathml` does the translation. Around it stand two steps: `prepare` rewrites LaTeX
that it does not know (`aligned`, `\\operatorname`), `polish` brings its result to
MathML Core, which is what browsers draw: letters of the mathematical alphabets instead
of `mathvariant`, limits below their operators, spaces around function names. A formula
that cannot be translated is a warning, with `-W` an error, that names page and formula.
"""

import html
import re
from xml.etree import ElementTree

from docutils import nodes
from latex2mathml.converter import convert_to_element
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.util.math import get_node_equation_number

logger = logging.getLogger(__name__)

NAMESPACE = "http://www.w3.org/1998/Math/MathML"
ALIGNED = r"(?:aligned|alignedat|align|gathered|gather|eqnarray|multline)\*?"
ENVIRONMENTS = re.compile(
    rf"{ALIGNED}|equation\*?|split|cases|[pbBvV]?matrix\*?|smallmatrix|array"
)
FUNCTIONS = set(
    "arccos arcsin arctan arg cos cosh cot coth csc deg dim exp hom ker lg ln log sec "
    "sin sinh tan tanh".split()
)
LIMITS = {"lim", "sup", "inf", "max", "min", "det", "gcd", "Pr", "lim inf", "lim sup"}
WITH_LIMITS = {"msub": "munder", "msup": "mover", "msubsup": "munderover"}
CHILDREN = {"mfrac": 2, "msub": 2, "msup": 2, "munder": 2, "mover": 2, "mroot": 2}
SCRIPTS = {"msub", "msup", "msubsup", "munder", "mover", "munderover"}
CHILDREN |= {"msubsup": 3, "munderover": 3}
BINARY = set("+−±∓")
OPENING = set("([{⟨⌈⌊")

# First letters (A, a, Α, α, 0) of the mathematical alphabets in Unicode
ALPHABETS = {
    "bold": (0x1D400, 0x1D41A, 0x1D6A8, 0x1D6C2, 0x1D7CE),
    "italic": (0x1D434, 0x1D44E, 0x1D6E2, 0x1D6FC, None),
    "bold-italic": (0x1D468, 0x1D482, 0x1D71C, 0x1D736, 0x1D7CE),
    "double-struck": (0x1D538, 0x1D552, None, None, 0x1D7D8),
    "script": (0x1D49C, 0x1D4B6, None, None, None),
}
FIRST = ("A", "a", "\u0391", "\u03b1", "0")
LAST = ("Z", "z", "\u03a9", "\u03c9", "9")


class MathError(ValueError):
    """A formula that has no translation."""


def prepare(latex: str) -> tuple[str, dict[str, bool]]:
    """Rewrite what latex2mathml does not know.

    Returns the LaTeX and the operator names in it (True: limits go below the name).
    """
    operators = {}
    for environment in re.findall(r"\\begin\{(.*?)\}", latex):
        if not ENVIRONMENTS.fullmatch(environment):
            raise MathError(f"unknown environment {environment}")

    def name(match: re.Match) -> str:
        word = match[2].replace(r"\,", "\u2009").replace(r"\ ", "\u2009")
        operators[word] = bool(match[1])
        return rf"\text{{{word}}}"

    latex = re.sub(r"\\label\{[^{}]*\}|\\(?:nonumber|notag)\b", "", latex)
    latex = re.sub(r"\\(begin|end)\{equation\*?\}", "", latex)
    latex = re.sub(
        r"\\arg\s*\\?(min|max)(?![a-zA-Z])", r"\\operatorname*{arg\\,\1}", latex
    )
    latex = re.sub(r"\\arg(?![a-zA-Z])", r"\\operatorname{arg}", latex)
    latex = re.sub(r"\\operatorname(\*?)\s*\{([^{}]*)\}", name, latex)
    latex = re.sub(r"\\mathrm\{([A-Za-z]{2,})\}", r"\\text{\1}", latex)
    latex = re.sub(r"(\\begin|\\end)\{split\}", r"\1{align*}", latex)
    latex = re.sub(rf"(\\begin|\\end)\{{{ALIGNED}\}}", r"\1{align*}", latex)
    # braces keep a matrix together when it has an exponent
    latex = re.sub(r"(\\begin\{(?:[a-zA-Z]?matrix|array)\*?\})", r"{\1", latex)
    latex = re.sub(r"(\\end\{(?:[a-zA-Z]?matrix|array)\*?\})", r"\1}", latex)
    latex = latex.replace(r"\bigl", "").replace(r"\bigr", "")
    return latex.strip(), operators


def letters(text: str, variant: str) -> str:
    """The text in one of the mathematical alphabets."""
    result = ""
    for char in text:
        for first, last, target in zip(FIRST, LAST, ALPHABETS[variant], strict=True):
            if target and first <= char <= last:
                char = chr(target + ord(char) - ord(first))
                break
        result += char
    return result


def check(element: ElementTree.Element) -> None:
    """Raise MathError where latex2mathml passed something through untranslated."""
    text = element.text or ""
    if text.startswith("\\"):
        raise MathError(f"unknown command {text}")
    if text == "&" or element.get("linebreak"):
        raise MathError("'&' or '\\\\' outside an environment that is known")
    wanted = CHILDREN.get(element.tag)
    if wanted and len(element) != wanted:
        raise MathError(f"{element.tag} with {len(element)} instead of {wanted} parts")


def polish(
    parent: ElementTree.Element, operators: dict[str, bool], script: bool = False
) -> None:
    """Turn the tree below parent, a script or not, into MathML Core, in place."""
    for place, element in enumerate(parent):
        if element.text:
            element.text = html.unescape(element.text)
        check(element)
        polish(element, operators, script or (parent.tag in SCRIPTS and place > 0))
        text = element.text or ""
        if element.tag == "mtext" and text in operators:
            element.tag = "mo" if operators[text] else "mi"
            element.set("class", "name")
        elif element.tag == "mi" and text in FUNCTIONS:
            element.set("class", "name")
        elif element.tag == "mtext" and re.fullmatch(r"\w{2,}", text):
            element.tag = "mi"  # a word as a variable
        variant = element.attrib.get("mathvariant")
        if variant in ALPHABETS and element.tag in ("mi", "mn"):
            element.text = letters(text, element.attrib.pop("mathvariant"))
        elif variant == "bold":
            element.attrib.pop("mathvariant")
            element.set("class", "bold")
        if element.tag == "mi" and text in ("×", "÷", "·", "±", "…", "⋯"):
            element.tag = "mo"
        if element.tag == "mo" and text in ("|", "‖"):
            element.attrib.update(lspace="0", rspace="0")
            element.attrib.setdefault("stretchy", "false")
        if element.tag == "mo" and (text in LIMITS or operators.get(text)):
            element.attrib.update(movablelimits="true", lspace="0", rspace="0.167em")
        elif element.tag == "mo" and text in ("/", "…", "⋯"):
            element.attrib.update(lspace="0", rspace="0")
        elif element.tag == "mo" and script and text not in OPENING:
            element.attrib.update(lspace="0.05em", rspace="0.05em")
        if element.tag in WITH_LIMITS and limits_below(element[0]):
            element.tag = WITH_LIMITS[element.tag]
        if element.tag == "mover" and element[1].tag == "mo" and text == "":
            accent(element)
        if element.tag == "mtable":
            if element.attrib.pop("columnspacing", None):
                element.attrib.update({"class": "aligned", "displaystyle": "true"})
    spaces(parent)


def limits_below(base: ElementTree.Element) -> bool:
    """Whether TeX puts the limits of this operator below and above it in a display."""
    return bool(base.get("movablelimits")) or base.text in ("∑", "∏", "⋃", "⋂")


def accent(element: ElementTree.Element) -> None:
    """Mark a hat, bar or tilde as an accent, in the shape that sits on its letter."""
    mark = element[1]
    if mark.text in (
        "\u2015",
        "\u203e",
        "\u00af",
    ):  # \\overline stretches, \\bar does not
        line = mark.get("accent") == "true"
        mark.text = "\u203e" if line else "\u00af"
        mark.set("stretchy", "true" if line else "false")
    elif mark.get("stretchy") == "false":
        mark.text = {"^": "\u02c6", "~": "\u02dc"}.get(mark.text, mark.text)
    if mark.text not in ("\u23de", "\u23b4", "\u2192"):  # these keep their distance
        element.set("accent", "true")


def spaces(row: ElementTree.Element) -> None:
    """Thin spaces around function names; signs that are no binary operators."""
    if row.tag not in ("mrow", "mtd", "mstyle", "math"):
        return
    items = list(row)
    position = 0
    for left, right in zip(items, items[1:], strict=False):
        position += 1
        left_name, right_name = is_name(left), is_name(right)
        opens = right.tag == "mo" and (right.text or "") in OPENING
        gap = (left_name and right.tag != "mo") or (right_name and left.tag != "mo")
        gap = gap or (right_name and (left.text or "") in set(")]}"))
        if gap and not opens and "mspace" not in (left.tag, right.tag):
            row.insert(position, ElementTree.Element("mspace", width="0.167em"))
            position += 1
        if left.tag == right.tag == "mo" and right.text in BINARY:
            if left.text not in set(")]}|‖!") | {"′"}:
                right.set("form", "prefix")
        elif right.tag == "mo" and right.text in BINARY and left.tag == "mspace":
            right.set("form", "infix")


def is_name(element: ElementTree.Element) -> bool:
    """Whether the element is a function's name, bare or with an index or exponent."""
    if element.tag in ("msub", "msup", "msubsup") and len(element):
        return is_name(element[0])
    return element.tag == "mi" and element.get("class") == "name"


def mathml(latex: str, display: bool) -> str:
    """The formula as MathML; raises MathError where it cannot be translated."""
    prepared, operators = prepare(latex)  # may raise, too
    try:
        tree = convert_to_element(prepared, display="block" if display else "inline")
    except Exception as error:  # the library's own errors have no common class
        raise MathError(type(error).__name__) from error
    del tree.attrib["xmlns"]
    polish(tree, operators)
    if not display:
        del tree.attrib["display"]
    return ElementTree.tostring(tree, encoding="unicode")


def render(translator, node: nodes.Element, display: bool) -> str:
    """MathML of a node, or a warning and the formula's source."""
    latex = node.astext()
    try:
        return mathml(latex, display)
    except MathError as error:
        page = translator.builder.current_docname
        message = "page %s: formula cannot be translated to MathML (%s): %s"
        logger.warning(message, page, error, latex, location=node, type="math")
        return f"<code>{html.escape(latex)}</code>"


def visit_inline(translator, node: nodes.math) -> None:
    """Write a formula within a line."""
    translator.body.append(render(translator, node, display=False))
    raise nodes.SkipNode


def visit_block(translator, node: nodes.math_block) -> None:
    """Write a formula on a line of its own, with its number if it has one."""
    name = f' id="{node["ids"][0]}"' if node.get("ids") else ""
    body = render(translator, node, display=True)
    translator.body.append(f'<div class="formula"{name}><div>{body}</div>')
    if node.get("number"):
        number = get_node_equation_number(translator, node)
        translator.body.append(f'<span class="number">({number})</span>')
    translator.body.append("</div>\n")
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict:
    """Offer the renderer to Sphinx under the name `mathml`."""
    inline, block = (visit_inline, None), (visit_block, None)
    app.add_html_math_renderer("mathml", inline, block)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
