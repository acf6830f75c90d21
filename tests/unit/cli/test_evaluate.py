"""`megaswitch evaluate` as a user meets it: table, JSON, picture, and what it says of bad input."""

import json
import re
import sys

import pytest

from megaswitch import cli
from tests.unit.cli.commands import refusal


@pytest.fixture
def command(text_run, monkeypatch, capsys):
    """Runs the command on the made-up run, in this process; returns (exit code, out, err)."""

    def run(*arguments, checkpoint=text_run / "run"):
        monkeypatch.setattr(
            sys, "argv", ["megaswitch", "evaluate", str(checkpoint), *map(str, arguments)]
        )
        monkeypatch.setattr("signal.signal", lambda *_: None)
        with pytest.raises(SystemExit) as ended:
            cli.main()
        printed = capsys.readouterr()
        return ended.value.code or 0, printed.out, printed.err

    return run


def refused(result) -> str:
    code, out, err = result
    assert code == 2, err
    assert out == ""
    assert "Traceback" not in err
    message = err[err.index("error: ") :].strip()
    assert "\n\n" not in message
    return message


def test_json_and_table_show_the_same(command, text_run):
    arguments = (f"lang={text_run}/texts.jsonl", "--by", "lang", "--samples", 5)
    code, out, err = command(*arguments, "--json")
    assert code == 0, err
    report = json.loads(out)
    names = [source["name"] for source in report["sources"]]
    assert names == ["lang/(no lang)", "lang/a", "lang/b"]
    total = report["total"]
    assert total["samples"] == 15
    for key in ("target_tokens", "content_tokens"):
        assert total[key] == sum(source[key] for source in report["sources"])
    for load in total["router"].values():
        assert sum(load["tokens_per_expert"]) == load["tokens"]
        assert 0 < load["router_entropy_share"] <= 1
    lines = command(*arguments)[1].splitlines()
    (row,) = (line.split() for line in lines if line.startswith(" total"))
    assert row == [
        *("total", "15", f"{total['target_tokens']:,}", f"{total['loss']:.4f}"),
        *(f"{total['perplexity']:,.2f}", f"{total['accuracy']:.2%}", f"{total['content_tokens']}"),
        *(f"{total['content_loss']:.4f}", f"{total['content_perplexity']:,.2f}"),
        *(f"{total['content_accuracy']:.2%}", f"{total['content_unigram_entropy']:.4f}"),
    ]
    load = total["router"]["decoder.1.ffn"]
    (line,) = (line for line in lines if line.startswith(" decoder.1.ffn"))
    assert f"{load['dropped_fraction']:.2%}" in line
    assert f"{load['load_imbalance']:.2f} (#" in line
    assert len(line.split()[-1]) <= 4


def test_one_source_needs_no_total(command, text_run):
    out = command(f"{text_run}/valid", "--samples", 4)[1]
    assert " valid " in out
    assert "total" not in out


def test_a_narrow_terminal_costs_no_digits(command, text_run, monkeypatch):
    wide = command(f"{text_run}/valid", "--samples", 4)[1]
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "40")
    narrow = re.sub(r"\x1b\[\d*m", "", command(f"{text_run}/valid", "--samples", 4)[1])
    assert narrow.split() == wide.split()


def test_a_picture_is_drawn(command, text_run, tmp_path):
    picture = tmp_path / "new" / "figures.png"
    assert command(f"{text_run}/valid", "--samples", 4, "--plot", picture)[0] == 0
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_nothing_starts(command, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.backend_bases", None)
    message = refused(command("does-not-matter", "--plot", "x.png"))
    assert "pip install 'megaswitch[plot]'" in message


def test_a_picture_that_cannot_be_written_is_refused_first(command, tmp_path):
    (tmp_path / "file").touch()
    message = refused(command("does-not-matter", "--plot", tmp_path / "file" / "x.png"))
    assert "x.png cannot be written" in message
    message = refused(command("does-not-matter", "--plot", tmp_path))
    assert "it must be a format of matplotlib" in message
    folder = tmp_path / "folder.png"
    folder.mkdir()
    assert "Is a directory" in refused(command("does-not-matter", "--plot", folder))


def test_bad_input_is_refused(command, text_run, tmp_path, corpus):
    assert "neither a checkpoint nor a run" in refused(command("x", checkpoint=tmp_path))
    assert "there is no data 'none'" in refused(command("none"))
    assert "another tokenizer" in refused(command(corpus))
    (tmp_path / "empty.txt").touch()
    assert "hold no usable document" in refused(command(tmp_path / "empty.txt"))
    (tmp_path / "short.txt").write_text("bada")
    assert "fewer are in short (" in refused(command(tmp_path / "short.txt"))
    for suffix in (".bin", ".idx", ".meta.json"):
        content = (text_run / f"valid{suffix}").read_bytes()
        (tmp_path / f"cut{suffix}").write_bytes(content)
    (tmp_path / "cut.idx").write_bytes((text_run / "valid.idx").read_bytes()[:-9])
    assert "cut.idx" in refused(command(tmp_path / "cut"))
    (tmp_path / "cut.idx").unlink()
    assert "cut.idx" in refused(command(tmp_path / "cut"))
    message = refused(command(f"{text_run}/texts.jsonl", "--by", "nothing"))
    assert "no document has a value in the field 'nothing'" in message
    assert command(f"{text_run}/valid", "--samples", 0)[0] == 2
    message = refused(command(f"{text_run}/valid", "--mean-span-length", "nan"))
    assert "mean_span_length is nan" in message


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--ep", 8], ["--ep=8 must divide model.moe.num_experts=4; use 1, 2 or 4"]),
        (["--tp", 8], ["--tp=8 must divide model.num_heads=4; use 1, 2 or 4"]),
        (["--ep", 3], ["--ep × --tp = 3 × 1 = 3 must divide the number of ranks, 8", "torchrun",
                       "--ep=3 must divide"]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", ["evaluate", "generate"])
def test_layouts_are_refused_before_ranks_join(text_run, monkeypatch, name, options, words):
    def joined(*arguments):
        raise AssertionError("a group was started")

    monkeypatch.setattr("megaswitch.parallel.mesh.Mesh.start", joined)
    for variable, value in (("WORLD_SIZE", 8), ("RANK", 0), ("LOCAL_RANK", 0)):
        monkeypatch.setenv(variable, str(value))
    message = refusal(name, text_run / "run", f"{text_run}/valid", *options)
    for word in words:
        assert word in message
    assert "parallel." not in message
    assert "pp" not in message.replace(str(text_run), "")


def test_a_layout_needs_its_ranks(command, text_run):
    message = refused(command(f"{text_run}/valid", "--tp", 2))
    assert "--ep × --tp = 1 × 2 = 2 must divide the number of ranks, 1; start a multiple" in message
    code, _, err = command(f"{text_run}/valid", "--pp", 2)
    assert code == 2
    assert "No such option" in err
