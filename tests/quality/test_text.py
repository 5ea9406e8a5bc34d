from utils.quality.text import print_quality


def test_names_with_brackets_are_printed_as_they_are(capsys):
    names = ("shift", "shift_floor", "diversity", "real_diversity", "own_share", "real_own_share")
    print_quality({
        "classes": [{"class": "[/a]:cat:", "num_images": 3, **dict.fromkeys(names, 0.5)}],
        "num_images": {name: {"used": 3} for name in ("synthetic", "train", "held_out", "test")},
        "synthetic": {"id": "my [set]"},
        "model": {"id": "vit"},
        "verdicts": [{"level": "good", "subject": "[red]", "text": "fine"}],
        "caveats": ["[b]"],
    })  # fmt: skip
    printed = capsys.readouterr().out
    assert all(text in printed for text in ("[/a]:cat:", "my [set]: classes", "   good  [red]: fine", "note  [b]"))
