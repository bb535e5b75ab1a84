"""Stop strings in a text that comes in pieces: found wherever the pieces end, and never a character
lost.
"""

import random

import pytest

from llama_jax.text.stops import StopStrings

CASES = [
    ("abcdef", ["cd"], "ab", True),
    ("abcdef", ["x"], "abcdef", False),
    ("aab", ["ab"], "a", True),
    ("aaa", ["aab"], "aaa", False),
    ("abab!", ["ababc", "b!"], "aba", True),
    ("one\n\ntwo", ["\n\n", "\n"], "one", True),
    ("abc", [], "abc", False),
    ("abc", [""], "abc", False),
    ("xSTO", ["STOP"], "xSTO", False),
    ("你好吗", ["好"], "你", True),
    ("abcd", ["cd", "bc"], "a", True),
]


@pytest.mark.parametrize(("text", "stops", "expected", "found"), CASES)
def test_however_the_text_is_cut(text, stops, expected, found):
    draw = random.Random(0)
    for _ in range(50):
        cuts = sorted(draw.sample(range(len(text) + 1), draw.randint(0, len(text))))
        pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)])]
        watch = StopStrings(stops)
        assert "".join([*map(watch.push, pieces), watch.flush()]) == expected
        assert watch.found == found
        assert watch.push("more") == "" or not found


def test_only_what_may_become_a_stop_string_is_held_back():
    watch = StopStrings(["</s>"])
    assert [watch.push(piece) for piece in ("ab", "c<", "/", "d", "<", "x")] == [
        "ab",
        "c",
        "",
        "</d",
        "",
        "<x",
    ]
