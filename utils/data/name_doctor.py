"""The class-name doctor: finds class names that make a generator draw something else, and proposes others."""

import re
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml
from rich.console import Console
from rich.table import Table
from rich.text import Text

from utils.cli.errors import UserError
from utils.cli.records import write_text
from utils.cli.tables import print_table
from utils.data.class_names import (
    drop_numbering,
    group_names,
    list_names,
    propose_noun,
    separate_digits,
    split_camel_case,
)

MAX_ROWS = 8  # rows per warning in the printed table; a file has all

# words in datasets such as ImageNet, CIFAR, Caltech and iNaturalist -> a noun for each of two meanings
# fmt: off
DOUBLE_MEANINGS = {
    "admiral": ("admiral butterfly", "navy officer"), "bank": ("bank building", "river bank"),
    "bar": ("bar room", "metal bar"), "bass": ("bass fish", "bass guitar"), "bat": ("bat animal", "baseball bat"),
    "beetle": ("beetle insect", "Volkswagen Beetle car"), "bishop": ("bishop clergyman", "bishop chess piece"),
    "bolt": ("metal bolt", "lightning bolt"), "bow": ("archery bow", "ribbon bow"),
    "boxer": ("boxer dog", "boxing athlete"), "buckeye": ("buckeye nut", "buckeye butterfly"),
    "bulb": ("light bulb", "flower bulb"), "cardigan": ("Cardigan Welsh corgi dog", "cardigan sweater"),
    "cardinal": ("cardinal bird", "cardinal clergyman"), "cell": ("prison cell", "cell under a microscope"),
    "chest": ("wooden chest", "human chest"), "club": ("golf club", "night club"),
    "coach": ("coach bus", "sports coach"), "cobra": ("cobra snake", "Shelby Cobra car"),
    "court": ("courtroom", "tennis court"), "crane": ("crane bird", "construction crane"),
    "cricket": ("cricket insect", "cricket game"), "date": ("date fruit", "calendar date"),
    "drill": ("power drill", "drill monkey"), "drumstick": ("drum stick", "chicken drumstick"),
    "fan": ("electric fan", "sports fan"), "file": ("metal file tool", "paper file"),
    "fly": ("fly insect", "fishing fly"), "football": ("American football ball", "soccer ball"),
    "glass": ("drinking glass", "sheet of glass"), "horn": ("brass horn", "animal horn"),
    "iris": ("iris flower", "iris of an eye"), "iron": ("clothes iron", "iron metal"),
    "jaguar": ("jaguar animal", "Jaguar car"), "keyboard": ("computer keyboard", "piano keyboard"),
    "kite": ("kite bird", "kite toy"), "lighter": ("cigarette lighter", "lighter barge"),
    "mink": ("mink animal", "mink coat"), "mole": ("mole animal", "mole on skin"),
    "monarch": ("monarch butterfly", "king or queen"), "monitor": ("computer monitor", "monitor lizard"),
    "mortar": ("mortar bowl", "mortar weapon"), "mouse": ("mouse animal", "computer mouse"),
    "mustang": ("mustang horse", "Ford Mustang car"), "nail": ("metal nail", "fingernail"),
    "notebook": ("notebook computer", "paper notebook"), "nut": ("edible nut", "metal nut"),
    "orange": ("orange fruit", "orange colour"), "organ": ("pipe organ", "human organ"),
    "palm": ("palm tree", "palm of a hand"), "papillon": ("papillon dog", "papillon butterfly"),
    "pen": ("ballpoint pen", "animal pen"), "pepper": ("pepper vegetable", "ground pepper spice"),
    "pike": ("pike fish", "pike weapon"), "pitcher": ("water pitcher", "baseball pitcher"),
    "plane": ("airplane", "carpenter's plane"), "pointer": ("pointer dog", "laser pointer"),
    "pool": ("swimming pool", "pool table"), "puma": ("puma animal", "Puma sports shoe"),
    "pump": ("water pump", "pump shoe"), "ram": ("ram sheep", "Dodge Ram truck"), "ray": ("ray fish", "ray of light"),
    "rook": ("rook bird", "rook chess piece"), "ruler": ("measuring ruler", "king or queen"),
    "scale": ("weighing scale", "fish scale"), "seal": ("seal animal", "wax seal"),
    "shell": ("sea shell", "artillery shell"), "skate": ("skate fish", "ice skate"),
    "sling": ("arm sling", "slingshot"), "sole": ("sole fish", "shoe sole"), "sorrel": ("sorrel horse", "sorrel plant"),
    "spring": ("metal spring", "water spring"), "squash": ("squash vegetable", "squash sport"),
    "swallow": ("swallow bird", "swallowing person"), "swift": ("swift bird", "Suzuki Swift car"),
    "tank": ("army tank", "water tank"), "tick": ("tick insect", "tick mark"), "torch": ("burning torch", "flashlight"),
    "trunk": ("elephant trunk", "luggage trunk"), "turkey": ("turkey bird", "roast turkey"),
    "vault": ("bank vault", "vaulted ceiling"), "washer": ("washing machine", "metal washer ring"),
}
# fmt: on

# '12' and '737-200' have no letters at all; WordNet ids, Freebase ids and hashes have some
SYNSET = re.compile(r"n\d{8}")
ID = re.compile(
    r"(?i:class|label|category|cls|idx?|target|type|group|species|folder)[ _-]?\d+|c\d+|/?m[/.]0\w+"
    r"|(?=(?:[^\d]*\d){3})[0-9A-Fa-f-]{8,}"
)


@dataclass(frozen=True)
class Finding:
    """A finding on the noun of a class in prompts.

    A note (`is_warning` false) needs no action. `proposal` is the noun to use; None if only a person can know it.
    """

    class_name: str
    noun: str
    problem: str
    is_warning: bool
    proposal: str | None


def diagnose(class_names: list[str], nouns: list[str], given: Collection[str] = ()) -> list[Finding]:
    """Return the findings on class names and their nouns, in label order.

    There are none for nouns that a person has chosen: those in `given`, and those not made from the class name, as in
    the record of a style token.
    """
    all_numbered = all(drop_numbering(name) != name for name in class_names)
    # 'T-shirt', 't shirts' and 'tshirt' are the same
    twins = group_names(class_names, ("".join(_words(noun)) for noun in nouns))
    containers = _find_containers(nouns)
    findings = []
    for name, noun in zip(class_names, nouns):
        proposal = propose_noun(name)
        if name in given or noun not in (proposal, " ".join(name.replace("_", " ").split())):
            continue
        id_problem = _find_id(drop_numbering(name))
        if id_problem:
            findings.append(Finding(name, noun, id_problem, True, None))
            continue
        is_sure = all_numbered and noun == proposal
        findings += [Finding(name, noun, *spelling, proposal) for spelling in _find_spellings(name, is_sure)]
        doubles = _find_ambiguities(name, noun, twins, containers)
        findings += [Finding(name, noun, problem, True, None) for problem in doubles]
    return findings


def _find_id(name: str) -> str | None:
    if SYNSET.fullmatch(name):
        return "a WordNet id: give its noun"
    if not any(letter.isalpha() for letter in name):
        return "no letters: give its noun"
    return "an id: give its noun" if ID.fullmatch(name) else None


def _find_spellings(name: str, is_numbering: bool) -> Iterator[tuple[str, bool]]:
    """Yield what `propose_noun` corrects, and whether that is a guess to check."""
    text = drop_numbering(name)
    if text != name:
        yield "numbering in front", not is_numbering  # in a single class it may belong to the name: '2_door_car'
    if "_" in text:
        yield "underscores", False
    text = text.replace("_", " ")
    if separate_digits(text) != text:
        yield "digits glued to a word", True
    text = separate_digits(text)
    if split_camel_case(text) != text:
        yield "CamelCase", True


def _find_ambiguities(name: str, noun: str, twins: dict, containers: dict) -> Iterator[str]:
    """Yield problems of a readable noun: it may be taken for another class or another thing."""
    others = [other for other in twins["".join(_words(noun))] if other != name]
    if others:
        yield f"nearly the same as {list_names(others)}"
    if containers.get(_words(noun)):
        yield f"also part of {list_names(containers[_words(noun)])}"
    meanings = DOUBLE_MEANINGS.get(noun.casefold()) or DOUBLE_MEANINGS.get(" ".join(_words(noun)))
    if meanings:
        yield f"two meanings: write '{meanings[0]}' or '{meanings[1]}'"


def _words(noun: str) -> tuple[str, ...]:
    """Return a noun's words in singular and lower case, without punctuation."""
    return tuple(_singular(word) for word in re.findall(r"\w+", noun.casefold()))


def _singular(word: str) -> str:
    """Return a word without its plural ending, and with 'y' for 'ie', as in 'cookies' and 'puppies'."""
    if len(word) > 3 and word.endswith("s") and not word.endswith("ss"):
        word = word[:-2] if word.endswith(("sses", "xes", "ches", "shes")) else word[:-1]
    return word[:-2] + "y" if word.endswith("ie") else word


def _find_containers(nouns: list[str]) -> dict[tuple[str, ...], list[str]]:
    """Return words of a noun -> the nouns that contain them next to each other, among other words."""
    containers: dict[tuple[str, ...], list[str]] = {_words(noun): [] for noun in nouns}
    for noun in nouns:
        words = _words(noun)
        parts = {words[start:stop] for start in range(len(words)) for stop in range(start + 1, len(words) + 1)}
        for part in parts - {words}:
            if part in containers:
                containers[part].append(noun)
    return containers


def print_findings(findings: list[Finding]) -> None:
    """Print the warnings as a table, a few of each kind, and the notes in one line per kind."""
    console = Console()
    table = Table("class", "noun in the prompt", "what is noticed", "proposal", title="class names")
    counts = Counter()
    for finding in findings:
        counts[finding.is_warning, finding.problem] += 1
        if finding.is_warning and counts[True, finding.problem] <= MAX_ROWS:
            # Text: brackets in a name are not markup
            table.add_row(*map(Text, (finding.class_name, finding.noun, finding.problem, finding.proposal or "?")))
    if table.row_count:
        print_table(table, console)
    examples = {(finding.is_warning, finding.problem): finding for finding in reversed(findings)}
    for (is_warning, problem), count in counts.items():
        first = examples[is_warning, problem]
        if is_warning and count > MAX_ROWS:
            console.print(Text(f"{problem}: {count - MAX_ROWS} more"))
        elif not is_warning:
            line = f"{problem} ({count}): '{first.class_name}' is '{first.noun}' in a prompt"
            console.print(Text(line), soft_wrap=True)


def check_strict(findings: list[Finding]) -> None:
    """Check that no class has a warning, for `--strict_class_names`.

    Raises:
        UserError: some have; the message lists up to ten.
    """
    names = list(dict.fromkeys(finding.class_name for finding in findings if finding.is_warning))
    if names:
        raise UserError(
            f"--strict_class_names true: warnings for {list_names(names)}; --class_names_file resolves them, with a "
            "noun for each."
        )


def write_class_names(path: str | Path, class_names: list[str], nouns: list[str], findings: list[Finding]) -> None:
    """Write class name -> noun as YAML for editing, with findings as comments above the classes, whole or not at all.

    Raises:
        UserError: the file's suffix is not that of YAML, or it cannot be written.
    """
    path = Path(path)
    if path.suffix not in (".yaml", ".yml"):
        raise UserError(f"{path}: must end in .yaml, as class names are written as YAML.")
    comments: dict[str, list[str]] = {}
    for finding in findings:
        proposal = f"; proposal: {finding.proposal}" if finding.proposal not in (None, finding.noun) else ""
        comments.setdefault(finding.class_name, []).append(_comment(f"{finding.problem}{proposal}"))
    lines = [
        "# The noun of each class in prompts, in label order. Edit the text after the colons,",
        "# then pass this file with --class_names_file.",
    ]
    for name, noun in zip(class_names, nouns):
        lines += comments.get(name, [])
        lines.append(yaml.safe_dump({name: noun}, allow_unicode=True, width=float("inf")).rstrip("\n"))
    try:
        write_text(path, "\n".join(lines) + "\n")
    except OSError as error:
        raise UserError(f"{path}: class names cannot be written ({error.strerror}); choose another file.") from None


def _comment(text: str) -> str:
    # a quoted class name may contain line breaks, or characters that YAML refuses
    return "# " + " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())
