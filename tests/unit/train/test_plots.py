"""What a picture of an evaluation shows."""

import pytest

from megaswitch.train.metrics import LayerLoad
from megaswitch.train.plots import plot_evaluation
from megaswitch.train.validation import Figures

SOURCES = {
    name: Figures(1, 10, 8, {"loss": loss, "content_loss": loss + 1,
                             "content_unigram_entropy": 5.0}, {})
    for name, loss in (("a", 2.0), ("b$c", 3.0), ("日本", 4.0))
}  # fmt: skip


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    """Draws and returns the figure's axes."""
    import matplotlib.pyplot as plt

    monkeypatch.setattr(plt, "close", lambda figure: None)

    def draw(sources, router):
        plot_evaluation(tmp_path / "x.png", sources, router, "title")
        figure = plt.gcf()
        assert (tmp_path / "x.png").stat().st_size > 1000
        return figure.axes

    yield draw
    monkeypatch.undo()
    plt.close("all")


def test_bars_are_text_losses_and_cells_are_shares(drawn):
    router = {
        "encoder.1.ffn": LayerLoad(8, 8, 1.0, 0.5, [4, 4, 0, 0]),
        "decoder.1.ffn": LayerLoad(4, 4, 1.0, 0.5, [1, 1, 1, 1]),
    }
    losses, loads, _ = drawn(SOURCES, router)
    assert [bar.get_width() for bar in losses.patches] == [3.0, 4.0, 5.0]
    labels = [label.get_text() for label in losses.get_yticklabels()]
    assert labels == ["a", r"b\$c", "日本"]
    (image,) = loads.images
    assert image.get_array().tolist() == [[2.0, 2.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]]
    (unused,) = loads.lines
    assert unused.get_xydata().tolist() == [[2.0, 0.0], [3.0, 0.0]]


def test_a_dense_model_and_many_sources(drawn):
    figures = SOURCES["a"]
    (losses,) = drawn({f"source {i}": figures for i in range(120)}, {})
    assert len(losses.patches) == 120


def test_many_experts_and_layers(drawn):
    router = {f"encoder.{i}.ffn": LayerLoad(256, 256, 1.0, 0.5, [2] * 128) for i in range(1, 24, 2)}
    _, loads, _ = drawn(SOURCES, router)
    assert loads.images[0].get_array().shape == (12, 128)
