"""Prompts from files, and blanks filled in."""

import gzip
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megaswitch.data.prompts import fill, fill_so_far, has_blanks, read_prompts, spans
from megaswitch.log import UserError


def test_plain_lines_are_prompts_empty_ones_too(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("a <extra_id_0>\r\n\nü\n".encode())
    assert read_prompts(path) == ["a <extra_id_0>", "", "ü"]
    packed = tmp_path / "prompts.txt.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert read_prompts(packed) == read_prompts(path)


def test_json_lines_give_inputs_or_text(tmp_path):
    path = tmp_path / "tasks.jsonl"
    lines = [{"inputs": "i", "text": "t"}, {"text": "only"}]
    path.write_text("\n".join(map(json.dumps, lines)))
    assert read_prompts(path) == ["i", "only"]


def test_lines_without_a_prompt_are_named_together(tmp_path):
    path = tmp_path / "tasks.jsonl"
    path.write_text('{"inputs": "fine"}\nnot json\n[1]\n{"inputs": 3}\n')
    with pytest.raises(UserError) as caught:
        read_prompts(path)
    message = str(caught.value)
    assert "3 lines without a prompt" in message
    assert "line 2" in message
    assert "line 4" in message


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match="nowhere"):
        read_prompts(tmp_path / "nowhere.txt")


def test_blanks_are_filled_by_number():
    prompt = "A <extra_id_1> and <extra_id_0>, <extra_id_2>"
    output = "<extra_id_0> zero <extra_id_1> one <extra_id_0> again"
    assert has_blanks(prompt)
    assert not has_blanks("none <extra_id_>")
    assert spans(output) == {0: "zero", 1: "one"}
    assert fill(prompt, output) == "A one and zero, <extra_id_2>"
    assert fill(prompt, output, "[{}]") == "A [one] and [zero], <extra_id_2>"
    assert fill("<extra_id_0>", r"<extra_id_0> \1{}") == r"\1{}"


def test_what_is_settled_grows_into_the_whole():
    prompt = "A <extra_id_0> and <extra_id_1>."
    pieces = ["", "<extra_id_0>", " gr", "eat", "<extra_id_1>", " small", "<extra_id_2>", " end"]
    output = ""
    shown = ""
    seen = []
    for piece in pieces:
        output += piece
        settled = fill_so_far(prompt, output, "[{}]")
        if settled.startswith(shown):
            shown = settled
        seen.append(shown)
    assert seen[:5] == ["A ", "A [", "A [gr", "A [great", "A [great] and ["]
    assert fill(prompt, output, "[{}]").startswith(shown)


PARTS = st.lists(st.sampled_from(["a", " ", "b c", *(f"<extra_id_{n}>" for n in range(3))]))


@given(PARTS, PARTS)
def test_the_last_settled_text_begins_the_whole_when_blanks_come_in_order(prompt, output):
    prompt_text, output_text = "".join(prompt), "".join(output)
    numbers = [int(p[10]) for p in output if p.startswith("<")]
    settled = fill_so_far(prompt_text, output_text)
    if numbers == sorted(set(numbers)) and len({p for p in prompt if p[0] == "<"}) == sum(
        p[0] == "<" for p in prompt
    ):
        assert fill(prompt_text, output_text).startswith(settled)
