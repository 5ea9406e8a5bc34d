from utils.quality.text import print_quality


def test_names_with_brackets_are_printed_as_they_are(capsys):
    numbers = {
        name: 0.5 for name in ("shift", "shift_floor", "diversity", "real_diversity", "own_share", "real_own_share")
    }
    print_quality({
        "classes": [{"class": "[/a]:cat:", "num_images": 3, **numbers}], "synthetic": {"id": "my [set]"},
        "num_images": {name: {"used": 3} for name in ("synthetic", "train", "held_out", "test")}, "model": {"id": "vit"},
        "verdicts": [{"level": "good", "subject": "[red]", "text": "fine"}], "caveats": ["[b]"],
    })  # fmt: skip
    printed = capsys.readouterr().out
    assert all(text in printed for text in ("[/a]:cat:", "my [set]: classes", "   good  [red]: fine", "note  [b]"))
