"""Pictures: every odd run and clip gives a PNG of a sensible size, and the boxes are where the tokens are."""

import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import audiopress
from audiopress.benchmarks import plots
from audiopress.compression import TokenStream

RATE = 16_000


@pytest.fixture(autouse=True)
def _strict():
    """Fails on whatever matplotlib or numpy warns about: letters without a glyph, empty scales, means of nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def history(points: int, drop: tuple[str, ...] = (), nan: tuple[int, ...] = ()) -> list[dict]:
    """A run as Trainer logs it, with an evaluation now and then and the summary at its end."""
    entries = []
    for i in range(points):
        text = 2 * np.exp(-5 * i / points) + 0.1
        loss = float("nan") if i in nan else text + 0.3
        parts = {"loss": loss, "loss_text": text, "loss_ctc": 1.0, "learning_rate": 1e-4, "grad_norm": 10.0 ** (i % 4)}
        entries.append({"step": 10 * (i + 1), "epoch": 0.1 * i, **{k: v for k, v in parts.items() if k not in drop}})
        if i % 100 == 3:
            entries.append({"step": 10 * (i + 1), "eval_loss": text + 0.2, "eval_runtime": 1.0})
    return [*entries, {"step": 10 * points, "train_loss": 1.0, "train_runtime": 5.0}]


def sound(seconds: float, rate: int = RATE) -> np.ndarray:
    """A tone that rises, with pauses."""
    t = np.arange(int(seconds * rate)) / rate
    return (0.3 * np.sin(2 * np.pi * (200 + 50 * t) * t) * (t % 0.7 < 0.5)).astype(np.float32)


def whole(slots: int, clips: int = 1) -> TokenStream:
    """The uncompressed tokens of clips of `slots` tokens."""
    return TokenStream(torch.zeros(slots * clips, 8), (slots,) * clips)


def compressed(slots: int, name: str, keep_ratio: float = 0.25) -> TokenStream:
    """What a method makes of them."""
    return audiopress.build(name, keep_ratio=keep_ratio, hidden_size=8)(whole(slots))


def size(path: Path) -> tuple[int, int]:
    """Width and height of a picture that opens as a PNG and is not of one colour."""
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert len(image.convert("RGB").getcolors(maxcolors=1 << 24)) > 20
        return image.size


@pytest.mark.parametrize(
    "entries",
    [
        history(1),
        history(5),
        history(5_000),
        history(30, drop=("grad_norm",)),
        history(30, drop=("grad_norm", "learning_rate", "loss_text", "loss_ctc")),
        history(30, drop=("loss",)),
        history(30, nan=(7,)),
        history(600, nan=tuple(range(200, 300))),
        history(5, nan=(0, 1, 2, 3, 4)),
        [{"step": 5, "eval_loss": 1.0}, {"step": 5, "eval_clean_loss": 2.0}],
        [{"step": 1, "loss": 1.0, "grad_norm": None, "learning_rate": 0.0}, {"step": 2, "loss": float("inf")}],
    ],
)
def test_every_run_gives_a_picture(tmp_path: Path, entries: list[dict]) -> None:
    path = plots.plot_training(entries, tmp_path / "new" / "training.png")
    assert path == tmp_path / "new" / "training.png"
    width, height = size(path)
    assert width == 1_200
    assert 700 < height < 1_200


def test_a_loss_that_is_not_finite_is_in_the_title() -> None:
    keys = ("loss", "loss_text")
    assert plots._training_title(history(10), keys) == ("Training, 100 steps", False)
    assert plots._training_title(history(10, nan=(4,)), keys) == (
        "Training, 100 steps: loss not finite at step 50",
        True,
    )
    title, alarm = plots._training_title(history(10, nan=(4, 5)), keys)
    assert alarm
    assert title.endswith("at 2 logged steps, the first 50")


def test_the_running_median_leaves_gaps_and_takes_no_outliers() -> None:
    values = np.array([1, 1, 90, 1, np.nan, 2, 2, 2.0])
    assert plots._running_median(values, 1) == pytest.approx([1, 1, 1, 45.5, np.nan, 2, 2, 2], nan_ok=True)


@pytest.mark.parametrize("entries", [[], [{"step": 3, "train_loss": 1.0}], [{"loss": 1.0}]])
def test_a_history_without_a_loss_is_refused(tmp_path: Path, entries: list[dict]) -> None:
    with pytest.raises(ValueError, match="has a step and a loss"):
        plots.plot_training(entries, tmp_path / "x.png")


@pytest.mark.parametrize("seconds", [0.04, 0.3, 1.5, 30.0])
@pytest.mark.parametrize("count", [1, 10])
def test_every_clip_gives_a_picture(tmp_path: Path, seconds: float, count: int) -> None:
    slots = int(25 * seconds)
    methods = {"none": whole(slots), "random": compressed(slots, "random"), "pooling": compressed(slots, "pooling")}
    several = {f"{name} {i}": stream for i in range(4) for name, stream in methods.items()}
    tokens = dict(list(several.items())[-count:])
    path = plots.plot_tokens(
        sound(seconds), RATE, tokens, tmp_path / "tokens.png", text="Größe $x_1$: cinq, привет. " * 40
    )
    width, height = size(path)
    assert 1_200 <= width <= 4_000
    assert 500 < height < 2_500


@pytest.mark.parametrize("rate", [8_000, 22_050, 48_000])
def test_other_sampling_rates_and_silence(tmp_path: Path, rate: int) -> None:
    tokens = {"pooling": compressed(50, "pooling")}
    size(plots.plot_tokens(sound(2, rate), rate, tokens, tmp_path / "sound.png", title="$5 or 5_0%"))
    size(plots.plot_tokens(np.zeros(2 * rate), rate, tokens, tmp_path / "silence.png"))


def test_the_uncompressed_strip_comes_first_and_only_once() -> None:
    pooled = {"pooling": compressed(50, "pooling")}
    for tokens in (pooled, {"none": whole(50), **pooled}):
        spans, length = plots._check_tokens(tokens, 2.0)
        first, last = spans.values()
        assert length == 50
        assert first.tolist() == [[i, i + 1] for i in range(50)]
        assert len(last) == 13
    assert list(plots._check_tokens(pooled, 2.0)[0]) == ["uncompressed", "pooling"]


def test_the_slots_of_a_clip_are_known_from_its_streams() -> None:
    # The tower's padding may give one token more than the whole 40 ms of the samples.
    assert plots._check_tokens({"pooling": compressed(51, "pooling")}, 2.03)[1] == 51
    assert plots._check_tokens({"none": whole(50)}, 2.05)[1] == 50
    assert plots._check_tokens({"none": whole(49), "random": compressed(49, "random")}, 2.0)[1] == 49


def test_boxes_cover_what_the_tokens_stand_for() -> None:
    kept = TokenStream(torch.zeros(3, 8), (3,), slots=torch.tensor([0, 4, 5]))
    assert plots.token_spans(kept).tolist() == [[0, 1], [4, 5], [5, 6]]

    runs = TokenStream(
        torch.zeros(3, 8), (3,), slots=torch.tensor([0, 2, 6]), sizes=torch.tensor([1.0, 4.0, 3.0])
    )  # slots 0, 1-4 and 5-7
    assert plots.token_spans(runs).tolist() == [[0, 1], [1, 5], [5, 8]]

    # Two of every ten slots kept, then merged in pairs: nothing is at the sum of the sizes.
    scattered = TokenStream(torch.zeros(2, 8), (2,), slots=torch.tensor([5, 25]), sizes=torch.tensor([2.0, 2.0]))
    assert plots.token_spans(scattered).tolist() == [[4.5, 6.5], [24.5, 26.5]]


@pytest.mark.parametrize("name", ["pooling", "stacking", "conv"])
@pytest.mark.parametrize("slots", [1, 2, 37, 750])
def test_merged_boxes_join_up_to_the_whole_clip(name: str, slots: int) -> None:
    spans = plots.token_spans(compressed(slots, name))
    assert (spans[1:, 0] == spans[:-1, 1]).all()
    assert spans[0, 0] == 0
    assert spans[-1, 1] == slots


@pytest.mark.parametrize(
    ("samples", "rate", "tokens", "message"),
    [
        (sound(2), RATE, {}, "at least one method"),
        (sound(2), RATE, {"none": whole(50), "pooling": whole(25, clips=2)}, "pooling: .* one clip, got 2"),
        (sound(2), RATE, {"random": whole(60)}, "random: its tokens reach slot 60, but 2.00 s of samples have 50"),
        (sound(2)[None], RATE, {"none": whole(50)}, "samples must be"),
        (sound(0.03), RATE, {"none": whole(1)}, "40 ms or more"),
        (sound(2) * np.nan, RATE, {"none": whole(50)}, "finite"),
        (sound(2), 0, {"none": whole(50)}, "sampling_rate must be positive"),
    ],
)
def test_what_cannot_be_drawn_is_refused(
    tmp_path: Path, samples: np.ndarray, rate: int, tokens: dict[str, TokenStream], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        plots.plot_tokens(samples, rate, tokens, tmp_path / "x.png")
    assert not list(tmp_path.iterdir())


def test_pyplot_stays_out(tmp_path: Path) -> None:
    code = """
import sys
import numpy as np, torch
from audiopress import TokenStream
from audiopress.benchmarks import plots
plots.plot_training([{"step": 1, "loss": 1.0}], sys.argv[1] + "/a.png")
plots.plot_tokens(np.zeros(16000), 16000, {"none": TokenStream(torch.zeros(25, 8), (25,))}, sys.argv[1] + "/b.png")
assert "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png", "b.png"]
