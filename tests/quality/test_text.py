from utils.quality.presentation import print_quality


def test_brackets_in_names_are_printed_as_they_are(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    figures = dict.fromkeys(("shift", "shift_floor", "diversity", "real_diversity", "own_share", "real_own_share"), 1.0)
    count = {"used": 1}
    print_quality({
        "classes": [{"class": "[red]car :car:", "num_images": 1, **figures}],
        "num_images": {"synthetic": count, "train": count, "held_out": count, "test": count},
        "synthetic": {"id": "[bold]set"}, "model": {"id": "[dim]model"}, "verdicts": [], "caveats": [],
    })  # fmt: skip
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("[red]car :car:", "[bold]set", "[dim]model"))
