"""One self-contained page of the accuracy rows: charts with filters, every row with its command, and clips to hear.

Nothing on the page is fetched: the charts' library, the pictures and the sound are in the file. `page.html` is its
frame, `page.css` its looks and `page.js` what it does.
"""

from __future__ import annotations

from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from audiopress.benchmarks.cells import read_rows
from audiopress.benchmarks.page.rows import TESTBEDS, page_points
from audiopress.benchmarks.page.sound import CLIPS, Sound, heard_clips, recorded


def write_page(results: Path, output: Path, sound: Sound = recorded) -> Path:
    """Writes the page of the rows in a folder.

    Args:
        results: with files `*.jsonl`; see `rows.page_points`. Rows of `page_clips.py` give the clips to hear.
        output: of the HTML.
        sound: gives the samples of a language's prompts, at 16 kHz. Default: the recordings.

    Raises:
        ValueError: there is no row of accuracy and none of clips.
        FetchError: the recordings are not in the cache and cannot be fetched.
    """
    from audiopress.benchmarks.page.charts import accuracy_charts, library, tokens_chart  # wants the extra "bench"

    data = page_points(results)
    rows = [row for file in sorted(results.glob("*.jsonl")) for row in read_rows(file) if row.get("testbed") == CLIPS]
    data["clips"] = heard_clips(rows, sound)
    if not data["points"] and not data["clips"]:
        raise ValueError(f"no rows of accuracy in {results}; python benchmarks/speech.py --output FILE writes them")
    data["charts"] = {CLIPS: tokens_chart()} | {
        key: accuracy_charts([point for point in data["points"] if point["testbed"] == key], testbed.error)
        for key, testbed in TESTBEDS.items()
    }
    data["made"] = f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(render(data, library()))
    return output


def render(data: dict[str, Any], library: str) -> str:
    """Puts the data into the page's frame; nothing in it can end the element that holds it."""
    folder = Path(__file__).parent
    frame = Environment(loader=FileSystemLoader(folder), autoescape=True, undefined=StrictUndefined)
    frame.policies["json.dumps_kwargs"] = {"allow_nan": False, "ensure_ascii": False, "separators": (",", ":")}
    style, script = ((folder / name).read_text() for name in ("page.css", "page.js"))
    return frame.get_template("page.html").render(data=data, style=style, script=script, library=library)
