"""How pictures look here: few colours that tell apart in grey, thin frames, vector graphics."""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import Rectangle
from matplotlib_inline.backend_inline import set_matplotlib_formats

INK, BLUE, RED, GREEN, GOLD, GREY = "#22303c", "#2b6cb0", "#c0392b", "#2f855a", "#b7791f", "#b8c2cc"
CYCLE = (BLUE, RED, GREEN, GOLD, INK)

set_matplotlib_formats("svg")
plt.rcParams.update(
    {
        "figure.dpi": 100, "font.size": 9.5, "axes.titlesize": 10, "axes.labelsize": 9.5, "legend.fontsize": 8.5, "legend.frameon": False,
        "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": INK, "text.color": INK, "axes.labelcolor": INK, "xtick.color": INK,
        "ytick.color": INK, "lines.linewidth": 1.4, "axes.prop_cycle": plt.cycler(color=CYCLE), "figure.facecolor": "white", "savefig.facecolor": "white",
        "svg.fonttype": "path", "svg.hashsalt": "refimpl",
    }
)  # fmt: skip


def axes(rows: int = 1, columns: int = 1, *, width: float = 7.6, height: float = 3.0, **kwargs):
    """A figure and its axes, laid out so that nothing overlaps."""
    return plt.subplots(rows, columns, figsize=(width, height), layout="constrained", **kwargs)


def grid(ax, values, *, colours=None, numbers: bool = False, title: str = "", size: float = 1.0) -> None:
    """A matrix as squares: grey for 0, darker for more; or in given colours."""
    values = np.asarray(values)
    rows, columns = values.shape
    top = np.max(abs(values)) if values.dtype.kind in "fi" and values.size else 1
    for i in range(rows):
        for j in range(columns):
            v = values[i, j]
            colour = colours[int(v)] if colours is not None else plt.cm.Blues(0.1 + 0.75 * abs(float(v)) / (top or 1)) if v else "#f3f5f7"
            ax.add_patch(Rectangle((j, i), size, size, facecolor=colour, edgecolor="white", lw=1))
            if numbers and v:
                ax.text(j + size / 2, i + size / 2, f"{v:.2g}", ha="center", va="center", fontsize=7)
    ax.set(xlim=(-0.05, columns + 0.05), ylim=(rows + 0.05, -0.05), aspect="equal", title=title)
    ax.axis("off")


def box(ax, x: float, y: float, text: str, *, w: float = 1.6, h: float = 0.8, colour: str = "#e8eef5", fontsize: float = 8.5) -> None:
    """A rectangle with words, its centre at x, y."""
    ax.add_patch(Rectangle((x - w / 2, y - h / 2), w, h, facecolor=colour, edgecolor=INK, lw=0.8))
    ax.text(x, y, text, ha="center", va="center", fontsize=fontsize)


def arrow(ax, start: tuple[float, float], end: tuple[float, float], *, colour: str = INK, text: str = "") -> None:
    ax.annotate("", xy=end, xytext=start, arrowprops={"arrowstyle": "-|>", "color": colour, "lw": 0.9, "shrinkA": 0, "shrinkB": 0})
    if text:
        ax.text((start[0] + end[0]) / 2, (start[1] + end[1]) / 2 - 0.12, text, ha="center", va="bottom", fontsize=8, color=colour)
