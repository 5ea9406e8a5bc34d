"""Contexts of images: answers without the class, and prompts that they fill."""

import pytest

from utils.data.contexts import clean_answer, fill_contexts
from utils.data.prompts import (
    CLASSLESS_TEMPLATE,
    CONTEXT,
    DSI_TEMPLATE,
    PLAIN_TEMPLATE,
    add_context,
    check_template,
    fill_context,
)


@pytest.mark.parametrize(("answer", "noun", "context", "is_named"), [
    ("The image shows a red car parked on a gravel road, with trees in the background.", "car",
     "parked on a gravel road, with trees in the background", True),
    ("Background: a snowy field. Viewpoint: from the side.", "SUV", "a snowy field, from the side", False),
    ("A Boeing 737 on the runway. The sky is blue", "Boeing 737-200", "on the runway, the sky is blue", True),
    ("Outdoors\n- side view of the cars\n- **bright sunny day**", "car", "outdoors, side view, bright sunny day", True),
    ("a small terrier standing on green grass", "yorkshire terrier", "standing on green grass", True),
    ("a scarf on a cart, in a carport", "car", "a scarf on a cart, in a carport", False),
    ("On a road, on a road, {class} <dsi-style>", "car", "on a road, class dsi-style", False),
    ("A car.", "car", "", True),
    ("", "car", "", False),
    ("on a road in the mountains, far away, in snow, at night", "car", "on a road in the mountains, far away, in snow",
     False),
    ("on a very very very very large road with the sky", "car", "on a very very very very large road", False),
])  # fmt: skip
def test_an_answer_becomes_a_short_context_without_the_class(answer, noun, context, is_named):
    assert clean_answer(answer, noun, max_words=10) == (context, is_named)


@pytest.mark.parametrize("template", [DSI_TEMPLATE, CLASSLESS_TEMPLATE, PLAIN_TEMPLATE, "{token} of a {class}"])
def test_a_context_is_added_and_leaves_no_trace_when_empty(template):
    with_context = add_context(template)
    parts = {"needs_token": "{token}" in template, "needs_class": "{class}" in template}
    check_template(with_context, others={CONTEXT: True}, **parts)
    assert ", on a road" in fill_context(with_context, "on a road")
    assert fill_context(with_context, "") == template


def test_contexts_lose_words_until_prompts_fit():
    prompts = ["A suv, {context}, in the style of <s>", "A long class name, {context}, in the style of <s>"]
    filled, used, num_short = fill_contexts(
        prompts, ["on a road, at night"] * 2, lambda texts: [len(text) < 43 for text in texts]
    )
    assert filled == ["A suv, on a road, in the style of <s>", "A long class name in the style of <s>"]
    assert (used, num_short) == (["on a road", ""], 2)
    filled, used, _ = fill_contexts(prompts, ["on a road"] * 2, lambda texts: [False] * len(texts))
    assert (filled, used) == (["A suv in the style of <s>", "A long class name in the style of <s>"], ["", ""])
