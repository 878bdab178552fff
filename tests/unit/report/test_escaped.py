"""Text of strangers in Markdown and HTML."""

import pytest

from llmq.report.escaped import html_text, markdown_code, markdown_text


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("q_proj", "`q_proj`"),
        ("a`b", "`` a`b ``"),
        ("``", "``` `` ```"),
        ("two\nlines | cells", "`two lines \\| cells`"),
        ("\x1b[2K", "`\\x1b[2K`"),
        ("", "`  `"),
    ],
)
def test_code_in_markdown_cannot_end_early(text: str, code: str) -> None:
    assert markdown_code(text) == code


def test_text_in_markdown_has_no_marks() -> None:
    assert markdown_text("a *b*\n<i>[x](y)</i> 4.5 %\x07") == r"a \*b\* \<i\>\[x\](y)\</i\> 4.5 %\\x07"


def test_html_has_no_marks_and_no_control_characters() -> None:
    assert html_text("<script>'\"&\x07") == "&lt;script&gt;&#x27;&quot;&amp;\\x07"
