"""How the lab's pictures look, and how they become files. The first one imports matplotlib (the extra `lab`).

In an SVG the ink is currentColor, so that one picture fits a light and a dark page. The other colours are close to
those of Okabe and Ito, which people who cannot see red or green can tell apart. Their contrast is 3:1 on both pages.
"""

import re
from collections.abc import Callable
from functools import wraps
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec

from llama_mini.checkpoint.io.atomic import new_file
from llama_mini.errors import RequestError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

P = ParamSpec("P")
INK, DARK_INK = "#24292f", "#e6edf3"
LIGHT, DARK = "#ffffff", "#14171c"  # background of the page
BLUE, VERMILION, GREEN, PURPLE = PALETTE = ("#0072b2", "#d55e00", "#009e73", "#b5679a")
GREY = "#808080"  # within two standard errors of zero
SVG = "http://www.w3.org/2000/svg"
SUFFIXES = (".png", ".svg")
_STYLE: Any = {
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "font.size": 10,
    "grid.color": INK,
    "grid.alpha": 0.15,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "svg.fonttype": "none",
    "svg.hashsalt": "llama-mini",
}
_PAGE = f"svg{{color:{INK};background:{LIGHT}}}"
_PAGE += f"@media(prefers-color-scheme:dark){{svg{{color:{DARK_INK};background:{DARK}}}}}"
_NO_METADATA = dict.fromkeys(("Date", "Creator", "Format", "Type"))  # a date would change the bytes each time


def styled(draw: "Callable[P, Figure]") -> "Callable[P, Figure]":
    """A decorator: draws in the lab's style. Raises RequestError without matplotlib."""

    @wraps(draw)
    def in_style(*args: P.args, **kwargs: P.kwargs) -> "Figure":
        check_matplotlib()
        from matplotlib import rc_context

        with rc_context(_STYLE):
            return draw(*args, **kwargs)

    return in_style


def check_matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError:
        raise RequestError("pictures need matplotlib, which is not installed: pip install 'llama-mini[lab]'") from None


def check_drawable(path: Path) -> None:
    """For a check before long work: raises RequestError without matplotlib, or if the file's folder does not exist."""
    check_matplotlib()
    if not path.parent.is_dir():
        raise RequestError(f"cannot write {path}: there is no folder {path.parent}; make it first")


def check_picture(path: Path) -> None:
    """The same for a picture, which also needs a suffix that `save` knows."""
    if path.suffix not in SUFFIXES:
        raise RequestError(f"{path.name}: a picture is saved as {' or '.join(SUFFIXES)}; change the suffix")
    check_drawable(path)


def new_figure(rows: int, row_height: float) -> "tuple[Figure, list[Axes]]":
    """A figure of stacked panels that share the x axis; heights are in inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, rows * row_height + 0.4), layout="constrained")
    return figure, list(figure.subplots(rows, sharex=True, squeeze=False)[:, 0])


def layer_ticks(axes: "Axes", depth: int) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(nbins=min(depth + 1, 16), integer=True))


def log_scale(axes: "Axes") -> None:
    from matplotlib.ticker import LogFormatter

    class Plain(LogFormatter):
        """Labels the same ticks, but writes 0.6 instead of 6e-01."""

        def __call__(self, x: float, pos: int | None = None) -> str:
            return f"{x:g}" if super().__call__(x, pos) else ""

    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(Plain())


def legend_above(axes: "Axes", columns: int) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, borderaxespad=0.2)


def svg(figure: "Figure", name: str) -> str:
    """A figure as an <svg> element for an HTML page. Its ids start with `name`, and its ink is that of the page."""
    from matplotlib import rc_context

    file = BytesIO()
    with rc_context(_STYLE):
        figure.savefig(file, format="svg", transparent=True, metadata=_NO_METADATA)
    text = file.getvalue().decode()
    text = text[text.index("<svg") :].replace(INK, "currentColor").replace("xlink:href", "href")
    text = re.sub(r'<svg[^>]*?(viewBox="[^"]*")[^>]*>', r"<svg \1>", text, count=1)
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<[^>]*>", _shortened, re.sub(r"\n +", "\n", text))
    return re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", text)


def _shortened(tag: re.Match[str]) -> str:
    """A tag whose places are in hundredths of a point, which is enough. Labels, such as 0.001, are between tags."""
    return re.sub(r"(\d\.\d\d)\d+", r"\1", tag[0])


def save(figure: "Figure", path: str | Path) -> None:
    """Writes a PNG on white, or an SVG that follows the viewer's light or dark mode. Equal figures give equal bytes.

    Raises RequestError for another suffix, or if the file cannot be written.
    """
    path = Path(path)
    check_picture(path)
    from matplotlib import rc_context

    if path.suffix == ".svg":
        opening = f'<svg xmlns="{SVG}"'
        picture = svg(figure, "p").replace("<svg", opening, 1).replace(">", f"><style>{_PAGE}</style>", 1)
        write_whole(path, picture.encode())
    else:
        file = BytesIO()
        with rc_context(_STYLE):
            figure.savefig(file, format="png", dpi=150, facecolor=LIGHT, metadata={"Software": None})
        write_whole(path, file.getvalue())


def write_whole(path: Path, data: bytes) -> None:
    """Writes a file completely or not at all. Raises RequestError if it cannot be written."""
    try:
        with new_file(path) as made:
            made.write_bytes(data)
    except OSError as error:
        raise RequestError(f"cannot write {path}: {error.strerror}; name a file in a folder that exists") from None
